"""tokenizer.json of a checkpoint that ships a SentencePiece model and Python code instead, as InternLM2's do.

SentencePiece's BPE has no list of merges: any two neighbours whose join is a piece may merge, the best score first and
the leftmost of equals. Written as ranked merges that is every way to split a piece in two, in the order of the pieces'
scores. What is written is compared with SentencePiece itself on the texts of PROBES before it is used.

Known limits of the format: of two overlapping pairs that make the *same* piece ("ab"+"a" and "a"+"ba" in "ababa")
SentencePiece takes the left one, ranked merges one and the same pair everywhere; a normalization table is applied to
whole graphemes, so that combining marks in an order nobody writes may come out otherwise.

Ids come from the checkpoint's files, never from here. Knows no family.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from framefusion.errors import CheckpointError
from framefusion.installation import install_command

if TYPE_CHECKING:
    import tokenizers
    from tokenizers import normalizers

    from framefusion.export.checkpoints.checkpoint import Checkpoint

MODEL_FILE = "tokenizer.model"
CLASSES = ("InternLM2Tokenizer", "InternLM2TokenizerFast")
"""`tokenizer_class` of the checkpoints that need this: transformers has no such class."""
SPACE = "\u2581"
BPE = 2  # TrainerSpec.ModelType
UNKNOWN = 2
CONTROL = 3
USER_DEFINED = 4
UNUSED = 5
BYTE = 6  # ModelProto.SentencePiece.Type; 1 is a normal piece
NAMED = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
PROBES = (
    "What happens in this video? Answer in one word.",
    "  two spaces, a tab\tand\n\nlines \r\n  ",
    "Frame1: Frame12: 0123456789 3.14159 -1e-6 2024-11-22",
    "def f(x):\n    return {'a': [1, 2], \"b\": x ** 2}  # comment",
    "请描述这段视频。你是书生·万象，英文名是InternVL。",  # noqa: RUF001
    "動画では何が起きていますか？ 비디오에서 무슨 일이 일어나나요?",  # noqa: RUF001
    "Что происходит? Ποιος είναι; ماذا يحدث؟ מה קורה? क्या हो रहा है? เกิดอะไรขึ้น",
    "naïve café e\u0301 ﬁ ① Ｆｕｌｌ　ｗｉｄｔｈ",  # noqa: RUF001
    "👩‍👩‍👧‍👦 🎬🎞️ 🇨🇳 \U00010348 \u200b\ufeff\u00a0\u2028 \u0000\u0001\u007f",
    "<|im_start user|> <s </s [INST] <0x0A>",
    f"a{SPACE}hello{SPACE}b",
)


class _Piece(Protocol):
    """ModelProto.SentencePiece, as far as it is read."""

    piece: str
    score: float
    type: int


class _TrainerSpec(Protocol):
    """How the model was trained, as far as it is read."""

    model_type: int
    byte_fallback: bool
    treat_whitespace_as_suffix: bool
    unk_piece: str


class _NormalizerSpec(Protocol):
    """What is done to a text before it is split, as far as it is read."""

    precompiled_charsmap: bytes
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    escape_whitespaces: bool


class _Model(Protocol):
    """ModelProto, as far as it is read: the class is made when sentencepiece is imported."""

    pieces: Sequence[_Piece]
    trainer_spec: _TrainerSpec
    normalizer_spec: _NormalizerSpec


class _Processor(Protocol):
    """SentencePieceProcessor, as far as it is called."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text."""

    def decode(self, ids: list[int]) -> str:
        """Text of ids."""


def needed(checkpoint: Checkpoint) -> bool:
    """Whether it is a checkpoint of `CLASSES`."""
    return checkpoint.read_optional_json("tokenizer_config.json").get("tokenizer_class") in CLASSES


