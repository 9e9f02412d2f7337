# SPDX-License-Identifier: Apache-2.0
"""``sluice connections``: what programs tell of the connections that they keep (docs/connections.md)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, NamedTuple

import click
import msgspec

from sluice_cli.map_text import duration_text
from sluice_cli.output import Output, Table, common_options, examples, samples
from xdp.connection_state import ConnectionsState, ConnectionTold, read_connections

STATUSES: Final = ("healthy", "degraded", "unhealthy", "dead")
STATES: Final = ("disconnected", "connecting", "connected", "failed", "draining")
#: What is shown first; "worst" is the order in which programs tell.
SORTS: Final[dict[str, Callable[[ConnectionTold], float] | None]] = {
    "worst": None,
    "latency": lambda one: -(one.latency or 0.0),
    "loss": lambda one: -(one.loss_rate or 0.0),
    "silent": lambda one: -(one.silent or 0.0),
}
#: Seconds after which a program that tells once a second is late: its loop hangs, or it is stopped.
LATE: Final = 5.0
COLUMNS: Final = (
    "connection", "endpoint", "address", "state", "for", "health", "round trip", "loss", "heard", "why",
)  # fmt: skip
_COLORS: Final = {"degraded": "yellow", "unhealthy": "red", "dead": "red"}


class Filter(NamedTuple):
    """Which connections to show."""

    top: int
    sort: str
    program: str | None
    endpoint: str | None
    states: Sequence[str]
    statuses: Sequence[str]
    numbers: Sequence[int]

    def takes(self, one: ConnectionTold) -> bool:
        """Whether a connection is one of them."""
        return (
            (self.endpoint is None or self.endpoint in one.endpoint or self.endpoint in one.address)
            and (not self.states or one.state in self.states)
            and (not self.statuses or one.status in self.statuses)
            and (not self.numbers or one.connection in self.numbers)
        )


@click.command(
    epilog=examples(
        """sudo sluice connections
        sudo sluice connections --watch
        sudo sluice connections --health unhealthy --health dead
        sudo sluice connections --endpoint 192.0.2.7 --json
        sudo sluice connections --connection 17        with its last changes of state"""
    ),
)
@click.option("-n", "--top", type=click.IntRange(1, 10_000), default=20, show_default=True,
              help="How many of each program.")  # fmt: skip
@click.option("--sort", type=click.Choice(list(SORTS)), default="worst", show_default=True,
              help="What comes first.")  # fmt: skip
@click.option("--program", metavar="NAME", help="Only programs of that name, or the one with that pid.")
@click.option("--endpoint", metavar="TEXT", help="Only those whose endpoint or address has that in it.")
@click.option("--state", "states", multiple=True, type=click.Choice(STATES),
              help="Only those; may be repeated.")  # fmt: skip
@click.option("--health", "statuses", multiple=True, type=click.Choice(STATUSES),
              help="Only those; may be repeated.")  # fmt: skip
@click.option("--connection", "numbers", multiple=True, type=click.IntRange(0), metavar="NUMBER",
              help="Only that one, with its last changes of state; may be repeated.")  # fmt: skip
@click.option("--interval", type=click.FloatRange(0.05, 3600), default=1.0, show_default=True,
              help="Seconds between two looks, with --watch.")  # fmt: skip
@click.option("--watch", is_flag=True, help="Go on until Ctrl-C.")
@common_options
def connections(
    output: Output,
    top: int,
    sort: str,
    program: str | None,
    endpoint: str | None,
    states: tuple[str, ...],
    statuses: tuple[str, ...],
    numbers: tuple[int, ...],
    interval: float,
    watch: bool,
) -> None:
    """Show the connections that programs keep, and how well they are.

    Programs tell of them once a second; of more than 512 the worst. Root sees those of all users, others
    what the files in /run/sluice/connections let them.
    """
    wanted = Filter(top, sort, program, endpoint, states, statuses, numbers)
    if watch:
        output.watch(_frames(wanted, interval))
        return
    document = report(read_connections(), wanted, time.monotonic())
    output.report(document, lambda: _show(output, document, wanted))


def report(told: Sequence[ConnectionsState], wanted: Filter, now: float) -> dict[str, Any]:
    """What all programs tell, as a JSON document."""
    return {
        "programs": [
            _program(state, wanted, now)
            for state in told
            if wanted.program is None or wanted.program in {state.program, str(state.pid)}
        ]
    }


def _program(state: ConnectionsState, wanted: Filter, now: float) -> dict[str, Any]:
    matching = [one for one in state.connections if wanted.takes(one)]
    key = SORTS[wanted.sort]
    if key is not None:
        matching.sort(key=key)
    summary: dict[str, Any] = msgspec.to_builtins(state.summary)
    return {
        "program": state.program,
        "pid": state.pid,
        "age": round(max(0.0, now - state.told_at), 3),
        **summary,
        "total": state.total,
        "told": len(state.connections),
        "matching": len(matching),
        "connections": msgspec.to_builtins(matching[: wanted.top]),
    }


def _frames(wanted: Filter, interval: float) -> Iterator[tuple[dict[str, Any], list[Table]]]:
    for _ in samples(interval):
        document = report(read_connections(), wanted, time.monotonic())
        yield document, _tables(document, wanted) or [Table(["no program tells of connections"], [])]


def _show(output: Output, document: dict[str, Any], wanted: Filter) -> None:
    tables = _tables(document, wanted)
    if not tables:
        output.line("no program tells of connections")
        return
    output.tables(tables)
    for one in document["programs"]:
        shown = len(one["connections"])
        if one["matching"] > shown:
            output.note(f"{one['program']}: {shown} of {one['matching']} connections; --top shows more")
        if one["total"] > one["told"]:
            output.note(f"{one['program']}: it tells of {one['told']} of {one['total']}, the worst")


def _tables(document: dict[str, Any], wanted: Filter) -> list[Table]:
    tables = []
    for one in document["programs"]:
        tables.append(_table(one))
        if wanted.numbers:
            tables += [_history(row) for row in one["connections"]]
    return tables


def title(one: dict[str, Any]) -> str:
    """A program in a line: what there is, and what is unusual."""
    parts = [
        f"{one['program']} ({one['pid']}): {one['size']} of {one['max_size']} connections",
        *(f"{one[phase]} {phase.replace('_', ' ')}" for phase in ("in_use", "idle", "opening", "closing")
          if one[phase]),
        f"{one['well']} of {one['endpoints']} endpoints well",
    ]  # fmt: skip
    for count, word in (("waiting", "callers wait"), ("ejected", "ejected"), ("given_up", "given up"),
                        ("held", "on a link that is down"),
                        ("errors", "errors of callbacks")):  # fmt: skip
        if one[count]:
            parts.append(f"{one[count]} {word}")
    if one["panic"]:
        parts.append("panic")
    if one["draining"]:
        parts.append("draining")
    if one["age"] > LATE:
        parts.append(f"told {_duration(one['age'])} ago")
    return ", ".join(parts)


def _table(one: dict[str, Any]) -> Table:
    rows: list[list[str]] = []
    styles: dict[int, str] = {}
    for row in one["connections"]:
        if row["state"] in {"failed", "disconnected"} or row["status"] in _COLORS:
            styles[len(rows)] = _COLORS.get(row["status"], "red")
        rows.append([
            str(row["connection"]),
            row["endpoint"],
            row["address"] if row["address"] != row["endpoint"] else "",
            row["state"],
            _duration(row["since"]),
            row["status"] or "",
            "-" if row["latency"] is None else _duration(row["latency"]),
            "" if row["loss_rate"] is None else f"{row['loss_rate']:.1%}",
            "" if row["silent"] is None else f"{_duration(row['silent'])} ago",
            _why(row),
        ])  # fmt: skip
    return Table(COLUMNS, rows, right=frozenset({0, 4, 6, 7, 8}), styles=styles, title=title(one))


def _why(row: dict[str, Any]) -> str:
    """The reason of its health while it is connected, else of its state and what comes next."""
    if row["status"] is not None:
        return str(row["reason"] or "")
    parts = [row["cause"] or ""]
    if row["failures"]:
        parts.append(f"{row['failures']} in vain")
    if row["next_attempt"] is not None:
        parts.append(f"again in {_duration(row['next_attempt'])}")
    return ", ".join(part for part in parts if part)


def _history(row: dict[str, Any]) -> Table:
    lines = [[line] for line in row["history"]] or [["nothing has happened to it"]]
    return Table([f"connection {row['connection']}, {row['endpoint']}: last changes"], lines)


def _duration(seconds: float) -> str:
    return duration_text(seconds * 1e9) if seconds else "0 s"
