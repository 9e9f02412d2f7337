# SPDX-License-Identifier: Apache-2.0
"""Peers, classes, and counters: who is counted where, and that all of it adds up."""

from __future__ import annotations

import struct
import time
from ipaddress import IPv4Address, ip_address

import pytest

from tests.kernel import frames
from tests.kernel.steer_runs import SteerRuns
from xdp._libbpf import ffi, lib
from xdp.abi import pack_address
from xdp.counters import Count, Counters

pytestmark = pytest.mark.bpf

PORT = 8001
#: The coarse clock (bpf/include/packet.h) stands still between ticks: 10 ms with 100 a second.
TICK_NS = 10_000_000
POLICY = """
version = 1
[[lane]]
name = "high"
[[lane]]
name = "low"
[[lane]]
name = "kernel"
end = "kernel"
[[class]]
name = "wide"
prefixes = ["10.0.0.0/8", "2001:db8::/32"]
[[class]]
name = "narrow"
prefixes = ["10.1.0.0/16", "2001:db8:1::/48"]
[[class]]
name = "banned"
prefixes = ["10.1.2.0/24", "2001:db8:1:2::/64"]
deny = true
[[class]]
name = "friends"
peers = ["10.1.2.3", "2001:db8:1:2::3", "203.0.113.9"]
[[service]]
name = "service"
ports = [8001]
  [[service.rule]]
  class = "friends"
  action = "lane"
  lane = "high"
  [[service.rule]]
  class = "narrow"
  action = "lane"
  lane = "low"
  [[service.rule]]
  class = "wide"
  action = "drop"
  [[service.rule]]
  action = "lane"
  lane = "kernel"
"""
FRIENDS = ("10.1.2.3", "2001:db8:1:2::3", "203.0.113.9")


@pytest.fixture
def steer(runs: SteerRuns) -> SteerRuns:
    runs.use(POLICY)
    return runs


@pytest.mark.parametrize(
    ("source", "reason", "lane"),
    [
        ("10.2.0.1", "drop_policy", None),
        ("10.1.0.1", "steer", 1),
        ("10.1.255.255", "steer", 1),
        ("10.1.2.1", "drop_denied", None),
        ("10.1.2.3", "steer", 0),  # a friend in a denied prefix
        ("10.1.3.3", "steer", 1),
        ("11.0.0.0", "pass_lane", 2),
        ("9.255.255.255", "pass_lane", 2),
        ("203.0.113.9", "steer", 0),
        ("203.0.113.8", "pass_lane", 2),
        ("2001:db8:2::1", "drop_policy", None),
        ("2001:db8:1::1", "steer", 1),
        ("2001:db8:1:2::1", "drop_denied", None),
        ("2001:db8:1:2::3", "steer", 0),
        ("2001:db9::1", "pass_lane", 2),
    ],
)
def test_longest_prefix_decides(steer: SteerRuns, source: str, reason: str, lane: int | None) -> None:
    for _ in range(2):  # looked up in the trie, and then remembered
        got = steer(frames.udp_frame(source, PORT))
        assert (got.name, got.lane) == (reason, lane)


def test_all_prefix_lengths(runs: SteerRuns) -> None:
    """A class for each length in turn; the most specific one that holds the address wins."""
    base = int(IPv4Address("10.170.170.170"))
    for length in range(33):
        prefix = f"{IPv4Address(base >> (32 - length) << (32 - length))}/{length}"
        runs.use(f"""
version = 1
[[lane]]
name = "only"
[[class]]
name = "in"
prefixes = ["{prefix}"]
[[service]]
name = "s"
ports = [{PORT}]
  [[service.rule]]
  class = "in"
  action = "drop"
""")
        assert runs(frames.udp_frame("10.170.170.170", PORT)).name == "drop_policy", prefix
        if length:
            outside = IPv4Address(base ^ 1 << (32 - length))
            want = "pass_source" if int(outside) >> 24 in {0, 127, *range(224, 256)} else "pass_policy"
            assert runs(frames.udp_frame(str(outside), PORT)).name == want, prefix
        # IPv4 and IPv6 never share a prefix.
        assert runs(frames.udp_frame("::10.170.170.170", PORT)).name == "pass_policy", prefix


