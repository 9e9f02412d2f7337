# SPDX-License-Identifier: Apache-2.0
"""``sluice status``: what is loaded, in which mode and why in no higher one, by whom, and how busy it is."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import click

from sluice_cli.map_text import duration_text, rate_text
from sluice_cli.map_view import owner_state
from sluice_cli.output import Output, Table, common_options, examples
from sluice_cli.status_sample import CATEGORIES, Sample, pairs, totals_document
from sluice_cli.tuning_text import tuned_documents, tuned_rows
from xdp import inventory
from xdp.owner_state import OwnerState


@click.command(
    epilog=examples(
        """sudo sluice status
        sudo sluice status eth1 --interval 5
        sudo sluice status --watch
        sudo sluice status --json"""
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
@common_options
def status(output: Output, interface: str | None, interval: float, watch: bool) -> None:
    """Show what is loaded, its mode, owner and rates.

    Everything comes from the kernel; why no higher mode held comes from the owner, if it left its state in
    /run/sluice. INTERFACE may be left out when Sluice is on one interface only.
    """
    one = inventory.find(interface)
    if watch:
        output.watch(_frames(one, interval))
        return
    before, after = next(pairs(one, interval, 1))
    document = report(one, before, after)
    output.report(document, lambda: output.tables(_tables(document, output.verbose)))


def report(one: inventory.Loaded, before: Sample, after: Sample) -> dict[str, Any]:
    """The status of one program as a JSON document."""
    state = owner_state(one)
    return {
        "interface": one.interface,
        "ifindex": one.ifindex,
        "attached": one.mode,
        **_mode(one, state),
        "program": {
            "id": one.id,
            "name": one.name,
            "tag": one.tag,
            "loaded_at": round(one.loaded_at, 3),
            "age_seconds": round(max(0.0, time.time() - one.loaded_at), 3),
            "maps": len(one.maps),
        },
        "link": one.link_id,
        "pins": [str(path) for path in inventory.pins(one)],
        "owner": _owner(state),
        "holders": [
            {"pid": holder.pid, "command": holder.command, "link": holder.link, "program": holder.program}
            for holder in inventory.holders(one)
        ],
        "counters": totals_document(before, after),
    }


def _mode(one: inventory.Loaded, state: OwnerState | None) -> dict[str, Any]:
    """The rung that holds. Without the owner's word only native or generic is known, from the link."""
    if state is None:
        return {"mode": one.mode, "refused": [], "mode_known_from": "link"}
    refused = [{"mode": refusal.mode, "reason": refusal.reason} for refusal in state.refused]
    return {"mode": state.mode, "refused": refused, "mode_known_from": "owner"}


def _owner(state: OwnerState | None) -> dict[str, Any] | None:
    if state is None:
        return None
    return {
        "pid": state.pid,
        "alive": state.alive,
        "policy": state.policy,
        "socket": state.socket,
        "persisted": state.persisted,
        "tuned": tuned_documents(state.tuned),
    }


def _frames(one: inventory.Loaded, interval: float) -> Iterator[tuple[dict[str, Any], list[Table]]]:
    for before, after in pairs(one, interval, None):
        document = report(one, before, after)
        yield document, _tables(document, verbose=False)


def _tables(document: dict[str, Any], verbose: bool) -> list[Table]:
    program, counters = document["program"], document["counters"]
    rows = [
        ["interface", f"{document['interface']} (index {document['ifindex']})"],
        ["mode", _mode_text(document)],
        *(["", f"not {refusal['mode']}: {refusal['reason']}"] for refusal in document["refused"]),
        ["program", f"{program['id']} ({program['name']}, tag {program['tag']})"],
        ["loaded", f"{duration_text(program['age_seconds'] * 1e9)} ago"],
        ["link", _link_text(document)],
        ["owner", _owner_text(document)],
    ]
    if document["owner"] and document["owner"]["policy"]:
        rows.append(["policy", document["owner"]["policy"]])
    if document["owner"]:
        rows += [["tuned", text] for text in tuned_rows(document["owner"]["tuned"])]
    if verbose:
        rows += [["held by", f"{one['command']} (pid {one['pid']})"] for one in document["holders"]]
    speeds = counters["packets_per_second"]
    sums = {"seen": counters["seen"]["packets"]} | {name: counters[name] for name in CATEGORIES}
    traffic = [[name, str(total), rate_text(speeds[name])] for name, total in sums.items()]
    tables = [
        Table(["", ""], rows),
        Table(["packets", "total", "now"], traffic, frozenset({1, 2})),
    ]
    verdicts = counters["verdicts"]
    if verbose and verdicts:
        reasons = [[name, str(count["packets"]), str(count["bytes"])] for name, count in verdicts.items()]
        tables.append(Table(["verdict", "packets", "bytes"], reasons, frozenset({1, 2})))
    if not counters["balanced"]:
        note = "the counters don't add up at this moment: packets were in flight while they were read"
        tables.append(Table([note], []))
    return tables


def _mode_text(document: dict[str, Any]) -> str:
    if document["mode_known_from"] == "link":
        return f"{document['mode']} (from the link; the owner left no word on zero-copy)"
    return str(document["mode"])


def _link_text(document: dict[str, Any]) -> str:
    if document["link"] is None:
        return "none: attached through netlink, and stays when its owner dies"
    pins = document["pins"]
    return f"{document['link']}" + (f", pinned at {', '.join(pins)}" if pins else "")


def _owner_text(document: dict[str, Any]) -> str:
    holders = [one for one in document["holders"] if one["link"]]
    if holders:
        return ", ".join(f"{one['command']} (pid {one['pid']})" for one in holders)
    return "none: the pin keeps it" if document["pins"] else "not visible from here"
