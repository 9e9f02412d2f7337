# SPDX-License-Identifier: Apache-2.0
"""Signs and what they make of a status; callbacks that raise, call back in, or come while others do."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from userspace.connection.callbacks import ERROR_LENGTH, Callbacks
from userspace.connection.grading import Cause, Change, Signs, Status, grade, is_spotless

H, D, U = Status.HEALTHY, Status.DEGRADED, Status.UNHEALTHY


@pytest.mark.parametrize(
    ("before", "signs", "after", "cause"),
    [
        (H, Signs(unconfirmed=2), H, None),
        (H, Signs(unconfirmed=3), D, Cause.UNANSWERED),
        (H, Signs(unconfirmed=6), U, Cause.UNANSWERED),
        (H, Signs(unconfirmed=6, heard=True), U, Cause.ONE_WAY),
        (H, Signs(unconfirmed=6, host_answers=True), U, Cause.BUSY),
        (H, Signs(loss=0.14), H, None),
        (H, Signs(loss=0.15), D, Cause.LOSS),
        (D, Signs(loss=0.06), D, Cause.LOSS),
        (D, Signs(loss=0.04), H, None),
        (D, Signs(loss=0.39), D, Cause.LOSS),
        (D, Signs(loss=0.40), U, Cause.LOSS),
        (U, Signs(loss=0.21), U, Cause.LOSS),
        (U, Signs(loss=0.19), D, Cause.LOSS),
        (H, Signs(latency=0.31, baseline=0.1), D, Cause.LATENCY),
        (H, Signs(latency=0.29, baseline=0.1), H, None),
        (D, Signs(latency=0.21, baseline=0.1), D, Cause.LATENCY),
        (D, Signs(latency=0.19, baseline=0.1), H, None),
        (H, Signs(latency=0.61, baseline=0.1), U, Cause.LATENCY),
        (U, Signs(latency=0.41, baseline=0.1), U, Cause.LATENCY),
        (U, Signs(latency=0.39, baseline=0.1), D, Cause.LATENCY),
        # A hundred times as long, and nobody minds.
        (H, Signs(latency=0.010, baseline=0.0001), H, None),
        (H, Signs(latency=0.030, baseline=0.0001), D, Cause.LATENCY),
        (H, Signs(errors=1), H, None),
        (H, Signs(errors=2), U, Cause.UNREACHABLE),
        (H, Signs(errors=1, unconfirmed=1), U, Cause.UNREACHABLE),
        (H, Signs(errors=1, unconfirmed=1, heard=True), H, None),
        (H, Signs(errors=2, refused=True), U, Cause.REFUSED),
        # The worst decides, and of those that are equal the more definite.
        (H, Signs(unconfirmed=3, loss=0.5), U, Cause.LOSS),
        (H, Signs(unconfirmed=7, loss=0.5), U, Cause.UNANSWERED),
        (H, Signs(loss=0.2, latency=1.0, baseline=0.09), U, Cause.LATENCY),
    ],
)
def test_signs(before: Status, signs: Signs, after: Status, cause: Cause | None) -> None:
    found, why, figure = grade(before, signs)
    assert found == after
    if cause is not None:
        assert why is cause
        assert figure > 0


SIGNS = st.builds(
    Signs,
    unconfirmed=st.integers(0, 10),
    heard=st.booleans(),
    host_answers=st.booleans(),
    loss=st.floats(0, 1),
    latency=st.floats(1e-6, 60),
    baseline=st.floats(1e-6, 60),
    errors=st.integers(0, 3),
    refused=st.booleans(),
)


@settings(max_examples=200, deadline=None)
@given(signs=SIGNS)
def test_a_worse_status_is_kept_more_easily_and_nobody_dies(signs: Signs) -> None:
    found = [grade(status, signs)[0] for status in (H, D, U)]
    assert found == sorted(found)
    assert found[2] < Status.DEAD
    for status in (H, D, U):
        # Whoever became so by these signs does not leave it by the same ones.
        became = grade(status, signs)[0]
        assert grade(became, signs)[0] >= min(became, status) or became >= status
        if became > status:
            assert grade(became, signs)[0] >= became


@settings(max_examples=200, deadline=None)
@given(signs=SIGNS)
def test_the_short_cut_overlooks_nothing(signs: Signs) -> None:
    if is_spotless(signs.unconfirmed + signs.errors, signs.loss, signs.latency, signs.baseline):
        assert grade(H, signs)[0] == H


def test_the_short_cut_is_taken() -> None:
    assert is_spotless(0, 0.01, 0.050, 0.040)
    assert is_spotless(0, 0.01, 0.015, 0.0001)
    assert is_spotless(0, 0.0, 0.0, 0.0)


@pytest.mark.parametrize("cause", Cause)
def test_every_cause_has_words(cause: Cause) -> None:
    told = str(Change(12.5, H, U, cause, 7.0))
    assert told.startswith("12.500: healthy -> unhealthy, ")
    assert "7" in told
    assert "{" not in told


# --- callbacks


def test_callbacks_are_told_in_order_and_later() -> None:
    callbacks: Callbacks[int, str] = Callbacks()
    told: list[tuple[int, str]] = []
    callbacks.post(0, "nobody listens")
    callbacks.deliver()
    callbacks.subscribe(lambda number, text: told.append((number, text)))
    callbacks.subscribe(lambda number, text: told.append((-number, text)))
    callbacks.post(1, "a")
    callbacks.post(2, "b")
    assert told == []
    callbacks.deliver()
    assert told == [(1, "a"), (-1, "a"), (2, "b"), (-2, "b")]
    callbacks.deliver()
    assert len(told) == 4


def test_what_a_callback_raises_is_kept_and_breaks_nothing() -> None:
    callbacks: Callbacks[int] = Callbacks()
    told: list[int] = []

    def bad(number: int) -> None:
        raise ValueError("line one\nline two " + "x" * 1000)

    callbacks.subscribe(bad)
    callbacks.subscribe(told.append)
    callbacks.post(1)
    callbacks.post(2)
    callbacks.deliver()
    assert told == [1, 2]
    assert callbacks.errors == 2
    assert callbacks.last_error.startswith("ValueError: line one line two x")
    assert len(callbacks.last_error) == ERROR_LENGTH


def test_a_callback_that_posts_more() -> None:
    callbacks: Callbacks[int] = Callbacks()
    told: list[int] = []

    def more(number: int) -> None:
        told.append(number)
        if number < 5:
            callbacks.post(number + 1)
            callbacks.deliver()
            assert told[-1] == number  # not before this one is done

    callbacks.subscribe(more)
    callbacks.post(0)
    callbacks.deliver()
    assert told == [0, 1, 2, 3, 4, 5]
    assert callbacks.errors == 0


def test_an_interrupt_passes_and_nothing_is_stuck() -> None:
    callbacks: Callbacks[int] = Callbacks()
    told: list[int] = []

    def interrupted(number: int) -> None:
        told.append(number)
        if number == 1:
            raise KeyboardInterrupt

    callbacks.subscribe(interrupted)
    callbacks.post(1)
    callbacks.post(2)
    with pytest.raises(KeyboardInterrupt):
        callbacks.deliver()
    callbacks.deliver()
    assert told == [1, 2]
    assert callbacks.errors == 0
