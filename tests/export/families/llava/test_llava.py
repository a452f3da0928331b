"""What LLaVA's checkpoints say, what is refused, and their prompts by every kind of tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from framefusion.errors import BudgetError, BundleError, CheckpointError, PromptError
from framefusion.export.families.llava import hf_rows as llava_hf
from framefusion.export.families.llava import row as llava
from framefusion.export.families.reading import language
from framefusion.runtime.families.llava import LlavaPreprocessing
from framefusion.runtime.media.frame_sampling import FrameSampling
from framefusion.runtime.media.video.frames import Video
from framefusion.runtime.media.visual_input import Rows, Token, VisualInput
from framefusion.runtime.text.prompt import Turn, Visual
from framefusion.runtime.text.prompt_layout import build_prompt
from framefusion.runtime.text.tokenizer import Tokenizer
from framefusion.storage.records import from_json, to_json
from tests.families import llava_checkpoints as tiny
from tests.families.llava import tokenizer_of
from tests.families.llava_hf import MISTRAL, VICUNA
from tests.llava_pictures import TILINGS

PIXELS = LlavaPreprocessing(image_size=tiny.SIGLIP_SIDE, patch_size=tiny.PATCH)


FILM = Video(np.zeros((3, 60, 90, 3), np.uint8), np.arange(3), 25.0, 75, 3.0, 0.0)


class Folder:
    """A checkpoint that holds config.json and headers alone."""

    def __init__(self, config: Mapping[str, Any], **files: Any) -> None:
        self.folder, self.config, self.files = Path("checkpoint"), dict(config), files

    def read_optional_json(self, name: str) -> Any:
        return self.files.get(name.removesuffix(".json"), {})

    def find(self, name: str) -> Path | None:
        return None

    def shape(self, key: str) -> tuple[int, ...]:
        return (24, 3, 14, 14)

    def __contains__(self, key: str) -> bool:
        return key.startswith("vision_tower.embeddings")


ORIGINAL = {
    "mm_vision_tower": "google/siglip-so400m-patch14-384", "mm_projector_type": "mlp2x_gelu",
    "mm_patch_merge_type": "spatial_unpad", "mm_newline_position": "grid", "mm_spatial_pool_mode": "bilinear",
    "image_aspect_ratio": "anyres_max_9", "image_grid_pinpoints": "(1x1),...,(6x6)", "force_sample": True,
}  # fmt: skip
SIGLIP = {"model_type": "siglip_vision_model", "image_size": 384, "patch_size": 14, "num_hidden_layers": 26}
HF = {
    "vision_config": SIGLIP,
    "image_token_index": 151646,
    "video_token_index": 151647,
    "model_type": "llava_onevision",
}
PROCESSOR = {"size": {"height": 384, "width": 384}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 3}


def test_the_released_configuration_of_llava_video() -> None:
    """27 x 27 patches, 14 x 14 rows and as many newlines as lines: 210 tokens a frame."""
    checkpoint: Any = Folder(ORIGINAL | {"add_time_instruction": True})
    rule = llava.preprocessing(checkpoint)
    visual = rule.video(Video(np.zeros((2, 90, 120, 3), np.uint8), np.arange(2), 1, 2, 2, 0))
    shown = [piece for piece in visual.pieces if not isinstance(piece, str)]
    assert sum(piece.labels.size if isinstance(piece, Rows) else 1 for piece in shown) == 2 * 210
    assert [piece.label for piece in shown[:28] if isinstance(piece, Token)] == list(range(14, 210, 15))
    assert isinstance(visual.pieces[-1], str)
    assert visual.tiles[0].values.shape == (2, 729, 588)
    average = rule.with_options(mm_spatial_pool_mode="average").video(FILM)
    assert average.num_rows == 3 * 13 * 13
    assert (rule.tilings[0], rule.tilings[1], len(rule.tilings)) == ((384, 384), (768, 384), 36)  # width counts first
    assert (rule.max_tiles, rule.tile_each, rule.unpad_digits, rule.round_fps) == (9, False, None, False)
    assert llava.sampling(checkpoint) == FrameSampling("llava", 1.0, 1, 64, 1, True)
    assert from_json(LlavaPreprocessing, to_json(rule)) == rule


def test_images_of_the_original_format() -> None:
    def rule(**config: Any) -> LlavaPreprocessing:
        checkpoint: Any = Folder(ORIGINAL | config)
        return llava.preprocessing(checkpoint)

    assert rule(image_aspect_ratio="anyres").max_tiles == 0
    assert rule(image_aspect_ratio="pad").tilings == ()
    assert rule(image_aspect_ratio="pad").pad_square
    assert not rule(image_aspect_ratio=None).pad_square
    assert rule(force_sample=None).round_fps


@pytest.mark.parametrize(
    ("pinpoints", "expected"),
    [
        ("(1x1),...,(2x2)", [(384, 384), (768, 384), (384, 768), (768, 768)]),
        ("(1x2),(2x1)", [(768, 384), (384, 768)]),
        ([[384, 768]], [(768, 384)]),
        ("[[384, 768], [768, 384]]", [(768, 384), (384, 768)]),
    ],
)
def test_pinpoints(pinpoints: Any, expected: list[tuple[int, int]]) -> None:
    assert llava.tilings(pinpoints, 384) == tuple(expected)


@pytest.mark.parametrize("pinpoints", [None, "", "(axb)", "(1x", [[384]], [[400, 384]], [["a", 1]], "[1, 2", [], 3])
def test_pinpoints_that_say_nothing_are_refused(pinpoints: Any) -> None:
    with pytest.raises(CheckpointError, match="is no list of sizes in tiles of 384 pixels"):
        llava.tilings(pinpoints, 384)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"mm_vision_tower": "openai/other"}, "mm_vision_tower 'openai/other' is not known, known are siglip-so400m"),
        ({"mm_vision_tower": None}, "has no mm_vision_tower"),
        ({"mm_projector_type": None}, "has no mm_projector_type"),
        ({"mm_projector_type": "linear"}, "mm_projector_type is 'linear'"),
        ({"mm_patch_merge_type": "flat"}, "mm_patch_merge_type is 'flat'"),
        ({"mm_resampler_type": "qformer"}, "mm_resampler_type is 'qformer'"),
        ({"add_faster_video": True}, "add_faster_video is True"),
        ({"mm_spatial_pool_mode": "max"}, "mm_spatial_pool_mode 'max', supported are average, bilinear"),
        ({"mm_newline_position": "corner"}, "mm_newline_position 'corner', supported are one_token"),
        ({"image_grid_pinpoints": None}, "image_grid_pinpoints None"),
    ],
)
def test_other_models_of_the_original_format_are_refused(changed: dict[str, Any], words: str) -> None:
    checkpoint: Any = Folder(ORIGINAL | changed)
    with pytest.raises(CheckpointError, match=words):
        llava.preprocessing(checkpoint)


def hf(config: dict[str, Any], **files: Any) -> Any:
    return Folder({**HF, **config}, **({"preprocessor_config": PROCESSOR} | files))


def test_the_released_configuration_of_onevision() -> None:
    rule = llava_hf.onevision_preprocessing(hf({}))
    assert rule.tilings == TILINGS
    assert (rule.max_tiles, rule.tile_each, rule.unpad_digits, rule.crop) == (9, False, 7, False)
    visual = rule.video(FILM)
    assert [type(piece) for piece in visual.pieces] == [Rows, Token]
    assert visual.num_rows == 3 * 196
    assert llava_hf.vision(hf({})).depth == 26
    assert llava_hf.sampling(hf({}), 32) == FrameSampling("uniform", 1.0, 1, 32, 1, True)
    rated = hf({}, video_preprocessor_config=PROCESSOR | {"fps": 2})
    assert llava_hf.sampling(rated, 32) == FrameSampling("uniform", 2.0, 1, 32, 1, False)


def test_processors_in_one_file() -> None:
    """transformers 5 saves them within processor_config.json."""
    told = {"image_processor": PROCESSOR, "video_processor": PROCESSOR | {"num_frames": 16}}
    checkpoint: Any = Folder(HF, processor_config=told)
    assert llava_hf.onevision_preprocessing(checkpoint).image_mean == (0.5, 0.5, 0.5)
    assert llava_hf.sampling(checkpoint, 32).max_frames == 16


@pytest.mark.parametrize(
    ("config", "files", "words"),
    [
        ({"vision_feature_layer": [-2, -1]}, {}, r"vision_feature_layer \[-2, -1\] is not one layer"),
        ({"vision_feature_layer": 40}, {}, "vision_feature_layer 40 is not one layer of the 26"),
        ({"vision_aspect_ratio": "pad"}, {}, "vision_aspect_ratio 'pad'"),
        ({"vision_config": None}, {}, "has no vision_config"),
        ({"image_grid_pinpoints": [[100, 384]]}, {}, "not all in whole tiles of 384"),
        (
            {},
            {"preprocessor_config": {"size": {"height": 336, "width": 336}}},
            r"pictures of \[336\], the tower takes 384",
        ),
        ({}, {"preprocessor_config": {"size": {"shortest_edge": 384}}}, "image_mean and image_std must be"),
        ({}, {"video_preprocessor_config": PROCESSOR | {"image_mean": [0, 0, 0]}}, "image_mean and image_std must be"),
    ],
)
def test_other_models_of_transformers_are_refused(config: Any, files: Any, words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        llava_hf.onevision_preprocessing(hf(config, **files))


def test_other_poolings_are_refused() -> None:
    with pytest.raises(CheckpointError, match="pools by 'max' with stride 2"):
        llava_hf.next_preprocessing(hf({"spatial_pool_mode": "max"}))
    with pytest.raises(CheckpointError, match="pools by 'average' with stride 4"):
        llava_hf.next_preprocessing(hf({"spatial_pool_stride": 4}))


def test_options_that_do_not_apply_are_refused() -> None:
    assert PIXELS.with_options(mm_spatial_pool_mode="average", max_pixels=None).mm_spatial_pool_mode == "average"
    with pytest.raises(BudgetError, match="--max-pixels 100 does not apply to this family"):
        PIXELS.with_options(max_pixels=100)
    with pytest.raises(
        BudgetError, match=r"--frame-label 'F\{\}: ' does not apply to this family \(.*\); leave it out$"
    ):
        PIXELS.with_options(frame_label="F{}: ")
    with pytest.raises(BundleError, match="a tiling whole pictures"):
        replace(PIXELS, tilings=((100, 72),))


def seen(count: int = 4) -> VisualInput:
    return VisualInput((), (Rows(np.arange(count), pad="<video>"),))


@pytest.mark.parametrize("words", ["", "first", "always", "legacy"])
@pytest.mark.parametrize("begin", ["", "<|endoftext|>"])
def test_prompts_of_every_kind_of_tokenizer(words: str, begin: str, tmp_path: Path) -> None:
    """Ids equal those of the whole text read at once, the mark of its first word included."""
    from framefusion.export.checkpoints.checkpoint import Checkpoint

    ids = tiny.write_tokenizer(tmp_path, begin=begin, words=words)
    config = {
        "image_token_index": ids["<image>"],
        "video_token_index": ids["<video>"],
        "model_type": "llava_next_video",
    }
    tiny.write_json(tmp_path, config=config, chat_template={"chat_template": VICUNA})
    template = llava_hf.template(Checkpoint(tmp_path))
    turns = [Turn("user", (Visual.VIDEO, " Say  it.")), Turn("assistant", ("a",)), Turn("user", ("Why?",))]
    prompt = build_prompt(template, Tokenizer.from_file(tmp_path / "tokenizer.json"), turns, [seen()])
    text = f"USER: {'<video>' * 4}\n Say  it. ASSISTANT: a USER: Why? ASSISTANT:"
    assert prompt.token_ids.tolist() == tokenizer_of(tmp_path)(text).input_ids


def test_a_template_that_knows_images_only_shows_videos_in_their_place(tmp_path: Path) -> None:
    """As the script that converted LLaVA-NeXT-Video wrote it."""
    from framefusion.export.checkpoints.checkpoint import Checkpoint

    ids = tiny.write_tokenizer(tmp_path)
    config = {"image_token_index": ids["<image>"], "video_token_index": ids["<video>"]}
    only = VICUNA.replace("{% for kind in ('image', 'video') %}", "").replace("equalto', kind", "equalto', 'image'")
    only = only.replace("'<' + kind + '>\n'", "'<image>\n'").replace("{% endfor %}{% endfor %}", "{% endfor %}", 1)
    tiny.write_json(tmp_path, config=config, chat_template={"chat_template": only})
    ours = llava_hf.template(Checkpoint(tmp_path))
    tiny.write_json(tmp_path, chat_template={"chat_template": VICUNA})
    assert ours == replace(llava_hf.template(Checkpoint(tmp_path)), images_first=False)


def test_images_stand_before_videos_where_the_template_has_it_so(tmp_path: Path) -> None:
    """The rows still go where each visual stands, in the order in which they were given."""
    from framefusion.export.checkpoints.checkpoint import Checkpoint

    ids = tiny.write_tokenizer(tmp_path)
    config = {"image_token_index": ids["<image>"], "video_token_index": ids["<video>"]}
    tiny.write_json(tmp_path, config=config, chat_template={"chat_template": VICUNA})
    template = llava_hf.template(Checkpoint(tmp_path))
    assert template.images_first
    image = VisualInput((), (Rows(np.arange(2), pad="<image>"),))
    turns = [Turn("user", (Visual.VIDEO, Visual.IMAGE, "Same?", Visual.VIDEO))]
    prompt = build_prompt(template, Tokenizer.from_file(tmp_path / "tokenizer.json"), turns, [seen(4), image, seen(3)])
    text = f"USER: {'<image>' * 2}\n{'<video>' * 4}\n{'<video>' * 3}\nSame? ASSISTANT:"
    assert prompt.token_ids.tolist() == tokenizer_of(tmp_path)(text).input_ids
    shown = prompt.token_ids[prompt.row_places]
    assert shown.tolist() == [ids["<video>"]] * 4 + [ids["<image>"]] * 2 + [ids["<video>"]] * 3
    assert prompt.labels[prompt.row_places].tolist() == [2, 3, 4, 5, 0, 1, 6, 7, 8]


def test_a_template_that_says_the_system_twice_has_no_system_turn(tmp_path: Path) -> None:
    """As LLaVA-NeXT-Video's own does; its users never had such a turn either."""
    from framefusion.export.checkpoints.checkpoint import Checkpoint

    ids = tiny.write_tokenizer(tmp_path)
    config = {"image_token_index": ids["<image>"], "video_token_index": ids["<video>"]}
    tiny.write_json(tmp_path, config=config, chat_template={"chat_template": VICUNA})
    template = llava_hf.template(Checkpoint(tmp_path))
    with pytest.raises(PromptError, match="no system turn"):
        build_prompt(template, Tokenizer.from_file(tmp_path / "tokenizer.json"), [Turn("system", ("Be brief.",))], [])


