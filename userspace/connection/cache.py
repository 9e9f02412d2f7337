# SPDX-License-Identifier: Apache-2.0
"""ConnectionCache: from an address to one of a few live connections to it, for thousands of sends a second.

    settings = CacheSettings(connections=2)
    conductor = Conductor(now, transport=transport, rng=rng, settings=settings.conductor())
    cache = ConnectionCache(now, conductor, settings)
    cache.warm(now, leaders)                     # soon to be asked for
    connection = cache.get(now, address)         # None: it is being opened
    if connection is not None:
        conductor.send(now, connection, transaction)
    cache.on_timeout(now)                        # at cache.next_timeout(), beside the conductor's

This is the pattern of the connection cache of Agave, a Solana validator: an address that is asked for the
first time is added, and its connections are opened behind the caller's back; as soon as one is live it is
given to everybody who asks, while the others follow.  Unlike there, what is given is alive as far as is
known, addresses that don't answer are asked after growing delays, and when there are too many the one that is
worth least has to go, not any.

What an address is worth is how often it was asked for of late (an hour ago counts nothing), times how well it
works.  What was asked for in the last :data:`GRACE` seconds is not thrown out: when more addresses are used
in turn than there are places, each would push out the next before it is connected.  ``get`` gives None then.

All endpoints of the conductor are the cache's; its callers may still borrow connections from it.  ``get`` of
a live connection costs two look-ups, whether there are ten addresses or thousands.  Seconds are those of the
conductor's clock; what is no time raises UsageError.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable
from typing import Final

import msgspec

from userspace.connection.conductor import Conductor
from userspace.connection.conductor_settings import ConductorSettings
from userspace.connection.grading import Status
from userspace.connection.outliers import check_count, check_number
from userspace.connection.pool_settings import TIME_MAXIMUM, TIME_MINIMUM
from userspace.connection.timers import LATEST, checked_now
from xdp.errors import UsageError

#: Addresses: whoever is added when there is no place has all others looked at, which is 5 ms then.
ADDRESSES_MAXIMUM: Final = 16_384
#: Connections to one address: more than a peer allows of one identity (Agave: 8).
CONNECTIONS_MAXIMUM: Final = 64
#: Seconds after it was asked for in which an address is not thrown out: a handshake with one packet lost.
GRACE: Final = 1.0
#: Seconds after which use counts half: some rounds of leaders, who have four slots of 0.4 s each.
HALF_LIFE: Final = 60.0
#: What use is worth by health; an address without a live connection, and one that was given up.
_WORTH: Final = {Status.HEALTHY: 1.0, Status.DEGRADED: 0.5, Status.UNHEALTHY: 0.1, Status.DEAD: 0.02}
_NOT_LIVE: Final = 0.02
_GIVEN_UP: Final = 0.0
_NEVER: Final = math.inf
#: Part of the idle time between two looks for what is idle.
_LOOK: Final = 0.25


class CacheSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Of a cache.  UsageError for values out of range."""

    #: Addresses at most, and connections to each of them.
    addresses: int = 1024
    connections: int = 2
    #: Seconds after which an address that nobody asks for is forgotten; None: never.
    idle_timeout: float | None = 300.0

    def __post_init__(self) -> None:
        check_count("addresses", self.addresses, 1, ADDRESSES_MAXIMUM)
        check_count("connections", self.connections, 1, CONNECTIONS_MAXIMUM)
        if self.idle_timeout is not None:
            check_number("idle_timeout", self.idle_timeout, TIME_MINIMUM, TIME_MAXIMUM, "seconds")

    def conductor(self, base: ConductorSettings | None = None) -> ConductorSettings:
        """Settings of a conductor for such a cache: sizes are the cache's, all else is from ``base``."""
        base = ConductorSettings() if base is None else base
        size = self.addresses * self.connections
        pool = msgspec.structs.replace(
            base.pool,
            min_size=0,
            max_size=size,
            min_per_endpoint=self.connections,
            max_per_endpoint=self.connections,
            idle_timeout=None,  # the cache forgets whole addresses
        )
        health = msgspec.structs.replace(base.health, max_connections=max(base.health.max_connections, size))
        return msgspec.structs.replace(base, pool=pool, health=health)


