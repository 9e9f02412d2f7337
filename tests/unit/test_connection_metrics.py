# SPDX-License-Identifier: Apache-2.0
"""Figures for Prometheus: what they are, that they add up, and that peers cannot make more of them."""

from __future__ import annotations

import random
import threading
from collections.abc import Hashable
from typing import Any

import msgspec
import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from tests.documents import ROOT, blocks
from userspace.connection.conductor import Conductor, ConductorSettings
from userspace.connection.heartbeat import Heartbeats
from userspace.connection.metrics import BUCKETS, POOLS_MAXIMUM, ConnectionCollector
from userspace.connection.pool_settings import PoolSettings
from userspace.connection.transport import Transport
from userspace.connection.udp import UdpConnection
from xdp.errors import UsageError

SECRET = bytes(16)
Figures = dict[tuple[str, frozenset[tuple[str, str]]], float]


class World:
    """A conductor whose peers answer after their round-trip time, if they have one."""

    def __init__(self, trips: dict[Hashable, float | None]) -> None:
        self.now, self.trips = 0.0, trips
        settings = ConductorSettings(pool=PoolSettings(min_size=0, max_size=50))
        self.conductor = Conductor(0.0, transport=self._make, rng=random.Random(3), settings=settings)
        self.peer = Heartbeats(secret=SECRET, boot=1)
        for key in trips:
            self.conductor.add_endpoint(0.0, key)
            self.conductor.lookup(0.0, key)

    def _make(self, _now: float, _number: int, key: Hashable, _address: Hashable) -> Transport:
        if key == "broken":
            raise MemoryError("no")
        return UdpConnection(secret=SECRET)

    def run(self, until: float) -> None:
        conductor = self.conductor
        on_way: list[tuple[float, int, bytes]] = []
        while True:
            for one in conductor.take_datagrams(self.now):
                trip = self.trips[conductor.endpoint(one.connection)]
                if trip is not None:
                    self.peer.receive(self.now, one.payload)
                    pongs = self.peer.take_pongs(self.now)
                    on_way += [(self.now + trip, one.connection, pong) for pong in pongs]
            due = min([conductor.next_timeout(), *(at for at, _, _ in on_way)])
            if due > until:
                break
            self.now = max(self.now, due)
            arrived = [one for one in on_way if one[0] <= self.now]
            on_way = [one for one in on_way if one[0] > self.now]
            for _, connection, payload in arrived:
                conductor.receive(self.now, connection, payload)
            conductor.on_timeout(self.now)
        self.now = until


@pytest.fixture(scope="module")
def world() -> World:
    made = World({"near": 0.002, "far": 0.15, "other": 0.04, "dead": None, "broken": 0.1})
    made.run(60.0)
    return made


def scrape(collector: ConnectionCollector) -> Figures:
    """As a server of Prometheus reads it."""
    registry = CollectorRegistry()
    registry.register(collector)
    text = generate_latest(registry).decode()
    found: Figures = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = sample.name, frozenset(sample.labels.items())
            assert key not in found, "told twice"
            found[key] = sample.value
    return found


def seen(world: World, pool: str = "default") -> Figures:
    collector = ConnectionCollector()
    collector.update(world.now, world.conductor, pool)
    return scrape(collector)


def value(figures: Figures, name: str, **labels: str) -> float:
    return figures["sluice_connections" + name, frozenset({"pool": "default", **labels}.items())]


def by(figures: Figures, name: str, label: str) -> dict[str, float]:
    found = {}
    for (name_, labels), number in figures.items():
        if name_ == "sluice_connections" + name and label in dict(labels):
            found[dict(labels)[label]] = number
    return found


def test_nothing_before_the_first_update() -> None:
    assert scrape(ConnectionCollector()) == {}


