"""An answer as the engine's thread sees it."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter

import numpy as np
import numpy.typing as npt

from llama_onnx.runtime.engine.answer import Channel
from llama_onnx.runtime.engine.events import (
    EndEvent,
    PromptEvent,
    Reason,
    Request,
    TokenEvent,
)
from llama_onnx.runtime.engine.failures import describe_failure
from llama_onnx.runtime.engine.prefixes import Tokens
from llama_onnx.runtime.engine.schedule import Need
from llama_onnx.runtime.memory import is_memory_failure
from llama_onnx.targets.errors import LlamaOnnxError, describe_reason


class Task:
    """A request in work: its tokens, its times, and the way to its caller."""

    def __init__(self, key: int, request: Request, channel: Channel) -> None:
        self.key, self.request, self.channel = key, request, channel
        self.prompt_tokens = len(request.prompt)
        self.need = Need(request.adapter, self.prompt_tokens + request.max_new_tokens)
        self._tokens = np.empty(self.need.positions, np.int64)
        self._tokens[: self.prompt_tokens] = request.prompt
        self.new_tokens = self.reused = self.served = 0
        self.drafted = self.accepted = 0
        self.read_seconds = 0.0
        self._asked = self._last = perf_counter()
        self._admitted: float | None = None

    @property
    def tokens(self) -> Tokens:
        """Prompt and answer so far."""
        return self._tokens[: self.prompt_tokens + self.new_tokens]

    @property
    def prompt(self) -> Tokens:
        """The prompt's tokens."""
        return self._tokens[: self.prompt_tokens]

    def admit(self) -> None:
        """Take note that the engine has room for it now."""
        self._admitted = perf_counter()

    def accept(
        self, logits: npt.NDArray[np.float32], draft: int | None = None, drafted: int = 0
    ) -> Reason | None:
        """Choose a token by `logits` and tell the caller; return the reason if it is the last.

        `draft` is the token that was expected, `drafted` how many were for a step that begins.
        """
        chosen = self.request.chooser.choose(logits)
        if not self.new_tokens:
            read = PromptEvent(
                self.prompt_tokens, self.reused, self._since(self._asked), self.read_seconds
            )
            self.channel.put(read)
            self._last = perf_counter()
        token = int(chosen.token)
        self._tokens[self.prompt_tokens + self.new_tokens] = token
        self.new_tokens += 1
        before, self._last = self._last, perf_counter()
        hit = token == draft
        self.drafted += drafted
        self.accepted += hit
        self.channel.put(TokenEvent(token, chosen.logprobs, self._last - before, drafted, hit))
        if token in self.request.end_tokens:
            return "stop"
        return "length" if self.new_tokens == self.request.max_new_tokens else None

    def verify(self, drafts: Sequence[int], logits: npt.NDArray[np.float32]) -> Reason | None:
        """Choose tokens as long as they are those of `drafts`, and one more, by the logits [S, V].

        Each is chosen after the one before it was accepted, so that the chooser sees what it would
        see without drafts. Return the reason if one is the last.
        """
        for place, (row, draft) in enumerate(zip(logits, [*drafts, None], strict=True)):
            reason = self.accept(row, draft, 0 if place else len(drafts))
            if reason is not None or self.tokens[-1] != draft or self.channel.cancelled:
                return reason
        return None

    def end(self, reason: Reason) -> None:
        """Tell the caller that the answer is over."""
        admitted = perf_counter() if self._admitted is None else self._admitted
        self.channel.put(
            EndEvent(
                reason,
                self.prompt_tokens,
                self.reused,
                self.new_tokens,
                waited_seconds=admitted - self._asked,
                seconds=self._since(self._asked),
                drafted_tokens=self.drafted,
                accepted_tokens=self.accepted,
            )
        )

    def fail(self, error: BaseException) -> None:
        """Tell the caller that the answer ends with an error, without what its traceback keeps."""
        self.channel.put(describe(error, self.prompt_tokens, self.need.positions))

    def _since(self, start: float) -> float:
        return perf_counter() - start


def describe(error: BaseException, prompt_tokens: int, length: int) -> LlamaOnnxError:
    """Return the error for what failed in an answer of at most `length` tokens in all."""
    if not isinstance(error, Exception):
        return LlamaOnnxError(f"the answer failed: {type(error).__name__}.")
    if not isinstance(error, LlamaOnnxError) and not is_memory_failure(error):
        return LlamaOnnxError(f"the answer failed: {describe_reason(error)}.")
    described = describe_failure(error, prompt_tokens, length)
    # Another one: it must not keep the frames of the error, and the caches with them.
    return type(described)(str(described))
