"""How the next token is chosen: one reading of every value, wherever it comes from.

generation_config.json, the command line, Python and servers all pass their values to `read_value`,
which takes them as llama.cpp, transformers and OpenAI's API do where these agree. A refusal names
the option as its caller wrote it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from llama_onnx.runtime.engine.sampling.arguments import as_float, as_whole
from llama_onnx.targets.errors import UsageError
from llama_onnx.targets.printable import shown

GREEDY_BELOW = 1e-6
"""Smaller temperatures are greedy: logits that differ by 1e-4 are then 100 nats apart, and the
smallest temperatures would be zero in float32."""

LARGEST_TEMPERATURE = 1e6
RANDOM_SEED = -1
"""Asks for another seed at each answer, as llama.cpp's -1 does."""

MOST_BIASES = 1024
"""Most tokens that `logit_bias` names."""

MOST_LOGPROBS = 20
"""Most alternatives to a token, as in OpenAI's API."""

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


def _share(value: Any) -> float | None:
    number = as_float(value)
    return number if number is not None and 0 <= number <= 1 else None


def _seed(value: Any) -> int | None:
    whole = as_whole(value)
    return whole if whole is not None and RANDOM_SEED <= whole < _SEEDS else None


def _penalty(value: Any) -> float | None:
    number = as_float(value)
    return number if number is not None and 1e-6 <= number <= 1e6 else None


def _openai_penalty(value: Any) -> float | None:
    number = as_float(value)
    return number if number is not None and -2 <= number <= 2 else None


def _alternatives(value: Any) -> int | None:
    whole = as_whole(value)
    return whole if whole is not None and 0 <= whole <= MOST_LOGPROBS else None


def _biases(value: Any) -> tuple[tuple[int, float], ...] | None:
    """Read a mapping, whose keys may be texts as in JSON, or the pairs that this returns."""
    if not isinstance(value, (Mapping, list, tuple)) or len(value) > MOST_BIASES:
        return None
    biases: dict[int, float] = {}
    for pair in value.items() if isinstance(value, Mapping) else value:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            return None
        token, bias = _token(pair[0]), as_float(pair[1])
        if token is None or token in biases or bias is None or not -100 <= bias <= 100:
            return None
        biases[token] = bias
    return tuple(sorted(biases.items()))


def _token(value: Any) -> int | None:
    if isinstance(value, str):
        value = int(value) if value.isascii() and value.isdecimal() and len(value) < 11 else None
    return _count(value)


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
    "top_p": Rule("a number from 0 to 1 (off)", _share),
    "min_p": Rule("a number from 0 (off) to 1", _share),
    "seed": Rule("a whole number from 0 to 2^64 - 1, or -1 (another one each time)", _seed),
    "max_new_tokens": Rule("a whole number of at least 1", _new_tokens),
    "repetition_penalty": Rule("a number from 0.000001 to 1,000,000", _penalty),
    "presence_penalty": Rule("a number from -2 to 2 (0: off)", _openai_penalty),
    "frequency_penalty": Rule("a number from -2 to 2 (0: off)", _openai_penalty),
    "logit_bias": Rule(
        f"at most {MOST_BIASES:,} token ids, each with a number from -100 to 100", _biases
    ),
    "logprobs": Rule(f"a whole number from 0 to {MOST_LOGPROBS}", _alternatives),
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


def _parameter(kind: type, explanation: str, *, samples: bool = False, genai: bool = True) -> Any:
    """A field that is None by default, with the metadata that interfaces show and check.

    `samples`: it has no effect on a greedy answer. `genai`: onnxruntime-genai 0.18 can do it.
    """
    metadata = {"type": kind, "help": explanation, "samples": samples, "genai": genai}
    return field(default=None, metadata=metadata)


