"""Decides, step by step, whether to draft tokens, how many, and from what."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt

from llama_onnx.runtime.engine.speculation.draft_model import DraftModel
from llama_onnx.runtime.engine.speculation.ngrams import Ngrams
from llama_onnx.runtime.engine.speculation.rates import HitRate
from llama_onnx.runtime.engine.speculation.step_costs import (
    MOST_DRAFTED,
    Account,
    Plan,
    StepCosts,
    plan,
)

Tokens = npt.NDArray[np.int64]

_REFRESH = 48
"""Steps with drafts after which a plain one is made: what the others cost is measured by it."""

_BY_DRAFT = 8
"""Most tokens from a draft model at once."""

_RELAX = 0.01
"""What a plain step forgets of a draft model's rate, so that it is tried again some time."""

_SHORT = 4
"""Tokens that a draft model reads in passing: more are counted as reading, not as drafting."""

_RATIO = 0.25
"""Share of a step that a draft model's token is taken to cost until the first is measured."""

log = logging.getLogger("llama_onnx.engine")


@dataclass(frozen=True)
class Text:
    """A sequence that makes a step alone: its number, those it shares costs with, its tokens, how
    many it may get at most, and how many positions it may have."""

    key: int
    group: str | None
    tokens: Tokens
    room: int
    most: int


@dataclass
class _Drafting:
    """What a draft model's tokens take, and how often they come true."""

    rate: HitRate = field(default_factory=lambda: HitRate(0.6, 4.0))
    token_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=9))
    read_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=9))

    def token(self, plain: float) -> float:
        """Seconds of a drafted token."""
        return median(self.token_seconds) if self.token_seconds else _RATIO * plain

    def reading(self, plain: float) -> float:
        """Seconds of a token that is read among many."""
        return median(self.read_seconds) if self.read_seconds else self.token(plain) / 4


class Speculator:
    """Drafts for the sequences of an engine, as long as they pay.

    What a step of several positions costs is measured, for each adapter; how often drafts come
    true is learned, for each text; and an `Account` bounds what those that fail may cost.
    """

    def __init__(self, ngrams: bool, draft: DraftModel | None = None) -> None:
        self._use_ngrams, self._draft = ngrams, draft
        self._texts: dict[int, Ngrams] = {}
        self._costs: dict[str | None, StepCosts] = {}
        self._account, self._drafting = Account(), _Drafting()
        self._spent, self._by_draft = 0.0, False

    def propose(self, text: Text, options: Any = None) -> list[int]:
        """Return the tokens that may come next, to be verified in one step; none: a plain step."""
        self._spent, self._by_draft = 0.0, False
        if not self._use_ngrams and self._draft is None:
            return []
        ngrams = None
        if self._use_ngrams:
            ngrams = self._texts.get(text.key)
            if ngrams is None:
                ngrams = self._texts[text.key] = Ngrams()
            ngrams.follow(text.tokens)
        costs = self._costs_of(text.group)
        if text.room < 1 or costs.plain is None or costs.since_plain >= _REFRESH:
            return []
        table, balance = costs.table(), self._account.balance
        most = min(MOST_DRAFTED, text.room)
        found = plan(ngrams.chances(most) if ngrams else (), table, balance)
        if self._draft is not None:
            try:
                drafts = self._propose_by_draft(self._draft, text, costs, found, options)
            except Exception as error:
                if options is None or not options.terminate:  # or else the engine is closing
                    log.warning("drafts end: the draft package failed: %s", error)
                self._draft = None
            else:
                if drafts:
                    return drafts
        return ngrams.draft(text.tokens, found.count) if ngrams and found.count else []

    def _propose_by_draft(
        self, draft: DraftModel, text: Text, costs: StepCosts, other: Plan, options: Any
    ) -> list[int]:
        """Return the draft model's tokens if they promise more than the `other` plan."""
        plain, drafting = costs.plain, self._drafting
        assert plain is not None
        most = min(_BY_DRAFT, text.room, draft.room(text.tokens))
        chances = [drafting.rate.value] * most
        token = drafting.token(plain) / plain
        found = plan(chances, costs.table(), self._account.balance, token)
        if not found.count or found.promise <= other.promise:
            return []
        unread, first = draft.unread(text.key, text.tokens), not draft.reads(text.key)
        reading = drafting.reading(plain) / plain * unread
        if not first and unread > _SHORT and reading > self._account.balance:
            return []
        started = perf_counter()
        logits = draft.read(text.key, text.tokens, text.most, options)
        seconds = perf_counter() - started
        if unread > 4 * _SHORT:
            drafting.read_seconds.append(seconds / (unread - draft.unread(text.key, text.tokens)))
        if unread > _SHORT and not first:
            self._account.settle(0, min(seconds / plain, unread))
        if logits is None:
            return []
        drafts = draft.draft(text.key, logits, found.count, options)
        if unread <= _SHORT:
            seconds = perf_counter() - started
            drafting.token_seconds.append(seconds / len(drafts))
        else:
            seconds = perf_counter() - started - seconds
        self._spent, self._by_draft = seconds, True
        return drafts

    def stepped(self, text: Text, seconds: float) -> None:
        """Take note of a step without drafts."""
        self._costs_of(text.group).note(1, seconds)
        self._account.earn()
        self._drafting.rate.relax(_RELAX)

    def verified(self, text: Text, drafts: Sequence[int], got: int, seconds: float) -> None:
        """Take note of a step that verified `drafts` and gave `got` tokens."""
        costs = self._costs[text.group]
        plain = costs.plain
        assert plain is not None
        costs.note(1 + len(drafts), seconds)
        self._account.settle(
            got, costs.charge(1 + len(drafts), seconds) + min(self._spent / plain, len(drafts))
        )
        if self._by_draft:
            for place in range(min(got, len(drafts))):
                self._drafting.rate.note(place < got - 1)
        if self._draft is not None:
            self._draft.rewind(text.key, len(text.tokens) + got - 1)

    def _costs_of(self, group: str | None) -> StepCosts:
        if group not in self._costs:
            self._costs[group] = StepCosts()
        return self._costs[group]

    def forget(self, key: int) -> None:
        """Free what is kept for a text that is over."""
        self._texts.pop(key, None)
        if self._draft is not None:
            self._draft.forget(key)
