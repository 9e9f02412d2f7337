# SPDX-License-Identifier: Apache-2.0
"""FlowController beside a model of what is on its way, with every controller, whatever a peer says."""

from __future__ import annotations

import json
import math
from functools import partial

import msgspec
import pytest
from hypothesis import HealthCheck, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.unit.flow_recorder import Recorder
from userspace.flow.congestion import CongestionFactory, initial_window, minimum_window
from userspace.flow.controller import LATEST, LEAST_RATE, MOST_RATE, FlowController
from userspace.flow.recovery import Outcome
from userspace.flow.registry import CONTROLLERS
from userspace.flow.signals import Level
from xdp.errors import UsageError

SIZE = 1200


class Window(Recorder):
    """A recorder with a window of ten packets."""

    def __init__(self, now: float = 0.0, mtu: int = SIZE, seed: int = 0) -> None:
        super().__init__(now, mtu, seed)
        self.window = 10 * SIZE


def controller(**options: object) -> tuple[FlowController, Window]:
    made = Window()
    flow = FlowController(0.0, congestion=lambda _now, _mtu, _seed: made, **options)  # type: ignore[arg-type]
    return flow, made


# --- window and pacing


def test_the_window_closes_and_opens() -> None:
    flow, _ = controller()
    for number in range(10):
        assert flow.can_send(0.0)
        assert flow.next_send_time(0.0) == 0.0
        assert flow.on_packet_sent(0.0, SIZE) == number
    assert not flow.can_send(0.0)
    assert not flow.can_send(0.0, 1)
    assert flow.next_send_time(0.0) == math.inf
    assert (flow.in_flight, flow.window) == (10 * SIZE, 10 * SIZE)
    assert flow.on_ack_received(0.1, [(0, 0)]).acknowledged == [0]
    assert flow.next_send_time(0.1) < math.inf
    assert flow.next_send_time(0.1, SIZE + 1) == math.inf


@pytest.mark.parametrize("every", [True, False])
def test_who_wants_to_hear_of_every_packet(every: bool) -> None:
    """Else only of the first after silence, with the bytes that are on their way then."""
    made = Window()
    made.every_packet = every
    flow = FlowController(0.0, congestion=lambda _now, _mtu, _seed: made)
    heard: list[tuple[float, int]] = []
    made.on_sent = lambda now, _, in_flight, **__: heard.append((now, in_flight))  # type: ignore[method-assign]
    flow.on_packet_sent(1.0, 100)
    flow.on_packet_sent(2.0, 200)
    assert heard == ([(1.0, 100), (2.0, 300)] if every else [(1.0, 100)])
    flow.on_ack_received(3.0, [(0, 1)])
    flow.on_packet_sent(4.0, 300)
    assert heard[-1] == (4.0, 300)


def test_a_packet_larger_than_the_window_may_leave_alone() -> None:
    flow, made = controller()
    made.window = 2 * SIZE
    assert flow.next_send_time(0.0, 9000) < math.inf
    flow.on_packet_sent(0.0, 9000)
    assert flow.next_send_time(0.0, 1) == math.inf


def test_packets_on_their_way_are_limited_by_number_as_well() -> None:
    flow, _ = controller(max_in_flight=4)
    for _ in range(4):
        assert flow.can_send(0.0, 1)
        flow.on_packet_sent(0.0, 1)
    assert not flow.can_send(0.0, 1)


def test_the_pace_is_that_of_the_window() -> None:
    flow, made = controller()
    made.ssthresh = 5 * SIZE
    flow.on_packet_sent(0.0, SIZE)
    flow.on_ack_received(0.1, [(0, 0)])
    assert flow.snapshot().rate == pytest.approx(10 * SIZE / 0.1)
    # 1.25 windows per round trip, after a burst of ten packets
    made.window = 100 * SIZE
    flow.on_ack_received(0.1, [(0, 0)])
    now, left = 0.1, 0
    while now < 1.1:
        now = max(now, flow.next_send_time(now))
        number = flow.on_packet_sent(now, SIZE)
        flow.on_packet_lost(now, number)
        left += 1
    assert left == pytest.approx(1.25 * 100 * 10 + 10, rel=0.01)


