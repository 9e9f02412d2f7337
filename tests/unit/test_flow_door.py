# SPDX-License-Identifier: Apache-2.0
"""Whom the door holds: exact shares, times and orders, a closed loop, and any calls in any order."""

from __future__ import annotations

import math
import random
from collections.abc import Hashable, Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from userspace.flow.door import (
    BURST_TIME,
    HIGH,
    LEAST_BURST,
    LOW,
    MAX_BURST,
    MAX_RATE,
    RENEW,
    SHARED,
    SHORTEST,
    Door,
    Order,
    fair_share,
)
from xdp import tables
from xdp.errors import UsageError


class Peers:
    """Peers that send at steady rates, and what a program counts of them."""

    def __init__(self, **rates: int) -> None:
        self.rates = rates
        self.packets = dict.fromkeys(rates, 0)
        self.drops = dict.fromkeys(rates, 0)

    def after(self, seconds: float) -> dict[Hashable, tuple[int, int]]:
        for name, rate in self.rates.items():
            self.packets[name] += round(rate * seconds)
        return {name: (self.packets[name], self.drops[name]) for name in self.rates}


def looks(
    door: Door,
    peers: Peers,
    start: float,
    *,
    level: float,
    capacity: float = 1000,
    count: int = 1,
    step: float = 1.0,
) -> list[Order]:
    """The orders of so many looks, ``step`` seconds apart."""
    orders: list[Order] = []
    for number in range(1, count + 1):
        orders += door.look(start + number * step, level, capacity, peers.after(step))
    return orders


def opened(peers: Peers, **options: float) -> Door:
    """A door that has looked once, at time 0."""
    door = Door(**{"patience": 0.0, **options})  # type: ignore[arg-type]
    assert door.look(0.0, 0.0, 1000, peers.after(0)) == []
    return door


@pytest.mark.parametrize(
    ("loads", "capacity", "share"),
    [
        ([], 10, math.inf),
        ([3, 4], 7, math.inf),
        ([3, 5], 7, 4),
        ([1, 2, 10, 10], 11, 4),
        ([2, 2, 2], 3, 1),
        ([5], 0, 0),
        ([5], -1, 0),
        ([0, 0], 0, math.inf),
    ],
)
def test_shares_of_a_capacity(loads: list[float], capacity: float, share: float) -> None:
    assert fair_share(loads, capacity) == share


@given(st.lists(st.floats(0, 1e9), max_size=20), st.floats(1e-3, 1e10))
def test_a_share_uses_the_capacity_up_and_no_more(loads: list[float], capacity: float) -> None:
    share = fair_share(loads, capacity)
    through = math.fsum(min(load, share) for load in loads)
    assert through <= capacity * (1 + 1e-9)
    if share < math.inf:
        assert through >= capacity * (1 - 1e-9)
        assert share >= capacity / len(loads) * (1 - 1e-9)


def test_limits_are_those_of_the_program() -> None:
    assert (MAX_RATE, MAX_BURST) == (tables.MAX_HOLD_RATE, tables.MAX_HOLD_BURST)


def test_the_heavy_one_gets_what_the_others_leave() -> None:
    peers = Peers(small=100, middle=200, heavy=5000)
    door = opened(peers)
    assert looks(door, peers, 0, level=HIGH) == [Order("heavy", 600, 12, 60.0)]
    assert door.held == {"heavy": 600}
    assert looks(door, peers, 1, level=0.5, count=5) == []


def test_two_heavy_ones_share_evenly_heaviest_first() -> None:
    peers = Peers(small=100, heavy=800, heavier=900)
    assert [order[:2] for order in looks(opened(peers), peers, 0, level=1.0)] == [
        ("heavier", 400),
        ("heavy", 400),
    ]


def test_bursts_follow_the_rate_between_bounds() -> None:
    for capacity, burst in (
        (100, LEAST_BURST),
        (1e6, int(900_000 * BURST_TIME)),
        (1e9, int(MAX_RATE * BURST_TIME)),
    ):
        peers = Peers(only=10**10)
        (order,) = looks(opened(peers), peers, 0, level=1.0, capacity=capacity)
        assert order.burst == burst


