"""Checkpoints that say in an unusual way what changes numbers: computed as transformers does, or refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from framefusion.errors import CheckpointError, UnknownFamilyError
from framefusion.export.checkpoints.checkpoint import Checkpoint
from framefusion.export.checkpoints.class_defaults import CLASS_DEFAULTS
from framefusion.export.families.reading.formats import format_of, token_id
from framefusion.export.families.reading.language import attention_window, llm_classes
from framefusion.export.options import BuildOptions
from framefusion.export.plan.build_plan import BuildPlan
from framefusion.runtime.format.manifest import Limits
from tests.families import CASES
from tests.families.case import FamilyCase
from tests.families.eager import eager_pipeline
from tests.families.internvl import ChatCase, InternLM2Case
from tests.families.qwen3_vl import Qwen3VLCase
from tests.families.test_families import Subject, compare_answers, compare_features, read_conversation
from tests.random_checkpoint import random_checkpoint

BY_NAME = {case.family: case for case in CASES}
WEIGHTS = "model.safetensors"
Tensors = dict[str, torch.Tensor]
Change = Callable[[dict[str, Any]], object]


def write(case: FamilyCase, folder: Path, variant: str | None = None) -> Path:
    """A checkpoint in one file of tensors a folder."""
    folder.mkdir(parents=True)
    case.write(folder, variant or case.variants[0])
    return folder


def edit_config(folder: Path, change: Change, name: str = "config.json") -> None:
    content = json.loads((folder / name).read_text())
    change(content)
    (folder / name).write_text(json.dumps(content))


def edit_tensors(folder: Path, change: Callable[[Tensors], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def plan(folder: Path, **options: Any) -> BuildPlan:
    return BuildPlan(Checkpoint(folder), BuildOptions(**options))


def agrees(case: FamilyCase, folder: Path, bundle: Path) -> None:
    """Features of the tower and logits of a whole answer, against the family's reference."""
    subject = Subject(case, folder, eager_pipeline(folder, bundle, BuildOptions(cost=0.5)), case.reference(folder))
    conversation = read_conversation(subject, "video")
    compare_features(subject, conversation)
    compare_answers(subject, conversation)


# --- What the classes of transformers fill in -------------------------------------------------------------------------


def test_what_configurations_leave_out_is_what_their_classes_say() -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    for model_type, values in CLASS_DEFAULTS.items():
        if model_type == "internlm2":  # transformers has no such class
            continue
        outer = {"text": "text_config", "vision": "vision_config"}.get(model_type.rpartition("_")[2])
        if model_type.startswith("qwen") and outer is not None:
            config = getattr(CONFIG_MAPPING[model_type.rpartition("_")[0]](), outer).to_dict()
        else:
            config = CONFIG_MAPPING[model_type]().to_dict()
        told = config | (config.get("rope_parameters") or {})
        for name, value in values.items():
            plain = list(value) if isinstance(value, tuple) else value
            assert told[name] in (plain, [plain, plain]), (model_type, name)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_a_vision_config_without_its_defaults(family: str, tmp_path: Path) -> None:
    """As trainers save it: transformers fills in what is not there."""
    case = BY_NAME[family]
    folder, defaults = write(case, tmp_path / "checkpoint"), CLASS_DEFAULTS[f"{family}_vision"]

    def shorten(config: dict[str, Any]) -> None:
        vision = config["vision_config"]
        for key in [key for key in vision if key in defaults and vision[key] == defaults[key]]:
            del vision[key]
        assert "spatial_merge_size" not in vision
        assert "hidden_act" not in vision

    edit_config(folder, shorten)
    agrees(case, folder, tmp_path / "bundle")


@pytest.mark.slow
def test_a_tower_of_the_default_depth_and_heads(tmp_path: Path) -> None:
    """32 blocks of 16 heads, and config.json says neither."""
    folder = random_checkpoint(tmp_path / "checkpoint", vision=(32, 64, 16), pixels=56 * 84)
    edit_config(folder, lambda config: [config["vision_config"].pop(key) for key in ("depth", "num_heads")])
    agrees(BY_NAME["qwen2_vl"], folder, tmp_path / "bundle")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "llava_onevision", "llava_next_video"])
