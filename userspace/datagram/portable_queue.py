# SPDX-License-Identifier: Apache-2.0
"""Queues of the portable backend, one per lane, and how a batch is shared out among them."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from xdp.classify import Verdict


class Received(NamedTuple):
    """A queued datagram and its frame."""

    frame: int
    length: int
    verdict: Verdict
    source: bytes  # struct sl_source
    service: int  # index of the socket by which it came
    time_ns: int


class LaneQueue:
    """Queue and frames of one lane."""

    __slots__ = ("credit", "delivered", "dropped", "large", "queue", "small")

    def __init__(self) -> None:
        self.queue: deque[Received] = deque()
        self.small = self.large = 0  # frames queued and held
        self.credit = 0.0
        self.delivered = self.dropped = 0


def share_out(lanes: Sequence[LaneQueue], shares: Sequence[float], maximum: int) -> list[int]:
    """How many of each lane go into a batch: each lane's share first, then from the top."""
    left = maximum
    counts: list[int] = []
    for lane, share in zip(lanes, shares, strict=True):
        lane.credit += share * maximum if lane.queue else 0
        counts.append(min(int(lane.credit), len(lane.queue), left))
        lane.credit -= counts[-1]
        left -= counts[-1]
    for number, lane in enumerate(lanes):
        more = min(len(lane.queue) - counts[number], left)
        counts[number] += more
        left -= more
    return counts