def test_figures_are_those_of_the_snapshot_and_add_up(world: World) -> None:
    told, figures = world.conductor.snapshot(), seen(world)
    phases = by(figures, "", "phase")
    assert phases == {"in_use": 0, "idle": 3, "opening": 2, "closing": 0}
    assert sum(phases.values()) == told.pool.size == sum(by(figures, "_state", "state").values())
    assert by(figures, "_health", "status") == {"healthy": 3, "degraded": 0, "unhealthy": 0, "dead": 0}
    assert value(figures, "_maximum") == 50
    assert value(figures, "_endpoints") == 5
    assert value(figures, "_endpoints_well") == 3
    assert value(figures, "_endpoints_given_up") == 1, "what is our fault is no reason to give up"
    assert value(figures, "_held") == 0
    assert value(figures, "_panic") == 0
    failures = by(figures, "_failures_total", "cause")
    assert set(failures) == {"timed_out", "local_error"}
    assert (
        value(figures, "_attempts_total")
        == told.attempts
        == 3
        + sum(failures.values())
        + phases["opening"]
        - by(figures, "_state", "state")["failed"]
        - by(figures, "_state", "state")["disconnected"]
    )
    assert value(figures, "_opened_total") == 3
    questions = by(figures, "_questions_total", "outcome")
    assert sum(questions.values()) == told.health.asked - told.health.open
    assert questions["answered"] > 20
    assert by(figures, "_datagrams_total", "direction")["in"] == told.datagrams_in > 0
    assert by(figures, "_errors_total", "where") == {"factory": told.factory_errors, "callback": 0}
    assert told.factory_errors > 0


class Numbered:
    """A conductor whose counts are all different ones, to see which of them is told under which name."""

    def __init__(self, conductor: Conductor) -> None:
        self.links: dict[int, Any] = {}
        self.pool = conductor.pool
        snapshot = conductor.snapshot()
        parts = {
            name: numbered(getattr(snapshot, name), 1000 * (place + 1))
            for place, name in enumerate(("pool", "health", "reconnection"))
        }
        self.told = msgspec.structs.replace(numbered(snapshot, 4000), **parts)

    def snapshot(self) -> Any:
        return self.told


def numbered(struct: Any, first: int) -> Any:
    values = {
        name: first + number
        for number, name in enumerate(type(struct).__struct_fields__)
        if type(getattr(struct, name)) is int
    }
    return msgspec.structs.replace(struct, **values)


def test_each_figure_is_the_one_of_its_name(world: World) -> None:
    conductor: Any = Numbered(world.conductor)
    collector = ConnectionCollector()
    collector.update(0.0, conductor)
    figures, told = scrape(collector), conductor.told
    pool, health = told.pool, told.health
    assert by(figures, "_waits_total", "outcome") == {
        name: getattr(pool, name) for name in ("granted", "timed_out", "cancelled", "refused")
    }
    assert by(figures, "_questions_total", "outcome") == {
        name: getattr(health, name) for name in ("answered", "late", "failed", "withdrawn")
    }
    assert by(figures, "_messages_total", "what") == {
        name: getattr(told, name) for name in ("sent", "refused", "received", "lost")
    }
    assert by(figures, "_datagrams_total", "direction") == {
        "out": told.datagrams_out,
        "in": told.datagrams_in,
    }
    for name in ("acquired", "full", "missed", "ejections", "leaks"):
        assert value(figures, f"_{name}_total") == getattr(pool, name), name
    for name in ("attempts", "opened", "restarts"):
        assert value(figures, f"_{name}_total") == getattr(told, name), name
    for name in ("probes", "stalls"):
        assert value(figures, f"_{name}_total") == getattr(health, name), name
    for name, number in (
        ("_waiters", pool.waiting), ("_endpoints", pool.endpoints), ("_endpoints_well", pool.well),
        ("_endpoints_ejected", pool.ejected), ("_leaks_open", pool.leaks_open),
        ("_endpoints_given_up", told.reconnection.given_up), ("_suspects", health.suspects),
        ("_held", health.held),
    ):  # fmt: skip
        assert value(figures, name) == number, name


