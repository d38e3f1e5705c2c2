"""The C library's check of model.onnx: the verdicts of the Python runtime, in C."""

from __future__ import annotations

import ctypes
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

import onnx
import pytest

from llama_onnx.targets import graph_file, onnx_file
from llama_onnx.targets.graph_file import check_graph
from llama_onnx.targets.graph_operators import OPERATORS
from llama_onnx.targets.onnx_file import GraphError
from tests.support.changed_graphs import changed
from tests.support.folded_graphs import HOSTILE_FOLDS, SOUND_FOLDS, folded_graph
from tests.support.hostile_packages import GRAPH_CHANGES, SOUND
from tests.support.native import compile_checks, compile_graph_reader
from tests.support.written_graphs import Written, written_graphs

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="built with gcc for Linux's libraries"),
    pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed"),
]

DATA_FILE = "model.onnx.data"


@pytest.fixture(scope="module")
def checks(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return compile_checks(tmp_path_factory.mktemp("checks"))


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Written]:
    """Every kind of graph that the exporter writes."""
    return written_graphs(tmp_path_factory)


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Sequence[Written]], str]:
    """A function that returns a 1 or a 0 for each graph, found with gcc's sanitizers on."""
    program = compile_graph_reader(tmp_path_factory.mktemp("reader"))

    def read(given: Sequence[Written]) -> str:
        content = b"".join(
            len(graph).to_bytes(8, "little") + size.to_bytes(8, "little") + graph
            for graph, size in given
        )
        run = subprocess.run([program], input=content, capture_output=True, check=False)
        assert (run.returncode, run.stderr.decode()) == (0, "")
        return run.stdout.decode()

    return read


def read_in_c(checks: ctypes.CDLL, content: bytes, size: int) -> str | list[int]:
    """Return what is wrong, or layers, heads, their size and the vocabulary."""
    sizes, why = (ctypes.c_int * 4)(), ctypes.create_string_buffer(512)
    length, data_size = ctypes.c_size_t(len(content)), ctypes.c_uint64(size)
    sound = checks.check_model(content, length, data_size, sizes, why)
    return list(sizes) if sound else why.value.decode()


def facts(content: bytes, size: int) -> list[int]:
    found = check_graph(content, DATA_FILE, size)
    return [found.layers, *found.cache, found.vocab_size]


def is_sound(content: bytes, size: int) -> bool:
    try:
        check_graph(content, DATA_FILE, size)
    except GraphError:
        return False
    return True


def written(package: Path) -> Written:
    return (package / "model.onnx").read_bytes(), (package / DATA_FILE).stat().st_size


def sample_refuses(sample: Any, built: Path, package: Path) -> str:
    with pytest.raises(RuntimeError) as caught:
        sample.Model(package, library=built / "libllama_onnx.so")
    text = str(caught.value)
    assert text.endswith(".") and text.isprintable()
    return text


def test_the_lists_and_limits_are_those_of_python(checks: ctypes.CDLL) -> None:
    operators, name = [], ctypes.create_string_buffer(200)
    for index in count():
        if not checks.operator_name(ctypes.c_size_t(index), name, ctypes.c_size_t(200)):
            break
        operators.append(name.value.decode())
    expected = [f"{domain}:{name}" for domain, names in OPERATORS.items() for name in names]
    assert sorted(operators) == sorted(expected)
    bits = {kind: checks.tensor_bits(ctypes.c_uint64(kind)) for kind in range(100)}
    assert {kind: size for kind, size in bits.items() if size} == onnx_file._BITS
    assert [checks.graph_limit(which) for which in range(9)] == [
        graph_file.MAX_BYTES,
        onnx_file.MAX_FIELDS,
        onnx_file.MOST_DIMENSIONS,
        onnx_file._LONGEST_TEXT,
        graph_file._LARGEST_INPUT,
        graph_file._MOST_FOLDS,
        graph_file._MOST_READERS,
        graph_file.LARGEST_TABLE,
        graph_file._MOST_JOINED,
    ]


def test_every_graph_of_the_exporter_passes(
    checks: ctypes.CDLL, graphs: dict[str, Written]
) -> None:
    assert len(graphs) > 70
    for name, (content, size) in graphs.items():
        assert read_in_c(checks, content, size) == facts(content, size), name


