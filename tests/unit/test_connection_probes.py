# SPDX-License-Identifier: Apache-2.0
"""Whose turn it is to be asked, and what became of what was asked, beside plain models."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from userspace.connection.probes import BURST, ProbeBudget
from userspace.connection.questions import REMEMBERED, LossRate, Questions
from xdp.errors import UsageError

# --- the budget


def test_who_comes_first_is_served_first() -> None:
    budget = ProbeBudget(0.0, 100.0)
    for key in (5, 3, 9, 3):
        budget.want(key)
    assert len(budget) == 3
    assert 9 in budget
    assert budget.next_time(0.0) == 0.0
    assert budget.take(0.0) == [5, 3, 9]
    assert len(budget) == 0
    assert budget.take(0.0) == []
    assert budget.next_time(0.0) == math.inf
    assert "100/s, 0 in line" in repr(budget)


def test_who_leaves_the_line_costs_nothing() -> None:
    budget = ProbeBudget(0.0, 10.0)
    budget.want(1)
    budget.drop(1)
    budget.drop(2)
    assert (budget.take(0.0), budget.next_time(0.0)) == ([], math.inf)
    budget.want(2)
    assert budget.take(0.0) == [2]


def test_the_rate_is_kept_and_used_up() -> None:
    budget, taken, now = ProbeBudget(0.0, 1000.0), 0, 0.0
    for key in range(500):
        budget.want(key)
    while now < 10.0:
        keys = budget.take(now)
        taken += len(keys)
        for key in keys:
            budget.want(key)
        now = max(now, budget.next_time(now))
    assert 10 * 1000 <= taken <= (10 + BURST) * 1000 + 10


def test_the_loop_is_woken_for_some_at_once() -> None:
    budget, now, wakes = ProbeBudget(0.0, 1000.0), 0.0, 0
    for key in range(600):
        budget.want(key)
    while budget:
        budget.take(now)
        wakes += 1
        if budget:
            now = budget.next_time(now)
    assert now == pytest.approx(0.5, abs=0.01)
    assert 50 <= wakes <= 52  # ten at a time, after a burst of a hundred


def test_everybody_gets_the_same_share() -> None:
    """Whoever asks how often, and whoever comes and goes between."""
    budget, rng = ProbeBudget(0.0, 200.0), random.Random(5)
    served = dict.fromkeys(range(100), 0)
    for key in served:
        budget.want(key)
    for step in range(3000):
        for key in rng.sample(range(100), 5):
            budget.want(key)  # once more: no better place
        visitor = 1000 + rng.randrange(50)
        if rng.random() < 0.5:
            budget.want(visitor)
        else:
            budget.drop(visitor)
        for key in budget.take(step / 100):
            if key in served:
                served[key] += 1
                budget.want(key)
    assert max(served.values()) - min(served.values()) <= 1
    assert min(served.values()) > 20


def test_a_rate_below_one_a_turn_is_still_a_rate() -> None:
    budget, times, now = ProbeBudget(0.0, 1.0), [], 0.0
    for _ in range(5):
        budget.want(1)
        now = budget.next_time(now)
        assert budget.take(now) == [1]
        times.append(now)
    assert times == [0.0, 1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize("rate", [0.0, -1.0, 0.5, 2e6, math.inf, math.nan])
def test_a_budget_has_bounds(rate: float) -> None:
    with pytest.raises(UsageError, match="budget of probes"):
        ProbeBudget(0.0, rate)


# --- questions


def test_answers_in_and_out_of_order() -> None:
    questions = Questions(100)
    assert [questions.ask(float(at)) for at in range(4)] == [100, 101, 102, 103]
    assert questions.open == 4
    assert questions.answer(102) == 2.0
    assert questions.answer(102) is None
    assert questions.answer(100) == 0.0
    assert questions.open == 2
    assert questions.answer(99) is None
    assert questions.answer(104) is None
    assert [*questions.expire(2.5)] == [1.0]
    assert questions.open == 1
    assert not questions.late(100)
    assert not questions.late(102)
    assert questions.late(101)
    assert not questions.late(101)
    assert questions.answer(103) == 3.0
    assert not questions.waiting


def test_failures_are_remembered_for_a_while() -> None:
    questions = Questions()
    for at in range(REMEMBERED + 10):
        questions.ask(float(at))
    assert len(questions.expire(1e9)) == REMEMBERED + 10
    assert [questions.late(sequence) for sequence in range(10)] == [False] * 10
    assert [questions.late(10 + sequence) for sequence in range(REMEMBERED)] == [True] * REMEMBERED


class Asking(RuleBasedStateMachine):
    """Every question is open, answered, failed, late or withdrawn, and each of that once."""

    def __init__(self) -> None:
        super().__init__()
        self.questions = Questions(7)
        self.now = 0.0
        self.asked: list[float] = []
        self.state: dict[int, str] = {}

    @rule(step=st.sampled_from([0.0, 0.1, 1.0]))
    def ask(self, step: float) -> None:
        self.now += step
        sequence = self.questions.ask(self.now)
        assert sequence == 7 + len(self.asked)
        self.asked.append(self.now)
        self.state[sequence] = "open"

    @rule(back=st.integers(-2, 90) | st.integers(-(1 << 70), 1 << 70))
    def answer(self, back: int) -> None:
        sequence = self.questions.sequence - back
        answered = self.questions.answer(sequence)
        assert (answered is not None) == (self.state.get(sequence) == "open")
        if answered is not None:
            assert answered == self.asked[sequence - 7]
            self.state[sequence] = "answered"

    @rule(back=st.integers(-2, 90) | st.integers(-(1 << 70), 1 << 70))
    def late(self, back: int) -> None:
        questions = self.questions
        sequence = questions.sequence - back
        oldest_open = min(
            (s for s, state in self.state.items() if state == "open"), default=questions.sequence
        )
        expected = self.state.get(sequence) == "failed" and oldest_open - sequence <= REMEMBERED
        assert questions.late(sequence) == expected
        assert questions.recent(sequence) == (1 <= back <= REMEMBERED)
        if expected:
            self.state[sequence] = "late"

    @rule(age=st.sampled_from([0.0, 0.1, 0.5, 2.0]))
    def expire(self, age: float) -> None:
        due = [
            sequence
            for sequence, state in self.state.items()
            if state == "open" and self.asked[sequence - 7] <= self.now - age
        ]
        assert [*self.questions.expire(self.now - age)] == [self.asked[sequence - 7] for sequence in due]
        self.state.update(dict.fromkeys(due, "failed"))

    @rule()
    def withdraw(self) -> None:
        opened = [sequence for sequence, state in self.state.items() if state == "open"]
        assert self.questions.withdraw() == len(opened)
        self.state.update(dict.fromkeys(opened, "withdrawn"))

    @invariant()
    def as_many_are_open(self) -> None:
        opened = sum(state == "open" for state in self.state.values())
        assert self.questions.open == opened
        assert self.questions.waiting == (opened > 0)
        assert self.questions._failed < 1 << REMEMBERED


Asking.TestCase.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
TestAsking = Asking.TestCase


# --- loss


@pytest.mark.parametrize("loss", [0.0, 0.1, 0.6, 1.0])
def test_the_rate_is_that_of_the_last_ones(loss: float) -> None:
    rate, rng = LossRate(100), random.Random(1)
    rate.add(0, 500)
    rate.add(500, 0)
    found = []
    for _ in range(5000):
        lost = rng.random() < loss
        rate.add(not lost, lost)
        found.append(rate.rate())
    mean = sum(found[1000:]) / len(found[1000:])
    assert mean == pytest.approx(loss, abs=0.03)
    assert rate.bound() >= rate.rate() or loss > 0.5


def test_many_at_once_count_as_one_by_one() -> None:
    once, single = LossRate(64), LossRate(64)
    once.add(90, 10)
    for number in range(100):
        single.add(number % 10 != 0, number % 10 == 0)
    assert once.rate() == pytest.approx(single.rate(), abs=0.01)
    assert once._decided == pytest.approx(single._decided)


def test_few_outcomes_say_little() -> None:
    rate = LossRate(32)
    assert (rate.rate(), rate.bound()) == (0.0, 0.5)
    rate.add(0, 1)
    assert rate.rate() == 1.0
    assert rate.rate(16.0) == 1 / 16
    for _ in range(1000):
        rate.add(1, 0)
    assert rate.bound() == pytest.approx(0.1, abs=0.01)


def test_what_was_lost_may_be_found_and_the_other_way_round() -> None:
    rate = LossRate(1024)
    rate.add(100, 0)
    rate.lose(10)
    assert rate.rate() == pytest.approx(0.1, abs=0.01)
    rate.lose(-4)
    assert rate.rate() == pytest.approx(0.06, abs=0.01)
    rate.lose(-1000)
    assert rate.rate() == 0.0
    rate.lose(1 << 40)
    assert rate.rate() == 1.0


@settings(max_examples=60, deadline=None)
@given(
    window=st.sampled_from([1, 2, 32, 1024]),
    outcomes=st.lists(st.tuples(st.integers(0, 1 << 32), st.integers(-(1 << 33), 1 << 33)), max_size=30),
)
def test_it_is_always_a_share(window: int, outcomes: list[tuple[int, int]]) -> None:
    rate = LossRate(window)
    for count, lost in outcomes:
        if count:
            rate.add(count - count // 3, count // 3)
        rate.lose(lost)
        assert 0.0 <= rate.rate() <= 1.0 + 1e-9
        assert 0.0 <= rate.bound() <= 1.0
        assert rate._decided <= window * (1 + 1e-9)
