# SPDX-License-Identifier: Apache-2.0
"""`sluice up` as a process: who gets lanes, who does not, and that nobody can keep it from serving."""

from __future__ import annotations

import array
import json
import os
import signal
import socket
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sluice_cli.lab import Lab
from tests.kernel.owned import (
    ENVIRONMENT,
    KERNEL_POLICY,
    POLICY,
    SECONDS,
    Up,
    application,
    command,
    descriptors,
    end,
    expect,
    kernel_socket,
    left_behind,
    program_of,
    sender,
    until,
)
from tests.ordinary_user import readable_python
from userspace.datagram import messages
from userspace.datagram.claim import Claim
from userspace.datagram.handover import OwnerConnection
from userspace.datagram.owned_lanes import open_owned
from xdp.errors import BusyError, OwnerGoneError, UsageError
from xdp.interface import SETTINGS

pytestmark = [pytest.mark.root, pytest.mark.bpf]

# What a user that the policy does not name hears.
OTHER_USER = """
import os, sys
os.setgroups(eval(sys.argv[3])); os.setgid(int(sys.argv[2])); os.setuid(4242)
from userspace.datagram.handover import OwnerConnection
from xdp.errors import SluiceError
try:
    with OwnerConnection(sys.argv[1]) as owner:
        print("served", owner.interface)
except SluiceError as error:
    print(type(error).__name__, error)
"""


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    with Lab(queues=2) as lab:
        made = Up(lab, tmp_path_factory.mktemp("up"))
        yield made
        assert made.stop() == 0
        assert program_of(lab) is None
        assert left_behind(lab) == []


