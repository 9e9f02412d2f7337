# SPDX-License-Identifier: Apache-2.0
"""Datagrams that pass the kernel as one (UDP_SEGMENT): each arrives as it was sent."""

from __future__ import annotations

import errno
import random
import socket
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.unit.socket_backends import DEADLINE, Sender, free_port, make_policy
from userspace.datagram.fanout import Fanout
from userspace.datagram.mmsg import MmsgLanes
from userspace.datagram.sockets import ServiceSocket, open_service_sockets


@pytest.fixture
def sockets() -> list[ServiceSocket]:
    return open_service_sockets([free_port()])


@pytest.fixture
def lanes(sockets: list[ServiceSocket]) -> Iterator[MmsgLanes]:
    with MmsgLanes(make_policy(sockets[0].port), sockets) as made:
        yield made


@pytest.fixture
def receivers(lanes: MmsgLanes) -> Iterator[list[Sender]]:
    (port,) = lanes.ports
    with ExitStack() as stack:
        made = [stack.enter_context(Sender(port, host)) for host in ("127.0.0.1", "127.0.0.5", "::1")]
        for receiver in made:
            receiver.sock.settimeout(DEADLINE)
        yield made


def lengths(rng: random.Random) -> list[int]:
    """Runs of one length, with a shorter or a longer one here and there, and some of nothing."""
    found: list[int] = []
    while len(found) < 150:
        usual = rng.choice((1, 22, 64, 1200, 1232, 1472, 9000))
        found += [usual] * rng.randrange(1, 90)
        found += [rng.choice((0, 1, usual - 1, usual + 1))] * rng.randrange(3)
    return found[:150]


def test_all_arrive_as_they_were_sent(lanes: MmsgLanes, receivers: list[Sender]) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    for _ in range(20):
        receiver = rng.choice(receivers)
        payloads = [rng.randbytes(length) for length in lengths(rng)]
        total = 0
        while total < len(payloads):  # no more at once than a socket buffer of the default size holds
            chunk = payloads[total : total + 12]
            assert lanes.send(receiver.name, chunk) == len(chunk)
            assert [receiver.sock.recv(65536) for _ in chunk] == chunk
            total += len(chunk)
    assert lanes.statistics().sent == 20 * 150


def test_to_many_in_any_order(lanes: MmsgLanes, receivers: list[Sender]) -> None:
    """Only neighbours with the same destination share a message; the order for each stays."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    for _ in range(20):
        to = [rng.choice(receivers) for _ in range(8)]
        to = [receiver for receiver in to for _ in range(rng.randrange(1, 9))]
        payloads = [rng.randbytes(rng.choice((100, 100, 100, 50))) for _ in to]
        assert lanes.send_many(Fanout([receiver.name for receiver in to]), payloads) == len(to)
        for receiver in receivers:
            wanted = [payload for payload, one in zip(payloads, to, strict=True) if one is receiver]
            assert [receiver.sock.recv(65536) for _ in wanted] == wanted


def test_one_that_is_refused_costs_its_neighbours_nothing(lanes: MmsgLanes, receivers: list[Sender]) -> None:
    payloads = [b"a" * 100] * 10 + [b"b" * 65_508] * 2 + [b"c" * 100] * 10
    assert lanes.send(receivers[0].name, payloads) == 20
    assert [(failure.index, failure.errno) for failure in lanes.failures] == [
        (10, errno.EMSGSIZE), (11, errno.EMSGSIZE),
    ]  # fmt: skip
    got = [receivers[0].sock.recv(65536) for _ in range(20)]
    assert got == [b"a" * 100] * 10 + [b"c" * 100] * 10


def test_all_of_a_message_fail_each_for_itself(lanes: MmsgLanes, receivers: list[Sender]) -> None:
    """Nobody may send to a broadcast address unasked: each of them is said, and the others go out."""
    to = [("255.255.255.255", 9)] * 5 + [receivers[0].name] * 5
    assert lanes.send_many(Fanout(to), b"to all of them") == 5
    assert [failure.index for failure in lanes.failures] == list(range(5))
    assert {failure.errno for failure in lanes.failures} == {errno.EACCES}
    assert [receivers[0].sock.recv(100) for _ in range(5)] == [b"to all of them"] * 5


def test_a_full_buffer_cuts_between_datagrams(
    lanes: MmsgLanes, sockets: list[ServiceSocket], receivers: list[Sender]
) -> None:
    """What was not sent is told exactly, so that the caller can go on with the rest."""
    sockets[0].socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # the least that the kernel allows
    payloads = [number.to_bytes(2, "big") * 600 for number in range(64)]
    sent = 0
    while sent < len(payloads):
        more = lanes.send(receivers[0].name, payloads[sent:])
        assert more or lanes.failures
        for payload in payloads[sent : sent + more]:
            assert receivers[0].sock.recv(65536) == payload
        sent += more


def test_echo_of_a_burst(lanes: MmsgLanes, receivers: list[Sender]) -> None:
    """A batch from one sender goes back as one message and arrives as it came."""
    sender = receivers[0]
    payloads = [b"V%03d" % number for number in range(60)]
    sender.send(*payloads)
    echoed = 0
    while echoed < len(payloads):
        with lanes.receive(timeout=DEADLINE) as batch:
            echoed += lanes.send_back(batch)
    assert [sender.sock.recv(100) for _ in payloads] == payloads
