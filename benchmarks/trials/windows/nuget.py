"""The NuGet package: made, restored by the SDK, used under Wine, .NET Core for Linux and Mono."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from tokenizers import Tokenizer

from benchmarks.trials.windows.dotnet import DotNet, get_sdk
from benchmarks.trials.windows.talks import SAID, Turn, compare_talks, read_turns, talk_on_linux
from benchmarks.trials.windows.windows_python import make_certified
from benchmarks.trials.windows.wine import windows_path
from llama_onnx.runtime.bundles.make import Settings, make_bundle
from llama_onnx.runtime.bundles.managed import ASSEMBLY, compiler_arguments
from llama_onnx.runtime.bundles.nuget import NuGet
from llama_onnx.runtime.bundles.nupkg import nuget_version
from llama_onnx.runtime.bundles.template_files import template_path
from llama_onnx.runtime.bundles.wheel_libraries import LINUX, download_wheels
from llama_onnx.runtime.llama.model import Llama
from llama_onnx.targets.package import ModelPackage
from tests.support.csharp import MISUSED, TRIAL
from tests.support.packages import greedy
from tests.support.tables import Case

QUESTION = "What is 2 + 2?"
"""What the program in the README asks."""


@dataclass(frozen=True)
class Trial:
    """A NuGet package in `folder`/bundle, and a package of a model."""

    dotnet: DotNet
    folder: Path
    package: Path
    linux_sdk: Path

    @property
    def bundle(self) -> Path:
        return self.folder / "bundle"


def make_trial(work: Path, wheels: Path, dotnet: DotNet) -> Trial:
    """Compile the wrapper under Wine and make the bundle twice, in a folder with an odd name."""
    folder = work / "ä ü 日本" / "nuget"
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "managed").mkdir(parents=True)
    if not any(wheels.glob("*manylinux*")):
        download_wheels(wheels, (LINUX,))
    package = make_certified(folder / "certified")
    number = nuget_version(version("llama-onnx"))
    said = dotnet.call(
        *compiler_arguments(
            dotnet.sdk / "sdk" / "3.1.102", folder / "managed", number, windows_path
        )
    )
    assembly = folder / "managed" / ASSEMBLY
    if said.strip() or not assembly.exists():
        raise RuntimeError(f"LlamaOnnx.dll: {said}")
    place, settings = NuGet(wheels, assembly), Settings(licensed=True)
    for name in ("bundle", "again"):
        make_bundle(ModelPackage.open(package), folder / name, place, settings)
    return Trial(dotnet, folder, package, get_sdk(work, "linux"))


def cases(trial: Trial) -> Iterator[Case]:
    """Make it twice; use it in a program of the SDK's template, and in every wrong way."""
    (first,), (second,) = (
        list((trial.folder / name).glob("*.nupkg")) for name in ("bundle", "again")
    )
    size = first.stat().st_size / 1e6
    same = first.read_bytes() == second.read_bytes()
    yield Case("made twice", same, f"{size:.1f} MB, the same bytes")
    yield from app_cases(trial)
    project = trial.folder / "trial" / "Trial.csproj"
    new_console(trial, project, TRIAL.read_text("utf-8"))
    yield trial.dotnet.build(project, project.parent / "out", trial.bundle)
    for where, run in runners(trial).items():
        scratch = trial.folder / f"saved {where}"
        scratch.mkdir()
        said = run(["misuse", trial.package, scratch]).splitlines()
        missing = [fact for fact in MISUSED if not any(re.fullmatch(fact, line) for line in said)]
        done = not missing and len(said) == len(MISUSED)
        found = f"{len(MISUSED)} facts, no crash" if done else f"{missing}: {said}"
        yield Case(f"misuse, rewind, save, load, cancel: {where}", done, found)


def app_cases(trial: Trial) -> Iterator[Case]:
    """`dotnet new console`, the program of the README, a restore from the folder of the package."""
    project = trial.folder / "app" / "App.csproj"
    text = template_path("nuget", "README.md").read_text("utf-8")
    (program,) = re.findall(r"```csharp\n(.*?)```", text, re.DOTALL)
    new_console(trial, project, program)
    out = project.parent / "out"
    yield trial.dotnet.build(project, out, trial.bundle)
    # Under Wine a console has no UTF-8, and the text of a tiny model is anything but ASCII.
    printed = run_on_linux(trial.linux_sdk, out / "App.dll", trial.package)
    same = comparable(printed) == answer(trial.package)
    said = "the text of onnxruntime-genai and tokenizers in Python"
    yield Case("the ten lines of its README, on Linux", same, said if same else printed)


def talks(trial: Trial, real: Path | None) -> Iterator[Case]:
    """Conversations of five turns, with the tokens of the C library and of genai on Linux."""
    if real:
        app = trial.folder / "app" / "out" / "App.exe"
        printed, said = trial.dotnet.start(app, windows_path(real))
        same = comparable(printed) == answer(real)
        yield Case("the ten lines of its README, under Wine", same, printed or said)
    packages = {"tiny": (trial.package, 8)} | ({"SmolLM2-135M, int4": (real, 32)} if real else {})
    for name, (package, count) in packages.items():
        expected = talk_on_linux(package, trial.folder / f"talk {count}", count)
        if package == real:
            yield genai_agrees(package, expected, count)
        for where, run in runners(trial).items():
            given = read_turns(run(["talk", package, str(count), *SAID]))
            # Only one model is large enough to time.
            what = f"five turns, {name}: {where}"
            yield compare_talks(what, expected, given, timed=package == real)


