"""Findings from made-up facts: every machine that no test runs on."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from llama_onnx.runtime.doctor.devices import judge_graphics, judge_tried
from llama_onnx.runtime.doctor.examine import examine
from llama_onnx.runtime.doctor.facts import (
    Disk,
    Encodings,
    Facts,
    Gpu,
    Graphics,
    Int4Kernels,
    Libraries,
    Loaded,
    Memory,
    Processor,
    ProviderRun,
    Python,
    Wheels,
    WindowsFacts,
    WindowsML,
)
from llama_onnx.runtime.doctor.finding import Finding, worst
from llama_onnx.runtime.doctor.hardware import (
    judge_cores,
    judge_disk,
    judge_memory,
    judge_processor,
)
from llama_onnx.runtime.doctor.int4 import int4_kernels, judge_int4
from llama_onnx.runtime.doctor.requirements import unmet
from llama_onnx.runtime.doctor.software import (
    judge_encodings,
    judge_export,
    judge_genai,
    judge_onnxruntime,
    judge_python,
    judge_telemetry,
)
from llama_onnx.runtime.doctor.windows import (
    judge_long_paths,
    judge_strays,
    judge_vc_runtime,
)
from llama_onnx.targets.providers import CPU, CUDA, WEBGPU

WHEELS = Wheels(
    llama_onnx="0.1.0",
    onnxruntime={"onnxruntime": "1.32.0"},
    genai={"onnxruntime-genai": "0.18.0"},
    requires={"onnxruntime-genai": ("numpy>=1.21.6", "onnxruntime>=1.31.0")},
    extras={
        "cpu": ("onnxruntime>=1.31", "tokenizers>=0.21"),
        "cuda": ("onnxruntime-gpu[cuda,cudnn]>=1.31",),
        "export": ("torch>=2.7", "ml-dtypes>=0.5"),
    },
    others={"torch": "2.13.0+cpu", "ml-dtypes": "0.5.4", "tokenizers": "0.22.0"},
)
CUDA_WHEELS = replace(
    WHEELS,
    onnxruntime={"onnxruntime-gpu": "1.31.1"},
    genai={"onnxruntime-genai-cuda": "0.18.0"},
    requires={"onnxruntime-genai-cuda": ("onnxruntime-gpu>=1.31.0",)},
)
ORT = Loaded("1.32.0", providers=("AzureExecutionProvider", CPU.ort_name))
GENAI = Loaded("0.18.0")
L40 = Gpu("NVIDIA L40", "580.82.07", 48 << 30, (8, 9))
PROCESSOR = Processor(
    "A processor",
    8,
    16,
    16,
    features={"AVX2": True, "AVX512": True, "VNNI": True},
    int4=Int4Kernels("AVX512-VNNI"),
)
HEALTHY = Facts(
    platform="linux",
    python=Python("3.11.7", 64, "x86_64"),
    wheels=WHEELS,
    onnxruntime=ORT,
    genai=GENAI,
    libraries=(),
    tried=(ProviderRun("cpu", nodes=34, logits=(1.0, 2.0), seconds=0.1),),
    graphics=Graphics(),
    processor=PROCESSOR,
    memory=Memory(24 * 10**9, 20 * 10**9),
    disks=(
        Disk("here", "/home/me", 10**11, 10**12, True),
        Disk("temp", "/tmp", 10**11, 10**12, True),
    ),
    telemetry="1",
    encodings=Encodings("utf-8", "UTF-8", "utf-8"),
)
CUDA_MACHINE = replace(
    HEALTHY,
    wheels=CUDA_WHEELS,
    onnxruntime=Loaded("1.31.1", providers=(CUDA.ort_name, CPU.ort_name)),
    libraries=(Libraries("cuda", cudnn=True),),
    tried=(*HEALTHY.tried, ProviderRun("cuda", nodes=34, elsewhere=6, logits=(1.01, 2.02))),
    graphics=Graphics(("NVIDIA",), (L40,), "580.82.07"),
)


def named(facts: Facts) -> dict[str, Finding]:
    findings = list(examine(facts))
    found = {finding.name: finding for finding in findings}
    assert len(found) == len(findings), "two findings of one name"
    return found


def not_ok(facts: Facts) -> dict[str, str]:
    return {name: entry.status for name, entry in named(facts).items() if entry.status != "ok"}


def test_a_healthy_machine_has_nothing_to_mend() -> None:
    for facts in (HEALTHY, CUDA_MACHINE):
        assert not_ok(facts) == {}
        assert [finding.mend for finding in examine(facts) if finding.mend] == []
        assert worst(examine(facts)) == "ok"
    assert "28 of 34 nodes" in named(CUDA_MACHINE)["provider cuda"].found


def test_the_worst_decides() -> None:
    ok, warning, trouble = (
        Finding("a", "ok", ""),
        Finding("b", "warning", ""),
        Finding("c", "trouble", ""),
    )
    assert (worst([]), worst([ok]), worst([ok, warning])) == ("ok", "ok", "warning")
    assert worst([trouble, warning, ok]) == "trouble"


# Python and wheels


def test_a_32_bit_python() -> None:
    finding = judge_python(Python("3.11.7", 32, "AMD64"))
    assert (finding.status, "64-bit" in str(finding.mend)) == ("trouble", True)


def test_no_onnxruntime_at_all() -> None:
    bare = replace(WHEELS, onnxruntime={}, genai={})
    finding = judge_onnxruntime(bare, Loaded(None))
    assert (finding.status, finding.mend) == (
        "trouble",
        'run `python -m pip install ".[cpu]"` in a clone of llama-onnx',
    )
    facts = replace(HEALTHY, wheels=bare, onnxruntime=Loaded(None), genai=Loaded(None), tried=())
    assert not_ok(facts) == {"onnxruntime": "trouble", "onnxruntime-genai": "trouble"}


def test_two_flavours_at_once_leave_the_one_that_was_wanted() -> None:
    both = {"onnxruntime": "1.32.0", "onnxruntime-gpu": "1.31.1"}
    finding = judge_onnxruntime(replace(WHEELS, onnxruntime=both), ORT)
    assert finding.status == "trouble"
    assert "onnxruntime 1.32.0 and onnxruntime-gpu 1.31.1 are installed at once" in finding.found
    assert finding.mend == (
        "run `python -m pip uninstall -y onnxruntime onnxruntime-genai onnxruntime-gpu && "
        'python -m pip install ".[cuda]"` in a clone of llama-onnx'
    )
    genai = {"onnxruntime-genai": "0.18.0", "onnxruntime-genai-cuda": "0.18.0"}
    assert judge_genai(replace(WHEELS, genai=genai), GENAI).status == "trouble"


def test_what_one_flavour_leaves_behind_when_the_other_goes() -> None:
    hollow = Loaded(None, error="AttributeError: module 'onnxruntime' has no attribute ...")
    finding = judge_onnxruntime(WHEELS, hollow)
    assert (finding.status, "does not load: AttributeError" in finding.found) == ("trouble", True)
    assert str(finding.mend).startswith(
        "run `python -m pip uninstall -y onnxruntime onnxruntime-genai && python -m pip"
    )
    other = judge_onnxruntime(WHEELS, replace(ORT, version="1.31.1"))
    assert (other.status, "but 1.31.1 is loaded" in other.found) == ("trouble", True)


def test_an_onnxruntime_older_than_this_project_needs() -> None:
    old = replace(WHEELS, onnxruntime={"onnxruntime": "1.20.1"})
    finding = judge_onnxruntime(old, replace(ORT, version="1.20.1"))
    assert (finding.status, "needs onnxruntime>=1.31" in finding.found) == ("trouble", True)


@pytest.mark.parametrize(
    ("ort", "genai", "said"),
    [
        ("onnxruntime", "onnxruntime-genai-cuda", "goes with onnxruntime-gpu"),
        ("onnxruntime-gpu", "onnxruntime-genai", "goes with onnxruntime,"),
        ("onnxruntime", "onnxruntime-genai-winml", "goes with onnxruntime-directml"),
    ],
)
def test_a_genai_of_another_flavour(ort: str, genai: str, said: str) -> None:
    wheels = replace(WHEELS, onnxruntime={ort: "1.32.0"}, genai={genai: "0.18.0"})
    finding = judge_genai(wheels, GENAI)
    assert (finding.status, said in finding.found) == ("trouble", True)
    assert f"pip uninstall -y {' '.join(sorted([ort, genai]))}" in str(finding.mend)


def test_a_genai_that_asks_for_a_newer_onnxruntime() -> None:
    finding = judge_genai(replace(WHEELS, onnxruntime={"onnxruntime": "1.30.2"}), GENAI)
    assert finding.status == "trouble"
    assert "needs onnxruntime>=1.31.0, but onnxruntime 1.30.2 is installed" in finding.found


def test_no_genai() -> None:
    finding = judge_genai(replace(WHEELS, genai={}), Loaded(None))
    assert (finding.status, finding.mend is not None) == ("trouble", True)
    webgpu = replace(WHEELS, onnxruntime={WEBGPU.wheel: "1.27.0"}, genai={})
    finding = judge_genai(webgpu, Loaded(None))
    assert (finding.status, finding.mend) == ("warning", None), "there is none to install"


def test_without_the_export_extra_packages_still_run() -> None:
    assert "with what `export` needs" in judge_export(WHEELS).found
    finding = judge_export(replace(WHEELS, others={}))
    assert (finding.status, "need torch, ml-dtypes too" in finding.found) == ("ok", True)
    old = judge_export(replace(WHEELS, others={**WHEELS.others, "torch": "2.1.0"}))
    assert (old.status, "`export` needs torch>=2.7" in old.found) == ("warning", True)
    assert old.mend == (
        'run `python -m pip install ".[export,cpu]" --upgrade` in a clone of llama-onnx'
    )
    source = judge_export(replace(WHEELS, llama_onnx=None, extras={}))
    assert (source.status, "run from its source" in source.found) == ("ok", True)


@pytest.mark.parametrize(
    ("requirement", "version", "met"),
    [
        ("onnxruntime>=1.31.0", "1.31", True),
        ("onnxruntime>=1.31", "1.9.0", False),
        ("onnxruntime (>=1.31)", "1.30.9", False),
        ("onnxruntime>=1.31,<2", "1.32.0.dev20261101", True),
        ("onnxruntime[a,b]>=1.31", "1.31.0rc1", True),
        ("onnxruntime~=1.31", "1.31.2", True),
        ("Onnx_Runtime", "0", False),
        ("onnxruntime>=9; sys_platform == 'win32'", "1.0", True),
    ],
)
def test_requirements(requirement: str, version: str, met: bool) -> None:
    assert (unmet([requirement], {"onnxruntime": version}) == ()) is met


# Providers and graphics


def test_a_gpu_wheel_without_a_driver() -> None:
    libraries = tuple(library.name for library in CUDA.libraries["linux"])
    facts = replace(
        CUDA_MACHINE,
        libraries=(Libraries("cuda", libraries, cudnn=False),),
        tried=(*HEALTHY.tried, ProviderRun("cuda", error="provider cuda cannot run here: no")),
        graphics=Graphics(),
    )
    assert not_ok(facts) == {"cuda libraries": "trouble", "provider cuda": "trouble"}
    assert named(facts)["provider cuda"].found == "does not run without its libraries"
    found = named(facts)["cuda libraries"]
    assert found.found.startswith(f"0 of {len(libraries)} load; cuDNN 9 does not, but no Llama")
    assert all(name in found.found for name in libraries)
    assert found.mend == (
        'install NVIDIA\'s driver, and run `pip install "onnxruntime-gpu[cuda,cudnn]"`'
    )


def test_a_driver_that_crashes_while_its_libraries_load() -> None:
    crashed = (Libraries("cuda", error="it crashes (SIGSEGV)"),)
    finding = named(replace(CUDA_MACHINE, libraries=crashed))["cuda libraries"]
    assert (finding.status, "SIGSEGV" in finding.found) == ("trouble", True)


def test_a_device_that_the_wheels_leave_alone() -> None:
    finding = named(replace(HEALTHY, graphics=CUDA_MACHINE.graphics))["provider cuda"]
    assert finding.status == "warning"
    assert 'pip install ".[cuda]"' in str(finding.mend)


@pytest.mark.parametrize(
    ("graphics", "cuda", "status", "said"),
    [
        (Graphics(), False, "ok", "no device found"),
        (Graphics(("Intel",)), False, "ok", "Intel"),
        (Graphics(("NVIDIA",)), False, "warning", "without NVIDIA's driver"),
        (Graphics((), (), "580.1", "not found"), False, "warning", "nvidia-smi fails: not found"),
        (Graphics((), (L40,)), True, "ok", "NVIDIA L40 (51.5 GB), driver 580.82.07"),
        (Graphics((), (replace(L40, driver="575.57"),)), True, "trouble", "needs 580 or newer"),
        (Graphics((), (replace(L40, driver="575.57"),)), False, "warning", "needs 580 or newer"),
        (Graphics((), (replace(L40, capability=(6, 1)),)), True, "trouble", "capability 7.5"),
        (Graphics((), (L40, replace(L40, capability=(6, 1)))), True, "ok", "L40"),
        (Graphics((), (replace(L40, capability=None),)), True, "ok", "L40"),
    ],
)
def test_graphics(graphics: Graphics, cuda: bool, status: str, said: str) -> None:
    finding = judge_graphics(graphics, cuda=cuda, platform="linux")
    assert (finding.status, said in finding.found) == (status, True)
    assert (finding.mend is None) is (status == "ok")


@pytest.mark.parametrize(
    ("logits", "said"),
    [
        ((1.02, 1.98), None),
        ((2.0, 1.0), "its logits differ from the CPU's: relative L2 0.63"),
        ((math.nan, 2.0), "its logits hold NaN or infinity"),
    ],
)
def test_gibberish_is_not_a_provider_that_runs(logits: tuple[float, ...], said: str | None) -> None:
    tried = [ProviderRun("cpu", 34, 0, (1.0, 2.0)), ProviderRun("directml", 34, 0, logits)]
    cpu, other = judge_tried(tried, WHEELS)
    assert cpu.status == "ok"
    assert other.status == ("trouble" if said else "ok")
    assert said is None or (said in other.found and other.mend is not None)


def test_a_cpu_that_fails_is_no_reference() -> None:
    tried = [
        ProviderRun("cpu", error="it crashes (SIGILL)"),
        ProviderRun("cuda", 34, 0, (1.0, 2.0)),
    ]
    cpu, cuda = judge_tried(tried, WHEELS)
    assert (cpu.status, cpu.found, cuda.status) == ("trouble", "it crashes (SIGILL)", "ok")
    assert str(cpu.mend).startswith("run `python -m pip uninstall -y onnxruntime onnxruntime-genai")


# Hardware


X86 = {"AVX2": True, "AVX512": False, "VNNI": False, "AVX-VNNI": False}
UNREPORTED = {"VNNI": None, "AVX-VNNI": None}  # as on Windows


# The expected kernels are those that MLAS dispatches to (onnxruntime/core/mlas/lib/platform.cpp).
@pytest.mark.parametrize(
    ("features", "kernels", "status", "said"),
    [
        (X86 | {"AVX512": True, "VNNI": True}, "AVX512-VNNI", "ok", "blocks of 128 are faster"),
        (X86 | {"AVX512": True}, "AVX512", "ok", "without VNNI"),
        (X86 | {"AVX-VNNI": True}, "AVX-VNNI", "ok", "blocks of 128 are faster"),
        (
            X86,
            "AVX2",
            "ok",
            "AVX2 kernels, with products in int8; without VNNI, blocks of 128 are hard",
        ),
        (X86 | {"AVX2": False}, None, "warning", "no fast kernels without AVX2"),
        (
            X86 | {"AVX512": True} | UNREPORTED,
            "AVX512",
            "ok",
            "with products in int8, or on AVX512-VNNI: this system does not report it",
        ),
        (X86 | UNREPORTED, "AVX2", "ok", "or on AVX-VNNI: this system does not report it"),
        ({"AVX2": False, "AVX512": False} | UNREPORTED, None, "warning", "without AVX2"),
        ({"dot product": True, "int8 matrix": True, "SVE": True}, "NEON i8mm", "ok", "NEON i8mm"),
        ({"dot product": True, "int8 matrix": False}, "NEON dot product", "ok", "NEON dot"),
        ({"dot product": True}, "NEON dot product", "ok", "NEON dot product kernels"),
        ({"dot product": False, "int8 matrix": False}, None, "warning", "without the dot product"),
        ({}, None, "ok", "cannot be determined here"),
    ],
)
def test_what_int4_runs_on(
    features: dict[str, bool | None], kernels: str | None, status: str, said: str
) -> None:
    int4 = int4_kernels(features)
    assert int4.name == kernels
    finding = judge_int4(replace(PROCESSOR, features=features, int4=int4))
    assert (finding.status, said in finding.found) == (status, True), finding.found


def test_a_processor_is_named_with_its_instruction_sets() -> None:
    assert judge_processor(PROCESSOR).found == "A processor: AVX2, AVX512, VNNI"
    assert judge_processor(replace(PROCESSOR, name=None, features={})).found == "unknown"


@pytest.mark.parametrize(
    ("allowed", "quota", "threads"),
    [(16, None, None), (16, 8.0, None), (16, 1.5, 1), (16, 0.5, 1), (4, None, 4), (4, 2.0, 2)],
)
def test_a_container_that_allows_fewer_processors_than_cores(
    allowed: int, quota: float | None, threads: int | None
) -> None:
    finding = judge_cores(replace(PROCESSOR, allowed=allowed, quota=quota))
    assert finding.status == ("ok" if threads is None else "warning")
    assert threads is None or f"pass `--threads {threads}`" in str(finding.mend)


def test_cores_that_cannot_be_counted() -> None:
    assert judge_cores(replace(PROCESSOR, physical_cores=None, allowed=1)).status == "ok"


@pytest.mark.parametrize(
    ("available", "status", "said"),
    [
        (50e9, "ok", "Llama 2 70B"),
        (20e9, "ok", "Llama 2 13B"),
        (5e9, "ok", "Llama 2 7B"),
        (3e9, "ok", "smaller models"),
        (0.5e9, "warning", "0.5 GB free"),
    ],
)
def test_memory(available: float, status: str, said: str) -> None:
    finding = judge_memory(Memory(64 * 10**9, int(available), 55 * 10**9))
    assert (finding.status, said in finding.found) == (status, True)
    assert "the container's limit is 55.0 GB" in finding.found
    assert judge_memory(None).status == "ok"


@pytest.mark.parametrize(
    ("purpose", "path", "free", "writable", "status"),
    [
        ("here", "C:\\Users\\müller", 10**11, True, "ok"),
        ("here", "C:\\here", 3 * 10**9, True, "warning"),
        ("here", "C:\\here", 10**7, True, "trouble"),
        ("here", "C:\\here", 10**11, False, "warning"),
        ("temp", "C:\\Temp", 3 * 10**9, True, "ok"),
        ("temp", "C:\\Temp", 5 * 10**8, True, "warning"),
        ("temp", "C:\\Temp", 10**7, True, "trouble"),
        ("temp", "C:\\Users\\müller\\Temp", 10**11, True, "warning"),
    ],
)
def test_disk(purpose: str, path: str, free: int, writable: bool, status: str) -> None:
    finding = judge_disk(Disk(purpose, path, free, 10**12, writable), "win32")
    assert (finding.status, finding.mend is None) == (status, status == "ok")
    assert path in finding.found


def test_letters_in_the_temp_folder_matter_on_windows_alone() -> None:
    disk = Disk("temp", "/tmp/müller", 10**11, 10**12, True)
    assert (judge_disk(disk, "linux").status, judge_disk(disk, "win32").status) == ("ok", "warning")


# Windows


def test_the_vc_runtime() -> None:
    good = {"vcruntime140.dll": "14.44.35211.0", "msvcp140.dll": "14.44.35211.0"}
    assert judge_vc_runtime(good).status == "ok"
    old = judge_vc_runtime({**good, "msvcp140.dll": "14.29.30139.0"})
    assert (old.status, "before 14.40 crashes" in old.found) == ("warning", True)
    unknown = judge_vc_runtime({**good, "msvcp140.dll": "of unknown version"})
    assert unknown.status == "ok"
    missing = judge_vc_runtime({**good, "vcruntime140_1.dll": None})
    assert (missing.status, "vcruntime140_1.dll not found" in missing.found) == ("trouble", True)
    assert missing.mend == old.mend == "run `winget install Microsoft.VCRedist.2015+.x64`"


def test_stray_copies_of_onnxruntime() -> None:
    system = r"C:\WINDOWS\system32"
    own = {r"C:\Windows\System32\onnxruntime.dll": "1.17.2410.1"}
    assert judge_strays({}, system).status == "ok"
    windows = judge_strays(own, system)
    assert (windows.status, "1.17.2410.1" in windows.found) == ("ok", True)
    stray = judge_strays({**own, r"C:\Tools\onnxruntime.dll": None}, system)
    assert stray.status == "warning"
    assert r"C:\Tools\onnxruntime.dll (no version)" in stray.found
    assert str(stray.mend).startswith(r"remove C:\Tools from PATH")


def test_long_paths() -> None:
    assert (judge_long_paths(True).status, judge_long_paths(None).status) == ("ok", "ok")
    finding = judge_long_paths(False)
    assert (finding.status, "reg add HKLM" in str(finding.mend)) == ("warning", True)


def test_windows_is_judged_on_windows() -> None:
    windows = WindowsFacts({"msvcp140.dll": None}, {}, r"C:\Windows\System32", False)
    facts = replace(HEALTHY, platform="win32", windows=windows)
    assert not_ok(facts) == {"VC runtime": "trouble", "long paths": "warning"}
    assert "VC runtime" not in named(HEALTHY)


# Surroundings


def test_encodings() -> None:
    assert judge_encodings(Encodings("UTF8", "cp65001", "utf-8"), "win32").status == "ok"
    windows = judge_encodings(Encodings("cp850", "cp1252", "utf-8"), "win32")
    assert windows.status == "warning"
    assert "output in cp850, files in cp1252" in windows.found
    assert windows.mend == "run `setx PYTHONUTF8 1` and open a new terminal"
    linux = judge_encodings(Encodings("iso8859-1", "UTF-8", "utf-8"), "linux")
    assert linux.mend == "run `export PYTHONUTF8=1 LC_ALL=C.UTF-8`"


@pytest.mark.parametrize(
    ("value", "said"), [(None, "is not set"), ("1", "off ("), ("0", "on, as you chose")]
)
def test_telemetry(value: str | None, said: str) -> None:
    finding = judge_telemetry(value)
    assert (finding.status, said in finding.found) == ("ok", True)


@pytest.mark.parametrize(
    ("found", "status", "said"),
    [
        (WindowsML(installed=False), "ok", "not installed"),
        (WindowsML(installed=True), "ok", "no provider in its catalog suits this machine"),
        (WindowsML(True, ("Q",), ("Q on NPU X",)), "ok", "Q on NPU X"),
        (
            WindowsML(True, ("Q",), problems={"Q": "it is not installed"}),
            "warning",
            "not installed",
        ),
        (WindowsML(True, ("Q",)), "warning", "no device"),
        (WindowsML(True, error="it crashes (0xC0000005)"), "warning", "it crashes"),
    ],
)
def test_windows_ml(found: WindowsML, status: str, said: str) -> None:
    finding = named(replace(HEALTHY, windows_ml=found))["Windows ML"]
    assert (finding.status, said in finding.found) == (status, True), finding
    assert (finding.mend is None) == (bool(found.devices) or (status == "ok" and found.installed))
    assert "Windows ML" not in named(HEALTHY)
