"""Write held-out clips as video files with their questions: `python -m tools.tiny.make_clips --out FOLDER`.

The folder gets `clip_000.mp4`, ... (8 fps, 16 s), `questions.json`, a list of {file, question, answer, kind}, and
`questions.jsonl`, the same for `ff-export eval --questions`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from tools.tiny import clips


def make_clips(out: Path, count: int, first_seed: int = clips.HELD_OUT) -> list[dict[str, str]]:
    """Write `count` clips, one question each, the kinds in turn."""
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, seed in enumerate(range(first_seed, first_seed + count)):
        clip = clips.draw_clip(seed)
        file = f"clip_{number:03d}.mp4"
        clips.write_mp4(out / file, clips.scene_for(seed, clip.kind))
        rows.append({"file": file, "question": clip.question, "answer": clip.answer, "kind": clip.kind})
    (out / "questions.json").write_text(json.dumps(rows, indent=1) + "\n")
    questions = [
        {"video": row["file"], "question": row["question"], "answer": row["answer"], "type": row["kind"]}
        for row in rows
    ]
    (out / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--first", type=int, default=clips.HELD_OUT, help="first seed")
    args = parser.parse_args()
    rows = make_clips(args.out, args.count, args.first)
    print(f"{len(rows)} clips in {args.out}")


if __name__ == "__main__":
    main()
