# SPDX-License-Identifier: Apache-2.0
"""What a pool costs: memory of a connection, and steps of a call, however many connections there are."""

from __future__ import annotations

import gc
import sys
import tracemalloc
from collections.abc import Callable
from itertools import cycle
from types import FrameType

import pytest

from tests.unit.pool_driver import Driven
from userspace.connection.pool import ConnectionPool
from userspace.connection.slots import DEGRADED, UNHEALTHY, Endpoint, Lease, Slot
from userspace.connection.states import Cause
from userspace.connection.waiters import Ticket

#: Of ten thousand connections, each to an endpoint of its own: 17 MB; half of it to a few endpoints.
BYTES_EACH = 1700
BYTES_OF_FEW = 900


def warmed(endpoints: int, connections: int, **options: int) -> Driven:
    each = connections // endpoints
    limits = {"max_size": connections, "max_per_endpoint": each, "min_per_endpoint": each, **options}
    driven = Driven(*range(endpoints), max_waiting=2000, **limits)
    driven.pool.warm_pool(0.0)
    driven.do(0.0)
    driven.opens.clear()
    assert driven.counts() == (0, connections, 0, 0)
    return driven


@pytest.mark.parametrize(("endpoints", "limit"), [(1000, BYTES_EACH), (10, BYTES_OF_FEW)])
def test_memory_of_idle_connections(endpoints: int, limit: int) -> None:
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        driven = warmed(endpoints, 1000)
        gc.collect()
        each = (tracemalloc.get_traced_memory()[0] - before) / 1000
    finally:
        tracemalloc.stop()
    print(f"{each:.0f} bytes a connection")
    assert driven.pool.idle_count == 1000
    assert each < limit


def test_nothing_grows_with_use() -> None:
    driven = warmed(10, 100)
    pool = driven.pool
    sizes = []
    tracemalloc.start()
    try:
        for turn in range(12_000):
            now = turn / 100
            lease = driven.acquire(now, endpoint=turn % 10)
            pool.lookup(now, turn % 10)
            driven.release(now, lease)
            if turn % 10 == 0:
                lost = turn % 100
                pool.on_lost(now, lost, Cause.LOST)
                pool.may_open(now, lost // 10)
                driven.do(now)
                driven.opens.clear()
            if turn in {2000, 11_999}:  # by 2,000 each has been used
                gc.collect()
                sizes.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    assert pool.size == 100
    print(sizes)
    assert sizes[1] - sizes[0] < 25_000  # the timers' dict may be at another size


def calls_of(*calls: Callable[[], object]) -> list[int]:
    """Functions that each of them calls, in most of some turns."""
    count = 0

    def profile(_frame: FrameType, event: str, _argument: object) -> None:
        nonlocal count
        count += event in {"call", "c_call"}

    found = []
    for call in calls:
        counts = []
        for _ in range(20):
            count = 0
            sys.setprofile(profile)
            call()
            sys.setprofile(None)
            counts.append(count)
        found.append(sorted(counts)[15])
    return found


def uses_of(pool: ConnectionPool) -> list[int]:
    """Calls of a lookup, and of borrowing and giving back: of one endpoint, and of any."""
    return calls_of(
        lambda: pool.lookup(1.0, 7),
        lambda: pool.release(1.0, pool.acquire(1.0, endpoint=7)),  # type: ignore[arg-type]
        lambda: pool.release(1.0, pool.acquire(1.0)),  # type: ignore[arg-type]
    )


def test_uses_cost_the_same_however_many_there_are() -> None:
    few, many = uses_of(warmed(10, 10).pool), uses_of(warmed(2000, 2000).pool)
    print(few, many)
    assert many[:2] == few[:2]
    assert few[0] <= 6
    assert few[1] <= 20
    assert many[2] <= few[2] + 10  # who takes any draws until he has two different ones


def events_of(driven: Driven) -> list[int]:
    """Calls of what happens to connections, while as many wait as there are."""
    pool = driven.pool
    for number in range(pool.size):
        pool.acquire(1.0, endpoint=driven.pool._roster.slots[number].endpoint.key)
        pool.acquire(1.0, endpoint=driven.pool._roster.slots[number].endpoint.key)
        pool.on_health(1.0, number, UNHEALTHY)
    pool.take_actions()
    status = cycle((DEGRADED, UNHEALTHY))

    def lost() -> None:
        pool.on_lost(2.0, 3, Cause.LOST)
        pool.may_open(2.0, pool._roster.slots[3].endpoint.key)
        pool.on_opened(2.0, 3)
        for ticket in pool.take_grants():
            pool.acquire(2.0, endpoint=ticket.result().endpoint)
        pool.take_actions()

    return calls_of(lambda: pool.on_health(2.0, 3, next(status)), lost)


@pytest.mark.parametrize("endpoints", [1, 2])
def test_events_cost_the_same_however_many_there_are(endpoints: int) -> None:
    """To one endpoint, and to as many as there are connections; nobody lacks a place."""
    few, many = (
        events_of(warmed(1 if endpoints == 1 else count, count, max_size=5 * count, max_per_endpoint=count))
        for count in (10, 500)
    )
    print(few, many)
    assert all(more <= less + 30 for less, more in zip(few, many, strict=True))


def test_what_there_is_by_the_thousand_has_slots() -> None:
    driven = Driven("a")
    lease = driven.acquire(0.0)
    for one in (lease, lease.slot, lease.slot.endpoint, lease.slot.endpoint.record, driven.wait(0.0)):
        assert not hasattr(one, "__dict__")
        assert isinstance(one, (Lease, Slot, Endpoint, Ticket)) or type(one).__name__ == "Record"
