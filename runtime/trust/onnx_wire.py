"""The content of an ONNX file, read from protobuf's wire format without the onnx package: operators, weights, inputs.

Strict where a parser is lenient: a field that is not known here, or one that stands twice where it may stand once, is
refused, so that nothing is in the file that this reader has not read. Linear in the file; weights are skipped. Knows no
bundle and no limit of a runtime. Field numbers are those of onnx.proto3.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from framefusion.runtime.trust.onnx_model import (
    CACHE_ATTENTION,
    QUANTIZED_PRODUCT,
    Attribute,
    CacheAttention,
    Choice,
    OnnxModel,
    QuantizedProduct,
    Tensor,
    Value,
)

MOST_FIELDS = 1 << 21  # of all messages of a file: those of a 7B model have a twentieth
_MOST_NUMBERS = 64  # of a shape or an attribute
_VARINT = 0
_FIXED64 = 1
_BYTES = 2
_FIXED32 = 5
_WIDTH = {_FIXED64: 8, _FIXED32: 4}
_PAST = slice(3, 5)  # among the inputs of an attention over caches


Span = tuple[int, int]
"""Begin and end of a message's bytes in the file."""
FieldValue = int | Span | None
"""The value of a field: a number, the bytes of a text or a message, or none for numbers that are not read."""


class WireError(ValueError):
    """A file that is no ONNX model of the kind that is read here; the message says what it holds."""


def read_model(content: bytes) -> OnnxModel:
    """Read a model.

    Raises:
        WireError: it is no model, or holds functions, subgraphs other than branches of an If that hold none
            themselves, sparse tensors, training, or unknown fields.
    """
    return _Reader(content).model()


class _AttributeFields(NamedTuple):
    """What one attribute states."""

    name: str
    numbers: list[int]
    text: str | None
    graph: Span | None


