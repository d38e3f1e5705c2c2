"""The list of a fleet: what it means, and where it is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from llama_onnx.exporter.fleet.fleet_file import read_fleet
from llama_onnx.targets.errors import UsageError
from tests.support.fleets import model, write_fleet


def test_the_matrix_of_a_model(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    models = model("own", 'adapters = ["a", "b"]\nblock-size = 64\nsign = "keys/k.pem"') + model(
        "org/model@main", 'target = "cpu"\nprecision = ["int8", "int4"]\ncertify = true'
    )
    fleet = read_fleet(write_fleet(tmp_path, models + model("x/Y.gguf", 'name = "z"')))
    assert fleet.out == tmp_path / "made"
    names = [task.name for task in fleet.tasks]
    assert names == [
        "own-cpu-int4",
        "own-webgpu-int4",
        "model-cpu-int8",
        "model-cpu-int4",
        "z-cpu-int4",
        "z-webgpu-int4",
    ]
    own, *_, hub, _, last = fleet.tasks
    assert own.source == str(tmp_path / "own")
    assert own.adapters == (str(tmp_path / "a"), str(tmp_path / "b"))
    assert own.options == {"quantizer": "rtn", "block_size": 64, "precision": "int4"}
    assert own.sign == str(tmp_path / "keys/k.pem")
    assert (hub.source, hub.certify, own.certify) == ("org/model@main", True, False)
    assert last.source == str(tmp_path / "x/Y.gguf")


def test_without_a_precision_the_name_has_none(tmp_path: Path) -> None:
    [task] = read_fleet(write_fleet(tmp_path, model("own"), "")).tasks
    assert (task.name, task.options) == ("own-cpu", {})


@pytest.mark.parametrize(
    ("models", "line", "said"),
    [
        (model("a", "blok_size = 3"), 10, "the nearest is block_size"),
        (model("a", "prove = true"), 10, "the nearest is certify"),
        (model("a", 'block_size = "x"'), 10, "must be a whole number"),
        (model("a", 'quantizer = "awx"'), 8, "unknown quantizer 'awx'"),
        (model("a") + model("b", "certify = 1"), 13, "must be true or false"),
        (model("a", 'targets = ["cpuu"]'), 10, "the nearest is cpu"),
        (model("a", 'precision = ["int9"]'), 10, "cpu has no precision 'int9'"),
        (model("a", 'name = "../x"'), 10, "not a name for a folder"),
        (model("x/a") + model("y/A"), 11, "[[model]] 2 makes A-cpu-int4 too, as [[model]] 1"),
        (model("a", 'precision = ["int4", "int4"]'), 8, "a-cpu-int4 twice"),
        (model("a", 'bundle = ["moon"]'), 8, "there is no place 'moon'"),
        (model("a", 'bundle = ["hub", "web"]'), 10, "give webgpu a [[model]] of its own"),
        (model("a", "accept_loss = true"), 10, "set certify too"),
        ("[[model]]\nname = 'x'", 8, "has no source"),
        ("", None, "there is no model"),
    ],
)
def test_a_mistake_is_a_sentence_with_its_line(
    models: str, line: int | None, said: str, tmp_path: Path
) -> None:
    file = write_fleet(tmp_path, models)
    with pytest.raises(UsageError) as caught:
        read_fleet(file)
    place = f"{file}, line {line}: " if line else f"{file}: "
    assert str(caught.value).startswith(place), caught.value
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("certify = true", "must be in [defaults] or in a [[model]]"),
        ("out = 3", 'out = "FOLDER" is missing'),
        ("oot = 'x'", "there is no key 'oot'"),
        ("out = 'x", "is not TOML"),
        ("out = 'x'\n[defaults]\nsource = 'x'", "must be in a [[model]]"),
    ],
)
def test_mistakes_outside_the_models(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "f.toml"
    file.write_text(text + "\n[[model]]\nsource = 'a'\n", encoding="utf-8")
    with pytest.raises(UsageError) as caught:
        read_fleet(file)
    assert said in str(caught.value) and str(caught.value).count("\n") == 0


def test_a_list_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        read_fleet(tmp_path / "none.toml")
