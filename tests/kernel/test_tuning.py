# SPDX-License-Identifier: Apache-2.0
"""``[tuning]`` on a real veth: set, shown, put back or left alone; sockets poll, readers are pinned."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sluice_cli.lab import Lab
from tests.kernel.owned import ENVIRONMENT, POLICY, SECONDS, Up, command, left_behind, sender
from tests.ordinary_user import readable_python
from userspace.datagram.lanes import Lanes, open_lanes
from userspace.datagram.owned_lanes import open_owned
from userspace.datagram.owner import Owner
from userspace.datagram.xsk_lanes import XskLanes
from xdp.errors import UnsupportedError
from xdp.interface import SETTINGS, Tuning, _sysfs_access
from xdp.policy import Policy
from xdp.probe_interface import probe_interface
from xdp.queue_cpus import queue_cpus

pytestmark = [pytest.mark.root, pytest.mark.bpf]

CPU = max(os.sched_getaffinity(0))
TUNED = f"""
{POLICY}
[tuning]
busy_poll = "50us"
busy_poll_budget = 64
prefer_busy_poll = true
napi_defer_hard_irqs = 2
gro_flush_timeout = "20us"
pin = [{CPU}]
"""
AF_XDP, SO_BUSY_POLL, SO_PREFER_BUSY_POLL = 44, 46, 69  # this Python has no names for them
TIMERS = ("napi_defer_hard_irqs", "gro_flush_timeout")
#: ns: longer than any test waits, so that what arrives was polled for.
NEVER = 300 * 10**9

# Opens sockets as nobody: what it hears, and what it gets.
UNPRIVILEGED = """
import os, sys, warnings
os.setgroups([]); os.setgid(65534); os.setuid(65534)
from userspace.datagram.lanes import open_lanes
with warnings.catch_warnings(record=True) as heard:
    warnings.simplefilter("always")
    with open_lanes(sys.argv[1], mode="mmsg") as lanes:
        print([str(one.message) for one in heard], lanes.status()["busy_poll"]["microseconds"])
