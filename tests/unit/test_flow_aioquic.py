# SPDX-License-Identifier: Apache-2.0
"""NewReno and CUBIC beside aioquic's, which its own loss recovery drives over a lossy path in virtual time.

Every event that aioquic's recovery tells its controller (a packet acknowledged, packets lost, persistent
congestion) is told ours too, and the windows are compared after each: NewReno's are equal, CUBIC's within the
margin that aioquic's rounding to whole bytes makes.  Where RFC 9002 or 9438 let both choose, or aioquic does
otherwise, its choice is switched off in Mirror, RenoMirror and CubicMirror, where the reasons are.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Iterable

import pytest
from aioquic.quic.congestion.base import QuicCongestionControl, register_congestion_control
from aioquic.quic.congestion.cubic import CubicCongestionControl
from aioquic.quic.congestion.reno import RenoCongestionControl
from aioquic.quic.packet import QuicPacketType
from aioquic.quic.packet_builder import QuicSentPacket
from aioquic.quic.rangeset import RangeSet
from aioquic.quic.recovery import QuicPacketRecovery, QuicPacketSpace
from aioquic.tls import Epoch
from hypothesis import given, settings
from hypothesis import strategies as st

from userspace.flow.congestion import Ack, Loss
from userspace.flow.cubic import ALPHA, Cubic
from userspace.flow.newreno import NewReno


class Mirror(QuicCongestionControl):
    """What both mirrors have: ours beside, and what to tell it.

    Both have HyStart++ off: aioquic leaves slow start by another rule, older than RFC 9406, which is off as
    well (nobody calls on_rtt_measurement of the classes below).
    """

    ours: NewReno
    margin = 0.0
    #: Windows that were compared, reductions, and persistent congestion.
    compared = reduced = persistent = 0

    def begin(self, recovery: QuicPacketRecovery) -> None:
        self.recovery = recovery
        #: Before the acknowledgement: it is of one packet here, while ours knows of those that several have.
        self.prior_in_flight = 0
        # The initial window of RFC 9002 has a limit of 14,720 bytes; theirs is ten packets of any size.
        self.ours.window = self.congestion_window
        self.far = 0.0

    def smoothed_rtt(self) -> float:
        return self.recovery._rtt_smoothed

    def acknowledge(self, now: float, packet: QuicSentPacket) -> None:
        assert packet.sent_time is not None
        ack = Ack()
        ack.packets, ack.bytes = 1, packet.sent_bytes
        ack.largest_sent_at = packet.sent_time
        ack.prior_in_flight = self.prior_in_flight
        ack.smoothed_rtt = self.smoothed_rtt()
        self.ours.on_ack(now, ack)
        self.compare()

    def lose(self, now: float, packets: Iterable[QuicSentPacket]) -> None:
        packets = list(packets)
        loss = Loss()
        loss.packets, loss.bytes = len(packets), sum(packet.sent_bytes for packet in packets)
        loss.largest_sent_at = max(packet.sent_time or 0.0 for packet in packets)
        self.ours.on_loss(now, loss)
        self.compare()

    def compare(self) -> None:
        self.compared += 1
        far = abs(self.ours.window / self.congestion_window - 1)
        self.far = max(self.far, far)
        assert far <= self.margin, f"{self.ours.window} beside {self.congestion_window}"
        if self.margin == 0.0:
            assert self.ours.ssthresh == self.ssthresh

    def on_rtt_measurement(self, *, now: float, rtt: float) -> None:
        """See the class."""


class RenoMirror(Mirror, RenoCongestionControl):
    def __init__(self, *, max_datagram_size: int) -> None:
        super().__init__(max_datagram_size=max_datagram_size)
        self.ours = NewReno(0.0, max_datagram_size, hystart=False)

    def on_packet_acked(self, *, now: float, packet: QuicSentPacket) -> None:
        super().on_packet_acked(now=now, packet=packet)
        self.acknowledge(now, packet)

    def on_packets_lost(self, *, now: float, packets: Iterable[QuicSentPacket]) -> None:
        packets, start = list(packets), self._congestion_recovery_start_time
        super().on_packets_lost(now=now, packets=packets)
        if self._congestion_recovery_start_time != start:
            # RFC 9002 does not say what becomes of the bytes counted for the next packet.  Theirs stay, while
            # the window that they were counted against is halved; ours begin again.
            self._congestion_stash = 0
            self.reduced += 1
        self.lose(now, packets)

    def on_persistent_congestion(self) -> None:
        super().on_persistent_congestion()
        self._congestion_stash = 0  # as above
        self.persistent += 1
        self.ours.on_persistent(0.0)
        self.compare()


class CubicMirror(Mirror, CubicCongestionControl):
    def __init__(self, *, max_datagram_size: int) -> None:
        super().__init__(max_datagram_size=max_datagram_size)
        self.ours: Cubic = Cubic(0.0, max_datagram_size, hystart=False)
        # Their window, its target and W_est are cut to whole bytes with every packet: up to 1 of some 12 that
        # a packet of 1,200 adds to a W_est of 50 packets, and it may decide which of the two is larger.
        # Larger packets make that small.
        self.margin = 0.05 if max_datagram_size < 10_000 else 0.01
        self.prior = 0

    def on_packet_acked(self, *, now: float, packet: QuicSentPacket) -> None:
        assert packet.sent_time is not None
        if packet.sent_time <= self._congestion_recovery_start_time:
            # RFC 9002, 7.3.2: in recovery the window does not grow.  Theirs does.
            self.bytes_in_flight -= packet.sent_bytes
        else:
            # RFC 9438, 4.2: RTT is the smoothed one.  Theirs is the latest.
            self.rtt = self.smoothed_rtt()
            w_est = self.ours._w_est  # as theirs, but for rounding, which shall not decide
            if self._starting_congestion_avoidance or self._first_slow_start:  # if it is avoidance at all
                w_est = self.congestion_window
                # Where the least window is above W_max, theirs has a K below 0, and so grows faster; in ours
                # avoidance begins as without a W_max then.
                self._W_max = max(self._W_max, self.congestion_window)
            # RFC 9438, 4.3: alpha until W_est is cwnd_prior, then 1.  Theirs is 1 always.
            friendly = ALPHA if w_est < self.prior else 1.0
            self.additive_increase_factor = friendly * self._max_datagram_size  # type: ignore[assignment]
            window = self.congestion_window
            super().on_packet_acked(now=now, packet=packet)
            # RFC 9438, 4.3: the window becomes W_est where W_cubic(t) is less, though it may be above both,
            # as it goes towards W_cubic(t + RTT).  Ours does not shrink with an acknowledgement then.
            self.congestion_window = max(self.congestion_window, window)
            # RFC 9438 has no such rule: they begin again from the initial window after two seconds in which
            # nothing was acknowledged.
            self.last_ack = 0.0
        self.acknowledge(now, packet)

    def on_packets_lost(self, *, now: float, packets: Iterable[QuicSentPacket]) -> None:
        packets, start = list(packets), self._congestion_recovery_start_time
        # The windows were compared with the event before.  From here both go on with the same: rounding shall
        # not decide whether one is below W_max (fast convergence, 4.7), nor add up over reductions.
        window = self.congestion_window = self.ours.window
        self._W_max = self.ours._w_max  # type: ignore[assignment]
        in_flight = self.bytes_in_flight
        size = sum(packet.sent_bytes for packet in packets)
        # RFC 9438, 4.6, lets choose: theirs is a part of what is on its way, ours of the window.
        self.bytes_in_flight = window + size
        super().on_packets_lost(now=now, packets=packets)
        self.bytes_in_flight = in_flight - size
        if self._congestion_recovery_start_time != start:
            self.prior = window
            self.reduced += 1
        self.lose(now, packets)

    def on_persistent_congestion(self) -> None:
        super().on_persistent_congestion()
        # RFC 9438, 4.8: avoidance begins without a W_max after that.  Theirs keeps the old one.
        self._first_slow_start, self._starting_congestion_avoidance = True, False
        self._W_max = self.congestion_window
        self.persistent += 1
        self.ours.on_persistent(0.0)
        self.compare()


register_congestion_control("mirrored-reno", RenoMirror)
register_congestion_control("mirrored-cubic", CubicMirror)


class Path:
    """A sender with a window that is always full, aioquic's recovery, and a path that loses packets.

    The bottleneck lets ``rate`` packets a second through and drops what comes to a queue of ``queue``;
    besides, a packet is lost with ``loss``, and for ``outage`` seconds from ``outage_at`` on all are.
    Acknowledgements are for ``together`` packets.
    """

    def __init__(
        self,
        name: str,
        seed: int,
        *,
        mtu: int = 1200,
        rtt: float = 0.05,
        jitter: float = 0.0,
        rate: float = 2000.0,
        queue: int = 50,
        loss: float = 0.0,
        together: int = 1,
        outage: tuple[float, float] = (math.inf, 0.0),
    ) -> None:
        self.random = random.Random(seed)
        self.mtu, self.rtt, self.jitter = mtu, rtt, jitter
        self.rate, self.queue, self.loss, self.together = rate, queue, loss, together
        self.outage_from, self.outage_until = outage[0], outage[0] + outage[1]
        self.recovery = QuicPacketRecovery(
            congestion_control_algorithm=name,
            initial_rtt=0.1,
            max_datagram_size=mtu,
            peer_completed_address_validation=True,
            send_probe=lambda: None,
        )
        self.recovery.handshake_confirmed = True
        self.space = QuicPacketSpace(is_application_data=True)
        self.recovery.spaces = [self.space]
        mirror = self.recovery._cc
        assert isinstance(mirror, Mirror)
        self.mirror = mirror
        mirror.begin(self.recovery)
        self.number = 0
        self.free_at = 0.0  # when the bottleneck is
        self.arrivals: list[tuple[float, int]] = []  # (when the sender can know of it, number)
        self.received = RangeSet()
        self.unacknowledged = 0

    def send(self, now: float) -> None:
        while self.mirror.bytes_in_flight + self.mtu <= self.mirror.congestion_window:
            packet = QuicSentPacket(
                epoch=Epoch.ONE_RTT,
                in_flight=True,
                is_ack_eliciting=True,
                is_crypto_packet=False,
                packet_number=self.number,
                packet_type=QuicPacketType.ONE_RTT,
                sent_time=now,
                sent_bytes=self.mtu,
            )
            self.recovery.on_packet_sent(packet=packet, space=self.space)
            out = self.outage_from <= now < self.outage_until
            full = (self.free_at - now) * self.rate >= self.queue
            if not out and not full and self.random.random() >= self.loss:
                self.free_at = max(self.free_at, now) + 1 / self.rate
                delay = self.rtt + self.random.uniform(0.0, self.jitter)
                heapq.heappush(self.arrivals, (self.free_at + delay, self.number))
            self.number += 1

    def run(self, packets: int) -> None:
        """Until so many were sent."""
        now = 1.0
        self.send(now)
        while self.number < packets:
            timer = self.recovery.get_loss_detection_time(amplification_limited=False)
            assert timer is not None
            if not self.arrivals or timer < self.arrivals[0][0]:
                now = max(now, timer) + 1e-6  # theirs rounds: at the very time it may find nothing lost yet
                self.recovery.on_loss_detection_timeout(now=now)
            else:
                now, number = heapq.heappop(self.arrivals)
                self.received.add(number, number + 1)
                self.unacknowledged += 1
                if self.unacknowledged < self.together and self.arrivals:
                    continue
                self.unacknowledged = 0
                self.mirror.prior_in_flight = self.mirror.bytes_in_flight
                self.recovery.on_ack_received(
                    ack_rangeset=self.received, ack_delay=0.0, now=now, space=self.space
                )
                while len(self.received) > 20:
                    self.received.shift()
            self.send(now)


PATHS = st.fixed_dictionaries(
    {
        "mtu": st.sampled_from([1200, 1472, 60_000]),
        "rtt": st.sampled_from([0.002, 0.02, 0.1, 0.4]),
        "jitter": st.sampled_from([0.0, 0.0, 0.003]),
        "rate": st.sampled_from([500.0, 2000.0, 20_000.0]),
        "queue": st.sampled_from([10, 50, 400]),
        "loss": st.sampled_from([0.0, 0.001, 0.01, 0.05]),
        "together": st.sampled_from([1, 2, 10]),
    }
)


@pytest.mark.parametrize("name", ["mirrored-reno", "mirrored-cubic"])
@given(seed=st.integers(0, 2**32), options=PATHS, outage=st.sampled_from([0.0, 0.0, 3.0]))
@settings(max_examples=20, deadline=None)
def test_the_windows_agree_on_any_path(
    name: str, seed: int, options: dict[str, float], outage: float
) -> None:
    path = Path(name, seed, outage=(2.0, outage), **options)  # type: ignore[arg-type]
    path.run(1500)
    assert path.mirror.compared > 500


@pytest.mark.parametrize(
    ("name", "mtu", "margin"),
    [("mirrored-reno", 1200, 0.0), ("mirrored-cubic", 1200, 0.03), ("mirrored-cubic", 60_000, 0.001)],
)
@pytest.mark.parametrize(("rtt", "rate"), [(0.02, 500), (0.1, 2000), (0.4, 2000)])
def test_the_windows_agree_over_many_reductions_and_an_outage(
    name: str, mtu: int, margin: float, rtt: float, rate: float
) -> None:
    # A queue as long as the path, and losses that are not of congestion: friendly, concave and convex parts.
    queue = max(10, int(rate * rtt))
    path = Path(name, 1, mtu=mtu, rtt=rtt, rate=rate, queue=queue, loss=0.001, together=2, outage=(3.0, 20.0))
    path.run(5000)
    assert path.mirror.far <= margin
    assert path.mirror.reduced >= 3
    assert path.mirror.persistent > 0
