# SPDX-License-Identifier: Apache-2.0
"""``sluice lab vm``: zero-copy shown where no card has it, in an emulated machine.

QEMU emulates two cards whose drivers have AF_XDP's zero-copy, and the project's own traffic tests run on
them, with this checkout's code under a kernel from Debian.  Everything is emulated, so it shows what is
right and nothing of how fast it is.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import click

from sluice_cli import vm_guest
from sluice_cli.output import Output, Table, common_options, examples
from sluice_cli.testing import find_checkout
from sluice_cli.vm_image import TIME_IS_OVER, Job
from sluice_cli.vm_machine import DRIVERS, Driver, Outcome, command_line, network_commands, run
from sluice_cli.vm_packages import BACKPORTS, KERNEL, PROGRAMS, SUITE, System, cache, find, provide
from sluice_cli.vm_report import Report, Way, decode, problems
from xdp.errors import PermissionsError

#: Exit code when something is not as asked.
FAILED: Final = 1
#: Seconds for one machine.  A run took 870 on two CPUs that had much else to do: the C of the programs is
#: compiled by an emulated processor, five times.
LIMIT: Final = 1800
_TAIL: Final = 40  # lines of the console that are shown when a machine reports nothing


@dataclass(frozen=True)
class Result:
    """One driver: what its machine reported, if it did, and all that is wrong."""

    driver: Driver
    report: Report | None
    problems: Sequence[str]
    seconds: float
    kept: Sequence[str]


@click.command(
    epilog=examples("""
        sudo sluice lab vm                     both drivers
        sudo sluice lab vm --driver igb -v     one, with the machine's console
        sluice lab vm --plan                   only what it would do
    """)
)
@click.option("--driver", type=click.Choice([*DRIVERS, "all"]), default="all", show_default=True,
              help="Of the emulated cards.")  # fmt: skip
@click.option("--limit", type=click.IntRange(30, 7200), default=LIMIT, show_default=True, metavar="SECONDS",
              help="For each machine; what takes longer is ended and has failed.")  # fmt: skip
@click.option("--keep", is_flag=True, help="Keep each machine's console and report, and say where.")
@click.option("--plan", is_flag=True, help="Say what would be fetched and run, and do nothing.")
@common_options
def vm(output: Output, driver: str, limit: int, keep: bool, plan: bool) -> int:
    """Run the traffic tests in an emulated machine whose cards have zero-copy.

    QEMU and a kernel are fetched once from Debian into a cache, and not installed; the code is this
    checkout's. The machine has no network but the cable between its two cards. Takes some minutes a driver.
    """
    drivers: list[Driver] = [one for one in DRIVERS if driver in (one, "all")]
    root = find_checkout()
    job = job_of(root, limit)
    if plan:
        _show_plan(output, drivers, job)
        return 0
    if os.geteuid() != 0:
        raise PermissionsError("it needs root, for the cards' network", hint="run the command with sudo")
    system = provide(cache(), output.progress)
    results = [_prove(output, system, one, job, keep=keep) for one in drivers]
    ok = not any(one.problems for one in results)
    document = {"kernel": system.kernel, "drivers": [_describe(one) for one in results], "ok": ok}
    output.report(document, lambda: _show(output, results))
    return 0 if ok else FAILED


def job_of(root: Path, limit: int) -> Job:
    """The Python that runs this, on the same files."""
    environment = {
        "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": "/root",
        "LC_ALL": "C.UTF-8",
        "PYTHONPATH": f"{root}:{root / 'tools'}",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    return Job((sys.executable, "-m", vm_guest.__name__), environment, limit)


def _prove(output: Output, system: System, driver: Driver, job: Job, *, keep: bool) -> Result:
    output.progress(f"{driver}: a machine with {system.kernel}, at most {job.limit} s")
    outcome = run(system, driver, job, lambda text: _echo(output, text))
    report, wrong = judge(outcome, job.limit, system.kernel)
    return Result(driver, report, wrong, outcome.seconds, _keep(driver, outcome) if keep else ())


def judge(outcome: Outcome, limit: int, kernel: str) -> tuple[Report | None, list[str]]:
    """The report, and what is wrong with it or with the machine."""
    late = outcome.late or TIME_IS_OVER in outcome.console
    wrong = [f"not done after {limit} s"] if late else []
    try:
        report = decode(outcome.report)
    except ValueError as error:
        lines = readable(outcome.console).splitlines()[-_TAIL:]
        return None, [*wrong, "\n  ".join([f"{error}; its console ends:", *lines])]
    return report, wrong + problems(report, kernel)


def readable(console: str) -> str:
    """A console's text without what moves cursors and sets colours."""
    return re.sub(r"\x1b(\[[0-9;?]*[a-zA-Z]|c)", "", console).replace("\r\n", "\n")


