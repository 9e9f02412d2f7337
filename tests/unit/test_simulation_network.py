# SPDX-License-Identifier: Apache-2.0
"""Flows in a network: what arrives, what is acknowledged, what is counted, and that a seed replays."""

from __future__ import annotations

import math
from typing import Any

import pytest

from tests.documents import ROOT, blocks
from userspace.flow.congestion import Ack, Congestion, Loss, minimum_window
from userspace.simulation.disciplines import CoDelQueue, PriorityQueue, TailDrop
from userspace.simulation.engine import TooManyEventsError
from userspace.simulation.faults import BurstLoss, Faults, Outage, RandomLoss
from userspace.simulation.flow_sender import BIN
from userspace.simulation.network import Network
from xdp.errors import UsageError

RATE = 1.25e6  # bytes/s: 10 Mb/s
SIZE = 1200


class Fixed:
    """A window that nothing changes."""

    name = "fixed"
    every_packet = True
    pacing_rate: float | None = None
    ssthresh: int | None = None

    def __init__(self, window: int) -> None:
        self.window = window
        self.told: list[tuple[str, float]] = []

    def on_sent(self, now: float, size: int, in_flight: int, *, app_limited: bool) -> None:
        assert in_flight >= size  # probes go beyond the window

    def on_ack(self, now: float, ack: Ack) -> None:
        self.told.append(("ack", now))

    def on_loss(self, now: float, loss: Loss) -> None:
        self.told.append(("loss", now))

    def on_ecn(self, now: float, marked: int, largest_sent_at: float) -> None:
        self.told.append(("ecn", now))

    def on_spurious(self, now: float) -> None:
        self.told.append(("spurious", now))

    def on_persistent(self, now: float) -> None:
        self.told.append(("persistent", now))

    def on_mtu(self, mtu: int) -> None:
        raise AssertionError


class Windows:
    """Makes controllers with a window of so many packets, and keeps them."""

    def __init__(self, packets: int) -> None:
        self.packets = packets
        self.made: list[Fixed] = []

    def __call__(self, now: float, mtu: int, seed: int) -> Congestion:
        assert self.packets * mtu >= minimum_window(mtu)
        self.made.append(Fixed(self.packets * mtu))
        return self.made[-1]


def told(windows: Windows, what: str) -> list[float]:
    return [now for kind, now in windows.made[0].told if kind == what]


def test_a_window_a_round_trip() -> None:
    """Ten packets every 100 ms and what they take to send: goodput to the packet."""
    network = Network(seconds=10.0)
    link = network.link("link", rate=RATE, delay=0.05, queue=TailDrop(limit_packets=100))
    windows = Windows(10)
    network.flow("one", (link,), controller=windows, back=0.05)
    network.run()
    record = network.flows[0]
    assert record.rtt == pytest.approx(0.1)
    # A round trip of the window takes the path's 100 ms and the length of two packets, one acknowledgement.
    rounds = 10.0 / (0.1 + 2 * SIZE / RATE)
    assert record.received == pytest.approx(10 * rounds, rel=0.03)
    assert record.received_bytes == sum(record.goodput) == SIZE * record.received
    assert not network.lost(0)
    assert record.probes == 0
    assert all(value == 10 * SIZE for value in record.window)
    assert max(record.in_flight) <= 10 * SIZE
    assert not told(windows, "loss")


def test_every_second_packet_is_acknowledged_and_single_ones_after_a_while() -> None:
    network = Network(seconds=2.0)
    link = network.link("link", rate=RATE, delay=0.01, queue=TailDrop(limit_packets=100))
    windows = Windows(2)
    sender = network.flow("one", (link,), controller=windows, back=0.01, end=0.0001)
    network.run()
    assert sender.record.sent == sender.record.received == 2
    assert len(told(windows, "ack")) == 1
    network = Network(seconds=2.0)
    link = network.link("link", rate=RATE, delay=0.01, queue=TailDrop(limit_packets=1),
                        faults=Faults(network.random("x"), losses=(Outage(0.0015, 1.0),)))  # fmt: skip
    windows = Windows(2)
    network.flow("one", (link,), controller=windows, back=0.01, end=0.0001)
    network.run()
    # The first came at 0.01096, the second never; 25 ms after the first that is told.
    assert told(windows, "ack")[0] == pytest.approx(0.01 + SIZE / RATE + 0.025 + 0.01)


def test_losses_are_what_the_sender_hears_of() -> None:
    network = Network(seconds=10.0, seed=3)
    faults = Faults(network.random("faults"), losses=(RandomLoss(0.02),))
    link = network.link("link", rate=RATE, delay=0.05, queue=TailDrop(limit_packets=100), faults=faults)
    windows = Windows(20)
    sender = network.flow("one", (link,), controller=windows, back=0.05)
    network.run()
    record = network.flows[0]
    assert sender.controller is not None
    snapshot = sender.controller.snapshot()
    lost = network.lost(0)["random"]
    assert 20 < lost < 80
    assert lost - 5 <= snapshot.lost_packets <= lost  # the latest can't be known yet
    assert snapshot.sent_packets == record.sent
    assert snapshot.spurious_packets == 0


