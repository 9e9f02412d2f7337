# SPDX-License-Identifier: Apache-2.0
"""AF_XDP lanes on the real kernel: what is sent arrives, both ways, with all that is said about it."""

from __future__ import annotations

import select
import socket
import threading
import time
from array import array
from collections.abc import Callable

import pytest
from scapy.layers.inet import UDP
from scapy.layers.l2 import Dot1Q, Ether

from sluice_cli.generator import Generator
from sluice_cli.lab import Lab
from sluice_cli.traffic import Template, udp_frame
from tests.cable import NATIVE
from tests.kernel.datapath import (
    BULK,
    POLICY,
    SECONDS,
    UNUSED,
    VOTES,
    client_socket,
    collect,
    lanes_on,
    load,
    server_address,
    until,
)
from userspace.datagram.batch import Batch
from userspace.datagram.descriptors import LaneSpec, Mode
from userspace.datagram.destination import Destination, resolve_destination
from userspace.datagram.lanes import Lanes, open_lanes
from userspace.datagram.xsk import interface_queues, open_queues
from xdp.errors import UnsupportedError, UsageError
from xdp.policy import Policy
from xdp.program import SteerProgram

pytestmark = [
    pytest.mark.root,
    pytest.mark.bpf,
    pytest.mark.filterwarnings("ignore:not a bytes object:DeprecationWarning"),
]


@pytest.fixture
def lab(make_lab: Callable[..., Lab]) -> Lab:
    """Hosts that know each other's MAC: a busy machine may take longer than the kernel asks for it."""
    return make_lab(static_neighbours=True)


@pytest.fixture
def program(datapath_program: SteerProgram) -> SteerProgram:
    return datapath_program


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("mode", [NATIVE, "generic-copy"])
def test_receive(lab: Lab, program: SteerProgram, mode: Mode, version: int) -> None:
    with lanes_on(program, lab, mode=mode) as lanes, client_socket(lab, version) as client:
        assert lanes.mode == mode
        before = time.monotonic_ns()
        sent = [b"Vote %d" % index for index in range(20)] + [b"other", b"", b"x" * 1400]
        for payload in sent:
            client.sendto(payload, (server_address(lab, version), VOTES))
        found: list[bytes] = []
        while len(found) < len(sent):
            with lanes.receive(timeout=SECONDS) as batch:
                found += map(bytes, batch)
                assert set(batch.lanes) == {0}
                assert set(batch.services) == {1}
                assert list(batch.kinds) == [int(bytes(view[:1]) == b"V") for view in batch]
                assert set(batch.peers) == ({1} if version == 4 else {0})
                assert set(batch.classes) == ({1} if version == 4 else {0})
                assert all(before <= when <= time.monotonic_ns() for when in batch.times)
                host, port = client.getsockname()[:2]
                assert {(str(address), at) for address, at in map(batch.source, range(len(batch)))} == {
                    (host, port)
                }
        assert found == sent
        client.sendto(b"nobody's", (server_address(lab, version), UNUSED))
        with lanes.receive(timeout=0.05) as batch:
            assert not batch
        assert lanes.statistics().lane("votes").received == len(sent)


def test_waiting_shows_in_timestamps(lab: Lab) -> None:
    """In a lane that has them; in one without, all of a batch have the time at which it was read."""
    policy = POLICY.replace('name = "votes"\n[[lane]]', 'name = "votes"\ntimestamps = true\n[[lane]]')
    with load(policy) as program, lanes_on(program, lab) as lanes, client_socket(lab) as client:
        before = time.monotonic_ns()
        for pause in (0.005, 0.0):
            for port in (VOTES, BULK):
                client.sendto(b"x", (server_address(lab), port))
            time.sleep(pause)  # what is measured, not waited for
        until(lambda: [lanes.statistics().lane(name).waiting for name in ("votes", "bulk")] == [2, 2], "all")
        read = time.monotonic_ns()
        with lanes.receive(timeout=SECONDS) as batch:
            assert list(batch.lanes) == [0, 0, 1, 1]
            first, second, *bulk = batch.times
        assert before <= first < second <= read
        assert second - first >= 4_000_000
        assert read <= bulk[0] == bulk[1] <= time.monotonic_ns()


