"""Decode: what a request is between its prefill and its end, and the step of all segments that brings it a token on.

    logits [V] -> ActiveRequest.accept -> token, text -> embedding and rotary tables -> Decoder.step -> logits [V]

Where nothing but the largest logit is wanted, `GreedyDecoder` has the device take it, and only tokens come to the host.

The two know nothing of each other: whoever serves many requests holds an `ActiveRequest` for each and steps them as it
likes. Knows no reduction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from framefusion.errors import BackendError, PromptError
from framefusion.runtime.backends.base import BoundSegment, StepBuffers
from framefusion.runtime.backends.buffer import Buffer
from framefusion.runtime.backends.host import HOST
from framefusion.runtime.backends.kv_cache import SegmentCache
from framefusion.runtime.generation.segments import Rows, Segments
from framefusion.runtime.request import FinishReason
from framefusion.runtime.text.sampling import Sampler, require_number
from framefusion.runtime.text.tokenizer import StoppableText

_LENGTHS = 32  # numbers of int64 that begin at an address which every library binds, 256 bytes behind the last


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
        self.rotary_tables = rotary
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
        return self.accept_token(self._sampler.next_token(logits, self._ids[:end]))

    def accept_token(self, token_id: int) -> str:
        """Go on with a token that was chosen from the logits; see `accept`."""
        self._ids[self._length + len(self.token_ids)] = token_id
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
        cos, sin = self.rotary_tables
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
        self.device = device
        self.float_type = model.float_type
        self._rows = {name: device.mirror((1, self._width, n), model.float_type) for name, n in widths.items()}
        records = segments.manifest.segments
        self.layers = [len(record.attention_layers) for record in records]
        slots = -(-max(self.layers) // _LENGTHS) * _LENGTHS
        self._lengths = device.mirror((len(records), slots), np.int64)
        common = {name: mirror.buffer for name, mirror in self._rows.items()}
        common["last"] = device.upload(np.zeros(1, np.int64))
        common["previous"] = device.upload(np.full(self._width, -1, np.int64))
        # 2. Bind each segment to the very buffer that the one before it writes: no copy lies between two.
        bound: list[BoundSegment] = []
        for index, (record, cache) in enumerate(zip(records, caches, strict=True)):
            segments.check_lengths(cache)
            inputs = common | {"kv_len": self._lengths.buffer[index, : len(record.attention_layers)]}
            if record.deepstack:  # generated tokens have no visual features
                shape = (record.deepstack, self._width, model.hidden_size)
                inputs["deepstack"] = device.zeros(shape, model.float_type)
            outputs = segments.outputs(record, self._width)
            scores = ("similarity", "importance")  # a prefill's: nothing is reduced behind it
            wanted = {name: buffer for name, buffer in outputs.bound.items() if name not in scores}
            bound.append(segments.backend.bind(record.decode, inputs, wanted, cache))
            if outputs.hidden is not None:
                common["hidden"] = outputs.hidden
        self._logits = outputs.small["logits"]
        # 3. One call for all of them, when it is needed: a device may record the launches and replay them.
        self._run: Callable[[], None] | None = None
        self._backend = segments.backend
        self._bound = bound
        rows = self._rows
        self.buffers = StepBuffers(
            rows["hidden"].buffer, rows["cos"].buffer, rows["sin"].buffer, self._lengths.buffer, self._logits.buffer
        )

    def step(self, hidden: Rows, cos: Rows, sin: Rows) -> Rows:
        """One token's embedding [D] and tables [hd/2] -> logits [V], valid until the next step.

        Raises:
            PromptError: a cache is full.
        """
        self.feed(hidden, cos, sin)
        if self._run is None:
            self._run = self.chain()
        self._run()
        self.advance()
        return self.logits()

    def feed(self, hidden: Rows, cos: Rows, sin: Rows) -> None:
        """Write what the next step reads.

        Raises:
            PromptError: a cache is full.
        """
        self.require_room()
        self.feed_row(hidden)
        for name, row in (("cos", cos), ("sin", sin)):
            self._rows[name].host[0, 0] = row
            self._rows[name].push()
        self._lengths.host[:] = self.lengths_ahead()
        self._lengths.push()

    def feed_row(self, hidden: Rows) -> None:
        """Write the embedding that the next step reads.  [D]"""
        self._rows["hidden"].host[0, 0] = hidden
        self._rows["hidden"].push()

    def lengths_ahead(self) -> NDArray[np.int64]:
        """Tokens in each cache behind the next step, padding counted.  [segments, ...]"""
        lengths = np.full(self._lengths.host.shape, self._width, np.int64)
        for row, cache in zip(lengths, self._caches, strict=True):
            row[: cache.lengths.size] += cache.lengths
        return lengths

    def require_room(self) -> None:
        """See `step`.

        Raises:
            PromptError: a cache is full.
        """
        if not self.has_room():
            smallest = min(min(cache.capacities) for cache in self._caches)
            raise PromptError(f"a cache of {smallest} tokens is full: ask for fewer new tokens")

    def has_room(self, ahead: int = 0) -> bool:
        """Whether every cache takes a step more, behind `ahead` others."""
        needed = self._width + ahead
        return all((cache.lengths + needed <= cache.capacities).all() for cache in self._caches)

    def advance(self) -> None:
        """Count the token of a step among those that the caches hold."""
        for cache in self._caches:
            cache.lengths += 1

    def logits(self) -> Rows:
        """Of the last step, valid until the next one.  [V]"""
        logits: Rows = self._logits.pull()[0]
        return logits

    def chain(self, *behind: BoundSegment) -> Callable[[], None]:
        """What runs a step that was fed, and what else belongs behind its segments."""
        return self._backend.chain([*self._bound, *behind])


class GreedyDecoder:
    """Steps whose token is the one of the largest logit: the device takes it, and the host reads an id a step.

    Where the device has the embedding table as well, a step is enqueued before the token of the one before it is read:
    the host shows a token while the next one is computed. A step too many, behind the last token, is not counted, and
    its slot is overwritten by what comes next.

    Args:
        decoder: whose caches grow.
        embedding: [S] -> [S, D].
        table: the same as rows on the device; None where they stay on the host.  [R, D]
        rotary: cos and sin for each token that may be fed back.  [N, hd/2]
        limit: logits from here on belong to no token.
    """

    def __init__(
        self,
        decoder: Decoder,
        embedding: Callable[[NDArray[np.int64]], Rows],
        table: Buffer | None,
        rotary: tuple[Rows, Rows],
        limit: int,
    ) -> None:
        device = decoder.device
        self._decoder = decoder
        self._embedding = embedding
        self._rotary = rotary
        self._limit = limit
        (cos, sin) = (device.upload(HOST.typed(np.ascontiguousarray(rows), decoder.float_type)) for rows in rotary)
        self._tokens = device.greedy_tokens(decoder.buffers, (cos, sin), table, limit)
        self._run = decoder.chain(self._tokens)
        self._steps = 0  # whose token was read
        self._enqueued = 0

    def step(self, token_id: int) -> int:
        """The token behind the one that was chosen last.

        Raises:
            PromptError: a cache is full.
            BackendError: the logits are no numbers, or the device takes another token than the largest.
        """
        # 1. Feed: the first token was chosen on the host, the others left what they need where the step reads it.
        if self._enqueued == self._steps:
            row = self._embedding(np.array([token_id]))[0]
            if not self._steps:
                self._decoder.feed(row, self._rotary[0][0], self._rotary[1][0])
            else:
                self._decoder.require_room()
                if not self._tokens.feeds_rows:
                    self._decoder.feed_row(row)
            self._enqueue()
        # 2. Let the device go on with the next step, whose token is not known here yet.
        ahead = self._steps + 1
        if self._steps and self._runs_ahead and ahead < len(self._rotary[0]) and self._decoder.has_room(ahead=1):
            self._enqueue()
        # 3. Read the token; the first one is compared with what the host makes of the same logits.
        (token, largest) = self._tokens.pull()
        require_number(largest)
        self._decoder.advance()
        if not self._steps:
            self._check(token)
        self._steps += 1
        return token

    @property
    def _runs_ahead(self) -> bool:
        return self._tokens.runs_ahead and self._tokens.feeds_rows

    def _enqueue(self) -> None:
        """Begin a step, and the journey of its token to the host behind it."""
        self._run()
        self._tokens.request()
        self._enqueued += 1

    def _check(self, token: int) -> None:
        """Compare what the device made of the first step with the host: nothing else would notice a wrong token."""
        logits = self._decoder.logits()[: self._limit]
        buffers = self._decoder.buffers
        device = self._decoder.device
        pairs = [(np.asarray([token]), np.asarray([logits.argmax()]))]
        expected = {"cos": self._rotary[0], "sin": self._rotary[1]}
        rows = {name: table[min(1, len(table) - 1)] for name, table in expected.items()}
        if self._tokens.feeds_rows:
            rows["hidden"] = self._embedding(np.array([token]))[0]
        for name, row in rows.items():
            there = device.download(getattr(buffers, name))[0, 0]
            pairs.append((there, HOST.typed(row, self._decoder.float_type)))
        lengths = device.download(buffers.lengths), self._decoder.lengths_ahead()
        for ours, theirs, layers in zip(*lengths, self._decoder.layers, strict=True):
            pairs.append((ours[:layers], theirs[:layers]))
        if not all(np.array_equal(ours.astype(np.float64), theirs.astype(np.float64)) for ours, theirs in pairs):
            raise BackendError(
                f"the device chose token {token}, or prepared the step behind it, otherwise than the host, which takes "
                f"{int(logits.argmax())}: this is a fault of the device's kernels, answer with --device cpu"
            )
