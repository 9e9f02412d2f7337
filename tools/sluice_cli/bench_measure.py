# SPDX-License-Identifier: Apache-2.0
"""Rates of ``sluice bench``: paths take turns, round after round, and the medians are compared."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from sluice_cli.bench_room import SENDING, Mode, Room, Sample, Task
from sluice_cli.output import Table
from xdp.errors import SluiceError

#: Bytes of UDP payload, by the name of the row: 22 makes a frame of 64 bytes.
SIZES: Final = {64: 22, 512: 512, 1232: 1232}

Row = dict[str, Any]
Samples = dict[tuple[str, int], list[Sample]]

#: What a path's rate is divided by: the C program on libxdp that does the same.
_REFERENCE: Final = {
    "sluice-touch": "xsk-c-touch",
    "sluice-linger-touch": "xsk-c-touch",
    "sluice-generic": "xsk-generic-c",
}


@dataclass(frozen=True)
class Contender:
    """One contender: how the room calls it, its batch, whether it reads what it receives, its linger (s)."""

    name: str
    run: str
    batch: int
    touch: bool = False
    linger: float = 0.0
    mode: Mode = "native"

    def task(self, direction: str, size: int, seconds: float) -> Task:
        """A run; ``size`` is of the payload."""
        return Task(
            self.run,
            direction,
            size,
            self.batch,
            seconds,
            touch=self.touch,
            linger=self.linger,
            mode=self.mode,
        )


@dataclass(frozen=True)
class Progress:
    """What a long run says, and what it does about a path that fails.

    ``survive``: its row has "error" instead of figures, and the others go on.
    """

    say: Callable[[str], None]
    survive: bool = False

    def attempt(self, row: Row, work: Callable[[], Row]) -> Row:
        """What ``work`` returns; ``row``, which names the path, with the error where it fails."""
        try:
            return work()
        except (SluiceError, OSError) as error:
            if not self.survive:
                raise
            self.say(f"{row['direction']}: {row['path']} failed: {error}")
            return {**row, "error": str(error)}


def measure(
    room: Room,
    direction: str,
    chosen: Sequence[Contender],
    *,
    sizes: Sequence[int],
    seconds: float,
    runs: int,
    progress: Progress,
) -> list[Row]:
    """A row for each size and path.  Raises SluiceError where a path fails, unless that is survived."""
    samples: Samples = {}
    failed: dict[tuple[str, int], Row] = {}
    for size in sizes:
        for number in range(runs):
            for path in chosen:
                if (path.name, size) in failed:
                    continue
                progress.say(f"{direction} {size} B, round {number + 1} of {runs}: {path.name}")
                named = {"path": path.name, "direction": direction, "size": size, "batch": path.batch}

                def once(path: Contender = path, size: int = size) -> Row:
                    sample = room.measure(path.task(direction, SIZES[size], seconds))
                    samples.setdefault((path.name, size), []).append(sample)
                    return {}

                if row := progress.attempt(named, once):
                    failed[path.name, size] = row
    return [
        failed.get((path.name, size)) or rates(path, direction, size, samples)
        for size in sizes
        for path in chosen
    ]


def _median(samples: Sequence[Sample], field: str) -> float:
    return float(statistics.median(getattr(sample, field) for sample in samples))


def _ratio(of: Sequence[Sample] | None, to: Sequence[Sample] | None) -> float | None:
    """Of medians, not of pairs: a pause of the machine then spoils one run, not the ratio."""
    if not of or not to:
        return None
    return round(_median(of, "packets_per_second") / _median(to, "packets_per_second"), 3)


def rates(path: Contender, direction: str, size: int, samples: Samples) -> Row:
    """The row of one path at one size."""
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
        "rss_kib": max(sample.rss_kib for sample in own),
        "umem_kib": max(sample.umem_kib for sample in own),
        "runs": len(own),
    }


def number(value: float | None, digits: int = 0) -> str:
    """For a table; "-" for what there is not."""
    return "-" if value is None else f"{value:,.{digits}f}"


def rates_table(direction: str, rows: Sequence[Row]) -> Table:
    """For people."""
    columns = ["path", "size", "batch", "packets/s", "CPU ns", "machine ns", "loss", "to C", "CPU to C",
               "to mmsg", "RSS KiB", "UMEM KiB"]  # fmt: skip
    return Table(
        title=direction,
        columns=columns,
        rows=[
            [row["path"], str(row["size"]), str(row["batch"]), "failed", *["-"] * 8]
            if "error" in row
            else [
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
                number(row["rss_kib"]),
                number(row["umem_kib"]),
            ]
            for row in rows
        ],
        right=frozenset(range(1, len(columns))),
    )