def test_without_metadata(lab: Lab, program: SteerProgram) -> None:
    """Another program's frames are understood from their headers."""
    with lanes_on(program, lab, cookie=0) as lanes, client_socket(lab, 6) as client:
        client.sendto(b"payload", (server_address(lab, 6), BULK))
        with lanes.receive(timeout=SECONDS) as batch:
            assert [bytes(view) for view in batch] == [b"payload"]
            assert (list(batch.lanes), list(batch.services), list(batch.peers)) == ([1], [0], [0])
            assert 0 <= time.monotonic_ns() - batch.times[0] < SECONDS * 1e9
            assert str(batch.source(0)[0]) == client.getsockname()[0]


def test_highest_lane_first(lab: Lab, program: SteerProgram) -> None:
    with lanes_on(program, lab) as lanes, client_socket(lab) as client:
        for index in range(10):
            client.sendto(b"bulk %d" % index, (server_address(lab), BULK))
            client.sendto(b"vote %d" % index, (server_address(lab), VOTES))
        until(lambda: lanes.statistics().lane("votes").waiting == 10, "10 votes")
        until(lambda: lanes.statistics().lane("bulk").waiting == 10, "10 others")
        found = collect(lanes, 20)
        assert found == [(0, b"vote %d" % index) for index in range(10)] + [
            (1, b"bulk %d" % index) for index in range(10)
        ]


