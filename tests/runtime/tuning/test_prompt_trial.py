"""`tune --int8-prompts`: proved by the certificate, measured, kept, found again, and refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from llama_onnx.runtime.engine.engine_settings import EngineSettings
from llama_onnx.runtime.measure.thresholds import Check
from llama_onnx.runtime.measure.verify import checks_of
from llama_onnx.runtime.tuning import prompt_trial
from llama_onnx.runtime.tuning import tune as tuning_module
from llama_onnx.runtime.tuning.machine import Machine
from llama_onnx.runtime.tuning.prompt_trial import PromptTrial, try_prompts
from llama_onnx.runtime.tuning.tuned import PROMPTS_SUFFIX, Place, find, require_place, tuning
from llama_onnx.runtime.tuning.tuning_sample import Sample, Workload
from llama_onnx.targets.errors import LlamaOnnxError
from llama_onnx.targets.package import MODEL_FILE, ModelPackage
from tests.support.packages import make_certified
from tests.support.tuning_trials import Faster, run, tune

VNNI = Machine("a processor", ("AVX2", "VNNI"), 2, 2, "1.32")


class ReadsFaster(Faster):
    """Reads prompts twice as fast with the graph for prompts, and `others` times otherwise."""

    def __init__(self, gain: float = 2.0) -> None:
        super().__init__()
        self.gain = gain

    def __call__(self, package: Path, settings: EngineSettings, workload: Workload) -> Sample:
        values = super().__call__(package, settings, workload).to_json()
        seconds = 10.0 / (self.gain if settings.prompts else 1.0)
        return Sample(**{**values, "prefill_seconds": seconds})


@pytest.fixture(scope="module")
def certified(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_certified(tmp_path_factory.mktemp("zertifiziert ä"))


@pytest.fixture
def vnni(monkeypatch: pytest.MonkeyPatch, cache: Path) -> pytest.MonkeyPatch:
    """A processor whose products of int8 are exact, whatever the test runs on."""
    monkeypatch.setattr(prompt_trial, "_unsuitable", lambda machine: None)
    return monkeypatch


def trial(package: Path, place: Place, gain: float = 2.0) -> PromptTrial:
    measured = ReadsFaster(gain)
    with tuning(place):
        return try_prompts(
            ModelPackage.open(package),
            place,
            2,
            lambda _, settings: measured(package, settings, Workload(128, 64, 4)),
        )


def test_what_reads_faster_is_kept_used_and_forgotten(
    certified: Path, vnni: pytest.MonkeyPatch
) -> None:
    vnni.setattr(tuning_module, "measure", ReadsFaster())
    result = tune(certified, "--int8-prompts", "--no-packed")
    assert result.exit_code == 0, result.output
    assert "Prompts in int8: 15 matrices, 0.00 GB on disk and about as much in memory" in (
        " ".join(result.stdout.split())
    )
    assert "instead of" in result.stdout and "prompts read in int8" in result.stdout
    opened = ModelPackage.open(certified)
    found = find(opened, thorough=True)
    assert found is not None and found.settings.prompts is not None
    said = run("generate", certified, "the fox", "--max-new-tokens", 2).stderr
    assert "prompts read in int8" in said
    assert "prompts read in int8" in run("doctor", certified).stdout
    assert run("tune", certified, "--forget").exit_code == 0
    assert find(opened) is None and not found.settings.prompts.exists()


def test_json_says_what_it_costs(certified: Path, vnni: pytest.MonkeyPatch) -> None:
    vnni.setattr(tuning_module, "measure", ReadsFaster())
    report = json.loads(tune(certified, "--int8-prompts", "--no-packed", "--json").stdout)
    prompts = report["prompts"]
    assert report["kept"]["prompts"] is prompts["verdict"]["kept"] is True
    assert prompts["problem"] is None and prompts["matrices"] == 15 and prompts["bytes"] > 0
    assert prompts["int8"]["mean_kl"] != prompts["usual"]["mean_kl"]
    assert {c["metric"] for c in prompts["checks"]} >= {"relative_l2", "mean_kl"}
    assert all(c["passed"] for c in prompts["checks"])


def test_what_is_not_faster_is_not_kept(certified: Path, vnni: pytest.MonkeyPatch) -> None:
    vnni.setattr(tuning_module, "measure", ReadsFaster(gain=1.0))
    result = tune(certified, "--int8-prompts", "--no-packed")
    assert "no: not faster by more than the noise" in " ".join(result.stdout.split())
    opened = ModelPackage.open(certified)
    found = find(opened)
    assert found is not None and found.settings.prompts is None
    assert not list(require_place(opened).folder.glob(f"*{PROMPTS_SUFFIX}"))


def test_the_certificate_s_limits_decide(certified: Path, vnni: pytest.MonkeyPatch) -> None:
    """First without the matrices whose inputs have outliers, then not at all."""
    beyond = 1

    def strict(*arguments: object) -> tuple[Check, ...]:
        nonlocal beyond
        beyond += 1
        found = checks_of(*arguments)  # type: ignore[arg-type]
        return tuple(replace(c, value=1.0 if beyond in failing else c.value) for c in found)

    place = require_place(ModelPackage.open(certified))
    vnni.setattr(prompt_trial, "checks_of", strict)
    failing = {3}
    found = trial(certified, place)
    assert found.apart == ("down_proj",) and found.problem is None and found.kept is not None
    beyond, failing = 1, {3, 4}
    found = trial(certified, place)
    assert found.problem is not None and found.kept is None
    assert found.problem.startswith("shipped ") and "and the limit" in found.problem


@pytest.mark.parametrize(
    ("features", "problem"),
    [
        (("AVX2",), "without VNNI"),
        (("AVX2", "AVX512"), "without VNNI"),
        (("AVX2", "VNNI"), None),
        (("AVX-VNNI", "AVX2"), None),
        (("dot product",), None),
    ],
)
def test_sums_of_products_must_be_exact(features: tuple[str, ...], problem: str | None) -> None:
    found = prompt_trial._unsuitable(replace(VNNI, features=features))
    assert (found is None) if problem is None else (found is not None and problem in found)


def test_without_a_certificate_it_is_not_tried(package: Path, vnni: pytest.MonkeyPatch) -> None:
    found = trial(package, require_place(ModelPackage.open(package)))
    assert found.problem is not None and "has no certificate: make one" in found.problem
    vnni.setattr(tuning_module, "measure", ReadsFaster())
    result = tune(package, "--int8-prompts", "--no-packed")
    assert result.exit_code == 0
    assert "Not kept: prompts in int8:" in result.stdout and "has no certificate" in result.stdout


def test_a_full_disk_is_said_before_anything_is_written(
    certified: Path, vnni: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 1000})
    vnni.setattr("shutil.disk_usage", lambda _: usage)
    found = trial(certified, require_place(ModelPackage.open(certified)))
    assert found.problem is not None and "0.0 GB free" in found.problem


def test_a_changed_graph_is_ignored_aloud(certified: Path, vnni: pytest.MonkeyPatch) -> None:
    vnni.setattr(tuning_module, "measure", ReadsFaster())
    assert tune(certified, "--int8-prompts", "--no-packed").exit_code == 0
    opened = ModelPackage.open(certified)
    found = find(opened)
    assert found is not None and found.settings.prompts is not None
    graph = found.settings.prompts / MODEL_FILE
    graph.write_bytes(graph.read_bytes() + b" ")
    with pytest.raises(LlamaOnnxError, match="is not the file that was written"):
        find(opened)
