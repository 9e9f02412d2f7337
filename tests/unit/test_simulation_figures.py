# SPDX-License-Identifier: Apache-2.0
"""Figures of merit, computed by hand for cases where that can be done."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from userspace.simulation.figures import fraction, jain, percentile, settled_at, standing_queue


@pytest.mark.parametrize(
    ("shares", "index"),
    [
        ([5.0, 5.0, 5.0], 1.0),
        ([7.0, 0.0, 0.0, 0.0], 0.25),
        ([1.0, 2.0, 3.0], 36 / 42),
        ([2.0, 1.0], 0.9),
        ([0.0, 0.0], 0.0),
        ([], 0.0),
    ],
)
def test_jain(shares: list[float], index: float) -> None:
    assert jain(shares) == pytest.approx(index)


@given(st.lists(st.floats(0, 1e9), min_size=1, max_size=40), st.floats(0.001, 1e3))
def test_jain_is_bounded_and_knows_no_unit(shares: list[float], unit: float) -> None:
    index = jain(shares)
    assert 0 <= index <= 1 + 1e-9
    assert index == pytest.approx(jain([share * unit for share in shares]), abs=1e-6) or min(shares) < 1e-100


def test_percentile_is_a_value_that_was_there() -> None:
    values = [float(number) for number in range(1, 101)]
    assert [percentile(values, percent) for percent in (0, 1, 50, 95, 99, 100)] == [1, 1, 50, 95, 99, 100]
    assert percentile([3.0, 8.0], 50) == 3.0
    assert percentile([3.0, 8.0], 51) == 8.0
    assert percentile([], 50) == 0.0


def test_a_burst_is_no_standing_queue() -> None:
    """It comes up to 30 ms in each interval, and goes down to 1 ms once."""
    times = [number / 1000 for number in range(1000)]
    delays = [0.001 if number % 100 == 50 else 0.030 for number in range(1000)]
    assert standing_queue(times, delays, 0.0, 1.0, 0.1) == 0.001
    assert (
        standing_queue(times, delays, 0.0, 1.0, 0.05) == 0.001
    )  # in half of the intervals: the lower median
    assert standing_queue(times, delays, 0.0, 1.0, 0.01) == 0.030


def test_a_queue_that_stands() -> None:
    times = [number / 1000 for number in range(3000)]
    delays = [0.0 if time < 1 else 0.015 for time in times]
    assert standing_queue(times, delays, 1.0, 3.0, 0.1) == 0.015
    assert standing_queue(times, delays, 0.0, 1.0, 0.1) == 0.0
    assert standing_queue(times, delays, 0.0, 3.0, 0.1) == 0.015


def test_where_nothing_leaves_nothing_stands() -> None:
    assert standing_queue([0.05], [0.04], 0.0, 1.0, 0.1) == 0.0
    assert standing_queue([], [], 0.0, 1.0, 0.1) == 0.0
    assert standing_queue([], [], 0.0, 0.01, 0.1) == 0.0


CAPACITY = [100.0] * 100  # of bins of 0.1 s


def test_one_flow_has_settled_when_it_fills_the_link() -> None:
    flow = [10.0] * 30 + [95.0] * 70
    # Of the window from 2.9 to 3.9 s nine parts are full: 86.5 of 100; of the next all.
    assert settled_at([flow], CAPACITY, 0.1, 0.0) == pytest.approx(3.0)
    assert settled_at([flow], CAPACITY, 0.1, 2.0) == pytest.approx(1.0)
    assert settled_at([flow], CAPACITY, 0.1, 5.0) == 0.0


def test_it_has_to_stay_so() -> None:
    flow = [95.0] * 35 + [10.0] * 5 + [95.0] * 60
    assert settled_at([flow], CAPACITY, 0.1, 0.0) == pytest.approx(4.0)
    assert settled_at([flow[:70]], CAPACITY[:70], 0.1, 0.0) is None  # not seen long enough


def test_several_have_settled_when_they_share() -> None:
    first = [95.0] * 20 + [60.0] * 80
    second = [0.0] * 20 + [36.0] * 80
    # 60 : 36 has an index of 0.94; a window may have up to a bin of before.
    assert settled_at([first, second], CAPACITY, 0.1, 0.0) == pytest.approx(1.8, abs=0.21)
    assert settled_at([first, [0.0] * 100], CAPACITY, 0.1, 0.0) is None
    assert settled_at([[30.0] * 100, [30.0] * 100], CAPACITY, 0.1, 0.0) is None  # fair, but of little


def test_a_link_that_carries_nothing() -> None:
    assert settled_at([[0.0] * 100], [0.0] * 100, 0.1, 0.0) is None


def test_fraction() -> None:
    assert fraction(1, 4) == 0.25
    assert fraction(1, 0) == 0.0
