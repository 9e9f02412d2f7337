# SPDX-License-Identifier: Apache-2.0
"""Lanes over kernel sockets with the select program: the promise, limits, columns; and without it."""

from __future__ import annotations

import json
import random
import select
import socket
import subprocess
from collections.abc import Iterator
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from sluice_cli.lab import Lab
from tests.kernel.random_traffic import heartbeat
from tests.kernel.selecting import DEADLINE, PORT, Wire, is_loaded, program_id, until
from tests.ordinary_user import nobodys_python
from userspace.datagram.lanes import open_lanes
from userspace.datagram.mmsg import MmsgLanes
from userspace.datagram.selected import open_drains, open_worker_sockets
from userspace.datagram.workers import Workers, open_workers
from xdp._libbpf import lib
from xdp.errors import BusyError, UsageError
from xdp.policy import Policy
from xdp.select import share_port

pytestmark = [pytest.mark.root, pytest.mark.feature("sk_reuseport")]

STAKED, STRANGER, DENIED = "10.81.3.1", "10.81.7.7", "10.81.66.6"
VOTES, SHREDS, BULK = range(3)
UDP_SEGMENT = 103  # linux/udp.h

POLICY = f"""
version = 1
[[lane]]
name = "votes"
[[lane]]
name = "shreds"
rate = 1
burst = 20
demote = "bulk"
[[lane]]
name = "bulk"
quota = 256
[[class]]
name = "staked"
peers = [{{ address = "{STAKED}", name = "one" }}, {{ address = "fd81::3", name = "six" }}]
[[class]]
name = "denied"
prefixes = ["10.81.66.0/24"]
deny = true
[[service]]
name = "s"
ports = [{PORT}]
[[service.kind]]
name = "vote"
match = [{{ offset = 0, value = "56" }}]
[[service.kind]]
name = "shred"
match = [{{ offset = 0, value = "53" }}]
[[service.kind]]
name = "junk"
match = [{{ offset = 0, value = "4a" }}]
[[service.rule]]
class = "staked"
kind = "heartbeat"
action = "reply"
lane = "votes"
[[service.rule]]
kind = "junk"
action = "drop"
[[service.rule]]
class = "staked"
kind = "vote"
action = "lane"
lane = "votes"
[[service.rule]]
kind = "vote"
action = "lane"
lane = "votes"
peer_rate = 1
peer_burst = 5
[[service.rule]]
kind = "shred"
action = "lane"
lane = "shreds"
[[service.rule]]
action = "lane"
lane = "bulk"
"""


@pytest.fixture(scope="module")
def hosts() -> Iterator[Lab]:
    with Lab() as lab:
        yield lab


@pytest.fixture(scope="module")
def wire(hosts: Lab) -> Iterator[Wire]:
    with Wire(hosts) as made:
        yield made


@pytest.fixture(scope="module")
def workers(hosts: Lab) -> Iterator[Workers]:
    """Loaded once; one worker."""
    with hosts.server.enter(), open_workers(Policy.parse(POLICY), 1) as opened:
        yield opened


@pytest.fixture
def lanes(workers: Workers, hosts: Lab) -> Iterator[MmsgLanes]:
    """With sockets of their own, and nothing counted or limited yet."""
    for name in ("counters", "lane_limits"):
        for index, value in list(workers.program.maps[name].items()):
            workers.program.maps[name].update(index, bytes(len(value)))
    with hosts.server.enter():
        opened = workers.open(0).lanes()
    with opened:
        yield opened
        assert opened.statistics().balanced
        assert workers.counters().balanced


def received(lanes: MmsgLanes, count: int) -> list[tuple[int, bytes]]:
    """(lane, payload) of so many datagrams; and that no more are there."""
    found: list[tuple[int, bytes]] = []
    while len(found) < count:
        with lanes.receive(timeout=DEADLINE) as batch:
            assert len(batch), f"{len(found)} of {count} came"
            found += [(lane, bytes(view)) for lane, view in zip(batch.lanes, batch, strict=True)]
    with lanes.try_receive() as batch:
        assert len(batch) == 0
    return found


