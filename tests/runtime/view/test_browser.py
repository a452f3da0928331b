"""The page of an answer in Chromium: what it says, what it does, and how it looks."""

from __future__ import annotations

import html
import io
import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from framefusion.runtime.pipeline import Pipeline
from framefusion.runtime.view.page import page
from framefusion.runtime.view.view import facts, watch
from tests.chromium import CHROMIUM, browser
from tests.patience import PATIENCE
from tests.runtime.view.test_view import REQUEST, TURNS

WATCHED = """<script>
window.problems = [];
addEventListener("error", event => problems.push(event.message));
addEventListener("securitypolicyviolation", event => problems.push("blocked " + event.blockedURI));
</script>"""
"""Stands before all else: what goes wrong in the page."""
DRIVEN = """<script>
const facts = { wide: 0, window: innerWidth, counts: [], problems, details: [], drawn: [], played: [] };
const kept = document.querySelector("canvas.kept"), all = document.querySelector("canvas.all");
const light = canvas => {
  const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  return data.reduce((sum, level, i) => sum + (i % 4 < 3 ? level : 0), 0) / data.length;
};
const sweep = () => {
  const box = kept.getBoundingClientRect(), card = document.querySelector(".detail span");
  for (let x = .02; x < 1; x += .05) for (let y = .02; y < 1; y += .05) {
    const [clientX, clientY] = [box.left + x * box.width, box.top + y * box.height];
    kept.dispatchEvent(new PointerEvent("pointermove", { pointerType: "mouse", clientX, clientY, bubbles: true }));
    facts.details.push(card.textContent);
  }
  kept.focus();
  const pressed = key => new KeyboardEvent("keydown", { key, bubbles: true });
  for (const key of ["ArrowDown", "ArrowRight"]) kept.dispatchEvent(pressed(key));
  facts.details.push(card.textContent);
};
const drive = () => {
  document.querySelectorAll("details").forEach(one => { one.open = true; });
  for (const button of document.querySelectorAll("#calls button")) {
    button.click();
    facts.counts.push(panels.reduce((sum, one) => sum + staying(one, step), 0));
  }
  facts.drawn = [light(kept), light(all)];
  const scrub = document.querySelector("input[aria-label=Frame]"), play = document.querySelector(".row button");
  for (let press = 0; press < 2; press++) {
    play.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight", bubbles: true }));
    facts.played.push(scrub.value);
  }
  for (let frame = 0; frame <= scrub.max; frame++) {
    scrub.value = frame;
    scrub.dispatchEvent(new Event("input"));
    sweep();
  }
  facts.details = [...new Set(facts.details)];
  facts.wide = document.documentElement.scrollWidth;
  facts.canvases = [...document.querySelectorAll("canvas")].map(
    one => [one.getAttribute("role"), one.getAttribute("aria-label")]);
  top.document.title = JSON.stringify(facts);
};
addEventListener("load", () => setTimeout(drive, 500));
</script>"""
"""Does what people do; the title says what came of it: window, tokens at each call, what patches say of themselves."""


@pytest.fixture(scope="module")
def told(pipeline: Pipeline, film: Path, picture: Path) -> dict[str, Any]:
    return facts(watch(pipeline, TURNS, [film, picture], REQUEST, compare=True), pipeline, "tiny <b>")


def drawn_by(folder: Path, text: str, size: tuple[int, int], *flags: str) -> str:
    """What Chromium says of a page: its document, or nothing where the flags ask for a screenshot."""
    assert CHROMIUM is not None
    file = folder / "report.html"
    file.write_text(text, encoding="utf-8")
    command = (
        CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=3000",
        "--force-device-scale-factor=1", "--force-prefers-reduced-motion", f"--window-size={size[0]},{size[1]}",
        f"--user-data-dir={folder / 'profile'}", *flags, file.as_uri(),
    )  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=True)
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium on PATH to draw the page: apt-get install chromium")
@pytest.mark.parametrize("size", [(390, 844), (1440, 900)], ids=["phone", "desktop"])
def test_a_browser_draws_the_page(told: dict[str, Any], tmp_path: Path, size: tuple[int, int]) -> None:
    """The counts are the answer's, nothing is wider than the window, and patches say what became of them.

    In a frame of that size: Chromium's own window is 500 pixels wide at least, whatever it is asked for.
    """
    text = page(told).replace("<style>", f"{WATCHED}<style>", 1).replace("</body>", f"{DRIVEN}</body>")
    frame = f'<iframe width="{size[0]}" height="{size[1]}" style="border: 0" srcdoc="{html.escape(text)}"></iframe>'
    outer = f"<!doctype html><meta charset=utf-8><title></title>{frame}"
    dom = drawn_by(tmp_path, outer, (1500, 1000), "--dump-dom")
    title = html.unescape(re.findall(r"<title>(.*?)</title>", dom)[0])
    came = json.loads(title)
    assert came["problems"] == []
    assert came["wide"] <= came["window"] == size[0]
    structural = [
        sum(left < 0 or left >= step for left in told["structural"]) for step in range(len(told["steps"]) + 1)
    ]
    expected = [len(told["left"]), *(step["visual_after"] for step in told["steps"])]
    assert [count + apart for count, apart in zip(came["counts"], structural, strict=True)] == [
        expected[0] + structural[0], *expected[1:],
    ]  # fmt: skip
    assert came["drawn"][0] < came["drawn"][1], "what was dropped is darker"
    begin, end = map(int, came["played"])
    assert end - begin in (0, 1)  # the last frame is the last
    stories = " ".join(came["details"])
    assert "stays in every layer" in stories
    assert re.search(r"merged into the one in frame \d+ at [\d.]+ s \(similarity 0\.\d{3}", stories)
    assert len(came["canvases"]) >= 4
    assert all(role == "img" and label for role, label in came["canvases"])


