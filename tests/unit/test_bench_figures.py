# SPDX-License-Identifier: Apache-2.0
"""What `sluice bench` makes of what it measured: medians, ratios, idle time, targets, plans."""

from __future__ import annotations

from typing import Any

import pytest

from sluice_cli.bench import ECHO, RECEIVE
from sluice_cli.bench_all import QUICK, Plan
from sluice_cli.bench_cpu import LOADS, Window, _figures, idle_seconds, with_targets
from sluice_cli.bench_latency import latency_table, with_ratios
from sluice_cli.bench_measure import Progress, rates, rates_table
from sluice_cli.bench_room import Sample, bench_policy, two_lanes_policy
from sluice_cli.main import main
from xdp.classify import Classifier
from xdp.errors import SluiceError


def samples(*speeds: float, cpu: float = 100.0) -> list[Sample]:
    return [Sample(speed, cpu, 2 * cpu, 0.25, int(speed), 7) for speed in speeds]


def test_medians_and_ratios_to_the_same_mode() -> None:
    paths = {path.name: path for path in RECEIVE}
    found = {
        ("xsk-c", 512): samples(100, 300, 200),
        ("xsk-generic-c", 512): samples(50, 50, 50),
        ("recvmmsg-c", 512): samples(20),
        ("sluice-generic", 512): samples(40, 10, 1000, cpu=50),
    }
    native = rates(paths["xsk-c"], "receive", 512, found)
    assert (native["packets_per_second"], native["ratio_to_c"], native["ratio_to_recvmmsg"]) == (200, 1, 10)
    generic = rates(paths["sluice-generic"], "receive", 512, found)
    assert (generic["ratio_to_c"], generic["cpu_ratio_to_c"], generic["runs"]) == (0.8, 0.5, 3)
    assert (generic["rss_kib"], generic["umem_kib"]) == (1000, 7)  # the most of all runs
    failed = {"path": "uvloop", "direction": "receive", "size": 512, "batch": 1, "error": "gone"}
    shown = list(rates_table("receive", [native, failed]).lines())
    assert shown[-1].split()[:4] == ["uvloop", "512", "1", "failed"]


def trips(path: str, p50: float | None) -> dict[str, Any]:
    return {
        "path": path, "load": "flood", "packets": 9, "lost": 0, "beside_packets_per_second": None,
        "latency_us": {"p50": p50, "p99": p50, "p99.9": p50},
    }  # fmt: skip


def test_latencies_are_divided_by_those_of_c() -> None:
    rows = with_ratios(
        [trips("heartbeat", 2.0), trips("xsk-c", 20.0), trips("sluice", 30.0), trips("recvmmsg-c", 40.0),
         trips("asyncio", 100.0), trips("socket", None), {"path": "uvloop", "load": "flood", "error": "gone"}]
    )  # fmt: skip
    ratios = {row["path"]: row.get("latency_ratio_to_c") for row in rows}
    assert ratios["heartbeat"] is None
    assert ratios["sluice"] == {"p50": 1.5, "p99": 1.5, "p99.9": 1.5}
    assert ratios["asyncio"] == {"p50": 2.5, "p99": 2.5, "p99.9": 2.5}
    assert ratios["socket"] == {"p50": None, "p99": None, "p99.9": None}
    assert "latency_ratio_to_c" not in rows[-1]
    assert len(list(latency_table(rows).lines())) == 2 + len(rows)


def test_idle_time_is_that_of_all_cpus_with_waiting_for_the_disk() -> None:
    text = "cpu  1 2 3 400 50 6 7 8 0 0\ncpu0 1 2 3 200 25 6 7 8 0 0\nintr 5\n"
    assert idle_seconds(text, 100) == 4.5


def cost(path: str, machine_ns: float, why: str | None = None) -> dict[str, Any]:
    return {"path": path, "machine_cpu_ns": machine_ns, "not_valid": why}


