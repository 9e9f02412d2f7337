# SPDX-License-Identifier: Apache-2.0
"""Copa: the steps of the NSDI 2018 paper, invariants under any input, and what it does to a link."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.flow_anything import EVENTS, Events, throw
from tests.unit.flow_bottleneck import MTU, Bottleneck, Flow, change_rate, jain
from userspace.flow.bbr import Bbr
from userspace.flow.congestion import Ack, Loss
from userspace.flow.copa import DELTA, Copa
from xdp.errors import UsageError

RATE = 100e6 / 8  # bytes/s
RTT = 0.04
BDP = RATE * RTT  # 417 packets


class Path:
    """A round trip at a time, in eight acknowledgements, with the delay that the test says."""

    def __init__(self) -> None:
        self.copa = Copa(0.0, MTU, 1)
        self.now = 0.0

    def round(
        self, delay: float = 0.0, *, limited: bool = False, rate: float = 0.0, rtt: bool = True
    ) -> None:
        sent_at, window = self.now, self.copa.window
        for part in range(8):
            self.now = sent_at + (RTT + delay) * (1 + part / 8)
            ack = Ack()
            ack.bytes, ack.packets, ack.largest_sent_at = (
                window // 8,
                window // 8 // MTU,
                sent_at + part / 1000,
            )
            ack.rtt, ack.smoothed_rtt = RTT + delay if rtt else None, RTT
            ack.delivery_rate, ack.app_limited = rate, limited
            self.copa.on_ack(self.now, ack)

    def lose(self, packets: int, sent_at: float | None = None) -> None:
        loss = Loss()
        loss.packets, loss.bytes = packets, packets * MTU
        loss.largest_sent_at = self.now if sent_at is None else sent_at
        self.copa.on_loss(self.now, loss)

    def steady(self) -> Path:
        """Slow start is over, with the window of a BDP."""
        for _ in range(5):
            self.round()
        self.round(0.01, rate=100 * MTU / RTT)
        assert self.copa.ssthresh is not None
        return self


def test_slow_start_doubles_until_eight_acknowledgements_show_the_delay() -> None:
    path = Path()
    for rounds in range(1, 4):
        path.round()
        assert path.copa.window == pytest.approx(12_000 * 2**rounds, rel=0.01)
        assert path.copa.pacing_rate == pytest.approx(2 * path.copa.window / RTT)
        assert path.copa.ssthresh is None
    # The least delay of half a round trip is what counts, so the first late ones do nothing.
    path.round(0.03, rate=50 * MTU / RTT)
    assert path.copa.ssthresh is not None
    assert path.copa.window <= 53 * MTU


def test_a_delay_that_is_noise_is_none() -> None:
    path = Path()
    for _ in range(4):
        path.round()
    path.round(0.0009)
    assert path.copa.ssthresh is None


def test_the_window_moves_by_two_packets_a_round_trip_and_then_faster() -> None:
    path = Path().steady()
    path.round()
    windows = []
    for _ in range(9):
        windows.append(path.copa.window)
        path.round()
    steps = [(after - before) / MTU for before, after in itertools.pairwise(windows)]
    assert steps[0] == pytest.approx(2, abs=0.3)
    assert steps == sorted(steps)
    assert steps[-1] > 8
    assert all(step <= 0.26 * window / MTU for step, window in zip(steps, windows, strict=False))


def test_the_window_rests_where_two_packets_are_queued() -> None:
    # standing / (delta * delay) packets, with the delay beyond the noise of 1 ms
    for delay, grows in ((0.0015, True), (0.01, False)):
        path = Path().steady()
        target = (RTT + delay) / (DELTA * (delay - 0.001))
        assert (path.copa.window / MTU < target) is grows
        before = path.copa.window
        path.round(delay)
        path.round(delay)
        assert (path.copa.window > before) is grows


def test_what_the_application_limits_moves_nothing() -> None:
    path = Path()
    for delay in (0.0, 0.0, 0.02):
        path.round(delay, limited=True)
        assert path.copa.window == 12_000
    path = Path().steady()
    window = path.copa.window
    for delay in (0.0, 0.02):
        path.round(delay, limited=True)
        assert path.copa.window == window


def test_acknowledgements_without_a_round_trip_time_are_counted_only() -> None:
    path = Path()
    path.round(rtt=False)
    assert (path.copa.window, path.copa.pacing_rate) == (12_000, None)


def test_a_queue_that_never_empties_is_of_others() -> None:
    path = Path().steady()
    began = path.now
    while not path.copa.competitive and path.now < began + 1.0:
        path.round(0.03)
    assert 9 * RTT < path.now - began < 15 * RTT
    before = 1 / path.copa.delta
    path.round(0.03)
    path.round(0.03)
    assert 1 / path.copa.delta >= before + 1  # a packet more for each round trip without losses
    before = 1 / path.copa.delta
    path.lose(1)
    assert 1 / path.copa.delta == pytest.approx(max(before / 2, 2))
    path.lose(1, path.now - 0.01)
    assert 1 / path.copa.delta == pytest.approx(max(before / 2, 2))  # once in a round trip
    path.round()
    assert not path.copa.competitive
    assert path.copa.delta == DELTA
    assert repr(path.copa) == f"<Copa default window={path.copa.window} delta=0.5>"


def test_in_competition_a_mark_is_a_loss() -> None:
    path = Path().steady()
    for _ in range(12):
        path.round(0.03)
    window, delta = path.copa.window, path.copa.delta
    assert path.copa.competitive
    path.copa.on_ecn(path.now, 1, path.now)
    assert path.copa.window == pytest.approx(0.8 * window, abs=2)
    assert path.copa.delta == pytest.approx(min(2 * delta, DELTA))


def test_few_losses_are_chance_and_many_are_not() -> None:
    path = Path().steady()
    path.round(rate=50 * MTU / RTT)
    window = path.copa.window
    path.lose(2)
    assert path.copa.window == window
    path.lose(20)
    assert path.copa.window == pytest.approx(0.7 * window, abs=2)
    path.lose(20, path.now - 0.01)
    assert path.copa.window == pytest.approx(0.7 * window, abs=2)  # the same congestion
    path.copa.on_spurious(path.now)
    assert path.copa.window == window


def test_losses_take_no_more_than_what_was_not_delivered() -> None:
    path = Path().steady()
    path.round(rate=95 * MTU / RTT)
    window = path.copa.window
    path.lose(20)
    assert 0.7 * window < path.copa.window == pytest.approx(95 * MTU, abs=2)


def test_losses_end_slow_start_and_undoing_them_continues_it() -> None:
    path = Path()
    path.round()
    path.lose(3)
    assert path.copa.ssthresh == path.copa.window
    for _ in range(2):  # there is nothing to undo the second time
        path.copa.on_spurious(path.now)
        assert [path.copa.ssthresh, path.copa.window] == [None, pytest.approx(24_000)]


def test_marks_take_a_fifth_once_in_a_round_trip() -> None:
    path = Path().steady()
    window = path.copa.window
    path.copa.on_ecn(path.now, 0, path.now)
    assert path.copa.window == window
    for _ in range(2):
        path.copa.on_ecn(path.now, 5, path.now - 0.001)
        assert path.copa.window == pytest.approx(0.8 * window, abs=2)
        path.now += 0.001


def test_persistent_congestion_begins_anew() -> None:
    path = Path().steady()
    path.copa.on_persistent(path.now)
    assert (path.copa.window, path.copa.ssthresh, path.copa.pacing_rate) == (2 * MTU, None, None)
    path.round()
    assert path.copa.window == 4 * MTU


def test_a_new_mtu_raises_the_least_window() -> None:
    path = Path()
    path.copa.on_persistent(0.0)
    path.copa.on_mtu(9000)
    assert path.copa.window == 18_000
    path.copa.on_sent(0.0, 9000, 9000, app_limited=False)
    with pytest.raises(UsageError, match="mtu"):
        path.copa.on_mtu(-1)


@pytest.mark.parametrize(("now", "mtu"), [(math.inf, MTU), (0.0, 70_000)])
def test_what_cannot_be_is_refused(now: float, mtu: int) -> None:
    with pytest.raises(UsageError):
        Copa(now, mtu, 1)


@settings(max_examples=100, deadline=None)
@given(EVENTS, st.booleans())
def test_no_input_breaks_the_invariants(events: Events, competitive: bool) -> None:
    copa = Copa(0.0, MTU, 1)
    copa.competitive = competitive
    throw(copa, events)
    assert 1 / 1024 <= copa.delta <= DELTA


# --- on a link


def run(
    seconds: float, *, flows: int = 1, since: float = 1.0, limit: float = BDP, stagger: float = 0.0,
    **more: float,
) -> tuple[Bottleneck, list[int], float]:  # fmt: skip
    """The link, what each flow delivered since then, and the share of the link that this is."""
    link = Bottleneck(RATE, RTT, limit, **more)  # type: ignore[arg-type]
    senders = [Flow(link, Copa, number, start=number * stagger) for number in range(flows)]
    link.run(since)
    before = [flow.delivered for flow in senders]
    link.run(seconds)
    got = [flow.delivered - count for flow, count in zip(senders, before, strict=True)]
    return link, got, sum(got) / (RATE * (seconds - since))


@pytest.mark.parametrize(("jitter", "limit"), [(0.0, BDP), (0.001, BDP), (0.0, BDP / 10)])
def test_one_flow_fills_a_link_with_a_queue_of_some_ms(jitter: float, limit: float) -> None:
    link, _, share = run(4.0, jitter=jitter, limit=limit, seed=2)
    assert share >= 0.93, share
    assert link.queued(0.95, 1.0) < 0.005


def test_random_losses_do_nothing() -> None:
    _, _, share = run(4.0, loss=0.01, seed=3)
    assert share >= 0.93, share


def test_four_flows_that_began_at_different_times_share() -> None:
    link, got, share = run(8.0, flows=4, since=4.0, stagger=0.5, jitter=0.001, seed=4)
    assert jain(got) >= 0.97, got
    assert share >= 0.97, share
    assert link.queued(0.95, 4.0) < 0.008


def test_sixteen_flows_do_not_believe_to_compete() -> None:
    link, got, share = run(6.0, flows=16, since=2.0, jitter=0.001, stagger=0.06, seed=5)
    assert jain(got) >= 0.95, got
    assert share >= 0.97, share
    assert link.queued(0.95, 2.0) < 0.015


def test_a_flow_that_fills_the_queue_does_not_starve_it() -> None:
    link = Bottleneck(RATE / 2, RTT, BDP / 2, seed=6)
    bulk, copa = Flow(link, Bbr, 6), Flow(link, Copa, 6, start=2.0)
    link.run(4.0)
    before = bulk.delivered, copa.delivered
    link.run(9.0)
    got = bulk.delivered - before[0], copa.delivered - before[1]
    assert got[1] >= 0.1 * sum(got), got


def test_a_rate_that_halves_and_doubles_is_followed() -> None:
    link = Bottleneck(RATE, RTT, BDP, seed=7)
    flow = Flow(link, Copa, 7)
    change_rate(link, 1.5, RATE / 2)
    change_rate(link, 4.0, RATE)
    shares = []
    for since, until, now in ((2.5, 4.0, RATE / 2), (4.8, 6.0, RATE)):
        link.run(since)
        before = flow.delivered
        link.run(until)
        shares.append((flow.delivered - before) / (until - since) / now)
    assert min(shares) >= 0.93, shares


def test_a_blackhole_that_ends_is_survived() -> None:
    link = Bottleneck(RATE / 4, RTT, BDP / 4, seed=8)
    flow = Flow(link, Copa, 8)
    change_rate(link, 2.0, 0.0)
    change_rate(link, 5.0, RATE / 4)
    link.run(8.0)
    assert flow.persistent == 1
    before = flow.delivered
    link.run(10.0)
    assert (flow.delivered - before) / (2.0 * RATE / 4) >= 0.93
