"""A long mixed load on one server: every answer is compared with the expected one, its memory is sampled.

Clients ask at random: films at several costs, text alone, drawn tokens, conversations of two turns, whole answers and
streams; some hang up in the middle, some send junk. An answer that is not the expected one is kept in the result.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx2
import numpy as np
import openai
import psutil

from tools.bench.serving.asking import Ask, Expected, ask
from tools.bench.serving.process import Memory, Server

SAMPLE_SECONDS = 5.0
KEPT = 20  # wrong answers in the result
JUNK: Sequence[Any] = ({}, {"messages": []}, {"messages": [{"role": "user", "content": "Hm?"}], "n": 3}, [1], "{")
HANGS_UP = 0.1
SENDS_JUNK = 0.05
WARM_UP = 0.2  # share of the samples that are not in the slope
PARTS = 24  # of the series in the result

FloatArray = np.ndarray[Any, np.dtype[np.float64]]


@dataclass
class Sample:
    """What a server holds at a time.

    Attributes:
        seconds: since the load began.
        memory: of the server and its decoders.
        cache: share of its cache of keys and values that is taken.
        load: of the machine, in processes that run.
    """

    seconds: float
    memory: Memory
    cache: float
    load: float


@dataclass
class Tally:
    """What became of all requests. Clients of all threads add to it."""

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[dict[str, Any]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, kind: str, problem: Mapping[str, Any] | None = None) -> None:
        """Count a request, and keep what was wrong with it."""
        with self.lock:
            self.counts[kind] += 1
            if problem is not None:
                self.counts["wrong"] += 1
                if len(self.wrong) < KEPT:
                    self.wrong.append({"kind": kind, **problem})


def soak(
    server: Server, pool: Sequence[tuple[Ask, Expected]], minutes: float, clients: int, seed: int
) -> dict[str, Any]:
    """Load a server for some minutes.

    Args:
        server: to be loaded.
        pool: what may be asked, with the answers.
        minutes: how long.
        clients: how many ask at once.
        seed: of what they ask.

    Returns:
        figures for JSON: requests by kind, wrong answers, memory.
    """
    tally = Tally()
    end = time.monotonic() + 60 * minutes
    threads = [
        threading.Thread(target=_client, args=(server, pool, tally, end, random.Random(seed + number)), daemon=True)
        for number in range(clients)
    ]
    for thread in threads:
        thread.start()
    # 1. Sample memory and load while they ask.
    samples: list[Sample] = []
    begun = time.monotonic()
    while any(thread.is_alive() for thread in threads):
        if server.process.poll() is not None:
            tally.add("server", {"problem": f"the server ended with {server.process.returncode}"})
            break
        samples += _sampled(server, time.monotonic() - begun)
        time.sleep(min(SAMPLE_SECONDS, max(60 * minutes / 50, 0.1)))
    # 2. What is left once nobody asks: nothing runs, and everything is answered.
    alive = server.process.poll() is None
    left = server.metric("num_requests_running") if alive else None
    rows = server.metric("decode_batch_size_sum") if alive else 0.0
    steps = server.metric("decode_batch_size_count") if alive else 0.0
    requests = {kind: count for kind, count in sorted(tally.counts.items()) if kind != "wrong"}
    return {
        "minutes": (time.monotonic() - begun) / 60,
        "clients": clients,
        "requests": requests,
        "compared": sum(count for kind, count in requests.items() if kind not in ("junk", "server")),
        "wrong": tally.counts["wrong"],
        "wrong_answers": tally.wrong,
        "running_at_the_end": left,
        "rows_a_step": rows / steps if steps else 0.0,
        "memory": memory(samples) if samples else {},
        "load": float(np.median([sample.load for sample in samples])),
    }


def _sampled(server: Server, seconds: float) -> list[Sample]:
    """Memory and load now; nothing where the server has just ended, or is too busy to say."""
    try:
        return [Sample(seconds, server.memory(), server.metric("kv_cache_usage_perc"), os.getloadavg()[0])]
    except (psutil.NoSuchProcess, httpx2.HTTPError):
        return []


def memory(samples: Sequence[Sample]) -> dict[str, Any]:
    """Megabytes at the ends, at most, and how they change in an hour once the server is warm.

    The series has a median for each of its parts: what the server and its decoders hold, what of it a leak would grow
    (no mapped files, no decoders), and how full the cache of keys and values is.
    """
    warm = samples[round(WARM_UP * len(samples)) :]
    seconds = np.array([sample.seconds for sample in warm])
    megabytes = np.array([sample.memory.resident / 1e6 for sample in warm])
    anonymous = np.array([sample.memory.anonymous / 1e6 for sample in warm])
    thirds = np.array_split(megabytes, 3)
    return {
        "first_mb": samples[0].memory.resident / 1e6,
        "warm_mb": float(megabytes[0]),
        "last_mb": float(megabytes[-1]),
        "largest_mb": max(sample.memory.resident for sample in samples) / 1e6,
        "median_of_first_third_mb": float(np.median(thirds[0])),
        "median_of_last_third_mb": float(np.median(thirds[2])),
        "mb_an_hour": _an_hour(seconds, megabytes),
        "anonymous_mb_an_hour": _an_hour(seconds, anonymous),
        "anonymous_mb_an_hour_of_the_second_half": _an_hour(*(part[len(warm) // 2 :] for part in (seconds, anonymous))),
        "samples": len(samples),
        "series": [_part(list(part)) for part in np.array_split(np.array(samples, object), min(PARTS, len(samples)))],
    }


def _an_hour(seconds: FloatArray, megabytes: FloatArray) -> float:
    """The slope of a straight line through them."""
    return 3600 * float(np.polyfit(seconds, megabytes, 1)[0]) if len(seconds) > 2 else 0.0


def _part(samples: Sequence[Sample]) -> dict[str, float]:
    """Medians of a part of a load."""
    return {
        "minute": round(samples[-1].seconds / 60, 1),
        "resident_mb": round(float(np.median([sample.memory.resident for sample in samples])) / 1e6),
        "anonymous_mb": round(float(np.median([sample.memory.anonymous for sample in samples])) / 1e6),
        "decoders_mb": round(float(np.median([sample.memory.decoders for sample in samples])) / 1e6),
        "cache": round(float(np.median([sample.cache for sample in samples])), 3),
    }


def _client(
    server: Server, pool: Sequence[tuple[Ask, Expected]], tally: Tally, end: float, chance: random.Random
) -> None:
    """One client after the other in a thread, until the time is over."""
    client = server.client()
    while time.monotonic() < end:
        if chance.random() < SENDS_JUNK:
            _send_junk(server, tally, chance.choice(JUNK))
            continue
        (wanted, answers) = chance.choice(pool)
        hangs_up = chance.randint(1, 6) if wanted.stream and chance.random() < HANGS_UP else None
        try:
            _converse(client, wanted, answers, tally, hangs_up)
        except openai.RateLimitError:
            tally.add("turned away")
            time.sleep(1)
        except (openai.OpenAIError, httpx2.HTTPError) as error:
            tally.add("failed", {"problem": f"{type(error).__name__}: {error}", "asked": str(wanted)})
            time.sleep(1)


def _converse(client: openai.OpenAI, wanted: Ask, answers: Expected, tally: Tally, hangs_up: int | None) -> None:
    """Ask one question, or two, and compare."""
    kind = "text" if wanted.film is None else f"film at cost {wanted.cost:g}"
    kind += "" if wanted.seed is None else ", drawn"
    messages = [wanted.first()]
    answer = ask(client, wanted.body(messages, stream=wanted.stream), give_up_after=hangs_up)
    if hangs_up is not None:
        agrees = answers.first.startswith(answer.text)
        tally.add("hung up", None if agrees else _differs(wanted, answer.text, answers.first))
        return
    tally.add(kind, None if answer.text == answers.first else _differs(wanted, answer.text, answers.first))
    if len(wanted.questions) == 1 or answer.text != answers.first:
        return
    messages += [{"role": "assistant", "content": answer.text}, {"role": "user", "content": wanted.questions[1]}]
    answer = ask(client, wanted.body(messages, stream=wanted.stream))
    other = answers.second if answer.cached_tokens else answers.afresh
    name = "second turn" if answer.cached_tokens else "second turn, afresh"
    tally.add(name, None if answer.text == other else _differs(wanted, answer.text, other))


def _differs(wanted: Ask, found: str, other: str | None) -> dict[str, Any]:
    return {"asked": str(wanted), "found": found, "expected": other}


def _send_junk(server: Server, tally: Tally, body: Any) -> None:
    content = {"content": body} if isinstance(body, str) else {"json": body}
    headers = {"Content-Type": "application/json"}
    try:
        status = httpx2.post(f"{server.url}/v1/chat/completions", headers=headers, timeout=60, **content).status_code
    except httpx2.HTTPError as error:
        tally.add("junk", {"problem": f"{type(error).__name__}: {error}", "asked": str(body)})
        return
    tally.add("junk", None if status in (400, 429) else {"problem": f"status {status}", "asked": str(body)})
