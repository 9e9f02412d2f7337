# SPDX-License-Identifier: Apache-2.0
"""Where the UDP datagram in an Ethernet frame is, or why there is none to look at.

The reference for the program's parser: the same verdict for every frame, in code
that shares nothing with it.  Sources: IEEE 802.1Q, RFC 791, RFC 8200, RFC 4302
(AH), RFC 768.
"""

from __future__ import annotations

from typing import NamedTuple

from xdp._libbpf import lib

_ETHERNET = 14  # bytes: destination, source, ethertype
_TAG = 4
_MAX_TAGS = 2
_TAGS = frozenset((0x8100, 0x88A8))
_ETHERTYPE_IPV4 = 0x0800
_ETHERTYPE_IPV6 = 0x86DD

_IPV4 = 20
_IPV6 = 40
_UDP = 8

_HOP_BY_HOP = 0
_PROTOCOL_UDP = 17
_ROUTING = 43
_FRAGMENT = 44
_AH = 51
_DESTINATION = 60
_SKIPPED = frozenset((_HOP_BY_HOP, _ROUTING, _FRAGMENT, _DESTINATION))
_MAX_EXTENSIONS = 8

#: What stands before an IPv4 address in its IPv6 form.
MAPPED = b"\x00" * 10 + b"\xff\xff"


class Datagram(NamedTuple):
    """A whole UDP datagram over IP; offsets in bytes from the start of the frame.

    source and destination are 16 bytes, IPv4 mapped.  plain: neither IP options
    nor extension headers.
    """

    version: int
    source: bytes
    destination: bytes
    source_port: int
    port: int
    ip_offset: int
    udp_offset: int
    payload_length: int
    plain: bool

    @property
    def payload_offset(self) -> int:
        """Where the UDP payload begins."""
        return self.udp_offset + _UDP


def parse(frame: bytes, reach: int | None = None) -> Datagram | int:
    """The datagram in ``frame`` (without FCS), or the number of the reason to pass.

    ``SLUICE_PASS_FRAGMENT`` stands for any fragment of a UDP datagram; the policy
    says whether it is really passed.  ``reach``: bytes of the first of several buffers,
    in which all headers have to be (``SLUICE_PASS_TRUNCATED``); at least a page less its
    head and tail room, so only chains of IPv6 extension headers can be longer.
    """
    if reach is None:
        reach = len(frame)
    if len(frame) < _ETHERNET:
        return lib.SLUICE_PASS_TRUNCATED
    offset = _ETHERNET
    ethertype = _u16(frame, offset - 2)
    tags = 0
    while ethertype in _TAGS:
        if tags == _MAX_TAGS:
            return lib.SLUICE_PASS_VLAN_DEPTH
        if len(frame) < offset + _TAG:
            return lib.SLUICE_PASS_TRUNCATED
        tags += 1
        offset += _TAG
        ethertype = _u16(frame, offset - 2)
    if ethertype == _ETHERTYPE_IPV4:
        return _ipv4(frame, offset, reach)
    if ethertype == _ETHERTYPE_IPV6:
        return _ipv6(frame, offset, reach)
    return lib.SLUICE_PASS_NOT_IP


def _ipv4(frame: bytes, at: int, reach: int) -> Datagram | int:
    if len(frame) < at + _IPV4:
        return lib.SLUICE_PASS_TRUNCATED
    header = (frame[at] & 0x0F) * 4
    total = _u16(frame, at + 2)
    if frame[at] >> 4 != 4 or header < _IPV4 or total < header:
        return lib.SLUICE_PASS_IP_HEADER
    if total > len(frame) - at:
        return lib.SLUICE_PASS_TRUNCATED
    if frame[at + 9] != _PROTOCOL_UDP:
        return lib.SLUICE_PASS_NOT_UDP
    if _u16(frame, at + 6) & 0x3FFF:  # more fragments, or an offset
        return lib.SLUICE_PASS_FRAGMENT
    addresses = (MAPPED + frame[at + 12 : at + 16], MAPPED + frame[at + 16 : at + 20])
    return _udp(frame, 4, addresses, at, at + header, at + total, reach, plain=header == _IPV4)


def _ipv6(frame: bytes, at: int, reach: int) -> Datagram | int:
    if len(frame) < at + _IPV6:
        return lib.SLUICE_PASS_TRUNCATED
    end = at + _IPV6 + _u16(frame, at + 4)
    if frame[at] >> 4 != 6:
        return lib.SLUICE_PASS_IP_HEADER
    if end > len(frame):
        return lib.SLUICE_PASS_TRUNCATED
    protocol = frame[at + 6]
    here = at + _IPV6
    extensions = 0
    while protocol in _SKIPPED:
        if extensions == _MAX_EXTENSIONS:
            return lib.SLUICE_PASS_EXTENSION
        extensions += 1
        if min(end, reach) < here + 8:  # the shortest of them, and each is a multiple
            return lib.SLUICE_PASS_TRUNCATED
        following = frame[here]
        if protocol == _FRAGMENT:
            if _u16(frame, here + 2) & 0xFFF9:  # an offset, or more fragments; an atomic one has neither
                return lib.SLUICE_PASS_FRAGMENT if following == _PROTOCOL_UDP else lib.SLUICE_PASS_NOT_UDP
            length = 8
        elif protocol == _ROUTING and frame[here + 3]:
            return lib.SLUICE_PASS_EXTENSION  # segments left: another host is the real destination
        else:
            length = (frame[here + 1] + 1) * 8
        if end < here + length:
            return lib.SLUICE_PASS_TRUNCATED
        protocol = following
        here += length
    if protocol == _AH:
        return lib.SLUICE_PASS_EXTENSION  # only the kernel can verify it
    if protocol != _PROTOCOL_UDP:
        return lib.SLUICE_PASS_NOT_UDP
    addresses = (frame[at + 8 : at + 24], frame[at + 24 : at + 40])
    return _udp(frame, 6, addresses, at, here, end, reach, plain=extensions == 0)


def _udp(
    frame: bytes,
    version: int,
    addresses: tuple[bytes, bytes],
    ip: int,
    at: int,
    end: int,
    reach: int,
    *,
    plain: bool,
) -> Datagram | int:
    """The datagram whose UDP header is at ``at`` in an IP packet that ends at ``end``."""
    if end < at + _UDP:
        return lib.SLUICE_PASS_UDP_LENGTH
    if reach < at + _UDP:
        return lib.SLUICE_PASS_TRUNCATED
    length = _u16(frame, at + 4)
    if not _UDP <= length <= end - at:
        return lib.SLUICE_PASS_UDP_LENGTH
    return Datagram(
        version=version,
        source=bytes(addresses[0]),
        destination=bytes(addresses[1]),
        source_port=_u16(frame, at),
        port=_u16(frame, at + 2),
        ip_offset=ip,
        udp_offset=at,
        payload_length=length - _UDP,
        plain=plain,
    )


def is_impossible_source(datagram: Datagram) -> bool:
    """Whether no packet from the network may carry this source.

    IPv4: 0.0.0.0/8, 127.0.0.0/8, 224.0.0.0/3.  IPv6: ::, ::1, ff00::/8, ::ffff:0:0/96.
    """
    source = datagram.source
    if datagram.version == 4:
        return source[12] in {0, 127} or source[12] >= 224
    return source[0] == 0xFF or source[:12] == MAPPED or source in {bytes(16), bytes(15) + b"\x01"}


def _u16(frame: bytes, at: int) -> int:
    return frame[at] << 8 | frame[at + 1]
