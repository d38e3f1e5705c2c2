"""A fleet and its tasks, as data: one task makes one package."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_onnx.targets.package import PARTIAL_SUFFIX


@dataclass(frozen=True)
class Task:
    """One package: what it is made from, how, and what happens to it afterwards.

    `source` is a whole path, or a model's id on the hub; `adapters` are whole paths too, NAME=DIR
    for those that are kept. `options` are the fields of `Options` that the list sets. `sign` is the
    file of a private key, `bundle` the places that the package is prepared for, `licensed` whether
    a bundle may lack license files.
    """

    name: str
    source: str
    adapters: tuple[str, ...]
    keep_adapter: bool
    target: str
    options: Mapping[str, Any]
    tokenizer: bool
    certify: bool
    accept_loss: bool
    sign: str | None
    bundle: tuple[str, ...]
    licensed: bool

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Task:
        """Read what `dataclasses.asdict` wrote and JSON carried."""
        lists = {name: tuple(content[name]) for name in ("adapters", "bundle")}
        return cls(**{**content, **lists})


@dataclass(frozen=True)
class Fleet:
    """The tasks in `file`, whose packages are made in the folder `out`."""

    file: Path
    out: Path
    tasks: tuple[Task, ...]


def bundle_name(task: Task, place: str) -> str:
    """Return the name of the bundle of a task for a place."""
    return f"{task.name}-{place}"


def output_names(task: Task) -> tuple[str, ...]:
    """Return the names of all folders that a task makes."""
    names = (task.name, *(bundle_name(task, place) for place in task.bundle))
    return (*names, *(name + PARTIAL_SUFFIX for name in names))
