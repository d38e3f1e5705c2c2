"""Opens a package with the execution provider of its target, and checks that it is the one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llama_onnx.runtime.genai import og
from llama_onnx.targets.errors import PackageError, ProviderError, UsageError
from llama_onnx.targets.target import Session


def open_model(folder: Path, session: Session, threads: int | None = None) -> Any:
    """Open the model in `folder` as `session` says, on `threads` threads instead of its own.

    Raises `ProviderError` when another provider than the one asked for would run it, and
    `PackageError` when the model does not open.
    """
    try:
        model = og.Model(_configure(folder, session, threads))
    except RuntimeError as error:
        raise PackageError(f"{folder} does not open in onnxruntime-genai: {error}") from None
    if model.device_type != session.device:
        raise ProviderError(
            f"{folder} was to run on {session.provider}, but onnxruntime-genai opened it on "
            f"{model.device_type}: is `{session.wheel}` the one ONNX Runtime installed?"
        )
    return model


def _configure(folder: Path, session: Session, threads: int | None) -> Any:
    config = og.Config(str(folder))
    config.clear_providers()
    if session.genai_provider:
        config.append_provider(session.genai_provider)
    options = session_options(session, threads)
    config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
    return config


def session_options(session: Session, threads: int | None) -> dict[str, int | str]:
    """Session options of a target, with the number of threads if one is asked for."""
    if threads is None:
        return dict(session.options)
    if threads < 1:
        raise UsageError(f"The number of threads must be at least 1, not {threads}.")
    return {**session.options, "intra_op_num_threads": threads}
