# SPDX-License-Identifier: Apache-2.0
"""Sending from asyncio over AF_XDP: it waits for the transmit ring, whatever that waits for."""

from __future__ import annotations

import asyncio
import errno
import socket
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from sluice_cli.lab import Lab
from tests.kernel.aio_lanes import SMALL_RING, program, take, to_client
from tests.kernel.datapath import (
    BULK,
    POLICY,
    SECONDS,
    SO_RCVBUFFORCE,
    VOTES,
    attached,
    balanced,
    client_socket,
    lanes_on,
    open_on,
    server_address,
)
from tests.kernel.datapath import until as soon
from tests.kernel.test_kernel_sockets_faults import Bottleneck
from tests.unit.event_loops import Run, asyncio_only, cancelled_at, run, until
from userspace.datagram.aio import AsyncLanes
from userspace.datagram.batch import Batch
from userspace.datagram.fanout import Fanout
from userspace.datagram.lanes import open_lanes
from userspace.datagram.xsk_lanes import XskLanes
from xdp.errors import InterfaceGoneError, UnsupportedError, UsageError
from xdp.policy import Policy
from xdp.program import SteerProgram

__all__ = ["program", "run"]  # fixtures: in use, though only as arguments

pytestmark = [pytest.mark.root, pytest.mark.bpf]


def set_link(lab: Lab, state: str) -> None:
    """Down: the transmit ring takes what it has room for, and nothing leaves it."""
    lab.server.run(["ip", "link", "set", lab.server.interface, state])


@asyncio_only
def test_more_than_the_ring_holds(lab: Lab, program: SteerProgram, run: Run) -> None:
    """All is accepted and leaves, though nobody receives here and so makes the kernel go on."""

    async def main(lanes: XskLanes) -> None:
        asynchronous = AsyncLanes(lanes)
        assert await asynchronous.send(to_client(lab, 9), [b"x" * 100] * 5000) == 5000
        assert asynchronous.failures == ()
        await until(lambda: lanes.statistics().queues[0].completed == 5000)

    with lanes_on(program, lab, transmit_ring=SMALL_RING) as lanes:
        run(main(lanes))
        statistics = lanes.statistics().queues[0]
        assert (statistics.sent, statistics.frames.free) == (5000, 2 * SMALL_RING)


@asyncio_only
def test_a_payload_to_many(make_lab: Callable[..., Lab], run: Run) -> None:
    """More than the ring holds, some of them through the companion; each arrives once."""
    lab = make_lab(static_neighbours=True)
    policy = Policy.parse(f"{POLICY}\n[rings]\ntx = {SMALL_RING}\n")
    with lab.server.enter():
        lanes = open_lanes(policy, interface=lab.server.interface, mode="native-copy")
    assert isinstance(lanes, XskLanes)

    async def main() -> None:
        own = (server_address(lab), VOTES)
        fanout = Fanout([client.getsockname(), own, *[client.getsockname()] * 998])
        asynchronous = AsyncLanes(lanes)
        payloads = [b"%4d" % number for number in range(len(fanout))]
        assert await asynchronous.send_many(fanout, payloads, port=VOTES) == 1000
        assert asynchronous.failures == ()
        assert await asynchronous.send_many(fanout, b"for all", port=VOTES) == 1000
        assert await take(lanes, 2) == [b"   1", b"for all"]
        with pytest.raises(UsageError, match="which port to send from"):
            await asynchronous.send_many(fanout, b"x")
        with pytest.raises(UsageError, match="which port to send from"):
            await asynchronous.send(client.getsockname(), [b"x"])
        # Longer than a frame: through the companion, which does not fail either.
        assert await asynchronous.send_many(fanout, bytes(3000), port=VOTES) == 1000
        assert await asynchronous.send(own, [b"to myself"], port=VOTES) == 1

    with lanes, client_socket(lab) as client, lab.server.enter():
        client.setsockopt(1, SO_RCVBUFFORCE, 32 << 20)
        run(main())
        expected = [b"%4d" % number for number in range(1000) if number != 1]
        assert [client.recv(4000) for _ in expected] == expected
        assert [client.recv(4000) for _ in expected] == [b"for all"] * 999
        assert lanes.companion is not None
        assert lanes.companion.lanes is not None
        assert lanes.companion.lanes.statistics().send_failed == 0
        assert lanes.statistics().sent == 2 * 999


