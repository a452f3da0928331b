"""One request of OpenAI's chat completions, read: the messages, and how the answer is to be given.

Fields and spellings are those that clients of OpenAI, vLLM and TensorRT Edge-LLM send; `framefusion` is our own. Opens
nothing and knows no bundle.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from framefusion.errors import RequestError
from framefusion.runtime.request import MAX_NEW_TOKENS, Request
from framefusion.runtime.server.protocol.fields import Fields, printable, shown
from framefusion.runtime.server.protocol.parts import (
    ChatMessage,
    MediaPart,
    read_messages,
    read_request_sampling,
    with_films_of_pictures,
)
from framefusion.runtime.text.sampling import NUMBERS

MOST_NEW_TOKENS = 1 << 20
MOST_STOPS = 16
MOST_STOP_CHARACTERS = 1024
MOST_SEED = (1 << 63) - 1
LONGEST_ID = 128


@dataclass(frozen=True)
class ChatRequest:
    """One request for an answer.

    Attributes:
        messages: of the whole conversation, the last one the user's.
        request: how it is answered.
        model: that the client names; None names none.
        stream: answer in pieces.
        include_usage: end a stream with the counts of tokens.
        session_id: of a conversation whose caches are kept under this name.
        show: give a drawing of what stays of the films, as HTML.
        ignored: names of fields that are unknown here.
    """

    messages: tuple[ChatMessage, ...]
    request: Request
    model: str | None = None
    stream: bool = False
    include_usage: bool = False
    session_id: str | None = None
    show: bool = False
    ignored: tuple[str, ...] = ()

    @property
    def media(self) -> list[MediaPart]:
        """What the messages show, in order."""
        return [part for message in self.messages for part in message.parts if isinstance(part, MediaPart)]


class ReductionDefaults(NamedTuple):
    """What stands for the field `framefusion` of a request, name by name, where it does not say.

    Attributes:
        cost: share of the computation over visual tokens that is kept; None is the bundle's.
        reducer: name of the method; None is the bundle's.
        images_as_video: show pictures that follow each other as one film.
    """

    cost: float | None = None
    reducer: str | None = None
    images_as_video: bool = False


NO_DEFAULTS = ReductionDefaults()


def read_chat_request(body: object, defaults: ReductionDefaults = NO_DEFAULTS) -> ChatRequest:
    """A request from its JSON.

    Args:
        body: decoded.
        defaults: for what a request does not say of its reduction.

    Raises:
        RequestError: a field has a value that means nothing here.
        PromptError: as `Request`.
    """
    fields = Fields(body)
    ignored: list[str] = []
    # 1. What would change an answer and is not done here is refused, not passed over.
    _refuse_what_is_not_done(fields)
    # 2. Our own field, whose names are all known.
    options = _own_options(fields, defaults)
    # 3. Frames of films, then the messages that show them.
    sampling = read_request_sampling(fields, ignored)
    messages = read_messages(fields.take("messages"), sampling, ignored)
    if options.images_as_video:
        messages = [with_films_of_pictures(message, sampling) for message in messages]
    # 4. How tokens are chosen, and how they are given back.
    request = _read_generation(fields, options)
    stream_options = fields.inner("stream_options")
    include_usage = False
    if stream_options is not None:
        include_usage = stream_options.flag("include_usage")
        ignored += stream_options.unknown
    return ChatRequest(
        tuple(messages),
        request,
        model=fields.text("model"),
        stream=fields.flag("stream"),
        include_usage=include_usage,
        session_id=fields.text("session_id", most=LONGEST_ID),
        show=options.show,
        ignored=tuple(printable(name) for name in (*ignored, *fields.unknown)),
    )


def _refuse_what_is_not_done(fields: Fields) -> None:
    """Known fields that may only say nothing."""
    fields.only("n", 1, because="a request gets one answer: ask again for another")
    fields.only("tools", [], because="tools are not called here: leave it out")
    fields.only("functions", [], because="functions are not called here: leave it out")
    fields.only("tool_choice", "none", "auto", because="tools are not called here: leave it out")
    fields.only("function_call", "none", "auto", because="functions are not called here: leave it out")
    fields.only("logprobs", False, because="probabilities of tokens are not given: leave it out")
    fields.only("top_logprobs", 0, because="probabilities of tokens are not given: leave it out")
    fields.only("logit_bias", {}, because="scores of single tokens are not changed: leave it out")
    fields.only("response_format", {"type": "text"}, because="answers are plain text: leave it out")
    fields.only("modalities", ["text"], because="answers are text alone: leave it out")
    fields.only("audio", because="answers are text alone: leave it out")
    for name in ("presence_penalty", "frequency_penalty"):
        fields.only(name, 0, 0.0, because="it is not known here: leave it out, or give repetition_penalty")


class _Options(NamedTuple):
    """The field `framefusion`."""

    cost: float | None = None
    reducer: str | None = None
    images_as_video: bool = False
    show: bool = False


def _own_options(fields: Fields, defaults: ReductionDefaults) -> _Options:
    """`framefusion`, whose names are all known."""
    given = fields.inner("framefusion")
    if given is None:
        return _Options(*defaults)
    cost = given.number("cost", 0, 1, above=True)
    options = _Options(
        defaults.cost if cost is None else cost,
        given.text("reducer", most=LONGEST_ID) or defaults.reducer,
        given.flag("images_as_video", defaults.images_as_video),
        given.flag("show"),
    )
    if given.unknown:
        known = ", ".join(_Options._fields)
        name = printable(given.unknown[0])
        raise RequestError(f"{name} is unknown, known are {known}", param=name)
    return options


def _read_generation(fields: Fields, options: _Options) -> Request:
    """How many tokens, and how they are chosen."""
    limits = {name: fields.whole(name, 1, MOST_NEW_TOKENS) for name in ("max_completion_tokens", "max_tokens")}
    given = {limit for limit in limits.values() if limit is not None}
    if len(given) > 1:
        raise RequestError(
            f"max_completion_tokens is {limits['max_completion_tokens']}, max_tokens is {limits['max_tokens']}: give "
            "one of them",
            param="max_tokens",
        )
    top_k = fields.whole("top_k", -1, 1 << 31)
    return Request(
        max_new_tokens=given.pop() if given else MAX_NEW_TOKENS,
        cost=options.cost,
        seed=fields.whole("seed", 0, MOST_SEED),
        reducer=options.reducer,
        stop=_stops(fields),
        temperature=fields.number("temperature", 0, 2),
        top_p=fields.number("top_p", 0, 1, above=True),
        top_k=0 if top_k == -1 else top_k,  # both are spellings of no limit
        repetition_penalty=fields.number("repetition_penalty", NUMBERS["repetition_penalty"][0], 10),
    )


def _stops(fields: Fields) -> tuple[str, ...]:
    """Texts that end an answer."""
    stop = fields.take("stop")
    if stop is None:
        return ()
    texts = [stop] if isinstance(stop, str) else stop
    right = isinstance(texts, Sequence) and len(texts) <= MOST_STOPS and all(isinstance(t, str) and t for t in texts)
    if not right or any(len(text) > MOST_STOP_CHARACTERS for text in texts):
        raise RequestError(
            f"stop is {shown(stop)}: give a text or up to {MOST_STOPS}, none of them empty or longer than "
            f"{MOST_STOP_CHARACTERS} characters",
            param="stop",
        )
    return tuple(texts)
