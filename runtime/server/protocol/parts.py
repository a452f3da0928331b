"""Messages of a request, read: who says what, and which films and pictures are shown, sampled how.

    {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,...", "fps": 2}}
    {"type": "image_url", "image_url": "data:image/png;base64,..."}

Films are sampled as their part says, else as the request does: `media_io_kwargs.video` as vLLM has it, or
`mm_processor_kwargs`. Opens nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any

from framefusion.errors import RequestError
from framefusion.runtime.media.frame_sampling import FASTEST, MOST_FRAMES, SLOWEST
from framefusion.runtime.server.protocol.fields import Fields, shown
from framefusion.runtime.text.prompt import Visual

ALL_FRAMES = MOST_FRAMES
MOST_PARTS = 4096
"""Of one request: more frames than any model takes."""
MOST_INDEX = (1 << 31) - 1
"""Of a frame in a client's film: a year at 60 frames a second."""
JPEG_FRAMES = "data:video/jpeg;base64,"
"""What vLLM's clients send that sampled a film themselves: JPEG pictures in base64, with commas between them."""
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_PIXELS = "how frames are resized is the bundle's: leave it out, or build another bundle"


@dataclass(frozen=True)
class Sampling:
    """Which frames of a film a client wants; None takes what stands above it, at last the bundle's.

    Attributes:
        fps: frames of a second.
        num_frames: exactly so many, evenly spread; `ALL_FRAMES` for every one.
        max_frames, min_frames: bounds of their number.
        frames_indices: of frames that a client sampled itself: their numbers in its film, which ran at `fps`.
        duration: in seconds, of such a film.
    """

    fps: float | None = None
    num_frames: int | None = None
    max_frames: int | None = None
    min_frames: int | None = None
    frames_indices: tuple[int, ...] | None = None
    duration: float | None = None

    def over(self, base: Sampling) -> Sampling:
        """This one, and `base` where it says nothing: a number of frames clears a rate, and the other way round."""
        if self.num_frames is not None:
            base = replace(base, fps=None, max_frames=None, min_frames=None)
        if self.fps is not None:
            base = replace(base, num_frames=None)
        names = [field.name for field in fields(self)]
        return Sampling(**{n: getattr(base, n) if getattr(self, n) is None else getattr(self, n) for n in names})


@dataclass(frozen=True)
class MediaPart:
    """A film or picture that a message shows.

    Attributes:
        kind: what it is shown as.
        urls: data:, file: or http(s): addresses: one of a file, or those of all frames of a film of pictures.
        place: what messages call it.
        sampling: of a film's frames.
        of_frames: a film of pictures, however few.
    """

    kind: Visual
    urls: tuple[str, ...]
    place: str
    sampling: Sampling = Sampling()
    of_frames: bool = False


@dataclass(frozen=True)
class ChatMessage:
    """One message: who says it, and its parts in order."""

    role: str
    parts: tuple[str | MediaPart, ...]