@asyncio_only
def test_an_interface_that_is_down(lab: Lab, program: SteerProgram, run: Run) -> None:
    """Sending waits until it is up, and then goes on; cancelled before, it says what is not out."""

    async def main(lanes: XskLanes) -> None:
        set_link(lab, "down")
        asynchronous = AsyncLanes(lanes)
        to = to_client(lab, client.getsockname()[1])
        payloads = [b"%4d" % number for number in range(1000)]
        accepted: list[bytes] = []
        for number in range(5):
            before = lanes.statistics().sent
            assert await cancelled_at(number, asynchronous.send(to, payloads), late=False)
            left = [one.index for one in asynchronous.failures]
            count = lanes.statistics().sent - before
            assert left == list(range(count, 1000))
            assert {one.errno for one in asynchronous.failures} == {errno.ECANCELED}
            accepted += payloads[:count]
            balanced(lanes)
        assert len(accepted) == SMALL_RING
        # A second of it costs next to nothing.
        busy = time.process_time()
        waiting = asyncio.create_task(asynchronous.send(to, payloads))
        await asyncio.sleep(1)
        assert time.process_time() - busy < 0.5
        assert not waiting.done()
        set_link(lab, "up")
        assert await waiting == 1000
        assert asynchronous.failures == ()
        client.setblocking(False)
        expected = [*accepted, *payloads]
        loop = asyncio.get_running_loop()
        assert [await loop.sock_recv(client, 100) for _ in expected] == expected

    with lanes_on(program, lab, transmit_ring=SMALL_RING) as lanes, client_socket(lab) as client:
        client.setsockopt(1, SO_RCVBUFFORCE, 8 << 20)
        run(main(lanes))


def one_batch(lanes: XskLanes, client: Any, lab: Lab, count: int) -> Batch:
    """Of exactly so many, each from the client."""
    for number in range(count):
        client.sendto(b"V%d" % number, (server_address(lab), VOTES))
    soon(lambda: lanes.statistics().lane("votes").waiting == count, "all there")
    return lanes.receive(count, timeout=SECONDS)


@asyncio_only
def test_sent_back_in_pieces(lab: Lab, program: SteerProgram, run: Run) -> None:
    """A batch that is larger than the transmit ring; nothing of it is given back unsent."""

    async def main(lanes: XskLanes) -> None:
        loop = asyncio.get_running_loop()
        client.setblocking(False)
        for count in (200, SMALL_RING, 1):
            with one_batch(lanes, client, lab, count) as batch:
                assert await AsyncLanes(lanes).send_back(batch) == count
                assert batch.released
            expected = [b"V%d" % number for number in range(count)]
            assert [await loop.sock_recv(client, 100) for _ in range(count)] == expected
        assert lanes.statistics().queues[0].echo_refused == 0
        with pytest.raises(ValueError, match="given back"):
            await AsyncLanes(lanes).send_back(batch)
        assert await AsyncLanes(lanes).send_back(lanes.try_receive()) == 0

    with lanes_on(program, lab, transmit_ring=SMALL_RING) as lanes, client_socket(lab) as client:
        run(main(lanes))
        assert lanes.flush()
        balanced(lanes)


@asyncio_only
@pytest.mark.parametrize("count", [200, 10])
@pytest.mark.parametrize("number", range(3))
def test_sending_back_is_cancelled(
    lab: Lab, program: SteerProgram, run: Run, count: int, number: int
) -> None:
    """Wherever it waits for the ring; its frames come back."""

    async def main(lanes: XskLanes) -> None:
        asynchronous = AsyncLanes(lanes)
        batch = one_batch(lanes, client, lab, count)
        set_link(lab, "down")
        full = asynchronous.send(to_client(lab, 9), [b"x"] * (10 * SMALL_RING))
        assert await cancelled_at(0, full, late=False)
        assert await cancelled_at(number, asynchronous.send_back(batch), late=False)
        balanced(lanes)
        # One that fits is still held, and may be sent or given back; one that does not is used up.
        assert batch.released == (count > SMALL_RING)
        assert sum(lanes.statistics().queues[0].frames.application) == (0 if batch.released else count)
        with batch:
            pass
        assert sum(lanes.statistics().queues[0].frames.application) == 0
        balanced(lanes)
        set_link(lab, "up")
        await until(lambda: lanes.flush(0))
        batch = one_batch(lanes, client, lab, 5)
        assert await asynchronous.send_back(batch) == 5

    with lanes_on(program, lab, transmit_ring=SMALL_RING) as lanes, client_socket(lab) as client:
        run(main(lanes))
        assert lanes.flush()


@asyncio_only
@pytest.mark.parametrize("count", [200, 10])
@pytest.mark.parametrize("end", ["closed", "deleted"])
def test_lanes_that_end_while_a_batch_waits(
    lab: Lab, program: SteerProgram, run: Run, count: int, end: str
) -> None:
    async def main(lanes: XskLanes) -> None:
        asynchronous = AsyncLanes(lanes)
        batch = one_batch(lanes, client, lab, count)
        set_link(lab, "down")
        full = asynchronous.send(to_client(lab, 9), [b"x"] * (10 * SMALL_RING))
        assert await cancelled_at(0, full, late=False)
        waiting = asyncio.create_task(asynchronous.send_back(batch))
        await asyncio.sleep(0.01)
        if end == "closed":
            lanes.close()
        else:
            lab.server.run(["ip", "link", "delete", lab.server.interface])
        with pytest.raises(ValueError if end == "closed" else InterfaceGoneError):
            await waiting
        with batch:
            pass
        assert sum(lanes.statistics().queues[0].frames.application) == 0

    with (
        attached(program, lab.server),
        XskLanes(open_on(program, lab.server, transmit_ring=SMALL_RING)) as lanes,
        client_socket(lab) as client,
    ):
        run(main(lanes))


