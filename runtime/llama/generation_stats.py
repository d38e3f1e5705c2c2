"""Token counts and times of an answer: while they are taken, and as they are read."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from llama_onnx.runtime.engine.events import TokenEvent

FinishReason = Literal["stop", "length", "interrupted"]


@dataclass(frozen=True)
class GenerationStats:
    """Token counts and times of an answer.

    `new_tokens` includes the end token, which costs a step like the others. `first_token_seconds`
    is the time to the first token, prefill included; `decode_seconds` that of all later steps. No
    figure includes time spent by the code that iterates over the text. `finish_reason` is "stop"
    after an end token or a stop text, "length" at the limit, "interrupted" before the end.
    `reused_tokens` of the prompt had been read for an earlier text. `drafted_tokens` were guessed
    ahead and verified in fewer steps, and `accepted_tokens` of them were right.
    """

    prompt_tokens: int
    new_tokens: int
    prefill_seconds: float
    first_token_seconds: float
    decode_seconds: float
    finish_reason: FinishReason
    reused_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0

    @property
    def prefill_rate(self) -> float | None:
        """Prompt tokens read per second; None if the prompt has not been read."""
        return _rate(self.prompt_tokens - self.reused_tokens, self.prefill_seconds)

    @property
    def decode_rate(self) -> float | None:
        """New tokens per second after the first; None if there are fewer than two."""
        return _rate(self.new_tokens - 1, self.decode_seconds)

    def to_json(self) -> dict[str, Any]:
        """Return all figures as JSON values, rates included."""
        return {**asdict(self), "prefill_rate": self.prefill_rate, "decode_rate": self.decode_rate}


def _rate(tokens: int, seconds: float) -> float | None:
    return tokens / seconds if tokens > 0 and seconds > 0 else None


class Tally:
    """What an answer has taken so far."""

    def __init__(self, prompt_tokens: int) -> None:
        self.prompt_tokens, self.reused_tokens = prompt_tokens, 0
        self.prefill_seconds = 0.0
        self.step_seconds: list[float] = []
        self.drafted_tokens = self.accepted_tokens = 0
        self.finish_reason: FinishReason = "interrupted"

    def count(self, step: TokenEvent) -> None:
        """Take note of a token, its time and what was drafted for it."""
        self.step_seconds.append(step.seconds)
        self.drafted_tokens += step.drafted
        self.accepted_tokens += step.accepted

    @property
    def stats(self) -> GenerationStats:
        """The statistics so far."""
        return GenerationStats(
            prompt_tokens=self.prompt_tokens,
            new_tokens=len(self.step_seconds),
            prefill_seconds=self.prefill_seconds,
            first_token_seconds=self.prefill_seconds + sum(self.step_seconds[:1]),
            decode_seconds=sum(self.step_seconds[1:]),
            finish_reason=self.finish_reason,
            reused_tokens=self.reused_tokens,
            drafted_tokens=self.drafted_tokens,
            accepted_tokens=self.accepted_tokens,
        )
