# SPDX-License-Identifier: Apache-2.0
"""Back-pressure under asyncio, in virtual time; cancellation at each step."""

from __future__ import annotations

import asyncio
import math
import selectors
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from random import Random
from typing import Any, TypeVar

import pytest

from userspace.flow.bounded import BoundedQueue, DropReason, Limits
from userspace.flow.room import AsyncQueue, NoRoom, NoRoomError, QueueClosedError
from xdp.errors import UsageError

INF = math.inf
T = TypeVar("T")


def bounded(packets: int = 2, classes: int = 2, **options: Any) -> BoundedQueue[Any]:
    return BoundedQueue[Any](classes=classes, total=Limits(packets=packets, **options))


class VirtualSelector(selectors.SelectSelector):
    """Instead of waiting it puts the clock forward; with nothing to wait for it fails."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise AssertionError("all tasks wait, and nothing will wake them")
        self.now += max(0.0, timeout)
        return super().select(0)


class VirtualLoop(asyncio.SelectorEventLoop):
    """Its time is that of its selector."""

    def __init__(self) -> None:
        self.selector = VirtualSelector()
        super().__init__(self.selector)

    def time(self) -> float:
        return self.selector.now


def run(main: Coroutine[Any, Any, T]) -> T:
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)


async def turns(count: int = 1) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def settled(*tasks: asyncio.Task[Any]) -> list[Any]:
    return await asyncio.gather(*tasks, return_exceptions=True)


def test_puts_wait_for_gets() -> None:
    async def main() -> None:
        queue = AsyncQueue(bounded())
        puts = [asyncio.create_task(queue.put(f"item {number}")) for number in range(6)]
        await turns(3)
        assert (len(queue), queue.waiting) == (2, 4)
        assert [await queue.get() for _ in range(6)] == [f"item {number}" for number in range(6)]
        assert await settled(*puts) == [None] * 6
        assert (len(queue), queue.waiting) == (0, 0)
        assert queue.get_nowait() is None

    run(main())


def test_gets_wait_for_puts() -> None:
    async def main() -> None:
        queue = AsyncQueue(bounded())
        gets = [asyncio.create_task(queue.get()) for _ in range(3)]
        await turns()
        for number in range(3):
            await queue.put(number, 1)
            await turns(2)
        assert await settled(*gets) == [0, 1, 2]

    run(main())


def test_who_was_woken_for_an_item_and_cancelled_passes_it_on() -> None:
    async def main() -> None:
        queue = AsyncQueue(bounded())
        gets = [asyncio.create_task(queue.get()) for _ in range(3)]
        await turns()
        gets[1].cancel()
        queue.put_nowait("a")  # wakes the first
        gets[0].cancel()
        assert await gets[2] == "a"  # or this would wait for ever
        assert [type(error) for error in await settled(*gets[:2])] == [asyncio.CancelledError] * 2

    run(main())


def test_refused_at_once() -> None:
    async def main() -> None:
        queue = AsyncQueue(bounded(bytes=50), waiters=1)
        queue.put_nowait(b"abc", priority=1)
        queue.put_nowait("x", 7, 1)
        with pytest.raises(NoRoomError) as refused:
            queue.put_nowait(b"abc", priority=1)
        assert (refused.value.reason, refused.value.retry_after) == (NoRoom.FULL, None)
        with pytest.raises(NoRoomError, match="larger"):
            await queue.put(b"x" * 51)
        with pytest.raises(NoRoomError) as refused:
            await queue.put("x", 1, 1, until=0.0)
        assert refused.value.reason is NoRoom.LATE
        waiting = asyncio.create_task(queue.put(b"y", priority=1))
        await turns()
        with pytest.raises(NoRoomError) as refused:
            await queue.put(b"z", priority=1)
        assert refused.value.reason is NoRoom.WAITERS
        assert queue.get_nowait() == b"abc"
        await waiting

    run(main())


def test_deadlines() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        inner = bounded()
        queue = AsyncQueue(inner)
        queue.put_nowait("a")
        queue.put_nowait("b")
        puts = [
            asyncio.create_task(queue.put("c", until=2.0)),
            asyncio.create_task(queue.put("d", deadline=1.0)),
            asyncio.create_task(queue.put("e")),
        ]
        late = await asyncio.gather(*puts[:2], return_exceptions=True)
        assert [error.reason for error in late if isinstance(error, NoRoomError)] == [NoRoom.LATE] * 2
        assert loop.time() == pytest.approx(2.0)
        assert queue.waiting == 1
        assert await queue.get() == "a"
        await puts[2]
        assert [queue.get_nowait() for _ in range(3)] == ["b", "e", None]
        with pytest.raises(NoRoomError, match="in time"):
            queue.put_nowait("f", deadline=1.0)
        assert inner.counters().dropped == {DropReason.DEADLINE: 1}

    run(main())


def test_a_timer_that_rings_early() -> None:
    """Asyncio may call a moment before the time: nobody is forgotten for that."""

    async def main() -> None:
        queue = AsyncQueue(bounded(packets=1))
        queue.put_nowait("a")
        put = asyncio.create_task(queue.put("b", until=1.0))
        await turns()
        queue._expire(1.0)  # at 0.0
        await turns(2)
        assert put.done()
        with pytest.raises(NoRoomError, match="in time"):
            await put

    run(main())


def test_a_higher_put_takes_the_room() -> None:
    async def main(until: float, *, close: bool) -> tuple[Any, int]:
        loop = asyncio.get_running_loop()
        queue = AsyncQueue(bounded(packets=1))
        queue.put_nowait("x")
        low = asyncio.create_task(queue.put("low", priority=1, until=until))
        await turns()
        assert queue.get_nowait() == "x"  # low is granted the room, and has not run yet
        queue.put_nowait("high")
        if close:
            queue.close()
        if until < INF:
            cast_selector(loop).now = until
        await turns(3)
        if not low.done():
            assert queue.get_nowait() == "high"
        result = (await settled(low))[0]
        return result, queue.waiting

    assert run(main(INF, close=False)) == (None, 0)
    late, waiting = run(main(1.0, close=False))
    assert isinstance(late, NoRoomError)
    assert late.reason is NoRoom.LATE
    assert waiting == 0
    closed, waiting = run(main(INF, close=True))
    assert isinstance(closed, QueueClosedError)
    assert waiting == 0


def cast_selector(loop: asyncio.AbstractEventLoop) -> VirtualSelector:
    assert isinstance(loop, VirtualLoop)
    return loop.selector


def test_order_is_kept_by_who_comes_while_others_are_woken() -> None:
    async def main() -> None:
        queue = AsyncQueue(bounded(packets=2))
        queue.put_nowait("a")
        queue.put_nowait("b")
        first = asyncio.create_task(queue.put("c"))
        await turns()
        assert queue.get_nowait() == "a"
        assert queue.get_nowait() == "b"
        with pytest.raises(NoRoomError) as refused:
            queue.put_nowait("d")
        assert refused.value.reason is NoRoom.LINE
        second = asyncio.create_task(queue.put("d"))
        assert await settled(second, first) == [None, None]
        assert [queue.get_nowait(), queue.get_nowait()] == ["c", "d"]

    run(main())


def test_close() -> None:
    async def main() -> None:
        queue = AsyncQueue(bounded(packets=1))
        queue.put_nowait("a")
        puts = [asyncio.create_task(queue.put(f"{number}")) for number in range(2)]
        await turns()
        puts[1].cancel()
        queue.close()
        with pytest.raises(QueueClosedError):
            queue.put_nowait("b")
        results = await settled(*puts)
        assert isinstance(results[0], QueueClosedError)
        assert isinstance(results[1], asyncio.CancelledError)
        assert await queue.get() == "a"
        with pytest.raises(QueueClosedError):
            await queue.get()
        other = AsyncQueue(bounded())
        gets = [asyncio.create_task(other.get()) for _ in range(2)]
        await turns()
        gets[0].cancel()
        other.close()
        results = await settled(*gets)
        assert isinstance(results[0], asyncio.CancelledError)
        assert isinstance(results[1], QueueClosedError)

    run(main())


def test_items_out_of_range() -> None:
    async def main() -> None:
        queue = AsyncQueue(bounded())
        for item, size, deadline in (
            (None, 1, INF),
            (5, None, INF),
            ("a", -1, INF),
            ("a", 1.5, INF),
            ("a", 1, math.nan),
        ):
            with pytest.raises(UsageError):
                queue.put_nowait(item, size, deadline=deadline)  # type: ignore[arg-type]
            with pytest.raises(UsageError):
                await queue.put(item, size, deadline=deadline)  # type: ignore[arg-type]
        with pytest.raises(UsageError):
            queue.put_nowait("a", priority=2)

    run(main())


#: Of a scenario: makes its tasks, and what has to be true in the end.
Scenario = Callable[[AsyncQueue[Any]], Awaitable[list[asyncio.Task[Any]]]]


async def producers(queue: AsyncQueue[Any]) -> list[asyncio.Task[Any]]:
    """Five that put into one place, and one consumer that comes after some turns."""

    async def consume() -> list[Any]:
        items = []
        await turns(3)
        while len(queue) or queue.waiting:
            items.append(await queue.get())
            await turns()
        return items

    puts = [asyncio.create_task(queue.put(f"put {number}"), name=f"put {number}") for number in range(5)]
    return [*puts, asyncio.create_task(consume(), name="consumer")]


async def consumers(queue: AsyncQueue[Any]) -> list[asyncio.Task[Any]]:
    """Four that get, and one producer of four items."""

    async def produce() -> None:
        await turns(2)
        for number in range(4):
            await queue.put(f"item {number}")
            if number == 1:
                await turns(2)

    gets = [asyncio.create_task(queue.get(), name=f"get {number}") for number in range(4)]
    return [*gets, asyncio.create_task(produce(), name="producer")]


def cancellations() -> Iterator[tuple[Scenario, int, int]]:
    for scenario, tasks in ((producers, 6), (consumers, 5)):
        for task in range(tasks):
            for step in range(14):
                yield scenario, task, step


def test_cancelled_at_each_step() -> None:
    """Whichever task is cancelled when: what was put is got once, in order, and nobody waits for ever."""
    cancelled = 0

    async def main(scenario: Scenario, victim: int, step: int) -> None:
        nonlocal cancelled
        queue = AsyncQueue(bounded(packets=1, classes=1))
        tasks = await scenario(queue)
        await turns(step)
        was_cancelled = tasks[victim].cancel()
        await turns(30)
        # Who is still there waits for somebody who was cancelled: the rest is done by hand.
        rest: list[Any] = []
        for _ in range(10):
            if (item := queue.get_nowait()) is not None:
                rest.append(item)
            await turns(3)
        if scenario is consumers:
            for number in range(10, 15):
                await queue.put(f"item {number}")
                await turns(3)
                if (item := queue.get_nowait()) is not None:
                    rest.append(item)
        results = await settled(*tasks)
        ended = isinstance(results[victim], asyncio.CancelledError)
        assert not ended or was_cancelled
        cancelled += ended
        assert all(
            not isinstance(result, BaseException) for result in results[:victim] + results[victim + 1 :]
        )
        assert queue.waiting == len(queue) == 0
        if scenario is producers and not (ended and victim == 5):
            got = (results[5] if victim != 5 or not ended else []) + rest
            put = [f"put {number}" for number in range(5) if results[number] is None]
            assert got == put
        if scenario is consumers:
            got = [item for item in [*results[:4], *rest] if isinstance(item, str)]
            assert len(set(got)) == len(got)
            wanted = {f"item {number}" for number in range(10, 15)}
            if not (ended and victim == 4):
                wanted |= {f"item {number}" for number in range(4)}
            assert wanted <= set(got)

    for scenario, victim, step in cancellations():
        run(main(scenario, victim, step))
    assert cancelled > 50  # else they came too late


@pytest.mark.parametrize("seed", range(40))
def test_at_random(seed: int) -> None:
    """Puts, gets, cancellations and time-outs as they come: each item is got once or its put has failed."""
    random = Random(seed)

    async def main() -> None:
        queue = AsyncQueue(bounded(packets=random.randint(1, 4), classes=1), waiters=random.randint(2, 20))
        loop = asyncio.get_running_loop()
        puts: list[asyncio.Task[None]] = []
        gets: list[asyncio.Task[int]] = []
        for number in range(120):
            kind = random.random()
            if kind < 0.4:
                until = loop.time() + random.choice([0.01, 1.0, INF])
                puts.append(asyncio.create_task(queue.put(number, 1, until=until), name=str(number)))
            elif kind < 0.75:
                gets.append(asyncio.create_task(queue.get()))
            elif kind < 0.9 and puts and gets:
                (random.choice(puts) if random.random() < 0.5 else random.choice(gets)).cancel()
            elif kind < 0.95:
                await asyncio.sleep(0.02)  # virtual
            await turns(random.randint(0, 2))
        got = []
        while queue.waiting or len(queue):
            if (item := queue.get_nowait()) is not None:
                got.append(item)
            await turns(2)
        queue.close()
        results = await settled(*puts)
        put = [int(task.get_name()) for task, result in zip(puts, results, strict=True) if result is None]
        got += [result for result in await settled(*gets) if isinstance(result, int)]
        assert sorted(got) == put, f"seed {seed}"
        failures = (NoRoomError, asyncio.CancelledError, QueueClosedError)
        assert all(result is None or isinstance(result, failures) for result in results)

    run(main())
