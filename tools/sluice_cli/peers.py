# SPDX-License-Identifier: Apache-2.0
"""``sluice peers``: the remote addresses that the program has counted, and who is held."""

from __future__ import annotations

import heapq
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from typing import Any, NamedTuple

import click

from sluice_cli.flow_text import FLOW_COLUMNS, flow_cells, flow_documents
from sluice_cli.map_terms import PEER_PLACES, Fields
from sluice_cli.map_text import moment_text, rate_text
from sluice_cli.map_view import MapView, names_of
from sluice_cli.output import Output, Table, common_options, examples, samples
from sluice_cli.peer_holds import WithHolds, held_numbers, hold_document, hold_text
from xdp import inventory
from xdp._libbpf import lib
from xdp.codec import Codec, StructCodec, ViewCodec, decode
from xdp.errors import UnsupportedError, UsageError
from xdp.flow_state import flows_by_address, read_flows
from xdp.holds import Held
from xdp.names import Names

Network = IPv4Network | IPv6Network
SORT_KEYS = ("packets", "bytes", "drops", "last_seen")
#: (map, what its peers are), configured ones first
TABLES = (("known", "configured"), ("strangers", "stranger"))


class Filter(NamedTuple):
    """Which peers to show."""

    top: int
    sort: str
    class_number: int | None
    network: Network | None
    everything: bool
    #: only peers that are held
    held: bool


class Peer(NamedTuple):
    """One address and what the program has counted for it."""

    address: str
    origin: str
    fields: Fields


@click.command(
    cls=WithHolds,
    epilog=examples(
        """sudo sluice peers
        sudo sluice peers eth1 --sort drops --top 5
        sudo sluice peers --class staked --address 10.0.0.0/8
        sudo sluice peers --watch
        sudo sluice peers --held
        sudo sluice peers hold 192.0.2.7 --rate 500
        sudo sluice peers release 192.0.2.7"""
    ),
)
@click.argument("interface", required=False)
@click.option("-n", "--top", type=click.IntRange(1, 200_000), default=20, show_default=True, help="How many.")
@click.option(
    "--sort", type=click.Choice(SORT_KEYS), default="packets", show_default=True, help="Highest first."
)
@click.option("--class", "class_name", metavar="CLASS", help="Only peers of that class (name or number).")
@click.option("--address", metavar="PREFIX", help="Only addresses in that prefix.")
@click.option("--all", "everything", is_flag=True, help="Configured peers that never sent anything, too.")
@click.option("--held", is_flag=True, help="Only peers that are held.")
@click.option(
    "--interval",
    type=click.FloatRange(0.05, 3600),
    default=1.0,
    show_default=True,
    help="Seconds between samples, with --watch.",
)
@click.option("--watch", is_flag=True, help="Sort by what happens per second, and go on until Ctrl-C.")
@common_options
def peers(
    output: Output,
    interface: str | None,
    top: int,
    sort: str,
    class_name: str | None,
    address: str | None,
    everything: bool,
    held: bool,
    interval: float,
    watch: bool,
) -> None:
    """List the remote addresses that the program has counted.

    Strangers that others have pushed out of the table are gone from the list; the totals of
    `sluice status` still hold their packets.

    Programs with flow control tell the state of it (window, rate, round-trip time, loss); it is shown beside
    the peers that it is about.

    `sluice peers hold` limits a configured peer while traffic flows, `sluice peers release` ends that; both
    have a --help of their own.
    """
    network = _network(address)
    one = inventory.find(interface)
    names = names_of(one)
    number = names.number("class", class_name, lib.SLUICE_MAX_CLASSES) if class_name is not None else None
    wanted = Filter(top, sort, number, network, everything or held, held)
    if watch:
        output.watch(_frames(one, names, wanted, interval))
        return
    holds = held_numbers(one, time.monotonic_ns())
    found, total = select(one, names, wanted, holds)
    rows = with_flows([peer_document(peer, names, holds) for peer in found])
    document = {"interface": one.interface, "program": one.id, "matching": total, "peers": rows}
    output.report(document, lambda: _show(output, rows, total))


def _network(text: str | None) -> Network | None:
    if text is None:
        return None
    try:
        return ip_network(text)
    except ValueError as error:
        raise UsageError(
            f"--address: {error}", hint="give an address or a prefix such as 192.0.2.7 or 10.0.0.0/8"
        ) from None


def select(
    one: inventory.Loaded, names: Names, wanted: Filter, holds: Mapping[int, Held]
) -> tuple[list[Peer], int]:
    """The peers with the highest numbers, and how many match in all.

    Only those that are shown are decoded; the others are compared as bytes, at the offsets that BTF gives.
    """
    best: list[tuple[int, int, str, bytes, bytes]] = []
    total = 0
    views: dict[str, MapView] = {}
    try:
        for name, _ in TABLES:
            view = views[name] = MapView(one, name, names)
            for score, key, raw in _candidates(view, wanted, holds):
                total += 1
                # The running number keeps equal scores from being compared by anything else.
                entry = (score, -total, name, key, raw)
                if len(best) < wanted.top:
                    heapq.heappush(best, entry)
                else:
                    heapq.heappushpop(best, entry)
        origins = dict(TABLES)
        found = [
            Peer(decode(views[name].key, key), origins[name], decode(views[name].value, raw))
            for _, _, name, key, raw in sorted(best, reverse=True)
        ]
    finally:
        for view in views.values():
            view.map.close()
    return found, total


