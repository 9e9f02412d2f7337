# SPDX-License-Identifier: Apache-2.0
"""The batch queue beside a model without buffers: packets, fates, times and windows, alike after each step.

The model of flow control is a window of bytes and a pace for each destination: what it says is exact, so
that each packet has one time at which it may leave.
"""

from __future__ import annotations

import errno
import math
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import cast

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from userspace.datagram.batch_queue import NO_ROOM, BatchQueue, OutgoingBatch
from userspace.datagram.batch_statistics import Reason
from userspace.datagram.batch_targets import Target, Targets
from userspace.datagram.destination import Endpoint
from userspace.datagram.flow_gate import FlowGate

TARGETS = Targets()
A, B, C = (TARGETS["127.0.0.1", port] for port in (1, 2, 3))

# Times are multiples of this, so that sums of them are exact.
TICK = 1 / 1024
AGE, RETRY = 40 * TICK, 2 * TICK
SIZE, BUFFERS = 4, 12


@dataclass
class Path:
    """What flow control knows of a destination: bytes that may leave, and not before when."""

    window: int
    not_before: float = 0.0
    pause: float = 0.0  # from one packet to the next

    def when(self, size: int, now: float) -> float:
        return math.inf if size > self.window else max(now, self.not_before)

    def sent(self, size: int, now: float) -> None:
        self.window -= size
        self.not_before = now + self.pause


class Gate:
    """Flow control of some destinations, as the queue sees it; those without a path have none."""

    def __init__(self, paths: dict[Endpoint, Path]) -> None:
        self.paths = paths
        self.asked = Counter[Endpoint]()
        self._now = 0.0
        self._batch: dict[Endpoint, Path] = {}

    def begin(self, now: float) -> None:
        self._now = now
        self._batch = {endpoint: Path(**vars(path)) for endpoint, path in self.paths.items()}

    def passes(self, endpoint: Endpoint, size: int) -> bool:
        path = self._batch.get(endpoint)
        self.asked[endpoint] += 1
        if path is None:
            return True
        if path.when(size, self._now) > self._now:
            return False
        path.sent(size, self._now)
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
        for index, (target, payload) in enumerate(zip(batch.targets, batch.payloads, strict=True)):
            path = self.paths.get(target.endpoint)
            if path is not None and index not in unsent:
                path.sent(len(payload), now)

    def next_send_time(self, endpoint: Endpoint, size: int, now: float) -> float:
        return self.paths[endpoint].when(size, now)


@dataclass
class Packet:
    payload: bytes
    target: Target
    priority: int
    born: float


@dataclass
class Held:
    """Until when, and the priority and size of what flow control did not let pass (None: no room)."""

    until: float
    refused: tuple[int, int] | None = None


