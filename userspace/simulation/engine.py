# SPDX-License-Identifier: Apache-2.0
"""Virtual time: a heap of events, each a function with one argument and the time when it is called.

    engine = Engine(seed=7)
    engine.at(0.5, link.raise_rate, 1e6)     # link.raise_rate(0.5, 1e6)
    engine.run(until=30.0)

Two runs with the same seed and the same calls are the same, to the last bit: events of the same time are
called in the order in which they were added, and random numbers come from generators that are made by name
(:meth:`Engine.random`), so that one more user of chance changes nothing for the others.

An event is a tuple, and what it calls is mostly a bound method that was made once: nothing is allocated but
the tuple.  There is no way to take an event back; who has changed his mind looks at the time when called.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from random import Random
from typing import Any, Final

from xdp.errors import SluiceError, UsageError

#: Events that one engine handles before it gives up: an hour of 100 Mb/s in packets of 1,200 bytes takes
#: 10,417 packets/s * 3,600 s * 3 events.
MAX_EVENTS: Final = 120_000_000
#: Seconds: a year of virtual time; beyond it a float of seconds can't tell two packets at 100 Gb/s apart.
MAX_TIME: Final = 31_536_000.0

Call = Callable[[float, Any], None]


class TooManyEventsError(SluiceError):
    """The simulation has had more events than it may have."""


class Engine:
    """Calls what is due, in order.  Raises UsageError for bounds out of range."""

    __slots__ = ("_heap", "_number", "events", "max_events", "now", "seed")

    def __init__(self, *, seed: int = 0, max_events: int = MAX_EVENTS) -> None:
        if type(seed) is not int:
            raise UsageError(f"seed is a whole number, not {seed!r}")
        if type(max_events) is not int or not 1 <= max_events <= MAX_EVENTS:
            raise UsageError(f"max_events is a whole number from 1 to {MAX_EVENTS}, not {max_events!r}")
        self.seed, self.max_events = seed, max_events
        self.now = 0.0
        self.events = 0  # handled
        self._number = 0  # of events that were added: the order of those at the same time
        self._heap: list[tuple[float, int, Call, Any]] = []

    def random(self, name: str) -> Random:
        """A generator of its own for whoever is called that; the same for the same seed and name."""
        return Random(f"{self.seed}/{name}")  # noqa: S311 - chance that can be repeated, no secrets

    def at(self, time: float, call: Call, argument: Any = None) -> None:
        """Call ``call(time, argument)`` then; at once after the present event if that is in the past.

        A time that is infinite or beyond the end of the run is never reached.  NaN is a mistake in
        the simulation: UsageError.
        """
        if time < self.now:
            time = self.now
        elif time != time:  # noqa: PLR0124 - NaN, at half of the cost of math.isnan
            raise UsageError("an event's time is a number, not NaN")
        self._number = number = self._number + 1
        heapq.heappush(self._heap, (time, number, call, argument))

    def run(self, until: float) -> None:
        """Handle all events up to and including that time, which is ``now`` afterwards.

        May be called again, for later.  Raises TooManyEventsError after max_events, and UsageError for a
        time that is past or more than a year.
        """
        if not self.now <= until <= MAX_TIME:
            raise UsageError(f"until is {self.now:g} (now) to {MAX_TIME:g} seconds, not {until!r}")
        heap, pop = self._heap, heapq.heappop
        left = self.max_events - self.events
        while heap and heap[0][0] <= until:
            if not left:
                raise TooManyEventsError(
                    f"more than {self.max_events} events in {self.now:.3f} simulated seconds",
                    hint="simulate a shorter time or fewer flows",
                )
            left -= 1
            time, _, call, argument = pop(heap)
            self.now = time
            self.events += 1
            call(time, argument)
        self.now = until

    @property
    def waiting(self) -> int:
        """Events that are still to come."""
        return len(self._heap)

    def next_event(self) -> float:
        """When, seconds; infinite when nothing is to come."""
        return self._heap[0][0] if self._heap else math.inf
