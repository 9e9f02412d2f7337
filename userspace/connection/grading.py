# SPDX-License-Identifier: Apache-2.0
"""How well a connection is, in one word, and why: healthy, degraded, unhealthy or dead.

    signs = Signs(unconfirmed=4)
    grade(Status.HEALTHY, signs)             # (DEGRADED, Cause.UNANSWERED, 4.0)

Every sign has a threshold that makes a connection worse and a lower one that keeps it so, as a thermostat
has; the worst sign decides.  Nobody becomes dead here: that takes evidence of its own
(:mod:`~userspace.connection.suspicion`).

A :class:`Change` is what the operator sees of it: when, from what to what, why, and the figure that did it.
"""

from __future__ import annotations

from enum import IntEnum, StrEnum
from typing import Final, NamedTuple

#: (degraded, unhealthy), for all that follow.
Pair = tuple[float, float]

#: Questions in a row without an answer.  Three are lost together by chance once in 125,000 at 2 % loss; six
#: are over half a second after the first of them was missed.
UNANSWERED: Final = (3.0, 6.0)
#: Part of the questions that was lost, both ways, or of what the caller sent.  From a tenth on people notice;
#: and what goes up and down by chance with the last 64 questions (3 % at 10 % loss) lies between the pairs.
LOSS: Final = (0.15, 0.40)
LOSS_LEAVE: Final = (0.05, 0.20)
#: How many times its baseline the round-trip time is ..
LATENCY: Final = (3.0, 6.0)
LATENCY_LEAVE: Final = (2.0, 4.0)
#: .. if it is above it by so many seconds as well: nobody minds a millisecond that was a tenth of one.
EXCESS: Final = (0.020, 0.200)
EXCESS_LEAVE: Final = (0.010, 0.100)
#: Reports of the network that nobody is there, without a sign of life between them: one may be old or forged,
#: and is asked about; one and a question without an answer, or two, are believed.
ERRORS: Final = 2


class Status(IntEnum):
    """How well a connection is; the greater the worse."""

    HEALTHY = 0
    DEGRADED = 1
    UNHEALTHY = 2
    DEAD = 3


class Cause(StrEnum):
    """Why a status changed; what the figure beside it is."""

    #: Questions in a row had no answer: how many.
    UNANSWERED = "unanswered"
    #: The same, though traffic of the peer arrives: ours does not reach it.
    ONE_WAY = "one_way"
    #: The same, but the kernel program of its host answers: the application is busy, or gone.
    BUSY = "busy"
    #: So much is lost, 0 to 1.
    LOSS = "loss"
    #: The round-trip time is so many times the usual one.
    LATENCY = "latency"
    #: Its host says that nobody listens (ICMP port unreachable): how often.
    REFUSED = "refused"
    #: A router or our own host says that there is no way (ICMP unreachable, ENETUNREACH): how often.
    UNREACHABLE = "unreachable"
    #: Silent for so many seconds, and asked often enough.
    SILENT = "silent"
    #: It was dead and was heard again, after so many seconds.
    ANSWERED = "answered"
    #: It has been better for so many seconds.
    CALM = "calm"


_WORDS: Final = {
    Cause.UNANSWERED: "{:.0f} questions in a row without an answer",
    Cause.ONE_WAY: "{:.0f} questions in a row without an answer, though it is heard",
    Cause.BUSY: "{:.0f} questions in a row without an answer, though its host answers",
    Cause.LOSS: "{:.0%} lost",
    Cause.LATENCY: "round trip {:.1f} times the usual one",
    Cause.REFUSED: "refused {:.0f} times",
    Cause.UNREACHABLE: "unreachable {:.0f} times",
    Cause.SILENT: "silent for {:.1f} s",
    Cause.ANSWERED: "heard again after {:.1f} s",
    Cause.CALM: "better for {:.1f} s",
}


class Change(NamedTuple):
    """A change of status: when (the caller's clock, seconds), from what to what, and why."""

    time: float
    before: Status
    after: Status
    cause: Cause
    figure: float

    @property
    def reason(self) -> str:
        """Why, in words."""
        return _WORDS[self.cause].format(self.figure)

    def __str__(self) -> str:
        return f"{self.time:.3f}: {self.before.name.lower()} -> {self.after.name.lower()}, {self.reason}"


class Signs(NamedTuple):
    """What is known of a connection."""

    #: Questions in a row without an answer.
    unconfirmed: int = 0
    #: The peer was heard since the first of them; its host has answered since.
    heard: bool = False
    host_answers: bool = False
    #: Part that is lost, 0 to 1.
    loss: float = 0.0
    #: Seconds; 0.0 for none.
    latency: float = 0.0
    baseline: float = 0.0
    #: Reports of the network since the last sign of life.
    errors: int = 0
    refused: bool = False


def _steps(value: float, enter: Pair, leave: Pair, current: Status) -> int:
    """0, 1 or 2: how many thresholds it exceeds; those that the status is at or above are the lower ones."""
    if value >= (leave[1] if current >= Status.UNHEALTHY else enter[1]):
        return 2
    return int(value >= (leave[0] if current >= Status.DEGRADED else enter[0]))


def grade(current: Status, signs: Signs) -> tuple[Status, Cause, float]:
    """What it should be by these signs, why, and the figure; HEALTHY has no cause that means anything."""
    unconfirmed = signs.unconfirmed
    worst = (unconfirmed >= UNANSWERED[0]) + (unconfirmed >= UNANSWERED[1])
    figure = float(unconfirmed)
    cause = Cause.BUSY if signs.host_answers else Cause.ONE_WAY if signs.heard else Cause.UNANSWERED
    if signs.errors and (signs.errors >= ERRORS or (unconfirmed and not signs.heard)):
        worst, figure = 2, float(signs.errors)
        cause = Cause.REFUSED if signs.refused else Cause.UNREACHABLE
    if worst < 2 and (found := _steps(signs.loss, LOSS, LOSS_LEAVE, current)) > worst:
        worst, cause, figure = found, Cause.LOSS, signs.loss
    if worst < 2 and (excess := signs.latency - signs.baseline) > 0.0:
        found = min(
            _steps(signs.latency / signs.baseline, LATENCY, LATENCY_LEAVE, current),
            _steps(excess, EXCESS, EXCESS_LEAVE, current),
        )
        if found > worst:
            worst, cause, figure = found, Cause.LATENCY, signs.latency / signs.baseline
    return Status(worst), cause, figure


def is_spotless(failures: int, loss: float, latency: float, baseline: float) -> bool:
    """Whether no sign is worth a look, as of nearly all connections nearly all the time."""
    return not failures and loss < LOSS[0] and (latency < LATENCY[0] * baseline or latency < EXCESS[0])
