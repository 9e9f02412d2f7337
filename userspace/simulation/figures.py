# SPDX-License-Identifier: Apache-2.0
"""Figures of merit of congestion control, from what a simulation has recorded.

All are functions of plain sequences.  Rates are in bytes/s or bytes a bin, times in seconds.  Which figures,
and over what time, follows RFC 7928 (queueing delay against goodput), RFC 8867 and RFC 9743 (fairness,
convergence, response to change).
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import Final

#: Seconds that an interval has, at least, in which the least delay is looked for: CoDel's interval
#: (RFC 8289, 4.3), which covers the bursts of a round trip on all but satellite links.
STANDING_INTERVAL: Final = 0.1
#: Seconds over which shares are compared for convergence: several round trips of all but satellite links.
WINDOW: Final = 1.0
#: Seconds that the shares have to stay so.
HOLD: Final = 3.0
#: Jain's index, or the share of the capacity when there is one flow, from which on they count as settled.
SETTLED: Final = 0.9


def jain(shares: Sequence[float]) -> float:
    """Jain's index of fairness: (sum x)^2 / (n * sum x^2); 1 for equal shares, 1/n when one has all.

    0 when nobody has anything.
    """
    squares = sum(share * share for share in shares)
    return sum(shares) ** 2 / (len(shares) * squares) if squares else 0.0


def percentile(ordered: Sequence[float], percent: float) -> float:
    """By nearest rank, of values in ascending order; 0.0 when there are none."""
    if not ordered:
        return 0.0
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def standing_queue(
    times: Sequence[float], delays: Sequence[float], begin: float, end: float, interval: float
) -> float:
    """The delay that the queue does not fall below, seconds.

    In each interval the least delay of a packet is found, and the median of these is told.  A queue that
    takes up a burst and empties again within the interval has none, as CoDel sees it (RFC 8289, 3.2).
    An interval in which no packet left counts as 0.
    """
    count = int((end - begin) / interval + 1e-9)
    least = [math.inf] * count
    for place in range(bisect_left(times, begin), bisect_right(times, end)):
        index = int((times[place] - begin) / interval)
        if index < count and delays[place] < least[index]:
            least[index] = delays[place]
    found = sorted(0.0 if value == math.inf else value for value in least)
    return percentile(found, 50)


def settled_at(
    flows: Sequence[Sequence[float]], capacity: Sequence[float], bin_seconds: float, begin: float
) -> float | None:
    """Seconds from ``begin`` until the flows have settled; None if they never do.

    ``flows`` has bytes a bin of each flow, ``capacity`` of the link.  Settled means: over WINDOW seconds the
    flows use nine tenths of what the link can carry and, if there are several, Jain's index of their
    shares is 0.9 or more; and that stays so for HOLD seconds.
    """
    width, hold = round(WINDOW / bin_seconds), round(HOLD / bin_seconds)
    first = math.ceil(begin / bin_seconds - 1e-9)
    good = 0
    for end in range(first + width, len(capacity) + 1):
        shares = [sum(flow[end - width : end]) for flow in flows]
        room = sum(capacity[end - width : end])
        fair = len(flows) == 1 or jain(shares) >= SETTLED
        good = good + 1 if fair and sum(shares) >= SETTLED * room > 0 else 0
        if good == hold:
            return max(0.0, (end - hold - width + 1) * bin_seconds - begin)
    return None


def fraction(part: float, whole: float) -> float:
    """Part of whole; 0.0 of nothing."""
    return part / whole if whole else 0.0
