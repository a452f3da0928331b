"""A model family of someone else's package, installed as a user would: built, checked and run by its name alone."""

from __future__ import annotations

import importlib
import io
import json
import os
import re
import subprocess
import sys
import tokenize
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from framefusion.errors import BundleError, UnknownFamilyError
from framefusion.export.families import FAMILIES, family_of, installed_families
from framefusion.runtime.bundle import Bundle
from framefusion.runtime.families import RULES, load_preprocessing
from framefusion.runtime.format.manifest_file import read_manifest
from framefusion.runtime.media.video.frames import read_video
from framefusion.runtime.pipeline import Pipeline
from framefusion.runtime.request import Request
from framefusion.runtime.text.prompt import Prompt, Turn, Visual
from tests.families import llava_checkpoints as tiny
from tests.families.case import Array, relative_error
from tests.films import write_film
from tests.test_reducer_package import EXPORT, RUN, python

ROOT = Path(__file__).parent.parent
PACKAGE = Path(__file__).parent / "family_package"
CONTROLS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<frame>", "</frame>")
MOST_LINES = 60
IMPORT = r"\s*(from|import) |if TYPE_CHECKING:"
LIMIT = 1e-4  # fp32 sums in another order differ by about 1e-6 a layer


def write_checkpoint(folder: Path) -> None:
    """A tiny checkpoint of the family: SigLIP, projector and Qwen2 of transformers' classes with random weights."""
    import safetensors.torch
    from torch import nn
    from transformers import Qwen2Config, Qwen2ForCausalLM, SiglipVisionConfig, SiglipVisionModel

    ids = tiny.write_tokenizer(folder, CONTROLS)
    vision = tiny.vision_config("siglip") | {"image_size": 5 * tiny.PATCH}
    text = tiny.text_config("qwen2", ids)
    projector = nn.Sequential(nn.Linear(tiny.VISION, tiny.HIDDEN), nn.GELU(), nn.Linear(tiny.HIDDEN, tiny.HIDDEN))
    parts = {
        "vision_tower.": tiny.randomize(SiglipVisionModel(SiglipVisionConfig(**vision)), 1),
        "projector.": tiny.randomize(projector, 2),
        "language_model.": tiny.randomize(Qwen2ForCausalLM(Qwen2Config(**text)), 3),
    }
    weights = {
        prefix + name.removeprefix("vision_model."): value.contiguous()
        for prefix, part in parts.items()
        for name, value in part.state_dict().items()
    }
    safetensors.torch.save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = {
        "architectures": ["GlowwormForConditionalGeneration"], "model_type": "glowworm", "vision_config": vision,
        "text_config": text,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids["<|im_end|>"]}))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the package is installed; nothing is written beside the repository's own files."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "source" / "glowworm").mkdir(parents=True)
    for file in (*PACKAGE.glob("*.toml"), *PACKAGE.glob("glowworm/*.py")):  # setuptools writes where it builds
        (folder / "source" / file.relative_to(PACKAGE)).write_bytes(file.read_bytes())
    pip = (sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index", "--quiet")
    target = folder / "site"
    command = (*pip, "--target", str(target), str(folder / "source"))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return target


def install(site: Path, package: str, source: str, **points: str) -> None:
    """A package of one module with entry points, group -> line, without pip."""
    (site / f"{package}.py").write_text(source)
    record = site / f"{package}-0.1.dist-info"
    record.mkdir()
    (record / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 0.1\n")
    lines = [f"[framefusion.{group}]\n{line}\n" for group, line in points.items()]
    (record / "entry_points.txt").write_text("".join(lines))


CONFIG = {"architectures": ["StrangerForConditionalGeneration"], "model_type": "stranger"}


def test_a_package_that_cannot_be_loaded_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(
        tmp_path, "broken_family", "raise RuntimeError('no luck')",
        families="stranger = broken_family:ROW", preprocessing="stranger = broken_family:Rule",
    )  # fmt: skip
    monkeypatch.syspath_prepend(tmp_path)
    where = r"'stranger' of broken_family 0\.1 \(broken_family:\w+\) cannot be loaded \(RuntimeError: no luck\)"
    with pytest.raises(UnknownFamilyError, match=f"^family {where}: repair or uninstall it"):
        family_of(CONFIG)
    with pytest.raises(BundleError, match=f"^preprocessing rule {where}: repair or uninstall it"):
        load_preprocessing("stranger")
    assert family_of({"model_type": "qwen2_vl"}).name == "qwen2_vl"  # the box's families do not depend on it


def test_a_package_that_brings_something_else_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(
        tmp_path, "odd_family", "from framefusion.runtime.families.llava import LlavaPreprocessing as Rule\nROW = 7\n",
        families="stranger = odd_family:ROW", preprocessing="stranger = odd_family:Rule\nnumber = odd_family:ROW",
    )  # fmt: skip
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UnknownFamilyError, match=r"odd_family 0\.1 \(odd_family:ROW\) is 7: name a .*Family that is"):
        family_of(CONFIG)
    with pytest.raises(BundleError, match=r"odd_family:Rule\) calls itself 'llava': give class and entry point"):
        load_preprocessing("stranger")
    with pytest.raises(BundleError, match=r"odd_family:ROW\) is 7: name a subclass of .*Preprocessing"):
        load_preprocessing("number")


def test_a_name_of_the_table_cannot_be_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = (
        "from dataclasses import replace\nfrom framefusion.export.families import FAMILIES\n"
        "ROW = replace(FAMILIES[0], name='nvila')\nCLAIM = replace(FAMILIES[0], name='stranger')\n"
    )
    install(
        tmp_path, "greedy_family", source,
        families="nvila = greedy_family:ROW", preprocessing="nvila = greedy_family:ROW",
    )  # fmt: skip
    monkeypatch.syspath_prepend(tmp_path)
    assert installed_families() == ()
    assert load_preprocessing("nvila") is RULES["nvila"]
    install(tmp_path, "claiming_family", source, families="stranger = claiming_family:CLAIM")
    importlib.invalidate_caches()
    assert family_of({"model_type": "qwen2_vl"}) is FAMILIES[0]
    with pytest.raises(
        UnknownFamilyError, match=r"Qwen2VLForConditionalGeneration is claimed by qwen2_vl and stranger"
    ):
        family_of(CONFIG)


def test_two_packages_of_one_name_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("first_family", "second_family"):
        install(tmp_path, package, "", families=f"stranger = {package}:ROW", preprocessing=f"stranger = {package}:Rule")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UnknownFamilyError, match=r"'stranger' is claimed by first_family 0\.1 and second_family 0\.1"):
        family_of(CONFIG)
    with pytest.raises(BundleError, match="claimed by first_family"):
        load_preprocessing("stranger")


