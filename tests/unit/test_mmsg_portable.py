# SPDX-License-Identifier: Apache-2.0
"""One behaviour, two backends: recvmmsg in C and plain sockets in Python."""

from __future__ import annotations

import errno
import gc
import select
import signal
import socket
import struct
import time
import warnings
from collections.abc import Callable, Iterator
from ipaddress import ip_address

import pytest
from typing_extensions import Buffer

from userspace.datagram.batch import Batch
from userspace.datagram.mmsg import MmsgLanes
from userspace.datagram.portable import PortableLanes
from userspace.datagram.socket_statistics import SocketStatistics
from userspace.datagram.sockets import ServiceSocket, open_service_sockets
from xdp.errors import InterfaceGoneError, UsageError
from xdp.policy import Policy

Lanes = MmsgLanes | PortableLanes
Open = Callable[..., Lanes]

VOTES, BULK, LOW = range(3)
DEADLINE = 10.0  # s, for what takes microseconds


def free_port() -> int:
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as probe:
        probe.bind(("::", 0))
        port: int = probe.getsockname()[1]
        return port


def make_policy(port: int, *, vote_share: float = 0.1, bulk_share: float = 0.25, rate: str = "") -> Policy:
    return Policy.parse(
        f"""
version = 1
default_class = "unknown"
[rings]
frame_size = 2048
[[lane]]
name = "votes"
share = {vote_share}
[[lane]]
name = "bulk"
share = {bulk_share}
{rate}
[[lane]]
name = "low"
share = 0.02
[[class]]
name = "staked"
prefixes = ["127.0.0.2/32", "::1/128"]
[[class]]
name = "enemy"
prefixes = ["127.0.0.66/32"]
deny = true
[[class]]
name = "limited"
prefixes = ["127.0.0.77/32"]
peer_rate = 1
peer_burst = 3
over = "demote"
demote = "low"
[[service]]
name = "turbine"
ports = [{port}]
[[service.kind]]
name = "vote"
match = [{{ offset = 0, mask = "ff", value = "56" }}]
[[service.kind]]
name = "never"
match = [{{ offset = 0, mask = "ffff", value = "4e4e" }}]
[[service.rule]]
kind = "heartbeat"
class = "staked"
action = "reply"
lane = "votes"
[[service.rule]]
class = "staked"
kind = "vote"
action = "lane"
lane = "votes"
[[service.rule]]
kind = "never"
action = "drop"
[[service.rule]]
kind = "heartbeat"
action = "pass"
[[service.rule]]
action = "lane"
lane = "bulk"
"""
    )


@pytest.fixture(params=[MmsgLanes, PortableLanes], ids=["mmsg", "portable"])
def backend(request: pytest.FixtureRequest) -> type[Lanes]:
    chosen: type[Lanes] = request.param
    return chosen


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def open_lanes(backend: type[Lanes], port: int) -> Iterator[Open]:
    opened: list[Lanes] = []

    def make(policy: Policy | None = None, **options: object) -> Lanes:
        lanes = backend(policy or make_policy(port), **options)  # type: ignore[arg-type]
        opened.append(lanes)
        return lanes

    yield make
    for lanes in opened:
        lanes.close()


class Sender:
    """A socket on an address of its own, so that it has a class of its own."""

    def __init__(self, port: int, host: str = "127.0.0.2") -> None:
        self.sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
        self.sock.bind((host, 0))
        self.to = ("::1" if ":" in host else "127.0.0.1", port)
        self.name = (ip_address(host), self.sock.getsockname()[1])

    def send(self, *payloads: bytes) -> None:
        for payload in payloads:
            self.sock.sendto(payload, self.to)

    def __enter__(self) -> Sender:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()


def collect(lanes: Lanes, count: int) -> list[tuple[int, bytes]]:
    """(lane, payload) of exactly ``count`` datagrams."""
    found: list[tuple[int, bytes]] = []
    deadline = time.monotonic() + DEADLINE
    while len(found) < count and time.monotonic() < deadline:
        with lanes.receive(64, timeout=0.2) as batch:
            found.extend((batch.lanes[i], bytes(batch[i])) for i in range(len(batch)))
    assert len(found) == count
    return found


