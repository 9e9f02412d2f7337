# SPDX-License-Identifier: Apache-2.0
"""What ``sluice lab connections`` prints for people."""

from __future__ import annotations

from typing import Any

from sluice_cli.output import Output, Table


def show(output: Output, document: dict[str, Any]) -> None:
    """How long it took until connections were back, then what was wanted and what was not reached."""
    back = [(trial, kind, found) for trial in document["trials"]
            for kind, found in trial.get("kinds", {}).items()]  # fmt: skip
    tables = [_back(back)] if back else []
    tables.append(_thresholds(document["trials"]))
    output.tables(tables)
    output.line()
    output.line(
        f"{document['udp']} UDP and {document['quic']} QUIC connections over {document['mode']}, open within "
        f"{document['opened_in']:.2f} s; faults of {document['seconds']:g} s; {document['asked']:,} "
        f"questions, {document['probes']:,} of them to suspects"
    )
    for trial in document["trials"]:
        if "flood" in trial:
            found = trial["flood"]
            output.line(
                f"flood: {found['sent']:,} packets at {found['packets_per_second']:,.0f}/s, {found['read']:,}"
                f" were read; {found['rounds']} messages and answers of each connection"
            )
        if "spoil" in trial:
            found = trial["spoil"]
            wrong = ", ".join(f"{count:,} of {kind.upper()}" for kind, count in found["wrong"].items())
            output.line(
                f"spoil: of {found['seen']:,} datagrams {found['dropped']:,} were lost and"
                f" {found['changed']:,} changed; wrong messages that users got: {wrong};"
                f" {found['rounds']} rounds"
            )
    if document["stalls"]:
        output.note(f"the pool's own loop stalled {document['stalls']} times: the machine was busy")


def _back(found: list[tuple[dict[str, Any], str, dict[str, Any]]]) -> Table:
    rows = [
        [trial["trial"], kind, f"{one['back']} of {one['connections']}", _milliseconds(one["p50"]),
         _milliseconds(one["p99"]), _milliseconds(one["max"]), str(one["reconnected"]), str(trial["lost"])]
        for trial, kind, one in found
    ]  # fmt: skip
    columns = ["trial", "kind", "back", "p50, ms", "p99, ms", "max, ms", "made anew", "down meanwhile"]
    return Table(columns, rows, right=frozenset(range(2, 8)), title="until a message was answered again")


def _thresholds(trials: list[dict[str, Any]]) -> Table:
    rows: list[list[str]] = []
    styles: dict[int, str] = {}
    for trial in trials:
        for limit in trial["thresholds"]:
            if not limit["holds"]:
                styles[len(rows)] = "red"
            rows.append([
                trial["trial"], limit["figure"], _value(limit["value"]), _value(limit["at_most"]),
                "holds" if limit["holds"] else "missed",
            ])  # fmt: skip
    return Table(["trial", "", "found", "at most", ""], rows, right=frozenset({2, 3}), styles=styles)


def _value(value: float | None) -> str:
    if value is None:
        return "never"
    return f"{value:d}" if isinstance(value, int) else f"{value:.3f} s"


def _milliseconds(value: float | None) -> str:
    return "never" if value is None else f"{value * 1e3:.1f}"
