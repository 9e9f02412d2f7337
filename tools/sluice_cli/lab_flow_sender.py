# SPDX-License-Identifier: Apache-2.0
"""The sender of ``sluice lab flow``: many flows over one set of lanes, each paced by its FlowController.

This is the loop that an application has: read acknowledgements, let every flow that is due put its packets
into the next batch, send that, and sleep in the lanes until the next flow is due or something comes.
Payloads are written where they are sent from (:class:`~userspace.datagram.zero_copy.ZeroCopyUDP`).

A packet has its number when it is put into the batch.  What the lanes have no room for is told to its flow
(on_local_overflow) and sent first the next time; until then no flow adds to it.
"""

from __future__ import annotations

import gc
import math
import time
from array import array
from collections import Counter
from typing import Any, Final

import msgspec

from sluice_cli.lab_flow_network import OpenNetwork, RemoteFlow, RemoteSource
from sluice_cli.lab_flow_relay import QUIET, lateness
from sluice_cli.lab_flow_wire import (
    BATCH,
    NUMBER_BITS,
    POLICY,
    PORT,
    Clock,
    Task,
    begin,
    decode,
    main,
    say,
)
from userspace.datagram.lanes import Lanes, open_lanes
from userspace.datagram.zero_copy import ZeroCopyUDP
from userspace.flow.controller import FlowController
from userspace.flow.ranges import Acknowledgement
from xdp.policy import Policy

#: Seconds that it sleeps at least: some packets at 100 Mb/s leave together, which pacing allows for, and
#: each wake-up costs as much as a few of them.
TICK: Final = 0.0005
#: Seconds that it sleeps at most, so that the end is not missed.
LONGEST: Final = 0.1


class Flow:
    """A flow under congestion control, as an application has it."""

    __slots__ = ("_remote", "_tag", "acknowledgements", "controller", "due", "probes", "sent", "size")

    def __init__(self, remote: RemoteFlow) -> None:
        self._remote, self._tag = remote, remote.record.number << NUMBER_BITS
        self.controller: FlowController | None = None
        self.size = remote.size
        self.due = remote.record.begin
        self.sent = self.probes = self.acknowledgements = 0

    def acknowledged(self, at: float, said: Acknowledgement) -> None:
        """An acknowledgement came; what it allows is due at once."""
        controller = self.controller
        if controller is None:
            return  # of a flow that has sent nothing: an answer to nobody
        self.acknowledgements += 1
        controller.on_ack_received(at, said.ranges, said.delay, said.ce_count if self._remote.ect else None)
        self.due = at

    def pump(self, now: float, words: list[int]) -> None:
        """Put what may leave now into the next batch, and say when to come back."""
        controller = self.controller
        if controller is None:
            controller = self.controller = self._remote.make(now)
        if controller.next_timeout() <= now:
            self.probes += controller.on_timeout(now).probe
        send_at = math.inf
        if now < self._remote.record.end:
            size, next_send_time = self.size, controller.next_send_time
            send_at = next_send_time(now, size)
            while send_at <= now:
                words.append(self._tag | controller.on_packet_sent(now, size))
                self.sent += 1
                send_at = next_send_time(now, size)
        self.due = min(controller.next_timeout(), send_at)

    def overflowed(self, now: float, packets: int) -> None:
        """So many of its packets found no room in the lanes."""
        if self.controller is not None:
            self.controller.on_local_overflow(now, packets)

    def state(self) -> dict[str, Any]:
        """At the end."""
        snapshot = None if self.controller is None else msgspec.to_builtins(self.controller.snapshot())
        return {"sent": self.sent, "acknowledgements": self.acknowledgements, "probes": self.probes,
                "controller": snapshot}  # fmt: skip


class Source:
    """Sends at a rate and heeds nothing."""

    __slots__ = ("_end", "_remote", "_tag", "due", "sent", "size")

    def __init__(self, remote: RemoteSource) -> None:
        self._remote, self._tag, self._end = remote, remote.record.number << NUMBER_BITS, remote.record.end
        self.size = remote.size
        self.due = remote.record.begin
        self.sent = 0

    def acknowledged(self, at: float, said: Acknowledgement) -> None:
        """Nobody acknowledges it."""

    def pump(self, now: float, words: list[int]) -> None:
        """Put what is due into the next batch."""
        gap, random = self._remote.gap, self._remote.random.random
        while self.due <= now:
            if self.due >= self._end:
                self.due = math.inf
                return
            words.append(self._tag | self.sent)
            self.sent += 1
            self.due += gap * (0.5 + random())

    def overflowed(self, now: float, packets: int) -> None:
        """It does not slow down."""

    def state(self) -> dict[str, Any]:
        """At the end."""
        return {"sent": self.sent, "acknowledgements": 0, "probes": 0, "controller": None}


