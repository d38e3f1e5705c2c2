"""What a caller asks of the engine, and what comes back, as data."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

Reason = Literal["stop", "length", "cancelled"]


class Chosen(Protocol):
    """A token, and its log probabilities if they were asked for."""

    @property
    def token(self) -> int:
        """The token's id."""

    @property
    def logprobs(self) -> Any:
        """Its log probabilities, or None."""


class Chooser(Protocol):
    """Chooses the tokens of one answer, in their order; it keeps what it needs to know of them."""

    def choose(self, logits: npt.NDArray[np.float32]) -> Chosen:
        """Return the next token for `logits` [vocabulary], which it may change but not keep.

        Raises `PackageError` if they are not numbers; see `likeliest`.
        """


@dataclass(frozen=True)
class Request:
    """A text to continue.

    Attributes:
        prompt: Token ids, at least one.
        max_new_tokens: The most tokens to generate, at least one.
        chooser: Chooses each token. The engine calls it in a thread of its own.
        end_tokens: The tokens that end the answer.
        adapter: The LoRA adapter of the package to use.
        reuse: Whether to start with what the engine has read before, and to keep this text for
            others. Not for a measurement of speed.
        speculate: Whether tokens may be drafted where that pays. Not for a measurement either.
    """

    prompt: npt.NDArray[np.integer]
    max_new_tokens: int
    chooser: Chooser = field(repr=False)
    end_tokens: Collection[int] = ()
    adapter: str | None = None
    reuse: bool = True
    speculate: bool = True


@dataclass(frozen=True)
class PromptEvent:
    """The prompt has been read: `tokens` of it, the first `reused` of which were known already.

    `seconds` is the time since the request, and `read_seconds` what reading took.
    """

    tokens: int
    reused: int
    seconds: float
    read_seconds: float


@dataclass(frozen=True)
class TokenEvent:
    """The next token of the answer, `seconds` after the event before it.

    `accepted`: it had been drafted. The first token of a step says how many were `drafted` for it.
    """

    token: int
    logprobs: Any
    seconds: float
    drafted: int = 0
    accepted: bool = False


@dataclass(frozen=True)
class EndEvent:
    """The end of an answer, and what it took.

    `reason` is "stop" after an end token, which counts among `new_tokens`, "length" at the limit,
    "cancelled" before the end. `waited_seconds` is the time until the engine had room for it,
    `seconds` the whole time. `accepted_tokens` of the `drafted_tokens` came true.
    """

    reason: Reason
    prompt_tokens: int
    reused_tokens: int
    new_tokens: int
    waited_seconds: float
    seconds: float
    drafted_tokens: int = 0
    accepted_tokens: int = 0


Event: TypeAlias = PromptEvent | TokenEvent | EndEvent
