# SPDX-License-Identifier: Apache-2.0
"""BBR, version 3, after draft-ietf-ccwg-bbr: send as fast as the path delivers, with little in its queues.

    Startup -> Drain -> ProbeBW: DOWN -> CRUISE -> REFILL -> UP -> DOWN -> ...
                  any of them, every 5 s without a shorter round trip -> ProbeRTT -> where it came from

Rather than filling the queue until it overflows, it keeps a model of the path
(:class:`~userspace.flow.bbr_model.PathModel`), sends at the bandwidth of the model, and now and then tries a
little more (UP) or less (ProbeRTT) to see whether the model still holds.  Losses matter when a probe loses
more than 2 %; between probes they lower the model for a while.  So random losses do not ruin it, as they do
CUBIC.

Names of states and steps are the draft's.  What it leaves open, or needs from a transport that does not have
it, is done so:

- A packet with a CE mark counts as lost, wherever losses count (the draft leaves the reaction open).
- Startup ends by losses after six calls of on_loss or on_ecn in a round trip: each is at least one gap.
- A probe went too high by 2 % *and* two packets: to a flow that has 30 on their way one lost packet is more
  than 2 %, so that many flows in one queue would never find their share.
- Window in DOWN and CRUISE: 1.5 times the BDP, not twice, and in both with the headroom that the draft has
  for CRUISE.  Many flows would keep a queue of one BDP full, and who has a large share would keep it.
- Losses of what was sent before DOWN began are the probe's, which is over: they don't lower the short-term
  model.  In DOWN that is set from bw_latest / 0.9, since no more than 0.9 was sent.
- The margin of 1 % below the bandwidth is not applied to bw_shortterm: that is set from what was delivered,
  so with a loss in every round trip the margins would multiply.
- Where more than 2 % were lost is taken to the packet, not within it: packets here are single datagrams.
- Persistent congestion (RFC 9002, 7.6) means another path: model and window begin anew.
"""

from __future__ import annotations

import math
import random
from typing import Final

from userspace.flow.bbr_model import BETA, GAINS, AckPhase, PathModel, State
from userspace.flow.bbr_samples import Mark, Sample, SendMarks
from userspace.flow.congestion import MAX_DATAGRAM_SIZE, Ack, Loss, initial_window, minimum_window
from userspace.flow.limits import RATE_MAXIMUM, WINDOW_MAXIMUM, believable_rtt, checked_mtu, checked_now

_IN_PROBE_BW: Final = frozenset((State.DOWN, State.CRUISE, State.REFILL, State.UP))


#: Of the bandwidth: so much less is sent, that queues drain (BBR.PacingMarginPercent).
_MARGIN: Final = 0.99
#: Packets: two on their way there, and two acknowledged by one packet on its way back (BBR.MinPipeCwnd).
_PIPE_PACKETS: Final = 4
#: Seconds that ProbeRTT lasts at least, so that those of several flows overlap.
_PROBE_RTT_DURATION: Final = 0.2
#: Gaps in a round trip (BBRStartupFullLossCnt), and rounds in Drain: 3 suffice unless bw was overrated.
_STARTUP_LOSSES: Final = 6
_DRAIN_ROUNDS: Final = 3
#: Seconds between two probes, and how much more at random; round trips after which Reno would have lost.
_PROBE_WAIT: Final = 2.0
_PROBE_WAIT_RANDOM: Final = 1.0
_RENO_ROUNDS: Final = 63
#: Seconds of sending, and bytes, that leave as one burst at most (C.send_quantum).
_QUANTUM_TIME: Final = 0.001
_QUANTUM_MAXIMUM: Final = 65_536
#: Round-trip time before the first sample, seconds: an unpaced initial window.
_RTT_UNKNOWN: Final = 0.001
#: Doublings of the step by which a probe raises inflight_longterm: more would not fit the window.
_RAISE_ROUNDS: Final = 30


