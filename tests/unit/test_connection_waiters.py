# SPDX-License-Identifier: Apache-2.0
"""The line of those who wait beside a sorted list, tickets, and who is told of for not giving back."""

from __future__ import annotations

import math
from random import Random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from userspace.connection.leaks import STACK_DEPTH, Leaks
from userspace.connection.outliers import Record
from userspace.connection.slots import Endpoint, Lease, Slot
from userspace.connection.waiters import (
    PoolFullError,
    PoolTimeoutError,
    Ticket,
    TicketState,
    WaitLine,
)
from xdp.errors import BusyError, SluiceError, UsageError

POOL = object()


def ticket(number: int, deadline: float = math.inf) -> Ticket:
    return Ticket(
        number, POOL, since=0.0, deadline=deadline, endpoint=None, sticky=None, who=None, stack=None
    )


def lease(since: float = 0.0) -> Lease:
    return Lease(POOL, Slot(7, Endpoint("a", 1, ("a",), 0.1, Record("a")), 0.0), since, "who")


# --- the line


def test_first_come_first_served_whatever_they_wait_for() -> None:
    line = WaitLine[str]()
    for number, target in enumerate([None, "a", "b", None, "a"]):
        line.add(ticket(number), target)

    def served(target: str, *, any_too: bool = True) -> int:
        first = line.first(target, any_too=any_too)
        assert first is not None
        line.remove(first)
        return first.number

    assert [served("a", any_too=False), served("b"), served("b"), served("b")] == [1, 0, 2, 3]
    assert line.first("b", any_too=True) is None
    assert (line.count("a"), line.count("b"), line.count(None), len(line)) == (1, 0, 0, 1)
    assert served("a") == 4
    assert not line
    assert line.targets() == []


def test_who_is_put_back_or_moved_keeps_the_place() -> None:
    line = WaitLine[str]()
    tickets = [ticket(number) for number in range(5)]
    for one in tickets:
        line.add(one, "a")
    line.remove(tickets[2])
    line.remove(tickets[0])
    line.add(tickets[2], "a")
    line.add(tickets[0], "a")
    line.move(tickets[1], "b")
    line.move(tickets[3], "b")
    line.move(tickets[1], "a")
    assert [one.number for one in line.waiting_for("a")] == [0, 1, 2, 4]
    assert [(one.number, target) for one, target in line] == [
        (0, "a"),
        (1, "a"),
        (2, "a"),
        (3, "b"),
        (4, "a"),
    ]
    line.move(tickets[3], None)
    assert [one.number for one in line.waiting_for(None)] == [3]
    assert set(line.targets()) == {"a", None}


def test_deadlines() -> None:
    line = WaitLine[str]()
    tickets = [ticket(0, 5.0), ticket(1, 3.0), ticket(2), ticket(3, 3.0), ticket(4, 1.0)]
    for one in tickets:
        line.add(one, "a")
    assert line.next_timeout() == 1.0
    assert line.due(0.5) == []
    line.remove(tickets[4])
    assert line.next_timeout() == 3.0
    assert line.due(3.0) == [tickets[1], tickets[3]]
    assert line.due(100.0) == [tickets[0]]
    assert line.next_timeout() == math.inf
    assert tickets[2] in line
    assert tickets[0] not in line
    assert ticket(2) not in line  # another one of that number


class Line(RuleBasedStateMachine):
    """Beside lists that are sorted anew for every question."""

    def __init__(self) -> None:
        super().__init__()
        self.line = WaitLine[str]()
        self.model: dict[Ticket, str | None] = {}
        self.out: list[Ticket] = []
        self.made = 0
        self.random = Random(1)

    @rule(key=st.sampled_from([None, "a", "b"]), deadline=st.sampled_from([1.0, 5.0, math.inf]))
    def add(self, key: str | None, deadline: float) -> None:
        one = ticket(self.made, deadline)
        self.made += 1
        self.line.add(one, key)
        self.model[one] = key

    @precondition(lambda self: self.model)
    @rule(key=st.sampled_from([None, "a", "b"]))
    def move(self, key: str | None) -> None:
        one = self.random.choice(list(self.model))
        self.line.move(one, key)
        self.model[one] = key

    @precondition(lambda self: self.model)
    @rule()
    def remove(self) -> None:
        one = self.random.choice(list(self.model))
        self.line.remove(one)
        del self.model[one]
        self.out.append(one)

    @precondition(lambda self: self.out)
    @rule(key=st.sampled_from([None, "a"]))
    def put_back(self, key: str | None) -> None:
        one = self.out.pop(self.random.randrange(len(self.out)))
        self.line.add(one, key)
        self.model[one] = key

    @rule(now=st.sampled_from([0.5, 1.0, 10.0]))
    def time(self, now: float) -> None:
        late = self.line.due(now)
        assert set(late) == {one for one in self.model if one.deadline <= now}
        for one in late:
            del self.model[one]

    @invariant()
    def agrees(self) -> None:
        def number(one: Ticket) -> int:
            return one.number

        assert [one for one, _ in self.line] == sorted(self.model, key=number)
        assert len(self.line) == len(self.model)
        assert self.line.next_timeout() == min((one.deadline for one in self.model), default=math.inf)
        for target in (None, "a", "b"):
            waiting = sorted((one for one in self.model if self.model[one] == target), key=number)
            assert self.line.waiting_for(target) == waiting
            assert self.line.count(target) == len(waiting)
        either = [one for one in self.model if self.model[one] in {None, "a"}]
        assert self.line.first("a", any_too=True) == min(either, key=number, default=None)
        assert set(self.line.targets()) == set(self.model.values())


