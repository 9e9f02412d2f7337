# SPDX-License-Identifier: Apache-2.0
"""The conductor over QUIC, against aioquic's server, in virtual time."""

from __future__ import annotations

from collections.abc import Hashable

import pytest

from tests.unit.connection_quic_peer import CLIENT, SECRET, SETTINGS, Server
from tests.unit.connection_world import ONE, Host, World, check
from userspace.connection.heartbeat import PROBE, is_heartbeat
from userspace.connection.quic import QuicConnection
from userspace.connection.quic_session import QuicSession
from userspace.connection.slots import Lease
from userspace.connection.states import Cause, State
from userspace.connection.transport import Transport


class QuicHost(Host):
    """An address at which a QUIC server listens."""

    def __init__(self, server: Server | None = None) -> None:
        super().__init__()
        self.server = server if server is not None else Server()
        self.connection = -1
        #: The kernel program of the host answers probes.
        self.kernel = False

    def receive(self, now: float, connection: int, data: bytes) -> list[bytes]:
        self.connection = connection
        if is_heartbeat(data):
            assert data[4] == PROBE
            return [data[:4] + b"\x02" + data[5:]] if self.kernel else []
        self.server.receive(now, data, "client")
        return [payload for payload, _ in self.server.take(now)]

    def next_timeout(self) -> float:
        return self.server.next_timeout()

    def on_timeout(self, now: float) -> list[tuple[int, bytes]]:
        self.server.on_timeout(now)
        return [(self.connection, payload) for payload, _ in self.server.take(now)]


class QuicWorld(World):
    """One endpoint, and sessions that are kept."""

    def __init__(self) -> None:
        super().__init__(settings=ONE, transport=self._quic)
        self.sessions: dict[Hashable, QuicSession] = {}
        self.transports: list[QuicConnection] = []
        self.host = QuicHost()
        self.hosts["a"] = self.host
        self.add("a")
        self.conductor.warm_pool(self.now)
        self.run(1.0)

    def _quic(self, now: float, connection: int, endpoint: Hashable, address: Hashable) -> Transport:
        del now, connection, address
        if self.transports and self.transports[-1].session is not None:
            self.sessions[endpoint] = self.transports[-1].session
        made = QuicConnection(SETTINGS, identity=CLIENT, secret=SECRET, session=self.sessions.get(endpoint))
        self.transports.append(made)
        return made


def test_messages_are_streams() -> None:
    world = QuicWorld()
    assert world.states() == {State.CONNECTED: 1}
    for number in range(50):
        lease = world.conductor.acquire(world.now)
        assert isinstance(lease, Lease)
        assert world.conductor.send(world.now, lease.connection, b"%d" % number)
        world.conductor.release(world.now, lease)
    world.run(1.0)
    assert sorted(world.host.server.messages, key=int) == [b"%d" % number for number in range(50)]
    assert world.host.server.handshakes == 1


@pytest.mark.parametrize("told", [False, True])
def test_an_outage_of_ten_seconds_costs_no_handshake(*, told: bool) -> None:
    world = QuicWorld()
    world.run(20.0)
    world.carrier = False
    if told:
        world.conductor.on_link(world.now, up=False)
    world.run(10.0)
    assert world.conductor.send(world.now, 0, b"meanwhile")
    world.carrier = True
    if told:
        world.conductor.on_link(world.now, up=True)
    back = world.now
    assert world.run(30.0, lambda: world.host.server.messages == [b"meanwhile"])
    assert world.now - back < (1.0 if told else 10.0)
    world.run(10.0)
    assert world.host.server.handshakes == 1
    assert len(world.transports) == 1
    assert world.transports[0].path_changes == int(told)
    assert world.conductor.snapshot().ended == {}


def test_what_was_lost_is_resumed() -> None:
    world = QuicWorld()
    world.host.reachable = False
    assert world.run(15.0, lambda: world.states().get(State.CONNECTED) is None)
    assert world.conductor.state(0).history()[-1].cause is Cause.LOST
    world.host.reachable = True
    assert world.run(31.0, lambda: world.states() == {State.CONNECTED: 1})
    assert world.transports[-1].resumed
    check(world.conductor)


def test_a_server_that_closes_is_connected_anew() -> None:
    world = QuicWorld()
    library = world.host.server.library
    assert library is not None
    library.close(error_code=1, reason_phrase="dropped")
    for payload, _ in world.host.server.take(world.now):
        world.conductor.receive(world.now, 0, payload)
    assert world.conductor.snapshot().ended == {"peer_closed": 1}
    world.host.server.library = None
    assert world.run(31.0, lambda: world.states() == {State.CONNECTED: 1})


def test_the_peer_is_told_of_the_end() -> None:
    world = QuicWorld()
    world.conductor.shutdown(world.now, world.now)
    assert "draining" in repr(world.conductor)  # the last word was not taken yet
    assert world.conductor.next_timeout() <= world.now
    world.run(1.0)
    assert world.conductor.closed
    assert world.host.server.library is None


def test_a_host_that_answers_is_not_dead() -> None:
    world = QuicWorld()
    world.host.kernel = True
    world.host.server.alive = False  # the application hangs
    world.run(25.0)
    health = world.conductor.monitor.health(world.now, 0)
    assert health.status == "unhealthy"
    assert health.host_silent is not None
    assert health.host_silent < 2.0
