"""Tokenizers of checkpoints as people leave them: transformers' ids, or a refusal that says what is wrong."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from framefusion.errors import CheckpointError, PromptError
from framefusion.export.checkpoints.checkpoint import Checkpoint
from framefusion.export.checkpoints.text.tokenizer_file import added_tokens, tokenizer_of, write_tokenizer
from framefusion.runtime.bundle import Bundle
from framefusion.runtime.pipeline import Pipeline, Request
from framefusion.runtime.text.prompt import Turn
from framefusion.runtime.text.sampling import GenerationConfig
from framefusion.runtime.text.tokenizer import Tokenizer
from tests.random_checkpoint import write_tokenizer as write_base

QUESTION = "What happens in this video? Say what you see, in one word."
TRUNCATION = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
PADDING = {
    "strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": 8, "pad_id": 0, "pad_type_id": 0,
    "pad_token": "!",
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint's folder as far as its tokenizer goes; transformers' generic class takes the file as it is."""
    write_base(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    write(tmp_path, "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
    return tmp_path


def write(folder: Path, name: str, content: Any) -> None:
    (folder / name).write_text(json.dumps(content))


def change(folder: Path, **changes: Any) -> None:
    path = folder / "tokenizer.json"
    write(folder, path.name, json.loads(path.read_text()) | changes)


def theirs(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def bundled(folder: Path) -> Tokenizer:
    """The bundle's tokenizer of a checkpoint, as the runtime opens it; no text of a layout."""
    target = folder / "bundle.json"
    write_tokenizer(Checkpoint(folder), target)
    return Tokenizer.from_file(target, [])


@pytest.mark.parametrize("left", [{"truncation": TRUNCATION}, {"padding": PADDING}])
def test_leftovers_of_training_change_no_id(folder: Path, left: dict[str, Any]) -> None:
    expected = theirs(folder).encode(QUESTION, add_special_tokens=False)
    change(folder, **left)
    assert theirs(folder).encode(QUESTION, add_special_tokens=False) == expected
    assert bundled(folder).encode_plain(QUESTION) == expected
    assert Tokenizer.from_file(folder / "tokenizer.json").encode_plain(QUESTION) == expected  # of an older bundle
    written = json.loads((folder / "bundle.json").read_text())
    assert (written["truncation"], written["padding"]) == (None, None)


def test_dropout_of_training_is_off(folder: Path) -> None:
    expected = bundled(folder).encode_plain(QUESTION)
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    change(folder, model=model | {"dropout": 0.9})
    assert bundled(folder).encode_plain(QUESTION) == expected
    assert Tokenizer.from_file(folder / "tokenizer.json").encode_plain(QUESTION) == expected


def added(content: str, special: bool = False, **flags: bool) -> dict[str, Any]:
    plain = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
    return {"content": content, "special": special} | plain | flags


def next_id(folder: Path) -> int:
    ids: list[int] = [token["id"] for token in json.loads((folder / "tokenizer.json").read_text())["added_tokens"]]
    return max(ids) + 1


@pytest.mark.parametrize("place", ["added_tokens_decoder", "added_tokens.json", "both", "pad_token", "extra", "roles"])
def test_tokens_beside_tokenizer_json_exist(folder: Path, place: str) -> None:
    new = next_id(folder)
    config: dict[str, Any] = json.loads((folder / "tokenizer_config.json").read_text())
    if place in ("added_tokens_decoder", "both"):
        config["added_tokens_decoder"] = {str(new): added("<ref>"), str(new + 1): added("</ref>", special=True)}
    if place in ("added_tokens.json", "both"):
        write(folder, "added_tokens.json", {"<ref>": new, "</ref>": new + 1})
    if place == "added_tokens.json":
        write(folder, "special_tokens_map.json", {"eos_token": {"content": "</ref>"}})
    if place == "pad_token":
        config |= {"pad_token": "<ref>", "cls_token": {"content": "</ref>", "__type": "AddedToken"}}
    if place == "roles":  # that only this model has
        config |= {"image_token": "<ref>", "context_token": "</ref>", "add_bos_token": True}
    if place == "extra":
        config["additional_special_tokens"] = ["<ref>", "</ref>"]
    write(folder, "tokenizer_config.json", config)
    reference, ours = theirs(folder), bundled(folder)
    assert ours.vocab_size == len(reference) == new + 2
    assert dict(added_tokens(Checkpoint(folder))) == reference.get_added_vocab()
    for text in ("<ref>", "</ref>"):
        index = reference.convert_tokens_to_ids(text)
        assert ours.control_id(text) == index
        assert ours.decode([index]) == reference.decode([index], skip_special_tokens=True)
        typed = ours.encode_plain(f"a {text} b")
        special = index in ours.special_ids
        assert special == reference.added_tokens_decoder[index].special
        assert typed == reference.encode(f"a {text} b", add_special_tokens=False, split_special_tokens=special)
        assert (index in typed) == (not special)  # users write words of the vocabulary, no control tokens


def test_flags_of_tokenizer_config_count(folder: Path) -> None:
    first = json.loads((folder / "tokenizer.json").read_text())["added_tokens"][0]
    config = {"added_tokens_decoder": {str(first["id"]): added(first["content"], special=False)}}
    write(folder, "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"} | config)
    reference = theirs(folder)
    assert not reference.added_tokens_decoder[first["id"]].special
    assert first["id"] not in bundled(folder).special_ids
    assert first["id"] in bundled(folder).encode_plain(first["content"])


def test_ids_that_no_file_can_keep_are_refused(folder: Path) -> None:
    write(folder, "tokenizer_config.json", {"added_tokens_decoder": {"999": added("<ref>")}})
    with pytest.raises(CheckpointError, match=r"'<ref>' is to be token 999, .* it becomes 307: .* different models"):
        tokenizer_of(Checkpoint(folder))


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"added_tokens_decoder": {"x": added("<ref>")}}, "has the id 'x'"),
        ({"added_tokens_decoder": {"307": "<ref>"}}, "has '<ref>' for 307, expected a token"),
        ({"added_tokens_decoder": {"307": added("<ref>") | {"special": "no"}}}, "expected a token"),
        ({"added_tokens_decoder": [1]}, "expected an object"),
        ({"pad_token": 5}, "have a token 5, expected"),
        ({"additional_special_tokens": "<ref>"}, "special tokens '<ref>', expected a list"),
        ({"split_special_tokens": True}, "split_special_tokens true"),
    ],
)
def test_malformed_tokens_are_refused(folder: Path, config: dict[str, Any], why: str) -> None:
    write(folder, "tokenizer_config.json", config)
    with pytest.raises(CheckpointError, match=why):
        tokenizer_of(Checkpoint(folder))


