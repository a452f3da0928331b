"""One request from the caller's side: what it says, the steps it makes, the answer they add up to, and the seconds.

Knows no graph and no bundle.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from numbers import Integral, Real
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from framefusion.errors import PromptError
from framefusion.reduction.policy import CallRecord
from framefusion.runtime.media.tiles.thumbnails import Thumbnails
from framefusion.runtime.media.video.frames import VideoFacts
from framefusion.runtime.notebook.answer_html import answer_html, display_html
from framefusion.runtime.text.sampling import DRAWING, GenerationConfig

MAX_NEW_TOKENS = 128
FinishReason = Literal["stop", "length"]
_NUMBERS: Mapping[str, type] = {
    "max_new_tokens": Integral,
    "cost": Real,
    "similarity_lower_bound": Real,
    "ratio_lower_bound": Real,
    "seed": Integral,
}
"""Fields of `Request` that are numbers, beside those that `GenerationConfig` checks."""


@dataclass(frozen=True)
class Request:
    """What may differ from one generation to the next; None takes the bundle's own value.

    `generation` as well: what it leaves None, such as the tokens that end an answer, is as the bundle says. Giving a
    temperature, top_p or top_k asks for tokens to be drawn, as the flags of the commands do; a repetition penalty acts
    on the best tokens, too. Each is said here or in `generation`.

    Raises:
        PromptError: a value has another type or is out of range, or `generation` says another.
    """

    max_new_tokens: int = MAX_NEW_TOKENS
    cost: float | None = None
    similarity_lower_bound: float | None = None
    ratio_lower_bound: float | None = None
    generation: GenerationConfig | None = None
    seed: int | None = None
    reducer: str | None = None  # a name of framefusion.reducers
    stop: tuple[str, ...] = ()  # texts that end an answer before they are said
    temperature: float | None = None  # 0 takes the best token
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None

    def __post_init__(self) -> None:
        for name, kind in _NUMBERS.items():
            value = getattr(self, name)
            given = value is not None or name == "max_new_tokens"
            if given and (isinstance(value, bool) or not isinstance(value, kind)):
                raise PromptError(f"{name} is {value!r:.80}: give a {'whole ' if kind is Integral else ''}number")
        if self.seed is not None and self.seed < 0:
            raise PromptError(f"seed is {self.seed}: give a whole number from 0 up")
        stop: Any = self.stop
        if not isinstance(stop, (list, tuple)) or not all(isinstance(text, str) and text for text in stop):
            raise PromptError(f"stop is {stop!r:.80}: give texts that are not empty, such as ('\\n\\n',)")
        requested = GenerationConfig().drawing(**self._given)
        for name, value in asdict(requested).items():
            other = getattr(self.generation, name, None)
            if value is not None and other is not None and other != value:
                cause = name if name in self._given else next(iter(self._given))
                raise PromptError(f"{cause} asks for {name}={value}, generation says {other}: leave one of them out")

    @property
    def _given(self) -> dict[str, float | None]:
        """Settings of tokens that are given here, by name."""
        names = (*DRAWING, "repetition_penalty")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def generation_over(self, base: GenerationConfig) -> GenerationConfig:
        """How tokens are chosen: as the request says, the rest as `base`, the bundle's, does."""
        config = base if self.generation is None else self.generation.over(base)
        return config.drawing(**self._given)


class VisualCounts:
    """What is counted of visual tokens; the three fields are those of the dataclasses that inherit this."""

    prompt_tokens: int
    visual_tokens: int
    kv_lengths: tuple[int, ...]

    @property
    def kept_tokens(self) -> int:
        """Visual tokens that the last layer holds after the prefill."""
        return self.kv_lengths[-1] - (self.prompt_tokens - self.visual_tokens)

    @property
    def cost(self) -> float:
        """The share of the computation over visual tokens that was kept; 1 where there was nothing to drop."""
        text = self.prompt_tokens - self.visual_tokens
        kept = sum(length - text for length in self.kv_lengths)
        return kept / (self.visual_tokens * len(self.kv_lengths)) if self.visual_tokens else 1.0


