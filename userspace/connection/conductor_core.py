# SPDX-License-Identifier: Apache-2.0
"""How pool, health, reconnection and transports follow from each other: the inside of a conductor.

Whatever happens to a connection goes through one of these, each of which tells all four parts:

========  =================================================================================
begin     an attempt: the pool has said Open, and the manager or the line has room
fail      an attempt is over in vain
open      the peer has answered
lose      a connection that was up is no more
close     the pool has said Close: it is gone for good
========  =================================================================================

What the parts want in turn is done by :meth:`ConductorCore.settle` at the end of each call, until nobody
wants anything any more.  Callbacks of the caller may call back in: a call from within is done, and what
follows from it comes after what is under way.

An endpoint that failed is tried by one connection, its *lead*, when the manager says so.  A first attempt at
an endpoint that is not known is one as well.  All others stand in a line of their own.
"""

from __future__ import annotations

import traceback
from collections.abc import Hashable
from typing import TYPE_CHECKING, Final

from userspace.connection.callbacks import ERROR_LENGTH, Callbacks
from userspace.connection.conductor_links import (
    Datagram,
    Link,
    Peer,
    Received,
    TransportFactory,
    cause_of,
)
from userspace.connection.conductor_settings import ConductorSettings
from userspace.connection.dialing import DialLine
from userspace.connection.grading import Status
from userspace.connection.health import ConnectionHealthMonitor
from userspace.connection.heartbeat import HostReply, Pong
from userspace.connection.pool import ConnectionPool
from userspace.connection.pool_settings import ENDPOINTS_MAXIMUM
from userspace.connection.reconnection import Phase, ReconnectionManager
from userspace.connection.slots import Close, Open
from userspace.connection.states import Cause, ConnectionState, Event, State
from userspace.connection.timers import LATEST, Timers, checked_now
from userspace.connection.transport import Closed, Heard, Message, Opened, Restarted, Transport
from xdp.errors import UsageError

if TYPE_CHECKING:
    from random import Random

#: Messages of all peers that wait for take_messages: a quarter of a second of a million a second; more are
#: lost, as in a socket's buffer.
MESSAGES_WAITING: Final = 262_144
#: Datagrams of connections that were closed, which wait for take_datagrams: one for each of as many as a pool
#: has on a large machine.
FAREWELLS_WAITING: Final = 65_536


