"""What `doctor` reports about a package: whether it is tuned on this machine."""

from __future__ import annotations

from llama_onnx.runtime.doctor.finding import Finding
from llama_onnx.runtime.tuning.tuned import find, tuned_elsewhere
from llama_onnx.targets.errors import LlamaOnnxError
from llama_onnx.targets.package import ModelPackage
from llama_onnx.targets.printable import printable

_NAME = "tuning"


def judge_tuning(package: ModelPackage) -> Finding:
    """Report which settings are kept for `package` here; reads all files of them."""
    command = f"`llama-onnx tune {printable(str(package.path))}`"
    try:
        tuned = find(package, thorough=True)
    except LlamaOnnxError as problem:
        found = str(problem).partition("; run ")[0]
        return Finding(_NAME, "warning", found, f"run {command}")
    if tuned is not None:
        found = ", ".join(tuned.settings.differences()) or "nothing gains over the defaults"
        return Finding(_NAME, "ok", f"{package.path.name} is tuned here: {found}")
    if tuned_elsewhere(package):
        found = "is tuned for another processor or another version of onnxruntime"
        return Finding(_NAME, "warning", f"{package.path.name} {found}", f"run {command} again")
    return Finding(_NAME, "ok", f"{package.path.name} is not tuned here; {command} does that")
