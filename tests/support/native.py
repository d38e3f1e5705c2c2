"""The C library, built for this machine with the libraries of the installed wheels."""

from __future__ import annotations

import ctypes
import importlib.util
import subprocess
from pathlib import Path
from typing import Any

import onnxruntime
import onnxruntime_genai as og

NATIVE = Path(__file__).parents[2] / "runtime" / "native"
SAMPLE = NATIVE / "samples" / "python" / "llama_onnx.py"
FLAGS = ("-std=c11", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-O1", "-fPIC", "-shared")


def compile_library(source: Path, out: Path, *flags: str) -> Path:
    command = ["gcc", *FLAGS, *flags, str(source), "-o", str(out), "-ldl", "-lpthread", "-lm"]
    subprocess.run(command, check=True)
    return out


def link_libraries(folder: Path) -> Path:
    """Link the libraries of the wheels in `folder`, with the names that the C library loads."""
    folder.mkdir(parents=True)
    (ort,) = (Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.1.*")
    (folder / "libonnxruntime.so.1").symlink_to(ort)
    genai = Path(og.__file__).parent / "libonnxruntime-genai.so"
    (folder / genai.name).symlink_to(genai)
    (folder / "onnxruntime.version").write_text(f"{onnxruntime.__version__}\n")
    return folder


def compile_checks(folder: Path) -> ctypes.CDLL:
    """Build and load the checks of native_checks.c."""
    source = Path(__file__).with_name("native_checks.c")
    flags = ("-Wno-unused-function", f"-I{NATIVE}")
    checks = ctypes.CDLL(str(compile_library(source, folder / "checks.so", *flags)))
    checks.config_key.restype = ctypes.c_char_p
    return checks


def compile_graph_reader(folder: Path) -> Path:
    """Build the program of native_graphs.c, which ends when it reads outside a graph."""
    source, out = Path(__file__).with_name("native_graphs.c"), folder / "graphs"
    warnings = (*FLAGS[:5], "-Wno-unused-function")
    sanitizers = ("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    subprocess.run(
        ["gcc", *warnings, *sanitizers, f"-I{NATIVE}", str(source), "-o", str(out)], check=True
    )
    return out


def load_sample() -> Any:
    """Import the Python sample."""
    spec = importlib.util.spec_from_file_location("llama_onnx_sample", SAMPLE)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build_library(folder: Path) -> Path:
    """Make the folder `bin` of a bundle for Linux: the library, and libraries for the CPU."""
    link_libraries(folder / "cpu")
    name = folder / "libllama_onnx.so"
    return compile_library(
        NATIVE / "llama_onnx.c", name, "-DLLAMA_ONNX_BUILD", "-fvisibility=hidden"
    )
