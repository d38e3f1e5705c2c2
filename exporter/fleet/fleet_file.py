"""Read the list of a fleet: a TOML file of models, each for several targets and precisions."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import Field, fields
from difflib import get_close_matches
from itertools import product
from pathlib import Path
from typing import Any

from llama_onnx.exporter.checkpoints.hub import HubId
from llama_onnx.exporter.fleet.fleet_task import Fleet, Task, output_names
from llama_onnx.exporter.packaging.options import Options
from llama_onnx.runtime.bundles.places import PLACES, get_place
from llama_onnx.targets.errors import UsageError
from llama_onnx.targets.folder_files import is_plain_name
from llama_onnx.targets.printable import shown
from llama_onnx.targets.registry import TARGETS, get_target

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_OPTIONS = {field.name: field for field in fields(Options)}

_WORDS: dict[str, type] = {
    "name": str,
    "source": str,
    "adapters": list,
    "keep_adapter": bool,
    "targets": list,
    "no_tokenizer": bool,
    "certify": bool,
    "accept_loss": bool,
    "sign": str,
    "bundle": list,
    "i_have_the_licence": bool,
}
"""Keys of a table that are not options of a package."""

_LISTS = ("targets", "precision")
"""Keys with a value or a list of them, each of which makes a package."""

_OTHER_NAMES = {"target": "targets", "precisions": "precision"}
_ONLY_MODELS = ("name", "source")
_HINTS = {"prove": "certify"}
_FOR_PEOPLE = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}


class _Text:
    """The file, for errors: in which line a key is."""

    def __init__(self, file: Path, text: str) -> None:
        self._file, self._lines = file, text.splitlines()

    def error(self, table: str, number: int, key: str | None, problem: str) -> UsageError:
        """Return an error about `key` in the `number`-th table of its name."""
        line = self._line(table, number, key)
        place = f"{self._file}, line {line}" if line else str(self._file)
        return UsageError(f"{place}: {problem}")

    def _line(self, table: str, number: int, key: str | None) -> int | None:
        heading, current, seen = None, "", 0
        for line, text in enumerate(self._lines, 1):
            if header := re.match(r"\s*\[{1,2}\s*([\w-]+)\s*\]{1,2}", text):
                current = header[1]
                seen += current == table
                if (current, seen) == (table, number):
                    heading = line
            elif key and current == table and (not table or seen == number):
                found = re.match(r"\s*[\"']?([\w-]+)", text)
                if found and found[1].replace("-", "_") == key:
                    return line
        return heading


def read_fleet(file: Path) -> Fleet:
    """Return the tasks in `file`. Paths in it are relative to its folder.

    Raises `UsageError` with file and line for what cannot be meant; what a source contains is not
    looked at.
    """
    try:
        text = file.read_text(encoding="utf-8")
        content = tomllib.loads(text)
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror or error}.") from None
    except RecursionError:
        raise UsageError(f"{file} is nested too deeply.") from None
    except ValueError as error:  # not UTF-8, not TOML, a number of more digits than Python reads
        raise UsageError(f"{file} is not TOML: {str(error).rstrip('.')}.") from None
    where = _Text(file, text)
    unknown = [key for key in content if key not in ("out", "defaults", "model")]
    if unknown:
        raise where.error("", 0, unknown[0], _unknown_at_the_top(unknown[0]))
    out = content.get("out")
    if not isinstance(out, str) or not out:
        raise where.error("", 0, "out", 'out = "FOLDER" is missing, the folder of the packages.')
    base = file.resolve().parent
    defaults = content.get("defaults", {})
    models = content.get("model", [])
    if not isinstance(defaults, dict):
        raise where.error("", 0, "defaults", "defaults must be a table: write [defaults].")
    if not isinstance(models, list) or not models or not isinstance(models[0], dict):
        raise where.error("model", 1, None, "there is no model: write [[model]] and its source.")
    common = _checked(where, "defaults", 1, defaults)
    tasks, owners = list[Task](), dict[str, int]()
    for number, model in enumerate(models, 1):
        given = {**common, **_checked(where, "model", number, model)}
        for task in _tasks(where, number, given, base):
            _claim(where, number, task, owners)
            tasks.append(task)
    return Fleet(file.resolve(), (base / out).resolve(), tuple(tasks))


def _unknown_at_the_top(key: str) -> str:
    plain = _plain(key)
    if plain in _WORDS or plain in _OPTIONS:
        return f"{shown(key)} must be in [defaults] or in a [[model]]."
    return f"there is no key {shown(key)} outside the tables: use out, [defaults] or [[model]]."


def _plain(key: str) -> str:
    plain = key.replace("-", "_")
    return _OTHER_NAMES.get(plain, plain)


def _checked(where: _Text, table: str, number: int, raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a table by the plain names of their keys, if they make sense."""
    found: dict[str, Any] = {}
    for key, value in raw.items():
        name, written = _plain(key), key.replace("-", "_")
        if (name not in _WORDS and name not in _OPTIONS) or (
            table == "defaults" and name in _ONLY_MODELS
        ):
            raise where.error(table, number, written, _unknown(table, number, key))
        if name in found:
            raise where.error(table, number, written, f"{shown(key)} is there twice: keep one.")
        problem = _problem(name, value)
        if problem:
            raise where.error(table, number, written, f"{shown(key)} must be {problem}.")
        found[name] = [value] if name in _LISTS and not isinstance(value, list) else value
    return found


