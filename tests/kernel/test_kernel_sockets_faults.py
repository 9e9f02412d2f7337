# SPDX-License-Identifier: Apache-2.0
"""Kernel-socket lanes in trouble: no room to send, signals, descriptors closed elsewhere, no IPv6."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from sluice_cli.lab import Lab
from sluice_cli.traffic import udp_frame
from userspace.datagram.batch import Batch
from userspace.datagram.companion import Companion
from userspace.datagram.mmsg import MmsgLanes
from userspace.datagram.portable import PortableLanes
from userspace.datagram.sockets import open_service_sockets
from xdp.errors import InterfaceGoneError
from xdp.policy import Policy

pytestmark = pytest.mark.root

DEADLINE = 10.0
PORTS = (8001, 8002)
IP_RECVERR = 11

Backend = type[MmsgLanes] | type[PortableLanes]
SocketLanes = MmsgLanes | PortableLanes

POLICY = f"""
version = 1
[[lane]]
name = "all"
[[service]]
name = "s"
ports = {list(PORTS)}
[[service.rule]]
action = "lane"
lane = "all"
"""


@pytest.fixture(params=[MmsgLanes, PortableLanes], ids=["mmsg", "portable"])
def backend(request: pytest.FixtureRequest) -> Backend:
    chosen: Backend = request.param
    return chosen


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab() as made:
        yield made


@pytest.fixture
def lanes(lab: Lab, backend: Backend) -> Iterator[SocketLanes]:
    with lab.server.enter():
        sockets = open_service_sockets(PORTS)
    for _, sock in sockets:
        # The least there is: two datagrams of a kilobyte or so.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    with backend(Policy.parse(POLICY), sockets) as opened:
        yield opened


class Bottleneck:
    """A token bucket (tc-tbf(8)) on the server's interface; ``limit`` in bytes is what it queues."""

    def __init__(self, lab: Lab, rate: str, limit: int) -> None:
        self._server = lab.server
        self._options = ("tbf", "rate", rate, "burst", "3000", "limit", str(limit))

    def __enter__(self) -> Bottleneck:
        self._tc("add", "dev", self._server.interface, "root", *self._options)
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(subprocess.CalledProcessError):  # opened already
            self.open()

    def open(self) -> None:
        """Let everything through from now on."""
        self._tc("del", "dev", self._server.interface, "root")

    def _tc(self, *arguments: str) -> None:
        self._server.run(["tc", "qdisc", *arguments], check=True, capture_output=True, timeout=DEADLINE)


@contextlib.contextmanager
def ringing(interval: float, handler: Callable[[int, Any], None]) -> Iterator[None]:
    """SIGALRM every ``interval`` seconds."""
    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, interval, interval)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def client(lab: Lab) -> Iterator[socket.socket]:
    with lab.client.enter():
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with sock:
        sock.settimeout(DEADLINE)
        sock.bind((str(lab.client.ipv4), 0))
        yield sock


#: Each longer than the one before: none can share a message with another.
PAYLOADS = [b"%4d" % number + bytes(996 + number) for number in range(20)]


def test_a_full_send_buffer_is_waited_for_so_long_and_no_longer(lab: Lab, lanes: SocketLanes) -> None:
    """1 kbit/s: nothing more gets out within the test."""
    with Bottleneck(lab, "1kbit", 1_000_000), client(lab) as receiver:
        start = time.monotonic()
        sent = lanes.send(receiver.getsockname(), PAYLOADS, timeout=0.3)
        took = time.monotonic() - start
        assert 0 < sent < len(PAYLOADS)
        assert 0.29 <= took < 3
        assert [failure.index for failure in lanes.failures] == list(range(sent, len(PAYLOADS)))
        assert {failure.errno for failure in lanes.failures} == {errno.EAGAIN}
        # The other socket has a buffer of its own.
        assert lanes.send(receiver.getsockname(), PAYLOADS[:1], port=PORTS[1], timeout=0) == 1
        assert (lanes.statistics().sent, lanes.statistics().send_failed) == (sent + 1, len(PAYLOADS) - sent)


