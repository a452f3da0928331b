"""Users' text stays text, and streamed text equals the whole text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from framefusion.errors import BundleError, PromptError
from framefusion.runtime.text.tokenizer import Tokenizer

SPECIAL = ("<|im_start|>", "<|im_end|>", "<|video_pad|>")
CORPUS = [
    "What happens in this video?",
    "A café, naïve crème brûlée.",
    "影片里发生了什么",
    "🎬🎥 done\n\n  indented",
] * 3


def byte_level(extra: tuple[str, ...] = ("<tool>",)) -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    )
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in extra])
    return backend


def byte_fallback() -> Backend:
    """A sentencepiece-like vocabulary: word starts marked, other bytes spelled as <0xNN>."""
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"▁": 256, "▁a": 257, "b": 258, "é": 259}
    backend = Backend(models.BPE(vocab, [("▁", "a")] if "a" in vocab else [], byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken("</s>", special=True)])
    return backend


BYTE_LEVEL = Tokenizer(byte_level())
BYTE_FALLBACK = Tokenizer(byte_fallback())


def streamed(tokenizer: Tokenizer, ids: list[int]) -> str:
    stream = tokenizer.stream()
    return "".join([*map(stream.push, ids), stream.flush()])


@given(st.lists(st.integers(0, BYTE_LEVEL.vocab_size + 3), max_size=40))
def test_any_ids_stream_to_their_text(ids: list[int]) -> None:
    assert streamed(BYTE_LEVEL, ids) == BYTE_LEVEL.decode(ids)


@given(st.lists(st.integers(0, 260), max_size=25))
def test_any_ids_stream_to_their_text_without_byte_level(ids: list[int]) -> None:
    assert streamed(BYTE_FALLBACK, ids) == BYTE_FALLBACK.decode(ids)


@given(st.text(max_size=30))
def test_text_streams_back(text: str) -> None:
    ids = BYTE_LEVEL.encode_plain(text)
    stream = BYTE_LEVEL.stream()
    pieces = [stream.push(index) for index in ids]
    assert "".join(pieces) == text
    assert stream.flush() == ""


def test_incomplete_characters_are_held_back() -> None:
    ids = BYTE_LEVEL.encode_plain("\N{SNOWMAN}")
    assert len(ids) == 3
    stream = BYTE_LEVEL.stream()
    assert [stream.push(index) for index in ids] == ["", "", "\N{SNOWMAN}"]
    stream.push(ids[0])
    assert stream.flush() == "\N{REPLACEMENT CHARACTER}"


@given(st.lists(st.sampled_from([*SPECIAL, "<tool>", "<", "to", "ol>", "<|", "video_pad|>", " a"]), max_size=8))
def test_plain_text_never_yields_a_control_token(parts: list[str]) -> None:
    text = "".join(parts)
    ids = BYTE_LEVEL.encode_plain(text)
    assert BYTE_LEVEL.decode(ids) == text
    assert not {BYTE_LEVEL.control_id(token) for token in (*SPECIAL, "<tool>")} & set(ids)


def test_template_text_yields_control_tokens() -> None:
    pieces = BYTE_LEVEL.split_template("<|im_start|>user\n<|video_pad|><|im_end|>")
    start, end, pad = map(BYTE_LEVEL.control_id, SPECIAL)
    assert pieces == [start, "user\n", pad, end]


def test_neighbouring_texts_are_read_as_one() -> None:
    whole = BYTE_LEVEL.encode_plain("What happens")
    assert BYTE_LEVEL.encode(["What ha", "ppens"]) == whole
    pad = BYTE_LEVEL.control_id("<|video_pad|>")
    assert BYTE_LEVEL.encode(["What happens", pad, pad]) == [*whole, pad, pad]


def test_encoding_equals_the_library_where_nothing_is_spelled() -> None:
    backend = byte_level()
    expected = backend.encode("<|im_start|>user\n\n hi<|im_end|>", add_special_tokens=False).ids
    assert (
        Tokenizer(backend).encode(
            [*BYTE_LEVEL.split_template("<|im_start|>user\n"), "\n hi", *BYTE_LEVEL.split_template("<|im_end|>")]
        )
        == expected
    )


def test_a_control_token_of_one_letter_cannot_be_cut() -> None:
    with pytest.raises(PromptError, match="'a § b' spells a control token"):
        Tokenizer(byte_level(("§",))).encode_plain("a § b")


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    byte_level().save(str(path))
    assert Tokenizer.from_file(path).encode_plain("café") == BYTE_LEVEL.encode_plain("café")
    path.write_text("{")
    with pytest.raises(BundleError, match="is no tokenizer"):
        Tokenizer.from_file(path)
    with pytest.raises(BundleError, match="is missing"):
        Tokenizer.from_file(tmp_path / "no.json")


def test_unknown_control_tokens_list_the_known() -> None:
    with pytest.raises(BundleError, match=r"no token '<\|audio\|>', it has <tool>, <\|im_end\|>"):
        BYTE_LEVEL.control_id("<|audio|>")


def backend_calls(tokenizer: Tokenizer, ids: list[int], monkeypatch: pytest.MonkeyPatch) -> int:
    """Ids that were decoded again in a stream of these."""
    work = 0
    decode = tokenizer.decode

    def counted(window: Any) -> str:
        nonlocal work
        work += len(window)
        return decode(window)

    monkeypatch.setattr(tokenizer, "decode", counted)
    streamed(tokenizer, ids)
    monkeypatch.undo()
    return work


def test_streaming_is_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    assert backend_calls(BYTE_LEVEL, [5] * 1000, monkeypatch) == 0
    assert backend_calls(BYTE_FALLBACK, [258] * 1000, monkeypatch) < 5000
