"""What may be tried on a machine, and what may not, and why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import reduce
from pathlib import Path

from llama_onnx.runtime.engine.engine_settings import DEFAULT, EngineSettings
from llama_onnx.runtime.engine.schedule import CHUNK
from llama_onnx.runtime.tuning.contest import Candidate
from llama_onnx.runtime.tuning.machine import Machine
from llama_onnx.runtime.tuning.tuning_sample import Workload

NOT_TRIED: Mapping[str, str] = {
    "accuracy level": "each node of the graph has its own; another one changes the logits",
    "type of keys and values": "the graph has one; a package of another is another export",
    "packing with all threads": "always on: it changes nothing but the time to load",
}

_CHUNKS = (128, 256)


def candidates(
    machine: Machine, workload: Workload, packed: Path | None = None, *, untiled: bool = False
) -> tuple[Candidate, ...]:
    """Return what to try: each differs from the defaults in one thing. `untiled`: attention without
    tiles is proved."""
    return tuple(_candidates(machine, workload, packed, untiled))


def _candidates(
    machine: Machine, workload: Workload, packed: Path | None, untiled: bool
) -> Iterator[Candidate]:
    for threads in thread_counts(machine):
        name = f"{threads} thread{'s' * (threads != 1)}"
        yield Candidate(name, replace(DEFAULT, threads=threads))
    yield Candidate("threads sleep between steps", replace(DEFAULT, spin=False))
    yield Candidate("no arena", replace(DEFAULT, arena=False))
    for chunk in _CHUNKS:
        if chunk < min(CHUNK, workload.prompt_tokens):
            yield Candidate(f"parts of {chunk} tokens", replace(DEFAULT, chunk=chunk))
    if untiled:
        settings = replace(DEFAULT, tiled_attention=False)
        yield Candidate("attention without tiles", settings, "prompts", exact=False)
    if workload.drafts:
        yield Candidate("no drafts", replace(DEFAULT, drafts=False), "repeating")
    if packed is not None:
        yield Candidate("packed weights", replace(DEFAULT, packed=packed), "memory")


def thread_counts(machine: Machine) -> list[int]:
    """Return numbers of threads to try, besides the default: one for each physical core.

    >>> thread_counts(Machine("x", (), cores=8, allowed=16, onnxruntime="1"))
    [1, 2, 4, 7, 16]
    >>> thread_counts(Machine("x", (), cores=8, allowed=2, onnxruntime="1"))
    [1, 2]
    """
    allowed = max(1, int(machine.allowed))
    cores = machine.cores or allowed
    counts = {1, 2, cores // 4, cores // 2, cores - 1, allowed} - {machine.cores}
    return sorted(count for count in counts if 1 <= count <= allowed)


def combine(found: list[EngineSettings]) -> EngineSettings:
    """Return settings with all changes of `found`; of two for the same thing, the first's."""
    return reduce(_add, found, DEFAULT)


def _add(settings: EngineSettings, change: EngineSettings) -> EngineSettings:
    new = {
        name: value
        for name, value in vars(change).items()
        if value != getattr(DEFAULT, name) and getattr(settings, name) == getattr(DEFAULT, name)
    }
    return replace(settings, **new)
