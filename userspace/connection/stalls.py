# SPDX-License-Identifier: Apache-2.0
"""Whether it is we who are unwell: a clock that stands still while our own loop does, and timers by it.

    local = LocalHealth()
    local.on_tick(now, due)          # whenever the loop has run, and when it meant to run at the latest
    local.awake(now)                 # seconds of a clock without the stalls
    local.awake(now) < local.grace_until                     # judge nobody yet
    local.stretch                    # by so much longer than usual answers may take

A loop that did not run has heard nobody.  What peers sent meanwhile waits in the socket, or found it full,
and no question was asked.  So time in which the loop stalled is no time of silence: by the clock of
:meth:`LocalHealth.awake` all deadlines and silences are put off by the stall.  Nor is there a burst of timers
when the loop goes on.

A stall is lateness beyond :data:`THRESHOLD`, and only what is beyond it is taken off the clock.  So a loop
that is always a little late is judged as one that is not, a loop that polls once a second has a slow clock
instead of none, and however stalls come, the clock never goes back.

After a stall there is a grace in which what has queued up can be read before anybody is judged.  There is at
most one in :data:`GRACE_EVERY` seconds, so a loop that stalls all the time does not put off verdicts for
ever.  Each stall raises a score, and each :data:`CALM` seconds without one lower it: while it is up, answers
may take longer (the local health multiplier of Lifeguard: Dadgar, Phillips and Currey, 2018, who count missed
acknowledgements instead).

:class:`AwakeTimers` are :class:`~userspace.connection.timers.Timers` by that clock.  They know when the loop
was to come back, so they notice by themselves when it did not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final

from userspace.connection.timers import LATEST, Timers, checked_now

#: Seconds of lateness that are no stall: a collection of garbage, a busy second of another process.
THRESHOLD: Final = 0.25
#: Seconds (of the clock without stalls) in which nobody is judged after a stall: some ten turns of a loop
#: that has ten thousand datagrams to read.
GRACE: Final = 0.25
#: Seconds from the beginning of a grace to that of the next one at the earliest: they take a tenth of the
#: time at most, and put off no verdict twice.
GRACE_EVERY: Final = 2.5
#: The highest score (Lifeguard takes 8), and the seconds after which it falls by one.
SCORE_MOST: Final = 8
CALM: Final = 10.0
#: Seconds between two turns of the loop for timers: a tenth of the shortest time that is waited for here.
GRANULE: Final = 0.01


class LocalHealth:
    """Stalls of our own loop; see the module.  Attributes are for reading, seconds.

    Whoever calls keeps ``now`` from going backwards.
    """

    __slots__ = (
        "_counted",
        "_graced",
        "_ran_at",
        "calm_at",
        "grace_until",
        "score",
        "stalled",
        "stalled_at",
        "stalls",
    )

    def __init__(self) -> None:
        #: Stalls so far, and their seconds.
        self.stalls = 0
        self.stalled = 0.0
        #: When the last one was noticed, by the clock without stalls: what was asked before that may have
        #: been answered long before the answer was read.
        self.stalled_at = -math.inf
        #: Until when nobody is judged, by the same clock.
        self.grace_until = -math.inf
        self.score = 0
        #: When :meth:`calm` lowers the score, by the same clock.
        self.calm_at = math.inf
        self._counted = self._ran_at = -math.inf  # lateness up to here is counted; the last tick
        self._graced = -math.inf  # when the last grace began

    def awake(self, now: float) -> float:
        """Seconds of the clock that stands still during stalls."""
        return now - self.stalled

    @property
    def stretch(self) -> float:
        """1.0, or by how much longer answers may take while the score is up."""
        return 1.0 + self.score

    def on_tick(self, now: float, due: float) -> bool:
        """The loop runs, and meant to do so at ``due`` or earlier; whether that was a stall.

        An infinite ``due`` says that it meant nothing, NaN as well.
        """
        # No stall is longer than the time since the last tick.
        late = now - max(due, self._counted, self._ran_at - THRESHOLD) - THRESHOLD
        self._ran_at = now
        if not 0.0 < late < math.inf:
            return False
        self._counted = now
        self.stalls += 1
        self.stalled += late
        awake = now - self.stalled
        self.stalled_at = awake
        self.score = min(self.score + 1, SCORE_MOST)
        self.calm_at = awake + CALM
        if awake >= self._graced + GRACE_EVERY:
            self._graced = awake
            self.grace_until = awake + GRACE
        return True

    def calm(self, awake: float) -> None:
        """Lower the score by the time that has passed without a stall."""
        while awake >= self.calm_at:
            self.score -= 1
            self.calm_at = self.calm_at + CALM if self.score else math.inf

    def __repr__(self) -> str:
        return f"<LocalHealth: score {self.score}, {self.stalls} stalls of {self.stalled:.3f} s together>"


class AwakeTimers:
    """Deadlines by number, by the clock that stands still while the loop stalls; that is time ``at`` here.

    The loop is not woken twice within :data:`GRANULE`: thousands of deadlines are met by the handful.  Raises
    UsageError for what is no time.
    """

    __slots__ = ("_due", "_late_at", "_ran_at", "_timers", "latest", "local", "other")

    def __init__(self, now: float) -> None:
        #: The latest time that the caller has passed, by its own clock.
        self.latest = checked_now(now, -LATEST)
        self.local = LocalHealth()
        #: Another deadline, for which the loop is to come back as well.
        self.other = math.inf
        self._timers: Timers[int] = Timers()
        self._ran_at = -math.inf
        # By the caller's clock: when the loop is to come back, and from when on that is a stall.
        self._due = math.inf
        self._late_at = LATEST

    def clock(self, now: float) -> float:
        """The clock without stalls at any time of the caller's; one that goes backwards is the latest."""
        if not self.latest <= now <= self._late_at:
            self.latest = now = checked_now(now, self.latest)
            self.next_timeout()  # timers may have been put off since
            if now > self._late_at:
                self.local.on_tick(now, self._due)
                self.next_timeout()
        self.latest = now
        return now - self.local.stalled

    def on_tick(self, now: float, due: float) -> None:
        """The loop has run, and meant to at ``due`` at the latest: see LocalHealth."""
        before = self.latest
        self.clock(now)
        self.local.on_tick(self.latest, max(due, before - THRESHOLD))
        self.next_timeout()

    def next_timeout(self) -> float:
        """When the loop is to come back, by the caller's clock; infinite: never."""
        local = self.local
        at = max(min(self._timers.next(), self.other), self._ran_at + GRANULE, local.grace_until)
        due = at + local.stalled
        if due - local.stalled < at:  # by rounding, and the loop would come again and again
            due = math.nextafter(due, math.inf)
        self._due = due
        self._late_at = min(self._due + THRESHOLD, LATEST)
        return self._due

    def set(self, key: int, at: float) -> None:
        """Be due at that time, and no other; what is over is due now, and nobody is late for it."""
        earliest = self.latest - self.local.stalled
        at = max(at, earliest)
        self._timers.set(key, at)
        due = at + self.local.stalled
        if due < self._due:
            self._due = due
            self._late_at = due + THRESHOLD

    def cancel(self, key: int) -> None:
        """Never be due."""
        self._timers.cancel(key)

    def next(self) -> float:
        """The earliest of them; infinite when there are none."""
        return self._timers.next()

    def due(self, at: float) -> Iterator[int]:
        """Those whose time has come, as of Timers; the loop has done its duty for a while."""
        self._ran_at = at
        return self._timers.due(at)
