# SPDX-License-Identifier: Apache-2.0
"""``sluice bench cpu``: what a packet costs the whole machine at a steady rate.

Told from idle time: CPUs x seconds that passed, less what /proc/stat says they were idle.  That is
exact where the kernel stops its tick on idle CPUs (NO_HZ): it then adds up the time between entering
and leaving idle, in nanoseconds, interrupts left out.  Busy time in /proc/stat is not: it is guessed
from what runs at each tick, and work in bursts of 100 µs falls between ticks.

The sender (tools/bench/mmsg_paced.c) sleeps between its packets.  What it costs alone, with the server
dropping in the driver what comes, is measured first and subtracted; so what is left is everything from
the steer program to the application, with the kernel's work in between.  What else runs on the machine
is in both, so it cancels as far as it is steady; it is measured as well, and stated as "noise".
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

import click

from sluice_cli.bench_machine import cpus, machine
from sluice_cli.bench_measure import SIZES, Contender, Progress, Row, number
from sluice_cli.bench_process import START_TIMEOUT, read_report
from sluice_cli.bench_room import PORT, Room
from sluice_cli.output import Output, Table, common_options, examples
from xdp.errors import SluiceError

#: Seconds before the measurement, for everything to be under way, and after it before the receiver ends.
_MARGIN: Final = 0.3
_SIZE: Final = 64
#: Seconds: what fewer wake-ups save at what they cost in latency.  200 packets at the higher rate.
_LINGER: Final = 1e-3
#: Less idle time than this part of a CPU, or fewer packets than this part of the rate: the machine had no
#: more to give, and what a packet costs can't be told.
_LEAST_IDLE: Final = 0.02
_LEAST_SENT: Final = 0.95
#: CPUs that other work may have used: it seldom is steady, and the cost is the difference of two runs.
_MOST_NOISE: Final = 0.1


class Load(NamedTuple):
    """A rate (packets/s) with the paths that are compared: ``reference``, and what Sluice may use of it."""

    rate: int
    reference: Contender
    target: float
    others: tuple[Contender, ...]


_OURS: Final = (Contender("sluice", "sluice", 256), Contender("sluice-linger", "sluice", 256, linger=_LINGER))
LOADS: Final = (
    Load(
        200_000,
        Contender("recvmmsg-c", "mmsg-c", 64),
        0.5,
        # What it saves recvmmsg, for a fair comparison.
        (*_OURS, Contender("recvmmsg-linger-c", "mmsg-c", 256, linger=_LINGER)),
    ),
    Load(50_000, Contender("asyncio", "asyncio", 1), 0.1, _OURS),
)


class Window(NamedTuple):
    """A stretch of time: how long, and CPU seconds in which the machine was not idle, and was."""

    seconds: float
    busy: float
    idle: float


def idle_seconds(text: str, ticks_per_second: int) -> float:
    """CPU seconds that all CPUs together have been idle: the first line of /proc/stat (proc(5)).

    Waiting for the disk (iowait) is idling too.
    """
    fields = text.split("\n", 1)[0].split()
    return (int(fields[4]) + int(fields[5])) / ticks_per_second


def _window(seconds: float) -> Window:
    count, hertz = os.cpu_count() or 1, os.sysconf("SC_CLK_TCK")
    stat = Path("/proc/stat")
    began, idle = time.monotonic(), idle_seconds(stat.read_text(encoding="ascii"), hertz)
    time.sleep(seconds)
    took = time.monotonic() - began
    idle = idle_seconds(stat.read_text(encoding="ascii"), hertz) - idle
    return Window(took, max(0.0, took * count - idle), idle)


@click.command(
    epilog=examples(
        """sudo sluice bench cpu
        sudo sluice bench cpu --seconds 5 --json"""
    )
)
@click.option("--rate", "rates", multiple=True, type=click.Choice([str(load.rate) for load in LOADS]),
              help="Only this rate, in packets/s.")  # fmt: skip
@click.option(
    "--seconds", type=click.FloatRange(0.2, 600), default=30.0, show_default=True, help="Of each path."
)
@common_options
def cpu(output: Output, rates: Sequence[str], seconds: float) -> None:
    """Measure what a packet costs the whole machine at a steady rate, by its idle time.

    At 200,000 packets/s beside recvmmsg in C, at 50,000 beside asyncio.  The sender's own cost is
    subtracted.  "linger" sleeps 1 ms before it looks, while packets come fast: fewer wake-ups.  Other
    work on the machine falsifies it: "noise" says how many CPUs were busy before.
    """
    with Room(*cpus(same_core=False)) as room:
        loads = [load for load in LOADS if not rates or str(load.rate) in rates]
        rows = costs(room, loads=loads, seconds=seconds, progress=Progress(output.progress))
    document = {"machine": machine(same_core=False), "results": rows}
    output.report(document, lambda: output.table(cpu_table(rows)))


def costs(room: Room, *, loads: Sequence[Load] = LOADS, seconds: float, progress: Progress) -> list[Row]:
    """A row for each rate and path."""
    progress.say("cpu: the machine by itself")
    quiet = _window(seconds)
    noise = round(quiet.busy / quiet.seconds, 3)
    return [row for load in loads for row in _costs_at(room, load, seconds, noise, progress)]


def _costs_at(room: Room, load: Load, seconds: float, noise: float, progress: Progress) -> list[Row]:
    """The sender alone, then the paths."""
    progress.say(f"cpu, {load.rate:,}/s: the sender alone")
    alone: list[Window] = []
    named = {"path": "sender", "direction": "cpu", "size": _SIZE, "rate": load.rate}

    def send_only() -> Row:
        room.use("native")
        with room.dropping_server():
            window, sent = _send(room, load.rate, seconds)
        alone.append(window)
        return named | _figures(load, window, sent, None, noise)

    sender_row = progress.attempt(named, send_only)
    if not alone:  # without it the paths would be told as too dear
        return [sender_row]
    rows: list[Row] = []
    for path in (load.reference, *load.others):
        progress.say(f"cpu, {load.rate:,}/s: {path.name}")
        of_path = named | {"path": path.name}

        def once(path: Contender = path, of_path: Row = of_path) -> Row:
            return of_path | _cost(room, path, load, seconds, alone[0], noise)

        rows.append(progress.attempt(of_path, once))
    return [sender_row, *with_targets(rows, load)]


def _send(room: Room, rate: int, seconds: float) -> tuple[Window, float]:
    """The machine while the sender sends; and what it did send, packets/s."""
    words = ["--address", str(room.lab.server.ipv4), "--port", str(PORT), "--size", str(SIZES[_SIZE])]
    words += ["--rate", str(rate), "--seconds", str(seconds + 2 * _MARGIN)]
    with room.client_process("mmsg_paced", words) as process:
        time.sleep(_MARGIN)
        window = _window(seconds)
        report = read_report(process, "mmsg_paced", seconds + START_TIMEOUT)
    if not report["packets"]:
        raise SluiceError("the sender sent nothing", hint="run it again with --verbose")
    return window, report["packets"] / report["seconds"]


def _cost(room: Room, path: Contender, load: Load, seconds: float, sender: Window, noise: float) -> Row:
    room.use(path.mode)
    # It begins with the sender's first packet, and ends a little before the sender does.
    task = path.task("receive", SIZES[_SIZE], seconds + _MARGIN * 1.5)
    with room.running(task) as process:
        window, sent = _send(room, load.rate, seconds)
        report = read_report(process, path.name, START_TIMEOUT)
    if not report["packets"]:
        raise SluiceError(f"the path {path.name} received nothing", hint="run it again with --verbose")
    return {
        **_figures(load, window, sent, sender, noise),
        "process_cpu_ns": round(report["process_cpu_ns"] / report["packets"], 1),
        "loss": round(report["lost"] / (report["packets"] + report["lost"]), 4),
        "rss_kib": report["rss_kib"],
        "umem_kib": report["umem_kib"],
    }


def _figures(load: Load, window: Window, sent: float, sender: Window | None, noise: float) -> Row:
    """CPU ns for each packet sent; without the sender's, if it is known."""
    why = None
    if window.idle < _LEAST_IDLE * window.seconds or sent < _LEAST_SENT * load.rate:
        why = "the machine was full"
    elif noise > _MOST_NOISE:
        why = "other work"
    busy = window.busy / window.seconds - (sender.busy / sender.seconds if sender is not None else 0.0)
    return {
        "packets_per_second": round(sent),
        "seconds": round(window.seconds, 3),
        "machine_cpu_ns": round(busy * 1e9 / sent, 1),
        "noise_cpus": noise,
        "not_valid": why,
    }


