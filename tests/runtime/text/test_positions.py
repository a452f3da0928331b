"""Positions against a plain loop, the recorded reference and the modelling code's own tables."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from framefusion.runtime.media.visual_input import Grid
from framefusion.runtime.text.positions import (
    decode_positions,
    grid_places,
    mrope_positions,
    rope_tables,
    vision_rope_tables,
)
from tests.versions import needs, needs_transformers
from tests.wheel import ROOT

GOLDENS = ROOT / "tests" / "goldens/qwen2_vl"

grids = st.builds(Grid, st.integers(1, 4), st.sampled_from([2, 4, 6]), st.sampled_from([2, 4, 8]))
spans_of_a_prompt = st.lists(st.one_of(st.integers(0, 6), grids), max_size=6)


def positions_by_loop(spans: list[int | Grid], merge: int) -> list[tuple[int, int, int]]:
    out: list[tuple[int, int, int]] = []
    start = 0
    for span in spans:
        if isinstance(span, Grid):
            for t in range(span.frames):
                for y in range(span.height // merge):
                    out += [(start + t, start + y, start + x) for x in range(span.width // merge)]
        else:
            out += [(start + i,) * 3 for i in range(span)]
        start = max((max(place) for place in out), default=-1) + 1
    return out


@given(spans_of_a_prompt)
def test_positions_equal_a_loop(spans: list[int | Grid]) -> None:
    expected = np.array(positions_by_loop(spans, 2), np.int64).reshape(-1, 3).T
    positions, delta = mrope_positions([s if isinstance(s, int) else grid_places(s.merged(2)) for s in spans])
    assert positions.dtype == np.int64
    np.testing.assert_array_equal(positions, expected)
    assert delta == expected.max(initial=-1) + 1 - expected.shape[1]


def test_text_alone_counts_up() -> None:
    positions, delta = mrope_positions([7])
    np.testing.assert_array_equal(positions, [list(range(7))] * 3)
    assert delta == 0


def test_positions_equal_the_reference_run() -> None:
    # Recorded from thu-nics/FrameFusion at fbec1d2 with transformers 4.51.3.
    ids = np.load(GOLDENS / "v1_merge_then_prune.input.npz")
    grid = Grid(*ids["video_grid_thw"][0].tolist())
    expected = np.load(GOLDENS / "v1_merge_then_prune.dense.npz")["position_ids"][:, 0]
    positions, delta = mrope_positions([7, grid_places(grid.merged(2)), 21])
    np.testing.assert_array_equal(positions, expected)
    assert delta == -180
    np.testing.assert_array_equal(decode_positions(220, delta, 2), [[40, 41]] * 3)


def test_a_grid_that_does_not_merge_is_a_bug() -> None:
    with pytest.raises(ValueError, match="3x4 patches does not divide into blocks of 2"):
        Grid(1, 3, 4).merged(2)


@needs("transformers", "5.17", "its class leaves the three axes apart")
def test_mrope_tables_equal_the_modelling_code() -> None:
    import torch
    from transformers import Qwen2VLTextConfig
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLRotaryEmbedding

    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    config: Any = Qwen2VLTextConfig(hidden_size=256, num_attention_heads=2, rope_parameters=rope)
    positions = mrope_positions([500, grid_places(Grid(16, 20, 36)), 30000]).positions
    expected = Qwen2VLRotaryEmbedding(config)(torch.zeros(1), torch.from_numpy(positions)[:, None])
    found = rope_tables(positions, 128, 1e6, [16, 24, 24])
    compare_tables(found, (expected[0][0].numpy(), expected[1][0].numpy()))


@needs_transformers
@pytest.mark.parametrize(("width", "section"), [(256, [24, 20, 20]), (48, [6, 3, 3]), (32, [2, 3, 3])])
def test_interleaved_tables_equal_the_modelling_code(width: int, section: list[int]) -> None:
    import torch
    from transformers import Qwen3VLTextConfig
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding

    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": section, "mrope_interleaved": True}
    config = Qwen3VLTextConfig(hidden_size=64, num_attention_heads=2, head_dim=width // 2, rope_parameters=rope)
    positions = mrope_positions([500, grid_places(Grid(16, 20, 36)), 30000]).positions
    expected = Qwen3VLTextRotaryEmbedding(config)(torch.zeros(1), torch.from_numpy(positions)[:, None])
    found = rope_tables(positions, width // 2, 1e6, section, True)
    compare_tables(found, (expected[0][0].numpy(), expected[1][0].numpy()))


@needs_transformers
def test_rope_tables_equal_the_modelling_code() -> None:
    import torch
    from transformers import Qwen2Config
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

    rope = {"rope_type": "default", "rope_theta": 1e6}
    config = Qwen2Config(hidden_size=128, num_attention_heads=2, rope_parameters=rope)
    positions = np.arange(20000)
    expected = Qwen2RotaryEmbedding(config)(torch.zeros(1), torch.from_numpy(positions)[None])
    compare_tables(rope_tables(positions, 64, 1e6), (expected[0][0].numpy(), expected[1][0].numpy()))


@needs("transformers", "5.17", "its class takes no places")
def test_vision_tables_equal_the_modelling_code() -> None:
    import torch
    from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLVisionRotaryEmbedding
    from transformers.vision_utils import get_vision_position_ids

    rotary = Qwen2VLVisionRotaryEmbedding(Qwen2VLVisionConfig())  # head_dim 80
    places = get_vision_position_ids(torch.tensor([[1, 6, 8]]), 2)
    cos, sin = rotary(torch.zeros(1), places)
    compare_tables(vision_rope_tables(6, 8, 2, 80), (cos.reshape(48, -1).numpy(), sin.reshape(48, -1).numpy()))


def compare_tables(
    found: tuple[NDArray[np.float32], NDArray[np.float32]], expected: tuple[NDArray[np.float32], NDArray[np.float32]]
) -> None:
    for table, wanted in zip(found, expected, strict=True):
        assert table.dtype == np.float32
        np.testing.assert_allclose(table, wanted, rtol=0, atol=2e-6)


def test_sections_must_fill_the_head() -> None:
    with pytest.raises(ValueError, match="three numbers that sum to 64"):
        rope_tables(np.zeros((3, 1), np.int64), 128, 1e6, [16, 24, 23])
