# SPDX-License-Identifier: Apache-2.0
"""A queue with limits that keeps the newest of what matters most.

    queue = BoundedQueue[bytes](classes=3, total=Limits(packets=1000, age=0.5), on_drop=report)
    queue.enqueue(now, packet, len(packet), priority=2, deadline=now + 0.05)
    packet = queue.dequeue(now)            # None: nothing is left that is still worth sending

Class 0 is the highest.  Priorities are strict: as long as a higher class has something, nothing leaves a
lower one.

When the whole is full, the oldest of the lowest class that has any gives way, and a higher class never
does for a lower one: then it is the new item that is dropped.  So is one whose own class is the lowest, if
``drop_oldest`` is off.  A class that is full by its own limits drops its own oldest in the same way.  Old
data is the first to go because it is the first to be useless; for data that is not, turn that off.

Items that are older than their class allows or past their deadline are dropped when they come to the head
of their class, or when there is no room.  They use room until then, but no more than the limits say.

Every item that is dropped is counted by its reason and class, and given to ``on_drop``.  For each class

    enqueued == dequeued + sum(dropped.values()) + packets        (what is queued now)

at all times: what is refused counts as enqueued too.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Final, Generic, NamedTuple, TypeVar

from userspace.flow.bucket import check_time
from xdp.errors import UsageError

T = TypeVar("T")

#: As many as there are lanes, so that a lane's number can be the priority of what answers it.
CLASSES_MAXIMUM: Final = 8
#: Packets and bytes of a queue when nobody says otherwise: those of fq_codel in the kernel.
PACKETS: Final = 10_240
BYTES: Final = 32 << 20

_NEVER: Final = math.inf


def is_whole(value: object, least: int, most: float = _NEVER) -> bool:
    """Whether it is a whole number in that range, both included."""
    return isinstance(value, int) and least <= value <= most


class DropReason(StrEnum):
    """Why an item was dropped, in all queues of this package."""

    REFUSED = "refused"  # new, and nothing would give way for it
    OVERFLOW = "overflow"  # gave way for a newer or a higher one
    AGE = "age"  # waited longer than its class allows
    DEADLINE = "deadline"  # its own time was over
    CODEL = "codel"  # by CoDel, so that its sender slows down
    CLEARED = "cleared"  # by clear()


#: Told of each item that is dropped: the item, its bytes, why.  It must not call the queue.
OnDrop = Callable[[T, int, DropReason], None]


class Limits(NamedTuple):
    """What a queue or class may hold: packets, bytes, and seconds that an item may wait."""

    packets: int = PACKETS
    bytes: int = BYTES
    age: float = _NEVER

    def check(self, *, aging: bool = True) -> Limits:
        """Itself; raises UsageError for values out of range, and for an age where none can be had."""
        for name, value in (("packets", self.packets), ("bytes", self.bytes)):
            if not is_whole(value, 1):
                raise UsageError(f"a limit in {name} is a whole number, 1 or more, not {value!r}")
        if not self.age >= 0:
            raise UsageError(f"an age is seconds, 0 or more, not {self.age!r}")
        if not aging and self.age != _NEVER:
            raise UsageError("CoDel limits how long items wait by itself: no age here")
        return self


DEFAULT_LIMITS: Final = Limits()


class QueueCounters:
    """What has become of the items of a queue, or of one class of it, since it was made."""

    __slots__ = ("bytes", "dequeued", "dropped", "enqueued", "marked", "packets")

    def __init__(self) -> None:
        self.enqueued = 0  # offered, with those that were refused
        self.dequeued = 0
        self.dropped: dict[DropReason, int] = {}
        self.marked = 0  # of those dequeued: with a congestion mark instead of a drop
        #: In the queue now.
        self.packets = 0
        self.bytes = 0

    def drop(self, reason: DropReason) -> None:
        """Count one."""
        self.dropped[reason] = self.dropped.get(reason, 0) + 1

    def add(self, other: QueueCounters) -> None:
        """Count all of another's too."""
        self.enqueued += other.enqueued
        self.dequeued += other.dequeued
        self.marked += other.marked
        self.packets += other.packets
        self.bytes += other.bytes
        for reason, count in other.dropped.items():
            self.dropped[reason] = self.dropped.get(reason, 0) + count

    def __repr__(self) -> str:
        dropped = ", ".join(f"{reason} {count}" for reason, count in sorted(self.dropped.items()))
        return (
            f"<{self.enqueued} enqueued, {self.dequeued} dequeued, {self.packets} queued"
            f" ({self.bytes} bytes), dropped: {dropped or 'none'}>"
        )