def settled(lanes: Lanes, received: int) -> SocketStatistics:
    """Statistics once ``received`` datagrams were taken from the sockets; what is queued stays queued."""
    deadline = time.monotonic() + DEADLINE
    while lanes.statistics().received < received and time.monotonic() < deadline:
        lanes.try_receive(1).release()
    return lanes.statistics()


def test_columns_say_what_the_policy_says(open_lanes: Open, port: int) -> None:
    lanes = open_lanes()
    before = time.monotonic_ns()
    with Sender(port) as staked, Sender(port, "127.0.0.5") as stranger, Sender(port, "::1") as six:
        expected: dict[bytes, tuple[object, ...]] = {}
        for sender, payload, lane, class_id, kind, number in (
            (staked, b"V from staked", VOTES, 1, 1, 0),
            (stranger, b"V from stranger", BULK, 0, 1, 0),
            (staked, b"other from staked", BULK, 1, 0, 0),
            (six, b"V over IPv6", VOTES, 1, 1, 0),
            (stranger, b"", BULK, 0, 0, 0),
        ):
            sender.send(payload)
            expected[payload] = (lane, class_id, kind, number, sender.name)
        seen: dict[bytes, tuple[object, ...]] = {}
        last_lane = 0
        while len(seen) < len(expected):
            with lanes.receive(timeout=DEADLINE) as batch:
                assert len(batch)
                for i, view in enumerate(batch):
                    assert batch.services[i] == 1
                    assert before <= batch.times[i] <= time.monotonic_ns()
                    assert bytes(batch.data[batch.offsets[i] :][: batch.lengths[i]]) == view
                    facts = (batch.lanes[i], batch.classes[i], batch.kinds[i], batch.peers[i])
                    seen[bytes(view)] = (*facts, batch.source(i))
                    last_lane = max(last_lane, batch.lanes[i])
        assert seen == expected
    statistics = lanes.statistics()
    assert statistics.balanced
    assert statistics.delivered == statistics.received == len(expected)


def test_highest_lane_first_with_a_share_for_all(open_lanes: Open, port: int) -> None:
    lanes = open_lanes(make_policy(port, vote_share=0.1, bulk_share=0.25))
    with Sender(port) as sender:
        mix(lanes, sender)
        sender.send(*[b"bulk"] * 40, *[b"V"] * 40)
        with lanes.receive(20, timeout=DEADLINE) as batch:
            order = list(batch.lanes)
    assert order == sorted(order)
    assert order.count(BULK) == 5  # a quarter of 20, although 39 votes wait
    assert order.count(VOTES) == 15


def mix(lanes: Lanes, sender: Sender) -> None:
    """Let it see that several lanes have traffic; from then on it reads ahead for a second."""
    sender.send(b"V", b"bulk", b"V")
    collect(lanes, 3)


def test_an_unread_lane_starves_nobody(open_lanes: Open, port: int) -> None:
    quota = 64
    lanes = open_lanes(quota=quota)
    with Sender(port) as sender:
        held: list[Batch] = []
        for _ in range(10):
            sender.send(*[b"bulk"] * 50)
            batch = lanes.receive(50, timeout=0.05)
            held.append(batch)
        assert sum(map(len, held)) == quota  # no more than its quota, however long it floods
        for number in range(200):
            vote = b"V%d" % number
            sender.send(b"bulk", vote)
            assert collect(lanes, 1) == [(VOTES, vote)]
        statistics = settled(lanes, 10 * 50 + 2 * 200)
        assert statistics.lanes[BULK].held == quota
        assert statistics.dropped == {"lane_full": 10 * 50 + 200 - quota}
        assert statistics.lanes[BULK].dropped == 10 * 50 + 200 - quota
        assert statistics.balanced
        for batch in held:
            batch.release()
        sender.send(b"bulk again")
        assert collect(lanes, 1) == [(BULK, b"bulk again")]
    census = lanes.census()
    assert census["held"] == census["queued"] == 0


