"""One forward of a live model: which tokens of each row are present, and what belongs to them.

The policy's plans are applied to hidden states, rotary tables, masks, cache slots and DeepStack features of a batch
whose rows shrink each on their own. Knows no module and no hook: framefusion/live/handle.py calls it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar
from weakref import ref

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from framefusion.live.attention.cache import adopt
from framefusion.live.attention.mask import reduced_mask, valid_tokens
from framefusion.live.attention.slots import CacheLayer, caught_up, joined_valid
from framefusion.live.plan import apply_plans, features_of, importance, similarity
from framefusion.live.proof import Proof, check_arguments
from framefusion.live.seams import DEEPSTACK_ARGUMENTS, Cache, broken, cache_of
from framefusion.reduction import budget
from framefusion.reduction.plan import Plan, keep_all
from framefusion.reduction.policy import CallRecord, ReductionState
from framefusion.reduction.tracks import IntArray

Value = TypeVar("Value")


@dataclass(frozen=True)
class RequestRecord:
    """What one forward with visual tokens did to one row of its batch.

    Attributes:
        tokens_per_layer: tokens that entered each layer's attention, padding not counted.
        visual_before: visual tokens of the request.
        visual_after: those that reached the last layer.
        cost: share of the computation over visual tokens that was kept.
        calls: what each call of the policy did.
        kept: places in the given tokens of what entered each layer's attention.  L x [K]
    """

    tokens_per_layer: tuple[int, ...]
    visual_before: int
    visual_after: int
    cost: float
    calls: tuple[CallRecord, ...]
    kept: tuple[IntArray, ...]

    @property
    def ratio(self) -> float:
        """Share of the visual tokens that reached the last layer; 1 without any."""
        return self.visual_after / self.visual_before if self.visual_before else 1.0


@dataclass(frozen=True)
class ModelContext:
    """What a call needs to know of its model."""

    owner: object  # whose hooks serve this call
    importance_rows: int
    device: torch.device  # of the hidden states that the decoder is given
    flash: bool  # masks have two dimensions


class Row:
    """One request of a batch.

    Attributes:
        reduction: the state of its method.
        visual: visual tokens that it began with.
        origin: places of the tokens present among the new tokens of the call, ascending.  [K]
        kept: `origin` as it entered each layer so far.
    """

    def __init__(self, reduction: ReductionState, origin: IntArray) -> None:
        self.reduction = reduction
        self.visual = reduction.num_visual
        self.origin = origin
        self.kept: list[IntArray] = []

    def record(self, num_layers: int) -> RequestRecord:
        """What was done so far; a row that entered no layer is dense."""
        reduction = self.reduction
        kept = tuple(self.kept) or (self.origin,) * num_layers
        cost = budget.cost_of_shares(reduction.shares, num_layers) if self.visual else 1.0
        lengths = tuple(places.size for places in kept)
        return RequestRecord(lengths, self.visual, reduction.num_visual, cost, tuple(reduction.history), kept)


class Call:
    """One forward of the decoder over S new tokens behind `past` earlier ones.

    `index` and `valid` [B, K] are the places of the tokens present and which of them are no padding; None is all of
    them. Padding repeats the last token of its row: it attends what that attends, so nothing in it is undefined.

    The hooks call, in this order: `take_deepstack`; `begin`; then for each layer `enter`, `watch` within its attention
    where the policy wants the importance, and `reduce` before its MLP; `restored_output` at the end.
    """

    def __init__(
        self, context: ModelContext, rows: Sequence[Row], shape: tuple[int, int], past: int, mask: object, proof: Proof
    ) -> None:
        self.proof = proof
        self.context = context
        self.rows = rows
        self.shape = shape
        self.past = past
        self.past_valid = valid_tokens(mask, 0, past, shape[0])  # which earlier tokens are no padding; None: all
        self.index: Tensor | None = None
        self.valid: Tensor | None = None
        self.features: list[Tensor] = []  # [B, K, D] for each of the next layers to add
        self.importance: list[Tensor] = []
        self.watching = False
        self.cache: Cache | None = None
        self.layer: CacheLayer | None = None  # of the cache, for the layer that is running
        self.stored = 0  # tokens that it holds once the layer has run
        self.attention: nn.Module | None = None  # of the layer that is running
        self.residual: ref[Tensor] | None = None  # of the layer that is running, once it is reduced
        self.states: list[tuple[Tensor | None, Tensor | None]] = []  # index and valid of each state that is captured
        # by object: layers with the same tokens share masks, tables and slots
        self._memo: dict[tuple[object, ...], tuple[object, Any]] = {}

    @property
    def present(self) -> int:
        """Tokens of the longest row that are left."""
        return self.shape[1] if self.index is None else self.index.shape[1]

    @property
    def reducing(self) -> bool:
        """Whether any row has calls to make."""
        return any(not row.reduction.finished for row in self.rows)

    def take_deepstack(self, given: dict[str, Any]) -> dict[str, Any]:
        """The decoder's arguments without DeepStack's features, which the call adds, as they follow their tokens.

        Raises:
            BackendError: features without the mask of their tokens.
        """
        mask_name, features_name = DEEPSTACK_ARGUMENTS
        arguments = dict(given)
        visual: Tensor | None = given.get(mask_name)
        for rows in arguments.pop(features_name, None) or ():
            if visual is None:
                raise broken(f"{features_name} are passed to the decoder without {mask_name}")
            whole = rows.new_zeros(*self.shape, rows.shape[-1])
            whole[visual.to(rows.device)] = rows
            self.features.append(whole)
        if self.features:
            arguments.pop(mask_name, None)
        return arguments

    def begin(self, hidden: Tensor, features: list[Tensor]) -> Tensor:
        """Leave the padding of the prompt out and make call 0.  [B, S, D] -> [B, K, D]"""
        self.features = features
        padded = any(row.origin.size < self.shape[1] for row in self.rows)
        if padded:
            self._place(hidden.device)
            hidden = self._gather(hidden)
            self.features = [self._gather(tensor) for tensor in features]
        return self.reduce(hidden)

    def add_features(self, hidden: Tensor) -> Tensor:
        """Add DeepStack's features of the next layer that has any.  [B, K, D] -> [B, K, D]"""
        return hidden + self.features.pop(0).to(hidden)

    def reduce(self, hidden: Tensor) -> Tensor:
        """One call of every row that is not finished; the same tensor where nothing goes.  [B, K, D] -> [B, K', D]"""
        # 1. Ask the policy of each row; one that is finished keeps everything.
        plans = self._plans(hidden)
        if all(plan.kind == "none" for plan in plans):
            return hidden
        # 2. Remember which tokens of the prompt are left, row by row: each shrinks on its own.
        for row, plan in zip(self.rows, plans, strict=True):
            row.origin = row.origin[plan.kept]
        longest = max(row.origin.size for row in self.rows)
        # 3. Do the same to all that follows the tokens: hidden states, and features that later layers add to them.
        hidden = apply_plans(hidden, plans, longest)
        self.features = [apply_plans(tensor, plans, longest) for tensor in self.features]
        # 4. Lay the new places out on the device; tables and masks of the tokens before are of no use any more.
        self._place(hidden.device)
        return hidden

    def _plans(self, hidden: Tensor) -> list[Plan]:
        """The policy's plans of all rows.

        Raises:
            BackendError: the attention of the layer gave no importance.
        """
        # 1. What the policy of each row reads, on the device.
        active = [i for i, row in enumerate(self.rows) if not row.reduction.finished]
        scores: dict[tuple[int, str], Tensor] = {}
        for i in active:
            reduction = self.rows[i].reduction
            if reduction.wants_similarity:
                present = hidden[i : i + 1, : self.rows[i].origin.size]
                scores[i, "similarity"] = similarity(present, reduction.labels)
            if reduction.wants_importance and reduction.call:
                if not self.importance:
                    raise broken("no importance came from the attention of the layer")
                scores[i, "importance"] = self.importance[i]
        # 2. All of it to the host in one transfer: each would wait for the device.
        on_host: dict[tuple[int, str], npt.NDArray[np.float32]] = {}
        if scores:
            host = torch.cat(list(scores.values())).cpu().numpy()
            ends = np.cumsum([values.numel() for values in scores.values()])[:-1]
            on_host = dict(zip(scores, np.split(host, ends), strict=True))
        # 3. Decide row by row.
        plans = [keep_all(row.reduction.labels) for row in self.rows]
        for i in active:
            reduction = self.rows[i].reduction
            features = features_of(hidden[i, : self.rows[i].origin.size]) if reduction.wants_features else None
            plans[i] = reduction.step(on_host.get((i, "similarity")), on_host.get((i, "importance")), features)
        return plans

    def _place(self, device: torch.device) -> None:
        """Bring `index` and `valid` up to date with the rows, shorter ones padded by their last token."""
        longest = max(row.origin.size for row in self.rows)
        places = [np.pad(row.origin, (0, longest - row.origin.size), mode="edge") for row in self.rows]
        self.index = torch.from_numpy(np.stack(places)).to(device)
        self.valid = None
        if any(row.origin.size < longest for row in self.rows):
            lengths = torch.tensor([row.origin.size for row in self.rows], device=device)
            self.valid = torch.arange(longest, device=device) < lengths[:, None]
        self._memo.clear()

    def _gather(self, table: Tensor) -> Tensor:
        """Rows of the tokens present.  [..., 1 or B, S, D] -> [..., B, K, D]"""
        if self.index is None:
            return table
        index = self.index.to(table.device)
        table = table.expand(*table.shape[:-3], len(index), *table.shape[-2:])
        return table[..., torch.arange(len(index), device=table.device)[:, None], index, :]

    def enter(self, layer: int, given: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a layer, for the tokens present, and their slots in its cache.

        Args:
            layer: its index.
            given: its arguments by name, for all new tokens, but for the hidden states.

        Raises:
            BackendError: arguments for each token that are unknown or missing, or a cache that cannot hold reduced
                tokens.
        """
        self.importance = []
        for row in self.rows:
            row.kept.append(row.origin)
        arguments = dict(given)
        # 1. Everything that transformers passes for each token must be known by name: it has to shrink with them.
        self._once("known", tuple(given.values()), lambda: self._check_arguments(given))
        # 2. Rotary tables of the tokens present. Gaps between position_ids would read as packed sequences, and the
        #    tables say all there is to say.
        if self.index is not None:
            arguments["position_ids"] = None
            tables = given["position_embeddings"]
            arguments["position_embeddings"] = self._once("tables", tables, lambda: tuple(map(self._gather, tables)))
        # 3. Slots: the layer stores the tokens present behind those that it holds, and stands for the whole prompt.
        self.cache = cache_of(given)
        slots, valid = self._extended_slots(layer)
        self.stored = slots.shape[1]
        # 4. Of the mask over all tokens, the rows of the tokens present and the columns of the tokens stored.
        mask = given.get("attention_mask")
        flash = self.context.flash
        arguments["attention_mask"] = self._once(
            "mask", (mask, slots), lambda: reduced_mask(mask, self._places(), slots, valid, self.past, flash)
        )
        return arguments

    def _extended_slots(self, index: int) -> tuple[Tensor, Tensor | None]:
        """Slots [B, T] and validity of what a layer attends to, which its cache, if there is one, will hold."""
        new = self._once("new", self.index, lambda: self.past + self._places())
        self.layer = None
        if self.cache is None:
            return new, self.valid
        layer = adopt(self.cache, index, self._once("dense", None, self._dense))
        old, old_valid = self._once("old", (layer.slots, layer.valid), lambda: self._earlier(layer))
        slots = self._once("slots", old, lambda: torch.cat([old.to(new.device), new], dim=1))
        valid = self._once("valid", (old, old_valid), lambda: joined_valid(old, old_valid, new, self.valid))
        layer.extend(slots, valid, self.past + self.shape[1])
        self.layer = layer
        return slots, valid

    def watch_attention(self, module: nn.Module, last: bool) -> None:
        """Say which attention runs next, and note whether its importance is wanted: not in the last layers."""
        self.attention = module
        self.watching = not last and any(row.reduction.wants_importance for row in self.rows)

    def _check_arguments(self, given: dict[str, Any]) -> bool:
        check_arguments(given, self.shape[1])
        return True

    def _dense(self) -> tuple[Tensor, Tensor | None]:
        """Slots [B, past] of a cache that holds all earlier tokens, and which of them are no padding."""
        slots = torch.arange(self.past, device=self.context.device).expand(self.shape[0], -1)
        padded = self.past_valid is not None and not bool(self.past_valid.all())
        return slots, self.past_valid if padded else None

    def _earlier(self, layer: CacheLayer) -> tuple[Tensor, Tensor | None]:
        """Slots and validity of what a layer holds; those of nothing are the same for all layers."""
        dense = self._once("dense", None, self._dense)
        return caught_up(layer, self.past) if self.past else dense

    def _places(self) -> Tensor:
        if self.index is not None:
            return self.index
        return torch.arange(self.shape[1], device=self.context.device).expand(self.shape)

    def _once(self, name: str, key: object, make: Callable[[], Value]) -> Value:
        """Make once for the same objects; they are kept alive, so that no other object gets the id of one of them."""
        keys = key if isinstance(key, tuple) else (key,)
        entry = (name, *map(id, keys))
        if entry not in self._memo:
            self._memo[entry] = (keys, make())
        result: Value = self._memo[entry][1]
        return result

    def watch(self, module: nn.Module, query: Tensor, key: Tensor, scaling: float) -> None:
        """Importance of each row's tokens.  query [B, H, K, hd] and key [B, Hkv, T, hd], earlier slots in front.

        Raises:
            BackendError: this is not the attention of the layer that is running, or it reads other tokens than are
                stored.
        """
        self.watching = False
        if module is not self.attention:
            raise broken(f"{type(module).__name__} attends, which is not the attention of the layer that is running")
        if query.shape[2] != self.present or key.shape[2] != self.stored:
            raise broken(
                f"{query.shape[2]} tokens attend {key.shape[2]}, where {self.present} are left and {self.stored} stored"
            )
        earlier = key.shape[2] - query.shape[2]
        stored = None if self.layer is None else self.layer.valid
        for i, row in enumerate(self.rows):
            present = row.origin.size
            attended = torch.arange(earlier + present, device=key.device)
            if stored is not None:
                attended = attended[stored[i, : attended.numel()].to(key.device)]
            queries = query[i, :, :present]
            keys = key[i].index_select(1, attended)
            self.importance.append(importance(queries, keys, scaling, self.context.importance_rows))

    def note_state(self) -> None:
        """Note that the decoder may have captured a hidden state of the tokens present now."""
        self.states.append((self.index, self.valid))

    def restored_states(self, states: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        """What a decoder captured before, between and behind its layers, each at its tokens' places.

        The last state may be the decoder's output.  L + 1 of [B, K, D], None where not requested  -> of [B, S, D]

        Raises:
            BackendError: there are more or fewer of them than layers.
        """
        if len(states) != len(self.states):
            raise broken(f"{len(states)} hidden states came back from {len(self.states) - 1} decoder layers")
        places = zip(states, self.states, strict=True)
        return tuple(None if state is None else self._restored(state, *where) for state, where in places)

    def restored_output(self, output: Any) -> Any:
        """A decoder's output with all hidden states at their tokens' places.

        Raises:
            BackendError: it has no last_hidden_state.
        """
        if isinstance(output, tuple):
            rest = [self.restored_states(item) if _is_states(item) else item for item in output[1:]]
            return (self.restored(output[0]), *rest)
        if not isinstance(getattr(output, "last_hidden_state", None), Tensor):
            raise broken(f"the decoder's output, a {type(output).__name__}, has no last_hidden_state")
        states = getattr(output, "hidden_states", None)
        if states is not None:
            output.hidden_states = self.restored_states(states)
        output.last_hidden_state = self.restored(output.last_hidden_state)
        return output

    def restored(self, hidden: Tensor) -> Tensor:
        """The tokens present at their places among S, zeros where one was dropped.  [B, K, D] -> [B, S, D]"""
        return self._restored(hidden, self.index, self.valid)

    def _restored(self, hidden: Tensor, index: Tensor | None, valid: Tensor | None) -> Tensor:
        if index is None:
            return hidden
        if hidden.shape[1] != index.shape[1]:
            raise broken(f"{hidden.shape[1]} hidden states came back for {index.shape[1]} tokens that are left")
        index = index.to(hidden.device)
        valid = torch.ones_like(index, dtype=torch.bool) if valid is None else valid.to(hidden.device)
        rows, tokens = torch.nonzero(valid, as_tuple=True)
        whole = hidden.new_zeros(*self.shape, hidden.shape[-1])
        whole[rows, index[rows, tokens]] = hidden[rows, tokens]
        return whole


def _is_states(value: object) -> bool:
    return isinstance(value, tuple) and any(isinstance(item, Tensor) and item.ndim == 3 for item in value)