def test_lingering_makes_larger_batches(
    lab: Lab, program: SteerProgram, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What arrives while it lingers is in the batch."""
    with lanes_on(program, lab) as lanes, client_socket(lab) as client:

        def send(count: int) -> None:
            before = lanes.statistics().lane("votes").waiting
            for _ in range(count):
                client.sendto(b"vote", (server_address(lab), VOTES))
            until(lambda: lanes.statistics().lane("votes").waiting == before + count, "what was sent")

        def receive(seconds: float) -> int:
            with lanes.receive(32, timeout=0, linger=seconds) as batch:
                return len(batch)

        # So long that two packets are always expected meanwhile, and so short that they never are.
        long, short = 60.0, 1e-9
        slept: list[float] = []
        send(8)
        assert receive(long) == 8
        send(1)
        with monkeypatch.context() as patch:
            sleep = time.sleep

            def linger(seconds: float) -> None:
                patch.setattr(time, "sleep", sleep)
                slept.append(seconds)
                send(5)

            patch.setattr(time, "sleep", linger)
            assert receive(long) == 6
            patch.setattr(time, "sleep", linger)
            assert receive(long) == 5
            assert receive(short) == 0
            assert receive(long) == 0  # nothing came before it
        assert slept == [long, long]


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("mode", [NATIVE, "generic-copy"])
def test_send(lab: Lab, program: SteerProgram, mode: Mode, version: int) -> None:
    """The client's kernel checks every header and checksum."""
    with lanes_on(program, lab, mode=mode) as lanes, client_socket(lab, version) as client:
        address = client.getsockname()
        with lab.server.enter():
            destination = resolve_destination(lab.server.interface, address[0], address[1], VOTES)
        maximum = destination.payload_maximum
        assert maximum == 1500 - (28 if version == 4 else 48)
        sizes = [*range(64), 1023, maximum - 1, maximum]
        payloads = [bytes(index + size & 0xFF for index in range(size)) for size in sizes]
        assert lanes.send(destination, payloads) == len(payloads)
        for payload in payloads:
            found, source = client.recvfrom(2048)
            assert found == payload
            assert source[:2] == (server_address(lab, version), VOTES)
        assert lanes.flush()
        statistics = lanes.statistics()
        assert statistics.sent == sum(queue.completed for queue in statistics.queues) == len(payloads)
        assert lanes.statistics().queues[0].transmit_invalid == 0


def test_send_other_forms(lab: Lab, program: SteerProgram) -> None:
    with lanes_on(program, lab) as lanes, client_socket(lab) as client:
        to = client.getsockname()
        with lab.server.enter():  # resolved here, once
            assert lanes.send(to, [b"by address", bytearray(b"array"), memoryview(b"view")], port=BULK) == 3
        assert [client.recvfrom(100) for _ in range(3)] == [
            (payload, (server_address(lab), BULK)) for payload in (b"by address", b"array", b"view")
        ]
        data = b"0123456789"
        assert lanes.send_columns(to, data, array("I", [0, 5, 10]), array("I", [2, 5, 0]), port=BULK) == 3
        assert [client.recv(100) for _ in range(3)] == [b"01", b"56789", b""]
        client.sendto(b"to be sent on", (server_address(lab), VOTES))
        with lanes.receive(timeout=SECONDS) as batch:
            assert lanes.send(to, batch, port=BULK) == 1
            assert bytes(batch[0]) == b"to be sent on"  # a copy went
        assert client.recv(100) == b"to be sent on"
        assert lanes.send(to, [], port=BULK) == 0
        with lanes.receive(timeout=0) as empty:
            assert lanes.send(to, empty, port=BULK) == 0


def test_send_refuses(lab: Lab, program: SteerProgram) -> None:
    with lanes_on(program, lab) as lanes:
        to = Destination(lab.server.mac, lab.client.mac, ("10.81.0.1", VOTES), ("10.81.0.2", 9))
        with pytest.raises(UsageError, match="payload 1 has 1473 bytes; 1472 fit"):
            lanes.send(to, [b"good", bytes(1473)])
        with pytest.raises(UsageError, match="payload 1 is not within"):
            lanes.send_columns(to, b"12345", array("I", [0, 4]), array("I", [4, 2]))
        with pytest.raises(UsageError, match="belong together"):
            lanes.send_columns(to, b"12345", array("I", [0, 4]), array("I", [4]))
        with pytest.raises(UsageError, match="bytes-like"):
            lanes.send(to, ["text"])  # type: ignore[list-item]
        with pytest.raises(UsageError, match="port to send from"):
            lanes.send(("10.81.0.2", 9), [b"where from?"])
        assert lanes.statistics().sent == 0


def test_send_more_than_fits(lab: Lab, program: SteerProgram) -> None:
    """As many are accepted as there is room for, and each of them leaves."""
    with lanes_on(program, lab, transmit_ring=64) as lanes:
        to = Destination(lab.server.mac, lab.client.mac, ("10.81.0.1", VOTES), ("10.81.0.2", 9))
        payload, left = b"x" * 100, 5000
        deadline = time.monotonic() + SECONDS
        while left:
            accepted = lanes.send(to, [payload] * left)
            assert 0 <= accepted <= left
            left -= accepted
            assert time.monotonic() < deadline
        assert lanes.flush(SECONDS)
        statistics = lanes.statistics().queues[0]
        assert (statistics.sent, statistics.completed) == (5000, 5000)
        assert statistics.frames.free == 128
        until(lambda: lab.client.statistics()["rx_queue_0_xdp_packets"] >= 5000, "5000 packets at the client")


def test_send_tagged(lab: Lab, program: SteerProgram) -> None:
    with lanes_on(program, lab) as lanes:
        with lab.client.enter():
            wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
        with wire:
            wire.settimeout(SECONDS)
            wire.bind((lab.client.interface, 3))
            # The kernel takes the tag off before it shows the packet: ask for it (PACKET_AUXDATA).
            wire.setsockopt(263, 8, 1)
            to = Destination(
                lab.server.mac,
                lab.client.mac,
                ("fd81::1", VOTES),
                ("fd81::2", 9),
                vlan=42,
                flow_label=0xABCDE,
            )
            assert lanes.send(to, [b"tagged"]) == 1
            while True:
                data, auxiliary, _, _ = wire.recvmsg(2048, 64)
                frame = Ether(data)
                if UDP in frame:
                    break
            assert bytes(frame[UDP].payload) == b"tagged"
            tag = (
                frame[Dot1Q].vlan
                if Dot1Q in frame
                else int.from_bytes(auxiliary[0][2][16:18], "little") & 0xFFF
            )
            assert tag == 42
            assert frame["IPv6"].fl == 0xABCDE


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("mode", [NATIVE, "generic-copy"])
def test_send_back(lab: Lab, program: SteerProgram, mode: Mode, version: int) -> None:
    with lanes_on(program, lab, mode=mode) as lanes, client_socket(lab, version) as client:
        for round_ in range(20):
            sent = [b"question %d %d" % (round_, index) for index in range(16)]
            for payload in sent:
                client.sendto(payload, (server_address(lab, version), VOTES))
            answered = 0
            while answered < len(sent):
                with lanes.receive(timeout=SECONDS) as batch:
                    assert batch
                    for view in batch:
                        view[:8] = b"ANSWER! "
                    answered += lanes.send_back(batch)
                    assert batch.released
            found = [client.recv(100) for _ in sent]
            expected = [b"ANSWER! " + payload[8:] for payload in sent]
            # While the client finds out the server's address, later questions may overtake waiting ones.
            assert (found if round_ else sorted(found)) == (expected if round_ else sorted(expected))
        assert lanes.flush()
        frames = lanes.frames()[0]
        assert (frames.transmit, sum(frames.application)) == (0, 0)
        assert lanes.statistics().queues[0].echoed == 320


def test_send_back_is_for_own_batches(lab: Lab, make_lab: Callable[..., Lab], program: SteerProgram) -> None:
    with (
        lanes_on(program, lab) as lanes,
        client_socket(lab) as client,
        lanes_on(program, make_lab()) as others,
    ):
        # The second registration has taken the program's sockets; give them back to the first.
        client.sendto(b"question", (server_address(lab), VOTES))
        foreign = Batch(others, None, 0)
        with pytest.raises(UsageError, match="came from"):
            lanes.send_back(foreign)


def test_resolve(lab: Lab) -> None:
    with lab.server.enter():
        for address in (lab.client.ipv4, lab.client.ipv6, lab.client.link_local):
            found = resolve_destination(lab.server.interface, address, 9000, VOTES)
            assert found.destination_mac == lab.client.mac
            assert found.source_mac == lab.server.mac
            assert found.source[1] == VOTES
        with pytest.raises(UnsupportedError, match="does not answer"):
            resolve_destination(lab.server.interface, "10.81.99.99", 9000, VOTES, timeout=0.2)
        with pytest.raises(UnsupportedError, match="no way to 192"):
            resolve_destination(lab.server.interface, "192.0.2.1", 9000, VOTES)
        with pytest.raises(UnsupportedError, match="no way"):
            resolve_destination(lab.server.interface, lab.server.ipv4, 9000, VOTES)
        with pytest.raises(UsageError, match="no interface"):
            resolve_destination("nonesuch", "192.0.2.1", 9000, VOTES)


def test_descriptor_for_event_loops(lab: Lab, program: SteerProgram) -> None:
    with lanes_on(program, lab) as lanes, client_socket(lab) as client, select.epoll() as loop:
        loop.register(lanes.fileno(), select.EPOLLIN)
        while loop.poll(0):  # a link that came up, say
            lanes.try_receive().release()
        client.sendto(b"wake up", (server_address(lab), VOTES))
        assert loop.poll(SECONDS)
        assert loop.poll(0)  # still: level-triggered
        with lanes.try_receive() as batch:
            assert [bytes(view) for view in batch] == [b"wake up"]
        assert not loop.poll(0)


def test_all_queues(make_lab: Callable[..., Lab], program: SteerProgram) -> None:
    """Every queue is served, together or each by a thread of its own."""
    lab = make_lab(queues=2)
    templates = [Template(udp_frame(lab.client, lab.server, BULK, b"x" * 64))]
    with lanes_on(program, lab) as lanes:
        assert lanes.queue_numbers == (0, 1)
        for cpu in (0, 1):
            with Generator(lab.client, cpu=cpu) as generator:
                assert generator.run(count=500, rate=50_000, templates=templates).sent == 500
        assert len(collect(lanes, 1000)) == 1000
        assert [queue.lanes[1].received for queue in lanes.statistics().queues] == [500, 500]
        parts = lanes.split()
        assert [part.queue_numbers for part in parts] == [(0,), (1,)]
        assert lanes.split() is parts
        counts = [0, 0]

        def serve(index: int) -> None:
            counts[index] = len(collect(parts[index], 500))

        threads = [threading.Thread(target=serve, args=(index,)) for index in range(2)]
        for thread in threads:
            thread.start()
        for cpu in (0, 1):
            with Generator(lab.client, cpu=cpu) as generator:
                assert generator.run(count=500, rate=50_000, templates=templates).sent == 500
        for thread in threads:
            thread.join(SECONDS)
        assert counts == [500, 500]


def test_chosen_queue(make_lab: Callable[..., Lab], program: SteerProgram) -> None:
    lab = make_lab(queues=2)
    with lab.server.enter():
        assert interface_queues(lab.server.interface) == 2
        with pytest.raises(UsageError, match="allowed: 0 to 1"):
            open_queues(lab.server.interface, [LaneSpec(number=0, name="a")], mode=NATIVE, queues=[2])
        with pytest.raises(UsageError, match="no interface"):
            interface_queues("nonesuch")
    with lanes_on(program, lab, queues=[1]) as lanes:
        assert lanes.queue_numbers == (1,)


def test_overflow_is_counted(lab: Lab, program: SteerProgram) -> None:
    """What a full ring drops is in the statistics, packet for packet."""
    specs = (LaneSpec(number=0, name="votes"), LaneSpec(number=1, name="bulk", ring=64))
    templates = [Template(udp_frame(lab.client, lab.server, BULK, b"x" * 64))]
    with lanes_on(program, lab, specs) as lanes, Generator(lab.client) as generator:
        seen = program.counters().seen.packets
        assert generator.run(count=5000, rate=200_000, templates=templates).sent == 5000
        until(lambda: program.counters().seen.packets - seen >= 5000, "5000 packets seen")
        bulk = lanes.statistics().lane("bulk")
        assert (bulk.waiting, bulk.ring_full, bulk.dropped, bulk.fill_empty) == (64, 4936, 0, 0)
        assert len(collect(lanes, 64)) == 64


@pytest.mark.parametrize("mode", ["auto", "generic", "mmsg", "portable"])
def test_ladder(lab: Lab, mode: str) -> None:
    """The same program over every rung; fragments come by the companion sockets."""
    expected = {"auto": NATIVE, "generic": "generic-copy"}.get(mode, mode)
    with lab.server.enter():
        lanes = open_lanes(Policy.parse(POLICY), interface=lab.server.interface, mode=mode)  # type: ignore[arg-type]
    with lanes, client_socket(lab) as client:
        assert isinstance(lanes, Lanes)
        assert lanes.mode == lanes.status()["mode"] == expected
        refused = lanes.status()["refused"]
        assert isinstance(refused, list)
        assert [entry["mode"] for entry in refused] == (["native-zero-copy"] if mode == "auto" else [])
        sent = [b"small", b"fragments" * 500]
        for payload in sent:
            client.sendto(payload, (server_address(lab), BULK))
        found: list[bytes] = []
        while len(found) < 2:
            with lanes.receive(timeout=SECONDS) as batch:
                assert batch
                assert set(batch.lanes) == {1}
                found += map(bytes, batch)
                lanes.send_back(batch)
        assert sorted(found) == sorted(sent)
        assert sorted(client.recv(9000) for _ in range(2)) == sorted(sent)


def test_ladder_refuses(lab: Lab) -> None:
    policy = Policy.parse(POLICY + '[interface]\nminimum_mode = "native-zero-copy"\n')
    with lab.server.enter():
        with pytest.raises(UnsupportedError, match="zero-copy") as caught:
            open_lanes(policy, interface=lab.server.interface)
        assert "native-zero-copy: " in caught.value.detail
        with pytest.raises(UsageError, match="minimum_mode"):
            open_lanes(policy, interface=lab.server.interface, mode="generic")
        with pytest.raises(UsageError, match="interface"):
            open_lanes(policy)
        with pytest.raises(UsageError, match="no mode"):
            open_lanes(policy, mode="fast")  # type: ignore[arg-type]
        with pytest.raises(UsageError, match="no interface"):
            open_lanes(Policy.parse(POLICY), interface="nonesuch")
