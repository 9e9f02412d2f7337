# SPDX-License-Identifier: Apache-2.0
"""Loss detection: the rules of RFC 9002, 6 and 7.6, with numbers, and hostile input."""

from __future__ import annotations

import itertools
import math

import pytest

from tests.unit.flow_path import SIZE, TICK, Path, lists
from userspace.flow.recovery import RANGES_MAXIMUM, TIMEOUT_MAXIMUM, Outcome
from userspace.flow.sent import FIRST_SLOTS, LIMIT_MAXIMUM, SentPackets
from xdp.errors import UsageError

# --- acknowledgements


def test_what_is_acknowledged_is_told_once() -> None:
    path = Path()
    path.send(6)
    assert lists(path.ack((4, 4), (0, 1), after=TICK)) == ([0, 1, 4], [], [])
    assert lists(path.ack((4, 4), (0, 1))) == ([], [], [])
    assert path.recovery.sent.in_flight == 3 * SIZE
    assert path.congestion.take() == ["ack"]


def test_the_report_has_all_numbers() -> None:
    path = Path()
    path.send(2, gap=TICK)  # at 0 and 1
    path.now = 64 * TICK
    path.ack((0, 0))
    path.send()  # number 2, at 64; 1 is on its way since 1
    path.ack((1, 2), after=66 * TICK)
    ack = path.congestion.last("ack")
    assert ack == {
        "bytes": 2 * SIZE,
        "packets": 2,
        "largest_sent_at": 64 * TICK,
        "rtt": 66 * TICK,
        "smoothed_rtt": path.recovery.rtt.smoothed,
        "min_rtt": 64 * TICK,
        "prior_in_flight": 2 * SIZE,
        "in_flight": 0,
        "delivered": 3 * SIZE,
        "prior_delivered": SIZE,
        # two packets since the first was delivered at 64, told at 130
        "delivery_rate": 2 * SIZE / (66 * TICK),
        "app_limited": False,
    }


def test_only_a_new_largest_gives_a_sample() -> None:
    path = Path()
    path.send(3)
    path.ack((2, 2), after=TICK)
    assert path.congestion.last("ack")["rtt"] == TICK
    path.ack((2, 2), (0, 0), after=TICK)
    assert path.congestion.last("ack")["rtt"] is None


def test_a_rate_is_no_faster_than_it_was_sent() -> None:
    path = Path()
    path.warm(16 * TICK)
    start = path.now
    path.send(4, gap=32 * TICK)
    path.now = start + 4 * 32 * TICK
    path.ack((1, 1))
    path.ack((1, 4), after=TICK)  # three at once, after three gaps
    assert path.congestion.last("ack")["delivery_rate"] <= SIZE / (32 * TICK) * 4 / 3


def test_time_that_stands_still_gives_no_rate() -> None:
    path = Path()
    for number in range(50):
        path.send()
        path.ack((number, number))
        assert path.congestion.last("ack")["delivery_rate"] == 0.0
        assert path.congestion.last("ack")["rtt"] > 0


def test_app_limited_lasts_until_what_was_on_its_way_is_delivered() -> None:
    path = Path()
    path.send(2, app_limited=True)
    path.send()
    told = []
    for number in range(3):
        path.ack((number, number), after=64 * TICK)
        told.append(path.congestion.last("ack")["app_limited"])
    assert told == [True, True, True]
    assert path.recovery.sent.app_limited_until == 0
    path.send()
    path.ack((3, 3), after=64 * TICK)
    assert not path.congestion.last("ack")["app_limited"]


@pytest.mark.parametrize("last", [3, 1 << 64, 10**400])
def test_a_number_never_sent_voids_the_acknowledgement(last: int) -> None:
    path = Path()
    path.send(3)
    assert lists(path.ack((0, last), (0, 0), after=TICK)) == ([], [], [])
    assert path.recovery.impossible == 1
    assert path.congestion.take() == []
    assert path.recovery.rtt.minimum == 0.0


def test_ranges_that_overlap_go_up_or_are_none_are_cut() -> None:
    path = Path()
    path.send(20)
    ranges = ((8, 3), (10, 12), (11, 15), (9, 10), (-5, 2), (-9, -7), (0, 19))
    assert lists(path.ack(*ranges, after=TICK))[0] == [0, 1, 2, 9, 10, 11, 12]


def test_an_endless_acknowledgement_ends() -> None:
    path = Path()
    path.send(2 * RANGES_MAXIMUM + 2)
    many = ((number, number) for number in itertools.count(2 * RANGES_MAXIMUM, -2))
    outcome = path.recovery.on_ack(TICK, many)
    assert len(outcome.acknowledged) == RANGES_MAXIMUM
    assert not path.recovery.on_ack(TICK, itertools.repeat((7, 6))).acknowledged


