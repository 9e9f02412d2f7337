# SPDX-License-Identifier: Apache-2.0
"""Lanes under faults: applications that hold everything, interfaces that go and come, kill -9."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
from pyroute2 import IPRoute

from sluice_cli.generator import Generator, Stream
from sluice_cli.lab import Host, Lab
from sluice_cli.traffic import Template, udp_frame
from tests.traffic.served import (
    ALPHA,
    APP,
    BETA,
    DATA,
    ENVIRONMENT,
    HIGH,
    POLICY,
    SECONDS,
    Served,
    descriptors,
    packets,
    serving,
    serving_in,
    until,
    within,
)
from userspace.datagram.batch import Batch
from userspace.datagram.lanes import open_lanes
from userspace.datagram.xsk_lanes import XskLanes
from xdp.errors import BusyError, InterfaceGoneError, SluiceError, UsageError
from xdp.link import attached_program, program_name
from xdp.policy import Policy

pytestmark = [pytest.mark.root, pytest.mark.bpf]

RING, QUOTA = 64, 32
SMALL = POLICY.replace("version = 1", f"version = 1\nrings = {{ rx = {RING}, quota = {QUOTA} }}", 1)

APPLICATION = """
import json, sys
from userspace.datagram.lanes import open_lanes
from xdp.policy import Policy
lanes = open_lanes(Policy.parse(sys.argv[1]), interface=sys.argv[2], mode="native")
print(json.dumps(lanes.status()), flush=True)
while True:
    with lanes.receive():
        pass