@dataclass
class Model:
    """The same rules over one list, without buffers."""

    timeout: float
    paths: dict[Endpoint, Path]
    packets: list[Packet] = field(default_factory=list)
    blocked_until: float | None = None
    held: dict[Target, Held] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)

    def ready(self) -> list[Packet]:
        if self.blocked_until is not None:
            return []
        found = [packet for packet in self.packets if packet.target not in self.held]
        return sorted(found, key=lambda packet: packet.priority)

    @property
    def retry_at(self) -> float:
        if self.blocked_until is not None:
            return self.blocked_until
        return min([held.until for held in self.held.values()], default=math.inf)

    def due(self, now: float) -> str | None:
        if now >= self.retry_at:
            return "retry"
        ready = self.ready()
        if len(ready) >= SIZE:
            return "size"
        return "time" if ready and now >= min(packet.born for packet in ready) + self.timeout else None

    def wakes(self) -> float:
        return min([packet.born + self.timeout for packet in self.ready()] + [self.retry_at])

    def retry(self, now: float) -> None:
        self.blocked_until = None
        self.held = {target: held for target, held in self.held.items() if held.until > now}

    def unblock(self) -> None:
        self.blocked_until, self.held = None, {}

    def take(self, now: float) -> list[Packet]:
        """One after the other, each as if those before it had left."""
        paths = {endpoint: Path(**vars(path)) for endpoint, path in self.paths.items()}
        found: list[Packet] = []
        for packet in self.ready():
            path = paths.get(packet.target.endpoint)
            if len(found) == SIZE or packet.target in self.held:
                continue
            if path is not None and path.when(len(packet.payload), now) > now:
                self.held[packet.target] = Held(math.nan, (packet.priority, len(packet.payload)))
                continue
            if path is not None:
                path.sent(len(packet.payload), now)
            found.append(packet)
        return found

    def ask(self, target: Target, now: float) -> None:
        held = self.held.get(target)
        if held is None or held.refused is None:
            return
        held.until = self.paths[target.endpoint].when(held.refused[1], now)
        if held.until <= now:
            del self.held[target]

    def settle(self, batch: list[Packet], now: float, unsent: dict[int, int]) -> None:
        fates = ["sent"] * len(batch)
        for index, error in unsent.items():
            fates[index] = "kept" if error in NO_ROOM else "failed"
        for packet, fate in zip(batch, fates, strict=True):
            if fate == "sent" and packet.target.endpoint in self.paths:
                self.paths[packet.target.endpoint].sent(len(packet.payload), now)
            if fate != "kept":
                self.packets = [one for one in self.packets if one is not packet]
                self.counts[fate] += 1
        refused = [target for target, held in self.held.items() if math.isnan(held.until)]
        for target in refused:
            self.ask(target, now)
        if "kept" in fates:
            if "sent" in fates[fates.index("kept") :]:
                for packet, fate in zip(batch, fates, strict=True):
                    if fate == "kept":
                        self.held[packet.target] = Held(now + RETRY)
            else:
                self.blocked_until = now + RETRY
                for packet, fate in zip(batch, fates, strict=True):
                    if fate == "kept":
                        self.held.pop(packet.target, None)
        if "kept" in fates or refused:
            self.expire(now)
        self.tidy()

    def expire(self, now: float) -> None:
        young = [packet for packet in self.packets if packet.born > now - AGE]
        self.counts["expired"] += len(self.packets) - len(young)
        self.packets = young

    def tidy(self) -> None:
        if not self.packets:
            self.blocked_until = None
            self.held = {}
        if self.blocked_until is None:
            there = {packet.target for packet in self.packets}
            self.held = {target: held for target, held in self.held.items() if target in there}


FATES = st.sampled_from([0, 0, errno.EAGAIN, errno.ENOBUFS, errno.EMSGSIZE])
WINDOWS = st.sampled_from([0, 1, 50, 150, 1 << 30])


