"""DirectML's own kernels, on Vulkan in software: what our packages compute on them.

python -m benchmarks.trials.directml.run WORK_FOLDER [--tiny] [--remove]

Makes a root with Wine (once; --remove removes it), a Windows Python with onnxruntime-directml and
onnxruntime-genai-winml, and packages for directml. Prints its tables and writes them to
docs/targets.md; exits with status 1 if a case fails. Which provider ran is asked in each case.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from benchmarks.trials.directml import operators
from benchmarks.trials.directml.root import Root
from benchmarks.trials.windows.real import export_smollm2
from benchmarks.trials.windows.run import add_probe, find_self_test
from benchmarks.trials.windows.windows_python import COMMON, make_certified, make_python
from benchmarks.trials.windows.wine import COMPILER
from llama_onnx.runtime.bundles.make import make_bundle
from llama_onnx.runtime.bundles.selftest import SelfTest
from llama_onnx.runtime.bundles.windows import Windows
from llama_onnx.runtime.bundles.windows_libraries import download_wheels
from llama_onnx.targets.package import ModelPackage
from tests.support.packages import greedy, make_package
from tests.support.tables import Case, Table, show

HERE = Path(__file__).parent
DOCS = HERE.parents[2] / "docs" / "targets.md"
WHEELS = ("onnxruntime-directml==1.24.4", "onnxruntime-genai-winml==0.18.0", *COMMON)
PRECISIONS = ("fp16", "int8", "int4")
DIRECTML, DEVICE = "DmlExecutionProvider", "DirectML"
NEW_TOKENS = 32
PROMPT = "the quick brown"
TEXTS = ("The capital of France is", "Name three colors.", "One, two, three, four, five,")
TURNS = [[1, 40, 41, 42, 43, 44, 45], [1, 90, 91, 92, 93, 94], [140, 141, 142, 143, 144]]


@dataclass(frozen=True)
class Place:
    """The root, the Windows Python in it, and the certified packages by name."""

    root: Root
    python: Path
    packages: Mapping[str, Path]

    def run(self, *arguments: str) -> str:
        """Run the Windows Python; return what it printed, or its errors if it failed."""
        home = {"PYTHONHOME": self.root.windows_path(self.python.parent), "PYTHONUTF8": "1"}
        program = self.root.windows_path(self.python)
        done = self.root.call([program, *arguments], {**home, "PYTHONPATH": "", "COLUMNS": "100"})
        printed = done.stdout if done.returncode == 0 else done.stdout + done.stderr
        return printed.decode(errors="replace").replace("\r", "")

    def ours(self, *arguments: str) -> Any:
        """Run one of our commands with --json; return its answer, or what it printed instead."""
        said = self.run("-m", "llama_onnx.exporter.cli", *arguments, "--json")
        lines = said.strip().splitlines() or ["no output"]
        for text in (said, lines[-1]):  # one value, or events of which the last has the answer
            try:
                return json.loads(text)
            except ValueError:
                continue
        return {"error": lines[-1]}

    def genai(self, name: str, provider: str, capture: str | None = "0", **job: Any) -> Loop:
        """Run onnxruntime-genai's own loop, loop.py, on the package `name`."""
        package = self.root.windows_path(self.packages[name])
        job = {"package": package, "provider": provider, "capture": capture, **job}
        file, out = self.root.work / "job.json", self.root.work / "out.npz"
        file.write_text(json.dumps(job))
        out.unlink(missing_ok=True)
        said = self.run("loop.py", "job.json", "out.npz")
        lines = [line for line in said.splitlines() if line.startswith('{"device"')]
        if not lines:
            return Loop("", [], np.zeros((0, 2)), _reason(said))
        answer = json.loads(lines[-1])
        return Loop(answer["device"], [*chain(*answer["answers"])], np.load(out)["logits"])


@dataclass(frozen=True)
class Loop:
    """What genai's loop gave: the device, the ids, and the logits [n, V] before each of them."""

    device: str
    ids: list[int]
    logits: np.ndarray
    error: str = ""


def _reason(said: str) -> str:
    lines = [line for line in said.splitlines() if "Error" in line and "cpuinfo" not in line]
    return lines[-1][:200] if lines else "no output"


def make_place(root: Root, *, tiny: bool) -> Place:
    """Make the Windows Python and the packages."""
    python = make_python(root.work / "python", root.work / "wheels", WHEELS)
    shutil.copy(HERE / "loop.py", root.work)
    shutil.copy(HERE / "operators.py", root.work)
    packages = {
        name: make_certified(root.work / "certified" / name, name, "directml")
        for name in PRECISIONS
    }
    if not tiny:
        packages["SmolLM2 int4"] = export_smollm2(root.work / "smollm2", "directml")
    return Place(root, python, packages)