@asyncio_only
def test_batches_of_others(lab: Lab, make_lab: Callable[..., Lab], program: SteerProgram, run: Run) -> None:
    async def main(lanes: XskLanes, batch: Batch) -> None:
        with pytest.raises(UsageError, match="lanes that it came from"):
            await AsyncLanes(lanes).send_back(batch)

    other = make_lab()
    with (
        lanes_on(program, lab, transmit_ring=SMALL_RING) as lanes,
        lanes_on(program, other) as theirs,  # the last ones are what the program steers to
        client_socket(other) as client,
    ):
        for count in (200, 10):
            with one_batch(theirs, client, other, count) as batch:
                run(main(lanes, batch))


@asyncio_only
def test_neighbours_are_looked_up_in_a_thread(lab: Lab, program: SteerProgram, run: Run) -> None:
    """Without a companion socket: the one that answers gets all, for the silent one nobody else waits."""

    async def main(lanes: XskLanes) -> None:
        asynchronous = AsyncLanes(lanes)
        to = client.getsockname()
        silent = ("10.81.0.77", 9)
        gaps: list[float] = []

        async def other() -> None:
            while True:
                before = time.monotonic()
                await asyncio.sleep(0.01)
                gaps.append(time.monotonic() - before)

        task = asyncio.create_task(other())
        assert await asynchronous.send(to, [b"one"], port=VOTES) == 1
        sending: list[Coroutine[Any, Any, int]] = [
            asynchronous.send(silent, [b"x"], port=VOTES),
            asynchronous.send_many(Fanout([to, silent]), b"x", port=VOTES),
        ]
        for error in await asyncio.gather(*sending, return_exceptions=True):
            assert isinstance(error, UnsupportedError)
        assert max(gaps) < 1.5  # the neighbour had 3.5 s to answer
        assert await cancelled_at(0, asynchronous.send(silent, [b"x", b"y"], port=VOTES), late=False)
        assert [one.index for one in asynchronous.failures] == [0, 1]
        assert await asynchronous.send_many(Fanout([to, to]), b"two", port=VOTES) == 2
        task.cancel()

    with lanes_on(program, lab) as lanes, client_socket(lab) as client, lab.server.enter():
        run(main(lanes))
        assert [client.recv(100) for _ in range(3)] == [b"one", b"two", b"two"]


@asyncio_only
def test_a_batch_of_a_companion(lab: Lab, run: Run) -> None:
    """Goes back by the way that it came."""
    with lab.server.enter():
        lanes = open_lanes(Policy.parse(POLICY), interface=lab.server.interface, mode="native-copy")
    assert isinstance(lanes, XskLanes)

    async def main() -> None:
        asynchronous = AsyncLanes(lanes)
        async for batch in asynchronous:
            assert await asynchronous.send_back(batch) == 1
            break

    with lanes, client_socket(lab) as client:
        for port in (VOTES, BULK):
            client.sendto(bytes(3000), (server_address(lab), port))
            run(main())
            assert client.recvfrom(4000) == (bytes(3000), (server_address(lab), port))


@asyncio_only
def test_a_companion_without_room(lab: Lab, run: Run) -> None:
    """What goes through it is tried again as well; it has failed only when it has."""
    with lab.server.enter():
        lanes = open_lanes(Policy.parse(POLICY), interface=lab.server.interface, mode="native-copy")
    assert isinstance(lanes, XskLanes)
    assert lanes.companion is not None
    companion = lanes.companion.lanes
    assert companion is not None
    for _, sock in companion._sockets:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)

    async def main() -> None:
        asynchronous = AsyncLanes(lanes)
        payloads = [b"%4d" % number + bytes(1600) for number in range(20)]  # in fragments
        fanout = Fanout([client.getsockname()] * len(payloads))
        assert await asynchronous.send_many(fanout, payloads, port=VOTES) == len(payloads)
        assert asynchronous.failures == ()
        assert [client.recv(2000) for _ in payloads] == payloads
        assert (companion.statistics().sent, companion.statistics().send_failed) == (len(payloads), 0)

    with lanes, client_socket(lab) as client, Bottleneck(lab, "1mbit", 1_000_000), lab.server.enter():
        run(main())
