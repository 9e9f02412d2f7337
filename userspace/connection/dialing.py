# SPDX-License-Identifier: Apache-2.0
"""Attempts that nothing else holds up stand in line here: so many a second, and nobody overtakes.

    line = DialLine(now, rate=2000, burst=100)
    line.add(7)
    line.drop(7)                             # not wanted any more
    while (connection := line.take(now)) is not None: ...      # at line.next_timeout()

Who was lost waits in :mod:`~userspace.connection.reconnection`, by endpoint, and one connection tries for
all of it.  When it succeeds all others follow at once: a thousand endpoints that come back with ten
connections each would be ten thousand handshakes in the same moment.  So would a service that starts.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Final

from userspace.flow.bucket import TokenBucket

#: Seconds: while connections stand in line the caller is woken for attempts of so long together.
PACE: Final = 0.01


class DialLine:
    """Numbers of connections behind a token bucket; see the module.  As long as the caller has numbers."""

    __slots__ = ("_batch", "_bucket", "_line", "_now")

    def __init__(self, now: float, *, rate: float, burst: int) -> None:
        self._bucket = TokenBucket(now, rate, burst)
        self._batch = max(1, int(min(rate * PACE, burst)))
        self._line = OrderedDict[int, None]()
        self._now = now

    def __len__(self) -> int:
        return len(self._line)

    def __contains__(self, connection: int) -> bool:
        return connection in self._line

    def add(self, connection: int) -> None:
        """Stand at the end of the line; who stands in it keeps the place."""
        self._line.setdefault(connection)

    def drop(self, connection: int) -> None:
        """Leave the line; nothing happens to who does not stand in it."""
        self._line.pop(connection, None)

    def take(self, now: float) -> int | None:
        """The first one, which leaves the line; None when there is nobody or no room."""
        self._now = now
        if not self._line or not self._bucket.take(now, 1):
            return None
        first, _ = self._line.popitem(last=False)
        if not self._line:
            self._line = OrderedDict()  # the old one keeps the room of the longest line
        return first

    def next_timeout(self) -> float:
        """When to take; infinite while nobody stands in line."""
        if not self._line:
            return math.inf
        return self._bucket.time_until(self._now, min(len(self._line), self._batch))

    def __repr__(self) -> str:
        return f"<DialLine {self._bucket.rate:g}/s, {len(self)} in line>"
