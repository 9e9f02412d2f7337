# SPDX-License-Identifier: Apache-2.0
"""What the program passes on our ports arrives through kernel sockets: fragments and loopback."""

from __future__ import annotations

import random
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from ipaddress import ip_address
from typing import Any, Literal, cast

import pytest
from scapy.layers import inet, inet6
from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import IPv6, IPv6ExtHdrFragment
from scapy.layers.l2 import Dot1Q, Ether
from scapy.packet import Packet as Frame

from sluice_cli.lab import Lab
from tests.traffic.served import (
    ALPHA,
    APP,
    BETA,
    DATA,
    ECHO,
    ENVIRONMENT,
    HIGH,
    LOW,
    POLICY,
    SECONDS,
    STAKED,
    STRANGER_4,
    UNKNOWN,
    Served,
    serving,
    serving_in,
    until,
)
from userspace.datagram.lanes import open_lanes
from xdp.errors import BusyError
from xdp.policy import Policy

pytestmark = [pytest.mark.root, pytest.mark.bpf]

SEED = 11
# scapy's own functions have no types
scapy_fragment: Any = inet.fragment
scapy_fragment6: Any = inet6.fragment6
Mode = Literal["native", "generic"]


@pytest.fixture(scope="module", params=["native", "generic"])
def served(request: pytest.FixtureRequest) -> Iterator[Served]:
    with serving(cast("Mode", request.param)) as made:
        yield made


def fragments(
    lab: Lab, version: int, payload: bytes, *, source: str | None = None, tag: int | None = None
) -> Sequence[Frame]:
    """One datagram to APP in frames of at most 1,280 bytes."""
    ethernet: Any = Ether(src=lab.client.mac, dst=lab.server.mac)
    if tag is not None:
        ethernet /= Dot1Q(vlan=tag)
    udp = UDP(sport=4545, dport=APP) / payload
    identification = random.Random(payload).getrandbits(16)
    if version == 4:
        whole: Any = IP(src=source or str(lab.client.ipv4), dst=str(lab.server.ipv4), id=identification) / udp
        parts = scapy_fragment(IP(bytes(whole)), fragsize=1232)
    else:
        header = IPv6(src=source or str(lab.client.ipv6), dst=str(lab.server.ipv6))
        # Serialised once, so that the checksum is that of the whole datagram.
        whole = header / IPv6ExtHdrFragment(id=identification) / udp
        parts = scapy_fragment6(IPv6(bytes(whole)), 1280)
    assert len(parts) > 1
    return [ethernet / part for part in parts]


