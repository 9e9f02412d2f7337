# SPDX-License-Identifier: Apache-2.0
"""``sluice bench soak``: a steady rate for a long time.  Nothing may be lost, nothing may grow.

Every packet carries a number.  What was sent has to be what was received and what each place says
that it lost; and the numbers' exclusive or shows that none was taken twice in another's place.
"""

from __future__ import annotations

import contextlib
import json
import select
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Final

import click

from sluice_cli.bench_machine import cpus, machine
from sluice_cli.bench_measure import Progress
from sluice_cli.bench_process import end, failed, wait_ready
from sluice_cli.bench_room import PORT, Room
from sluice_cli.bench_soak_worker import INTERVAL, PATHS
from sluice_cli.bench_worker import Arguments
from sluice_cli.generator import GeneratorResult, Stream
from sluice_cli.output import Output, Table, common_options, examples
from sluice_cli.traffic import Template

#: Bytes of UDP payload: a shred's, the largest usual datagram of the validators this is made for.
_SIZE: Final = 1232
#: The part of a run whose samples say nothing of growth: imports, caches and pools fill up in it.
_WARM_UP: Final = 0.2
#: Seconds; what shorter ones say of an hour is noise.
_SHORTEST: Final = 45.0
#: Seconds that the sender may be late, and catch up, before it gives packets up: longer than pauses of
#: busy machines, for the receiver has to be measured, not the sender.
_BACKLOG: Final = 1.0
_BATCH: Final = 256
RATE: Final = 50_000  # packets per second: what a busy validator's shreds come at, and more


@click.command(
    epilog=examples(
        """sudo sluice bench soak
        sudo sluice bench soak --minutes 60 --path sluice --json
        sudo sluice bench soak --minutes 1 --rate 20000"""
    )
)
@click.option(
    "--minutes", type=click.FloatRange(0.01, 60), default=10.0, show_default=True, help="Of each path."
)
@click.option("--rate", type=click.IntRange(100, 5_000_000), default=RATE, show_default=True,
              help="Packets per second.")  # fmt: skip
@click.option(
    "--size", type=click.IntRange(16, 1472), default=_SIZE, show_default=True, help="Bytes of payload."
)
@click.option("--path", "paths", multiple=True, type=click.Choice(list(PATHS)), help="Only this path.")
@common_options
def soak(output: Output, minutes: float, rate: int, size: int, paths: Sequence[str]) -> None:
    """Receive at a steady rate for a long time: losses, stalls, growth of memory and descriptors.

    Exit status 0 only if no path lost anything and all counters add up.
    """
    with Room(*cpus(same_core=False)) as room:
        rows = soaks(
            room, paths or tuple(PATHS), rate=rate, size=size, seconds=minutes * 60,
            progress=Progress(output.progress),
        )  # fmt: skip
    ok = all(row["ok"] for row in rows)
    document = {"machine": machine(same_core=False), "results": rows, "ok": ok}
    output.report(document, lambda: output.table(soak_table(rows)))
    if not ok:
        raise click.exceptions.Exit(1)


def soaks(
    room: Room,
    paths: Sequence[str] = tuple(PATHS),
    *,
    rate: int = RATE,
    size: int = _SIZE,
    seconds: float,
    progress: Progress,
) -> list[dict[str, Any]]:
    """A row for each path, one after the other."""
    room.use("native")
    rows = []
    for path in paths:
        named = {"path": path, "direction": "soak", "size": size, "rate": rate}

        def once(path: str = path) -> dict[str, Any]:
            with room.timestamps():
                return _soak(progress, room, path, rate=rate, size=size, seconds=seconds)

        rows.append(progress.attempt(named, once))
    return rows


def _soak(
    progress: Progress, room: Room, path: str, *, rate: int, size: int, seconds: float
) -> dict[str, Any]:
    arguments = Arguments(
        path=path,
        direction="soak",
        interface=room.lab.server.interface,
        map_id=room.program.maps["xsks"].info.id,
        cookie=room.program.cookie,
        batch=_BATCH,
        size=size,
        port=PORT,
    )
    command = [sys.executable, "-m", "sluice_cli.bench_soak_worker", json.dumps(asdict(arguments))]
    pipe = subprocess.PIPE
    process = room.lab.server.popen(
        ["taskset", "-c", str(room.receiver_cpu), *command], stdin=pipe, stdout=pipe, stderr=pipe, text=True
    )
    with contextlib.ExitStack() as cleanup:
        cleanup.callback(end, process)
        wait_ready(process, path)
        template = Template(room.frame(size), stamp=0)
        stream = Stream([template], rate=rate, count=max(1, int(rate * seconds)), backlog=_BACKLOG)
        room.generator.start([stream])
        cleanup.callback(room.generator.stop)
        samples: list[dict[str, Any]] = []
        while room.generator.running:
            _read(process, samples, path)
            if samples:
                so_far = samples[-1]
                progress.say(
                    f"soak {path}: {so_far['seconds']:.0f} of {seconds:.0f} s, {so_far['packets']:,} packets"
                )
        sent = room.generator.wait()
        assert process.stdin is not None
        process.stdin.close()
        while not samples or "lost" not in samples[-1]:
            _read(process, samples, path)
    return row(path, size, rate, sent, samples)


