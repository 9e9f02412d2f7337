# SPDX-License-Identifier: Apache-2.0
"""What networks say of datagrams that were sent (ICMP): told to the caller, harmless to everybody else."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import select
import socket
import struct
import time
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Any, cast

import pytest

from sluice_cli.lab import Lab
from sluice_cli.traffic import ones_sum
from userspace.datagram.aio_protocol import open_endpoint
from userspace.datagram.batch_manager import UDPBatchManager
from userspace.datagram.fanout import Fanout
from userspace.datagram.lanes import Lanes, open_lanes
from userspace.datagram.mmsg import MmsgLanes
from userspace.datagram.opening import Wanted
from userspace.datagram.portable import PortableLanes
from userspace.datagram.socket_errors import KEPT, SocketError
from userspace.datagram.socket_statistics import SendFailure
from xdp.policy import Policy

pytestmark = pytest.mark.root

DEADLINE = 10.0
PORTS = (8001, 8002)
CLOSED = 9  # nobody has it on the client

POLICY = f"""
version = 1
[[lane]]
name = "all"
[[service]]
name = "s"
ports = {list(PORTS)}
[[service.rule]]
action = "lane"
lane = "all"
"""

# Beyond the client, which forwards: what nobody can reach, and a way with a short MTU.
NOWHERE = {4: "10.97.0.1", 6: "fd97::1"}
NARROW = {4: "10.98.0.1", 6: "fd98::1"}
MTU = {4: 1000, 6: 1280}

SocketLanes = MmsgLanes | PortableLanes


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """The client answers each closed port, however many, and is a router."""
    with Lab(static_neighbours=True) as made:
        with made.client.enter():
            for key, value in (
                ("net/ipv4/icmp_ratemask", "0"),
                ("net/ipv6/icmp/ratelimit", "0"),
                ("net/ipv4/ip_forward", "1"),
                ("net/ipv6/conf/all/forwarding", "1"),
            ):
                Path("/proc/sys", key).write_text(value, encoding="ascii")
        client = made.client
        for version, gateway in ((4, client.ipv4), (6, client.ipv6)):
            nowhere, narrow = (
                f"{address[version]}/{32 if version == 4 else 128}" for address in (NOWHERE, NARROW)
            )
            ip = ["ip", f"-{version}", "route", "add"]
            for to in (nowhere, narrow):
                made.server.run([*ip, to, "via", str(gateway)])
            made.client.run([*ip, "unreachable", nowhere])
            made.client.run([*ip, narrow, "dev", client.interface, "mtu", str(MTU[version])])
        yield made


def client_address(lab: Lab, version: int) -> IPv4Address | IPv6Address:
    return lab.client.ipv4 if version == 4 else lab.client.ipv6


@pytest.fixture(params=["mmsg", "portable"])
def lanes(lab: Lab, request: pytest.FixtureRequest) -> Iterator[SocketLanes]:
    with lab.server.enter():
        opened = open_lanes(Policy.parse(POLICY), mode=cast("Wanted", request.param))
    assert isinstance(opened, (MmsgLanes, PortableLanes))
    with opened:
        yield opened
        assert opened._closed or opened.statistics().balanced


def told(lanes: Lanes | UDPBatchManager, count: int = 1) -> list[SocketError]:
    """So many errors, when they have come."""
    found: list[SocketError] = []
    deadline = time.monotonic() + DEADLINE
    while len(found) < count:
        assert time.monotonic() < deadline, found
        found += lanes.socket_errors()
    return found


def still_receives(lab: Lab, lanes: SocketLanes, port: int = PORTS[0]) -> None:
    with lab.client.enter(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.sendto(b"question", (str(lab.server.ipv4), port))
    with lanes.receive(timeout=DEADLINE) as batch:
        assert [bytes(payload) for payload in batch] == [b"question"]


@pytest.mark.parametrize("version", [4, 6])
def test_a_closed_port(lab: Lab, lanes: SocketLanes, version: int) -> None:
    client = client_address(lab, version)
    before = time.monotonic_ns()
    assert lanes.send((client, CLOSED), [b"anybody?"], port=PORTS[1]) == 1
    (error,) = told(lanes)
    assert error[:-1] == (
        client,
        CLOSED,
        errno.ECONNREFUSED,
        "icmp" if version == 4 else "icmp6",
        *((3, 3) if version == 4 else (1, 4)),  # port unreachable: RFC 792, RFC 4443
        client,
        0,
        PORTS[1],
    )
    assert before < error.time_ns < time.monotonic_ns()
    assert isinstance(error.error, ConnectionRefusedError)
    assert str(error) == f"{client} port {CLOSED}: Connection refused (from {client})"
    assert lanes.socket_errors() == ()
    assert (lanes.failures, lanes.statistics().reported) == ((), 1)
    still_receives(lab, lanes)


@pytest.mark.parametrize("version", [4, 6])
def test_routers_on_the_way(lab: Lab, lanes: SocketLanes, version: int) -> None:
    """A datagram that is too long for the way is lost once; after that the kernel sends fragments."""
    client = client_address(lab, version)
    assert lanes.send((NOWHERE[version], 7), [b"hello"]) == 1
    (error,) = told(lanes)
    unreachable = errno.EHOSTUNREACH if version == 4 else errno.ENETUNREACH
    assert (str(error.address), error.port, error.errno) == (NOWHERE[version], 7, unreachable)
    assert (error.offender, error.mtu) == (client, 0)
    assert lanes.send((NARROW[version], 7), [bytes(1400)]) == 1
    (error,) = told(lanes)
    assert (str(error.address), error.errno, error.mtu) == (NARROW[version], errno.EMSGSIZE, MTU[version])
    # Growing, so that each is a message of its own.
    assert lanes.send((NARROW[version], 7), [bytes(length) for length in (1400, 1410, 1420)]) == 3
    assert not lanes.failures
    # What this host itself refuses is told by `failures`.
    assert lanes.send((client, CLOSED), [bytes(65_530)]) == 0
    assert list(lanes.failures) == [SendFailure(0, errno.EMSGSIZE)]
    lab.server.run(["ip", f"-{version}", "route", "flush", "cache"])


def test_errors_keep_nobody_from_sending(lab: Lab, lanes: SocketLanes) -> None:
    """Each error meets a later datagram's call; what that would have sent is sent all the same."""
    with lab.client.enter(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.bind((str(lab.client.ipv4), 0))
        client.settimeout(DEADLINE)
        there = client.getsockname()
        fanout = Fanout([(there[0], CLOSED + number) if number % 2 else there for number in range(100)])
        with UDPBatchManager(lanes, port=PORTS[0], batch_size=8) as manager:
            assert lanes.send_many(fanout, b"payload", port=PORTS[0]) == 100
            assert {client.recv(100) for _ in range(50)} == {b"payload"}
            errors = told(manager, 50)
    assert sorted(error.port for error in errors) == [CLOSED + number for number in range(1, 100, 2)]
    assert (lanes.statistics().sent, lanes.statistics().send_failed) == (100, 0)


def leave_an_error(lanes: SocketLanes, port: int) -> None:
    """In the queue of a socket, and nowhere else: no call fails with it."""
    sock = next(service.socket for service in lanes._sockets if service.port == port)
    with pytest.raises(OSError, match="Message too long"):
        sock.sendto(bytes(65_520), ("::ffff:127.0.0.1", CLOSED))


@contextlib.contextmanager
def little_work(seconds: float) -> Iterator[None]:
    """A tenth of the time at most is spent on the CPU."""
    started, before = time.monotonic(), time.thread_time()
    yield
    assert time.monotonic() - started >= seconds
    assert time.thread_time() - before < seconds / 10


@pytest.mark.parametrize("ports", [PORTS, PORTS[:1]], ids=["two sockets", "one socket"])
@pytest.mark.parametrize("watched", [False, True], ids=["asked", "watched"])
@pytest.mark.parametrize("mode", ["mmsg", "portable"])
def test_a_wait_with_an_error_pending_does_not_spin(mode: str, watched: bool, ports: tuple[int, ...]) -> None:
    policy = Policy.parse(POLICY.replace(str(list(PORTS)), str(list(ports))))
    with open_lanes(policy, mode=cast("Wanted", mode)) as lanes:
        assert isinstance(lanes, (MmsgLanes, PortableLanes))
        if watched:
            lanes.fileno()
        lanes.try_receive().release()  # the look at all sockets that comes every half second is over
        leave_an_error(lanes, ports[-1])
        with little_work(0.1):
            assert not lanes.receive(timeout=0.1)
        assert len(lanes.socket_errors()) == 1
        if not watched:
            return
        leave_an_error(lanes, ports[-1])
        poller = select.poll()
        poller.register(lanes.fileno(), select.POLLIN)
        woken = 0
        while poller.poll(20):
            woken += 1
            assert woken < 5
            assert not lanes.try_receive()
        assert woken == 1


def test_a_wait_for_room_with_an_error_pending_does_not_spin(lab: Lab, lanes: SocketLanes) -> None:
    lanes._sockets[0].socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    interface = lab.server.interface
    tbf = ["tbf", "rate", "8kbit", "burst", "3000", "limit", "100000"]
    lab.server.run(["tc", "qdisc", "add", "dev", interface, "root", *tbf])
    try:
        to = (lab.client.ipv4, CLOSED)
        # Growing, so that they don't share a message.
        lanes.send(to, [bytes(1000 + number) for number in range(20)], port=PORTS[0], timeout=0)
        leave_an_error(lanes, PORTS[0])
        with little_work(0.2):
            assert lanes.send(to, [bytes(1400), bytes(1401)], port=PORTS[0], timeout=0.2) < 2
    finally:
        lab.server.run(["tc", "qdisc", "del", "dev", interface, "root"])


def forged(lab: Lab, count: int) -> None:
    """ICMP messages of somebody who has guessed a service port: its datagrams, never sent, met no port."""
    server, client = (host.ipv4.packed for host in (lab.server, lab.client))
    # The datagram's own header: IPv4 and UDP, from the service port.
    quoted = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 36, 1, 0, 64, 17, 0, server, client)
    quoted += struct.pack("!HHHH", PORTS[0], CLOSED, 16, 0) + bytes(8)
    message = struct.pack("!BBHI", 3, 3, 0, 0) + quoted
    message = message[:2] + struct.pack("!H", ~ones_sum(message) & 0xFFFF) + message[4:]
    with lab.client.enter(), socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as raw:
        raw.connect((str(lab.server.ipv4), 0))
        for _ in range(count):
            raw.send(message)