def test_the_senders_cost_is_subtracted() -> None:
    load = LOADS[1]  # 50,000/s
    figures = _figures(load, Window(2.0, 1.0, 3.0), 50_000.0, Window(4.0, 1.0, 7.0), 0.01)
    assert figures["machine_cpu_ns"] == pytest.approx((0.5 - 0.25) * 1e9 / 50_000)
    assert figures["not_valid"] is None
    full = _figures(load, Window(2.0, 4.0, 0.0), 50_000.0, None, 0.01)
    slow = _figures(load, Window(2.0, 1.0, 3.0), 30_000.0, None, 0.01)
    assert full["not_valid"] == slow["not_valid"] == "the machine was full"
    assert _figures(load, Window(2.0, 1.0, 3.0), 50_000.0, None, 0.4)["not_valid"] == "other work"


def test_targets_are_judged_where_there_is_something_to_judge() -> None:
    load = LOADS[0]
    assert (load.rate, load.reference.name, load.target) == (200_000, "recvmmsg-c", 0.5)
    assert (LOADS[1].rate, LOADS[1].reference.name, LOADS[1].target) == (50_000, "asyncio", 0.1)
    reference, good, bad, noisy, failed = with_targets(
        [cost("recvmmsg-c", 1000.0), cost("sluice", 500.0), cost("sluice-linger", 501.0),
         cost("sluice", 10.0, "other work"), {"path": "sluice", "error": "gone"}], load
    )  # fmt: skip
    rival = with_targets([cost("recvmmsg-c", 1000.0), cost("recvmmsg-linger-c", 250.0)], load)[1]
    assert rival["machine_cpu_ratio"] == 0.25
    assert "target" not in rival
    assert reference["machine_cpu_ratio"] == 1
    assert "target" not in reference
    assert (good["target_met"], bad["target_met"]) == (True, False)
    assert noisy["machine_cpu_ratio"] is None
    assert "target" not in noisy
    assert failed == {"path": "sluice", "error": "gone"}
    for useless in (cost("recvmmsg-c", -1.0), cost("recvmmsg-c", 5.0, "the machine was full")):
        (_, row) = with_targets([useless, cost("sluice", 1.0)], load)
        assert row["machine_cpu_ratio"] is None


def test_a_path_that_fails_costs_its_own_row() -> None:
    said: list[str] = []

    def fails() -> dict[str, Any]:
        raise SluiceError("it is broken")

    named = {"path": "broken", "direction": "echo"}
    assert Progress(said.append, survive=True).attempt(named, fails) == {**named, "error": "it is broken"}
    assert said == ["echo: broken failed: it is broken"]
    with pytest.raises(SluiceError):
        Progress(said.append).attempt(named, fails)


def test_questions_have_the_high_lane_and_the_flood_the_low_one() -> None:
    """As tools/bench/ping.c asks: a heartbeat's payload."""
    question = b"SLHB\x01" + bytes(27)
    classifier = Classifier(two_lanes_policy(9000))
    lanes = [
        classifier.classify_datagram("10.81.0.2", 9000, payload, 0).lane for payload in (question, bytes(22))
    ]
    assert lanes == [0, 1]
    assert [bench_policy(9000, timestamps=wanted).lanes[0].timestamps for wanted in (False, True)] == [
        False,
        True,
    ]
    one = Classifier(bench_policy(9000))
    assert one.classify_datagram("10.81.0.2", 9000, bytes(22), 0).lane == 0


def test_a_plan_says_how_long_it_takes() -> None:
    assert Plan(sections=("soak",), soak_seconds=100).estimate() > 400
    assert Plan(sections=("cpu",), cpu_seconds=10).estimate() > 90
    assert Plan().estimate() == pytest.approx(sum(
        Plan(sections=(name,)).estimate() - Plan(sections=()).estimate() for name in Plan().sections
    ) + Plan(sections=()).estimate())  # fmt: skip
    assert QUICK.estimate() < 60
    only = Plan(paths=frozenset(("sluice",)))
    assert (
        [path.name for path in only.contenders("echo")] == [path.name for path in only.asked()] == ["sluice"]
    )
    assert len(Plan().contenders("echo")) == len(ECHO)


def test_an_unknown_path_or_folder_is_told_before_anything_is_built(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["bench", "all", "--path", "slice"]) == 2
    assert "no path 'slice'" in capsys.readouterr().err
    assert main(["bench", "all", "--report", "no/such/folder/page.md"]) == 2
    assert "there is no folder no/such/folder" in capsys.readouterr().err
