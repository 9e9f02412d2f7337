# SPDX-License-Identifier: Apache-2.0
"""The batch manager over AF_XDP, and over kernel sockets that have no room, between two hosts of a lab."""

from __future__ import annotations

import contextlib
import errno
import math
import socket
import time
from collections.abc import Iterator

import pytest

from sluice_cli.lab import Lab
from tests.cable import NATIVE
from tests.kernel.datapath import POLICY, SECONDS, VOTES, client_socket, server_address, until
from tests.kernel.test_kernel_sockets_faults import Bottleneck
from userspace.datagram.batch_manager import UDPBatchManager
from userspace.datagram.batch_queue import RETRY
from userspace.datagram.flow_gate import FlowGate
from userspace.datagram.lanes import open_lanes
from userspace.datagram.mmsg import MmsgLanes
from userspace.datagram.portable import PortableLanes
from userspace.datagram.sockets import open_service_sockets
from userspace.datagram.xsk_lanes import XskLanes
from userspace.datagram.xsk_send import Spread
from userspace.flow.controller import FlowController
from xdp.errors import BusyError, InterfaceGoneError, UsageError
from xdp.policy import Policy

pytestmark = [pytest.mark.root, pytest.mark.bpf]

Endpoint = tuple[str, int]
NOBODY = Policy.parse(POLICY + "\n[companion]\nenabled = false\n")


class Clock:
    """Stands still unless told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(name="lab")
def _lab() -> Iterator[Lab]:
    with Lab() as made:
        yield made


@contextlib.contextmanager
def xsk_lanes(lab: Lab, policy: Policy | None = None) -> Iterator[XskLanes]:
    """To be used from within the server's namespace, where the router is opened at the first packet."""
    with lab.server.enter():
        policy = policy or Policy.parse(POLICY)
        with open_lanes(policy, interface=lab.server.interface, mode=NATIVE) as lanes:
            assert isinstance(lanes, XskLanes)
            yield lanes


@pytest.fixture(name="lanes")
def _lanes(lab: Lab) -> Iterator[XskLanes]:
    with xsk_lanes(lab) as lanes:
        yield lanes


def name(sock: socket.socket) -> Endpoint:
    host, port = sock.getsockname()[:2]
    return host, port


def acquaint(lanes: XskLanes, client: socket.socket) -> None:
    """Until packets to the client leave as frames."""

    def by_frame() -> bool:
        before = lanes.statistics().sent
        assert lanes.send(name(client), [b"who are you"], port=VOTES) == 1
        client.recv(100)
        return lanes.statistics().sent > before

    until(by_frame, "a frame")


def test_to_known_unknown_and_own_addresses_in_one_batch(lab: Lab, lanes: XskLanes) -> None:
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(client_socket(lab, version)) for version in (4, 6, 4)]
        acquaint(lanes, clients[0])
        manager = stack.enter_context(UDPBatchManager(lanes, port=VOTES, batch_timeout=SECONDS))
        before = lanes.statistics().sent
        for number in range(60):
            to = name(clients[number % 3]) if number % 4 else (server_address(lab), VOTES)
            assert manager.queue_packet(to, b"%d" % number)
        assert manager.flush_batches() == 60
        statistics = manager.statistics()
        assert (statistics.batches, statistics.calls) == (1, 1)
        assert statistics.balanced
        for index, client in enumerate(clients):
            numbers = [number for number in range(60) if number % 4 and number % 3 == index]
            found = [client.recvfrom(100) for _ in numbers]
            assert sorted(payload for payload, _ in found) == sorted(b"%d" % number for number in numbers)
            assert {source[1] for _, source in found} == {VOTES}
        own: list[bytes] = []
        while len(own) < 15:
            with manager.receive_batch(timeout=SECONDS) as batch:
                assert batch
                own += map(bytes, batch)
        assert own == [b"%d" % number for number in range(0, 60, 4)]
        assert lanes.statistics().sent > before


