"""The server under load: 8 clients at once beside one after the other, first tokens under a prefill, room in the cache.

    python -m tools.bench.serve --write                # throughput, first tokens, room: results/serve.json
    python -m tools.bench.serve --backend inductor --dtype bfloat16 --write
    python -m tools.bench.serve --soak 120 --write     # two hours of mixed load: results/serve_soak.json

A server in a process of its own, asked by the openai package. Each client asks about a film of its own, then a second
question about it; rounds of one after the other and of all at once take turns. Their answers are compared with each
other, and the first client's with those of a pipeline that has no server and no batch. "whole" counts answers about
films, prefills included; "decoding" those to second questions, whose films are in the caches of their conversations.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from framefusion.export.options import BuildOptions
from framefusion.runtime.backends.table import backend_names, engine_kinds
from framefusion.runtime.bundle import Bundle
from framefusion.runtime.memory import slot_bytes
from framefusion.runtime.pipeline import Pipeline
from framefusion.runtime.proof.opening import open_proven
from tools.bench.serving.asking import Answer, Ask, Expected, ask, draw_film, expected, percentiles
from tools.bench.serving.process import Server, serving
from tools.bench.serving.soak import soak
from tools.bench.setting import SEED, SHAPES, TOKENIZER, open_bundle, report, write_checkpoint

PIXELS = 28  # a side of a token
GIGABYTES = 2
SOAK_MB = 512  # of caches: conversations fill them soon, and are evicted
SOAK_TOKENS = 64  # of an answer, at most
QUESTIONS = ("What happens first?", "Who is there?", "Describe the scene.", "And at the end?")
SECOND = "And what else?"
TRAINED = TOKENIZER.parent
USUAL = ("onnxruntime", "float32")


def main() -> None:
    """Measure, or load for long."""
    arguments = _arguments()
    with tempfile.TemporaryDirectory(prefix="serve-") as name:
        folder = Path(name)
        bundle = _bundle(arguments)
        film_size = tuple(side * PIXELS for side in arguments.grid)
        films = [
            draw_film(folder / f"film-{number}.mp4", 2 * arguments.frames, film_size, number)
            for number in range(arguments.clients)
        ]
        flags = ["--allowed-local-media-path", folder, "--max-running", arguments.clients, "--max-waiting", 64]
        flags += ["--backend", arguments.backend]
        flags += ["--cache-mb", SOAK_MB if arguments.soak else 1024 * GIGABYTES, "--threads", arguments.threads]
        measure = _soak if arguments.soak else _measure
        figures = measure(arguments, bundle, films, folder, flags)
    common = {"shape": arguments.shape, "server_backend": arguments.backend, "dtype": arguments.dtype}
    common |= {"threads": arguments.threads, "clients": arguments.clients}
    common |= {"film": f"{arguments.frames} x {arguments.grid[0] * arguments.grid[1]} tokens"}
    common |= {"load_after": round(os.getloadavg()[0], 2)}
    name = "serve_soak" if arguments.soak else "serve"
    if (arguments.backend, arguments.dtype) != USUAL:
        name += f"_{arguments.backend}_{arguments.dtype}"
    report("serve", common | figures, write=arguments.write, file=name)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=(*SHAPES, "trained"), default="qwen2-0.5b")
    parser.add_argument("--backend", choices=backend_names(), default=USUAL[0], help="inductor's engines are compiled")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default=USUAL[1])
    parser.add_argument("--frames", type=int, default=16, help="temporal grids of a film, two frames each")
    parser.add_argument("--grid", type=_pair, default=(16, 8), help="rows x columns of tokens in one")
    parser.add_argument("--costs", type=lambda text: [float(x) for x in text.split(",")], default=[1.0, 0.3, 0.1])
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--trials", type=int, default=20, help="first tokens that are measured under a prefill")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--soak", type=float, metavar="MINUTES", help="load for so long, and compare every answer")
    parser.add_argument("--work", type=Path, default=Path("/tmp/framefusion-bench"), help="checkpoint and bundle")
    parser.add_argument("--write", action="store_true", help="write a file under results/")
    return parser.parse_args()


def _pair(text: str) -> tuple[int, int]:
    rows, columns = text.split("x")
    return int(rows), int(columns)


def _bundle(arguments: argparse.Namespace) -> Path:
    """A bundle whose graphs are free in their rows, built unless it stands in the work folder."""
    if arguments.shape == "trained":
        checkpoint = TRAINED
        depth = 2
    else:
        checkpoint = write_checkpoint(SHAPES[arguments.shape], arguments.work / f"{arguments.shape}-checkpoint")
        depth = min(7, SHAPES[arguments.shape].num_layers - 2)
    kind = arguments.backend if arguments.backend in engine_kinds() else None
    options = BuildOptions.chosen(
        similarity_lower_bound=0.6, depth=depth, max_input_len=4096, dtype=arguments.dtype, backend=kind
    )
    suffix = "" if (kind, arguments.dtype) == (None, USUAL[1]) else f"-{kind or 'graphs'}-{arguments.dtype}"
    return open_bundle(checkpoint, arguments.work / f"{arguments.shape}-serve{suffix}", options)


def _pipeline(bundle: Path, arguments: argparse.Namespace) -> Pipeline:
    """What has no server, on the same backend."""
    opened = Bundle(bundle)
    (choice, backend) = open_proven(opened, arguments.backend, threads=arguments.threads, say=_say)
    return Pipeline(opened, backend, choice=choice)


def _measure(
    arguments: argparse.Namespace, bundle: Path, films: Sequence[Path], folder: Path, flags: Sequence[object]
) -> dict[str, Any]:
    """Throughput, first tokens and room at each cost."""
    asks = {cost: [Ask(film, (QUESTIONS[n % 4], SECOND), cost, arguments.new_tokens) for n, film in enumerate(films)]
            for cost in arguments.costs}  # fmt: skip
    # 1. The answers of a pipeline by itself, and what they hold in the caches.
    _say("answers by themselves")
    answers, room = _answers(bundle, arguments, asks)
    with serving(bundle, folder, *flags) as server:
        _require_batches(server)
        client = server.client()
        _say("warming up")
        for first in (asks[arguments.costs[0]][0], asks[arguments.costs[-1]][0]):
            ask(client, first.body([first.first()], stream=True))
        figures: dict[str, Any] = {"rounds": arguments.rounds, "new_tokens": arguments.new_tokens}
        figures["room"] = {"gigabytes": GIGABYTES, "requests": room}
        # 2. One after the other and all at once, in turns.
        for cost, wanted in asks.items():
            _say(f"throughput at cost {cost:g}")
            figures[f"cost {cost:g}"] = _throughput(server, wanted, answers[cost], arguments.rounds)
        # 3. First tokens of a short question while another request is prefilled.
        for cost in arguments.costs:
            _say(f"first tokens under a prefill at cost {cost:g}")
            figures[f"cost {cost:g}"]["first_token_under_a_prefill"] = _under_prefill(
                server, asks[cost], arguments.trials
            )
        figures["rows_a_step"] = server.metric("decode_batch_size_sum") / server.metric("decode_batch_size_count")
        figures["resident_mb"] = server.resident() / 1e6
    return figures


def _answers(
    bundle: Path, arguments: argparse.Namespace, asks: Mapping[float, Sequence[Ask]]
) -> tuple[dict[float, Expected], dict[str, Any]]:
    """By cost: the answers to the first client, and how many such requests the cache has room for."""
    room: dict[str, Any] = {}
    answers: dict[float, Expected] = {}
    with _pipeline(bundle, arguments) as pipeline:
        slot = slot_bytes(pipeline.manifest)
        for cost, (wanted, *_) in asks.items():
            found = expected(pipeline, wanted)
            answers[cost] = found
            size = slot * sum(length + wanted.new_tokens for length in found.report.kv_lengths)
            room[f"cost {cost:g}"] = {"count": GIGABYTES * 2**30 // size, "mb_each": size / 2**20,
                                      "prompt_tokens": found.report.prompt_tokens,
                                      "reached": found.report.cost}  # fmt: skip
    return answers, room


def _throughput(server: Server, asks: Sequence[Ask], reference: Expected, rounds: int) -> dict[str, Any]:
    """Tokens a second of one client after the other and of all at once.

    Args:
        server: that is asked.
        asks: one of each client.
        reference: the answers to the first one, without a server.
        rounds: of each kind.
    """
    ways = {"one_after_the_other": 1, "at_once": len(asks)}
    rates: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    gaps: list[float] = []
    texts: list[list[str | None]] = []  # of each round
    for _ in range(rounds):
        for name, clients in ways.items():
            # 1. The films: one prefill each, and an answer.
            first, seconds = _all(server, [each.body([each.first()], stream=True) for each in asks], clients)
            # 2. The second questions, behind caches that hold the films: little but decoding.
            bodies = [_second(each, answer.text) for each, answer in zip(asks, first, strict=True)]
            second, later = _all(server, bodies, clients)
            if not all(answer.cached_tokens for answer in second):
                raise SystemExit("a conversation was not continued: its caches went for room")
            rates[name].append(_rates(first, seconds, second, later))
            texts.append([answer.text for answer in (*first, *second)])
            if clients > 1:
                gaps += [gap for answer in first for gap in np.diff(answer.times).tolist()]
    right = list(texts[0])
    right[0] = reference.first
    right[len(asks)] = reference.second
    wrong = sum(found != other for several in texts for found, other in zip(several, right, strict=True))
    figures: dict[str, Any] = {name: _medians(measured) for name, measured in rates.items()}
    for part in ("whole", "decoding"):
        (alone, together) = (figures[name][f"{part}_tokens_per_second"] for name in ways)
        figures[f"{part}_ratio"] = together / alone
    answers = sum(map(len, texts))
    return figures | {"between_pieces_at_once": percentiles(gaps), "wrong": wrong, "answers": answers}


def _all(server: Server, bodies: Sequence[dict[str, Any]], clients: int) -> tuple[list[Answer], float]:
    """Ask all of them, so many at a time; the answers, and the seconds until the last one is there."""
    begun = time.perf_counter()
    with ThreadPoolExecutor(clients) as threads:
        answers = list(threads.map(lambda body: ask(server.client(), body), bodies))
    return answers, time.perf_counter() - begun


def _second(wanted: Ask, answer: str) -> dict[str, Any]:
    """The second question of a conversation."""
    said = [{"role": "assistant", "content": answer}, {"role": "user", "content": SECOND}]
    return wanted.body([wanted.first(), *said], stream=True)


def _rates(first: Sequence[Answer], seconds: float, second: Sequence[Answer], later: float) -> dict[str, float]:
    """Tokens a second of answers about films, prefills included, and of those to second questions."""
    return {
        "whole_tokens_per_second": sum(answer.new_tokens for answer in first) / seconds,
        "decoding_tokens_per_second": sum(answer.new_tokens for answer in second) / later,
        "seconds": seconds,
        "decoding_seconds": later,
        "first_token_median_s": float(np.median([answer.to_first for answer in first])),
    }


def _medians(rounds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: float(np.median([figures[name] for figures in rounds])) for name in rounds[0]}


def _under_prefill(server: Server, asks: Sequence[Ask], trials: int) -> dict[str, Any]:
    """First tokens of a text question that is sent while a film's request is before its own first token."""
    chance = random.Random(SEED)
    client = server.client()
    short = Ask(None, ("Hello",), 1.0, 8)
    quiet = [ask(client, short.body([short.first()], stream=True)).to_first for _ in range(trials)]
    film = Ask(asks[0].film, asks[0].questions[:1], asks[0].cost, 1)
    usual = ask(client, film.body([film.first()], stream=True))
    found: list[float] = []
    films: list[float] = []
    for _ in range(trials):
        other = server.client()
        thread = threading.Thread(
            target=lambda: films.append(ask(other, film.body([film.first()], stream=True)).to_first)  # noqa: B023
        )
        thread.start()
        time.sleep(chance.uniform(0, usual.to_first))
        found.append(ask(client, short.body([short.first()], stream=True)).to_first)
        thread.join()
    return {
        "first_token": percentiles(found),
        "first_token_of_the_film": percentiles(films),
        "first_token_with_nobody_else": percentiles(quiet),
        "prefill_s": usual.seconds.get("prefill", 0.0) + usual.seconds.get("reduction", 0.0),
    }


