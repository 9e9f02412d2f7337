# SPDX-License-Identifier: Apache-2.0
"""Verdicts in virtual time: nobody who lives is declared dead at 60 % loss, and who died is, in time.

The probability that is promised (suspicion.py) is too small to be seen here.  What can be seen is that runs
of losses are as long as that computation says, and how far they stay from a verdict.
"""

from __future__ import annotations

import random

import pytest

from tests.unit.connection_peers import Peers
from userspace.connection.grading import Status
from userspace.connection.health_report import HealthSettings
from userspace.connection.stalls import THRESHOLD
from userspace.connection.suspicion import questions_needed

U, DEAD = Status.UNHEALTHY, Status.DEAD


@pytest.mark.parametrize("seed", range(4))
def test_live_peers_live_at_sixty_percent(seed: int) -> None:
    rtt = [0.001, 0.05, 0.3, 0.8][seed % 4]
    peers = Peers(seed, 20, loss=0.6, rtt=rtt, late=0.02)
    peers.run(900.0)
    counts = peers.monitor.summary()
    assert peers.became(DEAD) == {}
    # Two and a half questions to an answer.  Added are those and, in six of ten intervals, what is asked in
    # the time of a round trip.
    assert counts.asked == pytest.approx((counts.answered + counts.late) * 2.5, rel=0.1)
    assert counts.probes / 20 / 900 < 0.6 * (2.5 + 10 * rtt) / 3.5
    # Some 4,000 answers.  A run of 14 is lost once in 1,300 times, and none of 40 in a billion times.
    assert 5.0 < peers.longest_silence < 4.25 + 1.0 + 4.0
    assert counts.loss_rate == pytest.approx(0.6, abs=0.1)


@pytest.mark.parametrize("seed", range(12))
def test_the_dead_are_found_within_fifteen_seconds(seed: int) -> None:
    """Whatever is lost, whenever they die, however late the loop is; and the others live."""
    rng = random.Random(seed)
    peers = Peers(seed, 24, loss=rng.choice([0.0, 0.3, 0.6]), late=rng.choice([0.0, 0.05, 0.24]))
    for connection in range(12):
        peers.run(20.0 + 5.0 * connection + 5.0 * rng.random())
        peers.kill(connection)
    peers.run(120.0)
    dead = peers.became(DEAD)
    assert sorted(dead) == [*range(12)]
    for connection, at in dead.items():
        assert 14.5 - 4.25 - 1.0 < at - peers.died[connection] < 15.0
    assert all(peers.became(U)[connection] - at < 6.5 for connection, at in peers.died.items())


@pytest.mark.parametrize("seed", range(12))
def test_stalls_of_our_own_loop_kill_nobody_and_save_nobody(seed: int) -> None:
    rng = random.Random(seed)
    peers = Peers(seed, 20, loss=0.6, late=rng.choice([0.0, 0.2]), timers_first=seed % 2 == 0)
    mean, connection = rng.choice([1.0, 5.0, 30.0]), 0
    while peers.now < 300.0:
        peers.run(peers.now + rng.expovariate(1 / mean))
        if rng.random() < 0.9:
            peers.stall(rng.choice([0.1, 0.2, 0.3, 1.0, 5.0, 20.0]))
        elif connection < 10 and peers.now > 20.0:
            peers.kill(connection)
            connection += 1
    peers.run(peers.now + 60.0)
    assert peers.monitor.summary().stalls > 3
    dead = peers.became(DEAD)
    assert sorted(dead) == [*range(connection)]
    for who, at in dead.items():
        assert peers.awake(peers.died[who], at) < 15.0


def test_after_a_long_stall_nobody_is_even_suspected() -> None:
    peers = Peers(1, 50)
    peers.run(30.0)
    before = peers.monitor.summary().asked
    for _ in range(5):
        peers.stall(60.0)
        peers.run(peers.now + 65.0)
    assert peers.changes == []
    counts = peers.monitor.summary()
    # Nor is everybody asked at once: the clock has moved on by what was not stalled only.
    assert counts.asked - before < 50 * (5 * (5.0 + THRESHOLD) / 3.5 + 1)
    assert counts.probes <= 2
    assert counts.stalled == pytest.approx(5 * 60.0, abs=5 * (THRESHOLD + 0.3))


