# SPDX-License-Identifier: Apache-2.0
"""A QUIC client's connection: messages as unidirectional streams, paced by FlowController.

    settings = QuicSettings(alpn=("solana-tpu",), unverified=True)
    connection = QuicConnection(settings, identity=Identity(seed), secret=os.urandom(16))
    connection.connect(now)                      # Opened when the handshake is done
    connection.send(now, transaction)            # a stream of its own, ended at once
    connection.session                           # for the next connection to this peer

QUIC itself is aioquic's (https://github.com/aiortc/aioquic), driven by times and datagrams.  qh3 was measured
beside it.  Its core is in Rust: a message of 1,232 bytes takes it 6 µs where aioquic takes 50, a handshake
0.8 ms and not 1.7.  But its congestion control cannot be replaced, and here
:class:`~userspace.flow.controller.FlowController` decides about window and pacing.

**What it keeps up.**  Every ``keep_alive`` seconds of silence it asks the peer for a sign of life, whatever
is on its way.  So a path that was gone for less than ``idle_timeout`` is used again within that time after it
is back, without a handshake.  ``on_path_change`` asks at once, by another connection ID, with a new
FlowController (RFC 9000, 9.4 and 9.5).  What ICMP says of an open connection anybody may have written: the
peer is asked, and has refused if it is silent for :data:`PATIENCE` round trips.

**Who the peer is.**  ``peer_key``: only who has this Ed25519 key; or ``settings.authorities``, as in the web;
or ``settings.unverified``.  One of them has to be said.  ``connection.peer_key`` is the key that the peer has
shown.  With an ``identity`` a server that asks is shown its certificate.

**Sessions.**  A connection that is given the ``session`` of an earlier one resumes it, without certificates.
With ``settings.early_data`` it sends before the handshake what was given to ``send`` by then; a server that
does not take it gets it after the handshake.

Whatever the library raises ends the connection, with the words of the error in Closed, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from errno import ECONNREFUSED
from typing import ClassVar, Final, ParamSpec, TypeVar

from userspace.connection.heartbeat import NUMBER_MAXIMUM, Heartbeats, HostReply, Pong, is_heartbeat
from userspace.connection.identity import KEY_SIZE, Identity
from userspace.connection.quic_library import AlertDescription, QuicErrorCode, SessionTicket, events
from userspace.connection.quic_session import (
    Engine,
    QuicSession,
    QuicSettings,
    QuicSnapshot,
    make_flow,
    open_engine,
)
from userspace.connection.quic_streams import Incoming, Outgoing, TooLargeError
from userspace.connection.transport import LIVE, NEVER, Base, Ending, Opened, Phase, checked_payload
from userspace.flow.controller import FlowController
from userspace.flow.sent import check_whole
from xdp.errors import SluiceError, UsageError

P = ParamSpec("P")
T = TypeVar("T")

#: Pings, and probes of the host, that wait: at ten a second those of the last six seconds.
PINGS: Final = 64
#: Round trips, and the least seconds, that a peer is given to contradict what ICMP says of it.  Three are
#: what RFC 9000 (10.2) gives packets to arrive; a tenth of a second is more than a host takes to answer.
PATIENCE: Final = 3
PATIENCE_MINIMUM: Final = 0.1
#: An error code of an application (RFC 9000, 16: a variable-length integer).
CODE_MAXIMUM: Final = (1 << 62) - 1
#: Seconds that the library is told more than it is: it rounds times in another way when it sets a timer than
#: when it looks at it, and at the very time it may find that nothing is due.
_LATE: Final = 1e-6
#: The number of the pings that keep the connection alive.
_KEEP_ALIVE: Final = -1
_BAD_CERTIFICATE: Final = QuicErrorCode.CRYPTO_ERROR + AlertDescription.bad_certificate


class QuicConnection(Base):
    """One QUIC peer; see :class:`~userspace.connection.transport.Transport`.

    ``secret`` is of the probes of the peer's host (:mod:`~userspace.connection.heartbeat`), ``seed`` of what
    the congestion controller draws.  Raises UsageError for values out of range, and when nothing says who the
    peer has to be; ``connect`` raises UnsupportedError with an aioquic that is not understood.
    """

    __slots__ = (
        "_deadline", "_doubt_until", "_engine", "_flow", "_identity", "_incoming", "_kept_alive_at",
        "_outgoing", "_peer_key", "_pings", "_probes", "_seed", "_send_at", "_session", "_settings",
        "_ticket", "keep_alives", "path_changes", "peer_key", "resumed",
    )  # fmt: skip

    kind: ClassVar[str] = "QuicConnection"

    def __init__(
        self,
        settings: QuicSettings,
        *,
        secret: bytes,
        identity: Identity | None = None,
        peer_key: bytes | None = None,
        session: QuicSession | None = None,
        seed: int = 0,
    ) -> None:
        if peer_key is not None and not (type(peer_key) is bytes and len(peer_key) == KEY_SIZE):
            raise UsageError(f"a peer's key is {KEY_SIZE} bytes, not {peer_key!r}")
        if peer_key is None and settings.authorities is None and not settings.unverified:
            raise UsageError(
                "nothing says who the peer has to be", hint="give peer_key, authorities, or unverified=True"
            )
        super().__init__(Heartbeats(secret=secret))
        self._settings, self._identity, self._seed = settings, identity, seed
        if session is not None and (
            (peer_key is not None and session.peer_key != peer_key)
            or (settings.authorities is not None and not session.verified)
        ):
            session = None  # it proves less than is asked for
        self._session = session
        self._peer_key = peer_key
        #: The Ed25519 key that the peer has shown, in this connection or in the one that it resumes.
        self.peer_key: bytes | None = None
        self.resumed = False
        self._engine: Engine | None = None  # while there is a peer to speak to
        self._flow: FlowController | None = None
        self._ticket: SessionTicket | None = None
        self._outgoing = Outgoing(queue=settings.queue, streams=settings.streams)
        self._incoming = Incoming(largest=settings.largest)
        self._probes: list[bytes] = []
        self._pings: dict[int, float] = {}  # when they were sent
        self._deadline = self._send_at = self._doubt_until = NEVER
        self._kept_alive_at = -NEVER
        self.keep_alives = self.path_changes = 0

    def connect(self, now: float) -> None:
        """Begin the handshake.  UsageError when that was done before."""
        now = self._begin(now)
        settings = self._settings
        self._flow = make_flow(now, settings, self._seed)
        self._engine = engine = open_engine(
            settings, self._flow, identity=self._identity, session=self._session, on_ticket=self._on_ticket
        )
        if self._session is not None:
            self.peer_key = self._session.peer_key
        self._deadline = now + settings.connect_timeout
        self._send_at = now
        self._guarded(engine.connect, now + _LATE)

    def _on_ticket(self, ticket: SessionTicket) -> None:
        self._ticket = ticket

    def _guarded(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
        """Call the library; None, and the end of the connection, when it raises something."""
        try:
            return call(*args, **kwargs)
        except Exception as error:  # noqa: BLE001 -- datagrams come from anybody, errors are told in Closed
            self._abandon()
            self._end(Ending.LOCAL_ERROR, 0, f"{type(error).__name__}: {error}")
            return None

    # --- in

    def receive(self, now: float, data: bytes) -> None:
        """A datagram came from the peer's address; whatever it holds."""
        now = self._received(now, data)
        engine = self._engine
        if engine is None or self.phase not in LIVE:
            self.ignored += 1
            return
        if is_heartbeat(data):
            answer = self.heartbeats.receive(now, data)
            if isinstance(answer, HostReply):
                self._tell(answer)
            else:
                self.ignored += 1
            return
        if self._guarded(engine.receive, now + _LATE, data):
            self._hear(now)
            self._doubt_until = NEVER
        else:
            self.ignored += 1
            if engine.is_reset(data):
                self._abandon()
                self._end(Ending.PEER_RESET)
        self._proceed(now)

    def _proceed(self, now: float) -> None:
        """Take what the library has found out."""
        engine = self._engine
        if engine is None:
            return
        engine.congestion.tell(now + _LATE)
        self._send_at = now
        while self.phase in LIVE and (event := engine.library.next_event()) is not None:
            self._on_event(now, engine, event)
        closing = engine.closing
        if closing is not None and self.phase in LIVE:
            self._on_close(closing, ours=engine.close_is_ours)

    def _on_event(self, now: float, engine: Engine, event: events.QuicEvent) -> None:
        if isinstance(event, events.StreamDataReceived):
            try:
                payload = self._incoming.add(event.stream_id, event.data, end=event.end_stream)
            except TooLargeError:
                limit = self._settings.largest
                self._refuse(engine, Ending.PROTOCOL, f"a message of more than {limit} bytes")
            else:
                if payload:
                    self._give(payload)
        elif isinstance(event, events.PingAcknowledged):
            sent_at = self._pings.pop(event.uid, None)
            if sent_at is not None:
                self._tell(Pong(event.uid, sent_at, now))
        elif isinstance(event, events.HandshakeCompleted):
            self._on_handshake(engine, event)
        elif isinstance(event, events.StreamReset):
            self._incoming.drop(event.stream_id)
        elif isinstance(event, events.ConnectionTerminated):  # the peer speaks another version
            self._abandon()
            self._end(Ending.PROTOCOL, int(event.error_code), event.reason_phrase)

    def _on_handshake(self, engine: Engine, event: events.HandshakeCompleted) -> None:
        self.resumed = event.session_resumed
        if not event.session_resumed:
            self.peer_key = engine.peer_key()
        if self._peer_key is not None and self.peer_key != self._peer_key:
            self._refuse(engine, Ending.IDENTITY, "the peer has another key")
        else:
            engine.slim()
            self.phase = Phase.OPEN
            self._deadline = NEVER
            self._tell(Opened(event.session_resumed, event.early_data_accepted))

    # --- out

    def send(self, now: float, payload: bytes) -> bool:
        """Send a message as a stream of its own; False when it is not open, or too many wait.

        While it is opening it is taken only as early data.  UsageError for what is no message.
        """
        now = self._clock(now)
        payload = checked_payload(payload, self._settings.largest)
        if self.phase is not Phase.OPEN and not self._may_send_early():
            self._outgoing.refused += 1
            return False
        self._send_at = now
        return self._outgoing.put(payload)

    def _may_send_early(self) -> bool:
        """Whether a ticket says what the peer allowed, and so that there are keys."""
        engine = self._engine
        opening = self.phase is Phase.OPENING and self._settings.early_data
        return opening and engine is not None and engine.credit()[0] > 0

    def ping(self, now: float, sequence: int) -> bool:
        """Ask for an acknowledgement; the number is the caller's, 0 to 2**64 - 1, and not on its way."""
        now = self._clock(now)
        check_whole("sequence", sequence, 0, NUMBER_MAXIMUM)
        if sequence in self._pings:
            raise UsageError(f"{sequence} is on its way already", hint="each ping has a number of its own")
        if self.phase is not Phase.OPEN or self._engine is None:
            return False
        if len(self._pings) >= PINGS:
            del self._pings[next(iter(self._pings))]
        self._pings[sequence] = now
        self._engine.library.send_ping(sequence)
        self._send_at = now
        return True

    def probe(self, now: float, sequence: int) -> bool:
        """Ask the kernel program of the peer's host; the number as for :meth:`ping`."""
        now = self._clock(now)
        if self.phase not in LIVE or len(self._probes) >= PINGS:
            return False
        self._probes.append(self.heartbeats.probe(now, sequence))
        self._send_at = now
        return True

    def take_datagrams(self, now: float) -> Sequence[bytes]:
        """What is to be sent to the peer now."""
        now = self._clock(now)
        taken, self._probes = self._probes, []
        engine, outgoing = self._engine, self._outgoing
        if engine is not None:
            late = now + _LATE
            congestion = engine.congestion
            congestion.settle(late)
            if outgoing and self.phase in LIVE:
                outgoing.feed(late, engine)
            congestion.app_limited = not outgoing
            taken += [one for one, _ in self._guarded(engine.library.datagrams_to_send, late) or ()]
            congestion.allowance = 0
            self._send_at = outgoing.next_send(late, engine)
            if self.phase is Phase.CLOSED:
                self._engine = None  # that was its last word
        return self._sent(taken)

    # --- the end

    def close(self, now: float, code: int = 0, reason: str = "") -> None:
        """End it, with an error code of the application's; the next datagrams tell the peer."""
        self._clock(now)
        check_whole("code", code, 0, CODE_MAXIMUM)
        if self._engine is not None and self.phase in LIVE:
            self._engine.library.close(error_code=code, reason_phrase=reason)
            self._forget()
        self._end(Ending.ASKED, code, reason)

    def _refuse(self, engine: Engine, ending: Ending, reason: str) -> None:
        """The peer is told that it will not do."""
        code = _BAD_CERTIFICATE if ending is Ending.IDENTITY else int(QuicErrorCode.APPLICATION_ERROR)
        engine.library.close(error_code=code, frame_type=0, reason_phrase=reason)
        self._forget()
        self._end(ending, code, reason)

    def _on_close(self, closing: events.ConnectionTerminated, *, ours: bool) -> None:
        """The library ends it: what the peer did was wrong, the peer has said so, or there was silence."""
        code, reason = int(closing.error_code), closing.reason_phrase
        if ours:
            self._forget()
            self._end(Ending.PROTOCOL, code, reason)
            return
        ending = Ending.PEER_CLOSED
        if closing.frame_type is not None and code == QuicErrorCode.CONNECTION_REFUSED:
            ending = Ending.REFUSED
        self._abandon()
        self._end(ending, code, reason)

    def _forget(self) -> None:
        """What will not be sent any more, nor come."""
        self._outgoing.clear()
        self._incoming.clear()
        self._pings.clear()
        self._probes = []

    def _abandon(self) -> None:
        self._forget()
        self._engine = None

    def on_error(self, now: float, errno: int) -> None:
        """What ICMP says ends it while it is opening; an open one is asked whether it is true."""
        now = self._clock(now)
        if self.phase is not Phase.OPEN:
            super().on_error(now, errno)
        elif errno == ECONNREFUSED and self._doubt_until == NEVER and self._engine is not None:
            self._doubt_until = now + max(PATIENCE_MINIMUM, PATIENCE * self._engine.flow.smoothed_rtt)
            self._ask_for_life(now, self._engine)

    # --- time

    def on_path_change(self, now: float) -> None:
        """Ask for a sign of life by the new path, at once; what is known of the old one says nothing of it.

        A server may forbid it (RFC 9000, 18.2: disable_active_migration), and is silent then.
        """
        now = self._clock(now)
        engine = self._engine
        if self.phase is Phase.OPEN and engine is not None:
            self.path_changes += 1
            self._flow = make_flow(now, self._settings, self._seed)
            engine.congestion.restart(self._flow)
            engine.library.change_connection_id()
            self._ask_for_life(now, engine)

    def _ask_for_life(self, now: float, engine: Engine) -> None:
        self._kept_alive_at = now
        self.keep_alives += 1
        engine.congestion.allowance = self._settings.mtu
        engine.library.send_ping(_KEEP_ALIVE)
        self._send_at = now

    def _keep_alive_at(self) -> float:
        interval = self._settings.keep_alive
        if interval is None or self.phase is not Phase.OPEN:
            return NEVER
        return max(self.heard_at, self._kept_alive_at) + interval

    def next_timeout(self) -> float:
        """When to call :meth:`on_timeout`, and to take datagrams after that."""
        engine = self._engine
        if engine is None or self.phase not in LIVE:
            return NEVER
        timer = engine.library.get_timer()
        mine = min(self._deadline, self._send_at, self._doubt_until, self._keep_alive_at())
        return mine if timer is None or timer > mine else timer

    def on_timeout(self, now: float) -> None:
        """Find what is lost, ask for a sign of life, or give up."""
        now = self._clock(now)
        engine = self._engine
        if engine is None or self.phase not in LIVE:
            return
        timer = engine.library.get_timer()
        if now >= self._deadline:
            self._abandon()
            self._end(Ending.TIMED_OUT)
        elif now >= self._doubt_until:
            self._abandon()
            self._end(Ending.REFUSED, ECONNREFUSED)
        elif timer is not None and now >= timer:
            self._guarded(engine.library.handle_timer, now + _LATE)
            engine.congestion.on_timer(now + _LATE)
            if engine.closing is not None:
                # Neither side has said anything, or it would have been noticed before: it was idle.
                self._abandon()
                self._end(Ending.LOST if self.phase is Phase.OPEN else Ending.TIMED_OUT)
            self._proceed(now)
        if now >= self._keep_alive_at():
            self._ask_for_life(now, engine)

    # --- looking at it

    @property
    def session(self) -> QuicSession | None:
        """What the next connection to this peer may resume with; None before the peer has given a ticket."""
        if self._ticket is None or self._flow is None:
            return self._session if self.resumed else None  # the peer took it, and may do so again
        verified = self._settings.authorities is not None
        return QuicSession(self._ticket, self.peer_key, self._flow.smoothed_rtt, verified)

    @property
    def flow(self) -> FlowController:
        """Window, pacing, loss and round-trip time.  SluiceError before connect."""
        if self._flow is None:
            raise SluiceError("it has not begun to connect")
        return self._flow

    def snapshot(self) -> QuicSnapshot:
        """All of it, but for ``flow.snapshot()``."""
        outgoing = self._outgoing
        return QuicSnapshot(
            phase=self.phase.name.lower(),
            heard_at=self.heard_at if self.heard_at > -NEVER else None,
            peer_key=None if self.peer_key is None else self.peer_key.hex(),
            resumed=self.resumed,
            datagrams_sent=self.datagrams_sent,
            bytes_sent=self.bytes_sent,
            datagrams_received=self.datagrams_received,
            bytes_received=self.bytes_received,
            ignored=self.ignored,
            accepted=outgoing.accepted,
            queued=len(outgoing),
            messages_sent=outgoing.sent,
            abandoned=outgoing.abandoned,
            refused=outgoing.refused,
            streams_open=0 if self._engine is None else self._engine.streams,
            messages_received=self.messages_received,
            messages_lost=self.messages_lost,
            keep_alives=self.keep_alives,
            path_changes=self.path_changes,
        )
