# SPDX-License-Identifier: Apache-2.0
"""A block's shreds: all of them, byte for byte, data in the data lane and code in the code lane."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal, cast

import pytest

from sluice_cli.demo import POLICY, TURBINE_PORT
from sluice_cli.example_policy import example_policy
from sluice_cli.pcap import Capture
from sluice_cli.replay import Sender, replay_capture
from sluice_cli.traffic import shred_payload, udp_frame
from tests.traffic.served import BURST, SECONDS, Served, serving

pytestmark = [pytest.mark.root, pytest.mark.bpf]

VARIANTS = {0x90: "data", 0xB0: "data", 0x80: "data", 0x60: "code", 0x70: "code", 0x40: "code"}
STAKED = 1


@pytest.fixture(scope="module", params=["native", "generic"])
def served(request: pytest.FixtureRequest) -> Iterator[Served]:
    mode = cast("Literal['native', 'generic']", request.param)
    with serving(mode, example_policy(POLICY).read_text(encoding="utf-8")) as made:
        yield made


def check(served: Served, expected: list[bytes]) -> None:
    """They arrive whole, each in the lane that byte 64 tells."""
    received = served.receive(len(expected))
    names = [lane.name for lane in served.lanes.lanes]
    by_lane = {
        kind: Counter(
            hashlib.sha256(packet.payload).hexdigest()
            for packet in received
            if names[packet.lane] == f"shreds-{kind}"
        )
        for kind in ("data", "code")
    }
    wanted: dict[str, Counter[str]] = {"data": Counter(), "code": Counter()}
    for payload in expected:
        wanted[VARIANTS[payload[64] & 0xF0]][hashlib.sha256(payload).hexdigest()] += 1
    assert by_lane == wanted
    assert {packet.class_id for packet in received} == {STAKED}
    assert {(packet.lane, packet.kind) for packet in received} <= {(1, 1), (2, 2)}


class TestCapture:
    @pytest.fixture
    def capture(self, vectors: Path) -> Path:
        return vectors / "demo-shreds.pcap"

    def test_all_512(self, served: Served, capture: Path) -> None:
        payloads = [bytes(datagram.payload) for datagram in Capture(capture)]
        assert Counter(VARIANTS[payload[64] & 0xF0] for payload in payloads) == {"data": 256, "code": 256}
        lab = served.lab
        for version in (4, 6):
            address = lab.server.ipv4 if version == 4 else lab.server.ipv6
            with lab.client.enter(), Sender(address, TURBINE_PORT) as sender:
                summary = replay_capture(Capture(capture), sender, pace=5000.0)
            assert (summary.sent, dict(summary.skipped)) == (512, {})
            check(served, payloads)

    def test_in_bursts(self, served: Served, capture: Path) -> None:
        """As many as a veth takes at once, on the wire by hand instead of by a socket."""
        lab = served.lab
        payloads = [bytes(datagram.payload) for datagram in Capture(capture)]
        for start in range(0, len(payloads), BURST):
            part = payloads[start : start + BURST]
            served.send([udp_frame(lab.client, lab.server, TURBINE_PORT, one) for one in part])
            check(served, part)


def generated() -> Iterable[bytes]:
    """32 sets of 16 data and 16 code shreds, no two alike."""
    for number in range(512):
        kind: Literal["data", "code"] = "data" if number % 32 < 16 else "code"
        yield shred_payload(kind, slot=number // 32, index=number)


@pytest.mark.parametrize("version", [4, 6])
def test_generated(served: Served, version: Literal[4, 6]) -> None:
    lab = served.lab
    payloads = list(generated())
    assert len({hashlib.sha256(payload).digest() for payload in payloads}) == 512
    for start in range(0, len(payloads), BURST):
        part = payloads[start : start + BURST]
        served.send([udp_frame(lab.client, lab.server, TURBINE_PORT, one, version=version) for one in part])
        check(served, part)


def test_variants_that_are_neither(served: Served) -> None:
    """Too short to have a variant, or with one that nobody defined: to the lowest lane, not lost."""
    lab = served.lab
    short = bytes(64)
    strange = [bytes(64) + bytes([variant]) + bytes(10) for variant in range(256)]
    strange = [payload for payload in strange if payload[64] & 0xF0 not in VARIANTS]
    lowest = len(served.lanes.lanes) - 1
    for start in range(0, len(strange), BURST - 1):
        part = [short, *strange[start : start + BURST - 1]]
        served.send([udp_frame(lab.client, lab.server, TURBINE_PORT, one) for one in part])
        found = served.receive(len(part), timeout=SECONDS)
        assert [packet.payload for packet in found] == part
        assert {(packet.lane, packet.kind) for packet in found} == {(lowest, 0)}
