# SPDX-License-Identifier: Apache-2.0
"""FlowGate with real controllers, under a batch queue in virtual time."""

from __future__ import annotations

import errno
import math
import random
from collections import Counter, defaultdict
from typing import Any

import pytest

from userspace.datagram.batch_queue import BatchQueue, OutgoingBatch
from userspace.datagram.batch_targets import Target, Targets
from userspace.datagram.destination import Endpoint
from userspace.datagram.flow_gate import FlowGate
from userspace.flow.controller import FlowController
from xdp.errors import UsageError

TARGETS = Targets()
A, B = (TARGETS["127.0.0.1", port] for port in (1, 2))
SIZE = 1200


class Sender:
    """A queue with its gate, and what became of the packets."""

    def __init__(self, gate: FlowGate, **options: Any) -> None:
        self.gate = gate
        self.queue = BatchQueue(
            **{"batch_timeout": 0.0, "buffer_size": SIZE, "maximum_age": 1e6, "gate": gate, **options}
        )
        self.batches: list[list[bytes]] = []

    def add(self, target: Target, number: int, now: float, *, priority: int = 1, size: int = SIZE) -> None:
        assert self.queue.add(target, b"%d" % number + bytes(size - len(b"%d" % number)), priority, now)

    def poll(self, now: float, unsent: dict[int, int] | None = None) -> list[int]:
        """Numbers that were sent; ``unsent`` is of the first batch."""
        sent: list[int] = []
        for _ in range(1000):
            reason = self.queue.due(now)
            if reason is None:
                self.gate.tell()
                return sent
            batch = self.queue.take(reason, now)
            sent += self.settle(batch, now, unsent or {})
            unsent = None
        raise AssertionError("it does not end")

    def settle(self, batch: OutgoingBatch, now: float, unsent: dict[int, int]) -> list[int]:
        numbers = [int(bytes(payload).rstrip(b"\0") or b"-1") for payload in batch.payloads]
        self.queue.settle(batch, now, calls=1, unsent=unsent)
        return [number for index, number in enumerate(numbers) if index not in unsent]

    def wakes(self) -> float:
        return min(self.queue.next_flush() or math.inf, self.gate.next_timeout())


def fixed(rate: float | None = None, **options: Any) -> FlowController:
    return FlowController(0.0, adaptive=False, max_rate=rate, **options)


def test_no_more_than_the_window_leaves_and_an_acknowledgement_frees_it() -> None:
    told: list[tuple[Endpoint, int, bytes]] = []
    flow = FlowController(0.0)
    sender = Sender(FlowGate({A.endpoint: flow}, on_sent=lambda *one: told.append((*one[:2], bytes(one[2])))))
    for number in range(30):
        sender.add(A, number, 1.0)
        sender.add(B, 100 + number, 1.0)
    sent = sender.poll(1.0)
    assert [number for number in sent if number < 100] == list(range(10)), "the initial window"
    assert [number for number in sent if number >= 100] == list(range(100, 130)), "it has no controller"
    assert (flow.in_flight, flow.window) == (12_000, 12_000)
    assert [(one[0], one[1], int(one[2].rstrip(b"\0"))) for one in told] == [
        (A.endpoint, number, number) for number in range(10)
    ]
    assert sender.queue.next_flush() is None, "not polled in vain"
    assert sender.wakes() == flow.next_timeout()
    assert sender.poll(1.5) == []
    sender.gate.acknowledged(A.endpoint, [(0, 1)], 0.0, None, 1.5)
    sender.queue.reconsider(A.endpoint, 1.5)
    # Slow start: so many bytes more than were acknowledged.
    assert sender.poll(1.5) == [10, 11, 12, 13]
    assert flow.in_flight == flow.window == 14_400


