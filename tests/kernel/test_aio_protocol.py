# SPDX-License-Identifier: Apache-2.0
"""asyncio's datagram protocols over AF_XDP: programs for sockets, in both ways that packets come and go."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import random
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sluice_cli.lab import Lab
from tests.kernel.datapath import (
    BULK,
    POLICY,
    UNUSED,
    VOTES,
    balanced,
    client_socket,
    lanes_on,
    load,
    server_address,
)
from tests.unit.event_loops import Run, asyncio_only, run, until
from userspace.datagram.aio_protocol import LaneTransport, open_endpoint
from userspace.datagram.lanes import open_lanes
from userspace.datagram.xsk_lanes import XskLanes
from xdp.errors import InterfaceGoneError, UsageError
from xdp.policy import Policy
from xdp.program import SteerProgram

__all__ = ["run"]  # a fixture: in use, though only as an argument

pytestmark = [pytest.mark.root, pytest.mark.bpf]

SO_RCVBUFFORCE = 33


class Echo(asyncio.DatagramProtocol):
    def __init__(self) -> None:
        self.received: list[tuple[bytes, Any]] = []
        self.errors: list[Exception] = []
        self.lost: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: Any) -> None:
        self.transport: LaneTransport = transport

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self.received.append((data, addr))
        self.transport.sendto(data, addr)

    def error_received(self, exc: Exception) -> None:
        self.errors.append(exc)

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost.set_result(exc)


def open_in(lab: Lab, policy: str = POLICY) -> XskLanes:
    with lab.server.enter():
        lanes = open_lanes(Policy.parse(policy), interface=lab.server.interface, mode="native-copy")
    assert isinstance(lanes, XskLanes)
    return lanes


@pytest.fixture(name="lanes")
def _lanes(lab: Lab) -> Iterator[XskLanes]:
    with open_in(lab) as opened:
        yield opened
        balanced(opened)


async def received(sock: socket.socket, count: int) -> list[tuple[bytes, tuple[Any, ...]]]:
    """Data and sender's (host, port)."""
    sock.setblocking(False)
    found: list[tuple[bytes, tuple[Any, ...]]] = []

    def one() -> bool:
        try:
            data, name = sock.recvfrom(1 << 16)
        except BlockingIOError:
            return False
        found.append((data, name[:2]))
        return True

    for _ in range(count):
        await until(one)
    return found


def counted(transport: LaneTransport) -> None:
    own, all_ = transport.statistics(), transport.dispatch_statistics()
    assert own.given == own.sent + own.failed + own.dropped + own.waiting
    gone = all_.refused + all_.unreadable + sum(all_.no_endpoint.values())
    assert all_.received == all_.delivered + gone


def test_an_echo_on_two_ports(lab: Lab, lanes: XskLanes, run: Run) -> None:
    """Over both versions, in frames and, where they are too long for one, in fragments; each by its port."""

    async def main() -> None:
        votes, bulk = [await open_endpoint(Echo, lanes, port=port) for port in (VOTES, BULK)]
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(client_socket(lab, version)) for version in (4, 6)]
            for version, client in zip((4, 6), clients, strict=True):
                to = server_address(lab, version)
                for port in (VOTES, BULK):
                    payloads = [b"V%d" % number for number in range(20)] + [b"", bytes(3000)]
                    for payload in payloads:
                        client.sendto(payload, (to, port))
                    found = await received(client, len(payloads))
                    assert {name for _, name in found} == {(to, port)}
                    assert sorted(data for data, _ in found) == sorted(payloads)
            for transport, protocol in (votes, bulk):
                statistics = transport.statistics()
                assert (statistics.received, statistics.sent, statistics.failed) == (44, 44, 0)
                names = [client.getsockname() for client in clients]
                assert {name for _, name in protocol.received} == set(names)
                assert transport.get_extra_info("socket") is not None
                counted(transport)
        assert votes[0].dispatch_statistics().delivered == 88
        # Most left as frames; the kernel was asked only for what cannot.
        assert lanes.statistics().sent > 40
        bulk[0].close()
        with client_socket(lab) as client:
            for _ in range(5):
                client.sendto(b"for nobody", (server_address(lab), BULK))
            await until(lambda: votes[0].dispatch_statistics().no_endpoint == {BULK: 5})
        votes[0].close()
        assert (await votes[1].lost, await bulk[1].lost) == (None, None)

    with lab.server.enter():  # where the kernel is asked for routes
        run(main())


