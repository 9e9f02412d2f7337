# SPDX-License-Identifier: Apache-2.0
"""``sluice bench connections``: what connections cost that are there, and what their coming and going leaves.

=======  ==============================================================================================
calls    a live connection, looked up or borrowed and given back, while 10,000 are idle; beside the pools of
         two database drivers (:mod:`sluice_cli.bench_connections_rivals`)
memory   10,000 UDP connections that have been idle for half a minute, with pool, health and all else, and
         1,024 QUIC connections, each kind in a process of its own
         (:mod:`sluice_cli.bench_connections_memory`)
cycles   10,000 connects and disconnects a minute over sockets: memory, descriptors and timers, minute by
         minute (:mod:`sluice_cli.bench_connections_cycles`); only with --cycles, since it takes its time
=======  ==============================================================================================

Averages are CPU time of many calls in a row, the median of the rounds, which take turns.  For the 99th
percentile each call is timed on its own; what reading the clock takes (its median) is taken off.
"""

from __future__ import annotations

import gc
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import cycle
from typing import Any, Final

import click

from sluice_cli.bench_connections_rivals import Timed, asyncpg, psycopg_pool, timed
from sluice_cli.output import Output, Table, common_options, examples
from userspace.connection.pool import ConnectionPool
from userspace.connection.pool_settings import PoolSettings
from userspace.connection.slots import Close, Lease
from xdp.errors import SluiceError, UnsupportedError

#: Of each round.
CALLS: Final = 20_000
#: Of the endpoints that are asked for.
_SEED: Final = 1
#: Seconds that a measurement of memory may take.
_PATIENCE: Final = 600.0


def live_pool(size: int, now: float = 0.0) -> ConnectionPool:
    """As many endpoints, each with one connection that is live and idle."""
    settings = PoolSettings(min_size=size, max_size=size, idle_timeout=None, max_lifetime=None)
    pool = ConnectionPool(now, settings, rng=random.Random(_SEED))
    for endpoint in range(size):
        pool.add_endpoint(now, endpoint)
    pool.warm_pool(now)
    while actions := pool.take_actions():
        for action in actions:
            assert not isinstance(action, Close)
            pool.on_opened(now, action.connection)
    if pool.idle_count != size:
        raise SluiceError(f"{pool.idle_count} of {size} connections are live")
    return pool


def run_lookup(pool: ConnectionPool, size: int, calls: int) -> Timed:
    """``lookup``, of an endpoint by chance."""
    keys = random.Random(_SEED).choices(range(size), k=calls)
    following = cycle(keys)
    lookup = pool.lookup
    start = time.process_time()
    for key in keys:
        lookup(1.0, key)
    spent = time.process_time() - start
    return spent, timed(lambda: lookup(1.0, next(following)), 0, calls)[1]


def run_loans(pool: ConnectionPool, size: int, calls: int, *, named: bool) -> Timed:
    """``acquire`` and ``release``, of an endpoint by chance or of whichever is best."""
    keys = random.Random(_SEED).choices(range(size), k=calls)
    following = cycle(keys)
    acquire, release = pool.acquire, pool.release

    def loan() -> None:
        lease = acquire(1.0, endpoint=next(following) if named else None)
        assert type(lease) is Lease
        release(1.0, lease)

    return timed(loan, calls, calls)


def _clock_cost() -> int:
    """Nanoseconds that a timed call of nothing takes."""
    return int(statistics.median(timed(lambda: None, 0, 10_000)[1]))


def call_rows(size: int, rounds: int, progress: Callable[[str], None]) -> list[dict[str, Any]]:
    """A row for each way to get a connection."""
    pool = live_pool(size)
    ways: dict[str, Callable[[], Timed]] = {
        "sluice lookup": lambda: run_lookup(pool, size, CALLS),
        "sluice acquire, release": lambda: run_loans(pool, size, CALLS, named=True),
        "sluice acquire, release of any": lambda: run_loans(pool, size, CALLS, named=False),
        "psycopg_pool getconn, putconn": lambda: psycopg_pool(size, CALLS),
        "asyncpg acquire, release": lambda: asyncpg(size, CALLS),
    }
    found: dict[str, list[Timed]] = {way: [] for way in ways}
    missing: dict[str, str] = {}
    for number in range(rounds):
        for way, run in ways.items():
            progress(f"{way}, round {number + 1} of {rounds}")
            if way in missing:
                continue
            gc.collect()
            gc.freeze()  # what is there already is not what a call costs
            try:
                found[way].append(run())
            except UnsupportedError as error:
                missing[way] = str(error)
            finally:
                gc.unfreeze()
    cost = _clock_cost()
    return [_call_row(way, size, found[way], cost, missing.get(way)) for way in ways]


