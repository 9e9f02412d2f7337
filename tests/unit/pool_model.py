# SPDX-License-Identifier: Apache-2.0
"""A model of a connection pool that only knows actions, events and leases, beside the pool itself.

It plays the pool's driver and its callers: every method is one thing that can happen, and holds what the pool
does against what it may do.  ``check`` is what must be true at any time; ``end`` lets all go well at last,
and then nobody waits, and nothing is left.
"""

from __future__ import annotations

import math
from random import Random

import pytest

from tests.unit.pool_audit import audit
from userspace.connection.pool import ConnectionPool, Lease, Open, PoolSettings, Ticket
from userspace.connection.slots import DEAD
from userspace.connection.states import Cause
from userspace.connection.waiters import (
    EndpointGoneError,
    PoolClosedError,
    PoolFullError,
    PoolTimeoutError,
    TicketState,
)
from xdp.errors import UsageError

KEYS = ["a", "b", "c"]
#: Attempts to an endpoint that may be begun: none, one, any number.
NONE, SOME, ALL = 0, 1, 2

#: Numbers of connections, each with its endpoint, and the how manieth of that name it is.
Place = dict[int, tuple[str, int]]


class PoolModel:
    """Every number is opening, live, closing or gone; every lease is of a live connection of its own.

    ``eager``: what is to be opened or closed is, at once.  ``slow``: who was granted something learns of it
    later.
    """

    def __init__(
        self, settings: PoolSettings, *, seed: int = 0, eager: bool = False, slow: bool = False
    ) -> None:
        self.settings = settings
        self.eager, self.slow = eager, slow
        self.now = 0.0
        self.pool = ConnectionPool(0.0, settings, rng=Random(seed))
        self.draining = False
        self.ordered = not slow  # tickets are seen in the order in which they were granted
        self.dialing: Place = {}
        self.pending: Place = {}
        self.live: Place = {}
        self.closing: Place = {}
        self.gone = 0
        self.status: dict[int, int] = {}
        self.leases: list[Lease] = []
        self.void: list[Lease] = []  # their connections were lost
        self.old: list[Lease] = []  # returned lately
        self.waiting: dict[int, Ticket] = {}  # and granted or failed, but not seen yet
        self.past: list[Ticket] = []
        self.up = dict.fromkeys(KEYS, True)
        self.lives = dict.fromkeys(KEYS, 0)
        self.may = dict.fromkeys(KEYS, SOME)
        for key in KEYS[:2]:
            self.pool.add_endpoint(0.0, key, weight=3 if key == "a" else 1)
        self.act()

    @property
    def places(self) -> tuple[Place, Place, Place, Place]:
        return self.dialing, self.pending, self.live, self.closing

    def unseen(self) -> list[Lease]:
        """What was granted to those who don't know of it yet."""
        return [ticket.result() for ticket in self.waiting.values() if ticket.lease is not None]

    def in_line(self) -> list[Ticket]:
        return [one for one in self.waiting.values() if one.state is TicketState.WAITING]

    def borrowed(self) -> set[int]:
        return {lease.connection for lease in self.leases + self.unseen()}

    # --- the driver

    def act(self) -> None:
        """Take what is to be done, and hold it against what may be."""
        borrowed = self.borrowed()
        for action in self.pool.take_actions():
            number = action.connection
            if isinstance(action, Open):
                key = str(action.endpoint)
                assert not self.draining
                assert action.address == action.endpoint
                assert self.up[key]
                assert self.may[key] != NONE
                if self.may[key] == SOME:
                    self.may[key] = NONE
                if self.pending.pop(number, None) is None:  # one after the other
                    assert number == self.gone + sum(map(len, self.places))
                self.dialing[number] = (key, self.lives[key])
            else:
                assert number not in borrowed or action.cause is Cause.SHUTDOWN
                (place,) = [one for one in self.places[:3] if number in one]
                self.closing[number] = place.pop(number)
        if not self.slow:
            self.see()
        if self.eager:
            if self.dialing:
                self.opened(0)
            elif self.closing:
                self.closed(0)

    def see(self) -> None:
        """Those whose tickets were granted or failed learn of it."""
        for ticket in self.pool.take_grants():
            assert self.waiting.pop(ticket.number) is ticket
            self.past.append(ticket)
            if ticket.state is TicketState.GRANTED:
                self.got(ticket.result())
                if self.ordered and ticket.sticky is None:  # whose endpoint may be another one by now
                    for other in self.in_line():  # nobody has overtaken one who wanted the same
                        assert (
                            other.number > ticket.number
                            or other.endpoint != ticket.endpoint
                            or other.sticky is not None
                        )
                continue
            with pytest.raises((PoolTimeoutError, EndpointGoneError, PoolClosedError)) as caught:
                ticket.result()
            if isinstance(caught.value, PoolTimeoutError):
                assert ticket.deadline <= self.now
            elif isinstance(caught.value, EndpointGoneError):
                assert ticket.endpoint is not None
            else:
                assert self.draining

    def got(self, lease: Lease) -> None:
        assert not lease.lost
        assert self.live[lease.connection][0] == lease.endpoint
        assert lease.connection not in {one.connection for one in self.leases}
        self.leases.append(lease)

    def attend(self, slow: bool) -> None:
        """Whoever is granted something learns of it at once, or not."""
        self.slow = slow
        self.act()
        self.ordered = not slow

    @staticmethod
    def one(which: int, among: Place) -> int:
        return sorted(among)[which % len(among)]

    # --- callers

    def acquire(self, key: str | None, sticky: int | None, patience: float) -> None:
        if key is not None:
            sticky = None
        try:
            got = self.pool.acquire(
                self.now, endpoint=key, sticky=sticky, deadline=self.now + patience, who=self.now
            )
        except PoolClosedError:
            assert self.draining
        except UsageError:
            assert key is not None
            assert key not in self.pool
        except PoolTimeoutError:
            assert patience == 0.0
        except PoolFullError:
            assert len(self.waiting) >= self.settings.max_waiting
        else:
            assert not self.draining
            if isinstance(got, Lease):
                assert key in {None, got.endpoint}
                assert got.connection not in self.borrowed()
                assert self.status[got.connection] < DEAD or self.pool.panic
                self.got(got)
            else:
                self.waiting[got.number] = got
        self.act()

    def release(self, which: int, broken: bool) -> None:
        everybody = self.leases + self.void
        lease = everybody[which % len(everybody)]
        self.pool.release(self.now, lease, broken=broken)
        self.returned(lease)
        self.act()

    def returned(self, lease: Lease) -> None:
        (self.leases if lease in self.leases else self.void).remove(lease)
        self.old = [*self.old[-3:], lease]

    def release_twice(self, which: int) -> None:
        with pytest.raises(UsageError, match="was released before"):
            self.pool.release(self.now, self.old[which % len(self.old)])

    def release_unseen(self, which: int) -> None:
        """A ticket is asked for its lease before its grant was taken."""
        leases = self.unseen()
        lease = leases[which % len(leases)]
        self.waiting = {number: one for number, one in self.waiting.items() if one.lease is not lease}
        self.pool.release(self.now, lease)
        self.act()

    def cancel(self, which: int) -> None:
        everybody = [*self.waiting.values(), *self.past]
        ticket = everybody[which % len(everybody)]
        lease = ticket.lease
        if self.waiting.pop(ticket.number, None) is None and lease in self.leases + self.void:
            assert lease is not None
            self.returned(lease)
        self.pool.cancel(self.now, ticket)
        self.pool.cancel(self.now, ticket)  # is the same
        self.past = [one for one in self.past if one is not ticket]
        self.act()

    def lookup(self, key: str) -> None:
        try:
            number = self.pool.lookup(self.now, key)
        except PoolClosedError:
            assert self.draining
        except UsageError:
            assert key not in self.pool
        else:
            if number is not None:
                assert self.up[key]
                assert self.live[number] == (key, self.lives[key])
                assert number not in self.borrowed()
                assert self.status[number] < DEAD or self.pool.panic
            self.act()

    # --- connections

    def opened(self, which: int) -> None:
        number = self.one(which, self.dialing)
        key, life = self.live[number] = self.dialing.pop(number)
        self.status[number] = 0
        if life == self.lives[key]:
            self.may[key] = ALL
        self.pool.on_opened(self.now, number)
        self.act()

    def failed(self, which: int, cause: Cause) -> None:
        number = self.one(which, self.dialing)
        self.wait_for_permission(number, self.dialing)
        self.pool.on_open_failed(self.now, number, cause)
        self.act()

    def lost(self, which: int) -> None:
        number = self.one(which, self.live)
        self.wait_for_permission(number, self.live)
        self.leases_end(number)
        self.pool.on_lost(self.now, number, Cause.LOST)
        self.act()

    def wait_for_permission(self, number: int, place: Place) -> None:
        key, life = self.pending[number] = place.pop(number)
        if life == self.lives[key]:
            self.may[key] = NONE

    def leases_end(self, number: int) -> None:
        for lease in [one for one in self.leases if one.connection == number]:
            self.leases.remove(lease)
            self.void.append(lease)

    def closed(self, which: int) -> None:
        number = self.one(which, self.closing)
        del self.closing[number]
        self.gone += 1
        self.pool.on_closed(self.now, number)
        self.act()

    def vanished(self, which: int) -> None:
        """A connection, or an attempt, is gone for good, and nobody has asked for that."""
        number = self.one(which, {**self.dialing, **self.live, **self.pending})
        (place,) = [one for one in self.places if number in one]
        key, life = place.pop(number)
        if place is self.dialing and life == self.lives[key]:
            self.may[key] = NONE
        self.gone += 1
        self.leases_end(number)
        self.pool.on_closed(self.now, number)
        self.act()

    def health(self, which: int, status: int) -> None:
        number = self.one(which, self.live)
        self.status[number] = status
        self.pool.on_health(self.now, number, status)
        self.act()

    def latency(self, number: int, latency: float, load: int) -> None:
        self.pool.on_latency(self.now, number, latency, load)

    def stray(self, number: int, event: int) -> None:
        """What can't happen to a connection is ignored, and counted."""
        before = self.pool.snapshot()
        if event == 0 and number not in self.dialing:
            self.pool.on_opened(self.now, number)
        elif event == 1 and number not in self.dialing:
            self.pool.on_open_failed(self.now, number, Cause.REFUSED)
        elif event == 2 and number not in self.live:
            self.pool.on_lost(self.now, number, Cause.LOST)
        elif event == 3 and number not in self.live:
            self.pool.on_health(self.now, number, 2)
        else:
            return
        assert self.pool.snapshot().stray == before.stray + 1
        assert self.pool.take_actions() == []

    # --- endpoints and time

    def add(self, key: str, weight: int) -> None:
        if not self.draining:
            if key not in self.pool:
                self.lives[key] += 1
                self.may[key] = SOME
                self.up[key] = True
            self.pool.add_endpoint(self.now, key, weight=weight)
            self.act()

    def remove(self, key: str) -> None:
        if key in self.pool:
            self.pool.remove_endpoint(self.now, key)
            self.act()

    def endpoint(self, key: str, up: bool) -> None:
        if key in self.pool:
            self.up[key] = up
        self.pool.on_endpoint(self.now, key, up)
        self.act()

    def may_open(self, key: str) -> None:
        if key in self.pool and self.may[key] == NONE:
            self.may[key] = SOME
        self.pool.may_open(self.now, key)
        self.act()

    def result(self, key: str, worked: bool) -> None:
        for _ in range(5):
            self.pool.on_result(self.now, key, worked=worked)
        self.act()

    def time(self, step: float) -> None:
        """Some time passes, and the pool may look at what that means."""
        self.now = max(self.now + step, self.pool._now)
        for _ in range(6):
            self.pool.on_timeout(self.now + min(step, 0.0))  # backwards as well
            self.act()
        assert self.pool.next_timeout() > self.now  # there is an end to it
        assert all(ticket.deadline > self.now for ticket in self.in_line())

    def warm(self) -> None:
        self.pool.warm_pool(self.now)
        self.act()

    def clean(self) -> None:
        self.pool.cleanup_idle_connections(self.now)
        self.act()

    def close(self, patience: float | None) -> None:
        self.draining = True
        if patience is None:
            self.pool.drain(self.now)
        else:
            self.pool.shutdown(self.now, self.now + patience)
        self.act()

    # --- what holds

    def check(self) -> None:
        """At any time."""
        audit(self.pool)
        self.counts_add_up()
        self.nobody_waits_beside_what_he_may_have()

    def counts_add_up(self) -> None:
        for lease in [one for one in self.leases if one.lost]:
            assert self.draining  # a shutdown took it away
            self.leases_end(lease.connection)
        told = self.pool.snapshot()
        assert told.in_use + told.idle + told.opening + told.closing == told.size <= self.settings.max_size
        assert told.opening == len(self.dialing) + len(self.pending)
        assert (told.dialing, told.closing, told.gone) == (len(self.dialing), len(self.closing), self.gone)
        assert told.in_use == len(self.leases) + len(self.unseen())
        assert told.idle == len(self.live) - told.in_use
        assert told.created == told.gone + told.size
        assert told.dialed == told.opened + told.open_failed + told.abandoned + told.dialing
        assert told.acquired == told.returned + told.lost_in_use + told.in_use
        assert told.waited == told.granted + told.timed_out + told.cancelled + told.refused + told.waiting
        assert told.waiting == len(self.in_line())
        assert told.leaks_open <= told.leaks
        everything = [whose for place in self.places for whose in place.values()]
        for whose in set(everything):
            assert everything.count(whose) <= self.settings.max_per_endpoint

    def nobody_waits_beside_what_he_may_have(self) -> None:
        waiting = self.in_line()
        if not waiting:
            return
        ejected = {one.endpoint for one in self.pool.endpoint_snapshots() if one.ejected}
        borrowed, panic = self.borrowed(), self.pool.panic
        for number, (key, life) in self.live.items():
            if number in borrowed or life != self.lives[key] or key not in self.pool or not self.up[key]:
                continue
            if self.status[number] == DEAD and not panic:
                continue
            assert all(ticket.endpoint != key for ticket in waiting)
            if panic or key not in ejected:
                assert all(one.endpoint is not None or one.sticky is not None for one in waiting)

    def end(self) -> None:
        """When all goes well in the end nobody is left waiting, and at last nothing is left at all."""
        self.pool.take_leaks()
        self.eager = False
        self.attend(False)
        for key in KEYS:
            self.add(key, 1)
        for _ in range(60):
            for key in KEYS:
                self.endpoint(key, True)
                self.may_open(key)
            for number in list(self.live):
                if number in self.live and self.status[number]:
                    self.health(sorted(self.live).index(number), 0)
            while self.dialing:
                self.opened(0)
            while self.closing:
                self.closed(0)
            while self.leases or self.void:
                self.release(0, False)
            self.time(1.0)  # what was looked up is in nobody's hands any more
            self.check()
            if not (self.waiting or self.dialing or self.closing or self.leases):
                break
        assert not self.waiting
        self.close(None)
        while self.closing:
            self.closed(0)
        self.check()
        assert self.pool.closed
        told = self.pool.snapshot()
        assert (told.size, told.leaks_open) == (0, 0)
        assert self.pool.next_timeout() == math.inf or self.pool.next_timeout() > self.now
