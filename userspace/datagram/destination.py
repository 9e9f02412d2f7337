# SPDX-License-Identifier: Apache-2.0
"""Where packets go that do not pass through the kernel's stack: all their headers.

A :class:`Destination` holds what Ethernet, IP and UDP headers say.
:func:`resolve_destination` asks the kernel for it: the route for the source
address and the next hop, the neighbour table for the next hop's MAC address.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from userspace.datagram.batch import Address
from userspace.native._native import ffi, lib
from xdp.errors import SluiceError, UnsupportedError, UsageError

if TYPE_CHECKING:
    from userspace.native._native import CData

#: Seconds to wait for a neighbour's answer; the kernel asks three times, a second apart.
NEIGHBOUR_TIMEOUT = 3.5
_NEIGHBOUR_PAUSE = 0.01

# linux/neighbour.h: states with an address that may be used.
_USABLE = 0x02 | 0x04 | 0x08 | 0x10 | 0x40 | 0x80  # reachable, stale, delay, probe, noarp, permanent
_NO_ARP = 0x40
_NTF_USE = 0x01  # look the neighbour up as if a packet were to be sent

# linux/rtnetlink.h
_RTN_UNICAST = 1

_DISCARD_PORT = 9  # RFC 863

Endpoint = tuple[str | Address, int]


def _mac(value: bytes | str, what: str) -> bytes:
    try:
        packed = bytes.fromhex(value.replace(":", "")) if isinstance(value, str) else bytes(value)
    except ValueError:
        packed = b""
    if len(packed) != 6:
        raise UsageError(f"{what} {value!r} is not a MAC address", hint='write it as "02:00:00:00:00:01"')
    return packed


def _endpoint(value: Endpoint, what: str) -> tuple[Address, int]:
    try:
        address, port = value
        host = ipaddress.ip_address(address)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{what} {value!r} is not an (address, port) pair") from error
    if not 1 <= port <= 65535:
        raise UsageError(f"{what}: port {port!r} is not 1 to 65535")
    return host, port


@dataclass(frozen=True)
class Destination:
    """Headers of packets to one destination.

    MAC addresses as 6 bytes or "02:00:00:00:00:01"; ``source`` and
    ``destination`` are (address, port); ``vlan`` an 802.1Q tag, 0 to 4094.
    ``mtu`` bounds the IP packet in bytes.  Raises UsageError when a value is not
    possible.
    """

    source_mac: bytes | str
    destination_mac: bytes | str
    source: Endpoint
    destination: Endpoint
    vlan: int | None = None
    hops: int = 64
    traffic_class: int = 0
    identification: int = 0
    flow_label: int = 0
    mtu: int = 1500
    template: CData = field(init=False, repr=False, compare=False)
    #: ``struct sl_template *[1]``
    templates: CData = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        source, source_port = _endpoint(self.source, "source")
        destination, destination_port = _endpoint(self.destination, "destination")
        if source.version != destination.version:
            raise UsageError(f"source {source} and destination {destination} are of different families")
        for name, limit in (
            ("hops", 255),
            ("traffic_class", 255),
            ("identification", 65535),
            ("flow_label", (1 << 20) - 1),
            ("mtu", 65535),
        ):
            if not 0 <= getattr(self, name) <= limit:
                raise UsageError(f"{name} of a destination is 0 to {limit}, not {getattr(self, name)}")
        raw = ffi.new("struct sl_destination *")
        raw.source_mac = _mac(self.source_mac, "source_mac")
        raw.destination_mac = _mac(self.destination_mac, "destination_mac")
        ffi.memmove(raw.source, source.packed, len(source.packed))
        ffi.memmove(raw.destination, destination.packed, len(destination.packed))
        raw.source_port, raw.destination_port = source_port, destination_port
        raw.identification, raw.mtu = self.identification, self.mtu
        raw.hops, raw.traffic_class = self.hops, self.traffic_class
        raw.family = source.version
        if self.vlan is not None and not 0 <= self.vlan <= 4094:
            raise UsageError(f"vlan of a destination is 0 to 4094 or None, not {self.vlan}")
        raw.vlan = -1 if self.vlan is None else self.vlan
        raw.flow_label = self.flow_label
        template = ffi.new("struct sl_template *")
        if lib.sl_template_init(template, raw):
            raise UsageError(
                f"an mtu of {self.mtu} is too small for IPv{source.version}",
                hint="IPv4 has at least 68, IPv6 1280",
            )
        object.__setattr__(self, "template", template)
        object.__setattr__(self, "templates", ffi.new("struct sl_template *[]", [template]))

    @property
    def payload_maximum(self) -> int:
        """Bytes of UDP payload that fit the MTU."""
        maximum: int = self.template.payload_maximum
        return maximum


def resolve_destination(
    interface: str,
    address: str | Address,
    port: int,
    source_port: int,
    *,
    timeout: float = NEIGHBOUR_TIMEOUT,
) -> Destination:
    """Ask the kernel how packets to ``address`` leave through ``interface``.

    Unknown neighbours are looked up (ARP, neighbour discovery), which takes as
    long as the answer does.

    Raises UnsupportedError when there is no route through that interface, the
    destination is this machine or a group, or the neighbour does not answer.
    Such packets go through a kernel socket.
    """
    from pyroute2 import IPRoute
    from pyroute2.netlink.exceptions import NetlinkError

    host, _ = _endpoint((address, port), "destination")
    family = socket.AF_INET if host.version == 4 else socket.AF_INET6
    try:
        ifindex = socket.if_nametoindex(interface)
    except OSError as error:
        raise UsageError(f"there is no interface {interface!r} here", hint="`ip link` lists them") from error
    with IPRoute() as ip:
        try:
            # Not asked for this interface, except where only that tells the link: the kernel would
            # make up an on-link route to anywhere.
            through = {"oif": ifindex} if host.is_link_local else {}
            routes = tuple(ip.route("get", dst=str(host), family=family, **through))
            link = ip.get_links(ifindex)[0]
        except NetlinkError as error:
            raise _no_way(host, interface, str(error)) from error
        if not routes or routes[0]["type"] != _RTN_UNICAST or routes[0].get_attr("RTA_OIF") != ifindex:
            raise _no_way(host, interface, "not a unicast route through it")
        route = routes[0]
        source = route.get_attr("RTA_PREFSRC")
        if source is None:
            raise _no_way(host, interface, "no source address on it")
        next_hop = ipaddress.ip_address(route.get_attr("RTA_GATEWAY") or str(host))
        mac = _neighbour(ip, ifindex, interface, next_hop, timeout)
        metrics = route.get_attr("RTA_METRICS")
        mtu = (metrics.get_attr("RTAX_MTU") if metrics is not None else None) or link.get_attr("IFLA_MTU")
        own = link.get_attr("IFLA_ADDRESS")
    return Destination(own, mac, (source, source_port), (host, port), mtu=min(mtu, 65535))


def _no_way(host: Address, interface: str, why: str) -> SluiceError:
    return UnsupportedError(
        f"no way to {host} through {interface}: {why}",
        hint="`ip route get` shows where it goes; a kernel socket sends there",
    )


def _neighbour(ip: Any, ifindex: int, interface: str, host: Address, timeout: float) -> str:
    asked = False
    deadline = time.monotonic() + timeout
    while True:
        mac = _known_neighbour(ip, ifindex, host)
        if mac is not None:
            return mac
        if not asked:
            _ask_neighbour(ip, ifindex, interface, host)
            asked = True
        elif time.monotonic() > deadline:
            raise UnsupportedError(
                f"{host} on {interface} does not answer (ARP or neighbour discovery)",
                hint="is it up, and in the same network? `ip neighbour` shows what is known",
            )
        else:
            time.sleep(_NEIGHBOUR_PAUSE)


def _known_neighbour(ip: Any, ifindex: int, host: Address) -> str | None:
    family = socket.AF_INET if host.version == 4 else socket.AF_INET6
    for entry in ip.get_neighbours(family=family, ifindex=ifindex):
        if entry.get_attr("NDA_DST") == str(host) and entry["state"] & _USABLE:
            mac: str | None = entry.get_attr("NDA_LLADDR")
            if mac is not None and not entry["state"] & _NO_ARP:
                return mac
    return None


def _ask_neighbour(ip: Any, ifindex: int, interface: str, host: Address) -> None:
    """Have the kernel look it up; without privileges, by a datagram to its discard port."""
    from pyroute2.netlink.exceptions import NetlinkError

    try:
        ip.neigh("replace", dst=str(host), ifindex=ifindex, state="none", flags=_NTF_USE)
    except (NetlinkError, OSError) as error:
        code = error.code if isinstance(error, NetlinkError) else error.errno
        if code == errno.ENOBUFS:
            raise UnsupportedError(
                f"no way to {host} through {interface}: the kernel's neighbour table is full",
                hint="raise sysctl net.ipv4.neigh.default.gc_thresh3 (net.ipv6 likewise)",
            ) from error
        if code not in {errno.EPERM, errno.EACCES}:
            raise _no_way(host, interface, os.strerror(code or 0)) from error
        family = socket.AF_INET if host.version == 4 else socket.AF_INET6
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            try:
                probe.sendto(b"", (str(host), _DISCARD_PORT))
            except OSError as refused:
                raise _no_way(host, interface, str(refused)) from refused
