# SPDX-License-Identifier: Apache-2.0
"""Frames have one owner each, and no lane can take another's: shown on the real kernel."""

from __future__ import annotations

import random
import select

import pytest

from sluice_cli.generator import Generator, Stream
from sluice_cli.lab import Lab
from sluice_cli.traffic import Template, udp_frame
from tests.cable import NICS
from tests.kernel.datapath import (
    BULK,
    SECONDS,
    VOTES,
    balanced,
    client_socket,
    collect,
    lanes_on,
    quiet,
    server_address,
    until,
)
from userspace.datagram.batch import Batch
from userspace.datagram.descriptors import LaneSpec
from userspace.datagram.destination import Destination
from userspace.datagram.xsk_lanes import XskLanes
from userspace.native._native import lib
from xdp.errors import SluiceError, UsageError
from xdp.program import SteerProgram

pytestmark = [
    pytest.mark.root,
    pytest.mark.bpf,
    pytest.mark.filterwarnings("ignore:not a bytes object:DeprecationWarning"),
]

VOTE_LANE, BULK_LANE = 0, 1


@pytest.fixture
def program(datapath_program: SteerProgram) -> SteerProgram:
    return datapath_program


def small(bulk_quota: int = 48, vote_quota: int = 64, share: float = 0.1) -> tuple[LaneSpec, ...]:
    return (
        LaneSpec(number=VOTE_LANE, name="votes", ring=64, quota=vote_quota),
        LaneSpec(number=BULK_LANE, name="bulk", ring=64, quota=bulk_quota, share=share),
    )


def template(lab: Lab, port: int) -> Template:
    return Template(udp_frame(lab.client, lab.server, port, b"x" * 64))


@pytest.mark.parametrize("run", range(3))
def test_random_operations(lab: Lab, program: SteerProgram, run: int) -> None:
    """Whatever is done in whatever order, after each step every frame is in exactly one place."""
    seed = random.SystemRandom().getrandbits(32)
    print(f"run {run}, seed {seed}")
    chance = random.Random(seed)
    to = Destination(lab.server.mac, lab.client.mac, ("10.81.0.1", VOTES), ("10.81.0.2", 9))
    held: list[Batch] = []
    sent = received = 0
    with lanes_on(program, lab, small(), transmit_ring=64, reserve=16) as lanes, client_socket(lab) as client:
        total = lanes.frames()[0].total
        for _ in range(600):
            match chance.randrange(7):
                case 0 | 1:
                    for _ in range(chance.randrange(30)):
                        client.sendto(
                            b"x" * chance.randrange(1400), (server_address(lab), chance.choice((VOTES, BULK)))
                        )
                case 2:
                    batch = lanes.try_receive(chance.randrange(1, 100))
                    received += len(batch)
                    if batch:
                        held.append(batch)
                        assert all(length <= 1400 for length in batch.lengths)
                case 3 if held:
                    held.pop(chance.randrange(len(held))).release()
                case 4 if held:
                    lanes.send_back(held.pop(chance.randrange(len(held))))
                case 5:
                    sent += lanes.send(to, [b"y" * chance.randrange(1400)] * chance.randrange(100))
                case 6 if held:
                    again = chance.choice(held)
                    assert len([bytes(view) for view in again]) == len(again)
            balanced(lanes)
            frames = lanes.frames()[0]
            assert frames.total == total
            assert frames.application[VOTE_LANE] <= 64
            assert frames.application[BULK_LANE] <= 48
            assert sum(frames.application) == sum(map(len, held))
        for batch in held:
            batch.release()
        assert lanes.flush(SECONDS)
        frames = lanes.frames()[0]
        assert (frames.kernel, frames.free, frames.transmit) == (total - 128, 128, 0)
        assert sent
        assert received
        # What the kernel has is all there, to the last frame: the rings can be filled again.
        for port in (VOTES, BULK):
            for _ in range(64):
                client.sendto(b"again", (server_address(lab), port))
        for name in ("votes", "bulk"):
            until(lambda name=name: lanes.statistics().lane(name).waiting == 64, f"64 in {name}")  # type: ignore[misc]
        # A card with zero-copy asks for more than there are here: it fills a ring of its own.
        assert NICS or all(queue.lanes[0].fill_empty == 0 for queue in lanes.statistics().queues)


