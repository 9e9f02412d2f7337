# SPDX-License-Identifier: Apache-2.0
"""What BBR believes of a path: how much it delivers, how long it takes, how much may be on its way.

Names are those of draft-ietf-ccwg-bbr (BBRv3), in small letters.  Two parameters and their bounds:

    bandwidth          max_bw             largest of this and the previous probing cycle
                       bw_shortterm       what losses since the last probe say, or infinite
    bytes in flight    min_rtt * bw       the bandwidth-delay product (BDP)
                       inflight_longterm  at which a probe lost more than 2 %, or infinite
                       inflight_shortterm what losses since the last probe say, or infinite

:class:`PathModel` has them and takes samples; the state machine is
:class:`~userspace.flow.bbr.Bbr`.  Bytes, seconds, bytes/s.
"""

from __future__ import annotations

import enum
import math
from typing import Final

from userspace.flow.bbr_samples import Sample
from userspace.flow.filters import WindowedMax

#: What a round with losses leaves of the bounds, at least (BBR.Beta; as CUBIC's).
BETA: Final = 0.7
#: Seconds that min_rtt is believed (BBR.MinRTTFilterLen) ...
MIN_RTT_FILTER: Final = 10.0
#: ... and until the queue is drained to look for it (BBR.ProbeRTTInterval), the same for all flows.
PROBE_RTT_INTERVAL: Final = 5.0
#: Of inflight_longterm, left for others in CRUISE and ProbeRTT (BBR.Headroom).
_HEADROOM: Final = 0.15
#: Round trips that a burst of acknowledgements is remembered (BBR.ExtraAckedFilterLen); 1 in Startup.
_EXTRA_ACKED_FILTER: Final = 10
#: Growth of bandwidth in a round by which the pipe is not full yet, and rounds with less that show it is.
_FULL_GROWTH: Final = 1.25
_FULL_ROUNDS: Final = 3


class State(enum.Enum):
    """Of the state machine (BBR.state)."""

    STARTUP = "startup"
    DRAIN = "drain"
    DOWN = "down"
    CRUISE = "cruise"
    REFILL = "refill"
    UP = "up"
    PROBE_RTT = "probe_rtt"


#: Of (pacing rate / bandwidth, window / BDP), by state.  2.77 = 4 ln 2 and 2 double the rate in a round trip.
GAINS: Final = {
    State.STARTUP: (2.77, 2.0),
    State.DRAIN: (0.5, 2.0),
    State.DOWN: (0.9, 1.5),
    State.CRUISE: (1.0, 1.5),
    State.REFILL: (1.0, 2.0),
    State.UP: (1.25, 2.25),
    State.PROBE_RTT: (1.0, 0.5),
}


#: Losses in these are what the flow looks for, not a sign that the path has changed.
ACCELERATING: Final = frozenset((State.STARTUP, State.REFILL, State.UP))


class AckPhase(enum.Enum):
    """What acknowledgements tell at the moment (BBR.ack_phase)."""

    INIT = "nothing of a probe"
    REFILLING = "sent to fill the pipe"
    PROBE_STARTING = "sent before the probe began"
    PROBE_FEEDBACK = "sent by the probe"
    PROBE_STOPPING = "the last of the probe"


