# SPDX-License-Identifier: Apache-2.0
"""A token bucket: at most ``burst`` at once, ``rate`` a second in the long run.

    bucket = TokenBucket(now, rate=100_000, burst=15_000)
    if bucket.take(now, len(packet)):
        ...                                    # conforms
    else:
        wake_at = bucket.time_until(now, len(packet))

Tokens are what the caller counts: bytes, packets, requests.  The bucket is full at the beginning.

It works as the virtual scheduling form of the generic cell rate algorithm does (ITU-T I.371, annex A): what
is kept is no level that every call refills, but a level at one time and what was taken since then.  A level
that is refilled by every call is rounded by every call, and with a million calls a second that adds up.
Here whole numbers are added exactly, and the one rounding of what came in since (2**-53 of it) is not
carried over to the next call.  So it does not matter how many calls there were, nor when.

Time that stands still refills nothing.  Time that goes backwards takes away what has come in since, and
gives it back once when it goes on: nothing is minted.
"""

from __future__ import annotations

import math
from typing import Final

from xdp.errors import UsageError

_NEVER: Final = math.inf
#: Seconds.  More is no time of any clock, and less keeps differences of times finite.
_TIME_MAXIMUM: Final = 1e15
#: Tokens: up to here each whole number is a float.
_BURST_MAXIMUM: Final = 1 << 53


def check_time(now: float) -> None:
    """UsageError for what can be no time of a clock, in seconds."""
    if not -_TIME_MAXIMUM <= now <= _TIME_MAXIMUM:
        raise UsageError(f"a time is a number of seconds, at most {_TIME_MAXIMUM:g}, not {now!r}")


def check_rate(now: float, rate: float, burst: float) -> None:
    """UsageError for what can be no rate (units a second) or burst (units) from a time on."""
    check_time(now)
    if not rate >= 0:
        raise UsageError(f"a rate is 0 or more a second, not {rate!r}")
    if not 0 <= burst <= _BURST_MAXIMUM:
        raise UsageError(f"a burst is 0 or more, at most 2**53, not {burst!r}")


class TokenBucket:
    """A bucket of ``burst`` tokens that gets ``rate`` tokens a second; seconds, tokens per second, tokens.

    A rate of 0 never refills, an infinite one lets everything through.  Raises UsageError for values out of
    range.
    """

    __slots__ = ("_burst", "_rate", "_since", "_start", "_used")

    def __init__(self, now: float, rate: float, burst: float) -> None:
        check_rate(now, rate, burst)
        self._rate = rate
        self._burst = burst
        self._since = now
        self._start = burst  # the level at that time
        self._used: float = 0  # tokens taken since then; an int as long as the amounts are

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self._rate

    @property
    def burst(self) -> float:
        """Tokens that fit."""
        return self._burst

    def take(self, now: float, amount: float) -> bool:
        """Take so many tokens if they are there; else none.

        More than ``burst`` are never there, at a finite rate.  Raises UsageError for a negative amount, and
        for a time that is none.
        """
        if not amount >= 0:
            raise UsageError(f"an amount of tokens is 0 or more, not {amount!r}")
        level = self._start + (now - self._since) * self._rate - self._used
        if not level < self._burst:  # full: here a new count begins, so no error outlives a busy period
            if not level < _NEVER:
                return self._take_unusual(now, amount)
            self._since = now
            self._start = level = self._burst
            self._used = 0
        if amount <= level:
            self._used += amount
            return True
        return False

    def _take_unusual(self, now: float, amount: float) -> bool:
        """At an infinite rate, or one at which more came in than a float can tell."""
        check_time(now)
        if self._rate == _NEVER:
            return True
        self._since, self._start, self._used = now, self._burst, 0
        return self.take(now, amount)

    def level(self, now: float) -> float:
        """Tokens that are there, from 0 to ``burst``."""
        check_time(now)
        return max(0.0, self._level(now))

    def _level(self, now: float) -> float:
        """Negative when more was taken at a later time."""
        if self._rate == _NEVER:
            return self._burst
        return min(self._burst, self._start + (now - self._since) * self._rate - self._used)

    def time_until(self, now: float, amount: float) -> float:
        """When so many tokens are there if nobody takes any: now at the earliest, infinite for never.

        ``take`` succeeds at that time, however it is rounded.  Raises UsageError as ``take`` does.
        """
        check_time(now)
        if not amount >= 0:
            raise UsageError(f"an amount of tokens is 0 or more, not {amount!r}")
        if self._rate == _NEVER or amount <= self._level(now):
            return now
        if amount > self._burst or self._rate == 0:
            return _NEVER
        at = self._since + (amount + self._used - self._start) / self._rate
        # Rounded it may be too early by a moment, and a caller who came then would have to come again.
        step = math.ulp(at)
        while at < _NEVER and amount > self._level(at):
            at += step
            step *= 2
        return max(now, at)

    def set_rate(self, now: float, rate: float, burst: float) -> None:
        """Another rate and burst from now on; the tokens that are there stay, as far as they fit.

        A larger burst fills at the new rate, so changing it to and fro mints nothing.  Raises UsageError
        for values out of range.
        """
        check_rate(now, rate, burst)
        now = max(now, self._since)  # what came in until then is in the level already
        self._start = min(burst, self._level(now))
        self._since = now
        self._used = 0
        self._rate, self._burst = rate, burst

    def __repr__(self) -> str:
        return f"<TokenBucket {self._rate:g}/s, burst {self._burst:g}>"
