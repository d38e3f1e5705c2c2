"""What huge pages, and attention without tiles, do for a package in our engine.

    python benchmarks/engine_choices.py PACKAGE [--prompt 512] [--new 40] [--rounds 3]

Each measurement is a process of its own, since what is merged into huge pages stays so; the choices
take turns. Prints tokens a second: of the prompt, and of an answer after 32 tokens.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np

from llama_onnx.runtime.bench.together import request
from llama_onnx.runtime.engine import engine as engine_module
from llama_onnx.runtime.engine.engine import Engine
from llama_onnx.runtime.engine.engine_settings import DEFAULT
from llama_onnx.runtime.engine.events import PromptEvent, TokenEvent
from llama_onnx.runtime.memory import merge_pages, own_ranges
from llama_onnx.targets.package import ModelPackage

CHOICES = ("as it is", "no huge pages", "no tiles")
SHORT, RUNS = 32, 5


def main() -> None:
    """Measure in child processes, and print the medians."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("package", type=Path)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--choice", choices=CHOICES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.choice is not None:
        print(*measure(arguments.package, arguments.choice, arguments.prompt, arguments.new))
        return
    found: dict[str, list[tuple[float, ...]]] = {choice: [] for choice in CHOICES}
    for _ in range(arguments.rounds):
        for choice, rates in found.items():
            command = [sys.executable, *sys.argv, "--choice", choice]
            answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            rates.append(tuple(float(rate) for rate in answer.split()))
    for choice, rates in found.items():
        prefill, decode = (median(values) for values in zip(*rates, strict=True))
        print(f"{choice:14} prefill {arguments.prompt}: {prefill:.0f}, decode: {decode:.1f}")


def measure(package: Path, choice: str, prompt: int, new: int) -> tuple[float, float]:
    """Return tokens a second of a prompt, and of an answer, the medians of some."""
    if choice == "no huge pages":
        engine_module.merge_pages = lambda before: None
    settings = replace(DEFAULT, tiled_attention=choice != "no tiles")
    before = own_ranges()
    with Engine(ModelPackage.open(package), prompt + SHORT + new, settings=settings) as opened:
        if choice != "no huge pages" and (merging := merge_pages(before)):
            merging.join()
        reads = [run(opened, prompt, 1, seed)[0] for seed in range(RUNS)]
        steps = [median(run(opened, SHORT, new, RUNS + seed)[1][1:]) for seed in range(RUNS)]
    return prompt / median(reads), 1 / median(steps)


def run(opened: Engine, prompt: int, new: int, seed: int) -> tuple[float, list[float]]:
    """Return the seconds of the prompt, and of each token."""
    ids = np.random.default_rng(seed).integers(0, opened.layout.vocab_size, prompt, np.int32)
    read, steps = 0.0, []
    for event in opened.submit(request(opened, ids, new)):
        if isinstance(event, PromptEvent):
            read = event.read_seconds
        elif isinstance(event, TokenEvent):
            steps.append(event.seconds)
    return read, steps


if __name__ == "__main__":
    main()
