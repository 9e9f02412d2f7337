# SPDX-License-Identifier: Apache-2.0
"""Copa: a window that aims at a queue of a few packets, by delay alone.

After "Copa: Practical Delay-Based Congestion Control for the Internet" (Arun and Balakrishnan, NSDI 2018).
The queueing delay is measured with every acknowledgement: the least round-trip time of the last half round
trip ("standing") less the least of the last 10 s.  From it follows the rate that this flow should have,

    target = 1 / (delta * queueing delay)     packets/s; delta = 0.5: two packets of its own in the queue

and the window moves towards it, by ``velocity / delta`` packets a round trip; the velocity doubles while it
keeps its direction.  All flows of a bottleneck see the same delay, so they end up with the same rate,
whatever their round-trip times; and the queue becomes empty now and then, so all of them know the least RTT.

A flow that fills queues (CUBIC) would starve it.  So when the queue has not been nearly empty for ten round
trips, there must be one, and delta follows losses as Reno's window does (competitive mode) until it is empty
again.

For voice, games and control data beside bulk: a delay of some ms where BBR takes some ten.  Two things are
not in the paper, which leaves losses alone in default mode:

- more than 5 % lost in a round trip (a policer, or a queue shorter than two packets for each flow: no delay
  that shows) take 30 % of the window;
- CE marks take 20 % of it once in a round trip, as RFC 8511 has it for such marks.
"""

from __future__ import annotations

from typing import Final

from userspace.flow.congestion import MAX_DATAGRAM_SIZE, Ack, Loss, initial_window, minimum_window
from userspace.flow.filters import WindowedMax, WindowedMin
from userspace.flow.limits import (
    RATE_MAXIMUM,
    RTT_MINIMUM,
    WINDOW_MAXIMUM,
    believable_rate,
    believable_rtt,
    checked_mtu,
    checked_now,
)

#: 1 / packets of its own that a flow wants in the queue (default mode; section 2.1 of the paper).
DELTA: Final = 0.5
#: The least of it in competitive mode: 1024 packets, or a row of rounds without losses would have no end.
_DELTA_LEAST: Final = 1 / 1024
#: Seconds that the least round-trip time is believed (section 2.2).
_MIN_RTT_WINDOW: Final = 10.0
#: Of the smoothed round-trip time: what the standing one is the least of.  Shorter sees bursts of
#: acknowledgements, longer is late (section 2.2).
_STANDING: Final = 0.5
#: Seconds, and part of the least round-trip time: delays below are those of timers and batches (RFC 9002,
#: 6.1.2, counts on 1 ms), not of a queue.  Without this, 1 ms of jitter would hold a flow to 2 packets/ms.
_NOISE: Final = 0.001
_NOISE_SHARE: Final = 1 / 16
#: Round trips of one direction before the velocity doubles (section 2.1).
_STEADY_ROUNDS: Final = 3
#: Acknowledgements in a row that show too much delay before a steep rise ends (RFC 9406 takes as many
#: samples): those after a silence are few and may be late by chance.
_DELAYED_SAMPLES: Final = 8
#: Of the window: as much may be moved in a round trip.  What a move does shows a round trip later, so a
#: velocity that doubles without end would overshoot by the whole window.
_MOVE_MAXIMUM: Final = 0.25
#: Of the largest delay of four round trips: less is "nearly empty"; so long without it, and others fill the
#: queue (section 2.2, which has five round trips: 16 flows that began at different times empty the queue less
#: often, and would all believe to compete).
_NEARLY_EMPTY: Final = 0.1
_LARGEST_ROUNDS: Final = 4.0
_COMPETING_ROUNDS: Final = 10.0
#: Of what is sent in a round trip: losses beyond are congestion that no delay showed; three packets at least,
#: since two of a small window may be bad luck.
_LOSS_THRESHOLD: Final = 0.05
_LOSS_PACKETS: Final = 3
_LOSS_BETA: Final = 0.7
#: What a CE mark leaves (RFC 8511).
_ECN_BETA: Final = 0.8
#: Sending is twice as fast as the window by round-trip time: bursts are spread, the window decides.
_PACING_GAIN: Final = 2.0


