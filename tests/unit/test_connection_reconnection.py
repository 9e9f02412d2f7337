# SPDX-License-Identifier: Apache-2.0
"""ReconnectionManager: what becomes of one connection, what callbacks may do, what is refused."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from functools import partial
from random import Random

import msgspec
import pytest

from tests.documents import ROOT, blocks
from tests.unit.connection_reconnections import Told
from userspace.connection.backoff import Backoff, Jitter
from userspace.connection.reconnection import (
    ATTEMPT_TIMEOUT,
    ERROR_LENGTH,
    LIMIT_MAXIMUM,
    OURS,
    PROOF_TIME,
    Phase,
    ReconnectionManager,
    TooManyConnectionsError,
)
from userspace.connection.states import Cause
from xdp.errors import UsageError

# --- one connection


def test_an_attempt_after_a_delay() -> None:
    told = Told()
    manager = told.manager
    assert (manager.next_timeout(), manager.is_reconnecting("a")) == (math.inf, False)
    manager.schedule(0.0, "a", Cause.LOST)
    assert (manager.next_timeout(), manager.is_reconnecting("a")) == (1.0, True)
    assert told.tries(0.999) == []
    assert told.tries(1.0) == ["a"]
    assert told.tries(1.0) == []
    assert (told.phase(), manager.is_reconnecting("a")) == (Phase.TRYING, True)
    assert manager.next_timeout() == 1.0 + ATTEMPT_TIMEOUT


def test_delays_grow_until_it_is_given_up_once_and_then_it_is_probed() -> None:
    told = Told()
    told.manager.schedule(0.0, "a", Cause.LOST)
    now, delays, given_up = 0.0, [], []
    for turn in range(8):
        at = told.manager.next_timeout()
        delays.append(at - now)
        now = at
        assert told.tries(now) == ["a"]
        told.manager.on_failed(now, "a", Cause.REFUSED if turn == 2 else Cause.TIMED_OUT)
        given_up.append(len(told.gave_up))
        assert told.manager.has_given_up("a") == (turn >= 2)
    assert delays == [1, 2, 4, 16, 16, 16, 16, 16]
    assert given_up == [0, 0, 1, 1, 1, 1, 1, 1]
    assert told.gave_up == [("a", Cause.REFUSED)]
    looked = told.manager.look("a")
    assert looked is not None
    assert (looked.failures, looked.given_up, looked.cause) == (8, True, Cause.TIMED_OUT)
    assert (looked.timer, looked.since) == (now + 16, now)


def test_an_attempt_that_takes_too_long_is_over() -> None:
    told = Told(attempt_timeout=3.0)
    manager = told.manager
    manager.schedule(0.0, "a", Cause.LOST)
    told.tries(1.0)
    assert manager.on_timeout(3.999) == []
    assert manager.on_timeout(4.0) == ["a"]
    assert manager.on_timeout(4.0) == []
    looked = manager.look("a")
    assert looked is not None
    assert (looked.phase, looked.failures, looked.cause, looked.timer) == (
        Phase.WAITING,
        1,
        Cause.TIMED_OUT,
        6.0,
    )
    manager.on_failed(4.0, "a", Cause.TIMED_OUT)  # the caller ends it, and says so as well
    assert (manager.snapshot().failed, manager.snapshot().timed_out) == (1, 1)


def test_an_attempt_that_is_answered_after_all_counts() -> None:
    told = Told(attempt_timeout=3.0)
    manager = told.manager
    manager.schedule(0.0, "a", Cause.LOST)
    told.tries(1.0)
    assert manager.on_timeout(4.0) == ["a"]
    manager.on_connected(4.5, "a")
    assert (told.phase(), manager.snapshot().late) == (Phase.UNPROVED, 1)
    assert told.tries(6.0) == []


def test_it_is_well_when_it_was_heard_and_has_lived() -> None:
    told = Told()
    manager = told.manager
    manager.schedule(0.0, "a", Cause.LOST)
    told.tries(1.0)
    manager.on_connected(2.0, "a")
    assert (told.phase(), manager.is_reconnecting("a")) == (Phase.UNPROVED, False)
    manager.on_proved(2.5, "a")
    assert told.phase() is Phase.UNPROVED
    assert manager.next_timeout() == 2.0 + PROOF_TIME
    assert told.tries(2.0 + PROOF_TIME) == []
    assert (told.phase(), len(manager), manager.next_timeout()) == (None, 0, math.inf)
    assert manager.snapshot().proved == 1


def test_living_is_no_proof_without_a_word() -> None:
    told = Told()
    manager = told.manager
    manager.on_connecting(0.0, "a")
    manager.on_connected(1.0, "a")
    assert told.tries(100.0) == []
    assert (told.phase(), manager.next_timeout()) == (Phase.UNPROVED, math.inf)
    manager.on_proved(101.0, "a")
    assert told.phase() is None


def test_a_word_is_no_proof_at_once() -> None:
    """Who accepts, answers and hangs up is asked less and less often, and given up."""
    told = Told()
    manager = told.manager
    manager.schedule(0.0, "a", Cause.LOST)
    now, delays = 0.0, []
    for turn in range(4):
        delays.append(manager.next_timeout() - now)
        now = manager.next_timeout()
        assert told.tries(now) == ["a"]
        manager.on_connected(now, "a")
        manager.on_proved(now, "a")
        now += PROOF_TIME / 2
        if turn % 2:
            manager.on_failed(now, "a", Cause.PEER_CLOSED)
        else:
            manager.schedule(now, "a", Cause.PEER_CLOSED)
    assert delays == [1, 2, 4, 16]
    assert told.gave_up == [("a", Cause.PEER_CLOSED)]
    assert manager.snapshot().lost_early == 4


def test_what_was_heard_of_the_last_connection_proves_nothing_of_this_one() -> None:
    told = Told()
    manager = told.manager
    manager.on_connecting(0.0, "a")
    manager.on_connected(0.0, "a")
    manager.on_proved(0.0, "a")
    manager.schedule(1.0, "a", Cause.LOST)
    assert told.tries(3.0) == ["a"]
    manager.on_connected(3.0, "a")
    told.tries(3.0 + PROOF_TIME)
    assert told.phase() is Phase.UNPROVED


def test_all_is_as_new_after_the_proof() -> None:
    told = Told()
    manager = told.manager
    manager.on_connecting(0.0, "a")
    for at in (0.0, 2.0, 6.0):
        assert told.tries(at) == (["a"] if at else [])
        manager.on_failed(at, "a", Cause.REFUSED)
    assert manager.has_given_up("a")
    assert told.tries(22.0) == ["a"]
    manager.on_connected(22.0, "a")
    assert manager.has_given_up("a")  # not yet
    manager.on_proved(30.0, "a")
    assert not manager.has_given_up("a")
    manager.schedule(40.0, "a", Cause.LOST)
    assert manager.next_timeout() == 41.0
    for at in (41.0, 43.0, 47.0):
        assert told.tries(at) == ["a"]
        manager.on_failed(at, "a", Cause.LOST)
    assert told.gave_up == [("a", Cause.REFUSED), ("a", Cause.LOST)]


@pytest.mark.parametrize("cause", OURS)
def test_nobody_is_given_up_for_what_failed_on_this_side(cause: Cause) -> None:
    told = Told()
    manager = told.manager
    manager.schedule(0.0, "a", cause)
    delays = []
    for _ in range(6):
        now = manager.next_timeout()
        told.tries(now)
        manager.on_failed(now, "a", cause)
        delays.append(manager.next_timeout() - now)
    assert delays == [2, 4, 16, 16, 16, 16]
    looked = manager.look("a")
    assert looked is not None
    assert (looked.failures, looked.given_up, looked.cause) == (0, False, cause)
    assert (told.gave_up, manager.snapshot().failed) == ([], 6)


def test_scheduling_twice_is_scheduling_once() -> None:
    told = Told()
    manager = told.manager
    manager.schedule(0.0, "a", Cause.LOST)
    manager.schedule(0.5, "a", Cause.UNHEALTHY)
    assert manager.next_timeout() == 1.0
    manager.on_timeout(1.0)
    manager.schedule(1.0, "a", Cause.LOST)
    assert manager.take_due(1.0) == ["a"]
    manager.schedule(1.0, "a", Cause.LOST)
    assert told.phase() is Phase.TRYING
    assert manager.snapshot().taken_up == 1


@pytest.mark.parametrize("phase", Phase)
def test_nothing_happens_after_cancelling(phase: Phase) -> None:
    told = Told()
    manager = told.manager
    manager.schedule(0.0, "a", Cause.LOST)
    if phase is not Phase.WAITING:
        manager.on_timeout(1.0)
    if phase in {Phase.TRYING, Phase.UNPROVED}:
        manager.take_due(1.0)
    if phase is Phase.UNPROVED:
        manager.on_connected(1.0, "a")
    assert told.phase() is phase
    manager.cancel("a")
    manager.cancel("a")
    assert (len(manager), manager.next_timeout(), manager.is_reconnecting("a")) == (0, math.inf, False)
    # reports that come late
    manager.on_connected(1.0, "a")
    manager.on_proved(1.0, "a")
    manager.on_failed(1.0, "a", Cause.REFUSED)
    assert manager.on_link_up(1.0, ["a"]) == []
    assert told.tries(1000.0) == []
    assert (len(manager), manager.snapshot().cancelled) == (0, 1)


def test_an_attempt_of_the_callers_own() -> None:
    told = Told(burst=1, rate=1.0)
    manager = told.manager
    manager.on_connecting(0.0, "a")
    assert (told.phase(), manager.next_timeout()) == (Phase.TRYING, ATTEMPT_TIMEOUT)
    manager.on_failed(2.0, "a", Cause.REFUSED)
    manager.on_connecting(2.5, "a")  # not waiting for its time
    assert told.phase() is Phase.TRYING
    assert told.tries(4.0) == []
    manager.on_connecting(5.0, "a")  # it begins once more, and has its time from now
    assert manager.next_timeout() == 5.0 + ATTEMPT_TIMEOUT
    assert manager.snapshot().attempts == 2
    manager.schedule(5.0, "b", Cause.LOST)
    assert told.tries(6.0) == ["b"]  # the one token was not used up by it


# --- callbacks


def test_a_callback_may_raise() -> None:
    class AwkwardError(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no words")

    def complain(key: str, cause: Cause) -> None:
        raise AwkwardError if key == "b" else ValueError("no\n room " + "x" * 1000)

    told = Told(on_give_up=complain, backoff=Backoff(attempts=1, initial=1.0, jitter=Jitter.NONE))
    manager = told.manager
    for count, key in enumerate("ab", start=1):
        manager.on_connecting(0.0, key)
        manager.on_failed(0.0, key, Cause.REFUSED)
        assert manager.snapshot().callback_errors == count
        assert (told.phase(key), manager.has_given_up(key)) == (Phase.WAITING, True)
        if key == "a":
            assert manager.snapshot().last_callback_error.startswith("ValueError: no room xxx")
            assert len(manager.snapshot().last_callback_error) == ERROR_LENGTH
    assert "AwkwardError" in manager.snapshot().last_callback_error


def test_what_stops_the_program_is_not_held_up() -> None:
    def stop(key: str, cause: Cause) -> None:
        raise KeyboardInterrupt

    told = Told(on_give_up=stop, backoff=Backoff(attempts=1))
    told.manager.on_connecting(0.0, "a")
    with pytest.raises(KeyboardInterrupt):
        told.manager.on_failed(0.0, "a", Cause.REFUSED)
    assert (told.phase(), told.manager.has_given_up("a")) == (Phase.WAITING, True)


# --- nothing grows


def test_connecting_and_disconnecting_leaves_nothing() -> None:
    """Ten thousand cycles, in one minute."""
    manager = ReconnectionManager[int](0.0, rng=Random(7))
    most = 0
    for cycle in range(10_000):
        now = cycle * 0.006
        manager.schedule(now, cycle, Cause.LOST)
        over = manager.on_timeout(now)
        assert over == []
        for key in manager.take_due(now):
            if key % 3 == 0:
                manager.cancel(key)
            elif key % 3 == 1:
                manager.on_connected(now, key)
                manager.on_proved(now, key)
            else:
                manager.on_failed(now, key, Cause.REFUSED)
        if cycle >= 50 and cycle % 3:
            manager.cancel(cycle - 50)
        most = max(most, len(manager._timers._heap), len(manager._records), len(manager._line))
    assert most < 3000
    manager.on_timeout(100.0)
    for key in range(10_000):
        manager.cancel(key)
    assert (len(manager), len(manager._timers), len(manager._line)) == (0, 0, 0)
    assert set(manager.snapshot().phases.values()) == {0}
    assert manager.next_timeout() == math.inf


def test_keys_are_limited() -> None:
    told = Told(limit=2)
    manager = told.manager
    manager.schedule(0.0, "a", Cause.LOST)
    manager.on_connecting(0.0, "b")
    for call in (partial(manager.schedule, 0.0, "c", Cause.LOST), partial(manager.on_connecting, 0.0, "c")):
        with pytest.raises(TooManyConnectionsError, match="2 connections are being reconnected") as caught:
            call()
        assert "cancel those" in caught.value.hint
    manager.schedule(0.0, "a", Cause.LOST)  # is in it
    manager.cancel("b")
    manager.schedule(0.0, "c", Cause.LOST)
    assert len(manager) == 2


# --- what is said about it


def test_a_snapshot_is_json_and_stays_as_it_was() -> None:
    told = Told()
    told.manager.schedule(0.0, "a", Cause.LOST)
    before = told.manager.snapshot()
    told.tries(1.0)
    assert json.loads(msgspec.json.encode(before))["phases"]["waiting"] == 1
    after = json.loads(msgspec.json.encode(told.manager.snapshot()))
    assert (after["phases"]["waiting"], after["phases"]["trying"], after["attempts"]) == (0, 1, 1)
    looked = told.manager.look("a")
    assert json.loads(msgspec.json.encode(looked))["phase"] == "trying"
    assert repr(told.manager) == (
        "<ReconnectionManager 0 waiting, 0 ready, 1 trying, 0 unproved; 0 given up>"
    )


def test_the_same_seed_gives_the_same_attempts() -> None:
    def attempts(seed: int) -> list[tuple[float, int]]:
        manager = ReconnectionManager[int](0.0, rng=Random(seed))
        for key in range(20):
            manager.schedule(0.0, key, Cause.LOST)
        found: list[tuple[float, int]] = []
        while len(found) < 200:
            now = manager.next_timeout()
            manager.on_timeout(now)
            for key in manager.take_due(now):
                found.append((now, key))
                manager.on_failed(now, key, Cause.REFUSED)
        return found

    assert attempts(7) == attempts(7)
    assert attempts(7) != attempts(8)


def test_the_example_in_the_documents(capsys: pytest.CaptureFixture[str]) -> None:
    """docs/connections.md: five attempts, given up, then probed."""
    (block,) = [
        one
        for one in blocks(ROOT / "docs" / "connections.md")
        if one.language == "python" and "connection.reconnection" in one.text
    ]
    exec(compile(block.text, "docs/connections.md", "exec"), {})
    said = capsys.readouterr().out.splitlines()
    assert [line.partition(": ")[2] for line in said[:5]] == ["trying validator-a"] * 5
    assert said[5] == "gave up validator-a"
    assert len(said) > 6


# --- what is not allowed


@pytest.mark.parametrize("now", [math.nan, math.inf, -math.inf, 1e300])
def test_what_is_no_time_is_refused(now: float) -> None:
    told = Told()
    manager = told.manager
    calls: list[Callable[[float], object]] = [
        partial(manager.schedule, key="a", cause=Cause.LOST),
        partial(manager.on_connecting, key="a"),
        partial(manager.on_connected, key="a"),
        partial(manager.on_proved, key="a"),
        partial(manager.on_failed, key="a", cause=Cause.LOST),
        manager.on_link_up,
        manager.on_timeout,
        manager.take_due,
        partial(ReconnectionManager, rng=Random(7)),
    ]
    for call in calls:
        with pytest.raises(UsageError, match="now is seconds"):
            call(now)
    assert len(manager) == 0
    assert manager.snapshot().link_ups == 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rate": 0.0}, "rate of attempts: 0.0; allowed: 1 to 1e+06 a second"),
        ({"rate": math.inf}, "rate of attempts: inf"),
        ({"rate": math.nan}, "rate of attempts: nan"),
        ({"burst": 0}, "burst of attempts: 0"),
        ({"burst": "9"}, "burst of attempts: '9'"),
        ({"proof_time": -1.0}, "proof time: -1.0; allowed: 0 to 3600 seconds"),
        ({"proof_time": math.inf}, "proof time: inf"),
        ({"attempt_timeout": 0.0}, "attempt timeout: 0.0; allowed: 0.5 to 3600 seconds"),
        ({"limit": 0}, "limit of keys is a whole number from 1"),
        ({"limit": LIMIT_MAXIMUM + 1}, "limit of keys is a whole number from 1"),
        ({"limit": 1.0}, "limit of keys is a whole number from 1"),
    ],
)
def test_settings_are_checked(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        Told(**wrong)
