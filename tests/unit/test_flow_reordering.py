# SPDX-License-Identifier: Apache-2.0
"""Packets that were lost and then were not: what is undone, and how far the thresholds follow."""

from __future__ import annotations

import pytest

from tests.unit.flow_path import SIZE, TICK, Path, lists
from userspace.flow.recovery import LOST_MAXIMUM, PACKET_THRESHOLD_MAXIMUM, REORDERING_MEMORY
from userspace.flow.rtt import TIME_THRESHOLD


def test_a_late_packet_is_spurious_and_undoes_the_reduction() -> None:
    path = Path()
    path.warm()
    path.send(6)
    path.ack((5, 5), after=64 * TICK)  # 1 and 2 are lost
    assert lists(path.ack((5, 5), (2, 2), after=TICK)) == ([], [], [2])
    assert path.congestion.take() == ["loss", "ack"]
    assert lists(path.ack((5, 5), (1, 2))) == ([], [], [1])
    assert path.congestion.take() == ["spurious"]
    assert path.recovery.undone == 1
    assert (path.recovery.lost_bytes, path.recovery.spurious_packets) == (0, 2)
    assert path.recovery.sent.in_flight == 3 * SIZE
    assert path.recovery.sent.delivered == 4 * SIZE


def test_a_reduction_with_a_real_loss_stays() -> None:
    path = Path()
    path.warm()
    path.send(6)
    path.ack((5, 5), after=64 * TICK)
    path.ack((2, 5), after=TICK)
    path.recovery.on_lost(path.now, 6)  # of the same congestion: it left before the reduction
    path.ack((1, 5), after=TICK)
    assert "spurious" not in path.congestion.take()


def test_only_the_latest_reduction_is_undone() -> None:
    path = Path()
    path.warm()
    path.send(4)
    path.ack((4, 4), after=64 * TICK)  # 1 is lost
    path.now += TICK
    path.send(4)  # 5 to 8
    path.ack((8, 8), (4, 4), after=64 * TICK)  # 2, 3 and 5 are lost, another reduction
    path.congestion.take()
    path.ack((8, 8), (4, 4), (1, 1))
    assert path.congestion.take() == []
    path.ack((8, 8), (1, 5))  # 2 and 3 were lost with 5
    assert path.congestion.take() == ["spurious"]


def test_what_was_marked_is_not_undone() -> None:
    path = Path()
    path.warm()
    path.send(4)
    path.ack((4, 4), after=64 * TICK, ce=1)  # 1 is lost; of the same reduction
    path.ack((4, 4), (1, 1), after=TICK)
    path.send(4)
    path.ack((5, 5), (4, 4), after=64 * TICK, ce=2)
    path.ack((8, 8), (4, 5), after=0, ce=2)
    called = path.congestion.take()
    assert called.count("ecn") == 2
    assert called.count("spurious") == 1  # that of the first


def test_a_mark_covers_what_left_before_it() -> None:
    path = Path()
    path.warm()
    path.send(4)
    path.ack((1, 1), after=64 * TICK, ce=1)
    path.ack((4, 4), (1, 1), after=TICK)
    path.recovery.on_lost(path.now, 2)
    path.ack((4, 4), (1, 2), after=TICK)
    assert "spurious" not in path.congestion.take()
    assert path.recovery.spurious_packets == 1


def test_overflow_and_persistent_congestion_are_not_undone() -> None:
    path = Path()
    path.warm()
    path.send(4)
    path.recovery.on_overflow(path.now + TICK, 1)
    path.now += 2 * TICK
    path.ack((4, 4), after=64 * TICK)  # 1 is lost
    path.ack((4, 4), (1, 1))
    assert path.recovery.spurious_packets == 1
    assert "spurious" not in path.congestion.take()
    path = Path()
    path.warm()
    path.send(2, gap=600 * TICK)
    path.recovery.on_lost(path.now, 1)
    path.recovery.on_lost(path.now, 2)
    assert path.recovery.persistent == 1
    path.now += TICK
    path.send()
    path.ack((3, 3), (1, 2), after=TICK)
    assert path.congestion.take() == ["loss", "loss", "persistent", "ack"]


def test_a_reduction_is_undone_once() -> None:
    path = Path()
    path.warm()
    path.send(4)
    path.ack((4, 4), after=64 * TICK)  # 1 is lost
    path.now += TICK
    path.send(4)  # 5 to 8
    path.ack((8, 8), (2, 4), after=64 * TICK)  # 5 is lost, another reduction
    path.ack((8, 8), (2, 5))
    assert path.congestion.take().count("spurious") == 1
    path.ack((8, 8), (1, 5))
    assert path.congestion.take() == []
    assert path.recovery.undone == 1


def test_the_first_number_may_be_late_as_well() -> None:
    path = Path()
    path.send(2)
    path.recovery.on_lost(path.now, 0)
    assert lists(path.ack((0, 1), after=TICK)) == ([1], [], [0])
    assert path.recovery.impossible == 0
    assert lists(path.ack((0, 0), (0, 0), (0, 1))) == ([], [], [])
    assert path.recovery.impossible == 0


def test_late_by_packets_is_not_late_by_time() -> None:
    path = Path()
    path.warm()
    path.send(6)
    path.ack((6, 6), after=64 * TICK)  # 1 to 3 are lost
    path.ack((6, 6), (1, 1), after=TICK)
    assert (path.recovery.packet_threshold, path.recovery.time_threshold) == (6, TIME_THRESHOLD)
    path.ack((6, 6), (1, 2), after=64 * TICK)
    assert path.recovery.time_threshold == TIME_THRESHOLD + 1 / 8


def test_the_packet_threshold_follows_the_reordering() -> None:
    path = Path()
    path.warm()
    path.send(30)
    path.ack((11, 11), after=64 * TICK)  # 1 to 8 are lost
    path.ack((11, 11), (1, 1))
    assert path.recovery.packet_threshold == 11
    path.send(40)
    assert lists(path.ack((21, 21), (11, 11), (1, 1)))[1] == [9, 10]
    path.recovery.sent.add(path.now, SIZE, False)


def test_the_thresholds_are_bounded_and_fall_back() -> None:
    path = Path()
    path.warm()
    now, number = path.now, 1
    for _ in range(12):
        path.send(1000)
        path.ack((number + 999, number + 999), after=64 * TICK)
        path.ack((number + 999, number + 999), (number, number), after=100 * TICK)
        number += 1000
    assert path.now > now
    assert path.recovery.packet_threshold == PACKET_THRESHOLD_MAXIMUM
    assert path.recovery.time_threshold == 2.0
    for _ in range(8 * REORDERING_MEMORY):
        path.send(2)
        path.now += TICK
        path.recovery.on_lost(path.now, number)
        path.ack((number + 1, number + 1), after=64 * TICK)
        number += 2
    assert path.recovery.packet_threshold == 3
    assert path.recovery.time_threshold == pytest.approx(TIME_THRESHOLD, rel=0.01)


def test_lost_packets_are_remembered_for_a_while() -> None:
    path = Path()
    path.warm()
    path.send(4)
    path.ack((4, 4), after=64 * TICK)
    path.now += 4.0
    assert lists(path.ack((4, 4), (1, 1))) == ([], [], [])
    path.send(4 * LOST_MAXIMUM - 8)
    for number in (*range(2000, 2000 + LOST_MAXIMUM // 2), *range(1999, 1999 - LOST_MAXIMUM, -1)):
        path.recovery.on_lost(path.now, number)
    last = path.recovery.sent.next - 1
    assert len(path.ack((last, last), (0, last - 1)).spurious) == LOST_MAXIMUM
