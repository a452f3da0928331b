"""Quantized checkpoints that are incomplete, contradict themselves or are of no use: each is refused by what is wrong.

Linear maps come from tests/goldens/quantized, and one thing about each is changed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from framefusion.errors import CheckpointError
from framefusion.export.checkpoints.checkpoint import Checkpoint
from framefusion.export.checkpoints.quantized.patterns import ModuleNames, PatternError
from framefusion.export.quantization.float8 import has_not_numbers
from tests.export.checkpoints.quantized.test_formats import AWQ, BNB4, GOLDENS, GPTQ, recorded

Tensors = dict[str, torch.Tensor]
Edit = Callable[[Tensors, dict[str, Any]], object]
LAYERS = ("model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj")


def opened(folder: Path, name: str, edit: Edit) -> Checkpoint:
    """A checkpoint of two layers, each with the recorded linear map, after an edit of its tensors and setting."""
    tensors, _ = recorded(name)
    if name.startswith("gptq"):
        del tensors["m.qzeros_v1"]
    tensors = {layer + key.removeprefix("m"): tensor for layer in LAYERS for key, tensor in tensors.items()}
    setting = setting_of(name)
    edit(tensors, setting)
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": setting}))
    return Checkpoint(folder)


def setting_of(name: str) -> dict[str, Any]:
    """What config.json says of the map recorded as `name`."""
    from safetensors import safe_open

    if name == "awq":
        return dict(AWQ)
    if name.startswith("gptq"):
        return GPTQ | {"bits": int(name[5]), "sym": name.endswith("_sym"), "checkpoint_format": "gptq_v2"}
    if name.startswith("bnb"):
        return dict(BNB4)
    with safe_open(GOLDENS / f"{name}.safetensors", "pt") as file:
        setting: dict[str, Any] = json.loads(file.metadata()["config"])
    return setting


def says(**values: Any) -> Edit:
    """config.json says this."""
    return lambda _, setting: setting.update(values)


def weights_say(**values: Any) -> Edit:
    """The group of compressed-tensors says this of its weights."""
    return lambda _, setting: setting["config_groups"]["group_0"]["weights"].update(values)


def without(part: str) -> Edit:
    """A tensor of the second layer is missing."""
    return lambda tensors, _: tensors.pop(f"{LAYERS[1]}.{part}")


def with_tensor(part: str, tensor: torch.Tensor) -> Edit:
    """The second layer has this tensor."""
    return lambda tensors, _: tensors.update({f"{LAYERS[1]}.{part}": tensor})


def changed(part: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Edit:
    """A tensor of the second layer is another one."""

    def edit(tensors: Tensors, _: Any) -> None:
        tensors[f"{LAYERS[1]}.{part}"] = change(tensors[f"{LAYERS[1]}.{part}"])

    return edit


def not_numbers(weight: torch.Tensor) -> torch.Tensor:
    """Floats of 8 bits whose pattern stands for none."""
    return torch.full_like(weight.view(torch.uint8), 0x7F).view(weight.dtype)


def plain(tensors: Tensors, _: Any) -> bool:
    """The second layer's map is stored as floats."""
    for key in [key for key in tensors if key.startswith(LAYERS[1])]:
        del tensors[key]
    tensors[f"{LAYERS[1]}.weight"] = torch.ones(64, 128)
    return True


