# SPDX-License-Identifier: Apache-2.0
"""A peer as light as can be: it answers pings, echoes messages, hangs, dies, and is started anew.

Thousands of these stand for real ones.  They speak the heartbeat of
:mod:`userspace.connection.heartbeat`, by its bytes and not by its code, so that a mistake there does not
cancel out.  Nothing of a connection is kept: who is started anew has forgotten nothing but its number.
"""

from __future__ import annotations

from enum import IntEnum
from errno import ECONNREFUSED
from typing import Final

from userspace.connection.heartbeat import MAGIC, PING, PONG, PROBE, REPLY, SIZE
from userspace.flow.bucket import TokenBucket

#: Errors that a host sends to one destination, a second and at once: net.ipv4.icmp_ratelimit, and the burst
#: that Linux allows with it (XRLIM_BURST_FACTOR).
ICMP_RATE: Final = 1.0
ICMP_BURST: Final = 6

_PONG: Final = MAGIC + bytes((PONG, 0, 0, 0))
_REPLY: Final = MAGIC + bytes((REPLY, 0, 0, 0))


class Life(IntEnum):
    """What is left of a peer."""

    #: It answers.
    RUNNING = 0
    #: The application does not read; its host's kernel answers probes.
    HUNG = 1
    #: There is no application: the host says so (ICMP port unreachable).
    STOPPED = 2
    #: There is no host: nobody says anything.
    OFF = 3


class Peer:
    """One peer; ``kernel``: the program on its host answers probes."""

    __slots__ = ("_boot", "_icmp", "boot", "kernel", "life", "messages", "number", "pings", "probes", "since")

    def __init__(self, number: int, boot: int, *, kernel: bool) -> None:
        self.number = number
        self.kernel = kernel
        self.life = Life.RUNNING
        #: When it became so, seconds.
        self.since = 0.0
        # That came, whatever became of it.
        self.pings = self.probes = self.messages = 0
        self._icmp = TokenBucket(0.0, ICMP_RATE, ICMP_BURST)
        self.restart(0.0, boot)

    def restart(self, now: float, boot: int) -> None:
        """It runs, and is another one than before."""
        self.boot = boot
        self._boot = boot.to_bytes(8, "big")
        self.become(now, Life.RUNNING)

    def become(self, now: float, life: Life) -> None:
        """Live on, or not."""
        self.life = life
        self.since = now

    def answer(self, now: float, data: bytes) -> bytes | int | None:
        """What comes back: a datagram, an errno for an ICMP error, or nothing."""
        life = self.life
        if len(data) == SIZE and data.startswith(MAGIC):
            kind = data[4]
            if kind == PROBE:
                self.probes += 1
                if self.kernel and life != Life.OFF:
                    return _REPLY + data[8:]
            elif kind == PING:
                self.pings += 1
                if life == Life.RUNNING:
                    return _PONG + data[8:16] + self._boot + data[24:]
        else:
            self.messages += 1
            if life == Life.RUNNING:
                return data
        if life == Life.STOPPED and self._icmp.take(now, 1):
            return ECONNREFUSED
        return None

    def __repr__(self) -> str:
        return f"<Peer {self.number}: {self.life.name.lower()} since {self.since:.3f}>"