Line.TestCase.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
TestLine = Line.TestCase


# --- tickets


def test_what_becomes_of_a_ticket() -> None:
    one = ticket(3)
    with pytest.raises(SluiceError, match="a ticket that is waiting has no connection"):
        one.result()
    assert repr(one) == "<Ticket 3: waiting>"
    got = lease()
    one.grant(got)
    assert one.result() is got
    assert one.lease is got
    assert repr(one) == "<Ticket 3: granted, <Lease of connection 7 to 'a': held>>"
    one.withdraw(TicketState.CANCELLED)
    with pytest.raises(SluiceError, match="a ticket that is cancelled"):
        one.result()
    other = ticket(4)
    other.fail(PoolTimeoutError("no connection was free"))
    assert other.state is TicketState.FAILED
    with pytest.raises(PoolTimeoutError, match="no connection was free"):
        other.result()
    assert issubclass(PoolFullError, BusyError)


# --- who does not give back


def test_each_is_told_of_once() -> None:
    leaks = Leaks[Lease](threshold=10.0, capture=False)
    assert leaks.next_timeout() == math.inf
    first, second, third = lease(0.0), lease(1.0), lease(5.0)
    for one in (first, second, third):
        leaks.begin(one)
    assert leaks.next_timeout() == 10.0
    leaks.end(first)
    assert leaks.due(10.0) == []  # in vain, and then in time
    assert leaks.next_timeout() == 11.0
    assert leaks.due(11.0) == [second]
    assert leaks.due(14.999) == []
    assert leaks.next_timeout() == 15.0
    assert (leaks.found, leaks.open) == (1, 1)
    leaks.end(second)
    assert (leaks.found, leaks.open) == (1, 0)
    leaks.end(second)
    assert leaks.due(100.0) == [third]
    assert leaks.due(200.0) == []
    assert leaks.next_timeout() == math.inf


def test_watching_costs_nothing_while_all_give_back() -> None:
    leaks = Leaks[Lease](threshold=10.0, capture=False)
    wakes, now = 0, 0.0
    for number in range(10_000):
        now = number / 100
        if leaks.next_timeout() <= now:
            wakes += 1
            assert leaks.due(now) == []
        one = lease(now)
        leaks.begin(one)
        leaks.end(one)
    assert wakes <= now / 10.0


def test_a_stack_is_that_of_the_borrower() -> None:
    leaks = Leaks[Lease](threshold=1.0, capture=True)

    def borrower(depth: int) -> tuple[str, ...]:
        if depth:
            return borrower(depth - 1)
        stack = leaks.stack()
        assert stack is not None
        return tuple(map(str, stack))

    assert Leaks[Lease](threshold=1.0, capture=False).stack() is None
    stack = borrower(2)
    assert all("test_connection_waiters.py:" in frame for frame in stack[:4])
    assert [frame.rpartition(".")[2] for frame in stack[:4]] == [
        "borrower", "borrower", "borrower", "py:" + stack[3].rpartition("py:")[2]
    ]  # fmt: skip
    assert stack[3].endswith("in test_a_stack_is_that_of_the_borrower")
    assert len(borrower(100)) == STACK_DEPTH


def test_a_lease_tells_what_it_is() -> None:
    one = lease(2.5)
    assert (one.connection, one.endpoint, one.since, one.who, one.lost) == (7, "a", 2.5, "who", False)
    assert not hasattr(one, "__dict__")


def test_deadlines_that_are_none_are_refused() -> None:
    line = WaitLine[str]()
    with pytest.raises(UsageError, match="a deadline"):
        line.add(ticket(0, math.nan), "a")
