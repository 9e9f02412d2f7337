# SPDX-License-Identifier: Apache-2.0
"""CoDel: a queue that drops when what leaves it has waited too long for too long (RFC 8289).

    queue = CoDel[bytes](mark=set_congestion_experienced, on_drop=report)
    queue.enqueue(now, packet, len(packet))
    packet = queue.dequeue(now)

A queue that a burst fills is good, one that stays full is only delay.  So what counts is the least time that
packets waited: once that has been above ``target`` for a whole ``interval``, a packet is dropped as it
leaves, and then more, each sooner after the last (interval / sqrt(count)), until one leaves in time.

Both are set once for all rates: 5 ms, and a common round-trip time of 100 ms (RFC 8289, section 4).

With ``mark``, packets that it marks (RFC 3168: congestion experienced) leave instead of being dropped.  It
is given the item and says whether it could; it must not call the queue.  ``on_drop`` is told of the others.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import Final, Generic, TypeVar

from userspace.flow.bounded import (
    DEFAULT_LIMITS,
    DropReason,
    Limits,
    OnDrop,
    QueueCounters,
    check_item,
    is_whole,
)
from userspace.flow.bucket import check_time
from userspace.flow.congestion import MAX_DATAGRAM_SIZE
from xdp.errors import UsageError

T = TypeVar("T")

#: Seconds that a packet may wait all the time: 5 % of the interval (RFC 8289, section 4).
TARGET: Final = 0.005
#: Seconds: the longest round-trip time that is common (RFC 8289, section 4).
INTERVAL: Final = 0.1
#: Intervals in which an earlier rate of drops is still a good guess (RFC 8289, 5.5).
_REMEMBERED: Final = 16

#: Marks an item instead of its being dropped; False when it can't be marked.
Mark = Callable[[T], bool]


class CodelParameters:
    """What all queues of one kind share: seconds, seconds, bytes of a full packet."""

    __slots__ = ("interval", "mtu", "target")

    def __init__(self, target: float, interval: float, mtu: int) -> None:
        if not 0 < target < math.inf:
            raise UsageError(f"a target is seconds, more than 0, not {target!r}")
        if not target <= interval < math.inf:
            raise UsageError(f"an interval is seconds, at least the target of {target:g}, not {interval!r}")
        if not is_whole(mtu, 1):
            raise UsageError(f"a full packet has bytes, 1 or more, not {mtu!r}")
        self.target = target
        self.interval = interval
        self.mtu = mtu


class ControlLaw:
    """When to drop: the state in RFC 8289, section 5, which knows no packets."""

    __slots__ = ("count", "drop_next", "dropping", "first_above", "last_count", "parameters")

    def __init__(self, parameters: CodelParameters) -> None:
        self.parameters = parameters
        self.first_above: float | None = None  # when it will have been above the target for an interval
        self.drop_next = -math.inf  # when the next drop is due
        self.count = 0  # drops since the state was entered
        self.last_count = 0  # that, when it was entered last
        self.dropping = False

    def may_drop(self, now: float, came: float, left: int) -> bool:
        """Whether the packet that has just left may be dropped: when it came, bytes that are still queued."""
        parameters = self.parameters
        if now - came < parameters.target or left <= parameters.mtu:
            self.first_above = None
            return False
        if self.first_above is None:
            self.first_above = now + parameters.interval
            return False
        return now >= self.first_above

    def enter(self, now: float) -> None:
        """The first drop of a row: the rate of the last row is a good beginning if that was just now."""
        parameters = self.parameters
        self.dropping = True
        delta = self.count - self.last_count
        again = delta > 1 and now - self.drop_next < _REMEMBERED * parameters.interval
        self.count = self.last_count = delta if again else 1
        self.drop_next = now + parameters.interval / math.sqrt(self.count)

    def schedule(self) -> None:
        """The drop after the one that was due."""
        self.drop_next += self.parameters.interval / math.sqrt(self.count)

    def remembers(self, now: float) -> bool:
        """Whether an empty queue's state would make a difference."""
        memory = _REMEMBERED * self.parameters.interval
        return self.dropping or (self.count - self.last_count > 1 and now - self.drop_next < memory)


#: What waits: item, bytes, when it came.
Entry = tuple[T, int, float]


