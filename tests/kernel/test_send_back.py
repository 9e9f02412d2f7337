# SPDX-License-Identifier: Apache-2.0
"""One contract of send_back over all backends: mmsg, portable, AF_XDP, and the companions of AF_XDP."""

from __future__ import annotations

import contextlib
import random
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import pytest

from sluice_cli.lab import Host, Lab
from tests.cable import NATIVE
from tests.kernel.datapath import SECONDS, attached, client_socket, open_on, server_address
from userspace.datagram.batch import Batch
from userspace.datagram.companion import Companion
from userspace.datagram.descriptors import Mode
from userspace.datagram.lanes import Lanes, open_lanes
from userspace.datagram.mmsg import MmsgLanes
from userspace.datagram.opening import Wanted, lane_specs
from userspace.datagram.portable import PortableLanes
from userspace.datagram.sockets import open_service_sockets
from userspace.datagram.xsk_lanes import XskLanes
from xdp.errors import UsageError
from xdp.policy import Policy
from xdp.program import SteerProgram
from xdp.tables import compile_policy

pytestmark = [
    pytest.mark.root,
    pytest.mark.bpf,
    pytest.mark.filterwarnings("ignore:not a bytes object:DeprecationWarning"),
]

PORTS = (8001, 8002, 8003, 8004)
SEED = 5
AT_ONCE = 24  # datagrams; a veth queue holds 256 packets, and these may be fragments

POLICY = f"""
version = 1
[[lane]]
name = "votes"
[[lane]]
name = "server"
end = "kernel"
[[lane]]
name = "bulk"
[[service]]
name = "all"
ports = {list(PORTS)}
[[service.kind]]
name = "vote"
match = [{{ offset = 0, mask = "ff", value = "56" }}]
[[service.rule]]
kind = "vote"
action = "lane"
lane = "votes"
[[service.rule]]
action = "lane"
lane = "bulk"
"""


@dataclass
class Served:
    """Lanes on the server, and how long payloads must be to come by the way that is tested."""

    lab: Lab
    lanes: Lanes
    length: int

    def payload(self, number: int) -> bytes:
        """Every other one is a vote."""
        return (b"V" if number % 2 else b"b") + (b" %d " % number) + bytes(self.length)

    def receive(self, maximum: int = 256) -> Batch:
        """A batch that came by that way, and is not empty."""
        batch = self.lanes.receive(maximum, timeout=SECONDS)
        assert batch, self.lanes.statistics()
        by_kernel = not isinstance(batch.backend, XskLanes)
        assert by_kernel == (self.length > 1500 or isinstance(self.lanes, (MmsgLanes, PortableLanes)))
        return batch

    def held(self) -> int:
        """Frames that the application holds, by all the ways."""
        lanes = self.lanes
        if isinstance(lanes, (MmsgLanes, PortableLanes)):
            return lanes.census()["held"]
        assert isinstance(lanes, XskLanes)
        held = sum(sum(frames.application) for frames in lanes.frames())
        if lanes.companion is not None and lanes.companion.lanes is not None:
            held += lanes.companion.lanes.census()["held"]
        return held


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """One for all; the lanes are each test's own."""
    with Lab() as made:
        yield made


@pytest.fixture(scope="module")
def program() -> Iterator[SteerProgram]:
    with SteerProgram.load() as loaded:
        loaded.swap(compile_policy(Policy.parse(POLICY)))
        yield loaded


@contextlib.contextmanager
def over_xdp(program: SteerProgram, host: Host, mode: Mode) -> Iterator[Lanes]:
    """As open_lanes does it, with a program that is loaded already."""
    policy = Policy.parse(POLICY)
    with attached(program, host, mode):
        descriptors = open_on(program, host, lane_specs(policy), mode=mode)
        with host.enter():
            companion = Companion.open(policy)
        with XskLanes(descriptors, companion=companion) as lanes:
            yield lanes


@pytest.fixture(params=["mmsg", "portable", NATIVE, "generic-copy", "companion"])
def served(request: pytest.FixtureRequest, lab: Lab, program: SteerProgram) -> Iterator[Served]:
    name: str = request.param
    with contextlib.ExitStack() as stack:
        lanes: Lanes
        if name in {"mmsg", "portable"}:
            with lab.server.enter():
                lanes = stack.enter_context(open_lanes(Policy.parse(POLICY), mode=cast("Wanted", name)))
        else:
            mode = cast("Mode", NATIVE if name == "companion" else name)
            lanes = stack.enter_context(over_xdp(program, lab.server, mode))
        # What is longer than the link's packets comes in fragments, which only the kernel puts together.
        yield Served(lab, lanes, 3000 if name == "companion" else 20)


