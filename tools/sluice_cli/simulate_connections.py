# SPDX-License-Identifier: Apache-2.0
"""``sluice simulate connections``: many seeds of what can go wrong, and whether every promise is kept.

Seeds are spread over the processors.  The same scenarios and seeds give the same output, byte for byte; what
a run took is told on stderr only.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import click

from sluice_cli.output import Output, Table, common_options, examples
from xdp.errors import UsageError

if TYPE_CHECKING:
    from userspace.simulation.connection_report import Outcome, Summary

#: Exit status when a promise was broken.
BROKEN: Final = 1
#: Seeds unless told otherwise: some seconds of all scenarios.
SEEDS: Final = 20
#: The largest seed; more seeds than that nobody waits for.
SEED_MAXIMUM: Final = 2**32 - 1
#: Seeds that a process is given at a time: a fraction of a second, so that progress shows.
CHUNK: Final = 20
#: Runs that are not worth processes of their own.
FEW: Final = 40
#: Seconds of the clock between two lines of progress.
_PROGRESS_EVERY: Final = 1.0


class Task(NamedTuple):
    """Seeds of one scenario, for one process."""

    scenario: str
    seeds: range
    scale: float
    seconds: float | None

    def run(self) -> list[Outcome]:
        """Run them."""
        from userspace.simulation.connection_report import run

        return [run(self.scenario, seed, scale=self.scale, seconds=self.seconds) for seed in self.seeds]


@click.command(
    epilog=examples(
        """sluice simulate connections                           all scenarios, some seeds of each
        sluice simulate connections --list                    which are there?
        sluice simulate connections --scenario partition --seeds 1000
        sluice simulate connections --scenario partition --seed 7 --verbose      what happens in it?
        sluice simulate connections --scenario heavy-loss --seconds 3600 --seeds 1000 --json
        sluice simulate connections --scenario stampede --scale 100 --seeds 1"""
    )
)
@click.option(
    "--scenario", "scenarios", multiple=True, metavar="NAME", help="Only this one; may be repeated."
)
@click.option("--seeds", type=click.IntRange(1, SEED_MAXIMUM),
              help=f"Run the seeds from 1 to this.  [default: {SEEDS}]")  # fmt: skip
@click.option("--seed", type=click.IntRange(0, SEED_MAXIMUM), help="Run this one only: it replays a run.")
@click.option("--scale", type=click.FloatRange(0.25, 10_000), default=1.0, show_default=True,
              help="So many times as many peers and users.")  # fmt: skip
@click.option("--seconds", type=click.FloatRange(5, 1_000_000),
              help="Simulated, of each run.  [default: the scenario's]")  # fmt: skip
@click.option("--jobs", type=click.IntRange(1, 1024), help="Processes.  [default: one a processor]")
@click.option("--list", "only_list", is_flag=True, help="List the scenarios, and run nothing.")
@common_options
def connections(
    output: Output,
    scenarios: Sequence[str],
    seeds: int | None,
    seed: int | None,
    scale: float,
    seconds: float | None,
    jobs: int | None,
    only_list: bool,
) -> None:
    """Run connections to peers that die, hang, restart and get lost.

    Pool, health, reconnection and transports of one application, in virtual time: what is true is compared
    with what they say after every step.  A broken promise is told with the command that replays it, and the
    exit status is 1.
    """
    from userspace.simulation.connection_report import check
    from userspace.simulation.connection_scenarios import SCENARIOS, scenario

    if only_list:
        _list(output)
        return
    if seed is not None and seeds is not None:
        raise UsageError("--seed is one run, --seeds are many", hint="use one of them")
    check(scale, seconds or 0.0)
    names = [scenario(name).name for name in dict.fromkeys(scenarios)] or list(SCENARIOS)
    chosen = range(1, (seeds or SEEDS) + 1) if seed is None else range(seed, seed + 1)
    if output.verbose and len(names) * len(chosen) == 1:
        summaries = [_tell(output, Task(names[0], chosen, scale, seconds))]
    else:
        summaries = _run(output, names, chosen, scale, seconds, jobs)
    ok = not any(one.violations for one in summaries)
    document = {
        "first_seed": chosen[0], "seeds": len(chosen), "scale": scale, "seconds": seconds,
        "runs": [one.document() for one in summaries], "ok": ok,
    }  # fmt: skip
    output.report(document, lambda: _show(output, summaries, scale, seconds))
    if not ok:
        raise click.exceptions.Exit(BROKEN)


def _tell(output: Output, task: Task) -> Summary:
    """One run, with all that happens in it on stderr."""
    from userspace.simulation.connection_report import Summary, run

    summary = Summary(task.scenario)
    summary.add(
        run(task.scenario, task.seeds[0], scale=task.scale, seconds=task.seconds,
            tell=lambda now, what: output.error_line(f"{now:10.3f} {what}"))
    )  # fmt: skip
    return summary


def _run(
    output: Output,
    names: Sequence[str],
    seeds: range,
    scale: float,
    seconds: float | None,
    jobs: int | None,
) -> list[Summary]:
    from userspace.simulation.connection_report import Summary

    chunk = CHUNK if scale <= 1.0 and seconds is None else 1
    tasks = [
        Task(name, seeds[at : at + chunk], scale, seconds)
        for name in names
        for at in range(0, len(seeds), chunk)
    ]
    summaries = {name: Summary(name) for name in names}
    began = told = time.monotonic()
    processes = 1 if len(names) * len(seeds) <= FEW else min(len(os.sched_getaffinity(0)), len(tasks))
    with _outcomes(tasks, jobs or processes) as found:
        for task, outcomes in zip(tasks, found, strict=True):
            summary = summaries[task.scenario]
            for outcome in outcomes:
                summary.add(outcome)
            now = time.monotonic()
            if now - told >= _PROGRESS_EVERY or summary.seeds == len(seeds):
                told = now
                output.progress(
                    f"[{names.index(task.scenario) + 1} of {len(names)}] {task.scenario}: {summary.seeds} of "
                    f"{len(seeds)} seeds, {summary.violations} violations, {now - began:.1f} s"
                )
    return list(summaries.values())


@contextmanager
def _outcomes(tasks: Sequence[Task], jobs: int) -> Iterator[Iterator[list[Outcome]]]:
    """What comes of the tasks, in their order, as it comes; processes are gone afterwards, come what may."""
    if jobs == 1:
        yield map(Task.run, tasks)
        return
    # Not by fork: who has threads must not.
    with multiprocessing.get_context("spawn").Pool(jobs, _ignore_interrupt) as pool:
        yield pool.imap(Task.run, tasks)


def _ignore_interrupt() -> None:
    """Ctrl-C reaches all processes of a terminal; the first one ends the others."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _list(output: Output) -> None:
    from userspace.simulation.connection_scenarios import SCENARIOS

    document = {
        "scenarios": [
            {"name": one.name, "about": one.about, "seconds": one.seconds, "endpoints": one.endpoints,
             "users": one.users.count}
            for one in SCENARIOS.values()
        ],
    }  # fmt: skip

    def show() -> None:
        rows = [
            [one.name, f"{one.seconds:.0f}", str(one.endpoints), str(one.users.count), one.about]
            for one in SCENARIOS.values()
        ]
        columns = ["scenario", "seconds", "endpoints", "users", "what it is"]
        output.table(Table(columns, rows, right=frozenset({1, 2, 3})))

    output.report(document, show)