def read_messages(messages: object, sampling: Sampling, ignored: list[str]) -> list[ChatMessage]:
    """The conversation.

    Args:
        messages: of the request.
        sampling: of every film that says nothing itself.
        ignored: gets the names of unknown fields.

    Raises:
        RequestError: there is none, it does not end with the user, or a message is malformed.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise RequestError(f"messages is {shown(messages)}: give a list of one or more", param="messages")
    taken = []
    for number, given in enumerate(messages):
        message = Fields(given, f"messages[{number}]")
        role = message.text("role")
        if role not in _ROLES:
            known = ", ".join(_ROLES)
            raise message.refuse("role", f"is {shown(role)}: give one of {known} (tools are not called here)")
        message.only("tool_calls", [], because="tools are not called here: leave it out")
        message.take("name")
        parts = _read_parts(message, sampling, ignored)
        if role != "user" and any(isinstance(part, MediaPart) for part in parts):
            raise message.refuse("content", f"shows a film or picture, and the role is {role}: only a user shows some")
        taken.append(ChatMessage(_ROLES[role], parts))
        ignored += message.unknown
    if taken[-1].role != "user":
        raise RequestError(f"the last message is of the role {taken[-1].role}: end with the user's", param="messages")
    if (count := sum(len(message.parts) for message in taken)) > MOST_PARTS:
        raise RequestError(f"messages have {count} parts, at most {MOST_PARTS} are taken: send fewer", param="messages")
    return taken


def _read_parts(message: Fields, sampling: Sampling, ignored: list[str]) -> tuple[str | MediaPart, ...]:
    content = message.take("content")
    if isinstance(content, str):
        return (content,)
    if not isinstance(content, Sequence) or not content:
        raise message.refuse("content", f"is {shown(content)}: give a text, or a list of parts")
    taken: list[str | MediaPart] = []
    for number, given in enumerate(content):
        part = Fields(given, f"{message.name('content')}[{number}]")
        kind = part.text("type")
        if kind == "text":
            text = part.text("text")
            if text is None:
                raise part.refuse("text", "is missing: give a string")
            taken.append(text)
        elif kind == "image_url":
            taken.append(_picture(part, ignored))
        elif kind == "video_url":
            taken.append(_film(part, sampling, ignored))
        else:
            raise part.refuse("type", f"is {shown(kind)}: give text, image_url or video_url")
        ignored += part.unknown
    return tuple(taken)


def _address(part: Fields, kind: str) -> tuple[str, Fields]:
    """The address of a part, and what stands beside it."""
    part.take("uuid")  # a name for a client's own cache
    value = part.take(kind)
    beside = Fields({"url": value} if isinstance(value, str) else value, part.name(kind))
    url = beside.text("url")
    if not url:
        raise beside.refuse("url", "is missing: give a data: URL, or an address that the server allows")
    return url, beside


def _picture(part: Fields, ignored: list[str]) -> MediaPart:
    url, beside = _address(part, "image_url")
    detail = beside.text("detail")
    if detail not in (None, "auto", "low", "high"):
        raise beside.refuse("detail", f"is {shown(detail)}: give auto, low or high")
    ignored += beside.unknown
    return MediaPart(Visual.IMAGE, (url,), beside.name("url"))


def _film(part: Fields, base: Sampling, ignored: list[str]) -> MediaPart:
    url, beside = _address(part, "video_url")
    sampling = read_sampling(beside).over(read_sampling(part)).over(base)
    ignored += beside.unknown
    if url[: len(JPEG_FRAMES)].lower() != JPEG_FRAMES:
        return MediaPart(Visual.VIDEO, (url,), beside.name("url"), sampling)
    frames = url[len(JPEG_FRAMES) :].split(",")
    if len(frames) > MOST_PARTS:
        raise beside.refuse("url", f"has {len(frames)} frames, at most {MOST_PARTS} are taken: send fewer")
    urls = tuple(f"data:image/jpeg;base64,{frame}" for frame in frames)
    return MediaPart(Visual.VIDEO, urls, beside.name("url"), sampling, of_frames=True)


def with_films_of_pictures(message: ChatMessage, sampling: Sampling) -> ChatMessage:
    """The message with pictures that follow each other shown as one film, as clients mean that send a film's frames.

    A picture alone stays one.
    """
    parts: list[str | MediaPart] = []
    run: list[MediaPart] = []
    for part in (*message.parts, None):
        if isinstance(part, MediaPart) and part.kind is Visual.IMAGE:
            run.append(part)
            continue
        if len(run) > 1:
            urls = tuple(picture.urls[0] for picture in run)
            parts.append(MediaPart(Visual.VIDEO, urls, run[0].place, sampling, of_frames=True))
        else:
            parts += run
        run = []
        if part is not None:
            parts.append(part)
    return replace(message, parts=tuple(parts))


def read_request_sampling(fields: Fields, ignored: list[str]) -> Sampling:
    """What `media_io_kwargs` and `mm_processor_kwargs` say of every film of a request."""
    sampling = Sampling()
    media = fields.inner("media_io_kwargs")
    if media is not None:
        video = media.inner("video")
        media.take("image")
        ignored += media.unknown
        if video is not None:
            sampling = read_sampling(video)
            ignored += video.unknown
    processor = fields.inner("mm_processor_kwargs")
    if processor is not None:
        scoped = processor.inner("videos_kwargs")
        sampling = read_sampling(processor).over(sampling)
        ignored += processor.unknown
        if scoped is not None:
            sampling = read_sampling(scoped).over(sampling)
            ignored += scoped.unknown
    return sampling


def read_sampling(given: Fields) -> Sampling:
    """The numbers of frames that an object gives, by any of the names that clients use.

    Raises:
        RequestError: one is out of range, or two contradict each other.
    """
    for name in ("min_pixels", "max_pixels", "size", "do_resize", "resized_height", "resized_width"):
        given.only(name, because=_PIXELS)
    fps = given.number("fps", -1, FASTEST)
    if fps is not None and fps < 0:  # vLLM's word for no rate
        fps = None
    elif fps is not None and fps < SLOWEST:
        raise given.refuse("fps", f"is {fps:g}: give frames of a second, above 0")
    numbers = {name: given.whole(name, -1, MOST_FRAMES) for name in ("num_frames", "nframes")}
    wanted = {name: number for name, number in numbers.items() if number is not None}
    for name, value in wanted.items():
        if value == 0 or value != next(iter(wanted.values())):
            raise given.refuse(name, f"is {value}: give num_frames or nframes, 1 or more, or -1 for all")
    number = next(iter(wanted.values()), None)
    given.take("total_num_frames")
    return Sampling(
        fps,
        ALL_FRAMES if number == -1 else number,
        given.whole("max_frames", 1, MOST_FRAMES),
        given.whole("min_frames", 1, MOST_FRAMES),
        _indices(given),
        given.number("duration", 0, 1e9, above=True),
    )


def _indices(given: Fields) -> tuple[int, ...] | None:
    """Numbers of frames in a client's film, ascending."""
    indices: Any = given.take("frames_indices")
    if indices is None:
        return None
    whole = isinstance(indices, Sequence) and all(isinstance(i, int) and not isinstance(i, bool) for i in indices)
    ascending = whole and indices and indices[0] >= 0 and all(a < b for a, b in pairwise(indices))
    if not ascending or indices[-1] > MOST_INDEX:
        raise given.refuse(
            "frames_indices", f"is {shown(indices)}: give ascending whole numbers from 0 to {MOST_INDEX}"
        )
    return tuple(indices)
