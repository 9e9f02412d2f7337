# SPDX-License-Identifier: Apache-2.0
"""The heartbeat's reply, checked by scapy, and all that is never answered."""

from __future__ import annotations

import random
import struct
from collections.abc import Sequence
from typing import Any

import pytest
from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether

from tests.kernel import frames
from tests.kernel.frames import IPV4, IPV6, QINQ, VLAN
from tests.kernel.random_traffic import heartbeat
from tests.kernel.steer_runs import SteerRuns
from xdp._libbpf import lib

pytestmark = pytest.mark.bpf

PORT = 8001
POLICY = """
version = 1
[[lane]]
name = "votes"
[[lane]]
name = "rest"
[[class]]
name = "friends"
prefixes = ["198.18.0.0/16", "2001:db8::/32"]
[[class]]
name = "banned"
prefixes = ["203.0.113.0/24", "2001:db9::/32"]
deny = true
[[service]]
name = "s"
ports = [8001]
  [[service.rule]]
  class = "friends"
  kind = "heartbeat"
  action = "reply"
  lane = "votes"
  [[service.rule]]
  kind = "heartbeat"
  action = "drop"
  [[service.rule]]
  action = "lane"
  lane = "rest"
"""
SOURCES = ("198.18.0.1", "2001:db8::1")
TAGS: tuple[tuple[int, ...], ...] = ((), (VLAN,), (QINQ, VLAN))
#: Where the checksum is in a UDP header, and where the type is in the payload.
CHECKSUM, TYPE = 6, 4


@pytest.fixture
def steer(runs: SteerRuns) -> SteerRuns:
    runs.use(POLICY)
    return runs


def probe(seed: int = 1, kind: int = lib.SLUICE_HEARTBEAT_PROBE) -> bytes:
    return heartbeat(random.Random(seed), kind)


def udp_offset(source: str, tags: Sequence[int] = ()) -> int:
    return 14 + 4 * len(tags) + (40 if ":" in source else 20)


def recomputed(frame: bytes) -> bytes:
    """The same frame with all checksums as scapy computes them."""
    packet = Ether(frame)
    for layer, name in ((IP, "chksum"), (UDP, "chksum")):
        if layer in packet:
            del packet[layer].fields[name]
    return bytes(packet)


@pytest.mark.parametrize("tags", TAGS)
@pytest.mark.parametrize("source", SOURCES)
def test_reply(steer: SteerRuns, source: str, tags: tuple[int, ...]) -> None:
    for seed in range(300):
        payload = probe(seed)
        frame = frames.udp_frame(source, PORT, payload, tags, sums=True)
        got = steer(frame)
        assert (got.name, got.lane) == ("reply", 0)
        reply: Any = Ether(got.frame)
        asked: Any = Ether(frame)
        ip = IPv6 if ":" in source else IP
        assert (reply.src, reply.dst) == (asked.dst, asked.src)
        assert (reply[ip].src, reply[ip].dst) == (asked[ip].dst, asked[ip].src)
        assert (reply[UDP].sport, reply[UDP].dport) == (PORT, 4000)
        assert (reply[ip].hlim if ip is IPv6 else reply[ip].ttl) == 64
        assert len(got.frame) == len(frame)
        assert recomputed(got.frame) == got.frame
        # Nothing of the payload but the type.
        at = udp_offset(source, tags) + 8
        want = bytearray(payload)
        want[TYPE] = lib.SLUICE_HEARTBEAT_REPLY
        assert got.frame[at : at + 32] == want
        # VLAN tags, ethertype, and the rest of the IP header.
        assert (
            got.frame[12 : at - 8 - (40 if ip is IPv6 else 20)]
            == frame[12 : at - 8 - (40 if ip is IPv6 else 20)]
        )


