"""ff-export: a checkpoint to a bundle, and what there is to know about one. Only the list of its commands.

A command lies in the module of its subject. torch and its kin are imported by the commands that need them, so that
help, `inspect` and `families` run without.
"""

from __future__ import annotations

import os

import click

import framefusion
from framefusion.console import messages as console
from framefusion.export.commands.build import build_command, compile_command, plan_command
from framefusion.export.commands.check import check_command, inputs_command, sign_command
from framefusion.export.commands.evaluate import compare_command, evaluate_command, view_command
from framefusion.export.commands.report import families_command, inspect_command
from framefusion.runtime.machine.cpu import default_threads


@click.group(
    cls=console.CommandGroup,
    examples=(
        "ff-export plan path/to/Qwen2-VL-2B-Instruct -o bundle",
        "ff-export build path/to/Qwen2-VL-2B-Instruct -o bundle",
        "ff-run generate bundle --video clip.mp4 --prompt 'What happens?'",
    ),
)
@click.version_option(framefusion.__version__, "--version", "-V")
def ff_export() -> None:
    """Compile a video LVLM ahead of time, with token reduction inside its LLM, to a bundle that ff-run answers with."""


for _command in (
    *(build_command, plan_command, compile_command, check_command, sign_command),
    inputs_command,
    *(inspect_command, view_command, evaluate_command, compare_command, families_command),
):
    ff_export.add_command(_command)


def main() -> None:
    """Entry point."""
    if threads := default_threads():
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # before torch is loaded, here or in a child
    ff_export(prog_name="ff-export")
