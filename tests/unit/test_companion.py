# SPDX-License-Identifier: Apache-2.0
"""Companion sockets: budget, busy ports with the name of who has them, descriptors handed over."""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ordinary_user import readable_python
from userspace.datagram.companion import Companion, open_companion_sockets
from userspace.datagram.sockets import open_service_sockets, port_holders, socket_ports
from xdp.errors import BusyError, PermissionsError, UsageError
from xdp.policy import Policy

DEADLINE = 10.0

HOLD = "import socket,sys; s = socket.socket({family}, socket.SOCK_DGRAM); s.bind(({host!r}, {port})); print('bound', flush=True); sys.stdin.read()"  # noqa: E501


def free_ports(count: int) -> list[int]:
    probes = [socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) for _ in range(count)]
    for probe in probes:
        probe.bind(("::", 0))
    ports = sorted(probe.getsockname()[1] for probe in probes)
    for probe in probes:
        probe.close()
    return ports


def make_policy(ports: list[int], companion: str = "") -> Policy:
    return Policy.parse(
        f"""
version = 1
[companion]
{companion}
[[lane]]
name = "votes"
[[lane]]
name = "bulk"
[[lane]]
name = "server"
end = "kernel"
[[class]]
name = "staked"
prefixes = ["127.0.0.2/32"]
[[service]]
name = "ours"
ports = {ports}
[[service.rule]]
class = "staked"
action = "lane"
lane = "votes"
[[service.rule]]
action = "lane"
lane = "bulk"
[[service]]
name = "somebody-else"
ports = [53]
[[service.rule]]
action = "lane"
lane = "server"
"""
    )


def send(port: int, *payloads: bytes, host: str = "127.0.0.2") -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.bind((host, 0))
        for payload in payloads:
            sender.sendto(payload, ("127.0.0.1", port))


