"""The text that fidelity is measured on: ours, which no calibration uses, or the user's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np

from llama_onnx.exporter.model.config import LlamaConfig
from llama_onnx.exporter.parity.measure.prompts import TEXTS, encode
from llama_onnx.exporter.reference.walk import Ids

LENGTH = 256
"""Tokens read in one pass. A mean over short passages would be one over positions with little
context, where every model is unsure."""

MOST = 4 * LENGTH
"""Tokens in all: seconds for 135M parameters, minutes for 7B, and the standard error of a mean KL
is then about a twentieth of it."""

_LEAST = LENGTH  # tokens; a shorter text of the user's says too little
_BREAK = "\n----\n"


@dataclass(frozen=True)
class Evaluation:
    """Token ids [N] of each passage, N >= 2, and the `text` they are of: "built-in" or "own"."""

    text: str
    sequences: tuple[Ids, ...]


def built_in() -> tuple[str, ...]:
    """Return the passages of our own text: a story, an explanation, instructions, an interview."""
    text = files(__package__).joinpath("evaluation.txt").read_text("utf-8")
    return tuple(passage.strip() for passage in text.split(_BREAK))


def make_evaluation(
    package: Path, config: LlamaConfig, texts: Sequence[str] = TEXTS, most: int = MOST
) -> Evaluation | None:
    """Return the passages to measure the fidelity of `package` on, at most `most` tokens: the
    beginning of the user's `texts` if they are long enough, else our own text.

    None without a tokenizer.json, or if its ids are beyond the vocabulary.
    """
    length = min(LENGTH, most // 4, config.max_position_embeddings)
    if length < 2:
        return None
    if tuple(texts) != TEXTS:
        own = [
            piece for ids in encode(package, texts) for piece in pieces(ids, config, length, MOST)
        ]
        if sum(map(len, own)) >= _LEAST:
            return Evaluation("own", tuple(_first(own, most)))
    ours = [ids[:length] for ids in encode(package, built_in())]
    if not ours or any(ids.max() >= config.vocab_size for ids in ours):
        return None
    return Evaluation("built-in", tuple(_first(ours, most)))


def pieces(ids: Ids, config: LlamaConfig, length: int, most: int) -> Iterator[Ids]:
    """Cut the first `most` tokens of a text into pieces of at most `length` tokens. All begin with
    the token that begins a text, if there is one: models are lost without it."""
    start = ids[:1] if ids[0] == config.bos_token_id else ids[:0]
    room = max(1, length - len(start))
    for first in range(len(start), min(len(ids), most), room):
        yield np.concatenate([start, ids[first : first + room]])


def _first(sequences: Sequence[Ids], most: int) -> Iterator[Ids]:
    """Yield sequences up to `most` tokens in all, without those too short to predict anything."""
    left = most
    for ids in sequences:
        if len(ids[:left]) >= 2:
            yield ids[:left]
            left -= len(ids[:left])