def test_a_full_send_buffer_takes_a_message_whole_or_not_at_all(
    lab: Lab, lanes: SocketLanes, backend: Backend
) -> None:
    """Datagrams that share a message: what was sent and what was not is told one by one all the same."""
    with Bottleneck(lab, "1kbit", 1_000_000), client(lab) as receiver:
        payloads = [number.to_bytes(2, "big") * 600 for number in range(200)]
        sent = lanes.send(receiver.getsockname(), payloads, timeout=0.2)
        assert 0 < sent < len(payloads)
        if backend is MmsgLanes:
            assert sent % 54 == 0  # as many as fit into one: 65,400 bytes
        assert [failure.index for failure in lanes.failures] == list(range(sent, len(payloads)))
        assert {failure.errno for failure in lanes.failures} == {errno.EAGAIN}


def test_everything_goes_out_when_room_comes(lab: Lab, lanes: SocketLanes) -> None:
    """500 kbit/s: 20 kB take a third of a second, through a buffer that holds a tenth of them."""
    with Bottleneck(lab, "500kbit", 1_000_000), client(lab) as receiver:
        start = time.monotonic()
        assert lanes.send(receiver.getsockname(), PAYLOADS, timeout=DEADLINE) == len(PAYLOADS)
        assert time.monotonic() - start > 0.1
        assert lanes.failures == ()
        assert [receiver.recv(2000) for _ in PAYLOADS] == PAYLOADS