def raw(up: Up) -> socket.socket:
    """A connection that has heard the owner's hello and said nothing."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.settimeout(SECONDS)
    sock.connect(up.socket)
    assert b"hello" in sock.recv(4096)
    return sock


def still_serves(up: Up) -> None:
    """An ordinary application gets its lanes, and they work."""
    with open_owned(up.socket) as lanes, sender(up.lab) as out:
        out.send(b"Vote")
        with lanes.receive(timeout=SECONDS) as batch:
            assert [batch[i].tobytes() for i in range(len(batch))] == [b"Vote"]


class TestServing:
    def test_ready(self, up: Up) -> None:
        assert up.ready["version"] == 1
        assert up.ready["mode"] == "native-copy"
        assert up.ready["lanes"] == ["votes", "bulk"]
        assert program_of(up.lab) == (up.ready["program"], "native")

    def test_an_ordinary_user_receives(self, up: Up) -> None:
        running = up.application()
        assert expect(running, "open native-copy alice")
        with sender(up.lab) as out:
            out.send(b"Vote")
            expect(running, "got Vote")
        end(running)

    def test_a_second_one_hears_who_is_the_first(self, up: Up) -> None:
        first = up.application()
        expect(first, "open")
        second = up.application()
        assert f"in use by process {first.pid}" in expect(second, "BusyError")
        end(first)
        until(lambda: takes_lanes(up), "lanes for the next one")

    def test_twenty_applications_later_no_descriptor_more(self, up: Up) -> None:
        still_serves(up)
        pid = up.process.pid
        before = descriptors(pid)
        for _ in range(20):
            with open_owned(up.socket):
                pass
        until(lambda: descriptors(pid) <= before, "the owner closed what it lent")

    def test_asked_again_on_the_same_connection(self, up: Up) -> None:
        with OwnerConnection(up.socket) as owner:
            for _ in range(3):
                owner.attach().close()
            owner.detach()
            with open_owned(up.socket):
                pass

    def test_a_kept_socket_gets_nothing_but_keeps_the_queue(self, up: Up) -> None:
        """Somebody closes the connection but not the sockets: the next one hears that they are busy."""
        owner = OwnerConnection(up.socket)
        kept = owner.attach(companions="none")
        owner.close()
        with pytest.raises(BusyError):
            open_owned(up.socket)
        with kernel_socket(up.lab) as sock, sender(up.lab) as out:
            out.send(b"Vote")
            assert sock.recv(10) == b"Vote"
        kept.close()
        until(lambda: takes_lanes(up), "lanes again")

    def test_two_processes_two_queues(self, up: Up) -> None:
        with open_owned(up.socket, queues=[0]) as first, open_owned(up.socket, queues=[1]) as second:
            assert (first.queue_numbers, second.queue_numbers) == ((0,), (1,))
            with pytest.raises(BusyError):
                open_owned(up.socket, queues=[1])

    def test_a_port_that_another_has(self, up: Up) -> None:
        with kernel_socket(up.lab):
            with pytest.raises(BusyError, match=f"8001 is in use by process {os.getpid()}"):
                open_owned(up.socket)
            with open_owned(up.socket, companions="free") as lanes:
                assert lanes.companion is None or lanes.companion.ports == ()


def takes_lanes(up: Up) -> bool:
    try:
        with open_owned(up.socket):
            return True
    except BusyError:
        return False


class TestWhoMay:
    def other(self, up: Up, group: int = 4242, groups: str = "[]") -> str:
        done = subprocess.run(
            readable_python("-c", OTHER_USER, up.socket, str(group), groups),
            env=ENVIRONMENT, capture_output=True, text=True, timeout=SECONDS, check=True,
        )  # fmt: skip
        return done.stdout.strip()

    def test_a_user_that_the_policy_does_not_name(self, up: Up) -> None:
        assert "PermissionsError user 4242 may not have the lanes" in self.other(up)
        assert stat.S_IMODE(Path(up.socket).stat().st_mode) == 0o666, "a file can't name users"

    def test_groups(self, up: Up) -> None:
        for owner, mode in (("groups = [4343]", 0o660), ("groups = [4343, 7]", 0o666), ("", 0o600)):
            up.policy.write_text(POLICY.replace("users = [65534]", owner), encoding="utf-8")
            up.process.send_signal(signal.SIGHUP)
            up.wait_for("is in force")
            assert stat.S_IMODE(Path(up.socket).stat().st_mode) == mode
            assert "PermissionsError" in self.other(up)
            expected = "served srv0" if owner else "PermissionsError"
            assert expected in self.other(up, 4343)
            assert expected in self.other(up, 4242, "[9, 4343]")
        up.policy.write_text(POLICY, encoding="utf-8")
        up.process.send_signal(signal.SIGHUP)
        up.wait_for("is in force")


class TestHostileClients:
    @pytest.mark.parametrize(
        "attack",
        [
            lambda sock: sock.send(b"\0" * 100),
            lambda sock: sock.send(b"{" * 4000),
            lambda sock: sock.send(b"x" * 100_000),
            lambda sock: sock.send(b'{"type":"attach","queues":[' + b"1," * 1000 + b"1]}"),
            lambda sock: sock.send(b'{"type":"attach","version":1e999}'),
            lambda sock: sock.send(b""),
            lambda sock: sock.sendmsg(
                [b'{"type":"attach"}'], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0] * 250))]
            ),
            lambda sock: [sock.send(b'{"type":"detach"}') for _ in range(1000)],
        ],
        ids=["zeros", "deep", "long", "queues", "number", "empty", "descriptors", "flood"],
    )
    def test_is_dropped_alone(self, up: Up, attack: Callable[[socket.socket], object]) -> None:
        before = descriptors(up.process.pid)
        with raw(up) as sock:
            try:
                attack(sock)
                while (answer := sock.recv(65536)) and b'"refused"' not in answer:
                    pass
            except ConnectionError:
                pass  # it was dropped while it was still talking
        until(lambda: descriptors(up.process.pid) <= before, "nothing of it is left")
        still_serves(up)

    def test_one_that_asks_and_does_not_read(self, up: Up) -> None:
        """Its lanes are ready but never fetched: it goes when its time is over, and its lanes are free."""
        with raw(up) as sock:
            sock.send(messages.encode(messages.Attach(companions="none")))
            for _ in range(300):  # policy, lanes, parts, and then an event for each of these
                up.process.send_signal(signal.SIGHUP)
                if "was dropped" in up.wait_for(""):
                    break
            else:
                until(lambda: "was dropped" in up.wait_for(""), "dropped")
        still_serves(up)

    def test_connections_that_say_nothing(self, up: Up) -> None:
        """They are served, refused beyond a number, and dropped after a while; the others don't wait."""
        idle = []
        refused = 0
        for _ in range(70):
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            sock.settimeout(SECONDS)
            sock.connect(up.socket)
            refused += b"refused" in sock.recv(4096)
            idle.append(sock)
        assert refused == 70 - 64
        idle.pop(0).close()
        until(lambda: takes_place(up), "a place for another one")
        for sock in idle:
            sock.close()

        def served() -> bool:
            # The owner hears of the closed ones one after the other.
            try:
                still_serves(up)
            except BusyError:
                return False
            return True

        until(served, "an application served again")

    def test_a_silent_one_is_dropped(self, up: Up) -> None:
        with raw(up) as sock:
            assert sock.recv(4096) == b"", "dropped without a word from it"
        assert "asked for nothing" in up.wait_for("asked for nothing")


