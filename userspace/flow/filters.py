# SPDX-License-Identifier: Apache-2.0
"""The largest or least of the recent values of something that is measured all the time.

    rates = WindowedMax()
    best = rates.update(now, rate, 10.0)         # the largest of the last 10 s, with this one
    rates.value                                  # the same again; None before the first

"Now" is anything that only grows: seconds, or a count of round trips.  The window comes with every value,
since it may follow a round-trip time.

A value that is no better than one before it counts only once that one has left the window.  So a queue of
ever worse values is all that has to be kept, and one of them suffices for every sixteenth of the window:
memory has a limit, whatever comes.  What that costs: a value that comes less than a sixteenth of the window
after a better one may be forgotten, so the answer covers at least 15/16 of the window, never more than all.
"""

from __future__ import annotations

from typing import Final

#: Of a window: values that come closer than this after a better one are not kept.
_RESOLUTION: Final = 1 / 16
#: Values kept.  17 do for a window that stays the same; one that grows from update to update may need more.
_LIMIT: Final = 64


class WindowedMax:
    """The largest value of a window that ends now."""

    __slots__ = ("_best",)

    def __init__(self) -> None:
        #: (when, value): older first, larger first.  Short, so a list: an empty deque has 600 bytes.
        self._best: list[tuple[float, float]] = []

    @property
    def value(self) -> float | None:
        """As of the last update; None without any."""
        return self._best[0][1] if self._best else None

    def update(self, now: float, value: float, window: float) -> float:
        """Take one more; the largest of those that are not older than ``window`` (0 or more).

        ``now`` that goes back counts as the latest there was, a window that is no number as 0.  The value
        must be a number: NaN has no order, so the caller looks for it.
        """
        best = self._best
        if best:
            if now < (latest := best[-1][0]):
                now = latest
            while best and best[-1][1] <= value:
                best.pop()
            while best and not now - best[0][0] <= window:
                del best[0]
            if best and (now - best[-1][0] < window * _RESOLUTION or len(best) == _LIMIT):
                return best[0][1]
        best.append((now, value))
        return best[0][1]

    def clear(self) -> None:
        """Forget all."""
        self._best.clear()


class WindowedMin:
    """The least value of a window that ends now: as :class:`WindowedMax`, upside down."""

    __slots__ = ("_negative",)

    def __init__(self) -> None:
        self._negative = WindowedMax()

    @property
    def value(self) -> float | None:
        """As of the last update; None without any."""
        value = self._negative.value
        return None if value is None else -value

    def update(self, now: float, value: float, window: float) -> float:
        """Take one more; the least of those that are not older than ``window``."""
        return -self._negative.update(now, -value, window)

    def clear(self) -> None:
        """Forget all."""
        self._negative.clear()
