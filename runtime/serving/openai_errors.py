"""What a client is told about an error of this project."""

from __future__ import annotations

import re
from pathlib import Path

from llama_onnx.runtime.serving.http.failure import Failure
from llama_onnx.runtime.serving.requests.schemas import FieldError
from llama_onnx.targets.errors import (
    BusyError,
    ContextLengthError,
    LlamaOnnxError,
    ResourceError,
    TooLargeError,
    UsageError,
)

_PATH = re.compile(
    r"""(?<![\w.:/\\])(?:/(?:[^\s/:'",]+/)+|[A-Za-z]:\\(?:[^\\:'",]+\\)*)(?P<last>[^\s/\\:'",]+)"""
)
"""An absolute path of two parts or more, and its last part."""


class UnknownModelError(UsageError):
    """A request for a model that is not served here."""


class NotReadyError(LlamaOnnxError):
    """A server that cannot answer any more."""


def failure_of(error: LlamaOnnxError, package: Path | None = None) -> Failure:
    """Return what a client is told about `error`: it names the model, not where it is."""
    text = public(str(error), package)
    if isinstance(error, UnknownModelError):
        return Failure(404, text, "invalid_request_error", "model", "model_not_found")
    if isinstance(error, ContextLengthError):
        return Failure(400, text, "invalid_request_error", None, "context_length_exceeded")
    if isinstance(error, TooLargeError):
        return Failure(413, text, "invalid_request_error", None, "request_too_large")
    if isinstance(error, UsageError):
        param = error.param if isinstance(error, FieldError) else None
        return Failure(400, text, "invalid_request_error", param)
    if isinstance(error, BusyError):
        return Failure(429, text, "rate_limit_error", None, "rate_limit_exceeded")
    if isinstance(error, NotReadyError):
        return Failure(503, text, "server_error", None, "not_ready")
    if isinstance(error, ResourceError):
        return Failure(503, text, "server_error", None, "insufficient_memory")
    return Failure(500, text, "server_error")


def public(text: str, package: Path | None = None) -> str:
    """Return `text` with each absolute path reduced to its last part.

    >>> public("cannot read /home/somebody/models/tiny/model.onnx.")
    'cannot read model.onnx.'
    """
    if package is not None:
        whole = package.resolve()
        for path in (str(whole), str(package)):
            text = text.replace(path, whole.name)
    return _PATH.sub(lambda match: match["last"], text)
