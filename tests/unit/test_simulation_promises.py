# SPDX-License-Identifier: Apache-2.0
"""Each promise that a simulation of connections checks, broken once."""

from __future__ import annotations

import math
from collections.abc import Callable
from errno import ECONNREFUSED
from typing import Any

import msgspec
import pytest

from userspace.connection.conductor import Conductor, Datagram, Received
from userspace.connection.grading import Status
from userspace.connection.lending import Lending
from userspace.connection.slots import Lease
from userspace.connection.waiters import Ticket
from userspace.simulation.connection_peer import Life
from userspace.simulation.connection_promises import PromiseBrokenError
from userspace.simulation.connection_report import TOLD, Summary, run
from userspace.simulation.connection_scenarios import Scenario, scenario
from userspace.simulation.connection_settings import settings
from userspace.simulation.connection_users import Habits
from userspace.simulation.connection_world import World


def changed(name: str, **values: Any) -> Scenario:
    return msgspec.structs.replace(scenario(name), **values)


def quiet(**values: Any) -> Scenario:
    """Nothing happens unless a test makes it."""
    return changed("steady", **{"plan": lambda _: None, "calm": False, "kept": False, "late": 0.0, **values})


# --- promises that are broken


def broken(one: Scenario, seed: int = 1, *, doing: Callable[[World], None] = lambda _: None) -> str:
    """What a world shows after something was done to it."""
    world = World(one, seed=seed)
    doing(world)
    with pytest.raises(PromiseBrokenError) as raised:
        world.run()
    assert f"at {raised.value.at:.3f} s" in str(raised.value)
    return raised.value.what


def patched(world: World, name: str, value: object) -> None:
    """Conductor has slots, so its class is changed."""
    kind = type("Patched", (Conductor,), {"__slots__": (), name: value})
    world.conductor.__class__ = kind


def test_kept() -> None:
    one = quiet(kept=True)
    assert "of peers that were well" in broken(
        one, doing=lambda world: world.engine.at(3.0, lambda now, _: world._deliver(now, 0, ECONNREFUSED))
    )


def test_calm() -> None:
    one = quiet(calm=True, found=False)
    assert "nothing is wrong with it" in broken(
        one, doing=lambda world: world.engine.at(3.0, lambda now, _: world.live(now, 1, Life.OFF))
    )


def test_spared_and_found() -> None:
    def die(world: World) -> None:
        world.engine.at(3.0, lambda now, _: world.live(now, 1, Life.OFF))

    def lie(world: World) -> None:
        world.engine.at(3.0, lambda now, _: world.peers[1].become(now, Life.OFF))  # and nobody is told

    assert "peer 1 answers" in broken(quiet(), doing=lie)

    def deaf(world: World) -> None:
        die(world)
        world.conductor.monitor.subscribe(lambda *_: None)
        patched(world, "_follow", lambda *_: None)

    assert "is gone for 15 s" in broken(quiet(), doing=deaf)


def test_dead_while_the_link_is_down() -> None:
    def doing(world: World) -> None:
        world.link_told = False
        world.engine.at(3.0, lambda now, _: world.live(now, 1, Life.OFF))

    assert "while our link is known to be down" in broken(quiet(), doing=doing)


def test_dead_though_its_host_answers() -> None:
    def doing(world: World) -> None:
        world.engine.at(3.0, lambda now, _: world.live(now, 1, Life.HUNG))
        world.engine.at(4.0, lambda _, __: world.promises.on_status(1, Status.UNHEALTHY, Status.DEAD))

    assert "its host answers" in broken(quiet(kernel=True), doing=doing)


def test_back() -> None:
    def doing(world: World) -> None:
        world.engine.at(3.0, lambda now, _: world.live(now, 1, Life.STOPPED))
        world.engine.at(10.0, world.promises.expect_back, 1.0)

    assert "endpoint 1 has 0 connections 1 s after all was well again" in broken(quiet(), doing=doing)


def test_a_new_start_that_is_not_noticed() -> None:
    def doing(world: World) -> None:
        def restart(now: float, _: object) -> None:
            world.restart(now, 1)
            world.peers[1]._boot = bytes(8)  # it says another number

        world.engine.at(3.0, restart)

    assert "it does not know" in broken(quiet(), doing=doing)