@asyncio_only
def test_link_local_addresses(lab: Lab, lanes: XskLanes, run: Run) -> None:
    """They have a scope, which protocols get and give."""

    async def main() -> None:
        transport, protocol = await open_endpoint(Echo, lanes, port=VOTES)
        with lab.client.enter():
            client = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
        with client:
            client.bind((str(lab.client.link_local), 0, 0, lab.client.ifindex))
            to = (str(lab.server.link_local), VOTES, 0, lab.client.ifindex)
            for number in range(20):
                client.sendto(b"V%d" % number, to)
                assert [data for data, _ in await received(client, 1)] == [b"V%d" % number]
            host, port = client.getsockname()[:2]
        names = {name for _, name in protocol.received}
        assert {(name[0], name[1]) for name in names} == {(host.partition("%")[0], port)}
        assert {name[3] for name in names} <= {0, lab.server.ifindex}
        transport.close()
        assert await protocol.lost is None
        counted(transport)

    with lab.server.enter():
        run(main())


@asyncio_only
def test_one_call_for_a_batch(make_lab: Callable[..., Lab], run: Run) -> None:
    """All answers of a batch leave by one system call or two."""
    lab = make_lab(static_neighbours=True)

    async def main(lanes: XskLanes) -> None:
        transport, _ = await open_endpoint(Echo, lanes, port=VOTES)
        name = client.getsockname()
        transport.sendto(b"first", name)
        await received(client, 1)
        before = lanes.statistics().queues[0].kicks
        for number in range(200):
            transport.sendto(b"%3d" % number, name)
        found = await received(client, 200)
        assert [data for data, _ in found] == [b"%3d" % number for number in range(200)]
        assert lanes.statistics().queues[0].kicks - before <= 8  # one sends at least 32
        transport.close()

    with open_in(lab) as lanes, client_socket(lab) as client, lab.server.enter():
        client.setsockopt(1, SO_RCVBUFFORCE, 8 << 20)
        run(main(lanes))


@asyncio_only
def test_without_companion_sockets(lab: Lab, program: SteerProgram, run: Run) -> None:
    """What is too long fails alone, and what goes to a silent neighbour; nothing else waits for ever."""

    async def main(lanes: XskLanes) -> None:
        transport, protocol = await open_endpoint(Echo, lanes, port=VOTES)
        assert transport.get_extra_info("sockname") == ("::", VOTES, 0, 0)
        assert transport.get_extra_info("socket") is None
        name = client.getsockname()
        for payload in (b"a", bytes(3000), b"b"):
            transport.sendto(payload, name)
        assert [data for data, _ in await received(client, 2)] == [b"a", b"b"]
        with client_socket(lab, 6) as other:
            for payload, to in (
                (b"c", name),
                (b"x", ("10.81.0.77", 9)),
                (b"d", other.getsockname()),
                (bytes(3000), other.getsockname()),
                (b"e", name),
            ):
                transport.sendto(payload, to)
            assert [data for data, _ in await received(client, 2)] == [b"c", b"e"]
            assert [data for data, _ in await received(other, 1)] == [b"d"]
        codes = [error.errno for error in protocol.errors if isinstance(error, OSError)]
        assert codes == [errno.EMSGSIZE, errno.EHOSTUNREACH, errno.EMSGSIZE]
        client.sendto(b"V", (server_address(lab), VOTES))
        assert await received(client, 1) == [(b"V", (server_address(lab), VOTES))]
        client.sendto(b"V", (server_address(lab), BULK))
        await until(lambda: transport.dispatch_statistics().no_endpoint == {BULK: 1})
        transport.close()
        assert await protocol.lost is None
        counted(transport)
        assert (transport.statistics().sent, transport.statistics().failed) == (6, 3)

    for cookie in (program.cookie, 0):  # with and without metadata: the port is that of the header
        with lanes_on(program, lab, cookie=cookie) as lanes, client_socket(lab) as client, lab.server.enter():
            run(main(lanes))


