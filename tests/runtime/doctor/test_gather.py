"""Facts taken from a system: the kernel's files, processes that crash and hang, this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from subprocess import PIPE
from time import perf_counter
from typing import Any

import numpy as np
import onnx
import onnxruntime
import psutil
import pytest
from click.testing import CliRunner, Result

from llama_onnx.exporter.cli import main
from llama_onnx.runtime.doctor import gather, linux
from llama_onnx.runtime.doctor.child import run, run_probe
from llama_onnx.runtime.doctor.facts import Gpu, WindowsML
from llama_onnx.runtime.doctor.gather import parse_gpus
from tests.support import probe_model

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's files")


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


# Linux


CPUINFO = """processor : 0
model name\t: A Processor @ 2.00GHz
physical id\t: 0
core id\t: 0
flags\t: fpu avx avx2 fma avx512f avx512bw avx512dq avx512vl

processor : 1
model name\t: A Processor @ 2.00GHz
physical id\t: 0
core id\t: 0
flags\t: fpu avx avx2 fma avx512f avx512bw avx512dq avx512vl

processor : 2
model name\t: A Processor @ 2.00GHz
physical id\t: 1
core id\t: 0
flags\t: fpu avx avx2 fma avx512f avx512bw avx512dq avx512vl
"""


def test_cpuinfo(tmp_path: Path) -> None:
    root = write(tmp_path, {"proc/cpuinfo": CPUINFO})
    assert linux.processor_name(root) == "A Processor @ 2.00GHz"
    assert linux.physical_cores(root) == 2, "two threads share a core"
    assert linux.features(root) == {
        "AVX2": True,
        "AVX512": True,
        "VNNI": False,
        "AVX-VNNI": False,
    }


def test_cpuinfo_of_an_arm_kernel(tmp_path: Path) -> None:
    root = write(tmp_path, {"proc/cpuinfo": "processor : 0\nFeatures : fp asimd asimddp i8mm\n"})
    assert linux.features(root) == {"dot product": True, "int8 matrix": True, "SVE": False}
    assert (linux.processor_name(root), linux.physical_cores(root)) == (None, None)


def test_a_system_that_says_nothing(tmp_path: Path) -> None:
    assert linux.features(tmp_path) == {}
    assert linux.memory(tmp_path) is None
    assert linux.container_cores(tmp_path) is None
    assert linux.container_memory(tmp_path) is None
    assert linux.nvidia_driver(tmp_path) is None
    assert linux.adapters(tmp_path) == ()


def test_cgroup_version_2(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/pods/mine\n",
            "sys/fs/cgroup/pods/mine/cpu.max": "300000 100000\n",
            "sys/fs/cgroup/cpu.max": "max 100000\n",
            "sys/fs/cgroup/pods/cpu.max": "150000 100000\n",
            "sys/fs/cgroup/pods/mine/memory.max": "4000000000\n",
            "sys/fs/cgroup/pods/mine/memory.current": "3000000000\n",
            "sys/fs/cgroup/pods/mine/memory.stat": "anon 1\ninactive_file 500000000\n",
            "sys/fs/cgroup/pods/memory.max": "max\n",
        },
    )
    assert linux.container_cores(root) == 1.5
    assert linux.container_memory(root) == (4_000_000_000, 1_500_000_000)


def test_cgroup_version_1_seen_from_inside_a_container(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            # The path is the host's; in the container its folder is the top.
            "proc/self/cgroup": "5:cpu,cpuacct:/docker/0123\n4:memory:/docker/0123\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "200000\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "2000000000\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "1000000000\n",
            "sys/fs/cgroup/memory/memory.stat": "inactive_file 1\ntotal_inactive_file 250000000\n",
        },
    )
    assert linux.container_cores(root) == 2.0
    assert linux.container_memory(root) == (2_000_000_000, 1_250_000_000)


def test_cgroups_without_a_limit(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "5:cpu:/\n4:memory:/\n0::/\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        },
    )
    assert (linux.container_cores(root), linux.container_memory(root)) == (None, None)


def test_nvidia_without_its_tools(tmp_path: Path) -> None:
    version = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.82.07  Release Build\n"
    devices = "sys/bus/pci/devices"
    root = write(
        tmp_path,
        {
            "proc/driver/nvidia/version": version + "GCC version:  gcc version 13.3.0\n",
            f"{devices}/0000:00:02.0/class": "0x030000\n",
            f"{devices}/0000:00:02.0/vendor": "0x8086\n",
            f"{devices}/0000:01:00.0/class": "0x030200\n",
            f"{devices}/0000:01:00.0/vendor": "0x10de\n",
            f"{devices}/0000:01:00.1/class": "0x040300\n",  # the sound of its monitor
            f"{devices}/0000:01:00.1/vendor": "0x10de\n",
        },
    )
    assert linux.nvidia_driver(root) == "580.82.07"
    assert linux.adapters(root) == ("Intel", "NVIDIA")


@linux_only
def test_this_machine_as_psutil_sees_it() -> None:
    total, available = linux.memory() or (0, 0)
    assert total == psutil.virtual_memory().total
    assert 0 < available <= total
    processor = gather.gather_processor()
    assert processor.logical == psutil.cpu_count()
    assert processor.allowed == len(psutil.Process().cpu_affinity() or ())
    assert processor.physical_cores in (None, psutil.cpu_count(logical=False))


def test_rows_of_nvidia_smi() -> None:
    rows = "NVIDIA L40, 580.82.07, 46068, 8.9\nNVIDIA A100, 580.82.07, 81920, [N/A]\n"
    assert parse_gpus(rows) == (
        Gpu("NVIDIA L40", "580.82.07", 46068 << 20, (8, 9)),
        Gpu("NVIDIA A100", "580.82.07", 81920 << 20, None),
    )
    assert parse_gpus("NVIDIA-SMI has failed because it couldn't communicate\n") == ()


def test_nvidia_smi_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if sys.platform == "win32":
        pytest.skip("makes a shell script")
    script = tmp_path / "nvidia-smi"
    script.write_text("#!/bin/sh\necho NVIDIA-SMI has failed\nexit 9\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    graphics = gather.gather_graphics()
    assert graphics.gpus == ()
    assert graphics.error == "it ends with exit status 9: NVIDIA-SMI has failed"


def test_metadata_of_this_environment() -> None:
    wheels = gather.gather_wheels()
    assert list(wheels.onnxruntime.values()) == [onnxruntime.__version__]
    assert any(text.startswith("onnxruntime") for text in wheels.requires["onnxruntime-genai"])
    assert "torch>=2.7" in wheels.extras["export"]
    assert wheels.others["onnx"] == onnx.__version__


# Processes


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_process_that_does_well() -> None:
    ended = run(python("print('hällo'.encode().decode())"), seconds=30)
    assert (ended.error, ended.stdout.strip()[:1]) == (None, "h")


def test_a_process_writes_utf_8_whatever_the_terminal_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "utf-16")
    assert run(python("print('hällo')"), seconds=30).stdout.strip() == "hällo"


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_process_that_crashes() -> None:
    code = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
    assert run(python(code), seconds=30).error == "it crashes (SIGSEGV)"


def test_a_process_that_fails() -> None:
    assert run(python("raise SystemExit('no')"), seconds=30).error == (
        "it ends with exit status 1: no"
    )
    assert "cannot be started" in str(run(["/no/such/program"], seconds=30).error)


def test_a_process_that_hangs_is_ended(tmp_path: Path) -> None:
    started = perf_counter()
    pid = tmp_path / "pid"
    code = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    assert run(python(code), seconds=1.5).error == "no answer within 1.5 s"
    assert perf_counter() - started < 30
    assert not psutil.pid_exists(int(pid.read_text()))


@pytest.mark.skipif(sys.platform == "win32", reason="a shell")
def test_what_a_process_leaves_running_is_not_waited_for() -> None:
    started = perf_counter()
    ended = run(["sh", "-c", "sleep 20 & echo said"], seconds=15)
    assert (ended.stdout, ended.error) == ("said\n", None)
    assert perf_counter() - started < 10


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Put an onnxruntime that does `code` before the real one."""
    (folder / "onnxruntime").mkdir()
    (folder / "onnxruntime" / "__init__.py").write_text(code)
    monkeypatch.syspath_prepend(str(folder))


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import os; os.kill(os.getpid(), 4)", "it crashes (SIGILL)"),
        ("import time; time.sleep(600)", "no answer within 3 s"),
        ("import os; os._exit(0)", "it ended without an answer"),
        ("raise ImportError('DLL load failed')", "ImportError: DLL load failed"),
        ("", "AttributeError: module 'onnxruntime' has no attribute"),
    ],
)
def test_an_onnxruntime_that_is_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, said: str
) -> None:
    install(tmp_path, monkeypatch, code)
    loaded = gather.load("onnxruntime", seconds=3)
    assert loaded.version is None
    assert str(loaded.error).startswith(said)
    assert str(gather.try_provider("cpu", seconds=3).error).startswith(said)


