# SPDX-License-Identifier: Apache-2.0
"""NewReno beside the formulas of RFC 9002, and beside its pseudocode, packet by packet, after any events."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from userspace.flow import registry
from userspace.flow.congestion import Ack, Congestion, Loss, initial_window
from userspace.flow.cubic import Cubic
from userspace.flow.limits import WINDOW_MAXIMUM
from userspace.flow.newreno import NewReno
from xdp.errors import UsageError

MTU = 1200


def acked(
    controller: NewReno,
    now: float,
    count: int = 1,
    *,
    sent: float | None = None,
    size: int = MTU,
    in_flight: int | None = None,
    app_limited: bool = False,
) -> None:
    """So many packets are acknowledged at once, of a full window if nothing else is said."""
    ack = Ack()
    ack.packets, ack.bytes = count, count * size
    ack.largest_sent_at = now - 0.1 if sent is None else sent
    ack.prior_in_flight = controller.window if in_flight is None else in_flight
    ack.smoothed_rtt = 0.1
    ack.app_limited = app_limited
    controller.on_ack(now, ack)


def lost(controller: NewReno, now: float, *, sent: float | None = None) -> None:
    loss = Loss()
    loss.packets, loss.bytes = 1, MTU
    loss.largest_sent_at = now - 0.1 if sent is None else sent
    controller.on_loss(now, loss)


# --- growth


@pytest.mark.parametrize("mtu", [1, 1200, 1472, 1473, 1500, 7360, 9000, 65_527])
def test_the_initial_window_is_ten_packets_within_14720_bytes(mtu: int) -> None:
    assert NewReno(0.0, mtu).window == min(10 * mtu, max(14_720, 2 * mtu))


@pytest.mark.parametrize("make", [NewReno, Cubic])
def test_slow_start_grows_by_what_is_acknowledged(make: type[NewReno]) -> None:
    controller = make(0.0)
    for number in range(1, 101):
        acked(controller, 1.0, 2, size=1000)
        assert controller.window == 12_000 + number * 2000
    assert controller.ssthresh is None
    assert controller.pacing_rate is None


def test_avoidance_adds_a_packet_a_window() -> None:
    controller = NewReno(0.0)
    controller.window = 40 * MTU
    lost(controller, 1.0)
    for window in range(20, 60):
        for _ in range(window):  # as many packets as the window has
            assert controller.window == window * MTU
            acked(controller, 2.0)
    assert controller.window == 60 * MTU


@given(
    st.lists(st.integers(1, 8), min_size=1, max_size=200),
    st.integers(100, MTU),
    st.integers(1, 40),
    st.integers(0, 60_000),
)
def test_how_often_the_peer_acknowledges_makes_no_difference(
    counts: list[int], size: int, window: int, ssthresh: int
) -> None:
    together, apart = NewReno(0.0), NewReno(0.0)
    for controller in (together, apart):
        controller.window = window * 2 * MTU
        controller.ssthresh = ssthresh
    for most in counts:
        count = min(most, together.window // size)
        acked(together, 1.0, count, size=size)
        for _ in range(count):
            acked(apart, 1.0, size=size)
        assert together.window == apart.window


@pytest.mark.parametrize(
    ("in_flight", "app_limited", "grows"),
    [
        (12_000, False, True),
        (12_000, True, True),
        (10_801, True, True),  # no room for a full packet
        (10_800, True, False),
        (6_001, False, True),  # the pacer held the rest back
        (6_000, False, False),
        (1_200, False, False),
        (20_000, True, True),
    ],
)
def test_a_window_that_was_not_full_does_not_grow(in_flight: int, app_limited: bool, grows: bool) -> None:
    for controller in (NewReno(0.0), Cubic(0.0)):
        acked(controller, 1.0, in_flight=in_flight, app_limited=app_limited)
        assert (controller.window > 12_000) is grows


def test_a_limited_rate_does_not_let_the_window_grow_beyond_twice_what_it_needs() -> None:
    for controller in (NewReno(0.0, hystart=False), Cubic(0.0, hystart=False)):
        for number in range(1000):
            acked(controller, 1.0 + number / 100, 2, in_flight=30_000)
        assert 50_000 < controller.window <= 60_000 + 2 * MTU
        controller.ssthresh = controller.window // 2
        for number in range(1000):
            acked(controller, 20.0 + number / 100, 2, in_flight=30_000)
        assert controller.window <= 60_000 + 2 * MTU


# --- reduction


def test_a_loss_halves_the_window_once_a_round() -> None:
    controller = NewReno(0.0)
    controller.window = 100_001
    lost(controller, 1.0)
    assert (controller.window, controller.ssthresh) == (50_000, 50_000)
    lost(controller, 1.05, sent=0.99)
    lost(controller, 1.06, sent=1.0)  # sent before the reduction, or with it
    assert controller.window == 50_000
    acked(controller, 1.09, 41, sent=1.0)
    assert (controller.window, controller._counted) == (50_000, 0)
    acked(controller, 1.11, 41, sent=1.01)
    acked(controller, 1.11, 1, sent=1.01)
    assert controller.window == 50_000 + MTU
    lost(controller, 1.2, sent=1.02)
    assert controller.window == 25_600


@pytest.mark.parametrize("make", [NewReno, Cubic])
def test_a_mark_is_as_a_loss(make: type[NewReno]) -> None:
    controller, other = make(0.0), make(0.0)
    controller.on_ecn(1.0, 1, 0.9)
    lost(other, 1.0)
    assert (controller.window, controller.ssthresh) == (other.window, other.ssthresh)
    controller.on_ecn(1.1, 3, 1.0)
    assert controller.window == other.window
    for nonsense in (0, -1, -(10**30)):
        controller.on_ecn(2.0, nonsense, 1.9)
    assert controller.window == other.window
    controller.on_ecn(2.0, 10**30, 1.9)
    assert controller.window == int(other.window * make.beta)


def test_the_window_is_never_below_two_packets_nor_above_the_maximum() -> None:
    for controller in (NewReno(0.0), Cubic(0.0)):
        for number in range(1, 60):
            lost(controller, float(number))
        assert controller.window == controller.ssthresh == 2 * MTU
        controller.ssthresh = None
        for number in range(60):
            acked(controller, 100.0 + number, controller.window // MTU)
        assert controller.window == WINDOW_MAXIMUM
        controller.ssthresh = WINDOW_MAXIMUM
        for number in range(60):
            acked(controller, 200.0 + number, WINDOW_MAXIMUM // MTU)
        assert controller.window == WINDOW_MAXIMUM
        controller.ssthresh = WINDOW_MAXIMUM + 1
        acked(controller, 300.0, 10)
        assert controller.window == WINDOW_MAXIMUM


def test_persistent_congestion_begins_again_from_the_least() -> None:
    controller = NewReno(0.0)
    controller.window = 48 * MTU
    lost(controller, 1.0)
    controller.on_persistent(1.0)
    assert (controller.window, controller.ssthresh) == (2 * MTU, 24 * MTU)
    for count in range(3, 25):  # slow start, with what was sent before as well (RFC 9002, B.8)
        acked(controller, 1.1, sent=0.5)
        assert controller.window == count * MTU
    acked(controller, 1.1, 23)
    assert controller.window == 24 * MTU
    acked(controller, 1.1, 1)
    assert controller.window == 25 * MTU
    controller.on_spurious(1.2)
    assert controller.window == 25 * MTU
    lost(controller, 1.3, sent=0.9)
    assert controller.window == int(12.5 * MTU)


def test_persistent_congestion_without_a_loss_before_sets_a_threshold() -> None:
    controller = NewReno(0.0)
    controller.on_persistent(1.0)
    assert (controller.window, controller.ssthresh) == (2 * MTU, 5 * MTU)


# --- undoing


def test_a_spurious_loss_in_slow_start_is_as_if_it_had_not_been() -> None:
    controller, other = NewReno(0.0), NewReno(0.0)
    lost(controller, 1.0)
    controller.on_spurious(1.05)
    assert (controller.window, controller.ssthresh) == (12_000, None)
    assert controller._hystart is not None
    acked(controller, 1.1, 4, sent=0.95)  # of the recovery period that was none
    acked(other, 1.1, 4, sent=0.95)
    assert controller.window == other.window
    controller.on_spurious(1.2)
    assert controller.window == other.window


def test_only_the_last_reduction_is_undone() -> None:
    controller = NewReno(0.0)
    controller.window = 80_000
    lost(controller, 1.0)
    lost(controller, 2.0)
    controller.on_spurious(2.1)
    assert (controller.window, controller.ssthresh) == (40_000, 40_000)
    controller.on_spurious(2.2)
    assert controller.window == 40_000


def test_a_mark_says_that_the_reduction_was_right() -> None:
    for marked_at in (1.0, 0.5):  # of the same time, or a reduction of its own
        controller = NewReno(0.0)
        lost(controller, 0.8)
        controller.on_ecn(1.2, 1, marked_at)
        window = controller.window
        controller.on_spurious(1.3)
        assert controller.window == window


def test_a_window_that_is_as_large_again_stays() -> None:
    controller = NewReno(0.0)
    lost(controller, 1.0)
    for _ in range(200):
        acked(controller, 2.0)
    window, ssthresh = controller.window, controller.ssthresh
    assert window > 12_000
    controller.on_spurious(2.1)
    assert (controller.window, controller.ssthresh) == (window, ssthresh)


# --- the path, and errors


def test_another_mtu_changes_an_untouched_window_and_the_least_one() -> None:
    for controller in (NewReno(0.0), Cubic(0.0)):
        controller.on_mtu(1400)
        assert controller.window == initial_window(1400) == 14_000
        acked(controller, 1.0)
        controller.on_mtu(1300)
        assert controller.window == 14_000 + MTU
        for number in range(2, 20):
            lost(controller, float(number))
        assert controller.window == 2 * 1300
        controller.on_mtu(9000)
        assert controller.window == controller.ssthresh == 18_000
        controller.on_spurious(21.0)  # which would be below that
        assert controller.window == 18_000


@pytest.mark.parametrize("mtu", [0, -1, 65_528, 1200.0, True, None, "1200"])
def test_an_mtu_that_udp_cannot_carry_is_refused(mtu: object) -> None:
    for name in ("newreno", "cubic"):
        with pytest.raises(UsageError, match="mtu is a whole number of bytes from 1 to 65527"):
            registry.make(name, 0.0, mtu)  # type: ignore[arg-type]
        controller = registry.make(name, 0.0)
        with pytest.raises(UsageError, match="mtu is a whole number"):
            controller.on_mtu(mtu)  # type: ignore[arg-type]
        assert controller.window == 12_000


def test_names() -> None:
    assert type(registry.make("newreno", 0.0)) is NewReno
    assert type(registry.make("cubic", 0.0, 1400, 7)) is Cubic
    assert repr(registry.make("cubic", 0.0)) == "<Cubic window=12000 ssthresh=None>"
    known = ", ".join(sorted(registry.CONTROLLERS))
    for wrong in ("bbr9", "", "Cubic", None, ["cubic"]):
        with pytest.raises(UsageError) as error:
            registry.make(wrong, 0.0)  # type: ignore[arg-type]
        assert str(error.value) == f"no congestion controller {wrong!r}; there are {known}"
    for name, factory in registry.CONTROLLERS.items():
        controller: Congestion = factory(0.0, 1200, 1)
        assert controller.name == name


def test_registered_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "CONTROLLERS", dict(registry.CONTROLLERS))
    registry.register("mine", partial(Cubic, hystart=False))
    controller = registry.make("mine", 0.0)
    assert isinstance(controller, Cubic)
    assert controller._hystart is None
    with pytest.raises(UsageError, match="there is a congestion controller 'cubic' already"):
        registry.register("cubic", Cubic)
    for name in ("", "Mine", "1st", "a b", "x" * 33, None, "mine\n"):
        with pytest.raises(UsageError, match="name has 1 to 32 small letters"):
            registry.register(name, Cubic)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"made by a call of \(now, mtu, seed\), not by 3"):
        registry.register("three", 3)  # type: ignore[arg-type]


# --- any events


@dataclass
class Pseudocode:
    """RFC 9002, appendix B, a packet at a time, with counted bytes and a copy to go back to."""

    window: int = 12_000
    ssthresh: float = float("inf")
    start: float = float("-inf")
    counted: int = 0
    before: Pseudocode | None = None

    def packet_acknowledged(self, size: int, sent: float) -> None:
        if sent <= self.start:
            return
        if self.window < self.ssthresh:
            self.window += size
        else:
            self.counted += size
            if self.counted >= self.window:
                self.counted -= self.window
                self.window += MTU

    def congestion_event(self, now: float, sent: float, *, undoable: bool) -> None:
        if sent > self.start:
            self.before = copy.copy(self)
            self.before.before = None
            self.start, self.counted = now, 0
            self.ssthresh = self.window = max(self.window // 2, 2 * MTU)
        if not undoable:
            self.before = None

    def persistent(self) -> None:
        if self.ssthresh == float("inf"):
            self.ssthresh = max(self.window // 2, 2 * MTU)
        self.window, self.start, self.counted, self.before = 2 * MTU, float("-inf"), 0, None

    def spurious(self) -> None:
        if self.before is not None and self.window < self.before.window:
            self.__dict__.update(self.before.__dict__)
        self.before = None


class Beside(RuleBasedStateMachine):
    """NewReno without HyStart++ and the pseudocode."""

    def __init__(self) -> None:
        super().__init__()
        self.controller = NewReno(0.0, MTU, hystart=False)
        self.model = Pseudocode()
        self.now = 1.0

    @rule(step=st.sampled_from([0.0, 0.01, 0.1]))
    def wait(self, step: float) -> None:
        self.now += step

    @rule(count=st.integers(1, 40), size=st.integers(1, MTU), ago=st.sampled_from([0.0, 0.01, 0.05, 0.1]))
    def acknowledge(self, count: int, size: int, ago: float) -> None:
        count = max(1, min(count, self.model.window // size))
        acked(self.controller, self.now, count, size=size, sent=self.now - ago)
        for _ in range(count):
            self.model.packet_acknowledged(size, self.now - ago)

    @rule(ago=st.sampled_from([0.0, 0.05, 0.1, 0.5]))
    def lose(self, ago: float) -> None:
        lost(self.controller, self.now, sent=self.now - ago)
        self.model.congestion_event(self.now, self.now - ago, undoable=True)

    @rule(ago=st.sampled_from([0.0, 0.05, 0.1, 0.5]))
    def mark(self, ago: float) -> None:
        self.controller.on_ecn(self.now, 1, self.now - ago)
        self.model.congestion_event(self.now, self.now - ago, undoable=False)

    @rule()
    def spurious(self) -> None:
        self.controller.on_spurious(self.now)
        self.model.spurious()

    @rule()
    def persistent(self) -> None:
        lost(self.controller, self.now, sent=self.now)
        self.controller.on_persistent(self.now)
        self.model.congestion_event(self.now, self.now, undoable=True)
        self.model.persistent()

    @invariant()
    def alike(self) -> None:
        ssthresh = self.controller.ssthresh
        assert self.controller.window == self.model.window
        assert (float("inf") if ssthresh is None else ssthresh) == self.model.ssthresh
        assert 2 * MTU <= self.controller.window <= WINDOW_MAXIMUM


TestBeside = Beside.TestCase
TestBeside.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
