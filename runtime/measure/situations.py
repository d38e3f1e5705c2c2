"""The ways in which an application feeds a graph; all must give the same logits at a position.

A situation turns passages of known ids into steps, which are data: a session of the whole graph can
run them, or sessions of its parts in turn. At each position the logits must be those that a
reference computes in one pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from llama_onnx.runtime.measure.graph_session import Cache, GraphSession, SharedBuffer
from llama_onnx.runtime.measure.metrics import Ids, Logits
from llama_onnx.runtime.memory import trim_heap
from llama_onnx.targets.errors import PackageError

LENGTHS = (1, 2, 31, 32, 33, 127, 128, 129)
"""Lengths around the edges of the blocks that kernels work in."""

LONG = (2047, 2048, 2049)
"""Lengths around 2048, which Llama 1 was trained on and many kernels' tables are made for."""

_BATCH_LENGTH = 48  # longest row of a batch, and of concurrent conversations
_SHORT = 16  # the same where a token takes long
_BATCH_STEPS = 3
_CHUNKS = (1, 2, 31, 33)
_TWO_STEPS = 4
_TRIM = 16  # steps between two calls of trim_heap


@dataclass(frozen=True)
class Passage:
    """Token ids [N]: the first `prompt` are a prompt, the others are fed one by one."""

    ids: Ids
    prompt: int


@dataclass(frozen=True)
class Row:
    """The logits to compare in row `batch` of a step: those at `outputs`.

    They belong to positions `first` and following of passage number `passage`.
    """

    passage: int
    batch: int
    outputs: slice
    first: int


@dataclass(frozen=True)
class Step:
    """A call of the graph: `ids` [B, S] with `mask` [B, T], after the cache of step `past`.

    `past` is an index of the program, None for an empty cache. Of that cache the first `keep`
    positions are used (None: all). `rows` are the logits to compare.
    """

    ids: Ids
    mask: Ids
    past: int | None
    rows: tuple[Row, ...]
    keep: int | None = None


@dataclass(frozen=True)
class Observation:
    """Logits [n, V] at the `positions` [n] of passage number `passage`."""

    passage: int
    positions: Ids
    logits: Logits


Program = Sequence[Step]
Runner = Callable[[GraphSession, Program], Iterator[Observation]]


def observe(step: Step, logits: Logits) -> Iterator[Observation]:
    """Yield the logits selected by the rows of `step` from its `logits` [B, S, V].

    A graph that computes the last position only gives [B, 1, V].
    """
    length = step.ids.shape[1]
    for row in step.rows:
        start, stop, _ = row.outputs.indices(length)
        positions = np.arange(row.first, row.first + stop - start)
        if logits.shape[1] == length:
            yield Observation(row.passage, positions, logits[row.batch, start:stop])
        else:
            yield Observation(row.passage, positions[-1:], logits[row.batch])


# Ways to run a program on a whole session


def run_plainly(graph: GraphSession, program: Program) -> Iterator[Observation]:
    """Run one step after the other; drop each cache after the last step that reads it."""
    caches = Caches(program)
    for index, step in enumerate(program):
        logits, present = graph.batch_step(step.ids, step.mask, caches.before(index))
        caches.put(index, present)
        del present
        if index % _TRIM == _TRIM - 1:  # growing caches leave holes in the heap
            trim_heap()
        yield from observe(step, logits)


