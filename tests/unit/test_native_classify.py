# SPDX-License-Identifier: Apache-2.0
"""The C classifier of kernel sockets against the reference in Python."""

from __future__ import annotations

import os
import random
import subprocess
from collections import Counter
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path

import pytest

from userspace.datagram.classifier import DatagramClassifier
from userspace.native._native import ffi, lib
from xdp.abi import REASONS, Address, pack_address
from xdp.classify import Classifier
from xdp.errors import UsageError
from xdp.policy import Policy

ROOT = Path(__file__).resolve().parents[2]

# Everything that decides: nested prefixes of both families, peers inside other classes' prefixes,
# deny, all actions, patterns of all widths, limits at all three places with both ways over them,
# a lane that ends in the kernel.
POLICY = """
version = 1
default_class = "unknown"
stranger_prefix = {{ v4 = 24, v6 = 48 }}
[[lane]]
name = "votes"
rate = {votes_rate}
burst = 20
over = "demote"
demote = "rest"
[[lane]]
name = "data"
[[lane]]
name = "kernel"
end = "kernel"
rate = 4000
burst = 8
over = "demote"
demote = "rest"
[[lane]]
name = "rest"
rate = 9000
burst = 50
[[class]]
name = "staked"
prefixes = ["10.0.0.0/8", "2001:db8::/32", "192.0.2.128/25"]
peers = ["192.0.2.7", {{ address = "2001:db8:9::9", name = "six" }}, "203.0.113.5"]
peer_rate = 2000
peer_burst = 5
over = "demote"
demote = "rest"
[[class]]
name = "narrow"
prefixes = ["10.1.0.0/16", "10.1.2.0/24", "2001:db8:1::/48", "2001:db8:1:8000::/49"]
prefix_rate = 1500
prefix_burst = 3
[[class]]
name = "enemy"
prefixes = ["10.1.2.3/32", "198.51.100.0/24", "2001:db8:dead::/48"]
deny = true
[[class]]
name = "everyone6"
prefixes = ["::/0"]
peer_rate = 3000
peer_burst = 2
prefix_rate = 2000
prefix_burst = 6
over = "demote"
demote = "kernel"
[[service]]
name = "turbine"
ports = [8001, "8003-8005"]
[[service.kind]]
name = "byte"
match = [{{ offset = 4, mask = "f0", value = "90" }}, {{ offset = 4, mask = "f0", value = "b0" }}]
[[service.kind]]
name = "word"
match = [{{ offset = 1, mask = "ff00", value = "0100" }}]
[[service.kind]]
name = "long"
match = [{{ offset = 8, mask = "0000ffff", value = "00000002" }}]
[[service.kind]]
name = "quad"
match = [{{ offset = 0, mask = "ff000000000000ff", value = "0300000000000000" }}]
[[service.rule]]
kind = "heartbeat"
class = ["staked", "narrow"]
action = "reply"
lane = "votes"
peer_rate = 5000
peer_burst = 4
[[service.rule]]
kind = "byte"
action = "lane"
lane = "votes"
[[service.rule]]
kind = "word"
class = "unknown"
action = "drop"
[[service.rule]]
kind = "quad"
action = "pass"
[[service.rule]]
class = ["staked", "narrow", "everyone6"]
action = "lane"
lane = "data"
[[service.rule]]
action = "lane"
lane = "kernel"
prefix_rate = 1000
prefix_burst = 4
[[service]]
name = "plain"
ports = [9000]
[[service.rule]]
class = "staked"
action = "lane"
lane = "votes"
"""

HEARTBEAT = b"SLHB\x01" + bytes(27)


def policy(**numbers: int) -> Policy:
    return Policy.parse(POLICY.format(**{"votes_rate": 3000, **numbers}))


class Columns:
    """Datagrams in one area, classified by one call."""

    def __init__(self, datagrams: list[tuple[Address, int, bytes]]) -> None:
        self.count = n = len(datagrams)
        self.area = ffi.from_buffer("uint8_t[]", b"".join(payload for _, _, payload in datagrams) + b"\0")
        self.inputs = [
            ffi.new("uint32_t[]", n),
            ffi.new("uint32_t[]", [len(payload) for _, _, payload in datagrams]),
            ffi.new("struct sluice_address[]", n),
            ffi.new("uint16_t[]", [port for _, port, _ in datagrams]),
        ]
        at = 0
        for i, (source, _, payload) in enumerate(datagrams):
            self.inputs[0][i] = at
            at += len(payload)
            ffi.memmove(self.inputs[2] + i, pack_address(source), 16)
        self.outputs = [ffi.new("uint8_t[]", n) for _ in range(5)] + [ffi.new("uint32_t[]", n)]
        self.raw = ffi.new("struct sl_datagrams *", [self.area, *self.inputs, *self.outputs])

    def classify(self, classifier: DatagramClassifier, now_ns: int) -> list[tuple[int, ...]]:
        """(reason, lane, service, class, kind, peer) of each."""
        lib.sl_classify(classifier.native, self.raw, self.count, now_ns)
        return list(zip(*(ffi.unpack(column, self.count) for column in self.outputs), strict=True))


