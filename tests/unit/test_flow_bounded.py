# SPDX-License-Identifier: Apache-2.0
"""The bounded queue: who gives way for whom, what is told of it, and ten times its capacity."""

from __future__ import annotations

import math
from collections import deque
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from userspace.flow.bounded import BYTES, PACKETS, BoundedQueue, DropReason, Limits, QueueCounters
from xdp.errors import UsageError

INF = math.inf
NAN = math.nan

OVERFLOW, REFUSED, AGE = DropReason.OVERFLOW, DropReason.REFUSED, DropReason.AGE
DEADLINE, CLEARED = DropReason.DEADLINE, DropReason.CLEARED


class Told(list[tuple[object, DropReason]]):
    """Drops in the order in which they were told."""

    def __call__(self, item: object, size: int, reason: DropReason) -> None:
        self.append((item, reason))


def adds_up(queue: BoundedQueue[Any]) -> None:
    for counters in [queue.counters()] + [queue.counters(number) for number in range(queue.classes)]:
        gone = counters.dequeued + sum(counters.dropped.values())
        assert counters.enqueued == gone + counters.packets, counters
        assert counters.packets >= 0 <= counters.bytes
    assert len(queue) == queue.counters().packets
    assert queue.bytes == queue.counters().bytes


def drain(queue: BoundedQueue[Any], now: float) -> list[Any]:
    items = []
    while (item := queue.dequeue(now)) is not None:
        items.append(item)
        adds_up(queue)
    return items


def filled(queue: BoundedQueue[str], items: str, size: int = 1, now: float = 0.0) -> BoundedQueue[str]:
    """Items are named by class and number: "0a 1b"."""
    for item in items.split():
        queue.enqueue(now, item, size, int(item[0]))
        adds_up(queue)
    return queue


def test_strict_priorities_first_in_first_out() -> None:
    queue = filled(BoundedQueue[str](classes=3), "2a 0a 1a 0b 2b 1b")
    assert len(queue) == queue.bytes == 6
    assert drain(queue, 0.0) == ["0a", "0b", "1a", "1b", "2a", "2b"]
    assert queue.dequeue(0.0) is None
    counters = queue.counters(0)
    assert (counters.enqueued, counters.dequeued, counters.dropped) == (2, 2, {})
    assert repr(queue) == "<BoundedQueue <6 enqueued, 6 dequeued, 0 queued (0 bytes), dropped: none>>"


def test_the_oldest_of_the_lowest_gives_way() -> None:
    told = Told()
    queue = BoundedQueue[str](classes=3, total=Limits(packets=4), on_drop=told)
    filled(queue, "1a 2a 2b 0a")
    assert filled(queue, "0b 2c 1b")
    assert told == [("2a", OVERFLOW), ("2b", OVERFLOW), ("2c", OVERFLOW)]
    filled(queue, "1c 2d")  # the last: all others are higher
    assert told[3:] == [("1a", OVERFLOW), ("2d", REFUSED)]
    filled(queue, "0c 0d 0e")
    assert told[5:] == [("1b", OVERFLOW), ("1c", OVERFLOW), ("0a", OVERFLOW)]
    assert drain(queue, 0.0) == ["0b", "0c", "0d", "0e"]
    assert queue.counters(2).dropped == {OVERFLOW: 3, REFUSED: 1}
    assert "dropped: overflow 7, refused 1" in repr(queue)


def test_without_dropping_the_oldest_the_new_one_goes() -> None:
    told = Told()
    queue = BoundedQueue[str](classes=2, total=Limits(packets=3), drop_oldest=False, on_drop=told)
    filled(queue, "1a 1b 1c 1d")
    assert told == [("1d", REFUSED)]
    filled(queue, "0a 0b 0c 0d 1e")  # lower ones give way all the same
    assert told[1:] == [
        ("1a", OVERFLOW),
        ("1b", OVERFLOW),
        ("1c", OVERFLOW),
        ("0d", REFUSED),
        ("1e", REFUSED),
    ]
    assert drain(queue, 0.0) == ["0a", "0b", "0c"]


def test_limits_of_a_class() -> None:
    told = Told()
    each = {1: Limits(packets=2), 0: Limits(bytes=10)}
    queue = BoundedQueue[str](classes=3, each=each, on_drop=told)
    filled(queue, "1a 1b 1c 2a 2b 2c")
    assert told == [("1a", OVERFLOW)]
    assert queue.enqueue(0.0, "0a", 10, 0)
    assert queue.enqueue(0.0, "0b", 1, 0)
    assert not queue.enqueue(0.0, "0c", 11, 0)
    assert told[1:] == [("0a", OVERFLOW), ("0c", REFUSED)]
    assert [queue.largest(number) for number in range(3)] == [10, BYTES, BYTES]
    adds_up(queue)
    keeping = filled(BoundedQueue[str](classes=2, each={0: Limits(packets=1)}, drop_oldest=False), "1a 0a 0b")
    assert drain(keeping, 0.0) == ["0a", "1a"]


