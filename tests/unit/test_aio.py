# SPDX-License-Identifier: Apache-2.0
"""Batches in an ``async for``, over real sockets: given back in time, waited for, cancelled, closed."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
import time
import warnings
from typing import Any

import pytest

from tests.unit.event_loops import Run, cancelled_at, readers, run, until
from tests.unit.socket_backends import (
    DEADLINE,
    Lanes,
    Open,
    Sender,
    backend,
    nothing_left,
    open_lanes,
    port,
    sender,
)
from userspace.datagram import aio
from userspace.datagram.aio import AsyncLanes
from userspace.datagram.aio_protocol import open_endpoint
from userspace.datagram.batch import Batch
from userspace.datagram.sockets import ServiceSocket, open_service_sockets
from xdp.errors import InterfaceGoneError, UsageError

__all__ = ["backend", "open_lanes", "port", "run", "sender"]  # fixtures: in use, though only as arguments


async def take(lanes: Lanes, count: int, **options: Any) -> list[bytes]:
    """The payloads of the next datagrams, by an iteration of its own."""
    found: list[bytes] = []
    async for batch in AsyncLanes(lanes, **options):
        assert batch
        found += map(bytes, batch)
        if len(found) >= count:
            break
    return found


def test_all_that_comes_in_order(open_lanes: Open, sender: Sender, run: Run) -> None:
    """Waiting for each, and with several there at once; in batches as large as asked for."""
    lanes = open_lanes()

    async def main() -> None:
        before = readers(asyncio.get_running_loop())
        sizes: list[int] = []
        found: list[bytes] = []
        sender.send(b"V0")
        async for batch in AsyncLanes(lanes, maximum=3):
            sizes.append(len(batch))
            found += map(bytes, batch)
            if len(found) == 1:
                asyncio.get_running_loop().call_later(0.01, sender.send, b"V1")
            elif len(found) == 2:
                sender.send(*[b"V%d" % number for number in range(2, 10)])
            elif len(found) == 10:
                break
        assert found == [b"V%d" % number for number in range(10)]
        assert max(sizes) == 3
        assert readers(asyncio.get_running_loop()) == before

    run(main())
    nothing_left(lanes)


def test_a_batch_lives_until_the_next_one(open_lanes: Open, sender: Sender, run: Run) -> None:
    lanes = open_lanes()

    async def main() -> None:
        sender.send(b"V0")
        batches: list[Batch] = []
        views: list[memoryview] = []
        async for batch in AsyncLanes(lanes):
            assert lanes.census()["held"] == 1
            assert all(earlier.released for earlier in batches)
            batches.append(batch)
            views.append(batch[0])
            if len(batches) == 3:
                break
            sender.send(b"V%d" % len(batches))
        assert batches[-1].released
        for view in views:
            with pytest.raises(ValueError, match="released"):
                view[0]

    run(main())
    nothing_left(lanes)


def test_a_batch_that_was_given_back_already(open_lanes: Open, sender: Sender, run: Run) -> None:
    """By ``with``, or because it was sent back."""
    lanes = open_lanes()

    async def main() -> None:
        sender.send(b"V0")
        asynchronous = AsyncLanes(lanes)
        seen = 0
        async for batch in asynchronous:
            seen += 1
            sender.send(b"V%d" % seen)
            if seen == 1:
                batch.release()
            elif seen == 2:
                with batch:
                    pass
            elif seen == 3:
                assert await asynchronous.send_back(batch) == 1
            else:
                break

    run(main())
    nothing_left(lanes)


class LeftError(Exception):
    pass


@pytest.mark.parametrize("way", ["break", "return", "raise", "cancel", "timeout"])
def test_however_the_loop_is_left(open_lanes: Open, sender: Sender, run: Run, way: str) -> None:
    """The batch is back at once, while its variable still exists; what came meanwhile is the next one's."""
    lanes = open_lanes()
    kept: list[Batch] = []

    async def body() -> None:
        async for batch in AsyncLanes(lanes):
            kept.append(batch)
            if way == "break":
                break
            if way == "return":
                return
            if way == "raise":
                raise LeftError
            await asyncio.sleep(DEADLINE)
        assert batch.released
        assert lanes.census()["held"] == 0

    async def main() -> None:
        before = readers(asyncio.get_running_loop())
        sender.send(b"V0")
        task = asyncio.create_task(body())
        expected: type[BaseException] | None = LeftError if way == "raise" else None
        if way in {"cancel", "timeout"}:
            await until(lambda: kept)
            if way == "cancel":
                task.cancel()
            expected = asyncio.CancelledError if way == "cancel" else TimeoutError
        with pytest.raises(expected) if expected else contextlib.nullcontext() as caught:
            await (asyncio.wait_for(task, 0.01) if way == "timeout" else task)
        # Also while the error is there, which knows the frames of the functions that it came through.
        assert caught is None or caught.value is not None
        assert kept[0].released
        nothing_left(lanes)
        assert readers(asyncio.get_running_loop()) == before
        sender.send(b"V1")
        assert await take(lanes, 1) == [b"V1"]

    run(main())
    nothing_left(lanes)