def random_source(rng: random.Random) -> Address:
    host = rng.randrange(1, 5)
    return ip_address(
        rng.choice(
            [
                f"10.0.0.{host}",
                f"10.{rng.randrange(3)}.{rng.randrange(4)}.{host}",
                f"192.0.2.{rng.choice([7, 7, 8, 127, 128, 255])}",
                "203.0.113.5",
                f"203.0.113.{host}",
                f"198.51.100.{host}",
                f"127.0.0.{host}",
                f"2001:db8:{rng.choice(['0', '1', '9', 'dead'])}::{rng.choice(['9', '1', '2'])}",
                f"2001:db8:1:{rng.choice(['7fff', '8000', 'ffff'])}::{host}",
                f"2001:db{rng.choice('789')}::{host}",
                f"fe80::{host}",
                "::1",
            ]
        )
    )


def random_payload(rng: random.Random) -> bytes:
    shape = rng.randrange(6)
    if shape == 0:
        broken = bytearray(HEARTBEAT)
        if rng.random() < 0.3:
            broken[rng.randrange(8)] = rng.randrange(4)
        return bytes(broken) if rng.random() < 0.8 else bytes(broken) + b"x" * rng.choice([1, 5])
    if shape == 1:
        return rng.randbytes(4) + bytes([rng.choice([0x90, 0xB7, 0xA0])]) + rng.randbytes(rng.randrange(20))
    if shape == 2:
        return bytes([rng.choice([0, 3]), rng.choice([0, 1]), 0, 0, 0, 0, 0, rng.choice([0, 1])])
    if shape == 3:
        return rng.randbytes(10) + b"\x00\x02" + rng.randbytes(rng.randrange(3))
    return rng.randbytes(rng.randrange(14))


@pytest.mark.parametrize(
    "seed", [int(os.environ.get("SLUICE_SEED", random.SystemRandom().randrange(1 << 32)))]
)
def test_like_the_reference(seed: int) -> None:
    print(f"SLUICE_SEED={seed}")
    rng = random.Random(seed)
    current = policy()
    # A fixed key: two of the few prefixes here in one bucket by chance would be a false alarm.
    native, reference = DatagramClassifier(current, key=bytes(range(16))), Classifier(current)
    now = 5_000_000_000
    expected_counts: Counter[tuple[int, str]] = Counter()
    total = 0
    while total < 24_000:
        datagrams = [
            (random_source(rng), rng.choice([8001, 8001, 8004, 9000, 8002, 65535]), random_payload(rng))
            for _ in range(rng.randrange(1, 80))
        ]
        got = Columns(datagrams).classify(native, now)
        for (source, port, payload), found in zip(datagrams, got, strict=True):
            verdict = reference.classify_datagram(source, port, payload, now)
            lane = lib.SLUICE_NO_LANE if verdict.lane is None else verdict.lane
            expected = (verdict.reason, lane, verdict.service, verdict.class_id, verdict.kind, verdict.peer)
            assert found == expected, (
                f"seed {seed}, datagram {total}: {source} port {port} {payload.hex()}: "
                f"{REASONS[found[0]]}, not {REASONS[verdict.reason]}"
            )
            expected_counts[lane, REASONS[verdict.reason]] += 1
            total += 1
        now += rng.choice([0, 1000, 300_000, 3_000_000, 40_000_000])
        if rng.random() < 0.1:
            hold_somebody((native, reference), rng, now)
        if rng.random() < 0.02:
            current = policy(votes_rate=rng.choice([100, 3000, 50_000]))
            native.swap(current)
            reference.swap(current)
    assert {key: packets for key, (packets, _) in native.verdicts().items()} == dict(expected_counts)
    # Nothing was decided by luck alone: every outcome that a socket can have was there.
    assert {reason for _, reason in expected_counts} == {
        "pass_not_ours", "pass_policy", "pass_lane", "pass_demoted", "drop_denied", "drop_policy",
        "drop_held", "drop_peer_limit", "drop_prefix_limit", "drop_lane_limit", "steer", "steer_demoted",
        "reply",
    }  # fmt: skip
    counters = lib.sl_classifier_counters(native.native)
    assert counters.seen.packets == total
    for number in range(lib.SLUICE_MAX_LANES):
        row = sum(count for (lane, _), count in expected_counts.items() if lane == number)
        chosen = counters.lane_seen[number].packets
        assert row == chosen + counters.demoted_to[number] - counters.demoted_from[number]