def genai_agrees(package: Path, turns: Sequence[Turn], count: int) -> Case:
    """Hold the conversation with onnxruntime-genai's own Python API, which is given what is new in
    each turn: a text read anew may part at a near-tie, because other kernels read it."""
    from llama_onnx.runtime.genai import og

    model, messages, equal = Llama.load(package, engine="genai"), list[dict[str, str]](), 0
    native = og.Model(og.Config(str(package)))
    params = og.GeneratorParams(native)
    params.set_search_options(max_length=model.codec.context_length, do_sample=False)
    generator = og.Generator(native, params)
    known: list[int] = []
    for text, turn in zip(SAID, turns, strict=True):
        messages.append({"role": "user", "content": text})
        prompt = model.encode_chat(messages).tolist()
        if prompt[: len(known)] != known:
            return Case("five turns, the C library on Linux", False, "the template changed a turn")
        generator.append_tokens(prompt[len(known) :])
        said: list[int] = []
        while len(said) < count and not generator.is_done():
            generator.generate_next_token()
            said.append(int(generator.get_next_tokens()[0]))
        equal += sum(a == b for a, b in zip(said, turn.ids, strict=False))
        known = [int(token) for token in generator.get_sequence(0)]  # without the end token
        messages.append({"role": "assistant", "content": model.decode(turn.ids)})
    total = sum(len(turn.ids) for turn in turns)
    told = f"{equal} of {total} tokens equal those of onnxruntime-genai in Python"
    return Case("five turns, the C library on Linux", equal == total, told)


Run = Callable[[Sequence[str | Path]], str]


def runners(trial: Trial) -> dict[str, Run]:
    """Where the trial program runs -> a function that calls it and returns what it printed."""
    out = trial.folder / "trial" / "out"
    natives = trial.folder / "unpacked"
    if not natives.exists():
        with zipfile.ZipFile(next(trial.bundle.glob("*.nupkg"))) as archive:
            archive.extractall(natives)
    library = natives / "lib" / "netstandard2.0" / ASSEMBLY

    def wine(arguments: Sequence[str | Path]) -> str:
        given = [windows_path(a) if isinstance(a, Path) else a for a in arguments]
        printed, said = trial.dotnet.start(out / "Trial.exe", *given)
        return printed or said

    def core(arguments: Sequence[str | Path]) -> str:
        return run_on_linux(trial.linux_sdk, out / "Trial.dll", *arguments)

    found: dict[str, Run] = {".NET Core 3.1 under Wine": wine, ".NET Core 3.1 on Linux": core}
    facade = Path("/usr/lib/mono/4.5/Facades/netstandard.dll")
    if shutil.which("mcs") and facade.exists():  # of Debian's package mono-devel
        built = natives / "Trial.exe"
        if not built.exists():
            command = [
                "mcs",
                "-nologo",
                f"-r:{library}",
                f"-r:{facade}",
                f"-out:{built}",
                str(TRIAL),
            ]
            subprocess.run(command, check=True)
        # The unpacked package as it is: the wrapper finds the libraries from its own place.
        place = {"MONO_PATH": str(library.parent)}
        found["Mono 6.8 on Linux"] = lambda given: run_native("mono", built, *given, **place)
    return found


def run_on_linux(sdk: Path, program: Path, *arguments: str | Path) -> str:
    """Run a program that was built under Wine with .NET Core for Linux."""
    (sdk / "dotnet").chmod(0o755)
    invariant = {"DOTNET_SYSTEM_GLOBALIZATION_INVARIANT": "1"}
    return run_native(sdk / "dotnet", program, *arguments, **invariant)


def run_native(*command: str | Path, **environment: str) -> str:
    """Run a program of this machine and return what it printed, or its errors."""
    variables = {**os.environ, "LANG": "C.UTF-8", **environment}
    done = subprocess.run(command, capture_output=True, env=variables, check=False)
    return (done.stdout or done.stderr).decode(errors="replace")


def answer(package: Path) -> str:
    """What the program of the README prints."""
    prompt = Llama.load(package).encode_chat([{"role": "user", "content": QUESTION}])
    return text_after(package, prompt.tolist(), 256)


def text_after(package: Path, prompt: Sequence[int], count: int) -> str:
    """Continue a prompt with onnxruntime-genai and the library tokenizers."""
    context = json.loads((package / "genai_config.json").read_bytes())["model"]["context_length"]
    ids = greedy(package, prompt, min(count, context - len(prompt)))
    text: str = Tokenizer.from_file(str(package / "tokenizer.json")).decode(ids)
    return comparable(text)


def comparable(text: str) -> str:
    """Leave out what the C library does not print: a NUL, and half a character at the end."""
    return text.replace("\0", "").rstrip("\ufffd")


def new_console(trial: Trial, project: Path, program: str) -> None:
    """Make a project from the SDK's template that references the package by its version."""
    folder = project.parent
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    options = ("--no-restore", "-n", project.stem, "-o", windows_path(folder))
    trial.dotnet.call("new", "console", *options)
    number = nuget_version(version("llama-onnx"))
    reference = f'<PackageReference Include="LlamaOnnx" Version="{number}" />'
    text = project.read_text("utf-8-sig")
    text = text.replace("</Project>", f"<ItemGroup>{reference}</ItemGroup></Project>")
    project.write_text(text, "utf-8")
    (folder / "Program.cs").write_text(program, "utf-8")
