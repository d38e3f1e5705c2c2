"""How our own engine chooses the tokens of an answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from llama_onnx.runtime.engine.events import Chooser
from llama_onnx.runtime.llama.sampling import Sampling
from llama_onnx.targets.errors import UsageError

_OFF: Mapping[str, float] = {"repetition_penalty": 1, "no_repeat_ngram_size": 0}
"""Search settings of a package that change greedy answers too, and their values without effect."""


@dataclass(frozen=True)
class GreedyToken:
    """The likeliest token."""

    token: int
    logprobs: None = None


class Greedy:
    """Takes the largest logit, the first of equal ones."""

    def choose(self, logits: npt.NDArray[np.float32]) -> GreedyToken:
        """Return the likeliest token."""
        return GreedyToken(int(logits.argmax()))


def make_chooser(sampling: Sampling, search: Mapping[str, Any]) -> Chooser:
    """Return what chooses tokens by `sampling`, and where it has None by the package's `search`.

    Raises `UsageError` for what this engine cannot do.
    """
    given = sampling.to_json().keys() - {"seed"}
    sampled = bool(given) if given else bool(search.get("do_sample"))
    changed = [name for name, off in _OFF.items() if search.get(name, off) != off]
    if sampled and sampling.temperature != 0:
        raise UsageError(
            "the engine onnxruntime takes the likeliest token only: pass temperature 0 "
            "(--temperature 0), or choose the engine genai (--engine genai)."
        )
    if changed:
        raise UsageError(
            f"the engine onnxruntime has no {' and no '.join(changed)}, which the package sets: "
            "choose the engine genai (--engine genai)."
        )
    return Greedy()
