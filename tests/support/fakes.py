"""Fakes of onnxruntime-genai's generator and token stream, for behavior no model has on demand."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from llama_onnx.runtime.llama.generation import Generation
from llama_onnx.runtime.llama.prompt import Tokens


class FakeGenerator:
    """Generates `tokens`, one per step; calls `before_step` with the step's number first."""

    def __init__(
        self, tokens: Sequence[int], before_step: Callable[[int], None] = lambda step: None
    ) -> None:
        self._tokens, self._before_step = tokens, before_step
        self._steps = 0

    def append_tokens(self, tokens: Tokens) -> None:
        pass

    def is_done(self) -> bool:
        return self._steps == len(self._tokens)

    def get_logits(self) -> npt.NDArray[np.float32]:
        return np.zeros((1, 1, 3), np.float32)

    def generate_next_token(self) -> None:
        self._before_step(self._steps)
        self._steps += 1

    def get_next_tokens(self) -> Sequence[int]:
        return [self._tokens[self._steps - 1]]


class FakeStream:
    """Each token is the character of that number."""

    def decode(self, token: int) -> str:
        return chr(token)

    def finish(self) -> str:
        return ""


def generation(
    text: str,
    *,
    stop: Sequence[str] = (),
    before_step: Callable[[int], None] = lambda step: None,
) -> Generation:
    """Return an answer with one token per character; "." is the end token."""
    generator = FakeGenerator([ord(character) for character in text], before_step)
    prompt = np.array([1, 2, 3], dtype=np.int32)
    length = len(prompt) + len(text)
    return Generation(generator, FakeStream(), prompt, {ord(".")}, stop, length=length)


def interrupt_at(step: int) -> Callable[[int], None]:
    """Simulate Ctrl-C while the model computes that step."""

    def before_step(current: int) -> None:
        if current == step:
            raise KeyboardInterrupt

    return before_step
