# SPDX-License-Identifier: Apache-2.0
"""Entries of maps as text: names for numbers, rates for intervals, times as ages."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from sluice_cli.map_terms import TERMS
from sluice_cli.map_view import Row
from sluice_cli.output import Table
from xdp.names import Names

#: Wider tables are shown as blocks, one entry after another.
MAX_COLUMNS = 12

_SECOND_NS = 1_000_000_000


def key_text(key: Any, names: Names) -> str:
    """A key on one line: "8001 (bank 1)" is shown as "bank 1, port 8001"."""
    if isinstance(key, dict):
        return ", ".join(f"{name} {_named(name, value, names, key)}" for name, value in key.items())
    return str(key)


def tables(rows: Sequence[Row], names: Names, *, title: str = "", everything: bool = False) -> list[Table]:
    """One table for rows of few columns, else one of fields and values for each row."""
    now = time.monotonic_ns()
    flat = []
    for row in rows:
        key = row.key if isinstance(row.key, dict) else {"key": row.key}
        head = {name: _named(name, value, names, key) for name, value in key.items()}
        values = [("", row.value)] if row.cpus is None else [(str(i), one) for i, one in enumerate(row.cpus)]
        for cpu, value in values:
            cells = {"cpu": cpu} if cpu else {}
            flat.append((head | cells, flatten(value, names, now, service=_service(key))))
    columns: dict[str, None] = {}
    for head, cells in flat:
        columns.update(dict.fromkeys([*head, *cells]))
    if len(columns) <= MAX_COLUMNS:
        made = [[{**head, **cells}.get(column, "") for column in columns] for head, cells in flat]
        right = frozenset(i for i in range(len(columns)) if all(_is_number(row[i]) for row in made) and made)
        return [Table(list(columns), made, right, title)]
    blocks = []
    for head, cells in flat:
        shown = [[name, text] for name, text in cells.items() if everything or not _is_empty(text)]
        name = ", ".join(f"{part} {text}" for part, text in head.items())
        blocks.append(Table(["field", "value"], shown or [["", "all zero"]], title=f"{title} {name}".strip()))
    return blocks


def _is_empty(text: str) -> bool:
    """Whether a cell says only that there is nothing."""
    return text in ("", "-", "0 packets, 0 bytes") or set(text) <= set("0, ")


def flatten(value: Any, names: Names, now: int, path: str = "", service: int | None = None) -> dict[str, str]:
    """Every leaf of a value as text, by its path."""
    if isinstance(value, dict):
        if set(value) == {"interval_ns", "burst_ns"}:
            return {path: limit_text(value)}
        if set(value) == {"packets", "bytes"} and path:
            return {path: f"{value['packets']} packets, {value['bytes']} bytes"}
        found: dict[str, str] = {}
        for name, one in value.items():
            if name == "reserved":
                continue
            where = f"{path}.{name}" if path else name
            if name in TERMS and isinstance(one, int):
                found[where] = names.show(TERMS[name], one, service)
            else:
                found |= flatten(one, names, now, where, service)
        return found
    if isinstance(value, list):
        if not any(isinstance(one, (dict, list)) for one in value):
            return {path: ", ".join(map(str, value))}
        found = {}
        for i, one in enumerate(value):
            found |= flatten(one, names, now, f"{path}[{i}]", service)
        return found
    if path.endswith("_ns") and isinstance(value, int):
        return {path: moment_text(value, now)}
    return {path or "value": str(value)}


def limit_text(limit: dict[str, int]) -> str:
    """A GCRA limit as a rate: "1000/s, burst 8"."""
    interval = limit["interval_ns"]
    if not interval:
        return "-"
    rate = _SECOND_NS / interval
    return f"{rate:.4g}/s, burst {limit['burst_ns'] // interval + 1}"


def moment_text(stamp: int, now: int) -> str:
    """A time of CLOCK_MONOTONIC as an age: "3.2 s ago"."""
    if not stamp:
        return "never"
    ago = now - stamp
    return f"{duration_text(abs(ago))} ago" if ago >= 0 else f"in {duration_text(-ago)}"


def duration_text(nanoseconds: float) -> str:
    """Nanoseconds with a unit that fits."""
    seconds = nanoseconds / _SECOND_NS
    for limit, factor, unit in ((1e-6, 1e9, "ns"), (1e-3, 1e6, "µs"), (1, 1e3, "ms"), (120, 1, "s")):
        if seconds < limit:
            return f"{seconds * factor:.3g} {unit}"
    for limit, divisor, unit in ((7200, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / divisor:.0f} {unit}"
    return f"{seconds / 86_400:.0f} days"


def rate_text(rate: float) -> str:
    """A number per second, with k and M."""
    for limit, divisor, unit in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if rate >= limit:
            return f"{rate / divisor:.3g}{unit}/s"
    return f"{rate:.0f}/s" if rate >= 10 or rate == int(rate) else f"{rate:.2g}/s"


def _named(part: str, value: Any, names: Names, key: dict[str, Any]) -> str:
    if part in TERMS and isinstance(value, int):
        return names.show(TERMS[part], value, _service(key))
    return str(value)


def _service(key: dict[str, Any]) -> int | None:
    service = key.get("service")
    return service if isinstance(service, int) else None


def _is_number(text: str) -> bool:
    return text.replace(".", "", 1).lstrip("-").isdecimal()
