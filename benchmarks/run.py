"""The export and speed figures of docs/benchmarks.md: `nox -s bench-export`, or this script.

    python benchmarks/run.py [--work FOLDER] [--7b]

Makes the checkpoints, exports them, and compares them with other tools, with llama.cpp only if
llama-cpp-python is installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def python(*arguments: str | Path) -> None:
    words = [str(argument) for argument in arguments]
    print("$", shlex.join(["python", *words]), flush=True)
    environment = os.environ | {"ORT_DISABLE_TELEMETRY": "1"}
    subprocess.run([sys.executable, *words], check=True, env=environment)


def export(source: Path, out: Path, *options: str) -> None:
    # The builder rounds to nearest as well; random weights have nothing to calibrate on.
    rounded = ("--quantizer", "rtn", "--force")
    python("-m", "llama_onnx.exporter.cli", "export", source, out, *rounded, *options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("work"), help="[default: ./work]")
    parser.add_argument("--7b", dest="seven", action="store_true", help="needs 20 GB of disk")
    arguments = parser.parse_args()
    work: Path = arguments.work
    source = work / "1.1b"
    if not (source / "model.safetensors.index.json").exists():
        python(HERE / "make_checkpoint.py", "1.1b", source)
    python(HERE / "export.py", source, "--builder")
    builder = ["-m", source, "-i", source, "-o", work / "builder", "-p", "int4", "-e", "cpu"]
    python("-m", "onnxruntime_genai.models.builder", *builder, "-c", work / "cache")
    export(source, work / "32")
    export(source, work / "128", "--block-size", "128")
    export(source, work / "last", "--logits", "last")
    export(source, work / "fused", "--fuse-gate-up")
    peers = [f"builder={work / 'builder'}"]
    if importlib.util.find_spec("llama_cpp"):
        python(HERE / "make_gguf.py", source, work / "q4_0.gguf")
        peers.append(f"llama.cpp={work / 'q4_0.gguf'}")
    else:
        print("llama.cpp is left out: install it with `pip install llama-cpp-python`.")
    speed = HERE / "speed.py"
    python(speed, f"block 32={work / '32'}", *peers)
    python(speed, f"block 128={work / '128'}", *peers)
    choices = [f"logits last={work / 'last'}", f"gate+up fused={work / 'fused'}"]
    python(speed, f"block 32={work / '32'}", *choices)
    python(HERE / "adapters.py", source, "--work", work / "adapters")
    if arguments.seven:
        python(HERE / "make_checkpoint.py", "7b", work / "7b")
        python(HERE / "export.py", work / "7b", "--rounds", "1")


if __name__ == "__main__":
    main()
