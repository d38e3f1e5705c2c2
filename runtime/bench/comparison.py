"""Two packages measured in turns: which is faster, and whether chance could be the reason."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from llama_onnx.runtime.bench.contender import Facts
from llama_onnx.runtime.bench.timings import Gaps, Runs, SingleRun, Spread


@dataclass(frozen=True)
class Comparison:
    """One figure of both packages.

    `ratio` is the speed of the second relative to the first, above 1 where the second is faster,
    over pairs of runs that followed each other. `exceeds`: all pairs agree on which is faster, so
    the difference is more than the spread; None with a single pair, which has no spread.
    """

    figure: str
    ratio: Spread
    exceeds: bool | None
    sentence: str


def compare(
    first: Runs, second: Runs, names: tuple[str, str], numbers: Sequence[int]
) -> tuple[Comparison, ...]:
    """Compare all figures that both have; `numbers` are those of streams."""
    found = []
    for figure, speeds, others in _figures(first, second, numbers):
        pairs = [b / a for a, b in zip(speeds, others, strict=True) if a > 0 and b > 0]
        if pairs:
            found.append(_judge(figure, pairs, names))
    return tuple(found)


def label(packages: tuple[str, str], engines: tuple[str, str]) -> tuple[str, str]:
    """Return short names of two packages, which differ.

    >>> label(("a/x", "b/y"), ("genai", "genai"))
    ('x', 'y')
    >>> label(("a/x", "a/x"), ("genai", "onnxruntime"))
    ('x (genai)', 'x (onnxruntime)')
    """
    names = [Path(package).resolve().name for package in packages]
    if names[0] == names[1]:
        names = [f"{name} ({engine})" for name, engine in zip(names, engines, strict=True)]
    if names[0] == names[1]:
        names = [f"{names[0]}, first", f"{names[1]}, second"]
    return names[0], names[1]


def same(first: Facts, second: Facts) -> bool:
    """Return whether two packages have the same files and run in the same way."""
    ways = [(one.content, one.engine, one.provider["name"]) for one in (first, second)]
    return ways[0] == ways[1]


def _figures(
    first: Runs, second: Runs, numbers: Sequence[int]
) -> Iterator[tuple[str, list[float], list[float]]]:
    """Yield the name of each figure and its values as speeds, higher is better."""
    both = first, second

    def pair(speed: Callable[[SingleRun], float]) -> tuple[list[float], list[float]]:
        a, b = ([speed(run) for run in runs.single] for runs in both)
        return a, b

    yield "prefill", *pair(lambda run: run.prefill_rate)
    yield "first token", *pair(lambda run: 1 / run.first_token_seconds)
    if all(run.gaps for runs in both for run in runs.single):
        yield "decode", *pair(lambda run: run.decode_rate or 0)
        yield "token to token, median", *pair(lambda run: 1 / Gaps.of(run.gaps).p50)
    if first.streams and second.streams:
        for index, number in enumerate(numbers):
            a, b = ([row[index].rate for row in runs.streams] for runs in both)
            yield f"decode of {name_streams(number)}", a, b
    for turn in shown_turns(min(len(chat) for runs in both for chat in runs.turns)):
        a, b = ([1 / chat[turn - 1].first_token_seconds for chat in runs.turns] for runs in both)
        yield f"first token of turn {turn}", a, b


def name_streams(number: int) -> str:
    """Return how many streams, in words."""
    return "one stream" if number == 1 else f"{number} streams"


def shown_turns(turns: int) -> list[int]:
    """Return the turns to show of a chat: the first, the middle one and the last.

    >>> shown_turns(10), shown_turns(2), shown_turns(0)
    ([1, 5, 10], [1, 2], [])
    """
    return sorted({1, max(1, turns // 2), turns}) if turns else []


def _judge(figure: str, pairs: Sequence[float], names: tuple[str, str]) -> Comparison:
    ratio = Spread.of(pairs)
    exceeds = None if len(pairs) < 2 else ratio.least > 1 or ratio.most < 1
    faster, slower = (names[1], names[0]) if ratio.median >= 1 else names
    shown = ratio
    if ratio.median < 1:
        shown = Spread(1 / ratio.median, 1 / ratio.most, 1 / ratio.least)
    factor = f"{shown.median:.2f} times as fast as {slower}"
    extremes = f"{shown.least:.2f} to {shown.most:.2f}"
    if exceeds is None:
        sentence = f"{faster} is {factor} in the only pair of runs, which says little."
    elif exceeds:
        sentence = f"{faster} is {factor} ({extremes}), more than the spread of the runs."
    else:
        sentence = f"no difference beyond the spread: {faster} is {factor} ({extremes})."
    return Comparison(figure, ratio, exceeds, f"{figure}: {sentence}")
