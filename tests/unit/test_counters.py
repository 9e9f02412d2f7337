# SPDX-License-Identifier: Apache-2.0
"""Counters from raw rows: added up over CPUs, by lane and reason, and balanced only when they are."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xdp._libbpf import ffi, lib
from xdp.abi import REASONS, category
from xdp.counters import Count, Counters, parse_counters

STEER, PASS_LANE = lib.SLUICE_STEER, lib.SLUICE_PASS_LANE


def rows(cpus: int = 2) -> Any:
    return ffi.new("struct sluice_counters[]", cpus)


def add(row: Any, lane: int, reason: int, packets: int, size: int) -> None:
    """What the program does for ``packets`` packets of ``size`` bytes in all."""
    counts = [row.seen, row.verdict[lane * lib.SLUICE_REASONS + reason]]
    if lane != lib.SLUICE_NO_LANE:
        counts.append(row.lane_seen[lane])
    for count in counts:
        count.packets += packets
        count.bytes += size


def parsed(data: Any) -> Counters:
    return parse_counters(bytes(ffi.buffer(data)))


def test_every_reason_has_a_category() -> None:
    assert len(REASONS) == len(set(REASONS)) == lib.SLUICE_REASONS
    words = {"pass": "passed", "drop": "dropped", "steer": "steered", "reply": "replied"}
    for number, name in enumerate(REASONS):
        assert getattr(lib, f"SLUICE_{name.upper()}") == number
        assert category(number) == words[name.split("_", 1)[0]]


def test_nothing() -> None:
    counters = parsed(rows())
    assert counters.balanced
    assert counters.seen == Count()
    assert counters.verdicts == counters.other == {}
    assert len(counters.lanes) == lib.SLUICE_MAX_LANES
    assert (counters.passed, counters.steered, counters.dropped, counters.replied) == (0, 0, 0, 0)


def test_rows_of_all_cpus_are_added() -> None:
    data = rows(3)
    for cpu in range(3):
        add(data[cpu], 1, STEER, 10 + cpu, 1000)
        add(data[cpu], lib.SLUICE_NO_LANE, lib.SLUICE_PASS_NOT_IP, 1, 60)
        data[cpu].strangers_created = 5
        data[cpu].limit_contended = cpu
        data[cpu].metadata_refused = 7
        data[cpu].strangers_refused = 2
    counters = parsed(data)
    assert counters.seen == Count(36, 3180)
    assert counters.lanes[1].seen == counters.lanes[1].verdicts["steer"] == Count(33, 3000)
    assert counters.other == {"pass_not_ip": Count(3, 180)}
    assert counters.verdicts == {"pass_not_ip": Count(3, 180), "steer": Count(33, 3000)}
    assert (counters.passed, counters.steered) == (3, 33)
    assert counters.strangers_created == 15
    assert counters.limit_contended == 3
    assert counters.metadata_refused == 21
    assert counters.strangers_refused == 6
    assert counters.balanced


def test_demotion_balances() -> None:
    data = rows(1)
    add(data[0], 0, STEER, 5, 500)
    data[0].demoted_from[0] = 2
    data[0].demoted_to[3] = 2
    # The rule chose lane 0 for seven, two of which ended in lane 3.
    data[0].lane_seen[0].packets += 2
    data[0].lane_seen[0].bytes += 200
    data[0].verdict[3 * lib.SLUICE_REASONS + lib.SLUICE_STEER_DEMOTED].packets = 2
    data[0].verdict[3 * lib.SLUICE_REASONS + lib.SLUICE_STEER_DEMOTED].bytes = 200
    data[0].seen.packets += 2
    data[0].seen.bytes += 200
    counters = parsed(data)
    assert counters.balanced
    assert counters.lanes[0].demoted_from == counters.lanes[3].demoted_to == 2
    data[0].demoted_to[3] = 1
    assert not parsed(data).lanes[3].balanced
    assert not parsed(data).balanced


@pytest.mark.parametrize("field", ["packets", "bytes"])
def test_one_missing_is_seen(field: str) -> None:
    data = rows()
    add(data[0], 2, PASS_LANE, 100, 6400)
    assert parsed(data).balanced
    count = data[1].verdict[lib.SLUICE_NO_LANE * lib.SLUICE_REASONS + lib.SLUICE_PASS_NOT_IP]
    count.packets, count.bytes = 1, 60
    assert not parsed(data).balanced
    setattr(data[1].seen, field, 1 if field == "packets" else 60)
    assert not parsed(data).balanced  # the other of the two is still missing
    data[1].seen.packets, data[1].seen.bytes = 1, 60
    assert parsed(data).balanced


@settings(max_examples=50)
@given(st.integers(0, 2**32 - 1), st.integers(1, 4))
def test_whatever_is_counted_properly_balances(seed: int, cpus: int) -> None:
    rng = random.Random(seed)
    data = rows(cpus)
    packets = dict.fromkeys(("passed", "steered", "dropped", "replied"), 0)
    for _ in range(100):
        lane, reason = rng.randrange(lib.SLUICE_COUNTER_ROWS), rng.randrange(lib.SLUICE_REASONS)
        amount = rng.randrange(1, 1 << 40)
        add(data[rng.randrange(cpus)], lane, reason, amount, 60 * amount)
        packets[category(reason)] += amount
    counters = parsed(data)
    assert counters.balanced
    assert {name: count.packets for name, count in counters.totals.items()} == packets
    assert counters.passed + counters.steered + counters.dropped + counters.replied == counters.seen.packets
    # One packet more in any lane, and it does not balance any more.
    data[0].lane_seen[rng.randrange(lib.SLUICE_MAX_LANES)].packets += 1
    assert not parsed(data).balanced