"""


@pytest.fixture(scope="module")
def shared() -> Iterator[Lab]:
    """One lab for all: each test leaves the interface as it found it, which the fixture checks."""
    with Lab() as lab:
        yield lab
        with lab.server.enter():
            assert timers() == ("0", "0")
        assert left_behind(lab) == []


def timers() -> tuple[str, ...]:
    return tuple(SETTINGS[key].read("srv0") for key in TIMERS)


def sluice(lab: Lab, *words: str) -> Any:
    """What a command says, as JSON."""
    process = lab.server.popen([*command(*words), "--json"], env=ENVIRONMENT, stdout=subprocess.PIPE)
    out, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, out
    return json.loads(out)


def polling(lanes: Lanes) -> dict[str, int]:
    """What the sockets do."""
    found = lanes.status()["busy_poll"]
    assert isinstance(found, dict)
    return found


def exchange(lab: Lab, lanes: Lanes, rounds: int) -> None:
    """Send growing payloads, three at a time, and receive every one exactly once."""
    got: list[bytes] = []
    with sender(lab) as sock:
        for number in range(rounds):
            sent = [bytes([66, number]) + b"x" * (3 * number + k) for k in range(3)]
            for payload in sent:
                sock.send(payload)
            deadline = time.monotonic() + SECONDS
            while len(got) < 3 * (number + 1):
                with lanes.receive(timeout=1) as batch:
                    got += [bytes(payload) for payload in batch]
                assert time.monotonic() < deadline
    assert len(set(got)) == len(got) == 3 * rounds


def test_shown_handed_over_and_put_back_after_a_kill(shared: Lab, tmp_path: Path) -> None:
    up = Up(shared, tmp_path, TUNED)
    wanted = [
        {"key": "napi_defer_hard_irqs", "before": "0", "after": "2"},
        {"key": "gro_flush_timeout", "before": "0", "after": "20000"},
    ]
    try:
        assert up.ready["tuned"] == wanted
        assert sluice(shared, "status", "srv0", "--interval", "0.05")["owner"]["tuned"] == wanted
        before = os.sched_getaffinity(0)
        with shared.server.enter(), open_owned(up.socket) as lanes:
            assert timers() == ("2", "20000")
            # Handed over with the descriptors: the polling, and where to be.
            assert polling(lanes)["microseconds"] == 50
            assert lanes.pin() == (CPU,)
        assert os.sched_getaffinity(0) == before
        up.policy.write_text(TUNED.replace("20us", "30us"), encoding="utf-8")
        os.kill(up.process.pid, signal.SIGHUP)
        assert "follow at the next start" in up.wait_for("[tuning]")
    finally:
        up.kill()
    with shared.server.enter():
        assert timers() == ("2", "20000")
        SETTINGS["gro_flush_timeout"].write("srv0", "777")  # somebody else, meanwhile
    said = sluice(shared, "down", "srv0")
    assert said["removed"] is False
    foreign = "was changed by a killed owner and stays: it is 777 now, which we did not set"
    assert said["settings"] == [
        f"srv0: gro_flush_timeout {foreign}",
        "srv0: napi_defer_hard_irqs put back to 0: a killed owner had set 2",
    ]
    with shared.server.enter():
        assert timers() == ("0", "777")
        SETTINGS["gro_flush_timeout"].write("srv0", "0")
    assert left_behind(shared) == []


def test_taken_over_with_its_settings(shared: Lab) -> None:
    policy = Policy.parse(TUNED)
    with shared.server.enter():
        with Owner.open("srv0", policy) as first:
            first.persist()
        assert timers() == ("2", "20000")
        with Owner.open("srv0", policy, replace=True, tuning=Tuning(napi_defer_hard_irqs=3)) as second:
            assert timers() == ("3", "20000")
            # What was before the first of them is what will be put back.
            assert [(one.key, one.before, one.after) for one in second.tuned] == [
                ("napi_defer_hard_irqs", "0", "3"),
                ("gro_flush_timeout", "0", "20000"),
            ]
        assert timers() == ("0", "0")


def test_lanes_that_poll_receive_everything(shared: Lab) -> None:
    before = os.sched_getaffinity(0)
    with (
        shared.server.enter(),
        open_lanes(Policy.parse(TUNED), interface="srv0", mode="native", pin="policy") as lanes,
    ):
        assert isinstance(lanes, XskLanes)
        assert os.sched_getaffinity(0) == {CPU}
        assert timers() == ("2", "20000")
        exchange(shared, lanes, 60)
        (queue,) = lanes.statistics().queues
        found = polling(lanes)
        assert (found["microseconds"], found["sockets"]) == (50, 2)
        # veth in copy mode: no queue that could be polled since Linux 6.13, and then nobody tries.
        assert (queue.polls > 0) == (found["polled"] > 0)
        assert queue.frames.balanced
        for fd in lanes._sockets():
            # Neither family nor type can be asked of AF_XDP, so they are given; nor can the budget be.
            with socket.socket(AF_XDP, socket.SOCK_RAW, 0, fileno=os.dup(fd)) as sock:
                assert sock.getsockopt(socket.SOL_SOCKET, SO_BUSY_POLL) == 50
                assert sock.getsockopt(socket.SOL_SOCKET, SO_PREFER_BUSY_POLL) == 1
        with lanes.receive(timeout=0) as batch:
            assert len(batch) == 0
        with pytest.raises(UnsupportedError, match="srv0 queue 0 has no interrupt"):
            lanes.pin("auto")
    assert os.sched_getaffinity(0) == before


def test_the_kernel_polls_the_queue_for_kernel_sockets(shared: Lab) -> None:
    """With interrupts put off for longer than the test lasts, what arrives was polled for."""
    with shared.server.enter():
        SETTINGS["gro"].write("srv0", "on")  # veth has NAPI then
        try:
            with open_lanes(Policy.parse(TUNED), interface="srv0", mode="mmsg") as lanes:
                exchange(shared, lanes, 2)  # the socket learns its queue
                assert polling(lanes)["polled"] == 1
                for key, value in zip(TIMERS, ("1000", str(NEVER)), strict=True):
                    SETTINGS[key].write("srv0", value)
                exchange(shared, lanes, 20)
        finally:
            for key in TIMERS:
                SETTINGS[key].write("srv0", "0")
            SETTINGS["gro"].write("srv0", "off")


def test_without_the_capability_one_line_says_so(shared: Lab, tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_text(TUNED, encoding="utf-8")
    with path.open("rb") as policy:  # which that user may not reach by its path
        words = readable_python("-c", UNPRIVILEGED, "/dev/stdin")
        process = shared.server.popen(words, env=ENVIRONMENT, stdin=policy, stdout=subprocess.PIPE)
        out, _ = process.communicate(timeout=SECONDS)
    said = out.decode()
    assert said.count("[tuning] busy_poll is not in force") == 1, said
    assert "needs CAP_NET_ADMIN" in said
    assert said.endswith("] 0\n")


def test_doctor_tells_of_timers_and_interrupts(shared: Lab) -> None:
    with shared.server.enter():
        assert [one.interrupt for one in queue_cpus("srv0", 1)] == [None]
        for key, value in zip(TIMERS, ("2", "5000000"), strict=True):
            SETTINGS[key].write("srv0", value)
        try:
            found = {one.topic: one for one in probe_interface("srv0")}
        finally:
            for key in TIMERS:
                SETTINGS[key].write("srv0", "0")
    assert found["NAPI timers"].state == "warn"
    assert "5 ms" in found["NAPI timers"].advice
    assert "none" in found["interrupts"].detail
    assert found["GRO"].detail == "off"
    assert "RPS" not in found


def test_doctor_tells_of_packet_steering(shared: Lab) -> None:
    with shared.server.enter():
        _sysfs_access("srv0", "queues/rx-0/rps_cpus", "1")
        try:
            found = {one.topic: one for one in probe_interface("srv0")}
        finally:
            _sysfs_access("srv0", "queues/rx-0/rps_cpus", "0")
    assert (found["RPS"].state, found["RPS"].detail) == ("warn", "on for queue 0")
