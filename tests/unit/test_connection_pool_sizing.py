# SPDX-License-Identifier: Apache-2.0
"""How many connections a pool has: warm-up, growth, idle times, lifetimes, shrinking, eviction."""

from __future__ import annotations

import math
from collections import Counter

from tests.unit.pool_audit import audit
from tests.unit.pool_driver import Driven
from userspace.connection.eviction import GRACE
from userspace.connection.pool import Close, Open
from userspace.connection.sizing import REPLACEMENT_TIME, WANT_TIME
from userspace.connection.states import Cause


def numbers(driven: Driven) -> list[int]:
    """Connections that are there, the first opened first."""
    return sorted(driven.pool._roster.slots)


# --- more


def test_the_minimum_is_opened_when_the_pool_is_warmed_and_kept() -> None:
    driven = Driven("a", "b", min_size=5)
    driven.pool.on_timeout(1.0)
    assert driven.do(1.0) == []  # nobody wanted anything
    assert driven.pool.warm_pool(1.0) == 2  # each endpoint is tried by one at first
    driven.do(1.0)
    assert driven.counts() == (0, 5, 0, 0)
    assert {action.endpoint for action in driven.opens} == {"a", "b"}
    driven.pool.on_closed(2.0, 0)
    driven.do(2.0)
    assert driven.counts() == (0, 5, 0, 0)
    assert driven.pool.warm_pool(2.0) == 0


def test_each_endpoint_has_its_minimum() -> None:
    driven = Driven("a", "b", min_per_endpoint=3)
    driven.pool.warm_pool(0.0)
    driven.do(0.0)
    driven.pool.add_endpoint(0.0, "c")
    driven.do(0.0)
    assert Counter(action.endpoint for action in driven.opens) == {"a": 3, "b": 3, "c": 3}
    driven.until(0.0, 1000.0)
    assert driven.counts() == (0, 9, 0, 0)


def test_minima_end_where_the_pool_does() -> None:
    driven = Driven("a", "b", "c", min_per_endpoint=2, max_size=5)
    driven.pool.warm_pool(0.0)
    driven.do(0.0)
    assert driven.counts() == (0, 5, 0, 0)
    driven.pool.remove_endpoint(0.0, "a")
    driven.do(0.0)
    assert {(one.endpoint, one.idle) for one in driven.pool.endpoint_snapshots()} == {("b", 2), ("c", 2)}


def test_as_many_are_opened_as_wait() -> None:
    driven = Driven("a", max_size=10)
    driven.hold_opening = True
    for _ in range(4):
        driven.wait(0.0)
    driven.do(0.0)
    assert len(driven.opens) == 1  # nobody knows yet whether anybody is there
    driven.pool.on_opened(0.1, 0)
    driven.do(0.1)
    assert len(driven.opens) == 4
    driven.wait(0.2)
    driven.do(0.2)
    assert len(driven.opens) == 5
    for number in range(1, 5):
        driven.pool.on_opened(0.3, number)
    assert driven.counts() == (5, 0, 0, 0)
    assert driven.do(0.3) == []


def test_limits_of_endpoints_and_of_all() -> None:
    driven = Driven("a", "b", max_size=5, max_per_endpoint=3)
    for _ in range(4):
        driven.pool.acquire(0.0, endpoint="a")
        driven.do(0.0)
    for _ in range(4):
        driven.pool.acquire(0.0, endpoint="b")
        driven.do(0.0)
    assert Counter(action.endpoint for action in driven.opens) == {"a": 3, "b": 2}
    assert driven.pool.waiting_count == 3
    assert driven.pool.size == 5


def test_dials_for_anybody_go_elsewhere_when_they_fail() -> None:
    driven = Driven("a", "b", "c")
    driven.down = {"a", "b"}
    for _ in range(6):
        assert driven.acquire(0.0).endpoint == "c"


def test_a_lookup_in_vain_is_forgotten_after_a_while() -> None:
    driven = Driven("a", "b", max_size=1)
    held = driven.acquire(0.0, endpoint="a")
    assert driven.pool.lookup(1.0, "b") is None
    driven.release(1.0 + WANT_TIME + 0.1, held, broken=True)
    assert driven.pool.size == 0
    held = driven.acquire(10.0, endpoint="a")
    assert driven.pool.lookup(10.0, "b") is None
    driven.release(12.0, held, broken=True)
    assert driven.pool.lookup(12.0, "b") == 2


