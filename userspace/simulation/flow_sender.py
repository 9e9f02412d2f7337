# SPDX-License-Identifier: Apache-2.0
"""Who sends in a simulated network: a flow under congestion control, and a constant source.

    FlowSender --packets--> links --> FlowReceiver
        ^                                 |
        +------- acknowledgements <-------+

Sender and receiver are the code that programs run with, :class:`userspace.flow.controller.FlowController`
and :class:`userspace.flow.ranges.ReceivedPackets`, called with virtual time.  A sender always has
something to send; nothing is sent twice, so what counts is the goodput that arrives.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable
from random import Random
from typing import TYPE_CHECKING, Final

from userspace.simulation.engine import Engine
from userspace.simulation.packet import Packet, Route

if TYPE_CHECKING:
    from userspace.flow.controller import FlowController
    from userspace.simulation.link import Link

#: Seconds a bin of the records over time.
BIN: Final = 0.1
_NEVER: Final = math.inf


class Record:
    """What is written down about a flow, sender's and receiver's side."""

    __slots__ = (
        "acks_damaged", "begin", "controller", "corrupted", "duplicates", "end", "goodput", "in_flight",
        "links", "marked", "name", "number", "probes", "received", "received_bytes", "rtt", "sent",
        "window",
    )  # fmt: skip

    def __init__(self, number: int, name: str, controller: str, begin: float, end: float, bins: int) -> None:
        self.number, self.name = number, name
        self.controller = controller  # its name; "" of a source that has none
        self.begin, self.end = begin, end  # seconds, of sending
        self.links: tuple[Link, ...] = ()
        self.rtt = 0.0  # seconds that a packet and its acknowledgement take when no queue is in their way
        self.sent = 0  # packets
        self.received = 0  # packets, each once
        self.received_bytes = 0
        self.duplicates = 0
        self.corrupted = 0
        self.marked = 0  # came with a CE mark
        self.probes = 0  # sent because nothing was heard for too long (RFC 9002, 6.2)
        self.acks_damaged = 0  # those that were lost are in their wire's counters
        #: Bytes that arrived, each once, by bin of BIN seconds.
        self.goodput = array("L", bytes(8 * bins))
        self.window = array("d")  # bytes, at the end of each bin
        self.in_flight = array("d")  # bytes

    def arrived(self, now: float, size: int) -> None:
        """A packet came for the first time."""
        self.received += 1
        self.received_bytes += size
        index = int(now / BIN)
        if index < len(self.goodput):
            self.goodput[index] += size


class FlowSender:
    """Sends what its controller allows, from ``begin`` to ``end``.

    ``make`` makes the controller when the flow begins.
    """

    __slots__ = (
        "_armed", "_ect", "_engine", "_make", "_priority", "_size", "_wake", "controller", "record", "route",
    )  # fmt: skip

    def __init__(
        self,
        engine: Engine,
        record: Record,
        route: Route,
        make: Callable[[float], FlowController],
        *,
        size: int,
        ect: bool = False,
        priority: int = 0,
    ) -> None:
        self._engine, self.record, self.route, self._make = engine, record, route, make
        self._size, self._ect, self._priority = size, ect, priority
        self.controller: FlowController | None = None
        self._armed = _NEVER  # when the earliest call of _woken is due
        self._wake = self._woken
        engine.at(record.begin, self._begin)

    def _begin(self, now: float, _: object) -> None:
        self.controller = self._make(now)
        self._pump(now, self.controller)

    def _woken(self, now: float, _: object) -> None:
        if now != self._armed:
            return  # an earlier time was wanted later: that call was made already
        self._armed = _NEVER
        assert self.controller is not None
        self._pump(now, self.controller)

    def acknowledged(self, now: float, packet: Packet) -> None:
        """An acknowledgement has come back."""
        if packet.corrupt:
            self.record.acks_damaged += 1
            return
        controller = self.controller
        assert controller is not None
        said = packet.body
        assert said is not None
        controller.on_ack_received(now, said.ranges, said.delay, said.ce_count if self._ect else None)
        self._pump(now, controller)

    def _pump(self, now: float, controller: FlowController) -> None:
        """Send what may be sent now, and say when to come back."""
        if controller.next_timeout() <= now:
            self.record.probes += controller.on_timeout(now).probe
        send_at = _NEVER
        if now < self.record.end:
            size, next_send_time = self._size, controller.next_send_time
            send_at = next_send_time(now, size)
            while send_at <= now:
                packet = Packet(self.route, controller.on_packet_sent(now, size), size)
                packet.ect, packet.priority = self._ect, self._priority
                self.record.sent += 1
                self.route.send(now, packet)
                send_at = next_send_time(now, size)
        due = controller.next_timeout()
        due = min(due, send_at)
        if due < self._armed:
            self._armed = due
            self._engine.at(due, self._wake)


class ConstantSource:
    """Sends at a rate, whatever becomes of it: what overloads a link.

    The gaps are evenly distributed around size / rate, from half of it to one and a half, so that sources of
    the same rate don't march in step.  ``rate`` is bytes/s.
    """

    __slots__ = ("_engine", "_gap", "_priority", "_random", "_send", "_size", "record", "route")

    def __init__(
        self,
        engine: Engine,
        record: Record,
        route: Route,
        *,
        rate: float,
        size: int,
        random: Random,
        priority: int = 0,
    ) -> None:
        self._engine, self.record, self.route, self._random = engine, record, route, random
        self._gap, self._size, self._priority = size / rate, size, priority
        self._send = self._due
        engine.at(record.begin, self._send)

    def _due(self, now: float, _: object) -> None:
        if now >= self.record.end:
            return
        packet = Packet(self.route, self.record.sent, self._size)
        packet.priority = self._priority
        self.record.sent += 1
        self.route.send(now, packet)
        self._engine.at(now + self._gap * (0.5 + self._random.random()), self._send)