@pytest.mark.parametrize("late", [False, True], ids=["waiting", "woken"])
def test_cancelled_wherever_it_waits(
    open_lanes: Open, sender: Sender, run: Run, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    """For every await of an iteration that waits, yields and sends: all is received once, nothing is kept."""
    monkeypatch.setattr(aio, "TURN", 0.0)  # each batch is a turn
    lanes = open_lanes()
    sender.sock.settimeout(DEADLINE)

    async def main() -> None:
        loop = asyncio.get_running_loop()
        before = readers(loop)
        asynchronous = AsyncLanes(lanes)
        number, cancelled = 0, True
        while cancelled:
            sent: list[bytes] = []
            found: list[bytes] = []

            def more(sent: list[bytes] = sent) -> None:
                """Something comes each time that it waits, some of it after it began to."""
                sent.append(b"V%d" % len(sent))
                loop.call_soon(sender.send, sent[-1])

            async def body(found: list[bytes] = found) -> None:
                async for batch in asynchronous:
                    found += map(bytes, batch)
                    await asyncio.sleep(0)
                    assert await asynchronous.send_back(batch) > 0
                    if len(found) >= 12:
                        break

            cancelled = await cancelled_at(number, body(), late=late, suspended=more)
            nothing_left(lanes)
            assert readers(loop) == before
            if len(sent) > len(found):
                found += await take(lanes, len(sent) - len(found))
            assert found == sent, number
            number += 1
        assert number > 12

    run(main())
    nothing_left(lanes)


def test_an_iterator_goes_on_after_a_timeout(open_lanes: Open, sender: Sender, run: Run) -> None:
    lanes = open_lanes()

    async def main() -> None:
        batches = aiter(AsyncLanes(lanes))
        for number in range(3):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(anext(batches), 0.01)
            nothing_left(lanes)
            sender.send(b"V%d" % number)
            batch = await asyncio.wait_for(anext(batches), DEADLINE)
            assert bytes(batch[0]) == b"V%d" % number
        await batches.aclose()
        assert batch.released
        await batches.aclose()
        nothing_left(lanes)
        async with contextlib.aclosing(aiter(AsyncLanes(lanes))) as batches:
            sender.send(b"V")
            batch = await anext(batches)
            assert not batch.released
        assert batch.released

    run(main())
    nothing_left(lanes)


def test_a_slice_that_is_kept(open_lanes: Open, sender: Sender, run: Run) -> None:
    """It is told; the frame comes back when the slice is gone."""
    lanes = open_lanes()

    async def main() -> None:
        sender.send(b"Vote")
        pieces: list[memoryview] = []
        batches: list[Batch] = []

        async def keep() -> None:
            async for batch in AsyncLanes(lanes):
                batches.append(batch)
                pieces.append(batch[0][1:])

        with pytest.raises(BufferError, match="packet 0"):
            await keep()
        [batch] = batches
        assert not batch.released
        assert bytes(pieces[0]) == b"ote"
        pieces.clear()
        batch.release()
        iterator = aiter(AsyncLanes(lanes))
        sender.send(b"Vote")
        piece = (await anext(iterator))[0][1:]
        with pytest.raises(BufferError, match="packet 0"):
            await iterator.aclose()
        assert id(lanes) not in aio._watched
        assert bytes(piece) == b"ote"
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            del piece
            gc.collect()
            lanes.try_receive().release()  # where abandoned frames come back
        assert caught == []
        sender.send(b"Vote")
        assert await take(lanes, 1) == [b"Vote"]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # of the batch that nobody could give back
        run(main())
    nothing_left(lanes)


def test_others_get_their_turn(
    open_lanes: Open, sender: Sender, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After each batch when that is what the time allows, and not before when it allows more."""
    lanes = open_lanes()

    async def events(turn: float) -> str:
        monkeypatch.setattr(aio, "TURN", turn)
        sender.send(*[b"V"] * 40)
        found = ""

        async def other() -> None:
            nonlocal found
            while found.count("b") < 40:
                found += "o"
                await asyncio.sleep(0)

        task = asyncio.create_task(other())
        async for batch in AsyncLanes(lanes, maximum=1):
            found += "b" * len(batch)
            if found.count("b") == 40:
                break
        await task
        return found

    assert "bb" not in run(events(0.0))
    assert "b" * 40 in run(events(60.0))


def test_one_registration_for_all(open_lanes: Open, sender: Sender) -> None:
    """In steady state, whether it waits for each batch or never."""
    lanes = open_lanes()
    added: list[int] = []

    class Loop(asyncio.SelectorEventLoop):
        def add_reader(  # type: ignore[override]
            self, fd: Any, callback: Any, *arguments: Any
        ) -> None:
            added.append(fd)
            super().add_reader(fd, callback, *arguments)

    async def main() -> None:
        sender.send(b"V")
        count = 0
        async for batch in AsyncLanes(lanes, maximum=1):
            count += len(batch)
            if count == 300:
                break
            if count < 100:  # one when it waits
                asyncio.get_running_loop().call_soon(sender.send, b"V")
            elif count == 100:
                sender.send(*[b"V"] * 200)
        assert len(added) == 1

    with asyncio.Runner(loop_factory=Loop) as runner:
        runner.run(main())


def test_no_busy_loop_while_the_task_does_something_else(open_lanes: Open, sender: Sender, run: Run) -> None:
    """With packets waiting all the time; then they are taken."""
    lanes = open_lanes()

    async def main() -> None:
        sender.send(b"V0", b"V1")
        found: list[bytes] = []
        async for batch in AsyncLanes(lanes, maximum=1):
            found += map(bytes, batch)
            if len(found) == 1:
                start = time.process_time()
                await asyncio.sleep(0.5)
                assert time.process_time() - start < 0.25
            elif len(found) == 2:
                asyncio.get_running_loop().call_later(0.01, sender.send, b"V2")
            else:
                break
        assert found == [b"V0", b"V1", b"V2"]

    run(main())


def test_only_one_receives(open_lanes: Open, port: int, sender: Sender, run: Run) -> None:
    lanes = open_lanes()

    async def main() -> None:
        asynchronous = AsyncLanes(lanes)
        batches = aiter(asynchronous)
        waiting = asyncio.create_task(anext(batches))
        await asyncio.sleep(0)
        for other in (batches, asynchronous, AsyncLanes(lanes)):
            with pytest.raises(UsageError, match=r"receives through these lanes|waits for the next batch"):
                await anext(aiter(other))
        with pytest.raises(UsageError, match="waits for the next batch"):
            await batches.aclose()
        with pytest.raises(UsageError, match="receives through these lanes"):
            await open_endpoint(asyncio.DatagramProtocol, lanes, port=port)
        sender.send(b"V")
        assert len(await waiting) == 1
        # Also between two batches.
        with pytest.raises(UsageError, match="receives through these lanes"):
            await anext(aiter(asynchronous))
        del batches
        sender.send(b"V")
        assert await take(lanes, 1) == [b"V"]

    run(main())
    nothing_left(lanes)


@pytest.mark.parametrize("who", ["task", "thread"])
def test_lanes_that_are_closed_meanwhile(open_lanes: Open, run: Run, who: str) -> None:
    lanes = open_lanes()

    async def main() -> None:
        waiting = asyncio.create_task(take(lanes, 1))
        await asyncio.sleep(0.01)
        assert id(lanes) in aio._watched
        if who == "task":
            lanes.close()
        else:
            thread = threading.Thread(target=lanes.close)
            thread.start()
            thread.join()
        with pytest.raises(ValueError, match="closed"):
            await waiting
        assert id(lanes) not in aio._watched
        with pytest.raises(ValueError, match="closed"):
            await take(lanes, 1)
        with pytest.raises(ValueError, match="closed"):
            await AsyncLanes(lanes).send(("127.0.0.1", 9), [b"x"])

    run(main())


def test_a_socket_that_is_closed_elsewhere(open_lanes: Open, port: int, run: Run) -> None:
    sockets = open_service_sockets([port])
    lanes = open_lanes(sockets=[ServiceSocket(port, sockets[0].socket)])

    async def main() -> None:
        waiting = asyncio.create_task(take(lanes, 1))
        await asyncio.sleep(0.01)
        sockets[0].socket.close()
        with pytest.raises(InterfaceGoneError, match="can't be read"):
            await waiting
        assert id(lanes) not in aio._watched

    run(main())


def test_left_to_the_garbage_collector(open_lanes: Open, sender: Sender, run: Run) -> None:
    """In this thread, in another, and after the loop has ended."""
    lanes = open_lanes()

    async def main() -> None:
        for number in range(2):
            sender.send(b"V")
            batches = [aiter(AsyncLanes(lanes))]
            batch = await anext(batches[0])
            if number:
                thread = threading.Thread(target=batches.clear)
                thread.start()
                thread.join()
                assert not batch.released  # batches belong to the loop's thread
                await asyncio.sleep(0)
            else:
                batches.clear()
            assert batch.released
            nothing_left(lanes)

    async def left() -> object:
        batches = aiter(AsyncLanes(lanes))
        sender.send(b"V")
        await anext(batches)
        return batches

    run(main())
    kept = [run(left())]
    assert lanes.census()["held"] == 1
    # A loop that is gone keeps nobody from receiving.
    sender.send(b"V2")
    assert run(take(lanes, 1)) == [b"V2"]
    kept.clear()
    nothing_left(lanes)