class _Reader:
    def __init__(self, content: bytes) -> None:
        self._content = content
        self._left = MOST_FIELDS
        self._in_branch = False
        self._model = OnnxModel()

    def model(self) -> OnnxModel:
        """The whole file as one ModelProto.

        Raises:
            WireError: see `read_model`.
        """
        graphs = 0
        for number, value in self._fields((0, len(self._content)), "model", {1, 2, 3, 4, 5, 6, 7, 8, 14}):
            if number == 7:  # graph
                graphs += 1
                if graphs > 1:
                    raise WireError("it holds two graphs")
                self._graph(value)
            elif number == 8:  # opset_import
                domain, version = self._opset(value)
                if domain in self._model.opsets:
                    raise WireError(f"it states the opset of {domain!r} twice")
                self._model.opsets[domain] = version
        if not graphs:
            raise WireError("it holds no graph")
        return self._model

    def _opset(self, span: FieldValue) -> tuple[str, int]:
        fields = self._once(span, "opset", {1, 2})  # domain, version
        return self._text(fields.get(1)), self._number(fields.get(2))

    def _graph(self, span: FieldValue) -> None:
        model = self._model
        for number, value in self._fields(span, "graph", {1, 2, 5, 10, 11, 12, 13, 16}):
            if number == 1:  # node
                self._node(value)
            elif number == 5:  # initializer
                model.initializers.append(self._tensor(value))
            elif number in (11, 12):  # input, output
                name, declared = self._value(value)
                same_side = model.inputs if number == 11 else model.outputs
                if name in same_side:
                    raise WireError(f"it has two inputs or outputs called {ascii(name)[:60]}")
                same_side[name] = declared
            elif number not in (2, 10):  # name, doc_string
                self._span(value)

    def _node(self, span: FieldValue) -> None:
        operator: str | None = None
        domain: str | None = None
        attributes: list[_AttributeFields] = []
        inputs: list[FieldValue] = []
        outputs: list[FieldValue] = []
        for number, value in self._fields(span, "node", {1, 2, 3, 4, 5, 6, 7, 9}):
            if number == 1:  # input
                inputs.append(value)
            elif number == 2:  # output
                outputs.append(value)
            elif number == 4:  # op_type
                operator = self._again(operator, value, "operator")
            elif number == 7:  # domain
                domain = self._again(domain, value, "domain")
            elif number == 5:  # attribute
                attributes.append(self._attribute(value))
        self._model.nodes += 1
        self._model.operators.add((domain or "", operator or ""))
        for name in map(self._text, outputs):
            self._model.producers.setdefault(name, set()).add(operator or "")
        branches = [(each.name, each.graph) for each in attributes if each.graph is not None]
        if branches:
            self._choice(f"{domain or ''}.{operator}", branches)
        if operator == "Constant":
            return  # its attribute is a value, and may be any
        if operator == QUANTIZED_PRODUCT:
            numbers = _numbers_of(attributes)
            if len(numbers) != len(attributes):
                raise WireError(f"a {QUANTIZED_PRODUCT} states an attribute twice, or not in one number")
            self._model.products.append(QuantizedProduct(tuple(map(self._text, inputs)), numbers))
        if operator == CACHE_ATTENTION:
            numbers = _numbers_of(attributes)
            texts = {each.name: each.text for each in attributes if each.text is not None}
            if len({each.name for each in attributes}) != len(attributes):
                raise WireError(f"a {CACHE_ATTENTION} states an attribute twice")
            past = tuple(map(self._text, inputs[_PAST]))
            self._model.attentions.append(CacheAttention(past, numbers, texts))
        for each in attributes:
            for integer in each.numbers or (None,):
                self._model.attributes.add(Attribute(domain or "", operator or "", each.name, integer))

    def _choice(self, operator: str, branches: list[tuple[str, Span]]) -> None:
        """The subgraphs of a node: only an If may have some, and what they hold is the model's."""
        if operator != ".If" or self._in_branch:
            raise WireError(f"a node {ascii(operator)[:60]} holds a subgraph, or one lies within another")
        self._in_branch = True
        outputs = [self._branch(span) for _, span in branches]
        self._in_branch = False
        self._model.choices.append(Choice(tuple(name for name, _ in branches), tuple(outputs)))

    def _branch(self, span: Span) -> int:
        """The nodes of a subgraph without inputs and weights of its own; returns how many outputs it has."""
        outputs = 0
        for number, value in self._fields(span, "branch", {1, 2, 10, 12, 13}):
            if number == 1:  # node
                self._node(value)
            elif number == 12:  # output
                self._value(value)
                outputs += 1
            else:  # name, doc_string, value_info
                self._span(value)
        return outputs

    def _again(self, before: str | None, value: FieldValue, what: str) -> str:
        """A text that a node states once; `before` is what it was until here."""
        if before is not None:
            raise WireError(f"a node states its {what} twice")
        return self._text(value)

    def _attribute(self, span: FieldValue) -> _AttributeFields:
        """The name of an attribute with its integers, its text or its subgraph."""
        tensors = 0
        graph: Span | None = None
        text: str | None = None
        name: str | None = None
        values: list[int] = []
        for number, value in self._fields(span, "attribute", {1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 20}):
            if number == 5:  # t
                tensors += 1
                if tensors > 1 or self._tensor(value).external is not None:
                    raise WireError("an attribute's numbers lie in another file")
            elif number == 1:  # name
                name = self._again(name, value, "attribute's name")
            elif number == 6:  # g
                if graph is not None:
                    raise WireError("an attribute states its graph twice")
                graph = self._span(value)
            elif number == 4:  # s
                text = self._again(text, value, "attribute's text")
            elif number in (3, 8):  # i, ints
                values += self._numbers(value)
                if len(values) > _MOST_NUMBERS:
                    raise WireError(f"an attribute has more than {_MOST_NUMBERS} numbers")
        return _AttributeFields(name or "", values, text, graph)

    def _tensor(self, span: FieldValue) -> Tensor:
        name = ""
        dtype = 0
        shape: list[int] = []
        inline: int | None = None
        location: int | None = None
        external: dict[str, str] = {}
        numbers: set[int] = set()
        for number, value in self._fields(span, "tensor", {1, 2, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14}):
            if number in numbers and number in (2, 8, 9, 14):
                raise WireError("a tensor states something twice")
            numbers.add(number)
            if number == 1:  # dims
                shape += self._numbers(value)
            elif number == 2:  # data_type
                dtype = self._number(value)
            elif number == 8:  # name
                name = self._text(value)
            elif number == 9:  # raw_data
                start, end = self._span(value)
                inline = end - start
            elif number == 13:  # external_data
                entry = self._once(value, "place", {1, 2})  # key, value
                key = self._text(entry.get(1))
                if key in external:
                    raise WireError(f"a tensor states its {ascii(key)[:60]} twice")
                external[key] = self._text(entry.get(2))
            elif number == 14:  # data_location: 1 is external
                location = self._number(value)
        if location not in (None, 0, 1) or (location == 1) != bool(external):
            raise WireError(f"tensor {ascii(name)[:60]} does not say where its numbers lie")
        if external and numbers & {4, 5, 6, 7, 9, 10, 11}:
            raise WireError(f"tensor {ascii(name)[:60]} has numbers in two places")
        return Tensor(name, dtype, tuple(shape), inline, external or None)

    def _value(self, span: FieldValue) -> tuple[str, Value]:
        fields = self._once(span, "value", {1, 2, 3, 4})  # name, type, doc_string, metadata
        kind = self._once(fields.get(2), "type", {1, 6})  # tensor_type, denotation
        tensor = self._once(kind.get(1), "tensor type", {1, 2})  # elem_type, shape
        sizes = []
        if 2 in tensor:
            for _, dim in self._fields(tensor[2], "shape", {1}):
                size = self._once(dim, "size", {1, 2, 3}).get(1, -1)  # dim_value; a name leaves it free
                sizes.append(self._number(size))
        return self._text(fields.get(1)), Value(self._number(tensor.get(1)), tuple(sizes))

    def _once(self, span: FieldValue, what: str, known: set[int]) -> dict[int, FieldValue]:
        """Fields of a message in which each may stand once."""
        fields: dict[int, FieldValue] = {}
        for number, value in self._fields(span, what, known):
            if number in fields:
                raise WireError(f"a {what} states field {number} twice")
            fields[number] = value
        return fields

    def _fields(self, span: FieldValue, what: str, known: set[int]) -> Iterator[tuple[int, FieldValue]]:
        """Number and value of each field of a message.

        Raises:
            WireError: a field that is not `known`, a message that runs over its end, or more fields than a file has.
        """
        place, end = self._span(span)
        content = self._content
        while place < end:
            self._left -= 1
            if self._left < 0:
                raise WireError(f"it has more than {MOST_FIELDS} fields")
            tag = content[place]
            place += 1
            if tag & 0x80:
                tag, place = self._varint(place - 1, end)
            number = tag >> 3
            kind = tag & 7
            if number not in known:
                raise WireError(f"a {what} holds field {number}, which is not read here")
            if kind == _BYTES:
                size = content[place] if place < end else 0x80
                if size & 0x80:
                    size, place = self._varint(place, end)
                else:
                    place += 1
                if size > end - place:
                    raise WireError(f"a {what} is cut off")
                yield number, (place, place + size)
                place += size
            elif kind == _VARINT:
                value, place = self._varint(place, end)
                yield number, value
            else:
                place += _WIDTH.get(kind, end)  # groups, and what is no kind, end beyond the message
                if place > end:
                    raise WireError(f"a {what} is cut off")
                yield number, None

    def _varint(self, place: int, end: int) -> tuple[int, int]:
        """A number and the place behind it."""
        value = 0
        shift = 0
        while place < end and shift < 64:
            byte = self._content[place]
            place += 1
            value |= (byte & 0x7F) << shift
            if not byte & 0x80:
                return value, place
            shift += 7
        raise WireError("a number is cut off or too long")

    def _numbers(self, value: FieldValue) -> list[int]:
        """The values of a repeated number: packed, or a single one."""
        if isinstance(value, int):
            return [self._number(value)]
        place, end = self._span(value)
        numbers: list[int] = []
        while place < end and len(numbers) <= _MOST_NUMBERS:
            number, place = self._varint(place, end)
            numbers.append(self._number(number))
        return numbers

    def _number(self, value: FieldValue) -> int:
        if value is None:
            return 0
        if not isinstance(value, int):
            raise WireError("a number was expected")
        return value - (1 << 64) if value >= 1 << 63 else value

    def _text(self, value: FieldValue) -> str:
        if value is None:
            return ""
        start, end = self._span(value)
        try:
            return self._content[start : min(end, start + 4096)].decode("utf-8")
        except UnicodeDecodeError:
            raise WireError("a text is not UTF-8") from None

    def _span(self, value: FieldValue) -> Span:
        if value is None:
            return 0, 0
        if not isinstance(value, tuple):
            raise WireError("bytes were expected")
        return value


def _numbers_of(attributes: list[_AttributeFields]) -> dict[str, int]:
    """Attribute -> its integer, of those that have one."""
    return {each.name: each.numbers[0] for each in attributes if len(each.numbers) == 1}
