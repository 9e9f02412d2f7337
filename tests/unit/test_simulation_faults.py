# SPDX-License-Identifier: Apache-2.0
"""Loss and what else goes wrong: as often as it should, in bursts as long as they should be."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import groupby
from random import Random
from typing import Any

import pytest

from userspace.simulation.faults import MAX_EXTRA, BurstLoss, Faults, Outage, RandomLoss
from xdp.errors import UsageError

COUNT = 40_000


def draws(loss: RandomLoss | BurstLoss, seed: int = 1) -> list[bool]:
    random = Random(seed)
    return [loss.lost(0.0, random) for _ in range(COUNT)]


def close(found: float, probability: float, count: int = COUNT) -> bool:
    """Within five standard deviations of a share: wrong once in two million."""
    return abs(found - probability) <= 5 * math.sqrt(probability * (1 - probability) / count)


@pytest.mark.parametrize("rate", [0.0, 0.001, 0.01, 0.3, 1.0])
def test_random_loss(rate: float) -> None:
    assert close(sum(draws(RandomLoss(rate))) / COUNT, rate)


def test_bursts_have_their_length_and_share() -> None:
    loss = BurstLoss(0.02, 0.25)
    assert loss.mean == pytest.approx(0.02 / 0.27)
    lost = draws(loss)
    runs = [len(list(group)) for bad, group in groupby(lost) if bad]
    # Lengths are geometric: the mean is 1 / leave, the deviation about the same.
    assert sum(runs) / len(runs) == pytest.approx(4.0, abs=5 * math.sqrt(12 / len(runs)))
    # A burst's packets hang together: the share has the deviation of so many bursts, not of packets.
    assert sum(lost) / COUNT == pytest.approx(loss.mean, rel=5 * 1.4 / math.sqrt(len(runs)))


def test_a_bad_state_that_loses_some() -> None:
    loss = BurstLoss(0.5, 0.5, loss_bad=0.2, loss_good=0.1)
    assert loss.mean == pytest.approx(0.15)
    assert close(sum(draws(loss)) / COUNT, 0.15)


def test_the_state_changes_after_a_packet() -> None:
    """The first packet meets the good state, even where every packet changes it."""
    loss = BurstLoss(1.0, 1.0)
    random = Random(1)
    assert [loss.lost(0.0, random) for _ in range(4)] == [False, True, False, True]


def test_an_outage_has_a_beginning_and_an_end() -> None:
    outage = Outage(1.0, 2.0)
    times = (0.0, 0.999, 1.0, 1.999, 2.0, 3.0)
    assert [outage.lost(now, Random(1)) for now in times] == [False, False, True, True, False, False]


def test_the_first_reason_counts_and_all_states_move() -> None:
    burst = BurstLoss(1.0, 1.0)
    faults = Faults(Random(1), losses=(Outage(0.0, 1.0), burst))
    assert [faults.lost(0.5) for _ in range(4)] == ["outage"] * 4
    assert [faults.lost(1.5) for _ in range(4)] == ["", "burst", "", "burst"]


def test_what_is_off_draws_nothing() -> None:
    random = Random(7)
    faults = Faults(random)
    before = random.getstate()
    assert not faults.happens(faults.corrupt)
    assert not faults.lost(0.0)
    assert random.getstate() == before


MISTAKES: list[tuple[str, Callable[[], Any]]] = [
    ("loss rate", lambda: RandomLoss(1.1)),
    ("loss rate", lambda: RandomLoss(math.nan)),
    ("loss rate", lambda: RandomLoss("0.1")),  # type: ignore[arg-type]
    ("enter", lambda: BurstLoss(-0.1, 0.5)),
    ("leave", lambda: BurstLoss(0.1, 2.0)),
    ("leave is above 0", lambda: BurstLoss(0.1, 0.0)),
    ("loss_bad", lambda: BurstLoss(0.1, 0.1, loss_bad=7)),
    ("loss_good", lambda: BurstLoss(0.1, 0.1, loss_good=-7)),
    ("outage", lambda: Outage(2.0, 1.0)),
    ("outage", lambda: Outage(-1.0, 1.0)),
    ("outage", lambda: Outage(math.nan, 1.0)),
    ("duplicate", lambda: Faults(Random(1), duplicate=1.5)),
    ("corrupt", lambda: Faults(Random(1), corrupt=-1)),
    ("jitter", lambda: Faults(Random(1), jitter=MAX_EXTRA * 2)),
    ("jitter", lambda: Faults(Random(1), jitter=math.nan)),
    ("reorder is", lambda: Faults(Random(1), reorder=True)),
    ("reorder_delay", lambda: Faults(Random(1), reorder_delay=-0.1)),
]


@pytest.mark.parametrize(("says", "make"), MISTAKES)
def test_mistakes(says: str, make: Callable[[], Any]) -> None:
    with pytest.raises(UsageError, match=says):
        make()
