"""Measure how fast a package runs on this machine: medians of several runs, and their spread."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from llama_onnx.runtime.bench.apart import Apart
from llama_onnx.runtime.bench.comparison import Comparison, compare, label, same
from llama_onnx.runtime.bench.contender import Contender, Facts, Here, Opening
from llama_onnx.runtime.bench.timings import (
    Caches,
    Gaps,
    Runs,
    SingleRun,
    Spread,
    Streams,
    StreamsRun,
    Turn,
    TurnRun,
    gather_streams,
    gather_turns,
)
from llama_onnx.runtime.bench.workload import REPEATS, Wanted, Workload, decide
from llama_onnx.runtime.doctor.gather import gather_processor
from llama_onnx.targets.engines import EngineName
from llama_onnx.targets.progress import SILENT, Progress
from llama_onnx.targets.provider import Provider


@dataclass(frozen=True)
class Bench:
    """What was measured, and how.

    `prefill_rate` and `decode_rate` are in tokens per second, `first_token_seconds` is the time
    from the prompt to the first token, `inter_token_seconds` the time from each token to the next.
    `streams` has answers generated at once, `turns` those of a chat. `load_seconds` is the time of
    a single load; it depends on how much of the files the system has cached. `resident` and `peak`
    are the bytes of memory that the process uses after loading and at most, mapped files included;
    None where the system does not report them. `processor` is the name of what ran it, of which
    `processors` could be used; `threads` None uses all. `left_out` says what was not measured, and
    why. `against` is another package that took turns with this one, `comparison` what differs.
    """

    package: str
    precision: str
    provider: dict[str, Any]
    engine: EngineName
    threads: int | None
    prompt_tokens: int
    new_tokens: int
    repeats: int
    load_seconds: float
    first_token_seconds: Spread
    prefill_rate: Spread
    decode_rate: Spread | None
    resident: int | None
    peak: int | None
    inter_token_seconds: Gaps | None
    streams: tuple[Streams, ...]
    turns: tuple[Turn, ...]
    caches: Caches | None
    left_out: tuple[str, ...]
    processor: str | None
    processors: int | None
    runs: Runs
    against: Bench | None = None
    comparison: tuple[Comparison, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The short name of the package, and that of the other one, if there is one."""
        if self.against is None:
            return (Path(self.package).resolve().name,)
        other = self.against
        return label((self.package, other.package), (self.engine, other.engine))

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return asdict(self)


def bench(
    package: Path,
    *,
    prompt_tokens: int | None = None,
    new_tokens: int | None = None,
    repeats: int = REPEATS,
    streams: tuple[int, ...] | None = None,
    turns: int | None = None,
    threads: int | None = None,
    provider: Provider | None = None,
    allow_fallback: bool = False,
    engine: EngineName | None = None,
    against: Path | None = None,
    against_engine: EngineName | None = None,
    progress: Progress = SILENT,
) -> Bench:
    """Measure the package at `package` in `engine` (None: that of `Llama.load`), after a warm-up.

    `prompt_tokens` and `new_tokens` default to 512 and 64, or to fewer if the context is short;
    `streams` to 1, 2, 4 and 8, `turns` to 10, as far as they fit. `against` is measured in turns
    with `package`, each in a process of its own, in `against_engine` (None: the same engine).

    Raises what `Llama.load` raises, `UsageError` for numbers below 1 or more than the context
    holds, and `ResourceError` for `streams` that do not fit the memory.
    """
    wanted = Wanted(prompt_tokens, new_tokens, repeats, streams, turns)
    wanted.check()
    opening = Opening(package, engine, threads, provider, allow_fallback)
    openings = [opening]
    if against is not None:
        other = against_engine or engine
        openings.append(Opening(against, other, threads, provider, allow_fallback))
    progress.step("loading")
    with ExitStack() as stack:
        contenders: list[Contender] = [Here(opening)] if against is None else []
        for one in openings if against is not None else ():
            contenders.append(stack.enter_context(closing(Apart(one))))
        workload = decide(wanted, contenders)
        runs = _measure(contenders, workload, progress)
        found = [
            _summarize(contender, measured, workload, threads)
            for contender, measured in zip(contenders, runs, strict=True)
        ]
        facts = [contender.facts for contender in contenders]
    if len(found) == 1:
        return found[0]
    return _join(found, runs, facts, workload)


