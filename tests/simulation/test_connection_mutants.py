# SPDX-License-Identifier: Apache-2.0
"""Mistakes planted in pool, health, reconnection, transports and conductor: the simulation finds each.

One that is not found says that nobody looks there: then a promise is missing in
userspace/simulation/connection_promises.py, or a scenario.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from random import Random
from typing import Any, NamedTuple

import pytest

from userspace.connection import conductor_core, health_record, lending, reconnection
from userspace.connection.backoff import Backoff
from userspace.connection.dialing import DialLine
from userspace.connection.health import ConnectionHealthMonitor
from userspace.connection.health_record import Record
from userspace.connection.heartbeat import Heartbeats, HostReply
from userspace.connection.pool import ConnectionPool
from userspace.connection.probes import ProbeBudget
from userspace.connection.reconnection import ReconnectionManager
from userspace.connection.roster import Roster
from userspace.connection.sizing import Sizing
from userspace.connection.stalls import LocalHealth
from userspace.connection.states import Cause
from userspace.connection.timers import Timers
from userspace.connection.transport import Base
from userspace.connection.udp import UdpConnection
from userspace.connection.waiters import Ticket, WaitLine
from userspace.flow.bucket import TokenBucket
from userspace.simulation.connection_report import run

Patch = pytest.MonkeyPatch
#: Seeds in which a mistake is to be found.
SEEDS = 30


def nothing(*_: object, **__: object) -> None:
    """Instead of what was to be done."""


# --- reconnection


def delays_do_not_grow(patch: Patch) -> None:
    patch.setattr(Backoff, "delay", lambda self, _, rng: self.initial * rng.random())


def delays_are_ten_times_too_long(patch: Patch) -> None:
    whole = Backoff.delay

    def delay(self: Backoff, attempt: int, rng: Random) -> float:
        return 10.0 * whole(self, attempt, rng)

    patch.setattr(Backoff, "delay", delay)


def who_waits_does_not_know_that_the_link_is_back(patch: Patch) -> None:
    patch.setattr(ReconnectionManager, "on_link_up", lambda *_: [])


def who_is_given_up_is_forgotten(patch: Patch) -> None:
    def give_up(self: Any, key: object, cause: Cause) -> None:
        self._given_up.append(key)
        self.reconnection.cancel(key)

    patch.setattr(conductor_core.ConductorCore, "_on_give_up", give_up)


def attempts_have_no_rate(patch: Patch) -> None:
    def take(self: DialLine, now: float) -> int | None:
        self._now = now
        return self._line.popitem(last=False)[0] if self._line else None

    patch.setattr(DialLine, "take", take)


def attempts_again_have_no_rate(patch: Patch) -> None:
    class Bottomless(TokenBucket):
        def take(self, now: float, amount: float) -> bool:
            return super().take(now, amount) or True

    patch.setattr(reconnection, "TokenBucket", Bottomless)


# --- the pool


def a_waiter_is_forgotten_when_it_cancels(patch: Patch) -> None:
    patch.setattr(ConnectionPool, "cancel", nothing)


def what_was_granted_is_not_given_back_by_cancel(patch: Patch) -> None:
    whole = lending.Lending.cancel

    def cancel(self: lending.Lending, ticket: Ticket) -> None:
        whole(self, ticket)

    patch.setattr(lending.Lending, "cancel", cancel)


def deadlines_of_waiters_are_ignored(patch: Patch) -> None:
    patch.setattr(WaitLine, "due", lambda *_: [])


def who_came_last_is_served_first(patch: Patch) -> None:
    def first(self: Any, target: object, *, any_too: bool) -> Ticket | None:
        line = self._lines.get(target) or (self._lines.get(None) if any_too else None)
        return self._tickets[line[-1]] if line else None

    patch.setattr(WaitLine, "first", first)


def a_lease_is_given_twice(patch: Patch) -> None:
    whole = Roster.lend

    def lend(self: Roster, slot: Any) -> None:
        whole(self, slot)
        ready = slot.endpoint.idle[slot.status]
        slot.place = len(ready)
        ready.append(slot)

    patch.setattr(Roster, "lend", lend)


def what_is_given_back_is_not_offered(patch: Patch) -> None:
    patch.setattr(lending.Lending, "offer", nothing)


def a_size_is_no_limit(patch: Patch) -> None:
    patch.setattr(Sizing, "_room", property(lambda _: True))


def nobody_makes_room_for_others(patch: Patch) -> None:
    patch.setattr(Sizing, "_make_room", lambda *_: False)
    patch.setattr(lending.Lending, "_is_starved", lambda *_: False)


def who_failed_may_not_be_opened(patch: Patch) -> None:
    patch.setattr(ConnectionPool, "may_open", lambda *_: False)


def who_was_lost_is_still_lent(patch: Patch) -> None:
    patch.setattr(ConnectionPool, "on_lost", nothing)


def who_is_dead_is_still_connected(patch: Patch) -> None:
    patch.setattr(ConnectionHealthMonitor, "subscribe", nothing)


# --- health


def time_of_stalls_counts(patch: Patch) -> None:
    patch.setattr(LocalHealth, "on_tick", lambda *_: False)


def a_few_questions_are_proof(patch: Patch) -> None:
    patch.setattr(health_record, "questions_needed", lambda _: 6)
    whole = Record.death

    def death(self: Record, at: float, settings: Any, everyone: Any) -> Any:
        return whole(self, at + 10.0, settings, everyone)

    patch.setattr(Record, "death", death)


def nobody_is_ever_dead(patch: Patch) -> None:
    patch.setattr(Record, "death", lambda *_: None)


def the_budget_of_probes_is_ignored(patch: Patch) -> None:
    def take(self: ProbeBudget, _: float) -> list[int]:
        taken = list(self._waiting)
        self._waiting.clear()
        return taken

    patch.setattr(ProbeBudget, "take", take)


def the_link_is_ignored(patch: Patch) -> None:
    patch.setattr(ConnectionHealthMonitor, "on_link", nothing)


def a_host_that_answers_is_a_peer_that_does(patch: Patch) -> None:
    whole = UdpConnection.receive

    def receive(self: UdpConnection, now: float, data: bytes) -> None:
        whole(self, now, data)
        if any(isinstance(event, HostReply) for event in self._events or ()):
            self._hear(self._now)

    patch.setattr(UdpConnection, "receive", receive)


def answers_of_hosts_are_ignored(patch: Patch) -> None:
    patch.setattr(ConnectionHealthMonitor, "on_host_reply", lambda *_: False)


def watching_does_not_end(patch: Patch) -> None:
    patch.setattr(ConnectionHealthMonitor, "remove", lambda *_: False)


# --- transports


def errors_are_ignored(patch: Patch) -> None:
    patch.setattr(Base, "on_error", nothing)


def a_peer_s_new_start_is_not_noticed(patch: Patch) -> None:
    whole = Heartbeats.receive

    def receive(self: Heartbeats, now: float, payload: bytes) -> object:
        before = self.peer_boot
        answer = whole(self, now, payload)
        self.peer_boot = self.peer_boot if before is None else before
        return answer

    patch.setattr(Heartbeats, "receive", receive)


# --- timers, and what ties all of it together


def timers_are_not_cancelled(patch: Patch) -> None:
    patch.setattr(Timers, "cancel", nothing)


def timers_are_a_second_late(patch: Patch) -> None:
    whole = Timers.next
    patch.setattr(Timers, "next", lambda self: whole(self) + 1.0)


def a_transport_is_not_closed(patch: Patch) -> None:
    patch.setattr(conductor_core.ConductorCore, "_hang_up", nothing)


def the_leading_attempt_is_not_cancelled(patch: Patch) -> None:
    patch.setattr(ReconnectionManager, "cancel", nothing)


def a_refusal_says_nothing_of_the_others(patch: Patch) -> None:
    patch.setattr(conductor_core.ConductorCore, "_doubt", nothing)


def a_link_without_connections_stays_down(patch: Patch) -> None:
    patch.setattr(conductor_core.ConductorCore, "_forget_link", nothing)


class Mutant(NamedTuple):
    plant: Callable[[Patch], None]
    scenario: str


MUTANTS = (
    Mutant(delays_do_not_grow, "refused"),
    Mutant(delays_are_ten_times_too_long, "refused"),
    Mutant(who_waits_does_not_know_that_the_link_is_back, "link"),
    Mutant(who_is_given_up_is_forgotten, "long-death"),
    Mutant(attempts_have_no_rate, "stampede"),
    Mutant(attempts_again_have_no_rate, "stampede"),
    Mutant(a_waiter_is_forgotten_when_it_cancels, "line"),
    Mutant(what_was_granted_is_not_given_back_by_cancel, "line"),
    Mutant(deadlines_of_waiters_are_ignored, "line"),
    Mutant(who_came_last_is_served_first, "line"),
    Mutant(a_lease_is_given_twice, "line"),
    Mutant(what_is_given_back_is_not_offered, "line"),
    Mutant(a_size_is_no_limit, "line"),
    Mutant(nobody_makes_room_for_others, "line"),
    Mutant(who_failed_may_not_be_opened, "anything"),
    Mutant(who_was_lost_is_still_lent, "kill"),
    Mutant(who_is_dead_is_still_connected, "loss"),
    Mutant(time_of_stalls_counts, "pause"),
    Mutant(a_few_questions_are_proof, "heavy-loss"),
    Mutant(nobody_is_ever_dead, "loss"),
    Mutant(the_budget_of_probes_is_ignored, "budget"),
    Mutant(the_link_is_ignored, "link"),
    Mutant(a_host_that_answers_is_a_peer_that_does, "hang"),
    Mutant(answers_of_hosts_are_ignored, "hang"),
    Mutant(watching_does_not_end, "refused"),
    Mutant(errors_are_ignored, "kill"),
    Mutant(a_refusal_says_nothing_of_the_others, "kill"),
    Mutant(a_link_without_connections_stays_down, "part-link"),
    Mutant(a_peer_s_new_start_is_not_noticed, "restart"),
    Mutant(timers_are_not_cancelled, "line"),
    Mutant(timers_are_a_second_late, "line"),
    Mutant(a_transport_is_not_closed, "partition"),
    Mutant(the_leading_attempt_is_not_cancelled, "shutdown"),
)


@pytest.fixture
def patch() -> Iterator[Patch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.plant.__name__)
def test_a_planted_mistake_is_found(mutant: Mutant, patch: Patch) -> None:
    mutant.plant(patch)
    for seed in range(SEEDS):
        broken = run(mutant.scenario, seed).broken
        if broken is not None:
            print(f"seed {seed}, at {broken.at:.3f} s: {broken.what}")
            return
    pytest.fail(f"{mutant.plant.__name__} was not found by {SEEDS} seeds of {mutant.scenario}")


@pytest.mark.parametrize("scenario", sorted({mutant.scenario for mutant in MUTANTS}))
def test_without_mistakes_nothing_is_found(scenario: str) -> None:
    assert [run(scenario, seed).broken for seed in range(3)] == [None] * 3
