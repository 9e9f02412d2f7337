# SPDX-License-Identifier: Apache-2.0
"""The lab: reachable both ways, as asked for, and gone afterwards however it ended."""

from __future__ import annotations

import json
import os
import secrets
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from pyroute2 import IPRoute, netns

from sluice_cli.lab import NETNS_DIRECTORY, Host, Lab, reclaim, remove
from sluice_cli.lab_state import (
    MARKERS,
    Marker,
    locked,
    process_started,
    read_marker,
    read_markers,
    write_marker,
)
from sluice_cli.main import main
from xdp._libbpf import lib
from xdp.errors import BusyError, NotLoadedError, PermissionsError, UsageError

pytestmark = pytest.mark.root

ROOT = Path(__file__).resolve().parent.parent.parent
SECONDS = 10.0  # deadline for what takes milliseconds


def exists(name: str) -> bool:
    """True when anything of that lab is left."""
    marker = Marker(name, 1, 0, 0, ready=False)
    return (MARKERS / f"{name}.json").exists() or any(
        (NETNS_DIRECTORY / namespace).exists() for namespace in marker.namespaces
    )


def ping(host: Host, address: str) -> bool:
    """One echo request and its reply, v4 or v6."""
    v6 = ":" in address
    identifier = secrets.randbits(16)
    protocol = socket.IPPROTO_ICMPV6 if v6 else socket.IPPROTO_ICMP
    request_type, reply_type = (128, 129) if v6 else (8, 0)
    with host.enter():
        sock = socket.socket(socket.AF_INET6 if v6 else socket.AF_INET, socket.SOCK_RAW, protocol)
        target = socket.getaddrinfo(address, None, type=socket.SOCK_RAW)[0][4]
    with sock:
        packet = struct.pack("!BBHHH", request_type, 0, 0, identifier, 1) + b"sluice.."
        if not v6:  # the kernel fills in ICMPv6's checksum, not ICMP's
            total = sum(struct.unpack(f"!{len(packet) // 2}H", packet))
            total = (total & 0xFFFF) + (total >> 16)
            packet = packet[:2] + struct.pack("!H", ~(total + (total >> 16)) & 0xFFFF) + packet[4:]
        sock.sendto(packet, target)
        deadline = time.monotonic() + SECONDS
        while (left := deadline - time.monotonic()) > 0 and select.select([sock], [], [], left)[0]:
            answer = sock.recv(2048)
            answer = answer if v6 else answer[(answer[0] & 15) * 4 :]
            if answer[0] == reply_type and answer[4:] == packet[4:]:
                return True
    return False


@pytest.fixture
def name() -> Iterator[str]:
    """A name for a persistent lab, removed at the end."""
    made = f"test-{secrets.token_hex(3)}"
    yield made
    remove(made)


