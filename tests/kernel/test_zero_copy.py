# SPDX-License-Identifier: Apache-2.0
"""ZeroCopyUDP over AF_XDP: what arrives, what is on the wire, and where the frames are meanwhile."""

from __future__ import annotations

import contextlib
import errno
import math
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Dot1Q, Ether

from sluice_cli.lab import Lab
from sluice_cli.traffic import udp_frame
from tests.kernel.datapath import POLICY, SECONDS, VOTES, balanced, client_socket, server_address, until
from tests.unit.zero_copy_rules import RULES, Ends
from userspace.datagram.batch import Batch
from userspace.datagram.destination import Destination
from userspace.datagram.fanout import Fanout
from userspace.datagram.lanes import open_lanes
from userspace.datagram.xsk_lanes import XskLanes
from userspace.datagram.xsk_send import Spread
from userspace.datagram.zero_copy import Buffers, ZeroCopyUDP
from xdp.errors import UsageError
from xdp.policy import Policy

pytestmark = [pytest.mark.root, pytest.mark.bpf]

RING = 256
SMALL = POLICY + f"\n[rings]\nrx = 256\ntx = {RING}\nquota = 256\nreserve = 256\n"
SO_RCVBUFFORCE = 33  # asm-generic/socket.h
SOL_PACKET, PACKET_AUXDATA = 263, 8  # linux/socket.h, linux/if_packet.h
SILENT = 40  # host part of an address that nobody has


@pytest.fixture(scope="module", name="lab")
def _lab() -> Iterator[Lab]:
    with Lab() as made:
        yield made


@pytest.fixture(scope="module")
def opened(lab: Lab) -> Iterator[XskLanes]:
    with lab.server.enter():
        made = open_lanes(Policy.parse(SMALL), interface=lab.server.interface, mode="native-copy")
    assert isinstance(made, XskLanes)
    with made:
        yield made


@pytest.fixture
def lanes(opened: XskLanes) -> Iterator[XskLanes]:
    """The same ones for all tests: afterwards every frame is back where it came from."""
    yield opened
    assert opened.closed or opened.flush()
    balanced(opened)
    frames = opened.frames()[0]
    assert (frames.reserved, frames.transmit, sum(frames.application)) == (0, 0, 0)


@contextlib.contextmanager
def ends_of(lab: Lab, lanes: XskLanes, version: int) -> Iterator[Ends]:
    """With a peer whose MAC address the kernel knows, so that packets to it leave as frames."""
    with client_socket(lab, version) as peer:
        to = peer.getsockname()[:2]

        def by_frame() -> bool:
            before = lanes.statistics().sent
            with lab.server.enter():
                assert lanes.send(to, [b"who are you"], port=VOTES) == 1
            peer.recv(100)
            return lanes.statistics().sent > before

        until(by_frame, "a frame")
        zero = ZeroCopyUDP(lanes, port=VOTES)
        yield Ends(lanes, zero, peer, to, (server_address(lab, version), VOTES))
        assert zero.statistics().balanced
        assert zero.statistics().held == 0


@pytest.mark.parametrize("version", [4, 6])
def test_rules(lab: Lab, lanes: XskLanes, version: int) -> None:
    """What the other backends do, too; and nothing of it through the kernel."""
    forwarded = lanes.statistics().queues[0].forwarded
    with ends_of(lab, lanes, version) as ends:
        for rule in RULES:
            rule(ends)
            assert lanes.frames()[0].reserved == 0, rule.__name__
        assert lanes.companion is not None
        assert lanes.companion.lanes is not None
        before = lanes.companion.lanes.statistics().sent
        for rule in RULES:
            rule(ends)
        assert lanes.companion.lanes.statistics().sent == before
        forwarded = lanes.statistics().queues[0].forwarded - forwarded
        assert forwarded == ends.zero.statistics().forwarded == 2 * (3 + 6)


def destination(lab: Lab, version: int, port: int, **more: int) -> Destination:
    ours, theirs = (lab.server.ipv4, lab.client.ipv4) if version == 4 else (lab.server.ipv6, lab.client.ipv6)
    return Destination(lab.server.mac, lab.client.mac, (ours, VOTES), (theirs, port), **more)