class TestFragments:
    @pytest.mark.parametrize("version", [4, 6])
    @pytest.mark.parametrize(
        ("first", "lane", "kind"), [(ALPHA, HIGH, 1), (BETA, DATA, 2), (b"\0", LOW, 0)], ids=["a", "b", "c"]
    )
    def test_arrive_whole_in_their_lane(
        self, served: Served, version: int, first: bytes, lane: int, kind: int
    ) -> None:
        payload = first + random.Random(SEED).randbytes(4000)
        before = served.counters()
        frames = fragments(served.lab, version, payload)
        (packet,) = served.exchange_whole(frames, 1)
        assert packet.payload == payload
        assert (packet.lane, packet.kind, packet.class_id, packet.service) == (lane, kind, STAKED, 1)
        assert packet.peer == (1 if version == 4 else 2)
        client = served.lab.client
        assert packet.source == (client.ipv4 if version == 4 else client.ipv6, 4545)
        after = served.counters()
        passed = after.verdicts["pass_fragment"].packets
        old = before.verdicts.get("pass_fragment")
        assert passed - (old.packets if old else 0) == len(frames)

    @pytest.mark.parametrize("version", [4, 6])
    def test_out_of_order_and_among_others(self, served: Served, version: int) -> None:
        """Last fragment first, and whole packets of the same sender between them."""
        payload = ALPHA + random.Random(SEED).randbytes(5000)
        client, server = served.lab.hosts[::-1]
        source, target = (client.ipv4, server.ipv4) if version == 4 else (client.ipv6, server.ipv6)
        ip = IP if version == 4 else IPv6
        plain = Ether(src=client.mac, dst=server.mac) / ip(src=str(source), dst=str(target))
        frames: list[Frame] = []
        for part in reversed(fragments(served.lab, version, payload)):
            frames += [part, plain / UDP(sport=4545, dport=APP) / ALPHA]
        found = served.exchange_whole(frames, 1 + len(frames) // 2)
        assert sorted(packet.payload for packet in found) == sorted([payload] + [ALPHA] * (len(frames) // 2))
        assert {packet.lane for packet in found} == {HIGH}

    def test_the_largest_datagram(self, served: Served) -> None:
        payload = BETA + random.Random(SEED).randbytes(65506)
        (packet,) = served.exchange_whole(fragments(served.lab, 4, payload), 1)
        assert packet.payload == payload

    def test_of_a_denied_class(self, served: Served) -> None:
        """The same policy holds for what the kernel put together."""
        denied = fragments(served.lab, 4, ALPHA + bytes(3000), source="10.81.66.7")
        fence = fragments(served.lab, 4, b"fence" + bytes(3000))
        (packet,) = served.exchange_whole([*denied, *fence], 1)
        assert packet.payload.startswith(b"fence")

    def test_incomplete_ones_are_nobodys(self, served: Served) -> None:
        frames = fragments(served.lab, 4, ALPHA + bytes(3000))[:-1]
        fence = fragments(served.lab, 4, b"fence" + bytes(3000))
        (packet,) = served.exchange_whole([*frames, *fence], 1)
        assert packet.payload.startswith(b"fence")

    def test_of_a_stranger(self, served: Served) -> None:
        payload = ALPHA + bytes(2000)
        (packet,) = served.exchange_whole(fragments(served.lab, 4, payload, source=STRANGER_4), 1)
        assert (packet.lane, packet.class_id, packet.peer) == (LOW, UNKNOWN, 0)
        assert packet.source[0] == ip_address(STRANGER_4)


@pytest.mark.parametrize("mode", ["native", "generic"])
def test_dropped_when_the_policy_says_so(mode: Mode) -> None:
    with serving(mode, POLICY.replace("version = 1", 'version = 1\nfragments = "drop"')) as served:
        frames = [
            *fragments(served.lab, 4, ALPHA + bytes(3000)),
            *fragments(served.lab, 6, ALPHA + bytes(3000)),
            *fragments(served.lab, 4, ALPHA + bytes(3000), tag=3),
        ]
        fence = Ether(src=served.lab.client.mac, dst=served.lab.server.mac) / IP(
            src=str(served.lab.client.ipv4), dst=str(served.lab.server.ipv4)
        )
        served.send([*frames, fence / UDP(sport=1, dport=APP) / b"fence"])
        (packet,) = served.receive(1)
        assert packet.payload == b"fence"
        assert served.counters().verdicts["drop_fragment"].packets == len(frames)
        assert served.lanes.companion is not None
        assert served.lanes.companion.try_receive() is None


class TestLoopback:
    @pytest.mark.parametrize("address", ["127.0.0.1", "::1", "own v4", "own v6"])
    def test_from_this_host(self, served: Served, address: str) -> None:
        """Never meets the program, but has the same classes: own addresses are staked ones here."""
        server = served.lab.server
        target = {"own v4": str(server.ipv4), "own v6": str(server.ipv6)}.get(address, address)
        family = socket.AF_INET6 if ":" in target else socket.AF_INET
        before = served.counters()
        with server.enter(), socket.socket(family, socket.SOCK_DGRAM) as sender:
            sender.connect((target, APP))
            own = sender.getsockname()[:2]
            sender.send(ALPHA + b"loop")
            (packet,) = served.receive(1)
            assert packet.payload == ALPHA + b"loop"
            assert packet.source == (ip_address(own[0]), own[1])
            staked = address.startswith("own")
            assert (packet.lane, packet.kind) == (HIGH if staked else LOW, 1)
            assert packet.class_id == (STAKED if staked else UNKNOWN)
        # The kernel's own packets (neighbours, routers) it may have seen.
        assert [lane.seen for lane in served.counters().lanes] == [lane.seen for lane in before.lanes]

    def test_answered(self, served: Served) -> None:
        server = served.lab.server
        with server.enter(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.settimeout(SECONDS)
            sender.connect(("127.0.0.1", ECHO))
            sender.send(b"echo")
            batch = served.lanes.receive(timeout=SECONDS)
            assert len(batch) == 1
            batch[0][0] = ord("E")
            assert served.lanes.send_back(batch) == 1
            assert sender.recv(64) == b"Echo"

    def test_while_the_queues_never_run_dry(self, served: Served) -> None:
        """Packets on the wire are always there, yet what came through the kernel gets its turn."""
        lab = served.lab
        frame = bytes(
            Ether(src=lab.client.mac, dst=lab.server.mac)
            / IP(src=str(lab.client.ipv4), dst=str(lab.server.ipv4))
            / UDP(sport=1, dport=APP)
            / ALPHA
        )
        with lab.server.enter(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.sendto(b"patience", ("127.0.0.1", APP))
        calls = 0
        payload = b""
        while payload != b"patience":
            served.send([frame] * 2)
            with served.lanes.receive(1, timeout=SECONDS) as batch:
                payload = bytes(batch[0])
            calls += 1
            assert calls < 100
        until(lambda: not _rest(served), "the rest")


def _rest(served: Served) -> int:
    with served.lanes.try_receive() as batch:
        return len(batch)


def test_a_port_that_another_process_has(make_lab: Any) -> None:
    """Says which; told to, it goes on without a companion there, and what is steered still arrives."""
    lab = make_lab(static_neighbours=True)
    script = (
        f"import socket, sys\ns = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)\n"
        f"s.bind(('::', {APP}))\nprint('bound', flush=True)\nsys.stdin.read()\n"
    )
    child = lab.server.popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=ENVIRONMENT
    )
    try:
        assert child.stdout.readline() == b"bound\n"
        with lab.server.enter(), pytest.raises(BusyError, match=rf"{APP}.*process {child.pid} \("):
            open_lanes(Policy.parse(POLICY), interface=lab.server.interface)
        with serving_in(lab, skip_busy_ports=True) as served:
            assert served.lanes.status()["companion_ports"] == [APP + 1, ECHO]
            frame = Ether(src=lab.client.mac, dst=lab.server.mac) / IP(
                src=str(lab.client.ipv4), dst=str(lab.server.ipv4)
            )
            (packet,) = served.exchange([frame / UDP(sport=1, dport=APP) / ALPHA])
            assert packet.lane == HIGH
    finally:
        child.communicate()
    assert child.returncode == 0
