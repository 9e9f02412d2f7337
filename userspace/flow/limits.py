# SPDX-License-Identifier: Apache-2.0
"""Bounds of what a controller believes, whatever the network says.

Acknowledgements are written by the other side, and a clock may stand still: a delivery rate can come out
infinite, a round-trip time as 0.  A model of the path that took such numbers would never recover.
"""

from __future__ import annotations

import math
from typing import Final

from xdp.errors import UsageError

#: Bytes/s: 8 Tb/s, an order above the fastest ports there are.
RATE_MAXIMUM: Final = 1e12
#: Bytes on their way: 10 Gb/s over a round trip of 860 ms.
WINDOW_MAXIMUM: Final = 1 << 30
#: Seconds: the granularity of timers in RFC 9002, 6.1.2, is 1 ms; a round trip in memory takes some µs.
RTT_MINIMUM: Final = 1e-6
#: Seconds: a path that takes longer is one that fails.
RTT_MAXIMUM: Final = 60.0
#: Bytes: the longest payload of UDP (RFC 768: a length of 16 bits, with 8 of header).
_MTU_MAXIMUM: Final = 65_527


def checked_mtu(mtu: object) -> int:
    """Bytes of a full packet; UsageError unless it is a whole number that UDP can carry."""
    if type(mtu) is not int or not 1 <= mtu <= _MTU_MAXIMUM:
        raise UsageError(f"mtu is a whole number of bytes from 1 to {_MTU_MAXIMUM}, not {mtu!r}")
    return mtu


def checked_now(now: object) -> float:
    """Seconds; UsageError unless it is a finite number."""
    if type(now) not in {int, float} or not math.isfinite(now):  # type: ignore[arg-type]
        raise UsageError(f"now is seconds of a monotonic clock, not {now!r}")
    return float(now)  # type: ignore[arg-type]


def believable_rate(rate: float) -> float:
    """Bytes/s, 0.0 when it is no rate that a path can have."""
    return rate if 0.0 < rate <= RATE_MAXIMUM else 0.0


def believable_rtt(rtt: float | None) -> float | None:
    """Seconds within the bounds, None when there is none or it is no duration."""
    if rtt is None or not 0.0 <= rtt <= RTT_MAXIMUM:
        return None
    return max(rtt, RTT_MINIMUM)
