"""Attacks on the user's files: things of other people's where our commands write, under names like ours.

Whatever a command does and however it ends, every foreign byte, link and FIFO has to stand as it stood.
"""

from __future__ import annotations

import os
import random
import shutil
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from framefusion.errors import FrameFusionError
from framefusion.export.evaluate.answer_file import AnswerFile
from framefusion.export.evaluate.answering import Answer, Condition
from framefusion.export.writing import journal
from framefusion.runtime.format.manifest import FileRecord
from framefusion.runtime.format.manifest_file import read_manifest, write_manifest
from framefusion.runtime.view.page import write_page
from tools.attack.command import call, fault_of
from tools.attack.endings import draw_ending, run_until
from tools.attack.harness import Fault, World

NAMES = (
    "letter.txt", "manifest.json", "manifest.json.new", "journal.json", "journal.json.new", ".lock", ".writing",
    ".writing/manifest.json", ".writing/letter", "README.md", "SHA256SUMS", ".verified.json", "embedding.bin",
    "tokenizer.json", "segments", "segments/rest/weights.bin", "segments/rest/notes", "segments/mine/weights.bin",
    "engines", "engines/tensorrt-rtx/report.json", "engines/tensorrt-rtx/notes", "vision/graph.onnx", ".check-abc/x",
    "signatures.json", "LICENSE",
)  # fmt: skip
"""Within a folder that a command may take for its own."""
BESIDE = ("o", "o.partial", "o.old", "o.old-0123456789ab", "o.new", "out.json", "out.json.partial", "out.json.fresh",
          "page.html", "page.html.new", ".framefusion-0123456789ab")  # fmt: skip
EVIL = ("../outside/precious", "engines/x/../../../outside/precious", "segments/../../outside/precious", "/no/such",
        "./embedding.bin", "o/../../outside/precious", "..", "", "segments//x", "link/precious")  # fmt: skip

EVENTS = {"compile": 60}  # writes of a command, about

State = tuple[str, bytes]


def attack(rng: random.Random, world: World, folder: Path) -> Fault | None:
    """One command, or two, where things of other people's stand."""
    ours = plant(rng, world, folder)
    before = {path: state for path, state in snapshot(folder).items() if path not in ours}
    was_bundle = journal.valid_manifest(folder / "o") is not None
    history = []
    for _ in range(rng.choice((1, 2))):
        name, command = draw_command(rng, world, folder)
        ending = draw_ending(rng, world.events if name.startswith("build") else EVENTS.get(name, 8))
        history.append(f"{name} until {ending.kind} at {ending.at}")
        end = run_until(command, ending)
        fault = fault_of(end, " then ".join(history))
        lost = missing(before, snapshot(folder))
        if lost:
            return Fault("lost", f"{' then '.join(history)}: {lost[:4]}; {end.result}")
        if fault is not None:
            return fault
        if was_bundle and journal.valid_manifest(folder / "o") is None:
            return Fault("lost", f"{' then '.join(history)}: no bundle has the name")
    return None


def plant(rng: random.Random, world: World, folder: Path) -> set[str]:
    """Put things into the folder; returns the names of those that are ours."""
    (folder / "outside").mkdir()
    (folder / "outside" / "precious").write_bytes(rng.randbytes(20))
    ours: set[str] = set()
    if rng.random() < 0.6:
        _copy(world.compiled if world.compiled and rng.random() < 0.5 else world.reference, folder / "o", ours, folder)
        if rng.random() < 0.2:
            _name_elsewhere(rng, folder / "o")
    if rng.random() < 0.2:
        _copy(world.reference, folder / "o.partial", set(), folder)  # a bundle of the user's that has this name
    for _ in range(rng.choice((0, 1, 1, 2, 4))):
        _put(rng, folder, folder / rng.choice(BESIDE))
    for _ in range(rng.choice((0, 1, 1, 3))):
        _put(rng, folder, folder / rng.choice(("o", "o.partial", "outside")) / rng.choice(NAMES))
    return {name for name in ours if os.path.lexists(folder / name)}


def _copy(source: Path, target: Path, ours: set[str], folder: Path) -> None:
    shutil.copytree(source, target)
    ours |= {str(path.relative_to(folder)) for path in (target, *target.rglob("*"))}