def test_a_flood_in_a_low_lane_costs_a_high_one_nothing(
    lanes: MmsgLanes, workers: Workers, wire: Wire
) -> None:
    """Nobody reads while it comes, and it is more than any socket buffer holds."""
    program = workers.program
    assert (lanes.selected_by, lanes.selection_refused) == ("kernel", "")
    rounds, flood = 40, 500
    for number in range(rounds):
        wire.send(STAKED, PORT, b"V" + number.to_bytes(2, "big"))
        for _ in range(flood):
            wire.send(STRANGER, PORT, b"x" * 900)
        # So that nothing is lost in front of the sockets.
        until(
            lambda sent=(number + 1) * (flood + 1): program.counters().seen.packets == sent,  # type: ignore[misc]
            "the server's end lost some",
        )
    votes: list[bytes] = []
    first = None
    while len(votes) < rounds:
        with lanes.receive(64, timeout=DEADLINE) as batch:
            assert len(batch), f"{len(votes)} of {rounds} votes came"
            first = batch.lanes[0] if first is None else first
            votes += [bytes(view) for lane, view in zip(batch.lanes, batch, strict=True) if lane == VOTES]
    assert first == VOTES
    assert votes == [b"V" + number.to_bytes(2, "big") for number in range(rounds)]
    while len(batch := lanes.try_receive()):
        batch.release()
    statistics, counters = lanes.statistics(), program.counters()
    assert statistics.overflowed > 0
    # All that the program saw: handed out, or lost in the buffer of its own lane.
    assert statistics.lanes[VOTES].delivered == rounds
    assert statistics.lanes[BULK].delivered + statistics.overflowed == counters.lanes[BULK].seen.packets
    assert counters.lanes[BULK].seen.packets == rounds * flood
    assert statistics.dropped == {}


def test_a_full_lane_is_left_in_its_socket(lanes: MmsgLanes, workers: Workers, wire: Wire) -> None:
    """What is not handed out is not read: the kernel keeps it."""
    for number in range(600):
        wire.send(STRANGER, PORT, b"bulk" + bytes(number % 7))
    until(lambda: workers.program.counters().steered == 600, "not all came")
    with lanes.receive(16, timeout=DEADLINE) as batch:
        assert len(batch) == 16
    assert lanes.statistics().received == 16
    # The application holds the lane's quota of 256: what comes then is dropped, and other lanes go on.
    held = [lanes.receive(256, timeout=DEADLINE)]
    assert len(held[0]) == 256
    wire.send(STAKED, PORT, b"V")
    with lanes.receive(256, timeout=DEADLINE) as batch:
        assert [(lane, bytes(view)) for lane, view in zip(batch.lanes, batch, strict=True)] == [(VOTES, b"V")]
    with lanes.receive(256, timeout=0.0) as batch:
        assert len(batch) == 0
    assert set(lanes.statistics().dropped) == {"lane_full"}
    for batch in held:
        batch.release()


def test_in_an_event_loop(lanes: MmsgLanes, workers: Workers, wire: Wire) -> None:
    """The descriptor is readable as long as some lane has something, read already or not."""
    descriptor = lanes.fileno()
    assert select.select([descriptor], [], [], 0)[0] == []
    for number in range(100):
        wire.send(STRANGER, PORT, b"bulk" + bytes(number))
    until(lambda: workers.program.counters().steered == 100, "not all came")
    wire.send(STAKED, PORT, b"V")
    until(lambda: workers.program.counters().steered == 101, "not all came")
    order: list[int] = []
    while select.select([descriptor], [], [], 0)[0]:
        with lanes.try_receive(8) as batch:
            order += batch.lanes
    assert order == [VOTES] + [BULK] * 100


