# SPDX-License-Identifier: Apache-2.0
"""BBR: values and transitions of the draft, invariants under any input, and what it does to a link."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.flow_anything import EVENTS, Events, throw
from tests.unit.flow_bottleneck import MTU, Bottleneck, CoDel, Flow, change_rate, jain
from userspace.flow.bbr import Bbr
from userspace.flow.bbr_model import PathModel, State
from userspace.flow.bbr_samples import Mark, SendMarks
from userspace.flow.congestion import Ack, Loss
from userspace.flow.limits import WINDOW_MAXIMUM
from xdp.errors import UsageError

RATE = 100e6 / 8  # bytes/s
RTT = 0.04
BDP = RATE * RTT  # 417 packets


class Path:
    """Acknowledges a round trip at a time, all in one, at a rate that the test says."""

    def __init__(self, seed: int = 1) -> None:
        self.bbr: Bbr = Bbr(0.0, MTU, seed)
        self.now, self.delivered = 0.0, 0

    def send(self, packets: int = 10, *, app_limited: bool = False, idle: bool = False) -> float:
        before = 0 if idle or not app_limited else 1  # on their way
        for number in range(packets):
            self.bbr.on_sent(self.now, MTU, (before + number + 1) * MTU, app_limited=app_limited)
        return self.now

    def round(
        self, rate: float, *, packets: int = 10, rtt: float | None = RTT, app_limited: bool = False,
        lost: int = 0, in_flight: int = 0, marked: int = 0, parts: int = 1, idle: bool = False,
    ) -> None:  # fmt: skip
        sent_at, before = self.send(packets, app_limited=app_limited, idle=idle), self.delivered
        self.now += RTT if rtt is None else rtt
        for _ in range(parts if lost else 0):
            self.lose(lost // parts, sent_at, packets)
        if marked:
            self.bbr.on_ecn(self.now, marked, sent_at)
        self.delivered += (packets - lost) * MTU
        ack = Ack()
        ack.bytes, ack.packets, ack.largest_sent_at = (packets - lost) * MTU, packets - lost, sent_at
        ack.rtt, ack.smoothed_rtt, ack.min_rtt = rtt, RTT, RTT
        ack.prior_in_flight, ack.in_flight = packets * MTU, in_flight
        ack.delivered, ack.prior_delivered = self.delivered, before
        ack.delivery_rate, ack.app_limited = rate, app_limited
        self.bbr.on_ack(self.now, ack)

    def lose(self, packets: int, sent_at: float, flight: int = 10) -> None:
        loss = Loss()
        loss.packets, loss.bytes, loss.largest_sent_at = packets, packets * MTU, sent_at
        loss.prior_in_flight, loss.in_flight = flight * MTU, (flight - packets) * MTU
        self.bbr.on_loss(self.now, loss)

    def state(self) -> State:
        return self.bbr.state

    def until(self, state: State, rate: float = 1e6, **more: float) -> Path:
        for _ in range(200):
            if self.state() is state:
                return self
            self.round(rate, packets=40, **more)  # type: ignore[arg-type]
        raise AssertionError(f"{state} does not come, but {self.state()}")


# --- values of the draft


def test_the_first_rate_is_the_initial_window_by_the_first_round_trip() -> None:
    path = Path()
    assert repr(path.bbr) == "<Bbr startup window=12000 max_bw=0>"
    assert path.bbr.pacing_rate == pytest.approx(2.77 * 12_000 / 0.001)
    path.round(1.0)
    assert path.bbr.pacing_rate == pytest.approx(2.77 * 12_000 / RTT)


def test_without_round_trip_times_the_initial_window_serves() -> None:
    path = Path()
    for _ in range(4):
        path.round(1e6, rtt=None, in_flight=12_001)
    assert path.state() is State.DRAIN
    path.round(1e6, rtt=None, in_flight=12_000)
    assert path.state() is State.CRUISE
    assert path.bbr.window >= 12_000


def test_startup_doubles_and_ends_after_three_rounds_without_a_quarter_more() -> None:
    path, rates = Path(), [1e5, 2e5, 4e5, 8e5, 9e5, 9.5e5]
    for rate in rates:
        path.round(rate)
        assert path.state() is State.STARTUP
        assert path.bbr.model.max_bw == rate
    assert path.bbr.pacing_rate == pytest.approx(2.77 * 9.5e5 * 0.99)
    path.round(9e5, in_flight=200 * MTU)
    assert path.state() is State.DRAIN
    assert path.bbr.pacing_rate == pytest.approx(0.5 * 9.5e5 * 0.99)


def test_startup_stays_while_the_application_limits() -> None:
    path = Path()
    path.round(1e6)
    for _ in range(20):
        path.round(1e5, app_limited=True)
    assert path.state() is State.STARTUP
    assert path.bbr.model.max_bw == 1e6


@pytest.mark.parametrize(("lost", "parts", "leaves"), [(6, 6, True), (5, 5, False), (6, 1, False)])
def test_startup_ends_by_losses_of_six_gaps_in_a_round_trip(lost: int, parts: int, *, leaves: bool) -> None:
    path = Path()
    path.round(1e6, packets=40)
    path.round(1.3e6, packets=40, lost=lost, parts=parts, in_flight=200 * MTU, app_limited=True)
    assert path.bbr.model.full_bw_reached is leaves
    assert path.state() is (State.DRAIN if leaves else State.STARTUP)
    if leaves:
        assert path.bbr.ssthresh == 40 * MTU  # delivered in a round trip, more than the BDP of before


@pytest.mark.parametrize("rounds", [1, 4])
def test_drain_ends_with_the_queue_or_after_three_rounds(rounds: int) -> None:
    path = Path().until(State.DRAIN, in_flight=1000 * MTU)
    for number in range(rounds):
        assert path.state() is State.DRAIN, number
        path.round(1e6, in_flight=int(1e6 * RTT) if rounds == 1 else 1000 * MTU)
    assert path.state() in {State.DOWN, State.CRUISE}


@pytest.mark.parametrize(
    ("state", "gain", "window"),
    [(State.CRUISE, 1.0, 1.5), (State.REFILL, 1.0, 2.0), (State.UP, 1.25, 2.25), (State.PROBE_RTT, 1.0, 0.5)],
)
def test_gains_of_the_states(state: State, gain: float, window: float) -> None:
    path = Path().until(state)
    path.bbr.window = WINDOW_MAXIMUM
    path.bbr._set_window(0)
    assert path.bbr.pacing_rate == pytest.approx(gain * 1e6 * 0.99)
    extra = path.bbr.model.extra_acked if state is not State.PROBE_RTT else 0
    up = 2 * MTU if state is State.UP else 0
    assert path.bbr.window == int(window * 1e6 * RTT + extra + up)


def test_down_lasts_until_the_queue_is_gone() -> None:
    path = Path().until(State.UP)
    path.until(State.DOWN, in_flight=60 * MTU)
    assert path.bbr.pacing_rate == pytest.approx(0.9 * 1e6 * 0.99)
    path.round(1e6, in_flight=34 * MTU)
    assert path.state() is State.DOWN
    path.round(1e6, in_flight=33 * MTU)
    assert path.state() is State.CRUISE


def test_down_ends_with_the_time_to_probe_even_if_the_queue_stays() -> None:
    path = Path().until(State.UP).until(State.DOWN, in_flight=60 * MTU)
    began = path.now
    path.until(State.REFILL, in_flight=60 * MTU)
    assert path.now - began <= 3.0 + RTT


def test_probes_come_as_often_as_reno_would_lose_and_not_in_step() -> None:
    waits = set()
    for seed in range(8):
        path = Path(seed).until(State.UP).until(State.DOWN).until(State.CRUISE)
        began = path.bbr.model.round_count
        path.until(State.REFILL)
        waits.add(path.bbr.model.round_count - began)
    assert len(waits) > 1, waits
    assert max(waits) <= math.ceil(1e6 * RTT / MTU)


def test_a_probe_ends_after_three_rounds_without_more() -> None:
    path = Path().until(State.UP)
    for _ in range(3):
        assert path.state() is State.UP
        path.round(1e6, packets=40)
    assert path.state() is State.DOWN


def test_a_probe_that_lost_too_much_ends_and_bounds_what_is_in_flight() -> None:
    path = Path().until(State.UP)
    path.send(50)
    path.lose(1, path.now, 50)  # 2 %, but one packet
    assert path.state() is State.UP
    path.lose(1, path.now, 50)
    assert path.state() is State.DOWN
    assert path.bbr.model.inflight_longterm == 50 * MTU
    path.round(1e6, packets=50)
    assert path.bbr.ssthresh == 50 * MTU
    assert path.bbr.window <= 0.85 * 50 * MTU


def test_the_next_probe_stops_at_the_bound_and_is_repeated_if_that_was_safe() -> None:
    path = Path().until(State.UP)
    path.send(50)
    path.lose(5, path.now, 50)
    path.until(State.UP)
    path.round(1e6, packets=50, in_flight=60 * MTU)
    assert path.state() is State.DOWN
    path.round(1e6, packets=40, in_flight=60 * MTU)
    assert path.state() is State.REFILL


def test_a_probe_that_fills_its_bound_raises_it_by_1_2_4_packets() -> None:
    path = Path().until(State.UP)
    path.send(50)
    path.lose(5, path.now, 50)
    path.until(State.UP)
    path.round(1e6, packets=50, in_flight=60 * MTU)
    path.until(State.REFILL).until(State.UP)
    bounds = [path.bbr.model.inflight_longterm]
    for _ in range(3):
        path.round(1e6, packets=math.ceil(path.bbr.window / MTU))
        bounds.append(path.bbr.model.inflight_longterm)
    assert [(after - before) / MTU for before, after in itertools.pairwise(bounds)] == [1, 2, 4]


def test_losses_between_probes_lower_the_model_for_a_while() -> None:
    path = Path().until(State.CRUISE)
    for _ in range(2):
        path.round(5e5, packets=40, lost=4)
    model = path.bbr.model
    assert model.bw_shortterm == pytest.approx(0.7e6)
    assert model.inflight_shortterm >= 36 * MTU
    assert path.bbr.pacing_rate == pytest.approx(0.7e6)
    path.until(State.REFILL, rate=7e5)
    assert model.bw_shortterm == model.inflight_shortterm == math.inf
    assert path.bbr.pacing_rate == pytest.approx(1e6 * 0.99)


def test_marks_count_as_losses() -> None:
    path = Path().until(State.CRUISE)
    for _ in range(2):
        path.round(5e5, packets=40, marked=4)
    assert path.bbr.model.bw_shortterm == pytest.approx(0.7e6)
    path = Path().until(State.UP)
    path.bbr.on_ecn(path.now, 0, path.now)
    assert path.state() is State.UP
    path.bbr.on_ecn(path.now, 3, path.now)
    assert path.state() is State.DOWN


def test_bandwidth_is_believed_for_two_cycles() -> None:
    path = Path().until(State.UP).until(State.DOWN)
    path.until(State.REFILL, rate=5e5).until(State.DOWN, rate=5e5)
    assert path.bbr.model.max_bw == 1e6
    path.round(5e5, packets=40)
    assert path.bbr.model.max_bw == 5e5


def test_the_round_trip_is_measured_with_an_empty_queue_every_five_seconds() -> None:
    path = Path().until(State.CRUISE)
    low = path.bbr.model.probe_rtt_min_stamp
    path.until(State.PROBE_RTT)
    began = path.now
    assert began - low == pytest.approx(5.0, abs=2 * RTT)
    window = int(0.5 * 1e6 * RTT)
    assert path.bbr.window == window
    before = path.bbr.model.max_bw
    path.until(State.CRUISE, rate=5e5)
    assert 0.2 <= path.now - began <= 0.2 + 3 * RTT
    assert path.state() is State.CRUISE
    assert path.bbr.model.max_bw == before


def test_a_startup_that_takes_long_comes_back_from_probe_rtt() -> None:
    path = Path()
    path.round(1e6, packets=40)
    path.until(State.PROBE_RTT, rate=1e5, app_limited=True)
    path.until(State.STARTUP, rate=1e5, app_limited=True)
    assert not path.bbr.model.full_bw_reached


def test_idleness_is_as_good_as_probe_rtt() -> None:
    path = Path().until(State.CRUISE)
    path.now += 6.0
    path.round(1e5, packets=1, app_limited=True, idle=True)
    assert path.state() is not State.PROBE_RTT
    assert path.bbr.model.max_bw == 1e6
    path.until(State.PROBE_RTT)
    path.round(5e5, packets=5)
    path.now += 6.0
    path.send(1, app_limited=True, idle=True)
    assert path.state() is State.CRUISE


def test_after_ten_seconds_a_longer_round_trip_is_believed() -> None:
    path = Path().until(State.CRUISE)
    assert path.bbr.model.min_rtt == pytest.approx(RTT)
    began = path.now
    while path.now - began < 11:
        path.round(1e6, packets=40, rtt=0.1)
    assert path.bbr.model.min_rtt == pytest.approx(0.1)


# --- undo, persistent congestion, arguments


def test_what_was_not_lost_is_undone() -> None:
    path = Path().until(State.UP)
    path.send(50)
    path.bbr.on_spurious(path.now)
    path.lose(5, path.now, 50)
    assert path.state() is State.DOWN
    path.bbr.on_spurious(path.now)
    assert path.state() is State.REFILL
    assert path.bbr.model.inflight_longterm == math.inf
    path.until(State.CRUISE)
    window = path.bbr.window
    for _ in range(2):
        path.round(5e5, packets=40, lost=4)
    assert path.bbr.model.bw < 1e6
    path.bbr.on_spurious(path.now)
    assert path.bbr.model.bw_shortterm == 1e6  # as before this round trip
    assert path.bbr.window >= window


def test_a_startup_that_ended_by_losses_that_were_none_goes_on() -> None:
    path = Path()
    path.round(1e6, packets=40)
    path.round(1.3e6, packets=40, lost=6, parts=6, in_flight=200 * MTU)
    assert path.state() is State.DRAIN
    path.bbr.on_spurious(path.now)
    assert path.state() is State.STARTUP
    assert not path.bbr.model.full_bw_reached


def test_persistent_congestion_begins_anew() -> None:
    path = Path().until(State.CRUISE)
    path.bbr.on_persistent(path.now)
    assert (path.bbr.window, path.state(), path.bbr.ssthresh) == (2 * MTU, State.STARTUP, None)
    assert path.bbr.model.max_bw == 0.0
    path.round(1e5, packets=2)
    assert path.bbr.window == 4 * MTU
    path.bbr.on_spurious(path.now)
    assert path.bbr.window == 4 * MTU


def test_a_new_mtu_raises_the_least_window() -> None:
    path = Path()
    path.bbr.on_persistent(0.0)
    path.bbr.on_mtu(9000)
    assert path.bbr.window == 18_000
    with pytest.raises(UsageError, match="mtu"):
        path.bbr.on_mtu(0)


@pytest.mark.parametrize(("now", "mtu"), [(math.nan, MTU), (0.0, 0), (0.0, 1e3)])
def test_what_cannot_be_is_refused(now: float, mtu: int) -> None:
    with pytest.raises(UsageError):
        Bbr(now, mtu, 1)


def test_a_cycle_without_samples_makes_nothing_older() -> None:
    model = PathModel(0.0)
    model.next_cycle()
    assert model.max_bw == 0.0


def test_marks_of_what_was_in_flight() -> None:
    marks = SendMarks(0.0)
    for step in range(1, 2_000):
        now = step / 1000
        if marks.due(now):
            marks.note(now, Mark(step, 0, app_limited=False), 0.064)
    assert len(marks._times) <= 256
    assert marks.at(1.9).in_flight == pytest.approx(1900, abs=2)
    assert marks.at(-1).in_flight == marks._marks[0].in_flight > 0
    marks.note(1.999, Mark(7, 0, app_limited=True), 0.064)
    assert marks.at(math.inf).in_flight == 7
    assert marks.at(math.nan).in_flight > 0


# --- whatever comes


@settings(max_examples=100, deadline=None)
@given(EVENTS, st.integers(0, 3))
def test_no_input_breaks_the_invariants(events: Events, seed: int) -> None:
    throw(Bbr(0.0, MTU, seed), events)


def test_the_same_calls_give_the_same_answers() -> None:
    runs = []
    for _ in range(2):
        link = Bottleneck(RATE / 10, RTT, BDP / 10, loss=0.01, seed=5)
        flow = Flow(link, Bbr, 5)
        link.run(3.0)
        runs.append((flow.delivered, flow.control.window, flow.control.pacing_rate))
    assert runs[0] == runs[1]


# --- on a link


def run(
    seconds: float, *, flows: int = 1, since: float = 1.0, rate: float = RATE, limit: float | None = None,
    seed: int = 1, **more: float | bool | CoDel,
) -> tuple[Bottleneck, list[int], float]:  # fmt: skip
    """The link, what each flow delivered since then, and the share of the link that this is."""
    link = Bottleneck(rate, RTT, rate * RTT if limit is None else limit, seed=seed, **more)  # type: ignore[arg-type]
    senders = [Flow(link, Bbr, seed * 100 + number) for number in range(flows)]
    link.run(since)
    before = [flow.delivered for flow in senders]
    link.run(seconds)
    got = [flow.delivered - count for flow, count in zip(senders, before, strict=True)]
    return link, got, sum(got) / (rate * (seconds - since))


def test_one_flow_fills_a_link_with_a_queue_of_one_bdp() -> None:
    link, _, share = run(5.0)
    assert share >= 0.96, share
    assert link.queued(0.5, 1.0) < 0.002
    assert link.dropped < 100


def test_with_codel_the_queue_is_short() -> None:
    link, _, share = run(5.0, limit=math.inf, codel=CoDel())
    assert share >= 0.93, share
    assert sum(delay for _, delay in link.delays) / len(link.delays) < 0.008


def test_with_codel_that_marks_nothing_is_lost() -> None:
    link, _, share = run(6.0, limit=math.inf, codel=CoDel(), ecn=True, rate=RATE / 4)
    assert share >= 0.9, share
    assert link.dropped == 0
    assert sum(delay for _, delay in link.delays) / len(link.delays) < 0.01


@pytest.mark.parametrize("seed", [1, 2])
def test_one_percent_of_random_losses_leave_most(seed: int) -> None:
    _, _, share = run(8.0, loss=0.01, seed=seed)
    assert share >= 0.8, (seed, share)


def test_sixteen_flows_share() -> None:
    _, got, share = run(20.0, flows=16, rate=RATE / 2, jitter=0.001, seed=2)
    assert share >= 0.95, share
    assert jain(got) >= 0.94, (jain(got), got)


def test_a_rate_that_halves_and_doubles_is_followed() -> None:
    rate = RATE / 4
    link = Bottleneck(rate, RTT, rate * RTT, seed=3)
    flow = Flow(link, Bbr, 3)
    change_rate(link, 3.0, rate / 2)
    change_rate(link, 8.0, rate)
    shares = []
    for since, until, now in ((3.5, 8.0, rate / 2), (11.0, 13.0, rate)):
        link.run(since)
        before = flow.delivered
        link.run(until)
        shares.append((flow.delivered - before) / (until - since) / now)
    assert shares[0] >= 0.95, shares
    assert shares[1] >= 0.9, shares


def test_a_blackhole_that_ends_is_survived() -> None:
    rate = RATE / 4
    link = Bottleneck(rate, RTT, rate * RTT, seed=4)
    flow = Flow(link, Bbr, 4)
    change_rate(link, 2.0, 0.0)
    change_rate(link, 5.0, rate)
    link.run(8.0)
    assert flow.persistent == 1
    before = flow.delivered
    link.run(10.0)
    assert (flow.delivered - before) / (2.0 * rate) >= 0.9


def test_a_path_of_less_than_a_packet_is_not_flooded() -> None:
    link = Bottleneck(8_000, 0.01, 20 * MTU, seed=1)  # 64 kb/s: 0.15 s a packet
    flow = Flow(link, Bbr, 1)
    link.run(30.0)
    assert flow.delivered >= 0.9 * 8_000 * 29
    assert flow.control.window <= 10 * MTU
    assert link.dropped < 10


def test_an_application_that_wants_little_keeps_the_model() -> None:
    link = Bottleneck(RATE, RTT, BDP, seed=6)
    flow = Flow(link, Bbr, 6)
    link.run(2.0)
    flow.app_rate, flow.next_app = RATE / 20, 2.0
    link.run(8.0)
    control = flow.control
    assert isinstance(control, Bbr)
    assert control.model.max_bw >= 0.9 * RATE
    flow.app_rate = None
    before = flow.delivered
    link.run(9.0)
    assert (flow.delivered - before) / RATE >= 0.9
