"""Text laid out for people: tables and labelled facts that fit the terminal, and prose that breaks between words.

A figure is never cut, nor a number parted from its unit. What goes to a file or a pipe is not wrapped: there a row is a
line, for whoever greps it. Knows no report.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Mapping, Sequence

from framefusion.console.plain_text import printable

WIDEST = 100  # columns that prose is read in
_GAP = "  "
_JOINED = re.compile(r"(?<=\d) (?=(?:B|kB|MB|GB|s|ms|%|x)\b|%)")  # a number and its unit
_TO_COPY = re.compile(r"\b(?:ff-run|ff-export|pip install|make) ")  # a line break in a command would go with it


def terminal_width() -> int | None:
    """Columns of the terminal that stdout is; None where it is a file or a pipe."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def counted(count: int, noun: str) -> str:
    """A number and what it is of: "1 film", "2 films"."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def table(head: Sequence[str], rows: Sequence[Sequence[object]], width: int | None = None) -> str:
    """Columns as wide as their widest cell, or narrower where they would not fit; those of numbers stand to the right.

    Args:
        head: a name for each column.
        rows: a cell for each column.
        width: columns that there are; None: as many as stdout's terminal has. What does not fit with every column as
            narrow as its longest word comes as a block of labelled lines for each row.
    """
    cells = [[printable(str(cell)) for cell in row] for row in rows]
    columns = [list(column) for column in zip(head, *cells, strict=True)]
    right = [all(isinstance(value, (int, float)) for value in column) for column in zip(*rows, strict=True)]
    available = width or terminal_width()
    widths = _widths(columns, available)
    if widths is None:
        blocks = ["\n".join(_labelled([*zip(head, row, strict=True)], available)) for row in cells]
        return "\n\n".join(blocks)
    ruler = ["-" * column for column in widths]
    lines = [*_row(head, widths, right), *_row(ruler, widths, right)]
    for row in cells:
        lines += _row(row, widths, right)
    return "\n".join(lines)


def labelled(facts: Mapping[str, str]) -> str:
    """A line for each fact, its label before it; wrapped to the terminal, at most WIDEST columns."""
    return "\n".join(_labelled([*facts.items()], min(shutil.get_terminal_size().columns, WIDEST)))


def prose(text: str, width: int | None) -> str:
    """The text with lines that break between words; lines with a command stay whole, to be copied."""
    if width is None:
        return text
    lines = []
    for line in text.split("\n"):
        if cells_of(line) <= width or _TO_COPY.search(line):
            lines.append(line)
        else:
            lines += _wrapped(line, min(width, WIDEST), _GAP)
    return "\n".join(lines)


def cells_of(text: str) -> int:
    """Columns that a terminal shows a line in: two for each wide character."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)


def _widths(columns: Sequence[Sequence[str]], available: int | None) -> list[int] | None:
    """Width of each column; None where even the longest words do not fit beside each other."""
    widths = [max(map(cells_of, column)) for column in columns]
    if available is None:
        return widths
    least = [max(cells_of(word) for cell in column for word in _unbreakable(cell)) for column in columns]
    gaps = len(_GAP) * (len(columns) - 1)
    while sum(widths) + gaps > available:
        spare = [width - narrowest for width, narrowest in zip(widths, least, strict=True)]
        if not any(spare):
            return None
        widest = max((index for index, room in enumerate(spare) if room), key=widths.__getitem__)
        widths[widest] -= 1
    return widths


def _row(cells: Sequence[str], widths: Sequence[int], right: Sequence[bool]) -> list[str]:
    """The lines of a row, as many as its highest cell has."""
    wrapped = [_wrapped(cell, width) for cell, width in zip(cells, widths, strict=True)]
    sides = right or [False] * len(widths)
    lines = []
    for index in range(max(map(len, wrapped))):
        parts = []
        for texts, width, to_right in zip(wrapped, widths, sides, strict=True):
            text = texts[index] if index < len(texts) else ""
            fill = " " * (width - cells_of(text))
            parts.append(fill + text if to_right else text + fill)
        lines.append(_GAP.join(parts).rstrip())
    return lines


def _unbreakable(text: str) -> list[str]:
    """What may not be parted: words, numbers with their units, and the folders of a path."""
    pieces = [re.split(r"(?<=/)", word) for word in _JOINED.sub("\0", text).split(" ")]
    return [piece.replace("\0", " ") for word in pieces for piece in word]


def _wrapped(text: str, width: int, indent: str = "") -> list[str]:
    """The text in lines of a width, broken between words, and within paths where a word is longer."""
    if cells_of(text) <= width:
        return [text]
    lines = [""]
    for word in _JOINED.sub("\0", text).split(" "):
        shown = word.replace("\0", " ")
        glue = " " if lines[-1].strip() else ""
        if cells_of(lines[-1] + glue + shown) <= width:
            lines[-1] += glue + shown
            continue
        pieces = [shown] if cells_of(indent + shown) <= width else re.split(r"(?<=/)", shown)
        for position, piece in enumerate(pieces):
            glue = " " if position == 0 and lines[-1].strip() else ""
            if lines[-1].strip() and cells_of(lines[-1] + glue + piece) > width:
                lines.append(indent + piece)
            else:
                lines[-1] += glue + piece
    return lines


def _labelled(facts: Sequence[tuple[str, str]], width: int | None) -> list[str]:
    indent = max(cells_of(label) for label, _ in facts) + 2
    lines = []
    for label, text in facts:
        first, *others = _wrapped(text, max((width or WIDEST) - indent, 1))
        lines.append((label + " " * (indent - cells_of(label)) + first).rstrip())
        lines += [" " * indent + line for line in others]
    return lines
