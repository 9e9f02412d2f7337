# SPDX-License-Identifier: Apache-2.0
"""Round-trip times of a connection: mean, peak, baseline and percentiles, whatever is measured."""

from __future__ import annotations

import json
import math
import random
import sys

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from userspace.connection.latency import (
    BASELINE_BEGINS,
    BASELINE_FALL,
    BASELINE_RISE,
    HALVED_AT,
    LEAST,
    MOST,
    PEAK_DECAY,
    Latency,
)
from xdp.errors import UsageError


def steady(count: int, sample: float = 0.050, every: float = 5.0) -> Latency:
    latency = Latency()
    for number in range(count):
        latency.update(number * every, sample)
    return latency


def test_nothing_is_known_at_first() -> None:
    latency = Latency()
    assert (latency.samples, latency.smoothed, latency.timeout()) == (0, 0.0, 0.0)
    assert (latency.peak(100.0), latency.percentile(0.99)) == (0.0, 0.0)
    assert "no sample" in repr(latency)


def test_mean_and_deviation_are_those_of_the_rfc() -> None:
    latency = Latency()
    assert latency.update(1.0, 0.064) == 0.064
    assert (latency.smoothed, latency.deviation, latency.latest) == (0.064, 0.032, 0.064)
    assert latency.timeout() == 0.064 + 4 * 0.032
    latency.update(2.0, 0.080)
    assert latency.deviation == pytest.approx(3 / 4 * 0.032 + 1 / 4 * 0.016)
    assert latency.smoothed == pytest.approx(7 / 8 * 0.064 + 1 / 8 * 0.080)
    latency.update(3.0, 0.010)
    assert latency.smoothed == pytest.approx(7 / 8 * 0.066 + 1 / 8 * 0.010)
    assert latency.deviation == pytest.approx(3 / 4 * 0.028 + 1 / 4 * 0.056)


# --- the peak


def test_the_peak_rises_at_once_and_falls_with_time() -> None:
    latency = steady(10)
    latency.update(45.0, 0.500)
    assert latency.peak(45.0) == 0.500
    assert latency.smoothed < 0.110
    above = 0.500 - latency.smoothed
    assert latency.peak(45.0 + PEAK_DECAY) == pytest.approx(latency.smoothed + above / math.e)
    assert latency.peak(1e9) == pytest.approx(latency.smoothed)  # and never to zero
    assert latency.peak(0.0) == 0.500  # a clock that goes back makes it no better


def test_better_answers_bring_the_peak_down_no_faster_than_time_does() -> None:
    latency = steady(10)
    latency.update(45.0, 0.500)
    for _ in range(100):
        latency.update(45.0, 0.050)
    assert latency.peak(45.0) == 0.500
    latency.update(45.0 + PEAK_DECAY, 0.050)
    assert latency.peak(45.0 + PEAK_DECAY) == pytest.approx(0.050 + 0.450 / math.e)


# --- the baseline


def test_the_baseline_begins_as_a_plain_mean() -> None:
    latency = Latency()
    samples = [0.040 + 0.001 * number for number in range(BASELINE_BEGINS)]
    for number, sample in enumerate(samples):
        latency.update(float(number), sample)
    assert latency.baseline == pytest.approx(sum(samples) / len(samples))


def test_the_baseline_goes_up_slowly_and_down_faster() -> None:
    latency = steady(20)
    begin = latency.baseline
    latency.update(95.0 + 5.0, 0.500)
    assert latency.baseline - begin == pytest.approx(0.450 * 5 / (5 + BASELINE_RISE))
    before = latency.baseline
    latency.update(105.0, 0.010)
    assert before - latency.baseline == pytest.approx((before - 0.010) * 5 / (5 + BASELINE_FALL))


def test_a_route_that_became_longer_is_the_usual_one_after_a_while() -> None:
    latency = steady(40)
    now = 200.0
    while latency.smoothed >= 2 * latency.baseline or latency.smoothed < 0.499:
        now += 5.0
        latency.update(now, 0.500)
    assert 300.0 < now - 200.0 < 900.0


def test_a_moment_without_time_changes_no_baseline() -> None:
    latency = steady(20)
    begin = latency.baseline
    for now in (95.0, 95.0, 12.0, -1e9):
        latency.update(now, 1.0)
    assert latency.baseline == begin