@pytest.fixture
def holder() -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Another process that has a port bound."""
    port = free_ports(1)[0]
    code = HOLD.format(family="socket.AF_INET", host="127.0.0.1", port=port)
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "bound\n"
        yield process, port
        assert process.stdin is not None
        process.stdin.close()
        process.wait(DEADLINE)


def test_ports_of_other_programs_are_left_alone() -> None:
    ports = free_ports(2)
    assert socket_ports(make_policy(ports)) == tuple(ports)


def test_budget_per_call() -> None:
    ports = free_ports(1)
    policy = make_policy(ports, "budget = 10")
    companion = Companion.open(policy)
    try:
        assert companion.ports == tuple(ports)
        assert companion.try_receive() is None
        send(ports[0], *[b"bulk"] * 30, host="127.0.0.3")
        send(ports[0], b"vote")
        sizes: list[int] = []
        lanes: list[int] = []
        while select.select([companion.fileno()], [], [], 0)[0]:
            batch = companion.try_receive()
            assert batch is not None
            with batch:
                sizes.append(len(batch))
                lanes.extend(batch.lanes)
        assert sizes == [10, 10, 10, 1]
        assert lanes == [1] * 30 + [0]
        assert companion.lanes is not None
        assert companion.lanes.statistics().balanced
    finally:
        companion.close()


@pytest.mark.parametrize("budget", [1, 65536])
def test_budgets_at_the_edges(budget: int) -> None:
    ports = free_ports(1)
    companion = Companion.open(make_policy(ports, f"budget = {budget}"))
    try:
        send(ports[0], b"a", b"b", b"c")
        total = 0
        while select.select([companion.fileno()], [], [], 0)[0]:
            batch = companion.try_receive()
            assert batch is not None
            with batch:
                assert len(batch) == min(budget, 3)
                total += len(batch)
        assert total == 3
    finally:
        companion.close()


def test_disabled_or_all_busy_means_nothing_arrives() -> None:
    policy = make_policy(free_ports(1), "enabled = false")
    assert open_companion_sockets(policy) == []
    companion = Companion.open(policy)
    assert (companion.fileno(), companion.ports, companion.try_receive(), companion.lanes) == (
        -1,
        (),
        None,
        None,
    )
    companion.close()


def test_a_busy_port_names_the_process(holder: tuple[subprocess.Popen[str], int]) -> None:
    process, port = holder
    other = free_ports(1)[0]
    policy = make_policy(sorted([port, other]))
    with pytest.raises(BusyError) as caught:
        Companion.open(policy)
    assert str(process.pid) in str(caught.value)
    assert "import socket" in str(caught.value)  # its command line
    assert str(port) in str(caught.value)
    assert "enabled = false" in caught.value.hint
    # nothing stays open: the free port can be bound again
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as again:
        again.bind(("::", other))
    companion = Companion.open(policy, skip_busy=True)
    try:
        assert companion.ports == (other,)
    finally:
        companion.close()


def test_port_holders(holder: tuple[subprocess.Popen[str], int], tmp_path: Path) -> None:
    process, port = holder
    found = port_holders(port)
    assert [entry.pid for entry in found] == [process.pid]
    assert port_holders(free_ports(1)[0]) == []
    # where the process may not be looked into, its user is all there is to say
    net = tmp_path / "thread-self" / "net"
    net.mkdir(parents=True)
    (net / "udp").write_text(Path("/proc/thread-self/net/udp").read_text(encoding="ascii"), encoding="ascii")
    assert [str(entry) for entry in port_holders(port, proc=tmp_path)] == [f"user {os.getuid()}"]


def test_hostile_command_lines_stay_on_one_line(tmp_path: Path) -> None:
    net = tmp_path / "thread-self" / "net"
    net.mkdir(parents=True)
    (net / "udp6").write_text("header\n 1: 00:1F41 00:0 07 0:0 00:0 0 1000 0 777 2 0 0\n", encoding="ascii")
    (tmp_path / "12" / "fd").mkdir(parents=True)
    (tmp_path / "12" / "fd" / "3").symlink_to("socket:[777]")
    (tmp_path / "12" / "cmdline").write_bytes(b"evil\0\x1b[31m\n" + b"x" * 500 + b"\xff\0")
    (holder,) = port_holders(8001, proc=tmp_path)
    assert holder.pid == 12
    assert holder.command.isprintable()
    assert len(holder.command) <= 80


def test_descriptors_can_be_handed_over() -> None:
    ports = free_ports(2)
    policy = make_policy(ports)
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    opened = open_companion_sockets(policy)
    with here, there:
        socket.send_fds(here, [b"companions"], [sock.fileno() for _, sock in opened])
        for _, sock in opened:
            sock.close()
        _, descriptors, _, _ = socket.recv_fds(there, 100, len(ports))
    companion = Companion.adopt(policy, zip(ports, descriptors, strict=True))
    try:
        send(ports[1], b"vote")
        assert select.select([companion.fileno()], [], [], DEADLINE)[0]
        batch = companion.try_receive()
        assert batch is not None
        with batch:
            assert bytes(batch[0]) == b"vote"
            assert batch.lanes[0] == 0
    finally:
        companion.close()


def test_an_address_of_another_machine() -> None:
    with pytest.raises(UsageError, match="no such address"):
        open_service_sockets(free_ports(1), host="192.0.2.1")
    with pytest.raises(UsageError, match="not an IP address"):
        open_service_sockets(free_ports(1), host="localhost.")


def test_privileged_ports_need_privileges() -> None:
    limit = int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text(encoding="ascii"))
    if os.geteuid() == 0:
        code = (
            "import os, sys\n"
            "from userspace.datagram.sockets import open_service_sockets\n"
            "from xdp.errors import PermissionsError\n"
            "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
            "try:\n    open_service_sockets([1])\n"
            "except PermissionsError as error:\n"
            "    sys.exit(0 if 'port 1' in str(error) and error.hint else 3)\n"
            "sys.exit(4)\n"
        )
        done = subprocess.run(readable_python("-c", code), timeout=30, check=False)
        assert done.returncode == (0 if limit > 1 else 4)
    elif limit > 1:
        with pytest.raises(PermissionsError, match="port 1"):
            open_service_sockets([1])


def test_nothing_leaks() -> None:
    ports = free_ports(3)
    policy = make_policy(ports)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(20):
        companion = Companion.open(policy)
        send(ports[0], b"x")
        deadline = time.monotonic() + DEADLINE
        while (batch := companion.try_receive()) is None:
            assert time.monotonic() < deadline
        batch.release()
        companion.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before
