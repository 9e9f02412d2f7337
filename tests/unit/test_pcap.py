# SPDX-License-Identifier: Apache-2.0
"""Captures: every format that is promised, and nothing but clear errors for what is damaged."""

from __future__ import annotations

import struct
from collections import Counter
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sluice_cli.pcap import MAX_BLOCK, MAX_PACKET, Capture, CapturedDatagram, CaptureError
from sluice_cli.traffic import udp_frame

HERE = SimpleNamespace(
    mac="02:00:00:00:00:01", ipv4=IPv4Address("192.0.2.1"), ipv6=IPv6Address("2001:db8::1")
)
THERE = SimpleNamespace(
    mac="02:00:00:00:00:02", ipv4=IPv4Address("192.0.2.2"), ipv6=IPv6Address("2001:db8::2")
)
SECONDS = 1_700_000_000
NANOSECONDS = 123_456_789


def packet(payload: bytes = b"hello", version: int = 4) -> bytes:
    return udp_frame(HERE, THERE, 53, payload, version=4 if version == 4 else 6)


def classic(*packets: bytes, order: str = "<", nano: bool = False, link: int = 1) -> bytes:
    magic = 0xA1B23C4D if nano else 0xA1B2C3D4
    fraction = NANOSECONDS if nano else NANOSECONDS // 1000
    out = struct.pack(order + "IHHiIII", magic, 2, 4, 0, 0, 65535, link)
    for data in packets:
        out += struct.pack(order + "IIII", SECONDS, fraction, len(data), len(data)) + data
    return out


def block(number: int, body: bytes, order: str = "<") -> bytes:
    body += bytes(-len(body) % 4)
    length = struct.pack(order + "I", 12 + len(body))
    return struct.pack(order + "I", number) + length + body + length


def section(order: str = "<", major: int = 1) -> bytes:
    return block(0x0A0D0D0A, struct.pack(order + "IHHq", 0x1A2B3C4D, major, 0, -1), order)


def option(code: int, value: bytes, order: str = "<") -> bytes:
    return struct.pack(order + "HH", code, len(value)) + value + bytes(-len(value) % 4)


def interface(order: str = "<", link: int = 1, snap: int = 0, options: bytes = b"") -> bytes:
    return block(1, struct.pack(order + "HHI", link, 0, snap) + options, order)


def enhanced(data: bytes, order: str = "<", number: int = 0, ticks: int = 0, options: bytes = b"") -> bytes:
    head = struct.pack(order + "IIIII", number, ticks >> 32, ticks & 0xFFFFFFFF, len(data), len(data))
    return block(6, head + data + bytes(-len(data) % 4) + options, order)


def read(tmp_path: Path, content: bytes) -> tuple[list[CapturedDatagram], Capture]:
    path = tmp_path / "capture"
    path.write_bytes(content)
    capture = Capture(path)
    return list(capture), capture


