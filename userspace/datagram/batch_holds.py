# SPDX-License-Identifier: Apache-2.0
"""Destinations whose packets wait in a batch queue while others go on, why, and how long.

Either the way there is full (a transmit ring, a socket), or flow control does not let the next packet leave.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from userspace.datagram.batch_targets import Target
from userspace.datagram.destination import Endpoint

_NEVER: Final = float("inf")
#: Priority of a hold that flow control has nothing to do with: above all others.
NO_FLOW: Final = -1


class Hold:
    """Why and how long the packets to one destination wait."""

    __slots__ = ("count", "oldest", "priority", "size", "until")

    def __init__(self, until: float, priority: int = NO_FLOW, size: int = 0) -> None:
        #: Seconds of the clock; infinite: until somebody says that it has changed.
        self.until = until
        #: Of the packet that flow control did not let pass, and its bytes; NO_FLOW: the way is full.
        self.priority = priority
        self.size = size
        #: Of the packets that wait: how many, and when the first one came.
        self.count = 0
        self.oldest = _NEVER


class Holds(dict[Endpoint, Hold]):
    """The destinations that are held."""

    __slots__ = ()

    def release(self, now: float) -> None:
        """Forget those whose time has come."""
        for endpoint in [one for one, hold in self.items() if hold.until <= now]:
            del self[endpoint]

    def sort(
        self, queues: Sequence[list[int]], targets: Sequence[Target], times: Sequence[float]
    ) -> list[list[int]]:
        """What is not held of each queue; counts what is, and forgets who has nothing that waits."""
        for hold in self.values():
            hold.count, hold.oldest = 0, _NEVER
        ready: list[list[int]] = []
        known: dict[Target, Hold | None] = {}  # costs less to look into
        for queue in queues:
            some: list[int] = []
            for slot in queue:
                target = targets[slot]
                try:
                    found = known[target]
                except KeyError:
                    found = known[target] = self.get(target.endpoint)
                if found is None:
                    some.append(slot)
                else:
                    found.count += 1
                    if times[slot] < found.oldest:  # noqa: PLR1730 -- min() would be a call for each
                        found.oldest = times[slot]
            ready.append(some)
        for endpoint in [one for one, hold in self.items() if not hold.count]:
            del self[endpoint]
        return ready

    @property
    def count(self) -> int:
        """How many packets wait, when they were sorted last."""
        return sum([hold.count for hold in self.values()])

    @property
    def until(self) -> float:
        """When the first of them is to be tried again."""
        return min([hold.until for hold in self.values()], default=_NEVER)