"""


def attached(host: Host) -> tuple[int, str] | None:
    with host.enter():
        return attached_program(host.ifindex)


def link(host: Host, **change: Any) -> None:
    with IPRoute(netns=host.namespace, flags=0) as route:
        route.link("set", index=host.ifindex, **change)


def frame(lab: Lab, first: bytes, number: int = 0) -> bytes:
    return udp_frame(lab.client, lab.server, APP, first + number.to_bytes(2, "big"))


@pytest.fixture(scope="module")
def small() -> Iterator[Served]:
    """Rings of 64 packets, and 32 frames that the application may hold of each lane."""
    with serving("native", SMALL) as made:
        yield made


class TestApplicationThatHolds:
    def test_a_full_ring(self, small: Served) -> None:
        """What does not fit is counted; what fitted is read in order; then it goes on."""
        before = small.lanes.statistics().lane("data")
        small.send([frame(small.lab, BETA, number) for number in range(RING + 20)])
        until(lambda: small.lanes.statistics().lane("data").ring_full == before.ring_full + 20)
        found = small.receive(RING)
        assert [packet.payload for packet in found] == [BETA + n.to_bytes(2, "big") for n in range(RING)]
        (packet,) = small.exchange([frame(small.lab, BETA, 999)])
        assert packet.lane == DATA

    def test_a_lane_at_its_quota(self, small: Served) -> None:
        """It is not read; the others are; after a release it goes on where it stopped."""
        small.send([frame(small.lab, b"\0", number) for number in range(QUOTA + 10)])
        with holding(small.lanes, QUOTA, 8) as held:
            assert small.lanes.statistics().lane("low").held == QUOTA
            with small.lanes.receive(8, timeout=0.05) as empty:
                assert len(empty) == 0
            for number in range(3):
                small.send([frame(small.lab, ALPHA, number), frame(small.lab, BETA, number)])
                assert [packet.lane for packet in small.receive(2)] == [HIGH, DATA]
            shown = [bytes(view) for batch in held for view in batch]
            assert shown == [b"\0" + number.to_bytes(2, "big") for number in range(QUOTA)]
            held[0].release()
            found = small.receive(10)
        assert [packet.payload for packet in found] == [
            b"\0" + number.to_bytes(2, "big") for number in range(QUOTA, QUOTA + 10)
        ]

    def test_everything_is_held(self, small: Served) -> None:
        """Waiting for ever would never end: it says so; nothing breaks, and released frames come back."""
        with ExitStack() as held:
            for first in (ALPHA, BETA, b"\0"):
                small.send([frame(small.lab, first, number) for number in range(QUOTA)])
                held.enter_context(holding(small.lanes, QUOTA, 256))
            with pytest.raises(UsageError, match="every lane holds all the frames it may"):
                within(SECONDS, lambda: small.lanes.receive(timeout=None))
            (frames,) = small.lanes.frames()
            assert frames.balanced
            assert frames.application == (QUOTA, QUOTA, QUOTA)
        assert [packet.lane for packet in small.exchange([frame(small.lab, ALPHA)])] == [HIGH]
        (frames,) = small.lanes.frames()
        assert frames.application == (0, 0, 0)

    def test_more_than_all_frames_many_times_over(self, small: Served) -> None:
        """Every frame goes through the application several times and none is lost on the way."""
        (frames,) = small.lanes.frames()
        for number in range(4 * frames.total // 32):
            found = small.exchange([frame(small.lab, BETA, number)] * 32)
            assert len(found) == 32
        (after,) = small.lanes.frames()
        assert after.balanced
        assert after.total == frames.total

    def test_batches_outlive_the_lanes(self, make_lab: Callable[..., Lab]) -> None:
        lab = make_lab(static_neighbours=True)
        with serving_in(lab) as served:
            served.send([frame(lab, ALPHA, 7)])
            batch = served.lanes.receive(timeout=SECONDS)
        assert bytes(batch[0]) == ALPHA + b"\0\7"
        batch.release()
        with pytest.raises(ValueError, match="closed"):
            served.lanes.receive()


class TestInterface:
    """Not more than seconds until the application knows; no test waits for ever."""

    def test_deleted_while_waiting(self, make_lab: Callable[..., Lab]) -> None:
        lab = make_lab(static_neighbours=True)
        with lab.server.enter():
            lanes = open_lanes(Policy.parse(POLICY), interface=lab.server.interface)
        with lanes:
            waiting = threading.Event()
            caught: list[BaseException] = []

            def wait() -> None:
                waiting.set()
                try:
                    lanes.receive(timeout=None)
                except SluiceError as error:
                    caught.append(error)

            thread = threading.Thread(target=wait, daemon=True)
            thread.start()
            assert waiting.wait(SECONDS)
            with IPRoute(netns=lab.client.namespace, flags=0) as route:
                route.link("del", index=lab.client.ifindex)
            thread.join(SECONDS)
            assert not thread.is_alive(), "receive() did not notice that the interface is gone"
            assert [type(error) for error in caught] == [InterfaceGoneError]
            with pytest.raises(InterfaceGoneError):
                within(SECONDS, lambda: lanes.receive(timeout=None))
            with pytest.raises(InterfaceGoneError):
                within(SECONDS, lambda: lanes.receive(timeout=SECONDS))
            assert isinstance(lanes, XskLanes)
            assert all(frames.balanced for frames in lanes.frames())

    def test_deleted_under_flood_with_frames_held(self, make_lab: Callable[..., Lab]) -> None:
        lab = make_lab(static_neighbours=True)
        before = descriptors()
        with lab.server.enter():
            lanes = open_lanes(Policy.parse(POLICY), interface=lab.server.interface)
        with lanes, Generator(lab.client) as generator:
            generator.start([Stream([Template(frame(lab, ALPHA))])], seconds=SECONDS)
            held = lanes.receive(64, timeout=SECONDS)
            assert len(held) > 0
            with IPRoute(netns=lab.client.namespace, flags=0) as route:
                route.link("del", index=lab.client.ifindex)

            def until_gone() -> None:
                while True:
                    lanes.receive(64, timeout=SECONDS).release()

            with pytest.raises(InterfaceGoneError):
                within(SECONDS, until_gone)
            with pytest.raises(SluiceError):  # the generator's end is gone too
                generator.wait(SECONDS)
            assert {bytes(view) for view in held} == {ALPHA + bytes(2)}
            held.release()
        assert descriptors() == before

    def test_deleted_and_made_again(self, make_lab: Callable[..., Lab]) -> None:
        """Not ours any more, whatever has the name now; opening again works while the old ones are open."""
        lab = make_lab(static_neighbours=True)
        with lab.server.enter():
            old = open_lanes(Policy.parse(POLICY), interface=lab.server.interface)
            with old:
                with IPRoute() as route:
                    route.link("del", index=lab.server.ifindex)
                    route.link("add", ifname=lab.server.interface, kind="veth", peer={"ifname": "other0"})
                    for name in (lab.server.interface, "other0"):
                        route.link("set", index=route.link_lookup(ifname=name)[0], state="up")
                with pytest.raises(InterfaceGoneError):
                    within(SECONDS, lambda: old.receive(timeout=None))
            with open_lanes(Policy.parse(POLICY), interface=lab.server.interface) as new:
                assert new.mode == "native-copy"
                new.try_receive().release()

    def test_down_and_up(self, make_lab: Callable[..., Lab]) -> None:
        """Nothing comes while it is down, and no error; then it goes on."""
        with serving_in(make_lab(static_neighbours=True)) as served:
            lab = served.lab
            served.exchange([frame(lab, ALPHA)])
            for _ in range(2):
                link(lab.server, state="down")
                with within(SECONDS, lambda: served.lanes.receive(timeout=0.2)) as batch:
                    assert len(batch) == 0
                link(lab.server, state="up")
                found = until(lambda: _sent_and_received(served), "packets after the interface is up again")
                assert {packet.lane for packet in found} == {HIGH}
            assert attached(lab.server) is not None

    def test_renamed(self, make_lab: Callable[..., Lab]) -> None:
        with serving_in(make_lab(static_neighbours=True)) as served:
            lab = served.lab
            served.exchange([frame(lab, ALPHA)])
            link(lab.server, state="down")
            link(lab.server, ifname="renamed0")
            link(lab.server, state="up")
            try:
                found = until(lambda: _sent_and_received(served), "packets after the interface was renamed")
                assert {packet.lane for packet in found} == {HIGH}
                # By its old name nobody finds a way any more: an error, and not another interface.
                with lab.server.enter(), pytest.raises(SluiceError, match=r"srv0"):
                    served.lanes.send((str(lab.client.ipv4), 9), [b"x"], port=APP)
                with served.lanes.receive(timeout=0.05) as batch:
                    assert len(batch) == 0
            finally:
                link(lab.server, state="down")
                link(lab.server, ifname="srv0")
                link(lab.server, state="up")

    def test_that_is_down_at_the_start(self, make_lab: Callable[..., Lab]) -> None:
        """Lanes open, and packets come when it is up."""
        lab = make_lab(static_neighbours=True)
        link(lab.server, state="down")
        with serving_in(lab) as served:
            with within(SECONDS, lambda: served.lanes.receive(timeout=0.1)) as batch:
                assert len(batch) == 0
            link(lab.server, state="up")
            found = until(lambda: _sent_and_received(served), "packets once the interface is up")
            assert {packet.lane for packet in found} == {HIGH}

    def test_that_does_not_exist(self) -> None:
        with pytest.raises(UsageError, match="no interface 'none0'"):
            open_lanes(Policy.parse(POLICY), interface="none0")


def _unloaded(program: int) -> None:
    until(lambda: program_name(program) == "?", f"program {program} is unloaded")


@contextmanager
def holding(lanes: XskLanes, count: int, maximum: int) -> Iterator[list[Batch]]:
    """Batches with ``count`` packets in all; released at the end, if they were not before."""
    held: list[Batch] = []
    try:
        while sum(map(len, held)) < count:
            held.append(lanes.receive(maximum, timeout=SECONDS))
            assert len(held[-1]) > 0, f"only {sum(map(len, held))} of {count} packets were to be had"
        assert sum(map(len, held)) == count
        yield held
    finally:
        for batch in held:
            if not batch.released:
                batch.release()


def _sent_and_received(served: Served) -> list[Any]:
    served.send([frame(served.lab, ALPHA)])
    with served.lanes.receive(timeout=0.1) as batch:
        return packets(batch)


class TestOthers:
    def test_a_second_start(self, make_lab: Callable[..., Lab]) -> None:
        """Refused, naming the owner; the first goes on; afterwards it works at once."""
        lab = make_lab(static_neighbours=True)
        with serving_in(lab) as served:
            program = attached(lab.server)
            assert program is not None
            before = descriptors()
            with lab.server.enter():
                with pytest.raises(BusyError, match=rf"owned by process {os.getpid()}") as refused:
                    open_lanes(Policy.parse(POLICY), interface=lab.server.interface)
                assert refused.value.hint
                with pytest.raises(BusyError, match=rf"owned by process {os.getpid()}"):
                    open_lanes(Policy.parse(POLICY), interface=lab.server.interface, mode="generic")
            assert descriptors() == before
            assert attached(lab.server) == program
            assert [packet.lane for packet in served.exchange([frame(lab, ALPHA)])] == [HIGH]
        assert attached(lab.server) is None
        with serving_in(lab) as served:
            assert [packet.lane for packet in served.exchange([frame(lab, ALPHA)])] == [HIGH]

    @pytest.mark.parametrize("mode", ["auto", "native", "generic"])
    def test_a_foreign_program(self, make_lab: Callable[..., Lab], mode: Any) -> None:
        """Not ours to remove, in no mode; `auto` does not go around it."""
        lab = make_lab(static_neighbours=True)
        lab.server.attach_pass()
        foreign = attached(lab.server)
        assert foreign is not None
        before = descriptors()
        with lab.server.enter(), pytest.raises(BusyError, match=rf"program {foreign[0]} \(lab_pass, native"):
            open_lanes(Policy.parse(POLICY), interface=lab.server.interface, mode=mode)
        assert attached(lab.server) == foreign
        assert descriptors() == before

    def test_killed(self, make_lab: Callable[..., Lab]) -> None:
        """SIGKILL under flood: the program goes, nothing is left, the next start works at once."""
        lab = make_lab(static_neighbours=True)
        process = lab.server.popen(
            [sys.executable, "-c", APPLICATION, POLICY, lab.server.interface],
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
        )
        assert process.stdout is not None
        with process.stdout as said, Generator(lab.client) as generator:
            assert json.loads(said.readline())["mode"] == "native-copy"
            program = attached(lab.server)
            assert program is not None
            assert program_name(program[0]) == "sluice_steer"
            generator.start([Stream([Template(frame(lab, b"\0"))], rate=100_000)], seconds=SECONDS)
            until(lambda: generator.result().sent > 1000)
            process.send_signal(signal.SIGKILL)
            assert process.wait(SECONDS) == -signal.SIGKILL
            # The kernel tears down in the background; how long it takes is its business.
            until(lambda: attached(lab.server) is None, "the program is off the interface")
            _unloaded(program[0])
            with serving_in(lab) as served:
                served.receive_some()
                generator.stop()
                generator.wait(SECONDS)
                served.drain()
                assert [packet.lane for packet in served.exchange([frame(lab, ALPHA)])] == [HIGH]
            with lab.server.enter(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as free:
                free.bind(("", APP))  # companion sockets went with the process


def test_nothing_leaks(make_lab: Callable[..., Lab]) -> None:
    """Open and close, with traffic, in both modes: the same descriptors and programs as before."""
    lab = make_lab(static_neighbours=True)
    with serving_in(lab):  # imports and caches
        pass
    before = descriptors()
    for mode in ("native", "generic"):
        with serving_in(lab, mode) as served:
            served.exchange([frame(lab, ALPHA), frame(lab, BETA)])
            with lab.server.enter():
                assert served.lanes.send((str(lab.client.ipv4), 9), [b"x"], port=APP) == 1
            program = attached(lab.server)
            assert program is not None
        assert descriptors() == before
        assert attached(lab.server) is None
        _unloaded(program[0])
