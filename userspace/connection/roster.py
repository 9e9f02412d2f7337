# SPDX-License-Identifier: Apache-2.0
"""All slots and endpoints of a pool, counted and sorted so that nobody ever has to look for one.

    roster.move(slot, CLOSING)                 # counts, lists and sets follow
    roster.choose(rng.random)                  # the endpoint that serves a caller who takes any
    endpoint.ready                             # the connections to give out

Lists and sets are kept by events: whoever wants a connection finds it at the end of two dict look-ups,
whether there are ten or ten thousand.  Slots and endpoints are looked at when something happens to them.

An endpoint is *well* when it is up, not ejected, and has a live connection that is healthy or degraded,
or has none and the latest attempt did not fail.  When less than ``panic_threshold`` of the endpoints are
well there is *panic*: health and ejection are ignored among those who can be reached, as the few that
are well could not bear what is meant for all (Envoy's panic threshold).
"""

# ruff: noqa: PLR1730 -- min and max are calls, in what is done for each lease

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from typing import Final

from userspace.connection.selection import Rendezvous, WeightedSet, better
from userspace.connection.slots import (
    CLOSING,
    DEAD,
    DIALING,
    IDLE,
    IN_USE,
    NOTHING,
    NOWHERE,
    OPEN,
    PENDING,
    SHUT,
    UNHEALTHY,
    Endpoint,
    Slot,
)

#: Where an endpoint stands that has idle connections but is ejected; otherwise it is the best status of them.
EJECTED: Final = 4
#: Seconds, of who is not known yet: a path around the world.  Only compared with others'.
UNKNOWN_LATENCY: Final = 0.1

#: What an endpoint has to spare for others: slots besides one, or that one.
_SURPLUS: Final = 0
_LAST: Final = 1
_NEVER: Final = math.inf
_HEALTHY_TO_UNHEALTHY: Final = range(UNHEALTHY + 1)


