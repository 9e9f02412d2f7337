# SPDX-License-Identifier: Apache-2.0
"""What the tests of asyncio over AF_XDP share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from sluice_cli.lab import Lab
from tests.kernel.datapath import VOTES, load
from userspace.datagram.aio import AsyncLanes
from userspace.datagram.destination import Destination
from userspace.datagram.xsk_lanes import XskLanes
from xdp.program import SteerProgram

SMALL_RING = 64  # the smallest


@pytest.fixture(scope="module")
def program() -> Iterator[SteerProgram]:
    loaded = load()
    yield loaded
    loaded.close()


def to_client(lab: Lab, port: int) -> Destination:
    return Destination(lab.server.mac, lab.client.mac, ("10.81.0.1", VOTES), ("10.81.0.2", port))


async def take(lanes: XskLanes, count: int) -> list[bytes]:
    """At least so many payloads, in the order in which they came."""
    found: list[bytes] = []
    async for batch in AsyncLanes(lanes):
        found += map(bytes, batch)
        if len(found) >= count:
            break
    return found
