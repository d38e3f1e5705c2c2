"""`nox -s web`: the bundle for transformers.js, in Node and in Chromium, against our own engine.

python -m benchmarks.trials.web.run WORK_FOLDER

WORK_FOLDER/node_modules is npm's `@huggingface/transformers`. Prints its tables and writes them to
docs/web.md; exits with status 1 if a case fails.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx

from benchmarks.trials.web.browser import Visit, final_text, visit
from benchmarks.trials.windows.real import export_smollm2
from llama_onnx.runtime.bundles.make import Settings, make_bundle
from llama_onnx.runtime.bundles.web import Web
from llama_onnx.runtime.llama.generation import TextEvent
from llama_onnx.runtime.llama.model import Llama
from llama_onnx.targets.package import ModelPackage
from tests.support.packages import renew_hashes
from tests.support.tables import Case, show

DOCS = Path(__file__).parents[3] / "docs" / "web.md"
GENERATE = Path(__file__).with_name("generate.js")
QUESTIONS = (
    "Name the capital of France.",
    "Write two sentences about the sea.",
    "Grüße! Was ist 2 + 2? 日本",
)
NEW_TOKENS = 24
PART = 30_000_000
"""Bytes in a data file, so that SmolLM2 needs several."""

LIMIT_S = 600


def make(package: Path, out: Path, modules: Path, limit: int) -> Path:
    """Make the bundle `out` and install transformers.js in it."""
    shutil.rmtree(out, ignore_errors=True)
    made = make_bundle(ModelPackage.open(package), out, Web(limit), Settings(licensed=True)).path
    (made / "node_modules").symlink_to(modules, target_is_directory=True)
    return made


def in_fp32(package: Path, out: Path) -> Path:
    """Copy `package` with activations in fp32 where its kernels would round them to int8."""
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(package, out)
    model = onnx.load(out / "model.onnx", load_external_data=False)
    levels = [a for node in model.graph.node for a in node.attribute if a.name == "accuracy_level"]
    if not levels:
        sys.exit("no node has an accuracy level any more: there is nothing to compare.")
    for level in levels:
        level.i = 1
    onnx.save(model, out / "model.onnx")
    renew_hashes(out)
    return out


def ours(package: Path) -> list[dict[str, Any]]:
    """Return prompt, greedy tokens and text for each question, by our own engine."""
    found = []
    with Llama.load(package) as model:
        for question in QUESTIONS:
            messages = [{"role": "user", "content": question}]
            events = list(model.chat(messages, max_new_tokens=NEW_TOKENS).events())
            found.append(
                {
                    "prompt": model.encode_chat(messages).tolist(),
                    "answer": [event.token for event in events if isinstance(event, TextEvent)],
                    "text": "".join(event.text for event in events),
                }
            )
    return found


def in_node(bundle: Path, *arguments: str) -> str:
    """Run Node in `bundle` and return what it printed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["node", *arguments],
        cwd=bundle,
        env=environment,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    if done.returncode:
        sys.exit(f"node {' '.join(arguments)} failed: {done.stderr}")
    return done.stdout


def compare(where: str, found: Sequence[Any], expected: Sequence[Any], whose: str = "ours") -> Case:
    """Compare the tokens of prompts and answers, and texts, with ours."""
    same = equal(found, expected)
    total = sum(len(answer["answer"]) for answer in expected)
    said = f"{sum(same)} of {len(same)} prompts and answers ({total} new tokens) equal to {whose}"
    if not all(same):
        said += f"; first other answer: {found[same.index(False)]}"
    return Case(where, all(same), said)


def equal(found: Sequence[Any], expected: Sequence[Any]) -> list[bool]:
    """Return for each question whether everything is the same."""
    return [a == b for a, b in zip(found, expected, strict=True)]


def node_cases(whole: Path, parts: Path, expected: list[dict[str, Any]]) -> Iterator[Case]:
    """The sample for Node, and tokens with one data file and with several."""
    printed = in_node(whole, "node.mjs", QUESTIONS[0]).strip()
    yield Case("`node node.mjs`", printed == expected[0]["text"], f"printed “{printed}”")
    for what, bundle in (("one data file", whole), ("several data files", parts)):
        script = bundle / "generate.mjs"
        shutil.copyfile(GENERATE, script)
        asked = json.dumps({"path": f"{bundle}/", "questions": QUESTIONS, "count": NEW_TOKENS})
        printed = in_node(bundle, script.name, asked, "cpu")
        names = sorted(path.name for path in (bundle / "model" / "onnx").glob("*_data*"))
        where = f"onnxruntime-node, {what} ({len(names)})"
        yield compare(where, json.loads(printed), expected)


