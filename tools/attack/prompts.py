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
from framefusion.runtime.text.prompt import Turn, check_texts, layout_texts
from framefusion.runtime.text.prompt_layout import build_prompt
from framefusion.runtime.text.tokenizer import Tokenizer
from tools.attack.harness import Fault, World

BATCH = 200
SECONDS = 10.0
"""Of the processor that the longest text may take, whatever else the machine does."""
LIMITS = (512, 4096, 32768)
"""Tokens of a prompt that bundles take; what surely has more is refused from its beginning."""
LONGEST = 2 << 20
PIECES = ("<", "|", "|>", "<|", "im_start", "im_end", "\n", " ", "\u200b", "\u202e", "\x1b[31m", "\0", "é", "e\u0301",
          "\ud55c", "\U0001f642", "\U0001f469\u200d\U0001f469", "assistant",
          "user", "{{", "%s", "\ud800", "\uffff", "a", "word ", "\r")  # fmt: skip


def attack(rng: random.Random, world: World, folder: Path) -> list[Fault]:
    """A batch of texts, each as a system prompt or as what a user says."""
    bundle = Bundle(world.bundle, verify=False)
    manifest = bundle.manifest
    path = world.bundle / "tokenizer.json"
    tokenizer = Tokenizer.from_file(path, layout_texts(manifest.prompt, manifest.preprocessing))
    special = [token["content"] for token in json.loads(path.read_text(encoding="utf-8"))["added_tokens"]]
    control = {tokenizer.control_id(token) for token in special}
    faults = []
    for _ in range(BATCH):
        text = draw_text(rng, special)
        role = rng.choice(("user", "user", "system"))
        limit = rng.choice(LIMITS)
        start = time.process_time()
        try:
            found = _control_tokens(bundle, tokenizer, control, role, text, limit)
        except FrameFusionError:
            found = None
        seconds = time.process_time() - start
        if seconds > SECONDS:
            faults.append(Fault("hang", f"{len(text)} characters took {seconds:.1f} s of {limit}: {text[:80]!r}"))
        if found is not None and found != _control_tokens(bundle, tokenizer, control, role, "x", limit):
            faults.append(Fault("wrong", f"a control token was smuggled: {text[:300]!r}"))
    return faults


def _control_tokens(
    bundle: Bundle, tokenizer: Tokenizer, control: set[int], role: str, text: str, limit: int
) -> list[int]:
    """The control tokens of a conversation, in their order, as a bundle of this limit of tokens reads it."""
    manifest = bundle.manifest
    turns = [Turn("system", (text,)), Turn("user", ("x",))] if role == "system" else [Turn("user", (text,))]
    check_texts(turns, tokenizer, limit)
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
