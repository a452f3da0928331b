"""What a batch asks: a folder of films, lines of JSON or rows of Parquet, read one by one.

    clips/                                                       each film and picture below it, with one prompt
    {"id": "a", "video": "a.mp4", "prompt": "What happens?"}     a line of JSONL, or a row of Parquet with these columns
    {"custom_id": "a", "url": "/v1/chat/completions", "body": {...}}    a line as OpenAI's batch API takes it

Everything is read once before the first answer, so that a broken line at the end of a hundred thousand is found at the
beginning. Decodes nothing.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from framefusion.errors import BackendError, PromptError, RequestError
from framefusion.runtime.media.media_file import FILM_SUFFIXES, PICTURE_SUFFIXES
from framefusion.runtime.server.protocol.fields import Fields, shown
from framefusion.runtime.server.protocol.parts import ChatMessage, MediaPart
from framefusion.runtime.server.protocol.request import NO_DEFAULTS, ChatRequest, ReductionDefaults, read_chat_request
from framefusion.runtime.text.prompt import Visual

COMPLETIONS = "/v1/chat/completions"
SETTINGS = ("max_tokens", "seed", "temperature", "top_p", "top_k", "stop", "repetition_penalty")
_LINE_BYTES = 1 << 30  # of one line: a film in base64 and more


@dataclass(frozen=True)
class BatchQuestion:
    """One question of a batch.

    Attributes:
        id: unique in the batch.
        chat: what is said and shown, and how it is answered.
        openai: it came as OpenAI's batch API takes it, and is answered so.
        extra: what else its line has, which its answer repeats.
        given: names of the fields of `chat.request` that its line says; the others are the run's.
    """

    id: str
    chat: ChatRequest
    openai: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict)
    given: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Defaults:
    """What questions take that do not say themselves.

    Attributes:
        prompt: asked about every film; None where each line has its own.
        system: what the system says.
        reduction: for lines of OpenAI's; the run has that of the others.
        model: the name that lines of OpenAI's may ask for; None takes any.
    """

    prompt: str | None = None
    system: str | None = None
    reduction: ReductionDefaults = NO_DEFAULTS
    model: str | None = None


@dataclass(frozen=True)
class Shard:
    """One part of a batch, by the ids: the same ones whatever order the input has.

    Attributes:
        index: from 0.
        count: of all parts.
    """

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Of "0/4".

        Raises:
            PromptError: it is none.
        """
        index, _, count = text.partition("/")
        if not index.isdecimal() or not count.isdecimal() or not int(index) < int(count):
            raise PromptError(f"the shard {text!r} is none: give index/count, such as 0/4 to 3/4")
        return cls(int(index), int(count))

    def has(self, identity: str) -> bool:
        """Whether a question is in this part."""
        return (
            int.from_bytes(hashlib.sha256(identity.encode(errors="surrogatepass")).digest()[:8], "big") % self.count
            == self.index
        )


def read_questions(source: Path, defaults: Defaults, shard: Shard) -> Iterator[BatchQuestion]:
    """The questions of one part of a batch, in the order of the input.

    Raises:
        PromptError, RequestError: a line is malformed, or has no film, no prompt or no id.
        BackendError: Parquet is not installed.
    """
    for place, row in _rows(source):
        question = read_row(row, place, source.parent if source.is_file() else source, defaults)
        if shard.has(question.id):
            yield question


def check_questions(source: Path, defaults: Defaults, shard: Shard) -> int:
    """Read everything once; returns the number of questions in this part.

    Raises:
        PromptError: there is none, two have one id, or as `read_questions`.
    """
    known: set[str] = set()
    for question in read_questions(source, defaults, Shard()):
        if question.id in known:
            raise PromptError(f"{source}: the id {question.id!r} stands there twice: give each question its own")
        known.add(question.id)
    if not known:
        raise PromptError(f"{source} has no question: give films or lines of JSON")
    return sum(shard.has(identity) for identity in known)


