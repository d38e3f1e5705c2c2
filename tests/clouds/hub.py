"""The card's example for optimum, run as it stands there; a part of `nox -s parity-optimum`.

python -m tests.clouds.hub
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

from llama_onnx.targets.hub import bundle_hub
from llama_onnx.targets.package import ModelPackage
from tests.packages import greedy, make_package


def main() -> None:
    """Exit status 1 unless optimum gives onnxruntime-genai's tokens."""
    with tempfile.TemporaryDirectory(prefix="ä 日本 ") as temporary:
        package = make_package(Path(temporary), "int4")
        bundle = bundle_hub(ModelPackage.open(package), Path(temporary, "hub")).path
        text = (bundle / "README.md").read_text("utf-8")
        blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        (block,) = (block for block in blocks if "optimum" in block)
        names: dict[str, Any] = {}
        with patch("huggingface_hub.snapshot_download", return_value=str(bundle)):
            exec(compile(block, "README.md", "exec"), names)
        prompt = names["inputs"]["input_ids"][0].tolist()
        given = names["ids"][0].tolist()
        expected = prompt + greedy(package, prompt, 32)
        equal = sum(a == b for a, b in zip(given, expected, strict=False))
        print(f"optimum on the hub's bundle: {equal} of {len(expected)} ids as onnxruntime-genai")
        if given != expected:
            sys.exit(f"optimum: {given}; onnxruntime-genai: {expected}")


if __name__ == "__main__":
    main()
