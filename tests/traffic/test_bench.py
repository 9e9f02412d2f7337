# SPDX-License-Identifier: Apache-2.0
"""`sluice bench`: every path runs and reports; ratios are those of the rates.  No number is judged here."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from sluice_cli.bench import ECHO, FANOUT, LATENCY, MANAGER, RECEIVE, TRANSMIT
from sluice_cli.bench_soak_worker import PATHS
from tests.traffic.commands import interrupt, refused, report, run

pytestmark = [pytest.mark.root, pytest.mark.bpf]

SHORT = ("--seconds", "0.2", "--runs", "1")
#: On a machine with one CPU generator and receiver share it.
SAME = () if len(os.sched_getaffinity(0)) > 1 else ("--same-core",)


#: What ratios are to, unless it is xsk-c.
REFERENCES = {
    "sluice-touch": "xsk-c-touch",
    "sluice-linger-touch": "xsk-c-touch",
    "sluice-generic": "xsk-generic-c",
}


def uses_frames(path: str) -> bool:
    kernel_sockets = ("sluice-mmsg", "sluice-portable")
    return path.startswith(("sluice", "xsk")) and not path.startswith(kernel_sockets)


def check(document: dict[str, Any], direction: str, size: int, names: list[str]) -> dict[str, Any]:
    """Rows by path, all that the issue asks for in each."""
    machine = document["machine"]
    assert machine["cpus"] == os.cpu_count()
    assert machine["kernel"] == os.uname().release
    rows = {row["path"]: row for row in document["results"] if row["size"] == size}
    assert list(rows) == names
    kernel = "sendmmsg-c" if direction in {"transmit", "fanout", "manager"} else "recvmmsg-c"
    for row in rows.values():
        assert row["direction"] == direction
        assert row["batch"] > 0
        assert row["packets_per_second"] > 0
        assert row["process_cpu_ns"] > 0
        assert row["machine_cpu_ns"] >= 0
        assert 0 <= row["loss"] < 1
        assert row["rss_kib"] > 1000
        assert (row["umem_kib"] > 0) == uses_frames(row["path"])
        for ratio, reference in (
            ("ratio_to_c", REFERENCES.get(row["path"], "xsk-c")),
            ("ratio_to_recvmmsg", kernel),
        ):
            if reference in rows:
                expected = row["packets_per_second"] / rows[reference]["packets_per_second"]
                assert row[ratio] == pytest.approx(expected, abs=0.01, rel=0.01)
            else:
                assert row[ratio] is None
    return rows


def test_receive_all_paths() -> None:
    names = [path.name for path in RECEIVE]
    check(report("bench", "receive", "--size", "64", *SHORT, *SAME), "receive", 64, names)


def test_receive_large_payloads_and_medians() -> None:
    words = ("--size", "1232", "--path", "sluice", "--path", "xsk-c", "--seconds", "0.2", "--runs", "2")
    rows = check(report("bench", "receive", *words, *SAME), "receive", 1232, ["xsk-c", "sluice"])
    assert {row["runs"] for row in rows.values()} == {2}


def test_transmit_all_paths() -> None:
    names = [path.name for path in TRANSMIT]
    check(report("bench", "transmit", "--size", "64", *SHORT, *SAME), "transmit", 64, names)


def test_fanout_all_paths() -> None:
    names = [path.name for path in FANOUT]
    check(report("bench", "fanout", "--size", "1232", *SHORT, *SAME), "fanout", 1232, names)


def test_echo_all_paths() -> None:
    names = [path.name for path in ECHO]
    check(report("bench", "echo", "--size", "64", *SHORT, *SAME), "echo", 64, names)


two_cpus = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="generator and path have a CPU each")


@two_cpus
def test_latency_of_all_idle_paths() -> None:
    document = report("bench", "latency", "--seconds", "0.2", "--load", "idle")
    assert [row["path"] for row in document["results"]] == ["heartbeat", *(path.name for path in LATENCY)]
    for row in document["results"]:
        assert row["packets"] > 0
        assert row["lost"] >= 0
        figures = row["latency_us"]
        assert 0 < figures["p50"] <= figures["p99"] <= figures["p99.9"]


@two_cpus
def test_latency_under_load() -> None:
    words = ("--path", "sluice", "--path", "xsk-c", "--load", "half", "--load", "flood", "--seconds", "0.2")
    rows = report("bench", "latency", *words)["results"]
    assert [(row["load"], row["path"]) for row in rows] == [
        (load, path) for load in ("half", "flood") for path in ("xsk-c", "sluice")
    ]
    for row in rows:
        assert row["packets"] > 100
        assert row["lost"] <= row["packets"]
        assert (row["beside_packets_per_second"] is None) == (row["load"] == "flood")
        if row["load"] == "half":
            assert row["beside_packets_per_second"] > 0
    for reference, own in (rows[:2], rows[2:]):
        if own["latency_us"]["p50"] and reference["latency_us"]["p50"]:
            ratio = own["latency_us"]["p50"] / reference["latency_us"]["p50"]
            assert own["latency_ratio_to_c"]["p50"] == pytest.approx(ratio, abs=0.01)


@two_cpus
def test_all_in_one_run(tmp_path: Path) -> None:
    """Each kind of benchmark, in moments; the page has a section for each, and no plot is missing."""
    page = tmp_path / "page.md"
    sections = ("echo", "batch", "latency", "soak")
    words = ["--quick", "--path", "sluice"]
    words += [word for name in sections for word in ("--only", name)]
    document = report("bench", "all", *words, "--report", str(page))
    rows = document["results"]
    assert [row for row in rows if "error" in row] == []
    asked = {row["direction"] for row in rows if "latency_us" in row}
    assert asked == {"latency", "batch"}
    assert {row["direction"] for row in rows} == set(sections)
    assert {row["load"] for row in rows if row["direction"] == "latency"} == {"idle", "half", "flood"}
    assert {row["batch"] for row in rows if row["direction"] == "batch"} == {1, 256}
    assert document["made"]["took_seconds"] > 0
    text = page.read_text(encoding="utf-8")
    plots = re.findall(r"\]\((page/\S+\.svg)\)", text)
    assert len(plots) == 4
    for plot in plots:
        assert (tmp_path / plot).read_text(encoding="utf-8").startswith("<svg ")


def test_for_people_on_one_core() -> None:
    done = run("bench", "receive", "--size", "64", "--path", "sluice", "--same-core", *SHORT)
    assert done.returncode == 0, done.stderr
    head, columns, row = done.stdout.splitlines()
    assert head == "receive"
    assert "packets/s" in columns
    assert row.split()[:3] == ["sluice", "64", "256"]


def test_interrupted() -> None:
    command = ("bench", "receive", *SAME) if SAME else ("bench", "all")
    interrupt(*command, "--seconds", "60", "--json", whom="terminal", when="program")


def test_options_out_of_range() -> None:
    assert refused("bench", "receive", "--path", "nothing")[0] == 2
    assert refused("bench", "echo", "--size", "65")[0] == 2


def test_without_privileges() -> None:
    assert refused("bench", "receive", nobody=True)[0] == 4


def test_manager_all_paths() -> None:
    names = [path.name for path in MANAGER]
    check(report("bench", "manager", "--size", "64", *SHORT, *SAME), "manager", 64, names)


def test_soak_of_all_paths() -> None:
    """At a rate that every machine can take: nothing is lost, and all adds up."""
    document = report("bench", "soak", "--minutes", "0.05", "--rate", "5000", "--size", "200")
    assert document["ok"]
    assert [row["path"] for row in document["results"]] == list(PATHS)
    for row in document["results"]:
        assert row["direction"] == "soak"
        assert row["sent"] == row["received"] == 15_000
        assert (row["lost"], row["dropped"], row["balanced"], row["ok"]) == (0, {}, True, True)
        assert row["process_cpu_ns"] > 0
        assert row["rss_kib"] > 1000
        assert row["descriptors"] >= 4
        assert row["rss_kib_per_hour"] is None


def test_soak_that_is_too_fast_says_what_it_lost() -> None:
    """Plain sockets in Python take no two million packets a second."""
    done = run(
        "bench",
        "soak",
        "--minutes",
        "0.03",
        "--rate",
        "2000000",
        "--path",
        "socket",
        "--size",
        "64",
        "--json",
    )
    assert done.returncode == 1
    (row,) = json.loads(done.stdout)["results"]
    assert row["lost"] > 0
    assert not row["ok"]
    assert row["balanced"], row
    assert sum(row["dropped"].values()) == row["lost"]
