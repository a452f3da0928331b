"""`apply_framefusion` on live models: recordings of the reference, then everything a forward can be asked for.

Tolerances of the recordings are those of test_model_goldens.py.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from framefusion.errors import BackendError, BudgetError, CheckpointError, PromptError
from framefusion.interface import apply_framefusion, remove_framefusion
from framefusion.live.plan import apply_plan, apply_plan_on_device
from framefusion.live.seams import installed
from framefusion.reduction import plan as host_plan
from framefusion.reduction import policy, tracks
from tests.random_checkpoint import random_checkpoint

GOLDENS = Path(__file__).parents[1] / "goldens"
TOLERANCE = 2e-5
DEPTH = 4
LAYERS = {"layers28_as_it_stands": 28, "layers_true_6": 6}
CASES = [("qwen2", "s1_merge_then_prune"), ("qwen2", "s2_topk_budget"), ("qwen2_vl", "v1_merge_then_prune")]


@cache
def golden_model(name: str) -> Any:
    import transformers

    kind: Any = transformers.Qwen2VLForConditionalGeneration if name == "qwen2_vl" else transformers.Qwen2ForCausalLM
    return kind.from_pretrained(GOLDENS / name, dtype=torch.float32).eval()


def recording(model: str, name: str, variant: str) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    settings = json.loads((GOLDENS / model / "e2e.json").read_text())["settings"]
    with np.load(GOLDENS / model / f"{name}.{variant}.npz") as loaded:
        return next(setting for setting in settings if setting["name"] == name), dict(loaded)


def relative(ours: torch.Tensor, theirs: NDArray[Any]) -> float:
    return float(np.abs(ours.numpy() - theirs).max() / np.abs(theirs).max())


@pytest.mark.parametrize("variant", LAYERS)
@pytest.mark.parametrize(("name", "setting"), CASES)
@torch.inference_mode()
def test_equals_the_recording(name: str, setting: str, variant: str) -> None:
    """Kept sets, the caches of the first and the last layer, logits of the prefill and of eight decoded tokens."""
    model = golden_model(name)
    recorded, golden = recording(name, setting, variant)
    given = recording(name, setting, "input")[1]
    dense = recording(name, setting, "dense")[1]
    handle = apply_framefusion(model, recorded["cost"], recorded["sim"], recorded["ratio"], depth=DEPTH)
    handle.settings = replace(handle.settings, num_layers=LAYERS[variant])
    inputs: dict[str, Any]
    if name == "qwen2_vl":
        ids = torch.from_numpy(given["input_ids"])
        kinds = 2 * (ids == model.config.video_token_id).int()
        inputs = {"input_ids": ids, "mm_token_type_ids": kinds, "position_ids": torch.from_numpy(dense["position_ids"])}
        inputs |= {name: torch.from_numpy(given[name]) for name in ("pixel_values_videos", "video_grid_thw")}
        labels = None
    else:
        inputs = {"inputs_embeds": torch.from_numpy(given["inputs_embeds"])}
        labels = given["patch_type"]
    before = {key: value.clone() for key, value in inputs.items()}
    if labels is None:
        output = model(**inputs)
    else:
        with handle.labels(labels):
            output = model(**inputs)
    assert all(torch.equal(value, before[key]) for key, value in inputs.items())

    (record,) = handle.last
    assert list(record.tokens_per_layer) == recorded[variant]["kv_len_per_layer_after_prefill"]
    for layer, places in enumerate(record.kept):
        if f"kv_kept_layer{layer}" in golden:
            np.testing.assert_array_equal(places, golden[f"kv_kept_layer{layer}"])
        if f"kcache_layer{layer}" in golden:
            stored = output.past_key_values.layers[layer]
            assert relative(stored.keys, golden[f"kcache_layer{layer}"]) < TOLERANCE
            assert relative(stored.values, golden[f"vcache_layer{layer}"]) < TOLERANCE
    length = output.logits.shape[1]
    assert length == next(iter(inputs.values())).shape[1]
    assert relative(output.logits[0, -1], golden["prefill_logits_last"]) < TOLERANCE

    tokens, past = [], output.past_key_values
    for step, expected in enumerate(golden["decode_logits"]):
        assert relative(output.logits[0, -1], expected) < TOLERANCE, f"step {step}"
        tokens.append(int(output.logits[0, -1].argmax()))
        place = torch.tensor([[length + recorded[variant].get("rope_delta", 0) + step]])
        place = place.expand(3, 1, 1) if name == "qwen2_vl" else place
        output = model(input_ids=torch.tensor([tokens[-1:]]), past_key_values=past, position_ids=place)
    assert tokens == recorded[variant]["decode_tokens"]
    remove_framefusion(model)


# --- Everything a forward can be asked for --------------------------------------------------------------------------

SAME = 1e-4  # of the largest logit: fp32 sums of padded rows run in another order; a wrong token is off by 1e-2


@cache
def llama() -> Any:
    """A decoder of 6 layers that knows no video; sharp attention, so that importances differ."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=120, hidden_size=48, intermediate_size=96, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=2 * parameter.shape[-1] ** -0.5 if "_proj" in name else 1.0)
    return model.eval()


