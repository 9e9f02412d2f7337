# SPDX-License-Identifier: Apache-2.0
"""The token bucket against exact fractions, over long times, and with numbers that make no sense."""

from __future__ import annotations

import math
from fractions import Fraction
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from userspace.flow.bucket import TokenBucket
from xdp.errors import UsageError

INF = math.inf
NAN = math.nan


def test_burst_then_rate() -> None:
    bucket = TokenBucket(10.0, rate=1000, burst=3000)
    assert [bucket.take(10.0, 1000) for _ in range(4)] == [True, True, True, False]
    assert bucket.time_until(10.0, 1000) == 11.0
    assert not bucket.take(10.999, 1000)
    assert bucket.take(11.0, 1000)
    assert bucket.level(11.5) == 500
    assert bucket.level(100.0) == 3000  # no more than the burst, however long it rests
    assert (bucket.rate, bucket.burst) == (1000, 3000)
    assert repr(bucket) == "<TokenBucket 1000/s, burst 3000>"


@pytest.mark.parametrize("rate", [3.0, 7.0, 1 / 3, 1e9 / 7])
def test_no_drift(rate: float) -> None:
    """A million tokens taken one by one as soon as they are there: the last is as exact as the first."""
    bucket = TokenBucket(1e6, rate, burst=10)
    assert bucket.take(1e6, 10)
    now, count = 1e6, 30_000
    for _ in range(count):
        now = bucket.time_until(now, 1)
        assert bucket.take(now, 1)
    exact = Fraction(1_000_000) + Fraction(count) / Fraction(rate)
    # One rounding of a time of that size, and one of the division; a level refilled each time would be off
    # by thousands of them.
    assert abs(Fraction(now) - exact) <= 3 * Fraction(math.ulp(now))


def test_no_drift_over_a_year() -> None:
    """However the requests fall, exactly rate * year + burst are let through and left."""
    random = Random(7)
    rate, burst = 1 / 60, 50
    bucket = TokenBucket(0.0, rate, burst)
    now, taken, end = 0.0, 0, 365 * 86_400.0
    while now < end:
        amount = random.randint(0, 20)
        now = bucket.time_until(now, amount)
        now += random.uniform(0, 0.99) * (burst - bucket.level(now)) / rate  # never so late that it is full
        assert bucket.take(now, amount)
        taken += amount
    assert taken + bucket.level(now) == pytest.approx(now * rate + burst, rel=1e-15), "seed 7"


def test_rate_zero_gives_the_burst_once() -> None:
    bucket = TokenBucket(0.0, 0, 10)
    assert bucket.take(1e9, 10)
    assert not bucket.take(1e12, 1)
    assert bucket.take(1e12, 0)
    assert bucket.time_until(1e12, 1) == INF
    assert bucket.time_until(1e12, 0) == 1e12


def test_infinite_rate() -> None:
    bucket = TokenBucket(0.0, INF, 10)
    assert all(bucket.take(now, amount) for now in (0.0, 5.0, 5.0, 1.0) for amount in (0, 1, 10**400, INF))
    assert bucket.time_until(3.0, 10**400) == 3.0
    assert bucket.level(3.0) == 10
    bucket.set_rate(3.0, 1, 10)
    assert bucket.level(3.0) == 10
    assert not bucket.take(3.0, 11)


def test_more_than_fits_never_comes() -> None:
    bucket = TokenBucket(0.0, 1, 10)
    for amount in (10.000001, 1e300, 10**400, INF):
        assert not bucket.take(100.0, amount)
        assert bucket.time_until(100.0, amount) == INF
    assert bucket.level(100.0) == 10


def test_rates_at_the_edge_of_floats() -> None:
    fast = TokenBucket(0.0, 1.7e308, 10)
    assert fast.take(0.0, 10)
    assert fast.take(1000.0, 10)  # what came in is no finite float
    slow = TokenBucket(0.0, 5e-324, 10)
    assert slow.take(0.0, 10)
    assert slow.time_until(0.0, 1) == INF


def test_after_exact_counts_beyond_floats() -> None:
    """The time told is late enough, even where floats are coarser than tokens."""
    bucket = TokenBucket(0.0, 1.0, 1 << 53)
    assert bucket.take(0.0, 1 << 53)
    for amount in (1, 3, (1 << 53) - 1):
        assert bucket.take(ready := bucket.time_until(0.0, amount), amount), ready
        bucket.set_rate(0.0, 1.0, 1 << 53)


def test_time_backwards_mints_nothing() -> None:
    bucket = TokenBucket(100.0, 10, 100)
    assert bucket.take(100.0, 100)
    assert bucket.level(90.0) == 0
    assert not bucket.take(90.0, 1)
    assert bucket.time_until(90.0, 1) == pytest.approx(100.1, abs=1e-13)
    assert bucket.level(101.0) == 10  # as if it had never gone back
    bucket.set_rate(50.0, 20, 100)
    assert bucket.level(100.0) == 0
    assert bucket.level(101.0) == 20


def test_set_rate_keeps_what_is_there() -> None:
    bucket = TokenBucket(0.0, 10, 100)
    assert bucket.take(0.0, 40)
    bucket.set_rate(1.0, 1000, 500)  # 70 were there, and are
    assert bucket.level(1.0) == 70
    assert bucket.level(1.1) == pytest.approx(170)
    bucket.set_rate(1.1, 0, 50)
    assert bucket.level(1.1) == 50
    bucket.set_rate(1.1, 0, 500)  # what did not fit is gone
    assert bucket.level(99.0) == 50
    for _ in range(1000):
        bucket.set_rate(99.0, 1e9, 1000)
        bucket.set_rate(99.0, 0, 10)
    assert bucket.level(99.0) == 10