def check_item(now: float, item: object, size: int) -> None:
    """UsageError for what no queue takes: no item, a size that is none, a time that is none."""
    check_time(now)
    if item is None:
        raise UsageError("None can't be queued: it is what an empty queue answers")
    if not is_whole(size, 0):
        raise UsageError(f"a size is a whole number of bytes, 0 or more, not {size!r}")


class _Class(Generic[T]):
    """One priority: item, bytes, when it came, until when it is of use."""

    __slots__ = ("counters", "items", "limits")

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.items: deque[tuple[T, int, float, float]] = deque()
        self.counters = QueueCounters()


class BoundedQueue(Generic[T]):
    """A queue of ``classes`` priorities, with limits for all and for each.

    ``each`` has the limits of single classes, by number; the others have those of the whole.  An item's age
    is limited by the lower of the two.  Raises UsageError for values out of range.
    """

    __slots__ = ("_bytes", "_classes", "_drop_oldest", "_on_drop", "_packets", "_total")

    def __init__(
        self,
        *,
        classes: int = 1,
        total: Limits = DEFAULT_LIMITS,
        each: Mapping[int, Limits] | None = None,
        drop_oldest: bool = True,
        on_drop: OnDrop[T] | None = None,
    ) -> None:
        if not is_whole(classes, 1, CLASSES_MAXIMUM):
            raise UsageError(f"classes are from 1 to {CLASSES_MAXIMUM}, not {classes!r}")
        self._total = total.check()
        each = each or {}
        for number in each:
            if number not in range(classes):
                raise UsageError(f"limits for class {number!r}, but the classes are 0 to {classes - 1}")
        self._classes = tuple(_Class[T](each.get(number, total).check()) for number in range(classes))
        self._packets = 0
        self._bytes = 0
        self._drop_oldest = drop_oldest
        self._on_drop = on_drop

    def __len__(self) -> int:
        return self._packets

    @property
    def bytes(self) -> int:
        """Bytes that are queued."""
        return self._bytes

    @property
    def classes(self) -> int:
        """How many."""
        return len(self._classes)

    def counters(self, priority: int | None = None) -> QueueCounters:
        """Of one class, kept up to date; or the sums of all, as they are now."""
        if priority is not None:
            return self._class(priority).counters
        sums = QueueCounters()
        for one in self._classes:
            sums.add(one.counters)
        return sums

    def _class(self, priority: int) -> _Class[T]:
        if not is_whole(priority, 0, len(self._classes) - 1):
            raise UsageError(f"priorities are 0 to {len(self._classes) - 1}, not {priority!r}")
        return self._classes[priority]

    # --- in

    def enqueue(self, now: float, item: T, size: int, priority: int = 0, deadline: float = _NEVER) -> bool:
        """Queue an item of ``size`` bytes; False when it was dropped at once.

        After ``deadline`` (a time) it is dropped rather than dequeued.  Raises UsageError for an item that
        is None, and for values out of range.
        """
        check_item(now, item, size)
        own = self._class(priority)
        if math.isnan(deadline):
            raise UsageError("a deadline is a time, not nan")
        own.counters.enqueued += 1
        if deadline < now:
            self._dropped(own, item, size, DropReason.DEADLINE)
            return False
        if not self._has_room(own, size, 1):
            self.expire(now)
            if not self._make_room(priority, size):
                self._dropped(own, item, size, DropReason.REFUSED)
                return False
        own.items.append((item, size, now, deadline))
        own.counters.packets += 1
        own.counters.bytes += size
        self._packets += 1
        self._bytes += size
        return True

    def _has_room(self, own: _Class[T], size: int, packets: int) -> bool:
        total, limits, counters = self._total, own.limits, own.counters
        return (
            self._packets + packets <= total.packets
            and self._bytes + size <= total.bytes
            and counters.packets + packets <= limits.packets
            and counters.bytes + size <= limits.bytes
        )

    def fits(self, priority: int, size: int, packets: int = 1) -> bool:
        """Whether packets of so many bytes together find room without a drop in their class or a higher one.

        Lower classes would give way.  Raises UsageError for a class that does not exist.
        """
        own = self._class(priority)
        lower = self._classes[priority + 1 :]
        yielding = sum([one.counters.packets for one in lower])
        yielding_bytes = sum([one.counters.bytes for one in lower])
        return (
            own.counters.packets + packets <= own.limits.packets
            and own.counters.bytes + size <= own.limits.bytes
            and self._packets - yielding + packets <= self._total.packets
            and self._bytes - yielding_bytes + size <= self._total.bytes
        )

    def largest(self, priority: int) -> int:
        """Bytes of the longest item that the class can ever take; UsageError if there is no such class."""
        return min(self._class(priority).limits.bytes, self._total.bytes)

    def _make_room(self, priority: int, size: int) -> bool:
        """Drop what gives way for such an item; False, and nothing is dropped, if that is not enough."""
        own = self._classes[priority]
        if self._drop_oldest:
            higher = self._classes[:priority]
            if (
                size > min(own.limits.bytes, self._total.bytes - sum([one.counters.bytes for one in higher]))
                or sum([one.counters.packets for one in higher]) >= self._total.packets
            ):
                return False
        elif not self.fits(priority, size):
            return False
        counters, limits = own.counters, own.limits
        while counters.packets + 1 > limits.packets or counters.bytes + size > limits.bytes:
            self._drop_head(own, DropReason.OVERFLOW)
        lowest = len(self._classes) - 1
        while self._packets + 1 > self._total.packets or self._bytes + size > self._total.bytes:
            while not self._classes[lowest].items:
                lowest -= 1
            self._drop_head(self._classes[lowest], DropReason.OVERFLOW)
        return True

    # --- out

    def dequeue(self, now: float) -> T | None:
        """The oldest item of the highest class that is still of use; None when there is none."""
        for one in self._classes:
            if one.items and self._expire_head(one, now):
                item, size, _, _ = one.items.popleft()
                counters = one.counters
                counters.packets -= 1
                counters.bytes -= size
                counters.dequeued += 1
                self._packets -= 1
                self._bytes -= size
                return item
        return None

    def next_size(self, now: float) -> int | None:
        """Bytes of what dequeue would give at this time, so that a pacer can be asked; None: nothing."""
        for one in self._classes:
            if one.items and self._expire_head(one, now):
                return one.items[0][1]
        return None

    # --- dropped

    def _expire_head(self, one: _Class[T], now: float) -> bool:
        """Drop what is of no use any more from the head; whether something is left."""
        age = min(one.limits.age, self._total.age)
        while one.items:
            _, _, came, deadline = one.items[0]
            if now > deadline:
                self._drop_head(one, DropReason.DEADLINE)
            elif now - came > age:
                self._drop_head(one, DropReason.AGE)
            else:
                return True
        return False

    def expire(self, now: float) -> None:
        """Drop what is of no use any more at the head of any class.

        Worth calling now and then where items are seldom dequeued.
        """
        check_time(now)
        for one in self._classes:
            self._expire_head(one, now)

    def clear(self) -> None:
        """Drop all."""
        for one in self._classes:
            while one.items:
                self._drop_head(one, DropReason.CLEARED)

    def _drop_head(self, one: _Class[T], reason: DropReason) -> None:
        item, size, _, _ = one.items.popleft()
        one.counters.packets -= 1
        one.counters.bytes -= size
        self._packets -= 1
        self._bytes -= size
        self._dropped(one, item, size, reason)

    def _dropped(self, one: _Class[T], item: T, size: int, reason: DropReason) -> None:
        """Last of all: the counters add up when it is told."""
        one.counters.drop(reason)
        if self._on_drop is not None:
            self._on_drop(item, size, reason)

    def __repr__(self) -> str:
        return f"<BoundedQueue {self.counters()!r}>"
