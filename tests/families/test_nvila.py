"""NVILA alone: what its configurations may say, tiles and scales of single images, folded norms, frames by rate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from framefusion.errors import BundleError, CheckpointError, VideoError
from framefusion.export.checkpoints.checkpoint import Checkpoint
from framefusion.export.checkpoints.tensors.weights import load_parameters
from framefusion.export.families.nvila import row as nvila
from framefusion.export.families.nvila.reference import reference_logits
from framefusion.export.families.nvila.tower import NvilaTowerConfig
from framefusion.export.families.nvila.weights import MAPS, encoder_config, projector_sources, tower
from framefusion.export.families.reading import configs as reading
from framefusion.export.families.reference.transformers_call import TransformersCall
from framefusion.export.graphs.vit import VitConfig
from framefusion.runtime.families.nvila import NvilaPreprocessing
from framefusion.runtime.media.frame_sampling import FrameSampling, sample_indices
from framefusion.runtime.media.tiles.anyres import nearest_tiling
from framefusion.runtime.media.tiles.scales import scale_taps, single_taps
from framefusion.runtime.media.video.frames import Video, read_video
from framefusion.runtime.media.visual_input import Rows, Tiles, Token, VisualInput
from framefusion.runtime.text.prompt import Turn, Visual
from framefusion.runtime.text.prompt_layout import build_prompt
from framefusion.runtime.text.tokenizer import Tokenizer
from framefusion.storage.records import from_json, to_json
from tests.families.case import IMAGE, VIDEO, clip, picture, relative_error
from tests.families.nvila import (
    CONFIGS,
    FILES,
    SIZE,
    NvilaCase,
    NvilaReference,
    chessboard,
    processed,
    shape_of,
    write_checkpoint,
)
from tests.families.nvila import cut as cut_by_pillow
from tests.families.nvila import tiles_of as tiles_by_pillow
from tests.films import write_film

RATES = ((9, 25.0), (40, 10.0), (75, 30.0), (300, 29.97), (1, 25.0), (7, 5.0))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for variant in ("pooled", "lite", "s2", "single_file"):
        made[variant] = tmp_path_factory.mktemp(variant)
        write_checkpoint(made[variant], CONFIGS[variant], **FILES.get(variant, {}))
    return made


def changed(folder: Path, **changes: Any) -> Checkpoint:
    """A checkpoint whose config.json says something else; None takes a key out."""
    checkpoint = Checkpoint(folder)
    checkpoint.config = {key: value for key, value in (checkpoint.config | changes).items() if value is not None}
    return checkpoint


def read_all(checkpoint: Checkpoint) -> None:
    """What a build reads of the family."""
    for read in (nvila.preprocessing, nvila.sampling, nvila.template, tower):
        read(checkpoint)


def as_video(frames: Any, fps: float = 2.0) -> Video:
    return Video(frames, np.arange(len(frames)), fps, len(frames), len(frames) / fps, 0.0)


def rows_of(folder: Path, visual: VisualInput) -> Any:
    """Rows of a visual by the torch graph."""
    checkpoint = Checkpoint(folder)
    plan = tower(checkpoint)
    module = load_parameters(plan.module, checkpoint, plan.sources, torch.float32)
    rows = []
    for tiles in visual.tiles:
        call = plan.settings.call(tiles, plan.head_dim)
        with torch.inference_mode():
            rows.append(module(*(torch.from_numpy(given) for given in (tiles.values, *call.inputs.values()))).numpy())
        assert len(rows[-1]) == len(tiles.values) * call.rows
    return np.concatenate(rows) if visual.rows is None else visual.rows.apply(np.concatenate(rows))


@pytest.mark.parametrize("variant", ["lite", "s2"])
@pytest.mark.parametrize("size", [(70, 98), (200, 60), (33, 300)])
def test_rows_of_a_single_image(folders: dict[str, Path], variant: str, size: tuple[int, int]) -> None:
    image, rule = picture(*size), nvila.preprocessing(Checkpoint(folders[variant])).for_images(1)
    expected = NvilaReference(folders[variant]).features([image])
    assert relative_error(rows_of(folders[variant], rule.image(image)), expected) < NvilaCase.limit


@pytest.mark.parametrize("variant", ["lite", "s2"])
def test_rows_of_several_images_and_a_video(folders: dict[str, Path], variant: str) -> None:
    images, rule = [picture(), picture(112, 70, seed=2)], nvila.preprocessing(Checkpoint(folders[variant]))
    film, reference = as_video(clip(4)), NvilaReference(folders[variant])
    rows = [rows_of(folders[variant], rule.for_images(2).image(image)) for image in images]
    rows.append(rows_of(folders[variant], rule.for_images(2).video(film)))
    assert relative_error(np.concatenate(rows), reference.features([*images, film])) < NvilaCase.limit


@pytest.mark.parametrize("variant", ["pooled", "lite", "s2"])
@pytest.mark.parametrize(
    "parts",
    [
        ("  What is this? \n", IMAGE),
        (IMAGE,),
        (" Why?\n", IMAGE, " \n"),
        (VIDEO, "\n So? \n"),
        ("Look: ", IMAGE, " here", VIDEO),
        (" \n", "  Why? ", IMAGE, "\t", " "),
        ("", "\t", IMAGE, " x"),
        ("  ", " \n"),
    ],
)
def test_prompts_are_stripped(folders: dict[str, Path], variant: str, parts: tuple[str | Visual, ...]) -> None:
    """White space at the ends of a turn, the line feed behind a single image's last tile with it."""
    checkpoint, turns = Checkpoint(folders[variant]), [Turn("user", parts), Turn("assistant", (" Yes. ",))]
    turns.append(Turn("user", (" And\t",)))
    rule = nvila.preprocessing(checkpoint).for_images(parts.count(IMAGE))
    seen = [picture() if part is IMAGE else as_video(clip(4)) for part in parts if not isinstance(part, str)]
    visuals = [rule.video(one) if isinstance(one, Video) else rule.image(one) for one in seen]
    tokenizer = Tokenizer.from_file(folders[variant] / "llm/tokenizer.json")
    prompt = build_prompt(nvila.template(checkpoint), tokenizer, turns, visuals)
    ids = NvilaCase().prompt_ids(folders[variant], turns, seen)
    assert prompt.token_ids.tolist() == ids
    assert prompt.labels.tolist() == NvilaCase().labels(folders[variant], ids, seen)