@contextlib.contextmanager
def tap(lab: Lab) -> Iterator[socket.socket]:
    """All frames that reach the client, as they were on the wire."""
    with lab.client.enter(), socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.ntohs(3)) as wire:
        wire.bind((lab.client.interface, 0))
        wire.setsockopt(SOL_PACKET, PACKET_AUXDATA, 1)
        wire.settimeout(SECONDS)
        yield wire


def captured(wire: socket.socket, count: int) -> list[bytes]:
    """That many of those to port 9.  The kernel takes off a VLAN tag, and tells it beside the frame."""
    found: list[bytes] = []
    while len(found) < count:
        frame, control, _, (_, _, kind, *_) = wire.recvmsg(4096, 64)
        *_, tag, _ = struct.unpack("=IIIHHHH", control[0][2])
        parsed = Ether(frame)
        if kind != socket.PACKET_OUTGOING and UDP in parsed and parsed[UDP].dport == 9:
            found.append(frame[:12] + struct.pack("!HH", 0x8100, tag) + frame[12:] if tag else frame)
    return found


@pytest.mark.parametrize("version", [4, 6])
def test_on_the_wire(lab: Lab, lanes: XskLanes, version: int) -> None:
    """Byte by byte what scapy makes of it, from a buffer, from pieces and when it was forwarded."""
    payloads = [b"V", b"V odd", b"V even", b"V" * 1399, bytes(range(256)) * 4]
    to = destination(lab, version, 9)
    zero = ZeroCopyUDP(lanes, port=VOTES)
    network = (
        IP(src=to.source[0], dst=to.destination[0], id=0, flags="DF")
        if version == 4
        else IPv6(src=to.source[0], dst=to.destination[0], hlim=64)
    )
    expected = [
        bytes(Ether(src=lab.server.mac, dst=lab.client.mac) / network / UDP(sport=VOTES, dport=9) / payload)
        for payload in payloads
    ]
    with tap(lab) as wire:

        def seen() -> list[bytes]:
            return captured(wire, len(payloads))

        with zero.allocate(len(payloads), 1400) as buffers:
            for buffer, payload in zip(buffers, payloads, strict=True):
                buffer[: len(payload)] = payload
            assert zero.send(to, buffers, lengths=list(map(len, payloads))) == len(payloads)
        assert seen() == expected
        pieces = [[payload[:3], payload[3:100], payload[100:]] for payload in payloads]
        assert zero.send_vectored(to, pieces) == len(payloads)
        assert seen() == expected
        with client_socket(lab, version) as client:
            for payload in payloads[:-1]:
                client.sendto(payload, (server_address(lab, version), VOTES))
            client.sendto(b"V" + payloads[-1][1:], (server_address(lab, version), VOTES))
            until(lambda: lanes.statistics().lane("votes").waiting == len(payloads), "all in the ring")
            batch = lanes.receive()
            batch[len(payloads) - 1][:1] = payloads[-1][:1]
            assert zero.forward(batch, to) == len(payloads)
        assert seen() == expected


def test_longer_headers_than_it_came_with(lab: Lab, lanes: XskLanes) -> None:
    """IPv4 without a tag forwarded as IPv6 with one, and the other way; the payload does not move."""
    with ends_of(lab, lanes, 4) as ends, tap(lab) as wire:
        to = destination(lab, 6, 9, vlan=7)
        assert ends.zero.forward(ends.batch(b"V" * 100), to) == 1
        headers = Ether(src=lab.server.mac, dst=lab.client.mac) / Dot1Q(vlan=7)
        network = IPv6(src=to.source[0], dst=to.destination[0], hlim=64)
        assert captured(wire, 1) == [bytes(headers / network / UDP(sport=VOTES, dport=9) / (b"V" * 100))]
    with ends_of(lab, lanes, 6) as ends, client_socket(lab) as four:
        assert ends.zero.forward(ends.batch(b"V shorter"), destination(lab, 4, name(four)[1])) == 1
        assert four.recv(100) == b"V shorter"


def name(sock: socket.socket) -> tuple[str, int]:
    host, port = sock.getsockname()[:2]
    return host, port