def test_paced_ones_are_due_when_they_may_leave() -> None:
    """1,200 bytes a millisecond: after the burst one by one, none before its time and none late."""
    flow = fixed(1_200_000.0)
    sender = Sender(FlowGate({A.endpoint: flow}))
    for number in range(100):
        sender.add(A, number, 0.0)
    left, now, wakes = 0, 0.0, 0
    while left < 100:
        sent = sender.poll(now)
        left += len(sent)
        assert left * SIZE <= 12_000 + 1_200_000 * (now + 0.0015), now
        assert sent, "never polled in vain"
        if left < 100:
            assert sender.queue.next_flush() == pytest.approx(flow.next_send_time(now, SIZE))
            now = sender.queue.next_flush() or 0.0
            wakes += 1
    assert now == pytest.approx(0.090, abs=0.002)


def test_a_timeout_lets_a_probe_leave_and_loss_opens_the_window() -> None:
    flow = FlowController(0.0)
    sender = Sender(FlowGate({A.endpoint: flow}))
    for number in range(30):
        sender.add(A, number, 0.0)
    assert len(sender.poll(0.0)) == 10
    at = sender.gate.next_timeout()
    assert at == flow.next_timeout()
    assert sender.gate.time_out(at - 0.001) == []
    ((endpoint, outcome),) = sender.gate.time_out(at)
    assert endpoint == A.endpoint
    assert outcome is not None
    assert outcome.probe
    sender.queue.reconsider(endpoint, at)
    assert sender.poll(at) == [10], "the probe"
    assert sender.gate.next_timeout() == flow.next_timeout() > at
    sender.gate.acknowledged(A.endpoint, [(10, 10)], 0.0, None, at + 0.1)
    sender.queue.reconsider(A.endpoint, at + 0.1)
    assert flow.snapshot().lost_packets == 10
    assert sender.poll(at + 0.1), "what was lost is not on its way"


def test_who_has_nothing_to_probe_with_is_left_alone() -> None:
    flow = fixed()
    sender = Sender(FlowGate({A.endpoint: flow}))
    sender.add(A, 0, 0.0)
    sender.poll(0.0)
    now, woken = 0.0, 0
    while now < 3600.0:
        now = sender.gate.next_timeout()
        woken += 1
        assert len(sender.gate.time_out(now)) == 1
        assert sender.gate.next_timeout() > now
    assert woken < 80
    # One more packet, and its timeout is soon again.
    sender.add(A, 1, now)
    assert sender.poll(now) == [1]
    sender.gate.acknowledged(A.endpoint, [(0, 0)], 0.0, None, now)
    assert sender.gate.next_timeout() == flow.next_timeout() < now + 10_000


def test_a_higher_priority_is_asked_for_at_once() -> None:
    """The low one is too long for the window, the high one is not."""
    flow = FlowController(0.0)
    sender = Sender(FlowGate({A.endpoint: flow}), batch_timeout=0.01)
    for number in range(9):
        sender.add(A, number, 0.0)
    sender.add(A, 9, 0.0, size=700)
    sender.add(A, 10, 0.0, priority=2)
    assert sender.poll(1.0) == list(range(10))
    assert sender.queue.next_flush() is None
    sender.add(A, 11, 1.0, priority=1, size=600)
    assert sender.queue.next_flush() is None, "as little room for it"
    sender.add(A, 12, 1.0, priority=0, size=500)
    assert sender.poll(1.0) == [12]
    assert flow.in_flight == 12_000


def test_what_finds_no_room_is_told_once_and_leaves_later() -> None:
    flow = FlowController(0.0)
    sender = Sender(FlowGate({A.endpoint: flow}))
    for number in range(3):
        sender.add(A, number, 0.0)
    assert sender.poll(0.0, {1: errno.ENOBUFS, 2: errno.EAGAIN}) == [0]
    assert flow.snapshot().overflow_packets == 2
    for attempt in range(1, 4):
        assert sender.poll(attempt * 0.002, {0: errno.ENOBUFS, 1: errno.EAGAIN}) == []
    assert flow.snapshot().overflow_packets == 2
    assert flow.in_flight == SIZE
    assert sender.poll(0.008) == [1, 2]
    assert flow.snapshot().sent_packets == 3
    # Another packet in the same buffer is another packet.
    sender.add(A, 3, 0.01)
    assert sender.poll(0.01, {0: errno.ENOBUFS}) == []
    assert flow.snapshot().overflow_packets == 3


