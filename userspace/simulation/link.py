# SPDX-License-Identifier: Apache-2.0
"""A link: a queue, a rate, a delay, and faults, in that order.

             drop              lost on the wire
              ^                       ^
    send -> queue -> transmitter -> faults -> delay, jitter -> next link, or who receives
           (discipline)  (rate)

The queue's discipline (:mod:`userspace.simulation.disciplines`) decides what is dropped, what is marked and
what leaves next; packets wait in it, not in front of it.  The counters add up at any time:

    sent + duplicated = delivered + lost (by flow and reason) + queued + on the wire

:meth:`Link.check` says so, and every run ends with it.
"""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Callable
from typing import Final, Protocol

from userspace.simulation.engine import Engine
from userspace.simulation.faults import Faults
from userspace.simulation.packet import Packet
from xdp.errors import UsageError

#: Bytes/s, a terabit: far more than is simulated, far less than what overflows.
MAX_RATE: Final = 1.25e11
#: Seconds, one way: to the Moon takes 1.3.
MAX_DELAY: Final = 60.0


class Discipline(Protocol):
    """Where packets wait."""

    #: Tells a packet that will not leave, and why; the link sets it.
    dropped: Callable[[Packet, str], None]

    @property
    def packets(self) -> int:
        """That wait now."""

    @property
    def bytes(self) -> int:
        """Of them."""

    def enqueue(self, now: float, packet: Packet) -> None:
        """Take it, or drop it or another one."""

    def dequeue(self, now: float) -> Packet | None:
        """What is sent next, or None when nothing waits; may drop and mark."""


class QueueLog:
    """What a queue did to every packet that left it: when it left, how long it had waited, whose it was."""

    __slots__ = ("delays", "flows", "times")

    def __init__(self) -> None:
        self.times = array("d")  # seconds
        self.delays = array("d")  # seconds
        self.flows = array("I")


