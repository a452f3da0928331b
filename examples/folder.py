"""One question about every film of a folder, at several costs, a JSON object a line:

python examples/folder.py bundle films "What happens?" 1 0.5 0.3
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from framefusion import Pipeline, Request
from framefusion.errors import VideoError


def main(bundle: str, folder: str, question: str, costs: Sequence[float]) -> None:
    with Pipeline(bundle) as pipeline:
        for film in sorted(Path(folder).iterdir()):
            for cost in costs:
                line: dict[str, object] = {"film": film.name, "cost": cost}
                try:
                    answer = pipeline.generate(question, [film], Request(max_new_tokens=64, cost=cost))
                except VideoError as error:  # not a film, or a damaged one
                    print(json.dumps(line | {"error": str(error)}), flush=True)
                    break
                line |= {"answer": answer.text, "reached": round(answer.cost, 4), "kv_tokens": sum(answer.kv_lengths)}
                print(json.dumps(line | {"seconds": round(sum(answer.seconds.values()), 3)}), flush=True)


if __name__ == "__main__":
    if len(sys.argv) < 5:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2], sys.argv[3], [float(cost) for cost in sys.argv[4:]])
