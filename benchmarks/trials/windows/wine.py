"""Windows programs under Wine: required tools, a separate prefix, and calls."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

APT = "apt-get install wine wine64 gcc-mingw-w64-x86-64"
COMPILER = "x86_64-w64-mingw32-gcc"

# Wine 8 lacks bcryptprimitives.dll, from which genai's DLL imports this one function.
_PRNG = """
#include <windows.h>
BOOLEAN NTAPI SystemFunction036(PVOID, ULONG);
__declspec(dllexport) BOOL WINAPI ProcessPrng(PBYTE data, SIZE_T size)
{ return SystemFunction036(data, (ULONG)size); }
"""


def check_tools() -> None:
    """Exit with the command that installs what is missing."""
    missing = [name for name in ("wine", COMPILER) if shutil.which(name) is None]
    if missing:
        sys.exit(f"{' and '.join(missing)} missing: run `{APT}` (Debian, as root).")


def compile_windows(source: Path, out: Path, *flags: str) -> Path:
    """Build a program, or a DLL with -shared."""
    common = ("-std=c11", "-O1", "-Wall", "-Wextra", "-Werror", "-static-libgcc")
    subprocess.run([COMPILER, *common, str(source), "-o", str(out), *flags], check=True)
    return out


def windows_path(path: Path) -> str:
    """Return the path as a Windows program sees it."""
    return "Z:" + str(path.absolute()).replace("/", "\\")


@dataclass(frozen=True)
class Wine:
    """A Wine prefix."""

    prefix: Path

    @classmethod
    def make(cls, folder: Path) -> Wine:
        """Make a prefix in `folder` and add what Wine 8 lacks."""
        wine = cls(folder / "prefix")
        shutil.rmtree(wine.prefix, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        wine.call(["wineboot", "--init"])
        source = folder / "bcryptprimitives.c"
        source.write_text(_PRNG)
        system = wine.prefix / "drive_c" / "windows" / "system32"
        if not (system / "bcryptprimitives.dll").exists():
            compile_windows(source, system / "bcryptprimitives.dll", "-shared", "-ladvapi32")
        return wine

    def call(
        self,
        command: Sequence[str],
        *,
        cwd: Path | None = None,
        path: Path | None = None,
        given: bytes = b"",
        environment: Mapping[str, str] | None = None,
        pipes: bool = False,
    ) -> subprocess.CompletedProcess[bytes]:
        """Run a Windows program with `path` on its PATH and `given` as its input.

        `pipes` is for Python, which cannot write to a file under Wine.
        """
        variables = {**self.environment(), **(environment or {})}
        if path:
            variables["WINEPATH"] = windows_path(path)
        if pipes:
            return subprocess.run(
                ["wine", *command],
                env=variables,
                cwd=cwd,
                input=given,
                capture_output=True,
                timeout=300,
                check=False,
            )
        # Not pipes: the services that Wine starts would keep them open for seconds.
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
            done = subprocess.run(
                ["wine", *command],
                env=variables,
                cwd=cwd,
                input=given,
                stdout=out,
                stderr=errors,
                timeout=300,
                check=False,
            )
            out.seek(0)
            errors.seek(0)
            done.stdout, done.stderr = out.read(), errors.read()
        return done

    def environment(self) -> dict[str, str]:
        """Return the environment of a program in this prefix."""
        # Without ORT_DISABLE_TELEMETRY, because a case checks that the library sets it.
        inherited = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"}
        return inherited | {
            "WINEPREFIX": str(self.prefix.absolute()),
            "WINEDEBUG": "-all",
            "WINEDLLOVERRIDES": "mscoree,mshtml=;winedbg.exe=d",
        }

    def close(self) -> None:
        """End what Wine left running in this prefix."""
        server = shutil.which("wineserver") or "/usr/lib/wine/wineserver64"
        if Path(server).exists():
            subprocess.run([server, "-k"], env=self.environment(), check=False)
