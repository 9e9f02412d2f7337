# SPDX-License-Identifier: Apache-2.0
"""ConnectionPool beside a model of it, through any sequence of calls: Hypothesis, and long seeded walks."""

from __future__ import annotations

import math
from collections.abc import Callable
from random import Random

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.unit.pool_model import KEYS, PoolModel
from userspace.connection.outliers import OutlierSettings
from userspace.connection.pool import PoolSettings
from userspace.connection.states import Cause

WHICH = st.integers(0, 1 << 16)
KEY = st.sampled_from(KEYS)
CAUSES = [Cause.REFUSED, Cause.TIMED_OUT, Cause.LOCAL_ERROR]


def made(draw: Random) -> PoolModel:
    """Some pool, mostly small, so that everything is scarce."""
    most, each = draw.randint(1, 8), draw.randint(1, 5)
    return PoolModel(
        PoolSettings(
            min_size=draw.randint(0, min(3, most)),
            max_size=most,
            max_per_endpoint=each,
            min_per_endpoint=draw.randint(0, min(2, each, most)),
            max_waiting=draw.choice([0, 3, 20, 20]),
            max_lifetime=draw.choice([None, 5.0, 60.0]),
            idle_timeout=draw.choice([None, 3.0, 30.0]),
            leak_threshold=draw.choice([None, 10.0]),
            outliers=OutlierSettings(interval=1.0, results=5, endpoints=2, share=0.4, deviations=0.5),
        ),
        seed=draw.randint(0, 1 << 30),
        eager=draw.random() < 0.4,
        slow=draw.random() < 0.4,
    )


class Pool(RuleBasedStateMachine):
    """One rule for each thing that can happen; the model judges."""

    @initialize(seed=st.integers(0, 10_000))
    def begin(self, seed: int) -> None:
        self.model = made(Random(seed))

    @rule(
        key=st.none() | KEY,
        sticky=st.none() | st.integers(0, 5),
        patience=st.sampled_from([0.0, 2.0, math.inf]),
    )
    def acquire(self, key: str | None, sticky: int | None, patience: float) -> None:
        self.model.acquire(key, sticky, patience)

    @precondition(lambda self: self.model.leases or self.model.void)
    @rule(which=WHICH, broken=st.booleans())
    def release(self, which: int, broken: bool) -> None:
        self.model.release(which, broken)

    @precondition(lambda self: self.model.old)
    @rule(which=WHICH)
    def release_twice(self, which: int) -> None:
        self.model.release_twice(which)

    @precondition(lambda self: self.model.unseen())
    @rule(which=WHICH)
    def release_unseen(self, which: int) -> None:
        self.model.release_unseen(which)

    @precondition(lambda self: self.model.waiting or self.model.past)
    @rule(which=WHICH)
    def cancel(self, which: int) -> None:
        self.model.cancel(which)

    @rule(key=KEY)
    def lookup(self, key: str) -> None:
        self.model.lookup(key)

    @precondition(lambda self: self.model.dialing)
    @rule(which=WHICH, cause=st.none() | st.sampled_from(CAUSES))
    def attempted(self, which: int, cause: Cause | None) -> None:
        if cause is None:
            self.model.opened(which)
        else:
            self.model.failed(which, cause)

    @precondition(lambda self: self.model.live)
    @rule(which=WHICH, status=st.integers(0, 4))
    def worse(self, which: int, status: int) -> None:
        if status == 4:
            self.model.lost(which)
        else:
            self.model.health(which, status)

    @precondition(lambda self: self.model.closing)
    @rule(which=WHICH)
    def closed(self, which: int) -> None:
        self.model.closed(which)

    @precondition(lambda self: any(self.model.places[:3]))
    @rule(which=WHICH)
    def vanished(self, which: int) -> None:
        self.model.vanished(which)

    @rule(number=st.integers(0, 30), event=st.integers(0, 3), latency=st.floats(0.0, 1e9))
    def stray(self, number: int, event: int, latency: float) -> None:
        self.model.stray(number, event)
        self.model.latency(number, latency, event)

    @rule(key=KEY, weight=st.integers(0, 1000))
    def endpoints(self, key: str, weight: int) -> None:
        if weight:
            self.model.add(key, weight)
        else:
            self.model.remove(key)

    @rule(key=KEY, up=st.booleans())
    def endpoint(self, key: str, up: bool) -> None:
        self.model.endpoint(key, up)

    @rule(key=KEY)
    def may_open(self, key: str) -> None:
        self.model.may_open(key)

    @rule(key=KEY, worked=st.booleans())
    def result(self, key: str, worked: bool) -> None:
        self.model.result(key, worked)

    @rule(step=st.sampled_from([0.0, 0.1, 1.0, 5.0, 40.0, -1.0]))
    def time(self, step: float) -> None:
        self.model.time(step)

    @rule(warm=st.booleans(), slow=st.booleans())
    def keep_house(self, warm: bool, slow: bool) -> None:
        if warm:
            self.model.warm()
        else:
            self.model.clean()
        self.model.attend(slow)

    @rule(dice=st.integers(0, 7), patience=st.sampled_from([None, 0.0, 3.0]))
    def close(self, dice: int, patience: float | None) -> None:
        if not dice and not self.model.draining:
            self.model.close(patience)

    @invariant()
    def all_is_well(self) -> None:
        self.model.check()

    def teardown(self) -> None:
        if hasattr(self, "model"):
            self.model.end()


