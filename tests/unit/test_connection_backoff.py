# SPDX-License-Identifier: Apache-2.0
"""Delays between attempts: the sequence, its jitter, and whatever number an attempt has."""

from __future__ import annotations

import math
import re
from fractions import Fraction
from random import Random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from userspace.connection.backoff import (
    ATTEMPTS_MAXIMUM,
    CAP_MAXIMUM,
    FACTOR_MAXIMUM,
    INITIAL_MINIMUM,
    Backoff,
    Jitter,
)
from xdp.errors import UsageError


class Loaded(Random):
    """Random numbers that are always the same one."""

    def __init__(self, value: float) -> None:
        super().__init__(0)
        self.value = value

    def random(self) -> float:
        return self.value


def delays(backoff: Backoff, count: int, seed: int = 7) -> list[float]:
    rng = Random(seed)
    return [backoff.delay(attempt, rng) for attempt in range(1, count + 1)]


def test_the_defaults() -> None:
    backoff = Backoff()
    assert msgspec.structs.asdict(backoff) == {
        "attempts": 5,
        "initial": 0.1,
        "factor": 2.0,
        "cap": 30.0,
        "jitter": "full",
    }
    assert [backoff.longest(attempt) for attempt in range(1, 8)] == pytest.approx(
        [0.1, 0.2, 0.4, 0.8, 1.6, 30.0, 30.0]
    )


def test_without_jitter() -> None:
    backoff = Backoff(attempts=8, initial=1.0, factor=3.0, cap=50.0, jitter=Jitter.NONE)
    rng = Random(7)
    drawn = rng.getstate()
    assert [backoff.delay(attempt, rng) for attempt in range(1, 8)] == [1, 3, 9, 27, 50, 50, 50]
    assert rng.getstate() == drawn


def test_the_delay_before_the_first_attempt_is_the_initial_one() -> None:
    backoff = Backoff(initial=0.5, jitter=Jitter.NONE)
    assert [backoff.delay(attempt, Random(7)) for attempt in (1, 0, -1, -(10**400))] == [0.5] * 4


def test_who_is_given_up_is_probed_at_the_cap() -> None:
    """Wherever the growing delays were by then."""
    backoff = Backoff(attempts=2, initial=0.1, factor=1.0, cap=20.0, jitter=Jitter.NONE)
    assert delays(backoff, 5) == [0.1, 0.1, 20.0, 20.0, 20.0]


@pytest.mark.parametrize(
    ("jitter", "least", "most"), [(Jitter.FULL, 0.0, 8.0), (Jitter.EQUAL, 4.0, 8.0), (Jitter.NONE, 8.0, 8.0)]
)
def test_what_is_left_to_chance(jitter: Jitter, least: float, most: float) -> None:
    backoff = Backoff(initial=8.0, jitter=jitter)
    assert backoff.delay(1, Loaded(0.0)) == least
    assert backoff.delay(1, Loaded(1.0)) == most
    assert backoff.delay(1, Loaded(0.5)) == (least + most) / 2
    assert backoff.longest(1) == 8.0


@pytest.mark.parametrize(("jitter", "least"), [(Jitter.FULL, 0.0), (Jitter.EQUAL, 0.5)])
def test_jitter_spreads_evenly(jitter: Jitter, least: float) -> None:
    """Of ten equal parts of the range none has more than its share, by much; seed 7."""
    backoff = Backoff(initial=1.0, jitter=jitter)
    rng = Random(7)
    parts = [0] * 10
    for _ in range(10_000):
        parts[int((backoff.delay(1, rng) - least) / (1 - least) * 10)] += 1
    assert max(parts) < 1150
    assert min(parts) > 850


def test_the_same_seed_gives_the_same_delays() -> None:
    backoff = Backoff()
    assert delays(backoff, 20) == delays(backoff, 20)
    assert delays(backoff, 20) != delays(backoff, 20, seed=8)


@settings(deadline=None)
@given(
    attempts=st.integers(1, ATTEMPTS_MAXIMUM),
    initial=st.floats(INITIAL_MINIMUM, CAP_MAXIMUM),
    factor=st.floats(1.0, FACTOR_MAXIMUM) | st.just(1.0) | st.just(math.nextafter(1.0, 2.0)),
    more=st.floats(0.0, CAP_MAXIMUM),
    attempt=st.integers(-5, 100) | st.integers(),
)
def test_no_number_is_too_large(
    attempts: int, initial: float, factor: float, more: float, attempt: int
) -> None:
    cap = max(initial, more)
    backoff = Backoff(attempts=attempts, initial=initial, factor=factor, cap=cap, jitter=Jitter.NONE)
    found = backoff.longest(attempt)
    assert initial <= found <= cap
    assert backoff.longest(attempt + 1) >= found
    if attempt > attempts:
        assert found == cap
    elif attempt <= 1:
        assert found == initial
    elif attempt <= 100:
        exact = min(Fraction(cap), Fraction(initial) * Fraction(factor) ** (attempt - 1))
        assert abs(Fraction(found) - exact) <= exact / 10**12


@pytest.mark.parametrize("attempt", [10**6, 10**18, 10**400])
def test_attempts_beyond_all_floats(attempt: int) -> None:
    backoff = Backoff(attempts=ATTEMPTS_MAXIMUM, jitter=Jitter.FULL)
    assert backoff.longest(attempt) == 30.0
    assert 0 <= backoff.delay(attempt, Random(7)) <= 30.0


@pytest.mark.parametrize("attempt", [1.0, math.nan, "1", None])
def test_an_attempt_is_counted_in_whole_numbers(attempt: int) -> None:
    with pytest.raises(UsageError, match="the number of an attempt is a whole number"):
        Backoff().delay(attempt, Random(7))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"attempts": 0}, "attempts are a whole number from 1 to"),
        ({"attempts": 5.0}, "attempts are a whole number from 1 to"),
        ({"attempts": ATTEMPTS_MAXIMUM + 1}, "attempts are a whole number from 1 to"),
        ({"initial": 0.0}, "initial delay: 0.0; allowed: 0.001 to 86400 seconds"),
        ({"initial": math.nan}, "initial delay: nan"),
        ({"initial": "1"}, "initial delay: '1'"),
        ({"factor": 0.5}, "factor: 0.5; allowed: 1 to 100"),
        ({"factor": math.inf}, "factor: inf"),
        ({"cap": 0.05}, "cap: 0.05; allowed: 0.1 to 86400 seconds, no less than the initial delay"),
        ({"cap": math.inf}, "cap: inf"),
        ({"cap": 1e6}, "cap: 1000000.0"),
        ({"jitter": "full"}, "jitter is one of full, equal, none, not 'full'"),
        ({"jitter": None}, "jitter is one of"),
    ],
)
def test_settings_are_checked(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        Backoff(**wrong)  # type: ignore[arg-type]


def test_settings_are_read_and_written() -> None:
    backoff = Backoff(attempts=3, cap=10.0, jitter=Jitter.EQUAL)
    assert msgspec.json.decode(msgspec.json.encode(backoff), type=Backoff) == backoff
    text = b'attempts = 3\ncap = 10\njitter = "equal"\n'
    assert msgspec.toml.decode(text, type=Backoff) == backoff
    with pytest.raises(UsageError, match="attempts are"):
        msgspec.toml.decode(b"attempts = 0", type=Backoff)
    with pytest.raises(msgspec.ValidationError, match="jitter"):
        msgspec.toml.decode(b'jitter = "some"', type=Backoff)
