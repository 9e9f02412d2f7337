# SPDX-License-Identifier: Apache-2.0
"""The program against the reference classifier: random policies, random and mutated packets.

    SLUICE_SEED=N python -m pytest tests/kernel/test_steer_differential.py

runs the packets of an earlier run again; the seed is printed, and named in every failure.
"""

from __future__ import annotations

import os
import random
import secrets
import time
from ipaddress import ip_address
from pathlib import Path

import msgspec
import pytest

from sluice_cli.idle_socket import IdleSocket
from tests.kernel import frames
from tests.kernel.random_traffic import PEERS, random_frame, random_policy
from tests.kernel.steer_runs import FIRST_BUFFER, SteerRuns
from xdp._libbpf import lib
from xdp.abi import REASONS
from xdp.classify import Classifier
from xdp.errors import UsageError
from xdp.holds import PeerHolds
from xdp.policy import Policy

PACKETS_PER_POLICY = 500
POLICIES = 60
ONE_SERVICE = """
version = 1
[[lane]]
name = "only"
[[service]]
name = "s"
ports = [8000]
[[service.rule]]
action = "lane"
lane = "only"
"""
EXAMPLES = Path(__file__).resolve().parents[2] / "docs" / "examples"


@pytest.fixture(scope="module")
def seed() -> int:
    chosen = int(os.environ.get("SLUICE_SEED") or secrets.randbits(32))
    print(f"SLUICE_SEED={chosen}")
    return chosen


def compare(
    runs: SteerRuns, classifier: Classifier, frame: bytes, told: str, reach: int | None = None
) -> str:
    """One packet through both; returns the name of the reason on which they agree."""
    before = time.monotonic_ns()
    got = runs(frame)
    after = time.monotonic_ns()
    want = classifier.classify(frame, before, reach=reach)
    told = f"{told} frame={frame.hex()}"
    assert got.name == REASONS[want.reason], told
    assert got.lane == want.lane, told
    if got.meta is not None:
        meta = got.meta
        # A lane without timestamps has none; those of the policies here have or have not, by chance.
        stamped = classifier.policy.lanes[meta.lane].timestamps
        assert before <= meta.time_ns <= after if stamped else meta.time_ns == 0, told
        assert meta.cookie == runs.program.cookie, told
        assert (meta.lane, meta.service, meta.kind, meta.class_id) == (
            want.lane, want.service, want.kind, want.class_id), told  # fmt: skip
        assert (meta.peer, meta.payload_offset, meta.payload_length) == (
            runs.peer_number(want.peer), want.payload_offset, want.payload_length), told  # fmt: skip
    assert got.frame == (want.reply_frame if want.reply_frame is not None else frame), told
    return got.name


def hold_somebody(holds: PeerHolds, classifier: Classifier, rng: random.Random, now_ns: int) -> None:
    """Hold or release the same peer in both; ``now_ns`` is the time of both.

    Within a test's time no rate lets through what its burst does not: one a second, or a million.
    """
    address = ip_address(rng.choice(PEERS))
    if rng.random() < 0.1:
        holds.release(address)
        classifier.release(address)
        return
    strict = rng.random() < 0.8
    rate, burst = (1, rng.randint(1, 3)) if strict else (1_000_000, 1_000_000)
    seconds = rng.choice((3600, 3600, 3600, 3600, 1e-9))
    try:
        holds.hold(address, rate, burst, seconds=seconds)
    except UsageError:
        with pytest.raises(UsageError):
            classifier.hold(address, rate, burst, until_ns=now_ns + 1, now_ns=now_ns)
        return
    classifier.hold(address, rate, burst, until_ns=now_ns + int(seconds * 1e9), now_ns=now_ns)


@pytest.mark.bpf
def test_random_policies_and_packets(runs: SteerRuns, seed: int) -> None:
    met: dict[str, int] = {}
    for number in range(POLICIES):
        rng = random.Random(f"{seed} {number}")
        text = random_policy(rng)
        policy = runs.use(text)
        # Limits are generous: what the kernel remembers of earlier policies makes no difference.
        classifier = Classifier(policy)
        with PeerHolds(runs.program.maps) as holds:
            for address in holds.held():  # of peers that an earlier policy had, too
                holds.release(address)
        for index in range(PACKETS_PER_POLICY):
            if rng.random() < 0.1:
                now = time.monotonic_ns()
                with PeerHolds(runs.program.maps, clock=lambda now=now: now) as holds:  # type: ignore[misc]
                    hold_somebody(holds, classifier, rng, now)
            frame = random_frame(rng, policy)
            told = f"SLUICE_SEED={seed} policy {number}, packet {index}\n{text}"
            name = compare(runs, classifier, frame, told)
            met[name] = met.get(name, 0) + 1
    assert sum(met.values()) >= 20_000
    print(met)
    # Every verdict that needs neither a limit nor a missing socket was met.
    rare = {"pass_no_socket", "drop_peer_limit", "drop_prefix_limit", "drop_lane_limit"}
    assert set(REASONS) - rare - {"steer_demoted", "pass_demoted"} == set(met)
    assert met["drop_held"] > 20


