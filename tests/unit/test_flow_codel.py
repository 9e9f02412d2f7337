# SPDX-License-Identifier: Apache-2.0
"""CoDel against the numbers and the rules of RFC 8289."""

from __future__ import annotations

import itertools
import math
from collections import deque
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from userspace.flow.bounded import DropReason, Limits
from userspace.flow.codel import INTERVAL, TARGET, CoDel, CodelParameters, ControlLaw
from xdp.errors import UsageError

MTU = 1200
CODEL, REFUSED, CLEARED = DropReason.CODEL, DropReason.REFUSED, DropReason.CLEARED

# Powers of two, so that times are exact: 4 ms, 128 ms, and packets that leave each 1 ms, about.
EXACT_TARGET, EXACT_INTERVAL, TICK = 1 / 256, 1 / 8, 1 / 1024


def adds_up(queue: CoDel[Any]) -> None:
    counters = queue.counters
    assert counters.enqueued == counters.dequeued + sum(counters.dropped.values()) + counters.packets
    assert len(queue) == counters.packets
    assert queue.bytes == counters.bytes
    assert counters.marked <= counters.dequeued


class Line:
    """A queue that is emptied at a fixed rate, and when what was dropped or marked."""

    def __init__(self, *, ecn: bool = False, **options: Any) -> None:
        self.now = 0.0
        self.dropped: list[float] = []
        self.marked: list[float] = []
        options.setdefault("target", EXACT_TARGET)
        options.setdefault("interval", EXACT_INTERVAL)
        self.queue = CoDel[int](on_drop=self.drop, mark=self.mark if ecn else None, **options)

    def drop(self, item: int, size: int, reason: DropReason) -> None:
        assert (size, reason) == (MTU, CODEL)
        self.dropped.append(self.now)

    def mark(self, item: int) -> bool:
        self.marked.append(self.now)
        return True

    def fill(self, packets: int, at: float = 0.0) -> None:
        for number in range(packets):
            assert self.queue.enqueue(at, number, MTU)

    def run(self, ticks: int) -> list[int | None]:
        """One packet leaves at each tick."""
        left = []
        for _ in range(ticks):
            left.append(self.queue.dequeue(self.now))
            adds_up(self.queue)
            self.now += TICK
        return left


def test_constants() -> None:
    assert (TARGET, INTERVAL) == (0.005, 0.1)


def expected_drops(first: float, end: float) -> list[float]:
    """A drop is due at the first, after interval / sqrt(n) more the next; it comes with the next packet."""
    due = itertools.accumulate(
        (EXACT_INTERVAL / math.sqrt(count) for count in itertools.count(1)), initial=first
    )
    return [math.ceil(time / TICK) * TICK for time in itertools.takewhile(lambda time: time <= end, due)]


def test_drop_times_of_a_constant_overload() -> None:
    """All waits too long: the first drop comes an interval after that began, the next by the square root."""
    line = Line()
    line.fill(9000)
    line.run(4096)
    above = EXACT_TARGET  # when a packet has first waited for so long
    assert line.dropped == expected_drops(above + EXACT_INTERVAL, line.now - TICK)
    assert line.dropped[:5] == [
        0.12890625,  # 1/256 + 1/8
        0.25390625,  # and 1/8
        0.3427734375,  # and 1/8 / sqrt(2) = 0.0884, rounded up to a tick
        0.4150390625,  # and 1/8 / sqrt(3) = 0.0722
        0.4775390625,  # and 1/8 / 2 = 0.0625
    ]
    # The sum of 1 / sqrt(n) is about 2 sqrt(N): after 4 s there were as many as that says.
    assert len(line.dropped) == pytest.approx((4 / EXACT_INTERVAL / 2) ** 2, rel=0.1)


def test_marks_come_when_drops_would() -> None:
    line = Line(ecn=True)
    line.fill(9000)
    left = line.run(4096)
    assert line.dropped == []
    assert line.marked == expected_drops(EXACT_TARGET + EXACT_INTERVAL, line.now - TICK)
    assert left == list(range(4096))  # a marked packet leaves: nothing is missing
    assert line.queue.counters.marked == len(line.marked)


def test_several_drops_at_once() -> None:
    """When packets leave seldom all that is due is dropped with the next one."""
    line = Line()
    line.fill(1000)
    line.run(200)
    assert len(line.dropped) == 1
    line.now = 2.0
    due = [time for time in expected_drops(EXACT_TARGET + EXACT_INTERVAL, 2.0) if time > 0.2]
    line.run(1)
    assert line.dropped[1:] == [2.0] * len(due)


