"""Checkpoints from the hub, downloaded from a server that the tests run themselves."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result
from huggingface_hub import constants

from llama_onnx.exporter.checkpoints.download import fetch, local_copy
from llama_onnx.exporter.checkpoints.hub import HubId, Origin, hub_origin, source_name
from llama_onnx.exporter.cli import main
from llama_onnx.exporter.commands.options import Source
from llama_onnx.exporter.packaging.export import export_package
from llama_onnx.exporter.packaging.options import Options
from llama_onnx.targets.cpu import TARGET
from llama_onnx.targets.errors import CheckpointError, LlamaOnnxError, UsageError
from tests.support import meta_files, tiny
from tests.support.hub_server import COMMIT, OTHER_COMMIT, Hub, serve
from tests.support.vocabularies import model_named

REPO = "some-body/Llama-2-7b-chat-tiny"
SHARDS = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tiny.write_huggingface(tmp_path / "upstream", shards=2)
    # What the export of a Llama 2 from the hub would not want:
    for name in ("pytorch_model.bin", "model.onnx", "training.log"):
        (folder / name).write_bytes(b"not asked for")
    return folder


@pytest.fixture
def hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Serves `folder`; huggingface_hub asks there, and has an empty cache."""
    with serve(Hub(REPO, folder)) as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        template = running.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache ü"))
        yield running


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def downloads(hub: Hub) -> set[str]:
    return {name for method, name, _ in hub.requests if method == "GET"}


def test_export_downloads_what_it_needs_and_says_where_from(hub: Hub, tmp_path: Path) -> None:
    rtn = ("--precision", "int4", "--quantizer", "rtn")
    result = call("export", REPO, tmp_path / "out", *rtn)
    assert result.exit_code == 0, result.output
    options = Options("int4", quantizer="rtn")
    expected = export_package(hub.folder, tmp_path / "local", TARGET, options).package
    out = tmp_path / "out"
    assert (out / "model.onnx.data").read_bytes() == (expected / "model.onnx.data").read_bytes()
    assert (out / "tokenizer.json").read_bytes() == (expected / "tokenizer.json").read_bytes()
    assert (out / "USE_POLICY.md").read_text("utf-8") == "a policy"
    # The name of the model, not that of the folder in the cache, says that it is a Llama 2.
    assert "Llama 2 is licensed" in (out / "NOTICE").read_text("utf-8")
    source = json.loads((out / "manifest.json").read_text("utf-8"))["source"]
    assert (source["name"], source["commit"]) == (REPO, COMMIT)
    assert set(source["files"]) == {"config.json", *SHARDS}
    files = {name: (hub.folder / name).read_bytes() for name in SHARDS}
    sums = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    assert source["hashes"] == {"from": "hub", "sha256": sums}
    assert downloads(hub).isdisjoint({"pytorch_model.bin", "model.onnx", "training.log"})
    shown = call("inspect", out, "--json").stdout
    assert json.loads(shown)["commit"] == COMMIT


def test_a_second_call_downloads_nothing(hub: Hub) -> None:
    first = fetch(HubId(REPO))
    hub.requests.clear()
    assert fetch(HubId(REPO)) == first
    assert downloads(hub) == set()


def test_without_a_network_the_cache_serves(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    first = fetch(HubId(REPO))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert fetch(HubId(REPO)) == first


@pytest.mark.parametrize(("revision", "commit"), [("v2", OTHER_COMMIT), (COMMIT, COMMIT)])
def test_a_revision(hub: Hub, revision: str, commit: str) -> None:
    assert hub_origin(local_copy(HubId(REPO, revision))) == Origin(REPO, commit)


def test_a_single_file_and_pickled_weights(hub: Hub) -> None:
    for name in (*SHARDS, "model.safetensors.index.json", "pytorch_model.bin"):
        (hub.folder / name).unlink()
    tiny.write_huggingface(hub.folder, pickled=True)
    assert (fetch(HubId(REPO, COMMIT)) / "pytorch_model.bin").stat().st_size > 1000
    tiny.write_huggingface(hub.folder)
    found = fetch(HubId(REPO, OTHER_COMMIT))
    assert (found / "model.safetensors").exists()
    assert not (found / "pytorch_model.bin").exists()


def test_metas_form(hub: Hub, tmp_path: Path) -> None:
    shutil.rmtree(hub.folder)
    meta_files.write_meta(hub.folder, model_named("plain"), shards=2)
    meta_files.write_checklist(hub.folder)
    (hub.folder / "model.safetensors").write_bytes(b"not asked for")
    result = call("export", REPO, tmp_path / "out")
    assert result.exit_code == 0, result.output
    # By the model's name: a chat model of Llama 2, trained on 4096 positions.
    assert "[INST]" in (tmp_path / "out" / "chat_template.jinja").read_text("utf-8")
    config = json.loads((tmp_path / "out" / "config.json").read_text("utf-8"))
    assert config["max_position_embeddings"] == 4096
    assert {"consolidated.00.pth", "consolidated.01.pth", "checklist.chk"} <= downloads(hub)
    assert "model.safetensors" not in downloads(hub)


@pytest.mark.parametrize("verb", ["plan", "inspect"])
def test_plan_and_inspect_fetch_headers_alone(hub: Hub, verb: str) -> None:
    here = json.loads(call(verb, hub.folder, "--json").stdout)
    there = call(verb, REPO, "--json")
    assert there.exit_code == 0, there.output
    differing = {"estimated_seconds", "files", "warnings"}  # no unread file is fetched
    for key in here.keys() - differing:
        assert json.loads(there.stdout)[key] == here[key], key
    for shard in SHARDS:
        assert hub.sent(shard), "nothing of it was fetched"
        assert None not in hub.sent(shard), "it was fetched whole"
    assert not list(Path(constants.HF_HUB_CACHE).rglob(SHARDS[0]))


def test_plan_takes_weights_that_are_there(hub: Hub) -> None:
    fetch(HubId(REPO))
    hub.requests.clear()
    assert call("plan", REPO).exit_code == 0
    assert downloads(hub) == set()


def test_export_proves_the_commit_it_exported(hub: Hub, tmp_path: Path) -> None:
    result = call("export", REPO, tmp_path / "out", "--precision", "fp32", "--prove")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "parity").is_dir()
    assert len(hub.sent(SHARDS[0])) == 1


