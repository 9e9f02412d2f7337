# SPDX-License-Identifier: Apache-2.0
"""Ports and the carrier on them: whose a datagram is, what ICMP says, and what finds no room."""

from __future__ import annotations

import asyncio
import socket
from errno import ECONNREFUSED
from typing import Any

import pytest

from tests.unit.connection_loopback import peers
from tests.unit.event_loops import Run, asyncio_only, run, until  # noqa: F401
from tests.unit.socket_backends import free_port
from userspace.connection.aio_carrier import Carrier, sockets
from userspace.connection.aio_link import _is_ours, _messages
from userspace.connection.aio_ports import WAITING, Port, SocketPort, checked_name
from userspace.connection.conductor import Datagram
from xdp.errors import BusyError, SluiceError, UsageError

pytestmark = asyncio_only


class Notes:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.came: list[tuple[Any, bytes]] = []
        self.errors: list[tuple[Any, int]] = []

    def heard(self, port: Port, name: Any, data: bytes) -> None:
        self.came.append((name, data))
        if data == b"close":
            port.close()

    def refused(self, port: Port, name: Any, errno: int) -> None:
        del port
        self.errors.append((name, errno))

    def lost(self, port: Port, error: Exception) -> None:
        raise AssertionError(f"{port}: {error}")


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_what_icmp_says_is_told_of_the_address(run: Run, host: str) -> None:  # noqa: F811
    async def main() -> None:
        nobody = checked_name((host, free_port()))
        async with peers(1, host) as (peer,):
            notes = Notes()
            port = SocketPort(notes, 4 if host == "127.0.0.1" else 6)
            # The error of the first one is met by the second, which is sent all the same.
            port.send(b"x", nobody)
            port.send(b"echo", checked_name(peer.name))
            await until(lambda: notes.errors and notes.came)
            assert notes.errors[0] == (nobody, ECONNREFUSED)
            assert notes.came == [(checked_name(peer.name), b"echo")]
            assert peer.got == [b"echo"]
            # And when nothing else is sent.
            notes.errors.clear()
            port.send(b"x", nobody)
            await until(lambda: notes.errors)
            assert notes.errors[0] == (nobody, ECONNREFUSED)
            assert port.dropped == 0
            port.close()
            port.close()

    run(main())


def test_an_owner_may_close_the_port_when_it_is_told(run: Run) -> None:  # noqa: F811
    async def main() -> None:
        notes = Notes()
        port = SocketPort(notes, 4, ("127.0.0.1", 0))
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
            for payload in (b"1", b"close", b"2"):
                other.sendto(payload, port.name)
            await until(lambda: len(notes.came) == 2)
            await asyncio.sleep(0.01)
        assert [data for _, data in notes.came] == [b"1", b"close"]

    run(main())


def test_what_cannot_be_sent_is_counted(run: Run) -> None:  # noqa: F811
    async def main() -> None:
        port = SocketPort(Notes(), 4)
        port.send(bytes(65_530), ("127.0.0.1", free_port()))  # longer than any datagram
        assert port.dropped == 1
        port.close()

    run(main())


class Full:
    """A socket that has no room for some time: that of the loopback interface always has."""

    def __init__(self, real: socket.socket) -> None:
        self.real = real
        self.full = True

    def sendto(self, data: bytes, name: Any) -> int:
        if self.full:
            raise BlockingIOError
        return self.real.sendto(data, name)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)


def test_what_finds_no_room_waits_in_order(run: Run) -> None:  # noqa: F811
    async def main() -> None:
        async with peers(1) as (peer,):
            port: Any = SocketPort(Notes(), 4)
            full = port._socket = Full(port._socket)
            for number in range(WAITING + 5):
                port.send(b"%d" % number, peer.name)
            assert port.dropped == 5
            await asyncio.sleep(0.01)
            assert peer.got == []
            full.full = False
            await until(lambda: not port._waiting)
            await asyncio.sleep(0.05)  # for the receiver, whose buffer has no room for all of them
            port.send(b"last", peer.name)
            await until(lambda: b"last" in peer.got)
            numbers = [int(one) for one in peer.got[:-1]]
            assert numbers == sorted(numbers)
            full.full = True
            port.send(b"x", peer.name)
            port.close()
            assert port.dropped == 6

    run(main())