def film_prompt(seed: int = 0, frames: int = 8, before: int = 4, after: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """input_ids (0 is left to padding) and labels [1, S]: 12 places, some of which keep their token for a while."""
    random = np.random.default_rng(seed)
    film = random.integers(1, 120, (frames, 12))
    for t in range(1, frames):
        still = random.random(12) < 0.5
        film[t, still] = film[t - 1, still]
    ids = np.concatenate([random.integers(1, 120, before), film.ravel(), random.integers(1, 120, after)])
    labels = np.concatenate([np.full(before, -1), np.tile(np.arange(12), frames), np.full(after, -1)])
    return torch.from_numpy(ids)[None], torch.from_numpy(labels)[None]


def padded(rows: list[torch.Tensor], side: str, fill: int) -> torch.Tensor:
    longest = max(row.shape[1] for row in rows)
    pads = [longest - row.shape[1] for row in rows]
    both = [(pad, 0) if side == "left" else (0, pad) for pad in pads]
    return torch.cat([torch.nn.functional.pad(row, pad, value=fill) for row, pad in zip(rows, both, strict=True)])


@pytest.fixture
def live() -> Iterator[tuple[Any, Any]]:
    """A model and its handle, restored behind the test."""
    model = llama()
    model.set_attn_implementation("sdpa")
    yield model, apply_framefusion(model, 0.4, 0.8)
    remove_framefusion(model)


def greedy(model: Any, ids: torch.Tensor, **named: Any) -> torch.Tensor:
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0} | named
    answer: torch.Tensor = model.generate(ids, **settings)
    return answer[:, ids.shape[1] :]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
@torch.inference_mode()
def test_a_batch_is_its_rows(live: tuple[Any, Any], side: str, attention: str) -> None:
    """Rows of unlike lengths and redundancy, one of them of text alone: logits of all text, and what was kept."""
    model, handle = live
    model.set_attn_implementation(attention)
    apply_framefusion(model, 0.4, 0.8)
    handle = model.framefusion
    prompts = [film_prompt(0), film_prompt(1, frames=5, after=9), film_prompt(2, frames=0, before=20)]
    alone = []
    for ids, labels in prompts:
        with handle.labels(labels):
            alone.append((model(ids).logits[0], handle.last[0]))
    assert len({record.tokens_per_layer for _, record in alone}) == 3
    ids, labels, mask = (
        padded([rows[i] for rows in [(*prompt, torch.ones_like(prompt[0])) for prompt in prompts]], side, fill)
        for i, fill in enumerate((0, -1, 0))
    )
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    with handle.labels(labels):
        logits = model(ids, attention_mask=mask, position_ids=places).logits
    for row, ((expected, record), (own_ids, own_labels)) in enumerate(zip(alone, prompts, strict=True)):
        start = ids.shape[1] - own_ids.shape[1] if side == "left" else 0
        ours = handle.last[row]
        assert [(places - start).tolist() for places in ours.kept] == [places.tolist() for places in record.kept]
        assert replace(ours, kept=()) == replace(record, kept=())
        text = torch.nonzero(own_labels[0] < 0)[:, 0]
        assert relative(logits[row, start + text], expected[text].numpy()) < SAME


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.inference_mode()
def test_a_batch_generates_what_its_rows_do(live: tuple[Any, Any], attention: str) -> None:
    model, _ = live
    model.set_attn_implementation(attention)
    handle = apply_framefusion(model, 0.4, 0.8)
    prompts, alone = [film_prompt(0), film_prompt(1, frames=5), film_prompt(2, frames=0, before=20)], []
    for ids, labels in prompts:
        with handle.labels(labels):
            alone.append(greedy(model, ids)[0].tolist())
    ids, labels, mask = (
        padded([rows[i] for rows in [(*prompt, torch.ones_like(prompt[0])) for prompt in prompts]], "left", fill)
        for i, fill in enumerate((0, -1, 0))
    )
    with handle.labels(labels):
        assert greedy(model, ids, attention_mask=mask).tolist() == alone