def takes_place(up: Up) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.settimeout(SECONDS)
        sock.connect(up.socket)
        return b"hello" in sock.recv(4096)


class TestPolicies:
    def test_a_bad_file_keeps_the_old_policy(self, up: Up) -> None:
        up.policy.write_text(POLICY.replace('lane = "votes"', 'lane = "vote"'), encoding="utf-8")
        up.process.send_signal(signal.SIGHUP)
        assert 'no lane named "vote"' in up.wait_for("the old policy stays")
        up.policy.write_text(POLICY, encoding="utf-8")
        still_serves(up)

    def test_applications_are_told(self, up: Up) -> None:
        with open_owned(up.socket) as lanes:
            before = lanes.owner.generation
            up.policy.write_text(POLICY.replace('"alice"', '"bob"'), encoding="utf-8")
            up.process.send_signal(signal.SIGHUP)
            up.wait_for("is in force")
            until(lambda: not len(received(lanes)) and lanes.owner.generation > before, "told")
            assert lanes.owner.policy is not None
            assert [peer.name for peer in lanes.owner.policy.peers] == ["bob"]
            up.policy.write_text(POLICY.replace("ring = 128", "ring = 64"), encoding="utf-8")
            up.process.send_signal(signal.SIGHUP)
            assert str(os.getpid()) in up.wait_for("other lanes or rings")
        up.policy.write_text(POLICY, encoding="utf-8")


def received(lanes: object) -> list[bytes]:
    with lanes.try_receive() as batch:  # type: ignore[attr-defined]
        return [batch[i].tobytes() for i in range(len(batch))]


