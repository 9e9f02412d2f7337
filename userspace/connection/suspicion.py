# SPDX-License-Identifier: Apache-2.0
"""How suspicious a silence is, and how many unanswered questions prove that nobody is there.

Two things that are easily mixed up:

- **Silence** is the time since the peer was heard last.  A peer that has nothing to say is silent and well.
  :class:`PhiAccrual` tells how unusual a silence is for this peer (Hayashibara, Défago, Yared and Katayama:
  The φ Accrual Failure Detector, 2004).  φ of 1 says: one in ten silences of a live peer is longer; φ of 8:
  one in a hundred million.  Here it proves nothing; it says when to ask.
- **Questions without an answer** are evidence.  :func:`questions_needed` says how many of them a verdict
  takes when each is lost with a given probability although the peer lives.

    phi = PhiAccrual(5.0)                    # expect a sign of life every 5 s
    phi.observe(0.21)                        # seconds between two of them
    phi.phi(1.5)                             # of a silence of 1.5 s
    phi.silence(deviations(8.0))             # seconds until φ is 8
    questions_needed(0.02)                   # 14

Mean and deviation are smoothed, so a peer costs three numbers, not a window of a thousand samples as in the
paper.  The deviation has a floor, or a peer as punctual as a clock would be suspected for a millisecond.
"""

from __future__ import annotations

import math
from typing import Final

from xdp.errors import UsageError

#: Part of the difference that an interval makes: mean and deviation of the last thirty or so.
WEIGHT: Final = 1 / 16
#: Floor of the deviation, seconds: the timers and queues of two hosts differ by tens of milliseconds under
#: load.  With φ of 8 (5.6 deviations) nobody is asked before more than half a second of silence.
DEVIATION_LEAST: Final = 0.1
#: Seconds: longer intervals are pauses or outages, and would make the peer look as if it had always been so.
INTERVAL_MOST: Final = 60.0
#: Deviations; φ of that is 2e11, and its square is still far from the end of the floats.
_DEVIATIONS_MOST: Final = 1e6
#: Deviations from which the asymptotic series takes over: its first three terms are exact to 1e-8 here, and
#: erfc() is no normal float any more from 37 on.
_SERIES: Final = 30.0
_LN10: Final = math.log(10.0)
_SQRT2: Final = math.sqrt(2.0)
_HALF_LN_TAU: Final = math.log(math.tau) / 2

#: Loss of questions or answers, together, up to which no live peer may be declared dead.
LOSS_MOST: Final = 0.6
#: Loss that is assumed at least, whatever was measured: a path may have got worse this very moment.
LOSS_LEAST: Final = 0.1
#: So many questions in a row without an answer at that loss: 0.6**60 = 4.9e-14.  A peer is asked at most
#: 900,000 times in 1,000 hours (every 4 s or more), so one of them dies by mistake with a probability of
#: 4.4e-8, and one of ten thousand peers with 4.4e-4.  At 70 % loss and the 68 questions that it gets in the
#: least time that a verdict takes, 0.7**68 = 2.9e-11: 2.6e-5 a peer; at 80 %, where 0.8**68 = 2.6e-7, one in
#: five peers is declared dead once in 1,000 hours.
QUESTIONS: Final = 60
#: The same evidence in nats, 30.6: the sum over all questions of -ln(loss).
EVIDENCE: Final = -QUESTIONS * math.log(LOSS_MOST)


def questions_needed(loss: float) -> int:
    """Unanswered questions in a row that prove a peer dead when so much is lost (0 to 1).

    From 14 to :data:`QUESTIONS`: what was measured is believed within LOSS_LEAST and LOSS_MOST only, and
    what is no number counts as the worst.
    """
    if not loss < LOSS_MOST:
        return QUESTIONS
    return math.ceil(EVIDENCE / -math.log(max(loss, LOSS_LEAST)) - 1e-9)


def phi_of(deviations: float) -> float:
    """-log10 of the probability that a normal variable exceeds its mean by so many deviations.

    Finite for any number; what is more than a million deviations counts as a million.  UsageError for NaN.
    """
    if deviations <= _SERIES:
        return -math.log10(0.5 * math.erfc(deviations / _SQRT2)) + 0.0  # no -0.0 far below the mean
    if not deviations <= _DEVIATIONS_MOST:
        if deviations != deviations:  # noqa: PLR0124 -- NaN
            raise UsageError("a silence is a number of seconds, not NaN")
        deviations = _DEVIATIONS_MOST
    # Abramowitz and Stegun, 26.2.12.
    square = deviations * deviations
    rest = math.log1p((-1.0 + 3.0 / square) / square)
    return (square / 2 + math.log(deviations) + _HALF_LN_TAU - rest) / _LN10


def deviations(phi: float) -> float:
    """How many deviations above the mean φ is so much: the inverse of :func:`phi_of`, by bisection.

    Raises UsageError for what is not above 0.3, φ of the mean, or above 1e6.
    """
    if not phi_of(0.0) < phi <= 1e6:
        raise UsageError(f"a threshold of φ is a number from 0.302 to 1e6, not {phi!r}")
    low, high = 0.0, 4096.0
    for _ in range(64):
        middle = (low + high) / 2
        if phi_of(middle) < phi:
            low = middle
        else:
            high = middle
    return high


class PhiAccrual:
    """φ of the silence of one peer.  ``expected``: seconds between signs of life, before any was seen.

    Raises UsageError for what is no duration.
    """

    __slots__ = ("_variance", "mean")

    def __init__(self, expected: float) -> None:
        if not 0.0 < expected <= INTERVAL_MOST:
            raise UsageError(f"expected is seconds, more than 0 up to {INTERVAL_MOST:g}, not {expected!r}")
        #: Seconds between signs of life.
        self.mean = expected
        self._variance = (expected / 4) ** 2

    @property
    def deviation(self) -> float:
        """Seconds, not below the floor."""
        return math.sqrt(max(self._variance, DEVIATION_LEAST * DEVIATION_LEAST))

    def observe(self, interval: float) -> None:
        """So many seconds lay between two signs of life.

        Negative ones count as 0, and those over a minute as a minute.  Raises UsageError for NaN.
        """
        if not 0.0 <= interval <= INTERVAL_MOST:
            if interval != interval:  # noqa: PLR0124 -- NaN
                raise UsageError("an interval is a number of seconds, not NaN")
            interval = INTERVAL_MOST if interval > 0.0 else 0.0
        difference = interval - self.mean
        step = WEIGHT * difference
        self.mean += step
        # West 1979: the variance about the mean that has just moved.
        self._variance = (1.0 - WEIGHT) * (self._variance + difference * step)

    def phi(self, silence: float) -> float:
        """How suspicious a silence of so many seconds is: 0 not at all, 8 very much; never infinite."""
        return phi_of((silence - self.mean) / self.deviation)

    def silence(self, deviations: float) -> float:
        """Seconds of silence that are so many deviations above the mean."""
        return self.mean + deviations * self.deviation

    def __repr__(self) -> str:
        return f"<PhiAccrual: every {self.mean:.3f} s, deviation {self.deviation:.3f} s>"
