# SPDX-License-Identifier: Apache-2.0
"""Sending from asyncio over real sockets with room; those without are in tests/kernel/test_aio_room.py."""

from __future__ import annotations

import errno

import pytest

from tests.unit.event_loops import Run, run
from tests.unit.socket_backends import (
    DEADLINE,
    Lanes,
    Open,
    Sender,
    backend,
    free_port,
    make_policy,
    nothing_left,
    open_lanes,
    port,
    sender,
)
from userspace.datagram.aio import AsyncLanes
from userspace.datagram.destination import Destination
from userspace.datagram.fanout import Fanout
from xdp.errors import UsageError

__all__ = ["backend", "open_lanes", "port", "run", "sender"]  # fixtures: in use, though only as arguments


def test_what_sending_tells(open_lanes: Open, sender: Sender, run: Run) -> None:
    """As the calls of lanes do; nothing is held afterwards."""
    lanes = open_lanes()
    other = make_lanes_elsewhere(type(lanes))
    there = Destination(bytes(6), bytes(6), ("127.0.0.1", 1), ("127.0.0.1", 2))

    async def main() -> None:
        asynchronous = AsyncLanes(lanes)
        assert await asynchronous.send(sender.name, [b"a", bytes(70_000), b"b"]) == 2
        assert [(one.index, one.errno) for one in asynchronous.failures] == [(1, errno.EMSGSIZE)]
        assert await asynchronous.send(sender.name, []) == 0
        assert not asynchronous.failures
        fanout = Fanout([sender.name, ("::1", 9)])
        assert await asynchronous.send_many(fanout, [bytes(70_000), b"c"]) == 1
        assert [one.index for one in asynchronous.failures] == [0]
        assert await asynchronous.send_many(fanout, b"d") == 2
        assert await asynchronous.send_back(lanes.try_receive()) == 0
        with pytest.raises(UsageError, match="for AF_XDP"):
            await asynchronous.send(there, [b"x"])
        with pytest.raises(UsageError, match="no socket on port"):
            await asynchronous.send(sender.name, [b"x"], port=1)
        sender.send(b"V")
        with lanes.receive(timeout=DEADLINE) as batch:
            with pytest.raises(UsageError, match="lanes that it came from"):
                await AsyncLanes(other).send_back(batch)
            assert not batch.released
        with pytest.raises(ValueError, match="given back"):
            await asynchronous.send_back(batch)

    with other:
        run(main())
    nothing_left(lanes)
    sender.sock.settimeout(DEADLINE)
    assert [sender.sock.recv(10) for _ in range(3)] == [b"a", b"b", b"d"]


def make_lanes_elsewhere(kind: type[Lanes]) -> Lanes:
    return kind(make_policy(free_port()))


def test_other_things_are_no_lanes() -> None:
    with pytest.raises(UsageError, match="are no lanes"):
        AsyncLanes(object())  # type: ignore[arg-type]
