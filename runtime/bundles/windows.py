"""A package made ready for Windows apps: DLLs, a C library, samples, licences, hashes.

OUT/
  package/            the model, with SHA256SUMS and, if there is one, selftest.txt
  bin/cpu/            one set of DLLs each: bin's own llama_onnx.dll loads one of them
  bin/directml/
  native/             llama_onnx.h, its source, and samples in C, C# and Python
  licenses/           of each part
  README.txt  bundle.json
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from llama_onnx.runtime.bundles.bundle import Bundled, copy_package, make_bundle, write_sums
from llama_onnx.runtime.bundles.selftest import SelfTest
from llama_onnx.targets.errors import MissingDependencyError, PackageError, UsageError
from llama_onnx.targets.package import ModelPackage, hash_file
from llama_onnx.targets.signature import Signer

NATIVE = Path(__file__).parents[1] / "native"
COMPILER = "x86_64-w64-mingw32-gcc"
SELF_TEST = "selftest.txt"

_GENAI_LICENCES = ("onnxruntime_genai/LICENSE", "onnxruntime_genai/ThirdPartyNotices.txt")


@dataclass(frozen=True)
class Wheel:
    """A Windows wheel of PyPI: the DLLs taken out of it, by sha256, and its licence files."""

    name: str
    version: str
    dlls: Mapping[str, str]
    licences: tuple[str, ...]

    @property
    def pattern(self) -> str:
        """What its file is called, whichever Python it is for."""
        return f"{self.name.replace('-', '_')}-{self.version}-*-win_amd64.whl"


@dataclass(frozen=True)
class Libraries:
    """A set of DLLs that belong together, and the version that its ONNX Runtime says it has."""

    name: str
    onnxruntime: str
    wheels: tuple[Wheel, ...]
    notes: Mapping[str, str] = field(default_factory=dict)


CPU = Libraries(
    name="cpu",
    onnxruntime="1.32.0",
    wheels=(
        Wheel(
            "onnxruntime",
            "1.32.0",
            {
                "onnxruntime/capi/onnxruntime.dll": (
                    "e9feebaed867b76f741c14ae64e056a3da64a153a61994f1fb48eadc7f9b3ba8"
                )
            },
            ("onnxruntime/LICENSE", "onnxruntime/ThirdPartyNotices.txt", "onnxruntime/Privacy.md"),
        ),
        Wheel(
            "onnxruntime-genai",
            "0.18.0",
            {
                "onnxruntime_genai/onnxruntime-genai.dll": (
                    "d5a6b2f83ffe5463a40c78b571023783fa40a0f81b2ab3b47e0f5db297793fa6"
                )
            },
            _GENAI_LICENCES,
        ),
    ),
)

DIRECTML = Libraries(
    name="directml",
    onnxruntime="1.24.6",
    wheels=(
        Wheel(
            "onnxruntime-genai-winml",
            "0.18.0",
            {
                "onnxruntime_genai/onnxruntime.dll": (
                    "bf14eb254d0a3fe50abe55b341d70abdbbf9bd4affd810998a86fac9ef81fc69"
                ),
                "onnxruntime_genai/onnxruntime-genai.dll": (
                    "7f87719b6eaf0e31ef409987ab17938b7e0f54022fb2731a52fbf9517491c909"
                ),
                "onnxruntime_genai/DirectML.dll": (
                    "4bc053cd10ec97777ba34d68a9e14e839f48ac2ace9c11909d731ca27f9373ef"
                ),
            },
            _GENAI_LICENCES,
        ),
    ),
    notes={
        "DirectML.txt": "DirectML.dll is Microsoft's. The wheel it comes from, "
        "onnxruntime-genai-winml, has no licence file for it: read the terms of Microsoft's "
        "package Microsoft.AI.DirectML before you pass it on.\n"
    },
)


def bundle_windows(
    package: ModelPackage,
    out: Path,
    wheels: Path,
    *,
    libraries: Sequence[Libraries] = (CPU, DIRECTML),
    self_test: SelfTest | None = None,
    licensed: bool = False,
    force: bool = False,
    as_zip: bool = False,
    compiler: str | None = None,
    sign: Signer | None = None,
) -> Bundled:
    """Make the folder `out` of `package` and the Windows wheels in the folder `wheels`.

    Without `self_test`, the package's certificate gives one, if it has a certificate. `licensed`
    says that the licence files a model has to be passed on with may be missing.
    `compiler` is the path of MinGW's gcc; without it the C library and its sample stay source.
    `sign` makes the signature bundle.json.sig.
    Raises `PackageError`, `UsageError` or `MissingDependencyError`, and then leaves nothing behind.
    """
    package.require_tokenizer()
    self_test = self_test or SelfTest.from_certificate(package.path)

    def fill(folder: Path) -> tuple[str, ...]:
        copy_package(package, folder / "package")
        if self_test:
            (folder / "package" / SELF_TEST).write_bytes(str(self_test).encode())
        write_sums(folder / "package")
        for part in libraries:
            _take_libraries(part, wheels, folder)
        shutil.copytree(NATIVE, folder / "native", ignore=shutil.ignore_patterns("__pycache__"))
        if compiler:
            build_native(compiler, folder)
        (folder / "README.txt").write_bytes(_README.encode())
        return _warnings(package, libraries, self_test, compiler)

    return make_bundle(
        package,
        out,
        "windows",
        fill,
        content={"libraries": _versions(libraries)},
        licensed=licensed,
        force=force,
        as_zip=as_zip,
        sign=sign,
    )


def download_wheels(folder: Path, libraries: Sequence[Libraries] = (CPU, DIRECTML)) -> None:
    """Have pip fetch the wheels of `libraries` to `folder`; raises `MissingDependencyError`."""
    # In two goes: both genai flavours in one would be taken for a conflict.
    for part in libraries:
        wanted = [f"{wheel.name}=={wheel.version}" for wheel in part.wheels]
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--only-binary=:all:", "--platform", "win_amd64", "--python-version", "3.11"]
        command += ["--implementation", "cp", "--dest", str(folder), *wanted]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["it does not say why"])[-1]
            raise MissingDependencyError(
                f"pip could not download {' and '.join(wanted)} for Windows ({reason}): fetch them "
                "elsewhere and say --wheels DIR."
            )


def build_native(compiler: str, folder: Path) -> None:
    """Build `folder`/bin/llama_onnx.dll and llama_onnx_chat.exe from `folder`/native.

    Raises `MissingDependencyError` with the compiler's first error.
    """
    native, binaries = folder / "native", folder / "bin"
    binaries.mkdir(exist_ok=True)
    common = [compiler, "-std=c11", "-O2", "-Wall", "-Wextra", "-static-libgcc", f"-I{native}"]
    library = binaries / "llama_onnx.dll"
    source = native / "llama_onnx.c"
    _compile([*common, "-shared", "-DLLAMA_ONNX_BUILD", str(source), "-o", str(library)])
    sample = native / "samples" / "c" / "main.c"
    program = binaries / "llama_onnx_chat.exe"
    _compile([*common, "-municode", str(sample), str(library), "-o", str(program)])


def _compile(command: list[str]) -> None:
    done = subprocess.run([*command, "-s"], capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["it does not say why"])[0]
        raise MissingDependencyError(f"{command[0]} could not build {command[-1]}: {reason}.")


def _take_libraries(part: Libraries, wheels: Path, folder: Path) -> None:
    binaries, licences = folder / "bin" / part.name, folder / "licenses" / part.name
    binaries.mkdir(parents=True)
    for wheel in part.wheels:
        _take_wheel(wheel, _find_wheel(wheel, wheels), binaries, licences / wheel.name)
    for name, text in part.notes.items():
        (licences / name).write_bytes(text.encode())
    (binaries / "onnxruntime.version").write_bytes(f"{part.onnxruntime}\n".encode())


def _find_wheel(wheel: Wheel, wheels: Path) -> Path:
    found = sorted(wheels.glob(wheel.pattern))
    if not found:
        raise UsageError(
            f"{wheels} has no {wheel.pattern}: `pip download --no-deps --only-binary=:all: "
            f"--platform win_amd64 {wheel.name}=={wheel.version}` fetches it."
        )
    return found[0]


def _take_wheel(wheel: Wheel, file: Path, binaries: Path, licences: Path) -> None:
    licences.mkdir(parents=True)
    try:
        with zipfile.ZipFile(file) as archive:
            for name in wheel.dlls:
                _extract(archive, name, binaries)
            for name in wheel.licences:
                _extract(archive, name, licences)
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise PackageError(f"{file} is damaged or another wheel: {error}.") from None
    for name, sha256 in wheel.dlls.items():
        if hash_file(binaries / PurePosixPath(name).name) != sha256:
            raise PackageError(
                f"{file} is not the wheel that was tested: {name} has another sha256. Download "
                f"{wheel.name}=={wheel.version} for Python 3.11 again."
            )


def _extract(archive: zipfile.ZipFile, name: str, folder: Path) -> None:
    with (
        archive.open(name) as source,
        (folder / PurePosixPath(name).name).open("wb") as target,
    ):
        shutil.copyfileobj(source, target)


def _versions(libraries: Sequence[Libraries]) -> dict[str, dict[str, str]]:
    return {part.name: {wheel.name: wheel.version for wheel in part.wheels} for part in libraries}


def _warnings(
    package: ModelPackage,
    libraries: Sequence[Libraries],
    self_test: SelfTest | None,
    compiler: str | None,
) -> tuple[str, ...]:
    out = []
    with_directml = any(part.name == DIRECTML.name for part in libraries)
    if with_directml and package.target != DIRECTML.name:
        out.append(
            f"The package is for the target {package.target}, whose attention DirectML does not "
            "compute, so apps will choose the CPU: export with --target directml for DirectML, or "
            "say --cpu-only."
        )
    if not compiler:
        out.append(
            f"{COMPILER} is not installed, so llama_onnx.dll is not built: build it with CMake on "
            "Windows, as README.txt says."
        )
    if not self_test and with_directml:
        out.append(
            "The package has no self-test, so apps will choose the CPU unless they ask for "
            "DirectML: certify it by `llama-onnx validate --certify`, or say --self-test."
        )
    return tuple(out)


_README = """\
A language model for Windows apps
=================================

