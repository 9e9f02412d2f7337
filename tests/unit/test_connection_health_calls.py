# SPDX-License-Identifier: Apache-2.0
"""The health monitor's doors: callbacks, counts, links, and whatever is passed."""

from __future__ import annotations

import json
import math
import random
from functools import partial

import msgspec
import pytest

from tests.unit.connection_peers import Peers
from userspace.connection import health
from userspace.connection.grading import Status
from userspace.connection.health import ConnectionHealthMonitor
from userspace.connection.health_record import HISTORY
from userspace.connection.health_report import HealthSettings, HealthSummary
from xdp.errors import UsageError

H, D, U, DEAD = Status.HEALTHY, Status.DEGRADED, Status.UNHEALTHY, Status.DEAD


def added_up(counts: HealthSummary) -> bool:
    return (
        counts.asked == (counts.answered + counts.late + counts.failed + counts.withdrawn + counts.open)
        and counts.connections == counts.healthy + counts.degraded + counts.unhealthy + counts.dead
    )


# --- links


def test_a_link_that_is_down_is_nobodys_death() -> None:
    peers = Peers(1, 20)
    peers.run(30.0)
    peers.carrier = False
    peers.run(30.1)
    peers.monitor.on_link(peers.now, up=False)
    assert peers.monitor.summary().held == 20
    peers.run(90.0)
    peers.monitor.on_link(peers.now, up=True)
    peers.carrier = True
    peers.run(120.0)
    assert peers.changes == []
    counts = peers.monitor.summary()
    assert (counts.held, counts.healthy) == (0, 20)
    assert counts.withdrawn > 0
    assert added_up(counts)


def test_nobody_is_asked_often_while_the_link_is_down() -> None:
    peers = Peers(1, 50)
    peers.run(30.0)
    peers.carrier = False
    peers.run(38.0)  # suspects, all of them
    assert peers.monitor.summary().suspects == 50
    peers.monitor.on_link(peers.now, up=False)
    before = peers.monitor.summary().asked
    peers.run(100.0)
    assert peers.monitor.summary().asked - before < 50 * (60 / 4 + 2)
    peers.monitor.on_link(peers.now, up=True)
    peers.carrier = True
    peers.run(100.3)
    assert peers.monitor.summary().suspects == 0  # and they are asked at once when it is back
    assert peers.became(DEAD) == {}


def test_who_is_dead_when_the_link_comes_back_is_found_out() -> None:
    peers = Peers(1, 3)
    peers.run(30.0)
    peers.kill(2)
    peers.run(38.0)
    peers.carrier = False
    peers.monitor.on_link(peers.now, up=False)
    peers.run(58.0)
    peers.carrier = True
    peers.monitor.on_link(peers.now, up=True)
    peers.run(90.0)
    assert [*peers.became(DEAD)] == [2]
    assert 30.0 < peers.became(DEAD)[2] - 30.0 < 35.0  # the twenty seconds without a link do not count


def test_a_link_that_is_said_to_be_down_and_carries() -> None:
    """Or the peers are heard over another one.  So the dead are found all the same."""
    peers = Peers(1, 20)
    peers.run(30.0)
    peers.monitor.on_link(peers.now, up=False)
    peers.kill(7)
    peers.run(60.0)
    assert peers.monitor.summary().held == 0
    assert [*peers.became(DEAD)] == [7]
    assert peers.became(DEAD)[7] < 30.0 + 15.0 + 6.0


def test_what_had_arrived_before_the_link_went_down_says_nothing() -> None:
    peers = Peers(1, 20)
    peers.run(30.0)
    peers.monitor.on_link(peers.now, up=False)
    peers.carrier = False
    peers.run(30.9)
    for connection in range(20):
        peers.monitor.on_heard(peers.now, connection)
    assert peers.monitor.summary().held == 20
    peers.run(31.1)
    peers.monitor.on_heard(peers.now, 3)
    assert peers.monitor.summary().held == 19
    peers.monitor.on_heard(peers.now, 4)
    assert peers.monitor.summary().held == 0


def test_a_link_of_some() -> None:
    peers = Peers(1, 10)
    peers.run(30.0)
    for connection in range(10):
        peers.kill(connection)
    peers.monitor.on_link(peers.now, False, range(4))
    peers.monitor.on_link(peers.now, False, [2, 3, 99])
    assert peers.monitor.summary().held == 4
    assert peers.monitor.summary().strays == 1
    peers.run(60.0)
    assert sorted(peers.became(DEAD)) == [4, 5, 6, 7, 8, 9]
    assert peers.monitor.remove(3)
    assert peers.monitor.summary().held == 3
    peers.monitor.on_link(peers.now, True, [0])
    assert peers.monitor.summary().held == 2
    peers.monitor.on_host_reply(peers.now, 1, peers.monitor._records[1].sequence - 1)
    assert peers.monitor.summary().held == 0
    peers.run(80.0)
    assert sorted(peers.became(DEAD)) == [0, 1, 2, 4, 5, 6, 7, 8, 9]


