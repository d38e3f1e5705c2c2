"""What a server tells about its package, against the certificate's own JSON and `verify`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llama_onnx.exporter.packaging.export import export_package
from llama_onnx.exporter.packaging.options import Options
from llama_onnx.exporter.parity.prove import prove
from llama_onnx.exporter.sources import open_checkpoint
from llama_onnx.runtime.llama.model import Llama
from llama_onnx.runtime.measure.verify import VerifyReport, verify, verify_files
from llama_onnx.runtime.serving.about import NO_CERTIFICATE, about
from llama_onnx.targets import cpu
from llama_onnx.targets.package import DATA_FILE, ModelPackage, renew_manifest
from tests.support import tiny

CERTIFICATE = "parity/certificate.json"


@pytest.fixture(scope="module")
def proven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny package with a certificate. Read only."""
    root = tmp_path_factory.mktemp("proven")
    source = tiny.write_huggingface(root / "source")
    export_package(source, root / "proven", cpu.TARGET, Options("int8"))
    prove(root / "proven", open_checkpoint(source), tokens=4, longest=16, certify=True)
    return root / "proven"


@pytest.fixture(scope="module")
def verified(proven: Path) -> VerifyReport:
    return verify(proven)


@pytest.fixture(scope="module")
def tell(llama: Llama) -> Callable[..., dict[str, Any]]:
    """`about` a package in a folder, run as `llama` is."""

    def told(folder: Path, report: VerifyReport | None = None, **more: Any) -> dict[str, Any]:
        answer = about(ModelPackage.open(folder), llama.opened, report, **more)
        parsed: dict[str, Any] = json.loads(json.dumps(answer, allow_nan=False))
        assert parsed == answer
        return parsed

    return told


Tell = Callable[..., dict[str, Any]]


def change_certificate(proven: Path, out: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """Copy a package with another certificate, which its manifest lists."""
    shutil.copytree(proven, out)
    content = json.loads((out / CERTIFICATE).read_text("utf-8"))
    change(content)
    (out / CERTIFICATE).write_text(json.dumps(content), encoding="utf-8")
    package = ModelPackage.unchecked(out)
    assert package is not None
    renew_manifest(package, rewritten=[CERTIFICATE])
    return out


def test_the_facts_are_those_of_the_package(package: Path, tell: Tell) -> None:
    told = tell(package)
    size = sum(f.stat().st_size for f in package.rglob("*") if f.name != "manifest.json")
    assert (told["name"], told["precision"], told["bytes"]) == (package.name, "int4", size)
    assert (told["provider"], told["fallback"], told["adapters"]) == ("cpu", None, [])
    assert told["context_length"] == tiny.GQA.max_position_embeddings
    assert tell(package, context_length=64)["context_length"] == 64
    assert told["source"] == "checkpoint" and told["commit"] is None


def test_a_package_without_a_proof_says_so(package: Path, tell: Tell) -> None:
    told = tell(package)
    assert told["distance"]["grade"] is None and told["distance"]["figures"] is None
    assert told["distance"]["sentence"] == NO_CERTIFICATE
    assert told["verified"]["state"] == "not run"


def test_the_distance_is_the_one_in_the_certificate(proven: Path, tell: Tell) -> None:
    claim = json.loads((proven / CERTIFICATE).read_text("utf-8"))["validated"]["fidelity"]
    distance = tell(proven)["distance"]
    assert distance["grade"] == claim["grade"]
    assert distance["grade"] in distance["grades"]
    figures, shipped = distance["figures"], claim["shipped"]
    assert figures["mean_kl"] == shipped["mean_kl"]
    assert figures["same_top1"] == pytest.approx(1 - shipped["other_top1"])
    assert figures["perplexity_ratio"] == shipped["perplexity_ratio"]
    assert f"{shipped['positions']:,} positions" in distance["sentence"]
    assert not claim["trained"] and "no better than chance" in distance["sentence"]


def test_the_limits_that_hold_are_named(proven: Path, tell: Tell, tmp_path: Path) -> None:
    def better(content: dict[str, Any]) -> None:
        content["validated"]["fidelity"] |= {"original_perplexity": 9.0, "recipe": "int8"}
        loss = {"mean_kl": 0.004, "other_top1": 0.05, "perplexity_ratio": 1.004}
        content["validated"]["fidelity"]["shipped"] |= loss

    def worse(content: dict[str, Any]) -> None:
        better(content)
        content["validated"]["fidelity"]["shipped"] |= {"mean_kl": 0.05}

    good = tell(change_certificate(proven, tmp_path / "good", better))["distance"]
    assert good["grade"] == "indistinguishable"
    assert good["sentence"].endswith("within the limits of the recipe int8.")
    bad = tell(change_certificate(proven, tmp_path / "bad", worse))["distance"]
    assert bad["grade"] == "close"
    assert "beyond the limits of the recipe int8" in bad["sentence"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda c: c["validated"].pop("fidelity"), "before the distance from the original"),
        (lambda c: c["files"].update({DATA_FILE: "0" * 64}), f"a different {DATA_FILE}"),
        (lambda c: c.update(precision="int4"), "cannot be used"),
        (lambda c: c["validated"]["fidelity"]["shipped"].update(mean_kl="x"), "is damaged"),
    ],
    ids=["old", "of other files", "of another precision", "damaged"],
)
def test_a_certificate_that_says_nothing_here_gives_no_figures(
    change: Callable[[dict[str, Any]], None],
    sentence: str,
    proven: Path,
    tell: Tell,
    tmp_path: Path,
) -> None:
    distance = tell(change_certificate(proven, tmp_path / "changed", change))["distance"]
    assert distance["grade"] is None and distance["figures"] is None
    assert sentence in distance["sentence"]


def test_verified_is_what_verify_found(proven: Path, verified: VerifyReport, tell: Tell) -> None:
    told = tell(proven, verified)["verified"]
    assert verified.passed and told["state"] == "verified"
    assert f"All {verified.integrity.files} files are intact" in told["sentence"]
    only_files = tell(proven, verify_files(proven))["verified"]
    assert only_files["state"] == "not run" and "not replayed" in only_files["sentence"]


def test_a_failed_verification_names_what_failed(
    proven: Path, verified: VerifyReport, tell: Tell, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(proven, tmp_path / "copy"))
    (copy / "LICENSE.txt").write_text("A licence", encoding="utf-8")
    told = tell(proven, verify_files(copy))["verified"]
    assert told["state"] == "failed" and told["sentence"].startswith("LICENSE.txt changed since")
    missed = tuple(replace(check, value=1e9) for check in verified.checks)
    told = tell(proven, replace(verified, checks=missed))["verified"]
    assert told["state"] == "failed"
    assert "does not compute the certified results: shipped" in told["sentence"]
