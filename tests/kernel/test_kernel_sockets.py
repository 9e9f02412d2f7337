# SPDX-License-Identifier: Apache-2.0
"""Kernel-socket lanes in a namespace of their own: real fragments, broadcast, no IPv6, configured peers."""

from __future__ import annotations

import os
import secrets
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest

from userspace.datagram.companion import Companion
from userspace.datagram.mmsg import MmsgLanes
from userspace.datagram.portable import PortableLanes
from xdp.policy import Policy

pytestmark = pytest.mark.root

DEADLINE = 10.0
PORT = 8001
T = TypeVar("T")

Backend = type[MmsgLanes] | type[PortableLanes]


@pytest.fixture(params=[MmsgLanes, PortableLanes], ids=["mmsg", "portable"])
def backend(request: pytest.FixtureRequest) -> Backend:
    chosen: Backend = request.param
    return chosen


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=30)


class Hosts:
    """Two namespaces joined by a veth of MTU 1500: 192.0.2.1 and fd00::1 here, .2 and ::2 there."""

    def __init__(self) -> None:
        suffix = secrets.token_hex(4)
        self.names = (f"sl-a-{suffix}", f"sl-b-{suffix}")

    def __enter__(self) -> Hosts:
        a, b = self.names
        try:
            for name in self.names:
                run("ip", "netns", "add", name)
            run(
                "ip",
                "-n",
                a,
                "link",
                "add",
                "v0",
                "mtu",
                "1500",
                "type",
                "veth",
                "peer",
                "name",
                "v0",
                "netns",
                b,
            )
            for number, name in enumerate(self.names, start=1):
                run("ip", "-n", name, "address", "add", f"192.0.2.{number}/24", "brd", "+", "dev", "v0")
                run("ip", "-n", name, "address", "add", f"fd00::{number}/64", "dev", "v0", "nodad")
                run("ip", "-n", name, "link", "set", "v0", "up")
                run("ip", "-n", name, "link", "set", "lo", "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True, timeout=30)

    def inside(self, number: int, work: Callable[[], T]) -> T:
        """Run in a thread that is in that namespace; sockets made there stay there."""
        results: list[T] = []
        errors: list[BaseException] = []

        def body() -> None:
            try:
                with Path(f"/run/netns/{self.names[number]}").open("rb") as namespace:
                    _setns(namespace.fileno())
                results.append(work())
            except BaseException as error:  # noqa: BLE001 - raised again in the test's own thread
                errors.append(error)

        thread = threading.Thread(target=body)
        thread.start()
        thread.join(60)
        if errors:
            raise errors[0]
        return results[0]


def _setns(descriptor: int) -> None:
    """os.setns is in Python 3.12."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(descriptor, 0x40000000):  # CLONE_NEWNET
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    with Hosts() as made:
        yield made


def policy() -> Policy:
    return Policy.parse(
        f"""
version = 1
[[lane]]
name = "votes"
[[lane]]
name = "bulk"
[[class]]
name = "staked"
peers = [{{ address = "192.0.2.2", name = "four" }}, {{ address = "fd00::2", name = "six" }}]
[[service]]
name = "s"
ports = [{PORT}]
[[service.rule]]
class = "staked"
kind = "heartbeat"
action = "reply"
lane = "votes"
[[service.rule]]
class = "staked"
action = "lane"
lane = "votes"
[[service.rule]]
action = "lane"
lane = "bulk"
"""
    )


def sender(host: str) -> socket.socket:
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
    sock.settimeout(DEADLINE)
    return sock


@pytest.mark.parametrize(("host", "peer"), [("192.0.2.1", 1), ("fd00::1", 2)])
def test_fragments_arrive_in_their_lane(hosts: Hosts, backend: Backend, host: str, peer: int) -> None:
    sizes = [1400, 1473, 5000, 20_000, 65_507]
    with hosts.inside(0, lambda: backend(policy())) as lanes, hosts.inside(1, lambda: sender(host)) as client:
        for size in sizes:
            payload = os.urandom(size)
            client.sendto(payload, (host, PORT))
            with lanes.receive(timeout=DEADLINE) as batch:
                assert len(batch) == 1
                assert bytes(batch[0]) == payload
                assert (batch.lanes[0], batch.classes[0], batch.peers[0]) == (0, 1, peer)
        assert lanes.statistics().balanced


def test_companion_takes_fragments(hosts: Hosts) -> None:
    companion = hosts.inside(0, lambda: Companion.open(policy()))
    try:
        with hosts.inside(1, lambda: sender("192.0.2.1")) as client:
            payload = os.urandom(9000)
            client.sendto(payload, ("192.0.2.1", PORT))
            assert companion.lanes is not None
            with companion.lanes.receive(1, timeout=DEADLINE) as batch:
                assert bytes(batch[0]) == payload
                assert batch.lanes[0] == 0
    finally:
        companion.close()


def test_broadcast_heartbeats_are_not_answered(hosts: Hosts, backend: Backend) -> None:
    probe = struct.pack("!IB3xQQQ", 0x534C4842, 1, 7, 8, 9)
    with (
        hosts.inside(0, lambda: backend(policy())) as lanes,
        hosts.inside(1, lambda: sender("192.0.2.1")) as client,
    ):
        client.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        client.sendto(probe, ("192.0.2.255", PORT))
        client.sendto(b"broadcast, but no probe", ("192.0.2.255", PORT))
        client.sendto(b"short", ("192.0.2.255", PORT))
        client.sendto(probe, ("192.0.2.1", PORT))
        client.sendto(b"last", ("192.0.2.1", PORT))
        seen: list[bytes] = []
        while b"last" not in seen:
            with lanes.receive(timeout=DEADLINE) as batch:
                assert len(batch), "nothing came any more"
                seen += [bytes(view) for view in batch]
        assert seen == [b"broadcast, but no probe", b"short", b"last"]
        assert lanes.statistics().replied == 1
        assert client.recv(100)[4] == 2
        client.settimeout(0)
        with pytest.raises(BlockingIOError):
            client.recv(100)


def test_without_ipv6(hosts: Hosts, backend: Backend) -> None:
    run("ip", "netns", "exec", hosts.names[0], "sysctl", "-qw", "net.ipv6.conf.all.disable_ipv6=1")
    with (
        hosts.inside(0, lambda: backend(policy())) as lanes,
        hosts.inside(1, lambda: sender("192.0.2.1")) as client,
    ):
        assert lanes.policy.lane_names == ("votes", "bulk")
        client.sendto(b"over IPv4 alone", ("192.0.2.1", PORT))
        with lanes.receive(timeout=DEADLINE) as batch:
            assert batch.peers[0] == 1
            assert lanes.send_back(batch) == 1
        assert client.recv(100) == b"over IPv4 alone"


def test_too_long_for_the_link_but_sent(hosts: Hosts, backend: Backend) -> None:
    """The kernel fragments what is sent; only what no UDP datagram can hold is refused."""
    with (
        hosts.inside(0, lambda: backend(policy())) as lanes,
        hosts.inside(1, lambda: sender("192.0.2.1")) as client,
    ):
        client.bind(("192.0.2.2", 0))
        to = ("192.0.2.2", client.getsockname()[1])
        assert lanes.send(to, [b"a" * 3000, b"b" * 65_508, b"c"]) == 2
        assert [failure.index for failure in lanes.failures] == [1]
        assert [client.recv(65536)[:1] for _ in range(2)] == [b"a", b"c"]
        # nobody routes this from here
        assert lanes.send(("198.51.100.1", 9), [b"x", b"y"]) == 0
        assert {failure.errno for failure in lanes.failures} == {101}  # ENETUNREACH


def messages_out() -> int:
    """Datagrams that UDP has given to IP in this thread's namespace; those that share a message are one."""
    lines = Path("/proc/thread-self/net/snmp").read_text(encoding="ascii").splitlines()
    names, values = (line.split() for line in lines if line.startswith("Udp:"))
    return int(values[names.index("OutDatagrams")])


def test_datagrams_share_messages_and_arrive_by_themselves(hosts: Hosts) -> None:
    with (
        hosts.inside(0, lambda: MmsgLanes(policy())) as lanes,
        hosts.inside(1, lambda: sender("192.0.2.1")) as client,
    ):
        client.bind(("192.0.2.2", 0))
        to = ("192.0.2.2", client.getsockname()[1])
        lanes.send(to, [b"the first finds out where the other is"])
        client.recv(100)
        before = hosts.inside(0, messages_out)
        # 53 times 1,232 bytes are what one message holds; the link's MTU is 1,500.
        payloads = [number.to_bytes(2, "big") * 616 for number in range(100)]
        for start in (0, 50):
            assert lanes.send(to, payloads[start : start + 50]) == 50
            assert [client.recv(65536) for _ in range(50)] == payloads[start : start + 50]
        assert hosts.inside(0, messages_out) - before == 2
        # Longer than the MTU: such ones can't share, and are not asked to twice.
        long = [bytes([number]) * 3000 for number in range(10)]
        for _ in range(2):
            assert lanes.send(to, long) == 10
            assert [client.recv(65536) for _ in range(10)] == long
        assert hosts.inside(0, messages_out) - before == 22
        assert lanes.failures == ()