def test_checksums_carried_over(lab: Lab, lanes: XskLanes) -> None:
    """What came over a wire keeps its sender's checksum under other headers: a damaged one is not mended."""
    with lab.client.enter(), socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as wire:
        wire.bind((lab.client.interface, 0))
        with ends_of(lab, lanes, 6) as ends:

            def received(payload: bytes) -> None:
                wire.send(udp_frame(lab.client, lab.server, VOTES, payload))

            received(b"V whole")
            batch = lanes.receive(timeout=SECONDS)
            assert ends.zero.forward(batch, ends.to, checksum=False) == 1
            assert ends.arrived(1) == [b"V whole"]
            received(b"V damaged")
            batch = lanes.receive(timeout=SECONDS)
            batch[0][5] ^= 1
            assert ends.zero.forward(batch, ends.to, checksum=False) == 1
            received(b"V changed")
            batch = lanes.receive(timeout=SECONDS)
            batch[0][2:] = b"CHANGED"
            assert ends.zero.forward(batch, ends.to) == 1
            assert ends.arrived(1) == [b"V CHANGED"]  # after the damaged one, which the kernel has dropped


def test_what_the_ring_has_no_room_for_stays(lab: Lab, lanes: XskLanes) -> None:
    """While the interface is down nothing leaves: the ring fills, and the rest is still the caller's."""
    with client_socket(lab) as client, lab.server.enter():
        # For the tests after this one.
        Path("/proc/sys/net/ipv6/conf/all/keep_addr_on_down").write_text("1", encoding="ascii")
        client.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 8 << 20)
        to = destination(lab, 4, name(client)[1])
        zero = ZeroCopyUDP(lanes)
        buffers = zero.allocate(5 * RING, 40)
        assert len(buffers) == 2 * RING  # all there are
        assert len(zero.allocate(1)) == 0
        assert lanes.send(to, [b"no frame left"]) == 0
        expected = [b"%040d" % number for number in range(2 * RING)]
        for buffer, payload in zip(buffers, expected, strict=True):
            buffer[:] = payload
        lab.server.run(["ip", "link", "set", lab.server.interface, "down"])
        assert zero.send(to, buffers) == RING
        assert (len(buffers), lanes.frames()[0].reserved) == (RING, RING)
        assert [one.index for one in zero.failures] == list(range(RING, 2 * RING))
        assert {one.errno for one in zero.failures} == {errno.EAGAIN}
        assert zero.send_vectored(to, [[b"no", b"room"]]) == 0
        assert zero.failures[0].errno == errno.EAGAIN
        assert [bytes(buffer) for buffer in buffers] == expected[RING:]
        lab.server.run(["ip", "link", "set", lab.server.interface, "up"])
        until(lambda: not len(buffers) or (zero.send(to, buffers), not len(buffers))[1], "room")
        assert [client.recv(100) for _ in expected] == expected
        assert zero.statistics().balanced


def test_through_the_companion_what_cannot_be_a_frame(lab: Lab, lanes: XskLanes) -> None:
    """To own addresses and neighbours nobody knows: the kernel copies, and the frames are free again."""
    with ends_of(lab, lanes, 4) as ends:
        zero = ends.zero
        own = (server_address(lab), VOTES)
        silent = (f"10.81.0.{SILENT}", 9)
        before = lanes.statistics().sent
        with zero.allocate(2, 8) as buffers:
            for number, buffer in enumerate(buffers):
                buffer[:] = b"V own %02d" % number
            assert zero.send(own, buffers) == 2
        assert zero.send_vectored(own, [[b"V", b" pieces"]]) == 1
        found: list[bytes] = []
        while len(found) < 3:
            with lanes.receive(timeout=SECONDS) as batch:
                found += map(bytes, batch)
        assert found == [b"V own 00", b"V own 01", b"V pieces"]
        assert lanes.statistics().sent == before
        assert lanes.frames()[0].reserved == 0
        # Some by frame and some through the kernel, in one call.
        fanout = Fanout([own, ends.to, silent, ends.to])
        with zero.allocate(4, 1400) as buffers:
            for number, buffer in enumerate(buffers):
                buffer[:3] = b"V %d" % number
            assert zero.send_many(fanout, buffers, lengths=3) == 4
        assert ends.arrived(2) == [b"V 1", b"V 3"]
        assert lanes.statistics().sent == before + 2
        # What came through a companion socket is forwarded, too.
        with lanes.receive(timeout=SECONDS) as batch:
            assert bytes(batch[0]) == b"V 0"
            assert zero.forward(batch, ends.to) == 1
        assert ends.arrived(1) == [b"V 0"]
        assert lanes.send(own, [b"V short", b"V" * 3000], port=VOTES) == 2
        with lanes.receive(timeout=SECONDS) as batch:
            assert len(batch) == 2
            assert zero.forward(batch, destination(lab, 4, ends.to[1])) == 1
        assert [(one.index, one.errno) for one in zero.failures] == [(1, errno.EMSGSIZE)]
        assert ends.arrived(1) == [b"V short"]
        # A received packet to all of them: by the kernel, in copies and in place.
        assert zero.forward(ends.batch(b"V all"), fanout) == 4
        assert ends.arrived(2) == [b"V all"] * 2
        with lanes.receive(timeout=SECONDS) as batch:
            assert bytes(batch[0]) == b"V all"
        assert zero.forward(ends.batch(b"V own"), own) == 1
        with lanes.receive(timeout=SECONDS) as batch:
            assert bytes(batch[0]) == b"V own"


