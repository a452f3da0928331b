"""Text to token ids and back, over a checkpoint's tokenizer.json.

Two kinds of text are kept apart. *Plain* text comes from users: whatever it spells, it never becomes a control token
such as <|video_pad|>. *Template* text comes from the bundle, and there control tokens count. Knows no prompt layout
(prompt.py).
"""

from __future__ import annotations

import codecs
import itertools
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from framefusion.errors import BundleError, PromptError

BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")  # a byte that sentencepiece has no letter for


class Tokenizer:
    """A `tokenizers.Tokenizer` that cannot be talked into control tokens."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        # Set for good, not per call: the flag belongs to the shared object and requests run on several threads.
        backend.encode_special_tokens = True
        added = backend.get_added_tokens_decoder()
        self._control_ids: dict[str, int] = {token.content: index for index, token in added.items()}
        self._control_id_set = frozenset(self._control_ids.values())
        self.special_ids = frozenset(index for index, token in added.items() if token.special)
        longest_first = sorted(map(re.escape, self._control_ids), key=len, reverse=True)
        self._control = re.compile("|".join(longest_first) or "(?!)")
        self._control_start = re.compile(f"(?={self._control.pattern})")

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        """Read a tokenizer.json."""
        import tokenizers

        source = Path(path)
        if not source.is_file():
            raise BundleError(f"{source} is missing: rebuild the bundle from a checkpoint with a tokenizer.json")
        try:
            return cls(tokenizers.Tokenizer.from_str(_without_first_mark(source.read_text(encoding="utf-8"))))
        except Exception as error:  # the library raises bare Exception
            raise BundleError(f"{source} is no tokenizer ({error}): rebuild the bundle") from error

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included; any id from here on is padding of the weights."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    def control_id(self, token: str) -> int:
        """The id of a control token, by its text."""
        try:
            return self._control_ids[token]
        except KeyError:
            known = ", ".join(sorted(self._control_ids)[:20])
            raise BundleError(f"the tokenizer has no token {token!r}, it has {known}: rebuild the bundle") from None

    def split_template(self, text: str) -> list[str | int]:
        """Template text as control token ids and the plain text between them."""
        pieces: list[str | int] = []
        at = 0
        for match in self._control.finditer(text):
            pieces += [text[at : match.start()], self._control_ids[match.group()]]
            at = match.end()
        return [piece for piece in [*pieces, text[at:]] if piece != ""]

    def encode(self, pieces: Iterable[str | int]) -> list[int]:
        """Ids of plain texts and ready ids in a row; neighbouring texts are read as one, as if typed together."""
        ids: list[int] = []
        text = ""
        for piece in pieces:
            if isinstance(piece, str):
                text += piece
            else:
                ids += [*self.encode_plain(text), piece]
                text = ""
        return ids + self.encode_plain(text)

    def encode_plain(self, text: str) -> list[int]:
        """Ids of text that holds no control token, even if it spells one.

        Raises:
            PromptError: it is no Unicode, or cannot be said without a control token.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise PromptError(f"the text {text[:80]!r} is not Unicode ({error.reason}): give it as UTF-8") from None
        ids = self._encode(text)
        if not self._spells_control(ids):
            return ids
        # Added tokens that are not marked special are read in any text: cut each spelling after its first letter.
        cuts = [0, *(match.start() + 1 for match in self._control_start.finditer(text)), len(text)]
        ids = [index for start, end in itertools.pairwise(cuts) for index in self._encode(text[start:end])]
        if self._spells_control(ids):
            raise PromptError(f"the text {text[:80]!r} spells a control token of this model: rephrase it")
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens left out."""
        return str(self._backend.decode(list(ids), skip_special_tokens=True))

    def stream(self) -> TextStream:
        """A fresh incremental decoder."""
        decoder = json.loads(self._backend.decoder.__getstate__()) if self._backend.decoder else {}
        return _ByteStream(self) if decoder.get("type") == "ByteLevel" else _WindowStream(self)

    def piece(self, index: int) -> str:
        """The vocabulary's spelling of an id; empty for special tokens and for ids beyond the vocabulary."""
        return "" if index in self.special_ids else self._backend.id_to_token(index) or ""

    def _encode(self, text: str) -> list[int]:
        return list(self._backend.encode(text, add_special_tokens=False).ids) if text else []

    def _spells_control(self, ids: Iterable[int]) -> bool:
        return not self._control_id_set.isdisjoint(ids)


class TextStream(Protocol):
    """Ids in, text out as soon as it is certain; all pieces joined equal `decode` of all ids."""

    def push(self, index: int) -> str:
        """Text that this id completes; empty while a character is still in pieces."""

    def flush(self) -> str:
        """What is left when no more ids come: incomplete characters, as U+FFFD."""


class _ByteStream:
    """For byte-level BPE: constant work a token, since every token spells its own bytes."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, index: int) -> str:
        piece = self._tokenizer.piece(index)
        try:
            spelled = bytes(BYTE_OF_LETTER[letter] for letter in piece)
        except KeyError:  # an added token is written as it is
            spelled = piece.encode("utf-8")
        return self._decoder.decode(spelled)

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class _WindowStream:
    """For any other decoder: decode the ids since the last certain text, print what is new."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._printed = 0  # ids of the window whose text is out; kept since decoders treat the first id differently

    def push(self, index: int) -> str:
        piece = self._tokenizer.piece(index)
        if not piece or index in self._tokenizer.special_ids:
            return ""  # not in the text; the bytes on both sides of it are neighbours
        self._window.append(index)
        text = self._new_text()
        # Decoders read a run of byte tokens as a whole: one bad byte at its end changes the text of those before it.
        if not text or text.endswith("\ufffd") or BYTE_TOKEN.fullmatch(piece):
            return ""
        self._window = self._window[self._printed :]
        self._printed = len(self._window)
        return text

    def flush(self) -> str:
        text = self._new_text()
        self._window, self._printed = [], 0
        return text

    def _new_text(self) -> str:
        before = self._tokenizer.decode(self._window[: self._printed])
        return self._tokenizer.decode(self._window)[len(before) :]


def _without_first_mark(text: str) -> str:
    """A tokenizer.json that marks the first word of a text as one behind a space, made to mark none.

    The texts between the control tokens of a prompt are encoded one by one, and only one of them is the first: the
    bundle's template has the space where it belongs.
    """
    if '"first"' not in text:
        return text
    parsed = json.loads(text)
    splitter = parsed.get("pre_tokenizer") or {}
    for part in (splitter, *splitter.get("pretokenizers", ())):
        if part.get("prepend_scheme") == "first":
            part["prepend_scheme"] = "never"
    return json.dumps(parsed)


def _byte_alphabet() -> dict[str, int]:
    """The letters in which byte-level BPE writes bytes: printable ones as themselves, the others from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_OF_LETTER = _byte_alphabet()
