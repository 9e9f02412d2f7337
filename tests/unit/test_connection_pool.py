# SPDX-License-Identifier: Apache-2.0
"""ConnectionPool: who gets a connection, who waits, what is cancelled, given back, leaked, drained."""

from __future__ import annotations

import math
from collections import Counter

import pytest

from tests.unit.pool_driver import Driven
from userspace.connection.lending import OVERTAKEN
from userspace.connection.pool import Lease, Open
from userspace.connection.slots import DEAD
from userspace.connection.states import Cause
from userspace.connection.waiters import (
    EndpointGoneError,
    PoolClosedError,
    PoolFullError,
    PoolTimeoutError,
    TicketState,
)
from xdp.errors import UsageError

# --- borrowing


def test_a_connection_is_opened_lent_and_lent_again() -> None:
    driven = Driven("a")
    pool = driven.pool
    ticket = driven.wait(0.0, who="me")
    assert pool.take_actions() == [Open(0, "a", "a")]
    assert driven.counts() == (0, 0, 1, 0)
    pool.on_opened(0.1, 0)
    assert pool.take_grants() == [ticket]
    assert pool.take_grants() == []
    lease = ticket.result()
    assert (lease.connection, lease.endpoint, lease.who, lease.since) == (0, "a", "me", 0.1)
    assert driven.counts() == (1, 0, 0, 0)
    pool.release(0.2, lease)
    assert driven.counts() == (0, 1, 0, 0)
    again = pool.acquire(0.3)
    assert isinstance(again, Lease)
    assert again.connection == 0
    assert again is not lease
    assert pool.take_actions() == []


def test_a_lease_is_released_once_and_to_its_pool() -> None:
    driven, other = Driven("a"), Driven("a")
    lease = driven.acquire(0.0)
    with pytest.raises(UsageError, match="is no lease of this pool"):
        other.pool.release(0.0, lease)
    with pytest.raises(UsageError, match="is no lease of this pool"):
        driven.pool.release(0.0, "lease")  # type: ignore[arg-type]
    driven.release(0.0, lease)
    with pytest.raises(UsageError, match="was released before"):
        driven.pool.release(0.0, lease)
    assert driven.counts() == (0, 1, 0, 0)
    ticket = other.wait(0.0)
    with pytest.raises(UsageError, match="is no ticket of this pool"):
        driven.pool.cancel(0.0, ticket)


def test_what_is_broken_is_not_lent_again() -> None:
    driven = Driven("a")
    lease = driven.acquire(0.0)
    driven.release(0.0, lease, broken=True)
    assert driven.causes() == [Cause.UNHEALTHY]
    assert driven.acquire(0.0).connection != lease.connection
    told = driven.pool.snapshot()
    assert (told.returned, told.broken, told.closed) == (1, 1, {"unhealthy": 1})


def test_what_is_lost_while_borrowed_voids_the_lease() -> None:
    driven = Driven("a")
    lease = driven.acquire(0.0)
    driven.pool.on_lost(1.0, lease.connection, Cause.LOST)
    assert lease.lost
    assert driven.counts() == (0, 0, 1, 0)
    assert driven.pool.may_open(1.0, "a")
    driven.do(1.0)
    again = driven.acquire(1.0)
    assert again.connection == lease.connection  # it keeps its number
    driven.release(1.0, lease)  # which takes nothing from whoever has it now
    assert not again.lost
    assert driven.counts() == (1, 0, 0, 0)
    driven.release(1.0, again)
    told = driven.pool.snapshot()
    assert (told.acquired, told.returned, told.lost_in_use) == (2, 1, 1)


def test_choices_go_to_the_quick_and_the_idle() -> None:
    driven = Driven("a", "b", max_size=40, seed=1)
    for key in "ab":
        leases = [driven.acquire(0.0, endpoint=key) for _ in range(20)]
        for lease in leases:
            driven.pool.on_latency(0.0, lease.connection, 0.010 if key == "a" else 0.020)
        for lease in leases:
            driven.release(0.0, lease)
    counted = Counter(driven.acquire(0.0).endpoint for _ in range(12))
    # As many as make latency * (1 + load) equal: 0.01 * (1 + 8.3) = 0.02 * (1 + 3.7).
    assert counted["b"] == pytest.approx(3.7, abs=1.5)


