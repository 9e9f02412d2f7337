# SPDX-License-Identifier: Apache-2.0
"""Round trips of ``sluice bench``: over an idle link, at half load, under flood, with batches of all sizes.

The same C program (tools/bench/ping.c) asks every echo server.  Beside traffic it asks on a fixed grid,
whether or not it has been answered: who asks only after the last answer asks a slow server seldom, and
so measures it at its best.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

from sluice_cli.bench_measure import SIZES, Contender, Progress, Row, number
from sluice_cli.bench_room import HEARTBEAT_PORT, PORT, Room, Sample
from sluice_cli.output import Table

LOADS: Final = ("idle", "half", "flood")
QUANTILES: Final = ("p50", "p99", "p99.9")
#: Batch sizes that are compared, and on which paths.
BATCHES: Final = (1, 8, 64, 256)
BATCH_PATHS: Final = ("sluice", "sluice-mmsg")

_HEARTBEAT_BYTES: Final = 32
#: Bytes of payload of the traffic beside the questions: the smallest frames.
_TRAFFIC_BYTES: Final = SIZES[64]


#: Seconds that a server outlives the asking: to start, to be answered late, to be read.
_LONGER: Final = 4.0
#: Seconds; what a path can take is known well enough after so many.
_CAPACITY_SECONDS: Final = 1.0
_HEARTBEAT: Final = Contender("heartbeat", "heartbeat", 1)
_REFERENCE: Final = {"sluice": "xsk-c", "sluice-linger": "xsk-c", "sluice-poll": "xsk-c", "xsk-c": "xsk-c",
                     "sluice-generic": "xsk-generic-c", "xsk-generic-c": "xsk-generic-c"}  # fmt: skip
#: Of all paths over kernel sockets.
_KERNEL_REFERENCE: Final = "recvmmsg-c"


def latencies(
    room: Room,
    chosen: Sequence[Contender],
    *,
    loads: Sequence[str] = LOADS,
    seconds: float,
    interval_us: int,
    progress: Progress,
    heartbeat: bool = True,
    capacities: Mapping[str, float] | None = None,
) -> list[Row]:
    """A row for each load and path.  Heartbeats, which the kernel program answers, over an idle link only.

    ``capacities``: what paths can echo (packets/s), where that is known; of others it is measured.
    """
    known = capacities or {}
    rows: list[Row] = []
    for load in loads:
        of_load: list[Row] = []
        for path in (_HEARTBEAT, *chosen) if heartbeat and load == "idle" else chosen:
            progress.say(f"latency, {load}: {path.name}")
            named = {"path": path.name, "direction": "latency", "load": load, "size": _HEARTBEAT_BYTES}

            def once(path: Contender = path, load: str = load, named: Row = named) -> Row:
                return named | _round_trips(room, path, load, seconds, interval_us, known.get(path.name))

            of_load.append(progress.attempt(named, once))
        rows += with_ratios(of_load)
    return rows


def _round_trips(
    room: Room, path: Contender, load: str, seconds: float, interval_us: int, most: float | None
) -> Row:
    """``most``: packets/s that the path can echo; None: measure it."""
    room.use(path.mode)
    if path is _HEARTBEAT:
        asked = room.round_trips(
            HEARTBEAT_PORT, size=_HEARTBEAT_BYTES, seconds=seconds, interval_us=interval_us
        )
        return _answers(asked, 0.0)
    rate: float | None = 0.0
    if load == "half":
        if most is None:
            most = capacity(room, path, min(seconds, _CAPACITY_SECONDS)).packets_per_second
        rate = most / 2
    elif load == "flood":
        rate = None
    # Only Sluice has lanes.  All others are flooded where they are asked: there is one queue.
    lanes = load == "flood" and path.run in {"sluice", "sluice-poll"}
    server = replace(path.task("echo", _HEARTBEAT_BYTES, seconds + _LONGER), lanes=2 if lanes else 1)
    with contextlib.ExitStack() as cleanup:
        if lanes:
            cleanup.enter_context(room.two_lanes())
        if rate != 0:
            cleanup.enter_context(room.dropping_client(answers_only=True))
        cleanup.enter_context(room.running(server))
        if rate != 0:
            cleanup.enter_context(room.traffic(_TRAFFIC_BYTES, seconds + _LONGER, rate))
        asked = room.round_trips(
            PORT, size=_HEARTBEAT_BYTES, seconds=seconds, interval_us=interval_us, beside_traffic=rate != 0
        )
    return _answers(asked, rate)


def capacity(room: Room, path: Contender, seconds: float) -> Sample:
    """What a path sends back when it is given more than it can take."""
    return room.measure(path.task("echo", _TRAFFIC_BYTES, seconds))


def _answers(asked: Row, rate: float | None) -> Row:
    """``rate`` of the traffic beside it; None: flat out."""
    heard = asked["packets"] > asked["lost"]
    names = zip(QUANTILES, ("p50", "p99", "p999"), strict=True)
    return {
        "packets": asked["packets"],
        "lost": asked["lost"],
        "beside_packets_per_second": None if rate is None else round(rate),
        "latency_us": {name: asked[key] if heard else None for name, key in names},
    }


def with_ratios(rows: Sequence[Row]) -> list[Row]:
    """Each with its latencies divided by those of the C program that does the same, under the same load."""
    found = {row["path"]: row["latency_us"] for row in rows if "latency_us" in row}

    def ratios(row: Row) -> dict[str, float | None] | None:
        reference = found.get(_REFERENCE.get(row["path"], _KERNEL_REFERENCE))
        if reference is None or row["path"] == _HEARTBEAT.name:
            return None
        own = row["latency_us"]
        return {
            name: round(own[name] / reference[name], 2) if own[name] and reference[name] else None
            for name in QUANTILES
        }

    return [row | {"latency_ratio_to_c": ratios(row)} if "latency_us" in row else row for row in rows]


def batches(
    room: Room,
    *,
    paths: Sequence[str] = BATCH_PATHS,
    sizes: Sequence[int] = BATCHES,
    seconds: float,
    interval_us: int,
    progress: Progress,
) -> list[Row]:
    """For each path and batch size what it can echo, and round trips at half of that."""
    rows: list[Row] = []
    for name in paths:
        for batch in sizes:
            progress.say(f"batch: {name}, {batch}")
            path = Contender(name, name, batch)
            named = {"path": name, "direction": "batch", "size": 64, "batch": batch}

            def once(path: Contender = path, named: Row = named) -> Row:
                return named | _batch(room, path, seconds, interval_us)

            rows.append(progress.attempt(named, once))
    return rows


def _batch(room: Room, path: Contender, seconds: float, interval_us: int) -> Row:
    most = capacity(room, path, seconds)
    return {
        "packets_per_second": round(most.packets_per_second),
        "process_cpu_ns": round(most.process_cpu_ns, 1),
        "machine_cpu_ns": round(most.machine_cpu_ns, 1),
        "loss": round(most.loss, 4),
        "rss_kib": most.rss_kib,
        "umem_kib": most.umem_kib,
        "load": "half",
        **_round_trips(room, path, "half", seconds, interval_us, most.packets_per_second),
    }


def latency_table(rows: Sequence[Row]) -> Table:
    """For people."""
    columns = ["load", "path", "beside/s", "packets", "lost", "p50", "p99", "p99.9", "p50 to C", "p99 to C"]
    shown = []
    for row in rows:
        cells = [row["load"], row["path"]]
        if "error" in row:
            shown.append([*cells, "failed", *["-"] * 7])
            continue
        ratios = row["latency_ratio_to_c"] or {}
        beside = row["beside_packets_per_second"]
        cells += ["flat out" if beside is None else f"{beside:,}", f"{row['packets']:,}", f"{row['lost']:,}"]
        cells += [number(row["latency_us"][name], 1) for name in QUANTILES]
        shown.append([*cells, number(ratios.get("p50"), 2), number(ratios.get("p99"), 2)])
    return Table(columns, shown, frozenset(range(2, len(columns))), title="round trip, microseconds")


def batch_table(rows: Sequence[Row]) -> Table:
    """For people."""
    columns = ["path", "batch", "packets/s", "CPU ns", "machine ns", "p50 at half load", "p99", "p99.9"]
    shown: list[list[str]] = []
    for row in rows:
        cells = [row["path"], str(row["batch"])]
        if "error" in row:
            shown.append([*cells, "failed", *["-"] * 5])
            continue
        cells += [number(row["packets_per_second"]), number(row["process_cpu_ns"], 1)]
        cells.append(number(row["machine_cpu_ns"], 1))
        shown.append([*cells, *(number(row["latency_us"][name], 1) for name in QUANTILES)])
    title = "batch size: echo, and its round trip at half of that rate in microseconds"
    return Table(columns, shown, frozenset(range(1, len(columns))), title=title)
