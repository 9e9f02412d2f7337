# SPDX-License-Identifier: Apache-2.0
"""CUBIC beside the formulas and tables of RFC 9438, and its bounds after any events."""

from __future__ import annotations

import math

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from userspace.flow import cubic
from userspace.flow.congestion import Ack, Loss
from userspace.flow.cubic import ALPHA, Cubic
from userspace.flow.limits import WINDOW_MAXIMUM
from userspace.flow.newreno import NewReno

MTU = 1200
RTT = 0.1  # seconds


def acked(
    controller: NewReno,
    now: float,
    size: int | None = None,
    *,
    sent: float | None = None,
    rtt: float = RTT,
    in_flight: int | None = None,
) -> None:
    """So many bytes are acknowledged at once, a whole window if nothing is said, and of a full window."""
    ack = Ack()
    ack.bytes = controller.window if size is None else size
    ack.packets = -(-ack.bytes // MTU)
    ack.largest_sent_at = now - rtt if sent is None else sent
    ack.prior_in_flight = controller.window if in_flight is None else in_flight
    ack.smoothed_rtt = ack.min_rtt = ack.rtt = rtt
    controller.on_ack(now, ack)


def lost(controller: NewReno, now: float, *, sent: float | None = None) -> None:
    loss = Loss()
    loss.packets, loss.bytes = 1, MTU
    loss.largest_sent_at = now - RTT if sent is None else sent
    controller.on_loss(now, loss)


def reduced(packets: int = 1000, at: float = 10.0) -> Cubic:
    """A window of that many packets at which a loss was; avoidance begins at that time + 1."""
    controller = Cubic(0.0)
    controller.window = packets * MTU
    lost(controller, at)
    acked(controller, at + 1.0, 1)  # one byte: begins the epoch, and nothing else
    return controller


def w_cubic(t: float, w_max: float, k: float) -> float:
    """Packets (RFC 9438, figure 1)."""
    return 0.4 * (t - k) ** 3 + w_max


# --- the cubic function


@pytest.mark.parametrize("packets", [300, 1000, 20_000])
@pytest.mark.parametrize("part", [0.3, 0.5, 0.9, 1.0, 1.1, 1.4])
def test_a_window_acknowledged_at_t_becomes_the_cubic_function_at_t_and_a_round_trip(
    packets: int, part: float
) -> None:
    controller = reduced(packets)
    k = math.cbrt(packets * 0.3 / 0.4)
    assert controller._k == pytest.approx(k, rel=1e-5)
    assert controller.window == pytest.approx(packets * MTU * 0.7, abs=1)
    t = part * k
    acked(controller, 11.0 + t)
    assert controller.window == pytest.approx(w_cubic(t + RTT, packets, k) * MTU, abs=2)


def test_known_numbers() -> None:
    # 1000 packets: K = cbrt(1000 * 0.3 / 0.4) = 9.0856 s; at K the window is W_max again; at twice K
    # it is as far above as it was below.
    controller = reduced(1000)
    assert controller._k == pytest.approx(9.0856, abs=1e-4)
    acked(controller, 11.0 + 9.0856 - RTT)
    assert controller.window == pytest.approx(1000 * MTU, abs=1)
    acked(controller, 11.0 + 2 * 9.0856 - RTT)
    assert controller.window == pytest.approx(1300 * MTU, abs=MTU / 10)


def test_part_of_a_window_goes_that_part_of_the_way() -> None:
    controller = reduced(1000)
    k = math.cbrt(750)
    acked(controller, 16.0, 70 * MTU)
    assert controller.window == pytest.approx((700 + (w_cubic(5 + RTT, 1000, k) - 700) / 10) * MTU, abs=1)


def test_fractions_of_a_byte_add_up() -> None:
    controller = reduced(20_000)
    target = w_cubic(20.0 + RTT, 20_000, math.cbrt(15_000)) * MTU
    for _ in range(4000):
        acked(controller, 31.0, 100)  # some bytes each: less than 1 where the target is near
    share = 1 - math.exp(-4000 * 100 / (14_000 * MTU))
    assert controller.window == pytest.approx(14_000 * MTU + (target - 14_000 * MTU) * share, rel=1e-4)


def test_the_window_grows_at_most_by_half_a_round() -> None:
    controller = reduced(1000)
    acked(controller, 500.0)
    assert controller.window == 700 * MTU * 3 // 2
    acked(controller, 500.0, 525 * MTU)
    assert controller.window == 1050 * MTU * 5 // 4
    acked(controller, 500.0, 10**9)  # more than a window counts as one
    assert controller.window == int(1312.5 * MTU * 1.5)


def test_fast_convergence() -> None:
    controller = reduced(1000)
    lost(controller, 20.0)  # at 700, below the 1000 before
    assert controller.window == 490 * MTU
    assert controller._w_max == pytest.approx(700 * 0.85 * MTU)
    acked(controller, 21.0, 1)
    assert controller._k == pytest.approx(math.cbrt((595 - 490) / 0.4))
    for number in range(200):
        acked(controller, 21.0 + number * RTT)
    window = controller.window
    assert window > 595 * MTU
    lost(controller, 50.0)
    assert controller._w_max == window


def test_a_loss_at_w_max_is_no_reason_for_fast_convergence() -> None:
    controller = reduced(1000)
    controller.window = 1000 * MTU
    lost(controller, 20.0)
    assert controller._w_max == 1000 * MTU


# --- the Reno-friendly region


def test_w_est_grows_by_alpha_a_window_until_the_old_window_then_by_one_packet() -> None:
    assert pytest.approx(9 / 17) == ALPHA
    controller = reduced(20)
    expected = 14.0
    for _ in range(40):
        # Time stands still, so W_cubic is the window that avoidance began with, and W_est the larger one.
        expected += (ALPHA if expected < 20 else 1.0) * (controller.window / MTU) / (controller.window / MTU)
        acked(controller, 11.0)
        assert controller.window == pytest.approx(expected * MTU, abs=2)
    assert controller.window / MTU == pytest.approx(14 + 12 * ALPHA + 28, abs=0.01)


def test_after_fast_convergence_alpha_holds_until_the_old_window_not_w_max() -> None:
    controller = reduced(20)
    lost(controller, 12.0)  # at 14 packets: W_max is 11.9, and 9.8 remain
    acked(controller, 13.0, 1)
    expected = 9.8
    for _ in range(14):
        expected += ALPHA if expected < 14 else 1.0
        acked(controller, 13.0)
        assert controller.window == pytest.approx(expected * MTU, abs=3)
    assert expected > 19


def test_the_window_follows_w_est_upwards_only() -> None:
    controller = reduced(100)
    controller.window = 90 * MTU
    acked(controller, 11.0, 10 * MTU)
    assert controller.window == 90 * MTU


def losses(controller: Cubic, rtt: float, probability: float, cycles: int) -> list[float]:
    """One at once and after every 1/probability packets; the average windows between, packets.

    As the RFC computes: without the round after a reduction in which nothing grows.
    """
    now = 0.0
    averages = []
    lost(controller, now, sent=math.inf)
    for _ in range(cycles):
        began, packets = now, 0.0
        while packets < 1 / probability:
            size = max(MTU, controller.window // 8)
            packets += size / MTU
            now += rtt * size / controller.window
            acked(controller, now, size, sent=math.inf, rtt=rtt)
        averages.append(packets * rtt / (now - began))
        lost(controller, now, sent=math.inf)
    return averages


@pytest.mark.parametrize(
    ("rtt", "probability", "in_table"), [(0.1, 1e-4, 187), (0.1, 1e-5, 1054), (0.1, 1e-6, 5926)]
)
def test_the_average_window_is_that_of_the_rfc(
    rtt: float, probability: float, in_table: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # RFC 9438, figure 7 and tables 1 and 2, which are without fast convergence.
    monkeypatch.setattr(cubic, "FAST_CONVERGENCE", 1.0)
    average = 1.054 * (rtt / probability) ** 0.75
    assert average == pytest.approx(in_table, rel=0.003)
    controller = Cubic(0.0, hystart=False)
    # The saw tooth that the figure is of: it ends at W_max, and 0.925 of that is its average.
    controller.window = int(average / 0.925) * MTU
    assert losses(controller, rtt, probability, 5) == pytest.approx([average] * 5, rel=0.005)
    # From elsewhere it comes to that (slowly: at W_max the curve is flat).
    for factor in (0.5, 2.0):
        controller = Cubic(0.0, hystart=False)
        controller.window = int(average * factor) * MTU
        away = [abs(one / average - 1) for one in losses(controller, rtt, probability, 40)[1:]]
        assert away == sorted(away, reverse=True)
        assert away[-1] < 0.2


@pytest.mark.parametrize(("rtt", "probability", "margin"), [(0.1, 1e-3, 0.04), (0.01, 1e-4, 0.005)])
@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_in_the_reno_friendly_region_the_average_window_is_that_of_reno(
    rtt: float, probability: float, margin: float, factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of a saw tooth between half and all of the window; the tables have 38 and 120, with 1.2 for sqrt(1.5).
    # At 0.1 s and 1e-3 the cubic function is above it for a part of the time.
    monkeypatch.setattr(cubic, "FAST_CONVERGENCE", 1.0)
    reno = math.sqrt(1.5 / probability)
    controller = Cubic(0.0, hystart=False)
    controller.window = int(reno * factor) * MTU
    assert losses(controller, rtt, probability, 40)[-1] == pytest.approx(reno, rel=margin)


# --- time that does not count


def after(controller: Cubic, since: float) -> list[int]:
    windows = []
    for number in range(100):
        acked(controller, since + number * RTT)
        windows.append(controller.window)
    return windows


def test_idle_time_does_not_count() -> None:
    idle, busy = reduced(), reduced()
    for controller in (idle, busy):
        acked(controller, 13.0)
    idle.on_sent(1013.0, MTU, 2 * MTU, app_limited=False)  # something else is on its way: not idle
    assert idle._epoch == busy._epoch
    idle.on_sent(1013.0, MTU, MTU, app_limited=True)
    assert idle._epoch == pytest.approx(1011.0)
    assert after(idle, 1013.1) == pytest.approx(after(busy, 13.1), abs=1)


def test_time_in_which_the_window_was_not_full_does_not_count() -> None:
    slack, busy = reduced(), reduced()
    window = slack.window
    for number in range(100):
        acked(slack, 11.0 + number, MTU, in_flight=MTU)
    assert slack.window == window
    assert after(slack, 110.1) == pytest.approx(after(busy, 11.1), abs=1)


def test_time_that_stands_still_or_goes_backwards_moves_nothing() -> None:
    controller = reduced()
    epoch = controller._epoch
    for now in (11.0, 10.0, -5.0):
        controller.on_sent(now, MTU, MTU, app_limited=False)
        acked(controller, now, MTU, in_flight=MTU, sent=10.5)
        acked(controller, now, sent=10.5)
        assert controller._epoch == epoch
        assert math.isfinite(controller._fraction)
    assert 700 * MTU <= controller.window < 710 * MTU


# --- without a W_max


def test_after_hystart_the_curve_begins_at_the_window() -> None:
    controller = Cubic(0.0)
    controller.window = controller.ssthresh = 500 * MTU
    acked(controller, 5.0, 1)
    assert (controller._k, controller._w_max) == (0.0, 500 * MTU)
    acked(controller, 7.0)
    assert controller.window == pytest.approx(w_cubic(2 + RTT, 500, 0) * MTU, abs=1)


def test_after_persistent_congestion_the_curve_begins_where_slow_start_ends() -> None:
    controller = reduced(100)
    lost(controller, 20.0)
    controller.on_persistent(20.0)
    assert controller.window == 2 * MTU
    assert controller.ssthresh == pytest.approx(49 * MTU, abs=1)
    for number in range(50):
        acked(controller, 21.0 + number * RTT, MTU)
    # Slow start from 2 packets passes 49 with the 47th; avoidance begins there.
    assert controller.window >= 49 * MTU
    assert (controller._k, controller._w_max) == (0.0, 49 * MTU)
    controller.on_spurious(30.0)
    assert controller.window < 60 * MTU


# --- undoing


def test_a_spurious_loss_goes_on_where_the_curve_was() -> None:
    spurious, never = reduced(), reduced()
    for controller in (spurious, never):
        after(controller, 11.1)
    lost(spurious, 25.0)
    acked(spurious, 25.2)
    assert spurious.window < never.window
    spurious.on_spurious(25.3)
    # Nothing was lost, and the time of the recovery did not count.
    assert (spurious.window, spurious.ssthresh, spurious._w_max) == (
        never.window,
        never.ssthresh,
        never._w_max,
    )
    assert after(spurious, 25.4) == pytest.approx(after(never, 21.1), abs=1)


def test_time_before_a_reduction_was_undone_is_not_left_out_twice() -> None:
    controller = reduced()
    acked(controller, 13.0)  # t = 2 s
    lost(controller, 14.0)
    controller.on_spurious(20.0)
    assert controller._epoch == pytest.approx(18.0)
    acked(controller, 21.0, MTU, in_flight=MTU)
    assert controller._epoch == pytest.approx(19.0)


def test_a_spurious_loss_in_slow_start_goes_on_with_slow_start() -> None:
    controller = Cubic(0.0)
    lost(controller, 1.0)
    controller.on_spurious(1.1)
    assert (controller.window, controller.ssthresh, controller._epoch) == (12_000, None, None)
    acked(controller, 1.2)
    assert controller.window == 24_000


def test_another_mtu_begins_the_curve_again() -> None:
    controller = reduced(1000)
    acked(controller, 12.0)
    controller.on_mtu(1400)
    window = controller.window
    acked(controller, 13.0, 1)
    assert controller._k == pytest.approx(math.cbrt((1000 * MTU - window) / 1400 / 0.4))


# --- any events

ANY_TIME = st.floats(-1e300, 1e300)
ANY_RTT = st.floats(0.0, 1e300) | st.sampled_from([math.inf, math.nan])


@given(st.lists(st.tuples(ANY_TIME, ANY_RTT, st.integers(0, 10**12), st.integers(0, 10**12)), max_size=30))
@example([(1e300, 1e300, 10**12, 10**12), (-1e300, 0.0, 1, 10**12)])
def test_any_numbers_leave_a_finite_window_within_its_bounds(
    events: list[tuple[float, float, int, int]],
) -> None:
    controller = reduced(1000)
    for now, rtt, size, in_flight in events:
        acked(controller, now, size, sent=math.inf, rtt=rtt, in_flight=in_flight)
        assert 2 * MTU <= controller.window <= WINDOW_MAXIMUM
        assert 0.0 <= controller._fraction < 1.0


class Bounds(RuleBasedStateMachine):
    """Two that are told the same answer the same; no acknowledgement shrinks, no loss lets grow."""

    def __init__(self) -> None:
        super().__init__()
        self.controllers = (Cubic(0.0, MTU, 1), Cubic(0.0, MTU, 1))
        self.now = 1.0
        self.mtu = MTU
        self.delivered = 0

    @property
    def window(self) -> int:
        return self.controllers[0].window

    @rule(step=st.sampled_from([0.0, 1e-6, 0.01, 0.1, 5.0, 1e6]))
    def wait(self, step: float) -> None:
        self.now += step

    @rule(
        part=st.floats(0.01, 1.0),
        filled=st.sampled_from([0.2, 0.7, 1.0]),
        ago=st.sampled_from([0.001, 0.05, 0.3]),
        app_limited=st.booleans(),
        repeat=st.integers(1, 30),
    )
    def acknowledge(self, part: float, filled: float, ago: float, app_limited: bool, repeat: int) -> None:
        for _ in range(repeat):
            before = self.window
            ack = Ack()
            ack.prior_in_flight = max(1, int(before * filled))
            ack.bytes = max(1, int(ack.prior_in_flight * part))
            ack.packets = -(-ack.bytes // self.mtu)
            ack.prior_delivered, ack.delivered = self.delivered, self.delivered + ack.bytes
            self.delivered = ack.delivered
            ack.largest_sent_at = self.now - ago
            ack.rtt = ack.smoothed_rtt = ack.min_rtt = ago
            ack.app_limited = app_limited
            for controller in self.controllers:
                controller.on_ack(self.now, ack)
            assert before <= self.window <= before + max(ack.bytes, self.mtu)
            if filled < 0.5 and before - ack.prior_in_flight >= self.mtu:
                assert self.window == before

    @rule(idle=st.booleans())
    def send(self, idle: bool) -> None:
        for controller in self.controllers:
            controller.on_sent(self.now, self.mtu, self.mtu * (1 if idle else 5), app_limited=False)

    @rule(ago=st.sampled_from([0.0, 0.01, 1.0]), mark=st.booleans())
    def reduce(self, ago: float, mark: bool) -> None:
        before = self.window
        for controller in self.controllers:
            if mark:
                controller.on_ecn(self.now, 1, self.now - ago)
            else:
                lost(controller, self.now, sent=self.now - ago)
        assert self.window in {before, max(int(before * 0.7), 2 * self.mtu)}

    @rule()
    def spurious(self) -> None:
        before = self.window
        for controller in self.controllers:
            controller.on_spurious(self.now)
        assert self.window >= before

    @rule()
    def persistent(self) -> None:
        for controller in self.controllers:
            controller.on_persistent(self.now)
        assert self.window == 2 * self.mtu

    @rule(mtu=st.sampled_from([1200, 1400, 9000]))
    def path(self, mtu: int) -> None:
        self.mtu = mtu
        for controller in self.controllers:
            controller.on_mtu(mtu)

    @invariant()
    def bounded_and_alike(self) -> None:
        one, other = self.controllers
        assert type(one.window) is int
        assert 2 * self.mtu <= one.window <= WINDOW_MAXIMUM
        assert one.ssthresh is None or 2 * self.mtu <= one.ssthresh <= WINDOW_MAXIMUM
        for name in ("_epoch", "_k", "_w_max", "_w_est", "_fraction"):
            value = getattr(one, name)
            assert value == getattr(other, name)
            assert value is None or math.isfinite(value)
        assert one._epoch is None or one._epoch <= self.now
        assert (one.window, one.ssthresh) == (other.window, other.ssthresh)


TestBounds = Bounds.TestCase
TestBounds.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
