# SPDX-License-Identifier: Apache-2.0
"""Frames that we build and take apart, beside scapy's opinion of them."""

from __future__ import annotations

import struct
import warnings
from ipaddress import IPv4Address, IPv6Address
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sluice_cli.dissect import REASONS, Datagram, NotADatagram, find_in_ethernet
from sluice_cli.traffic import (
    CODE_SHRED_BYTES,
    DATA_SHRED_BYTES,
    Template,
    shred_payload,
    udp_frame,
    vote_payload,
)
from xdp.errors import UsageError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # scapy's own, about its crypto library
    from scapy.layers.inet import ICMP, IP, TCP, UDP, IPOption_NOP
    from scapy.layers.inet6 import (
        IPv6,
        IPv6ExtHdrDestOpt,
        IPv6ExtHdrFragment,
        IPv6ExtHdrHopByHop,
        IPv6ExtHdrRouting,
        PadN,
    )
    from scapy.layers.ipsec import AH
    from scapy.layers.l2 import ARP, Dot1AD, Dot1Q, Ether
    from scapy.packet import Packet, Raw

HERE = SimpleNamespace(
    mac="02:00:00:00:00:01", ipv4=IPv4Address("192.0.2.1"), ipv6=IPv6Address("2001:db8::1")
)
THERE = SimpleNamespace(
    mac="02:00:00:00:00:02", ipv4=IPv4Address("192.0.2.2"), ipv6=IPv6Address("2001:db8::2")
)
ETHER = Ether(src=HERE.mac, dst=THERE.mac)
V4 = IP(src="192.0.2.1", dst="192.0.2.2", id=0, flags="DF")
V6 = IPv6(src="2001:db8::1", dst="2001:db8::2")
UDP_HELLO = UDP(sport=40000, dport=8001) / Raw(b"hello")


def where(frame: bytes) -> Datagram | str:
    try:
        return find_in_ethernet(frame)
    except NotADatagram as answer:
        return REASONS[REASONS.index(answer.reason)]


class TestBuild:
    @given(
        payload=st.binary(max_size=100),
        version=st.sampled_from([4, 6]),
        ports=st.tuples(st.integers(0, 65535), st.integers(0, 65535)),
        tags=st.lists(st.tuples(st.sampled_from([0x8100, 0x88A8]), st.integers(0, 0xFFFF)), max_size=2),
        options=st.integers(0, 10),
    )
    @settings(max_examples=200, deadline=None)
    def test_same_bytes_as_scapy(
        self, payload: bytes, version: int, ports: tuple[int, int], tags: list[tuple[int, int]], options: int
    ) -> None:
        frame = udp_frame(
            HERE, THERE, ports[1], payload,
            version=4 if version == 4 else 6, source_port=ports[0], vlans=tags,
            options=b"\x01" * 4 * options if version == 4 else b"",
        )  # fmt: skip
        ip = V4.copy() if version == 4 else V6.copy()
        if version == 4 and options:
            ip.options = [IPOption_NOP()] * (4 * options)
        expected: Packet = ETHER.copy()
        for tag, control in tags:
            layer = Dot1AD if tag == 0x88A8 else Dot1Q
            expected /= layer(prio=control >> 13, dei=control >> 12 & 1, vlan=control & 0xFFF)
        expected /= ip / UDP(sport=ports[0], dport=ports[1]) / Raw(payload)
        layers = [expected, *(expected.getlayer(number) for number in range(1, len(tags) + 1))]
        types = [*(tag for tag, _ in tags), 0x0800 if version == 4 else 0x86DD]
        if tags:
            # scapy puts the type of the layer behind; two equal tags it would call 0x9100
            for place, ethertype in zip(layers, types, strict=True):
                assert place is not None
                place.type = ethertype
        assert frame == bytes(expected)
        found = where(frame)
        assert isinstance(found, Datagram)
        assert frame[found.payload : found.payload + found.length] == payload
        assert frame[found.source] == (HERE.ipv4 if version == 4 else HERE.ipv6).packed
        assert frame[found.destination] == (THERE.ipv4 if version == 4 else THERE.ipv6).packed

    def test_shreds_and_votes(self) -> None:
        data, code = shred_payload("data", slot=7, index=40), shred_payload("code", index=33)
        assert (len(data), len(code)) == (DATA_SHRED_BYTES, CODE_SHRED_BYTES)
        assert (data[64], code[64]) == (0x96, 0x66)
        assert struct.unpack_from("<QI", data, 65) == (7, 40)
        assert struct.unpack_from("<I", data, 79) == (32,)
        assert struct.unpack_from("<HHH", code, 83) == (32, 32, 1)
        assert len(vote_payload(300)) == 300
        assert vote_payload() == vote_payload()

    def test_wrong_arguments(self) -> None:
        with pytest.raises(UsageError, match="IPv6"):
            udp_frame(HERE, THERE, 1, b"", version=6, source_address=HERE.ipv4)
        with pytest.raises(UsageError, match="options"):
            udp_frame(HERE, THERE, 1, b"", options=b"\x01")
        with pytest.raises(UsageError, match="vote"):
            vote_payload(20)
        with pytest.raises(UsageError, match="MAC"):
            udp_frame(SimpleNamespace(mac="02:00", ipv4=HERE.ipv4, ipv6=HERE.ipv6), THERE, 1, b"")
        frame = udp_frame(HERE, THERE, 1, bytes(20))
        for stamp in (-2, 1, 6, 2000):
            with pytest.raises(UsageError, match="no place"):
                Template(frame, stamp=stamp)
        with pytest.raises(UsageError, match="the template is none"):
            Template(bytes(60), stamp=0)
        for size in (13, 2049):
            with pytest.raises(UsageError, match="allowed: 14 to 2048"):
                Template(bytes(size))