def test_what_fits_in_is_let_be_however_full_the_queue_is() -> None:
    peers = Peers(one=400, two=500)
    assert looks(opened(peers), peers, 0, level=1.0, count=9) == []


def test_what_the_program_drops_anyway_is_no_load() -> None:
    peers = Peers(limited=50_000, other=850)
    door = opened(peers)
    for second in range(1, 5):
        peers.drops["limited"] += 49_990
        assert looks(door, peers, second - 1, level=1.0) == []


def test_a_moment_of_fullness_is_not_enough() -> None:
    peers = Peers(heavy=5000)
    door = opened(peers, patience=2.0)
    assert looks(door, peers, 0, level=1.0, count=2) == []  # full since 1: for one second
    assert looks(door, peers, 2, level=HIGH - 0.01) == []
    assert looks(door, peers, 3, level=1.0, count=2) == []
    assert [order.peer for order in looks(door, peers, 5, level=1.0)] == ["heavy"]


def test_only_so_many_and_those_who_send_most() -> None:
    peers = Peers(**{f"p{number}": 100 + number for number in range(20)})
    door = opened(peers, limit=3)
    orders = looks(door, peers, 0, level=1.0)
    assert [order.peer for order in orders] == ["p19", "p18", "p17"]
    # The others alone are too much, but nobody is held at less than an even part.
    assert {order.rate for order in orders} == {int(1000 * SHARED / 20)}
    assert looks(door, peers, 1, level=1.0) == []


def test_let_go_after_the_calm_and_not_before() -> None:
    peers = Peers(small=100, heavy=5000)
    door = opened(peers, calm=5.0)
    looks(door, peers, 0, level=1.0)
    peers.drops["heavy"] = 4000
    assert looks(door, peers, 1, level=0.5, count=10) == []  # it does not slow down
    peers.rates["heavy"] = 700
    assert looks(door, peers, 11, level=0.5, count=5) == []  # good since 12
    assert looks(door, peers, 16, level=0.5) == [Order("heavy", 0, 0, 0.0)]
    assert door.held == {}


@pytest.mark.parametrize("what", ["level", "rate"])
def test_a_calm_that_is_broken_begins_anew(what: str) -> None:
    peers = Peers(heavy=5000)
    door = opened(peers, calm=5.0)
    looks(door, peers, 0, level=1.0)
    peers.rates["heavy"] = 700
    looks(door, peers, 1, level=0.5, count=4)
    if what == "rate":
        peers.rates["heavy"] = 1500
    looks(door, peers, 5, level=HIGH if what == "level" else 0.5)
    peers.rates["heavy"] = 700
    assert looks(door, peers, 6, level=0.5, count=5) == []
    assert looks(door, peers, 11, level=0.5) == [Order("heavy", 0, 0, 0.0)]


def test_rates_follow_the_capacity_not_every_wink_of_it() -> None:
    peers = Peers(heavy=5000)
    door = opened(peers)
    looks(door, peers, 0, level=1.0)
    assert door.held == {"heavy": 900}
    assert looks(door, peers, 1, level=1.0, capacity=800) == []  # a fifth less
    assert looks(door, peers, 2, level=0.5, capacity=500) == []  # neither full nor empty
    assert [order.rate for order in looks(door, peers, 3, level=1.0, capacity=500)] == [450]
    assert looks(door, peers, 4, level=LOW, capacity=600) == []  # a fifth more
    assert [order.rate for order in looks(door, peers, 5, level=LOW, capacity=1000)] == [900]
    # All fits in: let go after the calm, with no flood before it.
    assert looks(door, peers, 6, level=LOW, capacity=10_000, count=5) == []
    assert looks(door, peers, 11, level=LOW, capacity=10_000) == [Order("heavy", 0, 0, 0.0)]


def test_orders_are_repeated_before_they_end() -> None:
    peers = Peers(heavy=5000)
    door = opened(peers, seconds=10.0)
    first = looks(door, peers, 0, level=1.0)
    assert looks(door, peers, 1, level=0.5, count=int(10 * RENEW) - 1) == []
    assert looks(door, peers, 10 * RENEW, level=0.5) == first