def test_bytes() -> None:
    told = Told()
    queue = BoundedQueue[str](classes=2, total=Limits(bytes=100), on_drop=told)
    for name, size, priority in (("a", 40, 1), ("b", 30, 1), ("c", 30, 0)):
        assert queue.enqueue(0.0, name, size, priority)
    assert queue.enqueue(0.0, "d", 60, 1)  # two have to go for it
    assert told == [("a", OVERFLOW), ("b", OVERFLOW)]
    assert not queue.enqueue(0.0, "e", 71, 1)  # 30 are held by the higher class: nothing is dropped in vain
    assert told[2:] == [("e", REFUSED)]
    assert queue.enqueue(0.0, "f", 100, 0)
    assert told[3:] == [("c", OVERFLOW), ("d", OVERFLOW)]
    assert queue.enqueue(0.0, "empty", 0, 0)
    assert drain(queue, 0.0) == ["f", "empty"]


def test_fits() -> None:
    queue = BoundedQueue[str](classes=3, total=Limits(packets=3, bytes=30), each={0: Limits(packets=2)})
    filled(queue, "1a 1b 2a", size=10)
    assert [queue.fits(number, 10) for number in range(3)] == [True, True, False]
    assert not queue.fits(1, 11)
    assert queue.fits(0, 20, 2)
    assert not queue.fits(0, 3, 3)
    for priority, size in ((1, 10), (0, 10), (0, 10)):
        assert queue.fits(priority, size)
        assert queue.enqueue(0.0, "x", size, priority)
    assert [queue.fits(number, 0) for number in range(3)] == [False, False, False]
    adds_up(queue)


def test_age_and_deadline() -> None:
    told = Told()
    queue = BoundedQueue[str](classes=2, total=Limits(age=1.0), each={0: Limits(age=0.1)}, on_drop=told)
    queue.enqueue(0.0, "0a", 1, 0)
    queue.enqueue(0.0, "1a", 1, 1)
    queue.enqueue(0.0, "1b", 2, 1, deadline=0.5)
    queue.enqueue(0.0, "1c", 3, 1, deadline=2.0)
    assert queue.next_size(0.1) == 1
    assert queue.dequeue(0.1) == "0a"  # at the limit it is still of use
    assert queue.dequeue(0.1) == "1a"
    assert queue.next_size(0.5) == 2
    assert queue.next_size(0.6) == 3
    assert told == [("1b", DEADLINE)]
    assert queue.next_size(1.1) is None
    assert told[1:] == [("1c", AGE)]
    assert not queue.enqueue(1.1, "late", 1, 0, deadline=1.0)
    assert queue.enqueue(1.1, "just", 1, 0, deadline=1.1)
    queue.expire(1.2)
    assert told[2:] == [("late", DEADLINE), ("just", DEADLINE)]
    adds_up(queue)
    assert queue.counters().dropped == {DEADLINE: 3, AGE: 1}


def test_what_is_of_no_use_goes_before_what_is() -> None:
    told = Told()
    queue = BoundedQueue[str](classes=2, total=Limits(packets=2), drop_oldest=False, on_drop=told)
    queue.enqueue(0.0, "0a", 1, 0, deadline=1.0)
    queue.enqueue(0.0, "1a", 1, 1)
    assert queue.enqueue(2.0, "1b", 1, 1)
    assert told == [("0a", DEADLINE)]
    adds_up(queue)


def test_time_backwards_expires_nothing() -> None:
    queue = BoundedQueue[str](total=Limits(age=1.0))
    queue.enqueue(100.0, "a", 1)
    assert queue.dequeue(0.0) == "a"


def test_clear() -> None:
    told = Told()
    queue = filled(BoundedQueue[str](classes=2, on_drop=told), "1a 0a 1b")
    queue.clear()
    assert told == [("0a", CLEARED), ("1a", CLEARED), ("1b", CLEARED)]
    assert len(queue) == queue.bytes == 0
    adds_up(queue)


