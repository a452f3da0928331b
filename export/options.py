"""What a user may choose of a build. No torch here: the command line and a manifest's reader need only the names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from framefusion.errors import BudgetError
from framefusion.runtime.backends.table import engine_traits
from framefusion.runtime.format.engine_record import EngineKind
from framefusion.runtime.format.manifest import Mode

Device = Literal["cpu", "cuda"]
DType = Literal["float32", "float16", "bfloat16"]
KvCacheDType = Literal["int8"]
TowerInput = Literal["uint8", "float"]
AS_STORED = "stored"
DEQUANTIZED = "dequantized"
Variant = Literal["attention", "plain"]
DEFAULT_TEXT = 512
DEFAULT_INPUT = 8192
DEFAULT_NEW_TOKENS = 1024
DEFAULT_DEPTH = 7  # merging of the published models ends within the first handful of layers
LIVE = ("transformers", "eager")
"""What runs a checkpoint that is evaluated without a build: transformers' own model, or our graphs in eager torch."""
MAX_BATCH_SIZE = 8  # as --max-running of a server
MOST_ROWS = 64
CACHE_LIMIT = 64_000_000_000  # bytes of engines that stay in a cache


@dataclass(frozen=True)
class BuildOptions:
    """What a user may choose; None takes what checkpoint, family or the other options imply.

    Attributes:
        reduction: where tokens are dropped: nowhere, by a built-in schedule, or by thresholds at run time.
        reducer: what drops tokens (adaptive): a name of `framefusion.reducers`. The decoder is cut where it may act.
        cost: share of the computation over visual tokens that is kept, in (0, 1].
        similarity_lower_bound, ratio_lower_bound: see `framefusion.reduction.policy.ReductionSettings`.
        depth: deepest layer whose attention a reduction may follow (adaptive).
        merge_shares, prune_layer: the schedule (fixed).
        dialect: how the graphs say attention over a cache.
        buckets: sizes of a prefill.
        max_input_len, max_kv_cache_capacity, max_text_len: longest prompt; prompt and answer; text of a prompt (fixed).
        dtype: of the graphs: weights, activations and caches. The embedding table stays as it is stored.
        weights: of the decoder's layers: None for floats of `dtype`, or for the codes of a quantized checkpoint if
            graphs can have them; "int8" or "int4", with the size of a block behind a colon ("int4:64"), "+zero" for
            zero points, and "+head" or "+head4" for the head in int8 or int4; "fp8" for floats of 8 bits, with
            "+activations" for activations as well and "+head" for the head; of a quantized checkpoint alone
            AS_STORED, its codes though its format rounds activations too, or DEQUANTIZED, floats of `dtype`.
        kv_cache_dtype: of the KV caches: None for that of `dtype`; "int8" for codes, by a scale of each channel of a
            head that the build measures.
        calibrated_by: SHA-256 of each film that codes of `weights` are chosen by, then of the tokens of prompts and
            answers; None: by the weights alone.
        num_decoder_layer: take only the first layers, for a smoke test.
        fps, max_frames, min_pixels, max_pixels: sampling of frames and their size.
        mm_spatial_pool_mode: how the patches of a frame are pooled (LLaVA).
        max_slice_nums: most slices that a frame of a video is cut into (MiniCPM-V).
        max_tiles: most tiles that an image is cut into (InternVL, NVILA, LLaVA).
        frame_label: text before a frame of a video, {} its number (InternVL).
        total_pixels: most pixels of all frames of a video together (Qwen2-VL, Qwen2.5-VL).
        resize_rounding: how often a resized picture is rounded to whole levels (Qwen-VL).
        tower_input: what the vision tower's graph takes: pictures in bytes, which it normalises, or floats that are.
        backend, target_sm, engines_only, device, variant, max_autotune, max_batch_size: the engines that are compiled
            of the graphs, see `EngineOptions`.
    """

    reduction: Mode = "adaptive"
    reducer: str = "framefusion"
    cost: float = 0.3
    similarity_lower_bound: float | None = None
    ratio_lower_bound: float = 0.1
    depth: int | None = None
    merge_shares: tuple[float, ...] | None = None
    prune_layer: int | None = None
    dialect: str = "gqa"
    buckets: tuple[int, ...] | None = None
    max_input_len: int | None = None
    max_kv_cache_capacity: int | None = None
    max_text_len: int = DEFAULT_TEXT
    dtype: DType = "float32"
    weights: str | None = None
    kv_cache_dtype: KvCacheDType | None = None
    calibrated_by: tuple[str, ...] | None = None
    num_decoder_layer: int | None = None
    fps: float | None = None
    max_frames: int | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None
    max_slice_nums: int | None = None
    max_tiles: int | None = None
    frame_label: str | None = None
    total_pixels: int | None = None
    resize_rounding: str | None = None
    mm_spatial_pool_mode: str | None = None
    tower_input: TowerInput = "uint8"
    backend: EngineKind | None = None
    target_sm: tuple[str, ...] | None = None
    engines_only: bool = False
    device: Device = "cpu"
    variant: Variant | None = None
    max_autotune: bool = False
    max_batch_size: int | None = None

    @property
    def engines(self) -> EngineOptions | None:
        """What is compiled of the graphs; None leaves them to ONNX Runtime."""
        if self.backend is None:
            return None
        return EngineOptions(
            self.backend,
            self.target_sm or (),
            self.engines_only,
            self.device,
            self.variant,
            self.max_autotune,
            self.max_batch_size,
        )

    @staticmethod
    def chosen(**fields: Any) -> BuildOptions:
        """Options of which None stands for the default; that of a build with engines is what they can be compiled from.

        Raises:
            BudgetError: flags are about engines, and none are compiled.
        """
        given = {name: value for name, value in fields.items() if value is not None}
        if "backend" in given:
            traits = engine_traits(given["backend"])
            usual = {"dialect": traits.dialects[:1], "dtype": traits.dtypes[:1]}
            return BuildOptions(**{name: value for name, values in usual.items() for value in values} | given)
        names = ("target_sm", "engines_only", "variant", "max_autotune", "max_batch_size")
        about_engines = [name for name in names if given.get(name)]
        if about_engines:
            flags = " and ".join(f"--{name.replace('_', '-')}" for name in about_engines)
            verb = "are" if len(about_engines) > 1 else "is"
            raise BudgetError(f"{flags} {verb} about engines: say which with --backend")
        return BuildOptions(**given)