def hold_somebody(both: tuple[DatagramClassifier, Classifier], rng: random.Random, now_ns: int) -> None:
    """Hold or release the same peer in both."""
    address = ip_address(rng.choice(["192.0.2.7", "2001:db8:9::9", "203.0.113.5"]))
    rate, burst = rng.choice([1, 50, 900, 10_000_000]), rng.choice([1, 2, 7, 1_000_000])
    until = now_ns + rng.choice([0, 1, 2_000_000, 80_000_000, 3_600_000_000_000])
    released = rng.random() < 0.2
    for one in both:
        if released:
            one.release(address)
        else:
            one.hold(address, rate, burst, until_ns=until, now_ns=now_ns)


def test_only_configured_peers_are_held() -> None:
    stranger, peer = ip_address("192.0.2.200"), ip_address("192.0.2.7")
    for one in (DatagramClassifier(policy()), Classifier(policy())):
        with pytest.raises(UsageError, match=r"192\.0\.2\.200 is no configured peer"):
            one.hold(stranger, 1, 1, until_ns=1 << 60, now_ns=0)
        with pytest.raises(UsageError, match="rate of a hold: 0; allowed"):
            one.hold(peer, 0, 1, until_ns=1 << 60, now_ns=0)
        with pytest.raises(UsageError, match="burst of a hold: True; allowed"):
            one.hold(peer, 1, True, until_ns=1 << 60, now_ns=0)
        with pytest.raises(UsageError, match="end of a hold: -1; allowed"):
            one.hold(peer, 1, 1, until_ns=-1, now_ns=0)
        with pytest.raises(UsageError, match=r"time of a hold: 0\.5; allowed"):
            one.hold(peer, 1, 1, until_ns=1, now_ns=0.5)  # type: ignore[arg-type]


def test_a_hold_goes_on_over_a_swap_and_ends_when_the_peer_leaves() -> None:
    address = ip_address("192.0.2.1")
    with_peer, without = (Policy.parse(_quoted(with_peer_text(peer))) for peer in ("192.0.2.1", "192.0.2.2"))
    native, reference = DatagramClassifier(with_peer), Classifier(with_peer)
    for one in (native, reference):
        one.hold(address, 1, 1, until_ns=1 << 60, now_ns=1)
    for policies, reason in (
        ((), "steer"),
        ((with_peer,), "drop_held"),
        ((without, with_peer), "drop_peer_limit"),
    ):
        for following in policies:
            native.swap(following)
            reference.swap(following)
        if reason == "drop_peer_limit":  # of the class: two at once, one is used up
            assert REASONS[reference.classify_datagram(address, 1, b"", 3).reason] == "steer"
            assert REASONS[Columns([(address, 1, b"")]).classify(native, 3)[0][0]] == "steer"
        assert REASONS[reference.classify_datagram(address, 1, b"", 3).reason] == reason
        assert REASONS[Columns([(address, 1, b"")]).classify(native, 3)[0][0]] == reason


def test_sources_no_host_may_have() -> None:
    native = DatagramClassifier(policy())
    datagrams = [
        (ip_address(text), 8001, b"") for text in ("0.1.2.3", "224.0.0.1", "255.255.255.255", "::", "ff02::1")
    ]
    got = Columns(datagrams).classify(native, 1)
    assert {REASONS[found[0]] for found in got} == {"pass_source"}
    assert native.strangers == 0


def test_tens_of_thousands_of_prefixes() -> None:
    rng = random.Random(7)
    inline = [f"10.{i >> 8}.{i & 255}.0/24" for i in range(30_000)]
    text = (
        'version = 1\n[[lane]]\nname = "l"\n[[service]]\nname = "s"\nports = [1]\n'
        '[[service.rule]]\naction = "lane"\nlane = "l"\n'
        f'[[class]]\nname = "a"\nprefixes = {inline[::2]!r}\n'
        f'[[class]]\nname = "b"\nprefixes = {inline[1::2]!r}\n'
    )
    loaded = Policy.parse(text.replace("'", '"'))
    native = DatagramClassifier(loaded)
    for _ in range(3000):
        i = rng.randrange(33_000)
        source = IPv4Address((10 << 24) + (i << 8) + rng.randrange(256))
        found = Columns([(source, 1, b"")]).classify(native, 1)[0]
        name = "unknown" if i >= 30_000 else "ab"[i % 2]
        assert loaded.class_names[found[3]] == name


