"""What is known of a task's package: from what it was made, and what was done to it since.

A record is a file in the fleet's own folder in `out`, written after each stage, so that a task that
dies goes on where it was.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from llama_onnx.exporter.fleet.fleet_task import Task, bundle_name
from llama_onnx.exporter.fleet.task_inputs import State, export_inputs
from llama_onnx.runtime.measure.certificate import CERTIFICATE, FOLDER
from llama_onnx.targets.bundle import Bundle
from llama_onnx.targets.durable import replace_file
from llama_onnx.targets.errors import LlamaOnnxError, PackageError
from llama_onnx.targets.listing import SIGNATURE_SUFFIX, check_present, hash_file
from llama_onnx.targets.package import ModelPackage
from llama_onnx.targets.strict_json import JSONError, parse_json

FOLDER_NAME = ".fleet"

Stage = list[Any]
"""Its name, and what it depends on."""

_MADE = ("created_with", "target", "recipe", "source", "tokenizer")
"""Keys of a manifest that say what a package was made from; later stages leave them alone."""


@dataclass(frozen=True)
class Record:
    """`inputs` is what an export depends on besides files, `states` and `hashes` are those of its
    files, by name; there are no hashes until the export is done. `done` are the stages that are
    over, `made` is what the manifest says about the origin, and `result` has figures of each stage.
    """

    inputs: Mapping[str, Any]
    states: Mapping[str, State]
    hashes: Mapping[str, str | None] = field(default_factory=dict)
    done: tuple[Stage, ...] = ()
    made: Mapping[str, Any] = field(default_factory=dict)
    result: Mapping[str, Any] = field(default_factory=dict)

    def after(self, stage: Stage, **figures: Any) -> Record:
        """Return the record with one more stage."""
        done = [one for one in self.done if one[0] != stage[0]]
        return replace(self, done=(*done, stage), result={**self.result, **figures})

    def figures(self) -> dict[str, Any]:
        """Return the figures, and the names of the stages that are over."""
        return {**self.result, "done": [name for name, _ in self.done]}


def record_file(out: Path, task: Task) -> Path:
    """Return where the record of `task` is."""
    return out / FOLDER_NAME / f"{task.name}.json"


def read_record(out: Path, task: Task) -> Record | None:
    """Return the record of `task`, None if there is none that can be read."""
    try:
        content = parse_json(record_file(out, task).read_bytes())
        found = Record(**{**content, "done": tuple(content["done"])})
    except (OSError, JSONError, TypeError, KeyError):
        return None
    maps = (found.inputs, found.states, found.hashes, found.made, found.result)
    well_formed = all(isinstance(one, dict) for one in maps) and all(
        isinstance(stage, list) and len(stage) == 2 for stage in found.done
    )
    return found if well_formed else None


def write_record(out: Path, task: Task, record: Record) -> None:
    """Write the record of `task`, completely or not at all."""
    replace_file(record_file(out, task), (json.dumps(asdict(record), indent=1) + "\n").encode())


def wanted_stages(task: Task, base: Path) -> list[Stage]:
    """Return what has to be done for `task`, in order. Raises `PackageError` for an absent key."""
    stages: list[Stage] = [["export", export_inputs(task, base)]]
    if task.certify:
        stages.append(["certify", {"accept_loss": task.accept_loss}])
    key = {"key": _key(task.sign)} if task.sign else None
    if key:
        stages.append(["sign", key])
    for place in task.bundle:
        stages.append([f"bundle {place}", {"sign": key, "licensed": task.licensed}])
    return stages


def _key(file: str) -> str:
    try:
        return hash_file(Path(file))
    except OSError as error:
        raise PackageError(f"{file} cannot be read: {error.strerror or error}.") from None


def left_to_do(
    out: Path, task: Task, record: Record | None, base: Path, *, unchanged: bool
) -> list[Stage]:
    """Return the stages that are to be done: the first that is not over, and all after it.

    `unchanged`: the files of the source are those of the record. A signed package is exported again
    if its certificate is to change, because nothing may be written into it.
    """
    wanted = wanted_stages(task, base)
    if record is None or not unchanged:
        return wanted
    done = dict(record.done)
    over = [
        done.get(name) == depends and _is_there(out, task, record, name) for name, depends in wanted
    ]
    left = wanted[over.index(False) :] if False in over else []
    if left and left[0][0] == "certify" and _signature(out, task).exists():
        return wanted
    return left


def _signature(out: Path, task: Task) -> Path:
    return out / task.name / f"manifest.json{SIGNATURE_SUFFIX}"


def _is_there(out: Path, task: Task, record: Record, stage: str) -> bool:
    """Whether what a stage makes is still there, with every file in its size."""
    try:
        if stage.startswith("bundle "):
            bundle = Bundle.open(out / bundle_name(task, stage.removeprefix("bundle ")))
            check_present(bundle.path, bundle.files)
            return True
        package = ModelPackage.open(out / task.name)
    except LlamaOnnxError:
        return False
    if stage == "certify":
        return f"{FOLDER}/{CERTIFICATE}" in package.files
    if stage == "sign":
        return _signature(out, task).exists()
    return origin(package) == record.made


def origin(package: ModelPackage) -> dict[str, Any]:
    """Return what the manifest says about what `package` was made from."""
    return {name: package.manifest.get(name) for name in _MADE}
