# SPDX-License-Identifier: Apache-2.0
"""The pacer: exact release times, bursts, timers that are late, rates that change."""

from __future__ import annotations

import math
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from userspace.flow.congestion import initial_window
from userspace.flow.pacer import GRANULARITY, UNLIMITED, Pacer
from xdp.errors import UsageError

INF = math.inf
NAN = math.nan
MTU = 1200
WINDOW = initial_window(MTU)  # 12,000 bytes


def drain(pacer: Pacer, now: float, size: int = MTU) -> int:
    """Packets that leave at once."""
    count = 0
    while pacer.release_time(now, size) <= now:
        pacer.sent(now, size)
        count += 1
        assert count < 1_000_000
    return count


def test_exact_times() -> None:
    """RFC 9002, 7.7: the initial window at once, then 1.25 windows a round-trip time, evenly."""
    rate = 1.25 * WINDOW / 0.1  # 150,000 bytes/s: a packet each 8 ms
    pacer = Pacer(5.0, rate, WINDOW, granularity=0.0)
    assert drain(pacer, 5.0) == 10
    times = []
    now = 5.0
    for _ in range(20):
        now = pacer.release_time(now, MTU)
        times.append(now)
        pacer.sent(now, MTU)
    assert times == pytest.approx([5 + 0.008 * index for index in range(1, 21)], abs=1e-12)
    assert (pacer.rate, pacer.burst) == (rate, WINDOW)
    assert repr(pacer) == "<Pacer 150000 bytes/s, burst 12000>"


@pytest.mark.parametrize("rate", [1e4, 150_000.0, 1e6, 5.4e6])
def test_burst_is_the_initial_window_at_most(rate: float) -> None:
    """What leaves ahead of its time is within it."""
    pacer = Pacer(0.0, rate, WINDOW)
    assert drain(pacer, 0.0) == 10
    assert drain(pacer, 1000.0) == 10
    assert drain(pacer, 1000.0) == 0


def test_burst_of_a_high_rate_is_two_granularities_and_a_packet() -> None:
    rate = 125e6  # 1 Gbit/s
    pacer = Pacer(0.0, rate, WINDOW)
    assert drain(pacer, 0.0) == int(2 * GRANULARITY * rate + MTU) // MTU
    now = pacer.release_time(0.0, MTU)
    assert now > GRANULARITY
    assert drain(pacer, now) == pytest.approx(GRANULARITY * rate / MTU, abs=1)


def test_what_is_due_within_a_granularity_leaves_now() -> None:
    pacer = Pacer(0.0, 1.2e6, 4800)  # a packet each ms
    assert drain(pacer, 0.0) == 4
    assert pacer.release_time(0.0, MTU) == pytest.approx(0.002)
    assert pacer.release_time(0.0009, MTU) == pytest.approx(0.002)  # 1.1 ms ahead
    assert pacer.release_time(0.0011, MTU) == 0.0011  # 0.9 ms ahead: now
    pacer.sent(0.0011, MTU)
    assert pacer.release_time(0.0011, MTU) == pytest.approx(0.003)  # and the next is due when it was


@pytest.mark.parametrize("rate", [125_000.0, 12.5e6, 125e6, 1.25e9])
@pytest.mark.parametrize("late", [0.0, 0.0005, 0.001])
def test_late_timers_lose_no_rate(rate: float, late: float) -> None:
    """Timers that ring late by up to a granularity: after ten seconds all has left that should have."""
    random = Random(3)
    size = max(MTU, int(rate / 1e4))  # at most 10,000 packets a second, to be done soon
    pacer = Pacer(0.0, rate, WINDOW, mtu=size)
    now, sent = 0.0, 0
    end = 10.0 if rate < 1e9 else 1.0
    while now < end:
        at = pacer.release_time(now, size)
        if at > now:
            now = at + random.uniform(0, late)
            continue
        pacer.sent(now, size)
        sent += size
    allowed = rate * now + max(WINDOW, 2 * GRANULARITY * rate + size)
    assert rate * now - size <= sent <= allowed, "seed 3"


def test_catching_up_is_bounded() -> None:
    """A timer that is a second late gets no second of packets."""
    pacer = Pacer(0.0, 1.2e6, WINDOW)
    drain(pacer, 0.0)
    assert drain(pacer, 1.0) == 10


def test_packets_longer_than_the_burst() -> None:
    pacer = Pacer(0.0, 1000, 100, granularity=0.0)
    assert pacer.release_time(0.0, 5000) == 0.0
    pacer.sent(0.0, 5000)
    assert pacer.release_time(0.0, 5000) == pytest.approx(5.0)
    assert pacer.burst_allowed(4.9) == 0
    pacer.sent(5.0, 5000)
    assert pacer.release_time(5.0, 1) == pytest.approx(9.901)


