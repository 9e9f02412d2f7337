# SPDX-License-Identifier: Apache-2.0
"""How long to wait before the next attempt: exponential, with a cap and jitter.

    backoff = Backoff()                           # 5 attempts, 0.1 s, 0.2 s, 0.4 s, 0.8 s, 1.6 s
    at = now + backoff.delay(attempt, rng)        # attempts count from 1

Who lost their connections at the same moment would come back at the same moments, again and again, if all
waited as long: jitter spreads them.  The three kinds are those of Marc Brooker, "Exponential Backoff And
Jitter", AWS Architecture Blog, 2015:

``full``    from nothing to the whole delay; least work for the peer, and the default
``equal``   from one half of the delay to the whole of it: never at once
``none``    always the whole delay

After ``attempts`` in vain the peer is not there, and nobody knows for how long: from then on it is probed
every ``cap`` seconds, with jitter as before.  Nothing in here remembers anything: the same number and the
same random numbers give the same delay.
"""

from __future__ import annotations

import math
from enum import StrEnum
from typing import TYPE_CHECKING, Final

import msgspec

from xdp.errors import UsageError

if TYPE_CHECKING:
    from random import Random

#: Attempts before a peer is given up: with the delays below 3 s, and what the attempts themselves take.
ATTEMPTS: Final = 5
#: Seconds before the first attempt: some round trips, so that what is lost for a moment is soon back.
INITIAL: Final = 0.1
#: How much longer each delay is than the one before.
FACTOR: Final = 2.0
#: Seconds: the longest delay, and that between probes of who is given up.
CAP: Final = 30.0

#: Attempts: more are as good as for ever.
ATTEMPTS_MAXIMUM: Final = 1_000_000
#: Seconds: who comes back sooner is in a busy loop.
INITIAL_MINIMUM: Final = 0.001
#: A delay that grows faster is at its cap with the second attempt or third.
FACTOR_MAXIMUM: Final = 100.0
#: Seconds, a day: who waits longer for a peer has forgotten it.
CAP_MAXIMUM: Final = 86_400.0


class Jitter(StrEnum):
    """How much of a delay is left to chance."""

    FULL = "full"
    EQUAL = "equal"
    NONE = "none"


class Backoff(msgspec.Struct, frozen=True, kw_only=True):
    """When to try again; seconds.  Raises UsageError for values out of range."""

    attempts: int = ATTEMPTS
    initial: float = INITIAL
    factor: float = FACTOR
    cap: float = CAP
    jitter: Jitter = Jitter.FULL

    def __post_init__(self) -> None:
        if type(self.attempts) is not int or not 1 <= self.attempts <= ATTEMPTS_MAXIMUM:
            raise UsageError(
                f"attempts are a whole number from 1 to {ATTEMPTS_MAXIMUM}, not {self.attempts!r}",
                hint="a peer that is given up is probed all the same, every `cap` seconds",
            )
        check_number("initial delay", self.initial, INITIAL_MINIMUM, CAP_MAXIMUM, "seconds")
        check_number("factor", self.factor, 1.0, FACTOR_MAXIMUM)
        check_number("cap", self.cap, self.initial, CAP_MAXIMUM, "seconds, no less than the initial delay")
        if not isinstance(self.jitter, Jitter):
            raise UsageError(f"jitter is one of {', '.join(Jitter)}, not {self.jitter!r}")

    def longest(self, attempt: int) -> float:
        """Seconds before this attempt when nothing is left to chance; what is below 1 is taken as 1.

        Raises UsageError for what is no whole number.
        """
        if type(attempt) is not int:
            raise UsageError(f"the number of an attempt is a whole number, not {attempt!r}")
        if attempt > self.attempts:
            return self.cap
        steps = max(0, attempt - 1)
        if self.factor == 1.0:
            return self.initial
        # Where the power is no float any more the cap is long reached.
        if steps > math.log(self.cap / self.initial, self.factor):
            return self.cap
        return min(self.cap, self.initial * self.factor**steps)

    def delay(self, attempt: int, rng: Random) -> float:
        """Seconds to wait before this attempt."""
        longest = self.longest(attempt)
        if self.jitter is Jitter.NONE:
            return longest
        if self.jitter is Jitter.EQUAL:
            return longest / 2 + longest / 2 * rng.random()
        return longest * rng.random()


def check_number(name: str, value: object, least: float, most: float, unit: str = "") -> None:
    """Raises UsageError unless it is a number of that range; NaN is of none."""
    if not isinstance(value, (int, float)) or not least <= value <= most:
        unit = unit and f" {unit}"
        raise UsageError(f"{name}: {value!r}; allowed: {least:g} to {most:g}{unit}")
