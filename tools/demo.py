"""What `make demo` shows: one film, one question, with every token and with 30 % of them.

Builds the tiny trained Qwen2-VL of tests/models with `ff-export`, draws a film of a minute, and lets `ff-run` measure
and draw the answer, in processes in which torch and its company cannot be imported. Then short clips that the model
never saw are asked the same way. Everything is left in demo-out/.

The model learned films of 16 seconds. Of six films of 64 seconds with a question of order each, this is one that it
answers rightly with every token, chosen for its story: what the demo compares is the answer with fewer.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from framefusion.console.terminal import activity
from framefusion.runtime.view.timing import Spread, are_level
from tools.tiny import clips
from tools.tiny.make_clips import make_clips

CHECKPOINT = Path("tests/models/tiny_qwen2_vl")
OUT = Path("demo-out")
BUNDLE = OUT / "bundle"
FILM = OUT / "film.mp4"
PAGE = OUT / "report.html"
CLIPS = OUT / "clips"
BLOCKED = OUT / "blocked"
MARK = OUT / ".made-by-the-demo"
SECONDS = 64
FRAMES = 2 * SECONDS  # that the model sees; of itself it takes 32 at most
SEED = clips.HELD_OUT + 500_001
CLIP_COUNT = 10  # each kind of question twice
DENSE = 1.0
REDUCED = 0.3
ROUNDS = 3
ABSENT = ("torch", "transformers", "onnx", "onnxscript", "safetensors")  # from the machine that runs a bundle
VERBS = {"still": "stands still", **{way: f"moves {way}" for way in ("left", "right", "up", "down")}}

Facts = Mapping[str, Any]


def main() -> int:
    started = time.monotonic()
    claim_folder()
    try:
        build()
        block_imports()
        question, answer = draw_film()
        compare(question, answer)
        draw_page(question)
        ask_about_clips()
    except subprocess.CalledProcessError as error:
        print(f"demo: {Path(error.cmd[0]).name} ended with exit code {error.returncode}", file=sys.stderr)
        return int(error.returncode)
    show_what_is_next(question, time.monotonic() - started)
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
    arguments = ("build", str(CHECKPOINT), "-o", str(BUNDLE), "--force")
    title("1. Build a bundle of a tiny trained model")
    print(f"ff-export {shlex.join(arguments)}", flush=True)
    began = time.monotonic()
    run(command("ff-export"), *arguments, "--json")
    manifest = json.loads((BUNDLE / "manifest.json").read_text(encoding="utf-8"))
    size = sum(file["size"] for file in manifest["files"].values())
    model = manifest["model"]
    check = manifest["check"]
    errors = [line for line in check["lines"] if line["limit"] > 0]
    worst = max(errors, key=lambda line: float(line["value"] / line["limit"]))
    print(f"{model['num_layers']} layers in {len(manifest['segments'])} segments, {size / 1e6:.1f} MB, ", end="")
    print(f"{time.monotonic() - began:.0f} s with the check")
    print(f"its numbers are those of {check['reference']}:")
    print(f"largest error {worst['value']:.1e} where {worst['limit']:.0e} is allowed ({worst['what']})")


def block_imports() -> None:
    """A folder of modules that refuse to be imported, to stand first on ff-run's path."""
    BLOCKED.mkdir(parents=True, exist_ok=True)
    for name in ABSENT:
        (BLOCKED / f"{name}.py").write_text(f"raise ImportError('{name} is blocked in the demo')\n", encoding="utf-8")


def draw_film() -> tuple[str, str]:
    """Draw the film, and say what happens in it; the question and its answer."""
    scene = clips.scene_for(SEED, "order", SECONDS)
    with activity("drawing a film"):
        clips.write_mp4(FILM, scene)
    question = clips.ask(scene, "order", np.random.default_rng((SEED, 7)))
    title(f"2. A film of {SECONDS} seconds: {FILM}")
    for thing in scene.things:
        print(f"{clock(thing.start)} to {clock(thing.stop)}  a {thing.color} {thing.shape} {VERBS[thing.motion]}")
    print("and nothing else but a background that hardly changes.")
    print(f"Asked: {question.text}", flush=True)
    return question.text, question.answer


def compare(question: str, answer: str) -> None:
    """The film with every token beside the film reduced, in turns, in one process without torch."""
    title(f"3. With every token, and at cost {REDUCED}: medians of {ROUNDS}, in turns, without torch")
    flags = ("--video", str(FILM), "--prompt", question, "--max-frames", str(FRAMES), "--max-new-tokens", "8")
    costs = ("--cost", f"{DENSE:g},{REDUCED:g}", "--rounds", str(ROUNDS))
    facts = json.loads(run(command("ff-run"), "bench", str(BUNDLE), *flags, *costs, "--json", path=BLOCKED))
    print("\n".join(comparison(facts, answer)), flush=True)