def test_limits_demotion_and_drops(lanes: MmsgLanes, workers: Workers, wire: Wire) -> None:
    program = workers.program
    for number in range(12):
        wire.send("10.81.9.9", PORT, b"V" + bytes([number]))
    for number in range(30):
        wire.send("fd81::99", PORT, b"S" + bytes([number]))
    wire.send(STRANGER, PORT, b"Junk")
    wire.send(DENIED, PORT, b"V")
    until(lambda: program.counters().seen.packets == 44, "not all came")
    counts = program.counters()
    votes = 12 - counts.verdicts["drop_peer_limit"].packets
    # The buckets hold 5 and 20; each slow second of this machine is one more.
    assert 5 <= votes < 12
    demoted = counts.lanes[SHREDS].demoted_from
    assert 0 < demoted <= 10
    got = received(lanes, votes + 30)
    assert got[:votes] == [(VOTES, b"V" + bytes([number])) for number in range(votes)]
    assert [lane for lane, _ in got[votes:]] == [SHREDS] * (30 - demoted) + [BULK] * demoted
    assert lanes.statistics().overflowed == 0, "what the policy drops is no overflow"
    assert program.refused() == {"drop_peer_limit": 12 - votes, "drop_policy": 1, "drop_denied": 1}


def test_columns_and_heartbeats(lanes: MmsgLanes, hosts: Lab) -> None:
    """As without the program, and answered in the process; what is sent back comes from the port."""
    with hosts.client.enter():
        hosts.client.run(["ip", "address", "add", f"{STAKED}/16", "dev", hosts.client.interface])
        client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with client:
        client.settimeout(DEADLINE)
        client.bind((STAKED, 0))
        client.connect((str(hosts.server.ipv4), PORT))
        client.send(b"Junk")  # dropped, and silently: an ICMP error would end what follows
        probe = heartbeat(random.Random(1))
        client.send(probe)
        for payload in (b"V", b"other", b"S" + b"long" * 2500):  # the last one in fragments
            client.send(payload)
        got: list[tuple[int, ...]] = []
        while len(got) < 3:
            with lanes.receive(timeout=DEADLINE) as batch:
                assert len(batch)
                columns = (batch.lanes, batch.services, batch.classes, batch.kinds, batch.peers)
                got += list(zip(*columns, strict=True))
                count = len(batch)
                assert lanes.send_back(batch) == count
        assert sorted(got) == [(VOTES, 1, 1, 1, 1), (SHREDS, 1, 1, 2, 1), (BULK, 1, 1, 0, 1)]
        echoes = {client.recv(65536) for _ in range(4)}
    reply = probe[:4] + bytes([lib.SLUICE_HEARTBEAT_REPLY]) + probe[5:]
    assert echoes == {reply, b"V", b"other", b"S" + b"long" * 2500}
    assert lanes.statistics().replied == 1
    peer = lanes.classifier.peer(IPv4Address(STAKED))
    assert peer is not None
    assert peer["packets"] == 4


def test_datagrams_that_share_a_message_are_told_apart(
    lanes: MmsgLanes, workers: Workers, hosts: Lab
) -> None:
    """The program sees the first of them only; the rest must not get into its lane, nor past the policy."""
    with hosts.server.enter():  # over loopback: a cable carries them one by one
        client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with client:
        client.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, 4)
        client.sendto(b"V001V002x003J004S005", ("127.0.0.1", PORT))
        got = sorted(received(lanes, 4))
    assert workers.counters().seen.packets == 1
    assert got == [(VOTES, b"V001"), (VOTES, b"V002"), (SHREDS, b"S005"), (BULK, b"x003")]
    assert lanes.statistics().discarded == {"drop_policy": 1}


