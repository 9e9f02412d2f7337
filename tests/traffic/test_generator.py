# SPDX-License-Identifier: Apache-2.0
"""The load generator: what it counts as sent is what arrives, packet for packet and byte for byte."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Any

import pytest
from pyroute2 import IPRoute

from sluice_cli.generator import Generator, GeneratorResult, Stream
from sluice_cli.lab import Host, Lab
from sluice_cli.traffic import (
    SHRED_STAMP,
    VOTE_STAMP,
    Template,
    shred_payload,
    udp_frame,
    vote_payload,
)
from xdp.errors import InterfaceGoneError, UsageError
from xdp.headers import kernel_source

pytestmark = [
    pytest.mark.root,
    pytest.mark.bpf,
    # bcc's own complaint about str, which it takes all the same
    pytest.mark.filterwarnings("ignore:not a bytes object:DeprecationWarning"),
]

PORT = 8001
SECONDS = 10.0  # deadline for what takes milliseconds
SO_RCVBUFFORCE = 33  # asm-generic/socket.h; Python has no name for it
STAMP = struct.Struct("=QQ")

# Counts UDP and drops it; everything else passes, so that the lab's own chatter is not counted.
COUNTER = r"""
#include <uapi/linux/bpf.h>
BPF_ARRAY(counts, __u64, 2);