@pytest.fixture(scope="module", name="program")
def _program() -> Iterator[SteerProgram]:
    loaded = load()
    yield loaded
    loaded.close()


@asyncio_only
def test_an_interface_that_is_down_and_deleted(lab: Lab, lanes: XskLanes, run: Run) -> None:
    """What finds no way waits or fails as the kernel says; a deleted interface ends the endpoint."""

    async def main() -> None:
        transport, protocol = await open_endpoint(Echo, lanes, port=VOTES)
        lab.server.run(["ip", "link", "set", lab.server.interface, "down"])
        transport.sendto(b"lost", ("10.81.0.2", 9))
        await until(lambda: protocol.errors)
        assert [error.errno for error in protocol.errors if isinstance(error, OSError)] == [errno.ENETUNREACH]
        lab.server.run(["ip", "link", "delete", lab.server.interface])
        assert isinstance(await protocol.lost, InterfaceGoneError)
        counted(transport)

    with lab.server.enter():
        run(main())


@asyncio_only
def test_ports_of_the_policy(lanes: XskLanes, run: Run) -> None:
    async def main() -> None:
        with pytest.raises(UsageError, match=f"port {UNUSED} is none of these lanes"):
            await open_endpoint(Echo, lanes, port=UNUSED)

    run(main())


CLIENT = """
import asyncio, ssl, sys
from aioquic.asyncio.client import connect
from aioquic.quic.configuration import QuicConfiguration

host, port, certificate = sys.argv[1:]

async def main():
    configuration = QuicConfiguration(alpn_protocols=["test"], server_name="localhost")
    configuration.load_verify_locations(certificate)
    async with connect(host, int(port), configuration=configuration) as client:
        reader, writer = await client.create_stream()
        data = sys.stdin.buffer.read()
        writer.write(data)
        writer.write_eof()
        sys.stdout.buffer.write(await reader.read(-1))

asyncio.run(main())
"""


def test_a_quic_server(lab: Lab, lanes: XskLanes, run: Run, tmp_path: Path) -> None:
    """Its client is another process, on the other host."""
    pytest.importorskip("aioquic", reason="aioquic is not installed")
    from aioquic.asyncio.server import QuicServer
    from aioquic.quic.configuration import QuicConfiguration

    from tests.unit.test_aio_quic import SIZE, certificate

    certificate_file, key_file = certificate(tmp_path)
    configuration = QuicConfiguration(is_client=False, alpn_protocols=["test"])
    configuration.load_cert_chain(certificate_file, key_file)
    data = random.Random(8).randbytes(SIZE)
    answering: set[asyncio.Task[None]] = set()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write((await reader.read(-1))[::-1])
        writer.write_eof()

    def accept(*stream: Any) -> None:
        answering.add(asyncio.ensure_future(answer(*stream)))

    async def main() -> None:
        transport, server = await open_endpoint(
            lambda: QuicServer(configuration=configuration, stream_handler=accept), lanes, port=VOTES
        )
        words = [sys.executable, "-c", CLIENT, server_address(lab), str(VOTES), str(certificate_file)]
        with lab.client.enter():
            client = await asyncio.create_subprocess_exec(
                *words, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
            )
        answered, _ = await client.communicate(data)
        assert answered == data[::-1]
        assert client.returncode == 0
        await asyncio.gather(*answering)
        server.close()
        counted(transport)

    with lab.server.enter():
        run(main())
    statistics = lanes.statistics()
    assert statistics.lane("votes").received > SIZE // 1500
    assert statistics.sent > SIZE // 1500
