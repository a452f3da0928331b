"""The text of --prompt: as it is typed, from standard input, or from a file. Knows no bundle."""

from __future__ import annotations

import sys
from pathlib import Path

from framefusion.errors import PromptError

LONGEST_PROMPT = 4 * 2**20  # bytes


def read_prompt(text: str) -> str:
    """The text of --prompt: of standard input for -, of a file for @FILE, else as it is; @@ begins one with an @.

    The line that a file ends with is none of the question's.

    Raises:
        PromptError: the file cannot be read, holds nothing or more than a question may, or is no text in UTF-8.
    """
    if text.startswith("@@"):
        return text[1:]
    if text != "-" and not text.startswith("@"):
        return text
    name = text.removeprefix("@")
    problem = f"--prompt {text:.80}: {'standard input' if name == '-' else name:.200}"
    try:
        content = sys.stdin.buffer.read(LONGEST_PROMPT + 1) if name == "-" else _head(Path(name))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise PromptError(
            f"{problem} cannot be read ({reason}): give a file, or @@ for a question that begins with an @"
        ) from None
    if len(content) > LONGEST_PROMPT:
        raise PromptError(f"{problem} has more than {LONGEST_PROMPT} bytes: shorten it")
    try:
        decoded = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise PromptError(f"{problem} is no text in UTF-8 ({error.reason}): convert it") from None
    if not decoded.strip():
        raise PromptError(f"{problem} holds no question (standard input can be read once): write one into it")
    return decoded.removesuffix("\n").removesuffix("\r")


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(LONGEST_PROMPT + 1)