def test_heads_that_only_text_config_ties(family: str, tmp_path: Path) -> None:
    case = BY_NAME[family]
    folder = write(case, tmp_path / "checkpoint")
    edit_config(folder, lambda config: config.update(tie_word_embeddings=False))
    edit_config(folder, lambda config: config["text_config"].update(tie_word_embeddings=True))
    edit_tensors(folder, lambda tensors: [tensors.pop(key) for key in list(tensors) if "lm_head" in key])
    agrees(case, folder, tmp_path / "bundle")
    edit_config(folder, lambda config: config["text_config"].update(tie_word_embeddings=False))
    with pytest.raises(CheckpointError, match=r"tie_word_embeddings of config\.json does not say"):
        plan(folder)


# --- Biases -----------------------------------------------------------------------------------------------------------


def add_biases(tensors: Tensors, names: tuple[str, ...]) -> None:
    torch.manual_seed(1)
    for key in [key for key in tensors if "vision" not in key and "visual" not in key]:
        bias = key.removesuffix(".weight") + ".bias"
        if any(key.endswith(f".{name}.weight") for name in names) and bias not in tensors:
            tensors[bias] = torch.randn(tensors[key].shape[0])


ALL = ("q_proj", "k_proj", "v_proj", "o_proj")
FULL = (*ALL, "gate_proj", "up_proj", "down_proj")
PACKED = ("wqkv", "wo")
Biased = tuple[FamilyCase, str, Mapping[str, Any], tuple[str, ...]]
BIASED: dict[str, Biased] = {
    "llama in internvl_chat": (
        ChatCase(),
        "llm_config",
        {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "attention_bias": True, "mlp_bias": True},
        FULL,
    ),
    "internlm2": (InternLM2Case(), "llm_config", {"bias": True}, PACKED),
    "qwen3_vl": (Qwen3VLCase(), "text_config", {"attention_bias": True}, ALL),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BIASED)
def test_biases_of_every_linear_map_are_computed(name: str, tmp_path: Path) -> None:
    case, part, values, names = BIASED[name]
    folder = write(case, tmp_path / "checkpoint")
    edit_config(folder, lambda config: config[part].update(values))
    edit_tensors(folder, lambda tensors: add_biases(tensors, names))
    agrees(case, folder, tmp_path / "bundle")
    edit_tensors(folder, lambda tensors: tensors.pop(next(key for key in tensors if key.endswith(f"{names[-1]}.bias"))))
    with pytest.raises(CheckpointError, match=rf"has no tensor .*{names[-1]}\.bias"):
        plan(folder)


# --- RoPE -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_sections_that_config_json_leaves_out(tmp_path: Path) -> None:
    """Heads of 128, and no mrope_section: transformers takes 16, 24 and 24."""
    folder = random_checkpoint(tmp_path / "checkpoint", hidden=256, heads=2, pixels=56 * 84)
    edit_config(folder, lambda config: config["text_config"]["rope_parameters"].pop("mrope_section"))
    assert plan(folder).config.mrope_section == (16, 24, 24)
    agrees(BY_NAME["qwen2_vl"], folder, tmp_path / "bundle")


@pytest.mark.slow
def test_rope_scaling_wins_over_rope_parameters(tmp_path: Path) -> None:
    """Taken whole: its theta is that of the class, 1e6, and not what rope_parameters says."""
    folder = random_checkpoint(tmp_path / "checkpoint", pixels=56 * 84)
    scaling = {"type": "mrope", "mrope_section": [2, 3, 3]}
    edit_config(folder, lambda config: config["text_config"].update(rope_scaling=scaling))
    found = plan(folder).config
    assert (found.rope_theta, found.mrope_section) == (1e6, (2, 3, 3))
    agrees(BY_NAME["qwen2_vl"], folder, tmp_path / "bundle")


