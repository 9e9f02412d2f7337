# SPDX-License-Identifier: Apache-2.0
"""How many connections there are: when a pool opens, closes and evicts.

It opens

- for tickets: one for each that no attempt under way will serve, the first in line first;
- for lookups that found nothing, while that is no longer ago than :data:`WANT_TIME`;
- up to the minimum, of each endpoint and of all, once the pool was warmed.

It closes what was not used for the idle timeout, what has reached its lifetime (a few seconds before that its
replacement is opened, if it is needed), and, once in an idle timeout, as many of each endpoint as were
idle all the time since the last look: choosing the better of two spreads the use, so none of ten connections
would ever be idle for long though one were enough.

When there is no place left and somebody needs one: first a place that waits for an endpoint that fails and
has others, then the idle connection that is worth least (:mod:`~userspace.connection.eviction`), at last the
only place of an endpoint that fails.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from heapq import heappop, heappush
from itertools import islice
from typing import TYPE_CHECKING, Final

from userspace.connection.eviction import GRACE, Eviction
from userspace.connection.pool_settings import PoolSettings, seconds_of
from userspace.connection.roster import Roster
from userspace.connection.slots import (
    CLOSING,
    DIALING,
    IDLE,
    IN_USE,
    ONE,
    PENDING,
    SHUT,
    Close,
    Endpoint,
    Open,
    Slot,
)
from userspace.connection.states import Cause
from userspace.connection.timers import Timers
from userspace.connection.waiters import Ticket, WaitLine

if TYPE_CHECKING:
    from random import Random

#: Seconds before the end of a connection's lifetime at which its replacement is opened: a handshake that
#: loses two packets (RFC 9002, 6.2.2: a second, then two) is done by then ..
REPLACEMENT_TIME: Final = 5.0
#: .. but no more than this part of the lifetime.
REPLACEMENT_PART: Final = 0.05
#: Seconds for which a lookup that found nothing counts as somebody who wants a connection.
WANT_TIME: Final = 5.0
#: Endpoints or connections that one on_timeout looks at, some ms; for the rest it is to be called again.
_STEP: Final = 512

_NEVER: Final = math.inf


class Sizing:
    """Opens and closes the connections of a pool; see the module.  Its actions are in ``actions``."""

    __slots__ = (
        "_any_dials", "_draw", "_eviction", "_idle_timeout", "_jitter", "_lead", "_lifetime", "_line",
        "_max_size", "_min_per_endpoint", "_min_size", "_next_look", "_retry_at", "_roster", "_sweep",
        "_timers", "abandoned", "actions", "blocked", "closed", "created", "dialed", "gone",
    )  # fmt: skip

    def __init__(
        self, settings: PoolSettings, roster: Roster, line: WaitLine[Endpoint], rng: Random, now: float
    ) -> None:
        self._roster = roster
        self._line = line
        self._draw = rng.random
        self._max_size = settings.max_size
        self._min_size = settings.min_size
        self._min_per_endpoint = settings.min_per_endpoint
        self._idle_timeout = seconds_of(settings.idle_timeout)
        self._lifetime = seconds_of(settings.max_lifetime)
        self._jitter = settings.lifetime_jitter
        self._lead = min(REPLACEMENT_TIME, self._lifetime * REPLACEMENT_PART)
        self._timers = Timers[int]()
        self._eviction = Eviction(roster)
        self._any_dials = 0  # attempts for who takes any endpoint
        self._next_look = now + self._idle_timeout
        self._sweep: Iterator[Endpoint] | None = None
        self._retry_at = _NEVER
        #: The first in line of those who lack a place.
        self.blocked: Ticket | None = None
        #: What is to be done, in this order.
        self.actions: list[Open | Close] = []
        # Counters since the beginning.
        self.created = self.gone = self.dialed = self.abandoned = 0
        self.closed: dict[Cause, int] = {}

    # --- single connections

    def dial(self, now: float, endpoint: Endpoint, *, for_any: bool = False) -> None:
        """Begin another connection; there must be a place, and the endpoint must allow it."""
        slot = Slot(self.created, endpoint, now)
        self.created += 1
        self._roster.add_slot(slot)
        if for_any:
            slot.for_any = True
            self._any_dials += 1
        self._attempt(now, slot)

    def redial(self, now: float, slot: Slot) -> None:
        """Try again to connect what waits for it; the endpoint must allow it."""
        self._timers.cancel(slot.number)
        slot.armed = False
        self._roster.move(slot, DIALING)
        self._attempt(now, slot)

    def _attempt(self, now: float, slot: Slot) -> None:
        endpoint = slot.endpoint
        slot.address = endpoint.choose_address(now)
        self.dialed += 1
        self.actions.append(Open(slot.number, endpoint.key, slot.address))
        if endpoint.gate == ONE:
            self._roster.set_gate(endpoint, SHUT)

    def attempt_ended(self, slot: Slot) -> None:
        """An attempt succeeded, failed, or is given up."""
        if slot.for_any:
            slot.for_any = False
            self._any_dials -= 1

    def opened(self, now: float, slot: Slot) -> None:
        """It is live from now on: its lifetime begins."""
        slot.used_at = now
        slot.expires_at = now + self._lifetime * (1.0 - self._jitter * self._draw())

    def pend(self, now: float, slot: Slot) -> None:
        """It is not there; it keeps its place, and is tried again when the endpoint allows it."""
        slot.used_at = now
        self._roster.set_aging(slot, False)
        self._roster.move(slot, PENDING)
        self._timers.set(slot.number, now + self._idle_timeout)
        slot.armed = True

    def rest(self, now: float, slot: Slot) -> None:
        """It has become idle, or has lost worth while it was."""
        if not slot.armed:
            self._arm(now, slot)
        if not slot.queued:
            self._eviction.note(slot)

    def lost_worth(self, slot: Slot) -> None:
        """It, or its endpoint, does worse than before."""
        slot.queued = False
        if slot.phase == IDLE:
            self._eviction.note(slot)

    def close(self, slot: Slot, cause: Cause) -> None:
        """End it; it must not be borrowed."""
        self._timers.cancel(slot.number)
        slot.armed = False
        if slot.phase == DIALING:
            self.abandoned += 1
            self.attempt_ended(slot)
        self._roster.move(slot, CLOSING)
        self.closed[cause] = self.closed.get(cause, 0) + 1
        self.actions.append(Close(slot.number, cause))

    def free(self, slot: Slot) -> None:
        """It is gone; it must not be borrowed."""
        self._timers.cancel(slot.number)
        if slot.phase == DIALING:
            self.abandoned += 1
            self.attempt_ended(slot)
        if slot.phase == IDLE:
            self._roster.move(slot, CLOSING)
        self._roster.free_slot(slot)
        self.gone += 1

    # --- more of them

    @property
    def _room(self) -> bool:
        return self._roster.size < self._max_size

    def grow(self, now: float, changed: Endpoint | None = None) -> None:
        """Open what tickets wait for, in their order, and make room for those who have none.

        The n-th in the line of an endpoint lacks a connection if fewer than n are being opened to it.  While
        nobody lacked a place, only those who wait for an endpoint that has changed, or for any, can lack
        something now.
        """
        line = self._line
        targets: Sequence[Endpoint | None] = (changed, None)
        if changed is None or self.blocked is not None:
            targets = line.targets()
        self.blocked = None
        self._retry_at = _NEVER
        coming = self._roster.counts[CLOSING]  # places that will be free
        lacking: list[tuple[int, int, Endpoint | None]] = []  # the first one of each line
        for target in targets:
            self._note_lacking(lacking, target, self._any_dials if target is None else target.opening)
        while lacking:
            number, place, target = heappop(lacking)
            if target is None:
                endpoint = self._roster.choose_openable(self._draw)
                if endpoint is None:
                    continue
            elif self._roster.may_dial(target):  # there was one for somebody else meanwhile
                endpoint = target
            else:
                continue
            if self._room:
                self.dial(now, endpoint, for_any=target is None)
            else:
                if self.blocked is None:
                    self.blocked = line.ticket(number)
                if coming:
                    coming -= 1
                elif not self._make_room(now):
                    return
            self._note_lacking(lacking, target, place + 1)

    def _note_lacking(
        self, lacking: list[tuple[int, int, Endpoint | None]], target: Endpoint | None, place: int
    ) -> None:
        """Whoever stands at that place of a line, if anybody does, lacks a connection."""
        if place < self._line.count(target):
            heappush(lacking, (self._line.number(target, place), place, target))

    def grow_for(self, now: float, ticket: Ticket, target: Endpoint | None) -> None:
        """The same for one ticket that has just joined the line of an endpoint, or that of any."""
        before = self._line.count(target) - 1
        if target is None:
            if self._any_dials > before:
                return
            endpoint = self._roster.choose_openable(self._draw)
        else:
            endpoint = target if target.opening <= before and self._roster.may_dial(target) else None
        if endpoint is None:
            return
        if self._room:
            self.dial(now, endpoint, for_any=target is None)
            return
        if self.blocked is None:
            self.blocked = ticket
        if not self._roster.counts[CLOSING]:  # else that place may be for it, and grow is called then
            self._make_room(now)

    def fill(self, now: float) -> None:
        """Open what lookups wanted, and what is less than the minimum."""
        roster = self._roster
        while roster.wanted:
            endpoint = next(iter(roster.wanted))
            if endpoint.wanted_at + WANT_TIME < now or endpoint.ready:
                roster.set_wanted(endpoint, -_NEVER)
            elif self._room:
                self.dial(now, endpoint)
            else:
                if not roster.counts[CLOSING]:
                    self._make_room(now)
                return
        if not roster.warm:
            return
        while self._room and roster.short:
            self.dial(now, next(iter(roster.short)))
        while self._room and self._fresh < self._min_size:
            chosen = roster.choose_openable(self._draw)
            if chosen is None:
                return
            self.dial(now, chosen)

    def _make_room(self, now: float) -> bool:
        """Close what can best be done without; False when there is nothing."""
        roster = self._roster
        slot = roster.spare_slot(last=False) or self._eviction.victim(now) or roster.spare_slot(last=True)
        if slot is None:
            if roster.counts[IDLE]:
                self._retry_at = now + GRACE
            return False
        self.close(slot, Cause.EVICTED)
        return True

    # --- fewer

    @property
    def _fresh(self) -> int:
        """Connections that are there or being dialed, and will last."""
        counts = self._roster.counts
        return counts[IDLE] + counts[IN_USE] + counts[DIALING] - self._roster.aging

    def _expendable(self, slot: Slot) -> bool:
        """Whether there is enough without it.  What is aging ends soon, when its replacement is there."""
        return (
            not slot.aging
            and self._fresh > self._min_size
            and self._roster.fresh(slot.endpoint) > self._min_per_endpoint
        )

    def _arm(self, now: float, slot: Slot) -> None:
        """Look at it again when it may be idle for too long or too old."""
        idle_at = slot.last_use + self._idle_timeout
        if idle_at <= now:  # and it was not expendable
            idle_at = now + self._idle_timeout
        end = slot.expires_at if slot.aging else slot.expires_at - self._lead
        self._timers.set(slot.number, min(idle_at, end))
        slot.armed = True

    def check(self, now: float, slot: Slot) -> bool:
        """Close a slot that is too old or idle for too long; else look at it again in time."""
        slot.armed = False
        if slot.phase == PENDING:
            if slot.used_at + self._idle_timeout <= now and self._roster.is_surplus(slot):
                self.close(slot, Cause.IDLE)
                return True
            self._timers.set(slot.number, now + self._idle_timeout)
            slot.armed = True
        elif slot.phase == IDLE:  # what is in use is armed when it is returned
            if now >= slot.expires_at:
                self.close(slot, Cause.EXPIRED)
                return True
            if not slot.aging and now >= slot.expires_at - self._lead:
                self._age(now, slot)
            if slot.last_use + self._idle_timeout <= now and self._expendable(slot):
                self.close(slot, Cause.IDLE)
                return True
            self._arm(now, slot)
        return False

    def _age(self, now: float, slot: Slot) -> None:
        """Its end is near: replace it if it is all that a caller of late will find."""
        roster, endpoint = self._roster, slot.endpoint
        roster.set_aging(slot, True)
        if (
            slot.last_use + self._idle_timeout > now
            and self._room
            and not roster.fresh(endpoint)
            and roster.may_dial(endpoint)
        ):
            self.dial(now, endpoint)

    def _look(self, now: float) -> None:
        """One step through all endpoints: close what was idle all the time since the last look."""
        if self._sweep is None:
            self._sweep = iter(list(self._roster.endpoints.values()))
        done = True
        for endpoint in islice(self._sweep, _STEP):
            done = False
            surplus, endpoint.idle_low = endpoint.idle_low, endpoint.counts[IDLE]
            if not surplus:
                continue
            slots = [slot for slot in self._roster.idle_slots(endpoint)
                     if slot.shared_at + self._idle_timeout <= now]  # fmt: skip
            slots.sort(key=lambda slot: (-slot.status, slot.used_at))
            for slot in slots[:surplus]:
                if self._expendable(slot):
                    self.close(slot, Cause.IDLE)
        if done:
            self._sweep = None
            self._next_look = now + self._idle_timeout

    # --- time

    def next_timeout(self) -> float:
        """When to call :meth:`on_timeout`."""
        look = self._next_look if self._roster.slots else _NEVER
        return min(self._timers.next(), look, self._retry_at)

    def on_timeout(self, now: float) -> None:
        """Close what is idle for too long or too old, or a part of it, and then it is to be called again."""
        if now >= self._retry_at:
            self._retry_at = _NEVER
        for number in islice(self._timers.due(now), _STEP):
            self.check(now, self._roster.slots[number])
        if now >= self._next_look:
            self._look(now)
