# SPDX-License-Identifier: Apache-2.0
"""What flow control takes: memory for ten thousand peers, none that grows, and the benchmark of its time."""

from __future__ import annotations

import gc
import json
import tracemalloc

import pytest
from click.testing import CliRunner

from sluice_cli.bench_flow import IN_FLIGHT, RANGES, flow, run_aioquic, run_sluice, trace
from userspace.flow.controller import FlowController
from userspace.flow.registry import CONTROLLERS
from userspace.flow.window import ReorderBuffer, SlidingWindow

PEERS = 300
#: Of ten thousand controllers: 50 MB.
BYTES_EACH = 5000


def taken(*, congestion: str, packets: int) -> float:
    """Bytes of a controller, after so many packets of which none is on its way any more."""
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        flows = [FlowController(0.0, congestion=congestion, seed=number) for number in range(PEERS)]
        for one in flows:
            for number in range(packets):
                one.on_packet_sent(0.0, 1200)
                one.on_ack_received(0.05, [(number, number)])
        gc.collect()
        return (tracemalloc.get_traced_memory()[0] - before) / len(flows)
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("congestion", sorted(CONTROLLERS))
def test_ten_thousand_peers_fit_into_50_megabytes(congestion: str) -> None:
    new = taken(congestion=congestion, packets=0)
    used = taken(congestion=congestion, packets=3)
    print(f"{congestion}: {new:.0f} bytes when new, {used:.0f} in use")
    assert new < BYTES_EACH
    assert used < BYTES_EACH


@pytest.mark.parametrize("loss", [0.0, 0.01])
def test_nothing_grows_with_the_packets(loss: float) -> None:
    flow_controller = FlowController(0.0, congestion="newreno")
    sizes = []
    tracemalloc.start()
    try:
        for number, (now, ranges) in enumerate(trace(8_000, loss)):
            flow_controller.on_packet_sent(now, 1200)
            if ranges is not None:
                flow_controller.on_ack_received(now, ranges)
            if number in (3_000, 7_999):
                gc.collect()
                sizes.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    # The trace itself is in it.
    snapshot = flow_controller.snapshot()
    assert snapshot.packets_in_flight < IN_FLIGHT + RANGES
    assert len(flow_controller._sent.slots) <= 256
    assert len(flow_controller._recovery._lost) <= 100
    assert abs(sizes[1] - sizes[0]) < 100_000


def test_nothing_is_made_by_looking() -> None:
    for one in (FlowController(0.0), SlidingWindow(), ReorderBuffer()):
        assert not hasattr(one, "__dict__")


def test_the_benchmark_tells_both_of_the_same() -> None:
    events = trace(2000, 0.05, seed=3)
    acknowledged = [ranges for _, ranges in events if ranges is not None]
    assert max(map(len, acknowledged)) == RANGES
    for ranges in acknowledged:
        assert all(first <= last for first, last in ranges)
        assert list(ranges) == sorted(ranges, reverse=True)
    assert run_sluice(events, "newreno") > 0
    assert run_aioquic(events, "reno") > 0


def test_the_benchmark_prints_a_row_for_each_case() -> None:
    short = ["--packets", "1000", "--rounds", "1"]
    result = CliRunner().invoke(flow, [*short, "--json"])
    assert result.exit_code == 0
    rows = json.loads(result.stdout)["results"]
    assert [(row["controller"], row["loss"]) for row in rows] == [
        ("newreno", 0.0), ("cubic", 0.0), ("newreno", 0.01), ("cubic", 0.01)
    ]  # fmt: skip
    assert all(row["ratio"] > 0 for row in rows)
    result = CliRunner().invoke(flow, short)
    assert "newreno" in result.stdout