def test_sent_while_it_receives(lab: Lab, lanes: XskLanes) -> None:
    """What wakes the receiver is the echo of a packet that was queued, so it woke to send that."""
    with client_socket(lab) as client, UDPBatchManager(lanes, port=VOTES) as manager:
        acquaint(lanes, client)
        manager.queue_packet((server_address(lab), VOTES), b"to myself")
        manager.queue_packet(name(client), b"to you")
        with manager.receive_batch(timeout=SECONDS) as batch:
            assert [bytes(payload) for payload in batch] == [b"to myself"]
        assert client.recv(100) == b"to you"
        assert manager.statistics().attempts["time"] == 1


def test_flow_control_over_the_ring(lab: Lab, lanes: XskLanes) -> None:
    """One client acknowledges, the other does not: its window is all it gets, and holds up nobody."""
    gate = FlowGate(lambda _, now: FlowController(now))
    with (
        client_socket(lab) as answering,
        client_socket(lab) as silent,
        UDPBatchManager(lanes, port=VOTES, maximum_age=SECONDS, flows=gate) as manager,
    ):
        acquaint(lanes, answering)
        acquaint(lanes, silent)
        for number in range(100):
            manager.queue_packet(name(answering), b"%d" % number + bytes(1190))
            manager.queue_packet(name(silent), b"%d" % number + bytes(1190))
        answering.setblocking(False)
        found: list[int] = []
        deadline = time.monotonic() + SECONDS
        while len(found) < 100:
            assert time.monotonic() < deadline
            manager.receive_batch(timeout=0.001).release()
            before = len(found)
            with contextlib.suppress(BlockingIOError):
                while True:
                    found.append(int(answering.recv(2000).rstrip(b"\0")))
            if len(found) > before:  # numbers are given in the order of sending
                manager.acknowledged(name(answering), [(0, len(found) - 1)])
        assert found == list(range(100))
        flow = gate.find(name(silent))
        assert flow is not None
        assert 10 <= flow.snapshot().sent_packets <= 14, "the initial window, and probes"
        assert len(manager) == 100 - flow.snapshot().sent_packets
        assert manager.statistics().balanced
        assert lanes.statistics().sent >= 110


def test_longer_than_a_frame(lab: Lab, lanes: XskLanes) -> None:
    """The kernel makes fragments of it, whether alone in its batch or not."""
    with client_socket(lab) as client, UDPBatchManager(lanes, port=VOTES, batch_timeout=SECONDS) as manager:
        acquaint(lanes, client)
        for payloads in ([b"short", bytes(3000), b"also short"], [bytes(4000)]):
            for payload in payloads:
                manager.queue_packet(name(client), payload)
            assert manager.flush_batches() == len(payloads)
            assert sorted(client.recv(5000) for _ in payloads) == sorted(payloads)
        assert not manager.failures


def test_without_companions_what_cannot_leave_is_skipped(lab: Lab) -> None:
    """Too long, and no way: each is named, the others arrive."""
    with xsk_lanes(lab, NOBODY) as lanes, client_socket(lab) as client:
        acquaint(lanes, client)
        with UDPBatchManager(lanes, port=VOTES, batch_timeout=SECONDS) as manager:
            manager.queue_packet(name(client), b"first")
            manager.queue_packet(name(client), bytes(1473))
            for _ in range(2):
                manager.queue_packet((server_address(lab), 9), b"own address")
            manager.queue_packet(name(client), b"last")
            assert manager.flush_batches() == 2
            assert [client.recv(100) for _ in range(2)] == [b"first", b"last"]
            failed = [(one.destination, one.errno) for one in manager.failures]
            own = (server_address(lab), 9)
            assert failed == [
                (name(client), errno.EMSGSIZE),
                (own, errno.EHOSTUNREACH),
                (own, errno.EHOSTUNREACH),
            ]
            statistics = manager.statistics()
            assert statistics.calls == 1 + 4, "the second one to the own address was not tried"
            assert statistics.balanced