def test_a_stake_is_a_part_of_the_choices() -> None:
    driven = Driven(max_size=200, max_per_endpoint=200)
    driven.pool.add_endpoint(0.0, "light", weight=1)
    driven.pool.add_endpoint(0.0, "heavy", weight=9)
    leases = [driven.acquire(0.0) for _ in range(100)]
    opened = Counter(lease.endpoint for lease in leases)
    assert opened["heavy"] == pytest.approx(90, abs=5)
    for lease in leases:
        driven.release(0.0, lease)
    counted = Counter(driven.acquire(0.0).endpoint for _ in range(50))
    assert counted["heavy"] == pytest.approx(45, abs=4)
    assert len(driven.opens) == 100  # all of it from what was open


# --- waiting


def test_first_come_first_served_of_all_kinds() -> None:
    driven = Driven("a", max_size=1)
    held = driven.acquire(0.0)
    asks: list[dict[str, object]] = [{}, {"endpoint": "a"}, {"sticky": 1}, {}, {"endpoint": "a"}]
    tickets = [driven.wait(0.0, **ask) for ask in asks]
    for ticket in tickets:
        driven.pool.release(1.0, held)
        assert driven.pool.take_grants() == [ticket]
        held = ticket.result()
    driven.release(1.0, held)
    assert driven.counts() == (0, 1, 0, 0)


def test_the_line_is_bounded() -> None:
    driven = Driven("a", max_size=1, max_waiting=2)
    held = driven.acquire(0.0)
    tickets = [driven.wait(0.0), driven.wait(0.0)]
    with pytest.raises(PoolFullError, match="2 wait for a connection already") as caught:
        driven.pool.acquire(0.0)
    assert "max_waiting" in caught.value.hint
    driven.pool.cancel(0.0, tickets[0])
    driven.pool.release(0.0, held)
    assert tickets[1].state is TicketState.GRANTED
    driven.wait(0.0)
    with pytest.raises(PoolFullError):  # who does not take what he was granted counts as well
        driven.pool.acquire(0.0)
    driven.pool.take_grants()
    driven.wait(0.0)
    assert driven.pool.snapshot().full == 2


def test_deadlines_end_the_waiting() -> None:
    driven = Driven("a", max_size=1)
    held = driven.acquire(0.0)
    late, patient = driven.wait(0.0, deadline=2.0), driven.wait(0.0)
    assert driven.pool.next_timeout() == 2.0
    driven.pool.on_timeout(1.9)
    assert late.state is TicketState.WAITING
    driven.pool.on_timeout(2.0)
    assert driven.pool.take_grants() == [late]
    with pytest.raises(PoolTimeoutError, match=r"free within 2\.000 s \(1 in use, 1 in all\)"):
        late.result()
    driven.pool.release(3.0, held)
    assert driven.pool.take_grants() == [patient]
    told = driven.pool.snapshot()
    assert (told.waited, told.granted, told.timed_out) == (3, 2, 1)


def test_who_does_not_want_to_wait_gets_an_error_at_once() -> None:
    driven = Driven("a", max_size=1)
    for deadline in (0.0, -5.0, -math.inf):
        with pytest.raises(PoolTimeoutError, match=r"within 0\.000 s"):
            driven.pool.acquire(0.0, deadline=deadline)
    assert driven.pool.take_actions() == []
    assert driven.acquire(0.0).connection == 0
    assert driven.pool.snapshot().unserved == 3
    with pytest.raises(UsageError, match="a deadline is a time, not nan"):
        driven.pool.acquire(0.0, deadline=math.nan)


def test_nobody_is_overtaken_for_ever() -> None:
    """A waits for what is in demand elsewhere: others go first, but not always."""
    driven = Driven("a", "b", max_size=2)
    held = [driven.acquire(0.0, endpoint="b") for _ in range(2)]
    starved = driven.wait(0.0, endpoint="a")
    others = [driven.wait(0.0, endpoint="b") for _ in range(3 * OVERTAKEN)]
    served = 0
    while starved.state is TicketState.WAITING:
        driven.release(0.0, held.pop(0))
        for ticket in driven.pool.take_grants():
            held.append(ticket.result())
            served += ticket in others
        assert served <= OVERTAKEN
    assert served == OVERTAKEN
    assert driven.causes() == [Cause.EVICTED]
    assert [ticket.state for ticket in others[:served]] == [TicketState.GRANTED] * served
    assert others[served].state is TicketState.WAITING