def test_a_stall_says_nothing_of_latency() -> None:
    peers = Peers(1, 200, rtt=0.05)
    peers.run(30.0)
    for step in range(20):
        peers.run(31.0 + 5 * step)
        peers.stall(2.0)
    peers.run(150.0)
    for connection in range(200):
        assert peers.monitor.health(peers.now, connection).latency.p99 < 0.1
    assert peers.changes == []


# --- many at once


def test_thousands_fall_silent_within_the_budget() -> None:
    """Here hundreds, and a budget of hundreds."""
    peers = Peers(2, 300, settings=HealthSettings(probe_budget=400.0))
    peers.run(120.0)
    before = peers.monitor.summary().probes
    for connection in range(200):
        peers.kill(connection)
    begin = peers.now
    while peers.monitor.summary().dead < 200:
        peers.run(peers.now + 1.0)
        counts = peers.monitor.summary()
        assert counts.probes - before <= 400.0 * (peers.now - begin + 0.1) + 1
    assert set(peers.became(DEAD)) == {*range(200)}
    # Fourteen questions each is what a verdict needs where nothing is lost, and there is time for that.
    assert all(at - begin < 15.0 for at in peers.became(DEAD).values())
    assert all(at - begin < 11.0 for at in peers.became(U).values())


def test_without_budget_verdicts_wait_for_evidence() -> None:
    """Where 60 % are lost, and a budget of a tenth of what it takes, verdicts are late and right."""
    peers = Peers(3, 60, loss=0.6, settings=HealthSettings(probe_budget=40.0))
    peers.run(120.0)
    for connection in range(30):
        peers.kill(connection)
    begin = peers.now
    while peers.monitor.summary().dead < 30:
        peers.run(peers.now + 1.0)
        for connection in range(30, 60):
            assert peers.monitor.status(connection) < DEAD
    dead = peers.became(DEAD)
    assert sorted(dead) == [*range(30)]
    assert 30.0 < max(dead.values()) - begin < 30 * 60 / 40 + 30
    for connection in range(30):
        assert peers.monitor.health(peers.now, connection).failures >= questions_needed(0.5)


def test_suspects_share_the_budget_evenly() -> None:
    peers = Peers(4, 100, settings=HealthSettings(probe_budget=50.0))
    peers.run(60.0)
    peers.carrier = False
    peers.run(70.0)
    asked = {connection: peers.monitor._records[connection].sequence for connection in range(100)}
    peers.run(80.0)  # nobody has been asked often enough to be dead
    shares = [peers.monitor._records[connection].sequence - asked[connection] for connection in range(100)]
    assert peers.became(DEAD) == {}
    assert max(shares) - min(shares) <= 1
    assert sum(shares) == pytest.approx(10 * 50, abs=10)


def test_who_goes_while_standing_in_line_is_gone() -> None:
    peers = Peers(4, 100, settings=HealthSettings(probe_budget=20.0))
    peers.run(30.0)
    peers.carrier = False
    peers.run(36.0)
    assert peers.monitor.summary().in_line > 50
    for connection in range(0, 100, 2):
        assert peers.monitor.remove(connection)
    peers.carrier = True
    peers.run(60.0)
    assert (peers.monitor.summary().in_line, len(peers.monitor)) == (0, 50)


def test_coming_and_going_leaves_nothing() -> None:
    peers = Peers(5, 10)
    monitor = peers.monitor
    for number in range(5000):
        peers.run(peers.now + 0.01)
        monitor.add(peers.now, 100 + number)
        peers.loss[100 + number], peers.rtt[100 + number] = 0.3, 0.05
        if number >= 20:
            assert monitor.remove(80 + number)
    assert len(monitor) == 30
    heap = monitor._timers._timers._heap
    assert len(heap) <= 2 * 30 + 64
    assert len(monitor._budget) <= 30
    assert monitor.summary().strays > 0  # answers to who was gone by then
