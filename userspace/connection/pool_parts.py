# SPDX-License-Identifier: Apache-2.0
"""The parts of a pool, and what they tell about it together.

:class:`PoolParts` is what :class:`userspace.connection.pool.ConnectionPool` stands on: the roster (what there
is), the sizing (what is opened and closed), the lending (who gets what), the outliers (who does badly).
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING

import msgspec

from userspace.connection.leaks import Leaks
from userspace.connection.lending import Lending
from userspace.connection.outliers import Outliers
from userspace.connection.pool_settings import PoolSettings, PoolSnapshot
from userspace.connection.roster import Roster
from userspace.connection.selection import SECRET_LENGTH
from userspace.connection.sizing import Sizing
from userspace.connection.slots import CLOSING, DIALING, GATES, IDLE, IN_USE, PENDING, PHASES, Endpoint, Lease
from userspace.connection.timers import LATEST, checked_now
from userspace.connection.waiters import WaitLine
from xdp.errors import UsageError

if TYPE_CHECKING:
    from random import Random


class EndpointSnapshot(msgspec.Struct, frozen=True, kw_only=True):
    """The state of one endpoint; ``latency`` in seconds."""

    endpoint: str
    weight: int
    addresses: list[str]
    up: bool
    well: bool
    ejected: bool
    failed: bool
    gate: str
    in_use: int
    idle: int
    opening: int
    closing: int
    waiting: int
    latency: float
    failures_in_a_row: int


class PoolParts:
    """What a pool consists of; see the module."""

    __slots__ = ("_draining", "_endpoints", "_leaks", "_lending", "_line", "_lost", "_missed", "_now",
                 "_open_failed", "_opened", "_outliers", "_returned", "_returned_broken", "_rng", "_roster",
                 "_sizing", "_stray", "_was_panic", "settings")  # fmt: skip

    def __init__(self, now: float, settings: PoolSettings, *, rng: Random) -> None:
        self._now = checked_now(now, -LATEST)
        if not isinstance(settings, PoolSettings):
            raise UsageError(f"settings are PoolSettings, not {settings!r}")
        self.settings = settings
        self._rng = rng
        self._roster = Roster(
            min_per_endpoint=settings.min_per_endpoint,
            max_per_endpoint=settings.max_per_endpoint,
            panic_threshold=settings.panic_threshold,
            secret=rng.randbytes(SECRET_LENGTH),
        )
        self._endpoints = self._roster.endpoints
        self._line = WaitLine[Endpoint]()
        self._sizing = Sizing(settings, self._roster, self._line, rng, self._now)
        self._leaks: Leaks[Lease] | None = None
        if settings.leak_threshold is not None:
            self._leaks = Leaks(threshold=settings.leak_threshold, capture=settings.capture_stacks)
        self._lending = Lending(
            self, self._roster, self._line, self._sizing, self._leaks,
            max_waiting=settings.max_waiting, draw=rng.random,
        )  # fmt: skip
        self._outliers = Outliers[Hashable](settings.outliers, rng=rng)
        self._draining = self._was_panic = False
        # Counters since the beginning.
        self._opened = self._open_failed = self._lost = self._stray = 0
        self._missed = self._returned = self._returned_broken = 0

    def _clock(self, now: float) -> float:
        """The time of a call, no earlier than that of the last."""
        self._now = now = checked_now(now, self._now)
        return now

    def _settle(self, now: float, changed: Endpoint | None = None) -> None:
        """Something has changed, maybe with one endpoint only: open, close and grant what follows."""
        if self._draining:
            return
        if self._roster.panic != self._was_panic:
            self._was_panic = self._roster.panic
            if self._was_panic:
                self._lending.match_all(now)
        if self._line:
            self._sizing.grow(now, changed)
        self._sizing.fill(now)

    # --- looking at it

    def __contains__(self, key: Hashable) -> bool:
        return key in self._endpoints

    @property
    def size(self) -> int:
        """Connections, and places of such as are being opened or closed."""
        return self._roster.size

    @property
    def active_count(self) -> int:
        """Connections that are borrowed."""
        return self._roster.counts[IN_USE]

    @property
    def idle_count(self) -> int:
        """Connections that are live and not borrowed."""
        return self._roster.counts[IDLE]

    @property
    def opening_count(self) -> int:
        """Connections that are being opened, or wait until they may be."""
        return self._roster.counts[PENDING] + self._roster.counts[DIALING]

    @property
    def closing_count(self) -> int:
        """Connections that were told to be closed and are not gone yet."""
        return self._roster.counts[CLOSING]

    @property
    def waiting_count(self) -> int:
        """Callers in line."""
        return len(self._line)

    @property
    def panic(self) -> bool:
        """Whether too few endpoints are well for health to count."""
        return self._roster.panic

    @property
    def closed(self) -> bool:
        """Whether it was drained and nothing is left."""
        return self._draining and not self._roster.slots

    def phase(self, connection: int) -> str | None:
        """pending, dialing, idle, in use or closing; None when there is no such connection (any more)."""
        slot = self._roster.slots.get(connection)
        return None if slot is None else PHASES[slot.phase]

    def snapshot(self) -> PoolSnapshot:
        """The state of all, and the counters."""
        roster, sizing, lending = self._roster, self._sizing, self._lending
        return PoolSnapshot(
            size=self.size,
            in_use=self.active_count,
            idle=self.idle_count,
            opening=self.opening_count,
            dialing=roster.counts[DIALING],
            closing=self.closing_count,
            waiting=self.waiting_count,
            endpoints=len(self._endpoints),
            well=roster.well,
            ejected=self._outliers.ejected,
            panic=roster.panic,
            draining=self._draining,
            created=sizing.created,
            gone=sizing.gone,
            dialed=sizing.dialed,
            opened=self._opened,
            open_failed=self._open_failed,
            abandoned=sizing.abandoned,
            lost=self._lost,
            acquired=lending.acquired,
            returned=self._returned,
            broken=self._returned_broken,
            lost_in_use=lending.lost_in_use,
            waited=lending.waited,
            granted=lending.granted,
            timed_out=lending.timed_out,
            cancelled=lending.cancelled,
            refused=lending.refused,
            full=lending.full,
            unserved=lending.unserved,
            missed=self._missed,
            leaks=0 if self._leaks is None else self._leaks.found,
            leaks_open=0 if self._leaks is None else self._leaks.open,
            ejections=self._outliers.ejections,
            stray=self._stray,
            closed={cause.value: count for cause, count in sorted(sizing.closed.items())},
        )

    def endpoint_snapshots(self) -> list[EndpointSnapshot]:
        """The state of each endpoint, in the order in which they were added."""
        return [
            EndpointSnapshot(
                endpoint=str(endpoint.key),
                weight=endpoint.weight,
                addresses=[str(address) for address in endpoint.addresses],
                up=endpoint.up,
                well=endpoint.well,
                ejected=endpoint.ejected,
                failed=endpoint.failed,
                gate=GATES[endpoint.gate],
                in_use=endpoint.counts[IN_USE],
                idle=endpoint.counts[IDLE],
                opening=endpoint.opening,
                closing=endpoint.counts[CLOSING],
                waiting=self._line.count(endpoint),
                latency=endpoint.latency,
                failures_in_a_row=endpoint.record.run,
            )
            for endpoint in self._endpoints.values()
        ]

    def __repr__(self) -> str:
        state = "closed" if self.closed else "draining" if self._draining else "panic" if self.panic else ""
        return (
            f"<ConnectionPool{state and ' (' + state + ')'}: {self.active_count} in use, "
            f"{self.idle_count} idle, {self.opening_count} opening, {self.closing_count} closing "
            f"of {self.settings.max_size}; {self.waiting_count} waiting; "
            f"{self._roster.well} of {len(self._endpoints)} endpoints well>"
        )
