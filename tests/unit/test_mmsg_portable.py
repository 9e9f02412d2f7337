# SPDX-License-Identifier: Apache-2.0
"""One behaviour, two backends, receiving: lanes, counts, waiting, batches."""

from __future__ import annotations

import gc
import select
import signal
import socket
import struct
import time
import warnings

import pytest

from tests.unit.socket_backends import (
    BULK,
    DEADLINE,
    LOW,
    VOTES,
    Lanes,
    Open,
    Sender,
    backend,
    collect,
    make_policy,
    open_lanes,
    port,
    settled,
)
from userspace.datagram.batch import Batch
from userspace.datagram.sockets import open_service_sockets
from xdp.errors import UsageError
from xdp.policy import Policy

__all__ = ["backend", "open_lanes", "port"]  # fixtures: in use, though only as arguments


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
    poller = select.poll()
    with Sender(port) as sender:
        poller.register(lanes.fileno(), select.POLLIN)
        assert poller.poll(0) == []
        sender.send(b"V1")
        assert poller.poll(DEADLINE * 1000)
        collect(lanes, 1)
        assert poller.poll(0) == []


def test_descriptor_stays_readable_while_datagrams_are_queued(open_lanes: Open, port: int) -> None:
    lanes = open_lanes()
    poller = select.poll()
    with Sender(port) as sender:
        mix(lanes, sender)
        sender.send(b"bulk", b"bulk", b"V", b"V")
        with lanes.receive(1, timeout=DEADLINE) as batch:
            assert batch.lanes[0] == VOTES  # it read all four
        statistics = lanes.statistics()
        assert (statistics.received, statistics.queued) == (7, 3)
        poller.register(lanes.fileno(), select.POLLIN)
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
            # Not a timer that repeats: on a busy machine it would interrupt the handler itself.
            signal.setitimer(signal.ITIMER_REAL, 0.005)

        before = signal.signal(signal.SIGALRM, handler)
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.005)
            with pytest.raises(EnoughError):
                lanes.receive(timeout=None)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
    statistics = settled(lanes, 200)
    assert statistics.discarded == {"drop_denied": 200}


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


def test_lingering_waits_for_more_while_packets_come_fast(
    open_lanes: Open, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What comes meanwhile is in the batch; no sleep after a full batch or none, or when packets are few."""
    lanes = open_lanes()
    slept: list[float] = []
    with Sender(port) as sender:

        def sleep(seconds: float) -> None:
            slept.append(seconds)
            sender.send(*[b"meanwhile"] * 5)

        monkeypatch.setattr(time, "sleep", sleep)
        sizes = []
        # So long that two packets are always expected meanwhile, and so short that they never are.
        long, short = 60.0, 1e-9
        for sent, linger in ((40, long), (0, long), (3, long), (1, long), (2, short), (0, short), (0, long)):
            sender.send(*[b"x"] * sent)
            with lanes.receive(32, timeout=0, linger=linger) as batch:
                sizes.append(len(batch))
    # After a full batch the rest is there at once; the empty one says that nothing comes.
    assert sizes == [32, 8, 3 + 5, 1 + 5, 2, 0, 0]
    assert slept == [long] * 2
