"""The texts that parity is measured on: a few short ones of different kinds, or the user's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from llama_onnx.exporter.model.config import LlamaConfig
from llama_onnx.exporter.reference.walk import Ids
from llama_onnx.runtime.tokenizer.encoder import open_encoder
from llama_onnx.targets.errors import PackageError, UsageError

TEXTS = (
    "The harbour lay quiet in the early light. Boats that had gone out before midnight were coming "
    "home one after another, low in the water, followed by gulls. On the quay an old man was "
    "mending a net and did not look up; he knew every engine by its sound, and none was missing.",
    "def merge(left: list[int], right: list[int]) -> list[int]:\n"
    '    """Merge two sorted lists into one."""\n'
    "    result = []\n"
    "    while left and right:\n"
    "        result.append(left.pop(0) if left[0] <= right[0] else right.pop(0))\n"
    "    return result + left + right\n",
    "User: How far is it from the Earth to the Moon, and how do we know?\n"
    "Assistant: About 384,400 km on average. Astronauts left mirrors there, and the time a laser "
    "pulse takes to come back, some 2.56 seconds, gives the distance to a few millimetres.\n"
    "User: And in miles?\n"
    "Assistant:",
    "Zutaten: 500 g Mehl, 300 ml Wasser, 10 g Salz, ½ Würfel Hefe. 2024-03-17T08:30:00Z; "
    "f(x) = ∫₀ˣ e^(−t²) dt ≈ 0.7468 bei x = 1. «Привет, мир!» 你好,世界 — naïve café 🙂",
)
"""English prose, code, a conversation, and text with rare tokens."""

_RANDOM = (24, 40)  # lengths of the sequences used without a tokenizer


def make_prompts(
    package: Path,
    config: LlamaConfig,
    texts: Sequence[str] = TEXTS,
    *,
    tokens: int,
    longest: int,
) -> list[Ids]:
    """Return the token ids [P] of each text, cut to at most `longest` and to a length after which
    `tokens` more fit the context.

    The package's tokenizer encodes them. Without a tokenizer.json the ids are random, and the same
    in every run. Raises `UsageError` when nothing can be measured with these settings.
    """
    room = min(longest, config.max_position_embeddings - tokens)
    if room < 1:
        raise UsageError(
            f"a prompt and {tokens} more tokens do not fit the context of "
            f"{config.max_position_embeddings}: use fewer tokens."
        )
    prompts = encode(package, texts) or _random(config)
    if any(ids.max() >= config.vocab_size for ids in prompts):
        raise PackageError(
            f"{package}: the tokenizer gives ids beyond the vocabulary of {config.vocab_size}."
        )
    return [ids[:room] for ids in prompts]


def read_text(path: Path) -> str:
    """Read the text in `path`; raises `UsageError` when it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not UTF-8 text: convert it first.") from None


def encode(package: Path, texts: Sequence[str]) -> list[Ids]:
    """Return the ids of each text by the tokenizer of `package`; nothing if it has none.

    Raises `UsageError` for a text without tokens.
    """
    if not (package / "tokenizer.json").exists():
        return []
    found = open_encoder(package).encode(texts, add_special_tokens=True)
    encoded = [np.array(ids, np.int64) for ids in found]
    if not all(len(ids) for ids in encoded):
        raise UsageError("a text has no tokens: use one that is not empty.")
    return encoded


def _random(config: LlamaConfig) -> list[Ids]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, config.vocab_size, length) for length in _RANDOM]
