# SPDX-License-Identifier: Apache-2.0
"""Many connections at once: the line they stand in, links that come back, the end of a partition."""

from __future__ import annotations

import tracemalloc
from heapq import heapify, heappop, heappush
from itertools import count
from random import Random

import pytest

from tests.unit.connection_reconnections import Told
from userspace.connection.backoff import CAP
from userspace.connection.reconnection import HURRY, Phase, ReconnectionManager
from userspace.connection.states import Cause

# --- the line


def test_all_together_keep_within_the_rate() -> None:
    told = Told(rate=10.0, burst=5)
    for number in range(20):
        told.manager.schedule(0.0, str(number), Cause.LOST)
    tried = told.tries(1.0)
    assert tried == [str(number) for number in range(5)]
    assert told.manager.snapshot().phases == {"waiting": 0, "ready": 15, "trying": 5, "unproved": 0}
    now = 1.0
    while len(tried) < 20:
        assert told.manager.next_timeout() == pytest.approx(now + 0.1)
        now = told.manager.next_timeout()
        more = told.tries(now)
        assert len(more) == 1
        tried += more
    assert tried == [str(number) for number in range(20)]
    assert now == pytest.approx(2.5)


def test_nobody_overtakes_in_line() -> None:
    """Who is due later stands behind, whether its timer or the link brought it."""
    told = Told(rate=1.0, burst=1)
    manager = told.manager
    for key, at in (("a", 0.0), ("b", 0.25), ("c", 0.5), ("d", 0.75)):
        manager.schedule(at, key, Cause.LOST)
    assert told.tries(1.5) == ["a"]
    manager.cancel("b")
    assert manager.on_link_up(1.5) == ["a"]
    assert [told.tries(at) for at in (2.5, 3.5, 4.5, 5.5)] == [["c"], ["a"], ["d"], []]


def test_a_thousand_are_tried_within_half_a_second() -> None:
    manager = ReconnectionManager[int](0.0, rng=Random(7))
    for key in range(1000):
        manager.schedule(0.0, key, Cause.LINK_DOWN)
    assert manager.on_link_up(10.0) == []
    now, tried = 10.0, manager.take_due(10.0)
    assert len(tried) == 100
    wakes = 0
    while manager.snapshot().phases[Phase.READY]:
        now = manager.next_timeout()
        tried += manager.take_due(now)
        wakes += 1
    assert tried == [*range(1000)]
    assert now <= 10.5
    assert wakes <= 50  # not once for each


def test_the_end_of_a_partition_is_no_stampede() -> None:
    """Looked at twenty times a second, with twenty thousand of them to save time; all get their turn."""
    manager = ReconnectionManager[int](0.0, rng=Random(7))
    for key in range(20_000):
        manager.schedule(0.0, key, Cause.LINK_DOWN)
    manager.on_link_up(1.0)
    now, total = 1.0, 0
    while total < 20_000:
        assert manager.on_timeout(now) == []
        tried = manager.take_due(now)
        assert len(tried) <= 100
        total += len(tried)
        for key in tried:
            manager.on_connected(now, key)
        now += 0.05
    assert now <= 11.5


def test_a_connection_that_is_reconnected_is_cheap() -> None:
    """Bytes each, on the average of what happens to them: what is said in docs/connections.md."""
    tracemalloc.start()
    try:
        manager = ReconnectionManager[int](0.0, rng=Random(7))
        empty = tracemalloc.get_traced_memory()[0]
        left = []
        for turn in range(1, 4):
            keys = range(turn * 1_000_000, turn * 1_000_000 + 5000)
            for key in keys:
                manager.schedule(turn * 100.0, key, Cause.LOST)
            for step in (10.0, 20.0, 30.0):
                manager.on_timeout(turn * 100.0 + step)
                for key in manager.take_due(turn * 100.0 + step):
                    manager.on_failed(turn * 100.0 + step, key, Cause.REFUSED)
            each = (tracemalloc.get_traced_memory()[0] - empty) / len(keys)
            assert each <= 450
            for key in keys:
                manager.cancel(key)
            left.append(tracemalloc.get_traced_memory()[0] - empty)
    finally:
        tracemalloc.stop()
    # Python does not shrink its hash tables; nothing else is left, and nothing is added by the next ones.
    assert left[0] <= 5000 * 130
    assert left[2] <= left[0] * 1.2


# --- the link


def test_who_waits_tries_at_once_when_the_link_is_back() -> None:
    told = Told()
    manager = told.manager
    for key in ("a", "b", "c"):
        manager.schedule(0.0, key, Cause.LINK_DOWN)
    for at in (1.0, 3.0, 7.0):
        for key in told.tries(at):
            manager.on_failed(at, key, Cause.TIMED_OUT)
    assert [key for key, _ in told.gave_up] == ["a", "b", "c"]
    assert manager.next_timeout() == 23.0
    assert manager.on_link_up(8.0, ["b", "nobody", "b"]) == []
    assert told.tries(8.0) == ["b"]
    assert manager.on_link_up(8.5) == []
    assert told.tries(8.5) == ["a", "c"]


