"""Make one package of a fleet, stage by stage, as far as it is not made already."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from llama_onnx.exporter.fleet.fleet_task import Task, bundle_name
from llama_onnx.exporter.fleet.task_inputs import (
    Opened,
    hashes,
    open_task,
    same_content,
    states,
)
from llama_onnx.exporter.fleet.task_record import (
    Record,
    Stage,
    left_to_do,
    origin,
    read_record,
    write_record,
)
from llama_onnx.exporter.packaging.destination import Destination
from llama_onnx.runtime.memory import resident_bytes
from llama_onnx.targets.errors import CheckpointError, PackageError, UsageError
from llama_onnx.targets.package import ModelPackage
from llama_onnx.targets.progress import SILENT, Progress
from llama_onnx.targets.registry import get_target

_BEGUN = "begun "
"""Before the name of a place, in a record: the folder of that bundle is the fleet's."""


@dataclass(frozen=True)
class Order:
    """A task to do in the folder `out` with so many `threads`; `base` is the list's folder, and
    `memory` the bytes that it is predicted to need."""

    task: Task
    out: Path
    base: Path
    threads: int
    memory: int


@dataclass(frozen=True)
class Made:
    """What a task did: the stages that ran, and the figures of all."""

    stages: tuple[str, ...]
    result: dict[str, Any]


def make(order: Order, progress: Progress = SILENT) -> Made:
    """Do what is left of a task. Raises `LlamaOnnxError`; what was finished stays finished.

    What is in `out` under the task's name must be what an earlier run left there.
    """
    task, out, base = order.task, order.out, order.base
    opened, record = open_task(task), read_record(out, task)
    now = states(opened.files, base)
    unchanged = record is not None and same_content(
        record.hashes, record.states, now, opened.files, base
    )
    left = left_to_do(out, task, record, base, unchanged=unchanged)
    if record is not None and unchanged and record.states != now:
        record = replace(record, states=now)
        write_record(out, task, record)
    for stage in left:
        if stage[0] == "export":
            record = _export(order, opened, record, now, stage, progress)
        else:
            assert record is not None
            record = record.after(stage, **_later(order, opened, record, stage, progress))
        write_record(out, task, record)
    assert record is not None
    return Made(tuple(stage[0] for stage in left), record.figures())


def _export(
    order: Order,
    opened: Opened,
    record: Record | None,
    now: dict[str, Any],
    stage: Stage,
    progress: Progress,
) -> Record:
    """Export, resuming what a killed task began with the same files, and return the record."""
    from llama_onnx.exporter.packaging.export import export_package

    task, place = order.task, Destination.at(order.out / order.task.name)
    there = [path for path in (place.out, place.partial) if path.exists()]
    if record is None and there:
        raise UsageError(
            f"{there[0]} exists already, and no fleet made it: move it, or choose another out."
        )
    bundles = record.result.items() if record else ()
    ours = {name: True for name, _ in bundles if name.startswith(_BEGUN)}
    begun = Record(stage[1], now, result=ours)
    same = record is not None and (record.inputs, record.states) == (begun.inputs, now)
    resume = same and there == [place.partial]
    write_record(order.out, task, begun)
    started = time.perf_counter()
    result = export_package(
        opened.source,
        place.out,
        get_target(task.target),
        opened.options,
        adapters=opened.merged,
        kept=opened.folders,
        resume=resume,
        force=bool(there) and not resume,
        hash_source=True,
        tokenizer=task.tokenizer,
        explicit=frozenset(task.options),
        workers=order.threads,
        progress=progress,
    )
    package = ModelPackage.open(place.out)
    known = hashes(opened, package.manifest, order.base)
    if states(opened.files, order.base) != now:
        raise CheckpointError(
            f"{task.source} changed while the task read it: repeat the command when it is complete."
        )
    finished = replace(begun, hashes=known, made=origin(package))
    return finished.after(
        stage,
        predicted_memory_bytes=order.memory,
        package_bytes=result.package_bytes,
        bits_per_weight=result.plan.bits_per_weight,
        precision=result.plan.recipe.precision,
        resumed_bytes=result.resumed_bytes,
        warnings=list(result.warnings),
        export_seconds=time.perf_counter() - started,
        export_peak=_peak(),
    )


