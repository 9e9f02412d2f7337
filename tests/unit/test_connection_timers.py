# SPDX-License-Identifier: Apache-2.0
"""Timers beside a plain dictionary, whatever is set, put off and cancelled, and what is left behind."""

from __future__ import annotations

import ast
import math
from pathlib import Path
from random import Random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.documents import ROOT
from userspace.connection.timers import LATEST, SLACK, Timers, checked_now
from xdp.errors import UsageError


def test_the_earliest_comes_first() -> None:
    timers = Timers[str]()
    assert timers.next() == math.inf
    assert list(timers.due(1e9)) == []
    for key, at in (("c", 3.0), ("a", 1.0), ("b", 2.0)):
        timers.set(key, at)
    assert (timers.next(), len(timers)) == (1.0, 3)
    assert list(timers.due(0.999)) == []
    assert list(timers.due(2.0)) == ["a", "b"]
    assert (timers.next(), len(timers)) == (3.0, 1)
    assert list(timers.due(2.0)) == []
    assert list(timers.due(3.0)) == ["c"]
    assert (timers.next(), len(timers)) == (math.inf, 0)


def test_equal_deadlines_come_in_the_order_in_which_they_were_set() -> None:
    timers = Timers[int]()
    for key in (3, 1, 2, 4):
        timers.set(key, 5.0)
    timers.set(1, 5.0)  # its turn is a later one now
    timers.set(4, 4.0)
    timers.set(4, 5.0)
    assert list(timers.due(5.0)) == [3, 2, 1, 4]


def test_keys_need_no_order() -> None:
    timers = Timers[object]()
    keys = [object(), "x", 7, None, (1, 2)]
    for key in keys:
        timers.set(key, 1.0)
    assert list(timers.due(1.0)) == keys


def test_another_deadline_replaces_the_first() -> None:
    timers = Timers[str]()
    timers.set("x", 1.0)
    timers.set("x", 3.0)  # put off
    assert (timers.when("x"), timers.next(), len(timers)) == (3.0, 3.0, 1)
    assert list(timers.due(2.0)) == []
    timers.set("x", 2.5)  # nearer again
    assert (timers.when("x"), timers.next()) == (2.5, 2.5)
    timers.set("x", 2.75)
    assert list(timers.due(2.6)) == []
    assert list(timers.due(2.75)) == ["x"]
    assert list(timers.due(100.0)) == []


def test_cancelling() -> None:
    timers = Timers[str]()
    timers.cancel("x")
    for key in "xyz":
        timers.set(key, 1.0)
    timers.cancel("x")
    timers.set("y", math.inf)  # is the same
    timers.set("never", math.inf)
    assert [timers.when(key) for key in ("x", "y", "z", "never")] == [math.inf, math.inf, 1.0, math.inf]
    timers.set("x", 2.0)
    assert len(timers) == 2
    assert list(timers.due(1.0)) == ["z"]
    assert list(timers.due(2.0)) == ["x"]


# --- what may happen between two steps of a loop


def test_what_is_cancelled_or_put_off_meanwhile_does_not_come() -> None:
    timers = Timers[str]()
    for key, at in (("a", 1.0), ("b", 2.0), ("c", 2.5), ("d", 3.0)):
        timers.set(key, at)
    came = []
    for key in timers.due(3.0):
        came.append(key)
        timers.cancel("b")
        timers.set("c", 3.5)
    assert came == ["a", "d"]
    assert timers.next() == 3.5


def test_no_loop_is_endless() -> None:
    """Whoever is set anew for now, or for earlier, comes with the next loop, and behind those who waited."""
    timers = Timers[str]()
    for key, at in (("a", 1.0), ("b", 2.0), ("c", 3.0)):
        timers.set(key, at)
    came = []
    for key in timers.due(3.0):
        came.append(key)
        timers.set(key, 0.5)
        timers.set("new", 3.0)
    assert came == ["a", "b", "c"]
    assert len(timers) == 4
    assert set(timers.due(3.0)) == {"a", "b", "c", "new"}


