"""`llama_onnx_verify` against the Python runtime's `verify`, and what it must find."""

from __future__ import annotations

import csv
import hashlib
import json
import re
import shutil
import sys
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from llama_onnx.runtime.measure.verify import verify
from tests.support.native import NATIVE
from tests.support.packages import greedy, renew_hashes

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="built with gcc for Linux's libraries"),
    pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed"),
]

EARLIER = Path(__file__).parents[2] / "support" / "earlier_packages" / "0.1.0-int4"
NAMES = {"one pass": "prefill", "token by token": "decode", "rewound and continued": "rewind"}


def verified(sample: Any, built: Path, package: Path) -> list[str]:
    """Return what `llama_onnx_verify` reports; it raises RuntimeError for what it finds."""
    lines: list[str] = []
    with sample.Model(package, library=built / "libllama_onnx.so", verify=lines.append) as model:
        assert model.generate_ids([1, 5, 6], 4) == greedy(package, [1, 5, 6], 4)
    return lines


@pytest.fixture
def certified(tmp_path: Path) -> Path:
    return Path(shutil.copytree(EARLIER, tmp_path / "ä ü 日本"))


def test_the_figures_are_those_of_the_runtime(sample: Any, built: Path, certified: Path) -> None:
    first, *lines = verified(sample, built, certified)
    assert first == "files: as the manifest lists them"
    report = verify(certified)
    shipped = {entry.situation: entry.shipped for entry in report.situations}
    seen = set()
    for line in lines:
        found = re.fullmatch(r"(.+), (\w+): (\S+), at most (\S+)", line)
        assert found, line
        situation, metric, value, _ = found.groups()
        # The lines have three digits.
        expected = getattr(shipped[NAMES[situation]], metric)
        assert float(value) == pytest.approx(expected, rel=0.01), line
        seen.add(situation)
    assert seen == set(NAMES)


def test_the_limits_are_those_of_the_runtime() -> None:
    table = files("llama_onnx.runtime.measure").joinpath("thresholds.csv").read_text("utf-8")
    wanted = [
        (*(row[key] for key in ("precision", "activations", "provider", "quantizer")),
         row["measure"], row["metric"], float(row["limit"]))
        for row in csv.DictReader(table.splitlines())
        if row["measure"] in ("shipped", "replay")
    ]  # fmt: skip
    text = (NATIVE / "certificate.h").read_text("utf-8")
    rows = re.findall(r'^    \{((?:"\w+", ){6})([\d.e-]+)\},$', text, re.MULTILINE)
    assert [(*re.findall(r"\w+", names), float(limit)) for names, limit in rows] == wanted


def change_certificate(package: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the certificate, and make everything else consistent with it."""
    file = package / "parity" / "certificate.json"
    content = json.loads(file.read_text("utf-8"))
    for name in content["files"]:
        content["files"][name] = hashlib.sha256((package / name).read_bytes()).hexdigest()
    reference = (package / "parity" / "reference.safetensors").read_bytes()
    content["reference"]["sha256"] = hashlib.sha256(reference).hexdigest()
    change(content)
    file.write_text(json.dumps(content), "utf-8")
    renew_hashes(package)


def refused(sample: Any, built: Path, package: Path, message: str) -> None:
    with pytest.raises(RuntimeError, match=message) as caught:
        verified(sample, built, package)
    assert str(caught.value).endswith(".")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["model.onnx", "model.onnx.data", "parity/reference.safetensors", "LICENSE.txt"]
)
def test_a_flipped_bit(sample: Any, built: Path, certified: Path, name: str) -> None:
    data = bytearray((certified / name).read_bytes())
    data[len(data) // 2] ^= 1
    (certified / name).write_bytes(data)
    refused(sample, built, certified, f"the hash of {name} differs from manifest.json")


def test_files_that_are_missing_or_new(sample: Any, built: Path, certified: Path) -> None:
    (certified / "selftest.txt").write_text("")
    (certified / "SHA256SUMS").write_text("")
    verified(sample, built, certified)
    (certified / "more.txt").write_text("")
    refused(sample, built, certified, r"manifest\.json does not name more\.txt")
    (certified / "more.txt").unlink()
    (certified / "model.onnx.data").unlink()
    refused(sample, built, certified, r"model\.onnx\.data is missing")


def test_a_wrong_graph(sample: Any, built: Path, certified: Path) -> None:
    """Other weights with hashes that fit: only the replay can find them."""
    data = bytearray((certified / "model.onnx.data").read_bytes())
    for place in range(len(data) // 4, len(data) // 2):
        data[place] ^= 0x11
    (certified / "model.onnx.data").write_bytes(data)
    renew_hashes(certified)
    refused(sample, built, certified, r"is not the file that the certificate was made for")
    change_certificate(certified, lambda content: None)
    assert not verify(certified).passed
    refused(sample, built, certified, r"does not compute what its certificate says: one pass, ")


def test_a_certificate_can_only_be_stricter(sample: Any, built: Path, certified: Path) -> None:
    def widen(content: dict[str, Any]) -> None:
        for row in content["thresholds"]:
            row["limit"] = 1e9

    before = verified(sample, built, certified)
    change_certificate(certified, widen)
    lines = verified(sample, built, certified)
    limits = {line.rpartition(" ")[2] for line in before}
    assert limits <= {line.rpartition(" ")[2] for line in lines}

    def narrow(content: dict[str, Any]) -> None:
        for row in content["thresholds"]:
            row["limit"] = 1e-30

    change_certificate(certified, narrow)
    refused(sample, built, certified, "does not compute what its certificate says")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.update(format_version=2), "is of another format than 1"),
        (lambda content: content.update(precision="fp32"), "is for fp32, but the package is int4"),
        (lambda content: content.update(activations="fp16"), "does not have fp16 activations"),
        (lambda content: content.update(vocab_size=5), "is damaged|another vocabulary"),
        (lambda content: content.update(thresholds=5), "it has no thresholds"),
        (lambda content: content["files"].pop("model.onnx"), "it does not cover model.onnx"),
        (lambda content: content["passages"].clear(), "is damaged"),
        (lambda content: content["passages"][0].update(prompt=0), "is damaged"),
        (lambda content: content["passages"][0].update(text="x"), "encodes a text"),
        (lambda content: content["reference"].update(sha256=""), "is missing, or is not the file"),
        (
            lambda content: content["thresholds"].append(
                {"measure": "shipped", "metric": "p99_kl", "limit": 1}
            ),
            "limits p99_kl, which is not measured here",
        ),
    ],
)
def test_a_certificate_that_is_damaged(
    sample: Any, built: Path, certified: Path, change: Any, message: str
) -> None:
    change_certificate(certified, change)
    refused(sample, built, certified, message)


def test_reference_values_out_of_their_bounds(sample: Any, built: Path, certified: Path) -> None:
    file = certified / "parity" / "reference.safetensors"
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["0.package.ids"]["data_offsets"] = [0, 1 << 40]
    text = json.dumps(header).encode()
    for changed in (
        len(text).to_bytes(8, "little") + text + data[8 + size :],
        b"\xff" * 8 + data[8:],
        data[:20],
        b"",
    ):
        file.write_bytes(changed)
        change_certificate(certified, lambda content: None)
        refused(sample, built, certified, "is damaged|is missing")


def test_no_certificate(sample: Any, built: Path, package: Path) -> None:
    refused(sample, built, package, "has no certificate that can be read")
