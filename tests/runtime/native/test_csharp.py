"""The C# wrapper: its declarations against llama_onnx.h, and a program that uses it under Mono."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llama_onnx.exporter.parity.prove import prove
from llama_onnx.exporter.sources import open_checkpoint
from tests.support.csharp import MISUSED, TRIAL, WRAPPER
from tests.support.native import NATIVE, link_libraries
from tests.support.packages import make_package

HEADER = re.sub(r"/\*.*?\*/", "", (NATIVE / "llama_onnx.h").read_text("utf-8"), flags=re.DOTALL)
CSHARP = re.sub(r"//.*", "", (WRAPPER / "Native.cs").read_text("utf-8"))

RETURNED = {"int": "int", "void": "void", "const char *": "IntPtr"}
PASSED = {
    "const char *": "byte[]",
    "char *": "[Out] byte[]",
    "const int32_t *": "int[]",
    "int32_t *": "[Out] int[]",
    "size_t": "UIntPtr",
    "size_t *": "ref UIntPtr",
    "int": "int",
    "void *": "IntPtr",
    "llama_onnx_callback": "llama_onnx_callback",
    "llama_onnx *": "ModelHandle",
    "const llama_onnx *": "ModelHandle",
    "llama_onnx **": "out ModelHandle",
    "llama_onnx_session *": "SessionHandle",
    "const llama_onnx_session *": "SessionHandle",
    "llama_onnx_session **": "out SessionHandle",
    "const llama_onnx_options *": "ref llama_onnx_options",
    "const llama_onnx_session_options *": "ref llama_onnx_session_options",
    "const llama_onnx_sampling *": "ref llama_onnx_sampling",
    "llama_onnx_sampling *": "out llama_onnx_sampling",
    "llama_onnx_stats *": "ref llama_onnx_stats",
}
"""A type in C -> how the wrapper declares it."""

MEMBERS = {
    "int": "int",
    "size_t": "UIntPtr",
    "double": "double",
    "int64_t": "long",
    "const char *": "IntPtr",
    "const char *const *": "IntPtr",
}


def words(text: str) -> str:
    return " ".join(text.split())


def split_type(declared: str) -> tuple[str, str]:
    """Split `const char *text` into its type and its name."""
    found = re.fullmatch(r"(.*?[ *])(\w+)", words(declared))
    assert found, declared
    return found[1].strip(), found[2]


def functions_in_c() -> dict[str, tuple[str, list[str]]]:
    """Name -> what it returns, and the types it takes, as the wrapper must declare them."""
    found = {}
    for declared, taken in re.findall(r"LLAMA_ONNX_API ([^;()]+)\(([^;]*)\);", HEADER):
        returned, name = split_type(declared)
        types = [PASSED[split_type(one)[0]] for one in taken.split(",")]
        # Its caller is the handle itself.
        types = ["IntPtr"] if name.endswith("_close") else types
        found[name] = RETURNED[returned], types
    return found


def functions_in_csharp() -> dict[str, tuple[str, list[str]]]:
    pattern = r"internal static extern (\w+) (llama_onnx\w+)\(([^;]*)\);"
    return {
        name: (returned, [words(one).rpartition(" ")[0] for one in taken.split(",")])
        for returned, name, taken in re.findall(pattern, CSHARP)
    }


def test_the_functions_are_those_of_the_header() -> None:
    declared = functions_in_c()
    assert len(declared) == len(re.findall(r"LLAMA_ONNX_API (?!_)\w", HEADER)) > 20
    assert functions_in_csharp() == declared


def test_every_function_is_called_as_c_calls_it() -> None:
    imports = re.findall(r"\[DllImport\((.*?)\)\]\s+internal", CSHARP)
    assert len(imports) == len(functions_in_c())
    assert set(imports) == {"Library, CallingConvention = CallingConvention.Cdecl"}


def structures_in_c() -> dict[str, list[tuple[str, str]]]:
    found = {}
    for body, name in re.findall(r"typedef struct \w+ \{(.*?)\} (\w+);", HEADER, re.DOTALL):
        members = []
        for line in filter(None, map(words, body.split(";"))):
            first, *others = line.split(",")  # "double a, b"
            kind, member = split_type(first)
            members += [(MEMBERS[kind], one.strip()) for one in (member, *others)]
        found[name] = members
    return found


def test_the_structures_are_those_of_the_header() -> None:
    pattern = r"\[StructLayout\(LayoutKind\.Sequential\)\]\s+internal struct (\w+)\s+\{(.*?)\}"
    declared = {
        name: re.findall(r"public (\w+) (\w+);", body)
        for name, body in re.findall(pattern, CSHARP, re.DOTALL)
    }
    assert len(declared) == 4
    assert declared == structures_in_c()


def test_the_constants_are_those_of_the_header() -> None:
    values = {name: int(value) for name, value in re.findall(r"(LLAMA_ONNX_\w+) = (\d+)", HEADER)}
    values_here = re.findall(r"const int (LLAMA_ONNX_\w+) = (\d+);", CSHARP)
    finish = re.search(
        r"public enum Finish\s+\{(.*?)\n    \}", (WRAPPER / "Values.cs").read_text(), re.S
    )
    assert finish
    members = {
        "LLAMA_ONNX_" + re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).upper(): int(value)
        for name, value in re.findall(r"(\w+) = (\d+)", finish[1])
    }
    assert {name: int(value) for name, value in values_here} | members == values


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="built with gcc for Linux's libraries")
@pytest.mark.skipif(
    not (shutil.which("mcs") and shutil.which("mono")), reason="Mono is not installed (mono-mcs)"
)
def test_a_program_uses_it_and_misuses_it_under_mono(built: Path, tmp_path: Path) -> None:
    """The libraries are in one folder, as in a NuGet package."""
    flat = link_libraries(tmp_path / "flat ä 日本")
    shutil.copy(built / "libllama_onnx.so", flat)
    library, program = flat / "LlamaOnnx.dll", flat / "Trial.exe"
    sources = map(str, sorted(WRAPPER.glob("*.cs")))
    command = ["mcs", "-nologo", "-warnaserror", "-langversion:latest"]
    subprocess.run([*command, "-target:library", f"-out:{library}", *sources], check=True)
    subprocess.run([*command, f"-r:{library}", f"-out:{program}", str(TRIAL)], check=True)
    package = make_package(tmp_path, "int4")
    prove(package, open_checkpoint(tmp_path / "checkpoint"), tokens=8, longest=16, certify=True)
    done = subprocess.run(
        ["mono", str(program), "misuse", str(package), str(tmp_path)],
        capture_output=True,
        env={**os.environ, "LANG": "C.UTF-8"},
        check=False,
    )
    lines = done.stdout.decode().splitlines()
    assert done.returncode == 0, done.stderr.decode()
    assert len(lines) == len(MISUSED)
    for line, expected in zip(lines, MISUSED, strict=True):
        assert re.fullmatch(expected, line), (line, expected)