def _rows(source: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Place and content of each question, as its input has it."""
    if source.is_dir():
        for path in _files(source):
            kind = "video" if path.suffix.lower() in FILM_SUFFIXES else "image"
            name = path.relative_to(source).as_posix()
            yield str(path), {"id": name, kind: name}
    elif not source.is_file():
        raise PromptError(f"{source} is no file and no folder: give a folder of films, a .jsonl or a .parquet file")
    elif source.suffix == ".parquet":
        yield from _parquet_rows(source)
    else:
        yield from _json_rows(source)


def _files(folder: Path) -> Iterator[Path]:
    """Films and pictures below a folder and below those that it links to, sorted by their path.

    Raises:
        PromptError: a folder cannot be read, or links lead back to one that is above.
    """

    def unreadable(error: OSError) -> None:
        raise PromptError(f"{error.filename} cannot be read ({error.strerror}): allow it, or move it away") from error

    suffixes = FILM_SUFFIXES | PICTURE_SUFFIXES
    found = []
    for place, folders, names in os.walk(folder, onerror=unreadable, followlinks=True):
        found += [Path(place, name) for name in names if Path(name).suffix.lower() in suffixes]
        here = Path(place).resolve()
        for name in folders:
            linked = Path(place, name)
            if linked.is_symlink() and here.is_relative_to(linked.resolve()):
                raise PromptError(f"{linked} leads back to {linked.resolve()}: remove the link")
    yield from sorted(found)


def _json_rows(source: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    with source.open("rb") as file:
        number = 0
        while line := file.readline(_LINE_BYTES):
            number += 1
            if not line.strip():
                continue
            place = f"{source}, line {number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise PromptError(f"{place} is no JSON ({error}): correct it") from None
            if not isinstance(row, dict):
                raise PromptError(f"{place} is {shown(row)}: give an object")
            yield place, row


def _parquet_rows(source: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        from pyarrow import ArrowException, parquet
    except ModuleNotFoundError as error:
        raise BackendError(f"{source} needs {error.name} to be read: pip install pyarrow, or give JSONL") from None
    try:
        number = 0
        with parquet.ParquetFile(source) as file:
            for batch in file.iter_batches(batch_size=256):
                for row in batch.to_pylist():
                    number += 1
                    given = {name: _as_json(value) for name, value in row.items()}
                    yield f"{source}, row {number}", {name: v for name, v in given.items() if v is not None}
    except ArrowException as error:
        raise PromptError(f"{source} is no Parquet that can be read ({error}): write it anew") from None


def _as_json(value: Any) -> Any:
    """A value of a table as JSON has it: times and decimals as text, numbers that are none as nothing."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(name): _as_json(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_json(inner) for inner in value]
    if isinstance(value, bytes):
        return value.hex()
    return value if value is None or isinstance(value, (str, int)) else str(value)


# --- One question ---------------------------------------------------------------------------------------------------


def read_row(row: Mapping[str, Any], place: str, folder: Path, defaults: Defaults) -> BatchQuestion:
    """One question.

    Args:
        row: a line of JSON or a row of a table.
        place: what messages call it.
        folder: from which paths in it go on.
        defaults: for what it does not say.

    Raises:
        PromptError: it is malformed, or has no prompt or no id.
    """
    try:
        if "custom_id" in row or "body" in row:
            return _openai_question(row, defaults)
        return _plain_question(row, folder, defaults)
    except (RequestError, PromptError) as error:
        raise PromptError(f"{place}: {error}") from None


def _openai_question(row: Mapping[str, Any], defaults: Defaults) -> BatchQuestion:
    fields = Fields(row)
    identity = fields.text("custom_id")
    fields.only("method", "POST", because="only POST is known")
    fields.only("url", COMPLETIONS, because=f"only {COMPLETIONS} is known")
    if not identity:
        raise PromptError("custom_id is missing: give each line its own")
    chat = read_chat_request(fields.take("body"), defaults.reduction)
    if chat.model is not None and defaults.model is not None and chat.model != defaults.model:
        raise PromptError(
            f"model is {shown(chat.model)}, the bundle answers as {shown(defaults.model)}: give --model-name "
            "the name that the lines have, if it is their model"
        )
    if chat.stream:
        raise PromptError("a batch streams nothing: leave stream out")
    return BatchQuestion(identity, chat, openai=True)


def _plain_question(row: Mapping[str, Any], folder: Path, defaults: Defaults) -> BatchQuestion:
    fields = Fields(row)
    identity = fields.take("id")
    if not isinstance(identity, (str, int)) or isinstance(identity, bool) or identity == "":
        raise PromptError(f"id is {shown(identity)}: give a text or a number of its own")
    parts: list[str | MediaPart] = []
    for kind in (Visual.VIDEO, Visual.IMAGE):
        given = fields.take(kind.value)
        names = given if isinstance(given, list) else [] if given is None else [given]
        for name in names:
            if not isinstance(name, str) or not name:
                raise PromptError(f"{kind.value} is {shown(given)}: give a path, or a list of paths")
            path = Path(os.path.abspath(folder / name))  # what is not there costs its own line, later
            parts.append(MediaPart(kind, (path.as_uri(),), name))
    prompt = fields.text("prompt") or defaults.prompt
    if prompt is None:
        raise PromptError("there is no prompt: give one in the line, or --prompt for all")
    system = fields.text("system") or defaults.system
    settings = {name: fields.take(name) for name in SETTINGS}
    options = {name: fields.take(name) for name in ("cost", "reducer")}
    body = {"messages": [{"role": "user", "content": prompt}], **settings, "framefusion": options}
    chat = read_chat_request({name: value for name, value in body.items() if value is not None})
    messages: tuple[ChatMessage, ...] = (ChatMessage("user", (*parts, prompt)),)
    if system is not None:
        messages = (ChatMessage("system", (system,)), *messages)
    extra = {name: row[name] for name in fields.unknown}
    said = [name for name, value in (settings | options).items() if value is not None]
    given = frozenset("max_new_tokens" if name == "max_tokens" else name for name in said)
    return BatchQuestion(str(identity), replace(chat, messages=messages), extra=extra, given=given)
