# SPDX-License-Identifier: Apache-2.0
"""When a datagram came, and not only when it was read."""

from __future__ import annotations

import time

import pytest

from tests.unit.socket_backends import DEADLINE, Sender, free_port, make_policy
from userspace.datagram.mmsg import MmsgLanes


@pytest.mark.parametrize("gro", [False, True])
def test_times_are_those_of_arrival(gro: bool) -> None:
    with (
        MmsgLanes(make_policy(free_port()), timestamps=True, gro=gro) as lanes,
        Sender(lanes.ports[0]) as sender,
    ):
        for _ in range(20):
            before = time.monotonic_ns()
            sender.send(b"V1")
            between = time.monotonic_ns()
            sender.send(b"V2")
            after = time.monotonic_ns()
            with lanes.receive(timeout=DEADLINE) as batch:
                assert [bytes(payload) for payload in batch] == [b"V1", b"V2"]
                first, second = batch.times
            # The clocks are compared at some moment between two readings of them: some µs apart.
            slack = 1_000_000
            assert before - slack <= first <= between + slack
            assert between - slack <= second <= after + slack
            assert first <= second


def test_waiting_shows_in_them() -> None:
    """Without, it does not: both of a batch then have one time, that of reading."""
    for wanted in (True, False):
        with (
            MmsgLanes(make_policy(free_port()), timestamps=wanted) as lanes,
            Sender(lanes.ports[0]) as sender,
        ):
            sender.send(b"V1")
            deadline = time.monotonic_ns() + 5_000_000
            while time.monotonic_ns() < deadline:
                pass
            sender.send(b"V2")
            with lanes.receive(timeout=DEADLINE) as batch:
                assert len(batch) == 2
                apart = batch.times[1] - batch.times[0]
            assert apart >= 4_000_000 if wanted else apart == 0
