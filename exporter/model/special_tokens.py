"""Which tokens start, end and pad a text, as ids that the embedding has a row for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class SpecialTokens:
    """The ids that are kept, and `warnings` about those that are left out."""

    bos: int | None
    eos: tuple[int, ...]
    pad: int | None
    warnings: tuple[str, ...] = ()


def special_tokens(
    bos: Sequence[int], eos: Sequence[int], pad: Sequence[int], vocab_size: int, where: str
) -> SpecialTokens:
    """Return those ids of `bos`, `eos` and `pad` that are in the vocabulary.

    No text has an id beyond it and no model predicts one, so it can be left out: converters write
    4294967295 for "none", and trainers name a padding token that they add to the tokenizer only.
    `where` names the file in warnings.

    >>> special_tokens([1], [2, 7], [8], 8, "config.json").warnings
    ('config.json: the padding token 8 is beyond the vocabulary of 8 tokens, so it is left out.',)
    """
    warnings = []
    kept: dict[str, tuple[int, ...]] = {}
    for kind, ids in (("start", bos), ("end", eos), ("padding", pad)):
        kept[kind] = tuple(token for token in ids if token < vocab_size)
        for token in ids:
            if token >= vocab_size:
                warnings.append(
                    f"{where}: the {kind} token {token} is beyond the vocabulary of {vocab_size} "
                    "tokens, so it is left out."
                )
    if eos and not kept["end"]:
        warnings.append(
            f"{where}: no end token is left, so an answer ends only at its maximum length."
        )
    first = {kind: ids[0] if ids else None for kind, ids in kept.items()}
    return SpecialTokens(first["start"], kept["end"], first["padding"], tuple(warnings))
