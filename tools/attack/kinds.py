"""The kinds of attack that `python -m tools.attack` runs. A new one is a function of a module here, and a row."""

from __future__ import annotations

from tools.attack import batches, flags, foreign, killed, prompts
from tools.attack.harness import Kind

KINDS = (
    Kind(
        "user's files",
        "foreign files, links and FIFOs where commands write, ended at any write",
        foreign.attack,
        4,
    ),
    Kind("killed builds", "builds killed, interrupted or out of disk at any write, and run again", killed.attack, 2),
    Kind("flags", "any command with any flags and values", flags.attack, 2),
    Kind("bundles", "edited manifests and damaged files, run", batches.bundles, 2, batches.BATCH, batches.SECONDS),
    Kind("pictures", "mutated pictures of every format", batches.pictures, 1, batches.BATCH, batches.SECONDS),
    Kind(
        "checkpoints",
        "changed configurations, indices and weight files",
        batches.checkpoints,
        1,
        batches.BATCH,
        batches.SECONDS,
    ),
    Kind(
        "prompts", "texts that spell control tokens, are no text, or very long", prompts.attack, 4, prompts.BATCH, 200
    ),
    Kind("films", "mutated films in every container", batches.films, 2, batches.BATCH, batches.SECONDS),
)
