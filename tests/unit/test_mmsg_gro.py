# SPDX-License-Identifier: Apache-2.0
"""Datagrams that come together (UDP_GRO) are as if each had come by itself.

On loopback those that were sent in one message (UDP_SEGMENT) arrive in one.
"""

from __future__ import annotations

import random
import select
import struct
from collections.abc import Iterator

import pytest

from tests.unit.socket_backends import DEADLINE, free_port, make_policy
from userspace.datagram.mmsg import MmsgLanes
from userspace.datagram.sockets import open_service_sockets

#: Of the class "staked", whose heartbeats are answered.
STAKED = "127.0.0.2"


@pytest.fixture
def lanes() -> Iterator[MmsgLanes]:
    with MmsgLanes(make_policy(free_port()), gro=True) as made:
        yield made


@pytest.fixture
def peer() -> Iterator[MmsgLanes]:
    """Somebody who sends many in one message."""
    port = free_port()
    with MmsgLanes(make_policy(port), open_service_sockets([port], host=STAKED)) as made:
        yield made


def here(lanes: MmsgLanes) -> tuple[str, int]:
    return ("127.0.0.1", lanes.ports[0])


def take(lanes: MmsgLanes, count: int, maximum: int = 256) -> list[tuple[int, bytes]]:
    found: list[tuple[int, bytes]] = []
    while len(found) < count:
        with lanes.receive(maximum, timeout=DEADLINE) as batch:
            assert 0 < len(batch) <= maximum
            found += [(batch.lanes[i], bytes(payload)) for i, payload in enumerate(batch)]
    return found


def test_each_is_classified_and_counted_by_itself(lanes: MmsgLanes, peer: MmsgLanes) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    total = 0
    for _ in range(50):
        length = rng.choice((1, 22, 100, 1232, 2047, 2048, 2049, 9000))
        payloads = [
            b"XV"[rng.randrange(2) :][:1] + rng.randbytes(length - 1) for _ in range(rng.randrange(1, 20))
        ]
        payloads[-1] = payloads[-1][: rng.randrange(1, length + 1)]
        assert peer.send(here(lanes), payloads) == len(payloads)
        total += len(payloads)
        found = take(lanes, len(payloads), rng.choice((1, 5, 256)))
        for lane, kind in ((0, b"V"), (1, b"X")):
            # Within a lane the order stays.
            assert [payload for number, payload in found if number == lane] == [
                payload for payload in payloads if payload[:1] == kind
            ]
    statistics = lanes.statistics()
    assert statistics.balanced
    assert statistics.received == statistics.delivered == total
    assert total * 0.5 < statistics.shared <= total
    assert lanes.census()["held"] == 0


def test_what_is_left_of_a_message_waits_and_is_announced(lanes: MmsgLanes, peer: MmsgLanes) -> None:
    payloads = [b"V%03d" % number for number in range(60)]
    assert peer.send(here(lanes), payloads) == 60
    found: list[tuple[int, bytes]] = []
    while len(found) < 60:
        assert select.select([lanes], [], [], DEADLINE)[0]
        with lanes.try_receive(7) as batch:
            found += [(batch.lanes[i], bytes(payload)) for i, payload in enumerate(batch)]
            assert lanes.statistics().balanced
    assert found == [(0, payload) for payload in payloads]
    assert not select.select([lanes], [], [], 0)[0]
    assert lanes.statistics().shared == 60


def test_columns_of_those_that_came_together(lanes: MmsgLanes, peer: MmsgLanes) -> None:
    assert peer.send(here(lanes), [b"V%03d" % number for number in range(30)]) == 30
    with lanes.receive(timeout=DEADLINE) as batch:
        assert len(batch) == 30
        assert len(set(batch.times)) == 1
        assert {batch.source(i) for i in range(30)} == {batch.source(0)}
        assert str(batch.source(0)[0]) == STAKED
        assert list(batch.gather(1, 3)) == [int.from_bytes(b"%03d" % number) for number in range(30)]
        for payload in batch:
            payload[:1] = b"A"
        assert lanes.send_back(batch) == 30
    assert [payload for _, payload in take(peer, 30)] == [b"A%03d" % number for number in range(30)]


def probe(number: int) -> bytes:
    return struct.pack("!IB3xQQQ", 0x534C4842, 1, number, 8, 9)


def test_heartbeats_that_come_together_are_answered(lanes: MmsgLanes, peer: MmsgLanes) -> None:
    assert peer.send(here(lanes), [probe(number) for number in range(20)]) == 20
    with lanes.try_receive() as batch:
        assert not batch
    statistics = lanes.statistics()
    assert (statistics.replied, statistics.received, statistics.shared) == (20, 20, 20)
    assert statistics.balanced


def test_heartbeats_behind_something_else_are_not(lanes: MmsgLanes, peer: MmsgLanes) -> None:
    """The socket's filter saw the first of the message only: the others may have come by broadcast."""
    assert peer.send(here(lanes), [bytes(32), *(probe(number) for number in range(20))]) == 21
    assert take(lanes, 1) == [(1, bytes(32))]
    statistics = lanes.statistics()
    assert (statistics.replied, statistics.dropped) == (0, {"reply_failed": 20})
    assert statistics.balanced
    # By itself each is answered.
    assert peer.send(here(lanes), [probe(1)]) == 1
    assert not lanes.try_receive()
    assert lanes.statistics().replied == 1


def test_a_lane_that_is_full_drops_and_says_so(peer: MmsgLanes) -> None:
    with MmsgLanes(make_policy(free_port()), quota=16, gro=True) as lanes:
        assert peer.send(here(lanes), [b"Vote"] * 60) == 60
        with lanes.receive(256, timeout=DEADLINE) as batch:
            assert len(batch) == 16
        statistics = lanes.statistics()
        assert statistics.dropped == {"lane_full": 44}
        assert statistics.balanced


def test_companions_count_what_they_read(peer: MmsgLanes) -> None:
    """With a budget datagrams come one by one, so that it holds."""
    with MmsgLanes(make_policy(free_port()), budget=4, gro=True) as lanes:
        assert peer.send(here(lanes), [b"Vote"] * 60) == 60
        with lanes.receive(256, timeout=DEADLINE) as batch:
            assert len(batch) == 4
        assert lanes.statistics().shared == 0
