# SPDX-License-Identifier: Apache-2.0
"""Finding the datagram in a frame: every verdict of the parser, and frames made by scapy."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import IP, TCP, UDP, IPOption_NOP
from scapy.layers.inet6 import (
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
)
from scapy.layers.l2 import ARP, Dot1AD, Dot1Q, Ether
from scapy.packet import Packet, Raw

from xdp._libbpf import lib
from xdp.classify_frame import Datagram, is_impossible_source, parse

ETHER = Ether(src="02:00:00:00:00:01", dst="02:00:00:00:00:02")
V4 = IP(src="192.0.2.1", dst="198.51.100.2")
V6 = IPv6(src="2001:db8::1", dst="2001:db8::2")
PORTS = UDP(sport=4000, dport=8005)
PAYLOAD = Raw(b"payload")


def ipv4(
    payload: bytes = b"", *, header: int = 5, version: int = 4, total: int | None = None, **fields: int
) -> bytes:
    """An Ethernet frame with an IPv4 header as wrong as one likes."""
    length = header * 4 + len(payload) if total is None else total
    start = struct.pack(
        "!BBHHHBBH4s4s",
        version << 4 | header,
        0,
        length,
        0,
        fields.get("fragment", 0),
        64,
        fields.get("protocol", 17),
        0,
        bytes([192, 0, 2, 1]),
        bytes([198, 51, 100, 2]),
    )
    return bytes(12) + b"\x08\x00" + start + bytes(max(0, header * 4 - 20)) + payload


def ipv6(
    payload: bytes = b"", *, next_header: int = 17, version: int = 6, length: int | None = None
) -> bytes:
    size = len(payload) if length is None else length
    return (
        bytes(12)
        + b"\x86\xdd"
        + struct.pack("!IHBB", version << 28, size, next_header, 64)
        + bytes(15)
        + b"\x05"
        + bytes(15)
        + b"\x06"
        + payload
    )


def udp(payload: bytes = b"", *, length: int | None = None) -> bytes:
    return struct.pack("!HHHH", 4000, 8005, 8 + len(payload) if length is None else length, 0) + payload


def found(frame: bytes) -> Datagram:
    datagram = parse(frame)
    assert isinstance(datagram, Datagram)
    return datagram


@pytest.mark.parametrize(
    "network", [V4, V6, IP(src="192.0.2.1", dst="198.51.100.2", options=[IPOption_NOP()] * 40)]
)
@pytest.mark.parametrize(
    "tags",
    [
        ETHER,
        ETHER / Dot1Q(vlan=7),
        ETHER / Dot1AD(vlan=7) / Dot1Q(vlan=8),
        ETHER / Dot1Q(vlan=7) / Dot1AD(vlan=8),
    ],
)
def test_datagrams_of_both_families_behind_up_to_two_tags(tags: Packet, network: Packet) -> None:
    frame = bytes(tags / network / PORTS / PAYLOAD)
    datagram = found(frame)
    assert (datagram.source_port, datagram.port) == (4000, 8005)
    assert frame[datagram.payload_offset : datagram.payload_offset + datagram.payload_length] == b"payload"
    assert datagram.version == network.version
    assert datagram.plain == (not getattr(network, "options", None))


def test_three_tags_are_too_many_whatever_follows() -> None:
    three = ETHER / Dot1Q(vlan=1) / Dot1Q(vlan=2) / Dot1AD(vlan=3)
    assert parse(bytes(three / V4 / PORTS)) == lib.SLUICE_PASS_VLAN_DEPTH
    assert parse(bytes(12) + b"\x81\x00\x00\x01" * 2 + b"\x81\x00") == lib.SLUICE_PASS_VLAN_DEPTH


@pytest.mark.parametrize(
    "frame",
    [bytes(12) + b"\x08\x00", bytes(ETHER / V4 / PORTS / PAYLOAD), bytes(ETHER / Dot1Q() / V6 / PORTS)],
)
def test_every_shorter_frame_is_truncated(frame: bytes) -> None:
    end = len(frame) if len(frame) > 14 else 15
    for length in range(end):
        assert parse(frame[:length]) == lib.SLUICE_PASS_TRUNCATED, length


def test_ethernet_padding_is_no_payload() -> None:
    frame = bytes(ETHER / V4 / PORTS / Raw(b"ab")) + bytes(30)
    assert found(frame).payload_length == 2


@pytest.mark.parametrize("packet", [ARP(), Raw(b"x"), Dot1Q(vlan=1) / ARP()])
def test_other_ethertypes_are_not_ip(packet: Packet) -> None:
    assert parse(
        bytes(
            Ether(
                src="02:00:00:00:00:01",
                dst="02:00:00:00:00:02",
                type=0x88CC if packet.name == "Raw" else None,
            )
            / packet
        )
    ) == (lib.SLUICE_PASS_NOT_IP)


@pytest.mark.parametrize(
    ("frame", "reason"),
    [
        (ipv4(udp(), version=5), lib.SLUICE_PASS_IP_HEADER),
        (ipv4(udp(), version=6), lib.SLUICE_PASS_IP_HEADER),
        (ipv4(udp(), header=4), lib.SLUICE_PASS_IP_HEADER),
        (ipv4(udp(), header=0), lib.SLUICE_PASS_IP_HEADER),
        (ipv4(udp(), total=19), lib.SLUICE_PASS_IP_HEADER),
        (ipv4(udp(), header=6, total=20), lib.SLUICE_PASS_IP_HEADER),
        (ipv4(udp(), total=29), lib.SLUICE_PASS_TRUNCATED),
        (ipv4(udp(), total=27), lib.SLUICE_PASS_UDP_LENGTH),
        (ipv4(b"1234567"), lib.SLUICE_PASS_UDP_LENGTH),
        (ipv4(udp(length=7)), lib.SLUICE_PASS_UDP_LENGTH),
        (ipv4(udp(length=9)), lib.SLUICE_PASS_UDP_LENGTH),
        (ipv4(udp(length=0)), lib.SLUICE_PASS_UDP_LENGTH),
        (ipv4(udp(), protocol=6), lib.SLUICE_PASS_NOT_UDP),
        (ipv4(udp(), protocol=51), lib.SLUICE_PASS_NOT_UDP),
        (ipv4(udp(), protocol=6, fragment=0x2000), lib.SLUICE_PASS_NOT_UDP),
        (ipv4(udp(), fragment=0x2000), lib.SLUICE_PASS_FRAGMENT),
        (ipv4(udp(), fragment=0x0001), lib.SLUICE_PASS_FRAGMENT),
        (ipv4(udp(), fragment=0x3FFF), lib.SLUICE_PASS_FRAGMENT),
        (ipv4(b"", fragment=0x2000), lib.SLUICE_PASS_FRAGMENT),
        (ipv6(udp(), version=4), lib.SLUICE_PASS_IP_HEADER),
        (ipv6(udp(), length=9), lib.SLUICE_PASS_TRUNCATED),
        (ipv6(udp(), length=0), lib.SLUICE_PASS_UDP_LENGTH),
        (ipv6(udp(length=9)), lib.SLUICE_PASS_UDP_LENGTH),
        (ipv6(udp(), next_header=59), lib.SLUICE_PASS_NOT_UDP),
        (ipv6(udp(), next_header=6), lib.SLUICE_PASS_NOT_UDP),
        (ipv6(udp(), next_header=51), lib.SLUICE_PASS_EXTENSION),
        (ipv6(udp(), next_header=58), lib.SLUICE_PASS_NOT_UDP),
    ],
)
def test_wrong_headers_are_passed_for_their_reason(frame: bytes, reason: int) -> None:
    assert parse(frame) == reason


def test_do_not_fragment_is_no_fragment() -> None:
    assert found(ipv4(udp(b"x"), fragment=0x4000)).payload_length == 1


def test_tcp_is_not_udp() -> None:
    assert parse(bytes(ETHER / V4 / TCP())) == parse(bytes(ETHER / V6 / TCP())) == lib.SLUICE_PASS_NOT_UDP


def chain(*headers: int, last: int = 17, payload: bytes = b"") -> bytes:
    """IPv6 with extension headers of 8 bytes each, by number."""
    following = (*headers[1:], last)
    body = b"".join(bytes([after, 0, 0, 0, 0, 0, 0, 0]) for after in following[: len(headers)])
    return ipv6(body + payload, next_header=headers[0] if headers else last)


@pytest.mark.parametrize("headers", [(0,), (60,), (43,), (44,), (0, 43, 60), (0, 44, 60, 43, 0, 0, 60, 60)])
def test_extension_headers_are_skipped(headers: tuple[int, ...]) -> None:
    datagram = found(chain(*headers, payload=udp(b"abc")))
    assert datagram.payload_offset == 14 + 40 + 8 * len(headers) + 8
    assert not datagram.plain


@pytest.mark.parametrize(
    ("frame", "reason"),
    [
        (chain(*[60] * 9, payload=udp()), lib.SLUICE_PASS_EXTENSION),
        (chain(*[60] * 8, last=51, payload=udp()), lib.SLUICE_PASS_EXTENSION),
        (chain(*[60] * 8, last=6, payload=udp()), lib.SLUICE_PASS_NOT_UDP),
        (chain(0, 51, payload=udp()), lib.SLUICE_PASS_EXTENSION),
        (chain(0, last=59), lib.SLUICE_PASS_NOT_UDP),
        (ipv6(bytes([17, 0, 0, 0, 0, 0, 0]), next_header=0), lib.SLUICE_PASS_TRUNCATED),
        (ipv6(bytes([17, 1, 0, 0, 0, 0, 0, 0]), next_header=0), lib.SLUICE_PASS_TRUNCATED),
        (ipv6(bytes([17, 0, 0, 1, 0, 0, 0, 0]) + udp(), next_header=43), lib.SLUICE_PASS_EXTENSION),
        (ipv6(bytes([17, 0, 0, 1, 0, 0, 0, 0]) + udp(), next_header=44), lib.SLUICE_PASS_FRAGMENT),
        (ipv6(bytes([17, 0, 0, 8, 0, 0, 0, 0]) + udp(), next_header=44), lib.SLUICE_PASS_FRAGMENT),
        (ipv6(bytes([6, 0, 0, 1, 0, 0, 0, 0]) + udp(), next_header=44), lib.SLUICE_PASS_NOT_UDP),
        (ipv6(bytes([60, 0, 0, 1, 0, 0, 0, 0]) + udp(), next_header=44), lib.SLUICE_PASS_NOT_UDP),
    ],
)
def test_extension_headers_that_end_the_search(frame: bytes, reason: int) -> None:
    assert parse(frame) == reason


def test_reserved_bits_of_an_atomic_fragment_do_not_matter() -> None:
    assert found(ipv6(bytes([17, 9, 0, 6, 1, 2, 3, 4]) + udp(b"z"), next_header=44)).payload_length == 1


def test_scapy_agrees_about_extension_headers() -> None:
    headers = V6 / IPv6ExtHdrHopByHop() / IPv6ExtHdrRouting(segleft=0) / IPv6ExtHdrDestOpt()
    assert found(bytes(ETHER / headers / PORTS / PAYLOAD)).payload_length == 7
    fragment = V6 / IPv6ExtHdrFragment(m=1) / PORTS / PAYLOAD
    assert parse(bytes(ETHER / fragment)) == lib.SLUICE_PASS_FRAGMENT


def source(text: str, *, version: int) -> bool:
    network = IP(src=text, dst="192.0.2.1") if version == 4 else IPv6(src=text, dst="2001:db8::1")
    return is_impossible_source(found(bytes(ETHER / network / PORTS)))


@pytest.mark.parametrize(
    "text",
    [
        "0.0.0.0",
        "0.255.255.255",
        "127.0.0.1",
        "127.255.255.255",
        "224.0.0.0",
        "239.1.2.3",
        "240.0.0.1",
        "255.255.255.255",
    ],
)
def test_impossible_ipv4_sources(text: str) -> None:
    assert source(text, version=4)


@pytest.mark.parametrize(
    "text", ["::", "::1", "ff00::", "ff02::1", "ffff::", "::ffff:192.0.2.1", "::ffff:0:0"]
)
def test_impossible_ipv6_sources(text: str) -> None:
    assert source(text, version=6)


@pytest.mark.parametrize("text", ["1.0.0.0", "10.0.0.1", "126.255.255.255", "128.0.0.0", "223.255.255.255"])
def test_possible_ipv4_sources(text: str) -> None:
    assert not source(text, version=4)


@pytest.mark.parametrize(
    "text", ["::2", "2001:db8::", "fe80::1", "::fffe:192.0.2.1", "1::ffff:192.0.2.1", "::192.0.2.1"]
)
def test_possible_ipv6_sources(text: str) -> None:
    assert not source(text, version=6)


@given(st.binary(max_size=200))
def test_any_bytes_have_an_outcome_within_the_frame(tail: bytes) -> None:
    for head in (
        b"",
        bytes(12) + b"\x08\x00E",
        bytes(12) + b"\x86\xdd\x60",
        bytes(12) + b"\x81\x00\0\1\x86\xdd\x60",
    ):
        frame = head + tail
        outcome = parse(frame)
        if isinstance(outcome, int):
            assert lib.SLUICE_PASS_TRUNCATED <= outcome <= lib.SLUICE_PASS_UDP_LENGTH
        else:
            assert outcome.payload_offset + outcome.payload_length <= len(frame)