def test_where_the_kernel_would_not(lab: Lab, lanes: XskLanes) -> None:
    with client_socket(lab) as client, UDPBatchManager(lanes, port=VOTES, batch_timeout=SECONDS) as manager:
        acquaint(lanes, client)
        lab.server.run(["ip", "route", "add", "unreachable", "192.0.2.0/24"])
        manager.queue_packet(("192.0.2.1", 9), b"lost")
        manager.queue_packet(name(client), b"sent")
        assert manager.flush_batches() == 1
        assert client.recv(100) == b"sent"
        (failure,) = manager.failures
        assert failure.destination == ("192.0.2.1", 9)
        assert failure.errno in {errno.EHOSTUNREACH, errno.ENETUNREACH}


def test_a_full_ring(lab: Lab, lanes: XskLanes, clock: Clock) -> None:
    """What found no room leaves when there is some, the high priority first, each in its order."""
    with client_socket(lab) as client:
        acquaint(lanes, client)
        manager = UDPBatchManager(lanes, port=VOTES, clock=clock, batch_size=64, buffers=128)
        to = name(client)
        lab.server.run(["ip", "link", "set", lab.server.interface, "down"])
        # As if this had not been reported yet: packets go into the ring, and stay there.
        sender, router = lanes._sender, lanes._sender._router
        assert router is not None
        router.poll()
        headers = sender._routed[(*to, VOTES)][2]
        fanout = manager._sender._fanouts.find((manager._targets[to],) * 64)
        pinned = Spread(fanout.endpoints, VOTES, router.version, math.inf, [headers] * 64)
        sender._spreads[fanout] = pinned
        for number in range(2048 + 64):  # as many as there are frames to send from, and a batch
            assert manager.queue_packet(to, b"low %d" % number, priority=1)
        assert (manager.statistics().sent, len(manager)) == (2048, 64)
        for number in range(64):
            assert manager.queue_packet(to, b"more %d" % number, priority=1)
        assert not manager.queue_packet(to, b"refused", priority=1)
        for number in range(3):
            assert manager.queue_packet(to, b"high %d" % number, priority=0)
        assert [(one.errno, one.size) for one in manager.failures] == [(errno.ENOBUFS, 7)] * 3
        clock.now += RETRY
        assert manager.poll() == 0
        assert manager.statistics().balanced
        lab.server.run(["ip", "link", "set", lab.server.interface, "up"])
        assert lanes.flush(SECONDS)
        _forget_all(client)
        pinned.until = 0.0
        until(lambda: _reaches(lab, client), "a way to the client")
        clock.now += RETRY
        assert manager.poll() == 128
        found = [client.recv(100) for _ in range(128)]
        assert found == [
            *[b"high %d" % number for number in range(3)],
            *[b"low %d" % number for number in range(2048, 2048 + 64)],
            *[b"more %d" % number for number in range(61)],
        ]
        statistics = manager.statistics()
        assert (statistics.refused, statistics.failed, statistics.waiting) == (1, 3, 0)
        assert statistics.attempts["retry"] == 2
        assert statistics.balanced
        assert manager.close() == ()


def _forget_all(sock: socket.socket) -> None:
    sock.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            sock.recv(100)
    sock.settimeout(SECONDS)


def _reaches(lab: Lab, client: socket.socket) -> bool:
    """Whether the kernel's datagrams from server to client arrive."""
    with (
        lab.server.enter(),
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe,
        contextlib.suppress(OSError),
    ):
        probe.sendto(b"probe", name(client))
    client.settimeout(0.1)
    try:
        return client.recv(100) == b"probe"
    except TimeoutError:
        return False
    finally:
        client.settimeout(SECONDS)


