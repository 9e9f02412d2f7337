# SPDX-License-Identifier: Apache-2.0
"""HyStart++ (RFC 9406): leave slow start when the round-trip time rises, not when packets are lost.

    hystart = HyStart()
    divisor = hystart.on_ack(ack)      # for every acknowledgement that lets the first slow start grow
    if divisor:
        window += ack.bytes // divisor
    else:
        ssthresh = window              # and never ask again

Slow start doubles the window every round.  When the shortest round-trip time of a round is clearly above that
of the round before, a queue builds up: for five rounds the window then grows by a quarter of that
(conservative slow start).  If the time falls again in them, it was a mistake, and slow start goes on; else
congestion avoidance begins where the window is now.

Rounds are told by delivered bytes: a round ends when a packet is acknowledged that was sent after it began.
That is exact also where many packets carry the same time, and takes one comparison an acknowledgement.

The limit L of RFC 9406, 4.3, is for senders that don't pace; who uses this does, so it is infinite here.
"""

from __future__ import annotations

from typing import Final

from userspace.flow.congestion import Ack

# RFC 9406, 4.3.
#: Seconds: a rise of less than that is noise, and one of more is a queue, however long the path is.
MIN_RTT_THRESH: Final = 0.004
MAX_RTT_THRESH: Final = 0.016
#: In between: this part of the round-trip time.
MIN_RTT_DIVISOR: Final = 8
#: Samples of a round before its minimum counts.
N_RTT_SAMPLE: Final = 8
#: Conservative slow start grows so many times more slowly,
CSS_GROWTH_DIVISOR: Final = 4
#: and takes so many rounds; one that it began within is one of them.
CSS_ROUNDS: Final = 5

_NONE: Final = float("inf")  # seconds: no round-trip time yet


class HyStart:
    """Decides how fast the first slow start grows.  It has no clock and no errors."""

    __slots__ = ("_baseline", "_current", "_last", "_round_ends", "_rounds", "_samples")

    def __init__(self) -> None:
        #: Bytes delivered when the round began: what is sent from then on has at least so many before it.
        self._round_ends = 0
        self._samples = 0
        self._current = self._last = _NONE  # seconds: minima of this round and of the one before
        self._baseline = _NONE  # seconds: the minimum that conservative slow start began with
        self._rounds = 0  # left of it; 0: slow start

    @property
    def conservative(self) -> bool:
        """In conservative slow start (CSS)."""
        return self._rounds > 0

    def on_ack(self, ack: Ack) -> int:
        """By what to divide the growth: 1, or CSS_GROWTH_DIVISOR; 0: slow start is over."""
        if ack.prior_delivered >= self._round_ends:
            self._round_ends = ack.delivered
            self._last, self._current = self._current, _NONE
            self._samples = 0
            if self._rounds:
                self._rounds -= 1
                if not self._rounds:
                    return 0
        rtt = ack.rtt
        if rtt is not None:
            self._samples += 1
            self._current = min(self._current, rtt)
            if self._samples >= N_RTT_SAMPLE:
                self._compare()
        return CSS_GROWTH_DIVISOR if self._rounds else 1

    def _compare(self) -> None:
        """Begin conservative slow start, or go back to slow start, as this round's minimum says."""
        if self._rounds:
            if self._current < self._baseline:
                self._rounds = 0
        elif self._last != _NONE:
            rise = max(MIN_RTT_THRESH, min(self._last / MIN_RTT_DIVISOR, MAX_RTT_THRESH))
            if self._current >= self._last + rise:
                self._baseline = self._current
                self._rounds = CSS_ROUNDS
