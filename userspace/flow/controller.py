# SPDX-License-Identifier: Apache-2.0
"""FlowController: when the next packet to a peer may leave, and what became of the earlier ones.

    flow = FlowController(now)                         # one for each peer
    while data:
        at = flow.next_send_time(now, len(data))       # infinite while the window is full
        if at > now: ...                               # or for flow.next_timeout()
        number = flow.on_packet_sent(now, len(data))   # goes with the packet
    outcome = flow.on_ack_received(now, ranges, ack_delay)
    outcome = flow.on_timeout(now)                     # when next_timeout() has come

Numbers are given by on_packet_sent, from 0, each once; whoever sends something again gets a new one.  The
peer tells what arrived (:mod:`~userspace.flow.ranges`).  No packet needs an object of the caller.

``adaptive`` (the default) lets the congestion controller decide; without it only ``max_rate`` and
``max_in_flight`` hold, and loss, round-trip time and signals are measured all the same.

Times are seconds of any monotonic clock.  One that is earlier than the latest that this controller was told
is taken as that one: packets stamped by the kernel may be handled after later ones, and nothing gets younger
by that.  What is no time at all (NaN, infinite, nanoseconds) raises UsageError.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Final

import msgspec

from userspace.flow.congestion import (
    MAX_DATAGRAM_SIZE,
    Congestion,
    CongestionFactory,
    initial_window,
)
from userspace.flow.pacer import Pacer
from userspace.flow.recovery import Outcome, Recovery
from userspace.flow.rtt import MAX_ACK_DELAY, RttEstimator
from userspace.flow.sent import LIMIT, LIMIT_MAXIMUM, check_whole
from userspace.flow.signals import CongestionSignals, Level
from xdp.errors import UsageError

#: How much faster than window by round-trip time to send (RFC 9002, 7.7), so that the window is used up in
#: spite of late timers; in slow start twice, or pacing would slow the doubling.
PACING_GAIN: Final = 1.25
SLOW_START_GAIN: Final = 2.0
#: Bytes/s: less is a standstill, more is no network.
LEAST_RATE: Final = 1.0
MOST_RATE: Final = 1e12
#: The pacer is told when the rate has changed by more than this part: the round-trip time changes with every
#: acknowledgement, and what pacing is for does not.
_RATE_STEP: Final = 1 / 32
#: Bytes: the least a path carries (IPv4's 576 without headers) and the most that UDP does.
MTU_MINIMUM: Final = 508
SIZE_MAXIMUM: Final = 65_527
#: Seconds, 35,000 years: whoever passes more passes nanoseconds.
LATEST: Final = float(1 << 40)

_NEVER: Final = math.inf


class FlowSnapshot(msgspec.Struct, frozen=True, kw_only=True):
    """The state of one controller, for people and JSON; seconds, bytes, bytes/s."""

    congestion: str
    adaptive: bool
    window: int
    ssthresh: int | None
    in_flight: int
    packets_in_flight: int
    rate: float
    max_rate: float | None
    delivery_rate: float
    smoothed_rtt: float
    min_rtt: float
    latest_rtt: float
    rtt_variance: float
    sent_packets: int
    sent_bytes: int
    delivered_bytes: int
    acknowledged_packets: int
    lost_packets: int
    spurious_packets: int
    ce_packets: int
    overflow_packets: int
    loss_rate: float
    ecn_share: float
    level: str
    undone: int
    persistent: int
    impossible: int
    timeouts: int


class _Fixed:
    """Stands where the congestion controller does while that has nothing to say."""

    __slots__ = ("pacing_rate", "ssthresh", "window")

    def __init__(self, window: int) -> None:
        self.window = window
        self.pacing_rate: float | None = MOST_RATE
        self.ssthresh: int | None = None


class FlowController:
    """Pacing, window, loss detection and round-trip time of one peer.

    ``congestion`` is a name of :mod:`~userspace.flow.registry` or a factory; ``mtu`` is the bytes of a full
    packet; ``max_rate`` bytes/s or None; ``seed`` of whatever the congestion controller draws;
    ``max_ack_delay`` seconds that the peer promised; ``max_in_flight`` packets.  UsageError for values out
    of range, in every method.
    """

    __slots__ = (
        "_ack", "_adaptive", "_congestion", "_counted", "_every_packet", "_gain", "_max_in_flight",
        "_max_rate", "_mtu", "_now", "_overflow", "_pacer", "_probes", "_rate", "_rate_high", "_rate_low",
        "_recovery", "_round_ends", "_rtt", "_ruler", "_sent", "signals",
    )  # fmt: skip

    def __init__(
        self,
        now: float,
        *,
        congestion: str | CongestionFactory = "cubic",
        mtu: int = MAX_DATAGRAM_SIZE,
        max_rate: float | None = None,
        seed: int = 0,
        max_ack_delay: float = MAX_ACK_DELAY,
        adaptive: bool = True,
        max_in_flight: int = LIMIT,
    ) -> None:
        check_whole("mtu", mtu, MTU_MINIMUM, SIZE_MAXIMUM)
        check_whole("max_in_flight", max_in_flight, 2, LIMIT_MAXIMUM)
        self._now = -LATEST
        self._now = self._clock(now)
        self._mtu, self._max_in_flight = mtu, max_in_flight
        if isinstance(congestion, str):
            from userspace.flow.registry import make

            self._congestion: Congestion = make(congestion, now, mtu, seed)
        else:
            self._congestion = congestion(now, mtu, seed)
        self._every_packet = self._congestion.every_packet
        self._rtt = RttEstimator(max_ack_delay=max_ack_delay)
        self._recovery = Recovery(now, self._congestion, rtt=self._rtt, limit=max_in_flight)
        self._sent = self._recovery.sent
        self._max_rate = _checked_rate(max_rate)
        #: What this path suffers from, and how much.
        self.signals = CongestionSignals()
        self._ack = self._recovery.ack
        self._round_ends = 1  # bytes delivered: what left then and later is of the next round
        self._counted = (0, 0, 0)  # packets acknowledged, lost, marked when the last round ended
        self._overflow = 0
        self._probes = 0  # packets that may leave whatever window and pacer say
        self._adaptive = adaptive
        self._ruler: Congestion | _Fixed = self._congestion
        self._pacer = Pacer(now, LEAST_RATE, _burst(mtu), mtu=mtu)
        self._rate, self._gain = LEAST_RATE, SLOW_START_GAIN
        # Within these the pacer need not be told.
        self._rate_low, self._rate_high = _NEVER, -_NEVER
        self.enable_adaptive_rate(adaptive)

    def _clock(self, now: float) -> float:
        """A time that is earlier than the latest, or none."""
        if not -LATEST < now < LATEST:
            raise UsageError(f"now is seconds of a monotonic clock, not {now!r}")
        return max(now, self._now)

    # --- sending

    def can_send(self, now: float, size: int | None = None) -> bool:
        """Whether a packet of so many bytes (by default a full one) may leave now."""
        if not self._now <= now < LATEST:
            now = self._clock(now)
        sent = self._sent
        in_flight = sent.in_flight
        if size is None:
            size = self._mtu
        if self._probes:
            return True
        if in_flight and (
            in_flight + size > self._ruler.window or sent.next - sent.base >= self._max_in_flight
        ):
            return False
        pacer = self._pacer
        # Mostly this is enough; the call says the same, at twice the cost.
        if size <= pacer.mtu and pacer.full_at <= now + pacer.granularity:
            return True
        return pacer.release_time(now, size) <= now

    def next_send_time(self, now: float, size: int | None = None) -> float:
        """The earliest time at which it may leave; infinite while the window is full."""
        if not self._now <= now < LATEST:
            now = self._clock(now)
        sent = self._sent
        in_flight = sent.in_flight
        if size is None:
            size = self._mtu
        if self._probes:
            return now
        if in_flight and (
            in_flight + size > self._ruler.window or sent.next - sent.base >= self._max_in_flight
        ):
            return _NEVER
        return self._pacer.release_time(now, size)

    def burst_allowed(self, now: float) -> tuple[int, int]:
        """Packets and bytes that may leave now, all together, probes apart; negative: none for a while."""
        now, sent = self._clock(now), self._sent
        packets = self._max_in_flight - (sent.next - sent.base)
        return packets, min(self._ruler.window - sent.in_flight, self._pacer.burst_allowed(now))

    def on_packet_sent(self, now: float, size: int, *, app_limited: bool = False) -> int:
        """A packet has left; its number.  ``app_limited``: there was nothing more to send after it.

        Only what really left: nothing is said here of what the socket refused (on_local_overflow).
        """
        if self._now <= now < LATEST:
            self._now = now
        else:
            self._now = now = self._clock(now)
        if not 0 < size <= SIZE_MAXIMUM:
            raise UsageError(f"a packet has 1 to {SIZE_MAXIMUM} bytes, not {size!r}")
        sent = self._sent
        in_flight = sent.in_flight
        number = sent.next
        if app_limited or not in_flight or number - sent.base > sent.mask:
            if app_limited:
                app_limited = in_flight + size < self._ruler.window
            sent.add(now, size, app_limited)
        else:
            # As add does, without the call: this is the way of nearly all packets.
            sent.slots[number & sent.mask] = (size, now, sent.delivery)
            sent.next = number + 1
            sent.in_flight = in_flight + size
            sent.last_sent_at = now
        if self._probes:
            self._probes -= 1
        # As Pacer.sent does.
        pacer = self._pacer
        since, used = pacer.since, pacer.used
        if (now - since) * pacer.rate < used:
            pacer.used = used = used + size
        else:
            pacer.since, pacer.used = since, used = now, size
        pacer.full_at = since + (used - pacer.spare) * pacer.per_byte
        if self._every_packet or not in_flight:
            self._congestion.on_sent(now, size, in_flight + size, app_limited=app_limited)
        return number

    # --- what became of it

    def on_ack_received(
        self,
        now: float,
        ranges: Iterable[tuple[int, int]],
        ack_delay: float = 0.0,
        ce_count: int | None = None,
    ) -> Outcome:
        """The peer has acknowledged inclusive (first, last) ranges, newest first.

        ``ack_delay``: seconds that it waited after the newest; ``ce_count``: packets with a CE mark that it
        has received so far.  All of that may be wrong: see :mod:`~userspace.flow.recovery`.
        """
        if self._now <= now < LATEST:
            self._now = now
        else:
            self._now = now = self._clock(now)
        outcome = self._recovery.on_ack(now, ranges, ack_delay, ce_count)
        if self._ack.prior_delivered >= self._round_ends:
            self._end_round()
        # _repace, without a call and with the gain of the last change.
        ruler = self._ruler
        rate = ruler.pacing_rate
        if rate is None:
            rate = self._gain * ruler.window / self._rtt.smoothed
        if not self._rate_low <= rate <= self._rate_high:
            self._repace(now)
        return outcome

    def _end_round(self) -> None:
        """A packet that left after the last round ended was acknowledged."""
        recovery, rtt = self._recovery, self._rtt
        self._round_ends = max(self._sent.delivered, 1)
        self._repace(self._now)
        counts = (
            recovery.acknowledged_packets,
            recovery.lost_packets - recovery.spurious_packets,
            recovery.ce_packets,
        )
        acknowledged, lost, marked = self._counted
        self._counted = counts
        self.signals.end_round(
            acknowledged=counts[0] - acknowledged,
            lost=counts[1] - lost,
            marked=counts[2] - marked,
            rtt=rtt.smoothed,
            min_rtt=rtt.minimum,
        )

    def on_round_trip(self, now: float, rtt: float) -> None:
        """A round-trip time, seconds, measured by packets that are not counted here: of a handshake, say."""
        self._now = now = self._clock(now)
        self._rtt.update(now, rtt)
        self._repace(now)

    def on_packet_lost(self, now: float, sequence: int) -> Outcome:
        """The caller knows that it is lost; nothing happens when it is not on its way."""
        self._now = now = self._clock(now)
        outcome = self._recovery.on_lost(now, sequence)
        self._repace(now)
        return outcome

    def on_local_overflow(self, now: float, packets: int) -> None:
        """So many packets found no room in this machine: ring full, ENOBUFS."""
        self._now = now = self._clock(now)
        check_whole("packets", packets, 1, 1 << 32)
        self._overflow += packets
        self.signals.on_overflow(packets)
        self._recovery.on_overflow(now, packets)
        self._repace(now)

    def next_timeout(self) -> float:
        """When to call :meth:`on_timeout`; infinite while nothing is on its way."""
        return self._recovery.next_timeout()

    def on_timeout(self, now: float) -> Outcome:
        """What is lost by now; with ``probe`` one packet may, and should, leave at once."""
        self._now = now = self._clock(now)
        outcome = self._recovery.on_timeout(now)
        if outcome.probe:
            self._probes = 1
            self.signals.on_silence(self._recovery.pto_count)
        self._repace(now)
        return outcome

    # --- rates

    def _repace(self, now: float) -> None:
        """Tell the pacer what the rate is, if it is another one."""
        ruler = self._ruler
        rate = ruler.pacing_rate
        if rate is None:
            window, threshold = ruler.window, ruler.ssthresh
            self._gain = SLOW_START_GAIN if threshold is None or window < threshold else PACING_GAIN
            rate = self._gain * window / self._rtt.smoothed
        if self._rate_low <= rate <= self._rate_high:
            return
        most = MOST_RATE if self._max_rate is None else self._max_rate
        self._rate_low, self._rate_high = rate * (1 - _RATE_STEP), rate * (1 + _RATE_STEP)
        if rate >= most:
            rate, self._rate_high = most, _NEVER
        elif not rate >= LEAST_RATE:
            rate, self._rate_low = LEAST_RATE, -_NEVER
        self._rate = rate
        self._pacer.set_rate(now, rate, _burst(self._mtu))

    def set_max_rate(self, now: float, bytes_per_second: float | None) -> None:
        """Never faster than this (beyond a burst of the initial window); None: no limit."""
        self._now = now = self._clock(now)
        self._max_rate = _checked_rate(bytes_per_second)
        self._rate_high = -_NEVER  # whatever it is, it is another one
        self._repace(now)

    def get_current_rate(self, now: float) -> float:
        """Bytes/s that may be sent now: the window by round-trip time, or the pacing rate if that is less."""
        self._clock(now)
        rate = self._ruler.window / self._rtt.smoothed
        return min(rate, self._rate)

    def enable_adaptive_rate(self, enabled: bool) -> None:
        """Whether the congestion controller decides; it goes on measuring when it does not."""
        self._adaptive = enabled
        self._ruler = self._congestion if enabled else _Fixed(self._max_in_flight * self._mtu)
        self._repace(self._now)

    def set_mtu(self, mtu: int) -> None:
        """Full packets have another size now, bytes."""
        check_whole("mtu", mtu, MTU_MINIMUM, SIZE_MAXIMUM)
        self._mtu = mtu
        self._congestion.on_mtu(mtu)
        self._rate_high = -_NEVER  # the burst is another one
        self.enable_adaptive_rate(self._adaptive)

    # --- looking at it

    @property
    def in_flight(self) -> int:
        """Bytes on their way."""
        return self._sent.in_flight

    @property
    def window(self) -> int:
        """Bytes that may be on their way."""
        return self._ruler.window

    @property
    def smoothed_rtt(self) -> float:
        """Seconds; RFC 9002's guess before the first sample."""
        return self._rtt.smoothed

    @property
    def min_rtt(self) -> float:
        """Seconds, of the last minutes; 0.0 before the first sample."""
        return self._rtt.minimum

    @property
    def loss_rate(self) -> float:
        """Part of the packets of the last rounds that was lost, 0 to 1."""
        return self.signals.loss_rate

    @property
    def level(self) -> Level:
        """None, mild or severe congestion."""
        return self.signals.level

    @property
    def ecn_marked(self) -> int:
        """Packets that came with a CE mark, so far."""
        return self._recovery.ce_packets

    @property
    def ecn_share(self) -> float:
        """Part of the packets of the last rounds that came with a CE mark, 0 to 1."""
        return self.signals.ecn_share

    def snapshot(self) -> FlowSnapshot:
        """All of it."""
        recovery, rtt, sent = self._recovery, self._rtt, self._sent
        return FlowSnapshot(
            congestion=self._congestion.name,
            adaptive=self._adaptive,
            window=self._ruler.window,
            ssthresh=self._congestion.ssthresh,
            in_flight=sent.in_flight,
            packets_in_flight=sent.count(),
            rate=self.get_current_rate(self._now),
            max_rate=self._max_rate,
            delivery_rate=recovery.delivery_rate,
            smoothed_rtt=rtt.smoothed,
            min_rtt=rtt.minimum,
            latest_rtt=rtt.latest,
            rtt_variance=rtt.variance,
            sent_packets=sent.next,
            sent_bytes=sent.delivered + sent.in_flight + recovery.lost_bytes,
            delivered_bytes=sent.delivered,
            acknowledged_packets=recovery.acknowledged_packets,
            lost_packets=recovery.lost_packets,
            spurious_packets=recovery.spurious_packets,
            ce_packets=recovery.ce_packets,
            overflow_packets=self._overflow,
            loss_rate=self.loss_rate,
            ecn_share=self.ecn_share,
            level=self.level.name.lower(),
            undone=recovery.undone,
            persistent=recovery.persistent,
            impossible=recovery.impossible,
            timeouts=recovery.pto_count,
        )

    def __repr__(self) -> str:
        return (
            f"<FlowController {self._congestion.name}{'' if self._adaptive else ' (not adaptive)'}: "
            f"{self.in_flight} of {self.window} bytes on their way, "
            f"{self.get_current_rate(self._now) * 8e-6:.3f} Mb/s, "
            f"round trip {self.smoothed_rtt * 1e3:.3f} ms, loss {self.loss_rate:.2%}, "
            f"congestion {self.level.name.lower()}>"
        )


def _burst(mtu: int) -> int:
    """Bytes that may leave at once: the initial window (RFC 9002, 7.7).

    And one, or a rounded release time holds its last packet back by the granularity of the pacer.
    """
    return initial_window(mtu) + 1


def _checked_rate(rate: object) -> float | None:
    if rate is None:
        return None
    if type(rate) not in {int, float} or not LEAST_RATE <= rate <= MOST_RATE:  # type: ignore[operator]
        raise UsageError(f"a rate is bytes/s from {LEAST_RATE:g} to {MOST_RATE:g} or None, not {rate!r}")
    return float(rate)  # type: ignore[arg-type]
