# SPDX-License-Identifier: Apache-2.0
"""Batches in an ``async for`` over AF_XDP: what comes, cancellation, and all that may end meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from sluice_cli.lab import Lab
from tests.cable import NATIVE
from tests.kernel.aio_lanes import program, take, to_client
from tests.kernel.datapath import (
    POLICY,
    VOTES,
    attached,
    balanced,
    client_socket,
    lanes_on,
    open_files,
    open_on,
    server_address,
)
from tests.kernel.datapath import until as soon
from tests.kernel.owned import Up
from tests.kernel.owned import sender as owned_sender
from tests.unit.event_loops import Run, asyncio_only, cancelled_at, readers, run
from userspace.datagram import aio
from userspace.datagram.aio import AsyncLanes
from userspace.datagram.descriptors import Mode
from userspace.datagram.lanes import open_lanes
from userspace.datagram.owned_lanes import open_owned
from userspace.datagram.xsk_lanes import XskLanes
from xdp.errors import InterfaceGoneError, OwnerGoneError
from xdp.policy import Policy
from xdp.program import SteerProgram

__all__ = ["program", "run"]  # fixtures: in use, though only as arguments

pytestmark = [pytest.mark.root, pytest.mark.bpf]


@pytest.mark.parametrize("mode", [NATIVE, "generic-copy"])
def test_batches_of_both_ways(lab: Lab, mode: Mode, run: Run) -> None:
    """Those of the rings and those of the companion sockets; each lane's in order."""
    with lab.server.enter():
        lanes = open_lanes(Policy.parse(POLICY), interface=lab.server.interface, mode=mode)
    assert isinstance(lanes, XskLanes)

    async def main() -> None:
        before = readers(asyncio.get_running_loop())
        found: list[tuple[int, bytes]] = []
        batches = 0
        async for batch in AsyncLanes(lanes):
            found += zip(batch.lanes, map(bytes, batch), strict=True)
            batches += 1
            if len(found) == len(payloads):
                break
            if batches == 1:  # while it waits
                asyncio.get_running_loop().call_later(0.01, send, payloads[1:])
        assert sorted(found) == sorted((0, payload) for payload in payloads)
        assert [payload for _, payload in found if len(payload) < 1000] == payloads[:-1]
        assert batch.released
        assert readers(asyncio.get_running_loop()) == before

    with lanes, client_socket(lab) as client:
        payloads = [*(b"Vote %d" % number for number in range(20)), bytes(5000)]  # the last in fragments

        def send(some: list[bytes]) -> None:
            for payload in some:
                client.sendto(payload, (server_address(lab), VOTES))

        send(payloads[:1])
        run(main())
        balanced(lanes)


@pytest.mark.parametrize("late", [False, True], ids=["waiting", "woken"])
def test_cancelled_wherever_it_waits(
    lab: Lab, program: SteerProgram, run: Run, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    """No packet is lost, no frame is held, whatever it waits for."""
    monkeypatch.setattr(aio, "TURN", 0.0)  # each batch is a turn

    async def main(lanes: XskLanes, send: Callable[[bytes], object]) -> None:
        loop = asyncio.get_running_loop()
        before = readers(loop)
        asynchronous = AsyncLanes(lanes)
        number, cancelled = 0, True
        while cancelled:
            sent: list[bytes] = []
            found: list[bytes] = []

            def more(sent: list[bytes] = sent) -> None:
                sent.append(b"V%d" % len(sent))
                loop.call_soon(send, sent[-1])

            async def body(found: list[bytes] = found) -> None:
                async for batch in asynchronous:
                    found += map(bytes, batch)
                    await asyncio.sleep(0)
                    assert await asynchronous.send_back(batch) > 0
                    if len(found) >= 12:
                        break

            cancelled = await cancelled_at(number, body(), late=late, suspended=more)
            assert sum(lanes.statistics().queues[0].frames.application) == 0
            assert readers(loop) == before
            assert id(lanes) not in aio._watched
            if len(sent) > len(found):
                found += await take(lanes, len(sent) - len(found))
            assert found == sent, number
            number += 1
        assert number > 12

    with lanes_on(program, lab) as lanes, client_socket(lab) as client:
        to = (server_address(lab), VOTES)
        run(main(lanes, lambda payload: client.sendto(payload, to)))
        assert lanes.flush()
        balanced(lanes)


@asyncio_only
@pytest.mark.parametrize("inside", [True, False], ids=["same namespace", "other namespace"])
def test_an_interface_that_is_deleted(lab: Lab, program: SteerProgram, run: Run, inside: bool) -> None:
    """The waiting task is told, also where netlink does not say it."""

    async def main(lanes: XskLanes) -> None:
        waiting = asyncio.create_task(take(lanes, 1))
        await asyncio.sleep(0.01)
        lab.server.run(["ip", "link", "delete", lab.server.interface])
        with pytest.raises(InterfaceGoneError):
            await waiting
        assert id(lanes) not in aio._watched
        asynchronous = AsyncLanes(lanes)
        with pytest.raises(InterfaceGoneError):
            await asynchronous.send(to_client(lab, 9), [b"x"] * 10_000)  # the ring takes some
        assert {one.errno for one in asynchronous.failures} <= {errno.ECANCELED}

    with attached(program, lab.server):
        descriptors = open_on(program, lab.server)
        with lab.server.enter() if inside else contextlib.nullcontext():
            lanes = XskLanes(descriptors)
        with lanes:
            run(main(lanes))


@asyncio_only
def test_lanes_that_another_thread_closes(lab: Lab, program: SteerProgram, run: Run) -> None:
    before = open_files()

    async def main(lanes: XskLanes) -> None:
        waiting = asyncio.create_task(take(lanes, 1))
        await asyncio.sleep(0.01)
        thread = threading.Thread(target=lanes.close)
        thread.start()
        thread.join()
        with pytest.raises(ValueError, match="closed"):
            await waiting
        with pytest.raises(ValueError, match="closed"):
            await AsyncLanes(lanes).send(to_client(lab, 9), [b"x"])
        with pytest.raises(ValueError, match="closed"):
            await take(lanes, 1)

    with lanes_on(program, lab) as lanes:
        run(main(lanes))
    del lanes
    soon(lambda: open_files() <= before, "nothing left open")


def test_an_owner_that_ends(lab: Lab, tmp_path: Path, run: Run) -> None:
    up = Up(lab, tmp_path)

    async def main() -> None:
        with open_owned(up.socket) as lanes, owned_sender(lab) as client:
            client.send(b"Vote")
            assert await take(lanes, 1) == [b"Vote"]
            waiting = asyncio.create_task(take(lanes, 1))
            await asyncio.sleep(0.01)
            up.kill()
            with pytest.raises(OwnerGoneError):
                await waiting
            assert id(lanes) not in aio._watched

    run(main())
