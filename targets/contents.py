"""What is in a package: the files that exports write, and nothing in them but data.

Checked whenever a package is opened, before any library sees it.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from pathlib import Path

from llama_onnx.targets.errors import PackageError
from llama_onnx.targets.folder_files import file_inside, open_inside
from llama_onnx.targets.genai_settings import GENAI_CONFIG, SettingsError, check_settings
from llama_onnx.targets.graph_file import MAX_BYTES, GraphFacts, check_graph
from llama_onnx.targets.listing import BESIDE
from llama_onnx.targets.onnx_file import GraphError
from llama_onnx.targets.package_json import read_package_json
from llama_onnx.targets.strict_json import MAX_BYTES as MAX_JSON

MODEL_FILE, DATA_FILE = "model.onnx", "model.onnx.data"
TOKENIZER_FILE, CONFIG_FILE = "tokenizer.json", "config.json"
TOKENIZER_SETTINGS = "tokenizer_config.json"

REQUIRED = (MODEL_FILE, DATA_FILE, GENAI_CONFIG)
"""The files that a manifest must name."""

_NAMES = frozenset(
    (
        MODEL_FILE,
        GENAI_CONFIG,
        CONFIG_FILE,
        TOKENIZER_FILE,
        TOKENIZER_SETTINGS,
        "special_tokens_map.json",
        "chat_template.jinja",
        "parity/certificate.json",
    )
)
"""The files with one of `_OPENED` suffixes that exports write."""

OTHER_FILE = "tiktoken_file"
"""The one entry of tokenizer_config.json that names a file: genai 0.18 opens it, wherever it is."""

_OPENED = (".json", ".jinja", ".onnx", ".ort", ".so", ".dll", ".dylib", ".pyd", ".py", ".exe")
"""Suffixes of files that a library opens by name or a system runs: genai's tokenizer would read a
tokenizer_module.json, for example."""


def check_contents(
    folder: Path, index: str, listed: Collection[str], beside: Collection[str], *, tokenizer: bool
) -> None:
    """Raise `PackageError` unless the package in `folder` has the files of an export, and its graph
    and genai_config.json are what exports write.

    `index` is the name of the manifest, which names the `listed` files; those in `beside` may be
    there without being listed. A package with a `tokenizer` must have its file.
    """
    for name in (*REQUIRED, *([TOKENIZER_FILE] if tokenizer else [])):
        if name not in listed:
            raise PackageError(f"{folder / index} is damaged: it does not name {name}.")
    _check_names(folder, listed, {*BESIDE, *beside, index})
    if TOKENIZER_SETTINGS in listed:
        _check_tokenizer_settings(folder)
    check_settings_of(folder, check_graph_of(folder))


def check_graph_of(folder: Path) -> GraphFacts:
    """Return the facts of the graph in `folder`. Raises `PackageError` if it is not a graph that
    exports write, which only its bytes decide: a graph is a program."""
    data = file_inside(folder, DATA_FILE, PackageError)
    content = _read(folder, MODEL_FILE, MAX_BYTES + 1)
    try:
        return check_graph(content, DATA_FILE, data.stat().st_size if data else 0)
    except GraphError as error:
        raise _altered(folder / MODEL_FILE, error) from None


def check_settings_of(folder: Path, graph: GraphFacts) -> None:
    """Raise `PackageError` unless the genai_config.json in `folder` is one that exports write."""
    try:
        check_settings(_read(folder, GENAI_CONFIG, MAX_BYTES), MODEL_FILE, graph)
    except SettingsError as error:
        raise _altered(folder / GENAI_CONFIG, error) from None


def _check_tokenizer_settings(folder: Path) -> None:
    settings = read_package_json(folder, TOKENIZER_SETTINGS, max_bytes=MAX_JSON, unique=False)
    if settings and OTHER_FILE in settings:
        raise PackageError(
            f"{folder / TOKENIZER_SETTINGS} has {OTHER_FILE}, by which onnxruntime-genai would "
            "open any file: no export writes it, so the package was altered; do not use it."
        )


def _check_names(folder: Path, listed: Collection[str], beside: Collection[str]) -> None:
    """Raise `PackageError` for a file that a library would open although exports write none."""
    for name in (*listed, *_entries(folder)):
        if Path(name).suffix.lower() not in _OPENED or name in beside:
            continue
        if name not in _NAMES:
            raise PackageError(f"{folder} holds {name}, which no export writes: remove it.")
        if name not in listed:
            raise PackageError(
                f"{folder} holds {name}, which its manifest does not list: remove it."
            )


def _entries(folder: Path) -> Iterator[str]:
    with os.scandir(folder) as entries:
        yield from sorted(entry.name for entry in entries)


def _read(folder: Path, name: str, most: int) -> bytes:
    with open_inside(folder, name, PackageError) as file:
        return file.read(most)


def _altered(file: Path, error: ValueError) -> PackageError:
    return PackageError(
        f"{file} {error}: the package was altered, or made by another program or a newer "
        "llama-onnx; do not use it unless you know why."
    )
