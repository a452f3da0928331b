"""The page at `/` in a browser: a film, a question, answers beside each other, light, dark and narrow."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from framefusion.runtime.pipeline import Pipeline, Request
from tests.bundles import shared
from tests.chromium import CHROMIUM, Browser, browser
from tests.runtime.server.conftest import Running, serving

pytest.importorskip("starlette")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium on PATH: apt-get install chromium"),
]
CARDS = "[...document.querySelectorAll('.answers .card')]"


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


def ask(window: Browser, text: str, film: Path | None = None, *, both: bool = False) -> None:
    if film is not None:
        window.choose_file("#file", film)
    window.evaluate(f"document.getElementById('both').checked = {str(both).lower()}")
    window.evaluate(f"document.getElementById('prompt').value = {text!r}")
    window.evaluate("document.getElementById('send').click()")
    window.until("!document.getElementById('send').disabled")


def test_a_film_is_asked_about_with_and_without_reduction(server: Running, films: Path, window: Browser) -> None:
    window.open(server.url + "/")
    window.evaluate(
        "document.getElementById('cost').value = 0.4; document.getElementById('cost').dispatchEvent(new Event('input'))"
    )
    assert window.evaluate("document.getElementById('shown').textContent") == "40 %"
    ask(window, "What happens?", films / "film.mp4", both=True)
    texts = window.evaluate(f"{CARDS}.map(card => card.querySelector('p').textContent)")
    with Pipeline(shared("bundle")) as pipeline:
        answers = [pipeline.generate("What happens?", [films / "film.mp4"], Request(cost=cost)) for cost in (0.4, 1.0)]
    assert texts == [answer.text for answer in answers]
    facts = window.evaluate(f"{CARDS}.map(card => card.querySelector('.facts').textContent)")
    seen = answers[0].visual_tokens
    assert facts[0].startswith(f"{answers[0].kept(-1, visual=True).size} of {seen} visual tokens")
    assert facts[1].startswith(f"{seen} of {seen} visual tokens")
    frames = window.evaluate(
        "[...document.querySelectorAll('iframe')].map(one => [one.sandbox.value, one.srcdoc.length])"
    )
    assert [sandbox for sandbox, _ in frames] == ["", ""]
    assert all(size > 1000 for _, size in frames)
    # the next message goes on behind the caches
    ask(window, "And then?", both=True)
    facts = window.evaluate(f"{CARDS}.slice(2).map(card => card.querySelector('.facts').textContent)")
    assert all("from the caches" in fact for fact in facts)
    assert window.problems == []


def test_a_refusal_is_said_and_the_conversation_goes_on(server: Running, window: Browser, tmp_path: Path) -> None:
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no film" * 20)
    window.open(server.url + "/")
    ask(window, "What?", broken)
    assert "damaged or no video" in window.evaluate("document.querySelector('.bad').textContent")
    assert window.evaluate("document.getElementById('prompt').value") == "What?"
    window.evaluate("document.getElementById('new').click()")
    ask(window, "<b>Hello</b>")
    assert window.evaluate("document.querySelector('.mine').textContent") == "<b>Hello</b>"
    assert window.evaluate("document.querySelectorAll('.mine b').length") == 0
    assert window.evaluate(f"{CARDS}.length") == 1


def test_a_key_is_asked_for(window: Browser, tmp_path: Path) -> None:
    with serving(tmp_path, "--api-key", "secret") as server:
        window.open(server.url + "/")
        ask(window, "Hello")
        assert not window.evaluate("document.getElementById('locked').hidden")
        window.evaluate("document.getElementById('key').value = 'secret'")
        ask(window, "Hello")
        assert window.evaluate(f"{CARDS}[1].querySelector('.facts').textContent").startswith("text alone")


@pytest.mark.parametrize("width", [390, 1200])
def test_it_fits_and_has_a_dark_side(server: Running, films: Path, window: Browser, width: int, tmp_path: Path) -> None:
    levels = {}
    for scheme in ("light", "dark"):
        window.open(server.url + "/", width=width, height=844, scheme=scheme)
        ask(window, "W" * 300, films / "film.mp4", both=True)
        assert window.evaluate("document.documentElement.scrollWidth") <= width
        assert window.evaluate("getComputedStyle(document.getElementById('locked')).display") == "none"
        (tmp_path / f"{scheme}.png").write_bytes(window.screenshot())  # to look at
        levels[scheme] = np.asarray(Image.open(io.BytesIO(window.screenshot())).convert("L")).mean()
    assert levels["light"] > 200
    assert levels["dark"] < 60
    fields = "[...document.querySelectorAll('input, textarea, button')]"
    named = "one => one.labels?.length || one.ariaLabel || one.textContent"
    assert window.evaluate(f"{fields}.every({named})")