def test_slow_start_is_paced_twice_as_fast() -> None:
    flow, made = controller()
    flow.on_packet_sent(0.0, SIZE)
    flow.on_ack_received(0.1, [(0, 0)])
    assert flow._rate == pytest.approx(2 * 10 * SIZE / 0.1)
    made.ssthresh = 10 * SIZE
    flow.on_packet_sent(0.1, SIZE)
    flow.on_ack_received(0.2, [(0, 1)])  # looked at once a round
    assert flow._rate == pytest.approx(1.25 * 10 * SIZE / 0.1)


def test_the_controllers_own_rate_is_taken() -> None:
    flow, made = controller()
    made.pacing_rate = 5000.0
    flow.on_ack_received(0.0, [])
    assert flow._rate == 5000.0
    assert flow.get_current_rate(0.0) == 5000.0
    made.pacing_rate = 0.0
    flow.on_ack_received(0.0, [])
    assert flow._rate == LEAST_RATE
    made.pacing_rate = math.inf
    flow.on_ack_received(0.0, [])
    assert flow._rate == MOST_RATE


def test_the_rate_never_exceeds_the_maximum() -> None:
    flow, made = controller(max_rate=100_000)
    made.window = 1 << 24
    now, left = 0.0, 0
    while now < 10.0:
        now = max(now, flow.next_send_time(now))
        left += SIZE
        number = flow.on_packet_sent(now, SIZE)
        flow.on_ack_received(now, [(number, number)])
    assert left <= 10 * 100_000 + initial_window(SIZE) + SIZE + 100
    assert left >= 10 * 100_000
    flow.set_max_rate(now, 50_000)
    assert flow.get_current_rate(now) == 50_000
    flow.set_max_rate(now, None)
    assert flow.get_current_rate(now) > 100_000


def test_without_adaption_only_the_limits_hold() -> None:
    flow, made = controller(adaptive=False, max_in_flight=100, max_rate=1e6)
    assert flow.window == 100 * SIZE
    for _ in range(50):
        flow.on_packet_sent(0.0, SIZE)
    assert flow.next_send_time(0.0) < math.inf
    assert flow.get_current_rate(0.0) <= 1e6
    assert "(not adaptive)" in repr(flow)
    flow.enable_adaptive_rate(True)
    assert flow.window == made.window
    assert flow.next_send_time(0.0) == math.inf


def test_a_round_trip_may_be_measured_by_others() -> None:
    flow, _ = controller()
    flow.on_round_trip(1.0, 0.05)
    assert flow.smoothed_rtt == flow.min_rtt == 0.05
    assert flow._rate == pytest.approx(2 * 10 * SIZE / 0.05)
    flow.on_round_trip(1.1, math.nan)
    assert 0.0 < flow.smoothed_rtt < 0.05
    with pytest.raises(UsageError):
        flow.on_round_trip(math.nan, 0.05)


def test_an_mtu_may_change() -> None:
    flow, made = controller(adaptive=False, max_in_flight=100)
    flow.set_mtu(1400)
    assert made.mtu == 1400
    assert flow.window == 100 * 1400


# --- timers


def test_a_probe_may_leave_in_spite_of_the_window() -> None:
    flow, _ = controller()
    for _ in range(10):
        flow.on_packet_sent(0.0, SIZE)
    at = flow.next_timeout()
    assert not flow.on_timeout(at - 0.001).probe
    assert not flow.can_send(at)
    assert flow.on_timeout(at).probe
    assert flow.can_send(at)
    assert flow.next_send_time(at) == at
    flow.on_packet_sent(at, SIZE)
    assert not flow.can_send(at)
    assert flow.snapshot().level == "none"
    assert flow.on_timeout(flow.next_timeout()).probe
    assert flow.snapshot().level == "severe"
    assert flow.snapshot().timeouts == 2


