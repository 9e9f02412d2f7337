# SPDX-License-Identifier: Apache-2.0
"""``sluice peers hold`` and ``release``, and what `sluice peers` shows of them (docs/flow.md)."""

from __future__ import annotations

from contextlib import ExitStack
from ipaddress import ip_address
from typing import Any

import click

from sluice_cli.output import Output, common_options, examples
from xdp import inventory
from xdp.holds import DEFAULT_SECONDS, HOLDS, MARKS, MAX_SECONDS, Held, HoldTable, PeerHolds
from xdp.tables import MAX_HOLD_BURST, MAX_HOLD_RATE

#: As of `peer_burst` in a policy: packets at once where nobody says how many.
_LEAST_BURST = 16

_INTERFACE = click.option(
    "-i", "--interface", metavar="NAME", help="Interface; may be left out when Sluice is on one only."
)


class WithHolds(click.Command):
    """`sluice peers`, whose first word may be an interface: that rules out a group of click's."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        """The context of the command that the first word names, or of this one."""
        inner = _COMMANDS.get(args[0]) if args else None
        if inner is None:
            return super().make_context(info_name, args, parent, **extra)
        return inner.make_context(f"{info_name} {args[0]}", args[1:], parent, **extra)


@click.command(
    epilog=examples(
        """sudo sluice peers hold 192.0.2.7 --rate 500
        sudo sluice peers hold 2001:db8::7 --rate 500 --burst 20 --seconds 600"""
    )
)
@click.argument("address")
@click.option(
    "--rate", type=click.IntRange(1, MAX_HOLD_RATE), required=True, help="Packets per second let through."
)
@click.option(
    "--burst",
    type=click.IntRange(1, MAX_HOLD_BURST),
    help="Packets at once; a tenth of the rate, at least 16, if it is not given.",
)
@click.option(
    "--seconds",
    type=click.FloatRange(0, MAX_SECONDS, min_open=True),
    default=DEFAULT_SECONDS,
    show_default=True,
    help="How long, from now.",
)
@_INTERFACE
@common_options
def hold(
    output: Output, address: str, rate: int, burst: int | None, seconds: float, interface: str | None
) -> None:
    """Hold a configured peer at a rate, on top of what the policy says.

    What is over it is dropped with the reason drop_held. It ends by itself after --seconds; the same command
    again renews or changes it. A controller that holds the same peer writes over it.
    """
    at_once = burst if burst is not None else min(MAX_HOLD_BURST, max(_LEAST_BURST, rate // 10))
    one = inventory.find(interface)
    with PeerHolds.open(one.map) as holds:
        holds.hold(address, rate, at_once, seconds=seconds)
        held = holds.held().get(ip_address(address))
    document = {
        "interface": one.interface,
        "program": one.id,
        "address": address,
        "hold": hold_document(held),
    }
    text = f"{address}: at most {rate} packets/s, {at_once} at once, for {seconds:g} s"
    output.report(document, lambda: output.line(text))


@click.command(epilog=examples("sudo sluice peers release 192.0.2.7"))
@click.argument("address")
@_INTERFACE
@common_options
def release(output: Output, address: str, interface: str | None) -> None:
    """End the hold of a peer. It is no error if it has none."""
    one = inventory.find(interface)
    with PeerHolds.open(one.map) as holds:
        was = holds.release(address)
    document = {"interface": one.interface, "program": one.id, "address": address, "was_held": was}
    output.report(document, lambda: output.line(f"{address}: {'released' if was else 'was not held'}"))


_COMMANDS: dict[str, click.Command] = {"hold": hold, "release": release}


def held_numbers(one: inventory.Loaded, now_ns: int) -> dict[int, Held]:
    """Who is held, by the peers' numbers; empty for a program of a version without holds."""
    if HOLDS not in one.maps or MARKS not in one.maps:
        return {}
    with ExitStack() as stack:
        maps = {name: one.map(name) for name in (HOLDS, MARKS)}
        for opened_map in maps.values():
            stack.callback(opened_map.close)
        table = stack.enter_context(HoldTable(maps))
        found = {number: table.get(number, now_ns) for number in table.numbers()}
    return {number: held for number, held in found.items() if held is not None}


def hold_document(held: Held | None) -> dict[str, Any] | None:
    """A hold for JSON; None: not held."""
    return None if held is None else {**held._asdict(), "seconds": round(held.seconds, 3)}


def hold_text(document: dict[str, Any] | None) -> str:
    """A hold in a cell: rate, and how long still."""
    if document is None:
        return ""
    return f"{document['packets_per_second']}/s, {document['seconds']:.0f} s more"
