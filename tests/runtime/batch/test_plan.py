"""How many workers there are, and what each may use."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llama_onnx.runtime.batch import batch
from llama_onnx.runtime.batch.batch import Plan, plan_workers
from llama_onnx.runtime.batch.worker import Opening
from llama_onnx.runtime.doctor.facts import Memory
from llama_onnx.runtime.engine import cache_budget
from llama_onnx.runtime.engine.cache_budget import shared_bytes

GB = 10**9


def package(size: int, folder: Path) -> Any:
    path = folder / "model.onnx.data"
    with path.open("wb") as file:
        file.truncate(size)
    return SimpleNamespace(data_path=path)


@pytest.mark.parametrize(
    ("workers", "threads", "free", "expected"),
    [
        (None, None, 100 * GB, Plan(8, 1)),
        (None, 2, 100 * GB, Plan(4, 2)),
        (None, None, 7 * GB, Plan(3, 2)),  # three copies of the weights in half of the memory
        (None, None, GB // 2, Plan(1, 8)),
        (None, 16, 100 * GB, Plan(1, 16)),
        (3, None, GB // 2, Plan(3, 2)),
        (20, None, 100 * GB, Plan(20, 1)),
        (2, 1, 100 * GB, Plan(2, 1)),
    ],
)
def test_workers_and_threads_fit_the_machine(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    workers: int | None,
    threads: int | None,
    free: int,
    expected: Plan,
) -> None:
    monkeypatch.setattr(batch, "_processors", lambda: 8)
    monkeypatch.setattr(batch, "gather_memory", lambda: Memory(200 * GB, free))
    assert plan_workers(workers, threads, package(GB, tmp_path)) == expected


def test_workers_share_what_the_weights_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_budget, "gather_memory", lambda: Memory(200 * GB, 12 * GB))
    assert shared_bytes(2, GB) == 5 * GB
    assert shared_bytes(20, GB) == 0
    opening = Opening("p", "0" * 64).share(2, shared_bytes(2, GB), 1)
    assert opening.cache_bytes == 5 * GB // 2 and opening.threads == 1
