# SPDX-License-Identifier: Apache-2.0
"""ConnectionPool: leaks, draining and shutdown, what is refused, and what it tells about itself."""

from __future__ import annotations

import json
import math
from random import Random

import msgspec
import pytest

from tests.unit.pool_driver import Driven
from userspace.connection.outliers import OutlierSettings
from userspace.connection.pool import LEAKS_KEPT, ConnectionPool, PoolSettings
from userspace.connection.states import Cause
from userspace.connection.timers import LATEST
from userspace.connection.waiters import PoolClosedError
from xdp.errors import UsageError

# --- who does not give back


def test_leaks_are_told_of_once_with_their_stack() -> None:
    driven = Driven("a", leak_threshold=10.0, capture_stacks=True)
    pool = driven.pool
    lease = driven.acquire(0.0, who="forgetful")
    ticket = driven.wait(1.0, who="waited")
    driven.do(3.0)
    assert pool.take_grants() == [ticket]
    good = driven.acquire(2.0)
    driven.release(3.0, good)
    assert driven.until(3.0, 9.9) == 9.9
    assert pool.take_leaks() == []
    driven.until(9.9, 60.0)
    first, second = pool.take_leaks()
    assert (first.connection, first.endpoint, first.who, first.since) == (
        lease.connection,
        "a",
        "forgetful",
        0.0,
    )
    assert (second.who, second.since) == ("waited", 3.0)  # from when he has it
    for leak in (first, second):
        assert leak.stack is not None
        assert any("test_leaks_are_told_of_once_with_their_stack" in str(frame) for frame in leak.stack)
        assert not any("/userspace/connection/" in frame.file for frame in leak.stack)
    assert pool.take_leaks() == []
    assert (pool.snapshot().leaks, pool.snapshot().leaks_open) == (2, 2)
    driven.release(60.0, lease)
    assert pool.snapshot().leaks_open == 1


def test_leaks_that_nobody_takes_are_bounded() -> None:
    driven = Driven("a", leak_threshold=1.0, max_size=LEAKS_KEPT + 10, max_per_endpoint=LEAKS_KEPT + 10)
    for number in range(LEAKS_KEPT + 10):
        driven.acquire(0.0, who=number)
    driven.until(0.0, 5.0)
    leaks = driven.pool.take_leaks()
    assert [leak.who for leak in leaks] == list(range(10, LEAKS_KEPT + 10))
    assert leaks[0].stack is None
    assert driven.pool.snapshot().leaks == LEAKS_KEPT + 10


# --- the end


def test_draining_waits_for_who_has_something() -> None:
    driven = Driven("a", max_size=2)
    pool = driven.pool
    held = driven.acquire(0.0)
    driven.release(0.0, driven.acquire(0.0))
    other = driven.acquire(0.0)
    waiting = driven.wait(0.0)
    driven.release(0.0, other, broken=True)
    driven.pool.take_grants()
    lease = waiting.result()
    last = driven.wait(0.0)
    pool.drain(1.0)
    pool.drain(1.0)
    assert pool.take_grants() == [last]
    with pytest.raises(PoolClosedError, match="the pool is being closed"):
        last.result()
    for call in (
        lambda: pool.acquire(1.0),
        lambda: pool.lookup(1.0, "a"),
        lambda: pool.add_endpoint(1.0, "b"),
    ):
        with pytest.raises(PoolClosedError):
            call()
    assert not pool.may_open(1.0, "a")
    assert repr(pool).startswith("<ConnectionPool (draining): 2 in use, 0 idle")
    driven.release(2.0, held)
    driven.release(2.0, lease)
    assert driven.causes()[-2:] == [Cause.DRAINED] * 2
    assert pool.closed
    assert pool.size == 0
    assert repr(pool).startswith("<ConnectionPool (closed)")


def test_draining_ends_attempts() -> None:
    driven = Driven("a", "b", max_size=4)
    driven.hold_opening = True
    driven.wait(0.0, endpoint="a")
    driven.wait(0.0, endpoint="b")
    driven.do(0.0)
    driven.pool.on_open_failed(0.0, 1, Cause.REFUSED)
    driven.pool.drain(0.0)
    driven.do(0.0)
    assert driven.causes() == [Cause.DRAINED] * 2
    assert driven.pool.closed
    assert driven.pool.snapshot().abandoned == 1


def test_a_shutdown_takes_away_what_is_not_given_back() -> None:
    driven = Driven("a")
    lease = driven.acquire(0.0)
    driven.pool.shutdown(1.0, 5.0)
    driven.pool.shutdown(1.0, 9.0)  # the earlier one holds
    assert driven.pool.next_timeout() == 5.0
    driven.until(1.0, 4.9)
    before = lease.lost
    driven.until(4.9, 5.0)
    assert (before, lease.lost) == (False, True)
    assert driven.causes() == [Cause.SHUTDOWN]
    assert driven.pool.closed
    driven.release(6.0, lease)
    other = Driven("a")
    lease = other.acquire(0.0)
    other.pool.shutdown(1.0, 0.0)
    assert lease.lost
    with pytest.raises(UsageError, match="a deadline is a time"):
        other.pool.shutdown(1.0, math.nan)


# --- what is not allowed, and what is told


