# SPDX-License-Identifier: Apache-2.0
"""A QUIC server in virtual time, and the path to it: what tests of connections run against.

The server is aioquic's connection, without anything of ours in it.
"""

from __future__ import annotations

import datetime as dt
import heapq
import math
from collections.abc import Callable
from itertools import count

from aioquic._buffer import Buffer
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection as Library
from aioquic.quic.events import (
    ConnectionTerminated,
    HandshakeCompleted,
    QuicEvent,
    StreamDataReceived,
)
from aioquic.quic.packet import (
    QuicHeader,
    QuicPacketType,
    QuicProtocolVersion,
    encode_quic_retry,
    pull_quic_header,
)
from aioquic.tls import SessionTicket
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from userspace.connection.identity import Identity
from userspace.connection.quic import QuicConnection
from userspace.connection.quic_session import QuicSettings
from userspace.connection.transport import Closed, Event, Message, Phase

ALPN = "solana-tpu"
CLIENT, SERVER = Identity(b"\x01" * 32), Identity(b"\x02" * 32)
SETTINGS = QuicSettings(alpn=(ALPN,), unverified=True)
SECRET = bytes(16)
#: Steps of the clock in one run: more are an endless loop.
STEPS = 200_000


class _Asking(Library):
    """Asks for the client's certificate, which aioquic's server does in its own tests only."""

    def _initialize(self, peer_cid: bytes) -> None:
        super()._initialize(peer_cid)
        self.tls._request_client_certificate = True


class Server:
    """Accepts connections, remembers tickets, and keeps what came as whole streams."""

    def __init__(
        self,
        identity: Identity = SERVER,
        *,
        ask: bool = True,
        alpn: str = ALPN,
        idle_timeout: float = 30.0,
        mtu: int = 1200,
        retry: bool = False,
    ) -> None:
        self.configuration = QuicConfiguration(
            is_client=False, alpn_protocols=[alpn], idle_timeout=idle_timeout, max_datagram_size=mtu
        )
        self.configuration.certificate = identity.certificate
        self.configuration.private_key = identity.private_key
        self.ask, self.retry = ask, retry
        self._asked_again: dict[bytes, bytes] = {}  # its connection ID by the one that we chose
        self._replies: list[bytes] = []
        self.library: Library | None = None
        self.tickets: dict[bytes, SessionTicket] = {}
        self.messages: list[bytes] = []
        self.events: list[QuicEvent] = []
        self.handshakes = 0
        self.alive = True
        self._streams: dict[int, bytes] = {}
        self._address = "client"

    def _keep(self, ticket: SessionTicket) -> None:
        self.tickets[ticket.ticket] = ticket

    def _find(self, label: bytes) -> SessionTicket | None:
        ticket = self.tickets.get(label)
        if ticket is not None and self.library is not None:
            self.library.tls._request_client_certificate = False  # not in a handshake without certificates
        return ticket

    def receive(self, now: float, data: bytes, address: str) -> None:
        if not self.alive:
            return
        header = pull_quic_header(Buffer(data=data), host_cid_length=8)
        cid = header.destination_cid
        if header.packet_type is QuicPacketType.INITIAL and (
            self.library is None or cid not in self._known()
        ):
            if self.retry and not header.token:
                self._ask_again(header)
                return
            kind = _Asking if self.ask else Library
            self.library = kind(
                configuration=self.configuration,
                original_destination_connection_id=self._asked_again.get(cid, cid),
                retry_source_connection_id=cid if self.retry else None,
                session_ticket_fetcher=self._find,
                session_ticket_handler=self._keep,
            )
        if self.library is not None:
            self.library.receive_datagram(data, address, now)
            self._look()

    def _ask_again(self, header: QuicHeader) -> None:
        """Whether the address is the client's (RFC 9000, 8.1.2)."""
        self.library = None
        ours = len(self._asked_again).to_bytes(8, "big")
        self._asked_again[ours] = header.destination_cid
        self._replies.append(
            encode_quic_retry(
                version=QuicProtocolVersion.VERSION_1,
                source_cid=ours,
                destination_cid=header.source_cid,
                original_destination_cid=header.destination_cid,
                retry_token=b"token",
            )
        )

    def _known(self) -> set[bytes]:
        assert self.library is not None
        return {one.cid for one in self.library._host_cids} | {
            self.library.original_destination_connection_id
        }

    def _look(self) -> None:
        assert self.library is not None
        while (event := self.library.next_event()) is not None:
            self.events.append(event)
            if isinstance(event, StreamDataReceived):
                data = self._streams.pop(event.stream_id, b"") + event.data
                if event.end_stream:
                    self.messages.append(data)
                else:
                    self._streams[event.stream_id] = data
            elif isinstance(event, HandshakeCompleted):
                self.handshakes += 1
            elif isinstance(event, ConnectionTerminated):
                self.library = None
                return

    def say(self, payload: bytes) -> None:
        assert self.library is not None
        number = self.library.get_next_available_stream_id(is_unidirectional=True)
        self.library.send_stream_data(number, payload, end_stream=True)

    def take(self, now: float) -> list[tuple[bytes, str]]:
        replies, self._replies = self._replies, []
        found = [(one, "client") for one in replies]
        if self.alive and self.library is not None:
            found += self.library.datagrams_to_send(now)
        return found

    def next_timeout(self) -> float:
        timer = self.library.get_timer() if self.alive and self.library is not None else None
        return math.inf if timer is None else timer

    def on_timeout(self, now: float) -> None:
        if self.alive and self.library is not None:
            timer = self.library.get_timer()
            if timer is not None and now >= timer:
                self.library.handle_timer(now + 1e-6)
                self._look()


