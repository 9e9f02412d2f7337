# SPDX-License-Identifier: Apache-2.0
"""What a QUIC connection is told before it begins, what it leaves to the next one, and the library's inside.

    settings = QuicSettings(alpn=("solana-tpu",))
    engine = open_engine(settings, flow, identity=identity, session=session, on_ticket=...)
    engine.connect(now), engine.receive(now, data)

:class:`QuicSettings` is for people and files.  :class:`QuicSession` is what a connection to the same peer may
resume with: the TLS ticket, the transport parameters in it, the round-trip time (RFC 9002, 6.2.2), and whose
key the peer had, because a resumed handshake shows no certificate.

:class:`Engine` is the only place that reads what aioquic does not show, but for its congestion control
(:mod:`~userspace.connection.quic_congestion`): how many streams and bytes the peer allows, that it has closed
(aioquic tells at the end of the closing period), its certificate, its reset tokens.  Another version of
aioquic that keeps these elsewhere is refused when a connection is opened, not found out in the middle of one.
"""

from __future__ import annotations

import dataclasses
import hmac
import ssl
from collections.abc import Callable
from typing import Final, NamedTuple

import msgspec

from userspace.connection.identity import Identity, peer_key
from userspace.connection.quic_congestion import NAME, FlowCongestion, take_over
from userspace.connection.quic_library import (
    LIBRARY_VERSION,
    Buffer,
    Epoch,
    Library,
    QuicConfiguration,
    QuicDeliveryState,
    QuicPacketSpace,
    QuicProtocolVersion,
    SessionTicket,
    events,
)
from userspace.flow.congestion import MAX_DATAGRAM_SIZE
from userspace.flow.controller import LEAST_RATE, MOST_RATE, SIZE_MAXIMUM, FlowController
from userspace.flow.registry import CONTROLLERS
from userspace.flow.rtt import INITIAL_RTT, checked_seconds
from userspace.flow.sent import check_whole
from xdp.errors import UnsupportedError, UsageError

#: Bytes of a TPU message: what fits a packet of IPv6's least MTU (RFC 8200, 5: 1,280 less 40 and 8).
LARGEST: Final = 1232
#: Bytes of the longest message that may be asked for: it is held whole.
LARGEST_MAXIMUM: Final = 1 << 20
#: Messages that wait for window and pacing.
QUEUE_MAXIMUM: Final = 1 << 16
#: Messages on their way: with more, building a packet takes milliseconds.
STREAMS_MAXIMUM: Final = 1 << 12
#: Protocol names that are offered, and the bytes of one (RFC 7301, 3.1).
ALPN_MAXIMUM: Final = 8
ALPN_SIZE: Final = 255
#: Seconds: the guess of RFC 9002 is used while nothing better is known, and a session's is believed in here.
LEAST_INITIAL_RTT: Final = 0.01
#: The address that the library is told for the peer: whoever carries the datagrams knows better.
_PEER: Final = ("", 0)
#: Bytes of a stateless reset's token, and of the shortest datagram with one (RFC 9000, 10.3).
_TOKEN_SIZE: Final = 16
_RESET_MINIMUM: Final = 21


class QuicSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How connections to one kind of QUIC peer are made.  Raises UsageError for values out of range.

    Seconds, bytes, bytes/s.
    """

    #: What is spoken in it, the first choice first.
    alpn: tuple[str, ...]
    #: As it is asked for (SNI), and as sessions are told apart.
    server_name: str | None = None
    #: PEM text of those whose signature makes a certificate good for ``server_name``.
    authorities: str | None = None
    #: Take whoever answers: its key can be read afterwards.
    unverified: bool = False
    idle_timeout: float = 30.0
    #: A packet is asked for after so long a silence; None: never.  TPU clients do so every second.
    keep_alive: float | None = 1.0
    connect_timeout: float = 5.0
    #: The longest datagram that is sent.
    mtu: int = MAX_DATAGRAM_SIZE
    #: The longest message, either way.
    largest: int = LARGEST
    #: Messages that wait at most.
    queue: int = 1024
    #: Messages on their way at most: each costs a look with every packet that is built (quic_streams).
    streams: int = 128
    #: Send before the handshake where a session allows it.  Whoever records such a message can have it
    #: delivered once more (RFC 9001, 9.2): only for messages for which that does no harm.
    early_data: bool = False
    congestion: str = "cubic"
    max_rate: float | None = None

    def __post_init__(self) -> None:
        if not 1 <= len(self.alpn) <= ALPN_MAXIMUM:
            raise UsageError(f"alpn has 1 to {ALPN_MAXIMUM} names, not {len(self.alpn)}")
        for name in self.alpn:
            if not name.isascii() or not 1 <= len(name) <= ALPN_SIZE:
                raise UsageError(f"a name in alpn has 1 to {ALPN_SIZE} ASCII characters, not {name!r}")
        if self.server_name is not None and not (
            self.server_name.isascii() and 1 <= len(self.server_name) <= ALPN_SIZE
        ):
            raise UsageError(f"server_name has 1 to {ALPN_SIZE} ASCII characters, not {self.server_name!r}")
        if self.authorities is not None and self.server_name is None:
            raise UsageError("authorities vouch for a name", hint="give server_name as well")
        checked_seconds("idle_timeout", self.idle_timeout, 0.1, 3600.0)
        if self.keep_alive is not None:
            checked_seconds("keep_alive", self.keep_alive, 0.01, self.idle_timeout)
        checked_seconds("connect_timeout", self.connect_timeout, 0.001, 3600.0)
        check_whole("mtu", self.mtu, MAX_DATAGRAM_SIZE, SIZE_MAXIMUM)
        check_whole("largest", self.largest, 1, LARGEST_MAXIMUM)
        check_whole("queue", self.queue, 1, QUEUE_MAXIMUM)
        check_whole("streams", self.streams, 1, STREAMS_MAXIMUM)
        if self.congestion not in CONTROLLERS:
            raise UsageError(f"congestion is one of {', '.join(CONTROLLERS)}, not {self.congestion!r}")
        if self.max_rate is not None and not LEAST_RATE <= self.max_rate <= MOST_RATE:
            raise UsageError(
                f"max_rate is bytes/s from {LEAST_RATE:g} to {MOST_RATE:g} or None, not {self.max_rate!r}"
            )


class QuicSession(NamedTuple):
    """What the next connection to the same peer may resume with.

    A ticket is best used once (RFC 8446, C.4): whoever sees one twice knows that it is the same client.
    """

    ticket: SessionTicket
    #: The peer's Ed25519 key, None where it has none.
    peer_key: bytes | None
    #: Smoothed round-trip time, seconds.
    rtt: float
    #: Authorities have vouched for it when it was new.
    verified: bool

    def __repr__(self) -> str:
        whose = "unknown key" if self.peer_key is None else self.peer_key.hex()
        return f"<QuicSession {self.ticket.server_name!r}, {whose}, {self.rtt * 1e3:.3f} ms>"


class QuicSnapshot(msgspec.Struct, frozen=True, kw_only=True):
    """The state of one connection, for people and JSON; datagrams, bytes of UDP payload, messages, seconds.

    ``accepted`` = ``queued`` + ``messages_sent`` + ``abandoned``.
    """

    phase: str
    heard_at: float | None
    peer_key: str | None
    resumed: bool
    datagrams_sent: int
    bytes_sent: int
    datagrams_received: int
    bytes_received: int
    ignored: int
    accepted: int
    queued: int
    messages_sent: int
    abandoned: int
    refused: int
    streams_open: int
    messages_received: int
    messages_lost: int
    keep_alives: int
    path_changes: int


class Engine:
    """aioquic's connection with a FlowController in it, and what it knows and does not show."""

    __slots__ = ("congestion", "library")

    #: What is read of it, here and in quic_congestion.
    _READ: Final = (
        "_close_at", "_close_event", "_close_pending", "_crypto_buffers", "_local_max_streams_bidi", "_loss",
        "_peer_cid", "_peer_cid_available", "_remote_max_data", "_remote_max_data_used",
        "_remote_max_streams_uni", "_spaces", "_streams",
    )  # fmt: skip

    def __init__(self, library: Library, flow: FlowController) -> None:
        missing = [name for name in self._READ if not hasattr(library, name)]
        if missing:
            raise UnsupportedError(
                f"aioquic {LIBRARY_VERSION} has no {missing[0]} in its connection",
                hint="use a version that Sluice was tested with (pyproject.toml)",
            )
        self.library = library
        self.congestion: FlowCongestion = take_over(library, flow)
        # A peer may open streams that want an answer only where there is one who answers.
        library._local_max_streams_bidi.value = library._local_max_streams_bidi.sent = 0

    @property
    def flow(self) -> FlowController:
        """Who decides about window and pacing."""
        return self.congestion.flow

    def connect(self, now: float) -> None:
        """Begin the handshake."""
        self.library.connect(_PEER, now)

    def receive(self, now: float, data: bytes) -> bool:
        """A datagram came; whether there was a packet in it that was the peer's, and new."""
        library = self.library
        idle_at, spaces = library._close_at, library._spaces
        library.receive_datagram(data, _PEER, now)
        if library._spaces is not spaces:
            self._send_again(spaces)
        # Set anew by each such packet, and by nothing else in there: another object, even if it is as late.
        return library._close_at is not idle_at

    def slim(self) -> None:
        """The handshake is done: give back the buffers of TLS's messages, a fifth of all that is kept."""
        library = self.library
        library._crypto_buffers = {epoch: Buffer(capacity=1) for epoch in library._crypto_buffers}

    def _send_again(self, spaces: dict[Epoch, QuicPacketSpace]) -> None:
        """The server has asked for another beginning (RFC 9000, 17.2.5.3) and knows nothing of these packets.

        aioquic forgets them, and with them that what was in them has not arrived.
        """
        for epoch, space in spaces.items():
            packets = list(space.sent_packets.values())
            self.congestion.on_packets_expired(packets=[one for one in packets if one.in_flight])
            if epoch is Epoch.ONE_RTT:
                for packet in packets:
                    for handler, arguments in packet.delivery_handlers:
                        handler(QuicDeliveryState.LOST, *arguments)

    @property
    def closing(self) -> events.ConnectionTerminated | None:
        """That it ends, and why, as soon as that is known."""
        return self.library._close_event

    @property
    def close_is_ours(self) -> bool:
        """Whether the peer has yet to be told that it ends."""
        return self.library._close_pending

    @property
    def streams(self) -> int:
        """Streams that are not finished: what was sent on them has not arrived, or what comes is not all."""
        return len(self.library._streams)

    def credit(self) -> tuple[int, int]:
        """Unidirectional streams that may be opened, and bytes that may be sent on all streams together."""
        library = self.library
        used = library.get_next_available_stream_id(is_unidirectional=True) // 4
        return (
            library._remote_max_streams_uni - used,
            library._remote_max_data - library._remote_max_data_used,
        )

    def peer_key(self) -> bytes | None:
        """The peer's Ed25519 key, None where it has shown none."""
        certificate = self.library.tls._peer_certificate
        try:
            return None if certificate is None else peer_key(certificate)
        except UsageError:
            return None

    def is_reset(self, data: bytes) -> bool:
        """Whether a datagram that could not be read is the peer's word that it knows no such connection."""
        if len(data) < _RESET_MINIMUM or data[0] & 0x80:
            return False
        library = self.library
        token = data[-_TOKEN_SIZE:]
        return any(
            hmac.compare_digest(one.stateless_reset_token or b"", token)
            for one in (library._peer_cid, *library._peer_cid_available)
        )


