# SPDX-License-Identifier: Apache-2.0
"""What is known of the health of one connection, and what follows from it.

Used by :mod:`~userspace.connection.health` alone, which knows when to ask and whom.  All times are those of
the clock without stalls (:mod:`~userspace.connection.stalls`).
"""

from __future__ import annotations

import math
from enum import IntEnum
from typing import Final

from userspace.connection.grading import Cause, Change, Signs, Status, grade, is_spotless
from userspace.connection.health_report import PATIENCE_LEAST, PATIENCE_MOST, ConnectionHealth, HealthSettings
from userspace.connection.latency import Latency
from userspace.connection.questions import LossRate, Questions
from userspace.connection.suspicion import PhiAccrual, questions_needed

#: Seconds between signs of life that are looked at: what comes faster is not worth the arithmetic.
RESOLUTION: Final = 0.1
#: Outcomes that the loss of questions is of: four minutes of heartbeats, seconds of probes; and those that
#: are assumed at least: one loss keeps nobody degraded, five degrade.
LOSS_WINDOW: Final = 64
LOSS_COUNTED: Final = 32.0
#: The same for what the caller sent.
TRAFFIC_WINDOW: Final = 1024
TRAFFIC_COUNTED: Final = 64.0
#: More failures in a row than that are an outage, and say nothing of the loss before and after.  At 60 % loss
#: one run in sixty is so long, so the rate comes out as 57 %.
OUTAGE: Final = 8
#: Seconds between questions to a busy application, and for which an answer of its host says that it is one.
BUSY_PACE: Final = 0.5
BUSY_FRESH: Final = 1.0
#: Changes that are kept.
HISTORY: Final = 8

_NEVER: Final = math.inf

#: A status to change to, why, and the figure.
Verdict = tuple[Status, Cause, float]


class Phase(IntEnum):
    """What is done for a connection."""

    #: It is asked when its time comes.
    QUIET = 0
    #: It was asked, and may take some time to answer.
    ASKED = 1
    #: It did not answer, and is asked often.
    SUSPECT = 2
    #: It is dead, and asked now and then.
    GONE = 3


