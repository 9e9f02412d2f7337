# SPDX-License-Identifier: Apache-2.0
"""What congestion controllers come to on networks in virtual time: the thresholds of `sluice simulate flow`.

The scenarios are those of userspace/simulation/flow_scenarios.py, shorter where that shows the same.  A
failure tells the seed: `sluice simulate flow --scenario NAME --seconds S --seed N --plot FILE` replays it.
"""

from __future__ import annotations

import pytest

from userspace.flow.registry import CONTROLLERS
from userspace.simulation.flow_report import Report, simulate
from userspace.simulation.flow_scenarios import DEFAULT_CONTROLLER, SCENARIOS, scenario

SEED = 1
#: Simulated seconds: enough for what the thresholds are about, and all together a minute of CPU at most.
SECONDS = {
    "steady": 6.0,
    "codel": 20.0,
    "share": 30.0,
    "fair-queue": 6.0,
    "rtt-fairness": 8.0,
    "loss": 6.0,
    "burst-loss": 6.0,
    "wireless": 6.0,
    "satellite": 40.0,
    "blackhole": 20.0,
    "step": 18.0,
    "long-queue": 6.0,
    "reorder": 6.0,
    "ecn": 20.0,
    "overload": 5.0,
    "latecomer": 18.0,
    "mixed": 10.0,
    "two-bottlenecks": 7.0,
}


def told(report: Report) -> str:
    verdicts = "; ".join(str(verdict) for verdict in report.verdicts)
    return f"{report.scenario.name} with {report.controllers}, seed {report.seed}: {verdicts}"


def test_every_scenario_is_here() -> None:
    assert set(SECONDS) == set(SCENARIOS)


@pytest.mark.parametrize("name", SECONDS)
def test_thresholds(name: str) -> None:
    one = scenario(name)
    controllers = next((found.controllers for found in one.thresholds if found.controllers), ())
    chosen = (
        (DEFAULT_CONTROLLER,) if DEFAULT_CONTROLLER in controllers or not controllers else controllers[:1]
    )
    report, _ = simulate(one, chosen, seed=SEED, seconds=SECONDS[name])
    assert report.verdicts, told(report)
    assert report.ok, told(report)


def test_overload_falls_on_the_oldest_of_the_lowest() -> None:
    """Nothing is refused, and only the lowest class loses anything."""
    report, network = simulate(scenario("overload"), seed=SEED, seconds=5.0)
    high, middle, low = (network.lost(number) for number in range(3))
    assert high == middle == {}, told(report)
    assert set(low) == {"overflow"}, told(report)
    assert report.flows[0]["delay_p99"] < 0.005, told(report)


@pytest.mark.parametrize("controller", sorted(CONTROLLERS))
def test_no_controller_stands_still(controller: str) -> None:
    """Whatever the default is, the others work too: a link is used, a blackhole is survived."""
    report, _ = simulate(scenario("steady"), (controller,), seed=SEED, seconds=4.0)
    assert (report.figures["utilisation"] or 0) > 0.8, told(report)
    report, network = simulate(scenario("blackhole"), (controller,), seed=SEED, seconds=5.0)
    after = sum(network.flows[0].goodput[40:50])
    assert after > 0.2 * sum(network.links[0].capacity[40:50]), told(report)
