"""The server under load: 8 clients at once beside one after the other, first tokens under a prefill, room in the cache.

    python -m tools.bench.serve --write                # throughput, first tokens, room: results/serve.json
    python -m tools.bench.serve --soak 120 --write     # two hours of mixed load: results/serve_soak.json

A server in a process of its own, asked by the openai package. Each client asks about a film of its own; rounds of one
after the other and of all at once take turns. Their answers are compared with each other, the first one with that of a
pipeline that has no server and no batch, too. "decoding" counts the tokens while every request runs, "whole" all of a
round, its prefills included.
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
from framefusion.runtime.bundle import Bundle
from framefusion.runtime.memory import slot_bytes
from framefusion.runtime.pipeline import Pipeline
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
        flags += ["--cache-mb", SOAK_MB if arguments.soak else 1024 * GIGABYTES, "--threads", arguments.threads]
        measure = _soak if arguments.soak else _measure
        figures = measure(arguments, bundle, films, folder, flags)
    common = {"shape": arguments.shape, "threads": arguments.threads, "clients": arguments.clients}
    common |= {"film": f"{arguments.frames} x {arguments.grid[0] * arguments.grid[1]} tokens"}
    common |= {"load_after": round(os.getloadavg()[0], 2)}
    report("serve", common | figures, write=arguments.write, file="serve_soak" if arguments.soak else "serve")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=(*SHAPES, "trained"), default="qwen2-0.5b")
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
    options = BuildOptions.chosen(similarity_lower_bound=0.6, depth=depth, max_input_len=4096)
    return open_bundle(checkpoint, arguments.work / f"{arguments.shape}-serve", options)


def _measure(
    arguments: argparse.Namespace, bundle: Path, films: Sequence[Path], folder: Path, flags: Sequence[object]
) -> dict[str, Any]:
    """Throughput, first tokens and room at each cost."""
    asks = {cost: [Ask(film, (QUESTIONS[n % 4],), cost, arguments.new_tokens) for n, film in enumerate(films)]
            for cost in arguments.costs}  # fmt: skip
    # 1. The answers of a pipeline by itself, and what they hold in the caches.
    _say("answers by themselves")
    answers, room = _answers(bundle, arguments.threads, asks)
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
    bundle: Path, threads: int, asks: Mapping[float, Sequence[Ask]]
) -> tuple[dict[float, str], dict[str, Any]]:
    """By cost: the text of the first answer, and how many such requests the cache has room for."""
    room: dict[str, Any] = {}
    answers: dict[float, str] = {}
    with Pipeline(Bundle(bundle), threads=threads) as pipeline:
        slot = slot_bytes(pipeline.manifest)
        for cost, (wanted, *_) in asks.items():
            found = expected(pipeline, wanted)
            answers[cost] = found.first
            size = slot * sum(length + wanted.new_tokens for length in found.report.kv_lengths)
            room[f"cost {cost:g}"] = {"count": GIGABYTES * 2**30 // size, "mb_each": size / 2**20,
                                      "prompt_tokens": found.report.prompt_tokens,
                                      "reached": found.report.cost}  # fmt: skip
    return answers, room


def _throughput(server: Server, asks: Sequence[Ask], text: str, rounds: int) -> dict[str, Any]:
    """Tokens a second of one client after the other and of all at once.

    Args:
        server: that is asked.
        asks: one of each client.
        text: the answer to the first one, without a server.
        rounds: of each kind.
    """
    alone: list[dict[str, float]] = []
    together: list[dict[str, float]] = []
    gaps: list[float] = []
    texts: list[list[str]] = []  # of each round
    for _ in range(rounds):
        client = server.client()
        begun = time.perf_counter()
        answers = [ask(client, each.body([each.first()], stream=True)) for each in asks]
        alone.append(_rates(answers, time.perf_counter() - begun, at_once=False))
        texts.append([answer.text for answer in answers])
        begun = time.perf_counter()
        with ThreadPoolExecutor(len(asks)) as threads:
            answers = list(threads.map(lambda each: ask(server.client(), each.body([each.first()], stream=True)), asks))
        together.append(_rates(answers, time.perf_counter() - begun, at_once=True))
        texts.append([answer.text for answer in answers])
        for answer in answers:
            gaps += np.diff(answer.times).tolist()
    right = [text, *texts[0][1:]]
    wrong = sum(found != other for several in texts for found, other in zip(several, right, strict=True))
    figures: dict[str, Any] = {"one_after_the_other": _medians(alone), "at_once": _medians(together)}
    for name in ("whole", "decoding"):
        key = f"{name}_tokens_per_second"
        figures[f"{name}_ratio"] = figures["at_once"][key] / figures["one_after_the_other"][key]
    return figures | {"between_pieces_at_once": percentiles(gaps), "wrong": wrong, "answers": 2 * rounds * len(asks)}


def _rates(answers: Sequence[Answer], seconds: float, *, at_once: bool) -> dict[str, float]:
    """Tokens a second over a round, and while all requests of it decode.

    Args:
        answers: of a round.
        seconds: of it.
        at_once: they ran side by side.
    """
    tokens = sum(answer.new_tokens for answer in answers)
    if at_once:  # from the last one's first piece to the end of the first one that ends
        begin = max(answer.first for answer in answers)
        end = min(answer.last for answer in answers)
        shares = [sum(begin < at <= end for at in answer.times) / max(len(answer.times), 1) for answer in answers]
        decoded = sum(share * answer.new_tokens for share, answer in zip(shares, answers, strict=True))
        span = end - begin
    else:
        decoded = float(sum(answer.new_tokens - 1 for answer in answers))
        span = sum(answer.last - answer.first for answer in answers)
    return {
        "whole_tokens_per_second": tokens / seconds,
        "decoding_tokens_per_second": decoded / span if span > 0 else 0.0,
        "seconds": seconds,
        "first_token_median_s": float(np.median([answer.to_first for answer in answers])),
    }


def _medians(rounds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: float(np.median([figures[name] for figures in rounds])) for name in rounds[0]}


def _under_prefill(server: Server, asks: Sequence[Ask], trials: int) -> dict[str, Any]:
    """First tokens of a text question that is sent while a film's request is before its own first token."""
    chance = random.Random(SEED)
    client = server.client()
    short = Ask(None, ("Hello",), 1.0, 8)
    quiet = [ask(client, short.body([short.first()], stream=True)).to_first for _ in range(trials)]
    film = Ask(asks[0].film, asks[0].questions, asks[0].cost, 1)
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
    with Pipeline(Bundle(bundle), threads=arguments.threads) as pipeline:
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
