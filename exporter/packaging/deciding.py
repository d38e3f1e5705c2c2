"""Decides a plan with a budget: surveys the model in the folder of the unfinished package."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from llama_onnx.exporter.model.checkpoint import Checkpoint
from llama_onnx.exporter.model.storage import RowBlocks
from llama_onnx.exporter.packaging.adapters import KeptAdapter
from llama_onnx.exporter.packaging.budget import (
    Chosen,
    candidates,
    check_possible,
    decide,
    surveyed,
)
from llama_onnx.exporter.packaging.calibrating import WEIGHTS_FOLDER
from llama_onnx.exporter.packaging.compile import write_settings
from llama_onnx.exporter.packaging.goal import Goal
from llama_onnx.exporter.packaging.job import Job
from llama_onnx.exporter.packaging.options import Options
from llama_onnx.exporter.packaging.plan import Plan, make_plan
from llama_onnx.exporter.quantize.allocate import Losses
from llama_onnx.targets.errors import UsageError
from llama_onnx.targets.listing import CALIBRATION_FOLDER
from llama_onnx.targets.progress import SILENT, Progress
from llama_onnx.targets.target import Target

if TYPE_CHECKING:
    from llama_onnx.exporter.quantize.calibration_text import Calibration

_REQUEST = "request.json"


def make_decided_plan(
    checkpoint: Checkpoint,
    target: Target,
    options: Options,
    workers: int,
    kept: Sequence[KeptAdapter] = (),
    explicit: Collection[str] = (),
    *,
    headers: bool = False,
    progress: Progress = SILENT,
) -> Plan:
    """Return the plan of an export; with a budget, survey the model first. `headers`: the weights
    are not there.

    Raises `UsageError` as `make_plan` does, and for a budget without weights.
    """

    def planned(chosen: Chosen | None = None) -> Plan:
        return make_plan(checkpoint, target, options, workers, kept, explicit, chosen=chosen)

    plan = planned()
    if plan.goal is None:
        return plan
    if headers:
        raise UsageError(
            "a budget is shared out by what the model reads, which takes its weights: download "
            "the model and plan with its folder."
        )
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        job = Job(checkpoint, tuple(kept), None, target, plan, place, workers, progress)
        return decided(job, planned).plan


def decided(job: Job, again: Callable[[Chosen], Plan]) -> Job:
    """Return `job`, or if its plan has a goal, with the plan that meets it. What the survey of the
    model finds is kept in the job's folder; `again` returns the plan with other storages."""
    goal = job.plan.goal
    if goal is None:
        return job
    check_possible(job.plan, goal, again)  # before hours are spent
    write_settings(job)  # the tokenizer reads the text
    found, decision = decide(job.plan, _losses(job, goal), goal, again)
    return replace(job, plan=replace(found, decision=decision))


def _losses(job: Job, goal: Goal) -> Losses:
    from llama_onnx.exporter.calibration.survey import ERROR_FEEDBACK, SurveyTask, survey
    from llama_onnx.exporter.calibration.token_weights import weigh
    from llama_onnx.exporter.quantize.calibration_text import calibration_tokens

    checkpoint, plan = job.checkpoint, job.plan
    wanted = plan.calibration
    assert wanted is not None, "a goal needs a quantizer that reads a text"
    text = calibration_tokens(job.folder, checkpoint.config, wanted.text, tokens=wanted.tokens)
    weights = _weights_folder(job.folder, checkpoint, text)
    weigh(checkpoint, text.sequences, weights, job.progress)
    storages: dict[str, tuple[RowBlocks, ...]] = {}
    for slot in surveyed(plan.built.slots):
        storages |= dict.fromkeys(slot.sources, candidates(slot, plan.recipe, goal))
    known = {name: ways for name, ways in storages.items() if ways}
    task = SurveyTask(checkpoint, known, wanted.rescales, weights, text.sequences)
    losses = survey(task, job.progress)
    feedback = 1.0 if plan.recipe.quantizer == "awq" else ERROR_FEEDBACK
    return {
        name: {storage: feedback * loss for storage, loss in ways.items()}
        for name, ways in losses.items()
    }


def _weights_folder(folder: Path, checkpoint: Checkpoint, text: Calibration) -> Path:
    """Return where the weights of tokens are kept, empty if it has those of something else."""
    found = folder / CALIBRATION_FOLDER / WEIGHTS_FOLDER
    request = {"source": checkpoint.fingerprint(), "text": text.sha256, "tokens": text.tokens}
    content = json.dumps(request, sort_keys=True)
    file = found / _REQUEST
    if not file.exists() or file.read_text("utf-8") != content:
        shutil.rmtree(found, ignore_errors=True)
        found.mkdir(parents=True)
        file.write_text(content, "utf-8")
    return found
