# SPDX-License-Identifier: Apache-2.0
"""Choices: in proportion to weights, the better of two, the same for the same key; seeded throughout."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from userspace.connection.selection import (
    GROUPS,
    SECRET_LENGTH,
    WEIGHT_MAXIMUM,
    Rendezvous,
    WeightedSet,
    better,
    cheaper,
    checked_weight,
    name_of,
)
from xdp.errors import UsageError

SECRET = bytes(range(SECRET_LENGTH))


class One:
    """A candidate."""

    def __init__(self, name: str, weight: int = 1, cost: float = 0.0) -> None:
        self.name = name
        self.weight = weight
        self.cost = cost
        self.seed = 0
        self.fits = True

    def __repr__(self) -> str:
        return f"{self.name}({self.weight})"


def cost_of(one: One) -> float:
    return one.cost


def filled(*weights: int) -> tuple[WeightedSet[One], list[One]]:
    ones = [One(str(number), weight) for number, weight in enumerate(weights)]
    candidates = WeightedSet[One]()
    for one in ones:
        candidates.add(one)
    return candidates, ones


# --- in proportion


@pytest.mark.parametrize(
    "weights", [(1,), (1, 1, 1), (1, 2, 3, 4, 5), (7, 700, 70_000), (3, 5, 1023, 1024, 1025)]
)
def test_picks_are_in_proportion_to_weights(weights: tuple[int, ...]) -> None:
    candidates, ones = filled(*weights)
    draw = Random(1).random
    picks = 8000
    counted = Counter(candidates.pick(draw) for _ in range(picks))
    for one in ones:
        share = one.weight / sum(weights)
        # Four standard deviations of the binomial distribution.
        assert abs(counted[one] - picks * share) <= 4 * (picks * share * (1 - share)) ** 0.5 + 1


def test_weights_may_differ_by_any_factor() -> None:
    candidates, (light, heavy) = filled(1, WEIGHT_MAXIMUM)
    draw = Random(2).random
    assert {candidates.pick(draw) for _ in range(100)} == {heavy}
    candidates.remove(heavy)
    assert candidates.pick(draw) is light
    assert candidates.pick(lambda: 1.0 - 2**-53) is light  # the last number there is


def test_sums_do_not_drift() -> None:
    candidates, _ = filled(1 << 62, 1)
    others = [One("x", weight) for weight in range(1, 500)]
    before = candidates.total
    for one in others:
        candidates.add(one)
    for one in others:
        candidates.remove(one)
    assert candidates.total == before
    assert len(candidates) == 2


class Members(RuleBasedStateMachine):
    """What is picked is a member, whatever came and went; every member is picked by some number."""

    def __init__(self) -> None:
        super().__init__()
        self.candidates = WeightedSet[One]()
        self.members: list[One] = []
        self.random = Random(3)

    @rule(weight=st.sampled_from([1, 1, 2, 3, 1000, 1 << 40]))
    def add(self, weight: int) -> None:
        one = One(str(len(self.members)), weight)
        self.members.append(one)
        self.candidates.add(one)

    @rule(which=st.integers(0, 1000))
    def remove(self, which: int) -> None:
        if self.members:
            self.candidates.remove(self.members.pop(which % len(self.members)))

    @invariant()
    def holds(self) -> None:
        assert len(self.candidates) == len(self.members)
        assert bool(self.candidates) == bool(self.members)
        assert sum(one.weight for one in self.members) <= self.candidates.total
        assert self.candidates.total <= sum(2 * one.weight - 1 for one in self.members)
        for _ in range(3 if self.members else 0):
            assert self.candidates.pick(self.random.random) in self.members


Members.TestCase.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)
TestMembers = Members.TestCase


@pytest.mark.parametrize(
    "weight", [0, -1, WEIGHT_MAXIMUM + 1, 1.5, "1", None, True, float("nan"), float("inf")]
)
def test_weights_are_checked(weight: object) -> None:
    with pytest.raises(UsageError, match="a weight is a whole number"):
        checked_weight(weight)


@pytest.mark.parametrize("weight", [1, 1.0, WEIGHT_MAXIMUM])
def test_whole_numbers_are_weights(weight: float) -> None:
    assert checked_weight(weight) == weight
    assert type(checked_weight(weight)) is int


# --- the better of two


def test_of_two_the_cheaper_is_taken() -> None:
    candidates, (good, bad) = filled(1, 1)
    good.cost, bad.cost = 1.0, 2.0
    draw = Random(4).random
    counted = Counter(better(candidates, draw, cost_of) for _ in range(1000))
    assert counted[good] > 950  # both are drawn, unless three draws in a row are the same
    assert counted[bad] == 1000 - counted[good]


def test_the_worst_of_many_is_never_taken_and_the_best_not_always() -> None:
    candidates, ones = filled(*[1] * 10)
    for cost, one in enumerate(ones):
        one.cost = float(cost)
    draw = Random(5).random
    counted = Counter(better(candidates, draw, cost_of) for _ in range(5000))
    assert counted[ones[9]] < 20
    # The best is one of two distinct ones with a probability of 1/5.
    assert counted[ones[0]] == pytest.approx(1000, rel=0.15)
    assert [one.cost for one, _ in counted.most_common()][:3] == [0.0, 1.0, 2.0]


def test_while_nothing_is_known_choices_are_in_proportion() -> None:
    candidates, (light, heavy) = filled(1, 9)
    draw = Random(6).random
    counted = Counter(better(candidates, draw, cost_of) for _ in range(10_000))
    assert counted[heavy] == pytest.approx(9000, rel=0.02)
    assert counted[light] == 10_000 - counted[heavy]


def test_one_candidate_is_taken_without_a_second_draw() -> None:
    candidates, (only,) = filled(5)
    draws = iter([0.5, 0.2])
    assert better(candidates, lambda: next(draws), cost_of) is only


@given(st.lists(st.floats(0, 10), min_size=1, max_size=8), st.integers(0, 1000))
@settings(max_examples=50, deadline=None)
def test_of_a_list_two_distinct_ones_are_drawn(costs: list[float], seed: int) -> None:
    ones = [One(str(number), cost=cost) for number, cost in enumerate(costs)]
    draw = Random(seed).random
    chosen = [cheaper(ones, draw) for _ in range(20)]
    assert set(chosen) <= set(ones)
    if len(ones) > 1:  # so the one that costs most is never taken
        assert all(one.cost < max(costs) or costs.count(one.cost) > 1 for one in chosen)


# --- the same for the same key


def ring_of(ones: list[One], secret: bytes = SECRET) -> Rendezvous[One]:
    ring = Rendezvous[One](secret)
    for one in ones:
        ring.add(one, one.name.encode())
    return ring


def fits(one: One) -> bool:
    return one.fits


def choices(ring: Rendezvous[One], keys: int = 2000) -> list[One]:
    found = [ring.first(b"key %d" % number, fits) for number in range(keys)]
    return [one for one in found if one is not None]


def test_the_same_key_gets_the_same_one_in_every_process() -> None:
    ones = [One(str(number)) for number in range(20)]
    first = choices(ring_of(ones), 200)
    again = choices(ring_of([One(one.name) for one in reversed(ones)]), 200)
    assert [one.name for one in first] == [one.name for one in again]
    # These must never change: others may have been told.
    assert [one.name for one in first[:8]] == PINNED
    other = choices(ring_of(ones, bytes(SECRET_LENGTH)), 200)
    assert sum(a is b for a, b in zip(first, other, strict=True)) < 40  # one in twenty


PINNED = ["9", "3", "5", "19", "19", "6", "1", "13"]


@pytest.mark.parametrize("count", [3, 100, 200])
def test_keys_are_spread_evenly(count: int) -> None:
    ones = [One(str(number)) for number in range(count)]
    counted = Counter(choices(ring_of(ones), 3000))
    mean = 3000 / count
    assert all(abs(counted[one] - mean) < 5 * mean**0.5 for one in ones)


def test_keys_are_spread_by_weight() -> None:
    ones = [One(str(number), weight) for number, weight in enumerate([1, 2, 3, 4])]
    counted = Counter(choices(ring_of(ones), 5000))
    for one in ones:
        assert counted[one] == pytest.approx(500 * one.weight, rel=0.12)


@pytest.mark.parametrize(("count", "keys"), [(2, 1000), (5, 1000), (30, 3000), (300, 4000)])
def test_the_keys_of_one_that_fails_are_spread_and_come_back(count: int, keys: int) -> None:
    ones = [One(str(number)) for number in range(count)]
    ring = ring_of(ones)
    before = choices(ring, keys)
    ones[0].fits = False
    during = choices(ring, keys)
    moved = [(old, new) for old, new in zip(before, during, strict=True) if old is not new]
    assert {old for old, _ in moved} == {ones[0]}  # nobody else's
    assert len(moved) == before.count(ones[0])
    assert ones[0] not in during
    heirs = Counter(new for _, new in moved)
    assert len(heirs) >= min(count - 1, 6)  # no single one inherits all
    assert max(heirs.values()) <= max(len(moved) / min(count - 1, 8), 6) * 1.7
    ones[0].fits = True
    assert choices(ring, keys) == before


def test_when_many_fail_the_rest_is_found() -> None:
    ones = [One(str(number)) for number in range(300)]
    ring = ring_of(ones)
    for one in ones:
        one.fits = one.name in {"7", "200"}
    counted = Counter(choices(ring, 60))
    assert {one.name for one in counted} == {"7", "200"}
    for one in ones:
        one.fits = False
    assert ring.first(b"key", fits) is None
    assert Rendezvous[One](SECRET).first(b"key", fits) is None


@pytest.mark.parametrize(("count", "keys"), [(10, 2000), (150, 5000)])
def test_few_keys_move_when_one_comes_or_goes(count: int, keys: int) -> None:
    ones = [One(str(number)) for number in range(count)]
    ring = ring_of(ones)
    before = choices(ring, keys)
    gone = ones[3]
    ring.remove(gone)
    during = choices(ring, keys)
    moved = sum(a is not b for a, b in zip(before, during, strict=True))
    must = before.count(gone)
    assert must <= moved <= 2 * must + 40  # twice as many as must, and what chance adds
    ring.add(gone, gone.name.encode())
    assert choices(ring, keys) == before


def test_a_choice_looks_at_few() -> None:
    looks = 0

    class Watched(One):
        def __init__(self, name: str) -> None:
            self._weight = 1
            super().__init__(name)

        @property
        def weight(self) -> int:
            nonlocal looks
            looks += 1
            return self._weight

        @weight.setter
        def weight(self, weight: int) -> None:
            self._weight = weight

    ones: list[One] = [Watched(str(number)) for number in range(2000)]
    ring = ring_of(ones)
    looks = 0
    ring.first(b"key", fits)
    assert looks < 2 * 2000 / GROUPS


def test_secrets_are_checked() -> None:
    for secret in (b"", b"short", "x" * SECRET_LENGTH, None):
        with pytest.raises(UsageError, match="a secret is 16 bytes"):
            Rendezvous[One](secret)  # type: ignore[arg-type]


def test_names_are_what_tells_keys_apart() -> None:
    assert name_of(b"\x00\xff") == b"\x00\xff"
    assert name_of(("192.0.2.7", 8009)) == b"('192.0.2.7', 8009)"
    assert name_of(1) != name_of("1")
    assert name_of("\udc80") == b"'\\udc80'"
