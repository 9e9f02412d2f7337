# SPDX-License-Identifier: Apache-2.0
"""The bottleneck of ``sluice lab flow``: a simulated network run by the clock, between real lanes.

What arrives at this host goes through the links of the scenario, each packet at the time at which the kernel
took it from the interface; receivers acknowledge, and what comes out of the way back is sent to the sender.

Within the network times are exact, however late this process wakes up: it is advanced to the time before the
sockets were last read, so whatever has come until then is in it, and its events are called with the times
that they are for.  Only what leaves it is late, by as much as the process is; ``late`` in the report tells.
"""

from __future__ import annotations

import gc
import time
from array import array
from collections.abc import Sequence
from typing import Final

from sluice_cli.lab_flow_network import OpenNetwork
from sluice_cli.lab_flow_wire import (
    BATCH,
    NUMBER_BITS,
    NUMBER_MASK,
    POLICY,
    PORT,
    Clock,
    Task,
    begin,
    encode,
    main,
    say,
)
from userspace.datagram.batch import Batch
from userspace.datagram.mmsg import MmsgLanes
from userspace.simulation.figures import percentile
from userspace.simulation.flow_report import report_on
from userspace.simulation.flow_scenarios import scenario
from xdp.policy import Policy

#: Seconds that it sleeps at most, while packets come: some ten wait then at 100 Mb/s, to be read at once.
TICK: Final = 0.001
#: Seconds that it sleeps at least: less is not worth a system call.
LEAST: Final = 0.0001
#: Seconds after the end for what is between the hosts: the sender stops at the end.
QUIET: Final = 0.2


class Relay:
    """One run.  ``lanes`` stay the caller's."""

    def __init__(self, network: OpenNetwork, lanes: MmsgLanes, clock: Clock, peer: str) -> None:
        self._network, self.lanes, self._clock = network, lanes, clock
        self.peer = (peer, PORT)
        self.arrived = 0  # packets that entered the network
        self.afterwards = 0  # came after the end
        self.strange = 0  # of no flow
        self.overtaken = 0  # arrived before the time that the network had come to
        self.answered = 0
        self.unanswered = 0  # acknowledgements that the sockets did not take
        #: Seconds that acknowledgements left late.
        self.late = array("d")
        self.most_overtaken = 0.0  # seconds
        self.wakeups = 0

    def run(self) -> None:
        """From the beginning to some time after the end."""
        network, now = self._network, self._clock.now
        end = network.seconds
        while (at := now()) < end:
            if at < 0:
                time.sleep(-at)
                continue
            self.wakeups += 1
            self.read()
            if at > network.engine.now:
                network.advance(at)
            if network.answers:
                self._answer()
            due = network.engine.next_event()
            time.sleep(min(TICK, max(LEAST, due - now())))
        while now() < end + QUIET:
            self.read()
            time.sleep(TICK)
        network.advance(end)
        network.check()

    def read(self) -> None:
        """All that is there."""
        receive = self.lanes.try_receive
        while True:
            with receive(BATCH) as batch:
                count = len(batch)
                if count:
                    self._enter(batch)
            if count < BATCH:
                return

    def _enter(self, batch: Batch) -> None:
        network, remotes, of = self._network, self._network.remotes, self._clock.of
        engine, end = network.engine, network.seconds
        for word, nanoseconds, size in zip(batch.gather(0, 8), batch.times, batch.lengths, strict=True):
            flow = word >> NUMBER_BITS
            if flow >= len(remotes) or size < 8:
                self.strange += 1
                continue
            at = of(nanoseconds)
            if at >= end:
                self.afterwards += 1
                continue
            if at < engine.now:
                self.overtaken += 1
                self.most_overtaken = max(self.most_overtaken, engine.now - at)
                at = engine.now
            self.arrived += 1
            network.enter(at, remotes[flow], word & NUMBER_MASK, size)

    def _answer(self) -> None:
        answers = self._network.answers
        sent = self.lanes.send(self.peer, [encode(flow, said) for _, flow, said in answers], port=PORT)
        now = self._clock.now()
        self.late.extend([now - due for due, _, _ in answers])
        self.answered += sent
        self.unanswered += len(answers) - sent
        answers.clear()


def lateness(late: Sequence[float]) -> dict[str, float]:
    """Of timers, seconds."""
    ordered = sorted(late)
    found = {f"p{percent}": percentile(ordered, percent) for percent in (50, 95, 99)}
    return {**found, "max": ordered[-1] if ordered else 0.0}


def run(task: Task) -> None:
    """The whole process."""
    network = OpenNetwork(task.scenario, task.controllers, seconds=task.seconds, seed=task.seed)
    # One lane, so it needs no program that chooses sockets.
    with MmsgLanes(Policy.parse(POLICY), timestamps=True) as lanes:
        clock = Clock(begin({"mode": lanes.mode}))
        gc.collect()
        gc.freeze()
        gc.disable()  # a pause of some ms would be the network's; little is made here that it has to find
        relay = Relay(network, lanes, clock, task.peer)
        used = time.process_time()
        relay.run()
        used = time.process_time() - used
        counted = lanes.statistics()
    report = report_on(scenario(task.scenario), task.controllers, task.seed, network).document()
    say({
        "report": report,
        "cable": {
            "arrived": relay.arrived,
            "afterwards": relay.afterwards,
            "strange": relay.strange,
            "dropped": counted.overflowed + sum(counted.dropped.values()) + sum(counted.discarded.values()),
        },
        "answers": {
            "sent": relay.answered,
            "refused": relay.unanswered,
            "unsent": len(network.answers),
        },
        "timers": {
            "late": lateness(relay.late),
            "overtaken": relay.overtaken,
            "most_overtaken": relay.most_overtaken,
            "wakeups": relay.wakeups,
        },
        "cpu": used / task.seconds,
    })  # fmt: skip


if __name__ == "__main__":
    main(run)
