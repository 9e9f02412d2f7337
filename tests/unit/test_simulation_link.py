# SPDX-License-Identifier: Apache-2.0
"""Links: when packets arrive, to the microsecond; what is lost; and counters that always add up."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from userspace.simulation.disciplines import CoDelQueue, FairQueue, PriorityQueue, TailDrop
from userspace.simulation.engine import Engine
from userspace.simulation.faults import BurstLoss, Faults, Outage, RandomLoss
from userspace.simulation.link import MAX_DELAY, MAX_RATE, Discipline, Link
from userspace.simulation.packet import Packet, Route
from xdp.errors import UsageError

Arrivals = list[tuple[float, int]]


class End:
    """Notes what arrives, and when."""

    def __init__(self) -> None:
        self.arrivals: Arrivals = []
        self.packets: list[Packet] = []

    def deliver(self, now: float, packet: Packet) -> None:
        self.arrivals.append((round(now, 9), packet.sequence))
        self.packets.append(packet)


def route(*links: Link, flow: int = 0) -> tuple[End, Route]:
    end = End()
    return end, Route(flow, links, end.deliver)


def send_all(engine: Engine, way: Route, packets: list[tuple[float, int]]) -> None:
    """(when, bytes) of each."""

    def send(now: float, packet: Packet) -> None:
        way.send(now, packet)

    for number, (when, size) in enumerate(packets):
        engine.at(when, send, Packet(way, number, size))


def big(limit: int = 1_000_000) -> TailDrop:
    return TailDrop(limit_bytes=limit)


def test_a_packet_takes_its_length_and_the_delay() -> None:
    engine = Engine()
    link = Link(engine, "link", rate=1000.0, delay=0.25, queue=big(), log=True)
    end, way = route(link)
    send_all(engine, way, [(0.0, 100), (0.0, 200), (1.0, 100)])
    engine.run(10.0)
    # Sent from 0 to 0.1, 0.1 to 0.3, 1 to 1.1.
    assert end.arrivals == [(0.35, 0), (0.55, 1), (1.35, 2)]
    assert link.log is not None
    assert [round(delay, 9) for delay in link.log.delays] == [0.0, 0.1, 0.0]
    assert [round(time, 9) for time in link.log.times] == [0.0, 0.1, 1.0]
    link.check()


def test_links_in_a_row() -> None:
    engine = Engine()
    fast = Link(engine, "fast", rate=1000.0, delay=0.1, queue=big())
    slow = Link(engine, "slow", rate=100.0, queue=big())
    wire = Link(engine, "wire", rate=None, delay=1.0)
    end, way = route(fast, slow, wire)
    send_all(engine, way, [(0.0, 100), (0.0, 100)])
    engine.run(10.0)
    # The slow one is reached at 0.2 and 0.3, and is busy for a second with each.
    assert end.arrivals == [(2.2, 0), (3.2, 1)]
    for link in (fast, slow, wire):
        link.check()
        assert (link.sent, link.delivered) == (2, 2)


def test_no_links_at_all() -> None:
    end, way = route()
    way.send(0.5, Packet(way, 7, 100))
    assert end.arrivals == [(0.5, 7)]


def test_a_queue_in_bytes_and_in_packets() -> None:
    for queue in (TailDrop(limit_bytes=250), TailDrop(limit_packets=2)):
        engine = Engine()
        link = Link(engine, "link", rate=100.0, queue=queue)
        end, way = route(link)
        send_all(engine, way, [(0.0, 100)] * 5)  # the first is being sent when the second comes
        engine.run(0.5)
        assert link.lost == {(0, "full"): 2}
        assert (link.queued, link.queued_bytes, link.on_wire) == (2, 200, 1)
        link.check()
        engine.run(10.0)
        assert end.arrivals == [(1.0, 0), (2.0, 1), (3.0, 2)]
        assert link.lost_by_reason() == {"full": 2}


def test_a_rate_that_changes() -> None:
    engine = Engine()
    link = Link(engine, "link", rate=100.0, queue=big())
    end, way = route(link)
    send_all(engine, way, [(0.0, 100)] * 4)
    engine.at(0.5, link.set_rate, 200.0)  # the first goes on as it began
    engine.at(1.7, link.set_rate, 0)  # so does the third: then all waits
    engine.at(5.0, link.set_rate, 1000)
    engine.run(1.6)
    assert link.take_capacity(engine.now) == pytest.approx(0.5 * 100 + 1.1 * 200)
    engine.run(10.0)
    assert end.arrivals == [(1.0, 0), (1.5, 1), (2.0, 2), (5.1, 3)]
    assert link.take_capacity(engine.now) == pytest.approx(0.1 * 200 + 5 * 1000)
    assert link.rate == 1000


def test_a_delay_that_changes_keeps_the_order() -> None:
    engine = Engine()
    link = Link(engine, "link", rate=None, delay=1.0)
    end, way = route(link)
    send_all(engine, way, [(0.0, 10), (0.5, 10), (2.0, 10)])
    engine.at(0.25, link.set_delay, 0.1)
    engine.run(10.0)
    assert end.arrivals == [(1.0, 0), (1.0, 1), (2.1, 2)]


def test_jitter_is_bounded_and_keeps_the_order() -> None:
    engine = Engine(seed=3)
    faults = Faults(engine.random("faults"), jitter=0.05)
    link = Link(engine, "link", rate=None, delay=0.1, faults=faults)
    end, way = route(link)
    sent = [(number / 100, 10) for number in range(500)]
    send_all(engine, way, sent)
    engine.run(10.0)
    assert [number for _, number in end.arrivals] == list(range(500))
    extra = [arrival - sent[number][0] - 0.1 for arrival, number in end.arrivals]
    assert min(extra) >= 0
    assert 0.04 < max(extra) <= 0.05
    assert len({round(value, 6) for value in extra}) > 200


def test_what_is_held_back_is_overtaken() -> None:
    engine = Engine(seed=5)
    faults = Faults(engine.random("faults"), reorder=0.1, reorder_delay=0.035)
    link = Link(engine, "link", rate=None, delay=0.1, faults=faults)
    end, way = route(link)
    send_all(engine, way, [(number / 100, 10) for number in range(1000)])
    engine.run(20.0)
    late = [number for arrival, number in end.arrivals if arrival > number / 100 + 0.1001]
    assert 50 < len(late) < 160
    for number in late:
        order = [found for _, found in end.arrivals]
        overtakers = [found for found in order[: order.index(number)] if found > number]
        assert set(overtakers) >= {n for n in range(number + 1, min(1000, number + 4)) if n not in late}
    link.check()


def test_duplicates_and_damage() -> None:
    engine = Engine(seed=5)
    faults = Faults(engine.random("faults"), duplicate=0.1, corrupt=0.2)
    link = Link(engine, "link", rate=None, delay=0.1, faults=faults)
    end, way = route(link)
    send_all(engine, way, [(number / 100, 10) for number in range(1000)])
    engine.run(0.55)
    link.check()  # with some on the wire
    engine.run(20.0)
    assert len(end.packets) == 1000 + link.duplicated
    assert 60 < link.duplicated < 150
    assert 150 < sum(packet.corrupt for packet in end.packets) < 290
    assert {packet.sequence for packet in end.packets} == set(range(1000))
    link.check()


def test_copies_go_their_own_way() -> None:
    """A duplicate made by the first link passes the second one like any packet."""
    engine = Engine(seed=5)
    first = Link(engine, "1", rate=None, delay=0.1, faults=Faults(engine.random("1"), duplicate=1.0))
    second = Link(engine, "2", rate=100.0, delay=0.1, queue=big(), log=True)
    end, way = route(first, second)
    send_all(engine, way, [(0.0, 100)])
    engine.run(20.0)
    assert end.arrivals == [(1.2, 0), (2.2, 0)]
    for link in (first, second):
        link.check()


def test_losses_are_told_by_flow_and_reason() -> None:
    engine = Engine(seed=5)
    faults = Faults(engine.random("faults"), losses=(Outage(0.0, 1.0), RandomLoss(0.5), BurstLoss(0.1, 0.5)))
    link = Link(engine, "link", rate=1000.0, queue=TailDrop(limit_packets=10), faults=faults)
    ways = [route(link, flow=number) for number in range(2)]
    for _, way in ways:
        send_all(engine, way, [(number // 8 * 0.5, 50) for number in range(200)])
    engine.run(20.0)
    assert {reason for _, reason in link.lost} == {"outage", "random", "burst", "full"}
    assert sum(link.lost_by_reason().values()) == link.lost.total() == 400 - link.delivered
    for number, (end, _) in enumerate(ways):
        lost = sum(count for (flow, _), count in link.lost.items() if flow == number)
        assert len(end.packets) + lost == 200
    link.check()


def test_a_packet_that_is_nowhere_is_noticed() -> None:
    engine = Engine()
    link = Link(engine, "link", rate=1000.0, queue=big())
    _, way = route(link)
    send_all(engine, way, [(0.0, 100)])
    engine.run(1.0)
    link.delivered -= 1
    with pytest.raises(AssertionError, match="1 sent"):
        link.check()


def disciplines() -> list[Callable[[], Discipline]]:
    return [
        lambda: TailDrop(limit_bytes=5_000, limit_packets=6),
        lambda: CoDelQueue(limit_packets=20, target=0.01, interval=0.1, ecn=True),
        lambda: FairQueue(limit_packets=15, ecn=True),
        lambda: PriorityQueue(classes=3, limit_packets=7),
    ]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000),
    make=st.sampled_from(disciplines()),
    packets=st.lists(
        st.tuples(st.floats(0, 3), st.integers(1, 1500), st.integers(0, 2), st.booleans()), max_size=150
    ),
    rates=st.lists(st.tuples(st.floats(0, 3), st.sampled_from([0.0, 1e3, 1e5, 1e7])), max_size=4),
    chances=st.tuples(*[st.sampled_from([0.0, 0.2, 1.0])] * 4),
)
def test_counters_add_up(
    seed: int, make: Callable[[], Discipline], packets: list[Any], rates: list[Any], chances: Any
) -> None:
    """Whatever happens, at any time, and at the end everything that was not lost has arrived."""
    engine = Engine(seed=seed)
    duplicate, corrupt, reorder, loss = chances
    faults = Faults(
        engine.random("faults"), losses=(RandomLoss(loss / 2),), duplicate=duplicate, corrupt=corrupt,
        reorder=reorder, reorder_delay=0.01, jitter=0.02,
    )  # fmt: skip
    link = Link(engine, "link", rate=1e4, delay=0.05, queue=make(), faults=faults)
    end, way = route(link)

    def send(now: float, packet: Packet) -> None:
        way.send(now, packet)
        link.check()

    for number, (when, size, priority, ect) in enumerate(packets):
        packet = Packet(way, number, size)
        packet.priority, packet.ect = priority, ect
        engine.at(when, send, packet)
    for when, rate in rates:
        engine.at(when, link.set_rate, rate)
    engine.run(2.0)
    link.check()
    engine.at(3.5, link.set_rate, 1e7)
    engine.run(30.0)
    link.check()
    assert link.queued == link.queued_bytes == link.on_wire == 0
    assert len(end.packets) == link.delivered == len(packets) + link.duplicated - link.lost.total()
    assert all(packet.ect or not packet.ce for packet in end.packets)


@pytest.mark.parametrize("rate", [-1.0, math.nan, math.inf, MAX_RATE * 2, "1"])
def test_no_rate(rate: Any) -> None:
    with pytest.raises(UsageError, match="rate"):
        Link(Engine(), "link", rate=rate, queue=big())
    with pytest.raises(UsageError, match="rate"):
        Link(Engine(), "link", rate=1.0, queue=big()).set_rate(0.0, rate)


@pytest.mark.parametrize("delay", [-1.0, math.nan, MAX_DELAY * 2])
def test_no_delay(delay: float) -> None:
    with pytest.raises(UsageError, match="delay"):
        Link(Engine(), "link", rate=None, delay=delay)
    with pytest.raises(UsageError, match="delay"):
        Link(Engine(), "link", rate=None).set_delay(0.0, delay)


def test_a_queue_goes_with_a_rate() -> None:
    with pytest.raises(UsageError, match="queue"):
        Link(Engine(), "link", rate=1.0)
    with pytest.raises(UsageError, match="queue"):
        Link(Engine(), "link", rate=None, queue=big())
    wire = Link(Engine(), "wire", rate=None)
    with pytest.raises(UsageError, match="no rate"):
        wire.set_rate(0.0, 1.0)
    assert (wire.rate, wire.queued, wire.queued_bytes) == (math.inf, 0, 0)


@pytest.mark.parametrize("limit", [0, -1, 1.5, "1"])
def test_no_limit(limit: Any) -> None:
    with pytest.raises(UsageError, match="limit_bytes is"):
        TailDrop(limit_bytes=limit)
    with pytest.raises(UsageError, match="limit_packets is"):
        TailDrop(limit_packets=limit)
    with pytest.raises(UsageError, match="has a limit"):
        TailDrop()


def test_a_queue_in_no_link() -> None:
    """Drops are told to nobody."""
    queue = TailDrop(limit_packets=1)
    _, way = route()
    for number in range(2):
        queue.enqueue(0.0, Packet(way, number, 10))
    assert queue.packets == 1
