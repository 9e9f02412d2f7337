# SPDX-License-Identifier: Apache-2.0
"""A network of links and flows, and its run.

    network = Network(seconds=30.0, seed=7)
    link = network.link("bottleneck", rate=12.5e6, delay=0.02, queue=TailDrop(limit_bytes=500_000))
    network.flow("one", (link,), controller="cubic", back=0.02)
    network.run()

Links are one direction each.  The way back of a flow is a wire of its own, with a delay and, if asked for,
faults: acknowledgements meet no queue.  ``run`` ends with :meth:`Network.check`: no packet is lost track of.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable
from random import Random
from typing import Any, ClassVar, Final

from userspace.flow.congestion import MAX_DATAGRAM_SIZE, CongestionFactory
from userspace.flow.controller import SIZE_MAXIMUM, FlowController
from userspace.simulation.engine import MAX_EVENTS, MAX_TIME, Engine
from userspace.simulation.faults import Faults
from userspace.simulation.flow_receiver import FlowReceiver, Sink
from userspace.simulation.flow_sender import BIN, ConstantSource, FlowSender, Record
from userspace.simulation.link import MAX_RATE, Discipline, Link
from userspace.simulation.packet import Route
from xdp.errors import UsageError

#: As many as one run may have: each has a controller, and its samples.
MAX_FLOWS: Final = 10_000


class LinkRecord:
    """A link whose queue is watched, with its capacity and queue over time."""

    __slots__ = ("capacity", "link", "queued")

    def __init__(self, link: Link) -> None:
        self.link = link
        self.capacity = array("d")  # bytes that it could have carried, by bin
        self.queued = array("d")  # bytes that wait, at the end of each bin


class Network:
    """Made of links and flows, run once.  Raises UsageError for what is out of range."""

    #: Who sends; another for those whose senders are elsewhere.
    flow_sender: ClassVar[type[FlowSender]] = FlowSender
    constant_source: ClassVar[type[ConstantSource]] = ConstantSource

    __slots__ = ("_back", "_bins", "_forward", "_senders", "engine", "flows", "links", "seconds")

    def __init__(self, *, seconds: float, seed: int = 0, max_events: int = MAX_EVENTS) -> None:
        if type(seconds) not in {int, float} or not BIN <= seconds <= MAX_TIME:
            raise UsageError(f"seconds is {BIN:g} to {MAX_TIME:g}, not {seconds!r}")
        self.seconds = float(seconds)
        self.engine = Engine(seed=seed, max_events=max_events)
        self.links: list[LinkRecord] = []
        self.flows: list[Record] = []
        self._forward: list[Link] = []  # wires without a queue
        self._back: list[Link] = []  # ways of acknowledgements
        self._senders: list[FlowSender] = []
        self._bins = int(self.seconds / BIN + 1e-9)

    # --- what it is made of

    def random(self, name: str) -> Random:
        """A generator for whoever is called that."""
        return self.engine.random(name)

    def link(
        self, name: str, *, rate: float, delay: float = 0.0, queue: Discipline, faults: Faults | None = None
    ) -> Link:
        """A bottleneck: bytes/s, seconds one way."""
        link = Link(self.engine, name, rate=rate, delay=delay, queue=queue, faults=faults, log=True)
        self.links.append(LinkRecord(link))
        return link

    def wire(self, name: str, *, delay: float, faults: Faults | None = None) -> Link:
        """A link without a queue: it delays, and loses if it has faults."""
        link = Link(self.engine, name, rate=None, delay=delay, faults=faults)
        self._forward.append(link)
        return link

    def flow(
        self,
        name: str,
        links: tuple[Link, ...],
        *,
        controller: str | CongestionFactory,
        back: float,
        back_faults: Faults | None = None,
        begin: float = 0.0,
        end: float | None = None,
        size: int = MAX_DATAGRAM_SIZE,
        ect: bool = False,
        priority: int = 0,
    ) -> FlowSender:
        """A flow under congestion control over these links; ``back``: seconds of its way back."""
        label = controller if isinstance(controller, str) else "custom"
        record = self._record(name, label, links, begin, end, size)
        record.rtt += back
        seed = self.random(f"controller {record.number}").getrandbits(32)

        def make(now: float) -> FlowController:
            return FlowController(now, congestion=controller, mtu=size, seed=seed)

        receiver = FlowReceiver(self.engine, record)
        route = Route(record.number, links, receiver.receive)
        sender = self.flow_sender(self.engine, record, route, make, size=size, ect=ect, priority=priority)
        wire = Link(self.engine, f"{name}, back", rate=None, delay=back, faults=back_faults)
        self._back.append(wire)
        receiver.route = Route(record.number, (wire,), sender.acknowledged)
        self._senders.append(sender)
        return sender

    def source(
        self,
        name: str,
        links: tuple[Link, ...],
        *,
        rate: float,
        begin: float = 0.0,
        end: float | None = None,
        size: int = MAX_DATAGRAM_SIZE,
        priority: int = 0,
    ) -> ConstantSource:
        """A source of that many bytes/s, which heeds nothing."""
        if not 0 < rate <= MAX_RATE:
            raise UsageError(f"rate is above 0 and at most {MAX_RATE:g} bytes/s, not {rate!r}")
        record = self._record(name, "", links, begin, end, size)
        route = Route(record.number, links, Sink(record).receive)
        return self.constant_source(
            self.engine, record, route, rate=rate, size=size, random=self.random(name), priority=priority
        )

    def at(self, time: float, call: Callable[[float, Any], None], argument: Any) -> None:
        """Change something then: ``network.at(5.0, link.set_rate, 1e6)``."""
        self.engine.at(time, call, argument)

    def _record(
        self,
        name: str,
        controller: str,
        links: tuple[Link, ...],
        begin: float,
        end: float | None,
        size: int,
    ) -> Record:
        end = self.seconds if end is None else end
        if type(size) is not int or not 1 <= size <= SIZE_MAXIMUM:
            raise UsageError(f"size is 1 to {SIZE_MAXIMUM} bytes, not {size!r}")
        if not 0 <= begin <= end:
            raise UsageError(f"a flow begins at 0 or later and ends after that, not {begin!r} to {end!r}")
        if len(self.flows) == MAX_FLOWS:
            raise UsageError(f"at most {MAX_FLOWS} flows")
        record = Record(len(self.flows), name, controller, begin, end, self._bins)
        record.links, record.rtt = links, sum(link.delay for link in links)
        self.flows.append(record)
        return record

    # --- its run

    def run(self, progress: Callable[[float], None] | None = None) -> None:
        """All of it; ``progress`` is told the simulated seconds so far, some times a second of them."""
        engine = self.engine
        for number in range(1, self._bins + 1):
            engine.run(min(number * BIN, self.seconds))  # 3 * 0.1 is more than 0.3
            self._sample()
            if progress is not None:
                progress(engine.now)
        engine.run(self.seconds)
        self.check()

    def _sample(self) -> None:
        """Write down windows and queues at the end of a bin."""
        now = self.engine.now
        for watched in self.links:
            watched.capacity.append(watched.link.take_capacity(now))
            watched.queued.append(watched.link.queued_bytes)
        for sender in self._senders:
            controller, record = sender.controller, sender.record
            record.window.append(0.0 if controller is None else controller.window)
            record.in_flight.append(0.0 if controller is None else controller.in_flight)

    @property
    def packets(self) -> int:
        """Data packets that were sent."""
        return sum(record.sent for record in self.flows)

    def lost(self, flow: int) -> dict[str, int]:
        """Packets of a flow that were lost on its way, by reason; damaged ones count when they arrive."""
        found: Counter[str] = Counter()
        for link in [record.link for record in self.links] + self._forward:
            for (owner, reason), count in link.lost.items():
                if owner == flow:
                    found[reason] += count
        if self.flows[flow].corrupted:
            found["corrupted"] = self.flows[flow].corrupted
        return dict(sorted(found.items()))

    def check(self) -> None:
        """AssertionError when a packet is nowhere, or twice: in a link, or between sender and receiver."""
        forward = [record.link for record in self.links] + self._forward
        for link in [*forward, *self._back]:
            link.check()
        inside = sum(link.queued + link.on_wire for link in forward)
        sent = self.packets + sum(link.duplicated for link in forward)
        arrived = sum(record.received + record.duplicates + record.corrupted for record in self.flows)
        lost = sum(link.lost.total() for link in forward)
        if sent != arrived + lost + inside:
            raise AssertionError(f"{sent} sent, but {arrived} arrived + {lost} lost + {inside} on their way")
