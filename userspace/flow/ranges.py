# SPDX-License-Identifier: Apache-2.0
"""The receiver's side: which packets arrived, when to say so, and what to say.

    received = ReceivedPackets()
    if received.add(now, number, ecn=ECT_0):         # False: a duplicate, or too old to tell
        ...                                          # use the packet
    if now >= received.ack_due_at:
        ack = received.take_ack(now)                 # ranges newest first, delay, count of CE marks
    peer.on_ack_received(later, ack.ranges, ack.delay, ack.ce_count)

An acknowledgement is due after every second packet, at once when one comes out of order or with a CE mark,
and at the latest after ``max_ack_delay`` (RFC 9000, 13.2.1 and 13.2.2).  It says everything that is still
remembered, so nothing depends on any single one arriving.

At most ``limit`` ranges are remembered.  When there are more the oldest is forgotten, and all numbers up to
its end count as seen: a packet that may be a duplicate is never taken for a new one.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from typing import Final, NamedTuple

from userspace.flow.rtt import MAX_ACK_DELAY, MOST_RTT, checked_seconds
from userspace.flow.sent import check_whole

#: Ranges: with 1 % of random loss, those of the last 3,200 packets.
RANGES: Final = 32
RANGES_LIMIT: Final = 1024
#: Packets (RFC 9000, 13.2.2).
ACK_EVERY: Final = 2
#: The largest number of a packet: what fits a QUIC variable-length integer (RFC 9000, 12.3).
NUMBER_MAXIMUM: Final = (1 << 62) - 1

#: The ECN field of a packet (RFC 3168, 5).
NOT_ECT: Final = 0
ECT_1: Final = 1
ECT_0: Final = 2
CE: Final = 3

_NEVER: Final = math.inf


class Acknowledgement(NamedTuple):
    """What a peer is told."""

    #: Inclusive (first, last) pairs, newest first.
    ranges: tuple[tuple[int, int], ...]
    #: Seconds since the newest of them came.
    delay: float
    #: Packets so far that came with a CE mark.
    ce_count: int


class ReceivedPackets:
    """Numbers that arrived, as ranges, and when the next acknowledgement is due.

    ``limit`` ranges, ``max_ack_delay`` seconds, ``ack_every`` packets.  Raises UsageError for values out of
    range; numbers and ECN fields come from the network and may be any int.
    """

    __slots__ = (
        "_ack_every", "_firsts", "_largest_at", "_lasts", "_limit", "_max_ack_delay", "_unacknowledged",
        "ack_due_at", "ce_count", "duplicates", "ect_0_count", "ect_1_count", "floor", "invalid", "packets",
    )  # fmt: skip

    def __init__(
        self, *, limit: int = RANGES, max_ack_delay: float = MAX_ACK_DELAY, ack_every: int = ACK_EVERY
    ) -> None:
        check_whole("limit", limit, 1, RANGES_LIMIT)
        check_whole("ack_every", ack_every, 1, 1 << 16)
        self._limit, self._ack_every = limit, ack_every
        self._max_ack_delay = checked_seconds("max_ack_delay", max_ack_delay, 0.0, MOST_RTT)
        # Oldest first, so that the usual packet changes the end of a list.
        self._firsts: list[int] = []
        self._lasts: list[int] = []
        #: Everything below counts as seen.
        self.floor = 0
        self._largest_at = 0.0
        self._unacknowledged = 0
        #: When an acknowledgement is due; infinite while there is nothing new to say.
        self.ack_due_at = _NEVER
        # Counters since the beginning.
        self.packets = self.duplicates = self.invalid = 0
        self.ect_0_count = self.ect_1_count = self.ce_count = 0

    def add(self, now: float, number: int, *, ecn: int = NOT_ECT) -> bool:
        """A packet came.  False when it is a duplicate, or may be one, or has no possible number."""
        lasts = self._lasts
        largest = lasts[-1] if lasts else self.floor - 1
        if number == largest + 1 and lasts and number <= NUMBER_MAXIMUM:
            lasts[-1] = number
            in_order = True
        elif not 0 <= number <= NUMBER_MAXIMUM:
            self.invalid += 1
            return False
        elif number < self.floor or not self._insert(number):
            self.duplicates += 1
            return False
        else:
            in_order = number == largest + 1
        self.packets += 1
        if number > largest:
            self._largest_at = now
        if ecn:
            if ecn == CE:
                self.ce_count += 1
                in_order = False
            elif ecn == ECT_0:
                self.ect_0_count += 1
            elif ecn == ECT_1:
                self.ect_1_count += 1
        self._unacknowledged += 1
        if not in_order or self._unacknowledged >= self._ack_every:
            self.ack_due_at = now
        elif self.ack_due_at == _NEVER:
            self.ack_due_at = now + self._max_ack_delay
        return True

    def _insert(self, number: int) -> bool:
        """Into the ranges; False when it is in one already, or would be forgotten at once."""
        firsts, lasts = self._firsts, self._lasts
        index = bisect_right(firsts, number)  # of the first range above it
        if index and number <= lasts[index - 1]:
            return False
        joins_below = index > 0 and lasts[index - 1] == number - 1
        joins_above = index < len(firsts) and firsts[index] == number + 1
        if joins_below and joins_above:
            lasts[index - 1] = lasts.pop(index)
            del firsts[index]
        elif joins_below:
            lasts[index - 1] = number
        elif joins_above:
            firsts[index] = number
        elif index == 0 and len(firsts) == self._limit:
            return False  # there is no room below the oldest
        else:
            firsts.insert(index, number)
            lasts.insert(index, number)
            if len(firsts) > self._limit:
                self.floor = lasts.pop(0) + 1
                del firsts[0]
        return True

    def __contains__(self, number: int) -> bool:
        """Whether it counts as seen."""
        if number < self.floor:
            return number >= 0
        index = bisect_right(self._firsts, number)
        return index > 0 and number <= self._lasts[index - 1]

    @property
    def largest(self) -> int:
        """The largest number so far; -1 before the first."""
        return self._lasts[-1] if self._lasts else -1

    def ranges(self, limit: int = RANGES_LIMIT) -> tuple[tuple[int, int], ...]:
        """Inclusive (first, last) pairs, newest first, so many at most."""
        return tuple(zip(self._firsts[: -limit - 1 : -1], self._lasts[: -limit - 1 : -1], strict=True))

    def take_ack(self, now: float, limit: int = RANGES_LIMIT) -> Acknowledgement | None:
        """What to tell the peer now, due or not; None before the first packet."""
        if not self._lasts:
            return None
        self._unacknowledged = 0
        self.ack_due_at = _NEVER
        return Acknowledgement(self.ranges(limit), max(0.0, now - self._largest_at), self.ce_count)

    def __repr__(self) -> str:
        return (
            f"<ReceivedPackets: {self.packets} up to {self.largest} in {len(self._firsts)} ranges, "
            f"{self.duplicates} duplicates>"
        )
