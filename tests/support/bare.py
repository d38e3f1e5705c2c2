"""`import llama_onnx` from a bare wheel: run by `nox -s build` where no extra is installed."""

from __future__ import annotations

import pydoc
from importlib.util import find_spec
from pathlib import Path

import llama_onnx

PACKAGE = Path(__file__).with_name("earlier_packages") / "0.1.0-int4"


def main() -> None:
    """Check every public name, and call a function whose extra is missing."""
    assert find_spec("onnxruntime") is None, "run this without the extras"
    print(llama_onnx.__version__, llama_onnx.__all__)
    assert isinstance(llama_onnx.Llama, type)
    for name in ("Llama", "export", "plan", "validate", "verify"):
        text = pydoc.plain(pydoc.render_doc(getattr(llama_onnx, name)))
        assert ">>> " in text, f"help(llama_onnx.{name}) has no example"
    for call in (llama_onnx.Llama.load, llama_onnx.plan, llama_onnx.verify):
        try:
            call(PACKAGE)
        except llama_onnx.MissingDependencyError as error:
            assert "python -m pip install" in str(error), error
        else:
            raise AssertionError(f"{call} works without its extra")


if __name__ == "__main__":
    main()
