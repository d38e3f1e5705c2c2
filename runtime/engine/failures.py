"""What goes wrong inside an answer, as this project's errors."""

from __future__ import annotations

from math import isfinite
from typing import Any

from llama_onnx.runtime.memory import is_memory_failure
from llama_onnx.targets.errors import (
    LlamaOnnxError,
    PackageError,
    ProviderError,
    ResourceError,
    describe_reason,
)

_LOST = ("887a0005", "887a0006", "887a0007")
"""DXGI's errors for a device that was removed, that hangs, and that was reset."""


def describe_failure(error: Exception, prompt_tokens: int, length: int) -> LlamaOnnxError:
    """Return the error for what failed in an answer of at most `length` tokens in all."""
    if is_memory_failure(error):
        return ResourceError(
            f"not enough memory for a prompt of {prompt_tokens:,} tokens and an answer of up to "
            f"{length - prompt_tokens:,}: pass a shorter prompt or a smaller max_new_tokens "
            "(--max-new-tokens)."
        )
    if lost := next((code for code in _LOST if code in str(error).lower()), None):
        return ProviderError(
            f"the graphics device was lost in the answer (error {lost.upper()}): its driver "
            "crashed, hung or was reset; update the driver, or pass --provider cpu."
        )
    if isinstance(error, LlamaOnnxError):
        return error
    return PackageError(f"onnxruntime-genai failed in the answer: {describe_reason(error)}.")


def require_finite(logits: Any, new_tokens: int) -> None:
    """Raise `PackageError` unless the largest of the `logits` after `new_tokens` is a number."""
    _require_finite(logits.max(), new_tokens)


def likeliest(logits: Any, new_tokens: int) -> int:
    """Return the token with the largest of the `logits` [V] after `new_tokens`: the first of them.

    Raises `PackageError` unless that is a number. A NaN is the largest, wherever it is.
    """
    token = int(logits.argmax())
    _require_finite(logits[token], new_tokens)
    return token


def _require_finite(largest: float, new_tokens: int) -> None:
    if not isfinite(largest):
        raise PackageError(
            f"the model's output is not a number after {new_tokens} tokens: its weights are "
            "damaged, or its precision is too low for them; `llama-onnx verify` checks the package."
        )
