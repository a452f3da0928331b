"""Text from somebody else, made fit for a terminal: an answer, a prompt, a name in a bundle may hold escape sequences.

Knows no terminal: what is shown is the same in a file or a pipe.
"""

from __future__ import annotations

import unicodedata

LAYOUT = frozenset("\n\t")
TURNING = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Marks that turn the direction of a line."""


def is_harmless(character: str) -> bool:
    """Whether a character can be shown as it is: no control character, no mark that turns the direction of a line."""
    if character.isascii():
        return character.isprintable()
    return unicodedata.category(character) not in ("Cc", "Cs") and character not in TURNING


def printable(text: str) -> str:
    """The text with line feeds and tabs as they are, and each harmful character spelled out, such as \\x1b."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        character if character in LAYOUT or is_harmless(character) else repr(character)[1:-1] for character in text
    )
