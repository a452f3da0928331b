"""Ask about a film: `python examples/ask.py bundle clip.mp4 "What happens?"`."""

from __future__ import annotations

import sys

from framefusion import Pipeline, Request


def main(bundle: str, film: str, question: str) -> None:
    with Pipeline(bundle) as pipeline:
        answer = pipeline.generate(question, [film], Request(max_new_tokens=64))
    print(answer)
    print(f"{answer.visual_tokens} visual tokens, {answer.kept(-1, visual=True).size} left in the last layer")
    print(f"{answer.cost:.0%} of their computation kept, {sum(answer.seconds.values()):.2f} s")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2], sys.argv[3])
