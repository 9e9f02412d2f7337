# SPDX-License-Identifier: Apache-2.0
"""What all transports have in common: how they are driven, what they tell, how they end.

    connection.connect(now)
    while connection.phase is not Phase.CLOSED:
        for datagram in connection.take_datagrams(now): ...      # send it to the peer's address
        for event in connection.take_events(): ...               # Opened, Message, Pong, Closed, ...
        ...                                                      # until next_timeout(), or a datagram
        connection.receive(now, datagram)                        # what came from the peer's address
        connection.on_timeout(now)

A transport is one connection to one peer.  It does no I/O: whoever uses it carries the datagrams, and knows
by the address (and port) which connection one belongs to.  After each call that is told the time, datagrams
and events are to be taken; ``next_timeout`` is right after that.

Times are seconds of any monotonic clock; one that is earlier than the latest is taken as that one, what is no
time raises UsageError.  Nothing that the network says raises.  A connection that has ended stays ended: the
next attempt is a new object.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import IntEnum, StrEnum
from errno import ECONNREFUSED, EHOSTDOWN, EHOSTUNREACH, ENETDOWN, ENETUNREACH
from typing import ClassVar, Final, NamedTuple, Protocol

from userspace.connection.heartbeat import Heartbeats, HostReply, Pong
from userspace.connection.timers import LATEST, checked_now
from xdp.errors import UsageError

#: Messages that wait for take_events: more are lost, as in a socket's buffer.  Whoever takes events after
#: each call never has more than a datagram holds.
MESSAGES_WAITING: Final = 4096
#: Characters of a peer's reason that are kept: they end up in logs and on terminals.
REASON_MAXIMUM: Final = 200

NEVER: Final = math.inf


class Phase(IntEnum):
    """Where a transport is; it only goes forward."""

    NEW = 0
    OPENING = 1
    OPEN = 2
    CLOSED = 3


#: In these it has a peer.
LIVE: Final = (Phase.OPENING, Phase.OPEN)


class Ending(StrEnum):
    """Why a connection ended."""

    ASKED = "asked"  #: close was called
    REFUSED = "refused"  #: nobody listens there, or whoever does will not have us
    UNREACHABLE = "unreachable"  #: no way to the peer, says this host or a router
    TIMED_OUT = "timed_out"  #: no answer while it was opening
    LOST = "lost"  #: it was open, and nothing came for the idle timeout
    PEER_CLOSED = "peer_closed"
    PEER_RESET = "peer_reset"  #: the peer knows nothing of it any more (RFC 9000, 10.3)
    IDENTITY = "identity"  #: the peer is not who it should be
    PROTOCOL = "protocol"  #: the peer broke the protocol, or speaks another one
    LOCAL_ERROR = "local_error"  #: an error of ours, or of the library below


#: What ICMP says of a peer's port, host and net (RFC 1122, 4.2.3.9), as errno (ip(7)).
_ENDS: Final = {
    ECONNREFUSED: Ending.REFUSED,
    EHOSTUNREACH: Ending.UNREACHABLE,
    ENETUNREACH: Ending.UNREACHABLE,
    EHOSTDOWN: Ending.UNREACHABLE,
    ENETDOWN: Ending.UNREACHABLE,
}


class Opened(NamedTuple):
    """The peer has answered; from now on messages may be sent."""

    #: Of a session that was resumed, without certificates.
    resumed: bool = False
    #: What was sent before the handshake was taken (0-RTT).
    early: bool = False


class Heard(NamedTuple):
    """Something came from the peer's application: the last time, once however much came."""

    at: float


class Message(NamedTuple):
    """A whole message from the peer."""

    payload: bytes


class Restarted(NamedTuple):
    """The peer is another start of its application than the one that answered before."""

    boot: int


class Closed(NamedTuple):
    """The end: nothing comes after it."""

    ending: Ending
    #: An error code of the protocol, the errno of what ICMP said, or 0.
    code: int = 0
    reason: str = ""


Event = Opened | Heard | Message | Pong | HostReply | Restarted | Closed