Lose = Callable[[float, bool], bool]


class World:
    """A client, a server, and a path with a delay that loses what ``lose`` says (time, whether up)."""

    def __init__(
        self,
        server: Server | None = None,
        *,
        delay: float = 0.01,
        settings: QuicSettings = SETTINGS,
        lose: Lose = lambda _now, _up: False,
        rate: float = math.inf,
        jitter: Callable[[], float] = lambda: 0.0,
        **options: object,
    ) -> None:
        self.server = Server() if server is None else server
        self.delay, self.lose, self.rate, self.jitter = delay, lose, rate, jitter
        self.now = 100.0
        self.settings = settings
        self.address = "client"
        self._order = count()
        self._wire: list[tuple[float, int, bool, bytes, str]] = []
        self._free_at = 0.0
        self.events: list[tuple[float, Event]] = []
        self.sent: list[tuple[float, int]] = []  # by the client: when, bytes
        self.steps = 0
        self.client = self.new_client(**options)

    def new_client(self, **options: object) -> QuicConnection:
        options = {"identity": CLIENT, "secret": SECRET, **options}
        self.client = QuicConnection(self.settings, **options)  # type: ignore[arg-type]
        return self.client

    def connect(self, until: float = 1.0) -> None:
        self.client.connect(self.now)
        self.run(until)

    def run(self, seconds: float, *, every: Callable[[float], float] = lambda _now: math.inf) -> None:
        """So long from now on; ``every`` is called at each step before the exchange, and says when next."""
        end = self.now + seconds
        while True:
            self.steps += 1
            assert self.steps < STEPS, "time stands still"
            wake = every(self.now)
            self._exchange()
            arrival = self._wire[0][0] if self._wire else math.inf
            at = min(wake, arrival, self.client.next_timeout(), self.server.next_timeout())
            if at > end:
                break
            self.now = max(self.now, at)
            self._deliver()
            self.client.on_timeout(self.now)
            self.server.on_timeout(self.now)
        self.now = end

    def _exchange(self) -> None:
        now = self.now
        for datagram in self.client.take_datagrams(now):
            self.sent.append((now, len(datagram)))
            self._free_at = max(self._free_at, now) + len(datagram) / self.rate
            if not self.lose(now, True):
                self._put(self._free_at + self.delay, True, datagram)
        for datagram, address in self.server.take(now):
            if not self.lose(now, False) and address == self.address:
                self._put(now + self.delay, False, datagram)
        self.events.extend((now, event) for event in self.client.take_events())

    def _put(self, at: float, up: bool, datagram: bytes) -> None:
        heapq.heappush(self._wire, (at + self.jitter(), next(self._order), up, datagram, self.address))

    def _deliver(self) -> None:
        while self._wire and self._wire[0][0] <= self.now:
            _, _, up, datagram, address = heapq.heappop(self._wire)
            if up:
                self.server.receive(self.now, datagram, address)
            else:
                self.client.receive(self.now, datagram)

    # --- what came of it

    def of(self, kind: type[Event]) -> list[Event]:
        return [event for _, event in self.events if isinstance(event, kind)]

    @property
    def opened(self) -> bool:
        return self.client.phase is Phase.OPEN

    @property
    def messages(self) -> list[bytes]:
        return [event.payload for _, event in self.events if isinstance(event, Message)]


def connected(**options: object) -> World:
    world = World(**options)  # type: ignore[arg-type]
    world.connect()
    assert world.opened, world.events
    return world


def the_end(world: World) -> Closed:
    (closed,) = world.of(Closed)
    assert isinstance(closed, Closed)
    assert world.events[-1][1] is closed
    assert world.client.phase is Phase.CLOSED
    assert world.client.next_timeout() == math.inf
    told = world.client.snapshot()
    assert told.accepted == told.messages_sent + told.abandoned
    return closed


def in_the_web() -> tuple[Server, str]:
    """A server with a certificate for localhost, and the text of who signed it: itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = dt.datetime.now(dt.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(7)
        .not_valid_before(now - dt.timedelta(hours=1))
        .not_valid_after(now + dt.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    server = Server()
    server.configuration.certificate, server.configuration.private_key = certificate, key
    return server, certificate.public_bytes(Encoding.PEM).decode()
