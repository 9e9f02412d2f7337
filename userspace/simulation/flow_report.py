# SPDX-License-Identifier: Apache-2.0
"""Runs a scenario and says what came of it: figures, flows, links, and which thresholds hold.

    report, network = simulate(scenario("codel"), ("bbr",), seed=7)
    report.figures["standing_queue"]     # seconds
    report.ok                            # all thresholds hold
    report.document()                    # all of it, for JSON

=================  =========================================================================================
utilisation        goodput of all flows over the first link, as a part of what it could have carried
delay_p50, _p95,   queueing delay of packets in the first link, seconds
_p99
standing_queue     the delay that the queue did not fall below, seconds (see figures.standing_queue)
loss               packets lost anywhere, as a part of those sent, over the whole run
jain               Jain's index of the goodputs of flows under congestion control
least_share        the least of their goodputs, as a part of an equal share
rtt_fairness       goodput of the flow with the longest round trip, over that with the shortest; None if
                   they are the same
settled            seconds from the last change until the flows had settled (figures.settled_at), None: never
=================  =========================================================================================

All but loss and settled are of the time after the scenario's warm-up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from userspace.simulation.figures import (
    STANDING_INTERVAL,
    fraction,
    jain,
    percentile,
    settled_at,
    standing_queue,
)
from userspace.simulation.flow_scenarios import DEFAULT_CONTROLLER, Scenario, Threshold
from userspace.simulation.flow_sender import BIN, Record
from userspace.simulation.network import Network
from xdp.errors import UsageError

_PERCENTS: Final = (50, 95, 99)
#: Significant digits of figures in documents: more would only show how floats are added.
_DIGITS: Final = 6

Figures = dict[str, float | None]


@dataclass(slots=True)
class Verdict:
    """A threshold, what was found, and whether it holds."""

    threshold: Threshold
    value: float | None
    holds: bool

    def __str__(self) -> str:
        bound = "at least" if self.threshold.at_least is not None else "at most"
        wanted = self.threshold.at_least if self.threshold.at_least is not None else self.threshold.at_most
        found = "never" if self.value is None else f"{self.value:.4g}"
        return f"{self.threshold.figure} {found}, {bound} {wanted:g}"


@dataclass(slots=True)
class Report:
    """What came of a run, without its records."""

    scenario: Scenario
    controllers: tuple[str, ...]
    seed: int
    seconds: float
    packets: int
    events: int
    figures: Figures
    flows: list[dict[str, Any]]
    links: list[dict[str, Any]]
    verdicts: list[Verdict] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether all thresholds hold."""
        return all(verdict.holds for verdict in self.verdicts)

    def document(self) -> dict[str, Any]:
        """For JSON.  The same seed gives the same document."""
        return {
            "scenario": self.scenario.name,
            "about": self.scenario.about,
            "after": self.scenario.after,
            "controllers": list(self.controllers),
            "seed": self.seed,
            "seconds": self.seconds,
            "packets": self.packets,
            "events": self.events,
            "figures": {name: _rounded(value) for name, value in self.figures.items()},
            "flows": [{key: _rounded(value) for key, value in flow.items()} for flow in self.flows],
            "links": [{key: _rounded(value) for key, value in link.items()} for link in self.links],
            "thresholds": [
                {
                    "figure": verdict.threshold.figure,
                    "at_least": verdict.threshold.at_least,
                    "at_most": verdict.threshold.at_most,
                    "value": _rounded(verdict.value),
                    "holds": verdict.holds,
                }
                for verdict in self.verdicts
            ],
            "ok": self.ok,
        }


def simulate(
    scenario: Scenario,
    controllers: Sequence[str] = (DEFAULT_CONTROLLER,),
    *,
    seed: int = 1,
    seconds: float | None = None,
    progress: Callable[[float], None] | None = None,
) -> tuple[Report, Network]:
    """Run it with these controllers, or with its own if it is about certain ones.

    Returns what came of it, and the network with its records over time, which take some megabytes.

    ``seconds`` of virtual time instead of the scenario's.  Raises UsageError for what does not exist or
    is out of range, AssertionError when packets are lost track of (a mistake in the simulation).
    """
    chosen = tuple(controllers) if scenario.controllers is None else scenario.controllers
    if not chosen and scenario.controllers is None:
        raise UsageError("a scenario needs a controller")
    network = Network(seconds=scenario.seconds if seconds is None else seconds, seed=seed)
    scenario.build(network, chosen)
    network.run(progress)
    return report_on(scenario, chosen, seed, network), network


