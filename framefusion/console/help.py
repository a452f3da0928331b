"""Help texts: options in sections, an example at the end, and nothing wider than a terminal of 80 columns.

Knows no command. A default is said where the option is declared: by its value, or by where the value comes from.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import click

GENERAL = "Options"
HELP_NAMES = {"help_option_names": ["-h", "--help"]}
_INDENT = "  "
_COLUMN = 29  # where the texts of options begin
_NARROW = 17  # and those of commands
_PLACEHOLDERS: tuple[tuple[type, str], ...] = (
    (click.types.IntParamType, "N"),
    (click.types.FloatParamType, "X"),
    (click.Path, "FILE"),
)


class Option(click.Option):
    """An option that stands in a section of the help; numbers are N and X there, and files FILE."""

    def __init__(self, *declarations: Any, section: str = GENERAL, **settings: Any) -> None:
        self.section = section
        super().__init__(*declarations, **settings)
        if self.metavar is None and not self.is_flag and not self.count:
            self.metavar = next((name for kind, name in _PLACEHOLDERS if isinstance(self.type, kind)), None)


class Command(click.Command):
    """A command whose help has its options in sections, in the order of their first option, and examples below.

    Args:
        examples: command lines to copy, without a prompt; none is wrapped.
    """

    def __init__(self, *arguments: Any, examples: Sequence[str] = (), **settings: Any) -> None:
        self.examples = tuple(examples)
        settings["context_settings"] = HELP_NAMES | (settings.get("context_settings") or {})
        super().__init__(*arguments, **settings)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, section by section: those of no section first, --help at the end."""
        sections: dict[str, list[tuple[str, str]]] = {GENERAL: []}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx) if isinstance(parameter, click.Option) else None
            if record is not None:
                title = "Help" if parameter.name == "help" else getattr(parameter, "section", GENERAL)
                sections.setdefault(title, []).append(record)
        for title, rows in sections.items():
            if rows:
                with formatter.section(title):
                    write_rows(rows, formatter)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples as they are to be typed."""
        write_examples(self.examples, formatter)
        super().format_epilog(ctx, formatter)


class Group(click.Group):
    """Commands in the order in which they are added, each with the whole of its first sentence."""

    command_class = Command

    def __init__(self, *arguments: Any, examples: Sequence[str] = (), **settings: Any) -> None:
        self.examples = tuple(examples)
        settings["context_settings"] = HELP_NAMES | (settings.get("context_settings") or {})
        super().__init__(*arguments, **settings)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of the commands, not sorted."""
        return list(self.commands)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands, then the options of the program itself."""
        with formatter.section("Commands"):
            rows = [(name, command.get_short_help_str(1000)) for name, command in self.commands.items()]
            write_rows(rows, formatter, column=_NARROW)
        records = [parameter.get_help_record(ctx) for parameter in self.get_params(ctx)]
        with formatter.section("Options"):
            write_rows([record for record in records if record is not None], formatter, column=_NARROW)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples, and where more is said."""
        write_examples(self.examples, formatter)
        formatter.write_paragraph()
        formatter.write(f"{ctx.command_path} COMMAND --help says every flag of a command.\n")


def write_rows(rows: Sequence[tuple[str, str]], formatter: click.HelpFormatter, column: int = _COLUMN) -> None:
    """Names and their texts in two columns, the same in every section; no word is parted, be it a flag with hyphens."""
    gap = " " * column
    for name, text in rows:
        lines = textwrap.wrap(
            text, formatter.width, initial_indent=gap, subsequent_indent=gap, break_on_hyphens=False,
            break_long_words=False,
        )  # fmt: skip
        label = _INDENT + name
        if lines and len(label) < column - 1:
            lines[0] = label.ljust(column) + lines[0].lstrip()
        else:
            lines.insert(0, label)
        formatter.write("\n".join(lines) + "\n")


def write_examples(examples: Sequence[str], formatter: click.HelpFormatter) -> None:
    """A section of lines that are not wrapped."""
    if not examples:
        return
    with formatter.section("Example" if len(examples) == 1 else "Examples"):
        formatter.write("".join(f"{_INDENT}{line}\n" for line in examples))


def sectioned(section: str, *options: Callable[[Any], Any]) -> tuple[Callable[[Any], Any], ...]:
    """Options that another command has elsewhere, in a section of the help."""

    def moved(add: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def add_to(command: Any) -> Any:
            command = add(command)
            parameters: list[Any] = getattr(command, "__click_params__", None) or command.params
            parameters[-1].section = section
            return command

        return add_to

    return tuple(moved(add) for add in options)


def option(*declarations: str, section: str = GENERAL, **settings: Any) -> Callable[[Any], Any]:
    """`click.option` in a section of the help."""
    return click.option(*declarations, cls=Option, section=section, **settings)
