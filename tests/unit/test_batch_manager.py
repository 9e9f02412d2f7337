# SPDX-License-Identifier: Apache-2.0
"""The batch manager over kernel sockets of both kinds, on loopback."""

from __future__ import annotations

import errno
import random
import select
import socket
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import pytest
from typing_extensions import Buffer

from tests.unit.socket_backends import DEADLINE, Open, backend, make_policy, open_lanes, port
from userspace.datagram.batch_manager import UDPBatchManager
from userspace.datagram.batch_queue import RETRY
from userspace.datagram.fanout import Fanout
from userspace.datagram.mmsg import MmsgLanes
from userspace.datagram.socket_statistics import SendFailure
from xdp.errors import InterfaceGoneError, UsageError

__all__ = ["backend", "open_lanes", "port"]  # fixtures: in use, though only as arguments


class Clock:
    """Stands still unless told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def receivers() -> Iterator[list[socket.socket]]:
    """Five of IPv4 and one of IPv6."""
    with ExitStack() as stack:
        made = []
        for host in ["127.0.0.1"] * 5 + ["::1"]:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            sock = stack.enter_context(socket.socket(family, socket.SOCK_DGRAM))
            sock.bind((host, 0))
            sock.settimeout(DEADLINE)
            made.append(sock)
        yield made


def name(sock: socket.socket) -> tuple[str, int]:
    host, port = sock.getsockname()[:2]
    return host, port


def nothing_came(*sockets: socket.socket) -> bool:
    """On loopback a datagram has arrived when the call that sent it returns."""
    for sock in sockets:
        sock.setblocking(False)
        try:
            sock.recv(10)
        except BlockingIOError:
            continue
        finally:
            sock.settimeout(DEADLINE)
        return False
    return True


def test_flushed_by_size(open_lanes: Open, receivers: list[socket.socket], port: int, clock: Clock) -> None:
    """64 packets to six destinations, in one call where there is one for that; each from the service port."""
    lanes = open_lanes()
    with UDPBatchManager(lanes, port=port, clock=clock) as manager:
        for number in range(63):
            assert manager.queue_packet(name(receivers[number % 6]), b"%d" % number)
        assert nothing_came(*receivers)
        assert len(manager) == 63
        assert manager.queue_packet(name(receivers[63 % 6]), b"63")
        assert len(manager) == 0
        for number in range(64):
            payload, source = receivers[number % 6].recvfrom(100)
            assert (payload, source[1]) == (b"%d" % number, port)
        statistics = manager.statistics()
        assert statistics.attempts["size"] == statistics.batches == 1
        assert statistics.calls == (1 if isinstance(lanes, MmsgLanes) else 64)
        assert statistics.sizes == (0, 0, 0, 0, 0, 0, 1)
        assert statistics.balanced


def test_flushed_by_time(open_lanes: Open, receivers: list[socket.socket], clock: Clock) -> None:
    with UDPBatchManager(open_lanes(), clock=clock) as manager:
        assert manager.next_flush() is None
        manager.queue_packet(name(receivers[0]), b"1")
        clock.now += 0.003
        manager.queue_packet(name(receivers[0]), b"2")
        due = manager.next_flush()
        assert due == pytest.approx(100.005)
        assert manager.poll() == 0
        assert nothing_came(receivers[0])
        assert manager.poll(due) == 2
        assert [receivers[0].recv(10) for _ in range(2)] == [b"1", b"2"]
        statistics = manager.statistics()
        assert statistics.attempts == {"size": 0, "time": 1, "demand": 0, "retry": 0}
        assert statistics.delay_minimum_us == pytest.approx(2000)
        assert statistics.delay_maximum_us == pytest.approx(5000)
        # Queueing looks at the time, too.
        manager.queue_packet(name(receivers[0]), b"3")
        clock.now += 1.0
        manager.queue_packet(name(receivers[1]), b"4")
        assert [sock.recv(10) for sock in receivers[:2]] == [b"3", b"4"]


def test_flushed_on_demand(open_lanes: Open, receivers: list[socket.socket], clock: Clock) -> None:
    with UDPBatchManager(open_lanes(), clock=clock) as manager:
        assert manager.flush_batches() == 0
        for number in range(10):
            manager.queue_packet(name(receivers[0]), b"%d" % number)
        assert manager.flush_batches() == 10
        assert [receivers[0].recv(10) for _ in range(10)] == [b"%d" % number for number in range(10)]
        assert manager.statistics().attempts["demand"] == 1


def test_the_callers_buffer_is_free_at_once(
    open_lanes: Open, receivers: list[socket.socket], clock: Clock
) -> None:
    with UDPBatchManager(open_lanes(), clock=clock) as manager:
        buffer = bytearray(1000)
        for number in range(20):
            buffer[:] = bytes([number]) * 1000
            manager.queue_packet(name(receivers[number % 2]), memoryview(buffer)[: number * 50])
        del buffer[:]
        manager.flush_batches()
        for number in range(20):
            assert receivers[number % 2].recv(2000) == bytes([number]) * number * 50


def test_higher_priorities_leave_first(
    open_lanes: Open, receivers: list[socket.socket], clock: Clock
) -> None:
    with UDPBatchManager(open_lanes(), clock=clock, priorities=3, batch_size=8) as manager:
        to = name(receivers[0])
        for payload, priority in ((b"low", None), (b"high", 0), (b"low", 2), (b"middle", 1), (b"high", 0)):
            manager.queue_packet(to, payload, priority)
        manager.flush_batches()
        assert [receivers[0].recv(10) for _ in range(5)] == [b"high", b"high", b"middle", b"low", b"low"]
        # One more low packet makes the batch due, and the high ones are in it.
        for number in range(6):
            manager.queue_packet(to, b"low %d" % number)
        for number in range(2):
            manager.queue_packet(to, b"high %d" % number, priority=0)
        found = [receivers[0].recv(10) for _ in range(8)]
        assert found == [b"high 0", b"high 1", *[b"low %d" % number for number in range(6)]]


def test_what_fails_is_named_and_the_rest_goes_out(
    open_lanes: Open, receivers: list[socket.socket], clock: Clock
) -> None:
    with UDPBatchManager(open_lanes(), clock=clock) as manager:
        to = name(receivers[0])
        manager.queue_packet(to, b"first")
        manager.queue_packet(("255.255.255.255", 9), b"to all", priority=1)  # not without SO_BROADCAST
        manager.queue_packet(to, bytes(65_520))  # with IPv4's header more than 65,535
        manager.queue_packet(to, b"last")
        assert manager.flush_batches() == 2
        assert [receivers[0].recv(10) for _ in range(2)] == [b"first", b"last"]
        broadcast, long = manager.failures
        assert (broadcast.destination, broadcast.errno) == (("255.255.255.255", 9), errno.EACCES)
        assert (broadcast.priority, broadcast.size) == (1, 6)
        assert (long.destination, long.errno, long.size) == (to, errno.EMSGSIZE, 65_520)
        statistics = manager.statistics()
        assert statistics.failures == {errno.EACCES: 1, errno.EMSGSIZE: 1}
        assert (statistics.sent, statistics.bytes, statistics.waiting) == (2, 9, 0)
        assert statistics.balanced
        # Alone, too.
        manager.queue_packet(("255.255.255.255", 9), b"")
        assert manager.flush_batches() == 0
        assert len(manager.failures) == 3


def test_receiving_sends_what_is_due(open_lanes: Open, port: int) -> None:
    """What wakes it is its own packet, so it cannot have slept past the time to send that."""
    with UDPBatchManager(open_lanes(), port=port) as manager:
        for timeout in (None, DEADLINE):
            manager.queue_packet(("127.0.0.1", port), b"to myself")
            with manager.receive_batch(timeout=timeout) as batch:
                assert [bytes(payload) for payload in batch] == [b"to myself"]
        statistics = manager.statistics()
        assert statistics.attempts == {"size": 0, "time": 2, "demand": 0, "retry": 0}
        assert statistics.balanced
        with manager.receive_batch(10, timeout=0) as batch:
            assert not batch
        with manager.receive_batch(10, timeout=0.002) as batch:
            assert not batch


def test_what_is_due_within_the_millisecond_is_sent_before_sleeping(open_lanes: Open, port: int) -> None:
    with UDPBatchManager(open_lanes(), port=port, batch_timeout=0.0009) as manager:
        for _ in range(20):
            manager.queue_packet(("127.0.0.1", port), b"to myself")
            with manager.receive_batch(timeout=DEADLINE) as batch:
                assert len(batch) == 1
        assert manager.statistics().attempts["time"] == 20


def test_receiving_without_waiting_sends_nothing_early(
    open_lanes: Open, receivers: list[socket.socket], clock: Clock
) -> None:
    with UDPBatchManager(open_lanes(), clock=clock) as manager:
        manager.queue_packet(name(receivers[0]), b"later")
        clock.now += 0.0045
        manager.receive_batch(timeout=0).release()
        assert len(manager) == 1
        clock.now += 0.001
        manager.receive_batch(timeout=0).release()
        assert receivers[0].recv(10) == b"later"


def test_the_end_sends_the_rest(open_lanes: Open, receivers: list[socket.socket], clock: Clock) -> None:
    lanes = open_lanes()
    with UDPBatchManager(lanes, clock=clock) as manager:
        manager.queue_packet(name(receivers[0]), b"last words")
    assert receivers[0].recv(20) == b"last words"
    assert manager.statistics().sent == 1
    assert manager.close() == ()
    for call in (
        lambda: manager.queue_packet(name(receivers[0]), b""),
        manager.poll,
        manager.flush_batches,
        manager.receive_batch,
    ):
        with pytest.raises(ValueError, match="this batch manager is closed"):
            call()
    assert lanes.send(name(receivers[0]), [b"still open"]) == 1


def test_the_end_says_what_could_not_be_sent(open_lanes: Open, clock: Clock) -> None:
    lanes = open_lanes()
    manager = UDPBatchManager(lanes, clock=clock)
    manager.queue_packet(("255.255.255.255", 9), b"refused")
    manager.queue_packet(("127.0.0.1", 9), b"sent")
    assert [one.errno for one in manager.close()] == [errno.EACCES]
    manager = UDPBatchManager(lanes, clock=clock, batch_size=2, buffers=10)
    lanes.close()
    manager.queue_packet(("127.0.0.1", 9), b"1")
    with pytest.raises(ValueError, match="lanes are closed"):
        manager.queue_packet(("127.0.0.1", 9), b"2")
    assert manager.statistics().failed >= 1
    manager.queue_packet(("127.0.0.1", 9), b"3")
    left = manager.close()
    assert {one.errno for one in left} == {errno.EBADF}
    statistics = manager.statistics()
    assert (statistics.queued, statistics.failed, statistics.waiting) == (3, 3, 0)
    assert statistics.balanced


def test_a_socket_that_was_closed_elsewhere(
    open_lanes: Open, receivers: list[socket.socket], clock: Clock
) -> None:
    lanes = open_lanes()
    with UDPBatchManager(lanes, clock=clock) as manager:
        for sock in receivers[:3]:
            manager.queue_packet(name(sock), b"x")
        lanes._sockets[0].socket.close()
        with pytest.raises(InterfaceGoneError):
            manager.flush_batches()
        statistics = manager.statistics()
        assert statistics.balanced
        assert statistics.sent == 0
        assert statistics.failed >= 1
        assert set(statistics.failures) == {errno.EBADF}
    assert manager.statistics().waiting == 0
    assert manager.statistics().failed == 3


class Interrupted(MmsgLanes):
    """A signal handler raises while ``send_many`` has sent ``after`` packets; below 0: it does not."""

    after = -1
    told = True  # whether it got as far as to say what was not sent

    def send_many(
        self,
        fanout: Fanout,
        payloads: Buffer | Sequence[Buffer],
        *,
        port: int | None = None,
        timeout: float = 1.0,
    ) -> int:
        after, self.after = self.after, -1
        if after < 0:
            return super().send_many(fanout, payloads, port=port, timeout=timeout)
        assert isinstance(payloads, list)
        if after:
            super().send_many(Fanout(fanout.endpoints[:after]), payloads[:after], port=port, timeout=timeout)
        if self.told:
            self.failures = tuple(SendFailure(index, errno.EINTR) for index in range(after, len(fanout)))
        raise KeyboardInterrupt


@pytest.mark.parametrize(("told", "after", "failed"), [(True, 2, 0), (False, 2, 5), (True, 0, 0)])
def test_interrupted(
    port: int, receivers: list[socket.socket], clock: Clock, told: bool, after: int, failed: int
) -> None:
    """What was not sent stays, what nobody can know has failed: nothing is sent twice."""
    with Interrupted(make_policy(port)) as lanes, UDPBatchManager(lanes, clock=clock) as manager:
        for number in range(5):
            manager.queue_packet(name(receivers[number]), b"%d" % number)
        lanes.after, lanes.told = after, told
        with pytest.raises(KeyboardInterrupt):
            manager.flush_batches()
        statistics = manager.statistics()
        assert statistics.balanced
        assert (statistics.failed, statistics.sent) == (failed, 0 if failed else after)
        assert statistics.waiting == 5 - statistics.sent - failed
        assert set(statistics.failures) <= {errno.EINTR}
        clock.now += RETRY
        assert manager.poll() == statistics.waiting
        arrived = range(after if failed else 5)
        assert [receivers[number].recv(10) for number in arrived] == [b"%d" % number for number in arrived]
        assert nothing_came(*receivers)


@pytest.mark.parametrize(("told", "failures"), [(True, {}), (False, {errno.EINTR: 1})])
def test_one_alone_is_interrupted(
    port: int, receivers: list[socket.socket], clock: Clock, told: bool, failures: dict[int, int]
) -> None:
    with Interrupted(make_policy(port)) as lanes, UDPBatchManager(lanes, clock=clock) as manager:
        manager.queue_packet(name(receivers[0]), b"x")
        lanes.after, lanes.told = 0, told
        with pytest.raises(KeyboardInterrupt):
            manager.flush_batches()
        assert manager.statistics().failures == failures
        assert manager.flush_batches() == 1 - len(failures)


@pytest.mark.parametrize("seed", range(5))
def test_random_traffic_arrives_once_and_in_order(
    open_lanes: Open, receivers: list[socket.socket], clock: Clock, seed: int
) -> None:
    """In the order of queueing for each destination and priority; the counters add up at each step."""
    print("seed", seed)
    rng = random.Random(seed)
    sent: dict[tuple[int, int], list[bytes]] = defaultdict(list)
    with UDPBatchManager(open_lanes(), clock=clock, batch_size=16, buffers=40, priorities=3) as manager:
        for number in range(800):
            to, priority = rng.randrange(6), rng.randrange(3)
            payload = b"%d %d " % (priority, number) + bytes(rng.randrange(1200))
            assert manager.queue_packet(name(receivers[to]), payload, priority)
            sent[to, priority].append(payload)
            clock.now += rng.choice([0.0, 0.0001, 0.003])
            if rng.random() < 0.1:
                manager.poll()
            if rng.random() < 0.02:
                manager.flush_batches()
            statistics = manager.statistics()
            assert statistics.balanced
            assert statistics.queued == number + 1
            assert (statistics.failed, statistics.expired, statistics.refused) == (0, 0, 0)
            assert statistics.waiting == len(manager) < 16
            # Little fits a receive buffer.
            if number % 50 == 49:
                manager.flush_batches()
                _check_arrived(receivers, sent)
        assert manager.statistics().sent == 800
        assert manager.statistics().attempts["size"] > 0
        assert manager.statistics().attempts["time"] > 0


def _check_arrived(receivers: list[socket.socket], sent: dict[tuple[int, int], list[bytes]]) -> None:
    for to, receiver in enumerate(receivers):
        left = {priority: iter(sent.pop((to, priority), [])) for priority in range(3)}
        while not nothing_waits(receiver):
            payload = receiver.recv(2000)
            assert payload == next(left[int(payload[:1])])
        assert all(next(rest, None) is None for rest in left.values())


def nothing_waits(receiver: socket.socket) -> bool:
    return not select.select([receiver], [], [], 0)[0]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"port": 1}, "no socket on port 1"),
        ({"port": 0}, "not 1 to 65535"),
        ({"port": "8001"}, "not 1 to 65535"),
        ({"batch_size": 0}, "batch_size"),
        ({"batch_timeout": -1}, "batch_timeout"),
        ({"buffers": 10}, "never hold a batch of 64"),
        ({"buffer_size": 1 << 16}, "buffer_size"),
        ({"priorities": 0}, "priorities"),
        ({"maximum_age": -1}, "maximum_age"),
        ({"when_full": "wait"}, "when_full"),
    ],
)
def test_wrong_options(open_lanes: Open, options: dict[str, Any], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        UDPBatchManager(open_lanes(), **options)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((("localhost", 9), b""), "not an IP address"),
        ((("127.0.0.1", 0), b""), "port"),
        ((("127.0.0.1",), b""), "pair"),
        ((["127.0.0.1", 9], b""), "tuple"),
        (("127.0.0.1:9", b""), "pair"),
        ((("127.0.0.1", 9), "text"), "bytes-like"),
        ((("127.0.0.1", 9), bytes(1001)), "1001 bytes; a buffer has 1000"),
        ((("127.0.0.1", 9), b"", 8), "priority is 0"),
    ],
)
def test_wrong_packets_change_nothing(open_lanes: Open, arguments: Any, match: str) -> None:
    with UDPBatchManager(open_lanes(), buffer_size=1000) as manager:
        with pytest.raises(UsageError, match=match):
            manager.queue_packet(*arguments)
        assert manager.statistics().queued == manager.statistics().refused == 0


@pytest.mark.parametrize("destinations", [1, 6])
def test_packets_per_second_beside_a_call_for_each(
    open_lanes: Open, receivers: list[socket.socket], destinations: int
) -> None:
    """Prints how many times faster it is; the number of calls is what is certain."""
    lanes, payload, count = open_lanes(), bytes(1200), 64 * 50
    names = [name(receivers[number % destinations]) for number in range(count)]
    start = time.perf_counter()
    for to in names:
        lanes.send(to, [payload])
    singly = time.perf_counter() - start
    with UDPBatchManager(lanes, buffer_size=1200, batch_timeout=1.0) as manager:
        start = time.perf_counter()
        for to in names:
            manager.queue_packet(to, payload)
        batched = time.perf_counter() - start
        statistics = manager.statistics()
    assert statistics.sent == count
    assert statistics.packets_per_batch == 64
    assert statistics.calls == (count // 64 if lanes.mode == "mmsg" else count)
    print(f"{lanes.mode}, {destinations} destinations: {singly / batched:.2f} times the packets per second")
