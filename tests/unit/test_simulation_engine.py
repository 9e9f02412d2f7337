# SPDX-License-Identifier: Apache-2.0
"""Virtual time: events come in the order of their times, then of their adding, and are bounded."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from userspace.simulation.engine import MAX_EVENTS, MAX_TIME, Engine, TooManyEventsError
from xdp.errors import SluiceError, UsageError

TIMES = st.lists(st.sampled_from([0.0, 0.5, 1.0, 1.5, 2.0, math.inf]), max_size=30)


def logged(engine: Engine) -> tuple[list[tuple[float, Any]], Callable[[float, Any], None]]:
    log: list[tuple[float, Any]] = []

    def call(now: float, argument: Any) -> None:
        assert now == engine.now
        log.append((now, argument))

    return log, call


@given(TIMES)
def test_order_of_time_then_of_adding(times: list[float]) -> None:
    engine = Engine()
    log, call = logged(engine)
    for number, time in enumerate(times):
        engine.at(time, call, number)
    engine.run(1.5)
    due = sorted((time, number) for number, time in enumerate(times) if time <= 1.5)
    assert log == due
    assert engine.events == len(due)
    assert engine.waiting == len(times) - len(due)
    assert engine.now == 1.5
    assert engine.next_event() == min([time for time in times if time > 1.5], default=math.inf)


def test_the_past_is_now_and_comes_after_what_is_waiting() -> None:
    engine = Engine()
    log, call = logged(engine)

    def twice(now: float, argument: Any) -> None:
        call(now, argument)
        engine.at(now - 1, call, "late")

    engine.at(2.0, twice, "first")
    engine.at(2.0, call, "second")
    engine.run(3.0)
    assert log == [(2.0, "first"), (2.0, "second"), (2.0, "late")]


def test_runs_go_on_where_they_stopped() -> None:
    engine = Engine()
    log, call = logged(engine)
    for time in (1.0, 2.0, 3.0):
        engine.at(time, call)
    engine.run(2.0)
    engine.run(2.0)
    assert [time for time, _ in log] == [1.0, 2.0]
    engine.run(3.0)
    assert [time for time, _ in log] == [1.0, 2.0, 3.0]


def test_events_are_bounded() -> None:
    engine = Engine(max_events=100)

    def again(now: float, _: object) -> None:
        engine.at(now, again)

    engine.at(0.5, again)
    with pytest.raises(TooManyEventsError, match=r"more than 100 events in 0\.500 simulated") as caught:
        engine.run(1.0)
    assert isinstance(caught.value, SluiceError)
    assert caught.value.hint
    assert engine.events == 100
    with pytest.raises(TooManyEventsError):
        engine.run(1.0)


def test_as_many_events_as_are_allowed_are_no_mistake() -> None:
    engine = Engine(max_events=3)
    log, call = logged(engine)
    for number in range(3):
        engine.at(number, call)
    engine.run(5.0)
    assert len(log) == 3


def test_chance_has_a_name() -> None:
    """The same for the same seed and name, whatever others draw."""
    one, same, other = Engine(seed=3), Engine(seed=3), Engine(seed=4)
    same.random("loss").random()
    drawn = one.random("jitter").random()
    assert drawn == same.random("jitter").random()
    assert drawn != other.random("jitter").random()
    assert drawn != one.random("loss").random()


@pytest.mark.parametrize("seed", [None, "1", 1.0, True])
def test_no_seed(seed: Any) -> None:
    with pytest.raises(UsageError, match="seed"):
        Engine(seed=seed)


@pytest.mark.parametrize("most", [0, -1, MAX_EVENTS + 1, 1.5])
def test_no_number_of_events(most: Any) -> None:
    with pytest.raises(UsageError, match="max_events"):
        Engine(max_events=most)


@pytest.mark.parametrize("until", [0.5, MAX_TIME * 2, math.nan, math.inf, -1.0])
def test_no_time_to_run_to(until: float) -> None:
    engine = Engine()
    engine.run(1.0)
    with pytest.raises(UsageError, match="until"):
        engine.run(until)


def test_a_time_that_is_none() -> None:
    engine = Engine()
    with pytest.raises(UsageError, match="NaN"):
        engine.at(math.nan, print)
    assert engine.waiting == 0
