"""Encode a text with a checkpoint's tokenizer, which may give up."""

from __future__ import annotations

from tokenizers import Tokenizer

from llama_onnx.targets.errors import CheckpointError
from llama_onnx.targets.printable import shown


def encoded(tokenizer: Tokenizer, text: str, where: str) -> list[int]:
    """Return the ids of `text`. Raises `CheckpointError` if the library gives up: its regular
    expressions stop after ten million attempts, and Rust's panic is not an `Exception`."""
    try:
        return list(tokenizer.encode(text).ids)
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise CheckpointError(
            f"{where}: the tokenizer cannot encode {shown(text)}: a regular expression in it takes "
            "too long."
        ) from None