def test_dynamic_rope_and_windows_bound_what_a_bundle_holds(checkpoint: Path, tmp_path: Path) -> None:
    """Without a flag a bundle ends where the attention of the checkpoint becomes another one."""
    folder = shutil.copytree(checkpoint, tmp_path / "checkpoint")
    scaling = {"rope_type": "dynamic", "factor": 2.0, "mrope_section": [4, 2, 2]}
    edit_config(folder, text(rope_scaling=scaling, max_position_embeddings=1500))
    assert plan(folder).limits == Limits(750, 1500)
    assert plan(folder, max_input_len=300).limits == Limits(300, 1324)
    edit_config(folder, text(rope_scaling=scaling, max_position_embeddings=6000))
    assert plan(folder).limits.max_kv_cache_capacity <= 6000


def test_blocks_of_patches_are_those_of_the_tower(checkpoint: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "checkpoint")
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        edit_config(folder, lambda told: told.update(merge_size=1), name)
    with pytest.raises(CheckpointError, match="processor has merge_size 1, vision_config spatial_merge_size 2"):
        plan(folder)


# --- Where the LLM's configuration is ---------------------------------------------------------------------------------

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 9}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llava_video", "minicpmv", "internvl_chat", "internvl_chat_internlm2", "nvila"])
def test_a_text_config_that_the_class_does_not_read_counts_for_nothing(family: str, tmp_path: Path) -> None:
    """LLaVA's class of transformers leaves one in files that its authors' class reads at the top."""
    folder = write(BY_NAME[family], tmp_path / "checkpoint")
    expected = plan(folder)
    edit_config(folder, lambda config: config.update(text_config=LLAMA))
    assert plan(folder).config == expected.config
    assert plan(folder).family is expected.family


@pytest.mark.slow
def test_the_llm_of_internvl_is_what_its_architecture_says(tmp_path: Path) -> None:
    folder = write(BY_NAME["internvl_chat"], tmp_path / "checkpoint")
    expected = plan(folder).config
    edit_config(folder, lambda config: config["llm_config"].pop("model_type"))
    assert plan(folder).config == expected
    edit_config(folder, lambda config: config["llm_config"].update(architectures=["Phi3ForCausalLM"]))
    with pytest.raises(UnknownFamilyError, match=r"\['Phi3ForCausalLM'\] is unknown; known .* Qwen2ForCausalLM"):
        plan(folder)


@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava_onevision", "llava_next_video"])
def test_ids_of_pad_tokens_are_those_of_the_class(model_type: str) -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    theirs = CONFIG_MAPPING[model_type]().to_dict()
    pad_ids = format_of({"model_type": model_type}).pad_ids
    assert pad_ids
    for key in pad_ids:
        assert token_id({"model_type": model_type}, key) == theirs[key]
        assert token_id({"model_type": model_type, key: 7}, key) == 7


# --- Refused by name --------------------------------------------------------------------------------------------------


def text(**values: Any) -> Change:
    return lambda config: config["text_config"].update(values)