def _name_elsewhere(rng: random.Random, bundle: Path) -> None:
    """A manifest that names files of other people's."""
    manifest = read_manifest(bundle)
    files = dict(manifest.files)
    files[rng.choice(EVIL)] = FileRecord(20, "0" * 64)
    if rng.random() < 0.5:
        (bundle / "link").symlink_to("../outside")
    try:
        write_manifest(bundle, replace(manifest, files=files))
    except FrameFusionError:
        return


def _put(rng: random.Random, folder: Path, path: Path) -> None:
    """A file, folder, link or FIFO, unless something is in the way."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        kind = rng.choice(("file", "file", "file", "folder", "link", "link to a folder", "dangling", "fifo", "hard"))
        if kind == "file":
            with path.open("xb") as file:
                file.write(
                    rng.choice((b"Dear", b"", b"{}", b'{"journal": 1}\n', b"line\nand half", rng.randbytes(300)))
                )
        elif kind == "folder":
            path.mkdir()
            (path / "letter").write_bytes(b"Dear")
        elif kind == "link":
            path.symlink_to(folder / "outside" / "precious")
        elif kind == "link to a folder":
            path.symlink_to(folder / "outside")
        elif kind == "dangling":
            path.symlink_to("nowhere")
        elif kind == "fifo":
            os.mkfifo(path)
        else:
            os.link(folder / "outside" / "precious", path)
    except OSError:
        return


def snapshot(folder: Path) -> dict[str, State]:
    """All that is in a folder: what it is, and its bytes."""
    states: dict[str, State] = {}
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = os.path.join(place, name)
            mode = os.lstat(path).st_mode
            if stat.S_ISLNK(mode):
                state = "link", os.fsencode(os.readlink(path))
            elif stat.S_ISREG(mode):
                state = "file", Path(path).read_bytes()
            elif stat.S_ISDIR(mode):
                continue
            else:
                state = "special", b""
            states[os.path.relpath(path, folder)] = state
    return states


def missing(before: dict[str, State], after: dict[str, State]) -> list[str]:
    """What does not stand as it stood."""
    return [name for name, state in before.items() if state[1] and after.get(name) != state]


def draw_command(rng: random.Random, world: World, folder: Path) -> tuple[str, Callable[[], Any]]:
    """Any command that writes."""
    output = str(folder / rng.choice(("o", "o", "o", "o", "o/../o", "outside/o", "o.partial", ".", "o/inner")))
    build = ["build", str(world.checkpoint), "-o", output, "--no-check"]
    commands: list[tuple[str, Callable[[], Any]]] = [
        ("build", lambda: call("ff-export", build)),
        ("build --force", lambda: call("ff-export", [*build, "--force"])),
        ("eval", lambda: evaluation(folder / "out.json")),
        ("view", lambda: page(folder / "page.html")),
        ("check", lambda: call("ff-export", ["check", str(folder / "o")])),
    ]
    if world.cache is not None:
        compiling = ["compile", str(folder / "o"), "--backend", "tensorrt-rtx", "--target-sm", "86"]
        commands.append(("compile", lambda: call("ff-export", [*compiling, "--engine-cache", str(world.cache)])))
    return rng.choice(commands)


def evaluation(output: Path) -> list[Any]:
    """What an evaluation writes, without a model."""
    condition = Condition("framefusion", 0.3)
    answer = Answer("yes", 0.3, 9, 4)
    try:
        with AnswerFile(output, {"model": "0" * 64, "setup": {}}) as kept:
            for question in map(str, range(4)):
                if kept.missing(question, [condition]):
                    kept.opened("engine", None)
                    kept.add(question, [condition], [answer])
            kept.finish({"right": 4})
    except FrameFusionError as error:
        return [error.exit_code, [f"error: {error}"], ""]
    except KeyboardInterrupt:
        return [130, ["error: interrupted"], ""]
    return [0, [], ""]


def page(output: Path) -> list[Any]:
    """What `view` writes, without a model."""
    try:
        write_page({"name": "bundle", "pictures": "x" * 5000}, output)
    except FrameFusionError as error:
        return [error.exit_code, [f"error: {error}"], ""]
    except KeyboardInterrupt:
        return [130, ["error: interrupted"], ""]
    return [0, [], ""]
