# SPDX-License-Identifier: Apache-2.0
"""The conductor with peers at the other end, in virtual time: what follows from what."""

from __future__ import annotations

import random
from collections.abc import Hashable

import msgspec
import pytest

from tests.unit.connection_world import ONE, SECRET, TWO, Host, World, check, warm
from userspace.connection import conductor_core
from userspace.connection.conductor import ConductorSettings
from userspace.connection.grading import Status
from userspace.connection.pool_settings import PoolSettings
from userspace.connection.slots import Lease
from userspace.connection.states import Cause, State
from userspace.connection.transport import Transport
from userspace.connection.udp import UdpConnection
from userspace.connection.waiters import PoolClosedError, Ticket
from xdp.errors import UsageError


def test_connections_are_opened_watched_and_closed() -> None:
    world = World(settings=TWO)
    warm(world, "a", "b", "c")
    assert world.states() == {State.CONNECTED: 6}
    assert world.conductor.monitor.summary().healthy == 6
    sent = world.sent
    world.run(60.0)
    # A heartbeat and its answer every 4 to 5 s.
    assert 6 * 60 / 5 <= world.sent - sent <= 6 * (60 / 4 + 1)
    assert world.conductor.snapshot().ended == {}
    world.conductor.shutdown(world.now, world.now)
    world.run(0.0)
    assert world.conductor.closed
    assert sorted(world.gone) == list(range(6))
    assert len(world.conductor) == len(world.conductor.monitor) == len(world.conductor.reconnection) == 0


def test_messages_go_both_ways() -> None:
    world = World(settings=ONE)
    host = world.add("a", "192.0.2.1")
    assert world.conductor.lookup(world.now, "a") is None  # and one is opened
    world.run(1.0)
    connection = world.conductor.lookup(world.now, "a")
    assert connection is not None
    assert world.conductor.send(world.now, connection, b"echo 1")
    assert world.conductor.send(world.now, connection, b"2")
    world.run(1.0)
    assert host.got == [b"echo 1", b"2"]
    assert world.messages == [(connection, "a", b"echo 1")]
    assert world.conductor.address(connection) == "192.0.2.1"
    assert world.conductor.endpoint(connection) == "a"
    told = world.conductor.snapshot()
    assert (told.sent, told.received, told.refused) == (2, 1, 0)


def test_messages_that_nobody_takes_are_lost_at_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conductor_core, "MESSAGES_WAITING", 4)
    world = World(settings=ONE)
    warm(world, "a")
    conductor = world.conductor
    for _ in range(7):
        conductor.receive(world.now, 0, b"x")
    assert len(conductor.take_messages()) == 4
    assert (conductor.received, conductor.lost) == (4, 3)


def test_what_is_sent_to_nobody_is_refused() -> None:
    world = World(settings=ONE)
    world.hosts["a"] = Host(reachable=False)
    warm(world, "a")
    conductor = world.conductor
    assert conductor.state(0).state is State.CONNECTING
    assert not conductor.send(world.now, 0, b"x")  # not open
    assert not conductor.send(world.now, 99, b"x")  # not there
    conductor.receive(world.now, 99, b"x")
    conductor.on_error(world.now, 99, 111)
    assert (conductor.refused, conductor.stray) == (2, 2)
    for call in (conductor.state, conductor.transport, conductor.endpoint, conductor.address):
        with pytest.raises(UsageError, match="no connection 99"):
            call(99)


def test_a_connection_keeps_its_number_and_tells_its_history() -> None:
    world = World(settings=ONE)
    warm(world, "a")
    world.hosts["a"].running = False
    world.run(6.0)  # a heartbeat is refused
    world.hosts["a"].running = True
    assert world.run(60.0, lambda: world.states() == {State.CONNECTED: 1})
    state = world.conductor.state(0)
    causes = [one.cause for one in state.history()]
    assert causes[:3] == [Cause.ASKED, Cause.OPENED, Cause.REFUSED]
    assert causes[-2:] == [Cause.RETRY, Cause.OPENED]
    info = world.conductor.connections(world.now)[0]
    assert info.connection == 0
    assert info.state == "connected"
    assert info.phase == "idle"
    assert info.transport == "UdpConnection"
    assert info.status == "healthy"
    assert info.attempts == world.conductor.attempts
    assert info.history[0].endswith("disconnected -> connecting: asked")
    msgspec.json.encode([info, world.conductor.snapshot()])
    assert world.gone == []