@pytest.mark.parametrize("reducer", ["fastv", "uniform", "evs", "vidcom2"])
@torch.inference_mode()
def test_a_batch_of_any_reducer_is_its_rows(live: tuple[Any, Any], reducer: str) -> None:
    """Padding on the left: hidden states, scores and labels are each row's own."""
    model, _ = live
    handle = apply_framefusion(model, 0.4, reducer=reducer)
    prompts, alone = [film_prompt(0), film_prompt(1, frames=5)], []
    for ids, labels in prompts:
        with handle.labels(labels):
            model(ids)
        alone.append([places.tolist() for places in handle.last[0].kept])
    ids, labels = (padded([prompt[i] for prompt in prompts], "left", fill) for i, fill in enumerate((0, -1)))
    mask = padded([torch.ones_like(prompt_ids) for prompt_ids, _ in prompts], "left", 0)
    with handle.labels(labels):
        model(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0))
    starts = [ids.shape[1] - prompt_ids.shape[1] for prompt_ids, _ in prompts]
    batch = [[(places - start).tolist() for places in row.kept] for row, start in zip(handle.last, starts, strict=True)]
    assert batch == alone
    assert all(row.visual_after < row.visual_before for row in handle.last)


@torch.inference_mode()
def test_text_alone_is_what_the_model_says() -> None:
    model = llama()
    ids = film_prompt()[0]
    expected, answer = model(ids).logits, greedy(model, ids)
    handle = apply_framefusion(model, 0.3)
    assert torch.equal(model(ids).logits, expected)
    assert handle.last[0].tokens_per_layer == (ids.shape[1],) * 6
    assert (handle.last[0].ratio, handle.last[0].cost, handle.last[0].calls) == (1.0, 1.0, ())
    assert torch.equal(greedy(model, ids), answer)
    remove_framefusion(model)


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 20},
    "beams": {"num_beams": 3},
    "several answers": {"do_sample": True, "num_return_sequences": 3},
    "prompt lookup": {"prompt_lookup_num_tokens": 3, "eos_token_id": 10**6},  # up to 5.10 it must have one
}


@pytest.mark.parametrize("way", WAYS)
@torch.inference_mode()
def test_every_way_to_generate_where_nothing_is_dropped(way: str) -> None:
    """At cost 1 the caches of reduced tokens hold all of them: the answers are the model's own."""
    model, (ids, labels) = llama(), film_prompt()
    torch.manual_seed(0)
    expected = greedy(model, ids, **WAYS[way])
    handle = apply_framefusion(model, 1.0, 1.0)
    torch.manual_seed(0)
    with handle.labels(labels):
        assert torch.equal(greedy(model, ids, **WAYS[way]), expected)
    remove_framefusion(model)


@pytest.mark.parametrize("way", ["beams", "prompt lookup"])
@torch.inference_mode()
def test_every_way_to_generate_from_reduced_tokens(live: tuple[Any, Any], way: str) -> None:
    """Prompt lookup gives the greedy answer; a beam's score is the sum that forwards of its tokens give."""
    model, handle = live
    ids, labels = film_prompt()
    with handle.labels(labels):
        if way == "prompt lookup":
            assert torch.equal(greedy(model, ids, **WAYS[way]), greedy(model, ids))
            return
        generated = model.generate(
            ids, num_beams=3, max_new_tokens=6, do_sample=False, pad_token_id=0, length_penalty=0.0,
            output_scores=True, return_dict_in_generate=True,
        )  # fmt: skip
        output, score = model(ids), 0.0
        for token in generated.sequences[0, ids.shape[1] :]:
            score += float(output.logits[0, -1].log_softmax(-1)[token])
            output = model(token[None, None], past_key_values=output.past_key_values)
    assert score == pytest.approx(float(generated.sequences_scores[0]), rel=1e-4)


