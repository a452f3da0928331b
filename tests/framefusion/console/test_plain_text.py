"""Nothing that somebody else wrote moves a terminal's cursor or turns its lines."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from framefusion.console import messages as console
from framefusion.console.plain_text import is_harmless, printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred\x1b[0m", r"\x1b[31mred\x1b[0m"),
        ("\x1b]0;title\x07", r"\x1b]0;title\x07"),
        ("a\rb\x08\x7f\x9b2J", r"a\rb\x08\x7f\x9b2J"),
        ("\u202eevil", r"\u202eevil"),
        ("two\nlines\tand a tab", "two\nlines\tand a tab"),
        ("影片 é 🎬 \u200d", "影片 é 🎬 \u200d"),
        ("\ud800", r"\ud800"),
    ],
)
def test_what_is_shown(text: str, shown: str) -> None:
    assert printable(text) == shown


@given(st.text())
def test_any_text_is_harmless_once_shown(text: str) -> None:
    shown = printable(text)
    assert all(is_harmless(character) or character in "\n\t" for character in shown)
    assert printable(shown) == shown
    shown.encode("utf-8")


def test_the_console_shows_no_escape_sequence(capsys: pytest.CaptureFixture[str]) -> None:
    console.write("an answer \x1b[2J", newline=False)
    console.log("a name \x1b]0;x\x07")
    out, err = capsys.readouterr()
    assert (out, err) == (r"an answer \x1b[2J", "a name \\x1b]0;x\\x07\n")
