"""The same answers from every version of transformers that the live model is said to work with.

    python -m tools.live_versions PYTHON PYTHON ...   an interpreter for each version; writes results and table
    python -m tools.live_versions                     writes the table from the committed results

Tiny checkpoints of the six families and their pixels are written once, by this interpreter, with the suite's own
cases; each other one answers from the same files. A cell holds three answers: of transformers alone; of a model that is
reduced to all of its tokens, which must be the first one's; of a model that is reduced to a part of them, which must be
the same in all versions.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "tools" / "bench" / "results" / "live_versions.json"
DOCUMENT = ROOT / "docs" / "live.md"
BEGIN = "<!-- live versions -->"
END = "<!-- end of live versions -->"
NEW = 8  # tokens of an answer
COST = 0.4
CHUNK = 53  # tokens: cuts within a frame
NO_END = 10**6  # an id that no vocabulary has: answers are of one length
WAYS = ("greedy", "sampling", "beams", "padded batch", "two turns", "static cache", "chunked prefill", "assisted")
SETTINGS: dict[str, dict[str, Any]] = {
    "sampling": {"do_sample": True, "top_k": 20},
    "beams": {"num_beams": 3},
    "static cache": {"cache_implementation": "static"},
    "chunked prefill": {"prefill_chunk_size": CHUNK},
    "assisted": {"prompt_lookup_num_tokens": 3},
}
Answers = dict[str, Any]


# --- Inputs, written once -------------------------------------------------------------------------------------------


def write_inputs(folder: Path) -> list[str]:
    """A checkpoint and two prompts with a film for each family, as torch.save writes them.  -> the families"""
    import torch

    from framefusion.live.labels import FAMILIES
    from framefusion.runtime.media.sources import as_video
    from framefusion.runtime.request import Stopwatch
    from framefusion.runtime.text.prompt import Turn, Visual
    from tests.families import CASES
    from tests.families.case import clip
    from tests.families.eager import eager_pipeline
    from tests.families.test_families import OPTIONS, Conversation, Subject
    from tests.families.test_live import live_logits

    cases = [case for case in CASES if case.family in FAMILIES]
    for case in cases:
        place = folder / case.family
        (place / "checkpoint").mkdir(parents=True)
        case.write(place / "checkpoint", case.variants[0])
        pipeline = eager_pipeline(place / "checkpoint", place / "bundle", OPTIONS)
        subject = Subject(case, place / "checkpoint", pipeline, case.reference(place / "checkpoint"))
        model: Any = subject.reference.model  # type: ignore[attr-defined]
        sampling = pipeline.manifest.sampling
        prompts = []
        for seed, text in enumerate(("What happens?", "What happens then, and why does it?")):
            turns = [Turn("user", (Visual.VIDEO, text))]
            visuals = pipeline.read_visuals(turns, [clip(seed=seed)], sampling, Stopwatch())
            prompt = pipeline.prompt(turns, visuals)
            videos = [as_video(clip(seed=seed), sampling)]
            conversation = Conversation(turns, videos, visuals, prompt, [], None)  # type: ignore[arg-type]
            inputs: dict[str, Any] = {}
            hook = model.register_forward_pre_hook(
                lambda _, __, named, inputs=inputs: inputs.update(named), with_kwargs=True
            )
            live_logits(subject, conversation)
            hook.remove()
            inputs.pop("position_ids", None)  # transformers' own rule
            prompts.append({name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)})
        sharpen(model)
        torch.save({"class": type(model).__name__, "prompts": prompts}, place / "inputs.pt")
        model.save_pretrained(place / "model")
    return [case.family for case in cases]


def sharpen(model: Any) -> None:
    """Weights at which the answer depends on every token, where the suite's would say the same one again and again."""
    import torch

    if model.config.model_type not in ("qwen2_vl", "qwen2_5_vl"):
        return
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weights in model.get_decoder().named_parameters():
            if weights.ndim > 1:
                weights.normal_(std=2 * weights.shape[-1] ** -0.5 if "_proj" in name else 1.0)


# --- Answers of one version -----------------------------------------------------------------------------------------


def answer(folder: Path, families: list[str]) -> Answers:
    """The answers of this interpreter's transformers: family, way, then `dense`, `all kept`, `reduced` or an error."""
    import torch
    import transformers

    from framefusion.interface import apply_framefusion, remove_framefusion

    logging: Any = transformers.logging
    logging.set_verbosity_error()
    answers: Answers = {}
    for family in families:
        inputs = torch.load(folder / family / "inputs.pt", weights_only=True)
        kind: Any = getattr(transformers, inputs["class"])
        model = kind.from_pretrained(folder / family / "model", dtype=torch.float32).eval()
        prompts = [completed(model, prompt) for prompt in inputs["prompts"]]
        answers[family] = {}
        for way in WAYS:
            cell: dict[str, Any] = {"dense": tried(model, prompts, way)}
            for name, numbers in (("all kept", (1.0, 1.0)), ("reduced", (COST, None))):
                handle = apply_framefusion(model, *numbers)
                cell[name] = tried(model, prompts, way)
                if way == "greedy" and name == "reduced":
                    answers[family]["tokens per layer"] = list(handle.last[0].tokens_per_layer)
                remove_framefusion(model)
            answers[family][way] = cell
    return {"transformers": transformers.__version__, "torch": torch.__version__, "families": answers}