def _read(process: subprocess.Popen[str], samples: list[dict[str, Any]], path: str) -> None:
    """The next sample, if one comes in time."""
    assert process.stdout is not None
    if not select.select([process.stdout], [], [], 4 * INTERVAL)[0]:
        if process.poll() is not None:
            raise failed(process, path)
        return
    try:
        samples.append(json.loads(process.stdout.readline()))
    except ValueError:
        raise failed(process, path) from None


def mark_of(count: int) -> int:
    """The exclusive or of 0 to ``count`` - 1, each as its 8 bytes are read in the other byte order."""
    last = count - 1
    total = (last, 1, last + 1, 0)[last % 4] if count else 0
    return int.from_bytes(total.to_bytes(8, sys.byteorder), "big")


def growth(samples: Sequence[dict[str, Any]], field: str) -> float | None:
    """Per hour, by the best straight line (least squares) after the warm-up; None: too short a run."""
    later = [sample for sample in samples if sample["seconds"] >= _WARM_UP * samples[-1]["seconds"]]
    if later[-1]["seconds"] - later[0]["seconds"] < _SHORTEST:
        return None
    times = [sample["seconds"] for sample in later]
    values = [sample[field] for sample in later]
    mean = sum(times) / len(times)
    spread = sum((at - mean) ** 2 for at in times)
    slope: float = sum((at - mean) * value for at, value in zip(times, values, strict=True)) / spread
    return round(slope * 3600, 2)


def row(
    path: str, size: int, rate: int, sent: GeneratorResult, samples: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """What a run has shown."""
    first, last = samples[0], samples[-1]
    received = last["packets"]
    lost = sent.sent - received
    dropped = {place: count for place, count in {"interface": sent.refused, **last["lost"]}.items() if count}
    balanced = lost == sum(dropped.values())
    # Without a loss the numbers are known; with one they are not.
    whole = lost > 0 or last["mark"] == mark_of(sent.sent)
    return {
        "path": path,
        "direction": "soak",
        "size": size,
        "rate": rate,
        "packets_per_second": round(sent.rate),
        "seconds": round(sent.seconds, 3),
        "sent": sent.sent,
        "late": sum(stream.missed for stream in sent.streams),
        "received": received,
        "lost": lost,
        "dropped": dropped,
        "balanced": balanced and whole,
        "process_cpu_ns": round((last["cpu_ns"] - first["cpu_ns"]) / max(1, received - first["packets"]), 1),
        "gap_ms": max(sample["gap_ms"] for sample in samples),
        "oldest_ms": max(sample["oldest_ms"] for sample in samples),
        "rss_kib": last["rss_kib"],
        "rss_kib_per_hour": growth(samples, "rss_kib"),
        "descriptors": last["descriptors"],
        "descriptors_per_hour": growth(samples, "descriptors"),
        "ok": balanced and whole and not lost,
    }


def _per_hour(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def soak_table(rows: Sequence[dict[str, Any]]) -> Table:
    """For people."""
    columns = ["path", "packets/s", "seconds", "sent", "lost", "CPU ns", "gap ms", "oldest ms", "KiB",
               "KiB/hour", "descriptors", "per hour", "adds up"]  # fmt: skip
    shown = [
        [row["path"], "failed", *["-"] * 11]
        if "error" in row
        else [
            row["path"], f"{row['packets_per_second']:,}", f"{row['seconds']:.0f}", f"{row['sent']:,}",
            f"{row['lost']:,}" + (f" ({', '.join(row['dropped'])})" if row["dropped"] else ""),
            f"{row['process_cpu_ns']:,.1f}", f"{row['gap_ms']:.1f}", f"{row['oldest_ms']:.1f}",
            f"{row['rss_kib']:,}", _per_hour(row["rss_kib_per_hour"]), str(row["descriptors"]),
            _per_hour(row["descriptors_per_hour"]), "yes" if row["balanced"] else "no",
        ]
        for row in rows
    ]  # fmt: skip
    return Table(columns, shown, right=frozenset(range(1, 12)), title="soak")
