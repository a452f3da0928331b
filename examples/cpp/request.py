"""A question about a film as flat .npy files, for a program without Python: `request.py BUNDLE FILM QUESTION FOLDER`.

Reads the film, lays out the prompt and works out the sizes with framefusion's runtime, on any machine; runs no graph.
What each file holds stands in docs/cpp.md. `request.py BUNDLE --text 12 7 9` gives the text of token ids.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from framefusion import Bundle, Turn, Visual
from framefusion.errors import BundleError, FrameFusionError, PromptError
from framefusion.reduction import tracks
from framefusion.runtime.backends.host import NoGraphs
from framefusion.runtime.generation.fixed_prefill import fixed_call
from framefusion.runtime.generation.stages import Stages
from framefusion.runtime.media.media_file import MediaLimits
from framefusion.runtime.media.visual_input import BytePatches
from framefusion.runtime.request import Request, Stopwatch
from framefusion.runtime.text.positions import decode_positions
from framefusion.runtime.text.prompt import FIRST_EXTRA
from framefusion.runtime.text.sampling import GenerationConfig

Arrays = dict[str, NDArray[Any]]
TYPES = {"float32": 1, "float16": 10, "bfloat16": 16}
"""ONNX's numbers of types."""


def main() -> int:
    """Write the request of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("question", nargs="*", metavar="FILM QUESTION FOLDER")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--text", type=int, nargs="+", metavar="ID", help="print the text of token ids instead")
    arguments = parser.parse_args()
    try:
        stages = Stages(Bundle(arguments.bundle), NoGraphs(), MediaLimits())
        if arguments.text:
            print(stages.tokenizer.decode(arguments.text))
            return 0
        if len(arguments.question) != 3:
            parser.error("a film, a question and a folder are wanted")
        film, question, folder = arguments.question
        if passed_over := other_settings(stages.manifest.generation):
            print(
                f"warning: the program takes the likeliest token, the bundle asks for {', '.join(passed_over)}: "
                "answers may differ from those of ff-run",
                file=sys.stderr,
            )
        write(request(stages, film, question, arguments.max_new_tokens), stages.bundle.digest, Path(folder))
    except FrameFusionError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def request(stages: Stages, film: str, question: str, max_new_tokens: int) -> Arrays:
    """Everything that the graphs are given, by file name, in the bundle's type.

    Raises:
        BundleError: a bundle that examples/cpp/main.cpp does not run.
        PromptError, BudgetError: the question does not fit the bundle.
    """
    # 1. What the program runs: one static prefill, a tower whose rows go into the prompt as they are, no bfloat16.
    manifest = stages.manifest
    model = manifest.model
    fixed = manifest.fixed
    if not stages.bundle.sealed:
        raise BundleError("the bundle has no digest, by which the program knows it: rebuild it")
    if fixed is None or manifest.vision.deepstack or model.dtype == "bfloat16":
        raise BundleError("the program runs bundles of --reduction fixed, in float32 or float16, without deepstack")
    # 2. The film as the tower's inputs, and the prompt.
    turns = [Turn("user", (Visual.VIDEO, question))]
    (visual,) = stages.read_visuals(turns, [film], manifest.sampling, Stopwatch())
    if visual.rows is not None or len(visual.tiles) != 1:
        raise BundleError(f"the program runs no family that shows a film as {manifest.model.family} does")
    (tiles,) = visual.tiles
    call = manifest.vision.settings.call(tiles, manifest.vision.head_dim)
    takes_bytes = manifest.vision.input == "uint8"
    patches = tiles.patches.levels if takes_bytes and isinstance(tiles.patches, BytePatches) else tiles.values
    prompt = stages.prompt(turns, [visual])
    max_new_tokens = stages.clamp_new_tokens(Request(max_new_tokens), prompt).max_new_tokens
    # 3. The sizes of the prefill, which follow from the labels, and the rotary tables of the prompt and the answer.
    prefill = fixed_call(manifest, tracks.request_labels(prompt.labels))
    size = fixed.max_text + fixed.max_visual
    length = prompt.token_ids.size
    capacities = [max(whole, used + max_new_tokens) for whole, used in zip(fixed.lengths, prefill.lengths, strict=True)]
    if max(prefill.lengths) + max_new_tokens > manifest.limits.max_kv_cache_capacity:
        raise PromptError(f"a cache holds {manifest.limits.max_kv_cache_capacity} tokens: ask for fewer new tokens")
    cos, sin = stages.rope(prompt.positions)
    next_cos, next_sin = stages.rope(decode_positions(length, prompt.rope_delta, max_new_tokens))
    tables = {"cos": pad(cos, size)[None], "sin": pad(sin, size)[None]}
    embedded = np.where(
        prompt.token_ids < 0, manifest.embedding.rows + FIRST_EXTRA - prompt.token_ids, prompt.token_ids
    )
    embedded[prompt.row_places] = -1
    known = min(model.vocab_size, stages.tokenizer.vocab_size)  # no training ever said what lies behind
    sizes = [
        size, model.hidden_size, model.num_kv_heads, model.head_dim, model.vocab_size, size - sum(fixed.drops), known
    ]  # fmt: skip
    arrays: Arrays = {f"vision/{name}": array for name, array in {"patches": patches, **call.inputs}.items()}
    arrays |= {f"prefill/{name}": array for name, array in (tables | prefill.vectors).items()}
    arrays |= {
        "sizes": np.array(sizes),
        "table_type": np.array([TYPES[manifest.embedding.dtype]]),
        "embedded": embedded,
        "places": prompt.row_places,
        "capacities": np.array(capacities),
        "lengths": np.array(prefill.lengths),
        "decode_cos": next_cos,
        "decode_sin": next_sin,
        "ends": np.array(manifest.generation.eos_token_ids or (), np.int64),
    }
    return {name: typed(array, model.float_type) for name, array in arrays.items()}


def other_settings(config: GenerationConfig) -> list[str]:
    """What a bundle's generation settings ask for beside the token of the largest logit, by name."""
    if config.takes_largest:
        return []
    bans = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "no_repeat_ngram_size", "min_new_tokens")
    names = [name for name in bans if getattr(config, name)]
    names += ["repetition_penalty"] if config.repetition_penalty not in (None, 1) else []
    return names + ([] if config.greedy else ["do_sample"])


def pad(table: NDArray[np.float32], size: int) -> NDArray[np.float32]:
    """Rows of zeros behind a table [S, n], up to the size of the graph."""
    return np.pad(table, ((0, size - len(table)), (0, 0)))


def typed(array: NDArray[Any], float_type: type[np.floating[Any]]) -> NDArray[Any]:
    """Whole numbers as int64, bytes as they are, others in the bundle's type; contiguous, as the program reads them."""
    kind = {"i": np.int64, "u": np.uint8}.get(array.dtype.kind, float_type)
    return np.ascontiguousarray(array, kind)


def write(arrays: Arrays, digest: str, folder: Path) -> None:
    """A file for each array, and the digest of the bundle that they are for."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bundle.txt").write_text(digest, encoding="ascii")
    for name, array in arrays.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        np.save(folder / f"{name}.npy", array)


if __name__ == "__main__":
    sys.exit(main())
