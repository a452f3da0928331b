"""Measure the tiny model with transformers' own forward on held-out clips: `python -m tools.tiny.evaluate`.

One question a clip, greedy decoding, exact match. Prints accuracy by question type as JSON. With `--mp4` every clip
goes through a compressed file: rendered at 8 fps, encoded, decoded and sampled at 2 fps.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2VLForConditionalGeneration

from tools.tiny import clips
from tools.tiny.model import GRID_TOKENS, patchify, positions
from tools.tiny.prompt import Prompts, load_tokenizer

CHECKPOINT = Path("tests/models/tiny_qwen2_vl")


@torch.inference_mode()
def answer(model: Any, prompts: Prompts, frames: clips.Frames, question: str, most: int = 6) -> str:
    """Greedy decoding with explicit M-RoPE positions and a key-value cache."""
    grids = len(frames) // 2
    tail = prompts.question(question)
    ids = torch.tensor([prompts.before + [prompts.video] * (grids * GRID_TOKENS) + tail])
    where = positions(len(prompts.before), grids, len(tail) + most)
    out = model(
        input_ids=ids,
        position_ids=where[:, :, : ids.shape[1]],
        mm_token_type_ids=(ids == prompts.video).int() * 2,
        pixel_values_videos=torch.from_numpy(patchify(frames)).to(model.dtype),
        video_grid_thw=torch.tensor([[grids, 8, 8]]),
        use_cache=True,
    )
    tokens: list[int] = []
    for step in range(most):
        token = int(out.logits[0, -1].argmax())
        if token in model.generation_config.eos_token_id:
            break
        tokens.append(token)
        at = ids.shape[1] + step
        out = model(
            input_ids=torch.tensor([[token]]),
            position_ids=where[:, :, at : at + 1],
            past_key_values=out.past_key_values,
            use_cache=True,
        )
    return str(prompts.tokenizer.decode(tokens))


def through_mp4(seed: int, kind: str) -> clips.Frames:
    """The clip of `draw_clip(seed)` after compression."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        clips.write_mp4(path, clips.scene_for(seed, kind))
        return clips.read_mp4(path)


def evaluate(model: Any, prompts: Prompts, seeds: range, mp4: bool = False) -> dict[str, Any]:
    """Accuracy by question type, in percent, with the number of questions asked."""
    counts: Counter[str] = Counter()
    right: Counter[str] = Counter()
    for seed in seeds:
        clip = clips.draw_clip(seed)
        frames = through_mp4(seed, clip.kind) if mp4 else clip.frames
        counts[clip.kind] += 1
        right[clip.kind] += answer(model, prompts, frames, clip.question) == clip.answer
    by_kind = {kind: round(100 * right[kind] / counts[kind], 1) for kind in clips.KINDS if counts[kind]}
    return {"questions": len(seeds), "all": round(100 * right.total() / len(seeds), 1), **by_kind}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--first", type=int, default=clips.HELD_OUT, help="first seed")
    parser.add_argument("--mp4", action="store_true", help="pass every clip through a compressed file")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--record", action="store_true", help="write the result into the checkpoint's TRAINING.json")
    args = parser.parse_args()
    started = time.time()
    model: Any = Qwen2VLForConditionalGeneration.from_pretrained(args.checkpoint, dtype=getattr(torch, args.dtype))
    model.eval()
    prompts = Prompts(load_tokenizer(args.checkpoint))
    result = evaluate(model, prompts, range(args.first, args.first + args.questions), args.mp4)
    result |= {"dtype": args.dtype, "seconds": round(time.time() - started)}
    print(json.dumps(result))
    if args.record:
        record(args.checkpoint / "TRAINING.json", "accuracy_through_mp4" if args.mp4 else "accuracy", result)


def record(path: Path, key: str, result: dict[str, Any]) -> None:
    """Set one entry of the training record."""
    facts = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**facts, key: result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