def test_a_full_socket_does_not_hold_up_the_ring(lab: Lab, lanes: XskLanes, clock: Clock) -> None:
    """What is longer than a frame goes by the companion socket, which is full: frames pass it meanwhile."""
    with client_socket(lab) as one, client_socket(lab) as other:
        acquaint(lanes, one)
        acquaint(lanes, other)
        assert lanes.companion is not None
        assert lanes.companion.lanes is not None
        for _, sock in lanes.companion.lanes._sockets:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        manager = UDPBatchManager(lanes, port=VOTES, clock=clock)
        with Bottleneck(lab, "1kbit", 1_000_000):
            for number in range(10):
                manager.queue_packet(name(one), b"%d" % number + bytes(2000))
                manager.queue_packet(name(other), b"%d" % number)
            sent = manager.flush_batches()
            assert 10 < sent < 20
            assert len(manager) == 20 - sent
            for number in range(10, 200):
                manager.queue_packet(name(other), b"%d" % number)
            assert len(manager) - (20 - sent) < 64
            clock.now += 0.005
            manager.poll()
            assert len(manager) == 20 - sent
            assert [other.recv(10) for _ in range(200)] == [b"%d" % number for number in range(200)]
            assert manager.statistics().balanced
        clock.now += RETRY
        while len(manager):
            manager.poll()
            clock.now += RETRY
        found: list[bytes] = []
        while found[-1:] != [b"9"]:
            found.append(one.recv(3000).rstrip(b"\0"))
        # The bottleneck may have taken with it what the socket had given it.
        assert found[sent - 20 :] == [b"%d" % number for number in range(sent - 10, 10)]
        assert manager.close() == ()


def test_an_interface_that_is_gone(lab: Lab, clock: Clock) -> None:
    """Said when nothing can leave any more; what was being sent has failed, the rest is named at the end."""
    with xsk_lanes(lab, NOBODY) as lanes, client_socket(lab) as client:
        acquaint(lanes, client)
        manager = UDPBatchManager(lanes, port=VOTES, clock=clock)
        to = name(client)
        lab.server.run(["ip", "link", "delete", lab.server.interface])

        def queue_many() -> None:
            for _ in range(5000):
                manager.queue_packet(to, b"x")

        with pytest.raises(InterfaceGoneError):
            queue_many()
        statistics = manager.statistics()
        assert statistics.balanced
        assert statistics.failures == {errno.ENXIO: 64}
        with pytest.raises(InterfaceGoneError):
            manager.receive_batch(timeout=SECONDS)
        for _ in range(10):
            manager.queue_packet(to, b"y")
        assert [one.errno for one in manager.close()] == [errno.ENXIO] * 10
        assert manager.statistics().balanced


def test_which_port_to_send_from(lanes: XskLanes) -> None:
    with pytest.raises(UsageError, match="which port to send from"):
        UDPBatchManager(lanes)


@pytest.mark.parametrize("destinations", [1, 8])
def test_packets_per_second_beside_a_call_for_each(lab: Lab, lanes: XskLanes, destinations: int) -> None:
    """Prints how many times faster it is; the number of calls is what is certain."""
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(client_socket(lab)) for _ in range(destinations)]
        for client in clients:
            acquaint(lanes, client)
        payload, count = bytes(1200), 64 * 50
        names = [name(clients[number % destinations]) for number in range(count)]
        start = time.perf_counter()
        for to in names:
            lanes.send(to, [payload], port=VOTES)
        singly = time.perf_counter() - start
        with UDPBatchManager(lanes, port=VOTES, buffer_size=1200, batch_timeout=1.0) as manager:
            start = time.perf_counter()
            for to in names:
                manager.queue_packet(to, payload)
            batched = time.perf_counter() - start
            statistics = manager.statistics()
        assert statistics.sent == count
        assert statistics.calls == statistics.batches == count // 64
        print(f"{destinations} destinations: {singly / batched:.2f} times the packets per second")


SocketLanes = MmsgLanes | PortableLanes


