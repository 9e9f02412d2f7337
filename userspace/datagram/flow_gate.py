# SPDX-License-Identifier: Apache-2.0
"""The FlowControllers of a batch manager's destinations: who may send now, and what they are told.

    gate = FlowGate(lambda endpoint, now: FlowController(now), on_sent=remember)
    with UDPBatchManager(lanes, port=8001, flows=gate) as manager:
        manager.queue_packet(peer, payload)           # leaves when the peer's controller lets it
        ...
        manager.acknowledged(peer, ranges)            # what the peer said; frees its window

Controllers come from a mapping that the caller keeps, or from a function that makes one when it is first
needed; the latest :data:`KEPT` of those are remembered.  None means that a destination has no flow control.

Numbers are given in the order in which packets leave, one after another for each controller.  ``on_sent``
tells which one a payload has got; who needs to know finds a number of its own in the payload.  It is called
when the batch is settled, and may not use the manager: the payload would be gone.  Where 0 comes again, the
controller was forgotten meanwhile and made anew.

A window that is full opens by an acknowledgement or by the controller's timeout.  Timeouts are kept here;
``on_timeout`` gets what they have shown: lost packets, or that a probe should leave.  It may use the manager.
"""

from __future__ import annotations

import heapq
import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from typing import TYPE_CHECKING, Final, TypeAlias

from userspace.datagram.batch_queue import NO_ROOM, OutgoingBatch
from userspace.datagram.destination import Endpoint
from xdp.errors import UsageError

if TYPE_CHECKING:  # it stands above this package, and is only used here by who has it
    from userspace.flow.controller import FlowController
    from userspace.flow.recovery import Outcome

#: Controllers that a function made, some 5 KiB each.
KEPT: Final = 4096
KEPT_MAXIMUM: Final = 1 << 20
#: Of those used longest ago, so many are looked at for an idle one before one that is not is forgotten.
_LOOKED_AT: Final = 8
#: Seconds between probe timeouts of who has nothing to probe with: the longest backoff (RFC 8961, 4).
_SILENCE: Final = 60.0
#: Timers that are out of date are left where they are until they are so many more than the others.
_STALE_TIMERS: Final = 64
_NEVER: Final = float("inf")

#: What is told of a packet that has left: endpoint, number, payload.
OnSent: TypeAlias = Callable[[Endpoint, int, memoryview], object]
#: What is told of a timeout: endpoint, what it has shown.
OnTimeout: TypeAlias = "Callable[[Endpoint, Outcome], object]"
Flows: TypeAlias = "Mapping[Endpoint, FlowController] | Callable[[Endpoint, float], FlowController | None]"


class _Taken:
    """What the batch at hand has of one controller's packets, and what it may have."""

    __slots__ = ("bytes", "most", "packets")

    def __init__(self) -> None:
        self.packets = self.bytes = 0
        #: Packets and bytes; None while there is only one, which its next_send_time speaks for.
        self.most: tuple[int, int] | None = None