def _soak(
    arguments: argparse.Namespace, bundle: Path, films: Sequence[Path], folder: Path, flags: Sequence[object]
) -> dict[str, Any]:
    """A mixed load; see `tools.bench.serving.soak`."""
    pool = _pool(arguments, films)
    _say(f"{len(pool)} answers by themselves")
    with _pipeline(bundle, arguments) as pipeline:
        answers: list[tuple[Ask, Expected]] = [(wanted, expected(pipeline, wanted)) for wanted in pool]
    with serving(bundle, folder, *flags) as server:
        _require_batches(server)
        _say(f"{arguments.soak:g} minutes of load")
        figures = soak(server, answers, arguments.soak, 2 * arguments.clients, SEED)
        log = server.log.read_text().splitlines()
    errors = [line for line in log if "ERROR" in line or "Traceback" in line]
    return figures | {"errors_in_the_log": len(errors), "first_errors": errors[:5]}


def _pool(arguments: argparse.Namespace, films: Sequence[Path]) -> list[Ask]:
    """What a long load asks: each film at each cost, text, drawn tokens, and conversations."""
    chance = random.Random(SEED)
    most = min(arguments.new_tokens, SOAK_TOKENS)
    pool = []
    for number, film in enumerate(films[:2]):
        for cost in arguments.costs:
            questions = (QUESTIONS[number],)
            new_tokens = chance.randint(4, most)
            pool.append(Ask(film, questions, cost, new_tokens, stream=chance.random() < 0.7))
            pool.append(Ask(film, (*questions, SECOND), cost, new_tokens // 2 + 1, stream=chance.random() < 0.7))
    for number, question in enumerate(QUESTIONS):
        pool.append(Ask(None, (question, SECOND), 1.0, chance.randint(4, most)))
        pool.append(Ask(films[number % len(films)], (question,), 0.3, most // 2, seed=number))
    return pool


def _require_batches(server: Server) -> None:
    if "requests decode in turns" in server.log.read_text():
        raise SystemExit(f"the server does not batch: {server.log.read_text()}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
