# SPDX-License-Identifier: Apache-2.0
"""Whole verdicts of the reference classifier: classes, kinds, rules, limits, demotion."""

from __future__ import annotations

from ipaddress import ip_address
from pathlib import Path

import pytest
from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether
from scapy.packet import Raw

from xdp._libbpf import lib
from xdp.abi import REASONS
from xdp.classify import Classifier, Verdict
from xdp.policy import Policy

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
SECOND = 1_000_000_000

POLICY = """
version = 1
[[lane]]
name = "high"
[[lane]]
name = "limited"
rate = 10
burst = 2
demote = "low"
[[lane]]
name = "low"
rate = 10
burst = 3
[[lane]]
name = "kernel"
end = "kernel"
[[class]]
name = "staked"
prefixes = ["10.0.0.0/8", "2001:db8::/32"]
peers = ["198.51.100.7"]
[[class]]
name = "inner"
prefixes = ["10.1.0.0/16"]
peer_rate = 1
peer_burst = 2
prefix_rate = 1
prefix_burst = 3
[[class]]
name = "demoted"
prefixes = ["10.2.0.0/16"]
peers = ["10.9.0.1"]
peer_rate = 1
peer_burst = 1
demote = "low"
[[class]]
name = "banned"
prefixes = ["10.1.6.0/24"]
deny = true
[[service]]
name = "main"
ports = [1000]
[[service.kind]]
name = "a"
match = [{ offset = 1, mask = "f0", value = "10" }, { offset = 4, value = "0000000000000001" }]
[[service.kind]]
name = "b"
match = [{ offset = 1, mask = "f8", value = "18" }, { offset = 0, value = "62" }]
[[service.rule]]
class = ["inner", "demoted"]
action = "lane"
lane = "high"
[[service.rule]]
class = "staked"
kind = "a"
action = "lane"
lane = "limited"
[[service.rule]]
class = "staked"
kind = "b"
action = "lane"
lane = "kernel"
[[service.rule]]
class = "staked"
action = "pass"
[[service.rule]]
kind = "other"
action = "drop"
[[service]]
name = "bare"
ports = [1001]
"""


def frame(source: str, payload: bytes = b"x", port: int = 1000) -> bytes:
    ether = Ether(src="02:00:00:00:00:01", dst="02:00:00:00:00:02")
    network = IPv6(src=source, dst="2001:db8::2") if ":" in source else IP(src=source, dst="192.0.2.2")
    return bytes(ether / network / UDP(sport=4000, dport=port) / Raw(payload))


@pytest.fixture
def classifier() -> Classifier:
    return Classifier(Policy.parse(POLICY))


def reason(verdict: Verdict) -> str:
    return REASONS[verdict.reason]


def reasons(classifier: Classifier, frames: list[bytes], now: int = SECOND) -> list[str]:
    return [reason(classifier.classify(item, now)) for item in frames]


def test_parsing_comes_first_and_chooses_no_lane(classifier: Classifier) -> None:
    verdict = classifier.classify(b"\0" * 60, SECOND)
    assert verdict == Verdict(lib.SLUICE_PASS_NOT_IP)
    assert (verdict.lane, verdict.chosen, verdict.demoted) == (None, None, False)


def test_ports_that_are_not_ours_pass(classifier: Classifier) -> None:
    for port in (0, 999, 1002, 65535):
        assert classifier.classify(frame("10.0.0.1", port=port), SECOND) == Verdict(lib.SLUICE_PASS_NOT_OURS)


def test_impossible_sources_pass_only_where_the_port_is_ours(classifier: Classifier) -> None:
    assert reason(classifier.classify(frame("127.0.0.1"), SECOND)) == "pass_source"
    assert reason(classifier.classify(frame("::ffff:10.0.0.1"), SECOND)) == "pass_source"
    assert reason(classifier.classify(frame("127.0.0.1", port=7), SECOND)) == "pass_not_ours"


def test_longest_prefix_decides_the_class(classifier: Classifier) -> None:
    names = classifier.policy.class_names
    classes = {
        source: names[classifier.classify(frame(source), SECOND).class_id]
        for source in (
            "10.0.0.1",
            "10.1.0.1",
            "10.1.6.1",
            "10.9.0.1",
            "11.0.0.1",
            "198.51.100.7",
            "2001:db8::1",
            "2001:db9::1",
        )
    }
    assert classes == {
        "10.0.0.1": "staked",
        "10.1.0.1": "inner",
        "10.1.6.1": "banned",
        "10.9.0.1": "demoted",
        "11.0.0.1": "unknown",
        "198.51.100.7": "staked",
        "2001:db8::1": "staked",
        "2001:db9::1": "unknown",
    }