SCREENS = {"phone": (390, 1600), "desktop": (1440, 1100)}
REFERENCES = Path(__file__).with_name("screenshots")
COARSE = 48  # pixels across: letters of another font are grey there, a part that is gone is not


def coarse(picture: Image.Image) -> np.ndarray[Any, Any]:
    size = (COARSE, round(COARSE * picture.height / picture.width))
    return np.asarray(picture.convert("RGB").resize(size, Image.Resampling.BOX), np.float64)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium on PATH to draw the page: apt-get install chromium")
@pytest.mark.parametrize("screen", SCREENS)
def test_the_page_looks_as_it_did(told: dict[str, Any], tmp_path: Path, screen: str) -> None:
    """Light and dark beside screenshots that a person looked at; `UPDATE_SCREENSHOTS=1` takes new ones to look at."""
    first = {"median": 2.0, "least": 1.9, "most": 2.1}
    stages = {"video": 0.5, "preprocess": 0.1, "vision": 0.3, "embed": 0.01}
    ways = {
        "dense": {"stages": {**stages, "prefill": 1.05, "reduction": 0.04}, "first": first, "token": 0.02},
        "reduced": {"stages": {**stages, "prefill": 0.3, "reduction": 0.04}, "first": first, "token": 0.02},
    }
    headline = [
        {"text": text, "strong": index < 2} for index, text in enumerate(("1.6x faster first token", "same answer"))
    ]
    fixed = told | {"timing": {"rounds": 3, "level": False, "ratio": 1.6, **ways}, "headline": headline}
    taken = {}
    for scheme, flags in (("light", ()), ("dark", ("--force-dark-mode",))):
        shot = tmp_path / "shot.png"
        drawn_by(tmp_path, page(fixed), SCREENS[screen], *flags, f"--screenshot={shot}")
        taken[scheme] = Image.open(shot).convert("RGB")
        reference = REFERENCES / f"{screen}-{scheme}.webp"
        if "UPDATE_SCREENSHOTS" in os.environ:
            taken[scheme].save(reference, quality=60)
        difference = np.abs(coarse(taken[scheme]) - coarse(Image.open(reference)))
        assert difference.mean() < 8, f"{scheme} differs: look at {shot}"
        assert np.quantile(difference, 0.99) < 90
    assert np.abs(coarse(taken["light"]) - coarse(taken["dark"])).mean() > 60, "dark is dark"


PARTS = ("h1", ".said .answer", "canvas.kept", "canvas.all", ".strip", ".calls", ".key", ".waterfall .bar")
INK = 24  # levels by which a pixel differs from the ground of its part
LEAST_INK = 0.02  # share of the pixels of a part
PLACES = """JSON.stringify(PARTS.map(part => {
  const node = document.querySelector(part), box = node && node.getBoundingClientRect();
  return box && box.width && box.height ? [box.left, box.top, box.right, box.bottom].map(Math.round) : null;
}))"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium on PATH to draw the page: apt-get install chromium")
def test_no_part_of_the_page_is_missing_or_blank(told: dict[str, Any], tmp_path: Path) -> None:
    """Each has a place and something drawn in it, whatever the font: screenshots compared coarsely miss a small one."""
    file = tmp_path / "report.html"
    file.write_text(page(told), encoding="utf-8")
    with browser(tmp_path) as opened:
        for width in (390, 1440):
            opened.open(file.as_uri(), width, 3000)
            opened.until("[...document.querySelectorAll('canvas')].every(one => one.width && one.clientWidth)")
            opened.until(
                "F.visuals.every(one => one.loaded && one.loaded.filter(Boolean).every(film => film.complete))"
            )
            places = json.loads(opened.evaluate(PLACES.replace("PARTS", json.dumps(PARTS))))
            shot = Image.open(io.BytesIO(opened.screenshot())).convert("RGB")
            for part, place in zip(PARTS, places, strict=True):
                assert place is not None, f"{part} is not there at {width}"
                pixels = np.asarray(shot.crop(tuple(place)), np.int64).reshape(-1, 3)
                apart = np.abs(pixels - np.median(pixels, axis=0)).max(axis=1) > INK if pixels.size else np.zeros(1)
                assert apart.mean() > LEAST_INK, f"{part} is blank at {width}"
        assert opened.problems == []