def test_too_long(lab: Lab, lanes: XskLanes) -> None:
    """For the MTU: nothing is sent, all stays held; what is forwarded is given back and told."""
    with ends_of(lab, lanes, 4) as ends:
        zero = ends.zero
        short = destination(lab, 4, ends.to[1], mtu=576)
        before = lanes.statistics().queues[0].forward_refused
        with zero.allocate(2) as buffers:
            assert buffers.size == zero.maximum_size == 2048 - 128
            buffers[0][:] = b"l" * zero.maximum_size
            with pytest.raises(UsageError, match=r"payload 1 has 1473 bytes; 1472 fit"):
                zero.send(ends.to, buffers, lengths=[1472, 1473])
            with pytest.raises(UsageError, match="548 fit"):
                zero.send(short, buffers, lengths=[548, 549])
            with pytest.raises(UsageError, match="1920 fit"):
                zero.send_vectored(destination(lab, 4, 9, mtu=9000), [[bytes(1000), bytes(921)]])
            with pytest.raises(UsageError, match="2006 fit a frame"):
                lanes.send(destination(lab, 4, 9, mtu=9000), [bytes(2007)])
            assert len(buffers) == 2
            # Fragments, through the companion, as lanes.send_many does.
            assert zero.send_many(Fanout([ends.to] * 2), buffers, lengths=[1920, 1472]) == 2
        assert sorted(map(len, ends.arrived(2))) == [1472, 1920]
        assert zero.forward(ends.batch(b"V" * 600, b"V" * 500), short) == 1
        assert [(one.index, one.errno) for one in zero.failures] == [(0, errno.EMSGSIZE)]
        assert ends.arrived(1) == [b"V" * 500]
        assert lanes.statistics().queues[0].forward_refused == before + 1


