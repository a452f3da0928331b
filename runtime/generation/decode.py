"""Decode: what a request is between its prefill and its end, and the step of all segments that brings it a token on.

    logits [V] -> ActiveRequest.accept -> token, text -> embedding and rotary tables -> Decoder.step -> logits [V]

The two know nothing of each other: whoever serves many requests holds an `ActiveRequest` for each and steps them as it
likes. Knows no reduction.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from framefusion.errors import PromptError
from framefusion.runtime.backends.base import BoundSegment, Mirror
from framefusion.runtime.backends.kv_cache import SegmentCache
from framefusion.runtime.generation.segments import Rows, Segments
from framefusion.runtime.request import FinishReason
from framefusion.runtime.text.sampling import Sampler
from framefusion.runtime.text.tokenizer import StoppableText


class ActiveRequest:
    """One request between its prefill and its end: its tokens, how the next one is chosen, and its text.

    Args:
        prompt_ids: of the whole prompt, for what counts the tokens before.  [S]
        rotary: cos and sin for each token that may be fed back.  [max_new_tokens, hd/2]
        sampler: of this request alone.
        text: of this request alone.
        eos_token_ids: tokens that end it.
        max_new_tokens: tokens at most.
    """

    def __init__(
        self,
        prompt_ids: NDArray[np.int64],
        rotary: tuple[Rows, Rows],
        sampler: Sampler,
        text: StoppableText,
        eos_token_ids: Sequence[int],
        max_new_tokens: int,
    ) -> None:
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self._ids = np.concatenate([prompt_ids, np.zeros(max_new_tokens, np.int64)])
        self._length = prompt_ids.size
        self._rotary = rotary
        self._sampler = sampler
        self._text = text
        self._ends = frozenset(eos_token_ids)
        self._limit = max_new_tokens

    def accept(self, logits: Rows) -> str:
        """Choose the next token from logits [V]; returns text that can be shown, and says with it whether that was all.

        Raises:
            BackendError, PromptError: see `Sampler.next_token`.
        """
        # 1. Choose: every token before counts, those of the prompt included.
        end = self._length + len(self.token_ids)
        token_id = self._sampler.next_token(logits, self._ids[:end])
        self._ids[end] = token_id
        self.token_ids.append(token_id)
        # 2. Stop at a token that ends an answer, which is no text.
        if token_id in self._ends:
            self.finish_reason = "stop"
            return ""
        # 3. Say what is certain now, and stop at a text or at the limit.
        piece = self._text.push(token_id)
        if self._text.stopped:
            self.finish_reason = "stop"
        elif len(self.token_ids) == self._limit:
            self.finish_reason = "length"
        return piece

    def flush(self) -> str:
        """The text that was held back, when no more tokens come."""
        return self._text.flush()

    @property
    def rotary(self) -> tuple[Rows, Rows]:
        """cos and sin [hd/2] of the token chosen last, which the next step is fed with."""
        cos, sin = self._rotary
        index = len(self.token_ids) - 1
        return cos[index], sin[index]


class Decoder:
    """One token at a time through all segments, bound once: a step writes a row, runs, and copies no cache.

    Where graphs take more than one token, those behind the first are padding: the next step overwrites their slots.

    Args:
        segments: of the bundle.
        caches: of each segment, as a prefill left them; a step adds a token to each.
    """

    def __init__(self, segments: Segments, caches: Sequence[SegmentCache]) -> None:
        # 1. Buffers of one step, which every segment reads: the host writes them, nothing is allocated later.
        model = segments.manifest.model
        device = segments.device
        self._width = segments.backend.decode_width
        half = model.head_dim // 2
        widths = {"hidden": model.hidden_size, "cos": half, "sin": half}
        self._caches = caches
        self._rows = {name: device.mirror((1, self._width, n), model.float_type) for name, n in widths.items()}
        self._kv_lens: list[Mirror] = []
        common = {name: mirror.buffer for name, mirror in self._rows.items()}
        common["last"] = device.upload(np.zeros(1, np.int64))
        common["previous"] = device.upload(np.full(self._width, -1, np.int64))
        # 2. Bind each segment to the very buffer that the one before it writes: no copy lies between two.
        bound: list[BoundSegment] = []
        for record, cache in zip(segments.manifest.segments, caches, strict=True):
            self._kv_lens.append(device.mirror((len(record.attention_layers),), np.int64))
            inputs = common | {"kv_len": self._kv_lens[-1].buffer}
            if record.deepstack:  # generated tokens have no visual features
                shape = (record.deepstack, self._width, model.hidden_size)
                inputs["deepstack"] = device.zeros(shape, model.float_type)
            outputs = segments.outputs(record, self._width)
            bound.append(segments.backend.bind(record.decode, inputs, outputs.bound, cache))
            if outputs.hidden is not None:
                common["hidden"] = outputs.hidden
        self._logits = outputs.small["logits"]
        # 3. One call for all of them: a device may record the launches and replay them.
        self._run = segments.backend.chain(bound)

    def step(self, hidden: Rows, cos: Rows, sin: Rows) -> Rows:
        """One token's embedding [D] and tables [hd/2] -> logits [V], valid until the next step.

        Raises:
            PromptError: a cache is full.
        """
        for mirror, row in zip(self._rows.values(), (hidden, cos, sin), strict=True):
            mirror.host[0, 0] = row
            mirror.push()
        for cache, kv_len in zip(self._caches, self._kv_lens, strict=True):
            np.add(cache.lengths, self._width, out=kv_len.host)
            for needed, capacity in zip(kv_len.host, cache.capacities, strict=True):
                if needed > capacity:
                    raise PromptError(f"a cache of {capacity} tokens is full: ask for fewer new tokens")
            kv_len.push()
        self._run()
        for cache in self._caches:
            cache.lengths += 1
        logits: Rows = self._logits.pull()[0]
        return logits