def test_a_folder_of_that_name_where_one_stands_is_not_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "onnxruntime").mkdir()
    (tmp_path / "onnxruntime" / "__init__.py").write_text("raise SystemExit(3)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", ".")])
    assert gather.load("onnxruntime", seconds=60).version == onnxruntime.__version__


def test_what_runs_on_the_cpu_is_a_llama() -> None:
    tried = gather.try_provider("cpu", seconds=60)
    assert tried.error is None
    assert (tried.elsewhere, len(tried.logits)) == (0, probe_model.CONFIG.vocab_size)
    assert float(np.std(tried.logits)) > 0.1, "logits all alike would show no difference"


def test_a_provider_that_does_not_run() -> None:
    assert "cannot run here" in str(gather.try_provider("cuda", seconds=60).error)
    libraries = gather.try_libraries("cuda", seconds=60)
    assert libraries.error is None
    assert "no provider 'gpu'" in run_probe("open", "gpu", seconds=60)["error"]


# The small model


@pytest.mark.parametrize("target", probe_model.FILES)
def test_the_small_model_is_what_the_exporter_makes(tmp_path: Path, target: str) -> None:
    file = probe_model.FILES[target]
    kept, made = onnx.load(file), probe_model.make(tmp_path, target)
    assert {"MatMulNBits", "GroupQueryAttention"} <= {node.op_type for node in kept.graph.node}
    kept.producer_version = made.producer_version = ""
    assert kept == made, "run `python -m tests.support.probe_model`"
    assert file.stat().st_size < 64_000


