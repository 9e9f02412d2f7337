# SPDX-License-Identifier: Apache-2.0
"""``sluice lanes``: each lane's traffic, drops and limits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import click

from sluice_cli.map_text import limit_text, rate_text
from sluice_cli.map_view import MapView, names_of
from sluice_cli.output import Output, Table, common_options, examples
from sluice_cli.status_sample import Sample, count_document, pairs, rate, reasons_per_second
from xdp import inventory
from xdp.abi import REASONS, category
from xdp.counters import Count, LaneCounters
from xdp.names import Names


@click.command(
    epilog=examples(
        """sudo sluice lanes
        sudo sluice lanes eth1 --watch
        sudo sluice lanes --interval 10 --json"""
    ),
)
@click.argument("interface", required=False)
@click.option(
    "--interval",
    type=click.FloatRange(0.05, 3600),
    default=1.0,
    show_default=True,
    help="Seconds between the two samples that rates are made from.",
)
@click.option("--watch", is_flag=True, help="Go on until Ctrl-C.")
@click.option("--all", "everything", is_flag=True, help="Lanes that the policy doesn't use, too.")
@common_options
def lanes(output: Output, interface: str | None, interval: float, watch: bool, everything: bool) -> None:
    """Show each lane's traffic, drops and limits.

    The highest priority comes first. "seen" counts packets that a rule sent to the lane, before limits; what
    became of them follows.
    pass_no_socket means that nobody reads the lane.
    """
    one = inventory.find(interface)
    if watch:
        output.watch(_frames(one, interval, everything))
        return
    before, after = next(pairs(one, interval, 1))
    document = report(one, before, after, everything)
    output.report(document, lambda: output.tables(_tables(document)))


def report(one: inventory.Loaded, before: Sample, after: Sample, everything: bool) -> dict[str, Any]:
    """All lanes as a JSON document."""
    names = names_of(one)
    settings = _settings(one, names)
    seconds = after.at - before.at
    rows = []
    for number, (old, new) in enumerate(zip(before.counters.lanes, after.counters.lanes, strict=True)):
        named = number < len(names.lanes)
        busy = new.seen.packets or new.demoted_to or "rate" in settings[number]
        if everything or named or (not names.lanes and busy):
            head = {"lane": number, "name": names.show("lane", number)}
            rows.append(head | settings[number] | _lane(old, new, seconds))
    return {"interface": one.interface, "program": one.id, "seconds": round(seconds, 6), "lanes": rows}


def _settings(one: inventory.Loaded, names: Names) -> list[dict[str, Any]]:
    """Of each lane what the policy in force says."""
    with MapView(one, "policies", names) as view:
        policy = view.get({}).value
    found = []
    for lane in policy["lane"]:
        setting: dict[str, Any] = {"end": lane["end"]}
        if lane["limit"]["interval_ns"]:
            setting |= {
                "rate": round(1e9 / lane["limit"]["interval_ns"], 3),
                "limit": limit_text(lane["limit"]),
                "over": lane["over"],
            }
            if lane["over"] == "demote":
                setting["demote"] = names.show("lane", lane["demote_lane"])
        found.append(setting)
    return found


def _lane(old: LaneCounters, new: LaneCounters, seconds: float) -> dict[str, Any]:
    dropped = {REASONS[i] for i in range(len(REASONS)) if category(i) == "dropped"}
    return {
        "seen": count_document(new.seen),
        "seen_per_second": rate(old.seen.packets, new.seen.packets, seconds),
        "demoted_from": new.demoted_from,
        "demoted_to": new.demoted_to,
        "verdicts": {name: count_document(count) for name, count in sorted(new.verdicts.items())},
        "verdicts_per_second": reasons_per_second(old.verdicts, new.verdicts, seconds),
        "dropped": sum((count for name, count in new.verdicts.items() if name in dropped), Count()).packets,
        "balanced": new.balanced,
    }


def _frames(
    one: inventory.Loaded, interval: float, everything: bool
) -> Iterator[tuple[dict[str, Any], list[Table]]]:
    for before, after in pairs(one, interval, None):
        document = report(one, before, after, everything)
        yield document, _tables(document)


def _tables(document: dict[str, Any]) -> list[Table]:
    if not document["lanes"]:
        return [Table(["no lane has seen a packet; --all shows them"], [])]
    rows = []
    for lane in document["lanes"]:
        outcome = [
            f"{name} {count['packets']} ({rate_text(lane['verdicts_per_second'][name])})"
            for name, count in lane["verdicts"].items()
        ]
        seen = [str(lane["seen"]["packets"]), rate_text(lane["seen_per_second"])]
        gone = [str(lane["dropped"]), str(lane["demoted_from"])]
        head = [str(lane["lane"]), lane["name"], lane["end"], lane.get("limit", "-")]
        rows.append([*head, *seen, *gone, ", ".join(outcome) or "-"])
    columns = ["lane", "name", "end", "limit", "seen", "now", "dropped", "demoted", "verdicts"]
    return [Table(columns, rows, frozenset({0, 4, 5, 6, 7}))]
