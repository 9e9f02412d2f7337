# SPDX-License-Identifier: Apache-2.0
"""Connections in asyncio over AF_XDP lanes, to peers on another host of the lab."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest

from sluice_cli.lab import Lab
from tests.cable import NATIVE
from tests.unit.connection_loopback import ONE, balanced, connected, listen_on, make, plain_policy
from tests.unit.event_loops import Run, asyncio_only, run, until
from userspace.connection.aio_carrier import lane_ports
from userspace.connection.aio_pool import AsyncConnections
from userspace.datagram.lanes import open_lanes
from userspace.datagram.xsk_lanes import XskLanes

__all__ = ["run"]  # a fixture: in use, though only as an argument

pytestmark = [pytest.mark.root, pytest.mark.bpf, asyncio_only]

PORT = 9000
PEERS = 3


def peer_socket(lab: Lab, version: int) -> socket.socket:
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    with lab.client.enter():
        sock = socket.socket(family, socket.SOCK_DGRAM)
    sock.bind((str(lab.client.ipv4 if version == 4 else lab.client.ipv6), 0))
    return sock


@pytest.mark.parametrize("version", [4, 6])
def test_messages(lab: Lab, run: Run, version: int) -> None:
    """There and back as frames; a peer whose process is gone is known by ICMP, and the others go on."""

    async def main(lanes: XskLanes) -> None:
        peers = [await listen_on(peer_socket(lab, version)) for _ in range(PEERS)]
        async with AsyncConnections(make, settings=ONE, ports=lane_ports(lanes, [PORT])) as connections:
            for number, peer in enumerate(peers):
                connections.add_endpoint(number, addresses=[peer.name])
            connections.warm_pool()
            await connected(connections, PEERS)
            before = lanes.statistics().sent
            for number in range(PEERS):
                async with connections.acquire(endpoint=number) as connection:
                    assert connection.send(b"echo %d" % number)
            heard: list[Any] = []
            while len(heard) < PEERS:
                heard += [(one.endpoint, one.payload) for one in await connections.messages()]
            assert sorted(heard) == [(number, b"echo %d" % number) for number in range(PEERS)]
            # Not through a kernel socket: every neighbour is known by now.
            assert lanes.statistics().sent >= before + PEERS
            killed = connections.conductor.links[0]
            peers[0].transport.close()
            await asyncio.sleep(0)
            connections.send(killed.number, b"x")
            await until(lambda: not killed.live)
            assert [link.live for link in connections.conductor.links.values()].count(True) == PEERS - 1
            balanced(connections)
        for peer in peers:
            peer.transport.close()

    with (
        lab.server.enter(),
        open_lanes(plain_policy(PORT), interface=lab.server.interface, mode=NATIVE) as lanes,
    ):
        assert isinstance(lanes, XskLanes)
        assert lanes.mode == NATIVE
        run(main(lanes))
        assert all(frames.balanced for frames in lanes.frames())