# --- less


def test_what_nobody_uses_is_closed() -> None:
    driven = Driven("a", min_size=2, idle_timeout=100.0, max_lifetime=None)
    leases = [driven.acquire(0.0) for _ in range(5)]
    for at, lease in enumerate(leases):
        driven.release(float(at), lease)
    driven.until(4.0, 99.9)
    assert driven.closes == []
    driven.until(99.9, 102.0)
    assert driven.causes() == [Cause.IDLE] * 3
    assert numbers(driven) == [leases[3].connection, leases[4].connection]
    driven.until(102.0, 2000.0)  # the minimum stays
    assert driven.counts() == (0, 2, 0, 0)
    audit(driven.pool)


def test_what_is_looked_up_or_borrowed_now_and_then_is_not() -> None:
    driven = Driven("a", "b", idle_timeout=100.0, max_lifetime=None)
    driven.pool.lookup(0.0, "a")
    driven.do(0.0)
    driven.release(0.0, driven.acquire(0.0, endpoint="b"))
    now = 0.0
    for step in range(1, 30):
        now = driven.until(now, step * 60.0)
        assert driven.pool.lookup(now, "a") == 0
        assert driven.acquire(now, endpoint="b").connection == 1
        driven.pool.on_timeout(now)
        driven.release(now, driven.pool._roster.slots[1].lease)  # type: ignore[arg-type]
    assert driven.closes == []
    driven.until(now, now + 201.0)
    assert driven.pool.size == 0


def test_it_shrinks_to_what_was_needed_at_once() -> None:
    """Ten connections in turns, none idle for long, and never more than three at the same time."""
    driven = Driven("a", idle_timeout=100.0, max_lifetime=None, max_size=10)
    held = [driven.acquire(0.0) for _ in range(10)]
    for lease in held:
        driven.release(0.0, lease)
    now = 0.0
    while now < 400.0:
        held = [driven.acquire(now) for _ in range(3)]
        now = driven.until(now, now + 2.0)
        for lease in held:
            driven.release(now, lease)
    assert driven.pool.size == 3
    assert driven.causes() == [Cause.IDLE] * 7


def test_shrinking_takes_the_worst_first() -> None:
    """Three of four are needed at once, and all four are used now and then."""
    driven = Driven("a", idle_timeout=100.0, max_lifetime=None)
    for lease in [driven.acquire(0.0) for _ in range(4)]:
        driven.release(0.0, lease)
    now = 0.0
    while now < 198.0:
        now = driven.until(now, now + 3.0)
        for lease in [driven.acquire(now) for _ in range(3)]:
            driven.release(now, lease)
    assert driven.pool.size == 4
    driven.pool.on_health(now, 2, 2)
    driven.until(now, 200.0)
    assert numbers(driven) == [0, 1, 3]


def test_cleaning_closes_the_dead_too() -> None:
    driven = Driven("a", max_lifetime=1000.0, lifetime_jitter=0.0, idle_timeout=100.0)
    leases = [driven.acquire(0.0) for _ in range(4)]
    for lease in leases:
        driven.release(50.0, lease)
    driven.pool.on_health(60.0, leases[0].connection, 3)
    assert driven.pool.cleanup_idle_connections(60.0) == 1
    assert driven.pool.cleanup_idle_connections(60.0) == 0
    held = driven.acquire(149.0)
    assert driven.pool.cleanup_idle_connections(150.0) == 2
    driven.do(150.0)
    assert driven.causes() == [Cause.UNHEALTHY, Cause.IDLE, Cause.IDLE]
    driven.release(999.0, held)
    assert driven.pool.cleanup_idle_connections(1000.0) == 1
    assert driven.do(1000.0) == [Close(held.connection, Cause.EXPIRED)]


# --- lifetimes


