# SPDX-License-Identifier: Apache-2.0
"""A thousand seeds of everything that can happen to connections: no promise is broken.

A failure tells scenario, seed, time and what it is; `sluice simulate connections --scenario NAME --seed N -v`
replays it, with all that happens.
"""

from __future__ import annotations

import pytest

from userspace.simulation.connection_report import Outcome, Summary, run
from userspace.simulation.connection_scenarios import SCENARIOS

SEEDS = 1000
#: Scenarios in which nothing dies or comes back, so that nothing is to be found or to be back in time.
UNJUDGED = {"budget", "chaos", "churn", "heavy-loss", "kill", "lifetimes", "line", "pause", "shutdown"}


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_thousand_seeds(name: str) -> None:
    summary = Summary(name)
    for seed in range(1, SEEDS + 1):
        summary.add(run(name, seed))
    assert summary.broken == []
    assert summary.seeds == SEEDS
    assert name in UNJUDGED or summary.counts["judged"] >= SEEDS / 3, summary.counts


def test_an_hour_at_60_percent_loss() -> None:
    """A thousand of them: sluice simulate connections --scenario heavy-loss --seconds 3600 --seeds 1000."""
    outcome = run("heavy-loss", 1, seconds=3600.0)
    assert outcome.broken is None
    assert outcome.counts["pings"] > 1000


def test_hundreds_of_peers() -> None:
    """A link that comes back with a thousand connections: p99 within a second of netlink's report."""
    outcome: Outcome = run("link", 3, scale=170)
    assert outcome.broken is None
    assert outcome.counts["connections"] >= 1000
    back = sorted(outcome.back_after)
    assert not back or back[int(0.99 * (len(back) - 1))] < 1.0
