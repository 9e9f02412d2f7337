# SPDX-License-Identifier: Apache-2.0
"""``sluice lab``: a lab that stays, to try things on from several shells."""

from __future__ import annotations

import os
import subprocess
from typing import Any, Final

import click
from pyroute2 import netns

from sluice_cli.lab import NETNS_DIRECTORY, Host, Lab, reclaim, remove
from sluice_cli.lab_connections import connections
from sluice_cli.lab_dns import dns
from sluice_cli.lab_flow import flow
from sluice_cli.lab_state import Marker, check_name, locked, namespace_names, read_marker, read_markers
from sluice_cli.output import Output, Table, common_options, examples
from sluice_cli.vm_command import vm
from xdp.errors import BusyError, UsageError

DEFAULT_NAME: Final = "default"

_name_option = click.option(
    "--name", default=DEFAULT_NAME, show_default=True, metavar="NAME", help="Of the lab."
)


@click.group(
    epilog=examples("""
        sudo sluice lab up --queues 2
        sudo sluice lab shell                         a shell on the client
        sudo sluice lab shell --host server -- ip address
        sudo sluice lab down
        sudo sluice lab dns                           a DNS server under a flood
        sudo sluice lab flow                          congestion control over real lanes
        sudo sluice lab connections                   links cut, peers killed: how soon is all well again?
        sudo sluice lab vm                            zero-copy, in an emulated machine
    """)
)
def lab_command() -> None:
    """Make two hosts on this machine to try things on.

    Two network namespaces joined by a veth cable: the server, where a program is attached, and the client,
    where traffic comes from.  Both have IPv4 and IPv6.  Nothing of the machine's own network is touched.
    """


lab_command.add_command(dns)
lab_command.add_command(connections)
lab_command.add_command(flow)
lab_command.add_command(vm)


@lab_command.command(
    epilog=examples("""
        sudo sluice lab up
        sudo sluice lab up --name second --queues 4 --json
    """)
)
@_name_option
@click.option("--queues", type=click.IntRange(1, 64), default=1, show_default=True, help="Of each end.")
@click.option("--static-neighbours", is_flag=True, help="No ARP and no neighbour discovery between the two.")
@common_options
def up(output: Output, name: str, queues: int, static_neighbours: bool) -> None:
    """Make a lab that stays until `sluice lab down`; does nothing when it is there already."""
    existing = _usable(check_name(name))
    if existing is None:
        lab = Lab(name, queues=queues, persistent=True, static_neighbours=static_neighbours)
        lab.up()
    elif existing.queues != queues:
        raise UsageError(
            f"lab {name!r} is up with {existing.queues} queues, not {queues}",
            hint=f"remove it first: sluice lab down --name {name}",
        )
    else:
        lab = Lab.open(name)
    document = {"lab": _describe(lab), "created": existing is None}
    output.report(document, lambda: _show(output, lab, created=existing is None))


@lab_command.command(
    epilog=examples("""
        sudo sluice lab down
        sudo sluice lab down --all
    """)
)
@_name_option
@click.option("--all", "everything", is_flag=True, help="Every lab that was made with `sluice lab up`.")
@common_options
def down(output: Output, name: str, everything: bool) -> None:
    """Remove a lab.  Processes that run in it are left alone, without a network."""
    names = [name]
    if everything:
        reclaim()
        markers, errors = read_markers()
        for error in errors:
            output.note(str(error))
        names = [marker.name for marker in markers if marker.persistent]
    removed: list[dict[str, object]] = []
    for one in names:
        inside = _processes(one)
        if remove(one):
            removed.append({"name": one, "processes_left": inside})
    output.report({"removed": removed}, lambda: _show_removed(output, names, removed))