def hold_everything(lanes: XskLanes, quota: int) -> list[Batch]:
    held: list[Batch] = []
    while sum(map(len, held)) < quota:
        batch = lanes.receive(16, timeout=SECONDS)
        assert batch
        held.append(batch)
    return held


def test_a_lane_at_its_quota_hurts_nobody(lab: Lab, program: SteerProgram) -> None:
    """Its application keeps all it may while it is flooded; the other lane gets every packet."""
    with lanes_on(program, lab, small(), reserve=16) as lanes, Generator(lab.client) as generator:
        generator.run(count=200, rate=100_000, templates=[template(lab, BULK)])
        held = hold_everything(lanes, 48)
        assert lanes.frames()[0].application == (0, 48)
        flood = Stream([template(lab, BULK)], rate=200_000, count=40_000)
        votes = Stream([template(lab, VOTES)], rate=2_000, count=400)
        generator.start([flood, votes])
        assert {lane for lane, _ in collect(lanes, 400)} == {VOTE_LANE}
        assert generator.wait(SECONDS).sent == 40_400
        with lanes.receive(timeout=0.05) as batch:
            assert not batch  # it holds its quota, and is not read
        statistics = lanes.statistics()
        assert statistics.lane("votes").ring_full == 0
        assert statistics.lane("bulk").waiting == 64
        assert statistics.lane("bulk").ring_full == 40_200 - 64 - 48
        assert statistics.queues[0].lanes[0].fill_empty == 0
        for batch in held:
            assert all(bytes(view) == b"x" * 64 for view in batch)
            batch.release()
        assert {lane for lane, _ in collect(lanes, 64)} == {BULK_LANE}


def test_event_loop_is_not_woken_for_a_lane_at_its_quota(lab: Lab, program: SteerProgram) -> None:
    with lanes_on(program, lab, small()) as lanes, client_socket(lab) as client, select.epoll() as loop:
        for _ in range(100):
            client.sendto(b"bulk", (server_address(lab), BULK))
        held = hold_everything(lanes, 48)
        until(lambda: lanes.statistics().lane("bulk").waiting > 0, "more than may be held")
        loop.register(lanes.fileno(), select.EPOLLIN)
        until(lambda: quiet(loop, lanes), "silence")
        client.sendto(b"vote", (server_address(lab), VOTES))
        assert loop.poll(SECONDS)
        assert collect(lanes, 1) == [(VOTE_LANE, b"vote")]
        assert not loop.poll(0)
        held.pop().release()
        assert loop.poll(0)
        for batch in held:
            batch.release()


def test_waiting_without_end_for_nothing_is_refused(lab: Lab, program: SteerProgram) -> None:
    specs = (LaneSpec(number=BULK_LANE, name="bulk", ring=64, quota=8),)
    with lanes_on(program, lab, specs) as lanes, client_socket(lab) as client:
        for _ in range(20):
            client.sendto(b"bulk", (server_address(lab), BULK))
        held = hold_everything(lanes, 8)
        with pytest.raises(UsageError, match="every lane holds"):
            lanes.receive()
        with lanes.receive(timeout=0.01) as batch:
            assert not batch
        # What was echoed counts until it is sent, and then comes back by itself.
        for batch in held:
            lanes.send_back(batch)
        assert len(collect(lanes, 12)) == 12