class TestStarting:
    def run(self, lab: Lab, *words: str) -> tuple[int, dict[str, object]]:
        done = lab.server.run(command("up", *words, "--json"), env=ENVIRONMENT, check=False)
        return done.returncode, json.loads(done.stdout)

    def test_what_is_wrong_is_said_at_once(self, lab: Lab, tmp_path: Path) -> None:
        policy = tmp_path / "p.toml"
        policy.write_text(POLICY, encoding="utf-8")
        code, document = self.run(lab, "eth9", str(policy))
        assert (code, "no interface 'eth9'" in str(document)) == (2, True)
        code, document = self.run(lab, "srv0", str(tmp_path / "none.toml"))
        assert code == 3
        code, document = self.run(lab, "srv0", str(policy), "--socket", "/" + "x" * 200)
        assert (code, "longer than" in str(document)) == (2, True)
        code, document = self.run(lab, "srv0", str(policy), "--socket", str(policy))
        assert (code, "is no socket" in str(document)) == (6, True)
        assert policy.exists()
        assert program_of(lab) is None
        assert left_behind(lab) == []

    def test_check_attaches_nothing(self, lab: Lab, tmp_path: Path) -> None:
        policy = tmp_path / "p.toml"
        policy.write_text(POLICY, encoding="utf-8")
        code, document = self.run(lab, "srv0", str(policy), "--check")
        assert (code, document["ok"]) == (0, True)
        assert program_of(lab) is None

    def test_a_service_manager_is_told(self, lab: Lab, tmp_path: Path) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            manager.bind(str(tmp_path / "notify"))
            manager.settimeout(SECONDS)
            ENVIRONMENT["NOTIFY_SOCKET"] = str(tmp_path / "notify")
            try:
                up = Up(lab, tmp_path, KERNEL_POLICY, "--socket", str(tmp_path / "s"))
            finally:
                del ENVIRONMENT["NOTIFY_SOCKET"]
            assert manager.recv(100) == b"READY=1"
            assert up.ready["mode"] == "native"
            with pytest.raises(UsageError, match="ends in the kernel"):
                open_owned(tmp_path / "s")
            up.process.send_signal(signal.SIGINT)
            assert manager.recv(100) == b"STOPPING=1"
            assert up.process.wait(SECONDS) == 0

    def test_persistent(self, lab: Lab, tmp_path: Path) -> None:
        first = Up(lab, tmp_path, KERNEL_POLICY, "--persist", "--gro-flush-timeout", "20000")
        assert first.process.wait(SECONDS) == 0
        assert program_of(lab) == (first.ready["program"], "native")
        again = Up(lab, tmp_path, KERNEL_POLICY, "--persist")
        assert again.process.wait(SECONDS) == 0
        assert (again.ready["program"], again.ready["generation"]) == (first.ready["program"], 2)
        code, document = self.run(lab, "srv0", str(tmp_path / "policy.toml"))
        with lab.server.enter():
            assert SETTINGS["gro_flush_timeout"].read("srv0") == "20000", "a refused start changes nothing"
        assert (code, "--persist" in str(document)) == (6, True)
        down = lab.server.run(command("down", "srv0", "--json"), env=ENVIRONMENT)
        assert json.loads(down.stdout)["removed"]
        with lab.server.enter():
            assert SETTINGS["gro_flush_timeout"].read("srv0") == "0"
        assert program_of(lab) is None
        assert left_behind(lab) == []
        down = lab.server.run(command("down", "srv0", "--json"), env=ENVIRONMENT)
        assert not json.loads(down.stdout)["removed"]

    def test_a_persistent_one_is_taken_over(self, lab: Lab, tmp_path: Path) -> None:
        first = Up(lab, tmp_path, KERNEL_POLICY, "--persist")
        first.process.wait(SECONDS)
        second = Up(lab, tmp_path, POLICY, "--replace")
        assert second.ready["link"] == first.ready["link"], "the same link: there was no gap"
        assert program_of(lab) == (second.ready["program"], "native")
        running = application(lab.server, second.socket)
        expect(running, "open")
        assert second.stop() == 0
        expect(running, "OwnerGoneError")
        assert program_of(lab) is None
        assert left_behind(lab) == []

    def test_a_pin_of_a_deleted_interface_is_removed_by_any_start(self, lab: Lab, tmp_path: Path) -> None:
        with Lab() as gone:
            persistent = Up(gone, tmp_path, KERNEL_POLICY, "--persist")
            assert persistent.process.wait(SECONDS) == 0
            assert Path(str(persistent.ready["pin"])).exists()
        # Another start on this machine may come first from here on, and removes it as well.
        with lab.server.enter():
            Claim("srv0", lab.server.ifindex, pytest.fail).release("srv0")
        assert not Path(str(persistent.ready["pin"])).exists()

    def test_down_ends_it(self, lab: Lab, tmp_path: Path) -> None:
        up = Up(lab, tmp_path, POLICY)
        with OwnerConnection(up.socket) as owner:
            lab.server.run(command("down", "srv0"), env=ENVIRONMENT)
            assert up.process.wait(SECONDS) == 0
            with pytest.raises(OwnerGoneError):
                owner.poll()
        assert left_behind(lab) == []