def test_who_was_not_looked_after_for_too_long_is_free_again() -> None:
    peers = Peers(heavy=5000)
    door = opened(peers, seconds=10.0)
    looks(door, peers, 0, level=1.0)
    assert looks(door, peers, 1, level=0.0, step=10.0) == []
    assert door.held == {}


def test_who_left_the_policy_is_released_and_forgotten() -> None:
    peers = Peers(heavy=5000, other=1)
    door = opened(peers)
    looks(door, peers, 0, level=1.0)
    del peers.rates["heavy"]
    assert looks(door, peers, 1, level=1.0, step=SHORTEST / 2) == [Order("heavy", 0, 0, 0.0)]
    assert door.held == {}


def test_forgotten_by_the_caller() -> None:
    peers = Peers(heavy=5000)
    door = opened(peers)
    looks(door, peers, 0, level=1.0)
    door.forget("heavy")
    door.forget("nobody")
    assert door.held == {}
    assert [order.peer for order in looks(door, peers, 1, level=1.0)] == ["heavy"]


def test_a_clock_that_goes_back() -> None:
    """Times begin anew, and orders are repeated at once, for nobody knows when they end."""
    peers = Peers(heavy=5000)
    door = opened(peers)
    looks(door, peers, 0, level=1.0)
    assert looks(door, peers, -10, level=1.0) == []
    assert looks(door, peers, -9, level=0.5) == [Order("heavy", 900, 18, 60.0)]


def test_looks_too_close_together_say_nothing() -> None:
    peers = Peers(heavy=5000)
    door = opened(peers)
    assert looks(door, peers, 0, level=1.0, step=SHORTEST / 2) == []
    assert [order.peer for order in looks(door, peers, SHORTEST / 2, level=1.0, step=SHORTEST)] == ["heavy"]


def test_counts_that_go_back_and_new_peers_are_no_load() -> None:
    door = Door(patience=0.0)
    door.look(0, 1.0, 10, {"a": (10**9, 0), "b": (10**9, 0)})
    assert door.look(1, 1.0, 10, {"a": (5, 0), "b": (10**9, 7), "new": (10**9, 0)}) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit": 0}, "limit of a door: 0; allowed: a whole number from 1"),
        ({"limit": True}, "limit of a door: True"),
        ({"seconds": 0.5}, "seconds of a door: 0.5; allowed: a finite number from 1 to 3600"),
        ({"patience": -1}, "patience of a door: -1; allowed: a finite number from 0 to 3600"),
        ({"calm": math.nan}, "calm of a door: nan"),
        ({"calm": "1"}, "calm of a door: '1'"),
    ],
)
def test_options_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError) as error:
        Door(**options)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((math.nan, 0.5, 1.0), "time: nan; allowed: a finite number"),
        ((math.inf, 0.5, 1.0), "time: inf; allowed: a finite number"),
        ((0.0, 1.5, 1.0), "level of the queue: 1.5; allowed: a finite number from 0 to 1"),
        ((0.0, math.nan, 1.0), "level of the queue: nan"),
        ((0.0, 0.5, -1.0), "capacity: -1.0; allowed: a finite number from 0"),
        ((0.0, 0.5, math.inf), "capacity: inf; allowed: a finite number from 0"),
    ],
)
def test_looks_refused(arguments: tuple[float, float, float], message: str) -> None:
    door = Door()
    with pytest.raises(UsageError) as error:
        door.look(*arguments, {})
    assert str(error.value).startswith(message)
    assert door.look(0.0, 0.0, 0.0, {}) == []


class Receiver:
    """A queue that is served at a rate, behind a program that holds as it is told; in virtual time."""

    def __init__(self, capacity: float, room: int) -> None:
        self.capacity, self.room, self.queued, self.lost = capacity, room, 0.0, 0.0
        self.until: dict[Hashable, tuple[int, float]] = {}

    def obey(self, now: float, orders: list[Order]) -> None:
        for order in orders:
            if order.rate:
                self.until[order.peer] = order.rate, now + order.seconds
            else:
                self.until.pop(order.peer, None)

    def step(self, now: float, seconds: float, sent: Mapping[str, int], drops: dict[str, int]) -> None:
        for name, packets in sent.items():
            rate, until = self.until.get(name, (0, 0.0))
            through = min(packets, round(rate * seconds)) if until > now else packets
            drops[name] += packets - through
            self.queued += through
        self.queued -= self.capacity * seconds
        self.lost += max(0.0, self.queued - self.room)
        self.queued = min(self.room, max(0.0, self.queued))