class Frames(RuleBasedStateMachine):
    """Buffers and batches are made, sent, sent on and given back in any order."""

    lanes: ClassVar[XskLanes]
    client: ClassVar[socket.socket]
    to: ClassVar[Destination]
    server: ClassVar[str]

    def __init__(self) -> None:
        super().__init__()
        self.zero = ZeroCopyUDP(self.lanes)
        self.total = self.lanes.frames()[0].total
        self.buffers: list[Buffers] = []
        self.batches: list[Batch] = []

    @rule(count=st.integers(1, 3 * RING), size=st.integers(0, 1400))
    def allocate(self, count: int, size: int) -> None:
        made = self.zero.allocate(count, size)
        for buffer in (made[index] for index in range(0, len(made), 50)):
            buffer[:] = b"z" * size
        self.buffers.append(made)

    @precondition(lambda self: self.buffers)
    @rule(which=st.integers(0, 99), some=st.integers(0, 300))
    def send(self, which: int, some: int) -> None:
        """Some of them; whoever has none left is refused from then on."""
        buffers = self.buffers[which % len(self.buffers)]
        some = min(some, len(buffers))
        left = len(buffers)
        sent = self.zero.send(self.to, buffers, lengths=[min(buffers.size, 5)] * some)
        assert len(buffers) == left - sent
        assert sent + len(self.zero.failures) == some
        if sent and not len(buffers):
            self.buffers.remove(buffers)
            with pytest.raises(ValueError, match="were sent"):
                self.zero.send(self.to, buffers)

    @precondition(lambda self: self.buffers)
    @rule(which=st.integers(0, 99))
    def recycle(self, which: int) -> None:
        buffers = self.buffers.pop(which % len(self.buffers))
        self.zero.recycle(buffers)
        with pytest.raises(ValueError, match="were recycled"):
            self.zero.recycle(buffers)

    @rule(count=st.integers(0, 40))
    def come(self, count: int) -> None:
        for number in range(count):
            self.client.sendto(b"V%d" % number, (self.server, VOTES))
        batch = self.lanes.try_receive()
        if batch:
            self.batches.append(batch)

    @precondition(lambda self: self.batches)
    @rule(which=st.integers(0, 99), ways=st.integers(1, 12), checksum=st.booleans())
    def forward(self, which: int, ways: int, checksum: bool) -> None:
        batch = self.batches.pop(which % len(self.batches))
        count = len(batch)
        if ways == 1:
            sent = self.zero.forward(batch, self.to, checksum=checksum)
        else:
            fanout = Fanout([(self.to.destination[0], 9)] * ways)
            spread = Spread(fanout.endpoints, VOTES, 0, math.inf, [self.to] * ways)
            with pytest.MonkeyPatch.context() as patch:  # no look-up of neighbours here: where frames are
                patch.setattr(self.lanes._sender, "spread", lambda *_, **__: spread)
                sent = ZeroCopyUDP.forward(self.routed(), batch, fanout, checksum=checksum)
        assert 0 <= sent <= count * ways
        assert batch.released

    def routed(self) -> ZeroCopyUDP:
        """One that names a port, as a fan-out needs."""
        return ZeroCopyUDP(self.lanes, port=VOTES)

    @precondition(lambda self: self.batches)
    @rule(which=st.integers(0, 99), back=st.booleans())
    def release(self, which: int, back: bool) -> None:
        batch = self.batches.pop(which % len(self.batches))
        if back:
            self.lanes.send_back(batch)
        else:
            batch.release()

    @rule(count=st.integers(1, 100), vectored=st.booleans())
    def copies(self, count: int, vectored: bool) -> None:
        if vectored:
            self.zero.send_vectored(self.to, [[b"head", b"er"]] * count)
        else:
            self.lanes.send(self.to, [b"copied"] * count)

    @invariant()
    def every_frame_is_in_one_place(self) -> None:
        balanced(self.lanes)
        frames = self.lanes.frames()[0]
        assert frames.total == self.total
        assert frames.reserved == sum(map(len, self.buffers)) == self.zero.statistics().held
        assert sum(frames.application) == sum(map(len, self.batches))
        assert self.zero.statistics().balanced

    def teardown(self) -> None:
        for buffers in self.buffers:
            self.zero.recycle(buffers)
        for batch in self.batches:
            batch.release()
        while batch := self.lanes.try_receive():
            batch.release()
        assert self.lanes.flush()


def test_frames_have_one_owner(lab: Lab, lanes: XskLanes) -> None:
    """Whatever is done in whatever order, after each step all frames are somewhere, counted one by one."""
    with client_socket(lab) as client:
        Frames.lanes, Frames.client, Frames.server = lanes, client, server_address(lab)
        Frames.to = destination(lab, 4, 9)
        run_state_machine_as_test(
            Frames, settings=settings(max_examples=10, stateful_step_count=30, deadline=None)
        )
        frames = lanes.frames()[0]
        assert (frames.free, frames.kernel) == (2 * RING, frames.total - 2 * RING)
        assert lanes.statistics().queues[0].forwarded > 0


def test_closed_while_buffers_are_held(lab: Lab, lanes: XskLanes) -> None:
    """The memory stays until they are given back.  Last of all: these lanes are closed then."""
    zero = ZeroCopyUDP(lanes)
    buffers = zero.allocate(2, 100)
    lanes.close()
    buffers[1][:] = b"x" * 100
    assert bytes(buffers[1]) == b"x" * 100
    with pytest.raises(ValueError, match="closed"):
        zero.send(destination(lab, 4, 9), buffers)
    with pytest.raises(ValueError, match="closed"):
        zero.allocate(1)
    zero.recycle(buffers)
    with pytest.raises(ValueError, match="closed"):
        ZeroCopyUDP(lanes)
