"""What a caller asks for and what the package decides, resolved to one set of values."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from llama_onnx.runtime.engine.sampling.parameters import (
    PACKAGE_DEFAULT,
    RANDOM_SEED,
    RULES,
    Sampling,
)
from llama_onnx.targets.errors import PackageError, UsageError
from llama_onnx.targets.folder_files import read_inside
from llama_onnx.targets.printable import shown
from llama_onnx.targets.strict_json import MAX_BYTES, JSONError, parse_json

_CONFIG = "genai_config.json"
_SEED_BITS = 64


@dataclass(frozen=True)
class Choice:
    """How to choose each token of an answer. Equal ones choose equally, for they hold the seed.

    `temperature` 0 is greedy: the cut-offs and the seed then have no effect. `top_k` 0, `top_p` 1,
    `min_p` 0, `no_repeat_ngram_size` 0, `repetition_penalty` 1 and the other penalties' 0 are off.
    `logprobs` is how many alternatives to a token are wanted with their log probabilities; None is
    no log probabilities at all.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram_size: int = 0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    seed: int = 0


_NAMES = tuple(entry.name for entry in fields(Choice))


def resolve(
    sampling: Sampling = PACKAGE_DEFAULT,
    search: Mapping[str, Any] | None = None,
    *,
    vocab_size: int,
) -> Choice:
    """Return the values of `sampling`, and where it has None those of the package, its `search`.

    A seed that is None or -1 is drawn here. Raises `UsageError` for a `logit_bias` of a token that
    the model does not have.

    >>> resolve(Sampling(top_k=5, seed=1), {"temperature": 0.6}, vocab_size=100).temperature
    0.6
    >>> resolve(vocab_size=100).temperature
    0.0
    """
    package = dict(search or {})
    biases = dict(sampling.logit_bias or ())
    if beyond := [token for token in biases if token >= vocab_size]:
        raise UsageError(
            f"logit_bias names the token {beyond[0]:,}, but the model has {vocab_size:,}, and the "
            "first is 0: use the ids of its tokenizer."
        )
    asked = {name: getattr(sampling, name, None) for name in _NAMES}
    values = {name: value for name, value in asked.items() if value is not None}
    known = {name: value for name, value in package.items() if name in _NAMES}
    samples = sampling.turns_sampling_on()
    if samples is None:
        samples = bool(package.get("do_sample", False))
    temperature = sampling.temperature
    if temperature is None:
        temperature = package.get("temperature", 1.0)
    if sampling.seed in (None, RANDOM_SEED):
        values["seed"] = secrets.randbits(_SEED_BITS)
    return Choice(**{**known, **values, "temperature": temperature if samples else 0.0})


def read_search(folder: Path) -> dict[str, Any]:
    """Return how the package in `folder` chooses tokens by default, for `resolve`.

    These are the values of genai_config.json that come from the model's generation_config.json.
    Raises `PackageError` for a file that cannot be read and for a value that means nothing.
    """
    content = read_inside(folder, _CONFIG, PackageError, max_bytes=MAX_BYTES)
    try:
        search = parse_json(content)["search"].items()
    except (JSONError, KeyError, TypeError, AttributeError):
        raise PackageError(
            f"{folder / _CONFIG} is damaged: it has no search settings; export the package again."
        ) from None
    return {name: _read(name, value, folder / _CONFIG) for name, value in search if name in RULES}


def _read(name: str, value: Any, file: Path) -> Any:
    read = RULES[name].read(value)
    if read is None:
        raise PackageError(
            f"{file} sets {name} to {shown(value)}, which is not {RULES[name].meaning}: export the "
            "package again."
        )
    return read
