# SPDX-License-Identifier: Apache-2.0
"""Round-trip times of one connection: their mean, their peak, their percentiles, and what is usual.

    latency = Latency()
    latency.update(now, 0.042)               # seconds
    latency.smoothed, latency.deviation      # of the last eight or so
    latency.peak(now)                        # rises at once, falls back within some 10 s
    latency.percentile(0.99)                 # of the last hour or so
    latency.baseline                         # what this path usually takes
    latency.timeout()                        # so long an answer may take

The mean and its deviation are those of RFC 9002 (5.3).  The peak is Finagle's peak EWMA: one slow answer
makes a connection unattractive at once, and only time or better answers make up for it; a balancer that
compares peaks leaves a peer that stumbles before the mean has noticed.  Without samples the peak falls back
to the mean, not to zero: knowing nothing new of a peer makes it no faster.

The baseline follows what is measured down within a minute and up within ten.  So a queue that builds up
stands out against it for minutes, and a route that became longer is the usual one after a while.

Percentiles come from a histogram of fixed size on a logarithmic scale, four buckets to an octave: they are
right within 19 %.  When it holds :data:`HALVED_AT` samples, all counts are halved, so it forgets and never
grows.  A connection costs some 500 bytes, before the first sample 100.
"""

from __future__ import annotations

import math
from array import array
from typing import Final

import msgspec

from xdp.errors import UsageError

#: Seconds; samples are brought into this range, as in :mod:`userspace.flow.rtt`: less is a clock that stands
#: still, more is no path that carries a conversation.
LEAST: Final = 1e-6
MOST: Final = 60.0
#: Parts of the difference that a sample makes in mean and deviation (RFC 9002, 5.3).
SMOOTHING: Final = 1 / 8
DEVIATION: Final = 1 / 4
#: Deviations above the mean that an answer may take (RFC 9002, 6.2.1).
SPREAD: Final = 4.0
#: Seconds in which the peak falls by 1 - 1/e of what it is above the mean (Finagle's default decay time).
PEAK_DECAY: Final = 10.0
#: Seconds in which the baseline follows: down to what the path can do, up to what it has become.
BASELINE_FALL: Final = 60.0
BASELINE_RISE: Final = 600.0
#: Samples whose plain mean is the baseline of a new connection.
BASELINE_BEGINS: Final = 16
#: Samples in the histogram when it is halved: an hour and more of heartbeats, and still five in the last
#: hundredth after halving.
HALVED_AT: Final = 1024
#: Buckets to an octave, and the seconds at which the second bucket begins: a round trip over a cable.
_PER_OCTAVE: Final = 4
_FIRST: Final = 1e-5
_OFFSET: Final = 1 - math.log2(_FIRST) * _PER_OCTAVE
_BUCKETS: Final = 2 + int(math.log2(MOST / _FIRST) * _PER_OCTAVE)

_exp: Final = math.exp
_log2: Final = math.log2


