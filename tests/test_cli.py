"""The two commands: help without torch, one JSON object on stdout, and numbers that add up."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from framefusion.console import messages as console
from framefusion.console.layout import WIDEST
from framefusion.errors import CheckFailedError
from framefusion.export.build import build
from framefusion.export.checkpoints.checkpoint import Checkpoint
from framefusion.export.commands.cli import ff_export
from framefusion.export.options import DEFAULT_DEPTH, DEFAULT_INPUT, DEFAULT_NEW_TOKENS, BuildOptions
from framefusion.export.report.inspection import PromptSize, padding, render, report
from framefusion.runtime.commands.cli import ff_run
from framefusion.runtime.commands.flags import visuals_in_order
from framefusion.runtime.format.manifest_file import read_manifest
from tests.patience import PATIENCE
from tests.random_checkpoint import random_checkpoint

HEAVY = ("torch", "transformers", "onnx", "onnxscript", "safetensors", "onnxruntime", "av")


def invoke(command: click.Command, *arguments: object) -> Result:
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


def answer(command: click.Command, *arguments: object) -> dict[str, Any]:
    """The JSON object that a command prints, and prints alone."""
    result = invoke(command, *arguments, "--json")
    assert result.exit_code == 0, result.output
    assert result.stdout.count("\n") == 1
    loaded: dict[str, Any] = json.loads(result.stdout)
    return loaded


@pytest.mark.parametrize(
    ("module", "command", "arguments"),
    [
        ("export", "ff_export", ["--help"]),
        ("export", "ff_export", ["build", "--help"]),
        ("runtime", "ff_run", ["generate", "--help"]),
        *(
            pytest.param("export", "ff_export", arguments, marks=pytest.mark.slow)
            for arguments in (["families"], ["view", "--help"], ["eval", "--help"])
        ),
        pytest.param("runtime", "ff_run", ["view", "--help"], marks=pytest.mark.slow),
    ],
)
def test_help_needs_no_heavy_package(module: str, command: str, arguments: list[str]) -> None:
    code = f"""
import sys
from framefusion.{module}.commands.cli import {command}
try:
    {command}({arguments})
except SystemExit as done:
    assert not done.code, done
loaded = [name for name in {HEAVY} if name in sys.modules]
assert not loaded, loaded
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stderr


def test_inspect_needs_no_torch(bundle: Path) -> None:
    code = f"""
import sys
from framefusion.export.commands.cli import ff_export
try:
    ff_export(["inspect", {str(bundle)!r}])
except SystemExit as done:
    assert not done.code, done
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=PATIENCE, check=True)


@pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity") or (os.cpu_count() or 1) == 1, reason="no process can be pinned to fewer cores"
)
@pytest.mark.parametrize(("chosen", "threads"), [(None, "1"), ("7", "7")])
def test_torch_hears_of_the_cores_that_there_are_before_it_is_loaded(chosen: str | None, threads: str) -> None:
    """Unless whoever starts the command has said how many threads there are to be."""
    code = """
import os, sys
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
from framefusion.export.commands.cli import main
sys.argv = ["ff-export", "--version"]
try:
    main()
finally:
    print(os.environ["OMP_NUM_THREADS"])
