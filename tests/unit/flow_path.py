# SPDX-License-Identifier: Apache-2.0
"""A recovery with a recorder in place of a congestion controller, and a clock that tests move."""

from __future__ import annotations

from tests.unit.flow_recorder import Recorder
from userspace.flow.recovery import Outcome, Recovery
from userspace.flow.rtt import RttEstimator

SIZE = 1200
#: Exact in binary, so that sums of it are.
TICK = 1 / 1024


class Path:
    """A recovery with its recorder, and a clock."""

    def __init__(self, *, max_ack_delay: float = 0.0, limit: int = 1 << 12) -> None:
        self.congestion = Recorder()
        rtt = RttEstimator(max_ack_delay=max_ack_delay)
        self.recovery = Recovery(0.0, self.congestion, rtt=rtt, limit=limit)
        self.now = 0.0

    def send(self, count: int = 1, *, gap: float = 0.0, size: int = SIZE, app_limited: bool = False) -> None:
        for _ in range(count):
            self.recovery.sent.add(self.now, size, app_limited)
            self.now += gap

    def ack(self, *ranges: tuple[int, int], after: float = 0.0, ce: int | None = None) -> Outcome:
        self.now += after
        return self.recovery.on_ack(self.now, ranges, 0.0, ce)

    def warm(self, rtt: float = 64 * TICK) -> None:
        """One packet, number 0, and so a first sample."""
        self.send()
        self.ack((0, 0), after=rtt)
        self.congestion.take()


def lists(outcome: Outcome) -> tuple[list[int], list[int], list[int]]:
    return sorted(outcome.acknowledged), sorted(outcome.lost), sorted(outcome.spurious)
