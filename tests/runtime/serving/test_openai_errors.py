"""What a client is told about an error: its status, and nothing about the server's folders."""

from __future__ import annotations

from pathlib import Path

import pytest

from llama_onnx.runtime.serving.openai_errors import NotReadyError, failure_of
from llama_onnx.targets.errors import (
    BusyError,
    ContextLengthError,
    LlamaOnnxError,
    PackageError,
    ResourceError,
    TooLargeError,
    UsageError,
)


@pytest.mark.parametrize(
    ("kind", "status", "code"),
    [
        (UsageError, 400, None),
        (ContextLengthError, 400, "context_length_exceeded"),
        (TooLargeError, 413, "request_too_large"),
        (BusyError, 429, "rate_limit_exceeded"),
        (ResourceError, 503, "insufficient_memory"),
        (NotReadyError, 503, "not_ready"),
        (PackageError, 500, None),
        (LlamaOnnxError, 500, None),
    ],
)
def test_whose_fault_it_is(kind: type[LlamaOnnxError], status: int, code: str | None) -> None:
    failure = failure_of(kind("it failed."))
    assert (failure.status, failure.code, failure.message) == (status, code, "it failed.")


@pytest.mark.parametrize(
    ("said", "public"),
    [
        ("{package} has no chat template.", "{name} has no chat template."),
        (
            "{package}/model.onnx is damaged: 7 tokens/s.",
            "{name}/model.onnx is damaged: 7 tokens/s.",
        ),
        ("see /var/lib/a b/x.bin, please", "see a b/x.bin, please"),
        ("open('/etc/llama/x'): no", "open('x'): no"),
        (r"C:\Users\me\model.onnx: no", "model.onnx: no"),
        ("and/or 1/2 https://a.b/c", "and/or 1/2 https://a.b/c"),
    ],
)
def test_an_error_says_nothing_about_the_folders_of_the_server(
    tmp_path: Path, said: str, public: str
) -> None:
    package = tmp_path / "my model"
    error = PackageError(said.format(package=package))
    assert failure_of(error, package).message == public.format(name=package.name)