@pytest.mark.parametrize("now", [math.nan, math.inf, -math.inf, LATEST * 2])
def test_what_is_no_time_is_refused(now: float) -> None:
    driven = Driven("a")
    lease = driven.acquire(0.0)
    ticket = driven.wait(0.0)
    pool = driven.pool
    before = pool.snapshot()
    for call in (
        lambda: pool.acquire(now), lambda: pool.release(now, lease), lambda: pool.cancel(now, ticket),
        lambda: pool.lookup(now, "a"), lambda: pool.on_opened(now, 1), lambda: pool.on_closed(now, 0),
        lambda: pool.on_lost(now, 0, Cause.LOST), lambda: pool.on_open_failed(now, 1, Cause.LOST),
        lambda: pool.on_health(now, 0, 1), lambda: pool.on_endpoint(now, "a", False),
        lambda: pool.on_latency(now, 0, 1.0), lambda: pool.on_result(now, "a", worked=True),
        lambda: pool.may_open(now, "a"), lambda: pool.add_endpoint(now, "b"),
        lambda: pool.remove_endpoint(now, "a"), lambda: pool.warm_pool(now), lambda: pool.drain(now),
        lambda: pool.cleanup_idle_connections(now), lambda: pool.on_timeout(now),
        lambda: pool.shutdown(now, 5.0),
    ):  # fmt: skip
        with pytest.raises(UsageError, match="now is seconds"):
            call()
    assert pool.snapshot() == before


def test_wrong_arguments_are_refused() -> None:
    driven = Driven("a")
    lease = driven.acquire(0.0)
    pool = driven.pool
    wrong: list[tuple[str, object]] = [
        ("either sticky or of one endpoint", lambda: pool.acquire(0.0, endpoint="a", sticky=1)),
        ("there is no endpoint 'x'", lambda: pool.acquire(0.0, endpoint="x")),
        ("there is no endpoint 'x'", lambda: pool.remove_endpoint(0.0, "x")),
        ("None can't be an endpoint", lambda: pool.add_endpoint(0.0, None)),
        ("must be hashable", lambda: pool.add_endpoint(0.0, [])),  # type: ignore[arg-type]
        ("must be hashable", lambda: pool.add_endpoint(0.0, "b", addresses=[[]])),  # type: ignore[list-item]
        ("up to 64 addresses, each once", lambda: pool.add_endpoint(0.0, "b", addresses=["x", "x"])),
        ("up to 64 addresses, each once", lambda: pool.add_endpoint(0.0, "b", addresses=range(65))),
        ("a weight is", lambda: pool.add_endpoint(0.0, "b", weight=0)),
        ("a status is from 0", lambda: pool.on_health(0.0, lease.connection, 4)),
        ("a status is from 0", lambda: pool.on_health(0.0, lease.connection, "x")),  # type: ignore[arg-type]
        ("a latency is seconds", lambda: pool.on_latency(0.0, lease.connection, math.nan)),
        ("a latency is seconds", lambda: pool.on_latency(0.0, lease.connection, -1.0)),
        ("load is a whole number", lambda: pool.on_latency(0.0, lease.connection, 1.0, -1)),
        ("a cause is one of", lambda: pool.on_lost(0.0, 0, "gone")),  # type: ignore[arg-type]
        ("a cause is one of", lambda: pool.on_open_failed(0.0, 0, "gone")),  # type: ignore[arg-type]
        ("settings are PoolSettings", lambda: ConnectionPool(0.0, {}, rng=Random(1))),  # type: ignore[arg-type]
    ]
    before = pool.snapshot()
    for match, call in wrong:
        with pytest.raises(UsageError, match=match):
            call()  # type: ignore[operator]
    assert pool.snapshot() == before


@pytest.mark.parametrize(
    "wrong",
    [{"max_size": 0}, {"max_size": 1.5}, {"min_size": 101}, {"min_size": -1}, {"max_per_endpoint": 0},
     {"min_per_endpoint": 101}, {"max_waiting": -1}, {"max_waiting": 1 << 20}, {"idle_timeout": 0.0},
     {"idle_timeout": math.inf}, {"max_lifetime": math.nan}, {"max_lifetime": -1.0}, {"lifetime_jitter": 0.6},
     {"leak_threshold": "x"}, {"panic_threshold": 1.1}, {"outliers": {}}],
)  # fmt: skip
def test_settings_are_checked(wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        PoolSettings(**wrong)  # type: ignore[arg-type]


def test_settings_and_snapshots_are_json() -> None:
    given = PoolSettings(max_size=7, max_lifetime=None, outliers=OutlierSettings(share=0.2))
    assert msgspec.json.decode(msgspec.json.encode(given), type=PoolSettings) == given
    driven = Driven("a", ("b", 1))
    driven.release(0.0, driven.acquire(0.0, endpoint="a"))
    told = json.loads(msgspec.json.encode(driven.pool.snapshot()))
    assert (told["size"], told["idle"], told["endpoints"], told["well"]) == (1, 1, 2, 2)
    endpoints = json.loads(msgspec.json.encode(driven.pool.endpoint_snapshots()))
    assert [one["endpoint"] for one in endpoints] == ["a", "('b', 1)"]
    assert (endpoints[0]["idle"], endpoints[0]["gate"], endpoints[1]["gate"]) == (1, "open", "one")
    assert repr(driven.pool) == (
        "<ConnectionPool: 0 in use, 1 idle, 0 opening, 0 closing of 100; 0 waiting; 2 of 2 endpoints well>"
    )


def test_time_goes_forwards_only() -> None:
    driven = Driven("a", now=10.0)
    lease = driven.acquire(5.0)
    assert lease.since == 10.0
    driven.release(7.0, lease)
    assert driven.pool.lookup(2.0, "a") == lease.connection
