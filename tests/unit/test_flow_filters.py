# SPDX-License-Identifier: Apache-2.0
"""Windowed filters against a list of all values; bounds of what is believed."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from userspace.flow import limits
from userspace.flow.filters import WindowedMax, WindowedMin
from xdp.errors import UsageError

STEPS = st.lists(
    st.tuples(st.floats(0, 3), st.floats(-1e9, 1e9)),  # (seconds later, value)
    min_size=1,
    max_size=60,
)
ANY = st.floats(allow_nan=True, allow_infinity=True)


@given(STEPS, st.floats(0.1, 20))
def test_the_maximum_covers_15_of_16_parts_of_the_window_and_no_more_than_all(
    steps: list[tuple[float, float]], window: float
) -> None:
    filtered, seen, now = WindowedMax(), list[tuple[float, float]](), 0.0
    for later, value in steps:
        now += later
        seen.append((now, value))
        best = filtered.update(now, value, window)
        assert best == filtered.value
        assert best <= max(v for at, v in seen if now - at <= window)
        # A rounding error of "now" may put a value on either side.
        assert best >= max(v for at, v in seen if now - at <= window * 15 / 16 - 1e-9)


@given(STEPS, st.floats(0.1, 20))
def test_the_minimum_is_the_maximum_upside_down(steps: list[tuple[float, float]], window: float) -> None:
    least, largest, now = WindowedMin(), WindowedMax(), 0.0
    for later, value in steps:
        now += later
        assert least.update(now, value, window) == -largest.update(now, -value, window) == least.value


@given(st.lists(st.tuples(ANY, st.floats(allow_nan=False), ANY), min_size=1, max_size=100))
def test_whatever_comes_the_answer_is_a_value_that_came_and_memory_has_a_limit(
    steps: list[tuple[float, float, float]],
) -> None:
    filtered, seen = WindowedMax(), set[float]()
    for now, value, window in steps:
        seen.add(value)
        assert filtered.update(now, value, window) in seen
        assert len(filtered._best) <= 64


def test_ever_worse_values_take_17_places() -> None:
    filtered = WindowedMax()
    for step in range(10_000):
        filtered.update(step / 100, -step, 10.0)
        assert len(filtered._best) <= 17


def test_a_window_that_grows_with_every_value_does_not_take_more_than_the_limit() -> None:
    filtered, now = WindowedMax(), 1.0
    for step in range(2_000):
        now *= 1.1
        assert filtered.update(now, -step, now) <= 0
    assert len(filtered._best) == 64


def test_rounds_are_counted_exactly() -> None:
    filtered = WindowedMax()
    for value in (9, 5, 7, 3):
        filtered.update(1, value, 2)
    assert filtered.update(3, 4, 2) == 9
    assert filtered.update(4, 1, 2) == 4


def test_before_the_first_and_after_clear_there_is_none() -> None:
    largest, least = WindowedMax(), WindowedMin()
    assert (largest.value, least.value) == (None, None)
    largest.update(1.0, 5.0, 1.0)
    least.update(1.0, 6.0, 1.0)
    assert [largest.value, least.value] == [5.0, 6.0]
    largest.clear()
    least.clear()
    assert [largest.value, least.value] == [None, None]


@pytest.mark.parametrize("mtu", [0, -1, 65_528, 1200.0, "1200", None, True])
def test_an_mtu_that_udp_does_not_have_is_refused(mtu: object) -> None:
    with pytest.raises(UsageError, match="from 1 to 65527"):
        limits.checked_mtu(mtu)


@pytest.mark.parametrize("now", [math.nan, math.inf, -math.inf, "1", None, False])
def test_a_time_that_is_none_is_refused(now: object) -> None:
    with pytest.raises(UsageError, match="monotonic clock"):
        limits.checked_now(now)


def test_what_can_be_is_taken() -> None:
    assert limits.checked_mtu(1) == 1
    assert limits.checked_mtu(65_527) == 65_527
    assert limits.checked_now(-5) == -5.0
    assert limits.believable_rate(1e12) == 1e12
    assert limits.believable_rtt(0.0) == 1e-6
    assert limits.believable_rtt(60.0) == 60.0
    assert limits.believable_rtt(None) is None


@given(ANY)
def test_what_cannot_be_is_not_believed(number: float) -> None:
    assert 0.0 <= limits.believable_rate(number) <= limits.RATE_MAXIMUM
    rtt = limits.believable_rtt(number)
    assert rtt is None or limits.RTT_MINIMUM <= rtt <= limits.RTT_MAXIMUM
