# SPDX-License-Identifier: Apache-2.0
"""A link that is down, and connections that are gone before it is up."""

from __future__ import annotations

from errno import ECONNREFUSED, EHOSTDOWN, EHOSTUNREACH, ENETDOWN, ENETUNREACH

import pytest

from tests.unit.connection_world import ONE, World, warm
from userspace.connection.conductor import ConductorSettings
from userspace.connection.grading import Status
from userspace.connection.pool_settings import PoolSettings
from userspace.connection.states import State

#: Connections don't live long.
SHORT = ConductorSettings(
    pool=PoolSettings(min_size=0, min_per_endpoint=1, max_lifetime=5.0, lifetime_jitter=0.0)
)


def test_an_endpoint_without_connections_is_not_down() -> None:
    world = World(settings=SHORT)
    warm(world, "a", "b")
    conductor = world.conductor
    (old,) = [one for one in conductor.links if conductor.endpoint(one) == "a"]
    conductor.on_link(world.now, False, [old])
    world.hosts["a"].reachable = False
    world.run(30.0)
    assert old not in conductor.links  # who would say of what that it is up?
    world.hosts["a"].reachable = True
    world.run(40.0)  # a delay of reconnection
    assert [one.up for one in conductor.pool.endpoint_snapshots()] == [True, True]
    assert world.states() == {State.CONNECTED: 2}


def test_others_are_not_down() -> None:
    world = World(settings=SHORT)
    warm(world, "a", "b")
    conductor = world.conductor
    before = list(conductor.links)
    conductor.on_link(world.now, False, before)  # all of them
    world.run(30.0)  # nothing is wrong with the path, but who knows
    assert not set(before) & set(conductor.links)
    world.hosts["a"].running = False
    world.hosts["a"].reachable = False
    world.run(0.0)
    for connection in list(conductor.links):
        conductor.on_error(world.now, connection, 111)
    causes = {cause: count for cause, count in conductor.snapshot().ended.items() if cause != "expired"}
    assert causes == {"refused": 2}  # and not link_down


def test_those_who_went_down_together_come_back_together() -> None:
    world = World(settings=SHORT)
    warm(world, "a", "b")
    conductor = world.conductor
    conductor.on_link(world.now, False, list(conductor.links))
    conductor.on_link(world.now, True, [0])
    world.hosts["b"].running = False
    assert conductor.send(world.now, 1, b"x")
    world.run(1.0)
    assert conductor.snapshot().ended == {"refused": 1}  # and not link_down


@pytest.mark.parametrize("everybody", [True, False])
@pytest.mark.parametrize("errno", [EHOSTUNREACH, ENETUNREACH, ENETDOWN, EHOSTDOWN])
def test_no_way_says_nothing_of_a_peer_while_the_link_is_down(errno: int, everybody: bool) -> None:
    """Three seconds after the carrier has gone the kernel has given up looking for every neighbour."""
    world = World(settings=SHORT)
    warm(world, "a", "b")
    conductor = world.conductor
    (one,) = [number for number in conductor.links if conductor.endpoint(number) == "a"]
    conductor.on_link(world.now, False, None if everybody else [one])
    conductor.on_error(world.now, one, errno)
    assert conductor.state(one).state is State.CONNECTED
    conductor.on_link(world.now, True)
    conductor.on_error(world.now, one, errno)
    assert sum(conductor.snapshot().ended.values()) == 1


def test_who_is_open_when_the_link_is_down_already_is_not_judged() -> None:
    """Its peer's last datagram came after netlink's word."""
    world = World(settings=ONE)
    world.add("a")
    world.conductor.warm_pool(world.now)
    world.conductor.on_link(world.now, False)
    assert world.run(1.0, lambda: world.states() == {State.CONNECTED: 1})
    world.hosts["a"].reachable = False
    world.run(60.0)
    assert world.states() == {State.CONNECTED: 1}
    world.conductor.on_link(world.now, True)
    assert world.run(20.0, lambda: world.states() != {State.CONNECTED: 1})  # now it is


def test_that_nobody_listens_is_said_by_the_peer() -> None:
    world = World(settings=SHORT)
    warm(world, "a")
    world.conductor.on_link(world.now, False)
    (one,) = world.conductor.links
    world.conductor.on_error(world.now, one, ECONNREFUSED)
    assert sum(world.conductor.snapshot().ended.values()) == 1


def test_numbers_that_never_were_change_nothing() -> None:
    world = World(settings=SHORT)
    warm(world, "a", "b")
    for up in (False, True):
        world.conductor.on_link(world.now, up, [1000])
    world.conductor.on_link(world.now, False, [])
    world.run(1.0)
    assert world.states() == {State.CONNECTED: 2}
    assert all(world.conductor.monitor.status(one) is Status.HEALTHY for one in world.conductor.links)
