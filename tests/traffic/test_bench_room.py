# SPDX-License-Identifier: Apache-2.0
"""Where `sluice bench` measures: modes, lanes, traffic beside questions, a path that fails."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from sluice_cli.bench_machine import cpus
from sluice_cli.bench_measure import Contender, Progress, measure
from sluice_cli.bench_process import read_report
from sluice_cli.bench_room import PORT, Room, Task
from tests.traffic.served import until
from xdp.link import attached_program

pytestmark = [pytest.mark.root, pytest.mark.bpf]


@pytest.fixture(scope="module")
def room() -> Iterator[Room]:
    with Room(*cpus(same_core=len(os.sched_getaffinity(0)) < 2)) as made:
        yield made


def mode(room: Room) -> str:
    with room.lab.server.enter():
        found = attached_program(room.lab.server.ifindex)
    assert found is not None
    return found[1]


def test_each_mode_is_what_it_says(room: Room) -> None:
    for wanted in ("generic", "native"):
        before = room.program.counters().steered
        sample = room.measure(Task("sluice", "receive", 512, 64, 0.1, mode=wanted))
        assert mode(room) == wanted
        assert room.program.counters().steered > before
        assert sample.packets_per_second > 0
        assert sample.rss_kib > sample.umem_kib > 0


def test_a_path_that_fails_costs_its_own_rows(room: Room) -> None:
    said: list[str] = []
    chosen = [Contender("broken", "nothing", 1), Contender("socket", "socket", 1)]
    rows = measure(
        room,
        "receive",
        chosen,
        sizes=[64],
        seconds=0.1,
        runs=2,
        progress=Progress(said.append, survive=True),
    )
    broken, other = rows
    assert "KeyError" in broken["error"]
    assert (broken["path"], broken["size"], broken["direction"]) == ("broken", 64, "receive")
    assert other["packets_per_second"] > 0
    assert other["runs"] == 2
    assert sum("broken" in line for line in said) == 2  # tried once, failed once


def test_questions_and_flood_have_lanes_of_their_own(room: Room) -> None:
    task = Task("sluice", "echo", 32, 64, 10.0, lanes=2)
    with room.two_lanes(), room.dropping_client(answers_only=True), room.running(task):
        before = [lane.seen.packets for lane in room.program.counters().lanes[:2]]
        with room.traffic(22, 10.0, 20_000):
            asked = room.round_trips(PORT, size=32, seconds=0.2, interval_us=1000, beside_traffic=True)
        after = [lane.seen.packets for lane in room.program.counters().lanes[:2]]
    assert asked["packets"] > asked["lost"]
    questions, flood = (now - then for now, then in zip(after, before, strict=True))
    # The interface may have had no room for a question; none was taken for anything else.
    assert asked["packets"] - asked["lost"] <= questions <= asked["packets"]
    assert flood > questions


def test_a_server_that_is_not_there_answers_nothing(room: Room) -> None:
    with room.dropping_server():
        asked = room.round_trips(PORT, size=32, seconds=0.1, interval_us=5000, beside_traffic=True)
    assert asked["lost"] == asked["packets"] > 0
    assert mode(room) == "native"


def test_the_paced_sender_keeps_its_rate(room: Room) -> None:
    """Never more than that, less only by what a busy machine kept it waiting for; all of it arrives."""
    words = ["--address", str(room.lab.server.ipv4), "--port", str(PORT), "--size", "22"]
    before = room.program.counters().seen.packets
    with room.client_process("mmsg_paced", [*words, "--rate", "10000", "--seconds", "0.3"]) as process:
        report = read_report(process, "mmsg_paced")
    # One tick more may have begun in time.
    assert 0.3 * report["seconds"] * 10_000 < report["packets"] <= report["seconds"] * 10_000 + 1
    until(lambda: room.program.counters().seen.packets - before >= report["packets"], "all seen")
