# SPDX-License-Identifier: Apache-2.0
"""What a conductor keeps of each connection and each endpoint, and what it hands out."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from errno import ENETDOWN
from types import MappingProxyType
from typing import Final, NamedTuple

from userspace.connection.states import Cause, ConnectionState, State
from userspace.connection.transport import Closed, Ending, Transport

#: Makes the transport of a connection, which has not begun to connect: time, number of the connection, key of
#: the endpoint, address.  What it raises is counted, told in the snapshot, and the attempt has failed.
TransportFactory = Callable[[float, int, Hashable, Hashable], Transport]


class Datagram(NamedTuple):
    """To be sent now, to that address."""

    connection: int
    address: Hashable
    payload: bytes


class Received(NamedTuple):
    """A message of a peer."""

    connection: int
    endpoint: Hashable
    payload: bytes


class Peer:
    """One endpoint: its connections, and which of them tries for all."""

    __slots__ = ("down", "key", "lead", "links", "unproved")

    def __init__(self, key: Hashable) -> None:
        self.key = key
        #: In the order in which they were made.
        self.links: tuple[Link, ...] = ()  # of one most often, and a list of one is twice as large
        #: The connection whose attempt the reconnection manager waits for.
        self.lead: Link | None = None
        #: The manager may want to know that it was heard.
        self.unproved = False
        #: The link that all its connections use is down, others are not.
        self.down = False

    @property
    def live(self) -> bool:
        """Whether any connection is up."""
        return any(link.live for link in self.links)


class Link:
    """One connection: its number, its state, and what carries it now."""

    __slots__ = ("address", "attempts", "number", "peer", "received", "restarts", "sent", "state",
                 "transport")  # fmt: skip

    def __init__(self, number: int, peer: Peer, address: Hashable, state: ConnectionState) -> None:
        self.number = number
        self.peer = peer
        self.address = address
        self.state = state
        #: None while there is none, and none is being made.
        self.transport: Transport | None = None
        # Since it has its number.
        self.attempts = self.restarts = self.sent = self.received = 0

    @property
    def live(self) -> bool:
        """Whether the peer has answered, and it was not lost since."""
        state = self.state.state
        return state is State.CONNECTED or state is State.DRAINING

    def __repr__(self) -> str:
        return f"<Link {self.number} to {self.peer.key!r}: {self.state.state}>"


#: What ended a transport, in the words of states.
CAUSES: Final = MappingProxyType(
    {
        Ending.ASKED: Cause.LOCAL_ERROR,  # not by us: what we ask for is not waited for
        Ending.REFUSED: Cause.REFUSED,
        Ending.UNREACHABLE: Cause.REFUSED,
        Ending.TIMED_OUT: Cause.TIMED_OUT,
        Ending.LOST: Cause.LOST,
        Ending.PEER_CLOSED: Cause.PEER_CLOSED,
        Ending.PEER_RESET: Cause.PEER_RESTARTED,
        Ending.IDENTITY: Cause.REFUSED,
        Ending.PROTOCOL: Cause.REFUSED,
        Ending.LOCAL_ERROR: Cause.LOCAL_ERROR,
    }
)
#: Of these a link that is down may be the reason.
SILENCES: Final = frozenset({Cause.TIMED_OUT, Cause.LOST, Cause.REFUSED})


def cause_of(end: Closed, *, down: bool) -> Cause:
    """Why a transport ended; ``down``: its link is down, as far as is known."""
    cause = CAUSES[end.ending]
    if end.code == ENETDOWN and end.ending is Ending.UNREACHABLE:
        return Cause.LINK_DOWN
    return Cause.LINK_DOWN if down and cause in SILENCES else cause
