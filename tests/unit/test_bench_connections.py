# SPDX-License-Identifier: Apache-2.0
"""`sluice bench connections`: what is measured is what is said, not how fast a busy machine was."""

from __future__ import annotations

import json
import sys
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
from click.testing import CliRunner

from sluice_cli import bench_connections as bench
from sluice_cli import bench_connections_cycles as cycles
from sluice_cli import bench_connections_memory as memory
from sluice_cli.bench_connections_rivals import Timed, asyncpg, psycopg_pool, timed
from userspace.connection.heartbeat import Heartbeats
from userspace.connection.udp import UdpConnection
from xdp.errors import SluiceError, UnsupportedError, UsageError


def test_all_connections_of_the_pool_are_live_and_come_back() -> None:
    pool = bench.live_pool(50)
    assert (pool.idle_count, pool.opening_count) == (50, 0)
    for found in (
        bench.run_lookup(pool, 50, 200),
        bench.run_loans(pool, 50, 200, named=True),
        bench.run_loans(pool, 50, 200, named=False),
    ):
        assert found[0] > 0
        assert len(found[1]) == 200
    assert pool.idle_count == 50
    told = pool.snapshot()
    assert told.acquired == told.returned == 800
    assert told.missed == 0


def test_each_call_is_timed() -> None:
    calls: list[int] = []
    spent, each = timed(lambda: calls.append(1), 5, 7)
    assert len(calls) == 12
    assert len(each) == 7
    assert spent >= 0


def test_rows_of_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a pool that is not installed it is said so."""

    def missing(_size: int, _calls: int) -> Any:
        raise UnsupportedError("asyncpg: no module")

    monkeypatch.setattr(bench, "CALLS", 100)
    monkeypatch.setattr(bench, "asyncpg", missing)
    monkeypatch.setattr(bench, "psycopg_pool", lambda _size, calls: (1e-3, [2000] * calls))
    done = CliRunner().invoke(bench.connections, ["--only", "calls", "--connections", "20", "--json"])
    assert done.exit_code == 0, done.output
    rows = {row["way"]: row for row in json.loads(done.output)["results"]}
    assert {row["direction"] for row in rows.values()} == {"calls"}
    assert {row["connections"] for row in rows.values()} == {20}
    assert rows["asyncpg acquire, release"]["skipped"] == "asyncpg: no module"
    other = rows["psycopg_pool getconn, putconn"]
    assert other["mean_us"] == pytest.approx(10)  # a millisecond for 100 calls
    assert 0 <= other["p99_us"] < 2.0, "what the clock takes is off"
    ours = rows["sluice lookup"]
    assert ours["mean_us"] > 0
    assert 0 <= ours["p99_us"] <= ours["max_us"]
    shown = CliRunner().invoke(bench.connections, ["--only", "calls", "--connections", "20", "--rounds", "1"])
    assert "note: asyncpg acquire, release: asyncpg: no module" in shown.output
    (line,) = [line for line in shown.output.splitlines() if line.startswith("asyncpg")]
    assert line.split()[-3:] == ["-", "-", "-"]


def test_idle_connections_are_idle_and_answered() -> None:
    conductor = memory.make(0.0, 30, lambda _: UdpConnection(secret=bytes(16)))
    peer = Heartbeats(secret=bytes(16), boot=1)
    answers: deque[memory.Answer] = deque()
    now = memory.run(conductor, peer, answers, 0.0, 10.0)
    with pytest.raises(SluiceError, match="of 31 are idle"):
        memory.check(conductor, 31)
    memory.check(conductor, 30)
    assert cycles.timers() >= 30, "each connection has at least one"
    memory.run(conductor, peer, answers, now, 60.0)
    told = conductor.snapshot().health
    assert told.healthy == 30
    assert told.probes == told.failed == 0
    assert told.asked == told.answered + told.open > 30 * 9
    for number in conductor.links:
        assert conductor.monitor.peak_latency(60.0, number) == pytest.approx(memory.ROUND_TRIP, abs=1e-4)


def test_the_process_that_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["", "udp", "200"])
    memory.main()
    row = json.loads(capsys.readouterr().out)
    assert (row["kind"], row["connections"]) == ("udp", 200)
    assert row["idle_cpu"] > 0
    for words in ([""], ["", "tcp", "7"]):
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(UsageError):
            memory.main()


def test_memory_of_quic_connections() -> None:
    (row,) = bench.memory_rows(0, 8, lambda _: None)
    assert (row["direction"], row["kind"], row["connections"]) == ("memory", "quic", 8)
    assert row["bytes"] > 8 * 10_000
    (line,) = list(bench.memory_table([row]).lines())[2:]
    assert line.split()[:2] == ["quic", "8"]
    assert line.endswith("-")


def test_a_child_that_fails_says_why() -> None:
    with pytest.raises(SluiceError, match=r"bench_connections_memory tcp: .*udp or quic"):
        bench._child("bench_connections_memory", "tcp", "7")


def test_cycles_leave_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    done = CliRunner().invoke(bench.connections, ["--only", "cycles", "--minutes", "0.05", "--json"])
    assert done.exit_code == 0, done.output
    (row,) = json.loads(done.output)["results"]
    assert (row["direction"], row["minute"]) == ("cycles", 0.05)
    # 500 are due in three seconds; what is under way at the end is at most a few.
    assert 250 < row["cycles"] <= 500
    assert row["late"] == 0
    assert row["connections"] <= cycles.PEERS
    assert row["timers"] <= 20 * cycles.PEERS
    (line,) = list(bench.cycles_table([row]).lines())[2:]
    assert line.split()[0] == "0.05"


def test_cycles_have_to_be_told_how_long(monkeypatch: pytest.MonkeyPatch) -> None:
    for words in ([""], ["", "x"]):
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(UsageError):
            cycles.main()


@pytest.mark.parametrize("run", [psycopg_pool, asyncpg])
def test_pools_of_others_without_a_database(run: Callable[[int, int], Timed]) -> None:
    spent, each = run(20, 50)
    assert spent > 0
    assert len(each) == 50
    assert min(each) > 0