def test_strangers_are_bounded_and_busy_ones_stay() -> None:
    native = DatagramClassifier(policy())
    busy = ip_address("192.0.2.200")
    peer = ip_address("203.0.113.5")
    limit = lib.SLUICE_MAX_STRANGERS
    base = int(IPv6Address("2001:db7::"))
    for start in range(0, 3 * limit, 512):
        invented: list[tuple[Address, int, bytes]] = [
            (IPv6Address(base + start + i), 8001, b"") for i in range(512)
        ]
        Columns([*invented, (busy, 8001, b""), (peer, 8001, b"")]).classify(native, 10 + start)
    assert native.strangers == limit
    rounds = 3 * limit // 512
    for address in (busy, peer):
        entry = native.peer(address)
        assert entry is not None
        assert entry["packets"] == rounds, f"{address} was forgotten"
    assert native.peer(IPv6Address(base)) is None
    created = lib.sl_classifier_counters(native.native).strangers_created
    assert created == 3 * limit + 1


def test_peers_keep_their_state_whatever_they_become() -> None:
    one, two = ip_address("192.0.2.1"), ip_address("192.0.2.2")
    native = DatagramClassifier(Policy.parse(_quoted(with_peer_text("192.0.2.1"))))
    three: list[tuple[Address, int, bytes]] = [(one, 1, b"abc")] * 3 + [(two, 1, b"d")]
    reasons = [REASONS[found[0]] for found in Columns(three).classify(native, 1000)]
    assert reasons == ["steer", "steer", "drop_peer_limit", "steer"]
    # one: known -> stranger -> known; two: stranger -> known -> stranger
    for peers, one_id, two_id in (
        (("192.0.2.2",), 0, 1),
        (("192.0.2.1",), 1, 0),
        (("192.0.2.2", "192.0.2.1"), 2, 1),
    ):
        native.swap(Policy.parse(_quoted(with_peer_text(*peers))))
        for address, number, packets, drops in ((one, one_id, 3, 1), (two, two_id, 1, 0)):
            entry = native.peer(address)
            assert entry is not None
            assert (entry["id"], entry["packets"], entry["drops"]) == (number, packets, drops)
    again = [
        REASONS[found[0]]
        for found in Columns([(one, 1, b""), (two, 1, b""), (two, 1, b"")]).classify(native, 2000)
    ]
    assert again == ["drop_peer_limit", "steer", "drop_peer_limit"]


def with_peer_text(*peers: str) -> str:
    return (
        'version = 1\n[[lane]]\nname = "l"\n[[service]]\nname = "s"\nports = [1]\n'
        '[[service.rule]]\naction = "lane"\nlane = "l"\n'
        f"[[class]]\nname = 'c'\npeers = {list(peers)!r}\npeer_rate = 1\npeer_burst = 2\n"
        'prefixes = ["192.0.2.0/24"]\n'
    )


def _quoted(text: str) -> str:
    return text.replace("'", '"')


def test_under_sanitizers(tmp_path: Path) -> None:
    """classify.c and mmsg*.c with AddressSanitizer and UndefinedBehaviorSanitizer, on real sockets."""
    native = ROOT / "userspace" / "native"
    sources = [
        *(native / f"{name}.c" for name in ("tables", "classify", "batch", "busy_poll")),
        *(native / f"mmsg{part}.c" for part in ("", "_errors", "_lanes", "_look", "_receive", "_send")),
    ]
    program = tmp_path / "sanitized"
    seed = random.SystemRandom().randrange(1 << 31)
    subprocess.run(
        ["gcc", "-std=gnu11", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-fsanitize=address,undefined",
         "-fno-sanitize-recover=all", f"-I{native}", f"-I{ROOT / 'bpf' / 'include'}", "-o", program,
         Path(__file__).with_name("native_sanitized.c"), *sources],
        check=True,
    )  # fmt: skip
    done = subprocess.run([program, str(seed)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"seed {seed}\n{done.stdout}{done.stderr}"
    assert "all shown" in done.stdout
