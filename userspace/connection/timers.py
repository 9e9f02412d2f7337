# SPDX-License-Identifier: Apache-2.0
"""Deadlines by key: thousands of timers for the price of one heap.

    timers = Timers[int]()
    timers.set(7, now + 5.0)                  # replaces what was set for 7
    timers.cancel(7)
    ...
    wake_at = timers.next()                   # infinite: never
    for key in timers.due(now): ...           # earliest first; each is gone from the timers

Setting a deadline later than before, as every packet does that proves a peer alive, leaves the heap alone:
the old entry is looked at when its time comes, and moved on then.  Cancelling leaves the entry where it is as
well.  What is left behind is cleared away when it outnumbers the timers, so the heap never holds more than
twice as many entries as there are timers, and some: ten thousand connections that come and go every minute
leave nothing.

Deadlines that are equal come in the order in which they were set.  Between two steps of a loop over
:meth:`Timers.due` any timer may be set or cancelled, also by a callback: what was cancelled or put off does
not come, and what was set anew for a time that is over comes with the next loop, so no loop is endless.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator
from heapq import heapify, heappop, heappush, heapreplace
from typing import Final, Generic, TypeVar

from xdp.errors import UsageError

K = TypeVar("K", bound=Hashable)

#: Seconds, 35,000 years: whoever passes more as a time passes nanoseconds.
LATEST: Final = float(1 << 40)
#: Entries that may be left behind in the heap besides one for each timer: fewer are not worth a walk.
SLACK: Final = 64

_NEVER: Final = math.inf


def checked_now(now: float, latest: float) -> float:
    """The time of a call: one that is earlier than the ``latest`` call's is taken as that one.

    Raises UsageError for what is no time: NaN, infinite, nanoseconds.
    """
    if latest <= now <= LATEST:
        return now
    if not -LATEST <= now <= LATEST:
        raise UsageError(f"now is seconds of a monotonic clock, not {now!r}")
    return latest


class _Timer(Generic[K]):
    """A deadline, the turn in which it was set, and the entry of the heap that stands for it.

    The entry is never later; it is earlier when the timer was put off since.
    """

    __slots__ = ("at", "entry", "turn")

    def __init__(self, at: float, turn: int, entry: tuple[float, int, K]) -> None:
        self.at = at
        self.turn = turn
        self.entry = entry


class Timers(Generic[K]):
    """At most one deadline for each key; see the module.  As many as the caller has keys."""

    __slots__ = ("_heap", "_timers", "_turn")

    def __init__(self) -> None:
        self._timers: dict[K, _Timer[K]] = {}
        self._heap: list[tuple[float, int, K]] = []  # turns differ, so keys are never compared
        self._turn = 0

    def __len__(self) -> int:
        return len(self._timers)

    def set(self, key: K, at: float) -> None:
        """Be due at that time, and at no other that was set before; infinite cancels.

        Raises UsageError for NaN and minus infinity.
        """
        if not -_NEVER < at < _NEVER:
            if at != _NEVER:
                raise UsageError(f"a deadline is a time in seconds, or infinite, not {at!r}")
            self.cancel(key)
            return
        turn = self._turn
        self._turn = turn + 1
        timer = self._timers.get(key)
        if timer is None:
            entry = (at, turn, key)
            self._timers[key] = _Timer(at, turn, entry)
            heappush(self._heap, entry)
            return
        timer.at, timer.turn = at, turn
        if at < timer.entry[0]:
            timer.entry = (at, turn, key)
            heappush(self._heap, timer.entry)
            self._tidy()

    def cancel(self, key: K) -> None:
        """Never be due; nothing happens when there is no such timer."""
        if self._timers.pop(key, None) is not None:
            self._tidy()

    def when(self, key: K) -> float:
        """When it is due; infinite when there is no such timer."""
        timer = self._timers.get(key)
        return _NEVER if timer is None else timer.at

    def next(self) -> float:
        """The earliest deadline; infinite when there are no timers."""
        heap, timers = self._heap, self._timers
        while heap:
            entry = heap[0]
            timer = timers.get(entry[2])
            if timer is None or timer.entry is not entry:
                heappop(heap)
            elif timer.turn != entry[1]:
                timer.entry = (timer.at, timer.turn, entry[2])
                heapreplace(heap, timer.entry)
            else:
                return entry[0]
        return _NEVER

    def due(self, now: float) -> Iterator[K]:
        """Those whose time has come, one after the other: each is no timer any more when it is given.

        An iterator, to be used up at once: a loop that is left early leaves the rest in place.  Raises
        UsageError for what is no time.
        """
        return self._due(checked_now(now, -LATEST))

    def _due(self, now: float) -> Iterator[K]:
        fresh = self._turn  # what is set from here on has its turn in the next loop
        while self.next() <= now:
            at, turn, key = self._heap[0]
            if turn < fresh:
                heappop(self._heap)
                del self._timers[key]
                self._tidy()
                yield key
            elif at < now:  # it may not stand before those that have waited longer
                timer = self._timers[key]
                timer.at, timer.entry = now, (now, turn, key)
                heapreplace(self._heap, timer.entry)
            else:
                return

    def _tidy(self) -> None:
        """Clear the heap of what was left behind when that is most of it: a few steps for each change."""
        if len(self._heap) <= 2 * len(self._timers) + SLACK:
            return
        for key, timer in self._timers.items():
            timer.entry = (timer.at, timer.turn, key)
        self._heap = [timer.entry for timer in self._timers.values()]
        heapify(self._heap)
