"""Windows ML's providers and their devices, with stand-ins: nothing here has run on Windows."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import pytest

from llama_onnx.runtime.placement import windows_ml
from llama_onnx.runtime.placement.session import open_session
from llama_onnx.runtime.placement.windows_ml import list_devices, provider_on, rank
from llama_onnx.targets.errors import ProviderError
from llama_onnx.targets.package import ModelPackage
from llama_onnx.targets.providers import DIRECTML
from llama_onnx.targets.registry import TARGETS
from tests.support.fake_windows_ml import (
    EpCertification,
    EpReadyState,
    ExecutionProvider,
    FakeRuntime,
    ep_device,
    fake_windowsml,
)

RTX, QNN = "NvTensorRTRTXExecutionProvider", "QNNExecutionProvider"

Install = Callable[..., None]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Put entries into the catalog of a `windowsml` that can be imported."""
    return lambda *entries: monkeypatch.setitem(
        sys.modules, "windowsml", fake_windowsml(list(entries))
    )


def test_without_windowsml_there_is_no_catalog() -> None:
    assert windows_ml.read_catalog() == ()


def test_the_catalog_makes_ready_what_is_installed(install: Install) -> None:
    ready, there = ExecutionProvider(RTX), ExecutionProvider("A", EpReadyState.NotReady)
    absent = ExecutionProvider(QNN, EpReadyState.NotPresent)
    broken = ExecutionProvider("B", EpReadyState.NotReady, breaks=True)
    install(ready, there, absent, broken)
    found = windows_ml.read_catalog()
    assert [(e.name, e.state) for e in found] == [
        (RTX, "Ready"),
        ("A", "Ready"),
        (QNN, "NotPresent"),
        ("B", "NotReady"),
    ]
    assert found[0].library.endswith(".dll") and found[2].library == ""
    assert (ready.asked, absent.asked) == (0, 0)  # nothing is downloaded without being asked to
    assert windows_ml.read_catalog(download=True)[2].state == "Ready"
    assert absent.asked == 1


def test_certified_providers_are_registered_once(install: Install) -> None:
    install(
        ExecutionProvider(RTX),
        ExecutionProvider("Odd", certification=EpCertification.Uncertified),
        ExecutionProvider(QNN, EpReadyState.NotPresent),
        ExecutionProvider("Bad"),
    )
    runtime = FakeRuntime([ep_device("CPU", "CPU", "AMD")], {RTX: [ep_device("NvTensorRTRTX")]})
    entries = windows_ml.read_catalog()
    expected = {
        "Odd": "Windows does not call it certified",
        QNN: "it is not installed",
        "Bad": r"LoadLibrary failed with error 126 for C:\Program Files\WindowsApps\Bad.dll",
    }
    assert windows_ml.register(entries, runtime) == expected
    assert windows_ml.register(entries, runtime) == expected
    assert [name for name, _ in runtime.registered] == [RTX]
    assert [str(d) for d in list_devices(runtime)] == [
        "CPUExecutionProvider on CPU AMD",
        f"{RTX} on GPU NVIDIA",
    ]


def test_the_stand_in_has_what_onnxruntime_has() -> None:
    """On any system onnxruntime lists the CPU as a device."""
    real, fake = onnxruntime.get_ep_devices()[0], ep_device("CPU", "CPU")
    for theirs, ours in ((real, fake), (real.device, fake.device)):
        assert [name for name in vars(ours) if not hasattr(theirs, name)] == []
    assert real.device.type.name == "CPU"
    assert callable(onnxruntime.register_execution_provider_library)
    assert isinstance(list_devices(), tuple) and list_devices()[0].ep == "CPUExecutionProvider"


@pytest.mark.parametrize(
    ("target", "order"),
    [
        ("directml", ["NvTensorRTRTX 0", "NvTensorRTRTX 1", "OpenVINO 0", "Dml 0", "QNN 0"]),
        ("cuda", ["NvTensorRTRTX 0", "NvTensorRTRTX 1"]),
        ("webgpu", []),
        ("cpu", []),
        ("portable", ["NvTensorRTRTX 0", "NvTensorRTRTX 1", "OpenVINO 0", "QNN 0"]),
    ],
)
def test_the_order_of_devices(target: str, order: list[str]) -> None:
    devices = list_devices(
        FakeRuntime(
            [
                ep_device("CPU", "CPU", "Intel"),
                ep_device("Dml"),
                ep_device("QNN", "NPU", "Qualcomm"),
                ep_device("OpenVINO", "GPU", "Intel"),
                ep_device("NvTensorRTRTX", device_id=1),
                ep_device("NvTensorRTRTX", device_id=2),
            ],
            {},
        )
    )
    found = [f"{d.ep.removesuffix('ExecutionProvider')} {d.number}" for d in rank(target, devices)]
    assert found == [*order, "CPU 0"]


def test_each_target_has_an_order() -> None:
    assert set(windows_ml._SUITED) == set(TARGETS)


def test_a_graph_opens_on_a_listed_device(package: Path) -> None:
    """onnxruntime's own `add_provider_for_devices`, with the one device that is everywhere."""
    provider = provider_on(list_devices()[0])
    opened = open_session(ModelPackage.open(package).model_path, provider)
    assert opened.session.get_providers() == ["CPUExecutionProvider"]
    assert {node.provider for node in opened.placement.nodes} == {"CPUExecutionProvider"}


def test_a_device_that_is_gone_is_a_sentence(package: Path) -> None:
    [device] = list_devices(FakeRuntime([ep_device("QNN", "NPU", "Qualcomm")], {}))
    with pytest.raises(ProviderError, match="qnn"):
        open_session(ModelPackage.open(package).model_path, provider_on(device))


def test_directml_keeps_its_options_except_the_device() -> None:
    [dml, qnn] = list_devices(FakeRuntime([ep_device("Dml"), ep_device("QNN", "NPU")], {}))
    assert provider_on(dml).provider_options == {"enable_graph_capture": "0"}
    assert (provider_on(dml).name, provider_on(dml).continues) == (DIRECTML.name, False)
    assert (provider_on(qnn).name, provider_on(qnn).provider_options) == ("qnn", {})
