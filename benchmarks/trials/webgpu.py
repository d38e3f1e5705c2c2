"""WebGPU on software Vulkan: whether packages open, run there, and compute the right values.

    python -m benchmarks.trials.webgpu WORK_FOLDER [--operators]

Opens tiny packages on every Vulkan driver. Each line shows what ran, or why it stopped; exit status
1 for a reason that is not in docs/providers.md, a model that ran on the CPU, and wrong values.
`--operators` measures single operators instead: benchmarks/trials/webgpu_operators.py.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.trials import webgpu_operators
from llama_onnx.exporter.packaging.export import export_package
from llama_onnx.exporter.packaging.options import Options
from llama_onnx.exporter.parity.prove import prove
from llama_onnx.exporter.sources import open_checkpoint
from llama_onnx.runtime.placement.profile import step_feeds
from llama_onnx.targets.providers import CPU, WEBGPU
from llama_onnx.targets.registry import get_target
from tests.support import tiny
from tests.support.tables import Case

PRECISIONS = ("fp16", "int8", "int4")
SWIFTSHADER = Path("/usr/lib/chromium/vk_swiftshader_icd.json")
"""Where Debian's package chromium-common has it."""

NO_ADAPTER = "No supported adapters"
NO_FP16 = "requires f16 but the device does not support it"
SAME = 1e-3
"""Limit for the relative L2 between one operator's float32 output and the CPU's."""


def drivers() -> dict[str, Mapping[str, str]]:
    """Return name -> environment in which Vulkan has only this driver."""
    found: dict[str, Mapping[str, str]] = {"Vulkan's own choice": {}}
    if SWIFTSHADER.exists():
        # Two names of one variable: older loaders know only the first.
        names = ("VK_ICD_FILENAMES", "VK_DRIVER_FILES")
        found["SwiftShader"] = dict.fromkeys(names, str(SWIFTSHADER))
    return found


def make_certified(folder: Path, precision: str) -> Path:
    """Make a tiny package for WebGPU, with float32 activations and a certificate."""
    source = tiny.write_huggingface(folder / "checkpoint")
    options = Options(precision, activations="fp32")
    package = export_package(source, folder / "package", get_target("webgpu"), options).package
    report = prove(package, open_checkpoint(source), tokens=4, longest=16, certify=True)
    assert report.passed
    return package


def cases(work: Path) -> Iterator[Case]:
    """Each package on each driver."""
    packages = {p: make_certified(work / p, p) for p in PRECISIONS}
    for driver, environment in drivers().items():
        for precision, package in packages.items():
            what = f"{driver}, {precision}"
            yield try_package(what, package, {**os.environ, **environment})


def try_package(what: str, package: Path, environment: Mapping[str, str]) -> Case:
    """Test a package on a driver: the profile first, to know that parity is WebGPU's."""
    cli = ("-m", "llama_onnx.exporter.cli")
    on_webgpu = (str(package), "--provider", WEBGPU.name, "--json")
    done = call(environment, *cli, "inspect", *on_webgpu, "--profile")
    if done.returncode:
        return stopped(what, done.stderr)
    kernels = {entry["provider"]: entry["count"] for entry in read(done)["profile"]["kernels"]}
    said = ", ".join(f"{count} kernels on {provider}" for provider, count in kernels.items())
    if not kernels.get(WEBGPU.ort_name):
        return Case(what, False, f"a silent fallback: {said}")
    if read(call(environment, *cli, "verify", *on_webgpu))["passed"]:
        return Case(what, True, f"{said}; parity holds")
    first = read(call(environment, "-m", "benchmarks.trials.webgpu", "--first", str(package)))
    where = f"the first operator that differs from the CPU's is {first['op']}, by {first['by']:.2g}"
    return Case(what, False, f"{said}; parity does not hold: {where}")


def stopped(what: str, said: str) -> Case:
    """Return the case of an error, which holds if the error is a known one."""
    lines = said.strip().splitlines() or ["no message"]
    reasons = [line for line in lines if "required" in line]
    holds = NO_ADAPTER in lines[-1] or NO_FP16 in lines[-1]
    message = lines[-1].partition("model.onnx")[2].lstrip(": ") or lines[-1]
    return Case(what, holds, f"stops: {'; '.join([*reasons, message])}")


def first_difference(package: Path) -> dict[str, Any]:
    """Return the first operator, in graph order, whose output on WebGPU differs from the CPU's."""
    import onnx
    import onnxruntime as ort

    model = onnx.load(package / "model.onnx", load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":  # int8 activations are the CPU's, not the GPU's
                attribute.i = 1
    known = {value.name for value in model.graph.output}
    outputs = [(node.op_type, node.output[0]) for node in model.graph.node]
    model.graph.output.extend(
        onnx.ValueInfoProto(name=name) for _, name in outputs if name not in known
    )
    # In the folder of the weights, which it refers to.
    file = package / "all.onnx"
    onnx.save(model, file)
    values = []
    for provider in (CPU, WEBGPU):
        options = ort.SessionOptions()
        options.log_severity_level = 3
        providers = dict.fromkeys((provider.ort_name, CPU.ort_name))
        session = ort.InferenceSession(str(file), options, list(providers), enable_fallback=0)
        names = [name for _, name in outputs]
        values.append(session.run(names, step_feeds(session, 64)))
    file.unlink()
    for (op, _), expected, given in zip(outputs, *values, strict=True):
        if expected.dtype == np.float32 and expected.size:
            size = float(np.linalg.norm(expected))
            by = float(np.linalg.norm(given - expected)) / max(size, 1e-9)
            if not by <= SAME:
                return {"op": op, "by": by}
    return {"op": "none", "by": 0.0}


def call(environment: Mapping[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a separate process, because a process chooses its driver once."""
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def read(done: subprocess.CompletedProcess[str]) -> Any:
    """Return the JSON that a process printed."""
    if not done.stdout.strip():
        raise RuntimeError(f"{done.args} printed no JSON: {done.stderr}")
    return json.loads(done.stdout)


def main() -> None:
    """Print a line for each case; exit status 1 if one does not hold."""
    if sys.argv[1] == "--first":
        print(json.dumps(first_difference(Path(sys.argv[2]))))
        return
    if sys.argv[2:] == ["--operators"]:
        webgpu_operators.main()
        return
    work = Path(sys.argv[1], "webgpu")
    shutil.rmtree(work, ignore_errors=True)
    done = list(cases(work))
    for case in done:
        print(f"| {case.what} | {case.said} | {'yes' if case.holds else 'NO'} |")
    if not all(case.holds for case in done):
        sys.exit("A line does not hold.")


if __name__ == "__main__":
    main()
