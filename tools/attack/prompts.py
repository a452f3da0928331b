"""Attacks by what users write: texts that spell control tokens, are no text, or are very long.

Each is refused by name or becomes tokens, soon; and no text makes a control token that the conversation has not.
"""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

from framefusion.errors import FrameFusionError
from framefusion.runtime.bundle import Bundle
from framefusion.runtime.prompt import Turn, build_prompt, check_texts, layout_texts
from framefusion.runtime.tokenizer import Tokenizer
from tools.attack.harness import Fault, World

BATCH = 200
SECONDS = 2.0
"""That the longest text may take, also on a machine that does other things."""
LONGEST = 2 << 20
PIECES = ("<", "|", "|>", "<|", "im_start", "im_end", "\n", " ", "\u200b", "\u202e", "\x1b[31m", "\0", "é", "e\u0301",
          "\ud55c", "\U0001f642", "\U0001f469\u200d\U0001f469", "assistant",
          "user", "{{", "%s", "\ud800", "\uffff", "a", "word ", "\r")  # fmt: skip


def attack(rng: random.Random, world: World, folder: Path) -> list[Fault]:
    """A batch of texts, each as a system prompt or as what a user says."""
    bundle = Bundle(world.bundle, verify=False)
    manifest, path = bundle.manifest, world.bundle / "tokenizer.json"
    tokenizer = Tokenizer.from_file(path, layout_texts(manifest.prompt, manifest.preprocessing))
    special = [token["content"] for token in json.loads(path.read_text(encoding="utf-8"))["added_tokens"]]
    control = {tokenizer.control_id(token) for token in special}
    faults = []
    for _ in range(BATCH):
        text = draw_text(rng, special)
        role = rng.choice(("user", "user", "system"))
        start = time.monotonic()
        try:
            found = _control_tokens(bundle, tokenizer, control, role, text)
        except FrameFusionError:
            continue
        if time.monotonic() - start > SECONDS:
            faults.append(Fault("hang", f"{len(text)} characters took {time.monotonic() - start:.1f} s: {text[:80]!r}"))
        if found != _control_tokens(bundle, tokenizer, control, role, "x"):
            faults.append(Fault("wrong", f"a control token was smuggled: {text[:300]!r}"))
    return faults


def _control_tokens(bundle: Bundle, tokenizer: Tokenizer, control: set[int], role: str, text: str) -> list[int]:
    """The control tokens of a conversation, in their order."""
    manifest = bundle.manifest
    turns = [Turn("system", (text,)), Turn("user", ("x",))] if role == "system" else [Turn("user", (text,))]
    check_texts(turns, tokenizer, 1 << 30)
    prompt = build_prompt(manifest.prompt, tokenizer, turns, [], manifest.embedding.extra)
    return [index for index in prompt.token_ids.tolist() if index in control]


def draw_text(rng: random.Random, special: list[str]) -> str:
    """Control tokens whole and in pieces, letters of every kind; seldom two million of them."""
    pieces = [rng.choice((*PIECES, *special)) for _ in range(rng.choice((1, 2, 5, 30)))]
    if rng.random() < 0.3:
        token = rng.choice(special)
        at = rng.randrange(len(token))
        pieces.append(token[:at] + rng.choice(("", "\u200b", "\u0301", token)) + token[at:])
    text = "".join(pieces)
    return (text * (LONGEST // len(text) + 1))[:LONGEST] if rng.random() < 0.01 else text