class Machine(RuleBasedStateMachine):
    """Without flow control."""

    controlled: tuple[Target, ...] = ()

    def __init__(self) -> None:
        super().__init__()
        self.now = 1.0

    @initialize(ticks=st.sampled_from([0, 1, 5]), window=WINDOWS, pause=st.sampled_from([0, 1, 3, 50]))
    def start(self, ticks: int, window: int, pause: int) -> None:
        endpoints = [target.endpoint for target in self.controlled]
        self.gate = Gate({endpoint: Path(window, 0.0, pause * TICK) for endpoint in endpoints})
        self.model = Model(
            ticks * TICK, {endpoint: Path(window, 0.0, pause * TICK) for endpoint in endpoints}
        )
        self.queue = BatchQueue(
            batch_size=SIZE,
            batch_timeout=ticks * TICK,
            buffers=BUFFERS,
            buffer_size=100,
            priorities=3,
            maximum_age=AGE,
            retry=RETRY,
            gate=cast("FlowGate", self.gate) if self.controlled else None,
        )

    @rule(
        to=st.sampled_from([A, B, C]),
        priority=st.integers(0, 2),
        size=st.integers(0, 100),
        fill=st.integers(0, 255),
    )
    def add(self, to: Target, priority: int, size: int, fill: int) -> None:
        model = self.model
        payload = bytes([fill]) * size
        accepted = self.queue.add(to, payload, priority, self.now)
        if len(model.packets) == BUFFERS and self.controlled and model.held:
            model.expire(self.now)
            model.tidy()
        if len(model.packets) == BUFFERS:
            lowest = max(packet.priority for packet in model.packets)
            if lowest <= priority:
                assert not accepted
                model.counts["refused"] += 1
                return
            last = [packet for packet in model.packets if packet.priority == lowest][-1]
            model.packets = [packet for packet in model.packets if packet is not last]
            model.counts["failed"] += 1
            model.tidy()
        assert accepted
        model.counts["queued"] += 1
        model.packets.append(Packet(payload, to, priority, self.now))
        held = model.held.get(to)
        if held and held.refused and priority < held.refused[0] and model.blocked_until is None:
            held.refused = priority, size
            model.ask(to, self.now)

    @rule(ticks=st.sampled_from([1, 1, 2, 5, 45]))
    def wait(self, ticks: int) -> None:
        self.now += ticks * TICK

    @precondition(lambda self: self.queue.next_flush() is not None)
    @rule(fates=st.lists(FATES, min_size=4, max_size=4), room=st.integers(0, 12), cut=st.booleans())
    def poll(self, fates: list[int], room: int, cut: bool) -> None:
        """Sends what is due; with ``cut``, the lanes have room for so many and then are full."""
        for _ in range(100):
            reason = self.queue.due(self.now)
            assert reason == self.model.due(self.now)
            if reason is None:
                return
            if reason == "retry":
                self.model.retry(self.now)
            room -= self.one(reason, [0] * room + [errno.EAGAIN] * 4 if cut else fates)
        raise AssertionError("it does not end")

    @rule(fates=st.lists(FATES, min_size=4, max_size=4))
    def flush(self, fates: list[int]) -> None:
        self.queue.unblock()
        self.model.unblock()
        while self.queue.ready:
            self.one("demand", fates)

    def one(self, reason: Reason, fates: list[int]) -> int:
        model = self.model
        asked = self.gate.asked.copy()
        expected = model.take(self.now)
        batch = self.queue.take(reason, self.now)
        assert [bytes(payload) for payload in batch.payloads] == [packet.payload for packet in expected]
        assert list(batch.targets) == [packet.target for packet in expected]
        # What was to be tried again may be gone, so that only what flow control holds is left.
        assert expected or self.gate.asked != asked or (reason == "retry" and self.controlled)
        unsent = {index: fate for index, fate in enumerate(fates[: len(expected)]) if fate}
        self.queue.settle(batch, self.now, calls=1, unsent=unsent)
        model.settle(expected, self.now, unsent)
        assert self.gate.paths == model.paths
        return len(expected) - len(unsent)

    @invariant()
    def everything_is_in_one_place(self) -> None:
        statistics, counts = self.queue.statistics(), self.model.counts
        assert statistics.balanced, statistics
        for name in ("queued", "sent", "failed", "expired", "refused"):
            assert getattr(statistics, name) == counts[name], name
        assert statistics.waiting == len(self.model.packets)
        assert self.queue.ready == len(self.model.ready())
        assert len(set(self.queue.free)) == BUFFERS - statistics.waiting

    @invariant()
    def it_says_when_to_wake(self) -> None:
        wakes = self.queue.next_flush()
        if self.model.due(self.now):
            assert wakes is not None
            assert wakes <= self.now
        else:
            expected = self.model.wakes()
            assert wakes == (expected if expected < math.inf else None)

    def teardown(self) -> None:
        assert self.queue.give_up(errno.EBADF) == len(self.model.packets)
        assert self.queue.statistics().balanced
        assert sorted(self.queue.free) == list(range(BUFFERS))


class Controlled(Machine):
    """With flow control of two destinations of three."""

    controlled = (A, B)

    @rule(to=st.sampled_from([A, B]), window=WINDOWS, ticks=st.sampled_from([0, 0, 1, 4, 50]))
    def change(self, to: Target, window: int, ticks: int) -> None:
        """An acknowledgement came, or a timeout."""
        for paths in (self.gate.paths, self.model.paths):
            paths[to.endpoint].window = window
            paths[to.endpoint].not_before = self.now + ticks * TICK
        self.queue.reconsider(to.endpoint, self.now)
        self.model.ask(to, self.now)


SETTINGS = settings(
    max_examples=100, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestMachine = Machine.TestCase
TestMachine.settings = SETTINGS
TestControlled = Controlled.TestCase
TestControlled.settings = SETTINGS