def test_a_checkpoint_without_chat_template(tmp_path: Path) -> None:
    from framefusion.export.checkpoints.checkpoint import Checkpoint

    ids = tiny.write_tokenizer(tmp_path)
    config = {"image_token_index": ids["<image>"], "video_token_index": ids["<video>"]}
    tiny.write_json(tmp_path, config=config | {"text_config": {"model_type": "qwen2"}})
    assert llava_hf.template(Checkpoint(tmp_path)).after_visual == "\n"
    tiny.write_json(tmp_path, config=config | {"text_config": {"model_type": "llama"}})
    with pytest.raises(CheckpointError, match=r"has no chat template: add chat_template\.jinja"):
        llava_hf.template(Checkpoint(tmp_path))


def limits(folder: Path, **options: Any) -> tuple[int, int]:
    from framefusion.export.checkpoints.checkpoint import Checkpoint
    from framefusion.export.options import BuildOptions
    from framefusion.export.plan.build_plan import BuildPlan

    told = BuildPlan(Checkpoint(folder), BuildOptions(**options)).limits
    return told.max_input_len, told.max_kv_cache_capacity


def test_a_bundle_has_room_for_the_video_that_its_family_samples(tmp_path: Path) -> None:
    """64 frames of LLaVA-Video are 13440 rows; the plan's usual 8192 tokens would refuse every prompt."""
    tiny.write_original(tmp_path, max_position_embeddings=32768)
    assert limits(tmp_path) == (8192, 9216)
    assert limits(tmp_path, max_frames=1000)[0] == 1000 * (12 + 9) + 64 + 512
    assert limits(tmp_path, max_frames=4000)[0] == 32768
    assert limits(tmp_path, max_frames=1000, max_input_len=100)[0] == 100
    released = replace(PIXELS, image_size=384, time_instruction=True)
    assert released.video_tokens(64) >= 64 * 210 + 483  # counted with Qwen2's tokenizer


def test_no_bundle_is_built_for_more_than_an_attention_window(tmp_path: Path) -> None:
    """Mistral's is 4096 where its configuration does not say null."""
    tiny.write_hf(tmp_path, "LlavaNextVideo", MISTRAL, text="mistral")
    assert limits(tmp_path) == (3072, 4096)
    with pytest.raises(CheckpointError, match="--max-kv-cache-capacity 5000 is beyond sliding_window 4096"):
        limits(tmp_path, max_kv_cache_capacity=5000)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["sliding_window"] = None
    tiny.write_json(tmp_path, config=config)
    assert limits(tmp_path) == (8192, 9216)
    assert language.attention_window({"model_type": "qwen2", "sliding_window": 131072}) is None
    assert language.attention_window({"sliding_window": 4096, "use_sliding_window": False}) is None
    assert language.attention_window({"sliding_window": 4096, "use_sliding_window": True}) == 4096


def build(folder: Path, **options: Any) -> Any:
    from framefusion.export.build import build as build_bundle
    from framefusion.export.checkpoints.checkpoint import Checkpoint
    from framefusion.export.options import BuildOptions

    return build_bundle(Checkpoint(folder), folder.parent / "bundle", BuildOptions(cost=0.5, **options))
