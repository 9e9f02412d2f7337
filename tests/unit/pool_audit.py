# SPDX-License-Identifier: Apache-2.0
"""What a pool has noted down, computed anew from its slots: every list, set and count must agree."""

from __future__ import annotations

import math
from collections.abc import Iterable

from userspace.connection.eviction import worth
from userspace.connection.pool import ConnectionPool
from userspace.connection.selection import WeightedSet
from userspace.connection.slots import (
    CLOSING,
    DEAD,
    DIALING,
    IDLE,
    IN_USE,
    NOWHERE,
    PENDING,
    SHUT,
    UNHEALTHY,
    Endpoint,
    Slot,
)


def audit(pool: ConnectionPool) -> None:
    """AssertionError where something is not as it should be."""
    roster, sizing = pool._roster, pool._sizing
    slots = list(roster.slots.values())
    assert roster.counts == counted(slots)
    assert roster.aging == sum(slot.aging for slot in slots)
    assert roster.well == sum(endpoint.well for endpoint in roster.endpoints.values())
    assert roster.panic == (roster.well < pool.settings.panic_threshold * len(roster.endpoints))
    assert sizing._any_dials == sum(slot.for_any for slot in slots)
    assert all(slot.phase == DIALING for slot in slots if slot.for_any)
    assert sizing.blocked is None or sizing.blocked in pool._line
    for endpoint in {slot.endpoint for slot in slots} | set(roster.endpoints.values()):
        audit_endpoint(pool, endpoint)
    for slot in slots:
        audit_slot(pool, slot)
    for kind, members in ((roster._standings, "standing"), (roster._openable, "openable")):
        for index, one in enumerate(kind):
            expected = [e for e in roster.endpoints.values() if getattr(e, members) == index]
            assert set(members_of(one)) == set(expected)
            assert one.total == sum(1 << (e.weight - 1).bit_length() for e in expected)
    assert pool._line.sticky == sum(ticket.sticky is not None for ticket, _ in pool._line)
    for index, spare in enumerate(roster._spare):
        assert all(endpoint.spare == index for endpoint in spare)
    if not pool._draining and roster.size < pool.settings.max_size:
        audit_growth(pool)


def audit_growth(pool: ConnectionPool) -> None:
    """There is a place: nobody lacks what could be opened."""
    roster, sizing, line = pool._roster, pool._sizing, pool._line
    assert sizing.blocked is None
    openable = any(roster._openable if roster.panic else roster._openable[:2])
    for target in line.targets():
        if target is None:
            assert sizing._any_dials >= line.count(None) or not openable
        else:
            assert target.opening >= line.count(target) or not roster.may_dial(target)
    assert all(endpoint.ready for endpoint in roster.wanted)
    if roster.warm:
        assert not roster.short
        assert sizing._fresh >= pool.settings.min_size or not openable


def counted(slots: Iterable[Slot]) -> list[int]:
    counts = [0] * 5
    for slot in slots:
        counts[slot.phase] += 1
    return counts


def members_of(one: WeightedSet[Endpoint]) -> list[Endpoint]:
    return [item for bin_ in one._order for item in bin_.items]


def audit_endpoint(pool: ConnectionPool, endpoint: Endpoint) -> None:
    roster = pool._roster
    counts, slots = endpoint.counts, endpoint.slots
    assert counts == counted(slots)
    assert endpoint.aging == sum(slot.aging for slot in slots)
    live = [slot for slot in slots if slot.phase in {IDLE, IN_USE}]
    assert endpoint.bad == sum(slot.status >= UNHEALTHY for slot in live)
    assert endpoint.idle_low <= counts[IDLE]
    here = not endpoint.removed
    assert here == (roster.endpoints.get(endpoint.key) is endpoint)

    best: list[Slot] = []
    standing = NOWHERE
    for status in range(DEAD, -1, -1):
        idle = [slot for slot in slots if slot.phase == IDLE and slot.status == status]
        kept = endpoint.idle[status] or []
        assert set(kept) == set(idle)
        assert all(kept[slot.place] is slot for slot in idle)
        if idle and endpoint.up and here:
            best, standing = ([] if status == DEAD else kept), status
    if endpoint.ejected and standing != NOWHERE:
        standing = 4
    assert endpoint.ready == best
    # Who lends his last one stays where he is until somebody draws him.
    assert endpoint.standing == standing or not counts[IDLE]

    well = (
        endpoint.up and not endpoint.ejected and (len(live) > endpoint.bad or not (live or endpoint.failed))
    )
    assert endpoint.well == (well and here)
    may = endpoint.up and here and endpoint.gate != SHUT and len(slots) < pool.settings.max_per_endpoint
    assert endpoint.openable == (NOWHERE if not may else 0 if well else 2 if endpoint.ejected else 1)
    pending = counts[PENDING]
    surplus = pending > 1 or live or counts[DIALING]
    assert endpoint.spare == (NOWHERE if not pending else 0 if surplus else 1)
    assert pending == 0 or endpoint in roster._spare[endpoint.spare]
    fresh = len(live) + counts[DIALING] - endpoint.aging
    assert (endpoint in roster.short) == (may and roster.warm and fresh < pool.settings.min_per_endpoint)
    if endpoint in roster.wanted:
        assert may
        assert endpoint.wanted_at > -math.inf


def audit_slot(pool: ConnectionPool, slot: Slot) -> None:
    sizing, timer = pool._sizing, pool._sizing._timers.when(slot.number)
    assert (slot.lease is not None) == (slot.phase == IN_USE)
    assert not slot.aging or slot.phase in {IDLE, IN_USE}
    if slot.phase in {IDLE, PENDING}:
        assert slot.armed
        assert timer < math.inf or pool.settings.idle_timeout is None
    elif slot.phase in {DIALING, CLOSING}:
        assert not slot.armed
        assert timer == math.inf
    heap = sizing._eviction._heap
    if heap is not None and slot.phase == IDLE:
        entries = [entry[0] for entry in heap if entry[2] is slot]
        assert entries
        assert min(entries) <= worth(slot)
