"""Open a package: its tokenizer, and the engine that runs its graph."""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_onnx.runtime.llama.backends import Backend, open_backend
from llama_onnx.runtime.llama.no_tokenizer import NoTokenizer
from llama_onnx.runtime.llama.prompt import check_length
from llama_onnx.runtime.llama.template import check_template
from llama_onnx.runtime.llama.text_codec import TextCodec
from llama_onnx.runtime.llama.text_files import read_settings
from llama_onnx.runtime.tokenizer.encoder import Encoder, open_encoder
from llama_onnx.runtime.tokenizer.text_stream import Decoder
from llama_onnx.targets.engines import (
    EngineName,
    SpeculationName,
    check_engine,
    check_speculation,
    engine_for,
)
from llama_onnx.targets.errors import PackageError, describe_reason
from llama_onnx.targets.package import ModelPackage
from llama_onnx.targets.printable import printable
from llama_onnx.targets.provider import Provider
from llama_onnx.targets.providers import get_provider
from llama_onnx.targets.registry import get_target

if TYPE_CHECKING:
    from llama_onnx.runtime.engine.engine import Limits


def open_codec(
    path: str | os.PathLike[str],
    *,
    max_length: int | None,
    threads: int | None,
    provider: Provider | str | None,
    allow_fallback: bool,
    engine: EngineName | None,
    limits: Limits | None,
    speculate: SpeculationName,
    draft: str | os.PathLike[str] | None,
    tuned: bool,
) -> tuple[TextCodec, Backend]:
    """Open the package at `path`; the arguments and errors are those of `Llama.load`."""
    if engine is not None:
        check_engine(engine)
    check_speculation(speculate)
    if provider is not None and not isinstance(provider, Provider):
        provider = get_provider(provider)
    package = ModelPackage.open(Path(path))
    settings = read_settings(package.path)
    context_length = int(settings["context_length"])
    if max_length is not None:
        context_length = min(context_length, check_length(max_length))
    provider = provider or get_target(package.target).session.provider
    # A large tokenizer takes a second to read: meanwhile ONNX Runtime packs the weights.
    with ThreadPoolExecutor(1) as beside:
        reading = beside.submit(_read_tokenizer, package, settings)
        backend = open_backend(
            engine or engine_for(provider),
            package,
            context_length,
            provider,
            threads=threads,
            allow_fallback=allow_fallback,
            limits=limits,
            speculate=speculate,
            draft=None if draft is None else ModelPackage.open(Path(draft)),
            tuned=tuned,
        )
    try:
        encoder, decoder = reading.result()
        codec = TextCodec(
            package, settings, context_length, encoder, decoder or backend.open_tokenizer()
        )
    except RuntimeError as error:
        backend.close()
        raise PackageError(
            f"onnxruntime-genai cannot open the tokenizer of {package.path}: "
            f"{printable(describe_reason(error))}."
        ) from None
    except BaseException:
        backend.close()
        raise
    return codec, backend


def _read_tokenizer(
    package: ModelPackage, settings: Mapping[str, Any]
) -> tuple[Encoder | NoTokenizer, Decoder | NoTokenizer | None]:
    """Return what encodes texts, and what decodes tokens; None if tokenizer.json has no decoder of
    a Llama."""
    if not package.has_tokenizer:
        nothing = NoTokenizer(package, settings)
        return nothing, nothing
    check_template(package.path)
    found = settings.get("eos_token_id", [])
    encoder = open_encoder(package.path, int(settings["vocab_size"]))
    return encoder, encoder.open_decoder(found if isinstance(found, list) else [found])
