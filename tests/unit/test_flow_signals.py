# SPDX-License-Identifier: Apache-2.0
"""Signals and their level: each threshold, the hysteresis, and numbers that cannot be."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from userspace.flow.signals import CALM_ROUNDS, CongestionSignals, Level


def rounds(
    signals: CongestionSignals,
    count: int = 1,
    *,
    acknowledged: int = 1000,
    lost: int = 0,
    marked: int = 0,
    rtt: float = 0.040,
    min_rtt: float = 0.040,
) -> Level:
    for _ in range(count):
        signals.end_round(acknowledged=acknowledged, lost=lost, marked=marked, rtt=rtt, min_rtt=min_rtt)
    return signals.level


def test_nothing_is_none() -> None:
    signals = CongestionSignals()
    assert (signals.loss_rate, signals.ecn_share, signals.overflow_share) == (0.0, 0.0, 0.0)
    assert rounds(signals, 10) is Level.NONE
    assert rounds(signals, acknowledged=0) is Level.NONE
    assert "none: loss 0.00%" in repr(signals)


@pytest.mark.parametrize(
    ("what", "level"),
    [
        ({"acknowledged": 981, "lost": 19}, Level.NONE),
        ({"acknowledged": 979, "lost": 21}, Level.MILD),
        ({"acknowledged": 901, "lost": 99}, Level.MILD),
        ({"acknowledged": 899, "lost": 101}, Level.SEVERE),
        ({"marked": 50}, Level.NONE),
        ({"marked": 51}, Level.MILD),
        ({"marked": 501}, Level.SEVERE),
        ({"rtt": 0.0449}, Level.NONE),
        ({"rtt": 0.0499}, Level.NONE),  # 9.9 ms, but less than a quarter
        ({"rtt": 0.0501}, Level.MILD),
        ({"rtt": 0.0059, "min_rtt": 0.001}, Level.NONE),  # six times, but below 5 ms
        ({"rtt": 0.0061, "min_rtt": 0.001}, Level.MILD),
        ({"rtt": 0.139}, Level.MILD),
        ({"rtt": 0.141}, Level.SEVERE),
        ({"rtt": 0.9, "min_rtt": 0.6}, Level.MILD),  # 300 ms, but half
        ({"rtt": 0.9, "min_rtt": 0.0}, Level.NONE),  # no sample yet
    ],
)
def test_thresholds(what: dict[str, float], level: Level) -> None:
    assert rounds(CongestionSignals(), **what) is level  # type: ignore[arg-type]


def test_shares_are_smoothed_by_counts() -> None:
    signals = CongestionSignals()
    rounds(signals, acknowledged=90, lost=10, marked=9)
    assert (signals.loss_rate, signals.ecn_share) == (0.1, 0.1)
    rounds(signals, acknowledged=10)
    assert signals.loss_rate == pytest.approx(10 * 7 / 8 / (100 * 7 / 8 + 10))
    assert signals.ecn_share == pytest.approx(9 * 7 / 8 / (90 * 7 / 8 + 10))


def test_a_level_falls_by_a_step_after_calm_rounds() -> None:
    signals = CongestionSignals()
    assert rounds(signals, rtt=0.200) is Level.SEVERE
    assert rounds(signals, CALM_ROUNDS - 1) is Level.SEVERE
    assert rounds(signals) is Level.MILD
    assert rounds(signals, CALM_ROUNDS - 1) is Level.MILD
    assert rounds(signals) is Level.NONE


def test_a_round_near_the_threshold_keeps_it_up() -> None:
    signals = CongestionSignals()
    rounds(signals, rtt=0.060)
    for _ in range(10):
        # below the threshold of a quarter, above half of it
        assert rounds(signals, CALM_ROUNDS - 1) is Level.MILD
        assert rounds(signals, rtt=0.048) is Level.MILD
    assert rounds(signals, CALM_ROUNDS) is Level.NONE


def test_it_does_not_flap_between_the_drops_of_a_full_queue() -> None:
    signals = CongestionSignals()
    for _ in range(5):
        assert rounds(signals, acknowledged=900, lost=80) is Level.MILD
        assert rounds(signals, CALM_ROUNDS - 1) is Level.MILD


def test_overflow_is_mild_at_once_and_severe_when_it_is_much() -> None:
    signals = CongestionSignals()
    assert signals.on_overflow(0) is Level.NONE
    assert signals.on_overflow(1) is Level.MILD
    assert rounds(signals) is Level.MILD
    assert signals.overflow_share == 1 / 1001
    assert rounds(signals, 2 * CALM_ROUNDS) is Level.NONE
    signals.on_overflow(10**30)
    assert rounds(signals) is Level.SEVERE
    assert signals.overflow_share <= 1.0


def test_silence_is_severe() -> None:
    signals = CongestionSignals()
    assert signals.on_silence(1) is Level.NONE
    assert signals.on_silence(2) is Level.SEVERE
    assert rounds(signals, CALM_ROUNDS) is Level.MILD


@given(
    st.lists(
        st.tuples(
            st.integers(-(10**6), 10**6),
            st.integers(-(10**6), 10**6),
            st.integers(-(10**6), 10**6),
            st.floats(0, 60),
            st.floats(0, 60),
            st.integers(-5, 10**6),
        ),
        max_size=40,
    )
)
def test_any_numbers_keep_shares_in_range(events: list[tuple[int, int, int, float, float, int]]) -> None:
    signals = CongestionSignals()
    for acknowledged, lost, marked, rtt, min_rtt, overflow in events:
        signals.on_overflow(overflow)
        level = rounds(signals, acknowledged=acknowledged, lost=lost, marked=marked, rtt=rtt, min_rtt=min_rtt)
        assert level in Level
        for share in (signals.loss_rate, signals.ecn_share, signals.overflow_share):
            assert 0.0 <= share <= 1.0
        assert 0.0 <= signals.rtt_delay <= 60.0
        assert signals.rtt_increase >= 0.0
        assert not math.isnan(signals.rtt_increase)
