"""Bundle a package for .NET: a NuGet package with the wrapper and its native libraries.

OUT/
  LlamaOnnx.VERSION.nupkg    LlamaOnnx.dll for netstandard2.0; libraries for win-x64 and linux-x64
  package/                   the model, with SHA256SUMS; apps ship or download it
  README.md  bundle.json
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

from llama_onnx.runtime.bundles.make import copy_package
from llama_onnx.runtime.bundles.managed import ASSEMBLY, compile_managed
from llama_onnx.runtime.bundles.nupkg import Description, nuget_version, write_nupkg
from llama_onnx.runtime.bundles.place import Option, Place
from llama_onnx.runtime.bundles.template_files import copy_template, template_path
from llama_onnx.runtime.bundles.wheel_libraries import (
    CPU,
    LINUX,
    WHEELS,
    Libraries,
    download_wheels,
    unpack_libraries,
)
from llama_onnx.runtime.bundles.windows import COMPILER, NATIVE, compile_native
from llama_onnx.targets.bundle import write_sums
from llama_onnx.targets.errors import MissingDependencyError, PackageError, UsageError
from llama_onnx.targets.package import ModelPackage

NAME = "LlamaOnnx"


@dataclass(frozen=True)
class Runtime:
    """A system that apps run on: its name in NuGet, the C library's file, how it is built."""

    name: str
    library: str
    compiler: str
    flags: tuple[str, ...]
    libraries: Libraries


RUNTIMES = (
    Runtime(
        "win-x64",
        "llama_onnx.dll",
        COMPILER,
        # Without these, the time and the path of the file are in it.
        ("-static-libgcc", "-Wl,--no-insert-timestamp", "-Wl,--image-base,0x180000000"),
        CPU,
    ),
    Runtime(
        "linux-x64",
        "libllama_onnx.so",
        "x86_64-linux-gnu-gcc",
        (
            "-fPIC",
            "-fvisibility=hidden",
            "-Wl,-soname,libllama_onnx.so",
            "-ldl",
            "-lpthread",
            "-lm",
        ),
        LINUX,
    ),
)


@dataclass(frozen=True)
class NuGet(Place):
    """.NET apps, on the CPU.

    `wheels` is a folder with the wheels of `runtimes`; without it pip downloads them. `managed` is
    a compiled LlamaOnnx.dll; without it the SDK of the program `dotnet` compiles one.
    """

    name: ClassVar[str] = "nuget"
    summary: ClassVar[str] = "a NuGet package for .NET apps, with the model beside it"
    cpu_packages: ClassVar[bool] = True
    options: ClassVar[tuple[Option, ...]] = (
        WHEELS,
        Option(
            "managed",
            "file",
            f"{ASSEMBLY}, compiled elsewhere; without it the .NET SDK compiles it.",
        ),
    )

    wheels: Path | None = None
    managed: Path | None = None
    runtimes: tuple[Runtime, ...] = RUNTIMES
    dotnet: str = "dotnet"

    def check(self, package: ModelPackage) -> None:
        """Raise `PackageError` for a package that is not for the CPU or has no tokenizer."""
        if package.target != "cpu":
            raise PackageError(
                f"{package.path} is for the target {package.target}, but the NuGet package runs "
                "on the CPU: export with --target cpu."
            )
        package.require_tokenizer()

    def content(self) -> Mapping[str, Any]:
        """Return the versions of the wheels: runtime -> wheel -> version."""
        return {
            "libraries": {
                runtime.name: {wheel.name: wheel.version for wheel in runtime.libraries.wheels}
                for runtime in self.runtimes
            }
        }

    def fill(self, package: ModelPackage, folder: Path, name: str) -> Sequence[str]:
        """Write the NuGet package, and the model beside it.

        Raises `PackageError`, `UsageError` or `MissingDependencyError`.
        """
        number = nuget_version(version("llama-onnx"))
        # Before anything is downloaded.
        compilers = [_find(runtime.compiler, runtime.name) for runtime in self.runtimes]
        with TemporaryDirectory() as temporary:
            parts, work = Path(temporary) / "parts", Path(temporary) / "work"
            work.mkdir()
            self._add_managed(work, parts / "lib" / "netstandard2.0", number)
            used = tuple(runtime.libraries for runtime in self.runtimes)
            wheels = self.wheels or download_wheels(work, used)
            for runtime, compiler in zip(self.runtimes, compilers, strict=True):
                _add_native(runtime, compiler, wheels, parts)
            shutil.copyfile(NATIVE / "LICENSE", parts / "LICENSE.txt")
            copy_template(self.name, "README.md", parts)
            files = {p.relative_to(parts).as_posix(): p for p in parts.rglob("*") if p.is_file()}
            write_nupkg(folder / f"{NAME}.{number}.nupkg", _about(number), files)
        copy_package(package, folder / "package")
        write_sums(folder / "package")
        shutil.copyfile(template_path(self.name, "README.md"), folder / "README.md")
        return ()

    def _add_managed(self, work: Path, folder: Path, number: str) -> None:
        assembly = self.managed
        if assembly is None:
            dotnet = shutil.which(self.dotnet)
            if dotnet is None:
                raise MissingDependencyError(
                    f"{ASSEMBLY} cannot be compiled, because no .NET SDK is installed: install "
                    f"one, or pass --managed {ASSEMBLY}, compiled elsewhere."
                )
            assembly = compile_managed(dotnet, work, number)
        elif f"\0{ASSEMBLY}\0".encode() not in assembly.read_bytes():  # the module's own name
            raise UsageError(f"{assembly} is not an assembly that was compiled as {ASSEMBLY}.")
        folder.mkdir(parents=True)
        shutil.copyfile(assembly, folder / ASSEMBLY)
        described = assembly.with_suffix(".xml")
        if described.is_file():
            shutil.copyfile(described, folder / described.name)


def _find(compiler: str, runtime: str) -> str:
    found = shutil.which(compiler)
    if found is None:
        raise MissingDependencyError(
            f"{compiler}, which builds the C library for {runtime}, is not installed: on Debian, "
            "run `apt-get install gcc gcc-mingw-w64-x86-64`."
        )
    return found


def _add_native(runtime: Runtime, compiler: str, wheels: Path, parts: Path) -> None:
    """Build the C library for `runtime` and put the libraries that it loads beside it."""
    native = parts / "runtimes" / runtime.name / "native"
    unpack_libraries(runtime.libraries, wheels, native, parts / "licenses" / runtime.name)
    command = [compiler, "-std=c11", "-O2", "-Wall", "-Wextra", "-shared", "-DLLAMA_ONNX_BUILD"]
    out = native / runtime.library
    compile_native([*command, str(NATIVE / "llama_onnx.c"), *runtime.flags, "-o", str(out)])


def _about(number: str) -> Description:
    return Description(
        name=NAME,
        version=number,
        authors="llama-onnx",
        description="Runs Llama models that llama-onnx converted to ONNX: conversations, streams, "
        "sampling, on the CPU of Windows and Linux (x64).",
        tags="llm llama onnx onnxruntime-genai",
        framework=".NETStandard2.0",
        licence="LICENSE.txt",
        readme="README.md",
    )
