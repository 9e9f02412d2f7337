# SPDX-License-Identifier: Apache-2.0
"""What a pool is made of: endpoints, the places of their connections, leases; and what it wants done.

A connection has a number and a place (:class:`Slot`) that is in one phase at a time:

    dialing ──opened──► idle ◄──► in use
       │  ▲               │         │ lost
     failed │             │ lost    ▼
       ▼  may open        └───────► pending
      pending                                     any of them ──► closing ──► gone

Pending and dialing together are what is called opening: the place is taken, the connection is not there yet.
A pending one waits for the caller to say that the endpoint may be tried; it keeps its number.

Whether an endpoint may be dialed is its gate.  A new one may be tried by one connection; when that succeeds
the gate is open, and when any fails or is lost it is shut until the caller lets one more try.  So somebody
who is not there is asked once at a time, however many wait for him.

Nothing here decides anything: see :mod:`~userspace.connection.roster`, ``sizing`` and ``pool``.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable
from typing import TYPE_CHECKING, Final, NamedTuple

from userspace.connection.states import Cause

if TYPE_CHECKING:
    from userspace.connection.leaks import Stack
    from userspace.connection.outliers import Record
    from userspace.connection.waiters import Ticket

# Numbers and no enums: they index lists, a million times a second.
#: Phases of a slot.
PENDING: Final = 0
DIALING: Final = 1
IDLE: Final = 2
IN_USE: Final = 3
CLOSING: Final = 4
PHASES: Final = ("pending", "dialing", "idle", "in use", "closing")

#: Health of a connection, in the order of userspace.connection.health.Status.
HEALTHY: Final = 0
DEGRADED: Final = 1
UNHEALTHY: Final = 2
DEAD: Final = 3
STATUSES: Final = ("healthy", "degraded", "unhealthy", "dead")

#: Gates of an endpoint: nobody may dial, one may, all may.
SHUT: Final = 0
ONE: Final = 1
OPEN: Final = 2
GATES: Final = ("shut", "one", "open")

#: What an endpoint is in its set of: its index, or none.
NOWHERE: Final = -1

#: States of a lease.
HELD: Final = 0
LOST: Final = 1
RETURNED: Final = 2

#: Seconds for which the failure of an address is remembered: as long as reconnection waits at most.
ADDRESS_MEMORY: Final = 30.0
#: Samples over which the latency of an endpoint is averaged: those of RFC 9002 (5.3), a power of two.
LATENCY_WEIGHT: Final = 1 / 8

_NEVER: Final = math.inf


class Open(NamedTuple):
    """Connect to an address of an endpoint: then on_opened or on_open_failed with that number."""

    connection: int
    endpoint: Hashable
    address: Hashable


class Close(NamedTuple):
    """End a connection, or the attempt to make one: then on_closed with that number."""

    connection: int
    cause: Cause


class Lease:
    """A connection that is borrowed: ``connection`` is its number, ``endpoint`` the key of its endpoint."""

    __slots__ = ("connection", "endpoint", "owner", "since", "slot", "stack", "state", "ticket", "who")

    def __init__(self, owner: object, slot: Slot, since: float, who: object) -> None:
        self.connection = slot.number
        self.endpoint = slot.endpoint.key
        #: The pool.
        self.owner = owner
        self.slot = slot
        self.since = since
        self.who = who
        self.state = HELD
        #: Where it was borrowed.
        self.stack: Stack | None = None
        #: What waited for it.
        self.ticket: Ticket | None = None

    @property
    def lost(self) -> bool:
        """Whether the connection broke or was taken away meanwhile.  It is to be released all the same."""
        return self.state == LOST

    def __repr__(self) -> str:
        what = ("held", "lost", "returned")[self.state]
        return f"<Lease of connection {self.connection} to {self.endpoint!r}: {what}>"


class Slot:
    """The place of one connection; times in seconds."""

    __slots__ = ("address", "aging", "armed", "cost", "endpoint", "expires_at", "for_any", "lease", "number",
                 "phase", "place", "queued", "shared_at", "status", "used_at")  # fmt: skip

    def __init__(self, number: int, endpoint: Endpoint, now: float) -> None:
        self.number = number
        self.endpoint = endpoint
        self.address: Hashable = None
        self.phase = DIALING
        self.status = HEALTHY
        #: In the list of those of its endpoint that are idle and have its status.
        self.place = 0
        #: When its longest lifetime is over.
        self.expires_at = _NEVER
        #: Its lifetime is nearly over: it does not count for what there should be at least.
        self.aging = False
        #: When it was borrowed, returned, opened or lost last; when it was last given out by lookup.
        self.used_at = now
        self.shared_at = -_NEVER
        #: Seconds of latency, times what is under way on it and one.
        self.cost = endpoint.latency
        self.lease: Lease | None = None
        #: Whether it is dialed for who takes any endpoint.
        self.for_any = False
        #: Whether it has a timer, and whether those who look for what to evict know of it, or don't look.
        self.armed = False
        self.queued = False

    @property
    def last_use(self) -> float:
        """When it was of use last."""
        return max(self.shared_at, self.used_at)

    def __repr__(self) -> str:
        return f"<Slot {self.number}: {PHASES[self.phase]}, {STATUSES[self.status]}>"


class Endpoint:
    """Somebody to connect to; what the pool knows of him."""

    __slots__ = (
        "addresses", "aging", "bad", "counts", "ejected", "failed", "gate", "idle", "idle_low", "key",
        "latency", "openable", "ready", "record", "removed", "seed", "slots", "spare", "standing",
        "troubles", "up", "wanted_at", "weight", "well",
    )  # fmt: skip

    def __init__(
        self,
        key: Hashable,
        weight: int,
        addresses: tuple[Hashable, ...],
        latency: float,
        record: Record[Hashable],
    ) -> None:
        self.key = key
        self.weight = weight
        self.addresses = addresses
        #: Index of an address: failures in a row, and when the last one was.  None: there were none.
        self.troubles: dict[int, tuple[int, float]] | None = None
        #: Of Rendezvous.
        self.seed = 0
        #: Results, for outliers.
        self.record = record
        #: Seconds, of all its connections.
        self.latency = latency
        self.slots: list[Slot] = []
        #: Slots by phase.
        self.counts = [0, 0, 0, 0, 0]
        #: Live ones that are unhealthy or dead; slots that are aging.
        self.bad = 0
        self.aging = 0
        #: Idle ones by status; None until there are some.
        self.idle: list[list[Slot] | None] = [None, None, None, None]
        #: Those of them that are to be given out now: the best there are, but no dead ones.
        self.ready: list[Slot] = NOTHING
        #: Least number of idle ones since the pool was last made smaller.
        self.idle_low = 0
        self.up = True
        self.gate = ONE
        #: The latest attempt, or connection, failed.
        self.failed = False
        self.ejected = False
        self.removed = False
        #: When lookup found nothing; -infinite: it was given what it wanted.
        self.wanted_at = -_NEVER
        # What the roster has noted down.
        self.well = False
        self.standing = NOWHERE
        self.openable = NOWHERE
        self.spare = NOWHERE

    @property
    def live(self) -> int:
        """Connections that are there."""
        return self.counts[IDLE] + self.counts[IN_USE]

    @property
    def opening(self) -> int:
        """Connections that are to be there."""
        return self.counts[PENDING] + self.counts[DIALING]

    def choose_address(self, now: float) -> Hashable:
        """The one to dial: that has failed least lately, then the least used, then the first."""
        addresses = self.addresses
        if len(addresses) == 1:
            return addresses[0]
        uses = Counter(slot.address for slot in self.slots if slot.phase != PENDING)
        troubles = self.troubles or {}

        def rank(index: int) -> tuple[int, int]:
            failures, since = troubles.get(index, (0, now))
            return (failures if now - since < ADDRESS_MEMORY else 0), uses[addresses[index]]

        return addresses[min(range(len(addresses)), key=rank)]

    def note_address(self, now: float, address: Hashable, *, worked: bool) -> None:
        """An attempt at this address has ended."""
        if len(self.addresses) == 1 or address not in self.addresses:
            return
        troubles = self.troubles if self.troubles is not None else {}
        index = self.addresses.index(address)
        if worked:
            troubles.pop(index, None)
        else:
            troubles[index] = (troubles.get(index, (0, now))[0] + 1, now)
        self.troubles = troubles or None

    def note_latency(self, seconds: float) -> None:
        """One of its connections has that latency."""
        self.latency += (seconds - self.latency) * LATENCY_WEIGHT

    def __repr__(self) -> str:
        return f"<Endpoint {self.key!r}: {'well' if self.well else 'not well'}, {len(self.slots)} slots>"


#: Stands for a list of slots that has none, and must stay so.
NOTHING: Final[list[Slot]] = []
