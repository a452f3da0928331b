"""What is InternVL's alone: tiles, segments, layouts, ends of answers, and checkpoints that are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from framefusion.errors import BudgetError, BundleError, CheckpointError, UnknownFamilyError
from framefusion.export.checkpoints.checkpoint import Checkpoint
from framefusion.export.families import family_of
from framefusion.export.families.internvl import row as internvl
from framefusion.export.families.internvl import weights as internvl_tower
from framefusion.export.options import BuildOptions
from framefusion.export.plan.build_plan import BuildPlan
from framefusion.runtime.families.internvl import InternVLPreprocessing
from framefusion.runtime.generation.prefill import prefill
from framefusion.runtime.generation.token_rows import TokenRows
from framefusion.runtime.media.frame_sampling import FrameSampling, sample_indices
from framefusion.runtime.media.sources import as_image, as_video
from framefusion.runtime.media.visual_input import Rows
from framefusion.runtime.request import Stopwatch
from framefusion.runtime.text.prompt import TurnLayout
from tests.families.case import CONVERSATIONS, FamilyCase, Media, picture, relative_error
from tests.families.eager import eager_pipeline
from tests.families.internvl import ChatCase, InternLM2Case, NativeCase, chosen_grid
from tests.families.internvl_checkpoints import CHAT_TEMPLATE, MAX_TILES, TILE, write_chat, write_native
from tests.families.llava_checkpoints import write_json

OPTIONS = BuildOptions()
Change = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {name: tmp_path_factory.mktemp(name) for name in ("qwen2", "internlm2", "native")}
    write_chat(made["qwen2"], "small", "qwen2")
    write_chat(made["internlm2"], "small", "internlm2")
    write_native(made["native"], "qwen2")
    return made


def changed(folder: Path, target: Path, name: str, change: Change) -> Checkpoint:
    """The checkpoint with one of its JSON files changed."""
    for path in folder.iterdir():
        (target / path.name).hardlink_to(path)
    content = json.loads((folder / f"{name}.json").read_text()) if (folder / f"{name}.json").exists() else {}
    change(content)
    (target / f"{name}.json").unlink(missing_ok=True)
    write_json(target, **{name: content})
    return Checkpoint(target)


def told(**values: Any) -> Change:
    return lambda content: content.update(values)


def nested(part: str, **values: Any) -> Change:
    return lambda content: content[part].update(values)


REFUSED: tuple[tuple[str, str, Change, str], ...] = (
    ("qwen2", "config", told(ps_version="v1"), "ps_version is 'v1', supported is 'v2' only"),
    ("qwen2", "config", lambda content: content.pop("ps_version"), "ps_version is 'v1'"),
    ("qwen2", "config", told(pad2square=True), "pad2square is True"),
    ("qwen2", "config", told(template="phi3-chat"), "template 'phi3-chat', supported are internvl2_5"),
    ("qwen2", "config", lambda content: content.pop("template"), "config.json has no template"),
    ("qwen2", "config", told(downsample_ratio=0.4), "downsample_ratio 0.4"),
    ("qwen2", "config", told(downsample_ratio=0.3333), "downsample_ratio 0.3333"),
    ("qwen2", "config", told(select_layer=[-1, -2]), r"shows layer \[-1, -2\] of the vision tower"),
    ("qwen2", "config", told(select_layer=-5), "shows layer -5"),
    ("qwen2", "config", told(force_image_size=84), "17 positions, tiles of 6 x 6 patches need 37"),
    ("qwen2", "config", nested("vision_config", hidden_act="quick_gelu"), "hidden_act is 'quick_gelu'"),
    ("qwen2", "config", nested("llm_config", rope_scaling={"type": "linear", "factor": 2.0}), "rope type 'linear'"),
    ("internlm2", "config", nested("llm_config", rope_scaling={"type": "yarn", "factor": 2.0}), "rope type 'yarn'"),
    ("internlm2", "config", nested("llm_config", num_key_value_heads=1), "attention.wqkv"),
    ("native", "config", told(vision_feature_select_strategy="full"), "vision_feature_select_strategy is 'full'"),
    ("native", "config", told(projector_hidden_act="relu"), "projector_hidden_act is 'relu'"),
    ("native", "config", told(vision_feature_layer=[-1]), r"shows layer \[-1\]"),
    ("native", "config", nested("vision_config", image_size=[56, 84]), r"image_size \[56, 84\]: only squares"),
    ("native", "config", nested("vision_config", use_mask_token=True), "use_mask_token is True"),
    ("native", "preprocessor_config", lambda content: content.pop("image_mean"), "has no image_mean"),
    ("native", "preprocessor_config", told(size={"height": 448, "width": 448}), "a processor has size"),
    ("native", "preprocessor_config", told(do_normalize=False), "do_normalize is False"),
    ("native", "video_preprocessor_config", told(image_std=[0.5] * 3), "different image_std"),
    ("native", "video_preprocessor_config", told(initial_shift=0), "initial_shift is 0"),
)


@pytest.mark.parametrize(("kind", "name", "change", "message"), REFUSED, ids=[case[3] for case in REFUSED])
def test_refusals(kind: str, name: str, change: Change, message: str, folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        BuildPlan(changed(folders[kind], tmp_path, name, change), OPTIONS)


def test_one_number_for_three_channels_and_null_for_a_default(folders: dict[str, Path], tmp_path: Path) -> None:
    values = {"image_mean": 0.5, "image_std": 0.25, "max_patches": None, "min_patches": None}
    (tmp_path / "image").mkdir()
    first = changed(folders["native"], tmp_path / "image", "preprocessor_config", told(**values))
    (tmp_path / "both").mkdir()
    both = changed(first.folder, tmp_path / "both", "video_preprocessor_config", told(**values))
    rule = BuildPlan(both, OPTIONS).preprocessing
    assert isinstance(rule, InternVLPreprocessing)
    assert (rule.image_mean, rule.image_std, rule.min_tiles, rule.max_tiles) == ((0.5,) * 3, (0.25,) * 3, 1, 12)


def test_an_llm_that_nobody_declared_is_refused_by_its_name(folders: dict[str, Path], tmp_path: Path) -> None:
    phi = changed(folders["qwen2"], tmp_path, "config", nested("llm_config", architectures=["Phi3ForCausalLM"]))
    with pytest.raises(UnknownFamilyError, match="Phi3ForCausalLM"):
        family_of(phi.config)


@pytest.mark.parametrize(("kind", "row"), [("qwen2", internvl.CHAT), ("internlm2", internvl.CHAT_INTERNLM2)])
def test_the_llm_within_chooses_the_row(kind: str, row: Any, folders: dict[str, Path]) -> None:
    config = Checkpoint(folders[kind]).config
    assert family_of(config) is row
    assert family_of({key: value for key, value in config.items() if key != "architectures"}) is row


def test_dynamic_rope_is_plain_up_to_its_length(folders: dict[str, Path]) -> None:
    checkpoint = Checkpoint(folders["internlm2"])
    with pytest.raises(CheckpointError, match="32769 is beyond max_position_embeddings 32768, where dynamic RoPE"):
        BuildPlan(checkpoint, replace(OPTIONS, max_input_len=32000, max_kv_cache_capacity=32769))
    BuildPlan(checkpoint, replace(OPTIONS, max_input_len=32000, max_kv_cache_capacity=32768))


def test_layouts(folders: dict[str, Path], tmp_path: Path) -> None:
    """The authors' by name, with the begin of InternLM2's tokenizer; transformers' from the jinja template."""
    internlm2, qwen2, native = (Checkpoint(folders[kind]) for kind in ("internlm2", "qwen2", "native"))
    layout = internvl.chat_template(internlm2)
    assert (layout.begin, layout.after_visual, layout.default_system) == ("<s>", "\n", internvl.SYSTEM_2_5)
    assert layout.turns["assistant"] == TurnLayout("<|im_start|>assistant\n", "<|im_end|>\n")
    assert internvl.chat_template(qwen2) == replace(layout, begin="")
    template = internvl.native_template(native)
    assert template == replace(layout, begin="", default_system="", pads=template.pads)
    assert list(template.pads) == ["<IMG_CONTEXT>"]
    older = changed(folders["internlm2"], tmp_path, "config", told(template="internlm2-chat"))
    assert internvl.chat_template(older).turns["user"] == TurnLayout("<|im_start|>user\n", "<|im_end|>")
    assert internvl.chat_template(older).default_system == internvl.SYSTEM_2