def test_who_is_not_due_yet_stays_where_it_is() -> None:
    timers = Timers[str]()
    timers.set("a", 1.0)
    for _ in timers.due(1.0):
        timers.set("later", 1.5)
    assert timers.when("later") == 1.5
    assert list(timers.due(1.25)) == []


def test_a_loop_within_a_loop() -> None:
    """As when a callback calls back in: each comes once, to one of the two."""
    timers = Timers[int]()
    for key in range(6):
        timers.set(key, float(key))
    outer: list[int] = []
    inner: list[int] = []
    for key in timers.due(4.0):
        outer.append(key)
        if key == 1:
            inner += timers.due(3.0)
    assert (outer, inner) == ([0, 1, 4], [2, 3])


def test_a_loop_that_is_left_keeps_the_rest() -> None:
    timers = Timers[int]()
    for key in range(4):
        timers.set(key, float(key))
    for _ in timers.due(3.0):
        break
    assert (len(timers), timers.next()) == (3, 1.0)
    with pytest.raises(ZeroDivisionError):
        {key: 1 / (2 - key) for key in timers.due(3.0)}
    assert list(timers.due(3.0)) == [3]


def test_a_loop_goes_on_when_the_heap_is_cleared() -> None:
    timers = Timers[int]()
    for key in range(1000):
        timers.set(key, float(key))
    came = []
    for key in timers.due(1000.0):
        came.append(key)
        if key == 3:
            for other in range(10, 990):
                timers.cancel(other)
    assert came == [*range(10), *range(990, 1000)]


# --- nothing is left behind


def test_connect_and_disconnect_leaves_nothing() -> None:
    timers = Timers[int]()
    for key in range(50_000):
        timers.set(key, key + 1e6)  # far in the future: no loop ever meets it
        if key >= 10:
            timers.cancel(key - 10)
        assert len(timers._heap) <= 2 * len(timers) + SLACK
    assert len(timers) == 10


@pytest.mark.parametrize("step", [-1.0, 1.0])
def test_moving_a_deadline_leaves_nothing(step: float) -> None:
    timers = Timers[str]()
    for turn in range(2000):
        timers.set("x", 1e6 + step * turn)
        assert len(timers._heap) <= 2 + SLACK
    assert list(timers.due(1e6 + step * 1999)) == ["x"]


def test_putting_off_does_not_touch_the_heap() -> None:
    """It is what every packet does."""
    timers = Timers[int]()
    for key in range(100):
        timers.set(key, 5.0)
    before = list(timers._heap)
    for turn in range(100):
        for key in range(100):
            timers.set(key, 5.0 + turn / 100)
    assert timers._heap == before
    assert timers.next() == 5.99


def test_being_due_leaves_nothing() -> None:
    timers = Timers[int]()
    for key in range(1000):
        timers.set(key, 1.0)
        timers.set(key + 1000, 1e6)
    timers.set(-1, 1e5)  # before all that is left behind, so nobody comes across it
    for key in range(1000, 2000):
        timers.cancel(key)
    assert len(list(timers.due(1.0))) == 1000
    assert len(timers._heap) <= 2 + SLACK


# --- numbers


@pytest.mark.parametrize("at", [math.nan, -math.inf])
def test_what_is_no_deadline_is_refused(at: float) -> None:
    timers = Timers[str]()
    timers.set("x", 1.0)
    with pytest.raises(UsageError, match="a deadline is a time in seconds"):
        timers.set("x", at)
    assert (timers.when("x"), timers.next()) == (1.0, 1.0)


@pytest.mark.parametrize("now", [math.nan, math.inf, -math.inf, 1e300, -1e300, 10**400])
def test_what_is_no_time_is_refused(now: float) -> None:
    timers = Timers[str]()
    timers.set("x", 1.0)
    with pytest.raises(UsageError, match="now is seconds of a monotonic clock"):
        timers.due(now)  # at once, not when the loop begins
    with pytest.raises(UsageError, match="now is seconds of a monotonic clock"):
        checked_now(now, 0.0)
    assert timers.when("x") == 1.0