def code_lines(file: Path) -> int:
    """Lines with code: no docstrings, comments, blank lines or imports."""
    text = file.read_text(encoding="utf-8")
    skipped = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines: set[int] = set()
    previous = tokenize.NEWLINE
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        is_docstring = token.type == tokenize.STRING and previous in skipped
        if token.type not in skipped and not is_docstring:
            lines |= set(range(token.start[0], token.end[0] + 1))
        previous = token.type
    return len([number for number in lines if not re.match(IMPORT, text.splitlines()[number - 1])])


def test_a_family_of_a_known_kind_is_few_lines() -> None:
    counts = {file.name: code_lines(file) for file in PACKAGE.glob("glowworm/*.py")}
    assert counts.keys() == {"__init__.py", "preprocessing.py", "row.py", "tower.py"}
    assert 20 < sum(counts.values()) < MOST_LINES, counts


def test_a_row_is_read_without_torch() -> None:
    code = "import glowworm.row, sys; print({'torch', 'transformers', 'onnx'} & set(sys.modules))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(PACKAGE), str(ROOT)])}
    done = subprocess.run((sys.executable, "-c", code), env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"  # `ff-export families` lists every row and has to be quick


def expected_logits(checkpoint: Path, frames: Array, prompt: Prompt) -> Array:
    """Logits [V] behind the prompt, by transformers' own classes with the file's tensors: nothing of the package."""
    import safetensors.torch
    import torch
    from PIL import Image
    from torch.nn import functional
    from transformers import Qwen2Config, Qwen2ForCausalLM, SiglipVisionConfig, SiglipVisionModel

    config = json.loads((checkpoint / "config.json").read_text())
    weights = safetensors.torch.load_file(checkpoint / "model.safetensors")

    def part(prefix: str, inner: str = "") -> dict[str, Any]:
        return {inner + key.removeprefix(prefix): v for key, v in weights.items() if key.startswith(prefix)}

    vision = SiglipVisionModel(SiglipVisionConfig(**config["vision_config"]))
    inner = "" if hasattr(vision, "embeddings") else "vision_model."
    vision.load_state_dict(part("vision_tower.", inner))
    llm = Qwen2ForCausalLM(Qwen2Config(**config["text_config"]))
    llm.load_state_dict(part("language_model."))
    size = config["vision_config"]["image_size"]
    resized = [np.asarray(Image.fromarray(f).resize((size, size), Image.Resampling.BICUBIC)) for f in frames]
    pixels = torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2) / 255.0
    mean, std = (torch.tensor(values)[:, None, None] for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.inference_mode():
        states = vision((pixels - mean) / std).last_hidden_state
        for number in ("0", "2"):
            states = functional.gelu(states) if number == "2" else states
            states = functional.linear(
                states, weights[f"projector.{number}.weight"], weights[f"projector.{number}.bias"]
            )
        ids = torch.from_numpy(prompt.token_ids)
        embedded = llm.get_input_embeddings()(ids.clamp(0))
        embedded[ids < 0] = states.flatten(0, 1)
        logits: Array = llm(inputs_embeds=embedded[None]).logits[0, -1].numpy()
    return logits


@pytest.mark.slow
def test_an_installed_family_is_built_checked_and_answers(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), str(ROOT)])}
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    write_checkpoint(checkpoint)
    film = write_film(tmp_path / "film.mp4", frames=40, fps=8)
    bundle = tmp_path / "bundle"

    listed = json.loads(python(environment, *EXPORT, "families", "--json"))["families"]
    assert [row["name"] for row in listed][-1] == "glowworm"
    options = ("--cost", 0.5, "--max-input-len", 512, "--json")
    built = json.loads(python(environment, *EXPORT, "build", checkpoint, "-o", bundle, *options))
    assert built["check"]["passed"]
    question = ("--video", film, "--prompt", "What happens?", "--max-new-tokens", 2, "--json")
    answer = json.loads(python(environment, *RUN, "generate", bundle, *question))
    assert answer["cost"]["reached"] == pytest.approx(0.5, abs=0.1)

    # In this process, where no package is installed, the bundle is of nobody's family.
    with pytest.raises(BundleError, match=r"preprocessing\.rule: expected one of .*qwen_vl.*, found 'glowworm'"):
        read_manifest(bundle)
    monkeypatch.syspath_prepend(site)
    pipeline = Pipeline(Bundle(bundle), threads=1)
    manifest = pipeline.manifest
    assert (manifest.model.family, manifest.preprocessing.rule, manifest.vision.kind) == (
        "glowworm",
        "glowworm",
        "pooled",
    )
    video = read_video(film, manifest.sampling)
    assert video.indices.tolist() == [24, 28, 32, 36]  # two a second of the film's end, as the package's rule says
    turns = [Turn("user", (Visual.VIDEO, "What happens?"))]
    prompt, _ = pipeline.read(turns, [film])
    steps = list(pipeline.stream(turns, [film], Request(max_new_tokens=1, cost=1.0), logits=True))
    ours = next(step.logits for step in steps if step.logits is not None)
    theirs = expected_logits(checkpoint, video.frames, prompt)
    assert relative_error(ours[: theirs.size], theirs[: ours.size]) < LIMIT