def test_what_is_refused_for_itself_is_not_told() -> None:
    flow = FlowController(0.0)
    sender = Sender(FlowGate({A.endpoint: flow}))
    sender.add(A, 0, 0.0)
    sender.add(A, 1, 0.0)
    assert sender.poll(0.0, {0: errno.EMSGSIZE}) == [1]
    snapshot = flow.snapshot()
    assert (snapshot.sent_packets, snapshot.overflow_packets, snapshot.in_flight) == (1, 0, SIZE)


def test_only_the_last_is_limited_by_the_application() -> None:
    """Else the window would grow without being used (RFC 9002, 7.8), or not grow where it is."""

    class Told(FlowController):
        __slots__ = ("limited",)

        def __init__(self) -> None:
            self.limited: list[bool] = []
            super().__init__(0.0)

        def on_packet_sent(self, now: float, size: int, *, app_limited: bool = False) -> int:
            self.limited.append(app_limited)
            return super().on_packet_sent(now, size, app_limited=app_limited)

    flow = Told()
    sender = Sender(FlowGate({A.endpoint: flow}))
    for number in range(3):
        sender.add(A, number, 0.0)
    sender.poll(0.0)
    assert flow.limited == [False, False, True]
    for number in range(3, 20):
        sender.add(A, number, 0.0)
    sender.poll(0.0)
    assert flow.limited[3:] == [False] * 7, "more of them wait"


def test_an_empty_datagram_counts_as_a_byte() -> None:
    flow = FlowController(0.0)
    told: list[bytes] = []
    sender = Sender(FlowGate({A.endpoint: flow}, on_sent=lambda _e, _n, payload: told.append(bytes(payload))))
    assert sender.queue.add(A, b"", 0, 0.0)
    assert sender.poll(0.0) == [-1]
    assert (flow.in_flight, told) == (1, [b""])


def test_payloads_are_shown_read_only() -> None:
    views: list[memoryview] = []
    gate = FlowGate({A.endpoint: fixed()}, on_sent=lambda _e, _n, payload: views.append(payload))
    sender = Sender(gate)
    sender.add(A, 1, 0.0)
    sender.poll(0.0)
    with pytest.raises(TypeError, match="read-only"):
        views[0][0] = 1