@pytest.fixture
def owner() -> Iterator[Callable[[], tuple[subprocess.Popen[str], str]]]:
    """Start processes that hold a lab until their stdin closes; returns process and lab name."""
    script = (
        "import sys\nfrom sluice_cli.lab import Lab\n"
        "with Lab() as lab:\n print(lab.name, flush=True)\n sys.stdin.read()\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tools'}"}
    started: list[subprocess.Popen[str]] = []

    def start() -> tuple[subprocess.Popen[str], str]:
        child = subprocess.Popen(
            [sys.executable, "-c", script],
            env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        started.append(child)
        assert child.stdout is not None
        return child, child.stdout.readline().strip()

    yield start
    for child in started:
        child.kill()
        child.communicate()
    reclaim()


class TestTwoHosts:
    def test_ping_both_ways_v4_and_v6(self, lab: Lab) -> None:
        for here, there in (lab.hosts, lab.hosts[::-1]):
            assert ping(here, str(there.ipv4))
            assert ping(here, str(there.ipv6))
            assert ping(here, f"{there.link_local}%{here.interface}")

    def test_nobody_answers_for_an_address_that_is_not_there(self, lab: Lab) -> None:
        with lab.client.enter():
            sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        with sock:
            assert sock.connect_ex(("192.0.2.1", 9)) != 0  # no route: the lab is closed

    @pytest.mark.parametrize("queues", [1, 2, 5])
    def test_queues_on_both_ends(self, make_lab: Callable[..., Lab], queues: int) -> None:
        lab = make_lab(queues=queues)
        for host in lab.hosts:
            statistics = host.statistics()
            assert f"rx_queue_{queues - 1}_xdp_packets" in statistics
            assert f"rx_queue_{queues}_xdp_packets" not in statistics
            assert f"tx_queue_{queues - 1}_xdp_xmit" in statistics

    def test_the_servers_end_is_free_for_a_native_program(self, lab: Lab) -> None:
        lab.server.attach_pass()
        with IPRoute(netns=lab.server.namespace, flags=0) as route:
            link = next(iter(route.link("get", index=lab.server.ifindex)))
            assert link.get("IFLA_XDP").get("IFLA_XDP_ATTACHED") == "xdp"  # 1: native
        with pytest.raises(BusyError, match="srv0"):
            lab.server.attach_pass()
        lab.server.detach()
        lab.server.attach_pass()
        assert ping(lab.client, str(lab.server.ipv4))

    def test_checksums_are_not_left_to_hardware(self, lab: Lab) -> None:
        for host in lab.hosts:
            shown = host.run(["ethtool", "-k", host.interface]).stdout
            assert "tx-checksumming: off" in shown

    def test_static_neighbours(self, make_lab: Callable[..., Lab]) -> None:
        lab = make_lab(static_neighbours=True)
        shown = lab.client.run(["ip", "neigh", "show", "dev", lab.client.interface]).stdout
        for address in (lab.server.ipv4, lab.server.ipv6, lab.server.link_local):
            assert f"{address} lladdr {lab.server.mac} PERMANENT" in shown

    def test_only_the_calling_thread_enters(self, lab: Lab) -> None:
        here = Path("/proc/thread-self/ns/net")
        home = here.readlink()
        leave = threading.Event()
        thread = threading.Thread(target=leave.wait)
        thread.start()
        try:
            with lab.server.enter():
                server = here.readlink()
                assert server != home
                assert Path(f"/proc/self/task/{thread.native_id}/ns/net").readlink() == home
                with lab.client.enter():
                    assert here.readlink() not in {home, server}
                assert here.readlink() == server
            assert here.readlink() == home
        finally:
            leave.set()
            thread.join()

    def test_run_reports_failure(self, lab: Lab) -> None:
        with pytest.raises(subprocess.CalledProcessError):
            lab.server.run(["false"])
        assert lab.server.run(["false"], check=False).returncode == 1

    def test_wrong_arguments(self) -> None:
        for queues in (0, lib.SLUICE_MAX_QUEUES + 1):
            with pytest.raises(UsageError, match="allowed"):
                Lab(queues=queues)
        for mtu in (100, 65_536):
            with pytest.raises(UsageError, match="allowed"):
                Lab(mtu=mtu)
        for bad in ("", "-a", "a-", "A", "../x", "a b", "x" * 33):
            with pytest.raises(UsageError, match="no name for a lab"):
                Lab(bad)

    def test_two_labs_at_once(self, make_lab: Callable[..., Lab]) -> None:
        first, second = make_lab(), make_lab()
        for lab in (first, second):
            assert ping(lab.client, str(lab.server.ipv4))
        assert first.server.mac != second.server.mac
        first.close()
        assert ping(second.client, str(second.server.ipv6))


class TestNothingIsLeft:
    def test_after_the_block(self) -> None:
        before = Path("/proc/self/ns/net").readlink()
        with Lab() as lab:
            child = lab.server.popen(["sleep", "1000"])
            assert exists(lab.name)
        assert not exists(lab.name)
        assert child.returncode == -signal.SIGTERM
        assert Path("/proc/self/ns/net").readlink() == before

    def test_after_an_exception(self) -> None:
        lab = Lab()
        with pytest.raises(ZeroDivisionError), lab:
            _ = 1 / 0
        assert not exists(lab.name)

    def test_when_building_fails(self, name: str) -> None:
        blocker = Marker(name, 1, 0, 0, ready=False).namespaces[1]
        netns.create(blocker)
        try:
            with pytest.raises(BusyError, match="no lab's"):
                Lab(name).up()
            assert read_marker(name) is None
            assert (NETNS_DIRECTORY / blocker).exists(), "somebody else's namespace was removed"
        finally:
            netns.remove(blocker)

    def test_a_stubborn_process_is_killed(self) -> None:
        with Lab() as lab:
            child = lab.server.popen(
                ["sh", "-c", "trap '' TERM; echo ready; while :; do sleep 0.1; done"], stdout=subprocess.PIPE
            )
            assert child.stdout is not None
            assert child.stdout.readline() == b"ready\n"
            child.stdout.close()
        assert child.returncode == -signal.SIGKILL
        assert not exists(lab.name)

    @pytest.mark.parametrize("number", [signal.SIGINT, None])
    def test_when_the_owner_ends(
        self, owner: Callable[[], tuple[subprocess.Popen[str], str]], number: signal.Signals | None
    ) -> None:
        child, lab = owner()
        assert exists(lab)
        if number is not None:
            child.send_signal(number)
        child.communicate(timeout=SECONDS)
        assert not exists(lab)

    def test_after_kill_9_at_the_next_start(
        self, owner: Callable[[], tuple[subprocess.Popen[str], str]]
    ) -> None:
        child, lab = owner()
        other, alive = owner()
        child.kill()
        child.communicate()
        assert exists(lab), "killed: it could not clean up"
        with Lab():
            assert not exists(lab)
            assert exists(alive), "a lab of a living process was taken away"
        other.communicate(timeout=SECONDS)
        assert not exists(alive)

    def test_killed_while_building(self, name: str) -> None:
        """Any state between the marker and the finished lab is cleaned up."""
        marker = Marker(name, 1, 2**22 + 1, 5, ready=False)  # a pid above the kernel's limit
        with locked():  # as long as it takes: others reclaim, too
            write_marker(marker)
            netns.create(marker.namespaces[0])
            # a file that no namespace is mounted on any more
            (NETNS_DIRECTORY / marker.namespaces[1]).touch()
        reclaim()  # unless another process was faster: whoever makes a lab does this first
        assert not exists(name)
        assert not any((NETNS_DIRECTORY / namespace).exists() for namespace in marker.namespaces)

    def test_a_reused_pid_is_no_owner(self, name: str) -> None:
        started = process_started(os.getpid())
        assert started is not None
        mine = Marker(name, 1, os.getpid(), started, ready=True)
        assert not mine.abandoned
        assert replace(mine, owner_started=started + 1).abandoned

    def test_persistent_labs_are_not_reclaimed(self, name: str) -> None:
        with Lab(name, persistent=True):
            pass
        assert name not in reclaim()
        assert exists(name)
        with Lab.open(name) as lab:
            assert ping(lab.client, str(lab.server.ipv4))
        assert exists(name), "leaving an opened lab removed it"
        assert remove(name)
        assert not exists(name)
        assert not remove(name)


class TestMarkers:
    @pytest.mark.parametrize(
        "text",
        [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 4000, b'{"version": 2}', b'{"version": 1}',
         b'{"version":1,"name":"x","queues":true,"owner_pid":0,"owner_started":0,"ready":true}',
         b'{"version":1,"name":"x","queues":1,"owner_pid":-1,"owner_started":0,"ready":true}',
         b'{"version":1,"name":"other","queues":1,"owner_pid":0,"owner_started":0,"ready":true}'],
    )  # fmt: skip
    def test_damaged(self, name: str, text: bytes) -> None:
        with locked():
            (MARKERS / f"{name}.json").write_bytes(text)
        with pytest.raises(UsageError, match=r"damaged: .*") as caught:
            read_marker(name)
        assert f"sluice lab down --name {name}" in caught.value.hint
        assert name not in [marker.name for marker in read_markers()[0]]
        assert any(name in str(error) for error in read_markers()[1])
        assert name not in reclaim(), "nobody knows whose it is"
        assert remove(name)
        assert not exists(name)

    def test_not_root(self) -> None:
        os.seteuid(65534)
        try:
            with pytest.raises(PermissionsError, match="root"):
                Lab().up()
        finally:
            os.seteuid(0)


class TestCommand:
    def test_up_is_idempotent_and_down_too(self, name: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["lab", "up", "--name", name, "--queues", "2", "--json"]) == 0
        first = json.loads(capsys.readouterr().out)
        assert first["version"] == 1
        assert first["created"] is True
        assert first["lab"]["queues"] == 2
        assert main(["lab", "up", "--name", name, "--queues", "2", "--json"]) == 0
        second = json.loads(capsys.readouterr().out)
        assert second["created"] is False
        assert second["lab"] == first["lab"]
        assert main(["lab", "up", "--name", name, "--queues", "3"]) == UsageError.exit_code
        assert "2 queues, not 3" in capsys.readouterr().err
        assert main(["lab", "list", "--json"]) == 0
        listed = json.loads(capsys.readouterr().out)["labs"]
        assert {"name": name, "state": "up"}.items() <= next(
            entry for entry in listed if entry["name"] == name
        ).items()
        assert main(["lab", "down", "--name", name, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["removed"] == [{"name": name, "processes_left": []}]
        assert not exists(name)
        assert main(["lab", "down", "--name", name]) == 0
        assert f"no lab '{name}'" in capsys.readouterr().out

    def test_up_repairs_what_was_taken_apart_by_hand(
        self, name: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["lab", "up", "--name", name]) == 0
        netns.remove(Marker(name, 1, 0, 0, ready=True).namespaces[0])
        assert main(["lab", "up", "--name", name]) == 0
        assert "is up," in capsys.readouterr().out
        with Lab.open(name) as lab:
            assert ping(lab.server, str(lab.client.ipv4))

    def test_a_lab_in_use_is_not_taken_down(self, lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["lab", "down", "--name", lab.name]) == BusyError.exit_code
        assert str(os.getpid()) in capsys.readouterr().err
        assert main(["lab", "up", "--name", lab.name]) == BusyError.exit_code
        assert exists(lab.name)

    def test_shell(self, name: str, capfd: pytest.CaptureFixture[str]) -> None:
        Lab(name, persistent=True).up()
        assert main(["lab", "shell", "--name", name, "--", "sh", "-c", "ip -4 -br addr; exit 7"]) == 7
        assert "10.81.0.2/16" in capfd.readouterr().out
        assert (
            main(["lab", "shell", "--name", name, "--host", "server", "--", "sh", "-c", "kill -9 $$"]) == 137
        )
        assert main(["lab", "shell", "--name", name, "--", "no-such-command"]) == UsageError.exit_code
        assert main(["lab", "shell", "--name", f"{name}-x"]) == NotLoadedError.exit_code
        assert "sluice lab up" in capfd.readouterr().err

    def test_all_labs(self) -> None:
        """With a /run of its own, so that nobody else's labs are taken down."""
        script = """
            set -e
            mount -t tmpfs tmpfs /run
            sluice() { "$PYTHON" -m sluice_cli lab "$@"; }
            sluice up --name one --static-neighbours
            sluice up --name two --queues 3
            mkdir -p /run/sluice/labs
            echo damaged > /run/sluice/labs/three.json
            sluice list
            sluice down --all
            sluice list --json
            sluice down --all
            test -z "$(ls /run/netns)"
        """
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tools'}", "PYTHON": sys.executable}
        done = subprocess.run(
            ["unshare", "--mount", "sh", "-c", script],
            env=environment, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "lab 'one' removed" in done.stdout
        assert "lab 'two' removed" in done.stdout
        assert "sluice-two-b" in done.stdout
        assert '"labs": []' in done.stdout
        assert "no lab to remove" in done.stdout
        assert "three.json is damaged" in done.stderr

    def test_down_leaves_other_processes_alone_and_names_them(
        self, name: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with Lab(name, persistent=True) as lab, lab.client.enter():
            child = subprocess.Popen(["sleep", "1000"])
        try:
            assert main(["lab", "down", "--name", name, "--json"]) == 0
            assert json.loads(capsys.readouterr().out)["removed"][0]["processes_left"] == [child.pid]
            assert child.poll() is None
            assert not exists(name)
        finally:
            child.kill()
            child.wait()
