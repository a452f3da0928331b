"""An answer as a notebook draws it: which patches are bright, how large it is, and that no text of it becomes a tag."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from framefusion import Pipeline, Request
from framefusion.errors import PromptError
from framefusion.runtime.bundle import Bundle
from framefusion.runtime.media.tiles.thumbnails import MOST, SIDE, PanelRows, Thumbnail, thumbnails
from framefusion.runtime.media.video.frames import Video
from framefusion.runtime.notebook.answer_html import DROPPED, answer_html, opacity_of
from tests.bundles import shared

WHAT = "What happens?"
FEW = Request(max_new_tokens=4, cost=0.3)
FINE = np.array([[x / 4, y / 3, (x + 1) / 4, (y + 1) / 3] for y in range(3) for x in range(4)])


class Tags(HTMLParser):
    """Tags, attributes and text of a piece, and whether each tag was closed."""

    def __init__(self, piece: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.names: set[str] = set()
        self.text = ""
        self.feed(piece)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        if tag == "img":
            self.images.append(dict(attrs))
        elif tag != "br":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def opacity(image: dict[str, str | None]) -> NDArray[np.uint8]:
    (kind, content) = str(image["src"]).split(",")
    assert kind == "data:image/webp;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(content))).convert("RGBA"))[..., 3]


def test_bright_patches_are_those_that_a_layer_holds(pipeline: Pipeline, film: Path) -> None:
    answer = pipeline.generate(WHAT, [film], FEW)
    assert 0 < answer.kept(-1, visual=True).size < answer.visual_tokens
    for layer in (0, -1):
        drawn = Tags(answer.to_html(layer))
        assert answer.shown is not None
        ours = np.isin(np.arange(answer.visual_tokens), answer.kept(layer, visual=True))
        side = round((ours.size / len(drawn.images)) ** 0.5)
        kept = ours.reshape(len(drawn.images), side, side)
        for image, expected in zip(drawn.images, kept, strict=True):
            levels = opacity(image)
            (height, width) = np.array(levels.shape) // side
            middle = levels[height // 2 :: height, width // 2 :: width][:side, :side]
            np.testing.assert_array_equal(middle > 128, expected)
            assert f"{expected.sum()} of {expected.size}" in str(image["alt"])
    assert answer._repr_html_() == answer.to_html()


def test_a_turn_draws_what_it_showed(pipeline: Pipeline, film: Path, picture: Path) -> None:
    chat = pipeline.chat(film, request=FEW)
    first = chat.ask(WHAT)
    assert Tags(first.to_html()).images == Tags(pipeline.generate(WHAT, [film], FEW).to_html()).images
    second = chat.ask("And this?", [picture])
    assert second.shown is not None
    (image,) = Tags(second.to_html()).images
    kept = np.isin(second.shown.places, second.kept(-1))
    assert second.shown.places.min() > first.prompt_tokens
    assert f"{kept.sum()} of {kept.size}" in str(image["alt"])
    assert Tags(chat.ask("Who?").to_html()).images == []
    assert [record.shown for record in chat.records] == [None, None, None]  # thumbnails live as long as their answer


@pytest.mark.slow
def test_the_fixed_mode_draws_its_last_layer(film: Path) -> None:
    with Pipeline(Bundle(shared("fixed-gqa"), verify=False), threads=1) as fixed:
        answer = fixed.generate(WHAT, [film], Request(max_new_tokens=2))
    left = sum(int(found) for found in re.findall(r"· (\d+) of", answer.to_html()))
    assert left == answer.kept(-1, visual=True).size < answer.visual_tokens
    with pytest.raises(PromptError, match="inside a graph of the fixed mode"):
        answer.to_html(0)


def test_texts_are_texts_and_nothing_is_loaded(pipeline: Pipeline, film: Path) -> None:
    evil = "<script>alert(1)</script><img src=x onerror=y>\"'&"
    answer = replace(pipeline.generate(WHAT, [film], FEW), text=evil)
    piece = answer.to_html()
    drawn = Tags(piece)
    assert drawn.names <= {"div", "p", "br", "figure", "figcaption", "img"}
    assert evil in drawn.text
    assert not re.search(r"https?:|url\(|@import|<style", piece)
    assert all(str(image["src"]).startswith("data:image/webp;base64,") for image in drawn.images)


def test_what_is_no_picture_is_text(pipeline: Pipeline) -> None:
    answer = pipeline.generate(WHAT, request=FEW)
    assert Tags(answer.to_html()).images == []
    assert "visual" not in Tags(answer.to_html()).text
    assert Tags(replace(answer, shown=None).to_html()).images == []


def test_show_needs_a_notebook(pipeline: Pipeline) -> None:
    with pytest.raises(PromptError, match=r"none runs here: write answer\.to_html\(\) into a file"):
        pipeline.generate(WHAT, request=FEW).show()


@pytest.mark.slow
def test_a_long_film_of_noise_stays_small(pipeline: Pipeline) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (64, 480, 640, 3), np.uint8)
    shown = thumbnails([Video(frames, np.arange(64), 2.0, 64, 32.0, 0.0)], pipeline.manifest.preprocessing)
    assert (len(shown.shown), shown.pictures) == (MOST, 32)
    assert {max(picture.pixels.shape) for picture in shown.shown} == {SIDE}
    assert sum(len(picture.content) for picture in shown.shown) < 400_000  # film has a quarter of it
    kept = np.random.default_rng(1).random(shown.rows) < 0.5
    piece = answer_html("x" * 1000, ["a fact"], shown, kept)
    assert len(piece) < 300_000
    assert "and 8 more" in piece


def test_boxes_are_drawn_where_they_lie() -> None:
    picture = Thumbnail(b"", (0.0, 0.0, 1.0, 1.0), (800, 600), (PanelRows(FINE, 2),), "picture")
    kept = np.zeros(14, bool)
    kept[[2, 13]] = True  # the first and the last box
    drawn = opacity_of(picture, kept, 60, 80)
    expected = np.full((60, 80), DROPPED)
    expected[:20, :20] = 1
    expected[40:, 60:] = 1
    np.testing.assert_allclose(drawn, expected)
    # Tokens of one box are shown by their share, and a picture that was cut out by its part.
    whole = np.tile([0.25, 0.0, 0.75, 1.0], (4, 1))
    cut = Thumbnail(b"", (0.25, 0.0, 0.75, 1.0), (800, 600), (PanelRows(whole, 0),), "1.0 s")
    share = opacity_of(cut, np.array([True, False, False, False]), 60, 80)
    np.testing.assert_allclose(share, DROPPED + (1 - DROPPED) / 4)


def test_nothing_shown_is_no_thumbnail(pipeline: Pipeline) -> None:
    empty = thumbnails([], pipeline.manifest.preprocessing)
    assert (empty.shown, empty.pictures, empty.rows) == ((), 0, 0)
