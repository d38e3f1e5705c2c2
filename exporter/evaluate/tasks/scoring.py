"""Score a package, and its original beside it, on the tasks of a folder."""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llama_onnx.exporter.checkpoints.package.package import PackageCheckpoint
from llama_onnx.exporter.evaluate.tasks.rating import rate_by_graph, rate_by_layers
from llama_onnx.exporter.evaluate.tasks.task_files import TaskFile, read_tasks
from llama_onnx.exporter.parity.measure.open_subject import open_subject
from llama_onnx.exporter.sources import open_checkpoint
from llama_onnx.runtime.llama.model import Llama
from llama_onnx.runtime.measure.evaluated import Estimate
from llama_onnx.runtime.measure.graph_session import GraphSession
from llama_onnx.runtime.measure.task_scores import Score, TaskScores
from llama_onnx.runtime.tokenizer.encoder import open_encoder
from llama_onnx.targets.errors import UsageError
from llama_onnx.targets.extras import missing_extra
from llama_onnx.targets.package import ModelPackage
from llama_onnx.targets.progress import SILENT, Progress

if TYPE_CHECKING:
    from llama_onnx.exporter.evaluate.tasks.harness import Scored, Subject


def score_tasks(
    package: Path,
    folder: Path,
    names: Sequence[str] = (),
    reference: Path | None = None,
    progress: Progress = SILENT,
) -> list[TaskScores]:
    """Return the scores on the tasks `names` of `folder`, or on all.

    The original at `reference` rates given answers; it does not write any. Raises `UsageError` for
    tasks that are more than data, and for a package without a tokenizer.
    """
    try:
        from llama_onnx.exporter.evaluate.tasks.harness import score
    except ModuleNotFoundError as error:
        raise missing_extra("--tasks", error.name, "export,cpu,tasks") from None
    tasks = read_tasks(folder, names)
    subject, original = _open(package, reference)
    found = score(subject, tasks, progress)
    rated = [task for task in tasks if not task.generates]
    beside = score(original, rated, progress) if original and rated else {}
    version = importlib.metadata.version("lm-eval")
    return [_scores(task, found[task.name], beside.get(task.name), version) for task in tasks]


def _open(package: Path, reference: Path | None) -> tuple[Subject, Subject | None]:
    from llama_onnx.exporter.evaluate.tasks.harness import Subject

    if not ModelPackage.open(package).has_tokenizer:
        raise UsageError(f"{package} has no tokenizer: tasks are texts.")
    config = PackageCheckpoint.open(package).config
    starts = [config.bos_token_id, *config.eos_token_ids]
    prefix = next((token for token in starts if token is not None), None)
    if prefix is None:
        raise UsageError(f"{package} has neither a start nor an end token, which tasks need.")
    encoder = open_encoder(package, config.vocab_size)
    length = config.max_position_embeddings
    by_graph = partial(rate_by_graph, GraphSession.open(package))
    # Opened where a task asks for answers; as it ships, so that scores are the same everywhere.
    load = cache(lambda: Llama.load(package, tuned=False))

    def write(ids: list[int], settings: Mapping[str, Any]) -> str:
        until = settings.get("until") or []
        stops = [until] if isinstance(until, str) else list(until)
        draws = settings.get("do_sample") or settings.get("temperature", 0) > 0
        sampling = {name: settings[name] for name in ("top_k", "top_p") if name in settings}
        chosen = {"temperature": settings.get("temperature", 1.0), "seed": 0, **sampling}
        return "".join(
            load().generate(
                ids,
                max_new_tokens=settings["max_gen_toks"],
                stop=[stop for stop in stops if stop],
                **(chosen if draws else {"temperature": 0.0}),
            )
        )

    subject = Subject("package", encoder, prefix, length, by_graph, write)
    if reference is None:
        return subject, None
    original = open_subject(package, open_checkpoint(reference)).original
    by_layers = partial(rate_by_layers, original)
    return subject, Subject("original", encoder, prefix, length, by_layers, None)


def _scores(task: TaskFile, found: Scored, beside: Scored | None, version: str) -> TaskScores:
    scores = []
    for key in found.metrics:
        metric, comma, filter_name = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        place = metric, filter_name
        scores.append(
            Score(
                metric,
                filter_name,
                bool(found.higher_is_better.get(metric, True)),
                _estimate(found, *place),
                _estimate(beside, *place) if beside else None,
                _difference(found.values[place], beside.values[place]) if beside else None,
            )
        )
    return TaskScores(task.name, task.sha256, version, found.documents, tuple(scores))


def _estimate(found: Scored, metric: str, filter_name: str) -> Estimate:
    value = float(found.metrics[f"{metric},{filter_name}"])
    error = found.metrics.get(f"{metric}_stderr,{filter_name}")
    return Estimate.normal(value, float(error) if isinstance(error, float) else math.nan)


def _difference(package: Sequence[Any], original: Sequence[Any]) -> Estimate | None:
    """Return the mean difference over the same documents; None where a document has no number."""
    if not all(isinstance(value, int | float) for value in (*package, *original)):
        return None
    differences = np.array(package, np.float64) - np.array(original, np.float64)
    count = len(differences)
    error = differences.std(ddof=1) / math.sqrt(count) if count > 1 else math.nan
    return Estimate.normal(float(differences.mean()), float(error))


def left_out(found: Sequence[TaskScores], reference: bool) -> list[str]:
    """Return the tasks on which the original should be scored too, but is not."""
    return [
        task.task for task in found if reference and all(s.original is None for s in task.scores)
    ]


def describe_tasks(found: Sequence[TaskScores]) -> list[str]:
    """Return the scores as lines."""
    lines = [f"lm-eval {found[0].lm_eval}; 95 % confidence intervals, normal over documents."]
    for task in found:
        lines.append(f"{task.task}, {task.documents:,} documents")
        for score in task.scores:
            lines.append(f"  {score.name:15} {score.package.text('.4f')}")
            if score.original is not None:
                lines.append(f"    original      {score.original.text('.4f')}")
            if score.difference is not None:
                lines.append(f"    difference    {score.difference.text('+.4f')}")
    return lines