# The command


def doctor(*arguments: str, **environment: str) -> Result:
    return CliRunner().invoke(main, ["doctor", *arguments], env={"COLUMNS": "80", **environment})


def test_json_has_findings_and_facts() -> None:
    result = doctor("--json")
    content: dict[str, Any] = json.loads(result.stdout)
    assert result.exit_code == (1 if content["status"] == "trouble" else 0)
    findings = {finding["name"]: finding for finding in content["findings"]}
    assert findings["provider cpu"]["status"] == "ok"
    assert set(findings["provider cpu"]) == {"name", "status", "found", "mend"}
    assert content["facts"]["wheels"]["onnxruntime"]["onnxruntime"] == onnxruntime.__version__
    assert content["facts"]["telemetry"] == "1"


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_trouble_is_exit_1_and_a_command_can_be_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch, "import os; os.kill(os.getpid(), 4)")
    result = doctor()
    assert result.exit_code == 1
    assert "it crashes (SIGILL)" in " ".join(result.stdout.split())
    (line,) = [line for line in result.stdout.splitlines() if "pip uninstall" in line]
    assert line.startswith("onnxruntime, onnxruntime-genai: run")
    assert line.count("`") == 2 and 'pip install ".[cpu]"' in line
    assert result.stdout.splitlines()[-1].startswith("2 problems, ")
    assert "Traceback" not in result.output


def test_a_terminal_that_is_not_utf_8(monkeypatch: pytest.MonkeyPatch) -> None:
    command = [sys.executable, "-m", "llama_onnx.exporter.cli", "doctor"]
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    # A terminal: pipes are UTF-8 whatever the environment says.
    ours, theirs = os.openpty()
    with os.fdopen(ours, "rb", buffering=0) as terminal:
        result = subprocess.run(
            command, env=environment, stdout=theirs, stderr=PIPE, cwd=tempfile.gettempdir()
        )
        os.close(theirs)
        text = terminal.read(1 << 16).decode("latin-1")
    assert "output in latin-1" in text or "output in iso8859-1" in text
    assert "PYTHONUTF8=1" in text
    assert result.stderr == b""


def test_doctor_itself_loads_no_runtime() -> None:
    code = "import sys, llama_onnx.runtime.doctor.gather, llama_onnx.runtime.doctor.examine\n"
    code += "print(*sys.modules)"
    loaded = subprocess.check_output([sys.executable, "-c", code], text=True).split()
    assert "llama_onnx.runtime.doctor.gather" in loaded
    assert {"numpy", "onnxruntime", "onnxruntime_genai", "click", "rich"}.isdisjoint(loaded)


def test_windows_ml_is_asked_in_a_process_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a catalog whose only library is none, so that onnxruntime refuses it."""
    assert gather.gather_windows_ml(60) == WindowsML(installed=False)
    support = "from tests.support.fake_windows_ml import ExecutionProvider, fake_windowsml\n"
    catalog = 'globals().update(vars(fake_windowsml([ExecutionProvider("QNNExecutionProvider")])))'
    (tmp_path / "windowsml.py").write_text(support + catalog, encoding="utf-8")
    info = tmp_path / "windowsml-2.5.96.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.4\nName: windowsml\nVersion: 2.5.96\n")
    monkeypatch.syspath_prepend(tmp_path)
    found = gather.gather_windows_ml(60)
    assert (found.installed, found.providers, found.devices, found.error) == (
        True,
        ("QNNExecutionProvider",),
        (),
        None,
    )
    assert "QNNExecutionProvider.dll" in found.problems["QNNExecutionProvider"]
