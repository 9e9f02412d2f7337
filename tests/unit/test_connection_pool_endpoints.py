# SPDX-License-Identifier: Apache-2.0
"""Endpoints of a pool: several addresses, attempts that may be made, health, failover, outliers, panic."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.unit.pool_audit import audit
from tests.unit.pool_driver import Driven
from userspace.connection.outliers import OutlierSettings
from userspace.connection.pool import Open
from userspace.connection.pool_settings import ENDPOINTS_MAXIMUM
from userspace.connection.slots import ADDRESS_MEMORY, DEAD, DEGRADED, HEALTHY, UNHEALTHY
from userspace.connection.states import Cause
from userspace.connection.waiters import EndpointGoneError, TicketState
from xdp.errors import UsageError


def lent(driven: Driven, now: float, count: int = 40, **options: object) -> Counter[object]:
    """Whose connections are lent, one after the other."""
    counted = Counter[object]()
    for _ in range(count):
        lease = driven.acquire(now, **options)
        counted[lease.endpoint] += 1
        driven.release(now, lease)
    return counted


def opened(*keys: object, **options: object) -> Driven:
    """An idle connection to each."""
    driven = Driven(*keys, **options)  # type: ignore[arg-type]
    for key in keys:
        driven.pool.lookup(0.0, key)
    driven.do(0.0)
    return driven


def number_of(driven: Driven, key: object) -> int:
    """Of the first connection to an endpoint."""
    return driven.pool._endpoints[key].slots[0].number


# --- attempts


def test_one_tries_for_all() -> None:
    driven = Driven("a", max_size=5)
    for lease in [driven.acquire(0.0) for _ in range(4)]:
        driven.release(0.0, lease)
    for number in range(4):
        driven.pool.on_lost(1.0, number, Cause.LOST)
    assert driven.counts() == (0, 0, 4, 0)
    waiting = driven.wait(1.0)
    driven.down = {"a"}
    before = len(driven.opens)
    assert driven.do(1.0) == []  # nobody is asked until it may be
    for _ in range(3):
        assert driven.pool.may_open(2.0, "a")
        driven.do(2.0)
    assert len(driven.opens) == before + 3  # one at a time
    driven.down.clear()
    assert driven.pool.may_open(3.0, "a")
    driven.do(3.0)
    assert waiting.lease is not None
    assert driven.counts() == (1, 3, 0, 0)  # the others have followed
    assert not driven.pool.may_open(3.0, "a")
    assert not driven.pool.may_open(3.0, "unknown")
    assert {action.connection for action in driven.opens} == {0, 1, 2, 3}


def test_a_permission_that_nobody_uses_waits_for_who_needs_it() -> None:
    driven = Driven("a", "b", max_size=1)
    driven.down = {"a"}
    ticket = driven.wait(0.0, endpoint="a", deadline=5.0)
    driven.do(0.0)
    driven.until(0.0, 5.0)
    assert ticket.state is TicketState.FAILED
    driven.acquire(6.0, endpoint="b")  # took the only place
    assert driven.causes() == [Cause.EVICTED]
    assert not driven.pool.may_open(7.0, "a")
    driven.down.clear()
    driven.pool.on_closed(8.0, 1)
    assert driven.acquire(8.0, endpoint="a").endpoint == "a"


def test_failed_endpoints_give_up_their_places_but_one_first() -> None:
    driven = Driven("bad", "good", max_size=6, max_per_endpoint=4)
    for lease in [driven.acquire(0.0, endpoint="bad") for _ in range(4)]:
        driven.release(0.0, lease)
    driven.release(0.0, driven.acquire(0.0, endpoint="good"))
    for number in range(4):
        driven.pool.on_lost(1.0, number, Cause.LOST)
    held = [driven.acquire(1.0, endpoint="good") for _ in range(4)]
    assert driven.causes() == [Cause.EVICTED] * 2
    driven.pool.add_endpoint(1.0, "other")
    held.append(driven.acquire(1.0, endpoint="other"))
    assert len(driven.closes) == 3
    bad = next(one for one in driven.pool.endpoint_snapshots() if one.endpoint == "bad")
    assert (bad.opening, bad.failed, bad.gate) == (1, True, "shut")
    driven.release(1.0, held.pop(0))
    driven.acquire(1.0, endpoint="other")
    assert driven.opens[driven.closes[-1].connection].endpoint == "good"  # idle, and not that last place
    driven.acquire(1.0, endpoint="other")  # nothing else is left
    assert driven.opens[driven.closes[-1].connection].endpoint == "bad"
    audit(driven.pool)


def test_places_that_wait_in_vain_are_given_up_in_time() -> None:
    driven = Driven("a", idle_timeout=100.0)
    for lease in [driven.acquire(0.0) for _ in range(3)]:
        driven.release(0.0, lease)
    for number in range(3):
        driven.pool.on_lost(1.0, number, Cause.LOST)
    driven.until(1.0, 500.0)
    assert driven.causes() == [Cause.IDLE] * 2
    assert driven.counts() == (0, 0, 1, 0)  # it is probed for as long as the endpoint is wanted


# --- addresses


def test_addresses_are_tried_in_turn() -> None:
    driven = Driven()
    driven.pool.add_endpoint(0.0, "a", addresses=[1, 2, 3])
    driven.down = {1, 2}
    driven.wait(0.0, endpoint="a")
    for _ in range(2):
        driven.do(0.0)
        driven.pool.may_open(0.0, "a")
    driven.do(0.0)
    assert [action.address for action in driven.opens] == [1, 2, 3]
    assert driven.counts() == (1, 0, 0, 0)
    driven.down.clear()
    driven.acquire(1.0)
    driven.acquire(1.0 + ADDRESS_MEMORY)
    driven.acquire(1.0 + ADDRESS_MEMORY)
    # The others failed a moment ago; which is forgotten, and then they are the least used ones.
    assert [action.address for action in driven.opens[3:]] == [3, 1, 2]


def test_who_answers_is_forgiven() -> None:
    driven = Driven()
    driven.pool.add_endpoint(0.0, "a", addresses=[1, 2])
    driven.hold_opening = True
    driven.wait(0.0)
    for cause in (Cause.TIMED_OUT, Cause.TIMED_OUT, Cause.REFUSED):
        driven.do(0.0)
        driven.pool.on_open_failed(0.0, 0, cause)
        driven.pool.may_open(0.0, "a")
    assert [action.address for action in driven.opens] == [1, 2, 1]
    driven.do(0.0)
    assert driven.opens[-1].address == 2  # it has failed once, the other one twice
    driven.pool.on_opened(0.0, 0)
    assert driven.pool._endpoints["a"].troubles == {0: (2, 0.0)}
    driven.pool.on_lost(0.0, 0, Cause.LOST)
    driven.pool.may_open(0.0, "a")
    driven.do(0.0)
    driven.pool.on_open_failed(0.0, 0, Cause.LOCAL_ERROR)  # no fault of the address
    assert driven.pool._endpoints["a"].troubles == {0: (2, 0.0)}


def test_addresses_may_change() -> None:
    driven = Driven()
    driven.pool.add_endpoint(0.0, "a", addresses=["old", "kept"])
    driven.hold_opening = True
    for _ in range(4):
        driven.wait(0.0)
    driven.do(0.0)
    for number in (0, 1, 2):
        driven.pool.on_opened(0.0, number)
        driven.do(0.0)
    held, idle, kept = (ticket.result() for ticket in driven.pool.take_grants())
    assert [action.address for action in driven.opens] == ["old", "kept", "old", "kept"]
    driven.pool.release(0.0, kept)
    driven.pool.release(0.0, idle)
    held.who, opening = None, 3
    driven.pool.add_endpoint(1.0, "a", addresses=["new"])
    driven.do(1.0)
    assert driven.causes() == [Cause.REMOVED] * driven.counts()[3] + [Cause.REMOVED] * len(driven.closes)
    assert driven.pool.active_count == 2  # held, and the waiter whom one went to
    driven.pool.on_opened(1.0, opening)
    driven.do(1.0)
    driven.release(1.0, held)
    assert driven.causes()[-1] is Cause.EXPIRED
    driven.pool.lookup(1.0, "a")
    driven.do(1.0)
    assert driven.opens[-1].address == "new"
    audit(driven.pool)


# --- endpoints that come and go


def test_an_endpoint_is_removed() -> None:
    driven = Driven("a", "b", max_size=4)
    held = driven.acquire(0.0, endpoint="a")
    driven.release(0.0, driven.acquire(0.0, endpoint="a"))
    other = driven.acquire(0.0, endpoint="a")
    asked = driven.wait(0.0, endpoint="a")
    driven.pool.take_actions()
    driven.pool.remove_endpoint(1.0, "a")
    driven.do(1.0)
    assert "a" not in driven.pool
    assert driven.pool.take_grants() == [asked]
    with pytest.raises(EndpointGoneError, match="endpoint 'a' was removed"):
        asked.result()
    driven.pool.add_endpoint(2.0, "a")  # another one of that name
    assert not held.lost
    driven.release(2.0, held)
    driven.release(2.0, other)
    assert set(driven.causes()) == {Cause.REMOVED}
    assert driven.pool.size == 0
    assert driven.acquire(3.0, endpoint="a").connection == 3
    audit(driven.pool)


def test_a_lost_connection_of_a_removed_endpoint_does_not_come_back() -> None:
    driven = Driven("a")
    held = driven.acquire(0.0)
    driven.pool.remove_endpoint(0.0, "a")
    driven.pool.on_lost(1.0, held.connection, Cause.LOST)
    driven.do(1.0)
    assert driven.causes() == [Cause.REMOVED]
    assert driven.pool.size == 0


def test_weights_may_change() -> None:
    driven = opened("a", "b")
    driven.pool.add_endpoint(0.0, "a", weight=1 << 40)
    assert lent(driven, 0.0)["a"] == 40
    driven.pool.add_endpoint(0.0, "a", weight=1)
    driven.pool.add_endpoint(0.0, "b", weight=1 << 40)
    assert lent(driven, 0.0)["b"] == 40
    audit(driven.pool)


def test_endpoints_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("userspace.connection.pool_events.ENDPOINTS_MAXIMUM", 2)
    driven = Driven("a", "b")
    with pytest.raises(UsageError, match="a pool has 2 endpoints at most"):
        driven.pool.add_endpoint(0.0, "c")
    driven.pool.add_endpoint(0.0, "b", weight=7)
    assert ENDPOINTS_MAXIMUM == 100_000


# --- health


def test_the_healthy_are_preferred_and_the_dead_are_not_used() -> None:
    driven = opened("a", "b", "c", panic_threshold=0.0)
    driven.pool.on_health(1.0, number_of(driven, "a"), DEGRADED)
    driven.pool.on_health(1.0, number_of(driven, "b"), UNHEALTHY)
    assert lent(driven, 1.0) == {"c": 40}
    driven.pool.on_lost(1.0, number_of(driven, "c"), Cause.LOST)
    assert lent(driven, 1.0) == {"a": 40}
    driven.pool.on_health(1.0, number_of(driven, "a"), DEAD)
    assert lent(driven, 1.0) == {"b": 40}
    driven.pool.on_health(1.0, number_of(driven, "b"), DEAD)
    waiting = driven.wait(1.0)
    driven.pool.on_health(2.0, number_of(driven, "a"), UNHEALTHY)  # it is back: who waits gets it
    assert waiting.result().endpoint == "a"
    assert driven.pool.lookup(2.0, "b") is None


def test_what_died_while_it_was_borrowed_is_closed() -> None:
    driven = Driven("a")
    lease = driven.acquire(0.0)
    driven.pool.on_health(0.0, lease.connection, UNHEALTHY)
    driven.release(0.0, lease)
    assert driven.counts() == (0, 1, 0, 0)
    lease = driven.acquire(0.0)
    driven.pool.on_health(0.0, lease.connection, DEAD)
    driven.release(0.0, lease)
    assert driven.causes() == [Cause.UNHEALTHY]


def test_an_endpoint_that_is_down_gives_and_gets_nothing() -> None:
    driven = opened("a", "b")
    driven.pool.on_endpoint(1.0, "a", False)
    driven.pool.on_endpoint(1.0, "unknown", False)
    assert lent(driven, 1.0) == {"b": 40}
    assert driven.pool.lookup(1.0, "a") is None
    waiting = driven.wait(1.0, endpoint="a")
    assert driven.do(1.0) == []
    driven.pool.on_endpoint(2.0, "a", True)
    assert waiting.result().endpoint == "a"
    driven.pool.on_endpoint(3.0, "a", False)
    driven.pool.on_lost(3.0, waiting.result().connection, Cause.LINK_DOWN)
    assert not driven.pool.may_open(3.0, "a")
    assert driven.do(3.0) == []
    driven.pool.on_endpoint(4.0, "a", True)
    assert [type(action) for action in driven.do(4.0)] == [Open]  # it may, since 3.0


# --- sticky choices


def test_a_sticky_key_stays_with_its_endpoint() -> None:
    driven = opened(*"abcdefgh")
    first = {key: lent(driven, 0.0, 3, sticky=key) for key in range(20)}
    assert all(len(counted) == 1 for counted in first.values())
    assert len({next(iter(counted)) for counted in first.values()}) > 4
    (home,) = first[7]
    driven.pool.on_health(1.0, number_of(driven, home), UNHEALTHY)  # at once
    (other,) = lent(driven, 1.0, 3, sticky=7)
    assert other != home
    driven.pool.on_health(2.0, number_of(driven, home), HEALTHY)
    assert lent(driven, 2.0, 3, sticky=7) == {home: 3}
    again = opened(*"abcdefgh")
    assert {key: lent(again, 0.0, 3, sticky=key) for key in range(20)} == first  # the same seed


def test_who_waits_for_a_sticky_key_fails_over_at_once() -> None:
    driven = Driven("a", "b", max_size=4, max_per_endpoint=1)
    held = {lease.endpoint: lease for lease in (driven.acquire(0.0, endpoint=key) for key in "ab")}
    waiting = driven.wait(0.0, sticky=1)
    (home,) = (one.endpoint for one in driven.pool.endpoint_snapshots() if one.waiting)
    other = "ab"[home == "a"]
    driven.release(0.0, held[other])
    assert waiting.state is TicketState.WAITING  # it is to be the same, as long as that works
    driven.pool.on_lost(0.0, held[home].connection, Cause.LOST)
    assert waiting.result().endpoint == other
    second = driven.wait(0.0, sticky=1)
    driven.pool.remove_endpoint(0.0, home)
    driven.release(0.0, waiting.result())
    assert second.result().endpoint == other
    driven.pool.on_endpoint(0.0, other, False)
    third = driven.wait(0.0, sticky=1)  # nobody is up
    driven.pool.on_endpoint(1.0, other, True)
    driven.release(1.0, second.result())
    assert third.result().endpoint == other


def test_who_fails_over_gets_a_connection_of_his_own() -> None:
    driven = Driven("a", "b", max_per_endpoint=1)
    waiting = driven.wait(0.0, sticky=1)
    (first,) = driven.pool.take_actions()
    assert isinstance(first, Open)
    driven.pool.on_open_failed(0.0, first.connection, Cause.REFUSED)
    (second,) = driven.do(0.0)
    assert isinstance(second, Open)
    assert {first.endpoint, second.endpoint} == {"a", "b"}
    assert waiting.result().endpoint == second.endpoint


def test_what_is_lost_of_a_removed_endpoint_makes_room_once() -> None:
    driven = Driven("a", max_size=1)
    waiting = driven.wait(0.0)
    driven.do(0.0)
    driven.pool.remove_endpoint(0.0, "a")
    driven.pool.add_endpoint(0.0, "b")
    driven.pool.on_lost(0.0, waiting.result().connection, Cause.LOST)  # before anybody knew that he has it
    driven.do(0.0)
    assert driven.causes() == [Cause.REMOVED]
    assert waiting.result().endpoint == "b"


# --- outliers and panic


def test_an_outlier_is_left_out_and_comes_back() -> None:
    driven = opened("a", "b", "c", outliers=OutlierSettings(jitter=0.0))
    for _ in range(4):
        driven.pool.on_result(0.0, "a", worked=False)
    driven.pool.on_result(0.0, "a", worked=True)
    for _ in range(5):
        driven.pool.on_result(0.0, "a", worked=False)
    assert driven.pool.snapshot().ejected == 1
    assert set(lent(driven, 0.0)) == {"b", "c"}
    assert lent(driven, 0.0, 3, endpoint="a") == {"a": 3}  # who asks for it gets it
    assert driven.pool.lookup(0.0, "a") is not None
    assert driven.until(0.0, 29.9) == 29.9
    held = [driven.acquire(29.9, endpoint=key) for key in "bc"]
    driven.pool._sizing._max_size = 3
    waiting = driven.wait(29.9)
    driven.until(29.9, 30.0)
    assert waiting.result().endpoint == "a"
    for lease in held:
        driven.release(30.0, lease)
    assert driven.pool.snapshot().ejections == 1
    driven.pool.on_result(30.0, "unknown", worked=False)


def test_who_takes_any_does_not_get_an_outlier() -> None:
    driven = Driven("a", "b", "c", max_size=3)
    held = {key: driven.acquire(0.0, endpoint=key) for key in "abc"}
    for _ in range(5):
        driven.pool.on_result(0.0, "a", worked=False)
    anyone, asked = driven.wait(0.0), driven.wait(0.0, endpoint="a")
    driven.release(0.0, held["a"])
    assert (anyone.state, asked.state) == (TicketState.WAITING, TicketState.GRANTED)
    driven.release(0.0, held["b"])
    assert anyone.result().endpoint == "b"


def test_broken_connections_make_outliers_and_refused_ones_do_not() -> None:
    driven = Driven("a", "b", "c")
    for _ in range(5):
        driven.release(0.0, driven.acquire(0.0, endpoint="a"), broken=True)
    assert driven.pool.snapshot().ejected == 1
    driven = Driven("a", "b", "c")
    driven.down = {"a"}
    driven.wait(0.0, endpoint="a")
    for _ in range(8):
        driven.do(0.0)
        driven.pool.may_open(0.0, "a")
    assert driven.pool.snapshot().open_failed == 8
    assert driven.pool.snapshot().ejected == 0  # it has nobody to do badly with
    driven.down.clear()
    driven.do(0.0)
    for _ in range(5):
        driven.pool.on_lost(0.0, 0, Cause.PEER_CLOSED)
        driven.pool.may_open(0.0, "a")
        driven.do(0.0)
    assert driven.pool.snapshot().ejected == 1
    driven.pool.on_lost(0.0, 0, Cause.LOCAL_ERROR)
    assert driven.pool._endpoints["a"].record.run == 5  # not its fault


def test_in_panic_health_is_ignored() -> None:
    driven = opened(*"abcde")
    for key in "abc":
        assert not driven.pool.panic
        driven.pool.on_health(1.0, number_of(driven, key), UNHEALTHY)
    assert driven.pool.panic
    counted = lent(driven, 1.0, 300)
    assert set(counted) == set("abcde")
    assert all(count == pytest.approx(60, abs=30) for count in counted.values())
    driven.pool.on_health(2.0, number_of(driven, "a"), DEAD)
    driven.pool.on_health(2.0, number_of(driven, "b"), DEAD)
    assert driven.pool.lookup(2.0, "a") == number_of(driven, "a")
    assert "panic" in repr(driven.pool)
    first = [driven.acquire(2.0) for _ in range(5)]
    assert {lease.endpoint for lease in first} == set("abcde")
    for lease in first:  # but what is dead is replaced when somebody wants it
        driven.release(2.0, lease)
    assert driven.causes() == [Cause.UNHEALTHY] * 2
    assert not driven.pool.panic  # nothing is known against those two now


def test_panic_serves_those_who_wait() -> None:
    driven = opened("a", "b", max_per_endpoint=1)
    held = driven.acquire(0.0, endpoint="b")
    driven.pool.on_health(0.0, number_of(driven, "a"), DEAD)
    anyone, asked = driven.wait(0.0), driven.wait(0.0, endpoint="a")
    assert anyone.state is TicketState.WAITING
    driven.pool.on_health(0.0, held.connection, UNHEALTHY)  # now none is well
    assert driven.pool.panic
    assert anyone.result().endpoint == "a"
    driven.release(0.0, anyone.result())
    assert asked.result().endpoint == "a"


def test_sticky_keys_in_panic_stay_where_they_can_be_reached() -> None:
    driven = opened(*"abcd")
    homes = {key: next(iter(lent(driven, 0.0, 1, sticky=key))) for key in range(20)}
    for key in "abcd":
        driven.pool.on_health(1.0, number_of(driven, key), UNHEALTHY)
    assert driven.pool.panic
    assert {key: next(iter(lent(driven, 1.0, 1, sticky=key))) for key in range(20)} == homes
    driven.down = {"a"}
    driven.pool.on_lost(1.0, number_of(driven, "a"), Cause.LOST)
    now = {key: next(iter(lent(driven, 1.0, 1, sticky=key))) for key in range(20)}
    assert all(now[key] == home if home != "a" else now[key] != "a" for key, home in homes.items())