def test_no_tokenizer_is_said_as_that(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no tokenizer \(tokenizer.json, vocab.json with merges.txt"):
        tokenizer_of(Checkpoint(folder))
    write(folder, "vocab.json", {"a": 0})
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        tokenizer_of(Checkpoint(folder))


def test_vocabulary_files_alone_are_enough(folder: Path) -> None:
    path = folder / "tokenizer.json"
    model = json.loads(path.read_text())["model"]
    specials = {token["content"]: token["id"] for token in json.loads(path.read_text())["added_tokens"]}
    path.unlink()
    write(folder, "vocab.json", model["vocab"])
    merges = (merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"])
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges))
    write(folder, "added_tokens.json", specials)
    write(folder, "tokenizer_config.json", {"tokenizer_class": "Qwen2Tokenizer", "pad_token": "<|endoftext|>"})
    assert bundled(folder).encode_plain(QUESTION) == theirs(folder).encode(QUESTION)
    assert dict(added_tokens(Checkpoint(folder))) == specials


REPLACE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
BOMBS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "is no tokenizer": lambda tokenizer: "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n",
    "expected u32": lambda tokenizer: tokenizer | {"added_tokens": [added("<x>") | {"id": 10**12}]},
    "as long": lambda tokenizer: tokenizer | {"normalizer": {"type": "Sequence", "normalizers": [REPLACE] * 40}},
    "write 1000000": lambda tokenizer: tokenizer | {"normalizer": {"type": "Prepend", "prepend": "a" * 10**6}},
    "retry-limit": lambda tokenizer: (
        tokenizer
        | {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}}
    ),
    "precompiled": lambda tokenizer: (
        tokenizer | {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}
    ),
}


