# SPDX-License-Identifier: Apache-2.0
"""A datagram protocol as one would write it for sockets, and what has to hold of its endpoint over lanes."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from tests.unit.socket_backends import DEADLINE, Lanes, Sender, make_policy
from userspace.datagram import aio, aio_dispatch
from userspace.datagram.aio_protocol import LaneTransport
from xdp.policy import Policy

#: Instead of 256: what a socket's buffer takes at once, whatever an administrator has set.
GATHERED = 32


class Echo(asyncio.DatagramProtocol):
    """As one would write it for ``loop.create_datagram_endpoint``; notes what it is told."""

    transport: LaneTransport

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.received: list[tuple[bytes, Any]] = []
        self.errors: list[Exception] = []
        self.lost: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.calls.append("connection_made")

    def datagram_received(self, data: bytes, addr: Any) -> None:
        assert type(data) is bytes
        self.received.append((data, addr))
        self.transport.sendto(data, addr)

    def error_received(self, exc: Exception) -> None:
        self.errors.append(exc)

    def connection_lost(self, exc: Exception | None) -> None:
        self.calls.append("connection_lost")
        self.lost.set_result(exc)


@pytest.fixture
def sender(port: int) -> Iterator[Sender]:
    with Sender(port) as made:
        made.sock.settimeout(DEADLINE)
        yield made


async def received(sock: socket.socket, count: int) -> list[bytes]:
    """By an ordinary socket of the same loop."""
    sock.setblocking(False)
    return [await asyncio.get_running_loop().sock_recv(sock, 1 << 16) for _ in range(count)]


def unused(lanes: Lanes) -> bool:
    """Nobody receives."""
    return id(lanes) not in aio._watched and id(lanes) not in aio_dispatch._dispatchers


def balanced(transport: LaneTransport) -> None:
    """Every datagram is in one place."""
    own, all_ = transport.statistics(), transport.dispatch_statistics()
    assert own.given == own.sent + own.failed + own.dropped + own.waiting
    gone = all_.refused + all_.unreadable + sum(all_.no_endpoint.values())
    assert all_.received == all_.delivered + gone


async def closed(transport: LaneTransport, protocol: Echo, error: type[Exception] | None = None) -> None:
    """Wait for the end; the counters add up, and it was told once."""
    lost = await protocol.lost
    assert lost is None if error is None else isinstance(lost, error)
    assert protocol.calls.count("connection_lost") == 1
    assert transport.is_closing()
    balanced(transport)
    assert transport.statistics().waiting == transport.get_write_buffer_size() == 0


def services(ports: list[int]) -> Policy:
    """One service with the first two ports, and one for each other."""
    first, *others = [ports[:2], *([port] for port in ports[2:])]
    policy = make_policy(ports[0])
    service = policy.services[0]
    made = [
        type(service)(name=f"s{number}", ports=tuple(some), kinds=service.kinds, rules=service.rules)
        for number, some in enumerate([first, *others])
    ]
    return type(policy)(lanes=policy.lanes, classes=policy.classes, services=tuple(made))