def test_health_decides_who_is_chosen() -> None:
    world = World(settings=TWO)
    warm(world, "a", "b")
    # For "a" every second datagram is lost.
    lost = random.Random(3)
    keep = world.hosts["a"].receive
    world.hosts["a"].receive = lambda *args: keep(*args) if lost.random() < 0.5 else []  # type: ignore[method-assign]
    conductor = world.conductor
    assert world.run(
        600.0,
        lambda: all(
            conductor.monitor.status(one.connection) != Status.HEALTHY
            for one in conductor.connections(world.now)
            if one.endpoint == "a" and one.status is not None
        ),
    )
    for _ in range(50):
        lease = conductor.acquire(world.now)
        assert isinstance(lease, Lease)
        assert lease.endpoint == "b"
        conductor.release(world.now, lease)


def test_the_nearest_is_chosen_more_often() -> None:
    world = World(settings=ONE)
    warm(world, "a", "b")
    for connection, latency in ((0, 0.1), (1, 0.001)):
        world.conductor.pool.on_latency(world.now, connection, latency)
    chosen = []
    for _ in range(50):
        lease = world.conductor.acquire(world.now)
        assert isinstance(lease, Lease)
        chosen.append(lease.endpoint)
        world.conductor.release(world.now, lease)
    assert chosen.count("b") > 40


def test_latency_is_told_to_the_pool() -> None:
    world = World(settings=ONE, rtt=0.2)
    warm(world, "a")
    world.run(10.0)
    assert 0.1 < world.conductor.pool.endpoint_snapshots()[0].latency < 0.21


def test_who_waits_is_served_when_the_peer_is_back() -> None:
    world = World(settings=ONE)
    host = world.add("a")
    host.reachable = False
    ticket = world.conductor.acquire(world.now, endpoint="a", deadline=world.now + 60.0)
    late = world.conductor.acquire(world.now, endpoint="a", deadline=world.now + 5.0)
    assert isinstance(ticket, Ticket)
    assert isinstance(late, Ticket)
    world.run(8.0)
    assert world.grants == [late]
    host.reachable = True
    assert world.run(31.0, lambda: ticket in world.grants)
    lease = ticket.result()
    assert world.conductor.send(world.now, lease.connection, b"x")
    world.conductor.release(world.now, lease)
    check(world.conductor)


def test_a_lease_whose_connection_is_lost_is_void() -> None:
    world = World(settings=ONE)
    warm(world, "a")
    lease = world.conductor.acquire(world.now)
    assert isinstance(lease, Lease)
    world.hosts["a"].running = False
    world.conductor.send(world.now, lease.connection, b"x")
    world.run(1.0)
    assert lease.lost
    world.conductor.release(world.now, lease)
    check(world.conductor)


def test_cancelled_tickets_leave_nothing() -> None:
    world = World(settings=ConductorSettings(pool=PoolSettings(min_size=0, max_size=1)))
    world.add("a")
    tickets = [world.conductor.acquire(world.now) for _ in range(3)]
    world.run(1.0)
    assert world.grants == tickets[:1]
    for ticket in reversed(tickets):
        assert isinstance(ticket, Ticket)
        world.conductor.cancel(world.now, ticket)
    world.run(0.0)
    told = world.conductor.snapshot().pool
    assert (told.idle, told.in_use, told.waiting, told.cancelled) == (1, 0, 0, 2)


def test_an_endpoint_that_is_removed_is_forgotten_when_its_leases_are_back() -> None:
    world = World(settings=TWO)
    warm(world, "a", "b")
    conductor = world.conductor
    lease = conductor.acquire(world.now, endpoint="a")
    assert isinstance(lease, Lease)
    conductor.remove_endpoint(world.now, "a")
    assert conductor.state(lease.connection).state is State.DRAINING
    assert conductor.send(world.now, lease.connection, b"what was begun")
    world.run(1.0)
    assert world.hosts["a"].got == [b"what was begun"]
    conductor.release(world.now, lease)
    check(conductor)
    assert lease.connection not in conductor
    assert len(conductor) == 2
    with pytest.raises(UsageError, match="no endpoint"):
        conductor.lookup(world.now, "a")
    # What was lost while it drained is closed, and nobody wants it back.
    lease = conductor.acquire(world.now, endpoint="b")
    assert isinstance(lease, Lease)
    conductor.remove_endpoint(world.now, "b")
    conductor.on_error(world.now, lease.connection, 111)
    check(conductor)
    assert len(conductor) == len(conductor.reconnection) == 0
    conductor.release(world.now, lease)