@pytest.mark.parametrize("source", SOURCES)
def test_every_hop_count(steer: SteerRuns, source: str) -> None:
    """The IPv4 header's checksum is adjusted, not computed anew: over all values that it can have."""
    at = 14 + (7 if ":" in source else 8)
    for hops in range(256):
        frame = bytearray(frames.udp_frame(source, PORT, probe(), sums=True))
        frame[at] = hops
        if ":" not in source:
            frame[18:20] = struct.pack("!H", hops * 257)  # identification: other sums
        asked = recomputed(bytes(frame))
        got = steer(asked)
        assert got.name == "reply"
        assert got.frame[at] == 64
        assert recomputed(got.frame) == got.frame, hops


@pytest.mark.parametrize("source", SOURCES)
def test_partial_checksums_are_mended(steer: SteerRuns, source: str) -> None:
    """What a sender on the same machine leaves for its hardware to finish, and what is plainly wrong."""
    at = udp_offset(source) + CHECKSUM
    good = frames.udp_frame(source, PORT, probe(), sums=True)
    for wrong in (1, 0x1234, 0xFFFF, 0xABCD):
        frame = good[:at] + struct.pack("!H", wrong) + good[at + 2 :]
        got = steer(frame)
        assert got.name == "reply"
        assert recomputed(got.frame) == got.frame


def test_no_checksum_stays_none_in_ipv4(steer: SteerRuns) -> None:
    frame = frames.udp_frame(SOURCES[0], PORT, probe())
    at = udp_offset(SOURCES[0]) + CHECKSUM
    assert frame[at : at + 2] == b"\0\0"
    got = steer(frame)
    assert got.name == "reply"
    assert got.frame[at : at + 2] == b"\0\0"


def test_no_checksum_becomes_one_in_ipv6(steer: SteerRuns) -> None:
    """RFC 8200, 8.1: over IPv6 it may not be missing."""
    got = steer(frames.udp_frame(SOURCES[1], PORT, probe()))
    assert got.name == "reply"
    assert recomputed(got.frame) == got.frame


@pytest.mark.parametrize("source", SOURCES)
def test_a_sum_of_zero_is_sent_as_ones(steer: SteerRuns, source: str) -> None:
    """RFC 768: a payload for which the reply's checksum comes out as zero."""
    at = udp_offset(source)
    base = bytearray(probe())
    base[-2:] = b"\0\0"
    # The last word of the cookie makes up for what the checksum of the reply would be without it.
    first = steer(frames.udp_frame(source, PORT, bytes(base), sums=True)).frame
    base[-2:] = first[at + CHECKSUM : at + CHECKSUM + 2]
    got = steer(frames.udp_frame(source, PORT, bytes(base), sums=True))
    assert got.name == "reply"
    assert got.frame[at + CHECKSUM : at + CHECKSUM + 2] == b"\xff\xff"


@pytest.mark.parametrize("source", SOURCES)
def test_a_reply_is_never_answered(steer: SteerRuns, source: str) -> None:
    """Two of us facing each other: one probe, one reply, silence."""
    asked = frames.udp_frame(source, PORT, probe(), sums=True)
    replied = steer(asked).frame
    # As the peer would see it if it had the same policy, from an allowed source, to the same port.
    at = udp_offset(source) + 8
    bounced = frames.udp_frame(source, PORT, replied[at:], sums=True)
    got = steer(bounced)
    assert (got.name, got.lane, got.frame) == ("steer", 0, bounced)
    for kind in range(256):
        frame = frames.udp_frame(source, PORT, probe(kind=kind), sums=True)
        assert steer(frame).name == ("reply" if kind == lib.SLUICE_HEARTBEAT_PROBE else "steer"), kind


def wrapped(source: str, datagram: bytes, *, to: bytes = frames.MAC_TO, options: bytes = b"") -> bytes:
    if ":" in source:
        first, headers = frames.chain([frames.DESTINATION] if options else [])
        packet = frames.ipv6(headers + datagram, source=source, next_header=first)
        return frames.ethernet(IPV6, packet, to=to)
    return frames.ethernet(IPV4, frames.ipv4(datagram, source=source, options=options), to=to)


