# SPDX-License-Identifier: Apache-2.0
"""A queue that shares what leaves it fairly: FQ-CoDel (RFC 8290), or plain deficit round robin.

    queue = FairQueue[bytes](classes=2, limits=Limits(packets=10_240))
    queue.enqueue(now, packet, len(packet), key=peer, priority=1)
    packet = queue.dequeue(now)

Each ``key`` (a peer, a stream, an address with ports) has a queue of its own, a flow.  Flows take turns, and
each turn is worth ``quantum`` bytes, with what is left of the last one (deficit round robin, Shreedhar and
Varghese 1996): whoever sends more or longer packets than others gets no more bytes than they do.  A flow
that was empty goes first, for one turn: so what sends little hardly waits (RFC 8290, 4.2).  Each flow is
under a CoDel of its own, unless ``codel`` is off.

Class 0 is the highest, and priorities are strict: flows of a lower class get turns when nothing is left in
the higher ones.

When the whole is full, the flow with the most bytes in the lowest class that has any loses its oldest
packets: half of them, up to ``drop_batch`` (RFC 8290, 4.1).

RFC 8290 maps flows to 1,024 queues by a hash.  Here flows have their own keys and never share.  Each class
keeps at most twice as many flows as packets fit, about 1 kB each, so a flood of keys is bounded as a flood
of packets is.  Keys that strangers can choose are best bytes or str: for these Python's hash is seeded.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from heapq import heapify, heappop, heappush, heapreplace
from typing import Final, Generic, TypeVar

from userspace.flow.bounded import (
    CLASSES_MAXIMUM,
    DEFAULT_LIMITS,
    DropReason,
    Limits,
    OnDrop,
    QueueCounters,
    check_item,
    is_whole,
)
from userspace.flow.bucket import check_time
from userspace.flow.codel import INTERVAL, TARGET, CodelFifo, CodelParameters, Entry, Mark
from userspace.flow.congestion import MAX_DATAGRAM_SIZE
from xdp.errors import UsageError

T = TypeVar("T")

#: Packets dropped at once when there is no room, at most (RFC 8290, 4.1): looking for the longest flow is
#: what costs.
DROP_BATCH: Final = 64
#: Bytes that a packet costs its flow at least, as a frame of Ethernet has so many: else a flow of empty
#: packets would have a thousand of them in a turn.
LEAST_COST: Final = 64
#: Entries of the heap of lengths before it is made anew, beyond two a flow.
_HEAP_SLACK: Final = 64


class _Flow(CodelFifo[T]):
    """One key's packets; bytes that it may still send in this turn."""

    __slots__ = ("active", "credit", "key")

    def __init__(self, parameters: CodelParameters, key: Hashable) -> None:
        super().__init__(parameters)
        self.key = key
        self.credit = 0
        self.active = False  # in one of the lists of its class


class _Class(Generic[T]):
    """One priority: its flows, and their turns."""

    __slots__ = ("counters", "flows", "heap", "new", "old", "pushed")

    def __init__(self) -> None:
        self.counters = QueueCounters()
        #: All that are active, and those whose CoDel would begin otherwise than a new one.
        self.flows: dict[Hashable, _Flow[T]] = {}
        self.new: deque[_Flow[T]] = deque()
        self.old: deque[_Flow[T]] = deque()
        #: Lengths, longest first: (-bytes, number, flow).  None unless there was no room lately.  Each flow
        #: with packets has an entry that is not too low; entries that are too high are put right when they
        #: come up.  The number is that of all pushed, as flows can't be compared.
        self.heap: list[tuple[int, int, _Flow[T]]] | None = None
        self.pushed = 0

    def push(self, flow: _Flow[T]) -> None:
        """Its length has grown."""
        if self.heap is not None:
            if len(self.heap) > 2 * len(self.flows) + _HEAP_SLACK:
                self.heap = None
                return
            self.pushed += 1
            heappush(self.heap, (-flow.bytes, self.pushed, flow))

    def longest(self) -> _Flow[T]:
        """The flow with the most bytes; there must be a packet."""
        if self.heap is None:
            lengths = [(-flow.bytes, flow) for flow in self.flows.values() if flow.items]
            self.heap = [(length, number, flow) for number, (length, flow) in enumerate(lengths)]
            self.pushed = len(lengths)
            heapify(self.heap)
        while True:
            length, _, flow = self.heap[0]
            if not flow.items:
                heappop(self.heap)
            elif flow.bytes == -length:
                return flow
            else:
                self.pushed += 1
                heapreplace(self.heap, (-flow.bytes, self.pushed, flow))

    def forget(self) -> None:
        """All flows without packets."""
        for queue in (self.new, self.old):
            kept = [flow for flow in queue if flow.items]
            queue.clear()
            queue.extend(kept)
        self.flows = {flow.key: flow for flow in self.flows.values() if flow.items}