def test_labels_are_those_of_the_version_that_the_template_names(folders: dict[str, Path], tmp_path: Path) -> None:
    new = internvl.chat_preprocessing(Checkpoint(folders["qwen2"]))
    assert (new.frame_label, new.image_label) == ("Frame-{}: ", "Image-{}: ")
    old = internvl.chat_preprocessing(changed(folders["qwen2"], tmp_path, "config", told(template="Hermes-2")))
    assert (old.frame_label, old.image_label) == ("Frame{}: ", "Image-{}: ")
    native = internvl.native_preprocessing(Checkpoint(folders["native"]))
    assert (native.frame_label, native.image_label) == ("Frame{}: ", "")
    assert new.with_options(frame_label="Frame{}: ").frame_label == "Frame{}: "
    with pytest.raises(BudgetError, match=r"a label 'Frame: ' has no place for a number: write it once as \{\}"):
        new.with_options(frame_label="Frame: ")


def test_an_image_among_others_has_a_label(folders: dict[str, Path]) -> None:
    rule = internvl.chat_preprocessing(Checkpoint(folders["qwen2"]))
    picture = np.zeros((TILE, TILE, 3), np.uint8)
    assert rule.for_images(1).image(picture, 0).pieces[0] == "<img>"
    assert [rule.for_images(2).image(picture, index).pieces[0] for index in (0, 1)] == [
        "Image-1: <img>", "Image-2: <img>",
    ]  # fmt: skip