def with_targets(rows: Sequence[Row], load: Load) -> list[Row]:
    """Each with its machine CPU divided by that of the load's reference, and whether it is little enough."""
    reference = next((row for row in rows if row["path"] == load.reference.name and _counts(row)), None)

    def ratio(row: Row) -> Row:
        if reference is None or not _counts(row):
            return row | {"reference": load.reference.name, "machine_cpu_ratio": None}
        found = round(row["machine_cpu_ns"] / reference["machine_cpu_ns"], 3)
        row = row | {"reference": load.reference.name, "machine_cpu_ratio": found}
        if not row["path"].startswith("sluice"):
            return row
        return row | {"target": load.target, "target_met": found <= load.target}

    return [row if "error" in row else ratio(row) for row in rows]


def _counts(row: Row) -> bool:
    """Whether a ratio can be made of it: it was measured, and is more than what was lost in the noise."""
    return "error" not in row and not row["not_valid"] and float(row["machine_cpu_ns"]) > 0


def cpu_table(rows: Sequence[Row]) -> Table:
    """For people."""
    columns = ["rate", "path", "packets/s", "machine ns", "CPU ns", "loss", "machine ratio", "to",
               "target"]  # fmt: skip
    shown = []
    for row in rows:
        cells = [f"{row['rate']:,}", row["path"]]
        if "error" in row:
            shown.append([*cells, "failed", *["-"] * 6])
            continue
        cells += [f"{row['packets_per_second']:,}", number(row["machine_cpu_ns"], 1)]
        loss = row.get("loss")
        cells += [number(row.get("process_cpu_ns"), 1), "-" if loss is None else f"{loss:.1%}"]
        cells += [number(row.get("machine_cpu_ratio"), 2), row.get("reference", "-")]
        target = f"not valid: {row['not_valid']}" if row["not_valid"] else "-"
        if "target" in row:
            target = f"<= {row['target']} {'met' if row['target_met'] else 'missed'}"
        shown.append([*cells, target])
    noise = next((row["noise_cpus"] for row in rows if "noise_cpus" in row), None)
    title = "machine CPU for each packet at a steady rate"
    if noise is not None:
        title += f" (other work on the machine: {noise:.3f} CPUs)"
    return Table(columns, shown, frozenset({0, 2, 3, 4, 5, 6}), title=title)
