"""The bill of materials: valid by CycloneDX's own schema, and true."""

from __future__ import annotations

import json
import shutil
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from llama_onnx.exporter.cli import main
from llama_onnx.exporter.parity.prove import prove
from llama_onnx.exporter.sources import open_checkpoint
from llama_onnx.runtime.bundles.bom import make_bom
from llama_onnx.runtime.bundles.make import certificate_of
from llama_onnx.targets.package import MANIFEST, ModelPackage, write_manifest
from tests.support.packages import make_package

APACHE = "Apache License\nVersion 2.0, January 2004\n"


@pytest.fixture(scope="module")
def certified(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bom ä")
    package = make_package(folder, "int4")
    prove(package, open_checkpoint(folder / "checkpoint"), tokens=4, longest=16, certify=True)
    return package


def read(text: str) -> dict[str, Any]:
    """Return the content of a bill of materials that CycloneDX's schema accepts."""
    problem = JsonStrictValidator(SchemaVersion.V1_6).validate_str(text)
    assert problem is None, str(problem)
    found: dict[str, Any] = json.loads(text)
    return found


def with_source(package: Path, folder: Path, **source: Any) -> ModelPackage:
    shutil.copytree(package, folder)
    manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
    manifest["source"] |= source
    return write_manifest(folder, manifest)


def test_the_schema_refuses_what_it_should(package: Path) -> None:
    content = json.loads(make_bom(ModelPackage.open(package), None))
    content["metadata"]["component"]["type"] = "llama"
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(content)) is not None


def test_every_file_by_its_hash(package: Path) -> None:
    opened = ModelPackage.open(package)
    content = read(make_bom(opened, None))
    assert content["components"]
    for each in content["components"]:
        (found,) = each["hashes"]
        digest = sha256((package / each["name"]).read_bytes()).hexdigest()
        assert found == {"alg": "SHA-256", "content": digest}
    assert {each["name"] for each in content["components"]} == set(opened.files)
    model = content["metadata"]["component"]
    assert "quantitativeAnalysis" not in model["modelCard"]


def test_what_was_measured(certified: Path) -> None:
    opened = ModelPackage.open(certified)
    certificate = certificate_of(opened)
    assert certificate is not None
    model = read(make_bom(opened, certificate))["metadata"]["component"]
    shipped = certificate.content["validated"]["fidelity"]["shipped"]
    metrics = model["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]
    assert [float(one["value"]) for one in metrics] == pytest.approx(
        [shipped["mean_kl"], shipped["other_top1"], shipped["perplexity_ratio"]], rel=1e-5
    )
    low, high = (float(v) for v in metrics[0]["confidenceInterval"].values())
    assert (low + high) / 2 == pytest.approx(shipped["mean_kl"], rel=1e-4)


def test_license_and_source(package: Path, tmp_path: Path) -> None:
    digest = "ab" * 32
    hashes = {"from": "hub", "sha256": {"a b.safetensors": digest}}
    source = {"name": "me/My-Llama", "commit": "0" * 40, "hashes": hashes}
    copied = with_source(package, tmp_path / "copy", **source)
    for file in copied.path.glob("LICENSE*"):
        file.write_text(APACHE, "utf-8")
    model = read(make_bom(copied, None))["metadata"]["component"]
    assert model["licenses"] == [{"license": {"id": "Apache-2.0"}}]
    (ancestor,) = model["pedigree"]["ancestors"]
    assert (ancestor["name"], ancestor["version"]) == ("me/My-Llama", "0" * 40)
    assert ancestor["externalReferences"][0]["url"] == "https://huggingface.co/me/My-Llama"
    assert ancestor["components"][0]["hashes"] == [{"alg": "SHA-256", "content": digest}]


@pytest.mark.parametrize(
    "source",
    [
        {"name": "x" * 3000 + " <script>\u2028", "commit": "no commit"},
        {"hashes": {"sha256": {"a": "not a hash", "b": 7}, "md5": [1]}},
        {"hashes": "none", "name": None},
    ],
)
def test_a_strange_manifest_makes_a_valid_one(
    package: Path, tmp_path: Path, source: dict[str, Any]
) -> None:
    read(make_bom(with_source(package, tmp_path / "copy", **source), None))


def test_the_same_package_has_the_same(package: Path, tmp_path: Path) -> None:
    first = make_bom(ModelPackage.open(package), None)
    other = shutil.copytree(package, tmp_path / package.name)
    assert make_bom(ModelPackage.open(other), None) == first


def test_the_command_writes_it_into_the_bundle(certified: Path, tmp_path: Path) -> None:
    out = tmp_path / "Bündel"
    arguments = ["bundle", str(certified), str(out), "--for", "hub", "--bom"]
    done = CliRunner().invoke(main, [*arguments, "--i-have-the-licence"])
    assert done.exit_code == 0, done.output
    content = read((out / "bom.cdx.json").read_text("utf-8"))
    assert content["metadata"]["component"]["modelCard"]["quantitativeAnalysis"]
    assert "bom.cdx.json" in json.loads((out / "bundle.json").read_text("utf-8"))["files"]
    done = CliRunner().invoke(main, ["bundle", *arguments[1:2], str(tmp_path / "plain"), "--for"])
    assert not (tmp_path / "plain" / "bom.cdx.json").exists()


def test_the_hub_shows_the_figures(certified: Path, tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    out = tmp_path / "out"
    arguments = ["bundle", str(certified), str(out), "--for", "hub", "--i-have-the-licence"]
    assert CliRunner().invoke(main, arguments).exit_code == 0
    card = ModelCard.load(out / "README.md")
    certificate = certificate_of(ModelPackage.open(certified))
    assert certificate is not None and card.data.eval_results
    shown = {result.metric_type: result.metric_value for result in card.data.eval_results}
    shipped = certificate.content["validated"]["fidelity"]["shipped"]
    assert shown["kl_divergence"] == pytest.approx(shipped["mean_kl"], abs=1e-6)
    assert shown["same_top1"] == pytest.approx(1 - shipped["other_top1"], abs=1e-6)
