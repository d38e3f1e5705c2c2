"""Find out which settings suit a package on this machine, and keep them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from llama_onnx.runtime.engine.engine_settings import EngineSettings
from llama_onnx.runtime.engine.schedule import CHUNK
from llama_onnx.runtime.tuning.candidates import NOT_TRIED, candidates, combine
from llama_onnx.runtime.tuning.contest import Candidate, Gauge, Verdict, hold, judge, summary
from llama_onnx.runtime.tuning.machine import Machine
from llama_onnx.runtime.tuning.packed_weights import obstacle, write_packed
from llama_onnx.runtime.tuning.prompt_trial import PromptTrial, try_prompts
from llama_onnx.runtime.tuning.proof import certificate_of, prove
from llama_onnx.runtime.tuning.tuned import (
    Place,
    Tuned,
    keep,
    require_place,
    tuning,
)
from llama_onnx.runtime.tuning.tuning_sample import Sample, Workload, measure
from llama_onnx.targets.errors import LlamaOnnxError, UsageError
from llama_onnx.targets.package import ModelPackage
from llama_onnx.targets.progress import SILENT, Progress

PROMPT_TOKENS, NEW_TOKENS, ROUNDS = 512, 64, 5
MOST_ROUNDS = 100

_UNTILED = "attention without tiles"
_MOST_SCORES = 1 << 30
"""Bytes that the scores of a part of a prompt may take without tiles."""


@dataclass(frozen=True)
class Report:
    """What was tried and what is kept. `confirmed` is the measurement of all changes together,
    None if there was nothing to confirm, and `prompts` None unless it was asked for."""

    machine: Machine
    workload: Workload
    rounds: int
    defaults: tuple[Sample, ...]
    verdicts: tuple[Verdict, ...]
    confirmed: Verdict | None
    tuned: Tuned
    not_tried: dict[str, str]
    prompts: PromptTrial | None = None

    def to_json(self) -> dict[str, Any]:
        """Return all of it, also what was not kept."""
        return {
            "machine": self.machine.to_json(),
            "prompt_tokens": self.workload.prompt_tokens,
            "new_tokens": self.workload.new_tokens,
            "rounds": self.rounds,
            "defaults": {
                **summary(self.defaults),
                "samples": [sample.to_json() for sample in self.defaults],
            },
            "tried": [verdict.to_json() for verdict in self.verdicts],
            "confirmed": self.confirmed and self.confirmed.to_json(),
            "prompts": self.prompts and self.prompts.to_json(),
            "not_tried": self.not_tried,
            "kept": self.tuned.settings.to_json(),
            "gain": self.tuned.gain,
        }


def tune(
    package: ModelPackage,
    context_length: int,
    *,
    rounds: int = ROUNDS,
    packed: bool = True,
    int8_prompts: bool = False,
    heads: int | None = None,
    progress: Progress = SILENT,
    prompt_tokens: int = PROMPT_TOKENS,
    new_tokens: int = NEW_TOKENS,
) -> Report:
    """Measure `package` with the defaults and with each thing that can be changed, in turns.

    What gains more than the noise is measured once more, all of it together, and kept if it gains
    again; packed weights are kept if they save memory and cost no speed. Every trial's logits must
    be those of the defaults, bit for bit, but for attention without tiles, for which the limits of
    the package's certificate must hold. Without `packed` no weights are written. With
    `int8_prompts` a second graph that reads prompts is tried too, in addition to what is kept; its
    logits are not the same, and have limits; see `try_prompts`. `heads` is how many the model has,
    None if that is not known.

    Raises `ResourceError` if the cache cannot be written or a trial fails, `UsageError` while
    another process tunes the package or for fewer than 2 or more than 100 rounds.
    """
    if rounds < 2:
        raise UsageError("tuning takes at least 2 rounds: one says nothing about the noise.")
    if rounds > MOST_ROUNDS:
        raise UsageError(f"tuning takes at most {MOST_ROUNDS} rounds.")
    place = require_place(package)
    new = max(1, min(new_tokens, context_length // 4))
    prompt = max(1, min(prompt_tokens, context_length - new))
    workload = Workload(context_length, prompt, new, drafts=True)
    with tuning(place):
        report = _tune(package, place, workload, rounds, packed, heads, progress)
        if int8_prompts:
            report = _with_prompts(report, package, place, progress)
        progress.step("writing")
        keep(place, package, report.tuned, report.to_json())
        return report


def _with_prompts(
    report: Report, package: ModelPackage, place: Place, progress: Progress
) -> Report:
    """Return the report with what came of prompts in int8, and with them in its settings if they
    are kept."""
    tuned = report.tuned
    counted = _counter(package, report.workload, progress, report.rounds * 3)
    untiled = _UNTILED not in report.not_tried
    rounds, usual = report.rounds, tuned.settings
    trial = try_prompts(package, place, usual, rounds, counted, progress, untiled=untiled)
    if trial.best is not None:
        tuned = replace(tuned, settings=trial.best.candidate.settings)
    return replace(report, tuned=tuned, prompts=trial)


def _tune(
    package: ModelPackage,
    place: Place,
    workload: Workload,
    rounds: int,
    packed: bool,
    heads: int | None,
    progress: Progress,
) -> Report:
    not_tried = dict(NOT_TRIED)
    reason = obstacle(package, place) if packed else "not wanted"
    folder = None
    if reason is None:
        progress.step("packing weights")
        folder = write_packed(package, place)
    else:
        not_tried["packed weights"] = reason
    reason = _untiled_obstacle(package, workload, heads, progress)
    if reason is not None:
        not_tried[_UNTILED] = reason
    found = candidates(place.machine, workload, folder, untiled=reason is None)
    counted = _counter(package, workload, progress, rounds * (len(found) + 2))
    contest = hold(found, rounds, counted)
    verdicts = tuple(judge(each, contest) for each in found)
    defaults = (*contest.first, *contest.last)
    tuned, confirmed = _decide(package, workload, rounds, verdicts, progress)
    return Report(place.machine, workload, rounds, defaults, verdicts, confirmed, tuned, not_tried)


def _untiled_obstacle(
    package: ModelPackage, workload: Workload, heads: int | None, progress: Progress
) -> str | None:
    """Return why attention without tiles must not be used; None if it may. It rounds differently,
    as other processors do: what the certificate allows holds for it."""
    if heads is None:
        return "the number of heads is not known"
    scores = 4 * heads * CHUNK * workload.context_length
    if scores > _MOST_SCORES:
        return f"its scores would take up to {scores / 1e9:.1f} GB"
    try:
        certificate = certificate_of(package)
        progress.step("reading the certificate's passages")
        return prove(package.path, certificate, tiled_attention=False).problem
    except LlamaOnnxError as error:
        return str(error).rstrip(".")


def _decide(
    package: ModelPackage,
    workload: Workload,
    rounds: int,
    verdicts: tuple[Verdict, ...],
    progress: Progress,
) -> tuple[Tuned, Verdict | None]:
    """Measure all that gained together; return what to keep, and that measurement."""
    gained = sorted((v for v in verdicts if v.kept), key=lambda v: v.gain, reverse=True)
    saving = [v for v in gained if v.candidate.gauge == "memory"]
    memory = [v.candidate.settings for v in saving]
    faster = [v for v in gained if v.candidate.gauge != "memory"]
    plain = Tuned(combine(memory), max((v.gain for v in saving if v.gain > v.noise), default=0.0))
    if not faster:
        return plain, None
    gauges: tuple[Gauge, ...] = ("speed", "prompts", "repeating")
    gauge = next(each for each in gauges if any(v.candidate.gauge == each for v in faster))
    everything = combine([v.candidate.settings for v in faster] + memory)
    exact = all(v.candidate.exact for v in faster)
    together = Candidate("all that gained", everything, gauge, exact)
    counted = _counter(package, workload, progress, rounds * 3)
    verdict = judge(together, hold([together], rounds, counted))
    if verdict.kept:
        return Tuned(everything, verdict.gain), verdict
    return plain, verdict


def _counter(
    package: ModelPackage, workload: Workload, progress: Progress, total: int
) -> Callable[[str, EngineSettings], Sample]:
    """Return a function that measures once and counts."""
    done = 0

    def measured(name: str, settings: EngineSettings) -> Sample:
        nonlocal done
        progress.update(name, done, total)
        sample = measure(package.path, settings, workload)
        done += 1
        return sample

    return measured