def test_an_older_native_template_has_another_word_for_an_image(folders: dict[str, Path], tmp_path: Path) -> None:
    checkpoint = changed(folders["native"], tmp_path, "config", told())
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "chat_template.jinja").write_text(CHAT_TEMPLATE.replace("<IMG_CONTEXT>", "<image>"))
    assert internvl.native_template(checkpoint) == internvl.native_template(Checkpoint(folders["native"]))


def test_a_system_prompt_of_a_native_template_is_kept(folders: dict[str, Path], tmp_path: Path) -> None:
    checkpoint = changed(folders["native"], tmp_path, "config", told())
    (tmp_path / "chat_template.jinja").unlink()
    first = "{% if messages[0].role != 'system' %}<|im_start|>system\nBe brief.<|im_end|>\n{% endif %}"
    (tmp_path / "chat_template.jinja").write_text(first + CHAT_TEMPLATE)
    assert internvl.native_template(checkpoint).default_system == "Be brief."


@pytest.mark.parametrize("kind", ["internlm2", "qwen2", "native"])
def test_answers_end_where_the_layout_does(
    kind: str, folders: dict[str, Path], tmp_path: Path, instant_traces: None
) -> None:
    """config.json and generation_config.json name another end."""
    from framefusion.export.build import build
    from framefusion.runtime.text.tokenizer import Tokenizer

    built = build(Checkpoint(folders[kind]), tmp_path / "bundle", OPTIONS, verify=False)
    tokenizer = Tokenizer.from_file(built.folder / "tokenizer.json")
    end, also = tokenizer.control_id("<|im_end|>"), 2 if kind != "native" else tokenizer.control_id("<|endoftext|>")
    assert built.manifest.generation.eos_token_ids == (end, also)


def test_classes_defaults_are_known_where_a_file_leaves_them_out(folders: dict[str, Path], tmp_path: Path) -> None:
    """transformers 4 wrote only what differs from the defaults of a nested class: 24 layers, tiles of 448 pixels."""

    def without(content: dict[str, Any]) -> None:
        for key in ("num_hidden_layers", "image_size", "patch_size", "num_attention_heads"):
            del content["vision_config"][key]

    checkpoint = changed(folders["native"], tmp_path, "config", without)
    with pytest.raises(CheckpointError, match="17 positions, tiles of 32 x 32 patches need 1025"):
        internvl_tower.native_tower(checkpoint)


def test_tiles_of_an_image_are_chosen_like_transformers(folders: dict[str, Path]) -> None:
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

    rule = replace(internvl.native_preprocessing(Checkpoint(folders["native"])), max_tiles=12)
    for height in range(20, 1200, 37):
        for width in range(20, 1200, 41):
            columns, rows = get_optimal_tiled_canvas((height, width), (TILE, TILE), 1, 12)
            assert rule.tiling(height, width) == (rows, columns), (height, width)


