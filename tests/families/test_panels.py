"""Where each row of a prompt lies in its picture, asked of the real towers: a change inside a row's box is seen by it.

Attention spreads a change over all rows, but the residual stream keeps most of it where it was: of the rows asked, the
one whose box was changed must change the most. A transposed grid, a wrong order of tiles or an offset by a row would
name another one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from framefusion.runtime.media.preprocess import Preprocessing
from framefusion.runtime.media.sources import as_image, as_video
from framefusion.runtime.media.tiles.panels import WHOLE, Panel
from framefusion.runtime.media.tiles.thumbnails import thumbnails
from framefusion.runtime.media.video.frames import Video
from framefusion.runtime.media.visual_input import VisualInput
from framefusion.runtime.pipeline import Media, Pipeline
from framefusion.runtime.request import Stopwatch
from tests.families import CASES
from tests.families.case import FamilyCase, clip, picture
from tests.families.test_families import OPTIONS

POINTS = 97  # along each axis: a prime, so that no point lies on an edge between boxes
TRIED = 8  # boxes of a panel
CHANGES = (64, 128, 192)  # of pixels
NAMED = 7 / 8  # rows pooled without smoothing see little of some places; by chance 1 / TRIED would be right
UNSEEN = {"llava", "nvila"}  # rules that may leave a margin: the tower sees no part of a patch, a crop no edge


@dataclass
class Case:
    pipeline: Pipeline
    rule: Preprocessing

    def visual(self, media: Media) -> VisualInput:
        return self.pipeline.preprocess([media], Stopwatch())[0]

    def features(self, media: Media) -> NDArray[np.float32]:
        return np.asarray(self.pipeline.encode_visual(self.visual(media))[0])

    def panels(self, media: Media) -> list[Panel]:
        if isinstance(media, Video):
            count, height, width, _ = media.frames.shape
            return self.rule.panels(height, width, count)
        height, width, _ = media.shape
        return self.rule.panels(height, width)


def params() -> list[object]:
    """The first checkpoint of each family at once, its others in the slow tests."""
    return [
        pytest.param((case, variant), id=f"{case.family}-{variant}", marks=[pytest.mark.slow] if number else [])
        for case in CASES
        for number, variant in enumerate(case.variants)
    ]


@pytest.fixture(params=params(), scope="module")
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    from tests.families.eager import eager_pipeline

    family, variant = request.param
    assert isinstance(family, FamilyCase)
    folder: Path = tmp_path_factory.mktemp("checkpoint")
    family.write(folder, variant)
    pipeline = eager_pipeline(folder, tmp_path_factory.mktemp("bundle") / "b", OPTIONS)
    return Case(pipeline, pipeline.manifest.preprocessing)


def shown(case: Case) -> dict[str, Media]:
    """Films and images, wide and tall."""
    sampling = case.pipeline.manifest.sampling
    films = {"film": clip(8), "tall film": clip(8, 112, 84, seed=5)}
    images = {"image": picture(), "tall image": picture(126, 70, seed=6), "large image": picture(112, 140, seed=7)}
    media: dict[str, Media] = {name: as_video(pixels, sampling) for name, pixels in films.items()}
    return media | {name: as_image(pixels) for name, pixels in images.items()}


@pytest.mark.slow
def test_each_row_has_a_box(case: Case) -> None:
    for name, media in shown(case).items():
        assert sum(len(panel.boxes) for panel in case.panels(media)) == case.visual(media).num_rows, name


def test_boxes_cover_the_picture_and_do_not_overlap(case: Case) -> None:
    for name, media in shown(case).items():
        for panel in case.panels(media):
            boxes = np.unique(with_area(panel.boxes), axis=0)
            left, top, right, bottom = hull = (*boxes[:, :2].min(0), *boxes[:, 2:].max(0))
            across, down = (np.linspace(*side, POINTS + 2)[1:-1] for side in ((left, right), (top, bottom)))
            x, y = (axis.reshape(-1, 1) for axis in np.meshgrid(across, down))
            inside = (boxes[:, 0] < x) & (x < boxes[:, 2]) & (boxes[:, 1] < y) & (y < boxes[:, 3])
            assert inside.sum(1).max() == 1, (name, panel.name)
            gaps = np.mean(inside.sum(1) == 0)  # tiles of no whole patches have a line between them
            assert gaps < (0.1 if case.rule.rule in UNSEEN else 1e-9), (name, panel.name, gaps)
            if case.rule.rule not in UNSEEN:
                assert hull == pytest.approx(WHOLE), (name, panel.name)


def test_frames_of_a_film_are_each_in_a_panel(case: Case) -> None:
    media = shown(case)["film"]
    assert isinstance(media, Video)
    assert {frame for panel in case.panels(media) for frame in panel.frames} == set(range(len(media.frames)))


@pytest.mark.slow
def test_thumbnails_stand_for_all_rows_of_what_is_shown(case: Case) -> None:
    """Also of a film that was shrunk as it was read, whose frames may have been cut out."""
    media = shown(case)
    whole = thumbnails(list(media.values()), case.rule)
    assert whole.rows == sum(len(panel.boxes) for shown in media.values() for panel in case.panels(shown))
    for film in (media["film"], media["tall film"]):
        assert isinstance(film, Video)
        frames = np.zeros((*film.frames.shape[:3], 0), np.uint8)
        shrunk = thumbnails([replace(film, frames=frames, shrunk=case.rule.pictures(film))], case.rule)
        plain = thumbnails([film], case.rule)
        assert [picture.size for picture in shrunk.shown] == [picture.size for picture in plain.shown]
        for small, large in zip(shrunk.shown, plain.shown, strict=True):
            (left, top, right, bottom) = small.place
            (height, width) = large.pixels.shape[:2]
            lines = slice(round(top * height), round(bottom * height))
            part = large.pixels[lines, round(left * width) : round(right * width)]
            seen = np.asarray(Image.fromarray(small.pixels).resize(part.shape[1::-1]))
            assert np.corrcoef(seen.ravel(), part.ravel())[0, 1] > 0.8, "another part of the frame"


@pytest.mark.parametrize(
    "name", ["large image", *(pytest.param(name, marks=pytest.mark.slow) for name in ("film", "tall image"))]
)
def test_a_change_in_a_box_is_seen_by_its_rows(case: Case, name: str) -> None:
    media = shown(case)[name]
    before, panels = case.features(media), case.panels(media)
    ends = np.cumsum([len(panel.boxes) for panel in panels])
    random = np.random.default_rng(0)
    tried = {0, len(panels) // 2, len(panels) - 1} if isinstance(media, Video) else set(range(len(panels)))
    for index in sorted(tried):
        panel, rows = panels[index], slice(ends[index] - len(panels[index].boxes), ends[index])
        places = random.permutation(np.unique(with_area(panel.boxes), axis=0))[:TRIED]
        moved = np.empty((len(places), len(places)))  # by a change at the first place, at the second one
        for i, place in enumerate(places):
            drawn = [case.features(changed(media, panel.frames, place, by)) - before for by in CHANGES]
            change = np.linalg.norm(drawn, axis=-1).mean(0)
            moved[i] = [change[rows][(panel.boxes == other).all(1)].sum() for other in places]
            if isinstance(media, Video):
                others = np.concatenate([np.full(len(p.boxes), p.frames != panel.frames) for p in panels])
                assert change[others].max() <= change[rows].max(), (panel.name, place)
        moved /= moved.sum(0)  # some rows are more easily moved than others, wherever the change is
        named = moved.argmax(1) == np.arange(len(places))
        assert named.mean() >= NAMED, (panel.name, places, moved.round(2))


def with_area(boxes: NDArray[np.float64]) -> NDArray[np.float64]:
    """Boxes that show some of the picture, not only what is around it."""
    area: NDArray[np.float64] = boxes[(boxes[:, 2] - boxes[:, 0] > 1e-3) & (boxes[:, 3] - boxes[:, 1] > 1e-3)]
    return area


def changed(media: Media, frames: Sequence[int], place: NDArray[np.float64], by: int) -> Media:
    """The same with the middle of one place drawn anew."""
    pixels = (media.frames if isinstance(media, Video) else media[None]).copy()
    height, width = pixels.shape[1:3]
    middle, half = (place[:2] + place[2:]) / 2, (place[2:] - place[:2]) * 0.4
    (left, top), (right, bottom) = middle - half, middle + half
    lines = slice(int(top * height), max(round(bottom * height), int(top * height) + 1))
    columns = slice(int(left * width), max(round(right * width), int(left * width) + 1))
    for frame in frames:
        pixels[frame, lines, columns] += np.uint8(by)  # modulo 256
    return replace(media, frames=pixels) if isinstance(media, Video) else pixels[0]
