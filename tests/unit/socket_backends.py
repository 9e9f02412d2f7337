# SPDX-License-Identifier: Apache-2.0
"""The two backends over kernel sockets, recvmmsg in C and plain sockets in Python, for the same tests."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from ipaddress import ip_address

import pytest

from userspace.datagram import aio
from userspace.datagram.mmsg import MmsgLanes
from userspace.datagram.portable import PortableLanes
from userspace.datagram.socket_statistics import SocketStatistics
from xdp.policy import Policy

Lanes = MmsgLanes | PortableLanes
Open = Callable[..., Lanes]

VOTES, BULK, LOW = range(3)
DEADLINE = 10.0  # s, for what takes microseconds


def free_port() -> int:
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as probe:
        probe.bind(("::", 0))
        port: int = probe.getsockname()[1]
        return port


def make_policy(port: int, *, vote_share: float = 0.1, bulk_share: float = 0.25, rate: str = "") -> Policy:
    return Policy.parse(
        f"""
version = 1
default_class = "unknown"
[rings]
frame_size = 2048
[[lane]]
name = "votes"
share = {vote_share}
[[lane]]
name = "bulk"
share = {bulk_share}
{rate}
[[lane]]
name = "low"
share = 0.02
[[class]]
name = "staked"
prefixes = ["127.0.0.2/32", "::1/128"]
[[class]]
name = "enemy"
prefixes = ["127.0.0.66/32"]
deny = true
[[class]]
name = "limited"
prefixes = ["127.0.0.77/32"]
peer_rate = 1
peer_burst = 3
over = "demote"
demote = "low"
[[service]]
name = "turbine"
ports = [{port}]
[[service.kind]]
name = "vote"
match = [{{ offset = 0, mask = "ff", value = "56" }}]
[[service.kind]]
name = "never"
match = [{{ offset = 0, mask = "ffff", value = "4e4e" }}]
[[service.rule]]
kind = "heartbeat"
class = "staked"
action = "reply"
lane = "votes"
[[service.rule]]
class = "staked"
kind = "vote"
action = "lane"
lane = "votes"
[[service.rule]]
kind = "never"
action = "drop"
[[service.rule]]
kind = "heartbeat"
action = "pass"
[[service.rule]]
action = "lane"
lane = "bulk"
"""
    )


@pytest.fixture(params=[MmsgLanes, PortableLanes], ids=["mmsg", "portable"])
def backend(request: pytest.FixtureRequest) -> type[Lanes]:
    chosen: type[Lanes] = request.param
    return chosen


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def open_lanes(backend: type[Lanes], port: int) -> Iterator[Open]:
    opened: list[Lanes] = []

    def make(policy: Policy | None = None, **options: object) -> Lanes:
        lanes = backend(policy or make_policy(port), **options)  # type: ignore[arg-type]
        opened.append(lanes)
        return lanes

    yield make
    for lanes in opened:
        lanes.close()


class Sender:
    """A socket on an address of its own, so that it has a class of its own."""

    def __init__(self, port: int, host: str = "127.0.0.2") -> None:
        self.sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
        self.sock.bind((host, 0))
        self.to = ("::1" if ":" in host else "127.0.0.1", port)
        self.name = (ip_address(host), self.sock.getsockname()[1])

    def send(self, *payloads: bytes) -> None:
        for payload in payloads:
            self.sock.sendto(payload, self.to)

    def __enter__(self) -> Sender:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()


def collect(lanes: Lanes, count: int) -> list[tuple[int, bytes]]:
    """(lane, payload) of exactly ``count`` datagrams."""
    found: list[tuple[int, bytes]] = []
    deadline = time.monotonic() + DEADLINE
    while len(found) < count and time.monotonic() < deadline:
        with lanes.receive(64, timeout=0.2) as batch:
            found.extend((batch.lanes[i], bytes(batch[i])) for i in range(len(batch)))
    assert len(found) == count
    return found


def settled(lanes: Lanes, received: int) -> SocketStatistics:
    """Statistics once ``received`` datagrams were taken from the sockets; what is queued stays queued."""
    deadline = time.monotonic() + DEADLINE
    while lanes.statistics().received < received and time.monotonic() < deadline:
        lanes.try_receive(1).release()
    return lanes.statistics()


@pytest.fixture
def sender(port: int) -> Iterator[Sender]:
    with Sender(port) as made:
        yield made


def nothing_left(lanes: Lanes) -> None:
    """No frame is held, no event loop watches them, and the counters add up."""
    assert lanes.census()["held"] == 0
    assert id(lanes) not in aio._watched
    assert lanes.statistics().balanced
