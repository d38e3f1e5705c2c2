"""What an export takes: time and peak memory, beside the genai builder and a copy of the bytes.

    python benchmarks/export.py work/1.1b --builder
    python benchmarks/export.py work/7b

Each runs in a separate process; peak memory is the largest resident set of that process. Before
each run the source is dropped from the page cache (on Linux), so that all of them read from the
disk. The copy reads the source and writes as many bytes as the package has, flushed to the disk:
the least that any exporter has to do.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

RunResult = tuple[float, float, float]  # seconds, peak bytes, seconds of processor time


def run(command: list[str]) -> RunResult:
    """Return the seconds, peak resident bytes and processor seconds of `command`; exit if it
    fails."""
    start = time.perf_counter()
    pid = os.posix_spawnp(
        command[0],
        command,
        {**os.environ, "ORT_DISABLE_TELEMETRY": "1"},
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
            (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0),
        ],
    )
    _, status, usage = os.wait4(pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} ended with status {status}")
    seconds = time.perf_counter() - start
    return seconds, usage.ru_maxrss * 1024, usage.ru_utime + usage.ru_stime


def drop_from_cache(folder: Path) -> None:
    for file in folder.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def ours(source: Path, out: Path, options: list[str]) -> RunResult:
    module = [sys.executable, "-m", "llama_onnx.exporter.cli"]
    return run([*module, "export", str(source), str(out), "--quantizer", "rtn", *options])


def builder(source: Path, out: Path) -> RunResult:
    module = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
    options = ["-m", str(source), "-i", str(source), "-o", str(out), "-p", "int4", "-e", "cpu"]
    return run([*module, *options, "-c", str(out.parent / "cache")])


def copy(source: Path, out: Path, package_bytes: int) -> RunResult:
    out.mkdir()
    start, worked = time.perf_counter(), time.process_time()
    left, block = package_bytes, 1 << 22
    with (out / "copy").open("wb") as target:
        for file in sorted(source.glob("*.safetensors")):
            with file.open("rb", buffering=0) as data:
                while piece := data.read(block):
                    target.write(piece[:left])
                    left -= min(left, len(piece))
        target.flush()
        os.fsync(target.fileno())
    return time.perf_counter() - start, 0, time.process_time() - worked


def folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("--builder", action="store_true", help="the genai builder as well")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("options", nargs="*", help="for llama-onnx export, after --")
    arguments = parser.parse_args()
    source: Path = arguments.source
    sizes: dict[str, int] = {}
    results: dict[str, list[RunResult]] = {}

    def measure(name: str, action: Callable[[Path], RunResult], folder: Path) -> None:
        drop_from_cache(source)
        out = folder / "out"
        results.setdefault(name, []).append(action(out))
        sizes[name] = folder_bytes(out)
        shutil.rmtree(out)

    with tempfile.TemporaryDirectory(dir=source.parent) as temporary:
        folder = Path(temporary)
        for _ in range(arguments.rounds):
            measure("llama-onnx", lambda out: ours(source, out, arguments.options), folder)
            size = sizes["llama-onnx"]
            measure("copy", lambda out: copy(source, out, size), folder)  # noqa: B023
            if arguments.builder:
                measure("genai builder", lambda out: builder(source, out), folder)
    table = {
        name: {
            "seconds": round(statistics.median(seconds for seconds, _, _ in runs), 1),
            "processor_seconds": round(statistics.median(worked for _, _, worked in runs), 1),
            "peak_gb": round(max(peak for _, peak, _ in runs) / 1e9, 2),
            "size_mb": round(sizes[name] / 1e6),
        }
        for name, runs in results.items()
    }
    print(f"{source}: {folder_bytes(source) / 1e9:.2f} GB, medians of {arguments.rounds} rounds")
    base = table["llama-onnx"]["seconds"]
    for name, row in table.items():
        peak = f"{row['peak_gb']:6.2f} GB" if row["peak_gb"] else "        -"
        print(
            f"{name:14} {row['seconds']:7.1f} s  x{row['seconds'] / base:5.2f}  "
            f"processor {row['processor_seconds']:7.1f} s  peak {peak}  "
            f"{row['size_mb']:6.0f} MB"
        )
    print(json.dumps(table))


if __name__ == "__main__":
    main()
