"""Names of modules as a quantization's configuration writes them: exact names, parts of names, and regular expressions.

A checkpoint's keys and the names that a quantizer knew may begin differently (`model.layers`, `language_model.layers`),
so a name is tried with each of the usual beginnings. Patterns come from files of unknown origin: what could keep
Python's engine busy for longer than a plan may take is refused. Knows no format.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Sequence

REGULAR = "re:"
LONGEST = 300  # characters of a pattern
LONGEST_NAME = 300  # of a module
MOST_REPEATS = 4
SECONDS = 5.0
"""All matches of a checkpoint may take together."""
BEGINNINGS = ("", "model.", "language_model.", "model.language_model.", "language_model.model.")
_REPEATED_GROUP = re.compile(r"\)[*+{]")
_REFERENCE = re.compile(r"\\[1-9]|\(\?P=|\(\?\(")


class PatternError(ValueError):
    """A pattern is not read; the message says why."""


class ModuleNames:
    """Patterns of module names.

    Args:
        patterns: `re:` in front of a regular expression, matched from the beginning of a name; else a name.
        within: a name also stands for a run of components anywhere in a module's name (`visual` for
            `model.visual.blocks.0.attn.qkv`), with `*` for any component; else for that module alone.

    Raises:
        PatternError: one is no regular expression, or one that may take too long.
    """

    def __init__(self, patterns: Iterable[str], *, within: bool = False) -> None:
        self._within = within
        self._names: list[str] = []
        self._expressions: list[re.Pattern[str]] = []
        self._spent = 0.0
        for pattern in patterns:
            if pattern.startswith(REGULAR):
                self._expressions.append(compiled(pattern.removeprefix(REGULAR)))
            else:
                self._names.append(pattern)
        self._exact = set(self._names)
        self._runs = [name.split(".") for name in self._names] if within else []

    def match(self, module: str) -> bool:
        """Whether a pattern is of this module, under any of the usual beginnings of its name.

        Raises:
            PatternError: matching has taken too long, or the name is too long.
        """
        if len(module) > LONGEST_NAME:
            raise PatternError(f"a module's name of {len(module)} characters")
        variants = names_of(module)
        if not self._exact.isdisjoint(variants):
            return True
        components = module.split(".")
        if any(_has_run(components, run) for run in self._runs):
            return True
        return any(self._matches(expression, name) for expression in self._expressions for name in variants)

    def _matches(self, expression: re.Pattern[str], name: str) -> bool:
        start = time.perf_counter()
        found = expression.match(name) is not None
        self._spent += time.perf_counter() - start
        if self._spent > SECONDS:
            raise PatternError(f"its regular expressions take longer than {SECONDS:g} s")
        return found


def compiled(expression: str) -> re.Pattern[str]:
    """A regular expression of a configuration.

    Raises:
        PatternError: it is none, or repeats in a way that may take too long.
    """
    shown = f"{expression!r:.80}"
    if len(expression) > LONGEST:
        raise PatternError(f"a regular expression of {len(expression)} characters: {LONGEST} are read")
    if _REPEATED_GROUP.search(expression) or _REFERENCE.search(expression):
        raise PatternError(f"the regular expression {shown} repeats a group or refers to one, which may take too long")
    if sum(expression.count(sign) for sign in "*+{") > MOST_REPEATS:
        raise PatternError(f"the regular expression {shown} repeats more than {MOST_REPEATS} times")
    try:
        return re.compile(expression)
    except (re.error, RecursionError, OverflowError) as error:
        raise PatternError(f"{shown} is no regular expression ({error})") from None


def names_of(module: str) -> Sequence[str]:
    """A module's name under each of the usual beginnings, its own first."""
    core = module
    while core.startswith(("model.", "language_model.")):
        core = core.partition(".")[2]
    return list(dict.fromkeys((module, *(beginning + core for beginning in BEGINNINGS))))


def _has_run(components: Sequence[str], run: Sequence[str]) -> bool:
    """Whether components stand next to each other in a name."""
    count = len(run)
    return any(
        all(wanted in ("*", found) for wanted, found in zip(run, components[start : start + count], strict=True))
        for start in range(len(components) - count + 1)
    )
