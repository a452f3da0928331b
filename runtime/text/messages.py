"""A conversation as Python programs hold it: a text, turns, or messages as Hugging Face's chat templates take them.

    "What happens?", ["clip.mp4"]                                     a turn of the user that shows the files first
    [Turn("user", (Visual.VIDEO, "What happens?"))], ["clip.mp4"]     turns, with a source for each Visual
    [{"role": "user", "content": [                                    messages, with the sources inside, or
        {"type": "video", "video": "clip.mp4"},                       a place without one, for the next of the files
        {"type": "text", "text": "What happens?"}]}]

Whatever it was, it becomes turns and a source for each Visual of them. Reads no more of a file than says its kind.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, TypeAlias

from framefusion.errors import PromptError
from framefusion.runtime.media.sources import Source, is_pil_image, source_kind
from framefusion.runtime.media.video.frames import Video
from framefusion.runtime.text.prompt import Turn, Visual, as_turns

Message: TypeAlias = Mapping[str, Any]
Conversation: TypeAlias = "str | Turn | Sequence[Turn] | Message | Sequence[Message]"
"""See this module's first lines."""

_FORM = '{"role": "user", "content": [{"type": "video", "video": "clip.mp4"}, {"type": "text", "text": "..."}]}'
_MISSING = object()


def read_conversation(
    conversation: Conversation, files: Sequence[Source] = ()
) -> tuple[Sequence[Turn], Sequence[Source]]:
    """Turns, and a source for each Visual of them.

    Args:
        conversation: a text, turns or messages.
        files: what a text shows before it, what the turns show, or what the messages show where they hold no source.

    Raises:
        PromptError: it is something else, or messages have parts or keys that are unknown.
        VideoError: a text's file is neither a film nor a picture.
    """
    if isinstance(conversation, str):
        visuals = [Visual(source_kind(file)) for file in listed_files(files)]
        return (Turn("user", (*visuals, conversation)),), files
    if isinstance(conversation, Mapping):
        return _read_messages((conversation,), files)
    if isinstance(conversation, Sequence) and any(isinstance(message, Mapping) for message in conversation):
        return _read_messages(conversation, files)
    return as_turns(conversation), listed_files(files)  # type: ignore[arg-type]  # it refuses what is no turn


def listed_files(files: Sequence[Source]) -> Sequence[Source]:
    """The files, which are several.

    Raises:
        PromptError: it is one alone, or can be read once only.
    """
    if hasattr(files, "read"):
        raise PromptError(f"files is one file, {files!r:.120}: give a list of what the turns show")
    if isinstance(files, (str, bytes, Path)):
        raise PromptError(f"files is one name, {str(files)[:120]!r}: give a list of what the turns show")
    kind = type(files).__name__
    alone = isinstance(files, (bytearray, memoryview, Mapping, Video)) or is_pil_image(files)
    if alone or len(getattr(files, "shape", ())) > 1:  # an array's frames would be shown as pictures
        raise PromptError(f"files is one source, of type {kind}: give a list of what the turns show, [source]")
    if not hasattr(files, "__len__"):
        raise PromptError(f"files is of type {kind}, which cannot be read twice: give list(files)")
    return files


def _read_messages(messages: Sequence[Any], files: Sequence[Source]) -> tuple[tuple[Turn, ...], tuple[Source, ...]]:
    """Turns and sources of messages; parts without a source take the next of the files."""
    waiting = iter(listed_files(files))
    shown: list[Source] = []
    turns = []
    for number, message in enumerate(messages):
        place = f"message {number}"
        if not isinstance(message, Mapping):
            raise PromptError(f"{place} is {message!r:.80}: where one is a mapping, all are, such as {_FORM}")
        _check_keys(place, message, {"role", "content"})
        parts: list[str | Visual] = []
        for part, source in _parts(place, message["content"]):
            parts.append(part)
            if isinstance(part, Visual):
                shown.append(_next(place, waiting) if source is _MISSING else source)
        turns.append(Turn(message["role"], parts))
    if (rest := len(list(waiting))) > 0:
        raise PromptError(
            f"the messages show {len(shown)} video(s) and image(s), {rest} more were given: leave them out"
        )
    return tuple(turns), tuple(shown)


def _next(place: str, waiting: Iterator[Source]) -> Source:
    for source in waiting:
        return source
    raise PromptError(
        f'{place} shows a video or an image that is nowhere given: name it in the message, {{"type": "video", "video": '
        '"clip.mp4"}, or in files'
    )


def _parts(place: str, content: object) -> Iterator[tuple[str | Visual, Any]]:
    """The parts of a message in order, visuals with their source."""
    if isinstance(content, str):
        yield content, None
        return
    if not isinstance(content, (list, tuple)):
        raise PromptError(f"the content of {place} is {content!r:.80}: give a text, or a list of parts as in {_FORM}")
    for number, part in enumerate(content):
        where = f"part {number} of {place}"
        if isinstance(part, str):
            yield part, None
            continue
        if not isinstance(part, Mapping):
            raise PromptError(f"{where} is {part!r:.80}: give a mapping, as in {_FORM}")
        kind = part.get("type")
        if kind == "text":
            _check_keys(where, part, {"type", "text"})
            if not isinstance(part["text"], str):
                raise PromptError(f"the text of {where} is {part['text']!r:.80}: give a str")
            yield part["text"], None
        elif kind in ("video", "image"):
            yield Visual(kind), _source(where, part, kind)
        else:
            raise PromptError(f"{where} is of type {kind!r}: use text, video or image")


def _source(where: str, part: Message, kind: str) -> Any:
    """What a part shows, by either of the keys that processors take; `_MISSING` where it names nothing."""
    if "url" in part:
        raise PromptError(f"{where} names a url, only what is on this machine is shown: download it, and give its path")
    _check_keys(where, part, {"type"}, {kind, "path"})
    if kind in part and "path" in part:
        raise PromptError(f"{where} has both {kind} and path: give one")
    return part.get(kind, part.get("path", _MISSING))


def _check_keys(where: str, given: Message, required: Set[str], optional: Set[str] = frozenset()) -> None:
    """Refuse keys that are missing, and those that would be passed over in silence."""
    if missing := sorted(required - set(given)):
        raise PromptError(f"{where} has no {missing[0]!r}: give it as in {_FORM}")
    if unknown := sorted(str(key) for key in set(given) - required - optional):
        known = ", ".join(sorted(required | optional))
        raise PromptError(
            f"{where} has the unknown key {unknown[0]!r}, known are {known}: leave it out (frames are chosen with "
            "sampling=..., pixels are the bundle's)"
        )
