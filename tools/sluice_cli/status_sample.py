# SPDX-License-Identifier: Apache-2.0
"""Counters of the loaded program at two moments, and the rates between them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from sluice_cli.output import samples
from xdp import inventory
from xdp._libbpf import ffi
from xdp.abi import Category
from xdp.counters import Count, Counters, parse_counters
from xdp.errors import UnsupportedError

CATEGORIES: tuple[Category, ...] = ("passed", "steered", "dropped", "replied")


@dataclass(frozen=True, slots=True)
class Sample:
    """Counters, and the monotonic time in seconds at which they were read."""

    at: float
    counters: Counters


def read_counters(one: inventory.Loaded) -> Counters:
    """The counters now. Raises `UnsupportedError` for the program of another version."""
    size = ffi.sizeof("struct sluice_counters")
    info = one.maps.get("counters")
    if info is None or info.value_size != size:
        raise UnsupportedError(
            f"program {one.id} on {one.interface} was loaded by another version of Sluice",
            hint="use that version's `sluice`, or load it again: sluice down, sluice up",
        )
    opened = one.map("counters")
    try:
        return parse_counters(b"".join(raw for _, raw in opened.items()))
    finally:
        opened.close()


def read_sample(one: inventory.Loaded) -> Sample:
    """Counters with their time."""
    return Sample(time.monotonic(), read_counters(one))


def pairs(one: inventory.Loaded, interval: float, count: int | None) -> Iterator[tuple[Sample, Sample]]:
    """``count`` pairs of samples (endless if None), each ``interval`` seconds apart."""
    before: Sample | None = None
    for _ in samples(interval, None if count is None else count + 1):
        after = read_sample(one)
        if before is not None:
            yield before, after
        before = after


def rate(before: float, after: float, seconds: float) -> float:
    """Per second, rounded to what two samples can tell."""
    return round((after - before) / seconds, 3) if seconds > 0 else 0.0


def count_document(count: Count) -> dict[str, int]:
    """A count for JSON."""
    return {"packets": count.packets, "bytes": count.bytes}


def totals_document(before: Sample, after: Sample) -> dict[str, object]:
    """What the program saw and did in all, with rates, and whether it adds up."""
    seconds = after.at - before.at
    old, new = before.counters, after.counters
    totals: dict[str, object] = {name: new.totals[name].packets for name in CATEGORIES}
    speeds: dict[str, float] = {
        name: rate(old.totals[name].packets, new.totals[name].packets, seconds) for name in CATEGORIES
    }
    return {
        "seconds": round(seconds, 6),
        "seen": count_document(new.seen),
        **totals,
        "verdicts": {name: count_document(count) for name, count in sorted(new.verdicts.items())},
        "packets_per_second": {
            "seen": rate(old.seen.packets, new.seen.packets, seconds),
            **speeds,
        },
        "bits_per_second": rate(old.seen.bytes * 8, new.seen.bytes * 8, seconds),
        "balanced": new.balanced,
        "strangers_created": new.strangers_created,
        "strangers_refused": new.strangers_refused,
        "metadata_refused": new.metadata_refused,
        "limit_contended": new.limit_contended,
    }


def reasons_per_second(
    before: Mapping[str, Count], after: Mapping[str, Count], seconds: float
) -> dict[str, float]:
    """The rate of each reason that occurred."""
    return {
        name: rate(before.get(name, Count()).packets, count.packets, seconds)
        for name, count in sorted(after.items())
    }