def test_configured_peers_have_their_numbers(classifier: Classifier) -> None:
    assert classifier.classify(frame("198.51.100.7"), SECOND).peer == 1
    assert classifier.classify(frame("10.9.0.1"), SECOND).peer == 2
    assert classifier.classify(frame("10.0.0.1"), SECOND).peer == 0


def test_all_of_ipv6_does_not_hold_ipv4() -> None:
    read = Policy.parse(POLICY.replace('"2001:db8::/32"', '"::/0"').replace('"10.0.0.0/8", ', ""))
    classifier = Classifier(read)
    assert classifier.classify(frame("2001:db9::1"), SECOND).class_id == 1
    assert classifier.classify(frame("10.0.0.1"), SECOND).class_id == 0


@pytest.mark.parametrize(
    ("payload", "kind"),
    [
        (b"", 0),
        (b"\x10", 0),
        (b"\0\x10", 1),
        (b"\0\x1f", 1),  # both would match: the first in the file
        (b"b\x18", 1),
        (b"b", 2),
        (b"b\x20", 2),
        (b"\0\0\0\0\0\0\0\0\0\0\0", 0),  # 11 bytes: too short for 8 at offset 4
        (b"\0\0\0\0\0\0\0\0\0\0\0\x01", 1),
    ],
)
def test_first_matching_kind(classifier: Classifier, payload: bytes, kind: int) -> None:
    assert classifier.classify(frame("11.0.0.1", payload), SECOND).kind == kind


def test_padding_is_not_matched(classifier: Classifier) -> None:
    padded = frame("11.0.0.1", b"\0") + b"\x10" * 20
    assert classifier.classify(padded, SECOND).kind == 0


def test_first_matching_rule_decides(classifier: Classifier) -> None:
    def verdict(source: str, payload: bytes, port: int = 1000) -> tuple[str, int | None]:
        found = classifier.classify(frame(source, payload, port), SECOND)
        return reason(found), found.lane

    assert verdict("10.0.0.1", b"\0\x10") == ("steer", 1)
    assert verdict("10.0.0.1", b"b") == ("pass_lane", 3)
    assert verdict("10.0.0.1", b"\0") == ("pass_policy", None)
    assert verdict("11.0.0.1", b"\0") == ("drop_policy", None)
    assert verdict("11.0.0.1", b"b") == ("pass_policy", None)  # no rule applies
    assert verdict("10.1.6.1", b"\0") == ("drop_denied", None)
    assert verdict("10.1.6.1", b"\0", port=1001) == ("drop_denied", None)
    assert verdict("10.0.0.1", b"\0", port=1001) == ("pass_policy", None)


def test_peer_limit_then_prefix_limit_of_strangers(classifier: Classifier) -> None:
    same = [frame("10.1.0.1")] * 4
    assert reasons(classifier, same) == ["steer", "steer", "drop_peer_limit", "drop_peer_limit"]
    # One of three in the prefix is left, and what the prefix drops has moved the peer's timestamp.
    assert reasons(classifier, [frame("10.1.0.2")] * 3) == ["steer", "drop_prefix_limit", "drop_peer_limit"]
    assert reasons(classifier, [frame("10.1.0.3")]) == ["drop_prefix_limit"]
    assert reasons(classifier, [frame("10.1.1.1")]) == ["steer"]  # another /24
    assert reasons(classifier, [frame("10.1.0.1")], now=2 * SECOND) == ["steer"]


def test_strangers_of_an_ipv6_prefix_share_its_limit() -> None:
    classifier = Classifier(Policy.parse(POLICY.replace('"10.1.0.0/16"', '"10.1.0.0/16", "2001:db8:1::/48"')))
    sources = [f"2001:db8:1:{number:x}::1" for number in range(4)]
    assert reasons(classifier, [frame(source) for source in sources]) == ["steer"] * 3 + ["drop_prefix_limit"]


def test_limits_do_not_touch_other_peers_or_pass_and_drop(classifier: Classifier) -> None:
    assert reasons(classifier, [frame("11.0.0.1", b"\0")] * 50) == ["drop_policy"] * 50
    assert reasons(classifier, [frame("10.0.0.1", b"\0")] * 50) == ["pass_policy"] * 50


def test_configured_peers_have_no_prefix_limit() -> None:
    read = Policy.parse(
        POLICY.replace('prefixes = ["10.1.0.0/16"]\npeer_rate = 1\npeer_burst = 2', 'peers = ["10.1.0.1"]')
    )
    assert reasons(Classifier(read), [frame("10.1.0.1")] * 20) == ["steer"] * 20


def test_over_the_peer_limit_packets_are_demoted_under_the_lower_lanes_limit(classifier: Classifier) -> None:
    verdicts = [classifier.classify(frame("10.2.0.1"), SECOND) for _ in range(6)]
    assert [reason(item) for item in verdicts] == ["steer", *["steer_demoted"] * 3, *["drop_lane_limit"] * 2]
    assert [item.lane for item in verdicts] == [0, 2, 2, 2, 2, 2]
    assert [item.demoted for item in verdicts] == [False, True, True, True, True, True]
    assert {item.chosen for item in verdicts} == {0}


