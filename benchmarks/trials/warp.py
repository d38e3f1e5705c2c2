"""DirectML on Windows itself: export, prove, and replay each certificate on the device.

python -m benchmarks.trials.warp WORK_FOLDER [--provider cpu]

A machine without a graphics card has WARP, Windows' adapter in software. Exits with 1 if a package
does not verify. `--provider cpu` tries the script where there is no DirectML.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from llama_onnx.exporter.parity.prove import prove
from llama_onnx.exporter.sources import open_checkpoint
from llama_onnx.runtime.measure.verify import verify
from llama_onnx.targets.errors import LlamaOnnxError
from llama_onnx.targets.providers import get_provider
from tests.support.packages import make_package
from tests.support.tables import Case, markdown

PRECISIONS = ("fp16", "int8", "int4")


def main() -> None:
    """Print a row for each precision."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--provider", default="directml", choices=["directml", "cpu"])
    arguments = parser.parse_args()
    cases = [try_one(arguments.work, each, arguments.provider) for each in PRECISIONS]
    print(markdown("certificate on the device | what happened", cases))
    sys.exit(not all(case.holds for case in cases))


def try_one(work: Path, precision: str, provider: str) -> Case:
    """Make, prove and verify one tiny package."""
    folder = work / precision
    folder.mkdir(parents=True)
    package = make_package(folder, precision, provider)
    prove(package, open_checkpoint(folder / "checkpoint"), tokens=8, longest=16, certify=True)
    try:
        report = verify(package, get_provider(provider))
    except LlamaOnnxError as error:
        return Case(precision, False, str(error))
    worst = max(entry.shipped.max_abs for entry in report.situations)
    return Case(precision, report.passed, f"largest difference of a logit {worst:.1e}")


if __name__ == "__main__":
    main()