@given(width=st.integers(1, 3000), height=st.integers(1, 3000))
def test_tiles_of_an_image_are_chosen_like_the_authors(width: int, height: int) -> None:
    rule = InternVLPreprocessing(tile_size=TILE, max_tiles=MAX_TILES)
    assert rule.tiling(height, width) == chosen_grid(width, height)[::-1]


def test_one_tile_needs_no_small_view() -> None:
    rule = InternVLPreprocessing(tile_size=TILE)
    wide = picture(TILE, 3 * TILE)
    for told_, tiles in ((rule, 4), (replace(rule, thumbnail=False), 3), (rule.with_options(max_tiles=1), 1)):
        shown = told_.image(wide)
        (rows,) = (piece for piece in shown.pieces if isinstance(piece, Rows))
        assert shown.tiles[0].values.shape[0] == shown.tiles[0].grid.frames == tiles
        np.testing.assert_array_equal(rows.labels, np.arange(4 * tiles))
    with pytest.raises(BundleError, match="min_tiles 3 and max_tiles 2"):
        replace(rule, min_tiles=3, max_tiles=2)
    with pytest.raises(BundleError, match="tiles of 50 pixels"):
        replace(rule, tile_size=50)
    with pytest.raises(BudgetError, match="--max-pixels 100 does not apply"):
        rule.with_options(max_pixels=100)


@pytest.mark.parametrize(("fps", "count"), [(None, 8), (1.0, None), (0.1, None), (24.0, None)])
def test_frames_are_transformers(
    fps: float | None, count: int | None, folders: dict[str, Path], tmp_path: Path
) -> None:
    """`num_frames`, or as many as `fps` makes; transformers refuses more than there are, we take all."""
    checkpoint = changed(folders["native"], tmp_path, "video_preprocessor_config", told(fps=fps, num_frames=count))
    sampling = internvl.native_sampling(checkpoint)
    for rate in (7.0, 24.0, 29.97):
        for total in (1, 2, 7, 8, 9, 100, 333, 1999):
            asked = count or max(int(total / rate * (fps or 1)), 1)
            part = total / min(asked, total, sampling.max_frames)
            expected = torch.arange(part / 2, total, part).int().tolist()
            assert sample_indices(total, rate, sampling).tolist() == expected


@given(total=st.integers(1, 5000), segments=st.integers(1, 128))
def test_segments_are_the_authors(total: int, segments: int) -> None:
    found = sample_indices(total, 25.0, FrameSampling("internvl_chat", max_frames=segments, frame_factor=1, force=True))
    length = (total - 1) / segments
    assert found.tolist() == [int(length / 2 + round(length * i)) for i in range(segments)]
    assert found.max() < total


def test_segments_may_be_as_many_as_a_rate_makes() -> None:
    sampling = FrameSampling("internvl_chat", fps=2.0, max_frames=32, frame_factor=1)
    assert sample_indices(100, 25.0, sampling).tolist() == [6, 18, 31, 43, 56, 68, 80, 93]  # four seconds
    assert sample_indices(5, 25.0, sampling).tolist() == [2]
    assert sample_indices(25 * 60, 25.0, sampling).size == 32


@pytest.mark.slow
@pytest.mark.parametrize("case", [ChatCase(), InternLM2Case(), NativeCase()], ids=lambda case: case.family)
def test_logits_behind_every_token(case: FamilyCase, tmp_path: Path) -> None:
    """Each prefix of a conversation with a video and an image as a prompt of its own."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    case.write(folder, case.variants[0])
    pipeline = eager_pipeline(folder, tmp_path / "bundle", OPTIONS)
    turns, (clip, image) = CONVERSATIONS["turns"]
    prompt, rows = pipeline.read(turns, (clip, image))
    ours = []
    for end in range(1, prompt.token_ids.size + 1):
        prefix = TokenRows(rows.hidden[:end], rows.cos[:end], rows.sin[:end], rows.origin[:end])
        ours.append(prefill(pipeline.segments, prefix, None, 1, Stopwatch()).logits.copy())
    media: list[Media] = [as_video(clip, pipeline.manifest.sampling), as_image(image)]
    expected = case.reference(folder).logits(prompt, media, [])
    assert relative_error(np.stack(ours), expected) < case.limit
    assert (np.stack(ours).argmax(-1) == expected.argmax(-1)).all()
