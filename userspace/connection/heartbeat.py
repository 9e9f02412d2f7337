# SPDX-License-Identifier: Apache-2.0
"""The heartbeat over UDP: a ping that the peer's application answers, a probe that its kernel answers.

    heartbeats = Heartbeats(secret=os.urandom(16), boot=boot)
    datagram = heartbeats.ping(now, 7)              # or probe(now, 7), for the kernel program of the peer
    if is_heartbeat(payload):
        heard = heartbeats.receive(now, payload)    # Pong, HostReply, or None
    for pong in heartbeats.take_pongs(now): ...     # what the peer's pings are answered with

Everything is 32 bytes long; the layout is in bpf/include/abi.h:

====  =======  ==========================================================================================
type  name     who answers it
====  =======  ==========================================================================================
1     probe    the kernel program of the peer, where its policy says so (docs/configuration.md, "Heartbeats")
2     reply    nobody
3     ping     the application, with a pong
4     pong     nobody
====  =======  ==========================================================================================

So a host whose application hangs answers probes and no pings.  A pong tells how long the application had
the ping, which is not the network's time, and a number that is another one after each start of the
application: so a peer that was restarted is noticed, even if no ping was ever lost.

**What a stranger can do.**  Each ping and probe carries a cookie, made with a secret of the sender; an answer
counts if it brings back a cookie that is on its way, and only once.  So whoever cannot see the ping cannot
answer it.  An answer is never longer than the question, one question has one answer, and answers are not
answered: neither reflector nor loop.  Of pings that come faster than they are taken at most
:data:`PONGS_WAITING` are answered.  What is forged costs nothing but a look.
"""

from __future__ import annotations

import struct
from hashlib import blake2b
from typing import Final, NamedTuple

from userspace.flow.sent import check_whole
from xdp._libbpf import ffi, lib
from xdp.errors import UsageError

#: Bytes of every heartbeat.
SIZE: Final = ffi.sizeof("struct sluice_ping")
MAGIC: Final = lib.SLUICE_HEARTBEAT_MAGIC.to_bytes(4, "big")
PROBE: Final = lib.SLUICE_HEARTBEAT_PROBE
REPLY: Final = lib.SLUICE_HEARTBEAT_REPLY
PING: Final = lib.SLUICE_HEARTBEAT_PING
PONG: Final = lib.SLUICE_HEARTBEAT_PONG

#: Pings and probes whose answers are waited for: at ten a second those of the last six seconds.
OUTSTANDING: Final = 64
#: Seconds after which no answer is waited for any more: no network holds a packet for longer, and what an
#: outage left without an answer would fill the memory of ten thousand connections.
ANSWER_MAXIMUM: Final = 10.0
#: Pings that are answered between two calls of take_pongs: a peer that suspects us sends ten a second.
PONGS_WAITING: Final = 16
#: Bytes of a secret: what blake2b takes as a key.
SECRET_MINIMUM: Final = 16
SECRET_MAXIMUM: Final = 64
NUMBER_MAXIMUM: Final = (1 << 64) - 1
#: Microseconds, 16.8 s: the longest time that a pong can tell.
_HELD_MAXIMUM: Final = (1 << 24) - 1

# struct sluice_ping: magic, type, held_us, sequence, boot, cookie.
_LAYOUT: Final = struct.Struct("!4sB3sQQQ")
_NOTHING: Final = bytes(3)


class Pong(NamedTuple):
    """The peer's application has answered a ping."""

    sequence: int
    sent_at: float
    received_at: float
    #: Seconds that the application had the ping, as it says; within the time that passed.
    held: float = 0.0

    @property
    def round_trip(self) -> float:
        """Seconds on the network."""
        return self.received_at - self.sent_at - self.held


class HostReply(NamedTuple):
    """The kernel program of the peer's host has answered a probe; the application may hang."""

    sequence: int
    sent_at: float
    received_at: float


def is_heartbeat(payload: bytes) -> bool:
    """Whether a datagram is none of the application's, but one of these."""
    return len(payload) == SIZE and payload.startswith(MAGIC)