def test_a_lifetime_ends_wherever_the_connection_is() -> None:
    driven = Driven("a", "b", "c", max_lifetime=100.0, lifetime_jitter=0.0, idle_timeout=None)
    idle, held, sought = (driven.acquire(0.0, endpoint=key) for key in "abc")
    driven.release(0.0, idle)
    driven.release(0.0, sought)
    assert driven.pool.lookup(99.9, "c") == sought.connection
    # Without a look at the time in between: neither acquire nor lookup gives it out.
    assert driven.pool.lookup(100.0, "c") is None
    driven.wait(100.0, endpoint="a")
    driven.release(100.0, held)
    assert driven.causes() == [Cause.EXPIRED] * 3
    assert [action.endpoint for action in driven.opens[3:]] == ["c", "a"]


def test_lifetimes_are_spread() -> None:
    driven = Driven("a", max_lifetime=100.0, lifetime_jitter=0.2, idle_timeout=None, max_size=50)
    for lease in [driven.acquire(0.0) for _ in range(50)]:
        driven.release(0.0, lease)
    ends: list[float] = []
    now = 0.0
    while now < 100.0:
        now = driven.until(now, now + 0.5)
        ends += [now] * (len(driven.closes) - len(ends))
    assert min(ends) >= 80.0
    assert len(ends) == 50
    assert len(set(ends)) > 15
    assert driven.causes() == [Cause.EXPIRED] * 50


def test_the_replacement_is_there_before_the_end() -> None:
    driven = Driven("a", "b", max_lifetime=1000.0, lifetime_jitter=0.0)
    for key in "ab":
        driven.pool.lookup(0.0, key)
    driven.do(0.0)
    now, missed = 0.0, 0
    while now < 5000.0:
        now = driven.until(now, now + 1.0)
        missed += driven.pool.lookup(now, "a") is None
        driven.do(now)
    assert missed == 0
    # b was not used: it was idle for too long, and not replaced.
    assert Counter(action.endpoint for action in driven.opens) == {"a": 6, "b": 1}
    assert sum(isinstance(action, Open) for action in driven.opens) == 7


def test_a_replacement_is_opened_only_where_there_is_a_place() -> None:
    driven = Driven("a", max_lifetime=100.0, lifetime_jitter=0.0, max_size=1, min_size=1)
    driven.pool.warm_pool(0.0)
    driven.do(0.0)
    now = driven.until(0.0, 99.9)
    assert len(driven.opens) == 1
    driven.until(now, 100.0)
    assert [action.connection for action in driven.opens] == [0, 1]

    driven = Driven("a", max_lifetime=1000.0, lifetime_jitter=0.0, max_size=2, min_size=1)
    driven.pool.warm_pool(0.0)
    driven.do(0.0)
    now = driven.until(0.0, 1000.0 - REPLACEMENT_TIME - 0.1)
    assert len(driven.opens) == 1
    now = driven.until(now, 1000.0 - REPLACEMENT_TIME)  # it does not count for the minimum any more
    assert len(driven.opens) == 2
    driven.until(now, 1000.0)
    assert driven.causes() == [Cause.EXPIRED]
    audit(driven.pool)


# --- evicted


def filled() -> Driven:
    """Four idle connections to four endpoints, used one second after the other."""
    driven = Driven(*"abcd", max_size=4)
    for at, key in enumerate("abcd"):
        driven.release(float(at), driven.acquire(float(at), endpoint=key))
    driven.pool.add_endpoint(4.0, "x")
    return driven


def evicted(driven: Driven, now: float) -> str:
    """Whose connection gives way for one to x."""
    before = len(driven.closes)
    driven.acquire(now, endpoint="x")
    (closed,) = driven.closes[before:]
    assert closed.cause is Cause.EVICTED
    audit(driven.pool)
    return str(driven.opens[closed.connection].endpoint)


def test_the_longest_unused_gives_way() -> None:
    driven = filled()
    driven.pool.lookup(5.0, "a")
    driven.release(5.5, driven.acquire(5.5, endpoint="b"))
    assert [evicted(driven, 7.0) for _ in range(4)] == ["c", "d", "a", "b"]


def test_use_after_the_first_eviction_counts() -> None:
    driven = filled()
    assert evicted(driven, 7.0) == "a"
    driven.pool.lookup(7.5, "b")
    driven.release(7.6, driven.acquire(7.6, endpoint="c"))
    assert [evicted(driven, 9.0) for _ in range(3)] == ["d", "b", "c"]