@pytest.mark.bpf
@pytest.mark.feature("AF_XDP jumbo frames")
def test_packets_in_several_buffers(jumbo_runs: SteerRuns, seed: int) -> None:
    """Lengths are those of the whole packet, patterns may lie beyond the first buffer or across its end."""
    met: dict[tuple[str, bool], int] = {}
    far = (0, FIRST_BUFFER - 42 - 5, FIRST_BUFFER - 62 - 3, 4500, 8900)
    for number in range(10):
        rng = random.Random(f"{seed} several {number}")
        text = random_policy(rng, far)
        policy = jumbo_runs.use(text)
        classifier = Classifier(policy)
        for index in range(200):
            frame = random_frame(rng, policy, 9000)
            told = f"SLUICE_SEED={seed} policy {number}, packet {index}\n{text}"
            several = len(frame) > FIRST_BUFFER
            reach = FIRST_BUFFER if several else None
            name = compare(jumbo_runs, classifier, frame, told, reach)
            met[name, several] = met.get((name, several), 0) + 1
    print(met)
    assert met["steer", True]
    assert met["pass_truncated", True]


@pytest.mark.bpf
@pytest.mark.feature("AF_XDP jumbo frames")
@pytest.mark.parametrize("extensions", [1, 2, 3])
def test_headers_beyond_the_first_buffer_are_the_kernels(jumbo_runs: SteerRuns, extensions: int) -> None:
    classifier = Classifier(jumbo_runs.use(ONE_SERVICE))
    following = [frames.DESTINATION] * (extensions - 1) + [frames.UDP]
    headers = b"".join(bytes([one, 255]) + bytes(2046) for one in following)
    datagram = frames.udp(8000, bytes(5000))
    frame = frames.ethernet(frames.IPV6, frames.ipv6(headers + datagram, next_header=frames.DESTINATION))
    name = compare(jumbo_runs, classifier, frame, f"{extensions} extensions", FIRST_BUFFER)
    assert name == ("steer" if extensions == 1 else "pass_truncated")


@pytest.mark.bpf
@pytest.mark.feature("AF_XDP jumbo frames")
@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_patterns_across_the_end_of_the_first_buffer(jumbo_runs: SteerRuns, width: int) -> None:
    """Found at every place around the boundary, and not where one byte is another."""
    wanted = bytes(range(0x81, 0x81 + width))
    for offset in range(FIRST_BUFFER - 42 - 9, FIRST_BUFFER - 42 + 2):
        kind = f'[[service.kind]]\nname = "k"\nmatch = [{{ offset = {offset}, value = "{wanted.hex()}" }}]\n'
        classifier = Classifier(
            jumbo_runs.use(ONE_SERVICE.replace("[[service.rule]]", f"{kind}[[service.rule]]"))
        )
        for change in (None, *range(width)):
            payload = bytearray(6000)
            payload[offset : offset + width] = wanted
            if change is not None:
                payload[offset + change] ^= 1
            frame = frames.udp_frame("198.18.0.1", 8000, bytes(payload))
            got = jumbo_runs(frame)
            assert got.meta is not None
            assert got.meta.kind == (change is None) == classifier.classify(frame, 0).kind, (offset, change)


@pytest.mark.bpf
@pytest.mark.parametrize("name", ["dns", "game", "validator"])
def test_example_policies(runs: SteerRuns, seed: int, name: str) -> None:
    """Without their limits: those would depend on the microseconds between two readings of the clock."""
    policy = unlimited(Policy.load(EXAMPLES / f"{name}.toml"))
    runs.use(policy)
    classifier = Classifier(policy)
    rng = random.Random(f"{seed} {name}")
    for index in range(2000):
        frame = random_frame(rng, policy)
        compare(runs, classifier, frame, f"SLUICE_SEED={seed} {name} packet {index}")


def unlimited(policy: Policy) -> Policy:
    """The same policy with no limit anywhere."""

    def free(entry: object, *names: str) -> object:
        return msgspec.structs.replace(entry, **dict.fromkeys(names))  # type: ignore[type-var]

    four = ("peer_rate", "peer_burst", "prefix_rate", "prefix_burst")
    return msgspec.structs.replace(
        policy,
        lanes=tuple(free(lane, "rate", "burst") for lane in policy.lanes),
        classes=tuple(free(entry, *four) for entry in policy.classes),
        services=tuple(
            msgspec.structs.replace(service, rules=tuple(free(rule, *four) for rule in service.rules))
            for service in policy.services
        ),
    )


@pytest.mark.bpf
def test_lanes_without_a_socket(runs: SteerRuns, idle_socket: IdleSocket, seed: int) -> None:
    """A lane nobody has opened: its packets go to the kernel, without metadata."""
    text = """
version = 1
[[lane]]
name = "open"
[[lane]]
name = "closed"
[[service]]
name = "s"
ports = [8000]
  [[service.kind]]
  name = "up"
  match = [{ offset = 0, value = "01" }]
  [[service.rule]]
  kind = "up"
  action = "lane"
  lane = "open"
  [[service.rule]]
  kind = "heartbeat"
  action = "reply"
  lane = "closed"
  [[service.rule]]
  action = "lane"
  lane = "closed"
"""
    policy = runs.use(text)
    xsks = runs.program.maps["xsks"]
    held = (1).to_bytes(4, "little")
    assert xsks.delete(held)
    try:
        classifier = Classifier(policy, open_lanes={0})
        rng = random.Random(seed)
        met = {
            compare(runs, classifier, random_frame(rng, policy), f"SLUICE_SEED={seed} {index}")
            for index in range(2000)
        }
        assert {"pass_no_socket", "steer", "reply"} <= met
    finally:
        idle_socket.fill(xsks, lib.SLUICE_MAX_LANES)
