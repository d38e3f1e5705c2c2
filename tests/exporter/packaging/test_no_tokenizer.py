"""Packages without a tokenizer: the graph, for token ids."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from click.testing import CliRunner, Result

from llama_onnx.exporter.cli import main
from llama_onnx.exporter.packaging.export import export_package
from llama_onnx.exporter.packaging.options import Options
from llama_onnx.runtime.llama.model import Llama
from llama_onnx.targets.cpu import TARGET
from llama_onnx.targets.errors import CheckpointError, UsageError
from llama_onnx.targets.package import ModelPackage
from tests.support import tiny
from tests.support.adapters import write_adapter
from tests.support.packages import greedy

Array = npt.NDArray[np.float32]
IDS_ONLY = (
    "has no tokenizer and takes token ids only: to use text, add the tokenizer to the checkpoint "
    "and export it without --no-tokenizer."
)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [*map(str, arguments)])


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint without any tokenizer."""
    folder = tiny.write_huggingface(tmp_path_factory.mktemp("bare") / "checkpoint")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    return folder


@pytest.fixture(scope="module")
def package(source: Path) -> Path:
    """That, exported by the command line."""
    out = source.with_name("out")
    said = run("export", source, out, "--precision", "fp32", "--no-tokenizer")
    assert said.exit_code == 0, said.output
    assert "It has no tokenizer: it takes token ids only." in said.output
    return out


def test_without_the_option_the_refusal_names_it(source: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"neither a tokenizer\.json.* pass --no-tokenizer"):
        export_package(source, tmp_path / "out", TARGET, Options("int4", quantizer="rtn"))
    assert list(tmp_path.iterdir()) == []


def test_the_manifest_says_so_and_no_file_of_a_tokenizer_is_there(package: Path) -> None:
    opened = ModelPackage.open(package)
    assert opened.manifest["tokenizer"] is False
    assert opened.verify() == []
    assert not [name for name in opened.files if name.startswith(("tokenizer", "chat_template"))]


def test_a_package_with_one_says_that_too(package_fp32: Path) -> None:
    opened = ModelPackage.open(package_fp32)
    assert opened.manifest["tokenizer"] is True
    opened.require_tokenizer()
    # Packages of earlier versions do not have the key.
    earlier = {key: value for key, value in opened.manifest.items() if key != "tokenizer"}
    assert ModelPackage(opened.path, earlier).has_tokenizer


def test_genai_gives_the_tokens_of_the_same_package_with_one(
    package: Path, package_fp32: Path
) -> None:
    assert greedy(package, [1, 5, 6], 12) == greedy(package_fp32, [1, 5, 6], 12)


def test_the_option_leaves_out_a_tokenizer_that_is_there(tmp_path: Path) -> None:
    source = tiny.write_huggingface(tmp_path / "checkpoint")
    out = tmp_path / "out"
    export_package(source, out, TARGET, Options("int4", quantizer="rtn"), tokenizer=False)
    assert not (out / "tokenizer.json").exists()
    said = run("validate", out, "--reference", source, "--tokens", 4, "--prompt-tokens", 8)
    assert said.exit_code == 0, said.output
    assert "or none in the package" in said.output


def test_an_adapter_s_tokenizer_is_compared_with_nothing(source: Path, tmp_path: Path) -> None:
    layers = range(tiny.GQA.num_hidden_layers)
    factors = {f"model.layers.{layer}.self_attn.q_proj": tiny_factors() for layer in layers}
    folder = write_adapter(tmp_path / "adapter", factors)
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    result = export_package(
        source,
        tmp_path / "out",
        TARGET,
        Options("fp32"),
        kept={"x": folder},
        tokenizer=False,
    )
    assert result.warnings == ()


def tiny_factors() -> tuple[Array, Array]:
    rng = np.random.default_rng(0)
    size = tiny.GQA.hidden_size
    a, b = rng.standard_normal((4, size)), rng.standard_normal((size, 4))
    return a.astype(np.float32), b.astype(np.float32)


def test_validate_certify_and_verify_work_on_ids(package: Path, source: Path) -> None:
    said = run("validate", package, "--reference", source, "--certify", "--tokens", 8, "--json")
    assert said.exit_code == 0, said.output
    report = json.loads(said.stdout)
    assert report["passed"] is True and report["tokenizer"] is None
    verified = run("verify", package)
    assert verified.exit_code == 0, verified.output
    certificate = json.loads((package / "parity" / "certificate.json").read_text("utf-8"))
    assert {passage["text"] for passage in certificate["passages"]} == {None}