# --- lost


def test_three_later_packets_make_it_lost() -> None:
    path = Path()
    path.warm()
    path.send(4)  # 1 to 4
    assert lists(path.ack((3, 3), after=64 * TICK)) == ([3], [], [])
    assert path.recovery.loss_time < math.inf
    assert lists(path.ack((3, 4))) == ([4], [1], [])
    assert path.congestion.take() == ["ack", "loss", "ack"]
    assert lists(path.recovery.on_lost(path.now, 1)) == ([], [], [])


def test_the_report_of_a_loss_has_all_numbers() -> None:
    path = Path()
    path.warm()
    sent_at = path.now
    path.send(6, gap=TICK)  # 1 to 6
    path.ack((5, 5), after=64 * TICK)
    assert path.congestion.last("loss") == {
        "bytes": 2 * SIZE,
        "packets": 2,
        "largest_sent_at": sent_at + TICK,
        "prior_in_flight": 5 * SIZE,
        "in_flight": 3 * SIZE,
    }
    assert path.congestion.last("ack")["in_flight"] == 3 * SIZE
    assert path.congestion.last("ack")["prior_in_flight"] == 6 * SIZE


def test_time_makes_it_lost() -> None:
    path = Path()
    path.warm()
    path.send()
    sent_at = path.now
    path.now += TICK
    path.send()
    path.ack((2, 2), after=64 * TICK)  # samples of 64 ticks
    at = path.recovery.next_timeout()
    assert at == sent_at + 9 / 8 * 64 * TICK
    assert lists(path.recovery.on_timeout(math.nextafter(at, 0))) == ([], [], [])
    outcome = path.recovery.on_timeout(at)
    assert lists(outcome) == ([], [1], [])
    assert not outcome.probe
    assert path.recovery.next_timeout() == math.inf


def test_nothing_sent_after_the_largest_acknowledged_is_lost() -> None:
    path = Path()
    path.warm()
    path.send(10)
    path.ack((1, 1), after=64 * TICK)
    assert path.recovery.loss_time == math.inf
    outcome = path.recovery.on_timeout(path.now + 10)
    assert outcome.probe
    assert not outcome.lost
    assert path.recovery.sent.in_flight == 9 * SIZE


def test_what_the_caller_knows_to_be_lost_is() -> None:
    path = Path()
    path.send(3)
    assert lists(path.recovery.on_lost(1.0, 1)) == ([], [1], [])
    for number in (1, 3, -1, 10**30):
        assert lists(path.recovery.on_lost(1.0, number)) == ([], [], [])
    assert path.recovery.sent.in_flight == 2 * SIZE
    assert path.congestion.last("loss")["prior_in_flight"] == 3 * SIZE
    assert (path.recovery.lost_packets, path.recovery.lost_bytes) == (1, SIZE)


# --- probe timeouts


@pytest.mark.parametrize("sends", [True, False], ids=["probe sent", "nothing to send"])
def test_probe_timeouts_double_up_to_a_minute(sends: bool) -> None:
    """From the probe on or, where none left, from when it was asked for: nobody is asked again at once."""
    path = Path(max_ack_delay=0.025)
    assert path.recovery.next_timeout() == math.inf
    path.send()
    pto = 0.333 + 4 * 0.333 / 2 + 0.025
    waits, before = [], 0.0
    for _ in range(20):
        at = path.recovery.next_timeout()
        waits.append(at - before)
        outcome = path.recovery.on_timeout(at)
        assert outcome.probe
        assert not outcome.lost
        path.now = before = at
        if sends:
            path.send()
    assert waits == pytest.approx([min(pto * 2**count, TIMEOUT_MAXIMUM) for count in range(20)])
    path.ack((0, 0))
    assert path.recovery.pto_count == 0


def test_it_counts_from_the_last_packet_that_was_sent() -> None:
    path = Path()
    path.warm()
    path.send(2, gap=16 * TICK)
    assert path.recovery.next_timeout() == path.now - 16 * TICK + path.recovery.rtt.pto()


def test_where_there_is_no_place_for_a_probe_the_oldest_is_given_up() -> None:
    path = Path(limit=16)
    path.send(16)
    with pytest.raises(UsageError, match="16 packets are on their way"):
        path.send()
    outcome = path.recovery.on_timeout(10.0)
    assert outcome.probe
    assert outcome.lost == [0]
    assert path.congestion.take() == []
    path.send()
    assert path.recovery.sent.in_flight == 16 * SIZE
    assert (path.recovery.lost_packets, path.recovery.lost_bytes) == (1, SIZE)