int count_udp(struct xdp_md *ctx)
{
    unsigned char *p = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
    __u32 packets = 0, bytes = 1;
    __u64 *n;

    if (p + 34 > end)
        return XDP_PASS;
    if (!(p[12] == 0x08 && p[13] == 0x00 && p[23] == 17) &&
        !(p[12] == 0x86 && p[13] == 0xdd && p[20] == 17))
        return XDP_PASS;
    n = counts.lookup(&packets);
    if (n)
        __sync_fetch_and_add(n, 1);
    n = counts.lookup(&bytes);
    if (n)
        __sync_fetch_and_add(n, end - p);
    return XDP_DROP;
}
"""


class UdpCounter:
    """A native XDP program on a host that counts what the generator sends it, independently of it."""

    def __init__(self, host: Host) -> None:
        from bcc import BPF

        os.environ.setdefault("BCC_KERNEL_SOURCE", str(kernel_source()))
        self.module = BPF(text=COUNTER, cflags=["-Wno-macro-redefined"])
        host.attach(os.dup(self.module.load_func("count_udp", BPF.XDP).fd))

    def take(self) -> tuple[int, int]:
        """Packets and bytes since the last call."""
        table = self.module["counts"]
        found = (table[0].value, table[1].value)
        for index in range(2):
            table[index] = table.Leaf(0)
        return found


@pytest.fixture
def counter(lab: Lab) -> Iterator[UdpCounter]:
    found = UdpCounter(lab.server)
    yield found
    found.module.cleanup()


@pytest.fixture
def generator(lab: Lab) -> Iterator[Generator]:
    with Generator(lab.client) as made:
        yield made


@pytest.fixture
def receiver(lab: Lab) -> Iterator[socket.socket]:
    """A kernel socket on the server, v4 and v6: the kernel checks all checksums first."""
    lab.server.attach_pass()
    with lab.server.enter():
        sock = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    with sock:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 64 << 20)
        sock.bind(("::", PORT))
        sock.settimeout(SECONDS)
        yield sock


def drain(sock: socket.socket, count: int) -> list[tuple[bytes, tuple[IPv4Address | IPv6Address, int]]]:
    """Exactly ``count`` datagrams, and proof that there is no further one."""
    found = []
    for _ in range(count):
        payload, sender = sock.recvfrom(65536)
        address = ip_address(sender[0])
        assert isinstance(address, IPv6Address)
        found.append((payload, (address.ipv4_mapped or address, sender[1])))
    sock.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        sock.recv(1)
        raise AssertionError("more datagrams than were sent")
    sock.settimeout(SECONDS)
    return found


def frame(lab: Lab, payload: bytes, **options: object) -> bytes:
    return udp_frame(lab.client, lab.server, PORT, payload, **options)  # type: ignore[arg-type]


class TestCounts:
    @pytest.mark.parametrize("version", [4, 6])
    @pytest.mark.parametrize("size", [22, 1232])
    def test_sent_is_received_at_a_paced_rate(
        self, lab: Lab, generator: Generator, counter: UdpCounter, version: int, size: int
    ) -> None:
        template = Template(frame(lab, bytes(size), version=version), stamp=0)
        result = generator.run(seconds=1.0, rate=50_000, templates=[template])
        packets, octets = counter.take()
        assert result.refused == 0
        assert result.sent == packets
        assert result.streams[0].bytes == octets == packets * len(template.frame)
        # On schedule, but for what a stalled machine made it give up, which it admits.
        assert 0.95 * 50_000 <= result.sent + result.streams[0].missed <= 1.05 * 50_000
        assert result.sent <= 50_001

    def test_pace(self, lab: Lab, generator: Generator, counter: UdpCounter) -> None:
        template = Template(frame(lab, bytes(64)), stamp=0)
        for rate in (1_000, 33_333.3, 200_000):
            result = generator.run(seconds=0.6, rate=rate, templates=[template])
            assert counter.take()[0] == result.sent
            assert 0.95 * 0.6 * rate <= result.sent + result.streams[0].missed <= 1.05 * 0.6 * rate + 1

    @pytest.mark.parametrize("rate", [None, 100_000])
    def test_an_exact_count(
        self, lab: Lab, generator: Generator, counter: UdpCounter, rate: float | None
    ) -> None:
        for count in (1, 12_345):
            result = generator.run(count=count, rate=rate, templates=[Template(frame(lab, bytes(22)))])
            assert result.sent == counter.take()[0] == count

    @pytest.mark.parametrize("pristine", [False, True])
    def test_flat_out(self, lab: Lab, generator: Generator, counter: UdpCounter, pristine: bool) -> None:
        result = generator.run(seconds=0.5, templates=[Template(frame(lab, bytes(22)))], pristine=pristine)
        assert result.sent - result.refused == counter.take()[0]
        # Measured: 2 to 5 M/s. A tenth of it would mean that the frames leave one by one.
        assert result.sent > 100_000

    def test_what_a_slow_receiver_refuses_is_counted(self, lab: Lab) -> None:
        """The kernel's stack is slower than the generators; its ring overflows when they have two CPUs."""
        lab.server.attach_pass()
        template = Template(frame(lab, bytes(22)))
        with contextlib.ExitStack() as stack:
            generators = [
                stack.enter_context(Generator(lab.client, cpu=cpu))
                for cpu in sorted(os.sched_getaffinity(0))[:2]
            ]
            for generator in generators:
                generator.start([Stream([template])], seconds=0.3)
            results = [generator.wait(timeout=SECONDS) for generator in generators]
        sent = sum(result.sent for result in results)
        statistics = lab.client.statistics()
        refused = sum(n for name, n in statistics.items() if name.endswith("_xdp_xmit_errors"))
        taken = sum(n for name, n in statistics.items() if name.endswith("_xdp_xmit"))
        # Two CPUs update these counters without a lock, so a few may be lost in the counting.
        assert sent == pytest.approx(taken + refused, rel=0.01)
        assert max(result.refused for result in results) <= refused

    def test_runs_follow_each_other(self, lab: Lab, generator: Generator, counter: UdpCounter) -> None:
        for _ in range(3):
            result = generator.run(count=1000, templates=[Template(frame(lab, bytes(22)), stamp=0)])
            assert result.sent == counter.take()[0] == 1000

    def test_several_streams(self, lab: Lab, generator: Generator, counter: UdpCounter) -> None:
        small, large = (Template(frame(lab, bytes(size)), stamp=0) for size in (22, 1200))
        generator.start(
            [
                Stream([small], rate=2_000, count=1_000, name="votes"),
                Stream([large], rate=40_000, count=20_000, name="bulk"),
                Stream([small], count=777, name="few"),
            ],
            seconds=60,
        )
        result = generator.wait()
        by_name = {stream.name: stream for stream in result.streams}
        assert {name: stream.sent for name, stream in by_name.items()} == {
            "votes": 1_000,
            "bulk": 20_000,
            "few": 777,
        }
        # Never early: the last of n packets is due n - 1 intervals after the first.
        assert by_name["votes"].seconds >= 0.499
        assert by_name["bulk"].seconds >= 0.499
        packets, octets = counter.take()
        assert result.refused == 0
        assert packets == result.sent == sum(stream.sent for stream in result.streams)
        assert octets == sum(stream.bytes for stream in result.streams)
        assert by_name["bulk"].bytes == by_name["bulk"].sent * len(large.frame)

    def test_a_flat_out_stream_starves_no_paced_one(
        self, lab: Lab, generator: Generator, counter: UdpCounter
    ) -> None:
        template = Template(frame(lab, bytes(22)), stamp=0)
        generator.start(
            [Stream([template], count=200_000), Stream([template], rate=10_000, count=200)], seconds=60
        )
        flat, paced = generator.wait().streams
        assert paced.sent == 200
        assert flat.sent == 200_000
        assert paced.seconds >= 0.0199
        assert counter.take()[0] == flat.sent + paced.sent - generator.result().refused

    def test_two_generators_on_two_queues(self, make_lab: Callable[..., Lab]) -> None:
        """The sending CPU chooses the queue."""
        cpus = sorted(os.sched_getaffinity(0))[:2]
        lab = make_lab(queues=max(cpus) + 1)
        counter = UdpCounter(lab.server)
        with contextlib.ExitStack() as stack:
            stack.callback(counter.module.cleanup)
            generators = [stack.enter_context(Generator(lab.client, cpu=cpu)) for cpu in cpus]
            for generator in generators:
                generator.start([Stream([Template(frame(lab, bytes(22)))], rate=20_000, count=5_000)])
            results = [generator.wait() for generator in generators]
        assert [result.sent for result in results] == [5_000] * len(cpus)
        statistics = lab.server.statistics()
        for cpu in cpus:
            assert statistics[f"rx_queue_{cpu}_xdp_packets"] >= 5_000


