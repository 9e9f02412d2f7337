# SPDX-License-Identifier: Apache-2.0
"""Several receive queues: every packet arrives once, whichever it came in on, and sums hold by queue."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator

import pytest

from sluice_cli.generator import Generator, Stream
from sluice_cli.traffic import Template, udp_frame
from tests.traffic.served import (
    ALPHA,
    APP,
    BETA,
    DATA,
    HIGH,
    LOW,
    POLICY,
    SECONDS,
    Served,
    serving,
    steered,
    until,
)
from userspace.datagram.xsk_lanes import XskLanes

pytestmark = [pytest.mark.root, pytest.mark.bpf]

COUNT = 3000  # of each lane and queue
RATE = 20_000
STAMP = 2


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving("native", POLICY, queues=2) as made:
        yield made


@pytest.fixture(scope="module")
def generators(served: Served) -> Iterator[list[Generator]]:
    """On two CPUs: a veth's queue is the sending CPU modulo queues.  On one where there is but one."""
    cpus = (sorted(os.sched_getaffinity(0)) * 2)[:2]
    made = [Generator(served.lab.client, cpu=cpu) for cpu in cpus]
    yield made
    for generator in made:
        generator.close()


def streams(served: Served) -> list[Stream]:
    lab = served.lab
    return [
        Stream(
            [Template(udp_frame(lab.client, lab.server, APP, first + bytes(63)), stamp=STAMP)],
            rate=RATE,
            count=COUNT,
            backlog=10.0,
            name=str(lane),
        )
        for lane, first in ((HIGH, ALPHA), (DATA, BETA), (LOW, b"\0"))
    ]


def take(lanes: XskLanes, found: Counter[tuple[int, int]], enough: Callable[[], bool]) -> None:
    """Count (lane, sequence number)."""
    deadline = time.monotonic() + SECONDS
    while not enough() and time.monotonic() < deadline:
        with lanes.receive(256, timeout=0.02) as batch:
            if batch:
                numbers = batch.gather(STAMP, 8)
                found.update(zip(batch.lanes, numbers, strict=True))


def test_all_queues_of_one_object(served: Served, generators: list[Generator]) -> None:
    assert served.lanes.queue_numbers == (0, 1)
    before = served.lanes.statistics()
    expected = 3 * COUNT * len(generators)
    for generator in generators:
        generator.start(streams(served), SECONDS)
    found: Counter[tuple[int, int]] = Counter()
    take(served.lanes, found, lambda: found.total() >= expected)
    sent = [generator.wait(SECONDS) for generator in generators]
    assert all(result.sent == 3 * COUNT and result.refused == 0 for result in sent)
    assert found.total() == expected
    # Each generator numbers its packets from 0: every number came once from each.
    assert set(found.values()) == {len(generators)}
    assert Counter(lane for lane, _ in found.elements()) == dict.fromkeys((HIGH, DATA, LOW), 2 * COUNT)
    after = served.lanes.statistics()
    by_queue = [
        sum(lane.received for lane in new.lanes) - sum(lane.received for lane in old.lanes)
        for new, old in zip(after.queues, before.queues, strict=True)
    ]
    if len({generator.cpu % 2 for generator in generators}) == 2:
        assert by_queue == [3 * COUNT, 3 * COUNT]
    counters = served.counters()
    for lane, name in enumerate(("high", "data", "low")):
        of_lane = after.lane(name)
        assert steered(counters, lane) == of_lane.received
        assert of_lane.ring_full == of_lane.dropped == of_lane.waiting == 0


def test_one_thread_for_each_queue(served: Served, generators: list[Generator]) -> None:
    """After split() each thread has its queue, with all its lanes, to itself."""
    parts = served.lanes.split()
    assert [part.queue_numbers for part in parts] == [(0,), (1,)]
    found: list[Counter[tuple[int, int]]] = [Counter(), Counter()]
    stop = threading.Event()

    threads = [
        threading.Thread(target=take, args=(part, into, stop.is_set), daemon=True)
        for part, into in zip(parts, found, strict=True)
    ]
    for thread in threads:
        thread.start()
    for generator in generators:
        generator.start(streams(served), SECONDS)
    for generator in generators:
        assert generator.wait(SECONDS).refused == 0
    expected = 3 * COUNT * len(generators)
    try:
        until(lambda: sum(one.total() for one in found) == expected, "all packets in the threads")
    finally:
        stop.set()
        for thread in threads:
            thread.join(SECONDS)
    assert not any(thread.is_alive() for thread in threads)
    assert set((found[0] + found[1]).values()) == {len(generators)}
    if len({generator.cpu % 2 for generator in generators}) == 2:
        assert [one.total() for one in found] == [3 * COUNT, 3 * COUNT]
    assert all(frames.balanced for frames in served.lanes.frames())
