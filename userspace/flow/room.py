# SPDX-License-Identifier: Apache-2.0
"""Back-pressure: who produces faster than a queue is emptied is refused, or waits for room.

    queue = AsyncQueue(BoundedQueue[bytes](classes=2, total=Limits(packets=1000)))
    await queue.put(packet, priority=1, until=loop.time() + 0.1)   # waits for room
    queue.put_nowait(packet)                                       # NoRoomError: why, and when to try again
    packet = await queue.get()

Room is what :meth:`userspace.flow.bounded.BoundedQueue.fits` tells: the queue would take the item without
dropping any of its class or a higher one.  Lower ones do give way, so no producer of a high class waits
because the queue is full of low ones.

Who waits, waits in line: higher classes first, each class in the order of their coming, and nobody of the
same or a lower class who comes later takes room from them.  The line is bounded too: who finds it full is
refused at once.

:class:`Room` is the line, without I/O and clock; :class:`AsyncQueue` is its face for asyncio.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sized
from enum import StrEnum
from typing import Final, Generic, TypeVar, cast

from userspace.flow.bounded import BoundedQueue, check_item, is_whole
from userspace.flow.bucket import check_time
from xdp.errors import SluiceError, UsageError

T = TypeVar("T")

#: Producers in line when nobody says otherwise.
WAITERS: Final = 1024
#: Seconds over which the rate of what leaves is averaged: some round-trip times, and short enough to follow
#: a network that changes.
_RATE_PERIOD: Final = 1.0

_NEVER: Final = math.inf


class NoRoom(StrEnum):
    """Why an item was not queued."""

    FULL = "the queue is full"
    LINE = "others wait for room"
    WAITERS = "too many wait for room"
    LATE = "there was no room in time"
    SIZE = "it is larger than the queue"


class NoRoomError(SluiceError):
    """An item was not queued: ``reason``, and ``retry_after``.

    That is the seconds until there may be room, infinite for an item that is too large, and None while
    nothing is known about how fast the queue empties.
    """

    def __init__(self, reason: NoRoom, retry_after: float | None) -> None:
        known = retry_after is not None and retry_after < _NEVER
        super().__init__(
            f"no room: {reason}" + (f"; there may be some in {retry_after:.3f} s" if known else "")
        )
        self.reason = reason
        self.retry_after = retry_after


class QueueClosedError(SluiceError):
    """The queue is closed: nothing can be put, or nothing is left to get."""

    def __init__(self) -> None:
        super().__init__("the queue is closed")


def _check_size(size: int) -> None:
    if not is_whole(size, 0):
        raise UsageError(f"a size is a whole number of bytes, 0 or more, not {size!r}")


class Waiter:
    """One in line: bytes, class, time until which it waits; ``granted`` while it may go on."""

    __slots__ = ("deadline", "granted", "priority", "size")

    def __init__(self, size: int, priority: int, deadline: float = _NEVER) -> None:
        _check_size(size)
        if math.isnan(deadline):
            raise UsageError("a deadline is a time, not nan")
        self.size = size
        self.priority = priority
        self.deadline = deadline
        self.granted = False


class Room(Generic[T]):
    """The line of those who wait for room in a queue, at most ``waiters``.

        refusal = room.refusal(now, size, priority)
        if refusal is None: ...                       # queue it
        elif room.join(now, waiter) is None: ...      # wait until it is granted; or see the refusal
        ...
        if room.confirm(waiter):                      # False: somebody higher was faster, wait again
            queue.enqueue(...)
        for other in room.leave(waiter): ...          # always, also for who gives up; these may go on

    After whatever leaves the queue, call ``freed``, and after whoever was not in line has queued something,
    ``queued``: they tell who may go on, too.
    """

    __slots__ = ("_count", "_elapsed", "_emptying", "_granted", "_last", "_lines", "_queue", "_waiters")

    def __init__(self, queue: BoundedQueue[T], *, waiters: int = WAITERS) -> None:
        if not is_whole(waiters, 0):
            raise UsageError(f"waiters are a whole number, 0 or more, not {waiters!r}")
        self._queue = queue
        self._waiters = waiters
        self._lines = tuple(OrderedDict[Waiter, None]() for _ in range(queue.classes))
        self._granted = OrderedDict[Waiter, None]()  # they stay in line until they leave
        # What left lately, and the time it took while there was something to leave; both decay.
        self._count = 0.0
        self._elapsed = 0.0
        self._last = 0.0
        self._emptying = False

    def __len__(self) -> int:
        return sum([len(line) for line in self._lines])

    def retry_after(self) -> float | None:
        """Seconds until one more than all in line will have found room, None if that can't be told."""
        return (len(self) + 1) * self._elapsed / self._count if self._count else None

    def refusal(self, now: float, size: int, priority: int) -> NoRoomError | None:
        """None when an item may be queued now, else why not.  Raises UsageError for values out of range."""
        _check_size(size)
        if size > self._queue.largest(priority):
            return NoRoomError(NoRoom.SIZE, _NEVER)
        if any(self._lines[: priority + 1]):
            return NoRoomError(NoRoom.LINE, self.retry_after())
        if not self._queue.fits(priority, size):
            self._queue.expire(now)
            if not self._queue.fits(priority, size):
                return NoRoomError(NoRoom.FULL, self.retry_after())
        return None

    def join(self, now: float, waiter: Waiter) -> NoRoomError | None:
        """Wait in line; or why that is not possible.  For who has been refused."""
        if waiter.size > self._queue.largest(waiter.priority):
            return NoRoomError(NoRoom.SIZE, _NEVER)
        if not waiter.deadline > now:
            return NoRoomError(NoRoom.LATE, self.retry_after())
        if len(self) >= self._waiters:
            return NoRoomError(NoRoom.WAITERS, self.retry_after())
        self._lines[waiter.priority][waiter] = None
        return None

    def confirm(self, waiter: Waiter) -> bool:
        """Whether one that was granted may queue its item now; if not, it has to wait on in its place.

        Since it was granted one of a higher class may have taken the room.
        """
        first = next(iter(self._lines[waiter.priority]), None) is waiter
        if first and self._queue.fits(waiter.priority, waiter.size):
            return True
        waiter.granted = False
        self._granted.pop(waiter, None)
        return False

    def leave(self, waiter: Waiter) -> list[Waiter]:
        """Out of line, for whatever reason; who may go on for that."""
        self._lines[waiter.priority].pop(waiter, None)
        self._granted.pop(waiter, None)
        waiter.granted = False
        return self._grant()

    def queued(self) -> list[Waiter]:
        """An item has been queued; who may go on, as a longer one of a lower class may have given way."""
        return self._grant()

    def freed(self, now: float, packets: int = 1) -> list[Waiter]:
        """So many items have left the queue; who may go on."""
        check_time(now)
        if self._emptying:
            elapsed = max(0.0, now - self._last)
            weight = math.exp(-elapsed / _RATE_PERIOD)
            self._count = self._count * weight + packets
            self._elapsed = self._elapsed * weight + _RATE_PERIOD * (1 - weight)
        self._last = now
        self._emptying = len(self._queue) > 0  # how long it stays empty says nothing
        return self._grant()

    def expire(self, now: float) -> tuple[list[Waiter], list[Waiter]]:
        """Who has waited too long, and is out of line; and who may go on."""
        late = [
            waiter for line in self._lines for waiter in line if waiter.deadline <= now and not waiter.granted
        ]
        for waiter in late:
            del self._lines[waiter.priority][waiter]
        self._queue.expire(now)
        return late, self._grant()

    def next_timeout(self) -> float:
        """When to call expire; infinite for never."""
        return min(
            [waiter.deadline for line in self._lines for waiter in line if not waiter.granted], default=_NEVER
        )

    def dismiss(self) -> list[Waiter]:
        """All who wait and were not granted, out of line."""
        waiting = [waiter for line in self._lines for waiter in line if not waiter.granted]
        for waiter in waiting:
            del self._lines[waiter.priority][waiter]
        return waiting

    def _grant(self) -> list[Waiter]:
        """From the front of the line as many as there is room for, with those granted before."""
        granted: list[Waiter] = []
        if len(self._granted) == len(self):
            return granted
        packets = len(self._granted) + 1
        size = sum([waiter.size for waiter in self._granted])
        for priority, line in enumerate(self._lines):
            for waiter in line:
                if waiter.granted:
                    continue
                if not self._queue.fits(priority, size + waiter.size, packets):
                    return granted  # nobody behind may take what the first one waits for
                waiter.granted = True
                self._granted[waiter] = None
                granted.append(waiter)
                packets += 1
                size += waiter.size
        return granted


