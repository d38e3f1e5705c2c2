"""Names of a package's inputs and outputs, as used in its graph and in its adapter files.

Every writer and reader of a package uses these; names inside the graph are in
exporter/graph/names.py.
"""

from __future__ import annotations

INPUT_IDS, ATTENTION_MASK, LOGITS = "input_ids", "attention_mask", "logits"

KEY, VALUE = "key", "value"

PAST = "past_key_values.%d."
"""The start of the names of a layer's cache inputs."""

PRESENT = "present.%d."
"""The start of the names of a layer's cache outputs."""

_PAST, _PRESENT = PAST.partition("%d")[0], PRESENT.partition("%d")[0]


def past_name(layer: int, part: str) -> str:
    """Return the name of the input for the cached keys or values (`part`) of `layer`.

    >>> past_name(3, KEY)
    'past_key_values.3.key'
    """
    return PAST % layer + part


def present_name(layer: int, part: str) -> str:
    """Return the name of the output for the keys or values (`part`) of `layer`.

    >>> present_name(3, VALUE)
    'present.3.value'
    """
    return PRESENT % layer + part


def is_past(name: str) -> bool:
    """Whether `name` is that of a cache input."""
    return name.startswith(_PAST)


def is_present(name: str) -> bool:
    """Whether `name` is that of a cache output."""
    return name.startswith(_PRESENT)


def present_of(past: str) -> str:
    """Return the output that becomes the input `past` of the next step.

    >>> present_of("past_key_values.3.key")
    'present.3.key'
    """
    return _PRESENT + past.removeprefix(_PAST)


def past_of(present: str) -> str:
    """Return the input that the output `present` becomes in the next step.

    >>> past_of("present.3.key")
    'past_key_values.3.key'
    """
    return _PAST + present.removeprefix(_PRESENT)


def cache_part(name: str) -> str:
    """Return `KEY` or `VALUE`: what the cache input or output `name` holds."""
    return name.rpartition(".")[2]


LORA_A, LORA_B = "lora_A", "lora_B"


def adapter_name(module: str, side: str) -> str:
    """Return the name of the input for A or B (`side`) of an adapter's change to `module`; PEFT
    uses the same name.

    >>> adapter_name("model.layers.0.self_attn.q_proj", LORA_A)
    'model.layers.0.self_attn.q_proj.lora_A.weight'
    """
    return f"{module}.{side}.weight"
