# SPDX-License-Identifier: Apache-2.0
"""An endpoint in any order of events: sends, room that comes and goes, refusals, turns of the loop, ends."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typing_extensions import Buffer

from tests.unit.socket_backends import free_port, make_policy
from userspace.datagram import aio_protocol
from userspace.datagram.aio_protocol import LaneTransport, open_endpoint
from userspace.datagram.aio_send import Attempt, Outcome
from userspace.datagram.batch import Batch
from userspace.datagram.destination import Destination, Endpoint
from userspace.datagram.fanout import Fanout
from userspace.datagram.mmsg import MmsgLanes
from userspace.datagram.socket_statistics import SendFailure

HIGH, LOW = 40, 10  # bytes
SIZE = 8  # of a payload, which is a number
REFUSED = -1  # of these, all are
PEERS = (("127.0.0.1", 9), ("127.0.0.2", 9), ("::1", 9))


class Narrow:
    """An outlet with room for so many datagrams, which are noted in place of sent."""

    def __init__(self) -> None:
        self.tokens = 0
        self.sent: list[int] = []
        self.more = asyncio.Event()
        self.gone = False

    def widen(self, count: int) -> None:
        self.tokens += count
        self.more.set()

    def send(
        self, destination: Destination | Endpoint, payloads: Sequence[Buffer] | Batch, port: int | None
    ) -> Attempt:
        if self.gone:
            raise ValueError("these lanes are closed")
        failures: list[SendFailure] = []
        for index, payload in enumerate(payloads):
            number = int.from_bytes(bytes(payload), "big", signed=True)
            if number == REFUSED:
                failures.append(SendFailure(index, errno.EMSGSIZE))
            elif self.tokens == 0:
                failures.append(SendFailure(index, errno.EAGAIN))
            else:
                self.tokens -= 1
                self.sent.append(number)
        return len(payloads) - len(failures), failures

    def send_many(self, fanout: Fanout, payloads: Buffer | Sequence[Buffer], port: int | None) -> Attempt:
        assert not isinstance(payloads, (bytes, bytearray, memoryview))
        assert len(fanout) == len(payloads)  # type: ignore[arg-type]
        return self.send(PEERS[0], payloads, port)  # type: ignore[arg-type]

    async def room(self, port: int | None, error: int, pause: float) -> None:
        if not self.tokens and not self.gone:
            self.more.clear()
            await self.more.wait()

    def unknown(self, destinations: Iterable[Endpoint], port: int | None) -> list[Endpoint]:
        return []

    async def prepare(self, destinations: Iterable[Endpoint], port: int | None) -> None:
        """Nothing."""

    async def send_back(self, batch: Batch, outcome: Outcome) -> None:
        raise NotImplementedError

    def count_failed(self, number: int) -> None:
        raise NotImplementedError


class Watching(asyncio.DatagramProtocol):
    """Checks at each call whether it may come now."""

    transport: LaneTransport

    def __init__(self) -> None:
        self.made = self.paused = False
        self.errors = 0
        self.lost: list[Exception | None] = []

    def connection_made(self, transport: Any) -> None:
        assert not self.made
        self.made, self.transport = True, transport

    def error_received(self, exc: Exception) -> None:
        assert not self.lost
        assert isinstance(exc, OSError)
        assert exc.errno == errno.EMSGSIZE
        self.errors += 1

    def pause_writing(self) -> None:
        assert not self.paused
        assert self.transport.get_write_buffer_size() > HIGH
        self.paused = True

    def resume_writing(self) -> None:
        assert self.paused
        assert not self.lost
        assert self.transport.get_write_buffer_size() <= LOW
        self.paused = False

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost.append(exc)


Operation = tuple[str, int]
#: What ends it comes seldom, so that there is something to end.
OPERATIONS = st.tuples(
    st.sampled_from(["send", "room", "turn"] * 4 + ["refused", "close", "abort", "gone"]), st.integers(1, 8)
)


@contextmanager
def gathered_up_to(count: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(aio_protocol, "GATHERED", count)
        yield


async def follow(operations: list[Operation], lanes: MmsgLanes, port: int) -> None:
    wrong: list[object] = []  # what the protocol finds
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: wrong.append(context))
    transport, protocol = await open_endpoint(Watching, lanes, port=port)
    outlet = transport._outlet = Narrow()
    transport.set_write_buffer_limits(high=HIGH, low=LOW)
    given: list[int] = []  # that may be sent
    after = refused = 0
    ended = ""
    for what, count in operations:
        if what in {"send", "refused"}:
            for _ in range(count):
                number = REFUSED if what == "refused" else len(given)
                if transport.is_closing():
                    after += 1
                elif number == REFUSED:
                    refused += 1
                else:
                    given.append(number)
                to = PEERS[(len(given) // 3) % len(PEERS)]
                transport.sendto(number.to_bytes(SIZE, "big", signed=True), to)
        elif what == "room":
            outlet.widen(count)
        elif what == "turn":
            for _ in range(count):
                await asyncio.sleep(0)
        elif what == "gone":
            outlet.gone = True
            outlet.more.set()
        else:
            ended = ended or what
            getattr(transport, what)()
        check(transport, protocol, outlet, given)
    # In the end there is room for all, and time.
    outlet.widen(1000)
    transport.close()
    async with asyncio.timeout(10):
        while not protocol.lost:  # noqa: ASYNC110 - connection_lost sets no event
            await asyncio.sleep(0)
    await asyncio.sleep(0)
    check(transport, protocol, outlet, given)
    assert wrong == []
    statistics = transport.statistics()
    assert len(protocol.lost) == 1
    assert statistics.waiting == transport.get_write_buffer_size() == 0
    assert statistics.given == len(given) + refused + after
    if not outlet.gone and "abort" not in {what for what, _ in operations}:
        assert outlet.sent == given
        assert (statistics.failed, statistics.dropped) == (refused, after)
        assert protocol.lost == [None]
        assert not protocol.paused
    assert transport._draining is None or transport._draining.done()


def check(transport: LaneTransport, protocol: Watching, outlet: Narrow, given: list[int]) -> None:
    """At any time: in order, each once, and all in one place."""
    statistics = transport.statistics()
    assert outlet.sent == given[: len(outlet.sent)]
    assert statistics.sent == len(outlet.sent)
    assert statistics.failed == protocol.errors
    assert statistics.given == statistics.sent + statistics.failed + statistics.dropped + statistics.waiting
    assert transport.get_write_buffer_size() == SIZE * statistics.waiting
    assert len(protocol.lost) <= 1
    if transport._draining is not None and not transport._draining.done():
        assert protocol.paused or transport.get_write_buffer_size() <= HIGH


@settings(deadline=None, max_examples=400)
@given(operations=st.lists(OPERATIONS, max_size=30), gathered=st.sampled_from([1, 5, 256]))
def test_any_order_of_events(operations: list[Operation], gathered: int) -> None:
    port = free_port()
    with MmsgLanes(make_policy(port), quota=64) as lanes, gathered_up_to(gathered):
        asyncio.run(follow(operations, lanes, port))
