"""How many replicas a load needs, and what they take.

A replica answers `rows` requests at once, each in a row of its batch; a request waits while all
rows of all replicas are taken. With all rows taken an answer takes

    S = prompt * rows / prefill_rate + answer * rows / decode_rate(rows)

seconds: the work of a request is `prompt / prefill_rate + answer / decode_rate(rows)` of a
replica's time, and `rows` requests share it. Arrivals are independent of one another (Poisson) at
the rate L of the busiest time. Then

- Little's law, N = L * S (J. D. C. Little, "A Proof for the Queuing Formula: L = lambda W",
  Operations Research 9(3), 1961): so many rows are busy on average;
- utilization is N / (replicas * rows), which must be below 1;
- the wait is that of a queue M/M/c with c = replicas * rows servers: the probability to wait is
  Erlang's C (A. K. Erlang, 1917; L. Kleinrock, "Queueing Systems", volume 1, 1975, section 3.5),
  the mean wait C * S / (c - N), and P(wait > t) = C * exp(-(c - N) * t / S).

M/M/c is on the safe side here: answers in a batch that is not full are faster than S says.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from llama_onnx.runtime.capacity.bench_figures import Figures
from llama_onnx.targets.errors import UsageError

DAY = 86400.0
HOURS_A_MONTH = 730.0
_MOST_REPLICAS = 100_000


@dataclass(frozen=True)
class Load:
    """What is asked for.

    `users` have a conversation of `context` tokens each, whose cache is kept; `tokens_a_day` are
    those of all answers. Each request has a prompt of `prompt` new tokens and an answer of `answer`
    tokens. In the busiest time there are `peak` times as many requests as on average; then at most
    `late` of them may wait longer than `wait` seconds, and no more than `utilization` of the rows
    may be busy.
    """

    users: int
    tokens_a_day: float
    prompt: int = 200
    answer: int = 200
    context: int = 2000
    peak: float = 3.0
    wait: float = 1.0
    late: float = 0.05
    utilization: float = 0.8

    def check(self) -> None:
        """Raise `UsageError` for numbers that mean nothing."""
        for name in ("users", "tokens_a_day", "answer", "context", "peak", "wait"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                flag = name.replace("_", "-")
                raise UsageError(f"--{flag} must be more than 0, not {value:g}.")
        if not (math.isfinite(self.prompt) and self.prompt >= 0):
            raise UsageError(f"--prompt must not be negative, but it is {self.prompt:g}.")
        if not (0 < self.late < 1 and 0 < self.utilization < 1):
            raise UsageError("--late and --utilization must be between 0 and 1.")

    @property
    def requests_a_second(self) -> float:
        """The rate of requests in the busiest time."""
        return self.peak * self.tokens_a_day / self.answer / DAY


@dataclass(frozen=True)
class Capacity:
    """What the load needs. Times in seconds, sizes in bytes; the waits are M/M/c's.

    `decode_share` is how much of the work is generating, the rest reads prompts; `idle_share` is
    how much of the time of the cores nothing runs on them over a whole day, at the utilization of
    the busiest time divided by `peak`.
    """

    load: Load
    figures: Figures
    replicas: int
    rows: int
    cores: int
    answer_seconds: float
    busy_rows: float
    utilization: float
    wait_probability: float
    mean_wait: float
    late: float
    weights_memory: int
    cache_memory: int
    decode_share: float
    idle_share: float
    start_seconds: float

    @property
    def memory(self) -> int:
        """The memory of all replicas."""
        return self.weights_memory + self.cache_memory

    @property
    def tokens_a_core_second(self) -> float:
        """Answer tokens a second that a core makes when all rows are busy."""
        return self.rows * self.load.answer / self.answer_seconds / self.figures.cores

    def monthly_price(self, core_hour: float) -> float:
        """Return what the cores cost in a month of 730 hours at this price."""
        return self.cores * HOURS_A_MONTH * core_hour

    def to_json(self) -> dict[str, Any]:
        """Return everything, for scripts."""
        return {
            **asdict(self),
            "memory": self.memory,
            "requests_a_second": self.load.requests_a_second,
            "tokens_a_core_second": self.tokens_a_core_second,
        }


def answer_seconds(load: Load, figures: Figures, rows: int) -> float:
    """Return how long an answer takes with so many at once, the S above."""
    each = load.prompt / figures.prefill_rate + load.answer / figures.decode_rates[rows]
    return rows * each


def erlang_c(servers: int, busy: float) -> float:
    """Return the probability that a request waits, by the recursion of Erlang's B, which does not
    overflow.

    >>> round(erlang_c(1, 0.5), 6), round(erlang_c(2, 1.0), 6)
    (0.5, 0.333333)
    """
    blocked = 1.0
    for number in range(1, servers + 1):
        blocked = busy * blocked / (number + busy * blocked)
    share = busy / servers
    return blocked / (1 - share * (1 - blocked))


def waits(servers: int, busy: float, seconds: float, limit: float) -> tuple[float, float, float]:
    """Return the probability to wait, the mean wait, and that of a wait longer than `limit`."""
    probability = erlang_c(servers, busy)
    free = servers - busy
    late = probability * math.exp(-free * limit / seconds)
    return probability, probability * seconds / free, late


def plan_capacity(load: Load, figures: Figures) -> Capacity:
    """Return the fewest replicas that `load` needs, with the number of rows that is best for it.

    Raises `UsageError` for a load that is no number, or needs more replicas than anyone has.
    """
    load.check()
    found = [_with_rows(load, figures, rows) for rows in figures.decode_rates]
    return min(found, key=lambda one: (one.replicas, one.answer_seconds))


def _with_rows(load: Load, figures: Figures, rows: int) -> Capacity:
    seconds = answer_seconds(load, figures, rows)
    busy = load.requests_a_second * seconds
    if busy > _MOST_REPLICAS * rows * load.utilization:
        raise UsageError(
            f"this load needs more than {_MOST_REPLICAS:,} replicas of {figures.source}: use a "
            "smaller model or faster machines."
        )
    replicas = max(1, math.ceil(busy / (rows * load.utilization)))
    while (found := waits(replicas * rows, busy, seconds, load.wait))[2] > load.late:
        replicas += 1
    decode = load.answer / figures.decode_rates[rows]
    utilization = busy / (replicas * rows)
    return Capacity(
        load=load,
        figures=figures,
        replicas=replicas,
        rows=rows,
        cores=replicas * figures.cores,
        answer_seconds=seconds,
        busy_rows=busy,
        utilization=utilization,
        wait_probability=found[0],
        mean_wait=found[1],
        late=found[2],
        weights_memory=replicas * figures.resident,
        cache_memory=load.users * load.context * figures.position_bytes,
        decode_share=decode / (decode + load.prompt / figures.prefill_rate),
        idle_share=1 - utilization / load.peak,
        start_seconds=figures.load_seconds,
    )
