"""How many positions a package holds, and where a config says too little about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llama_onnx.exporter.model.config import MAX_CONTEXT, MIN_CONTEXT, LlamaConfig
from llama_onnx.targets.errors import UsageError

_LENGTHS = ("max_sequence_length", "seq_length", "max_seq_len", "model_max_length")
"""Keys in which tools other than transformers write the context of a model."""


def with_context(
    config: LlamaConfig, context: int | None, where: str
) -> tuple[LlamaConfig, tuple[str, ...]]:
    """Return `config` with a context of `context` positions (None: its own), and warnings that name
    its file, `where`.

    Raises `UsageError` for one that no package can have, or that the model's rope scaling does not
    allow.
    """
    if context is None:
        return config, ()
    if not MIN_CONTEXT <= context <= MAX_CONTEXT:
        raise UsageError(
            f"a context of {context} positions is not between {MIN_CONTEXT} and {MAX_CONTEXT}."
        )
    scaling = config.rope_scaling
    if context > config.max_position_embeddings and scaling and scaling.rope_type == "dynamic":
        raise UsageError(
            f"a context of {context} positions is beyond the model's "
            f"{config.max_position_embeddings}: with the rope type 'dynamic' the frequencies would "
            "change with the length of the text, which a package cannot do."
        )
    known = stretched_context(config)
    warning = (
        f"{where}: a context of {context} positions is beyond the {known} that the model was made "
        "for: expect poor text there."
    )
    stretched = replace(config, max_position_embeddings=context)
    return stretched, (warning,) if context > known else ()


def stretched_context(config: LlamaConfig) -> int:
    """Return the number of positions that the rope scaling of `config` was made for, as far as the
    config says; its max_position_embeddings without a scaling."""
    scaling = config.rope_scaling
    if scaling is None:
        return config.max_position_embeddings
    original = scaling.original_max_position_embeddings or config.max_position_embeddings
    return max(config.max_position_embeddings, int(original * scaling.factor))


def condensed_warning(raw: Mapping[str, Any], config: LlamaConfig, where: str) -> tuple[str, ...]:
    """Return a warning if the model was trained with a patched rotary embedding that config.json,
    read as `raw`, describes only in a key of its own."""
    ratio = raw.get("rope_condense_ratio")
    if not isinstance(ratio, int | float) or ratio in (0, 1) or config.rope_scaling is not None:
        return ()
    return (
        f"{where}: rope_condense_ratio is {ratio}: the model was trained with positions divided by "
        "it, which transformers and the package do not do, so expect poor text; put "
        f'"rope_scaling": {{"type": "linear", "factor": {float(ratio)}}} into config.json to have '
        "the positions of its training.",
    )


def context_warning(raw: Mapping[str, Any], config: LlamaConfig, where: str) -> tuple[str, ...]:
    """Return a warning if the rope scaling of `config` may have been made for more positions than
    its context; `raw` is the content of config.json."""
    scaling, held = config.rope_scaling, config.max_position_embeddings
    stretched = stretched_context(config)
    if scaling is None or scaling.rope_type == "dynamic" or stretched <= held:
        return ()
    written = [raw[key] for key in _LENGTHS if type(raw.get(key)) is int]
    if scaling.original_max_position_embeddings is None and held in written:
        return ()  # a second key confirms it
    return (
        f"{where}: the package holds {held} positions (max_position_embeddings), and the rope "
        f"scaling {scaling.rope_type!r} by {scaling.factor:g} may be made for {stretched}: if it "
        f"is, pass --context {stretched} (context={stretched} in Python).",
    )