def test_a_blackhole_that_comes_back() -> None:
    flow, _ = controller()
    flow.on_packet_sent(0.0, SIZE)
    flow.on_ack_received(0.05, [(0, 0)])
    numbers = [flow.on_packet_sent(0.05 + at / 1000, SIZE) for at in range(10)]
    now = 0.1
    while now < 30.0:
        now = max(now, flow.next_timeout())
        if flow.on_timeout(now).probe:
            numbers.append(flow.on_packet_sent(now, SIZE))
    assert len(numbers) < 20  # they double
    outcome = flow.on_ack_received(now + 0.05, [(numbers[-1], numbers[-1])])
    assert sorted(outcome.lost) == numbers[:-1]
    assert flow.in_flight == 0
    assert flow.snapshot().persistent == 1


# --- what is said about it


def test_app_limited_is_only_what_left_room() -> None:
    flow, made = controller()
    for _ in range(10):
        flow.on_packet_sent(0.0, SIZE, app_limited=True)
    told = [numbers["app_limited"] for what, _, numbers in made.calls if what == "sent"]
    assert told == [True] * 9 + [False]


def test_overflow_is_told_and_signalled() -> None:
    flow, made = controller()
    flow.on_packet_sent(0.0, SIZE)
    flow.on_local_overflow(0.1, 3)
    assert made.take() == ["ecn"]
    assert flow.level is Level.MILD
    assert flow.snapshot().overflow_packets == 3