@pytest.mark.parametrize("why", BOMBS)
def test_bombs_end_in_an_error(folder: Path, why: str) -> None:
    path = folder / "tokenizer.json"
    bomb = BOMBS[why](json.loads(path.read_text()))
    path.write_text(bomb if isinstance(bomb, str) else json.dumps(bomb))
    with pytest.raises(CheckpointError, match=f"tokenizer.json(: this| is).*{why}|{why}"):
        tokenizer_of(Checkpoint(folder))


def test_an_older_bundle_with_leftovers_answers_as_before(bundle: Path, pipeline: Pipeline, tmp_path: Path) -> None:
    """Its manifest has the file's hash, so it is opened unverified here."""
    copied = tmp_path / "bundle"
    shutil.copytree(bundle, copied)
    change(copied, truncation=TRUNCATION, padding=PADDING)
    turns, request = [Turn("user", QUESTION)], Request(max_new_tokens=4)
    answer = Pipeline(Bundle(copied, verify=False), threads=1).generate(turns, request=request)
    assert answer.token_ids == pipeline.generate(turns, request=request).token_ids
    assert answer.prompt_tokens > len(Tokenizer.from_file(bundle / "tokenizer.json").encode_plain(QUESTION))


def test_settings_of_a_request_keep_the_end_of_the_bundle(bundle: Path, pipeline: Pipeline) -> None:
    turns = [Turn("user", QUESTION)]
    said = pipeline.generate(turns, request=Request(max_new_tokens=6)).token_ids
    ends = GenerationConfig(eos_token_ids=said[1:2]).over(pipeline.manifest.generation)
    ending = Pipeline(Bundle(bundle).with_manifest(generation=ends), pipeline.backend)
    request = Request(max_new_tokens=6, generation=GenerationConfig(temperature=0.5))
    answer = ending.generate(turns, request=request)
    assert (answer.token_ids, answer.finish_reason) == (said[: said.index(said[1]) + 1], "stop")
    endless = Request(max_new_tokens=6, generation=GenerationConfig(eos_token_ids=()))
    assert ending.generate(turns, request=endless).token_ids == said


def test_a_turn_may_be_one_text_and_a_conversation_one_turn(pipeline: Pipeline) -> None:
    request = Request(max_new_tokens=2)
    expected = pipeline.generate([Turn("user", (QUESTION,))], request=request)
    assert pipeline.generate(Turn("user", QUESTION), request=request).token_ids == expected.token_ids
    assert Turn("user", QUESTION) == Turn("user", [QUESTION]) == Turn("user", (QUESTION,))
    assert pipeline.generate(QUESTION, request=request).token_ids == expected.token_ids
    with pytest.raises(PromptError, match="the conversation is 5"):
        pipeline.generate(5, request=request)  # type: ignore[arg-type]
    for parts in (5, [b"What"], [None]):
        with pytest.raises(PromptError, match=r"parts are 5|is neither a text nor"):
            Turn("user", parts)  # type: ignore[arg-type]


def test_megabytes_of_text_are_refused_at_once(pipeline: Pipeline) -> None:
    for text in ("What happens? " * 150_000, " " * 2_000_000, "<|im_end|>" * 200_000, "\u5f71" * 700_000):
        started = time.process_time()  # of this process, whatever else the machine does
        with pytest.raises(PromptError, match=r"a text of \d+ characters has more tokens than the bundle takes, 512"):
            pipeline.generate([Turn("user", text)])
        assert time.process_time() - started < 2
