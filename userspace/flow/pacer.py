# SPDX-License-Identifier: Apache-2.0
"""When packets may leave, so that they leave at a rate and not in bursts (RFC 9002, 7.7).

    pacer = Pacer(now, rate=1.25 * window / smoothed_rtt, burst=initial_window(mtu))
    at = pacer.release_time(now, size)
    if at <= now:
        ...                        # send it
        pacer.sent(now, size)
    else:
        ...                        # come back at that time

What leaves at once after a pause is at most ``burst`` bytes: the initial window, as the RFC wants it.
Two things that timers do are allowed for, and both are bounded by ``granularity`` (1 ms unless told
otherwise; 0 paces every packet by itself):

- A packet that is due within it leaves now.  So a timer rings once for all packets of a millisecond and not
  for each of them, and none waits for less than timers can tell.
- A timer that rings late by so much loses no rate: what should have left meanwhile leaves then.

Where two granularities of the rate and a packet are more than ``burst``, they are the burst: with less, such
timers could not reach the rate.

The arithmetic is that of :mod:`userspace.flow.bucket`: bytes that were lacking at one time, and a count of
what left since.  They may be more than the burst, by what left before its time.
"""

from __future__ import annotations

import math
from typing import Final

from userspace.flow.bucket import check_rate, check_time
from userspace.flow.congestion import MAX_DATAGRAM_SIZE
from xdp.errors import UsageError

#: Seconds: what event loops and epoll can tell apart, and RFC 9002's kGranularity.
GRANULARITY: Final = 0.001

#: Bytes: what burst_allowed tells when nothing is paced.
UNLIMITED: Final = 1 << 62

_NEVER: Final = math.inf


class Pacer:
    """Release times at ``rate`` bytes/s with bursts of ``burst`` bytes; ``granularity`` in seconds.

    ``mtu`` is the bytes of a full packet: what must have come in when a timer rings, before it is late.

    A rate of 0 lets nothing leave but the burst, an infinite one does not pace.  At first a whole burst may
    leave.  Raises UsageError for values out of range.
    """

    __slots__ = (
        "_burst",
        "_depth",
        "full_at",
        "granularity",
        "mtu",
        "per_byte",
        "rate",
        "since",
        "spare",
        "used",
    )

    def __init__(
        self,
        now: float,
        rate: float,
        burst: float,
        *,
        mtu: int = MAX_DATAGRAM_SIZE,
        granularity: float = GRANULARITY,
    ) -> None:
        check_rate(now, rate, burst)
        if not 0 <= granularity <= 1:
            raise UsageError(f"granularity is seconds from 0 to 1, not {granularity!r}")
        if not mtu >= 1:
            raise UsageError(f"a full packet has bytes, 1 or more, not {mtu!r}")
        self.mtu: Final = mtu
        #: Seconds by which a packet may leave before its time.
        self.granularity: Final = granularity
        self._set(rate, burst)
        #: Bytes that the burst lacked at a time: what left when it was whole and after that.
        self.since, self.used = now, 0.0
        self._look_ahead()

    def _set(self, rate: float, burst: float) -> None:
        #: Bytes/s.
        self.rate = float(rate)
        self._burst = burst
        #: Seconds; infinite also when the rate is next to nothing.
        self.per_byte = 1 / rate if rate else _NEVER
        if rate == _NEVER or not self.granularity:
            self._depth = burst
        else:
            # What leaves ahead of its time is part of the burst, not on top of it.
            ahead = rate * self.granularity
            self._depth = max(burst - ahead, ahead + self.mtu)
        #: Bytes that the burst may lack when a full packet is due.
        self.spare = self._depth - float(min(self._depth, self.mtu))

    def _look_ahead(self) -> None:
        #: When a full packet is due; NaN where only :meth:`release_time` can tell.
        self.full_at = self.since + (self.used - self.spare) * self.per_byte

    @property
    def burst(self) -> float:
        """Bytes, as they were given."""
        return self._burst

    def release_time(self, now: float, size: int) -> float:
        """The earliest time at which so many bytes may leave; ``now`` when that is now, infinite for never.

        A packet longer than the burst leaves when the burst is whole.  Sizes and times are not checked.
        """
        least = self._depth
        if size < least:  # noqa: PLR1730 - min() would cost as much as all else here
            least = size
        at = self.since + (least - self._depth + self.used) * self.per_byte
        return at if at > now + self.granularity else now

    def sent(self, now: float, size: int) -> None:
        """So many bytes have left, also if it was not their time (probes): then later ones wait for it.

        Raises UsageError for a negative size and a time that is none.
        """
        if not size >= 0:
            raise UsageError(f"a size is bytes, 0 or more, not {size!r}")
        if (now - self.since) * self.rate < self.used:
            self.used += size
        else:
            check_time(now)  # here it is kept
            self.since = now
            self.used = float(size)
        self._look_ahead()

    def burst_allowed(self, now: float) -> int:
        """Bytes that may leave now, all together; UNLIMITED when nothing is paced.

        A packet longer than this may leave all the same, when release_time says so.
        """
        check_time(now)
        if self.rate == _NEVER:
            return UNLIMITED
        allowed = math.floor(max(0.0, min(self._level(now) + self.rate * self.granularity, UNLIMITED)))
        if allowed and self.release_time(now, allowed) > now:  # rounded up, by what the time can't tell
            unsure = 2 * math.ulp(abs(now) + self.granularity) * self.rate
            allowed = max(0, allowed - 1 - math.ceil(unsure))
        return allowed

    def _level(self, now: float) -> float:
        """Bytes, at most the depth; negative: what left ahead of its time."""
        if self.rate == _NEVER:
            return self._depth
        return min(self._depth, self._depth + (now - self.since) * self.rate - self.used)

    def set_rate(self, now: float, rate: float, burst: float) -> None:
        """Another rate (bytes/s) and burst (bytes) from now on.

        What may leave at once stays as it is, as far as it fits.  What left ahead of its time stays ahead by
        the same time, not by the same bytes, and by no more than a burst: after a fall from 1 Gbit/s to
        100 kbit/s the bytes of a millisecond would be ten seconds.  Raises UsageError for values out of
        range.
        """
        if rate == self.rate and burst == self._burst:
            return
        check_rate(now, rate, burst)
        now = max(now, self.since)  # what came in until then is in the level already
        level = self._level(now)
        before = self.rate
        self._set(rate, burst)
        if level < 0:
            level = max(level * (rate / before), -self._depth) if before > 0 and rate < _NEVER else 0.0
        self.since = now
        self.used = max(0.0, self._depth - level)
        self._look_ahead()

    def __repr__(self) -> str:
        return f"<Pacer {self.rate:g} bytes/s, burst {self._burst:g}>"
