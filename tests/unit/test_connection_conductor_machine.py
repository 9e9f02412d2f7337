# SPDX-License-Identifier: Apache-2.0
"""The conductor in any order of events: counts add up at any time, and in the end all is well or gone."""

from __future__ import annotations

import math
from errno import EMFILE

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.unit.connection_world import Host, World, check
from userspace.connection.backoff import Backoff
from userspace.connection.conductor import ConductorSettings
from userspace.connection.pool_settings import PoolSettings
from userspace.connection.slots import Lease
from userspace.connection.states import State
from userspace.connection.waiters import PoolFullError, Ticket, TicketState

KEYS = st.sampled_from(["a", "b", "c", "d"])
SETTINGS = ConductorSettings(
    pool=PoolSettings(
        min_size=2, max_size=6, max_per_endpoint=3, max_waiting=4, idle_timeout=20.0, max_lifetime=90.0
    ),
    backoff=Backoff(attempts=3, cap=10.0),
    attempt_rate=20.0,
    attempt_burst=2,
)


class Anything(RuleBasedStateMachine):
    """Endpoints, callers and a network that do what they like."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World(1, SETTINGS)
        self.conductor = self.world.conductor
        self.endpoints: set[str] = set()
        self.leases: list[Lease] = []
        self.tickets: list[Ticket] = []

    @rule(key=KEYS, weight=st.integers(1, 3), moved=st.booleans())
    def add(self, key: str, weight: int, *, moved: bool) -> None:
        addresses = [f"{key}2", f"{key}1"] if moved else [f"{key}1"]
        self.world.add(key, *addresses, weight=weight)
        self.endpoints.add(key)

    @precondition(lambda self: self.endpoints)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.endpoints)))
        self.endpoints.remove(key)
        self.conductor.remove_endpoint(self.world.now, key)

    @rule()
    def warm(self) -> None:
        self.conductor.warm_pool(self.world.now)

    @rule(patience=st.sampled_from([0.5, 5.0, math.inf]), key=st.none() | KEYS)
    def acquire(self, patience: float, key: str | None) -> None:
        world = self.world
        if key is not None and key not in self.endpoints:
            return
        try:
            got = self.conductor.acquire(world.now, endpoint=key, deadline=world.now + patience)
        except PoolFullError:
            assert self.conductor.pool.waiting_count + len(world.grants) >= 0
            return
        if isinstance(got, Lease):
            self.leases.append(got)
        else:
            self.tickets.append(got)

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), broken=st.booleans())
    def release(self, data: st.DataObject, *, broken: bool) -> None:
        lease = self.leases.pop(data.draw(st.integers(0, len(self.leases) - 1)))
        self.conductor.release(self.world.now, lease, broken=broken)

    @precondition(lambda self: self.tickets)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        ticket = self.tickets.pop(data.draw(st.integers(0, len(self.tickets) - 1)))
        self.conductor.cancel(self.world.now, ticket)

    @rule(key=KEYS)
    def use(self, key: str) -> None:
        if key in self.endpoints:
            connection = self.conductor.lookup(self.world.now, key)
            if connection is not None:
                assert self.conductor.endpoint(connection) == key
                assert self.conductor.state(connection).state is State.CONNECTED
                assert self.conductor.send(self.world.now, connection, b"echo")

    @rule(seconds=st.sampled_from([0.0, 0.01, 0.3, 3.0, 20.0]))
    def wait(self, seconds: float) -> None:
        self.world.run(seconds)

    @rule(seconds=st.sampled_from([0.5, 30.0]))
    def stall(self, seconds: float) -> None:
        self.world.now += seconds

    @rule(key=KEYS, number=st.integers(1, 2), running=st.booleans(), reachable=st.booleans())
    def host(self, key: str, number: int, *, running: bool, reachable: bool) -> None:
        host = self.world.hosts.setdefault(f"{key}{number}", Host())
        host.running, host.reachable = running, reachable

    @rule(key=KEYS, boot=st.integers(0, 9))
    def restart(self, key: str, boot: int) -> None:
        self.world.hosts.setdefault(f"{key}1", Host()).restart(boot)

    @rule(up=st.booleans(), told=st.booleans())
    def link(self, *, up: bool, told: bool) -> None:
        self.world.carrier = up
        if told:
            self.conductor.on_link(self.world.now, up=up)

    @rule(up=st.booleans(), numbers=st.sets(st.integers(0, 12)))
    def some_link(self, numbers: set[int], *, up: bool) -> None:
        self.conductor.on_link(self.world.now, up=up, connections=numbers)

    @rule(refuse=st.booleans())
    def descriptors(self, *, refuse: bool) -> None:
        self.world.refuse = OSError(EMFILE, "Too many open files") if refuse else None

    @rule(number=st.integers(0, 12), errno=st.sampled_from([111, 113, 101, 90]))
    def icmp(self, number: int, errno: int) -> None:
        self.conductor.on_error(self.world.now, number, errno)

    @rule(number=st.integers(0, 12), data=st.binary(max_size=40) | st.just(b"SLHB" + bytes(28)))
    def noise(self, number: int, data: bytes) -> None:
        self.conductor.receive(self.world.now, number, data)

    @rule()
    def cleanup(self) -> None:
        self.conductor.cleanup_idle_connections(self.world.now)

    @invariant()
    def counts_add_up(self) -> None:
        self.world.pump()
        check(self.conductor)
        for ticket in self.world.grants:
            if ticket in self.tickets:
                self.tickets.remove(ticket)
                if ticket.state is TicketState.GRANTED:
                    self.leases.append(ticket.result())
        self.world.grants.clear()
        held = [lease for lease in self.leases if not lease.lost]
        assert len({lease.connection for lease in held}) == len(held) == self.conductor.pool.active_count
        assert all(lease.connection in self.conductor for lease in held)

    def teardown(self) -> None:
        world, conductor = self.world, self.conductor
        # The network is well again.
        world.refuse, world.carrier = None, True
        for host in world.hosts.values():
            host.running = host.reachable = True
        conductor.on_link(world.now, up=True)
        for lease in self.leases:
            conductor.release(world.now, lease)
        self.leases.clear()
        conductor.warm_pool(world.now)
        world.run(30.0)
        self.counts_add_up()
        # Nobody waits while everybody is there, and the minimum is open.
        if self.endpoints:
            assert not self.tickets
            assert conductor.pool.size >= 2
            assert conductor.pool.opening_count == 0, world.conductor.connections(world.now)
        conductor.shutdown(world.now, world.now)
        world.run(1.0)
        for lease in self.leases:
            conductor.release(world.now, lease)
        assert conductor.closed
        assert not conductor.links
        assert set(conductor.peers) == self.endpoints
        assert not len(conductor.monitor) + len(conductor.reconnection) + len(conductor.line)
        assert sorted(world.gone) == list(range(conductor.pool.snapshot().created))


TestAnything = Anything.TestCase
TestAnything.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
