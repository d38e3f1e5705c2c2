"""The bundle for Windows under Wine: the real DLLs, the tokens of Linux, and failures.

python -m benchmarks.trials.windows.run WORK_FOLDER [--wheels DIR] [--csharp] [--python] [--real]

Prints its tables and writes them to docs/windows.md; exits with status 1 if a case fails.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.trials.windows.talks import five_turns
from benchmarks.trials.windows.wine import (
    COMPILER,
    Wine,
    check_tools,
    compile_windows,
    windows_path,
)
from llama_onnx.runtime.bundles.make import make_bundle
from llama_onnx.runtime.bundles.selftest import SelfTest
from llama_onnx.runtime.bundles.wheel_libraries import download_wheels
from llama_onnx.runtime.bundles.windows import Windows
from llama_onnx.runtime.genai import og
from llama_onnx.targets.bundle import write_sums
from llama_onnx.targets.package import ModelPackage
from tests.support.packages import greedy, make_package
from tests.support.tables import Case, Table, show

ROOT = Path(__file__).parents[3]
DOCS = ROOT / "docs" / "windows.md"
PACKAGES = {
    **{precision: (precision, "cpu") for precision in ("fp32", "fp16", "int8", "int4")},
    "int4, for directml": ("int4", "directml"),
}
"""Name -> precision and target. All run on the CPU: DirectML does not open under Wine."""

PROMPTS = tuple([1, *range(start, start + 6)] for start in (40, 90, 140, 190, 240))
NEW_TOKENS = 40


@dataclass(frozen=True)
class Place:
    """A bundle, packages, and the Wine prefix that runs them."""

    wine: Wine
    bundle: Path
    packages: dict[str, Path]
    other_ort: Path

    @property
    def libraries(self) -> Path:
        return self.bundle / "bin"

    def probe(
        self,
        package: Path,
        text: str | Sequence[int] = PROMPTS[0],
        *,
        count: int = 8,
        libraries: Path | None = None,
        provider: str = "cpu",
        preload: Path | None = None,
        path: Path | None = None,
        cwd: Path | None = None,
    ) -> dict[str, str]:
        """Run benchmarks/trials/windows/probe.c and return its facts by name."""
        ids = text if isinstance(text, str) else ",".join(map(str, text))
        program = windows_path(self.libraries / "probe.exe")
        where = windows_path(libraries or self.libraries)
        command = [program, windows_path(package), where, provider, "1", str(count), ids]
        if preload:
            command.append(windows_path(preload))
        done = self.wine.call(command, cwd=cwd, path=path)
        lines = done.stdout.decode().splitlines()
        facts = dict(line.partition(" ")[::2] for line in lines)
        if "status" not in facts:
            raise RuntimeError(f"probe.exe ended with {done.returncode}: {done.stderr.decode()}")
        return facts | {"pieces": str(lines.count("piece"))}


def make_place(work: Path, wheels: Path, wine: Wine) -> Place:
    """Make tiny packages of each precision and a bundle, in a folder with an awkward name."""
    folder = work / "ä ü 日本"
    for old in (folder, work / "packages"):
        shutil.rmtree(old, ignore_errors=True)
    made = {}
    for name, (precision, target) in PACKAGES.items():
        source = work / "packages" / name
        source.mkdir(parents=True)
        made[name] = make_package(source, precision, target)
    bundle = folder / "bundle"
    test = find_self_test(made["int4"])
    place = Windows(wheels, self_test=test, compiler=shutil.which(COMPILER))
    make_bundle(ModelPackage.open(made["int4"]), bundle, place)
    packages = {}
    for name, package in made.items():
        packages[name] = Path(shutil.copytree(package, folder / name.replace(", ", " ")))
        write_sums(packages[name])
    add_probe(bundle)
    other = compile_windows(
        ROOT / "tests/support/other_ort.c",
        work / "other" / "onnxruntime.dll",
        "-shared",
    )
    return Place(wine, bundle, packages, other)


def add_probe(bundle: Path) -> None:
    """Build probe.exe beside the bundle's llama_onnx.dll."""
    binaries = bundle / "bin"
    library = str(binaries / "llama_onnx.dll")
    flags = ("-municode", library, f"-I{bundle / 'native'}")
    compile_windows(ROOT / "benchmarks/trials/windows/probe.c", binaries / "probe.exe", *flags)


