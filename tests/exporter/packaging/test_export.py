"""Export: bounded, resumable, all or nothing."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_onnx.exporter.packaging import compile as compile_module
from llama_onnx.exporter.packaging import destination as destination_module
from llama_onnx.exporter.packaging.export import export_package
from llama_onnx.exporter.packaging.genai_config import cache_bytes_per_token, default_max_length
from llama_onnx.exporter.packaging.journal import (
    JOURNAL_FILE,
    DataWriter,
    exclusive,
    read_journal,
    write_header,
)
from llama_onnx.exporter.packaging.options import Options
from llama_onnx.exporter.packaging.plan import make_plan
from llama_onnx.exporter.sources import open_checkpoint
from llama_onnx.targets.cpu import TARGET
from llama_onnx.targets.errors import CheckpointError, PackageError, ResourceError, UsageError
from llama_onnx.targets.package import ModelPackage, renew_manifest
from tests.support import tiny
from tests.support.gguf_files import write as write_gguf
from tests.support.packages import Stop
from tests.support.vocabularies import model_named, spm_metadata

INT4 = Options("int4", quantizer="rtn")
"""Rounds to nearest, which is quick: most of this is about the files, not the codes in them."""
AWQ = Options("int4", quantizer="awq")
PRECISIONS = {name: Options(name) for name in ("fp32", "fp16", "int8")} | {"int4": INT4}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_huggingface(tmp_path_factory.mktemp("ä ü 日本") / "a model", shards=2)


@pytest.fixture(scope="module")
def unbroken(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(source, tmp_path_factory.mktemp("unbroken") / "out")


def export(source: Path, out: Path, options: Options = INT4, **flags: Any) -> Path:
    return export_package(source, out, TARGET, options, **flags).package


def as_flag(name: str) -> dict[str, Any]:
    return {name: True}


def partial(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_package_is_whole_and_its_hashes_are_true(unbroken: Path) -> None:
    package = ModelPackage.open(unbroken)
    assert package.verify() == []
    assert (package.target, package.precision) == ("cpu", "int4")
    names = {file.name for file in unbroken.iterdir()}
    assert {"LICENSE.txt", "USE_POLICY.md", "tokenizer.json", "genai_config.json"} <= names
    assert JOURNAL_FILE not in names
    assert not partial(unbroken).exists()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("tied", [False, True])
def test_the_graph_passes_the_checker_but_for_microsofts_operators(
    tmp_path: Path, precision: str, tied: bool
) -> None:
    config = dataclasses.replace(tiny.GQA, tie_word_embeddings=tied)
    source = tiny.write_huggingface(tmp_path / "source", config)
    out = export(source, tmp_path / "out", PRECISIONS[precision])
    onnx.checker.check_model(out / "model.onnx")


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    sizes = {}
    for tied in (False, True):
        config = dataclasses.replace(tiny.GQA, tie_word_embeddings=tied)
        source = tiny.write_huggingface(tmp_path / f"source {tied}", config)
        options = Options(precision="int8")
        out = export(source, tmp_path / f"out {tied}", options)
        sizes[tied] = (out / "model.onnx.data").stat().st_size
    head = 288 * 64
    assert sizes[False] - sizes[True] >= head


def test_hidden_size_that_block_128_does_not_divide(tmp_path: Path) -> None:
    config = dataclasses.replace(tiny.GQA, hidden_size=72, head_dim=16, intermediate_size=200)
    source = tiny.write_huggingface(tmp_path / "source", config)
    for tied in (False, True):
        config = dataclasses.replace(config, tie_word_embeddings=tied)
        tiny.write_huggingface(source, config)
        export(source, tmp_path / f"out {tied}", dataclasses.replace(INT4, block_size=128))


def test_shards_do_not_change_a_byte(unbroken: Path, tmp_path: Path) -> None:
    single = export(tiny.write_huggingface(tmp_path / "source"), tmp_path / "out")
    for name in ("model.onnx", "model.onnx.data"):
        assert digest(single / name) == digest(unbroken / name)


# --- interruption ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unbroken_awq(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(source, tmp_path_factory.mktemp("unbroken awq") / "out", AWQ)


@pytest.mark.slow
@settings(max_examples=12, deadline=None)
@given(count=st.integers(1, 60))
def test_interrupted_anywhere_and_resumed_gives_the_same_bytes(
    source: Path, unbroken_awq: Path, tmp_path_factory: pytest.TempPathFactory, count: int
) -> None:
    """While it calibrates, too."""
    out = tmp_path_factory.mktemp("resume") / "out"
    with pytest.raises(KeyboardInterrupt):
        export(source, out, AWQ, progress=Stop(count, KeyboardInterrupt()))
    assert not out.exists()
    export(source, out, AWQ, resume=True)
    assert digest(out / "model.onnx.data") == digest(unbroken_awq / "model.onnx.data")
    assert ModelPackage.open(out).verify() == []


def test_killed_and_resumed(source: Path, unbroken: Path, tmp_path: Path) -> None:
    """A real process, a real SIGKILL (TerminateProcess on Windows)."""
    out = tmp_path / "ö out"
    code = (
        "import sys, time; from pathlib import Path\n"
        "from llama_onnx.exporter.packaging.export import export_package\n"
        "from llama_onnx.targets.progress import Silent\n"
        "from llama_onnx.exporter.packaging.options import Options\n"
        "from llama_onnx.targets.cpu import TARGET\n"
        "class Slow(Silent):\n"
        "    def update(self, *_): time.sleep(0.05)\n"
        "export_package(Path(sys.argv[1]), Path(sys.argv[2]), TARGET,"
        " Options('int4', quantizer='rtn'), progress=Slow())\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(source), str(out)])
    journal = partial(out) / JOURNAL_FILE
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if journal.exists() and journal.read_bytes().count(b"\n") >= 5:
            break
        time.sleep(0.01)
    os.kill(process.pid, getattr(signal, "SIGKILL", signal.SIGTERM))
    process.wait()
    assert not out.exists()
    result = export_package(source, out, TARGET, INT4, resume=True)
    assert result.resumed_bytes > 0
    assert digest(out / "model.onnx.data") == digest(unbroken / "model.onnx.data")


def test_resuming_believes_nothing(source: Path, unbroken: Path, tmp_path: Path) -> None:
    """A byte of the half-written file that changed on the disk is written anew."""
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        export(source, out, progress=Stop(30, KeyboardInterrupt()))
    data = partial(out) / "model.onnx.data"
    content = bytearray(data.read_bytes())
    content[5000] ^= 1
    data.write_bytes(content)
    result = export_package(source, out, TARGET, INT4, resume=True)
    assert result.resumed_bytes < 5000
    assert digest(out / "model.onnx.data") == digest(unbroken / "model.onnx.data")


def test_a_journal_line_cut_short_is_no_line(tmp_path: Path) -> None:
    path = tmp_path / JOURNAL_FILE
    write_header(path, {"options": 1})
    with DataWriter(tmp_path, "data") as writer:
        writer.write(b"abc")
        writer.finish_slot("a")
    path.write_text(path.read_text() + '{"slot": "b", "en')
    assert [entry.slot for entry in read_journal(path, {"options": 1})] == ["a"]


def test_resume_refuses_other_options(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        export(source, out, AWQ, progress=Stop(9, KeyboardInterrupt()))
    with pytest.raises(UsageError, match="options and calibration changed since"):
        export(source, out, Options(precision="int8"), resume=True)
    assert partial(out).exists()


def test_resume_refuses_a_source_that_changed(tmp_path: Path) -> None:
    source, out = tiny.write_huggingface(tmp_path / "source"), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        export(source, out, progress=Stop(9, KeyboardInterrupt()))
    os.utime(source / "model.safetensors", ns=(1, 1))
    with pytest.raises(UsageError, match="source changed since"):
        export(source, out, resume=True)


def test_resume_with_nothing_to_resume_starts(source: Path, tmp_path: Path) -> None:
    assert export(source, tmp_path / "out", resume=True).is_dir()


def test_an_unfinished_export_is_not_overwritten_in_silence(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        export(source, out, progress=Stop(9, KeyboardInterrupt()))
    with pytest.raises(UsageError, match="--resume"):
        export(source, out)
    export(source, out, force=True)


# --- destinations ---------------------------------------------------------------------------


def test_an_existing_package_stays_unless_forced(source: Path, tmp_path: Path) -> None:
    out = export(source, tmp_path / "out")
    with pytest.raises(UsageError, match="exists already"):
        export(source, out)
    with pytest.raises(UsageError, match="nothing to resume"):
        export(source, out, resume=True)
    export(source, out, Options(precision="int8"), force=True)
    assert ModelPackage.open(out).precision == "int8"
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("manifest", [None, "{}", '{"name": "a web app"}', '{"files": {}}'])
def test_force_does_not_replace_what_is_no_package(
    source: Path, tmp_path: Path, manifest: str | None
) -> None:
    (tmp_path / "thesis").mkdir()
    if manifest is not None:
        (tmp_path / "thesis" / "manifest.json").write_text(manifest)
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    with pytest.raises(UsageError, match="is not a package"):
        export(source, tmp_path / "thesis", force=True)
    assert (tmp_path / "thesis" / "chapter.txt").exists()


@pytest.mark.parametrize("flag", ["force", "resume"])
def test_a_folder_called_like_an_unfinished_export_is_not_deleted(
    source: Path, tmp_path: Path, flag: str
) -> None:
    mine = tmp_path / "out.partial"
    mine.mkdir()
    (mine / "chapter.txt").write_text("years of work")
    with pytest.raises(UsageError, match="in the way"):
        export(source, tmp_path / "out", **as_flag(flag))
    assert (mine / "chapter.txt").exists()


def test_force_never_replaces_the_source(tmp_path: Path) -> None:
    source = tiny.write_huggingface(tmp_path / "outer" / "source")
    package = export(source, tmp_path / "package")
    shutil.copy(package / "manifest.json", source)
    shutil.copy(package / "manifest.json", source.parent)
    for out in (source, source.parent, source / ".." / "source"):
        with pytest.raises(UsageError, match="holds the source"):
            export(source, out, force=True)
    assert (source / "model.safetensors").exists()


def test_a_package_inside_its_source_is_refused(source: Path) -> None:
    before = sorted(source.rglob("*"))
    with pytest.raises(UsageError, match="is inside the source"):
        export(source, source / "sub" / "out")
    assert sorted(source.rglob("*")) == before


def test_what_an_export_killed_while_it_replaced_a_package_left_is_removed(
    source: Path, tmp_path: Path
) -> None:
    out = export(source, tmp_path / "out")
    left = tmp_path / "out.previous-x1y2z3"
    (left / "out").mkdir(parents=True)
    mine = tmp_path / "out.previous-years"
    mine.mkdir()
    (mine / "thesis.txt").touch()
    export(source, out, force=True)
    assert {path.name for path in tmp_path.iterdir()} == {"out", "out.previous-years"}


def test_a_link_to_a_package_stays_a_link(source: Path, tmp_path: Path) -> None:
    package = export(source, tmp_path / "package")
    (tmp_path / "link").symlink_to(package)
    export(source, tmp_path / "link", Options(precision="int8"), force=True)
    assert (tmp_path / "link").is_symlink()
    assert ModelPackage.open(package).precision == "int8"
    assert {file.name for file in tmp_path.iterdir()} == {"package", "link"}


@pytest.mark.parametrize("out", ["/", "x" * 300])
def test_impossible_names(source: Path, out: str) -> None:
    with pytest.raises(UsageError, match=r"cannot be|cannot write|holds the source"):
        export(source, Path(out))


def test_two_exports_to_one_place(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        export(source, out, progress=Stop(9, KeyboardInterrupt()))
    with exclusive(partial(out)):
        for flag in ("resume", "force"):
            with pytest.raises(UsageError, match="another export is writing"):
                export(source, out, **as_flag(flag))
            assert (partial(out) / JOURNAL_FILE).exists()
    assert export_package(source, out, TARGET, INT4, resume=True).resumed_bytes > 0


@pytest.mark.parametrize(
    ("module", "step"), [(compile_module, "write_manifest"), (destination_module, "_publish")]
)
def test_killed_at_the_very_end_loses_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: ModuleType, step: str
) -> None:
    out = tmp_path / "out"

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, step, killed)
        export(source, out)
    result = export_package(source, out, TARGET, INT4, resume=True)
    assert result.resumed_bytes == result.plan.data_bytes
    assert ModelPackage.open(out).verify() == []


@pytest.mark.parametrize("operation", ["resume", "renew"])
def test_killed_before_the_journal_was_removed(
    source: Path, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    out = tmp_path / "out"

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(destination_module, "remove_working_files", killed)
        export(source, out)
    assert (out / JOURNAL_FILE).exists()
    opened = ModelPackage.open(out)
    assert opened.verify() == []
    if operation == "resume":
        with pytest.raises(UsageError, match="there is nothing to resume"):
            export(source, out, resume=True)
    else:
        opened = renew_manifest(opened)
    assert set(opened.files) == set(ModelPackage.open(unbroken).files)
    assert {path.name for path in out.iterdir()} == {path.name for path in unbroken.iterdir()}


def test_a_package_that_cannot_be_renamed_stays(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = export(source, tmp_path / "out")
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise PermissionError(errno.EACCES, "in use")
        return rename(self, target)

    with monkeypatch.context() as patch, pytest.raises(ResourceError, match=r"in use.*--resume"):
        patch.setattr(Path, "rename", refuse)
        export(source, out, Options(precision="int8"), force=True)
    assert ModelPackage.open(out).verify() == []
    assert {file.name for file in tmp_path.iterdir()} == {"out", "out.partial"}


def test_a_source_without_tokenizer_is_refused_before_a_weight_is_read(tmp_path: Path) -> None:
    source = tiny.write_huggingface(tmp_path / "source")
    (source / "tokenizer.json").unlink()
    progress = Stop(1, AssertionError("weights were written"))
    with pytest.raises(CheckpointError, match=r"neither a tokenizer\.json nor a tokenizer\.model"):
        export(source, tmp_path / "out", progress=progress)
    (source / "tokenizer.json").write_text('{"x":')
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read"):
        export(source, tmp_path / "out", progress=progress)
    assert [file.name for file in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("bad", [{"top_p": 1.5}, {"temperature": "hot"}, {"do_sample": 1}])
def test_sampling_defaults_genai_cannot_take(tmp_path: Path, bad: dict[str, Any]) -> None:
    source = tiny.write_huggingface(tmp_path / "source")
    (source / "generation_config.json").write_text(json.dumps(bad))
    with pytest.raises(CheckpointError, match=f"sets {next(iter(bad))} to"):
        export(source, tmp_path / "out")


def test_a_forced_export_that_fails_leaves_the_old_package(source: Path, tmp_path: Path) -> None:
    out = export(source, tmp_path / "out")
    bad = tiny.weights(tiny.GQA)
    bad["model.norm.weight"][3] = np.nan
    with pytest.raises(CheckpointError):
        export(tiny.write_huggingface(tmp_path / "bad", tensors=bad), out, force=True)
    assert ModelPackage.open(out).verify() == []


@pytest.mark.skipif(
    hasattr(os, "geteuid") and os.geteuid() == 0,
    reason="root writes everywhere; run the tests as another user",
)
def test_read_only_destination(source: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(UsageError, match="cannot write to"):
            export(source, tmp_path / "out")
    finally:
        tmp_path.chmod(0o700)


def test_destination_below_a_file(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot write to"):
        export(source, tmp_path / "file" / "out")


# --- disk -----------------------------------------------------------------------------------


def test_too_small_a_disk_is_noticed_before_anything_is_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ResourceError, match=r"0\.00 GB free, but the package needs 0\.07 GB"):
        export(source, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_keeps_what_can_be_resumed(
    source: Path, unbroken: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    full = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(ResourceError, match=r"disk is full.*--resume"):
        export(source, out, progress=Stop(20, full))
    assert not out.exists()
    export(source, out, resume=True)
    assert digest(out / "model.onnx.data") == digest(unbroken / "model.onnx.data")


# --- bad weights ----------------------------------------------------------------------------


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_not_finite_leave_nothing_behind(
    tmp_path: Path, precision: str, bad: float
) -> None:
    weights = tiny.weights(tiny.GQA)
    weights["model.layers.1.mlp.down_proj.weight"][5, 7] = bad
    source = tiny.write_huggingface(tmp_path / "source", tensors=weights)
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.down_proj.*NaN or infinity"):
        export(source, tmp_path / "out", PRECISIONS[precision])
    assert [file.name for file in tmp_path.iterdir()] == ["source"]


def test_a_value_beyond_half_precision_names_the_way_out(tmp_path: Path) -> None:
    weights = tiny.weights(tiny.GQA)
    weights["model.layers.1.mlp.down_proj.weight"][5, 7] = 1e5
    source = tiny.write_huggingface(tmp_path / "source", tensors=weights)
    with pytest.raises(CheckpointError, match=r"too large for float16.*fp32"):
        export(source, tmp_path / "out", Options(precision="fp16"))


def test_a_graph_that_overflows_is_not_published(tmp_path: Path) -> None:
    weights = tiny.weights(tiny.GQA)
    weights["model.layers.2.input_layernorm.weight"][:] = 3e38
    source = tiny.write_huggingface(tmp_path / "source", tensors=weights)
    with pytest.raises(PackageError, match=r"NaN or infinity in .*layer 2"):
        export(source, tmp_path / "out", Options(precision="fp32"))
    assert not (tmp_path / "out").exists()


def test_a_graph_onnxruntime_refuses_is_not_published(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serialize = compile_module._serialize

    def broken(built: Any) -> bytes:
        return serialize(built).replace(b"num_heads", b"num_headz")

    monkeypatch.setattr(compile_module, "_serialize", broken)
    with pytest.raises(PackageError, match=r"onnxruntime refuses .*model\.onnx"):
        export(source, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# --- plan and genai_config ------------------------------------------------------------------


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_plan_foretells_the_size_exactly(source: Path, tmp_path: Path, precision: str) -> None:
    options = PRECISIONS[precision]
    plan = make_plan(open_checkpoint(source), TARGET, options, workers=2)
    out = export(source, tmp_path / "out", options)
    assert (out / "model.onnx.data").stat().st_size == plan.data_bytes


def test_unknown_precision_for_the_target(source: Path) -> None:
    with pytest.raises(UsageError, match="'bf16' is not available for the target cpu"):
        make_plan(open_checkpoint(source), TARGET, Options(precision="bf16"), workers=1)


def test_genai_config(source: Path, unbroken: Path) -> None:
    settings = json.loads((unbroken / "genai_config.json").read_text())
    assert settings["model"]["eos_token_id"] == 2
    assert settings["model"]["context_length"] == settings["search"]["max_length"] == 256
    assert settings["search"]["do_sample"] is False


def test_generation_config_reaches_genai(tmp_path: Path) -> None:
    source = tiny.write_huggingface(tmp_path / "source")
    generation = {"eos_token_id": [2, 7], "do_sample": True, "temperature": 0.6, "top_p": 0.9}
    (source / "generation_config.json").write_text(json.dumps(generation))
    out = export(source, tmp_path / "out")
    settings = json.loads((out / "genai_config.json").read_text())
    assert settings["model"]["eos_token_id"] == [2, 7]
    assert settings["search"]["temperature"] == 0.6
    assert settings["search"]["do_sample"] is True


def test_default_max_length_keeps_the_cache_within_a_gigabyte() -> None:
    seven_b = dataclasses.replace(
        tiny.GQA,
        hidden_size=4096,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        head_dim=128,
        max_position_embeddings=4096,
    )
    assert cache_bytes_per_token(seven_b) == 1 << 20
    assert default_max_length(seven_b) == 1024
    assert default_max_length(tiny.GQA) == tiny.GQA.max_position_embeddings


def test_a_tokenizer_with_more_ids_than_the_embedding_has_rows(tmp_path: Path) -> None:
    """In GGUF's form; tokenizer/test_folder.py has it in Hugging Face's, test_meta.py in Meta's."""
    file = write_gguf(tmp_path / "m.gguf", keys=spm_metadata(model_named("plain")))
    with pytest.raises(CheckpointError, match="the id 519, but the embedding has 288 rows"):
        export(file, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))
