"""How the next token is chosen: one reading of every value, wherever it comes from.

generation_config.json, the command line, Python and servers all pass their values to `read_value`,
which takes them as llama.cpp, transformers and OpenAI's API do where these agree. A refusal names
the option as its caller wrote it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from llama_onnx.runtime.llama.arguments import as_float, as_whole
from llama_onnx.targets.errors import UsageError
from llama_onnx.targets.printable import shown

GREEDY_BELOW = 1e-6
"""Smaller temperatures are greedy: logits that differ by 1e-4 are then 100 nats apart, and the
smallest temperatures would be zero in float32."""

LARGEST_TEMPERATURE = 1e6
RANDOM_SEED = -1
"""Asks for another seed at each answer, as llama.cpp's -1 does."""

_SEEDS = 1 << 64
_GENAI_SEED_BITS = 31


@dataclass(frozen=True)
class Rule:
    """What a value must be: `read` returns the value to use, or None if it is not `meaning`."""

    meaning: str
    read: Callable[[Any], Any]


def _temperature(value: Any) -> float | None:
    number = as_float(value)
    if number is None or not 0 <= number <= LARGEST_TEMPERATURE:
        return None
    return 0.0 if number < GREEDY_BELOW else number


def _top_k(value: Any) -> int | None:
    whole = as_whole(value)
    return None if whole is None else max(0, whole)


def _top_p(value: Any) -> float | None:
    number = as_float(value)
    return number if number is not None and 0 <= number <= 1 else None


def _seed(value: Any) -> int | None:
    whole = as_whole(value)
    return whole if whole is not None and RANDOM_SEED <= whole < _SEEDS else None


def _penalty(value: Any) -> float | None:
    number = as_float(value)
    return number if number is not None and 1e-6 <= number <= 1e6 else None


def _count(value: Any) -> int | None:
    whole = as_whole(value)
    return whole if whole is not None and 0 <= whole < 1 << 31 else None


def _new_tokens(value: Any) -> int | None:
    whole = as_whole(value)
    return whole if whole is not None and whole >= 1 else None


def _switch(value: Any) -> bool | None:
    return value if isinstance(value, bool) else None


RULES: Mapping[str, Rule] = {
    "temperature": Rule(f"a number from 0 (greedy) to {LARGEST_TEMPERATURE:,.0f}", _temperature),
    "top_k": Rule("a whole number (0 or less: all tokens)", _top_k),
    "top_p": Rule("a number from 0 to 1 (off)", _top_p),
    "seed": Rule("a whole number from 0 to 2^64 - 1, or -1 (another one each time)", _seed),
    "max_new_tokens": Rule("a whole number of at least 1", _new_tokens),
    "repetition_penalty": Rule("a number from 0.000001 to 1,000,000", _penalty),
    "no_repeat_ngram_size": Rule("a whole number from 0 (off) to 2^31 - 1", _count),
    "do_sample": Rule("true or false", _switch),
}
"""What each value must be."""


def read_value(name: str, value: Any, shown_name: str | None = None) -> Any:
    """Return the value to use for the option `name`.

    Raises `UsageError` for a value that means nothing; the sentence calls the option `shown_name`.

    >>> read_value("top_k", -1), read_value("temperature", 1e-320)
    (0, 0.0)
    >>> read_value("top_p", 2.0, "--top-p")
    Traceback (most recent call last):
    llama_onnx.targets.errors.UsageError: --top-p must be a number from 0 to 1 (off), not 2.0.
    """
    rule = RULES[name]
    read = rule.read(value)
    if read is None:
        raise UsageError(f"{shown_name or name} must be {rule.meaning}, not {shown(value)}.")
    return read


def _parameter(kind: type, explanation: str) -> Any:
    """A field that is None by default, with the metadata that interfaces show and check."""
    return field(default=None, metadata={"type": kind, "help": explanation})


@dataclass(frozen=True)
class Sampling:
    """How to choose the next token; None leaves a choice to the package, greedy by default.

    A temperature above 0, `top_k` or `top_p` turns sampling on; temperature 0 turns it off. Raises
    `UsageError` for a value out of range.

    >>> Sampling(temperature=0.7, seed=1).search_options(vocab_size=1000)
    {'temperature': 0.7, 'random_seed': 1, 'do_sample': True}
    """

    temperature: float | None = _parameter(float, "Sampling temperature; 0 is greedy.")
    top_k: int | None = _parameter(int, "Sample from the K likeliest tokens; 0 is all.")
    top_p: float | None = _parameter(
        float, "Sample from the likeliest tokens whose probabilities sum to P."
    )
    seed: int | None = _parameter(int, "Seed that makes sampling repeatable; -1 is a random one.")

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value is not None:
                object.__setattr__(self, name, read_value(name, value))

    def override(self, **given: Any) -> Sampling:
        """Return a copy with the `given` values that are not None."""
        values: dict[str, Any] = {k: v for k, v in given.items() if v is not None}
        return replace(self, **values)

    def to_json(self) -> dict[str, int | float]:
        """Return the parameters that are set, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def search_options(self, vocab_size: int) -> dict[str, bool | int | float]:
        """Return onnxruntime-genai's search options; for all others the package decides."""
        options: dict[str, bool | int | float] = dict(self.to_json())
        if self.seed is not None:
            del options["seed"]
            options["random_seed"] = fold_seed(self.seed)
        if options.keys() - {"random_seed"}:
            options["do_sample"] = True
        return genai_values(options, vocab_size)


def genai_values(options: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    """Return search options, read by `read_value`, as onnxruntime-genai means them.

    It refuses a `top_k` above the vocabulary, which is all tokens; takes `top_p` 0, the likeliest
    token alone, as off; and divides by a temperature of 0, which is greedy.
    """
    values = dict(options)
    if values.get("top_k", 0) >= vocab_size:
        values["top_k"] = 0
    if values.get("top_p", 1) < GREEDY_BELOW:
        values |= {"top_p": 1.0, "top_k": 1}
    if values.get("temperature") == 0:
        del values["temperature"]
        values["do_sample"] = False
    return values


def fold_seed(seed: int) -> int:
    """Return genai's seed for a seed of up to 64 bits: 31 bits, or -1 for a random one.

    Seeds below 2^31 stay as they are; of a larger one every bit counts, but two such seeds can give
    the same answer.

    >>> fold_seed(7), fold_seed(-1), fold_seed(2**32 - 1), fold_seed(2**64 - 1)
    (7, -1, 2147483646, 3)
    """
    if seed == RANDOM_SEED:
        return seed
    folded, low = 0, (1 << _GENAI_SEED_BITS) - 1
    while seed:
        folded ^= seed & low
        seed >>= _GENAI_SEED_BITS
    return folded


PARAMETERS = {entry.name: entry.metadata for entry in fields(Sampling)}
"""Name -> `type` and `help` of each field of `Sampling`."""

PACKAGE_DEFAULT = Sampling()
"""Leaves all choices to the package."""


def check_sampling(value: Any) -> Sampling:
    """Return `value`; raise `UsageError` unless it is a `Sampling`."""
    if not isinstance(value, Sampling):
        raise UsageError(
            f"sampling must be a Sampling, such as Sampling(top_k=5), not {shown(value)}."
        )
    return value
