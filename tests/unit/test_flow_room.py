# SPDX-License-Identifier: Apache-2.0
"""Back-pressure: who waits in line, in which order, and that nobody waits in vain."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from userspace.flow.bounded import BoundedQueue, DropReason, Limits
from userspace.flow.room import NoRoom, NoRoomError, Room, Waiter
from xdp.errors import UsageError

INF = math.inf


def bounded(packets: int = 2, classes: int = 2, **options: Any) -> BoundedQueue[Any]:
    return BoundedQueue[Any](classes=classes, total=Limits(packets=packets, **options))


def reason(refusal: NoRoomError | None) -> NoRoom | None:
    return refusal.reason if refusal is not None else None


def test_refusals() -> None:
    queue = bounded(bytes=100)
    room = Room(queue, waiters=1)
    assert room.refusal(0.0, 100, 1) is None
    assert reason(room.refusal(0.0, 101, 1)) is NoRoom.SIZE
    queue.enqueue(0.0, "a", 10, 1)
    queue.enqueue(0.0, "b", 10, 1)
    assert reason(room.refusal(0.0, 1, 1)) is NoRoom.FULL
    assert room.refusal(0.0, 1, 0) is None  # lower ones give way
    waiter = Waiter(1, 1)
    assert room.join(0.0, waiter) is None
    assert len(room) == 1
    assert reason(room.join(0.0, Waiter(1, 1))) is NoRoom.WAITERS
    assert reason(room.join(0.0, Waiter(101, 1))) is NoRoom.SIZE
    assert reason(room.join(5.0, Waiter(1, 1, deadline=5.0))) is NoRoom.LATE
    assert reason(room.refusal(0.0, 1, 1)) is NoRoom.LINE
    assert queue.dequeue(0.0) == "a"
    assert reason(room.refusal(0.0, 1, 1)) is NoRoom.LINE  # there is room, but not for who comes now
    assert room.refusal(0.0, 1, 0) is None
    assert room.freed(0.0) == [waiter]
    assert waiter.granted
    assert reason(room.refusal(0.0, 1, 1)) is NoRoom.LINE
    assert room.confirm(waiter)
    queue.enqueue(0.0, "c", 1, 1)
    assert room.leave(waiter) == []
    assert len(room) == 0


def test_what_has_expired_makes_room() -> None:
    queue = bounded(packets=1, classes=1, age=1.0)
    room = Room(queue)
    queue.enqueue(0.0, "old", 1)
    assert reason(room.refusal(1.0, 1, 0)) is NoRoom.FULL
    assert room.refusal(1.5, 1, 0) is None
    assert queue.counters().dropped == {DropReason.AGE: 1}


def test_the_line_keeps_its_order() -> None:
    """First in, first out, also when a later one would fit; and the higher class before the lower."""
    queue = BoundedQueue[str](classes=2, total=Limits(bytes=100))
    room = Room(queue)
    for name in "abcd":
        queue.enqueue(0.0, name, 25, 0)
    low, big, small, top = Waiter(10, 1), Waiter(50, 0), Waiter(10, 0), Waiter(25, 0)
    for waiter in (low, big, small):
        assert room.join(0.0, waiter) is None
    queue.dequeue(0.0)
    assert room.freed(0.0) == []  # 25 are free: small and low would fit
    queue.dequeue(0.0)
    assert room.freed(0.0) == [big]
    assert room.join(0.0, top) is None
    queue.dequeue(0.0)
    assert room.freed(0.0) == [small]
    queue.dequeue(0.0)
    assert room.freed(0.0) == [top, low]
    assert room.leave(big) == []


def test_a_higher_one_may_be_faster() -> None:
    """Room is kept from who comes later, not from a higher class: the granted one has to wait on."""
    queue = bounded(packets=1)
    room = Room(queue)
    queue.enqueue(0.0, "x", 1, 0)
    first, second = Waiter(1, 1), Waiter(0, 1)
    room.join(0.0, first)
    room.join(0.0, second)
    queue.dequeue(0.0)
    assert room.freed(0.0) == [first]
    assert room.refusal(0.0, 1, 0) is None
    queue.enqueue(0.0, "y", 1, 0)
    assert not room.confirm(first)
    assert not first.granted
    assert not room.confirm(second)  # not granted, and not the first
    queue.dequeue(0.0)
    assert room.freed(0.0) == [first]
    assert room.confirm(first)
    assert room.leave(first) == [second]  # it has given up
    assert room.leave(second) == []
    assert not room.confirm(second)


def test_a_short_one_in_place_of_a_long_one_makes_room() -> None:
    queue = BoundedQueue[str](classes=2, total=Limits(bytes=10))
    room = Room(queue)
    queue.enqueue(0.0, "long", 10, 1)
    waiter = Waiter(3, 1)
    room.join(0.0, waiter)
    assert room.refusal(0.0, 2, 0) is None
    queue.enqueue(0.0, "high", 2, 0)
    assert room.queued() == [waiter]


def test_expire() -> None:
    queue = BoundedQueue[str](total=Limits(bytes=10))
    room = Room(queue)
    queue.enqueue(0.0, "x", 5)
    big, small, other = Waiter(9, 0, deadline=1.0), Waiter(5, 0, deadline=2.0), Waiter(5, 0, deadline=0.5)
    for waiter in (big, small, other):
        room.join(0.0, waiter)
    assert room.next_timeout() == 0.5
    assert room.expire(0.4) == ([], [])
    assert room.expire(0.5) == ([other], [])
    assert room.next_timeout() == 1.0
    assert room.expire(1.0) == ([big], [small])  # it was in the way
    assert room.expire(3.0) == ([], [])  # who is granted is not too late
    assert room.next_timeout() == INF
    assert room.dismiss() == []
    last = Waiter(5, 0)
    room.join(3.0, last)
    assert room.next_timeout() == INF
    assert room.dismiss() == [last]
    assert len(room) == 1


def test_retry_after() -> None:
    """As the queue empties: measured while there is something in it, averaged over about a second."""
    queue = bounded(packets=1000)
    room = Room(queue)
    assert room.retry_after() is None
    for number in range(1000):
        queue.enqueue(0.0, number, 1, 1)
    room.freed(0.0, 0)
    for tick in range(1, 101):
        queue.dequeue(tick / 100)
        room.freed(tick / 100)
    assert room.retry_after() == pytest.approx(0.01, rel=0.01)
    refusal = room.refusal(1.0, 1, 1)
    assert refusal is None
    for number in range(100):
        queue.enqueue(1.0, number, 1, 1)
    for _ in range(9):
        room.join(1.0, Waiter(1, 1))
    refusal = room.refusal(1.0, 1, 1)
    assert refusal is not None
    assert refusal.retry_after == pytest.approx(0.1, rel=0.01)
    assert str(refusal) == "no room: others wait for room; there may be some in 0.100 s"
    while queue.dequeue(1.0) is not None:
        pass
    room.freed(1.0, 0)
    before = room.retry_after()
    room.freed(1000.0, 1)  # it was empty: that tells nothing
    assert room.retry_after() == before
    assert str(NoRoomError(NoRoom.SIZE, INF)) == "no room: it is larger than the queue"


def test_retry_after_stays_finite() -> None:
    queue = bounded(packets=10**6)
    room = Room(queue)
    queue.enqueue(0.0, "x", 1)
    for now in (0.0, 0.0, 1e14, 5.0, -1e15, 1e15, 1e15):
        room.freed(now)
        after = room.retry_after()
        assert after is None or 0 <= after < 10
    with pytest.raises(UsageError):
        room.freed(math.nan)


def test_out_of_range() -> None:
    for waiters in (-1, 1.5, math.nan):
        with pytest.raises(UsageError):
            Room(bounded(), waiters=waiters)  # type: ignore[arg-type]
    room = Room(bounded())
    for size in (-1, 1.5, math.nan):
        with pytest.raises(UsageError):
            room.refusal(0.0, size, 0)  # type: ignore[arg-type]
        with pytest.raises(UsageError):
            Waiter(size, 0)  # type: ignore[arg-type]
    with pytest.raises(UsageError):
        Waiter(1, 0, math.nan)
    for priority in (-1, 2):
        with pytest.raises(UsageError):
            room.refusal(0.0, 1, priority)
        with pytest.raises(UsageError):
            room.join(0.0, Waiter(1, priority))


class Lines(RuleBasedStateMachine):
    """Whatever comes, leaves, gives up or is late: nobody waits for room that is there."""

    @initialize(packets=st.integers(1, 4), size=st.integers(5, 20), waiters=st.integers(0, 6))
    def start(self, packets: int, size: int, waiters: int) -> None:
        self.queue = BoundedQueue[int](classes=2, total=Limits(packets, size), drop_oldest=False)
        self.room = Room(self.queue, waiters=waiters)
        self.waiters = waiters
        self.lines: tuple[list[Waiter], list[Waiter]] = ([], [])
        self.woken: list[Waiter] = []  # in the order in which they will run
        self.now = 0.0

    def wake(self, waiters: list[Waiter]) -> None:
        for waiter in waiters:
            assert waiter.granted
            assert waiter not in self.woken
        self.woken += waiters

    @rule(size=st.integers(0, 10), priority=st.integers(0, 1), life=st.sampled_from([1.0, 5.0, INF]))
    def put(self, size: int, priority: int, life: float) -> None:
        ahead = sum(map(len, self.lines[: priority + 1]))
        refusal = self.room.refusal(self.now, size, priority)
        if refusal is None:
            assert not ahead
            assert self.queue.enqueue(self.now, size, size, priority)
            self.wake(self.room.queued())
            return
        waiter = Waiter(size, priority, self.now + life)
        refused = self.room.join(self.now, waiter)
        if refused is None:
            self.lines[priority].append(waiter)
            assert sum(map(len, self.lines)) <= self.waiters
        else:
            assert refused.reason in {NoRoom.WAITERS, NoRoom.SIZE}

    @rule()
    def get(self) -> None:
        item = self.queue.dequeue(self.now)
        self.wake(self.room.freed(self.now, int(item is not None)))

    @rule()
    def run(self) -> None:
        """The first that was woken goes on."""
        if self.woken:
            waiter = self.woken.pop(0)
            if self.room.confirm(waiter):
                assert self.lines[waiter.priority][0] is waiter
                assert self.queue.enqueue(self.now, waiter.size, waiter.size, waiter.priority)
                self.lines[waiter.priority].remove(waiter)
                self.wake(self.room.leave(waiter))

    @rule(number=st.integers(0, 5))
    def give_up(self, number: int) -> None:
        everybody = self.lines[0] + self.lines[1]
        if everybody:
            waiter = everybody[number % len(everybody)]
            self.lines[waiter.priority].remove(waiter)
            if waiter in self.woken:
                self.woken.remove(waiter)
            self.wake(self.room.leave(waiter))

    @rule(pause=st.sampled_from([0.5, 2.0]))
    def wait(self, pause: float) -> None:
        self.now += pause
        late, granted = self.room.expire(self.now)
        for waiter in late:
            assert waiter.deadline <= self.now
            self.lines[waiter.priority].remove(waiter)
        self.wake(granted)
        assert self.room.next_timeout() > self.now

    @invariant()
    def nobody_waits_in_vain(self) -> None:
        assert len(self.room) == sum(map(len, self.lines))
        granted = [waiter for line in self.lines for waiter in line if waiter.granted]
        assert set(granted) <= set(self.woken)
        waiting = [waiter for line in self.lines for waiter in line if not waiter.granted]
        if waiting and not self.woken:
            first = waiting[0]
            assert not self.queue.fits(first.priority, first.size), "there is room, and nobody to tell"
        dropped = self.queue.counters(1).dropped  # by the higher class, nothing else is
        assert set(dropped) <= {DropReason.OVERFLOW}
        assert not self.queue.counters(0).dropped


TestLines = Lines.TestCase
TestLines.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)
