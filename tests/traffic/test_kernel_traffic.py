# SPDX-License-Identifier: Apache-2.0
"""The operator is never cut off: the kernel answers on the interface while lanes are open and flooded."""

from __future__ import annotations

import secrets
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any, Literal, cast

import pytest
from pyroute2 import IPRoute
from scapy.layers.inet import ICMP, IP, UDP
from scapy.layers.inet6 import ICMPv6EchoReply, ICMPv6EchoRequest, ICMPv6ND_NA, ICMPv6ND_NS, IPv6
from scapy.layers.l2 import ARP, Dot1Q, Ether
from scapy.packet import Packet as Frame

from sluice_cli.generator import Generator, Stream
from sluice_cli.lab import Host
from sluice_cli.traffic import Template, udp_frame
from tests.traffic.served import APP, LOW, SECONDS, Served, serving, steered, until

pytestmark = [pytest.mark.root, pytest.mark.bpf]

FLOOD = 200_000  # packets per second; the reader takes none of them
TCP_PORT = 2222
OTHER_PORT = 9999  # UDP, in no service
MEGABYTE = 1 << 20
USABLE = 0x02 | 0x04 | 0x08 | 0x10  # linux/neighbour.h: reachable, stale, delay, probe; not permanent


@pytest.fixture(scope="module", params=["native", "generic"])
def flooded(request: pytest.FixtureRequest) -> Iterator[Served]:
    """Lanes whose lowest ring is full, and more coming all the time."""
    mode = cast("Literal['native', 'generic']", request.param)
    with serving(mode, static_neighbours=False) as served, Generator(served.lab.client) as generator:
        lab = served.lab
        stranger = type(lab.client.ipv4)("10.81.16.0")
        frame = udp_frame(lab.client, lab.server, APP, bytes(22), source_address=stranger)
        generator.start([Stream([Template(frame)], rate=FLOOD, sources=256)], seconds=120)
        until(lambda: served.lanes.statistics().lane("low").ring_full, "a full ring")
        yield served
        assert generator.running, "the flood ended before the tests did"
        generator.stop()
        generator.wait(SECONDS)
        settled(served)


@pytest.fixture(autouse=True)
def still_flooded(flooded: Served) -> Iterator[None]:
    """Each test met the flood: the low lane's ring overflowed while it ran."""
    before = flooded.lanes.statistics().lane("low").ring_full
    yield
    until(lambda: flooded.lanes.statistics().lane("low").ring_full > before, "more of the flood")


def settled(served: Served) -> None:
    """With the flood over, every packet of it is in the ring or counted as one that did not fit."""

    def adds_up() -> bool:
        lane = served.lanes.statistics().lane("low")
        return steered(served.counters(), LOW) == lane.waiting + lane.received + lane.ring_full + lane.dropped

    until(adds_up, "steered = waiting + received + ring full + dropped")


def asked(served: Served, question: Frame, answer: Any) -> Frame:
    """The first frame for which ``answer`` is true; asked again each second, as any client would."""
    deadline = time.monotonic() + SECONDS
    wire = served.wire
    served.forget()
    while time.monotonic() < deadline:
        wire.outs.send(bytes(question))
        again = time.monotonic() + 1
        while time.monotonic() < again:
            wire.ins.settimeout(max(0.001, again - time.monotonic()))
            try:
                raw = wire.ins.recv(4096)
            except TimeoutError:
                break
            found = Ether(raw)
            if answer(found):
                return found
    raise AssertionError(f"no answer to {question.summary()}")


def ethernet(served: Served) -> Frame:
    return Ether(src=served.lab.client.mac, dst=served.lab.server.mac)


@pytest.mark.parametrize("size", [0, 56, 1400])
def test_ping_v4(flooded: Served, size: int) -> None:
    identifier, data = secrets.randbits(16), secrets.token_bytes(size)
    client, server = flooded.lab.client, flooded.lab.server
    ip = IP(src=str(client.ipv4), dst=str(server.ipv4))
    reply = asked(
        flooded,
        ethernet(flooded) / ip / ICMP(type=8, id=identifier, seq=1) / data,
        lambda frame: ICMP in frame and frame[ICMP].type == 0 and frame[ICMP].id == identifier,
    )
    assert reply[IP].src == str(server.ipv4)
    assert bytes(reply[ICMP].payload)[:size] == data


@pytest.mark.parametrize("size", [0, 56, 1400])
def test_ping_v6(flooded: Served, size: int) -> None:
    identifier, data = secrets.randbits(16), secrets.token_bytes(size)
    client, server = flooded.lab.client, flooded.lab.server
    ip = IPv6(src=str(client.ipv6), dst=str(server.ipv6))
    reply = asked(
        flooded,
        ethernet(flooded) / ip / ICMPv6EchoRequest(id=identifier, seq=1, data=data),
        lambda frame: ICMPv6EchoReply in frame and frame[ICMPv6EchoReply].id == identifier,
    )
    assert reply[IPv6].src == str(server.ipv6)
    assert reply[ICMPv6EchoReply].data == data


