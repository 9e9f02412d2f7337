# SPDX-License-Identifier: Apache-2.0
"""How the kernel routes datagrams that leave past it: asked once per address, kept until something changes.

    router = Router("eth1")
    ...
    router.poll()                          # before each batch: what has changed meanwhile?
    found = router.find("192.0.2.7", now)  # a Route, or Elsewhere: through a kernel socket

RTM_GETROUTE says which interface, source address, next hop and MTU a destination has; the neighbour
table has the next hop's MAC address (rtnetlink(7)).  rtnetlink reports every change of links,
addresses, routes, rules and next hops: then all is asked again.  Changes of neighbours carry all that
has to be known.  A report that got lost in an overrun (ENOBUFS) counts as a change of everything.

What is not reported is asked again after a while: a path MTU that the kernel learned.

Nothing here waits for an answer of the network.  A next hop whose MAC address is not known yet, or
wants to be confirmed, is `Elsewhere` for the moment: a datagram through a kernel socket makes the
kernel look it up (ARP, RFC 826; neighbour discovery, RFC 4861), and the answer is reported here.

Whoever sends while there is no carrier makes the kernel look in vain, and it looks again only once a
second: when the carrier is back, what it has not found is forgotten, so that it looks at once.  That
takes CAP_NET_ADMIN; nothing else needs privileges.  Not thread-safe.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import select
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from xdp.errors import SluiceError, UsageError
from xdp.netlink import Netlink

__all__ = ["Elsewhere", "Hop", "Route", "Router"]

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

#: Seconds for which a route is used without asking again; what the kernel does not report (a path MTU)
#: is known that late.
MAX_AGE: Final = 5.0

#: Routes asked for between two calls of `poll`: each takes a fifth of a millisecond, and who waits could
#: have sent through the kernel meanwhile.
BUDGET: Final = 16

#: Of these, routes that are only too old: they are right as far as anybody has said.
REFRESHES: Final = 2

#: Neighbours that the kernel is made to look for when the carrier is back, two questions each: 20 ms once.
#: The others wait for its own timer, up to a second.
_LOOKS: Final = 128

#: Addresses remembered; the oldest go first.
_MAX_ROUTES: Final = 65_536

# linux/rtnetlink.h: groups that are bits of the address, and those that have to be joined.
_GROUPS: Final = (
    0x1 | 0x4 | 0x10 | 0x40 | 0x80 | 0x100 | 0x400
)  # link, neigh, v4 ifaddr route rule, v6 ifaddr route
_JOINED: Final = (19, 32)  # RTNLGRP_IPV6_RULE, RTNLGRP_NEXTHOP
_SOL_NETLINK: Final = 270
_NETLINK_ADD_MEMBERSHIP: Final = 1
_RTM_NEWLINK, _RTM_NEWNEIGH, _RTM_DELNEIGH = 16, 28, 29
_NDA_DST, _NDA_LLADDR = 1, 2
_HEADER: Final = struct.Struct("=IHHII")  # struct nlmsghdr
_LINK: Final = struct.Struct("=BxHiI")  # struct ifinfomsg, without ifi_change
_NEIGH: Final = struct.Struct("=BxxxiHBB")  # struct ndmsg
_ATTRIBUTE: Final = struct.Struct("=HH")
_RECEIVE_BUFFER: Final = 1 << 20  # bytes; thousands of reports
_MESSAGES: Final = 1 << 16

# linux/neighbour.h
_INCOMPLETE, _FAILED = 0x01, 0x20
_STALE: Final = 0x04
_USABLE: Final = 0x02 | _STALE | 0x08 | 0x10 | 0x80  # reachable, delay, probe, permanent

# linux/rtnetlink.h, linux/in_route.h, linux/if.h
_UNICAST, _MULTICAST = 1, 5
_RTCF_LOCAL: Final = 0x80000000
_IFF_UP: Final = 0x1
_IFF_RUNNING: Final = 0x40  # the carrier, as far as datagrams are concerned
_IFF_NOARP: Final = 0x80

_TAG: Final = 0x8100  # IEEE 802.1Q

_UNICAST_HOPS, _MULTICAST_HOPS = 64, 1  # of sockets that say nothing (ip(7)): RFC 1700; RFC 1112, 6.1


class Hop:
    """A neighbour: ``mac`` is None while the kernel does not know it; ``version`` counts its changes."""

    __slots__ = ("mac", "unconfirmed", "version")

    def __init__(self) -> None:
        self.mac: bytes | None = None
        #: The kernel has not heard of it for a while (STALE): it looks only if it has something to send.
        self.unconfirmed = False
        self.version = 0

    def update(self, state: int, mac: bytes | None) -> None:
        """What a report says."""
        usable = mac if mac is not None and len(mac) == 6 and state & _USABLE else None
        if usable != self.mac:
            self.mac = usable
            self.version += 1
        self.unconfirmed = usable is not None and bool(state & _STALE)


@dataclass(frozen=True, slots=True, eq=False)
class Route:
    """How datagrams to one address leave through the router's interface; compare by identity.

    ``hop`` has the MAC address to send to; ``source`` is the address that the kernel would send from,
    ``vlan`` a tag (None: untagged), ``mtu`` bytes of the IP packet, ``hops`` the TTL or hop limit.
    """

    source: str
    source_mac: bytes
    hop: Hop
    mtu: int
    vlan: int | None
    hops: int
    expires: float


@dataclass(frozen=True, slots=True, eq=False)
class Elsewhere:
    """Not through frames of ours: a kernel socket sends there, or finds the same reason not to."""

    reason: str
    expires: float = 0.0
    #: for this moment only: the next call of `find` may say something else, without any report
    passing: bool = False


@dataclass(frozen=True, slots=True)
class _Link:
    """An interface that frames can leave by: ours, or a VLAN on top of it."""

    mac: bytes
    mtu: int
    vlan: int | None


_NO_ADDRESS: Final = Elsewhere("its next hop's MAC address is not known yet")
_CONFIRM: Final = Elsewhere("its next hop wants to be confirmed", passing=True)
_LATER: Final = Elsewhere("too many routes are being asked for", passing=True)


class Router:
    """Answers of the kernel about one interface of the calling thread's network namespace."""

    def __init__(self, interface: str) -> None:
        try:
            self.ifindex = socket.if_nametoindex(interface)
        except (OSError, ValueError) as error:
            raise UsageError(
                f"there is no interface {interface!r} here", hint="`ip link` lists them"
            ) from error
        self.interface = interface
        self._routes: dict[str, Route | Elsewhere] = {}
        self._hops: dict[tuple[int, bytes], Hop] = {}
        self._links: dict[int, _Link | None] = {}
        #: counts reports: while it stays, so do all answers, but for those that are passing or too old
        self.version = 0
        self._left, self._refreshes = BUDGET, REFRESHES
        self._carrier = True
        # First the subscription, then the questions, so that nothing falls between the two.
        self._reports = socket.socket(
            socket.AF_NETLINK,
            socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK,
            socket.NETLINK_ROUTE,
        )
        try:
            self._reports.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER)
            self._reports.bind((0, _GROUPS))
            for group in _JOINED:
                self._reports.setsockopt(_SOL_NETLINK, _NETLINK_ADD_MEMBERSHIP, group)
            self._poller = select.poll()
            self._poller.register(self._reports, select.POLLIN)
            self._netlink = Netlink()
        except BaseException:
            self._reports.close()
            raise

    def fileno(self) -> int:
        """Readable when `poll` has something to take in."""
        return self._reports.fileno()

    def close(self) -> None:
        """Ask and hear no more; may be called again."""
        self._reports.close()
        self._netlink.close()

    def find(self, address: str, now: float) -> Route | Elsewhere:
        """How to reach an address, from what is known or by asking the kernel (a fifth of a millisecond).

        ``now`` is a monotonic clock's seconds.  A `Route` may be used until the next `poll`.
        """
        found = self._routes.get(address)
        if found is None:
            if self._left == 0:
                return _LATER
            found = self._learn(address, now)
        elif found.expires < now and self._left and self._refreshes:
            self._refreshes -= 1
            del self._routes[address]
            found = self._learn(address, now)
        if isinstance(found, Route):
            hop = found.hop
            if hop.mac is None:
                return _NO_ADDRESS
            if hop.unconfirmed:
                hop.unconfirmed = False
                return _CONFIRM
        return found

    def _learn(self, address: str, now: float) -> Route | Elsewhere:
        self._left -= 1
        found = self._ask(address, now + MAX_AGE)
        if len(self._routes) >= _MAX_ROUTES:
            del self._routes[next(iter(self._routes))]
        self._routes[address] = found
        return found

    # What has changed

    def poll(self) -> None:
        """Take in what the kernel has reported; never waits.  Raises nothing that the network can cause."""
        self._left, self._refreshes = BUDGET, REFRESHES
        while self._poller.poll(0):
            self.version += 1
            try:
                data = self._reports.recv(_MESSAGES)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise SluiceError.from_errno("watching routes", error.errno or 0) from error
                self._forget()
                self._hops.clear()
                continue
            for kind, body in _messages(data):
                if kind in {_RTM_NEWNEIGH, _RTM_DELNEIGH}:
                    self._neighbour_changed(kind, body)
                else:
                    self._forget()
                    if kind == _RTM_NEWLINK:
                        self._link_changed(body)

    def _link_changed(self, body: bytes) -> None:
        if len(body) < _LINK.size:
            return
        _family, _type, ifindex, flags = _LINK.unpack_from(body)
        if ifindex != self.ifindex:
            return
        before, self._carrier = self._carrier, bool(flags & _IFF_RUNNING)
        if self._carrier and not before:
            self._look_again()

    def _look_again(self) -> None:
        """The carrier is back: what the kernel has not found meanwhile, it is to look for at once."""
        from pyroute2.netlink.exceptions import NetlinkError

        missing = [key for key, hop in self._hops.items() if hop.mac is None]
        for ifindex, packed in missing[:_LOOKS]:
            address = ipaddress.ip_address(packed)
            family = socket.AF_INET if address.version == 4 else socket.AF_INET6
            with contextlib.suppress(NetlinkError):  # not there, or not ours to change
                entry = self._netlink.neighbour(str(address), family, ifindex)
                if entry["state"] & (_INCOMPLETE | _FAILED):
                    self._netlink.forget_neighbour(str(address), family, ifindex)

    def _forget(self) -> None:
        self._routes.clear()
        self._links.clear()

    def _neighbour_changed(self, kind: int, body: bytes) -> None:
        if len(body) < _NEIGH.size:
            return
        _family, ifindex, state, _flags, _type = _NEIGH.unpack_from(body)
        attributes = dict(_attributes(body[_NEIGH.size :]))
        hop = self._hops.get((ifindex, attributes.get(_NDA_DST, b"")))
        if hop is not None:
            gone = kind == _RTM_DELNEIGH
            hop.update(0 if gone else state, None if gone else attributes.get(_NDA_LLADDR))

    # Questions

    def _ask(self, address: str, expires: float) -> Route | Elsewhere:
        from pyroute2.netlink.exceptions import NetlinkError

        try:
            host = ipaddress.ip_address(address)
        except ValueError:
            return Elsewhere(f"{address!r} is not an address", expires)
        family = socket.AF_INET if host.version == 4 else socket.AF_INET6
        # Not asked for this interface, except where only that tells the link: the kernel would make
        # up an on-link route to anywhere.
        through = self.ifindex if host.is_link_local else None
        try:
            route = self._netlink.route(str(host).partition("%")[0], family, through)
            link = self._link(route.get_attr("RTA_OIF"))
        except NetlinkError as error:
            return Elsewhere(os.strerror(error.code), expires)
        if link is None:
            return Elsewhere("it leaves through another interface", expires)
        if (route["type"], bool(route["flags"] & _RTCF_LOCAL)) not in {
            (_UNICAST, False),
            (_MULTICAST, False),
        }:
            return Elsewhere("it is this machine, a group that it is in, or nobody's", expires)
        if route.get_attr("RTA_ENCAP") is not None:
            return Elsewhere("its route encapsulates", expires)
        source = route.get_attr("RTA_PREFSRC")
        if source is None:
            return Elsewhere("no source address on that interface", expires)
        metrics = route.get_attr("RTA_METRICS")

        def metric(name: str) -> int:
            return (metrics.get_attr(name) if metrics is not None else None) or 0

        group = route["type"] == _MULTICAST
        return Route(
            source=source,
            source_mac=link.mac,
            hop=_group_hop(host) if group else self._hop(route, host),
            mtu=min(metric("RTAX_MTU") or link.mtu, 65535),
            vlan=link.vlan,
            hops=metric("RTAX_HOPLIMIT") or (_MULTICAST_HOPS if group else _UNICAST_HOPS),
            expires=expires,
        )

    def _link(self, ifindex: int | None) -> _Link | None:
        """The interface, if frames for it can leave by ours."""
        if ifindex is None:
            return None
        if ifindex not in self._links:
            self._links[ifindex] = self._ask_link(ifindex)
        return self._links[ifindex]

    def _ask_link(self, ifindex: int) -> _Link | None:
        return _usable_link(self._netlink.link(ifindex), self.ifindex)

    def _hop(self, route: Any, host: Address) -> Hop:
        via = route.get_attr("RTA_VIA")  # a gateway of the other family (RFC 8950)
        gateway = via["addr"] if via is not None else route.get_attr("RTA_GATEWAY")
        address = ipaddress.ip_address(gateway or str(host).partition("%")[0])
        key = (route.get_attr("RTA_OIF"), address.packed)
        hop = self._hops.get(key)
        if hop is None:
            if len(self._hops) >= _MAX_ROUTES:
                self._hops.clear()  # routes that have one of them keep it until they are asked again
            hop = self._hops[key] = Hop()
        if hop.mac is None:
            # Also a known one: an old report, read after this answer, may have taken it back.
            self._ask_neighbour(key[0], address, hop)
        return hop

    def _ask_neighbour(self, ifindex: int, address: Address, hop: Hop) -> None:
        from pyroute2.netlink.exceptions import NetlinkError

        family = socket.AF_INET if address.version == 4 else socket.AF_INET6
        try:
            entry = self._netlink.neighbour(str(address), family, ifindex)
        except NetlinkError:
            return  # not known: a report will tell when it is
        mac = entry.get_attr("NDA_LLADDR")
        hop.update(entry["state"], bytes.fromhex(mac.replace(":", "")) if mac else None)


