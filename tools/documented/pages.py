"""The code blocks of a page: what a reader may type, what it is said to print, and which blocks are not run, and why.

Reads Markdown; runs nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
RUN = ("shell", "console", "python")
SHOWN = ("text", "json", "toml")  # files, output and drawings
COMMANDS = ("ff-run", "ff-export", "lmms-eval", "optimum-cli", "pip", "python", "make", "cmake", "git", "cp")
"""What an indented line may not begin with: only fenced blocks are run."""
_FENCE = re.compile(r"^( *)```(\w*) *$")
_MARK = re.compile(r"<!-- not run: (.+?) -->")


class PageError(Exception):
    """A page whose blocks cannot be told apart, or are not said to be run or shown."""


@dataclass(frozen=True)
class Command:
    """A command of a shell, continuation lines and all, and the lines that the page shows behind it."""

    text: str
    output: tuple[str, ...] = ()


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        page: its file's name, as a path from the root.
        line: of its fence, from 1.
        language: behind the fence.
        lines: between the fences, without the fence's indentation.
        reason: why it is not run; None: it is.
    """

    page: str
    line: int
    language: str
    lines: tuple[str, ...] = field(repr=False)
    reason: str | None = None

    @property
    def place(self) -> str:
        """For messages."""
        return f"{self.page}:{self.line}"

    @property
    def text(self) -> str:
        """All of it."""
        return "\n".join(self.lines) + "\n"

    def commands(self) -> list[Command]:
        """Those of a block of a shell, in order; comments and empty lines are none."""
        return list(_console(self.lines) if self.language == "console" else _shell(self.lines))


def pages() -> list[Path]:
    """Those that are run, README first."""
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks_of(page: Path, root: Path = ROOT) -> list[Block]:
    """The fenced blocks of a page.

    A block with `<!-- not run: REASON -->` in the line before it, or before an empty line before it, is not run.

    Raises:
        PageError: a fence that does not end, a language that is neither run nor shown, a mark without a block, or an
            indented command.
    """
    name = page.relative_to(root).as_posix()
    blocks: list[Block] = []
    reason: str | None = None
    opened: tuple[int, str, str] | None = None  # line, indentation, language
    inside: list[str] = []
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        fence = _FENCE.match(line)
        if opened is not None:
            start, indent, language = opened
            if fence and not fence[2]:
                blocks.append(Block(name, start, language, tuple(inside), reason))
                opened = None
                reason = None
            else:
                inside.append(line.removeprefix(indent))
        elif fence:
            if fence[2] not in RUN + SHOWN:
                raise PageError(
                    f"{name}:{number}: say what the block is: {', '.join(RUN)} are run, {', '.join(SHOWN)} not"
                )
            opened = (number, fence[1], fence[2])
            inside = []
        elif mark := _MARK.fullmatch(line.strip()):
            reason = mark[1]
        elif line.strip():
            if reason is not None:
                raise PageError(f"{name}:{number}: no block behind `not run: {reason}`")
            if re.match(rf" {{4,}}(\$ )?({'|'.join(COMMANDS)}) ", line):
                raise PageError(f"{name}:{number}: fence this command: only fenced blocks are run")
    if opened is not None or reason is not None:
        raise PageError(f"{name}: the last block does not end, or a `not run` has no block")
    return blocks


def _shell(lines: tuple[str, ...]) -> Iterator[Command]:
    """A command a line; a backslash at the end, or an open heredoc, continues it."""
    held: list[str] = []
    end: str | None = None
    for line in lines:
        if not held and (not line.strip() or line.lstrip().startswith("#")):
            continue
        held.append(line)
        here = re.search(r"<<-?\s*'?(\w+)'?", line)
        if end is None and here:
            end = here[1]
        elif line.strip() == end:
            end = None
        if end is None and not line.endswith("\\"):
            yield Command("\n".join(held))
            held = []
    if held:
        yield Command("\n".join(held))


def _console(lines: tuple[str, ...]) -> Iterator[Command]:
    """Commands behind `$ `, continued behind `> `, and what is printed behind each."""
    text: list[str] = []
    output: list[str] = []
    for line in lines:
        if line.startswith("$ "):
            if text:
                yield Command("\n".join(text), tuple(output))
            text = [line[2:]]
            output = []
        elif line.startswith("> ") and not output and text:
            text.append(line[2:])
        elif line.strip():
            output.append(line)
    if text:
        yield Command("\n".join(text), tuple(output))
