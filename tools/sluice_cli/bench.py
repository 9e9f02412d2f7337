# SPDX-License-Identifier: Apache-2.0
"""``sluice bench``: Sluice beside its alternatives, in one run.

Numbers from different runs or machines say little; ratios from one run say more.
So all paths take turns, round after round, and the medians are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import click

from sluice_cli.bench_all import everything
from sluice_cli.bench_connections import connections
from sluice_cli.bench_cpu import cpu
from sluice_cli.bench_flow import flow
from sluice_cli.bench_latency import (
    BATCH_PATHS,
    BATCHES,
    LOADS,
    batch_table,
    batches,
    latencies,
    latency_table,
)
from sluice_cli.bench_machine import cpus, machine
from sluice_cli.bench_measure import SIZES, Contender, Progress, measure, rates_table
from sluice_cli.bench_program import program
from sluice_cli.bench_room import Room
from sluice_cli.bench_soak import soak
from sluice_cli.output import Output, common_options, examples

#: Seconds; with the timer slack that the kernel adds (50 µs) about the time in which 256 packets come.
LINGER: Final = 20e-6

RECEIVE: Final = (
    Contender("xsk-c", "xsk-c", 256),
    Contender("sluice", "sluice", 256),
    Contender("sluice-linger", "sluice", 256, linger=LINGER),
    Contender("xsk-c-touch", "xsk-c", 256, touch=True),
    Contender("sluice-touch", "sluice", 256, touch=True),
    Contender("sluice-linger-touch", "sluice", 256, touch=True, linger=LINGER),
    Contender("sluice-64", "sluice", 64),
    Contender("xsk-generic-c", "xsk-c", 256, mode="generic"),
    Contender("sluice-generic", "sluice", 256, mode="generic"),
    Contender("recvmmsg-c", "mmsg-c", 64),
    Contender("recvmmsg-gro-c", "mmsg-offload-c", 64),
    Contender("sluice-mmsg", "sluice-mmsg", 256),
    Contender("sluice-mmsg-64", "sluice-mmsg", 64),
    Contender("socket", "socket", 1),
    Contender("asyncio", "asyncio", 1),
    Contender("uvloop", "uvloop", 1),
)
TRANSMIT: Final = (
    Contender("xsk-c", "xsk-c", 256),
    Contender("sluice", "sluice", 256),
    Contender("sluice-zero", "sluice-zero", 256),
    Contender("sendmmsg-c", "mmsg-c", 64),
    Contender("sendmmsg-gso-c", "mmsg-offload-c", 64),
    Contender("sluice-mmsg", "sluice-mmsg", 64),
)
ECHO: Final = (
    Contender("xsk-c", "xsk-c", 64),
    Contender("sluice", "sluice", 64),
    Contender("xsk-generic-c", "xsk-c", 64, mode="generic"),
    Contender("sluice-generic", "sluice", 64, mode="generic"),
    Contender("recvmmsg-c", "mmsg-c", 64),
    Contender("sluice-mmsg", "sluice-mmsg", 64),
    Contender("socket", "socket", 1),
    Contender("asyncio", "asyncio", 1),
    Contender("uvloop", "uvloop", 1),
)
#: Who answers single questions: who echoes, and one that polls before it sleeps.
LATENCY: Final = (
    *ECHO[:2],
    Contender("sluice-linger", "sluice", 64, linger=LINGER),
    Contender("sluice-poll", "sluice-poll", 64),
    *ECHO[2:],
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


@click.group(
    epilog=examples(
        """sudo sluice bench all --report docs/benchmarks.md
        sudo sluice bench receive
        sudo sluice bench receive --size 1232 --path sluice --path xsk-c --runs 5
        sudo sluice bench transmit --size 64
        sudo sluice bench fanout --size 1232
        sudo sluice bench manager
        sudo sluice bench echo --json
        sudo sluice bench latency --seconds 10
        sudo sluice bench latency --load flood --path sluice --path recvmmsg-c
        sudo sluice bench batch
        sudo sluice bench cpu
        sudo sluice bench program
        sluice bench flow
        sluice bench connections
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
            click.option("--size", "sizes", multiple=True, type=click.Choice([str(size) for size in SIZES]),
                         help="64: frames of 64 bytes; 512 and 1232: of payload."),
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
    with Room(receiver_cpu=receiver, generator_cpu=generator) as room:
        rows = measure(
            room,
            direction,
            chosen,
            sizes=wanted,
            seconds=seconds,
            runs=runs,
            progress=Progress(output.progress),
        )
    document = {"machine": machine(same_core), "results": rows}
    output.report(document, lambda: output.table(rates_table(direction, rows)))