def test_weights_are_converted_only_as_the_exporter_converts_them(checks: ctypes.CDLL) -> None:
    for name, parts in SOUND_FOLDS.items():
        assert read_in_c(checks, *folded_graph(*parts)) == facts(*written(SOUND)), name
    for name, (wrong, parts) in HOSTILE_FOLDS.items():
        found = read_in_c(checks, *folded_graph(*parts))
        assert isinstance(found, str) and wrong in found, name


def test_packages_of_earlier_versions_pass(checks: ctypes.CDLL) -> None:
    packages = [path.parent for path in SOUND.parent.glob("*/model.onnx")]
    assert packages
    for package in packages:
        assert read_in_c(checks, *written(package)) == facts(*written(package))


def test_the_sound_one_opens(sample: Any, built: Path) -> None:
    with sample.Model(SOUND, library=built / "libllama_onnx.so") as model:
        assert len(model.generate_ids([1, 40], 2)) == 2


@pytest.mark.parametrize("name", GRAPH_CHANGES)
def test_hostile_graphs_are_refused(sample: Any, built: Path, tmp_path: Path, name: str) -> None:
    package = Path(shutil.copytree(SOUND, tmp_path / "hostile"))
    GRAPH_CHANGES[name](package)
    assert f"{package}/model.onnx " in sample_refuses(sample, built, package)


@pytest.mark.parametrize(
    ("place", "key"),
    [
        ("decoder", "num_hidden_layers"),
        ("decoder", "num_key_value_heads"),
        ("decoder", "head_size"),
        ("", "vocab_size"),
    ],
)
@pytest.mark.parametrize("change", ["one more", "none"])
def test_sizes_in_the_settings_are_those_of_the_graph(
    sample: Any, built: Path, tmp_path: Path, place: str, key: str, change: str
) -> None:
    package = Path(shutil.copytree(SOUND, tmp_path / "sizes"))
    settings = json.loads((package / "genai_config.json").read_text("utf-8"))
    model = settings["model"]
    sizes = model[place] if place else model
    right = sizes.pop(key)
    if change == "one more":
        sizes[key] = right + 1
    (package / "genai_config.json").write_text(json.dumps(settings), "utf-8")
    text = sample_refuses(sample, built, package)
    if (key, change) == ("vocab_size", "none"):
        assert "has no size of the vocabulary" in text
    else:
        given = right + 1 if change == "one more" else 0
        assert f"genai_config.json has {given} as {key}, but the graph has {right}." in text


def test_no_weights_and_a_graph_that_is_no_file(sample: Any, built: Path, tmp_path: Path) -> None:
    package = Path(shutil.copytree(SOUND, tmp_path / "missing"))
    (package / DATA_FILE).unlink()
    assert f"{DATA_FILE} cannot be read." in sample_refuses(sample, built, package)
    (package / "model.onnx").unlink()
    assert "model.onnx cannot be read." in sample_refuses(sample, built, package)


@pytest.mark.slow
def test_changed_graphs_get_python_s_verdict(
    reader: Callable[[Sequence[Written]], str], graphs: dict[str, Written]
) -> None:
    random = Random(11)
    bases = [
        written(SOUND),
        *(graphs[n] for n in ("portable window", "lora int4", "uint8 scales, tied", "int4-yarn")),
    ]
    given = []
    for index in range(500):
        content, size = bases[0 if index % 2 else index // 2 % len(bases)]
        given.append((changed(content, random), size))
    given += [(bases[0][0][:end], bases[0][1]) for end in range(0, len(bases[0][0]), 97)]
    expected = "".join("01"[is_sound(content, size)] for content, size in given)
    assert min(expected.count("0"), expected.count("1")) > 100
    assert reader(given) == expected


@pytest.mark.slow
@pytest.mark.parametrize("order", ["sorted", "reversed", "random"])
def test_many_weights_take_no_time(reader: Callable[[Sequence[Written]], str], order: str) -> None:
    """70,000 weights without bytes, whose long names differ at their ends."""
    content, size = written(SOUND)
    model = onnx.ModelProto.FromString(content)
    names = [f"{'w' * 100}{index:06}" for index in range(70_000)]
    if order != "sorted":
        names.reverse()
    if order == "random":
        Random(1).shuffle(names)
    for name in names:
        model.graph.initializer.add(name=name, data_type=1).dims.append(0)
    sound = model.SerializeToString()
    model.graph.initializer.add(name=names[0], data_type=1).dims.append(0)
    start = time.monotonic()
    assert reader([(sound, size), (model.SerializeToString(), size)]) == "10"
    assert time.monotonic() - start < 20
