# SPDX-License-Identifier: Apache-2.0
"""The data path's C under AddressSanitizer and UBSan, and its headers against scapy's."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.layers.inet import IP, UDP, IPOption
from scapy.layers.inet6 import (
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
)
from scapy.layers.l2 import Dot1AD, Dot1Q, Ether
from scapy.packet import Raw

from userspace.datagram.destination import Destination
from userspace.native._native import ffi, lib
from xdp.errors import UsageError

ROOT = Path(__file__).resolve().parents[2]
NATIVE = ROOT / "userspace" / "native"
PARTS = (
    "batch", "busy_poll", "checksum", "headers", "queue", "queue_chain", "queue_forward", "queue_frames",
    "queue_receive", "queue_transmit", "rings", "umem", "xsk", "wait",
)  # fmt: skip

OURS, THEIRS = "02:00:00:00:00:01", "02:00:00:00:00:02"


def test_under_sanitizers(tmp_path: Path) -> None:
    program = tmp_path / "datapath_sanitized"
    sources = [Path(__file__).with_name("datapath_sanitized.c"), *(NATIVE / f"{part}.c" for part in PARTS)]
    subprocess.run(
        ["gcc", "-g", "-O1", "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-fsanitize=address,undefined",
         "-fno-sanitize-recover=all", f"-I{NATIVE}", f"-I{ROOT / 'bpf/include'}", "-o", program, *sources],
        check=True,
    )  # fmt: skip
    seed = random.SystemRandom().getrandbits(32)
    print(f"seed {seed}")
    done = subprocess.run([program, str(seed), "40000"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"seed {seed}: {done.stdout}{done.stderr}"


def parse(frame: bytes) -> Any:
    packet = ffi.new("struct sl_packet *")
    # A copy of exactly that size: nothing beyond belongs to the frame.
    return (
        packet
        if lib.sl_parse(ffi.from_buffer("uint8_t[]", bytearray(frame)), len(frame), packet) == 0
        else None
    )


UNDERSTOOD = {
    "v4": Ether() / IP() / UDP() / b"payload",
    "empty": Ether() / IP() / UDP(),
    "padded": Ether() / IP() / UDP() / b"payload" / Raw(b""),
    "options": Ether() / IP(options=[IPOption(b"\x94\x04\x00\x00")]) / UDP() / b"payload",
    "v6": Ether() / IPv6() / UDP() / b"payload",
    "hop-by-hop": Ether() / IPv6() / IPv6ExtHdrHopByHop() / UDP() / b"payload",
    "routing": Ether() / IPv6() / IPv6ExtHdrRouting(addresses=["fd00::9"]) / UDP() / b"payload",
    "options v6": Ether() / IPv6() / IPv6ExtHdrDestOpt() / IPv6ExtHdrDestOpt() / UDP() / b"payload",
    "atomic": Ether() / IPv6() / IPv6ExtHdrFragment() / UDP() / b"payload",
    "vlan": Ether() / Dot1Q(vlan=7) / IP() / UDP() / b"payload",
    "qinq": Ether() / Dot1AD(vlan=7) / Dot1Q(vlan=9) / IPv6() / UDP() / b"payload",
}

NOT_UNDERSTOOD = {
    "fragment": Ether() / IP(flags="MF") / UDP() / b"payload",
    "later fragment": Ether() / IP(frag=10) / UDP() / b"payload",
    "fragment v6": Ether() / IPv6() / IPv6ExtHdrFragment(m=1) / UDP() / b"payload",
    "three tags": Ether() / Dot1Q() / Dot1Q() / Dot1Q() / IP() / UDP() / b"payload",
    "nine extensions": Ether() / IPv6() / Raw(bytes([60, 0, 1, 4, 0, 0, 0, 0]) * 9),
    "not UDP": Ether() / IP(proto=6) / b"payload payload payload",
    "UDP too long": Ether() / IP() / UDP(len=16) / b"payload",
    "UDP too short": Ether() / IP() / UDP(len=7) / b"payload",
    "IHL": Ether() / IP(ihl=4) / UDP() / b"payload",
    "version": Ether() / IP(version=5) / UDP() / b"payload",
    "ARP": Ether(type=0x0806) / b"payload payload payload payload",
}


@pytest.mark.parametrize("name", UNDERSTOOD)
def test_parse(name: str) -> None:
    frame = bytes(UNDERSTOOD[name])
    packet = parse(frame)
    assert packet is not None
    assert frame[packet.payload : packet.payload + packet.payload_length] == (
        b"" if name == "empty" else b"payload"
    )
    source = ffi.new("struct sl_source *")
    lib.sl_parse_source(ffi.from_buffer("uint8_t[]", frame), packet, source)
    assert source.port == UNDERSTOOD[name][UDP].sport
    for length in range(len(frame)):
        assert parse(frame[:length]) is None, f"{name} cut to {length} bytes"


@pytest.mark.parametrize("name", NOT_UNDERSTOOD)
def test_parse_refuses(name: str) -> None:
    assert parse(bytes(NOT_UNDERSTOOD[name])) is None


def test_padding_is_no_payload() -> None:
    frame = bytes(UNDERSTOOD["v4"]) + bytes(20)
    packet = parse(frame)
    assert frame[packet.payload : packet.payload + packet.payload_length] == b"payload"


@settings(max_examples=200, deadline=None)
@given(
    payload=st.binary(max_size=1400),
    v6=st.booleans(),
    vlan=st.none() | st.integers(0, 4094),
    ports=st.tuples(st.integers(1, 65535), st.integers(1, 65535)),
    hops=st.integers(0, 255),
    traffic_class=st.integers(0, 255),
)
def test_build_is_what_scapy_builds(
    payload: bytes, v6: bool, vlan: int | None, ports: tuple[int, int], hops: int, traffic_class: int
) -> None:
    ours, theirs = ("fd00::1", "fd00::2") if v6 else ("192.0.2.1", "198.51.100.2")
    destination = Destination(
        OURS, THEIRS, (ours, ports[0]), (theirs, ports[1]), vlan=vlan, hops=hops, traffic_class=traffic_class
    )
    room = ffi.new("uint8_t[]", lib.SL_TEMPLATE_SIZE + len(payload))
    length = lib.sl_template_build(
        destination.template, room, payload, len(payload), lib.sl_sum(payload, len(payload), 0)
    )
    network = (
        IPv6(src=ours, dst=theirs, hlim=hops, tc=traffic_class)
        if v6
        else IP(src=ours, dst=theirs, ttl=hops, tos=traffic_class, id=0, flags="DF")
    )
    link = Ether(src=OURS, dst=THEIRS)
    if vlan is not None:
        link /= Dot1Q(vlan=vlan)
    assert bytes(ffi.buffer(room, length)) == bytes(
        link / network / UDP(sport=ports[0], dport=ports[1]) / payload
    )


def test_checksum_zero_is_sent_as_ones() -> None:
    """A computed checksum of zero would mean that there is none (RFC 768)."""
    destination = Destination(OURS, THEIRS, ("fd00::1", 1), ("fd00::2", 2))
    room = ffi.new("uint8_t[]", 200)
    lib.sl_template_build(destination.template, room, b"\0\0", 2, 0)
    sum_without = int.from_bytes(bytes(room[60:62]), "big")
    # A payload that adds what is missing to 0xffff makes the complement zero.
    payload = sum_without.to_bytes(2, "big")
    lib.sl_template_build(destination.template, room, payload, 2, lib.sl_sum(payload, 2, 0))
    assert bytes(room[60:62]) == b"\xff\xff"


def test_reverse() -> None:
    for network in (
        IP(src="192.0.2.1", dst="198.51.100.2", ttl=3),
        IPv6(src="fd00::1", dst="fd00::2", hlim=3),
    ):
        frame = bytearray(bytes(Ether(src=OURS, dst=THEIRS) / network / UDP(sport=5, dport=6) / b"question"))
        frame[-8:] = b"answer!!"
        assert lib.sl_reverse(ffi.from_buffer("uint8_t[]", frame), len(frame), 1) == 0
        back = type(network)(src=network.dst, dst=network.src)
        back.fields["hlim" if isinstance(network, IPv6) else "ttl"] = 64
        expected = Ether(src=THEIRS, dst=OURS) / back / UDP(sport=6, dport=5) / b"answer!!"
        assert bytes(frame) == bytes(expected)


@pytest.mark.parametrize(
    "frame",
    [
        Ether(dst="01:00:5e:00:00:01", src=THEIRS) / IP() / UDP(),
        Ether(dst=OURS, src=THEIRS) / IP(src="192.0.2.1", dst="224.0.0.1") / UDP(),
        Ether(dst=OURS, src=THEIRS) / IP(src="255.255.255.255", dst="192.0.2.1") / UDP(),
        Ether(dst=OURS, src=THEIRS) / IP(src="0.0.0.0", dst="192.0.2.1") / UDP(),
        Ether(dst=OURS, src=THEIRS) / IP(src="127.0.0.1", dst="192.0.2.1") / UDP(),
        Ether(dst=OURS, src=THEIRS) / IPv6(src="fd00::1", dst="ff02::1") / UDP(),
        Ether(dst=OURS, src=THEIRS) / IP(options=[IPOption(b"\x94\x04\x00\x00")]) / UDP(),
        Ether(dst=OURS, src=THEIRS) / IPv6() / IPv6ExtHdrRouting(addresses=["fd00::9"]) / UDP(),
    ],
    ids=lambda frame: frame.summary(),
)
def test_reverse_refuses(frame: Any) -> None:
    """Answers to groups and along source routes are what reflectors are made of."""
    raw = bytearray(bytes(frame))
    assert lib.sl_reverse(ffi.from_buffer("uint8_t[]", raw), len(raw), 1) < 0
    assert bytes(raw) == bytes(frame)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"source_mac": "02:00"}, "MAC"),
        ({"source_mac": "zz:00:00:00:00:00"}, "MAC"),
        ({"source": ("fd00::1", 1)}, "families"),
        ({"source": ("host", 1)}, "source"),
        ({"destination": ("192.0.2.2", 0)}, "port"),
        ({"destination": "192.0.2.2"}, "pair"),
        ({"vlan": 4095}, "vlan"),
        ({"vlan": -1}, "vlan"),
        ({"mtu": 60}, "mtu"),
        ({"mtu": 70000}, "mtu"),
        ({"hops": 256}, "hops"),
        ({"flow_label": 1 << 20}, "flow_label"),
    ],
)
def test_destination_refuses(changes: dict[str, Any], words: str) -> None:
    good: dict[str, Any] = {
        "source_mac": OURS,
        "destination_mac": THEIRS,
        "source": ("192.0.2.1", 1),
        "destination": ("192.0.2.2", 2),
    }
    assert Destination(**good).payload_maximum == 1472
    with pytest.raises(UsageError, match=words):
        Destination(**{**good, **changes})
