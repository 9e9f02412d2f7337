# SPDX-License-Identifier: Apache-2.0
"""Heartbeats: who is answered, with which bytes, and what never is."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import IP, UDP, IPOption_NOP
from scapy.layers.inet6 import IPv6, IPv6ExtHdrDestOpt
from scapy.layers.l2 import Dot1Q, Ether
from scapy.packet import Packet, Raw

from xdp._libbpf import ffi, lib
from xdp.abi import REASONS
from xdp.classify import Classifier
from xdp.policy import Policy

SECOND = 1_000_000_000
POLICY = Policy.parse(
    """
version = 1
[[lane]]
name = "high"
[[lane]]
name = "low"
rate = 1000
burst = 5
[[class]]
name = "friends"
prefixes = ["192.0.2.0/24", "2001:db8::/32"]
peer_rate = 1
peer_burst = 3
demote = "low"
[[class]]
name = "enemies"
prefixes = ["203.0.113.0/24"]
deny = true
[[service]]
name = "main"
ports = [1000]
[[service.kind]]
name = "everything"
match = [{ offset = 0, mask = "80", value = "00" }]
[[service.rule]]
class = "friends"
kind = "heartbeat"
action = "reply"
lane = "high"
[[service.rule]]
action = "lane"
lane = "low"
"""
)
ETHER = Ether(src="02:00:00:00:00:01", dst="02:00:00:00:00:02")
V4 = IP(src="192.0.2.1", dst="198.51.100.2", ttl=7)
V6 = IPv6(src="2001:db8::1", dst="2001:db8::2", hlim=7)
PORTS = UDP(sport=4000, dport=1000)


def heartbeat(kind: int = 1, *, magic: bytes = b"SLHB", sequence: int = 7) -> bytes:
    return magic + struct.pack("=B3xQQQ", kind, sequence, 0x1122334455667788, 0xA5A5A5A5A5A5A5A5)


def test_layout_is_that_of_the_header() -> None:
    assert len(heartbeat()) == ffi.sizeof("struct sluice_heartbeat") == 32
    assert struct.pack("!I", lib.SLUICE_HEARTBEAT_MAGIC) == b"SLHB"


def verdict(frame: Packet, policy: Policy = POLICY) -> str:
    return REASONS[Classifier(policy).classify(bytes(frame), SECOND).reason]


@pytest.mark.parametrize("network", [V4, V6])
@pytest.mark.parametrize("tag", [None, Dot1Q(vlan=7)])
@given(sequence=st.integers(0, 2**64 - 1))
def test_a_probe_is_answered_with_addresses_swapped_and_checksums_right(
    network: Packet, tag: Packet | None, sequence: int
) -> None:
    ether = ETHER / tag if tag is not None else ETHER
    sent = bytes(ether / network / PORTS / Raw(heartbeat(sequence=sequence)))
    found = Classifier(POLICY).classify(sent, SECOND)
    assert (REASONS[found.reason], found.lane, found.kind) == ("reply", 0, 2)
    answer = {4: IP(src=V4.dst, dst=V4.src, ttl=64), 6: IPv6(src=V6.dst, dst=V6.src, hlim=64)}[
        network.version
    ]
    back = Ether(src=ETHER.dst, dst=ETHER.src)
    expected = (back / tag if tag is not None else back) / answer / UDP(sport=1000, dport=4000)
    # scapy computes all checksums itself.
    assert found.reply_frame == bytes(expected / Raw(heartbeat(2, sequence=sequence)))
    assert found.reply_frame is not None
    assert len(found.reply_frame) == len(sent)


def test_no_udp_checksum_stays_none_over_ipv4_and_is_made_over_ipv6() -> None:
    ports = UDP(sport=4000, dport=1000, chksum=0)
    classifier = Classifier(POLICY)
    v4 = classifier.classify(bytes(ETHER / V4 / ports / Raw(heartbeat())), SECOND).reply_frame
    v6 = classifier.classify(bytes(ETHER / V6 / ports / Raw(heartbeat())), SECOND).reply_frame
    assert v4 is not None
    assert v6 is not None
    assert v4[40:42] == b"\0\0"
    assert v6[60:62] != b"\0\0"


@given(st.integers(0, 0xFFFF), st.integers(0, 255))
def test_ipv4_checksum_is_right_for_every_header(identification: int, ttl: int) -> None:
    sent = bytes(
        ETHER / IP(src="192.0.2.1", dst="198.51.100.2", ttl=ttl, id=identification) / PORTS / Raw(heartbeat())
    )
    reply = Classifier(POLICY).classify(sent, SECOND).reply_frame
    assert reply is not None
    total = sum(struct.unpack("!10H", reply[14:34]))
    assert (total & 0xFFFF) + (total >> 16) == 0xFFFF


@pytest.mark.parametrize(
    ("frame", "why"),
    [
        (ETHER / V4 / PORTS / Raw(heartbeat(2)), "a reply"),
        (ETHER / V4 / PORTS / Raw(heartbeat(3)), "an application's ping"),
        (ETHER / V4 / PORTS / Raw(heartbeat(4)), "an application's pong"),
        (ETHER / V4 / PORTS / Raw(heartbeat(0)), "neither"),
        (ETHER / V4 / PORTS / Raw(heartbeat() + b"x"), "too long"),
        (ETHER / V4 / PORTS / Raw(heartbeat()[:31]), "too short"),
        (ETHER / V4 / PORTS / Raw(b"SLHB"), "much too short"),
        (Ether(dst="ff:ff:ff:ff:ff:ff") / V4 / PORTS / Raw(heartbeat()), "broadcast"),
        (Ether(dst="33:33:00:00:00:01") / V6 / PORTS / Raw(heartbeat()), "multicast"),
        (
            ETHER
            / IP(src="192.0.2.1", dst="198.51.100.2", options=[IPOption_NOP()] * 4)
            / PORTS
            / Raw(heartbeat()),
            "options",
        ),
        (ETHER / V6 / IPv6ExtHdrDestOpt() / PORTS / Raw(heartbeat()), "extension header"),
    ],
)
def test_what_is_no_valid_probe_goes_to_the_rules_lane(frame: Packet, why: str) -> None:
    found = Classifier(POLICY).classify(bytes(frame), SECOND)
    assert (REASONS[found.reason], found.lane, found.reply_frame) == ("steer", 0, None), why


def test_others_are_not_answered() -> None:
    stranger = ETHER / IP(src="198.51.100.9", dst="198.51.100.2") / PORTS / Raw(heartbeat())
    assert verdict(stranger) == "steer"
    assert (
        verdict(ETHER / IP(src="203.0.113.9", dst="198.51.100.2") / PORTS / Raw(heartbeat())) == "drop_denied"
    )
    assert verdict(ETHER / V4 / PORTS / Raw(heartbeat(magic=b"SLHC"))) == "steer"


def test_replies_are_limited_and_then_dropped_never_demoted() -> None:
    classifier = Classifier(POLICY)
    probe = bytes(ETHER / V4 / PORTS / Raw(heartbeat()))
    found = [classifier.classify(probe, SECOND) for _ in range(5)]
    assert [REASONS[item.reason] for item in found] == ["reply"] * 3 + ["drop_peer_limit"] * 2
    assert {item.lane for item in found} == {0}
    # what is no probe is an ordinary packet of the class, and is demoted
    broken = bytes(ETHER / V4 / PORTS / Raw(heartbeat(2)))
    assert REASONS[classifier.classify(broken, SECOND).reason] == "steer_demoted"


def test_the_lanes_limit_holds_for_replies() -> None:
    text_policy = Policy.parse(
        'version = 1\n[[lane]]\nname = "a"\nrate = 1\nburst = 2\ndemote = "b"\n[[lane]]\nname = "b"\n'
        '[[service]]\nname = "s"\nports = [1000]\n'
        '[[service.rule]]\nkind = "heartbeat"\naction = "reply"\nlane = "a"\n'
    )
    classifier = Classifier(text_policy)
    probe = bytes(ETHER / V4 / PORTS / Raw(heartbeat()))
    found = [REASONS[classifier.classify(probe, SECOND).reason] for _ in range(3)]
    assert found == ["reply", "reply", "drop_lane_limit"]


def test_datagrams_are_answered_with_a_payload() -> None:
    found = Classifier(POLICY).classify_datagram("192.0.2.1", 1000, memoryview(heartbeat()), SECOND)
    assert (REASONS[found.reason], found.reply_frame) == ("reply", heartbeat(2))
