# SPDX-License-Identifier: Apache-2.0
"""Round-trip time of one path, as RFC 9002 (section 5) estimates it, and the two periods made of it.

    rtt = RttEstimator()
    rtt.update(now, sample=0.042, ack_delay=0.003)
    rtt.smoothed, rtt.variance, rtt.minimum, rtt.latest
    rtt.pto()           # how long to wait for an acknowledgement before a probe (6.2)
    rtt.loss_delay()    # how much longer than a later packet one may take before it counts as lost (6.1.2)

All are seconds.  The acknowledger's delay is subtracted as it told, but never below the minimum, so that a
peer that lies about it cannot make the path look shorter than it ever was.

The minimum is that of the last ``minimum_window`` seconds (between half of that and all of it: two values
are kept, not the samples).  So a route that became longer is believed after a while; with None it never is.
"""

# ruff: noqa: FURB136, PLR1730 -- min and max are calls, which cost more than all else of a sample

from __future__ import annotations

import math
from typing import Final

from xdp.errors import UsageError

#: Seconds that timers can tell apart (RFC 9002, 6.1.2: kGranularity).
GRANULARITY: Final = 0.001
#: Before the first sample (RFC 9002, 6.2.2: kInitialRtt).
INITIAL_RTT: Final = 0.333
#: What RFC 9000 (18.2) takes when a peer says nothing.
MAX_ACK_DELAY: Final = 0.025
#: Part of the longer of latest and smoothed (RFC 9002, 6.1.2: kTimeThreshold).
TIME_THRESHOLD: Final = 9 / 8
#: Samples are brought into this range: time that stands still must not make a rate infinite, and a
#: minute is more than any path takes that still carries a conversation.
LEAST_RTT: Final = 1e-6
MOST_RTT: Final = 60.0
#: Routes change within minutes; shorter windows would take a standing queue for the path.
MINIMUM_WINDOW: Final = 300.0


def checked_seconds(name: str, value: object, least: float, most: float) -> float:
    """The value as a float; UsageError outside of the range (which NaN is)."""
    if type(value) not in {int, float} or not least <= value <= most:  # type: ignore[operator]
        raise UsageError(f"{name} is seconds from {least:g} to {most:g}, not {value!r}")
    return float(value)  # type: ignore[arg-type]


class RttEstimator:
    """Latest, smoothed and least round-trip time and their variance; before any sample, RFC 9002's guess.

    Raises UsageError for a setting out of range.  Samples and delays may be any number at all.
    """

    __slots__ = (
        "_half", "_recent", "_turn_at", "first_sample_at", "latest", "max_ack_delay", "minimum", "smoothed",
        "variance",
    )  # fmt: skip

    def __init__(
        self,
        *,
        initial: float = INITIAL_RTT,
        max_ack_delay: float = MAX_ACK_DELAY,
        minimum_window: float | None = MINIMUM_WINDOW,
    ) -> None:
        #: What the peer promised not to exceed, seconds.
        self.max_ack_delay = checked_seconds("max_ack_delay", max_ack_delay, 0.0, MOST_RTT)
        self.latest = 0.0
        self.smoothed = checked_seconds("initial", initial, LEAST_RTT, MOST_RTT)
        self.variance = self.smoothed / 2
        #: 0.0 before the first sample.
        self.minimum = 0.0
        #: Infinite before it.
        self.first_sample_at = math.inf
        self._half = math.inf
        if minimum_window is not None:
            self._half = checked_seconds("minimum_window", minimum_window, GRANULARITY, 1e9) / 2
        self._recent = MOST_RTT  # least of the samples since the last turn
        self._turn_at = -math.inf  # the first sample turns it as well

    def update(self, now: float, sample: float, ack_delay: float = 0.0) -> float:
        """Take a sample (RFC 9002, 5.3) and say what was taken: it is brought into the allowed range."""
        if not LEAST_RTT <= sample <= MOST_RTT:
            sample = MOST_RTT if sample > MOST_RTT else LEAST_RTT
        self.latest = sample
        if now >= self._turn_at and self._turned(now, sample):
            return sample
        if sample < self._recent:
            self._recent = sample
            if sample < self.minimum:
                self.minimum = sample
        taken = sample
        if ack_delay > 0.0:  # false for NaN
            if ack_delay > self.max_ack_delay:
                ack_delay = self.max_ack_delay
            if sample >= self.minimum + ack_delay:
                sample -= ack_delay
        smoothed = self.smoothed
        difference = smoothed - sample
        self.variance += ((difference if difference >= 0.0 else -difference) - self.variance) * 0.25
        self.smoothed = smoothed - difference * 0.125
        return taken

    def _turned(self, now: float, sample: float) -> bool:
        """Half a window is over: what was least before it counts no more.  True for the first sample."""
        self._turn_at = now + self._half
        if self.minimum == 0.0:
            self.minimum = self.smoothed = self._recent = sample
            self.variance = sample / 2
            self.first_sample_at = now
            return True
        self.minimum = self._recent if self._recent < sample else sample
        self._recent = sample
        return False

    def restart_minimum(self, now: float) -> None:
        """Believe the latest sample: after persistent congestion it may be another path (RFC 9002, 5.2)."""
        if self.minimum:
            self.minimum = self._recent = self.latest
            self._turn_at = now + self._half

    def pto(self) -> float:
        """Seconds without an acknowledgement until a probe, without backoff (RFC 9002, 6.2.1)."""
        spread = 4.0 * self.variance
        return self.smoothed + (spread if spread > GRANULARITY else GRANULARITY) + self.max_ack_delay

    def loss_delay(self, threshold: float = TIME_THRESHOLD) -> float:
        """Seconds after its sending when an overtaken packet counts as lost (RFC 9002, 6.1.2)."""
        longer = self.latest if self.latest > self.smoothed else self.smoothed
        delay = threshold * longer
        return delay if delay > GRANULARITY else GRANULARITY

    def __repr__(self) -> str:
        if not self.minimum:
            return "<RttEstimator: no sample yet>"
        return (
            f"<RttEstimator: smoothed {self.smoothed * 1e3:.3f} ms, least {self.minimum * 1e3:.3f} ms, "
            f"variance {self.variance * 1e3:.3f} ms>"
        )
