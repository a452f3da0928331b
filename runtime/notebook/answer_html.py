"""An answer as a piece of HTML for a notebook: its text, what it cost, and pictures with the patches that were kept.

What was dropped is let through to the page behind it, so it is right on a light page and on a dark one. No script, no
style sheet and no address: notebooks that trust nobody show it, too. Knows no pipeline.
"""

from __future__ import annotations

import base64
import html
import io
import sys
from collections.abc import Sequence
from importlib import import_module

import numpy as np
from numpy.typing import NDArray

from framefusion.errors import PromptError
from framefusion.runtime.media.tiles.thumbnails import Thumbnail, Thumbnails

DROPPED = 0.16  # opacity of a patch of which nothing is left
QUALITIES = (70, 40, 15)
"""Of the pictures: the first at which all of them take no more than LARGEST. Film does at the first, noise does not."""
LARGEST = 250_000  # bytes of all pictures
_ROOT = "font-family:system-ui,sans-serif;line-height:1.45;max-width:60em"
_TEXT = "font-size:1.1em;white-space:pre-wrap;margin:0 0 .4em"
_FACTS = "opacity:.75;font-size:.9em;margin:0 0 .6em"
_GRID = "display:flex;flex-wrap:wrap;gap:10px;align-items:flex-end"
_FIGURE = "margin:0;text-align:left"
_IMAGE = "display:block;margin:0;border-radius:3px;outline:1px solid rgba(128,128,128,.45)"
_CAPTION = "font-size:.78em;opacity:.75;margin-top:2px"


def answer_html(text: str, facts: Sequence[str], pictures: Thumbnails | None, kept: NDArray[np.bool_] | None) -> str:
    """The piece of a page.

    Args:
        text: of the answer, of unknown origin.
        facts: sentences about it.
        pictures: that the prompt shows; None where nothing of them is known.
        kept: whether each of their rows is left.  [rows]
    """
    parts = [f'<div style="{_ROOT}">', f'<p style="{_TEXT}">{html.escape(text)}</p>']
    parts += [f'<p style="{_FACTS}">{"<br>".join(html.escape(fact) for fact in facts)}</p>'] if facts else []
    if pictures is not None and kept is not None and pictures.shown:
        parts += [f'<div style="{_GRID}">', *_figures(pictures.shown, kept), "</div>"]
        left = pictures.pictures - len(pictures.shown)
        parts += [f'<p style="{_CAPTION}">and {left} more, evenly left out</p>'] if left else []
    return "".join([*parts, "</div>"])


def display_html(piece: str) -> None:
    """Draw a piece of HTML in the notebook that runs this.

    Raises:
        PromptError: none does.
    """
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    if shell is None or not hasattr(shell, "kernel"):
        raise PromptError(
            "show draws in a notebook, and none runs here: write answer.to_html() into a file, or draw more of it with "
            "ff-run view"
        )
    notebook = import_module("IPython.display")
    notebook.display(notebook.HTML(piece))


def _figures(pictures: Sequence[Thumbnail], kept: NDArray[np.bool_]) -> list[str]:
    """All pictures, as fine as there is room for."""
    figures: list[str] = []
    for quality in QUALITIES:
        figures = [_figure(picture, kept, quality) for picture in pictures]
        if sum(map(len, figures)) <= LARGEST:
            break
    return figures


def _figure(picture: Thumbnail, kept: NDArray[np.bool_], quality: int) -> str:
    rows = [kept[panel.first : panel.first + len(panel.boxes)] for panel in picture.panels]
    count = sum(int(row.sum()) for row in rows)
    total = sum(row.size for row in rows)
    caption = html.escape(f"{picture.name} · {count} of {total}")
    pixels = picture.pixels
    (height, width) = pixels.shape[:2]
    source = _webp(pixels, opacity_of(picture, kept, height, width), quality)
    alternative = html.escape(f"{picture.name}: {count} of {total} tokens are left", quote=True)
    return (
        f'<figure style="{_FIGURE}"><img style="{_IMAGE}" width="{width}" height="{height}" alt="{alternative}" '
        f'src="{source}"><figcaption style="{_CAPTION}">{caption}</figcaption></figure>'
    )


def opacity_of(picture: Thumbnail, kept: NDArray[np.bool_], height: int, width: int) -> NDArray[np.float64]:
    """How much of each of [height, width] pixels is shown: 1 where a token that looks at it is left, else DROPPED.

    Tokens that share a box tell together what is in it: it is shown by the share of them that is left.
    """
    (left, top, right, bottom) = picture.place
    share = np.zeros((height, width))
    origin = np.array([left, top, left, top])
    scale = np.array([width, height, width, height]) / [right - left, bottom - top, right - left, bottom - top]
    for panel in picture.panels:
        rows = kept[panel.first : panel.first + len(panel.boxes)]
        (boxes, group) = np.unique(panel.boxes, axis=0, return_inverse=True)
        present = np.bincount(group.reshape(-1), rows) / np.bincount(group.reshape(-1))
        edges = np.clip(np.rint((boxes - origin) * scale), 0, [width, height, width, height]).astype(int)
        for (x0, y0, x1, y1), part in zip(edges.tolist(), present.tolist(), strict=True):
            if part:
                share[y0:y1, x0:x1] = np.maximum(share[y0:y1, x0:x1], part)
    return DROPPED + (1 - DROPPED) * share


def _webp(pixels: NDArray[np.uint8], opacity: NDArray[np.float64], quality: int) -> str:
    """A picture as a WebP file in a data URL."""
    from PIL import Image

    levels = np.dstack([pixels, np.rint(opacity * 255).astype(np.uint8)])
    file = io.BytesIO()
    Image.fromarray(levels).save(file, "WEBP", quality=quality, alpha_quality=90)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode("ascii")
