# SPDX-License-Identifier: Apache-2.0
"""Sending to (address, port): where the kernel would, past it when it can be, through it when not."""

from __future__ import annotations

import contextlib
import errno
import math
import socket
from collections.abc import Iterator

import pytest

from sluice_cli.lab import Lab
from tests.cable import NATIVE
from tests.kernel.datapath import POLICY, SECONDS, VOTES, client_socket, server_address, until
from userspace.datagram.fanout import Fanout
from userspace.datagram.lanes import open_lanes
from userspace.datagram.xsk_lanes import XskLanes
from userspace.datagram.xsk_send import Spread
from xdp.errors import UsageError
from xdp.policy import Policy

pytestmark = [pytest.mark.root, pytest.mark.bpf]

Endpoint = tuple[str, int]


@pytest.fixture(name="lab")
def _lab() -> Iterator[Lab]:
    with Lab() as made:
        yield made


@pytest.fixture(name="lanes")
def _lanes(lab: Lab) -> Iterator[XskLanes]:
    with lab.server.enter():
        opened = open_lanes(Policy.parse(POLICY), interface=lab.server.interface, mode=NATIVE)
    assert isinstance(opened, XskLanes)
    with opened:
        yield opened


def send(lab: Lab, lanes: XskLanes, to: Endpoint, *payloads: bytes) -> None:
    with lab.server.enter():  # where the router is opened, the first time
        assert lanes.send(to, payloads, port=VOTES) == len(payloads)


def past_the_kernel(lab: Lab, lanes: XskLanes, to: Endpoint, client: socket.socket) -> int:
    """Send until one has left as a frame; how many went through the kernel before.  All arrive, in order."""
    count = 0

    def by_frame() -> bool:
        nonlocal count
        before = lanes.statistics().sent
        send(lab, lanes, to, b"%d" % count)
        assert client.recvfrom(100)[0] == b"%d" % count
        count += 1
        return lanes.statistics().sent > before

    until(by_frame, "a frame")
    return count - 1


@pytest.mark.parametrize("version", [4, 6])
def test_through_the_kernel_until_the_neighbour_is_known(lab: Lab, lanes: XskLanes, version: int) -> None:
    with client_socket(lab, version) as client:
        to = client.getsockname()[:2]
        assert past_the_kernel(lab, lanes, to, client) >= 1
        send(lab, lanes, to, b"more", b"of", b"them")
        found = [client.recvfrom(100) for _ in range(3)]
        assert [payload for payload, _ in found] == [b"more", b"of", b"them"]
        # By either way from the same address and port.
        assert {source[:2] for _, source in found} == {(server_address(lab, version), VOTES)}
        assert lanes.flush()


def test_own_addresses_arrive_through_the_companion(lab: Lab, lanes: XskLanes) -> None:
    for address in (server_address(lab), "127.0.0.1"):
        send(lab, lanes, (address, VOTES), b"to myself")
        with lanes.receive(timeout=SECONDS) as batch:
            assert [bytes(payload) for payload in batch] == [b"to myself"]
    assert lanes.statistics().sent == 0


def test_a_neighbour_that_comes_back_with_another_address(lab: Lab, lanes: XskLanes) -> None:
    with client_socket(lab) as client:
        to = client.getsockname()
        past_the_kernel(lab, lanes, to, client)
        for command in (("down",), ("address", "02:00:00:00:0c:0c"), ("up",)):
            lab.client.run(["ip", "link", "set", lab.client.interface, *command])
        # The first thing it says makes it ask for the server's MAC address, and so tells its own.
        client.sendto(b"I am back", (server_address(lab), VOTES))
        with lanes.receive(timeout=SECONDS) as batch:
            assert [bytes(payload) for payload in batch] == [b"I am back"]
        before = lanes.statistics().sent
        for number in range(20):
            send(lab, lanes, to, b"%d" % number)
            assert client.recv(100) == b"%d" % number
        assert lanes.statistics().sent > before


def test_not_where_the_kernel_would_not(lab: Lab, lanes: XskLanes) -> None:
    """From the moment at which a change was reported: nothing leaves as a frame, and who sends is told."""
    with client_socket(lab) as client:
        to = client.getsockname()
        past_the_kernel(lab, lanes, to, client)
        lab.server.run(["ip", "route", "add", "unreachable", f"{to[0]}/32"])
        before = lanes.statistics().sent
        assert lanes.send(to, [b"lost"], port=VOTES) == 0
        assert lanes.companion is not None
        assert lanes.companion.lanes is not None
        assert len(lanes.companion.lanes.failures) == 1
        assert lanes.statistics().sent == before
        lab.server.run(["ip", "route", "del", "unreachable", f"{to[0]}/32"])
        assert past_the_kernel(lab, lanes, to, client) <= 1