def test_delays_begin_anew_when_the_link_is_back_but_nobody_is_given_up_twice() -> None:
    told = Told()
    manager = told.manager
    manager.schedule(0.0, "a", Cause.LINK_DOWN)
    for at in (1.0, 3.0, 7.0):
        told.tries(at)
        manager.on_failed(at, "a", Cause.TIMED_OUT)
    manager.on_link_up(8.0)
    now, delays = 8.0, []
    for _ in range(5):
        assert told.tries(now) == ["a"]
        manager.on_failed(now, "a", Cause.TIMED_OUT)
        delays.append(manager.next_timeout() - now)
        now = manager.next_timeout()
    assert delays == [2, 4, 16, 16, 16]
    looked = manager.look("a")
    assert looked is not None
    assert (looked.failures, looked.given_up) == (8, True)
    assert len(told.gave_up) == 1


def test_attempts_sent_into_nothing_begin_again() -> None:
    told = Told()
    manager = told.manager
    manager.schedule(0.0, "a", Cause.LINK_DOWN)
    manager.schedule(0.0, "b", Cause.LINK_DOWN)
    told.tries(1.0)
    manager.on_connected(1.0, "b")
    assert manager.on_link_up(1.25) == ["a"]  # b is up
    assert (told.phase("a"), told.phase("b")) == (Phase.READY, Phase.UNPROVED)
    assert told.tries(1.25) == ["a"]
    looked = manager.look("a")
    assert looked is not None
    assert (looked.failures, looked.cause) == (0, Cause.LINK_UP)
    assert manager.snapshot().abandoned == 1


def test_a_link_that_flaps_leaves_an_attempt_its_time() -> None:
    told = Told()
    manager = told.manager
    manager.schedule(0.0, "a", Cause.LINK_DOWN)
    manager.on_link_up(0.5)
    told.tries(0.5)
    for turn in range(1, 10):
        assert manager.on_link_up(0.5 + HURRY * turn / 10) == []
    assert manager.on_link_up(0.5 + HURRY) == ["a"]
    assert told.tries(0.5 + HURRY) == ["a"]
    # One that failed by itself is an ordinary one again.
    manager.on_failed(2.0, "a", Cause.TIMED_OUT)
    assert told.tries(4.0) == ["a"]
    assert manager.on_link_up(4.0) == ["a"]


#: Seconds: a round trip; when a partition ends, and how long an attempt takes that nobody answers.
RTT = 0.05
PARTITIONS = [(10.0, 3.0), (10.0, 0.25), (60.0, 3.0)]


def partition(*, end: float, silence: float, link: bool, connections: int = 1000) -> list[float]:
    """Seconds from the end of a partition until each connection is back, in order; seed 7.

    All are lost within 2 s.  An attempt that is made before the end fails after ``silence``, any other one is
    answered.  ``link``: somebody tells of the end.
    """
    rng = Random(7)
    manager = ReconnectionManager[int](0.0, rng=rng)
    numbers = count()
    events = [(rng.uniform(0, 2), next(numbers), "lost", key) for key in range(connections)]
    if link:
        events.append((end, next(numbers), "link", -1))
    heapify(events)
    attempts: dict[int, int] = {}  # the one of each that is being made
    back: list[float] = []
    while len(back) < connections:
        now = min([manager.next_timeout(), *(at for at, _, _, _ in events[:1])])
        while events and events[0][0] <= now:
            _, number, what, key = heappop(events)
            if what == "lost":
                manager.schedule(now, key, Cause.LOST)
            elif what == "link":
                for other in manager.on_link_up(now):
                    del attempts[other]
            elif attempts.get(key) == number:
                del attempts[key]
                if what == "answered":
                    manager.on_connected(now, key)
                    back.append(now - end)
                else:
                    manager.on_failed(now, key, Cause.TIMED_OUT)
        assert manager.on_timeout(now) == []
        for key in manager.take_due(now):
            attempts[key] = number = next(numbers)
            after, what = (RTT, "answered") if now >= end else (silence, "not answered")
            heappush(events, (now + after, number, what, key))
    return back


@pytest.mark.parametrize(("end", "silence"), PARTITIONS)
def test_a_link_that_was_cut(end: float, silence: float) -> None:
    """All are back within a second of the link; at p99, and the last one too."""
    assert partition(end=end, silence=silence, link=True)[-1] < 1.0


@pytest.mark.parametrize(("end", "silence"), PARTITIONS)
def test_a_silent_blackhole(end: float, silence: float) -> None:
    """All are back within one maximum delay, the attempt before it, and a turn in line."""
    back = partition(end=end, silence=silence, link=False)
    assert back[-1] <= CAP + silence + 0.5 + RTT
    if end > 5 * silence + 6:  # they were given up
        assert back[-1] > CAP / 2
