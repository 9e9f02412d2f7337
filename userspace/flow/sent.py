# SPDX-License-Identifier: Apache-2.0
"""Packets that are on their way, in the order of their numbers, and how many bytes were delivered so far.

A packet is a tuple in a ring, at ``slots[number & mask]``; None where it was acknowledged, lost or never
sent.  ``base`` is the oldest number that is on its way, ``next`` the next one to be sent, and everything
between them has a place.  The ring begins small, doubles when it is full, and stops at ``limit``, rounded up
to a power of two.

The rate sample of an acknowledgement (draft-cheng-iccrg-delivery-rate-estimation, 3) needs to know of each
packet what had been delivered when it left.  Packets that leave between two acknowledgements share that, so a
packet costs a tuple of three and nothing else.
"""

from __future__ import annotations

from typing import Final

from xdp.errors import UsageError

#: What had been delivered when a packet left: bytes, when the latest of them were, when the first packet of
#: its sample left, and whether the sample is limited by a want of data.
Delivery = tuple[int, float, float, bool]
#: Bytes, when it left, what had been delivered then.
Packet = tuple[int, float, Delivery]

#: Slots of a peer with little to say; ten packets of the initial window fit.
FIRST_SLOTS: Final = 16
#: 65,536 packets of 1,200 bytes on their way are 6 Gb/s over 100 ms.
LIMIT: Final = 1 << 16
#: No ring is larger than this, whatever is asked for: 8 bytes each, and a tuple of 64 in use.
LIMIT_MAXIMUM: Final = 1 << 22


def check_whole(name: str, value: object, least: int, most: int) -> None:
    """UsageError unless it is a whole number of that range."""
    if type(value) is not int or not least <= value <= most:
        raise UsageError(f"{name} is a whole number from {least} to {most}, not {value!r}")


class SentPackets:
    """Numbers, sizes and times of what is on its way.  Whoever calls keeps ``now`` from going backwards."""

    __slots__ = (
        "app_limited_until", "base", "delivered", "delivery", "in_flight", "last_sent_at", "limit", "mask",
        "next", "slots",
    )  # fmt: skip

    def __init__(self, now: float, limit: int = LIMIT) -> None:
        check_whole("limit", limit, 2, LIMIT_MAXIMUM)
        self.limit = limit
        self.slots: list[Packet | None] = [None] * FIRST_SLOTS
        self.mask = FIRST_SLOTS - 1
        self.base = self.next = 0
        self.in_flight = 0  # bytes
        self.last_sent_at = now
        #: Bytes that are known to have arrived.
        self.delivered = 0
        #: Until so much is delivered, samples say little of the path (draft, 3.4); 0: they do.
        self.app_limited_until = 0
        self.delivery: Delivery = (0, now, now, False)

    def add(self, now: float, size: int, app_limited: bool) -> int:
        """One has left; its number.  UsageError when the ring is full and at its limit."""
        number = self.next
        if number - self.base > self.mask:
            self._grow()
        in_flight = self.in_flight
        if app_limited:
            self.app_limited_until = self.delivered + in_flight + size
        if app_limited or not in_flight:
            self._begin_sample(now)
        self.slots[number & self.mask] = (size, now, self.delivery)
        self.next = number + 1
        self.in_flight = in_flight + size
        self.last_sent_at = now
        return number

    def _begin_sample(self, now: float) -> None:
        """After a pause, or when there is not enough to send."""
        _, delivered_at, first_sent_at, _ = self.delivery
        if not self.in_flight:
            delivered_at = first_sent_at = now
        self.delivery = self.delivered, delivered_at, first_sent_at, self.app_limited_until > 0

    def _grow(self) -> None:
        room = len(self.slots)
        if room >= self.limit:
            raise UsageError(f"{room} packets are on their way, no more are kept", hint="ask can_send first")
        mask = 2 * room - 1
        slots: list[Packet | None] = [None] * (2 * room)
        for number in range(self.base, self.next):
            slots[number & mask] = self.slots[number & self.mask]
        self.slots, self.mask = slots, mask

    def take(self, number: int) -> Packet | None:
        """Remove one that is on its way from it, delivered or not; None if it is not."""
        if not self.base <= number < self.next:
            return None
        packet = self.slots[number & self.mask]
        if packet is not None:
            self.slots[number & self.mask] = None
            self.in_flight -= packet[0]
            if number == self.base:
                self.advance()
        return packet

    def advance(self) -> None:
        """Move the base on to the oldest that is still on its way."""
        base, end, slots, mask = self.base, self.next, self.slots, self.mask
        while base < end and slots[base & mask] is None:
            base += 1
        self.base = base

    def count(self) -> int:
        """How many are on their way.  Counts them."""
        slots, mask = self.slots, self.mask
        return sum(slots[number & mask] is not None for number in range(self.base, self.next))
