"""Our commands in Python for Windows under Wine, with the real Windows wheels.

The wheel of Panda3D contains python311.dll and its extension modules for Windows. Together with the
standard library of this Python 3.11, a program that calls Py_Main, and a python3.dll that forwards
to python311.dll, this is a complete Python.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.trials.windows.wine import COMPILER, Wine, compile_windows, windows_path
from llama_onnx.exporter.parity.prove import prove
from llama_onnx.exporter.sources import open_checkpoint
from tests.support.packages import make_package
from tests.support.tables import Case, Table

ROOT = Path(__file__).parents[3]
SOURCE = "panda3d==1.10.16"
# Wine 8's ucrtbase.dll lacks functions that numpy 2 needs.
COMMON = ("numpy==1.26.4", "tokenizers==0.23.3", "safetensors==0.8.0", "markupsafe==3.0.3")
WHEELS = ("onnxruntime==1.32.0", "onnxruntime-genai==0.18.0", *COMMON)
PURE = (
    "click",
    "colorama",
    "jinja2",
    "rich",
    "markdown-it-py",
    "mdurl",
    "pygments",
    "huggingface-hub",
)
PROMPT = "the quick brown 日本"

_PROGRAM = """
#include <windows.h>
int wmain(int argc, wchar_t **argv)
{
    int (*run)(int, wchar_t **);
    FARPROC found = GetProcAddress(LoadLibraryW(L"python311.dll"), "Py_Main");
    __builtin_memcpy(&run, &found, sizeof found);
    return run(argc, argv);
}
"""


def run(work: Path, wheels: Path, wine: Wine) -> list[Table]:
    """Each command that a runtime has, against the same on this machine."""
    if sys.version_info[:2] != (3, 11):
        sys.exit("--python needs Python 3.11, whose standard library it takes.")
    python = make_python(work / "python", wheels)
    package = make_certified(work / "ä ü 日本" / "certified")
    done = list(cases(wine, python, package, work / "other"))
    return [("llama-onnx in Windows' Python | what happened", done)]


def make_certified(folder: Path, precision: str = "int4", target: str = "cpu") -> Path:
    """A tiny package with its certificate."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    package = make_package(folder, precision, target)
    source = open_checkpoint(folder / "checkpoint")
    prove(package, source, tokens=8, longest=16, certify=True)
    return package


