# SPDX-License-Identifier: Apache-2.0
"""HyStart++ beside the rules of RFC 9406: rounds, thresholds, conservative slow start and its end."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from userspace.flow.congestion import Ack
from userspace.flow.cubic import Cubic
from userspace.flow.hystart import CSS_GROWTH_DIVISOR, CSS_ROUNDS, N_RTT_SAMPLE, HyStart
from userspace.flow.newreno import NewReno

SIZE = 1200  # bytes a packet


class Rounds:
    """Acknowledgements of one packet each, in rounds of so many."""

    def __init__(self) -> None:
        self.hystart = HyStart()
        self.delivered = 0
        self.answers: list[int] = []

    def round(self, rtts: list[float | None]) -> list[int]:
        """All of the round were sent when the one before was delivered; the answers."""
        ack = Ack()
        ack.prior_delivered = self.delivered
        answers = []
        for rtt in rtts:
            self.delivered += SIZE
            ack.delivered, ack.rtt = self.delivered, rtt
            answers.append(self.hystart.on_ack(ack))
        return answers


def flat(rtt: float, count: int = N_RTT_SAMPLE) -> list[float | None]:
    return [rtt] * count


def test_a_constant_time_is_slow_start_for_ever() -> None:
    rounds = Rounds()
    for _ in range(50):
        assert rounds.round(flat(0.1)) == [1] * N_RTT_SAMPLE
        assert not rounds.hystart.conservative


def test_a_rise_divides_the_growth_from_the_eighth_sample_on_and_ends_after_five_rounds() -> None:
    rounds = Rounds()
    rounds.round(flat(0.1))
    slow = CSS_GROWTH_DIVISOR
    # An eighth of 0.1 s is between the bounds: a rise of 12.5 ms.
    assert rounds.round(flat(0.1126, N_RTT_SAMPLE + 2)) == [1] * (N_RTT_SAMPLE - 1) + [slow] * 3
    assert rounds.hystart.conservative
    for _ in range(CSS_ROUNDS - 1):  # the round that it began within is one of them
        assert rounds.round(flat(0.13)) == [slow] * N_RTT_SAMPLE
    assert rounds.round(flat(0.13))[0] == 0


def test_the_least_rise_is_4_ms_and_the_largest_that_is_waited_for_is_16() -> None:
    for before, rise in ((0.001, 0.004), (0.032, 0.004), (0.064, 0.008), (0.128, 0.016), (1.0, 0.016)):
        for more, conservative in ((rise * 0.99, False), (rise * 1.01, True)):
            rounds = Rounds()
            rounds.round(flat(before))
            rounds.round(flat(before + more))
            assert rounds.hystart.conservative is conservative, (before, more)


def test_a_rise_by_exactly_the_threshold_is_one() -> None:
    rounds = Rounds()
    rounds.round(flat(0.125))
    rounds.round(flat(0.125 + 0.125 / 8))  # exact in binary
    assert rounds.hystart.conservative


def test_the_least_time_of_a_round_counts_so_one_low_sample_keeps_slow_start() -> None:
    rounds = Rounds()
    rounds.round(flat(0.1))
    assert rounds.round([*flat(0.2, 5), 0.1, *flat(0.2, 5)]) == [1] * 11


def test_seven_samples_say_nothing() -> None:
    rounds = Rounds()
    rounds.round(flat(0.1))
    assert rounds.round(flat(0.5, N_RTT_SAMPLE - 1)) == [1] * 7
    # Acknowledgements without a sample are none, and their round has no minimum to compare with.
    rounds.round([None] * 20)
    assert rounds.round(flat(0.9)) == [1] * N_RTT_SAMPLE


def test_conservative_slow_start_was_a_mistake_when_the_time_falls_again() -> None:
    rounds = Rounds()
    rounds.round(flat(0.1))
    rounds.round(flat(0.12))
    assert rounds.round(flat(0.11)) == [CSS_GROWTH_DIVISOR] * 7 + [1]
    assert not rounds.hystart.conservative
    assert rounds.round(flat(0.2)) == [1] * 7 + [CSS_GROWTH_DIVISOR]  # and it may begin once more


def test_the_first_round_is_what_was_sent_before_anything_was_delivered() -> None:
    rounds = Rounds()
    # Ten packets sent at once: one round, whatever its acknowledgements are split into.
    rounds.round(flat(0.1, 10))
    assert rounds.round(flat(0.12, 20))[-1] == CSS_GROWTH_DIVISOR


def test_both_controllers_leave_slow_start_where_hystart_says() -> None:
    for controller in (NewReno(0.0), Cubic(0.0)):
        ack = Ack()
        ack.bytes, ack.packets, ack.largest_sent_at = SIZE, 1, 1.0
        ack.smoothed_rtt = ack.min_rtt = 0.1
        windows = []
        for rtt in (0.1, 0.12, *[0.13] * CSS_ROUNDS):
            ack.prior_delivered, ack.rtt = ack.delivered, rtt
            for _ in range(N_RTT_SAMPLE):
                ack.delivered += SIZE
                ack.prior_in_flight = controller.window
                controller.on_ack(1.1, ack)
                windows.append(controller.window)
        # 15 acknowledgements of slow start; the 16th begins CSS, with 4 rounds that are full.
        assert windows[14] == 12_000 + 15 * SIZE
        last = N_RTT_SAMPLE * (2 + CSS_ROUNDS - 1)
        assert windows[last - 1] == windows[14] + (last - 15) * SIZE // CSS_GROWTH_DIVISOR
        assert controller.ssthresh == windows[last - 1]
        # From then on it is avoidance: eight packets are far less than a window.
        assert windows[-1] <= windows[last - 1] + SIZE


@given(st.lists(st.lists(st.none() | st.floats(1e-6, 60), min_size=1, max_size=20), max_size=30))
def test_any_times_divide_by_one_or_four_until_it_is_over(times: list[list[float | None]]) -> None:
    rounds = Rounds()
    conservative = 0
    for rtts in times:
        answers = rounds.round(rtts)
        assert set(answers) <= {0, 1, CSS_GROWTH_DIVISOR}
        if 0 in answers:
            assert answers.index(0) == 0  # only when a round begins
            assert conservative >= CSS_ROUNDS
            return
        conservative = conservative + 1 if rounds.hystart.conservative else 0
        assert conservative <= CSS_ROUNDS
