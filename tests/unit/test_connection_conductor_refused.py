# SPDX-License-Identifier: Apache-2.0
"""Nobody listens: what the error of one connection says of the others that go to the same place."""

from __future__ import annotations

from errno import ECONNREFUSED

from tests.unit.connection_world import World, warm
from userspace.connection.conductor import ConductorSettings
from userspace.connection.grading import Status
from userspace.connection.pool_settings import PoolSettings
from userspace.connection.slots import Lease
from userspace.connection.states import State

TEN = ConductorSettings(pool=PoolSettings(min_size=0, min_per_endpoint=10))


def test_a_process_that_is_killed_is_not_chosen_although_its_host_says_so_only_twice() -> None:
    """Linux sends six errors to a destination, and then one a second, however many connections it has."""
    world = World(settings=TEN)
    warm(world, "a", "b")
    world.run(20.0)
    conductor = world.conductor
    world.hosts["a"].reachable = False  # it is as good as gone, and silent
    mine = [one for one in range(20) if conductor.endpoint(one) == "a"]
    for connection in mine[:2]:
        conductor.on_error(world.now, connection, ECONNREFUSED)
    world.run(0.2)
    assert {conductor.monitor.status(one) for one in mine[2:]} == {Status.UNHEALTHY}
    for _ in range(10):
        lease = conductor.acquire(world.now)
        assert isinstance(lease, Lease)
        assert lease.endpoint == "b"


def test_a_single_error_makes_us_ask() -> None:
    world = World(settings=TEN)
    warm(world, "a", "b")
    world.run(20.0)
    conductor = world.conductor
    world.hosts["a"].reachable = False
    mine = [one for one in range(20) if conductor.endpoint(one) == "a"]
    conductor.on_error(world.now, mine[0], ECONNREFUSED)
    world.run(0.25)
    assert {conductor.monitor.status(one) for one in mine[1:]} == {Status.UNHEALTHY}


def test_errors_that_anybody_can_send_cost_the_others_nothing() -> None:
    world = World(settings=TEN)
    warm(world, "a")
    world.run(20.0)
    conductor = world.conductor
    conductor.on_error(world.now, 0, ECONNREFUSED)
    world.run(10.0)
    assert world.states() == {State.CONNECTED: 10}
    assert conductor.monitor.summary().healthy == 10
    assert sum(conductor.snapshot().ended.values()) == 1


def test_another_address_of_the_same_endpoint_is_not_doubted() -> None:
    world = World(settings=TEN)
    world.add("a", "192.0.2.1", "192.0.2.2")
    warm(world)
    world.run(20.0)
    conductor = world.conductor
    world.hosts["192.0.2.1"].reachable = False
    by_address: dict[object, list[int]] = {}
    for connection in range(10):
        by_address.setdefault(conductor.address(connection), []).append(connection)
    first, *others = by_address["192.0.2.1"]
    conductor.on_error(world.now, first, ECONNREFUSED)
    world.run(0.25)
    assert {conductor.monitor.status(one) for one in others} == {Status.UNHEALTHY}
    assert {conductor.monitor.status(one) for one in by_address["192.0.2.2"]} == {Status.HEALTHY}
