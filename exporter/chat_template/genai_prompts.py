"""What onnxruntime-genai's own engine makes of a chat template, as C and C# programs get it."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from jinja2 import nodes

from llama_onnx.exporter.chat_template.conversations import Conversation
from llama_onnx.runtime.chat_template.render import parse_template
from llama_onnx.runtime.doctor.child import command_of, run

_SECONDS = 30.0
_LONGEST = 16_000
"""In a longer text, one comment or run of spaces could overflow its stack, letter by letter."""


def genai_prompts(
    package: Path, template: str, conversations: Sequence[Conversation]
) -> list[str | None]:
    """Return the prompts that onnxruntime-genai makes with the tokenizer in `package`; None for a
    conversation that it refuses.

    A template that could keep it busy for ever, or crash it, is rendered in another process: then
    all are None if that fails. Raises `MissingDependencyError` without onnxruntime-genai.
    """
    import llama_onnx.runtime.genai  # noqa: F401 - to know before another process is started

    if not needs_care(template):
        return _render(package, template, conversations)
    with tempfile.TemporaryDirectory() as work:
        request, answer = Path(work) / "request", Path(work) / "answer"
        request.write_text(json.dumps([str(package), template, conversations]), encoding="utf-8")
        outcome = run(command_of(__name__, str(request), str(answer)), seconds=_SECONDS)
        if outcome.error is not None:
            return [None] * len(conversations)
        prompts: list[str | None] = json.loads(answer.read_text(encoding="utf-8"))
        return prompts


def main() -> None:
    """Render what the file in the first argument asks for, into the file in the second."""
    request, answer = map(Path, sys.argv[1:])
    package, template, conversations = json.loads(request.read_text(encoding="utf-8"))
    prompts = _render(Path(package), template, conversations)
    answer.write_text(json.dumps(prompts), encoding="utf-8")


def _render(
    package: Path, template: str, conversations: Sequence[Conversation]
) -> list[str | None]:
    from llama_onnx.runtime.genai import og

    tokenizer = og.Tokenizer(og.Config(str(package)))
    prompts: list[str | None] = []
    for messages in conversations:
        try:
            prompt = tokenizer.apply_chat_template(
                json.dumps(messages), template_str=template, add_generation_prompt=True
            )
            prompts.append(str(prompt))
        except Exception:  # a C++ library's own, or a text that it has cut inside a letter
            prompts.append(None)
    return prompts


def needs_care(text: str) -> bool:
    """Return whether an engine without bounds might take for ever to render `text`, or crash.

    Not so for a template that only walks over messages, and adds and cuts their texts.
    """
    if len(text) > _LONGEST:
        return True
    tree = parse_template(text)
    if any(loop.recursive for loop in tree.find_all(nodes.For)):
        return True
    called = {
        one.node.name for one in tree.find_all(nodes.Call) if isinstance(one.node, nodes.Name)
    }
    if called - {"namespace", "raise_exception", "strftime_now"}:
        return True
    filters = list(tree.find_all(nodes.Filter))
    if any(one.name in _GROWING or (one.name == "tojson" and one.kwargs) for one in filters):
        return True
    if any(not _is_above_zero(one.right) for one in tree.find_all(_ARITHMETIC)):
        return True
    methods = [
        (one.node.attr, one)
        for one in tree.find_all(nodes.Call)
        if isinstance(one.node, nodes.Getattr)
    ]
    if any(name in ("split", "replace") and not _has_text(one) for name, one in methods):
        return True  # to split at an empty text never ends
    return any(tree.find_all((nodes.Macro, nodes.Block, nodes.Pow)))


_GROWING = frozenset({"center", "indent", "format", "int", "float", "map", "select", "reject"})
_ARITHMETIC = (nodes.Mod, nodes.Mul, nodes.Div, nodes.FloorDiv)


def _is_above_zero(node: nodes.Expr) -> bool:
    value = node.value if isinstance(node, nodes.Const) else None
    return isinstance(value, int | float) and value > 0


def _has_text(call: nodes.Call) -> bool:
    first = call.args[0] if call.args else None
    return isinstance(first, nodes.Const) and isinstance(first.value, str) and first.value != ""
