"""A package's proof: what `verify` finds with onnxruntime alone, and what it does not let pass."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from safetensors.numpy import load_file, save_file

from llama_onnx.exporter.cli import main
from llama_onnx.exporter.packaging.export import export_package
from llama_onnx.exporter.packaging.options import Options
from llama_onnx.exporter.parity.prove import prove
from llama_onnx.exporter.sources import open_checkpoint
from llama_onnx.runtime.measure import verify as verify_module
from llama_onnx.runtime.measure.certificate import MAX_BYTES, read_certificate
from llama_onnx.runtime.measure.graph_session import GraphSession
from llama_onnx.runtime.measure.metrics import position_figures
from llama_onnx.runtime.measure.situations import SITUATIONS
from llama_onnx.runtime.measure.verify import VerifyReport, verify
from llama_onnx.targets import cpu
from llama_onnx.targets.errors import PackageError
from llama_onnx.targets.listing import hash_file
from llama_onnx.targets.package import DATA_FILE, MANIFEST, MODEL_FILE
from llama_onnx.targets.providers import CPU
from tests.support import tiny

PRECISIONS = ("fp32", "fp16", "int8", "int4")


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A certified package of each precision."""
    root = tmp_path_factory.mktemp("certified ä 日本")
    source = tiny.write_huggingface(root / "source")
    made = {}
    for precision in PRECISIONS:
        made[precision] = root / precision
        export_package(source, root / precision, cpu.TARGET, Options(precision))
        report = prove(
            root / precision, open_checkpoint(source), tokens=4, longest=16, certify=True
        )
        assert report.passed
    return made


@pytest.fixture
def copy(packages: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: Path(shutil.copytree(packages[name], tmp_path / name))


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["verify", *map(str, arguments)])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_sound_package_verifies(packages: dict[str, Path], precision: str) -> None:
    report = verify(packages[precision], CPU)
    assert report.passed
    assert [entry.situation for entry in report.situations] == [s.name for s in SITUATIONS]
    assert report.divergences == (None,) * 4
    assert {c.threshold.measure for c in report.checks} >= {"shipped"}
    exact = precision in ("fp32", "fp16")
    for entry in report.situations:
        assert (entry.shipped.relative_l2 < 1e-5) == exact
        assert entry.shipped.mean_kl <= entry.shipped.mean_kl_bound
    assert report.full is not None and report.full.positions == 8


def test_the_certificate_is_small_and_in_the_manifest(packages: dict[str, Path]) -> None:
    folder = packages["int4"] / "parity"
    assert sum(file.stat().st_size for file in folder.iterdir()) <= MAX_BYTES
    files = json.loads((packages["int4"] / MANIFEST).read_text("utf-8"))["files"]
    assert {"parity/certificate.json", "parity/reference.safetensors"} <= files.keys()


def test_divergence_from_the_likeliest_tokens_is_near_the_true_one(
    packages: dict[str, Path],
) -> None:
    """KL from the stored tokens against KL from all logits, at the positions stored whole."""
    certificate = read_certificate(packages["int4"])
    graph = GraphSession.open(packages["int4"])
    for rows in certificate.full:
        passage = certificate.passages[rows.passage]
        here = graph.step(passage.ids)[0][rows.positions]
        none = np.full(len(here), -1)
        whole = position_figures(rows.logits, here, none).kl
        cut = position_figures(certificate.package[rows.passage][rows.positions], here, none)
        assert (cut.kl <= whole + 1e-9).all() and (whole <= cut.kl_bound).all()
        np.testing.assert_allclose(cut.kl, whole, rtol=0.5)


def test_verify_needs_neither_torch_nor_onnx(packages: dict[str, Path]) -> None:
    script = (
        "import sys; from pathlib import Path\n"
        "from llama_onnx.runtime.measure.verify import verify\n"
        "from llama_onnx.targets.providers import CPU\n"
        "assert verify(Path(sys.argv[1]), CPU).passed\n"
        "heavy = {'torch', 'onnx', 'onnx_ir', 'transformers'}\n"
        "assert not heavy & {*sys.modules}\n"
    )
    subprocess.run([sys.executable, "-c", script, str(packages["int4"])], check=True)


