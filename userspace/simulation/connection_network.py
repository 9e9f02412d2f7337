# SPDX-License-Identifier: Apache-2.0
"""The network between one application and its peers, in virtual time: paths with loss, delay and cuts.

    network = Network(engine, peers, deliver)
    network.paths[3].lose(0.6)                          # of round trips
    network.paths[3].cut(outward=True, inward=False)
    network.send(now, connection, peer=3, data)         # deliver(now, connection, bytes or errno), maybe

A datagram is one event on its way out and one on its way back.  Jitter makes them overtake each other;
duplicates come with a delay of their own.  All chance is of one generator, drawn in the order of events.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from errno import ENETUNREACH
from typing import Final

from userspace.simulation.connection_peer import Peer
from userspace.simulation.engine import Call, Engine

#: Seconds one way: a peer in the same city.
DELAY: Final = 0.01

Deliver = Callable[[float, int, bytes | int], None]
#: Connection, peer, datagram or errno.
_Carried = tuple[int, int, bytes | int]


class Path:
    """The way to one peer and back.  Attributes may be set at any time; seconds, probabilities."""

    __slots__ = ("delay", "duplicate", "in_cut", "jitter", "loss_in", "loss_out", "out_cut")

    def __init__(self, delay: float = DELAY) -> None:
        self.delay = delay
        #: Added by chance, evenly from nothing to this: what is more than the gap between two reorders them.
        self.jitter = 0.0
        self.loss_out = self.loss_in = self.duplicate = 0.0
        #: Nothing gets through that way.
        self.out_cut = self.in_cut = False

    def lose(self, round_trip: float) -> None:
        """Lose that part of round trips: half of it on each way."""
        self.loss_out = self.loss_in = 1.0 - math.sqrt(1.0 - round_trip)

    def cut(self, *, outward: bool, inward: bool) -> None:
        """Let nothing through, one way or both, until told otherwise."""
        self.out_cut, self.in_cut = outward, inward

    @property
    def open(self) -> bool:
        """Whether anything gets through both ways."""
        return not (self.out_cut or self.in_cut) and self.loss_out < 1.0 and self.loss_in < 1.0


class Network:
    """All paths; see the module."""

    __slots__ = (
        "_deliver", "_draw", "_engine", "_peers", "_unreachable", "arrived", "delivered", "duplicated",
        "flying", "link", "lost", "paths", "returned", "sent",
    )  # fmt: skip

    def __init__(self, engine: Engine, peers: Sequence[Peer], deliver: Deliver) -> None:
        self._engine = engine
        self._peers = peers
        self._deliver = deliver
        self._draw = engine.random("network").random
        self.paths = [Path() for _ in peers]
        #: Our own link.  While it is down nothing gets through.
        self.link = True
        self._unreachable = False
        # Datagrams and errors of ICMP: sent by us and returned by peers, and second copies of them; these
        # together are arrived at peers, delivered to us, lost, and flying.
        self.sent = self.returned = self.duplicated = 0
        self.arrived = self.delivered = self.lost = self.flying = 0

    def set_link(self, *, up: bool, route: bool) -> None:
        """Our link goes up or down; without a ``route`` nothing can be sent: ENETUNREACH, at once."""
        self.link, self._unreachable = up, not (up or route)

    def send(self, now: float, connection: int, peer: int, data: bytes) -> int:
        """Send one; 0, or the errno that the socket says."""
        self.sent += 1
        path = self.paths[peer]
        if self._unreachable:
            self.lost += 1
            return ENETUNREACH
        if path.out_cut or not self.link or (path.loss_out and self._draw() < path.loss_out):
            self.lost += 1
        else:
            self._carry(now, path, self._arrive, (connection, peer, data))
        return 0

    def back(self, now: float, connection: int, peer: int, data: bytes | int) -> None:
        """A peer answers, or sends something of its own accord; an errno is an error of ICMP."""
        self.returned += 1
        path = self.paths[peer]
        if path.in_cut or not self.link or (path.loss_in and self._draw() < path.loss_in):
            self.lost += 1
        else:
            self._carry(now, path, self._return, (connection, peer, data))

    def _carry(self, now: float, path: Path, call: Call, what: _Carried) -> None:
        engine, jitter = self._engine, path.jitter
        self.flying += 1
        engine.at(now + path.delay + (jitter * self._draw() if jitter else 0.0), call, what)
        if path.duplicate and self._draw() < path.duplicate:
            self.duplicated += 1
            self.flying += 1
            engine.at(now + path.delay + jitter * self._draw(), call, what)

    def _arrive(self, now: float, what: tuple[int, int, bytes]) -> None:
        """At the peer."""
        self.flying -= 1
        self.arrived += 1
        connection, peer, data = what
        answer = self._peers[peer].answer(now, data)
        if answer is not None:
            self.back(now, connection, peer, answer)

    def _return(self, now: float, what: _Carried) -> None:
        """At our socket."""
        self.flying -= 1
        self.delivered += 1
        self._deliver(now, what[0], what[2])