def test_counts_add_up_whatever_arrives(open_lanes: Open, port: int) -> None:
    lanes = open_lanes()
    probe = struct.pack("!IB3xQQQ", 0x534C4842, 1, 7, 8, 9)
    with (
        Sender(port) as staked,
        Sender(port, "127.0.0.66") as enemy,
        Sender(port, "127.0.0.77") as limited,
        Sender(port, "127.0.0.5") as stranger,
    ):
        enemy.send(*[b"V"] * 5)
        limited.send(*[b"x"] * 7)
        stranger.send(b"NN", b"NN", probe)
        staked.send(probe, b"V")
        staked.sock.settimeout(DEADLINE)
        found = collect(lanes, 8)
        assert staked.sock.recv(100) == probe[:4] + b"\x02" + probe[5:]
    assert sorted(lane for lane, _ in found) == [VOTES] + [BULK] * 3 + [LOW] * 4
    statistics = lanes.statistics()
    assert statistics.received == 17
    assert statistics.replied == 1
    assert statistics.discarded == {"drop_denied": 5, "drop_policy": 2, "pass_policy": 1}
    assert statistics.balanced


def test_lane_limit_drops_and_is_counted(open_lanes: Open, port: int) -> None:
    lanes = open_lanes(make_policy(port, rate="rate = 1\nburst = 4"))
    with Sender(port, "127.0.0.5") as stranger:
        stranger.send(*[b"x"] * 10)
        assert len(collect(lanes, 4)) == 4
        statistics = settled(lanes, 10)
    assert statistics.discarded == {"drop_lane_limit": 6}
    assert statistics.balanced


@pytest.mark.parametrize("host", ["127.0.0.2", "::1"])
def test_long_datagrams_arrive_whole(open_lanes: Open, port: int, host: str) -> None:
    lanes = open_lanes()
    longest = 65507 if ":" not in host else 65527
    sizes = [2047, 2048, 2049, 9000, 40_000, longest]
    payloads = [b"V" + bytes((i * 7 + size) & 0xFF for i in range(size - 1)) for size in sizes]
    with Sender(port, host) as sender:
        sender.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        for payload in payloads:
            sender.send(payload)
            assert collect(lanes, 1) == [(VOTES, payload)]
        # small ones around a long one keep their order
        sender.send(b"V1", payloads[3], b"V2")
        assert [payload for _, payload in collect(lanes, 3)] == [b"V1", payloads[3], b"V2"]
    assert lanes.statistics().balanced
    assert lanes.census()["held"] == 0


def test_truncated_is_dropped_and_counted(open_lanes: Open, port: int) -> None:
    lanes = open_lanes(frame_size=512, large_frames=0)
    with Sender(port) as sender:
        sender.send(b"V" * 512, b"V" * 513, b"V" * 60_000, b"V")
        assert [len(payload) for _, payload in collect(lanes, 2)] == [512, 1]
    statistics = lanes.statistics()
    assert statistics.dropped == {"truncated": 2}
    assert statistics.balanced


def test_large_frames_of_one_lane_do_not_run_out_for_another(open_lanes: Open, port: int) -> None:
    lanes = open_lanes(large_frames=2)
    with Sender(port) as sender:
        sender.send(*[b"bulk" * 1000] * 5)
        settled_batch = lanes.receive(10, timeout=DEADLINE)
        statistics = settled(lanes, 5)
        assert statistics.dropped == {"no_large_frame": 3}
        sender.send(b"V" * 5000)
        assert collect(lanes, 1) == [(VOTES, b"V" * 5000)]
        settled_batch.release()
        sender.send(b"bulk" * 1000)
        assert collect(lanes, 1) == [(BULK, b"bulk" * 1000)]
    assert lanes.statistics().balanced


def test_waiting(open_lanes: Open, port: int) -> None:
    lanes = open_lanes()
    start = time.monotonic()
    with lanes.receive(timeout=0.05) as batch:
        assert len(batch) == 0
    assert 0.045 <= time.monotonic() - start < DEADLINE
    assert len(lanes.try_receive()) == 0
    with select.epoll() as poller, Sender(port) as sender:
        poller.register(lanes.fileno(), select.EPOLLIN)
        assert poller.poll(0) == []
        sender.send(b"V1")
        assert poller.poll(DEADLINE)
        collect(lanes, 1)
        assert poller.poll(0) == []


