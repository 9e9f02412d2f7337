# SPDX-License-Identifier: Apache-2.0
"""The conductor with peers at the other end, in virtual time: when things go wrong."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Hashable
from errno import EMFILE, ENETUNREACH

import pytest

from tests.unit.connection_world import ONE, SECRET, TWO, Host, World, check, warm
from userspace.connection.backoff import Backoff, Jitter
from userspace.connection.conductor import Conductor, ConductorSettings
from userspace.connection.dialing import DialLine
from userspace.connection.grading import Status
from userspace.connection.health_report import HealthSettings
from userspace.connection.pool_settings import PoolSettings
from userspace.connection.slots import Lease
from userspace.connection.states import Cause, State
from userspace.connection.transport import Transport
from userspace.connection.udp import UdpConnection
from xdp.errors import UsageError


def test_one_tries_for_all_and_the_others_follow() -> None:
    world = World(settings=ConductorSettings(pool=PoolSettings(min_size=0, min_per_endpoint=10)))
    host = world.add("a")
    world.conductor.warm_pool(world.now)
    world.run(1.0)
    assert world.states() == {State.CONNECTED: 10}
    host.running = False
    world.attempts.clear()
    world.run(100.0)
    # One attempt at a time: five after growing delays, then every 30 s at most, never all ten.
    assert 5 <= len(world.attempts) <= 5 + 100
    assert world.states() == {State.FAILED: 10}
    assert world.gave_up == [("a", Cause.REFUSED)]
    host.running = True
    world.attempts.clear()
    assert world.run(31.0, lambda: world.states() == {State.CONNECTED: 10})
    assert len(world.attempts) == 10
    # All within the time of a few round trips after the one that tried for them.
    assert world.attempts[-1][0] - world.attempts[0][0] < 0.1


def test_attempts_grow_apart_and_go_on_for_ever() -> None:
    backoff = Backoff(attempts=3, initial=1.0, factor=2.0, cap=8.0, jitter=Jitter.NONE)
    world = World(settings=ConductorSettings(pool=ONE.pool, backoff=backoff))
    world.hosts["a"] = Host(running=False)
    warm(world, "a")
    world.run(60.0)
    times = [at - world.attempts[0][0] for at, _ in world.attempts]
    gaps = [round(after - before, 1) for before, after in itertools.pairwise(times)]
    # The first one was made at once, so the delays begin with that before the second.
    assert gaps[:5] == [2.0, 4.0, 8.0, 8.0, 8.0]
    assert world.gave_up == [("a", Cause.REFUSED)]


def test_the_end_of_a_partition_is_no_stampede() -> None:
    settings = ConductorSettings(
        pool=PoolSettings(min_size=0, min_per_endpoint=5, max_size=150), attempt_rate=50.0, attempt_burst=5
    )
    world = World(settings=settings)
    for number in range(30):
        world.add(f"host {number}")
    world.conductor.warm_pool(world.now)
    begun = world.now
    assert world.run(60.0, lambda: world.states() == {State.CONNECTED: 150})
    assert world.now - begun >= 145 / 50 - 0.1
    world.carrier = False
    world.run(40.0)
    world.carrier = True
    world.attempts.clear()
    assert world.run(60.0, lambda: world.states() == {State.CONNECTED: 150})
    times = [at for at, _ in world.attempts]
    for first in range(len(times) - 40):  # both lines together
        assert times[first + 39] - times[first] >= (40 - 2 * 5) / (2 * 50.0) - 0.02


def test_who_is_silent_is_lost_and_found() -> None:
    world = World(settings=TWO)
    warm(world, "a", "b")
    world.hosts["a"].reachable = False
    silent = world.now
    assert world.run(30.0, lambda: world.conductor.snapshot().states["connected"] == 2)
    assert world.now - silent <= 15.0
    assert world.conductor.snapshot().ended == {"lost": 2}
    assert world.conductor.lookup(world.now, "b") is not None
    assert world.conductor.lookup(world.now, "a") is None
    world.hosts["a"].reachable = True
    assert world.run(31.0, lambda: world.states() == {State.CONNECTED: 4})


def test_a_dead_process_is_failed_over_at_once_while_traffic_flows() -> None:
    world = World(settings=ConductorSettings(pool=PoolSettings(min_size=0, min_per_endpoint=1)))
    warm(world, "a", "b")
    world.hosts["a"].running = False
    killed = world.now
    last = killed
    while world.now < killed + 3.0:
        lease = world.conductor.acquire(world.now)
        assert isinstance(lease, Lease)
        world.conductor.send(world.now, lease.connection, b"x")
        world.run(0.005)
        if lease.endpoint == "a":
            last = world.now
        world.conductor.release(world.now, lease)
    assert last - killed <= 0.25


def test_a_link_that_comes_back_is_used_at_once() -> None:
    world = World(settings=ConductorSettings(pool=PoolSettings(min_size=0, min_per_endpoint=1, max_size=100)))
    warm(world, *(f"host {number}" for number in range(100)))
    world.carrier = False
    world.conductor.on_link(world.now, up=False)
    world.run(25.0)  # longer than any verdict takes
    assert world.states() == {State.CONNECTED: 100}  # silence is the link's, not theirs
    world.carrier = True
    world.conductor.on_link(world.now, up=True)
    world.run(1.0)
    told = world.conductor.monitor.summary()
    assert told.suspects == 0
    assert told.healthy == 100
    # The same without a word of the link: all were lost, and wait for their next attempt.
    world.carrier = False
    world.run(40.0)
    assert world.conductor.pool.opening_count == 100
    world.carrier = True
    world.conductor.on_link(world.now, up=True)
    assert world.run(1.0, lambda: world.states() == {State.CONNECTED: 100})


def test_attempts_without_a_link_give_nobody_up() -> None:
    world = World(settings=ONE)
    world.add("a")
    world.carrier = False
    world.conductor.on_link(world.now, up=False)
    world.conductor.warm_pool(world.now)
    world.run(60.0)
    assert world.gave_up == []
    assert set(world.conductor.snapshot().failed) == {"link_down"}
    world.carrier = True
    world.conductor.on_link(world.now, up=True)
    assert world.run(0.5, lambda: world.states() == {State.CONNECTED: 1})


def test_a_link_that_only_some_use() -> None:
    world = World(settings=ONE)
    warm(world, "a", "b")
    conductor = world.conductor
    conductor.on_link(world.now, up=False, connections=[0, 77])
    for _ in range(20):
        lease = conductor.acquire(world.now)
        assert isinstance(lease, Lease)
        assert lease.endpoint == "b"
        conductor.release(world.now, lease)
    assert conductor.lookup(world.now, "a") is None
    world.hosts["a"].reachable = False
    world.run(25.0)
    assert conductor.snapshot().ended == {}  # its silence is the link's
    assert conductor.link_up
    world.hosts["a"].reachable = True
    conductor.on_link(world.now, up=True, connections=[0])
    world.run(1.0)
    assert conductor.lookup(world.now, "a") == 0
    conductor.on_link(world.now, up=False, connections=[77])  # nobody's
    assert conductor.lookup(world.now, "a") == 0


def test_a_factory_that_cannot_is_asked_again() -> None:
    world = World(settings=TWO)
    world.refuse = OSError(EMFILE, "Too many open files")
    warm(world, "a", "b")
    world.run(60.0)
    told = world.conductor.snapshot()
    assert told.factory_errors == told.attempts == told.failed["local_error"] > 5
    assert "Too many open files" in told.last_factory_error
    assert world.gave_up == []  # it is not the peers' fault
    world.refuse = None
    assert world.run(31.0, lambda: world.states() == {State.CONNECTED: 4})


def test_a_transport_that_cannot_connect_has_failed() -> None:
    used = UdpConnection(secret=SECRET)
    used.connect(0.0)
    world = World(settings=ONE, transport=lambda *_: used)
    warm(world, "a")
    assert "connects once" in world.conductor.snapshot().last_factory_error
    check(world.conductor)


def test_a_peer_that_was_restarted_is_counted() -> None:
    world = World(settings=ONE)
    warm(world, "a")
    world.hosts["a"].restart(boot=2)
    world.run(10.0)
    assert world.conductor.snapshot().restarts == 1
    assert world.conductor.connections(world.now)[0].restarts == 1
    assert world.states() == {State.CONNECTED: 1}


def test_a_stall_of_ours_declares_nobody_dead() -> None:
    world = World(settings=TWO)
    warm(world, "a", "b")
    for _ in range(5):
        due = world.conductor.next_timeout()
        world.now += 40.0
        world.conductor.on_tick(world.now, due)
        world.conductor.on_timeout(world.now)
        world.run(3.0)
    assert world.conductor.snapshot().ended == {}
    assert world.conductor.monitor.summary().stalls >= 5


def test_callbacks_may_raise_and_call_back_in() -> None:
    told: list[Hashable] = []

    def factory(now: float, connection: int, endpoint: Hashable, address: Hashable) -> Transport:
        told.append(("made", connection))
        conductor.lookup(now, endpoint)
        return UdpConnection(secret=SECRET)

    def on_give_up(key: Hashable, cause: Cause) -> None:
        told.append((key, cause))
        conductor.remove_endpoint(world.now, key)
        raise RuntimeError("mine")

    def on_closed(connection: int) -> None:
        told.append(connection)
        assert connection not in conductor
        raise ValueError("mine, too")

    world = World()
    world.conductor = conductor = Conductor(
        world.now,
        transport=factory,
        rng=random.Random(1),
        settings=ONE,
        on_give_up=on_give_up,
        on_closed=on_closed,
    )
    world.hosts["a"] = Host(running=False)
    warm(world, "a")
    world.run(30.0)
    assert told[-2:] == [("a", Cause.REFUSED), 0]
    told_of = conductor.snapshot()
    assert told_of.callback_errors == 2
    assert told_of.last_callback_error == "RuntimeError: mine"
    assert len(conductor) == 0


def test_health_callbacks_may_take_the_connection_away() -> None:
    world = World(settings=ONE)
    warm(world, "a", "b")
    conductor = world.conductor
    removed: list[Hashable] = []

    def on_status(connection: int, old: Status, new: Status) -> None:
        if not removed and new > old:
            removed.append(conductor.endpoint(connection))
            conductor.remove_endpoint(world.now, removed[0])

    conductor.monitor.subscribe(on_status)
    world.hosts["a"].reachable = False
    world.run(60.0)
    assert removed == ["a"]
    assert world.states() == {State.CONNECTED: 1}


def test_an_attempt_that_takes_too_long_is_over() -> None:
    class Deaf(UdpConnection):
        """Asks, and never gives up."""

        def next_timeout(self) -> float:
            return math.inf

    settings = ConductorSettings(pool=ONE.pool, attempt_timeout=1.0)
    world = World(settings=settings, transport=lambda *_: Deaf(secret=SECRET))
    world.hosts["a"] = Host(reachable=False)
    warm(world, "a")
    world.run(3.0)
    told = world.conductor.snapshot()
    assert told.failed == {"timed_out": told.attempts - told.states["connecting"]}
    assert told.attempts >= 3


def test_an_attempt_that_was_sent_into_nothing_begins_anew_when_the_link_is_back() -> None:
    settings = ConductorSettings(pool=ONE.pool, attempt_timeout=60.0)
    world = World(settings=settings)
    world.carrier = False
    world.add("a", "first", "second", "third")
    world.conductor.warm_pool(world.now)
    world.run(0.05)
    world.conductor.on_link(world.now, up=True)  # so it seemed
    world.run(2.0)
    assert len(world.attempts) == 2
    world.carrier = True
    world.conductor.on_link(world.now, up=True)
    world.pump()
    assert len(world.attempts) == 3
    assert world.conductor.snapshot().failed == {"link_up": 2}
    # That was not the addresses' fault, so the third is not needed.
    assert world.conductor.address(0) in {"first", "second"}
    assert world.run(world.rtt, lambda: world.states() == {State.CONNECTED: 1})
    assert world.conductor.state(0).history()[-2].cause is Cause.LINK_UP


def test_questions_that_cannot_be_sent_prove_nothing() -> None:
    class Mute(UdpConnection):
        """Has no room for pings, once it is open."""

        def ping(self, now: float, sequence: int) -> bool:
            return False

    world = World(settings=ONE, transport=lambda *_: Mute(secret=SECRET))
    warm(world, "a")
    world.run(10.0)
    told = world.conductor.monitor.summary()
    assert told.asked == told.withdrawn > 0


def test_no_way_is_told_as_such() -> None:
    world = World(settings=ONE)
    warm(world, "a")
    world.conductor.on_error(world.now, 0, ENETUNREACH)
    assert world.conductor.state(0).cause is Cause.REFUSED
    check(world.conductor)


@pytest.mark.parametrize("now", [math.nan, math.inf, -math.inf, 1e18])
def test_what_is_no_time_is_refused(now: float) -> None:
    world = World(settings=ONE)
    warm(world, "a")
    conductor = world.conductor
    before = conductor.snapshot()
    calls: tuple[Callable[[], object], ...] = (
        lambda: conductor.lookup(now, "a"),
        lambda: conductor.acquire(now),
        lambda: conductor.send(now, 0, b"x"),
        lambda: conductor.receive(now, 0, b"x"),
        lambda: conductor.on_error(now, 0, 111),
        lambda: conductor.on_link(now, up=False),
        lambda: conductor.on_timeout(now),
        lambda: conductor.take_datagrams(now),
        lambda: conductor.warm_pool(now),
        lambda: conductor.drain(now),
        lambda: conductor.shutdown(now, 0.0),
        lambda: conductor.on_tick(now, 0.0),
        lambda: conductor.connections(now),
        lambda: conductor.add_endpoint(now, "b"),
        lambda: conductor.remove_endpoint(now, "a"),
    )
    for call in calls:
        with pytest.raises(UsageError):
            call()
    assert conductor.snapshot() == before


def test_arguments_out_of_range_are_refused() -> None:
    with pytest.raises(UsageError, match="pool is PoolSettings"):
        ConductorSettings(pool=7)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="999 connections are watched at most"):
        ConductorSettings(pool=PoolSettings(max_size=1000), health=HealthSettings(max_connections=999))
    make = World(settings=ONE)._transport
    for wrong in ("settings", None):
        with pytest.raises(UsageError, match="settings are"):
            Conductor(0.0, transport=make, rng=random.Random(1), settings=wrong)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="attempts"):
        Conductor(0.0, transport=make, rng=random.Random(1), settings=ConductorSettings(attempt_rate=0.0))
    world = World(settings=ONE)
    for limit in (-1, 1.5, True):
        with pytest.raises(UsageError, match="a limit"):
            world.conductor.connections(world.now, limit=limit)  # type: ignore[arg-type]
    with pytest.raises(UsageError):
        world.conductor.shutdown(world.now, math.nan)
    world.add("a")  # it was not drained by that


def test_the_same_seed_does_the_same() -> None:
    def run(seed: int) -> list[tuple[float, Hashable]]:
        world = World(seed, settings=TWO)
        warm(world, "a", "b", "c")
        world.carrier = False
        world.run(30.0)
        world.carrier = True
        world.run(30.0)
        return world.attempts

    assert run(5) == run(5) != run(6)


def test_the_line_keeps_to_its_rate_and_order() -> None:
    line = DialLine(0.0, rate=100.0, burst=2)
    for number in (3, 1, 2, 5, 1):
        line.add(number)
    assert 5 in line
    assert len(line) == 4
    assert [line.take(0.0) for _ in range(3)] == [3, 1, None]
    assert line.next_timeout() == pytest.approx(0.01)
    line.drop(2)
    line.drop(99)
    assert line.take(0.01) == 5
    assert line.take(1.0) is None
    assert line.next_timeout() == math.inf
    assert repr(line) == "<DialLine 100/s, 0 in line>"