def test_marks_are_one_a_packet() -> None:
    line = Line(ecn=True)
    line.fill(1000)
    line.run(200)
    line.now = 2.0
    line.run(3)
    assert line.marked[1:] == [2.0, 2.0 + TICK, 2.0 + 2 * TICK]


def test_what_can_not_be_marked_is_dropped() -> None:
    queue = CoDel[int](target=EXACT_TARGET, interval=EXACT_INTERVAL, mark=lambda item: item % 2 == 0)
    for number in range(1000):
        queue.enqueue(0.0, number, MTU)
    left = [queue.dequeue(tick * TICK) for tick in range(4, 600)]
    counters = queue.counters
    due = expected_drops(EXACT_TARGET + EXACT_INTERVAL, 599 * TICK)
    assert counters.marked + counters.dropped[CODEL] == len(due)
    assert counters.marked
    assert counters.dropped[CODEL]
    missing = set(range(max(filter(None, left)))) - set(left)
    assert len(missing) == counters.dropped[CODEL]
    assert all(number % 2 for number in missing)


def test_a_burst_is_not_dropped() -> None:
    """What has gone after less than an interval is a good queue."""
    line = Line()
    line.fill(130)
    line.run(131)
    assert line.dropped == []
    line.fill(100, at=line.now)
    line.run(101)
    assert line.dropped == []


def test_one_packet_below_the_target_ends_it() -> None:
    line = Line()
    line.fill(100)
    line.run(100)  # for almost an interval too long
    assert line.queue.dequeue(line.now) is None
    line.fill(1, at=line.now)
    line.fill(200, at=line.now)
    line.run(4)  # a new one, in time
    line.now = 1.0
    line.run(1)  # this one is above: the interval begins here
    line.now = 1.0 + EXACT_INTERVAL - TICK
    line.run(1)
    assert line.dropped == []
    line.run(1)
    assert line.dropped == [1.0 + EXACT_INTERVAL]


def test_with_one_full_packet_left_nothing_is_dropped() -> None:
    line = Line()
    for number in range(4000):
        line.now = number / 4
        line.fill(2, at=line.now - 0.2) if number == 0 else line.fill(1, at=line.now - 0.2)
        line.run(1)  # each waits for 200 ms or more, but behind it there is one packet only
    assert line.dropped == []
    line = Line(mtu=MTU - 1)
    line.fill(2000)
    line.run(200)
    assert len(line.dropped) == 1


def overload(line: Line, seconds: float) -> None:
    line.fill(int(2 * seconds / TICK), at=line.now)
    end = line.now + seconds
    while line.now < end:
        line.run(1)
    line.queue.clear()  # and it is over
    line.queue.dequeue(line.now)


@pytest.mark.parametrize(("pause", "again"), [(1.0, True), (1.75, True), (2.25, False), (100.0, False)])
def test_entering_again(pause: float, again: bool) -> None:
    """Within 16 intervals (2 s) of the last drop it goes on with the rate of that row (RFC 8289, 5.5)."""
    line = Line()
    told: list[DropReason] = []
    line.queue = CoDel[int](
        target=EXACT_TARGET,
        interval=EXACT_INTERVAL,
        on_drop=lambda item, size, reason: (
            told.append(reason) if reason is CLEARED else line.drop(item, size, reason)
        ),
    )
    overload(line, 2.0)
    first_row = len(line.dropped)
    assert first_row > 30
    line.now += pause
    begin = line.now
    overload(line, 1.0)
    row = line.dropped[first_row:]
    first = begin + EXACT_TARGET + EXACT_INTERVAL
    # The first drop of a row does not count in what is gained over the last row.
    count = first_row - 1 if again else 1
    assert row[0] == first
    assert row[1] == math.ceil((first + EXACT_INTERVAL / math.sqrt(count)) / TICK) * TICK
    adds_up(line.queue)


def test_control_law_remembers() -> None:
    law = ControlLaw(CodelParameters(TARGET, INTERVAL, MTU))
    assert not law.remembers(0.0)
    law.enter(1.0)
    assert law.remembers(1e9)  # in the middle of it
    law.dropping = False
    assert not law.remembers(1.0)  # one drop is no rate
    law.count += 5
    assert law.remembers(2.6)
    assert not law.remembers(2.7)


def test_limits() -> None:
    told: list[tuple[str, DropReason]] = []
    queue = CoDel[str](
        limits=Limits(packets=2, bytes=10), on_drop=lambda item, size, reason: told.append((item, reason))
    )
    assert [queue.enqueue(0.0, name, size) for name, size in (("a", 6), ("b", 5), ("c", 4), ("d", 0))] == [
        True, False, True, False,
    ]  # fmt: skip
    assert told == [("b", REFUSED), ("d", REFUSED)]
    adds_up(queue)
    queue.clear()
    assert told[2:] == [("a", CLEARED), ("c", CLEARED)]
    adds_up(queue)
    assert queue.dequeue(0.0) is None
    assert (
        repr(queue) == "<CoDel <4 enqueued, 0 dequeued, 0 queued (0 bytes), dropped: cleared 2, refused 2>>"
    )


