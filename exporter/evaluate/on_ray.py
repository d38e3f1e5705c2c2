"""Measure the shards of a corpus on a Ray cluster."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llama_onnx.exporter.evaluate.corpus import Corpus, Shard
from llama_onnx.exporter.evaluate.shards import Measure, Measured, Work, to_content
from llama_onnx.runtime.batch.ray_cluster import check_nodes, connected, find_nodes, workers_of
from llama_onnx.targets.listing import hash_file
from llama_onnx.targets.package import ModelPackage

_THREADS = 1


class Actor:
    """An evaluator in Ray's hands."""

    def __init__(self, work: Work, corpus: str) -> None:
        """Open both models; `corpus` is the path of the text."""
        import torch

        torch.set_num_threads(_THREADS)
        self._evaluator, self._corpus = work.open(), Path(corpus)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Measure a shard."""
        text = Shard(row["start"], row["end"]).read(self._corpus)
        return {"shard": row["shard"], "totals": to_content(self._evaluator.measure(text))}


def measure_on(address: str, workers: int | None) -> Measure:
    """Return what measures shards on the cluster at `address`, with as many actors as fit."""

    def measure(work: Work, corpus: Corpus, done: bytearray) -> Iterator[Measured]:
        left = [
            {"shard": number, "start": shard.start, "end": shard.end}
            for number, shard in enumerate(corpus.shards)
            if not done[number]
        ]
        with connected(address) as ray:
            nodes = find_nodes(ray, _THREADS)
            sha256 = hash_file(ModelPackage.open(work.package).index)
            source = (corpus.path, corpus.sha256)
            check_nodes(ray, nodes, (str(work.package), sha256), source)
            count = min(workers_of(nodes, workers, _THREADS), len(left))
            measured = ray.data.from_items(left, override_num_blocks=len(left)).map(
                Actor,
                fn_constructor_args=(work, str(corpus.path)),
                compute=ray.data.ActorPoolStrategy(size=count),
                num_cpus=_THREADS,
            )
            for row in measured.iter_rows():
                yield int(row["shard"]), bytes(row["totals"])

    return measure
