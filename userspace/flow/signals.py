# SPDX-License-Identifier: Apache-2.0
"""Congestion in one word, for people and for programs that can do with less: none, mild or severe.

    signals = CongestionSignals()
    signals.end_round(acknowledged=990, lost=10, marked=0, rtt=0.052, min_rtt=0.040)     # once a round trip
    signals.on_overflow(64)                      # ring full, ENOBUFS, or what the kernel program dropped
    signals.level, signals.loss_rate, signals.rtt_increase, signals.ecn_share

It looks at four things: the part of the packets that was lost, how much the round-trip time stands above its
minimum, the part that came with a CE mark, and what never left this machine.  The worst of them decides.

A level rises at once and falls by one step after :data:`CALM_ROUNDS` rounds in a row that were below half of
what keeps it up.  So it does not flap where a value stands at a threshold, nor between the drops of a full
queue, which come every few rounds.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final

#: What a round leaves of the counts of those before: 7/8, as RFC 9002 smooths the round-trip time.  Counts,
#: not shares, are smoothed, so that a round of two packets says less than one of a thousand.
_KEPT: Final = 7 / 8
#: (mild, severe) part of packets lost.  2 % is what BBR tolerates (draft-ietf-ccwg-bbr: LossThresh); from
#: 10 % on people notice, and loss-based controllers are near their least window.
LOSS: Final = (0.02, 0.10)
#: Part of packets marked: a controller of RFC 9331 holds about two marks a round; half is a queue
#: that stays.
ECN: Final = (0.05, 0.50)
#: Seconds above the minimum: the target of CoDel, and the queue from which it drops in earnest (RFC 8289,
#: 4.2 and 4.3: target and interval).
DELAY: Final = (0.005, 0.100)
#: But not before the round-trip time has grown by these parts: 5 ms are nothing on a path of 200.
INCREASE: Final = (0.25, 1.0)
#: Part of packets that found no room below: any is mild.
OVERFLOW: Final = (0.0, 0.05)
#: Round trips; a window that was halved takes longer than that to fill its queue again.
CALM_ROUNDS: Final = 4
#: Probe timeouts in a row: one may be a lost packet at the end of a burst, two are silence.
SILENT_TIMEOUTS: Final = 2


class Level(IntEnum):
    """How congested a path is."""

    NONE = 0
    MILD = 1
    SEVERE = 2


def _graded(value: float, thresholds: tuple[float, float], scale: float = 1.0) -> int:
    return (value > thresholds[0] * scale) + (value > thresholds[1] * scale)


class CongestionSignals:
    """Smoothed signals of one path and their level.  Counts are what happened since the round before."""

    __slots__ = (
        "_calm", "_decided", "_lost", "_marked", "_overflow", "_overflowed", "_seen", "level", "rtt_delay",
        "rtt_increase",
    )  # fmt: skip

    def __init__(self) -> None:
        self.level = Level.NONE
        self._seen = self._decided = self._lost = self._marked = self._overflowed = 0.0
        self._overflow = 0  # packets since the last round
        self._calm = 0
        #: How far the latest smoothed round-trip time was above the least: seconds, and as a part of it.
        self.rtt_delay = self.rtt_increase = 0.0

    @property
    def loss_rate(self) -> float:
        """Part of the packets of the last rounds that was lost, 0 to 1."""
        return self._lost / self._decided if self._decided else 0.0

    @property
    def ecn_share(self) -> float:
        """Part of those that arrived that came with a CE mark, 0 to 1."""
        return self._marked / self._seen if self._seen else 0.0

    @property
    def overflow_share(self) -> float:
        """Packets that found no room below, by those that were sent, 0 to 1."""
        tried = self._decided + self._overflowed
        return self._overflowed / tried if tried else 0.0

    def on_overflow(self, packets: int) -> Level:
        """So many found no room in this machine; at least mild at once."""
        if packets > 0:
            self._overflow += packets
            self._rise(Level.MILD)
        return self.level

    def on_silence(self, timeouts: int) -> Level:
        """So many probe timeouts in a row: two are severe, because no round will end that says so."""
        if timeouts >= SILENT_TIMEOUTS:
            self._rise(Level.SEVERE)
        return self.level

    def end_round(self, *, acknowledged: int, lost: int, marked: int, rtt: float, min_rtt: float) -> Level:
        """What one round trip has shown: packets, and the smoothed and least round-trip time in seconds.

        What is negative or more than there can be is brought into range.
        """
        acknowledged, lost = max(0, acknowledged), max(0, lost)
        self._seen = self._seen * _KEPT + acknowledged
        self._decided = self._decided * _KEPT + acknowledged + lost
        self._lost = self._lost * _KEPT + lost
        self._marked = self._marked * _KEPT + min(max(0, marked), acknowledged)
        self._overflowed = self._overflowed * _KEPT + self._overflow
        self._overflow = 0
        self.rtt_delay = max(0.0, rtt - min_rtt) if min_rtt > 0.0 else 0.0
        self.rtt_increase = self.rtt_delay / min_rtt if min_rtt > 0.0 else 0.0
        grade = self._grade(1.0)
        if grade >= self.level:
            self._rise(Level(grade))
        elif self._grade(0.5) < self.level:
            self._calm += 1
            if self._calm >= CALM_ROUNDS:
                self._calm = 0
                self.level = Level(self.level - 1)
        else:
            self._calm = 0
        return self.level

    def _rise(self, level: Level) -> None:
        self._calm = 0
        self.level = max(self.level, level)

    def _grade(self, scale: float) -> int:
        """The level of the worst signal, with all thresholds scaled."""
        delay = min(_graded(self.rtt_delay, DELAY, scale), _graded(self.rtt_increase, INCREASE, scale))
        # Smoothed overflow never becomes nothing: a packet in a thousand is.
        overflow = _graded(max(0.0, self.overflow_share - 0.001), OVERFLOW, scale)
        return max(_graded(self.loss_rate, LOSS, scale), _graded(self.ecn_share, ECN, scale), delay, overflow)

    def __repr__(self) -> str:
        return (
            f"<CongestionSignals {self.level.name.lower()}: "
            f"loss {self.loss_rate:.2%}, marked {self.ecn_share:.2%}, "
            f"{self.rtt_delay * 1e3:.1f} ms above the least, overflow {self.overflow_share:.2%}>"
        )