class TestContents:
    """Through the kernel's own stack, which drops whatever has a wrong checksum."""

    COUNT = 3_000
    RATE = 30_000

    def run(self, generator: Generator, *streams: Stream) -> GeneratorResult:
        generator.start(streams)
        return generator.wait()

    @pytest.mark.parametrize("version", [4, 6])
    @pytest.mark.parametrize(
        ("payload", "stamp"),
        [(bytes(16), 0), (bytes(17), 0), (vote_payload(), VOTE_STAMP), (shred_payload("code"), SHRED_STAMP)],
        ids=["least", "odd", "vote", "shred"],
    )
    def test_sequence_and_time(
        self,
        lab: Lab,
        generator: Generator,
        receiver: socket.socket,
        version: int,
        payload: bytes,
        stamp: int,
    ) -> None:
        template = Template(frame(lab, payload, version=version), stamp=stamp)
        began = time.monotonic_ns()
        self.run(generator, Stream([template], rate=self.RATE, count=self.COUNT))
        ended = time.monotonic_ns()
        times = []
        for expected, (received, sender) in enumerate(drain(receiver, self.COUNT)):
            sequence, sent_ns = STAMP.unpack_from(received, stamp)
            assert sequence == expected
            times.append(sent_ns)
            assert received[:stamp] + received[stamp + 16 :] == payload[:stamp] + payload[stamp + 16 :]
            assert sender == (lab.client.ipv4 if version == 4 else lab.client.ipv6, 40000)
        assert times == sorted(times)
        assert began <= times[0]
        assert times[-1] <= ended

    @pytest.mark.parametrize("version", [4, 6])
    def test_sources_and_ports(
        self, lab: Lab, generator: Generator, receiver: socket.socket, version: int
    ) -> None:
        first = IPv4Address("10.81.7.250") if version == 4 else IPv6Address("fd81::7:fffa")
        template = Template(
            frame(lab, bytes(32), version=version, source_address=first, source_port=50_000), stamp=8
        )
        streams = [Stream([template], rate=self.RATE, count=self.COUNT, sources=100, ports=10, seed=1)]
        self.run(generator, *streams)
        senders = [sender for _, sender in drain(receiver, self.COUNT)]
        addresses = Counter(address for address, _ in senders)
        assert set(addresses) == {type(first)(int(first) + i) for i in range(100)}
        assert {port for _, port in senders} == set(range(50_000, 50_010))
        assert max(addresses.values()) < 4 * self.COUNT / 100, "not evenly chosen"
        self.run(generator, *streams)
        assert [sender for _, sender in drain(receiver, self.COUNT)] == senders, "the seed decides"

    def test_templates_in_turn_with_all_lengths(
        self, lab: Lab, generator: Generator, receiver: socket.socket
    ) -> None:
        payloads = [
            bytes((i + j) & 255 for j in range(size)) for i, size in enumerate((0, 1, 300, 1472, 18, 77))
        ]
        self.run(generator, Stream([Template(frame(lab, p)) for p in payloads], rate=10_000, count=600))
        received = [payload for payload, _ in drain(receiver, 600)]
        assert received == payloads * 100

    @pytest.mark.parametrize("vlans", [[(0x8100, 7)], [(0x88A8, 9), (0x8100, 7)]], ids=["802.1Q", "QinQ"])
    @pytest.mark.parametrize("version", [4, 6])
    def test_vlan(self, lab: Lab, generator: Generator, vlans: list[tuple[int, int]], version: int) -> None:
        """Offsets move with the tags; scapy recomputes the checksums."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from scapy.layers.inet import IP, UDP
            from scapy.layers.inet6 import IPv6
            from scapy.layers.l2 import Ether
            from scapy.packet import Packet
        lab.server.attach_pass()
        with lab.server.enter():
            sniffer = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0003))  # ETH_P_ALL
        with sniffer:
            sniffer.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 64 << 20)
            sniffer.settimeout(SECONDS)
            sniffer.bind((lab.server.interface, 0))
            template = Template(frame(lab, bytes(20), version=version, vlans=vlans), stamp=0)
            self.run(generator, Stream([template], rate=1_000, count=100, sources=5, ports=3))
            found: list[Packet] = []
            while len(found) < 100:
                packet: Packet = Ether(sniffer.recv(2048))  # the kernel has taken off the outer tag
                if UDP in packet and packet[UDP].dport == PORT:
                    found.append(packet)
        sequences = [STAMP.unpack_from(bytes(packet[UDP].payload))[0] for packet in found]
        assert sequences == list(range(100))
        for packet in found:
            sums = [packet[UDP].chksum] + ([packet[IP].chksum] if version == 4 else [])
            again = packet[IP if version == 4 else IPv6].copy()
            del again[UDP].chksum
            if version == 4:
                del again.chksum
            again = type(again)(bytes(again))
            assert sums == [again[UDP].chksum] + ([again.chksum] if version == 4 else [])

    def test_ip_options(self, lab: Lab, generator: Generator, receiver: socket.socket) -> None:
        template = Template(frame(lab, bytes(24), options=b"\x01" * 8), stamp=0)
        self.run(generator, Stream([template], rate=1_000, count=100, sources=5))
        assert [STAMP.unpack_from(payload)[0] for payload, _ in drain(receiver, 100)] == list(range(100))

    def test_no_checksum_stays_none(self, lab: Lab, generator: Generator, receiver: socket.socket) -> None:
        raw = bytearray(frame(lab, bytes(20)))
        raw[14 + 20 + 6 : 14 + 20 + 8] = b"\0\0"
        self.run(generator, Stream([Template(bytes(raw), stamp=0)], rate=10_000, count=100))
        assert [STAMP.unpack_from(payload)[0] for payload, _ in drain(receiver, 100)] == list(range(100))

    def test_frames_that_come_back_changed_are_written_again(
        self, lab: Lab, generator: Generator, receiver: socket.socket
    ) -> None:
        """The kernel recycles frames; a receiver that writes into them must not change what is sent next."""
        lab.server.detach()
        from bcc import BPF

        os.environ.setdefault("BCC_KERNEL_SOURCE", str(kernel_source()))
        # Every second packet is spoilt and dropped, so its frame comes back spoilt.
        text = r"""
        #include <uapi/linux/bpf.h>
        BPF_ARRAY(turn, __u32, 1);
        int spoil(struct xdp_md *ctx)
        {
            unsigned char *p = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
            __u32 zero = 0, *n = turn.lookup(&zero);
            if (!n || p + 70 > end || p[12] != 8 || p[13] || p[23] != 17)
                return XDP_PASS;
            if ((*n)++ & 1)
                return XDP_PASS;
            __builtin_memset(p, 0xee, 70);
            return XDP_DROP;
        }
        """
        module = BPF(text=text, cflags=["-Wno-macro-redefined"])
        lab.server.attach(os.dup(module.load_func("spoil", BPF.XDP).fd))
        payload = shred_payload("data")
        self.run(
            generator, Stream([Template(frame(lab, payload), stamp=SHRED_STAMP)], rate=20_000, count=4_000)
        )
        received = [STAMP.unpack_from(found, SHRED_STAMP)[0] for found, _ in drain(receiver, 2_000)]
        assert received == list(range(1, 4_000, 2))
        module.cleanup()


class TestControl:
    def test_stop(self, lab: Lab, generator: Generator, counter: UdpCounter) -> None:
        generator.start([Stream([Template(frame(lab, bytes(22)))], rate=100_000)], seconds=60)
        deadline = time.monotonic() + SECONDS
        while not generator.result().sent and time.monotonic() < deadline:
            time.sleep(0.005)
        assert generator.running
        with pytest.raises(TimeoutError):
            generator.wait(timeout=0.01)
        generator.stop()
        at_stop = generator.result().sent
        result = generator.wait(timeout=SECONDS)
        # one packet may be under way between the two
        assert 0 < at_stop <= result.sent <= at_stop + 1
        assert counter.take()[0] == result.sent
        assert not generator.running

    def test_stop_before_it_began(self, lab: Lab, generator: Generator, counter: UdpCounter) -> None:
        for _ in range(5):
            generator.start([Stream([Template(frame(lab, bytes(22)))])], seconds=60)
            generator.stop()
            assert generator.wait(timeout=SECONDS).sent == counter.take()[0]

    def test_close_stops_and_leaves_nothing(self, lab: Lab) -> None:
        descriptors = len(list(Path("/proc/self/fd").iterdir()))
        threads = threading.active_count()
        with Generator(lab.client) as generator:
            generator.start([Stream([Template(frame(lab, bytes(22)))], rate=1000)], seconds=60)
        generator.close()
        assert threading.active_count() == threads
        assert len(list(Path("/proc/self/fd").iterdir())) == descriptors
        with pytest.raises(UsageError, match="closed"):
            generator.start([Stream([Template(frame(lab, bytes(22)))])], seconds=1)

    def test_the_interface_goes_away(self, lab: Lab, generator: Generator) -> None:
        generator.start([Stream([Template(frame(lab, bytes(22)))], rate=1000)], seconds=60)
        with IPRoute(netns=lab.client.namespace, flags=0) as route:
            route.link("del", index=lab.client.ifindex)
        with pytest.raises(InterfaceGoneError, match="cli0"):
            generator.wait(timeout=SECONDS)

    def test_nothing_arrives_without_a_program_at_the_other_end(self, lab: Lab, generator: Generator) -> None:
        """The kernel throws them away uncounted; this is why the client has a program from the start."""
        result = generator.run(count=100, rate=10_000, templates=[Template(frame(lab, bytes(22)))])
        statistics = lab.client.statistics()
        assert sum(n for name, n in statistics.items() if name.endswith("_xdp_xmit")) == 0
        assert result.sent == 100

    def test_wrong_arguments(self, lab: Lab, generator: Generator) -> None:
        good = Template(frame(lab, bytes(22)))
        wrongs: list[dict[str, Any]] = [
            {"templates": []}, {"templates": [good], "rate": 0}, {"templates": [good], "rate": 1e9},
            {"templates": [good], "count": 0}, {"templates": [good], "sources": -1},
            {"templates": [good], "ports": 65_536}, {"templates": [good], "seed": 1 << 64},
            {"templates": [good], "backlog": -1}, {"templates": [Template(bytes(60))], "sources": 2},
        ]  # fmt: skip
        for wrong in wrongs:
            with pytest.raises(UsageError):
                Stream(**wrong)
        with pytest.raises(UsageError, match="without an end"):
            generator.run(templates=[good])
        with pytest.raises(UsageError, match="seconds"):
            generator.run(seconds=0, templates=[good])
        with pytest.raises(UsageError, match="streams"):
            generator.start([Stream([good])] * 9, seconds=1)
        with pytest.raises(UsageError, match="templates"):
            generator.run(seconds=1, templates=[good] * 1025)
        with pytest.raises(UsageError, match="not running"):
            generator.wait()
        with pytest.raises(UsageError, match="CPU"):
            Generator(lab.client, cpu=100_000)
        generator.start([Stream([good], rate=1000)], seconds=60)
        with pytest.raises(UsageError, match="running already"):
            generator.start([Stream([good])], seconds=1)
