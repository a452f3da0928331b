"""What the pages show can be run: how blocks and output are read, and that commands and flags in sentences exist.

`make documented` runs the blocks themselves.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from framefusion.export.commands.cli import ff_export
from framefusion.runtime.commands.cli import ff_run
from tools.documented.folder import builds_its_bundle
from tools.documented.output import missing_line
from tools.documented.pages import Block, Command, PageError, blocks_of, pages

GROUPS = {"ff-export": ff_export, "ff-run": ff_run}


def page(tmp_path: Path, text: str) -> list[Block]:
    (tmp_path / "page.md").write_text(text, encoding="utf-8")
    return blocks_of(tmp_path / "page.md", tmp_path)


def test_blocks_have_their_lines_commands_and_reasons(tmp_path: Path) -> None:
    text = "# A page\n\n```shell\n# first\nls \\\n  -l\npwd  # second\n```\n\n<!-- not run: no GPU -->\n\n"
    text += "   ```console\n   $ cat a\n   b\n\n   $ cat c\n   ```\n\n```text\nx\n```\n"
    first, second, third = page(tmp_path, text)
    assert first.commands() == [Command("ls \\\n  -l"), Command("pwd  # second")]
    assert (first.place, first.reason) == ("page.md:3", None)
    assert second.commands() == [Command("cat a", ("b",)), Command("cat c")]
    assert second.reason == "no GPU"
    assert (third.language, third.reason) == ("text", None)


@pytest.mark.parametrize(
    "text",
    [
        "```shell\nls\n",
        "```sh\nls\n```\n",
        "```\nls\n```\n",
        "    ff-run check bundle\n",
        "<!-- not run: why -->\n\nA sentence.\n\n```shell\nls\n```\n",
        "<!-- not run: why -->\n",
    ],
)
def test_what_would_silently_not_be_run_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(PageError):
        page(tmp_path, text)


def test_every_page_can_be_read_and_most_of_what_it_shows_is_run() -> None:
    runnable = [
        block for path in pages() for block in blocks_of(path) if block.language in ("shell", "console", "python")
    ]
    assert sum(block.reason is None for block in runnable) >= 25
    assert [block.place for block in runnable if block.reason is not None and len(block.reason) < 8] == []


@pytest.mark.parametrize(
    ("shown", "printed"),
    [
        ("285 -> 106 tokens", "call 0: merge, 285 -> 106 tokens (keeps)"),
        ("bundle: 13 MB, done in 3 s", "bundle: 12.8 MB, done in 14 s"),
        ("logits    6.02e-07  0.0001", "logits  4e-07     0.0001"),
        ("of 29.5 MB, transformers 5.24.0", "of 1,029 MB, transformers\n5.23.1 here"),
        ("...", ""),
    ],
)
def test_output_that_says_the_same_is_accepted(shown: str, printed: str) -> None:
    assert missing_line([shown], printed) is None


@pytest.mark.parametrize(
    ("shown", "printed"),
    [
        ("285 -> 106 tokens", "285 -> 107 tokens"),
        ("left", "leftover"),
        ("check passed", "check failed"),
        ("error 0", "error 10"),
        ("-3.5", "nothing"),
    ],
)
def test_output_that_says_something_else_is_not(shown: str, printed: str) -> None:
    assert missing_line([shown], printed) == shown


def test_lines_come_in_their_order() -> None:
    assert missing_line(["one", "two"], "one and two") is None
    assert missing_line(["two", "one"], "one and two") == "one"


def test_a_page_that_builds_its_bundle_begins_without_one() -> None:
    build = Block("p", 1, "shell", ("ff-export build CHECKPOINT \\", "  -o bundle", "ff-run chat bundle"))
    later = Block("p", 1, "shell", ("ff-run chat bundle", "ff-export build CHECKPOINT -o bundle"))
    other = Block("p", 1, "shell", ("ff-export build CHECKPOINT -o rtx-bundle", "ff-run chat bundle"))
    assert [builds_its_bundle([block]) for block in (build, later, other)] == [True, False, False]


def commands_of(path: Path) -> list[str]:
    """The commands of this package that a page names, in sentences and in blocks."""
    text = path.read_text(encoding="utf-8")
    sentences = re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL)
    spans = [" ".join(span.split()) for span in re.findall(r"`((?:ff-export|ff-run) [^`]+)`", sentences)]
    blocks = [block for block in blocks_of(path) if block.language in ("shell", "console")]
    commands = [re.sub(r"\\\n", " ", command.text) for block in blocks for command in block.commands()]
    return spans + [command for command in commands if command.startswith(("ff-export ", "ff-run "))]


def unknown_part(command: str) -> str | None:
    """The first word that is no command or flag of ours."""
    program, *rest = re.sub(r"(?<!\S)#.*|'[^']*'|\"[^\"]*\"", "", command).split()
    group = GROUPS[program]
    names = [word for word in rest[:1] if re.fullmatch(r"[a-z]+", word)]
    if [name for name in names if name not in group.commands]:
        return names[0]
    chosen = [group.commands[name] for name in names] or list(group.commands.values())
    known = {flag for found in (*chosen, group) for option in found.params for flag in option.opts}
    flags = [word.split("=")[0] for word in rest if re.match(r"--?[a-zA-Z]", word)]
    return next((flag for flag in flags if flag not in known | {"--help"}), None)


def test_a_command_or_flag_that_does_not_exist_is_found() -> None:
    assert unknown_part("ff-run generate bundle --video clip.mp4 --prompt 'no --such'") is None
    assert unknown_part("ff-run genrate bundle") == "genrate"
    assert unknown_part("ff-run generate bundle --vidio clip.mp4") == "--vidio"


def test_commands_and_flags_that_pages_name_exist() -> None:
    named = {(path.name, command) for path in pages() for command in commands_of(path)}
    assert len(named) > 40
    assert [(name, command, part) for name, command in sorted(named) if (part := unknown_part(command))] == []
