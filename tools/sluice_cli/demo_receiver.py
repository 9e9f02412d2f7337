# SPDX-License-Identifier: Apache-2.0
"""The application in ``sluice demo``: a process of its own that receives all lanes.

It has work to do for every packet of the lowest lane (it sleeps instead), so that
lane comes in faster than it can be read.  Nothing is done for the other lanes:
they come first in every batch.

Speaks JSON, a line each: "ready", a report every quarter of a second, and after
"finish" on its standard input, once nothing more comes, the last report.
"""

from __future__ import annotations

import hashlib
import json
import os
import select
import sys
import time
from array import array
from dataclasses import dataclass, field
from typing import Any, Final

from userspace.datagram.batch import Batch
from userspace.datagram.lanes import open_lanes
from userspace.datagram.xsk_lanes import XskLanes
from xdp.errors import SluiceError

REPORT_SECONDS: Final = 0.25
#: Nothing for so long after "finish": all that was sent has been read.
QUIET_SECONDS: Final = 0.5
#: Small, so that the pause after a batch with packets of the lowest lane is short.
BATCH: Final = 8
_SAMPLES: Final = 1 << 20  # latencies kept for each lane; later ones are left out


@dataclass
class Arguments:
    """As JSON on the command line.

    ``slow_rate``: packets per second that the lowest lane is worked at.
    ``digest_lanes``: numbers of the lanes whose payloads are hashed one by one.
    """

    policy: str
    interface: str
    slow_lane: int
    slow_rate: float
    digest_lanes: list[int] = field(default_factory=list)


class Receiver:
    """Counts by lane, latencies and digests."""

    def __init__(self, lanes: XskLanes, arguments: Arguments) -> None:
        self._lanes = lanes
        self._arguments = arguments
        self._count = max(lane.number for lane in lanes.lanes) + 1
        self.received = [0] * self._count
        self.bytes = [0] * self._count
        self._latencies = [array("Q") for _ in range(self._count)]
        self._digests: dict[int, list[str]] = {lane: [] for lane in arguments.digest_lanes}

    def step(self, *, work: bool) -> bool:
        """One batch; False when there was none."""
        with self._lanes.receive(BATCH, timeout=0.02) as batch:
            if not batch:
                return False
            slow = self._take(batch)
        if work and slow:
            time.sleep(slow / self._arguments.slow_rate)
        return True

    def _take(self, batch: Batch) -> int:
        now = time.monotonic_ns()
        lanes = bytes(batch.lanes)
        lengths = batch.lengths
        times = batch.times
        start = 0
        # Highest lane first, so each lane is one stretch of the batch.
        while start < len(lanes):
            lane = lanes[start]
            end = lanes.rindex(lane) + 1
            self.received[lane] += end - start
            self.bytes[lane] += sum(lengths[start:end])
            kept = self._latencies[lane]
            if len(kept) < _SAMPLES:
                kept.extend(now - seen for seen in times[start:end])
            if lane in self._digests:
                self._digests[lane] += [hashlib.sha256(batch[i]).hexdigest() for i in range(start, end)]
            start = end
        return lanes.count(self._arguments.slow_lane)

    def report(self, *, last: bool = False) -> dict[str, Any]:
        """Everything so far."""
        statistics = self._lanes.statistics()
        by_name = {lane.name: statistics.lane(lane.name) for lane in self._lanes.lanes}
        document: dict[str, Any] = {
            "mode": self._lanes.mode,
            "received": self.received,
            "bytes": self.bytes,
            "ring_full": {name: lane.ring_full for name, lane in by_name.items()},
            "socket_dropped": {name: lane.dropped for name, lane in by_name.items()},
            "waiting": {name: lane.waiting for name, lane in by_name.items()},
            "latency_us": [_percentiles(samples) for samples in self._latencies],
        }
        if last:
            document["frames_balanced"] = all(frames.balanced for frames in self._lanes.frames())
            document["digests"] = self._digests
        return document


def _percentiles(samples: array[int]) -> dict[str, float] | None:
    if not samples:
        return None
    ordered = sorted(samples)
    return {
        name: round(ordered[int(part * (len(ordered) - 1))] / 1000, 1)
        for name, part in (("p50", 0.5), ("p99", 0.99))
    }


def _say(document: dict[str, Any]) -> None:
    print(json.dumps(document), flush=True)


def _finish_asked() -> bool:
    """Whether the parent said so, or is gone."""
    return bool(select.select([0], [], [], 0)[0])


def main(argument: str) -> None:
    """Run until "finish", then drain and report."""
    arguments = Arguments(**json.loads(argument))
    with open_lanes(arguments.policy, interface=arguments.interface) as lanes:
        if not isinstance(lanes, XskLanes):
            raise SluiceError("the demo needs AF_XDP here", hint="`sluice doctor` says what is missing")
        receiver = Receiver(lanes, arguments)
        _say({"ready": True, "mode": lanes.mode, "pid": os.getpid()})
        next_report = time.monotonic() + REPORT_SECONDS
        while not _finish_asked():
            receiver.step(work=True)
            if time.monotonic() >= next_report:
                next_report = time.monotonic() + REPORT_SECONDS
                _say(receiver.report())
        quiet_since = time.monotonic()
        while time.monotonic() - quiet_since < QUIET_SECONDS:
            if receiver.step(work=False):
                quiet_since = time.monotonic()
        _say(receiver.report(last=True))
        # The program's counters are read by the parent before the lanes, and the program with them, go.
        sys.stdin.read()


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except SluiceError as error:
        print(f"{error}; {error.hint}" if error.hint else str(error), file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