def test_one_place_is_made_for_one_who_lacks_one() -> None:
    driven = Driven("a", "b", max_size=3)
    held = [driven.acquire(0.0, endpoint="b") for _ in range(3)]
    driven.wait(0.0, endpoint="a")
    for _ in range(2 * OVERTAKEN):
        driven.wait(0.0, endpoint="b")
    driven.hold_closing = True  # it takes its time
    for _ in range(OVERTAKEN + 4):
        driven.release(0.0, held.pop(0))
        held += [ticket.result() for ticket in driven.pool.take_grants()]
    assert len(driven.closes) == 1
    assert driven.counts() == (2, 0, 0, 1)


def test_nor_is_who_stands_behind_one_that_is_served() -> None:
    driven = Driven("a", "b", max_size=2)
    held = [driven.acquire(0.0, endpoint="b") for _ in range(2)]
    driven.wait(0.0, endpoint="b")
    starved = driven.wait(0.0, endpoint="a")
    for _ in range(100):
        driven.wait(0.0, endpoint="b")
    for _ in range(OVERTAKEN + 2):
        driven.release(0.0, held.pop(0))
        held += [ticket.result() for ticket in driven.pool.take_grants()]
    assert starved.state is TicketState.GRANTED


def test_nor_is_the_next_one() -> None:
    driven = Driven("a", "b", "c", max_size=2)
    held = [driven.acquire(0.0, endpoint="b") for _ in range(2)]
    starved = [driven.wait(0.0, endpoint=key) for key in "ac"]
    for _ in range(100):
        driven.wait(0.0, endpoint="b")
    for turn in range(3 * OVERTAKEN):
        driven.release(0.0, held.pop(0))
        for ticket in driven.pool.take_grants():
            held.append(ticket.result())
            if ticket in starved:
                starved.remove(ticket)
                assert turn <= (2 - len(starved)) * (OVERTAKEN + 1)
    assert not starved


def test_who_lacks_a_place_gets_one_that_nobody_uses() -> None:
    driven = Driven("a", "b", max_size=1)
    driven.release(0.0, driven.acquire(0.0, endpoint="b"))
    assert driven.acquire(0.0, endpoint="a").endpoint == "a"
    assert driven.causes() == [Cause.EVICTED]


# --- cancelling


def test_cancelling_at_any_moment_leaves_nothing_behind() -> None:
    driven = Driven("a", max_size=1)
    pool = driven.pool
    held = driven.acquire(0.0)

    waiting = driven.wait(0.0)
    pool.cancel(0.0, waiting)  # while it waits
    assert waiting.state is TicketState.CANCELLED

    granted, other = driven.wait(0.0), driven.wait(0.0)
    pool.release(0.0, held)
    assert granted.state is TicketState.GRANTED
    pool.cancel(0.0, granted)  # after it was granted, before anybody knew: it goes to the next
    assert pool.take_grants() == [other]

    taken = driven.wait(0.0)
    pool.release(0.0, other.result())
    assert pool.take_grants() == [taken]
    lease = taken.result()
    pool.cancel(0.0, taken)  # after it was taken
    assert driven.counts() == (0, 1, 0, 0)
    with pytest.raises(UsageError):
        pool.release(0.0, lease)

    pool.cancel(0.0, other)  # after it was given back
    pool.cancel(0.0, taken)
    pool.cancel(0.0, waiting)
    assert driven.counts() == (0, 1, 0, 0)

    held = driven.acquire(0.0)
    late = driven.wait(0.0, deadline=1.0)
    pool.on_timeout(1.0)
    pool.cancel(1.0, late)  # when it had failed: nobody is told any more
    assert pool.take_grants() == []
    told = pool.snapshot()
    assert (told.waited, told.granted, told.cancelled, told.timed_out) == (6, 4, 1, 1)
    assert (told.acquired, told.returned, told.in_use) == (5, 4, 1)


def test_what_was_opened_for_who_gave_up_is_kept() -> None:
    driven = Driven("a")
    ticket = driven.wait(0.0)
    driven.pool.cancel(0.0, ticket)
    driven.do(0.0)
    assert driven.counts() == (0, 1, 0, 0)


