# SPDX-License-Identifier: Apache-2.0
"""Every way that packets take, on two queues, and each payload compared byte for byte.

The other tests go into the corners of each way; this one is short, and counts.  Its numbers are in the
report (``--junit-xml``), from which `sluice lab vm` makes its table: there the same tests run on cards whose
drivers have zero-copy, and here on a veth pair.
"""

from __future__ import annotations

import contextlib
import random
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import pytest

from sluice_cli.generator import Generator, Stream
from sluice_cli.lab import Lab
from sluice_cli.traffic import STAMP_BYTES, Template, udp_frame
from tests.cable import NATIVE
from tests.traffic.served import (
    ALPHA,
    APP,
    BETA,
    BURST,
    DATA,
    ECHO,
    HIGH,
    LOW,
    POLICY,
    SECONDS,
    SO_RCVBUFFORCE,
    Served,
    serving_in,
    steered,
)
from userspace.datagram.fanout import Fanout

pytestmark = [pytest.mark.root, pytest.mark.bpf]

SEED = 11
COUNT = 2048  # packets of each way
SIZES = range(24, 1473)  # of payloads
FLOWS = 16  # source ports, so that both queues get some
STAMP = 2
FLOOD_SECONDS = 1.0
FLOOD, VOTE_RATE = 60_000.0, 1000.0  # packets per second; the flood is more than its ring can take

Record = Callable[[str, object], None]


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    policy = POLICY.replace('name = "low"', 'name = "low"\nring = 64', 1)
    with (
        Lab(queues=2, static_neighbours=True) as lab,
        serving_in(lab, "native", policy) as made,
    ):
        yield made


@pytest.fixture
def record(served: Served, record_property: Record) -> Iterator[Record]:
    """For numbers of this way; the mode is read back from the sockets (XDP_OPTIONS) when they are opened."""
    assert served.lanes.mode == NATIVE
    assert served.lanes.queue_numbers == (0, 1)
    record_property("mode", served.lanes.mode)
    record_property("queues", len(served.lanes.queue_numbers))
    yield record_property
    assert served.counters().balanced
    frames = served.lanes.frames()
    assert all(one.balanced and not any(one.application) for one in frames)
    record_property("frames", sum(one.total for one in frames))


@pytest.fixture
def clients(served: Served) -> Iterator[list[socket.socket]]:
    with contextlib.ExitStack() as stack, served.lab.client.enter():
        made = []
        for _ in range(FLOWS):
            sock = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            sock.bind((str(served.lab.client.ipv4), 0))
            # A card's driver may take a page for each packet, and the buffer's limit counts these.
            sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 8 << 20)
            sock.settimeout(SECONDS)
            made.append(sock)
        yield made


def payloads(first: bytes = b"\0") -> list[bytes]:
    """Of all lengths and none like another: first bytes, number, noise."""
    noise = random.Random(SEED)
    return [
        first + number.to_bytes(4, "big") + noise.randbytes(noise.choice(SIZES) - 4 - len(first))
        for number in range(COUNT)
    ]


def bursts(items: Sequence[bytes]) -> Iterator[Sequence[bytes]]:
    for start in range(0, len(items), BURST):
        yield items[start : start + BURST]


def ask(clients: Sequence[socket.socket], served: Served, port: int, burst: Sequence[bytes]) -> None:
    for number, payload in enumerate(burst):
        clients[number % FLOWS].sendto(payload, (str(served.lab.server.ipv4), port))


def test_receive(served: Served, clients: list[socket.socket], record: Record) -> None:
    before = served.counters()
    sent, found = payloads(), []
    for burst in bursts(sent):
        ask(clients, served, APP, burst)
        packets = served.receive(len(burst))
        assert {packet.lane for packet in packets} == {LOW}
        found += [packet.payload for packet in packets]
    assert Counter(found) == Counter(sent)
    assert served.counters().steered - before.steered == len(sent)
    record("sent", len(sent))
    record("received", len(found))
    record("intact", len(found))


