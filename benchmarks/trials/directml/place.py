"""The root with its Windows Python and the packages, and how to run something there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.trials.directml.root import Root
from benchmarks.trials.windows.real import export_smollm2
from benchmarks.trials.windows.windows_python import COMMON, make_certified, make_python

HERE = Path(__file__).parent
SCRIPTS = ("loop.py", "single.py")
"""What the Windows Python runs besides our commands."""
WHEELS = ("onnxruntime-directml==1.24.4", "onnxruntime-genai-winml==0.18.0", *COMMON)
PRECISIONS = ("fp16", "int8", "int4")
DIRECTML, DEVICE = "DmlExecutionProvider", "DirectML"
LOST = {"LOSE_DEVICE_AFTER": "12"}
"""A fault: the device is gone after this many shaders."""
WRONG = {"SKIP_DISPATCH": "50"}
"""Another: of so many runs of a shader one is left out."""


@dataclass(frozen=True)
class Place:
    """The root, the Windows Python in it, and the certified packages by name."""

    root: Root
    python: Path
    packages: Mapping[str, Path]

    def run(self, *arguments: str, fault: Mapping[str, str] | None = None) -> str:
        """Run the Windows Python; return what it printed, and its errors if it failed. `fault` is
        planted in the device (d3d12.c)."""
        home = {"PYTHONHOME": self.root.windows_path(self.python.parent), "PYTHONUTF8": "1"}
        program = self.root.windows_path(self.python)
        given = {**home, "PYTHONPATH": "", "COLUMNS": "100", **(fault or {})}
        done = self.root.call([program, *arguments], given)
        printed = done.stdout if done.returncode == 0 else done.stdout + done.stderr
        return printed.decode(errors="replace").replace("\r", "")

    def ours(self, *arguments: str) -> Any:
        """Run one of our commands with --json; return its answer, or what it printed instead."""
        said = self.run("-m", "llama_onnx.exporter.cli", *arguments, "--json")
        # The display's server may say good-bye after the command has ended.
        printed = [line for line in said.strip().splitlines() if not line.startswith("X conn")]
        lines = printed or ["no output"]
        for text in (said, lines[-1]):  # one value, or events of which the last has the answer
            try:
                return json.loads(text)
            except ValueError:
                continue
        return {"error": lines[-1]}

    def genai(self, name: str, provider: str | None, capture: str = "0", **job: Any) -> Loop:
        """Run onnxruntime-genai's own loop, loop.py, on the package `name`."""
        return self.genai_on(self.packages[name], provider, capture, **job)

    def genai_on(self, package: Path, provider: str | None, capture: str, **job: Any) -> Loop:
        """Run it on the package in a folder."""
        path = self.root.windows_path(package)
        job = {"package": path, "provider": provider, "capture": capture, **job}
        file, out = self.root.work / "job.json", self.root.work / "out.npz"
        file.write_text(json.dumps(job))
        out.unlink(missing_ok=True)
        said = self.run("loop.py", "job.json", "out.npz")
        lines = [line for line in said.splitlines() if line.startswith('{"device"')]
        if not lines:
            return Loop("", [], np.zeros((0, 2)), _reason(said))
        answer = json.loads(lines[-1])
        return Loop(answer["device"], [*chain(*answer["answers"])], np.load(out)["logits"])


@dataclass(frozen=True)
class Loop:
    """What genai's loop gave: the device, the ids, and the logits [n, V] before each of them."""

    device: str
    ids: list[int]
    logits: np.ndarray
    error: str = ""


def _reason(said: str) -> str:
    lines = [line for line in said.splitlines() if "Error" in line and "cpuinfo" not in line]
    return lines[-1][:200] if lines else "no output"


def make_place(root: Root, *, tiny: bool) -> Place:
    """Make the Windows Python and the packages."""
    python = make_python(root.work / "python", root.work / "wheels", WHEELS)
    for script in SCRIPTS:
        shutil.copy(HERE / script, root.work)
    packages = {
        name: make_certified(root.work / "certified" / name, name, "directml")
        for name in PRECISIONS
    }
    if not tiny:
        packages["SmolLM2 int4"] = export_smollm2(root.work / "smollm2", "directml")
    return Place(root, python, packages)
