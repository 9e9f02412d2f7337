# SPDX-License-Identifier: Apache-2.0
"""Whom to hold at the door: which peers, at what rate, and when to let them go.

    door = Door(limit=16)
    for order in door.look(now, level, capacity, {peer: (packets, drops), ...}):
        if order.rate:
            holds.hold(order.peer, order.rate, order.burst, seconds=order.seconds)
        else:
            holds.release(order.peer)

A receiver that asks its peers to slow down is at the mercy of those who don't.  When its queue stays full,
those who send more than their share are held at that share by the kernel program (``xdp.holds``), which
counts what they go on sending; so it can be told when they have slowed down.

The share is max-min fair: whoever sends less than it is not touched, and what these leave over is divided
evenly among the rest (Bertsekas and Gallager, Data Networks, 6.5.2).  What the program drops of peers that
are not held is no load, and does not count.

Nobody is held for a moment's fullness (``patience``) or let go for a moment's quiet (``calm``), and no rate
is changed by a little.  Orders are repeated in time, for a hold ends by itself: one may be lost, and a
controller that dies leaves nobody held.  Peers are any hashable things; what is kept is bounded by the
peers of one look.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Hashable, Iterable, Mapping
from typing import Final, NamedTuple

from xdp.errors import UsageError

#: Fill levels of the local queue, 0 to 1: from here on peers are held and rates lowered ..
HIGH: Final = 0.75
#: .. and up to here rates are raised.  Between them nothing gets stricter or looser.
LOW: Final = 0.25
#: Of the capacity that is divided: the rest empties the queue.
SHARED: Final = 0.9
#: A rate is changed when it is off by more than this part; less is the noise of counting for a second or so.
TOLERANCE: Final = 0.25
#: An order is repeated when this part of its time is over: one may be lost, and the peer is still held.
RENEW: Final = 0.4
#: Looks that follow one another faster, in seconds, say nothing: too few packets are between them.
SHORTEST: Final = 0.05
#: Packets at once: what comes in this time at the rate, seconds, but no less than the least burst.
BURST_TIME: Final = 0.02
LEAST_BURST: Final = 4
#: Holds at most, unless told otherwise: as many as an operator can look through.
LIMIT: Final = 64
#: Packets/s and packets that a hold takes at most (MAX_HOLD_RATE and MAX_HOLD_BURST in xdp.tables).
MAX_RATE: Final = 10_000_000
MAX_BURST: Final = 1_000_000
#: The kernel's counters have 64 bits: no count can grow by more between two looks.
_MOST: Final = (1 << 64) - 1


class Order(NamedTuple):
    """What to do with one peer: hold it at ``rate`` packets/s for so many seconds, or, rate 0, release it."""

    peer: Hashable
    rate: int
    burst: int
    seconds: float


class _Hold:
    __slots__ = ("good_since", "ordered", "rate")

    def __init__(self, rate: int, now: float) -> None:
        self.rate = rate
        self.ordered = now
        #: Since when the peer has sent no more than its share; None: it does not.
        self.good_since: float | None = None


class Door:
    """Decides whom to hold; see the module.  Sans-I/O, deterministic.

    limit      holds at the same time, at most
    seconds    that each order is good for; it is repeated earlier
    patience   seconds that the queue has to stay full before somebody is held
    calm       seconds that a held peer has to keep within its share before it is let go
    """

    __slots__ = ("_calm", "_full_since", "_holds", "_limit", "_now", "_patience", "_seconds", "_seen")

    def __init__(
        self, *, limit: int = LIMIT, seconds: float = 60.0, patience: float = 0.5, calm: float = 5.0
    ) -> None:
        """Raises UsageError for what is out of range."""
        if type(limit) is not int or limit < 1:
            raise UsageError(f"limit of a door: {limit!r}; allowed: a whole number from 1")
        _check("seconds of a door", seconds, 1.0, 3600.0)
        _check("patience of a door", patience, 0.0, 3600.0)
        _check("calm of a door", calm, 0.0, 3600.0)
        self._limit = limit
        self._seconds = seconds
        self._patience = patience
        self._calm = calm
        self._holds: dict[Hashable, _Hold] = {}
        self._seen: Mapping[Hashable, tuple[int, int]] = {}
        self._now: float | None = None  # of the look that _seen is of
        self._full_since: float | None = None

    @property
    def held(self) -> dict[Hashable, int]:
        """Who is held, and at how many packets/s."""
        return {peer: hold.rate for peer, hold in self._holds.items()}

    def look(
        self, now: float, level: float, capacity: float, seen: Mapping[Hashable, tuple[int, int]]
    ) -> list[Order]:
        """What is to be done now.  Made for some calls a second.

        level      how full the local queue is, 0 to 1
        capacity   packets/s that the receiver gets through, of all peers together
        seen       of each peer that may be held: packets that came (dropped ones, too) and packets that were
                   dropped, since whenever; a peer that is no longer in it is released

        Counts that go back are taken for no packets, and after a clock that goes back all times begin anew.
        Raises UsageError for a time, level or capacity that is no finite number, or out of range.
        """
        _check("time", now, -math.inf, math.inf)
        _check("level of the queue", level, 0.0, 1.0)
        _check("capacity", capacity, 0.0, math.inf)
        orders = [_release(peer) for peer in self._holds if peer not in seen]
        for order in orders:
            del self._holds[order.peer]
        before, then = self._seen, self._now
        if then is not None and 0 <= now - then < SHORTEST:
            return orders
        self._seen, self._now = dict(seen), now
        if then is None or now < then:
            self._begin(now)
            return orders
        if level < HIGH:
            self._full_since = None
        elif self._full_since is None:
            self._full_since = now
        full = self._full_since is not None and now - self._full_since >= self._patience
        # The program has let go of whom no look came in time for.
        self._holds = {peer: one for peer, one in self._holds.items() if now - one.ordered < self._seconds}
        if full or self._holds:
            loads = self._loads(before, seen, now - then)
            share = self._share(loads, capacity * SHARED)
            orders += self._go_on(now, level, loads, share, full=full)
            if full:
                orders += self._begin_holds(now, loads, share)
        return orders

    def forget(self, peer: Hashable) -> None:
        """An order could not be carried out, or somebody else released the peer: it is not held."""
        self._holds.pop(peer, None)

    def _begin(self, now: float) -> None:
        """A first look, or the first by another clock: orders are repeated at the next."""
        self._full_since = None
        for hold in self._holds.values():
            hold.ordered = now - RENEW * self._seconds
            hold.good_since = None

    def _loads(
        self,
        before: Mapping[Hashable, tuple[int, int]],
        seen: Mapping[Hashable, tuple[int, int]],
        elapsed: float,
    ) -> dict[Hashable, float]:
        """Packets/s of each peer: what it sends when it is held, else what comes through."""
        loads: dict[Hashable, float] = {}
        for peer, (packets, drops) in seen.items():
            old_packets, old_drops = before.get(peer, (packets, drops))
            came = packets - old_packets
            if peer not in self._holds:
                came -= max(0, drops - old_drops)
            if came > 0:
                loads[peer] = min(came, _MOST) / elapsed
        return loads

    def _share(self, loads: Mapping[Hashable, float], capacity: float) -> float:
        """Packets/s that nobody should exceed; infinite when all fit in.

        Only so many can be held, the heaviest and those who are; the rest takes what it takes.  But nobody is
        held at less than an even part of all.
        """
        free = ((load, peer) for peer, load in loads.items() if peer not in self._holds)
        room = self._limit - len(self._holds)
        touched = [load for load, _ in heapq.nlargest(room, free, key=_first)]
        touched += [loads[peer] for peer in self._holds if peer in loads]
        rest = max(0.0, math.fsum(loads.values()) - math.fsum(touched))
        share = fair_share(touched, capacity - rest)
        return max(share, capacity / max(1, len(loads)))

    def _go_on(
        self, now: float, level: float, loads: Mapping[Hashable, float], share: float, *, full: bool
    ) -> list[Order]:
        """Orders for those who are held."""
        orders = []
        wanted = _rate(share)
        for peer, hold in [*self._holds.items()]:
            if level >= HIGH or loads.get(peer, 0.0) > share:
                hold.good_since = None
            elif hold.good_since is None:
                hold.good_since = now
            if hold.good_since is not None and now - hold.good_since >= self._calm:
                del self._holds[peer]
                orders.append(_release(peer))
                continue
            lower = full and wanted < hold.rate * (1 - TOLERANCE)
            # All fit in at an infinite share: who goes on so is let go soon, not raised now.
            higher = level <= LOW and share < math.inf and wanted > hold.rate * (1 + TOLERANCE)
            if lower or higher:
                hold.rate = wanted
            elif now - hold.ordered < RENEW * self._seconds:
                continue
            hold.ordered = now
            orders.append(self._order(peer, hold.rate))
        return orders

    def _begin_holds(self, now: float, loads: Mapping[Hashable, float], share: float) -> list[Order]:
        """Orders for those who are over their share and not held, the heaviest first, while there is room."""
        over = [(load, peer) for peer, load in loads.items() if load > share and peer not in self._holds]
        orders = []
        for _, peer in heapq.nlargest(self._limit - len(self._holds), over, key=_first):
            self._holds[peer] = _Hold(_rate(share), now)
            orders.append(self._order(peer, self._holds[peer].rate))
        return orders

    def _order(self, peer: Hashable, rate: int) -> Order:
        return Order(peer, rate, min(MAX_BURST, max(LEAST_BURST, int(rate * BURST_TIME))), self._seconds)


def fair_share(loads: Iterable[float], capacity: float) -> float:
    """The max-min fair share of ``capacity`` among ``loads``; infinite when all fit in."""
    ordered = sorted(loads)
    left = max(0.0, capacity)
    for index, load in enumerate(ordered):
        even = left / (len(ordered) - index)
        if load > even:
            return even
        left -= load
    return math.inf


def _release(peer: Hashable) -> Order:
    return Order(peer, 0, 0, 0.0)


def _rate(share: float) -> int:
    return MAX_RATE if share >= MAX_RATE else max(1, int(share))


def _first(entry: tuple[float, Hashable]) -> float:
    return entry[0]


def _check(name: str, value: object, least: float, most: float) -> None:
    """Raises UsageError for what is no finite number within the bounds."""
    if not isinstance(value, (int, float)) or not -math.inf < value < math.inf or not least <= value <= most:
        bounds = "a finite number" + (f" from {least:g}" if least > -math.inf else "")
        bounds += f" to {most:g}" if most < math.inf else ""
        raise UsageError(f"{name}: {value!r}; allowed: {bounds}")
