# SPDX-License-Identifier: Apache-2.0
"""Which idle connection to do without when its place is needed: the least healthy, then the longest unused.

    eviction = Eviction(roster)
    slot = eviction.victim(now)                # None: none that may be taken

It is exact, and costs nothing until the pool is full for the first time: then all idle slots are put
into a heap, by their worth at that time.  A slot that is used gains worth, and its entry is put right
when it comes up; only what loses worth is pushed anew (:meth:`Eviction.note`).  So the use of a
connection stays as cheap as it was.

Never taken is what is borrowed, and what lookup gave out in the last :data:`GRACE` seconds: somebody may be
sending on it.
"""

from __future__ import annotations

from heapq import heapify, heappop, heappush
from typing import Final

from userspace.connection.roster import Roster
from userspace.connection.slots import DEAD, IDLE, UNHEALTHY, Slot

#: Seconds: some round trips, for whoever looked a connection up to send what he has.  When more endpoints are
#: looked up in turn than there are places, this is also what keeps each from pushing out the next.
GRACE: Final = 1.0
#: Slots that are passed over, because they may be in somebody's hands, before the search is given up.
_EXAMINED: Final = 32
#: Entries of the heap, besides two for each slot, before it is made anew.
_SLACK: Final = 64


def worth(slot: Slot) -> tuple[int, float]:
    """Least for what is evicted first: by health, then by the time of its last use."""
    endpoint = slot.endpoint
    if not endpoint.up:
        return 0, slot.last_use
    if endpoint.ejected:
        return min(DEAD - slot.status, DEAD - UNHEALTHY), slot.last_use
    return DEAD - slot.status, slot.last_use


class Eviction:
    """Finds the idle slot that is worth least; see the module."""

    __slots__ = ("_heap", "_roster")

    def __init__(self, roster: Roster) -> None:
        self._roster = roster
        #: Worth, number, slot.  None: nobody asked lately.  Each idle slot has an entry that is not too high.
        self._heap: list[tuple[tuple[int, float], int, Slot]] | None = None

    def note(self, slot: Slot) -> None:
        """It became idle, or is worth less than it was."""
        slot.queued = True
        if self._heap is None:
            return
        if len(self._heap) >= 2 * len(self._roster.slots) + _SLACK:
            self._heap = None
            return
        heappush(self._heap, (worth(slot), slot.number, slot))

    def _rebuilt(self) -> list[tuple[tuple[int, float], int, Slot]]:
        heap = []
        for slot in self._roster.slots.values():
            slot.queued = slot.phase == IDLE
            if slot.queued:
                heap.append((worth(slot), slot.number, slot))
        heapify(heap)
        return heap

    def victim(self, now: float) -> Slot | None:
        """The slot to take, which is one no longer queued; None when there is none."""
        if self._heap is None:
            self._heap = self._rebuilt()
        heap = self._heap
        passed: list[tuple[tuple[int, float], int, Slot]] = []
        found: Slot | None = None
        while heap and len(passed) < _EXAMINED:
            entry = heappop(heap)
            slot = entry[2]
            if slot.phase != IDLE:
                slot.queued = False  # whoever makes it idle again notes it
                continue
            current = worth(slot)
            if current > entry[0]:
                heappush(heap, (current, slot.number, slot))
            elif slot.shared_at + GRACE > now:
                passed.append(entry)
            else:
                slot.queued = False
                found = slot
                break
        for entry in passed:
            heappush(heap, entry)
        return found