# --- percentiles


@pytest.mark.parametrize("seed", range(3))
def test_percentiles_are_within_a_bucket(seed: int) -> None:
    rng = random.Random(seed)
    samples = [rng.lognormvariate(math.log(0.030), 0.8) for _ in range(HALVED_AT - 1)]
    latency = Latency()
    for number, sample in enumerate(samples):
        latency.update(float(number), sample)
    samples.sort()
    for share in (0.1, 0.5, 0.9, 0.99):
        exact = samples[int(share * len(samples))]
        assert latency.percentile(share) == pytest.approx(exact, rel=0.2)
    assert latency.percentile(0.0) <= samples[0] * 1.2
    assert latency.percentile(1.0) >= samples[-1] * 0.8


def test_what_is_old_is_forgotten() -> None:
    latency = steady(HALVED_AT, 0.100)
    for number in range(4 * HALVED_AT):
        latency.update(1e4 + number, 0.010)
    assert latency.percentile(0.95) == pytest.approx(0.010, rel=0.2)
    assert latency.samples == 5 * HALVED_AT


def test_what_is_rare_survives_halving_and_not_for_ever() -> None:
    latency = Latency()
    for number in range(HALVED_AT):
        latency.update(float(number), 1.0 if number % 100 == 0 else 0.010)
    assert latency.percentile(1.0) == pytest.approx(1.0, rel=0.2)
    assert latency.percentile(0.98) == pytest.approx(0.010, rel=0.2)
    assert latency.percentile(0.995) == pytest.approx(1.0, rel=0.2)
    for number in range(20 * HALVED_AT):
        latency.update(2e3 + number, 0.010)
    assert latency.percentile(1.0) == pytest.approx(0.010, rel=0.2)


def test_a_single_one_survives_halving_once() -> None:
    latency = Latency()
    latency.update(0.0, 1.0)
    for number in range(HALVED_AT):
        latency.update(float(number), 0.010)
    assert latency.percentile(1.0) == pytest.approx(1.0, rel=0.2)
    for number in range(HALVED_AT):
        latency.update(2e3 + number, 0.010)
    assert latency.percentile(1.0) == pytest.approx(0.010, rel=0.2)


def test_a_short_path_is_in_the_first_bucket() -> None:
    latency = steady(10, 3e-6)
    assert latency.percentile(0.5) == 1e-5


def test_the_histogram_does_not_grow() -> None:
    latency = Latency()
    rng = random.Random(1)
    sizes = set()
    for number in range(10 * HALVED_AT):
        latency.update(float(number), rng.lognormvariate(-3, 3))
        assert latency._counts is not None
        assert sum(latency._counts) == latency._total < HALVED_AT
        sizes.add(sys.getsizeof(latency._counts))
    assert len(sizes) == 1
    assert sizes.pop() < 400


# --- whatever comes


@settings(max_examples=100, deadline=None)
@given(
    samples=st.lists(st.tuples(st.floats(-1e9, 1e9), st.floats(allow_nan=False)), min_size=1, max_size=60),
    share=st.floats(0, 1),
)
def test_any_samples_at_any_times(samples: list[tuple[float, float]], share: float) -> None:
    latency = Latency()
    for now, sample in samples:
        assert LEAST <= latency.update(now, sample) <= MOST
        told = latency.snapshot(now)
        for name, value in msgspec.structs.asdict(told).items():
            assert math.isfinite(value), name
            assert 0 <= value <= max(len(samples), MOST) * (1 + 1e-9), name
        assert LEAST <= latency.smoothed <= MOST
        assert LEAST <= latency.baseline <= MOST
        assert told.p50 <= told.p90 <= told.p99
    assert 1e-5 <= latency.percentile(share) <= MOST
    json.loads(msgspec.json.encode(told))


@pytest.mark.parametrize("share", [-0.1, 1.1, math.nan])
def test_what_is_no_share_is_refused(share: float) -> None:
    with pytest.raises(UsageError, match="from 0 to 1"):
        steady(3).percentile(share)


def test_what_is_no_number_is_refused() -> None:
    latency = Latency()
    with pytest.raises(UsageError, match="not NaN"):
        latency.update(0.0, math.nan)
    assert latency.samples == 0
    assert "50.000 ms" in repr(steady(5))