@dataclass(frozen=True)
class PrefillReport(VisualCounts):
    """What became of a prompt: how many tokens it had, which reductions acted on it, what every layer holds of it."""

    prompt_tokens: int
    visual_tokens: int
    reduction: tuple[CallRecord, ...]
    kv_lengths: tuple[int, ...]  # tokens in each layer's cache
    videos: tuple[VideoFacts, ...] = ()  # the films shown, in order; in a session, those of this turn
    reused_tokens: int = 0  # of the prompt, those that a session had in its caches
    restart: str | None = None  # why a session reused none though there were earlier turns
    layers: KeptTokens | None = field(default=None, compare=False, repr=False)  # which tokens each layer holds
    shown: ShownRows | None = field(default=None, compare=False, repr=False)  # what may be drawn of the prompt


@dataclass(frozen=True)
class KeptTokens:
    """Which tokens of a prompt every layer holds after its prefill; in a session, of the tokens of this turn."""

    visual: tuple[int, ...]  # places in the prompt of the visual tokens
    places: tuple[tuple[int, ...] | None, ...]  # by layer; None where the graph decides inside and does not say


@dataclass(frozen=True, eq=False)
class ShownRows:
    """What a prompt shows, small, and where its rows stand; in a session, of what this turn shows."""

    thumbnails: Thumbnails
    places: NDArray[np.int64]  # [rows] in the prompt


