# SPDX-License-Identifier: Apache-2.0
"""``sluice bench all``: every benchmark in one run, a page of it, and plots.

A path that fails costs its own row: "error" stands there in place of figures, and the others go on.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import click

from sluice_cli.bench_cpu import LOADS as RATES
from sluice_cli.bench_cpu import costs
from sluice_cli.bench_latency import BATCH_PATHS, BATCHES, LOADS, batches, latencies
from sluice_cli.bench_machine import cpus, machine
from sluice_cli.bench_measure import SIZES, Contender, Progress, Row, measure
from sluice_cli.bench_program import program_rows
from sluice_cli.bench_report import SECTIONS, write_report
from sluice_cli.bench_room import Room
from sluice_cli.bench_soak import soaks
from sluice_cli.bench_soak_worker import PATHS as SOAK_PATHS
from sluice_cli.output import Output, common_options, examples
from xdp.errors import UsageError

_NAMES: Final = tuple(section.direction for section in SECTIONS)
_RATES: Final = ("receive", "transmit", "echo", "fanout", "manager")
_INTERVAL_US: Final = 200  # between questions
#: Seconds that a run needs besides its measurement: to start a process, and to end it.
_AROUND: Final = 0.4
#: The same of the lab, and of loading the programs whose cost is measured.
_AROUND_ALL: Final = 6.0
#: What --quick runs: one path of each kind.
_QUICK: Final = frozenset(
    ("xsk-c", "sluice", "sluice-linger", "sluice-generic", "recvmmsg-c", "recvmmsg-gro-c", "sendmmsg-c",
     "sendmmsg-gso-c", "sluice-mmsg", "sluice-manager", "socket", "asyncio", "uvloop")
)  # fmt: skip
_QUICK_LATENCY: Final = frozenset(("xsk-c", "sluice", "recvmmsg-c", "sluice-mmsg", "socket"))


@dataclass(frozen=True)
class Plan:
    """What is run, and how long.  ``paths``: only these; empty: all."""

    sections: tuple[str, ...] = _NAMES
    sizes: tuple[int, ...] = tuple(SIZES)
    paths: frozenset[str] = frozenset()
    latency_paths: frozenset[str] = frozenset()
    batches: tuple[int, ...] = BATCHES
    seconds: float = 2.0
    runs: int = 3
    latency_seconds: float = 3.0
    cpu_seconds: float = 30.0
    program_seconds: float = 8.0
    soak_seconds: float = 60.0

    def wanted(self, name: str, only: frozenset[str] | None = None) -> bool:
        """Whether a path of this name is run."""
        return (not self.paths or name in self.paths) and (not only or name in only)

    def contenders(self, direction: str) -> list[Contender]:
        """The paths of a direction."""
        from sluice_cli.bench import PATHS  # which has this command

        return [path for path in PATHS[direction] if self.wanted(path.name)]

    def asked(self) -> list[Contender]:
        """The paths whose latency is measured."""
        from sluice_cli.bench import LATENCY

        return [path for path in LATENCY if self.wanted(path.name, self.latency_paths)]

    def batch_paths(self) -> list[str]:
        """Those that are measured with batches of all sizes."""
        return [path for path in BATCH_PATHS if self.wanted(path)]

    def soak_paths(self) -> list[str]:
        """Those that run for a long time."""
        return [path for path in SOAK_PATHS if self.wanted(path, self.latency_paths)]

    def estimate(self) -> float:
        """Seconds that it will take, about."""
        once = self.seconds + _AROUND
        asking = self.latency_seconds + _AROUND
        latency = len(self.asked())
        paths_at_rates = sum(2 + len(load.others) for load in RATES)
        found = {
            **{name: len(self.contenders(name)) * len(self.sizes) * self.runs * once for name in _RATES},
            "batch": len(self.batch_paths()) * len(self.batches) * (once + asking),
            "latency": asking + latency * (len(LOADS) * asking + 1.0),
            "cpu": self.cpu_seconds + paths_at_rates * (self.cpu_seconds + 2 * _AROUND),
            "program": self.program_seconds + 2 * _AROUND,
            "soak": len(self.soak_paths()) * (self.soak_seconds + 2 * _AROUND),
        }
        return _AROUND_ALL + sum(found[name] for name in self.sections)


QUICK: Final = Plan(
    sizes=(64,), paths=_QUICK, latency_paths=_QUICK_LATENCY, batches=(1, 256), seconds=0.2, runs=1,
    latency_seconds=0.2, cpu_seconds=0.3, program_seconds=0.5, soak_seconds=0.6,
)  # fmt: skip


@click.command(
    name="all",
    epilog=examples(
        """sudo sluice bench all
        sudo sluice bench all --report docs/benchmarks.md
        sudo sluice bench all --quick --json
        sudo sluice bench all --only latency --only cpu --path sluice --path recvmmsg-c"""
    ),
)
@click.option("--quick", is_flag=True, help="One path of each kind, for moments: to try it, not to measure.")
@click.option("--report", "page", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE.md",
              help="Write a page, and plots into a folder beside it.")  # fmt: skip
@click.option("--only", "sections", multiple=True, type=click.Choice(_NAMES), help="Only this benchmark.")
@click.option("--path", "paths", multiple=True, metavar="NAME", help="Only this path, wherever it is.")
@click.option("--size", "sizes", multiple=True, type=click.Choice([str(size) for size in SIZES]),
              help="Only this size.")  # fmt: skip
@click.option(
    "--seconds", type=click.FloatRange(0.2, 60), help="Of each rate and round trip.  [default: 2; 3]"
)
@click.option("--runs", type=click.IntRange(1, 20), help="Rounds of rates.  [default: 3]")
@click.option("--cpu-seconds", type=click.FloatRange(0.2, 600), help="Of each path.  [default: 30]")
@click.option("--soak-minutes", type=click.FloatRange(0.01, 60), help="Of each path.  [default: 1]")
@common_options
def everything(
    output: Output,
    quick: bool,
    page: Path | None,
    sections: Sequence[str],
    paths: Sequence[str],
    sizes: Sequence[str],
    seconds: float | None,
    runs: int | None,
    cpu_seconds: float | None,
    soak_minutes: float | None,
) -> None:
    """Run every benchmark, one after the other.

    Says how long it will take before it begins, and goes on when a path fails: its row then has "error"
    in place of figures, and the exit status is 1.
    """
    plan = _planned(
        quick,
        sections=tuple(sections),
        paths=frozenset(paths),
        sizes=tuple(int(size) for size in sizes),
        seconds=seconds,
        latency_seconds=seconds,
        runs=runs,
        cpu_seconds=cpu_seconds,
        soak_seconds=None if soak_minutes is None else soak_minutes * 60,
    )
    if page is not None and not page.absolute().parent.is_dir():
        raise UsageError(f"there is no folder {page.parent}", hint="make it, or name another file")
    expected = plan.estimate()
    output.note(f"this takes about {_minutes(expected)}; nothing else should run on the machine meanwhile")
    began = time.monotonic()

    def say(text: str) -> None:
        output.progress(f"[{time.monotonic() - began:.0f} of {expected:.0f} s] {text}")

    rows = run(plan, say)
    failed = [row for row in rows if "error" in row]
    document = {
        "machine": machine(same_core=False),
        "made": _made(plan, time.monotonic() - began) | {"quick": quick},
        "results": rows,
    }
    if page is not None:
        written = write_report(document, page)
        output.note(f"wrote {written[0]} and {len(written) - 1} plots")
    output.report(document, lambda: _show(output, rows))
    if failed:
        raise click.exceptions.Exit(1)


def _planned(quick: bool, **changes: Any) -> Plan:
    """The usual plan or the quick one, with what was asked for otherwise.

    Raises:
        UsageError: there are no such paths.
    """
    plan = replace(QUICK if quick else Plan(), **{key: value for key, value in changes.items() if value})
    known = {path.name for name in _RATES for path in Plan().contenders(name)} | set(SOAK_PATHS)
    if unknown := sorted(set(changes["paths"]) - known):
        raise UsageError(f"no path {unknown[0]!r}", hint=f"there are: {', '.join(sorted(known))}")
    if changes["paths"]:
        plan = replace(plan, latency_paths=frozenset())
    return plan


def run(plan: Plan, say: Any) -> list[Row]:
    """The rows of all sections, in the order of the page."""
    progress = Progress(say, survive=True)
    rows: list[Row] = []
    with Room(*cpus(same_core=False)) as room:
        for name in _NAMES:
            if name in plan.sections:
                rows += _section(name, plan, room, progress, rows)
    return rows


def _section(name: str, plan: Plan, room: Room, progress: Progress, before: Sequence[Row]) -> list[Row]:
    if name in _RATES:
        return measure(
            room,
            name,
            plan.contenders(name),
            sizes=plan.sizes,
            seconds=plan.seconds,
            runs=plan.runs,
            progress=progress,
        )
    if name == "batch":
        return batches(
            room,
            paths=plan.batch_paths(),
            sizes=plan.batches,
            seconds=plan.seconds,
            interval_us=_INTERVAL_US,
            progress=progress,
        )
    if name == "latency":
        known = {
            row["path"]: row["packets_per_second"]
            for row in before
            if row["direction"] == "echo" and row["size"] == 64 and "error" not in row
        }
        return latencies(
            room,
            plan.asked(),
            seconds=plan.latency_seconds,
            interval_us=_INTERVAL_US,
            progress=progress,
            capacities=known,
        )
    if name == "cpu":
        return costs(room, seconds=plan.cpu_seconds, progress=progress)
    if name == "program":
        # Its programs are measured by themselves; the lab is idle meanwhile.
        named = {"path": "steer", "direction": "program"}
        rows: list[Row] = []

        def once() -> Row:
            rows.extend(program_rows(plan.program_seconds))
            return {}

        progress.say("program")
        failed = progress.attempt(named, once)
        return [failed] if failed else rows
    return soaks(room, plan.soak_paths(), seconds=plan.soak_seconds, progress=progress)


def _made(plan: Plan, took: float) -> dict[str, Any]:
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "version": _version(),
        "commit": _commit(),
        "took_seconds": round(took, 1),
        "seconds": plan.seconds,
        "runs": plan.runs,
        "latency_seconds": plan.latency_seconds,
        "cpu_seconds": plan.cpu_seconds,
        "soak_seconds": plan.soak_seconds,
    }


def _version() -> str:
    try:
        return metadata.version("sluice")
    except metadata.PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    """Of the checkout that this runs from, "" where that is none; "+" for changes since."""
    folder = Path(__file__).parent
    git = ["git", "-C", str(folder), "-c", f"safe.directory={folder.parents[1]}"]
    try:
        found = subprocess.run(
            [*git, "describe", "--always", "--dirty=+"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return found.stdout.strip()


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} seconds" if seconds < 100 else f"{seconds / 60:.0f} minutes"


def _show(output: Output, rows: Sequence[Row]) -> None:
    shown = []
    for section in SECTIONS:
        found = [row for row in rows if row["direction"] == section.direction]
        if section.direction == "program":  # its table has no place for a failure
            found = [row for row in found if "error" not in row]
        if found:
            shown.append(section.table(found))
    output.tables(shown)
    for row in rows:
        if "error" in row:
            output.line(f"{row['direction']}: {row['path']} failed: {row['error']}", "red")
