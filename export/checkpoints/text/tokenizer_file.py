"""The tokenizer of a checkpoint as the one tokenizer.json of a bundle, with the ids that transformers gives its texts.

tokenizer.json is the truth about vocabulary and splitting. Around it transformers does what is done here once: it takes
truncation, padding and dropout off, and adds the tokens that only tokenizer_config.json, special_tokens_map.json or
added_tokens.json list. A checkpoint with a SentencePiece model or vocabulary files alone is converted. Knows no family.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from framefusion.errors import CheckpointError
from framefusion.export.checkpoints.text import sentencepiece_tokenizer
from framefusion.runtime.text.tokenizer_bounds import check_growth, check_size, raised_by_tokenizers

if TYPE_CHECKING:
    import tokenizers

    from framefusion.export.checkpoints.checkpoint import Checkpoint

TOKENIZER = "tokenizer.json"
VOCABULARIES = (("vocab.json", "merges.txt"), ("tokenizer.model",), ("tekken.json",))
"""Files that transformers makes a tokenizer of where there is no tokenizer.json; all of one row are needed."""
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
PROBES = tuple(f"{letter * 64}b {letter}\n" for letter in ("a", "A", " ", "\n", "1", "!", "'", "é", "影", "\u0301"))
"""Texts on which a pattern that backtracks without end gives up, and a damaged table is read beyond its end."""

_LOADED: weakref.WeakKeyDictionary[Checkpoint, tokenizers.Tokenizer] = weakref.WeakKeyDictionary()


def tokenizer_of(checkpoint: Checkpoint) -> tokenizers.Tokenizer:
    """The checkpoint's tokenizer, read once and shared: nobody may change it.

    Raises:
        CheckpointError: there is none, it is damaged or made to exhaust memory, or its files contradict each other.
    """
    if checkpoint not in _LOADED:
        _LOADED[checkpoint] = _load(checkpoint)
    return _LOADED[checkpoint]


def added_tokens(checkpoint: Checkpoint) -> Mapping[str, int]:
    """Text -> id of the tokens added to the vocabulary, special or not."""
    return {token.content: index for index, token in tokenizer_of(checkpoint).get_added_tokens_decoder().items()}


def listed_tokens(checkpoint: Checkpoint) -> set[str]:
    """Texts of the added tokens that the checkpoint's files list, without the cost of reading the vocabulary."""
    listed = checkpoint.read_optional_json(TOKENIZER).get("added_tokens") or []
    decoder = checkpoint.read_optional_json("tokenizer_config.json").get("added_tokens_decoder")
    others = checkpoint.read_optional_json("added_tokens.json") if decoder is None else decoder.values()
    return {token.get("content", "") if isinstance(token, Mapping) else str(token) for token in (*listed, *others)}


def write_tokenizer(checkpoint: Checkpoint, target: Path) -> None:
    """Write the bundle's tokenizer.json: the checkpoint's file byte for byte where it is complete in itself."""
    backend = tokenizer_of(checkpoint)
    source = checkpoint.find(TOKENIZER)
    if source is not None:
        text = source.read_text(encoding="utf-8")
        if _parsed(source, text).to_str() == backend.to_str():
            target.write_text(text, encoding="utf-8")
            return
    backend.save(str(target))


def _load(checkpoint: Checkpoint) -> tokenizers.Tokenizer:
    source = checkpoint.find(TOKENIZER)
    if source is None:
        backend = _converted(checkpoint)
        folder = _folder(checkpoint)
    else:
        backend = _parsed(source, _text(source))
        folder = source.parent
    try:
        backend.no_truncation()
        backend.no_padding()
        if getattr(backend.model, "dropout", None) is not None:
            backend.model.dropout = None
        if not sentencepiece_tokenizer.needed(checkpoint):  # whose files its own conversion has read
            _add_tokens(checkpoint, folder, backend)
        check_growth(backend)
        for probe in PROBES:
            backend.encode(probe, add_special_tokens=False)
    except CheckpointError:
        raise
    except BaseException as error:
        if not raised_by_tokenizers(error):
            raise
        raise CheckpointError(
            f"{source or folder}: the tokenizer cannot be used ({error}): download it again"
        ) from None
    return backend


def _text(source: Path) -> str:
    try:
        check_size(source.stat().st_size)
        return source.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{source} is no tokenizer ({error}): download it again") from None


def _parsed(source: Path, text: str) -> tokenizers.Tokenizer:
    import tokenizers

    try:
        return tokenizers.Tokenizer.from_str(text)
    except BaseException as error:
        if not raised_by_tokenizers(error):
            raise
        raise CheckpointError(f"{source} is no tokenizer ({error}): download it again") from None


def _folder(checkpoint: Checkpoint) -> Path:
    """The folder of the tokenizer's files: of the part of the model that has them, else of the checkpoint."""
    for name in ("tokenizer_config.json", *(name for names in VOCABULARIES for name in names)):
        path = checkpoint.find(name)
        if path is not None:
            return path.parent
    return checkpoint.folder


