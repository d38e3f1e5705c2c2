"""What this processor can do at most: memory read, fp32 and int8 arithmetic, in one run.

    python benchmarks/limits.py [--threads 2] [--json]

A step of decoding cannot be faster than its weights can be read, nor a prompt than its products can
be computed; benchmarks/speed/ divides what each system reaches by these. Each figure is the best of
several rounds in turns: a limit is what the machine gives when nobody else disturbs it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.quality.processor import processor

ROUNDS = 7
READ_BYTES, MOST_READ_BYTES = 1 << 29, 1 << 32
"""For each thread, so that starting it takes no time beside reading; and for all of them."""

SIDE = 2048
"""Of the square matrices whose product is timed: 17 billion operations."""


@dataclass(frozen=True)
class Limits:
    """What the processor reached: bytes read and operations in a second."""

    processor: str
    threads: int
    read: float
    fp32: float
    int8: float

    def to_json(self) -> dict[str, object]:
        """Return all of it."""
        return asdict(self)

    def decode(self, step_bytes: int) -> float:
        """Return the most tokens a second if each reads `step_bytes`."""
        return self.read / step_bytes

    def prefill(self, token_products: int) -> float:
        """Return the most tokens a second if each takes `token_products` products and sums."""
        return self.int8 / (2 * token_products)


def measure(threads: int, rounds: int = ROUNDS) -> Limits:
    """Measure the limits of `threads` threads."""
    works = _works(threads)
    best: dict[str, float] = {}
    for _ in range(rounds):
        for name, (work, amount) in works.items():
            started = time.perf_counter()
            work()
            rate = amount / (time.perf_counter() - started)
            best[name] = max(best.get(name, 0.0), rate)
    return Limits(processor(), threads, best["read"], best["fp32"], best["int8"])


def _works(threads: int) -> Mapping[str, tuple[Callable[[], object], float]]:
    """Return what to time: a function, and how many bytes or operations it takes."""
    import torch

    torch.set_num_threads(threads)
    # Each thread reads a part of its own; a maximum needs less arithmetic than a sum of floats.
    read = min(READ_BYTES * threads, MOST_READ_BYTES)
    parts = np.array_split(np.ones(read // 8, np.uint64), threads)
    pool = ThreadPoolExecutor(threads)
    draw = np.random.default_rng(0)
    floats = [torch.from_numpy(draw.standard_normal((SIDE, SIDE), np.float32)) for _ in range(2)]
    bytes_ = [torch.from_numpy(draw.integers(-127, 128, (SIDE, SIDE), np.int8)) for _ in range(2)]
    operations = 2.0 * SIDE**3
    return {
        "read": (lambda: list(pool.map(np.bitwise_or.reduce, parts)), float(read)),
        "fp32": (lambda: torch.mm(*floats), operations),
        "int8": (lambda: torch._int_mm(*bytes_), operations),
    }


def describe(limits: Limits) -> str:
    """Return the limits in one line."""
    return (
        f"{limits.processor}, {limits.threads} threads: memory read {limits.read / 1e9:.1f} GB/s, "
        f"fp32 {limits.fp32 / 1e9:.0f} GFLOP/s, int8 {limits.int8 / 1e12:.2f} TOP/s"
    )


def main() -> None:
    """Read the command line, and print the limits."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    limits = measure(arguments.threads)
    print(json.dumps(limits.to_json()) if arguments.json else describe(limits))


if __name__ == "__main__":
    main()