def test_lower_lane_gets_its_share(lab: Lab, program: SteerProgram) -> None:
    """Both lanes always full: the higher one gets the most, the lower one a tenth of every batch."""
    with lanes_on(program, lab, small(), reserve=16) as lanes, client_socket(lab) as client:

        def fill() -> None:
            for name, port in (("votes", VOTES), ("bulk", BULK)):
                for _ in range(64 - lanes.statistics().lane(name).waiting):
                    client.sendto(b"x", (server_address(lab), port))
                until(lambda name=name: lanes.statistics().lane(name).waiting == 64, name)  # type: ignore[misc]

        for maximum, rounds in ((40, 10), (1, 100)):
            got = [0, 0]
            for _ in range(rounds):
                fill()
                with lanes.receive(maximum, timeout=SECONDS) as batch:
                    assert len(batch) == maximum
                    assert list(batch.lanes) == sorted(batch.lanes)
                    for lane in batch.lanes:
                        got[lane] += 1
            whole = maximum * rounds
            assert 0.08 * whole <= got[BULK_LANE] <= 0.12 * whole, (maximum, got)
        # Nobody keeps a place free for a lane that has nothing.
        fill()
        collect(lanes, 128)
        for _ in range(40):
            client.sendto(b"x", (server_address(lab), BULK))
        until(lambda: lanes.statistics().lane("bulk").waiting == 40, "40 packets")
        with lanes.receive(40) as batch:
            assert len(batch) == 40


def test_wrong_frames_are_refused(lab: Lab, program: SteerProgram) -> None:
    """A batch that does not hold what it was given is refused whole, and breaks nothing."""
    with lanes_on(program, lab) as lanes, client_socket(lab) as client:
        for index in range(4):
            client.sendto(b"%d" % index, (server_address(lab), BULK))
        until(lambda: lanes.statistics().lane("bulk").waiting == 4, "4 packets")
        with lanes.receive() as batch:
            memory = batch.memory
            good = memory.addresses[2]
            for bad in (
                1 << 40,
                memory.addresses[1],
                good + 64 * 2048,
                lanes.frames()[0].kernel * 2048 + 4096 * 2048,
            ):
                memory.addresses[2] = bad
                with pytest.raises(SluiceError, match="giving back"):
                    lanes.take_back(memory)
                balanced(lanes)
                assert lanes.frames()[0].application == (0, 4)
            memory.addresses[2] = good
            assert [bytes(view) for view in batch] == [b"0", b"1", b"2", b"3"]
        assert lanes.frames()[0].application == (0, 0)
        memory.count = 4  # given back once more, behind everybody's back
        assert lib.sl_queue_release(memory) < 0
        balanced(lanes)


def test_dropped_batches_come_back(lab: Lab, program: SteerProgram) -> None:
    with lanes_on(program, lab) as lanes, client_socket(lab) as client:
        client.sendto(b"kept", (server_address(lab), VOTES))
        part = None
        with pytest.warns(ResourceWarning, match="never released"):
            part = lanes.receive(timeout=SECONDS)[0][1:]
        client.sendto(b"next", (server_address(lab), VOTES))
        assert collect(lanes, 1) == [(VOTE_LANE, b"next")]
        assert bytes(part) == b"ept"
        assert lanes.frames()[0].application == (1, 0)
        del part
        lanes.try_receive().release()
        assert lanes.frames()[0].application == (0, 0)


def test_generator_and_kernel_agree(lab: Lab, program: SteerProgram) -> None:
    """Under a flood without limit: received and dropped at the ring are what the program steered."""
    with lanes_on(program, lab) as lanes, Generator(lab.client) as generator:
        before = program.counters()
        generator.start(
            [Stream([template(lab, BULK)], name="flood"), Stream([template(lab, VOTES)], rate=5000)], 1.0
        )
        got = [0, 0]
        while generator.running:
            with lanes.receive(timeout=0.05) as batch:
                votes = bytes(batch.lanes).count(VOTE_LANE)
                got[VOTE_LANE] += votes
                got[BULK_LANE] += len(batch) - votes
        generator.wait(SECONDS)
        while batch := lanes.receive(timeout=0.1):
            for lane in batch.lanes:
                got[lane] += 1
            batch.release()
        batch.release()
        after = program.counters()
        for number, name in enumerate(("votes", "bulk")):
            seen = after.lanes[number].seen.packets - before.lanes[number].seen.packets
            counted = lanes.statistics().lane(name)
            assert got[number] == counted.received
            assert seen == counted.received + counted.ring_full, name
        assert lanes.statistics().lane("votes").ring_full == 0
        assert got[VOTE_LANE] > 1000
        assert got[BULK_LANE] > 10_000
