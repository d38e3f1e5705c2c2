"""`tune --int8-prompts`: proved by the certificate, measured, kept, found again, and refused."""

from __future__ import annotations

import errno
import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from llama_onnx.runtime import ort
from llama_onnx.runtime.engine.engine_settings import DEFAULT, EngineSettings
from llama_onnx.runtime.llama.model import Llama
from llama_onnx.runtime.measure.thresholds import Check
from llama_onnx.runtime.measure.verify import checks_of
from llama_onnx.runtime.tuning import exact_products, prompt_trial, proof
from llama_onnx.runtime.tuning import tune as tuning_module
from llama_onnx.runtime.tuning.prompt_trial import PromptTrial, try_prompts
from llama_onnx.runtime.tuning.tuned import (
    PROMPTS_SUFFIX,
    Place,
    choose,
    find,
    require_place,
    tuning,
)
from llama_onnx.runtime.tuning.tuning_sample import Sample, Workload
from llama_onnx.targets.errors import LlamaOnnxError, ResourceError
from llama_onnx.targets.package import MODEL_FILE, ModelPackage
from llama_onnx.targets.providers import CPU
from llama_onnx.targets.strict_json import parse_json
from tests.support.packages import make_certified
from tests.support.tuning_trials import Faster, run, tune


class ReadsFaster(Faster):
    """Reads prompts `gain` times as fast with the graph for prompts; `wanted` settings are twice as
    fast without it."""

    def __init__(self, gain: float = 2.0, **wanted: Any) -> None:
        super().__init__(**wanted)
        self.gain = gain

    def __call__(self, package: Path, settings: EngineSettings, workload: Workload) -> Sample:
        sample = super().__call__(package, settings, workload)
        faster = self.gain if settings.prompts else 1.0
        return replace(sample, prefill_seconds=sample.prefill_seconds / faster)