def test_a_report_that_fails_leaves_counters_right() -> None:
    def fail(item: str, size: int, reason: DropReason) -> None:
        raise OSError(item)

    queue = BoundedQueue[str](total=Limits(packets=1), on_drop=fail)
    queue.enqueue(0.0, "a", 5)
    with pytest.raises(OSError, match="a"):
        queue.enqueue(0.0, "b", 5)
    assert queue.counters().dropped == {OVERFLOW: 1}
    assert len(queue) == 0 == queue.bytes


@pytest.mark.parametrize(
    "options",
    [
        {"classes": 0},
        {"classes": 9},
        {"classes": 1.0},
        {"total": Limits(packets=0)},
        {"total": Limits(bytes=0)},
        {"total": Limits(bytes=1.5)},  # type: ignore[arg-type]
        {"total": Limits(age=-1)},
        {"total": Limits(age=NAN)},
        {"each": {1: Limits()}},
        {"each": {0: Limits(packets=-1)}},
    ],
)
def test_options_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        BoundedQueue[str](**options)


@pytest.mark.parametrize(
    "arguments",
    [
        (NAN, "a", 1),
        (INF, "a", 1),
        (0.0, None, 1),
        (0.0, "a", -1),
        (0.0, "a", 1.5),
        (0.0, "a", NAN),
        (0.0, "a", 1, -1),
        (0.0, "a", 1, 2),
        (0.0, "a", 1, 0.0),
        (0.0, "a", 1, 0, NAN),
    ],
)
def test_items_out_of_range(arguments: tuple[Any, ...]) -> None:
    queue = BoundedQueue[str](classes=2)
    with pytest.raises(UsageError):
        queue.enqueue(*arguments)
    assert queue.counters().enqueued == 0
    for number in (-1, 2, 1.0):
        with pytest.raises(UsageError):
            queue.counters(number)  # type: ignore[arg-type]
        with pytest.raises(UsageError):
            queue.fits(number, 1)  # type: ignore[arg-type]
    with pytest.raises(UsageError):
        queue.expire(NAN)


def test_defaults_and_sums() -> None:
    assert Limits() == (PACKETS, BYTES, INF)
    sums, one = QueueCounters(), QueueCounters()
    one.enqueued, one.dequeued, one.marked, one.packets, one.bytes = 7, 3, 2, 1, 10
    one.drop(AGE)
    one.drop(AGE)
    one.drop(CLEARED)
    for _ in range(2):
        sums.add(one)
    assert (sums.enqueued, sums.dequeued, sums.marked, sums.packets, sums.bytes) == (14, 6, 4, 2, 20)
    assert sums.dropped == {AGE: 4, CLEARED: 2}


@pytest.mark.parametrize("drop_oldest", [True, False])
def test_ten_times_the_capacity(drop_oldest: bool) -> None:
    """In virtual time: the high class is not delayed, and what is dropped is the oldest of the lowest."""
    rate, size, seconds = 12.5e6, 1200, 0.5  # 100 Mbit/s
    waited: dict[int, list[float]] = {0: [], 1: [], 2: []}
    dropped: list[tuple[int, float]] = []
    lowest: deque[tuple[int, float]] = deque()  # of that class, in the order of their coming

    def drop(item: tuple[int, float], size: int, reason: DropReason) -> None:
        assert item[0] == 2, "only the lowest is dropped"
        assert lowest.popleft() == item if reason is OVERFLOW else lowest.pop() == item
        dropped.append(item)

    queue = BoundedQueue[tuple[int, float]](
        classes=3, total=Limits(packets=200), drop_oldest=drop_oldest, on_drop=drop
    )
    gap = size / rate / 10  # between arrivals: ten times what leaves
    leaves = 0.0
    for number in range(int(seconds / gap)):
        now = number * gap
        while leaves <= now:
            item = queue.dequeue(leaves)
            if item is not None:
                if item[0] == 2:
                    assert lowest.popleft() == item
                waited[item[0]].append(leaves - item[1])
            leaves += size / rate
        # A twentieth of what comes, half of what leaves, is of the high class, and as much of the middle.
        priority = {0: 0, 10: 1}.get(number % 20, 2)
        if priority == 2:
            lowest.append((priority, now))
        queue.enqueue(now, (priority, now), size, priority)
    adds_up(queue)
    assert len(waited[0]) == pytest.approx(seconds * rate / size / 2, rel=0.01)
    assert max(waited[0]) < 0.005
    assert max(waited[1]) < 0.005
    total = queue.counters()
    assert total.enqueued == int(seconds / gap)
    assert len(dropped) == sum(queue.counters(2).dropped.values()) == sum(total.dropped.values())


