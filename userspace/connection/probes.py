# SPDX-License-Identifier: Apache-2.0
"""How many questions a second may be asked of all those who are suspected, and whose turn it is.

    budget = ProbeBudget(now, rate=10_000)
    budget.want(7)                           # stands in line, once
    budget.drop(7)                           # it has answered
    for connection in budget.take(now): ...  # ask these now
    wake_at = budget.next_time(now)          # infinite: nobody stands in line

When thousands fall silent at once, asking each of them ten times a second is a flood of our own making.
All together get ``rate`` questions a second.  Who stands in line is served in the order of coming, and comes
again behind all others: everybody gets the same share, and nobody starves.  So with twice as many as can be
served at full rate each is asked half as often, and it takes twice as long until the questions that a verdict
needs have been asked.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Final, NamedTuple

from userspace.flow.bucket import TokenBucket
from xdp.errors import UsageError

#: Questions a second: a thousand who are suspected at ten a second each, 0.6 MB/s of datagrams of 60 bytes.
RATE: Final = 10_000.0
#: The most that can be asked for.  More is no limit: a loop in Python does not get there.
RATE_MOST: Final = 1e6
#: Seconds of the rate that may be asked at once: a loop that is late by that much loses nothing.
BURST: Final = 0.1
#: Seconds of the rate that are waited for when more stand in line: a loop need not wake for each of them.
GRANULE: Final = 0.01


class Probe(NamedTuple):
    """A question to send: a ping with that sequence, and with ``kernel`` a probe of the kernel program."""

    connection: int
    sequence: int
    kernel: bool


class ProbeBudget:
    """A queue behind a token bucket; keys are numbers of connections.  As long as the caller has keys.

    Raises UsageError for a rate that is not from 1 to RATE_MOST.
    """

    __slots__ = ("_bucket", "_granule", "_waiting")

    def __init__(self, now: float, rate: float = RATE) -> None:
        if not 1.0 <= rate <= RATE_MOST:
            raise UsageError(f"the budget of probes is 1 to {RATE_MOST:g} a second, not {rate!r}")
        self._bucket = TokenBucket(now, rate, max(1.0, rate * BURST))
        self._granule = max(1, int(rate * GRANULE))
        # Removed from anywhere, taken from the front: a dict would be walked over what was removed.
        self._waiting: OrderedDict[int, None] = OrderedDict()

    @property
    def rate(self) -> float:
        """Questions a second."""
        return self._bucket.rate

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, key: int) -> bool:
        return key in self._waiting

    def want(self, key: int) -> None:
        """Stand in line; who stands there keeps the place."""
        self._waiting.setdefault(key)

    def drop(self, key: int) -> None:
        """Leave the line; nothing happens when it does not stand there."""
        self._waiting.pop(key, None)

    def take(self, now: float) -> list[int]:
        """Those whose turn it is; they stand in line no more."""
        waiting = self._waiting
        if not waiting:
            return []
        count = min(len(waiting), int(self._bucket.level(now)))
        self._bucket.take(now, count)
        return [waiting.popitem(last=False)[0] for _ in range(count)]

    def next_time(self, now: float) -> float:
        """When to call :meth:`take`; infinite while nobody stands in line."""
        if not self._waiting:
            return math.inf
        return self._bucket.time_until(now, min(len(self._waiting), self._granule))

    def __repr__(self) -> str:
        return f"<ProbeBudget {self.rate:g}/s, {len(self)} in line>"
