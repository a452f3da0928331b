"""What the benchmark asks, and how: films, requests, answers as they come and as they are expected.

Expected answers are those of a `Pipeline` in this process, by itself, with no server and no batch.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import openai

from framefusion.runtime.pipeline import Pipeline
from framefusion.runtime.request import Generation, PrefillReport, Request

RATE = 2  # frames a second, of which the bundle samples every one


@dataclass(frozen=True)
class Ask:
    """One request: a question, or two of one conversation.

    Attributes:
        film: that the first question is about; None asks in text alone.
        questions: one, or two.
        cost: of the film.
        new_tokens: of each answer, at most.
        seed: tokens are drawn with it; None takes the best ones.
        stream: the answer comes in pieces.
    """

    film: Path | None
    questions: tuple[str, ...]
    cost: float
    new_tokens: int
    seed: int | None = None
    stream: bool = True

    @property
    def request(self) -> Request:
        """The same for a pipeline."""
        temperature = 0.0 if self.seed is None else 0.8
        return Request(self.new_tokens, cost=self.cost, seed=self.seed, temperature=temperature)

    def body(self, messages: Sequence[dict[str, Any]], *, stream: bool) -> dict[str, Any]:
        """Arguments of the client's call."""
        body: dict[str, Any] = {
            "model": "bench",
            "messages": list(messages),
            "max_tokens": self.new_tokens,
            "temperature": self.request.temperature,
            "extra_body": {"framefusion": {"cost": self.cost}},
        }
        if self.seed is not None:
            body["seed"] = self.seed
        return body | ({"stream": True, "stream_options": {"include_usage": True}} if stream else {})

    def first(self) -> dict[str, Any]:
        """The message of the first question."""
        parts: list[dict[str, Any]] = [{"type": "text", "text": self.questions[0]}]
        if self.film is not None:
            parts.insert(0, {"type": "video_url", "video_url": {"url": self.film.resolve().as_uri()}})
        return {"role": "user", "content": parts}


@dataclass
class Answer:
    """An answer as a client got it.

    Attributes:
        text: of it.
        new_tokens, cached_tokens: as the server counts them.
        sent, first, last: when the request went, and when the first and the last piece of text came.
        times: when each piece came.
        seconds: by stage, as the server says.
    """

    text: str = ""
    new_tokens: int = 0
    cached_tokens: int = 0
    sent: float = 0.0
    first: float = 0.0
    last: float = 0.0
    times: list[float] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def to_first(self) -> float:
        """Seconds to the first token."""
        return self.first - self.sent


def ask(client: openai.OpenAI, body: dict[str, Any], *, give_up_after: int | None = None) -> Answer:
    """Ask, and take the answer as it comes.

    Args:
        client: of one server.
        body: of `Ask.body`.
        give_up_after: pieces behind which the client hangs up.
    """
    answer = Answer(sent=time.perf_counter())
    if not body.get("stream"):
        whole: Any = client.chat.completions.create(**body)
        answer.first = answer.last = time.perf_counter()
        answer.text = whole.choices[0].message.content or ""
        _count(answer, whole)
        return answer
    with client.chat.completions.create(**body) as pieces:
        for piece in pieces:
            text = piece.choices[0].delta.content if piece.choices else None
            if text:
                answer.times.append(time.perf_counter())
                answer.text += text
            if piece.usage is not None:
                _count(answer, piece)
            if give_up_after is not None and len(answer.times) >= give_up_after:
                break
    ended = time.perf_counter()
    answer.first = answer.times[0] if answer.times else ended
    answer.last = answer.times[-1] if answer.times else ended
    return answer


def _count(answer: Answer, piece: Any) -> None:
    answer.new_tokens = piece.usage.completion_tokens
    answer.cached_tokens = piece.usage.prompt_tokens_details.cached_tokens
    answer.seconds = dict(piece.framefusion["seconds"])


@dataclass(frozen=True)
class Expected:
    """The answers to an `Ask`.

    Attributes:
        first: to its first question.
        second: to its second one, where the caches of the first were continued; None where there is none.
        afresh: to the second one, where the whole conversation was prefilled.
        report: of the first one's prefill.
    """

    first: str
    second: str | None
    afresh: str | None
    report: PrefillReport


def expected(pipeline: Pipeline, wanted: Ask) -> Expected:
    """What a pipeline by itself answers."""
    files = [] if wanted.film is None else [wanted.film]
    session = pipeline.session()
    answer = session.ask(_messages(wanted, None), files, wanted.request)
    if len(wanted.questions) == 1:
        return Expected(answer.text, None, None, session.records[0])
    second = session.ask(wanted.questions[1], (), wanted.request)
    afresh = pipeline.generate(_messages(wanted, answer), files, wanted.request)
    return Expected(answer.text, second.text, afresh.text, session.records[0])


def _messages(wanted: Ask, answer: Generation | None) -> list[dict[str, Any]]:
    content: list[dict[str, Any]] = [{"type": "text", "text": wanted.questions[0]}]
    if wanted.film is not None:
        content.insert(0, {"type": "video"})
    messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
    if answer is not None:
        messages += [{"role": "assistant", "content": answer.text}, {"role": "user", "content": wanted.questions[1]}]
    return messages


def draw_film(path: Path, frames: int, size: tuple[int, int], seed: int) -> Path:
    """A film in MPEG-4: noise of which three quarters stay, and a square that moves.

    Args:
        path: of the file.
        frames: how many.
        size: height and width in pixels.
        seed: of the noise.
    """
    import av

    (height, width) = size
    random = np.random.default_rng(seed)
    side = height // 4
    picture = random.integers(0, 200, (height, width, 3), np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=Fraction(RATE))
        stream.height = height
        stream.width = width
        stream.pix_fmt = "yuv420p"
        for index in range(frames):
            picture[: height // 4] = random.integers(0, 200, (height // 4, width, 3), np.uint8)
            shown = picture.copy()
            left = index * (width - side) // max(frames - 1, 1)
            shown[height // 2 : height // 2 + side, left : left + side] = (230, 30, 30)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(shown, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Of seconds: the middle, the twentieth largest of a hundred, and the largest."""
    return {
        "p50_s": float(np.percentile(values, 50)),
        "p95_s": float(np.percentile(values, 95)),
        "max_s": max(values),
        "count": len(values),
    }
