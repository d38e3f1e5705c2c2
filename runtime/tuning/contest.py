"""Settings measured in turns with the defaults: which are faster, and by more than chance.

The defaults are measured twice in each round, as the first and as the last. How far the two differ
is what this machine's moods alone do, and says how far the median gain of a change may be off: no
gain within twice that is believed, nor one that most rounds do not show.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import log, sqrt
from statistics import median
from typing import Any, Literal

from llama_onnx.runtime.engine.engine_settings import DEFAULT, EngineSettings
from llama_onnx.runtime.tuning.tuning_sample import Sample

Gauge = Literal["speed", "memory", "repeating", "prompts"]
"""What a change is to better: seconds for prompt and answer, own memory at no loss of speed,
seconds of a text that repeats itself, or of a prompt."""

_HOPELESS = 0.8
"""A change that is this slow in the first two rounds is not measured again."""

_AGREEING = 0.8
"""Share of the rounds that must show a gain."""

_NOISY = 0.25
"""Noise above which a run says nothing about a loss of speed."""

_LESS_MEMORY = 0.75
"""Share of the memory of the defaults that packed weights must not exceed."""


@dataclass(frozen=True)
class Candidate:
    """Settings to try, and what for; `exact`: the logits must be the same, bit for bit."""

    name: str
    settings: EngineSettings
    gauge: Gauge = "speed"
    exact: bool = True


@dataclass(frozen=True)
class Verdict:
    """What came of a candidate: `gain` is that of the median round, 0.1 for a tenth faster than
    the defaults; see `noise_of`."""

    candidate: Candidate
    samples: tuple[Sample, ...]
    gain: float
    noise: float
    kept: bool
    reason: str

    def to_json(self) -> dict[str, Any]:
        """Return all of it."""
        return {
            "name": self.candidate.name,
            "settings": self.candidate.settings.to_json(),
            "gain": round(self.gain, 4),
            "noise": round(self.noise, 4),
            "kept": self.kept,
            "reason": self.reason,
            "samples": [sample.to_json() for sample in self.samples],
        }


@dataclass
class Contest:
    """Samples so far: without changes at the start and at the end of each round, and of each
    candidate by name."""

    first: list[Sample] = field(default_factory=list)
    last: list[Sample] = field(default_factory=list)
    others: dict[str, list[Sample]] = field(default_factory=dict)


def hold(
    candidates: Sequence[Candidate],
    rounds: int,
    measure: Callable[[str, EngineSettings], Sample],
    usual: EngineSettings = DEFAULT,
) -> Contest:
    """Measure the settings `usual` and all `candidates` in turn, every other round backwards."""
    contest = Contest(others={each.name: [] for each in candidates})
    for number in range(rounds):
        contest.first.append(measure("without changes", usual))
        order = candidates if number % 2 == 0 else candidates[::-1]
        for each in order:
            if number < 2 or not _hopeless(each, contest):
                contest.others[each.name].append(measure(each.name, each.settings))
        contest.last.append(measure("without changes", usual))
    return contest


def judge(candidate: Candidate, contest: Contest) -> Verdict:
    """Return whether `candidate` is worth a change, and why."""
    samples = contest.others[candidate.name]
    gains = _gains(candidate, contest)
    gain = median(gains) - 1
    noise = noise_of(contest, candidate.gauge)
    digests = {sample.digest for sample in (*contest.first, *contest.last, *samples)}
    if len(digests) > 1 and candidate.exact:
        kept, reason = False, "the logits are not bit for bit those of the defaults"
    elif candidate.gauge == "memory":
        kept, reason = _judge_memory(contest, samples, gain, noise)
    elif len(samples) < len(contest.first):
        kept, reason = False, "much slower in the first rounds"
    elif gain > noise and sum(each > 1 for each in gains) >= _AGREEING * len(gains):
        kept, reason = True, "faster by more than the noise"
    else:
        kept, reason = False, "not faster by more than the noise"
    return Verdict(candidate, tuple(samples), gain, noise, kept, reason)


def noise_of(contest: Contest, gauge: Gauge) -> float:
    """Return twice the standard error that a median gain has where nothing was changed.

    Two runs of the defaults differ by twice the variance of one. A round compares one run with the
    mean of two, which has three quarters of that; the median of normal numbers is 1.25 times as
    uncertain as their mean.
    """
    pairs = zip(contest.first, contest.last, strict=True)
    logs = [log(_seconds(a, gauge) / _seconds(b, gauge)) for a, b in pairs]
    variance = sum(each**2 for each in logs) / len(logs)
    return 2 * 1.25 * sqrt(0.75 * variance / len(logs))


def summary(samples: Sequence[Sample]) -> Mapping[str, float | None]:
    """Return the medians of what can be said in a line."""
    return {
        "load_seconds": median(sample.load_seconds for sample in samples),
        "prefill_seconds": median(sample.prefill_seconds for sample in samples),
        "decode_seconds": median(sample.decode_seconds for sample in samples),
        "own_bytes": _memory(samples),
    }


def _judge_memory(
    contest: Contest, samples: Sequence[Sample], gain: float, noise: float
) -> tuple[bool, str]:
    ours, usual = _memory(samples), _memory([*contest.first, *contest.last])
    if ours is None or usual is None:
        return False, "this system does not say how much memory is a process's own"
    figures = f"{ours / 1e9:.2f} GB of its own memory instead of {usual / 1e9:.2f} GB"
    if gain < -noise:
        return False, f"slower by more than the noise ({figures})"
    if noise > _NOISY:
        return False, f"the machine is too busy to tell what it costs ({figures})"
    if ours > _LESS_MEMORY * usual:
        return False, f"saves too little memory ({figures})"
    return True, figures


def _memory(samples: Sequence[Sample]) -> float | None:
    known = [sample.own_bytes for sample in samples if sample.own_bytes is not None]
    return median(known) if known else None


def _hopeless(candidate: Candidate, contest: Contest) -> bool:
    return max(_gains(candidate, contest)) < _HOPELESS


def _gains(candidate: Candidate, contest: Contest) -> list[float]:
    """Return the speed of `candidate` relative to the defaults, round by round."""
    gauge = candidate.gauge
    rounds = zip(contest.first, contest.last, contest.others[candidate.name], strict=False)
    return [
        (_seconds(a, gauge) + _seconds(b, gauge)) / 2 / _seconds(ours, gauge)
        for a, b, ours in rounds
    ]


def _seconds(sample: Sample, gauge: Gauge) -> float:
    if gauge == "repeating" and sample.repeating_seconds is not None:
        return sample.repeating_seconds
    return sample.prefill_seconds if gauge == "prompts" else sample.seconds