class Copa:
    """A controller of one path (:class:`~userspace.flow.congestion.Congestion`).

    Draws nothing at random: ``seed`` is taken for the sake of the others.  Raises UsageError for an ``mtu``
    or ``now`` that can't be.  ``ssthresh`` is the window at which slow start ended.
    """

    __slots__ = (
        "_acked", "_bdp", "_delayed", "_delta", "_direction", "_empty_at", "_largest", "_least",
        "_losses_until", "_lost", "_lost_packets", "_mtu", "_now", "_round_end", "_round_window",
        "_slow_start", "_standing", "_steady", "_undo", "_velocity", "_window", "competitive",
        "pacing_rate", "ssthresh", "window",
    )  # fmt: skip

    name: str = "copa"
    every_packet: bool = False

    def __init__(self, now: float, mtu: int = MAX_DATAGRAM_SIZE, seed: int = 0) -> None:  # noqa: ARG002  # CongestionFactory has it
        self._now = checked_now(now)
        self._mtu = checked_mtu(mtu)
        self._least, self._standing, self._largest = WindowedMin(), WindowedMin(), WindowedMax()
        self._begin(initial_window(mtu))

    def _begin(self, window: int) -> None:
        self._window = float(window)  # bytes
        self.window = window
        self.pacing_rate: float | None = None
        self.ssthresh: int | None = None
        self._slow_start = True
        self._delayed = 0  # acknowledgements in a row
        self._velocity = 1.0
        self._direction = self._steady = 0  # 1: up, -1: down; for how many round trips
        self._round_end = self._round_window = 0.0
        self._acked = self._lost = self._lost_packets = 0  # in this round trip
        self._bdp = 0.0  # bytes that were on their way without the queue; 0.0: not known
        self._losses_until = -1.0  # sent until then: the same congestion
        self._undo: tuple[float, float, bool] | None = None
        self._delta = DELTA
        self.competitive = False
        self._empty_at = self._now
        for rtts in (self._least, self._standing, self._largest):
            rtts.clear()

    def __repr__(self) -> str:
        mode = "competitive" if self.competitive else "default"
        return f"<Copa {mode} window={self.window} delta={self._delta:.4g}>"

    @property
    def delta(self) -> float:
        """1 / packets wanted in the queue, at the moment."""
        return self._delta

    # --- what happens

    def on_sent(self, now: float, size: int, in_flight: int, *, app_limited: bool) -> None:
        """Nothing follows from that."""

    def on_ack(self, now: float, ack: Ack) -> None:
        """Measure the delay, move the window towards its target."""
        self._now = now = max(self._now, now)
        rtt, srtt = believable_rtt(ack.rtt), believable_rtt(ack.smoothed_rtt)
        acked = min(max(0, ack.bytes), WINDOW_MAXIMUM)
        self._acked += acked
        if srtt is None:
            return
        if rtt is not None:
            self._least.update(now, rtt, _MIN_RTT_WINDOW)
            self._standing.update(now, rtt, srtt * _STANDING)
            self._largest.update(now, rtt, srtt * _LARGEST_ROUNDS)
        least, standing, largest = self._least.value, self._standing.value, self._largest.value
        if least is None or standing is None or largest is None:
            return
        delay = max(0.0, standing - least - min(_NOISE, least * _NOISE_SHARE))
        self._detect_competition(delay, largest - least, srtt)
        if ack.largest_sent_at >= self._round_end:
            self._next_round(now)
        # Packets: what the target rate would have on its way in a standing round trip.
        target = standing / (self._delta * delay) * self._mtu if delay > RTT_MINIMUM else WINDOW_MAXIMUM
        up = self._window <= target
        if rate := believable_rate(ack.delivery_rate):
            self._bdp = rate * least
        self._delayed = 0 if up else self._delayed + 1
        if self._delayed == _DELAYED_SAMPLES and (self._slow_start or self._climbing):
            self._end_climb()
        if ack.app_limited:
            pass  # the window is not what limits it: no reason to have more, and none to have less
        elif not self._slow_start:
            self._move(1 if up else -1, acked)
        elif up:
            self._window += acked
        self._settle(standing)

    def on_loss(self, now: float, loss: Loss) -> None:
        """In competitive mode delta gives way; in any, the window does to losses that are too many."""
        self._now = max(self._now, now)
        self._lost += min(max(0, loss.bytes), WINDOW_MAXIMUM)
        self._lost_packets += min(max(0, loss.packets), WINDOW_MAXIMUM)
        if not loss.largest_sent_at > self._losses_until:
            return
        if self.competitive:
            self._save()
            self._delta = min(2 * self._delta, DELTA)
            self._losses_until = self._now
        sent = max(self._window, self._acked + self._lost)
        if self._lost_packets >= _LOSS_PACKETS and self._lost > _LOSS_THRESHOLD * sent:
            self._reduce(max(_LOSS_BETA, min(1.0, self._bdp / self._window)))

    def on_ecn(self, now: float, marked: int, largest_sent_at: float) -> None:
        """Once in a round trip."""
        self._now = max(self._now, now)
        if marked > 0 and largest_sent_at > self._losses_until:
            self._reduce(_ECN_BETA)
            if self.competitive:
                self._delta = min(2 * self._delta, DELTA)

    def on_spurious(self, now: float) -> None:
        """The window and delta before the latest losses."""
        self._now = max(self._now, now)
        if self._undo is not None:
            window, delta, slow_start = self._undo
            self._undo = None
            self._window = max(self._window, window)
            self._delta = min(self._delta, delta)
            if slow_start and not self._slow_start:
                self._slow_start, self.ssthresh = True, None
            self._settle(self._standing.value)

    def on_persistent(self, now: float) -> None:
        """Nothing came through for long: slow start with two packets, as on another path."""
        self._now = max(self._now, now)
        self._begin(minimum_window(self._mtu))

    def on_mtu(self, mtu: int) -> None:
        """Full packets have another size now."""
        self._mtu = checked_mtu(mtu)
        self._settle(self._standing.value)

    # --- the window

    def _move(self, direction: int, acked: int) -> None:
        """By velocity / delta packets for a window that is acknowledged."""
        velocity = self._velocity if direction == self._direction else 1.0
        step = min(velocity / self._delta * self._mtu, _MOVE_MAXIMUM * self._window)
        self._window += direction * step * min(1.0, acked / self._window)

    @property
    def _climbing(self) -> bool:
        return self._direction > 0 and self._velocity > 1.0

    def _end_climb(self) -> None:
        """What the last round trip added does not show in the delay yet: take what is known to fit."""
        if self._bdp:
            self._window = min(self._window, self._bdp + self._mtu / self._delta)
        self._velocity, self._steady = 1.0, 0
        if self._slow_start:
            self._slow_start = False
            self.ssthresh = int(self._window)

    def _next_round(self, now: float) -> None:
        """Once in a round trip: has the window kept its direction?"""
        direction = 1 if self._window > self._round_window else -1
        if not self._slow_start and self._round_window:
            if direction == self._direction:
                self._steady += 1
                if self._steady >= _STEADY_ROUNDS:
                    self._velocity = min(2 * self._velocity, WINDOW_MAXIMUM)
            else:
                self._velocity, self._steady = 1.0, 0
            self._direction = direction
        if self.competitive and not self._lost and self._acked:
            self._delta = max(self._delta / (1 + self._delta), _DELTA_LEAST)  # 1/delta grows by 1
        self._round_window = self._window
        self._round_end = now
        self._acked = self._lost = self._lost_packets = 0

    def _detect_competition(self, delay: float, largest: float, srtt: float) -> None:
        """Copa alone empties the queue every five round trips; who does not is another."""
        if delay <= _NEARLY_EMPTY * largest:
            self._empty_at = self._now
            if self.competitive:
                self.competitive, self._delta = False, DELTA
        elif self._now - self._empty_at > _COMPETING_ROUNDS * srtt and not self.competitive:
            self.competitive = True

    def _save(self) -> None:
        self._undo = (self._window, self._delta, self._slow_start)

    def _reduce(self, beta: float) -> None:
        if self._losses_until < self._now:
            self._save()
        self._window *= beta
        if self._slow_start:
            self._slow_start = False
            self.ssthresh = int(self._window)
        self._velocity, self._direction, self._steady = 1.0, -1, 0
        self._losses_until = self._now
        self._settle(self._standing.value)

    def _settle(self, standing: float | None) -> None:
        """Bounds, and what others read."""
        self._window = min(max(self._window, float(minimum_window(self._mtu))), float(WINDOW_MAXIMUM))
        self.window = int(self._window)
        if standing is not None:
            self.pacing_rate = min(_PACING_GAIN * self._window / standing, RATE_MAXIMUM)
