# SPDX-License-Identifier: Apache-2.0
"""Frames on the wire become packets in lanes: byte for byte, with everything that the columns say."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from ipaddress import ip_address
from typing import Any, ClassVar, Literal, cast

import pytest
from scapy.layers.inet import IP, UDP, IPOption, IPOption_NOP, IPOption_RR
from scapy.layers.inet6 import (
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
    PadN,
)
from scapy.layers.l2 import Dot1AD, Dot1Q, Ether
from scapy.packet import Packet as Frame

from sluice_cli.traffic import udp_frame
from tests.traffic.served import (
    ALPHA,
    APP,
    BETA,
    BLOCKED_SOURCE,
    DATA,
    ECHO,
    HIGH,
    LOW,
    STAKED,
    STRANGER_4,
    STRANGER_6,
    UNKNOWN,
    Served,
    checksums_right,
    payload_of,
    serving,
    until,
)

pytestmark = [pytest.mark.root, pytest.mark.bpf]

SEED = 20240607


@pytest.fixture(scope="module", params=["native", "generic"])
def served(request: pytest.FixtureRequest) -> Iterator[Served]:
    with serving(cast("Literal['native', 'generic']", request.param)) as made:
        yield made


def ip(served: Served, version: int, source: str | None = None, **fields: Any) -> Frame:
    client, server = served.lab.client, served.lab.server
    if version == 4:
        return IP(src=source or str(client.ipv4), dst=str(server.ipv4), **fields)
    return IPv6(src=source or str(client.ipv6), dst=str(server.ipv6), **fields)


def ethernet(served: Served) -> Frame:
    return Ether(src=served.lab.client.mac, dst=served.lab.server.mac)


class TestPayloads:
    @pytest.mark.parametrize("version", [4, 6])
    def test_every_size_byte_for_byte(self, served: Served, version: Literal[4, 6]) -> None:
        """All sizes that fit an MTU of 1,500 bytes."""
        noise = random.Random(SEED).randbytes(4096)
        sizes = range(1473 if version == 4 else 1453)
        # Each payload is at another place in the noise, so none can be taken for a neighbour.
        payloads = [noise[size : 2 * size] for size in sizes]
        lab = served.lab
        frames = [udp_frame(lab.client, lab.server, ECHO, one, version=version) for one in payloads]
        found = served.exchange(frames)
        assert [packet.payload for packet in found] == payloads
        assert {packet.lane for packet in found} == {DATA}

    def test_ethernet_padding_is_no_payload(self, served: Served) -> None:
        frame = bytes(ethernet(served) / ip(served, 4) / UDP(sport=4000, dport=ECHO) / b"xyz")
        assert len(frame) < 60
        (packet,) = served.exchange([frame + bytes(60 - len(frame))])
        assert packet.payload == b"xyz"

    @pytest.mark.parametrize("version", [4, 6])
    def test_udp_length_shorter_than_ip_length(self, served: Served, version: int) -> None:
        frame = ethernet(served) / ip(served, version) / UDP(sport=4000, dport=ECHO, len=8 + 5) / b"12345rest"
        (packet,) = served.exchange([frame])
        assert packet.payload == b"12345"


class TestEncapsulations:
    """Nothing that stands between Ethernet and UDP changes lane, kind, class or source."""

    TAGS: ClassVar[dict[str, list[Frame]]] = {
        "none": [],
        "802.1Q": [Dot1Q(vlan=5, prio=3)],
        "802.1ad": [Dot1AD(vlan=9)],
        "QinQ": [Dot1AD(vlan=100), Dot1Q(vlan=200)],
        "802.1Q twice": [Dot1Q(vlan=1), Dot1Q(vlan=4095, dei=1)],
    }

    def check(self, served: Served, version: int, frames: Sequence[Frame]) -> None:
        found = served.exchange(frames)
        client = served.lab.client
        source = (client.ipv4 if version == 4 else client.ipv6, 4321)
        assert [packet.payload for packet in found] == [payload_of(frame) for frame in frames]
        for packet in found:
            assert packet.source == source
            assert (packet.lane, packet.kind, packet.class_id, packet.service) == (HIGH, 1, STAKED, 1)
            assert packet.peer == (1 if version == 4 else 2)

    def payload(self, number: int) -> bytes:
        return ALPHA + number.to_bytes(2, "big") + random.Random(SEED + number).randbytes(40 + number)

    @pytest.mark.parametrize("tags", TAGS)
    @pytest.mark.parametrize("version", [4, 6])
    def test_vlan(self, served: Served, version: int, tags: str) -> None:
        frames = []
        for number in range(8):
            frame = ethernet(served)
            for tag in self.TAGS[tags]:
                frame /= tag
            udp = UDP(sport=4321, dport=APP) / self.payload(number)
            frames.append(Ether(bytes(frame / ip(served, version) / udp)))
        self.check(served, version, frames)

    @pytest.mark.parametrize(
        "options",
        [
            [IPOption_NOP()],
            [IPOption_RR(pointer=4, routers=["0.0.0.0"] * 9)],
            [IPOption(copy_flag=1, optclass=0, option=20, length=4, value=b"\0\0")],  # router alert
        ],
        ids=["nop", "record route, 40 bytes", "router alert"],
    )
    @pytest.mark.parametrize("tagged", [False, True])
    def test_ipv4_options(self, served: Served, options: list[IPOption], tagged: bool) -> None:
        outer = ethernet(served) / Dot1Q(vlan=7) if tagged else ethernet(served)
        frames = [
            Ether(
                bytes(
                    outer / ip(served, 4, options=options) / UDP(sport=4321, dport=APP) / self.payload(number)
                )
            )
            for number in range(4)
        ]
        assert all(frame[IP].ihl > 5 for frame in frames)
        self.check(served, 4, frames)

    @pytest.mark.parametrize(
        "headers",
        [
            [IPv6ExtHdrHopByHop(options=[PadN(optdata=b"\0" * 4)])],
            [IPv6ExtHdrDestOpt(options=[PadN(optdata=b"\0" * 20)])],
            [IPv6ExtHdrRouting(type=253, segleft=0)],
            [
                IPv6ExtHdrHopByHop(options=[PadN(optdata=b"\0" * 4)]),
                IPv6ExtHdrDestOpt(options=[PadN(optdata=b"\0" * 4)]),
                IPv6ExtHdrRouting(type=253, segleft=0),
                IPv6ExtHdrDestOpt(options=[PadN(optdata=b"\0" * 4)]),
            ],
        ],
        ids=["hop-by-hop", "destination", "routing", "four of them"],
    )
    def test_ipv6_extension_headers(self, served: Served, headers: list[Frame]) -> None:
        frames = []
        for number in range(4):
            frame = ethernet(served) / ip(served, 6)
            for header in headers:
                frame /= header.copy()
            frames.append(Ether(bytes(frame / UDP(sport=4321, dport=APP) / self.payload(number))))
        self.check(served, 6, frames)


class TestColumns:
    @pytest.mark.parametrize("version", [4, 6])
    def test_kind_class_service_peer_and_source(self, served: Served, version: int) -> None:
        client = served.lab.client
        own = str(client.ipv4 if version == 4 else client.ipv6)
        neighbour = "10.81.0.77" if version == 4 else "fd81::77"
        stranger = STRANGER_4 if version == 4 else STRANGER_6
        peer = 1 if version == 4 else 2
        # source, source port, destination port, payload: lane, kind, class, service, peer
        cases = [
            (own, 1111, APP, ALPHA + b"0", (HIGH, 1, STAKED, 1, peer)),
            (own, 2222, APP + 1, BETA + b"1", (DATA, 2, STAKED, 1, peer)),
            (own, 3333, APP, b"other2", (LOW, 0, STAKED, 1, peer)),
            (own, 4444, APP, b"", (LOW, 0, STAKED, 1, peer)),
            (own, 65535, ECHO, ALPHA + b"4", (DATA, 0, STAKED, 2, peer)),
            (neighbour, 5555, APP, ALPHA + b"5", (HIGH, 1, STAKED, 1, 0)),
            (stranger, 6666, APP, ALPHA + b"6", (LOW, 1, UNKNOWN, 1, 0)),
            (stranger, 1, APP + 1, BETA + b"7", (LOW, 2, UNKNOWN, 1, 0)),
            (stranger, 7777, ECHO, b"8", (DATA, 0, UNKNOWN, 2, 0)),
        ]
        before = time.monotonic_ns()
        frames = [
            ethernet(served) / ip(served, version, source) / UDP(sport=sport, dport=dport) / payload
            for source, sport, dport, payload, _ in cases
        ]
        found = {packet.payload: packet for packet in served.exchange(frames)}
        after = time.monotonic_ns()
        assert len(found) == len(cases)
        for source, sport, _, payload, expected in cases:
            packet = found[payload]
            assert packet.source == (ip_address(source), sport)
            assert (
                packet.lane,
                packet.kind,
                packet.class_id,
                packet.service,
                packet.peer,
            ) == expected, payload
            assert before <= packet.time <= after

    def test_highest_lane_first(self, served: Served) -> None:
        """What was sent last to the highest lane comes first, in the order of sending within its lane."""
        lab = served.lab
        kinds = [(LOW, b"\x00"), (DATA, BETA), (HIGH, ALPHA)]
        frames = [
            udp_frame(lab.client, lab.server, APP, first + bytes([number]))
            for _, first in kinds
            for number in range(10)
        ]
        before = served.counters().steered
        served.send(frames)
        until(lambda: served.counters().steered == before + len(frames))
        with served.lanes.receive(64, timeout=0) as batch:
            assert list(batch.lanes) == [HIGH] * 10 + [DATA] * 10 + [LOW] * 10
            assert [view[1] for view in batch] == list(range(10)) * 3

    def test_dropped_and_passed_do_not_arrive(self, served: Served) -> None:
        """A denied class, a port of nobody; behind them a fence that does arrive."""
        before = served.counters()
        denied = ethernet(served) / ip(served, 4, BLOCKED_SOURCE) / UDP(sport=1, dport=APP) / ALPHA
        nobody = ethernet(served) / ip(served, 4) / UDP(sport=1, dport=9999) / ALPHA
        fence = ethernet(served) / ip(served, 4) / UDP(sport=1, dport=APP) / b"fence"
        served.send([denied] * 5 + [nobody] * 3 + [fence])
        (packet,) = served.receive(1)
        assert packet.payload == b"fence"
        after = served.counters()

        def more(reason: str) -> int:
            old = before.verdicts.get(reason)
            return after.verdicts[reason].packets - (old.packets if old else 0)

        assert more("drop_denied") == 5
        assert more("pass_not_ours") == 3


class TestEcho:
    @pytest.mark.parametrize("tags", ["none", "802.1Q", "QinQ"])
    @pytest.mark.parametrize("version", [4, 6])
    def test_send_back(self, served: Served, version: int, tags: str) -> None:
        """Addresses, ports and MACs are swapped, the changed payload and right checksums go out."""
        sizes = [0, 1, 2, 3, 17, 18, 64, 511, 1232, 1440]
        payloads = [bytes([size & 0xFF]) * size for size in sizes]
        outer = ethernet(served)
        for tag in TestEncapsulations.TAGS[tags]:
            outer /= tag.copy()
        served.forget()
        served.send(
            [
                outer / ip(served, version) / UDP(sport=4100 + i, dport=ECHO) / p
                for i, p in enumerate(payloads)
            ]
        )
        left = len(payloads)
        while left:
            batch = served.lanes.receive(timeout=10)
            assert batch
            left -= len(batch)
            for view in batch:
                if len(view):
                    view[0] ^= 0xFF
            del view
            count = len(batch)
            assert served.lanes.send_back(batch) == count
        assert served.lanes.flush()
        frames = sorted(served.answers(len(payloads)), key=lambda frame: frame[UDP].dport)
        network = IP if version == 4 else IPv6
        server = served.lab.server
        for number, (frame, payload) in enumerate(zip(frames, payloads, strict=True)):
            expected = bytes([payload[0] ^ 0xFF]) + payload[1:] if payload else b""
            assert payload_of(frame) == expected
            assert (frame.src, frame.dst) == (server.mac, served.lab.client.mac)
            assert (frame[UDP].sport, frame[UDP].dport) == (ECHO, 4100 + number)
            assert ip_address(frame[network].src) == (server.ipv4 if version == 4 else server.ipv6)
            assert checksums_right(frame)
            layers = [layer.vlan for layer in frame.iterpayloads() if isinstance(layer, Dot1Q)]
            assert layers == [tag.vlan for tag in TestEncapsulations.TAGS[tags]]

    def test_frames_come_back(self, served: Served) -> None:
        """After all that was sent back, every frame is free or in the kernel again."""
        assert served.lanes.flush()
        (frames,) = served.lanes.frames()
        assert frames.balanced
        assert not any(frames.application)
        assert frames.transmit == 0
