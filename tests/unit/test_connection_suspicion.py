# SPDX-License-Identifier: Apache-2.0
"""φ of a silence beside the normal distribution, and the arithmetic of evidence."""

from __future__ import annotations

import math
import random
from statistics import NormalDist, fmean, pstdev

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from userspace.connection.suspicion import (
    DEVIATION_LEAST,
    EVIDENCE,
    INTERVAL_MOST,
    LOSS_LEAST,
    LOSS_MOST,
    QUESTIONS,
    PhiAccrual,
    deviations,
    phi_of,
    questions_needed,
)
from xdp.errors import UsageError

# --- φ


@pytest.mark.parametrize("z", [-8.0, -1.0, 0.0, 0.5, 1.0, 2.0, 3.0, 5.0])
def test_phi_is_the_logarithm_of_the_tail(z: float) -> None:
    assert phi_of(z) == pytest.approx(-math.log10(NormalDist().cdf(-z)), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(
    ("z", "phi"),  # Q(z) as tables have it: 6.22e-16, 2.75e-89, 4.91e-198, 3.69e-350
    [(8.0, 15.2061425510), (20.0, 88.5600942634), (30.0, 197.3092091000), (40.0, 349.4370054000)],
)
def test_phi_far_out(z: float, phi: float) -> None:
    assert phi_of(z) == pytest.approx(phi, rel=1e-7)


def test_phi_has_no_step_and_no_end() -> None:
    assert phi_of(30.0 + 1e-9) - phi_of(30.0) == pytest.approx(0.0, abs=1e-6)
    last = 0.0
    for z in (-1e9, -3.0, 0.0, 1.0, 29.0, 29.999, 30.001, 31.0, 37.6, 38.6, 100.0, 1e5, 1e6):
        assert last <= phi_of(z) < math.inf
        last = phi_of(z)
    assert phi_of(math.inf) == phi_of(1e300) == last
    assert phi_of(-math.inf) == 0.0
    with pytest.raises(UsageError, match="not NaN"):
        phi_of(math.nan)


@pytest.mark.parametrize("phi", [0.5, 1.0, 3.0, 8.0, 16.0, 300.0, 1e4, 1e6])
def test_deviations_are_the_inverse(phi: float) -> None:
    assert phi_of(deviations(phi)) == pytest.approx(phi, rel=1e-9)


@pytest.mark.parametrize("phi", [0.0, 0.3, -1.0, 2e6, math.inf, math.nan])
def test_a_threshold_has_bounds(phi: float) -> None:
    with pytest.raises(UsageError, match="threshold of φ"):
        deviations(phi)


def test_phi_of_a_regular_peer() -> None:
    phi = PhiAccrual(5.0)
    rng = random.Random(4)
    for _ in range(400):
        phi.observe(rng.gauss(2.0, 0.5))
    assert phi.mean == pytest.approx(2.0, abs=0.3)
    assert phi.deviation == pytest.approx(0.5, rel=0.4)
    assert phi.phi(phi.mean) == pytest.approx(math.log10(2))
    assert phi.phi(phi.mean + phi.deviation) == pytest.approx(0.7995, abs=1e-3)
    assert phi.phi(phi.silence(deviations(8.0))) == pytest.approx(8.0)
    assert phi.phi(0.0) < 0.01
    assert "every" in repr(phi)


@pytest.mark.parametrize("seed", range(3))
def test_live_peers_exceed_phi_as_seldom_as_it_says(seed: int) -> None:
    """A few times more often, since mean and deviation are those of the last thirty only."""
    phi, rng = PhiAccrual(2.0), random.Random(seed)
    over, total = {0.5: 0, 1.0: 0, 2.0: 0}, 10_000
    for _ in range(total):
        interval = rng.gauss(2.0, 0.4)
        for level in over:
            over[level] += phi.phi(interval) > level
        phi.observe(interval)
    for level, times in over.items():
        assert 10**-level * 0.7 < times / total < 10**-level * 3


def test_mean_and_deviation_follow() -> None:
    phi = PhiAccrual(5.0)
    for _ in range(200):
        phi.observe(0.1)
    assert phi.mean == pytest.approx(0.1, abs=0.01)
    assert phi.deviation == DEVIATION_LEAST
    values = [0.1] * 3 + [0.7]
    for _ in range(200):
        for value in values:
            phi.observe(value)
    assert phi.mean == pytest.approx(fmean(values), abs=0.05)
    assert phi.deviation == pytest.approx(pstdev(values), rel=0.2)


def test_pauses_teach_patience() -> None:
    """Who falls silent after busy times is asked less and less often, until only the interval is left."""
    phi, waits = PhiAccrual(5.0), []
    for _ in range(300):
        phi.observe(0.1)
    while (wait := phi.silence(deviations(8.0))) < 5.0:
        waits.append(wait)
        phi.observe(wait)
    assert 0.5 < waits[0] < 0.8
    assert waits == sorted(waits)
    assert 3 <= len(waits) <= 8


@settings(max_examples=100, deadline=None)
@given(intervals=st.lists(st.floats(allow_nan=False), max_size=40), silence=st.floats(allow_nan=False))
def test_any_intervals(intervals: list[float], silence: float) -> None:
    phi = PhiAccrual(5.0)
    for interval in intervals:
        phi.observe(interval)
    assert 0.0 <= phi.mean <= INTERVAL_MOST
    assert DEVIATION_LEAST <= phi.deviation <= INTERVAL_MOST
    assert 0.0 <= phi.phi(silence) < math.inf


def test_what_is_no_duration_is_refused() -> None:
    for wrong in (0.0, -1.0, math.nan, math.inf, INTERVAL_MOST + 1):
        with pytest.raises(UsageError, match="expected is seconds"):
            PhiAccrual(wrong)
    phi = PhiAccrual(5.0)
    with pytest.raises(UsageError, match="not NaN"):
        phi.observe(math.nan)
    with pytest.raises(UsageError, match="not NaN"):
        phi.phi(math.nan)
    assert phi.mean == 5.0


# --- evidence


def test_the_figures_beside_the_constant() -> None:
    proof = LOSS_MOST**QUESTIONS
    assert proof == pytest.approx(4.9e-14, rel=0.01)
    assert pytest.approx(30.6, abs=0.05) == EVIDENCE
    hearts = 1000 * 3600 / 4.0
    assert hearts * LOSS_MOST**QUESTIONS == pytest.approx(4.4e-8, rel=0.01)
    assert 10_000 * hearts * LOSS_MOST**QUESTIONS == pytest.approx(4.4e-4, rel=0.01)
    assert hearts * 0.7**68 == pytest.approx(2.6e-5, rel=0.05)
    assert hearts * 0.8**68 == pytest.approx(0.23, rel=0.05)


@pytest.mark.parametrize("loss", [0.1, 0.2, 0.3, 0.45, 0.5, 0.59])
def test_fewer_questions_prove_as_much_where_less_is_lost(loss: float) -> None:
    needed = questions_needed(loss)
    assert loss**needed <= LOSS_MOST**QUESTIONS * (1 + 1e-6)
    assert loss ** (needed - 1) > LOSS_MOST**QUESTIONS


def test_what_was_measured_is_believed_within_bounds() -> None:
    assert [questions_needed(loss) for loss in (-1.0, 0.0, 0.05, LOSS_LEAST)] == [14] * 4
    worst = (LOSS_MOST, 0.99, 1.0, 5.0, math.inf, math.nan)
    assert [questions_needed(loss) for loss in worst] == [QUESTIONS] * 6
    needed = [questions_needed(loss / 100) for loss in range(100)]
    assert needed == sorted(needed)


@pytest.mark.parametrize("loss", [0.1, 0.3, 0.6])
def test_live_peers_leave_so_many_unanswered_as_often_as_computed(loss: float) -> None:
    """Runs of losses, at a length that can be counted: what is extrapolated from is right."""
    rng = random.Random(11)
    run, length, found, total = 0, {0.1: 3, 0.3: 5, 0.6: 12}[loss], 0, 100_000
    for _ in range(total):
        run = run + 1 if rng.random() < loss else 0
        found += run == length
    assert found == pytest.approx(total * (1 - loss) * loss**length, rel=0.35)