def test_reference_logits_are_the_reference_of_these_tests(folders: dict[str, Path]) -> None:
    checkpoint, film = Checkpoint(folders["pooled"]), as_video(clip(4))
    visual = nvila.preprocessing(checkpoint).video(film)
    tokenizer = Tokenizer.from_file(folders["pooled"] / "llm/tokenizer.json")
    prompt = build_prompt(nvila.template(checkpoint), tokenizer, [Turn("user", (Visual.VIDEO, "What?"))], [visual])
    expected = NvilaReference(folders["pooled"]).logits(prompt, [film], [])[-1]
    assert (
        relative_error(reference_logits(TransformersCall(checkpoint, prompt, [visual]))[0], expected) < NvilaCase.limit
    )


@pytest.mark.parametrize(("block", "scales"), [(2, 1), (2, 3), (3, 1), (3, 3)])
def test_norm_and_copies_fold_into_the_map(block: int, scales: int, tmp_path: Path) -> None:
    """In fp64 but for the fold, which is done in fp32: 1e-5 is a hundred roundings."""
    from safetensors.torch import save_file

    width, out, places = 6, 8, block * block
    torch.manual_seed(0)
    norm, linear = nn.LayerNorm(places * scales * width), nn.Linear(places * scales * width, out)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    kept = {"1.weight": norm.weight, "1.bias": norm.bias, "2.weight": linear.weight, "2.bias": linear.bias}
    config = {"dynamic_s2": scales > 1, "s2_scales": "1,2,3"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(
        {f"mm_projector.layers.{name}": tensor.data for name, tensor in kept.items()}, tmp_path / "model.safetensors"
    )
    vit = VitConfig(1, width, 1, 1, 1, 1)
    tower_config = NvilaTowerConfig(vit, side=4, block=block, widths=(out,) * len(MAPS[block]))
    checkpoint = Checkpoint(tmp_path)
    sources = projector_sources(checkpoint, tower_config, scales)
    weight, bias = (sources[f"maps.0.{part}"].make(checkpoint).double() for part in ("weight", "bias"))
    block_features = torch.randn(5, places, width).double()
    repeated = block_features.repeat(1, 1, scales).flatten(1)  # copies of a place side by side
    expected = linear.double()(norm.double()(repeated))
    alone = nn.functional.layer_norm(block_features.flatten(1), (places * width,))
    torch.testing.assert_close(alone @ weight + bias, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "tilings", [[(1, 1), (2, 2), (3, 4)], [(1, 1), (2, 2), (1, 9)], [(1, 1), (3, 3), (2, 5)], [(2, 1)]]
)
def test_scales_meet_as_by_area_interpolation(tilings: list[tuple[int, int]]) -> None:
    side, most = 5, max((1, *(rows for rows, _ in tilings[:-1])))
    count = sum(rows * columns for rows, columns in tilings)
    hidden = torch.randn(count, 2, side, side)
    taps = scale_taps(tilings, side, most)
    patches = hidden.flatten(2).transpose(1, 2).reshape(-1, 2)
    ours = (patches[torch.from_numpy(taps.patches)] * torch.from_numpy(taps.shares)[..., None]).sum(0)
    rows, columns = tilings[-1]
    boards, at = [], 0
    for shape in tilings:
        board = chessboard(hidden[at : at + shape[0] * shape[1]], shape[1], shape[0])
        boards.append(nn.functional.interpolate(board, size=(rows * side, columns * side), mode="area"))
        at += shape[0] * shape[1]
    tiles = [[tile.flatten(2) for line in board.chunk(rows, 2) for tile in line.chunk(columns, 3)] for board in boards]
    expected = torch.cat([torch.cat(scale, 2)[0].T for scale in tiles])  # scale by scale, tile by tile
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)


