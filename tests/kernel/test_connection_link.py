# SPDX-License-Identifier: Apache-2.0
"""The link of connections: carrier, addresses and default routes of an interface, as netlink tells them."""

from __future__ import annotations

import asyncio
import select
import time
from collections.abc import Iterator

import pytest

from sluice_cli.lab import Lab
from tests.unit.connection_loopback import ONE, make
from userspace.connection.aio_link import Change, LinkWatch
from userspace.connection.aio_pool import AsyncConnections
from xdp.errors import UsageError

pytestmark = pytest.mark.root

SECONDS = 60.0


class Watched:
    """An interface ``w0`` of the server's namespace with a peer, and what is told about it."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self.ip("link", "add", "w0", "type", "veth", "peer", "name", "w1")
        self.watch = LinkWatch("w0")

    def ip(self, *words: str) -> None:
        self._lab.server.run(["ip", *words])

    def told(self, seconds: float = SECONDS) -> list[Change]:
        """Waits for changes."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            if select.select([self.watch], [], [], left)[0] and (changes := self.watch.poll()):
                return changes
        return []


@pytest.fixture
def watched(lab: Lab) -> Iterator[Watched]:
    with lab.server.enter():
        made = Watched(lab)
        yield made
        made.watch.close()


def test_a_link_has_to_be_up_at_both_ends(watched: Watched) -> None:
    assert not watched.watch.up
    watched.ip("link", "set", "w0", "up")
    watched.ip("link", "set", "w1", "up")
    assert watched.told() == [Change.UP]
    watched.ip("link", "set", "w1", "down")  # as if the cable were pulled
    assert watched.told() == [Change.DOWN]
    watched.ip("link", "set", "w1", "up")
    assert watched.told() == [Change.UP]
    watched.ip("link", "del", "w0")
    assert watched.told() == [Change.DOWN]


def test_addresses_and_default_routes(watched: Watched) -> None:
    watched.ip("link", "set", "w0", "addrgenmode", "none", "up")
    watched.ip("link", "set", "w1", "up")
    assert watched.told() == [Change.UP]
    watched.ip("addr", "add", "198.51.100.7/24", "dev", "w0")
    assert watched.told() == [Change.PATH]
    watched.watch.poll()
    watched.ip("route", "add", "default", "via", "198.51.100.1", "dev", "w0", "metric", "7")
    assert watched.told() == [Change.PATH]
    # What is another interface's, or no default route, is nobody's business.
    watched.ip("addr", "add", "198.51.101.7/24", "dev", "lo")
    watched.ip("route", "add", "192.0.2.0/24", "via", "198.51.100.1", "dev", "w0")
    assert watched.told(0.3) == []


def test_connections_follow_it(watched: Watched) -> None:
    async def main() -> None:
        async with AsyncConnections(make, settings=ONE, interface="w0") as connections:

            async def until_link(*, up: bool) -> None:
                async with asyncio.timeout(SECONDS):
                    while connections.conductor.link_up is not up:  # noqa: ASYNC110 -- of the kernel
                        await asyncio.sleep(0.01)

            await until_link(up=False)
            for up in (True, False, True):
                for name in ("w0", "w1"):
                    watched.ip("link", "set", name, "up" if up else "down")
                await until_link(up=up)
            ups = connections.conductor.reconnection.snapshot().link_ups
            for number in range(5):
                watched.ip("addr", "add", f"198.51.100.{number + 1}/24", "dev", "w0")
            async with asyncio.timeout(SECONDS):
                while connections.conductor.reconnection.snapshot().link_ups == ups:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            assert connections.conductor.reconnection.snapshot().link_ups <= ups + 2

    asyncio.run(main())


def test_there_is_no_such_interface(watched: Watched) -> None:
    del watched
    with pytest.raises(UsageError, match="there is no interface"):
        LinkWatch("nothere0")
