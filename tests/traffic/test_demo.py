# SPDX-License-Identifier: Apache-2.0
"""`sluice demo`: shows what it promises, says so in JSON, fails when the promise does, leaves nothing."""

from __future__ import annotations

import struct
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import pytest

from sluice_cli.demo import POLICY
from sluice_cli.demo_report import build_report, tables
from sluice_cli.example_policy import example_policy
from tests.traffic.commands import interrupt, refused, report, run
from xdp.counters import Count, Counters, LaneCounters
from xdp.policy import Policy

pytestmark = [pytest.mark.root, pytest.mark.bpf]

LANES = ["votes", "shreds-data", "shreds-code", "repair", "gossip", "tpu", "bulk"]
# libpcap's file header: magic, version 2.4, zone, accuracy, snapshot length, Ethernet
PCAP = struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 65535, 1)


def check(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """All that the issue asks for is there, and the sums are right.  Lanes by name."""
    assert document["mode"] in {"native-copy", "native-zero-copy", "generic-copy"}
    assert [lane["name"] for lane in document["lanes"]] == LANES
    assert [lane["priority"] for lane in document["lanes"]] == list(range(len(LANES)))
    for lane in document["lanes"]:
        assert lane["seen"] == lane["received"] + sum(lane["dropped"].values())
        assert lane["lost"] == lane["sent"] - lane["received"]
        assert lane["lost_before_program"] == lane["sent"] - lane["seen"] >= 0
        assert lane["balanced"] is True
        assert (lane["packets_per_second"] > 0) == (lane["received"] > 0)
        p50, p99 = lane["latency_us"]["p50"], lane["latency_us"]["p99"]
        assert (p50 is None) == (p99 is None) == (lane["received"] == 0)
        assert p50 is None or 0 < p50 <= p99
    lanes = {lane["name"]: lane for lane in document["lanes"]}
    steered = sum(lane["seen"] for lane in document["lanes"])
    assert document["verdicts"]["steer"] == steered
    assert document["seen"] == sum(document["verdicts"].values())
    assert document["balanced"] is True
    assert document["ok"] is True
    votes, bulk = lanes["votes"], lanes["bulk"]
    assert votes["sent"] == votes["seen"] == votes["received"] > 0
    assert votes["dropped"] == {}
    assert bulk["seen"] >= 10 * bulk["received"] > 0
    busiest = document["peers"][0]
    assert (busiest["address"], busiest["class_name"], busiest["name"]) == (
        "10.81.0.2",
        "staked",
        "lab-client",
    )
    return lanes


def test_json() -> None:
    lanes = check(report("demo", "--seconds", "2"))
    for name in ("shreds-data", "shreds-code"):
        assert lanes[name]["sent"] == lanes[name]["received"] > 0
    assert all(lanes[name]["sent"] == 0 for name in ("repair", "gossip", "tpu"))


def test_capture(vectors: Path) -> None:
    """512 of 512, in the right lanes, while the flood goes on."""
    document = report("demo", "--seconds", "2", "--pcap", str(vectors / "demo-shreds.pcap"))
    lanes = check(document)
    assert document["capture"]["sent"] == document["capture"]["read"] == 512
    assert document["capture"]["payloads"] == {
        "shreds-data": {"sent": 256, "intact": 256},
        "shreds-code": {"sent": 256, "intact": 256},
    }
    assert [lanes[name]["received"] for name in ("shreds-data", "shreds-code")] == [256, 256]


def test_for_people() -> None:
    done = run("demo", "--seconds", "1", "--flood", "200000")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    for text in (*LANES, "busiest peers", "10.81.0.2", "staked", "all counters add up"):
        assert text in done.stdout
    assert "\x1b" not in done.stdout  # no terminal, no colour


class TestRefused:
    """Before anything is built, so at once."""

    def test_no_such_capture(self, tmp_path: Path) -> None:
        code, error = refused("demo", "--pcap", str(tmp_path / "none.pcap"))
        assert code == 2
        assert "none.pcap" in error["message"]

    @pytest.mark.parametrize(
        "content",
        [
            b"",
            b"not a capture at all",
            PCAP[:20],
            PCAP,
            PCAP + struct.pack("<IIII", 0, 0, 1 << 30, 1 << 30),
            PCAP + struct.pack("<IIII", 0, 0, 60, 60) + bytes(59),
        ],
        ids=["empty", "text", "half a header", "no packets", "huge packet", "cut off"],
    )
    @pytest.mark.parametrize("command", ["demo", "replay"])
    def test_a_corrupt_capture(self, tmp_path: Path, content: bytes, command: str) -> None:
        path = tmp_path / "corrupt.pcap"
        path.write_bytes(content)
        words = ["demo", "--pcap", str(path)] if command == "demo" else ["replay", str(path), "--to", "::1"]
        if command == "replay" and content == PCAP:  # readable, with nothing in it
            done = run(*words)
            assert (done.returncode, "nothing was sent" in done.stderr) == (1, True)
            return
        code, error = refused(*words)
        assert 0 < code < 10
        assert "corrupt.pcap" in error["message"]

    def test_without_privileges(self) -> None:
        code, error = refused("demo", nobody=True)
        assert code == 4
        assert error["type"] == "PermissionsError"

    def test_options_out_of_range(self) -> None:
        assert refused("demo", "--seconds", "0")[0] == 2
        assert refused("demo", "--flood", "-1")[0] == 2


@pytest.mark.parametrize(("whom", "when"), [("terminal", "program"), ("process", "lab")])
def test_interrupted(whom: Literal["process", "terminal"], when: Literal["lab", "program"]) -> None:
    interrupt("demo", "--seconds", "60", "--json", whom=whom, when=when)


class TestVerdict:
    """`ok` is false as soon as one thing is wrong; these documents are made by hand."""

    def document(self, **changes: Any) -> dict[str, Any]:
        policy = Policy.load(example_policy(POLICY))
        facts: dict[str, Any] = {"votes": 100, "votes_seen": 100, "votes_received": 100, "bulk": 1000}
        facts |= {"bulk_received": 50, "frames_balanced": True, "seen": 1100, "intact": 1} | changes
        lanes = []
        for name in LANES:
            seen = {"votes": facts["votes_seen"], "bulk": facts["bulk"]}.get(name, 0)
            verdicts = {"steer": Count(seen, seen)} if seen else {}
            lanes.append(LaneCounters(Count(seen, seen), 0, 0, verdicts))
        total = Count(facts["votes_seen"] + facts["bulk"], facts["votes_seen"] + facts["bulk"])
        counters = Counters(
            seen=Count(facts["seen"], facts["seen"]),
            lanes=tuple(lanes),
            other={},
            strangers_created=0,
            strangers_refused=0,
            metadata_refused=0,
            limit_contended=0,
            totals={"steered": total},
        )
        nothing = [0] * 5
        made = build_report(
            policy=policy,
            sent={"votes": facts["votes"], "bulk": facts["bulk"]},
            missed=0,
            digests={"shreds-data": Counter({"aa": 1})},
            capture={"sent": 1},
            receiver={
                "mode": "native-copy",
                "received": [facts["votes_received"], *nothing, facts["bulk_received"]],
                "ring_full": {"bulk": facts["bulk"] - facts["bulk_received"]},
                "socket_dropped": {},
                "waiting": {},
                "latency_us": [None] * 7,
                "frames_balanced": facts["frames_balanced"],
                "digests": {"1": ["aa"] * facts["intact"]},
            },
            counters=counters,
            peers=[],
            seconds=1.0,
        )
        assert ("FAILED" in str([list(table.lines()) for table in tables(made)])) == (not made["ok"])
        return made

    def test_all_is_well(self) -> None:
        assert self.document()["ok"] is True

    @pytest.mark.parametrize(
        "changes",
        [
            {"votes_received": 99},
            {"votes": 101},
            {"votes": 0, "votes_seen": 0, "votes_received": 0, "seen": 1000},
            {"bulk_received": 101},
            {"frames_balanced": False},
            {"seen": 1101},
            {"intact": 0},
        ],
        ids=",".join,
    )
    def test_one_thing_is_wrong(self, changes: dict[str, Any]) -> None:
        assert self.document(**changes)["ok"] is False
