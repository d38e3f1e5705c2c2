"""What may be asked of a model with a given vocabulary and context."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from llama_onnx.runtime.engine.sampling.arguments import as_whole
from llama_onnx.runtime.engine.sampling.parameters import read_value
from llama_onnx.targets.errors import ContextLengthError, UsageError
from llama_onnx.targets.printable import shown

Tokens = npt.NDArray[np.int32]


def check_length(max_length: Any) -> int:
    """Return the length of a context; raise `UsageError` unless it is a whole number from 2."""
    whole = as_whole(max_length)
    if whole is None or whole < 2:
        raise UsageError(f"the context must hold at least 2 tokens, not {shown(max_length)}.")
    return whole


def total_length(prompt_tokens: int, max_new_tokens: int, context_length: int) -> int:
    """Return the most tokens that prompt and answer can take together.

    Raises `UsageError` for an empty prompt, one that leaves no room, or no new tokens.
    """
    new_tokens: int = read_value("max_new_tokens", max_new_tokens)
    if prompt_tokens == 0:
        raise UsageError("the prompt is empty, and this model has no start token: give it a text.")
    if prompt_tokens >= context_length:
        raise ContextLengthError(
            # Clients look for these words: "this model's maximum context length is".
            f"the prompt has {prompt_tokens:,} tokens, but this model's maximum context length is "
            f"{context_length:,}, and an answer needs room too: shorten the prompt."
        )
    return min(prompt_tokens + new_tokens, context_length)


def check_tokens(tokens: Any, vocab_size: int) -> Tokens:
    """Return token ids as int32; raise `UsageError` unless each is an id of the vocabulary.

    An array, or any iterable of whole numbers. True and 1.0 are not ids.
    """
    if isinstance(tokens, np.ndarray):
        if tokens.ndim != 1 or (tokens.size and tokens.dtype.kind not in "iu"):
            raise UsageError(
                f"token ids must be a flat array of whole numbers, not {tokens.dtype} of "
                f"{tokens.ndim} dimensions."
            )
        outside = tokens[(tokens < 0) | (tokens >= vocab_size)]
        if outside.size:
            raise _not_an_id(int(outside[0]), vocab_size)
        return np.ascontiguousarray(tokens, dtype=np.int32)
    if isinstance(tokens, (str, bytes)) or not isinstance(tokens, Iterable):
        raise UsageError(f"token ids must be a list of whole numbers, not {shown(tokens)}.")
    ids = list(tokens)
    for token in ids:
        whole = as_whole(token)
        if whole is None or not 0 <= whole < vocab_size:
            raise _not_an_id(token, vocab_size)
    return np.asarray(ids, dtype=np.int32)


def _not_an_id(token: Any, vocab_size: int) -> UsageError:
    return UsageError(
        f"{shown(token)} is not a token id: this model's are whole numbers from 0 to "
        f"{vocab_size - 1:,}."
    )


def check_text_length(text: str, context_length: int, count_tokens: Callable[[str], int]) -> None:
    """Raise `UsageError` for a text that is much too long, without encoding all of it.

    Encoding takes some hundred bytes of memory for each token. Starts of growing length are encoded
    until one has twice the tokens that the context holds: what follows cannot halve them.
    """
    size = 4 * context_length
    while size < len(text):
        if count_tokens(text[:size]) > 2 * context_length:
            raise ContextLengthError(
                f"the prompt has {len(text):,} characters, and its first {size:,} are already more "
                f"than {2 * context_length:,} tokens, but this model's maximum context length is "
                f"{context_length:,}: shorten the prompt."
            )
        size *= 2