def test_a_single_picture_stands_for_all_scales() -> None:
    taps = single_taps(3, 4, 2)
    values = np.random.default_rng(0).random((4, 2))
    summed = (values[taps.patches] * taps.shares[..., None]).sum(0)
    np.testing.assert_allclose(summed, np.tile(values, (3, 1)))


@pytest.mark.parametrize("fewest", [1, 9])
def test_tilings_are_vilas(fewest: int) -> None:
    random = np.random.default_rng(0)
    sizes = [*random.integers(20, 700, (300, 2)).tolist(), [70, 70], [140, 70], [105, 70], [560, 70], [70, 63]]
    for height, width in sizes:
        image = np.zeros((height, width, 3), np.uint8)
        rows, columns = nearest_tiling(height, width, SIZE, fewest, 12)
        assert (columns, rows) == shape_of(image, fewest), (height, width)


def test_tiles_of_a_single_image(folders: dict[str, Path]) -> None:
    rule, image = nvila.preprocessing(Checkpoint(folders["lite"])), picture(100, 160)
    visual, tiles = rule.for_images(1).image(image), cut_by_pillow(image)
    assert len(tiles) > 2
    (shown,) = visual.tiles
    pixels = nn.functional.unfold(processed(folders["lite"], tiles), 14, stride=14).transpose(1, 2).numpy()
    np.testing.assert_allclose(shown.values, pixels, rtol=0, atol=1e-6)
    labels: list[int] = []
    for piece, kind in zip(visual.pieces, [Rows, Token, str] * len(tiles), strict=True):
        assert isinstance(piece, kind)
        if isinstance(piece, str):
            assert piece == "\n"
        else:
            labels += piece.labels.tolist() if isinstance(piece, Rows) else [piece.label]
    assert labels == list(range(len(tiles) * (rule.blocks**2 + 1)))  # no two places of an image are one track


def test_scales_of_a_single_image(folders: dict[str, Path]) -> None:
    rule, image = nvila.preprocessing(Checkpoint(folders["s2"])), picture(100, 160)
    columns, rows = shape_of(image, 9)
    visual = rule.for_images(1).image(image)
    pictures = [tile for shape in ((1, 1), (2, 2), (columns, rows)) for tile in tiles_by_pillow(image, *shape)]
    pixels = nn.functional.unfold(processed(folders["s2"], pictures), 14, stride=14).transpose(1, 2).numpy()
    np.testing.assert_allclose(visual.tiles[0].values, pixels.reshape(1, -1, pixels.shape[2]), rtol=0, atol=1e-6)
    assert visual.num_rows == rows * columns * rule.blocks**2


