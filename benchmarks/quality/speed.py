"""Prefill and decode of each row beside our rtn int4, in turns.

Two processes at a time, one waiting while the other works: the machine's drift hits both alike.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from typing import Any

import click
import numpy as np

from benchmarks.quality.model_process import BrokenPeerError, ModelProcess
from benchmarks.quality.processor import processor
from benchmarks.quality.rows import BASE, ROWS, Row
from benchmarks.quality.workspace import Workspace

PROMPT, NEW = 512, 64


def compare_speed(rows: Sequence[Row], work: Workspace, threads: int, rounds: int) -> None:
    """Add the speed to the results of `rows` that lack it."""
    if not work.result(BASE).exists():
        click.echo(f"no speed is measured: it is compared with {BASE}, which has not been made.")
        return
    for row in rows:
        content = json.loads(work.result(row.name).read_text("utf-8"))
        if "speed" in content:
            continue
        try:
            content["speed"] = _side_by_side(row, work, threads, rounds)
        except BrokenPeerError as error:
            click.echo(f"{row.name}: no speed: {error}")
            continue
        text = json.dumps(content, ensure_ascii=False, indent=1)
        work.result(row.name).write_text(text, encoding="utf-8")


def _side_by_side(row: Row, work: Workspace, threads: int, rounds: int) -> dict[str, Any]:
    ids = [int(token) for token in np.load(work.tokens)[0][:PROMPT]]
    with ModelProcess(ROWS[BASE], work, threads) as base, ModelProcess(row, work, threads) as other:
        pair = base, other
        for model in pair:  # warm up
            model.ask(do="seconds", ids=ids, new=8)
        times = []
        for number in range(rounds):
            order = (0, 1) if number % 2 else (1, 0)
            found = {index: pair[index].ask(do="seconds", ids=ids, new=NEW) for index in order}
            times.append((found[0], found[1]))
    return summarize_times(times, threads)


Seconds = Sequence[float]


def summarize_times(times: Sequence[tuple[Seconds, Seconds]], threads: int = 0) -> dict[str, Any]:
    """Return speeds from rounds of ((prefill, decode) of the base, the same of the row).

    A ratio is the median over rounds of the base's seconds by the row's, with the smallest and the
    largest beside it.
    """
    result: dict[str, Any] = {"processor": processor(), "threads": threads, "rounds": len(times)}
    for part, (name, tokens) in enumerate((("prefill", PROMPT), ("decode", NEW))):
        ratios = sorted(base[part] / other[part] for base, other in times)
        result[name] = {
            "tokens_per_second": tokens / statistics.median(other[part] for _, other in times),
            "ratio": statistics.median(ratios),
            "ratios": [ratios[0], ratios[-1]],
        }
    return result