@dataclass(frozen=True)
class Sampling:
    """How to choose the next token; None leaves a choice to the package, greedy by default.

    A temperature above 0, `top_k`, `top_p` or `min_p` turns sampling on; temperature 0 turns it
    off. `repetition_penalty` counts the prompt's tokens too, `presence_penalty` and
    `frequency_penalty` those of the answer. `logit_bias` is a number for each token id, added to
    its logit. `logprobs` asks for the log probability of each token, and of so many alternatives.
    Raises `UsageError` for a value out of range.

    >>> Sampling(temperature=0.7, seed=1).search_options(vocab_size=1000)
    {'temperature': 0.7, 'random_seed': 1, 'do_sample': True}
    >>> Sampling(logit_bias={7: -100}).logit_bias
    ((7, -100.0),)
    """

    temperature: float | None = _parameter(
        float, "Sampling temperature; 0 is greedy.", samples=True
    )
    top_k: int | None = _parameter(
        int, "Sample from the K likeliest tokens; 0 is all.", samples=True
    )
    top_p: float | None = _parameter(
        float, "Sample from the likeliest tokens whose probabilities sum to P.", samples=True
    )
    seed: int | None = _parameter(
        int, "Seed that makes sampling repeatable; -1 is a random one.", samples=True
    )
    min_p: float | None = _parameter(
        float,
        "Sample from tokens that are at least P times as likely as the likeliest.",
        samples=True,
        genai=False,
    )
    repetition_penalty: float | None = _parameter(
        float, "Divide the logits of tokens that the text has by this; 1 is off."
    )
    presence_penalty: float | None = _parameter(
        float, "Lower the logits of tokens that the answer has by this.", genai=False
    )
    frequency_penalty: float | None = _parameter(
        float, "Lower a token's logit by this for each time the answer has it.", genai=False
    )
    logit_bias: Mapping[int, float] | Sequence[tuple[int, float]] | None = _parameter(
        dict, "Add a number from -100 to 100 to a token's logit; may be repeated.", genai=False
    )
    logprobs: int | None = _parameter(
        int, "Log probabilities of each token and of N alternatives.", genai=False
    )

    def __post_init__(self) -> None:
        for name in PARAMETERS:
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, read_value(name, value))

    def override(self, **given: Any) -> Sampling:
        """Return a copy with the `given` values that are not None."""
        values: dict[str, Any] = {k: v for k, v in given.items() if v is not None}
        return replace(self, **values)

    def to_json(self) -> dict[str, Any]:
        """Return the parameters that are set, by name."""
        values = {name: value for name, value in asdict(self).items() if value is not None}
        if "logit_bias" in values:
            values["logit_bias"] = {str(token): bias for token, bias in values["logit_bias"]}
        return values

    def turns_sampling_on(self) -> bool | None:
        """Return whether the answer is sampled; None leaves that to the package."""
        if self.temperature == 0:
            return False
        asked = (self.temperature, self.top_k, self.top_p, self.min_p)
        return True if any(value is not None for value in asked) else None

    def search_options(self, vocab_size: int) -> dict[str, bool | int | float]:
        """Return onnxruntime-genai's search options; for all others the package decides.

        Raises `UsageError` for what it cannot do.
        """
        refuse_what_genai_cannot(self)
        known = (name for name, metadata in PARAMETERS.items() if metadata["genai"])
        options = {name: getattr(self, name) for name in known if getattr(self, name) is not None}
        if "seed" in options:
            options["random_seed"] = fold_seed(options.pop("seed"))
        if self.turns_sampling_on():
            options["do_sample"] = True
        return genai_values(options, vocab_size)


def refuse_what_genai_cannot(
    sampling: Sampling, shown_name: Callable[[str], str] = lambda name: name
) -> None:
    """Raise `UsageError` that names what onnxruntime-genai 0.18 cannot do; `shown_name` returns
    the caller's name of a field. A value that changes nothing, such as a penalty of 0, passes."""
    names = [
        shown_name(name)
        for name, metadata in PARAMETERS.items()
        if not metadata["genai"] and _changes_something(name, getattr(sampling, name))
    ]
    if names:
        raise UsageError(
            f"onnxruntime-genai, which generates here, has no {' and no '.join(names)}: leave "
            f"{'it' if len(names) == 1 else 'them'} out, or choose the engine onnxruntime "
            "(--engine onnxruntime)."
        )


def _changes_something(name: str, value: Any) -> bool:
    return bool(value) or (name == "logprobs" and value is not None)


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
"""Name -> `type`, `help`, `samples` and `genai` of each field of `Sampling`."""

PACKAGE_DEFAULT = Sampling()
"""Leaves all choices to the package."""


def check_sampling(value: Any) -> Sampling:
    """Return `value`; raise `UsageError` unless it is a `Sampling`."""
    if not isinstance(value, Sampling):
        raise UsageError(
            f"sampling must be a Sampling, such as Sampling(top_k=5), not {shown(value)}."
        )
    return value
