# SPDX-License-Identifier: Apache-2.0
"""Rings between real threads: order, sums, waiting, closing, event loops, and who may do what."""

from __future__ import annotations

import asyncio
import random
import signal
import threading
from array import array
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import pytest

from userspace.datagram.ring import Ring, RingClosedError
from xdp.errors import UsageError

#: Seconds; whoever waits longer was forgotten.
WATCHDOG = 60.0


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as made:
        yield made


@pytest.fixture
def seed() -> int:
    made = random.SystemRandom().getrandbits(32)
    print(f"seed {made}")
    return made


def produce(ring: Ring, producer: int, count: int, random_seed: int, size: int) -> int:
    """Elements (producer, number, padding); returns how many were accepted before the ring was closed."""
    draws, done = random.Random(random_seed), 0
    while done < count:
        batch = min(draws.choice([1, 3, 16, 64]), count - done)
        elements = b"".join(
            (producer << 32 | number).to_bytes(8, "little").ljust(size, b"\x5a")
            for number in range(done, done + batch)
        )
        try:
            done += ring.put_many(elements, draws.choice([None, WATCHDOG, 0.0, 0.001]))
        except RingClosedError:
            break
    return done


@pytest.mark.parametrize("closing", [False, True], ids=["all", "closed half-way"])
@pytest.mark.parametrize("size", [8, 64])
@pytest.mark.parametrize("producers", [1, 3])
def test_order_and_sums(
    pool: ThreadPoolExecutor, seed: int, producers: int, size: int, closing: bool
) -> None:
    draws, count = random.Random(seed), 3000
    ring = Ring(
        draws.choice([1, 4, 64, 1024]), size, "one" if producers == 1 else "many", _start=(1 << 63) - 100
    )
    futures = [pool.submit(produce, ring, number, count, seed + number, size) for number in range(producers)]
    seen = [0] * producers
    into = bytearray(64 * size)
    stop_at = count * producers // 2 if closing else count * producers
    while True:
        want = draws.choice([1, 7, 64])
        try:
            got = ring.get_many(memoryview(into)[: want * size], draws.choice([None, WATCHDOG, 0.0, 0.001]))
        except RingClosedError:
            break
        for element in range(got):
            one = into[element * size : (element + 1) * size]
            value = int.from_bytes(one[:8], "little")
            assert one[8:] == b"\x5a" * (size - 8)
            assert value & 0xFFFFFFFF == seen[value >> 32]
            seen[value >> 32] += 1
        if sum(seen) >= stop_at:
            ring.close()
    assert [future.result(WATCHDOG) for future in futures] == seen
    assert closing or seen == [count] * producers
    counters = ring.counters()
    assert counters.enqueued == counters.dequeued == sum(seen)
    assert counters.waiting == 0
    assert 0 < counters.high_water <= ring.capacity


def test_close_wakes_who_gets(pool: ThreadPoolExecutor) -> None:
    """At whatever point of its way to sleep: before, there, or in between."""
    for _ in range(200):
        ring = Ring(4)
        waiting = pool.submit(ring.get_u64, 1, None)
        ring.close()
        with pytest.raises(RingClosedError):
            waiting.result(WATCHDOG)


@pytest.mark.parametrize("producers", ["one", "many"])
def test_close_wakes_who_puts(pool: ThreadPoolExecutor, producers: Literal["one", "many"]) -> None:
    """With what was accepted of it."""
    for _ in range(200):
        ring = Ring(4, producers=producers)
        assert ring.put_u64([0]) == 1
        ring.hand_over()
        waiting = pool.submit(ring.put_u64, range(1, 6), None)
        while ring.counters().waiting < 4:
            pass  # it has put three, and has two left
        ring.close()
        assert waiting.result(WATCHDOG) == 3
        assert ring.get_u64(8) == array("Q", range(4))


def test_one_place_wakes_all_who_wait_for_it(pool: ThreadPoolExecutor) -> None:
    """Several producers sleep; each element that is taken lets one of them go on, until all have."""
    ring = Ring(1, producers="many")
    assert ring.put_u64([99]) == 1
    waiting = [pool.submit(ring.put_u64, [number], None) for number in range(6)]
    got: list[int] = []
    while len(got) < 7:
        got += ring.get_u64(1, WATCHDOG)
    assert got[0] == 99
    assert sorted(got[1:]) == list(range(6))
    assert all(future.result(WATCHDOG) == 1 for future in waiting)


def test_a_signal_is_handled_while_getting() -> None:
    """Its handler runs in the waiting thread, may put, and may raise."""
    ring = Ring(4, producers="many")
    heard = 0

    def handle(_number: int, _frame: object) -> None:
        nonlocal heard
        heard += 1
        if heard == 3:
            assert ring.put_u64([7]) == 1
        if heard == 6:
            raise InterruptedError

    with timer(handle):
        assert ring.get_u64(4, timeout=None) == array("Q", [7])
        assert heard >= 3
        with pytest.raises(InterruptedError):
            ring.get_u64(4, timeout=WATCHDOG)
    assert heard >= 6


