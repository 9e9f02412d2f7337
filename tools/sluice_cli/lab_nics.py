# SPDX-License-Identifier: Apache-2.0
"""A lab's cable of real hardware: two network cards connected back to back, instead of a veth pair.

A veth end has no zero-copy, so what is promised of it can be shown only on the interfaces of drivers that
have it: of this machine, or of an emulated one (``sluice lab vm``).  ``SLUICE_LAB_NICS=SERVER,CLIENT`` names
the two; every lab of that process and its children is then made with them.  They must be idle: an interface
that is up or has an address may be the machine's own way to the world, and is refused.

The cards are lent: a lab that ends gives them back to the namespace that they came from, as they were.
"""

from __future__ import annotations

import os
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from pyroute2 import IPRoute, NetlinkError

from xdp.errors import BusyError, UnsupportedError, UsageError

__all__ = ["VARIABLE", "borrow", "give_back", "named"]

VARIABLE: Final = "SLUICE_LAB_NICS"
_IFF_UP, _IFF_PROMISC = 1, 0x100  # linux/if.h
#: By default some drivers (igb) hash UDP by addresses alone: all of a lab's packets in one queue.
_FLOWS: Final = ("udp4", "udp6")
_XDP_FLAGS_DRV_MODE: Final = 1 << 2  # linux/if_link.h


def named() -> tuple[str, str] | None:
    """The server's and the client's card, None where the cable is a veth pair.

    Raises:
        UsageError: the variable does not name two interfaces.
    """
    text = os.environ.get(VARIABLE, "")
    if not text:
        return None
    names = tuple(part.strip() for part in text.split(","))
    if len(names) != 2 or not all(names) or names[0] == names[1]:
        raise UsageError(f"{VARIABLE} is {text!r}", hint="name two interfaces: SERVER,CLIENT")
    return names[0], names[1]


def borrow(interface: str, namespace: int, queues: int, mtu: int) -> None:
    """Move an idle card into a namespace (a descriptor of it) with that many queues.

    Raises:
        UsageError: no such interface.
        BusyError: it is in use.
        UnsupportedError: it has not so many queues, or can't be moved.
    """
    with IPRoute() as route:
        found = route.link_lookup(ifname=interface)
        if not found:
            raise UsageError(
                f"no interface {interface!r}, which {VARIABLE} names", hint="`ip link` lists what there is"
            )
        (link,) = route.link("get", index=found[0])
        if link["flags"] & _IFF_UP or list(route.get_addr(index=found[0])):
            raise BusyError(
                f"{interface} is up or has an address: it may be this machine's own",
                hint=f"a lab takes idle ones: ip link set {interface} down; ip address flush dev {interface}",
            )
        set_queues(interface, queues)
        # As on a veth pair, all that is sent arrives, with its VLAN tags: a card takes off the outermost
        # before the program sees the packet, and drops what has a tag that nobody has asked for.
        for offload in ("rx-vlan-offload", "rx-vlan-filter"):
            _ethtool("-K", interface, offload, "off")
        route.link("set", index=found[0], mtu=mtu, flags=_IFF_PROMISC, change=_IFF_PROMISC)
        route.link("set", index=found[0], net_ns_fd=namespace)


def set_queues(interface: str, queues: int) -> None:
    """That many queue pairs, and UDP spread over them by ports too, where the driver can be told."""
    done = _ethtool("-L", interface, "combined", str(queues))
    # 80: nothing to change (ethtool 6.1 and older).
    if done.returncode not in (0, 80) and not _has_queues(interface, queues):
        raise UnsupportedError(
            f"{interface} can't have {queues} queues: {done.stderr.strip()}",
            hint=f"see what it can have: ethtool -l {interface}",
        )
    for flow in _FLOWS:
        # Refused where the card has one queue or no such hash; a test of several queues then fails.
        _ethtool("-N", interface, "rx-flow-hash", flow, "sdfn")


def give_back(route: IPRoute) -> None:
    """Return every card of a namespace (``route`` is in it) to the caller's, idle and without a program."""
    off = {"attrs": [("IFLA_XDP_FD", -1), ("IFLA_XDP_FLAGS", _XDP_FLAGS_DRV_MODE)]}
    changes: tuple[dict[str, Any], ...] = (
        {"IFLA_XDP": off},
        {"flags": 0, "change": _IFF_UP | _IFF_PROMISC},
        {"net_ns_pid": os.getpid()},
    )
    for link in list(route.get_links()):
        # What software made has a kind (veth); cards have none, and lo is nobody's to give.
        if link.get("ifname") == "lo" or link.get(("linkinfo", "kind")) is not None:
            continue
        for change in changes:
            with suppress(NetlinkError):  # it is gone, or has no program
                route.link("set", index=link["index"], **change)


def _has_queues(interface: str, queues: int) -> bool:
    return len(list(Path(f"/sys/class/net/{interface}/queues").glob("rx-*"))) == queues


def _ethtool(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ethtool", *arguments], capture_output=True, text=True, check=False)