def test_attempts_over_their_rate() -> None:
    def doing(world: World) -> None:
        for _ in range(300):
            world.promises.on_attempt(0.0, 1, 1)

    assert "over the rate of attempts" in broken(quiet(), doing=doing)


def test_attempts_at_who_is_not_there() -> None:
    def doing(world: World) -> None:
        world.live(0.0, 1, Life.OFF)
        for number in range(40):
            world.promises.on_attempt(1.0 + number / 2, 1, 1)

    assert "endpoint 1 can't be reached since 0.000 s" in broken(quiet(), doing=doing)


def test_counts_that_do_not_add_up() -> None:
    def doing(world: World) -> None:
        world.network.sent += 1

    assert "datagrams" in broken(quiet(), doing=doing)

    def leak(world: World) -> None:
        world.descriptors += 1

    assert "descriptors" in broken(quiet(), doing=leak)


def test_a_pool_that_is_too_large() -> None:
    def doing(world: World) -> None:
        def grow(now: float, _: object) -> None:
            world.conductor.pool._roster.counts[0] = 100
            world.wake(now)

        world.engine.at(2.5, grow)

    assert "100 opening" in broken(quiet(), doing=doing)


def test_probes_over_their_budget() -> None:
    def doing(world: World) -> None:
        world.promises._look_at_probes(0.0, 1_000_000)

    assert "over the budget" in broken(quiet(), doing=doing)


def test_a_message_of_somebody_else() -> None:
    def doing(world: World) -> None:
        world.promises.on_message(0.0, Received(1, 1, b"1 2"))

    assert "is said to come from endpoint 1" in broken(quiet(), doing=doing)


def test_a_loop_that_is_busy_for_ever() -> None:
    def doing(world: World) -> None:
        patched(world, "next_timeout", lambda self: self._now)

    assert "at the same moment" in broken(quiet(), doing=doing)

    def endless(world: World) -> None:
        world.network.set_link(up=False, route=False)  # what cannot be sent is asked for again
        patched(world, "take_datagrams", lambda *_: [Datagram(0, 0, b"again 0")])

    assert "always something more to send" in broken(quiet(), doing=endless)


def test_what_is_left_at_the_end() -> None:
    def doing(world: World) -> None:
        def shutdown(self: Conductor, now: float, deadline: float) -> None:
            self.drain(now)

        patched(world, "shutdown", shutdown)
        world.engine.at(1.0, lambda _, __: world.application(borrow))
        world.users.give_back = lambda now: None  # type: ignore[method-assign]

        def borrow(now: float, _: object) -> None:
            lease = world.conductor.acquire(now, who=0)
            assert isinstance(lease, Lease)
            world.users._leases[0] = lease

    assert "at the end: 1 != 0" in broken(quiet(), doing=doing)


def test_whatever_is_raised_is_told() -> None:
    def plan(world: World) -> None:
        patched(world, "receive", lambda *_: 1 / 0)

    outcome = run(quiet(plan=plan), 1)
    assert outcome.broken is not None
    assert outcome.broken.what.startswith("ZeroDivisionError: division by zero in <lambda>")

    def fail(_: World) -> None:
        raise RuntimeError("before it begins")

    outcome = run(quiet(plan=fail), 1)
    assert outcome.broken is not None
    assert (outcome.broken.at, outcome.counts) == (0.0, {})
    summary = Summary("steady")
    for _ in range(TOLD + 5):
        summary.add(outcome)
    assert (summary.violations, len(summary.broken)) == (TOLD + 5, TOLD)


# --- users


def test_users_are_lent_what_they_asked_for() -> None:
    users = Habits(count=3, think=0.5, hold=0.2, one=1.0, sticky=0.0, lookup=0.0, broken=0.0)

    def wrong(world: World) -> None:
        whole = Conductor.acquire

        def acquire(self: Conductor, now: float, *, endpoint: object = None, **more: Any) -> object:
            return whole(self, now, **more)

        patched(world, "acquire", acquire)

    assert "is not to endpoint" in broken(quiet(users=users), doing=wrong)


