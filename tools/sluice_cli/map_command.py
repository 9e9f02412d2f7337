# SPDX-License-Identifier: Apache-2.0
"""``sluice map``: the maps of the loaded program, decoded, in Sluice's terms."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import click

from sluice_cli.map_terms import danger, numbers
from sluice_cli.map_text import key_text, rate_text, tables
from sluice_cli.map_view import MapView, Row, parse_json, parse_key
from sluice_cli.output import Output, Table, common_options, examples, samples
from xdp import inventory
from xdp.errors import NotLoadedError, UsageError

interface_option = click.option(
    "-i", "--interface", metavar="NAME", help="Interface; may be left out when Sluice is on one only."
)
all_option = click.option("--all", "everything", is_flag=True, help="Empty entries and the idle bank too.")
per_cpu_option = click.option("--per-cpu", is_flag=True, help="Each CPU's own value instead of the sum.")
force_option = click.option("--force", is_flag=True, help="Do it although packets may take another way.")

#: Arguments after a KEY may be negative numbers or begin with a dash.
KEY_SETTINGS = {"ignore_unknown_options": True}


@click.group("map")
def map_command() -> None:
    """Look into the maps of the loaded program, and change them.

    Keys and values are decoded by the BTF that the program was loaded with: addresses are addresses,
    lanes, services and classes have the policy's names where its owner left them. JSON has the numbers,
    and the names beside them.
    """


@map_command.command("list", epilog=examples("sluice map list\nsluice map list -i eth1 --json"))
@interface_option
@common_options
def list_(output: Output, interface: str | None) -> None:
    """List the maps: type, sizes, room and memory."""
    one = inventory.find(interface)
    found = []
    for name in sorted(one.maps):
        with MapView(one, name) as view:
            found.append(_description(view))
    rows = [
        [
            str(item["name"]), str(item["id"]), str(item["type"]), str(item["key_size"]),
            str(item["value_size"]), str(item["max_entries"]), _kib(item["memory"]),
        ]
        for item in found
    ]  # fmt: skip
    columns = ["name", "id", "type", "key", "value", "room", "memory"]
    output.report(
        _head(one) | {"maps": found}, lambda: output.table(Table(columns, rows, frozenset({1, 3, 4, 5, 6})))
    )


@map_command.command(epilog=examples("sluice map show strangers"))
@click.argument("name")
@interface_option
@common_options
def show(output: Output, name: str, interface: str | None) -> None:
    """Describe one map: how full it is, what its keys and values are made of, whether it may be changed."""
    one = inventory.find(interface)
    with MapView(one, name) as view:
        document = _description(view) | {"entries": view.count(), "may_be_changed": not danger(name)}
        if danger(name):
            document["why_not"] = danger(name)
    shown = [[key.replace("_", " "), "-" if value is None else str(value)] for key, value in document.items()]
    output.report(_head(one) | {"map": document}, lambda: output.table(Table(["", ""], shown)))


@map_command.command(
    epilog=examples(
        "sluice map dump ports\nsluice map dump counters --per-cpu\nsluice map dump known --json"
    ),
)
@click.argument("name")
@interface_option
@all_option
@per_cpu_option
@common_options
def dump(output: Output, name: str, interface: str | None, everything: bool, per_cpu: bool) -> None:
    """Print all entries of a map.

    Empty entries of arrays and entries of the bank that is not in force are left out unless --all is given.
    """
    one = inventory.find(interface)
    with MapView(one, name) as view:
        rows, hidden = view.rows(everything=everything, split_cpus=per_cpu)
        document = _head(one, view) | {"hidden": hidden, "rows": [row.document() for row in rows]}

    def text() -> None:
        if rows:
            output.tables(tables(rows, view.names, everything=everything))
        else:
            output.line(f"{name} has no entries" + (" in use" if hidden else ""))
        if hidden:
            output.note(
                f"{hidden} entries that are empty or of the other bank are not shown; --all shows them"
            )

    output.report(document, text)


@map_command.command(
    epilog=examples(
        """sluice map get ports 8001
        sluice map get known 192.0.2.7
        sluice map get rules turbine/staked/data
        sluice map get ports '{"bank": 0, "port": 8001}'"""
    ),
)
@click.argument("name")
@click.argument("key")
@interface_option
@per_cpu_option
@common_options
def get(output: Output, name: str, key: str, interface: str | None, per_cpu: bool) -> None:
    """Print one entry."""
    one = inventory.find(interface)
    with MapView(one, name) as view:
        row = view.get(parse_key(key), split_cpus=per_cpu)
        _report_row(output, view, row)


@map_command.command(
    "set",
    context_settings=KEY_SETTINGS,
    epilog=examples("""sluice map set lane_limits 0 '{"tat_ns": 0}'"""),
)
@click.argument("name")
@click.argument("key")
@click.argument("value")
@interface_option
@force_option
@common_options
def set_(output: Output, name: str, key: str, value: str, interface: str | None, force: bool) -> None:
    """Write one entry; VALUE is JSON as `get --json` prints it.

    Members left out of VALUE keep what they are (zero in a new entry).
    """
    one = inventory.find(interface)
    with MapView(one, name) as view:
        _check_harmless(name, force)
        row = view.set(parse_key(key), parse_json(value, "value"))
        _report_row(output, view, row)


@map_command.command(
    context_settings=KEY_SETTINGS, epilog=examples("sluice map delete strangers 203.0.113.9")
)
@click.argument("name")
@click.argument("key")
@interface_option
@force_option
@common_options
def delete(output: Output, name: str, key: str, interface: str | None, force: bool) -> None:
    """Remove one entry."""
    one = inventory.find(interface)
    with MapView(one, name) as view:
        _check_harmless(name, force)
        parsed = parse_key(key)
        if not view.delete(parsed):
            raise NotLoadedError(f"no entry {key!r} in {name}", hint=f"list them: sluice map dump {name}")
    document = _head(one, view) | {"deleted": parsed}
    output.report(document, lambda: output.line(f"deleted {key} from {name}"))


@map_command.command(
    epilog=examples("sluice map watch counters\nsluice map watch strangers --interval 5 --count 1 --json")
)
@click.argument("name")
@interface_option
@click.option(
    "--interval", type=click.FloatRange(0.05, 3600), default=1.0, show_default=True, help="Seconds."
)
@click.option("--count", type=click.IntRange(min=1), help="Stop after that many intervals (default: never).")
@common_options
def watch(output: Output, name: str, interface: str | None, interval: float, count: int | None) -> None:
    """Show what changes in a map, per second."""
    one = inventory.find(interface)
    with MapView(one, name) as view:
        output.watch(_differences(view, one, interval, count))


def _differences(
    view: MapView, one: inventory.Loaded, interval: float, count: int | None
) -> Iterator[tuple[dict[str, object], list[Table]]]:
    before: dict[str, tuple[Row, dict[str, int | float]]] = {}
    taken = 0.0
    for number in samples(interval, None if count is None else count + 1):
        now = time.monotonic()
        after = {key_text(row.key, view.names): (row, numbers(row.value)) for row in view.rows().rows}
        if number:
            elapsed = now - taken
            changed = []
            for key, (row, current) in after.items():
                old = before[key][1] if key in before else {}
                rates = {
                    path: (value - old.get(path, 0)) / elapsed
                    for path, value in current.items()
                    if value != old.get(path, 0)
                }
                if rates:
                    changed.append((key, row, rates))
            rows = [
                [key, path, _signed_rate(rate)] for key, _, rates in changed for path, rate in rates.items()
            ]
            rows = rows or [["", "nothing changed", ""]]
            document = _head(one, view) | {
                "seconds": round(elapsed, 6),
                "rows": [{"key": row.key, "per_second": rates} for _, row, rates in changed],
            }
            yield (
                document,
                [Table(["key", "field", "change"], rows, frozenset({2}), f"{view.name}, per second")],
            )
        before, taken = after, now


def _signed_rate(rate: float) -> str:
    return f"-{rate_text(-rate)}" if rate < 0 else rate_text(rate)


def _check_harmless(name: str, force: bool) -> None:
    if danger(name) and not force:
        raise UsageError(f"not changing {name}: {danger(name)}", hint="--force does it all the same")


def _report_row(output: Output, view: MapView, row: Row) -> None:
    document = _head(view.loaded, view) | row.document()

    def text() -> None:
        output.tables(tables([row], view.names))

    output.report(document, text)


def _head(one: inventory.Loaded, view: MapView | None = None) -> dict[str, object]:
    """What every report begins with."""
    head: dict[str, object] = {"interface": one.interface, "program": one.id}
    if view is not None:
        head |= {
            "map": {"name": view.name, "id": view.info.id, "type": view.type_name},
            "active_bank": view.bank,
        }
        names = {"lanes": view.names.lanes, "services": view.names.services, "classes": view.names.classes}
        if any(names.values()):
            head["names"] = {term: list(known) for term, known in names.items()}
    return head


def _description(view: MapView) -> dict[str, Any]:
    info = view.info
    return {
        "name": view.name,
        "id": info.id,
        "type": view.type_name,
        "key_size": info.key_size,
        "value_size": info.value_size,
        "max_entries": info.max_entries,
        "flags": info.flags,
        "btf_id": info.btf_id,
        "memory": view.memory(),
    }


def _kib(size: int | None) -> str:
    return "-" if size is None else f"{size / 1024:.0f} KiB"
