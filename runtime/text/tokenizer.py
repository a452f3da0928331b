"""Text to token ids and back, over a checkpoint's tokenizer.json.

Two kinds of text are kept apart. *Plain* text comes from users: whatever it spells, it never becomes a control token
such as <|video_pad|>. *Template* text comes from the bundle, and there control tokens count. Knows no prompt layout
(prompt.py).

Control tokens are the special tokens, and what prompts are laid out with. Other added tokens are words of the
vocabulary (`<ref>`, `<tool_call>`): plain text that spells one gives its single id, as in transformers.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from framefusion.errors import BundleError, PromptError
from framefusion.runtime.text.tokenizer_bounds import check_growth, check_size, raised_by_tokenizers

BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")  # a byte that sentencepiece has no letter for
CHARACTERS_READ = 16  # of a long text, for each token of the limit: English has four or five a token


class Tokenizer:
    """A `tokenizers.Tokenizer` that cannot be talked into control tokens."""

    def __init__(self, backend: Any, layout: Iterable[str] | None = None) -> None:
        """Wrap a backend.

        Args:
            backend: a `tokenizers.Tokenizer`, changed in place.
            layout: texts that prompts are laid out with: added tokens in them are control tokens, too, unless they are
                white space. None takes all added tokens.
        """
        # Leftovers of training, which transformers overrides at each call: they would cut, pad or vary every text.
        backend.no_truncation()
        backend.no_padding()
        if getattr(backend.model, "dropout", None) is not None:
            backend.model.dropout = None
        # Set for good, not per call: the flag belongs to the shared object and requests run on several threads.
        backend.encode_special_tokens = True
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        self._added_ids: dict[str, int] = {token.content: index for index, token in added.items()}
        self.special_ids = frozenset(index for index, token in added.items() if token.special)
        written = "\0".join(self._added_ids if layout is None else layout)
        self._control_ids = frozenset(
            index
            for index, token in added.items()
            if token.special or (token.content in written and not token.content.isspace())
        )
        # The backend reads special tokens in a text as letters, the flag above, and the other control tokens with them.
        unmarked = [token for index, token in added.items() if index in self._control_ids and not token.special]
        if unmarked:
            backend.add_special_tokens([_as_special(token) for token in unmarked])
        longest_first = sorted(map(re.escape, self._added_ids), key=len, reverse=True)
        self._added = re.compile("|".join(longest_first) or "(?!)")

    @classmethod
    def from_file(cls, path: str | Path, layout: Iterable[str] | None = None) -> Tokenizer:
        """Read a tokenizer.json; `layout` as in the constructor.

        Raises:
            BundleError: there is none, or it is damaged or beyond the limits of `tokenizer_bounds`.
        """
        import tokenizers

        source = Path(path)
        if not source.is_file():
            raise BundleError(f"{source} is missing: rebuild the bundle from a checkpoint with a tokenizer.json")
        try:
            check_size(source.stat().st_size)
            backend = tokenizers.Tokenizer.from_str(_without_first_mark(source.read_text(encoding="utf-8")))
            check_growth(backend)
            return cls(backend, layout)
        except BaseException as error:
            if not raised_by_tokenizers(error):
                raise
            raise BundleError(f"{source} is no tokenizer ({error}): rebuild the bundle") from error

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id, added tokens included; any id from here on is padding of the weights."""
        return max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def control_id(self, token: str) -> int:
        """The id of an added token, by its text."""
        try:
            return self._added_ids[token]
        except KeyError:
            known = ", ".join(sorted(self._added_ids)[:20])
            raise BundleError(f"the tokenizer has no token {token!r}, it has {known}: rebuild the bundle") from None

    def split_template(self, text: str) -> list[str | int]:
        """Template text as ids of added tokens and the plain text between them."""
        pieces: list[str | int] = []
        at = 0
        for match in self._added.finditer(text):
            pieces += [text[at : match.start()], self._added_ids[match.group()]]
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
        if not self._control_ids.isdisjoint(ids):
            raise PromptError(f"the text {text[:80]!r} spells a control token of this model: rephrase it")
        return ids

    def longer_than(self, text: str, limit: int) -> bool:
        """Whether a text surely has more than `limit` tokens, found out from its beginning where that is enough.

        Megabytes of text would be tokenized for seconds to be refused. The beginning counts when it alone has twice as
        many tokens, since its last ones may change with what follows.
        """
        beginning = CHARACTERS_READ * limit
        return len(text) > beginning and len(self.encode_plain(text[:beginning])) > 2 * limit

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens left out."""
        said = [index for index in ids if index not in self.special_ids]
        return str(self._backend.decode(said, skip_special_tokens=False))

    def stream(self) -> TextStream:
        """Ids to text one by one, for one answer."""
        decoder = json.loads(self._backend.decoder.__getstate__()) if self._backend.decoder else {}
        return _ByteStream(self) if decoder.get("type") == "ByteLevel" else _WindowStream(self)

    def piece(self, index: int) -> str:
        """The vocabulary's spelling of an id; empty for special tokens and for ids beyond the vocabulary."""
        return "" if index in self.special_ids else self._backend.id_to_token(index) or ""

    def _encode(self, text: str) -> list[int]:
        try:
            return list(self._backend.encode(text, add_special_tokens=False).ids) if text else []
        except BaseException as error:
            if not raised_by_tokenizers(error):
                raise
            raise PromptError(f"the tokenizer cannot read the text {text[:80]!r} ({error}): rephrase it") from None


