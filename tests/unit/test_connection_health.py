# SPDX-License-Identifier: Apache-2.0
"""The health monitor: when it asks, what it makes of answers and of none, and what it says about it."""

from __future__ import annotations

import math
import random
from itertools import pairwise

import pytest

from tests.unit.connection_peers import Peers
from userspace.connection.grading import Status
from userspace.connection.health import ConnectionHealthMonitor
from userspace.connection.health_report import HealthSettings
from userspace.connection.probes import Probe

H, D, U, DEAD = Status.HEALTHY, Status.DEGRADED, Status.UNHEALTHY, Status.DEAD


def path(peers: Peers, connection: int = 0) -> list[tuple[Status, Status]]:
    return [(old, new) for _, who, old, new in peers.changes if who == connection]


# --- when it asks


def test_idle_peers_are_asked_once_in_an_interval() -> None:
    peers = Peers(1, 100)
    peers.run(500.0)
    counts = peers.monitor.summary()
    assert counts.asked == pytest.approx(100 * 500 / 3.925, rel=0.02)  # 3.5 to 4.25 s, and the round trip
    assert (counts.probes, counts.failed, counts.healthy) == (0, 0, 100)
    assert peers.changes == []


def test_heartbeats_have_jitter_and_are_spread_from_the_beginning() -> None:
    monitor = ConnectionHealthMonitor(0.0, random.Random(3))
    for connection in range(1000):
        monitor.add(0.0, connection)
    first: dict[int, float] = {}
    now = 0.0
    while len(first) < 1000:
        now = monitor.next_timeout()
        for probe in monitor.take_probes(now):
            first.setdefault(probe.connection, now)
            monitor.on_pong(now, probe.connection, probe.sequence)
    for second in range(4):
        assert 150 < sum(second <= at < second + 1 for at in first.values()) < 300
    assert max(first.values()) <= 5.0


def test_no_two_intervals_are_alike() -> None:
    monitor = ConnectionHealthMonitor(0.0, random.Random(3))
    monitor.add(0.0, 1)
    times: list[float] = []
    while len(times) < 100:
        now = monitor.next_timeout()
        for probe in monitor.take_probes(now):
            monitor.on_pong(now, 1, probe.sequence)
            assert monitor.next_timeout() - now > 3.0  # nothing to do until the next one
            times.append(now)
    waits = [b - a for a, b in pairwise(times)]
    assert 3.5 <= min(waits) < 3.6
    assert 4.15 < max(waits) <= 4.26
    assert len({round(wait, 3) for wait in waits}) > 80


def test_traffic_takes_the_place_of_heartbeats_but_for_one_in_three() -> None:
    peers = Peers(1, 1)
    peers.talk(0, 0.5)
    peers.run(600.0)
    assert 600 / 15.1 - 2 <= peers.monitor.summary().asked <= 600 / 15.0 + 2
    assert peers.monitor.health(peers.now, 0).latency.samples > 30


def test_an_unusual_silence_is_asked_about_early() -> None:
    peers = Peers(1, 1)
    peers.talk(0, 0.05)
    peers.run(20.0)
    asked = peers.monitor.summary().asked
    peers.kill(0)
    peers.run(20.9)
    assert peers.monitor.summary().asked > asked
    peers.run(22.0)
    assert peers.monitor.status(0) == U


def test_the_same_seed_does_the_same() -> None:
    told = []
    for _ in range(2):
        peers = Peers(7, 10, loss=0.3)
        peers.run(60.0)
        told.append((peers.changes, peers.monitor.summary(), peers.monitor.health(60.0, 3)))
    assert told[0] == told[1]
    assert told[0][0]


# --- what becomes of who does not answer


