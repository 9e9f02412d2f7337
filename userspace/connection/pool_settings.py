# SPDX-License-Identifier: Apache-2.0
"""What a pool may be told, and what it tells: settings and snapshots, for people, TOML and JSON."""

from __future__ import annotations

import math
from typing import Final

import msgspec

from userspace.connection.outliers import OutlierSettings, check_count, check_number
from xdp.errors import UsageError

#: Connections of a pool: some 2 GB of it, and more than a machine has ports and descriptors for.
SIZE_MAXIMUM: Final = 1_000_000
#: Endpoints of a pool.
ENDPOINTS_MAXIMUM: Final = 100_000
#: Addresses of an endpoint: each attempt that fails goes to the next.
ADDRESSES_MAXIMUM: Final = 64
#: Tickets in line: to take one out moves 8 bytes for each behind it.
WAITING_MAXIMUM: Final = 65_536
#: Seconds: a year.  What is to take longer is to be None.
TIME_MAXIMUM: Final = 365 * 86_400.0
#: Seconds: shorter lifetimes and idle times than that of a handshake around the world open and close only.
TIME_MINIMUM: Final = 0.5
#: Part of the longest lifetime by which it may be shortened: more would be another lifetime.
JITTER_MAXIMUM: Final = 0.5


class PoolSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How many connections, for how long; seconds, None for never.  UsageError for values out of range."""

    #: Connections in all: kept open, and open at most.
    min_size: int = 5
    max_size: int = 100
    #: Connections of each endpoint.
    min_per_endpoint: int = 0
    max_per_endpoint: int = 100
    #: Callers that may wait for one.
    max_waiting: int = 1024
    #: A connection that nobody used for so long is closed.
    idle_timeout: float | None = 300.0
    #: No connection is given out after so long, less a random part of it, so that they don't end together.
    max_lifetime: float | None = 3600.0
    lifetime_jitter: float = 0.1
    #: Who holds a connection for longer is told of, with the calls that led to it if stacks are captured.
    leak_threshold: float | None = None
    capture_stacks: bool = False
    #: Part of the endpoints that must be well, or health is ignored.
    panic_threshold: float = 0.5
    outliers: OutlierSettings = OutlierSettings()

    def __post_init__(self) -> None:
        check_count("max_size", self.max_size, 1, SIZE_MAXIMUM)
        check_count("min_size", self.min_size, 0, self.max_size)
        check_count("max_per_endpoint", self.max_per_endpoint, 1, SIZE_MAXIMUM)
        check_count("min_per_endpoint", self.min_per_endpoint, 0, min(self.max_per_endpoint, self.max_size))
        check_count("max_waiting", self.max_waiting, 0, WAITING_MAXIMUM)
        for name in ("idle_timeout", "max_lifetime", "leak_threshold"):
            value = getattr(self, name)
            if value is not None:
                check_number(name, value, TIME_MINIMUM, TIME_MAXIMUM, "seconds")
        check_number("lifetime_jitter", self.lifetime_jitter, 0.0, JITTER_MAXIMUM)
        check_number("panic_threshold", self.panic_threshold, 0.0, 1.0)
        if not isinstance(self.outliers, OutlierSettings):
            raise UsageError(f"outliers are OutlierSettings, not {self.outliers!r}")


def seconds_of(value: float | None) -> float:
    """A time of the settings as a number: infinite for never."""
    return math.inf if value is None else value


class PoolSnapshot(msgspec.Struct, frozen=True, kw_only=True):
    """The state of a pool, and what it has counted since it was made.

    These add up at any time:

    - size == in_use + idle + opening + closing;
    - created == gone + size, and the attempts: dialed == opened + open_failed + abandoned + dialing;
    - acquired == returned + lost_in_use + in_use;
    - waited == granted + timed_out + cancelled + refused + waiting.
    """

    size: int
    in_use: int
    idle: int
    #: Without a connection yet; of them, attempts under way.
    opening: int
    dialing: int
    closing: int
    waiting: int
    endpoints: int
    well: int
    ejected: int
    panic: bool
    draining: bool
    #: Slots that were made, and that are no more.
    created: int
    gone: int
    #: Attempts, and how they ended; abandoned: closed before they did.
    dialed: int
    opened: int
    open_failed: int
    abandoned: int
    #: Connections that were lost while they were live.
    lost: int
    #: Leases that were made, given back, given back as broken, and whose connection was lost or taken.
    acquired: int
    returned: int
    broken: int
    lost_in_use: int
    #: Callers that had to wait, and what became of them; refused: pool closed, or endpoint removed.
    waited: int
    granted: int
    timed_out: int
    cancelled: int
    refused: int
    #: Callers that could not even wait, and such as did not want to and got nothing.
    full: int
    unserved: int
    #: Lookups that found nothing.
    missed: int
    #: Borrowers that held a connection too long, and those of them that still do.
    leaks: int
    leaks_open: int
    ejections: int
    #: Events of connections that are not there, or cannot have them: they came too late.
    stray: int
    #: What was closed by the pool, by cause.
    closed: dict[str, int]