class Caches:
    """The caches that later steps of a running program need."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._last_use = {step.past: index for index, step in enumerate(program)}
        self._kept: dict[int, Cache] = {}

    def before(self, index: int) -> Cache | None:
        """Return the cache that step number `index` starts from; None for an empty one."""
        step = self._program[index]
        if step.past is None:
            return None
        cache = self._kept[step.past]
        if self._last_use[step.past] == index:
            del self._kept[step.past]
        if step.keep is None:
            return cache
        # Copied a layer at a time, each freed at once, so that memory never holds both in full.
        whole = dict(cache)
        del cache
        return {
            name: np.ascontiguousarray(whole.pop(name)[:, :, : step.keep]) for name in list(whole)
        }

    def put(self, index: int, cache: Cache) -> None:
        """Keep the cache that step number `index` returned if a later step reads it."""
        if index in self._last_use:
            self._kept[index] = cache


def run_in_two_threads(graph: GraphSession, program: Program) -> Iterator[Observation]:
    """Run the passages of a program concurrently, each in its own thread."""
    passages = sorted({row.passage for step in program for row in step.rows})
    parts = [_only(program, passage) for passage in passages]
    with ThreadPoolExecutor(len(parts)) as pool:
        for found in pool.map(lambda part: list(run_plainly(graph, part)), parts):
            yield from found


def run_in_one_buffer(graph: GraphSession, program: Program) -> Iterator[Observation]:
    """Run conversations one after the other, each with past and present in one buffer."""
    longest = max(step.mask.shape[1] for step in program)
    for step in program:
        if step.past is None:
            buffer = SharedBuffer(graph, longest + 8)
        yield from observe(step, buffer.step(step.ids[0])[None])


def _only(program: Program, passage: int) -> Program:
    """Return the steps of one passage, `past` renumbered among them."""
    chosen = [i for i, step in enumerate(program) if step.rows[0].passage == passage]
    steps = (program[i] for i in chosen)
    return [replace(s, past=None if s.past is None else chosen.index(s.past)) for s in steps]


# Programs


def prefill(passages: Sequence[Passage]) -> Program:
    """Return a program that reads each passage in one pass."""
    return [_pass(index, p.ids) for index, p in enumerate(passages)]


def decode(passages: Sequence[Passage]) -> Program:
    """Return a program that reads each prompt in one pass, then one token at a time."""
    return join(_pieces(i, p.ids, _singles(p.prompt, len(p.ids))) for i, p in enumerate(passages))


def chunks(passages: Sequence[Passage]) -> Program:
    """Return a program that reads the longest passage in pieces of several lengths."""
    index, ids = _longest(passages)
    bounds = [int(bound) for bound in np.cumsum(_CHUNKS) if bound < len(ids)]
    return _pieces(index, ids, [*bounds, len(ids)])


def lengths(passages: Sequence[Passage]) -> Program:
    """Return a program that reads beginnings of `LENGTHS` tokens, each in one pass."""
    index, ids = _longest(passages)
    return [_pass(index, ids[:length]) for length in LENGTHS if length <= len(ids)]


def rewind(passages: Sequence[Passage]) -> Program:
    """Return a program that reads all, cuts the cache to one half, and reads the rest again."""
    index, ids = _longest(passages)
    half = len(ids) // 2
    whole = _pass(index, ids)
    if not half:
        return [whole]
    rows = (Row(index, 0, slice(None), half),)
    return [whole, Step(ids[None, half:], _ones(len(ids)), 0, rows, keep=half)]


def two_at_once(passages: Sequence[Passage], longest: int = _BATCH_LENGTH) -> Program:
    """Return a program of the beginnings of two conversations, each ending in single steps."""
    beginnings = [p.ids[:longest] for p in passages[:2]]
    return join(
        _pieces(i, ids, _singles(max(1, len(ids) - _TWO_STEPS), len(ids)))
        for i, ids in enumerate(beginnings)
    )


def one_conversation(passages: Sequence[Passage]) -> Program:
    """Return a program that decodes the longest passage."""
    index, ids = _longest(passages)
    return _pieces(index, ids, _singles(passages[index].prompt, len(ids)))


def long(passages: Sequence[Passage]) -> Program:
    """Return a program that crosses positions `LONG` and the context's end in single steps."""
    index, ids = _longest(passages)
    ends = sorted({e for e in (*LONG, *range(len(ids) - 2, len(ids) + 1)) if 0 < e <= len(ids)})
    return [
        replace(step, rows=(Row(index, 0, slice(-1, None), end - 1),))
        for step, end in zip(_pieces(index, ids, ends), ends, strict=True)
    ]


def left_padding(passages: Sequence[Passage], longest: int = _BATCH_LENGTH) -> Program:
    """Return a program of one batch padded on the left, then a few steps."""
    return _batch(passages, longest, left=True)


def right_padding(passages: Sequence[Passage], longest: int = _BATCH_LENGTH) -> Program:
    """Return a program of one batch padded on the right, then a few steps."""
    return _batch(passages, longest, left=False)


@dataclass(frozen=True)
class Situation:
    """A way to feed a graph: `program` makes the steps, `run` runs them; `meaning` describes it."""

    name: str
    meaning: str
    program: Callable[[Sequence[Passage]], Program]
    run: Runner = run_plainly


PREFILL = Situation("prefill", "one pass", prefill)
DECODE = Situation("decode", "token by token", decode)
WHOLE = (PREFILL, DECODE)
"""The situations that look at every position of every passage."""

LONG_CONTEXT = Situation("long", "up to the context's end", long)
SITUATIONS = (
    PREFILL,
    DECODE,
    Situation("chunks", "in chunks", chunks),
    Situation("lengths", "lengths 1 to 129", lengths),
    Situation("left_padding", "batch, padded left", left_padding),
    Situation("right_padding", "batch, padded right", right_padding),
    Situation("rewind", "rewound and continued", rewind),
    Situation("two_at_once", "two at once", two_at_once, run_in_two_threads),
    Situation("shared_buffer", "shared KV buffer", one_conversation, run_in_one_buffer),
)
"""The situations to try every package in. `LONG_CONTEXT` takes longer and needs a long passage."""


