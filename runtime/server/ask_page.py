"""The page at `/`: a film, a question, a slider for the cost, every token beside it. One document; it asks this server.

Its policy lets it run its own script and nobody else's, and reach nothing but the server it came from. What the server
draws of an answer is shown in a frame that can run nothing.
"""

from __future__ import annotations

import base64
import hashlib
import html
from pathlib import Path
from typing import NamedTuple

DOCUMENT = Path(__file__).with_name("page.html")
SCRIPT = Path(__file__).with_name("page.js")
PAGE_HEADERS = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "X-Frame-Options": "DENY"}


class AskPage(NamedTuple):
    """The document, and the value of its Content-Security-Policy."""

    document: str
    policy: str


def ask_page(model: str, cost: float) -> AskPage:
    """The page of one server.

    Args:
        model: its name, as it is shown.
        cost: at which the slider begins.
    """
    script = SCRIPT.read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    document = DOCUMENT.read_text(encoding="utf-8")
    document = document.replace("{{cost}}", f"{cost:g}").replace("{{script}}", script)
    policy = (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:; "
        "connect-src 'self'; frame-src 'self' about:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return AskPage(document.replace("{{name}}", html.escape(model)), policy)
