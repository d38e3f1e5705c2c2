"""What is kept for a package: found again, never believed if others could have written it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from llama_onnx.runtime.engine.engine import Engine
from llama_onnx.runtime.engine.engine_settings import DEFAULT, EngineSettings
from llama_onnx.runtime.engine.head_rows import LOGITS_FROM
from llama_onnx.runtime.llama.model import Llama
from llama_onnx.runtime.tuning import tuned as module
from llama_onnx.runtime.tuning.cache_folder import cache_folder
from llama_onnx.runtime.tuning.judge_tuning import judge_tuning
from llama_onnx.runtime.tuning.packed_weights import write_packed
from llama_onnx.runtime.tuning.tuned import (
    Place,
    Tuned,
    choose,
    find,
    forget,
    keep,
    tuning,
)
from llama_onnx.targets.errors import LlamaOnnxError, ResourceError, UsageError
from llama_onnx.targets.package import DATA_FILE, MODEL_FILE, ModelPackage
from llama_onnx.targets.providers import CPU, CUDA
from tests.support.answers import Greedy, ask

POSIX = pytest.mark.skipif(sys.platform == "win32", reason="POSIX permissions")


def keep_packed(package: ModelPackage, place: Place, **settings: object) -> EngineSettings:
    with tuning(place):
        folder = write_packed(package, place)
        found = replace(DEFAULT, packed=folder, **settings)  # type: ignore[arg-type]
        keep(place, package, Tuned(found, 0.25), {})
    return found


def keep_plain(place: Place, package: ModelPackage, settings: EngineSettings) -> None:
    with tuning(place):
        keep(place, package, Tuned(settings, 0.25), {})


# where


@pytest.mark.parametrize(
    ("platform", "environment", "expected"),
    [
        ("linux", {"HOME": "/home/x"}, "/home/x/.cache/llama-onnx"),
        ("linux", {"HOME": "/home/x", "XDG_CACHE_HOME": "/big"}, "/big/llama-onnx"),
        ("linux", {"HOME": "/home/x", "XDG_CACHE_HOME": "here"}, "/home/x/.cache/llama-onnx"),
        ("darwin", {"HOME": "/Users/x"}, "/Users/x/Library/Caches/llama-onnx"),
        ("win32", {"LOCALAPPDATA": "/x/Local"}, "/x/Local/llama-onnx/Cache"),
    ],
)
def test_the_cache_is_where_the_platform_keeps_caches(
    platform: str, environment: dict[str, str], expected: str
) -> None:
    assert cache_folder(platform, environment) == Path(expected)


def test_windows_without_a_folder_has_no_cache() -> None:
    assert cache_folder("win32", {}) is None


# found again


def test_nothing_is_found_before_anything_is_kept(cache: Path, opened: ModelPackage) -> None:
    assert find(opened) is None
    assert choose(opened, CPU) == (DEFAULT, None)
    assert not cache.exists(), "looking writes nothing"


def test_what_was_kept_is_found(place: Place, opened: ModelPackage) -> None:
    keep_plain(place, opened, EngineSettings(threads=2, chunk=64, drafts=False))
    assert find(opened) == Tuned(EngineSettings(threads=2, chunk=64, drafts=False), 0.25)
    settings, remark = choose(opened, CPU)
    assert settings.chunk == 64
    assert remark is not None and "2 threads" in remark and "64 tokens" in remark
    assert choose(opened, CUDA) == (DEFAULT, None)


def test_threads_that_the_user_chose_stay(place: Place, opened: ModelPackage) -> None:
    keep_plain(place, opened, EngineSettings(threads=2, chunk=64))
    settings, remark = choose(opened, CPU, threads=1)
    assert settings == EngineSettings(chunk=64)
    assert remark is not None and "thread" not in remark


def test_a_variable_ignores_it(
    place: Place, opened: ModelPackage, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_plain(place, opened, EngineSettings(chunk=64))
    monkeypatch.setenv("LLAMA_ONNX_TUNED", "0")
    assert choose(opened, CPU) == (DEFAULT, None)


@pytest.mark.parametrize("change", [{"processor": "another"}, {"onnxruntime": "1.0.0"}])
def test_another_machine_or_runtime_finds_nothing(
    place: Place, opened: ModelPackage, monkeypatch: pytest.MonkeyPatch, change: dict[str, str]
) -> None:
    keep_packed(opened, place)
    other = replace(place.machine, **change)  # type: ignore[arg-type]
    monkeypatch.setattr(module, "this_machine", lambda: other)
    assert find(opened) is None
    finding = judge_tuning(opened)
    assert finding.status == "warning" and "another" in finding.found


def test_another_package_finds_nothing(
    place: Place, opened: ModelPackage, package_fp32: Path
) -> None:
    keep_plain(place, opened, EngineSettings(chunk=64))
    assert find(ModelPackage.open(package_fp32)) is None


# packed weights


def logits(package: ModelPackage, settings: EngineSettings) -> np.ndarray:
    chooser = Greedy()
    with Engine(package, 64, threads=1, settings=settings) as engine:
        for _ in engine.submit(ask(range(3, 40), 8, chooser=chooser)):
            pass
    return np.stack(chooser.seen)


@pytest.mark.parametrize("precision", ["int4", "fp16"])
def test_packed_weights_compute_the_same_bit_for_bit(
    cache: Path, precision: str, package: Path, package_fp16: Path
) -> None:
    opened = ModelPackage.open(package if precision == "int4" else package_fp16)
    settings = keep_packed(opened, module.require_place(opened), chunk=16)
    found = find(opened)
    assert found is not None and found.settings == settings
    assert settings.packed is not None
    assert LOGITS_FROM.encode() in (settings.packed / MODEL_FILE).read_bytes(), "as the engine runs"
    expected = logits(opened, replace(settings, packed=None))
    assert len(expected) == 8
    assert np.array_equal(logits(opened, settings), expected)


def test_a_package_is_never_written(place: Place, opened: ModelPackage) -> None:
    before = {path: path.stat().st_mtime_ns for path in opened.path.rglob("*")}
    keep_packed(opened, place)
    assert {path: path.stat().st_mtime_ns for path in opened.path.rglob("*")} == before
    assert opened.verify() == []


@POSIX
def test_all_of_it_is_for_this_user_only(cache: Path, place: Place, opened: ModelPackage) -> None:
    keep_packed(opened, place)
    modes = {path.stat().st_mode & 0o077 for path in (cache / "llama-onnx").rglob("*.*")}
    assert modes == {0}


def truncate(folder: Path) -> None:
    os.truncate(folder / DATA_FILE, 1000)


def rewrite(folder: Path) -> None:
    data = bytearray((folder / DATA_FILE).read_bytes())
    data[-1] ^= 1
    (folder / DATA_FILE).write_bytes(data)


def replace_graph(folder: Path) -> None:
    """With the time of the file it replaces: only the hash tells."""
    file = folder / MODEL_FILE
    status = file.stat()
    file.write_bytes(b"x" * status.st_size)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def remove(folder: Path) -> None:
    (folder / DATA_FILE).unlink()


def open_to_all(folder: Path) -> None:
    folder.chmod(0o777)


def open_a_file(folder: Path) -> None:
    (folder / DATA_FILE).chmod(0o666)


def link(folder: Path) -> None:
    folder.rename(folder.with_name("elsewhere"))
    folder.symlink_to(folder.with_name("elsewhere"))


@pytest.mark.parametrize(
    "damage",
    [
        truncate,
        rewrite,
        replace_graph,
        remove,
        pytest.param(open_to_all, marks=POSIX),
        pytest.param(open_a_file, marks=POSIX),
        pytest.param(link, marks=POSIX),
    ],
)
def test_damaged_or_foreign_weights_are_ignored_aloud(
    place: Place, opened: ModelPackage, damage: Callable[[Path], None]
) -> None:
    settings = keep_packed(opened, place)
    assert settings.packed is not None
    damage(settings.packed)
    chosen, remark = choose(opened, CPU)
    assert chosen == DEFAULT
    assert remark is not None and "ignored" in remark and remark.endswith("again.")
    with Llama.load(opened.path) as model:
        assert model.opened.tuned == remark
        assert "".join(model.generate("the fox", max_new_tokens=2))


def test_packed_weights_for_another_version_of_the_engine_are_ignored_aloud(
    place: Place, opened: ModelPackage, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_packed(opened, place)
    monkeypatch.setattr(module, "choose_rows", lambda model: model + b"changed")
    chosen, remark = choose(opened, CPU)
    assert chosen == DEFAULT and remark is not None and "another version" in remark


def test_doctor_also_finds_what_only_the_hash_tells(place: Place, opened: ModelPackage) -> None:
    settings = keep_packed(opened, place)
    assert settings.packed is not None
    assert judge_tuning(opened).status == "ok"
    file = settings.packed / DATA_FILE
    status = file.stat()
    rewrite(settings.packed)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    finding = judge_tuning(opened)
    assert finding.status == "warning" and finding.mend and "tune" in finding.mend


@POSIX
def test_the_folder_of_another_user_is_ignored(
    place: Place, opened: ModelPackage, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_plain(place, opened, EngineSettings(chunk=64))
    me = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: me + 1)
    chosen, remark = choose(opened, CPU)
    assert chosen == DEFAULT and remark is not None and "another user" in remark
    with pytest.raises(ResourceError, match="another user"), tuning(place):
        pass


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        "null",
        '{"settings": 1, "packed": null, "gain": 0}',
        '{"settings": {"threads": 1}, "packed": null, "gain": 0}',
        "[" * 5000,
    ],
)
def test_a_damaged_record_is_ignored_aloud(
    place: Place, opened: ModelPackage, content: str
) -> None:
    keep_plain(place, opened, EngineSettings(chunk=64))
    place.record.write_text(content)
    chosen, remark = choose(opened, CPU)
    assert chosen == DEFAULT and remark is not None and "damaged" in remark


def test_a_record_of_another_version_is_ignored_aloud(place: Place, opened: ModelPackage) -> None:
    keep_plain(place, opened, EngineSettings(chunk=64))
    record = json.loads(place.record.read_text())
    place.record.write_text(json.dumps({**record, "format_version": 1}))
    chosen, remark = choose(opened, CPU)
    assert chosen == DEFAULT and remark is not None
    assert "another version of llama-onnx wrote" in remark


@pytest.mark.parametrize(
    ("key", "value"),
    [("threads", 10**9), ("threads", "2"), ("chunk", 0), ("chunk", True), ("spin", 1)],
)
def test_settings_out_of_range_are_ignored_aloud(
    place: Place, opened: ModelPackage, key: str, value: object
) -> None:
    keep_plain(place, opened, EngineSettings(chunk=64))
    record = json.loads(place.record.read_text())
    record["settings"][key] = value
    place.record.write_text(json.dumps(record))
    chosen, remark = choose(opened, CPU)
    assert chosen == DEFAULT and remark is not None and "damaged" in remark


@pytest.mark.parametrize("name", ["../x.packed", "/etc/x.packed", "x", 3])
def test_a_record_cannot_lead_elsewhere(place: Place, opened: ModelPackage, name: object) -> None:
    keep_packed(opened, place)
    record = json.loads(place.record.read_text())
    record["packed"]["folder"] = name
    place.record.write_text(json.dumps(record))
    with pytest.raises(LlamaOnnxError, match="damaged"):
        find(opened)


# written whole or not at all


def test_one_process_tunes_a_package_at_a_time(place: Place) -> None:
    with tuning(place), pytest.raises(UsageError, match="another process"), tuning(place):
        pass


def test_a_cache_that_cannot_be_made_is_one_sentence(
    tmp_path: Path, cache: Path, place: Place
) -> None:
    cache.parent.mkdir(parents=True, exist_ok=True)
    cache.write_text("a file")
    with pytest.raises(ResourceError, match="cannot be made"), tuning(place):
        pass


KILLED = """
import os, signal, sys
from llama_onnx.runtime.tuning.packed_weights import write_packed
from llama_onnx.runtime.tuning.tuned import require_place, tuning
from llama_onnx.targets.package import ModelPackage

package = ModelPackage.open(sys.argv[1])
place = require_place(package)
with tuning(place):
    print(write_packed(package, place))
    sys.stdout.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""


@POSIX
def test_what_a_killed_tune_leaves_is_not_used_and_goes(place: Place, opened: ModelPackage) -> None:
    command = [sys.executable, "-c", KILLED, str(opened.path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = Path(done.stdout.strip())
    assert (left / DATA_FILE).exists()
    assert find(opened) is None and choose(opened, CPU) == (DEFAULT, None)
    with tuning(place):
        assert not left.exists()


def test_new_packed_weights_replace_the_old(place: Place, opened: ModelPackage) -> None:
    old, new = keep_packed(opened, place), keep_packed(opened, place)
    assert old.packed is not None and new.packed is not None
    assert not old.packed.exists() and new.packed.is_dir()
    found = find(opened)
    assert found is not None and found.settings == new


def test_forgetting_removes_all(place: Place, opened: ModelPackage) -> None:
    assert not forget(opened)
    settings = keep_packed(opened, place)
    assert settings.packed is not None
    assert forget(opened)
    assert find(opened) is None and not settings.packed.exists()
    assert not forget(opened)