class _Producer(Waiter):
    """A waiter with what wakes its task: None to go on, or an error."""

    __slots__ = ("future",)

    def __init__(self, size: int, priority: int, deadline: float) -> None:
        super().__init__(size, priority, deadline)
        self.future: asyncio.Future[SluiceError | None] = asyncio.get_running_loop().create_future()


def _wake(waiters: Iterable[Waiter], error: Callable[[], SluiceError] | None = None) -> None:
    for waiter in waiters:
        future = cast("_Producer", waiter).future
        if not future.done():  # else its task was cancelled, and will leave
            future.set_result(error() if error else None)


class AsyncQueue(Generic[T]):
    """A bounded queue for tasks of one event loop; times are those of the loop's clock.

    Whoever takes items from the bounded queue itself does not wake anybody: use ``get`` or ``get_nowait``.
    """

    __slots__ = ("_closed", "_getters", "_queue", "_room")

    def __init__(self, queue: BoundedQueue[T], *, waiters: int = WAITERS) -> None:
        self._queue = queue
        self._room = Room(queue, waiters=waiters)
        self._getters: deque[asyncio.Future[None]] = deque()
        self._closed = False

    def __len__(self) -> int:
        return len(self._queue)

    @property
    def waiting(self) -> int:
        """Producers in line."""
        return len(self._room)

    def put_nowait(
        self, item: T, size: int | None = None, priority: int = 0, *, deadline: float = _NEVER
    ) -> None:
        """Queue an item if there is room now; ``size`` is its len() unless told.

        After ``deadline`` (a time) it is dropped rather than given out.  Raises NoRoomError,
        QueueClosedError, and UsageError for values out of range.
        """
        now, size = self._checked(item, size, deadline)
        refusal = self._room.refusal(now, size, priority)
        if refusal is not None:
            raise refusal
        self._enqueue(now, item, size, priority, deadline)

    async def put(
        self,
        item: T,
        size: int | None = None,
        priority: int = 0,
        *,
        deadline: float = _NEVER,
        until: float = _NEVER,
    ) -> None:
        """Queue an item; wait for room ``until`` a time, and never after the item's ``deadline``.

        Both are times of the loop's clock.  When this is cancelled or raises, the item has not been queued.
        Errors are those of put_nowait.
        """
        now, size = self._checked(item, size, deadline)
        refusal = self._room.refusal(now, size, priority)
        if refusal is None:
            self._enqueue(now, item, size, priority, deadline)
            return
        loop = asyncio.get_running_loop()
        producer = _Producer(size, priority, min(until, deadline))
        refusal = self._room.join(now, producer)
        if refusal is not None:
            raise refusal
        timer = None
        if producer.deadline < _NEVER:
            timer = loop.call_at(producer.deadline, self._expire, producer.deadline)
        try:
            while True:
                error = await producer.future
                if error is not None:
                    raise error
                now = loop.time()
                if self._room.confirm(producer):
                    break
                if self._closed:
                    raise QueueClosedError
                if producer.deadline <= now:  # the timer has rung while it was granted
                    raise NoRoomError(NoRoom.LATE, self._room.retry_after())
                producer.future = loop.create_future()
            self._enqueue(now, item, size, priority, deadline)
        finally:
            if timer is not None:
                timer.cancel()
            _wake(self._room.leave(producer))

    def _checked(self, item: T, size: int | None, deadline: float) -> tuple[float, int]:
        """The time and the size."""
        if self._closed:
            raise QueueClosedError
        if size is None:
            if not isinstance(item, Sized):
                raise UsageError("an item without len() is put with its size in bytes")
            size = len(item)
        now = asyncio.get_running_loop().time()
        check_item(now, item, size)
        if math.isnan(deadline):
            raise UsageError("a deadline is a time, not nan")
        return now, size

    def _enqueue(self, now: float, item: T, size: int, priority: int, deadline: float) -> None:
        if not self._queue.enqueue(now, item, size, priority, deadline):
            raise NoRoomError(NoRoom.LATE, self._room.retry_after())
        _wake(self._room.queued())
        self._wake_getter()

    def _expire(self, deadline: float) -> None:
        # A timer may ring a moment early, and it rings once.
        late, granted = self._room.expire(max(deadline, asyncio.get_running_loop().time()))
        _wake(late, lambda: NoRoomError(NoRoom.LATE, self._room.retry_after()))
        _wake(granted)

    def get_nowait(self) -> T | None:
        """The next item, None when there is none."""
        now = asyncio.get_running_loop().time()
        item = self._queue.dequeue(now)
        _wake(self._room.freed(now, 1 if item is not None else 0))
        return item

    async def get(self) -> T:
        """The next item; waits for one.  Raises QueueClosedError when it is closed and nothing is left.

        When this is cancelled, no item is lost.
        """
        while True:
            item = self.get_nowait()
            if item is not None:
                return item
            if self._closed:
                raise QueueClosedError
            getter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._getters.append(getter)
            try:
                await getter
            except BaseException:
                with contextlib.suppress(ValueError):  # taken out by who found it cancelled
                    self._getters.remove(getter)
                if not getter.cancelled():  # woken for an item, and cancelled before it could take it
                    self._wake_getter()
                raise

    def _wake_getter(self) -> None:
        while self._getters and len(self._queue):
            getter = self._getters.popleft()
            if not getter.done():
                getter.set_result(None)
                return

    def close(self) -> None:
        """No more is put; what is queued can be got.  Who waits for room or items gets QueueClosedError."""
        self._closed = True
        _wake(self._room.dismiss(), QueueClosedError)
        for getter in self._getters:
            if not getter.done():
                getter.set_result(None)
        self._getters.clear()