def test_broadcast_comes_once_and_is_not_answered(
    lanes: MmsgLanes, workers: Workers, hosts: Lab, wire: Wire
) -> None:
    """The kernel gives it to every socket of the port, past the program."""
    with hosts.client.enter():
        client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        for payload in (heartbeat(random.Random(2)), b"V to all", b"other to all"):
            client.sendto(payload, ("10.81.255.255", PORT))
        wire.send(STAKED, PORT, b"V to one")
        assert sorted(received(lanes, 3)) == [
            (VOTES, b"V to all"),
            (VOTES, b"V to one"),
            (BULK, b"other to all"),
        ]
    assert lanes.statistics().replied == 0
    assert workers.program.counters().seen.packets == 1


def test_open_lanes_takes_the_program(hosts: Lab, wire: Wire) -> None:
    """Another policy while it is open; gone with it."""
    text = POLICY.replace(str(PORT), str(PORT + 1))
    with hosts.server.enter():
        opened = open_lanes(Policy.parse(text), mode="mmsg")
    with opened:
        assert isinstance(opened, MmsgLanes)
        assert opened.program is not None
        number = program_id(opened.program)
        said = opened.status()
        assert (said["selected_by"], said["selection_refused"]) == ("kernel", "")
        assert said["ports"] == [PORT + 1]
        wire.send(STRANGER, PORT + 1, b"S1")
        assert received(opened, 1) == [(SHREDS, b"S1")]
        shreds = 'kind = "shred"\naction = "lane"\nlane = "shreds"'
        opened.swap(Policy.parse(text.replace(shreds, 'kind = "shred"\naction = "drop"')))
        wire.send(STRANGER, PORT + 1, b"S2")
        wire.send(STRANGER, PORT + 1, b"other")
        assert received(opened, 1) == [(BULK, b"other")]
        statistics = opened.statistics()
        assert (statistics.received, statistics.refused) == (2, {"drop_policy": 1})
        with pytest.raises(UsageError, match="other lanes"):
            opened.swap(Policy.parse(text.replace('"bulk"', '"rest"')))
    # Nothing is pinned, so the program goes with the sockets, after a grace period.
    until(lambda: not is_loaded(number), "the program is still there")


def test_a_port_is_ours_alone(workers: Workers, hosts: Lab) -> None:
    """Also when both sides allow sharing: the program is not to choose among another's sockets."""
    with hosts.server.enter(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        with pytest.raises(BusyError, match=f"port {PORT} is in use by process"):
            open_lanes(Policy.parse(POLICY), mode="mmsg")
        share_port(other)
        other.bind((str(hosts.server.ipv4), PORT + 2))
        with pytest.raises(BusyError, match=f"port {PORT + 2} is in use by process"):
            open_drains(workers.program, [PORT + 2])


UNPRIVILEGED = """
import json, sys
from userspace.datagram.lanes import open_lanes
with open_lanes(sys.argv[1], mode="mmsg") as lanes:
    print(json.dumps(lanes.status()))
"""


def test_without_privileges_it_says_why_and_goes_on(hosts: Lab, tmp_path: Path) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text(POLICY.replace(str(PORT), str(PORT + 4)), encoding="utf-8")
    for path in (*policy.parents, policy):
        if path.is_relative_to(tmp_path.parent.parent):
            path.chmod(0o755)
    command = nobodys_python("-c", UNPRIVILEGED, str(policy))
    with hosts.server.enter():
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    status = json.loads(done.stdout)
    assert (status["mode"], status["selected_by"]) == ("mmsg", "process")
    assert "may not load" in status["selection_refused"]


def test_lanes_by_socket_take_no_shared_messages(workers: Workers, hosts: Lab) -> None:
    with hosts.server.enter():
        drains = open_drains(workers.program, [PORT + 3])
        sockets = open_worker_sockets(workers.program, 3, drains, 0)
    for drain in drains:
        drain.socket.close()
    with pytest.raises(UsageError, match="no gro"):
        MmsgLanes(Policy.parse(POLICY), selected=sockets, gro=True)
    assert all(one.socket.fileno() == -1 for one in sockets)
