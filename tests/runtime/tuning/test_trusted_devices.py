"""A device is trusted after the certificate held there, and that is remembered."""

from __future__ import annotations

import shutil
import stat
import sys
from pathlib import Path

import pytest

from llama_onnx.runtime.placement.windows_ml import Device, list_devices
from llama_onnx.runtime.tuning.trusted_devices import NOT_ENDED, Choice, choose_device, replay
from llama_onnx.targets.errors import PackageError
from llama_onnx.targets.package import ModelPackage
from tests.support.fake_windows_ml import FakeRuntime, ep_device
from tests.support.packages import make_certified

RTX, QNN, CPU = (f"{name}ExecutionProvider" for name in ("NvTensorRTRTX", "QNN", "CPU"))


@pytest.fixture(scope="module")
def certified(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package with its certificate. Read only."""
    return make_certified(tmp_path_factory.mktemp("certified ä 日本"))


@pytest.fixture
def devices() -> tuple[Device, ...]:
    listed = [ep_device("CPU", "CPU"), ep_device("QNN", "NPU"), ep_device("NvTensorRTRTX")]
    return list_devices(FakeRuntime(listed, {}))


@pytest.fixture
def directml(tmp_path: Path, opened: ModelPackage) -> ModelPackage:
    """A package that calls itself one for DirectML; the tests that use it never run it."""
    copy = Path(shutil.copytree(opened.path, tmp_path / "directml"))
    manifest = copy / "manifest.json"
    text = manifest.read_text(encoding="utf-8")
    manifest.write_text(text.replace('"target": "cpu"', '"target": "directml"'), encoding="utf-8")
    package = ModelPackage.open(copy)
    assert package.target == "directml"
    return package


class Replays:
    """Stands for the replay: has problems of devices, and notes which were tested."""

    def __init__(self, problems: dict[str, str]) -> None:
        self.problems, self.tested = problems, list[str]()

    def __call__(self, package: ModelPackage, device: Device) -> str | None:
        self.tested.append(device.ep)
        return self.problems.get(device.ep)


def summary(choice: Choice) -> tuple[str | None, list[tuple[str, str]]]:
    chosen = choice.device.ep if choice.device else None
    return chosen, [(device.ep, problem) for device, problem in choice.refused]


def test_the_best_that_passes_is_chosen_and_remembered(
    cache: Path, directml: ModelPackage, devices: tuple[Device, ...]
) -> None:
    tests = Replays({RTX: "wrong logits"})
    for _ in range(2):
        choice = choose_device(directml, devices, drivers=("A 1",), test=tests)
        assert summary(choice) == (QNN, [(RTX, "wrong logits")])
    assert tests.tested == [RTX, QNN]
    choose_device(directml, devices, drivers=("A 1",), test=tests, again=True)
    assert tests.tested == [RTX, QNN] * 2


@pytest.mark.parametrize("change", ["driver", "provider", "onnxruntime", "package"])
def test_what_changed_is_tested_again(
    cache: Path,
    directml: ModelPackage,
    devices: tuple[Device, ...],
    monkeypatch: pytest.MonkeyPatch,
    change: str,
) -> None:
    choose_device(directml, devices, drivers=("A 1",), test=Replays({}))
    drivers = ("A 1",)
    if change == "driver":
        drivers = ("A 2",)
    elif change == "provider":
        newer = ep_device("NvTensorRTRTX")
        newer.ep_metadata["version"] = "1.1"
        devices = list_devices(FakeRuntime([newer], {}))
    elif change == "onnxruntime":
        monkeypatch.setattr("llama_onnx.runtime.ort.version", lambda: "99.0")
    else:
        manifest = directml.path / "manifest.json"
        manifest.write_bytes(manifest.read_bytes() + b"\n")
    tests = Replays({})
    assert summary(choose_device(directml, devices, drivers=drivers, test=tests)) == (RTX, [])
    assert tests.tested == [RTX]


def test_a_device_that_ends_the_process_is_not_tried_twice(
    cache: Path, directml: ModelPackage, devices: tuple[Device, ...], tmp_path: Path
) -> None:
    """What is on the disk while the test runs is what a crash leaves."""
    left = tmp_path / "left"

    def crash(package: ModelPackage, device: Device) -> str | None:
        shutil.copytree(cache, left)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        choose_device(directml, devices, drivers=(), test=crash)
    tests = Replays({})
    assert summary(choose_device(directml, devices, drivers=(), test=tests)) == (RTX, [])
    shutil.rmtree(cache)
    shutil.copytree(left, cache)
    expected = (QNN, [(RTX, NOT_ENDED)])
    assert summary(choose_device(directml, devices, drivers=(), test=tests)) == expected


def test_no_device_may_be_left(cache: Path, directml: ModelPackage) -> None:
    only = list_devices(FakeRuntime([ep_device("QNN", "NPU")], {}))
    choice = choose_device(directml, only, drivers=(), test=Replays({QNN: "wrong"}))
    assert summary(choice) == (None, [(QNN, "wrong")])


@pytest.mark.skipif(sys.platform == "win32", reason="Windows keeps the folder private by itself")
def test_a_record_that_others_could_have_written_is_not_believed(
    cache: Path, directml: ModelPackage, devices: tuple[Device, ...]
) -> None:
    tests = Replays({})
    choose_device(directml, devices, drivers=(), test=tests)
    [record] = cache.rglob("devices/*/*.json")
    record.chmod(record.stat().st_mode | stat.S_IWOTH)
    choose_device(directml, devices, drivers=(), test=tests)
    record.write_text("{}", encoding="utf-8")
    record.chmod(0o600)
    choose_device(directml, devices, drivers=(), test=tests)
    assert tests.tested == [RTX] * 3


def test_the_certificate_is_replayed_on_onnxruntime_s_device(cache: Path, certified: Path) -> None:
    """The real replay, on the one device that onnxruntime lists everywhere."""
    package = ModelPackage.open(certified)
    devices = list_devices()
    assert summary(choose_device(package, devices)) == (CPU, [])
    never = Replays({})
    assert summary(choose_device(package, devices, test=never)) == (CPU, [])
    assert never.tested == []


def test_a_device_that_does_not_run_the_graph_is_no_choice(certified: Path) -> None:
    [gone] = list_devices(FakeRuntime([ep_device("QNN", "NPU")], {}))
    problem = replay(ModelPackage.open(certified), gone)
    assert problem and "qnn" in problem


def test_a_package_without_a_certificate_has_no_device(cache: Path, opened: ModelPackage) -> None:
    with pytest.raises(PackageError, match="has no certificate"):
        choose_device(opened, list_devices())
    assert not list(cache.rglob("devices/*/*.json"))


def test_a_damaged_package_has_no_device(cache: Path, certified: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(certified, tmp_path / "damaged"))
    with (copy / "model.onnx.data").open("r+b") as file:
        first = file.read(1)
        file.seek(0)
        file.write(bytes([first[0] ^ 1]))
    with pytest.raises(PackageError, match="is damaged"):
        choose_device(ModelPackage.open(copy), list_devices())


def test_the_lines_in_the_documentation_run(
    cache: Path,
    certified: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    page = (Path(__file__).parents[3] / "docs/providers.md").read_text(encoding="utf-8")
    lines = page.partition("## Windows ML")[2].partition("```python\n")[2].partition("```")[0]
    shutil.copytree(certified, tmp_path / "OUT")
    monkeypatch.chdir(tmp_path)
    exec(compile(lines, "providers.md", "exec"), {})
    assert f"{CPU} on CPU" in capsys.readouterr().out
