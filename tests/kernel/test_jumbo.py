# SPDX-License-Identifier: Apache-2.0
"""Jumbo frames: packets in several frames, received whole, in their lanes, with every frame accounted for."""

from __future__ import annotations

import asyncio
import errno
import random
import threading
from array import array
from collections.abc import Iterator
from ipaddress import IPv4Address, ip_address
from typing import Any

import pytest

from sluice_cli.lab import Lab
from tests.kernel.datapath import (
    BULK,
    POLICY,
    SECONDS,
    VOTES,
    balanced,
    client_socket,
    collect,
    lanes_on,
    server_address,
    until,
)
from userspace.datagram import jumbo as chosen
from userspace.datagram.aio import AsyncLanes
from userspace.datagram.batch import Batch
from userspace.datagram.companion import Companion
from userspace.datagram.descriptors import JUMBO_FRAMES, LaneSpec
from userspace.datagram.destination import Destination
from userspace.datagram.fanout import Fanout
from userspace.datagram.lanes import open_lanes
from userspace.datagram.owner import Owner
from userspace.datagram.xsk_lanes import XskLanes
from userspace.datagram.xsk_send import FrameTooSmallError
from userspace.datagram.zero_copy import ZeroCopyUDP
from xdp.errors import UnsupportedError, UsageError
from xdp.jumbo import ETHERNET_AND_TAGS, longest_packet
from xdp.policy import Policy
from xdp.policy_model import Rings
from xdp.program import SteerProgram
from xdp.tables import compile_policy

pytestmark = [pytest.mark.root, pytest.mark.bpf, pytest.mark.feature("AF_XDP jumbo frames")]

MTU = 9000
LONGEST = MTU + ETHERNET_AND_TAGS
FRAME_ROOM = 2048 - 256
#: Payloads around the boundaries of one, two and five frames (42 and 62 bytes of headers), and the longest.
SIZES = (1, 64, 1729, 1730, 1731, 1749, 1750, 1751, 3541, 3542, 3543, 5000, 8900, 8917, 8918, 8919, MTU - 48)
VOTE_LANE, BULK_LANE = 0, 1


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab(mtu=MTU, static_neighbours=True) as made:
        yield made


@pytest.fixture(scope="module")
def program() -> Iterator[SteerProgram]:
    with SteerProgram.load(frags=True) as loaded:
        loaded.swap(compile_policy(Policy.parse(POLICY)))
        yield loaded


def small(ring: int = JUMBO_FRAMES, quota: int = JUMBO_FRAMES) -> list[LaneSpec]:
    return [
        LaneSpec(number=VOTE_LANE, name="votes", ring=ring, quota=quota),
        LaneSpec(number=BULK_LANE, name="bulk", ring=ring, quota=quota),
    ]


