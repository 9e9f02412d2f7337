# SPDX-License-Identifier: Apache-2.0
"""A scenario's network, cut where the senders are: they are in another process, on another host.

    simulated  sender ------------------------> links -> receiver -> way back -> sender
    here       sender ==lanes==> enter -> links -> receiver -> way back -> answers ==lanes==> sender

Links, queues, faults and receivers are those of :mod:`userspace.simulation`, built by the same scenario
with the same seed; only time is the clock's.  Both halves build the network: the relay runs the links of
its one, the sender learns from its one which flows there are and makes their controllers.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from userspace.flow.controller import FlowController
from userspace.flow.ranges import Acknowledgement
from userspace.simulation.engine import Engine
from userspace.simulation.flow_scenarios import scenario
from userspace.simulation.flow_sender import BIN, ConstantSource, FlowSender, Record
from userspace.simulation.network import Network
from userspace.simulation.packet import Packet, Route

#: When its acknowledgement comes out of the way back (seconds), of which flow, and what it says.
Answer = tuple[float, int, Acknowledgement]


class RemoteFlow(FlowSender):
    """Stands for a flow that is sent elsewhere; what would come back to it is put into ``answers``."""

    __slots__ = ("answers", "ect", "make", "priority", "size")

    def __init__(
        self,
        engine: Engine,
        record: Record,
        route: Route,
        make: Callable[[float], FlowController],
        *,
        size: int,
        ect: bool = False,
        priority: int = 0,
    ) -> None:
        super().__init__(engine, record, route, make, size=size, ect=ect, priority=priority)
        self.make, self.size, self.ect, self.priority = make, size, ect, priority
        self.answers: list[Answer] = []

    def _begin(self, now: float, _: object) -> None:
        """Not here."""

    def acknowledged(self, now: float, packet: Packet) -> None:
        """An acknowledgement has come to the end of the way back."""
        if packet.corrupt:
            self.record.acks_damaged += 1
            return
        assert packet.body is not None
        self.answers.append((now, self.record.number, packet.body))


class RemoteSource(ConstantSource):
    """Stands for a source that is elsewhere: seconds between two packets, and the chance that varies them."""

    __slots__ = ("ect", "gap", "priority", "random", "size")

    def __init__(
        self,
        engine: Engine,
        record: Record,
        route: Route,
        *,
        rate: float,
        size: int,
        random: Random,
        priority: int = 0,
    ) -> None:
        super().__init__(engine, record, route, rate=rate, size=size, random=random, priority=priority)
        self.gap, self.size, self.random, self.priority = size / rate, size, random, priority
        self.ect = False

    def _due(self, now: float, _: object) -> None:
        """Not here."""


class OpenNetwork(Network):
    """The network of a scenario, run by a clock, with packets that come from outside.

    Raises UsageError for what does not exist or is out of range.
    """

    __slots__ = ("_sampled", "answers", "remotes")

    flow_sender = RemoteFlow
    constant_source = RemoteSource

    def __init__(self, name: str, controllers: tuple[str, ...], *, seconds: float, seed: int) -> None:
        super().__init__(seconds=seconds, seed=seed)
        self._sampled = 0  # bins
        #: What has come out of the ways back; whoever sends it on empties the list.
        self.answers: list[Answer] = []
        #: By the number of the flow.
        self.remotes: list[RemoteFlow | RemoteSource] = []
        scenario(name).build(self, controllers)

    def flow(self, *arguments: object, **options: object) -> FlowSender:
        """As Network.flow; nothing is sent here."""
        made = super().flow(*arguments, **options)  # type: ignore[arg-type]
        assert isinstance(made, RemoteFlow)
        made.answers = self.answers
        self.remotes.append(made)
        return made

    def source(self, *arguments: object, **options: object) -> ConstantSource:
        """As Network.source; nothing is sent here."""
        made = super().source(*arguments, **options)  # type: ignore[arg-type]
        assert isinstance(made, RemoteSource)
        self.remotes.append(made)
        return made

    def enter(self, at: float, remote: RemoteFlow | RemoteSource, number: int, size: int) -> None:
        """A packet of that many bytes has come; ``at`` is not before what was told here last."""
        self.advance(at)
        packet = Packet(remote.route, number, size)
        packet.ect, packet.priority = remote.ect, remote.priority
        remote.record.sent += 1
        remote.route.send(at, packet)

    def advance(self, until: float) -> None:
        """All that happens until then, seconds; at most to the end."""
        engine = self.engine
        while self._sampled < self._bins:
            edge = min((self._sampled + 1) * BIN, self.seconds)
            if edge > until:
                break
            self._sampled += 1
            engine.run(edge)
            self._sample()
        engine.run(until)
