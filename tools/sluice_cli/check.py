# SPDX-License-Identifier: Apache-2.0
"""``sluice check``: is this policy right?  Needs no privileges and touches nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import click

from sluice_cli.output import Output, Table, common_options, examples
from xdp.errors import PolicyError, SluiceError
from xdp.policy import Policy
from xdp.policy_model import Class, Lane
from xdp.policy_tuning import remarks
from xdp.tables import compile_policy


@click.command(
    epilog=examples(
        """sluice check validator.toml
        sluice check docs/examples/*.toml --json"""
    ),
)
@click.argument("files", metavar="FILE...", nargs=-1, required=True)
@common_options
def check(output: Output, files: tuple[str, ...]) -> int:
    """Validate policy files without touching anything.

    Says what is in them. All files are checked even if one of them is wrong; the exit code is then that of
    a bad policy.
    """
    documents = [examine(name) for name in files]
    wrong = [document for document in documents if not document["ok"]]
    if output.json:
        output.report({"ok": not wrong, "files": documents}, lambda: None)
    else:
        for document in documents:
            if document["ok"]:
                output.line(f"{document['file']}: ok", "green")
                output.tables(_tables(document, output.verbose))
                for text in document["remarks"]:
                    output.note(f"tuning.{text}")
            else:
                output.error_line(f"sluice: error: {document['error']}", "red")
                if document["hint"]:
                    output.error_line(f"hint: {document['hint']}")
    return PolicyError.exit_code if wrong else 0


def examine(name: str) -> dict[str, Any]:
    """One file's summary, or what is wrong with it."""
    try:
        policy = Policy.load(name)
        tables = compile_policy(policy)
    except SluiceError as error:
        return {"file": name, "ok": False, "error": str(error), "hint": error.hint}
    return {
        "file": name,
        "ok": True,
        "lanes": [_lane(lane) for lane in policy.lanes],
        "services": [
            {
                "name": service.name,
                "ports": list(port_ranges(service.ports)),
                "kinds": [kind.name for kind in service.kinds],
                "rules": len(service.rules),
                "heartbeat": service.heartbeat,
            }
            for service in policy.services
        ],
        "classes": [_class(entry, policy.default_class) for entry in policy.classes],
        "peers": len(policy.peers),
        "ports": len(tables.ports),
        "prefixes": tables.prefixes.count,
        "fragments": policy.fragments,
        "mode": policy.mode,
        "minimum_mode": policy.minimum_mode,
        "remarks": remarks(policy.tuning),
    }


def port_ranges(ports: tuple[int, ...]) -> Iterator[str]:
    """Ports as a policy would write them: "8001", "8003-8010"."""
    numbers = sorted(ports)
    start = 0
    for i, port in enumerate(numbers):
        if i + 1 == len(numbers) or numbers[i + 1] != port + 1:
            yield str(port) if numbers[start] == port else f"{numbers[start]}-{port}"
            start = i + 1


def _lane(lane: Lane) -> dict[str, Any]:
    found: dict[str, Any] = {"name": lane.name, "end": lane.end, "share": lane.share}
    if lane.timestamps:
        found["timestamps"] = True
    if lane.rate is not None:
        found |= {"rate": lane.rate, "burst": lane.burst, "over": lane.over}
        if lane.demote is not None:
            found["demote"] = lane.demote
    return found


def _class(entry: Class, default: str) -> dict[str, Any]:
    return {
        "name": entry.name,
        "prefixes": len(entry.prefixes),
        "peers": len(entry.peers),
        "deny": entry.deny,
        "default": entry.name == default,
        "peer_rate": entry.peer_rate,
        "prefix_rate": entry.prefix_rate,
    }


def _tables(document: dict[str, Any], verbose: bool) -> list[Table]:
    lanes = [[str(i), lane["name"], lane["end"], _limit(lane)] for i, lane in enumerate(document["lanes"])]
    services = [
        [one["name"], ", ".join(one["ports"]), ", ".join(one["kinds"]) or "-", str(one["rules"])]
        for one in document["services"]
    ]
    classes = [
        [one["name"], str(one["prefixes"]), str(one["peers"]), _treatment(one)] for one in document["classes"]
    ]
    tables = [
        Table(["priority", "lane", "end", "limit"], lanes, frozenset({0})),
        Table(["service", "ports", "kinds", "rules"], services, frozenset({3})),
        Table(["class", "prefixes", "peers", "treatment"], classes, frozenset({1, 2})),
    ]
    if verbose:
        rest = [
            [name, str(document[name])] for name in ("peers", "prefixes", "fragments", "mode", "minimum_mode")
        ]
        tables.append(Table(["", ""], rest))
    return tables


def _limit(lane: dict[str, Any]) -> str:
    if "rate" not in lane:
        return "-"
    over = f"demote to {lane['demote']}" if "demote" in lane else "drop"
    burst = f", burst {lane['burst']}" if lane["burst"] is not None else ""
    return f"{lane['rate']}/s{burst}, over it {over}"


def _treatment(one: dict[str, Any]) -> str:
    words = ["denied"] if one["deny"] else []
    words += ["everybody else"] if one["default"] else []
    words += [f"{one['peer_rate']}/s per peer"] if one["peer_rate"] is not None else []
    words += [f"{one['prefix_rate']}/s per prefix"] if one["prefix_rate"] is not None else []
    return ", ".join(words) or "-"
