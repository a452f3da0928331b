"""Every build is compared with transformers' own class, layer by layer: what that finds, and that nothing escapes it.

A fault of reading is planted by giving transformers another folder than this project reads: what the one sees and the
other does not is what a wrong reader would have missed. Weights stay on the disk, as for a model larger than memory.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from framefusion.errors import CheckFailedError
from framefusion.export.build import build
from framefusion.export.check import check
from framefusion.export.check.agreement import LIMIT, Agreement, agreement_of
from framefusion.export.check.observation import SPARING, observe
from framefusion.export.check.verify import memory_of_check, memory_of_streamed
from framefusion.export.checkpoints.checkpoint import Checkpoint
from framefusion.export.eager.pipeline import uncompiled_bundle
from framefusion.export.families import decoders
from framefusion.export.options import BuildOptions
from framefusion.export.plan.build_plan import BuildPlan
from framefusion.export.report.inspection import comparison_summary
from tests.families import CASES
from tests.families.case import FamilyCase
from tests.random_checkpoint import random_checkpoint

OPTIONS = BuildOptions(cost=0.5)
Tensors = dict[str, torch.Tensor]


def agreement(plan: BuildPlan, folder: Path) -> Agreement:
    """Torch graphs and transformers' class, both streamed."""
    return agreement_of(plan, observe(uncompiled_bundle(plan, folder), plan, SPARING))


def failing(found: Agreement) -> list[str]:
    return [line["what"] for line in found.lines if not line["value"] <= line["limit"]]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.family)
def test_every_family_is_compared_a_layer_at_a_time(case: FamilyCase, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    case.write(folder, case.variants[0])
    plan = BuildPlan(Checkpoint(folder), OPTIONS)
    found = agreement(plan, tmp_path / "bundle")
    assert failing(found) == []
    facts = found.facts
    assert facts["compared"]
    assert facts["classes"]
    assert len(facts["errors_by_layer"]) == plan.config.num_layers + 1
    assert facts["answer_tokens"] <= 1  # less where a random model's answer is a token of pictures
    assert facts["stand_in"] == plan.family.stand_in
    whole = f"all {plan.config.num_layers} layers"
    line = comparison_summary({"transformers": facts})
    assert line.startswith(f"compared with transformers {facts['version']}'s {facts['classes'][0]}")
    assert whole in line
    assert ("NOT compared: " in line) == bool(plan.family.stand_in)


def test_what_was_not_compared_is_said_first_and_loudly() -> None:
    facts = {
        "compared": True, "version": "5.24.0", "classes": ["A", "B"], "layers": 28, "of_layers": 28,
        "errors": {"logits": 1e-6, "rows": 2e-6}, "stand_in": "",
    }  # fmt: skip
    said = comparison_summary({"transformers": facts})
    assert said == "compared with transformers 5.24.0's A and B, all 28 layers: largest error 2e-06"
    said = comparison_summary({"transformers": facts | {"stand_in": "projector (x)"}})
    assert said.endswith("; NOT compared: projector (x)")
    assert "ONLY the first 4 of 28 layers" in comparison_summary({"transformers": facts | {"layers": 4}})
    short = {"compared": False, "why": "it needs 9 GB of memory"}
    assert comparison_summary({"transformers": short}) == "NOT COMPARED WITH TRANSFORMERS: it needs 9 GB of memory"
    assert comparison_summary({}).startswith("NOT CHECKED")
    assert comparison_summary({"lines": []}).startswith("NOT COMPARED WITH TRANSFORMERS")


def qwen(folder: Path, **how: Any) -> Path:
    return random_checkpoint(folder, pixels=112 * 112, **how)


def llama(folder: Path) -> Path:
    """InternVL's format around LlamaForCausalLM."""
    (case,) = (case for case in CASES if case.family == "internvl_chat")
    folder.mkdir()
    case.write(folder, "small")
    config = json.loads((folder / "config.json").read_text())
    config["llm_config"] |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": True}
    (folder / "config.json").write_text(json.dumps(config))
    return change(folder, lambda tensors: tensors | o_biases(tensors, 0.0))


def o_biases(tensors: Tensors, scale: float) -> Tensors:
    names = [name for name in tensors if name.endswith("self_attn.o_proj.weight")]
    return {name[:-6] + "bias": scale * torch.randn(tensors[name].shape[0]) for name in names}


def change(folder: Path, of: Callable[[Tensors], Tensors]) -> Path:
    """Rewrite the tensors of a checkpoint in one file."""
    (path,) = folder.glob("*.safetensors")
    save_file({name: tensor.contiguous() for name, tensor in of(load_file(path)).items()}, path, {"format": "pt"})
    return folder


def configure(folder: Path, **text: Any) -> Path:
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= text
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def yarn(folder: Path) -> None:
    """As model cards say; transformers lets it win over rope_parameters."""
    config = json.loads((folder / "config.json").read_text())
    section = config["text_config"]["rope_parameters"]["mrope_section"]
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048, "mrope_section": section}
    configure(folder, rope_scaling=scaling)


