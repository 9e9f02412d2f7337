# SPDX-License-Identifier: Apache-2.0
"""A clock that stands still while the loop does, and timers by it."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from userspace.connection.stalls import (
    CALM,
    GRACE,
    GRACE_EVERY,
    GRANULE,
    SCORE_MOST,
    THRESHOLD,
    AwakeTimers,
    LocalHealth,
)
from xdp.errors import UsageError

# --- stalls


def test_lateness_up_to_the_threshold_is_none() -> None:
    local = LocalHealth()
    for late in (-5.0, 0.0, 0.1, THRESHOLD):
        assert not local.on_tick(100.0 + late, 100.0)
    assert (local.stalls, local.stalled, local.score, local.stretch) == (0, 0.0, 0, 1.0)
    assert local.awake(7.0) == 7.0


def test_what_is_beyond_it_is_taken_off_the_clock() -> None:
    local = LocalHealth()
    assert local.on_tick(103.0, 100.0)
    assert (local.stalls, local.stalled, local.score) == (1, 3.0 - THRESHOLD, 1)
    assert local.awake(103.0) == 100.0 + THRESHOLD
    assert local.stalled_at == 100.0 + THRESHOLD
    assert local.stretch == 2.0
    assert "score 1" in repr(local)


def test_the_same_stall_is_counted_once() -> None:
    """By the monitor's own timer and by the caller's loop, which meant to run at another time."""
    local = LocalHealth()
    local.on_tick(103.0, 100.0)
    assert not local.on_tick(103.0, 99.0)
    assert not local.on_tick(103.1, 100.5)
    assert local.stalled == 3.0 - THRESHOLD
    assert local.on_tick(105.0, 103.5)
    assert local.stalled == 3.0 + 1.5 - 2 * THRESHOLD


def test_no_stall_is_longer_than_the_time_since_the_last_tick() -> None:
    local = LocalHealth()
    local.on_tick(100.0, 100.0)
    local.on_tick(101.0, 50.0)
    assert local.stalled == 1.0
    timers = AwakeTimers(100.0)
    timers.on_tick(101.0, 50.0)
    assert timers.clock(101.0) == 100.0


def test_a_loop_that_meant_to_run_never_or_at_no_time() -> None:
    local = LocalHealth()
    for due in (math.inf, -math.inf, math.nan):
        assert not local.on_tick(1e6, due)
    assert local.stalled == 0.0


def test_a_loop_that_polls_once_a_second_has_a_slow_clock() -> None:
    local = LocalHealth()
    now = 0.0
    for _ in range(100):
        now += 1.0
        local.on_tick(now, now - 0.98)  # something was due soon after the last turn
    assert local.awake(now) == pytest.approx(100 * (0.02 + THRESHOLD), rel=1e-9)
    assert local.score == SCORE_MOST


def test_there_is_a_grace_after_a_stall() -> None:
    local = LocalHealth()
    local.on_tick(103.0, 100.0)
    at = local.awake(103.0)
    assert local.grace_until == at + GRACE
    local.on_tick(104.0, 103.5)
    assert local.grace_until == at + GRACE  # too early for another one
    local.on_tick(120.0, 115.0)
    assert local.grace_until == local.awake(120.0) + GRACE
    assert local.awake(120.0) - at >= GRACE_EVERY


def test_graces_take_a_tenth_of_the_time_at_most() -> None:
    local, rng, now, grace, last = LocalHealth(), random.Random(3), 0.0, 0.0, 0.0
    local.on_tick(now, now)
    until = local.grace_until
    for _ in range(3000):
        now += rng.choice([0.01, 0.05, 0.3, 2.0])
        local.on_tick(now, now - rng.random())
        at = local.awake(now)
        assert at >= last
        if local.grace_until != until:  # another one begins
            until = local.grace_until
            grace += until - at
        last = at
    assert local.stalls > 100
    assert 0.0 < grace <= (1 + last / GRACE_EVERY) * GRACE


def test_the_score_falls_with_calm() -> None:
    local = LocalHealth()
    for stall in range(3):
        local.on_tick(100.0 + stall, 99.0 + stall)
    assert local.score == 3
    at = local.awake(102.0)
    local.calm(at + CALM - 0.001)
    assert local.score == 3
    local.calm(at + CALM)
    assert local.score == 2
    local.calm(at + 100 * CALM)
    assert (local.score, local.stretch, local.calm_at) == (0, 1.0, math.inf)


@settings(max_examples=60, deadline=None)
@given(ticks=st.lists(st.tuples(st.floats(0, 50), st.floats(-100, 100)), max_size=60))
def test_the_clock_never_goes_back_nor_faster(ticks: list[tuple[float, float]]) -> None:
    local, now, last = LocalHealth(), 1000.0, 1000.0
    local.on_tick(now, now)
    for step, late in ticks:
        now += step
        local.on_tick(now, now - late)
        at = local.awake(now)
        assert last - 1e-9 <= at <= last + step + 1e-9
        assert local.grace_until <= at + GRACE
        assert 0 <= local.score <= SCORE_MOST
        last = at


# --- timers


def test_timers_notice_that_they_are_late() -> None:
    timers = AwakeTimers(10.0)
    timers.set(1, 12.0)
    timers.set(2, 13.0)
    assert timers.next_timeout() == 12.0
    at = timers.clock(22.0)  # ten seconds too late
    assert at == pytest.approx(12.0 + THRESHOLD)
    assert timers.local.stalls == 1
    # Nothing is due in the grace, then what was due when the clock stopped, and the rest in its own time.
    assert timers.next_timeout() == pytest.approx(22.0 + GRACE)
    at = timers.clock(22.0 + GRACE)
    assert [*timers.due(at)] == [1]
    assert timers.next_timeout() == pytest.approx(22.0 + 1.0 - THRESHOLD)


def test_any_call_notices() -> None:
    timers = AwakeTimers(0.0)
    timers.set(1, 1.0)
    assert timers.clock(1.0 + THRESHOLD) == 1.0 + THRESHOLD
    assert timers.clock(4.0) == pytest.approx(1.0 + THRESHOLD)
    assert timers.clock(4.1) == pytest.approx(1.1 + THRESHOLD)
    assert timers.local.stalls == 1


def test_a_timer_that_was_put_off_or_cancelled_is_no_stall() -> None:
    timers = AwakeTimers(0.0)
    timers.set(1, 1.0)
    timers.set(1, 50.0)
    assert timers.clock(40.0) == 40.0
    timers.cancel(1)
    assert timers.clock(1e6) == 1e6
    assert timers.next_timeout() == math.inf
    timers.set(2, 1e6 + 5.0)
    assert timers.clock(1e6 + 5.0) == 1e6 + 5.0
    assert timers.local.stalls == 0


def test_nobody_is_late_for_what_was_over_when_it_was_set() -> None:
    timers = AwakeTimers(0.0)
    timers.set(1, 50.0)
    assert timers.clock(20.0) == 20.0
    timers.set(2, 3.0)
    assert timers.next_timeout() == 20.0
    assert timers.clock(20.0) == 20.0
    assert timers.local.stalls == 0


def test_the_callers_own_stalls_count() -> None:
    timers = AwakeTimers(0.0)
    timers.set(1, 100.0)
    timers.on_tick(10.0, 9.9)
    assert timers.local.stalls == 0
    timers.on_tick(15.0, 10.0)
    assert timers.local.stalled == 5.0 - THRESHOLD
    assert timers.next_timeout() == 100.0 + 5.0 - THRESHOLD
    assert timers.clock(15.0) == 10.0 + THRESHOLD


def test_the_loop_is_not_woken_for_each_timer() -> None:
    timers = AwakeTimers(0.0)
    for key in range(1000):
        timers.set(key, key / 1e5)
    wakes = 0
    while (now := timers.next_timeout()) < math.inf:
        at = timers.clock(now)
        for key in timers.due(at):
            assert 0.0 <= at - key / 1e5 <= GRANULE + 1e-9
        wakes += 1
    assert wakes == 2
    assert timers.local.stalls == 0


def test_the_other_deadline() -> None:
    timers = AwakeTimers(0.0)
    timers.set(1, 3.0)
    timers.other = 2.0
    assert timers.next_timeout() == 2.0
    assert timers.next() == 3.0


def test_rounding_wakes_nobody_too_early() -> None:
    timers, rng, now = AwakeTimers(0.1), random.Random(8), 0.1
    for _ in range(3000):
        timers.set(1, timers.clock(now) + rng.random())
        now = timers.next_timeout() + rng.choice([0.0, 0.0, 0.7])
        timers.clock(now)
        now = max(now, timers.next_timeout())
        assert [*timers.due(timers.clock(now))] == [1]
    assert timers.local.stalls > 500


@pytest.mark.parametrize("now", [math.nan, math.inf, -math.inf, 1e300])
def test_what_is_no_time_is_refused(now: float) -> None:
    timers = AwakeTimers(5.0)
    for call in (timers.clock, AwakeTimers, lambda now: timers.on_tick(now, 0.0)):
        with pytest.raises(UsageError, match="now is seconds"):
            call(now)
    assert timers.latest == 5.0


def test_earlier_is_the_latest() -> None:
    timers = AwakeTimers(5.0)
    assert timers.clock(9.0) == 9.0
    assert timers.clock(1.0) == 9.0
    assert timers.clock(-1e9) == 9.0


@settings(max_examples=80, deadline=None)
@given(
    start=st.sampled_from([0.0, 1e-3, 12345.678, 1e9, 1e11]),
    steps=st.lists(st.tuples(st.integers(0, 5), st.floats(0, 9), st.floats(0, 9)), max_size=40),
)
def test_who_comes_at_the_time_that_was_told_finds_something_due(
    start: float, steps: list[tuple[int, float, float]]
) -> None:
    """However times are rounded: else a loop would come again and again for nothing."""
    timers, now = AwakeTimers(start), start
    for key, delay, late in steps:
        timers.set(key, timers.clock(now) + delay)
        now = max(now, timers.next_timeout()) + late
        at = timers.clock(now)
        assert late > THRESHOLD or timers.local.grace_until > at or timers.next() <= at
        now = max(now, timers.next_timeout())
        at = timers.clock(now)
        assert timers.local.grace_until <= at
        assert [*timers.due(at)]