class TestTakeApart:
    @pytest.mark.parametrize(
        "packet",
        [
            ETHER / V4 / UDP_HELLO,
            ETHER / Dot1Q(vlan=1) / Dot1Q(vlan=2) / Dot1Q(vlan=3) / V4 / UDP_HELLO,
            ETHER / IP(src="192.0.2.1", dst="192.0.2.2", options=[IPOption_NOP()] * 40) / UDP_HELLO,
            ETHER / V6 / IPv6ExtHdrHopByHop(options=[PadN(optdata=bytes(20))]) / UDP_HELLO,
            ETHER / V6 / IPv6ExtHdrDestOpt() / IPv6ExtHdrRouting() / IPv6ExtHdrDestOpt() / UDP_HELLO,
            ETHER / V6 / IPv6ExtHdrFragment(offset=0, m=0, id=1) / UDP_HELLO,
            ETHER / V6 / AH(nh=17, payloadlen=4, icv=bytes(12)) / UDP_HELLO,
            ETHER / V4 / UDP_HELLO / Raw(b""),
        ],
        ids=["v4", "3vlans", "40options", "hopbyhop", "routing", "atomic", "ah", "plain"],
    )
    def test_found(self, packet: Packet) -> None:
        raw = bytes(packet) + bytes(7)  # padding and an FCS change nothing
        found = where(raw)
        assert isinstance(found, Datagram)
        assert raw[found.payload : found.payload + found.length] == b"hello"

    @pytest.mark.parametrize(
        ("packet", "reason"),
        [
            (ETHER / ARP(), "not_ip"),
            (ETHER / V4 / TCP(), "not_udp"),
            (ETHER / V4 / ICMP(), "not_udp"),
            (ETHER / V6 / TCP(), "not_udp"),
            (ETHER / IP(flags="MF") / UDP_HELLO, "fragment"),
            (ETHER / IP(frag=3, proto=17) / Raw(bytes(30)), "fragment"),
            (ETHER / V6 / IPv6ExtHdrFragment(offset=0, m=1) / UDP_HELLO, "fragment"),
            (ETHER / V6 / IPv6ExtHdrFragment(offset=9, m=0, nh=17) / Raw(bytes(30)), "fragment"),
            (ETHER / IP(version=5) / UDP_HELLO, "ip_header"),
            (ETHER / IP(ihl=4, len=33) / UDP_HELLO, "ip_header"),
            (ETHER / IP(len=19) / UDP_HELLO, "ip_header"),
            (ETHER / IPv6(version=4) / UDP_HELLO, "ip_header"),
            (ETHER / V4 / UDP(len=7) / Raw(b"hello"), "udp_length"),
            (ETHER / V4 / UDP(len=14) / Raw(b"hello"), "udp_length"),
            (ETHER / IP(len=200) / UDP(len=180) / Raw(b"hello"), "truncated"),
        ],
    )
    def test_refused(self, packet: Packet, reason: str) -> None:
        assert where(bytes(packet)) == reason

    def test_too_many_extension_headers(self) -> None:
        packet = V6.copy()
        for _ in range(9):
            packet /= IPv6ExtHdrDestOpt()
        assert where(bytes(ETHER / packet / UDP_HELLO)) == "extension"

    @pytest.mark.parametrize("version", [4, 6])
    def test_every_truncation(self, version: int) -> None:
        frame = udp_frame(HERE, THERE, 8001, b"hello", version=4 if version == 4 else 6, vlans=[(0x8100, 1)])
        for length in range(len(frame)):
            assert where(frame[:length]) == "truncated"
        assert isinstance(where(frame), Datagram)

    @given(st.binary(max_size=120))
    @settings(max_examples=500, deadline=None)
    def test_any_bytes(self, data: bytes) -> None:
        for head in (b"", bytes(12) + b"\x08\x00\x45", bytes(12) + b"\x86\xdd\x60"):
            frame = head + data
            found = where(frame)
            if isinstance(found, Datagram):
                assert 14 <= found.network < found.udp < found.payload
                assert found.payload + found.length <= len(frame)
