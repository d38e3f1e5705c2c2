"""How much to measure: what was asked for, or what fits the packages that are open."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llama_onnx.runtime.bench.contender import Contender, Facts
from llama_onnx.runtime.bench.together import SLACK
from llama_onnx.runtime.bench.turns import Script
from llama_onnx.runtime.engine.schedule import Need
from llama_onnx.targets.errors import ResourceError, UsageError

PROMPT_TOKENS, NEW_TOKENS, REPEATS, STREAMS, TURNS = 512, 64, 5, (1, 2, 4, 8), 10

_SIZES = (26, 32), (8, 16), (3, 8), (1, 4)
"""Words of a message and tokens of an answer, the first of which that fits."""


@dataclass(frozen=True)
class Wanted:
    """What the caller asks for; None leaves the choice to us."""

    prompt_tokens: int | None = None
    new_tokens: int | None = None
    repeats: int = REPEATS
    streams: tuple[int, ...] | None = None
    turns: int | None = None

    def check(self) -> None:
        """Raise `UsageError` for numbers that mean nothing."""
        numbers = {
            "repeats": self.repeats,
            "prompt tokens": self.prompt_tokens,
            "new tokens": self.new_tokens,
            "turns": self.turns,
        }
        streams = [("streams", number) for number in self.streams or ()]
        for what, number in [*numbers.items(), *streams]:
            if number is not None and number < 1:
                raise UsageError(f"the number of {what} must be at least 1, not {number}.")


@dataclass(frozen=True)
class Workload:
    """What is measured, the same for all packages; `left_out` says what is not, and why."""

    prompt_tokens: int
    new_tokens: int
    repeats: int
    streams: tuple[int, ...]
    script: Script
    left_out: tuple[str, ...]


def decide(wanted: Wanted, contenders: Sequence[Contender]) -> Workload:
    """Return what to measure of all `contenders`.

    Raises `UsageError` and `ResourceError` for what was asked for and does not fit.
    """
    facts = [contender.facts for contender in contenders]
    smallest = min(facts, key=lambda one: one.context_length)
    context = smallest.context_length
    prompt = _fit(wanted.prompt_tokens, PROMPT_TOKENS, context // 2)
    new = _fit(wanted.new_tokens, NEW_TOKENS, context // 4)
    _check_context(prompt, new, smallest)
    streams, left = _streams(wanted.streams, facts, prompt, new)
    rooms = [one.capacity.positions for one in facts if one.capacity is not None]
    script, missing = _script(wanted.turns, contenders, min([context, *rooms]))
    return Workload(prompt, new, wanted.repeats, streams, script, (*left, *missing))


def _fit(given: int | None, default: int, room: int) -> int:
    return min(default, room) if given is None else given


def _check_context(prompt: int, new: int, facts: Facts) -> None:
    if prompt >= facts.context_length:
        raise UsageError(
            f"the prompt has {prompt:,} tokens, but the context holds {facts.context_length:,} "
            f"({facts.package}) and an answer needs room too: pass fewer --prompt-tokens."
        )
    if prompt + new > facts.context_length:
        raise UsageError(
            f"a prompt of {prompt:,} and {new:,} new tokens are more than the context of "
            f"{facts.context_length:,} tokens can hold ({facts.package}): ask for fewer."
        )


def _streams(
    given: tuple[int, ...] | None, facts: Sequence[Facts], prompt: int, new: int
) -> tuple[tuple[int, ...], list[str]]:
    """Return the numbers of streams to measure, 1 among them if any, and what is left out."""
    engines = [one for one in facts if one.capacity is not None]
    if not engines:
        reason = "onnxruntime-genai generates one answer at a time"
        if given is not None and given != (1,):
            raise UsageError(f"{reason}: leave out --streams, or choose --engine onnxruntime.")
        return (), [f"answers at once, and the bytes of caches: {reason}."]
    if new < 2:
        if given is not None:
            raise UsageError("streams are measured over at least 2 new tokens: pass more.")
        return (), ["answers at once: that takes at least 2 new tokens."]
    left = []
    if len(engines) < len(facts):
        left.append(
            "answers at once with onnxruntime-genai, and the bytes of its caches: it generates one "
            "at a time."
        )
    counts = []
    for count in sorted({1, *(STREAMS if given is None else given)}):
        problem = next(filter(None, (_problem(one, count, prompt, new) for one in engines)), None)
        if problem is None:
            counts.append(count)
        elif given is not None:
            raise problem
        else:
            left.append(f"{count} streams: {problem}")
    return tuple(counts), left


def _problem(facts: Facts, count: int, prompt: int, new: int) -> ResourceError | UsageError | None:
    """Return why an engine cannot generate `count` answers at once."""
    assert facts.capacity is not None
    if count > facts.capacity.rows:
        return UsageError(
            f"the engine generates at most {facts.capacity.rows} answers at once: pass no more "
            "--streams."
        )
    length = min(prompt + new + SLACK * (count - 1), facts.context_length)
    if not facts.capacity.holds([Need(None, length)] * count):
        return ResourceError(
            f"not enough memory for {count} caches of {length:,} tokens: there is room for "
            f"{facts.capacity.positions:,} tokens in all; pass fewer --streams or --prompt-tokens."
        )
    return None


def _script(
    given: int | None, contenders: Sequence[Contender], room: int
) -> tuple[Script, list[str]]:
    """Return the longest messages and answers of which `given` turns fit, else fewer turns."""
    text = all(contender.facts.chat for contender in contenders)
    left = [] if text else ["a chat in text: without a chat template, turns are token ids."]
    turns = TURNS if given is None else given
    for words, answer in _SIZES:
        script = Script(turns, words, answer, text, room)
        if max(contender.chat_length(script) for contender in contenders) <= room:
            return script, left
    if given is not None:
        raise UsageError(
            f"a chat of {turns} turns does not fit {room:,} tokens, which is what the context and "
            "the caches hold: pass fewer --turns."
        )
    return script, left  # as many turns as fit
