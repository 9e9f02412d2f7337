# SPDX-License-Identifier: Apache-2.0
"""What became of the datagrams that came through kernel sockets; every one is in exactly one place."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class LaneStatistics:
    """Datagrams of one lane: ``delivered`` ever, ``queued`` now, ``held`` by the application now."""

    name: str
    delivered: int
    queued: int
    held: int
    dropped: int  # its quota was used up


@dataclass(frozen=True, slots=True)
class SocketStatistics:
    """Counters since opening, in datagrams.

    ``dropped`` has what the backend dropped, by reason: ``truncated`` (longer than
    a frame), ``no_large_frame`` (all of its lane in use), ``lane_full`` (the lane's
    quota is queued or held) and ``reply_failed`` (heartbeat not answered).
    ``discarded`` has what the policy gave no lane, by the reasons of xdp.abi.REASONS.
    ``shared`` of those received came in one message with others (UDP_GRO).
    ``refused`` has what the select program dropped in the kernel, by the same reasons, where
    these lanes have it: it is in none of the other numbers.
    ``overflowed`` never reached the backend: full socket buffers, bad checksums.
    ``reported`` errors of sent datagrams were read from the sockets; ``unread`` of them gave way to newer
    ones before anybody asked.  ``floods``: times that a socket got so many that it heard of none for a
    second.
    """

    received: int
    delivered: int
    queued: int
    replied: int
    dropped: dict[str, int]
    discarded: dict[str, int]
    overflowed: int
    errors: int
    sent: int
    send_failed: int
    asynchronous_errors: int
    lanes: tuple[LaneStatistics, ...]
    shared: int = 0
    refused: dict[str, int] = field(default_factory=dict)
    reported: int = 0
    unread: int = 0
    floods: int = 0

    @property
    def balanced(self) -> bool:
        """Whether received = delivered + queued + replied + dropped + discarded, as it always must be."""
        gone = sum(self.dropped.values()) + sum(self.discarded.values())
        return self.received == self.delivered + self.queued + self.replied + gone


@dataclass(frozen=True, slots=True)
class SendFailure:
    """A datagram that was not sent: its index in the call and why (errno)."""

    index: int
    errno: int