"""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    environment |= {"OMP_NUM_THREADS": chosen} if chosen else {}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == threads


def test_every_build_option_has_its_flag() -> None:
    flags = {parameter.name: parameter.opts for parameter in ff_export.commands["build"].params}
    for other in (
        "checkpoint",
        "output",
        "revision",
        "clips",
        "force",
        "no_check",
        "tolerance",
        "json",
        "questions",
        "max_points_lost",
    ):
        del flags[other]
    for resource in ("jobs", "engine_cache", "engine_cache_limit"):
        del flags[resource]
    names = [field.name for field in dataclasses.fields(BuildOptions) if field.name != "calibrated_by"]  # of the clips
    assert flags == {name: [f"--{name.replace('_', '-')}"] for name in names}


def test_defaults_in_the_help_are_those_of_the_library() -> None:
    texts = {option.name: option.help or "" for option in ff_export.commands["build"].params if hasattr(option, "help")}
    for field in dataclasses.fields(BuildOptions):
        if field.default not in (None, False):
            assert f"default: {field.default}" in texts[field.name]
    assert f"default: {DEFAULT_DEPTH}." in texts["depth"]
    assert f"default: {DEFAULT_INPUT}, or" in texts["max_input_len"]
    assert f"default: {DEFAULT_NEW_TOKENS} beyond" in texts["max_kv_cache_capacity"]


def test_choices_on_the_command_line_are_those_of_the_library() -> None:
    from framefusion.export.graphs.tracing.dialects import DIALECTS

    text = next(parameter for parameter in ff_export.commands["build"].params if parameter.name == "dialect")
    assert isinstance(text, click.Option)
    assert all(name in (text.help or "") for name in DIALECTS)


@pytest.mark.usefixtures("instant_traces")
def test_build_takes_its_flags_and_reports(checkpoint: Path, tmp_path: Path) -> None:
    arguments = ("--cost", 0.6, "--depth", 1, "--max-input-len", 256, "--max-frames", 8, "--buckets", "128,256")
    report = answer(ff_export, "build", checkpoint, "-o", tmp_path / "bundle", "--no-check", *arguments)
    assert report["reduction"]["text"] == "adaptive, keeps 60 %, drops 40 %"
    assert report["check"] is None
    manifest = read_manifest(tmp_path / "bundle")
    assert manifest.options["buckets"] == [128, 256]
    assert manifest.segments[0].buckets == (128, 256)
    assert (manifest.sampling.max_frames, manifest.limits.max_input_len) == (8, 256)


@pytest.mark.parametrize("flags", [("--buckets", "128,x"), ("--max-input-len", "-4"), ("--reduction", "some")])
def test_wrong_flags_are_the_parsers_business(checkpoint: Path, tmp_path: Path, flags: tuple[str, str]) -> None:
    result = invoke(ff_export, "build", checkpoint, "-o", tmp_path / "bundle", *flags)
    assert result.exit_code == 2
    assert flags[0] in result.stderr


def test_check_hashes_and_compares(bundle: Path, checkpoint: Path) -> None:
    report = answer(ff_export, "check", bundle)
    assert report["comparison"] is None
    assert report["files"]["count"] == len(read_manifest(bundle).files)
    text = invoke(ff_export, "check", bundle, "--checkpoint", checkpoint).stdout
    assert "check passed, reference: transformers" in text
    assert "reduced decoded logits" in text


def test_a_failing_comparison_has_its_exit_code(bundle: Path, tmp_path: Path) -> None:
    other = random_checkpoint(tmp_path / "other", seed=1, pixels=112 * 112)
    result = invoke(ff_export, "check", bundle, "--checkpoint", other, "--json")
    assert result.exit_code == CheckFailedError.exit_code
    assert json.loads(result.stdout)["comparison"]["failures"]
    assert "does not reproduce" in result.stderr


def test_inspect_adds_up_to_the_files_on_disk(bundle: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(bundle, tmp_path / "bundle")  # other tests read the shared one meanwhile
    report = answer(ff_export, "inspect", bundle)
    on_disk = sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file() and path.name[0] != ".")
    assert sum(report["bytes"].values()) == on_disk
    for plan in report["memory"].values():
        parts = ("process", "weights", "embedding", "activations", "rows", "caches")
        assert plan["total"] == max(sum(plan[name] for name in parts), plan["vision_peak"])
        assert sum(plan["caches_by_segment"]) == plan["caches"]
    layers = [layer for segment in report["segments"] for layer in segment["attention_layers"]]
    mlps = [layer for segment in report["segments"] for layer in segment["mlp_layers"]]
    assert layers == mlps == list(range(report["model"]["num_layers"]))


def test_inspect_answers_for_a_prompt(bundle: Path) -> None:
    report = answer(ff_export, "inspect", bundle, "--input-len", 300, "--visual-len", 200, "--cost", 0.5)
    last = report["segments"][-1]["kv_length"]
    assert last == {"worst": 300, "expected": 200}
    assert report["reduction"]["text"] == "adaptive, keeps 50 %, drops 50 %"
    text = invoke(ff_export, "inspect", bundle, "--input-len", 300, "--visual-len", 200).stdout
    for word in ("layer00", "rest", "keeps 40 %, drops 60 %", "total", "checked against transformers"):
        assert word in text
    assert invoke(ff_export, "inspect", bundle, "--input-len", 9999).exit_code == 12


@pytest.mark.slow
def test_a_build_says_what_to_type_next_and_that_runs(
    checkpoint: Path, film: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    built = invoke(ff_export, "build", checkpoint, "-o", "it's a bundle", "--no-check", "--depth", 0)
    assert built.exit_code == 0, built.output
    line = next(line for line in built.stderr.splitlines() if line.startswith("next: "))
    program, *arguments = shlex.split(line.removeprefix("next: "))
    assert program == "ff-run"
    (tmp_path / "clip.mp4").symlink_to(film)
    assert invoke(ff_run, *arguments).exit_code == 0
    assert "next" not in invoke(ff_export, "build", checkpoint, "-o", "b", "--no-check", "--depth", 0, "--json").stderr


def test_padding_of_buckets() -> None:
    rows = padding((8, 16))
    assert [(row["first"], row["last"]) for row in rows] == [(1, 8), (9, 16)]
    assert rows[1]["worst"] == 7 / 16
    assert rows[1]["expected"] == sum(16 - length for length in range(9, 17)) / 8 / 16


def test_families_lists_the_table() -> None:
    rows = answer(ff_export, "families")["families"]
    assert "qwen2_vl" in [row["name"] for row in rows]
    assert all(row["architectures"] and row["checkpoints"] and row["verified"] for row in rows)
    text = invoke(ff_export, "families").stdout
    assert max(map(len, text.splitlines())) <= WIDEST
    shown = {word.strip(",") for word in text.split()}
    assert {name for row in rows for name in (row["name"], *row["architectures"], *row["checkpoints"])} <= shown
    assert " ".join(rows[0]["verified"].split()) in " ".join(text.split())


def test_generate_streams_text_and_sums_up(bundle: Path, film: Path) -> None:
    question = ("--video", film, "--prompt", "What?", "--max-new-tokens", 4)
    result = invoke(ff_run, "generate", bundle, *question, "--verbose")
    assert result.exit_code == 0, result.output
    for word in ("backend: ", "prompt: ", "call 0: ", "keeps", "drops", "prefill", "tokens/s"):
        assert word in result.stderr
    report = answer(ff_run, "generate", bundle, "--video", film, "--prompt", "What?", "--max-new-tokens", 4)
    assert report["text"] + "\n" == result.stdout
    assert {"video", "preprocess", "vision", "prefill", "reduction", "decode"} <= set(report["seconds"])
    assert {"call", "kind", "tokens_before", "tokens_after"} <= set(report["reduction"][0])
    assert report["cost"]["reached"] == pytest.approx(0.4, abs=0.02)


def test_videos_and_images_keep_their_order() -> None:
    paths = [Path(name) for name in "abc"]
    ordered = visuals_in_order(["image", "video", "image"], [paths[1]], [paths[0], paths[2]])
    assert ordered == [("image", paths[0]), ("video", paths[1]), ("image", paths[2])]


def test_both_orders_run(bundle: Path, film: Path, picture: Path) -> None:
    shared = ("--prompt", "What?", "--max-new-tokens", 1)
    first = answer(ff_run, "generate", bundle, "--image", picture, "--video", film, *shared)
    second = answer(ff_run, "generate", bundle, "--video", film, f"--image={picture}", *shared)
    assert first["visual_tokens"] == second["visual_tokens"]


@pytest.mark.parametrize(
    ("flags", "order"),
    [
        (("-i", "a", "--video=b", "-vc", "--image", "d"), ["image", "video", "video", "image"]),
        (("--system", "--image", "--video", "--image"), ["video"]),
        (("-v", "-i", "-i", "-v"), ["video", "image"]),
    ],
)
def test_the_order_is_the_parsers(flags: tuple[str, ...], order: list[str]) -> None:
    """Short flags, values that look like flags, and values in the same word."""
    with click.Context(ff_run.commands["generate"]) as ctx:
        ctx.command.parse_args(ctx, [*flags, "-p", "What?", "bundle"])
        assert ctx.meta["framefusion.order"] == order


def test_tables_and_units() -> None:
    assert console.table(("name", "size"), [("a", 1), ("bb", 22)]).splitlines() == [
        "name  size", "----  ----", "a        1", "bb      22",
    ]  # fmt: skip
    assert [console.in_bytes(size) for size in (999, 1000, 1234567, 5e12)] == ["999 B", "1 kB", "1.23 MB", "5000 GB"]


def test_inspect_tells_the_static_lengths_of_a_fixed_bundle(
    checkpoint: Path, tmp_path: Path, instant_traces: None
) -> None:
    options = BuildOptions(
        reduction="fixed", cost=0.5, merge_shares=(0.3,), prune_layer=1, max_input_len=160, max_text_len=60
    )
    folder = build(Checkpoint(checkpoint), tmp_path / "fixed", options, verify=False).folder
    facts = report(folder, PromptSize())
    assert facts["fixed"]["lengths"][0] == 160 - 30  # 30 % of 100 visual tokens are merged before layer 0
    text = render(facts)
    assert "call 0 merges 30.0%" in text
    assert f"{facts['fixed']['lengths'][-1]}" in text


def test_what_is_imported_for_an_error_alone_is_not_imported_at_the_start() -> None:
    """Each of them takes ten milliseconds or more of every command, and of `from framefusion import Pipeline`."""
    slow = ("asyncio", "importlib.metadata", "urllib.request", "rich")
    code = "import sys; from framefusion.runtime.commands.cli import ff_run; from framefusion.console import progress;"
    code += f"print([name for name in {slow} if name in sys.modules])"
    done = subprocess.run((sys.executable, "-c", code), capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
