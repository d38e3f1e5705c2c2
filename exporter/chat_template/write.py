"""The chat template of a package: one text that jinja2 and onnxruntime-genai render alike, as far
as that is possible, and warnings where it is not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jinja2 import nodes

from llama_onnx.exporter.chat_template.conversations import CONVERSATIONS, TOOLS, WITH_TOOLS
from llama_onnx.exporter.chat_template.rewrite import InexpressibleError, rewrite
from llama_onnx.runtime.chat_template.render import (
    ChatTemplate,
    RejectedError,
    TemplateError,
    parse_template,
)
from llama_onnx.runtime.llama.template import TEMPLATE, read_template
from llama_onnx.targets.errors import MissingDependencyError
from llama_onnx.targets.printable import printable

Prompts = list[str | None]
"""For each of `CONVERSATIONS`; None for one that the template rejects."""


def prepare_template(folder: Path, where: str) -> list[str]:
    """Rewrite the chat template of the package in `folder` for both engines, or remove it if nobody
    could use it; return warnings that name the source, `where`.

    onnxruntime-genai's engine, which reads the template when it opens the tokenizer, has no bounds:
    it needs minutes for some of those that are removed.
    """
    template = read_template(folder)
    if template is None:
        return []
    text = template.text
    try:
        expected = _prompts(template)
        text = _rewritten(template, expected)
        reason = _rejection(template, expected)
    except TemplateError as error:
        reason = str(error)
    if reason is None:
        (folder / TEMPLATE).write_bytes(text.encode("utf-8"))
        return _recursion(text, where)
    (folder / TEMPLATE).unlink()
    return [
        f"{where}: the chat template cannot be used ({printable(reason)}), so the package has "
        "none, and chat is not possible."
    ]


def template_differences(folder: Path, where: str) -> list[str]:
    """Return a warning about the conversations that onnxruntime-genai, where it is installed,
    renders in another way with the chat template of the package in `folder`."""
    from llama_onnx.exporter.chat_template.genai_prompts import genai_prompts

    template = read_template(folder)
    if template is None:
        return []
    try:
        found = genai_prompts(folder, template.text, list(CONVERSATIONS.values()))
    except (MissingDependencyError, ImportError):  # absent, or its libraries do not load
        return []
    pairs = zip(CONVERSATIONS, _prompts(template), found, strict=True)
    names = [name for name, ours, theirs in pairs if ours != theirs]
    if not names:
        return []
    which = "every conversation" if len(names) == len(CONVERSATIONS) else ", ".join(names)
    return [
        f"{where}: onnxruntime-genai makes other prompts of the chat template than transformers, "
        f"for {which}; llama-onnx's commands and Python API make transformers' own, but a C or C# "
        "program should pass its own prompt."
    ]


def _rejection(template: ChatTemplate, expected: Prompts) -> str | None:
    """Return the error that `template` raises if it raises one for every conversation."""
    usable = any(prompt is not None for prompt in expected)
    if usable or any(prompt is not None for prompt in _other_prompts(template)):
        return None
    try:
        template.render(CONVERSATIONS["one turn"])
    except RejectedError as error:
        return str(error)
    return None


def _prompts(template: ChatTemplate) -> Prompts:
    return [_prompt(template, messages) for messages in CONVERSATIONS.values()]


def _prompt(template: ChatTemplate, messages: Sequence[Any], **options: Any) -> str | None:
    try:
        return template.render(messages, **options)
    except RejectedError:
        return None


def _rewritten(template: ChatTemplate, expected: Prompts) -> str:
    """Return the text written for both engines, or the original if jinja2 would notice."""
    try:
        text = rewrite(template.text)
    except InexpressibleError:
        return template.text
    other = replace(template, text=text)
    same = text == template.text or (
        _prompts(other) == expected and _other_prompts(other) == _other_prompts(template)
    )
    return text if same else template.text


def _other_prompts(template: ChatTemplate) -> Prompts:
    """Return what only users of transformers ask for: tools, and prompts without a start of the
    answer."""
    plain = list(CONVERSATIONS.values())
    return [
        *(_prompt(template, messages, tools=TOOLS) for messages in (*plain, WITH_TOOLS)),
        *(_prompt(template, messages, add_generation_prompt=False) for messages in plain),
    ]


def _recursion(text: str, where: str) -> list[str]:
    """Return a warning about macros that call themselves, on which an engine without bounds can
    crash."""
    for macro in parse_template(text).find_all(nodes.Macro):
        called = (call.node for call in macro.find_all(nodes.Call))
        if macro.name in {node.name for node in called if isinstance(node, nodes.Name)}:
            return [
                f"{where}: the chat template has the macro {macro.name}, which calls itself: the C "
                "library refuses to chat with it, so that a C program must pass its own prompt."
            ]
    return []
