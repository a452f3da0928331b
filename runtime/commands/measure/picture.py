"""The picture of `ff-run bench`: the wait for the first token by stages, a bar for each cost, as one SVG file.

The file loads nothing, says its figures in text, and is dark where its reader is. Measures nothing.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from framefusion.errors import StorageError
from framefusion.runtime.commands.measure.bench import STAGES, faster
from framefusion.storage import files

MARK = b"<!-- by ff-run bench -->\n"
"""Begins every picture, so that no other file is replaced."""
MOST_BYTES = 10**6
DECODE = STAGES[-1]  # comes behind the first token
# Light and dark; neighbours differ in lightness as well, for readers who do not tell the hues apart.
COLORS = {
    "video": ("#9aa4b2", "#6f7a89"),
    "preprocess": ("#c9d0d9", "#a3adba"),
    "vision": ("#2a6fbb", "#5c9fe6"),
    "embed": ("#a7c8ea", "#b9d6f2"),
    "prefill": ("#d1660f", "#f0903f"),
    "reduction": ("#f5c38a", "#ffd9ab"),
    "rest": ("#e3e6ea", "#3c434c"),
}
WIDTH = 760
LEFT = 84  # of the bars
BARS = 420  # width of the longest one
TOP = 92
ROW = 46
BAR = 24
NARROWEST = 34  # of a segment that holds its figure

STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#16191d}.soft{fill:#525a66}.big{font-size:16px;font-weight:600}"
    ".in{font-size:11px;text-anchor:middle;fill:#000}.line{stroke:#16191d;fill:none}.page{fill:#fff}"
    + "".join(f".{name}{{fill:{light}}}" for name, (light, _) in COLORS.items())
    + "@media (prefers-color-scheme:dark){text{fill:#eceff3}.soft{fill:#a9b2bf}.line{stroke:#eceff3}.page{fill:#15181c}"
    + "".join(f".{name}{{fill:{dark}}}" for name, (_, dark) in COLORS.items())
    + ".in{fill:#000}.on-video,.on-rest{fill:#fff}}"
)


def check_picture(path: Path) -> None:
    """Refuse what no picture can be written to, before anything is measured.

    Raises:
        StorageError: another kind of file is named, or one that is there and no picture of `ff-run bench`.
    """
    if path.suffix.lower() != ".svg":
        raise StorageError(f"{path}: the picture is SVG, which browsers and editors open: name it {path.stem}.svg")
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise StorageError(f"{path} cannot be written: name a file in a folder that exists, such as bench.svg")
    if os.path.lexists(path) and not is_picture(path):
        raise StorageError(f"{path} exists and is no picture of ff-run bench: name another file")


def is_picture(path: Path) -> bool:
    """Whether a file is a picture of this module, which a new one may replace."""
    try:
        return files.read_file(path, MOST_BYTES).startswith(MARK)
    except OSError:
        return False


def write_picture(facts: Mapping[str, Any], path: Path) -> None:
    """Write the picture in one step.

    Args:
        facts: what `bench.measure` gives.
        path: see `check_picture`.

    Raises:
        StorageError: it cannot be written there.
    """
    check_picture(path)
    try:
        files.write_file(files.output_path(path), MARK + picture(facts).encode("utf-8"))
    except OSError as error:
        raise StorageError(f"{path} cannot be written ({error.strerror or error}): name another file") from None


def picture(facts: Mapping[str, Any]) -> str:
    """The picture as SVG: for each way a bar of its stages up to the first token, with what was measured beside it."""
    ways = facts["ways"]
    longest = max(way["first_token"]["max_s"] for way in ways)
    scale = BARS / longest
    height = TOP + ROW * len(ways) + 44
    counts = f"{facts['prompt_tokens']} tokens of prompt, {facts['visual_tokens']} of them visual"
    spoken = "; ".join(f"{way['name']}: {in_seconds(way['first_token']['median_s'])}" for way in ways)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'role="img" aria-label="{escape(f"Time to the first token. {spoken}", quote=True)}">',
        f"<style>{STYLE}</style>",
        f'<rect class="page" width="{WIDTH}" height="{height}"/>',
        text(16, 28, "Time to the first token", "big"),
        text(16, 48, f"{counts}; medians of {facts['rounds']}, lines from least to most", "soft"),
        *legend(ways),
    ]
    for index, way in enumerate(ways):
        parts += row(way, ways[0], TOP + ROW * index, scale)
    if facts["backend"] is not None:
        parts.append(text(16, height - 16, facts["backend"].split(";")[0], "soft"))
    return "\n".join([*parts, "</svg>\n"])


def segments_of(way: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Stages and seconds that add up to the median of the first token, the rest being what no stage counts."""
    stages = [
        (stage, way["stages"][stage]["median_s"]) for stage in STAGES if stage != DECODE and stage in way["stages"]
    ]
    waited = way["first_token"]["median_s"]
    counted = sum(seconds for _, seconds in stages)
    if counted > waited:  # medians of each stage may add up to more than that of their sum
        return [(stage, seconds * waited / counted) for stage, seconds in stages]
    return [*stages, ("rest", waited - counted)]


def row(way: Mapping[str, Any], base: Mapping[str, Any], top: float, scale: float) -> list[str]:
    """A bar with its name before it and its figures behind it."""
    parts = [text(16, top + 17, way["name"])]
    at = float(LEFT)
    for stage, seconds in segments_of(way):
        width = seconds * scale
        title = f"<title>{stage}: {in_seconds(seconds)}</title>"
        parts.append(f'<rect class="{stage}" x="{at:.1f}" y="{top}" width="{width:.1f}" height="{BAR}">{title}</rect>')
        if width >= NARROWEST:
            parts.append(text(at + width / 2, top + 16, f"{seconds:.2g}", f"in on-{stage}"))
        at += width
    first = way["first_token"]
    least = LEFT + first["min_s"] * scale
    most = LEFT + first["max_s"] * scale
    middle = top + BAR + 5
    ends = "".join(f"M{end:.1f} {middle - 3}v6" for end in (least, most))
    parts.append(f'<path class="line" d="M{least:.1f} {middle}H{most:.1f}{ends}"/>')
    said = [in_seconds(first["median_s"])] + ([faster(way, base)] if way is not base else [])
    kept = f"{way['visual_tokens_kept']} tokens kept, " + ("same answer" if way["same_answer"] else "another answer")
    parts.append(text(LEFT + BARS + 16, top + 10, ", ".join(said)))
    parts.append(
        text(
            LEFT + BARS + 16, top + 27, kept if way is not base else f"{way['visual_tokens_kept']} tokens kept", "soft"
        )
    )
    return parts


def legend(ways: Sequence[Mapping[str, Any]]) -> list[str]:
    """A patch and a name for each stage that some bar has."""
    shown = dict.fromkeys(stage for way in ways for stage, seconds in segments_of(way) if seconds > 0)
    parts = []
    at = 16
    for stage in sorted(shown, key=list(COLORS).index):
        parts.append(f'<rect class="{stage}" x="{at}" y="62" width="12" height="12"/>')
        parts.append(text(at + 17, 73, stage, "soft"))
        at += 36 + 8 * len(stage)
    return parts


def text(x: float, y: float, content: str, kind: str = "") -> str:
    """A line of text that begins at a point, or is centred on it."""
    style = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}"{style}>{escape(content)}</text>'


def in_seconds(seconds: float) -> str:
    """With three digits: 0.0123 s, 1.23 s."""
    return f"{seconds:.3g} s"