def test_a_peer_is_counted(steer: SteerRuns) -> None:
    """Packets, bytes, drops and times of a friend, a stranger and one that is denied."""
    for source, drops, number in (("203.0.113.9", 0, 3), ("10.1.0.77", 0, 0), ("10.1.2.77", 1, 0)):
        address = pack_address(ip_address(source))
        known = steer.peer(address)
        base = (known.peer.packets, known.peer.bytes, known.peer.drops) if known else (0, 0, 0)
        before = time.monotonic_ns()
        sent = [frames.udp_frame(source, PORT, bytes(size)) for size in (0, 1, 900)]
        sizes = [len(steer(frame).frame) for frame in sent]
        after = time.monotonic_ns()
        found = steer.peer(address)
        peer = found.peer
        assert peer.packets - base[0] == len(sizes)
        assert peer.bytes - base[1] == sum(sizes)
        assert peer.drops - base[2] == drops * len(sizes)
        assert before - TICK_NS <= peer.last_seen_ns <= after
        assert found.id == (steer.peer_number(number) if number else 0)


def delta(before: Counters, after: Counters) -> tuple[Count, dict[str, Count]]:
    verdicts = {name: count - before.verdicts.get(name, Count()) for name, count in after.verdicts.items()}
    return after.seen - before.seen, {name: count for name, count in verdicts.items() if count.packets}


def test_counters_add_up_in_packets_and_bytes(steer: SteerRuns) -> None:
    program = steer.program
    before = program.counters()
    lanes: dict[int | None, int] = {}
    packets = size = 0
    names: dict[str, int] = {}
    for length in range(200):
        for source in ("10.2.0.1", "10.1.0.1", "10.1.2.1", "10.1.2.3", "11.0.0.0", "127.0.0.1"):
            for port in (PORT, 1):
                frame = frames.udp_frame(source, port, bytes(length))
                got = steer(frame)
                packets, size = packets + 1, size + len(frame)
                names[got.name] = names.get(got.name, 0) + 1
                lanes[got.lane] = lanes.get(got.lane, 0) + 1
    after = program.counters()
    seen, verdicts = delta(before, after)
    assert seen == Count(packets, size)
    assert {name: count.packets for name, count in verdicts.items()} == names
    assert sum(count.bytes for count in verdicts.values()) == size
    for number, lane in enumerate(after.lanes):
        assert lane.seen.packets - before.lanes[number].seen.packets == lanes.get(number, 0)
        assert lane.balanced
    assert after.balanced
    assert after.passed + after.steered + after.dropped + after.replied == after.seen.packets


def spoofed(number: int) -> bytes:
    """From 198.18.0.0/15 and on: addresses that no test has in a policy."""
    return frames.udp_frame(str(IPv4Address(0xC6120000 + number)), PORT)


def flood(steer: SteerRuns, first: int, count: int) -> None:
    """``count`` sources, one packet each."""
    frame = bytearray(spoofed(first))
    at = frame.index(IPv4Address(0xC6120000 + first).packed)
    run = ffi.new("struct sluice_test_run *")
    held = ffi.from_buffer("char[]", frame)
    run.data_in, run.data_size_in, run.repeat = held, len(frame), 1
    for number in range(first, first + count):
        struct.pack_into("!I", frame, at, 0xC6120000 + number)
        assert lib.sluice_prog_test_run(steer.program.fd, run) == 0
        assert run.retval == 2  # the lane ends in the kernel


def present(steer: SteerRuns) -> dict[bytes, int]:
    """The packets of each stranger that is remembered."""
    offset = ffi.offsetof("struct sluice_peer", "packets")
    return {key: struct.unpack_from("=Q", value, offset)[0] for key, value in steer.strangers.items()}


def test_strangers_created_present_and_evicted(steer: SteerRuns) -> None:
    """More strangers than there is room for: each was created once, and what is not there was evicted."""
    before = steer.program.counters()
    sources = lib.SLUICE_STRANGER_ENTRIES + 20_000
    flood(steer, 0, sources)
    after = steer.program.counters()
    created = after.strangers_created - before.strangers_created
    found = present(steer)
    assert created == sources
    assert after.strangers_refused == before.strangers_refused
    assert 0.9 * lib.SLUICE_STRANGER_ENTRIES < len(found) <= lib.SLUICE_STRANGER_ENTRIES
    assert set(found.values()) == {1}
    # The latest are there, whatever was evicted.
    assert all(pack_address(IPv4Address(0xC6120000 + sources - 1 - back)) in found for back in range(1000))
    assert after.balanced


