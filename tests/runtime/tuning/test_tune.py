"""`tune`, from the command line to the settings that the next run uses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llama_onnx.runtime.engine.engine_settings import DEFAULT, EngineSettings
from llama_onnx.runtime.tuning import tune as module
from llama_onnx.runtime.tuning.candidates import candidates
from llama_onnx.runtime.tuning.machine import Machine
from llama_onnx.runtime.tuning.tuned import Place, find, require_place
from llama_onnx.runtime.tuning.tuning_sample import (
    Sample,
    Workload,
    measure,
)
from llama_onnx.targets.errors import ResourceError
from llama_onnx.targets.package import ModelPackage
from tests.support.tuning_trials import Faster, here, run, tune

WORK = Workload(context_length=64, prompt_tokens=40, new_tokens=8, drafts=True)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, place: Place) -> pytest.MonkeyPatch:
    """Trials in this process, of which no setting is faster than another."""
    monkeypatch.setattr(module, "measure", Faster())
    return monkeypatch


def test_a_trial_in_a_process_of_its_own_sees_what_the_engine_computes(package: Path) -> None:
    sample, same = measure(package, DEFAULT, WORK), here(package, DEFAULT, WORK)
    assert sample.digest == same.digest
    assert min(sample.load_seconds, sample.prefill_seconds, sample.decode_seconds) > 0


def test_other_weights_have_another_digest(package: Path, package_fp32: Path) -> None:
    assert here(package, DEFAULT, WORK).digest != here(package_fp32, DEFAULT, WORK).digest


def test_a_trial_that_fails_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="does not exist"):
        measure(tmp_path / "nothing", DEFAULT, WORK)


def test_nothing_is_kept_without_a_gain(
    package: Path, opened: ModelPackage, quick: pytest.MonkeyPatch
) -> None:
    result = tune(package)
    assert result.exit_code == 0, result.output
    assert "Kept: the defaults" in result.stdout
    found = find(opened)
    assert found is not None and found.settings == DEFAULT
    assert run("generate", package, "the fox", "--max-new-tokens", 2).stderr.count("tuned") == 0


def test_what_gains_is_kept_and_the_next_run_says_so(
    package: Path, opened: ModelPackage, quick: pytest.MonkeyPatch
) -> None:
    quick.setattr(module, "measure", Faster(chunk=128, arena=False))
    result = tune(package, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    kept = {each["name"] for each in report["tried"] if each["kept"]}
    assert kept == {"parts of 128 tokens", "no arena"}
    assert report["confirmed"]["kept"] and report["kept"]["chunk"] == 128
    assert all(len(each["samples"]) == 2 for each in report["tried"])
    assert "accuracy level" in report["not_tried"]
    found = find(opened)
    assert found is not None and found.settings == EngineSettings(chunk=128, arena=False)

    said = run("generate", package, "the fox", "--max-new-tokens", 2).stderr
    assert "tuned for this machine" in said and "parts of 128 tokens" in said
    assert "is tuned here" in run("doctor", package).stdout.replace("\n", " ")
    assert run("tune", package, "--forget").stdout == "Forgotten.\n"
    assert "tuned" not in run("generate", package, "the fox", "--max-new-tokens", 2).stderr


def test_a_gain_that_does_not_repeat_is_not_kept(
    package: Path, opened: ModelPackage, quick: pytest.MonkeyPatch
) -> None:
    class Lucky(Faster):
        calls = 0

        def __call__(self, *arguments: Any) -> Sample:
            self.calls += 1
            if self.calls > 2 * (len(candidates(*machine)) + 2):
                self.wanted = {}
            return super().__call__(*arguments)

    machine = (require_place(opened).machine, Workload(256, 200, 8, True))
    quick.setattr(module, "measure", Lucky(chunk=128))
    report = json.loads(tune(package, "--json", "--no-packed").stdout)
    assert [each["name"] for each in report["tried"] if each["kept"]] == ["parts of 128 tokens"]
    assert not report["confirmed"]["kept"] and report["kept"]["chunk"] == DEFAULT.chunk
    assert report["not_tried"]["packed weights"] == "not wanted"


def test_packed_weights_are_kept_where_they_save_memory(
    package: Path, opened: ModelPackage, quick: pytest.MonkeyPatch
) -> None:
    class Saving(Faster):
        def __call__(self, package: Path, settings: EngineSettings, workload: Workload) -> Sample:
            values = super().__call__(package, settings, workload).to_json()
            return Sample(**{**values, "own_bytes": 10 if settings.packed else 100})

    quick.setattr(module, "measure", Saving())
    assert "weights mapped as packed" in tune(package).stdout
    found = find(opened, thorough=True)
    assert found is not None and found.settings.packed is not None
    assert "weights mapped" in run("generate", package, "the fox", "--max-new-tokens", 2).stderr


def test_a_failed_trial_leaves_nothing(
    package: Path, place: Place, opened: ModelPackage, quick: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> Sample:
        raise ResourceError("the process that measures failed.")

    quick.setattr(module, "measure", fail)
    result = tune(package)
    assert result.exit_code == 1 and "failed" in result.stderr
    assert find(opened) is None and not list(place.folder.glob("*.packed"))


def test_wrong_calls_are_refused(package: Path, cache: Path, tmp_path: Path) -> None:
    assert run("tune", package, "--rounds", 1).exit_code == 2
    assert run("tune", package, "--rounds", 101).exit_code == 2
    assert run("tune", tmp_path / "nothing").exit_code == 1
    assert run("tune", package, "--forget").stdout == "Nothing was kept for this package.\n"


def test_a_machine_that_is_not_known_still_has_a_key() -> None:
    machine = Machine("?", (), None, 0.5, "1.32.0")
    assert len(machine.key) == 16
    assert machine.key != Machine("?", (), None, 0.5, "1.32.1").key