@pytest.mark.parametrize(
    ("now", "rate", "burst", "message"),
    [
        (NAN, 1, 1, "a time is"),
        (INF, 1, 1, "a time is"),
        (1e300, 1, 1, "a time is"),
        (0.0, -1, 1, "a rate is"),
        (0.0, NAN, 1, "a rate is"),
        (0.0, 1, -1, "a burst is"),
        (0.0, 1, NAN, "a burst is"),
        (0.0, 1, INF, "a burst is"),
        (0.0, 1, (1 << 53) + 1, "a burst is"),
    ],
)
def test_values_out_of_range(now: float, rate: float, burst: float, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        TokenBucket(now, rate, burst)
    bucket = TokenBucket(0.0, 1, 1)
    with pytest.raises(UsageError, match=message):
        bucket.set_rate(now, rate, burst)
    assert (bucket.rate, bucket.burst, bucket.level(0.0)) == (1, 1, 1)


@pytest.mark.parametrize("rate", [0, 1, INF])
def test_calls_with_nonsense(rate: float) -> None:
    bucket = TokenBucket(0.0, rate, 10)
    for amount in (-1, NAN, -INF):
        with pytest.raises(UsageError, match="an amount"):
            bucket.take(0.0, amount)
        with pytest.raises(UsageError, match="an amount"):
            bucket.time_until(0.0, amount)
    for now in (NAN, INF):
        with pytest.raises(UsageError, match="a time"):
            bucket.take(now, 1)
        with pytest.raises(UsageError, match="a time"):
            bucket.time_until(now, 1)
        with pytest.raises(UsageError, match="a time"):
            bucket.level(now)
    assert bucket.level(0.0) == 10


RATES = st.one_of(st.integers(0, 10**10), st.floats(0, 1e10))
BURSTS = st.integers(0, 10**9)
AMOUNTS = st.one_of(st.integers(0, 10), st.integers(0, 10**9))


@settings(deadline=None)
@given(st.floats(-1e9, 1e9), RATES, BURSTS, st.lists(st.tuples(st.floats(0, 1e4), AMOUNTS), max_size=8))
def test_time_until_is_late_enough_and_not_later(
    now: float, rate: float, burst: int, calls: list[tuple[float, int]]
) -> None:
    bucket = TokenBucket(now, rate, burst)
    for pause, amount in calls:
        now += pause
        ready = bucket.time_until(now, amount)
        assert ready >= now
        if ready > now:
            assert not bucket.take(now, amount)
        if ready > 1e15:
            continue
        if ready > now + 1e-3:  # a moment earlier it is not there yet
            assert not bucket.take(ready - (ready - now) * 1e-3, amount)
        assert bucket.take(ready, amount)
        now = ready


class BucketAgainstFractions(RuleBasedStateMachine):
    """What is let through is what exact arithmetic lets through, but for one rounding."""

    @initialize(now=st.integers(0, 10**6), rate=RATES, burst=BURSTS)
    def start(self, now: int, rate: float, burst: int) -> None:
        self.now = float(now)
        self.bucket = TokenBucket(self.now, rate, burst)
        self.rate, self.burst = Fraction(rate), Fraction(burst)
        self.level = Fraction(burst)

    def pass_to(self, now: float) -> None:
        self.level = min(self.burst, self.level + (Fraction(now) - Fraction(self.now)) * self.rate)
        self.now = now

    def slack(self) -> Fraction:
        """Tokens by which floats may differ from fractions, over all steps of a run."""
        return (self.burst + self.rate * 10) * Fraction(1, 1 << 44)

    @rule(pause=st.one_of(st.just(0.0), st.floats(0, 1), st.floats(0, 1e4)))
    def wait(self, pause: float) -> None:
        self.pass_to(self.now + pause)

    @rule(amount=AMOUNTS)
    def take(self, amount: int) -> None:
        if self.bucket.take(self.now, amount):
            assert amount <= self.level + self.slack()
            self.level -= amount
        else:
            assert amount > self.level - self.slack()

    @rule(share=st.floats(0, 1))
    def take_a_share(self, share: float) -> None:
        self.take(int(self.level * Fraction(share)) if self.level > 0 else 0)

    @rule(rate=RATES, burst=BURSTS)
    def set_rate(self, rate: float, burst: int) -> None:
        self.bucket.set_rate(self.now, rate, burst)
        # The bucket's own level goes on, rounded: the model follows it, within the slack.
        assert abs(min(self.level, Fraction(burst)) - Fraction(self.bucket.level(self.now))) <= self.slack()
        self.rate, self.burst = Fraction(rate), Fraction(burst)
        self.level = Fraction(self.bucket.level(self.now))

    @rule(back=st.floats(0, 1e4))
    def look_from_the_past(self, back: float) -> None:
        assert self.bucket.level(self.now - back) <= self.burst
        self.bucket.take(self.now - back, 0)

    @invariant()
    def levels_agree(self) -> None:
        level = self.bucket.level(self.now)
        assert 0 <= level <= self.burst
        assert abs(Fraction(level) - self.level) <= self.slack()


TestBucketAgainstFractions = BucketAgainstFractions.TestCase
TestBucketAgainstFractions.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
