"""Attacks on the command line: any command with flags and values that nobody would give, or that somebody might."""

from __future__ import annotations

import os
import random
from pathlib import Path

import click

from tools.attack.command import call, fault_of
from tools.attack.endings import Ending, run_until
from tools.attack.harness import Fault, World

NUMBERS = ("0", "1", "2", "-1", "0.3", "1.0", "1e309", "-1e309", "nan", "inf", "-inf", "1e-300", "9" * 30, "0x10",
           "1_0", "", " ", "2147483648", "9223372036854775808", "512", "65536", "--", "²")  # fmt: skip
TEXTS = ("", " ", "What?", "\x1b[2J\x1b[31m", "a\x00b", "ä" * 300, "a" * 70_000, "<|im_end|>", "\udcff", "‮", "{0}%s",
         "../../etc/passwd", "-", "--help", "auto", "\n" * 50)  # fmt: skip
_SLOW = frozenset({"jobs"})  # a process with torch each
_HELP = 0.05


def attack(rng: random.Random, world: World, folder: Path) -> Fault | None:
    """One command line."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    program = rng.choice(("ff-run", "ff-export", "ff-export"))
    arguments = draw_command_line(rng, program, world, folder)
    end = run_until(lambda: call(program, arguments), Ending("end"))
    return fault_of(end, f"{program} {arguments!r:.1500}")


def draw_command_line(rng: random.Random, program: str, world: World, folder: Path) -> list[str]:
    """A command, what it must have, and some of its options; values fit sometimes."""
    group = _group(program)
    command = group.commands[rng.choice(sorted(group.commands))]
    arguments = [str(command.name)]
    for parameter in command.params:
        wanted = parameter.required or isinstance(parameter, click.Argument)
        if rng.random() > (0.95 if wanted else 0.15) or parameter.name in _SLOW:
            continue
        if isinstance(parameter, click.Option) and parameter.is_flag:
            arguments.append(parameter.opts[0])
            continue
        value = draw_value(rng, parameter, world, folder).replace("\0", "")
        arguments += [value] if isinstance(parameter, click.Argument) else [f"{parameter.opts[0]}={value}"]
    if rng.random() < _HELP:
        arguments.append(rng.choice(("--help", "--nonsense", "extra", "-")))
    return arguments


def draw_value(rng: random.Random, parameter: click.Parameter, world: World, folder: Path) -> str:
    """A value for a parameter: of its type mostly."""
    if isinstance(parameter.type, click.Choice) and rng.random() < 0.8:
        return rng.choice([str(choice) for choice in parameter.type.choices])
    names_file = isinstance(parameter.type, click.Path) or isinstance(parameter, click.Argument)
    if names_file and rng.random() < 0.95:
        return str(draw_path(rng, parameter, world, folder))
    if isinstance(parameter.type, (click.types.FloatParamType, click.types.IntParamType)) and rng.random() < 0.9:
        return rng.choice(NUMBERS)
    return rng.choice((*NUMBERS, *TEXTS))


def draw_path(rng: random.Random, parameter: click.Parameter, world: World, folder: Path) -> Path:
    """A place: mostly one of the kind that is wanted."""
    if parameter.name == "output":
        return folder / rng.choice(("new", "new", "new", "none/new", "there", "a" * 300, ".", "link", "fifo"))
    wanted = {
        "checkpoint": world.checkpoint, "bundle": world.bundle, "model": rng.choice((world.bundle, world.checkpoint)),
        "videos": world.film, "images": world.picture, "clips": world.film,
    }  # fmt: skip
    if parameter.name in wanted and rng.random() < 0.75:
        return wanted[parameter.name]
    (folder / "there").mkdir(exist_ok=True)
    (folder / "text").write_text("words\n" * 10)
    for name, target in (("link", "text"), ("circle", "circle")):
        if not os.path.lexists(folder / name):
            (folder / name).symlink_to(target)
    if not os.path.lexists(folder / "fifo"):
        os.mkfifo(folder / "fifo")
    names = ("there", "text", "link", "circle", "fifo", "nothing", "text/inside", "a" * 300, "\x1b[31m")
    places = [folder / name for name in names]
    return rng.choice([*places, world.checkpoint, world.bundle, world.film, Path("/dev/null"), Path("/"), Path("")])


def _group(program: str) -> click.Group:
    if program == "ff-run":
        from framefusion.runtime.commands.cli import ff_run

        return ff_run
    from framefusion.export.commands.cli import ff_export

    return ff_export