def _usable_link(link: Any, ours: int) -> _Link | None:
    """Of RTM_NEWLINK's message: the interface ``ours``, or a VLAN on top of it; None for all others."""
    if not link["flags"] & _IFF_UP or link["flags"] & _IFF_NOARP:
        return None
    mac = bytes.fromhex((link.get_attr("IFLA_ADDRESS") or "").replace(":", ""))
    if len(mac) != 6:
        return None
    vlan = None
    if link["index"] != ours:
        info = link.get_attr("IFLA_LINKINFO")
        if link.get_attr("IFLA_LINK") != ours or info is None or info.get_attr("IFLA_INFO_KIND") != "vlan":
            return None
        data = info.get_attr("IFLA_INFO_DATA")
        vlan = data.get_attr("IFLA_VLAN_ID")
        if data.get_attr("IFLA_VLAN_PROTOCOL") not in {None, _TAG}:
            return None  # 802.1ad: headers with its tag are not built here
    return _Link(mac, link.get_attr("IFLA_MTU"), vlan)


def _group_hop(host: Address) -> Hop:
    """RFC 1112, 6.4: 01:00:5e and the group's last 23 bits; RFC 2464, 7: 33:33 and its last 32."""
    hop = Hop()
    packed = host.packed
    hop.mac = (
        bytes((0x01, 0x00, 0x5E, packed[1] & 0x7F, packed[2], packed[3]))
        if host.version == 4
        else b"\x33\x33" + packed[12:]
    )
    return hop


def _messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(type, body) of each netlink message; stops at one that is not whole."""
    at = 0
    while at + _HEADER.size <= len(data):
        length, kind, _flags, _sequence, _sender = _HEADER.unpack_from(data, at)
        if length < _HEADER.size or at + length > len(data):
            return
        yield kind, data[at + _HEADER.size : at + length]
        at += length + 3 & ~3


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        if length < _ATTRIBUTE.size or at + length > len(data):
            return
        yield kind & 0x3FFF, data[at + _ATTRIBUTE.size : at + length]
        at += length + 3 & ~3