def many(clients: list[socket.socket]) -> Fanout:
    return Fanout(client.getsockname()[:2] for client in clients)


def test_one_payload_to_many(lab: Lab, lanes: XskLanes) -> None:
    """Frames to those that are known, the kernel for the others and for this machine; all get it."""
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(client_socket(lab, version)) for version in (4, 4, 6, 4, 6)]
        fanout = Fanout([(server_address(lab), VOTES), *many(clients).endpoints])

        def frames() -> int:
            before = lanes.statistics().sent
            with lab.server.enter():
                assert lanes.send_many(fanout, b"for all of you", port=VOTES) == len(fanout)
            assert lanes.failures == ()
            for client in clients:
                found, source = client.recvfrom(100)
                assert (found, source[1]) == (b"for all of you", VOTES)
            with lanes.receive(timeout=SECONDS) as batch:
                assert [bytes(payload) for payload in batch] == [b"for all of you"]
            return lanes.statistics().sent - before

        assert frames() == 0  # nobody was known
        until(lambda: frames() == len(clients), "all clients known")
        assert lanes.flush()


def test_one_payload_to_each(lab: Lab, lanes: XskLanes) -> None:
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(client_socket(lab, version)) for version in (4, 6, 4)]
        for client in clients[:2]:
            past_the_kernel(lab, lanes, client.getsockname()[:2], client)
        fanout = Fanout(
            [
                clients[0].getsockname(),
                (server_address(lab), VOTES),
                *(client.getsockname()[:2] for client in clients[1:]),
            ]
        )
        sizes = {4: 1472, 6: 1452}
        for payloads in (
            [b"zero", b"one", b"", b"three"],
            [bytes(sizes[4]), b"1", bytes(sizes[6]), b"3"],
            # Longer than a frame may be: the kernel makes fragments of it.
            [bytes(sizes[4] + 1), b"1", b"2", bytes(3000)],
        ):
            assert lanes.send_many(fanout, payloads, port=VOTES) == 4
            assert [client.recv(4000) for client in clients] == [payloads[0], payloads[2], payloads[3]]
            with lanes.receive(timeout=SECONDS) as batch:
                assert [bytes(payload) for payload in batch] == [payloads[1]]
        assert lanes.statistics().sent > 0


def test_more_than_there_is_room_for(lab: Lab, lanes: XskLanes) -> None:
    """What the ring has no room for is said, by index; the first ones are on their way."""
    with client_socket(lab) as client:
        past_the_kernel(lab, lanes, client.getsockname(), client)
        fanout = Fanout([client.getsockname()] * 5000)  # more than the frames to send from
        lab.server.run(["ip", "link", "set", lab.server.interface, "down"])
        # As if this had not been reported yet.
        sender, router = lanes._sender, lanes._sender._router
        assert router is not None
        router.poll()
        headers = sender._routed[(*client.getsockname(), VOTES)][2]
        endpoints = fanout.endpoints
        sender._spreads[fanout] = Spread(endpoints, VOTES, router.version, math.inf, [headers] * 5000)
        sent = lanes.send_many(fanout, b"x", port=VOTES)
        assert 0 < sent < 5000
        assert [one.index for one in lanes.failures] == list(range(sent, 5000))
        assert {one.errno for one in lanes.failures} == {errno.EAGAIN}


def test_without_a_companion(lab: Lab) -> None:
    """All are resolved, waiting for their neighbours; what is too long for one is refused for all."""
    policy = Policy.parse(POLICY + "\n[companion]\nenabled = false\n")
    with lab.server.enter():
        lanes = open_lanes(policy, interface=lab.server.interface, mode=NATIVE)
    with lanes, client_socket(lab) as client, client_socket(lab, 6) as six, lab.server.enter():
        fanout = many([client, six])
        for _ in range(2):
            assert lanes.send_many(fanout, b"payload", port=VOTES) == 2
            assert [client.recv(100), six.recv(100)] == [b"payload"] * 2
        with pytest.raises(UsageError, match="smallest MTU"):
            lanes.send_many(fanout, bytes(1453), port=VOTES)
        with pytest.raises(UsageError, match="which port to send from"):
            lanes.send_many(fanout, b"x")