def test_a_flood_of_forged_errors(lab: Lab, lanes: SocketLanes) -> None:
    """They are bounded in number, in memory and in time, and keep nobody from receiving."""
    # It takes more than 10,000 a second to be one, for which a busy machine needs several tries.
    deadline = time.monotonic() + 6 * DEADLINE
    while not lanes.statistics().floods:
        assert time.monotonic() < deadline
        forged(lab, 2000)
        still_receives(lab, lanes)
    statistics = lanes.statistics()
    assert statistics.reported > 8000
    assert len(lanes.socket_errors()) == KEPT
    assert statistics.unread == statistics.reported - KEPT
    forged(lab, 100)
    assert lanes.socket_errors() == ()  # deaf
    still_receives(lab, lanes)
    deadline = time.monotonic() + DEADLINE
    while not lanes.socket_errors():  # it hears again
        assert time.monotonic() < deadline
        lanes.send((client_address(lab, 4), CLOSED), [b"anybody?"])
        lanes.receive(timeout=0.02).release()


class Asking(asyncio.DatagramProtocol):
    def __init__(self) -> None:
        self.errors: asyncio.Queue[Exception] = asyncio.Queue()

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def error_received(self, exc: Exception) -> None:
        self.errors.put_nowait(exc)


async def endpoints(lanes: Lanes, to: tuple[str, int]) -> None:
    """The endpoint whose datagram it was hears of it, as with asyncio's own transports."""
    made = [await open_endpoint(Asking, lanes, port=port) for port in PORTS]
    connected = made[0][0]
    made[1][0].sendto(b"anybody?", to)
    error = await asyncio.wait_for(made[1][1].errors.get(), DEADLINE)
    assert isinstance(error, ConnectionRefusedError)
    assert made[0][1].errors.empty()
    connected.close()
    transport, protocol = await open_endpoint(Asking, lanes, port=PORTS[0], remote_addr=to)
    transport.sendto(b"anybody?")
    assert isinstance(await asyncio.wait_for(protocol.errors.get(), DEADLINE), ConnectionRefusedError)
    transport.abort()
    made[1][0].abort()


def test_an_asyncio_endpoint(lab: Lab, lanes: SocketLanes) -> None:
    asyncio.run(endpoints(lanes, (str(lab.client.ipv4), CLOSED)))


@pytest.mark.bpf
def test_over_af_xdp_the_companion_hears_of_frames(lab: Lab) -> None:
    with lab.server.enter():
        policy = Policy.parse(POLICY)
        with open_lanes(policy, interface=lab.server.interface, mode="native-copy") as lanes:
            to = (str(lab.client.ipv4), CLOSED)
            assert lanes.send(to, [b"anybody?"], port=PORTS[0]) == 1
            (error,) = told(lanes)
            assert (str(error.address), error.port, error.service_port) == (*to, PORTS[0])
            asyncio.run(endpoints(lanes, to))


def test_closed_lanes(lanes: SocketLanes) -> None:
    lanes.close()
    with pytest.raises(ValueError, match="closed"):
        lanes.socket_errors()