def test_descriptor_stays_readable_while_datagrams_are_queued(open_lanes: Open, port: int) -> None:
    lanes = open_lanes()
    with select.epoll() as poller, Sender(port) as sender:
        mix(lanes, sender)
        sender.send(b"bulk", b"bulk", b"V", b"V")
        with lanes.receive(1, timeout=DEADLINE) as batch:
            assert batch.lanes[0] == VOTES  # it read all four
        statistics = lanes.statistics()
        assert (statistics.received, statistics.queued) == (7, 3)
        poller.register(lanes.fileno(), select.EPOLLIN)
        for left in (3, 2, 1):
            assert poller.poll(0), f"{left} are queued, though the sockets are empty"
            with lanes.receive(1, timeout=0) as batch:
                assert len(batch) == 1
        assert poller.poll(0) == []


def test_a_signal_handler_ends_the_wait(open_lanes: Open) -> None:
    lanes = open_lanes()

    class EnoughError(Exception):
        pass

    def handler(_signal: int, _frame: object) -> None:
        raise EnoughError

    before = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(EnoughError):
            lanes.receive(timeout=None)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert len(lanes.try_receive()) == 0


def test_a_signal_that_is_handled_does_not_cut_the_wait_short(open_lanes: Open) -> None:
    lanes = open_lanes()
    rung: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda number, _frame: rung.append(number))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
        start = time.monotonic()
        assert len(lanes.receive(timeout=0.15)) == 0
        assert time.monotonic() - start >= 0.149
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert len(rung) >= 3


def test_a_signal_gets_through_while_everything_is_dropped(open_lanes: Open, port: int) -> None:
    lanes = open_lanes()

    class EnoughError(Exception):
        pass

    with Sender(port, "127.0.0.66") as enemy:
        rings = 0

        def handler(_signal: int, _frame: object) -> None:
            nonlocal rings
            rings += 1
            enemy.send(*[b"x"] * 20)
            if rings == 10:
                raise EnoughError

        before = signal.signal(signal.SIGALRM, handler)
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.005, 0.005)
            with pytest.raises(EnoughError):
                lanes.receive(timeout=None)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
    statistics = settled(lanes, 200)
    assert statistics.discarded == {"drop_denied": 200}


def test_what_the_kernel_refuses_is_skipped(open_lanes: Open, port: int) -> None:
    lanes = open_lanes()
    with Sender(port) as receiver:
        payloads: list[Buffer] = [b"a", b"b" * 70_000, b"c", bytearray(b"d"), memoryview(b"e"), b"f" * 66_000]
        assert lanes.send(receiver.name, payloads) == 4
        assert [(failure.index, failure.errno) for failure in lanes.failures] == [
            (1, errno.EMSGSIZE),
            (5, errno.EMSGSIZE),
        ]
        receiver.sock.settimeout(DEADLINE)
        assert [receiver.sock.recv(100) for _ in range(4)] == [b"a", b"c", b"d", b"e"]
        assert lanes.send(receiver.name, [b"x"] * 300) == 300
        assert lanes.failures == ()
        name = receiver.sock.recvfrom(10)[1]
        assert name[1] == port
    statistics = lanes.statistics()
    assert (statistics.sent, statistics.send_failed) == (304, 2)


def test_six_from_a_four_socket_fails_by_index(open_lanes: Open, port: int) -> None:
    sockets = open_service_sockets([port], host="127.0.0.1")
    lanes = open_lanes(sockets=sockets)
    assert lanes.send(("::1", 9), [b"a", b"b"]) == 0
    assert [failure.errno for failure in lanes.failures] == [errno.EAFNOSUPPORT] * 2