def test_several_sockets_of_a_queue(served: Served, clients: list[socket.socket], record: Record) -> None:
    """Each queue has a socket for each lane, and they share its frames: every packet is in its own lane."""
    before = served.lanes.statistics()
    expected: Counter[tuple[int, bytes]] = Counter()
    found: Counter[tuple[int, bytes]] = Counter()
    kinds = ((HIGH, ALPHA), (DATA, BETA), (LOW, b"\0"))
    made = [payloads(first) for _, first in kinds]
    for start in range(0, COUNT, BURST // 4):
        burst = [
            (lane, payload)
            for (lane, _), own in zip(kinds, made, strict=True)
            for payload in own[start : start + BURST // 4]
        ]
        expected.update(burst)
        ask(clients, served, APP, [payload for _, payload in burst])
        found.update((packet.lane, packet.payload) for packet in served.receive(len(burst)))
    assert found == expected
    after = served.lanes.statistics()
    by_queue = [
        tuple(new.received - old.received for new, old in zip(one.lanes, earlier.lanes, strict=True))
        for one, earlier in zip(after.queues, before.queues, strict=True)
    ]
    assert [sum(lane) for lane in zip(*by_queue, strict=True)] == [COUNT] * 3
    # Which queue a packet comes to is the interface's choice; on a veth it is the sending CPU's.
    for queue, lanes in enumerate(by_queue):
        record(f"queue {queue}", sum(lanes))
        assert not NATIVE.endswith("zero-copy") or all(lanes), by_queue
    record("sent", 3 * COUNT)
    record("received", found.total())
    record("intact", found.total())


def test_send(served: Served, clients: list[socket.socket], record: Record) -> None:
    before = served.lanes.statistics()
    sent, found = payloads(), []
    with served.lab.server.enter():
        for burst in bursts(sent):
            assert served.lanes.send(clients[0].getsockname(), burst, port=ECHO) == len(burst)
            found += [clients[0].recv(2048) for _ in burst]
    assert sorted(found) == sorted(sent)
    assert served.lanes.flush()
    after = served.lanes.statistics()
    assert after.sent - before.sent == len(sent)
    assert sum(q.completed for q in after.queues) == after.sent + sum(q.echoed for q in after.queues)
    record("sent", len(sent))
    record("received", len(found))
    record("intact", len(found))


def test_echo(served: Served, clients: list[socket.socket], record: Record) -> None:
    before = sum(queue.echoed for queue in served.lanes.statistics().queues)
    sent, count = payloads(), 0
    for burst in bursts(sent):
        ask(clients, served, ECHO, burst)
        left = len(burst)
        while left:
            with served.lanes.receive(timeout=SECONDS) as batch:
                assert batch
                for view in batch:
                    view[0] = 0xFF
                left -= served.lanes.send_back(batch)
        for flow, client in enumerate(clients):
            own = burst[flow::FLOWS]
            assert sorted(client.recv(2048) for _ in own) == sorted(b"\xff" + one[1:] for one in own)
            count += len(own)
    assert served.lanes.flush()
    queues = served.lanes.statistics().queues
    assert sum(queue.echoed for queue in queues) - before == len(sent)
    assert all(queue.transmit_invalid == queue.echo_refused == 0 for queue in queues)
    record("sent", len(sent))
    record("received", count)
    record("intact", count)


def test_fan_out(served: Served, clients: list[socket.socket], record: Record) -> None:
    before = served.lanes.statistics().sent
    fanout = Fanout(client.getsockname() for client in clients)
    sent = payloads()[: COUNT // FLOWS]
    count = 0
    for payload in sent:
        with served.lab.server.enter():
            assert served.lanes.send_many(fanout, payload, port=ECHO) == FLOWS
        for client in clients:
            assert client.recv(2048) == payload
            count += 1
    assert served.lanes.flush()
    assert served.lanes.statistics().sent - before == count  # all by AF_XDP, none through the kernel
    record("sent", len(sent) * FLOWS)
    record("received", count)
    record("intact", count)


def test_flood(served: Served, record: Record) -> None:
    """The low lane overflows all the time; of the high one nothing is missing, and the sums are right."""
    lab = served.lab
    vote = ALPHA + b"!" + bytes(STAMP_BYTES) + random.Random(SEED).randbytes(200)
    votes = Template(udp_frame(lab.client, lab.server, APP, vote), stamp=STAMP)
    flood = Template(udp_frame(lab.client, lab.server, APP, b"\0" + vote[1:]))
    before, sockets = served.counters(), served.lanes.statistics()
    numbers: list[int] = []
    low = 0
    with Generator(lab.client) as generator:
        generator.start(
            [
                Stream([votes], rate=VOTE_RATE, ports=FLOWS, backlog=10.0, name="high"),
                Stream([flood], rate=FLOOD, ports=FLOWS, name="low"),
            ],
            FLOOD_SECONDS,
        )

        def take(timeout: float) -> None:
            nonlocal low
            with served.lanes.receive(16, timeout=timeout) as batch:
                for lane, view in zip(batch.lanes, batch, strict=True):
                    if lane != HIGH:
                        low += 1
                        continue
                    payload = bytes(view)
                    assert payload[:STAMP] == vote[:STAMP]
                    assert payload[STAMP + STAMP_BYTES :] == vote[STAMP + STAMP_BYTES :]
                    numbers.append(int.from_bytes(payload[STAMP : STAMP + 8], sys.byteorder))

        while generator.running:
            take(0.02)
            time.sleep(0.005)  # the work that makes the low lane overflow
        result = generator.wait(SECONDS)
    deadline = time.monotonic() + SECONDS
    while any(served.lanes.statistics().lane(name).waiting for name in ("high", "data", "low")):
        assert time.monotonic() < deadline
        take(0.1)
    after, statistics = served.counters(), served.lanes.statistics()
    high_sent, low_sent = (stream.sent for stream in result.streams)
    seen = [after.lanes[lane].seen.packets - before.lanes[lane].seen.packets for lane in (HIGH, LOW)]
    lost = statistics.lane("low").ring_full - sockets.lane("low").ring_full
    assert len(numbers) == len(set(numbers)) == seen[0] == steered(after, HIGH) - steered(before, HIGH)
    assert statistics.lane("high").ring_full == sockets.lane("high").ring_full
    assert seen[1] == low + lost
    assert lost > 0
    record("sent", high_sent)
    record("received", len(numbers))
    record("intact", len(numbers))
    record("seen", seen[0])
    record("flood sent", low_sent)
    record("flood seen", seen[1])
    record("flood received", low)
    record("flood ring full", lost)
    record("lost before the program", high_sent + low_sent - sum(seen))
    # What the interface had no room for is gone before anybody can tell a vote from the flood.
    assert high_sent == seen[0] or high_sent + low_sent > sum(seen)