def test_arp_is_answered(flooded: Served) -> None:
    client, server = flooded.lab.client, flooded.lab.server
    question = Ether(src=client.mac, dst="ff:ff:ff:ff:ff:ff") / ARP(
        op=1, hwsrc=client.mac, psrc=str(client.ipv4), pdst=str(server.ipv4)
    )
    reply = asked(flooded, question, lambda frame: ARP in frame and frame[ARP].op == 2)
    assert (reply[ARP].hwsrc, reply[ARP].psrc) == (server.mac, str(server.ipv4))


def test_neighbour_discovery_is_answered(flooded: Served) -> None:
    client, server = flooded.lab.client, flooded.lab.server
    ip = IPv6(src=str(client.ipv6), dst=str(server.ipv6), hlim=255)
    reply = asked(
        flooded,
        ethernet(flooded) / ip / ICMPv6ND_NS(tgt=str(server.ipv6)),
        lambda frame: ICMPv6ND_NA in frame and frame[ICMPv6ND_NA].tgt == str(server.ipv6),
    )
    assert reply.src == server.mac


@pytest.mark.parametrize("version", [4, 6])
def test_neighbours_are_resolved_again(flooded: Served, version: int) -> None:
    """Both kernels forget each other and find each other, by ARP or neighbour discovery, for a datagram."""
    for here, there in (flooded.lab.hosts, flooded.lab.hosts[::-1]):
        target = str(there.ipv4 if version == 4 else there.ipv6)
        with IPRoute(netns=here.namespace, flags=0) as route:
            here.run(["ip", "neighbour", "flush", "dev", here.interface])
            family = socket.AF_INET if version == 4 else socket.AF_INET6
            with here.enter(), socket.socket(family, socket.SOCK_DGRAM) as sender:

                def resolved(sender: socket.socket = sender, at: str = target, net: Any = route) -> str:
                    sender.sendto(b"?", (at, 9))  # the discard port, RFC 863; an ICMP error may come back
                    return _neighbour(net, cast("int", sender.family), at)

                assert until(resolved, f"the MAC address of {target}") == there.mac


def _neighbour(route: Any, family: int, address: str) -> str:
    for entry in route.get_neighbours(family=family):
        if entry.get_attr("NDA_DST") == address and entry["state"] & USABLE:
            return str(entry.get_attr("NDA_LLADDR"))
    return ""


@pytest.mark.parametrize("version", [4, 6])
def test_tcp_carries_a_megabyte_both_ways(flooded: Served, version: int) -> None:
    client, server = flooded.lab.client, flooded.lab.server
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    address = str(server.ipv4 if version == 4 else server.ipv6)
    data = secrets.token_bytes(MEGABYTE)
    with _socket(server, family, socket.SOCK_STREAM) as listener:
        listener.bind((address, TCP_PORT))
        listener.listen()

        def echo() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.settimeout(SECONDS)
                while block := connection.recv(65536):
                    connection.sendall(block)

        thread = threading.Thread(target=echo, daemon=True)
        thread.start()
        with _socket(client, family, socket.SOCK_STREAM) as connection:
            connection.connect((address, TCP_PORT))
            sender = threading.Thread(target=connection.sendall, args=(data,), daemon=True)
            sender.start()
            received = bytearray()
            while len(received) < MEGABYTE:
                block = connection.recv(65536)
                assert block, f"closed after {len(received)} bytes"
                received += block
            assert received == data
            sender.join(SECONDS)
        thread.join(SECONDS)
        assert not thread.is_alive()


@pytest.mark.parametrize("version", [4, 6])
def test_udp_on_a_port_that_is_not_ours(flooded: Served, version: int) -> None:
    client, server = flooded.lab.client, flooded.lab.server
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    address = str(server.ipv4 if version == 4 else server.ipv6)
    with (
        _socket(server, family, socket.SOCK_DGRAM) as there,
        _socket(client, family, socket.SOCK_DGRAM) as here,
    ):
        there.bind((address, OTHER_PORT))
        here.settimeout(1.0)
        for number in range(20):
            payload = secrets.token_bytes(8) + bytes(50 * number)

            def trip(payload: bytes = payload) -> bool:
                here.sendto(payload, (address, OTHER_PORT))
                received, source = there.recvfrom(4096)
                there.sendto(received[::-1], source)
                return here.recv(4096) == payload[::-1]

            assert until(trip)


def test_tagged_traffic_for_nobody_is_left_to_the_kernel(flooded: Served) -> None:
    """A VLAN that the host does not have: the kernel drops it, we only count that it was passed."""
    before = flooded.counters().verdicts.get("pass_not_ours")
    ip = IP(src=str(flooded.lab.client.ipv4), dst=str(flooded.lab.server.ipv4))
    frame = ethernet(flooded) / Dot1Q(vlan=77) / ip / UDP(sport=1, dport=OTHER_PORT) / b"x"
    flooded.send([frame])
    expected = (before.packets if before else 0) + 1
    until(lambda: (now := flooded.counters().verdicts.get("pass_not_ours")) and now.packets >= expected)


def _socket(host: Host, family: int, kind: int) -> socket.socket:
    with host.enter():
        sock = socket.socket(family, kind)
    sock.settimeout(SECONDS)
    return sock
