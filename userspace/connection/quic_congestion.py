# SPDX-License-Identifier: Apache-2.0
"""FlowController in the place of aioquic's congestion control and pacer.

    library = QuicConnection(configuration=configuration)      # congestion_control_algorithm=NAME
    congestion = take_over(library, FlowController(now))
    library.receive_datagram(...), congestion.tell(now)        # after each call that acknowledges
    congestion.settle(now), library.datagrams_to_send(now)     # before each call that sends

aioquic keeps a registry of congestion controllers by name; the one registered here passes what aioquic says
on to a FlowController, and its window back.  aioquic goes on deciding what is sent again: a packet that it
counts as lost is lost for the FlowController as well.  The FlowController sees the same acknowledgements and
decides for itself what they mean for the window: by reordering, persistent congestion, a reduction that was
wrong.

- Packets of the handshake are counted as on their way and nothing more: their keys go before all of them are
  acknowledged, and then nobody knows what became of them.  They measure the round-trip time (RFC 9002, 5).
- A probe timeout is no loss (RFC 9002, 6.2).  aioquic forgets the packet whose data it sends again; the
  FlowController keeps it on its way until a later one is acknowledged, which shows that it is lost.
- aioquic registers packets after it has built all of a call.  The pacer counts those that it let pass until
  then.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Final

from userspace.connection.quic_library import (
    K_GRANULARITY,
    Epoch,
    Library,
    QuicCongestionControl,
    QuicPacketPacer,
    QuicPacketRecovery,
    QuicSentPacket,
    register_congestion_control,
)
from userspace.flow.controller import FlowController

#: In aioquic's registry.
NAME: Final = "sluice"


class FlowCongestion(QuicCongestionControl):
    """What aioquic takes for its congestion control; see the module."""

    #: Whether there is nothing to send after what is sent now.
    app_limited = True

    flow: FlowController
    recovery: QuicPacketRecovery

    def __init__(self, *, max_datagram_size: int) -> None:
        super().__init__(max_datagram_size=max_datagram_size)
        self.mtu = max_datagram_size
        #: Bytes that may leave beyond the window, once: a probe (RFC 9002, 6.2.4).
        self.allowance = 0
        #: Packets that the pacer let pass and on_packet_sent was not told of yet.
        self.passing = 0
        self._room = 0  # bytes that may leave at once
        self._packets = 0  # as many packets
        self._numbers: dict[int, int] = {}  # aioquic's to the FlowController's
        self._handshake = 0  # bytes on their way
        self._acked: list[int] = []  # since the last settle, the FlowController's numbers
        self._largest = -1
        self._measured = False  # they give a sample of the round-trip time
        self._measured_handshake = False
        self._ack_delay = 0.0

    # --- what aioquic says

    def on_packet_sent(self, *, packet: QuicSentPacket) -> None:
        """It is on its way."""
        self.passing = 0
        if packet.epoch is not Epoch.ONE_RTT:
            self._handshake += packet.sent_bytes
        elif self._packets > 0 and packet.sent_time is not None:
            self._packets -= 1
            self._numbers[packet.packet_number] = self.flow.on_packet_sent(
                packet.sent_time, packet.sent_bytes, app_limited=self.app_limited
            )

    def on_packet_acked(self, *, now: float, packet: QuicSentPacket) -> None:  # noqa: ARG002
        """It has arrived; settle tells the FlowController of all of them at once."""
        if packet.epoch is not Epoch.ONE_RTT:
            self._handshake -= packet.sent_bytes
            self._measured_handshake = True
            return
        number = self._numbers.pop(packet.packet_number, None)
        if number is not None:
            self._acked.append(number)

    def on_rtt_measurement(self, *, now: float, rtt: float) -> None:
        """The newest packet that an acknowledgement names was acknowledged by it for the first time."""
        if self._acked:
            self._measured = True
            # aioquic has told the delay to its own estimate only, which is what is left of the sample.
            self._ack_delay = max(rtt, K_GRANULARITY) - self.recovery._rtt_latest
        elif self._measured_handshake:
            self.flow.on_round_trip(now, rtt)
        self._measured_handshake = False

    def on_packets_lost(self, *, now: float, packets: Iterable[QuicSentPacket]) -> None:
        """They are sent again."""
        self.tell(now)
        for packet in packets:
            if packet.epoch is not Epoch.ONE_RTT:
                self._handshake -= packet.sent_bytes
                continue
            number = self._numbers.pop(packet.packet_number, None)
            if number is not None:
                self.flow.on_packet_lost(now, number)

    def on_packets_expired(self, *, packets: Iterable[QuicSentPacket]) -> None:
        """Their keys are gone, or they are sent again though nobody knows what became of them."""
        for packet in packets:
            if packet.epoch is not Epoch.ONE_RTT:
                self._handshake -= packet.sent_bytes
            else:
                self._numbers.pop(packet.packet_number, None)

    def on_persistent_congestion(self) -> None:
        """The FlowController sees that for itself, from what is lost."""

    # --- what the connection says

    def settle(self, now: float) -> None:
        """Tell aioquic the window."""
        self.tell(now)
        flow = self.flow
        self.passing = 0
        self._packets, self._room = flow.burst_allowed(now)
        self.bytes_in_flight = flow.in_flight + self._handshake
        self.congestion_window = flow.window
        if self.allowance:
            self.congestion_window = max(flow.window, self.bytes_in_flight + self.allowance)

    def tell(self, now: float) -> None:
        """Tell the FlowController what has arrived since the last time."""
        acked = self._acked
        if not acked:
            return
        acked.sort(reverse=True)
        ranges: list[tuple[int, int]] = []
        if not self._measured and self._largest > acked[0]:
            ranges.append((self._largest, self._largest))  # which is not new: so it gives no sample
        first = last = acked[0]
        for number in acked:
            if number < first - 1:
                ranges.append((first, last))
                last = number
            first = number
        ranges.append((first, last))
        self._largest = max(self._largest, acked[0])
        self._acked = []
        self.flow.on_ack_received(now, ranges, self._ack_delay)
        self._measured, self._ack_delay = False, 0.0

    def on_timer(self, now: float) -> None:
        """A timer of aioquic's has rung: the FlowController's are about the same."""
        if now >= self.flow.next_timeout():
            self.flow.on_timeout(now)

    def restart(self, flow: FlowController) -> None:
        """Another path: what is on its way by the old one says nothing of it (RFC 9000, 9.4)."""
        self.flow = flow
        self._numbers.clear()
        self._acked, self._largest, self._measured = [], -1, False

    def hold(self, now: float) -> float | None:
        """When the next packet of this call may leave; None: now, as far as the window goes."""
        passing = self.passing
        if self.allowance and not passing:
            return None
        if passing >= self._packets:
            return math.inf  # as many are on their way as can be kept account of
        if passing:
            if (passing + 1) * self.mtu <= self._room:
                return None
            return now + self.mtu / self.flow.get_current_rate(now)
        at = self.flow.next_send_time(now)
        # While the window is full aioquic decides: acknowledgements and its own probes leave all the same.
        return None if at <= now or at == math.inf else at


class FlowPacer(QuicPacketPacer):
    """Stands where aioquic's pacer does."""

    def __init__(self, congestion: FlowCongestion) -> None:
        super().__init__(max_datagram_size=congestion.mtu)
        self._congestion = congestion

    def next_send_time(self, now: float) -> float | None:  # type: ignore[override]
        """When a packet may leave that is more than an acknowledgement; None: now."""
        return self._congestion.hold(now)

    def update_after_send(self, now: float) -> None:  # noqa: ARG002
        """A packet was built."""
        self._congestion.passing += 1

    def update_rate(self, congestion_window: int, smoothed_rtt: float) -> None:
        """The FlowController knows the rate."""


def take_over(library: Library, flow: FlowController) -> FlowCongestion:
    """Make ``flow`` decide for a connection that was made with the congestion control ``NAME``."""
    recovery = library._loss
    congestion = recovery._cc
    assert isinstance(congestion, FlowCongestion)
    congestion.flow, congestion.recovery = flow, recovery
    recovery._pacer = FlowPacer(congestion)
    return congestion


register_congestion_control(NAME, FlowCongestion)
