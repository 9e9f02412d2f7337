# SPDX-License-Identifier: Apache-2.0
"""The connection cache on a conductor with peers, in virtual time."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.connection_world import Host, World, check
from userspace.connection import cache as cache_module
from userspace.connection.cache import GRACE, CacheSettings, ConnectionCache
from userspace.connection.conductor import ConductorSettings
from userspace.connection.health_report import HealthSettings
from userspace.connection.slots import Lease
from userspace.connection.states import State
from userspace.connection.waiters import PoolClosedError
from xdp.errors import UsageError


class Cached(World):
    """Hosts at all addresses that are asked for, and a cache."""

    def __init__(self, rules: CacheSettings | None = None) -> None:
        rules = rules if rules is not None else CacheSettings()
        super().__init__(settings=rules.conductor())
        self.cache = ConnectionCache(self.now, self.conductor, rules)

    def get(self, address: object) -> int | None:
        self.hosts.setdefault(str(address), Host())
        return self.cache.get(self.now, str(address))

    def pass_time(self, seconds: float) -> None:
        """The cache's own timer as well."""
        end = self.now + seconds
        while (at := self.cache.next_timeout()) <= end:
            self.run(max(0.0, at - self.now))
            self.cache.on_timeout(self.now)
            assert self.cache.next_timeout() > self.now
        self.run(end - self.now)

    def audit(self) -> None:
        check(self.conductor)
        told = self.cache.snapshot()
        assert told.gets == told.hits + told.misses + told.full
        assert told.added == told.addresses + told.evicted + told.expired + told.renewed + told.dropped
        assert told.addresses == len(self.cache) <= self.cache.settings.addresses
        assert len(self.conductor) <= told.addresses * self.cache.settings.connections


def test_the_first_live_one_is_given_and_the_others_follow() -> None:
    world = Cached(CacheSettings(connections=4))
    assert world.get("a") is None
    world.pump()
    assert len(world.attempts) == 1
    world.run(world.rtt)
    assert world.get("a") == 0
    world.run(1.0)
    assert world.states() == {State.CONNECTED: 4}
    assert {world.get("a") for _ in range(100)} == {0, 1, 2, 3}
    world.audit()
    assert world.cache.snapshot().misses == 1
    assert repr(world.cache) == "<ConnectionCache: 1 of 1024 addresses, 4 connections idle>"


def test_warm_addresses_are_there_when_they_are_asked_for() -> None:
    world = Cached()
    for number in range(100):
        world.hosts[str(number)] = Host()
    assert world.cache.warm(world.now, map(str, range(100))) == 0
    world.run(1.0)
    assert world.cache.warm(world.now, map(str, range(100))) == 100
    assert all(world.get(number) is not None for number in range(100))
    assert len(world.conductor) == 200
    assert world.cache.snapshot().gets == 100
    world.audit()


def test_messages_are_sent_when_there_is_a_connection() -> None:
    world = Cached()
    host = world.hosts["a"] = Host()
    assert not world.cache.send(world.now, "a", b"too early")
    world.run(1.0)
    assert world.cache.send(world.now, "a", b"in time")
    world.run(1.0)
    assert host.got == [b"in time"]


def test_who_is_worth_least_has_to_go() -> None:
    world = Cached(CacheSettings(addresses=4, connections=1))
    for number in range(4):
        world.get(number)
    world.run(1.0)
    for number, times in enumerate((20, 30, 5, 10)):
        for _ in range(times):
            assert world.get(number) is not None
    world.run(GRACE)
    world.get("new")
    assert "2" not in world.cache
    world.run(GRACE)
    for _ in range(20):
        assert world.get("new") is not None
    # What works badly is worth less, whatever it is used.
    world.hosts["1"].reachable = False
    world.run(20.0)
    for _ in range(50):
        assert world.get(1) is None
    world.run(GRACE)
    world.get("newer")
    assert "1" not in world.cache
    # Use is forgotten.
    world.run(600.0)
    for address in ("3", "new", "newer"):
        world.get(address)
    world.run(GRACE)
    world.get("newest")
    assert "0" not in world.cache
    assert world.cache.snapshot().evicted == 3
    world.audit()


def test_those_who_are_unwell_go_before_the_others() -> None:
    world = Cached(CacheSettings(addresses=2, connections=1))
    for number in range(2):
        world.get(number)
    world.run(1.0)
    lost = random.Random(1)
    keep = world.hosts["1"].receive
    world.hosts["1"].receive = lambda *args: keep(*args) if lost.random() < 0.6 else []  # type: ignore[method-assign]
    world.run(300.0)
    for _ in range(4):
        world.get(1)
    world.get(0)
    world.get(0)
    world.get(0)
    world.run(GRACE)
    assert world.conductor.monitor.health(world.now, 1).status != "healthy"
    world.get("new")
    assert "1" not in world.cache


def test_when_all_are_in_use_nobody_has_to_go() -> None:
    world = Cached(CacheSettings(addresses=10, connections=1))
    for _ in range(5):
        for number in range(20):
            world.get(number)
            world.run(0.01)
    assert world.cache.snapshot().evicted == 0
    assert world.cache.snapshot().full == 50
    assert world.cache.warm(world.now, ["20", "0"]) == 1
    assert "20" not in world.cache
    world.audit()