@lab_command.command(
    epilog=examples("""
        sudo sluice lab shell
        sudo sluice lab shell --host server -- ethtool -S srv0
    """)
)
@_name_option
@click.option("--host", type=click.Choice(["client", "server"]), default="client", show_default=True,
              help="Which of the two.")  # fmt: skip
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
@common_options
def shell(output: Output, name: str, host: str, command: tuple[str, ...]) -> int:
    """Run a shell, or COMMAND, on a host of the lab; the exit code is its own.

    Only the network is the host's: files, /sys and a mounted bpffs are this machine's.
    """
    lab = Lab.open(name)
    where = lab.server if host == "server" else lab.client
    words = list(command) or [os.environ.get("SHELL", "/bin/sh")]
    if not command:
        other = lab.client if host == "server" else lab.server
        output.note(f"{host} of lab {name!r}: {where.ipv4}, {where.ipv6}; the other is {other.ipv4}")
    environment = {**os.environ, "SLUICE_LAB": name, "SLUICE_LAB_HOST": host}
    try:
        with where.enter():
            child = subprocess.Popen(words, env=environment)
    except FileNotFoundError:
        raise UsageError(f"no command {words[0]!r}", hint="options of the command go behind --") from None
    while True:
        try:
            code = child.wait()
            break
        except KeyboardInterrupt:
            continue  # Ctrl-C is for the command, which got it too; we wait for what it does
    # A shell reports a death by signal like this as well.
    return code if code >= 0 else 128 - code


@lab_command.command(
    name="list",
    epilog=examples("""
        sluice lab list
        sluice lab list --json
    """),
)
@common_options
def list_(output: Output) -> None:
    """List the labs of this machine, those of running tests and demos too."""
    markers, errors = read_markers()
    documents = [
        {
            "name": marker.name,
            "queues": marker.queues,
            "state": _state(marker),
            "owner": marker.owner_pid or None,
            "server": {"namespace": marker.namespaces[0]},
            "client": {"namespace": marker.namespaces[1]},
        }
        for marker in markers
    ]
    for error in errors:
        output.note(f"{error}; {error.hint}")
    rows = [
        (marker.name, _state(marker), str(marker.queues), str(marker.owner_pid or "-"), *marker.namespaces)
        for marker in markers
    ]
    table = Table(["NAME", "STATE", "QUEUES", "OWNER", "SERVER", "CLIENT"], rows, right=frozenset({2, 3}))
    document = {"labs": documents, "damaged": [str(error) for error in errors]}
    output.report(document, lambda: output.table(table))


def _usable(name: str) -> Marker | None:
    """The marker of a persistent lab that is complete; None when it has to be made."""
    with locked():
        marker = read_marker(name)
    if marker is None or marker.abandoned:
        return None
    if not marker.persistent:
        raise BusyError(
            f"lab {name!r} belongs to process {marker.owner_pid}", hint="choose another name with --name"
        )
    if not all((NETNS_DIRECTORY / namespace).exists() for namespace in marker.namespaces):
        # Somebody removed the namespaces by hand.
        remove(name)
        return None
    return marker


def _state(marker: Marker) -> str:
    if marker.abandoned:
        return "abandoned"
    if not marker.ready:
        return "starting"
    return "up" if marker.persistent else "in use"


def _describe(lab: Lab) -> dict[str, object]:
    return {
        "name": lab.name,
        "queues": lab.queues,
        "server": _describe_host(lab.server),
        "client": _describe_host(lab.client),
    }


def _describe_host(host: Host) -> dict[str, object]:
    return {
        "namespace": host.namespace,
        "interface": host.interface,
        "ifindex": host.ifindex,
        "mac": host.mac,
        "ipv4": str(host.ipv4),
        "ipv6": str(host.ipv6),
        "link_local": str(host.link_local),
    }


def _show(output: Output, lab: Lab, *, created: bool) -> None:
    output.line(f"lab {lab.name!r} is {'up' if created else 'up already'}, {lab.queues} queue(s)")
    rows = [
        (role, host.namespace, host.interface, str(host.ipv4), str(host.ipv6), host.mac)
        for role, host in (("server", lab.server), ("client", lab.client))
    ]
    output.table(Table(["HOST", "NAMESPACE", "INTERFACE", "IPV4", "IPV6", "MAC"], rows))


def _show_removed(output: Output, names: list[str], removed: list[dict[str, Any]]) -> None:
    for entry in removed:
        left = entry["processes_left"]
        rest = f"; still running in it, without a network: {', '.join(map(str, left))}" if left else ""
        output.line(f"lab {entry['name']!r} removed{rest}")
    if not removed:
        output.line("no lab to remove" if not names else f"no lab {names[0]!r}")


def _processes(name: str) -> list[int]:
    """Pids of all processes in the lab's namespaces."""
    inside = netns.ns_pids(str(NETNS_DIRECTORY))
    return sorted(pid for namespace in namespace_names(name) for pid in inside.get(namespace, ()))