def test_a_dead_peer_goes_all_the_way_and_comes_back_step_by_step() -> None:
    peers = Peers(1, 3)
    peers.run(30.0)
    peers.kill(1)
    peers.run(60.0)
    assert path(peers, 1) == [(H, D), (D, U), (U, DEAD)]
    assert path(peers, 0) == []
    told = peers.monitor.health(peers.now, 1)
    assert (told.status, told.suspect) == ("dead", False)
    assert told.reason.startswith("silent for 14.5")
    assert told.failures >= told.failures_needed
    assert told.phi > 8
    del peers.died[1]
    peers.run(90.0)
    assert path(peers, 1)[3:] == [(DEAD, U), (U, D), (D, H)]
    history = peers.monitor.health(peers.now, 1).history
    assert [line.split(", ")[0].split(": ")[1] for line in history] == [
        "healthy -> degraded", "degraded -> unhealthy", "unhealthy -> dead", "dead -> unhealthy",
        "unhealthy -> degraded", "degraded -> healthy",
    ]  # fmt: skip
    times = [at for at, who, _, _ in peers.changes if who == 1]
    assert times[4] - times[3] >= 3.5
    assert times[5] - times[4] >= 3.5
    assert peers.monitor.health(peers.now, 1).loss_rate < 0.05  # it was dead, which is no loss


def test_a_suspect_is_asked_ten_times_a_second_with_kernel_probes() -> None:
    monitor = ConnectionHealthMonitor(0.0, random.Random(1))
    monitor.add(0.0, 5)
    asked: list[tuple[float, Probe]] = []
    while (now := monitor.next_timeout()) < 12.0:
        asked += [(now, probe) for probe in monitor.take_probes(now)]
    times = [at for at, probe in asked if probe.kernel]
    assert len(asked) == len(times) + 1
    assert all(0.099 < b - a < 0.111 for a, b in pairwise(times))
    assert len({probe.sequence for _, probe in asked}) == len(asked)


def test_a_hole_of_ten_seconds_kills_nobody() -> None:
    for begin in range(5):
        peers = Peers(begin, 40)
        peers.run(30.0 + begin)
        peers.carrier = False
        peers.run(40.0 + begin)
        peers.carrier = True
        peers.run(60.0)
        assert len(peers.became(U)) == 40
        assert peers.became(DEAD) == {}
        assert peers.monitor.summary().healthy == 40


def test_a_step_back_takes_its_time() -> None:
    peers = Peers(1, 1, settings=HealthSettings(dwell=30.0))
    peers.run(30.0)
    peers.carrier = False
    peers.run(36.0)
    peers.carrier = True
    peers.run(150.0)
    assert path(peers)[-2:] == [(U, D), (D, H)]
    times = [at for at, _, _, _ in peers.changes]
    assert times[-2] - 36.0 >= 30.0
    assert times[-1] - times[-2] >= 30.0


def test_a_loop_that_is_late_asks_as_often() -> None:
    monitor = ConnectionHealthMonitor(0.0, random.Random(1))
    monitor.add(0.0, 5)
    while monitor.summary().suspects == 0:
        monitor.take_probes(monitor.next_timeout())
    now, asked = monitor.next_timeout(), 0
    for _ in range(25):
        now += 0.24
        asked += len(monitor.take_probes(now))
    assert asked >= 10 * 25 * 0.24 - 2
    assert monitor.summary().stalls == 0


def test_one_lost_heartbeat_changes_nothing() -> None:
    peers = Peers(1, 1)
    peers.run(30.0)
    peers.carrier = False
    peers.run(peers.monitor.next_timeout())  # this heartbeat is lost, and nothing after it
    peers.carrier = True
    peers.run(60.0)
    counts = peers.monitor.summary()
    assert (counts.failed, counts.probes) == (1, 1)
    assert peers.changes == []
    assert 0.0 < peers.monitor.health(60.0, 0).loss_rate < 0.1


