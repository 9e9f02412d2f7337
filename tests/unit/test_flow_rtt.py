# SPDX-License-Identifier: Apache-2.0
"""Round-trip time: RFC 9002's formulas with numbers, and whatever numbers a network can send."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from userspace.flow.rtt import (
    GRANULARITY,
    INITIAL_RTT,
    LEAST_RTT,
    MOST_RTT,
    RttEstimator,
)
from xdp.errors import UsageError


def test_before_a_sample_the_rfc_guesses() -> None:
    rtt = RttEstimator()
    assert (rtt.smoothed, rtt.variance, rtt.minimum) == (INITIAL_RTT, INITIAL_RTT / 2, 0.0)
    assert rtt.pto() == INITIAL_RTT + 4 * INITIAL_RTT / 2 + 0.025
    assert rtt.loss_delay() == 9 / 8 * INITIAL_RTT
    assert rtt.first_sample_at == math.inf
    assert "no sample" in repr(rtt)


def test_the_first_sample_is_taken_as_it_is() -> None:
    rtt = RttEstimator()
    assert rtt.update(1.0, 0.064, ack_delay=0.020) == 0.064
    assert (rtt.latest, rtt.smoothed, rtt.variance, rtt.minimum) == (0.064, 0.064, 0.032, 0.064)
    assert rtt.first_sample_at == 1.0
    assert rtt.pto() == 0.064 + 4 * 0.032 + 0.025
    assert "64.000 ms" in repr(rtt)


def test_later_ones_are_smoothed() -> None:
    rtt = RttEstimator()
    rtt.update(1.0, 0.064)
    rtt.update(2.0, 0.096, ack_delay=0.016)
    # 96 - 16 = 80; variance 3/4 * 32 + 1/4 * |64 - 80|; smoothed 7/8 * 64 + 1/8 * 80
    assert rtt.latest == 0.096
    assert rtt.variance == pytest.approx(0.028, rel=1e-12)
    assert rtt.smoothed == pytest.approx(0.066, rel=1e-12)
    assert rtt.minimum == 0.064
    assert rtt.loss_delay() == 9 / 8 * 0.096
    assert rtt.loss_delay(2.0) == 2 * 0.096


def test_the_delay_is_limited_to_what_was_promised() -> None:
    rtt = RttEstimator(max_ack_delay=0.010)
    rtt.update(1.0, 0.050)
    rtt.update(2.0, 0.100, ack_delay=5.0)
    assert rtt.smoothed == pytest.approx(7 / 8 * 0.050 + 1 / 8 * 0.090, rel=1e-12)


def test_the_delay_is_not_subtracted_below_the_minimum() -> None:
    rtt = RttEstimator()
    rtt.update(1.0, 1 / 16)
    rtt.update(2.0, 5 / 64, ack_delay=1.5 / 64)  # would be 3.5/64
    first = 7 / 8 * 1 / 16 + 1 / 8 * 5 / 64
    assert rtt.smoothed == first
    rtt.update(3.0, 5 / 64, ack_delay=1 / 64)  # exactly the minimum
    assert rtt.smoothed == 7 / 8 * first + 1 / 8 * 1 / 16


def test_the_minimum_ignores_the_delay() -> None:
    rtt = RttEstimator()
    rtt.update(1.0, 0.050)
    rtt.update(2.0, 0.040, ack_delay=0.020)
    assert rtt.minimum == 0.040


def test_granularity_bounds_both_periods() -> None:
    rtt = RttEstimator(max_ack_delay=0)
    for second in range(100):
        rtt.update(float(second), 1e-5)
    assert rtt.pto() == pytest.approx(1e-5 + GRANULARITY)
    assert rtt.loss_delay() == GRANULARITY


def test_a_longer_route_is_believed_after_the_window() -> None:
    rtt = RttEstimator(minimum_window=10.0)
    rtt.update(0.0, 0.020)
    for tick in range(1, 200):
        rtt.update(tick / 10, 0.080)
        assert rtt.minimum == (0.020 if tick < 100 else 0.080), tick


def test_a_short_sample_is_never_missed_nor_kept_too_long() -> None:
    rtt = RttEstimator(minimum_window=10.0)
    for tick in range(600):
        now = tick / 10
        rtt.update(now, 0.010 if tick == 230 else 0.050)
        if tick < 230:
            assert rtt.minimum == 0.050
        elif tick < 230 + 50:
            assert rtt.minimum == 0.010  # half a window at least
        elif tick > 230 + 100:
            assert rtt.minimum == 0.050  # and one at most


def test_without_a_window_the_minimum_stays() -> None:
    rtt = RttEstimator(minimum_window=None)
    rtt.update(0.0, 0.020)
    rtt.update(1e9, 0.080)
    assert rtt.minimum == 0.020


def test_the_minimum_begins_again_with_the_latest() -> None:
    rtt = RttEstimator()
    rtt.restart_minimum(0.0)
    assert rtt.minimum == 0.0
    rtt.update(0.0, 0.020)
    rtt.update(1.0, 0.080)
    rtt.restart_minimum(1.0)
    assert rtt.minimum == 0.080


@pytest.mark.parametrize(
    ("setting", "value"),
    [("initial", 0.0), ("initial", math.nan), ("initial", True), ("initial", "1"), ("max_ack_delay", -1.0),
     ("max_ack_delay", math.inf), ("minimum_window", 0), ("minimum_window", math.inf)],
)  # fmt: skip
def test_settings_are_checked(setting: str, value: float) -> None:
    with pytest.raises(UsageError, match=f"{setting} is seconds from"):
        RttEstimator(**{setting: value})


@given(
    st.lists(
        st.tuples(
            st.floats(0, 1e6),
            st.floats() | st.integers(),
            st.floats() | st.integers(),
        ),
        max_size=60,
    )
)
def test_any_numbers_keep_it_in_range(samples: list[tuple[float, float, float]]) -> None:
    rtt, now = RttEstimator(), 0.0
    for step, sample, delay in samples:
        now += step
        taken = rtt.update(now, sample, delay)
        assert LEAST_RTT <= taken <= MOST_RTT
        assert LEAST_RTT <= rtt.minimum <= rtt.latest <= MOST_RTT
        assert LEAST_RTT <= rtt.smoothed <= MOST_RTT
        assert 0 <= rtt.variance <= MOST_RTT
        assert GRANULARITY <= rtt.loss_delay() <= 9 / 8 * MOST_RTT
        assert 0 < rtt.pto() <= 5 * MOST_RTT + 0.025