@dataclass(frozen=True)
class Step:
    """What a request came to since its last step.

    Attributes:
        kind: "prefilled" once, then "token" for each new token, then "end" once.
        text: what can be shown now: whole characters, and nothing that may become a stop string. All pieces joined are
            the answer; that of the end is what was held back until then.
        token_id: of a token; the one that ends an answer is there, too, with no text.
        logits: it was chosen from, fp32 [V]; None unless they were wanted.
        prefill: of the first step.
        finish_reason: of the end: "stop" at an end token or a stop string, "length" at the limit of new tokens.
        seconds: by stage since the request began; what the consumer did in between is in none.
    """

    kind: Literal["prefilled", "token", "end"]
    text: str = ""
    token_id: int | None = None
    logits: NDArray[np.floating[Any]] | None = None
    prefill: PrefillReport | None = None
    finish_reason: FinishReason | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Generation(VisualCounts):
    """An answer and how it came about. In a notebook it is drawn with what became of the patches: see `show`.

    Attributes:
        text: of the answer; `str(answer)` is the same.
        token_ids: of the answer, with the one that ended it.
        finish_reason: "stop" at an end token or a stop string, "length" at the limit of new tokens.
        prompt_tokens: in the prompt before any reduction.
        visual_tokens: of those, tokens that a reduction may touch.
        reduction: what each call of it did.
        kv_lengths: tokens in each layer's cache after the prefill.
        seconds: by stage: video, preprocess, vision, embed, reduction, prefill, decode.
        videos: the films shown, in order.
        layers: which tokens each layer holds: see `kept`.
        shown: thumbnails for `show`, a hundred kilobytes or so.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str  # "stop" or "length"
    prompt_tokens: int
    visual_tokens: int
    reduction: tuple[CallRecord, ...]
    kv_lengths: tuple[int, ...]  # tokens in each layer's cache after the prefill
    seconds: dict[str, float]
    videos: tuple[VideoFacts, ...] = ()  # the films shown, in order
    layers: KeptTokens | None = field(default=None, compare=False)  # see `kept`
    shown: ShownRows | None = field(default=None, compare=False)  # see `show`

    @classmethod
    def from_steps(cls, steps: Iterable[Step], on_text: Callable[[str], None] | None = None) -> Generation:
        """Run a request to its end.

        Args:
            steps: from "prefilled" to "end".
            on_text: called with each piece of text that is not empty.
        """
        pieces: list[str] = []
        token_ids: list[int] = []
        report: PrefillReport | None = None
        step: Step | None = None
        for step in steps:
            report = step.prefill or report
            if step.token_id is not None:
                token_ids.append(step.token_id)
            if step.text:
                pieces.append(step.text)
                if on_text is not None:
                    on_text(step.text)
        if step is None or report is None or step.finish_reason is None:
            raise ValueError(f"steps go from prefilled to end, these end with {step}")
        return cls(
            "".join(pieces), tuple(token_ids), step.finish_reason, report.prompt_tokens, report.visual_tokens,
            report.reduction, report.kv_lengths, dict(step.seconds), report.videos, report.layers, report.shown,
        )  # fmt: skip

    @property
    def tokens_per_second(self) -> float:
        """New tokens behind the first one, in a second of decoding; 0 where there was no decoding."""
        decoding = self.seconds.get("decode", 0.0)
        return (len(self.token_ids) - 1) / decoding if decoding else 0.0

    def kept(self, layer: int, *, visual: bool = False) -> NDArray[np.int64]:
        """Which tokens a layer held after the prefill: [n] places in the prompt, ascending, 0 is its first token.

        Args:
            layer: from 0; -1 is the last one.
            visual: of visual tokens alone, counted among them: 0 is the first token of the first film or picture.

        Raises:
            PromptError: there is no such layer, or the static graph of the fixed mode does not say what it holds.
        """
        layers = self.layers
        count = len(self.kv_lengths)
        if not -count <= layer < count:
            raise PromptError(f"layer {layer} is none of {count}: give -{count} to {count - 1}")
        places = None if layers is None else layers.places[layer]
        if layers is None or places is None:
            raise PromptError(
                f"layer {layer} is inside a graph of the fixed mode, which says only what the last layer holds: give "
                "-1, or build with --reduction adaptive"
            )
        return np.flatnonzero(np.isin(layers.visual, places)) if visual else np.array(places, np.int64)

    def to_dict(self) -> dict[str, Any]:
        """The answer and how it came about, as values that JSON takes: what `ff-run generate --json` prints of it.

        That command adds what the answer does not know: the cost that was asked, the backend and the warnings.
        """
        facts = asdict(replace(self, layers=None, shown=None))
        del facts["layers"]
        del facts["shown"]
        return facts | {"cost": {"reached": self.cost}, "tokens_per_second": self.tokens_per_second}

    def to_html(self, layer: int = -1) -> str:
        """The answer, its figures and its frames with the patches that a layer holds, as a piece of HTML under 300 kB.

        Frames are thumbnails that the answer keeps, 24 at most, evenly spread: nothing is read again. What was dropped
        is let through to the page. Patches that were merged live on in the one that they went into.

        Args:
            layer: from 0; -1 is the last one.

        Raises:
            PromptError: as `kept`.
        """
        kept = self.kept(layer)
        number = range(len(self.kv_lengths))[layer]
        total = sum(self.seconds.values())
        facts = [f"{len(self.token_ids)} tokens in {total:.2f} s, {self.tokens_per_second:.1f} a second when decoding"]
        if self.visual_tokens:
            left = self.kept(layer, visual=True).size
            place = "the last layer" if number == len(self.kv_lengths) - 1 else f"layer {number}"
            facts.insert(
                0,
                f"{left} of {self.visual_tokens} visual tokens are left in {place}; {self.cost:.1%} of their "
                "computation was kept",
            )
        rows = None if self.shown is None else np.isin(self.shown.places, kept)
        return answer_html(self.text, facts, None if self.shown is None else self.shown.thumbnails, rows)

    def show(self, layer: int = -1) -> None:
        """Draw `to_html` in the notebook that this runs in; the last expression of a cell is drawn by itself.

        Raises:
            PromptError: there is no notebook, or as `kept`.
        """
        display_html(self.to_html(layer))

    def _repr_html_(self) -> str:
        return self.to_html()

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        shown = (
            f"{self.visual_tokens} visual, {self.cost:.1%} of their computation kept" if self.visual_tokens else "text"
        )
        return (
            f"<Generation {self.text!r:.60}: {len(self.token_ids)} tokens, {self.finish_reason}; prompt of "
            f"{self.prompt_tokens} tokens, {shown}>"
        )


class Stopwatch:
    """Seconds of a request by stage: video, preprocess, vision, embed, reduction, prefill, decode."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time of a block to a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - start)

    def add(self, name: str, seconds: float) -> None:
        """Add time that was measured elsewhere to a stage."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds
