# SPDX-License-Identifier: Apache-2.0
"""A UDP peer whose application answers pings: when it is there, and when it was restarted.

    connection = UdpConnection(secret=os.urandom(16), boot=boot)
    connection.connect(now)                     # a ping; Opened when it is answered
    connection.send(now, b"anything")           # as it is, without a frame around it
    connection.ping(now, 7)                     # Pong(7, ...)
    for datagram in connection.take_datagrams(now): socket.send(datagram)

The service's datagrams stay as they are.  Pings and pongs go between them, told apart by their length and
first bytes (:mod:`~userspace.connection.heartbeat`): the one payload that cannot be sent is one that looks
like them.

``connect`` asks until an answer comes or ``connect_timeout`` is over, at intervals that double.  From then on
nothing ends the connection but the caller and what ICMP says of the peer: whether a silent peer is dead is
for those who know more (:mod:`userspace.connection`).  A peer that answers with another boot number than
before gives Restarted, and the connection goes on.

UDP proves nothing of a sender: whoever can forge the peer's address can send messages in its name, and these
count as heard.  Only a Pong shows that the application can see what is sent to it, a HostReply that its host
can.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Final

import msgspec

from userspace.connection.heartbeat import SIZE, Heartbeats, HostReply, Pong, is_heartbeat
from userspace.connection.transport import (
    LIVE,
    NEVER,
    Base,
    Ending,
    Opened,
    Phase,
    Restarted,
    checked_payload,
)
from userspace.flow.rtt import checked_seconds
from userspace.flow.sent import check_whole
from xdp.errors import UsageError

#: Bytes: the longest payload of UDP over IPv4 (65,535 with headers of 20 and 8).
LARGEST: Final = 65_507
#: Seconds until the first ping is repeated; doubles.  On the longest paths on Earth answers take 0.3 s, and a
#: repeated ping costs nothing.
FIRST_REPEAT: Final = 0.2
#: Numbers of pings that the caller can choose are below; those above are of connect.
SEQUENCE_LIMIT: Final = 1 << 63


class UdpSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How UDP peers are treated.  Raises UsageError for values out of range."""

    #: Seconds until an attempt has failed: pings after 0, 0.2, 0.6 and 1.4 s.
    connect_timeout: float = 3.0
    #: Datagrams that wait for take_datagrams: as many as lanes send at once.
    queue: int = 1024

    def __post_init__(self) -> None:
        checked_seconds("connect_timeout", self.connect_timeout, 0.001, 3600.0)
        check_whole("queue", self.queue, 1, 1 << 16)


class UdpSnapshot(msgspec.Struct, frozen=True, kw_only=True):
    """The state of one connection, for people and JSON; datagrams, bytes of payload, seconds."""

    phase: str
    heard_at: float | None
    peer_boot: int | None
    datagrams_sent: int
    bytes_sent: int
    datagrams_received: int
    bytes_received: int
    messages_received: int
    messages_lost: int
    refused: int
    pings_sent: int
    probes_sent: int
    pongs_received: int
    replies_received: int
    pings_received: int
    pings_dropped: int
    unknown: int
    ignored: int
    restarts: int


_DEFAULT: Final = UdpSettings()


class UdpConnection(Base):
    """One UDP peer; see :class:`~userspace.connection.transport.Transport`.

    ``secret`` and ``boot`` as :class:`~userspace.connection.heartbeat.Heartbeats` takes them.
    """

    __slots__ = (
        "_attempts", "_deadline", "_queue", "_repeat_at", "_settings", "refused", "restarts",
    )  # fmt: skip

    kind: ClassVar[str] = "UdpConnection"

    def __init__(self, *, secret: bytes, boot: int = 0, settings: UdpSettings = _DEFAULT) -> None:
        super().__init__(Heartbeats(secret=secret, boot=boot))
        self._settings = settings
        self._queue: list[bytes] | None = None
        self._attempts = 0
        self._repeat_at = self._deadline = NEVER
        # Datagrams received = messages_received + messages_lost + ignored + heartbeats.
        self.refused = self.restarts = 0

    def connect(self, now: float) -> None:
        """Ask the peer's application whether it is there.  UsageError when that was done before."""
        now = self._begin(now)
        self._deadline = now + self._settings.connect_timeout
        self._ask(now)

    def _ask(self, now: float) -> None:
        self._repeat_at = now + FIRST_REPEAT * (1 << self._attempts)
        self._put(self.heartbeats.ping(now, SEQUENCE_LIMIT + self.heartbeats.pings_sent))
        self._attempts += 1

    def _put(self, datagram: bytes) -> None:
        if self._queue is None:
            self._queue = [datagram]
        else:
            self._queue.append(datagram)

    def _is_full(self) -> bool:
        return self._queue is not None and len(self._queue) >= self._settings.queue

    # --- in

    def receive(self, now: float, data: bytes) -> None:
        """A datagram came from the peer's address; whatever it holds."""
        now = self._received(now, data)
        if self.phase not in LIVE:
            self.ignored += 1
            return
        if not is_heartbeat(data):
            self._hear(now)
            self._give(data)
            return
        heartbeats = self.heartbeats
        unknown, boot = heartbeats.unknown, heartbeats.peer_boot
        answer = heartbeats.receive(now, data)
        if isinstance(answer, HostReply):  # which says nothing of the application
            self._tell(answer)
        elif heartbeats.unknown == unknown:
            self._hear(now)
        if isinstance(answer, Pong):
            self._answered(boot)
            if answer.sequence < SEQUENCE_LIMIT:  # else it is one of connect's
                self._tell(answer)

    def _answered(self, boot: int | None) -> None:
        """The peer's application has answered, and was that one the last time."""
        if self.phase is Phase.OPENING:
            self.phase = Phase.OPEN
            self._repeat_at = self._deadline = NEVER
            self._tell(Opened())
        peer_boot = self.heartbeats.peer_boot
        if boot is not None and peer_boot is not None and boot != peer_boot:
            self.restarts += 1
            self._tell(Restarted(peer_boot))

    # --- out

    def send(self, now: float, payload: bytes) -> bool:
        """Send a datagram as it is; False when it is not open, or too many wait to be taken.

        UsageError for one that is no datagram, or that the peer would take for a heartbeat.
        """
        self._clock(now)
        payload = checked_payload(payload, LARGEST)
        if is_heartbeat(payload):
            raise UsageError(f"{SIZE} bytes that begin like a heartbeat cannot be sent")
        if self.phase is not Phase.OPEN or self._is_full():
            self.refused += 1
            return False
        self._put(payload)
        return True

    def ping(self, now: float, sequence: int) -> bool:
        """Ask the application; the number is the caller's, below 2**63, and not on its way."""
        now = self._clock(now)
        check_whole("sequence", sequence, 0, SEQUENCE_LIMIT - 1)
        if self.phase is not Phase.OPEN or self._is_full():
            return False
        self._put(self.heartbeats.ping(now, sequence))
        return True

    def probe(self, now: float, sequence: int) -> bool:
        """Ask the kernel program of the peer's host; the number as for :meth:`ping`."""
        now = self._clock(now)
        check_whole("sequence", sequence, 0, SEQUENCE_LIMIT - 1)
        if self.phase not in LIVE or self._is_full():
            return False
        self._put(self.heartbeats.probe(now, sequence))
        return True

    def take_datagrams(self, now: float) -> Sequence[bytes]:
        """What is to be sent to the peer now."""
        now = self._clock(now)
        taken, self._queue = self._queue or [], None
        pongs = self.heartbeats.take_pongs(now)
        if pongs:
            taken = pongs + taken
        if not taken:
            return ()
        return self._sent(taken)

    # --- the end, and time

    def close(self, now: float, code: int = 0, reason: str = "") -> None:
        """End it; the peer is not told, and what was not taken yet is not sent."""
        self._clock(now)
        self._abandon()
        self._end(Ending.ASKED, code, reason)

    def _abandon(self) -> None:
        self._queue = None
        self._repeat_at = self._deadline = NEVER

    def on_path_change(self, now: float) -> None:
        """Nothing depends on the path; while it is opening, the peer is asked at once by the new one."""
        now = self._clock(now)
        if self.phase is Phase.OPENING:
            self._attempts = 0
            self._repeat_at = now

    def next_timeout(self) -> float:
        """When to call :meth:`on_timeout`; infinite once it is open."""
        return min(self._repeat_at, self._deadline)

    def on_timeout(self, now: float) -> None:
        """Ask again, or give up."""
        now = self._clock(now)
        if now >= self._deadline:
            self._abandon()
            self._end(Ending.TIMED_OUT)
        elif now >= self._repeat_at:
            self._ask(now)

    # --- looking at it

    def snapshot(self) -> UdpSnapshot:
        """All of it."""
        heartbeats = self.heartbeats
        return UdpSnapshot(
            phase=self.phase.name.lower(),
            heard_at=self.heard_at if self.heard_at > -NEVER else None,
            peer_boot=heartbeats.peer_boot,
            datagrams_sent=self.datagrams_sent,
            bytes_sent=self.bytes_sent,
            datagrams_received=self.datagrams_received,
            bytes_received=self.bytes_received,
            messages_received=self.messages_received,
            messages_lost=self.messages_lost,
            refused=self.refused,
            pings_sent=heartbeats.pings_sent,
            probes_sent=heartbeats.probes_sent,
            pongs_received=heartbeats.pongs_received,
            replies_received=heartbeats.replies_received,
            pings_received=heartbeats.pings_received,
            pings_dropped=heartbeats.pings_dropped,
            unknown=heartbeats.unknown,
            ignored=self.ignored,
            restarts=self.restarts,
        )