def _seconds(value: Any) -> str:
    return "-" if value is None else f"{value:.2f}"


def _show(output: Output, summaries: Sequence[Summary], scale: float, seconds: float | None) -> None:
    columns = ["scenario", "seeds", "connections", "attempts", "datagrams", "deaths", "found p50 s",
               "most", "back p50 s", "p99", "most", "violations"]  # fmt: skip
    rows, styles = [], {}
    for index, one in enumerate(summaries):
        figures = one.figures()
        counts = [one.counts.get(name, 0) for name in ("connections", "attempts", "datagrams", "deaths")]
        times = [_seconds(figures[name]) for name in
                 ("found_p50", "found_most", "back_p50", "back_p99", "back_most")]  # fmt: skip
        rows.append([one.name, str(one.seeds), *(f"{count:,}" for count in counts), *times,
                     str(one.violations)])  # fmt: skip
        if one.violations:
            styles[index] = "red"
    output.table(Table(columns, rows, right=frozenset(range(1, len(columns))), styles=styles))
    output.line()
    more = "" if scale == 1.0 else f" --scale {scale:g}"
    more += "" if seconds is None else f" --seconds {seconds:g}"
    for one in summaries:
        for broken in one.broken:
            output.line(f"{one.name}, seed {broken.seed}, at {broken.at:.3f} s: {broken.what}", "red")
            output.line(
                f"    sluice simulate connections --scenario {one.name} --seed {broken.seed}{more} -v"
            )
    runs, violations = sum(one.seeds for one in summaries), sum(one.violations for one in summaries)
    output.line(f"{runs:,} runs, {violations} violations", "red" if violations else "green")
