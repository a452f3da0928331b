"""Which kept conversation a request continues: one that is equal in every text."""

from __future__ import annotations

from framefusion.runtime.server.conversations import answer_key, turn_keys
from framefusion.runtime.text.prompt import Turn


def test_white_space_is_text() -> None:
    """A prompt with other white space has other tokens, and other answers."""
    (answer,) = turn_keys([Turn("assistant", [" Yes.\n"])], [], "")
    (shorter,) = turn_keys([Turn("assistant", ["Yes."])], [], "")
    assert answer == answer_key(" Yes.\n")
    assert shorter != answer
    assert turn_keys([Turn("user", ["a", "b"])], [], "") != turn_keys([Turn("user", ["ab"])], [], "")
