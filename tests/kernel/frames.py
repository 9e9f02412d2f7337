# SPDX-License-Identifier: Apache-2.0
"""Frames for test runs, put together byte by byte so that any field can lie."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address

MAC_TO = bytes.fromhex("02005e100001")
MAC_FROM = bytes.fromhex("02005e100002")

IPV4, IPV6, VLAN, QINQ = 0x0800, 0x86DD, 0x8100, 0x88A8
UDP, FRAGMENT, HOP_BY_HOP, ROUTING, DESTINATION, AH, NO_NEXT = 17, 44, 0, 43, 60, 51, 59

TARGETS: dict[int, IPv4Address | IPv6Address] = {
    4: IPv4Address("192.0.2.1"),
    6: IPv6Address("2001:db8:ffff::1"),
}


def checksum(data: bytes, start: int = 0) -> int:
    """RFC 1071."""
    if len(data) % 2:
        data += b"\0"
    total: int = start + sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def ethernet(ethertype: int, payload: bytes, tags: Sequence[int] = (), *, to: bytes = MAC_TO) -> bytes:
    """``tags`` are TPIDs, outermost first."""
    protocols = [*tags, ethertype]
    head = to + MAC_FROM + struct.pack("!H", protocols[0])
    for number, protocol in enumerate(protocols[1:]):
        head += struct.pack("!HH", 100 + number, protocol)
    return head + payload


def udp(port: int, payload: bytes = b"", *, source_port: int = 4000, length: int | None = None) -> bytes:
    """Without a checksum."""
    return (
        struct.pack("!HHHH", source_port, port, 8 + len(payload) if length is None else length, 0) + payload
    )


def ipv4(
    payload: bytes,
    *,
    source: str = "198.18.0.1",
    target: str = str(TARGETS[4]),
    protocol: int = UDP,
    options: bytes = b"",
    version: int = 4,
    ihl: int | None = None,
    total: int | None = None,
    fragment: int = 0,
    ttl: int = 61,
) -> bytes:
    """``fragment`` is the word of flags and offset."""
    words = 5 + len(options) // 4 if ihl is None else ihl
    size = 20 + len(options) + len(payload) if total is None else total
    addresses = IPv4Address(source).packed + IPv4Address(target).packed
    head = struct.pack("!BBHHHBBH", version << 4 | words, 0, size, 1, fragment, ttl, protocol, 0)
    head = head[:10] + struct.pack("!H", checksum(head + addresses + options)) + addresses + options
    return head + payload


def ipv6(
    payload: bytes,
    *,
    source: str = "2001:db8::1",
    target: str = str(TARGETS[6]),
    next_header: int = UDP,
    version: int = 6,
    length: int | None = None,
    hops: int = 61,
) -> bytes:
    size = len(payload) if length is None else length
    head = struct.pack("!IHBB", version << 28, size, next_header, hops)
    return head + IPv6Address(source).packed + IPv6Address(target).packed + payload


def udp_frame(
    source: str, port: int, payload: bytes = b"", tags: Sequence[int] = (), *, sums: bool = False
) -> bytes:
    """A datagram of the family of ``source``; ``sums``: with the UDP checksum (RFC 768, RFC 8200 8.1)."""
    address: IPv4Address | IPv6Address = ip_address(source)
    version = address.version
    datagram = udp(port, payload)
    if sums:
        pseudo = address.packed + TARGETS[version].packed + struct.pack("!HH", UDP, len(datagram))
        datagram = datagram[:6] + struct.pack("!H", checksum(pseudo + datagram) or 0xFFFF) + datagram[8:]
    if version == 4:
        return ethernet(IPV4, ipv4(datagram, source=source), tags)
    return ethernet(IPV6, ipv6(datagram, source=source), tags)


def extension(next_header: int, *, units: int = 0, segments_left: int = 0, body: int | None = None) -> bytes:
    """Hop-by-hop, routing or destination options header of ``units`` 8-byte units beyond the first.

    ``body`` overrides how many bytes there really are.
    """
    size = 8 * (units + 1) if body is None else body
    return (bytes((next_header, units, 0, segments_left)) + bytes(max(size - 4, 0)))[:size]


def fragment_header(next_header: int, *, offset: int = 0, more: bool = False) -> bytes:
    """``offset`` in 8-byte units."""
    return struct.pack("!BBHI", next_header, 0, offset << 3 | more, 7)


def chain(kinds: Sequence[int], last: int = UDP) -> tuple[int, bytes]:
    """The first next-header value and the bytes of a chain of extension headers that ends in ``last``."""
    following = [*kinds[1:], last]
    parts = [
        fragment_header(after) if kind == FRAGMENT else extension(after)
        for kind, after in zip(kinds, following, strict=False)
    ]
    return (kinds[0] if kinds else last), b"".join(parts)