class AgainstAList(RuleBasedStateMachine):
    """Against a plain list of what is queued, in which all rules are written out."""

    @initialize(
        packets=st.integers(1, 8),
        size=st.integers(1, 30),
        age=st.sampled_from([1.0, 5.0, INF]),
        own=st.integers(1, 8),
        drop_oldest=st.booleans(),
    )
    def start(self, packets: int, size: int, age: float, own: int, drop_oldest: bool) -> None:
        self.now = 0.0
        self.told = Told()
        self.expected: list[tuple[int, DropReason]] = []
        self.total = Limits(packets, size, age)
        self.limits = {0: self.total, 1: Limits(own, max(1, size // 2), INF), 2: self.total}
        self.queue = BoundedQueue[int](
            classes=3,
            total=self.total,
            each={1: self.limits[1]},
            drop_oldest=drop_oldest,
            on_drop=self.told,
        )
        self.drop_oldest = drop_oldest
        self.model: list[tuple[int, int, int, float, float]] = []  # number, class, size, came, deadline
        self.number = 0

    def of_class(self, priority: int) -> list[tuple[int, int, int, float, float]]:
        return [one for one in self.model if one[1] == priority]

    def expired(self, one: tuple[int, int, int, float, float]) -> DropReason | None:
        _, priority, _, came, deadline = one
        if self.now > deadline:
            return DEADLINE
        return AGE if self.now - came > min(self.total.age, self.limits[priority].age) else None

    def drop(self, one: tuple[int, int, int, float, float], reason: DropReason) -> None:
        self.model.remove(one)
        self.expected.append((one[0], reason))

    def expire_heads(self, priority: int) -> None:
        while (queued := self.of_class(priority)) and (reason := self.expired(queued[0])):
            self.drop(queued[0], reason)

    def full(self, items: list[tuple[int, int, int, float, float]], limits: Limits) -> bool:
        return len(items) > limits.packets or sum([one[2] for one in items]) > limits.bytes

    @rule(priority=st.integers(0, 2), size=st.integers(0, 20), life=st.sampled_from([-1.0, 0.0, 2.0, INF]))
    def enqueue(self, priority: int, size: int, life: float) -> None:
        number = self.number
        self.number += 1
        new = (number, priority, size, self.now, self.now + life)
        fits = self.queue.fits(priority, size)
        before = len(self.expected)
        accepted = self.queue.enqueue(self.now, number, size, priority, self.now + life)
        if life < 0:
            self.expected.append((number, DEADLINE))
            assert not accepted
            return
        own = [*self.of_class(priority), new]
        if self.full([*self.model, new], self.total) or self.full(own, self.limits[priority]):
            for one in range(3):
                self.expire_heads(one)
            kept = [one for one in self.model if one[1] < priority]
            if not self.drop_oldest:
                kept = [one for one in self.model if one[1] <= priority]
            alone = [new] if self.drop_oldest else [*self.of_class(priority), new]
            if self.full([*kept, new], self.total) or self.full(alone, self.limits[priority]):
                self.expected.append((number, REFUSED))
                assert not accepted
                return
        while self.full([*self.of_class(priority), new], self.limits[priority]):
            self.drop(self.of_class(priority)[0], OVERFLOW)
        while self.full([*self.model, new], self.total):
            lowest = max([one[1] for one in self.model])
            self.drop(self.of_class(lowest)[0], OVERFLOW)
        self.model.append(new)
        assert accepted
        if fits:
            dropped = [one for one, reason in self.expected[before:] if reason is OVERFLOW]
            lower = {item for item, reason in self.told if reason is OVERFLOW}
            assert all(item in lower for item in dropped)

    @rule()
    def dequeue(self) -> None:
        item = self.queue.dequeue(self.now)
        for priority in range(3):
            self.expire_heads(priority)
            if queued := self.of_class(priority):
                self.model.remove(queued[0])
                assert item == queued[0][0]
                return
        assert item is None

    @rule()
    def look(self) -> None:
        size = self.queue.next_size(self.now)
        for priority in range(3):
            self.expire_heads(priority)
            if queued := self.of_class(priority):
                assert size == queued[0][2]
                return
        assert size is None

    @rule(pause=st.sampled_from([0.0, 0.5, 1.0, 3.0]))
    def wait(self, pause: float) -> None:
        self.now += pause

    @invariant()
    def agree(self) -> None:
        adds_up(self.queue)
        assert self.told == self.expected
        assert len(self.queue) == len(self.model)
        assert self.queue.bytes == sum([one[2] for one in self.model])
        assert len(self.queue) <= self.total.packets
        assert self.queue.bytes <= self.total.bytes


TestAgainstAList = AgainstAList.TestCase
TestAgainstAList.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