@torch.inference_mode()
def test_turns_go_on_over_the_reduced_cache(live: tuple[Any, Any]) -> None:
    """A second question at once, and token by token, which the recordings vouch for; then a second film."""
    model, handle = live
    (ids, labels), question = film_prompt(), torch.tensor([[5, 9, 2, 77]])
    with handle.labels(labels):
        whole, single = model(ids).past_key_values, model(ids).past_key_values
    first = handle.last[0]
    together = model(question, past_key_values=whole).logits
    apart = torch.cat([model(token[None, None], past_key_values=single).logits for token in question[0]], dim=1)
    assert relative(together, apart.numpy()) < SAME
    assert handle.last[0].visual_before == 0
    film, film_labels = film_prompt(3)
    with handle.labels(torch.cat([labels, torch.full_like(question, -1), film_labels], dim=1)):
        model(film, past_key_values=whole)
    second = handle.last[0]
    assert second.visual_before == 96
    assert second.cost == pytest.approx(0.4, abs=0.02)
    lengths = [layer.keys.shape[2] for layer in whole.layers]
    pairs = zip(first.tokens_per_layer, second.tokens_per_layer, strict=True)
    assert lengths == [before + question.shape[1] + after for before, after in pairs]
    assert {layer.get_seq_length() for layer in whole.layers} == {ids.shape[1] + question.shape[1] + film.shape[1]}


@torch.inference_mode()
def test_generate_goes_on_from_a_cache(live: tuple[Any, Any]) -> None:
    """generate() with the whole conversation and the cache of its first turn slices as it does for any cache."""
    model, handle = live
    (ids, labels), question = film_prompt(), torch.tensor([[5, 9, 2, 77]])
    with handle.labels(labels):
        past = model(ids).past_key_values
        same = model(ids).past_key_values
        answer = greedy(model, torch.cat([ids, question], dim=1), past_key_values=past)
    output, expected = model(question, past_key_values=same), []
    for _ in range(answer.shape[1]):
        expected.append(int(output.logits[0, -1].argmax()))
        output = model(torch.tensor([expected[-1:]]), past_key_values=same)
    assert answer[0].tolist() == expected


@torch.inference_mode()
def test_chunks_of_a_prefill_are_reduced_each(live: tuple[Any, Any]) -> None:
    model, handle = live
    ids, labels = film_prompt(frames=16)
    with handle.labels(labels):
        answer = greedy(model, ids, prefill_chunk_size=64, max_new_tokens=1)
        past, output = None, None
        for chunk in torch.split(ids, 64, dim=1):
            output = model(chunk, past_key_values=past)
            past = output.past_key_values
            assert handle.last[0].visual_after < handle.last[0].visual_before
    assert output is not None
    assert past is not None
    assert answer[0].tolist() == output.logits[:, -1].argmax(-1).tolist()
    assert past.layers[-1].keys.shape[2] < ids.shape[1] < past.get_seq_length() + 1


@torch.inference_mode()
def test_threads_do_not_meet(live: tuple[Any, Any]) -> None:
    model, handle = live
    prompts = [film_prompt(seed, frames=5 + seed) for seed in range(6)]

    def ask(prompt: tuple[torch.Tensor, torch.Tensor]) -> tuple[list[int], Any]:
        with torch.inference_mode(), handle.labels(prompt[1]):
            answer = greedy(model, prompt[0])[0].tolist()
        return answer, replace(handle.last[0], kept=())

    alone = [ask(prompt) for prompt in prompts]
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(ask, prompts)) == alone


