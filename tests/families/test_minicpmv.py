"""MiniCPM-V's own rules one by one: slices, position buckets, frames picked, labels, checkpoints that are refused."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from framefusion.errors import BundleError, CheckpointError, VideoError
from framefusion.export.build import build
from framefusion.export.checkpoints.checkpoint import Checkpoint
from framefusion.export.checkpoints.tensors.weights import load_parameters
from framefusion.export.families.minicpmv import row as minicpmv
from framefusion.export.families.minicpmv import weights as minicpmv_tower
from framefusion.export.options import BuildOptions
from framefusion.runtime.bundle import Bundle
from framefusion.runtime.families.minicpmv import (
    Layout,
    MiniCpmVPreprocessing,
    ResamplerSettings,
    layout_of,
    longest_side,
)
from framefusion.runtime.media.frame_sampling import FrameSampling, sample_indices
from framefusion.runtime.media.video.frames import Video, read_video
from framefusion.runtime.media.visual_input import Grid, Tiles
from framefusion.runtime.pipeline import Pipeline, Request
from framefusion.runtime.request import Stopwatch
from framefusion.runtime.text.positions import sincos_table
from framefusion.runtime.text.prompt import Prompt, Turn, Visual
from framefusion.runtime.text.prompt_layout import build_prompt
from framefusion.runtime.text.tokenizer import Tokenizer
from framefusion.storage.records import from_json, to_json
from tests.families.case import clip, picture, relative_error
from tests.families.minicpmv import QUERIES, SCALE, MiniCpmVCase, MiniCpmVReference, write_checkpoint
from tests.films import write_film
from tests.tiers import in_tiers

RELEASED = MiniCpmVPreprocessing(query_num=64, scale_resolution=448, image_slices=9)
TINY = MiniCpmVPreprocessing(query_num=QUERIES, scale_resolution=SCALE, image_slices=9)
SAMPLING = FrameSampling("minicpmv", fps=1.0, min_frames=1, max_frames=64, frame_factor=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("minicpmv") / "tiny")


def as_video(frames: Any) -> Video:
    return Video(frames, np.arange(len(frames)), 1.0, len(frames), float(len(frames)), 0.0)


# ---- how pictures are cut


# The first four are in families.md 4.3, the others were worked out with the released image processor's code.
@pytest.mark.parametrize(
    ("size", "most", "expected"),
    [
        ((640, 360), 2, Layout((24, 43), (1, 2), (34, 30))),
        ((1280, 720), 2, Layout((24, 43), (1, 2), (34, 30))),
        ((1920, 1080), 2, Layout((24, 43), (1, 2), (34, 30))),
        ((480, 360), 2, Layout((28, 37), (0, 0), (0, 0))),
        ((360, 640), 2, Layout((43, 24), (2, 1), (30, 34))),
        ((1920, 1080), 1, Layout((24, 43), (0, 0), (0, 0))),
        ((1920, 1080), 9, Layout((24, 43), (2, 4), (34, 30))),
        ((1280, 720), 9, Layout((24, 43), (2, 3), (29, 35))),
        ((1344, 1344), 9, Layout((32, 32), (3, 3), (32, 32))),
        ((4000, 3000), 9, Layout((28, 37), (3, 3), (28, 37))),
        ((3000, 200), 9, Layout((8, 123), (1, 4), (16, 62))),
        ((500, 500), 2, Layout((32, 32), (2, 1), (23, 45))),  # as far from square either way: fewer columns
        ((448, 448), 9, Layout((32, 32), (0, 0), (0, 0))),
        ((1, 1), 9, Layout((32, 32), (0, 0), (0, 0))),
    ],
)
def test_slices_of_the_released_processor(size: tuple[int, int], most: int, expected: Layout) -> None:
    width, height = size
    assert layout_of(height, width, most, RELEASED) == expected


def test_every_picture_is_near_the_square_and_within_the_longest_side() -> None:
    random = np.random.default_rng(0)
    for _ in range(3000):
        height = int(random.integers(1, 2000))
        width = int(random.integers(math.ceil(height / 200), min(height * 200, 2000) + 1))
        layout = layout_of(height, width, 9, RELEASED)
        for sides in filter(any, (layout.overview, layout.slice)):
            assert max(sides) <= longest_side(RELEASED)
            assert 0.5 < sides[0] * sides[1] / 32**2 < 2.6  # thin pictures round to one or two rows
        assert layout.num_slices <= 9


def test_a_thread_is_refused() -> None:
    with pytest.raises(VideoError, match="2010x10 is too long and thin, the limit is 200 to 1"):
        layout_of(10, 2010, 9, RELEASED)


def test_tokens_of_a_frame() -> None:
    """families.md 4.3: 67 without slices, 199 with two side by side, 200 with one above the other."""
    for size, tokens in (((360, 480), 67), ((360, 640), 199), ((640, 360), 200)):
        visual = RELEASED.video(as_video(np.zeros((3, *size, 3), np.uint8)))
        labels = np.concatenate([np.atleast_1d(p[0] if hasattr(p, "pad") else p[1]) for p in visual.pieces[1:]])
        assert labels.tolist() == (np.arange(3 * tokens - 2) % tokens).tolist()
        assert visual.joint == tokens - 2


# ---- what the tower is given


def test_places_are_torchs_buckets_for_every_size() -> None:
    """The released code's lines, for every number of patches that any picture can have along an axis."""
    longest = longest_side(RELEASED)
    settings = ResamplerSettings(rows=64, width=8, side=70, off_floor=minicpmv_tower.off_floor(70, longest))
    boundaries = torch.arange(1 / 70, 1.0, 1 / 70)
    for count in range(1, longest + 1):
        steps: Any = 1 / torch.tensor([count, 3], dtype=torch.int32)  # tensors, as the released code has them
        down, across = (torch.bucketize(torch.arange(0, 1 - 1e-6, step), boundaries, right=True) for step in steps)
        expected = (down[:, None] * 70 + across).flatten().numpy()
        call = settings.call(Tiles(np.zeros((1, count * 3, 588), np.float32), Grid(1, count, 3)), head_dim=0)
        np.testing.assert_array_equal(call.inputs["places"], expected, err_msg=f"{count} rows")
        assert call.rows == 64