@pytest.mark.parametrize("seed", range(8))
def test_in_a_closed_loop(seed: int) -> None:
    """One that floods is held until it stops; the queue empties, and nobody else loses for it afterwards."""
    rng = random.Random(seed)
    peers = Peers(**{f"p{number}": rng.randint(10, 80) for number in range(10)}, flood=20_000)
    door, receiver, step = Door(), Receiver(1000, 500), 0.1
    lost_at: dict[int, float] = {}
    for tick in range(1, 901):
        now = tick * step
        if tick == 600:
            peers.rates["flood"] = 50
        before = dict(peers.packets)
        peers.after(step)
        sent = {name: peers.packets[name] - before[name] for name in peers.rates}
        receiver.step(now, step, sent, peers.drops)
        seen: dict[Hashable, tuple[int, int]] = {n: (peers.packets[n], peers.drops[n]) for n in peers.rates}
        orders = door.look(now, receiver.queued / receiver.room, receiver.capacity, seen)
        assert {order.peer for order in orders} <= {"flood"}, f"seed {seed}, {now}"
        receiver.obey(now, orders)
        lost_at[tick] = receiver.lost
        assert receiver.until.keys() == door.held.keys(), f"seed {seed}, {now}"
    assert lost_at[900] == lost_at[20] > 0, f"seed {seed}"  # two seconds of flood, and no more
    assert not door.held
    assert all(peers.drops[name] == 0 for name in peers.rates if name != "flood")


class AnyCalls(RuleBasedStateMachine):
    """Any looks: what is ordered is what can be carried out, and agrees with what the door says of itself."""

    def __init__(self) -> None:
        super().__init__()
        self.limit = 3
        self.door = Door(limit=self.limit, seconds=10.0, patience=0.3, calm=1.0)
        self.now = 0.0
        self.held: dict[Hashable, tuple[int, float]] = {}  # as a program has it: rate, until
        self.full_for = 0.0

    @rule(
        elapsed=st.floats(0, 4),
        level=st.floats(0, 1),
        capacity=st.floats(0, 1e12),
        seen=st.dictionaries(
            st.sampled_from("abcdefg"),
            st.tuples(st.integers(0, 1 << 64), st.integers(0, 1 << 64)),
            max_size=7,
        ),
    )
    def look(
        self, elapsed: float, level: float, capacity: float, seen: dict[Hashable, tuple[int, int]]
    ) -> None:
        self.now += elapsed
        orders = self.door.look(self.now, level, capacity, seen)
        assert len({order.peer for order in orders}) == len(orders)
        for order in orders:
            assert order.rate == 0 or (1 <= order.rate <= MAX_RATE and 1 <= order.burst <= MAX_BURST)
            if order.rate:
                assert order.peer in seen
                assert order.peer in self.held or level >= HIGH
                self.held[order.peer] = order.rate, self.now + order.seconds
            else:
                del self.held[order.peer]  # nobody is released who was not held

    @rule(peer=st.sampled_from("abcdefg"))
    def forget(self, peer: str) -> None:
        self.door.forget(peer)
        self.held.pop(peer, None)

    @rule(back=st.floats(0, 100))
    def clock_goes_back(self, back: float) -> None:
        """By another clock: what the program has ends as it was told."""
        self.now -= back
        self.held = {peer: (rate, until - back) for peer, (rate, until) in self.held.items()}

    @invariant()
    def agree(self) -> None:
        held = self.door.held
        assert len(held) <= self.limit
        assert held.keys() <= self.held.keys()
        assert all(self.held[peer][0] == rate for peer, rate in held.items())
        # Whom the door forgets, the program has let go, or will soon.
        self.held = {peer: self.held[peer] for peer in held}


TestAnyCalls = AnyCalls.TestCase
TestAnyCalls.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