def test_connections_that_are_given_out_are_there() -> None:
    users = Habits(count=1, think=0.1, one=0.0, sticky=0.0, lookup=1.0)
    looked: list[int] = [1000, 1]

    def lookup(self: Conductor, now: float, endpoint: object) -> int:
        return looked[0]

    def doing(world: World) -> None:
        patched(world, "lookup", lookup)

    assert "connection 1000 was given out, and is not there" in broken(quiet(users=users), doing=doing)
    looked[0] = 1
    what = broken(quiet(users=users), doing=doing)
    assert "is not to" in what or "was given out, and is" in what


def test_an_endpoint_that_is_gone_is_not_chosen() -> None:
    users = Habits(count=3, think=0.1, hold=0.1, one=0.0, sticky=0.0, lookup=0.0)

    def doing(world: World) -> None:
        for endpoint in range(3):
            world.engine.at(1.0, world.users.distrust, endpoint)
        world.engine.at(1.0, world.users.trust, 2)

    assert "is gone" in broken(quiet(users=users), doing=doing)


def test_the_one_who_came_first_is_served_first() -> None:
    def doing(world: World) -> None:
        make = {"since": 0.0, "deadline": math.inf, "endpoint": 1, "sticky": None, "who": 7, "stack": None}
        first, second = (Ticket(number, None, **make) for number in (1, 2))  # type: ignore[arg-type]
        world.users._wait(0.0, 7, first)
        world.users._check_order(0.0, second)

    assert "was served before" in broken(quiet(), doing=doing)


def test_nobody_waits_for_ever() -> None:
    users = Habits(count=4, think=0.1, hold=1000.0, longest=3.0, cancel=0.0, one=0.0, sticky=0.0, lookup=0.0)
    one = quiet(users=users, settings=settings(each=0, size=2))
    assert "waits since" in broken(one)


def test_a_ticket_of_nobody() -> None:
    def doing(world: World) -> None:
        got = [world.conductor.acquire(0.0, who=5) for _ in range(2)]
        assert not any(isinstance(one, Lease) for one in got)

    assert "nobody waits with it" in broken(quiet(), doing=doing)


def test_whoever_asks_is_served() -> None:
    def doing(world: World) -> None:
        world.engine.at(1.0, lambda now, _: world.live(now, 1, Life.STOPPED))
        world.engine.at(3.0, world.promises.expect_served, 2.0)

    assert "for endpoint 1 was not served since 3.000 s" in broken(quiet(), doing=doing)


def test_nobody_waits_beyond_the_deadline() -> None:
    def doing(world: World) -> None:
        ticket = Ticket(
            1, None, since=0.0, deadline=1.0, endpoint=1, sticky=None, who=7, stack=None
        )  # fmt: skip
        world.users._wait(0.0, 7, ticket)
        world.engine.at(1.02, world.stall, 2.0)  # it is looked at again after that

    assert "waits, its deadline was 1.000 s" in broken(quiet(users=Habits(cancel=0.0)), doing=doing)


def test_a_connection_is_lent_once() -> None:
    def doing(world: World) -> None:
        def borrow(now: float, _: object) -> None:
            lease = world.conductor.acquire(now, who=0)
            assert isinstance(lease, Lease)
            world.users._lent(now, 0, lease, chosen=True)
            world.users._lent(now, 1, lease, chosen=True)

        world.engine.at(1.0, lambda _, __: world.application(borrow))

    assert "is lent to 1, and 0 has it" in broken(quiet(), doing=doing)


def test_nobody_waits_while_a_connection_is_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Lending, "offer", lambda *_: None)
    found = [run("line", seed).broken for seed in range(10)]
    assert any(one is not None and "and one is idle" in one.what for one in found)


def test_the_line_with_all_that_happens_in_it() -> None:
    """Users who cancel before and after they are served, come too late, and find the line full."""
    counts: dict[str, int] = {}
    for seed in range(12):
        outcome = run("line", seed)
        assert outcome.broken is None
        for name, count in outcome.counts.items():
            counts[name] = counts.get(name, 0) + count
    assert min(counts[name] for name in ("lent", "waited", "late", "cancelled")) > 0
    for seed in range(12):
        assert run("anything", seed).broken is None