Pool.TestCase.settings = settings(
    max_examples=80, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
TestPool = Pool.TestCase


# --- longer ways, by seed

STEPS = 400


def possible(model: PoolModel, draw: Random) -> list[tuple[int, Callable[[], None]]]:
    """What can happen next, and how likely it is to."""
    which, key = draw.randrange(1 << 16), draw.choice(KEYS)
    asked = draw.choice([None, None, *KEYS])
    patience = draw.choice([0.0, 2.0, math.inf, math.inf])
    calls: list[tuple[int, Callable[[], None]]] = [
        (30, lambda: model.acquire(asked, draw.choice([None, which % 6]), patience)),
        (8, lambda: model.lookup(key)),
        (2, lambda: model.stray(which % 30, which % 4)),
        (2, lambda: model.latency(which % 30, draw.expovariate(10.0), which % 5)),
        (2, lambda: model.add(key, 1 + which % 1000)),
        (1, lambda: model.remove(key)),
        (3, lambda: model.endpoint(key, draw.random() < 0.7)),
        (8, lambda: model.may_open(key)),
        (2, lambda: model.result(key, draw.random() < 0.5)),
        (10, lambda: model.time(draw.choice([0.1, 0.5, 1.0, 1.0, 5.0, 40.0, -1.0]))),
        (1, model.warm),
        (1, model.clean),
        (1, lambda: model.attend(draw.random() < 0.5)),
    ]
    if model.leases or model.void:
        calls.append((20, lambda: model.release(which, draw.random() < 0.1)))
    if model.old:
        calls.append((1, lambda: model.release_twice(which)))
    if model.unseen():
        calls.append((3, lambda: model.release_unseen(which)))
    if model.waiting or model.past:
        calls.append((6, lambda: model.cancel(which)))
    if model.dialing:
        calls += [(20, lambda: model.opened(which)), (6, lambda: model.failed(which, draw.choice(CAUSES)))]
    if model.live:
        calls += [
            (5, lambda: model.lost(which)),
            (5, lambda: model.health(which, draw.choice([0, 0, 1, 2, 3]))),
        ]
    if model.closing:
        calls.append((20, lambda: model.closed(which)))
    if any(model.places[:3]):
        calls.append((1, lambda: model.vanished(which)))
    return calls


def walk(seed: int, steps: int) -> PoolModel:
    draw = Random(seed)
    model = made(draw)
    for _ in range(steps):
        calls = possible(model, draw)
        draw.choices([call for _, call in calls], [weight for weight, _ in calls])[0]()
        model.check()
    return model


@pytest.mark.parametrize("seed", range(24))
def test_a_long_way(seed: int) -> None:
    """`walk(seed, STEPS)` goes it again."""
    walk(seed, STEPS).end()
