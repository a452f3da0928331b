"""A process of its own that renders a chat template: it may be hostile, so its time, memory and output are limited.

Started with one JSON object on stdin: the template's source, the tokens it may name and the conversations; answers with
one JSON list on stdout, a text or an error for each up to the first that exceeds a limit. The environment is the one in
which transformers renders: sandboxed, immutable, with the same filters, functions and tags; what would differ from one
day or run to the next is an error. Imports nothing but jinja2.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment, Template
    from jinja2.nodes import Node
    from jinja2.parser import Parser

PROCESSOR_SECONDS = 3
MEMORY = 1 << 29  # bytes of address space
MAX_OUTPUT = 1 << 18  # characters of one conversation; those of the published templates are below a thousand
VARYING = "varying"
"""Kind of the error of a template that does not always write the same."""
LIMITS = ("MemoryError", "OverflowError", "RecursionError")
"""Kinds of errors behind which nothing else is rendered: whatever follows would take as long once more."""


class VaryingError(Exception):
    """A template asks for the date or for chance."""


def main() -> None:
    """Answer what stands on stdin."""
    request = json.load(sys.stdin)
    environment = _environment()
    _limit()
    try:
        template = environment.from_string(request["source"])
    except Exception as error:
        json.dump([_problem(error)] * len(request["conversations"]), sys.stdout)
        return
    answers = []
    for messages, answer in request["conversations"]:
        answers.append(_answer(template, messages, answer, request["tokens"]))
        if answers[-1].get("kind") in LIMITS:
            break
    json.dump(answers, sys.stdout)


def _answer(template: Template, messages: list[dict[str, Any]], answer: bool, tokens: dict[str, str]) -> dict[str, str]:
    pieces: list[str] = []
    length = 0
    try:
        for piece in template.generate(
            messages=messages, tools=None, documents=None, add_generation_prompt=answer, **tokens
        ):
            pieces.append(piece)
            length += len(piece)
            if length > MAX_OUTPUT:
                return {"error": f"it writes more than {MAX_OUTPUT} characters for a conversation of a few words"}
        return {"text": "".join(pieces)}
    except Exception as error:
        return _problem(error)


def _problem(error: Exception) -> dict[str, str]:
    kind = VARYING if isinstance(error, VaryingError) else type(error).__name__
    return {"error": str(error)[:200] or kind, "kind": kind}


def _limit() -> None:
    try:
        import resource
    except ImportError:  # Windows has none; the parent's clock remains
        return
    # A second between the two: the first ends the process by a signal of its own, the second by one that anybody sends.
    resource.setrlimit(resource.RLIMIT_CPU, (PROCESSOR_SECONDS, PROCESSOR_SECONDS + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


def _environment() -> Environment:
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} marks what an assistant says, for training; the text is what stands in it."""

        tags = {"generation"}  # noqa: RUF012  # as jinja2 declares it

        def parse(self, parser: Parser) -> Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    def raise_exception(message: object) -> None:
        raise jinja2.TemplateError(str(message))

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.filters["random"] = _varying("the filter random")
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = _varying("strftime_now, today's date")
    environment.globals["lipsum"] = _varying("lipsum, random words")
    return environment


def _varying(what: str) -> Callable[..., None]:
    def refuse(*_: object, **__: object) -> None:
        raise VaryingError(f"it uses {what}")

    return refuse


if __name__ == "__main__":
    main()
