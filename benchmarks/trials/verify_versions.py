"""The same certificates under other releases of onnxruntime, with one thread and with two.

    python -m benchmarks.trials.verify_versions FOLDER

Exports and proves SmolLM2-135M (int4, int8) and a tiny model (fp32, and with matrices in every kind
of storage), then runs `verify` on each in
a separate environment for every release. Exit status 1 if one fails.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import cycle, product
from pathlib import Path
from typing import get_args

from rich.console import Console
from rich.table import Table

from examples.demo import find_model
from llama_onnx.exporter.model.config import LlamaConfig
from llama_onnx.exporter.model.scales import ScaleForm
from llama_onnx.exporter.model.storage import RowBlocks
from tests.support import storages, tiny

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
                table.add_row(release, name_of(package), threads, *figures(report))
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
    yield from make_stored(folder)


def make_stored(folder: Path) -> Iterator[Path]:
    """Make certified packages with zero points, and scales that are converted when they are opened:
    of 4 and 8 bits, then of 2, without the embedding: 1.24.4 does not read 2 bits row by row."""
    for name, bits in (("tiny-stored", (4, 8)), ("tiny-int2", (2,))):
        kinds = cycle(
            RowBlocks(bit, block, zero_points, stored_scales=form)
            for bit, block, zero_points, form in product(
                bits, (32, 64), (True, False), get_args(ScaleForm)
            )
        )
        shutil.rmtree(folder / name, ignore_errors=True)
        package, source = storages.make_chosen(folder / name, matrices(kinds))
        certify = ("validate", str(package), "--reference", str(source), "--certify", "--json")
        subprocess.run([sys.executable, *COMMAND, *certify], check=True, stdout=subprocess.DEVNULL)
        yield package


def matrices(kinds: Iterator[RowBlocks]) -> Callable[[LlamaConfig], storages.Chosen]:
    """Return a function that gives each matrix but the embedding the next of `kinds`."""
    choose = storages.dealt(kinds)
    return lambda config: {
        name: storage for name, storage in choose(config).items() if "embed_tokens" not in name
    }


def name_of(package: Path) -> str:
    """Return the name of `package`, or of the folder that it is alone in."""
    return package.parent.name if package.name == "package" else package.name


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