# --- persistent congestion


def persistent(path: Path, gap: float, lost: int) -> list[str]:
    """So many packets at that distance are lost, and the next one is acknowledged."""
    path.warm()
    path.send(lost, gap=gap)
    path.send()
    path.ack((lost + 1, lost + 1), after=64 * TICK)
    return path.congestion.take()


def test_three_probe_timeouts_of_losses_are_persistent() -> None:
    # The second sample of 64 ticks leaves a variance of 24: 64 + 4 * 24 = 160, three times that.
    assert persistent(Path(), 480 * TICK / 4, lost=5) == ["loss", "ack"]
    assert persistent(Path(), 481 * TICK / 4, lost=5) == ["loss", "persistent", "ack"]


def test_it_needs_a_sample_before_the_first_loss() -> None:
    path = Path()
    path.send(5, gap=10.0)
    path.send()
    path.ack((5, 5), after=64 * TICK)
    assert path.congestion.take() == ["loss", "ack"]


def test_one_that_came_through_between_them_breaks_it() -> None:
    path = Path()
    path.warm()
    path.send(8, gap=150 * TICK)  # 1 to 8 are lost within 1,050 ticks, 5 to 8 within 450
    path.send()
    path.ack((9, 9), (4, 4), after=64 * TICK)
    assert path.congestion.take() == ["loss", "ack"]
    assert path.recovery.persistent == 0


def test_it_may_be_found_in_several_steps() -> None:
    path = Path()
    path.warm()
    path.send(10, gap=100 * TICK)
    for number in range(1, 9):  # three times 64 + 4 * 32 are 576 ticks
        path.recovery.on_lost(path.now, number)
    assert path.congestion.take() == ["loss"] * 7 + ["persistent", "loss"]
    assert path.recovery.rtt.minimum == path.recovery.rtt.latest


# --- ECN


def test_marks_are_told_as_they_grow() -> None:
    path = Path()
    path.send(6)
    path.ack((0, 3), after=TICK, ce=2)
    assert path.congestion.last("ecn") == {"marked": 2, "largest_sent_at": 0.0}
    assert path.congestion.take() == ["ecn", "ack"]
    path.ack((0, 4), after=TICK, ce=2)
    path.ack((0, 5), after=TICK, ce=1)
    assert path.congestion.take() == ["ack", "ack"]
    assert path.recovery.ce_packets == 2


def test_more_marks_than_packets_are_not_believed() -> None:
    path = Path()
    path.send(3)
    path.ack((0, 0), after=TICK, ce=2)
    path.ack((0, 1), after=TICK, ce=10**30)
    assert path.congestion.take() == ["ack", "ack"]
    path.ack((0, 2), after=TICK, ce=3)
    assert path.congestion.take() == ["ecn", "ack"]


def test_overflow_below_counts_as_marks() -> None:
    path = Path()
    path.warm()
    path.send(4)
    path.recovery.on_overflow(path.now + TICK, 8)
    assert path.congestion.last("ecn") == {"marked": 8, "largest_sent_at": path.now}
    path.recovery.on_overflow(path.now + TICK, 8)
    assert path.recovery._epoch == 1
    assert "lost=()" in repr(Outcome((), (), ()))


# --- the ring


def test_the_ring_grows_and_keeps_everything() -> None:
    sent = SentPackets(0.0, limit=100)
    for number in range(10):
        sent.add(float(number), SIZE, False)
    for number in range(9):
        assert sent.take(number) is not None
    assert (sent.base, len(sent.slots)) == (9, FIRST_SLOTS)
    for number in range(10, 137):
        assert sent.add(float(number), number, False) == number
    assert (sent.base, sent.next, len(sent.slots), sent.count()) == (9, 137, 128, 128)
    with pytest.raises(UsageError, match="no more are kept"):
        sent.add(200.0, SIZE, False)
    for number in range(10, 137):
        packet = sent.take(number)
        assert packet is not None
        assert packet[:2] == (number, float(number))
    assert (sent.in_flight, sent.count()) == (SIZE, 1)
    assert sent.take(9) is not None
    assert (sent.base, sent.in_flight) == (137, 0)


@pytest.mark.parametrize("limit", [1, LIMIT_MAXIMUM + 1, 3.0, True, None])
def test_the_limit_is_checked(limit: int) -> None:
    with pytest.raises(UsageError, match="limit is a whole number"):
        SentPackets(0.0, limit)
