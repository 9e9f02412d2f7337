# SPDX-License-Identifier: Apache-2.0
"""Queues of links: tail drop, CoDel, FQ-CoDel, and priorities.

A discipline is what :class:`userspace.simulation.link.Discipline` says.  All but the first are the queues of
:mod:`userspace.flow`, the same that programs use for what they send.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from userspace.flow.bounded import BoundedQueue, DropReason, Limits
from userspace.flow.codel import INTERVAL, TARGET, CoDel
from userspace.flow.fair import FairQueue as FlowFairQueue
from userspace.simulation.packet import Packet
from xdp.errors import UsageError


def ignore(packet: Packet, reason: str) -> None:
    """For a queue that is in no link."""


class TailDrop:
    """First in, first out; what finds it full is dropped.

    ``limit_bytes``, ``limit_packets``: how much may wait; one of them at least.
    """

    __slots__ = ("_limit_bytes", "_limit_packets", "_waiting", "bytes", "dropped")

    def __init__(self, *, limit_bytes: int | None = None, limit_packets: int | None = None) -> None:
        if limit_bytes is None and limit_packets is None:
            raise UsageError("a queue has a limit", hint="limit_bytes, limit_packets or both")
        for name, limit in (("limit_bytes", limit_bytes), ("limit_packets", limit_packets)):
            if limit is not None and (type(limit) is not int or limit < 1):
                raise UsageError(f"{name} is a whole number from 1, not {limit!r}")
        self._limit_bytes = limit_bytes or float("inf")
        self._limit_packets = limit_packets or float("inf")
        self._waiting: deque[Packet] = deque()
        self.bytes = 0
        self.dropped: Callable[[Packet, str], None] = ignore

    @property
    def packets(self) -> int:
        """That wait now."""
        return len(self._waiting)

    def enqueue(self, now: float, packet: Packet) -> None:  # noqa: ARG002
        """At the end, if there is room."""
        total = self.bytes + packet.size
        if total > self._limit_bytes or len(self._waiting) >= self._limit_packets:
            self.dropped(packet, "full")
            return
        self.bytes = total
        self._waiting.append(packet)

    def dequeue(self, now: float) -> Packet | None:  # noqa: ARG002
        """The oldest."""
        if not self._waiting:
            return None
        packet = self._waiting.popleft()
        self.bytes -= packet.size
        return packet


def mark(packet: Packet) -> bool:
    """Congestion experienced, if the sender can be told so (RFC 3168)."""
    packet.ce = packet.ce or packet.ect
    return packet.ect


class _Managed:
    """What the queues of userspace/flow have in common here: drops are told to the link."""

    __slots__ = ("_queue", "dropped")

    def __init__(self) -> None:
        self._queue: CoDel[Packet] | FlowFairQueue[Packet] | BoundedQueue[Packet]
        self.dropped: Callable[[Packet, str], None] = ignore

    def _on_drop(self, packet: Packet, _: int, reason: DropReason) -> None:
        self.dropped(packet, reason.value)

    @property
    def packets(self) -> int:
        """That wait now."""
        return len(self._queue)

    @property
    def bytes(self) -> int:
        """Of them."""
        return self._queue.bytes

    def dequeue(self, now: float) -> Packet | None:
        """What the queue lets pass next."""
        return self._queue.dequeue(now)


class CoDelQueue(_Managed):
    """One queue under CoDel (RFC 8289); ``ecn``: what can be marked is marked instead of dropped."""

    __slots__ = ()

    _queue: CoDel[Packet]

    def __init__(
        self, *, limit_packets: int, target: float = TARGET, interval: float = INTERVAL, ecn: bool = False
    ) -> None:
        super().__init__()
        self._queue = CoDel(
            target=target,
            interval=interval,
            limits=Limits(packets=limit_packets),
            mark=mark if ecn else None,
            on_drop=self._on_drop,
        )

    def enqueue(self, now: float, packet: Packet) -> None:
        """At the end, if there is room."""
        self._queue.enqueue(now, packet, packet.size)


class FairQueue(_Managed):
    """FQ-CoDel (RFC 8290): flows take turns, and each is under CoDel."""

    __slots__ = ()

    _queue: FlowFairQueue[Packet]

    def __init__(self, *, limit_packets: int, ecn: bool = False) -> None:
        super().__init__()
        self._queue = FlowFairQueue(
            limits=Limits(packets=limit_packets), mark=mark if ecn else None, on_drop=self._on_drop
        )

    def enqueue(self, now: float, packet: Packet) -> None:
        """Behind those of its flow."""
        self._queue.enqueue(now, packet, packet.size, key=packet.route.flow)


class PriorityQueue(_Managed):
    """Strict priorities; where it is full, the oldest of the lowest class gives way."""

    __slots__ = ()

    _queue: BoundedQueue[Packet]

    def __init__(self, *, classes: int, limit_packets: int) -> None:
        super().__init__()
        self._queue = BoundedQueue(
            classes=classes, total=Limits(packets=limit_packets), on_drop=self._on_drop
        )

    def enqueue(self, now: float, packet: Packet) -> None:
        """Behind those of its class."""
        self._queue.enqueue(now, packet, packet.size, packet.priority)
