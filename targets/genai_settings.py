"""genai_config.json of a stranger: only the keys and values that our exporter writes.

onnxruntime-genai does what this file says: it loads the library that `custom_ops_library` names,
writes where `enable_profiling` says, and opens files by the names in it. A package is data, so what
the file may say is listed here, and everything else is refused. The exporter of every earlier
version wrote no more than this.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from llama_onnx.targets.graph_file import GraphFacts
from llama_onnx.targets.graph_names import (
    ATTENTION_MASK,
    INPUT_IDS,
    KEY,
    LOGITS,
    PAST,
    PRESENT,
    VALUE,
)
from llama_onnx.targets.providers import PROVIDERS
from llama_onnx.targets.registry import TARGETS
from llama_onnx.targets.strict_json import JSONError, parse_json

GENAI_CONFIG = "genai_config.json"
LOG_ID = "onnxruntime-genai"
MODEL_TYPE = "llama"
"""Of every package: a Mistral is the same graph, and its window is in the operators."""

SEARCH_NUMBERS = ("temperature", "top_k", "top_p", "repetition_penalty", "no_repeat_ngram_size")
"""Search options that a source's generation_config.json may set, besides `do_sample`."""

_MAX_BYTES = 1 << 20
_MOST_IDS = 1000
_LARGEST = (1 << 31) - 1
_MOST_THREADS = 1 << 16

Rule = Callable[[Any], bool] | Mapping[str, "Rule"]
"""Whether a value is allowed, or the rules of an object's keys."""


class SettingsError(ValueError):
    """What is wrong with the settings, to follow a file name: "sets 'a.b', which ..."."""


def check_settings(content: bytes, model_file: str, graph: GraphFacts | None = None) -> None:
    """Raise `SettingsError` unless the `content` of genai_config.json is what the exporter writes.

    With `graph`, the sizes must be those of the graph.
    """
    if b"\\" in content or b"\0" in content:
        # genai has a JSON parser of its own: without escapes both read the same keys.
        raise SettingsError("has a backslash or a NUL, which no export writes")
    try:
        settings = parse_json(content, unique=True, max_bytes=_MAX_BYTES)
    except JSONError as error:
        raise SettingsError(str(error)) from None
    for wrong in _breaches(settings, _rules(model_file), ""):
        raise SettingsError(wrong)
    if graph:
        _check_sizes(settings.get("model", {}), graph)


def _breaches(value: Any, rule: Rule, path: str) -> Iterator[str]:
    """Yield what in `value` breaks `rule`."""
    if callable(rule):
        if not rule(value):
            yield f"sets {path!r} to {_short(value)}, which no export writes"
        return
    if not isinstance(value, dict):
        yield f"sets {path or 'everything'!r} to {_short(value)}, which is not an object"
        return
    for key, inner in value.items():
        name = f"{path}.{key}" if path else key
        if key not in rule:
            yield f"sets {name!r}, which no export writes"
        else:
            yield from _breaches(inner, rule[key], name)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _check_sizes(model: Mapping[str, Any], graph: GraphFacts) -> None:
    """Raise `SettingsError` unless the sizes that genai allocates by are those of the graph."""
    decoder = model.get("decoder", {})
    heads, size = graph.cache
    expected = {
        "num_hidden_layers": (decoder, graph.layers),
        "num_key_value_heads": (decoder, heads),
        "head_size": (decoder, size),
        "vocab_size": (model, graph.vocab_size),
    }
    for key, (place, right) in expected.items():
        if place.get(key) != right:
            raise SettingsError(f"has {place.get(key)} as {key}, but the graph has {right}")
    if "context_length" not in model:
        raise SettingsError("has no context length")
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        ids = model.get(key, 0)
        for number in ids if isinstance(ids, list) else [ids]:
            if number >= graph.vocab_size:
                raise SettingsError(f"has {number} as {key}: the vocabulary ends before it")


def _rules(model_file: str) -> Rule:
    options = {
        "log_id": _equals(LOG_ID),
        "provider_options": _are_provider_options,
        **dict.fromkeys(_session_options(), _is_session_option),
    }
    decoder: dict[str, Rule] = {
        "filename": _equals(model_file),
        "head_size": _is_length,
        "hidden_size": _is_length,
        "num_attention_heads": _is_length,
        "num_hidden_layers": _is_length,
        "num_key_value_heads": _is_length,
        "session_options": options,
        "inputs": {
            "input_ids": _equals(INPUT_IDS),
            "attention_mask": _equals(ATTENTION_MASK),
            "past_key_names": _equals(PAST + KEY),
            "past_value_names": _equals(PAST + VALUE),
        },
        "outputs": {
            "logits": _equals(LOGITS),
            "present_key_names": _equals(PRESENT + KEY),
            "present_value_names": _equals(PRESENT + VALUE),
        },
    }
    model: dict[str, Rule] = {
        "type": _equals(MODEL_TYPE),
        "context_length": _is_length,
        "vocab_size": _is_length,
        "eos_token_id": _are_ids,
        "pad_token_id": _is_id,
        "bos_token_id": _is_id,
        "decoder": decoder,
    }
    search: dict[str, Rule] = {
        "do_sample": _is_bool,
        "max_length": _is_length,
        "min_length": _is_id,
        "num_beams": _equals(1),
        "num_return_sequences": _equals(1),
        "past_present_share_buffer": _is_bool,
        **dict.fromkeys(SEARCH_NUMBERS, _is_number),
    }
    return {"model": model, "search": search}


def _session_options() -> set[str]:
    """Return the names of all session options of providers and targets."""
    providers = {key for provider in PROVIDERS.values() for key in provider.session_options}
    return providers | {key for target in TARGETS.values() for key in target.session.options}


def _equals(right: str | int) -> Callable[[Any], bool]:
    return lambda value: type(value) is type(right) and value == right


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and math.isfinite(value)
        and abs(value) <= _LARGEST
    )


def _is_whole(value: Any, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _is_length(value: Any) -> bool:
    return _is_whole(value, 1, _LARGEST)


def _is_id(value: Any) -> bool:
    return _is_whole(value, 0, _LARGEST)


def _are_ids(value: Any) -> bool:
    if isinstance(value, list):
        return 0 < len(value) <= _MOST_IDS and all(map(_is_id, value))
    return _is_id(value)


def _is_session_option(value: Any) -> bool:
    # Today's only one is a number of threads. A text could be a path.
    return _is_whole(value, 0, _MOST_THREADS)


def _are_provider_options(value: Any) -> bool:
    """Whether they are one provider's, by genai's name, with options that are our own."""
    if not (isinstance(value, list) and len(value) <= 1):
        return False
    known = {
        p.genai_name: {*p.provider_options.items(), *p.other_options.items()}
        for p in PROVIDERS.values()
        if p.genai_name
    }
    for entry in value:
        if not (isinstance(entry, dict) and len(entry) == 1 and entry.keys() <= known.keys()):
            return False
        name, options = next(iter(entry.items()))
        if not isinstance(options, dict):
            return False
        if not all(isinstance(v, str) and (k, v) in known[name] for k, v in options.items()):
            return False
    return True