def test_errors_of_earlier_datagrams_stop_nothing(open_lanes: Open, port: int) -> None:
    lanes = open_lanes(sockets=(sockets := open_service_sockets([port], host="127.0.0.1")))
    sock = sockets[0].socket
    sock.setsockopt(socket.IPPROTO_IP, 11, 1)  # IP_RECVERR: unconnected sockets hear of ICMP errors
    closed = free_port()
    with Sender(port) as receiver:
        for _ in range(20):
            assert lanes.send(("127.0.0.1", closed), [b"nobody there"]) == 1
            assert lanes.send(receiver.name, [b"1", b"2"]) == 2
        receiver.sock.settimeout(DEADLINE)
        assert [receiver.sock.recv(10) for _ in range(40)] == [b"1", b"2"] * 20
        assert lanes.statistics().asynchronous_errors > 0
        assert lanes.send(("127.0.0.1", closed), [b"nobody there"]) == 1
        receiver.send(b"V")
        assert collect(lanes, 1) == [(VOTES, b"V")]
    statistics = lanes.statistics()
    assert statistics.errors > 0
    assert statistics.balanced


def test_echo_goes_back_to_each_sender(open_lanes: Open, port: int) -> None:
    lanes = open_lanes()
    with Sender(port) as one, Sender(port, "127.0.0.5") as two, Sender(port, "::1") as three:
        for number, sender in enumerate((one, two, three)):
            sender.send(b"V%d" % number)
        echoed = 0
        while echoed < 3:
            with lanes.receive(timeout=DEADLINE) as batch:
                echoed += lanes.send_back(batch)
        for number, sender in enumerate((one, two, three)):
            sender.sock.settimeout(DEADLINE)
            assert sender.sock.recv(10) == b"V%d" % number


def test_a_batch_can_be_sent_from_where_it_lies(open_lanes: Open, port: int) -> None:
    lanes = open_lanes()
    with Sender(port) as sender, Sender(port) as receiver:
        sender.send(b"V1", b"V2" * 2000)
        receiver.sock.settimeout(DEADLINE)
        got: list[bytes] = []
        while len(got) < 2:
            with lanes.receive(timeout=DEADLINE) as batch:
                assert lanes.send(receiver.name, batch) == len(batch)
                got += [receiver.sock.recv(65536) for _ in range(len(batch))]
    assert got == [b"V1", b"V2" * 2000]


def test_views_end_with_the_batch(open_lanes: Open, port: int) -> None:
    lanes = open_lanes()
    with Sender(port) as sender:
        sender.send(b"Vote")
        batch = lanes.receive(timeout=DEADLINE)
        view, column = batch[0], batch.lengths
        part = view[1:]
        with pytest.raises(BufferError, match="packet 0"):
            batch.release()
        part.release()
        del part
        batch.release()
        for gone in (view, column):
            with pytest.raises(ValueError, match="released"):
                bytes(gone)
        with pytest.raises(ValueError, match="given back"):
            batch.release()
    assert lanes.census()["held"] == 0


def test_a_forgotten_batch_comes_back(open_lanes: Open, port: int) -> None:
    lanes = open_lanes()
    with Sender(port) as sender:
        sender.send(b"Vote")
        batch = lanes.receive(timeout=DEADLINE)
        assert len(batch) == 1
        assert lanes.census()["held"] == 1
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            del batch
            gc.collect()
        assert len(lanes.try_receive()) == 0
    assert lanes.census()["held"] == 0


def test_a_full_socket_buffer_is_reported(open_lanes: Open, port: int) -> None:
    sockets = open_service_sockets([port], receive_buffer=8192)
    lanes = open_lanes(sockets=sockets)
    with Sender(port) as sender:
        sender.send(*[b"V" * 100] * 500)
        received = 0
        while batch := lanes.try_receive():
            received += len(batch)
            batch.release()
    statistics = lanes.statistics()
    assert statistics.overflowed > 0
    assert statistics.received == received
    assert received + statistics.overflowed == 500
    assert statistics.balanced


