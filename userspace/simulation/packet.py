# SPDX-License-Identifier: Apache-2.0
"""What travels in a simulated network, and its way."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from userspace.flow.ranges import Acknowledgement
    from userspace.simulation.link import Link


class Route:
    """Links, one after the other, and who gets what comes out of the last one."""

    __slots__ = ("deliver", "flow", "links")

    def __init__(self, flow: int, links: tuple[Link, ...], deliver: Callable[[float, Packet], None]) -> None:
        self.flow = flow  # its number: what queues and counters tell flows apart by
        self.links = links
        self.deliver = deliver

    def send(self, now: float, packet: Packet) -> None:
        """Put a new packet on its way."""
        if self.links:
            self.links[0].send(now, packet)
        else:
            self.deliver(now, packet)


class Packet:
    """One datagram; belongs to the link that it is in.

    ``size`` is bytes of UDP payload, as everywhere in userspace/flow: rates of links are bytes of payload
    per second, headers are not simulated.
    """

    __slots__ = ("body", "ce", "corrupt", "ect", "hop", "priority", "queued_at", "route", "sequence", "size")

    def __init__(self, route: Route, sequence: int, size: int) -> None:
        self.route = route
        self.sequence = sequence
        self.size = size
        self.hop = 0  # index of the link that it is in
        self.queued_at = 0.0  # when it came to that link, seconds
        self.priority = 0  # 0 is the highest
        self.ect = False  # may be marked (RFC 3168)
        self.ce = False  # was marked
        self.corrupt = False  # its checksum is wrong: the receiver drops it
        self.body: Acknowledgement | None = None  # what it says, if it is one

    def copy(self) -> Packet:
        """The same once more, as a network that duplicates delivers it."""
        other = Packet(self.route, self.sequence, self.size)
        other.hop, other.queued_at, other.priority = self.hop, self.queued_at, self.priority
        other.ect, other.ce, other.corrupt, other.body = self.ect, self.ce, self.corrupt, self.body
        return other