class TestMadeOnFirstUse:
    def test_their_number_is_bounded_and_idle_ones_go_first(self) -> None:
        made: list[Endpoint] = []

        def make(endpoint: Endpoint, now: float) -> FlowController | None:
            made.append(endpoint)
            return None if endpoint[1] == 99 else FlowController(now)

        sender = Sender(FlowGate(make, kept=3))
        targets = [TARGETS["127.0.0.1", port] for port in (1, 2, 3, 4)]
        for target in targets[:3]:
            sender.add(target, 0, 0.0)
        sender.poll(0.0)
        sender.gate.acknowledged(targets[1].endpoint, [(0, 0)], 0.0, None, 0.1)
        sender.add(targets[3], 0, 0.2)
        sender.poll(0.2)
        assert [endpoint[1] for endpoint, _ in sender.gate.flows()] == [4, 3, 1], "the idle one is gone"
        sender.add(targets[1], 0, 0.3)
        sender.poll(0.3)
        assert [endpoint[1] for endpoint, _ in sender.gate.flows()] == [2, 4, 3], "none is idle: the oldest"
        sender.add(targets[2], 0, 0.4)
        sender.poll(0.4)
        assert [endpoint[1] for endpoint, _ in sender.gate.flows()] == [3, 2, 4], "used last"
        assert [endpoint[1] for endpoint in made] == [1, 2, 3, 4, 2]
        free = TARGETS["127.0.0.1", 99]
        for number in range(50):
            sender.add(free, number, 0.5)
        assert sender.poll(0.5) == list(range(50))
        assert sender.gate.find(free.endpoint) is None

    def test_what_waits_for_one_that_was_forgotten_is_looked_at(self) -> None:
        sender = Sender(FlowGate(lambda _, now: FlowController(now), kept=1))
        for number in range(12):
            sender.add(A, number, 0.0)
        assert len(sender.poll(0.0)) == 10
        sender.add(B, 0, 0.0)
        assert sender.poll(0.0) == [0]
        assert sender.gate.find(A.endpoint) is None
        woken: list[int] = []
        while len(woken) < 2:
            now = sender.wakes()
            assert now < 100.0
            for endpoint, _ in sender.gate.time_out(now):
                sender.queue.reconsider(endpoint, now)
            woken += sender.poll(now)
        assert woken == [10, 11]

    def test_an_acknowledgement_of_nobody_makes_none(self) -> None:
        gate = FlowGate(lambda _, now: FlowController(now))
        assert gate.acknowledged(A.endpoint, [(0, 0)], 0.0, None, 0.0) is None
        assert list(gate.flows()) == []

    def test_a_function_that_raises_leaves_everything_in_its_place(self) -> None:
        def make(endpoint: Endpoint, now: float) -> FlowController:
            if endpoint == B.endpoint and now < 5.0:
                raise RuntimeError("not yet")
            return FlowController(now)

        sender = Sender(FlowGate(make))
        for number in range(12):
            sender.add(A, number, 1.0)
        sender.add(B, 20, 1.0)
        with pytest.raises(RuntimeError):
            sender.poll(1.0)
        assert sender.queue.waiting == 13
        assert sender.poll(5.0) == [*range(10), 20]


def test_old_ones_give_their_buffers_back() -> None:
    """A peer that never answers does not keep the others from being sent to for longer than maximum_age."""
    flow = FlowController(0.0)
    sender = Sender(FlowGate({A.endpoint: flow}), buffers=64, maximum_age=0.5)
    for number in range(74):
        sender.add(A, number, 0.0)
        sender.poll(0.0)
    assert len(sender.queue.free) == 0
    assert not sender.queue.add(B, b"x", 1, 0.4)
    assert sender.queue.add(B, b"x", 1, 0.5)
    statistics = sender.queue.statistics()
    assert (statistics.expired, statistics.refused, statistics.balanced) == (64, 1, True)


class Stub(FlowController):
    """Whose timeout is what the test says."""

    __slots__ = ("timeout",)

    timeout: float

    def next_timeout(self) -> float:
        return self.timeout


def test_timers_are_bounded() -> None:
    """Acknowledgements that bring a timeout forward again and again."""
    flow = Stub(0.0)
    gate = FlowGate({A.endpoint: flow})
    for number in range(1000):
        flow.timeout = 2000.0 - number
        gate.acknowledged(A.endpoint, [], 0.0, None, 0.0)
        assert gate.next_timeout() == flow.timeout
        assert len(gate._timers) < 100
    flow.timeout = 3000.0
    assert gate.next_timeout() == 3000.0
    flow.timeout = math.inf
    assert gate.next_timeout() == math.inf
    assert gate.time_out(1e9) == []


def test_what_found_no_room_is_not_held_by_what_comes_after_it() -> None:
    """Nothing of the batch could be sent; the second packet is too long for the window, the first is not."""
    flow = fixed(max_in_flight=2)
    flow.on_packet_sent(0.0, 1100)
    sender = Sender(FlowGate({A.endpoint: flow}))
    sender.add(A, 0, 1.0, size=400)
    sender.add(A, 1, 1.0)
    assert sender.poll(1.0, {0: errno.EAGAIN}) == []
    assert sender.poll(1.002) == [0]
    assert sender.queue.next_flush() is None