def test_without_a_burst() -> None:
    pacer = Pacer(0.0, 1000, 0, granularity=0.0)
    assert pacer.release_time(0.0, 10) == 0.0
    pacer.sent(0.0, 10)
    assert pacer.release_time(0.0, 10) == 0.01
    assert pacer.burst_allowed(1.0) == 0


def test_probes_do_not_wait_but_count() -> None:
    pacer = Pacer(0.0, 12_000, 1200, granularity=0.0)
    for _ in range(3):
        pacer.sent(0.0, 1200)
    assert pacer.release_time(0.0, 1200) == pytest.approx(0.3)


def test_burst_allowed() -> None:
    pacer = Pacer(0.0, 1e6, WINDOW)
    assert pacer.burst_allowed(0.0) == WINDOW
    pacer.sent(0.0, 5000)
    assert pacer.burst_allowed(0.0) == WINDOW - 5000
    pacer.sent(0.0, 7000)
    assert pacer.burst_allowed(0.0) == 0
    assert pacer.burst_allowed(0.003) == 3000
    pacer.sent(0.0, 10_000)  # ahead of its time
    assert pacer.burst_allowed(0.0) == 0
    assert pacer.burst_allowed(9.0) == WINDOW


def test_no_rate_and_no_pacing() -> None:
    none = Pacer(0.0, 0, 2400)
    assert drain(none, 0.0) == 2
    assert none.release_time(1e9, 1) == INF
    assert none.burst_allowed(1e9) == 0
    none.set_rate(1e9, 1200, 2400)
    assert none.release_time(1e9, 1200) == pytest.approx(1e9 + 1, rel=1e-15)
    free = Pacer(0.0, INF, 2400)
    for now in (0.0, 0.0, 5.0, 4.9999):
        assert free.burst_allowed(now) == UNLIMITED
        assert free.release_time(now, 1 << 40) == now
        free.sent(now, 1 << 40)
    free.set_rate(5.0, 1200, 2400)
    assert drain(free, 5.0) == 2
    free.set_rate(5.0, INF, 2400)  # with a debt, which is forgotten
    assert free.release_time(5.0, MTU) == 5.0
    tiny = Pacer(0.0, 5e-324, 1200)
    assert drain(tiny, 0.0) == 1
    assert tiny.release_time(1e15, MTU) == INF


def test_set_rate() -> None:
    pacer = Pacer(0.0, 1000, 1000, granularity=0.0)
    pacer.sent(0.0, 600)
    pacer.set_rate(0.0, 10_000, 5000)
    assert pacer.burst_allowed(0.0) == 400  # nothing is minted
    assert pacer.release_time(0.0, 1400) == pytest.approx(0.1)
    pacer.set_rate(0.0, 10_000, 100)
    assert pacer.burst_allowed(0.0) == 100
    pacer.set_rate(0.0, 10_000, 5000)
    assert pacer.burst_allowed(0.0) == 100
    pacer.set_rate(0.0, 10_000, 5000)  # the same again
    assert pacer.burst_allowed(0.0) == 100
    pacer.set_rate(-5.0, 20_000, 5000)  # from before: counts from when the pacer was last set
    assert pacer.burst_allowed(0.0) == 100


def test_a_fall_of_the_rate_is_no_pause() -> None:
    """1 Gbit/s to 100 kbit/s: the millisecond that left ahead of its time is a millisecond still."""
    pacer = Pacer(0.0, 125e6, WINDOW)
    drain(pacer, 0.0)
    pacer.set_rate(0.0, 12_500, WINDOW)
    assert pacer.release_time(0.0, MTU) < 0.1 + GRANULARITY  # a packet's time
    other = Pacer(0.0, 1e-300, WINDOW, granularity=0.0)
    other.sent(0.0, 100 * WINDOW)
    other.set_rate(0.0, 1e6, WINDOW)  # by the same time it would be for ever: a burst at most
    assert other.release_time(0.0, WINDOW) == pytest.approx(2 * WINDOW / 1e6)


def test_following_a_rate_that_changes_often() -> None:
    """Set anew each 10 ms, the mean of the rates is what leaves."""
    random = Random(11)
    pacer = Pacer(0.0, 1e6, WINDOW)
    now, sent, wanted = 0.0, 0, 0.0
    for step in range(1, 1001):
        rate = random.uniform(0.5e6, 1.5e6)
        pacer.set_rate(now, rate, WINDOW)
        end = step / 100
        wanted += rate * (end - now)
        while (at := pacer.release_time(now, MTU)) < end:
            now = at
            pacer.sent(now, MTU)
            sent += MTU
        now = end
    # What is ahead of its time at a change is counted in time: with such leaps that is a few bytes each.
    assert sent == pytest.approx(wanted + WINDOW, rel=0.005), "seed 11"


def test_time_that_goes_backwards() -> None:
    pacer = Pacer(100.0, 12_000, 1200, granularity=0.0)
    assert drain(pacer, 100.0) == 1
    assert pacer.release_time(50.0, MTU) == pytest.approx(100.1)
    pacer.sent(50.0, MTU)
    assert pacer.release_time(100.0, MTU) == pytest.approx(100.2)


