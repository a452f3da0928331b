"""Talk about a film, an answer piece by piece: `python examples/talk.py bundle clip.mp4`, then a question a line.

The film is read and encoded once; each question prefills only what is new.
"""

from __future__ import annotations

import sys

from framefusion import Pipeline, Request
from framefusion.errors import FrameFusionError


def main(bundle: str, film: str) -> None:
    with Pipeline(bundle) as pipeline:
        chat = pipeline.chat(film, request=Request(max_new_tokens=64))
        for line in sys.stdin:
            try:
                for step in chat.stream(line.strip()):
                    print(step.text, end="", flush=True)
            except FrameFusionError as error:  # the conversation is as before
                print(f"error: {error}", end="")
            print()
        print(chat, file=sys.stderr)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2])
