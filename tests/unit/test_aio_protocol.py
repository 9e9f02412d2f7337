# SPDX-License-Identifier: Apache-2.0
"""asyncio's datagram protocols over lanes, on real sockets: what a program for sockets expects holds here."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
from collections.abc import Callable
from typing import Any

import pytest

from tests.unit.aio_endpoints import (
    GATHERED,
    Echo,
    balanced,
    closed,
    received,
    sender,
    services,
    unused,
)
from tests.unit.event_loops import Run, readers, run, until
from tests.unit.socket_backends import (
    Open,
    Sender,
    backend,
    free_port,
    open_lanes,
    port,
)
from userspace.datagram import aio_dispatch, aio_protocol
from userspace.datagram.aio import AsyncLanes
from userspace.datagram.aio_protocol import LaneTransport, open_endpoint
from xdp.errors import BusyError, UsageError

__all__ = ["backend", "open_lanes", "port", "run", "sender"]  # fixtures: in use, though only as arguments


@pytest.mark.parametrize("host", ["127.0.0.2", "::1"])
def test_an_echo_program_unchanged(open_lanes: Open, port: int, run: Run, host: str) -> None:
    """The same program and client over a socket of asyncio's and over lanes see the same."""

    async def talk(make: Callable[[], Any], to: int) -> tuple[list[bytes], list[Any], Any]:
        transport, protocol = await make()
        with Sender(to, host) as client:
            for number in range(20):
                client.send(b"V%d" % number)
            client.send(b"V" * 60_000)
            answers = await received(client.sock, 21)
            names = {client.sock.getsockname()}
        assert [data for data, _ in protocol.received] == answers
        assert {addr[:2] for _, addr in protocol.received} == {name[:2] for name in names}
        transport.close()
        transport.close()
        assert await protocol.lost is None
        return answers, [len(addr) for _, addr in protocol.received], transport

    async def main() -> None:
        loop = asyncio.get_running_loop()
        before = readers(loop)
        lanes = open_lanes()
        over_lanes = await talk(lambda: open_endpoint(Echo, lanes, port=port), port)
        assert readers(loop) == before
        assert over_lanes[2].get_extra_info("sockname")[1] == port
        other = free_port()
        local = ("::1" if ":" in host else "127.0.0.1", other)
        over_socket = await talk(lambda: loop.create_datagram_endpoint(Echo, local_addr=local), other)
        assert over_lanes[:2] == over_socket[:2]
        balanced(over_lanes[2])
        assert over_lanes[2].dispatch_statistics().delivered == 21
        assert lanes.census()["held"] == 0

    run(main())


def test_endpoints_by_port(open_lanes: Open, run: Run) -> None:
    """Also where a service has several ports; those of a port without an endpoint are counted."""
    ports = sorted({free_port() for _ in range(4)})
    lanes = open_lanes(services(ports))

    async def main() -> None:
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(Sender(port)) for port in ports]
            made = [await open_endpoint(Echo, lanes, port=port) for port in ports[:3]]
            assert isinstance(made[0][0], LaneTransport)
            for number, client in enumerate(clients):
                client.send(*[b"V%d" % number] * 10)
            for number, client in enumerate(clients[:3]):
                assert await received(client.sock, 10) == [b"V%d" % number] * 10
            await until(lambda: made[0][0].dispatch_statistics().no_endpoint == {ports[3]: 10})
            for transport, protocol in made:
                assert len(protocol.received) == transport.statistics().received == 10
                balanced(transport)
            assert made[0][0].dispatch_statistics().delivered == 30
            # One ends, the others go on; its port may be used again.
            made[1][0].close()
            await closed(*made[1])
            clients[1].send(b"V for nobody")
            await until(lambda: made[0][0].dispatch_statistics().no_endpoint.get(ports[1]) == 1)
            transport, protocol = await open_endpoint(Echo, lanes, port=ports[1])
            clients[1].send(b"V again")
            assert await received(clients[1].sock, 1) == [b"V again"]
            for one in (made[0], made[2], (transport, protocol)):
                one[0].close()
                await closed(*one)
        assert unused(lanes)

    run(main())