def convert(checkpoint: Checkpoint) -> tokenizers.Tokenizer:
    """The checkpoint's tokenizer in the form that `tokenizers` runs, checked against SentencePiece.

    Raises:
        CheckpointError: the model is missing or unreadable, is no BPE, has a trait that has no counterpart, or encodes
            one of the probes otherwise; or the added tokens contradict it.
    """
    path = checkpoint.find(MODEL_FILE)
    if path is None:
        raise CheckpointError(f"{checkpoint.folder / MODEL_FILE} is missing: the checkpoint is incomplete")
    processor, model = _load(path)
    tokenizer = _tokenizer(model, _added_tokens(checkpoint, model), path)
    _check(tokenizer, processor, model, path)
    return tokenizer


def begin_token(checkpoint: Checkpoint) -> str:
    """What the classes of CLASSES put before every text: the token of the begin, unless they are told not to."""
    config = checkpoint.read_optional_json("tokenizer_config.json")
    return _content(config.get("bos_token", "<s>")) if config.get("add_bos_token", True) else ""


def _load(path: Path) -> tuple[_Processor, _Model]:
    """A SentencePieceProcessor and the ModelProto of a file."""
    try:
        from sentencepiece import SentencePieceProcessor
        from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]  # made at import
    except ImportError:
        raise CheckpointError(f"{path} needs the package sentencepiece: {install_command('export')}") from None
    try:
        data = path.read_bytes()
        model = ModelProto.FromString(data)
        processor = SentencePieceProcessor(model_proto=data)
    except Exception as error:  # each library has exceptions of its own
        raise CheckpointError(f"{path} is no SentencePiece model ({error}): download it again") from None
    _refuse_unknown_traits(model, path)
    return processor, model


def _refuse_unknown_traits(model: _Model, path: Path) -> None:
    trainer = model.trainer_spec
    normalizer = model.normalizer_spec
    refused = {
        f"model_type {trainer.model_type}, no BPE": trainer.model_type != BPE,
        "byte_fallback off": not trainer.byte_fallback,
        "treat_whitespace_as_suffix": trainer.treat_whitespace_as_suffix,
        "escape_whitespaces off": not normalizer.escape_whitespaces,
    }
    for trait, present in refused.items():
        if present:
            raise CheckpointError(f"{path} has {trait}: such a model cannot be converted, add a tokenizer.json")


def _added_tokens(checkpoint: Checkpoint, model: _Model) -> dict[int, tuple[str, bool]]:
    """Id -> (text, special): control pieces of the model and what the checkpoint's files add or rename."""
    config = checkpoint.read_optional_json("tokenizer_config.json")
    special = {_content(config[name]) for name in NAMED if config.get(name)}
    special |= {_content(token) for token in config.get("additional_special_tokens") or ()}
    added = {i: (piece.piece, True) for i, piece in enumerate(model.pieces) if piece.type in (CONTROL, UNKNOWN)}
    for text, index in checkpoint.read_optional_json("added_tokens.json").items():
        added[int(index)] = (str(text), text in special)
    for index, token in (config.get("added_tokens_decoder") or {}).items():
        added[int(index)] = (_content(token), bool(token.get("special")) or _content(token) in special)
    missing = set(range(len(model.pieces), max(added, default=-1) + 1)) - set(added)
    if missing:
        raise CheckpointError(
            f"{checkpoint.folder}: no token has the ids {sorted(missing)[:5]}: added_tokens.json is incomplete"
        )
    return dict(sorted(added.items()))


def _content(token: str | Mapping[str, Any]) -> str:
    return token if isinstance(token, str) else str(token["content"])


