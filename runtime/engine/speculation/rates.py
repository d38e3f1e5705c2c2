"""How often guesses came true lately."""

from __future__ import annotations

_KEPT = 0.95
"""What an observation counts after the next one: about the last twenty decide."""


class HitRate:
    """The share of guesses that came true, of late ones above all; `prior` before there are any.

    >>> rate = HitRate(0.5)
    >>> for _ in range(50):
    ...     rate.note(True)
    >>> rate.value > 0.98
    True
    """

    def __init__(self, prior: float, weight: float = 2.0) -> None:
        """Start with `prior`, which counts as many observations as `weight` says."""
        self._prior = self._hits, self._total = prior * weight, weight

    @property
    def value(self) -> float:
        """The share, from 0 to 1."""
        return self._hits / self._total

    def note(self, hit: bool) -> None:
        """Take a guess into account that came true or did not."""
        self._hits = self._hits * _KEPT + hit
        self._total = self._total * _KEPT + 1

    def relax(self, share: float) -> None:
        """Forget a share of all observations: go back towards the prior."""
        hits, total = self._prior
        self._hits += share * (hits - self._hits)
        self._total += share * (total - self._total)