def find_self_test(package: Path, length: int = 16) -> SelfTest:
    """Make a self-test of the prompt in `PROMPTS` whose next tokens have the widest lead."""
    tried = [(smallest_lead(package, prompt, length), prompt) for prompt in PROMPTS]
    prompt = max(tried)[1]
    return SelfTest(tuple(prompt), tuple(greedy(package, prompt, length)))


def smallest_lead(package: Path, prompt: Sequence[int], count: int) -> float:
    """Return the smallest difference of the two largest logits over a greedy continuation, on the
    CPU for every target."""
    config = og.Config(str(package))
    config.clear_providers()
    model = og.Model(config)
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=len(prompt) + count, do_sample=False)
    generator = og.Generator(model, params)
    generator.append_tokens(list(prompt))
    leads = []
    while not generator.is_done():
        first, second = np.sort(generator.get_logits().ravel())[-2:][::-1]
        leads.append(float(first - second))
        generator.generate_next_token()
    return min(leads)


# ---- tokens --------------------------------------------------------------------------------------


def token_cases(place: Place) -> Iterator[Case]:
    """Each precision with each set of DLLs, against genai on this machine."""
    directml = place.bundle.parent / "directml as cpu"
    shutil.copytree(place.libraries / "directml", directml / "cpu")
    sets = {"cpu": place.libraries, "directml, on the CPU": directml}
    for name, libraries in sets.items():
        for precision, package in place.packages.items():
            equal, total = 0, 0
            for prompt in PROMPTS:
                expected = greedy(package, prompt, NEW_TOKENS)
                facts = place.probe(package, prompt, count=NEW_TOKENS, libraries=libraries)
                given = [int(number) for number in facts["ids"].split()]
                total += len(expected)
                equal += sum(a == b for a, b in zip(expected, given, strict=False))
            said = f"{equal} of {total}"
            yield Case(f"{precision} | {name}", equal == total > 0, said)


# ---- failures ------------------------------------------------------------------------------------


def refused(what: str, facts: dict[str, str], message: str) -> Case:
    """Check that a package does not open, with an error that contains `message`."""
    holds = facts["opened"] == "1" and message in facts["error"]
    return Case(what, holds, facts["error"])


def answered(what: str, facts: dict[str, str], place: Place, said: str = "") -> Case:
    """Check that a call still generates the tokens of Linux."""
    expected = " ".join(map(str, greedy(place.packages["int4"], PROMPTS[0], 8)))
    holds = facts.get("ids") == expected
    return Case(what, holds, facts["error"] or said or "the same tokens")


def library_cases(place: Place) -> Iterator[Case]:
    """DLLs that are missing, wrong, or of another program."""
    package, work = place.packages["int4"], place.bundle.parent
    other = place.other_ort
    for name in ("onnxruntime.dll", "onnxruntime-genai.dll"):
        libraries = copy_libraries(place, work / f"without {name}")
        (libraries / "cpu" / name).unlink()
        facts = place.probe(package, libraries=libraries)
        yield refused(f"{name} is missing", facts, f"{name} is missing")
    libraries = copy_libraries(place, work / "wrong version")
    shutil.copyfile(other, libraries / "cpu" / "onnxruntime.dll")
    facts = place.probe(package, libraries=libraries)
    yield refused("another onnxruntime.dll in our folder", facts, "is ONNX Runtime 1.2.3")
    facts = place.probe(package, path=other.parent)
    yield answered("another onnxruntime.dll first on PATH", facts, place)
    facts = place.probe(package, cwd=other.parent)
    yield answered("another onnxruntime.dll in the current folder", facts, place)
    beside = Path(shutil.copy(other, place.libraries / "onnxruntime.dll"))
    yield answered("another onnxruntime.dll beside the program", place.probe(package), place)
    beside.unlink()
    facts = place.probe(package, preload=other)
    yield refused("another onnxruntime.dll loaded before", facts, "already loaded another")