# ---- our commands ----------------------------------------------------------------------------


def command_cases(place: Place) -> Iterator[Case]:
    """Each command that takes a provider, on the tiny packages."""
    found = {entry["name"]: entry for entry in place.ours("doctor").get("findings", ())}
    probe = found.get("provider directml", {"status": "missing", "found": "no such finding"})
    yield Case("`doctor`", probe["status"] == "ok", probe["found"])
    for name in PRECISIONS:
        package = place.root.windows_path(place.packages[name])
        options = ("--provider", "directml")
        yield _inspected(name, place.ours("inspect", package, *options))
        yield _verified(name, place.ours("verify", package, *options))
        counted = ("--max-new-tokens", str(NEW_TOKENS))
        yield _generated(name, place, package, counted)


def _inspected(name: str, report: Mapping[str, Any]) -> Case:
    what = f"`inspect --provider directml`, {name}"
    if "placement" not in report:
        return Case(what, False, report.get("error", str(report)[:200]))
    nodes = {p["provider"]: p["nodes"] for p in report["placement"]["providers"]}
    small = [entry["op"] for entry in report["placement"].get("elsewhere", ())]
    elsewhere = sum(nodes.values()) - nodes.get(DIRECTML, 0)
    said = f"{nodes.get(DIRECTML, 0)} of {sum(nodes.values())} nodes on DirectML"
    said += f"; the others work out one length ({', '.join(sorted(set(small)))})" if small else ""
    return Case(what, nodes.get(DIRECTML, 0) > 0 and elsewhere <= 2, said)


def _verified(name: str, report: Mapping[str, Any]) -> Case:
    what = f"`verify --provider directml`, {name}"
    if "passed" not in report or not report["placement"]:
        return Case(what, False, report.get("error", str(report)[:200]))
    share = next(p for p in report["placement"]["providers"] if p["provider"] == DIRECTML)
    worst = max(s["shipped"]["max_abs"] for s in report["situations"])
    alike = sum(entry is None for entry in report["divergences"])
    said = (
        f"passed: {share['fraction']['macs_per_token']:.0%} of the work on DirectML; logits "
        f"differ from PyTorch's by {worst:.2g} at most; {alike} of {len(report['divergences'])} "
        "continuations match"
    )
    return Case(what, report["passed"] is True and share["fraction"]["macs_per_token"] == 1, said)


def _generated(name: str, place: Place, package: str, options: Sequence[str]) -> Case:
    what = f"`generate --provider directml`, {name}"
    texts, devices = [], []
    for provider in ("directml", "cpu"):
        answer = place.ours("generate", package, PROMPT, "--provider", provider, *options)
        if "text" not in answer:
            return Case(what, False, answer.get("error", str(answer)[:200]))
        texts.append(answer["text"])
        devices.append(answer["provider"]["device"])
    same = "the CPU's text" if texts[0] == texts[1] else "another text than the CPU's (next table)"
    return Case(what, devices[0] == DEVICE and bool(texts[0]), f"ran on {devices[0]}; {same}")


# ---- tokens ----------------------------------------------------------------------------------


def token_cases(place: Place) -> Iterator[Case]:
    """Greedy tokens in genai's loop with graph capture off and on, against the same DLLs' CPU."""
    for name in place.packages:
        prompts = turns(place, name)[: 2 if name in PRECISIONS else 1]
        job: dict[str, Any] = {"turns": prompts, "count": NEW_TOKENS, "how": "new"}
        expected = place.genai(name, "cpu", **job)
        for capture, said in (("0", "off"), ("1", "on")):
            found = place.genai(name, "dml", capture, **job)
            yield compare(f"{name} | {said}", found, expected, NEW_TOKENS)


def turns(place: Place, name: str) -> list[list[int]]:
    """Return three prompts, or turns of a conversation, as token ids."""
    if name in PRECISIONS:
        return TURNS
    tokenizer = Tokenizer.from_file(str(place.packages[name] / "tokenizer.json"))
    return [tokenizer.encode(text).ids for text in TEXTS]


