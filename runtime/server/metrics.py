"""What a server counts, in Prometheus' text format, under the names that dashboards of vLLM know.

Names begin with a prefix, `framefusion:` unless the flags say `vllm:`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from framefusion.runtime.request import PrefillReport

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
STEP_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
STEP_ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


class Metrics:
    """Counters and histograms of one server.

    Args:
        prefix: of every name, with its colon.
        gauges: name, help and the function that gives its value now.
    """

    def __init__(self, prefix: str, gauges: Mapping[str, tuple[str, Callable[[], float]]]) -> None:
        self._registry = CollectorRegistry()
        self._prefix = prefix
        self._prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts, visual ones included.")
        self._generation_tokens = self._counter("generation_tokens", "Tokens of answers.")
        self._cached_tokens = self._counter("prefix_cache_hits", "Tokens of prompts that were in caches.")
        self._visual_tokens = self._counter("visual_tokens", "Visual tokens, shown and kept.", "state")
        self._finished = self._counter("request_success", "Answers that ended.", "finished_reason")
        self._refused = self._counter("request_errors", "Requests that got an error.", "status", "code")
        self._first_token = self._histogram("time_to_first_token_seconds", "From the request to its first token.")
        self._whole = self._histogram("e2e_request_latency_seconds", "From the request to the end of its answer.")
        self._queue = self._histogram("request_queue_time_seconds", "From the media to the prefill.")
        self._between = self._histogram("inter_token_latency_seconds", "Between two tokens.", buckets=TOKEN_SECONDS)
        self._step_tokens = self._histogram("iteration_tokens_total", "In a step of the engine.", buckets=STEP_TOKENS)
        self._step_rows = self._histogram("decode_batch_size", "Requests in a decode step.", buckets=STEP_ROWS)
        self._stages = self._histogram("stage_seconds", "Spent in a stage of a request.", "stage")
        for name, (text, value) in gauges.items():
            Gauge(prefix + name, text, registry=self._registry).set_function(value)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(self._prefix + name, text, labels, registry=self._registry)

    def _histogram(self, name: str, text: str, *labels: str, buckets: tuple[float, ...] = SECONDS) -> Histogram:
        return Histogram(self._prefix + name, text, labels, buckets=buckets, registry=self._registry)

    def prefilled(self, report: PrefillReport, queued: float) -> None:
        """A request left the queue and was prefilled."""
        self._queue.observe(queued)
        self._prompt_tokens.inc(report.prompt_tokens)
        self._cached_tokens.inc(report.reused_tokens)
        self._step_tokens.observe(report.prompt_tokens - report.reused_tokens)
        if report.visual_tokens:
            self._visual_tokens.labels("seen").inc(report.visual_tokens)
            self._visual_tokens.labels("kept").inc(report.kept_tokens)

    def decoded(self, rows: int) -> None:
        """A step brought a token to so many requests."""
        self._step_tokens.observe(rows)
        self._step_rows.observe(rows)

    def token(self, since: float, *, first: bool) -> None:
        """A token was given, so many seconds after the request (the first one) or the token before."""
        self._generation_tokens.inc()
        (self._first_token if first else self._between).observe(since)

    def finished(self, reason: str, seconds: float, stages: Mapping[str, float]) -> None:
        """An answer ended."""
        self._finished.labels(reason).inc()
        self._whole.observe(seconds)
        for stage, spent in stages.items():
            self._stages.labels(stage).observe(spent)

    def refused(self, status: int, code: str) -> None:
        """A request got an error."""
        self._refused.labels(str(status), code).inc()

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return bytes(generate_latest(self._registry))
