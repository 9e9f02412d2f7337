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
from pathlib import Path

import msgspec
import pytest

from sluice_cli.idle_socket import IdleSocket
from tests.kernel.random_traffic import random_frame, random_policy
from tests.kernel.steer_runs import SteerRuns
from xdp._libbpf import lib
from xdp.abi import REASONS
from xdp.classify import Classifier
from xdp.policy import Policy

PACKETS_PER_POLICY = 500
POLICIES = 60
EXAMPLES = Path(__file__).resolve().parents[2] / "docs" / "examples"


@pytest.fixture(scope="module")
def seed() -> int:
    chosen = int(os.environ.get("SLUICE_SEED") or secrets.randbits(32))
    print(f"SLUICE_SEED={chosen}")
    return chosen


def compare(runs: SteerRuns, classifier: Classifier, frame: bytes, told: str) -> str:
    """One packet through both; returns the name of the reason on which they agree."""
    before = time.monotonic_ns()
    got = runs(frame)
    after = time.monotonic_ns()
    want = classifier.classify(frame, before)
    told = f"{told} frame={frame.hex()}"
    assert got.name == REASONS[want.reason], told
    assert got.lane == want.lane, told
    if got.meta is not None:
        meta = got.meta
        assert before <= meta.time_ns <= after, told
        assert meta.cookie == runs.program.cookie, told
        assert (meta.lane, meta.service, meta.kind, meta.class_id) == (
            want.lane, want.service, want.kind, want.class_id), told  # fmt: skip
        assert (meta.peer, meta.payload_offset, meta.payload_length) == (
            runs.peer_number(want.peer), want.payload_offset, want.payload_length), told  # fmt: skip
    assert got.frame == (want.reply_frame if want.reply_frame is not None else frame), told
    return got.name


@pytest.mark.bpf
def test_random_policies_and_packets(runs: SteerRuns, seed: int) -> None:
    met: dict[str, int] = {}
    for number in range(POLICIES):
        rng = random.Random(f"{seed} {number}")
        text = random_policy(rng)
        policy = runs.use(text)
        # Limits are generous: what the kernel remembers of earlier policies makes no difference.
        classifier = Classifier(policy)
        for index in range(PACKETS_PER_POLICY):
            frame = random_frame(rng, policy)
            told = f"SLUICE_SEED={seed} policy {number}, packet {index}\n{text}"
            name = compare(runs, classifier, frame, told)
            met[name] = met.get(name, 0) + 1
    assert sum(met.values()) >= 20_000
    print(met)
    # Every verdict that needs neither a limit nor a missing socket was met.
    rare = {"pass_no_socket", "drop_peer_limit", "drop_prefix_limit", "drop_lane_limit"}
    assert set(REASONS) - rare - {"steer_demoted", "pass_demoted"} == set(met)


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