def _join(
    found: Sequence[Bench], runs: Sequence[Runs], facts: Sequence[Facts], workload: Workload
) -> Bench:
    """Return the first with the second inside, and what differs."""
    first = replace(found[0], against=found[1])
    alike = "Both are the same package in the same engine: what differs is noise."
    return replace(
        first,
        comparison=compare(runs[0], runs[1], (first.names[0], first.names[1]), workload.streams),
        notes=(alike,) if same(facts[0], facts[1]) else (),
    )


def _measure(contenders: Sequence[Contender], workload: Workload, progress: Progress) -> list[Runs]:
    """Run everything `workload.repeats` times; in each repetition another contender is first."""
    prompt, new, script = workload.prompt_tokens, workload.new_tokens, workload.script
    single: list[list[SingleRun]] = [[] for _ in contenders]
    streams: list[list[tuple[StreamsRun, ...]]] = [[] for _ in contenders]
    turns: list[list[tuple[TurnRun, ...]]] = [[] for _ in contenders]
    progress.step("warming up")
    for contender in contenders:
        contender.single(prompt, new)
    for number in range(workload.repeats):
        order = [(number + index) % len(contenders) for index in range(len(contenders))]
        progress.update("measuring one answer", 3 * number, 3 * workload.repeats)
        for index in order:
            single[index].append(contenders[index].single(prompt, new))
        progress.update("measuring answers at once", 3 * number + 1, 3 * workload.repeats)
        rows: list[list[StreamsRun]] = [[] for _ in contenders]
        for count in workload.streams:
            for index in order:
                if contenders[index].facts.capacity is not None:
                    rows[index].append(contenders[index].streams(count, prompt, new))
        progress.update("measuring a chat", 3 * number + 2, 3 * workload.repeats)
        for index in order:
            streams[index].append(tuple(rows[index]))
            turns[index].append(contenders[index].chat(1 + number, script))
    return [
        Runs(tuple(single[i]), tuple(streams[i]) if any(streams[i]) else (), tuple(turns[i]))
        for i in range(len(contenders))
    ]


def _summarize(contender: Contender, runs: Runs, workload: Workload, threads: int | None) -> Bench:
    facts = contender.facts
    decoded = [run.decode_rate for run in runs.single if run.decode_rate]
    gaps = [gap for run in runs.single for gap in run.gaps]
    turns = gather_turns(runs)
    left = list(workload.left_out)
    processor = gather_processor()
    if len(turns) < workload.script.turns:
        left.append(
            f"turns {len(turns) + 1} to {workload.script.turns} of a chat: they do not fit "
            f"{workload.script.room:,} tokens, which is what the context and the caches hold."
        )
    return Bench(
        package=facts.package,
        precision=facts.precision,
        provider=facts.provider,
        engine=facts.engine,
        threads=threads,
        prompt_tokens=workload.prompt_tokens,
        new_tokens=workload.new_tokens,
        repeats=workload.repeats,
        load_seconds=facts.load_seconds,
        first_token_seconds=Spread.of(run.first_token_seconds for run in runs.single),
        prefill_rate=Spread.of(run.prefill_rate for run in runs.single),
        decode_rate=Spread.of(decoded) if decoded else None,
        resident=facts.resident,
        peak=contender.peak(),
        inter_token_seconds=Gaps.of(gaps) if gaps else None,
        streams=gather_streams(runs),
        turns=turns,
        caches=contender.caches(),
        left_out=tuple(left),
        processor=processor.name,
        processors=max(1, int(processor.usable)),
        runs=runs,
    )
