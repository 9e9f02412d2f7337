# SPDX-License-Identifier: Apache-2.0
"""`sluice bench program`: every row is there, and the packets went the way that the row says."""

from __future__ import annotations

import json
import os

import pytest

from sluice_cli import bench_program
from sluice_cli.main import main
from xdp.counters import Counters
from xdp.program import SteerProgram

pytestmark = pytest.mark.bpf


def test_rows(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[Counters] = []
    close = SteerProgram.close

    def counted_close(program: SteerProgram) -> None:
        if program.fd >= 0:
            ended.append(program.counters())
        close(program)

    monkeypatch.setattr(SteerProgram, "close", counted_close)
    assert main(["bench", "program", "--seconds", "0.5", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["version"] == 1
    rows = document["results"]
    assert [(row["case"], row["family"], row["peers"]) for row in rows] == [
        (case, family, peers)
        for case, peers in (
            ("not ours", "hot"), ("configured peer", "hot"), ("stranger", "hot"),
            ("stranger, lane limit", "hot"), ("stranger", "random"), ("stranger", "new"),
        )
        for family in ("v4", "v6")
    ]  # fmt: skip
    for row in rows:
        assert 0 < row["empty_ns"] <= row["ns_per_packet"] < 100_000
    *drawn, hot = ended  # in the order in which they are closed
    new, random = drawn[:2], drawn[2:]
    for counters in ended:
        assert counters.balanced
        # All its way: a socket took it, and the metadata was written each time.
        assert counters.verdicts.keys() - {"drop_lane_limit"} <= {"pass_not_ours", "steer"}
        assert counters.metadata_refused == 0
    assert hot.verdicts["pass_not_ours"].packets > 0
    assert hot.strangers_created == 2
    assert len(new) == len(random) == 2
    for counters in drawn:
        assert counters.verdicts.keys() == {"steer"}
    for counters in random:
        # Nearly all addresses were drawn, and were there when they came again.
        assert counters.strangers_created >= 0.99 * bench_program._RANDOM_PEERS
        assert counters.strangers_created <= 0.2 * counters.seen.packets
    for counters in new:
        # Hardly anyone came twice while the table knew it.
        assert counters.strangers_created >= 0.95 * counters.seen.packets


def test_the_cpu_is_given_back() -> None:
    before = os.sched_getaffinity(0)
    cases, empty = bench_program.measure(0.5)
    assert os.sched_getaffinity(0) == before
    assert len(cases) == 12
    assert empty > 0