package\\     the model, in onnxruntime-genai's format. manifest.json and SHA256SUMS name each file.
bin\\         llama_onnx.dll and llama_onnx_chat.exe, if they were built where this bundle was made;
             cpu\\ and directml\\ hold the libraries that llama_onnx.dll loads, each set complete.
native\\      llama_onnx.h, the source of llama_onnx.dll, and samples in C, C# and Python.
licenses\\    of each part. The model's own licence is in package\\.
bundle.json  what all this is: versions, and size and sha256 of every file. bundle.json.sig, if it
             is there, is its ed25519 signature.

Try it:      bin\\llama_onnx_chat.exe
Build it:    cmake -S native\\samples\\c -B build
             cmake --build build --config Release --target install
Ship it:     package\\, bin\\, licenses\\ as they are, anywhere, also below C:\\Program Files:
             nothing is ever written there. llama_onnx.dll finds cpu\\ and directml\\ beside it.

Windows needs Microsoft's Visual C++ Redistributable (x64).

llama_onnx.dll takes DirectML if the machine has a graphics device with Direct3D 12 and that device
gives the tokens in package\\selftest.txt, and the CPU otherwise; llama_onnx_provider_reason() says
which and why. It loads the libraries here and no others: not those of System32, not those on PATH.
Usage reports of ONNX Runtime are off unless ORT_DISABLE_TELEMETRY is 0.
"""
