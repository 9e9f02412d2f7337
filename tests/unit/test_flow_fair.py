# SPDX-License-Identifier: Apache-2.0
"""Fair queueing: shares within a quantum, new flows first, the fattest drops, priorities above all."""

from __future__ import annotations

import math
import sys
import tracemalloc
from collections import Counter
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from userspace.flow.bounded import DropReason, Limits
from userspace.flow.fair import LEAST_COST, FairQueue
from xdp.errors import UsageError

QUANTUM = 1200
CODEL, OVERFLOW, REFUSED, CLEARED = (
    DropReason.CODEL, DropReason.OVERFLOW, DropReason.REFUSED, DropReason.CLEARED,
)  # fmt: skip


def adds_up(queue: FairQueue[Any], classes: int = 1) -> None:
    for counters in [queue.counters()] + [queue.counters(number) for number in range(classes)]:
        gone = counters.dequeued + sum(counters.dropped.values())
        assert counters.enqueued == gone + counters.packets, counters
        assert counters.packets >= 0 <= counters.bytes
        assert counters.marked <= counters.dequeued
    assert len(queue) == queue.counters().packets
    assert queue.bytes == queue.counters().bytes


def drain(queue: FairQueue[Any], now: float = 0.0) -> list[Any]:
    items = []
    while (item := queue.dequeue(now)) is not None:
        items.append(item)
    return items


@pytest.mark.parametrize("codel", [True, False])
def test_turns(codel: bool) -> None:
    queue = FairQueue[str](codel=codel)
    for name in ("a1", "a2", "a3", "b1", "c1", "b2"):
        assert queue.enqueue(0.0, name, QUANTUM, name[0])
    assert drain(queue) == ["a1", "b1", "c1", "a2", "b2", "a3"]
    adds_up(queue)
    assert queue.flows == 0
    assert repr(queue) == "<FairQueue 0 flows, <6 enqueued, 6 dequeued, 0 queued (0 bytes), dropped: none>>"


def test_bytes_count_not_packets() -> None:
    queue = FairQueue[str]()
    for _ in range(12):
        queue.enqueue(0.0, "long", QUANTUM, "long")
        queue.enqueue(0.0, "short", 100, "short")
    left = [queue.dequeue(0.0) for _ in range(13)]
    assert Counter(left) == {"long": 1, "short": 12}


def test_empty_packets_are_not_free() -> None:
    queue = FairQueue[str]()
    for _ in range(100):
        queue.enqueue(0.0, "empty", 0, "empty")
        queue.enqueue(0.0, "full", QUANTUM, "full")
    left = Counter([queue.dequeue(0.0) for _ in range(80)])
    assert left["empty"] == pytest.approx(left["full"] * QUANTUM / LEAST_COST, abs=QUANTUM / LEAST_COST)


def test_a_new_flow_goes_first_for_one_turn() -> None:
    """RFC 8290, 4.2; and it can't starve the others by becoming empty and coming back."""
    queue = FairQueue[str]()
    for number in range(20):
        queue.enqueue(0.0, f"bulk{number}", QUANTUM, "bulk")
    assert queue.dequeue(0.0) == "bulk0"
    queue.enqueue(0.0, "query", 100, "sparse")
    assert queue.dequeue(0.0) == "query"
    queue.enqueue(0.0, "again", 100, "sparse")  # it is at the head of the new flows still
    assert queue.dequeue(0.0) == "again"
    assert queue.dequeue(0.0) == "bulk1"
    for number in range(5):  # while it goes through the old flows it is not new
        queue.enqueue(0.0, f"more{number}", 1000, "sparse")
    assert [queue.dequeue(0.0) for _ in range(4)] == ["more0", "bulk2", "more1", "more2"]