def test_the_least_healthy_gives_way_first() -> None:
    driven = filled()
    driven.pool.on_health(4.0, 3, 3)
    driven.pool.on_health(4.0, 2, 2)
    driven.pool.on_health(4.0, 1, 1)
    assert [evicted(driven, 7.0) for _ in range(4)] == ["d", "c", "b", "a"]


def test_who_gets_worse_after_the_first_eviction_is_next() -> None:
    driven = filled()
    assert evicted(driven, 7.0) == "a"
    driven.pool.on_health(8.0, 3, 2)
    assert evicted(driven, 8.0) == "d"
    driven.pool.on_endpoint(9.0, "c", False)
    assert evicted(driven, 9.0) == "c"


def test_what_is_borrowed_never_gives_way() -> None:
    driven = filled()
    held = [driven.acquire(5.0, endpoint=key) for key in "abc"]
    assert evicted(driven, 7.0) == "d"
    waiting = driven.wait(7.0, endpoint="x")
    driven.do(7.0)
    assert driven.counts() == (4, 0, 0, 0)
    assert not any(lease.lost for lease in held)
    driven.release(8.0, held[0])
    assert waiting.lease is not None  # nobody else wanted it


def test_what_was_just_looked_up_does_not_give_way() -> None:
    driven = filled()
    for key in "abcd":
        assert driven.pool.lookup(10.0, key) is not None
    ticket = driven.wait(10.0, endpoint="x")
    driven.do(10.0)
    assert driven.closes == []
    assert driven.pool.next_timeout() <= 10.0 + GRACE
    driven.until(10.0, 10.0 + GRACE)
    assert ticket.lease is not None
    assert driven.causes() == [Cause.EVICTED]


def test_more_endpoints_than_places_are_served_in_turns() -> None:
    """Looked up round and round, they don't push each other out at once."""
    driven = Driven(*range(20), max_size=10)
    hits = Counter[bool]()
    now = 0.0
    while now < 60.0:
        now = driven.until(now, now + 0.01)
        hits[driven.pool.lookup(now, int(now * 100) % 20) is not None] += 1
        driven.do(now)
    assert hits[True] > 0.45 * hits.total()
    assert len(driven.closes) <= 10 * 60.0 / GRACE + 10
    audit(driven.pool)


def test_thousands_come_and_go() -> None:
    """Each of them evicts another one, and nothing is left of it."""
    count = 30
    driven = Driven(max_size=10)
    now = 0.0
    for number in range(200 * count):
        now += 1.0
        driven.pool.add_endpoint(now, number)
        driven.release(now, driven.acquire(now, endpoint=number))
        if number >= count:
            driven.pool.remove_endpoint(now, number - count)
            driven.do(now)
    assert driven.pool.size == 10
    assert len(driven.pool.endpoint_snapshots()) == count
    sizing, roster = driven.pool._sizing, driven.pool._roster
    assert sizing._eviction._heap is not None
    assert len(sizing._eviction._heap) <= 100
    assert len(sizing._timers._heap) <= 100
    assert len(roster.slots) == 10
    assert not roster.short
    assert len(roster.wanted) == 0
    assert driven.pool.snapshot().gone == 200 * count - 10
    assert driven.pool.next_timeout() < math.inf


def test_health_that_changes_all_the_time_leaves_nothing_behind() -> None:
    driven = filled()
    assert evicted(driven, 7.0) == "a"
    heap = driven.pool._sizing._eviction._heap
    assert heap is not None
    for _ in range(100):
        for status in (2, 0):
            driven.pool.on_health(8.0, 3, status)
        assert len(heap) <= 100
    assert [evicted(driven, 9.0) for _ in range(3)] == ["b", "c", "d"]


def test_what_comes_due_at_once_is_done_in_parts() -> None:
    driven = Driven(*range(1500), max_size=1500, idle_timeout=100.0, max_lifetime=None)
    for key in range(1500):
        driven.pool.lookup(0.0, key)
    driven.do(0.0)
    parts = []
    while driven.pool.next_timeout() <= 100.0:
        driven.pool.on_timeout(100.0)
        parts.append(len(driven.do(100.0)))
    assert sum(parts) == 1500
    assert max(parts) <= 600
    assert driven.pool.size == 0