def test_a_connected_endpoint(open_lanes: Open, port: int, sender: Sender, run: Run) -> None:
    """With ``remote_addr``: needs no address, and hears nobody else."""
    lanes = open_lanes()

    async def main() -> None:
        remote = sender.sock.getsockname()
        transport, protocol = await open_endpoint(Echo, AsyncLanes(lanes), port=port, remote_addr=remote)
        assert transport.get_extra_info("peername") == remote
        with Sender(port, "127.0.0.5") as other:
            other.send(b"V of another")
            sender.send(b"V")
            assert await received(sender.sock, 1) == [b"V"]
            await until(lambda: transport.dispatch_statistics().refused == 1)
            assert len(protocol.received) == 1
            transport.sendto(b"no address")
            transport.sendto(bytearray(b"the same"), remote)
            with pytest.raises(ValueError, match="is not the remote_addr"):
                transport.sendto(b"x", other.sock.getsockname())
        assert await received(sender.sock, 2) == [b"no address", b"the same"]
        transport.close()
        await closed(transport, protocol)

    run(main())


def test_what_is_sent_in_one_turn_goes_out_together(
    open_lanes: Open, port: int, sender: Sender, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One call for all, whoever it is for; more than can be gathered do not wait for the end of the turn."""
    monkeypatch.setattr(aio_protocol, "GATHERED", GATHERED)
    lanes = open_lanes()
    calls: list[int] = []

    def counted(name: str) -> None:
        real = getattr(lanes, name)

        def call(to: Any, payloads: Any, **options: Any) -> int:
            calls.append(len(payloads))
            sent: int = real(to, payloads, **options)
            return sent

        monkeypatch.setattr(lanes, name, call)

    counted("send")
    counted("send_many")

    async def main() -> None:
        transport, protocol = await open_endpoint(Echo, lanes, port=port)
        with Sender(port, "::1") as other, Sender(port, "127.0.0.5") as third:
            names = [one.sock.getsockname() for one in (sender, other, third)]
            for number in range(30):
                transport.sendto(b"%d" % number, names[number % 3])
            assert calls == []
            assert transport.get_write_buffer_size() == 50
            for first, one in enumerate((sender, other, third)):
                assert await received(one.sock, 10) == [b"%d" % n for n in range(first, 30, 3)]
            assert calls == [30]
            for number in range(20):
                transport.sendto(b"%d" % number, names[0])
            assert await received(sender.sock, 20) == [b"%d" % number for number in range(20)]
            assert calls == [30, 20]
            for number in range(GATHERED + 1):
                transport.sendto(b"%d" % number, names[0])
            assert calls == [30, 20, GATHERED]
            assert await received(sender.sock, GATHERED + 1)
            assert calls == [30, 20, GATHERED, 1]
            # Those that came in one batch are answered in one.
            sender.send(*[b"V"] * 20)
            await received(sender.sock, 20)
            assert calls[4:] == [20]
        assert "pause_writing" not in protocol.calls
        transport.close()
        await closed(transport, protocol)

    run(main())


def test_errors_are_of_single_datagrams(open_lanes: Open, port: int, sender: Sender, run: Run) -> None:
    lanes = open_lanes()

    async def main() -> None:
        transport, protocol = await open_endpoint(Echo, lanes, port=port)
        name = sender.sock.getsockname()
        for payload in (b"a", bytes(70_000), b"b", bytes(66_000), b"c"):
            transport.sendto(payload, name)
        assert await received(sender.sock, 3) == [b"a", b"b", b"c"]
        assert [error.errno for error in protocol.errors if isinstance(error, OSError)] == [
            errno.EMSGSIZE,
            errno.EMSGSIZE,
        ]
        statistics = transport.statistics()
        assert (statistics.given, statistics.sent, statistics.failed) == (5, 3, 2)
        for wrong, match in (
            (("localhost", 9), "not an IP address"),
            (("127.0.0.1", 0), "port"),
            ("127.0.0.1", "not an IP address"),
            (7, "is not an address"),
            ((), "is not an address"),
        ):
            with pytest.raises(UsageError, match=match):
                transport.sendto(b"x", wrong)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="remote_addr"):
            transport.sendto(b"x")
        with pytest.raises(TypeError):
            transport.sendto("text", name)  # type: ignore[arg-type]
        transport.sendto(b"d", list(name))  # type: ignore[arg-type]
        transport.sendto(b"e", ("::ffff:127.0.0.2", name[1], 0, 0))
        transport.sendto(b"", name)
        assert await received(sender.sock, 3) == [b"d", b"e", b""]
        transport.close()
        await closed(transport, protocol)

    run(main())


def test_who_has_a_port(open_lanes: Open, port: int, sender: Sender, run: Run) -> None:
    lanes = open_lanes()

    async def main() -> None:
        transport, protocol = await open_endpoint(Echo, lanes, port=port)
        assert repr(transport) == f"<LaneTransport port={port} open>"
        with pytest.raises(BusyError, match="has an endpoint"):
            await open_endpoint(Echo, lanes, port=port)
        with pytest.raises(UsageError, match="none of these lanes"):
            await open_endpoint(Echo, lanes, port=9)
        with pytest.raises(UsageError, match="receives through these lanes"):
            await anext(aiter(AsyncLanes(lanes)))
        assert transport.get_extra_info("socket").getsockname()[1] == port
        assert transport.get_extra_info("lanes") is lanes
        assert transport.get_extra_info("peername") is None
        assert transport.get_extra_info("no such", 7) == 7
        assert transport.get_protocol() is protocol
        other = Echo()
        other.connection_made(transport)
        transport.set_protocol(other)
        sender.send(b"V")
        await until(lambda: other.received)
        assert protocol.received == []
        transport.sendto(b"last", sender.sock.getsockname())
        transport.close()
        assert repr(transport) == f"<LaneTransport port={port} closing>"
        assert await other.lost is None
        assert repr(transport) == f"<LaneTransport port={port} closed>"
        assert await received(sender.sock, 2) == [b"V", b"last"]

    async def left() -> None:
        await open_endpoint(Echo, lanes, port=port)

    def run_and_collect() -> None:
        run(left())
        gc.collect()

    run(main())

    with pytest.warns(ResourceWarning, match=f"port={port} open> was never closed"):
        run_and_collect()
    run(main())


def test_more_peers_than_are_remembered(
    open_lanes: Open, port: int, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aio_dispatch, "_MAX_PEERS", 2)
    lanes = open_lanes()

    async def main() -> None:
        transport, protocol = await open_endpoint(Echo, lanes, port=port)
        dispatcher = aio_dispatch.Dispatcher.of(lanes)
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(Sender(port, f"127.0.0.{number}")) for number in range(2, 10)]
            for client in clients * 2:
                client.send(b"V")
                assert await received(client.sock, 1) == [b"V"]
                assert len(dispatcher._names) <= 2
                assert len(dispatcher._peers) <= 2
            names = [client.sock.getsockname() for client in clients * 2]
        assert [name for _, name in protocol.received] == names
        transport.close()
        await closed(transport, protocol)

    run(main())


def test_write_buffer_limits(open_lanes: Open, port: int, run: Run) -> None:
    """As asyncio's own transports have them."""
    lanes = open_lanes()

    async def main() -> None:
        transport, protocol = await open_endpoint(Echo, lanes, port=port)
        assert transport.get_write_buffer_limits() == (16384, 65536)
        transport.set_write_buffer_limits(high=100)
        assert transport.get_write_buffer_limits() == (25, 100)
        transport.set_write_buffer_limits(low=100)
        assert transport.get_write_buffer_limits() == (100, 400)
        transport.set_write_buffer_limits(high=0)
        assert transport.get_write_buffer_limits() == (0, 0)
        with pytest.raises(ValueError, match="must be >="):
            transport.set_write_buffer_limits(high=1, low=2)
        transport.close()
        await closed(transport, protocol)

    run(main())