class Heartbeats:
    """Pings and probes on their way to one peer, and the peer's pings.

    ``secret`` is 16 to 64 bytes that nobody else knows; ``boot`` a number that the application drew when it
    started, 0 to 2**64 - 1.  UsageError for anything else.  Whoever calls keeps ``now`` from going backwards.
    """

    __slots__ = (
        "_asked", "_boot", "_outstanding", "_secret", "forgotten", "peer_boot", "pings_dropped",
        "pings_received", "pings_sent", "pongs_received", "pongs_sent", "probes_sent", "replies_received",
        "unknown",
    )  # fmt: skip

    def __init__(self, *, secret: bytes, boot: int = 0) -> None:
        if not (type(secret) is bytes and SECRET_MINIMUM <= len(secret) <= SECRET_MAXIMUM):
            raise UsageError(f"a secret is {SECRET_MINIMUM} to {SECRET_MAXIMUM} bytes")
        check_whole("boot", boot, 0, NUMBER_MAXIMUM)
        self._secret, self._boot = secret, boot
        #: By cookie: type of the answer, sequence, when it was sent.  None while nothing is waited for, as of
        #: ten thousand connections that rest: a dict that was used takes 250 bytes.
        self._outstanding: dict[int, tuple[int, int, float]] | None = None
        #: Pings of the peer: sequence, cookie, when they came.
        self._asked: list[tuple[int, int, float]] | None = None
        #: The number of the peer's application, None before it has answered.
        self.peer_boot: int | None = None
        # Since the beginning.  pings_sent + probes_sent = pongs_received + replies_received + forgotten +
        # outstanding; what came is pongs_received + replies_received + pings_received + pings_dropped +
        # unknown.
        self.pings_sent = self.probes_sent = self.pongs_sent = 0
        self.pongs_received = self.replies_received = self.pings_received = 0
        self.pings_dropped = self.unknown = self.forgotten = 0

    @property
    def outstanding(self) -> int:
        """Pings and probes whose answers are waited for."""
        return len(self._outstanding or ())

    def ping(self, now: float, sequence: int) -> bytes:
        """The datagram that asks the application.  UsageError when that number is on its way already."""
        datagram = self._ask(now, sequence, PING, PONG)
        self.pings_sent += 1
        return datagram

    def probe(self, now: float, sequence: int) -> bytes:
        """The datagram that asks the kernel program.  UsageError when that number is on its way already."""
        datagram = self._ask(now, sequence, PROBE, REPLY)
        self.probes_sent += 1
        return datagram

    def _ask(self, now: float, sequence: int, kind: int, answer: int) -> bytes:
        check_whole("sequence", sequence, 0, NUMBER_MAXIMUM)
        outstanding = self._outstanding
        if outstanding is None:
            outstanding = self._outstanding = {}
        made = blake2b(struct.pack("!BQ", kind, sequence), key=self._secret, digest_size=8).digest()
        cookie = int.from_bytes(made, "big")
        if cookie in outstanding:
            raise UsageError(f"{sequence} is on its way already", hint="each ping has a number of its own")
        while outstanding:
            oldest = next(iter(outstanding))
            if len(outstanding) < OUTSTANDING and outstanding[oldest][2] >= now - ANSWER_MAXIMUM:
                break
            del outstanding[oldest]
            self.forgotten += 1
        outstanding[cookie] = (answer, sequence, now)
        return _LAYOUT.pack(MAGIC, kind, _NOTHING, sequence, 0, cookie)

    def receive(self, now: float, payload: bytes) -> Pong | HostReply | None:
        """What a heartbeat from the peer says; None when there is nothing to tell.

        After a Pong ``peer_boot`` is that of the application which answered.
        """
        _, kind, held, sequence, boot, cookie = _LAYOUT.unpack(payload)
        if kind == PING:
            waiting = self._asked
            if waiting is None:
                waiting = self._asked = []
            if len(waiting) < PONGS_WAITING:
                self.pings_received += 1
                waiting.append((sequence, cookie, now))
            else:
                self.pings_dropped += 1
            return None
        outstanding = self._outstanding
        asked = None if outstanding is None else outstanding.get(cookie)
        if outstanding is None or asked is None or asked[0] != kind or asked[1] != sequence:
            self.unknown += 1
            return None
        del outstanding[cookie]
        if not outstanding:
            self._outstanding = None
        sent_at = asked[2]
        if kind == REPLY:
            self.replies_received += 1
            return HostReply(sequence, sent_at, now)
        self.pongs_received += 1
        self.peer_boot = boot
        return Pong(sequence, sent_at, now, min(int.from_bytes(held, "big") * 1e-6, now - sent_at))

    def take_pongs(self, now: float) -> list[bytes]:
        """The answers to the peer's pings."""
        if not self._asked:
            return []
        asked, self._asked = self._asked, None
        self.pongs_sent += len(asked)
        pongs: list[bytes] = []
        for sequence, cookie, came_at in asked:
            held = min(int((now - came_at) * 1e6), _HELD_MAXIMUM).to_bytes(3, "big")
            pongs.append(_LAYOUT.pack(MAGIC, PONG, held, sequence, self._boot, cookie))
        return pongs

    def __repr__(self) -> str:
        return (
            f"<Heartbeats: {self.outstanding} on their way, {self.pongs_received} pongs, "
            f"{self.replies_received} replies of the kernel>"
        )
