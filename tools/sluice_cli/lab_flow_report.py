# SPDX-License-Identifier: Apache-2.0
"""What ``sluice lab flow`` prints for people: real beside simulated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from sluice_cli.output import Output, Table

#: Figures in the order of the table, with what they are called there.
_FIGURES: Final = {
    "utilisation": "used",
    "delay_p50": "delay p50, ms",
    "delay_p95": "delay p95, ms",
    "delay_p99": "delay p99, ms",
    "standing_queue": "standing queue, ms",
    "loss": "lost, %",
    "jain": "Jain's index",
    "settled": "settled, s",
}

#: Seconds that one timer in a hundred may be late, before figures are about the machine: a part of a queue's
#: target (RFC 8289) and more than a pacer catches up with.
BUSY: Final = 0.002


def show(output: Output, runs: Sequence[dict[str, Any]]) -> None:
    """A table for each run, then what became of packets and timers."""
    output.tables([_table(run) for run in runs])
    output.line()
    for run in runs:
        real = run["real"]
        cable, timers = real["cable"], real["timers"]
        output.line(
            f"{run['scenario']}: {real['sender']['sent']:,} sent, {cable['dropped']:,} dropped by the relay's"
            f" sockets, {cable['missing']:,} missing; CPU: sender {real['sender']['cpu']:.0%},"
            f" relay {real['relay']['cpu']:.0%}"
        )
        output.line(
            f"{run['scenario']}: acknowledgements left late by {_late(timers['relay_late'])}, the sender woke"
            f" up late by {_late(timers['sender_late'])} (p50, p99, max)"
        )
        if max(timers["relay_late"]["p99"], timers["sender_late"]["p99"]) > BUSY:
            output.note(f"{run['scenario']}: the machine was busy: its figures are more about that")
        if cable["missing"]:
            output.line(f"{run['scenario']}: no counter tells of {cable['missing']:,} packets", "red")


def _table(run: dict[str, Any]) -> Table:
    real, simulated = run["real"], run["simulated"]
    limits = {limit["figure"]: limit for limit in real["thresholds"]}
    both = {limit["figure"]: limit for limit in simulated["thresholds"]}
    rows: list[list[str]] = []
    styles: dict[int, str] = {}
    names = [name for name in _FIGURES if real["figures"][name] is not None]
    for name in [*names, *(figure for figure in limits if figure not in names)]:
        limit = limits.get(name)
        holds = limit is None or (limit["holds"] and both[name]["holds"])
        if not holds:
            styles[len(rows)] = "red"
        rows.append([
            _called(name),
            _value(name, _found(real, name)),
            _value(name, _found(simulated, name)),
            _wanted(name, limit),
            "" if limit is None else "holds" if holds else "missed",
        ])  # fmt: skip
    who = " ".join(run["controllers"]) or "sources"
    title = f"{run['scenario']}: {real['about']}; {who}, {run['seconds']:g} s, {run['mode']}"
    columns = ["", "real", "simulated", "wanted", ""]
    return Table(columns, rows, right=frozenset({1, 2}), styles=styles, title=title)


def _found(document: dict[str, Any], name: str) -> float | None:
    owner, _, figure = name.rpartition(".")
    within = document["figures"]
    if owner:
        within = next(one for one in document["flows"] if one["name"] == owner)
    value: float | None = within[figure]
    return value


def _called(name: str) -> str:
    owner, _, figure = name.rpartition(".")
    called = _FIGURES.get(figure, figure)
    return f"{owner}: {called}" if owner else called


def _value(name: str, value: float | None) -> str:
    figure = name.rpartition(".")[2]
    if value is None:
        return "never" if figure == "settled" else "-"
    if figure.startswith("delay_") or figure == "standing_queue":
        return f"{value * 1e3:.2f}"
    if figure == "loss":
        return f"{value * 100:.2f}"
    return f"{value:.1f}" if figure == "settled" else f"{value:.3f}"


def _wanted(name: str, limit: dict[str, Any] | None) -> str:
    if limit is None:
        return ""
    if limit["at_least"] is not None:
        return f"at least {_value(name, limit['at_least'])}"
    return f"at most {_value(name, limit['at_most'])}"


def _late(found: dict[str, float]) -> str:
    return f"{found['p50'] * 1e3:.2f}, {found['p99'] * 1e3:.2f} and {found['max'] * 1e3:.1f} ms"