class Roster:
    """The state of a pool; see the module.  It decides nothing and knows no time."""

    __slots__ = ("_max_per_endpoint", "_min_per_endpoint", "_openable", "_panic_threshold", "_spare",
                 "_standings", "_total_weight", "aging", "counts", "endpoints", "latency", "panic", "ring",
                 "short", "slots", "wanted", "warm", "well")  # fmt: skip

    def __init__(
        self, *, min_per_endpoint: int, max_per_endpoint: int, panic_threshold: float, secret: bytes
    ) -> None:
        self._min_per_endpoint = min_per_endpoint
        self._max_per_endpoint = max_per_endpoint
        self._panic_threshold = panic_threshold
        self.endpoints: dict[Hashable, Endpoint] = {}
        self.slots: dict[int, Slot] = {}
        #: Slots by phase.
        self.counts = [0, 0, 0, 0, 0]
        self.ring = Rendezvous[Endpoint](secret)
        self._total_weight = 0
        #: Seconds, of all that was told.
        self.latency = UNKNOWN_LATENCY
        #: Endpoints with idle connections, by where they stand.
        self._standings = tuple(WeightedSet[Endpoint]() for _ in range(EJECTED + 1))
        #: Endpoints that may be dialed: those that are well, those that are not, those ejected.
        self._openable = tuple(WeightedSet[Endpoint]() for _ in range(3))
        self._spare: tuple[dict[Endpoint, None], dict[Endpoint, None]] = ({}, {})
        #: Endpoints that may be dialed and have less connections than they should (once the pool is
        #: warm), and those that lookup found nothing of; the first first.
        self.short: dict[Endpoint, None] = {}
        self.wanted: dict[Endpoint, None] = {}
        self.warm = False
        #: Slots that are aging.
        self.aging = 0
        self.well = 0
        self.panic = False

    # --- endpoints

    def add_endpoint(self, endpoint: Endpoint, name: bytes) -> None:
        """Add one whose key is not there."""
        self.endpoints[endpoint.key] = endpoint
        self.ring.add(endpoint, name)
        self._total_weight += endpoint.weight
        self.judge(endpoint)
        self._reckon()

    def remove_endpoint(self, endpoint: Endpoint) -> None:
        """Take one off; its slots stay until they are freed."""
        del self.endpoints[endpoint.key]
        self.ring.remove(endpoint)
        self._total_weight -= endpoint.weight
        endpoint.removed = True
        self.refresh(endpoint)
        self.judge(endpoint)
        self._reckon()

    def set_weight(self, endpoint: Endpoint, weight: int, name: bytes) -> None:
        """Give it another weight, in all sets that it is in."""
        standing, openable = endpoint.standing, endpoint.openable
        self._stand(endpoint, NOWHERE)
        self._let_dial(endpoint, NOWHERE)
        self.ring.remove(endpoint)
        self._total_weight += weight - endpoint.weight
        endpoint.weight = weight
        self.ring.add(endpoint, name)
        self._let_dial(endpoint, openable)
        self._stand(endpoint, standing)

    def set_up(self, endpoint: Endpoint, up: bool) -> None:
        """Whether it can be reached at all."""
        endpoint.up = up
        self.refresh(endpoint)
        self.judge(endpoint)

    def set_ejected(self, endpoint: Endpoint, ejected: bool) -> None:
        """Whether it is an outlier."""
        endpoint.ejected = ejected
        self.refresh(endpoint)
        self.judge(endpoint)

    def set_gate(self, endpoint: Endpoint, gate: int) -> None:
        """Who may dial it."""
        endpoint.gate = gate
        self.judge(endpoint)

    def set_failed(self, endpoint: Endpoint) -> None:
        """An attempt or a connection failed: nobody may dial it."""
        endpoint.failed = True
        endpoint.gate = SHUT
        self.judge(endpoint)

    def set_open(self, endpoint: Endpoint) -> None:
        """An attempt succeeded: all may dial it."""
        endpoint.failed = False
        endpoint.gate = OPEN
        self.judge(endpoint)

    def set_wanted(self, endpoint: Endpoint, at: float) -> None:
        """When lookup found nothing of it; -infinite: that is over."""
        endpoint.wanted_at = at
        self.judge(endpoint)

    def set_warm(self) -> None:
        """From now on endpoints that have less than their minimum are in ``short``."""
        if not self.warm:
            self.warm = True
            for endpoint in self.endpoints.values():
                self.judge(endpoint)

    # --- slots

    def add_slot(self, slot: Slot) -> None:
        """A new one, dialing."""
        endpoint = slot.endpoint
        self.slots[slot.number] = slot
        endpoint.slots.append(slot)
        self.counts[slot.phase] += 1
        endpoint.counts[slot.phase] += 1
        self.judge(endpoint)

    def free_slot(self, slot: Slot) -> None:
        """It is gone; it must not be idle."""
        endpoint = slot.endpoint
        self.set_aging(slot, False)
        self._count_bad(slot, -1)
        del self.slots[slot.number]
        endpoint.slots.remove(slot)
        self.counts[slot.phase] -= 1
        endpoint.counts[slot.phase] -= 1
        self.judge(endpoint)

    def move(self, slot: Slot, phase: int) -> None:
        """It enters another phase."""
        endpoint, old = slot.endpoint, slot.phase
        self._count_bad(slot, -1)
        if old == IDLE:
            self._leave_idle(endpoint, slot)
        self.counts[old] -= 1
        endpoint.counts[old] -= 1
        self.counts[phase] += 1
        endpoint.counts[phase] += 1
        slot.phase = phase
        self._count_bad(slot, 1)
        if phase == IDLE:
            self._enter_idle(endpoint, slot)
        elif phase == CLOSING:
            self.set_aging(slot, False)
        self._note_low(endpoint)
        self.judge(endpoint)

    def lend(self, slot: Slot) -> None:
        """From idle to in use: moves that change nothing but where it is found."""
        endpoint = slot.endpoint
        counts, all_counts = endpoint.counts, self.counts
        slot.phase = IN_USE
        all_counts[IDLE] -= 1
        all_counts[IN_USE] += 1
        counts[IN_USE] += 1
        idle = counts[IDLE] = counts[IDLE] - 1
        if idle < endpoint.idle_low:
            endpoint.idle_low = idle
        slots = endpoint.idle[slot.status]
        assert slots is not None
        last = slots.pop()
        if last is not slot:
            place = last.place = slot.place
            slots[place] = last
        elif idle and not slots:
            self.refresh(endpoint)

    def take_back(self, slot: Slot) -> None:
        """From in use to idle."""
        endpoint = slot.endpoint
        counts, all_counts = endpoint.counts, self.counts
        slot.phase = IDLE
        all_counts[IN_USE] -= 1
        all_counts[IDLE] += 1
        counts[IN_USE] -= 1
        counts[IDLE] += 1
        self._enter_idle(endpoint, slot)

    def set_status(self, slot: Slot, status: int) -> None:
        """Its health is another one; it must be live."""
        endpoint = slot.endpoint
        self._count_bad(slot, -1)
        if slot.phase == IDLE:
            self._leave_idle(endpoint, slot)
        slot.status = status
        self._count_bad(slot, 1)
        if slot.phase == IDLE:
            self._enter_idle(endpoint, slot)
        self.judge(endpoint)

    def set_aging(self, slot: Slot, aging: bool) -> None:
        """Whether it is to be replaced soon."""
        if slot.aging != aging:
            slot.aging = aging
            by = 1 if aging else -1
            self.aging += by
            slot.endpoint.aging += by
            self.judge(slot.endpoint)

    @staticmethod
    def _count_bad(slot: Slot, by: int) -> None:
        if slot.status >= UNHEALTHY and slot.phase in {IDLE, IN_USE}:
            slot.endpoint.bad += by

    @staticmethod
    def _note_low(endpoint: Endpoint) -> None:
        endpoint.idle_low = min(endpoint.idle_low, endpoint.counts[IDLE])

    def _enter_idle(self, endpoint: Endpoint, slot: Slot) -> None:
        slots = endpoint.idle[slot.status]
        if slots is None:
            slots = endpoint.idle[slot.status] = []
        slot.place = len(slots)
        slots.append(slot)
        if slots is not endpoint.ready:
            self.refresh(endpoint)

    def _leave_idle(self, endpoint: Endpoint, slot: Slot) -> None:
        slots = endpoint.idle[slot.status]
        assert slots is not None
        last = slots.pop()
        if last is not slot:
            place = last.place = slot.place
            slots[place] = last
        elif not slots:
            self.refresh(endpoint)

    # --- what follows from it

    def refresh(self, endpoint: Endpoint) -> None:
        """Idle ones of one status came or went altogether, or the endpoint changed: find the best anew.

        When the last idle one of all is lent, this waits until somebody draws the endpoint in vain: it is
        likely to be back by then.
        """
        endpoint.ready = NOTHING
        standing = NOWHERE
        if endpoint.up and not endpoint.removed:
            idle = endpoint.idle
            for status in _HEALTHY_TO_UNHEALTHY:
                slots = idle[status]
                if slots:
                    endpoint.ready, standing = slots, status
                    break
            else:
                if idle[DEAD]:
                    standing = DEAD
            if endpoint.ejected and standing != NOWHERE:
                standing = EJECTED
        if standing != endpoint.standing:
            self._stand(endpoint, standing)

    def _stand(self, endpoint: Endpoint, standing: int) -> None:
        if endpoint.standing != NOWHERE:
            self._standings[endpoint.standing].remove(endpoint)
        if standing != NOWHERE:
            self._standings[standing].add(endpoint)
        endpoint.standing = standing

    def _let_dial(self, endpoint: Endpoint, openable: int) -> None:
        if endpoint.openable != NOWHERE:
            self._openable[endpoint.openable].remove(endpoint)
        if openable != NOWHERE:
            self._openable[openable].add(endpoint)
        endpoint.openable = openable

    def may_dial(self, endpoint: Endpoint) -> bool:
        """Whether another connection to it may be begun, as far as it is concerned."""
        return (
            endpoint.up
            and endpoint.gate != SHUT
            and not endpoint.removed
            and len(endpoint.slots) < self._max_per_endpoint
        )

    def fresh(self, endpoint: Endpoint) -> int:
        """Connections of an endpoint that are there or being dialed, and will last."""
        return endpoint.live + endpoint.counts[DIALING] - endpoint.aging

    def judge(self, endpoint: Endpoint) -> None:
        """Something happened to an endpoint or one of its slots: note down what follows."""
        counts = endpoint.counts
        pending, dialing = counts[PENDING], counts[DIALING]
        live = counts[IDLE] + counts[IN_USE]
        well = (
            endpoint.up
            and not endpoint.ejected
            and not endpoint.removed
            and (live > endpoint.bad or not (live or endpoint.failed))
        )
        if well != endpoint.well:
            endpoint.well = well
            self.well += 1 if well else -1
            self._reckon()
        may = self.may_dial(endpoint)
        openable = NOWHERE
        if may:
            openable = 0 if well else 2 if endpoint.ejected else 1
        if openable != endpoint.openable:
            self._let_dial(endpoint, openable)
        spare = NOWHERE
        if pending:
            spare = _SURPLUS if pending > 1 or live or dialing else _LAST
        if spare != endpoint.spare:
            if endpoint.spare != NOWHERE:
                del self._spare[endpoint.spare][endpoint]
            if spare != NOWHERE:
                self._spare[spare][endpoint] = None
            endpoint.spare = spare
        if may and self.warm and live + dialing - endpoint.aging < self._min_per_endpoint:
            self.short[endpoint] = None
        else:
            self.short.pop(endpoint, None)
        if may and endpoint.wanted_at > -_NEVER and not dialing and not endpoint.ready:
            self.wanted[endpoint] = None
        else:
            self.wanted.pop(endpoint, None)

    def _reckon(self) -> None:
        self.panic = self.well < self._panic_threshold * len(self.endpoints)

    # --- questions

    @property
    def size(self) -> int:
        """Slots, in whatever phase."""
        return len(self.slots)

    @property
    def in_use(self) -> int:
        """Slots whose connection is borrowed."""
        return self.counts[IN_USE]

    def spare_slot(self, *, last: bool) -> Slot | None:
        """A pending one that its endpoint can do without; ``last``: the only one of an endpoint."""
        for endpoint in self._spare[_LAST if last else _SURPLUS]:
            for slot in endpoint.slots:
                if slot.phase == PENDING:
                    return slot
        return None

    @staticmethod
    def is_surplus(slot: Slot) -> bool:
        """Whether its endpoint has another one; it must be pending."""
        return slot.endpoint.spare == _SURPLUS

    def idle_slots(self, endpoint: Endpoint) -> list[Slot]:
        """The idle ones of an endpoint, whatever their health."""
        return [slot for slots in endpoint.idle if slots for slot in slots]

    def usable(self, endpoint: Endpoint) -> list[Slot]:
        """Those of an endpoint to give out now: the best, and dead ones only in panic."""
        if not endpoint.ready and self.panic and endpoint.standing != NOWHERE:
            return endpoint.idle[DEAD] or NOTHING
        return endpoint.ready

    def serves_any(self, endpoint: Endpoint) -> bool:
        """Whether who takes any endpoint takes this one."""
        return self.panic or not endpoint.ejected

    def choose(self, draw: Callable[[], float]) -> Endpoint | None:
        """One with connections to give out, for who takes any: the better of two of the best; None: none."""
        if self.panic:
            return self._choose_any(draw)
        if self.counts[IDLE]:
            for status in _HEALTHY_TO_UNHEALTHY:
                endpoints = self._standings[status]
                while endpoints:
                    endpoint = better(endpoints, draw, self._cost)
                    if endpoint.ready:
                        return endpoint
                    self.refresh(endpoint)
        return None

    def _choose_any(self, draw: Callable[[], float]) -> Endpoint | None:
        """In panic: all that have idle ones, in proportion to their weights alone."""
        while standings := [endpoints for endpoints in self._standings if endpoints]:
            at = draw() * sum([endpoints.total for endpoints in standings])
            for endpoints in standings:
                if at < endpoints.total:
                    break
                at -= endpoints.total
            endpoint = endpoints.pick(draw)
            if self.usable(endpoint):
                return endpoint
            self.refresh(endpoint)
        return None

    def choose_openable(self, draw: Callable[[], float]) -> Endpoint | None:
        """One to dial for who takes any: of two the one with less connections for its weight; None: none."""
        for endpoints in self._openable if self.panic else self._openable[:2]:
            if endpoints:
                return better(endpoints, draw, self._share)
        return None

    def _cost(self, endpoint: Endpoint) -> float:
        """Latency, and as much again for each connection in use, where the weight is that of the mean."""
        mean = self._total_weight / len(self.endpoints)
        return endpoint.latency * (1.0 + endpoint.counts[IN_USE] * mean / endpoint.weight)

    @staticmethod
    def _share(endpoint: Endpoint) -> float:
        return len(endpoint.slots) / endpoint.weight