@bench.command(name="receive")
@_options("receive")
def receive(output: Output, **options: Any) -> None:
    """Receive as fast as it goes: packets per second, CPU, loss, memory.

    "generic" has the program in the kernel's stack instead of the driver; "touch" reads 8 bytes of
    every packet, "linger" waits a moment for larger batches.  A flood is more than most paths can take,
    so "loss" says how much; what counts is the rate that remains.
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
@click.option("--path", "paths", multiple=True, type=click.Choice([path.name for path in LATENCY]),
              help="Only this path.")  # fmt: skip
@click.option("--load", "loads", multiple=True, type=click.Choice(LOADS), help="Only this load.")
@click.option(
    "--seconds", type=click.FloatRange(0.2, 60), default=3.0, show_default=True, help="Of each path."
)
@click.option("--interval", type=click.IntRange(10, 1_000_000), default=200, show_default=True,
              help="Microseconds between questions; on an idle link, after each answer.")  # fmt: skip
@common_options
def latency(
    output: Output, paths: Sequence[str], loads: Sequence[str], seconds: float, interval: int
) -> None:
    """Round trips of single datagrams: idle, at half load, under flood.

    The same C program asks every echo server; "heartbeat" is answered by the XDP program, "poll"
    looks for a millisecond before it sleeps (busy_poll).  At half load the path echoes half of what it
    could (measured first) besides.  The flood goes to the same port; where there are lanes (Sluice), into
    the lower one.
    """
    chosen = [path for path in LATENCY if not paths or path.name in paths]
    with Room(*cpus(same_core=False)) as room:
        rows = latencies(
            room,
            chosen,
            loads=loads or LOADS,
            seconds=seconds,
            interval_us=interval,
            progress=Progress(output.progress),
            heartbeat=not paths,
        )
    document = {"machine": machine(same_core=False), "results": rows}
    output.report(document, lambda: output.table(latency_table(rows)))


@bench.command(name="batch")
@click.option("--batch", "sizes", multiple=True, type=click.Choice([str(size) for size in BATCHES]),
              help="Only this batch size.")  # fmt: skip
@click.option("--path", "paths", multiple=True, type=click.Choice(BATCH_PATHS), help="Only this path.")
@click.option("--seconds", type=click.FloatRange(0.2, 60), default=2.0, show_default=True,
              help="Of each measurement.")  # fmt: skip
@click.option("--interval", type=click.IntRange(10, 1_000_000), default=200, show_default=True,
              help="Microseconds between questions.")  # fmt: skip
@common_options
def batch(output: Output, paths: Sequence[str], sizes: Sequence[str], seconds: float, interval: int) -> None:
    """Batch size against rate and latency: echo as fast as it goes, then round trips at half of that."""
    with Room(*cpus(same_core=False)) as room:
        rows = batches(
            room,
            paths=[path for path in BATCH_PATHS if not paths or path in paths],
            sizes=[size for size in BATCHES if not sizes or str(size) in sizes],
            seconds=seconds,
            interval_us=interval,
            progress=Progress(output.progress),
        )
    document = {"machine": machine(same_core=False), "results": rows}
    output.report(document, lambda: output.table(batch_table(rows)))


for _command in (cpu, program, flow, connections, soak, everything):
    bench.add_command(_command)