def make_flow(now: float, settings: QuicSettings, seed: int) -> FlowController:
    """A FlowController for a new path."""
    return FlowController(
        now, congestion=settings.congestion, mtu=settings.mtu, max_rate=settings.max_rate, seed=seed
    )


def open_engine(
    settings: QuicSettings,
    flow: FlowController,
    *,
    identity: Identity | None,
    session: QuicSession | None,
    on_ticket: Callable[[SessionTicket], None],
) -> Engine:
    """A client's connection that has not begun; UnsupportedError with an aioquic that is not understood."""
    ticket = None if session is None else session.ticket
    if ticket is not None and not settings.early_data:
        ticket = dataclasses.replace(ticket, max_early_data_size=None)
    configuration = QuicConfiguration(
        alpn_protocols=list(settings.alpn),
        congestion_control_algorithm=NAME,
        idle_timeout=settings.idle_timeout,
        # What the peer may send before it is read: the library doubles both as they are used up.
        max_data=max(4 * settings.largest, 1 << 16),
        max_stream_data=settings.largest,
        max_datagram_size=settings.mtu,
        server_name=settings.server_name,
        session_ticket=ticket,
        cadata=None if settings.authorities is None else settings.authorities.encode(),
        initial_rtt=INITIAL_RTT if session is None else max(session.rtt, LEAST_INITIAL_RTT),
        supported_versions=[QuicProtocolVersion.VERSION_1],
        verify_mode=ssl.CERT_REQUIRED if settings.authorities is not None else ssl.CERT_NONE,
    )
    if identity is not None:
        configuration.certificate = identity.certificate
        configuration.private_key = identity.private_key
    return Engine(Library(configuration=configuration, session_ticket_handler=on_ticket), flow)
