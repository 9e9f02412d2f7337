# SPDX-License-Identifier: Apache-2.0
"""What FlowController does of each packet itself, beside those that it spares a call."""

from __future__ import annotations

import copy
import random

import pytest

from userspace.flow.controller import FlowController
from userspace.flow.sent import SentPackets


@pytest.mark.parametrize("seed", range(20))
def test_what_is_sent_without_calls_is_kept_as_with_them(seed: int) -> None:
    """``on_packet_sent`` does itself what `Pacer.sent` and `SentPackets.add` do."""
    rng = random.Random(seed)
    flow = FlowController(0.0, congestion=rng.choice(("newreno", "cubic", "bbr")), mtu=1200)
    now = 0.0
    unacknowledged = 0
    for _ in range(500):
        now += rng.choice((0.0, 1e-5, 1e-3, 0.05))
        if unacknowledged and rng.random() < 0.3:
            flow.on_ack_received(now, [(0, flow.snapshot().sent_packets - 1)])
            unacknowledged = 0
        pacer, sent = copy.copy(flow._pacer), copy.copy(flow._sent)
        sent.slots = list(sent.slots)
        size = rng.choice((1, 600, 1200, 9000))
        pacer.sent(now, size)
        number = sent.add(now, size, app_limited=False)
        assert flow.on_packet_sent(now, size) == number
        unacknowledged += 1
        for name in ("since", "used", "full_at"):
            assert getattr(flow._pacer, name) == getattr(pacer, name)
        for name in SentPackets.__slots__:
            assert getattr(flow._sent, name) == getattr(sent, name), name
