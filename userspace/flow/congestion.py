# SPDX-License-Identifier: Apache-2.0
"""What a congestion controller is told, and what it answers.

    FlowController                       Congestion
      a packet leaves          ------->  on_sent       each, or the first after silence: every_packet
      an acknowledgement came  ------->  on_ack        an Ack: what is newly acknowledged, with a rate sample
      packets are lost         ------->  on_loss       a Loss
      a router marked them     ------->  on_ecn
      they were not lost       ------->  on_spurious   undo what the last on_loss did
      nothing gets through     ------->  on_persistent
                               <-------  window        bytes that may be on their way
                               <-------  pacing_rate   bytes/s, or None: paced by window and round-trip time

One call per acknowledgement or loss, not one per packet.  Times are seconds (floats), sizes are bytes of UDP
payload (ints).  Ack and Loss belong to the caller, who reuses them: a controller keeps no reference.

Names and constants are those of RFC 9002 (section 7 and appendix B) wherever it has them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Protocol

#: Bytes of a full packet, when nobody says another size: what QUIC may always send (RFC 9000, 14).
MAX_DATAGRAM_SIZE: Final = 1200


def initial_window(mtu: int) -> int:
    """Ten packets, at most 14,720 bytes or two packets (RFC 9002, 7.2)."""
    return min(10 * mtu, max(14_720, 2 * mtu))


def minimum_window(mtu: int) -> int:
    """Two packets (RFC 9002, 7.2)."""
    return 2 * mtu


class Ack:
    """What one acknowledgement has newly acknowledged, and the state after it.

    The rate sample is that of draft-cheng-iccrg-delivery-rate-estimation: of the newly acknowledged packet
    that was sent last, ``delivered`` bytes since it was sent, over the longer of the times that sending and
    acknowledging them took.
    """

    __slots__ = (
        "app_limited", "bytes", "delivered", "delivery_rate", "in_flight", "largest_sent_at", "min_rtt",
        "packets", "prior_delivered", "prior_in_flight", "rtt", "smoothed_rtt",
    )  # fmt: skip

    def __init__(self) -> None:
        self.bytes = 0  # newly acknowledged
        self.packets = 0
        #: When the newest of them was sent.
        self.largest_sent_at = 0.0
        #: The sample that this acknowledgement gave, None if it gave none (RFC 9002, 5.1).
        self.rtt: float | None = None
        self.smoothed_rtt = 0.0
        self.min_rtt = 0.0
        self.prior_in_flight = 0  # bytes, before this acknowledgement
        self.in_flight = 0  # bytes, after it and what it showed to be lost
        #: Bytes delivered since the beginning, with these; and when the newest of these was sent.
        self.delivered = 0
        self.prior_delivered = 0
        #: Bytes/s, 0.0 when it can't be told; a lower bound when app_limited.
        self.delivery_rate = 0.0
        #: The newest of them was sent while the window was not full for want of data.
        self.app_limited = False


class Loss:
    """What was newly found lost, all at once."""

    __slots__ = ("bytes", "in_flight", "largest_sent_at", "packets", "prior_in_flight")

    def __init__(self) -> None:
        self.bytes = 0
        self.packets = 0
        #: When the newest of them was sent: those sent before the last reduction say nothing new.
        self.largest_sent_at = 0.0
        self.prior_in_flight = 0  # bytes, with these
        self.in_flight = 0  # bytes, without these


class Congestion(Protocol):
    """A congestion controller of one path.  Deterministic: the same calls give the same answers."""

    #: As users write it: "cubic".
    name: str
    #: Bytes that may be on their way; never below minimum_window.
    window: int
    #: Bytes/s to send with; None: as the pacer computes from the window (RFC 9002, 7.7).
    pacing_rate: float | None
    #: Bytes above which the window grows slowly; None before the first congestion (RFC 9002, B.2).
    ssthresh: int | None
    #: Whether on_sent is for every packet; if not, it is for one that leaves while nothing is on its way.
    every_packet: bool

    def on_sent(self, now: float, size: int, in_flight: int, *, app_limited: bool) -> None:
        """A packet has left; ``in_flight`` counts it."""

    def on_ack(self, now: float, ack: Ack) -> None:
        """After on_loss, when the same acknowledgement showed losses."""

    def on_loss(self, now: float, loss: Loss) -> None:
        """Found lost by threshold or told by the caller."""

    def on_ecn(self, now: float, marked: int, largest_sent_at: float) -> None:
        """So many more packets came with a CE mark (RFC 9002, 7.1)."""

    def on_spurious(self, now: float) -> None:
        """All that the latest reduction was for has arrived after all: undo it, if nothing came since."""

    def on_persistent(self, now: float) -> None:
        """Persistent congestion (RFC 9002, 7.6): start again from the least."""

    def on_mtu(self, mtu: int) -> None:
        """Full packets have another size now, bytes."""


#: Makes a controller for a path: (now, bytes of a full packet, seed of whatever it draws).
CongestionFactory = Callable[[float, int, int], Congestion]