# What must not pass


def rewrite(package: Path) -> None:
    """Give `package` a manifest that agrees with its files, as a forger would."""
    manifest = json.loads((package / MANIFEST).read_text("utf-8"))
    for name, entry in manifest["files"].items():
        entry |= {"size": (package / name).stat().st_size, "sha256": hash_file(package / name)}
    (package / MANIFEST).write_text(json.dumps(manifest), "utf-8")


def recertify(package: Path) -> None:
    """Let the certificate believe that it was made for these files."""
    file = package / "parity" / "certificate.json"
    content = json.loads(file.read_text("utf-8"))
    content["files"] = {name: hash_file(package / name) for name in content["files"]}
    content["reference"]["sha256"] = hash_file(package / "parity" / "reference.safetensors")
    file.write_text(json.dumps(content), "utf-8")
    rewrite(package)


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x40]))


def test_a_flipped_byte_is_found_before_anything_runs(copy: Callable[[str], Path]) -> None:
    package = copy("int4")
    flip(package / DATA_FILE, 1000)
    report = verify(package, CPU)
    assert not report.passed
    assert report.integrity.altered == (DATA_FILE,)
    assert report.situations == ()


@pytest.mark.parametrize("place", [0, 0.31, 0.77, 1])
def test_a_flipped_byte_is_found_at_any_place_of_the_data(
    copy: Callable[[str], Path], place: float
) -> None:
    package = copy("int8")
    flip(package / DATA_FILE, int(place * ((package / DATA_FILE).stat().st_size - 1)))
    report = verify(package, CPU)
    assert (report.passed, report.intact) == (False, False)
    assert report.integrity.altered == (DATA_FILE,)
    assert report.situations == () and report.placement is None


