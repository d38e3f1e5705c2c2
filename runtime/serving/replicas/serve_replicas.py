"""Serve a package with several processes of this machine behind one address."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from llama_onnx.runtime.doctor.gather import gather_processor
from llama_onnx.runtime.engine.cache_budget import shared_bytes
from llama_onnx.runtime.measure.verify import VerifyReport
from llama_onnx.runtime.serving.replicas.front import Front
from llama_onnx.runtime.serving.replicas.keeper import Keeper, Up, start_all
from llama_onnx.runtime.serving.serving_spec import ServingSpec
from llama_onnx.targets.package import ModelPackage


@dataclass(frozen=True)
class Started:
    """Replicas that answer, and the application before them."""

    app: Front
    keepers: Sequence[Keeper]

    @property
    def ups(self) -> list[Up]:
        """What the replicas said of themselves when they came up."""
        return [one.up for one in self.keepers if one.up is not None]


def share(spec: ServingSpec, count: int) -> ServingSpec:
    """Return what each of `count` replicas serves: its part of the memory and the processors.

    Threads that the caller chose are those of each. No replica refuses a request because others
    wait: the front counts them all.
    """
    whole = spec.cache_bytes
    if whole is None:
        package = ModelPackage.open(Path(spec.package))
        whole = shared_bytes(count, package.data_path.stat().st_size)
    processors = max(1, int(gather_processor().usable))
    threads = spec.threads or max(1, processors // count)
    waiting = spec.waiting + spec.rows * count
    return replace(spec, cache_bytes=whole // count, threads=threads, waiting=waiting)


@contextmanager
def replicas(
    spec: ServingSpec, count: int, verification: VerifyReport | None = None
) -> Iterator[Started]:
    """Start `count` replicas, and end them after the block; raise why one cannot start."""
    key = secrets.token_urlsafe(32)
    keepers = [Keeper(number, share(spec, count), key) for number in range(count)]
    try:
        start_all(keepers)
        front = Front(keepers, key, rows=spec.rows, waiting=spec.waiting, verification=verification)
        yield Started(front, keepers)
    finally:
        for keeper in keepers:
            keeper.close()