def draw_page(question: str) -> None:
    """The page of the reduced answer."""
    flags = ("--video", str(FILM), "--prompt", question, "--max-frames", str(FRAMES), "--max-new-tokens", "8")
    arguments = ("view", str(BUNDLE), *flags, "--cost", f"{REDUCED:g}", "--compare", "-o", str(PAGE))
    with activity("drawing the page of the answer"):
        run(command("ff-run"), *arguments, "--json", path=BLOCKED)


def ask_about_clips() -> None:
    """Questions of every kind about short clips, in one evaluation."""
    title(f"4. {CLIP_COUNT} more films that the model never saw: color, shape, direction, count, order")
    with activity("drawing films"):
        make_clips(CLIPS, CLIP_COUNT)
    questions = ("--questions", str(CLIPS / "questions.jsonl"), "--cost", f"{DENSE:g},{REDUCED:g}")
    facts = json.loads(run(command("ff-export"), "eval", str(BUNDLE), *questions, "--json"))
    for row in facts["accuracy"]:
        what = "with every token" if row["cost"] == DENSE else f"at cost {row['cost']:g}"
        print(f"{what:<17} {row['right']} of {CLIP_COUNT} right")


def show_what_is_next(question: str, spent: float) -> None:
    """The page, and commands to copy."""
    title(f"5. See it, and go on ({spent:.0f} s so far)")
    print(f"{PAGE} shows which patches stayed. Open it in a browser:\n")
    print(f"  {opener()} {PAGE}\n")
    print("Talk about the film, and measure your own:\n")
    print("  . .venv/bin/activate")
    shown = f"{BUNDLE} --video {FILM} --max-frames {FRAMES}"
    print(f"  ff-run chat {shown} --cost {REDUCED:g}")
    print(f"  ff-run bench {shown} --prompt {shlex.quote(question)}", flush=True)


# --- Pieces ---------------------------------------------------------------------------------------------------------


def comparison(facts: Facts, answer: str) -> list[str]:
    """The table, of what `ff-run bench --json` prints: figures with every token, with fewer, and the verdict."""
    dense, reduced = facts["ways"]
    visual = facts["visual_tokens"]
    kept = reduced["visual_tokens_kept"]
    same = "the same answer" if reduced["same_answer"] else "ANOTHER answer"
    rows = [
        ("", "every token", f"cost {REDUCED}", ""),
        ("answer", dense["text"].strip(), reduced["text"].strip(), f"{same}; right is: {answer}"),
        ("visual tokens", str(visual), str(kept), f"{100 * (1 - kept / visual):.0f} % fewer in the last layer"),
        ("KV cache", megabytes(dense), megabytes(reduced), f"{dense['kv_bytes'] / reduced['kv_bytes']:.1f}x smaller"),
        timed("LLM prefill", llm_prefill(dense), llm_prefill(reduced)),
        timed("first token", spread_of(dense["first_token"]), spread_of(reduced["first_token"])),
    ]
    lines = [f"{name:<14} {first:>12} {second:>12}   {verdict}".rstrip() for name, first, second, verdict in rows]
    return [*lines, "The first token also waits for the film to be read and encoded, alike for both."]


def timed(name: str, dense: Spread, reduced: Spread) -> tuple[str, str, str, str]:
    """A row of seconds, each as (least, median, most): what is no difference is called level."""
    if are_level(dense, reduced):
        first, second = (f"{1000 * side[0]:.0f} to {1000 * side[2]:.0f}" for side in (dense, reduced))
        verdict = f"level: {first} ms, {second} ms"
    elif reduced[1] < dense[1]:
        verdict = f"{dense[1] / reduced[1]:.1f}x faster"
    else:
        verdict = f"{reduced[1] / dense[1]:.1f}x slower"
    return name, in_ms(dense[1]), in_ms(reduced[1]), verdict


def llm_prefill(way: Facts) -> Spread:
    """Least, median and most seconds of prefill and reduction together."""
    stages = [spread_of(way["stages"][name]) for name in ("prefill", "reduction") if name in way["stages"]]
    least, median, most = (sum(values) for values in zip(*stages, strict=True))
    return least, median, most


def spread_of(seconds: Facts) -> Spread:
    return seconds["min_s"], seconds["median_s"], seconds["max_s"]


def in_ms(seconds: float) -> str:
    return f"{1000 * seconds:.0f} ms"


def megabytes(way: Facts) -> str:
    return f"{way['kv_bytes'] / 1e6:.2f} MB"


def clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


def opener() -> str:
    """What opens a page from a shell of this system."""
    return {"darwin": "open", "win32": "start"}.get(sys.platform, "xdg-open")


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


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()  # it takes none, but for --help
    sys.exit(main())
