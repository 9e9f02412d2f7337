# SPDX-License-Identifier: Apache-2.0
"""``sluice down``: take Sluice's program off an interface.

The program leaves when nothing holds its link any more.  So the owner is asked to end (SIGTERM, which it
answers by putting the interface's settings back), and pins are removed.  A process is only signalled when it
holds the link itself, which the kernel says, and it is signalled through a pidfd, so that a recycled process
id can't be meant.  A foreign program is never touched.
"""

from __future__ import annotations

import errno
import os
import signal
import socket
import time
from typing import Any

import click

from sluice_cli.map_view import owner_state
from sluice_cli.output import Output, common_options, examples
from xdp import inventory
from xdp._libbpf import lib
from xdp.errors import BusyError, SluiceError, UsageError
from xdp.journal import journal_path, journals

POLL_SECONDS = 0.02
XDP_FLAGS_REPLACE = 16  # linux/if_link.h: only if the expected program is the one


@click.command(
    epilog=examples(
        """sudo sluice down
        sudo sluice down eth1
        sudo sluice down eth1 --force      also from a process that is not `sluice up`"""
    ),
)
@click.argument("interface", required=False)
@click.option(
    "--timeout",
    type=click.FloatRange(0.1, 300),
    default=10.0,
    show_default=True,
    help="Seconds to wait until the program is off.",
)
@click.option(
    "--force", is_flag=True, help="End processes that left no state too, by SIGKILL after the timeout."
)
@common_options
def down(output: Output, interface: str | None, timeout: float, force: bool) -> None:
    """Take Sluice's program off an interface.

    Nothing loaded is no error: the command says so and succeeds. INTERFACE may be left out when Sluice is on
    one interface only.
    """
    one = _target(interface)
    if one is None:
        said = reclaim(interface)
        document: dict[str, Any] = {"interface": interface, "removed": False, "settings": said}
        where = f" on {interface}" if interface else ""

        def text() -> None:
            output.line(f"nothing is loaded{where}")
            for line in said:
                output.line(line)

        output.report(document, text)
        return
    document = remove(one, timeout, force)
    output.report(document, lambda: output.line(_sentence(document)))


def _target(interface: str | None) -> inventory.Loaded | None:
    """The program to take off; None when there is none."""
    found = inventory.loaded(interface)
    ours = [one for one in found if one.ours]
    if len(ours) > 1:
        names = ", ".join(sorted(one.interface for one in ours))
        raise UsageError(f"Sluice runs on {names}", hint=f"choose one: sluice down {ours[0].interface}")
    if not ours and interface is not None and found:
        raise BusyError(
            f"{interface} carries program {found[0].id} ({found[0].name or '?'}), which is not Sluice's",
            hint="it is not ours to remove; its owner has to (bpftool prog show, bpftool link show)",
        )
    return ours[0] if ours else None


def reclaim(interface: str | None) -> list[str]:
    """Put back what killed owners changed of this interface, or of all here; a line for each setting."""
    from userspace.datagram.claim import Claim

    said: list[str] = []
    for ifindex in journals():
        try:
            name = socket.if_indextoname(ifindex)
        except OSError:
            # The interface is gone, and its settings with it.
            journal_path(ifindex).unlink(missing_ok=True)
            continue
        if interface not in {None, name}:
            continue

        def say(text: str, name: str = name) -> None:
            said.append(f"{name}: {text}")

        try:
            Claim(name, ifindex, say).leave()
        except BusyError as error:  # an owner lives that has no program on it (its interface came back, say)
            say(str(error))
    return said


