# SPDX-License-Identifier: Apache-2.0
"""ConnectionPool: connections to many endpoints, opened, lent, shared, replaced and closed in time.

    pool = ConnectionPool(now, PoolSettings(max_size=100), rng=random.Random(seed))
    pool.add_endpoint(now, "a", weight=stake, addresses=[("192.0.2.7", 8009), ("192.0.2.8", 8009)])
    pool.warm_pool(now)

    got = pool.acquire(now, deadline=now + 2.0)        # of any endpoint; or endpoint="a", or sticky=user
    if isinstance(got, Lease): ...                     # got.connection is its number
    else: ...                                          # a Ticket: among pool.take_grants() when it is served
    pool.release(now, lease)                           # broken=True if the connection is of no use
    pool.cancel(now, ticket)                           # at any time, whatever has become of it
    pool.lookup(now, "a")                              # a connection to share, or None: one is being opened

After any call there may be something to do, and at ``next_timeout()`` there is:

    for action in pool.take_actions():                 # Open(connection, endpoint, address), or
        ...                                            # Close(connection, cause)
    pool.on_opened(now, connection)                    # or on_open_failed, on_lost, on_closed, on_health
    pool.may_open(now, "a")                            # after a failure: one more attempt, when it is time
    for ticket in pool.take_grants(): ...              # ticket.result() is a lease, or raises
    for leak in pool.take_leaks(): ...

It promises that

- in_use + idle + opening + closing == size <= max_size at any time, and no more to an endpoint than allowed;
- what is borrowed is neither closed nor given to anybody else until it is released, however long that takes
  (a shutdown has a deadline);
- each number is that of one connection, which keeps it when it is opened again, until it was told to be gone
  (on_closed), because of a Close or without; then its place is free;
- nobody waits while a connection that he may have is idle; who came first is served first, and nobody is
  overtaken for ever (:mod:`~userspace.connection.lending`);
- it calls nobody: of the caller's only the hashes of his keys run in it, so nothing can call back.

A connection that is lost keeps number and place, and so does one whose attempt failed: they count as
opening.  The caller says when an endpoint that failed may be tried again; one connection then tries for
all, and if it succeeds they follow.  ``on_closed`` without a Close means that a connection is gone for
good.  Whoever reports something of a connection that is not there any more is too late; that is counted,
and nothing else happens.

The order of preference is that of health: among those who take any endpoint, endpoints that have a
healthy connection, else a degraded, else an unhealthy one, never a dead one; by power of two choices on
latency and load (:mod:`~userspace.connection.selection`).  Endpoints that do much worse than the others
are left out for a while (:mod:`~userspace.connection.outliers`).  In panic
(:mod:`~userspace.connection.roster`) neither counts.  Who asks for one endpoint gets the best of its
connections, ejected or not, while it is up.

Times are seconds of any monotonic clock; one that goes backwards is taken as the latest.  The same seed and
calls give the same actions.  Lookup, acquire and release of one endpoint's connections are as many steps for
ten thousand connections as for ten, and so are all events, but for those that concern an endpoint as a whole.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Hashable
from typing import TYPE_CHECKING, Final, NamedTuple

from userspace.connection.leaks import Stack
from userspace.connection.lending import closed
from userspace.connection.pool_events import PoolEvents
from userspace.connection.pool_settings import PoolSettings, PoolSnapshot
from userspace.connection.selection import cheaper, name_of
from userspace.connection.slots import (
    DEAD,
    DIALING,
    IDLE,
    IN_USE,
    PENDING,
    RETURNED,
    Close,
    Endpoint,
    Lease,
    Open,
    Slot,
)
from userspace.connection.states import Cause
from userspace.connection.timers import LATEST
from userspace.connection.waiters import Ticket
from xdp.errors import UsageError

if TYPE_CHECKING:
    from random import Random

__all__ = [
    "Close", "ConnectionPool", "Leak", "Lease", "Open", "PoolSettings", "PoolSnapshot", "Ticket",
]  # fmt: skip

#: Leaks that are kept until they are taken; then the oldest are forgotten.
LEAKS_KEPT: Final = 256
#: Settings of a pool when nobody says otherwise.
DEFAULTS: Final = PoolSettings()

_NEVER: Final = math.inf


class Leak(NamedTuple):
    """A borrower that holds a connection for too long: since when (seconds), and where he got it."""

    connection: int
    endpoint: Hashable
    who: object
    since: float
    stack: Stack | None


class ConnectionPool(PoolEvents):
    """A pool of connections; see the module.

    Some 0.5 KB a connection, and 1 KB an endpoint.  ``rng`` draws choices, jitter and the secret of sticky
    keys: one that is seeded gives them to the same endpoint in every process.  UsageError for arguments out
    of range, in every method.
    """

    __slots__ = ("_draw", "_found", "_shutdown_at", "_tickets")

    def __init__(self, now: float, settings: PoolSettings = DEFAULTS, *, rng: Random) -> None:
        super().__init__(now, settings, rng=rng)
        self._draw = rng.random
        self._found: deque[Leak] = deque(maxlen=LEAKS_KEPT)
        self._shutdown_at = _NEVER
        self._tickets = 0

    # --- connections to share

    def lookup(self, now: float, endpoint: Hashable) -> int | None:
        """A live connection to an endpoint, for a moment, which others may get as well.

        None when there is none that is not borrowed and is alive: one is then opened, if that may be, for
        whoever asks again soon.  Raises PoolClosedError while the pool is being closed.
        """
        if self._now <= now <= LATEST:
            self._now = now
        else:
            now = self._clock(now)
        try:
            ready = self._endpoints[endpoint].ready
        except (KeyError, TypeError):
            ready = self._endpoint(endpoint).ready  # raises
        if ready:
            slot = ready[0] if len(ready) == 1 else cheaper(ready, self._draw)
            if now < slot.expires_at:
                slot.shared_at = now
                return slot.number
        return self._look_further(now, self._endpoint(endpoint))

    def _look_further(self, now: float, endpoint: Endpoint) -> int | None:
        """What lookup found is too old, or there is nothing."""
        if self._draining:
            raise closed()
        slot = self._lending.best(now, endpoint)
        if slot is not None:
            slot.shared_at = now
            return slot.number
        self._missed += 1
        self._roster.set_wanted(endpoint, now)
        self._sizing.fill(now)
        return None

    # --- connections to borrow

    def acquire(
        self,
        now: float,
        *,
        endpoint: Hashable = None,
        sticky: Hashable = None,
        deadline: float = _NEVER,
        who: object = None,
    ) -> Lease | Ticket:
        """Borrow a connection, to an endpoint, or to always the same for the same ``sticky``, or to any.

        A lease, if one is idle; else a ticket, which is served in turn, until ``deadline`` (a time; it is not
        later than ``now`` when nobody is to wait).  ``who`` is told of in tickets and leaks.  Raises
        PoolTimeoutError at once for a deadline that is over, PoolFullError when too many wait, and
        PoolClosedError while the pool is being closed.
        """
        if self._now <= now <= LATEST:
            self._now = now
        else:
            now = self._clock(now)
        if self._draining:
            raise closed()
        lending, name = self._lending, None
        target: Endpoint | None = None
        if endpoint is not None:
            target = self._endpoint(endpoint)
            if sticky is not None:
                raise UsageError("a connection is either sticky or of one endpoint")
        elif sticky is not None:
            name = name_of(sticky)
            target = lending.target(name)
        if target is not None and len(target.ready) == 1 and now < target.ready[0].expires_at:
            slot: Slot | None = target.ready[0]
        else:
            slot = lending.best(now, target)
        stack = None if self._leaks is None else self._leaks.stack()
        if slot is not None:
            return lending.lend(now, slot, who, stack)
        if not deadline > now:
            if deadline != deadline:  # noqa: PLR0124 -- NaN
                raise UsageError("a deadline is a time, not nan")
            lending.unserved += 1
            raise lending.late(now, now)
        ticket = Ticket(
            self._tickets,
            self,
            since=now,
            deadline=deadline,
            endpoint=endpoint,
            sticky=name,
            who=who,
            stack=stack,
        )
        lending.wait(now, target, ticket)
        self._tickets += 1
        return ticket

    def release(self, now: float, lease: Lease, *, broken: bool = False) -> None:
        """Give a connection back; ``broken``: it is of no use, and its endpoint has done badly.

        It goes to the first in line, or is idle, or is closed if it is broken, dead or too old.  A lease
        whose connection was lost is to be released as well.  UsageError for one that was released
        before, or is of another pool.
        """
        if self._now <= now <= LATEST:
            self._now = now
        else:
            now = self._clock(now)
        if type(lease) is not Lease or lease.owner is not self:
            raise UsageError(f"{lease!r} is no lease of this pool")
        if lease.state:
            if lease.state == RETURNED:
                raise UsageError(f"{lease!r} was released before")
            lease.state = RETURNED
            return
        slot = lease.slot
        endpoint = slot.endpoint
        lease.state = RETURNED
        slot.lease = None
        slot.used_at = now
        self._returned += 1
        if self._leaks is not None:
            self._leaks.end(lease)
        if lease.ticket is not None:  # it was granted, and nobody took the ticket
            self._lending.forget(lease)
        if not broken:
            record = endpoint.record
            record.good += 1
            record.run = 0
            if now < slot.expires_at and slot.status != DEAD and not (endpoint.removed or self._draining):
                self._roster.take_back(slot)
                if not (slot.armed and slot.queued):
                    self._sizing.rest(now, slot)
                if self._line:
                    self._lending.offer(now, slot)
                return
        self._put_away(now, lease, broken=broken)

    def _put_away(self, now: float, lease: Lease, *, broken: bool) -> None:
        """A connection that was given back is not to be used again."""
        slot = lease.slot
        endpoint = slot.endpoint
        if broken or slot.status == DEAD:
            cause = Cause.UNHEALTHY
        elif self._draining:
            cause = Cause.DRAINED
        elif endpoint.removed:
            cause = Cause.REMOVED
        else:
            cause = Cause.EXPIRED
        self._sizing.close(slot, cause)
        if broken:
            self._returned_broken += 1
            self._failure(now, endpoint)
        self._settle(now, endpoint)

    def cancel(self, now: float, ticket: Ticket) -> None:
        """Nobody wants what this ticket stands for any more, whatever has become of it.

        It leaves the line, or what it was granted is given back, unless that was done before.  UsageError for
        a ticket of another pool.
        """
        now = self._clock(now)
        if type(ticket) is not Ticket or ticket.owner is not self:
            raise UsageError(f"{ticket!r} is no ticket of this pool")
        lease = self._lending.cancel(ticket)
        if lease is not None:
            self.release(now, lease)
        self._settle(now)

    # --- what is to be done

    def take_actions(self) -> list[Open | Close]:
        """What is to be opened and closed, in this order."""
        actions, self._sizing.actions = self._sizing.actions, []
        return actions

    def take_grants(self) -> list[Ticket]:
        """The tickets that were granted or have failed since the last call."""
        return self._lending.take_resolved()

    def take_leaks(self) -> list[Leak]:
        """Borrowers that have held a connection for longer than the threshold, each once."""
        leaks = list(self._found)
        self._found.clear()
        return leaks

    def warm_pool(self, now: float) -> int:
        """Open what is missing to the minimum, now and from now on; how many are begun now.

        An endpoint that was never reached is tried by one connection first.
        """
        now = self._clock(now)
        before = self._sizing.dialed
        self._roster.set_warm()
        self._settle(now)
        return self._sizing.dialed - before

    def cleanup_idle_connections(self, now: float) -> int:
        """Close what is dead, too old, or was idle for too long and is not needed; how many.

        on_timeout does so too, in time, but for the dead.
        """
        now = self._clock(now)
        count = 0
        for slot in list(self._roster.slots.values()):
            if slot.phase == IDLE and slot.status == DEAD:
                self._sizing.close(slot, Cause.UNHEALTHY)
                count += 1
            elif slot.phase in {IDLE, PENDING}:
                count += self._sizing.check(now, slot)
        self._settle(now)
        return count

    def drain(self, now: float) -> None:
        """Lend nothing any more: who waits gets PoolClosedError, what is idle is closed, what is borrowed
        when it comes back.  ``closed`` when that is done.
        """
        now = self._clock(now)
        if self._draining:
            return
        self._draining = True
        self._lending.close()
        for slot in list(self._roster.slots.values()):
            if slot.phase in {PENDING, DIALING, IDLE}:
                self._sizing.close(slot, Cause.DRAINED)

    def shutdown(self, now: float, deadline: float) -> None:
        """Drain, and at ``deadline`` (a time) take away what is still borrowed."""
        if not -LATEST <= deadline <= _NEVER:
            raise UsageError(f"a deadline is a time, not {deadline!r}")
        self.drain(now)
        self._shutdown_at = min(self._shutdown_at, deadline)
        self._revoke(self._now)

    def _revoke(self, now: float) -> None:
        if now < self._shutdown_at:
            return
        self._shutdown_at = _NEVER
        for slot in list(self._roster.slots.values()):
            if slot.phase == IN_USE:
                self._lending.void(now, slot)
                self._sizing.close(slot, Cause.SHUTDOWN)

    # --- time

    def next_timeout(self) -> float:
        """When to call :meth:`on_timeout`; infinite: there is nothing to wait for."""
        leaks = _NEVER if self._leaks is None else self._leaks.next_timeout()
        if self._draining:
            return min(leaks, self._shutdown_at)
        return min(
            self._sizing.next_timeout(), self._line.next_timeout(), self._outliers.next_timeout(), leaks
        )

    def on_timeout(self, now: float) -> None:
        """Deadlines, idle times, lifetimes, ejections and leaks whose time has come; too early: nothing.

        When thousands have come at once it is only a part of them, and next_timeout is not later than now.
        """
        now = self._clock(now)
        self._lending.expire(now)
        self._sizing.on_timeout(now)
        for key, ejected in self._outliers.on_timeout(now):
            endpoint = self._endpoints[key]
            self._roster.set_ejected(endpoint, ejected=ejected)
            self._changed(now, endpoint)
        if self._leaks is not None:
            for lease in self._leaks.due(now):
                self._found.append(
                    Leak(lease.connection, lease.endpoint, lease.who, lease.since, lease.stack)
                )
        self._revoke(now)
        self._settle(now)
