"""The C library with Windows ML's DLLs: DirectML by name, and after a self-test."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.trials.directml.place import DEVICE, LOST, WRONG, Place
from benchmarks.trials.windows.run import add_probe, find_self_test
from benchmarks.trials.windows.wine import COMPILER
from llama_onnx.runtime.bundles.make import make_bundle
from llama_onnx.runtime.bundles.selftest import SelfTest
from llama_onnx.runtime.bundles.windows import Windows
from llama_onnx.targets.package import ModelPackage
from tests.support.packages import greedy, make_package
from tests.support.tables import Case


def library_cases(place: Place, wheels: Path) -> Iterator[Case]:
    """llama_onnx.dll with Windows ML's libraries: DirectML by name, and after a self-test."""
    package, bundle = place.packages["int4"], place.root.work / "bundle"
    shutil.rmtree(bundle, ignore_errors=True)
    test = find_self_test(package)
    made = Windows(wheels, self_test=test, compiler=shutil.which(COMPILER))
    make_bundle(ModelPackage.open(package), bundle, made)
    add_probe(bundle)
    expected = " ".join(map(str, test.expected))
    for provider in ("directml", "auto"):
        facts = probe(place, bundle, bundle / "package", provider, test.prompt, len(test.expected))
        holds = facts.get("provider") == DEVICE and facts.get("ids") == expected
        said = f"{facts.get('provider')}: {facts.get('reason') or facts.get('error')}"
        yield Case(f"provider `{provider}`", holds, f"{said} The CPU's tokens.")
    faults = {
        "a device that computes wrongly": (bundle / "package", WRONG),
        "a self-test that expects another token": (spoil_test(bundle / "package"), {}),
        "a device that is lost": (bundle / "package", LOST),
        "a package that DirectML cannot run": (make_for_cpu(place), {}),
    }
    for what, (folder, fault) in faults.items():
        prompt = SelfTest.read(folder / "selftest.txt").prompt
        facts = probe(place, bundle, folder, "auto", prompt, len(test.expected), fault)
        right = facts.get("ids") == " ".join(map(str, greedy(folder, prompt, len(test.expected))))
        reason = facts.get("reason") or facts.get("error") or "it ended"
        holds = facts.get("provider") == "CPU" and right and "DirectML is not used" in reason
        said = f"{facts.get('provider')}: {reason[:180]}{'…' if len(reason) > 180 else ''}"
        yield Case(f"provider `auto`, {what}", holds, said + " The CPU's tokens." * right)


def spoil_test(package: Path) -> Path:
    """Copy a package, with another token expected by its self-test."""
    folder = package.with_name("spoiled")
    shutil.copytree(package, folder)
    test = SelfTest.read(folder / "selftest.txt")
    other = replace(test, expected=(*test.expected[:3], test.expected[3] ^ 1, *test.expected[4:]))
    (folder / "selftest.txt").write_text(str(other), "ascii")
    return folder


def make_for_cpu(place: Place) -> Path:
    """Make a package for the CPU, whose packed matrix DirectML's attention cannot read."""
    folder = place.root.work / "for the cpu"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    package = make_package(folder, "int4", "cpu")
    (package / "selftest.txt").write_text(str(find_self_test(package)), "ascii")
    return package


def probe(
    place: Place,
    bundle: Path,
    package: Path,
    provider: str,
    prompt: Sequence[int],
    count: int,
    fault: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Run benchmarks/trials/windows/probe.c and return its facts by name."""
    path, libraries = place.root.windows_path, bundle / "bin"
    ids = ",".join(map(str, prompt))
    command = [path(libraries / "probe.exe"), path(package), path(libraries), provider, "0"]
    done = place.root.call([*command, str(count), ids], fault)
    lines = done.stdout.decode(errors="replace").replace("\r", "").splitlines()
    return dict(line.partition(" ")[::2] for line in lines)
