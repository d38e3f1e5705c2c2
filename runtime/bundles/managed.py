"""The C# wrapper, compiled by a .NET SDK without a network: its compiler and its own reference of
netstandard 2.0 are all that it needs."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from llama_onnx.targets.errors import MissingDependencyError

SOURCES = Path(__file__).parents[1] / "native" / "dotnet"
ASSEMBLY = "LlamaOnnx.dll"


def compile_managed(dotnet: str, folder: Path, version: str) -> Path:
    """Compile LlamaOnnx.dll and LlamaOnnx.xml in `folder` with the SDK of the program `dotnet`.

    Raises `MissingDependencyError` if there is no SDK, or with its first error.
    """
    listed = subprocess.run([dotnet, "--list-sdks"], capture_output=True, text=True, check=False)
    found = re.findall(r"^(\S+) \[(.+)\]$", listed.stdout, re.M)
    if listed.returncode or not found:
        raise MissingDependencyError(
            f"{dotnet} has no SDK: install one, or pass --managed {ASSEMBLY}, compiled elsewhere."
        )
    sdk = Path(found[-1][1]) / found[-1][0]
    arguments = compiler_arguments(sdk, folder, version)
    done = subprocess.run([dotnet, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        reason = ((done.stdout + done.stderr).strip().splitlines() or ["no reason given"])[0]
        raise MissingDependencyError(f"{dotnet} could not compile {ASSEMBLY}: {reason}.")
    return folder / ASSEMBLY


def compiler_arguments(
    sdk: Path, folder: Path, version: str, path: Callable[[Path], str] = str
) -> Sequence[str]:
    """Return the arguments of dotnet that compile the wrapper in `folder`; `path` writes paths.

    The same sources give the same bytes. `version` has three numbers, and what follows a hyphen.
    """
    info = folder / "AssemblyInfo.cs"
    numbers = version.partition("-")[0]
    info.write_text(
        "using System.Reflection;\n"
        f'[assembly: AssemblyVersion("{numbers}.0")]\n'
        f'[assembly: AssemblyInformationalVersion("{version}")]\n',
        "utf-8",
    )
    return [
        path(sdk / "Roslyn" / "bincore" / "csc.dll"),
        *("-nologo", "-noconfig", "-nostdlib", "-deterministic", "-optimize", "-debug-"),
        *("-target:library", "-langversion:7.3", "-warnaserror", "-nowarn:1591"),
        f"-reference:{path(sdk / 'ref' / 'netstandard.dll')}",
        f"-doc:{path(folder / 'LlamaOnnx.xml')}",
        f"-out:{path(folder / ASSEMBLY)}",
        *(path(source) for source in (*sorted(SOURCES.glob("*.cs")), info)),
    ]
