"""The live model: `apply_framefusion` on an unmodified Hugging Face video LVLM, `remove_framefusion` to restore it.

What happens in a forward stands in framefusion/live/handle.py, the names of transformers in seams.py beside it, what a
forward must show before its answer is believed in proof.py. Knows nothing of bundles.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from framefusion.errors import CheckpointError
from framefusion.live.handle import FrameFusion as FrameFusion  # part of this module's interface
from framefusion.live.labels import FAMILIES, Preset
from framefusion.live.seams import FOREIGN_PART, LAYER_PARTS, unwrapped
from framefusion.reducers import DEFAULT, load_reducer
from framefusion.reduction.policy import ReductionSettings

OTHER_FAMILIES = Preset(similarity_lower_bound=0.6, importance_rows=1)
"""Numbers for a decoder whose family has no row in FAMILIES; its labels are the user's."""


def apply_framefusion(
    model: nn.Module,
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
            and Qwen2 kind, whose labels are given by `model.framefusion.labels`. PEFT's, DataParallel's and other
            modules around it are looked through: it is the model within that changes.
        cost: share of the computation over visual tokens that is kept, in (0, 1].
        similarity_lower_bound: tokens at least this similar merge; by default the family's (live.labels.FAMILIES).
        ratio_lower_bound: merging ends below this share.
        reducer: the method, a name of `framefusion.reducers.reducer_names()`; the thresholds are FrameFusion's.
        importance_rows: last query rows that the importance is averaged over; by default the family's.
        depth: deepest layer whose attention a merge may follow; by default the last but one.
        seed: of a method that draws; the same for each row.

    Raises:
        BudgetError: a number out of range, or a cost that this depth cannot reach.
        ReducerError: no such reducer.
        CheckpointError: no model of transformers, or layers of another make than Llama's.
        BackendError: a model copied to several devices by DataParallel. Later forwards raise it where transformers
            does not do what FrameFusion leans on; the message names the versions known to work.
    """
    # 1. the model of transformers itself, with layers that have a place for a call
    inner = unwrapped(model)
    num_layers = _count_layers(inner)
    # 2. the family's numbers, where no others are given
    labels, preset = FAMILIES.get(inner.config.model_type, (None, OTHER_FAMILIES))
    bound = preset.similarity_lower_bound if similarity_lower_bound is None else similarity_lower_bound
    rows = preset.importance_rows if importance_rows is None else importance_rows
    deepest = num_layers - 2 if depth is None else depth
    settings = ReductionSettings(cost, bound, ratio_lower_bound, num_layers, deepest)
    method = load_reducer(reducer)
    # 3. nothing can fail any more: the new hooks in place of the old ones
    remove_framefusion(inner)
    handle = FrameFusion(inner, labels, Preset(bound, rows), settings, method, seed)
    handle.install()
    inner.framefusion = handle
    if inner is not model:
        model.__dict__["framefusion"] = handle
        handle.when_removed(partial(model.__dict__.pop, "framefusion", None))
    return handle


def _count_layers(model: Any) -> int:
    """The number of decoder layers.

    Raises:
        CheckpointError: they are not built like Llama's, so that no call can come between attention and MLP.
    """
    layers = getattr(model.get_decoder(), "layers", None) or [None]
    differences = [f"no {part}" for part in LAYER_PARTS if not hasattr(layers[0], part)]
    if hasattr(layers[0], FOREIGN_PART):
        differences.append(f"a {FOREIGN_PART}")
    if differences:
        raise CheckpointError(
            f"{type(model).__name__} has decoder layers of another make than Llama's and Qwen2's, with "
            f"{' and '.join(differences)}: FrameFusion has no place between their attention and their MLP"
        )
    return len(layers)


def remove_framefusion(model: nn.Module) -> None:
    """Restore a model, or the one within a wrapper, exactly as it was; nothing happens to one that was never changed.

    Raises:
        CheckpointError: no model of transformers.
    """
    handle = unwrapped(model).__dict__.pop("framefusion", None)
    if handle is not None:
        handle.uninstall()