@pytest.mark.parametrize("codel", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_fairness_within_a_quantum(codel: bool, seed: int) -> None:
    """Of flows that always have packets none is ahead by more than a quantum and a packet, at any time."""
    random = Random(seed)
    queue = FairQueue[tuple[int, int]](codel=codel, limits=Limits(packets=10_000, bytes=1 << 30))
    longest = 1500
    sent = [0] * 8
    for flow in range(8):
        for _ in range(600):
            size = random.randint(64, longest) if flow % 2 else longest
            queue.enqueue(0.0, (flow, size), size, flow)
    for _ in range(4000):
        item = queue.dequeue(0.001)
        assert item is not None
        sent[item[0]] += item[1]
        assert max(sent) - min(sent) <= QUANTUM + longest, f"seed {seed}"
        if min(sent) > 300_000:
            break


def test_the_fattest_loses_its_oldest() -> None:
    told: list[tuple[str, DropReason]] = []
    queue = FairQueue[str](
        limits=Limits(packets=10), on_drop=lambda item, size, reason: told.append((item, reason))
    )
    for number in range(6):
        queue.enqueue(0.0, f"a{number}", 100, "a")
    for number in range(4):
        queue.enqueue(0.0, f"b{number}", 200, "b")
    assert queue.enqueue(0.0, "c0", 100, "c")
    assert told == [("b0", OVERFLOW), ("b1", OVERFLOW)]  # more bytes, in fewer packets; half of them
    for number in range(2):
        queue.enqueue(0.0, f"d{number}", 100, "d")
    assert told[2:] == [("a0", OVERFLOW), ("a1", OVERFLOW), ("a2", OVERFLOW)]
    adds_up(queue)
    assert drain(queue) == ["a3", "a4", "a5", "b2", "b3", "c0", "d0", "d1"]


def test_one_by_one() -> None:
    told: list[str] = []
    queue = FairQueue[str](
        limits=Limits(packets=4), drop_batch=1, on_drop=lambda item, size, reason: told.append(item)
    )
    for number in range(8):
        queue.enqueue(0.0, f"a{number}", 100, "a")
    assert told == ["a0", "a1", "a2", "a3"]
    assert queue.enqueue(0.0, "b", 50, "b")
    assert told[4:] == ["a4"]


def test_the_batch_is_64_at_most() -> None:
    queue = FairQueue[int](limits=Limits(packets=1000))
    for number in range(1001):
        queue.enqueue(0.0, number, 100)
    assert queue.counters().dropped == {OVERFLOW: 64}


def test_bytes_limit() -> None:
    queue = FairQueue[str](limits=Limits(bytes=1000), drop_batch=1)
    for number in range(4):
        assert queue.enqueue(0.0, f"a{number}", 300, "a") == (number < 4)
    assert queue.counters().dropped == {OVERFLOW: 1}
    assert queue.enqueue(0.0, "b", 1000, "b") is False  # itself the fattest
    assert queue.enqueue(0.0, "c", 1001, "c") is False
    assert queue.counters().dropped == {OVERFLOW: 2, REFUSED: 1}
    adds_up(queue)


def test_priorities() -> None:
    told: list[str] = []
    queue = FairQueue[str](
        classes=3,
        limits=Limits(packets=4),
        drop_batch=1,
        on_drop=lambda item, size, reason: told.append(item),
    )
    for name in ("2x", "1x", "2y", "0x"):
        assert queue.enqueue(0.0, name, 100, name[1], int(name[0]))
    assert queue.enqueue(0.0, "0y", 100, "y", 0)
    assert told == ["2x"]
    assert queue.enqueue(0.0, "0z", 100, "z", 0)
    assert told[1:] == ["2y"]
    assert not queue.enqueue(0.0, "2z", 9999, "z", 2)
    assert told[2:] == ["2z"]
    assert queue.enqueue(0.0, "1z", 50, "z", 1)
    assert told[3:] == ["1x"]  # in the lowest class that has any, the fattest
    adds_up(queue, 3)
    assert drain(queue) == ["0x", "0y", "0z", "1z"]


def test_each_flow_has_its_own_codel() -> None:
    """Only the flow whose packets wait too long loses any."""
    dropped: Counter[str] = Counter()
    queue = FairQueue[tuple[str, float]](on_drop=lambda item, size, reason: dropped.update([item[0]]))
    now, waited = 0.0, 0.0
    for tick in range(5000):
        now = tick / 1000
        for _ in range(2):
            queue.enqueue(now, ("bulk", now), QUANTUM, "bulk")
        if tick % 3 == 0:
            queue.enqueue(now, ("calls", now), 200, "calls")
        item = queue.dequeue(now)
        if item is not None and item[0] == "calls":
            waited = max(waited, now - item[1])
    assert set(dropped) == {"bulk"}
    assert queue.counters().dropped[CODEL] > 100
    assert waited <= 0.003
    adds_up(queue)


def test_marks() -> None:
    marked: list[str] = []

    def mark(item: str) -> bool:
        marked.append(item)
        return True

    queue = FairQueue[str](classes=2, mark=mark)
    for number in range(300):
        queue.enqueue(0.0, f"{number}", QUANTUM, "flow", 1)
    for tick in range(202):
        assert queue.dequeue(0.01 + tick / 1000) == f"{tick}"
    assert queue.counters(1).marked == len(marked) == 2
    assert queue.counters(0).marked == 0
    adds_up(queue, 2)


def test_codel_is_remembered_while_it_matters() -> None:
    """A flow that CoDel has just slowed down comes back to the state it left; others are forgotten."""
    queue = FairQueue[int]()
    for number in range(3000):
        queue.enqueue(0.0, number, QUANTUM, "bulk")
    now = 0.01
    while len(queue):
        queue.dequeue(now)
        now += 0.001
    assert queue.dequeue(now) is None
    assert queue.flows == 1
    queue.enqueue(now, 1, 100, "sparse")
    assert drain(queue, now) == [1]
    assert queue.flows == 1
    queue.enqueue(now + 100, 2, 100, "bulk")
    assert drain(queue, now + 100) == [2]
    assert queue.flows == 0


def test_flows_are_bounded() -> None:
    """A flood of keys, each with a packet that leaves at once, is not kept."""
    queue = FairQueue[int](limits=Limits(packets=100))
    for number in range(5000):
        queue.enqueue(0.0, number, 100, number)
        assert queue.dequeue(0.0) == number
        assert queue.flows <= 200
    for number in range(5000):
        queue.enqueue(0.0, number, 100, number)
        assert queue.flows <= 200
    adds_up(queue)
    assert len(queue) == 100
    assert len(drain(queue)) == 100


def test_lengths_are_forgotten_too() -> None:
    """The heap that finds the fattest is no longer than the flows are many, whatever is put in and out."""
    random = Random(5)
    queue = FairQueue[int](limits=Limits(packets=50), drop_batch=1)
    heaps = set()
    for number in range(5000):
        queue.enqueue(0.0, number, random.randint(1, 1000), random.randint(0, 20))
        heap = queue._classes[0].heap
        assert heap is None or len(heap) <= 2 * queue.flows + 66
        heaps.add(heap is None)
        if random.random() < 0.5:
            queue.dequeue(0.0)
        if number % 1000 == 0:
            drain(queue)
    assert heaps == {True, False}


def test_clear() -> None:
    told: list[DropReason] = []
    queue = FairQueue[int](classes=2, on_drop=lambda item, size, reason: told.append(reason))
    for number in range(10):
        queue.enqueue(0.0, number, 100, number % 3, number % 2)
    queue.clear()
    assert told == [CLEARED] * 10
    assert len(queue) == queue.bytes == queue.flows == 0
    adds_up(queue, 2)
    queue.enqueue(0.0, 1, 100)
    assert drain(queue) == [1]


@pytest.mark.parametrize("classes", [2, 3])
def test_ten_times_the_capacity(classes: int) -> None:
    """A class that takes half of the link is not delayed by ten times as much in the lowest."""
    random = Random(1)
    rate, size, seconds = 12.5e6, 1200, 0.5  # 100 Mbit/s
    last = classes - 1
    dropped: Counter[int] = Counter()
    queue = FairQueue[tuple[int, float]](
        classes=classes, on_drop=lambda item, size, reason: dropped.update([item[0]])
    )
    waited: list[float] = []
    gap = size / rate / 10
    leaves = 0.0
    for number in range(int(seconds / gap)):
        now = number * gap
        while leaves <= now:
            item = queue.dequeue(leaves)
            if item is not None and item[0] == 0:
                waited.append(leaves - item[1])
            leaves += size / rate
        priority = 0 if number % 20 == 0 else last
        queue.enqueue(now, (priority, now), size, random.randint(0, 50), priority)
    adds_up(queue, classes)
    assert max(waited) < 0.005, "seed 1"
    assert len(waited) == pytest.approx(seconds * rate / size / 2, rel=0.01)
    assert set(dropped) == {last}


def test_memory_of_ten_thousand_flows() -> None:
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        queue = FairQueue[bytes]()
        for key in range(10_000):
            queue.enqueue(0.0, b"", 100, key)
        size = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert queue.flows == 10_000
    print(f"{size / 10_000:.0f} bytes a flow, on {sys.implementation.name}")
    assert size < 20e6


@pytest.mark.parametrize(
    "options",
    [
        {"classes": 0},
        {"classes": 9},
        {"quantum": LEAST_COST - 1},
        {"quantum": 1200.0},
        {"drop_batch": 0},
        {"limits": Limits(packets=0)},
        {"limits": Limits(age=1.0)},
        {"target": -1},
        {"interval": math.inf},
        {"mtu": 0},
    ],
)
def test_options_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        FairQueue[str](**options)


@pytest.mark.parametrize(
    "arguments",
    [
        (math.nan, "a", 1),
        (0.0, None, 1),
        (0.0, "a", -1),
        (0.0, "a", 1.5),
        (0.0, "a", 1, []),
        (0.0, "a", 1, "key", -1),
        (0.0, "a", 1, "key", 1),
    ],
)
def test_items_out_of_range(arguments: tuple[Any, ...]) -> None:
    queue = FairQueue[str]()
    with pytest.raises(UsageError):
        queue.enqueue(*arguments)
    with pytest.raises(UsageError):
        queue.counters(1)
    with pytest.raises(UsageError):
        queue.dequeue(math.nan)
    assert queue.counters().enqueued == 0


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3000)), max_size=80),
    st.sampled_from([64, 300, 1500]),
)
def test_all_that_comes_leaves_in_the_order_of_its_flow(items: list[tuple[int, int]], quantum: int) -> None:
    queue = FairQueue[tuple[int, int]](quantum=quantum, codel=False)
    for number, (flow, size) in enumerate(items):
        queue.enqueue(0.0, (flow, number), size, flow)
    left = drain(queue)
    assert len(left) == len(items)
    for flow in range(6):
        assert [item for item in left if item[0] == flow] == [
            (flow, number) for number, (own, _) in enumerate(items) if own == flow
        ]