def test_an_endpoint_that_comes_again() -> None:
    world = World(settings=ONE)
    warm(world, "a")
    lease = world.conductor.acquire(world.now, endpoint="a")
    assert isinstance(lease, Lease)
    world.conductor.remove_endpoint(world.now, "a")
    world.add("a")
    world.run(1.0)
    assert world.states() == {State.CONNECTED: 1, State.DRAINING: 1}
    world.conductor.release(world.now, lease)
    world.run(1.0)
    assert world.states() == {State.CONNECTED: 1}


def test_endpoints_that_fail_are_not_tried_any_more_when_nobody_wants_them() -> None:
    world = World(settings=ConductorSettings(pool=PoolSettings(min_size=0, max_size=1)))
    world.hosts["a"] = Host(reachable=False)
    world.add("a")
    world.conductor.lookup(world.now, "a")
    world.run(10.0)
    assert len(world.conductor.reconnection) == 1
    world.add("b")
    world.conductor.lookup(world.now, "b")  # takes the place
    world.run(60.0)
    assert world.states() == {State.CONNECTED: 1}
    assert len(world.conductor.reconnection) == 0


def test_draining_waits_for_borrowers_and_shutdown_does_not() -> None:
    world = World(settings=TWO)
    warm(world, "a")
    conductor = world.conductor
    lease = conductor.acquire(world.now)
    assert isinstance(lease, Lease)
    conductor.drain(world.now)
    conductor.drain(world.now)
    assert world.states() == {State.DRAINING: 1}
    assert "draining" in repr(conductor)
    with pytest.raises(PoolClosedError):
        conductor.acquire(world.now)
    with pytest.raises(PoolClosedError):
        conductor.add_endpoint(world.now, "c")
    conductor.shutdown(world.now, world.now + 1.0)
    world.run(2.0)
    assert conductor.closed
    assert lease.lost
    assert "closed" in repr(conductor)
    conductor.release(world.now, lease)
    conductor.remove_endpoint(world.now, "a")


def test_idle_connections_are_closed() -> None:
    pool = PoolSettings(min_size=0, idle_timeout=10.0)
    world = World(settings=ConductorSettings(pool=pool))
    world.add("a")
    world.conductor.lookup(world.now, "a")
    world.run(5.0)
    assert world.states() == {State.CONNECTED: 1}
    assert world.conductor.cleanup_idle_connections(world.now) == 0
    world.run(30.0)
    assert world.states() == {}
    assert world.gone == [0]
    assert world.conductor.snapshot().ended == {"idle": 1}


def test_a_factory_may_remove_an_endpoint_that_is_about_to_be_tried() -> None:
    def factory(now: float, connection: int, endpoint: Hashable, address: Hashable) -> Transport:
        del connection, address
        if endpoint == "a":
            world.conductor.remove_endpoint(now, "b")
        return UdpConnection(secret=SECRET)

    world = World(settings=ONE, transport=factory)
    world.add("a")
    world.add("b")
    world.conductor.warm_pool(world.now)
    world.run(1.0)
    assert world.states() == {State.CONNECTED: 1}
    assert set(world.conductor.peers) == {"a"}
    assert world.gone == [1]


def test_who_stands_in_line_does_not_try_what_has_failed_meanwhile() -> None:
    settings = ConductorSettings(
        pool=PoolSettings(min_size=0, min_per_endpoint=20), attempt_rate=1.0, attempt_burst=2
    )
    world = World(settings=settings)
    host = world.add("a")
    world.conductor.warm_pool(world.now)
    world.run(2.0)
    assert world.conductor.snapshot().in_line > 10
    host.running = False
    world.conductor.on_error(world.now, 0, 111)
    world.attempts.clear()
    world.run(30.0)
    # Not one a second from the line, but one of all of them after delays that grow.
    assert world.conductor.snapshot().in_line == 0
    assert len(world.attempts) < 15
    assert world.conductor.snapshot().pool.opening == 20