def test_over_the_lane_limit_packets_are_demoted_as_the_lane_says(classifier: Classifier) -> None:
    sources = [f"10.0.0.{number}" for number in range(1, 8)]
    verdicts = [classifier.classify(frame(source, b"\0\x10"), SECOND) for source in sources]
    assert [(reason(item), item.lane) for item in verdicts] == [
        ("steer", 1),
        ("steer", 1),
        ("steer_demoted", 2),
        ("steer_demoted", 2),
        ("steer_demoted", 2),
        ("drop_lane_limit", 2),
        ("drop_lane_limit", 2),
    ]


def test_demoted_into_a_lane_of_the_kernel() -> None:
    read = Policy.parse(POLICY.replace('name = "low"\n', 'name = "low"\nend = "kernel"\n'))
    classifier = Classifier(read)
    assert reasons(classifier, [frame("10.2.0.1")] * 2) == ["steer", "pass_demoted"]


def test_a_class_demoted_to_its_own_lane_is_dropped() -> None:
    read = Policy.parse(POLICY.replace('action = "lane"\nlane = "high"', 'action = "lane"\nlane = "low"'))
    assert reasons(Classifier(read), [frame("10.2.0.1")] * 2) == ["steer", "drop_peer_limit"]


def test_a_rules_limit_replaces_its_class_limit() -> None:
    read = Policy.parse(
        POLICY.replace('lane = "high"', 'lane = "high"\npeer_rate = 1\npeer_burst = 5\nover = "drop"')
    )
    assert reasons(Classifier(read), [frame("10.2.0.1")] * 6) == ["steer"] * 5 + ["drop_peer_limit"]


def test_lanes_without_a_socket_pass() -> None:
    classifier = Classifier(Policy.parse(POLICY), open_lanes={1})
    assert reasons(classifier, [frame("10.2.0.1"), frame("10.0.0.1", b"\0\x10")]) == [
        "pass_no_socket",
        "steer",
    ]


def test_fragments_follow_the_policy(classifier: Classifier) -> None:
    ether = Ether(src="02:00:00:00:00:01", dst="02:00:00:00:00:02")
    fragment = bytes(ether / IP(src="10.0.0.1", dst="192.0.2.2", flags="MF") / UDP(dport=9) / Raw(b"x" * 8))
    assert reasons(classifier, [fragment]) == ["pass_fragment"]
    classifier.swap(Policy.parse(POLICY.replace("version = 1", 'version = 1\nfragments = "drop"')))
    assert reasons(classifier, [fragment]) == ["drop_fragment"]


def test_a_swap_changes_classes_and_keeps_limits(classifier: Classifier) -> None:
    assert reasons(classifier, [frame("10.1.0.1")] * 3) == ["steer", "steer", "drop_peer_limit"]
    classifier.swap(Policy.parse(POLICY.replace("10.1.6.0/24", "10.3.0.0/16")))
    assert reasons(classifier, [frame("10.1.0.1"), frame("10.3.0.1")]) == ["drop_peer_limit", "drop_denied"]


def test_payload_is_where_the_verdict_says(classifier: Classifier) -> None:
    for source in ("10.0.0.1", "2001:db8::1"):
        sent = frame(source, b"\0\x10payload")
        verdict = classifier.classify(sent, SECOND)
        assert sent[verdict.payload_offset :][: verdict.payload_length] == b"\0\x10payload"


def test_datagrams_from_sockets_meet_the_same_policy(classifier: Classifier) -> None:
    def verdict(source: str, payload: bytes = b"\0\x10") -> tuple[str, int | None, int]:
        found = classifier.classify_datagram(source, 1000, memoryview(payload), SECOND)
        assert found.payload_length == len(payload)
        return reason(found), found.lane, found.class_id

    assert verdict("10.0.0.1") == ("steer", 1, 1)
    assert verdict("::ffff:10.0.0.1") == ("steer", 1, 1)
    assert verdict("2001:db8::1%eth0", b"b") == ("pass_lane", 3, 1)
    assert verdict("127.0.0.1", b"x") == ("drop_policy", None, 0)
    assert verdict("10.1.6.1") == ("drop_denied", None, 4)
    assert classifier.classify_datagram("10.0.0.1", 9, b"", SECOND) == Verdict(lib.SLUICE_PASS_NOT_OURS)
    assert reason(classifier.classify_datagram(ip_address("10.9.0.1"), 1000, b"", SECOND)) == "steer"
    with pytest.raises(ValueError, match="'nowhere' is no address"):
        classifier.classify_datagram("nowhere", 1000, b"", SECOND)


