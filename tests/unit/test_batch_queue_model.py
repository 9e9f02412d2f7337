# SPDX-License-Identifier: Apache-2.0
"""The batch queue beside a model without buffers: any packets, fates and times, alike after every step."""

from __future__ import annotations

import errno
import math
from collections import Counter
from dataclasses import dataclass, field

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from userspace.datagram.batch_queue import NO_ROOM, BatchQueue
from userspace.datagram.batch_statistics import Reason
from userspace.datagram.batch_targets import Target, Targets

TARGETS = Targets()
A, B, C = (TARGETS["127.0.0.1", port] for port in (1, 2, 3))

# Times are multiples of this, so that sums of them are exact.
TICK = 1 / 1024
AGE, RETRY = 40 * TICK, 2 * TICK
SIZE, BUFFERS = 4, 12


@dataclass
class Packet:
    payload: bytes
    target: Target
    priority: int
    born: float


@dataclass
class Model:
    """The same rules over one list, without buffers."""

    timeout: float
    packets: list[Packet] = field(default_factory=list)
    blocked: bool = False
    held: set[Target] = field(default_factory=set)
    retry_at: float = math.inf
    counts: Counter[str] = field(default_factory=Counter)

    def ready(self) -> list[Packet]:
        if self.blocked:
            return []
        found = [packet for packet in self.packets if packet.target not in self.held]
        return sorted(found, key=lambda packet: packet.priority)

    def due(self, now: float) -> str | None:
        if now >= self.retry_at:
            return "retry"
        ready = self.ready()
        if len(ready) >= SIZE:
            return "size"
        return "time" if ready and now >= min(packet.born for packet in ready) + self.timeout else None

    def wakes(self) -> float:
        return min([packet.born + self.timeout for packet in self.ready()] + [self.retry_at])

    def unblock(self) -> None:
        self.blocked, self.held, self.retry_at = False, set(), math.inf

    def settle(self, batch: list[Packet], now: float, unsent: dict[int, int]) -> None:
        fates = ["sent"] * len(batch)
        for index, error in unsent.items():
            fates[index] = "kept" if error in NO_ROOM else "failed"
        for packet, fate in zip(batch, fates, strict=True):
            if fate != "kept":
                self.packets = [one for one in self.packets if one is not packet]
                self.counts[fate] += 1
        if "kept" in fates:
            if "sent" in fates[fates.index("kept") :]:
                self.held |= {
                    packet.target for packet, fate in zip(batch, fates, strict=True) if fate == "kept"
                }
            else:
                self.blocked, self.held = True, set()
            self.retry_at = min(self.retry_at, now + RETRY)
            young = [packet for packet in self.packets if packet.born > now - AGE]
            self.counts["expired"] += len(self.packets) - len(young)
            self.packets = young
        self.tidy()

    def tidy(self) -> None:
        if not any(self.blocked or packet.target in self.held for packet in self.packets):
            self.unblock()


FATES = st.sampled_from([0, 0, errno.EAGAIN, errno.ENOBUFS, errno.EMSGSIZE])


class Machine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.now = 1.0

    @initialize(ticks=st.sampled_from([0, 1, 5]))
    def start(self, ticks: int) -> None:
        self.model = Model(ticks * TICK)
        self.queue = BatchQueue(
            batch_size=SIZE,
            batch_timeout=ticks * TICK,
            buffers=BUFFERS,
            buffer_size=100,
            priorities=3,
            maximum_age=AGE,
            retry=RETRY,
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
                self.model.unblock()
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
        expected = model.ready()[:SIZE]
        batch = self.queue.take(reason)
        assert [bytes(payload) for payload in batch.payloads] == [packet.payload for packet in expected]
        assert list(batch.targets) == [packet.target for packet in expected]
        assert expected, "a batch is never empty"
        unsent = {index: fate for index, fate in enumerate(fates[: len(expected)]) if fate}
        self.queue.settle(batch, self.now, calls=1, unsent=unsent)
        model.settle(expected, self.now, unsent)
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
            assert wakes == (self.model.wakes() if self.model.packets else None)

    def teardown(self) -> None:
        assert self.queue.give_up(errno.EBADF) == len(self.model.packets)
        assert self.queue.statistics().balanced
        assert sorted(self.queue.free) == list(range(BUFFERS))


TestMachine = Machine.TestCase
TestMachine.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
