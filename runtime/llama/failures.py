"""What onnxruntime-genai raises inside an answer, as this project's errors."""

from __future__ import annotations

from llama_onnx.runtime.memory import is_memory_failure
from llama_onnx.targets.errors import LlamaOnnxError, PackageError, ResourceError, describe_reason


def describe_failure(error: Exception, prompt_tokens: int, length: int) -> LlamaOnnxError:
    """Return the error for what failed in an answer of at most `length` tokens in all."""
    if is_memory_failure(error):
        return ResourceError(
            f"not enough memory for a prompt of {prompt_tokens:,} tokens and an answer of up to "
            f"{length - prompt_tokens:,}: pass a shorter prompt or a smaller max_new_tokens "
            "(--max-new-tokens)."
        )
    return PackageError(f"onnxruntime-genai failed in the answer: {describe_reason(error)}.")