class TestClassic:
    @pytest.mark.parametrize("order", ["<", ">"])
    @pytest.mark.parametrize("nano", [False, True])
    def test_byte_orders_and_resolutions(self, tmp_path: Path, order: str, nano: bool) -> None:
        content = classic(packet(b"one"), packet(b"", 6), order=order, nano=nano)
        found, capture = read(tmp_path, content)
        time_ns = SECONDS * 10**9 + (NANOSECONDS if nano else NANOSECONDS // 1000 * 1000)
        assert found == [
            CapturedDatagram(time_ns, HERE.ipv4, 40000, THERE.ipv4, 53, b"one"),
            CapturedDatagram(time_ns, HERE.ipv6, 40000, THERE.ipv6, 53, b""),
        ]
        assert (capture.read, capture.skipped) == (2, Counter())

    def test_iterating_again_counts_again(self, tmp_path: Path) -> None:
        found, capture = read(tmp_path, classic(packet()))
        assert list(capture) == found
        assert capture.read == 1

    def test_no_packets(self, tmp_path: Path) -> None:
        assert read(tmp_path, classic())[0] == []

    def test_fcs_bits_of_the_link_type(self, tmp_path: Path) -> None:
        assert len(read(tmp_path, classic(packet() + b"fcs!", link=1 | 0x24000000))[0]) == 1


class TestPcapng:
    @pytest.mark.parametrize("order", ["<", ">"])
    def test_blocks(self, tmp_path: Path, order: str) -> None:
        data = packet(b"one")
        old = struct.pack(order + "HHIIII", 0, 0, 0, 7, len(data), len(data)) + data
        content = (
            section(order)
            + block(0x0BAD, b"unknown blocks are skipped", order)
            + interface(order)
            + enhanced(data, order, ticks=SECONDS * 10**6 + 5, options=option(1, b"comment", order))
            + block(3, struct.pack(order + "I", len(data)) + data, order)
            + block(2, old, order)
        )
        found, capture = read(tmp_path, content)
        assert [datagram.payload for datagram in found] == [b"one"] * 3
        assert [datagram.time_ns for datagram in found] == [SECONDS * 10**9 + 5000, None, 7000]
        assert capture.read == 3

    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            (option(9, b"\x09"), 1_500_000_001),
            (option(9, b"\x00"), 1_500_000_001 * 10**9),
            (option(9, bytes([0x80 | 10])), 1_500_000_001 * 10**9 // 1024),
            (option(14, struct.pack("<q", -3)), 1_500_000_001_000 - 3 * 10**9),
            (option(2, b"eth0") + option(9, b"\x09") + option(0, b"") + option(9, b"\x00"), 1_500_000_001),
        ],
    )
    def test_clocks(self, tmp_path: Path, options: bytes, expected: int) -> None:
        content = section() + interface(options=options) + enhanced(packet(), ticks=1_500_000_001)
        assert read(tmp_path, content)[0][0].time_ns == expected

    def test_sections_have_their_own_order_and_interfaces(self, tmp_path: Path) -> None:
        ip = packet()[14:]
        content = (
            section("<") + interface("<") + interface("<", link=101) + enhanced(ip, "<", number=1)
            + section(">") + interface(">") + enhanced(packet(), ">")
        )  # fmt: skip
        assert len(read(tmp_path, content)[0]) == 2
        with pytest.raises(CaptureError, match="interface 1, of which there are 1"):
            read(tmp_path, content + enhanced(ip, ">", number=1))

    def test_simple_packets_are_cut_at_the_snap_length(self, tmp_path: Path) -> None:
        data = packet(b"x" * 100)
        content = section() + interface(snap=60) + block(3, struct.pack("<I", len(data)) + data[:60])
        found, capture = read(tmp_path, content)
        assert found == []
        assert capture.skipped == {"truncated": 1}


class TestLinkTypes:
    @pytest.mark.parametrize("version", [4, 6])
    @pytest.mark.parametrize(
        ("link", "head"),
        [
            (0, {4: struct.pack("<I", 2), 6: struct.pack("<I", 10)}),
            (0, {4: struct.pack(">I", 2), 6: struct.pack("<I", 30)}),
            (108, {4: struct.pack(">I", 2), 6: struct.pack(">I", 24)}),
            (101, {4: b"", 6: b""}),
            (12, {4: b"", 6: b""}),
            (228, {4: b"", 6: b""}),
            (113, {4: bytes(14) + b"\x08\x00", 6: bytes(14) + b"\x86\xdd"}),
            (276, {4: b"\x08\x00" + bytes(18), 6: b"\x86\xdd" + bytes(18)}),
        ],
    )
    def test_known(self, tmp_path: Path, link: int, head: dict[int, bytes], version: int) -> None:
        if link == 228 and version == 6:
            link = 229
        found, capture = read(tmp_path, classic(head[version] + packet(b"abc", version)[14:], link=link))
        assert [datagram.payload for datagram in found] == [b"abc"]
        assert not capture.skipped

    def test_others_are_counted(self, tmp_path: Path) -> None:
        _, capture = read(tmp_path, classic(packet(), packet(), link=147))
        assert capture.skipped == {"link_type": 2}

    @pytest.mark.parametrize("link", [0, 1, 101, 108, 113, 276])
    def test_too_short(self, tmp_path: Path, link: int) -> None:
        _, capture = read(tmp_path, classic(b"", b"\x00", b"\x02\x00\x00", link=link))
        assert sum(capture.skipped.values()) == 3

    def test_unknown_family(self, tmp_path: Path) -> None:
        _, capture = read(tmp_path, classic(struct.pack("<I", 7) + packet()[14:], link=0))
        assert capture.skipped == {"not_ip": 1}