def copy_libraries(place: Place, folder: Path) -> Path:
    shutil.copytree(place.libraries / "cpu", folder / "cpu")
    return folder


def package_cases(place: Place) -> Iterator[Case]:
    """Packages that are missing or damaged."""
    folder = place.bundle.parent
    facts = place.probe(folder / "no such folder")
    yield refused("a package that does not exist", facts, "is not a package: it does not exist")
    damaged = Path(shutil.copytree(place.packages["int4"], folder / "damaged"))
    data = bytearray((damaged / "model.onnx.data").read_bytes())
    data[len(data) // 2] ^= 1
    (damaged / "model.onnx.data").write_bytes(data)
    yield refused(
        "one bit of the weights flipped", place.probe(damaged), "is damaged: the hash of model.onnx"
    )
    program = windows_path(place.libraries / "llama_onnx_chat.exe")
    done = place.wine.call([program, windows_path(damaged), "the quick"])
    said = done.stderr.decode().strip()
    holds = done.returncode == 1 and "is damaged: the hash of model.onnx.data" in said
    yield Case("the same, opened by llama_onnx_chat.exe", holds, said)
    (damaged / "model.onnx.data").unlink()
    yield refused("the weights missing", place.probe(damaged), "model.onnx.data is missing")


def use_cases(place: Place) -> Iterator[Case]:
    """What an app does with the library."""
    package = place.packages["int4"]
    facts = place.probe(package, "the quick brown", count=-5)
    holds = facts["status"] == "2" and facts["pieces"] == "5" and not facts["error"]
    yield Case("cancelled after 5 pieces, from another thread", holds, "ended there, as cancelled")
    facts = place.probe(place.bundle / "package", provider="auto")
    reason = facts["reason"]
    holds = facts["provider"] == "CPU" and "no graphics device with Direct3D 12" in reason
    yield Case("provider `auto` without a graphics device", holds, f"CPU: {reason}")
    long = place.bundle.parent.joinpath(*["x" * 100] * 3)
    libraries = copy_libraries(place, long)
    facts = place.probe(package, libraries=libraries)
    length = len(windows_path(libraries / "cpu"))
    yield answered("DLLs in a path of more than 260 characters", facts, place)
    assert length > 260
    yield long_package(place, Path(shutil.copytree(package, long / "package")))
    yield double_click(place)
    work = place.bundle.parent.parent
    yield five_turns(place.wine, place.bundle, package, work / "talk", 8, timed=False)
    yield cmake_case(place)


def long_package(place: Place, package: Path) -> Case:
    """ONNX Runtime calls GetFinalPathNameByHandleW, which in Wine 8 fails above 260 characters."""
    facts = place.probe(package)
    what = "a package in a path of more than 260 characters"
    if "Failed to get the weakly canonical path" in facts["error"]:
        said = "opened by us, refused by Wine 8 (its GetFinalPathNameByHandleW); not verified"
        return Case(what, True, said)
    return answered(what, facts, place)


def double_click(place: Place) -> Case:
    """Run the sample without arguments in another folder: it finds the package beside its own."""
    program = windows_path(place.libraries / "llama_onnx_chat.exe")
    done = place.wine.call([program], cwd=Path("/"), given="ä 日本\n\n".encode())
    said = done.stderr.decode().splitlines()[0]
    holds = done.returncode == 0 and said.startswith("Runs on ") and len(done.stdout) > 20
    return Case("llama_onnx_chat.exe without arguments", holds, said)


def cmake_case(place: Place) -> Case:
    """Build the sample with its CMakeLists.txt and MinGW."""
    what = "CMake builds llama_onnx.dll and the C sample with MinGW"
    if shutil.which("cmake") is None:
        return Case(what, True, "not tried: CMake is not installed")
    build = place.bundle.parent / "build"
    source = place.bundle / "native" / "samples" / "c"
    cross = ("-DCMAKE_SYSTEM_NAME=Windows", f"-DCMAKE_C_COMPILER={COMPILER}")
    prefix = f"-DCMAKE_INSTALL_PREFIX={build / 'installed'}"
    for command in (
        ["cmake", "-S", str(source), "-B", str(build), *cross, prefix, "-DCMAKE_C_FLAGS=-Werror"],
        ["cmake", "--build", str(build), "--target", "install"],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            return Case(what, False, done.stderr)
    made = {path.name for path in (build / "installed" / "bin").iterdir()}
    return Case(what, made == {"llama_onnx.dll", "llama_onnx_chat.exe"}, "built and installed")


# ---- the tables ----------------------------------------------------------------------------------


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Return the size and time of each file, which must not change in a read-only folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


def read_only(folder: Path) -> None:
    for path in (folder, *folder.rglob("*")):
        path.chmod(path.stat().st_mode & ~0o222)


def run_tiny(work: Path, wheels: Path, wine: Wine) -> list[Table]:
    """Run all cases on tiny packages."""
    place = make_place(work, wheels, wine)
    cases = [*library_cases(place), *package_cases(place), *use_cases(place)]
    # Last, because the other cases put wrong DLLs beside the program.
    watched = (place.bundle, *place.packages.values())
    for folder in watched:
        read_only(folder)
    before = [snapshot(folder) for folder in watched]
    tokens = list(token_cases(place))
    same = before == [snapshot(folder) for folder in watched]
    cases.append(Case("bundle and packages read-only", same, "nothing in them was written"))
    for folder in watched:
        for path in (folder, *folder.rglob("*")):
            path.chmod(path.stat().st_mode | 0o200)
    return [("precision | DLLs | equal tokens", tokens), ("case | what happened", cases)]


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--wheels", type=Path, help="Windows wheels; default: downloaded")
    parser.add_argument("--csharp", action="store_true", help="C# and NuGet, with npm's .NET SDK")
    parser.add_argument("--python", action="store_true", help="our own commands in Windows' Python")
    parser.add_argument("--real", action="store_true", help="also SmolLM2-135M")
    arguments = parser.parse_args()
    check_tools()
    work: Path = arguments.work.absolute()
    (work / "other").mkdir(parents=True, exist_ok=True)
    wheels = arguments.wheels
    if wheels is None:
        wheels = work / "wheels"
        download_wheels(wheels)
    wine = Wine.make(work)
    private = [windows_path(work), "\\\\?\\" + windows_path(work)]
    smollm2: Path | None = None
    try:
        holds = show(DOCS, "tiny", run_tiny(work, wheels, wine), private)
        # Imported only on request: these need more software than the rest.
        if arguments.python:
            from benchmarks.trials.windows import windows_python

            holds &= show(DOCS, "python", windows_python.run(work, wheels, wine), private)
        if arguments.real:
            from benchmarks.trials.windows import real

            holds &= show(DOCS, "real", real.run(work, wheels, wine), private)
            smollm2 = work / "SmolLM2" / "package"
        if arguments.csharp:
            from benchmarks.trials.windows import csharp

            samples, packaged = csharp.run(work, wheels, wine, smollm2)
            holds &= show(DOCS, "csharp", [samples], private)
            holds &= show(DOCS.with_name("dotnet.md"), "nuget", [packaged], private)
    finally:
        wine.close()
    if not holds:
        sys.exit("a case failed.")


if __name__ == "__main__":
    main()