def _converted(checkpoint: Checkpoint) -> tokenizers.Tokenizer:
    """Made of a SentencePiece model or of vocabulary files."""
    if sentencepiece_tokenizer.needed(checkpoint):
        return sentencepiece_tokenizer.convert(checkpoint)
    folder = _folder(checkpoint)
    if not any(all((folder / name).is_file() for name in names) for names in VOCABULARIES):
        known = ", ".join([TOKENIZER, *(" with ".join(names) for names in VOCABULARIES)])
        raise CheckpointError(
            f"{checkpoint.folder} has no tokenizer ({known} are known): copy the tokenizer's files of the base model "
            "into the folder, or download the checkpoint again"
        )
    from transformers import AutoTokenizer

    try:
        backend: tokenizers.Tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True).backend_tokenizer
    except BaseException as error:
        if not raised_by_tokenizers(error):
            raise
        raise CheckpointError(f"{folder} has no {TOKENIZER} and none can be made of it ({error})") from None
    return backend


def _add_tokens(checkpoint: Checkpoint, folder: Path, backend: tokenizers.Tokenizer) -> None:
    """Add what the other files list, in transformers' order: by id, then the tokens of a role and the extra ones.

    Raises:
        CheckpointError: an entry is malformed, or a token would not get the id that the file gives it.
    """
    from tokenizers import AddedToken

    config = _read(checkpoint, folder, "tokenizer_config.json")
    if "added_tokens_decoder" not in config:
        config = config | _read(checkpoint, folder, "special_tokens_map.json")
    if config.get("split_special_tokens"):
        raise CheckpointError(
            f"{folder}/tokenizer_config.json has split_special_tokens true, with which control tokens are spelled in "
            "letters and no picture is found: set it to false"
        )
    roles = [token for token in (config.get(name) for name in NAMED) if token]
    roles += [token for name, token in config.items() if name not in NAMED and _names_token(name, token)]
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    if not isinstance(extra, (list, Mapping)):
        raise CheckpointError(f"{folder}: the tokenizer's files have special tokens {extra!r:.80}, expected a list")
    roles += list(extra.values()) if isinstance(extra, Mapping) else list(extra)
    special = {_content(folder, token): token for token in roles}
    known = backend.get_added_tokens_decoder()
    legacy = "added_tokens_decoder" not in config  # then the tokens of tokenizer.json go first
    missing: dict[int, AddedToken] = {}
    for index, content, flags in _listed(checkpoint, folder, config, special):
        token = AddedToken(content, **(flags | {"special": flags["special"] or content in special}))
        if repr(known.get(index)) != repr(token) and not (legacy and index in known):
            missing[index] = token
    backend.add_tokens(list(missing.values()))
    for index, token in missing.items():
        added_as = backend.token_to_id(token.content)
        if added_as != index and index not in known:
            raise CheckpointError(
                f"{folder}: {token.content!r} is to be token {index}, with {TOKENIZER} it becomes {added_as}: the "
                "tokenizer's files are of different models, download them again"
            )
    added = {token.content for token in backend.get_added_tokens_decoder().values()}
    for content, token in special.items():
        flags = {name: bool(token.get(name)) for name in FLAGS} if isinstance(token, Mapping) else {}
        if content not in added:
            backend.add_special_tokens([AddedToken(content, **(flags | {"special": True}))])


def _listed(
    checkpoint: Checkpoint, folder: Path, config: Mapping[str, Any], special: Mapping[str, Any]
) -> Iterator[tuple[int, str, dict[str, bool]]]:
    """Id, text and flags of the tokens that a file beside tokenizer.json lists: the older one counts alone only."""
    decoder = config.get("added_tokens_decoder")
    if decoder is None:
        entries: list[tuple[int, str, dict[str, bool]]] = []
        for content, index in _read(checkpoint, folder, "added_tokens.json").items():
            is_special = content in special
            flags = dict.fromkeys(FLAGS, False) | {"normalized": not is_special, "special": is_special}
            entries.append((_index(folder, "added_tokens.json", index), content, flags))
        yield from sorted(entries)
        return
    place = "tokenizer_config.json: added_tokens_decoder"
    if not isinstance(decoder, Mapping):
        raise CheckpointError(f"{folder}/{place} is {decoder!r:.80}, expected an object: correct it")
    for key, token in sorted(decoder.items(), key=lambda item: _index(folder, place, item[0])):
        flags = {name: token.get(name, False) for name in FLAGS} if isinstance(token, Mapping) else {}
        if not flags or not all(isinstance(flag, bool) for flag in flags.values()):
            raise CheckpointError(f"{folder}/{place} has {token!r:.80} for {key}, expected a token: correct it")
        yield _index(folder, place, key), _content(folder, token), flags


def _names_token(name: str, token: object) -> bool:
    """Whether a key of tokenizer_config.json names a token of a role that only this model has: `image_token`."""
    return (
        name.endswith("_token")
        and bool(token.get("content") if isinstance(token, Mapping) else token)
        and (isinstance(token, (str, Mapping)))
    )


def _read(checkpoint: Checkpoint, folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    return checkpoint.read_json(path.relative_to(checkpoint.folder).as_posix()) if path.is_file() else {}


def _index(folder: Path, place: str, index: object) -> int:
    if isinstance(index, str) and index.isascii() and index.isdigit():
        index = int(index)
    if isinstance(index, bool) or not isinstance(index, int) or index < 0:
        raise CheckpointError(f"{folder}/{place} has the id {index!r}, expected a whole number from 0 up: correct it")
    return index


def _content(folder: Path, token: object) -> str:
    content = token.get("content") if isinstance(token, Mapping) else token
    if not isinstance(content, str):
        raise CheckpointError(
            f"{folder}: the tokenizer's files have a token {token!r:.80}, expected a text: correct it"
        )
    return content