class TextStream(Protocol):
    """Ids in, text out as soon as it is certain; all pieces joined equal `decode` of all ids."""

    def push(self, index: int) -> str:
        """Text that this id completes; empty while a character is still in pieces."""

    def flush(self) -> str:
        """What is left when no more ids come: incomplete characters, as U+FFFD."""


class StoppableText:
    """The text of an answer as far as it is certain, and whether a stop string ended it.

    What could still become a stop string is held back; the string itself and what follows it are never said.

    Args:
        stream: a fresh one.
        stop: texts that end the answer, none of them empty.
    """

    def __init__(self, stream: TextStream, stop: Sequence[str] = ()) -> None:
        self.stopped = False
        self._stream = stream
        self._stop = tuple(stop)
        self._held = ""

    def push(self, index: int) -> str:
        """Text that this id makes certain."""
        return self._certain(self._stream.push(index))

    def flush(self) -> str:
        """What was held back, when no more ids come; incomplete characters as U+FFFD."""
        if self.stopped:
            return ""
        piece = self._certain(self._stream.flush())
        held = self._held
        self._held = ""
        return piece if self.stopped else piece + held

    def _certain(self, piece: str) -> str:
        """Held text with a piece behind it, up to a stop string or to what may become one."""
        if not self._stop:
            return piece
        text = self._held + piece
        places = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        if places:
            self.stopped = True
            self._held = ""
            return text[: min(places)]
        longest = min(max(map(len, self._stop)) - 1, len(text))
        ends = (n for n in range(longest, 0, -1) if any(stop.startswith(text[-n:]) for stop in self._stop))
        held = next(ends, 0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


class _ByteStream:
    """For byte-level BPE: constant work a token, since every token spells its own bytes."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, index: int) -> str:
        """See `TextStream.push`."""
        piece = self._tokenizer.piece(index)
        try:
            spelled = bytes(BYTE_OF_LETTER[letter] for letter in piece)
        except KeyError:  # an added token is written as it is
            spelled = piece.encode("utf-8")
        return self._decoder.decode(spelled)

    def flush(self) -> str:
        """See `TextStream.flush`."""
        return self._decoder.decode(b"", final=True)


class _WindowStream:
    """For any other decoder: decode the ids since the last certain text, print what is new."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._printed = 0  # ids of the window whose text is out; kept since decoders treat the first id differently

    def push(self, index: int) -> str:
        """See `TextStream.push`."""
        piece = self._tokenizer.piece(index)
        if not piece or index in self._tokenizer.special_ids:
            return ""  # not in the text; the bytes on both sides of it are neighbours
        self._window.append(index)
        # Decoders read a run of byte tokens as a whole: one bad byte at its end changes the text of those before it.
        if BYTE_TOKEN.fullmatch(piece):
            return ""
        text = self._new_text()
        if not text or text.endswith("\ufffd"):
            return ""
        self._window = self._window[self._printed :]
        self._printed = len(self._window)
        return text

    def flush(self) -> str:
        """See `TextStream.flush`."""
        text = self._new_text()
        self._window = []
        self._printed = 0
        return text

    def _new_text(self) -> str:
        """What the window says beyond what is out."""
        before = self._tokenizer.decode(self._window[: self._printed])
        return self._tokenizer.decode(self._window)[len(before) :]


def _as_special(token: Any) -> Any:
    """The same added token, marked as special."""
    import tokenizers

    return tokenizers.AddedToken(
        token.content,
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=token.normalized,
        special=True,
    )


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