def make_python(
    folder: Path, wheels: Path, needed: Sequence[str] = WHEELS, more: Sequence[str] = ()
) -> Path:
    """Assemble a Python for Windows in `folder` and return the path of python.exe.

    `needed` is installed as it is, `more` with what it requires.
    """
    shutil.rmtree(folder, ignore_errors=True)
    packages = folder / "Lib" / "site-packages"
    ignored = shutil.ignore_patterns("site-packages", "__pycache__", "test", "lib-dynload")
    shutil.copytree(sysconfig.get_path("stdlib"), folder / "Lib", ignore=ignored)
    pip("download", "--no-deps", "--dest", str(folder / "from"), SOURCE)
    (wheel,) = (folder / "from").glob("panda3d-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if re.fullmatch(r"deploy_libs/(python311\.dll|lib.*\.dll|[^/]*\.pyd)", name):
                (folder / Path(name).name).write_bytes(archive.read(name))
    found = ("install", "--target", str(packages), "--find-links", str(wheels))
    if more:
        pip(*found, *more, *PURE)
    pip(*found, "--no-deps", "--upgrade", *needed, *PURE)
    command = ["install", "--quiet", "--no-deps", "--upgrade", "--target", str(packages), str(ROOT)]
    subprocess.run([sys.executable, "-m", "pip", *command], check=True)
    write_stable_abi(folder)
    source = folder / "python.c"
    source.write_text(_PROGRAM)
    return compile_windows(source, folder / "python.exe", "-municode")


def pip(command: str, *arguments: str) -> None:
    """Run pip for Python 3.11 on Windows."""
    place = ("--platform", "win_amd64", "--python-version", "3.11", "--implementation", "cp")
    options = ("--quiet", "--only-binary=:all:", *place)
    subprocess.run([sys.executable, "-m", "pip", command, *options, *arguments], check=True)


def write_stable_abi(folder: Path) -> None:
    """Build python3.dll, which forwards every name to python311.dll."""
    objdump = COMPILER.replace("gcc", "objdump")
    command = [objdump, "-p", str(folder / "python311.dll")]
    table = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    names = re.findall(
        r"^\s*\[ *\d+\].* (_?Py\w+)$", table.partition("Name Pointer] Table")[2], re.M
    )
    lines = "".join(f"  {name} = python311.{name}\n" for name in names)
    definition = folder / "python3.def"
    definition.write_text(f"LIBRARY python3\nEXPORTS\n{lines}")
    command = [COMPILER, "-shared", "-nostdlib", "-Wl,-e,0", str(definition)]
    subprocess.run([*command, "-o", str(folder / "python3.dll")], check=True)


def cases(wine: Wine, python: Path, package: Path, other: Path) -> Iterator[Case]:
    """Run each command. `other` is a folder with another onnxruntime.dll."""
    here = [sys.executable, "-m", "llama_onnx.exporter.cli"]
    where = windows_path(package)
    said = call(wine, python, "--help")
    yield Case("--help", "Turn a Llama checkpoint" in said, said.splitlines()[0])
    said = call(wine, python, "targets", "--json")
    expected = subprocess.run([*here, "targets", "--json"], capture_output=True, check=True)
    yield Case("targets --json", json.loads(said) == json.loads(expected.stdout), "as on Linux")
    said = call(wine, python, "inspect", where)
    yield Case("inspect", "int4" in said, "kind, precision and recipe of the package")
    report = json.loads(call(wine, python, "verify", where, "--json"))
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    yield Case("verify", report["passed"] is True, f"passed: {versions}")
    yield verify_damaged(wine, python, package)
    yield from doctor_cases(wine, python, other)
    options = ("--max-new-tokens", "40", "--json")
    said = call(wine, python, "generate", where, PROMPT, *options)
    command = [*here, "generate", str(package), PROMPT, *options]
    expected = subprocess.run(command, capture_output=True, check=True)
    given = json.loads(said.splitlines()[-1])["text"]
    same = given == json.loads(expected.stdout)["text"]
    yield Case("generate", same, "the text of Linux" if same else given)


def verify_damaged(wine: Wine, python: Path, package: Path) -> Case:
    """Verify a package after flipping one bit of its weights."""
    damaged = Path(shutil.copytree(package, package.with_name("damaged"), dirs_exist_ok=True))
    data = bytearray((damaged / "model.onnx.data").read_bytes())
    data[len(data) // 2] ^= 1
    (damaged / "model.onnx.data").write_bytes(data)
    said = call(wine, python, "verify", windows_path(damaged)).splitlines()[-1]
    return Case("verify, one bit flipped", said.startswith("failed: model.onnx.data changed"), said)


def doctor_cases(wine: Wine, python: Path, other: Path) -> Iterator[Case]:
    """Check what `doctor` reports about Windows, about the CPU, and about another library in the
    folder `other` on PATH."""
    for name, found in doctor(wine, python).items():
        if name in ("provider cpu", "VC runtime", "onnxruntime.dll"):
            yield Case(f"doctor: {name}", found["status"] == "ok", found["found"])
    stray = doctor(wine, python, path=other)["onnxruntime.dll"]
    holds = stray["status"] == "warning" and windows_path(other) in stray["found"]
    yield Case("doctor, another onnxruntime.dll on PATH", holds, stray["found"])


def doctor(wine: Wine, python: Path, path: Path | None = None) -> dict[str, dict[str, str]]:
    """Return the findings by name."""
    report = json.loads(call(wine, python, "doctor", "--json", path=path))
    return {entry["name"]: entry for entry in report["findings"]}


def call(wine: Wine, python: Path, *arguments: str, path: Path | None = None) -> str:
    """Return the output of `llama-onnx`."""
    environment = {"PYTHONHOME": windows_path(python.parent), "PYTHONUTF8": "1", "COLUMNS": "100"}
    environment["PYTHONPATH"] = ""
    command = [windows_path(python), "-m", "llama_onnx.exporter.cli", *arguments]
    done = wine.call(command, environment=environment, path=path, pipes=True)
    text = done.stdout.decode(errors="replace").replace("\r", "")
    return text or done.stderr.decode(errors="replace")