@pytest.fixture(scope="module")
def certified(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_certified(tmp_path_factory.mktemp("zertifiziert ä"))


@pytest.fixture
def vnni(monkeypatch: pytest.MonkeyPatch, cache: Path) -> pytest.MonkeyPatch:
    """A processor whose products of int8 are exact, whatever the test runs on."""
    monkeypatch.setattr(exact_products, "are_exact", lambda: True)
    return monkeypatch


def trial(package: Path, place: Place, gain: float = 2.0) -> PromptTrial:
    measured = ReadsFaster(gain)
    with tuning(place):
        return try_prompts(
            ModelPackage.open(package),
            place,
            DEFAULT,
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
    assert report["kept"]["prompts"] is prompts["verdicts"][0]["kept"] is True
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
    vnni.setattr(proof, "checks_of", strict)
    failing = {3}
    found = trial(certified, place)
    assert found.apart == ("down_proj",) and found.problem is None and found.best is not None
    beyond, failing = 1, {3, 4}
    found = trial(certified, place)
    assert found.problem is not None and found.best is None
    assert found.problem.startswith("on the certificate's passages the ")
    assert "is 1, the limit " in found.problem
    assert not list(place.folder.glob(f"*{PROMPTS_SUFFIX}"))


def test_the_trial_adds_to_what_gains_without_it(certified: Path, vnni: pytest.MonkeyPatch) -> None:
    """Both together are compared with the one alone, and each figure is that of one."""
    vnni.setattr(tuning_module, "measure", ReadsFaster(1.5, chunk=128))
    said = " ".join(tune(certified, "--int8-prompts", "--no-packed").stdout.split())
    assert "prompts in int8 (prompt only) 1.50 yes: faster by more than the noise" in said
    assert (
        "faster: prompts read in parts of 128 tokens. Kept: prompts read in int8, 1.50 times"
        in (said)
    )
    found = find(ModelPackage.open(certified))
    assert found is not None and found.settings.prompts is not None
    assert found.settings.chunk == 128


def test_a_later_tune_without_it_says_that_it_ends(
    certified: Path, vnni: pytest.MonkeyPatch
) -> None:
    vnni.setattr(tuning_module, "measure", ReadsFaster())
    assert "no longer" not in tune(certified, "--int8-prompts", "--no-packed").stdout
    assert "no longer" not in tune(certified, "--int8-prompts", "--no-packed").stdout
    assert "Prompts are no longer read in int8" in tune(certified, "--no-packed").stdout
    assert "no longer" not in tune(certified, "--no-packed").stdout


def test_a_variable_reads_prompts_as_before(certified: Path, vnni: pytest.MonkeyPatch) -> None:
    vnni.setattr(tuning_module, "measure", ReadsFaster())
    tune(certified, "--int8-prompts", "--no-packed")
    with Llama.load(certified) as tuned, Llama.load(certified, tuned=False) as plain:
        assert (tuned.opened.tuned, plain.opened.tuned) == (
            "tuned for this machine: prompts read in int8.",
            None,
        )
    vnni.setenv("LLAMA_ONNX_TUNED", "0")
    assert choose(ModelPackage.open(certified), CPU) == (DEFAULT, None)


def test_a_saved_conversation_goes_on_only_where_prompts_are_read_alike(
    certified: Path, vnni: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Keys and values read in int8 are not those of the package's own graph."""
    vnni.setattr(tuning_module, "measure", ReadsFaster())
    tune(certified, "--int8-prompts", "--no-packed")
    file = tmp_path / "Gespräch 日本.session"
    with Llama.load(certified, engine="onnxruntime") as model:
        chat = model.conversation(max_new_tokens=4)
        "".join(chat.say("the quick brown fox and the lazy dog"))
        assert chat.save(file).left_out is None
        again = model.restore(file).restored
        assert again is not None and again.left_out is None and again.positions
    vnni.setenv("LLAMA_ONNX_TUNED", "0")
    with Llama.load(certified, engine="onnxruntime") as model:
        chat = model.restore(file)
        assert chat.restored is not None and chat.restored.positions == 0
        assert chat.restored.left_out == "its prompts were read in int8, and are not here"
        assert len(chat.messages) == 2
        "".join(chat.say("and the end?"))


def test_batch_says_it_too(certified: Path, vnni: pytest.MonkeyPatch, tmp_path: Path) -> None:
    vnni.setattr(tuning_module, "measure", ReadsFaster())
    tune(certified, "--int8-prompts", "--no-packed")
    lines = tmp_path / "in.jsonl"
    lines.write_text('{"prompt": "the fox", "max_tokens": 2}\n')
    result = run("batch", certified, lines, tmp_path / "out.jsonl", "--workers", 1)
    assert result.exit_code == 0, result.output
    assert "tuned for this machine: prompts read in int8." in result.stderr


# what fails costs only the trial


def full(*_: object) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def killed(package: Path, settings: EngineSettings, workload: Workload) -> Sample:
    if settings.prompts:
        raise ResourceError("the process that measures was killed.")
    return ReadsFaster(chunk=128)(package, settings, workload)


@pytest.mark.parametrize(
    ("what", "said"),
    [("full", "matrices in int8 cannot be written to"), ("killed", "measures was killed")],
)
def test_a_failed_trial_costs_nothing_else(
    certified: Path, vnni: pytest.MonkeyPatch, what: str, said: str
) -> None:
    vnni.setattr(tuning_module, "measure", killed)
    if what == "full":
        vnni.setattr(prompt_trial, "write_prompt_graph", full)
    result = tune(certified, "--int8-prompts", "--no-packed")
    assert result.exit_code == 0, result.output
    assert f"Not kept: prompts in int8: {'' if what == 'full' else 'the process'}" in result.stdout
    assert said in " ".join(result.stdout.split())
    opened = ModelPackage.open(certified)
    found = find(opened)
    assert found is not None and found.settings == EngineSettings(chunk=128)
    assert not list(require_place(opened).folder.glob(f"*{PROMPTS_SUFFIX}"))


def test_numbers_that_are_none_are_refused_and_kept_as_null(
    certified: Path, vnni: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: object) -> tuple[Check, ...]:
        found = checks_of(*arguments)  # type: ignore[arg-type]
        return tuple(replace(check, value=math.nan) for check in found)

    vnni.setattr(tuning_module, "measure", ReadsFaster(chunk=128))
    vnni.setattr(proof, "checks_of", broken)
    result = tune(certified, "--int8-prompts", "--no-packed", "--json")
    report = parse_json(result.stdout.encode())
    assert "is not a number" in report["prompts"]["problem"]
    assert {check["value"] for check in report["prompts"]["checks"]} == {None}
    found = find(ModelPackage.open(certified))
    assert found is not None and found.settings == EngineSettings(chunk=128)


def test_products_that_are_not_exact_are_not_used(
    certified: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exact_products, "are_exact", lambda: False)
    found = trial(certified, require_place(ModelPackage.open(certified)))
    assert found.problem == "this processor's products of int8 are not exact"


def test_sums_in_16_bits_are_not_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a processor with AVX2 and without VNNI adds up two products, which is simulated here."""

    class Saturating:
        def __init__(self, content: bytes) -> None:
            (right,) = (
                numpy_helper.to_array(each)
                for each in onnx.load_from_string(content).graph.initializer
                if each.name == "right"
            )
            self.right = right.astype(np.int64)

        def run(self, _: object, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
            left = inputs["left"].astype(np.int64)
            products = left[:, :, None] * self.right
            pairs = (products[:, ::2] + products[:, 1::2]).clip(-(2**15), 2**15 - 1)
            return [(pairs.sum(axis=1) - 128 * self.right.sum(axis=0)).astype(np.float32)]

    monkeypatch.setattr(ort, "create_session", Saturating)
    assert not exact_products.are_exact()


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
    assert not list(require_place(ModelPackage.open(certified)).folder.glob("*.prompts"))


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