def test_a_full_device_queue(lab: Lab, lanes: SocketLanes) -> None:
    """The kernel says ENOBUFS only to those who ask for errors; else it drops and says nothing."""
    for _, sock in lanes._sockets:
        sock.setsockopt(socket.IPPROTO_IPV6, 25, 1)  # IPV6_RECVERR
        sock.setsockopt(socket.IPPROTO_IP, IP_RECVERR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    with Bottleneck(lab, "1kbit", 4000), client(lab) as receiver:
        start = time.monotonic()
        sent = lanes.send(receiver.getsockname(), PAYLOADS, timeout=0.2)
        assert 0.19 <= time.monotonic() - start < 3
        assert 0 < sent < len(PAYLOADS)
        assert {failure.errno for failure in lanes.failures} == {errno.ENOBUFS}
        assert [failure.index for failure in lanes.failures] == list(range(sent, len(PAYLOADS)))
    with Bottleneck(lab, "500kbit", 4000), client(lab) as receiver:
        assert lanes.send(receiver.getsockname(), PAYLOADS, timeout=DEADLINE) == len(PAYLOADS)
        assert [receiver.recv(2000) for _ in PAYLOADS] == PAYLOADS


def from_both_ports(lab: Lab, lanes: SocketLanes, receiver: socket.socket) -> Batch:
    """A batch with six datagrams of the first port and, after some of them, one of the second."""
    deadline = time.monotonic() + DEADLINE
    while time.monotonic() < deadline:
        for payload in PAYLOADS[:6]:
            receiver.sendto(payload, (str(lab.server.ipv4), PORTS[0]))
        receiver.sendto(b"other port", (str(lab.server.ipv4), PORTS[1]))
        batch = lanes.receive(timeout=DEADLINE)
        if sorted(batch.lengths) == [10, *map(len, PAYLOADS[:6])]:
            return batch
        batch.release()  # they are not all there at once every time
    raise AssertionError("no such batch")


def test_one_full_socket_keeps_nothing_from_the_others(lab: Lab, lanes: SocketLanes) -> None:
    """The first socket's answers wait out the time; the second's are tried nevertheless."""
    with client(lab) as receiver:
        batch = from_both_ports(lab, lanes, receiver)
        short = list(batch.lengths).index(10)
        before = lanes.statistics()
        with Bottleneck(lab, "1kbit", 1_000_000):
            start = time.monotonic()
            sent = lanes.send_back(batch, timeout=0.2)
            assert 0.19 <= time.monotonic() - start < 3
        failed = [failure.index for failure in lanes.failures]
        assert 1 < sent == 7 - len(failed) < 7
        assert short not in failed
        assert failed == sorted(failed)
        assert {failure.errno for failure in lanes.failures} == {errno.EAGAIN}
        assert lanes.statistics().send_failed - before.send_failed == len(failed)
        assert batch.released
    assert lanes.census()["held"] == 0


def test_signals_do_not_end_a_send(lab: Lab, lanes: SocketLanes) -> None:
    rung: list[int] = []
    with Bottleneck(lab, "1kbit", 1_000_000), client(lab) as receiver:
        with ringing(0.02, lambda number, _frame: rung.append(number)):
            start = time.monotonic()
            sent = lanes.send(receiver.getsockname(), PAYLOADS, timeout=0.3)
            assert 0.29 <= time.monotonic() - start < 3
        assert len(rung) >= 5
        assert 0 < sent < len(PAYLOADS)
        assert {failure.errno for failure in lanes.failures} == {errno.EAGAIN}
    with Bottleneck(lab, "500kbit", 1_000_000), client(lab) as receiver:
        with ringing(0.01, lambda number, _frame: rung.append(number)):
            assert lanes.send(receiver.getsockname(), PAYLOADS, timeout=DEADLINE) == len(PAYLOADS)
        assert [receiver.recv(2000) for _ in PAYLOADS] == PAYLOADS  # none twice


class EnoughError(Exception):
    pass


def raising(_signal: int, _frame: object) -> None:
    raise EnoughError


def test_a_handler_that_raises_ends_a_send(lab: Lab, lanes: SocketLanes) -> None:
    with Bottleneck(lab, "1kbit", 1_000_000), client(lab) as receiver:
        with ringing(0.1, raising), pytest.raises(EnoughError):
            lanes.send(receiver.getsockname(), PAYLOADS, timeout=60)
        statistics = lanes.statistics()
        assert 0 < statistics.sent < len(PAYLOADS)
        assert [failure.index for failure in lanes.failures] == list(range(statistics.sent, len(PAYLOADS)))
        assert {failure.errno for failure in lanes.failures} == {errno.EINTR}
        assert statistics.sent + statistics.send_failed == len(PAYLOADS)


def test_a_handler_that_raises_leaves_no_frame_held(lab: Lab, lanes: SocketLanes) -> None:
    with client(lab) as receiver:
        batch = from_both_ports(lab, lanes, receiver)
        with Bottleneck(lab, "1kbit", 1_000_000), ringing(0.1, raising), pytest.raises(EnoughError):
            lanes.send_back(batch, timeout=60)
        assert batch.released
        assert {failure.errno for failure in lanes.failures} == {errno.EINTR}
        assert lanes.statistics().sent + len(lanes.failures) == 7
        assert lanes.census()["held"] == 0


Close = Callable[[socket.socket], None]


def close_number(sock: socket.socket) -> None:
    os.close(sock.fileno())


def become_another(sock: socket.socket) -> None:
    """What happens when a closed number is given out again."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as other:
        os.dup2(other.fileno(), sock.fileno(), inheritable=False)


def become_a_pipe(sock: socket.socket) -> None:
    read, write = os.pipe()
    os.dup2(read, sock.fileno(), inheritable=False)
    os.close(read)
    os.close(write)


CLOSES = [socket.socket.close, close_number, become_another, become_a_pipe]


@pytest.mark.parametrize("close", CLOSES)
@pytest.mark.parametrize("count", [1, 2])
def test_a_descriptor_closed_elsewhere_ends_a_receive(
    lab: Lab, backend: Backend, close: Close, count: int
) -> None:
    """While it waits for ever, and with a timeout of 0 soon after."""
    with lab.server.enter():
        sockets = open_service_sockets(PORTS[:count])
    with backend(Policy.parse(POLICY), sockets) as lanes:
        assert not lanes.try_receive()
        timer = threading.Timer(0.1, close, [sockets[-1].socket])
        timer.start()
        start = time.monotonic()
        with pytest.raises(InterfaceGoneError, match="can't be read"):
            lanes.receive(timeout=None)
        assert time.monotonic() - start < DEADLINE
        timer.join()
        for _ in range(2):
            with pytest.raises(InterfaceGoneError, match="can't be read"):
                lanes.try_receive()
        assert lanes.statistics().balanced
        assert lanes.census()["held"] == 0


def until_not(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE
    while time.monotonic() < deadline and condition():
        pass


@pytest.mark.parametrize("close", CLOSES)
def test_noticed_while_another_port_is_busy(lab: Lab, lanes: SocketLanes, close: Close) -> None:
    with client(lab) as sender:

        def busy() -> bool:
            sender.sendto(b"busy", (str(lab.server.ipv4), PORTS[0]))
            with lanes.receive(timeout=DEADLINE) as batch:
                return len(batch) > 0

        close(lanes._sockets[1].socket)
        with pytest.raises(InterfaceGoneError, match="can't be read"):
            until_not(busy)


@pytest.mark.parametrize("close", CLOSES)
def test_answers_of_a_closed_socket_go_nowhere_else(lab: Lab, lanes: SocketLanes, close: Close) -> None:
    with client(lab) as receiver:
        batch = from_both_ports(lab, lanes, receiver)
        short = list(batch.lengths).index(10)
        close(lanes._sockets[0].socket)
        with pytest.raises(InterfaceGoneError, match="can't be written"):
            lanes.send_back(batch)
        assert batch.released
        assert [failure.index for failure in lanes.failures] == [i for i in range(7) if i != short]
        assert {failure.errno for failure in lanes.failures} == {errno.EBADF}
        assert lanes.statistics().sent == 1
        data, source = receiver.recvfrom(2000)
        assert (data, source[1]) == (b"other port", PORTS[1])
        receiver.settimeout(0)
        with pytest.raises(BlockingIOError):
            receiver.recv(2000)


@pytest.mark.parametrize("port", [0, 9])
def test_a_sender_that_cannot_be_answered(lab: Lab, lanes: SocketLanes, port: int) -> None:
    """Source port 0 is allowed (RFC 768: none); it must not keep answers from the others."""
    frame = udp_frame(lab.client, lab.server, PORTS[0], b"no answer", source_port=port)
    with client(lab) as receiver, raw(lab) as wire:
        deadline = time.monotonic() + DEADLINE
        while time.monotonic() < deadline:
            wire.send(frame)
            receiver.sendto(b"answer me", (str(lab.server.ipv4), PORTS[0]))
            batch = lanes.receive(timeout=DEADLINE)
            if len(batch) == 2:
                break
            batch.release()
        assert len(batch) == 2
        silent = [batch.source(i)[1] for i in range(2)].index(port)
        assert lanes.send_back(batch) == (2 if port else 1)
        assert [(failure.index, failure.errno) for failure in lanes.failures] == (
            [] if port else [(silent, errno.EINVAL)]
        )
        assert receiver.recv(100) == b"answer me"


@contextlib.contextmanager
def raw(lab: Lab) -> Iterator[socket.socket]:
    """Whole frames from the client's interface."""
    with lab.client.enter(), socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sock:
        sock.bind((lab.client.interface, 0))
        yield sock


def test_a_companion_notices_too(lab: Lab) -> None:
    with lab.server.enter():
        sockets = open_service_sockets(PORTS)
    companion = Companion(Policy.parse(POLICY), sockets)
    try:
        assert companion.try_receive() is None
        sockets[1].socket.close()
        with pytest.raises(InterfaceGoneError, match="can't be read"):
            until_not(lambda: companion.try_receive() is None)
    finally:
        companion.close()
