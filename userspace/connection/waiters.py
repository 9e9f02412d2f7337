# SPDX-License-Identifier: Apache-2.0
"""Who waits for a connection: first come, first served, each until a deadline of its own.

    line = WaitLine[Endpoint]()
    line.add(ticket, endpoint)              # for a connection to it; None: to any endpoint
    ticket = line.first(endpoint)           # who is to get a connection to it
    line.remove(ticket)                     # served, or given up
    for ticket in line.due(now): ...        # at line.next_timeout(): out of line, too late

A ticket has one place among all, by its number, and keeps it: when it is moved to another endpoint, and when
it is put back because what it was given broke before it was taken.  Each endpoint's tickets are a list of
numbers in order, in which a place is found by halving.  To take one out moves eight bytes for each behind it,
which is nothing for as many as a pool lets wait.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Hashable, Iterator
from enum import StrEnum
from typing import Final, Generic, TypeVar

from userspace.connection.leaks import Stack
from userspace.connection.slots import Lease
from userspace.connection.timers import Timers
from xdp.errors import BusyError, SluiceError

T = TypeVar("T", bound=Hashable)

_NEVER: Final = math.inf
_NOBODY: Final[list[int]] = []


class PoolFullError(BusyError):
    """As many as may wait for a connection are waiting."""


class PoolTimeoutError(SluiceError):
    """No connection was free in time."""


class PoolClosedError(SluiceError):
    """The pool is being closed: it lends nothing any more."""


class EndpointGoneError(SluiceError):
    """The endpoint was removed while somebody waited for a connection to it."""


class TicketState(StrEnum):
    """What has become of a ticket."""

    WAITING = "waiting"
    GRANTED = "granted"
    FAILED = "failed"
    CANCELLED = "cancelled"


class Ticket:
    """A place in line.  ``number`` tells the order, ``who`` is what was handed to ``acquire``."""

    __slots__ = ("_error", "_lease", "deadline", "endpoint", "number", "owner", "passed", "since", "stack",
                 "state", "sticky", "who")  # fmt: skip

    def __init__(
        self,
        number: int,
        owner: object,
        *,
        since: float,
        deadline: float,
        endpoint: Hashable,
        sticky: bytes | None,
        who: object,
        stack: Stack | None,
    ) -> None:
        self.number = number
        #: The pool.
        self.owner = owner
        self.since = since
        self.deadline = deadline
        #: The key of the endpoint that was asked for, or what the endpoint is to be the same for; or None.
        self.endpoint = endpoint
        self.sticky = sticky
        self.who = who
        self.stack = stack
        self.state = TicketState.WAITING
        #: Grants that were made before it was the first who lacked room; negative: it never was.
        self.passed = -1
        self._lease: Lease | None = None
        self._error: SluiceError | None = None

    @property
    def lease(self) -> Lease | None:
        """What it was granted; None when it was not."""
        return self._lease

    def result(self) -> Lease:
        """What it was granted.

        Raises PoolTimeoutError, PoolClosedError or EndpointGoneError when that is what became of it, and
        SluiceError while it waits and after it was cancelled.
        """
        if self._lease is not None:
            return self._lease
        if self._error is not None:
            raise self._error
        raise SluiceError(f"a ticket that is {self.state} has no connection")

    def grant(self, lease: Lease) -> None:
        """It is served."""
        self._lease = lease
        self.state = TicketState.GRANTED

    def fail(self, error: SluiceError) -> None:
        """It will not be."""
        self._error = error
        self.state = TicketState.FAILED

    def withdraw(self, state: TicketState) -> None:
        """What it was granted is not its any more."""
        self._lease = None
        self.state = state

    def __repr__(self) -> str:
        return f"<Ticket {self.number}: {self.state}{'' if self._lease is None else f', {self._lease!r}'}>"


class WaitLine(Generic[T]):
    """All that wait; see the module."""

    __slots__ = ("_deadlines", "_lines", "_order", "_targets", "_tickets", "sticky")

    def __init__(self) -> None:
        self._tickets: dict[int, Ticket] = {}
        self._targets: dict[int, T | None] = {}
        self._order: list[int] = []
        self._lines: dict[T | None, list[int]] = {}  # none is empty
        self._deadlines = Timers[int]()
        #: How many of them are sticky.
        self.sticky = 0

    def __len__(self) -> int:
        return len(self._order)

    def __contains__(self, ticket: Ticket) -> bool:
        return self._tickets.get(ticket.number) is ticket

    def __iter__(self) -> Iterator[tuple[Ticket, T | None]]:
        """All, with their endpoints, the first first.  Nobody may come or go meanwhile."""
        for number in self._order:
            yield self._tickets[number], self._targets[number]

    def add(self, ticket: Ticket, target: T | None) -> None:
        """Let it wait, at the place that its number gives it."""
        number = ticket.number
        self._tickets[number] = ticket
        self._targets[number] = target
        insort(self._order, number)
        insort(self._lines.setdefault(target, []), number)
        self._deadlines.set(number, ticket.deadline)
        self.sticky += ticket.sticky is not None

    def remove(self, ticket: Ticket) -> None:
        """It does not wait any more."""
        number = ticket.number
        del self._tickets[number]
        _take_out(self._order, number)
        self._leave(number, self._targets.pop(number))
        self._deadlines.cancel(number)
        self.sticky -= ticket.sticky is not None

    def move(self, ticket: Ticket, target: T | None) -> None:
        """It waits for another endpoint now."""
        self._leave(ticket.number, self._targets[ticket.number])
        self._targets[ticket.number] = target
        insort(self._lines.setdefault(target, []), ticket.number)

    def _leave(self, number: int, target: T | None) -> None:
        line = self._lines[target]
        _take_out(line, number)
        if not line:
            del self._lines[target]

    def count(self, target: T | None) -> int:
        """How many wait for this endpoint; None: for any."""
        return len(self._lines.get(target, _NOBODY))

    def number(self, target: T | None, place: int) -> int:
        """Of the ticket at a place of a line, which must be there; the first place is 0."""
        return self._lines[target][place]

    def ticket(self, number: int) -> Ticket:
        """The one of that number, which must wait."""
        return self._tickets[number]

    def targets(self) -> list[T | None]:
        """The endpoints that somebody waits for; None: any."""
        return list(self._lines)

    def waiting_for(self, target: T | None) -> list[Ticket]:
        """Those who wait for this endpoint, the first first; None: for any."""
        return [self._tickets[number] for number in self._lines.get(target, _NOBODY)]

    def first(self, target: T, *, any_too: bool) -> Ticket | None:
        """Who is to get a connection to this endpoint, from among those too, or not, who take any."""
        line = self._lines.get(target, _NOBODY)
        if any_too:
            others = self._lines.get(None, _NOBODY)
            if others and (not line or others[0] < line[0]):
                line = others
        return self._tickets[line[0]] if line else None

    def next_timeout(self) -> float:
        """The earliest deadline; infinite when there is none."""
        return self._deadlines.next()

    def due(self, now: float) -> list[Ticket]:
        """Those whose deadline has come; they do not wait any more."""
        late = [self._tickets[number] for number in self._deadlines.due(now)]
        for ticket in late:
            self.remove(ticket)
        return late


def _take_out(numbers: list[int], number: int) -> None:
    """Of a list in order that has it."""
    del numbers[bisect_left(numbers, number)]
