# SPDX-License-Identifier: Apache-2.0
"""ReconnectionManagers for tests, and what one should do, said once more in the simplest way."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

from userspace.connection.backoff import Backoff, Jitter
from userspace.connection.reconnection import HURRY, PACE, Phase, ReconnectionManager, TooManyConnectionsError
from userspace.connection.states import Cause
from userspace.flow.bucket import TokenBucket

#: 1 s, 2 s, 4 s, then given up and probed every 16 s.
EXACT = Backoff(attempts=3, initial=1.0, factor=2.0, cap=16.0, jitter=Jitter.NONE)


class Told:
    """A manager with exact delays, and who was given up."""

    def __init__(self, **options: object) -> None:
        self.gave_up: list[tuple[str, Cause]] = []
        options = {"backoff": EXACT, "rng": Random(7), "on_give_up": self.give_up, **options}
        self.manager: ReconnectionManager[str] = ReconnectionManager(0.0, **options)  # type: ignore[arg-type]

    def give_up(self, key: str, cause: Cause) -> None:
        self.gave_up.append((key, cause))

    def tries(self, now: float) -> list[str]:
        assert self.manager.on_timeout(now) == []
        return self.manager.take_due(now)

    def phase(self, key: str = "a") -> Phase | None:
        found = self.manager.look(key)
        return None if found is None else found.phase


@dataclass
class Known:
    """One key."""

    phase: Phase
    since: float
    cause: Cause
    failures: int = 0
    step: int = 0
    given_up: bool = False
    hurried: bool = False
    heard: bool = False
    timer: tuple[float, int] | None = None  # when, and which in turn


@dataclass
class Model:
    """As the manager, key by key; ``gave_up`` is what the callback is to be called with."""

    backoff: Backoff
    rng: Random
    bucket: TokenBucket
    proof_time: float
    attempt_timeout: float
    limit: int
    on_give_up: Callable[[int], None]
    known: dict[int, Known] = field(default_factory=dict)
    line: list[int] = field(default_factory=list)
    gave_up: list[tuple[int, Cause]] = field(default_factory=list)
    callback_errors: int = 0
    turn: int = 0

    def set_timer(self, key: int, at: float) -> None:
        self.known[key].timer = (at, self.turn)
        self.turn += 1

    def to_line(self, now: float, key: int) -> None:
        one = self.known[key]
        one.phase, one.since, one.timer = Phase.READY, now, None
        self.line.append(key)

    def out_of_line(self, key: int) -> None:
        self.line = [other for other in self.line if other != key]

    def wait(self, now: float, key: int) -> None:
        one = self.known[key]
        one.phase, one.since = Phase.WAITING, now
        self.set_timer(key, now + self.backoff.delay(one.step + 1, self.rng))

    def begin(self, now: float, key: int) -> None:
        one = self.known[key]
        self.out_of_line(key)
        one.phase, one.since = Phase.TRYING, now
        self.set_timer(key, now + self.attempt_timeout)

    def fail(self, now: float, key: int, cause: Cause) -> None:
        one = self.known[key]
        if cause not in {Cause.LINK_DOWN, Cause.LOCAL_ERROR}:
            one.failures += 1
        one.step += 1
        one.cause, one.hurried = cause, False
        self.wait(now, key)
        if one.failures >= self.backoff.attempts and not one.given_up:
            one.given_up = True
            self.gave_up.append((key, cause))
            try:
                self.on_give_up(key)
            except Exception:  # noqa: BLE001 - as the manager does
                self.callback_errors += 1

    def take_up(self, now: float, key: int, phase: Phase, cause: Cause) -> Known:
        if len(self.known) >= self.limit:
            raise TooManyConnectionsError("too many")
        one = self.known[key] = Known(phase, now, cause)
        return one

    def forget(self, key: int) -> None:
        self.known.pop(key, None)
        self.out_of_line(key)

    # --- as the manager's methods

    def schedule(self, now: float, key: int, cause: Cause) -> None:
        if key not in self.known:
            self.take_up(now, key, Phase.WAITING, cause)
            self.wait(now, key)
        elif self.known[key].phase is Phase.UNPROVED:
            self.fail(now, key, cause)

    def connecting(self, now: float, key: int) -> None:
        one = self.known.get(key) or self.take_up(now, key, Phase.TRYING, Cause.ASKED)
        if one.phase is not Phase.TRYING:
            one.hurried = False
        self.begin(now, key)

    def connected(self, now: float, key: int) -> None:
        one = self.known.get(key)
        if one is not None and one.phase is not Phase.UNPROVED:
            self.out_of_line(key)
            one.phase, one.since, one.cause, one.heard = Phase.UNPROVED, now, Cause.OPENED, False
            self.set_timer(key, now + self.proof_time)

    def proved(self, now: float, key: int) -> None:
        one = self.known.get(key)
        if one is not None and one.phase is Phase.UNPROVED:
            one.heard = True
            if now >= one.since + self.proof_time:
                self.forget(key)

    def failed(self, now: float, key: int, cause: Cause) -> None:
        if key in self.known and self.known[key].phase in {Phase.TRYING, Phase.UNPROVED}:
            self.fail(now, key, cause)

    def link_up(self, now: float, keys: list[int] | None) -> list[int]:
        over = []
        for key in [*self.known] if keys is None else keys:
            one = self.known.get(key)
            if one is None or one.phase is Phase.UNPROVED:
                continue
            one.step = 0
            young = one.hurried and now < one.since + HURRY
            if one.phase is Phase.READY or (one.phase is Phase.TRYING and young):
                continue
            if one.phase is Phase.TRYING:
                over.append(key)
            one.cause, one.hurried = Cause.LINK_UP, True
            self.to_line(now, key)
        return over

    def due(self, now: float, before: int) -> int | None:
        """The next whose timer is over, of those that were set before this turn."""
        timers = [
            (one.timer, key)
            for key, one in self.known.items()
            if one.timer is not None and one.timer[0] <= now and one.timer[1] < before
        ]
        return min(timers)[1] if timers else None

    def timeout(self, now: float) -> list[int]:
        over, before = [], self.turn
        while (key := self.due(now, before)) is not None:
            one = self.known[key]
            one.timer = None
            if one.phase is Phase.WAITING:
                self.to_line(now, key)
            elif one.phase is Phase.TRYING:
                over.append(key)
                self.fail(now, key, Cause.TIMED_OUT)
            elif one.heard:
                self.forget(key)
        return over

    def take(self, now: float) -> list[int]:
        taken = []
        while self.line and self.bucket.take(now, 1):
            taken.append(self.line[0])
            self.begin(now, self.line[0])
        return taken

    def next_timeout(self, now: float) -> float:
        """For a ``now`` that is the latest."""
        batch = max(1, int(min(self.bucket.rate * PACE, self.bucket.burst)))
        timers = [one.timer[0] for one in self.known.values() if one.timer is not None]
        if self.line:
            timers.append(self.bucket.time_until(now, min(len(self.line), batch)))
        return min(timers, default=math.inf)