def newer_file(folder: Path) -> None:
    """model.safetensors beside shards and their index: transformers reads it first."""
    tensors: Tensors = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    changed = {name: value + (0.1 * torch.randn_like(value) if "mlp" in name else 0) for name, value in tensors.items()}
    save_file(changed, folder / "model.safetensors", {"format": "pt"})


def duplicate(folder: Path) -> None:
    """A tensor of an earlier shard stands in the last one, too, with other values."""
    *earlier, last = sorted(folder.glob("*.safetensors"))
    tensors = {name: value for path in earlier for name, value in load_file(path).items() if "mlp.down_proj" in name}
    name = min(tensors)
    save_file(load_file(last) | {name: torch.randn_like(tensors[name])}, last, {"format": "pt"})


def biased(folder: Path) -> None:
    change(folder, lambda tensors: tensors | o_biases(tensors, 1.0))


def sharded(folder: Path) -> Path:
    return qwen(folder, max_shard_size="40KB")


FAULTS: dict[str, tuple[Callable[[Path], Path], Callable[[Path], None]]] = {
    "yarn beside rope_parameters": (qwen, yarn),
    "stale index": (sharded, newer_file),
    "tensor in two shards": (sharded, duplicate),
    "bias of the output projection": (llama, biased),
}


@pytest.mark.slow
@pytest.mark.parametrize(("write", "plant"), FAULTS.values(), ids=FAULTS)
def test_what_this_project_misread_is_found(
    write: Callable[[Path], Path], plant: Callable[[Path], None], tmp_path: Path
) -> None:
    clean, faulty = write(tmp_path / "clean"), tmp_path / "faulty"
    shutil.copytree(clean, faulty)
    plant(faulty)
    checkpoint = Checkpoint(clean)
    plan = BuildPlan(checkpoint, OPTIONS)
    assert plan.checkpoint.files  # the places of tensors are known from here on
    assert failing(agreement(plan, tmp_path / "clean-bundle")) == []
    checkpoint.folder = faulty  # what transformers reads
    found = agreement(plan, tmp_path / "bundle")
    assert any(what.startswith("what enters") for what in failing(found))
    assert any("read the checkpoint differently" in note for note in found.notes)
    assert not check.with_agreement({"lines": [], "notes": []}, found)["passed"]


@pytest.mark.slow
def test_positions_in_one_dimension_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """mrope_section is absent and the reader takes 1-D RoPE, where transformers has sections of its own."""
    read = decoders.decoder_config
    monkeypatch.setattr(
        decoders, "decoder_config", lambda *given: dataclasses.replace(read(*given), mrope_section=None)
    )
    plan = BuildPlan(Checkpoint(qwen(tmp_path / "checkpoint")), OPTIONS)
    assert failing(agreement(plan, tmp_path / "bundle"))