@dataclass(frozen=True)
class EngineOptions:
    """What a user may choose of engines; all of it decides what is in the bundle.

    Attributes:
        kind: what compiles and runs them.
        targets: compute capabilities, "86" or "8.6"; none takes the library's own choice.
        engines_only: leave out graphs and weights that have an engine.
        device: what inductor compiles for; the others compile for GPUs alone.
        variant: what TensorRT's networks are made of, see runtime/backends/tensorrt/library.py; None takes what the
            installed version has.
        max_autotune: let inductor time several kernels for each product, and take the fastest.
        max_batch_size: most requests that an engine of TensorRT decodes in one step; None takes MAX_BATCH_SIZE.
    """

    kind: EngineKind
    targets: tuple[str, ...] = ()
    engines_only: bool = False
    device: Device = "cpu"
    variant: Variant | None = None
    max_autotune: bool = False
    max_batch_size: int | None = None


@dataclass(frozen=True)
class Resources:
    """What a compilation may take; none of it decides what comes out.

    Attributes:
        jobs: engines at once; None takes one for CORES_PER_JOB cores, as far as memory allows.
        cache: folder of the engine cache; None takes the user's.
        cache_limit: bytes of engines that stay in it.
    """

    jobs: int | None = None
    cache: Path | None = None
    cache_limit: int = CACHE_LIMIT