class AgainstLists(RuleBasedStateMachine):
    """Whatever is done: counters add up, flows keep their order, and only the fattest of the lowest drop."""

    @initialize(packets=st.integers(1, 12), size=st.integers(500, 8000), batch=st.sampled_from([1, 2, 64]))
    def start(self, packets: int, size: int, batch: int) -> None:
        self.limits = Limits(packets, size)
        self.queue = FairQueue[int](
            classes=2, limits=self.limits, drop_batch=batch, on_drop=self.drop, quantum=600
        )
        self.flows: dict[tuple[int, int], list[tuple[int, int]]] = {
            (priority, key): [] for priority in range(2) for key in range(4)
        }
        self.now = 0.0
        self.number = 0
        self.batch: tuple[int, int] | None = None

    def drop(self, item: int, size: int, reason: DropReason) -> None:
        if reason is REFUSED:
            assert size > self.limits.bytes
            return
        where = next(flow for flow, queued in self.flows.items() if queued and queued[0] == (item, size))
        if reason is OVERFLOW and where != self.batch:  # the beginning of a batch
            lowest = max([priority for (priority, _), queued in self.flows.items() if queued])
            lengths = [self.length(flow) for flow in self.flows if flow[0] == lowest]
            assert where[0] == lowest
            assert self.length(where) == max(lengths)
            self.batch = where
        self.flows[where].pop(0)

    def length(self, flow: tuple[int, int]) -> int:
        return sum([size for _, size in self.flows[flow]])

    @rule(priority=st.integers(0, 1), key=st.integers(0, 3), size=st.sampled_from([0, 100, 1200, 5000, 9000]))
    def enqueue(self, priority: int, key: int, size: int) -> None:
        number = self.number
        self.number += 1
        self.batch = None
        if size <= self.limits.bytes:
            self.flows[priority, key].append((number, size))
        accepted = self.queue.enqueue(self.now, number, size, key, priority)
        assert accepted == ((number, size) in self.flows[priority, key])

    @rule()
    def dequeue(self) -> None:
        item = self.queue.dequeue(self.now)
        if item is None:
            assert not any(self.flows.values())
            return
        where = next(flow for flow, queued in self.flows.items() if queued and queued[0][0] == item)
        if where[0] == 1:
            assert not any(queued for (priority, _), queued in self.flows.items() if priority == 0)
        self.flows[where].pop(0)

    @rule(pause=st.sampled_from([0.0, 0.001, 0.05, 0.2]))
    def wait(self, pause: float) -> None:
        self.now += pause

    @invariant()
    def agree(self) -> None:
        adds_up(self.queue, 2)
        assert len(self.queue) == sum(map(len, self.flows.values())) <= self.limits.packets
        assert self.queue.bytes == sum(map(self.length, self.flows)) <= self.limits.bytes


TestAgainstLists = AgainstLists.TestCase
TestAgainstLists.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
