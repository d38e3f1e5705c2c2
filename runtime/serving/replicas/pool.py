"""The replicas as the front sees them: who is there, what each has to do, and who waits.

A replica gets no more answers than it has rows. The others wait here, where they lose nothing when
a replica dies. Of one thread, the loop's.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from llama_onnx.runtime.serving.openai_errors import NotReadyError
from llama_onnx.runtime.serving.replicas.routing import Candidate, Seen, Wanted, choose

PATIENCE = 60.0
"""Seconds that requests wait for a replica while there is none."""

REST = 1.0
"""Seconds without requests for a replica that took no connection, or broke one: it ends."""

_NOBODY = "no replica of this server answers: try again later."


@dataclass
class Replica:
    """A replica: its `port`, None while it is not there, and the answers that it has to do."""

    number: int
    port: int | None = None
    load: int = 0
    answered: int = 0
    seen: Seen = field(default_factory=Seen)
    resting: bool = False

    @property
    def is_there(self) -> bool:
        """Whether it takes requests."""
        return self.port is not None and not self.resting


@dataclass(eq=False)
class _Waiter:
    wanted: Wanted
    without: Collection[int]
    found: asyncio.Future[Replica]


class Pool:
    """`count` replicas with `rows` each."""

    def __init__(self, count: int, rows: int, patience: float = PATIENCE) -> None:
        self.replicas = [Replica(number) for number in range(count)]
        self._rows, self._patience = rows, patience
        self._waiters: deque[_Waiter] = deque()
        self._given_up: asyncio.TimerHandle | None = None

    @property
    def waiting(self) -> int:
        """How many requests wait for a replica."""
        return len(self._waiters)

    def set_port(self, number: int, port: int | None) -> None:
        """Take note that a replica answers at `port` now, or not any more."""
        replica = self.replicas[number]
        if replica.port != port:
            replica.port, replica.seen, replica.resting = port, Seen(), False
        self._look()

    def rest(self, replica: Replica) -> None:
        """Give a replica no request for a moment."""
        replica.resting = True
        asyncio.get_running_loop().call_later(REST, self._wake, replica)

    @asynccontextmanager
    async def take(self, wanted: Wanted, without: Collection[int] = ()) -> AsyncIterator[Replica]:
        """Wait for a replica, and hold it for the answers while the block runs.

        `without` are the ports of replicas that will not do. Raises `NotReadyError` if no other is
        there, or none at all for too long.
        """
        waiter = _Waiter(wanted, without, asyncio.get_running_loop().create_future())
        if wanted.places:
            self._waiters.append(waiter)
        else:  # it takes no room, so it waits for nobody
            self._waiters.appendleft(waiter)
        self._look()
        try:
            replica = await waiter.found
        except asyncio.CancelledError:
            found = waiter.found
            if found.done() and not found.cancelled() and found.exception() is None:
                self._release(found.result(), wanted)
            elif waiter in self._waiters:
                self._waiters.remove(waiter)
                self._look()  # those after it may want less
            raise
        try:
            yield replica
        finally:
            self._release(replica, wanted)

    def _release(self, replica: Replica, wanted: Wanted) -> None:
        replica.load -= wanted.places
        self._look()

    def _wake(self, replica: Replica) -> None:
        replica.resting = False
        self._look()

    def _look(self) -> None:
        """Give waiting requests, the oldest first, to replicas with room."""
        while self._waiters:
            waiter = self._waiters[0]
            there = [one for one in self.replicas if one.is_there]
            will_do = [one for one in there if one.port not in waiter.without]
            if there and not will_do and not waiter.found.done():
                waiter.found.set_exception(NotReadyError(_NOBODY))
            if not waiter.found.done():
                found = self._choose(waiter.wanted, will_do)
                if found is None:
                    break
                found.load += waiter.wanted.places
                found.answered += 1
                found.seen.add(waiter.wanted.beginnings)
                waiter.found.set_result(found)
            self._waiters.popleft()
        self._mind_patience()

    def _choose(self, wanted: Wanted, replicas: Collection[Replica]) -> Replica | None:
        candidates = [
            Candidate(one.number, one.load, one.seen.known(wanted.beginnings), one.answered)
            for one in replicas
        ]
        number = choose(candidates, wanted.places, self._rows)
        return None if number is None else self.replicas[number]

    def _mind_patience(self) -> None:
        """Start the clock while requests wait and no replica is there; stop it otherwise."""
        nobody = bool(self._waiters) and all(one.port is None for one in self.replicas)
        if nobody and self._given_up is None:
            loop = asyncio.get_running_loop()
            self._given_up = loop.call_later(self._patience, self._give_up)
        elif not nobody and self._given_up is not None:
            self._given_up.cancel()
            self._given_up = None

    def _give_up(self) -> None:
        self._given_up = None
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.found.done():
                waiter.found.set_exception(NotReadyError(_NOBODY))