def _call_row(way: str, size: int, found: list[Timed], cost: int, missing: str | None) -> dict[str, Any]:
    row: dict[str, Any] = {"direction": "calls", "way": way, "connections": size}
    if missing is not None:
        return row | {"skipped": missing}
    each = sorted(max(0, nanoseconds - cost) for _, times in found for nanoseconds in times)
    return row | {
        "mean_us": statistics.median(spent for spent, _ in found) / CALLS * 1e6,
        "p99_us": each[len(each) * 99 // 100] / 1e3,
        "max_us": each[-1] / 1e3,
    }


def memory_rows(udp: int, quic: int, progress: Callable[[str], None]) -> list[dict[str, Any]]:
    """A row for each kind of connection."""
    rows = []
    for kind, count in (("udp", udp), ("quic", quic)):
        if count:
            progress(f"{count} {kind} connections")
            rows.append({"direction": "memory", **_child("bench_connections_memory", kind, str(count))})
    return rows


def cycle_rows(minutes: float, output: Output) -> list[dict[str, Any]]:
    """A row for each minute, told as it comes."""
    command = ["setpriv", "--pdeathsig", "KILL", "--", sys.executable,
               "-m", "sluice_cli.bench_connections_cycles", str(minutes)]  # fmt: skip
    rows = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            row = json.loads(line)
            rows.append({"direction": "cycles", **row})
            output.progress(
                f"minute {row['minute']:g}: {row['cycles']:,} cycles, {row['bytes'] / 1e6:.2f} MB"
            )
    if process.returncode:
        raise SluiceError("the process with the cycles failed", hint="what it said is above")
    return rows


def _child(module: str, *words: str) -> dict[str, Any]:
    """What a module of ours prints when it is run with these words.  Raises SluiceError."""
    command = [sys.executable, "-m", f"sluice_cli.{module}", *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE, check=False)
        found: dict[str, Any] = json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        raise SluiceError(f"{module} {words[0]}: nothing after {_PATIENCE:.0f} s") from None
    except ValueError:
        lines = done.stderr.strip().splitlines() or ["it said nothing"]
        raise SluiceError(f"{module} {words[0]}: {lines[-1]}", detail=done.stderr) from None
    return found


def calls_table(rows: list[dict[str, Any]]) -> Table:
    """For people."""
    return Table(
        ["", "connections", "mean µs", "p99 µs", "max µs"],
        [
            [row["way"], f"{row['connections']:,}", *(
                [f"{row[name]:.2f}" for name in ("mean_us", "p99_us", "max_us")]
                if "skipped" not in row else ["-", "-", "-"]
            )]
            for row in rows
        ],
        right=frozenset({1, 2, 3, 4}),
        title="a live connection",
    )  # fmt: skip


def memory_table(rows: list[dict[str, Any]]) -> Table:
    """For people."""
    return Table(
        ["", "connections", "MB", "bytes each", "idle, % of a CPU"],
        [
            [row["kind"], f"{row['connections']:,}", f"{row['bytes'] / 1e6:.1f}",
             f"{row['bytes'] / row['connections']:,.0f}",
             "-" if row["idle_cpu"] is None else f"{row['idle_cpu']:.1%}"]
            for row in rows
        ],
        right=frozenset({1, 2, 3, 4}),
        title="idle connections, with all that belongs to them",
    )  # fmt: skip


def cycles_table(rows: list[dict[str, Any]]) -> Table:
    """For people: what there is at the end of each minute."""
    return Table(
        ["minute", "cycles", "MB", "descriptors", "timers", "connections", "% of a CPU"],
        [
            [f"{row['minute']:g}", f"{row['cycles']:,}", f"{row['bytes'] / 1e6:.2f}", str(row["descriptors"]),
             str(row["timers"]), str(row["connections"]), f"{row['cpu']:.1%}"]
            for row in rows
        ],
        right=frozenset(range(7)),
        title="connects and disconnects",
    )  # fmt: skip


@click.command(
    epilog=examples(
        """sluice bench connections
        sluice bench connections --only calls --connections 1000 --json
        sluice bench connections --cycles --minutes 1
        sluice bench connections --only cycles"""
    )
)
@click.option("--only", type=click.Choice(["calls", "memory", "cycles"]), multiple=True,
              help="Only that; may be repeated.  [default: calls and memory]")  # fmt: skip
@click.option("--connections", "size", type=click.IntRange(10, 100_000), default=10_000, show_default=True,
              help="UDP connections, and those that calls choose from.")  # fmt: skip
@click.option("--quic", type=click.IntRange(0, 10_000), default=1024, show_default=True,
              help="QUIC connections; 0: none.")  # fmt: skip
@click.option("--rounds", type=click.IntRange(1, 100), default=5, show_default=True,
              help="Medians are reported.")  # fmt: skip
@click.option("--cycles", is_flag=True, help="Let connections come and go as well, for --minutes.")
@click.option("--minutes", type=click.FloatRange(0.05, 1440), default=10.0, show_default=True,
              help="Of cycles.")  # fmt: skip
@common_options
def connections(
    output: Output,
    only: tuple[str, ...],
    size: int,
    quic: int,
    rounds: int,
    cycles: bool,
    minutes: float,
) -> None:
    """Measure what connections cost: a look-up, memory, coming and going.

    Needs no privileges, and no database for the pools beside it.
    """
    wanted = set(only or ("calls", "memory")) | ({"cycles"} if cycles else set())
    calls = call_rows(size, rounds, output.progress) if "calls" in wanted else []
    memory = memory_rows(size, quic, output.progress) if "memory" in wanted else []
    minute = cycle_rows(minutes, output) if "cycles" in wanted else []
    tables = [
        table(rows)
        for table, rows in ((calls_table, calls), (memory_table, memory), (cycles_table, minute))
        if rows
    ]

    def show() -> None:
        output.tables(tables)
        for row in calls:
            if "skipped" in row:
                output.note(f"{row['way']}: {row['skipped']}")

    output.report({"results": [*calls, *memory, *minute]}, show)
