"""tokenizer.json made of SentencePiece models, against SentencePiece itself.

The models are trained here with the options that InternLM2's kind is trained with; a released one was never seen.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from framefusion.errors import CheckpointError
from framefusion.export.checkpoints.checkpoint import Checkpoint
from framefusion.export.checkpoints.text.sentencepiece_tokenizer import PROBES, SPACE, begin_token, convert, needed
from framefusion.runtime.text.tokenizer import Tokenizer
from tests.families.internvl_checkpoints import train_sentencepiece, write_sentencepiece
from tests.families.llava_checkpoints import write_json

KINDS: dict[str, dict[str, Any]] = {
    "internlm2": {},
    "dummy-prefix": {"add_dummy_prefix": True},
    "one-space": {"remove_extra_whitespaces": True, "add_dummy_prefix": True},
    "letters": {"user_defined_symbols": ["[UNUSED_TOKEN_0]", "[UNUSED_TOKEN_1]", "\n", "x", SPACE * 2, SPACE * 3]},
    "few-pieces": {"vocab_size": 500},
}
TEXTS = (
    "",
    " ",
    "   leading, trailing   ",
    "\n\n\t\r\n",
    "aaaaaaaaaaaaa bbbb  ababab",
    "1234567890 12,345.67 0x0A <0x0A>",
    "<unk> <s> </s> <pad>",
    f"{SPACE}{SPACE} {SPACE}",
    "视频里发生了什么？第１２帧。",  # noqa: RUF001
    "🎬" * 5 + "🇨🇳👩🏽‍💻",
    "x\u0301\u0302 \ufb01 \u200d\u2028\U0010ffff",
    "Frame1: Frame23: assistant\nuser\n",
    *PROBES,
)


def model_of(folder: Path) -> Any:
    from sentencepiece import SentencePieceProcessor

    return SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Any, Tokenizer]]:
    known: dict[str, tuple[Any, Any, Tokenizer]] = {}

    def make(kind: str) -> tuple[Any, Any, Tokenizer]:
        if kind not in known:
            folder = tmp_path_factory.mktemp(kind)
            write_json(folder, config={})
            write_sentencepiece(folder, **KINDS[kind])
            backend = convert(Checkpoint(folder))
            backend.save(str(folder / "tokenizer.json"))
            known[kind] = model_of(folder), backend, Tokenizer.from_file(folder / "tokenizer.json")
        return known[kind]

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_text_are_sentencepieces(kind: str, converted: Callable[[str], tuple[Any, Any, Tokenizer]]) -> None:
    model, backend, ours = converted(kind)
    for text in TEXTS:
        ids = model.encode(text)
        assert ours.encode_plain(text) == ids, text
        assert backend.decode(ids) == said(ours, ids) == model.decode(ids), text


def said(tokenizer: Tokenizer, ids: list[int]) -> str:
    stream = tokenizer.stream()
    return "".join(stream.push(index) for index in ids) + stream.flush()


texts = st.text(max_size=40) | st.text(alphabet="ab \n", max_size=30) | st.text(alphabet="aeint ohsr.1290", max_size=60)


@pytest.mark.parametrize("kind", ["internlm2", "dummy-prefix", "letters"])
@given(text=texts)
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text(kind: str, converted: Callable[[str], tuple[Any, Any, Tokenizer]], text: str) -> None:
    model, _, ours = converted(kind)
    ids = ours.encode_plain(text)
    assert ids == model.encode(text)
    assert said(ours, ids) == ours.decode(ids) == model.decode(ids) == text


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@given(text=st.text(max_size=200) | texts)
@settings(max_examples=5000, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_of_any_kind(kind: str, converted: Callable[[str], tuple[Any, Any, Tokenizer]], text: str) -> None:
    model, _, ours = converted(kind)
    assert ours.encode_plain(text) == model.encode(text)


def test_added_tokens_have_the_checkpoints_ids(tmp_path: Path) -> None:
    """Two take the place of pieces, the others stand behind the last; the pieces' own names are gone."""
    write_json(tmp_path, config={})
    ids = write_sentencepiece(tmp_path)
    backend = convert(Checkpoint(tmp_path))
    ours = Tokenizer(backend)
    for token in ("<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "<s>", "</s>"):
        assert ours.control_id(token) == ids[token]
    assert ours.vocab_size == max(ids.values()) + 1
    assert ours.split_template("a<img>b<|im_end|>") == ["a", ids["<img>"], "b", ids["<|im_end|>"]]
    assert not set(ids.values()) & set(ours.encode_plain("<|im_start|>system<img><s>[UNUSED_TOKEN_0]"))
    assert ours.decode([ids["<img>"], *ours.encode_plain("Hi there"), ids["<|im_end|>"]]) == "Hi there"
    assert model_of(tmp_path).encode("[UNUSED_TOKEN_0]") == [ids["<|im_start|>"]]  # what a user could say there


def test_the_begin_is_what_the_configuration_says(tmp_path: Path) -> None:
    write_json(tmp_path, config={})
    write_sentencepiece(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert needed(Checkpoint(tmp_path))
    assert begin_token(Checkpoint(tmp_path)) == "<s>"
    write_json(tmp_path, tokenizer_config=config | {"add_bos_token": False})
    assert begin_token(Checkpoint(tmp_path)) == ""
    write_json(tmp_path, tokenizer_config=config | {"tokenizer_class": "LlamaTokenizer"})
    assert not needed(Checkpoint(tmp_path))


REFUSED: dict[str, dict[str, Any]] = {
    "is missing": {},
    "is no SentencePiece model": {"data": b"\x0a\xff\xff\xff"},
    "has model_type 1, no BPE": {"options": {"model_type": "unigram", "vocab_size": 600}},
    "has byte_fallback off": {"options": {"byte_fallback": False}},
    "has treat_whitespace_as_suffix": {"options": {"treat_whitespace_as_suffix": True}},
    "converted as": {"options": {"normalization_rule_name": "nmt_nfkc", "user_defined_symbols": ["\n", SPACE * 2]}},
    r"no token has the ids \[900\]": {"options": {}, "added": {"<img>": 901}},
    "give '<img>' two ids": {"options": {"user_defined_symbols": ["<img>"]}, "added": {"<img>": 900}},
}


@pytest.mark.parametrize("message", REFUSED)
def test_refusals(message: str, tmp_path: Path) -> None:
    case = REFUSED[message]
    write_json(
        tmp_path,
        config={},
        added_tokens=case.get("added", {}),
        tokenizer_config={"tokenizer_class": "InternLM2Tokenizer"},
    )
    if "options" in case or "data" in case:
        data = case.get("data") or train_sentencepiece(**case["options"])
        (tmp_path / "tokenizer.model").write_bytes(data)
    with pytest.raises(CheckpointError, match=message):
        convert(Checkpoint(tmp_path))
