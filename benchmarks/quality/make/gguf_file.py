"""Quantize a float32 GGUF file with llama.cpp: `... SOURCE OUT TYPE [--imatrix FILE]`."""

from __future__ import annotations

import argparse
import ctypes
import os
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.quality.llama_library import FTYPES, ImatrixData, open_library


def main() -> None:
    """Write the quantized file."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("type", choices=FTYPES)
    parser.add_argument("--imatrix", type=Path, help="mean squares of the input channels, .npz")
    arguments = parser.parse_args()
    library = open_library(Path(os.environ["LLAMA_CPP_LIBRARY"]))
    params = library.llama_model_quantize_default_params()
    params.ftype, params.nthread = FTYPES[arguments.type], os.cpu_count() or 1
    kept: list[Any] = []
    if arguments.imatrix:
        params.imatrix = _imatrix(arguments.imatrix, kept)
    paths = str(arguments.source).encode(), str(arguments.out).encode()
    if library.llama_model_quantize(*paths, ctypes.byref(params)):
        raise SystemExit("llama.cpp could not quantize the file.")


def _imatrix(path: Path, kept: list[Any]) -> Any:
    """Return the list for llama.cpp, ended by an empty entry; `kept` keeps its memory alive."""
    stored = np.load(path)
    entries = (ImatrixData * (len(stored.files) + 1))()
    for entry, name in zip(entries, stored.files, strict=False):
        values = np.ascontiguousarray(stored[name], np.float32)
        kept.append(values)
        entry.name, entry.size = name.encode(), values.size
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    kept.append(entries)
    return entries


if __name__ == "__main__":
    main()