def test_errors_of_a_link_that_is_down_are_its_own() -> None:
    peers = Peers(1, 1)
    peers.run(30.0)
    peers.monitor.on_link(peers.now, up=False)
    for _ in range(5):
        peers.monitor.on_error(peers.now, 0, refused=False)
    peers.monitor.on_link(peers.now, up=True)
    peers.monitor.on_link(peers.now, up=True)
    peers.run(40.0)
    assert peers.changes == []


# --- callbacks


def test_callbacks_can_do_what_they_like() -> None:
    peers = Peers(1, 10)
    monitor = peers.monitor
    told: list[tuple[int, Status, Status]] = []

    def meddle(connection: int, old: Status, new: Status) -> None:
        told.append((connection, old, new))
        if new == U:
            assert monitor.remove(connection)
            monitor.add(peers.now, connection + 100)
            peers.loss[connection + 100] = peers.rtt[connection + 100] = 0.0
            monitor.take_probes(peers.now)
            monitor.on_error(peers.now, 9, refused=True)
            if connection < 9:
                monitor.on_error(peers.now, 9, refused=True)
        raise RuntimeError(f"no {new.name}")

    monitor.subscribe(meddle)
    peers.run(30.0)
    for connection in range(5):
        peers.kill(connection)
    peers.run(60.0)
    counts = monitor.summary()
    assert counts.callback_errors == len(told) == len(peers.changes)
    assert counts.last_callback_error.startswith("RuntimeError: no ")
    assert len(monitor) == 10
    assert added_up(counts)
    assert (9, H, U) in told


def test_a_probe_of_who_was_removed_by_a_callback_is_not_sent() -> None:
    peers = Peers(1, 5)
    peers.run(30.0)
    monitor = peers.monitor
    monitor.subscribe(lambda connection, _old, _new: monitor.remove(connection))
    for connection in range(5):
        peers.kill(connection)
    peers.run(60.0)  # Peers would fail for a connection that it does not know
    assert len(monitor) == 0
    assert monitor.next_timeout() == math.inf
    assert added_up(monitor.summary())


# --- counts


def test_counts_add_up_whatever_happens() -> None:
    peers = Peers(3, 30, loss=0.4)
    rng = random.Random(3)
    for step in range(400):
        peers.run(step * 0.5)
        connection = rng.randrange(30)
        match rng.randrange(6):
            case 0 if peers.monitor.remove(connection):
                peers.monitor.add(peers.now, connection)
            case 1:
                peers.monitor.on_error(peers.now, connection, refused=rng.random() < 0.5)
            case 2:
                peers.monitor.on_link(peers.now, rng.random() < 0.7)
            case 3:
                peers.stall(rng.random() * 2)
            case 4:
                peers.died[connection] = peers.now
            case _:
                peers.died.pop(connection, None)
        assert added_up(peers.monitor.summary())
    counts = peers.monitor.summary()
    assert min(counts.answered, counts.late + 1, counts.failed, counts.withdrawn, counts.stalls) > 0
    assert sum(counts.changes.values()) == len(peers.changes)
    assert json.loads(msgspec.json.encode(counts))["connections"] == 30
    told = json.loads(msgspec.json.encode(peers.monitor.health(peers.now, 3)))
    assert len(told["history"]) <= HISTORY
    assert "30 connections" in repr(peers.monitor)


def test_answers_that_are_none() -> None:
    monitor = ConnectionHealthMonitor(0.0, random.Random(1))
    monitor.add(0.0, 5)
    now = monitor.next_timeout()
    (probe,) = monitor.take_probes(now)
    for sequence in (probe.sequence + 101, -1, 1 << 80, probe.sequence - (1 << 32)):
        assert not monitor.on_pong(now, 5, sequence)
        assert not monitor.on_host_reply(now, 5, sequence - 100)
    assert not monitor.on_pong(now, 6, probe.sequence)
    assert not monitor.on_host_reply(now, 6, probe.sequence)
    assert monitor.on_pong(now, 5, probe.sequence)
    assert not monitor.on_pong(now, 5, probe.sequence)
    counts = monitor.summary()
    assert (counts.answered, counts.ignored, counts.strays) == (1, 9, 2)


def test_a_repeated_answer_keeps_nobody_alive() -> None:
    peers = Peers(1, 1)
    peers.run(30.0)
    sequence = peers.monitor._records[0].sequence - 1
    peers.kill(0)
    for step in range(300):
        peers.run(30.0 + step / 10)
        peers.monitor.on_pong(peers.now, 0, sequence)
    assert peers.monitor.status(0) == DEAD


def test_old_answers_say_nothing_of_a_connection_that_was_added_again() -> None:
    monitor = ConnectionHealthMonitor(0.0, random.Random(1))
    monitor.add(0.0, 5)
    now = monitor.next_timeout()
    (probe,) = monitor.take_probes(now)
    monitor.remove(5)
    monitor.add(now, 5)
    now = monitor.next_timeout()
    assert monitor.take_probes(now)
    assert not monitor.on_pong(now, 5, probe.sequence)


