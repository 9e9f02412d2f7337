# SPDX-License-Identifier: Apache-2.0
"""Send everything back, from asyncio: sudo python docs/examples/asyncio_echo.py INTERFACE POLICY."""

import asyncio
import sys
from contextlib import suppress

from userspace.datagram.aio import AsyncLanes
from userspace.datagram.lanes import Lanes, open_lanes


async def echo(lanes: Lanes) -> None:
    """Until Ctrl-C cancels it."""
    asynchronous = AsyncLanes(lanes)
    answered = 0
    try:
        async for batch in asynchronous:  # given back when the next one is asked for
            answered += await asynchronous.send_back(batch)
    finally:
        print(answered, "answered")


interface, policy = sys.argv[1:]
with open_lanes(policy, interface=interface) as lanes:
    print(lanes.status(), flush=True)
    with suppress(KeyboardInterrupt):
        asyncio.run(echo(lanes))
