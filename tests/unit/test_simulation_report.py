# SPDX-License-Identifier: Apache-2.0
"""Scenarios and what is reported of them: every one runs, figures are those of the records, seeds replay."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from userspace.flow.registry import CONTROLLERS
from userspace.simulation.disciplines import TailDrop
from userspace.simulation.flow_report import Report, simulate
from userspace.simulation.flow_scenarios import DEFAULT_CONTROLLER, SCENARIOS, Scenario, Threshold, scenario
from userspace.simulation.network import Network
from xdp.errors import UsageError

RATE = 1.25e6  # bytes/s


def small(network: Network, controllers: tuple[str, ...]) -> None:
    """Two flows of 20 and 60 ms, one of which begins late, and a source that heeds nothing."""
    link = network.link("link", rate=RATE, delay=0.01, queue=TailDrop(limit_bytes=40_000))
    network.flow("near", (link,), controller=controllers[0], back=0.01)
    network.flow("far", (link,), controller=controllers[0], back=0.05, begin=network.seconds / 4)
    network.source("source", (link,), rate=RATE / 10)


SMALL = Scenario(
    "small", "two flows and a source", "nothing", small, seconds=8.0, warm_up=1 / 2, change=1 / 4
)


@pytest.fixture(scope="module")
def ran() -> tuple[Report, Network]:
    return simulate(SMALL, ("cubic",), seed=3)


@pytest.fixture
def short() -> Scenario:
    return replace(SMALL, seconds=2.0)


def test_figures_are_those_of_the_records(ran: tuple[Report, Network]) -> None:
    report, network = ran
    figures = report.figures
    near, far, source = network.flows
    shares = [sum(record.goodput[40:80]) for record in (near, far)]
    assert figures["utilisation"] == pytest.approx((sum(shares) + sum(source.goodput[40:80])) / (RATE * 4))
    assert figures["jain"] == pytest.approx(sum(shares) ** 2 / 2 / (shares[0] ** 2 + shares[1] ** 2))
    assert figures["least_share"] == pytest.approx(2 * min(shares) / sum(shares))
    assert figures["rtt_fairness"] == pytest.approx(shares[1] / shares[0])
    log = network.links[0].link.log
    assert log is not None
    waits = sorted(delay for time, delay in zip(log.times, log.delays, strict=True) if time >= 4.0)
    assert figures["delay_p50"] == pytest.approx(waits[len(waits) // 2], rel=0.01)
    assert waits[-1] >= (figures["delay_p99"] or 0) > waits[int(0.98 * len(waits))]
    assert 0 <= (figures["standing_queue"] or 0) <= (figures["delay_p50"] or 0)
    lost = sum(sum(network.lost(number).values()) for number in range(3))
    assert figures["loss"] == lost / network.packets > 0


def test_flows_and_links_are_told(ran: tuple[Report, Network]) -> None:
    report, network = ran
    assert [flow["name"] for flow in report.flows] == ["near", "far", "source"]
    assert [flow["rtt"] for flow in report.flows] == pytest.approx([0.02, 0.06, 0.01])
    for flow, record in zip(report.flows, network.flows, strict=True):
        assert flow["sent"] == record.sent
        assert flow["goodput"] == pytest.approx(sum(record.goodput[40:80]) / 4)
        assert 0 < flow["delay_p50"] <= flow["delay_p95"] <= flow["delay_p99"] <= 40_000 / RATE + 0.001
    (link,) = report.links
    assert link["sent"] == link["delivered"] + sum(link["lost"].values()) + link["queued"] + link["on_wire"]
    assert link["sent"] == sum(flow["sent"] for flow in report.flows)


def test_the_same_seed_gives_the_same_bytes(short: Scenario) -> None:
    def text(seed: int) -> str:
        return json.dumps(simulate(short, ("cubic",), seed=seed)[0].document())

    assert text(3) == text(3)
    assert text(3) != text(4)


def test_thresholds_are_judged_for_whom_they_are(short: Scenario) -> None:
    thresholds = (
        Threshold("utilisation", at_least=0.1, controllers=("newreno",)),
        Threshold("utilisation", at_most=0.1, controllers=("cubic", "newreno")),
        Threshold("far.probes", at_most=1000, controllers=("newreno",)),
        Threshold("settled", at_most=1000.0, controllers=("newreno",)),
        Threshold("utilisation", at_least=2.0, controllers=("cubic",)),
        Threshold("utilisation", at_least=2.0),  # of the default, which is another
    )
    judged, _ = simulate(replace(short, thresholds=thresholds), ("newreno",))
    expected = [True, False, True, False]
    assert [verdict.holds for verdict in judged.verdicts] == expected
    assert not judged.ok
    assert str(judged.verdicts[1]).endswith(", at most 0.1")
    assert str(judged.verdicts[3]) == "settled never, at most 1000"  # two seconds show nothing
    document = judged.document()
    assert [entry["holds"] for entry in document["thresholds"]] == expected
    assert document["ok"] is False
    assert simulate(short, ("newreno",))[0].ok
    default, _ = simulate(replace(short, thresholds=thresholds[-1:]), (DEFAULT_CONTROLLER,))
    assert [verdict.holds for verdict in default.verdicts] == [False]


def test_a_scenario_about_certain_controllers_runs_with_these() -> None:
    about = replace(SMALL, controllers=("newreno",), seconds=1.0)
    found, _ = simulate(about, ("cubic",))
    assert found.controllers == ("newreno",)
    assert {flow["controller"] for flow in found.flows} == {"newreno", ""}


def test_only_sources() -> None:
    def build(network: Network, controllers: tuple[str, ...]) -> None:
        assert controllers == ()
        link = network.link("link", rate=RATE, queue=TailDrop(limit_packets=5))
        network.source("source", (link,), rate=RATE / 2)

    found, _ = simulate(Scenario("s", "a source", "", build, seconds=2.0, controllers=()))
    assert (found.figures["jain"], found.figures["least_share"], found.figures["rtt_fairness"]) == (None,) * 3
    assert found.figures["utilisation"] == pytest.approx(0.5, rel=0.05)


def test_a_flow_that_begins_after_the_end() -> None:
    def build(network: Network, controllers: tuple[str, ...]) -> None:
        link = network.link("link", rate=RATE, queue=TailDrop(limit_packets=5))
        network.flow("never", (link,), controller=controllers[0], back=0.01, begin=2.0)

    found, _ = simulate(Scenario("s", "nothing", "", build, seconds=2.0), ("cubic",))
    assert found.flows[0]["goodput"] == found.figures["utilisation"] == found.figures["loss"] == 0.0


def test_mistakes() -> None:
    with pytest.raises(UsageError, match="no scenario 'none'") as caught:
        scenario("none")
    assert "steady" in caught.value.hint
    with pytest.raises(UsageError, match="needs a controller"):
        simulate(SMALL, ())
    with pytest.raises(UsageError, match="seconds"):
        simulate(SMALL, ("cubic",), seconds=0)
    with pytest.raises(UsageError, match="no congestion controller 'none'"):
        simulate(SMALL, ("none",))


@pytest.mark.parametrize("name", SCENARIOS)
def test_every_scenario_runs(name: str) -> None:
    """For a moment; tests/simulation has what they come to."""
    one = scenario(name)
    found, _ = simulate(one, seconds=0.3, seed=2)
    assert found.packets >= 10
    assert one.name == name
    assert one.about
    assert one.after.startswith("RFC")
    assert one.thresholds
    flows = {flow["name"] for flow in found.flows}
    for threshold in one.thresholds:
        owner, _, figure = threshold.figure.rpartition(".")
        assert figure in (found.figures if not owner else found.flows[0])
        assert not owner or owner in flows
        assert (threshold.at_least is None) != (threshold.at_most is None)
        assert set(threshold.controllers) <= set(CONTROLLERS)
    assert json.loads(json.dumps(found.document()))["scenario"] == name
