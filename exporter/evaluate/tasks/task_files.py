"""Read task definitions of lm-eval from a folder: a stranger's files, of which nothing is run.

lm-eval's own reader imports the Python that `!function` names, downloads data and metrics, and
renders templates without a sandbox. Here a definition is data: what it may say is listed, and its
data are JSON files of the same folder.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_onnx.exporter.evaluate.tasks.allowed import check_definition
from llama_onnx.exporter.evaluate.tasks.task_yaml import read_yaml
from llama_onnx.targets.errors import UsageError
from llama_onnx.targets.folder_files import is_plain_name, read_inside
from llama_onnx.targets.printable import shown
from llama_onnx.targets.strict_json import JSONError, parse_json

Row = Mapping[str, Any]

_MOST_BYTES = 256 << 20
_MOST_FILES = 1000
_MOST_KEYS = 1000
_MOST_INCLUDED = 4
"""Files that one includes, and how deep."""


@dataclass(frozen=True)
class TaskFile:
    """A task: its `name`, what lm-eval reads of it as `config`, and the rows of each split.

    `sha256` is of the definition and its data.
    """

    name: str
    config: Mapping[str, Any]
    splits: Mapping[str, Sequence[Row]]
    sha256: str

    @property
    def generates(self) -> bool:
        """Whether the model must write an answer, rather than rate given ones."""
        return bool(self.config.get("output_type", "generate_until") == "generate_until")


def read_tasks(folder: Path, names: Sequence[str] = ()) -> list[TaskFile]:
    """Return the tasks of a folder, or those with these `names`, in their order.

    Raises `UsageError` for a task that is missing, damaged, or more than data.
    """
    found: dict[str, tuple[Path, dict[str, Any], Any]] = {}
    for file in _definitions(folder):
        digest = hashlib.sha256()
        config = _merged(folder, file, digest.update, ())
        if "task" not in config and "group" not in config:
            continue  # a part that others include
        path = folder / file
        check_definition(path, config)
        if config["task"] in found:
            other = found[config["task"]][0]
            raise UsageError(f"{other} and {path} both define {config['task']!r}: rename one.")
        found[config["task"]] = path, config, digest
    if not found:
        raise UsageError(f"{folder} has no task of lm-eval: give a folder with their YAML files.")
    for name in names:
        if name not in found:
            has = ", ".join(sorted(found))
            raise UsageError(f"{folder} has no task {shown(name)}: choose from {has}.")
    chosen = dict.fromkeys(names or sorted(found))
    return [_with_data(folder, *found[name]) for name in chosen]


def _definitions(folder: Path) -> list[str]:
    files = (*folder.rglob("*.yaml"), *folder.rglob("*.yml"))
    names = sorted(file.relative_to(folder).as_posix() for file in files)
    if len(names) > _MOST_FILES:
        raise UsageError(f"{folder} has {len(names):,} YAML files: give a folder with fewer.")
    return names


def _merged(
    folder: Path, file: str, seen: Callable[[bytes], object], path: tuple[str, ...]
) -> dict[str, Any]:
    """Return a definition with what it includes, which its own entries override."""
    if file in path:
        raise UsageError(f"{folder / file} includes itself: remove the line.")
    content, config = read_yaml(folder, file)
    seen(content)
    included = config.pop("include", [])
    included = included if isinstance(included, list) else [included]
    if max(len(included), len(path)) > _MOST_INCLUDED:
        raise UsageError(f"{folder / file} includes more than {_MOST_INCLUDED} files: merge some.")
    merged: dict[str, Any] = {}
    for name in included:
        inner = (Path(file).parent / _plain(folder / file, name)).as_posix()
        merged |= _merged(folder, inner, seen, (*path, file))
    return merged | config


def _with_data(folder: Path, path: Path, config: dict[str, Any], digest: Any) -> TaskFile:
    files = config.pop("dataset_kwargs")["data_files"]
    del config["dataset_path"]
    splits = {}
    here = path.relative_to(folder).parent
    # As in `datasets`: without names of splits, all is "train".
    for split, names in (files if isinstance(files, dict) else {"train": files}).items():
        rows: list[Row] = []
        for name in names if isinstance(names, list) else [names]:
            file = (here / _plain(path, name)).as_posix()
            content = read_inside(folder, file, UsageError, max_bytes=_MOST_BYTES)
            digest.update(content)
            rows += _rows(folder / file, content)
        if not rows:
            raise UsageError(f"{path}: the split {split!r} is empty: add rows.")
        splits[split] = _same_keys(path, rows)
    for key in ("training_split", "validation_split", "test_split", "fewshot_split"):
        if config.get(key) is not None and config[key] not in splits:
            raise UsageError(
                f"{path}: {key} is {shown(config[key])}, but data_files has {', '.join(splits)}."
            )
    if config.get("test_split") is None and config.get("validation_split") is None:
        raise UsageError(f"{path} has neither test_split nor validation_split: add one.")
    return TaskFile(config["task"], config, splits, digest.hexdigest())


def _plain(path: Path, name: Any) -> str:
    if not isinstance(name, str) or not is_plain_name(name):
        raise UsageError(
            f"{path} names the file {shown(name)}, which is not in its own folder: copy it there."
        )
    return name


def _rows(path: Path, content: bytes) -> Iterator[Row]:
    whole = content.lstrip().startswith(b"[")
    lines: Iterable[bytes] = [content] if whole else content.splitlines()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = parse_json(line, max_bytes=_MOST_BYTES)
        except JSONError as error:
            raise UsageError(f"{path}: line {number} {error}.") from None
        for row in value if whole else [value]:
            if not isinstance(row, dict):
                raise UsageError(f"{path} has a row that is not an object: write one a line.")
            yield row


def _same_keys(path: Path, rows: Sequence[Row]) -> list[Row]:
    keys = dict.fromkeys(key for row in rows for key in row)
    if len(keys) > _MOST_KEYS:  # each row gets all
        raise UsageError(f"{path}: its rows have {len(keys):,} keys, more than {_MOST_KEYS}.")
    return [{key: row.get(key) for key in keys} for row in rows]
