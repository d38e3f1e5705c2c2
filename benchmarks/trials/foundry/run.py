"""`nox -s foundry`: the bundle for Foundry Local, with foundry-local-sdk.

python -m benchmarks.trials.foundry.run WORK_FOLDER PYTHON

PYTHON is the Python of an environment with foundry-local-sdk: it needs another onnxruntime than
ours. Prints its table and writes it to docs/foundry.md; exits with status 1 if a case fails.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.trials.windows.real import export_smollm2
from llama_onnx.runtime.bundles.foundry import Foundry
from llama_onnx.runtime.bundles.make import Settings, make_bundle
from llama_onnx.runtime.llama.model import Llama
from llama_onnx.targets.package import ModelPackage
from tests.support.packages import alter_package
from tests.support.tables import Case, show

DOCS = Path(__file__).parents[3] / "docs" / "foundry.md"
CLIENT = Path(__file__).with_name("client.py")
QUESTIONS = ("Name the capital of France.", "And of Italy?")
NEW_TOKENS = 48
LIMIT_S = 600

TOOLS = (
    "{% if tools %}<|im_start|>system\nTools: {{ tools | tojson }}. To call one, write "
    '<tool_call>{"name": ..., "arguments": ...}</tool_call>.<|im_end|>\n{% endif %}'
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""A template with tools, which SmolLM2 has not learned."""


def make(package: Path, out: Path) -> Path:
    """Make the bundle `out`."""
    shutil.rmtree(out, ignore_errors=True)
    return make_bundle(ModelPackage.open(package), out, Foundry(), Settings(licensed=True)).path


def call(python: str, *arguments: str) -> str:
    """Run a script under Foundry's Python and return what it printed."""
    done = subprocess.run(
        [python, *arguments], capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    if done.returncode:
        sys.exit(f"{arguments[0]} failed: {done.stdout}{done.stderr}")
    return done.stdout


def ours(package: Path) -> list[dict[str, Any]]:
    """Return text and prompt tokens of our own answers to `QUESTIONS`, in one conversation."""
    found, messages = [], []
    with Llama.load(package) as model:
        for question in QUESTIONS:
            messages.append({"role": "user", "content": question})
            answer = model.chat(messages, max_new_tokens=NEW_TOKENS)
            text = "".join(answer)
            messages.append({"role": "assistant", "content": text})
            found.append({"text": text, "prompt_tokens": answer.stats.prompt_tokens})
    return found


def cases(python: str, work: Path, package: Path) -> Iterator[Case]:
    """The script, two turns, streaming, the web service, tools."""
    expected = ours(package)
    bundle = make(package, work / "smollm2 ä")
    script, cache = str(bundle / "register.py"), work / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    for what in ("`python register.py`", "once more"):
        printed = call(python, script, QUESTIONS[0], "--cache", str(cache)).splitlines()
        yield Case(what, printed[-1] == expected[0]["text"], "; ".join(printed))
    call(python, script, "--remove", "--cache", str(cache))
    found = ask(python, bundle, work / "cache of the client")
    texts = [turn["text"] for turn in found["turns"]]
    same = texts[0] == expected[0]["text"]
    lengths = [turn["prompt_tokens"] for turn in found["turns"]]
    said = f"“{texts[0]}”, {lengths[0]} prompt tokens; ours {expected[0]['prompt_tokens']}"
    yield Case("chat", same and lengths[0] == expected[0]["prompt_tokens"], said)
    pieces = found["turns"][1]["pieces"]
    said = f"{pieces} pieces: “{texts[1]}”; ours “{expected[1]['text']}”"
    yield Case("turn 2, streamed", pieces > 2 and texts[1] == expected[1]["text"], said)
    yield Case("tools, with SmolLM2's template", "marker" in found["tool"], found["tool"])
    service = found["service"]
    yield Case("the OpenAI web service", service["status"] == 404, json.dumps(service))
    tools = alter_package(package, renewed(work / "with tools"), chat_template=TOOLS)
    found = ask(python, make(tools, work / "smollm2-tools"), work / "cache of the tools")
    yield Case("tools, with a template that has them", "marker" not in found["tool"], found["tool"])


def renewed(folder: Path) -> Path:
    """Remove what an earlier run left, and return `folder`."""
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def ask(python: str, bundle: Path, cache: Path) -> Any:
    """Run the client on a bundle and return its findings."""
    shutil.rmtree(cache, ignore_errors=True)
    settings = {"questions": QUESTIONS, "count": NEW_TOKENS, "cache": str(cache)}
    printed = call(python, str(CLIENT), str(bundle), json.dumps(settings))
    return json.loads(printed.splitlines()[-1])


def main() -> None:
    """Export, bundle, and run the cases."""
    work, python = Path(sys.argv[1]).resolve(), sys.argv[2]
    package = work / "smollm2-int4"
    if not package.exists():
        export_smollm2(package, "cpu")
    header = "foundry-local-sdk, SmolLM2-135M-Instruct int4 | what happened"
    if not show(DOCS, "foundry", [(header, list(cases(python, work, package)))], [str(work)]):
        sys.exit("a case failed.")


if __name__ == "__main__":
    main()
