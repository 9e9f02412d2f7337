# SPDX-License-Identifier: Apache-2.0
"""Calls of a congestion controller with any numbers in them, and what must hold after each."""

from __future__ import annotations

import math

from hypothesis import strategies as st

from tests.unit.flow_bottleneck import MTU
from userspace.flow.congestion import Ack, Congestion, Loss
from userspace.flow.limits import RATE_MAXIMUM, WINDOW_MAXIMUM

NUMBER = st.one_of(st.floats(), st.floats(0, 10), st.sampled_from([0.0, 0.04, 1e6]))
COUNT = st.one_of(st.integers(-(1 << 70), 1 << 70), st.integers(0, 100))
#: (what, floats, integers, whether the application limits)
Events = list[tuple[str, list[float], list[int], bool]]
EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["sent", "ack", "ack", "ack", "loss", "ecn", "spurious", "persistent", "mtu"]),
        st.lists(NUMBER, min_size=5, max_size=5),
        st.lists(COUNT, min_size=6, max_size=6),
        st.booleans(),
    ),
    max_size=60,
)


def throw(control: Congestion, events: Events) -> None:
    """Any numbers; but time, which the caller has from a clock, only grows."""
    now, mtu = 0.0, MTU
    for what, numbers, counts, limited in events:
        now += min(max(numbers[0], 0.0), 30.0) if math.isfinite(numbers[0]) else 0.0
        if what == "sent":
            control.on_sent(now, max(1, counts[0]), counts[1], app_limited=limited)
        elif what == "ack":
            ack = Ack()
            ack.bytes, ack.packets, ack.in_flight, ack.delivered, ack.prior_delivered = counts[:5]
            ack.largest_sent_at, ack.rtt, ack.smoothed_rtt, ack.delivery_rate = numbers[1:]
            ack.app_limited = limited
            control.on_ack(now, ack)
        elif what == "loss":
            loss = Loss()
            loss.bytes, loss.packets, loss.in_flight = counts[:3]
            loss.largest_sent_at = numbers[1]
            control.on_loss(now, loss)
        elif what == "ecn":
            control.on_ecn(now, counts[0], numbers[1])
        elif what == "spurious":
            control.on_spurious(now)
        elif what == "persistent":
            control.on_persistent(now)
        else:
            mtu = min(max(abs(counts[0]), 1), 9000)
            control.on_mtu(mtu)
        assert type(control.window) is int
        assert 2 * mtu <= control.window <= WINDOW_MAXIMUM
        if control.pacing_rate is not None:
            assert 0.0 < control.pacing_rate <= RATE_MAXIMUM
        assert control.ssthresh is None or 0 <= control.ssthresh <= WINDOW_MAXIMUM