def _later(
    order: Order, opened: Opened, record: Record, stage: Stage, progress: Progress
) -> dict[str, Any]:
    """Do a stage that follows the export, and return its figures."""
    package = order.out / order.task.name
    if stage[0] == "certify":
        return _certify(order.task, opened, package, progress)
    if stage[0] == "sign":
        from llama_onnx.runtime.commands.sign import sign_path

        progress.step("signing")
        sign_path(package, Path(order.task.sign or ""))
        return {}
    return _bundle(order, package, stage[0].removeprefix("bundle "), record, progress)


def _certify(task: Task, opened: Opened, package: Path, progress: Progress) -> dict[str, Any]:
    from llama_onnx.exporter.parity.prove import prove

    started = time.perf_counter()
    report = prove(
        package,
        opened.checkpoint,
        accept_loss=task.accept_loss,
        certify=True,
        progress=progress,
    )
    if not report.passed:
        missed = ", ".join(verdict.name for verdict in report.verdicts() if not verdict.passed)
        raise PackageError(
            f"{package} has no certificate, because it differs from its source: {missed}."
        )
    if not report.accepted:
        grade = report.fidelity.grade if report.fidelity else "unknown"
        raise PackageError(
            f"{package} has no certificate, because it loses more than its recipe may ({grade}): "
            "choose another recipe, or set accept_loss."
        )
    figures: dict[str, Any] = {"certify_seconds": time.perf_counter() - started}
    if report.fidelity:
        loss = report.fidelity.shipped
        figures |= {
            "grade": report.fidelity.grade,
            "mean_kl": loss.mean_kl,
            "other_top1": loss.other_top1,
        }
    return {**figures, "certify_peak": _peak()}


def _bundle(
    order: Order, package: Path, place: str, record: Record, progress: Progress
) -> dict[str, Any]:
    from llama_onnx.runtime.bundles.make import Settings, make_bundle
    from llama_onnx.runtime.bundles.places import get_place
    from llama_onnx.runtime.commands.keys import sign_with

    task, folder = order.task, order.out / bundle_name(order.task, place)
    ours = f"{_BEGUN}{place}"
    if folder.exists() and not record.result.get(ours):
        raise UsageError(
            f"{folder} exists already, and no fleet made it: move it, or choose another out."
        )
    write_record(order.out, task, replace(record, result={**record.result, ours: True}))
    progress.step(f"making the bundle for {place}")
    sign = sign_with(Path(task.sign)) if task.sign else None
    settings = Settings(licensed=task.licensed, force=folder.exists(), sign=sign)
    made = make_bundle(ModelPackage.open(package), folder, get_place(place), settings)
    return {ours: True, f"warnings {place}": list(made.warnings)}


def _peak() -> int | None:
    found = resident_bytes()
    return found[1] if found else None


def warnings_of(result: dict[str, Any]) -> Iterator[str]:
    """Yield the warnings of all stages."""
    for name, found in result.items():
        if name == "warnings" or name.startswith("warnings "):
            yield from found


def to_json(order: Order) -> str:
    """Return an order as text for another process."""
    content = {
        "task": asdict(order.task),
        "out": str(order.out),
        "base": str(order.base),
        "threads": order.threads,
        "memory": order.memory,
    }
    return json.dumps(content)


def from_json(text: str) -> Order:
    """Return the order that `to_json` wrote."""
    content = json.loads(text)
    return Order(
        Task.from_json(content["task"]),
        Path(content["out"]),
        Path(content["base"]),
        content["threads"],
        content["memory"],
    )