def test_a_new_policy_keeps_what_peers_have_used(open_lanes: Open, port: int) -> None:
    lanes = open_lanes()
    with Sender(port, "127.0.0.77") as limited, Sender(port, "127.0.0.5") as stranger:
        limited.send(*[b"x"] * 3)
        assert {lane for lane, _ in collect(lanes, 3)} == {BULK}
        text_policy = make_policy(port, rate="rate = 1000000\nburst = 1000")
        lanes.swap(text_policy)
        assert lanes.policy is text_policy
        limited.send(b"y")
        assert collect(lanes, 1) == [(LOW, b"y")]  # its burst is still used up
        stranger.send(b"z")
        assert collect(lanes, 1) == [(BULK, b"z")]
    statistics = lanes.statistics()
    assert statistics.balanced
    other = Policy.parse(
        f'version = 1\n[[lane]]\nname = "only"\n[[service]]\nname = "s"\nports = [{port}]\n'
        '[[service.rule]]\naction = "lane"\nlane = "only"\n[[class]]\nname = "c"\nprefixes = ["10.0.0.0/8"]\n'
    )
    with pytest.raises(UsageError, match="other lanes"):
        lanes.swap(other)


def test_several_ports_take_turns(backend: type[Lanes]) -> None:
    ports = sorted({free_port() for _ in range(4)})
    policy = make_policy(ports[0])
    service = policy.services[0]
    policy = type(policy)(
        lanes=policy.lanes,
        classes=policy.classes,
        services=(type(service)(name="s", ports=tuple(ports), kinds=service.kinds, rules=service.rules),),
    )
    with backend(policy) as lanes:
        assert lanes.ports == tuple(ports)
        assert lanes.status()["mode"] == backend.mode
        for port in ports:
            with Sender(port) as sender:
                sender.send(*[b"V%d" % port] * 100)
        found = [payload for _, payload in collect(lanes, 100 * len(ports))]
        assert {payload: found.count(payload) for payload in found} == {b"V%d" % port: 100 for port in ports}
        assert {int(payload[1:]) for payload in found[: 64 * len(ports)]} == set(ports)
        with pytest.raises(UsageError, match="no socket on port"):
            lanes.send(("127.0.0.1", 9), [b""], port=1)
        assert lanes.send(("127.0.0.1", ports[1]), [b"x"], port=ports[2]) == 1
        with lanes.receive(timeout=DEADLINE) as batch:
            assert batch.source(0)[1] == ports[2]


def test_closed_means_closed(open_lanes: Open, port: int) -> None:
    lanes = open_lanes()
    with Sender(port) as sender:
        sender.send(b"Vote")
        batch = lanes.receive(timeout=DEADLINE)
        lanes.close()
        lanes.close()
        assert bytes(batch[0]) == b"Vote"  # what is held stays readable
        batch.release()
    for call in (lanes.receive, lanes.fileno, lanes.statistics, lambda: lanes.send(("127.0.0.1", 9), [b""])):
        with pytest.raises(ValueError, match="closed"):
            call()
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as again:
        again.bind(("::", port))  # nothing holds the port any more


def test_a_socket_closed_elsewhere_is_said(open_lanes: Open, port: int) -> None:
    sockets = open_service_sockets([port])
    lanes = open_lanes(sockets=[ServiceSocket(port, sockets[0].socket)])
    sockets[0].socket.close()
    with pytest.raises(InterfaceGoneError, match="can't be written"):
        lanes.send(("127.0.0.1", 9), [b"x"])


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda lanes: lanes.receive(0), "maximum"),
        (lambda lanes: lanes.receive(1 << 17), "maximum"),
        (lambda lanes: lanes.send(("localhost", 9), [b""]), "not an IP address"),
        (lambda lanes: lanes.send(("127.0.0.1", 0), [b""]), "port"),
        (lambda lanes: lanes.send(("127.0.0.1", 70000), [b""]), "port"),
        (lambda lanes: lanes.send(("fe80::1%nonesuch", 9), [b""]), "no interface"),
        (lambda lanes: lanes.send(("127.0.0.1", 9), ["text"]), "bytes-like"),
    ],
)
def test_wrong_arguments(open_lanes: Open, call: Callable[[Lanes], object], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        call(open_lanes())


@pytest.mark.parametrize("options", [{"frame_size": 63}, {"frame_size": 65537}])
def test_wrong_sizes(open_lanes: Open, options: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="out of range"):
        open_lanes(**options)