class Record(Questions):
    """One connection."""

    __slots__ = (
        "asked_at", "calm_since", "confirm_at", "confirmed", "down_at", "errors", "failures", "heard",
        "history", "host_heard", "latency", "loss", "phase", "phi", "probe_at", "refused", "sampled", "since",
        "status", "traffic", "unanswered", "unconfirmed", "wait",
    )  # fmt: skip

    def __init__(self, first: int, at: float, interval: float, wait: float, confirm_at: float) -> None:
        super().__init__(first)
        self.status = Status.HEALTHY
        self.phase = Phase.QUIET
        #: When the status changed, and since when it ought to be a better one.
        self.since = at
        self.calm_since = _NEVER
        self.history: tuple[Change, ...] = ()
        #: Signs of life: the last one, the last one that was looked at, the last answer, that of its host.
        self.heard = self.sampled = self.confirmed = at
        self.host_heard = -_NEVER
        #: Since when its link is down; None: it is up.
        self.down_at: float | None = None
        self.phi = PhiAccrual(interval)
        #: So long after it was heard it is asked, and at that time at the latest.
        self.wait = wait
        self.confirm_at = confirm_at
        #: When it was asked last, and when the next question is due while it is suspect.
        self.asked_at = self.probe_at = -_NEVER
        #: Questions in a row that failed: since it was heard, since it or its host was, since an answer.
        self.failures = self.unanswered = self.unconfirmed = 0
        #: Reports of the network since it was heard; what the last one said.
        self.errors = 0
        self.refused = False
        self.latency = Latency()
        self.loss = LossRate(LOSS_WINDOW)
        self.traffic: LossRate | None = None

    # --- signs of life

    def sample(self, at: float) -> None:
        """It is heard after some time: how often is that?"""
        if self.phase != Phase.GONE:
            self.phi.observe(at - self.sampled)
        self.sampled = at

    def confirm(self, at: float, confirm_at: float) -> None:
        """It answers."""
        self.confirmed = at
        self.unconfirmed = 0
        self.confirm_at = confirm_at

    def alive(self, everyone: LossRate) -> None:
        """It is heard, so what failed was lost on the way; unless it was dead or cut off, that is no loss."""
        if self.failures and self.phase != Phase.GONE:
            everyone.add(0, self.failures)
            if max(self.failures, self.unconfirmed) <= OUTAGE:
                self.loss.add(0, self.failures)
        self.failures = self.unanswered = self.errors = 0

    def forgive(self, at: float) -> int:
        """The time without a link does not count.  Nor does what was open: how many questions that was."""
        since, self.down_at = self.down_at, None
        assert since is not None
        self.heard += at - max(since, self.heard)
        self.sampled += at - max(since, self.sampled)
        self.confirmed += at - max(since, self.confirmed)
        if self.host_heard > -_NEVER:
            self.host_heard += at - max(since, self.host_heard)
        return self.withdraw()

    def reported(self) -> LossRate:
        """Of what the caller sends."""
        if self.traffic is None:
            self.traffic = LossRate(TRAFFIC_WINDOW)
        return self.traffic

    # --- questions

    def ask_at(self, unusual: float) -> float:
        """When it is to be asked if nothing is heard; ``unusual`` are deviations of its silence."""
        return min(self.heard + min(self.wait, self.phi.silence(unusual)), self.confirm_at)

    def pace(self, at: float, usual: float) -> float:
        """Seconds between questions while it is suspect."""
        return max(usual, BUSY_PACE) if at - self.host_heard < BUSY_FRESH else usual

    def patience(self, stretch: float) -> float:
        """Seconds that it has for an answer; ``stretch`` times as long as usual."""
        latency = self.latency
        if not latency.samples:
            return PATIENCE_MOST
        return min(max(latency.timeout() * stretch, PATIENCE_LEAST), PATIENCE_MOST)

    def settle(self, at: float, stretch: float, everyone: LossRate) -> int:
        """Questions that have been open for too long have failed; how many."""
        if not self.waiting:
            return 0
        expired = self.expire(at - self.patience(stretch))
        for asked in expired:
            if asked > self.confirmed:
                self.unconfirmed += 1
            if asked <= self.heard:
                everyone.add(0, 1)
                if self.unconfirmed <= OUTAGE:
                    self.loss.add(0, 1)
            else:
                self.failures += 1
                if asked > self.host_heard:
                    self.unanswered += 1
        return len(expired)

    def loss_rate(self) -> float:
        """The part that is lost of questions, or of traffic if that is more, 0 to 1."""
        rate = self.loss.rate(LOSS_COUNTED)
        return rate if self.traffic is None else max(rate, self.traffic.rate(TRAFFIC_COUNTED))

    def needed(self, everyone: LossRate) -> int:
        """Questions in a row without an answer that prove it dead, as things are with it and with all."""
        bound = max(self.loss.bound(), everyone.bound())
        return questions_needed(bound if self.traffic is None else max(bound, self.traffic.bound()))

    # --- verdicts

    def death(self, at: float, settings: HealthSettings, everyone: LossRate) -> Verdict | None:
        """Whether a suspect is dead: silent for long enough, and enough questions without an answer."""
        silence = at - self.heard
        if silence < settings.dead_after or self.failures < (needed := self.needed(everyone)):
            return None
        if at - self.host_heard >= settings.dead_after and self.unanswered >= needed:
            return Status.DEAD, Cause.SILENT, silence
        if silence >= settings.busy_after:
            return Status.DEAD, Cause.BUSY, float(self.failures)
        return None

    def change(self, at: float, dwell: float, well: bool) -> Verdict | None:
        """What else it should become; ``well`` says that our own loop is, so that latency means something.

        Worse it becomes at once, better by one step and after having been better for some time.
        """
        if self.phase == Phase.SUSPECT and self.status >= Status.UNHEALTHY:
            return None  # it can only die, and has not
        status, latency, loss = self.status, self.latency, self.loss_rate()
        slow = latency.smoothed if well else 0.0
        if not status and is_spotless(self.unconfirmed + self.errors, loss, slow, latency.baseline):
            return None
        signs = Signs(
            unconfirmed=self.unconfirmed,
            heard=self.heard > self.confirmed,
            host_answers=self.host_heard > self.heard,
            loss=loss,
            latency=slow,
            baseline=latency.baseline,
            errors=self.errors,
            refused=self.refused,
        )
        better, cause, figure = grade(status, signs)
        if better > status:
            return better, cause, figure
        if better == status or self.phase == Phase.SUSPECT:
            self.calm_since = _NEVER
        elif self.calm_since == _NEVER:
            self.calm_since = at
        elif (calm := at - self.calm_since) >= dwell:
            return Status(status - 1), Cause.CALM, calm
        return None

    def become(self, at: float, now: float, verdict: Verdict) -> Change:
        """Change the status; ``now`` is the caller's clock."""
        status, cause, figure = verdict
        change = Change(now, self.status, status, cause, figure)
        self.history = (*self.history[1 - HISTORY :], change)
        self.status = status
        self.since = at
        # The next step takes its own time.
        self.calm_since = at if cause is Cause.CALM else _NEVER
        return change

    def report(self, at: float, connection: int, everyone: LossRate) -> ConnectionHealth:
        """All of it, for people."""
        return ConnectionHealth(
            connection=connection,
            status=self.status.name.lower(),
            since=at - self.since,
            reason=self.history[-1].reason if self.history else "",
            silent=at - self.heard,
            unconfirmed=at - self.confirmed,
            host_silent=at - self.host_heard if self.host_heard > -_NEVER else None,
            phi=self.phi.phi(at - self.heard),
            suspect=self.phase == Phase.SUSPECT,
            failures=self.failures,
            failures_needed=self.needed(everyone),
            loss_rate=self.loss_rate(),
            errors=self.errors,
            latency=self.latency.snapshot(at),
            history=[str(change) for change in self.history],
        )
