"""What `doctor` runs in a child process, because it may crash, hang or print many warnings.

`main` is called with `onnxruntime`, `genai`, `libraries NAME`, `open NAME` or `windows_ml`. It
prints one line that starts with `MARK`, then JSON: what it found, or `{"error": ...}`.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from importlib.resources import as_file, files
from time import perf_counter
from typing import Any

from llama_onnx.targets.errors import LlamaOnnxError
from llama_onnx.targets.providers import CUDA, get_provider

MARK = "llama-onnx-probe "
PROMPT = (3, 14, 15, 9, 26)
_CUDNN = {"linux": "libcudnn.so.9", "win32": "cudnn64_9.dll"}


def main() -> None:
    """Run the probe named on the command line, and print the answer."""
    try:
        answer = _try(*sys.argv[1:])
    except LlamaOnnxError as error:
        answer = {"error": str(error).rstrip(".")}
    except Exception as error:  # a broken installation's exception is the answer
        answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}
    sys.stdout.write(f"\n{MARK}{json.dumps(answer)}\n")
    sys.stdout.flush()
    # A driver may crash while its libraries unload; the answer is already printed.
    os._exit(0)


def _try(what: str, *arguments: str) -> dict[str, Any]:
    if what == "onnxruntime":
        return _onnxruntime()
    if what == "genai":
        return _genai()
    if what == "windows_ml":
        return _windows_ml()
    return _libraries(*arguments) if what == "libraries" else _open(*arguments)


def _onnxruntime() -> dict[str, Any]:
    from llama_onnx.runtime import ort

    return {"version": ort.version(), "providers": ort.available_providers()}


def _libraries(name: str) -> dict[str, Any]:
    from llama_onnx.runtime.placement.availability import missing_libraries

    missing = [library.name for library in missing_libraries(get_provider(name))]
    return {"missing": missing, "cudnn": _cudnn() if name == CUDA.name else None}


def _genai() -> dict[str, Any]:
    from llama_onnx.runtime.genai import og

    return {"version": og.__version__}


def _windows_ml() -> dict[str, Any]:
    from llama_onnx.runtime.placement.windows_ml import list_devices, read_catalog, register

    entries = read_catalog()
    problems = register(entries)
    names = {entry.name for entry in entries}
    devices = [str(device) for device in list_devices() if device.ep in names]
    return {"providers": sorted(names), "devices": devices, "problems": problems}


def _open(name: str) -> dict[str, Any]:
    """Open the small model for a provider there; run a prefill and a decode step in one buffer."""
    import numpy as np

    from llama_onnx.runtime.measure.graph_session import GraphSession, SharedBuffer
    from llama_onnx.runtime.placement.session import open_session

    started = perf_counter()
    provider = get_provider(name)
    with as_file(files("llama_onnx.runtime.doctor") / f"probe-{name}.onnx") as model:
        opened = open_session(model, provider)
    cache = SharedBuffer(GraphSession(opened.session), length=len(PROMPT) + 3)
    cache.step(np.array(PROMPT[:-1], np.int64))
    logits = cache.step(np.array(PROMPT[-1:], np.int64))
    return {
        "nodes": len(opened.placement.nodes),
        "elsewhere": len(opened.placement.elsewhere),
        "logits": [float(value) for value in logits[-1]],
        "seconds": perf_counter() - started,
    }


def _cudnn() -> bool | None:
    name = _CUDNN.get(sys.platform)
    if name is None:
        return None
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True
