# SPDX-License-Identifier: Apache-2.0
"""Sending from asyncio through kernel sockets that have no room: waited for in the loop, not in the call."""

from __future__ import annotations

import asyncio
import errno
import socket
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from sluice_cli.lab import Lab
from tests.kernel.test_kernel_sockets_faults import (
    DEADLINE,
    IP_RECVERR,
    PAYLOADS,
    PORTS,
    Bottleneck,
    SocketLanes,
    backend,
    client,
    from_both_ports,
    lab,
    lanes,
)
from tests.unit.event_loops import Run, asyncio_only, cancelled_at, readers, run, until
from userspace.datagram.aio import AsyncLanes
from userspace.datagram.aio_protocol import LaneTransport, open_endpoint
from userspace.datagram.batch import Batch
from userspace.datagram.fanout import Fanout
from userspace.datagram.portable import PortableLanes

__all__ = ["backend", "lab", "lanes", "run"]  # fixtures: in use, though only as arguments

pytestmark = pytest.mark.root

#: One that nothing gets through within a test, and one that 20 datagrams take a third of a second through.
CLOSED, NARROW = "1kbit", "500kbit"
LIMITS = ("burst", "3000", "limit", "1000000")

Call = Callable[[AsyncLanes, Any], Coroutine[Any, Any, int]]


async def send_one_by_one(asynchronous: AsyncLanes, to: Any) -> int:
    return sum([await asynchronous.send(to, [payload]) for payload in PAYLOADS])