def test_what_could_not_be_sent_proves_nothing() -> None:
    monitor = ConnectionHealthMonitor(0.0, random.Random(1))
    monitor.add(0.0, 5)
    while (now := monitor.next_timeout()) < 100.0:
        for probe in monitor.take_probes(now):
            monitor.on_unsent(now, 5, probe.sequence)
            monitor.on_unsent(now, 5, probe.sequence)
    assert monitor.status(5) == H
    counts = monitor.summary()
    assert counts.withdrawn == counts.asked > 100
    monitor.on_unsent(now, 6, 0)
    assert monitor.summary().strays == 1


def test_probes_that_nobody_takes_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "PENDING_MOST", 30)
    monitor = ConnectionHealthMonitor(0.0, random.Random(1))
    for connection in range(100):
        monitor.add(0.0, connection)
    for second in range(100):
        monitor.on_timeout(float(second))
    assert len(monitor._probes) == 30
    assert monitor.next_timeout() == 99.0
    assert len(monitor.take_probes(99.0)) == 30
    assert added_up(monitor.summary())


# --- what is passed


def test_what_is_no_time_is_refused_everywhere() -> None:
    peers = Peers(1, 1)
    peers.run(10.0)
    monitor = peers.monitor
    before = monitor.summary()
    calls = (
        lambda now: ConnectionHealthMonitor(now, random.Random(1)),
        monitor.on_timeout,
        monitor.take_probes,
        partial(monitor.add, connection=9),
        partial(monitor.on_heard, connection=0),
        partial(monitor.on_pong, connection=0, sequence=0),
        partial(monitor.on_host_reply, connection=0, sequence=0),
        partial(monitor.on_error, connection=0, refused=True),
        partial(monitor.on_unsent, connection=0, sequence=0),
        partial(monitor.on_sent, connection=0, packets=1),
        partial(monitor.on_loss, connection=0, packets=1),
        partial(monitor.on_link, up=False),
        partial(monitor.on_tick, due=0.0),
        partial(monitor.health, connection=0),
        partial(monitor.peak_latency, connection=0),
    )
    for call in calls:
        for now in (math.nan, math.inf, -math.inf, 1e300, -1e300):
            with pytest.raises(UsageError, match="now is seconds"):
                call(now)
    assert monitor.summary() == before


def test_a_clock_that_goes_backwards_is_the_latest() -> None:
    peers = Peers(1, 1)
    peers.run(10.0)
    peers.monitor.on_heard(10.0, 0)
    peers.monitor.on_heard(5.0, 0)
    assert peers.monitor.health(3.0, 0).silent == 0.0
    assert peers.monitor.health(10.5, 0).silent == 0.5


def test_connections_are_checked() -> None:
    monitor = ConnectionHealthMonitor(0.0, random.Random(1), HealthSettings(max_connections=2))
    monitor.add(0.0, 1)
    for wrong in (1.0, "1", None, True):
        with pytest.raises(UsageError, match="whole number"):
            monitor.add(0.0, wrong)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="watched already"):
        monitor.add(0.0, 1)
    monitor.add(0.0, 2)
    with pytest.raises(UsageError, match="no more connections"):
        monitor.add(0.0, 3)
    assert len(monitor) == 2
    assert not monitor.remove(3)
    for call in (monitor.status, partial(monitor.health, 0.0), partial(monitor.peak_latency, 0.0)):
        with pytest.raises(UsageError, match="is not watched"):
            call(3)
    monitor.on_heard(0.0, 3)
    monitor.on_error(0.0, 3, refused=True)
    monitor.on_sent(0.0, 3, 1)
    monitor.on_loss(0.0, 3, 1)
    assert monitor.summary().strays == 4
    for packets in (0, -1, 1 << 32, 1.5, math.nan):
        with pytest.raises(UsageError, match="packets are a whole number"):
            monitor.on_sent(0.0, 1, packets)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "wrong",
    [{"interval": 0.1}, {"interval": math.nan}, {"interval": 61.0}, {"interval": "5"}, {"jitter": -0.1},
     {"jitter": 0.6}, {"probe_rate": 0.5}, {"probe_rate": 101}, {"probe_budget": 0}, {"probe_budget": 1e7},
     {"dwell": -1.0}, {"dead_after": 12.9}, {"dead_after": math.inf}, {"probe_rate": 5.0},
     {"interval": 10.0}, {"busy_after": 13.0}, {"busy_after": 1e6}, {"max_connections": 0},
     {"max_connections": 1e3}, {"max_connections": 10**8}],
)  # fmt: skip
def test_settings_are_checked(wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        HealthSettings(**wrong)  # type: ignore[arg-type]


def test_settings_that_lack_time_for_evidence_say_what_helps() -> None:
    with pytest.raises(UsageError, match="evidence takes 19 s") as caught:
        HealthSettings(probe_rate=5.0)
    assert "probe_rate" in caught.value.hint
    assert HealthSettings(probe_rate=20.0, dead_after=10.0).dead_after == 10.0
    told = msgspec.json.decode(msgspec.json.encode(HealthSettings(jitter=0.1)), type=HealthSettings)
    assert told == HealthSettings(jitter=0.1)
