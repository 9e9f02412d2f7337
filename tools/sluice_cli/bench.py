# SPDX-License-Identifier: Apache-2.0
"""``sluice bench``: Sluice beside its alternatives, in one run.

Numbers from different runs or machines say little; ratios from one run say more.
So all paths take turns, round after round, and the medians are compared.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Final

import click

from sluice_cli.bench_machine import cpus, machine
from sluice_cli.bench_program import program
from sluice_cli.bench_room import HEARTBEAT_PORT, PORT, SENDING, Room, Sample
from sluice_cli.bench_soak import soak
from sluice_cli.output import Output, Table, common_options, examples

#: Bytes of UDP payload, by the name of the row: 22 makes a frame of 64 bytes.
SIZES: Final = {64: 22, 1232: 1232}

#: Seconds; with the timer slack that the kernel adds (50 µs) about the time in which 256 packets come.
LINGER: Final = 20e-6

_HEARTBEAT_BYTES: Final = 32


@dataclass(frozen=True)
class Contender:
    """One contender: how the room calls it, its batch, whether it reads what it receives, its linger (s)."""

    name: str
    run: str
    batch: int
    touch: bool = False
    linger: float = 0.0


RECEIVE: Final = (
    Contender("xsk-c", "xsk-c", 256),
    Contender("sluice", "sluice", 256),
    Contender("sluice-linger", "sluice", 256, linger=LINGER),
    Contender("xsk-c-touch", "xsk-c", 256, touch=True),
    Contender("sluice-touch", "sluice", 256, touch=True),
    Contender("sluice-linger-touch", "sluice", 256, touch=True, linger=LINGER),
    Contender("sluice-64", "sluice", 64),
    Contender("recvmmsg-c", "mmsg-c", 64),
    Contender("recvmmsg-gro-c", "mmsg-offload-c", 64),
    Contender("sluice-mmsg", "sluice-mmsg", 64),
    Contender("socket", "socket", 1),
    Contender("asyncio", "asyncio", 1),
    Contender("uvloop", "uvloop", 1),
)
TRANSMIT: Final = (
    Contender("xsk-c", "xsk-c", 256),
    Contender("sluice", "sluice", 256),
    Contender("sendmmsg-c", "mmsg-c", 64),
    Contender("sendmmsg-gso-c", "mmsg-offload-c", 64),
    Contender("sluice-mmsg", "sluice-mmsg", 64),
)
ECHO: Final = (
    Contender("xsk-c", "xsk-c", 64),
    Contender("sluice", "sluice", 64),
    Contender("recvmmsg-c", "mmsg-c", 64),
    Contender("sluice-mmsg", "sluice-mmsg", 64),
    Contender("socket", "socket", 1),
    Contender("asyncio", "asyncio", 1),
    Contender("uvloop", "uvloop", 1),
)
#: One payload to each of 200 destinations, as a node of a Turbine tree sends on (its fan-out).
FANOUT: Final = (
    Contender("xsk-c", "xsk-c", 200),
    Contender("sluice", "sluice", 200),
    Contender("sendmmsg-c", "mmsg-c", 200),
    Contender("sluice-mmsg", "sluice-mmsg", 200),
)
#: A program that has one packet at a time: a call for each, or a batch manager.
MANAGER: Final = (
    Contender("sendmmsg-c", "mmsg-c", 64),
    Contender("sluice-each", "sluice-each", 1),
    Contender("sluice-manager", "sluice-manager", 64),
    Contender("sluice-mmsg-each", "sluice-mmsg-each", 1),
    Contender("sluice-mmsg-manager", "sluice-mmsg-manager", 64),
    Contender("sluice-portable-each", "sluice-portable-each", 1),
    Contender("sluice-portable-manager", "sluice-portable-manager", 64),
)
PATHS: Final = {
    "receive": RECEIVE, "transmit": TRANSMIT, "echo": ECHO, "fanout": FANOUT, "manager": MANAGER
}  # fmt: skip

#: What a path's rate is divided by: the C program on libxdp that does the same.
_REFERENCE: Final = {"sluice-touch": "xsk-c-touch", "sluice-linger-touch": "xsk-c-touch"}


@click.group(
    epilog=examples(
        """sudo sluice bench receive
        sudo sluice bench receive --size 1232 --path sluice --path xsk-c --runs 5
        sudo sluice bench transmit --size 64
        sudo sluice bench fanout --size 1232
        sudo sluice bench manager
        sudo sluice bench echo --json
        sudo sluice bench latency --seconds 10
        sudo sluice bench program
        sudo sluice bench soak --minutes 10"""
    )
)
def bench() -> None:
    """Measure Sluice beside its alternatives.

    Traffic stays in a lab that the command makes and takes down.  The generator has
    one CPU, the path under test another; --same-core puts both on one.
    """


def _options(direction: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    names = [path.name for path in PATHS[direction]]

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for option in (
            click.option("--path", "paths", multiple=True, type=click.Choice(names), help="Only this path."),
            click.option("--size", "sizes", multiple=True, type=click.Choice(["64", "1232"]),
                         help="Only this size: frames of 64 bytes, payloads of 1,232."),
            click.option("--seconds", type=click.FloatRange(0.2, 60), default=2.0, show_default=True,
                         help="Of each measurement."),
            click.option("--runs", type=click.IntRange(1, 20), default=3, show_default=True,
                         help="Rounds; medians are reported."),
            click.option("--same-core", is_flag=True, help="Generator and receiver on one CPU."),
        ):  # fmt: skip
            function = option(function)
        return common_options(function)

    return decorate


def _measure(
    output: Output,
    direction: str,
    paths: Sequence[str],
    sizes: Sequence[str],
    seconds: float,
    runs: int,
    same_core: bool,
) -> None:
    chosen = [path for path in PATHS[direction] if not paths or path.name in paths]
    wanted = [int(size) for size in sizes] or list(SIZES)
    receiver, generator = cpus(same_core)
    samples: dict[tuple[str, int], list[Sample]] = {}
    with Room(receiver_cpu=receiver, generator_cpu=generator) as room:
        for size in wanted:
            for number in range(runs):
                for path in chosen:
                    output.progress(f"{direction} {size} B, round {number + 1} of {runs}: {path.name}")
                    sample = room.measure(
                        path.run,
                        direction,
                        size=SIZES[size],
                        batch=path.batch,
                        seconds=seconds,
                        touch=path.touch,
                        linger=path.linger,
                    )
                    samples.setdefault((path.name, size), []).append(sample)
    rows = [_row(path, direction, size, samples) for size in wanted for path in chosen]
    document = {"machine": machine(same_core), "results": rows}
    output.report(document, lambda: output.table(_table(direction, rows)))


def _median(samples: Sequence[Sample], field: str) -> float:
    return float(statistics.median(getattr(sample, field) for sample in samples))


def _ratio(of: Sequence[Sample] | None, to: Sequence[Sample] | None) -> float | None:
    """Of medians, not of pairs: a pause of the machine then spoils one run, not the ratio."""
    if not of or not to:
        return None
    return round(_median(of, "packets_per_second") / _median(to, "packets_per_second"), 3)


def _row(
    path: Contender, direction: str, size: int, samples: dict[tuple[str, int], list[Sample]]
) -> dict[str, Any]:
    own = samples[path.name, size]
    kernel = "sendmmsg-c" if direction in SENDING else "recvmmsg-c"
    reference = samples.get((_REFERENCE.get(path.name, "xsk-c"), size))
    cpu = _median(own, "process_cpu_ns")
    return {
        "path": path.name,
        "direction": direction,
        "size": size,
        "batch": path.batch,
        "packets_per_second": round(_median(own, "packets_per_second")),
        "process_cpu_ns": round(cpu, 1),
        "machine_cpu_ns": round(_median(own, "machine_cpu_ns"), 1),
        "loss": round(_median(own, "loss"), 4),
        "ratio_to_c": _ratio(own, reference),
        "ratio_to_recvmmsg": _ratio(own, samples.get((kernel, size))),
        "cpu_ratio_to_c": round(cpu / _median(reference, "process_cpu_ns"), 2) if reference else None,
        "runs": len(own),
    }


def _table(direction: str, rows: Sequence[dict[str, Any]]) -> Table:
    def number(value: float | None, digits: int = 0) -> str:
        return "-" if value is None else f"{value:,.{digits}f}"

    return Table(
        title=direction,
        columns=[
            "path",
            "size",
            "batch",
            "packets/s",
            "CPU ns",
            "machine ns",
            "loss",
            "to C",
            "CPU to C",
            "to mmsg",
        ],
        rows=[
            [
                row["path"],
                str(row["size"]),
                str(row["batch"]),
                number(row["packets_per_second"]),
                number(row["process_cpu_ns"], 1),
                number(row["machine_cpu_ns"], 1),
                f"{row['loss']:.1%}",
                number(row["ratio_to_c"], 3),
                number(row["cpu_ratio_to_c"], 2),
                number(row["ratio_to_recvmmsg"], 2),
            ]
            for row in rows
        ],
        right=frozenset(range(1, 10)),
    )


@bench.command(name="receive")
@_options("receive")
def receive(output: Output, **options: Any) -> None:
    """Receive as fast as it goes: packets per second, CPU, loss.

    "touch" reads 8 bytes of every packet, "linger" waits a moment for larger batches.  A flood
    is more than any path can take, so "loss" says how much; what counts is the rate that remains.
    """
    _measure(output, "receive", **options)


@bench.command(name="transmit")
@_options("transmit")
def transmit(output: Output, **options: Any) -> None:
    """Send as fast as it goes; the other end drops."""
    _measure(output, "transmit", **options)


@bench.command(name="fanout")
@_options("fanout")
def fanout(output: Output, **options: Any) -> None:
    """Send one payload to each of 200 destinations, again and again; the other end drops.

    "xsk-c" sends frames that are ready-made, which no program with many destinations has.
    """
    _measure(output, "fanout", **options)


@bench.command(name="manager")
@_options("manager")
def manager(output: Output, **options: Any) -> None:
    """Send packets one at a time: a call for each, or through a batch manager."""
    _measure(output, "manager", **options)


@bench.command(name="echo")
@_options("echo")
def echo(output: Output, **options: Any) -> None:
    """Send everything back to where it came from."""
    _measure(output, "echo", **options)


@bench.command(name="latency")
@click.option(
    "--seconds", type=click.FloatRange(0.2, 60), default=3.0, show_default=True, help="Of each path."
)
@click.option("--interval", type=click.IntRange(0, 1_000_000), default=200, show_default=True,
              help="Microseconds between an answer and the next question.")  # fmt: skip
@common_options
def latency(output: Output, seconds: float, interval: int) -> None:
    """Round trips of single datagrams over an otherwise idle link.

    The same C program asks every echo server; "heartbeat" is answered by the XDP program.
    """
    receiver, generator = cpus(same_core=False)
    rows: list[dict[str, Any]] = []
    with Room(receiver_cpu=receiver, generator_cpu=generator) as room:
        for path in ("heartbeat", *(path.run for path in ECHO)):
            output.progress(f"latency: {path}")
            with ExitStack() as cleanup:
                if path != "heartbeat":
                    # The server may outlive the asking by what it takes to start and to be read.
                    cleanup.enter_context(room.echoing(path, size=_HEARTBEAT_BYTES, seconds=seconds + 2))
                report = room.round_trips(
                    HEARTBEAT_PORT if path == "heartbeat" else PORT,
                    size=_HEARTBEAT_BYTES,
                    seconds=seconds,
                    interval_us=interval,
                )
            rows.append(
                {
                    "path": path,
                    "direction": "latency",
                    "size": _HEARTBEAT_BYTES,
                    "packets": report["packets"],
                    "lost": report["lost"],
                    "latency_us": {"p50": report["p50"], "p99": report["p99"], "p99.9": report["p999"]},
                }
            )
    document = {"machine": machine(same_core=False), "results": rows}
    output.report(document, lambda: output.table(_latency_table(rows)))


def _latency_table(rows: Sequence[dict[str, Any]]) -> Table:
    return Table(
        title="round trip, microseconds",
        columns=["path", "packets", "lost", "p50", "p99", "p99.9"],
        rows=[
            [
                row["path"],
                f"{row['packets']:,}",
                str(row["lost"]),
                *(f"{row['latency_us'][name]:.1f}" for name in ("p50", "p99", "p99.9")),
            ]
            for row in rows
        ],
        right=frozenset(range(1, 6)),
    )


bench.add_command(program)
bench.add_command(soak)