def test_several_images_are_one_picture_each(folders: dict[str, Path]) -> None:
    for variant in ("lite", "s2"):
        rule = nvila.preprocessing(Checkpoint(folders[variant]))
        for count in (0, 2, 3):
            assert rule.for_images(count).image(picture()).tiles[0].values.shape[:2] == (1, 25)


def test_frames_stand_in_groups(folders: dict[str, Path]) -> None:
    rule = nvila.preprocessing(Checkpoint(folders["pooled"]))
    assert rule.pool_sizes == (2, 1, 1)
    assert [rule.longest_track(frames) for frames in (12, 13)] == [6, 7]
    with pytest.raises(VideoError, match=r"7 frame\(s\) were sampled and this model averages 2 to one.*--max-frames 6"):
        rule.video(as_video(clip(7)))
    assert len(rule.video(as_video(clip(6))).tiles[0].values) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pool_sizes": (0, 1, 1)}, "do not divide"),
        ({"pool_sizes": (1, 2, 1)}, "do not divide 3 x 3"),
        ({"merge_size": 6}, "hold no block"),
        ({"image_aspect_ratio": "pad"}, "image_aspect_ratio 'pad'"),
        ({"image_aspect_ratio": "dynamic_s2"}, "scales"),
        ({"min_tiles": 5, "max_tiles": 4}, "min_tiles 5"),
    ],
)
def test_impossible_rules_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(BundleError, match=message):
        NvilaPreprocessing(**{"image_size": SIZE, "merge_size": 2, **change})


def test_the_rule_survives_the_manifest(folders: dict[str, Path]) -> None:
    for folder in folders.values():
        rule = nvila.preprocessing(Checkpoint(folder))
        assert from_json(type(rule), json.loads(json.dumps(to_json(rule)))) == rule


@pytest.mark.parametrize("fps", [0.5, 1.0, 2.0, 7.3])
def test_frames_by_rate(fps: float) -> None:
    sampling = FrameSampling("nvila", fps=fps, max_frames=16, frame_factor=1)
    for total, rate in RATES:
        times = np.arange(0, total / rate, 1.0 / fps)[:16]
        assert sample_indices(total, rate, sampling).tolist() == [i for t in times if (i := int(t * rate)) < total]


def test_a_short_film_shows_frames_twice(folders: dict[str, Path], tmp_path: Path) -> None:
    sampling = nvila.sampling(Checkpoint(folders["pooled"]))
    film = read_video(write_film(tmp_path / "short.mp4", frames=5, fps=10), sampling)
    assert film.indices.tolist() == np.round(np.linspace(0, 4, 12)).astype(int).tolist()
    assert len(film.frames) == 12
    np.testing.assert_array_equal(film.frames[0], film.frames[1])


def test_a_rate_in_the_configuration_is_followed(folders: dict[str, Path], tmp_path: Path) -> None:
    sampling = nvila.sampling(changed(folders["lite"], fps=2.0))
    film = read_video(write_film(tmp_path / "film.mp4", frames=40, fps=10), sampling)
    assert film.indices.tolist() == [0, 5, 10, 15, 20, 25, 30, 35]


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        (None, ((1, 1, 1), "\n")),
        ("llava.model.encoders.BasicVideoEncoder", ((1, 1, 1), "\n")),
        ('{"_target_": "llava.model.encoders.BasicVideoEncoder", "end_tokens": null}', ((1, 1, 1), "")),
        ({"_target_": "llava.model.encoders.TSPVideoEncoder", "pool_sizes": [[8, 1, 1]]}, ((8, 1, 1), "\n")),
        ('{"_target_": "llava.model.encoders.TSPVideoEncoder", "pool_sizes": [[4, 2, 1]]}', ((4, 2, 1), "\n")),
        ({"_target_": "x.BasicVideoEncoder", "end_tokens": "<e>", "start_tokens": None}, ((1, 1, 1), "<e>")),
    ],
)
def test_video_encoders(folders: dict[str, Path], told: Any, expected: tuple[tuple[int, ...], str]) -> None:
    assert nvila.encoder(changed(folders["lite"], video_encoder=told), "video") == expected


