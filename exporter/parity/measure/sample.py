"""How much is read to measure a package: all of it where that takes minutes, less of a large model.

Every situation is tried either way, and every length around the edges of blocks. The sample decides
how many passages are long, how many tokens follow each, and how much text fidelity is measured on.
"""

from __future__ import annotations

from dataclasses import dataclass

LARGE = 3_000_000_000
"""Parameters from which `REDUCED` is read: below, `FULL` takes a few minutes at most."""


@dataclass(frozen=True)
class Sample:
    """`prompt_tokens` are the most of the first prompt, `other_prompt_tokens` those of the others;
    `tokens` follow each greedily. `evaluation_tokens` are the most to measure fidelity on.

    `reduced` is whether less is read than of a small model.
    """

    prompt_tokens: int
    other_prompt_tokens: int
    tokens: int
    evaluation_tokens: int
    reduced: bool = False


FULL = Sample(128, 128, 64, 1024)
REDUCED = Sample(128, 32, 16, 768, reduced=True)
"""One passage is long enough for every length and chunk, the others for a batch and its steps."""


def choose_sample(
    parameters: int,
    tokens: int | None = None,
    prompt_tokens: int | None = None,
    *,
    thorough: bool = False,
) -> Sample:
    """Return what to read of a model with as many `parameters`: of a large one less, unless the
    user names a number of tokens, or wants a `thorough` measurement."""
    if tokens is None and prompt_tokens is None and parameters >= LARGE and not thorough:
        return REDUCED
    longest = FULL.prompt_tokens if prompt_tokens is None else prompt_tokens
    following = FULL.tokens if tokens is None else tokens
    return Sample(longest, longest, following, FULL.evaluation_tokens)