class LatencySnapshot(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds; all 0 while there is no sample."""

    samples: int
    latest: float
    smoothed: float
    deviation: float
    peak: float
    baseline: float
    p50: float
    p90: float
    p99: float


class Latency:
    """Round-trip times of one connection; see the module.  Attributes are for reading, in seconds."""

    __slots__ = (
        "_counts", "_peak", "_total", "_turn", "_updated", "baseline", "deviation", "latest", "samples",
        "smoothed",
    )  # fmt: skip

    def __init__(self) -> None:
        #: Taken so far; what is below is 0.0 before the first.
        self.samples = 0
        self.latest = self.smoothed = self.deviation = self.baseline = self._peak = 0.0
        self._updated = 0.0
        self._counts: array[int] | None = None
        self._total = self._turn = 0  # samples in the histogram; how often it was halved

    def update(self, now: float, sample: float) -> float:
        """Take one and say what was taken: it is brought into the allowed range.

        ``now`` that goes backwards counts as no time.  Raises UsageError for a sample that is no number.
        """
        if not LEAST <= sample <= MOST:
            if sample != sample:  # noqa: PLR0124 -- NaN
                raise UsageError("a round-trip time is a number of seconds, not NaN")
            sample = MOST if sample > MOST else LEAST
        self.latest = sample
        samples = self.samples
        self.samples = samples + 1
        counts = self._counts
        if counts is None:
            counts = self._begin(now, sample)
        else:
            passed = now - self._updated
            if passed > 0.0:
                self._updated = now
            else:
                passed = 0.0
            if sample > self._peak:
                self._peak = sample
            else:
                self._peak = sample + (self._peak - sample) * _exp(-passed / PEAK_DECAY)
            difference = sample - self.smoothed
            self.deviation += ((difference if difference > 0.0 else -difference) - self.deviation) * DEVIATION
            self.smoothed += difference * SMOOTHING
            if samples < BASELINE_BEGINS:
                self.baseline += (sample - self.baseline) / (samples + 1)
            else:
                constant = BASELINE_RISE if sample > self.baseline else BASELINE_FALL
                self.baseline += (sample - self.baseline) * (passed / (passed + constant))
        counts[int(_log2(sample) * _PER_OCTAVE + _OFFSET) if sample > _FIRST else 0] += 1
        self._total += 1
        if self._total >= HALVED_AT:
            self._halve(counts)
        return sample

    def _begin(self, now: float, sample: float) -> array[int]:
        self._counts = counts = array("H", bytes(2 * _BUCKETS))
        self._updated = now
        self.smoothed = self.baseline = self._peak = sample
        self.deviation = sample / 2
        return counts

    def _halve(self, counts: array[int]) -> None:
        """Odd counts are rounded up and down by turns, or what is rare would all go, or never."""
        self._turn ^= 1
        for place, count in enumerate(counts):
            counts[place] = (count + self._turn) >> 1
        self._total = sum(counts)

    def peak(self, now: float) -> float:
        """Seconds: the highest of late, on its way back to the mean."""
        passed = now - self._updated
        if not passed > 0.0:
            return self._peak
        return self.smoothed + (self._peak - self.smoothed) * _exp(-passed / PEAK_DECAY)

    def timeout(self) -> float:
        """Seconds that an answer may take: the mean and four deviations; 0.0 without samples."""
        return self.smoothed + SPREAD * self.deviation

    def percentile(self, share: float) -> float:
        """Seconds within which that share (0 to 1) of the answers came; 0.0 without samples.

        Raises UsageError for what is no share.
        """
        if not 0.0 <= share <= 1.0:
            raise UsageError(f"a share is a number from 0 to 1, not {share!r}")
        counts = self._counts
        if counts is None:
            return 0.0
        wanted, place = share * self._total, 0
        while wanted > counts[place] or not counts[place]:
            wanted -= counts[place]
            place += 1
        if place == 0:
            return _FIRST
        # Within a bucket samples are taken to be spread evenly on the same scale.
        return float(min(2.0 ** ((place - _OFFSET + wanted / counts[place]) / _PER_OCTAVE), MOST))

    def snapshot(self, now: float) -> LatencySnapshot:
        """All of it, for people and JSON."""
        return LatencySnapshot(
            samples=self.samples,
            latest=self.latest,
            smoothed=self.smoothed,
            deviation=self.deviation,
            peak=self.peak(now),
            baseline=self.baseline,
            p50=self.percentile(0.5),
            p90=self.percentile(0.9),
            p99=self.percentile(0.99),
        )

    def __repr__(self) -> str:
        if not self.samples:
            return "<Latency: no sample yet>"
        return (
            f"<Latency: {self.smoothed * 1e3:.3f} ms, usually {self.baseline * 1e3:.3f} ms, "
            f"99 % within {self.percentile(0.99) * 1e3:.3f} ms>"
        )
