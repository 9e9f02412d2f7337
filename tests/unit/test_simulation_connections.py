# SPDX-License-Identifier: Apache-2.0
"""Simulated peers, their network, and the promises that a simulation of connections checks."""

from __future__ import annotations

import math
from errno import ECONNREFUSED, ENETUNREACH
from typing import Any

import msgspec
import pytest

from userspace.connection.heartbeat import MAGIC, PING, PROBE, Heartbeats, HostReply, Pong
from userspace.connection.states import Cause
from userspace.simulation.connection_network import Network
from userspace.simulation.connection_peer import ICMP_BURST, Life, Peer
from userspace.simulation.connection_report import Summary, run
from userspace.simulation.connection_scenarios import SCENARIOS, Scenario, scenario
from userspace.simulation.connection_settings import settings, sized
from userspace.simulation.connection_world import ROOM, World
from userspace.simulation.engine import Engine
from xdp.errors import UsageError

SECRET = bytes(range(16))


def changed(name: str, **values: Any) -> Scenario:
    return msgspec.structs.replace(scenario(name), **values)


def quiet(**values: Any) -> Scenario:
    """Nothing happens unless a test makes it."""
    return changed("steady", **{"plan": lambda _: None, "calm": False, "kept": False, "late": 0.0, **values})


# --- peers


def test_a_peer_speaks_the_heartbeat() -> None:
    peer, ours = Peer(3, 77, kernel=True), Heartbeats(secret=SECRET)
    pong = peer.answer(0.0, ours.ping(1.0, 5))
    assert isinstance(pong, bytes)
    assert ours.receive(1.5, pong) == Pong(5, 1.0, 1.5)
    assert ours.peer_boot == 77
    reply = peer.answer(0.0, ours.probe(2.0, 6))
    assert isinstance(reply, bytes)
    assert ours.receive(2.5, reply) == HostReply(6, 2.0, 2.5)
    assert peer.answer(0.0, b"anything") == b"anything"
    assert (peer.pings, peer.probes, peer.messages) == (1, 1, 1)


def test_what_is_left_of_a_peer_answers() -> None:
    ping, probe = Heartbeats(secret=SECRET).ping(0.0, 1), Heartbeats(secret=SECRET).probe(0.0, 1)
    peer, plain = Peer(0, 1, kernel=True), Peer(1, 1, kernel=False)
    peer.become(1.0, Life.HUNG)
    assert peer.answer(1.0, ping) is peer.answer(1.0, b"data") is None
    assert peer.answer(1.0, probe)
    assert plain.answer(1.0, probe) is None
    peer.become(2.0, Life.STOPPED)
    assert [peer.answer(2.0, ping) for _ in range(ICMP_BURST + 2)] == [ECONNREFUSED] * ICMP_BURST + [None] * 2
    assert peer.answer(3.0, ping) == ECONNREFUSED  # one a second
    assert isinstance(peer.answer(3.0, probe), bytes)  # its kernel's program is not its application
    peer.become(4.0, Life.OFF)
    assert [peer.answer(4.0, what) for what in (ping, probe, b"data")] == [None] * 3
    peer.restart(5.0, 2)
    assert peer.answer(5.0, ping) is not None
    assert repr(peer) == "<Peer 0: running since 5.000>"
    reply = MAGIC + bytes((9,)) + bytes(27)
    assert peer.answer(5.0, reply) is None  # nobody answers answers
    assert (ping[4], probe[4]) == (PING, PROBE)


# --- the network


class Wire:
    """One peer at the end of a network."""

    def __init__(self, seed: int = 1) -> None:
        self.engine = Engine(seed=seed)
        self.peer = Peer(0, 1, kernel=True)
        self.came: list[tuple[float, int, bytes | int]] = []
        self.network = Network(self.engine, [self.peer], lambda *what: self.came.append(what))
        self.path = self.network.paths[0]

    def send(self, count: int = 1, every: float = 0.001) -> list[int]:
        said = []
        for number in range(count):
            self.engine.run(self.engine.now + every)
            said.append(self.network.send(self.engine.now, 9, 0, b"%d" % number))
        return said

    def check(self) -> None:
        """Nothing is lost without being counted."""
        net = self.network
        assert net.sent + net.returned + net.duplicated == (
            net.arrived + net.delivered + net.lost + net.flying
        )  # fmt: skip


def test_there_and_back() -> None:
    wire = Wire()
    wire.path.delay = 0.1
    assert wire.send() == [0]
    wire.check()
    wire.engine.run(1.0)
    ((at, connection, data),) = wire.came
    assert (connection, data) == (9, b"0")
    assert at == pytest.approx(0.201)
    wire.check()
    assert (wire.network.flying, wire.network.lost) == (0, 0)


def test_jitter_reorders_and_duplicates_come_twice() -> None:
    wire = Wire()
    wire.path.jitter, wire.path.duplicate = 0.05, 0.3
    wire.send(200)
    wire.check()
    wire.engine.run(2.0)
    wire.check()
    numbers = [int(data) for _, _, data in wire.came]
    assert set(numbers) == set(range(200))
    assert len(numbers) > 240
    assert numbers != sorted(numbers)