def test_the_graph_is_opened_only_if_all_files_but_the_data_are_intact(
    copy: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is opened while the data is hashed; a graph that changed is not opened at all."""
    opened: list[Path] = []

    def refuse(path: Path, *_: object, **__: object) -> None:
        opened.append(path)
        raise PackageError("the graph does not open.")

    monkeypatch.setattr(verify_module, "open_session", refuse)
    changed = copy("fp32")
    flip(changed / MODEL_FILE, 5000)
    assert verify(changed, CPU).integrity.altered == (MODEL_FILE,)
    assert not opened
    # Altered data explains why a graph does not open; without it, the reason is the graph's.
    flip(changed / MODEL_FILE, 5000)
    flip(changed / DATA_FILE, 1000)
    assert verify(changed, CPU).integrity.altered == (DATA_FILE,)
    assert opened == [changed / MODEL_FILE]
    flip(changed / DATA_FILE, 1000)
    with pytest.raises(PackageError, match="does not open"):
        verify(changed, CPU)


def test_less_is_replayed_of_a_large_package_and_that_is_said(
    packages: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = verify(packages["fp32"], CPU)
    monkeypatch.setattr(verify_module, "_LARGE", 1)
    less = verify(packages["fp32"], CPU)
    assert (whole.reduced, less.reduced, less.passed) == (False, True, True)
    counts = [{s.situation: s.shipped.positions for s in r.situations} for r in (whole, less)]
    fewer = {name for name in counts[0] if counts[0][name] != counts[1][name]}
    assert fewer == {"left_padding", "right_padding", "two_at_once"}
    assert "sampled    batches" in run(packages["fp32"]).stdout
    assert json.loads(run(packages["fp32"], "--json").stdout)["reduced"] is True


def test_files_of_another_package_are_stale(
    copy: Callable[[str], Path], packages: dict[str, Path]
) -> None:
    package = copy("int4")
    shutil.copytree(packages["int8"] / "parity", package / "parity", dirs_exist_ok=True)
    rewrite(package)
    report = verify(package, CPU)
    assert not report.passed
    assert set(report.integrity.stale) == {"model.onnx", DATA_FILE}


def test_a_stale_tokenizer_is_found_even_if_manifest_and_certificate_agree(
    copy: Callable[[str], Path],
) -> None:
    package = copy("fp32")
    content = json.loads((package / "tokenizer.json").read_text("utf-8"))
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (package / "tokenizer.json").write_text(json.dumps(content), "utf-8")
    with pytest.raises(PackageError, match=r"tokenizer\.json is damaged"):
        verify(package, CPU)
    recertify(package)
    report = verify(package, CPU)
    assert not report.passed and report.integrity.tokens is False
    assert "tokens that differ from" in run(package).stdout


def _scale(package: Path) -> None:
    data = np.memmap(package / DATA_FILE, np.float32, mode="r+")
    data[: len(data) // 2] *= 1.02
    data.flush()


def _epsilon(package: Path) -> None:
    model = onnx.load(package / "model.onnx", load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "epsilon":
                attribute.f = 1e-2
    onnx.save(model, package / "model.onnx")


@pytest.mark.parametrize("fault", [_scale, _epsilon])
def test_a_model_that_computes_something_else_is_found_without_any_hash(
    copy: Callable[[str], Path], fault: Callable[[Path], None]
) -> None:
    package = copy("fp32")
    fault(package)
    recertify(package)
    report = verify(package, CPU)
    assert report.integrity.passed and not report.passed
    missed = {c.situation for c in report.checks if not c.passed}
    assert missed >= {s.name for s in SITUATIONS}


def test_a_reference_changed_behind_the_certificate_is_refused(
    copy: Callable[[str], Path],
) -> None:
    package = copy("fp32")
    flip(package / "parity" / "reference.safetensors", 5000)
    with pytest.raises(PackageError, match="is not the file that the certificate"):
        verify(package, CPU)


def edit(package: Path, change: Callable[[dict[str, Any]], object]) -> None:
    file = package / "parity" / "certificate.json"
    content = json.loads(file.read_text("utf-8"))
    change(content)
    file.write_text(json.dumps(content), "utf-8")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda c: c.update(format_version=2), "format 2, .* upgrade llama-onnx"),
        (lambda c: c.pop("vocab_size"), r"is damaged: 'vocab_size' is missing\.$"),
        (lambda c: c.update(vocab_size=5), "has the wrong type or size"),
        (lambda c: c["passages"].pop(), None),
        (lambda c: c["passages"].append({"text": "a", "prompt": 1}), r"'\d+\.ids' is missing"),
        (lambda c: c["passages"][0].update(prompt=10**6), "has the wrong type or size"),
        (lambda c: c["thresholds"][0].pop("limit"), "is damaged: 'limit' is missing"),
        (lambda c: c["thresholds"].clear(), None),
    ],
)
def test_a_certificate_that_makes_no_sense_is_one_sentence(
    copy: Callable[[str], Path], change: Callable[[dict[str, Any]], object], sentence: str | None
) -> None:
    package = copy("fp32")
    edit(package, change)
    rewrite(package)
    if sentence is None:  # less is proven, but what is there holds
        assert verify(package, CPU).passed
        return
    with pytest.raises(PackageError, match=sentence):
        verify(package, CPU)


def test_arrays_of_other_sizes_are_refused(copy: Callable[[str], Path]) -> None:
    package = copy("fp32")
    file = package / "parity" / "reference.safetensors"
    arrays = load_file(file)
    arrays["0.package.logits"] = arrays["0.package.logits"][:-1].copy()
    save_file(arrays, file)
    recertify(package)
    with pytest.raises(
        PackageError, match=r"certificate\.json is damaged: an entry has the wrong type or size"
    ):
        verify(package, CPU)


def test_without_a_certificate_the_command_says_how_to_get_one(copy: Callable[[str], Path]) -> None:
    package = copy("fp32")
    shutil.rmtree(package / "parity")
    result = run(package)
    assert result.exit_code == 1
    manifest = json.loads((package / MANIFEST).read_text("utf-8"))
    for name in list(manifest["files"]):
        if name.startswith("parity/"):
            del manifest["files"][name]
    (package / MANIFEST).write_text(json.dumps(manifest), "utf-8")
    result = run(package)
    assert result.exit_code == 1
    assert "has no certificate: make one with `llama-onnx validate --certify`" in result.stderr


def test_a_package_that_fails_gets_no_certificate(tmp_path: Path) -> None:
    source = tiny.write_huggingface(tmp_path / "source")
    other = tiny.write_huggingface(tmp_path / "other", seed=1)
    export_package(source, tmp_path / "out", cpu.TARGET, Options("fp32"))
    report = prove(tmp_path / "out", open_checkpoint(other), tokens=4, longest=8, certify=True)
    assert not report.passed
    assert not (tmp_path / "out" / "parity").exists()


def test_a_full_disk_leaves_the_package_as_it_was(
    packages: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = Path(shutil.copytree(packages["fp32"], tmp_path / "ä 日本"))
    before = {path: path.read_bytes() for path in package.rglob("*") if path.is_file()}

    def full(path: Path, *_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(Path, "write_bytes", full)
    source = packages["fp32"].parent / "source"
    arguments = ("--reference", source, "--tokens", 4, "--prompt-tokens", 8, "--certify")
    result = CliRunner().invoke(main, ["validate", str(package), *map(str, arguments)])
    assert result.exit_code == 1
    assert re.search(r"^Error: .*No space left on device; free some space\.$", result.stderr)
    assert {path: path.read_bytes() for path in package.rglob("*") if path.is_file()} == before
    assert not (package / "parity.partial").exists()


def test_files_that_changed_since_the_export_get_no_certificate(
    copy: Callable[[str], Path], packages: dict[str, Path]
) -> None:
    package = copy("fp32")
    (package / "LICENSE.txt").write_text("A licence", "utf-8")  # it was: a licence
    before = (package / "parity" / "certificate.json").read_bytes()
    source = open_checkpoint(packages["fp32"].parent / "source")
    report = prove(package, source, tokens=4, longest=8, certify=True)
    assert not report.passed
    assert report.about.altered == ("LICENSE.txt",)
    assert (package / "parity" / "certificate.json").read_bytes() == before


# The command


def test_the_command_prints_a_verdict(packages: dict[str, Path]) -> None:
    result = run(packages["int4"], "--threads", 1)
    assert result.exit_code == 0, result.output
    assert "ran on     CPUExecutionProvider: 100.0 % of the nodes, 100.0 % of the weights" in (
        result.stdout
    )
    assert "batch, padded left" in result.stdout
    assert "4 of 4 continuations match the certificate" in result.stdout
    assert "passed: all files are intact" in result.stdout
    assert result.stderr == ""


def test_the_command_writes_json(packages: dict[str, Path]) -> None:
    content = json.loads(run(packages["fp32"], "--json").stdout)
    assert content["passed"] is True
    assert content["provider"] == "cpu"
    assert content["integrity"]["altered"] == []
    assert len(content["situations"]) == len(SITUATIONS)
    assert all(check["passed"] for check in content["checks"])


def test_a_provider_that_is_not_there_is_an_error(packages: dict[str, Path]) -> None:
    result = run(packages["fp32"], "--provider", "cuda")
    assert result.exit_code == 1
    assert "onnxruntime-gpu" in result.stderr and "pip install" in result.stderr


def test_a_fallback_is_allowed_only_on_request_and_is_said(packages: dict[str, Path]) -> None:
    result = run(packages["fp32"], "--provider", "cuda", "--allow-fallback")
    assert "fallback   " in result.stdout
    assert "ran on     CPUExecutionProvider" in result.stdout


def test_export_proves(tmp_path: Path) -> None:
    source = tiny.write_huggingface(tmp_path / "ä 日本")
    arguments = ["export", str(source), str(tmp_path / "out"), "--prove", "--json"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["parity"]["passed"] is True
    assert verify(tmp_path / "out", CPU).passed


def figures(report: VerifyReport) -> dict[str, float]:
    return {entry.situation: entry.shipped.relative_l2 for entry in report.situations}


def test_threads_change_nothing_but_the_order_of_sums(packages: dict[str, Path]) -> None:
    one, two = (verify(packages["fp32"], CPU, threads=n) for n in (1, 2))
    assert one.passed and two.passed
    for name, value in figures(one).items():
        assert abs(value - figures(two)[name]) < 1e-6