def report_on(scenario: Scenario, controllers: tuple[str, ...], seed: int, network: Network) -> Report:
    """Of a network that this scenario has built and that was run, however that was done."""
    begin, end = scenario.warm_up * network.seconds, network.seconds
    link = network.links[0]
    log = link.link.log
    assert log is not None
    capacity = _between(link.capacity, begin, end)
    controlled = [record for record in network.flows if record.controller]
    crossing = [record for record in network.flows if link.link in record.links]
    goodputs = [_between(record.goodput, max(begin, record.begin), end) for record in controlled]
    delays = sorted(log.delays[place] for place in range(len(log.times)) if log.times[place] >= begin)
    lost = [network.lost(record.number) for record in network.flows]
    interval = max([STANDING_INTERVAL, *(record.rtt for record in network.flows)])
    figures: Figures = {
        "utilisation": fraction(sum(_between(record.goodput, begin, end) for record in crossing), capacity),
        **{f"delay_p{percent}": percentile(delays, percent) for percent in _PERCENTS},
        "standing_queue": standing_queue(log.times, log.delays, begin, end, interval),
        "loss": fraction(sum(sum(reasons.values()) for reasons in lost), network.packets),
        "jain": jain(goodputs) if controlled else None,
        "least_share": fraction(min(goodputs) * len(goodputs), sum(goodputs)) if controlled else None,
        "rtt_fairness": _rtt_fairness(controlled, goodputs),
        "settled": _settled(scenario, network, crossing),
    }
    flows = [
        _flow(network, record, reasons, begin) for record, reasons in zip(network.flows, lost, strict=True)
    ]
    links = [
        {
            "name": watched.link.name,
            "sent": watched.link.sent,
            "delivered": watched.link.delivered,
            "duplicated": watched.link.duplicated,
            "lost": watched.link.lost_by_reason(),
            "queued": watched.link.queued,
            "on_wire": watched.link.on_wire,
        }
        for watched in network.links
    ]
    report = Report(
        scenario,
        controllers,
        seed,
        network.seconds,
        network.packets,
        network.engine.events,
        figures,
        flows,
        links,
    )
    report.verdicts = [
        _judged(threshold, figures, flows)
        for threshold in scenario.thresholds
        if threshold.holds_for(controllers)
    ]
    return report


def _flow(network: Network, record: Record, lost: dict[str, int], begin: float) -> dict[str, Any]:
    since = max(begin, record.begin)
    seconds = record.end - since
    delays = sorted(
        watched.link.log.delays[place]
        for watched in network.links
        if watched.link.log is not None
        for place in range(len(watched.link.log.flows))
        if watched.link.log.flows[place] == record.number and watched.link.log.times[place] >= begin
    )
    return {
        "name": record.name,
        "controller": record.controller,
        "rtt": record.rtt,
        "sent": record.sent,
        "received": record.received,
        "duplicates": record.duplicates,
        "marked": record.marked,
        "probes": record.probes,
        "lost": lost,
        "loss": fraction(sum(lost.values()), record.sent),
        "goodput": fraction(_between(record.goodput, since, record.end), seconds) if seconds > 0 else 0.0,
        **{f"delay_p{percent}": percentile(delays, percent) for percent in _PERCENTS},
    }


def _between(bins: Sequence[float], begin: float, end: float) -> float:
    """Sum of the bins between two times, both of them at the nearest bin's edge."""
    return sum(bins[round(begin / BIN) : round(end / BIN)])


def _rtt_fairness(flows: Sequence[Record], goodputs: Sequence[float]) -> float | None:
    if not flows:
        return None
    order = sorted(range(len(flows)), key=lambda index: flows[index].rtt)
    shortest, longest = order[0], order[-1]
    if math.isclose(flows[shortest].rtt, flows[longest].rtt):
        return None
    return fraction(goodputs[longest], goodputs[shortest])


def _settled(scenario: Scenario, network: Network, flows: Sequence[Record]) -> float | None:
    begin = max([scenario.change * network.seconds, *(record.begin for record in flows)])
    return settled_at([record.goodput for record in flows], network.links[0].capacity, BIN, begin)


def _judged(threshold: Threshold, figures: Figures, flows: Sequence[dict[str, Any]]) -> Verdict:
    owner, _, name = threshold.figure.rpartition(".")
    found = figures if not owner else next(flow for flow in flows if flow["name"] == owner)
    value = found[name]
    assert value is None or isinstance(value, (int, float))
    holds = (
        value is not None
        and (threshold.at_least is None or value >= threshold.at_least)
        and (threshold.at_most is None or value <= threshold.at_most)
    )
    return Verdict(threshold, value, holds)


def _rounded(value: Any) -> Any:
    return float(f"{value:.{_DIGITS}g}") if isinstance(value, float) else value
