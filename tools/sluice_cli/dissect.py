# SPDX-License-Identifier: Apache-2.0
"""Find the UDP datagram in a frame: for captures and for the templates of the load generator.

Reads Ethernet with any number of VLAN tags, IPv4 with options and IPv6 with extension headers.
What carries no whole UDP datagram is refused with a reason from `REASONS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

Bytes = bytes | bytearray | memoryview

ETHERTYPE_IPV4: Final = 0x0800
ETHERTYPE_IPV6: Final = 0x86DD
# IEEE 802.1Q, 802.1ad and the older 0x9100 that switches still send.
_VLAN_TAGS: Final = frozenset({0x8100, 0x88A8, 0x9100})
_ETHERNET: Final = 14
_UDP: Final = 17
_UDP_HEADER: Final = 8
_IPV4_HEADER: Final = 20
_IPV6_HEADER: Final = 40
_FRAGMENT: Final = 44
_AUTHENTICATION: Final = 51
# RFC 8200: hop-by-hop, routing, authentication, destination options; length in the second byte.
_EXTENSIONS: Final = frozenset({0, 43, _AUTHENTICATION, 60})
# More extension headers than this nobody sends; it bounds the work on a hostile packet.
_MAX_EXTENSIONS: Final = 8

#: Why a frame has no datagram for us.
REASONS: Final = ("truncated", "not_ip", "ip_header", "extension", "fragment", "not_udp", "udp_length")


class NotADatagram(Exception):  # noqa: N818 - an answer, not an error
    """The frame carries no whole UDP datagram; ``reason`` is one of `REASONS`."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Datagram:
    """Where things are, as offsets from the start of the frame."""

    network: int  # IPv4 or IPv6 header
    version: int  # 4 or 6
    udp: int
    payload: int
    length: int  # of the payload

    @property
    def source(self) -> slice:
        """The source address in the frame, 4 or 16 bytes."""
        return (
            slice(self.network + 12, self.network + 16)
            if self.version == 4
            else slice(self.network + 8, self.network + 24)
        )

    @property
    def destination(self) -> slice:
        """The destination address in the frame, 4 or 16 bytes."""
        return (
            slice(self.network + 16, self.network + 20)
            if self.version == 4
            else slice(self.network + 24, self.network + 40)
        )


def find_in_ethernet(frame: Bytes) -> Datagram:
    """The datagram in an Ethernet frame without FCS.

    Raises:
        NotADatagram: there is none.
    """
    if len(frame) < _ETHERNET:
        raise NotADatagram("truncated")
    return find_by_ethertype(frame, _ETHERNET, _word(frame, 12))


def find_by_ethertype(frame: Bytes, offset: int, ethertype: int) -> Datagram:
    """The datagram behind an ethertype whose payload begins at ``offset``."""
    while ethertype in _VLAN_TAGS:
        if offset + 4 > len(frame):
            raise NotADatagram("truncated")
        ethertype = _word(frame, offset + 2)
        offset += 4
    try:
        find = _FIND[ethertype]
    except KeyError:
        raise NotADatagram("not_ip") from None
    return find(frame, offset)


def find_in_ip(frame: Bytes, offset: int = 0) -> Datagram:
    """The datagram in an IPv4 or IPv6 packet that begins at ``offset``; the version tells which."""
    if offset >= len(frame):
        raise NotADatagram("truncated")
    version = frame[offset] >> 4
    if version == 4:
        return _find_in_ipv4(frame, offset)
    if version == 6:
        return _find_in_ipv6(frame, offset)
    raise NotADatagram("ip_header")


def _find_in_ipv4(frame: Bytes, network: int) -> Datagram:
    if network + _IPV4_HEADER > len(frame):
        raise NotADatagram("truncated")
    header = (frame[network] & 0x0F) * 4
    total = _word(frame, network + 2)
    if frame[network] >> 4 != 4 or header < _IPV4_HEADER or total < header:
        raise NotADatagram("ip_header")
    if frame[network + 9] != _UDP:
        raise NotADatagram("not_udp")
    if _word(frame, network + 6) & 0x3FFF:  # more fragments, or an offset
        raise NotADatagram("fragment")
    return _find_udp(frame, network, 4, network + header, network + total)


def _find_in_ipv6(frame: Bytes, network: int) -> Datagram:
    if network + _IPV6_HEADER > len(frame):
        raise NotADatagram("truncated")
    if frame[network] >> 4 != 6:
        raise NotADatagram("ip_header")
    end = network + _IPV6_HEADER + _word(frame, network + 4)
    following = frame[network + 6]
    offset = network + _IPV6_HEADER
    for _ in range(_MAX_EXTENSIONS + 1):
        if following == _UDP:
            return _find_udp(frame, network, 6, offset, end)
        if following != _FRAGMENT and following not in _EXTENSIONS:
            raise NotADatagram("not_udp")
        if offset + 8 > min(end, len(frame)):
            raise NotADatagram("truncated")
        if following == _FRAGMENT:
            # An "atomic" fragment (RFC 6946) has offset 0 and no more to come: it is whole.
            if _word(frame, offset + 2) & 0xFFF9:
                raise NotADatagram("fragment")
            size = 8
        elif following == _AUTHENTICATION:
            size = (frame[offset + 1] + 2) * 4  # RFC 4302: in words of 4 bytes, minus 2
        else:
            size = (frame[offset + 1] + 1) * 8
        following = frame[offset]
        offset += size
    raise NotADatagram("extension")


def _find_udp(frame: Bytes, network: int, version: int, udp: int, end: int) -> Datagram:
    if udp + _UDP_HEADER > len(frame):
        raise NotADatagram("truncated")
    length = _word(frame, udp + 4)
    if length < _UDP_HEADER or udp + length > end:
        raise NotADatagram("udp_length")
    if udp + length > len(frame):
        raise NotADatagram("truncated")
    return Datagram(network, version, udp, udp + _UDP_HEADER, length - _UDP_HEADER)


def _word(frame: Bytes, offset: int) -> int:
    return frame[offset] << 8 | frame[offset + 1]


_FIND: Final[dict[int, Callable[[Bytes, int], Datagram]]] = {
    ETHERTYPE_IPV4: _find_in_ipv4,
    ETHERTYPE_IPV6: _find_in_ipv6,
}