def test_addresses_that_nobody_asks_for_are_forgotten() -> None:
    world = Cached(CacheSettings(idle_timeout=60.0))
    world.get("a")
    world.get("b")
    for _ in range(10):
        world.pass_time(20.0)
        assert world.get("a") is not None
    assert "b" not in world.cache
    assert world.cache.snapshot().expired == 1
    world.pass_time(80.0)
    assert len(world.cache) == len(world.conductor) == 0
    assert world.cache.next_timeout() == math.inf
    world.audit()


def test_without_an_idle_timeout_nothing_is_forgotten() -> None:
    world = Cached(CacheSettings(idle_timeout=None))
    world.get("a")
    world.run(10_000.0)
    assert world.cache.next_timeout() == math.inf
    world.cache.on_timeout(world.now)
    assert world.get("a") is not None
    assert world.conductor.snapshot().ended.keys() <= {"expired"}


def test_another_identity_closes_everything() -> None:
    world = Cached()
    for number in range(10):
        world.get(number)
    world.run(1.0)
    lease = world.conductor.acquire(world.now, endpoint="3")
    assert isinstance(lease, Lease)
    world.attempts.clear()
    assert world.cache.renew(world.now) == 10
    assert world.states() == {State.DRAINING: 1}
    world.conductor.release(world.now, lease)
    assert len(world.conductor) == len(world.cache) == 0
    assert world.attempts == []
    world.get(1)
    world.run(1.0)
    assert world.get(1) is not None
    assert len(world.attempts) == 2
    world.audit()


def test_dropping_one() -> None:
    world = Cached()
    world.get("a")
    world.run(1.0)
    assert world.cache.drop(world.now, "a")
    assert not world.cache.drop(world.now, "a")
    assert len(world.conductor) == 0
    world.audit()


def test_addresses_that_do_not_answer_are_not_asked_all_the_time() -> None:
    world = Cached()
    world.hosts["a"] = Host(running=False)
    for _ in range(3000):
        assert world.get("a") is None
        world.run(0.01)
    assert 5 <= len(world.attempts) <= 12
    world.audit()


def test_a_closed_conductor_says_so() -> None:
    world = Cached()
    world.get("a")
    world.conductor.drain(world.now)
    for address in ("a", "b"):
        with pytest.raises(PoolClosedError):
            world.get(address)
    world.audit()


def test_what_can_be_no_address_or_time_is_refused() -> None:
    world = Cached()
    world.get("a")
    wrong: list[Any] = [[], None]
    for address in wrong:
        with pytest.raises(UsageError):
            world.cache.get(world.now, address)
        with pytest.raises(UsageError):
            world.cache.warm(world.now, [address])
        with pytest.raises(UsageError):
            world.cache.drop(world.now, address)
    calls: list[Callable[[float], object]] = [
        lambda now: world.cache.get(now, "a"),
        lambda now: world.cache.get(now, "b"),
        lambda now: world.cache.warm(now, ["b"]),
        lambda now: world.cache.drop(now, "a"),
        world.cache.renew,
        world.cache.on_timeout,
    ]
    for now in (math.nan, math.inf):
        for call in calls:
            with pytest.raises(UsageError):
                call(now)
    assert list(world.cache._entries) == ["a"]
    world.audit()


def test_settings_out_of_range_are_refused() -> None:
    wrong: list[dict[str, Any]] = [
        {"addresses": 0},
        {"addresses": 1 << 20},
        {"connections": 0},
        {"idle_timeout": math.nan},
    ]
    for options in wrong:
        with pytest.raises(UsageError):
            CacheSettings(**options)
    rules = CacheSettings()
    with pytest.raises(UsageError, match="not made for such a cache"):
        ConnectionCache(0.0, World().conductor)
    world = World(settings=rules.conductor())
    world.add("a")
    with pytest.raises(UsageError, match="not made for such a cache"):
        ConnectionCache(0.0, world.conductor, rules)


def test_the_rest_of_the_settings_is_kept() -> None:
    base = ConductorSettings(health=HealthSettings(interval=2.0, max_connections=200), attempt_rate=77.0)
    made = CacheSettings(addresses=5000, connections=8).conductor(base)
    assert (made.attempt_rate, made.health.interval) == (77.0, 2.0)
    assert made.pool.max_size == made.health.max_connections == 40_000


#: Whom to ask for, and how long to wait then.
STEPS = st.lists(st.tuples(st.integers(0, 9), st.sampled_from([0.0, 0.05, 1.5, 40.0])), max_size=40)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 9), st.sampled_from([0.0, 0.05, 1.5, 40.0])), max_size=40), st.data()
)
def test_whatever_is_asked_for(steps: list[tuple[int, float]], data: st.DataObject) -> None:
    world = Cached(CacheSettings(addresses=4, connections=2, idle_timeout=50.0))
    last: dict[str, float] = {}
    for number, wait in steps:
        before = set(world.cache._entries)
        connection = world.get(number)
        if str(number) in world.cache:
            last[str(number)] = world.now
        if connection is not None:
            assert world.conductor.endpoint(connection) == str(number)
            assert world.conductor.state(connection).state is State.CONNECTED
        for gone in before - set(world.cache._entries):
            assert world.now - last[str(gone)] >= cache_module.GRACE
        world.hosts[str(number)].reachable = data.draw(st.booleans(), label="reachable")
        world.pass_time(wait)
        world.audit()
    world.cache.renew(world.now)
    world.run(0.0)
    world.audit()
    assert len(world.conductor) == len(world.conductor.peers) == len(world.conductor.reconnection) == 0
