"""The same certificates under other releases of onnxruntime, with one thread and with two.

    python -m benchmarks.trials.verify_versions FOLDER

Exports and proves SmolLM2-135M (int4, int8) and a tiny model (fp32), then runs `verify` on each in
a separate environment for every release. Exit status 1 if one fails.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

from examples.demo import find_model
from tests.support import tiny

RELEASES = ("1.24.4", "1.26.0", "1.28.0", "1.30.0", "1.31.1", "1.32.0")
"""The first one that reports where nodes run, and some later ones."""

COMMAND = ("-m", "llama_onnx.exporter.cli")


def main() -> None:
    """Make the packages, replay them, print a table."""
    folder = Path(sys.argv[1])
    packages = list(make_packages(folder))
    table = Table("onnxruntime", "package", "threads", "verdict", "largest relative L2", "seconds")
    failed = 0
    for release in RELEASES:
        python = make_environment(folder / f"onnxruntime-{release}", release)
        for package in packages:
            for threads in ("1", "2"):
                report = replay(python, package, threads)
                failed += not report["passed"]
                table.add_row(release, package.name, threads, *figures(report))
    Console().print(table)
    sys.exit(min(failed, 1))


def make_packages(folder: Path) -> Iterator[Path]:
    """Make certified packages in `folder`."""
    source = tiny.write_huggingface(folder / "tiny")
    for checkpoint, name, precision in (
        (source, "tiny-fp32", "fp32"),
        (find_model(), "smollm2-int4", "int4"),
        (find_model(), "smollm2-int8", "int8"),
    ):
        proof = ("--prove", "--accept-loss")  # what rounding costs is not the question here
        options = ("--precision", precision, *proof, "--force", "--json")
        call = [sys.executable, *COMMAND, "export", str(checkpoint), str(folder / name), *options]
        subprocess.run(call, check=True, stdout=subprocess.DEVNULL)
        yield folder / name


def make_environment(folder: Path, release: str) -> Path:
    """Make an environment with onnxruntime `release` and what `verify` needs; return its Python."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    needed = (f"onnxruntime=={release}", "safetensors", "tokenizers", ".")
    subprocess.run([python, "-m", "pip", "install", "--quiet", *needed], check=True)
    return python


def replay(python: Path, package: Path, threads: str) -> dict[str, object]:
    """Return the report of `verify --json` on `package`."""
    call = [str(python), *COMMAND, "verify", str(package), "--threads", threads, "--json"]
    done = subprocess.run(call, stdout=subprocess.PIPE, encoding="utf-8", check=False)
    report: dict[str, object] = json.loads(done.stdout) if done.stdout else {"passed": False}
    return report


def figures(report: dict[str, object]) -> tuple[str, str, str]:
    """Return the verdict, the relative L2 of the worst situation, and the total seconds."""
    situations, seconds = report.get("situations"), report.get("seconds")
    assert isinstance(situations, list) and isinstance(seconds, dict), "verify did not run"
    worst = max(entry["shipped"]["relative_l2"] for entry in situations)
    verdict = "passed" if report["passed"] else "FAILED"
    return verdict, f"{worst:.1e}", f"{sum(seconds.values()):.1f}"


if __name__ == "__main__":
    main()