def _unknown(table: str, number: int, key: str) -> str:
    place = "[defaults]" if table == "defaults" else f"[[model]] {number}"
    names = [*_WORDS, *_OPTIONS]
    if table == "defaults":
        if key in _ONLY_MODELS:
            return f"{shown(key)} must be in a [[model]], not in [defaults]."
        names = [name for name in names if name not in _ONLY_MODELS]
    plain = key.replace("-", "_")
    near = [_HINTS[plain]] if plain in _HINTS else get_close_matches(plain, names, 1, 0.5)
    hint = f"the nearest is {near[0]}" if near else f"known keys are {', '.join(names)}"
    return f"{place} has the unknown key {shown(key)}: {hint}."


def _problem(name: str, value: Any) -> str | None:
    """Return what the value of a key must be, None if it is."""
    kind = _WORDS[name] if name in _WORDS else _kind(_OPTIONS[name])
    if name in _LISTS and isinstance(value, str):
        return None
    if name in _LISTS or kind is list:
        texts = isinstance(value, list) and all(isinstance(one, str) and one for one in value)
        empty = name in _LISTS and not value
        return None if texts and not empty else "a list of texts"
    if kind is float and type(value) is int:
        return None
    return None if type(value) is kind and value != "" else _FOR_PEOPLE[kind]


def _kind(field: Field[Any]) -> type:
    choices = tuple(field.metadata["choices"])
    if choices:
        return type(choices[0])
    if field.metadata["number"]:
        return field.metadata["number"]  # type: ignore[no-any-return]
    return str if field.default is None else type(field.default)


def _tasks(where: _Text, number: int, given: Mapping[str, Any], base: Path) -> Iterator[Task]:
    """Yield the packages that a model makes."""

    def wrong(key: str | None, problem: str) -> UsageError:
        return where.error("model", number, key, problem)

    if "source" not in given:
        raise wrong(None, f"[[model]] {number} has no source: write its path or OWNER/NAME.")
    source = _source(given["source"], base)
    name = given.get("name") or _default_name(source)
    if not is_plain_name(name) or "/" in name or name.startswith("."):
        raise wrong("name", f"{shown(name)} is not a name for a folder: give it a plain name.")
    if given.get("accept_loss") and not given.get("certify"):
        raise wrong("accept_loss", "accept_loss is about what certify measures: set certify too.")
    if given.get("keep_adapter") and not given.get("adapters"):
        raise wrong("keep_adapter", "keep_adapter needs at least one of adapters to keep.")
    for target in given.get("targets", ()):
        if target not in TARGETS:
            near = get_close_matches(target, TARGETS, 1, 0.5)
            hint = f"the nearest is {near[0]}" if near else f"use {', '.join(TARGETS)}"
            raise wrong("targets", f"there is no target {shown(target)}: {hint}.")
    try:
        for place in given.get("bundle", ()):
            get_place(place)
        Options(**_options(given, None))
    except UsageError as error:
        raise wrong(None, f"[[model]] {number}: {error}") from None
    _check_places(given, wrong)
    for target, precision in product(given.get("targets", ["cpu"]), given.get("precision", [None])):
        known = get_target(target).graph.precisions
        if precision is not None and precision not in known:
            listed = ", ".join(known)
            problem = f"{target} has no precision {shown(precision)}: use {listed}."
            raise wrong("precision", problem)
        yield Task(
            name="-".join(filter(None, (name, target, precision))),
            source=source,
            adapters=tuple(_adapter(one, base) for one in given.get("adapters", ())),
            keep_adapter=given.get("keep_adapter", False),
            target=target,
            options=_options(given, precision),
            tokenizer=not given.get("no_tokenizer", False),
            certify=given.get("certify", False),
            accept_loss=given.get("accept_loss", False),
            sign=str(base / given["sign"]) if "sign" in given else None,
            bundle=tuple(given.get("bundle", ())),
            licensed=given.get("i_have_the_licence", False),
        )


def _check_places(given: Mapping[str, Any], wrong: Callable[[str | None, str], UsageError]) -> None:
    """Raise an error for a place that cannot take a package for one of the targets."""
    for place, target in product(given.get("bundle", ()), given.get("targets", ("cpu",))):
        if PLACES[place].cpu_packages and target != "cpu":
            raise wrong(
                "bundle",
                f"the place {place} takes packages for the CPU only: give {target} a [[model]] of "
                f"its own, without {place}.",
            )


def _options(given: Mapping[str, Any], precision: str | None) -> dict[str, Any]:
    options = {n: given[n] for n in _OPTIONS if n in given and n != "precision"}
    return {**options, **({"precision": precision} if precision else {})}


def _source(text: str, base: Path) -> str:
    """Return a path, or the id of a model on the hub if there is no such file or folder."""
    path = base / text
    known = HubId.parse(text) is not None and not path.exists()
    return text if known and not text.startswith(".") else str(path)


def _default_name(source: str) -> str:
    hub = HubId.parse(source)
    if hub is not None:
        return hub.repo.rpartition("/")[2]
    path = Path(source)
    return path.stem if path.suffix.lower() == ".gguf" else path.name


def _adapter(text: str, base: Path) -> str:
    """Return DIR, or NAME=DIR, with the folder's whole path."""
    name, equals, folder = text.partition("=")
    if equals and not (base / text).exists():
        return f"{name}={base / folder}"
    return str(base / text)


def _claim(where: _Text, number: int, task: Task, owners: dict[str, int]) -> None:
    """Raise `UsageError` if another task writes what `task` does, on any system."""
    names: Sequence[str] = output_names(task)
    for name in names:
        if name.lower() in owners:
            other = owners[name.lower()]
            twice = "twice" if other == number else f"too, as [[model]] {other} does"
            problem = f"[[model]] {number} makes {name} {twice}: give each model a name of its own."
            raise where.error("model", number, "name", problem)
    owners.update(dict.fromkeys((name.lower() for name in names), number))
