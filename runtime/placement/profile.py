"""Compare what ONNX Runtime executed, by its profile of one step, with what it had assigned."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llama_onnx.runtime.ort import Session, numpy_dtype
from llama_onnx.runtime.placement.session import OpenSession, open_session
from llama_onnx.runtime.placement.shares import Placement
from llama_onnx.targets.errors import ProviderError
from llama_onnx.targets.graph_names import ATTENTION_MASK, INPUT_IDS, is_past
from llama_onnx.targets.provider import Provider

TOKENS = 4
"""Tokens in the prefill that is profiled."""


@dataclass(frozen=True)
class Kernels:
    """What ran on one provider: kernels after fusion, and their time in microseconds.

    `count` includes `copies`, the copies between devices.
    """

    provider: str
    count: int
    copies: int
    microseconds: int


@dataclass(frozen=True)
class Profile:
    """What ran in one step.

    `moved` are the nodes that ran on another provider than they were assigned to, each with the
    provider that ran it.
    """

    kernels: tuple[Kernels, ...]
    moved: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return {
            "tokens": TOKENS,
            "kernels": [vars(kernels) for kernels in self.kernels],
            "moved": dict(self.moved),
        }


def profile_step(
    model: Path, provider: Provider, *, threads: int | None = None, allow_fallback: bool = False
) -> tuple[OpenSession, Profile]:
    """Open the graph at `model` as `open_session` does, and run a prefill of four tokens.

    Raises what `open_session` raises, and `ProviderError` if the step fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        opened = open_session(
            model,
            provider,
            threads=threads,
            allow_fallback=allow_fallback,
            profile=Path(folder, "step"),
        )
        try:
            opened.session.run(None, step_feeds(opened.session, TOKENS))
        except Exception as error:  # onnxruntime's exceptions have no common base class
            reason = " ".join(str(error).split())
            raise ProviderError(
                f"provider {provider.name} opens {model} but cannot run it: {reason}"
            ) from None
        file = Path(opened.session.end_profiling())
        events = json.loads(file.read_text(encoding="utf-8"))
    return opened, read_profile(events, opened.placement)


def step_feeds(session: Session, tokens: int) -> dict[str, npt.NDArray[Any]]:
    """Return the inputs of a prefill of `tokens` tokens: batch 1, empty cache."""
    feeds: dict[str, npt.NDArray[Any]] = {
        INPUT_IDS: np.arange(tokens, dtype=np.int64)[None],
        ATTENTION_MASK: np.ones((1, tokens), np.int64),
    }
    for value in session.get_inputs():
        if is_past(value.name):
            _, heads, _, width = value.shape
            feeds[value.name] = np.zeros((1, heads, 0, width), numpy_dtype(value.type))
    return feeds


def read_profile(events: Iterable[Mapping[str, Any]], placement: Placement) -> Profile:
    """Return the `Profile` of one run, from the events in ONNX Runtime's profile of it."""
    assigned = {node.name: node.provider for node in placement.nodes}
    ran: dict[str, list[tuple[str, int]]] = {}
    moved = {}
    for event in events:
        name = str(event.get("name", ""))
        if event.get("cat") != "Node" or not name.endswith("_kernel_time"):
            continue
        provider = str(event["args"]["provider"])
        ran.setdefault(provider, []).append((str(event["args"]["op_name"]), int(event["dur"])))
        node = name.removesuffix("_kernel_time")
        if assigned.get(node, provider) != provider:
            moved[node] = provider
    kernels = tuple(
        Kernels(
            provider,
            len(runs),
            sum(op.startswith("Memcpy") for op, _ in runs),
            sum(time for _, time in runs),
        )
        for provider, runs in ran.items()
    )
    return Profile(kernels, moved)
