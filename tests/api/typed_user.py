"""A user's project. Never run: `nox -s typecheck` checks it with `mypy --strict` against the wheel.

An ignore that hides no error is an error there, so each of them proves that mypy sees the types.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import llama_onnx
from llama_onnx import Llama, LlamaOnnxError

if TYPE_CHECKING:
    from typing import assert_type  # Python 3.11


def right(model: Llama) -> None:
    """What is right."""
    assert_type(llama_onnx.__version__, str)
    assert_type(llama_onnx.plan("a", precision="int4").parameters, int)
    assert_type(llama_onnx.export(Path("a"), "b", block_size=64).package, Path)
    assert_type(llama_onnx.validate("b", "a", certify=True).passed, bool)
    assert_type(llama_onnx.verify("b", provider="cpu").passed, bool)
    assert_type(llama_onnx.open_package("b").target, str)
    assert_type(llama_onnx.TARGETS["cpu"].graph.precisions, tuple[str, ...])
    assert_type(next(model.generate("a", top_k=1)), str)
    assert_type(LlamaOnnxError("a").exit_code, int)
    chat = model.conversation(system="a", overflow="drop_oldest", max_new_tokens=4)
    assert_type(next(chat.say("a", temperature=0.5)), str)
    assert_type(chat.retry(seed=1).stats.reused_tokens, int)
    assert_type(chat.fork().messages[0], dict[str, Any])
    assert_type(chat.save("a").left_out, str | None)
    assert_type(model.restore(Path("a"), messages_only=True).adapter, str | None)


def wrong(model: Llama) -> None:
    """What is wrong."""
    llama_onnx.export("a")  # type: ignore[call-arg]
    llama_onnx.export("a", "b", block_size="c")  # type: ignore[arg-type]
    llama_onnx.plan("a", logits="none")  # type: ignore[arg-type]
    llama_onnx.plan("a", unknown=1)  # type: ignore[call-arg]
    print(llama_onnx.unknown)  # type: ignore[attr-defined]
    print(model.unknown)  # type: ignore[attr-defined]
    model.conversation(overflow="drop")  # type: ignore[arg-type]
    model.conversation().say("a", adapter="b")  # type: ignore[call-arg]