def test_latency_is_a_histogram_of_those_that_were_measured(world: World) -> None:
    figures = seen(world)
    buckets = {float(bound): count for bound, count in by(figures, "_latency_seconds_bucket", "le").items()}
    assert set(buckets) == {*BUCKETS, float("inf")}
    counts = [buckets[bound] for bound in sorted(buckets)]
    assert counts == sorted(counts)
    assert (buckets[0.001], buckets[0.003], buckets[0.03], buckets[0.1], buckets[0.3]) == (0, 1, 1, 2, 3)
    assert buckets[float("inf")] == value(figures, "_latency_seconds_gcount") == 3
    assert value(figures, "_latency_seconds_gsum") == pytest.approx(0.192, rel=0.05)


def test_counters_only_rise(world: World) -> None:
    other = World({"a": 0.01, "dead": None})
    collector = ConnectionCollector()
    before: Figures = {}
    for until in (1.0, 5.0, 20.0, 100.0):
        other.run(until)
        collector.update(other.now, other.conductor)
        after = scrape(collector)
        for key, number in before.items():
            if key[0].endswith("_total"):
                assert after[key] >= number, key
        before = after


def test_a_scrape_sees_the_last_update_only(world: World) -> None:
    """It comes in another thread, and the conductor may be in the middle of anything."""
    other = World({"a": 0.01})
    collector = ConnectionCollector()
    collector.update(0.0, other.conductor)
    before = scrape(collector)
    other.run(10.0)
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(scrape(collector)))
    thread.start()
    thread.join()
    assert found == [before]
    collector.update(10.0, other.conductor)
    assert scrape(collector) != before


def test_several_pools_are_told_apart(world: World) -> None:
    collector = ConnectionCollector()
    collector.update(world.now, world.conductor)
    one = scrape(collector)
    collector.update(0.0, World({}).conductor, "other")
    both = scrape(collector)
    assert {key: number for key, number in both.items() if ("pool", "default") in key[1]} == one
    assert {dict(labels)["pool"] for _, labels in both} == {"default", "other"}
    collector.forget("other")
    collector.forget("other")
    assert scrape(collector) == one


def test_a_registry_takes_one_only() -> None:
    registry = CollectorRegistry()
    registry.register(ConnectionCollector())
    with pytest.raises(ValueError, match="Duplicated"):
        registry.register(ConnectionCollector())


def test_no_series_for_each_peer(world: World) -> None:
    """Names of endpoints are in no label, and their number makes no difference."""
    many = World({f"peer-{number}": 0.01 for number in range(50)})
    many.run(30.0)
    figures = seen(many)
    assert not [key for key in figures if "peer-" in str(key)]
    assert len(figures) <= len(seen(world)) < 150


@pytest.mark.parametrize("pool", ["", "a b", "x" * 33, "ü", 7, "a\n"])
def test_names_that_no_pool_has(world: World, pool: Any) -> None:
    with pytest.raises(UsageError, match="pool is 1 to 32"):
        ConnectionCollector().update(0.0, world.conductor, pool)


def test_no_more_pools_than_there_may_be() -> None:
    empty = World({})
    collector = ConnectionCollector()
    for number in range(POOLS_MAXIMUM):
        collector.update(0.0, empty.conductor, f"pool-{number}")
    with pytest.raises(UsageError, match="16 pools have figures"):
        collector.update(0.0, empty.conductor, "another")
    collector.update(0.0, empty.conductor, "pool-3")


def test_the_documented_example(capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = [
        one
        for one in blocks(ROOT / "docs" / "connections.md")
        if one.language == "python" and "ConnectionCollector" in one.text
    ]
    exec(compile(block.text, "docs/connections.md", "exec"), {})
    assert capsys.readouterr().out == 'sluice_connections{phase="opening",pool="default"} 1.0\n'
