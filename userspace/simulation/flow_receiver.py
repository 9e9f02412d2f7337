# SPDX-License-Identifier: Apache-2.0
"""Who receives a flow: :class:`userspace.flow.ranges.ReceivedPackets` in virtual time, and who only counts.

An acknowledgement is a packet like any other on its way back.  It may be lost: the next one says it again.
"""

from __future__ import annotations

import math
from typing import Final

from userspace.flow.ranges import CE, ECT_0, NOT_ECT, ReceivedPackets
from userspace.simulation.engine import Engine
from userspace.simulation.flow_sender import Record
from userspace.simulation.packet import Packet, Route

#: Bytes of an acknowledgement: a short header and a few ranges.
ACK_SIZE: Final = 40
_NEVER: Final = math.inf


class FlowReceiver:
    """Counts what arrives and acknowledges it on ``route``, which is set when its other end is there."""

    __slots__ = ("_armed", "_engine", "_received", "_wake", "acknowledgements", "record", "route")

    def __init__(self, engine: Engine, record: Record) -> None:
        self._engine, self.record = engine, record
        self.route: Route | None = None
        self.acknowledgements = 0  # sent
        self._received = ReceivedPackets()
        self._armed = _NEVER  # when the earliest call of _woken is due
        self._wake = self._woken

    def receive(self, now: float, packet: Packet) -> None:
        """A packet came out of the last link."""
        record, received = self.record, self._received
        if packet.corrupt:
            record.corrupted += 1
            return
        ecn = CE if packet.ce else ECT_0 if packet.ect else NOT_ECT
        if not received.add(now, packet.sequence, ecn=ecn):
            record.duplicates += 1
            return
        record.arrived(now, packet.size)
        record.marked += packet.ce
        self._arm(now)

    def _woken(self, now: float, _: object) -> None:
        if now == self._armed:  # else an earlier time was wanted later: that call was made already
            self._armed = _NEVER
            self._arm(now)

    def _arm(self, now: float) -> None:
        """Acknowledge if that is due, else come back when it will be."""
        due = self._received.ack_due_at
        if due <= now:
            self._acknowledge(now)
        elif due < self._armed:
            self._armed = due
            self._engine.at(due, self._wake)

    def _acknowledge(self, now: float) -> None:
        assert self.route is not None
        packet = Packet(self.route, self.acknowledgements, ACK_SIZE)
        packet.body = self._received.take_ack(now)
        self.acknowledgements += 1
        self.route.send(now, packet)


class Sink:
    """Counts what comes from a source that wants no acknowledgements."""

    __slots__ = ("record",)

    def __init__(self, record: Record) -> None:
        self.record = record

    def receive(self, now: float, packet: Packet) -> None:
        """A packet came out of the last link."""
        if packet.corrupt:
            self.record.corrupted += 1
        else:
            self.record.arrived(now, packet.size)