def test_validate_on_a_text_is_refused(package: Path, source: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("Once upon a time", encoding="utf-8")
    said = run("validate", package, "--reference", source, "--text", tmp_path / "text.txt")
    assert said.exit_code == 2 and IDS_ONLY in said.output


def test_inspect_says_it(package: Path) -> None:
    assert json.loads(run("inspect", package, "--json").stdout)["tokenizer"] is None
    assert "none: takes token ids only" in run("inspect", package).output


def test_bench_runs(package: Path) -> None:
    choices = ("--prompt-tokens", 8, "--new-tokens", 4, "--repeats", 1, "--json")
    said = run("bench", package, *choices)
    assert said.exit_code == 0, said.output
    figures = json.loads(said.stdout)
    assert (figures["prompt_tokens"], figures["new_tokens"]) == (8, 4)


def test_text_is_refused_in_one_sentence(package: Path) -> None:
    model = Llama.load(package)
    assert model.vocab_size == tiny.GQA.vocab_size
    with pytest.raises(UsageError, match=IDS_ONLY):
        model.generate("Once")
    with pytest.raises(UsageError, match=IDS_ONLY):
        model.chat([{"role": "user", "content": "Once"}])
    for call in (("generate", package, "Once"), ("generate", package, "Once", "--chat")):
        said = run(*call)
        assert said.exit_code == 2 and said.output.count(IDS_ONLY) == 1, said.output
    said = CliRunner().invoke(main, ["chat", str(package)], input="Once\n")
    assert said.exit_code == 2 and IDS_ONLY in said.output


def test_a_server_does_not_start(package: Path) -> None:
    code = "from llama_onnx.exporter.cli import main; main()"
    command = [sys.executable, "-c", code, "serve", str(package), "--port", "0"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=120)
    assert done.returncode == 2 and IDS_ONLY in done.stderr, done.stderr
    assert "Listening" not in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("place", ["windows", "azureml", "sagemaker"])
def test_bundles_that_answer_text_are_refused(package: Path, tmp_path: Path, place: str) -> None:
    wheels = ("--wheels", tmp_path) if place == "windows" else ()
    said = run("bundle", package, tmp_path / "out", "--for", place, *wheels)
    assert said.exit_code == 2 and IDS_ONLY in said.output, said.output
    assert not (tmp_path / "out").exists()


def test_a_resumed_export_is_of_the_same_kind(source: Path, tmp_path: Path) -> None:
    from tests.support.packages import Stop

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        export_package(
            source,
            out,
            TARGET,
            Options("int4", quantizer="rtn"),
            tokenizer=False,
            progress=Stop(9, KeyboardInterrupt()),
        )
    with pytest.raises(UsageError, match="tokenizer changed since"):
        export_package(source, out, TARGET, Options("int4", quantizer="rtn"), resume=True)
    export_package(
        source, out, TARGET, Options("int4", quantizer="rtn"), tokenizer=False, resume=True
    )
    assert ModelPackage.open(out).manifest["tokenizer"] is False


def test_plan_warns_that_export_refuses_the_checkpoint(source: Path, tmp_path: Path) -> None:
    said = run("plan", source, "--json")
    assert said.exit_code == 0 and json.loads(said.stdout)["tokenizer"] is None
    assert said.stderr.startswith("Warning: ") and "pass --no-tokenizer" in said.stderr
    assert "pass --no-tokenizer" in run("plan", source).stderr
    whole = run("plan", tiny.write_huggingface(tmp_path / "whole"), "--json")
    assert json.loads(whole.stdout)["tokenizer"] == "tokenizer.json" and whole.stderr == ""


def test_plan_knows_that_an_adapter_can_bring_the_tokenizer(source: Path, tmp_path: Path) -> None:
    layers = range(tiny.GQA.num_hidden_layers)
    factors = {f"model.layers.{layer}.self_attn.q_proj": tiny_factors() for layer in layers}
    folder = write_adapter(tmp_path / "adapter", factors)
    tokenizer = tiny.write_huggingface(tmp_path / "whole") / "tokenizer.json"
    (folder / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    planned = run("plan", source, "--adapter", folder, "--json")
    assert json.loads(planned.stdout)["tokenizer"] == "tokenizer.json", planned.output


def test_tokenizer_settings_that_are_not_an_object_are_refused(tmp_path: Path) -> None:
    folder = tiny.write_huggingface(tmp_path / "checkpoint")
    (folder / "tokenizer_config.json").write_text("[]", encoding="utf-8")
    said = run("export", folder, tmp_path / "out")
    assert said.exit_code == 1
    assert "tokenizer_config.json is not a JSON object: download it again" in said.stderr