def test_an_outage_is_sat_out_by_probes() -> None:
    network = Network(seconds=6.0)
    faults = Faults(network.random("faults"), losses=(Outage(1.0, 3.0),))
    link = network.link("link", rate=RATE, delay=0.02, queue=TailDrop(limit_packets=100), faults=faults)
    windows = Windows(20)
    network.flow("one", (link,), controller=windows, back=0.02, back_faults=faults)
    network.run()
    record = network.flows[0]
    assert 2 <= record.probes < 12
    assert sum(record.goodput[11:30]) == 0
    assert sum(record.goodput[45:55]) > 0.2 * RATE
    assert set(network.lost(0)) == {"outage"}
    assert told(windows, "persistent")


def test_duplicates_and_damage_are_told_apart() -> None:
    network = Network(seconds=5.0, seed=4)
    faults = Faults(network.random("faults"), duplicate=0.1, corrupt=0.05)
    back = Faults(network.random("back"), duplicate=0.1, corrupt=0.05)
    link = network.link("link", rate=RATE, delay=0.02, queue=TailDrop(limit_packets=100), faults=faults)
    network.flow("one", (link,), controller=Windows(20), back=0.02, back_faults=back)
    network.run()
    record = network.flows[0]
    assert record.duplicates > 50
    assert network.lost(0) == {"corrupted": record.corrupted}
    assert record.acks_damaged > 20
    assert record.received + record.corrupted - record.sent <= link.duplicated


def test_marks_come_back_to_senders_that_asked() -> None:
    for ect in (True, False):
        network = Network(seconds=2.0)
        link = network.link("link", rate=RATE, delay=0.02, queue=CoDelQueue(limit_packets=500, ecn=True))
        windows = Windows(100)
        network.flow("one", (link,), controller=windows, back=0.02, ect=ect)
        network.run()
        assert bool(network.flows[0].marked) == bool(told(windows, "ecn")) == ect
        assert network.lost(0).get("codel", 0) == link.lost_by_reason().get("codel", 0)
        assert bool(network.lost(0)) == bool(told(windows, "loss")) == (not ect)


def test_overtaken_packets_are_noticed_as_not_lost() -> None:
    network = Network(seconds=10.0, seed=2)
    faults = Faults(network.random("faults"), reorder=0.01, reorder_delay=0.02)
    link = network.link("link", rate=RATE, delay=0.05, queue=TailDrop(limit_packets=500), faults=faults)
    windows = Windows(100)
    network.flow("one", (link,), controller=windows, back=0.05)
    network.run()
    assert not network.lost(0)
    assert told(windows, "spurious")


def test_flows_begin_and_end_when_told() -> None:
    network = Network(seconds=4.0)
    link = network.link("link", rate=RATE, delay=0.01, queue=TailDrop(limit_packets=100))
    sender = network.flow("late", (link,), controller=Windows(4), back=0.01, begin=1.0, end=2.0)
    network.run()
    record = network.flows[0]
    assert sender.controller is not None
    assert sum(record.goodput[:10]) == sum(record.goodput[21:]) == 0
    assert sum(record.goodput[10:20]) > 0
    assert record.window[5] == 0
    assert record.in_flight[-1] == 0


def test_two_bottlenecks_and_a_wire() -> None:
    network = Network(seconds=5.0)
    first = network.link("first", rate=RATE, delay=0.01, queue=TailDrop(limit_packets=20))
    wire = network.wire("wire", delay=0.01, faults=Faults(network.random("w"), losses=(RandomLoss(0.01),)))
    second = network.link("second", rate=RATE / 2, delay=0.01, queue=TailDrop(limit_packets=20))
    network.flow("both", (first, wire, second), controller=Windows(60), back=0.01)
    network.flow("one", (second,), controller=Windows(10), back=0.01)
    network.run()
    assert network.flows[0].rtt == pytest.approx(0.04)
    assert second.delivered > 0.9 * RATE / 2 / SIZE * 5
    assert set(network.lost(0)) == {"full", "random"}
    assert network.packets == sum(record.sent for record in network.flows)


def test_sources_of_all_priorities() -> None:
    """The highest class loses nothing, whatever the lowest sends; sources keep to their rates."""
    network = Network(seconds=5.0, seed=1)
    link = network.link("link", rate=RATE, queue=PriorityQueue(classes=2, limit_packets=50))
    network.source("high", (link,), rate=RATE / 4, priority=0)
    network.source("low", (link,), rate=RATE * 4, priority=1, begin=1.0, end=4.0)
    network.run()
    high, low = network.flows
    assert high.sent == pytest.approx(RATE / 4 * 5 / SIZE, rel=0.03)
    assert low.sent == pytest.approx(RATE * 4 * 3 / SIZE, rel=0.03)
    assert not network.lost(0)
    assert set(network.lost(1)) == {"overflow"}  # the oldest, not the new ones
    assert (high.controller, len(high.window)) == ("", 0)


