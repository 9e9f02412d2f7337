# SPDX-License-Identifier: Apache-2.0
"""``sluice simulate flow``: congestion controllers on networks in virtual time, with figures and thresholds.

The same seed gives the same output, byte for byte; what a run took is told on stderr only.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from sluice_cli.output import Output, Table, common_options, examples
from sluice_cli.simulate_connections import connections
from xdp.errors import SluiceError, UsageError

if TYPE_CHECKING:
    from userspace.simulation.flow_report import Report
    from userspace.simulation.network import Network

#: Exit status when a threshold was missed.
MISSED: Final = 1
#: Seconds of the clock between two lines of progress.
_PROGRESS_EVERY: Final = 1.0


@click.group(
    epilog=examples(
        """sluice simulate flow
        sluice simulate flow --scenario codel --controller cubic --plot codel.svg
        sluice simulate connections"""
    )
)
def simulate() -> None:
    """Run networks in virtual time, seeded.

    Nothing is sent, and no privileges are needed.
    """


simulate.add_command(connections)


@simulate.command(
    epilog=examples(
        """sluice simulate flow                                  all scenarios
        sluice simulate flow --list                           which are there?
        sluice simulate flow --scenario steady --controller bbr --controller cubic
        sluice simulate flow --scenario step --seed 7 --plot step.svg
        sluice simulate flow --scenario loss --seconds 10 --json"""
    )
)
@click.option(
    "--scenario", "scenarios", multiple=True, metavar="NAME", help="Only this one; may be repeated."
)
@click.option("--controller", "controllers", multiple=True, metavar="NAME",
              help="Instead of the default one; may be repeated.")  # fmt: skip
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=1, show_default=True,
              help="Of all chance: the same seed, the same run.")  # fmt: skip
@click.option("--seconds", type=click.FloatRange(1, 600),
              help="Simulated; thresholds are for the default.  [default: the scenario's]")  # fmt: skip
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE.svg",
              help="Draw throughput, window and queue; several runs make several files.")  # fmt: skip
@click.option("--list", "only_list", is_flag=True, help="List scenarios and controllers, and run nothing.")
@common_options
def flow(
    output: Output,
    scenarios: Sequence[str],
    controllers: Sequence[str],
    seed: int,
    seconds: float | None,
    plot: Path | None,
    only_list: bool,
) -> None:
    """Run congestion controllers on simulated links.

    Reports utilisation, queueing delay, loss and fairness. The scenarios' thresholds are judged for the
    default controller, or the one that they are about; the exit status is 1 when one is missed.
    """
    from userspace.flow.registry import CONTROLLERS
    from userspace.simulation.flow_report import simulate as run
    from userspace.simulation.flow_scenarios import SCENARIOS, controllers_of, scenario

    if only_list:
        _list(output)
        return
    for name in controllers:
        if name not in CONTROLLERS:
            raise UsageError(f"no controller {name!r}", hint=f"there are: {', '.join(CONTROLLERS)}")
    if plot is not None and not plot.absolute().parent.is_dir():
        raise UsageError(f"there is no folder {plot.parent}", hint="make it, or name another file")
    chosen = [scenario(name) for name in dict.fromkeys(scenarios)] or list(SCENARIOS.values())
    asked = tuple(dict.fromkeys(controllers))
    runs = [(one, wanted) for one in chosen for wanted in controllers_of(one, asked)]
    reports: list[Report] = []
    for number, (one, wanted) in enumerate(runs, 1):
        watch = _Watch(output, f"[{number} of {len(runs)}] {one.name}", seconds or one.seconds)
        report, network = run(one, wanted, seed=seed, seconds=seconds, progress=watch.at)
        watch.done(report)
        if plot is not None:
            _draw(output, report, network, plot, alone=len(runs) == 1)
        reports.append(report)
    ok = all(report.ok for report in reports)
    document = {"seed": seed, "runs": [report.document() for report in reports], "ok": ok}
    output.report(document, lambda: _show(output, reports, seed))
    if not ok:
        raise click.exceptions.Exit(MISSED)


class _Watch:
    """Progress of one run, on stderr."""

    def __init__(self, output: Output, what: str, seconds: float) -> None:
        self._output, self._what, self._seconds = output, what, seconds
        self._began = self._told = time.monotonic()

    def at(self, simulated: float) -> None:
        """So many seconds are simulated."""
        now = time.monotonic()
        if now - self._told >= _PROGRESS_EVERY:
            self._told = now
            self._output.progress(f"{self._what}: {simulated:.0f} of {self._seconds:.0f} simulated seconds")

    def done(self, report: Report) -> None:
        """All of them are."""
        took = max(1e-6, time.monotonic() - self._began)
        packets = report.packets
        self._output.progress(f"{self._what}: {packets:,} packets in {took:.1f} s, {packets / took:,.0f}/s")


def _list(output: Output) -> None:
    from userspace.flow.registry import CONTROLLERS
    from userspace.simulation.flow_scenarios import DEFAULT_CONTROLLER, SCENARIOS

    document = {
        "scenarios": [
            {"name": one.name, "about": one.about, "after": one.after, "seconds": one.seconds}
            for one in SCENARIOS.values()
        ],
        "controllers": list(CONTROLLERS),
        "default_controller": DEFAULT_CONTROLLER,
    }

    def show() -> None:
        rows = [[one.name, f"{one.seconds:.0f}", one.about, one.after] for one in SCENARIOS.values()]
        output.table(Table(["scenario", "seconds", "what it is", "after"], rows, right=frozenset({1})))
        output.line()
        output.line(f"controllers: {', '.join(CONTROLLERS)}; {DEFAULT_CONTROLLER} unless another is named")

    output.report(document, show)


def _milliseconds(seconds: Any) -> str:
    return "-" if seconds is None else f"{1000 * seconds:.1f}"


def _part(value: Any) -> str:
    return "-" if value is None else f"{value:.3f}"


def _percent(value: Any) -> str:
    return f"{100 * value:.2f}"


def _show(output: Output, reports: Sequence[Report], seed: int) -> None:
    tables = [_overview(reports)]
    if len(reports) == 1 or output.verbose:
        tables += [_flows(report) for report in reports]
    output.tables(tables)
    output.line()
    for report in reports:
        for verdict in report.verdicts:
            if not verdict.holds or output.verbose or len(reports) == 1:
                said = "holds" if verdict.holds else "missed"
                output.line(f"{report.scenario.name}: {said}: {verdict}", "" if verdict.holds else "red")
    judged = sum(len(report.verdicts) for report in reports)
    missed = sum(not verdict.holds for report in reports for verdict in report.verdicts)
    output.line(f"seed {seed}: {judged} thresholds, {missed} missed", "red" if missed else "green")


def _overview(reports: Sequence[Report]) -> Table:
    columns = ["scenario", "controller", "used", "p50 ms", "p95 ms", "p99 ms", "standing ms", "lost %",
               "jain", "rtt fairness", "settled s", "result"]  # fmt: skip
    rows = []
    for report in reports:
        found = report.figures
        settled = found["settled"]
        rows.append([
            report.scenario.name,
            " ".join(report.controllers),
            _part(found["utilisation"]),
            *(_milliseconds(found[f"delay_p{percent}"]) for percent in (50, 95, 99)),
            _milliseconds(found["standing_queue"]),
            _percent(found["loss"]),
            _part(found["jain"]),
            _part(found["rtt_fairness"]),
            "never" if settled is None else f"{settled:.1f}",
            ("pass" if report.ok else "miss") if report.verdicts else "-",
        ])  # fmt: skip
    styles = {index: "red" for index, report in enumerate(reports) if not report.ok}
    return Table(columns, rows, right=frozenset(range(2, 11)), styles=styles)


def _flows(report: Report) -> Table:
    columns = ["flow", "rtt ms", "sent", "Mb/s", "p50 ms", "p95 ms", "p99 ms", "lost %", "lost", "marked",
               "probes"]  # fmt: skip
    rows = [
        [
            flow["name"],
            _milliseconds(flow["rtt"]),
            f"{flow['sent']:,}",
            f"{flow['goodput'] * 8e-6:.2f}",
            *(_milliseconds(flow[f"delay_p{percent}"]) for percent in (50, 95, 99)),
            _percent(flow["loss"]),
            ", ".join(f"{reason} {count:,}" for reason, count in flow["lost"].items()) or "-",
            f"{flow['marked']:,}",
            str(flow["probes"]),
        ]
        for flow in report.flows
    ]
    title = f"{report.scenario.name}: {report.scenario.about}"
    return Table(columns, rows, right=frozenset({1, 2, 3, 4, 5, 6, 7, 9, 10}), title=title)


def _draw(output: Output, report: Report, network: Network, plot: Path, *, alone: bool) -> None:
    from sluice_cli.simulate_plot import draw

    if not alone:
        name = "-".join((plot.stem, report.scenario.name, *report.controllers))
        plot = plot.with_name(f"{name}{plot.suffix}")
    try:
        plot.write_text(draw(report, network), encoding="utf-8")
    except OSError as error:
        raise SluiceError.from_errno(str(plot), error.errno or 0) from error
    output.note(f"wrote {plot}")