def _echo(output: Output, text: str) -> None:
    if output.verbose and text:
        sys.stderr.write(readable(text))
        sys.stderr.flush()


def _keep(driver: Driver, outcome: Outcome) -> list[str]:
    kept = []
    for name, text in (("console.log", readable(outcome.console)), ("report.json", outcome.report)):
        path = cache() / f"{driver}-{name}"
        path.write_text(text, encoding="utf-8")
        kept.append(str(path))
    return kept


def _describe(result: Result) -> dict[str, Any]:
    report = result.report
    return {
        "driver": result.driver,
        "card": report.driver if report else None,
        "seconds": round(result.seconds, 1),
        "tests_passed": report.passed if report else 0,
        "tests": [asdict(test) for test in report.tests] if report else [],
        "paths": [{**vars(way), "counts": dict(way.counts)} for way in report.paths] if report else [],
        "problems": list(result.problems),
        "kept": list(result.kept),
    }


def _show(output: Output, results: Sequence[Result]) -> None:
    rows = [
        (result.driver, way.name.replace("_", " "), way.mode, *map(_number, _counts(way)))
        for result in results
        for way in (result.report.paths if result.report else ())
    ]
    columns = ["DRIVER", "PATH", "MODE", "QUEUES", "SENT", "RECEIVED", "INTACT", "RING FULL", "LOST BEFORE"]
    if rows:
        output.table(Table(columns, rows, right=frozenset(range(3, 9))))
    for result in results:
        passed = f"{result.report.passed} of {len(result.report.tests)} tests passed" if result.report else ""
        output.line(f"{result.driver}: {passed or 'no report'}, {result.seconds:.0f} s")
        for problem in result.problems:
            output.line(f"  {problem}", "red")
        for path in result.kept:
            output.line(f"  kept: {path}")
    bad = sum(bool(result.problems) for result in results)
    output.line("failed" if bad else "ok", "red" if bad else "green")


def _counts(way: Way) -> tuple[int, ...]:
    """Of the table; the last two are what a flood lost, in its own ring and before the program saw it."""
    names = ("sent", "received", "intact", "flood ring full", "lost before the program")
    return (way.queues, *map(way.count, names))


def _number(value: int) -> str:
    return "-" if value < 0 else str(value)


def _show_plan(output: Output, drivers: Sequence[Driver], job: Job) -> None:
    folder = cache()
    found = find(folder)
    system = found or System(folder, "KERNEL")
    machines = [
        {
            "driver": one,
            "network": [shlex.join(words) for words in network_commands(one)],
            "qemu": shlex.join(command_line(system, one, "INITRAMFS", "CONSOLE", "REPORT")),
        }
        for one in drivers
    ]
    packages = [*PROGRAMS, f"{KERNEL} of {BACKPORTS}"]
    document = {
        "cache": str(folder),
        "fetched": found is not None,
        "suite": SUITE,
        "packages": packages,
        "limit_seconds": job.limit,
        "machines": machines,
        "tests": list(vm_guest.TESTS),
        "left_out": {one: vm_guest.left_out(one) for one in drivers},
    }

    def show() -> None:
        state = f"there: {found.kernel}" if found else "to be fetched"
        output.line(f"packages of Debian {SUITE}: {', '.join(packages)}; in {folder} ({state})")
        for machine in machines:
            output.line(f"\n{machine['driver']}: a machine of its own, at most {job.limit} s")
            for line in machine["network"]:
                output.line(f"  {line}")
            output.line(f"  {machine['qemu']}")
        output.line("\nin it:")
        for test in vm_guest.TESTS:
            output.line(f"  {test}")
        output.line(f"but only what is {vm_guest.WITHOUT!r}, and without:")
        for test, why in {t: w for one in drivers for t, w in vm_guest.left_out(one).items()}.items():
            output.line(f"  {test}: {why}{' (igb only)' if test in vm_guest.LEFT_OUT_OF_IGB else ''}")

    output.report(document, show)
