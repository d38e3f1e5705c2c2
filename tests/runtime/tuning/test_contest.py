"""What is kept of settings that were measured, by made-up samples with a plain verdict."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from llama_onnx.runtime.engine.engine_settings import DEFAULT, EngineSettings
from llama_onnx.runtime.tuning.candidates import combine
from llama_onnx.runtime.tuning.contest import Candidate, Contest, hold, judge
from llama_onnx.runtime.tuning.tuning_sample import Sample

SAMPLE = Sample(
    load_seconds=1.0,
    prefill_seconds=3.0,
    decode_seconds=1.0,
    repeating_seconds=1.0,
    digest="same",
    own_bytes=100,
    resident_bytes=200,
)
TRIED = Candidate("tried", EngineSettings(threads=1))


def took(*seconds: float) -> list[Sample]:
    return [replace(SAMPLE, prefill_seconds=each - 1, decode_seconds=1.0) for each in seconds]


def contest(*seconds: float, first: list[float], last: list[float]) -> Contest:
    return Contest(took(*first), took(*last), {TRIED.name: took(*seconds)})


def test_a_gain_beyond_the_noise_is_kept() -> None:
    verdict = judge(TRIED, contest(8, 8, 8, first=[10, 10, 10], last=[10, 10.5, 10]))
    assert verdict.kept and verdict.gain == pytest.approx(0.25) and verdict.noise < 0.051


def test_a_gain_within_the_noise_is_not_kept() -> None:
    """A tenth faster in every round; but the defaults differ from themselves by a fifth in one."""
    verdict = judge(TRIED, contest(9, 9, 9, first=[10, 12, 10], last=[10, 10, 10]))
    # log(1.2) in one round of three: 2.5 * sqrt(0.75 * 0.0332 / 3 / 3).
    assert verdict.gain > 0.1 and verdict.noise == pytest.approx(0.1316, abs=1e-3)
    assert not verdict.kept and "noise" in verdict.reason


def test_a_gain_that_few_rounds_show_is_not_kept() -> None:
    measured = contest(8, 8, 8, 11, 11, first=[10] * 5, last=[10] * 5)
    verdict = judge(TRIED, measured)
    assert verdict.gain > 0.2 and verdict.noise == 0 and not verdict.kept


def test_chance_alone_passes_less_than_once_in_twenty() -> None:
    """A thousand contests of equals, on a machine whose runs differ by a tenth. What passes is
    measured once more, so that chance has to pass twice."""
    random = np.random.default_rng(0)
    kept = 0
    for _ in range(1000):
        first, last, ours = np.exp(random.normal(0, 0.1, (3, 5))) * 10
        kept += judge(TRIED, contest(*ours, first=list(first), last=list(last))).kept
    assert 0 < kept < 50


def test_the_drift_of_a_machine_is_no_gain() -> None:
    """Every round is slower than the one before; each is compared within itself."""
    drifting = contest(10, 20, 40, first=[10, 20, 40], last=[10, 20, 40])
    assert judge(TRIED, drifting).gain == pytest.approx(0)


def test_other_logits_are_never_kept() -> None:
    measured = contest(1, 1, 1, first=[10, 10, 10], last=[10, 10, 10])
    measured.others[TRIED.name][1] = replace(SAMPLE, digest="other")
    verdict = judge(TRIED, measured)
    assert not verdict.kept and "bit for bit" in verdict.reason


def test_defaults_that_differ_from_run_to_run_prove_nothing() -> None:
    measured = contest(1, 1, first=[10, 10], last=[10, 10])
    measured.last[0] = replace(SAMPLE, digest="other")
    assert not judge(TRIED, measured).kept


PACKED = Candidate("tried", EngineSettings(), "memory")


@pytest.mark.parametrize(
    ("own", "seconds", "kept", "reason"),
    [
        (10, 10, True, "of its own memory"),
        (90, 10, False, "too little"),
        (10, 12, False, "slower"),
        (None, 10, False, "does not say"),
    ],
)
def test_packed_weights_are_kept_for_memory_at_no_loss(
    own: int | None, seconds: float, kept: bool, reason: str
) -> None:
    measured = contest(seconds, seconds, first=[10, 10], last=[10.1, 10.1])
    others = measured.others[TRIED.name]
    measured.others[TRIED.name] = [replace(sample, own_bytes=own) for sample in others]
    verdict = judge(PACKED, measured)
    assert verdict.kept is kept and reason in verdict.reason


def test_a_busy_machine_says_nothing_about_a_loss() -> None:
    measured = contest(10, 10, first=[10, 10], last=[14, 10])
    others = measured.others[TRIED.name]
    measured.others[TRIED.name] = [replace(sample, own_bytes=1) for sample in others]
    verdict = judge(PACKED, measured)
    assert not verdict.kept and "busy" in verdict.reason


def test_drafts_are_judged_by_a_text_that_repeats_itself() -> None:
    tried = Candidate("tried", EngineSettings(drafts=False), "repeating")
    measured = contest(10, 10, first=[10, 10], last=[10, 10])
    others = measured.others[TRIED.name]
    measured.others[TRIED.name] = [replace(sample, repeating_seconds=3.0) for sample in others]
    assert judge(tried, measured).gain == pytest.approx(1 / 3 - 1)


def test_rounds_are_interleaved_and_the_hopeless_given_up() -> None:
    slow, fast = Candidate("slow", EngineSettings(threads=1)), Candidate("fast", DEFAULT)
    calls: list[str] = []

    def measure(name: str, _: EngineSettings) -> Sample:
        calls.append(name)
        return took(100 if name == "slow" else 10)[0]

    measured = hold([slow, fast], 4, measure)
    assert calls[:4] == ["without changes", "slow", "fast", "without changes"]
    assert calls[4:8] == ["without changes", "fast", "slow", "without changes"]
    assert len(measured.others["slow"]) == 2 and len(measured.others["fast"]) == 4
    verdict = judge(slow, measured)
    assert not verdict.kept and "slower" in verdict.reason


def test_changes_are_combined_and_the_first_of_two_wins() -> None:
    changes = [
        EngineSettings(chunk=128),
        EngineSettings(threads=2),
        EngineSettings(chunk=256, spin=False),
    ]
    assert combine(changes) == EngineSettings(threads=2, chunk=128, spin=False)
    assert combine([]) == DEFAULT