def remove(one: inventory.Loaded, timeout: float, force: bool) -> dict[str, Any]:
    """Take the program off. Raises `BusyError` when a process keeps it."""
    holders = [holder for holder in inventory.holders(one) if holder.link]
    state = owner_state(one)
    known = {state.pid} if state is not None and state.alive else set()
    strange = [holder for holder in holders if holder.pid not in known]
    if strange and not force:
        who = ", ".join(f"{holder.command} (pid {holder.pid})" for holder in strange)
        raise BusyError(
            f"program {one.id} on {one.interface} belongs to {who}, which is not a `sluice up`",
            hint=f"end that process, or have it ended: sluice down {one.interface} --force",
        )
    if one.link_id is not None and not holders and not inventory.pins(one):
        raise BusyError(
            f"nothing that can be seen from here holds link {one.link_id} of program {one.id}",
            hint="look as root, where the bpffs is visible: nsenter --net=FILE, not ip netns exec",
        )
    unpinned = _unpin(one)
    signalled = [holder.pid for holder in holders if _signal(holder.pid, one, signal.SIGTERM)]
    if one.link_id is None:
        _detach(one)
    if not _gone(one, timeout) and force:
        for holder in inventory.holders(one):
            if holder.link:
                _signal(holder.pid, one, signal.SIGKILL)
    if not _gone(one, timeout if force else 0.0):
        who = ", ".join(f"{one.command} (pid {one.pid})" for one in inventory.holders(one) if one.link)
        raise BusyError(
            f"program {one.id} is still on {one.interface} after {timeout:g} s"
            + (f", held by {who}" if who else ""),
            hint=f"have it killed: sluice down {one.interface} --force",
        )
    if unpinned and not signalled:
        _tidy(one)
    return {
        "interface": one.interface,
        "removed": True,
        "program": one.id,
        "signalled": signalled,
        "unpinned": unpinned,
    }


def _detach(one: inventory.Loaded) -> None:
    """Take off a program that was attached without a link, if it still is the one that was found."""
    from pyroute2 import IPRoute
    from pyroute2.netlink.exceptions import NetlinkError

    descriptor = inventory.program_descriptor(one)
    mode = {"native": lib.XDP_FLAGS_DRV_MODE, "generic": lib.XDP_FLAGS_SKB_MODE}.get(one.mode, 0)
    attributes = [
        ("IFLA_XDP_FD", -1),
        ("IFLA_XDP_EXPECTED_FD", descriptor),
        ("IFLA_XDP_FLAGS", mode | XDP_FLAGS_REPLACE),
    ]
    try:
        with IPRoute() as route:
            route.link("set", index=one.ifindex, xdp={"attrs": attributes})
    except NetlinkError as error:
        if error.code != errno.EEXIST:
            raise SluiceError.from_errno(
                f"taking program {one.id} off {one.interface}", error.code
            ) from error
        raise BusyError(
            f"{one.interface} has another program by now", hint=f"look again: sluice status {one.interface}"
        ) from error
    finally:
        os.close(descriptor)


def _tidy(one: inventory.Loaded) -> None:
    """After `sluice up --persist` nobody else is there to put settings back and remove the state file."""
    from userspace.datagram.claim import Claim

    Claim(one.interface, one.ifindex, lambda _text: None).leave()


def _unpin(one: inventory.Loaded) -> list[str]:
    paths = inventory.pins(one)
    for path in paths:
        path.unlink(missing_ok=True)
        _remove_empty(path.parent)
    return [str(path) for path in paths]


def _remove_empty(folder: Any) -> None:
    """Remove the folders of removed pins, up to and including the root of ours, while they are empty."""
    while folder.is_relative_to(inventory.PIN_ROOT):
        try:
            folder.rmdir()
        except OSError:  # not empty: others' pins
            return
        folder = folder.parent


def _signal(pid: int, one: inventory.Loaded, number: signal.Signals) -> bool:
    """Signal a process that holds the link; False when it is gone or no longer does."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return False
    except OSError as error:
        raise SluiceError.from_errno(f"process {pid}", error.errno or 0) from error
    try:
        # The pid may have gone to another process since it was found; the pidfd can't any more.
        if not any(holder.pid == pid and holder.link for holder in inventory.holders(one)):
            return False
        signal.pidfd_send_signal(descriptor, number)
    except ProcessLookupError:
        return False
    finally:
        os.close(descriptor)
    return True


def _gone(one: inventory.Loaded, timeout: float) -> bool:
    """Wait until the interface no longer carries the program."""
    deadline = time.monotonic() + timeout
    while any(
        (found.ifindex, found.program_id) == (one.ifindex, one.id) for found in inventory.attachments()
    ):
        if time.monotonic() >= deadline:
            return False
        time.sleep(POLL_SECONDS)
    return True


def _sentence(document: dict[str, Any]) -> str:
    words = [f"took program {document['program']} off {document['interface']}"]
    if document["signalled"]:
        words.append(f"ended process {', '.join(map(str, document['signalled']))}")
    if document["unpinned"]:
        words.append(f"removed {', '.join(document['unpinned'])}")
    return "; ".join(words)
