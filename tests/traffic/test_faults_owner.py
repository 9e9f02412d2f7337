# SPDX-License-Identifier: Apache-2.0
"""Owners and applications are killed, interfaces go and come: nothing is left, the others notice."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sluice_cli.lab import Lab
from tests.kernel.live import Traffic
from tests.kernel.owned import (
    ENVIRONMENT,
    KERNEL_POLICY,
    POLICY,
    SECONDS,
    Up,
    command,
    end,
    expect,
    kernel_socket,
    left_behind,
    program_of,
    read_line,
    sender,
    start,
    until,
)
from userspace.datagram.claim import Claim
from xdp.interface import SETTINGS

pytestmark = [pytest.mark.root, pytest.mark.bpf]

# An owner that kills itself right after a step.
KILLED = """
import importlib, os, signal, sys
from userspace.datagram.owner import Owner
from xdp.interface import Tuning
from xdp.policy import Policy
module, owner, step = sys.argv[1].split(":")
place = importlib.import_module(module)
place = getattr(place, owner) if owner else place
real = getattr(place, step)
def dying(*arguments, **options):
    real(*arguments, **options)
    os.kill(os.getpid(), signal.SIGKILL)
setattr(place, step, dying)
made = Owner.open("srv0", Policy.load(sys.argv[2]), tuning=Tuning(gro_flush_timeout=20000))
lease = made.lend()
lease.start()
made.upgrade()
made.persist() if step == "pin_link" else made.close()
"""

STEPS = [
    "xdp.state:InterfaceLock:take",
    "xdp.program:SteerProgram:load",
    "xdp.journal:Journal:_write",
    "xdp.journal:Journal:set",
    "userspace.datagram.ladder::attach_best",
    "userspace.datagram.claim:Claim:write",
    "userspace.datagram.owner:Owner:lend",
    "userspace.datagram.lease:Lease:start",
    "xdp.link:Link:update",
    "userspace.datagram.owner:Owner:_detach",
]


@pytest.mark.parametrize("step", STEPS)
def test_killed_after_any_step_an_owner_leaves_nothing(lab: Lab, tmp_path: Path, step: str) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text(POLICY, encoding="utf-8")
    killed = lab.server.run([sys.executable, "-c", KILLED, step, str(policy)], env=ENVIRONMENT, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    until(lambda: program_of(lab) is None, "the program is off the interface")
    with lab.server.enter():
        # What a next start does first.
        Claim("srv0", lab.server.ifindex, lambda _text: None).release("srv0")
        assert SETTINGS["gro_flush_timeout"].read("srv0") == "0"
    assert left_behind(lab) == []


class TestKilled:
    def test_the_owner(self, lab: Lab, tmp_path: Path) -> None:
        up = Up(lab, tmp_path, POLICY, "--gro-flush-timeout", "20000")
        running = up.application()
        expect(running, "open")
        up.kill()
        expect(running, "OwnerGoneError the owner of srv0 is gone")
        until(lambda: program_of(lab) is None, "the program is off")
        with lab.server.enter():
            assert SETTINGS["gro_flush_timeout"].read("srv0") == "20000"
        running.wait(SECONDS)
        with kernel_socket(lab) as sock, sender(lab) as out:
            out.send(b"Vote")
            assert sock.recv(10) == b"Vote"
        again = Up(lab, tmp_path, POLICY)
        with lab.server.enter():
            assert SETTINGS["gro_flush_timeout"].read("srv0") == "0"
        running = again.application()
        expect(running, "open")
        assert again.stop() == 0
        assert left_behind(lab) == []

    def test_the_application(self, lab: Lab, tmp_path: Path) -> None:
        up = Up(lab, tmp_path)
        for number in range(3):
            running = up.application()
            # The kernel frees a dead process's sockets a moment later; the owner waits for that.
            expect(running, "open")
            with sender(lab) as out:
                out.send(f"V{number}".encode())
                expect(running, f"got V{number}")
            end(running)
        with sender(lab) as out:
            out.send(b"between")
        assert up.stop() == 0
        assert left_behind(lab) == []

    def test_two_starts_at_once(self, lab: Lab, tmp_path: Path) -> None:
        policy = tmp_path / "policy.toml"
        policy.write_text(KERNEL_POLICY, encoding="utf-8")
        both = [start(lab.server, [*command("up", "srv0", str(policy)), "--json"]) for _ in range(2)]
        until(lambda: any(one.poll() is not None for one in both), "one of them has given up")
        loser, winner = sorted(both, key=lambda one: one.poll() is None)
        assert loser.wait(SECONDS) == 6
        said = ""
        while line := read_line(loser):
            said += line
        # By its pid once that has been written down, which may be a moment after the lock was taken.
        assert f"owned by process {winner.pid}" in said or "another process that is starting" in said
        expect(winner, '{"version": 1, "event": "ready"')
        end(winner, signal.SIGTERM)
        assert winner.returncode == 0
        assert left_behind(lab) == []

    def test_signals_while_starting(self, lab: Lab, tmp_path: Path) -> None:
        """Ctrl-C while the compiler runs: it ends cleanly."""
        policy = tmp_path / "policy.toml"
        policy.write_text(KERNEL_POLICY, encoding="utf-8")
        starting = start(lab.server, command("up", "srv0", str(policy)))
        until(lambda: left_behind(lab), "the lock is taken")
        starting.terminate()
        assert starting.wait(SECONDS) == 0
        assert program_of(lab) is None
        assert left_behind(lab) == []


class TestInterface:
    def make(self, lab: Lab) -> None:
        """Another veth pair in place of the one that was deleted, with the same names and addresses."""
        ip = ["ip", "-n", lab.server.namespace]
        there = ["netns", lab.client.namespace]
        steps = [
            [*ip, "link", "add", "srv0", "type", "veth", "peer", "name", "cli0", *there],
            [*ip, "address", "add", "10.81.0.1/16", "dev", "srv0"],
            [*ip, "link", "set", "srv0", "up"],
            ["ip", "-n", lab.client.namespace, "address", "add", "10.81.0.2/16", "dev", "cli0"],
            ["ip", "-n", lab.client.namespace, "link", "set", "cli0", "up"],
        ]
        for step in steps:
            subprocess.run(step, check=True)
        lab.client.run(["ethtool", "-K", "cli0", "tx", "off"])

    def test_deleted_and_made_again(self, lab: Lab, tmp_path: Path) -> None:
        up = Up(lab, tmp_path)
        running = up.application(wait=SECONDS)
        expect(running, "open")
        lab.server.run(["ip", "link", "del", "srv0"])
        up.wait_for("srv0 is gone")
        expect(running, "InterfaceGoneError")
        self.make(lab)
        up.wait_for("srv0 is back")
        expect(running, "open")
        with sender(lab) as out:
            out.send(b"Vote")
            expect(running, "got Vote")
        end(running)
        assert up.stop() == 0
        assert left_behind(lab) == []

    def test_deleted_twice_while_nobody_has_lanes(self, lab: Lab, tmp_path: Path) -> None:
        up = Up(lab, tmp_path, KERNEL_POLICY)
        for _ in range(2):
            lab.server.run(["ip", "link", "del", "srv0"])
            up.wait_for("is gone")
            self.make(lab)
            up.wait_for("is back")
        lab.server.run(["ip", "link", "del", "srv0"])
        up.wait_for("is gone")
        assert up.stop() == 0
        assert left_behind(lab) == []

    def test_back_with_a_foreign_program(self, lab: Lab, tmp_path: Path) -> None:
        """It is not ours to remove: the owner says so and waits until the interface is free."""
        up = Up(lab, tmp_path, KERNEL_POLICY)
        up.process.send_signal(signal.SIGSTOP)
        lab.server.run(["ip", "link", "del", "srv0"])
        self.make(lab)
        with lab.server.enter():
            lab.server.ifindex = int(Path("/proc/thread-self/net/dev_snmp6/srv0").read_text().split()[1])
        lab.server.attach_pass()
        up.process.send_signal(signal.SIGCONT)
        assert "already carries program" in up.wait_for("can't be used yet")
        lab.server.detach()
        up.wait_for("srv0 is back")
        assert up.stop() == 0

    def test_renamed(self, lab: Lab, tmp_path: Path) -> None:
        up = Up(lab, tmp_path)
        running = up.application()
        expect(running, "open")
        for words in (["down"], ["name", "new0"]):
            lab.server.run(["ip", "link", "set", "srv0", *words])
        lab.server.run(["ip", "link", "set", "new0", "up"])
        up.wait_for("new0 is")
        with sender(lab) as out:
            out.send(b"Vote")
            expect(running, "got Vote")
        end(running)
        again = up.application()
        expect(again, "open")
        assert up.stop() == 0
        assert left_behind(lab) == []

    def test_down_and_up(self, lab: Lab, tmp_path: Path) -> None:
        up = Up(lab, tmp_path)
        running = up.application()
        expect(running, "open")
        for state in ("down", "up"):
            lab.server.run(["ip", "link", "set", "srv0", state])
            up.wait_for(f"srv0 is {state}")
        with sender(lab) as out:
            until(lambda: out.send(b"Vote") and heard(running), "received again")
        end(running)
        assert up.stop() == 0


def heard(running: subprocess.Popen[bytes]) -> bool:
    return read_line(running).startswith("got Vote")


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR2])
def test_nothing_is_lost_while_policy_or_program_change(
    lab: Lab, tmp_path: Path, number: signal.Signals
) -> None:
    up = Up(lab, tmp_path, KERNEL_POLICY)
    traffic = Traffic(lab)
    with traffic:
        for _ in range(3):
            up.process.send_signal(number)
            up.wait_for("is in")
        traffic.stop()
    assert traffic.sent > 0
    assert len(traffic.received) == traffic.sent
    assert up.stop() == 0
