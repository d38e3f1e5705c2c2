"""Run the card's example for optimum unchanged; part of `nox -s parity-optimum`.

python -m benchmarks.trials.clouds.hub
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

from llama_onnx.exporter.packaging.export import export_package
from llama_onnx.exporter.packaging.options import Options
from llama_onnx.runtime.bundles.hub import Hub
from llama_onnx.runtime.bundles.make import make_bundle
from llama_onnx.targets.package import ModelPackage
from llama_onnx.targets.registry import get_target
from tests.support.packages import greedy, make_package

CASES = (("cpu", "int4"), ("portable", "fp32"))
"""Target and precision; a package for the CPU with the same weights gives the expected ids."""


def main() -> None:
    """Exit with status 1 unless optimum generates the tokens of onnxruntime-genai."""
    for target, precision in CASES:
        with tempfile.TemporaryDirectory(prefix="ä 日本 ") as temporary:
            given, prompt, expected = run(Path(temporary), target, precision)
        equal = sum(a == b for a, b in zip(given, expected, strict=False))
        said = f"{equal} of {len(expected)} ids as onnxruntime-genai's on the CPU"
        print(f"optimum, {precision} for {target}: {said} ({len(prompt)} of them the prompt)")
        if given != expected:
            sys.exit(f"optimum: {given}; onnxruntime-genai: {expected}")


def run(folder: Path, target: str, precision: str) -> tuple[list[int], list[int], list[int]]:
    """Return the ids that the card's example generates, its prompt's, and the expected ones."""
    reference = make_package(folder, precision)
    package = folder / "package"
    source = folder / "checkpoint"
    export_package(source, package, get_target(target), Options(precision=precision))
    bundle = make_bundle(ModelPackage.open(package), folder / "hub", Hub()).path
    text = (bundle / "README.md").read_text("utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (block,) = (block for block in blocks if "optimum" in block)
    names: dict[str, Any] = {}
    with patch("huggingface_hub.snapshot_download", return_value=str(bundle)):
        exec(compile(block, "README.md", "exec"), names)
    prompt: list[int] = names["inputs"]["input_ids"][0].tolist()
    return names["ids"][0].tolist(), prompt, prompt + greedy(reference, prompt, 32)


if __name__ == "__main__":
    main()