def browser_cases(
    bundle: Path, expected: list[dict[str, Any]], exact: list[dict[str, Any]], pictures: Path
) -> Iterator[Case]:
    """The page in Chromium: on WASM, and what it says where WebGPU is asked for.

    WASM has no kernel for activations in int8, so its answers are those of `exact`, ours of the
    same weights with activations in fp32.
    """
    seen = visit(bundle, QUESTIONS, NEW_TOKENS, pictures / "web.png")
    said = f"printed “{seen.answer}” in {seen.updates} steps; ready after {seen.load_s:.1f} s"
    said += f", answer after {seen.answer_s:.1f} s"
    streamed = seen.updates > 2
    yield Case("the page, on WASM", seen.answer == expected[0]["text"] and streamed, said)
    outside = ", ".join(seen.outside) or "none"
    yield Case("requests to other servers", not seen.outside, outside)
    text = short_page(bundle)
    said = f"printed “{text}”"
    yield Case("docs/web.md's page of ten lines", text == expected[0]["text"], said)
    whose = "ours with activations in fp32"
    said = f"{sum(equal(seen.generated, expected))} of {len(expected)} equal to ours as exported"
    case = compare("onnxruntime-web, WASM", seen.generated, exact, whose)
    yield replace(case, said=f"{case.said}; {said}")
    yield webgpu_case(on_webgpu(bundle, pictures), expected[0]["text"])


def short_page(bundle: Path) -> str:
    """Return what the page of docs/web.md shows."""
    _, _, rest = DOCS.read_text("utf-8").partition("```html\n")
    page = bundle / "short.html"
    page.write_text(rest.partition("```")[0], "utf-8")
    return final_text(bundle, page.name)


def on_webgpu(bundle: Path, pictures: Path) -> Visit:
    """Visit a copy of the page that asks for WebGPU."""
    copy = bundle.with_name(bundle.name + "-webgpu")
    shutil.rmtree(copy, ignore_errors=True)
    copy.mkdir()
    for path in bundle.iterdir():
        (copy / path.name).symlink_to(path)
    for name, old, new in (
        ("chat.js", 'device: "wasm"', 'device: "webgpu"'),
        ("index.html", "ort.wasm.min.mjs", "ort.webgpu.min.mjs"),
    ):
        text = (bundle / name).read_text("utf-8")
        if old not in text:
            sys.exit(f"{name} no longer contains {old}.")
        (copy / name).unlink()
        (copy / name).write_text(text.replace(old, new), "utf-8")
    return visit(copy, (), 0, pictures / "webgpu.png", gpu=True)


def webgpu_case(seen: Visit, expected: str) -> Case:
    """Show what WebGPU did; only a wrong answer fails: nothing says that it runs there."""
    if seen.answer:
        return Case("the page, on WebGPU (SwiftShader)", seen.answer == expected, seen.answer)
    refused = seen.status.startswith("The model cannot be loaded") or "No answer" in seen.status
    return Case(
        "the page, on WebGPU (SwiftShader)", refused, f"no answer: “…{seen.status.strip()[-110:]}”"
    )


def main() -> None:
    """Make the bundles and run the cases."""
    work = Path(sys.argv[1]).resolve()
    modules, package = work / "node_modules", work / "smollm2-int4"
    if not package.exists():
        export_smollm2(package, "cpu")
    expected, exact = ours(package), ours(in_fp32(package, work / "smollm2-int4-fp32"))
    size = package.joinpath("model.onnx.data").stat().st_size
    whole = make(package, work / "whole", modules, max(size, PART))
    parts = make(package, work / "parts ä", modules, PART)
    tables = [
        ("Node | what happened", list(node_cases(whole, parts, expected))),
        ("Chromium | what happened", list(browser_cases(parts, expected, exact, work))),
    ]
    if not show(DOCS, "web", tables, [str(work)]):
        sys.exit("a case failed.")


if __name__ == "__main__":
    main()
