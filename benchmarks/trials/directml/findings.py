"""What is wrong in ONNX Runtime's DirectML provider, each as a folder like those of `bisect`."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from benchmarks.trials.directml import operators
from benchmarks.trials.directml.place import DIRECTML, WHEELS, Place
from llama_onnx.exporter.parity.bisect.reproduce import write_reproduction
from llama_onnx.targets.providers import DIRECTML as PROVIDER
from tests.support.tables import Case


@dataclass(frozen=True)
class Finding:
    """The name of its folder, which model shows it, and one sentence about it."""

    folder: str
    model: str
    sentence: str


FINDINGS = (
    Finding(
        "directml-zero-points-of-8-bits",
        operators.ZEROS_ODD,
        "MatMulNBits with zero points of 8 bits is wrong if a row has an odd number of blocks.",
    ),
    Finding(
        "directml-zero-points-in-fp16",
        operators.ZEROS_HALF,
        "MatMulNBits accepts zero points in fp16 and computes something else with them.",
    ),
    Finding(
        "directml-norm-in-fp16",
        operators.NARROW_NORM,
        "SkipSimplifiedLayerNormalization in fp16 overflows where the mean square is above 65504.",
    ),
    Finding(
        "directml-attention-in-two-buffers",
        operators.TWO_BUFFERS,
        "GroupQueryAttention does not copy the past into present if they are two buffers.",
    ),
)


def finding_cases(place: Place, docs: Path) -> Iterator[Case]:
    """Write the folders from what the models of `operator_cases` gave, and run their scripts."""
    models = operators.models_folder(place)
    names = [name for name, _ in operators.models(np.random.default_rng(0))]
    for finding in FINDINGS:
        number = names.index(finding.model)
        expected, found = (models / f"{number}-{which}.npz" for which in ("expected", "found"))
        if not found.exists():
            yield Case(finding.folder, False, "its model did not run")
            continue
        write_reproduction(
            docs / finding.folder,
            ir.load(models / f"{number}.onnx"),
            dict(np.load(models / f"{number}.npz")),
            np.load(expected)["y"],
            np.load(found)["y"],
            f"{WHEELS[0]}: {finding.sentence}",
            PROVIDER,
        )
        yield _reproduced(place, docs / finding.folder)


def _reproduced(place: Place, folder: Path) -> Case:
    copied = place.root.work / "finding"
    shutil.rmtree(copied, ignore_errors=True)
    shutil.copytree(folder, copied)
    lines = place.run(place.root.windows_path(copied / "reproduce.py")).splitlines()
    fact = {line[:20].strip(): line[20:] for line in lines}
    holds = f"ran on {DIRECTML}" in lines and float(fact.get("relative L2", "0")) > 0.01
    said = (
        f"relative L2 {fact.get('relative L2')}, largest difference "
        f"{fact.get('largest difference')}; from the recorded result "
        f"{fact.get('against found.npz')}"
    )
    return Case(f"`{folder.name}`", holds, said if holds else " ".join(lines)[-200:])
