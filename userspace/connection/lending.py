# SPDX-License-Identifier: Apache-2.0
"""Who gets which connection: leases, and the line of those who wait for one.

A connection that becomes idle goes to the first in line who can use it, in the same call, so nobody ever
waits while a connection that he may have is idle.  Who takes any endpoint stands in the same line.

Who waits for one endpoint could wait for ever while the pool is full of connections to another one that are
in demand.  So the first in line who lacks a place is overtaken by :data:`OVERTAKEN` others at most; the next
connection that is given back after that is closed to make a place for him.

What was granted and breaks before it was taken is not handed out: its ticket goes back to its place in line.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from userspace.connection.leaks import Leaks, Stack
from userspace.connection.roster import Roster
from userspace.connection.selection import cheaper
from userspace.connection.sizing import Sizing
from userspace.connection.slots import CLOSING, DEAD, HELD, LOST, Endpoint, Lease, Slot
from userspace.connection.states import Cause
from userspace.connection.waiters import (
    EndpointGoneError,
    PoolClosedError,
    PoolFullError,
    PoolTimeoutError,
    Ticket,
    TicketState,
    WaitLine,
)
from xdp.errors import SluiceError

#: Grants to others while somebody lacks a place: some, as closing and opening costs more than it does to use
#: what is open, and few, as each may take as long as a borrower likes.
OVERTAKEN: Final = 16


class Lending:
    """Leases and tickets of a pool; see the module."""

    __slots__ = (
        "_closed", "_draw", "_leaks", "_line", "_max_waiting", "_owner", "_resolved", "_roster", "_sizing",
        "acquired", "cancelled", "full", "granted", "lost_in_use", "refused", "timed_out", "unserved",
        "waited",
    )  # fmt: skip

    def __init__(
        self,
        owner: object,
        roster: Roster,
        line: WaitLine[Endpoint],
        sizing: Sizing,
        leaks: Leaks[Lease] | None,
        *,
        max_waiting: int,
        draw: Callable[[], float],
    ) -> None:
        self._owner = owner
        self._roster = roster
        self._line = line
        self._sizing = sizing
        self._leaks = leaks
        self._max_waiting = max_waiting
        self._draw = draw
        self._closed = False
        #: Tickets that are served or failed, and not taken yet.
        self._resolved: dict[int, Ticket] = {}
        # Counters since the beginning.
        self.acquired = self.lost_in_use = self.full = self.unserved = 0
        self.waited = self.granted = self.timed_out = self.cancelled = self.refused = 0

    # --- at once

    def target(self, sticky: bytes) -> Endpoint | None:
        """The endpoint of a sticky key: the first of its order that is well, or is up; None: none is."""
        ring = self._roster.ring
        fits = _is_reachable if self._roster.panic else _is_well
        return ring.first(sticky, fits) or ring.first(sticky, _is_up)

    def best(self, now: float, target: Endpoint | None) -> Slot | None:
        """The idle connection to give out, to any endpoint or one; None when there is none."""
        roster, draw = self._roster, self._draw
        while True:
            endpoint = target or roster.choose(draw)
            if endpoint is None:
                return None
            ready = endpoint.ready or roster.usable(endpoint)
            if not ready:
                return None
            slot = cheaper(ready, draw)
            if now < slot.expires_at:
                return slot
            self._sizing.check(now, slot)  # which closes it

    def lend(self, now: float, slot: Slot, who: object, stack: Stack | None) -> Lease:
        """Give out an idle connection."""
        lease = slot.lease = Lease(self._owner, slot, now, who)
        self._roster.lend(slot)
        self.acquired += 1
        if self._leaks is not None:
            lease.stack = stack
            self._leaks.begin(lease)
        return lease

    # --- in line

    def wait(self, now: float, target: Endpoint | None, ticket: Ticket) -> None:
        """Put a new ticket in line, and open what it waits for.  Raises PoolFullError."""
        if len(self._line) + len(self._resolved) >= self._max_waiting:
            self.full += 1
            raise PoolFullError(
                f"{len(self._line)} wait for a connection already ({self._usage()})",
                hint="more connections (max_size), a longer line (max_waiting), or slower callers",
            )
        self._line.add(ticket, target)
        self.waited += 1
        self._sizing.grow_for(now, ticket, target)

    def late(self, now: float, since: float) -> PoolTimeoutError:
        """There was no connection in time."""
        return PoolTimeoutError(
            f"no connection was free within {now - since:.3f} s ({self._usage()})",
            hint="more connections (max_size), or see who holds them (leak_threshold, capture_stacks)",
        )

    def _usage(self) -> str:
        return f"{self._roster.in_use} in use, {self._roster.size} in all"

    def _leave(self, ticket: Ticket) -> None:
        self._line.remove(ticket)
        if self._sizing.blocked is ticket:
            self._sizing.blocked = None

    def _fail(self, ticket: Ticket, error: SluiceError) -> None:
        """It is out of line already."""
        ticket.fail(error)
        self._resolved[ticket.number] = ticket

    def expire(self, now: float) -> None:
        """Fail those whose deadline has come."""
        for ticket in self._line.due(now):
            if self._sizing.blocked is ticket:
                self._sizing.blocked = None
            self.timed_out += 1
            self._fail(ticket, self.late(now, ticket.since))

    def _refuse(self, ticket: Ticket, error: SluiceError) -> None:
        self.refused += 1
        self._fail(ticket, error)

    def close(self) -> None:
        """Fail all that wait: nothing is lent any more."""
        self._closed = True
        for ticket, _ in list(self._line):
            self._leave(ticket)
            self._refuse(ticket, closed())

    def cancel(self, ticket: Ticket) -> Lease | None:
        """Nobody wants it any more; what it holds, which is to be released."""
        self._resolved.pop(ticket.number, None)
        if ticket.state is TicketState.WAITING:
            self._leave(ticket)
            self.cancelled += 1
            ticket.withdraw(TicketState.CANCELLED)
        elif ticket.lease is not None and ticket.lease.state in {HELD, LOST}:
            lease, ticket.lease.ticket = ticket.lease, None
            ticket.withdraw(TicketState.CANCELLED)
            return lease
        return None

    def forget(self, lease: Lease) -> None:
        """It is given back before its ticket was taken: whoever did that knows of it."""
        ticket, lease.ticket = lease.ticket, None
        assert ticket is not None
        del self._resolved[ticket.number]

    def take_resolved(self) -> list[Ticket]:
        """Those that were served or failed since the last call."""
        tickets = list(self._resolved.values())
        self._resolved.clear()
        for ticket in tickets:
            if ticket.lease is not None:
                ticket.lease.ticket = None  # taken: it does not go back in line
        return tickets

    # --- serving the line

    def _grant(self, now: float, slot: Slot, ticket: Ticket) -> None:
        self._leave(ticket)
        lease = self.lend(now, slot, ticket.who, ticket.stack)
        lease.ticket = ticket
        ticket.grant(lease)
        self._resolved[ticket.number] = ticket
        self.granted += 1

    def offer(self, now: float, slot: Slot) -> None:
        """A connection has become idle: it goes to the first who can use it."""
        line, endpoint = self._line, slot.endpoint
        if not line or not endpoint.up or (slot.status == DEAD and not self._roster.panic):
            return
        ticket = line.first(endpoint, any_too=self._roster.serves_any(endpoint))
        if self._is_starved(ticket):
            self._sizing.close(slot, Cause.EVICTED)
            return
        if ticket is not None:
            was_blocked = ticket is self._sizing.blocked
            self._grant(now, slot, ticket)
            if was_blocked:  # somebody else is the first who lacks a place now
                self._sizing.grow(now)

    def _is_starved(self, ticket: Ticket | None) -> bool:
        """Whether somebody has been overtaken too often to give a connection to this one."""
        blocked = self._sizing.blocked
        if (
            blocked is None
            or blocked is ticket
            or (ticket is not None and ticket.number < blocked.number)
            or self._roster.counts[CLOSING]  # a place will be free
        ):
            return False
        if blocked.passed < 0:
            blocked.passed = self.granted
        return ticket is None or self.granted - blocked.passed >= OVERTAKEN

    def match(self, now: float, endpoint: Endpoint) -> None:
        """Connections of an endpoint can be given out now that could not before."""
        while self._line:
            ticket = self._line.first(endpoint, any_too=self._roster.serves_any(endpoint))
            slot = None if ticket is None else self.best(now, endpoint)
            if ticket is None or slot is None:
                return
            self._grant(now, slot, ticket)

    def match_all(self, now: float) -> None:
        """Panic has begun: so can those of many endpoints."""
        for target in self._line.targets():
            if target is not None:
                self.match(now, target)
                continue
            for ticket in self._line.waiting_for(None):
                slot = self.best(now, None)
                if slot is None:
                    break
                self._grant(now, slot, ticket)

    def fail_over(self, now: float, endpoint: Endpoint) -> None:
        """An endpoint is not well: who waits for it without having asked for it waits for another one."""
        if endpoint.well or not (self._line.sticky or endpoint.removed):
            return
        for ticket in self._line.waiting_for(endpoint):
            if ticket.sticky is None:
                if endpoint.removed:
                    self._leave(ticket)
                    self._refuse(ticket, gone(endpoint))
                continue
            target = self.target(ticket.sticky)
            if target is not endpoint:
                self._line.move(ticket, target)
                self._serve(now, ticket, target)

    def _serve(self, now: float, ticket: Ticket, target: Endpoint | None) -> None:
        """A ticket that stood in line before waits for this endpoint now."""
        slot = self.best(now, target)
        if slot is not None:
            self._grant(now, slot, ticket)
        else:
            self._sizing.grow_for(now, ticket, target)

    # --- lost

    def void(self, now: float, slot: Slot) -> None:
        """The connection is not there any more, or is taken away: so is its lease, if there is one."""
        lease = slot.lease
        if lease is None:
            return
        slot.lease = None
        lease.state = LOST
        self.lost_in_use += 1
        if self._leaks is not None:
            self._leaks.end(lease)
        ticket, lease.ticket = lease.ticket, None
        if ticket is not None:
            del self._resolved[ticket.number]
            self.granted -= 1
            self._put_back(now, ticket)

    def _put_back(self, now: float, ticket: Ticket) -> None:
        """What it was granted broke before it was taken."""
        ticket.withdraw(TicketState.WAITING)
        target: Endpoint | None = None
        if self._closed:
            self._refuse(ticket, closed())
            return
        if ticket.deadline <= now:
            self.timed_out += 1
            self._fail(ticket, self.late(now, ticket.since))
            return
        if ticket.endpoint is not None:
            target = self._roster.endpoints.get(ticket.endpoint)
            if target is None:
                self._refuse(ticket, EndpointGoneError(f"endpoint {ticket.endpoint!r} was removed"))
                return
        elif ticket.sticky is not None:
            target = self.target(ticket.sticky)
        self._line.add(ticket, target)
        self._serve(now, ticket, target)


def _is_well(endpoint: Endpoint) -> bool:
    return endpoint.well


def _is_reachable(endpoint: Endpoint) -> bool:
    return endpoint.up and (endpoint.live > 0 or not endpoint.failed)


def _is_up(endpoint: Endpoint) -> bool:
    return endpoint.up


def closed() -> PoolClosedError:
    """The pool lends nothing any more."""
    return PoolClosedError("the pool is being closed")


def gone(endpoint: Endpoint) -> EndpointGoneError:
    """Nobody will connect to it any more."""
    return EndpointGoneError(f"endpoint {endpoint.key!r} was removed")