def test_the_host_answers_for_a_busy_application() -> None:
    peers = Peers(1, 2)
    peers.hosts = {0}
    peers.run(30.0)
    sent = peers.monitor.summary().asked
    peers.kill(0)
    peers.run(80.0)
    assert path(peers) == [(H, D), (D, U)]
    told = peers.monitor.health(peers.now, 0)
    assert "though its host answers" in told.reason
    assert told.host_silent is not None
    assert told.host_silent < 1.0
    assert peers.monitor.summary().asked - sent < 3.5 * 50  # it is busy: two a second, and not ten
    peers.run(100.0)
    assert peers.became(DEAD)[0] - 30.0 == pytest.approx(60.0, abs=5.1)
    assert "though its host answers" in peers.monitor.health(peers.now, 0).reason


def test_a_busy_application_whose_host_falls_silent() -> None:
    peers = Peers(1, 1, loss=0.3)
    peers.hosts = {0}
    peers.run(30.0)
    peers.kill(0)
    peers.run(55.0)
    peers.hosts = set()
    peers.run(80.0)
    assert 13.5 < peers.became(DEAD)[0] - 55.0 < 15.0


def test_a_host_that_falls_silent_takes_evidence_of_its_own() -> None:
    """What the application did not answer while its host did says nothing of the host."""
    peers = Peers(1, 1, settings=HealthSettings(probe_budget=1.0, busy_after=3600.0))
    peers.hosts = {0}
    peers.run(30.0)
    peers.kill(0)
    peers.loss[0] = 0.6
    peers.run(230.0)
    peers.hosts = set()
    while (told := peers.monitor.health(peers.now, 0)).host_silent is None or told.host_silent < 18.0:
        peers.run(peers.now + 1.0)
    assert told.failures > 60 > told.failures_needed > 20
    assert peers.became(DEAD) == {}
    peers.run(350.0)
    assert [*peers.became(DEAD)] == [0]


def test_one_way_only() -> None:
    """It is heard, but nothing that we send arrives: unhealthy and not dead."""
    peers = Peers(1, 1)
    peers.talk(0, 0.3)
    peers.run(30.0)
    peers.loss[0] = 1.0
    peers.run(200.0)
    assert path(peers) in ([(H, D), (D, U)], [(H, U)])
    assert peers.became(U)[0] < 60.0
    assert "though it is heard" in peers.monitor.health(peers.now, 0).history[0]
    assert peers.monitor.summary().probes < 60  # until the next word of it
    peers.loss[0] = 0.0
    peers.run(600.0)
    assert peers.monitor.status(0) == H


# --- what the network says


@pytest.mark.parametrize(("refused", "why"), [(True, "refused"), (False, "unreachable")])
def test_a_refusal_makes_unhealthy_within_a_quarter_of_a_second(refused: bool, why: str) -> None:
    """As when the peer's process was killed while we were sending to it."""
    peers = Peers(1, 2, rtt=0.02)
    peers.run(30.0)
    peers.kill(0)
    peers.monitor.on_error(30.0, 0, refused=refused)
    assert peers.changes == []
    peers.run(30.25)
    assert path(peers) == [(H, U)]
    assert why in peers.monitor.health(peers.now, 0).reason
    peers.run(45.0)
    assert path(peers) == [(H, U), (U, DEAD)]


def test_two_refusals_are_believed_at_once() -> None:
    peers = Peers(1, 1)
    peers.run(30.0)
    peers.monitor.on_error(30.0, 0, refused=True)
    peers.monitor.on_error(30.0, 0, refused=True)
    assert path(peers) == [(H, U)]
    peers.run(60.0)
    assert path(peers) == [(H, U), (U, D), (D, H)]


def test_forged_errors_make_us_ask_no_more_often_than_a_suspect() -> None:
    peers = Peers(1, 1, rtt=0.001)
    peers.run(30.0)
    before = peers.monitor.summary().asked
    for step in range(1000):
        peers.run(30.0 + step / 100)
        peers.monitor.on_error(peers.now, 0, refused=True)
    assert peers.monitor.summary().asked - before <= 10 * 10 + 5
    assert peers.monitor.health(peers.now, 0).failures == 0


# --- loss and latency


