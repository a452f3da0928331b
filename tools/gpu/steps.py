"""The steps of `make gpu`, most valuable first: what each runs, what it needs, and when it is ended.

Knows no process and no file.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

TINY = ("--frames", "6", "--grid", "4x4", "--depth", "1", "--rounds", "1", "--new-tokens", "4", "--threads", "1")
PAPER = ("--frames", "64", "--grid", "14x15", "--rounds", "3", "--new-tokens", "17")
"""The paper's speed setting: 13440 visual tokens, and 32 of text."""
LIVE_TINY = ("--frames", "6", "--grid", "4x4", "--depth", "1", "--rounds", "1", "--new-tokens", "4", "--threads", "1")
LIVE_PAPER = ("--frames", "64", "--grid", "14x15", "--rounds", "3", "--new-tokens", "9", "--costs", "0.5,0.3,0.1")


@dataclass(frozen=True)
class Step:
    """One process whose output is JSON, or pytest's.

    Attributes:
        name: under which its result is kept.
        command: of the process.
        limit_s: seconds after which it is ended.
        modules: that it imports; where one is missing, the step is left out.
        on_gpu: nothing of it runs without one.
        is_json: it prints JSON; else its last lines are kept.
    """

    name: str
    command: tuple[str, ...]
    limit_s: int
    modules: tuple[str, ...] = ()
    on_gpu: bool = False
    is_json: bool = True


def steps(device: str, shape: str, work: Path) -> list[Step]:
    """All steps, in order.

    Args:
        device: "cuda" or "cpu", to try the steps themselves.
        shape: of tools.bench.setting.SHAPES.
        work: folder for checkpoints and bundles.
    """
    python = sys.executable
    cuda = ("cuda.bindings",)
    is_tiny = shape == "tiny"
    sizes = ("--shape", shape, "--device", device, "--work", str(work), *(TINY if is_tiny else PAPER))
    attention = ("--shape", shape, "--device", device, "--tokens", "64" if is_tiny else "4096")
    dtype = "float32" if device == "cpu" else "bfloat16"

    live_sizes = ("--shape", shape, "--device", device, "--work", str(work), *(LIVE_TINY if is_tiny else LIVE_PAPER))
    live = (*live_sizes, "--dtype", dtype)

    def bench(name: str, module: str, limit_s: int, *flags: str, modules: tuple[str, ...]) -> Step:
        return Step(name, (python, "-m", f"tools.bench.{module}", *flags), limit_s, modules)

    tests = (python, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests/gpu/test_cuda_device.py")
    engines = (python, "-m", "pytest", "-q", "-rs", "-m", "gpu", "-p", "no:cacheprovider", "tests/gpu/test_tensorrt.py")
    batches = "together or replayed or rows or allocated or golden"
    inductor = ("--backend", "inductor", *sizes, "--costs", "1,0.3", "--dtype", dtype)
    onnxruntime = ("--backend", "onnxruntime", *sizes, "--costs", "1,0.3")
    rounds = ("--rounds", "1" if is_tiny else "2")
    films = ("--films", "2", "--seconds", "2" if is_tiny else "8", *rounds, "--threads-of", "1", "--long-seconds", "0")
    module = ("onnxruntime",)
    patience = 1 if device == "cuda" else 5  # a CPU that only tries the steps may be slow
    doctor = "from framefusion.start import ff_run; ff_run()"
    listed = [
        # 1. What is wrong there makes every figure worthless: backends beside numpy, then each kernel and call.
        Step("doctor", (python, "-c", doctor, "doctor", "--json"), 35),
        Step("tests", (*tests, "-k", "not film"), 80, (*cuda, "pytest", "hypothesis"), on_gpu=True, is_json=False),
        # 2. The parts: kernels of the reduction against a copy, forms of attention, products.
        Step("kernels", (python, "-m", "tools.bench.kernels"), 45, cuda, on_gpu=True),
        bench("attention", "attention", 70, *attention, "--dtype", dtype, modules=("torch",)),
        # 3. TensorRT's engines of a tiny bundle: the golden, and requests in a batch against each by itself.
        Step("engines", (*engines, "-k", batches), 60, (*cuda, "pytest", "torch"), on_gpu=True, is_json=False),
        # 4. The live model, which needs no build.
        bench("live", "live", 100, *live, modules=("torch", "transformers")),
        # 5. The whole: prefill and decode against eager torch. The second of a backend finds its bundle there.
        bench("inductor prefill", "prefill", 260, *inductor, modules=("torch", "transformers")),
        bench("inductor decode", "decode", 80, *inductor, modules=("torch", "transformers")),
        # 6. Films on their way to the tower, in that bundle: the next one decoded while the tower has one.
        bench("films", "overlap", 50, *inductor, *films, modules=("torch", "transformers", "av")),
        bench("onnxruntime prefill", "prefill", 80, *onnxruntime, modules=("torch", "transformers", *module)),
        bench("onnxruntime decode", "decode", 40, *onnxruntime, modules=("torch", "transformers", *module)),
    ]
    return [replace(step, limit_s=patience * step.limit_s) for step in listed]
