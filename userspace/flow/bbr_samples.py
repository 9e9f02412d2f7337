# SPDX-License-Identifier: Apache-2.0
"""What one acknowledgement tells BBR, and what was on its way when a packet was sent.

The second is not in an acknowledgement, but losses are judged by it: so many of what was in flight when the
newest of them was sent.  :class:`SendMarks` remembers it to a 32nd of a round trip, which is less than an
entry for every packet and as good: what matters are 2 % of what is in flight, over a round trip.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import Final

from userspace.flow.congestion import Ack
from userspace.flow.limits import WINDOW_MAXIMUM, believable_rate, believable_rtt

#: Of what was in flight: as much may be lost in a round of probing (BBR.LossThresh).
LOSS_THRESHOLD: Final = 0.02
#: Packets that a probe must lose besides 2 %.
LOST_PACKETS: Final = 2
#: Marks of a round trip: what was in flight is known to a 32nd.
_MARKS_PER_RTT: Final = 32
#: Marks kept at least: four round trips, what a queue of three times the BDP makes of one.
_MARKS: Final = 128


class Sample:
    """What one acknowledgement says (RS in the draft), cleaned of what can't be."""

    __slots__ = (
        "delivered", "delivery_rate", "is_app_limited", "lost", "newly_acked", "prior_delivered", "rtt",
        "tx_in_flight",
    )  # fmt: skip

    def __init__(self) -> None:
        self.newly_acked = 0
        self.delivered = 0  # between sending and acknowledgement of the newest
        self.prior_delivered = 0
        self.delivery_rate = 0.0
        self.is_app_limited = False
        self.rtt: float | None = None
        self.tx_in_flight = 0  # when the newest was sent
        self.lost = 0  # since it was

    def take(self, ack: Ack) -> None:
        """All that does not need the marks."""
        self.newly_acked = min(max(0, ack.bytes), WINDOW_MAXIMUM)
        self.prior_delivered = max(0, ack.prior_delivered)
        self.delivered = min(max(0, ack.delivered - self.prior_delivered), WINDOW_MAXIMUM)
        self.delivery_rate = believable_rate(ack.delivery_rate)
        self.is_app_limited = ack.app_limited
        self.rtt = believable_rtt(ack.rtt)

    def is_inflight_too_high(self, mtu: int) -> bool:
        """Whether more was lost than a probe may lose (IsInflightTooHigh)."""
        return self.lost > self.tx_in_flight * LOSS_THRESHOLD and self.lost >= LOST_PACKETS * mtu


class Mark:
    """The state when a packet was sent."""

    __slots__ = ("app_limited", "in_flight", "lost")

    def __init__(self, in_flight: int, lost: int, *, app_limited: bool) -> None:
        self.in_flight = in_flight  # with the packet
        self.lost = lost  # since the beginning
        self.app_limited = app_limited


class SendMarks:
    """What was on its way when packets were sent, by the time of sending; 256 marks at most."""

    __slots__ = ("_marks", "_next", "_times")

    def __init__(self, now: float) -> None:
        self._times = [now]
        self._marks = [Mark(0, 0, app_limited=False)]
        self._next = now

    def note(self, now: float, mark: Mark, rtt: float) -> None:
        """A packet leaves; kept if the last mark is a 32nd of ``rtt`` old, or of this very moment."""
        self._next = now + rtt / _MARKS_PER_RTT
        if now == self._times[-1]:
            self._marks[-1] = mark
            return
        self._times.append(now)
        self._marks.append(mark)
        if len(self._times) > 2 * _MARKS:
            del self._times[:_MARKS], self._marks[:_MARKS]

    def due(self, now: float) -> bool:
        """Whether a packet that leaves now is worth a mark."""
        return now >= self._next or now == self._times[-1]

    def at(self, sent_at: float) -> Mark:
        """The last before that time, or the oldest there is."""
        return self._marks[max(0, bisect_right(self._times, sent_at) - 1)]
