"""InternVL beside its authors' repository: tiles, frames, labels, system prompt."""

from __future__ import annotations

import re

import numpy as np
import pytest
from PIL import Image

from framefusion.export.families.internvl import row as internvl
from framefusion.runtime.families.internvl import InternVLPreprocessing
from framefusion.runtime.media.frame_sampling import FrameSampling, sample_indices
from framefusion.runtime.media.preprocess import cut_patches
from framefusion.runtime.media.video.frames import Video
from tests.authors.repositories import INTERNVL

INTERNVL.required()
RULE = InternVLPreprocessing(frame_label=internvl.FRAME_LABELS["internvl2_5"], image_label=internvl.IMAGE_LABEL)


@pytest.mark.parametrize("size", [(448, 448), (300, 900), (720, 1280), (1000, 333), (2000, 1999), (31, 40), (900, 905)])
@pytest.mark.parametrize("most", [1, 6, 12])
def test_the_same_tiles(size: tuple[int, int], most: int) -> None:
    names = ("find_closest_aspect_ratio", "dynamic_preprocess")
    code = INTERNVL.functions("internvl_chat/internvl/train/dataset.py", names, {})
    small = np.random.default_rng(0).integers(0, 256, (20, 20, 3), np.uint8)
    picture = Image.fromarray(small).resize(size[::-1])
    tiles = code["dynamic_preprocess"](picture, max_num=most, image_size=448, use_thumbnail=True)
    rule = RULE.with_options(max_tiles=most)
    shown = rule.image(np.asarray(picture)).tiles[0].values
    np.testing.assert_array_equal(shown, cut_patches(np.stack([np.asarray(tile) for tile in tiles]), rule))


@pytest.mark.parametrize("total", [9, 32, 33, 100, 750, 4001])
@pytest.mark.parametrize("count", [8, 16, 32])
def test_the_same_frames(total: int, count: int) -> None:
    """`get_index` of the README's example."""
    readme = INTERNVL.file("README.md").read_text()
    code = re.search(r"def get_index\(.*?return frame_indices\n", readme, re.DOTALL)
    assert code is not None
    space: dict[str, object] = {"np": np}
    exec(code[0], space)
    expected = space["get_index"](None, 25.0, total - 1, num_segments=count)  # type: ignore[operator]
    sampling = FrameSampling("internvl_chat", min_frames=1, max_frames=count, frame_factor=1, force=True)
    assert sample_indices(total, 25.0, sampling).tolist() == expected.tolist()


def test_the_same_labels() -> None:
    readme = INTERNVL.file("README.md").read_text()
    found = re.search(r"video_prefix = ''\.join\(\[(f'.*?') for i in range", readme)
    assert found is not None
    expected = "".join(eval(found[1], {"i": i}).replace("<image>", "<img></img>") for i in range(12))
    frames = np.zeros((12, 448, 448, 3), np.uint8)
    pieces = RULE.video(Video(frames, np.arange(12), 1.0, 12, 12.0, 0.0)).pieces
    assert "".join(piece for piece in pieces if isinstance(piece, str)) + "\n" == expected
    training = INTERNVL.file("internvl_chat/internvl/train/internvl_chat_finetune.py").read_text()
    assert "'Frame-{}: <image>'.format(i + 1)" in training
    layout = re.search(r"question = '(Image-1: <image>\\nImage-2: <image>\\n)", readme)
    assert layout is not None
    shown = [RULE.for_images(2).image(frames[0], index).pieces for index in (0, 1)]
    text = ["".join(piece for piece in pieces if isinstance(piece, str)) + "\\n" for pieces in shown]
    assert "".join(text).replace("<img></img>", "<image>") == layout[1]


def test_the_same_system_prompt() -> None:
    source = INTERNVL.file("internvl_chat/internvl/conversation.py").read_text()
    for name, (system, suffix) in internvl.CONVERSATIONS.items():
        block = source[source.index(f"name='{name}'") :].split("register_conv_template")[0]
        assert f"system_message='{system}'" in block
        assert f"sep={suffix!r}" in block