@pytest.mark.parametrize(
    "options",
    [
        {"target": 0},
        {"target": math.nan},
        {"target": math.inf},
        {"target": 0.2},
        {"interval": math.nan},
        {"interval": math.inf},
        {"mtu": 0},
        {"mtu": 1.5},
        {"limits": Limits(packets=0)},
        {"limits": Limits(age=1.0)},
    ],
)
def test_options_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        CoDel[str](**options)


def test_calls_out_of_range() -> None:
    queue = CoDel[str]()
    bad: list[tuple[Any, Any, Any]] = [(math.nan, "a", 1), (0.0, None, 1), (0.0, "a", -1), (0.0, "a", 0.5)]
    for arguments in bad:
        with pytest.raises(UsageError):
            queue.enqueue(*arguments)
    with pytest.raises(UsageError):
        queue.dequeue(math.inf)
    assert queue.counters.enqueued == 0


class Rules:
    """The rules of RFC 8289, section 5, one after the other, over a list of (number, size, came)."""

    def __init__(self, target: float, interval: float, mtu: int) -> None:
        self.target, self.interval, self.mtu = target, interval, mtu
        self.waiting: deque[tuple[int, int, float]] = deque()
        self.dropping = False
        self.count = self.last = 0
        self.next = -math.inf
        self.above = 0.0  # 0: it is not
        self.dropped: list[int] = []

    def first(self, now: float) -> tuple[int | None, bool]:
        if not self.waiting:
            self.above = 0.0
            return None, False
        number, _, came = self.waiting.popleft()
        if now - came < self.target or sum([size for _, size, _ in self.waiting]) <= self.mtu:
            self.above = 0.0
        elif self.above == 0.0:
            self.above = now + self.interval
        elif now >= self.above:
            return number, True
        return number, False

    def dequeue(self, now: float) -> int | None:
        number, may = self.first(now)
        if self.dropping:
            if not may:
                self.dropping = False
            while self.dropping and now >= self.next:
                assert number is not None
                self.dropped.append(number)
                self.count += 1
                number, may = self.first(now)
                if may:
                    self.next += self.interval / math.sqrt(self.count)
                else:
                    self.dropping = False
        elif may:
            assert number is not None
            self.dropped.append(number)
            number, _ = self.first(now)
            self.dropping = True
            gained = self.count - self.last
            self.count = gained if gained > 1 and now - self.next < 16 * self.interval else 1
            self.next = now + self.interval / math.sqrt(self.count)
            self.last = self.count
        return number


STEPS = st.tuples(
    st.sampled_from([0.0, 0.001, 0.004, 0.02, 0.12, 1.0, 3.0]),  # seconds that pass
    st.integers(0, 30),  # packets that come
    st.integers(0, 12),  # and that leave
)


@settings(deadline=None, max_examples=150)
@given(
    st.lists(STEPS, max_size=60),
    st.sampled_from([0, 300, 1200]),
    st.lists(st.integers(0, 1500), min_size=1, max_size=5),
)
def test_against_the_rules(steps: list[tuple[float, int, int]], mtu: int, sizes: list[int]) -> None:
    dropped: list[int] = []
    queue = CoDel[int](mtu=max(mtu, 1), on_drop=lambda item, size, reason: dropped.append(item))
    rules = Rules(TARGET, INTERVAL, max(mtu, 1))
    now, number = 1.0, 0
    for pause, arrivals, departures in steps:
        now += pause
        for _ in range(arrivals):
            size = sizes[number % len(sizes)]
            queue.enqueue(now, number, size)
            rules.waiting.append((number, size, now))
            number += 1
        for _ in range(departures):
            assert queue.dequeue(now) == rules.dequeue(now)
            now += 0.0005
        assert dropped == rules.dropped
        adds_up(queue)


def test_time_that_jumps() -> None:
    """Backwards nothing has waited; far forwards all that is left is dropped but a packet, and it ends."""
    queue = CoDel[int]()
    for number in range(1000):
        queue.enqueue(1000.0, number, MTU)
    assert queue.dequeue(0.0) == 0
    assert queue.dequeue(2000.0) == 1
    assert queue.dequeue(2001.0) == 3
    assert queue.dequeue(1e12) == 998
    adds_up(queue)
    assert queue.counters.dropped == {CODEL: 995}
