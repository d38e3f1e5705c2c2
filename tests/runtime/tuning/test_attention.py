"""Attention without tiles: another order of sums, which must keep the certificate's limits."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from llama_onnx.runtime import ort
from llama_onnx.runtime.engine.engine import Engine
from llama_onnx.runtime.engine.engine_settings import DEFAULT
from llama_onnx.runtime.measure.graph_session import GraphSession
from llama_onnx.runtime.measure.thresholds import Check
from llama_onnx.runtime.measure.verify import checks_of
from llama_onnx.runtime.tuning import exact_products, proof
from llama_onnx.runtime.tuning import tune as tuning_module
from llama_onnx.runtime.tuning.tuned import find
from llama_onnx.targets.package import ModelPackage
from tests.support.answers import Greedy, ask, random_prompts, tokens_of
from tests.support.packages import make_certified
from tests.support.tuning_trials import Faster, run, tune

IDS = np.arange(3, 90, dtype=np.int64)


@pytest.fixture(scope="module")
def certified(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_certified(tmp_path_factory.mktemp("certified"))


def not_tried(package: Path) -> str:
    report = json.loads(tune(package, "--no-packed", "--json").stdout)
    assert "attention without tiles" not in [each["name"] for each in report["tried"]]
    return str(report["not_tried"]["attention without tiles"])


def test_it_computes_the_same_but_for_rounding(package_fp32: Path) -> None:
    """ONNX Runtime reads the variable as the session is opened; it is gone after that."""
    tiled, untiled = (
        GraphSession.open(package_fp32, tiled_attention=tiled) for tiled in (True, False)
    )
    assert ort._NO_TILES not in os.environ
    usual, without, again = (graph.step(IDS)[0] for graph in (tiled, untiled, tiled))
    assert np.array_equal(usual, again) and not np.array_equal(usual, without)
    np.testing.assert_allclose(without, usual, rtol=1e-3, atol=1e-4)


def test_a_user_s_own_variable_stays(package_fp32: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ort._NO_TILES, "0")
    GraphSession.open(package_fp32, tiled_attention=False)
    assert os.environ[ort._NO_TILES] == "0"


def test_it_is_kept_used_and_said(
    certified: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning_module, "measure", Faster(tiled_attention=False, chunk=128))
    result = tune(certified, "--no-packed", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    kept = {each["name"] for each in report["tried"] if each["kept"]}
    assert kept == {"attention without tiles", "parts of 128 tokens"}
    assert report["confirmed"]["kept"] and report["kept"]["tiled_attention"] is False
    found = find(ModelPackage.open(certified))
    assert found is not None
    assert found.settings == replace(DEFAULT, tiled_attention=False, chunk=128)
    said = run("generate", certified, "the fox", "--max-new-tokens", 2).stderr
    assert "attention without tiles" in said


def test_answers_are_the_same_again(certified: Path) -> None:
    settings, (prompt,) = replace(DEFAULT, tiled_attention=False), random_prompts(60)
    first, second = Greedy(), Greedy()
    with Engine(ModelPackage.open(certified), 96, threads=1, settings=settings) as engine:
        for chooser in (first, second):
            tokens_of(engine.submit(ask(prompt, 4, chooser=chooser)))
    np.testing.assert_array_equal(first.seen, second.seen)


def test_with_prompts_in_int8_the_faster_of_both_is_kept(
    certified: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first contest sees no gain, and the second one, with the other graph, does."""

    class OnlyTogether(Faster):
        def __call__(self, package, settings, workload):  # type: ignore[no-untyped-def]
            sample = super().__call__(package, settings, workload)
            faster = (1.5 if settings.prompts else 1) * (
                1 if settings.tiled_attention or not settings.prompts else 2
            )
            return replace(sample, prefill_seconds=sample.prefill_seconds / faster)

    monkeypatch.setattr(exact_products, "are_exact", lambda: True)
    monkeypatch.setattr(tuning_module, "measure", OnlyTogether())
    said = " ".join(tune(certified, "--no-packed", "--int8-prompts").stdout.split())
    assert "prompts in int8, no tiles (prompt only) 3.00 yes" in said
    assert "Kept: attention without tiles. Kept: prompts read in int8, 3.00 times as fast." in said


def test_it_needs_a_certificate_whose_limits_hold(
    package: Path, certified: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning_module, "measure", Faster())
    assert "has no certificate: make one" in not_tried(package)

    def strict(*arguments: object) -> tuple[Check, ...]:
        found = checks_of(*arguments)  # type: ignore[arg-type]
        return tuple(replace(check, value=1.0) for check in found)

    monkeypatch.setattr(proof, "checks_of", strict)
    assert "is 1, the limit " in not_tried(certified)


def test_scores_must_fit_the_memory(
    certified: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning_module, "measure", Faster())
    monkeypatch.setattr(tuning_module, "_MOST_SCORES", 1000)
    assert not_tried(certified).startswith("its scores would take up to 0.0 GB")