@pytest.mark.parametrize("source", SOURCES)
def test_what_is_never_answered(steer: SteerRuns, source: str) -> None:
    """It goes to the rule's lane unchanged, where the application may look at it."""
    datagram = frames.udp(PORT, probe())
    assert steer(wrapped(source, datagram)).name == "reply"
    refused = {
        "multicast": wrapped(source, datagram, to=bytes.fromhex("01005e000001")),
        "multicast v6": wrapped(source, datagram, to=bytes.fromhex("333300000001")),
        "broadcast": wrapped(source, datagram, to=b"\xff" * 6),
        "options or extension headers": wrapped(source, datagram, options=bytes(8)),
        **{
            f"{length} bytes": wrapped(source, frames.udp(PORT, (probe() + bytes(100))[:length]))
            for length in (4, 5, 31, 33, 64, 132)
        },
    }
    for what, frame in refused.items():
        got = steer(frame)
        assert (got.name, got.lane, got.frame) == ("steer", 0, frame), what
    # Without the magic number it is not even of that kind.
    for bit in range(32):
        payload = bytearray(probe())
        payload[bit // 8] ^= 0x80 >> bit % 8
        got = steer(wrapped(source, frames.udp(PORT, bytes(payload))))
        assert (got.name, got.lane) == ("steer", 1)


def test_classes(steer: SteerRuns) -> None:
    """Allowed classes only; denied ones get nothing, nor anybody for whom no rule says so."""
    for source, name in (
        ("203.0.113.1", "drop_denied"),
        ("2001:db9::1", "drop_denied"),
        ("8.8.8.8", "drop_policy"),
        ("2001:dba::1", "drop_policy"),
        ("127.0.0.1", "pass_source"),
        ("224.0.0.1", "pass_source"),
        ("255.255.255.255", "pass_source"),
        ("ff02::1", "pass_source"),
    ):
        frame = frames.udp_frame(source, PORT, probe(), sums=True)
        got = steer(frame)
        assert (got.name, got.frame) == (name, frame), source


@pytest.mark.parametrize(
    ("rule", "lane", "reason"),
    [
        ("peer_rate = 1\npeer_burst = 3", "", "drop_peer_limit"),
        ("prefix_rate = 1\nprefix_burst = 3", "", "drop_prefix_limit"),
        ("", "rate = 1\nburst = 3", "drop_lane_limit"),
        # A limit that demotes others never demotes a probe: it would be answered later by somebody else.
        ("", 'rate = 1\nburst = 3\ndemote = "rest"', "drop_lane_limit"),
    ],
)
def test_over_the_limit_nothing_is_answered(runs: SteerRuns, rule: str, lane: str, reason: str) -> None:
    text = POLICY.replace('action = "reply"', f'action = "reply"\n{rule}', 1)
    runs.use(text.replace('name = "votes"', f'name = "votes"\n{lane}', 1))
    frame = frames.udp_frame(SOURCES[0], PORT, probe(), sums=True)
    ended = [runs(frame) for _ in range(6)]
    assert [got.name for got in ended] == ["reply"] * 3 + [reason] * 3
    assert all(got.frame == frame for got in ended[3:])


def test_a_lane_without_a_socket_answers_all_the_same(runs: SteerRuns) -> None:
    """That is what a heartbeat is for: the host lives, the application may not."""
    runs.use(POLICY.replace('name = "votes"', 'name = "votes"\nend = "kernel"'))
    assert runs(frames.udp_frame(SOURCES[0], PORT, probe(), sums=True)).name == "reply"
    refused = frames.udp_frame(SOURCES[0], PORT, probe(kind=lib.SLUICE_HEARTBEAT_REPLY), sums=True)
    assert runs(refused).name == "pass_lane"