class TestDamaged:
    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "offset 0: the file is empty"),
            (b"root:x:0:0", "offset 0: no capture: it begins with 726f6f74"),
            (b"\x1f\x8b\x08\x00", "compressed with gzip"),
            (bytes.fromhex("34cdb2a1"), "modified pcap"),
            (classic()[:20], "offset 4: the file ends after 16 of 20 bytes of the file header"),
            (classic(packet())[:30], "offset 24: the file ends in a packet header, after 6 bytes"),
            (classic(packet())[:-1], r"offset 40: the file ends after 46 of 47 bytes of a packet"),
            (classic().replace(b"\x02\x00\x04\x00", b"\x03\x00\x04\x00"), "offset 4: pcap version 3"),
            (classic() + struct.pack("<IIII", 0, 0, MAX_PACKET + 1, 1 << 20), "offset 24: a packet of"),
            (classic() + struct.pack("<IIII", 0, 0, 0xFFFFFFFF, 0xFFFFFFFF), "a packet of 4294967295 bytes"),
            (classic() + struct.pack("<IIII", 0, 10**6, 0, 0), "more than a second"),
            (classic() + struct.pack("<IIII", 0, 0, 5, 4) + bytes(5), "a packet of 4 bytes with 5 captured"),
            (section()[:6], "a block's length"),
            (section()[:10], "a section header"),
            (section().replace(b"\x4d\x3c\x2b\x1a", b"\x4d\x3c\x2b\x1b"), "offset 8: .*byte-order magic"),
            (section(major=2), "offset 0: pcapng version 2"),
            (section() + b"\x01", "offset 28: the file ends after 1 of 4 bytes of a block's type"),
            (section() + struct.pack("<III", 9, 8, 8), "offset 28: a block of 8 bytes"),
            (section() + struct.pack("<III", 9, 13, 13), "offset 28: a block of 13 bytes"),
            (section() + struct.pack("<II", 9, MAX_BLOCK + 4), "offset 28: a block of"),
            (section() + struct.pack("<II", 9, 0xFFFFFFFC), "offset 28: a block of"),
            (section() + struct.pack("<III", 9, 12, 16), "offset 28: a block of 12 bytes ends as one of 16"),
            (section() + enhanced(packet()), "offset 28: a packet of interface 0, of which there are 0"),
            (section() + interface() + block(6, bytes(16)), "offset 48: a packet block of 16 bytes"),
            (section() + interface() + block(6, struct.pack("<IIIII", 0, 0, 0, 9, 9)), "room for 0"),
            (section() + interface() + block(3, struct.pack("<I", 9)), "room for 0"),
            (section() + interface() + block(3, b""), "offset 48: a simple packet block of 0 bytes"),
            (section() + block(1, b"\x01\x00"), "offset 28: an interface of 4 bytes"),
            (section() + interface(options=option(9, b"\x7f")), r"units of 2\^-127 or 10\^-127"),
            (section() + interface(options=struct.pack("<HH", 9, 99)), "an option of 99 bytes"),
            (section() + interface() * 4097, "more than 4096 interfaces"),
        ],
    )  # fmt: skip
    def test_is_told_with_file_and_offset(self, tmp_path: Path, content: bytes, message: str) -> None:
        with pytest.raises(CaptureError, match=message) as caught:
            read(tmp_path, content)
        assert str(tmp_path / "capture") in str(caught.value)
        assert caught.value.hint

    def test_no_such_file_and_a_folder(self, tmp_path: Path) -> None:
        with pytest.raises(CaptureError, match="No such file"):
            list(Capture(tmp_path / "nothing"))
        with pytest.raises(CaptureError, match="directory"):
            list(Capture(tmp_path))

    def test_what_came_before_the_damage_is_there(self, tmp_path: Path) -> None:
        path = tmp_path / "capture"
        path.write_bytes(classic(packet(b"whole"), packet(b"cut"))[:-1])
        datagrams = iter(Capture(path))
        assert next(datagrams).payload == b"whole"
        with pytest.raises(CaptureError):
            next(datagrams)


