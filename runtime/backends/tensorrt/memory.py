"""GPU memory that the engines of a bundle take, from the manifest alone, and the refusal of a GPU that has less.

    weights      the engine files: weights, once for all profiles, and kernels
    caches       keys and values at the engines' static lengths, allocated once
    activations  one block for all engines, which run one after another: the largest prefill's
                 tokens of its largest profile * (3 intermediate + 6 hidden) numbers; an estimate, until a loaded engine
                 gives its own figure
                 of a plain network the scores of all pairs come on top, unless the library fuses them
    slabs        of engines that decode several requests in a step: as many rows of caches, from the first batch on
    rows         hidden states of the longest prompt into a segment, out of it and compacted, with their rotary tables;
                 one more for each layer that adds visual features; of a plain network the new rows of keys and values

Numbers are in the bundle's own type. A GPU needs besides what its driver holds for any process. Loads nothing, knows no
library. The estimate has not been compared with a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from framefusion.console.messages import in_bytes
from framefusion.errors import BackendError
from framefusion.runtime.backends.fit import gpu_memory
from framefusion.runtime.backends.tensorrt.engine import batch_sizes
from framefusion.runtime.backends.tensorrt.library import is_plain
from framefusion.runtime.format.engine_record import EngineKind
from framefusion.runtime.format.manifest import FLOAT_BYTES, Manifest

_ROWS = 4  # of hidden states at once


@dataclass(frozen=True)
class EngineMemory:
    """Bytes by what takes them."""

    weights: int
    caches: int
    activations: int
    rows: int
    slabs: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.caches + self.activations + self.rows + self.slabs

    @property
    def one_request(self) -> EngineMemory:
        """Without what requests that are decoded together share."""
        return replace(self, slabs=0)

    def __str__(self) -> str:
        parts = ["weights", "caches", "activations", "rows"] + ["slabs"] * (self.slabs > 0)
        return ", ".join(f"{part} {in_bytes(getattr(self, part))}" for part in parts)


def engine_memory(manifest: Manifest, kind: EngineKind) -> EngineMemory:
    """Plan the memory of the engines of one kind."""
    model = manifest.model
    size = FLOAT_BYTES[manifest.model.dtype]
    engines = [engine for engine in manifest.engines if engine.kind == kind]
    weights = sum(manifest.files[engine.file].size for engine in engines if engine.file in manifest.files)
    tokens = max((profile.tokens or 0 for engine in engines for profile in engine.profiles), default=0)
    width = 3 * model.intermediate_size + 6 * model.hidden_size
    plain = any(is_plain(engine.options) for engine in engines)
    most_layers = max(len(segment.attention_layers) for segment in manifest.segments)
    appended = 2 * model.num_kv_heads * model.head_dim * most_layers if plain else 0
    states = _ROWS + max(segment.deepstack for segment in manifest.segments)
    caches = gpu_memory(manifest, kind) - weights
    return EngineMemory(
        weights=weights,
        caches=caches,
        slabs=caches * max(common_batch_sizes(manifest, kind), default=0),
        activations=tokens * width * size,
        rows=tokens * (states * model.hidden_size + 2 * model.head_dim + appended) * size,
    )


def common_batch_sizes(manifest: Manifest, kind: EngineKind) -> tuple[int, ...]:
    """Rows of a step that all segments' engines of a kind have profiles for, ascending; none where one has none."""
    graphs = {segment.decode for segment in manifest.segments}
    sizes = [set(batch_sizes(e)) for e in manifest.engines if e.kind == kind and e.graph in graphs]
    return tuple(sorted(set.intersection(*sizes))) if sizes else ()


def require_room(plan: EngineMemory, free: int, gpu: str, manifest: Manifest) -> None:
    """Refuse a plan that a GPU has no room for.

    Args:
        plan: what is still to be allocated.
        free: bytes that the GPU has free now.
        gpu: its name.
        manifest: of the bundle, for its limits.

    Raises:
        BackendError: with both figures and what can be done.
    """
    if plan.total <= free:
        return
    limits = manifest.limits
    raise BackendError(
        f"the engines need {in_bytes(plan.total)} of GPU memory ({plan}), {gpu} has {in_bytes(free)} free: end what "
        f"else runs on it; or build with a smaller --max-kv-cache-capacity (now {limits.max_kv_cache_capacity}) or "
        f"--max-input-len (now {limits.max_input_len}) for fewer frames; or use --backend onnxruntime --device cpu"
    )