REFUSED: tuple[tuple[Change, str], ...] = (
    (text(hidden_act="gelu"), "hidden_act is 'gelu'"),
    (text(rope_scaling={"type": "yarn", "factor": 4.0}), "config.json: rope_scaling has rope type 'yarn'.*longer"),
    (
        text(rope_scaling={"rope_type": "yarn", "factor": 4.0, "mrope_section": [2, 3, 3]}),
        "leave its mrope_section there",
    ),
    (text(rope_scaling={"type": "linear", "factor": 2.0}), "rope type 'linear'"),
    (text(rope_parameters={"rope_type": "default", "rope_theta": 1e4}), r"mrope_section \[16, 24, 24\], what transf"),
    (text(rope_parameters={"mrope_section": [4, 2, 2], "partial_rotary_factor": 0.5}), "partial_rotary_factor"),
    (text(rope_parameters={"mrope_section": [4, 2, 2], "mrope_interleaved": True}), "mrope_interleaved"),
    (text(rope_parameters={"mrope_section": [4, 2, 3]}), "whose sum is 8"),
    (text(attention_multiplier=0.5), "attention_multiplier is 0.5"),
    (text(final_logit_softcapping=30.0), "final_logit_softcapping is 30.0"),
    (text(logits_scaling=8.0), "logits_scaling is 8.0"),
    (text(embedding_multiplier=12.0), "embedding_multiplier is 12.0"),
    (text(use_qk_norm=2), "use_qk_norm is 2"),
    (text(partial_rotary_factor=0.5), "partial_rotary_factor is 0.5"),
    (text(attention_chunk_size=8192), "attention_chunk_size is 8192"),
    (text(num_experts=8), "num_experts is 8"),
    (text(layer_types=["full_attention"] * 3 + ["linear_attention"]), "layer_types"),
    (text(layer_types=["full_attention"] * 3 + ["sliding_attention"]), "layer_types"),
    (text(layer_types=["full_attention"] * 3), "one for each of 4 layers"),
    (text(model_type="gemma2"), "model_type 'gemma2', which is not supported"),
    (text(num_hidden_layers=3), "says num_hidden_layers 3, the weights are of 4 layers"),
    (text(num_hidden_layers=9999), "says num_hidden_layers 9999, the weights are of 4 layers"),
    (text(num_hidden_layers=10**9), "text_config.num_hidden_layers is 1000000000, a whole number of 1 to 10000"),
    (text(num_attention_heads="2"), "text_config.num_attention_heads is '2', a whole number"),
    (text(rope_parameters=[]), r"text_config.rope_parameters is \[\], an object was expected"),
    (text(num_key_value_heads=3), "2 num_attention_heads over 3 num_key_value_heads"),
    (text(rope_parameters={"mrope_section": [4, 2, 2]}, rope_theta=None), "has no rope_theta"),
    (lambda config: config.pop("video_token_id"), "video_pad.> is token 151656, the embedding table has 320 rows"),
    (text(vocab_size=330), "has 320 rows, config.json says vocab_size 330"),
    (text(hidden_size=48), "gives rows of 32, hidden_size is 48"),
    (lambda config: config["vision_config"].update(hidden_act="gelu"), "hidden_act 'gelu' of vision_config"),
    (lambda config: config["vision_config"].update(depth=9999), "has 1 blocks at .*says 9999"),
    (
        lambda config: config["vision_config"].update(num_heads=3),
        "3 heads of the vision tower do not share its",
    ),
    (lambda config: config["vision_config"].update(temporal_patch_size=1), "temporal_patch_size 1 of vision_config"),
    (lambda config: config["vision_config"].update(rope_parameters={"rope_theta": 5e5}), "rope_theta 500000.0"),
)


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=[message[:30] for _, message in REFUSED])
def test_what_changes_numbers_is_refused_by_name(
    checkpoint: Path, tmp_path: Path, change: Change, message: str
) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "checkpoint")
    edit_config(folder, change)
    with pytest.raises(CheckpointError, match=message) as refusal:
        plan(folder)
    assert len(str(refusal.value)) < 600


HARMLESS: tuple[Change, ...] = (
    text(attention_dropout=0.1, initializer_range=0.5, use_cache=False, pretraining_tp=1),
    text(sliding_window=4096, max_window_layers=28),
    text(layer_types=["full_attention"] * 4),
    text(partial_rotary_factor=1.0, logits_scaling=None, use_qk_norm=False, num_experts=0),
    text(hidden_act="swish"),
    text(activation_dropout=0.1, resid_dropout=0.2),
    text(temperature=0.5, top_k=50, length_penalty=1.0, chunk_size_feed_forward=0, pruned_heads={}),
)


@pytest.mark.parametrize("change", HARMLESS)
def test_what_changes_no_number_is_taken(checkpoint: Path, tmp_path: Path, change: Change) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "checkpoint")
    edit_config(folder, change)
    assert plan(folder).config == plan(checkpoint).config


def test_windows_are_those_of_layers_that_slide() -> None:
    switched = {"model_type": "qwen2", "sliding_window": 64, "use_sliding_window": True, "num_hidden_layers": 4}
    assert attention_window(switched | {"max_window_layers": 4}) is None
    assert attention_window(switched | {"max_window_layers": 3}) == 64
    assert attention_window(switched | {"layer_types": ["full_attention"] * 4, "max_window_layers": 0}) is None
    assert attention_window(switched | {"layer_types": ["sliding_attention"] * 4, "max_window_layers": 4}) == 64
    assert attention_window(switched | {"model_type": "llama"}) is None
    assert attention_window({"model_type": "mistral", "sliding_window": 64}) == 64
    assert set(llm_classes()) <= set(CLASS_DEFAULTS)