def frames_of(payload: int, version: int = 4) -> int:
    """Frames that a packet of so many payload bytes takes in copy mode."""
    return -(-(payload + (42 if version == 4 else 62)) // FRAME_ROOM)


def pattern(number: int, size: int) -> bytes:
    """No two packets, and no two places of one, are alike."""
    return random.Random(number).randbytes(size)


@pytest.mark.parametrize("mode", ["native-copy", "generic-copy"])
def test_all_sizes_in_both_families(lab: Lab, program: SteerProgram, mode: Any) -> None:
    """Intact, in their lanes, with sources and fields; the counters of program, lanes and frames agree."""
    sent: dict[tuple[int, int], list[bytes]] = {}
    before = program.counters()
    with lanes_on(program, lab, mode=mode, longest=LONGEST) as lanes:
        total = jumbo = 0
        for version in (4, 6):
            with client_socket(lab, version) as client:
                for number, size in enumerate(SIZES):
                    for port in (VOTES, BULK):
                        payload = pattern(number * 100 + version + port, size)
                        client.sendto(payload, (server_address(lab, version), port))
                        sent.setdefault((port - VOTES, version), []).append(payload)
                        total += len(payload) + (42 if version == 4 else 62)
                        jumbo += frames_of(size, version) > 1
        found: dict[tuple[int, int], list[bytes]] = {}
        senders = {ip_address(str(host)) for host in (lab.client.ipv4, lab.client.ipv6)}
        count = 4 * len(SIZES)
        while count:
            with lanes.receive(timeout=SECONDS) as batch:
                assert batch
                count -= len(batch)
                fields = list(batch.gather(1, 4))
                starts = [
                    offset + length for offset, length in zip(batch.offsets, batch.lengths, strict=True)
                ]
                assert max(starts) <= len(batch.data)
                for index, (lane, view) in enumerate(zip(batch.lanes, batch, strict=True)):
                    source, _ = batch.source(index)
                    assert source in senders
                    version = 4 if isinstance(source, IPv4Address) else 6
                    payload = bytes(view)
                    found.setdefault((lane, version), []).append(payload)
                    assert fields[index] == (int.from_bytes(payload[1:5], "big") if len(payload) > 4 else 0)
                held = lanes.frames()[0].application
                assert sum(held) == sum(
                    frames_of(length, 4 if isinstance(batch.source(index)[0], IPv4Address) else 6)
                    for index, length in enumerate(batch.lengths)
                )
        assert found == sent
        statistics = lanes.statistics()
        assert sum(lane.received_bytes for lane in statistics.queues[0].lanes) == total
        assert sum(lane.jumbo for lane in statistics.queues[0].lanes) == jumbo
        assert all(
            lane.too_long == lane.dropped == lane.ring_full == 0 for lane in statistics.queues[0].lanes
        )
        after = program.counters()
        assert after.balanced
        steered = [counted.totals["steered"] for counted in (before, after)]
        assert steered[1].packets - steered[0].packets == 4 * len(SIZES)
        assert steered[1].bytes - steered[0].bytes == total


def test_random_operations(lab: Lab, program: SteerProgram) -> None:
    """Small rings and quotas: after each step every frame is in one place, and no packet is changed."""
    seed = random.SystemRandom().getrandbits(32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    held: list[Batch] = []
    received = 0
    with (
        lanes_on(program, lab, small(), longest=LONGEST, transmit_ring=64, reserve=16) as lanes,
        client_socket(lab) as client,
    ):
        fresh = lanes.frames()[0]
        for _ in range(250):
            match chance.randrange(5):
                case 0 | 1:
                    for _ in range(chance.randrange(15)):
                        size = chance.choice((20, chance.randrange(12, 8900)))
                        body = bytes([chance.randrange(256)]) * (size - 4)
                        client.sendto(
                            size.to_bytes(4, "big") + body,
                            (server_address(lab), chance.choice((VOTES, BULK))),
                        )
                case 2:
                    batch = lanes.try_receive(chance.randrange(1, 40))
                    received += len(batch)
                    if batch:
                        held.append(batch)
                case 3 if held:
                    held.pop(chance.randrange(len(held))).release()
                case 4 if held:
                    lanes.send_back(held.pop(chance.randrange(len(held))))
            balanced(lanes)
            frames = lanes.frames()[0]
            assert max(frames.application) <= JUMBO_FRAMES
            assert sum(frames.application) == sum(
                frames_of(length) for batch in held for length in batch.lengths
            )
            for batch in held:
                for view in batch:
                    assert int.from_bytes(view[:4], "big") == len(view)
                    assert view[4:].tobytes() == view[4:5].tobytes() * (len(view) - 4)
        for batch in held:
            batch.release()
        assert lanes.flush(SECONDS)
        assert received
        while batch := lanes.try_receive():
            batch.release()
        assert lanes.frames()[0] == fresh
        assert all(queue.lanes[0].fill_empty == 0 for queue in lanes.statistics().queues)


def test_a_flood_of_the_longest_hurts_nobody(lab: Lab, program: SteerProgram) -> None:
    """The low lane's application keeps all it may; the high lane gets every packet, small and jumbo."""
    with (
        lanes_on(program, lab, small(), longest=LONGEST, reserve=16) as lanes,
        client_socket(lab) as client,
        client_socket(lab) as other,
    ):
        host = server_address(lab)
        flood = b"x" * 8900
        each = frames_of(len(flood))
        count = 0
        held: list[Batch] = []
        while sum(map(len, held)) < JUMBO_FRAMES // each:
            client.sendto(flood, (host, BULK))
            count += 1
            held.append(lanes.receive(timeout=SECONDS))
        assert lanes.frames()[0].application == (0, JUMBO_FRAMES // each * each)
        ended = threading.Event()
        sent = 0

        def pour() -> None:
            nonlocal sent
            while not ended.is_set():
                client.sendto(flood, (host, BULK))
                sent += 1

        thread = threading.Thread(target=pour)
        thread.start()
        try:
            until(lambda: lanes.statistics().lane("bulk").ring_full > 100, "the ring is full")
            votes = [pattern(number, (100, 8900)[number % 2]) for number in range(200)]
            for start in range(0, len(votes), 8):
                for vote in votes[start : start + 8]:
                    other.sendto(vote, (host, VOTES))
                assert sorted(collect(lanes, 8)) == sorted(
                    (VOTE_LANE, vote) for vote in votes[start : start + 8]
                )
        finally:
            ended.set()
            thread.join()
        statistics = lanes.statistics()
        bulk = statistics.lane("bulk")
        assert statistics.lane("votes").ring_full == statistics.lane("votes").fill_empty == 0
        assert bulk.dropped == 0
        assert bulk.received == count
        # Full: the next one would not have fitted.
        assert JUMBO_FRAMES - each < bulk.waiting <= JUMBO_FRAMES
        assert bulk.ring_full == sent - bulk.waiting // each
        for batch in held:
            assert all(bytes(view) == flood for view in batch)
            batch.release()
        assert [payload for _, payload in collect(lanes, bulk.waiting // each)] == [flood] * (
            bulk.waiting // each
        )


def test_the_longest_that_was_asked_for(lab: Lab, program: SteerProgram) -> None:
    """Longer ones are discarded and counted, and hold nothing up."""
    with lanes_on(program, lab, small(), longest=5000) as lanes, client_socket(lab) as client:
        for size in (5000 - 42, 5000 - 41, 8900, 10):
            client.sendto(bytes(size), (server_address(lab), BULK))
        assert [len(payload) for _, payload in collect(lanes, 2)] == [5000 - 42, 10]
        assert lanes.statistics().lane("bulk").too_long == 2


def test_sent_back_are_only_those_in_one_frame(lab: Lab, program: SteerProgram) -> None:
    with lanes_on(program, lab, longest=LONGEST) as lanes, client_socket(lab) as client:
        for size in (100, 8900, 1700, 3000):
            client.sendto(bytes(size), (server_address(lab), VOTES))
        until(lambda: lanes.statistics().lane("votes").waiting == 9, "all in the ring")
        batch = lanes.receive()
        assert len(batch) == 4
        assert lanes.send_back(batch) == 2
        assert sorted(len(client.recv(9000)) for _ in range(2)) == [100, 1700]
        assert lanes.flush(SECONDS)
        queue = lanes.statistics().queues[0]
        assert (queue.echoed, queue.echo_refused, queue.frames.application) == (2, 2, (0, 0))


def test_sent_back_in_pieces(lab: Lab, program: SteerProgram) -> None:
    """A batch larger than the transmit ring goes in parts, which know what came in several frames."""
    sizes = [100 if number % 10 else 5000 for number in range(100)]
    with (
        lanes_on(program, lab, small(256, 256), longest=LONGEST, transmit_ring=64) as lanes,
        client_socket(lab) as client,
    ):
        for size in sizes:
            client.sendto(bytes(size), (server_address(lab), VOTES))
        until(
            lambda: lanes.statistics().lane("votes").waiting == sum(map(frames_of, sizes)), "all in the ring"
        )
        batch = lanes.receive()
        assert list(batch.lengths) == sizes
        assert asyncio.run(AsyncLanes(lanes).send_back(batch)) == 90
        assert {len(client.recv(9000)) for _ in range(90)} == {100}
        assert lanes.flush(SECONDS)
        queue = lanes.statistics().queues[0]
        assert (queue.echo_refused, queue.transmit_invalid, queue.frames.application) == (10, 0, (0, 0))


def test_a_batch_outlives_its_lanes(lab: Lab, program: SteerProgram) -> None:
    with lanes_on(program, lab, longest=LONGEST) as lanes, client_socket(lab) as client:
        payload = pattern(1, 8900)
        client.sendto(payload, (server_address(lab), VOTES))
        batch = lanes.receive(timeout=SECONDS)
    assert bytes(batch[0]) == payload
    batch.release()


# what the owner of an interface makes of policy, MTU and kernel


def check_sending(lab: Lab, lanes: XskLanes) -> None:
    """What fits the MTU but no frame leaves through the companion socket."""
    with client_socket(lab) as client, lab.server.enter():
        to = client.getsockname()
        ways = 0

        def by_frame() -> bool:
            nonlocal ways
            ways += lanes.send(to, [b"way"], port=VOTES)
            return lanes.statistics().sent > 0

        until(by_frame, "a frame")  # once the router knows the way
        assert {client.recv(9000) for _ in range(ways)} == {b"way"}
        frames = lanes.statistics().sent
        payload = pattern(5, 8000)
        assert lanes.send(to, [payload, b"short"], port=VOTES) == 2
        assert [client.recv(9000) for _ in range(2)] == [payload, b"short"]
        assert lanes.statistics().sent == frames
        starts, sizes = array("I", [0]), array("I", [len(payload)])
        assert lanes.send_columns(to, payload, starts, sizes, port=VOTES) == 1
        assert client.recv(9000) == payload
        assert lanes.send_many(Fanout([to]), [payload], port=VOTES) == 1
        assert client.recv(9000) == payload
        # Headers that the caller made have no socket to go by.
        made = Destination(
            lab.server.mac,
            lab.client.mac,
            (str(lab.server.ipv4), VOTES),
            (str(lab.client.ipv4), to[1]),
            mtu=MTU,
        )
        with pytest.raises(FrameTooSmallError, match="8000 bytes; 2006 fit a frame"):
            lanes.send(made, [payload])
        assert lanes.send(made, [payload[:2006]]) == 1
        assert client.recv(9000) == payload[:2006]
        # Pieces likewise; a packet in several frames is sent on as a copy where that fits a frame.
        zero = ZeroCopyUDP(lanes, port=VOTES)
        assert zero.send_vectored(to, [[payload[:3000], payload[3000:]]]) == 1
        assert client.recv(9000) == payload
        with pytest.raises(FrameTooSmallError, match="8000 bytes; 1920 fit"):
            zero.send_vectored(made, [[payload]])
        refused = lanes.statistics().queues[0].forward_refused
        for one in (payload[:2000], payload):
            client.sendto(one, (server_address(lab), VOTES))
            with lanes.receive(timeout=SECONDS) as batch:
                assert bytes(batch[0]) == one
                assert zero.forward(batch, made) == (one != payload)
            balanced(lanes)
        assert client.recv(9000) == payload[:2000]
        assert [(failed.index, failed.errno) for failed in zero.failures] == [(0, errno.EMSGSIZE)]
        assert lanes.statistics().queues[0].forward_refused == refused + 1


def test_without_them_all_is_as_before(lab: Lab) -> None:
    """veth takes no native program then, and what fits no frame is dropped by the socket, and counted."""
    with lab.server.enter():
        policy = Policy.parse("rings = { jumbo = false }\n" + POLICY)
        lanes = open_lanes(policy, interface=lab.server.interface)
    with lanes, client_socket(lab) as client:
        assert isinstance(lanes, XskLanes)
        assert (lanes.mode, lanes.status()["longest_packet"]) == ("generic-copy", 0)
        for size in (8900, 10):
            client.sendto(bytes(size), (server_address(lab), BULK))
        assert [len(payload) for _, payload in collect(lanes, 1)] == [10]
        assert lanes.statistics().lane("bulk").dropped == 1


def test_an_owner(lab: Lab) -> None:
    """The MTU asks for jumbo frames by itself; they stay through upgrades, and a reload can't change that."""
    told: list[str] = []
    with lab.server.enter():
        owner = Owner.open(lab.server.interface, Policy.parse(POLICY), notify=told.append)
    with owner:
        lease = owner.lend()
        companion = Companion.adopt(owner.policy, lease.descriptors.take_companions())
        lease.start()
        with XskLanes(lease.descriptors, companion=companion) as lanes:
            assert (lanes.mode, lanes.status()["longest_packet"]) == ("native-copy", LONGEST)
            check_sending(lab, lanes)
            owner.upgrade()
            assert owner.program.frags
            with client_socket(lab) as client:
                client.sendto(bytes(8900), (server_address(lab), BULK))
                assert [len(payload) for _, payload in collect(lanes, 1)] == [8900]
        owner.take_back(lease)
        assert told == []
        owner.reload(Policy.parse("rings = { jumbo = false }\n" + POLICY))
        assert len(told) == 1
        assert "next start" in told[0]
        owner.reload(Policy.parse("rings = { jumbo = true }\n" + POLICY))
        assert len(told) == 1
        lease = owner.lend()
        assert lease.descriptors.geometry.longest == 9216 + ETHERNET_AND_TAGS
        owner.take_back(lease)


def test_what_is_chosen(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    assert longest_packet(Rings(), MTU) == LONGEST
    assert longest_packet(Rings(), FRAME_ROOM - ETHERNET_AND_TAGS) == 0
    assert longest_packet(Rings(frame_size=4096), 3800) == 0
    assert longest_packet(Rings(frame_size=4096), 3900) == 3900 + ETHERNET_AND_TAGS
    assert longest_packet(Rings(jumbo=False), MTU) == 0
    assert longest_packet(Rings(jumbo=True), 1500) == 9216 + ETHERNET_AND_TAGS
    told: list[str] = []
    with lab.server.enter():
        few = small(quota=8)
        assert chosen.choose(lab.server.interface, Rings(), few, told.append) == 0
        assert len(told) == 1
        assert f"both are at least {JUMBO_FRAMES}" in told[0]
        with pytest.raises(UsageError, match=f"both are at least {JUMBO_FRAMES}"):
            chosen.choose(lab.server.interface, Rings(jumbo=True), few)
        # This kernel has them; what another one says is the one thing that can't be asked for here.
        monkeypatch.setattr("xdp.jumbo.kernel_refusal", lambda: "AF_XDP takes none")
        assert chosen.choose(lab.server.interface, Rings(), small(), told.append) == 0
        assert "MTU of 9000, but packets above 1792 bytes can't be steered: AF_XDP takes none" in told[1]
        with pytest.raises(UnsupportedError, match="requires jumbo frames: AF_XDP takes none"):
            chosen.choose(lab.server.interface, Rings(jumbo=True), small())