class CodelFifo(Generic[T]):
    """Packets under one control law, without limits and counters: those belong to what it is part of."""

    __slots__ = ("bytes", "items", "law")

    def __init__(self, parameters: CodelParameters) -> None:
        self.law = ControlLaw(parameters)
        self.items: deque[Entry[T]] = deque()
        self.bytes = 0

    def append(self, now: float, item: T, size: int) -> None:
        """Queue it."""
        self.items.append((item, size, now))
        self.bytes += size

    def pop(self) -> Entry[T]:
        """The oldest, whatever the law says; there must be one."""
        entry = self.items.popleft()
        self.bytes -= entry[1]
        return entry

    def _next(self, now: float) -> tuple[Entry[T] | None, bool]:
        """The oldest, and whether it may be dropped (dodequeue in RFC 8289, 5.6)."""
        if not self.items:
            self.law.first_above = None
            return None, False
        entry = self.pop()
        return entry, self.law.may_drop(now, entry[2], self.bytes)

    def take(self, now: float, mark: Mark[T], discard: Callable[[Entry[T]], None]) -> Entry[T] | None:
        """What leaves now, after what is discarded for it (deque in RFC 8289, 5.5).

        A packet that is marked leaves, and stands for the drop that was due.
        """
        law = self.law
        entry, may_drop = self._next(now)
        if law.dropping:
            law.dropping = may_drop
            while law.dropping and now >= law.drop_next and entry is not None:
                law.count += 1
                if mark(entry[0]):
                    law.schedule()
                    break
                discard(entry)
                entry, law.dropping = self._next(now)
                if law.dropping:
                    law.schedule()
        elif may_drop and entry is not None:
            if not mark(entry[0]):
                discard(entry)
                entry, _ = self._next(now)
            law.enter(now)
        return entry


class CoDel(Generic[T]):
    """A first-in first-out queue under CoDel; what finds the limits used up is refused.

    ``target`` and ``interval`` are seconds, ``mtu`` is the bytes of a full packet: with no more than that
    queued nothing is dropped.  Raises UsageError for values out of range.
    """

    __slots__ = ("_fifo", "_limits", "_mark", "_on_drop", "counters")

    def __init__(
        self,
        *,
        target: float = TARGET,
        interval: float = INTERVAL,
        mtu: int = MAX_DATAGRAM_SIZE,
        limits: Limits = DEFAULT_LIMITS,
        mark: Mark[T] | None = None,
        on_drop: OnDrop[T] | None = None,
    ) -> None:
        self._fifo = CodelFifo[T](CodelParameters(target, interval, mtu))
        self._limits = limits.check(aging=False)
        self._mark = mark
        self._on_drop = on_drop
        self.counters = QueueCounters()

    def __len__(self) -> int:
        return self.counters.packets

    @property
    def bytes(self) -> int:
        """Bytes that are queued."""
        return self.counters.bytes

    def enqueue(self, now: float, item: T, size: int) -> bool:
        """Queue an item of ``size`` bytes; False when there is no room and it was dropped.

        Raises UsageError for an item that is None, and for values out of range.
        """
        check_item(now, item, size)
        counters = self.counters
        counters.enqueued += 1
        if counters.packets >= self._limits.packets or counters.bytes + size > self._limits.bytes:
            self._dropped(item, size, DropReason.REFUSED)
            return False
        self._fifo.append(now, item, size)
        counters.packets += 1
        counters.bytes += size
        return True

    def dequeue(self, now: float) -> T | None:
        """The oldest item that CoDel lets through; None when there is none."""
        check_time(now)
        entry = self._fifo.take(now, self._marked, self._discard)
        if entry is None:
            return None
        self._left(entry[1])
        self.counters.dequeued += 1
        return entry[0]

    def clear(self) -> None:
        """Drop all."""
        while self._fifo.items:
            item, size, _ = self._fifo.pop()
            self._left(size)
            self._dropped(item, size, DropReason.CLEARED)

    def _left(self, size: int) -> None:
        self.counters.packets -= 1
        self.counters.bytes -= size

    def _marked(self, item: T) -> bool:
        if self._mark is None or not self._mark(item):
            return False
        self.counters.marked += 1
        return True

    def _discard(self, entry: Entry[T]) -> None:
        item, size, _ = entry
        self._left(size)
        self._dropped(item, size, DropReason.CODEL)

    def _dropped(self, item: T, size: int, reason: DropReason) -> None:
        self.counters.drop(reason)
        if self._on_drop is not None:
            self._on_drop(item, size, reason)

    def __repr__(self) -> str:
        return f"<CoDel {self.counters!r}>"