@pytest.mark.parametrize(
    ("name", "edit", "message"),
    [
        # what is not there
        ("awq", without("scales"), r"layers.1.mlp.up_proj has qweight, qzeros and no scales"),
        ("awq", without("qweight"), r"has qzeros, scales and no qweight"),
        ("awq", without("qzeros"), r"and no qzeros"),
        ("ct_w4_group_sym", without("weight_scale"), r"and no weight_scale"),
        ("ct_w4_group_sym", without("weight_shape"), r"and no weight_shape"),
        ("ct_w4_group_asym", without("weight_zero_point"), r"has no weight_zero_point though config.json"),
        ("ct_fp8_channel_dynamic", without("weight_scale"), r"up_proj.weight is stored as F8_E4M3 without"),
        ("bnb_nf4", without("weight.absmax"), r"and no weight.absmax"),
        ("bnb_nf4_nested", without("weight.nested_quant_map"), r"and no weight.nested_quant_map"),
        # what contradicts config.json
        ("awq", says(group_size=64), r"scales F16 \(4, 64\), .* \(2, 64\) is expected"),
        ("awq", says(group_size=-1), r"scales F16 \(4, 64\), .* \(1, 64\) is expected"),
        ("awq", says(modules_to_not_convert=["mlp"]), r"layers.0.mlp.up_proj is, though it is among the modules"),
        ("awq", plain, r"layers.1.mlp.up_proj is stored plain, though model.layers.0.mlp.up_proj is quantized"),
        ("gptq_4_sym", says(bits=8), r"scales F16 \(4, 64\), .* \(2, 64\) is expected"),
        ("gptq_4_sym", says(dynamic={"-:.*up_proj": {}}), r"layers.0.mlp.up_proj is, though"),
        ("gptq_4_sym", says(desc_act=True, checkpoint_format="gptq", format="gptq_v2"), r"name different ones"),
        ("ct_w4_group_sym", weights_say(num_bits=8), r"weight_shape \(64, 128\) and weight_packed"),
        ("ct_w4_group_sym", weights_say(group_size=64), r"is no scale a group of 64"),
        ("ct_w4_group_sym", says(ignore=["re:.*up_proj"]), r"layers.0.mlp.up_proj is, though"),
        ("ct_w4_group_sym", says(format="int-quantized"), r"in the format 'pack-quantized', and the whole in"),
        ("ct_fp8_block", weights_say(block_structure=[64, 64]), r"is no scale a block"),
        # two models mixed
        ("awq", with_tensor("weight", torch.ones(64, 128)), r"two models are mixed"),
        ("awq", with_tensor("g_idx", torch.zeros(128).int()), r"layers.1.mlp.up_proj.g_idx, which its format does not"),
        ("awq", with_tensor("weight_scale_inv", torch.ones(1)), r"weight_scale_inv, which its format does not have"),
        # another order of the inputs
        ("gptq_4_sym", changed("g_idx", lambda order: order.flip(0)), r"order of its activations .act order"),
        ("gptq_4_sym", lambda tensors, setting: (setting.update(desc_act=True), without("g_idx")(tensors, setting)),
         "has no g_idx though desc_act is true"),
        # shapes and types
        ("awq", changed("qweight", lambda words: words[:0]), r"qweight I32 \(0, 8\), I32 a matrix is expected"),
        ("awq", changed("qweight", lambda words: words.long()), r"qweight I64"),
        ("awq", changed("scales", lambda scales: scales.double()), r"scales F64"),
        ("ct_w4_group_sym", changed("weight_shape", lambda shape: shape * 1000), r"weight_shape \(64000, 128000\)"),
        ("ct_w4_group_sym", changed("weight_shape", lambda shape: -shape), r"weight_shape \(-64, -128\)"),
        ("bnb_nf4", changed("weight.quant_state.bitsandbytes__nf4", lambda state: state.flip(0)), "a quant_state that"),
        ("bnb_nf4", changed("weight.quant_map", lambda table: table.flip(0)), "quant_map that is not NF4's"),
        # what is not read
        ("awq", says(version="gemv"), r"version 'gemv' is not read, gemm are"),
        ("awq", says(checkpoint_format="gemv_fast"), r"checkpoint_format 'gemv_fast' is not read, gemm are"),
        ("awq", says(bits=3), r"bits 3 is not read"),
        ("awq", says(bits="4"), r"bits is '4', a whole number is expected"),
        ("awq", says(group_size=None), r"group_size is None"),
        ("gptq_4_sym", says(checkpoint_format="marlin"), r"checkpoint_format 'marlin' is not read"),
        ("gptq_4_sym", says(bits=3), r"bits 3 is not read, 4 and 8 are"),
        ("gptq_4_sym", says(dynamic={"+:.*": {"adapter": {}}}), r"dynamic says .*adapter.* which is not read"),
        ("ct_w4_group_sym", says(kv_cache_scheme={"num_bits": 8}), r"kv_cache_scheme"),
        ("ct_w4_group_sym", says(quantization_status="initialized"), r"quantization_status .* is not read"),
        ("ct_w4_group_sym", says(sparsity_config={"format": "sparse-24-bitmask"}), r"sparsity_config changes the"),
        ("ct_w4_group_sym", says(config_groups={}), r"config_groups are missing"),
        ("ct_fp8_block", says(format="nvfp4-pack-quantized"), r"and the whole in 'nvfp4"),
        ("awq", says(quant_method="hqq"), r"quantized .hqq, 4 bits.*which is not read; AWQ .gemm., GPTQ"),
        ("bnb_nf4", says(bnb_4bit_quant_type="fp4"), r"bnb_4bit_quant_type 'fp4' is not read"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_before_a_weight_is_read(tmp_path: Path, name: str, edit: Edit, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        opened(tmp_path, name, edit).check_readable()


@pytest.mark.parametrize(
    ("name", "edit", "message"),
    [
        ("awq", changed("scales", lambda scales: scales * torch.nan), r"up_proj.scales holds a scale that is infinite"),
        ("awq", changed("scales", lambda scales: scales + torch.inf), r"up_proj.scales holds a scale that is infinite"),
        ("awq", changed("scales", lambda scales: scales * 0), r"scales of 0 alone"),
        ("awq", says(zero_point=False), r"qzeros holds zero points though config.json says"),
        ("gptq_4_asym", says(sym=True), r"qzeros holds zero points though config.json says"),
        ("gptq_4_sym", lambda tensors, setting: (setting.update(checkpoint_format="gptq", sym=False),
                       changed("qzeros", lambda zeros: zeros | -1)(tensors, setting)), r"holds 15 in the format gptq"),
        ("ct_w4_group_sym", changed("weight_scale", lambda scales: scales * torch.nan), r"infinite or no number"),
        ("ct_fp8_channel_dynamic", changed("weight_scale", lambda scales: scales * torch.nan), r"or no number"),
        ("ct_fp8_channel_dynamic", changed("weight", not_numbers), r"holds what is no number"),
        ("ct_fp8_channel_dynamic", changed("weight_scale", lambda scales: scales * 0 + 3e38), r"becomes infinite"),
        ("ct_w8a8_asym", weights_say(num_bits=4), r"holds numbers of more than 4 bits"),
        ("bnb_nf4", changed("weight.absmax", lambda scales: scales * torch.nan), r"infinite or no number"),
    ],
)  # fmt: skip
def test_values_that_are_no_weights_are_refused(tmp_path: Path, name: str, edit: Edit, message: str) -> None:
    checkpoint = opened(tmp_path, name, edit)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.tensor(f"{LAYERS[1]}.weight")


def test_codes_that_are_no_numbers_are_refused_as_codes(tmp_path: Path) -> None:
    checkpoint = opened(tmp_path, "ct_fp8_channel_dynamic", changed("weight", not_numbers))
    with pytest.raises(CheckpointError, match=r"weight holds what is no number: the checkpoint is damaged"):
        checkpoint.quantized(f"{LAYERS[1]}.weight")


def test_each_code_of_8_bits_is_a_number_where_torch_has_one() -> None:
    for number in range(256):
        code = torch.tensor([number], dtype=torch.uint8)
        assert has_not_numbers(code) != bool(torch.isfinite(code.view(torch.float8_e4m3fn).float()))


@pytest.mark.parametrize(
    "edit",
    [
        says(modules_to_not_convert=["visual", "lm_head", "mlp.up", "layers.11"]),
        lambda tensors, setting: (plain(tensors, setting), setting.update(modules_to_not_convert=["layers.1"])),
        lambda tensors, setting: (plain(tensors, setting), setting.update(modules_to_not_convert=[LAYERS[1]])),
        lambda tensors, setting: (plain(tensors, setting), setting.update(modules_to_not_convert=["re:.*1.mlp"])),
    ],
)
def test_modules_that_are_left(tmp_path: Path, edit: Edit) -> None:
    checkpoint = opened(tmp_path, "awq", edit)
    checkpoint.check_readable()
    assert checkpoint.shape(f"{LAYERS[1]}.weight") == (64, 128)


def test_rules_of_gptqmodel_for_single_modules(tmp_path: Path) -> None:
    def mixed(tensors: Tensors, setting: dict[str, Any]) -> None:
        wide, _ = recorded("gptq_8_asym")
        del wide["m.qzeros_v1"]
        tensors |= {LAYERS[1] + key.removeprefix("m"): tensor for key, tensor in wide.items()}
        setting["dynamic"] = {r"+:.*layers\.1\..*": {"bits": 8, "sym": False}}

    checkpoint = opened(tmp_path, "gptq_4_sym", mixed)
    assert torch.equal(checkpoint.tensor(f"{LAYERS[1]}.weight"), recorded("gptq_8_asym")[1])
    assert torch.equal(checkpoint.tensor(f"{LAYERS[0]}.weight"), recorded("gptq_4_sym")[1])


def test_two_settings_that_differ(tmp_path: Path) -> None:
    opened(tmp_path, "awq", lambda *_: None).check_readable()
    config = {"quantization_config": AWQ, "text_config": {"quantization_config": AWQ}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    Checkpoint(tmp_path).check_readable()
    config["text_config"] = {"quantization_config": AWQ | {"group_size": 64}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"quantization_config of config.json says something else"):
        Checkpoint(tmp_path).check_readable()


def test_half_a_shard_is_not_half_a_map(tmp_path: Path) -> None:
    """Codes and scales in two files: both are read, and one that is missing is missed by name."""
    opened(tmp_path, "awq", lambda *_: None)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    names = {key: f"model-0000{1 + key.endswith('scales')}-of-00002.safetensors" for key in tensors}
    for name in set(names.values()):
        save_file({key: tensors[key] for key in tensors if names[key] == name}, tmp_path / name)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    checkpoint = Checkpoint(tmp_path)
    assert torch.equal(checkpoint.tensor(f"{LAYERS[0]}.weight"), recorded("awq")[1])
    assert {path.name for path in checkpoint.tensor_files} == set(names.values())
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"00002-of-00002.safetensors is missing"):
        Checkpoint(tmp_path).check_readable()


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(a+)+b", "repeats a group"),
        (".*.*.*.*.*x", "repeats more than"),
        (r"(a)\1", "refers to one"),
        ("(", "is no regular expression"),
        ("x" * 1000, "1000 characters"),
    ],
)
def test_patterns_that_could_take_for_ever_are_refused(pattern: str, message: str) -> None:
    with pytest.raises(PatternError, match=message):
        ModuleNames([f"re:{pattern}"])


def test_names_under_other_beginnings() -> None:
    names = ModuleNames(["re:visual.*", "model.language_model.layers.3.mlp", "lm_head"])
    assert names.match("model.visual.blocks.0.attn.qkv")
    assert names.match("model.layers.3.mlp")
    assert not names.match("model.layers.3.mlp.up_proj")
    assert names.match("lm_head")
    assert not names.match("model.layers.4.mlp")