class Link:
    """One direction of a link.

    ``rate`` in bytes/s; None is a wire without a queue, which delays and loses only.  ``delay`` in
    seconds, one way.  Raises UsageError for what is out of range.
    """

    __slots__ = (
        "_arrive", "_busy", "_capacity", "_done", "_engine", "_last_arrival", "_rate", "_since", "delay",
        "delivered", "duplicated", "faults", "log", "lost", "name", "on_wire", "queue", "sent",
    )  # fmt: skip

    def __init__(
        self,
        engine: Engine,
        name: str,
        *,
        rate: float | None,
        delay: float = 0.0,
        queue: Discipline | None = None,
        faults: Faults | None = None,
        log: bool = False,
    ) -> None:
        if (rate is None) != (queue is None):
            raise UsageError("a link with a rate has a queue, and one without has none")
        if not 0 <= delay <= MAX_DELAY:
            raise UsageError(f"delay is 0 to {MAX_DELAY:g} seconds, not {delay!r}")
        self._engine, self.name = engine, name
        self.delay, self.faults, self.queue = delay, faults, queue
        self._rate = math.inf if rate is None else _checked(rate)
        self._capacity, self._since = 0.0, 0.0  # bytes until that time
        self._busy = False
        self._done, self._arrive = self._transmitted, self._arrived  # bound once, not for every packet
        self._last_arrival = 0.0
        self.sent = self.delivered = self.duplicated = self.on_wire = 0  # packets
        #: packets, by (flow, reason)
        self.lost: Counter[tuple[int, str]] = Counter()
        self.log = QueueLog() if log else None
        if queue is not None:
            queue.dropped = self._dropped

    # --- what can be changed at run time

    @property
    def rate(self) -> float:
        """Bytes/s; infinite for a wire."""
        return self._rate

    def set_rate(self, now: float, rate: float) -> None:
        """From the next packet on; with 0 they wait.  An event's call.  Raises UsageError."""
        if self.queue is None:
            raise UsageError("a wire has no rate")
        self._capacity += self._rate * (now - self._since)
        self._rate, self._since = _checked(rate), now
        if not self._busy:
            self._transmitted(now)

    def take_capacity(self, now: float) -> float:
        """Bytes that it could have carried since this was last asked; infinite for a wire."""
        found = self._capacity + self._rate * (now - self._since)
        self._capacity, self._since = 0.0, now
        return found

    def set_delay(self, now: float, delay: float) -> None:  # noqa: ARG002 - an event's call
        """From the next packet on; no packet overtakes those that are on the wire already."""
        if not 0 <= delay <= MAX_DELAY:
            raise UsageError(f"delay is 0 to {MAX_DELAY:g} seconds, not {delay!r}")
        self.delay = delay

    # --- a packet's way

    def send(self, now: float, packet: Packet) -> None:
        """A packet comes to the link."""
        self.sent += 1
        if self.queue is None:
            self._leave(now, packet)
            return
        packet.queued_at = now
        self.queue.enqueue(now, packet)
        if not self._busy:
            self._transmitted(now)

    def _transmitted(self, now: float, _: object = None) -> None:
        """The transmitter is free: send the next packet."""
        rate, queue = self._rate, self.queue
        packet = queue.dequeue(now) if rate and queue is not None else None
        if packet is None:
            self._busy = False
            return
        self._busy = True
        log = self.log
        if log is not None:
            log.times.append(now)
            log.delays.append(now - packet.queued_at)
            log.flows.append(packet.route.flow)
        sent_at = now + packet.size / rate
        self._engine.at(sent_at, self._done)
        self._leave(sent_at, packet)

    def _leave(self, sent_at: float, packet: Packet) -> None:
        """Onto the wire, at a time that may be a packet's length ahead."""
        if self.faults is not None:
            self._leave_faulty(sent_at, packet, self.faults)
            return
        arrival = sent_at + self.delay
        if arrival < self._last_arrival:  # noqa: PLR1730 - max() is a call, for every packet
            arrival = self._last_arrival
        self._last_arrival = arrival
        self.on_wire += 1
        self._engine.at(arrival, self._arrive, packet)

    def _leave_faulty(self, sent_at: float, packet: Packet, faults: Faults) -> None:
        reason = faults.lost(sent_at)
        if reason:
            self.lost[packet.route.flow, reason] += 1
            return
        arrival = sent_at + self.delay
        if faults.jitter:
            arrival += faults.random.random() * faults.jitter
        arrival = max(arrival, self._last_arrival)
        if faults.happens(faults.reorder):
            arrival += faults.reorder_delay  # those behind it don't wait
        else:
            self._last_arrival = arrival
        if faults.happens(faults.corrupt):
            packet.corrupt = True
        if faults.happens(faults.duplicate):
            self.duplicated += 1
            self.on_wire += 1
            self._engine.at(arrival, self._arrive, packet.copy())
        self.on_wire += 1
        self._engine.at(arrival, self._arrive, packet)

    def _arrived(self, now: float, packet: Packet) -> None:
        """At the other end."""
        self.on_wire -= 1
        self.delivered += 1
        route = packet.route
        packet.hop = hop = packet.hop + 1
        if hop < len(route.links):
            route.links[hop].send(now, packet)
        else:
            route.deliver(now, packet)

    def _dropped(self, packet: Packet, reason: str) -> None:
        self.lost[packet.route.flow, reason] += 1

    # --- figures

    @property
    def queued(self) -> int:
        """Packets that wait; one that is being transmitted is on the wire."""
        return 0 if self.queue is None else self.queue.packets

    @property
    def queued_bytes(self) -> int:
        """Of those."""
        return 0 if self.queue is None else self.queue.bytes

    def lost_by_reason(self) -> dict[str, int]:
        """Packets, of all flows."""
        found: Counter[str] = Counter()
        for (_, reason), count in self.lost.items():
            found[reason] += count
        return dict(sorted(found.items()))

    def check(self) -> None:
        """AssertionError when a packet is nowhere, or twice."""
        gone = self.delivered + self.lost.total() + self.queued + self.on_wire
        if self.sent + self.duplicated != gone:
            raise AssertionError(
                f"{self.name}: {self.sent} sent + {self.duplicated} duplicated, but"
                f" {self.delivered} delivered + {self.lost.total()} lost + {self.queued} queued"
                f" + {self.on_wire} on the wire"
            )


def _checked(rate: float) -> float:
    if type(rate) not in {int, float} or not 0 <= rate <= MAX_RATE:
        raise UsageError(f"rate is 0 to {MAX_RATE:g} bytes/s, not {rate!r}")
    return float(rate)
