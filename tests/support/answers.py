"""Requests to the engine, answered greedily, and what came of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from llama_onnx.exporter.model.config import LlamaConfig
from llama_onnx.runtime.engine import loop
from llama_onnx.runtime.engine.answer import Answer
from llama_onnx.runtime.engine.drafting import Speculation
from llama_onnx.runtime.engine.engine import Engine, Limits
from llama_onnx.runtime.engine.events import Event, Request, TokenEvent
from llama_onnx.runtime.engine.speculation import speculator
from llama_onnx.targets.package import ModelPackage
from tests.support.pytorch import reference

CONTEXT = 256
"""The context of the tiny models."""


@dataclass(frozen=True)
class Token:
    token: int
    logprobs: None = None


@dataclass
class Greedy:
    """Takes the largest logit, and keeps all logits that it saw."""

    seen: list[npt.NDArray[np.float32]] = field(default_factory=list)

    def choose(self, logits: npt.NDArray[np.float32]) -> Token:
        self.seen.append(logits.copy())
        return Token(int(logits.argmax()))


def open_engine(
    package: Path, context: int = CONTEXT, *, speculate: bool = False, **limits: Any
) -> Engine:
    return Engine(
        ModelPackage.open(package),
        context,
        threads=1,
        limits=Limits(**limits),
        speculation=Speculation("ngram" if speculate else "off"),
    )


def ask(prompt: Sequence[int], new: int = 12, **options: Any) -> Request:
    chooser = options.pop("chooser", None) or Greedy()
    return Request(np.array(prompt, np.int64), new, chooser, **options)


def tokens_of(events: Answer | Iterable[Event]) -> list[int]:
    """Return the tokens of an answer, read to its end."""
    return [event.token for event in events if isinstance(event, TokenEvent)]


def random_prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    """Return prompts of random tokens, none of which ends a text."""
    rng = np.random.default_rng(seed)
    return [rng.integers(3, 288, length).tolist() for length in lengths]


def greedy_text(config: LlamaConfig, prompt: list[int], new: int) -> list[int]:
    """Return PyTorch's greedy answer to `prompt`."""
    tokens = list(prompt)
    for _ in range(new):
        tokens.append(int(reference(config, np.array([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


def let_every_step_take_as_long(patch: pytest.MonkeyPatch) -> None:
    """Give the engine a clock by which drafts always pay, so that nothing depends on the machine.

    Each look at it is a second later: a step takes a second, whatever it verifies. A draft model
    takes no time.
    """
    ticks = count()
    patch.setattr(loop, "perf_counter", lambda: float(next(ticks)))
    patch.setattr(speculator, "perf_counter", lambda: 0.0)
