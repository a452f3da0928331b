"""ff-export: a checkpoint to a bundle, and what there is to know about one. Only the list of its commands.

A command lies in the module of its subject. torch and its kin are imported by the commands that need them, so that
help, `inspect` and `families` run without.
"""

from __future__ import annotations

import click

import framefusion
from framefusion.console import messages as console
from framefusion.console.help import HELP_NAMES
from framefusion.export.commands.build import build_command, compile_command, plan_command
from framefusion.export.commands.check import check_command, sign_command
from framefusion.export.commands.evaluate import evaluate_command, view_command
from framefusion.export.commands.report import families_command, inspect_command


@click.group(cls=console.CommandGroup, context_settings=HELP_NAMES)
@click.version_option(framefusion.__version__, "--version", "-V")
def ff_export() -> None:
    """Export a video LVLM with token reduction inside its LLM."""


for _command in (
    *(build_command, plan_command, compile_command, check_command, sign_command),
    *(inspect_command, view_command, evaluate_command, families_command),
):
    ff_export.add_command(_command)


def main() -> None:
    """Entry point."""
    ff_export(prog_name="ff-export")