def test_validate_with_a_reference_on_the_hub(hub: Hub, tmp_path: Path) -> None:
    assert call("export", REPO, tmp_path / "out", "--precision", "fp32").exit_code == 0
    result = call("validate", tmp_path / "out", "--reference", REPO, "--tokens", "2")
    assert result.exit_code == 0, result.output


def test_a_broken_connection_is_taken_up_where_it_broke(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # what is lost at most
    hub.cut.append(SHARDS[1])
    found = fetch(HubId(REPO))
    assert (found / SHARDS[1]).read_bytes() == (hub.folder / SHARDS[1]).read_bytes()
    half = (hub.folder / SHARDS[1]).stat().st_size // 2
    assert hub.sent(SHARDS[1]) == [None, f"bytes={half - half % 1000}-"]


@pytest.mark.slow
def test_a_killed_download_keeps_the_files_that_arrived(hub: Hub, tmp_path: Path) -> None:
    """In a process of its own, ended while the server holds back the second shard."""
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": constants.HF_HUB_CACHE}
    command = [sys.executable, "-m", "llama_onnx.exporter.cli", "export", REPO]
    hub.stalled.append(SHARDS[1])
    process = subprocess.Popen([*command, str(tmp_path / "out")], env=environment)
    hub.reached.wait(60)
    wait_until(lambda: list(Path(constants.HF_HUB_CACHE).rglob(SHARDS[0])))
    process.kill()
    process.wait()
    assert not (tmp_path / "out").exists()
    hub.stalled.clear()
    hub.requests.clear()
    subprocess.run([*command, str(tmp_path / "out")], env=environment, check=True)
    assert downloads(hub) == {SHARDS[1]}


def wait_until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def explained(source: HubId) -> LlamaOnnxError:
    with pytest.raises(LlamaOnnxError) as caught:
        fetch(source)
    assert "\n" not in str(caught.value)
    return caught.value


def test_a_gated_model(hub: Hub) -> None:
    hub.gated = True
    said = explained(HubId(REPO))
    assert isinstance(said, CheckpointError)
    assert f"accepted its license: do so at {hub.url}/{REPO}, log in with `hf auth login`" in str(
        said
    )


def test_no_such_model_and_no_such_revision(hub: Hub) -> None:
    said = explained(HubId("some-body/other"))
    assert isinstance(said, UsageError)
    assert "some-body/other is not a file or folder here, and" in str(said)
    said = explained(HubId(REPO, "v3"))
    assert isinstance(said, UsageError)
    assert f"{REPO} has no branch, tag or commit 'v3'" in str(said)


def test_no_network(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    said = str(explained(HubId(REPO)))
    assert said.startswith(f"{REPO} is not a file or folder here, and http://127.0.0.1:9 cannot be")
    assert "or pass the folder of a local copy" in said


def test_a_model_without_weights_or_config(hub: Hub) -> None:
    (hub.folder / "pytorch_model.bin").unlink()
    (hub.folder / "model.safetensors.index.json").unlink()
    assert "no model.safetensors or pytorch_model.bin" in str(explained(HubId(REPO, COMMIT)))
    (hub.folder / "config.json").unlink()
    said = str(explained(HubId(REPO, OTHER_COMMIT)))
    assert f"`hf download {REPO} FILE`" in said


def test_an_occupied_destination_is_refused_before_the_download(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine", encoding="utf-8")
    assert call("export", REPO, tmp_path / "out").exit_code == 2
    assert hub.requests == []


def test_what_lies_here_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.write_huggingface(tmp_path / "some-body" / "model")
    assert Source.convert("some-body/model", None, None) == Path("some-body/model")
    assert Source.convert("some-body/other", None, None) == HubId("some-body/other")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("meta-llama/Llama-2-7b-hf", HubId("meta-llama/Llama-2-7b-hf")),
        ("a/b@v1.0", HubId("a/b", "v1.0")),
        ("a/b@refs/pr/1", HubId("a/b", "refs/pr/1")),
        ("./a/b", None),
        ("../b", None),
        ("/a/b", None),
        ("a/b/c", None),
        ("a\\b", None),
        ("a", None),
        ("a/b.gguf", None),
        ("a/b@", None),
        ("~/b", None),
        ("ä/b", None),
    ],
)
def test_what_looks_like_an_id(text: str, expected: HubId | None) -> None:
    assert HubId.parse(text) == expected
    if expected is None:
        with pytest.raises(click.BadParameter, match="does not exist"):
            Source.convert(text, None, None)
    else:
        assert str(expected) == text


def test_the_name_of_a_folder_in_the_cache(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--some-body--model" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (tmp_path / "link").symlink_to(snapshot, target_is_directory=True)
    assert source_name(tmp_path / "link") == "some-body/model"
    assert hub_origin(tmp_path) is None
    assert source_name(tmp_path) == tmp_path.name
