"""A hub that lies, or a model whose names lead elsewhere, writes nothing outside its folder."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from huggingface_hub import constants, get_session

from llama_onnx.exporter.checkpoints.hub import HubId
from llama_onnx.exporter.cli import main
from tests.support import tiny
from tests.support.hub_server import Hub, serve

REPO = "some-body/tiny"
UP = "../" * 8
OUTSIDE = (
    "../escaped",
    f"{UP}escaped",
    "/escaped",
    "a/../../../../escaped",
    "..\\escaped",
    "a\0b",
    "C:escaped",
)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serve(Hub(REPO, tiny.write_huggingface(tmp_path / "upstream", shards=2))) as running:
        template = running.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "a/b/c/d/cache"))
        yield running


def refused(tmp_path: Path, *arguments: str) -> str:
    """Call the command and return its error; nothing outside the cache is written."""
    before = {path for path in tmp_path.rglob("*") if "cache" not in path.parts}
    result = CliRunner().invoke(main, list(arguments))
    assert result.exit_code in (1, 2), result.output
    assert isinstance(result.exception, SystemExit), result.exception
    written = {path for path in tmp_path.rglob("*") if "cache" not in path.parts} - before
    assert {path.name for path in written} <= {"a", "b", "c", "d"}
    assert not Path("/escaped").exists()
    return result.output


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("command", ["inspect", "export"])
def test_an_index_that_names_a_file_elsewhere(
    command: str, name: str, hub: Hub, tmp_path: Path
) -> None:
    index = hub.folder / "model.safetensors.index.json"
    content = json.loads(index.read_text("utf-8"))
    content["weight_map"]["model.norm.weight"] = name
    index.write_text(json.dumps(content), "utf-8")
    out = [str(tmp_path / "out")] if command == "export" else []
    refused(tmp_path, command, REPO, *out)


def changed(key: str, value: Any) -> Callable[[Any], Any]:
    def change(answer: Any) -> Any:
        for entry in answer if isinstance(answer, list) else [answer]:
            if key in entry or key in ("lfs", "xetHash"):
                entry[key] = value
        return answer

    return change


FORGED = {
    **{f"commit {name!r}": changed("sha", name) for name in OUTSIDE},
    **{f"hash {name!r}": changed("oid", name) for name in OUTSIDE},
    **{f"file {name!r}": changed("path", name) for name in OUTSIDE},
    "commit of 41 digits": changed("sha", "0" * 41),
    "commit in capitals": changed("sha", "A" * 40),
    "commit as a number": changed("sha", 1),
    "hash as a list": changed("oid", []),
    "a hash of a large file": changed("lfs", {"sha256": "../../escaped", "size": 1}),
    "a hash of Xet": changed("xetHash", "../../escaped"),
    "license elsewhere": changed("path", f"LICENSE/{UP}escaped"),
    "100 levels": lambda _: json.loads("[" * 150 + "]" * 150),
    "a text": lambda _: "x",
    "20 MB": lambda _: ["x" * 1000] * 20_000,
}


@pytest.mark.parametrize("name", FORGED)
def test_a_hub_that_answers_with_other_names(name: str, hub: Hub, tmp_path: Path) -> None:
    hub.forge = FORGED[name]
    output = refused(tmp_path, "inspect", REPO)
    assert "answers with" in output or "could not be downloaded" in output or "no config" in output


@pytest.mark.parametrize("value", [f'"{name}"' for name in OUTSIDE if "\0" not in name])
@pytest.mark.parametrize("header", ["ETag", "X-Linked-Etag", "X-Repo-Commit"])
def test_a_hub_that_answers_with_other_headers(
    header: str, value: str, hub: Hub, tmp_path: Path
) -> None:
    hub.forged_headers = {header: value}
    output = " ".join(refused(tmp_path, "inspect", f"{REPO}@v2").split())
    assert "answers with the" in output


def test_a_header_without_end(hub: Hub, tmp_path: Path) -> None:
    shard = hub.folder / "model-00001-of-00002.safetensors"
    shard.write_bytes(struct.pack("<Q", 2**40) + b"{" + b" " * 200_000)
    refused(tmp_path, "inspect", REPO)


@pytest.mark.parametrize("revision", ["../../x", "..", "/x", "a/../b", "a//b", "./x"])
def test_a_revision_is_not_a_path(revision: str) -> None:
    assert HubId.parse(f"{REPO}@{revision}") is None


def test_the_check_is_gone_afterwards(hub: Hub, tmp_path: Path) -> None:
    before = list(get_session().event_hooks["response"])
    result = CliRunner().invoke(main, ["inspect", REPO])
    assert result.exit_code == 0, result.output
    assert get_session().event_hooks["response"] == before