def test_a_signal_is_handled_while_putting() -> None:
    ring = Ring(4)
    got: list[int] = []
    heard = 0

    def handle(_number: int, _frame: object) -> None:
        nonlocal heard
        heard += 1
        if heard % 3 == 0:
            got.extend(ring.get_u64(3))

    with timer(handle):
        assert ring.put_u64(range(20), timeout=None) == 20
    got.extend(ring.get_u64(4))
    assert got == list(range(20))
    assert heard >= 15, "16 of 20 had to be taken by the handler"
    assert ring.counters().refused == 0


class timer:  # noqa: N801 (a context manager, read as a function)
    """SIGALRM each 5 ms: again and again, as one that comes just before the wait is heard after it."""

    def __init__(self, handler: Callable[[int, object], None]) -> None:
        self.handler = handler

    def __enter__(self) -> None:
        self.before = signal.signal(signal.SIGALRM, self.handler)
        signal.setitimer(signal.ITIMER_REAL, 0.005, 0.005)

    def __exit__(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, self.before)


def test_both_sides_in_event_loops(pool: ThreadPoolExecutor, seed: int) -> None:
    """asyncio on either side, in two threads; nobody polls but when the descriptor says so."""
    ring, count = Ring(8, _start=(1 << 63) - 50), 2000

    async def put() -> None:
        loop, done, draws = asyncio.get_running_loop(), 0, random.Random(seed)
        room = asyncio.Event()
        loop.add_reader(ring.room_fileno(), room.set)
        try:
            while done < count:
                batch = range(done, min(done + draws.randint(1, 12), count))
                accepted = ring.put_u64(batch)
                done += accepted
                if accepted < len(batch):
                    room.clear()
                    await asyncio.wait_for(room.wait(), WATCHDOG)
        finally:
            loop.remove_reader(ring.room_fileno())
        ring.close()

    async def get() -> list[int]:
        loop = asyncio.get_running_loop()
        got: list[int] = []
        items = asyncio.Event()
        loop.add_reader(ring.fileno(), items.set)
        try:
            while True:
                batch = ring.get_u64(5)
                got += batch
                if len(batch) < 5:
                    items.clear()
                    await asyncio.wait_for(items.wait(), WATCHDOG)
        except RingClosedError:
            return got
        finally:
            loop.remove_reader(ring.fileno())

    putting = pool.submit(asyncio.run, put())
    assert asyncio.run(get()) == list(range(count))
    putting.result(WATCHDOG)


def test_a_second_thread_may_not_put_into_a_ring_for_one(pool: ThreadPoolExecutor) -> None:
    ring = Ring(8)
    assert ring.put_u64([1]) == 1
    with pytest.raises(UsageError, match="puts into a ring that belongs to MainThread") as caught:
        pool.submit(ring.put_u64, [2]).result(WATCHDOG)
    assert "producers='many'" in caught.value.hint
    ring.hand_over()
    assert pool.submit(ring.put_u64, [2]).result(WATCHDOG) == 1
    with pytest.raises(UsageError, match="MainThread puts into a ring that belongs to"):
        ring.put_u64([3])
    assert ring.get_u64(8) == array("Q", [1, 2])


@pytest.mark.parametrize("producers", ["one", "many"])
def test_a_second_thread_may_not_get(pool: ThreadPoolExecutor, producers: Literal["one", "many"]) -> None:
    ring = Ring(8, producers=producers)
    assert ring.get_u64(1) == array("Q")
    with pytest.raises(UsageError, match="gets from a ring that belongs to MainThread"):
        pool.submit(ring.get_u64, 1).result(WATCHDOG)


def test_the_side_of_a_thread_that_has_ended_is_free() -> None:
    ring = Ring(8)
    thread = threading.Thread(target=ring.put_u64, args=([1],))
    thread.start()
    thread.join()
    assert ring.put_u64([2]) == 1
    assert ring.get_u64(8) == array("Q", [1, 2])


def test_nobody_looks_without_debugging(pool: ThreadPoolExecutor) -> None:
    ring = Ring(8, debug=False)
    assert ring.put_u64([1]) == 1
    assert pool.submit(ring.put_u64, [2]).result(WATCHDOG) == 1
    assert pool.submit(ring.get_u64, 1).result(WATCHDOG) == array("Q", [1])
    assert ring.get_u64(1) == array("Q", [2])


def test_two_at_the_same_time_are_noticed_by_the_c_code_too(pool: ThreadPoolExecutor) -> None:
    """Not always, but before long: the second one to move the index finds it moved."""
    ring = Ring(1 << 16, 64, debug=False)
    elements = bytes(64 << 15)  # 2 MiB: copying takes long enough for two to meet
    into = bytearray(64 << 16)
    stop = threading.Event()

    def put() -> None:
        try:
            while not stop.is_set():
                ring.put_many(elements)
        finally:
            stop.set()

    putting = [pool.submit(put) for _ in range(2)]
    while not stop.is_set():
        ring.get_many(into)
    errors = [future.exception(WATCHDOG) for future in putting]
    noticed = [error for error in errors if error is not None]
    assert noticed
    assert all(isinstance(error, UsageError) and "same time" in str(error) for error in noticed)
