# SPDX-License-Identifier: Apache-2.0
"""Sending from lanes: an ordinary socket on the other host gets it, its kernel having checked the sums."""

from __future__ import annotations

import random
import socket
from collections.abc import Iterator
from typing import Literal, cast

import pytest

from tests.traffic.served import (
    APP,
    ECHO,
    SECONDS,
    SO_RCVBUFFORCE,
    Served,
    checksums_right,
    payload_of,
    serving,
)
from userspace.datagram.destination import Destination, resolve_destination
from xdp.errors import UnsupportedError, UsageError

pytestmark = [pytest.mark.root, pytest.mark.bpf]

SEED = 7
PORT = 7777  # of the client's socket
# Neighbour tables are shared by all namespaces, so another lab under flood may have filled ours.
NO_NEIGHBOUR = r"10\.81\.0\.99 .*does not answer|neighbour table is full"


@pytest.fixture(scope="module", params=["native", "generic"])
def served(request: pytest.FixtureRequest) -> Iterator[Served]:
    """Without static neighbours: the kernel has to find out MAC addresses."""
    mode = cast("Literal['native', 'generic']", request.param)
    with serving(mode, static_neighbours=False) as made:
        yield made


@pytest.fixture
def client_socket(served: Served) -> Iterator[socket.socket]:
    """IPv4 and IPv6, on the client."""
    with served.lab.client.enter():
        sock = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    with sock:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        sock.bind(("::", PORT))
        # A card's driver may take a page for each packet, and the buffer's limit counts these.
        sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 8 << 20)
        sock.settimeout(SECONDS)
        yield sock


def target(served: Served, version: int) -> tuple[str, int]:
    client = served.lab.client
    return str(client.ipv4 if version == 4 else client.ipv6), PORT


@pytest.mark.parametrize("version", [4, 6])
def test_every_payload_arrives(served: Served, client_socket: socket.socket, version: int) -> None:
    rng = random.Random(SEED)
    sizes = [0, 1, 2, 3, 22, 1231, 1232, 1472 if version == 4 else 1452]
    payloads = [rng.randbytes(size) for size in sizes] + [bytes(8), b"\xff" * 64]
    with served.lab.server.enter():  # to resolve, as an application of that host would
        assert served.lanes.send(target(served, version), payloads, port=ECHO) == len(payloads)
    for expected in payloads:
        payload, source = client_socket.recvfrom(65536)
        assert payload == expected
        server = served.lab.server
        assert source[0].removeprefix("::ffff:") == str(server.ipv4 if version == 4 else server.ipv6)
        assert source[1] == ECHO


@pytest.mark.parametrize("version", [4, 6])
def test_checksums_on_the_wire(served: Served, client_socket: socket.socket, version: int) -> None:
    """As scapy computes them, over payloads of even and odd length."""
    rng = random.Random(SEED)
    destination = resolve(served, version)
    served.forget()
    for _ in range(8):
        payloads = [rng.randbytes(rng.randrange(64)) for _ in range(32)]
        assert served.lanes.send(destination, payloads) == len(payloads)
        frames = served.answers(len(payloads), PORT)
        assert [payload_of(frame) for frame in frames] == payloads
        assert all(checksums_right(frame) for frame in frames)
        assert [client_socket.recv(64) for _ in payloads] == payloads


def test_a_checksum_that_is_zero_is_sent_as_ones(served: Served, client_socket: socket.socket) -> None:
    """RFC 768: a computed zero is transmitted as all ones; zero would mean "no checksum"."""
    from scapy.layers.inet import UDP

    destination = resolve(served, 4)
    served.forget()
    served.lanes.send(destination, [b"\0\0"])
    (frame,) = served.answers(1, PORT)
    # What has to be added so that the sum becomes zero.
    served.lanes.send(destination, [frame[UDP].chksum.to_bytes(2, "big")])
    (frame,) = served.answers(1, PORT)
    assert frame[UDP].chksum == 0xFFFF
    assert payload_of(frame) != b"\0\0"
    assert [client_socket.recv(16) for _ in range(2)] == [b"\0\0", payload_of(frame)]


def resolve(served: Served, version: int) -> Destination:
    with served.lab.server.enter():
        return resolve_destination(served.lab.server.interface, *target(served, version), ECHO)


def test_more_than_the_ring_holds(served: Served, client_socket: socket.socket) -> None:
    """What is not accepted is the caller's to send again; in the end all arrive, each once and in order."""
    count = 10_000
    client_socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 64 << 20)
    destination = resolve(served, 4)
    payloads = [number.to_bytes(4, "big") + bytes(60) for number in range(count)]
    left = payloads
    arrived: list[bytes] = []
    while left:
        accepted = served.lanes.send(destination, left[:512])
        left = left[accepted:]
        # Read along: the receiving veth has a ring of its own, and the socket a buffer.
        while len(arrived) < count - len(left):
            arrived.append(client_socket.recv(128))
    assert arrived == payloads
    assert served.lanes.flush()


def test_a_received_batch_is_sent_on(served: Served, client_socket: socket.socket) -> None:
    """From one host to a third address: payloads of a batch to another destination than they came from."""
    with served.lab.client.enter(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        for number in range(20):
            sender.sendto(bytes([number]) * 30, (str(served.lab.server.ipv4), APP))
    destination = resolve(served, 6)
    left = 20
    while left:
        with served.lanes.receive(timeout=SECONDS) as batch:
            assert batch
            assert served.lanes.send(destination, batch) == len(batch)
            left -= len(batch)
    assert {client_socket.recv(64)[0] for _ in range(20)} == set(range(20))


def test_too_long_for_the_mtu(served: Served) -> None:
    sent = served.lanes.statistics().sent
    with pytest.raises(UsageError, match="payload 1 has 1473 bytes; 1472 fit"):
        served.lanes.send(resolve(served, 4), [b"fits", bytes(1473)])
    assert served.lanes.statistics().sent == sent


def test_nobody_there(served: Served) -> None:
    """A neighbour that does not answer: the kernel takes it, as any; who asks is told within seconds."""
    before = served.lanes.statistics().sent
    with served.lab.server.enter():
        assert served.lanes.send(("10.81.0.99", PORT), [b"?"], port=ECHO) == 1
        with pytest.raises(UnsupportedError, match=NO_NEIGHBOUR):
            resolve_destination(served.lab.server.interface, "10.81.0.99", PORT, ECHO)
        served.lanes.send(("10.81.0.99", PORT), [b"?"], port=ECHO)
    assert served.lanes.statistics().sent == before


def test_all_frames_come_back(served: Served) -> None:
    assert served.lanes.flush()
    (queue,) = served.lanes.statistics().queues
    assert queue.sent == queue.completed
    assert queue.transmit_invalid == 0
    (frames,) = served.lanes.frames()
    assert frames.balanced
    assert frames.transmit == 0