GOOD = {
    "classic": classic(packet(b"one"), packet(b"two", 6), packet(b"")),
    "big": classic(packet(b"one"), packet(b"two"), order=">", nano=True),
    "cooked": classic(bytes(14) + b"\x08\x00" + packet(b"one")[14:], link=113),
    "pcapng": section() + interface(options=option(9, b"\x09")) + enhanced(packet(b"one"))
    + enhanced(packet(b"two", 6), options=option(1, b"note")) + block(3, struct.pack("<I", 47) + packet()),
}  # fmt: skip


@pytest.mark.parametrize("kind", sorted(GOOD))
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutated_files_are_read_or_refused(tmp_path: Path, kind: str, data: st.DataObject) -> None:
    """Nothing but CaptureError comes out, whatever the bytes; what is yielded adds up."""
    content = bytearray(GOOD[kind])
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, max(0, len(content) - 1)))
        operation = data.draw(st.sampled_from(["set", "cut", "insert", "word", "copy"]))
        if operation == "set" and content:
            content[at] = data.draw(st.integers(0, 255))
        elif operation == "cut":
            del content[at : at + data.draw(st.integers(1, 60))]
        elif operation == "insert":
            content[at:at] = data.draw(st.binary(max_size=20))
        elif operation == "word":
            content[at : at + 4] = data.draw(
                st.sampled_from([b"\xff" * 4, b"\0" * 4, b"\0\0\0\x80", b"\x04\0\0\0"])
            )
        else:
            content[at:at] = content[: data.draw(st.integers(0, 200))]
    check(tmp_path, bytes(content))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(head=st.sampled_from([classic(), section() + interface(), b""]), tail=st.binary(max_size=300))
def test_random_bytes_are_read_or_refused(tmp_path: Path, head: bytes, tail: bytes) -> None:
    check(tmp_path, head + tail)


def check(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "mutated"
    path.write_bytes(content)
    capture = Capture(path)
    found = 0
    message = "offset"
    try:
        for datagram in capture:
            found += 1
            assert len(datagram.payload) <= len(content)
            assert 0 <= datagram.source_port <= 65535
            assert 0 <= datagram.destination_port <= 65535
    except CaptureError as error:
        message = str(error)
    assert "offset" in message
    assert capture.read == found + sum(capture.skipped.values())


class TestRealCapture:
    def test_all_512_shreds(self, vectors: Path) -> None:
        capture = Capture(vectors / "demo-shreds.pcap")
        found = list(capture)
        assert len(found) == capture.read == 512
        variants = Counter(datagram.payload[64] for datagram in found)
        assert variants == {0x96: 224, 0xB6: 32, 0x66: 224, 0x76: 32}
        assert Counter(len(datagram.payload) for datagram in found) == {1203: 256, 1228: 256}
        assert {(datagram.source, datagram.source_port) for datagram in found} == {
            (ip_address("127.0.0.1"), 46582)
        }
        assert {datagram.destination_port for datagram in found} == {46049}

    def test_every_frame(self, vectors: Path, tmp_path: Path) -> None:
        for file in sorted((vectors / "frames").glob("*.bin")):
            found, capture = read(tmp_path, classic(file.read_bytes()))
            assert capture.read == 1
            assert len(found) == (1 if file.stem in {"dns_query_a", "quic_initial"} else 0), file.name