def test_ports_that_cannot_be(run: Run) -> None:  # noqa: F811
    async def main() -> None:
        first = SocketPort(Notes(), 4, ("127.0.0.1", 0))
        number = first.name[1]
        with pytest.raises(SluiceError, match="binding a UDP socket"):
            SocketPort(Notes(), 4, ("127.0.0.1", number))
        first.close()
        for wrong in (None, ("127.0.0.1",), ("name", 7), ("127.0.0.1", 70_000), "127.0.0.1:7"):
            with pytest.raises(UsageError):
                checked_name(wrong)

    run(main())


def test_whose_a_datagram_is(run: Run) -> None:  # noqa: F811
    async def main() -> None:
        came: list[tuple[int, bytes]] = []
        carrier = Carrier(sockets())
        carrier.start(
            heard=lambda number, data: came.append((number, data)),
            refused=lambda number, errno: came.append((number, b"%d" % errno)),
            lost=lambda error: None,
        )
        async with peers(2) as (one, two):
            for connection, peer in ((1, one), (2, one), (3, two), (4, one)):
                carrier.attach(connection, peer.name)
            assert carrier.statistics()[:2] == (3, 4)
            carrier.send([Datagram(number, None, b"echo %d" % number) for number in (1, 2, 3, 4, 99)])
            await until(lambda: len(came) == 4)
            assert sorted(came) == [(number, b"echo %d" % number) for number in (1, 2, 3, 4)]
            # The address of a connection may change; a port that nobody needs is closed.
            carrier.attach(4, two.name)
            carrier.attach(4, two.name)
            assert carrier.statistics()[:2] == (2, 4)
            carrier.detach(2)
            carrier.detach(2)
            carrier.send([Datagram(1, None, b"echo")])
            carrier.detach(1)  # the answer is for nobody
            await until(lambda: carrier.statistics().stray)
            told = carrier.statistics()
            assert (told.sent, told.received, told.stray, told.dropped) == (5, 5, 1, 1)
            two.transport.close()
            await asyncio.sleep(0)
            carrier.send([Datagram(3, None, b"x")])
            await until(lambda: (3, b"%d" % ECONNREFUSED) in came)
        assert repr(carrier).startswith("<Carrier: 2 connections")
        carrier.close()
        carrier.close()
        assert carrier.statistics()[:2] == (0, 0)

    run(main())


def test_one_socket_is_one_connection_to_each_address(run: Run) -> None:  # noqa: F811
    async def main() -> None:
        carrier = Carrier(sockets(local=("127.0.0.1", 0)))
        carrier.attach(1, ("127.0.0.1", 9))
        carrier.attach(2, ("127.0.0.2", 9))
        with pytest.raises(BusyError, match="1 connections to one address"):
            carrier.attach(3, ("127.0.0.1", 9))
        carrier.detach(1)
        carrier.attach(3, ("127.0.0.1", 9))
        carrier.close()

    run(main())


@pytest.mark.parametrize(
    ("kind", "body", "ours"),
    [
        (20, b"\x02\x18\0\0\x07\0\0\0", True),  # RTM_NEWADDR on interface 7
        (20, b"\x02\x18\0\0\x08\0\0\0", False),
        (20, b"\x02", False),
        (24, b"\x02\0" + bytes(10) + b"\x08\0\x04\0\x07\0\0\0", True),  # RTM_NEWROUTE, RTA_OIF 7
        (24, b"\x02\0" + bytes(10) + b"\x08\0\x05\0\x01\x02\x03\x04\x08\0\x04\0\x07\0\0\0", True),
        (24, b"\x02\0" + bytes(10) + b"\x08\0\x04\0\x08\0\0\0", False),
        (24, b"\x02\x18" + bytes(10) + b"\x08\0\x04\0\x07\0\0\0", False),  # to a prefix
        (24, b"\x02\0" + bytes(10) + b"\0\0\x04\0\x07\0\0\0", False),  # a length that cannot be
        (24, b"\x02\0" + bytes(10), False),
        (16, b"\x02\x18\0\0\x07\0\0\0", False),
    ],
)
def test_which_messages_of_netlink_count(kind: int, body: bytes, *, ours: bool, run: Run) -> None:  # noqa: F811
    del run
    data = (16 + len(body)).to_bytes(4, "little") + kind.to_bytes(2, "little") + bytes(10) + body
    data += bytes(-len(data) % 4)
    assert [_is_ours(*one, 7) for one in _messages(data * 2)] == [ours, ours]
    assert list(_messages(b"\xff\0\0\0" + bytes(12))) == []
