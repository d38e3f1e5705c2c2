"""`llama-onnx capacity --users N --tokens-a-day N`: what serving a load takes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llama_onnx.runtime.commands.streams import say

if TYPE_CHECKING:
    from llama_onnx.runtime.capacity.load import Capacity


@click.command("capacity")
@click.option("--users", type=int, required=True, help="Users with a conversation each.")
@click.option(
    "--tokens-a-day", type=float, required=True, help="Tokens of all answers in a day: 5e7."
)
@click.option(
    "--bench",
    "bench_file",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="What `llama-onnx bench PACKAGE --json` printed.  [default: SmolLM2-135M on two vCPUs]",
)
@click.option(
    "--prompt", type=int, default=200, show_default=True, help="New tokens of each prompt."
)
@click.option("--answer", type=int, default=200, show_default=True, help="Tokens of each answer.")
@click.option(
    "--context", type=int, default=2000, show_default=True, help="Tokens kept of a conversation."
)
@click.option(
    "--peak",
    type=float,
    default=3.0,
    show_default=True,
    help="Requests in the busiest time, times the average of the day.",
)
@click.option(
    "--wait",
    type=float,
    default=1.0,
    show_default=True,
    help="Seconds that a request may wait for its turn.",
)
@click.option(
    "--late",
    type=float,
    default=0.05,
    show_default=True,
    help="Share of requests that may wait longer.",
)
@click.option(
    "--utilization",
    type=float,
    default=0.8,
    show_default=True,
    help="Largest share of the capacity that may be busy.",
)
@click.option("--price-core-hour", type=float, help="Price of a core for an hour, in any currency.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def command(
    bench_file: Path | None, price_core_hour: float | None, as_json: bool, **load: Any
) -> None:
    """Compute the replicas, cores and memory that a load needs, from measured figures.

    Replicas are processes of `serve`, each with as many cores as `bench` used. The waits are those
    of a queue M/M/c in the busiest time. Prices are only what you pass.
    """
    from llama_onnx.runtime.capacity.bench_figures import DEFAULTS, read_figures
    from llama_onnx.runtime.capacity.load import Load, plan_capacity

    figures = read_figures(bench_file) if bench_file else DEFAULTS
    found = plan_capacity(Load(**load), figures)
    price = None if price_core_hour is None else found.monthly_price(price_core_hour)
    if as_json:
        click.echo(json.dumps({**found.to_json(), "monthly_price": price}))
        return
    for line in _lines(found, price):
        say(line)


def _lines(found: Capacity, price: float | None) -> Iterator[str]:
    load, figures = found.load, found.figures
    yield f"Figures: {figures.source}."
    yield (
        f"Load: {load.requests_a_second:.2f} requests/s in the busiest time, "
        f"{load.tokens_a_day / load.users:,.0f} tokens a day for each user."
    )
    yield (
        f"Needed: {found.replicas:,} replicas of {figures.cores} cores with {found.rows} answers "
        f"at once: {found.cores:,} cores."
    )
    yield (
        f"Memory: {found.memory / 1e9:,.1f} GB, of which {found.cache_memory / 1e9:,.1f} GB are "
        f"caches of {load.users:,} conversations of {load.context:,} tokens."
    )
    yield (
        f"Busiest time: {found.utilization:.0%} busy, an answer takes {found.answer_seconds:.1f} s "
        f"at full load, {found.wait_probability:.1%} of requests wait, "
        f"{found.late:.1%} of all for more than {load.wait:g} s (M/M/c)."
    )
    yield (
        f"Work: {found.decode_share:.0%} is generating and the rest is reading prompts; "
        f"over a day the cores are idle {found.idle_share:.0%} of the time, because the busiest "
        f"time has {load.peak:g} times the average."
    )
    yield f"An additional replica starts in {found.start_seconds:.1f} s."
    if price is not None:
        yield f"Price: {price:,.2f} a month of 730 hours for the cores."