@pytest.mark.parametrize(
    ("now", "rate", "burst"),
    [(NAN, 1, 1), (INF, 1, 1), (0.0, -1, 1), (0.0, NAN, 1), (0.0, 1, -1), (0.0, 1, INF), (0.0, 1, NAN)],
)
def test_values_out_of_range(now: float, rate: float, burst: float) -> None:
    with pytest.raises(UsageError):
        Pacer(now, rate, burst)
    pacer = Pacer(0.0, 5, 5000)
    with pytest.raises(UsageError):
        pacer.set_rate(now, rate, burst)
    assert (pacer.rate, pacer.burst, pacer.burst_allowed(0.0)) == (5, 5000, 5000)


def test_calls_with_nonsense() -> None:
    for mtu in (0, -1):
        with pytest.raises(UsageError, match="a full packet"):
            Pacer(0.0, 1, 1, mtu=mtu)
    for granularity in (-1, NAN, INF):
        with pytest.raises(UsageError, match="granularity"):
            Pacer(0.0, 1, 1, granularity=granularity)
    for rate in (0, 1000, INF):
        pacer = Pacer(0.0, rate, 1000)
        with pytest.raises(UsageError, match="a size"):
            pacer.sent(0.0, -1)
        for now in (NAN, INF):
            with pytest.raises(UsageError, match="a time"):
                pacer.sent(now, 1)
            with pytest.raises(UsageError, match="a time"):
                pacer.burst_allowed(now)
        pacer.sent(0.0, 1000)
        assert pacer.release_time(0.0, 1000) >= 0


def test_burst_allowed_rounded_up() -> None:
    """1,200 are allowed, but by the last bit of a float they would have to wait: it is less then."""
    pacer = Pacer(0.0, 0.5, 1201)
    pacer.sent(0.0, 1)
    allowed = pacer.burst_allowed(0.0)
    assert allowed == 1198
    assert pacer.release_time(0.0, allowed) == 0.0


@settings(deadline=None)
@given(st.floats(0, 1e9), st.floats(1e-3, 1e12), st.integers(0, 10**7), st.integers(0, 10**6))
def test_burst_allowed_may_leave(now: float, rate: float, used: int, burst: int) -> None:
    pacer = Pacer(now, rate, burst)
    pacer.sent(now, used)
    allowed = pacer.burst_allowed(now)
    assert 0 <= allowed <= max(burst, 2 * GRANULARITY * rate + MTU)
    assert pacer.release_time(now, allowed) <= now or allowed == 0
    later = pacer.release_time(now, MTU)
    assert pacer.release_time(later, MTU) == later, "who comes at the time told may send"


class PacedLine(RuleBasedStateMachine):
    """Whatever happens: between any two times no more leaves than rate and burst allow."""

    @initialize(now=st.floats(0, 1e6), rate=st.floats(0, 1e9), burst=st.integers(0, 10**6))
    def start(self, now: float, rate: float, burst: int) -> None:
        self.now = now
        self.pacer = Pacer(now, rate, burst)
        self.burst = max(burst, 2 * GRANULARITY * rate + MTU)
        self.earned = 0.0  # bytes, by the rates that were set
        self.left = 0

    @rule(pause=st.one_of(st.floats(0, 0.01), st.floats(0, 100)))
    def wait(self, pause: float) -> None:
        self.earned += pause * self.pacer.rate
        self.now += pause

    @rule(size=st.integers(1, 65_527))
    def send_if_due(self, size: int) -> None:
        at = self.pacer.release_time(self.now, size)
        assert at >= self.now
        if at <= self.now:
            self.pacer.sent(self.now, size)
            self.left += size

    @rule(size=st.integers(1, 65_527))
    def send_when_due(self, size: int) -> None:
        at = self.pacer.release_time(self.now, size)
        if at < self.now + 1e4:
            self.wait(at - self.now)
            self.now = at
            self.send_if_due(size)

    @invariant()
    def no_more_than_allowed(self) -> None:
        # One packet may be longer than the burst; floats of times up to 1e6 s tell 1e-10 s apart.
        slack = 65_527 + self.pacer.rate * 1e-8
        assert self.left <= self.earned + self.burst + slack
        assert 0 <= self.pacer.burst_allowed(self.now) <= self.burst

    @invariant()
    def a_full_packet_is_looked_ahead_for(self) -> None:
        pacer = self.pacer
        may = pacer.full_at <= self.now + pacer.granularity
        if not math.isnan(pacer.full_at):
            assert may == (pacer.release_time(self.now, pacer.mtu) == self.now)
        if may:
            assert pacer.release_time(self.now, 1) == self.now


TestPacedLine = PacedLine.TestCase
TestPacedLine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
