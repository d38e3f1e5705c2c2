"""`nox -s parity-optimum`: optimum-onnx exports the same checkpoints; the logits must be the same.

A second oracle, independent of this project: optimum traces transformers' own model, in an older
version, and its graph has none of our operators. onnxruntime runs both graphs in fp32, in one pass
and token by token.

    python -m benchmarks.trials.parity_optimum
"""

from __future__ import annotations

import os
import sys
import tempfile
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import numpy as np
import onnxruntime as ort
from rich.console import Console
from rich.table import Table

from llama_onnx.exporter.model.config import LlamaConfig
from llama_onnx.exporter.packaging.export import export_package
from llama_onnx.exporter.packaging.options import Options
from llama_onnx.runtime.measure.graph_session import GraphSession
from llama_onnx.targets.cpu import TARGET
from tests.support import tiny

MAX_ABS, RELATIVE_L2 = 1e-3, 1e-5
"""The limits of the graph error: both sides are fp32, only the order of sums may differ."""

VARIANTS = {
    "MHA": replace(tiny.GQA, num_key_value_heads=tiny.GQA.num_attention_heads),
    "GQA": tiny.GQA,
    "tied": replace(tiny.GQA, tie_word_embeddings=True),
    "not a multiple of 32": replace(tiny.GQA, hidden_size=80, intermediate_size=72),
    "rope linear": replace(tiny.GQA, rope_scaling=tiny.ROPE_SCALINGS["linear"]),
    "rope llama3": replace(tiny.GQA, rope_scaling=tiny.ROPE_SCALINGS["llama3"]),
    "rope yarn": replace(tiny.GQA, rope_scaling=tiny.ROPE_SCALINGS["yarn"]),
}
PROMPT, STEPS = 150, 4

Logits = np.ndarray[Any, np.dtype[np.float32]]


def main() -> None:
    """Compare every variant and print one table; exit status 1 if one exceeds a limit."""
    table = Table(title=f"Against optimum-onnx {version('optimum-onnx')}, fp32")
    for name in ("architecture", "one pass: max", "rel L2", "step by step: max", "rel L2", ""):
        table.add_column(name, justify="left" if name == "architecture" else "right")
    failed = False
    with tempfile.TemporaryDirectory(prefix="llama-onnx ä 日本 ") as folder:
        for number, (name, config) in enumerate(VARIANTS.items()):
            figures = compare(Path(folder, str(number)), config)
            sound = all(m <= MAX_ABS and r <= RELATIVE_L2 for m, r in figures)
            failed |= not sound
            cells = [f"{value:.1e}" for pair in figures for value in pair]
            table.add_row(name, *cells, "ok" if sound else "[bold red]MISSED[/]")
    Console(width=None if sys.stdout.isatty() else 100).print(table)
    sys.exit(1 if failed else 0)


def compare(folder: Path, config: LlamaConfig) -> list[tuple[float, float]]:
    """Return the largest difference and relative L2 of the logits, in one pass and step by step."""
    source = tiny.write_huggingface(folder / "checkpoint", config)
    package = export_package(source, folder / "ours", TARGET, Options("fp32")).package
    theirs = export_with_optimum(source, folder / "theirs")
    ids = np.random.default_rng(0).integers(0, config.vocab_size, PROMPT + STEPS)
    graph = GraphSession.open(package)
    cuts = [PROMPT, *range(PROMPT + 1, len(ids) + 1)]
    pairs = []
    for ends in ([len(ids)], cuts):
        ours, cache, start = [], None, 0
        for end in ends:
            logits, cache = graph.step(ids[start:end], cache)
            ours.append(logits)
            start = end
        pairs.append((np.concatenate(ours), run_optimum(theirs, ids, ends)))
    return [distance(*pair) for pair in pairs]


def export_with_optimum(source: Path, out: Path) -> ort.InferenceSession:
    """Export the checkpoint in `source` with optimum and open its graph."""
    from optimum.exporters.onnx import main_export

    main_export(str(source), str(out), task="text-generation-with-past", no_post_process=True)
    return ort.InferenceSession(str(out / "model.onnx"), providers=["CPUExecutionProvider"])


def run_optimum(session: ort.InferenceSession, ids: np.ndarray, ends: list[int]) -> Logits:
    """Return the logits [N, V] after `ids` [N], fed up to each of `ends` in turn."""
    outputs = [output.name for output in session.get_outputs()]
    cache = {
        entry.name: np.zeros((1, entry.shape[1], 0, entry.shape[3]), np.float32)
        for entry in session.get_inputs()
        if entry.name.startswith("past_key_values")
    }
    logits, start = [], 0
    for end in ends:
        feeds = {
            "input_ids": ids[None, start:end],
            "attention_mask": np.ones((1, end), np.int64),
            "position_ids": np.arange(start, end)[None],
            **cache,
        }
        wanted = {entry.name for entry in session.get_inputs()}
        found = dict(
            zip(
                outputs,
                session.run(None, {k: v for k, v in feeds.items() if k in wanted}),
                strict=True,
            )
        )
        logits.append(found.pop("logits")[0])
        cache = {name.replace("present", "past_key_values"): v for name, v in found.items()}
        start = end
    return np.concatenate(logits)


def distance(ours: Logits, theirs: Logits) -> tuple[float, float]:
    """Return the largest difference, and ||ours - theirs|| / ||theirs||."""
    difference = ours.astype(np.float64) - theirs
    relative = np.linalg.norm(difference) / np.linalg.norm(theirs.astype(np.float64))
    return float(np.abs(difference).max()), float(relative)


if __name__ == "__main__":
    main()