class Transport(Protocol):
    """One connection to one peer, without I/O."""

    phase: Phase
    #: When something came from the peer's application for the last time; minus infinity before that.
    heard_at: float

    def connect(self, now: float) -> None:
        """Begin.  UsageError when it has begun before."""

    def receive(self, now: float, data: bytes) -> None:
        """A datagram came from the peer's address."""

    def send(self, now: float, payload: bytes) -> bool:
        """Send a message; False when it was not taken: not open, closed, or too many wait already."""

    def ping(self, now: float, sequence: int) -> bool:
        """Ask the application for a :class:`Pong`; False when it is not open."""

    def probe(self, now: float, sequence: int) -> bool:
        """Ask the kernel program of the peer's host for a :class:`HostReply`, also while it is opening."""

    def close(self, now: float, code: int = 0, reason: str = "") -> None:
        """End it, and tell the peer where the protocol can."""

    def on_error(self, now: float, errno: int) -> None:
        """The socket reported an error for the peer's address (ICMP): some end the connection."""

    def on_path_change(self, now: float) -> None:
        """Datagrams leave from another address or by another way from now on."""

    def take_datagrams(self, now: float) -> Sequence[bytes]:
        """What is to be sent to the peer now."""

    def take_events(self) -> list[Event]:
        """What has happened since the last time."""

    def next_timeout(self) -> float:
        """When to call :meth:`on_timeout`; infinite: never."""

    def on_timeout(self, now: float) -> None:
        """That time has come; nothing happens when it is too early."""


class Base:
    """Clock, phase, events, counters and heartbeats: what the transports do alike."""

    __slots__ = (
        "_events", "_heard", "_messages", "_now", "bytes_received", "bytes_sent", "datagrams_received",
        "datagrams_sent", "heard_at", "heartbeats", "ignored", "messages_lost", "messages_received", "phase",
    )  # fmt: skip

    #: What is told of it in ``repr``.
    kind: ClassVar[str]

    def __init__(self, heartbeats: Heartbeats) -> None:
        self.phase = Phase.NEW
        self.heard_at = -NEVER
        #: Pings and probes on their way, and how many there were.
        self.heartbeats = heartbeats
        self._now = -LATEST
        #: None while there are none, as of ten thousand connections that rest.
        self._events: list[Event] | None = None
        self._messages = 0  # of the events
        self._heard = False  # since the events were taken
        # Counters since the beginning; bytes are those of UDP payloads.
        self.datagrams_sent = self.bytes_sent = self.datagrams_received = self.bytes_received = 0
        self.messages_received = self.messages_lost = self.ignored = 0

    def _clock(self, now: float) -> float:
        self._now = now = checked_now(now, self._now)
        return now

    def _begin(self, now: float) -> float:
        now = self._clock(now)
        if self.phase is not Phase.NEW:
            raise UsageError("a transport connects once", hint="make a new one for the next attempt")
        self.phase = Phase.OPENING
        return now

    def _received(self, now: float, data: bytes) -> float:
        now = self._clock(now)
        self.datagrams_received += 1
        self.bytes_received += len(data)
        return now

    def _sent(self, datagrams: Sequence[bytes]) -> Sequence[bytes]:
        self.datagrams_sent += len(datagrams)
        self.bytes_sent += sum(map(len, datagrams))
        return datagrams

    def _hear(self, now: float) -> None:
        self.heard_at = now
        self._heard = True

    def _tell(self, event: Event) -> None:
        if self._events is None:
            self._events = [event]
        else:
            self._events.append(event)

    def _give(self, payload: bytes) -> None:
        if self._messages >= MESSAGES_WAITING:
            self.messages_lost += 1
            return
        self._messages += 1
        self.messages_received += 1
        self._tell(Message(payload))

    def _end(self, ending: Ending, code: int = 0, reason: str = "") -> None:
        """For good; a second end is none."""
        if self.phase is not Phase.CLOSED:
            self.phase = Phase.CLOSED
            self._tell(Closed(ending, code, printable(reason)))

    def on_error(self, now: float, errno: int) -> None:
        """End where ICMP says that there is nobody, or no way; everything else is the caller's matter."""
        self._clock(now)
        ending = _ENDS.get(errno)
        if ending is not None and self.phase in LIVE:
            self._abandon()
            self._end(ending, errno)

    def _abandon(self) -> None:
        """It ends without a word to the peer: nothing of it is kept."""

    def take_events(self) -> list[Event]:
        """What has happened since the last time, in order; that something was heard comes first."""
        events, self._events = self._events or [], None
        self._messages = 0
        if self._heard:
            self._heard = False
            events.insert(0, Heard(self.heard_at))
        return events

    def __repr__(self) -> str:
        return f"<{self.kind} {self.phase.name.lower()}, {self.messages_received} messages received>"


def printable(reason: str) -> str:
    """A peer's words without what terminals obey, and not too many."""
    return "".join(one if one.isprintable() else "?" for one in reason[:REASON_MAXIMUM])


def checked_payload(payload: object, largest: int) -> bytes:
    """The bytes of a message; UsageError unless it has 1 to ``largest`` of them."""
    if not isinstance(payload, bytes | bytearray | memoryview):
        raise UsageError(f"a message is bytes, not {type(payload).__name__}")
    whole = payload if type(payload) is bytes else bytes(payload)
    if not 1 <= len(whole) <= largest:
        raise UsageError(f"a message has 1 to {largest} bytes, not {len(whole)}")
    return whole