@pytest.mark.parametrize("version", [4, 6])
def test_each_answer_leaves_from_the_port_it_came_to(served: Served, version: int) -> None:
    """Ports, senders and lanes mixed; the client's sockets are connected, so another source is not heard."""
    host = server_address(served.lab, version)
    clients: list[tuple[int, socket.socket]] = []
    try:
        for port in PORTS * 2:
            client = client_socket(served.lab, version)
            client.connect((host, port))
            clients.append((port, client))
        order = [number for number in range(len(clients)) for _ in range(12)]
        random.Random(SEED).shuffle(order)
        expected: dict[int, list[bytes]] = {number: [] for number in range(len(clients))}
        for start in range(0, len(order), AT_ONCE):
            for index, number in enumerate(order[start : start + AT_ONCE], start):
                payload = served.payload(index)
                clients[number][1].send(payload)
                expected[number].append(payload[:1] + b"!" + payload[2:])
            answered = 0
            while answered < AT_ONCE:
                with served.receive() as batch:
                    for view in batch:
                        view[1:2] = b"!"
                    count = len(batch)
                    assert served.lanes.send_back(batch) == count
                    assert batch.released
                    answered += count
        for number, (_, client) in enumerate(clients):
            assert sorted(client.recv(9000) for _ in expected[number]) == sorted(expected[number])
            client.settimeout(0)
            with pytest.raises(BlockingIOError):
                client.recv(9000)
    finally:
        for _, client in clients:
            client.close()


@pytest.fixture
def one(served: Served) -> Iterator[tuple[Served, socket.socket]]:
    """A client that has sent one datagram."""
    with client_socket(served.lab) as client:
        client.connect((server_address(served.lab), PORTS[1]))
        client.send(served.payload(1))
        yield served, client


def test_the_batch_is_used_up(one: tuple[Served, socket.socket]) -> None:
    served, client = one
    batch = served.receive()
    view, column = batch[0], batch.lanes
    assert served.held() == 1
    assert served.lanes.send_back(batch) == 1
    assert batch.released
    for gone in (view, column):
        with pytest.raises(ValueError, match="released"):
            bytes(gone)
    with pytest.raises(ValueError, match="given back"):
        batch.release()
    with pytest.raises(ValueError, match="given back"):
        served.lanes.send_back(batch)
    assert served.held() == 0
    assert client.recv(9000) == served.payload(1)


def test_a_batch_in_use_is_not_sent(one: tuple[Served, socket.socket]) -> None:
    served, client = one
    batch = served.receive()
    part = batch[0][1:]
    with pytest.raises(BufferError, match="packet 0"):
        served.lanes.send_back(batch)
    assert not batch.released
    assert served.held() == 1
    part.release()
    del part
    assert served.lanes.send_back(batch) == 1
    assert client.recv(9000) == served.payload(1)
    client.settimeout(0)
    with pytest.raises(BlockingIOError):
        client.recv(9000)


def test_an_empty_batch(served: Served) -> None:
    """try_receive's, when nothing is there."""
    batch = served.lanes.try_receive()
    assert served.lanes.send_back(batch) == 0
    assert batch.released


def test_a_batch_of_other_lanes_stays_held(one: tuple[Served, socket.socket]) -> None:
    served, client = one
    policy = Policy.parse(POLICY)
    with served.lab.server.enter():
        mmsg = MmsgLanes(policy, open_service_sockets([9001]))
        portable = PortableLanes(policy, open_service_sockets([9002]))
    with served.receive() as batch, mmsg, portable:
        for other in (mmsg, portable):
            with pytest.raises(UsageError, match="came from"):
                other.send_back(batch)
            assert not batch.released
        with pytest.raises(UsageError, match="came from"):
            served.lanes.send_back(Batch(mmsg, None, 0))
        assert served.lanes.send_back(batch) == 1
    assert client.recv(9000) == served.payload(1)


def test_after_close(one: tuple[Served, socket.socket]) -> None:
    served, client = one
    batch = served.receive()
    served.lanes.close()
    with pytest.raises(ValueError, match="closed"):
        served.lanes.send_back(batch)
    assert batch.released
    client.settimeout(0)
    with pytest.raises(BlockingIOError):
        client.recv(9000)


def test_frames_do_not_run_out(served: Served) -> None:
    """Many more than there are frames, one after the other."""
    with client_socket(served.lab) as client:
        client.connect((server_address(served.lab), PORTS[2]))
        for number in range(3000 if served.length < 1500 else 300):
            client.send(served.payload(number))
            with served.receive() as batch:
                assert served.lanes.send_back(batch) == 1
            assert client.recv(9000) == served.payload(number)
    assert served.held() == 0


def test_lanes_by_number(one: tuple[Served, socket.socket]) -> None:
    """Names for the numbers in the column, highest first; over AF_XDP those that end in a socket."""
    served, _ = one
    numbers = [lane.number for lane in served.lanes.lanes]
    assert numbers == sorted(numbers)
    names = {lane.number: lane.name for lane in served.lanes.lanes}
    everything = {0: "votes", 1: "server", 2: "bulk"}
    if isinstance(served.lanes, XskLanes):
        del everything[1]
    assert names == everything
    with served.receive() as batch:
        assert names[batch.lanes[0]] == "votes"
