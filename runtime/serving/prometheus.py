"""Figures for Prometheus, by vLLM's names, so that its dashboards work here."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4 as CONTENT_TYPE

from llama_onnx.runtime.serving.replies.answer_parts import Part

if TYPE_CHECKING:
    from llama_onnx.runtime.engine.engine import Load

__all__ = ["CONTENT_TYPE", "Metrics"]

_FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100)
_BETWEEN = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5)
_WHOLE = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500)


class Metrics:
    """The figures of one server; `load` returns what its engine does at the moment."""

    def __init__(self, model: str, load: Callable[[], Load]) -> None:
        self._registry = CollectorRegistry()
        self._model = model

        def gauge(name: str, text: str, read: Callable[[Load], float]) -> None:
            made = Gauge(f"vllm:{name}", text, ["model_name"], registry=self._registry)
            made.labels(model).set_function(lambda: read(load()))

        gauge("num_requests_running", "Answers in progress.", lambda now: now.running)
        gauge("num_requests_waiting", "Answers that wait for room.", lambda now: now.waiting)
        gauge("kv_cache_usage_perc", "Share of the caches in use, 0 to 1.", lambda now: now.used)

        def counter(name: str, text: str) -> Counter:
            made = Counter(f"vllm:{name}", text, ["model_name"], registry=self._registry)
            return made.labels(model)

        self._prompt = counter("prompt_tokens", "Tokens of prompts.")
        self._generated = counter("generation_tokens", "Tokens of answers.")
        self._queried = counter("prefix_cache_queries", "Tokens looked for in the prefix cache.")
        self._hits = counter("prefix_cache_hits", "Tokens found in the prefix cache.")
        self._drafted = counter("spec_decode_num_draft_tokens", "Tokens that were drafted.")
        self._accepted = counter("spec_decode_num_accepted_tokens", "Drafted tokens accepted.")
        self._ends = Counter(
            "vllm:request_success",
            "Answers, by the reason of their end.",
            ["model_name", "finished_reason"],
            registry=self._registry,
        )

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            made = Histogram(
                f"vllm:{name}", text, ["model_name"], registry=self._registry, buckets=buckets
            )
            return made.labels(model)

        self._first = histogram("time_to_first_token_seconds", "Until the first token.", _FIRST)
        self._between = histogram("inter_token_latency_seconds", "Mean of an answer.", _BETWEEN)
        self._whole = histogram("e2e_request_latency_seconds", "Of an answer.", _WHOLE)

    def count(self, part: Part) -> None:
        """Take note of the last part of an answer."""
        stats = part.stats
        if stats is None:
            return
        self._prompt.inc(stats.prompt_tokens)
        self._generated.inc(stats.new_tokens)
        self._queried.inc(stats.prompt_tokens)
        self._hits.inc(stats.reused_tokens)
        self._drafted.inc(stats.drafted_tokens)
        self._accepted.inc(stats.accepted_tokens)
        self._ends.labels(self._model, part.finish).inc()
        self._first.observe(stats.first_token_seconds)
        self._whole.observe(stats.first_token_seconds + stats.decode_seconds)
        if stats.new_tokens > 1:
            self._between.observe(stats.decode_seconds / (stats.new_tokens - 1))

    def text(self) -> bytes:
        """Return all figures in Prometheus' text format."""
        return bytes(generate_latest(self._registry))
