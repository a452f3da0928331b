"""The live model: `apply_framefusion` on an unmodified Hugging Face video LVLM, `remove_framefusion` to restore it.

No forward is copied. Hooks stand at the places where the policy acts, and whatever belongs to one forward lives in a
context variable or in the KV cache that travels with the request, never on the module:

    before the multimodal model       notes input_ids and grids, from which the labels come
    before and after the decoder      begins and ends a call; the hidden states regain their length behind it
    before each decoder layer         call 0; position embeddings, mask and cache slots of the tokens present
    after each decoder layer          DeepStack features of the tokens present
    before post_attention_layernorm   calls 1 and on, in place: the tensor it takes is the layer's residual, too
    attention registry                importance from the layer's own queries and keys, where the policy wants it

A cache layer stores the tokens that were kept, but tells transformers the length of the whole prompt: positions, masks
and the slicing of input_ids stay as they were, and each layer takes the columns of the mask that it stores.

Knows the seams of transformers 5 and nothing of bundles. What it cannot serve it refuses by name. Decisions are
framefusion.policy's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from threading import get_ident
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from framefusion import tracks
from framefusion.errors import BackendError, CheckpointError, PromptError
from framefusion.live_attention import CALL, WatchedConfig, current, register
from framefusion.live_cache import compiled_step, refuse_to_compile
from framefusion.live_call import Asked, Call, RequestRecord, Row
from framefusion.live_labels import FAMILIES, Labels, Preset, Seen, labels_behind
from framefusion.live_mask import tokens_seen
from framefusion.live_seams import cache_of
from framefusion.policy import ReductionSettings
from framefusion.reducers import DEFAULT, load_reducer
from framefusion.reducers.reducer import ReductionRequest
from framefusion.tracks import IntArray

PARTS = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")

_SEEN: ContextVar[Seen | None] = ContextVar("framefusion_seen", default=None)
_LABELS: ContextVar[tuple[FrameFusion, IntArray] | None] = ContextVar("framefusion_labels", default=None)


class FrameFusion:
    """What `model.framefusion` is: the settings, what the last forward did, and labels of the user's own."""

    def __init__(self, model: Any, labels: Labels | None, preset: Preset, settings: ReductionSettings) -> None:
        self.model, self.decoder = model, model.get_decoder()
        self.settings = settings
        self.reducer, self.seed = load_reducer(DEFAULT), 0
        self.importance_rows = preset.importance_rows
        self._find_labels = labels
        self._records: dict[int, tuple[RequestRecord, ...]] = {}
        self._undo: list[Any] = []

    @property
    def last(self) -> tuple[RequestRecord, ...]:
        """One record per row of the latest prefill: this thread's own, else that of any thread; empty before one."""
        return self._records.get(get_ident()) or next(reversed(self._records.values()), ())

    @contextmanager
    def labels(self, patch_type: npt.ArrayLike | Tensor) -> Iterator[None]:
        """Within the block, prompts have these labels in place of those read from input_ids.

        Args:
            patch_type: [S] or [B, S] of the whole prompt, padding included: -1 for text and structure, 0 upwards for
                places in a frame. Tokens behind them are text, so generation goes on as it is.
        """
        given = patch_type.cpu().numpy() if isinstance(patch_type, Tensor) else np.asarray(patch_type)
        token = _LABELS.set((self, np.atleast_2d(given).astype(np.int64)))
        try:
            yield
        finally:
            _LABELS.reset(token)

    def install(self) -> None:
        """Put the hooks in place."""
        register()
        owner, layers = self.model.base_model, self.decoder.layers
        if owner is not self.decoder:
            self._undo.append(owner.register_forward_pre_hook(self._note_inputs, with_kwargs=True).remove)
            self._undo.append(owner.register_forward_hook(self._forget_inputs, always_call=True).remove)
        self._undo.append(self.decoder.register_forward_pre_hook(self._begin, with_kwargs=True).remove)
        self._undo.append(self.decoder.register_forward_hook(self._end, always_call=True).remove)
        for i, layer in enumerate(layers):
            enter, between = partial(self._enter_layer, i), partial(self._between, i)
            self._undo.append(layer.register_forward_pre_hook(enter, with_kwargs=True).remove)
            self._undo.append(layer.register_forward_hook(self._leave_layer).remove)
            self._undo.append(layer.post_attention_layernorm.register_forward_pre_hook(between).remove)
            config = layer.self_attn.config
            layer.self_attn.config = WatchedConfig(config)
            self._undo.append(partial(setattr, layer.self_attn, "config", config))

    def uninstall(self) -> None:
        """Take the hooks away."""
        while self._undo:
            self._undo.pop()()

    def _note_inputs(self, module: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        if not torch.compiler.is_compiling():
            _SEEN.set(Seen(args[0] if args else given.get("input_ids"), given))

    def _forget_inputs(self, *_: Any) -> None:
        if not torch.compiler.is_compiling():
            _SEEN.set(None)

    def _begin(
        self, module: nn.Module, args: tuple[Any, ...], given: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Begin a call where there is something to reduce, or a cache that was reduced before."""
        tokens = given.get("inputs_embeds")
        tokens = (args[0] if args else given["input_ids"]) if tokens is None else tokens
        shape = (tokens.shape[0], tokens.shape[1])
        if torch.compiler.is_compiling():
            return refuse_to_compile() if shape[1] > 1 else None
        seen, cache = _SEEN.get(), cache_of(given)
        CALL.set(None)
        past = 0 if cache is None else int(cache.get_seq_length())
        labels = self._labels_of(seen, given, shape, past)
        mask = given.get("attention_mask")
        if labels is None and shape[1] > 1:
            labels = np.full(shape, tracks.TEXT, np.int64)
        reduced = any(hasattr(layer, "slots") for layer in getattr(cache, "layers", ()))
        rows = [] if labels is None else self._rows(labels, mask, past)
        visual = any(row.visual for row in rows)
        if not visual and rows:
            if shape[1] > 1:  # a prompt of text alone, no step of a generation
                self._note([row.record(len(self.decoder.layers)) for row in rows])
            rows = []
        if not visual and not reduced:
            return None
        self._check(given, tokens, past + shape[1])
        call = Call(self._asked(), rows, shape, past, mask)
        CALL.set(call)
        return (args, call.take_deepstack(given)) if visual else None

    def _rows(self, labels: IntArray, mask: Any, past: int) -> list[Row]:
        seen = tokens_seen(mask, past, past + labels.shape[1], len(labels))
        real = np.ones(labels.shape, np.bool_) if seen is None else seen.cpu().numpy()
        return [self._row(own, np.flatnonzero(there)) for own, there in zip(labels, real, strict=True)]

    def _row(self, labels: IntArray, origin: IntArray) -> Row:
        return Row(self.reducer.start(ReductionRequest(self.settings, labels[origin], self.seed)), origin)

    def _labels_of(
        self, seen: Seen | None, given: dict[str, Any], shape: tuple[int, int], past: int
    ) -> IntArray | None:
        """Labels of the new tokens [B, S], or None: no visual token among them."""
        own = _LABELS.get()
        if own is not None and own[0] is self:
            return labels_behind(own[1], shape, past)
        if self._find_labels is None or seen is None or shape[1] == 1:
            return None
        if seen.ids is None:
            raise PromptError(
                "inputs_embeds do not say which tokens are visual: give input_ids, or labels in a block of "
                "`with model.framefusion.labels(patch_type):`"
            )
        return self._find_labels(self.model.base_model, seen, given)

    def _asked(self) -> Asked:
        device = next(iter(self.decoder.layers[0].parameters())).device
        flash = "flash" in (self.decoder.config._attn_implementation or "")
        return Asked(self, self.importance_rows, device, flash)

    def _check(self, given: dict[str, Any], tokens: Tensor, length: int) -> None:
        """Refuse what cannot be reduced.

        Raises:
            BackendError: gradients or attentions asked for, a prompt beyond a sliding window.
        """
        if torch.is_grad_enabled() and any(one.requires_grad for one in (tokens, *self.decoder.parameters())):
            raise BackendError("tokens are reduced in place: run the model under torch.no_grad() or inference_mode()")
        config = self.decoder.config
        if given.get("output_attentions") or getattr(config, "output_attentions", False):
            raise BackendError("output_attentions cannot be given for reduced tokens: leave it out")
        window = getattr(config, "sliding_window", None)
        if window is not None and length >= window:
            raise BackendError(
                f"{length} tokens exceed the model's sliding window of {window}, which cannot follow reduced tokens: "
                "sample fewer frames or ask for fewer new tokens"
            )

    def _enter_layer(
        self, index: int, module: nn.Module, args: tuple[Any, ...], given: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        hidden = args[0] if args else given["hidden_states"]
        if torch.compiler.is_compiling():
            return args, compiled_step(index, hidden, given)
        call = CALL.get()
        if call is None or call.asked.owner is not self:
            return None
        if index == 0 and call.rows:
            hidden = call.begin(hidden, call.features)
        told = call.enter(index, given)
        last = index > self.settings.depth + 1 or index >= len(self.decoder.layers) - 1
        call.watching = not last and any(row.reduction.wants_importance for row in call.rows)
        if args:
            return (hidden, *args[1:]), told
        return args, {**told, "hidden_states": hidden}

    def _between(self, index: int, module: nn.Module, args: tuple[Any, ...]) -> None:
        """A call between attention and MLP: the residual is the very tensor that the norm takes."""
        call = current()
        if call is None or call.asked.owner is not self or not call.reducing or index >= len(self.decoder.layers) - 1:
            return
        (hidden,) = args
        reduced = call.reduce(hidden)
        if reduced is not hidden:
            hidden.set_(reduced)

    def _leave_layer(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        call = current()
        if call is None or call.asked.owner is not self or not call.features:
            return None
        return output + call.features.pop(0).to(output)

    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if torch.compiler.is_compiling():
            return None
        call = CALL.get()
        CALL.set(None)
        if output is None or call is None or call.asked.owner is not self or not call.rows:
            return None
        self._note([row.record(len(self.decoder.layers)) for row in call.rows])
        if isinstance(output, tuple):
            return (call.restored(output[0]), *output[1:])
        output.last_hidden_state = call.restored(output.last_hidden_state)
        return output

    def _note(self, records: Sequence[RequestRecord]) -> None:
        self._records.pop(get_ident(), None)
        self._records[get_ident()] = tuple(records)


def apply_framefusion(
    model: Any,
    cost: float = 0.3,
    similarity_lower_bound: float | None = None,
    ratio_lower_bound: float = 0.1,
    *,
    reducer: str = DEFAULT,
    importance_rows: int | None = None,
    depth: int | None = None,
    seed: int = 0,
) -> FrameFusion:
    """Reduce visual tokens inside the LLM of a Hugging Face model from now on; generate() and processors work on.

    A second call replaces the settings of the first. Logits of dropped tokens are zeros (those of a zero hidden state),
    those of text and of the last token are there. Positions are the ones that transformers gives.

    Args:
        model: Qwen2-VL, Qwen2.5-VL, Qwen3-VL, LLaVA-OneVision, LLaVA-NeXT-Video, InternVL, or a decoder of the Llama
            and Qwen2 kind, whose labels are given by `model.framefusion.labels`.
        cost: share of the computation over visual tokens that is kept, in (0, 1].
        similarity_lower_bound: tokens at least this similar merge; by default the family's (live_labels.FAMILIES).
        ratio_lower_bound: merging ends below this share.
        reducer: the method, a name of `framefusion.reducers.reducer_names()`; the thresholds are FrameFusion's.
        importance_rows: last query rows that the importance is averaged over; by default the family's.
        depth: deepest layer whose attention a merge may follow; by default the last but one.
        seed: of a method that draws; the same for each row.

    Raises:
        BudgetError: a number out of range, or a cost that this depth cannot reach.
        ReducerError: no such reducer.
        CheckpointError: layers of another make than Llama's.
    """
    decoder = model.get_decoder()
    layers = getattr(decoder, "layers", None) or [None]
    lacking = [part for part in PARTS if not hasattr(layers[0], part)]
    if lacking or hasattr(layers[0], "pre_feedforward_layernorm"):
        raise CheckpointError(
            f"{type(model).__name__} has decoder layers of another make than Llama's and Qwen2's ({PARTS}): "
            "FrameFusion has no place between their attention and their MLP"
        )
    labels, preset = FAMILIES.get(model.config.model_type, (None, Preset(0.6, 1)))
    bound = preset.similarity_lower_bound if similarity_lower_bound is None else similarity_lower_bound
    deepest = len(layers) - 2 if depth is None else depth
    settings = ReductionSettings(cost, bound, ratio_lower_bound, len(layers), deepest)
    preset = Preset(bound, preset.importance_rows if importance_rows is None else importance_rows)
    method = load_reducer(reducer)
    remove_framefusion(model)
    handle = FrameFusion(model, labels, preset, settings)
    handle.reducer, handle.seed = method, seed
    handle.install()
    model.framefusion = handle
    return handle


def remove_framefusion(model: Any) -> None:
    """Restore a model exactly as it was; nothing happens to one that was never changed."""
    handle = model.__dict__.pop("framefusion", None)
    if handle is not None:
        handle.uninstall()