class ConductorCore:
    """See the module; used through :class:`userspace.connection.conductor.Conductor`."""

    __slots__ = (
        "_closed_told", "_dirty", "_down", "_down_with", "_draining", "_factory", "_farewells", "_gave_up",
        "_given_up", "_messages", "_now", "_rules", "_settling", "_statuses", "_timers", "abandoned",
        "attempts", "datagrams_in", "datagrams_out", "ended", "factory_errors", "failed",
        "farewells_lost", "last_factory_error", "line", "links", "lost", "monitor", "opened", "peers",
        "pool", "received", "reconnection", "refused", "restarts", "sent", "stirred",
        "stray",
    )  # fmt: skip

    def __init__(
        self, now: float, *, transport: TransportFactory, rng: Random, settings: ConductorSettings
    ) -> None:
        self._now = checked_now(now, -LATEST)
        if not isinstance(settings, ConductorSettings):
            raise UsageError(f"settings are ConductorSettings, not {settings!r}")
        self._rules = settings
        self._factory = transport
        self.pool = ConnectionPool(now, settings.pool, rng=rng)
        self.monitor = ConnectionHealthMonitor(now, rng, settings.health)
        self.monitor.subscribe(self._on_status)
        self.reconnection = ReconnectionManager[Hashable](
            now,
            rng=rng,
            backoff=settings.backoff,
            rate=settings.attempt_rate,
            burst=settings.attempt_burst,
            proof_time=settings.proof_time,
            attempt_timeout=settings.attempt_timeout,
            limit=ENDPOINTS_MAXIMUM,
            on_give_up=self._on_give_up,
        )
        #: Attempts that wait for room.
        self.line = DialLine(now, rate=settings.attempt_rate, burst=settings.attempt_burst)
        self._timers = Timers[int]()  # of transports
        #: All connections by number, and endpoints by key, also such that were removed and have connections.
        self.links: dict[int, Link] = {}
        self.peers: dict[Hashable, Peer] = {}
        self._dirty: dict[int, Link] = {}  # whose datagrams are to be taken
        self._farewells: list[Datagram] = []
        self._messages: list[Received] = []
        self._statuses: list[tuple[int, Status]] = []
        self._given_up: list[Hashable] = []
        self._gave_up = Callbacks[Hashable, Cause]()
        self._closed_told = Callbacks[int]()
        self._settling = False
        self._draining = False
        #: Something may follow from what has happened.
        self.stirred = False
        #: The link of all connections is down.
        self._down = False
        #: Those of the connections of that time that are there yet; None: it was told of all, whoever comes.
        self._down_with: set[int] | None = None
        # Counters since the beginning.
        self.attempts = self.opened = self.abandoned = self.restarts = self.factory_errors = 0
        self.failed: dict[Cause, int] = {}
        self.ended: dict[Cause, int] = {}
        self.sent = self.refused = self.received = self.lost = 0
        self.datagrams_in = self.datagrams_out = self.stray = self.farewells_lost = 0
        self.last_factory_error = ""

    @property
    def callbacks(self) -> tuple[Callbacks[Hashable, Cause], Callbacks[int]]:
        """Those of the caller, but for the monitor's."""
        return self._gave_up, self._closed_told

    def _clock(self, now: float) -> float:
        self._now = now = checked_now(now, self._now)
        return now

    def _on_status(self, connection: int, old: Status, new: Status) -> None:  # noqa: ARG002 -- a callback's
        self.stirred = True
        self._statuses.append((connection, new))

    def _on_give_up(self, key: Hashable, cause: Cause) -> None:
        self._given_up.append(key)
        self._gave_up.post(key, cause)

    # --- what follows

    def settle(self, now: float) -> None:
        """Do what the parts want, until they want nothing."""
        if self._settling:
            return  # by whoever is doing it
        self._settling = True
        self.stirred = False
        try:
            while self._step(now):
                pass
        finally:
            self._settling = False
        self._gave_up.deliver()
        self._closed_told.deliver()

    def _step(self, now: float) -> bool:
        """Whether there was anything to do."""
        statuses, self._statuses = self._statuses, []
        for number, status in statuses:
            self._follow(now, number, status)
        given_up, self._given_up = self._given_up, []
        for key in given_up:
            self._give_up(now, key)
        actions = self.pool.take_actions()
        for action in actions:
            if type(action) is Open:
                self._open(now, action)
            else:
                assert type(action) is Close
                self._close(now, action)
        dialed = self._dial(now) if self.line else False
        return bool(statuses or given_up or actions or dialed)

    def _follow(self, now: float, number: int, status: Status) -> None:
        """The health of a connection has changed."""
        link = self.links.get(number)
        if link is None or not link.live:
            return
        if status is Status.DEAD:
            self._hang_up(now, link)
            self.lose(now, link, Cause.LINK_DOWN if link.peer.down else Cause.LOST)
        else:
            self.pool.on_health(now, number, status)

    def _give_up(self, now: float, key: Hashable) -> None:
        """None of an endpoint's connections is to be had soon: those that wait have failed as well."""
        peer = self.peers.get(key)
        why = self.reconnection.look(key)
        if peer is None or why is None or not why.given_up:
            return
        for link in peer.links:
            if link.state.state is State.DISCONNECTED and link.number not in self.line:
                link.state.apply(now, Event.GAVE_UP, why.cause)

    # --- an attempt

    def _open(self, now: float, action: Open) -> None:
        number, key, address = action
        link = self.links.get(number)
        if link is None:
            peer = self.peers.get(key)
            if peer is None:
                peer = self.peers[key] = Peer(key)
            link = self.links[number] = Link(number, peer, address, ConnectionState(now))
            peer.links = (*peer.links, link)
        link.address = address
        if self._is_let(link.peer):
            self._begin(now, link, lead=True)
        else:
            self.line.add(number)

    def _is_let(self, peer: Peer) -> bool:
        """Whether the manager lets this endpoint try, and nobody does so yet."""
        if peer.lead is not None:
            return False
        known = self.reconnection.look(peer.key)
        return known is not None and known.phase is Phase.TRYING

    def _dial(self, now: float) -> bool:
        """Begin as many attempts as there is room for; whether there were any."""
        dialed = False
        while (number := self.line.take(now)) is not None:
            dialed = True
            link = self.links[number]
            key = link.peer.key
            if self.reconnection.is_reconnecting(key) and link.peer.lead is None:
                # It failed while this one stood in line.  When it is tried again this one follows.
                self.pool.on_open_failed(now, number, Cause.LOCAL_ERROR)
                if self.reconnection.has_given_up(key) and link.state.state is State.DISCONNECTED:
                    link.state.apply(now, Event.GAVE_UP, Cause.LOCAL_ERROR)
                continue
            first = link.peer.lead is None and self.reconnection.look(key) is None and not link.peer.live
            self._begin(now, link, lead=first)
        return dialed

    def _begin(self, now: float, link: Link, *, lead: bool) -> None:
        peer, manager = link.peer, self.reconnection
        cause = Cause.RETRY if link.attempts else Cause.ASKED
        if lead:
            known = manager.look(peer.key)
            if known is not None and known.cause is Cause.LINK_UP:
                cause = Cause.LINK_UP
            manager.on_connecting(now, peer.key)
            peer.lead = link
        link.attempts += 1
        self.attempts += 1
        link.state.apply(now, Event.CONNECT, cause)
        transport: Transport | None = None
        try:
            transport = self._factory(now, link.number, peer.key, link.address)
            transport.connect(now)
        except Exception as error:  # noqa: BLE001 -- the caller's own: told, not raised
            self.factory_errors += 1
            told = "".join(traceback.format_exception_only(error))
            self.last_factory_error = " ".join(told.split())[:ERROR_LENGTH]
            self.fail(now, link, Cause.LOCAL_ERROR)
            return
        link.transport = transport
        self._dirty[link.number] = link
        self.take_events(now, link)

    def fail(self, now: float, link: Link, cause: Cause, *, told: bool = False) -> None:
        """An attempt was in vain; ``told``: the reconnection manager knows."""
        peer, manager = link.peer, self.reconnection
        self.stirred = True
        self._drop(link)
        self.failed[cause] = self.failed.get(cause, 0) + 1
        if peer.lead is link:
            peer.lead = None
            if not told:
                manager.on_failed(now, peer.key, cause)
        elif not told and self._wanted(peer):
            manager.schedule(now, peer.key, cause)
        gave_up = manager.has_given_up(peer.key)
        link.state.apply(now, Event.GAVE_UP if gave_up else Event.ATTEMPT_FAILED, cause)
        # What is not the peer's fault is not its address's either.
        ours = cause is Cause.LINK_UP or cause is Cause.LINK_DOWN
        self.pool.on_open_failed(now, link.number, Cause.LOCAL_ERROR if ours else cause)

    def _wanted(self, peer: Peer) -> bool:
        """Whether there are to be connections to it."""
        return self.peers.get(peer.key) is peer and peer.key in self.pool and not self._draining

    # --- a connection

    def _opened(self, now: float, link: Link) -> None:
        peer, number = link.peer, link.number
        self.stirred = True
        link.state.apply(now, Event.OPENED, Cause.OPENED)
        self.opened += 1
        peer.lead = None  # who leads now is one of many
        self.reconnection.on_connected(now, peer.key)
        peer.unproved = self.reconnection.look(peer.key) is not None
        self.monitor.add(now, number)
        if self._down and self._down_with is None:  # its last datagram was on its way here
            self.monitor.on_link(now, False, [number])
        self.pool.on_opened(now, number)

    def _heard(self, now: float, link: Link) -> None:
        self.monitor.on_heard(now, link.number)
        peer = link.peer
        if peer.unproved:
            self.reconnection.on_proved(now, peer.key)
            peer.unproved = self.reconnection.look(peer.key) is not None

    def lose(self, now: float, link: Link, cause: Cause) -> None:
        """It was up, and is no more."""
        peer = link.peer
        self.stirred = True
        self._drop(link)
        self.ended[cause] = self.ended.get(cause, 0) + 1
        self.monitor.remove(link.number)
        link.state.apply(now, Event.LOST, cause)
        if self._wanted(peer):
            self.reconnection.schedule(now, peer.key, cause)
            peer.unproved = False
            if self.reconnection.has_given_up(peer.key) and link.state.state is State.DISCONNECTED:
                link.state.apply(now, Event.GAVE_UP, cause)
        self.pool.on_lost(now, link.number, Cause.LOCAL_ERROR if cause is Cause.LINK_DOWN else cause)
        if cause is Cause.REFUSED:
            self._doubt(now, link)

    def _doubt(self, now: float, link: Link) -> None:
        """Nobody listens where it went: whoever goes there as well is to be asked, and not to be preferred.

        A host says so for few of them: Linux sends six errors, and then one a second.
        """
        for other in [*link.peer.links]:  # callbacks may end some
            if other.live and other.address == link.address:
                self.monitor.on_error(now, other.number, refused=True)

    def _close(self, now: float, action: Close) -> None:
        number, cause = action
        link = self.links.pop(number)
        peer = link.peer
        self.line.drop(number)
        if link.transport is not None:
            self._hang_up(now, link)
        self._drop(link)
        state = link.state
        if link.live:
            self.ended[cause] = self.ended.get(cause, 0) + 1
            self.monitor.remove(number)
        elif state.state is State.CONNECTING:
            self.abandoned += 1
        if state.state is not State.CLOSED:
            state.apply(now, Event.CLOSE, cause)
        peer.links = tuple(one for one in peer.links if one is not link)
        if peer.lead is link:
            peer.lead = None
            self.reconnection.cancel(peer.key)
        self._forget_link(now, link)
        if not peer.links and peer.key not in self.pool:
            self._forget(peer)
        self._closed_told.post(number)
        self.pool.on_closed(now, number)

    def _forget_link(self, now: float, link: Link) -> None:
        """If it was the last one that is known to use a link that is down, nobody will say that it is up."""
        peer, down_with = link.peer, self._down_with
        if peer.down and not peer.links:
            peer.down = False
            self.pool.on_endpoint(now, peer.key, up=True)
        if down_with is not None:
            down_with.discard(link.number)
            if not down_with:
                self._down, self._down_with = False, None

    def _forget(self, peer: Peer) -> None:
        if self.peers.get(peer.key) is peer:
            del self.peers[peer.key]

    # --- transports

    def _hang_up(self, now: float, link: Link) -> None:
        """End what carries a connection; what it has to say, and says at last, is kept until it is taken."""
        transport = link.transport
        assert transport is not None
        said = [*transport.take_datagrams(now)]
        transport.close(now)
        said += transport.take_datagrams(now)
        for payload in said:
            if len(self._farewells) >= FAREWELLS_WAITING:
                self.farewells_lost += 1
            else:
                self._farewells.append(Datagram(link.number, link.address, payload))

    def _drop(self, link: Link) -> None:
        link.transport = None
        self._timers.cancel(link.number)
        self._dirty.pop(link.number, None)

    def take_events(self, now: float, link: Link) -> None:
        """What has happened to a transport."""
        transport = link.transport
        if transport is None:
            return
        for event in transport.take_events():
            if link.transport is not transport:
                return  # one of these has ended it
            self._on_event(now, link, event)

    def _on_event(
        self, now: float, link: Link, event: Opened | Heard | Message | Pong | HostReply | Restarted | Closed
    ) -> None:
        kind = type(event)
        if kind is Heard:
            if link.live:
                self._heard(now, link)
        elif isinstance(event, Message):
            link.received += 1
            self._receive_message(link, event.payload)
        elif isinstance(event, Pong):
            first = link.live and self.monitor.on_pong(now, link.number, event.sequence, event.sent_at)
            if first and link.live:  # a callback may have ended it
                latency = self.monitor.peak_latency(now, link.number)
                if latency:  # none while our own loop stalls
                    self.pool.on_latency(now, link.number, latency)
        elif isinstance(event, HostReply):
            if link.live:
                self.monitor.on_host_reply(now, link.number, event.sequence)
        elif isinstance(event, Opened):
            if link.state.state is State.CONNECTING:
                self._opened(now, link)
        elif isinstance(event, Restarted):
            link.restarts += 1
            self.restarts += 1
        elif isinstance(event, Closed):
            cause = cause_of(event, down=self._down or link.peer.down)
            if link.live:
                self.lose(now, link, cause)
            else:
                self.fail(now, link, cause)

    def _receive_message(self, link: Link, payload: bytes) -> None:
        if len(self._messages) >= MESSAGES_WAITING:
            self.lost += 1
            return
        self.received += 1
        self._messages.append(Received(link.number, link.peer.key, payload))

    # --- time

    def run_transports(self, now: float) -> None:
        """Timers of transports whose time has come."""
        for number in self._timers.due(now):
            link = self.links[number]
            if link.transport is not None:
                link.transport.on_timeout(now)
                self._dirty[number] = link
                self.take_events(now, link)

    def run_attempts(self, now: float) -> None:
        """Attempts that took too long, and those that may begin."""
        for key in self.reconnection.on_timeout(now):
            self._end_attempt(now, key, Cause.TIMED_OUT)
        self.begin_due(now)

    def _end_attempt(self, now: float, key: Hashable, cause: Cause) -> None:
        """The manager has said that the attempt of an endpoint's lead is over."""
        peer = self.peers.get(key)
        if peer is not None and (link := peer.lead) is not None:
            if link.transport is not None:
                self._hang_up(now, link)
            self.fail(now, link, cause, told=True)

    def begin_due(self, now: float) -> None:
        """Let those endpoints try whose turn it is."""
        for key in self.reconnection.take_due(now):
            self.pool.may_open(now, key)
            self.settle(now)
            peer = self.peers.get(key)
            if peer is None or self._is_let(peer):
                self.reconnection.cancel(key)  # nobody wants it

    def run_probes(self, now: float) -> None:
        """Ask those whose silence is too long."""
        monitor = self.monitor
        for number, sequence, kernel in monitor.take_probes(now):
            link = self.links.get(number)
            if link is None or link.transport is None:
                continue
            self._dirty[number] = link
            if not link.transport.ping(now, sequence):
                monitor.on_unsent(now, number, sequence)
            if kernel:
                link.transport.probe(now, sequence)