class Bbr:
    """A controller of one path (:class:`~userspace.flow.congestion.Congestion`).

    ``seed`` decides when it probes; flows that share a bottleneck have different ones.  Raises UsageError for
    an ``mtu`` or ``now`` that can't be.  ``window`` is never below four packets, but for two after persistent
    congestion; ``pacing_rate`` never below a packet a second, or a stalled path would not be seen to recover.
    ``ssthresh`` is inflight_longterm, the bytes at which a probe lost too much.
    """

    __slots__ = (
        "_ack_phase", "_cycle_stamp", "_drain_start_round", "_has_rtt", "_idle_restart", "_in_flight",
        "_in_recovery", "_is_bw_probe_sample", "_limited", "_limited_before", "_lost", "_low_from",
        "_low_until", "_marks", "_mtu", "_now", "_prev_probe_precautionary", "_prev_probe_too_high",
        "_prior_window", "_probe_rtt_done", "_probe_rtt_round_done", "_probe_up_acked",
        "_probe_up_per_step", "_probe_up_rounds", "_probe_wait", "_recovery_at", "_rs", "_seed",
        "_send_quantum", "_since_probe_up", "_undo", "_undo_state", "model", "pacing_rate",
        "ssthresh", "state", "window",
    )  # fmt: skip

    name: str = "bbr"
    every_packet: bool = True

    def __init__(self, now: float, mtu: int = MAX_DATAGRAM_SIZE, seed: int = 0) -> None:
        self._now = checked_now(now)
        self._mtu = checked_mtu(mtu)
        self._seed = seed
        self.ssthresh: int | None = None
        self.model = PathModel(self._now)
        self._rs = Sample()
        self._marks = SendMarks(self._now)
        self._lost = 0  # bytes since the beginning, marked ones with them
        self._in_flight = 0
        # Samples of packets that were sent between these counts of delivered bytes show our restraint only.
        self._low_from = self._low_until = 0
        self._begin(initial_window(mtu), _RTT_UNKNOWN)
        self._has_rtt = False

    def _begin(self, window: int, rtt: float) -> None:
        self.window = window
        self._limited = self._limited_before = False
        self._in_recovery = False
        self._recovery_at = -math.inf
        self._prior_window = 0
        self._undo: tuple[float, float, float] | None = None
        self._undo_state: State | None = None
        self._probe_rtt_done: float | None = None
        self._probe_rtt_round_done = False
        self._idle_restart = False
        self._is_bw_probe_sample = False
        self._prev_probe_too_high = self._prev_probe_precautionary = False
        self._probe_up_acked = self._probe_up_rounds = 0
        self._probe_up_per_step = math.inf
        self._since_probe_up = 0  # round trips
        self._probe_wait = 0.0
        self._cycle_stamp = self._now
        self._drain_start_round = 0
        self._ack_phase = AckPhase.INIT
        self.state = State.STARTUP
        self.pacing_rate: float | None = GAINS[State.STARTUP][0] * window / rtt
        self._send_quantum = 2 * self._mtu

    def __repr__(self) -> str:
        return f"<Bbr {self.state.value} window={self.window} max_bw={self.model.max_bw:.0f}>"

    # --- what happens

    def on_sent(self, now: float, size: int, in_flight: int, *, app_limited: bool) -> None:
        """A packet has left; ``in_flight`` counts it."""
        self._now = now = max(self._now, now)
        if app_limited and in_flight <= size:
            self._restart_from_idle()
        self._in_flight = in_flight
        if in_flight + self._mtu > self.window:
            self._limited = True
        if self._marks.due(now):
            rtt = self.model.min_rtt
            self._marks.note(
                now,
                Mark(min(in_flight, WINDOW_MAXIMUM), self._lost, app_limited=app_limited),
                rtt if rtt < math.inf else _RTT_UNKNOWN,
            )

    def on_ack(self, now: float, ack: Ack) -> None:
        """Take the sample, move the state machine, set rate and window (UpdateOnACK)."""
        self._now = now = max(self._now, now)
        model, rs = self.model, self._rs
        self._in_flight = max(0, ack.in_flight)
        rs.take(ack)
        mark = self._marks.at(ack.largest_sent_at)
        rs.tx_in_flight = mark.in_flight
        rs.lost = self._lost - mark.lost
        if self._low_from <= rs.prior_delivered < self._low_until:
            rs.is_app_limited = True
        model.update(now, rs, ack.delivered, self.window, self.state)
        if model.round_start:
            self._since_probe_up += 1
            self._limited_before, self._limited = self._limited, False
        self._check_startup_done()
        if self.state is State.DRAIN and (
            self._in_flight <= self._inflight() or model.round_count > self._drain_start_round + _DRAIN_ROUNDS
        ):
            self._start_down()
        self._update_cycle_phase()
        model.update_min_rtt(now, rs.rtt)
        self._check_probe_rtt()
        model.advance(rs)
        self._leave_recovery(ack.largest_sent_at)
        self._set_pacing_rate(GAINS[self.state][0], believable_rtt(ack.smoothed_rtt))
        self._set_window(rs.newly_acked)

    def on_loss(self, now: float, loss: Loss) -> None:
        """Found lost, all of one acknowledgement or timer (HandleLostPacket)."""
        self._now = max(self._now, now)
        self._in_flight = max(0, loss.in_flight)
        self._congested(loss.bytes, loss.largest_sent_at)

    def on_ecn(self, now: float, marked: int, largest_sent_at: float) -> None:
        """So many packets more were marked: as if they were lost."""
        self._now = max(self._now, now)
        if marked > 0:
            self._congested(marked * self._mtu, largest_sent_at)

    def on_spurious(self, now: float) -> None:
        """What the latest losses did is undone (HandleSpuriousLossDetection)."""
        self._now = max(self._now, now)
        if self._undo is None:
            return
        model = self.model
        bw_shortterm, inflight_shortterm, inflight_longterm = self._undo
        self.window = max(self.window, self._prior_window)
        model.is_loss_in_round = False
        model.reset_full_bw()
        model.bw_shortterm = max(model.bw_shortterm, bw_shortterm)
        model.inflight_shortterm = max(model.inflight_shortterm, inflight_shortterm)
        model.inflight_longterm = max(model.inflight_longterm, inflight_longterm)
        if self._undo_state is State.STARTUP and self.state is not State.STARTUP:
            model.full_bw_reached = False
            if self.state is not State.PROBE_RTT:
                self.state = State.STARTUP
        elif self._undo_state is State.UP and self.state not in {State.UP, State.PROBE_RTT}:
            self._start_refill()
        self._undo = self._undo_state = None

    def on_persistent(self, now: float) -> None:
        """Nothing came through for long: begin anew, with two packets, as on another path."""
        self._now = max(self._now, now)
        self.model.forget(self._now)
        self._begin(minimum_window(self._mtu), _RTT_UNKNOWN)
        self._has_rtt = False
        self.ssthresh = None

    def on_mtu(self, mtu: int) -> None:
        """Full packets have another size now."""
        self._mtu = checked_mtu(mtu)
        self.window = max(self.window, minimum_window(mtu))

    # --- congestion

    def _congested(self, size: int, sent_at: float) -> None:
        """Bytes sent until then are lost or marked."""
        rs, mark = self._rs, self._marks.at(sent_at)
        size = min(max(0, size), max(mark.in_flight, self._mtu))
        self._lost += size
        if not self._in_recovery or sent_at > self._recovery_at:
            self._save_window()
            self._in_recovery, self._recovery_at = True, self._now
        # What was sent before DOWN began is of the probe, which has ended: no news of the path since.
        model = self.model
        of_the_probe = self.state in {State.DOWN, State.CRUISE} and sent_at <= self._cycle_stamp
        if self._is_bw_probe_sample if of_the_probe else model.note_loss():
            self._save_window()
            self._undo = (model.bw_shortterm, model.inflight_shortterm, model.inflight_longterm)
            self._undo_state = None
        if not self._is_bw_probe_sample:
            return
        rs.tx_in_flight = mark.in_flight
        rs.lost = self._lost - mark.lost
        rs.is_app_limited = mark.app_limited
        if self._rs.is_inflight_too_high(self._mtu):
            self._handle_inflight_too_high()

    def _handle_inflight_too_high(self) -> None:
        rs = self._rs
        self._prev_probe_too_high = True
        self._is_bw_probe_sample = False  # react once to a probe
        if not rs.is_app_limited:
            self.model.inflight_longterm = max(
                rs.tx_in_flight, min(self.model.bdp(), self.window) * BETA, self._pipe
            )
        if self.state is State.UP:
            self._undo_state = State.UP
            self._start_down()

    def _save_window(self) -> None:
        if self._in_recovery or self.state is State.PROBE_RTT:
            self._prior_window = max(self._prior_window, self.window)
        else:
            self._prior_window = self.window

    def _leave_recovery(self, sent_at: float) -> None:
        if self._in_recovery and sent_at > self._recovery_at:
            self._in_recovery = False
            self.window = max(self.window, self._prior_window)

    # --- Startup, Drain

    def _check_startup_done(self) -> None:
        model = self.model
        if self.state is not State.STARTUP:
            return
        if (
            not model.full_bw_reached
            and model.loss_round_start
            and model.loss_events >= _STARTUP_LOSSES
            and self._rs.is_inflight_too_high(self._mtu)
        ):
            self._undo_state = State.STARTUP
            model.full_bw_reached = True
            model.inflight_longterm = max(self._finite(model.bdp()), model.inflight_latest, self._pipe)
        if model.full_bw_reached:
            self.state = State.DRAIN
            self._drain_start_round = model.round_count

    # --- ProbeBW

    def _start_down(self) -> None:
        self.model.reset_congestion_signals()
        self._probe_up_per_step = math.inf
        # Made anew each time, every few seconds: one that is kept has 2.5 KB, half of what a peer may have.
        draw = random.Random(self._seed)  # noqa: S311  # it spreads probes and keeps no secret
        self._seed = draw.getrandbits(64)
        self._since_probe_up = draw.randint(0, 1)
        self._probe_wait = _PROBE_WAIT + _PROBE_WAIT_RANDOM * draw.random()
        self._cycle_stamp = self._now
        self._ack_phase = AckPhase.PROBE_STOPPING
        self.model.start_round()
        self.state = State.DOWN

    def _start_refill(self) -> None:
        self.model.reset_shortterm()
        self._probe_up_acked = self._probe_up_rounds = 0
        self._prev_probe_precautionary = False
        self._ack_phase = AckPhase.REFILLING
        self.model.start_round()
        self.state = State.REFILL

    def _start_up(self) -> None:
        self._ack_phase = AckPhase.PROBE_STARTING
        self.model.start_round()
        self.model.reset_full_bw(self._rs.delivery_rate)
        self.state = State.UP
        self._raise_slope()

    def _update_cycle_phase(self) -> None:
        model = self.model
        if not model.full_bw_reached or self._adapt_longterm() or self.state not in _IN_PROBE_BW:
            return
        if self.state is State.REFILL:
            if model.round_start:
                self._is_bw_probe_sample = True
                self._start_up()
        elif self.state is State.UP:
            if self._is_time_to_go_down():
                self._prev_probe_too_high = False
                self._start_down()
        elif self._is_time_to_probe():
            self._start_refill()
        elif self.state is State.DOWN and self._is_time_to_cruise():
            self.state = State.CRUISE

    def _is_time_to_probe(self) -> bool:
        """2 to 3 s after the last probe, or when Reno would have lost a packet on this BDP."""
        reno = min(self._finite(self.model.bdp()), self.window) / self._mtu
        return self._now > self._cycle_stamp + self._probe_wait or self._since_probe_up >= min(
            reno, _RENO_ROUNDS
        )

    def _is_time_to_cruise(self) -> bool:
        return self._in_flight <= self._with_headroom() and self._in_flight <= self._inflight(
            self.model.max_bw
        )

    def _is_time_to_go_down(self) -> bool:
        model = self.model
        if self._prev_probe_too_high and self._in_flight >= model.inflight_longterm:
            self._prev_probe_precautionary = True
            return True
        if (self._limited or self._limited_before) and self.window >= model.inflight_longterm:
            model.reset_full_bw(self._rs.delivery_rate)  # it is the bound that limits bandwidth
            return False
        return model.full_bw_now

    def _raise_slope(self) -> None:
        """Twice as many packets in this round trip as in the last one, from 1 on."""
        self._probe_up_per_step = max(self.window / (1 << self._probe_up_rounds), self._mtu)
        self._probe_up_rounds = min(self._probe_up_rounds + 1, _RAISE_ROUNDS)

    def _probe_longterm_upward(self) -> None:
        model = self.model
        if not (self._limited or self._limited_before) or self.window < model.inflight_longterm:
            return
        self._probe_up_acked += self._rs.newly_acked
        steps = int(self._probe_up_acked // self._probe_up_per_step)
        if steps:
            self._probe_up_acked -= int(steps * self._probe_up_per_step)
            model.inflight_longterm = min(model.inflight_longterm + steps * self._mtu, WINDOW_MAXIMUM)
        if model.round_start:
            self._raise_slope()

    def _adapt_longterm(self) -> bool:
        """AdaptLongTermModel: follow what a probe shows; True when that decided the state."""
        model, rs = self.model, self._rs
        in_probe_bw = self.state in _IN_PROBE_BW
        if model.round_start and self._ack_phase is AckPhase.PROBE_STARTING:
            self._ack_phase = AckPhase.PROBE_FEEDBACK
        elif model.round_start and self._ack_phase is AckPhase.PROBE_STOPPING:
            self._is_bw_probe_sample = False
            self._ack_phase = AckPhase.INIT
            if in_probe_bw and not rs.is_app_limited:
                model.next_cycle()
            if in_probe_bw and self._prev_probe_precautionary and not self._prev_probe_too_high:
                self._start_refill()
                return True
        if model.inflight_longterm < math.inf and not self._rs.is_inflight_too_high(self._mtu):
            model.inflight_longterm = max(model.inflight_longterm, rs.tx_in_flight)
            if self.state is State.UP:
                self._probe_longterm_upward()
        return False

    # --- ProbeRTT, idleness

    def _check_probe_rtt(self) -> None:
        model = self.model
        if self.state is not State.PROBE_RTT and model.probe_rtt_expired and not self._idle_restart:
            self._save_window()
            self.state = State.PROBE_RTT
            self._probe_rtt_done = None
            self._ack_phase = AckPhase.PROBE_STOPPING
            self._low_from = model.delivered
            model.start_round()
        if self.state is State.PROBE_RTT:
            self._low_until = model.delivered + self._in_flight
            if self._probe_rtt_done is None:
                if self._in_flight <= self._probe_rtt_window():
                    self._probe_rtt_done = self._now + _PROBE_RTT_DURATION
                    self._probe_rtt_round_done = False
                    model.start_round()
            else:
                self._probe_rtt_round_done |= model.round_start
                if self._probe_rtt_round_done:
                    self._check_probe_rtt_done()
        if self._rs.delivered > 0:
            self._idle_restart = False

    def _check_probe_rtt_done(self) -> None:
        if self._probe_rtt_done is None or self._now <= self._probe_rtt_done:
            return
        self.model.probe_rtt_min_stamp = self._now
        self.window = max(self.window, self._prior_window)
        self.model.reset_shortterm()
        if self.model.full_bw_reached:
            self._start_down()
            self.state = State.CRUISE  # nothing is queued
        else:
            self.state = State.STARTUP

    def _restart_from_idle(self) -> None:
        self._idle_restart = True
        self.model.restart_aggregation(self._now)
        if self.state in _IN_PROBE_BW:
            self._set_pacing_rate(1.0, None)
        elif self.state is State.PROBE_RTT:
            self._check_probe_rtt_done()

    # --- rate and window

    @property
    def _pipe(self) -> int:
        return _PIPE_PACKETS * self._mtu

    def _finite(self, bdp: float) -> float:
        return bdp if bdp < math.inf else initial_window(self._mtu)

    def _budgeted(self, inflight: float) -> float:
        """Enough for bursts and delayed acknowledgements (QuantizationBudget)."""
        inflight = max(inflight, self._send_quantum, self._pipe)
        return inflight + 2 * self._mtu if self.state is State.UP else inflight

    def _inflight(self, bw: float | None = None) -> float:
        """Bytes on their way that keep the path busy."""
        model = self.model
        if model.min_rtt == math.inf:
            return self._budgeted(initial_window(self._mtu))
        return self._budgeted((model.bw if bw is None else bw) * model.min_rtt)

    def _with_headroom(self) -> float:
        return self.model.with_headroom(self._mtu, self._pipe)

    def _probe_rtt_window(self) -> float:
        return max(self._finite(self.model.bdp(GAINS[State.PROBE_RTT][1])), self._pipe)

    def _set_pacing_rate(self, gain: float, smoothed_rtt: float | None) -> None:
        model = self.model
        if not self._has_rtt and smoothed_rtt is not None:
            self._has_rtt = True
            self.pacing_rate = GAINS[State.STARTUP][0] * self.window / smoothed_rtt
        margin = _MARGIN if model.bw == model.max_bw else 1.0
        rate = gain * model.bw * margin
        if model.full_bw_reached or self.pacing_rate is None or rate > self.pacing_rate:
            self.pacing_rate = rate
        self.pacing_rate = min(max(self.pacing_rate, self._mtu), RATE_MAXIMUM)
        self._send_quantum = int(min(self.pacing_rate * _QUANTUM_TIME, _QUANTUM_MAXIMUM))
        self._send_quantum = max(self._send_quantum, 2 * self._mtu)

    def _set_window(self, newly_acked: int) -> None:
        model, window = self.model, self.window
        limit = self._budgeted(self._finite(model.bdp(GAINS[self.state][1])) + model.extra_acked)
        if model.full_bw_reached:
            window = int(min(window + newly_acked, limit))
        elif window < limit or model.delivered < initial_window(self._mtu):
            window += newly_acked
        cap = model.inflight_shortterm
        if self.state is State.PROBE_RTT:
            cap = min(cap, self._probe_rtt_window(), self._with_headroom())
        elif self.state in {State.DOWN, State.CRUISE}:
            cap = min(cap, self._with_headroom())
        elif self.state in _IN_PROBE_BW:
            cap = min(cap, model.inflight_longterm)
        window = int(min(max(window, self._pipe), max(cap, self._pipe)))
        self.window = min(max(window, minimum_window(self._mtu)), WINDOW_MAXIMUM)
        longterm = model.inflight_longterm
        self.ssthresh = int(longterm) if longterm < math.inf else None
