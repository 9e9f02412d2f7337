# SPDX-License-Identifier: Apache-2.0
"""What `sluice bench soak` concludes: sums, numbers that were taken twice, growth."""

from __future__ import annotations

import functools
import operator
import random
from typing import Any

import pytest

from sluice_cli.bench_soak import growth, mark_of, row
from sluice_cli.generator import GeneratorResult, StreamResult


def sample(seconds: float, packets: int, **more: Any) -> dict[str, Any]:
    return {
        "seconds": seconds, "packets": packets, "mark": mark_of(packets), "rss_kib": 1000, "descriptors": 5,
        "gap_ms": 1.0, "oldest_ms": 2.0, "cpu_ns": int(seconds * 1e9),
    } | more  # fmt: skip


def sent(count: int, refused: int = 0) -> GeneratorResult:
    return GeneratorResult(count, refused, 10.0, (StreamResult("", count, 0, 3, 10.0),))


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5, 255, 256, 257, 70_000])
def test_the_mark_is_the_exclusive_or_of_all_numbers(count: int) -> None:
    """Each as 8 bytes of the sender's order, read as gather() reads them."""
    numbers = (int.from_bytes(number.to_bytes(8, "little"), "big") for number in range(count))
    assert mark_of(count) == functools.reduce(operator.xor, numbers, 0)


def test_all_received() -> None:
    found = row("sluice", 1232, 1000, sent(9000), [sample(1, 1000), sample(10, 9000, lost={"ring_full": 0})])
    assert found["ok"]
    assert (found["sent"], found["received"], found["lost"], found["dropped"]) == (9000, 9000, 0, {})
    assert found["late"] == 3
    assert found["process_cpu_ns"] == round(9e9 / 8000, 1)
    assert found["rss_kib_per_hour"] is None  # ten seconds say nothing of an hour


def test_a_loss_that_is_accounted_for_is_a_loss() -> None:
    found = row("sluice", 22, 1000, sent(9000, 2), [sample(1, 0), sample(10, 8990, lost={"ring_full": 8})])
    assert not found["ok"]
    assert found["balanced"]
    assert found["dropped"] == {"interface": 2, "ring_full": 8}


def test_a_loss_that_nobody_admits() -> None:
    found = row("sluice", 22, 1000, sent(9000), [sample(1, 0), sample(10, 8999, lost={"ring_full": 0})])
    assert (found["ok"], found["balanced"], found["lost"]) == (False, False, 1)


def test_one_lost_and_another_taken_twice() -> None:
    """The count is right, the numbers are not."""
    wrong = mark_of(9000) ^ 5 ^ 6
    found = row("sluice", 22, 1000, sent(9000), [sample(1, 0), sample(10, 9000, mark=wrong, lost={})])
    assert (found["ok"], found["balanced"], found["lost"]) == (False, False, 0)


def test_growth_is_a_slope_after_the_warm_up() -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    samples = [
        sample(at, 0, rss_kib=(5_000 if at < 60 else 1000 + at * 2 + rng.uniform(-1, 1))) for at in range(301)
    ]
    found = growth(samples, "rss_kib")
    assert found == pytest.approx(2 * 3600, rel=0.01)
    assert growth(samples, "descriptors") == 0