@pytest.mark.slow
def test_tensors_of_several_types_are_compared_as_they_are_stored(tmp_path: Path) -> None:
    """A wider type beside a narrower one is not rounded; of tensors that no bundle reads the type does not count."""

    def retyped(tensors: Tensors) -> Tensors:
        wide = torch.tensor(1 / 3)
        return {name: value * wide if "norm" in name else value.bfloat16() for name, value in tensors.items()}

    same = change(qwen(tmp_path / "same"), lambda tensors: {name: value.bfloat16() for name, value in tensors.items()})
    mixed = change(qwen(tmp_path / "mixed"), retyped)
    plan, other = BuildPlan(Checkpoint(same), OPTIONS), BuildPlan(Checkpoint(mixed), OPTIONS)
    assert (plan.stored_types(), other.stored_types()) == ({"BF16"}, {"BF16", "F32"})
    assert memory_of_streamed(other) > memory_of_streamed(plan)
    assert failing(agreement(plan, tmp_path / "same-bundle")) == []
    assert failing(agreement(other, tmp_path / "mixed-bundle")) == []


@pytest.mark.slow
def test_the_first_layers_are_compared_with_the_first_layers(tmp_path: Path) -> None:
    options = dataclasses.replace(OPTIONS, num_decoder_layer=3)
    plan = BuildPlan(Checkpoint(qwen(tmp_path / "checkpoint", layers=5)), options)
    found = agreement(plan, tmp_path / "bundle")
    assert failing(found) == []
    assert (found.facts["layers"], found.facts["of_layers"]) == (3, 5)
    assert "ONLY the first 3 of 5 layers" in comparison_summary({"transformers": found.facts})


@pytest.mark.slow
def test_what_transformers_cannot_read_is_said_and_nothing_is_published(tmp_path: Path) -> None:
    checkpoint = Checkpoint(qwen(tmp_path / "checkpoint"))
    plan = BuildPlan(checkpoint, OPTIONS)
    configure(checkpoint.folder, intermediate_size=80)
    with pytest.raises(CheckFailedError, match=r"Qwen2VLForConditionalGeneration of transformers .* cannot read"):
        agreement(plan, tmp_path / "bundle")


@pytest.mark.slow
def test_what_transformers_cannot_compute_is_said(tmp_path: Path) -> None:
    """Sections that transformers fills in are those of heads of 128."""
    checkpoint = Checkpoint(qwen(tmp_path / "checkpoint"))
    plan = BuildPlan(checkpoint, OPTIONS)
    configure(checkpoint.folder, rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    with pytest.raises(CheckFailedError, match=r"cannot compute .*(split|mrope_section)"):
        agreement(plan, tmp_path / "bundle")


@pytest.mark.slow
def test_a_tensor_that_transformers_does_not_find_fails_the_comparison(tmp_path: Path) -> None:
    clean, lacking = qwen(tmp_path / "clean"), tmp_path / "lacking"
    shutil.copytree(clean, lacking)
    change(lacking, lambda tensors: {name: value for name, value in tensors.items() if "layers.1.mlp.up" not in name})
    checkpoint = Checkpoint(clean)
    plan = BuildPlan(checkpoint, OPTIONS)
    assert plan.checkpoint.files
    checkpoint.folder = lacking
    found = agreement(plan, tmp_path / "bundle")
    assert failing(found)
    assert any("transformers found no model.language_model.layers.1.mlp.up_proj.weight" in note for note in found.notes)


@pytest.mark.slow
def test_a_bundle_larger_than_memory_is_run_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The graphs themselves in ONNX Runtime with weights that stay in their files, in half precision."""
    checkpoint = Checkpoint(qwen(tmp_path / "checkpoint", layers=7))
    options = BuildOptions(dtype="float16", max_input_len=512)
    plan = BuildPlan(checkpoint, options)
    least, needed = memory_of_streamed(plan), memory_of_check(plan)
    assert least < needed
    monkeypatch.setattr(check, "available_memory", lambda: least)
    report = build(checkpoint, tmp_path / "bundle", options).manifest.check
    assert report["passed"]
    assert (report["method"], report["why"]) == ("streamed", "")
    said = {line["what"]: line for line in report["lines"]}
    assert {"vision features", "dense logits", "reduced logits", "dense logits against transformers"} <= set(said)
    assert said["logits against transformers"]["limit"] == LIMIT < said["dense logits"]["limit"]
    assert report["transformers"]["layers"] == 7
    assert comparison_summary(report).startswith("compared with transformers")