def test_frames_and_datagrams_share_their_limits(classifier: Classifier) -> None:
    assert reasons(classifier, [frame("10.1.0.1")] * 2) == ["steer", "steer"]
    assert reason(classifier.classify_datagram("10.1.0.1", 1000, b"", SECOND)) == "drop_peer_limit"


def test_many_texts_of_addresses_do_not_fill_memory(classifier: Classifier) -> None:
    for number in range(70_000):
        classifier.classify_datagram(
            f"11.{number >> 16}.{number >> 8 & 255}.{number & 255}", 1000, b"\0", SECOND
        )
    assert len(classifier._packed) <= 65_536


VALIDATOR = Policy.load(EXAMPLES / "validator.toml")


def shred(variant: int) -> bytes:
    return bytes(64) + bytes([variant]) + bytes(1138)


@pytest.mark.parametrize(
    ("source", "port", "payload", "lane"),
    [
        ("192.0.2.9", 8005, b"vote", "votes"),
        ("10.81.0.2", 8005, b"vote", "votes"),
        ("fd81::2", 8005, b"vote", "votes"),
        ("10.81.7.7", 8005, b"junk", "bulk"),
        ("192.0.2.9", 8002, shred(0x96), "shreds-data"),
        ("192.0.2.9", 8002, shred(0xB6), "shreds-data"),
        ("192.0.2.9", 8002, shred(0x66), "shreds-code"),
        ("192.0.2.9", 8002, shred(0x76), "shreds-code"),
        ("192.0.2.9", 8002, shred(0x5A), "bulk"),
        ("192.0.2.9", 8002, bytes(64), "bulk"),
        ("10.81.7.7", 8002, shred(0x96), "bulk"),
        ("10.81.7.7", 8003, b"junk", "bulk"),
        ("192.0.2.9", 8003, shred(0x96), "repair"),
        ("10.81.7.7", 8008, b"\x08\0\0\0" + bytes(156), "repair"),
        ("10.81.7.7", 8008, b"\x01\0\0\0" + bytes(156), "bulk"),
        ("10.81.7.7", 8001, b"\x04\0\0\0" + bytes(128), "gossip"),
        ("10.81.7.7", 8001, b"\x06\0\0\0", "bulk"),
        ("10.81.7.7", 8009, b"\xc3" + bytes(1199), "tpu"),
        ("10.81.7.7", 8010, b"\x40" + bytes(100), "tpu"),
    ],
)
def test_validator_policy_sends_packets_where_they_belong(
    source: str, port: int, payload: bytes, lane: str
) -> None:
    verdict = Classifier(VALIDATOR).classify(frame(source, payload, port), SECOND)
    assert (reason(verdict), VALIDATOR.lane_names[verdict.lane or 0]) == ("steer", lane)
    assert VALIDATOR.lane_names[0] == "votes"
    assert VALIDATOR.lane_names[-1] == "bulk"


def test_validator_policy_never_limits_votes_or_junk() -> None:
    classifier = Classifier(VALIDATOR)
    for source in ("10.81.0.2", "10.81.7.7"):
        assert set(reasons(classifier, [frame(source, b"v", 8005)] * 2000)) == {"steer"}


def test_validator_policy_demotes_strangers_who_flood_gossip() -> None:
    classifier = Classifier(VALIDATOR)
    pull = frame("10.81.7.7", b"\0\0\0\0" + bytes(100), 8001)
    verdicts = [classifier.classify(pull, SECOND) for _ in range(30)]
    assert [reason(item) for item in verdicts] == ["steer"] * 16 + ["steer_demoted"] * 14
    assert VALIDATOR.lane_names[verdicts[-1].lane or 0] == "bulk"
    assert reason(classifier.classify(frame("203.0.113.1", b"v", 8005), SECOND)) == "drop_denied"


def test_dns_policy_answers_known_resolvers_under_a_flood() -> None:
    policy = Policy.load(EXAMPLES / "dns.toml")
    classifier = Classifier(policy)
    query = b"\x12\x34\x01\0" + bytes(20)
    passed = 0
    for number in range(100_000):  # 0.2 s of 500,000 queries/s from everywhere
        now = SECOND + number * 2000
        stranger = f"100.{number >> 16 & 63}.{number >> 8 & 255}.{number & 255}"
        passed += reason(classifier.classify_datagram(stranger, 53, query, now)) == "pass_lane"
        if number % 100 == 0:
            assert reason(classifier.classify_datagram("10.81.0.2", 53, query, now)) == "pass_lane"
    lane = policy.lanes[policy.lane_names.index("public")]
    assert lane.rate is not None
    assert lane.burst is not None
    earned = int(lane.rate) // 5  # in 0.2 s
    assert earned <= passed <= earned + lane.burst
    assert reason(classifier.classify_datagram("192.0.2.1", 53, b"\0\0\x80\0", SECOND)) == "drop_policy"
