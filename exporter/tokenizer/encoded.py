"""Encode a text with a checkpoint's tokenizer, which may give up."""

from __future__ import annotations

from tokenizers import Tokenizer

from llama_onnx.runtime.tokenizer.encoder import encode_texts
from llama_onnx.targets.errors import CheckpointError
from llama_onnx.targets.printable import printable, shown


def encoded(
    tokenizer: Tokenizer, text: str, where: str, *, add_special_tokens: bool = True
) -> list[int]:
    """Return the ids of `text`. Raises `CheckpointError` if the library fails or gives up: its
    regular expressions stop after ten million attempts."""
    try:
        return encode_texts(tokenizer, [text], add_special_tokens=add_special_tokens)[0]
    except TimeoutError as error:
        reason = f"it takes more than {error.args[0]:g} s"
    except ValueError as error:
        reason = printable(str(error)).rstrip(".")
    raise CheckpointError(
        f"{where}: the tokenizer cannot encode {shown(text)} ({reason}): download it again."
    )
