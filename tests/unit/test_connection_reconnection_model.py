# SPDX-License-Identifier: Apache-2.0
"""ReconnectionManager beside a model, whatever is called, and whatever callbacks do."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from random import Random

from hypothesis import HealthCheck, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.unit.connection_reconnections import Model
from userspace.connection.backoff import Backoff, Jitter
from userspace.connection.reconnection import Phase, ReconnectionManager, TooManyConnectionsError
from userspace.connection.states import Cause
from userspace.flow.bucket import TokenBucket

KEYS = st.integers(0, 5)
CAUSES = st.sampled_from([Cause.LOST, Cause.REFUSED, Cause.PEER_CLOSED, Cause.LOCAL_ERROR])
PROOF, TIMEOUT = 4.0, 8.0


class Reconnections(RuleBasedStateMachine):
    """The manager does what the model does, also when callbacks raise and call back in."""

    @initialize(
        seed=st.integers(0, 1 << 32),
        jitter=st.sampled_from(Jitter),
        rate=st.sampled_from([1.0, 3.0, 1000.0]),
        burst=st.integers(1, 3),
        limit=st.sampled_from([3, 100]),
    )
    def begin(self, seed: int, jitter: Jitter, rate: float, burst: int, limit: int) -> None:
        backoff = Backoff(attempts=3, initial=0.5, cap=16.0, jitter=jitter)
        self.now = self.latest = 0.0
        self.behaviour = "none"
        self.gave_up: list[tuple[int, Cause]] = []
        self.manager = ReconnectionManager[int](
            0.0,
            rng=Random(seed),
            backoff=backoff,
            rate=rate,
            burst=burst,
            proof_time=PROOF,
            attempt_timeout=TIMEOUT,
            limit=limit,
            on_give_up=self.give_up,
        )
        bucket = TokenBucket(0.0, rate, burst)
        self.model = Model(backoff, Random(seed), bucket, PROOF, TIMEOUT, limit, self.model_gives_up)
        self.rate, self.burst = rate, burst
        self.taken: list[float] = []
        self.attempts = 0

    def give_up(self, key: int, cause: Cause) -> None:
        self.gave_up.append((key, cause))
        other = (key + 1) % 6
        if self.behaviour == "raise":
            raise RuntimeError("no")
        if self.behaviour == "cancel":
            self.manager.cancel(key)
        elif self.behaviour == "cancel other":
            self.manager.cancel(other)
        elif self.behaviour == "schedule other":
            self.manager.schedule(self.now, other, Cause.ASKED)
        elif self.behaviour == "fail other":
            self.manager.on_failed(self.now, other, Cause.REFUSED)
        elif self.behaviour == "time out":
            self.manager.on_timeout(self.now)

    def model_gives_up(self, key: int) -> None:
        other = (key + 1) % 6
        if self.behaviour == "raise":
            raise RuntimeError("no")
        if self.behaviour == "cancel":
            self.model.forget(key)
        elif self.behaviour == "cancel other":
            self.model.forget(other)
        elif self.behaviour == "schedule other":
            self.model.schedule(self.now, other, Cause.ASKED)
        elif self.behaviour == "fail other":
            self.model.failed(self.now, other, Cause.REFUSED)
        elif self.behaviour == "time out":
            self.model.timeout(self.now)

    def both(self, ours: Callable[[float], object], models: Callable[[float], object]) -> object:
        """The same call of both; what they return, or raise, is the same.  A clock may go back meanwhile."""
        stamp = self.now - 50.0 if self.latest == self.now else self.now
        self.latest = self.now
        results: list[object] = []
        for call, now in ((ours, stamp), (models, self.now)):
            try:
                results.append(call(now))
            except TooManyConnectionsError:
                results.append(TooManyConnectionsError)
        note(f"{results}")
        assert results[0] == results[1]
        return results[0]

    @rule(step=st.sampled_from([0.0, 0.125, 1.0, 5.0, 40.0]))
    def time(self, step: float) -> None:
        self.now += step

    @rule(behaviour=st.sampled_from(
        ["none", "raise", "cancel", "cancel other", "schedule other", "fail other", "time out"]
    ))  # fmt: skip
    def behave(self, behaviour: str) -> None:
        self.behaviour = behaviour

    @rule(key=KEYS, cause=CAUSES)
    def schedule(self, key: int, cause: Cause) -> None:
        self.both(
            partial(self.manager.schedule, key=key, cause=cause),
            partial(self.model.schedule, key=key, cause=cause),
        )

    @rule(key=KEYS)
    def connecting(self, key: int) -> None:
        self.both(partial(self.manager.on_connecting, key=key), partial(self.model.connecting, key=key))

    @rule(key=KEYS)
    def connected(self, key: int) -> None:
        self.both(partial(self.manager.on_connected, key=key), partial(self.model.connected, key=key))

    @rule(key=KEYS)
    def proved(self, key: int) -> None:
        self.both(partial(self.manager.on_proved, key=key), partial(self.model.proved, key=key))

    @rule(key=KEYS, cause=CAUSES)
    def failed(self, key: int, cause: Cause) -> None:
        self.both(
            partial(self.manager.on_failed, key=key, cause=cause),
            partial(self.model.failed, key=key, cause=cause),
        )

    @rule(key=KEYS)
    def cancel(self, key: int) -> None:
        self.manager.cancel(key)
        self.model.forget(key)

    @rule(keys=st.none() | st.lists(KEYS, max_size=4))
    def link_up(self, keys: list[int] | None) -> None:
        self.both(partial(self.manager.on_link_up, keys=keys), partial(self.model.link_up, keys=keys))

    @rule(wait=st.booleans(), take=st.booleans())
    def wake(self, wait: bool, take: bool) -> None:
        at = self.manager.next_timeout()
        if wait and at < math.inf:
            self.now = max(self.now, at)
        self.both(self.manager.on_timeout, self.model.timeout)
        if take:
            taken = self.both(self.manager.take_due, self.model.take)
            assert isinstance(taken, list)
            self.taken += [self.now] * len(taken)

    @rule(cause=CAUSES)
    def schedule_all(self, cause: Cause) -> None:
        """So that there is a line."""
        for key in range(6):
            self.schedule(key, cause)

    @rule()
    def all_fail(self) -> None:
        """So that some are given up."""
        for key, one in [*self.model.known.items()]:
            if one.phase is Phase.TRYING:
                self.failed(key, Cause.REFUSED)

    @invariant()
    def agrees(self) -> None:
        known = self.model.known
        assert len(self.manager) == len(known)
        for key in range(6):
            one, looked = known.get(key), self.manager.look(key)
            assert (one is None) == (looked is None)
            assert self.manager.is_reconnecting(key) == (one is not None and one.phase is not Phase.UNPROVED)
            assert self.manager.has_given_up(key) == (one is not None and one.given_up)
            if one is not None and looked is not None:
                at = None if one.timer is None else one.timer[0]
                assert (looked.phase, looked.since, looked.failures, looked.given_up, looked.cause) == (
                    one.phase,
                    one.since,
                    one.failures,
                    one.given_up,
                    one.cause,
                )
                assert looked.timer == at
        assert [*self.manager._line] == self.model.line
        assert self.manager.next_timeout() == self.model.next_timeout(self.latest)
        assert self.gave_up == self.model.gave_up

    @invariant()
    def counts_add_up(self) -> None:
        told = self.manager.snapshot()
        assert told.phases == {
            phase: sum(one.phase is phase for one in self.model.known.values()) for phase in Phase
        }
        assert told.given_up == sum(one.given_up for one in self.model.known.values())
        assert told.taken_up == told.proved + told.cancelled + len(self.manager)
        trying = told.phases[Phase.TRYING]
        assert told.attempts + told.late == told.connected + told.failed + told.abandoned + trying
        assert told.timed_out <= told.failed
        assert told.gave_up == len(self.gave_up)
        assert told.callback_errors == self.model.callback_errors
        assert len(self.manager._timers) == sum(one.timer is not None for one in self.model.known.values())

    @invariant()
    def attempts_keep_within_the_rate(self) -> None:
        for first, at in enumerate(self.taken):
            for last in range(first, len(self.taken)):
                room = self.burst + (self.taken[last] - at) * self.rate
                assert last - first + 1 <= room + 1e-6

    def teardown(self) -> None:
        """Wherever it is, once the peers answer all are well soon: no key is stuck."""
        if not hasattr(self, "manager"):
            return
        self.behaviour = "none"
        manager = self.manager
        now = self.now
        end = now + 16.0 + 6 / self.rate + PROOF + 1e-6
        for key in range(6):
            manager.on_connected(now, key)
        while len(manager) and now <= end:
            manager.on_timeout(now)
            for key in manager.take_due(now):
                manager.on_connected(now, key)
            for key in range(6):
                manager.on_proved(now, key)
            now = max(now, manager.next_timeout())
        assert len(manager) == 0
        assert manager.next_timeout() == math.inf


Reconnections.TestCase.settings = settings(
    max_examples=100, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck)
)
TestReconnections = Reconnections.TestCase