CALLS: dict[str, Call] = {
    "send": lambda asynchronous, to: asynchronous.send(to, PAYLOADS),
    "one by one": send_one_by_one,
    "to each": lambda asynchronous, to: asynchronous.send_many(Fanout([to] * len(PAYLOADS)), PAYLOADS),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_all_goes_out_when_room_comes(lab: Lab, lanes: SocketLanes, run: Run, call: Call) -> None:
    """In order, once, without keeping the loop or the processor busy, and nothing counts as failed."""

    async def main() -> None:
        asynchronous = AsyncLanes(lanes)
        turns = 0

        async def other() -> None:
            nonlocal turns
            while True:
                await asyncio.sleep(0.01)
                turns += 1

        task = asyncio.create_task(other())
        start, busy = time.monotonic(), time.process_time()
        assert await call(asynchronous, receiver.getsockname()) == len(PAYLOADS)
        took = time.monotonic() - start
        assert took > 0.1
        assert time.process_time() - busy < took / 2
        assert turns > 5
        assert asynchronous.failures == ()
        task.cancel()

    with Bottleneck(lab, NARROW, 1_000_000), client(lab) as receiver:
        run(main())
        assert [receiver.recv(2000) for _ in PAYLOADS] == PAYLOADS
    statistics = lanes.statistics()
    assert (statistics.sent, statistics.send_failed) == (len(PAYLOADS), 0)


@asyncio_only
def test_one_payload_to_many(lab: Lab, lanes: SocketLanes, run: Run) -> None:
    async def main() -> None:
        asynchronous = AsyncLanes(lanes)
        fanout = Fanout([receiver.getsockname()] * 20)
        assert await asynchronous.send_many(fanout, PAYLOADS[0], port=PORTS[1]) == 20

    with Bottleneck(lab, NARROW, 1_000_000), client(lab) as receiver:
        run(main())
        assert [receiver.recvfrom(2000) for _ in range(20)] == [
            (PAYLOADS[0], (str(lab.server.ipv4), PORTS[1]))
        ] * 20


@asyncio_only
def test_a_full_device_queue(lab: Lab, lanes: SocketLanes, run: Run) -> None:
    """ENOBUFS: there is nothing to wait for but time."""
    for _, sock in lanes._sockets:
        sock.setsockopt(socket.IPPROTO_IPV6, 25, 1)  # IPV6_RECVERR
        sock.setsockopt(socket.IPPROTO_IP, IP_RECVERR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)

    async def main() -> None:
        assert await AsyncLanes(lanes).send(receiver.getsockname(), PAYLOADS) == len(PAYLOADS)

    with Bottleneck(lab, NARROW, 4000), client(lab) as receiver:
        run(main())
        found = [receiver.recv(2000) for _ in PAYLOADS]
    # Portable lanes try what is behind one that found no room, and the queue may have got some meanwhile.
    assert (sorted(found) if isinstance(lanes, PortableLanes) else found) == PAYLOADS
    assert lanes.statistics().send_failed == 0


@asyncio_only
def test_what_fails_for_another_reason(lab: Lab, lanes: SocketLanes, run: Run) -> None:
    """It is not tried again, and told by its place in the whole call, however often the rest was tried."""
    payloads = [*PAYLOADS[:10], bytes(70_000), *PAYLOADS[10:], bytes(66_000)]

    async def main() -> None:
        asynchronous = AsyncLanes(lanes)
        to = receiver.getsockname()
        for sending in (
            asynchronous.send(to, payloads),
            asynchronous.send_many(Fanout([to] * len(payloads)), payloads),
        ):
            assert await sending == len(PAYLOADS)
            assert [(one.index, one.errno) for one in asynchronous.failures] == [
                (10, errno.EMSGSIZE),
                (21, errno.EMSGSIZE),
            ]

    with Bottleneck(lab, NARROW, 1_000_000), client(lab) as receiver:
        run(main())
        assert [receiver.recv(2000) for _ in PAYLOADS * 2] == PAYLOADS * 2
    statistics = lanes.statistics()
    assert (statistics.sent, statistics.send_failed) == (2 * len(PAYLOADS), 4)


@asyncio_only
def test_sent_back_through_two_full_sockets(lab: Lab, lanes: SocketLanes, run: Run) -> None:
    async def main(batch: Batch) -> None:
        asynchronous = AsyncLanes(lanes)
        assert await asynchronous.send_back(batch) == len(PAYLOADS[:6]) + 1
        assert asynchronous.failures == ()
        assert batch.released

    with client(lab) as receiver:
        batch = from_both_ports(lab, lanes, receiver)
        before = lanes.statistics()
        with Bottleneck(lab, NARROW, 1_000_000):
            run(main(batch))
            found = [receiver.recvfrom(2000) for _ in range(7)]
        assert sorted(payload for payload, _ in found) == sorted([*PAYLOADS[:6], b"other port"])
        first = {(payload, PORTS[0]) for payload in PAYLOADS[:6]}
        assert {(payload, name[1]) for payload, name in found} == first | {(b"other port", PORTS[1])}
    assert lanes.statistics().sent - before.sent == 7
    assert lanes.statistics().send_failed == before.send_failed
    assert lanes.census()["held"] == 0


@asyncio_only
def test_a_batch_sent_from_where_it_lies(lab: Lab, lanes: SocketLanes, run: Run) -> None:
    """While it waits the batch stays; afterwards it can be given back."""

    async def main(batch: Batch) -> None:
        with batch:
            assert await AsyncLanes(lanes).send(receiver.getsockname(), batch) == len(batch)

    with client(lab) as receiver:
        batch = from_both_ports(lab, lanes, receiver)
        expected = [bytes(view) for view in batch]
        with Bottleneck(lab, NARROW, 1_000_000):
            run(main(batch))
            assert [receiver.recv(2000) for _ in expected] == expected
    assert lanes.census()["held"] == 0


@pytest.mark.parametrize("late", [False, True], ids=["waiting", "woken"])
@pytest.mark.parametrize("what", ["send", "to each", "send_back"])
def test_cancelled_wherever_it_waits(lab: Lab, lanes: SocketLanes, run: Run, what: str, late: bool) -> None:
    """For the first four awaits: what is not out is told, counted once, and nothing is kept."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        before = readers(loop)
        asynchronous = AsyncLanes(lanes)
        to = receiver.getsockname()
        for number in range(4):
            batch = from_both_ports(lab, lanes, receiver) if what == "send_back" else None
            count = 7 if batch is not None else len(PAYLOADS)
            call = asynchronous.send_back(batch) if batch is not None else CALLS[what](asynchronous, to)
            counted = lanes.statistics()
            with Bottleneck(lab, CLOSED, 1_000_000):
                assert await cancelled_at(number, call, late=late)
                assert readers(loop) == before
                failed = [one.index for one in asynchronous.failures]
                assert {one.errno for one in asynchronous.failures} == {errno.ECANCELED}
                assert failed == sorted(set(failed))
                statistics = lanes.statistics()
                assert statistics.send_failed - counted.send_failed == len(failed)
                assert statistics.sent - counted.sent == count - len(failed)
                assert statistics.balanced
                assert batch is None or batch.released
                assert lanes.census()["held"] == 0
        # In use as before.
        assert await asynchronous.send(to, [b"the end"]) == 1

    with client(lab) as receiver:
        run(main())
        while receiver.recv(2000) != b"the end":
            pass


@asyncio_only
def test_lanes_that_are_closed_meanwhile(lab: Lab, lanes: SocketLanes, run: Run) -> None:
    async def main() -> None:
        asynchronous = AsyncLanes(lanes)
        with Bottleneck(lab, CLOSED, 1_000_000):
            waiting = asyncio.create_task(asynchronous.send(receiver.getsockname(), PAYLOADS))
            await asyncio.sleep(0.01)
            lanes.close()
            with pytest.raises(ValueError, match="closed"):
                await waiting
            assert {one.errno for one in asynchronous.failures} == {errno.ECANCELED}

    with client(lab) as receiver:
        run(main())


class Pausing(asyncio.DatagramProtocol):
    """Notes how it is asked to stop and go on."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def pause_writing(self) -> None:
        self.said.append("pause")

    def resume_writing(self) -> None:
        self.said.append("resume")

    def connection_lost(self, exc: Exception | None) -> None:
        self.said.append("lost")


def balanced(transport: LaneTransport) -> None:
    statistics = transport.statistics()
    gone = statistics.sent + statistics.failed + statistics.dropped
    assert statistics.given == gone + statistics.waiting


def test_a_protocol_is_paused(lab: Lab, lanes: SocketLanes, run: Run) -> None:
    """Above the high-water mark, until what waits is down to the low one; all goes out in order."""

    async def main() -> None:
        transport, protocol = await open_endpoint(
            Pausing, lanes, port=PORTS[0], remote_addr=receiver.getsockname()
        )
        transport.set_write_buffer_limits(high=10_000, low=5_000)
        for payload in PAYLOADS[:8]:
            transport.sendto(payload)
        await until(lambda: transport.statistics().sent)
        assert protocol.said == []
        left = PAYLOADS[8 - transport.statistics().waiting : 8]
        assert transport.get_write_buffer_size() == sum(map(len, left)) > 0
        for payload in PAYLOADS[8:]:
            transport.sendto(payload)
        assert protocol.said == ["pause"]
        balanced(transport)
        # Wider from now on, and nothing lost; what sleeps for the old rate wakes up for the next one.
        bottleneck._tc("change", "dev", lab.server.interface, "root", "tbf", "rate", NARROW, *LIMITS)
        assert lanes.send(receiver.getsockname(), [b"next"], port=PORTS[1]) == 1
        await until(lambda: "resume" in protocol.said)
        assert transport.get_write_buffer_size() <= 5_000
        await until(lambda: transport.statistics().waiting == 0)
        assert transport.statistics().sent == len(PAYLOADS)
        transport.close()
        await until(lambda: "lost" in protocol.said)
        assert protocol.said == ["pause", "resume", "lost"]
        balanced(transport)

    with Bottleneck(lab, CLOSED, 1_000_000) as bottleneck, client(lab) as receiver:
        run(main())
        found = [receiver.recv(2000) for _ in [*PAYLOADS, b"next"]]
    assert [payload for payload in found if payload != b"next"] == PAYLOADS
    assert (lanes.statistics().sent, lanes.statistics().send_failed) == (len(PAYLOADS) + 1, 0)


@asyncio_only
@pytest.mark.parametrize("end", ["close", "abort", "lanes"])
def test_ended_while_it_waits(lab: Lab, lanes: SocketLanes, run: Run, end: str) -> None:
    """``close`` waits for the rest, ``abort`` drops it, and so do lanes that are closed."""

    async def main() -> None:
        before = readers(asyncio.get_running_loop())
        bottleneck = Bottleneck(lab, CLOSED, 1_000_000)
        with bottleneck:
            transport, protocol = await open_endpoint(
                Pausing, lanes, port=PORTS[0], remote_addr=receiver.getsockname()
            )
            for payload in PAYLOADS:
                transport.sendto(payload)
            await until(lambda: transport.statistics().sent)
            {"close": transport.close, "abort": transport.abort, "lanes": lanes.close}[end]()
            await asyncio.sleep(0.05)
            if end == "close":
                assert "lost" not in protocol.said
                bottleneck.open()
            await until(lambda: "lost" in protocol.said)
        statistics = transport.statistics()
        assert statistics.waiting == 0
        assert (statistics.sent == len(PAYLOADS)) == (end == "close")
        balanced(transport)
        await asyncio.sleep(0)
        assert readers(asyncio.get_running_loop()) == before

    start = time.monotonic()
    with client(lab) as receiver:
        run(main())
    assert time.monotonic() - start < DEADLINE
