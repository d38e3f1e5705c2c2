"""The calculator against simulations of what it computes, and against figures worked out by hand.

The simulations are SimPy's. A figure of theirs is the mean of 20 batches of requests, in order, so
that its standard error is known although neighbors are alike; 4 of those are the tolerance. Seeds
are fixed.
"""

from __future__ import annotations

import json
import random
from collections.abc import Generator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
import simpy
from click.testing import CliRunner

from llama_onnx.exporter.cli import main
from llama_onnx.runtime.capacity.bench_figures import DEFAULTS, Figures, read_figures
from llama_onnx.runtime.capacity.load import Load, answer_seconds, plan_capacity, waits
from llama_onnx.targets.errors import UsageError

BATCHES = 20

FIGURES = Figures("a machine", 4, 2000.0, {1: 50.0, 2: 80.0, 4: 120.0, 8: 160.0}, 2.0, 10**9, 1000)
"""Eight answers at once take eight times as long as one alone takes in 50 / 160 of the steps."""


def estimate(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean, and its standard error by batches."""
    size = len(values) // BATCHES
    means = [mean(values[n * size : (n + 1) * size]) for n in range(BATCHES)]
    return mean(means), stdev(means) / BATCHES**0.5


def simulate_queue(servers: int, busy: float, seconds: float, count: int) -> list[float]:
    """Return the waits of a queue with exponential times, in the order of arrival."""
    env, draw, found = simpy.Environment(), random.Random(7), [0.0] * count
    resource = simpy.Resource(env, servers)

    def request(number: int) -> Generator[Any, Any, None]:
        came = env.now
        with resource.request() as turn:
            yield turn
            found[number] = env.now - came
            yield env.timeout(draw.expovariate(1 / seconds))

    def arrivals() -> Generator[Any, Any, None]:
        for number in range(count):
            yield env.timeout(draw.expovariate(busy / seconds))
            env.process(request(number))

    env.process(arrivals())
    env.run()
    return found


@pytest.mark.parametrize(("servers", "busy"), [(1, 0.7), (4, 3.0), (24, 20.0)])
def test_the_waits_are_those_of_a_simulated_queue(servers: int, busy: float) -> None:
    seconds, limit = 8.0, 2.0
    found = simulate_queue(servers, busy, seconds, 40_000)[2000:]
    simulated = (
        [float(wait > 1e-9) for wait in found],
        found,
        [float(wait > limit) for wait in found],
    )
    for values, computed in zip(simulated, waits(servers, busy, seconds, limit), strict=True):
        value, error = estimate(values)
        assert error < 0.15 * computed, "the tolerance would accept anything"
        assert value == pytest.approx(computed, abs=4 * error)


class Replica:
    """A batch that is faster per answer the fewer there are, as measured."""

    def __init__(self, env: simpy.Environment, load: Load, figures: Figures) -> None:
        self.env, self.left, self.version, self.since = env, dict[Any, float](), 0, 0.0
        rates = figures.decode_rates
        known = sorted(rates)
        self.seconds = [0.0]
        for count in range(1, max(known) + 1):
            low = max(n for n in known if n <= count)
            high = min(n for n in known if n >= count)
            share = (count - low) / ((high - low) or 1)
            rate = rates[low] + share * (rates[high] - rates[low])
            between = replace(figures, decode_rates={count: rate})
            self.seconds.append(answer_seconds(load, between, count))

    def _advance(self) -> None:
        if self.left:
            done = (self.env.now - self.since) / self.seconds[len(self.left)]
            self.left = {event: left - done for event, left in self.left.items()}
        self.since, self.version = self.env.now, self.version + 1

    def add(self, work: float) -> Any:
        """Add an answer, and return the event of its end."""
        self._advance()
        self.left[event := self.env.event()] = work
        self._watch()
        return event

    def _watch(self) -> None:
        if self.left:
            self.env.process(self._first(self.version))

    def _first(self, version: int) -> Generator[Any, Any, None]:
        event = min(self.left, key=lambda one: self.left[one])
        yield self.env.timeout(max(0.0, self.left[event]) * self.seconds[len(self.left)])
        if version == self.version:
            self._advance()
            del self.left[event]
            event.succeed()
            self._watch()


def simulate_replicas(
    load: Load, figures: Figures, replicas: int, rows: int, count: int
) -> list[float]:
    """Return the waits for a row; a request goes to the replica with the fewest answers."""
    env, draw, found = simpy.Environment(), random.Random(11), [0.0] * count
    rates = {n: rate for n, rate in figures.decode_rates.items() if n <= rows}
    servers = [Replica(env, load, replace(figures, decode_rates=rates)) for _ in range(replicas)]
    free = simpy.Resource(env, replicas * rows)

    def request(number: int) -> Generator[Any, Any, None]:
        came = env.now
        with free.request() as turn:
            yield turn
            found[number] = env.now - came
            yield min(servers, key=lambda one: len(one.left)).add(draw.expovariate(1.0))

    def arrivals() -> Generator[Any, Any, None]:
        for number in range(count):
            yield env.timeout(draw.expovariate(load.requests_a_second))
            env.process(request(number))

    env.process(arrivals())
    env.run()
    return found


def late_share(load: Load, replicas: int, rows: int) -> tuple[float, float]:
    found = simulate_replicas(load, FIGURES, replicas, rows, 12_000)[1000:]
    return estimate([float(wait > load.wait) for wait in found])


@pytest.mark.parametrize("tokens", [5e6, 2e7])
def test_planned_replicas_hold_the_limit_and_fewer_do_not(tokens: float) -> None:
    """Batches that speed up as they empty: the plan holds, and is not far from the least."""
    load = Load(users=200, tokens_a_day=tokens)
    planned = plan_capacity(load, FIGURES)
    late, error = late_share(load, planned.replicas, planned.rows)
    assert late <= planned.late + 4 * error <= load.late + 4 * error
    fewer = int(planned.replicas * planned.utilization)  # not even all of the work is done
    late, error = late_share(load, fewer, planned.rows)
    assert late - 4 * error > load.late


def test_figures_worked_out_by_hand() -> None:
    """8.64e6 tokens a day in answers of 100 are one request a second, at a peak of 1."""
    load = Load(10, 8.64e6, prompt=100, answer=100, context=500, peak=1.0, wait=1e9, late=0.99)
    found = plan_capacity(load, FIGURES)
    # 8 rows: 8 * (100 / 2000 + 100 / 160) = 5.4 s, so 5.4 rows are busy, of 0.8 * 8 = 6.4.
    assert found.answer_seconds == pytest.approx(5.4)
    assert (found.replicas, found.rows, found.cores) == (1, 8, 4)
    assert found.busy_rows == pytest.approx(5.4) and found.utilization == pytest.approx(0.675)
    assert found.memory == 10**9 + 10 * 500 * 1000
    assert found.monthly_price(0.05) == pytest.approx(4 * 730 * 0.05)
    assert found.decode_share == pytest.approx(0.625 / 0.675)


def bench_file(folder: Path, **changes: Any) -> Path:
    content: dict[str, Any] = {
        "package": "/x/tiny",
        "processor": "a processor",
        "threads": 4,
        "prefill_rate": {"median": 2000.0},
        "streams": [{"streams": n, "rate": {"median": r}} for n, r in FIGURES.decode_rates.items()],
        "load_seconds": 2.0,
        "resident": 10**9,
        "caches": {"position_bytes": 1000},
        **changes,
    }
    file = folder / "bench.json"
    file.write_text(json.dumps(content), encoding="utf-8")
    return file


def run(*arguments: str) -> Any:
    return CliRunner().invoke(main, ["capacity", *arguments])


def test_the_command_takes_what_bench_prints(tmp_path: Path) -> None:
    file = bench_file(tmp_path)
    assert replace(read_figures(file), source="a machine") == FIGURES
    assert read_figures(bench_file(tmp_path, threads=None, processors=6)).cores == 6
    file = bench_file(tmp_path)
    asked = ["--users", "200", "--tokens-a-day", "5e6", "--bench", str(file)]
    found = json.loads(run(*asked, "--price-core-hour", "0.05", "--json").stdout)
    planned = plan_capacity(Load(200, 5e6), FIGURES)
    assert (found["replicas"], found["cores"]) == (planned.replicas, planned.cores)
    assert found["monthly_price"] == pytest.approx(planned.cores * 730 * 0.05)
    text = run(*asked).stdout
    assert f"{planned.replicas:,} replicas" in text and "Price" not in text


def test_the_defaults_name_their_source() -> None:
    text = run("--users", "200", "--tokens-a-day", "5e7").stdout
    assert text.startswith(f"Figures: {DEFAULTS.source}.")


@pytest.mark.parametrize(
    "changes",
    [
        {"streams": []},
        {"caches": None},
        {"prefill_rate": {"median": float("nan")}},
        {"resident": -1},
        {"threads": None},
    ],
)
def test_a_file_without_figures_is_a_sentence(changes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"lacks figures|is not what"):
        read_figures(bench_file(tmp_path, **changes))


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (("--peak", "0"), "--peak must be more than 0"),
        (("--late", "1"), "between 0 and 1"),
        (("--prompt", "-1000"), "--prompt must not be negative"),
    ],
)
def test_numbers_that_mean_nothing(option: tuple[str, str], said: str) -> None:
    result = run("--users", "2", "--tokens-a-day", "1e5", *option)
    assert result.exit_code == 2 and said in result.stderr
    assert "replicas of" in run("--users", "2", "--tokens-a-day", "1e18").stderr
