"""Our engine on a device: what it says beside genai, alone and in a batch, and how fast.

    python -m benchmarks.trials.cuda_engine PACKAGE [--provider cuda] [--rows 8] [--json FILE]

Greedy answers of both engines to the same prompts, of ours one at a time and all at once, and the
second turn of a chat, whose cache is kept. Quantized kernels for one row and for several round
differently, so that answers may part at a near-tie: the table counts the tokens until they do.
"""

from __future__ import annotations

import argparse
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from llama_onnx.runtime.engine.engine import Limits
from llama_onnx.runtime.llama.model import Llama
from llama_onnx.targets.engines import EngineName
from llama_onnx.targets.providers import get_provider

STARTS = (
    "The capital of France is",
    "def fibonacci(n):",
    "Water boils at a temperature of",
    "Once upon a time, in a small village,",
    "The three laws of thermodynamics are",
    "To make a good cup of coffee, you",
    "In 1969, the first human being",
    "The difference between a list and a tuple",
)
NEW, ROUNDS = 48, 3


def main() -> None:
    """Ask, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("package", type=Path)
    parser.add_argument("--provider", default="cuda")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    result = try_engine(arguments.package, arguments.provider, arguments.rows)
    table = Table("what", "value", title=f"{arguments.package.name} on {arguments.provider}")
    for name, value in result.items():
        table.add_row(name, f"{value:.4g}" if isinstance(value, float) else str(value))
    Console().print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def try_engine(package: Path, provider: str, rows: int) -> dict[str, Any]:
    """Return the figures of both engines."""
    result: dict[str, Any] = {"prompts": len(STARTS), "new tokens each": NEW}
    with _open(package, provider, "genai", rows) as model:
        genai = [_answer(model, text)[0] for text in STARTS]
    with _open(package, provider, "onnxruntime", rows) as model:
        alone = [_answer(model, text)[0] for text in STARTS]
        for text in STARTS:  # known by now
            _answer(model, text)
        together = _together(model, list(STARTS))
        result["equal tokens of ours and genai's"] = _agreement(alone, genai)
        result["equal tokens alone and in a batch"] = _agreement(alone, together)
        result |= _second_turn(model)
        for count in (1, 2, 4, 8, 16, 32):
            if count <= rows:
                rates = [_rate(model, count) for _ in range(1 + ROUNDS)][1:]
                result[f"decode of {count} streams, tokens/s"] = median(rates)
    return result


def _open(package: Path, provider: str, engine: EngineName, rows: int) -> Llama:
    limits = Limits(rows=rows) if engine == "onnxruntime" else None
    return Llama.load(package, provider=get_provider(provider), engine=engine, limits=limits)


def _answer(model: Llama, text: str, count: int = NEW) -> tuple[list[int], Any]:
    """Return the greedy answer's tokens, and its statistics."""
    answer = model.generate(text, max_new_tokens=count, temperature=0)
    said = "".join(answer)
    return model.encode(text + said).tolist(), answer.stats


def _together(model: Llama, texts: list[str]) -> list[list[int]]:
    with ThreadPoolExecutor(len(texts)) as pool:
        return list(pool.map(lambda text: _answer(model, text)[0], texts))


def _agreement(first: list[list[int]], second: list[list[int]]) -> str:
    """Return how many texts are the same, and the tokens until the others part."""
    same = sum(a == b for a, b in zip(first, second, strict=True))
    parted = [
        next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        for a, b in zip(first, second, strict=True)
        if a != b
    ]
    return f"{same} of {len(first)} texts" + (f"; others part at {parted}" if parted else "")


def _second_turn(model: Llama) -> dict[str, Any]:
    """Return what a longer text gains from the cache of its start, and whether it says the same."""
    long = " ".join(f"Sentence {number} is about number {number}." for number in range(24))
    for text in (long[: len(long) // 2], long):
        _answer(model, text, 8)
    started = perf_counter()
    warm, stats = _answer(model, long + " And so", 24)
    seconds = perf_counter() - started
    return {
        "known tokens of a second turn": f"{stats.reused_tokens} of {stats.prompt_tokens}",
        "first token of it, ms": stats.first_token_seconds * 1e3,
        "answer of it, ms": seconds * 1e3,
        "its text": model.decode(np.array(warm[-24:])),
    }


def _rate(model: Llama, count: int) -> float:
    """Return the tokens a second of `count` answers at once."""
    prompts = [
        np.arange(1000 + 40 * row, 1032 + 40 * row) % model.vocab_size for row in range(count)
    ]
    started = perf_counter()
    with ThreadPoolExecutor(count) as pool:
        stats = list(pool.map(lambda prompt: model.measure(prompt, 128), prompts))
    return sum(one.new_tokens for one in stats) / (perf_counter() - started)


if __name__ == "__main__":
    main()
