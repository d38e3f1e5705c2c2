"""A short test of a device: a prompt, and the tokens that the model must generate after it.

A package's certificate can provide one: it records how much larger the reference model's logit of
each next token is than that of the second likeliest. Devices round differently, so a self-test
needs a run of tokens that lead by a wide margin.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llama_onnx.targets.errors import UsageError, describe_reason

if TYPE_CHECKING:
    from llama_onnx.runtime.measure.certificate import Certificate

MAX_TOKENS = 512
"""Largest number of tokens in the prompt, and in the answer; llama_onnx.c has the same limit."""

LENGTH = 8
"""Number of tokens in an answer taken from a certificate."""

LEAST_LEAD = 1.0
"""Smallest lead, in logits, of the likeliest token: it is e times as probable as the second."""


@dataclass(frozen=True)
class SelfTest:
    """Token ids of a prompt and of its greedy continuation, which a device must reproduce.

    Choose a prompt after which every next token leads the second likeliest by a wide margin.
    """

    prompt: tuple[int, ...]
    expected: tuple[int, ...]

    def __str__(self) -> str:
        """Return the content of selftest.txt."""
        lines = {"prompt": self.prompt, "expected": self.expected}
        return "".join(f"{key} {' '.join(map(str, ids))}\n" for key, ids in lines.items())

    @classmethod
    def read(cls, file: Path) -> SelfTest:
        """Read a file that `str()` wrote. Raises `UsageError`."""
        try:
            lines = [line.split() for line in file.read_text("ascii").splitlines()]
            found = {line[0]: tuple(int(number) for number in line[1:]) for line in lines if line}
            test = cls(found["prompt"], found["expected"])
        except OSError as error:
            raise UsageError(f"{file} cannot be read: {describe_reason(error)}.") from None
        except (ValueError, KeyError):
            raise UsageError(
                f"{file} is not a self-test: it needs two lines, `prompt` and `expected`, each "
                "followed by token ids."
            ) from None
        if not all(0 < len(ids) <= MAX_TOKENS for ids in (test.prompt, test.expected)):
            raise UsageError(
                f"{file} is not a self-test: each line must have 1 to {MAX_TOKENS} tokens."
            )
        return test

    @classmethod
    def from_certificate(cls, certificate: Certificate) -> SelfTest | None:
        """Return the run of tokens in `certificate` whose smallest lead is the largest.

        None if in every run some token leads by less than `LEAST_LEAD`.
        """
        best = (0.0, cls((), ()))
        for passage, kept in zip(certificate.passages, certificate.package, strict=True):
            if kept.logits.shape[1] > 1:  # otherwise the second likeliest is unknown
                leads = kept.logits[:, 0] - kept.logits[:, 1]
                found = _best(passage.ids.tolist(), kept.ids[:, 0].tolist(), leads.tolist())
                best = max(best, found, key=lambda run: run[0])
        return best[1] if best[0] >= LEAST_LEAD else None


def _best(
    ids: Sequence[int], likeliest: Sequence[int], leads: Sequence[float]
) -> tuple[float, SelfTest]:
    """Return the smallest lead in the best run of a passage, and that run.

    A run is `LENGTH` tokens of the passage that are all the likeliest; the lead is 0 if there is
    none. `likeliest` and `leads` describe the token after each of `ids`.
    """
    followed = [
        lead if token == following else 0.0
        for token, following, lead in zip(likeliest, ids[1:], leads, strict=False)
    ]
    best = (0.0, SelfTest((), ()))
    for start in range(min(len(followed) - LENGTH + 1, MAX_TOKENS)):
        least = min(followed[start : start + LENGTH])
        if least > best[0]:
            test = SelfTest(tuple(ids[: start + 1]), tuple(ids[start + 1 : start + 1 + LENGTH]))
            best = (least, test)
    return best