def test_a_batch_stays_due_by_size_when_a_hold_changes() -> None:
    flow = fixed(1200.0)
    sender = Sender(FlowGate({A.endpoint: flow}), batch_size=4, batch_timeout=1.0)
    for number in range(12):
        sender.add(A, number, 0.0)
    assert sender.poll(1.0) == list(range(10))
    for number in range(4):
        sender.add(B, number, 1.0)
    assert sender.queue.next_flush() == 1.0
    flow.set_max_rate(1.0, 600.0)
    sender.queue.reconsider(A.endpoint, 1.0)
    assert sender.queue.next_flush() == 1.0
    assert sender.poll(1.0) == [0, 1, 2, 3]


def test_those_of_a_mapping_are_listed() -> None:
    flow = fixed()
    assert list(FlowGate({A.endpoint: flow}).flows()) == [(A.endpoint, flow)]


@pytest.mark.parametrize("seed", range(4))
def test_random_traffic_obeys_every_window_and_pace(seed: int) -> None:
    """Many peers with losses: each in its order, no more on its way than may be, all of it in the end."""
    print("seed", seed)
    rng = random.Random(seed)
    flows: dict[Endpoint, FlowController] = {}
    on_the_way: dict[Endpoint, list[tuple[float, int]]] = defaultdict(list)
    now = 0.0

    def on_sent(endpoint: Endpoint, number: int, payload: memoryview) -> None:
        flow = flows[endpoint]
        assert flow.in_flight <= max(flow.window, SIZE) or flow.snapshot().timeouts
        if rng.random() > 0.05:
            on_the_way[endpoint].append((now + 0.05, number))
        arrived[endpoint].append(int(bytes(payload).rstrip(b"\0")))

    def make(endpoint: Endpoint, at: float) -> FlowController:
        flows[endpoint] = FlowController(at, max_rate=rng.choice([None, 1e5, 1e6]))
        return flows[endpoint]

    arrived: dict[Endpoint, list[int]] = defaultdict(list)
    sender = Sender(FlowGate(make, on_sent=on_sent), buffers=256)
    targets = [TARGETS["127.0.0.1", port] for port in range(10, 20)]
    queued: Counter[Endpoint] = Counter()
    while sum(queued.values()) < 1500 or sender.queue.waiting:
        for _ in range(rng.randrange(20)):
            target = rng.choice(targets)
            if sum(queued.values()) < 1500 and sender.queue.free:
                sender.add(target, queued[target.endpoint], now, size=rng.randrange(4, SIZE + 1))
                queued[target.endpoint] += 1
        for endpoint, _ in sender.gate.time_out(now):
            sender.queue.reconsider(endpoint, now)
        for endpoint, sent in on_the_way.items():
            ready = [number for at, number in sent if at <= now]
            on_the_way[endpoint] = [(at, number) for at, number in sent if at > now]
            if ready:
                ranges = [(number, number) for number in sorted(ready, reverse=True)]
                sender.gate.acknowledged(endpoint, ranges, 0.0, None, now)
                sender.queue.reconsider(endpoint, now)
        sender.poll(now)
        assert sender.queue.statistics().balanced
        coming = [at for sent in on_the_way.values() for at, _ in sent]
        now = max(now + 1e-4, min([sender.wakes(), now + 0.01, *coming]))
        assert now < 600.0
    for endpoint, count in queued.items():
        assert arrived[endpoint] == list(range(count))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"flows": 7}, "flows is a mapping"),
        ({"on_sent": 7}, "on_sent is a function"),
        ({"on_timeout": "x"}, "on_timeout is a function"),
        ({"kept": 0}, "kept is a whole number"),
        ({"kept": 1.0}, "kept is a whole number"),
    ],
)
def test_wrong_options(options: dict[str, Any], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        FlowGate(**{"flows": {}, **options})
