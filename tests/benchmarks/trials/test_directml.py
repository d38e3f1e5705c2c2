"""`nox -s directml`: what it says where it cannot run, and how it judges tokens."""

from __future__ import annotations

import os
import platform
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime as ort
import pytest

from benchmarks.trials.directml.findings import FINDINGS, Finding
from benchmarks.trials.directml.place import DEVICE, Loop
from benchmarks.trials.directml.root import Root
from benchmarks.trials.directml.tokens import compare

NEEDS = "a Debian root with Wine, which needs Linux on x86-64, the user root, debootstrap"


@pytest.fixture
def able(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine that has everything, as far as it says."""
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    return monkeypatch


@pytest.mark.parametrize(
    ("owner", "name", "value", "said"),
    [
        (platform, "machine", lambda: "aarch64", "this is Linux on aarch64."),
        (os, "geteuid", lambda: 1000, "run it as root."),
        (shutil, "which", lambda name: None, "run `apt-get install debootstrap util-linux gcc"),
        (shutil, "disk_usage", lambda path: SimpleNamespace(free=1), "has less."),
    ],
    ids=["another processor", "another user", "no tools", "no room"],
)
def test_a_machine_that_cannot_gets_one_sentence(
    able: pytest.MonkeyPatch, tmp_path: Path, owner: object, name: str, value: object, said: str
) -> None:
    able.setattr(owner, name, value)
    with pytest.raises(SystemExit) as ended:
        Root.make(tmp_path / "root", tmp_path / "work")
    text = str(ended.value)
    assert NEEDS in text and said in text and "\n" not in text
    assert not (tmp_path / "root").exists()


def loop(ids: list[int], *logits: list[float], device: str = DEVICE) -> Loop:
    return Loop(device, ids, np.array(logits, np.float32))


def test_tokens_are_judged_by_the_logits() -> None:
    expected = loop([0, 1], [2.0, 1.0], [1.00, 1.01], device="CPU")
    same = compare("x", loop([0, 1], [2.01, 1.0], [1.00, 1.02]), expected, 2)
    assert (
        same.holds
        and same.said == "2 of 2; logits differ by 0.01 at most, at a standard deviation of 0.43"
    )
    tie = compare("x", loop([0, 0], [2.01, 1.0], [1.02, 1.01]), expected, 2)
    assert tie.holds and "1 of 2" in tie.said and "a near-tie at token 2" in tie.said
    wrong = compare("x", loop([1, 1], [2.00, 2.2], [1.00, 1.01]), expected, 2)
    assert not wrong.holds, "the CPU's two are farther apart than rounding explains"


def test_another_device_never_passes() -> None:
    expected = loop([0], [2.0, 1.0], device="CPU")
    assert not compare("x", loop([0], [2.0, 1.0], device="CPU"), expected, 1).holds
    failed = compare("x", Loop("", [], np.zeros((0, 2)), "Error: no device"), expected, 1)
    assert not failed.holds and failed.said == "Error: no device"


@pytest.mark.parametrize("finding", FINDINGS, ids=lambda finding: finding.folder)
def test_a_finding_expects_what_the_cpu_computes(finding: Finding) -> None:
    """The folders in docs are from DirectML and the CPU of an older ONNX Runtime, under Wine."""
    folder = Path(__file__).parents[3] / "docs" / "findings" / finding.folder
    session = ort.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    computed = session.run(["y"], dict(np.load(folder / "input.npz")))[0].astype(np.float64)
    expected, found = (
        np.load(folder / f"{name}.npz")["y"].astype(np.float64) for name in ("expected", "found")
    )
    largest = np.nanmax(np.abs(expected))
    assert np.nanmax(np.abs(computed - expected)) <= largest / 256
    assert np.nanmax(np.abs(found - expected)) > largest / 4
    assert finding.sentence in (folder / "reproduce.py").read_text("utf-8")
