"""`inspect`: what a checkpoint is, and what is missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from llama_onnx.exporter.cli import main
from tests.support import tiny
from tests.support.vocabularies import model_named


def facts(path: Path) -> dict[str, Any]:
    result = CliRunner().invoke(main, ["inspect", str(path), "--json"])
    assert result.exit_code == 0, result.output
    content: dict[str, Any] = json.loads(result.stdout)
    return content


@pytest.mark.parametrize("pickled", [False, True])
def test_a_whole_checkpoint(tmp_path: Path, pickled: bool) -> None:
    tiny.write_huggingface(tmp_path, shards=2, dtype="bf16", pickled=pickled)
    found = facts(tmp_path)
    assert found["tokenizer"] == "tokenizer.json"
    assert found["chat_template"] is True
    assert found["licence_files"] == ["LICENSE.txt", "USE_POLICY.md"]
    assert found["missing"] == []
    assert found["problem"] == "none"
    assert found["dtypes"] == {"BF16": len(tiny.weights(tiny.GQA))}
    assert len(found["files"]) == 3


def test_what_is_missing(tmp_path: Path) -> None:
    tiny.write_huggingface(tmp_path, licences=False, config_json={"eos_token_id": None})
    (tmp_path / "USE_POLICY.md").write_text("a policy is no licence", encoding="utf-8")
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer_config.json").unlink()
    found = facts(tmp_path)
    assert (found["tokenizer"], found["chat_template"]) == (None, False)
    assert found["missing"] == ["tokenizer", "licence", "end token"]
    (tmp_path / "tokenizer.model").write_bytes(model_named("plain"))
    assert facts(tmp_path)["tokenizer"] == "tokenizer.model"


def test_for_people(tmp_path: Path) -> None:
    tiny.write_huggingface(tmp_path, licences=False)
    output = CliRunner().invoke(main, ["inspect", str(tmp_path)]).stdout
    rows = {
        line.split("│")[1].strip(): line.split("│")[2].strip()
        for line in output.splitlines()
        if "│" in line
    }
    assert rows["chat template"] == "yes"
    assert rows["license files"] == "none"
    assert rows["missing for a package"] == "licence"


def test_brackets_in_a_path_are_no_markup(tmp_path: Path) -> None:
    folder = tiny.write_huggingface(tmp_path / "q[/b] [red]x")
    for verb in ("inspect", "plan"):
        result = CliRunner().invoke(main, [verb, str(folder)])
        assert result.exit_code == 0, result.output
        assert "q[/b][red]x" in "".join(result.stdout.split())  # a long title is wrapped


def test_a_path_that_is_not_there_is_a_wrong_call(tmp_path: Path) -> None:
    for arguments in (["inspect", "nope"], ["plan", "nope"], ["export", "nope", "out"]):
        assert CliRunner().invoke(main, arguments).exit_code == 2


def test_help_tells_that_nothing_is_opened_by_default() -> None:
    said = " ".join(CliRunner().invoke(main, ["inspect", "--help"]).stdout.split())
    assert "[default: do not open the graph]" in said and "the target's" not in said
    said = " ".join(CliRunner().invoke(main, ["generate", "--help"]).stdout.split())
    assert "[default: the target's]" in said
