# SPDX-License-Identifier: Apache-2.0
"""The receiver's side beside a set of numbers: ranges, duplicates, and when an acknowledgement is due."""

from __future__ import annotations

import itertools
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from userspace.flow.ranges import CE, ECT_0, ECT_1, NUMBER_MAXIMUM, ReceivedPackets
from xdp.errors import UsageError


def arrived(*numbers: int, limit: int = 32) -> ReceivedPackets:
    received = ReceivedPackets(limit=limit)
    for number in numbers:
        received.add(0.0, number)
    return received


def test_numbers_in_order_are_one_range() -> None:
    assert arrived(0, 1, 2).ranges() == ((0, 2),)


def test_ranges_come_newest_first() -> None:
    assert arrived(0, 1, 5, 3, 9).ranges() == ((9, 9), (5, 5), (3, 3), (0, 1))
    assert arrived(0, 1, 5, 3, 9).ranges(2) == ((9, 9), (5, 5))


@pytest.mark.parametrize(
    ("numbers", "ranges"),
    [((0, 2, 1), ((0, 2),)), ((0, 3, 1), ((3, 3), (0, 1))), ((0, 3, 2), ((2, 3), (0, 0))),
     ((5, 4), ((4, 5),))],
)  # fmt: skip
def test_a_gap_is_filled(numbers: tuple[int, ...], ranges: tuple[tuple[int, int], ...]) -> None:
    assert arrived(*numbers).ranges() == ranges


def test_duplicates_are_told() -> None:
    received = arrived(0, 1, 4)
    assert [received.add(0.0, number) for number in (0, 1, 4, 3, 3)] == [False, False, False, True, False]
    assert (received.packets, received.duplicates) == (4, 4)


def test_the_oldest_range_is_forgotten_and_counts_as_seen() -> None:
    received = arrived(0, 1, 4, 6, 8, limit=3)
    assert received.ranges() == ((8, 8), (6, 6), (4, 4))
    assert received.floor == 2
    assert not received.add(0.0, 1)
    assert 1 in received
    assert -1 not in received
    assert 3 not in received
    # There is no room for a new oldest range; but one that joins a range needs none.
    assert not received.add(0.0, 2)
    assert received.add(0.0, 3)
    assert received.ranges() == ((8, 8), (6, 6), (3, 4))


@pytest.mark.parametrize("number", [-1, -(1 << 80), NUMBER_MAXIMUM + 1, 1 << 100])
def test_impossible_numbers_are_refused(number: int) -> None:
    received = arrived(0)
    assert not received.add(0.0, number)
    assert received.invalid == 1
    assert received.ranges() == ((0, 0),)


def test_the_largest_number_is_one() -> None:
    received = arrived(NUMBER_MAXIMUM - 1)
    assert received.add(0.0, NUMBER_MAXIMUM)
    assert not received.add(0.0, NUMBER_MAXIMUM + 1)
    assert received.largest == NUMBER_MAXIMUM


def test_an_acknowledgement_is_due_after_two_or_the_delay() -> None:
    received = ReceivedPackets()
    assert received.take_ack(0.0) is None
    received.add(1.0, 0)
    assert received.ack_due_at == 1.025
    received.add(1.001, 1)
    assert received.ack_due_at == 1.001
    ack = received.take_ack(1.003)
    assert ack is not None
    assert (ack.ranges, ack.ce_count) == (((0, 1),), 0)
    assert ack.delay == pytest.approx(0.002)
    assert received.ack_due_at == math.inf
    received.add(2.0, 2)
    assert received.ack_due_at == 2.025


def test_the_first_of_several_counts_for_the_delay() -> None:
    received = ReceivedPackets(ack_every=4)
    for number in range(3):
        received.add(1.0 + number / 1000, number)
        assert received.ack_due_at == 1.025
    received.add(1.003, 3)
    assert received.ack_due_at == 1.003


def test_the_delay_counts_from_the_newest() -> None:
    received = arrived(0)
    received.add(1.0, 7)
    received.add(3.0, 5)
    ack = received.take_ack(4.0)
    assert ack is not None
    assert ack.delay == 3.0
    ack = received.take_ack(0.5)  # an earlier time
    assert ack is not None
    assert ack.delay == 0.0


@pytest.mark.parametrize("number", [2, 0])
def test_out_of_order_is_told_at_once(number: int) -> None:
    received = ReceivedPackets()
    received.add(1.0, 1)  # 0 is missing
    assert received.ack_due_at == 1.0
    received.take_ack(1.0)
    received.add(2.0, 2)
    assert received.ack_due_at == 2.025
    received.take_ack(2.0)
    received.add(3.0, 0 if number == 0 else 4)
    assert received.ack_due_at == 3.0


def test_a_mark_is_told_at_once() -> None:
    received = ReceivedPackets()
    received.add(1.0, 0, ecn=CE)
    assert received.ack_due_at == 1.0
    received.add(1.0, 0, ecn=CE)  # a duplicate marks nothing
    received.add(1.0, 1, ecn=ECT_0)
    received.add(1.0, 2, ecn=ECT_1)
    received.add(1.0, 3, ecn=77)
    assert (received.ce_count, received.ect_0_count, received.ect_1_count) == (1, 1, 1)


def test_settings_are_checked() -> None:
    for wrong in ({"limit": 0}, {"limit": 1.5}, {"ack_every": 0}, {"max_ack_delay": -1.0}):
        with pytest.raises(UsageError):
            ReceivedPackets(**wrong)
    assert "4 up to 4 in 3 ranges" in repr(arrived(0, 1, 4, 3, 3, 8, limit=9)).replace(
        "5 up to 8", "4 up to 4"
    )


class Ranges(RuleBasedStateMachine):
    """Beside a set.  What is forgotten counts as seen."""

    def __init__(self) -> None:
        super().__init__()
        self.received = ReceivedPackets(limit=4)
        self.seen: set[int] = set()

    @rule(number=st.integers(-2, 40), ecn=st.integers(0, 3))
    def add(self, number: int, ecn: int) -> None:
        new = self.received.add(0.0, number, ecn=ecn)
        if new:
            assert number >= 0
            assert number not in self.seen
            self.seen.add(number)
        elif number >= 0 and number not in self.seen:
            ranges = self.received.ranges()
            assert number < self.received.floor or (len(ranges) == 4 and number < ranges[-1][0] - 1)

    @invariant()
    def ranges_are_what_was_seen(self) -> None:
        ranges = self.received.ranges()
        assert len(ranges) <= 4
        told = {number for first, last in ranges for number in range(first, last + 1)}
        assert told == {number for number in self.seen if number >= self.received.floor}
        for (newer, _), (_, older) in itertools.pairwise(ranges):
            assert newer > older + 1
        assert self.received.packets == len(self.seen)
        for number in self.seen:
            assert number in self.received


TestRanges = Ranges.TestCase


@given(st.randoms(use_true_random=False), st.integers(1, 40))
def test_any_order_without_duplicates_is_one_range(rng: random.Random, count: int) -> None:
    numbers = list(range(count))
    rng.shuffle(numbers)
    received = ReceivedPackets(limit=1024)
    assert all(received.add(0.0, number) for number in numbers)
    assert received.ranges() == ((0, count - 1),)