class Sender:
    """One run.  ``lanes`` stay the caller's."""

    def __init__(self, network: OpenNetwork, lanes: Lanes, clock: Clock, peer: str) -> None:
        self._lanes, self._clock, self._end = lanes, clock, network.seconds
        self.zero = ZeroCopyUDP(lanes, port=PORT)
        self.peer = (peer, PORT)
        self.flows: list[Flow | Source] = [
            Flow(remote) if isinstance(remote, RemoteFlow) else Source(remote) for remote in network.remotes
        ]
        self._size = max(flow.size for flow in self.flows)
        self.words: list[int] = []
        self._first = 0  # flow, of this turn
        self.sent = 0
        self.refused = 0  # times that a packet found no room
        self.unsent = 0  # packets that never did
        self.strange = 0  # datagrams that are no acknowledgement
        #: Seconds that it slept too long, each time that nothing came meanwhile.
        self.late = array("d")

    def run(self) -> None:
        """From the beginning to the end."""
        now, flows, words = self._clock.now, self.flows, self.words
        time.sleep(max(0.0, -now()))
        while (at := now()) < self._end:
            if not words:
                self._pump(at)
            if words:
                self.send()
            at = now()
            pause = TICK
            if not words:
                pause = max(TICK, min(LONGEST, min(flow.due for flow in flows) - at, self._end - at))
            if not self.read(pause):
                self.late.append(max(0.0, now() - at - pause))
        self.unsent = len(words)
        # What the interface has not sent yet is lost when the lanes are closed.
        while now() < self._end + QUIET:
            self.read(TICK)

    def _pump(self, now: float) -> None:
        """All flows that are due, another one first each time.

        What they send leaves together: whoever is always first finds room in a queue that is nearly full,
        and whoever is last does not.  Sixteen flows in one order came to a Jain's index of 0.7.
        """
        flows = self.flows
        self._first = first = (self._first + 1) % len(flows)
        for flow in (*flows[first:], *flows[:first]):
            if flow.due <= now:
                flow.pump(now, self.words)

    def read(self, timeout: float) -> int:
        """Acknowledgements that are there, or the first that come; how many packets that were."""
        flows, of, found = self.flows, self._clock.of, 0
        while True:
            with self._lanes.receive(BATCH, timeout) as batch:
                count = len(batch)
                for nanoseconds, payload in zip(batch.times, batch, strict=True) if count else ():
                    answer = decode(payload)
                    if answer is None or answer[0] >= len(flows):
                        self.strange += 1
                    else:
                        flows[answer[0]].acknowledged(of(nanoseconds), answer[1])
            found += count
            if count < BATCH:
                return found
            timeout = 0.0

    def send(self) -> None:
        """As much of the batch as the lanes take; the rest stays, in order."""
        words, flows, zero = self.words, self.flows, self.zero
        left: list[int] = []
        while words:
            with zero.allocate(min(len(words), BATCH), self._size) as buffers:
                count = len(buffers)
                if not count:
                    break  # all frames are on their way
                part = words[:count]
                buffers.scatter(0, array("Q", part))
                self.sent += zero.send(
                    self.peer, buffers, lengths=[flows[word >> NUMBER_BITS].size for word in part]
                )
            del words[:count]
            if zero.failures:
                left = [part[failure.index] for failure in zero.failures]
                break
        words[:0] = left
        if words:
            self.refused += len(words)
            now = self._clock.now()
            for number, packets in Counter(word >> NUMBER_BITS for word in words).items():
                flows[number].overflowed(now, packets)


def run(task: Task) -> None:
    """The whole process."""
    network = OpenNetwork(task.scenario, task.controllers, seconds=task.seconds, seed=task.seed)
    interface = None if task.mode in {"mmsg", "portable"} else task.interface
    with open_lanes(Policy.parse(POLICY), interface=interface, mode=task.mode) as lanes:
        clock = Clock(begin({"mode": lanes.mode}))
        gc.collect()
        gc.freeze()
        gc.disable()  # a pause of some ms would be the network's; little is made here that it has to find
        sender = Sender(network, lanes, clock, task.peer)
        used = time.process_time()
        sender.run()
        used = time.process_time() - used
    say({
        "mode": lanes.mode,
        "sent": sender.sent,
        "refused": sender.refused,
        "unsent": sender.unsent,
        "strange": sender.strange,
        "flows": [flow.state() for flow in sender.flows],
        "late": lateness(sender.late),
        "cpu": used / task.seconds,
    })  # fmt: skip


if __name__ == "__main__":
    main(run)
