"""An answer of our own engine, driven like one of onnxruntime-genai."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llama_onnx.runtime.engine.events import EndEvent, PromptEvent, Request, TokenEvent
from llama_onnx.runtime.llama.generation import Steps

if TYPE_CHECKING:
    from llama_onnx.runtime.engine.answer import Answer
    from llama_onnx.runtime.engine.engine import Engine


class EngineRun(Steps):
    """An answer that starts when it is first read; the engine's thread then generates ahead."""

    def __init__(self, engine: Engine, request: Request) -> None:
        super().__init__(len(request.prompt))
        self._engine: Engine | None = engine
        self._request = request
        self._answer: Answer | None = None

    def prefill(self) -> None:
        """Wait until the prompt has been read."""
        if self._engine is None or self.cancelled:
            return
        answer = self._answer = self._engine.submit(self._request)
        if self._is_cancelled():  # between these lines, by another thread
            answer.cancel()
        event = next(answer)
        if isinstance(event, PromptEvent):
            self.reused_tokens, self.prefill_seconds = event.reused, event.seconds
        else:
            self.cancelled = True

    def _is_cancelled(self) -> bool:
        return self.cancelled

    def is_done(self) -> bool:
        """Return whether the answer is as long as it can become."""
        return len(self.step_seconds) == self._request.max_new_tokens

    def step(self) -> TokenEvent | None:
        """Wait for the next token and return it; None if the answer was cancelled instead."""
        assert self._answer is not None
        event = next(self._answer)
        if isinstance(event, TokenEvent):
            self.count(event)
            return event
        assert isinstance(event, EndEvent)
        return None

    def cancel(self) -> None:
        """End the answer before its next step, from any thread."""
        self.cancelled = True
        answer = self._answer
        if answer is not None:
            answer.cancel()

    def free(self) -> None:
        """End the answer and let go of the engine."""
        if self._answer is not None:
            self._answer.cancel()
        self._answer = self._engine = None
