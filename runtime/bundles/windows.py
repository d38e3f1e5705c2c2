"""Bundle a package for Windows apps: DLLs, a C library, samples, licenses, hashes.

OUT/
  package/            the model, with SHA256SUMS and, if there is one, selftest.txt
  bin/                llama_onnx.dll and llama_onnx_chat.exe, if they could be built
  bin/cpu/            a set of DLLs; llama_onnx.dll loads one of the sets
  bin/directml/       another set
  native/             llama_onnx.h, its source, a C# wrapper, and samples in C, C# and Python
  licenses/           the licenses of each part
  README.txt  bundle.json
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

from llama_onnx.runtime.bundles.make import certificate_of, copy_package
from llama_onnx.runtime.bundles.place import Option, Place
from llama_onnx.runtime.bundles.selftest import SelfTest
from llama_onnx.runtime.bundles.template_files import copy_template
from llama_onnx.runtime.bundles.wheel_libraries import (
    CPU,
    DIRECTML,
    WHEELS,
    Libraries,
    download_wheels,
    unpack_libraries,
)
from llama_onnx.targets.bundle import write_sums
from llama_onnx.targets.errors import MissingDependencyError, UsageError
from llama_onnx.targets.package import ModelPackage

NATIVE = Path(__file__).parents[1] / "native"
COMPILER = "x86_64-w64-mingw32-gcc"
SELF_TEST = "selftest.txt"


@dataclass(frozen=True)
class Windows(Place):
    """Windows apps in C, C++, C# or Python.

    `wheels` is a folder with the Windows wheels of `libraries`; without it pip downloads them.
    Without `self_test`, the package's certificate provides one if possible. `compiler` is the path
    of MinGW's gcc; without it the C library and its sample are shipped as source only.
    """

    name: ClassVar[str] = "windows"
    summary: ClassVar[str] = "DLLs, a C library and samples for Windows apps"
    options: ClassVar[tuple[Option, ...]] = (
        WHEELS,
        Option("cpu_only", "flag", "Leave DirectML's DLLs out."),
        Option(
            "self_test",
            "file",
            "Prompt and expected ids, to test DirectML with; without it the package's certificate "
            "provides them.",
        ),
    )

    wheels: Path | None = None
    libraries: tuple[Libraries, ...] = (CPU, DIRECTML)
    self_test: SelfTest | None = None
    compiler: str | None = None

    @classmethod
    def from_options(cls, given: Mapping[str, Any]) -> Windows:
        """Return the place with settings from the command line, and MinGW if it is installed.

        Raises `UsageError` for a file that is not a self-test, and for a self-test that nothing
        would use.
        """
        if given.get("cpu_only") and "self_test" in given:
            raise UsageError(
                "--self-test has no effect with --cpu-only, because only DirectML is tested: leave "
                "one of them out."
            )
        return cls(
            wheels=given.get("wheels"),
            libraries=(CPU,) if given.get("cpu_only") else (CPU, DIRECTML),
            self_test=SelfTest.read(given["self_test"]) if "self_test" in given else None,
            compiler=shutil.which(COMPILER),
        )

    def content(self) -> Mapping[str, Any]:
        """Return the versions of the wheels: set of DLLs -> wheel -> version."""
        return {
            "libraries": {
                part.name: {wheel.name: wheel.version for wheel in part.wheels}
                for part in self.libraries
            }
        }

    def fill(self, package: ModelPackage, folder: Path, name: str) -> Sequence[str]:
        """Write the package, the DLLs, the C library and its samples.

        Raises `PackageError`, `UsageError` or `MissingDependencyError`.
        """
        package.require_tokenizer()
        self_test = self.self_test or _certified_test(package)
        with TemporaryDirectory() as temporary:
            wheels = self.wheels or download_wheels(Path(temporary), self.libraries)
            for part in self.libraries:
                binaries, licences = folder / "bin" / part.name, folder / "licenses" / part.name
                unpack_libraries(part, wheels, binaries, licences)
        copy_package(package, folder / "package")
        if self_test:
            (folder / "package" / SELF_TEST).write_bytes(str(self_test).encode())
        write_sums(folder / "package")
        shutil.copytree(NATIVE, folder / "native", ignore=shutil.ignore_patterns("__pycache__"))
        if self.compiler:
            build_native(self.compiler, folder)
        copy_template(self.name, "README.txt", folder)
        return tuple(self._warnings(package, self_test))

    def _warnings(self, package: ModelPackage, self_test: SelfTest | None) -> Iterator[str]:
        with_directml = any(part.name == DIRECTML.name for part in self.libraries)
        if with_directml and package.target != DIRECTML.name:
            yield (
                f"The package is for the target {package.target}, whose attention DirectML cannot "
                "run, so apps will choose the CPU: export with --target directml for "
                "DirectML, or pass --cpu-only."
            )
        if not self.compiler:
            yield (
                f"{COMPILER} is not installed, so llama_onnx.dll is not built: build it with CMake "
                "on Windows, as README.txt describes."
            )
        if not self_test and with_directml:
            yield (
                "The package has no self-test, so apps will choose the CPU unless they ask for "
                "DirectML: certify it with `llama-onnx validate --certify`, or pass --self-test."
            )


def _certified_test(package: ModelPackage) -> SelfTest | None:
    certificate = certificate_of(package)
    return SelfTest.from_certificate(certificate) if certificate else None


def build_native(compiler: str, folder: Path) -> None:
    """Build `folder`/bin/llama_onnx.dll and llama_onnx_chat.exe from `folder`/native.

    `compiler` is the path of MinGW's gcc. Raises `MissingDependencyError` with its first error.
    """
    native, binaries = folder / "native", folder / "bin"
    binaries.mkdir(exist_ok=True)
    common = [compiler, "-std=c11", "-O2", "-Wall", "-Wextra", "-static-libgcc", f"-I{native}"]
    library = binaries / "llama_onnx.dll"
    source = native / "llama_onnx.c"
    compile_native([*common, "-shared", "-DLLAMA_ONNX_BUILD", str(source), "-o", str(library)])
    sample = native / "samples" / "c" / "main.c"
    program = binaries / "llama_onnx_chat.exe"
    compile_native([*common, "-municode", str(sample), str(library), "-o", str(program)])


def compile_native(command: list[str]) -> None:
    """Run a compiler whose last argument is the file that it writes.

    Raises `MissingDependencyError` with its first error.
    """
    done = subprocess.run([*command, "-s"], capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[0]
        raise MissingDependencyError(f"{command[0]} could not build {command[-1]}: {reason}.")
