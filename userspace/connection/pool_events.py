# SPDX-License-Identifier: Apache-2.0
"""What a pool is told: endpoints that come and go, and what happens to connections.

:class:`PoolEvents` is the half of :class:`userspace.connection.pool.ConnectionPool` that its driver talks to;
the other half is for those who want connections.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable
from typing import Final

from userspace.connection.lending import closed
from userspace.connection.outliers import check_count
from userspace.connection.pool_parts import PoolParts
from userspace.connection.pool_settings import ADDRESSES_MAXIMUM, ENDPOINTS_MAXIMUM
from userspace.connection.selection import checked_weight, name_of
from userspace.connection.slots import (
    CLOSING,
    DEAD,
    DIALING,
    HEALTHY,
    IDLE,
    IN_USE,
    ONE,
    PENDING,
    SHUT,
    Endpoint,
    Slot,
)
from userspace.connection.states import Cause
from xdp.errors import UsageError

#: Seconds: a latency is brought into this range, as one of 0 would draw all calls to it.
LATENCY_MINIMUM: Final = 1e-6
LATENCY_MAXIMUM: Final = 60.0
#: What may be under way on one connection: more streams than QUIC has in flow control.
LOAD_MAXIMUM: Final = 1 << 32
#: Samples over which the latency of all is averaged, a power of two: those of a few endpoints.
_LATENCY_WEIGHT: Final = 1 / 64

_NEVER: Final = math.inf


class PoolEvents(PoolParts):
    """The driver's side of a pool; see the module."""

    __slots__ = ()

    # --- endpoints

    def add_endpoint(
        self, now: float, key: Hashable, *, weight: float = 1, addresses: Iterable[Hashable] = ()
    ) -> None:
        """Somebody to connect to, by a key of the caller's choice; or what is known of him has changed.

        ``weight`` is his part of the choices that are not asked for by key: a stake, a whole number.
        ``addresses`` are tried in turn, the first one first; without any the key is the address.  Connections
        to addresses that are gone are closed when nobody holds them.  Raises PoolClosedError while the pool
        is being closed.
        """
        now = self._clock(now)
        if self._draining:
            raise closed()
        weight = checked_weight(weight)
        given = _checked_addresses(key, addresses)
        endpoint = self._endpoints.get(key)
        if endpoint is not None:
            if weight != endpoint.weight:
                self._roster.set_weight(endpoint, weight, name_of(key))
            if given != endpoint.addresses:
                self._readdress(now, endpoint, given)
        elif len(self._endpoints) >= ENDPOINTS_MAXIMUM:
            raise UsageError(
                f"a pool has {ENDPOINTS_MAXIMUM} endpoints at most", hint="remove those that are not used"
            )
        else:
            record = self._outliers.add(now, key)
            endpoint = Endpoint(key, weight, given, self._roster.latency, record)
            self._roster.add_endpoint(endpoint, name_of(key))
        self._settle(now, endpoint)

    def _readdress(self, now: float, endpoint: Endpoint, addresses: tuple[Hashable, ...]) -> None:
        endpoint.addresses = addresses
        endpoint.troubles = None
        for slot in list(endpoint.slots):
            if slot.address not in addresses:
                if slot.phase == IDLE:
                    self._sizing.close(slot, Cause.REMOVED)
                elif slot.phase == IN_USE:
                    slot.expires_at = now

    def remove_endpoint(self, now: float, key: Hashable) -> None:
        """Connect to it no more: what is borrowed is closed when it comes back, all else now.

        Who waits for it gets EndpointGoneError, or another endpoint if he did not ask for this one.
        UsageError if it is not there.
        """
        now = self._clock(now)
        endpoint = self._endpoint(key)
        self._roster.remove_endpoint(endpoint)
        self._outliers.remove(key)
        for slot in list(endpoint.slots):
            if slot.phase in {PENDING, DIALING, IDLE}:
                self._sizing.close(slot, Cause.REMOVED)
        self._lending.fail_over(now, endpoint)
        self._settle(now)

    def _endpoint(self, key: Hashable) -> Endpoint:
        try:
            return self._endpoints[key]
        except (KeyError, TypeError):  # TypeError: it can't be hashed
            raise UsageError(f"there is no endpoint {key!r}", hint="add it with add_endpoint") from None

    def on_endpoint(self, now: float, key: Hashable, up: bool) -> None:
        """An endpoint can be reached, or cannot; nothing of one that cannot is given out or dialed.

        Attempts that may be made because it can be reached again are told by :meth:`may_open` as all others.
        """
        now = self._clock(now)
        endpoint = self._endpoints.get(key)
        if endpoint is None or endpoint.up == up:
            return
        self._roster.set_up(endpoint, bool(up))
        self._retry(now, endpoint)
        self._changed(now, endpoint)
        self._settle(now, endpoint)

    def _changed(self, now: float, endpoint: Endpoint) -> None:
        """All of an endpoint is worth more or less than it was."""
        for slot in endpoint.slots:
            self._sizing.lost_worth(slot)
        self._serve(now, endpoint)

    def _serve(self, now: float, endpoint: Endpoint) -> None:
        """It, or one of its connections, is better or worse than it was: for those who wait."""
        self._lending.match(now, endpoint)
        self._lending.fail_over(now, endpoint)

    def may_open(self, now: float, key: Hashable) -> bool:
        """An endpoint that failed may be tried once; whether an attempt begins.

        If none does, the next one that is needed may begin at once.
        """
        now = self._clock(now)
        endpoint = self._endpoints.get(key)
        if endpoint is None or self._draining:
            return False
        before = self._sizing.dialed
        if endpoint.gate == SHUT:
            self._roster.set_gate(endpoint, ONE)
        self._retry(now, endpoint)
        self._settle(now, endpoint)
        return self._sizing.dialed != before

    def _retry(self, now: float, endpoint: Endpoint) -> None:
        """Connect those that wait for the endpoint, as far as its gate allows."""
        if endpoint.counts[PENDING] and endpoint.up:
            for slot in list(endpoint.slots):
                if endpoint.gate == SHUT:
                    return
                if slot.phase == PENDING:
                    self._sizing.redial(now, slot)

    # --- connections

    def _slot(self, connection: int) -> Slot | None:
        """None, and it is counted, when there is no such connection (any more)."""
        slot = self._roster.slots.get(connection)
        if slot is None:
            self._stray += 1
        return slot

    def _in_phase(self, connection: int, *phases: int) -> Slot | None:
        """None, and it is counted, unless it is in one of these phases."""
        slot = self._slot(connection)
        if slot is not None and slot.phase not in phases:
            self._stray += 1
            return None
        return slot

    def on_opened(self, now: float, connection: int) -> None:
        """The attempt succeeded: the connection is live, and taken to be healthy."""
        now = self._clock(now)
        slot = self._in_phase(connection, DIALING)
        if slot is None:
            return
        endpoint, sizing = slot.endpoint, self._sizing
        self._opened += 1
        sizing.attempt_ended(slot)
        endpoint.note_address(now, slot.address, worked=True)
        self._roster.set_open(endpoint)
        sizing.opened(now, slot)
        if slot.address not in endpoint.addresses:  # it moved meanwhile
            slot.expires_at = now
        slot.status = HEALTHY
        slot.cost = endpoint.latency
        if endpoint.wanted_at > -_NEVER:  # it is for whoever looked it up: he will come again
            slot.shared_at = now
            endpoint.wanted_at = -_NEVER
        self._roster.move(slot, IDLE)
        self._at_rest(now, slot)
        self._retry(now, endpoint)
        self._settle(now, endpoint)

    def _at_rest(self, now: float, slot: Slot) -> None:
        """A connection is idle: who gets it?"""
        self._sizing.rest(now, slot)
        if now >= slot.expires_at:
            self._sizing.check(now, slot)
        else:
            self._lending.offer(now, slot)

    def on_open_failed(self, now: float, connection: int, cause: Cause) -> None:
        """The attempt failed.  The connection waits for :meth:`may_open` of its endpoint."""
        now = self._clock(now)
        _check_cause(cause)
        slot = self._in_phase(connection, DIALING)
        if slot is None:
            return
        endpoint = slot.endpoint
        self._open_failed += 1
        self._sizing.attempt_ended(slot)
        if cause is not Cause.LOCAL_ERROR:  # which says nothing of the address
            endpoint.note_address(now, slot.address, worked=False)
        self._down(now, slot)
        self._settle(now, endpoint)

    def on_lost(self, now: float, connection: int, cause: Cause) -> None:
        """A live connection is no more.  It waits for :meth:`may_open` of its endpoint.

        If it was borrowed its lease is void from now on (``lease.lost``).
        """
        now = self._clock(now)
        _check_cause(cause)
        slot = self._in_phase(connection, IDLE, IN_USE)
        if slot is None:
            return
        self._lost += 1
        self._down(now, slot)
        if cause is not Cause.LOCAL_ERROR:
            self._failure(now, slot.endpoint)
        self._settle(now, slot.endpoint)

    def _down(self, now: float, slot: Slot) -> None:
        """There is no connection, and the endpoint is not to be dialed until it may be."""
        endpoint, roster = slot.endpoint, self._roster
        self._sizing.pend(now, slot)
        roster.set_failed(endpoint)
        if endpoint.removed or self._draining:
            self._sizing.close(slot, Cause.REMOVED if endpoint.removed else Cause.DRAINED)
        self._lending.void(now, slot)
        self._lending.fail_over(now, endpoint)

    def _failure(self, now: float, endpoint: Endpoint) -> None:
        """A request to it failed, or a connection was lost."""
        if self._outliers.failure(now, endpoint.record):
            self._roster.set_ejected(endpoint, ejected=True)
            self._changed(now, endpoint)

    def on_closed(self, now: float, connection: int) -> None:
        """A connection is gone for good, because of a Close or without: its place is free."""
        now = self._clock(now)
        slot = self._slot(connection)
        if slot is None:
            return
        endpoint = slot.endpoint
        asked = slot.phase == CLOSING
        if slot.phase == DIALING:
            self._roster.set_failed(endpoint)
        if slot.lease is not None:
            self._roster.move(slot, CLOSING)
            self._lending.void(now, slot)
        self._sizing.free(slot)
        if not asked:
            self._lending.fail_over(now, endpoint)
        self._settle(now, endpoint)

    def on_health(self, now: float, connection: int, status: int) -> None:
        """A live connection is healthy (0), degraded, unhealthy or dead (3)."""
        now = self._clock(now)
        status = _checked_status(status)
        slot = self._in_phase(connection, IDLE, IN_USE)
        if slot is None or slot.status == status:
            return
        self._roster.set_status(slot, status)
        self._sizing.lost_worth(slot)
        self._serve(now, slot.endpoint)
        self._settle(now, slot.endpoint)

    def on_latency(self, now: float, connection: int, latency: float, load: int = 0) -> None:
        """The peak EWMA of a live connection's round trips (seconds), and what is under way on it.

        That is what its choice costs: streams or requests, whatever the caller counts for all alike.
        """
        self._clock(now)
        if not latency >= 0.0:
            raise UsageError(f"a latency is seconds, 0 or more, not {latency!r}")
        check_count("load", load, 0, LOAD_MAXIMUM)
        slot = self._in_phase(connection, IDLE, IN_USE)
        if slot is None:
            return
        latency = min(max(latency, LATENCY_MINIMUM), LATENCY_MAXIMUM)
        slot.cost = latency * (load + 1)
        slot.endpoint.note_latency(latency)
        self._roster.latency += (latency - self._roster.latency) * _LATENCY_WEIGHT

    def on_result(self, now: float, key: Hashable, *, worked: bool) -> None:
        """A request on a connection that was looked up has ended; release tells it of borrowed ones."""
        now = self._clock(now)
        endpoint = self._endpoints.get(key)
        if endpoint is None:
            self._stray += 1
        elif worked:
            endpoint.record.success()
        else:
            self._failure(now, endpoint)
            self._settle(now, endpoint)


def _checked_addresses(key: Hashable, addresses: Iterable[Hashable]) -> tuple[Hashable, ...]:
    """Those of an endpoint; UsageError for a key or addresses that can't be."""
    given = tuple(addresses) or (key,)
    if key is None:
        raise UsageError("None can't be an endpoint: it stands for any")
    try:
        distinct = len({*given, key} - {key}) + (key in given)
    except TypeError:
        raise UsageError(f"endpoint {key!r} and its addresses must be hashable") from None
    if distinct != len(given) or len(given) > ADDRESSES_MAXIMUM:
        raise UsageError(f"an endpoint has up to {ADDRESSES_MAXIMUM} addresses, each once, not {given!r}")
    return given


def _checked_status(status: object) -> int:
    if not isinstance(status, int) or not HEALTHY <= status <= DEAD:
        raise UsageError(f"a status is from {HEALTHY} (healthy) to {DEAD} (dead), not {status!r}")
    return int(status)


def _check_cause(cause: object) -> None:
    if not isinstance(cause, Cause):
        raise UsageError(f"a cause is one of userspace.connection.states.Cause, not {cause!r}")