def _candidates(
    view: MapView, wanted: Filter, holds: Mapping[int, Held]
) -> Iterator[tuple[int, bytes, bytes]]:
    """(score, key, value) of all entries that match."""
    number = _reader(view, f"{wanted.sort}_ns" if wanted.sort == "last_seen" else wanted.sort)
    packets = _reader(view, "packets")
    for key, raw in view.map.items():
        if not wanted.everything and not packets(raw):
            continue
        if wanted.class_number is not None and decode(view.value, raw)["class"] != wanted.class_number:
            continue
        if wanted.held and decode(view.value, raw)["id"] not in holds:
            continue
        if wanted.network is not None:
            address = ip_address(decode(view.key, key))
            if address not in wanted.network:
                continue
        yield number(raw), key, raw


def _reader(view: MapView, member: str) -> Callable[[bytes], int]:
    """A function that reads one number of a peer's entry, the total where it is counted in two places."""
    places = []
    for path in PEER_PLACES[member]:
        codec: Codec = view.value
        start = 0
        for name in path:
            inner = codec.inner if isinstance(codec, ViewCodec) else codec
            fields = {field.name: field for field in inner.fields} if isinstance(inner, StructCodec) else {}
            if name not in fields:
                raise UnsupportedError(
                    f"the program's peers have no member {name!r}: another version of Sluice loaded it",
                    hint="use that version's `sluice`, or load it again: sluice down, sluice up",
                )
            start += fields[name].offset
            codec = fields[name].codec
        places.append((start, start + codec.size))
    return lambda raw: sum(int.from_bytes(raw[start:end], sys.byteorder) for start, end in places)


def peer_document(peer: Peer, names: Names, holds: Mapping[int, Held]) -> dict[str, Any]:
    """A peer for JSON; times are nanoseconds of CLOCK_MONOTONIC."""
    fields = peer.fields
    found = {
        "address": peer.address,
        "origin": peer.origin,
        "class": fields["class"],
        "class_name": names.show("class", fields["class"]),
        "packets": fields["packets"],
        "bytes": fields["bytes"],
        "drops": fields["drops"],
        "last_seen_ns": fields["last_seen_ns"],
    }
    if fields["id"]:
        found |= {"id": fields["id"], "name": names.peers.get(fields["id"], "")}
        found["hold"] = hold_document(holds.get(fields["id"]))
    return found


def with_flows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same, with what programs tell of their flow control with each peer."""
    flows = flows_by_address(read_flows())
    for row in rows:
        if row["address"] in flows:
            row["flows"] = flow_documents(flows[row["address"]])
    return rows


def _show(output: Output, rows: list[dict[str, Any]], total: int) -> None:
    if not rows:
        output.line("no peer matches")
        return
    output.table(_table(rows))
    if total > len(rows):
        output.note(f"{len(rows)} of {total} peers; --top shows more")


def _table(rows: list[dict[str, Any]]) -> Table:
    now = time.monotonic_ns()
    speeds = "packets_per_second" in rows[0]
    flows = any("flows" in row for row in rows)
    held = any(row.get("hold") for row in rows)
    shown = []
    for row in rows:
        name = row.get("name") or ("" if row["origin"] == "stranger" else "configured")
        cells = [
            row["address"],
            name,
            row["class_name"],
            str(row["packets"]),
            str(row["bytes"]),
            str(row["drops"]),
        ]
        if speeds:
            cells += [rate_text(row["packets_per_second"]), rate_text(row["drops_per_second"])]
        cells.append(moment_text(row["last_seen_ns"], now))
        if held:
            cells.append(hold_text(row.get("hold")))
        shown.append(cells + flow_cells(row.get("flows", [])) if flows else cells)
    columns = ["peer", "name", "class", "packets", "bytes", "drops"]
    columns += ["packets now", "drops now"] if speeds else []
    right = frozenset(range(3, len(columns) + 1))
    columns += ["last seen", *(["held at"] if held else [])]
    if flows:
        right |= frozenset(range(len(columns), len(columns) + len(FLOW_COLUMNS) - 1))
        columns += FLOW_COLUMNS
    return Table(columns, shown, right)


def _frames(
    one: inventory.Loaded, names: Names, wanted: Filter, interval: float
) -> Iterator[tuple[dict[str, Any], list[Table]]]:
    """The busiest peers of each interval. What was pushed out of the table meanwhile can't be told."""
    everyone = wanted._replace(top=1 << 20)
    before: dict[str, Fields] = {}
    taken = 0.0
    for number in samples(interval):
        now = time.monotonic()
        holds = held_numbers(one, time.monotonic_ns())
        found, total = select(one, names, everyone, holds)
        if number:
            seconds = now - taken
            rows = [_with_rates(peer, before.get(peer.address), names, holds, seconds) for peer in found]
            key = {"last_seen": "last_seen_ns"}.get(wanted.sort, f"{wanted.sort}_per_second")
            rows = with_flows(heapq.nlargest(wanted.top, rows, key=lambda row: row[key]))
            document = {
                "interface": one.interface,
                "program": one.id,
                "seconds": round(seconds, 6),
                "matching": total,
                "peers": rows,
            }
            yield document, [_table(rows)] if rows else [Table(["no peer matches"], [])]
        before, taken = {peer.address: peer.fields for peer in found}, now


def _with_rates(
    peer: Peer, old: Fields | None, names: Names, holds: Mapping[int, Held], seconds: float
) -> dict[str, Any]:
    document = peer_document(peer, names, holds)
    for name in ("packets", "bytes", "drops"):
        # One that was forgotten in between, and has come again, counts from zero.
        start = old[name] if old is not None and old["packets"] <= peer.fields["packets"] else 0
        document[f"{name}_per_second"] = round((peer.fields[name] - start) / seconds, 3)
    return document
