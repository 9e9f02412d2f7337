# SPDX-License-Identifier: Apache-2.0
"""Sending to (address, port): where the kernel would, past it when it can be, through it when not."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from sluice_cli.lab import Lab
from tests.kernel.datapath import POLICY, SECONDS, VOTES, client_socket, server_address, until
from userspace.datagram.lanes import open_lanes
from userspace.datagram.xsk_lanes import XskLanes
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
        opened = open_lanes(Policy.parse(POLICY), interface=lab.server.interface, mode="native-copy")
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
