"""Figures of all replicas as one text for Prometheus, with vLLM's label `engine` for each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

LABEL = "engine"


def gathered(texts: Mapping[int, str], waiting: int, restarts: Mapping[int, int]) -> bytes:
    """Return the figures in `texts`, by the numbers of the replicas that said them, and the front's
    own: how many requests wait there, and how often each replica was restarted."""
    registry = CollectorRegistry()
    registry.register(_Gathered(texts, waiting, restarts))
    return bytes(generate_latest(registry))


class _Gathered(Collector):
    def __init__(self, texts: Mapping[int, str], waiting: int, restarts: Mapping[int, int]) -> None:
        self._texts, self._waiting, self._restarts = texts, waiting, restarts

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for number, text in sorted(self._texts.items()):
            for found in text_string_to_metric_families(text):
                family = families.setdefault(
                    found.name, Metric(found.name, found.documentation, found.type)
                )
                for sample in found.samples:
                    labels = {**sample.labels, LABEL: str(number)}
                    family.add_sample(sample.name, labels, sample.value)
        yield from families.values()
        front = GaugeMetricFamily("llama_onnx:front_waiting", "Requests that wait in the front.")
        front.add_metric([], self._waiting)
        yield front
        again = CounterMetricFamily("llama_onnx:replica_restarts", "Restarts.", labels=[LABEL])
        for number, count in self._restarts.items():
            again.add_metric([str(number)], count)
        yield again
