# SPDX-License-Identifier: Apache-2.0
"""A health monitor among peers that answer, lose, fall silent and die, in virtual time."""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable

from userspace.connection.grading import Status
from userspace.connection.health import ConnectionHealthMonitor
from userspace.connection.health_report import HealthSettings

#: What reaches the monitor when the loop reads.
Arrival = Callable[[float], object]


class Peers:
    """Peers numbered from 0, each at the end of a path with a round-trip time and a loss both ways.

    ``loop`` is what runs the monitor: it comes when the monitor wants it, ``late`` by up to so many seconds,
    and not at all while it is stalled; then what arrives waits in the socket.  It reads after its timers when
    ``timers_first``, which is the worse order.
    """

    def __init__(
        self,
        seed: int,
        count: int,
        *,
        loss: float = 0.0,
        rtt: float = 0.05,
        late: float = 0.0,
        timers_first: bool = True,
        settings: HealthSettings | None = None,
        start: float = 0.0,
    ) -> None:
        self.random = random.Random(seed)
        self.now = start
        self.monitor = ConnectionHealthMonitor(start, random.Random(seed + 1), settings)
        self.loss = dict.fromkeys(range(count), loss)
        self.rtt = dict.fromkeys(range(count), rtt)
        self.late = late
        self.timers_first = timers_first
        #: Who has died when; whose host has a kernel program that answers, whatever the application does.
        self.died: dict[int, float] = {}
        self.hosts: set[int] = set()
        #: Whether anything gets through at all.
        self.carrier = True
        #: When the loop was stalled, from and to; the last of them may not be over.
        self.stalls: list[tuple[float, float]] = []
        self.changes: list[tuple[float, int, Status, Status]] = []
        #: Between two answers of the same peer, seconds.
        self.longest_silence = 0.0
        self._heard: dict[int, float] = {}
        self._arrivals: list[tuple[float, int, Arrival]] = []
        self._waiting: list[Arrival] = []
        self._turn = 0
        self._tick_at = math.inf
        self.monitor.subscribe(self._changed)
        for connection in range(count):
            self.monitor.add(start, connection)

    def _changed(self, connection: int, old: Status, new: Status) -> None:
        assert old != new
        self.changes.append((self.now, connection, old, new))

    def became(self, status: Status) -> dict[int, float]:
        """Who became so first when."""
        first: dict[int, float] = {}
        for at, connection, _, new in self.changes:
            if new == status:
                first.setdefault(connection, at)
        return first

    def arrive(self, at: float, what: Arrival) -> None:
        """Something reaches the socket then."""
        self._turn += 1
        heapq.heappush(self._arrivals, (at, self._turn, what))

    def kill(self, connection: int) -> None:
        """What reaches it from now on has no answer; what was sent before may."""
        self.died[connection] = self.now

    def talk(self, connection: int, every: float) -> None:
        """It sends something so often, and all of that arrives, until it dies."""

        def say(now: float) -> None:
            self.monitor.on_heard(now, connection)
            if connection not in self.died:
                self.arrive(now + every, say)

        self.arrive(self.now + every, say)

    def stall(self, seconds: float) -> None:
        """The loop stands still from now on."""
        self.stalls.append((max(self.now, self._stalled_until()), self.now + seconds))

    def _stalled_until(self) -> float:
        return self.stalls[-1][1] if self.stalls else -math.inf

    def awake(self, begin: float, end: float) -> float:
        """Seconds between these times in which the loop was not stalled."""
        return end - begin - sum(max(0.0, min(end, b) - max(begin, a)) for a, b in self.stalls)

    def _answer(self, connection: int, sequence: int, *, kernel: bool) -> None:
        self.monitor.status(connection)  # it is known
        if not self.carrier:
            return
        draw, monitor = self.random.random, self.monitor
        rtt = self.rtt[connection] * (0.9 + 0.2 * draw())
        at = self.now + rtt
        if draw() >= self.loss[connection] and at - rtt / 2 < self.died.get(connection, math.inf):
            self.arrive(at, lambda now: self._pong(now, connection, sequence))
        if kernel and connection in self.hosts and draw() >= self.loss[connection]:
            self.arrive(at, lambda now: monitor.on_host_reply(now, connection, sequence))

    def _pong(self, now: float, connection: int, sequence: int) -> None:
        if self.monitor.on_pong(now, connection, sequence):
            self.longest_silence = max(self.longest_silence, now - self._heard.get(connection, now))
            self._heard[connection] = now

    def _read(self) -> None:
        waiting, self._waiting = self._waiting, []
        for what in waiting:
            what(self.now)

    def _send(self) -> None:
        for probe in self.monitor.take_probes(self.now):
            self._answer(probe.connection, probe.sequence, kernel=probe.kernel)

    def run(self, until: float) -> None:
        """Let time pass."""
        while True:
            tick = max(self.now, self.monitor.next_timeout())
            if self._tick_at == math.inf or tick < self._tick_at - self.late:
                self._tick_at = tick + self.late * self.random.random()
            arrival = self._arrivals[0][0] if self._arrivals else math.inf
            at = max(self.now, min(self._tick_at, arrival), self._stalled_until())
            if at > until:
                self.now = max(self.now, until)
                return
            self.now = at
            while self._arrivals and self._arrivals[0][0] <= at:
                self._waiting.append(heapq.heappop(self._arrivals)[2])
            if self._tick_at <= at and self.timers_first:
                self._send()
            self._read()
            if self._tick_at <= at:
                self._tick_at = math.inf
                self._send()
