# SPDX-License-Identifier: Apache-2.0
"""Peers at real sockets of this host, in the event loop of the test."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from tests.unit.connection_world import check
from tests.unit.event_loops import until
from userspace.connection.aio_pool import AsyncConnections
from userspace.connection.conductor import ConductorSettings
from userspace.connection.heartbeat import Heartbeats, is_heartbeat
from userspace.connection.pool_settings import PoolSettings
from userspace.connection.transport import Transport
from userspace.connection.udp import UdpConnection
from xdp.policy import Policy

SECRET = bytes(range(16))
TWO = ConductorSettings(pool=PoolSettings(min_size=0, min_per_endpoint=2, max_size=20))
ONE = ConductorSettings(pool=PoolSettings(min_size=0, min_per_endpoint=1, max_size=20))


def plain_policy(number: int) -> Policy:
    """Everything is for the application."""
    return Policy.parse(
        f"""
version = 1
default_class = "anybody"
[[lane]]
name = "all"
[[class]]
name = "anybody"
prefixes = []
[[service]]
name = "peers"
ports = [{number}]
[[service.rule]]
action = "lane"
lane = "all"
"""
    )


class Answering(asyncio.DatagramProtocol):
    """Answers pings, and sends back what begins with "echo"."""

    transport: asyncio.DatagramTransport

    def __init__(self) -> None:
        self.got: list[bytes] = []
        self.beats = Heartbeats(secret=SECRET)

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def datagram_received(self, data: bytes, addr: object) -> None:
        if is_heartbeat(data):
            now = time.monotonic()
            self.beats.receive(now, data)
            for pong in self.beats.take_pongs(now):
                self.transport.sendto(pong, addr)  # type: ignore[arg-type]
        else:
            self.got.append(data)
            if data.startswith(b"echo"):
                self.transport.sendto(data, addr)  # type: ignore[arg-type]

    @property
    def name(self) -> tuple[str, int]:
        name: tuple[str, int] = self.transport.get_extra_info("sockname")[:2]
        return name


async def listen(host: str = "127.0.0.1", port: int = 0) -> Answering:
    """A peer there."""
    loop = asyncio.get_running_loop()
    _, protocol = await loop.create_datagram_endpoint(Answering, local_addr=(host, port))
    return protocol


async def listen_on(sock: socket.socket) -> Answering:
    """A peer at a socket, of another host of the lab, say; it is the peer's from now on."""
    _, protocol = await asyncio.get_running_loop().create_datagram_endpoint(Answering, sock=sock)
    return protocol


def make(now: float, connection: int, endpoint: object, address: object) -> Transport:
    del now, connection, endpoint, address
    return UdpConnection(secret=SECRET)


@asynccontextmanager
async def peers(count: int, host: str = "127.0.0.1") -> AsyncIterator[list[Answering]]:
    """So many of them, as long as the block lasts."""
    made = [await listen(host) for _ in range(count)]
    try:
        yield made
    finally:
        for peer in made:
            peer.transport.close()
        await asyncio.sleep(0)


async def connected(connections: AsyncConnections, count: int) -> None:
    """Wait until so many connections are up."""
    await until(lambda: connections.conductor.pool.idle_count == count)


def balanced(connections: AsyncConnections) -> None:
    """Counts add up, and nothing is held or waited for."""
    check(connections.conductor)
    pool = connections.conductor.pool
    assert (pool.active_count, pool.waiting_count, len(connections._waiting)) == (0, 0, 0)