class PathModel:
    """The model of a path and what keeps it up to date."""

    __slots__ = (
        "_cycle_bw", "_extra_acked", "_extra_delivered", "_extra_since", "_loss_round_delivered",
        "_round_end", "bw", "bw_latest", "bw_shortterm", "delivered", "extra_acked", "full_bw",
        "full_bw_count", "full_bw_now", "full_bw_reached", "inflight_latest", "inflight_longterm",
        "inflight_shortterm", "is_loss_in_round", "loss_events", "loss_round_start", "max_bw", "min_rtt",
        "min_rtt_stamp", "probe_rtt_expired", "probe_rtt_min_delay", "probe_rtt_min_stamp", "round_count",
        "round_start",
    )  # fmt: skip

    def __init__(self, now: float) -> None:
        self.delivered = 0  # bytes since the beginning, as of the last acknowledgement
        self.round_count = 0
        self.round_start = False
        self._round_end = 0
        self.loss_round_start = False
        self._loss_round_delivered = 0
        self._extra_acked = WindowedMax()
        self.is_loss_in_round = False
        self.bw_latest = 0.0
        self.inflight_latest = 0
        self.forget(now)

    def forget(self, now: float) -> None:
        """All but the count of rounds: this may be another path."""
        self.max_bw = self.bw = 0.0
        self._cycle_bw = [0.0, 0.0]  # the previous probing cycle and this one
        self.min_rtt = self.probe_rtt_min_delay = math.inf
        self.min_rtt_stamp = self.probe_rtt_min_stamp = now
        self.probe_rtt_expired = False
        self.inflight_longterm = math.inf
        self._extra_acked.clear()
        self.restart_aggregation(now)
        self.extra_acked = 0.0
        self.full_bw_reached = False
        self.reset_full_bw()
        self.reset_shortterm()
        self.reset_congestion_signals()

    # --- rounds

    def start_round(self) -> None:
        """A round trip begins: it ends when a packet that is sent from now on is acknowledged."""
        self._round_end = self.delivered

    # --- samples

    def update(self, now: float, rs: Sample, delivered: int, window: int, state: State) -> None:
        """Take a sample (first part of UpdateModelAndState)."""
        self.delivered = max(self.delivered, delivered)
        self.loss_round_start = False
        self.bw_latest = max(self.bw_latest, rs.delivery_rate)
        self.inflight_latest = max(self.inflight_latest, rs.delivered)
        if rs.prior_delivered >= self._loss_round_delivered:
            self._loss_round_delivered = self.delivered
            self.loss_round_start = True
        self.round_start = rs.prior_delivered >= self._round_end
        if self.round_start:
            self.start_round()
            self.round_count += 1
        if rs.delivery_rate and (rs.delivery_rate >= self.max_bw or not rs.is_app_limited):
            self._cycle_bw[1] = max(self._cycle_bw[1], rs.delivery_rate)
            self.max_bw = max(self._cycle_bw)
        if self.loss_round_start and self.is_loss_in_round and state not in ACCELERATING:
            self._adapt_lower_bounds(window, min(1.0, GAINS[state][0]))
        self._update_aggregation(now, rs.newly_acked, window)
        self._check_full_bw(rs)

    def advance(self, rs: Sample) -> None:
        """Last step of taking a sample: the next round trip is measured on its own; bw has its bounds."""
        if self.loss_round_start:
            self.bw_latest = rs.delivery_rate
            self.inflight_latest = rs.delivered
            self.is_loss_in_round = False
            self.loss_events = 0
        self.bw = min(self.max_bw, self.bw_shortterm)

    def next_cycle(self) -> None:
        """A probe is over, with all that it could show (AdvanceMaxBwFilter); without samples nothing ages."""
        if self._cycle_bw[1]:
            self._cycle_bw = [self._cycle_bw[1], 0.0]
            self.max_bw = self._cycle_bw[0]

    def update_min_rtt(self, now: float, rtt: float | None) -> None:
        """UpdateMinRTT: two filters, the shorter of which says when to drain the queue."""
        self.probe_rtt_expired = now > self.probe_rtt_min_stamp + PROBE_RTT_INTERVAL
        if rtt is not None and (rtt < self.probe_rtt_min_delay or self.probe_rtt_expired):
            self.probe_rtt_min_delay = rtt
            self.probe_rtt_min_stamp = now
        if self.probe_rtt_min_delay < self.min_rtt or now > self.min_rtt_stamp + MIN_RTT_FILTER:
            self.min_rtt = self.probe_rtt_min_delay
            self.min_rtt_stamp = self.probe_rtt_min_stamp

    # --- congestion

    def note_loss(self) -> bool:
        """Something was lost, or marked: whether for the first time in this round trip."""
        first = not self.is_loss_in_round
        if first:
            self._loss_round_delivered = self.delivered
        self.is_loss_in_round = True
        self.loss_events += 1
        return first

    def reset_congestion_signals(self) -> None:
        """The round trip that is measured begins now."""
        self.is_loss_in_round = False
        self.loss_events = 0
        self.bw_latest = 0.0
        self.inflight_latest = 0

    def reset_shortterm(self) -> None:
        """What losses said since the last probe is forgotten."""
        self.bw_shortterm = self.inflight_shortterm = math.inf

    def _adapt_lower_bounds(self, window: int, gain: float) -> None:
        """Once in a round trip with losses: as much as was delivered, but not less than 0.7 of before.

        Where only a part (``gain``) of the bandwidth was sent, no more can have been delivered.
        """
        if self.bw_shortterm == math.inf:
            self.bw_shortterm = self.max_bw
        if self.inflight_shortterm == math.inf:
            self.inflight_shortterm = window
        self.bw_shortterm = max(min(self.bw_latest / gain, self.bw_shortterm), BETA * self.bw_shortterm)
        self.inflight_shortterm = max(self.inflight_latest, BETA * self.inflight_shortterm)

    # --- bandwidth that grows no more

    def reset_full_bw(self, bw: float = 0.0) -> None:
        """Look again whether the pipe is full, from that bandwidth on."""
        self.full_bw = bw
        self.full_bw_count = 0
        self.full_bw_now = False

    def _check_full_bw(self, rs: Sample) -> None:
        """The pipe is full after three round trips that brought less than a quarter more."""
        if self.full_bw_now or not self.round_start or rs.is_app_limited or not rs.delivery_rate:
            return
        if rs.delivery_rate >= self.full_bw * _FULL_GROWTH:
            self.reset_full_bw(rs.delivery_rate)
            return
        self.full_bw_count += 1
        if self.full_bw_count >= _FULL_ROUNDS:
            self.full_bw_now = self.full_bw_reached = True

    # --- acknowledgements that come in bursts

    def restart_aggregation(self, now: float) -> None:
        """What is acknowledged is compared with the bandwidth from now on."""
        self._extra_since = now
        self._extra_delivered = 0

    def _update_aggregation(self, now: float, newly_acked: int, window: int) -> None:
        """UpdateACKAggregation: how much more than bw comes at once, so that silences can be filled."""
        expected = self.bw * (now - self._extra_since)
        if self._extra_delivered <= expected:
            self.restart_aggregation(now)
            expected = 0.0
        self._extra_delivered += newly_acked
        extra = min(self._extra_delivered - expected, window)
        rounds = _EXTRA_ACKED_FILTER if self.full_bw_reached else 1
        self.extra_acked = self._extra_acked.update(self.round_count, extra, rounds)

    # --- bytes in flight

    def bdp(self, gain: float = 1.0) -> float:
        """Bytes on their way at bw with an empty queue, times a gain; infinite before the first RTT."""
        return gain * self.bw * self.min_rtt if self.min_rtt < math.inf else math.inf

    def with_headroom(self, mtu: int, least: int) -> float:
        """What inflight_longterm leaves of itself to others (InflightWithHeadroom)."""
        if self.inflight_longterm == math.inf:
            return math.inf
        return max(self.inflight_longterm - max(mtu, _HEADROOM * self.inflight_longterm), least)