class FairQueue(Generic[T]):
    """Fair queueing by key under ``classes`` priorities; ``limits`` are those of the whole.

    ``quantum`` is the bytes of a turn, as a rule those of a full packet; a longer packet takes its flow as
    many turns as quanta are in it, and dequeue as many steps.  ``target``, ``interval``, ``mtu`` and ``mark``
    are those of :class:`userspace.flow.codel.CoDel`.  Raises UsageError for values out of range.
    """

    __slots__ = (
        "_classes", "_codel", "_current", "_drop_batch", "_limits", "_mark", "_on_drop", "_parameters",
        "_quantum",
    )  # fmt: skip

    def __init__(
        self,
        *,
        classes: int = 1,
        quantum: int = MAX_DATAGRAM_SIZE,
        limits: Limits = DEFAULT_LIMITS,
        drop_batch: int = DROP_BATCH,
        codel: bool = True,
        target: float = TARGET,
        interval: float = INTERVAL,
        mtu: int = MAX_DATAGRAM_SIZE,
        mark: Mark[T] | None = None,
        on_drop: OnDrop[T] | None = None,
    ) -> None:
        if not is_whole(classes, 1, CLASSES_MAXIMUM):
            raise UsageError(f"classes are from 1 to {CLASSES_MAXIMUM}, not {classes!r}")
        if not is_whole(quantum, LEAST_COST):
            raise UsageError(f"a quantum is bytes, {LEAST_COST} or more, not {quantum!r}")
        if not is_whole(drop_batch, 1):
            raise UsageError(f"drop_batch is packets, 1 or more, not {drop_batch!r}")
        self._parameters = CodelParameters(target, interval, mtu)
        self._limits = limits.check(aging=False)
        self._classes = tuple(_Class[T]() for _ in range(classes))
        self._current = self._classes[0]  # where dequeue is looking
        self._quantum = quantum
        self._drop_batch = drop_batch
        self._codel = codel
        self._mark = mark
        self._on_drop = on_drop

    def __len__(self) -> int:
        return sum([one.counters.packets for one in self._classes])

    @property
    def bytes(self) -> int:
        """Bytes that are queued."""
        return sum([one.counters.bytes for one in self._classes])

    @property
    def flows(self) -> int:
        """Flows that are kept, with those that have no packets just now."""
        return sum([len(one.flows) for one in self._classes])

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

    def enqueue(self, now: float, item: T, size: int, key: Hashable = None, priority: int = 0) -> bool:
        """Queue an item of ``size`` bytes with those of its key; False when it was dropped at once.

        Raises UsageError for an item that is None, a key that can't be hashed, and values out of range.
        """
        check_item(now, item, size)
        own = self._class(priority)
        try:
            flow = own.flows.get(key)
        except TypeError:
            raise UsageError(f"a key is hashable, {key!r} is not") from None
        own.counters.enqueued += 1
        limits = self._limits
        if size > limits.bytes:
            self._dropped(own, item, size, DropReason.REFUSED)
            return False
        if flow is None:
            if len(own.flows) >= 2 * limits.packets:
                own.forget()
            flow = own.flows[key] = _Flow(self._parameters, key)
        if not flow.active:
            flow.active = True
            flow.credit = self._quantum
            own.new.append(flow)
        flow.append(now, item, size)
        own.counters.packets += 1
        own.counters.bytes += size
        own.push(flow)
        packets, length = len(self), self.bytes
        if packets > limits.packets or length > limits.bytes:
            self._make_room()
            return bool(flow.items) and flow.items[-1][0] is item
        if 2 * packets < limits.packets and 2 * length < limits.bytes:
            own.heap = None
        return True

    def _make_room(self) -> None:
        """Drop from the longest flows of the lowest classes until all fit."""
        limits = self._limits
        lowest = len(self._classes) - 1
        while len(self) > limits.packets or self.bytes > limits.bytes:
            while not self._classes[lowest].counters.packets:
                lowest -= 1
            one = self._classes[lowest]
            flow = one.longest()
            for _ in range(min(self._drop_batch, max(1, len(flow.items) // 2))):
                self._discard_from(one, flow.pop(), DropReason.OVERFLOW)

    # --- out

    def dequeue(self, now: float) -> T | None:
        """The next item of the highest class that has any; None when there is none."""
        check_time(now)
        for one in self._classes:
            if one.new or one.old:  # flows without packets too: here is where they cease to be active
                self._current = one
                entry = self._dequeue(one, now)
                if entry is not None:
                    item, size, _ = entry
                    counters = one.counters
                    counters.packets -= 1
                    counters.bytes -= size
                    counters.dequeued += 1
                    return item
        return None

    def _dequeue(self, one: _Class[T], now: float) -> Entry[T] | None:
        """RFC 8290, 4.2: two lists of flows, those that had nothing before come first."""
        while turns := one.new or one.old:
            flow = turns[0]
            if flow.credit <= 0:
                flow.credit += self._quantum
                turns.popleft()
                one.old.append(flow)
                continue
            if self._codel:
                entry = flow.take(now, self._marked, self._discard)
            else:
                entry = flow.pop() if flow.items else None
            if entry is not None:
                flow.credit -= max(entry[1], LEAST_COST)
                return entry
            turns.popleft()
            if turns is one.new:
                # One pass through the others, or it could come back as a new one at once and starve them.
                one.old.append(flow)
            else:
                flow.active = False
                if not flow.law.remembers(now):
                    del one.flows[flow.key]
        return None

    # --- dropped

    def clear(self) -> None:
        """Drop all, and forget the flows."""
        for one in self._classes:
            for flow in list(one.flows.values()):
                while flow.items:
                    self._discard_from(one, flow.pop(), DropReason.CLEARED)
            one.forget()
            one.heap = None

    def _marked(self, item: T) -> bool:
        if self._mark is None or not self._mark(item):
            return False
        self._current.counters.marked += 1
        return True

    def _discard(self, entry: Entry[T]) -> None:
        self._discard_from(self._current, entry, DropReason.CODEL)

    def _discard_from(self, one: _Class[T], entry: Entry[T], reason: DropReason) -> None:
        item, size, _ = entry
        one.counters.packets -= 1
        one.counters.bytes -= size
        self._dropped(one, item, size, reason)

    def _dropped(self, one: _Class[T], item: T, size: int, reason: DropReason) -> None:
        one.counters.drop(reason)
        if self._on_drop is not None:
            self._on_drop(item, size, reason)

    def __repr__(self) -> str:
        return f"<FairQueue {self.flows} flows, {self.counters()!r}>"
