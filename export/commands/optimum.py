"""`optimum-cli export framefusion`: what `ff-export build` does, with its flags under optimum's parser.

optimum finds the commands of other packages in its namespace package optimum.commands.register; our module there names
the class below. Each flag is made from the parameter of `ff-export build`, which also parses it: only optimum's
spellings are added here.
"""

from __future__ import annotations

from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Iterator
from typing import Any

import click
from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from framefusion.export.commands.cli import ff_export

PROGRAM = "optimum-cli export framefusion"
SPELLINGS = {"tolerance": ("--atol",)}  # parameter of `ff-export build` -> further names that optimum has for it
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
DEVICE = "cpu"


class FrameFusionExportCommand(BaseOptimumCLICommand):  # type: ignore[misc]  # optimum brings no types
    """`ff-export build` as a command of optimum-cli."""

    COMMAND = CommandInfo(name="framefusion", help="Export a video LVLM with token reduction inside its LLM.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Declare the arguments."""
        add_arguments(parser)

    def run(self) -> None:
        """Build, check and report; leaves the process with ff-export's exit codes."""
        ff_export.main(command_line(self.args), prog_name=PROGRAM)


def add_arguments(parser: ArgumentParser) -> None:
    """Optimum's own arguments, then one for each option of `ff-export build`."""
    required = parser.add_argument_group("Required arguments")
    required.add_argument("-m", "--model", required=True, help="Folder of the checkpoint, or its id on the hub.")
    required.add_argument("output", help="Folder of the bundle.")
    optional = parser.add_argument_group("Optional arguments")
    optional.add_argument("--device", type=_device, default=DEVICE, help=f"Where to export: only {DEVICE}.")
    for option in build_options():
        names = (*option.opts, *SPELLINGS.get(str(option.name), ()))
        optional.add_argument(*names, dest=option.name, help=(option.help or "").replace("%", "%%"), **_kind(option))


def build_options() -> Iterator[click.Option]:
    """Options of `ff-export build`, output and device left out: optimum has arguments of its own for them."""
    for parameter in ff_export.commands["build"].params:
        if isinstance(parameter, click.Option) and parameter.name not in ("output", "device"):
            yield parameter


def command_line(given: Namespace) -> list[str]:
    """Optimum's namespace of flags as arguments of `ff-export`."""
    arguments = ["build", given.model, "-o", given.output]
    for option in build_options():
        value = getattr(given, str(option.name))
        name = option.opts[0]
        if option.is_flag:
            arguments += [name] if value else []
        elif value is not None:
            values = value if option.multiple else [value]
            arguments += [f"{name}={item}" for item in values]
    return arguments


def _kind(option: click.Option) -> dict[str, Any]:
    """How argparse takes an option: values stay text, because `ff-export build` converts them."""
    if option.is_flag:
        return {"action": "store_true"}
    metavar = option.type.name.upper().removesuffix(" RANGE")
    if isinstance(option.type, click.Choice):
        choices = list(option.type.choices)
        choices += [short for short, name in DTYPES.items() if option.name == "dtype" and name in choices]
        metavar = "{" + ",".join(choices) + "}"
    return {"action": "append" if option.multiple else "store", "type": _checked(option), "metavar": metavar}


def _checked(option: click.Option) -> Callable[[str], str]:
    """Refuse what `ff-export build` would, but with optimum's usage line."""

    def check(text: str) -> str:
        value = DTYPES.get(text, text) if option.name == "dtype" else text
        try:
            option.type.convert(value, option, None)
        except click.BadParameter as error:
            raise ArgumentTypeError(error.message) from None
        return value

    return check


def _device(name: str) -> str:
    if name != DEVICE:
        raise ArgumentTypeError(f"{name!r} is not supported, an export runs on the {DEVICE}: leave --device out")
    return name