def situations_of(
    *, shared_buffer: bool, continues: bool = True, short: bool = False
) -> tuple[Situation, ...]:
    """Return the situations that apply, depending on whether past and present can share a buffer.

    Where attention cannot add several tokens to a cache (not `continues`), only `WHOLE` apply, in
    one buffer. `short`: batches, and two at once, have the first tokens of each passage only.
    """
    if not continues:
        return tuple(replace(situation, run=run_in_one_buffer) for situation in WHOLE)
    applying = (s for s in SITUATIONS if shared_buffer or s.run is not run_in_one_buffer)
    return tuple(_shortened(s) if short else s for s in applying)


def _shortened(situation: Situation) -> Situation:
    if situation.program not in (left_padding, right_padding, two_at_once):
        return situation
    return replace(situation, program=partial(situation.program, longest=_SHORT))


def looks_everywhere(situation: Situation) -> bool:
    """Whether `situation` is one of `WHOLE`, which look at every position of every passage."""
    return situation.name in {whole.name for whole in WHOLE}


def try_situation(
    situation: Situation, graph: GraphSession, passages: Sequence[Passage]
) -> Iterator[Observation]:
    """Run `situation`; a `PackageError` names the situation in which the graph failed."""
    try:
        yield from situation.run(graph, situation.program(passages))
    except PackageError as error:
        raise PackageError(f"{error} (situation: {situation.meaning})") from None


def _pass(index: int, ids: Ids) -> Step:
    return Step(ids[None], _ones(len(ids)), None, (Row(index, 0, slice(None), 0),))


def _pieces(index: int, ids: Ids, ends: Sequence[int]) -> list[Step]:
    """Return steps over `ids` in pieces that end at `ends`, each continuing the one before."""
    starts = [0, *ends[:-1]]
    return [
        Step(
            ids[None, start:end],
            _ones(end),
            number - 1 if number else None,
            (Row(index, 0, slice(None), start),),
        )
        for number, (start, end) in enumerate(zip(starts, ends, strict=True))
    ]


def _singles(prompt: int, length: int) -> list[int]:
    return list(range(prompt, length + 1))


def join(programs: Iterable[Program]) -> Program:
    """Return one program that runs all `programs`, one after the other."""
    joined: list[Step] = []
    for program in programs:
        base = len(joined)
        joined += [replace(s, past=None if s.past is None else s.past + base) for s in program]
    return joined


def merge(programs: Sequence[Program]) -> tuple[Program, list[tuple[int, ...]]]:
    """Return one program that runs each different step of `programs` once, and for each of its
    steps the programs that have it.

    Steps are the same if they feed the same ids, mask and cache, so that only a graph without
    state, such as a piece of one, may run them once for all.
    """
    merged: list[Step] = []
    owners: list[tuple[int, ...]] = []
    known: dict[tuple[object, ...], int] = {}
    for number, program in enumerate(programs):
        places: list[int] = []  # in the merged program
        for step in program:
            moved = replace(step, past=None if step.past is None else places[step.past])
            place = known.setdefault(_identity(moved), len(merged))
            if place == len(merged):
                merged.append(moved)
                owners.append(())
            if number not in owners[place]:
                owners[place] = (*owners[place], number)
            places.append(place)
    return merged, owners


def _identity(step: Step) -> tuple[object, ...]:
    rows = tuple(
        (row.passage, row.batch, row.outputs.start, row.outputs.stop, row.first)
        for row in step.rows
    )
    shape = (step.ids.shape, step.mask.shape)
    return shape, step.ids.tobytes(), step.mask.tobytes(), step.past, step.keep, rows


def _batch(passages: Sequence[Passage], longest: int, *, left: bool) -> Program:
    rows = [p.ids[:longest] for p in passages]
    # Different lengths, and room for some steps: every row gets a different padding.
    lengths = [max(1, len(row) - _BATCH_STEPS - i) for i, row in enumerate(rows)]
    width = max(lengths)
    ids = np.zeros((len(rows), width), np.int64)
    mask = np.zeros_like(ids)
    parts = [slice(width - n, width) if left else slice(n) for n in lengths]
    for i, (row, part, n) in enumerate(zip(rows, parts, lengths, strict=True)):
        ids[i, part], mask[i, part] = row[:n], 1
    program = [Step(ids, mask, None, tuple(Row(i, i, part, 0) for i, part in enumerate(parts)))]
    steps = min(_BATCH_STEPS, *(len(row) - n for row, n in zip(rows, lengths, strict=True)))
    for step in range(steps):
        ids = np.array([[row[n + step]] for row, n in zip(rows, lengths, strict=True)])
        mask = np.concatenate([mask, np.ones_like(ids)], axis=1)
        seen = tuple(Row(i, i, slice(None), n + step) for i, n in enumerate(lengths))
        program.append(Step(ids, mask, step, seen))
    return program


def _longest(passages: Sequence[Passage]) -> tuple[int, Ids]:
    index = max(range(len(passages)), key=lambda i: len(passages[i].ids))
    return index, passages[index].ids


def _ones(length: int) -> Ids:
    return np.ones((1, length), np.int64)
