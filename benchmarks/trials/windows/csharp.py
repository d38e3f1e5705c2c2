"""The C# wrapper, its sample and the NuGet package, with the .NET SDK for Windows under Wine."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from benchmarks.trials.windows import nuget
from benchmarks.trials.windows.dotnet import DotNet, get_sdk
from benchmarks.trials.windows.nuget import make_trial
from benchmarks.trials.windows.wine import Wine, windows_path
from llama_onnx.runtime.llama.model import Llama
from tests.support.tables import Case, Table


def run(work: Path, wheels: Path, wine: Wine, real: Path | None = None) -> tuple[Table, Table]:
    """Test the sample in the bundle of the main run, and the NuGet package.

    `real` is another package for a conversation, whose times are compared too.
    """
    folder = work / "ä ü 日本"
    dotnet = DotNet(wine, get_sdk(work, "win"), work / "restored")
    shutil.rmtree(work / "restored", ignore_errors=True)
    samples = list(sample_cases(dotnet, folder))
    trial = make_trial(work, wheels, dotnet)
    return (
        ("C# | what happened", samples),
        ("the NuGet package | what happened", [*nuget.cases(trial), *nuget.talks(trial, real)]),
    )


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
    expected = nuget.text_after(package, model.encode("the quick").tolist(), 2048)
    first = said.splitlines()[0] if said else "nothing"
    same = nuget.comparable(printed[:-1]) == expected.replace("\r", "")
    yield Case("a prompt continued", same, first)
    printed, _ = dotnet.start(program, where, given='say "ä 日本"\n\n'.encode())
    message = {"role": "user", "content": 'say "ä 日本"'}
    expected = nuget.text_after(package, model.encode_chat([message]).tolist(), 2048)
    answer = printed.removeprefix("> ").removesuffix("\n> ")
    same = nuget.comparable(answer) == expected.replace("\r", "")
    yield Case("a conversation", same, "the text of Linux" if same else printed)
