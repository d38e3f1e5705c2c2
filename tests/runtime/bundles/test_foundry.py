"""Bundles for Foundry Local: metadata, prompt templates, the script, what is refused."""

from __future__ import annotations

import ast
import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from llama_onnx.runtime.bundles.foundry import Foundry, prompt_template
from llama_onnx.runtime.bundles.make import Settings, make_bundle
from llama_onnx.runtime.llama.model import Llama
from llama_onnx.targets.bundle import Bundle
from llama_onnx.targets.errors import PackageError
from llama_onnx.targets.package import MANIFEST, ModelPackage, write_manifest
from tests.support.packages import alter_package, renew_hashes

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_2 = (
    "{% if messages[0].role == 'system' %}"
    "{% set start, rest = '<<SYS>>' + messages[0].content + '<</SYS>>', messages[1:] %}"
    "{% else %}{% set start, rest = '', messages %}{% endif %}"
    "{% for m in rest %}{% if m.role == 'user' %}"
    "[INST] {{ (start if loop.first else '') + m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }} </s>"
    "{% else %}{{ raise_exception('no such role') }}{% endif %}{% endfor %}"
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + CHATML


def bundle(package: Path, out: Path) -> Path:
    return make_bundle(ModelPackage.open(package), out, Foundry(), Settings(licensed=True)).path


def test_the_bundle_opens_and_answers_as_the_package(package: Path, tmp_path: Path) -> None:
    made = bundle(package, tmp_path / "My model")
    opened = Bundle.open(made)
    assert opened.verify() == []
    about = json.loads((made / "package" / "inference_model.json").read_text("utf-8"))
    assert about["Name"] == "my-model-generic-cpu"
    answers = []
    for folder in (package, opened.package.path):
        with Llama.load(folder) as model:
            answers.append("".join(model.generate("the quick brown fox", max_new_tokens=4)))
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    ("template", "roles"),
    [
        (CHATML, {"system", "user", "assistant", "prompt"}),
        (LLAMA_2, {"user", "assistant", "prompt"}),
        (NO_SYSTEM, {"user", "assistant", "prompt"}),
    ],
)
def test_prompt_templates_make_what_transformers_renders(
    package: Path, tmp_path: Path, template: str, roles: set[str]
) -> None:
    copy = alter_package(package, tmp_path / "copy", chat_template=template)
    parts = prompt_template(copy)
    assert parts.keys() == roles
    tokenizer = AutoTokenizer.from_pretrained(package)
    tokenizer.chat_template = template

    def rendered(*roles: str, opening: bool = False) -> str:
        messages = [{"role": role, "content": f"<{role}>"} for role in roles]
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=opening
        )
        assert isinstance(text, str)
        return text

    def joined(*roles: str) -> str:
        return "".join(parts[role].replace("{Content}", f"<{role}>") for role in roles)

    assert rendered("user", opening=True) == parts["prompt"].replace("{Content}", "<user>")
    talk = ("user", "assistant", "user", "assistant")
    assert rendered(*talk) == joined(*talk)
    if "system" in roles:
        assert rendered("system", *talk) == joined("system", *talk)


@pytest.mark.parametrize("tools", [False, True])
def test_the_script_names_the_model_and_its_tool_marks(
    package: Path, tmp_path: Path, tools: bool
) -> None:
    template = CHATML + ("{# <tool_call> </tool_call> #}" if tools else "")
    copy = alter_package(package, tmp_path / "copy", chat_template=template)
    script = (bundle(copy, tmp_path / "out put") / "register.py").read_text("utf-8")
    values = {
        ast.unparse(node.targets[0]): node.value
        for node in ast.parse(script).body
        if isinstance(node, ast.Assign)
    }
    assert ast.literal_eval(values["MODEL"]) == "out-put-generic-cpu:1"
    marks = ("<tool_call>", "</tool_call>") if tools else ("", "")
    assert ast.literal_eval(values["(TOOL_START, TOOL_END)"]) == marks


def check_refused(package: Path, out: Path, match: str) -> None:
    with pytest.raises(PackageError, match=match):
        bundle(package, out)
    assert list(out.parent.glob("out*")) == []


def test_what_cannot_run_there_is_refused(package: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(package, tmp_path / "cuda"))
    manifest = json.loads((copy / MANIFEST).read_text("utf-8"))
    write_manifest(copy, manifest | {"target": "cuda"})
    check_refused(copy, tmp_path / "out", "made for cuda, but a bundle for foundry runs")
    plain = alter_package(package, tmp_path / "plain", chat_template="")
    check_refused(plain, tmp_path / "out", "has no chat template")
    odd = Path(shutil.copytree(package, tmp_path / "odd"))
    (odd / "chat_template.jinja").write_bytes(b"\xff\xfe")
    renew_hashes(odd)
    check_refused(odd, tmp_path / "out", r"chat_template\.jinja is not UTF-8 text")
