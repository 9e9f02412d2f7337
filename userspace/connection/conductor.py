# SPDX-License-Identifier: Apache-2.0
"""Conductor: pool, health, reconnection and transports, tied together without I/O.

    def transport(now, connection, endpoint, address):
        return UdpConnection(secret=secret, boot=boot)

    conductor = Conductor(now, transport=transport, rng=random.Random(seed))
    conductor.add_endpoint(now, "a", addresses=[("192.0.2.7", 8009)])
    conductor.warm_pool(now)
    while True:
        for one in conductor.take_datagrams(now): ...      # send one.payload to one.address
        for one in conductor.take_messages(): ...          # one.payload came from one.endpoint
        for ticket in conductor.take_grants(): ...         # who waited for a connection
        ...                                                # wait until next_timeout(), or for a datagram:
        conductor.receive(now, connection, payload)        # what came for it, before
        conductor.on_timeout(now)                          # what is due
    connection = conductor.lookup(now, "a")                # to share, or None
    conductor.send(now, connection, b"...")

After any call datagrams, messages and grants are to be taken, and ``next_timeout`` asked again.

**What it does by itself.**  A connection that the pool wants is opened by a new transport, and watched from
then on: heartbeats where there is no traffic, and no verdict while our own loop stalls or our link is down.
What is dead, ended by its peer or refused is lost: its lease is void, callers get others at once, and the
endpoint is tried again by one connection, after delays that grow.  When that one succeeds the others follow.
A connection keeps its number through all of this.  Round-trip times and health decide who is chosen.

**What it promises.**  Attempts keep within ``attempt_rate``, those at endpoints that failed and all others
each, also when a partition ends.  Counts add up (:class:`ConductorSnapshot`), every connection has a state
and a history (:mod:`~userspace.connection.states`).  Nothing that the network says raises.  What a factory
or a callback raises is counted and told; a factory that cannot (descriptors ran out, say) is asked again
later.  Nothing is kept of what is gone.

Times are seconds of any monotonic clock; one that goes backwards is taken as the latest; what is no time
raises UsageError, in every method.  The same seed and calls do the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable
from errno import ECONNREFUSED, EHOSTDOWN, EHOSTUNREACH, ENETDOWN, ENETUNREACH
from typing import TYPE_CHECKING, Final

from userspace.connection.conductor_core import ConductorCore
from userspace.connection.conductor_links import Datagram, Link, Peer, Received, TransportFactory
from userspace.connection.conductor_report import conductor_snapshot, connection_info
from userspace.connection.conductor_settings import ConductorSettings, ConductorSnapshot, ConnectionInfo
from userspace.connection.slots import Lease
from userspace.connection.states import Cause, ConnectionState, Event, State
from userspace.connection.transport import Transport
from userspace.connection.waiters import Ticket
from xdp.errors import UsageError

if TYPE_CHECKING:
    from random import Random

__all__ = ["Conductor", "ConductorSettings", "Datagram", "Received", "TransportFactory"]

DEFAULTS: Final = ConductorSettings()
#: Errors of a socket that say that a peer is not there, or that there is no way to it.
_ABSENT: Final = frozenset({ECONNREFUSED, EHOSTDOWN, EHOSTUNREACH, ENETDOWN, ENETUNREACH})

_NEVER: Final = math.inf


class Conductor(ConductorCore):
    """See the module.  ``pool``, ``monitor`` and ``reconnection`` are for looking at, and for subscribing.

    transport     makes the transport of a connection for each attempt
    rng           where all that is left to chance comes from
    on_give_up    called with key and cause when all attempts at an endpoint were in vain; it is still tried
    on_closed     called with the number of each connection that is gone for good

    Callbacks are called last, and may call back in.  Keys of ``reconnection`` are those of endpoints.  Raises
    UsageError for values out of range.
    """

    __slots__ = ()

    def __init__(
        self,
        now: float,
        *,
        transport: TransportFactory,
        rng: Random,
        settings: ConductorSettings = DEFAULTS,
        on_give_up: Callable[[Hashable, Cause], object] | None = None,
        on_closed: Callable[[int], object] | None = None,
    ) -> None:
        super().__init__(now, transport=transport, rng=rng, settings=settings)
        if on_give_up is not None:
            self._gave_up.subscribe(on_give_up)
        if on_closed is not None:
            self._closed_told.subscribe(on_closed)

    @property
    def settings(self) -> ConductorSettings:
        """As given."""
        return self._rules

    # --- endpoints

    def add_endpoint(
        self, now: float, key: Hashable, *, weight: int = 1, addresses: Iterable[Hashable] = ()
    ) -> None:
        """Somebody to connect to, or what is known of him has changed: see ConnectionPool.add_endpoint."""
        now = self._clock(now)
        self.pool.add_endpoint(now, key, weight=weight, addresses=addresses)
        if key not in self.peers:
            self.peers[key] = Peer(key)
        self.settle(now)

    def remove_endpoint(self, now: float, key: Hashable) -> None:
        """Connect to it no more; what is borrowed is closed when it comes back.  UsageError if not there."""
        now = self._clock(now)
        self.pool.remove_endpoint(now, key)
        self.reconnection.cancel(key)
        self.settle(now)
        peer = self.peers.get(key)
        if peer is None:
            return
        self._drain_links(now, peer.links, Cause.REMOVED)
        if not peer.links:
            self._forget(peer)

    @staticmethod
    def _drain_links(now: float, links: Iterable[Link], cause: Cause) -> None:
        for link in links:
            if link.state.state is State.CONNECTED:
                link.state.apply(now, Event.DRAIN, cause)

    # --- connections

    def lookup(self, now: float, endpoint: Hashable) -> int | None:
        """A live connection to share; None: one is being opened.  See ConnectionPool.lookup."""
        connection = self.pool.lookup(now, endpoint)
        if connection is None:
            self.settle(self._clock(now))
        return connection

    def acquire(
        self,
        now: float,
        *,
        endpoint: Hashable = None,
        sticky: Hashable = None,
        deadline: float = _NEVER,
        who: object = None,
    ) -> Lease | Ticket:
        """Borrow a connection, or a place in line for one; see ConnectionPool.acquire."""
        got = self.pool.acquire(now, endpoint=endpoint, sticky=sticky, deadline=deadline, who=who)
        if type(got) is Ticket:
            self.settle(self._clock(now))
        return got

    def release(self, now: float, lease: Lease, *, broken: bool = False) -> None:
        """Give a connection back; see ConnectionPool.release."""
        self.pool.release(now, lease, broken=broken)
        self.settle(self._clock(now))

    def cancel(self, now: float, ticket: Ticket) -> None:
        """Nobody wants what this ticket stands for, whatever has become of it."""
        now = self._clock(now)
        self.pool.cancel(now, ticket)
        self.settle(now)

    def take_grants(self) -> list[Ticket]:
        """The tickets that were served or have failed since the last call."""
        return self.pool.take_grants()

    def warm_pool(self, now: float) -> int:
        """Open what is missing to the minimum, from now on; how many are begun now."""
        now = self._clock(now)
        count = self.pool.warm_pool(now)
        self.settle(now)
        return count

    def cleanup_idle_connections(self, now: float) -> int:
        """Close what was idle for too long, is too old or dead; how many."""
        now = self._clock(now)
        count = self.pool.cleanup_idle_connections(now)
        self.settle(now)
        return count

    def drain(self, now: float) -> None:
        """Lend nothing any more; close what is idle, and what is borrowed when it comes back."""
        now = self._clock(now)
        self._drain()
        self.pool.drain(now)
        self.settle(now)
        self._drain_links(now, self.links.values(), Cause.SHUTDOWN)

    def shutdown(self, now: float, deadline: float) -> None:
        """Drain, and at ``deadline`` (a time) take away what is still borrowed."""
        now = self._clock(now)
        self.pool.shutdown(now, deadline)
        self._drain()
        self.settle(now)
        self._drain_links(now, self.links.values(), Cause.SHUTDOWN)

    def _drain(self) -> None:
        if not self._draining:
            self._draining = True
            for key in self.peers:
                self.reconnection.cancel(key)

    @property
    def closed(self) -> bool:
        """Whether it was drained, nothing is left, and the last datagrams were taken."""
        return self.pool.closed and not self._farewells

    # --- the network

    def send(self, now: float, connection: int, payload: bytes) -> bool:
        """Send a message; False when it was not taken: no such connection, not open, too many wait.

        UsageError for what cannot be sent by the transport.
        """
        now = self._clock(now)
        link = self.links.get(connection)
        transport = None if link is None else link.transport
        if link is None or transport is None or not transport.send(now, payload):
            self.refused += 1
            return False
        link.sent += 1
        self.sent += 1
        self._dirty[connection] = link
        return True

    def receive(self, now: float, connection: int, data: bytes) -> None:
        """A datagram came from the connection's peer; of a connection that is gone it is only counted."""
        now = self._clock(now)
        link = self.links.get(connection)
        if link is None or link.transport is None:
            self.stray += 1
            return
        self.datagrams_in += 1
        self._dirty[connection] = link
        link.transport.receive(now, data)
        self.take_events(now, link)
        if self.stirred:
            self.settle(now)

    def on_error(self, now: float, connection: int, errno: int) -> None:
        """The socket reported an error for the connection's peer (ICMP).

        That there is no way, while our own link is down, is what the kernel says of every peer: no live
        connection ends for it.
        """
        now = self._clock(now)
        link = self.links.get(connection)
        if link is None or link.transport is None:
            self.stray += 1
            return
        if link.live and errno != ECONNREFUSED and errno in _ABSENT and (self._down or link.peer.down):
            return
        self._dirty[connection] = link
        link.transport.on_error(now, errno)
        self.take_events(now, link)
        if link.live and errno in _ABSENT:
            self.monitor.on_error(now, connection, refused=errno == ECONNREFUSED)
        self.settle(now)

    def on_link(self, now: float, up: bool, connections: Iterable[int] | None = None) -> None:
        """Carrier, address or route went away or came back, for some connections or (None) for all.

        Down: silence of peers proves nothing, and attempts that fail are not theirs.  Endpoints whose
        connections all use a link that is down are passed over while others are there.  Up: who waits
        tries at once, and transports use the new path.  Say so also when only an address or route changed.
        What was told of some connections is over when they are gone.
        """
        now = self._clock(now)
        links = [*self.links.values()]
        if connections is not None:
            numbers = set(connections)
            links = [link for link in links if link.number in numbers]
            if not links:
                return
        everybody = len(links) == len(self.links)
        if up and self._down_with is not None and any(link.number in self._down_with for link in links):
            links, everybody = [*self.links.values()], True  # they went down together
        self.monitor.on_link(now, up, None if everybody else [link.number for link in links if link.live])
        if up:
            self._link_up(now, links, everybody=everybody)
        elif everybody:
            self._down = True
            self._down_with = None if connections is None else {link.number for link in links}
        else:
            self._link_down(now, links)
        self.settle(now)

    def _link_down(self, now: float, links: list[Link]) -> None:
        numbers = {link.number for link in links}
        for peer in {link.peer: None for link in links}:
            if all(link.number in numbers for link in peer.links):
                peer.down = True
                self.pool.on_endpoint(now, peer.key, up=False)

    def _link_up(self, now: float, links: list[Link], *, everybody: bool) -> None:
        peers = list(self.peers.values() if everybody else {link.peer: None for link in links})
        if everybody:
            self._down = False
            self._down_with = None
        for peer in peers:
            if peer.down:
                peer.down = False
                self.pool.on_endpoint(now, peer.key, up=True)
        for link in links:
            if link.transport is not None:
                self._dirty[link.number] = link
                link.transport.on_path_change(now)
                self.take_events(now, link)
        keys = None if everybody else [peer.key for peer in peers]
        for key in self.reconnection.on_link_up(now, keys):
            self._end_attempt(now, key, Cause.LINK_UP)
        self.begin_due(now)

    # --- time

    def on_tick(self, now: float, due: float) -> None:
        """The caller's loop ran, and meant to at ``due`` at the latest: late is a stall of ours."""
        self.monitor.on_tick(self._clock(now), due)

    def take_datagrams(self, now: float) -> list[Datagram]:
        """What is to be sent now, in order."""
        now = self._clock(now)
        datagrams, self._farewells = self._farewells, []
        while self._dirty:
            dirty, self._dirty = self._dirty, {}
            for number, link in dirty.items():
                transport = link.transport
                if transport is None:
                    continue
                for payload in transport.take_datagrams(now):
                    datagrams.append(Datagram(number, link.address, payload))
                self._timers.set(number, transport.next_timeout())
                self.take_events(now, link)
            if self.stirred:
                self.settle(now)
        self.datagrams_out += len(datagrams)
        return datagrams

    def take_messages(self) -> list[Received]:
        """What came since the last call, in order; more than MESSAGES_WAITING are lost, and counted."""
        messages, self._messages = self._messages, []
        return messages

    @property
    def messages_waiting(self) -> int:
        """How many wait for :meth:`take_messages`."""
        return len(self._messages)

    def next_timeout(self) -> float:
        """When to call :meth:`on_timeout` and take_datagrams; infinite: never."""
        if self._dirty or self._farewells or self.pool.closing_count:
            return self._now
        return min(
            self._timers.next(),
            self.monitor.next_timeout(),
            self.reconnection.next_timeout(),
            self.line.next_timeout(),
            self.pool.next_timeout(),
        )

    def on_timeout(self, now: float) -> None:
        """Do what is due.  After a stall, what has arrived meanwhile is to be received first."""
        now = self._clock(now)
        self.run_transports(now)
        self.pool.on_timeout(now)
        self.run_attempts(now)
        self.run_probes(now)
        self.settle(now)

    # --- looking at it

    @property
    def link_up(self) -> bool:
        """Whether the link of all connections is up, as far as on_link has said."""
        return not self._down

    def __len__(self) -> int:
        return len(self.links)

    def __contains__(self, connection: int) -> bool:
        return connection in self.links

    def _known(self, connection: int) -> Link:
        link = self.links.get(connection)
        if link is None:
            raise UsageError(f"there is no connection {connection!r}", hint="it may be gone")
        return link

    def state(self, connection: int) -> ConnectionState:
        """Of one connection, for reading.  UsageError when there is none with that number (any more)."""
        return self._known(connection).state

    def endpoint(self, connection: int) -> Hashable:
        """The key of a connection's endpoint.  UsageError as in :meth:`state`."""
        return self._known(connection).peer.key

    def address(self, connection: int) -> Hashable:
        """The address that it was opened to last.  UsageError as in :meth:`state`."""
        return self._known(connection).address

    def transport(self, connection: int) -> Transport | None:
        """What carries it now, for reading; None while it is not there and not being opened."""
        return self._known(connection).transport

    def connections(self, now: float, *, limit: int | None = None) -> list[ConnectionInfo]:
        """All connections, or the first ``limit``, for people and JSON."""
        now = self._clock(now)
        if limit is not None and (type(limit) is not int or limit < 0):
            raise UsageError(f"a limit is a whole number, 0 or more, not {limit!r}")
        return [connection_info(self, now, link) for link in list(self.links.values())[:limit]]

    def snapshot(self) -> ConductorSnapshot:
        """All counts.  Goes over all connections."""
        return conductor_snapshot(self)

    def __repr__(self) -> str:
        pool = self.pool
        state = " closed" if self.closed else " draining" if self._draining else ""
        return (
            f"<Conductor{state}: {len(self)} connections to {len(self.peers)} endpoints; "
            f"{pool.active_count} in use, {pool.idle_count} idle, {pool.opening_count} opening, "
            f"{pool.waiting_count} waiting{', link down' if self._down else ''}>"
        )