TSP = {"_target_": "x.TSPVideoEncoder"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"video_encoder": "x.OtherEncoder"}, "video_encoder 'x.OtherEncoder', supported is BasicVideoEncoder or TSP"),
        ({"video_encoder": "{broken"}, "video_encoder '{broken', no JSON"),
        ({"video_encoder": 3}, "video_encoder 3, supported is an object"),
        ({"video_encoder": TSP}, "has no pool_sizes"),
        ({"video_encoder": TSP | {"pool_sizes": [[8, 1, 1], [1, 2, 2]]}}, "one entry of 3 numbers"),
        ({"video_encoder": TSP | {"pool_sizes": [[8, 1]]}}, "one entry of 3 numbers"),
        ({"video_encoder": TSP | {"pool_sizes": [[1, 1, 1]], "sep_tokens": "|"}}, "video_encoder with sep_tokens"),
        ({"image_encoder": "x.TSPVideoEncoder"}, "image_encoder 'x.TSPVideoEncoder'"),
        ({"image_aspect_ratio": None}, "has no image_aspect_ratio"),
        ({"image_aspect_ratio": "pad"}, "image_aspect_ratio 'pad', supported is resize, dynamic"),
        ({"image_aspect_ratio": "dynamic_s2"}, "dynamic_s2 False, supported is true"),
        ({"num_video_frames": None}, "has no num_video_frames"),
        (
            {"num_video_frames": 13, "video_encoder": TSP | {"pool_sizes": [[8, 1, 1]]}},
            "num_video_frames 13.*multiple of 8",
        ),
        ({"mm_vision_select_feature": "patch"}, "mm_vision_select_feature 'patch', supported is 'cls_patch'"),
        ({"mm_vision_select_layer": None}, "has no mm_vision_select_layer"),
        ({"mm_vision_select_layer": -4}, "mm_vision_select_layer -4, the tower has 3 layers"),
        ({"s2": True}, "s2 True, supported is False or None"),
        ({"vision_resolution": 980}, "vision_resolution 980"),
        ({"dynamic_s2": True}, "has no s2_scales"),
        ({"dynamic_s2": True, "s2_scales": "70,100"}, "s2_scales '70,100', supported is whole multiples of 70"),
        ({"dynamic_s2": True, "s2_scales": "70,140,210"}, "3 scale.s. are 648: do mm_projector_type and dynamic_s2"),
        ({"chat_template": "vicuna"}, "chat_template 'vicuna', supported is qwen2, or put vicuna.jinja"),
        ({"num_time_tokens": 100}, "num_time_tokens 100, <t0> is not in tokenizer.json"),
        ({"num_time_tokens": 100, "time_token_format": None}, "has no time_token_format"),
    ],
)
def test_configurations_that_are_refused(folders: dict[str, Path], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_all(changed(folders["lite"], **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"s2_resize_output_to_scale_idx": 0}, "s2_resize_output_to_scale_idx 0, supported is -1"),
        (
            {"video_encoder": TSP | {"pool_sizes": [[2, 1, 1]]}},
            "image_aspect_ratio 'dynamic_s2', supported is resize where",
        ),
        (
            {"dynamic_s2": False, "image_aspect_ratio": "resize"},
            "1 scale.s. are 96: do mm_projector_type and dynamic_s2",
        ),
    ],
)
def test_scales_that_are_refused(folders: dict[str, Path], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        tower(changed(folders["s2"], **changes))


@pytest.mark.parametrize(
    ("part", "key", "value", "message"),
    [
        ("mm_projector", "mm_projector_type", "linear", "mm_projector_type 'linear', supported are mlp_downsample"),
        ("mm_projector", "mm_projector_type", None, "has no mm_projector_type"),
        ("mm_projector", "mm_projector_type", "mlp_downsample_3x3_fix", "3 x 3 patches of 24 numbers in 1 scale"),
        ("vision_tower", "image_size", 98, "makes pictures of 70 pixels, the tower takes 98"),
        ("vision_tower", "hidden_act", "relu", "hidden_act 'relu' is not supported"),
    ],
)
def test_parts_that_are_refused(folders: dict[str, Path], part: str, key: str, value: Any, message: str) -> None:
    """In the port with one file for all, where config.json alone describes the parts."""
    told = {**Checkpoint(folders["single_file"]).config[f"{part}_cfg"], key: value}
    checkpoint = changed(folders["single_file"], **{f"{part}_cfg": told})
    with pytest.raises(CheckpointError, match=message):
        tower(checkpoint)


def test_positions_that_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    write_checkpoint(tmp_path, CONFIGS["pooled"])
    for path in (tmp_path / "vision_tower/config.json", tmp_path / "vision_tower/preprocessor_config.json"):
        told = json.loads(path.read_text())
        size = {"size": {"height": 98, "width": 98}} if "size" in told else {"image_size": 98}
        path.write_text(json.dumps(told | size))
    with pytest.raises(CheckpointError, match="25 positions, pictures of 98 pixels have 49 patches"):
        tower(Checkpoint(tmp_path))


@pytest.mark.parametrize(("select", "depth"), [(-2, 2), (-1, 3), (-3, 1), (1, 1), (3, 3)])
def test_the_selected_layer(folders: dict[str, Path], select: int, depth: int) -> None:
    assert encoder_config(changed(folders["pooled"], mm_vision_select_layer=select)).depth == depth


def test_layouts_named_by_the_configuration(folders: dict[str, Path]) -> None:
    folder = folders["pooled"]
    assert nvila.template(Checkpoint(folder)).default_system == "You are a helpful assistant."  # the tokenizer's own
    assert nvila.template(changed(folder, chat_template="qwen2")).default_system == "You are a helpful assistant"
    indented = (
        "{% if messages[0]['role'] != 'system' %}\n    {{ '<|im_start|>system\\nBe kind<|im_end|>\\n' }}\n{% endif %}\n"
        "{% for message in messages %}\n    {{ '<|im_start|>' + message['role'] + '\\n' + message['content'] }}\n"
        "    {{ '<|im_end|>' + '\\n' }}\n{% endfor %}\n{% if add_generation_prompt %}\n"
        "    {{ '<|im_start|>assistant\\n' }}\n{% endif %}\n"
    )
    path = folder / "kind.jinja"
    path.write_text(indented)
    told = nvila.template(changed(folder, chat_template="kind"))
    path.unlink()
    assert told.default_system == "Be kind"
    assert told.turns["user"].prefix == "<|im_start|>user\n"
    assert told.generation_prefix == "<|im_start|>assistant\n"


def test_an_earlier_vila_is_refused(folders: dict[str, Path]) -> None:
    told = Checkpoint(folders["single_file"]).config["llm_cfg"] | {"model_type": "llama"}
    with pytest.raises(CheckpointError, match="its LLM has model_type 'llama', NVILA's is 'qwen2'"):
        nvila.template(changed(folders["single_file"], llm_cfg=told))


def test_time_tokens_are_looked_for_in_the_tokenizer(folders: dict[str, Path], tmp_path: Path) -> None:
    write_checkpoint(tmp_path, CONFIGS["lite"] | {"num_time_tokens": 3})
    path = tmp_path / "llm/tokenizer.json"
    told = json.loads(path.read_text())
    told["added_tokens"] += [{"id": 400 + t, "content": f"<t{t}>"} for t in range(3)]
    path.write_text(json.dumps(told))
    nvila.check_time_tokens(Checkpoint(tmp_path))
    nvila.check_time_tokens(changed(folders["lite"], num_time_tokens=0, time_token_format=None))


def test_what_the_folder_of_the_llm_says_counts(folders: dict[str, Path], tmp_path: Path) -> None:
    write_checkpoint(tmp_path, CONFIGS["lite"])
    path = tmp_path / "llm/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 0.25}))
    assert reading.text_config(Checkpoint(tmp_path))["rms_norm_eps"] == 0.25
    tokenizer = Tokenizer.from_file(tmp_path / "llm/tokenizer.json")
    end = tokenizer.control_id("<|im_end|>")
    assert reading.generation(Checkpoint(tmp_path)).eos_token_ids == (end,)


def test_patches_are_the_image_processors(folders: dict[str, Path]) -> None:
    film = as_video(clip(4, 123, 77))
    (tiles,) = nvila.preprocessing(Checkpoint(folders["pooled"])).video(film).tiles
    pictures = processed(folders["pooled"], [Image.fromarray(frame) for frame in film.frames])
    expected = nn.functional.unfold(pictures, 14, stride=14).transpose(1, 2).reshape(2, 50, -1).numpy()
    assert isinstance(tiles, Tiles)
    np.testing.assert_allclose(tiles.values, expected, rtol=0, atol=1e-6)
