# SPDX-License-Identifier: Apache-2.0
"""What programs tell of their connections: written, believed or not, and shown."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner

from sluice_cli import connections as command
from sluice_cli.connections import LATE, STATUSES, Filter, report, title
from userspace.connection.conductor import Conductor, ConductorSettings
from userspace.connection.heartbeat import Heartbeats
from userspace.connection.pool_settings import PoolSettings
from userspace.connection.publisher import ConnectionPublisher, name_of, summary_told
from userspace.connection.transport import Transport
from userspace.connection.udp import UdpConnection
from xdp.connection_state import (
    CONNECTIONS,
    CONNECTIONS_MAXIMUM,
    SIZE_MAXIMUM,
    TEXT_MAXIMUM,
    ConnectionsState,
    read_connections,
    text_of,
)
from xdp.errors import UsageError
from xdp.told import FILES_PER_USER, file_name

SECRET = bytes(16)
SETTINGS = PoolSettings(min_size=0, max_size=CONNECTIONS_MAXIMUM + 100)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    CONNECTIONS.make(tmp_path)
    return tmp_path


class World:
    """A conductor, and peers by endpoint that answer unless they are dead; all in virtual time."""

    def __init__(
        self, keys: list[Hashable], *, dead: frozenset[Hashable] = frozenset(), raises: bool = False
    ) -> None:
        self.now = 100.0
        self.dead = dead
        self.raises = raises
        self.conductor = Conductor(
            self.now,
            transport=self._transport,
            rng=random.Random(7),
            settings=ConductorSettings(pool=SETTINGS),
        )
        self.peer = Heartbeats(secret=SECRET, boot=1)
        for key in keys:
            self.conductor.add_endpoint(self.now, key)
            self.conductor.lookup(self.now, key)

    def _transport(self, _now: float, _number: int, _key: Hashable, _address: Hashable) -> Transport:
        if self.raises:
            raise OSError(24, "Too many open files\x1b[2J")
        return UdpConnection(secret=SECRET)

    def run(self, until: float) -> None:
        conductor = self.conductor
        while True:
            for one in conductor.take_datagrams(self.now):
                if conductor.endpoint(one.connection) not in self.dead:
                    self.peer.receive(self.now, one.payload)
                    for answer in self.peer.take_pongs(self.now):
                        conductor.receive(self.now + 0.02, one.connection, answer)
            due = conductor.next_timeout()
            if due > until:
                break
            self.now = max(self.now, due)
            conductor.on_timeout(self.now)
        self.now = until

    def publisher(self, run: Path, **options: Any) -> ConnectionPublisher:
        return ConnectionPublisher(self.conductor, "tests", run=run, **options)


def told_by(world: World, run: Path) -> ConnectionsState:
    publisher = world.publisher(run)
    assert publisher.publish(world.now)
    (found,) = read_connections(run)
    publisher.close()
    return found


PEER, OTHER = ("192.0.2.7", 8009), ("2001:db8::7", 8009)


@pytest.fixture
def two(run: Path) -> ConnectionsState:
    """One that is connected, and one that never answers."""
    world = World([PEER, OTHER], dead=frozenset({OTHER}))
    world.run(160.0)
    return told_by(world, run)


def test_what_is_told_is_read(two: ConnectionsState) -> None:
    assert (two.program, two.pid, two.told_at, two.total) == ("tests", os.getpid(), 160.0, 2)
    bad, good = two.connections
    assert (good.endpoint, good.address, good.state, good.phase) == (
        "192.0.2.7:8009", "192.0.2.7:8009", "connected", "idle",
    )  # fmt: skip
    assert (good.status, good.transport, good.cause) == ("healthy", "UdpConnection", "opened")
    assert good.latency == pytest.approx(0.02, abs=0.001)
    assert good.since == pytest.approx(60.0, abs=0.1)
    assert good.loss_rate == 0.0
    assert good.silent is not None
    assert good.silent < 6
    assert len(good.history) == 2
    assert (bad.endpoint, bad.state, bad.status, bad.latency) == ("[2001:db8::7]:8009", "failed", None, None)
    assert bad.failures >= 5
    assert bad.attempts > 5
    assert bad.next_attempt is not None
    assert len(bad.history) == 8
    assert bad.history[-1].endswith("connecting -> failed: timed_out")


def test_the_sums_of_what_is_told(two: ConnectionsState) -> None:
    told = two.summary
    assert (
        told.size == told.in_use + told.idle + told.opening + told.closing == sum(told.states.values()) == 2
    )
    assert told.states["connected"] == told.states["failed"] == told.given_up == 1
    assert told.health == {"healthy": 1, "degraded": 0, "unhealthy": 0, "dead": 0}
    assert (told.endpoints, told.well, told.max_size) == (2, 1, SETTINGS.max_size)
    assert told.attempts == 1 + sum(told.failed.values()) == 1 + two.connections[0].attempts
    assert (told.errors, told.last_error, told.held, told.draining) == (0, "", 0, False)


def test_each_figure_is_the_one_of_its_name(run: Path) -> None:
    """Numbers that all differ, under the names that pool, health and reconnection have for them."""
    snapshot = World([PEER]).conductor.snapshot()
    pool = numbered(snapshot.pool, 1000)
    health = numbered(snapshot.health, 2000)
    told = summary_told(
        msgspec.structs.replace(
            snapshot, pool=pool, health=health, attempts=3000, factory_errors=20, callback_errors=3,
            last_callback_error="b", failed={"refused": 4}, ended={"lost": 5},
            reconnection=numbered(snapshot.reconnection, 4000),
        ),
        77,
    )  # fmt: skip
    for name in ("size", "in_use", "idle", "opening", "closing", "waiting", "endpoints", "well", "ejected",
                 "panic", "draining", "waited", "timed_out"):  # fmt: skip
        assert getattr(told, name) == getattr(pool, name), name
    for name in ("held", "probes", "stalls"):
        assert getattr(told, name) == getattr(health, name), name
    assert told.health == {name: getattr(health, name) for name in STATUSES}
    assert told.given_up == numbered(snapshot.reconnection, 4000).given_up
    assert (told.max_size, told.attempts, told.errors, told.last_error) == (77, 3000, 23, "b")
    assert (told.failed, told.ended) == ({"refused": 4}, {"lost": 5})


def numbered(struct: Any, first: int) -> Any:
    """A copy whose counts are all different ones."""
    values = {
        name: first + number
        for number, name in enumerate(type(struct).__struct_fields__)
        if type(getattr(struct, name)) is int
    }
    return msgspec.structs.replace(struct, **values)


def test_at_most_once_in_the_interval_and_nothing_is_left(run: Path) -> None:
    world = World([PEER])
    with world.publisher(run, interval=2.0) as publisher:
        assert publisher.publish(100.0)
        (path,) = CONNECTIONS.path(run).iterdir()
        path.unlink()
        assert publisher.publish(101.9)
        assert read_connections(run) == []
        assert publisher.publish(102.0)
        assert len(read_connections(run)) == 1
    assert list(CONNECTIONS.path(run).iterdir()) == []


def test_of_many_the_worst_are_told_in_a_file_of_bounded_size(run: Path) -> None:
    keys: list[Hashable] = [f"{number:05d}" + '\x1b"\\ü' * 50 for number in range(CONNECTIONS_MAXIMUM + 100)]
    world = World(keys, dead=frozenset(keys[-50:]))
    world.run(104.0)
    publisher = world.publisher(run)
    assert publisher.publish(world.now)
    (path,) = CONNECTIONS.path(run).iterdir()
    assert path.stat().st_size < SIZE_MAXIMUM
    (found,) = read_connections(run)
    assert (found.total, len(found.connections)) == (len(keys), CONNECTIONS_MAXIMUM)
    assert {one.endpoint[:5] for one in found.connections[:50]} == {str(key)[:5] for key in keys[-50:]}
    assert {one.state for one in found.connections[50:]} == {"connected"}
    assert all(len(one.endpoint) == TEXT_MAXIMUM and one.endpoint.isascii() for one in found.connections)


def test_the_unhealthy_come_before_the_healthy(run: Path) -> None:
    keys: list[Hashable] = ["a", "b", "c"]
    world = World(keys)
    world.run(110.0)
    world.dead = frozenset({"b"})
    world.run(117.0)
    told = told_by(world, run)
    assert (told.connections[0].endpoint, told.connections[0].state) == ("b", "connected")
    assert told.connections[0].status in {"degraded", "unhealthy"}
    assert "without an answer" in (told.connections[0].reason or "")
    assert told.summary.probes > 0


def test_what_a_factory_raises_is_told_without_what_terminals_obey(run: Path) -> None:
    world = World([PEER], raises=True)
    world.run(101.0)
    told = told_by(world, run)
    assert told.summary.errors > 0
    assert told.summary.last_error.startswith("OSError: [Errno 24] Too many open files?")


def test_names() -> None:
    assert name_of(("192.0.2.7", 8009)) == "192.0.2.7:8009"
    assert name_of(("fe80::1", 1, 0, 3)) == "[fe80::1]:1"
    assert name_of(b"\x01\xff" * 16) == "01ff" * 16
    assert name_of("a\x1b[31m\u202e\nb") == "a?[31m??b"
    assert name_of(7) == "7"
    assert text_of("x" * 101) == "x" * 97 + "..."
    assert text_of("x" * 100) == "x" * 100


CHANGES: list[dict[str, Any]] = [
    {"endpoint": "a\x1b[31m"},
    {"endpoint": "ü"},
    {"address": "x" * (TEXT_MAXIMUM + 1)},
    {"reason": "line\n"},
    {"history": ["x"] * 9},
    {"history": ["\x07"]},
    {"state": "Connected"},
    {"state": "connected\n"},
    {"state": ""},
    {"status": 1},
    {"transport": "a b"},
    {"connection": -1},
    {"since": -1.0},
    {"since": "1"},
    {"latency": 1e10},
    {"loss_rate": 1.5},
    {"failures": 1 << 63},
    {"attempts": None},
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_connections_that_are_none(two: ConnectionsState, run: Path, change: dict[str, Any]) -> None:
    told = msgspec.to_builtins(two)
    name = file_name()
    (CONNECTIONS.path(run) / name).write_bytes(msgspec.json.encode(told))
    assert read_connections(run) == [two]
    told["connections"][0] |= change
    (CONNECTIONS.path(run) / name).write_bytes(msgspec.json.encode(told))
    assert read_connections(run) == []


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"program": "x y"},
        {"pid": 1},
        {"told_at": float("nan")},
        {"total": -1},
        {"connections": [{}]},
        {"summary": {}},
    ],
)
def test_states_that_are_none(two: ConnectionsState, run: Path, change: dict[str, Any]) -> None:
    told = msgspec.to_builtins(two) | change
    (CONNECTIONS.path(run) / file_name()).write_bytes(msgspec.json.encode(told))
    assert read_connections(run) == []


@pytest.mark.parametrize(
    "change",
    [
        {"states": {"\x1b": 1}},
        {"failed": {"a": -1}},
        {"health": {f"{'a' * (number + 1)}": 1 for number in range(65)}},
        {"panic": 1},
        {"last_error": "\x1b"},
    ],
)
def test_summaries_that_are_none(two: ConnectionsState, run: Path, change: dict[str, Any]) -> None:
    told = msgspec.to_builtins(two)
    told["summary"] |= change
    (CONNECTIONS.path(run) / file_name()).write_bytes(msgspec.json.encode(told))
    assert read_connections(run) == []


def test_nobody_hides_others(two: ConnectionsState, run: Path) -> None:
    for _ in range(FILES_PER_USER + 5):
        CONNECTIONS.write(two, file_name(), run)
    assert len(read_connections(run)) == FILES_PER_USER


@pytest.mark.parametrize(
    ("program", "interval", "match"),
    [("no blanks", 1.0, "program is 1 to 32"), ("x", 0.0, "interval is seconds")],
)
def test_wrong_arguments(program: str, interval: float, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        ConnectionPublisher(World([]).conductor, program, interval=interval)


# --- what people see

ALL = Filter(20, "worst", None, None, (), (), ())


def shown(two: ConnectionsState, wanted: Filter, now: float = 160.0) -> list[str]:
    return [
        one["endpoint"]
        for program in report([two], wanted, now)["programs"]
        for one in program["connections"]
    ]


def test_filters(two: ConnectionsState) -> None:
    bad, good = "[2001:db8::7]:8009", "192.0.2.7:8009"
    assert shown(two, ALL) == [bad, good]
    assert shown(two, ALL._replace(sort="latency")) == [good, bad]
    assert shown(two, ALL._replace(sort="silent")) == [good, bad]
    assert shown(two, ALL._replace(top=1)) == [bad]
    assert shown(two, ALL._replace(endpoint="192.0")) == [good]
    assert shown(two, ALL._replace(endpoint="198.51")) == []
    assert shown(two, ALL._replace(states=("failed", "connecting"))) == [bad]
    assert shown(two, ALL._replace(statuses=("healthy",))) == [good]
    assert shown(two, ALL._replace(statuses=("dead",))) == []
    assert shown(two, ALL._replace(numbers=(two.connections[1].connection,))) == [good]
    assert shown(two, ALL._replace(program="tests")) == [bad, good]
    assert shown(two, ALL._replace(program=str(os.getpid()))) == [bad, good]
    assert report([two], ALL._replace(program="other"), 0.0) == {"programs": []}


def test_counts_of_a_document(two: ConnectionsState) -> None:
    (program,) = report([two], ALL._replace(top=1), 161.5)["programs"]
    assert (program["total"], program["told"], program["matching"]) == (2, 2, 2)
    assert (program["age"], program["states"]["failed"]) == (1.5, 1)
    assert report([two], ALL, 10.0)["programs"][0]["age"] == 0.0
    json.dumps(program)


def test_a_program_in_a_line(two: ConnectionsState) -> None:
    (program,) = report([two], ALL, 160.0)["programs"]
    assert title(program) == (
        f"tests ({os.getpid()}): 2 of {SETTINGS.max_size} connections, 1 idle, 1 opening, "
        "1 of 2 endpoints well, 1 given up"
    )
    program |= {"panic": True, "draining": True, "held": 2, "waiting": 3, "errors": 2, "age": LATE + 1}
    assert title(program).endswith(
        "well, 3 callers wait, 1 given up, 2 on a link that is down, 2 errors of callbacks, panic, draining, "
        "told 6 s ago"
    )


def command_line(monkeypatch: pytest.MonkeyPatch, run: Path, *words: str) -> str:
    monkeypatch.setattr(command, "read_connections", lambda: read_connections(run))
    done = CliRunner().invoke(command.connections, words)
    assert done.exit_code == 0, done.output
    return done.output


def test_the_command(two: ConnectionsState, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert command_line(monkeypatch, run) == "no program tells of connections\n"
    CONNECTIONS.write(two, file_name(), run)
    first, head, bad, good = command_line(monkeypatch, run).splitlines()
    assert first.startswith("tests (")
    assert head.split()[:4] == ["connection", "endpoint", "address", "state"]
    assert " failed " in bad
    assert " in vain, again in " in bad
    assert good.split()[1] == "192.0.2.7:8009"
    assert "healthy" in good
    assert "note: tests: 1 of 2 connections; --top shows more" in command_line(monkeypatch, run, "-n", "1")
    document = json.loads(command_line(monkeypatch, run, "--json", "--health", "healthy"))
    assert document["version"] == 1
    (program,) = document["programs"]
    assert [one["endpoint"] for one in program["connections"]] == ["192.0.2.7:8009"]


def test_the_history_of_a_connection(
    two: ConnectionsState, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    CONNECTIONS.write(two, file_name(), run)
    number = str(two.connections[1].connection)
    lines = command_line(monkeypatch, run, "--connection", number).splitlines()
    assert f"connection {number}, 192.0.2.7:8009: last changes" in lines
    assert lines[-1] == "100.020 connecting -> connected: opened"
    fresh = msgspec.structs.replace(
        two, total=1, connections=[msgspec.structs.replace(two.connections[1], history=[])]
    )
    for path in CONNECTIONS.path(run).iterdir():
        path.unlink()
    CONNECTIONS.write(fresh, file_name(), run)
    assert command_line(monkeypatch, run, "--connection", number).endswith("nothing has happened to it\n")


def test_watching(two: ConnectionsState, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def twice(_interval: float) -> Any:
        yield 0
        CONNECTIONS.write(two, file_name(), run)
        yield 1

    monkeypatch.setattr(command, "samples", twice)
    assert "no program tells of connections" in command_line(monkeypatch, run, "--watch")
    first, second = command_line(monkeypatch, run, "--watch", "--json").splitlines()
    assert len(json.loads(first)["programs"]) == 1
    assert len(json.loads(second)["programs"]) == 2


def test_more_than_are_told(two: ConnectionsState, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    CONNECTIONS.write(msgspec.structs.replace(two, total=5000), file_name(), run)
    assert "note: tests: it tells of 2 of 5000, the worst" in command_line(monkeypatch, run)