def test_an_earlier_time_is_taken_as_the_latest() -> None:
    assert checked_now(5.0, 3.0) == 5.0
    assert checked_now(1.0, 3.0) == 3.0
    assert checked_now(-7.0, -LATEST) == -7.0
    assert checked_now(LATEST, 0.0) == LATEST


# --- the room has neither a clock nor sockets

MODULES = [
    path
    for path in sorted((ROOT / "userspace" / "connection").glob("*.py"))
    if not path.name.startswith("aio")
]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_time_randomness_and_io_are_arguments(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    imported = set()
    for node in ast.walk(tree):
        if id(node) not in typing_only:
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add((node.module or "").partition(".")[0])
    assert not imported & {"asyncio", "random", "select", "selectors", "socket", "threading", "time"}


# --- any sequence of calls


class Key:
    """What has no order: comparing two of them raises."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __repr__(self) -> str:
        return f"KEYS[{self.number}]"


KEYS = [Key(number) for number in range(10)]
#: Few different ones, so that many are equal; and some that are over.
TIMES = st.sampled_from([-5.0, 0.0, 0.0, 0.5, 1.0, 1.0, 2.0, 3.5, 50.0])


class TimersBesideADictionary(RuleBasedStateMachine):
    """What is due, and in which order, is what sorting a dictionary says."""

    @initialize(seed=st.integers(0, 1 << 32))
    def begin(self, seed: int) -> None:
        self.random = Random(seed)
        self.timers = Timers[Key]()
        self.model: dict[Key, tuple[float, int]] = {}
        self.turn = 0
        self.now = 0.0

    @rule(key=st.sampled_from(KEYS), after=TIMES)
    def set(self, key: Key, after: float) -> None:
        self.timers.set(key, self.now + after)
        self.model[key] = (self.now + after, self.turn)
        self.turn += 1

    @rule(key=st.sampled_from(KEYS))
    def cancel(self, key: Key) -> None:
        self.timers.cancel(key)
        self.model.pop(key, None)

    @rule(step=st.sampled_from([0.0, 0.25, 1.0, 4.0]))
    def take(self, step: float) -> None:
        self.now += step
        due = [key for key, when in self.model.items() if when[0] <= self.now]
        due.sort(key=self.model.__getitem__)
        assert list(self.timers.due(self.now)) == due
        for key in due:
            del self.model[key]

    @rule(step=st.sampled_from([0.0, 1.0, 4.0]))
    def take_and_change(self, step: float) -> None:
        """Each step of the loop sets and cancels others."""
        self.now += step
        before = self.turn
        for key in self.timers.due(self.now):
            waits = {
                other: when for other, when in self.model.items() if when[0] <= self.now and when[1] < before
            }
            assert key == min(waits, key=waits.__getitem__)
            del self.model[key]
            other, after = self.random.choice(KEYS), self.random.choice([-5.0, 0.0, 1.0, 3.0])
            if self.random.random() < 0.5:
                self.cancel(other)
            else:
                self.set(other, after)
        late = {key: when for key, when in self.model.items() if when[0] <= self.now}
        assert all(turn >= before for _, turn in late.values())
        for key in sorted(late, key=late.__getitem__):
            # In which order these come is not promised; set once more it is.
            self.set(key, 0.0)

    @invariant()
    def agrees(self) -> None:
        assert len(self.timers) == len(self.model)
        assert self.timers.next() == min((at for at, _ in self.model.values()), default=math.inf)
        for key in KEYS:
            assert self.timers.when(key) == self.model.get(key, (math.inf, 0))[0]
        heap = self.timers._heap
        assert len(heap) <= 2 * len(self.timers) + SLACK
        assert len({turn for _, turn, _ in heap}) == len(heap)  # nothing stands in it twice


TimersBesideADictionary.TestCase.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)
TestTimersBesideADictionary = TimersBesideADictionary.TestCase