@pytest.mark.parametrize("loss", [0.0, 0.3, 0.6])
def test_loss_is_that_of_round_trips(loss: float) -> None:
    wire = Wire()
    wire.path.lose(loss)
    wire.send(4000, every=0.0001)
    wire.engine.run(2.0)
    assert 1.0 - len(wire.came) / 4000 == pytest.approx(loss, abs=0.03)
    wire.check()


def test_cuts() -> None:
    wire = Wire()
    for outward, inward, arrives in ((True, False, 0), (False, True, 1), (True, True, 0)):
        wire.path.cut(outward=outward, inward=inward)
        assert not wire.path.open
        before = wire.peer.messages
        wire.send()
        wire.engine.run(wire.engine.now + 1.0)
        assert (wire.peer.messages - before, wire.came) == (arrives, [])
    wire.path.cut(outward=False, inward=False)
    assert wire.path.open
    wire.network.set_link(up=False, route=True)
    assert wire.send() == [0]  # a carrier that is gone: nobody says so
    wire.network.set_link(up=False, route=False)
    assert wire.send() == [ENETUNREACH]
    wire.network.set_link(up=True, route=False)
    assert wire.send() == [0]
    wire.engine.run(wire.engine.now + 1.0)
    assert len(wire.came) == 1
    wire.check()


def test_errors_come_back() -> None:
    wire = Wire()
    wire.peer.become(0.0, Life.STOPPED)
    wire.send()
    wire.engine.run(1.0)
    assert [what for _, _, what in wire.came] == [ECONNREFUSED]


# --- scenarios


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_few_seeds_of_each_scenario(name: str) -> None:
    for seed in (1, 2, 3):
        outcome = run(name, seed)
        assert outcome.broken is None
        assert outcome.counts["connections"] > 0


def test_the_same_seed_is_the_same_run() -> None:
    for name in ("chaos", "churn", "shutdown"):
        first, again, other = run(name, 5), run(name, 5), run(name, 6)
        assert msgspec.json.encode(first) == msgspec.json.encode(again)
        assert first.counts != other.counts


def test_scale_and_seconds() -> None:
    outcome = run("steady", 1, scale=5, seconds=10.0)
    assert outcome.broken is None
    assert outcome.counts["connections"] == 15
    small = run("line", 1, scale=0.25, seconds=5.0)
    assert small.broken is None
    found = sized(settings(size=8), 0.01).pool
    assert (found.max_size, found.min_size) == (1, 0)


@pytest.mark.parametrize(("scale", "seconds"), [(math.nan, 1.0), (0.0, 1.0), (1.0, math.nan), (1.0, 1e9)])
def test_what_cannot_be_simulated(scale: float, seconds: float) -> None:
    with pytest.raises(UsageError, match=r"scale is|seconds is"):
        run("steady", 1, scale=scale, seconds=seconds)


def test_no_such_scenario() -> None:
    with pytest.raises(UsageError, match="no scenario 'nine'"):
        scenario("nine")


def test_what_happens_is_told() -> None:
    told: list[str] = []
    run("partition", 1, tell=lambda now, what: told.append(f"{now:.3f} {what}"))
    text = "\n".join(told)
    for words in ("is open", "ends", ", cut", "is unhealthy, was degraded"):
        assert words in text
    told.clear()
    run("flapping", 1, tell=lambda now, what: told.append(f"{now:.3f} {what}"))
    assert any("netlink: our link is down" in line for line in told)


def test_a_summary_adds_up() -> None:
    summary = Summary("death")
    outcomes = [run("death", seed) for seed in range(4)]
    for outcome in outcomes:
        summary.add(outcome)
    assert summary.seeds == 4
    assert summary.counts["deaths"] == sum(outcome.counts["deaths"] for outcome in outcomes)
    figures = summary.figures()
    back = sorted(one for outcome in outcomes for one in outcome.back_after)
    assert figures["back_most"] == back[-1]
    assert figures["back_p99"] == back[-1]
    assert summary.document()["ok"] is True
    assert Summary("death").figures()["found_most"] is None


# --- the loop


def test_a_socket_s_room_is_limited() -> None:
    world = World(quiet(), seed=1)
    world.stall(0.0, 5.0)
    for _ in range(ROOM + 10):
        world._deliver(0.0, 0, b"x 0")
    assert world.overflowed == 10
    assert len(world._inbox) == ROOM
    world._inbox.clear()
    world.run()


def test_stalls_are_measured() -> None:
    world = World(quiet(), seed=1)
    world.engine.at(1.0, world.stall, 2.0)
    world.engine.at(2.0, world.stall, 3.0)  # until 5.0
    world.engine.at(2.5, world.stall, 0.1)  # no longer than that
    world.engine.run(4.0)
    assert world.awake(4.0) == pytest.approx(1.0)
    world.engine.run(10.0)
    assert world.stalled == pytest.approx(4.0)
    assert world.awake(10.0) == pytest.approx(6.0)
    world.run()


def test_a_refused_descriptor_is_a_local_error() -> None:
    def plan(world: World) -> None:
        world.descriptors_most = 0
        world.engine.at(1.0, lambda now, _: world._deliver(now, 0, ECONNREFUSED))
        world.engine.at(5.0, lambda _, __: setattr(world, "descriptors_most", math.inf))

    world = World(quiet(plan=plan), seed=1)
    world.run()
    assert world.promises.refused > 0
    failed = world.conductor.snapshot().failed
    assert failed == {Cause.LOCAL_ERROR: world.promises.refused}
