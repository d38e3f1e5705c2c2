"""An answer while it is generated: text, piece by piece, and the time it took."""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterator, Sequence
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from llama_onnx.runtime.llama.stops import StopFilter

Tokens = npt.NDArray[np.int32]
FinishReason = Literal["stop", "length", "interrupted"]


@dataclass(frozen=True)
class GenerationStats:
    """Token counts and times of an answer.

    `new_tokens` includes the end token, which costs a step like the others. `first_token_seconds`
    is the time to the first token, prefill included; `decode_seconds` that of all later steps. No
    figure includes time spent by the code that iterates over the text. `finish_reason` is "stop"
    after an end token or a stop text, "length" at the limit, "interrupted" before the end.
    """

    prompt_tokens: int
    new_tokens: int
    prefill_seconds: float
    first_token_seconds: float
    decode_seconds: float
    finish_reason: FinishReason

    @property
    def prefill_rate(self) -> float | None:
        """Prompt tokens per second; None if the prompt has not been read."""
        return _rate(self.prompt_tokens, self.prefill_seconds)

    @property
    def decode_rate(self) -> float | None:
        """New tokens per second after the first; None if there are fewer than two."""
        return _rate(self.new_tokens - 1, self.decode_seconds)

    def to_json(self) -> dict[str, Any]:
        """Return all figures as JSON values, rates included."""
        return {**asdict(self), "prefill_rate": self.prefill_rate, "decode_rate": self.decode_rate}


def _rate(tokens: int, seconds: float) -> float | None:
    return tokens / seconds if tokens > 0 and seconds > 0 else None


class Generation(Iterator[str]):
    """An iterator over the pieces of an answer's text.

    `stats` can be read at any time and is final at the end. `close()` ends the answer early and
    frees its cache.
    """

    def __init__(
        self,
        generator: Any,
        stream: Any,
        prompt: Tokens,
        end_tokens: Collection[int],
        stop: Sequence[str] = (),
    ) -> None:
        self._prompt_tokens = len(prompt)
        self._prefill_seconds = 0.0
        self._step_seconds: list[float] = []
        self._finish_reason: FinishReason = "interrupted"
        # Only this frame refers to the native generator and its KV cache: both are freed when the
        # answer ends, even if the statistics are kept.
        self._pieces = self._run(generator, stream, prompt, end_tokens, StopFilter(stop))

    def __next__(self) -> str:
        """Return the next piece of text; raise `StopIteration` at the end of the answer."""
        return next(self._pieces)

    def close(self) -> None:
        """End the answer and free its cache."""
        self._pieces.close()

    @property
    def stats(self) -> GenerationStats:
        """The statistics so far."""
        return GenerationStats(
            prompt_tokens=self._prompt_tokens,
            new_tokens=len(self._step_seconds),
            prefill_seconds=self._prefill_seconds,
            first_token_seconds=self._prefill_seconds + sum(self._step_seconds[:1]),
            decode_seconds=sum(self._step_seconds[1:]),
            finish_reason=self._finish_reason,
        )

    def _run(
        self,
        generator: Any,
        stream: Any,
        prompt: Tokens,
        end_tokens: Collection[int],
        stop: StopFilter,
    ) -> Generator[str, None, None]:
        self._prefill(generator, prompt)
        while not generator.is_done():
            token = self._step(generator)
            if token in end_tokens:
                self._finish_reason = "stop"
                break
            piece = stop.feed(stream.decode(token))
            if stop.stopped:
                self._finish_reason = "stop"
            if piece:
                yield piece
            if stop.stopped:
                return
        else:
            self._finish_reason = "length"
        if rest := stop.flush():
            yield rest

    def _prefill(self, generator: Any, prompt: Tokens) -> None:
        started = perf_counter()
        generator.append_tokens(prompt)
        self._prefill_seconds = perf_counter() - started

    def _step(self, generator: Any) -> int:
        started = perf_counter()
        generator.generate_next_token()
        token = int(generator.get_next_tokens()[0])
        self._step_seconds.append(perf_counter() - started)
        return token