@pytest.fixture(params=[MmsgLanes, PortableLanes], ids=["mmsg", "portable"])
def narrow(request: pytest.FixtureRequest, lab: Lab) -> Iterator[SocketLanes]:
    """Lanes whose send buffer takes two datagrams of a kilobyte or so."""
    with lab.server.enter():
        sockets = open_service_sockets([VOTES])
    sockets[0].socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    with request.param(Policy.parse(POLICY), sockets) as opened:
        yield opened


def numbered(numbers: range, priority: int) -> list[bytes]:
    """Each longer than the one sent before it, so that none can share a message with another."""
    return [b"%d %4d" % (priority, number) + bytes(994 + 100 * priority + number) for number in numbers]


class TestNoRoomInTheSocket:
    def test_order_refusal_and_age(self, lab: Lab, narrow: SocketLanes, clock: Clock) -> None:
        """1 kbit/s: nothing more leaves within the test than fits the buffer at first."""
        manager = UDPBatchManager(
            narrow, clock=clock, batch_size=8, buffers=16, maximum_age=0.1, priorities=2, when_full="raise"
        )
        with client_socket(lab) as client, Bottleneck(lab, "1kbit", 1_000_000):
            to = name(client)
            for payload in numbered(range(12), 1):
                manager.queue_packet(to, payload, priority=1)
            sent = manager.statistics().sent
            assert 0 < sent < 8
            assert len(manager) == 12 - sent
            clock.now += 0.05
            for payload in numbered(range(4 + sent), 0):
                assert manager.queue_packet(to, payload, priority=0)
            with pytest.raises(BusyError, match="all 16 buffers are in use"):
                manager.queue_packet(to, b"no buffer for it", priority=1)
            assert manager.queue_packet(to, b"there is for a high one", priority=0)
            assert [(one.errno, one.priority) for one in manager.failures] == [(errno.ENOBUFS, 1)]
            # Before it refuses, it looks whether there is room again.
            clock.now += RETRY
            retries = manager.statistics().attempts["retry"]
            with pytest.raises(BusyError):
                manager.queue_packet(to, b"no buffer for it", priority=1)
            assert manager.statistics().attempts["retry"] == retries + 1
            assert manager.flush_batches() == 0
            assert len(manager) == 16
            clock.now += 0.05
            assert manager.poll() == 0
            statistics = manager.statistics()
            assert statistics.expired == 11 - sent, "the low ones, which are old enough"
            assert len(manager) == 5 + sent
            assert (statistics.refused, statistics.balanced) == (2, True)
            left = manager.close()
            assert [(one.errno, one.priority) for one in left] == [(errno.EAGAIN, 0)] * (5 + sent)
            assert manager.statistics().balanced

    def test_everything_goes_out_when_room_comes(self, lab: Lab, narrow: SocketLanes) -> None:
        """500 kbit/s: the highest first, each priority in its order, and the receiver loop is what sends."""
        with (
            client_socket(lab) as client,
            Bottleneck(lab, "500kbit", 1_000_000),
            UDPBatchManager(narrow, batch_size=8, maximum_age=SECONDS) as manager,
        ):
            to = name(client)
            for payload in numbered(range(8), 1):
                manager.queue_packet(to, payload, priority=1)
            started = manager.statistics().sent
            assert 0 < started < 8
            for payload in numbered(range(10), 0):
                manager.queue_packet(to, payload, priority=0)
            deadline = time.monotonic() + SECONDS
            while len(manager):
                assert time.monotonic() < deadline
                manager.receive_batch(timeout=0.01).release()
            low, high = numbered(range(8), 1), numbered(range(10), 0)
            assert [client.recv(2000) for _ in range(18)] == low[:started] + high + low[started:]
            statistics = manager.statistics()
            assert (statistics.sent, statistics.failed, statistics.expired) == (18, 0, 0)
            assert statistics.attempts["retry"] > 1
