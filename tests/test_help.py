"""What `--help` says: of both programs and every command, for somebody who reads it on a terminal of 80 columns."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import framefusion
from framefusion.console.help import GENERAL, Command, Group, Option
from framefusion.export.commands.cli import ff_export
from framefusion.runtime.commands.cli import ff_run
from tests.wheel import ROOT

PROGRAMS: dict[str, Group] = {"ff-run": ff_run, "ff-export": ff_export}
COMMANDS = [(program, name) for program, group in PROGRAMS.items() for name in group.commands]
MANY = 10  # options that a list without sections may have


def help_of(program: str, *names: str) -> str:
    result = CliRunner().invoke(PROGRAMS[program], [*names, "--help"], prog_name=program, terminal_width=80)
    assert result.exit_code == 0, result.output
    return result.stdout


def options_of(program: str, name: str) -> list[click.Option]:
    return [option for option in PROGRAMS[program].commands[name].params if isinstance(option, click.Option)]


@pytest.mark.parametrize(("program", "name"), COMMANDS)
def test_a_command_says_all_in_80_columns(program: str, name: str) -> None:
    """Sections where there are many options, a sentence for each with its default, and an example at the end."""
    command = PROGRAMS[program].commands[name]
    assert isinstance(command, Command), "say cls=Command, of framefusion.console.help"
    text = help_of(program, name)
    wide = [line for line in text.splitlines() if len(line) > 80]
    assert not wide, wide
    assert command.examples, "a command has an example"
    for option in options_of(program, name):
        assert isinstance(option, Option), f"{option.opts}: say option(...), of framefusion.console.help"
        said = option.get_help_record(click.Context(command))
        assert said is not None
        sentence = said[1]
        assert re.match(r"[A-Z0-9-]", sentence), said
        assert len(re.split(r"[.;\[]", sentence)[0].split()) >= 3, f"what is {said[0]}? {sentence!r}"
        silent = option.is_flag or option.required or "must be given" in sentence
        assert silent or option.multiple or "default: " in sentence, f"what is the default of {said[0]}?"
    if len(command.params) > MANY:
        general = [option.name for option in options_of(program, name) if getattr(option, "section", "") == GENERAL]
        assert len(general) <= MANY, f"give sections to {general}"


@pytest.mark.parametrize(("program", "name"), COMMANDS)
def test_examples_are_taken_by_the_parser(program: str, name: str) -> None:
    command = PROGRAMS[program].commands[name]
    assert isinstance(command, Command)
    begun = 0
    for example in command.examples:
        assert len(example) <= 78
        words = shlex.split(example.partition(" > ")[0].rpartition(" | ")[2])
        if words[0] not in PROGRAMS:  # such as curl
            continue
        begun += 1
        group = PROGRAMS[words[0]]
        group.commands[words[1]].make_context(words[1], words[2:], parent=click.Context(group, info_name=words[0]))
        assert (words[0], words[1]) == (program, name)
    assert begun


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_lists_its_commands_whole(program: str) -> None:
    group = PROGRAMS[program]
    text = help_of(program)
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "..." not in text.replace("[ARGS]...", "")
    shown = [match[1] for line in text.splitlines() if (match := re.match(r"  ([a-z]+)  ", line))]
    assert shown == list(group.commands)
    for example in group.examples:
        words = shlex.split(example)
        assert words[1] in PROGRAMS[words[0]].commands
    short = CliRunner().invoke(group, ["-h"], prog_name=program, terminal_width=80)
    assert short.stdout == text
    assert (
        CliRunner().invoke(group, ["-V"], prog_name=program).stdout == f"{program}, version {framefusion.__version__}\n"
    )


@pytest.mark.parametrize(("program", "name"), COMMANDS)
def test_short_flags_mean_one_thing_everywhere(program: str, name: str) -> None:
    long = {"-v": "--video", "-i": "--image", "-p": "--prompt", "-n": "--max-new-tokens", "-t": "--temperature"}
    long |= {"-o": "--output", "-q": "--quiet"}
    for option in options_of(program, name):
        for short in (flag for flag in option.opts if len(flag) == 2):
            assert long[short] in option.opts
        for flag, whole in long.items():
            assert (whole not in option.opts) or flag in option.opts, f"{program} {name} {whole} has no {flag}"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="bash completes")
def test_bash_completes_commands_flags_choices_and_files(tmp_path: Path) -> None:
    """As docs/using.md says it is set up, by bash itself."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for program, function in (("ff-run", "ff_run"), ("ff-export", "ff_export")):
        script = folder / program
        script.write_text(
            f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(ROOT)!r})\n"
            f"from framefusion.start import {function}\n{function}()\n"
        )
        script.chmod(0o755)
    (tmp_path / "clip.mp4").write_bytes(b"")
    session = """
        eval "$(_FF_RUN_COMPLETE=bash_source ff-run)"
        eval "$(_FF_EXPORT_COMPLETE=bash_source ff-export)"
        complete_line() {
            COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()
            "_${1//-/_}_completion" "$1" && echo "${COMPREPLY[@]}"
        }
        complete_line ff-run gen
        complete_line ff-run generate --backend onnx
        complete_line ff-run generate bundle --max-new
        complete_line ff-export build checkpoint --red
        complete_line ff-export ch
    """
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}
    shell = ["bash", "--norc", "-c", session]
    done = subprocess.run(shell, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split() == [
        "generate", "onnxruntime", "--max-new-tokens", "--reduction", "--reducer", "check",
    ], done  # fmt: skip