def test_loss_degrades_and_recovery_takes_calm() -> None:
    peers = Peers(1, 1)
    peers.run(60.0)
    peers.loss[0] = 0.5
    peers.run(200.0)
    assert peers.monitor.status(0) == U
    assert peers.monitor.health(200.0, 0).loss_rate > 0.3
    peers.loss[0] = 0.0
    peers.run(800.0)
    assert peers.monitor.status(0) == H
    assert DEAD not in [new for _, new in path(peers)]


@pytest.mark.parametrize(("loss", "most"), [(0.02, 0.4), (0.1, 3.0), (0.3, 3.0), (0.6, 1.0)])
def test_nothing_flaps(loss: float, most: float) -> None:
    """Changes per connection and hour, after the first minutes."""
    peers = Peers(5, 15, loss=loss)
    peers.run(600.0)
    peers.changes.clear()
    peers.run(600.0 + 1800.0)
    assert len(peers.changes) / 15 / 0.5 <= most


def test_loss_that_the_caller_reports() -> None:
    peers = Peers(1, 2)
    for second in range(60):
        peers.run(float(second))
        peers.monitor.on_sent(peers.now, 0, 100)
        peers.monitor.on_loss(peers.now, 0, 30)
        peers.monitor.on_sent(peers.now, 1, 1)
        peers.monitor.on_loss(peers.now, 1, 1)
    assert peers.monitor.status(0) == D
    assert peers.monitor.health(peers.now, 0).loss_rate == pytest.approx(0.3, abs=0.02)
    assert "% lost" in peers.monitor.health(peers.now, 0).reason
    assert peers.monitor.health(peers.now, 1).loss_rate > 0.9  # of sixty by now
    for second in range(60, 120):
        peers.run(float(second))
        peers.monitor.on_sent(peers.now, 0, 100)
    assert peers.monitor.status(0) == H


def test_latency_degrades_against_its_own_baseline() -> None:
    peers = Peers(1, 2, rtt=0.02)
    peers.run(300.0)
    peers.rtt[0] = 0.1
    peers.run(400.0)
    assert path(peers) == [(H, D)]
    assert "times the usual one" in peers.monitor.health(peers.now, 0).reason
    assert peers.monitor.peak_latency(peers.now, 0) > 4 * peers.monitor.peak_latency(peers.now, 1)
    peers.rtt[0] = 0.5
    peers.run(500.0)
    assert path(peers)[:2] == [(H, D), (D, U)]
    peers.rtt[0] = 0.02
    peers.run(700.0)
    assert peers.monitor.status(0) == H


def test_a_long_path_is_not_suspected_for_it() -> None:
    peers = Peers(1, 3, rtt=0.6)
    peers.run(300.0)
    counts = peers.monitor.summary()
    assert counts.probes == 0
    assert peers.changes == []


def test_late_answers_are_answers_and_no_loss() -> None:
    """A round trip of 2 s: each question fails first, and is answered then."""
    peers = Peers(1, 3, rtt=2.0)
    peers.run(600.0)
    counts = peers.monitor.summary()
    assert counts.late > 300
    assert counts.dead == 0
    for connection in range(3):
        assert peers.monitor.health(peers.now, connection).loss_rate < 0.2


def test_the_time_of_a_late_answer_is_believed_only_if_it_can_be() -> None:
    def answered(sent_at: float) -> int:
        monitor = ConnectionHealthMonitor(0.0, random.Random(1))
        monitor.add(0.0, 5)
        now = monitor.next_timeout()
        (first,) = monitor.take_probes(now)
        while monitor.next_timeout() < now + 2.0:
            monitor.take_probes(monitor.next_timeout())
        assert monitor.on_pong(now + 2.0, 5, first.sequence, now + sent_at)
        return monitor.health(now + 2.0, 5).latency.samples

    assert answered(0.0) == 1
    for wrong in (1.9, 5.0, -100.0, math.nan, math.inf, -math.inf, -1e300):
        assert answered(wrong) == 0