def test_as_many_strangers_as_promised_are_remembered(steer: SteerRuns) -> None:
    """Chance fills some sets before others; of as many as are promised nearly all are there."""
    flood(steer, 0, lib.SLUICE_MAX_STRANGERS)
    assert len(present(steer)) >= 0.998 * lib.SLUICE_MAX_STRANGERS


def test_who_keeps_talking_stays(steer: SteerRuns) -> None:
    """While invented addresses come and go, 12 times as many as there is room for.

    Between two packets of a talker one other arrives in its set on average; 12 would push it out, which
    chance brings about once in 10^9 times (Poisson).
    """
    talkers = [f"192.0.2.{number}" for number in range(1, 200)]
    counts = dict.fromkeys(talkers, 0)
    for turn in range(200):
        for talker in talkers:
            steer(frames.udp_frame(talker, PORT))
            counts[talker] += 1
        flood(steer, turn * lib.SLUICE_STRANGER_SETS, lib.SLUICE_STRANGER_SETS)
    found = present(steer)
    assert {talker: found.get(pack_address(ip_address(talker))) for talker in talkers} == counts


def test_no_flood_evicts_a_configured_peer(steer: SteerRuns) -> None:
    for source in FRIENDS:
        assert steer(frames.udp_frame(source, PORT)).lane == 0
    before = {source: steer.peer(pack_address(ip_address(source))).peer.packets for source in FRIENDS}
    flood(steer, 0, 200_000)
    for source in FRIENDS:
        peer = steer.peer(pack_address(ip_address(source)))
        assert peer.id > 0
        assert peer.peer.packets == before[source]
        assert steer(frames.udp_frame(source, PORT)).lane == 0
        assert steer.peer(pack_address(ip_address(source))).peer.packets == before[source] + 1
        assert steer.strangers.lookup(pack_address(ip_address(source))) is None
    assert steer.program.counters().balanced


def test_kinds_by_mask_and_first_match(runs: SteerRuns) -> None:
    """Widths of 1, 2, 4 and 8 bytes, up to the last byte of the payload and not beyond."""
    lanes = "".join(f'[[lane]]\nname = "l{number}"\n' for number in range(6))
    kinds = "".join(
        f'[[service.kind]]\nname = "k{number}"\n'
        f'match = [{{ offset = {offset}, mask = "{mask}", value = "{value}" }}]\n'
        for number, (offset, mask, value) in enumerate(
            (
                (64, "f0", "90"), (64, "ff00", "9100"), (10, "ffffffff", "01020304"),
                (1, "ff000000000000ff", "aa000000000000bb"), (0, "01", "01"),
            )
        )
    )  # fmt: skip
    rules = "".join(
        f'[[service.rule]]\nkind = "k{number}"\naction = "lane"\nlane = "l{number}"\n' for number in range(5)
    )
    runs.use(
        f'version = 1\n{lanes}[[service]]\nname = "s"\nports = [{PORT}]\n{kinds}{rules}'
        '[[service.rule]]\naction = "lane"\nlane = "l5"\n'
    )

    def lane(payload: bytes, padding: int = 0) -> int | None:
        return runs(frames.udp_frame("198.18.0.1", PORT, payload) + bytes(padding)).lane

    for variant in range(256):
        assert lane(bytes(64) + bytes([variant])) == (0 if variant >> 4 == 9 else 5), variant
    assert lane(bytes(64) + b"\x91\x00") == 0  # the first kind wins
    assert lane(bytes(64)) == 5
    # What lies behind the payload is no part of it.
    assert lane(bytes(64), padding=8) == 5
    assert lane(bytes(10) + b"\x01\x02\x03\x04") == 2
    assert lane(bytes(10) + b"\x01\x02\x03") == 5
    assert lane(b"\x00\xaa" + bytes(6) + b"\xbb") == 3
    assert lane(b"\x00\xaa" + bytes(6)) == 5
    assert lane(b"\x01") == 4
    assert lane(b"\x02") == 5
    assert lane(b"") == 5