def test_damage_on_the_way_of_a_source() -> None:
    network = Network(seconds=2.0, seed=1)
    wire = network.wire("wire", delay=0.0, faults=Faults(network.random("faults"), corrupt=0.5))
    network.source("one", (wire,), rate=RATE)
    network.run()
    record = network.flows[0]
    assert record.corrupted + record.received == record.sent
    assert network.lost(0) == {"corrupted": record.corrupted}


def trace(seed: int) -> tuple[Any, ...]:
    network = Network(seconds=1.0, seed=seed)
    faults = Faults(network.random("faults"), losses=(BurstLoss(0.01, 0.3),), jitter=0.002, duplicate=0.01)
    link = network.link("link", rate=RATE, delay=0.02, queue=CoDelQueue(limit_packets=100), faults=faults)
    for number in range(3):
        network.flow(f"{number}", (link,), controller="cubic", back=0.01 * (number + 1))
    network.source("source", (link,), rate=RATE / 10)
    network.run()
    assert link.log is not None
    records = [(r.sent, r.received, list(r.window), list(r.goodput)) for r in network.flows]
    return records, list(link.log.times), list(link.log.delays), network.engine.events


def test_a_seed_replays_exactly() -> None:
    assert trace(5) == trace(5)
    assert trace(5) != trace(6)


def test_progress_and_samples() -> None:
    network = Network(seconds=1.05)
    link = network.link("link", rate=RATE, queue=TailDrop(limit_packets=100))
    network.at(0.55, link.set_rate, RATE / 2)
    told: list[float] = []
    network.run(told.append)
    assert told == pytest.approx([BIN * number for number in range(1, 11)])
    assert list(network.links[0].capacity) == pytest.approx(
        [RATE * BIN] * 5 + [RATE * BIN * 0.75] + [RATE * BIN / 2] * 4
    )
    assert network.engine.now == 1.05


@pytest.mark.parametrize("tenths", range(1, 30))
def test_a_length_of_any_number_of_bins(tenths: int) -> None:
    network = Network(seconds=tenths / 10)
    network.link("link", rate=RATE, queue=TailDrop(limit_packets=1))
    network.run()
    assert len(network.links[0].capacity) == tenths
    assert sum(network.links[0].capacity) == pytest.approx(RATE * tenths / 10)


def test_a_lost_packet_is_noticed() -> None:
    network = Network(seconds=1.0)
    link = network.link("link", rate=RATE, queue=TailDrop(limit_packets=100))
    network.flow("one", (link,), controller=Windows(4), back=0.01)
    network.run()
    network.flows[0].received -= 1
    with pytest.raises(AssertionError, match="sent, but"):
        network.check()


def test_too_many_events() -> None:
    network = Network(seconds=10.0, max_events=1000)
    link = network.link("link", rate=RATE, queue=TailDrop(limit_packets=100))
    network.flow("one", (link,), controller=Windows(4), back=0.01)
    with pytest.raises(TooManyEventsError):
        network.run()


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.nan, math.inf, 1e9, "1"])
def test_no_length(seconds: Any) -> None:
    with pytest.raises(UsageError, match="seconds"):
        Network(seconds=seconds)


def test_mistakes() -> None:
    network = Network(seconds=1.0)
    for begin, end in ((-1.0, 1.0), (1.0, 0.5), (math.nan, 1.0)):
        with pytest.raises(UsageError, match="begins"):
            network.source("one", (), rate=1.0, begin=begin, end=end)
    for rate in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(UsageError, match="rate"):
            network.source("one", (), rate=rate)
    for size in (0, -1, 1.5, 70_000):
        with pytest.raises(UsageError, match="size"):
            network.source("one", (), rate=1.0, size=size)  # type: ignore[arg-type]


def test_flows_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("userspace.simulation.network.MAX_FLOWS", 2)
    network = Network(seconds=1.0)
    for _ in range(2):
        network.source("one", (), rate=1000.0)
    with pytest.raises(UsageError, match="at most 2 flows"):
        network.source("one", (), rate=1000.0)


def test_the_example_in_the_documents(capsys: pytest.CaptureFixture[str]) -> None:
    """docs/flow.md: a network of one's own."""
    (block,) = [
        one
        for one in blocks(ROOT / "docs" / "flow.md")
        if one.language == "python" and "userspace.simulation" in one.text
    ]
    exec(compile(block.text, "docs/flow.md", "exec"), {})
    rate = float(capsys.readouterr().out.split()[0])
    assert 0.9 * RATE < rate <= RATE