def _tokenizer(model: _Model, added: Mapping[int, tuple[str, bool]], path: Path) -> tokenizers.Tokenizer:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    pieces = list(model.pieces)
    texts = [added[i][0] if i in added else piece.piece for i, piece in enumerate(pieces)]
    texts += [added[i][0] for i in range(len(pieces), max(added, default=-1) + 1)]
    vocabulary = {text: index for index, text in enumerate(texts)}
    if len(vocabulary) != len(texts):
        double = next(text for index, text in enumerate(texts) if vocabulary[text] != index)
        raise CheckpointError(f"{path} and added_tokens.json give {double!r} two ids: they are of different models")

    unknown = model.trainer_spec.unk_piece
    bpe = models.BPE(
        vocabulary,
        _merges(pieces, added, path),
        unk_token=unknown if unknown in vocabulary else None,
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = _normalizer(model.normalizer_spec)
    tags, written = _user_defined(pieces, added)
    if written:  # always tokens of their own, but nothing that a user may not write
        longest_first = sorted(map(re.escape, written), key=len, reverse=True)
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("|".join(longest_first)), behavior="isolated")
    decoding: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if model.normalizer_spec.add_dummy_prefix or model.normalizer_spec.remove_extra_whitespaces:
        decoding.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(decoding)
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text, special in added.values() if special])
    plain = [text for text, special in added.values() if not special]
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in [*tags, *plain]])
    return tokenizer


def _normalizer(spec: _NormalizerSpec) -> normalizers.Sequence:
    """SentencePiece's order: its table, white space, the space in front, the visible space."""
    from tokenizers import Regex, normalizers

    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    steps.append(normalizers.Replace(" ", SPACE))
    if spec.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex(rf"(?<!{SPACE}){SPACE}+\z"), ""))
    return normalizers.Sequence(steps)


def _user_defined(pieces: Sequence[_Piece], added: Mapping[int, tuple[str, bool]]) -> tuple[list[str], list[str]]:
    """Pieces that are always tokens of their own: tags, and what people write (one letter, white space)."""
    texts = [piece.piece for i, piece in enumerate(pieces) if piece.type == USER_DEFINED and i not in added]
    written = [text for text in texts if len(text) == 1 or not text.replace(SPACE, " ").strip()]
    return [text for text in texts if text not in written], written


def _merges(pieces: Sequence[_Piece], added: Mapping[int, tuple[str, bool]], path: Path) -> list[tuple[str, str]]:
    """Every split of every piece in two pieces, best score first, then the longest left part."""
    tags = set(_user_defined(pieces, added)[0])
    mergeable = {
        piece.piece: (piece.score, index, piece.type)
        for index, piece in enumerate(pieces)
        if piece.type not in (UNKNOWN, CONTROL, BYTE) and index not in added and piece.piece not in tags
    }
    ranked = []
    for text, (score, index, kind) in mergeable.items():
        for cut in range(len(text) - 1, 0, -1):
            if text[:cut] in mergeable and text[cut:] in mergeable:
                if kind == UNUSED:
                    raise CheckpointError(f"{path} can merge to the unused piece {text!r}: add a tokenizer.json")
                ranked.append((-score, index, -cut, text[:cut], text[cut:]))
    return [(left, right) for *_, left, right in sorted(ranked)]


def _probes(model: _Model) -> Iterator[str]:
    """Texts to compare on: the constant ones, and letters of the model's own vocabulary in its own order."""
    yield from PROBES
    texts = [piece.piece.replace(SPACE, " ") for piece in model.pieces if piece.type == 1]
    step = max(len(texts) // 64, 1)
    for start in range(0, len(texts), step * 8):
        yield "".join(texts[start : start + step * 8 : step])


def _check(tokenizer: tokenizers.Tokenizer, processor: _Processor, model: _Model, path: Path) -> None:
    added = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
    for text in _probes(model):
        if any(token in text for token in added):
            continue
        theirs = processor.encode(text)
        ours = tokenizer.encode(text, add_special_tokens=False).ids
        if ours != theirs:
            raise CheckpointError(f"{path} encodes {text!r} as {theirs}, converted as {ours}: add a tokenizer.json")
        if tokenizer.decode(ours) != processor.decode(theirs):
            raise CheckpointError(
                f"{path} decodes {theirs} as {processor.decode(theirs)!r}, converted as "
                f"{tokenizer.decode(ours)!r}: add a tokenizer.json"
            )
