"""What reading config.json left out or could not know, in sentences for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llama_onnx.exporter.model.config import LlamaConfig, read_special_tokens
from llama_onnx.exporter.model.context import condensed_warning, context_warning


def config_warnings(
    raw: Mapping[str, Any],
    config: LlamaConfig,
    where: str,
    generation: Mapping[str, Any],
    *,
    context_chosen: bool,
) -> tuple[str, ...]:
    """Return warnings about `config`, which was read from `raw` and `generation`, the content of
    config.json and generation_config.json. `context_chosen`: the user gave the context."""
    return (
        *read_special_tokens(raw, generation, config.vocab_size, where).warnings,
        *condensed_warning(raw, config, where),
        *(() if context_chosen else context_warning(raw, config, where)),
    )