@torch.inference_mode()
def test_a_streamer_streams_and_the_record_is_seen_from_outside(live: tuple[Any, Any]) -> None:
    from transformers.generation.streamers import BaseStreamer

    class Noted(BaseStreamer):  # type: ignore[misc, no-untyped-call, unused-ignore]
        tokens: list[int]

        def put(self, value: torch.Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            self.tokens.append(-1)

    model, handle = live
    (ids, labels), streamer = film_prompt(), Noted()
    streamer.tokens = []
    with handle.labels(labels):
        expected = greedy(model, ids)[0].tolist()

    def ask() -> None:
        with handle.labels(labels):
            greedy(model, ids, streamer=streamer)

    thread = Thread(target=ask)
    thread.start()
    thread.join()
    assert streamer.tokens == [*ids[0].tolist(), *expected, -1]
    assert handle.last[0].visual_before == 96


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.inference_mode()
def test_long_runs_in_half_precision(dtype: torch.dtype) -> None:
    """Runs of 300 tokens, whose length bf16 cannot say: means are those of fp32, rounded once."""
    model = copy.deepcopy(llama()).to(dtype)
    handle = apply_framefusion(model, 0.4, 0.9)
    ids, labels = torch.full((1, 1207), 7), torch.arange(-1, 1206)[None] % 4
    ids[:, :1], labels[:, :1], labels[:, -6:] = 3, -1, -1
    ids[:, 1:] += torch.arange(1206) % 4
    with handle.labels(labels):
        assert torch.isfinite(model(ids).logits).all()
    (record,) = handle.last
    assert record.visual_before == 1200
    assert record.cost == pytest.approx(0.4, abs=0.01)


def test_a_plan_is_applied_as_in_numpy() -> None:
    random = np.random.default_rng(0)
    labels = random.integers(-1, 7, 200)
    hidden = random.standard_normal((200, 16)).astype(np.float32)
    merged = (random.random(200) < 0.7) & (tracks.previous_in_track(labels) >= 0)
    for plan in (host_plan.merge_plan(labels, merged), host_plan.prune_plan(labels, random.random(200), 20)):
        expected = host_plan.apply_plan(hidden, plan)
        for apply in (apply_plan, apply_plan_on_device):
            np.testing.assert_array_equal(apply(torch.from_numpy(hidden), plan).numpy(), expected)
            half = apply(torch.from_numpy(hidden).bfloat16(), plan)
            rounded = host_plan.apply_plan(torch.from_numpy(hidden).bfloat16().float().numpy(), plan)
            assert torch.equal(half, torch.from_numpy(rounded).bfloat16()), "summed in fp32, rounded once"


@torch.inference_mode()
def test_importance_is_the_attention_of_the_last_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the policy gets at the prune, against the weights that the eager model gives."""
    model, (ids, labels) = llama(), film_prompt()
    vectors: list[Any] = []
    step = policy.Reduction.step

    def noted(self: policy.Reduction, similarity: Any, importance: Any, features: Any = None) -> host_plan.Plan:
        vectors.append(importance)
        return step(self, similarity, importance, features)

    monkeypatch.setattr(policy.Reduction, "step", noted)
    ids[0, 4:100] = torch.randperm(120)[:96]  # no token repeats: call 0 merges nothing, call 1 prunes
    model.set_attn_implementation("eager")
    expected = model(ids, output_attentions=True).attentions[0][0, :, -3:].mean((0, 1))
    model.set_attn_implementation("sdpa")
    handle = apply_framefusion(model, 0.5, 1.0, importance_rows=3, depth=0)
    with handle.labels(labels):
        model(ids)
    remove_framefusion(model)
    assert [record.kind for record in handle.last[0].calls] == ["none", "prune"]
    np.testing.assert_allclose(vectors[-1], expected.numpy(), rtol=1e-4, atol=1e-7)


# --- Models that see ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A Qwen2-VL whose prompts are built below; its tower is not asked for more than rows that differ."""
    import transformers

    folder = random_checkpoint(tmp_path_factory.mktemp("seeing"), layers=6)
    model: Any = transformers.Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


def seen_prompt(model: Any, grids: list[tuple[str, int, int, int]], seed: int) -> dict[str, torch.Tensor]:
    """What a processor gives for some videos and images (kind, T, h, w) and a question."""
    random, config = torch.Generator().manual_seed(seed), model.config
    ids = torch.randint(1, 200, (1, 3 + seed % 3), generator=random)
    pixels: dict[str, list[tuple[torch.Tensor, list[int]]]] = {"video": [], "image": []}
    for kind, frames, height, width in grids:
        rows = torch.randn(frames, height * width, 1176, generator=random)
        for t in range(1, frames):
            still = torch.rand(height * width, generator=random) < 0.6
            rows[t, still] = rows[t - 1, still]
        pixels[kind].append((rows.flatten(0, 1), [frames, height, width]))
        run = [config.vision_start_token_id, *[getattr(config, f"{kind}_token_id")] * (frames * height * width // 4)]
        question = torch.randint(1, 200, (4 + seed,), generator=random)
        ids = torch.cat([ids, torch.tensor([[*run, config.vision_end_token_id]]), question[None]], dim=1)
    kinds = (ids == config.image_token_id).int() + 2 * (ids == config.video_token_id).int()
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": kinds}
    for kind, name in (("video", "pixel_values_videos"), ("image", "pixel_values")):
        if pixels[kind]:
            inputs[name] = torch.cat([rows for rows, _ in pixels[kind]])
            inputs[f"{kind}_grid_thw"] = torch.tensor([grid for _, grid in pixels[kind]])
    return inputs


FILM, PICTURE = ("video", 6, 8, 8), ("image", 1, 4, 6)
SHOWN = ([FILM], [PICTURE, ("video", 5, 4, 8)], [FILM, ("video", 4, 4, 4), PICTURE], [PICTURE])


def answer_of(model: Any, inputs: dict[str, torch.Tensor], **named: Any) -> list[list[int]]:
    new = model.generate(**inputs, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None, **named)
    answers: list[list[int]] = new[:, inputs["input_ids"].shape[1] :].tolist()
    return answers


def together(prompts: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A batch, padded on the left."""
    inputs: dict[str, torch.Tensor] = {}
    for name in dict.fromkeys(name for prompt in prompts for name in prompt):
        rows_of_prompts = [prompt[name] for prompt in prompts if name in prompt]
        rows = name in ("input_ids", "attention_mask", "mm_token_type_ids")
        inputs[name] = padded(rows_of_prompts, "left", 0) if rows else torch.cat(rows_of_prompts)
    return inputs


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_batch_of_films_and_pictures_is_its_rows(seeing: Any, attention: str) -> None:
    seeing.set_attn_implementation(attention)
    handle = apply_framefusion(seeing, 0.4)
    prompts, alone, records = [seen_prompt(seeing, grids, seed) for seed, grids in enumerate(SHOWN)], [], []
    for prompt in prompts:
        alone += answer_of(seeing, prompt)
        records += [replace(handle.last[0], kept=())]
    assert all(record.cost == pytest.approx(0.4, abs=0.06) for record in records)
    assert answer_of(seeing, together(prompts)) == alone
    assert [replace(record, kept=()) for record in handle.last] == records
    # generate() gives all positions: what transformers notes on the model is not read
    with ThreadPoolExecutor(2) as pool:
        assert [answer for answers in pool.map(partial(answer_of, seeing), prompts) for answer in answers] == alone
    remove_framefusion(seeing)
    assert answer_of(seeing, prompts[0]) != alone[:1]


def test_chunks_of_a_film_in_generate(seeing: Any) -> None:
    """transformers encodes the film first and cuts the prompt within a frame; each chunk is reduced on its own."""
    seeing.set_attn_implementation("sdpa")
    handle = apply_framefusion(seeing, 0.4)
    prompt = seen_prompt(seeing, [FILM], 0)
    if [int(part) for part in installed().split(".")[:2]] < [5, 23]:
        with pytest.raises(PromptError, match="leave it out"):
            answer_of(seeing, prompt, prefill_chunk_size=53)
        remove_framefusion(seeing)
        return
    answers = answer_of(seeing, prompt, prefill_chunk_size=53)
    (record,) = handle.last  # of the last chunk
    assert 0 < record.visual_after < record.visual_before < 96
    assert len(answers[0]) == 6
    assert answer_of(seeing, prompt, prefill_chunk_size=1000) == answer_of(seeing, prompt)
    remove_framefusion(seeing)


def flash(module: Any, query: Any, key: Any, value: Any, mask: Any, **named: Any) -> tuple[Any, None]:
    """Attention as flash kernels take it: 2-D mask or none, causal from the right end."""
    assert mask is None or mask.ndim == 2
    assert named.get("position_ids") is None or (named["position_ids"].diff() == 1).all(), "read as packed sequences"
    rows = torch.zeros_like(query)
    for i in range(len(query)):
        real = torch.ones(key.shape[2], dtype=torch.bool) if mask is None else mask[i].bool()
        asking = real[-query.shape[2] :]
        k, v = (tensor[i, :, real].repeat_interleave(query.shape[1] // key.shape[1], 0) for tensor in (key, value))
        length = int(asking.sum())
        visible = torch.ones(length, k.shape[1], dtype=torch.bool).tril(k.shape[1] - length)
        rows[i, :, asking] = torch.nn.functional.scaled_dot_product_attention(
            query[i, :, asking], k, v, attn_mask=visible, scale=named["scaling"]
        )
    return rows.transpose(1, 2), None


def test_masks_as_flash_attention_takes_them(seeing: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels need a GPU: a function with their contract stands for them."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    prompts = [seen_prompt(seeing, grids, seed) for seed, grids in enumerate(SHOWN)]
    seeing.set_attn_implementation("sdpa")
    apply_framefusion(seeing, 0.4)
    expected, single = answer_of(seeing, together(prompts)), answer_of(seeing, prompts[2])
    masks = ALL_MASK_ATTENTION_FUNCTIONS["flash_attention_2"]
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "flash_attention_2", flash)
    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._local_mapping, "flash_attention_2", masks)
    monkeypatch.setattr(seeing.config.text_config, "_attn_implementation_internal", "flash_attention_2")
    assert answer_of(seeing, together(prompts)) == expected
    assert answer_of(seeing, prompts[2]) == single
    remove_framefusion(seeing)


@torch.inference_mode()
def test_a_second_film_in_a_second_turn(seeing: Any) -> None:
    """Only new tokens are given, with the grids of what is new; positions as the user says."""
    seeing.set_attn_implementation("sdpa")
    handle = apply_framefusion(seeing, 0.4)
    first, second = seen_prompt(seeing, [FILM], 0), seen_prompt(seeing, [PICTURE, ("video", 5, 4, 8)], 1)
    past = seeing(**first).past_key_values
    length = first["input_ids"].shape[1]
    places = torch.arange(length, length + second["input_ids"].shape[1]).expand(3, 1, -1)
    given = {key: value for key, value in second.items() if key != "attention_mask"}
    seeing(**given, position_ids=places, past_key_values=past)
    (record,) = handle.last
    assert (record.visual_before, len(record.kept[0])) == (6 + 40, record.tokens_per_layer[0])
    assert past.get_seq_length() == length + second["input_ids"].shape[1]
    assert seeing(input_ids=torch.tensor([[5]]), past_key_values=past).logits.isfinite().all()
    remove_framefusion(seeing)


@torch.inference_mode()
def test_prompts_whose_labels_cannot_be_read_are_refused(seeing: Any) -> None:
    handle = apply_framefusion(seeing, 0.4)
    inputs = seen_prompt(seeing, [FILM], 0)
    with pytest.raises(PromptError, match=r"framefusion\.labels"):
        seeing(inputs_embeds=torch.randn(1, 20, 32))
    with handle.labels(np.full(20, -1)):
        assert seeing(inputs_embeds=torch.randn(1, 20, 32)).logits.isfinite().all()
    with pytest.raises(PromptError, match="position_ids"):
        seeing(**inputs, position_ids=torch.arange(inputs["input_ids"].shape[1])[None])
    remove_framefusion(seeing)


@pytest.mark.slow
def test_layers_that_wait_on_the_disk(seeing: Any, tmp_path: Path) -> None:
    """device_map, with what a machine without a GPU can show of it: layers whose weights are fetched for each call."""
    import transformers

    accelerate = pytest.importorskip("accelerate")
    assert accelerate
    seeing.set_attn_implementation("sdpa")
    seeing.save_pretrained(tmp_path / "model")
    prompt = seen_prompt(seeing, SHOWN[1], 1)
    apply_framefusion(seeing, 0.4)
    expected = answer_of(seeing, prompt)
    remove_framefusion(seeing)
    places = {"model.visual": "cpu", "model.language_model.embed_tokens": "cpu", "model.language_model.norm": "cpu"}
    places |= {"model.language_model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {f"model.language_model.layers.{i}": "cpu" if i == 2 else "disk" for i in range(6)}
    kind: Any = transformers.Qwen2VLForConditionalGeneration
    spread = kind.from_pretrained(
        tmp_path / "model", dtype=torch.float32, device_map=places, offload_folder=tmp_path / "waiting"
    )
    apply_framefusion(spread.eval(), 0.4)
    assert answer_of(spread, prompt) == expected


# --- What is refused, and what is left behind -----------------------------------------------------------------------


@torch.inference_mode()
def test_what_cannot_be_reduced_is_refused_by_name(live: tuple[Any, Any]) -> None:
    from transformers import StaticCache
    from transformers.cache_utils import StaticSlidingWindowLayer

    model, handle = live
    ids, labels = film_prompt()
    window: Any = StaticSlidingWindowLayer(512, 256)
    window.lazy_initialization(torch.zeros(1, 2, 1, 12), torch.zeros(1, 2, 1, 12))
    with handle.labels(labels):
        cache: Any = StaticCache(model.config, max_cache_len=512)
        cache.layers[0] = window
        with pytest.raises(BackendError, match="StaticSlidingWindowLayer"):
            model(ids, past_key_values=cache)
        with pytest.raises(BackendError, match="output_attentions"):
            model(ids, output_attentions=True)
        with pytest.raises(PromptError, match="2 rows of labels"), handle.labels(labels.repeat(2, 1)):
            model(ids)
        with torch.inference_mode(False), pytest.raises(BackendError, match="no_grad"):
            model(ids.clone())
        assert model(ids).logits.shape == (1, ids.shape[1], 120)  # nothing of a failed call stays
    static = StaticCache(model.config, max_cache_len=512)
    assert torch.equal(model(ids, past_key_values=static).logits[:, -1].argmax(-1), model(ids).logits[:, -1].argmax(-1))


@pytest.mark.parametrize(
    ("numbers", "word"),
    [({"cost": 1.5}, "cost"), ({"cost": 0.01}, "smallest"), ({"similarity_lower_bound": 2.0}, "similarity")],
)
def test_numbers_out_of_range_are_refused_before_anything_changes(numbers: dict[str, float], word: str) -> None:
    with pytest.raises(BudgetError, match=word):
        apply_framefusion(llama(), **numbers)  # type: ignore[arg-type]
    assert not hasattr(llama(), "framefusion")
    handle = apply_framefusion(llama(), 0.5)
    with pytest.raises(BudgetError, match=word):
        apply_framefusion(llama(), **numbers)  # type: ignore[arg-type]
    assert llama().framefusion is handle
    remove_framefusion(llama())


def test_layers_of_another_make_are_refused() -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel

    gemma = Gemma2Config(
        vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    for model in (Gemma2ForCausalLM(gemma), GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=16, n_layer=2, n_head=2))):
        with pytest.raises(CheckpointError, match=type(model).__name__):
            apply_framefusion(model)


def state_of(model: Any) -> dict[str, Any]:
    """Everything that modules hold, by identity; hooks by what is in them."""
    return {
        f"{name}.{key}": dict(value) if isinstance(value, dict) and "hooks" in key else id(value)
        for name, module in model.named_modules()
        for key, value in vars(module).items()
    }


@torch.inference_mode()
def test_removal_leaves_nothing(live: tuple[Any, Any]) -> None:
    model, handle = live
    ids, labels = film_prompt()
    with handle.labels(labels):
        greedy(model, ids)
    remove_framefusion(model)
    before, expected = state_of(model), model(ids).logits
    assert not any("framefusion" in key for key in before)
    handle = apply_framefusion(model, 0.5)
    apply_framefusion(model, 0.4)  # the second call replaces the first
    handle = model.framefusion
    with handle.labels(labels):
        model(ids)
    assert state_of(model) != before
    remove_framefusion(model)
    remove_framefusion(model)
    assert state_of(model) == before
    assert torch.equal(model(ids).logits, expected)
    with handle.labels(labels):  # a handle of a model that is restored
        assert torch.equal(model(ids).logits, expected)