def test_what_breaks_before_it_is_taken_is_not_handed_out() -> None:
    driven = Driven("a", max_size=2, max_per_endpoint=2)
    first, second = driven.wait(0.0), driven.wait(0.0, endpoint="a")
    driven.do(0.0)
    assert [first.state, second.state] == [TicketState.GRANTED] * 2
    third = driven.wait(0.0)
    driven.pool.on_lost(0.0, first.result().connection, Cause.LOST)
    driven.pool.on_lost(0.0, second.result().connection, Cause.LOST)
    assert [one.state for one in (first, second, third)] == [TicketState.WAITING] * 3
    driven.pool.may_open(0.0, "a")
    driven.do(0.0)
    # They have kept their places in line.
    assert [one.state for one in (first, second)] == [TicketState.GRANTED] * 2
    assert driven.pool.take_grants() == [first, second]
    driven.pool.on_lost(0.0, first.result().connection, Cause.LOST)  # now it is his
    assert first.result().lost
    told = driven.pool.snapshot()
    assert (told.waited, told.granted, told.waiting, told.lost_in_use) == (3, 2, 1, 3)


def test_who_can_not_be_put_back_in_line_is_told() -> None:
    driven = Driven("a", "b")
    late, asked, closing = (
        driven.wait(0.0, endpoint="a", deadline=5.0),
        driven.wait(0.0, endpoint="b"),
        driven.wait(0.0, endpoint="a"),
    )
    driven.do(0.0)
    connections = [ticket.result().connection for ticket in (late, asked, closing)]
    driven.pool.on_lost(6.0, connections[0], Cause.LOST)
    with pytest.raises(PoolTimeoutError):
        late.result()
    driven.pool.remove_endpoint(6.0, "b")
    driven.pool.on_lost(6.0, connections[1], Cause.LOST)
    with pytest.raises(EndpointGoneError, match="endpoint 'b' was removed"):
        asked.result()
    driven.pool.drain(6.0)
    driven.pool.on_lost(6.0, connections[2], Cause.LOST)
    with pytest.raises(PoolClosedError):
        closing.result()
    assert driven.pool.take_grants() == [late, asked, closing]
    told = driven.pool.snapshot()
    assert (told.waited, told.granted, told.timed_out, told.refused) == (3, 0, 1, 2)


# --- sharing


def test_a_lookup_finds_what_nobody_has_borrowed() -> None:
    driven = Driven("a", max_size=3)
    pool = driven.pool
    assert pool.lookup(0.0, "a") is None
    driven.do(0.0)
    assert pool.lookup(0.0, "a") == 0
    lease = driven.acquire(0.0)
    assert lease.connection == 0
    assert pool.lookup(0.0, "a") is None  # it is borrowed: another one is opened
    driven.do(0.0)
    assert pool.lookup(0.0, "a") == 1
    assert pool.snapshot().missed == 2
    with pytest.raises(UsageError, match="there is no endpoint 'b'") as caught:
        pool.lookup(0.0, "b")
    assert "add_endpoint" in caught.value.hint
    with pytest.raises(UsageError, match=r"there is no endpoint \[\]"):
        pool.lookup(0.0, [])  # type: ignore[arg-type]


def test_lookups_are_spread_by_cost() -> None:
    driven = Driven("a", max_size=3, min_per_endpoint=3)
    driven.pool.warm_pool(0.0)
    driven.do(0.0)
    for number, (latency, load) in enumerate([(0.01, 0), (0.01, 4), (0.02, 0)]):
        driven.pool.on_latency(0.0, number, latency, load)
    counted = Counter(driven.pool.lookup(0.0, "a") for _ in range(300))
    assert counted[0] > counted[2] > 0
    assert counted[1] == 0  # the dearest of three is never the better of two


def test_a_lookup_prefers_the_healthy() -> None:
    driven = Driven("a", max_size=2, min_per_endpoint=2)
    driven.pool.warm_pool(0.0)
    driven.do(0.0)
    for worse in (1, 2):
        driven.pool.on_health(0.0, 0, worse)
        assert {driven.pool.lookup(0.0, "a") for _ in range(20)} == {1}
    driven.pool.on_health(0.0, 1, DEAD)
    assert driven.pool.lookup(0.0, "a") == 0
    driven.pool.on_health(0.0, 0, 0)
    driven.pool.on_health(0.0, 1, 1)
    assert {driven.pool.lookup(0.0, "a") for _ in range(20)} == {0}
