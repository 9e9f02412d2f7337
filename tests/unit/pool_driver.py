# SPDX-License-Identifier: Apache-2.0
"""A pool whose driver does at once what it asks for, but what it was told not to."""

from __future__ import annotations

from collections.abc import Hashable
from random import Random

from userspace.connection.pool import Close, ConnectionPool, Lease, Open, PoolSettings, Ticket
from userspace.connection.states import Cause


class Driven:
    """``down``: endpoints and addresses that refuse; ``hold``: nothing is opened, or closed, by itself."""

    def __init__(self, *endpoints: Hashable, seed: int = 0, now: float = 0.0, **options: object) -> None:
        chosen = {"min_size": 0, **options}
        self.pool = ConnectionPool(now, PoolSettings(**chosen), rng=Random(seed))  # type: ignore[arg-type]
        self.down: set[Hashable] = set()
        self.hold_opening = self.hold_closing = False
        self.opens: list[Open] = []  # held, or all that there were
        self.closes: list[Close] = []
        for key in endpoints:
            self.pool.add_endpoint(now, key)

    def do(self, now: float) -> list[Open | Close]:
        """What the pool wants, until it wants nothing; all of that."""
        done: list[Open | Close] = []
        while actions := self.pool.take_actions():
            done += actions
            for action in actions:
                if isinstance(action, Open):
                    self.opens.append(action)
                    if self.hold_opening:
                        continue
                    if {action.endpoint, action.address} & self.down:
                        self.pool.on_open_failed(now, action.connection, Cause.REFUSED)
                    else:
                        self.pool.on_opened(now, action.connection)
                else:
                    self.closes.append(action)
                    if not self.hold_closing:
                        self.pool.on_closed(now, action.connection)
        return done

    def acquire(self, now: float, **options: object) -> Lease:
        """A lease, if there is one by the time that all is done."""
        got = self.pool.acquire(now, **options)  # type: ignore[arg-type]
        self.do(now)
        self.pool.take_grants()
        return got if isinstance(got, Lease) else got.result()

    def wait(self, now: float, **options: object) -> Ticket:
        """A ticket, as nothing is there now."""
        got = self.pool.acquire(now, **options)  # type: ignore[arg-type]
        assert isinstance(got, Ticket)
        return got

    def release(self, now: float, lease: Lease, *, broken: bool = False) -> None:
        self.pool.release(now, lease, broken=broken)
        self.do(now)

    def until(self, now: float, end: float) -> float:
        """Let time pass, with everything in time."""
        while (at := self.pool.next_timeout()) <= end:
            now = max(now, at)
            self.pool.on_timeout(now)
            self.do(now)
        return end

    def causes(self) -> list[Cause]:
        """Why connections were closed, so far."""
        return [action.cause for action in self.closes]

    def counts(self) -> tuple[int, int, int, int]:
        """In use, idle, opening, closing."""
        pool = self.pool
        return pool.active_count, pool.idle_count, pool.opening_count, pool.closing_count