class CacheSnapshot(msgspec.Struct, frozen=True, kw_only=True):
    """Counts of a cache since it was made.  gets = hits + misses + full.

    added = addresses + evicted + expired + renewed + dropped.
    """

    addresses: int
    #: Asked for; of that, given a live connection, and given none because it is not there yet ..
    gets: int
    hits: int
    misses: int
    #: .. or because there was no place.
    full: int
    added: int
    #: Thrown out for another one; not asked for in time; when the identity changed; by name.
    evicted: int
    expired: int
    renewed: int
    dropped: int


class _Entry:
    __slots__ = ("looked_at", "used_at", "uses", "worth")

    def __init__(self, now: float) -> None:
        self.used_at = self.looked_at = now
        #: How often it was asked for since it was looked at, and what that was worth until then.
        self.uses = 0
        self.worth = 1.0


class ConnectionCache:
    """See the module.  Raises UsageError for a conductor that has endpoints, or others than its settings."""

    __slots__ = (
        "_added", "_dropped", "_entries", "_evicted", "_expired", "_full", "_hits", "_look_at", "_lookup",
        "_misses", "_now", "_renewed", "conductor", "settings",
    )  # fmt: skip

    def __init__(self, now: float, conductor: Conductor, settings: CacheSettings | None = None) -> None:
        self.settings = CacheSettings() if settings is None else settings
        pool = conductor.settings.pool
        per = self.settings.connections
        if (pool.min_per_endpoint, pool.max_per_endpoint) != (per, per) or conductor.peers:
            raise UsageError(
                "this conductor was not made for such a cache",
                hint="give it settings.conductor(), and leave its endpoints to the cache",
            )
        self.conductor = conductor
        self._lookup = conductor.pool.lookup  # what it finds needs nobody else
        self._now = checked_now(now, -LATEST)
        self._entries: dict[Hashable, _Entry] = {}
        self._added = self._evicted = self._expired = self._full = self._hits = self._misses = 0
        self._renewed = self._dropped = 0
        conductor.warm_pool(now)  # from now on what an address lacks is opened
        idle = self.settings.idle_timeout
        self._look_at = _NEVER if idle is None else self._now + idle * _LOOK

    # --- asking

    def get(self, now: float, address: Hashable) -> int | None:
        """A live connection to an address, to be used at once; None: it is not there yet, ask again.

        Raises PoolClosedError while the conductor is being closed, UsageError for what can be no address.
        """
        try:
            entry = self._entries[address]
        except (KeyError, TypeError):
            self._get_new(now, address)
            return None
        connection = self._lookup(now, address)
        entry.uses += 1
        entry.used_at = now
        if connection is None:
            self._misses += 1
            self.conductor.settle(self._clock(now))
        else:
            self._hits += 1
        return connection

    def _get_new(self, now: float, address: Hashable) -> None:
        now = self._clock(now)
        if self._add(now, _checked(address)):
            self._misses += 1
        else:
            self._full += 1

    def send(self, now: float, address: Hashable, payload: bytes) -> bool:
        """Send a message to an address; False when there is no live connection, or it did not take it."""
        connection = self.get(now, address)
        return connection is not None and self.conductor.send(now, connection, payload)

    def warm(self, now: float, addresses: Iterable[Hashable]) -> int:
        """Open connections to these, as far as there are places; how many have a live one already."""
        now = self._clock(now)
        live = 0
        for address in addresses:
            if _checked(address) not in self._entries:
                self._add(now, address)
            elif self.conductor.lookup(now, address) is not None:
                live += 1
        return live

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, address: Hashable) -> bool:
        return address in self._entries

    # --- coming and going

    def _clock(self, now: float) -> float:
        self._now = now = checked_now(now, self._now)
        return now

    def _add(self, now: float, address: Hashable) -> bool:
        """Whether there is a place for it."""
        if len(self._entries) >= self.settings.addresses and not self._evict(now):
            return False
        self.conductor.add_endpoint(now, address)
        self._entries[address] = _Entry(now)
        self._added += 1
        return True

    def _evict(self, now: float) -> bool:
        """Throw out the address that is worth least; False when all were asked for just now."""
        victim: Hashable = None
        least = (0.0, 0.0)
        for address, entry in self._entries.items():
            if now - entry.used_at < GRACE:
                continue
            worth = self._worth(now, address, entry), entry.used_at
            if victim is None or worth < least:
                victim, least = address, worth
        if victim is None:
            return False
        self._forget(now, victim)
        self._evicted += 1
        return True

    def _worth(self, now: float, address: Hashable, entry: _Entry) -> float:
        """Use, times health."""
        kept = entry.worth * math.exp2((entry.looked_at - now) / HALF_LIFE)
        entry.worth = kept + entry.uses * math.exp2((entry.used_at - now) / HALF_LIFE)
        entry.uses = 0
        entry.looked_at = now
        return entry.worth * self._health(address)

    def _health(self, address: Hashable) -> float:
        """Of the best connection."""
        conductor = self.conductor
        best = _NOT_LIVE
        for link in conductor.peers[address].links:
            if link.live:
                best = max(best, _WORTH[conductor.monitor.status(link.number)])
        if best == _NOT_LIVE and conductor.reconnection.has_given_up(address):
            return _GIVEN_UP
        return best

    def _forget(self, now: float, address: Hashable) -> None:
        del self._entries[address]
        self.conductor.remove_endpoint(now, address)

    def drop(self, now: float, address: Hashable) -> bool:
        """Forget an address, and close its connections; False when it is not there."""
        now = self._clock(now)
        if _checked(address) not in self._entries:
            return False
        self._forget(now, address)
        self._dropped += 1
        return True

    def renew(self, now: float) -> int:
        """Close everything: our own identity has changed, and no connection is to show the old one.

        Whoever asks again gets connections by new transports.  What is borrowed is closed when it comes back.
        How many addresses were forgotten.
        """
        now = self._clock(now)
        addresses = [*self._entries]
        for address in addresses:
            self._forget(now, address)
        self._renewed += len(addresses)
        return len(addresses)

    # --- time

    def next_timeout(self) -> float:
        """When to call :meth:`on_timeout`; the conductor has times of its own."""
        return self._look_at if self._entries else _NEVER

    def on_timeout(self, now: float) -> None:
        """Forget what nobody asked for; nothing happens when it is too early."""
        now = self._clock(now)
        idle = self.settings.idle_timeout
        if idle is None or now < self._look_at:
            return
        self._look_at = now + idle * _LOOK
        for address in [one for one, entry in self._entries.items() if now - entry.used_at >= idle]:
            self._forget(now, address)
            self._expired += 1

    # --- looking at it

    def snapshot(self) -> CacheSnapshot:
        """All counts."""
        return CacheSnapshot(
            addresses=len(self._entries),
            gets=self._hits + self._misses + self._full,
            hits=self._hits,
            misses=self._misses,
            full=self._full,
            added=self._added,
            evicted=self._evicted,
            expired=self._expired,
            renewed=self._renewed,
            dropped=self._dropped,
        )

    def __repr__(self) -> str:
        return (
            f"<ConnectionCache: {len(self)} of {self.settings.addresses} addresses, "
            f"{self.conductor.pool.idle_count} connections idle>"
        )


def _checked(address: Hashable) -> Hashable:
    """UsageError for what can be no address."""
    try:
        hash(address)
    except TypeError:
        raise UsageError(f"an address must be hashable, and {address!r} is not") from None
    if address is None:
        raise UsageError("None is no address")
    return address