def test_rounds_feed_the_signals() -> None:
    flow, _ = controller()
    now, number = 0.0, 0
    for _ in range(10):
        for _ in range(10):
            flow.on_packet_sent(now, SIZE)
        now += 0.05
        flow.on_ack_received(now, [(number + 1, number + 9)], 0.0, ce_count=number // 10 + 1)
        number += 10
    assert flow.loss_rate == pytest.approx(0.1, abs=0.02)
    assert flow.ecn_share == pytest.approx(0.1, abs=0.02)
    assert flow.ecn_marked == 10
    assert (flow.min_rtt, flow.smoothed_rtt) == pytest.approx((0.05, 0.05))
    for _ in range(40):  # and then nothing is lost
        flow.on_packet_sent(now, SIZE)
        now += 0.05
        flow.on_ack_received(now, [(number, number)], 0.0, ce_count=10)
        number += 1
    assert flow.loss_rate < 0.01
    assert flow.ecn_share < 0.01


def test_a_snapshot_is_json() -> None:
    flow, _ = controller()
    for _ in range(6):
        flow.on_packet_sent(0.0, SIZE)
    flow.on_ack_received(0.04, [(4, 4)])
    told = json.loads(msgspec.json.encode(flow.snapshot()))
    assert told["packets_in_flight"] == 3
    assert (told["sent_packets"], told["sent_bytes"]) == (6, 6 * SIZE)
    assert (told["acknowledged_packets"], told["lost_packets"]) == (1, 2)
    assert (told["level"], told["congestion"], told["max_rate"]) == ("none", "recorder", None)
    assert "3600 of 12000 bytes on their way" in repr(flow)


# --- what is not allowed


@pytest.mark.parametrize("now", [math.nan, math.inf, -math.inf, LATEST, -LATEST])
def test_what_is_no_time_is_refused(now: float) -> None:
    flow, _ = controller()
    calls = (
        flow.can_send,
        flow.next_send_time,
        flow.get_current_rate,
        flow.on_timeout,
        partial(flow.on_packet_sent, size=SIZE),
        partial(flow.on_ack_received, ranges=[]),
        partial(flow.on_packet_lost, sequence=0),
        partial(flow.on_local_overflow, packets=1),
        partial(flow.set_max_rate, bytes_per_second=None),
        partial(FlowController, congestion=Window),
    )
    for call in calls:
        with pytest.raises(UsageError, match="now is seconds"):
            call(now)
    assert flow.in_flight == 0


def test_an_earlier_time_is_taken_as_the_latest() -> None:
    flow, _ = controller()
    flow.on_packet_sent(5.0, SIZE)
    assert flow.next_send_time(1.0) == 5.0
    assert flow.can_send(1.0)
    flow.on_packet_sent(1.0, SIZE)
    assert flow.next_timeout() > 5.0
    flow.on_ack_received(4.0, [(0, 1)])
    assert 0 < flow.min_rtt < 1e-5


@pytest.mark.parametrize(
    "wrong",
    [{"mtu": 100}, {"mtu": 1200.0}, {"mtu": 1 << 16}, {"max_rate": 0}, {"max_rate": math.nan},
     {"max_rate": "1"}, {"max_rate": 1e13}, {"max_ack_delay": -1}, {"max_in_flight": 1},
     {"max_in_flight": 1 << 30},
     {"congestion": "tahoe"}],
)  # fmt: skip
def test_settings_are_checked(wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        FlowController(0.0, **wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [0, -1, 1 << 16, math.nan])
def test_sizes_are_checked(size: int) -> None:
    flow, _ = controller()
    with pytest.raises(UsageError, match="1 to 65527 bytes"):
        flow.on_packet_sent(0.0, size)
    with pytest.raises(UsageError, match="packets is a whole number"):
        flow.on_local_overflow(0.0, 0)


# --- any sequence of events

CONTROLLER: st.SearchStrategy[CongestionFactory | str] = st.sampled_from([Window, *sorted(CONTROLLERS)])
RANGES = st.lists(st.tuples(st.integers(-3, 80), st.integers(-3, 12)), max_size=6)
#: Whatever stands in a packet's number of 62 bits or less.
HOSTILE = st.lists(st.tuples(st.integers(-(1 << 63), 1 << 63), st.integers(-(1 << 63), 1 << 63)), max_size=4)
DELAY = st.floats() | st.integers(0, 1 << 62)


class Flow(RuleBasedStateMachine):
    """Every packet is on its way, then acknowledged or lost once, and maybe late; numbers stay numbers."""

    @initialize(
        factory=CONTROLLER,
        adaptive=st.booleans(),
        rate=st.none() | st.floats(1, 1e9),
        limit=st.integers(2, 64),
    )
    def begin(self, factory: CongestionFactory | str, adaptive: bool, rate: float | None, limit: int) -> None:
        self.flow = FlowController(
            0.0, congestion=factory, adaptive=adaptive, max_rate=rate, max_in_flight=limit
        )
        self.now = 0.0
        self.limit = limit
        self.sent: dict[int, int] = {}
        self.lost: dict[int, int] = {}
        self.acknowledged = 0
        self.total = 0
        self.spurious = 0
        self.ever_lost = 0

    def judge(self, outcome: Outcome, named: set[int] | None = None) -> None:
        note(f"{outcome}")
        for number in outcome.acknowledged:
            del self.sent[number]
            self.acknowledged += 1
        for number in outcome.spurious:
            del self.lost[number]
            self.spurious += 1
        if named is not None:
            assert {*outcome.acknowledged, *outcome.spurious} <= named
        for number in outcome.lost:
            self.lost[number] = self.sent.pop(number)
            self.ever_lost += 1

    @rule(step=st.sampled_from([0.0, 0.0, 1e-6, 0.001, 0.03, 0.5, 100.0, -1.0]))
    def time(self, step: float) -> None:
        self.now += step  # backwards as well

    @rule(
        size=st.sampled_from([1, 100, SIZE, SIZE, SIZE, 9000]), app_limited=st.booleans(), heeds=st.booleans()
    )
    def send(self, size: int, app_limited: bool, heeds: bool) -> None:
        at = self.flow.next_send_time(self.now, size)
        may = self.flow.can_send(self.now, size)
        assert at >= self.now
        assert may == (at <= max(self.now, self.flow._now))
        if heeds and not may:
            return
        sent = self.flow._sent
        if sent.next - sent.base >= max(16, 1 << (self.limit - 1).bit_length()):
            assert not may or self.flow._probes
            with pytest.raises(UsageError, match="packets are on their way"):
                self.flow.on_packet_sent(self.now, size)
            return
        number = self.flow.on_packet_sent(self.now, size, app_limited=app_limited)
        assert number == self.total
        self.total += 1
        self.sent[number] = size

    @rule(ranges=RANGES, delay=DELAY, ce=st.none() | st.integers(-1, 90))
    def acknowledge(self, ranges: list[tuple[int, int]], delay: float, ce: int | None) -> None:
        pairs = [(self.total - 1 - back - length, self.total - 1 - back) for back, length in ranges]
        named = {number for first, last in pairs for number in range(max(0, first), last + 1)}
        impossible = self.flow._recovery.impossible
        self.judge(self.flow.on_ack_received(self.now, pairs, delay, ce), named)
        if pairs and pairs[0][0] <= pairs[0][1] and pairs[0][1] < self.total:
            assert self.flow._recovery.impossible == impossible
            for number in range(max(0, pairs[0][0]), pairs[0][1] + 1):
                assert number not in self.sent

    @rule(ranges=HOSTILE, delay=DELAY, ce=st.none() | st.integers())
    def invent(self, ranges: list[tuple[int, int]], delay: float, ce: int | None) -> None:
        self.judge(self.flow.on_ack_received(self.now, ranges, delay, ce))

    @rule(number=st.integers(-2, 80))
    def lose(self, number: int) -> None:
        outcome = self.flow.on_packet_lost(self.now, self.total - number)
        assert list(outcome.lost) == [self.total - number] * (self.total - number in self.sent)
        self.judge(outcome)

    @rule(early=st.booleans())
    def timeout(self, early: bool) -> None:
        at = self.flow.next_timeout()
        assert (at == math.inf) == (not self.sent)
        if self.sent and not early:
            self.now = max(self.now, at)
        outcome = self.flow.on_timeout(self.now)
        self.judge(outcome)
        if outcome.probe:
            assert self.flow.can_send(self.now)

    @rule(packets=st.integers(1, 1000))
    def overflow(self, packets: int) -> None:
        self.flow.on_local_overflow(self.now, packets)

    @rule(rate=st.none() | st.floats(1, 1e12), adaptive=st.booleans())
    def reconfigure(self, rate: float | None, adaptive: bool) -> None:
        self.flow.set_max_rate(self.now, rate)
        self.flow.enable_adaptive_rate(adaptive)

    @invariant()
    def counts_add_up(self) -> None:
        snapshot = self.flow.snapshot()
        assert self.flow.in_flight == sum(self.sent.values())
        assert snapshot.packets_in_flight == len(self.sent)
        assert snapshot.sent_packets == self.total
        assert snapshot.acknowledged_packets == self.acknowledged
        assert snapshot.lost_packets == self.ever_lost
        assert snapshot.spurious_packets == self.spurious
        assert self.total == len(self.sent) + self.acknowledged + self.ever_lost
        assert snapshot.ce_packets <= self.acknowledged + self.spurious

    @invariant()
    def numbers_are_in_range(self) -> None:
        snapshot = self.flow.snapshot()
        for name, value in msgspec.structs.asdict(snapshot).items():
            if isinstance(value, (int, float)):
                assert math.isfinite(value), name
                assert value >= 0, name
        assert snapshot.window >= minimum_window(SIZE)
        assert LEAST_RATE <= self.flow._rate <= MOST_RATE
        assert snapshot.max_rate is None or snapshot.rate <= snapshot.max_rate
        assert 0 <= snapshot.loss_rate <= 1
        assert 0 <= snapshot.ecn_share <= 1
        recovery = self.flow._recovery
        assert 3 <= recovery.packet_threshold <= 256
        assert 9 / 8 <= recovery.time_threshold <= 2
        assert len(recovery._lost) <= 1024
        assert len(self.flow._sent.slots) <= 2 * max(self.limit, 16)


Flow.TestCase.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
TestFlow = Flow.TestCase