class FlowGate:
    """The controllers of some destinations; ``kept`` bounds those that a function has made.

    Belongs to one batch manager.  Raises UsageError for what is neither a mapping nor a function, and for
    values out of range.
    """

    __slots__ = (
        "_batch", "_kept", "_known", "_make", "_now", "_numbers", "_on_sent", "_overflowed", "_taken",
        "_timed", "_timers", "_told", "on_timeout",
    )  # fmt: skip

    def __init__(
        self,
        flows: Flows,
        *,
        on_sent: OnSent | None = None,
        on_timeout: OnTimeout | None = None,
        kept: int = KEPT,
    ) -> None:
        self._make: Callable[[Endpoint, float], FlowController | None] | None = None
        self._known: Mapping[Endpoint, FlowController] = OrderedDict()
        if isinstance(flows, Mapping):
            self._known = flows
        elif callable(flows):
            self._make = flows
        else:
            raise UsageError(f"flows is a mapping of endpoints or a function that makes one, not {flows!r}")
        for name, function in (("on_sent", on_sent), ("on_timeout", on_timeout)):
            if function is not None and not callable(function):
                raise UsageError(f"{name} is a function or None, not {function!r}")
        if type(kept) is not int or not 1 <= kept <= KEPT_MAXIMUM:
            raise UsageError(f"kept is a whole number from 1 to {KEPT_MAXIMUM}, not {kept!r}")
        self._kept = kept
        self._on_sent, self.on_timeout = on_sent, on_timeout
        # Of the batch at hand: its time, the controllers of its destinations, what it has of each.
        self._now = 0.0
        self._batch: dict[Endpoint, FlowController | None] = {}
        self._taken: dict[FlowController, _Taken] = {}
        self._told: list[tuple[Endpoint, int, memoryview]] = []
        #: When the packet in a buffer was queued that found no room, so that it is told once.
        self._overflowed: dict[int, float] = {}
        # A heap of (when to look, running number, endpoint), and which of them holds for an endpoint.
        self._timers: list[tuple[float, int, Endpoint]] = []
        self._timed: dict[Endpoint, float] = {}
        self._numbers = itertools.count()

    # --- controllers

    def find(self, endpoint: Endpoint) -> FlowController | None:
        """The controller of an (address, port), if there is one."""
        return self._known.get(endpoint)

    def flows(self) -> Iterator[tuple[Endpoint, FlowController]]:
        """All that there are; of those that a function made, the one used last comes first."""
        if isinstance(self._known, OrderedDict):
            yield from reversed(self._known.items())
        else:
            yield from self._known.items()

    def _of(self, endpoint: Endpoint, now: float) -> FlowController | None:
        known, make = self._known, self._make
        flow = known.get(endpoint)
        if make is None:
            return flow
        assert isinstance(known, OrderedDict)
        if flow is not None:
            known.move_to_end(endpoint)
            return flow
        flow = make(endpoint, now)
        if flow is not None:
            known[endpoint] = flow
            if len(known) > self._kept:
                self._forget(known)
        return flow

    @staticmethod
    def _forget(known: OrderedDict[Endpoint, FlowController]) -> None:
        """The one used longest ago, rather one that has nothing on its way; not the newest."""
        oldest = list(itertools.islice(known, min(_LOOKED_AT, len(known) - 1)))
        idle = [endpoint for endpoint in oldest if not known[endpoint].in_flight]
        del known[(idle or oldest)[0]]

    # --- for the queue

    def begin(self, now: float) -> None:
        """A batch is put together."""
        self._now = now
        self._batch.clear()
        self._taken.clear()

    def passes(self, endpoint: Endpoint, size: int) -> bool:
        """Whether the batch may have one more packet to there, of so many bytes; it has it then."""
        try:
            flow = self._batch[endpoint]
        except KeyError:
            flow = self._batch[endpoint] = self._of(endpoint, self._now)
        if flow is None:
            return True
        size = size or 1
        taken = self._taken.get(flow)
        if taken is None:
            if flow.next_send_time(self._now, size) > self._now:
                return False
            taken = self._taken[flow] = _Taken()
        else:
            if taken.most is None:
                taken.most = flow.burst_allowed(self._now)
            if taken.packets >= taken.most[0] or taken.bytes + size > taken.most[1]:
                return False
        taken.packets += 1
        taken.bytes += size
        return True

    def settle(
        self,
        batch: OutgoingBatch,
        now: float,
        unsent: Mapping[int, int],
        *,
        times: Sequence[float],
        done: Set[Endpoint],
    ) -> None:
        """Tell the controllers what became of a batch.

        ``times`` of queueing, by slot; ``done`` are those of its destinations to whom nothing more waits.
        """
        found = [self._batch.get(target.endpoint) for target in batch.targets]
        last = {target.endpoint: index for index, target in enumerate(batch.targets) if index not in unsent}
        overflow: dict[FlowController, int] = {}
        for index, flow in enumerate(found):
            if flow is None:
                continue
            slot, error = batch.slots[index], unsent.get(index)
            if error is None:
                endpoint, payload = batch.targets[index].endpoint, batch.payloads[index]
                # An empty datagram counts as a byte: congestion controllers know none without.
                number = flow.on_packet_sent(
                    now, len(payload) or 1, app_limited=last[endpoint] == index and endpoint in done
                )
                if self._on_sent is not None:
                    self._told.append((endpoint, number, payload.toreadonly()))
                if self._overflowed:
                    self._overflowed.pop(slot, None)
            elif error in NO_ROOM and self._overflowed.get(slot) != times[slot]:
                self._overflowed[slot] = times[slot]
                overflow[flow] = overflow.get(flow, 0) + 1
        for flow, packets in overflow.items():
            flow.on_local_overflow(now, packets)
        for endpoint in last:
            flow = self._batch.get(endpoint)
            if flow is not None:
                self._watch(endpoint, flow)

    def next_send_time(self, endpoint: Endpoint, size: int, now: float) -> float:
        """When a packet of so many bytes may leave for there; infinite while the window is full."""
        flow = self._known.get(endpoint)
        if flow is None:
            return now
        at = flow.next_send_time(now, size or 1)
        if at == _NEVER:
            self._watch(endpoint, flow)
        return at

    # --- for the manager

    def tell(self) -> None:
        """Call ``on_sent`` for what has left."""
        told, self._told = self._told, []
        if self._on_sent is not None:
            for endpoint, number, payload in told:
                self._on_sent(endpoint, number, payload)

    def acknowledged(
        self,
        endpoint: Endpoint,
        ranges: Iterable[tuple[int, int]],
        ack_delay: float,
        ce_count: int | None,
        now: float,
    ) -> Outcome | None:
        """As ``on_ack_received`` of the controller; None when there is none."""
        flow = self.find(endpoint)
        if flow is None:
            return None
        outcome = flow.on_ack_received(now, ranges, ack_delay, ce_count)
        self._watch(endpoint, flow)
        return outcome

    # --- timeouts

    def _watch(self, endpoint: Endpoint, flow: FlowController, least: float = -_NEVER) -> None:
        """Look at a controller when its timeout comes, but not before ``least``."""
        at = max(flow.next_timeout(), least)
        if at >= self._timed.get(endpoint, _NEVER):
            return  # when that comes, it is seen that it is too early
        self._timed[endpoint] = at
        if len(self._timers) > 2 * len(self._timed) + _STALE_TIMERS:
            self._timers = [(when, next(self._numbers), one) for one, when in self._timed.items()]
            heapq.heapify(self._timers)
        else:
            heapq.heappush(self._timers, (at, next(self._numbers), endpoint))

    def next_timeout(self) -> float:
        """When to call :meth:`time_out`; infinite while nothing is on its way."""
        timers = self._timers
        while timers:
            at, _, endpoint = timers[0]
            if self._timed.get(endpoint) == at:
                flow = self.find(endpoint)
                # What waits for one that was forgotten has to be looked at, too.
                due = flow.next_timeout() if flow is not None else at
                if due <= at:
                    return at
                del self._timed[endpoint]
                if flow is not None:
                    self._watch(endpoint, flow)
            else:
                heapq.heappop(timers)
            timers = self._timers
        return _NEVER

    def time_out(self, now: float) -> list[tuple[Endpoint, Outcome | None]]:
        """Call on_timeout of the controllers whose time has come.

        What each has shown; None when it is gone.  Those destinations are to be asked for anew.
        """
        found: list[tuple[Endpoint, Outcome | None]] = []
        while self.next_timeout() <= now:
            _, _, endpoint = heapq.heappop(self._timers)
            del self._timed[endpoint]
            flow = self.find(endpoint)
            if flow is None:
                found.append((endpoint, None))
                continue
            outcome = flow.on_timeout(now)
            found.append((endpoint, outcome))
            # With nothing to probe with the next one would be in the past for ever.
            overdue = outcome.probe and flow.next_timeout() <= now
            self._watch(endpoint, flow, now + _SILENCE if overdue else -_NEVER)
        return found