# --- Nothing unread ---------------------------------------------------------------------------------------------------


def files_of(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


def add_tensor(folder: Path, stem: str, name: str) -> str:
    """A tensor beside those whose name begins with `stem`; returns its name."""
    for path in files_of(folder):
        tensors = load_file(path)
        beside = next((key for key in tensors if stem in key), None)
        if beside is not None:
            added = beside[: beside.index(stem)] + name
            save_file(tensors | {added: torch.ones(2)}, path, {"format": "pt"})
            return added
    raise AssertionError(f"no {stem} in {folder}")


LLM_STEM = {"internvl_chat_internlm2": "layers.0.attention.", "": "layers.0.self_attn."}
LEFT = ("layers.0.self_attn.rotary_emb.inv_freq",)
TOWER_EXTRAS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "llava_video": ("encoder.layers.0.mlp", ("post_layernorm.weight", "head.probe", "embeddings.position_ids")),
    "llava_onevision": ("encoder.layers.0.mlp", ("post_layernorm.weight", "head.mlp.fc1.weight")),
    "llava_next_video": ("encoder.layers.0.mlp", ("post_layernorm.bias", "embeddings.position_ids")),
    "nvila": ("encoder.layers.0.mlp", ("post_layernorm.weight", "head.attention.in_proj_weight")),
    "minicpmv": ("encoder.layers.0.mlp", ("head.probe", "embeddings.position_ids")),
}
"""Family -> a tensor of its tower, and what real checkpoints have beside it that nobody needs."""


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.family)
def test_a_tensor_that_nobody_reads_is_refused_by_name(case: FamilyCase, tmp_path: Path) -> None:
    folder = write(case, tmp_path / "checkpoint")
    stem = LLM_STEM.get(case.family, LLM_STEM[""])
    add_tensor(folder, stem, LEFT[0])
    plan(folder)
    if case.family in TOWER_EXTRAS:
        beside, names = TOWER_EXTRAS[case.family]
        for name in names:
            if not any(name in key for path in files_of(folder) for key in load_file(path)):
                add_tensor(folder, beside, name)
        plan(folder)
    for number, name in enumerate(("layers.0.self_attn.q_proj.lora_A.weight", "layers.1.mlp.extra_proj.bias")):
        spoiled = shutil.copytree(folder, tmp_path / str(number))
        added = add_tensor(spoiled, stem, name)
        with pytest.raises(CheckpointError, match=f"{'an adapter' if 'lora' in name else 'no part'}.*{added}"):
            plan(spoiled)
        with pytest.raises(CheckpointError, match=added):
            plan(spoiled, num_decoder_layer=2, cost=0.5)


@pytest.mark.parametrize(
    "name",
    [
        "layers.0.self_attn.o_proj.bias",
        "layers.2.mlp.down_proj.bias",
        "layers.1.self_attn.q_norm.weight",
        "embed_positions.weight",
        "score.weight",
    ],
)
def test_a_bias_that_the_class_has_not_is_refused(checkpoint: Path, tmp_path: Path, name: str) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "checkpoint")
    added = add_tensor(folder, "layers.0.self_attn.", name)
    with pytest.raises(CheckpointError, match=f"no part of this model reads .{added}"):
        plan(folder)


@pytest.mark.parametrize(
    ("dtype", "remedy"), [(torch.float64, "as float32 or bf"), (torch.int8, "before it was quant")]
)
def test_types_that_are_not_read_are_named(checkpoint: Path, tmp_path: Path, dtype: torch.dtype, remedy: str) -> None:
    folder, key = shutil.copytree(checkpoint, tmp_path / "checkpoint"), "model.layers.0.input_layernorm.weight"
    edit_tensors(folder, lambda tensors: tensors.update({key: tensors[key].to(dtype)}))
    with pytest.raises(CheckpointError, match=rf"{folder}: {key} is stored as \w+, known are .*{remedy}"):
        plan(folder)
