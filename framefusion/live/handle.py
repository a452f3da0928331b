"""The hooks of a live model, and what the last forward did: `model.framefusion`.

No forward is copied. Hooks stand at the places where the policy acts, and whatever belongs to one forward lives in a
context variable or in the KV cache that travels with the request, never on the module:

    around the model                  whether its decoder began and ended at all
    before the multimodal model       notes input_ids and grids, from which the labels come
    before and after the decoder      begins and ends a call; the hidden states regain their length behind it
    before each decoder layer         call 0; position embeddings, mask and cache slots of the tokens present;
                                      DeepStack features of the layer before
    before input_layernorm            whether the layer was given those
    before post_attention_layernorm   calls 1 and on, in place: the tensor it takes is the layer's residual, too
    before the MLP                    whether that is so
    after each decoder layer          what the layer must have shown
    attention registry                importance from the layer's own queries and keys, where the policy wants it

A cache layer stores the tokens that were kept, but gives transformers the length of the whole prompt: positions, masks
and the slicing of input_ids stay as they were, and each layer takes the columns of the mask that it stores.

Knows the seams of transformers 5 and nothing of bundles. What it cannot serve it refuses by name. Decisions are
framefusion.reduction.policy's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from threading import get_ident
from typing import Any
from weakref import ref

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from framefusion.errors import BackendError, PromptError
from framefusion.live.attention.cache import compiled_step, refuse_to_compile
from framefusion.live.attention.importance import WatchedConfig, register
from framefusion.live.attention.mask import valid_tokens
from framefusion.live.call import Call, ModelContext, RequestRecord, Row
from framefusion.live.labels import Labels, MultimodalInputs, Preset, check_labels, labels_behind
from framefusion.live.proof import Proof
from framefusion.live.seams import DEEPSTACK_ARGUMENTS, arguments_of, broken, cache_of
from framefusion.live.state import BEGUN, CALL, INPUTS, LABELS, GivenLabels, current_call_of
from framefusion.reducers.reducer import Reducer, ReductionRequest
from framefusion.reduction import tracks
from framefusion.reduction.policy import ReductionSettings
from framefusion.reduction.tracks import IntArray


class FrameFusion:
    """What `model.framefusion` is: the settings, what the last forward did, and labels of the user's own.

    Attributes:
        model: of transformers, without what wraps it.
        decoder: its LLM, whose layers have the hooks.
        settings: cost, thresholds and depth.
        reducer: the method.
        seed: of a method that draws.
        importance_rows: last query rows that the importance is averaged over.
    """

    def __init__(
        self,
        model: Any,
        labels: Labels | None,
        preset: Preset,
        settings: ReductionSettings,
        reducer: Reducer,
        seed: int = 0,
    ) -> None:
        self.model = model
        self.decoder = model.get_decoder()
        self.settings = settings
        self.reducer = reducer
        self.seed = seed
        self.importance_rows = preset.importance_rows
        self._find_labels = labels
        self._records: dict[int, tuple[RequestRecord, ...]] = {}
        self._undo: list[Callable[[], object]] = []

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
        token = LABELS.set(GivenLabels(self, np.atleast_2d(given).astype(np.int64)))
        try:
            yield
        finally:
            LABELS.reset(token)

    def install(self) -> None:
        """Put the hooks in place."""
        register()
        owner = self.model.base_model
        layers = self.decoder.layers
        if owner is not self.decoder:
            self._undo.append(owner.register_forward_pre_hook(self._note_inputs, with_kwargs=True).remove)
            self._undo.append(owner.register_forward_hook(self._forget_inputs, always_call=True).remove)
        for module in dict.fromkeys((self.model, owner)):
            if module is not self.decoder:
                self._undo.append(module.register_forward_pre_hook(self._await_decoder, with_kwargs=True).remove)
                self._undo.append(module.register_forward_hook(self._check_decoder).remove)
        self._undo.append(self.decoder.register_forward_pre_hook(self._begin, with_kwargs=True).remove)
        self._undo.append(self.decoder.register_forward_hook(self._end, with_kwargs=True, always_call=True).remove)
        for i, layer in enumerate(layers):
            enter = partial(self._enter_layer, i)
            leave = partial(self._leave_layer, i)
            before = partial(self._before_attention, i)
            between = partial(self._between, i)
            before_mlp = partial(self._before_mlp, i)
            self._undo.append(layer.register_forward_pre_hook(enter, with_kwargs=True).remove)
            self._undo.append(layer.register_forward_hook(leave).remove)
            self._undo.append(layer.input_layernorm.register_forward_pre_hook(before).remove)
            self._undo.append(layer.post_attention_layernorm.register_forward_pre_hook(between).remove)
            self._undo.append(layer.mlp.register_forward_pre_hook(before_mlp).remove)
            config = layer.self_attn.config
            layer.self_attn.config = WatchedConfig(config)
            self._undo.append(partial(setattr, layer.self_attn, "config", config))

    def uninstall(self) -> None:
        """Take the hooks away."""
        while self._undo:
            self._undo.pop()()

    def when_removed(self, undo: Callable[[], object]) -> None:
        """Call this, too, when the model is restored."""
        self._undo.append(undo)

    def _note_inputs(self, module: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        if not torch.compiler.is_compiling():
            named = arguments_of(module, "input_ids", args, given)
            INPUTS.set(MultimodalInputs(named.get("input_ids"), named))

    def _forget_inputs(self, *_: object) -> None:
        if not torch.compiler.is_compiling():
            INPUTS.set(None)

    def _await_decoder(self, module: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        """Note that a forward began within which the decoder must; a step of a generation is the cache's to check."""
        if torch.compiler.is_compiling():
            return
        named = arguments_of(module, "input_ids", args, given)
        tokens = named.get("input_ids") if named.get("inputs_embeds") is None else named["inputs_embeds"]
        BEGUN.set(False if tokens is not None and tokens.shape[1] > 1 else None)
        CALL.set(None)

    def _check_decoder(self, module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        """Whether the decoder that has the hooks began and ended.

        Raises:
            BackendError: it did not.
        """
        if torch.compiler.is_compiling():
            return
        begun = BEGUN.get()
        call = CALL.get()
        CALL.set(None)
        if begun is False:
            raise broken(f"{type(module).__name__} ran without the hooks of its decoder")
        if call is not None and call.context.owner is self:
            raise broken(f"nothing ran behind the decoder of {type(module).__name__}")

    # The way of one forward: _begin, then for each layer _enter_layer (call 0), _between (calls 1 and on) and
    # _leave_layer, then _end.

    def _begin(
        self, module: nn.Module, args: tuple[Any, ...], given: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Begin a call where there is something to reduce, or a cache that was reduced before.

        Raises:
            BackendError: what cannot be reduced: compiled prefills, gradients, windows; or a seam that did not hold.
            PromptError: nothing says which tokens are visual.
        """
        # 1. What the decoder was given: new tokens, and earlier ones in its cache.
        compiling = torch.compiler.is_compiling()
        named = given if compiling else arguments_of(module, "input_ids", args, given)
        tokens = named.get("inputs_embeds")
        if tokens is None:
            tokens = args[0] if args else given["input_ids"]
        shape = (tokens.shape[0], tokens.shape[1])
        if compiling:
            return refuse_to_compile() if shape[1] > 1 else None
        BEGUN.set(True)
        CALL.set(None)
        inputs = INPUTS.get()
        cache = cache_of(named)
        if inputs is None and self.model.base_model is self.decoder:
            inputs = MultimodalInputs(named.get("input_ids"), named)
        past = 0 if cache is None else int(cache.get_seq_length())
        # 2. The visual tokens among them; without any, and without a reduced cache, the forward stays as it is.
        labels = self._labels_of(inputs, named, shape, past)
        mask = named.get("attention_mask")
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
        # 3. The call, and the decoder's arguments without what the call does itself.
        total = past + shape[1]
        self._check(named, tokens, total)
        proof = Proof(self.decoder.layers, shape[1], total)
        call = Call(self._context(tokens.device), rows, shape, past, mask, proof)
        CALL.set(call)
        return ((), call.take_deepstack(named)) if visual else None

    def _rows(self, labels: IntArray, mask: object, past: int) -> list[Row]:
        """The requests of a batch, each begun with the labels of its tokens but for the padding."""
        known = valid_tokens(mask, past, past + labels.shape[1], len(labels))
        valid = np.ones(labels.shape, np.bool_) if known is None else known.cpu().numpy()
        rows = []
        for row_labels, row_valid in zip(labels, valid, strict=True):
            origin = np.flatnonzero(row_valid)
            request = ReductionRequest(self.settings, row_labels[origin], self.seed)
            rows.append(Row(self.reducer.start(request), origin))
        return rows

    def _labels_of(
        self, inputs: MultimodalInputs | None, given: dict[str, Any], shape: tuple[int, int], past: int
    ) -> IntArray | None:
        """Labels of the new tokens [B, S], or None: no visual token among them.

        Raises:
            PromptError: nothing says which tokens are visual, or the labels do not fit the batch.
        """
        users = LABELS.get()
        if users is not None and users.owner is self:
            return labels_behind(users.labels, shape, past)
        if shape[1] == 1:
            return None
        if inputs is None or inputs.ids is None:
            if self._find_labels is None:
                return None
            raise PromptError(
                "inputs_embeds do not say which tokens are visual: give input_ids to the whole model, or labels in a "
                "block of `with model.framefusion.labels(patch_type):`"
            )
        labels = None if self._find_labels is None else self._find_labels(self.model.base_model, inputs, given)
        check_labels(self.model.config, inputs.ids, labels, shape)
        return labels

    def _context(self, device: torch.device) -> ModelContext:
        flash = "flash" in (self.decoder.config._attn_implementation or "")
        return ModelContext(self, self.importance_rows, device, flash)

    def _check(self, given: dict[str, Any], tokens: Tensor, length: int) -> None:
        """Refuse what cannot be reduced.

        Raises:
            BackendError: gradients or attentions requested, a prompt beyond a sliding window.
        """
        if torch.is_grad_enabled() and any(each.requires_grad for each in (tokens, *self.decoder.parameters())):
            raise BackendError("tokens are reduced in place: run the model under torch.no_grad() or inference_mode()")
        config = self.decoder.config
        if given.get("output_attentions") or getattr(config, "output_attentions", False):
            raise BackendError("output_attentions cannot be given for reduced tokens: leave it out")
        deep = getattr(getattr(self.model.config, "vision_config", None), "deepstack_visual_indexes", None)
        if deep and DEEPSTACK_ARGUMENTS[1] not in given and INPUTS.get() is not None:
            raise broken(f"no {DEEPSTACK_ARGUMENTS[1]} are passed to the decoder")
        window = getattr(config, "sliding_window", None)
        if window is not None and length >= window:
            raise BackendError(
                f"{length} tokens exceed the model's sliding window of {window}, which cannot follow reduced tokens: "
                "sample fewer frames or ask for fewer new tokens"
            )

    def _enter_layer(
        self, index: int, module: nn.Module, args: tuple[Any, ...], given: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if torch.compiler.is_compiling():
            return args, compiled_step(index, args[0] if args else given["hidden_states"], given)
        call = current_call_of(self)
        if call is None:
            return None
        # 1. The layer's input, and whether the layer before it was left as it must be.
        named = arguments_of(module, "hidden_states", args, given)
        if "hidden_states" not in named:
            raise broken("no hidden_states are passed to the decoder layers")
        hidden = named.pop("hidden_states")
        call.proof.enter(index)
        # 2. Call 0 before the first layer; before the others, DeepStack features of the tokens that are left.
        with torch.autocast(hidden.device.type, enabled=False):  # scores of halves would tie
            if index == 0:
                hidden = call.begin(hidden, call.features) if call.rows else hidden
                call.note_state()
            elif call.features:
                hidden = call.add_features(hidden)
        # 3. Its other arguments for those tokens; then its attention, watched where the policy wants the importance.
        arguments = call.enter(index, named)
        last = index > self.settings.depth + 1 or index >= len(self.decoder.layers) - 1
        call.watch_attention(module.get_submodule("self_attn"), last)
        return (hidden,), arguments

    def _before_attention(self, index: int, *_: object) -> None:
        """Whether the layer has the arguments of the tokens that are left, before its attention fails on others."""
        call = current_call_of(self)
        if call is not None:
            call.proof.entered(index)

    def _between(self, index: int, module: nn.Module, args: tuple[Any, ...]) -> None:
        """A call between attention and MLP: the residual is the very tensor that the norm takes."""
        call = current_call_of(self)
        if call is None:
            return
        call.proof.between(index)
        if call.watching:
            raise broken(f"the attention of decoder layer {index} did not look its function up in the registry")
        if not call.reducing or index >= len(self.decoder.layers) - 1:
            return
        if len(args) != 1:
            raise broken(f"the norm behind the attention of decoder layer {index} takes {len(args)} tensors")
        # In place: whoever holds the residual of this layer must go on with the tokens that are left.
        (hidden,) = args
        with torch.autocast(hidden.device.type, enabled=False):
            reduced = call.reduce(hidden)
        if reduced is not hidden:
            hidden.set_(reduced)
            call.residual = ref(hidden)

    def _before_mlp(self, index: int, *_: object) -> None:
        """Whether the layer still holds the tensor that was reduced in place: without gradients, nobody else does.

        Raises:
            BackendError: it holds another one, of the tokens before.
        """
        call = current_call_of(self)
        if call is None or call.residual is None:
            return
        residual = call.residual()
        call.residual = None
        if residual is None:
            raise broken(f"the residual of decoder layer {index} is not the tensor that its norm takes")

    def _leave_layer(self, index: int, module: nn.Module, args: tuple[Any, ...], output: object) -> Tensor | None:
        call = current_call_of(self)
        if call is None:
            return None
        hidden = call.proof.leave(index, output, call.present, call.layer, call.cache)
        call.note_state()
        if call.features and index == len(self.decoder.layers) - 1:
            return call.add_features(hidden)
        return None

    def _end(self, module: nn.Module, args: tuple[Any, ...], given: dict[str, Any], output: Any) -> Any:
        if torch.compiler.is_compiling():
            return None
        call = CALL.get()
        CALL.set(None)
        if output is None or call is None or call.context.owner is not self:
            return None
        call.proof.end(output, given.get("use_cache"))
        if not call.rows:
            return None
        self._note([row.record(len(self.decoder.layers)) for row in call.rows])
        return call.restored_output(output)

    def _note(self, records: Sequence[RequestRecord]) -> None:
        self._records.pop(get_ident(), None)
        self._records[get_ident()] = tuple(records)
