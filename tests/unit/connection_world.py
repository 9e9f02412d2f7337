# SPDX-License-Identifier: Apache-2.0
"""A conductor and the peers it connects to, in virtual time: what tests of both ends run in.

Peers are whole: the heartbeat's own other end, and aioquic's server.  Nothing is a stand-in but the wire.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from errno import ECONNREFUSED
from itertools import count

from userspace.connection.conductor import Conductor, ConductorSettings, Received
from userspace.connection.heartbeat import Heartbeats, is_heartbeat
from userspace.connection.pool_settings import PoolSettings
from userspace.connection.states import Cause, State
from userspace.connection.transport import Transport
from userspace.connection.udp import UdpConnection
from userspace.connection.waiters import Ticket

SECRET = bytes(range(16))
#: Steps of the clock in one run: more are an endless loop.
STEPS = 1_000_000


@dataclass
class Host:
    """One address: an application that answers pings and echoes what begins with "echo"."""

    boot: int = 1
    #: The process runs; the host is there (else nobody says that it does not).
    running: bool = True
    reachable: bool = True
    #: Datagrams that came, but for heartbeats.
    got: list[bytes] = field(default_factory=list)
    opened: int = 0

    def __post_init__(self) -> None:
        self.heartbeats: dict[int, Heartbeats] = {}

    def restart(self, boot: int) -> None:
        self.boot = boot
        self.heartbeats.clear()

    def receive(self, now: float, connection: int, data: bytes) -> list[bytes]:
        if not is_heartbeat(data):
            self.got.append(data)
            return [data] if data.startswith(b"echo") else []
        beats = self.heartbeats.get(connection)
        if beats is None:
            beats = self.heartbeats[connection] = Heartbeats(secret=SECRET, boot=self.boot)
        beats.receive(now, data)
        return beats.take_pongs(now)

    def next_timeout(self) -> float:
        return math.inf

    def on_timeout(self, now: float) -> list[tuple[int, bytes]]:
        """Connections, and what is sent to them."""
        raise AssertionError(f"it has no timers, and none is due at {now}")


#: Connections to each endpoint.
ONE = ConductorSettings(pool=PoolSettings(min_size=0, min_per_endpoint=1))
TWO = ConductorSettings(pool=PoolSettings(min_size=0, min_per_endpoint=2))


def no_loss(_: random.Random) -> bool:
    return False


class World:
    """``hosts`` by address; endpoints are added by the test.  ``step`` and ``run`` move the clock."""

    def __init__(
        self,
        seed: int = 1,
        settings: ConductorSettings | None = None,
        *,
        rtt: float = 0.01,
        start: float = 100.0,
        transport: Callable[[float, int, Hashable, Hashable], Transport] | None = None,
    ) -> None:
        self.now = start
        self.rng = random.Random(seed)
        self.hosts: dict[Hashable, Host] = {}
        self.rtt = rtt
        #: The carrier of our link, and what is lost of each direction.
        self.carrier = True
        self.loss: Callable[[random.Random], bool] = no_loss
        self.gave_up: list[tuple[Hashable, Cause]] = []
        self.gone: list[int] = []
        self.messages: list[Received] = []
        self.grants: list[Ticket] = []
        self.refuse: BaseException | None = None  # what the factory raises
        self._make = transport
        self.conductor = Conductor(
            start,
            transport=self._transport,
            rng=random.Random(seed + 1),
            settings=settings if settings is not None else ConductorSettings(),
            on_give_up=lambda key, cause: self.gave_up.append((key, cause)),
            on_closed=self.gone.append,
        )
        self.addresses: dict[int, Hashable] = {}
        self.sent = self._pumped = 0
        self.attempts: list[tuple[float, Hashable]] = []
        self._wire: list[tuple[float, int, int, Hashable, bytes, bool]] = []
        self._turn = count()

    def _transport(self, now: float, connection: int, endpoint: Hashable, address: Hashable) -> Transport:
        self.attempts.append((now, endpoint))
        if self.refuse is not None:
            raise self.refuse
        if self._make is not None:
            return self._make(now, connection, endpoint, address)
        return UdpConnection(secret=SECRET, boot=7)

    def add(self, key: Hashable, *addresses: Hashable, weight: int = 1) -> Host:
        """An endpoint with hosts at its addresses, or at its key; the first of them."""
        for address in addresses or (key,):
            self.hosts.setdefault(address, Host())
        self.conductor.add_endpoint(self.now, key, weight=weight, addresses=addresses)
        self.pump()
        return self.hosts[(addresses or (key,))[0]]

    def pump(self) -> None:
        """Take what the conductor has."""
        conductor = self.conductor
        for connection, address, payload in conductor.take_datagrams(self.now):
            self.sent += 1
            if self.carrier and not self.loss(self.rng):
                self._push(connection, address, payload, outward=True)
        self.messages += conductor.take_messages()
        self.grants += conductor.take_grants()
        self._pumped += 1
        if self._pumped * 8 % max(8, len(conductor)) < 8:  # it goes over all of them
            check(conductor)

    def _push(self, connection: int, address: Hashable, payload: bytes, *, outward: bool) -> None:
        at = self.now + self.rtt / 2
        heapq.heappush(self._wire, (at, next(self._turn), connection, address, payload, outward))

    def _arrive(self, connection: int, address: Hashable, payload: bytes, outward: bool) -> None:
        host = self.hosts.get(address)
        if not self.carrier or host is None or not host.reachable:
            return
        if not outward:
            self.conductor.receive(self.now, connection, payload)
        elif not host.running:
            self.conductor.on_error(self.now, connection, ECONNREFUSED)
        else:
            for answer in host.receive(self.now, connection, payload):
                if not self.loss(self.rng):
                    self._push(connection, address, answer, outward=False)

    @property
    def _timed(self) -> list[Host]:
        return [host for host in self.hosts.values() if type(host) is not Host]

    def run(self, seconds: float, until: Callable[[], bool] = lambda: False) -> bool:
        """Go on for so long, or until something holds; whether it does."""
        end = self.now + seconds
        for _ in range(STEPS):
            self.pump()
            if until():
                return True
            wire = self._wire[0][0] if self._wire else math.inf
            timeout = self.conductor.next_timeout()
            theirs = min((host.next_timeout() for host in self._timed), default=math.inf)
            at = max(self.now, min(wire, timeout, theirs))
            if at > end:
                self.now = end
                return until()
            self.now = at
            while self._wire and self._wire[0][0] <= at:
                _, _, connection, address, payload, outward = heapq.heappop(self._wire)
                self._arrive(connection, address, payload, outward)
            for address, host in self.hosts.items() if theirs <= at else ():
                if host.next_timeout() <= at:
                    for connection, payload in host.on_timeout(self.now):
                        self._push(connection, address, payload, outward=False)
            if timeout <= at:
                self.conductor.on_timeout(self.now)
        raise AssertionError("it never comes to rest")

    def states(self) -> dict[str, int]:
        """Connections by state."""
        return {name: number for name, number in self.conductor.snapshot().states.items() if number}


def warm(world: World, *keys: str) -> None:
    """Endpoints of these keys, connected as far as they can be."""
    for key in keys:
        world.add(key)
    world.conductor.warm_pool(world.now)
    world.run(2.0)


def check(conductor: Conductor) -> None:
    """What holds at any time."""
    told = conductor.snapshot()
    pool, health, again = told.pool, told.health, told.reconnection
    assert pool.size == pool.in_use + pool.idle + pool.opening + pool.closing == len(conductor)
    assert pool.size <= conductor.settings.pool.max_size
    assert pool.closing == 0  # it is told at once that they are gone
    live = told.states[State.CONNECTED] + told.states[State.DRAINING]
    assert live == pool.in_use + pool.idle == health.connections == len(conductor.monitor)
    assert (
        pool.opening
        == told.states[State.CONNECTING] + told.states[State.DISCONNECTED] + told.states[State.FAILED]
    )
    assert pool.dialing == told.states[State.CONNECTING] + told.in_line
    assert (
        told.attempts == told.opened + sum(told.failed.values()) + told.abandoned + told.states["connecting"]
    )
    assert told.opened == sum(told.ended.values()) + live
    assert pool.acquired == pool.returned + pool.lost_in_use + pool.in_use
    assert pool.waited == pool.granted + pool.timed_out + pool.cancelled + pool.refused + pool.waiting
    assert again.attempts + again.late == (
        again.connected + again.failed + again.abandoned + again.phases[type(next(iter(again.phases))).TRYING]
    )
    assert health.asked == health.answered + health.late + health.failed + health.withdrawn + health.open
    assert told.states[State.CLOSED] == 0