def compare(what: str, found: Loop, expected: Loop, count: int) -> Case:
    """Compare tokens in answers of `count`. Where they first part, the CPU's two tokens must be
    closer than twice the largest difference seen between the logits."""
    if found.device != DEVICE:
        return Case(what, False, found.error or f"ran on {found.device}")
    equal, ties, worst = 0, [], 0.0
    for start in range(0, len(expected.ids), count):
        for step in range(start, start + count):
            mine, its = found.logits[step], expected.logits[step]
            worst = max(worst, float(np.abs(mine - its).max()))
            if found.ids[step] != expected.ids[step]:
                ties.append((step - start, float(its[expected.ids[step]] - its[found.ids[step]])))
                break
            equal += 1
    spread = float(expected.logits.std())
    said = f"{equal} of {len(expected.ids)}; logits differ by {worst:.2g} at most, at a standard "
    said += f"deviation of {spread:.2g}"
    for place, gap in ties:
        said += f"; a near-tie at token {place + 1}: the CPU's two are {gap:.2g} apart"
    return Case(what, all(gap <= 2 * worst for _, gap in ties) and worst < spread / 2, said)


def conversation_cases(place: Place) -> Iterator[Case]:
    """Three turns: each answered after the whole conversation, as our commands do; and appended."""
    count = 8
    for name in place.packages:
        spoken = turns(place, name)
        expected = place.genai(name, "cpu", turns=spoken, count=count, how="whole")
        history, prompts = list[int](), []
        for number, turn in enumerate(spoken):
            history += turn
            prompts.append(list(history))
            history += expected.ids[count * number : count * (number + 1)]
        found = place.genai(name, "dml", turns=prompts, count=count, how="new")
        how = "the whole conversation for each answer, as our commands do"
        yield compare(f"{name} | {how}", found, expected, count)
    found = place.genai("int4", "dml", turns=TURNS, count=count, how="append")
    refused = "Continuous decoding is not supported" in found.error
    said = f"onnxruntime-genai refuses it: {found.error}" if refused else "it did not refuse"
    yield Case("int4 | the next turn appended to the cache", refused, said)


# ---- the C library ---------------------------------------------------------------------------


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
        "a device that computes another token": (spoil_test(bundle / "package"), {}),
        "a device that is lost": (bundle / "package", {"LOSE_DEVICE_AFTER": "12"}),
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


# ---- kernels ---------------------------------------------------------------------------------


def operator_cases(place: Place) -> Iterator[Case]:
    """Single operators that ways to quantize need, against the CPU."""
    folder = place.root.work / "operators"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    names = operators.make(folder)
    lines = place.run("operators.py", "operators").splitlines()
    answers = [json.loads(line) for line in lines if line.startswith("{")]
    for name, answer in zip(names, answers, strict=True):
        if "error" in answer:
            yield Case(name, False, answer["error"])
            continue
        elsewhere = sorted(op for op, where in answer["where"].items() if where != DIRECTML)
        right = answer["difference"] <= answer["largest"] / 256  # fp16 rounds to 1 / 2048
        said = "right" if right else "**wrong**"
        said += f": off by {answer['difference']:.2g}, the largest value is {answer['largest']:.2g}"
        if elsewhere:
            said = f"no kernel: {', '.join(elsewhere)} ran on the CPU"
        refused = name in WRONG
        yield Case(name, (right and not elsewhere) != refused, said)


WRONG = {
    "int8, asymmetric, odd number of blocks",
    "int4, last block not full",
    "int4, zero points in fp16",
    "embedding, GatherBlockQuantized of 4 bits",
    "SkipSimplifiedLayerNormalization in fp16, with a value of 20000",
}
"""What DirectML is known not to compute: the exporter refuses or avoids it."""


def processor() -> str:
    """Return the processor's name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "an unknown processor"


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--tiny", action="store_true", help="without SmolLM2-135M")
    parser.add_argument("--remove", action="store_true", help="remove the root and end")
    arguments = parser.parse_args()
    work: Path = arguments.work.absolute()
    if arguments.remove:
        shutil.rmtree(work, ignore_errors=True)
        return
    root = Root.make(work / "root", work / "work")
    wheels = download_wheels(root.work / "wheels")
    place = make_place(root, tiny=arguments.tiny)
    tables: list[tuple[str, Table]] = [
        ("commands", ("llama-onnx on DirectML | what happened", list(command_cases(place)))),
        ("tokens", ("package | capture | tokens equal to the CPU's", list(token_cases(place)))),
        (
            "conversation",
            ("three turns | how | tokens equal to the CPU's", list(conversation_cases(place))),
        ),
        ("library", ("llama_onnx.dll | what happened", list(library_cases(place, wheels)))),
        ("operators", ("single operators | DirectML", list(operator_cases(place)))),
    ]
    private = [root.windows_path(root.work).rstrip("\\")]
    holds = show(DOCS, "directml", [table for _, table in tables], private)
    print(f"on {processor()}, {subprocess.getoutput('nproc')} processors")
    if not holds:
        sys.exit("a case failed.")


if __name__ == "__main__":
    main()