def completed(model: Any, prompt: dict[str, Any]) -> dict[str, Any]:
    """What a processor gives besides ids and pixels."""
    import torch

    ids = prompt["input_ids"]
    config = model.config
    whole = {**prompt, "attention_mask": torch.ones_like(ids)}
    if "qwen" in config.model_type:
        whole["mm_token_type_ids"] = (ids == config.image_token_id).int() + 2 * (ids == config.video_token_id).int()
    return whole


def tried(model: Any, prompts: list[dict[str, Any]], way: str) -> Any:
    """The new tokens of each row, or the error's kind and first line."""
    import torch

    torch.manual_seed(0)
    try:
        if way == "padded batch":
            return generated(model, batched(prompts), way)
        return two_turns(model, prompts[0]) if way == "two turns" else generated(model, prompts[0], way)
    except Exception as error:  # whatever a version cannot do is the finding
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"


def generated(model: Any, prompt: dict[str, Any], way: str) -> list[list[int]]:
    """New tokens.  -> [B, NEW]"""
    settings = {"do_sample": False, "max_new_tokens": NEW, "pad_token_id": 0, "eos_token_id": NO_END}
    rows: list[list[int]] = model.generate(**prompt, **settings | SETTINGS.get(way, {}))[
        :, prompt["input_ids"].shape[1] :
    ].tolist()
    return rows


def batched(prompts: list[dict[str, Any]]) -> dict[str, Any]:
    """Rows padded on the left, pixels one after the other."""
    import torch

    longest = max(prompt["input_ids"].shape[1] for prompt in prompts)
    batch = {}
    for name in prompts[0]:
        parts = [prompt[name] for prompt in prompts]
        if name in ("input_ids", "attention_mask", "mm_token_type_ids"):
            parts = [torch.nn.functional.pad(rows, (longest - rows.shape[1], 0)) for rows in parts]
        batch[name] = torch.cat(parts)
    return batch


def two_turns(model: Any, prompt: dict[str, Any]) -> list[list[int]]:
    """A second question over the cache of the first one, whose tokens follow those of the first answer."""
    import torch
    from transformers import DynamicCache

    settings = {"do_sample": False, "max_new_tokens": NEW, "pad_token_id": 0, "eos_token_id": NO_END}
    past: Any = DynamicCache(config=model.config.get_text_config())
    name = "cache" if "cache" in parameters(type(model).forward) else "past_key_values"
    first = model.generate(**prompt, **{name: past}, **settings)
    ids = torch.cat([first, torch.tensor([[5, 9, 2, 7]])], dim=1)
    length = prompt["input_ids"].shape[1]
    second = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **{name: past}, **settings)
    return [[*first[0, length:].tolist(), *second[0, ids.shape[1] :].tolist()]]


def parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    """Names of a function's arguments."""
    import inspect

    return tuple(inspect.signature(function).parameters)


# --- The table ------------------------------------------------------------------------------------------------------


def verdict(results: list[Answers], version: int, family: str, way: str) -> str:
    """A cell: equal, what transformers itself does not do, or what is wrong."""
    cells = [result["families"][family][way] for result in results]
    cell = cells[version]
    newest = cells[-1]
    if isinstance(cell["dense"], str):
        return "not by transformers"
    if isinstance(cell["reduced"], str):
        return "refused"
    if cell["all kept"] != cell["dense"]:
        return "**all kept differs**"
    if cell["reduced"] == newest["reduced"]:
        return "equal"
    return "**differs**" if cell["dense"] == newest["dense"] else "differs as transformers does"


def table(results: list[Answers]) -> str:
    """A line for each version and family, a column for each way."""
    lines = [f"| version | family | {' | '.join(WAYS)} |", "| --- " * (len(WAYS) + 2) + "|"]
    for index, result in enumerate(results):
        minor = ".".join(result["transformers"].split(".")[:2])
        for family in result["families"]:
            cells = " | ".join(verdict(results, index, family, way) for way in WAYS)
            lines.append(f"| transformers {minor} | {family} | {cells} |")
    return "\n".join(lines)


def write_table() -> None:
    """Render the results into the document."""
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    text = DOCUMENT.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    behind = rest.split(END)[1]
    DOCUMENT.write_text(f"{before}{BEGIN}\n{table(results)}\n{END}{behind}", encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    """See the module; `--answer` is what it runs in each interpreter."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pythons", metavar="PYTHON", nargs="*", help="an interpreter with a version of transformers")
    parser.add_argument("--answer", nargs="+", help=argparse.SUPPRESS)
    flags = parser.parse_args(arguments)
    if flags.answer:
        folder, output, *families = flags.answer
        Path(output).write_text(json.dumps(answer(Path(folder), families)), encoding="utf-8")
        return
    if flags.pythons:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            results = []
            families = write_inputs(folder)
            for python in flags.pythons:
                output = folder / "answers.json"
                command = [python, "-m", "tools.live_versions", "--answer", str(folder), str(output), *families]
                subprocess.run(command, cwd=ROOT, check=True)
                results.append(json.loads(output.read_text(encoding="utf-8")))
        results.sort(key=lambda result: [int(part) for part in result["transformers"].split(".")[:2]])
        lines = ",\n".join(json.dumps(result) for result in results)
        RESULTS.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    write_table()


if __name__ == "__main__":
    main()