def test_rounding_moves_some_places() -> None:
    """The sizes that families.md 4.2 names, found by running the released code."""
    moved = sorted({count for count, _, _ in minicpmv_tower.off_floor(70, 70)})
    assert moved == [25, 49, 50, 55, 58]


@pytest.mark.parametrize(("rows", "columns", "width"), [(24, 43, 3584), (1, 1, 8), (70, 70, 256)])
def test_sincos_table_against_fp64(rows: int, columns: int, width: int) -> None:
    frequency = 10000.0 ** -(np.arange(width // 4) / (width // 4))
    row, column = (axis.reshape(-1, 1) * frequency for axis in np.indices((rows, columns)).astype(np.float64))
    expected = np.concatenate([np.sin(column), np.cos(column), np.sin(row), np.cos(row)], 1)
    # An angle of 70 in fp32 is off by 4e-6, and its sine by as much.
    np.testing.assert_allclose(sincos_table(rows, columns, width), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("rows", "columns"), [(3, 25), (50, 2), (55, 4), (7, 5), (1, 71)])
def test_features_of_any_shape(folder: Path, rows: int, columns: int) -> None:
    """The torch graph against Idefics2VisionTransformer and MultiheadAttention, where rounding moves places too.

    fp32 against fp32 in another order of sums; one wrong place is an error of 1e-2.
    """
    plan = minicpmv_tower.tower(Checkpoint(folder))
    module = load_parameters(plan.module, Checkpoint(folder), plan.sources, torch.float32)
    torch.manual_seed(rows)
    pixels = torch.rand(1, 3, rows * 14, columns * 14) * 2 - 1
    patches = torch.nn.functional.unfold(pixels, 14, stride=14).mT
    call = plan.settings.call(Tiles(patches.numpy(), Grid(1, rows, columns)), plan.head_dim)
    reference = MiniCpmVReference(folder)
    with torch.inference_mode():
        ours = module(patches, *(torch.from_numpy(call.inputs[name]) for name in ("places", "sincos")))
        hidden = reference.vpm(pixels).last_hidden_state[0]
        theirs = reference.resampler(hidden, rows, columns)
    assert relative_error(ours.numpy(), theirs.numpy()) < 1e-5


def test_slices_stand_behind_their_overview(folder: Path) -> None:
    """Rows of the tower are sorted by size of picture, rows of the prompt by frame."""
    visual = TINY.video(as_video(clip(3)))
    assert visual.rows is not None
    marks = np.arange(3 * 3 * QUERIES, dtype=np.float32)[:, None]
    order = visual.rows.apply(marks).reshape(3, 3, QUERIES)
    for frame in range(3):
        starts = [frame * QUERIES, (3 + 2 * frame) * QUERIES, (4 + 2 * frame) * QUERIES]
        assert order[frame, :, 0].tolist() == starts


def test_an_image_of_four_slices(folder: Path) -> None:
    shown, case = picture(120, 160), MiniCpmVCase()
    visual = TINY.image(shown)
    for tiles, expected in zip(visual.tiles, case.pixels(folder, shown), strict=True):
        np.testing.assert_allclose(tiles.values, expected, rtol=0, atol=1e-6)
    prompt = asked(folder, [Turn("user", (Visual.IMAGE, "What?"))], [visual])
    assert prompt.token_ids.tolist() == case.prompt_ids(folder, [Turn("user", (Visual.IMAGE, "What?"))], [shown])
    assert prompt.labels.tolist() == case.labels(folder, prompt.token_ids.tolist(), [shown])
    assert prompt.num_visual == 5 * QUERIES


# ---- prompts


def asked(folder: Path, turns: list[Turn], visuals: list[Any]) -> Prompt:
    template = minicpmv.ROW.template(Checkpoint(folder))
    return build_prompt(template, Tokenizer.from_file(folder / "tokenizer.json"), turns, visuals)


def test_labels_of_two_frames(folder: Path) -> None:
    """Written out: the first tag is text, tags and line feeds are places, so is the line feed behind the last tag."""
    visual = TINY.video(as_video(clip(2, 70, 70)))
    turns = [Turn("user", (Visual.VIDEO, "Hm"))]
    prompt = asked(folder, turns, [visual])
    tokenizer = Tokenizer.from_file(folder / "tokenizer.json")
    start, end, unknown = (tokenizer.control_id(token) for token in ("<image>", "</image>", "<unk>"))
    (line_feed,) = tokenizer.encode_plain("\n")
    first = prompt.token_ids.tolist().index(start)
    shown = [start, *[unknown] * 4, end, line_feed, start, *[unknown] * 4, end, line_feed]
    assert prompt.token_ids.tolist()[first : first + 14] == shown
    assert prompt.labels.tolist()[first : first + 15] == [-1, 0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4, 5, -1]
    assert prompt.num_visual == 2 * 7 - 1


def test_what_ends_a_turn_is_text(folder: Path) -> None:
    """The reference types whatever follows a video; a token that ends the turn is never dropped here."""
    prompt = asked(folder, [Turn("user", ("See:", Visual.VIDEO))], [TINY.video(as_video(clip(2, 70, 70)))])
    assert prompt.labels.max() == 6
    last = np.flatnonzero(prompt.labels >= 0)[-1]
    tokenizer = Tokenizer.from_file(folder / "tokenizer.json")
    assert prompt.token_ids[last : last + 2].tolist() == [tokenizer.control_id(t) for t in ("</image>", "<|im_end|>")]


def test_a_question_that_begins_with_a_line_feed(folder: Path) -> None:
    """The separator is read with the question, as one text: the token that comes of it is the one with a label."""
    turns, video = [Turn("user", (Visual.VIDEO, "\nWhat?"))], as_video(clip(2, 70, 70))
    prompt, case = asked(folder, turns, [TINY.video(video)]), MiniCpmVCase()
    assert prompt.token_ids.tolist() == case.prompt_ids(folder, turns, [video])
    assert prompt.labels.tolist() == case.labels(folder, prompt.token_ids.tolist(), [video])


def test_a_video_of_one_frame_has_no_typed_tags(folder: Path) -> None:
    """The reference fails on it: there is no second frame to measure the first one by."""
    prompt = asked(folder, [Turn("user", (Visual.VIDEO, "Hm"))], [TINY.video(as_video(clip(1)))])
    labels = prompt.labels[prompt.labels >= 0]
    assert labels.tolist() == list(range(3 * QUERIES))
    unknown = Tokenizer.from_file(folder / "tokenizer.json").control_id("<unk>")
    np.testing.assert_array_equal(prompt.labels >= 0, prompt.token_ids == unknown)


def test_an_exclamation_mark_is_a_token(folder: Path) -> None:
    """Its id is 0, which the released code takes for padding: masked in prompts, cut out of answers."""
    plain, marked = (asked(folder, [Turn("user", (text,))], []).token_ids for text in ("Go", "Go!!"))
    assert np.count_nonzero(plain == 0) == 0
    assert np.count_nonzero(marked == 0) == 2
    assert Tokenizer.from_file(folder / "tokenizer.json").decode([0, 0]) == "!!"


@pytest.mark.slow
def test_a_bundle_sees_exclamation_marks_and_slices(folder: Path, tmp_path: Path) -> None:
    """Logits equal those of an unmasked Qwen2, and not those of the mask that the released code makes."""
    options = BuildOptions(reduction="none", max_input_len=1024, max_slice_nums=1)
    built = build(Checkpoint(folder), tmp_path / "bundle", options, verify=False)
    pipeline, reference = Pipeline(Bundle(built.folder), threads=1), MiniCpmVReference(folder)
    turns = [Turn("user", (Visual.IMAGE, "Look! Is it there!?"))]
    prompt, rows = pipeline.read(turns, [picture(120, 160)])
    assert np.count_nonzero(prompt.token_ids == 0) == 2
    ours = pipeline.prefill(prompt, rows, Request(max_new_tokens=1), Stopwatch()).logits
    theirs = reference.logits(prompt, [picture(120, 160)], [])[-1]
    assert relative_error(ours, theirs) < MiniCpmVCase.limit
    with torch.inference_mode():
        mask = torch.from_numpy(prompt.token_ids != 0)[None].long()
        masked = reference.llm(inputs_embeds=torch.from_numpy(rows.hidden)[None], attention_mask=mask).logits[0, -1]
    assert relative_error(masked.numpy(), theirs) > 100 * MiniCpmVCase.limit
    video, _ = pipeline.read([Turn("user", (Visual.VIDEO, "What?"))], [clip(2)])
    assert np.count_nonzero(video.labels >= 0) == 2 * (QUERIES + 3) - 1  # an overview each, as --max-slice-nums 1 asks


# ---- frames of a film


SHOWN_FILMS = [(1, 25), (26, 25), (24, 25), (64, 1), (65, 1), (200, 2), (130, 1)]  # frames, and frames a second


@pytest.mark.parametrize(("frames", "rate"), in_tiers(SHOWN_FILMS, fast=2, several=True))
def test_frames_of_films(tmp_path: Path, frames: int, rate: int) -> None:
    film = write_film(tmp_path / "film.mp4", frames=frames, fps=rate, size=32)
    assert read_video(film, SAMPLING).indices.tolist() == MiniCpmVCase().indices(frames, rate)


def test_rates_that_are_no_whole_numbers() -> None:
    for rate in (29.97, 23.976, 24.5, 25.5, 59.94, 0.51, 12.5):
        for total in (1, 30, 1000, 5000):
            assert sample_indices(total, rate, SAMPLING).tolist() == MiniCpmVCase().indices(total, rate), (rate, total)


def test_a_slower_film_than_a_frame_in_two_seconds() -> None:
    """The released example divides by zero: round(0.4) is 0. Every frame is seen."""
    assert sample_indices(5, 0.4, SAMPLING).tolist() == [0, 1, 2, 3, 4]


def test_fps_and_max_frames_can_be_chosen() -> None:
    assert sample_indices(100, 10.0, replace(SAMPLING, fps=2.0)).tolist() == list(range(0, 100, 5))
    assert sample_indices(100, 10.0, replace(SAMPLING, max_frames=4)).tolist() == [10, 30, 60, 80]


# ---- what a checkpoint says


def test_a_checkpoint_tells(folder: Path) -> None:
    told = minicpmv.preprocessing(Checkpoint(folder))
    assert told == TINY
    assert from_json(type(told), to_json(told)) == told
    assert minicpmv.ROW.terminators == ("<|im_end|>", "<|endoftext|>")


def test_the_layout_without_a_chat_template_is_the_same(folder: Path, tmp_path: Path) -> None:
    bare = write_checkpoint(tmp_path / "bare", changes={"tokenizer_config": {"chat_template": None}})
    told, own = (minicpmv.ROW.template(Checkpoint(where)) for where in (folder, bare))
    assert told == own
    assert own.part_separator == "\n"


def test_slices_can_be_chosen(folder: Path) -> None:
    told = minicpmv.preprocessing(Checkpoint(folder)).with_options(max_slice_nums=1)
    assert (told.max_slice_nums, told.image_slices) == (1, 9)
    assert [len(tiles.values) for tiles in told.video(as_video(clip(2))).tiles] == [2]
    with pytest.raises(BundleError, match="max_slice_nums 0 is impossible"):
        replace(told, max_slice_nums=0)


def config(**changes: Any) -> dict[str, dict[str, Any]]:
    return {"config": changes}


def processor(**changes: Any) -> dict[str, dict[str, Any]]:
    return {"preprocessor_config": changes}


VISION = {"hidden_size": 32, "image_size": 980, "num_attention_heads": 2, "num_hidden_layers": 3, "patch_size": 14}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (config(version=2.5), "version 2.5: of the MiniCPM-V checkpoints only version 2.6"),
        (config(version=None), "version None"),
        (config(query_num=None), "has no query_num"),
        (config(query_num=8) | processor(image_feature_size=8), "query_num is 8, resampler.query has 4 rows"),
        (config(query_num=8), "query_num is 8, resampler.query has 4 rows"),
        (processor(scale_resolution=None), "scale_resolution, config.json: slice_config.scale_resolution"),
        (processor(max_slice_nums=4), "max_slice_nums = 4, config.json: slice_config.max_slice_nums = 9"),
        (processor(use_image_id=None) | config(use_image_id=None), "use_image_id"),
        (processor(slice_mode=False) | config(slice_mode=False), "slice_mode false"),
        (processor(unk="<blank>"), "tokenizer.json has no token <blank>"),
        (config(vision_config=None), "has no vision_config"),
        (config(vision_config=VISION | {"image_size": 448}), "image_size 448 in patches of 14"),
        (config(vision_config=VISION | {"num_hidden_layers": 27}), "3 layers .*num_hidden_layers is 27:"),
        (config(vision_config=VISION | {"num_hidden_layers": 2}), "3 layers .*num_hidden_layers is 2:"),
        (config(vision_config=VISION | {"num_hidden_layers": 1}), "3 layers .*num_hidden_layers is 1:"),
        (config(vision_config=VISION | {"hidden_act": "relu"}), "hidden_act 'relu'"),
        (config(drop_vision_last_layer=True), "drop_vision_last_layer is True"),
    ],
)
def test_what_is_refused(tmp_path: Path, changes: dict[str, dict[str, Any]], words: str) -> None:
    checkpoint = Checkpoint(write_checkpoint(tmp_path / "c", changes=changes))
    with pytest.raises(CheckpointError, match=words):
        minicpmv_tower.tower(checkpoint)


def test_both_spellings_of_the_version_and_of_the_last_layer(tmp_path: Path) -> None:
    changes = config(version="2.6", drop_vision_last_layer=True)
    dropped = Checkpoint(write_checkpoint(tmp_path / "dropped", drop_last=True, changes=changes))
    assert minicpmv_tower.encoder_config(dropped).depth == 2
    whole = Checkpoint(write_checkpoint(tmp_path / "whole", changes=config(drop_vision_last_layer=False)))
    assert minicpmv_tower.encoder_config(whole).depth == 3
