# SPDX-License-Identifier: Apache-2.0
"""The sliding window: retransmission, giving up, back-pressure, credit; and streams over lossy networks."""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.flow_recorder import Recorder
from userspace.flow.controller import FlowController
from userspace.flow.ranges import ReceivedPackets
from userspace.flow.recovery import LOST_MAXIMUM, Outcome
from userspace.flow.window import PACKETS_MAXIMUM, PROBE, PROBE_MAXIMUM, ReorderBuffer, SlidingWindow
from xdp.errors import UsageError


def outcome(
    *, acknowledged: Sequence[int] = (), lost: Sequence[int] = (), spurious: Sequence[int] = ()
) -> Outcome:
    return Outcome(acknowledged, lost, spurious)


class Sender(SlidingWindow):
    """Sends whatever there is, packet after packet."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.sequences = itertools.count(100)

    def send(self, now: float = 0.0, *, probe: bool = False) -> list[tuple[int, bytes]]:
        sent: list[tuple[int, bytes]] = []
        while (one := self.next(now, probe=probe)) is not None:
            assert self.next(now, probe=probe) == one
            self.on_sent(one[0], next(self.sequences))
            sent.append(one)
            if probe:
                break
        return sent


def filled(*payloads: bytes, now: float = 0.0, **options: Any) -> Sender:
    sender = Sender(**options)
    for payload in payloads:
        assert sender.put(now, payload)
    return sender


# --- the sender's side


def test_messages_are_numbered_and_sent_once() -> None:
    sender = filled(b"a", b"b", b"c")
    assert (sender.queued, sender.queued_bytes) == (3, 3)
    assert sender.send() == [(0, b"a"), (1, b"b"), (2, b"c")]
    assert (sender.queued, sender.in_flight, sender.bytes_in_flight) == (0, 3, 3)
    assert sender.on_outcome(outcome(acknowledged=[101, 100, 7])) == [1, 0]
    assert (sender.in_flight, sender.bytes_in_flight, sender.delivered) == (1, 1, 2)
    assert sender.send() == []


def test_lost_ones_go_first_and_oldest_first() -> None:
    sender = filled(b"a", b"b", b"c", packets=3)
    sender.send()
    sender.put(0.0, b"d")
    assert sender.on_outcome(outcome(lost=[102, 100])) == []
    assert sender.next(0.0) == (0, b"a")
    assert sender.send() == [(0, b"a"), (2, b"c")]
    assert sender.retransmitted == 2
    assert sender.on_outcome(outcome(acknowledged=[101, 103, 104])) == [1, 0, 2]
    assert sender.send() == [(3, b"d")]


def test_a_late_packet_spares_the_retransmission() -> None:
    sender = filled(b"a", b"b")
    sender.send()
    sender.on_outcome(outcome(lost=[100]))
    assert sender.on_outcome(outcome(spurious=[100])) == [0]
    assert sender.send() == []
    assert sender.on_outcome(outcome(spurious=[100], acknowledged=[100], lost=[100])) == []


def test_late_packets_are_remembered_within_bounds() -> None:
    count = LOST_MAXIMUM + 10
    sender = filled(*[b"x"] * count, packets=count, queue_packets=count, credit=count)
    sender.send()
    sender.on_outcome(outcome(lost=range(100, 100 + count)))
    assert len(sender._late) == LOST_MAXIMUM
    assert len(sender.on_outcome(outcome(spurious=range(100, 100 + count)))) == LOST_MAXIMUM


def test_what_is_on_its_way_is_limited_in_messages_and_bytes() -> None:
    sender = filled(*[b"x" * 10] * 9, largest=10, packets=5, size=40)
    assert len(sender.send()) == 4
    sender.set_limits(size=1000)
    assert len(sender.send()) == 1
    sender.set_limits(packets=7)
    assert len(sender.send()) == 2
    sender.set_limits(packets=1)  # what is on its way stays
    sender.on_outcome(outcome(acknowledged=range(100, 106)))
    assert sender.send() == []
    sender.on_outcome(outcome(acknowledged=[106]))
    assert len(sender.send()) == 1


def test_the_queue_pushes_back() -> None:
    sender = filled(b"x" * 10, b"x" * 10, largest=10, queue_packets=3, queue_size=25)
    assert not sender.put(0.0, b"x" * 6)  # bytes
    assert sender.put(0.0, b"x" * 5)
    assert not sender.put(0.0, b"x")  # messages
    assert sender.refused == 2
    sender.send()
    assert sender.put(0.0, b"x")


def test_a_message_that_was_lost_too_late_is_given_up() -> None:
    sender = Sender()
    sender.put(0.0, b"first", deadline=1.0)
    sender.put(0.0, b"second", deadline=1.0)
    sender.put(0.0, b"third")
    sender.send()
    sender.on_outcome(outcome(lost=[100]))
    assert sender.send(0.5) == [(0, b"first")]
    sender.on_outcome(outcome(lost=[101, 102, 103]))
    assert sender.send(1.0) == [(0, b""), (1, b""), (2, b"third")]
    assert (sender.abandoned, sender.bytes_in_flight) == (2, 5)
    sender.on_outcome(outcome(lost=[104]))
    assert sender.send(2.0) == [(0, b"")]  # until it arrives
    assert sender.on_outcome(outcome(acknowledged=[107, 105, 106])) == [2]
    assert (sender.delivered, sender.in_flight) == (1, 0)


def test_attempts_are_counted() -> None:
    sender = Sender()
    sender.put(0.0, b"a", attempts=2)
    sender.send()
    sender.on_outcome(outcome(lost=[100]))
    assert sender.send() == [(0, b"a")]
    sender.on_outcome(outcome(lost=[101]))
    assert sender.send() == [(0, b"")]


def test_one_that_was_never_sent_in_time_gets_no_number() -> None:
    sender = Sender()
    assert sender.put(5.0, b"over", deadline=5.0)
    sender.put(5.0, b"soon over", deadline=6.0)
    sender.put(5.0, b"stays")
    assert sender.send(6.0) == [(0, b"stays")]
    assert (sender.expired, sender.queued_bytes) == (2, 0)


def test_a_probe_repeats_the_oldest() -> None:
    sender = filled(b"a", b"b")
    assert sender.send(probe=True) == [(0, b"a")]  # something new is as good
    assert sender.send(probe=True) == [(1, b"b")]
    assert sender.send(probe=True) == [(0, b"a")]
    sender.on_outcome(outcome(lost=[100]))  # the other copy is on its way still
    assert sender.send() == []
    sender.on_outcome(outcome(lost=[102]))
    assert sender.send() == [(0, b"a")]
    sender.on_outcome(outcome(acknowledged=[101, 103]))
    assert sender.send(probe=True) == []


def test_credit_is_kept_and_only_grows() -> None:
    sender = filled(*[b"x"] * 9, credit=2)
    assert len(sender.send()) == 2
    sender.on_credit(5)
    sender.on_credit(3)
    assert len(sender.send()) == 3
    sender.on_credit(1 << 200)
    assert sender._credit == 5 + PACKETS_MAXIMUM
    assert "credit up to" in repr(sender)


def test_without_credit_a_probe_leaves_now_and_then() -> None:
    sender = filled(b"a", b"b", credit=0)
    assert sender.next_probe == math.inf
    now, waits = 0.0, []
    sequence = 100
    for _ in range(9):
        assert sender.send(now) == []
        waits.append(sender.next_probe - now)
        assert sender.send(math.nextafter(sender.next_probe, 0)) == []
        now = sender.next_probe
        assert sender.send(now) == [(0, b"a")]
        assert sender.send(now + 1000) == []  # it is on its way
        sender.on_outcome(outcome(lost=[sequence]))
        sequence += 1
    assert waits == pytest.approx([min(PROBE * 2**count, PROBE_MAXIMUM) for count in range(9)])
    sender.on_credit(1)
    assert sender.send(now) == [(0, b"a")]
    sender.on_outcome(outcome(acknowledged=[sequence]))
    assert sender.send(now) == []
    assert sender.next_probe == now + PROBE


@pytest.mark.parametrize(
    "wrong",
    [{"largest": 0}, {"packets": 0}, {"size": 10}, {"queue_packets": 0}, {"queue_size": 1}, {"credit": -1}],
)
def test_settings_are_checked(wrong: dict[str, int]) -> None:
    with pytest.raises(UsageError, match=f"{next(iter(wrong))} is a whole number"):
        SlidingWindow(**wrong)


def test_messages_are_checked() -> None:
    sender = filled(b"a", largest=10)
    for payload in (b"", b"x" * 11):
        with pytest.raises(UsageError, match="1 to 10 bytes"):
            sender.put(0.0, payload)
    with pytest.raises(UsageError, match="attempts is a whole number"):
        sender.put(0.0, b"x", attempts=0)
    with pytest.raises(UsageError, match="deadline"):
        sender.put(0.0, b"x", deadline=math.nan)
    for number in (1, -1, 7):
        with pytest.raises(UsageError, match="not the one that next"):
            sender.on_sent(number, 1)


# --- the receiver's side


def test_messages_are_read_in_order() -> None:
    buffer = ReorderBuffer()
    assert [buffer.receive(number, b"%d" % number) for number in (1, 0, 3)] == [True, True, True]
    assert (buffer.readable, buffer.buffered, buffer.buffered_bytes) == (2, 3, 3)
    assert buffer.read(1) == [b"0"]
    assert buffer.receive(2, b"2")
    assert buffer.read() == [b"1", b"2", b"3"]
    assert (buffer.buffered, buffer.buffered_bytes, buffer.wanted) == (0, 0, 4)
    assert "next is 4" in repr(buffer)


def test_received_duplicates_are_told_apart_from_refused() -> None:
    buffer = ReorderBuffer(packets=4)
    assert [buffer.receive(number, b"x") for number in (0, 2, 0, 2, 4, -1)] == [True] * 4 + [False] * 2
    assert (buffer.received, buffer.duplicates, buffer.refused) == (2, 2, 2)
    assert buffer.read() == [b"x"]
    assert buffer.receive(4, b"x")
    assert not buffer.receive(3, b"x" * 1201)
    assert not buffer.receive(1 << 100, b"x")


def test_an_empty_message_is_skipped() -> None:
    buffer = ReorderBuffer(packets=4)
    for number, payload in ((1, b""), (2, b"c"), (0, b"a")):
        assert buffer.receive(number, payload)
    assert buffer.read() == [b"a", b"c"]
    assert (buffer.skipped, buffer.wanted, buffer.credit) == (1, 3, 7)


def test_whatever_the_credit_allows_fits() -> None:
    buffer = ReorderBuffer(largest=100, packets=50, size=1000)
    assert buffer.credit == 10
    for number in range(9, -1, -1):
        buffer.receive(number, b"x")
    assert buffer.credit == 10 + (1000 - 10) // 100
    buffer.read()
    assert buffer.credit == 20


def test_credit_is_told_when_it_is_worth_it() -> None:
    buffer = ReorderBuffer(packets=10)
    assert (buffer.credit_due, buffer.take_credit()) == (True, 10)
    for number in range(10):
        buffer.receive(number, b"x")
    due = []
    for _ in range(6):
        buffer.read(1)
        due.append(buffer.credit_due)
    assert due == [False] * 5 + [True]
    assert buffer.take_credit() == 16
    assert not buffer.receive(16, b"x")
    assert (buffer.credit_due, buffer.take_credit()) == (True, 16)  # the sender may not know
    assert (buffer.credit_due, buffer.take_credit()) == (False, 16)


def test_limits_may_change_but_promises_hold() -> None:
    buffer = ReorderBuffer(largest=100, packets=10, size=1000)
    buffer.set_limits(packets=2, size=200)
    assert buffer.credit == 10
    assert buffer.receive(9, b"x" * 100)
    buffer.set_limits(packets=20)
    assert buffer.credit == 10
    buffer.set_limits(size=10_000)
    assert buffer.credit == 20
    for wrong in ({"packets": 0}, {"size": 99}):
        with pytest.raises(UsageError):
            buffer.set_limits(**wrong)


@given(
    st.lists(st.tuples(st.integers(0, 25) | st.integers(), st.integers(0, 12)), max_size=80),
    st.integers(1, 20),
    st.integers(10, 60),
)
def test_a_buffer_never_holds_more_than_it_may(
    events: list[tuple[int, int]], packets: int, size: int
) -> None:
    buffer = ReorderBuffer(largest=10, packets=packets, size=size)
    credit, wanted = 0, 0
    for number, length in events:
        if length == 12:
            buffer.read(2)
        else:
            buffer.receive(number, b"x" * length)
        assert buffer.buffered_bytes <= size
        assert buffer.buffered <= packets
        assert buffer.buffered_bytes == sum(map(len, [*buffer._ready, *buffer._ahead.values()]))
        assert buffer.credit >= credit
        assert buffer.wanted >= wanted
        credit, wanted = buffer.credit, buffer.wanted


# --- streams: both sides, FlowController and a network in virtual time


class Network:
    """One way of a path: delay, jitter and loss, both seeded."""

    def __init__(self, rng: random.Random, loss: float, jitter: float) -> None:
        self.rng, self.loss, self.jitter = rng, loss, jitter
        self.under_way: list[tuple[float, int, Any]] = []
        self.count = itertools.count()

    def send(self, now: float, packet: Any) -> None:
        if self.rng.random() >= self.loss:
            at = now + 0.02 + self.rng.random() * self.jitter
            heapq.heappush(self.under_way, (at, next(self.count), packet))

    @property
    def next_at(self) -> float:
        return self.under_way[0][0] if self.under_way else math.inf


class Stream:
    """A sender and a receiver that are run until everything is decided."""

    def __init__(self, seed: int, *, loss: float, jitter: float, buffer: int, reads_every: float) -> None:
        rng = random.Random(seed)
        self.now = 0.0
        self.there, self.back = Network(rng, loss, jitter), Network(rng, loss, jitter)
        self.window = SlidingWindow(largest=100, packets=64, size=6400, credit=0, queue_packets=32)
        congestion = Recorder()
        congestion.window = 20 * 100
        self.flow = FlowController(0.0, mtu=508, congestion=lambda _now, _mtu, _seed: congestion)
        self.received = ReceivedPackets(max_ack_delay=0.01)
        self.buffer = ReorderBuffer(largest=100, packets=buffer, size=100 * buffer)
        self.reads_every, self.reads_at = reads_every, 0.0
        self.got: list[bytes] = []

    def feed(self, outcome: Outcome) -> None:
        self.window.on_outcome(outcome)
        if outcome.probe:
            self.transmit(probe=True)

    def transmit(self, *, probe: bool = False) -> None:
        while probe or self.flow.can_send(self.now, 100):
            one = self.window.next(self.now, probe=probe)
            if one is None:
                return
            sequence = self.flow.on_packet_sent(self.now, 10 + len(one[1]))
            self.window.on_sent(one[0], sequence)
            self.there.send(self.now, (sequence, *one))
            probe = False

    def arrive(self) -> None:
        while self.there.next_at <= self.now:
            sequence, number, payload = heapq.heappop(self.there.under_way)[2]
            if self.buffer.receive(number, payload):
                self.received.add(self.now, sequence)
        if self.now >= self.reads_at:
            self.got += self.buffer.read(8)
            self.reads_at = self.now + self.reads_every
        if self.now >= self.received.ack_due_at or self.buffer.credit_due:
            self.back.send(self.now, (self.received.take_ack(self.now), self.buffer.take_credit()))
        while self.back.next_at <= self.now:
            ack, credit = heapq.heappop(self.back.under_way)[2]
            self.window.on_credit(credit)
            if ack is not None:
                self.feed(self.flow.on_ack_received(self.now, ack.ranges, ack.delay, ack.ce_count))

    def run(self, messages: list[tuple[bytes, float | None, int | None]], until: float = 3000.0) -> None:
        waiting = iter(messages)
        one = next(waiting, None)
        while one is not None or self.window.queued or self.window.in_flight or self.buffer.buffered:
            assert self.now < until, f"{self.window} {self.buffer} {self.flow}"
            self.arrive()
            while one is not None and self.window.put(self.now, one[0], deadline=one[1], attempts=one[2]):
                one = next(waiting, None)
            self.transmit()
            if self.now >= self.flow.next_timeout():
                self.feed(self.flow.on_timeout(self.now))
            paced = self.flow.next_send_time(self.now, 100) if self.window.next(self.now) else math.inf
            times = (
                paced,
                self.there.next_at,
                self.back.next_at,
                self.received.ack_due_at,
                self.flow.next_timeout(),
                self.window.next_probe,
                self.reads_at if self.buffer.readable else math.inf,
            )
            assert min(times) < math.inf or not (self.window.queued or self.window.in_flight or one)
            self.now = max(self.now + 1e-6, min(times))


@given(
    seed=st.integers(0, 1 << 32),
    loss=st.sampled_from([0.0, 0.02, 0.3]),
    jitter=st.sampled_from([0.0, 0.001, 0.05]),
    buffer=st.sampled_from([1, 3, 50]),
    reads_every=st.sampled_from([0.0, 0.2]),
)
@settings(max_examples=50, deadline=None)
def test_everything_arrives_in_order(
    seed: int, loss: float, jitter: float, buffer: int, reads_every: float
) -> None:
    stream = Stream(seed, loss=loss, jitter=jitter, buffer=buffer, reads_every=reads_every)
    messages = [b"%04d" % number * (1 + number % 20) for number in range(120)]
    stream.run([(message, None, None) for message in messages])
    assert stream.got == messages
    assert stream.window.delivered == len(messages)
    assert stream.buffer.refused == 0 or buffer < 50


@given(seed=st.integers(0, 1 << 32), buffer=st.sampled_from([2, 50]))
@settings(max_examples=40, deadline=None)
def test_what_is_not_worth_it_is_skipped(seed: int, buffer: int) -> None:
    rng = random.Random(seed)
    stream = Stream(seed, loss=0.3, jitter=0.01, buffer=buffer, reads_every=0.0)
    messages: list[tuple[bytes, float | None, int | None]] = []
    for number in range(150):
        deadline = rng.choice([None, rng.random() * 10])
        messages.append((b"%04d" % number, deadline, rng.choice([None, 1, 2])))
    stream.run(messages)
    window = stream.window
    assert window.delivered + window.abandoned + window.expired == len(messages)
    assert stream.got == sorted(stream.got)
    # A message may have arrived and been given up all the same: nobody acknowledged it in time.
    assert window.delivered <= len(stream.got) <= len(messages) - window.expired
    for payload, deadline, attempts in messages:
        if deadline is None and attempts is None:
            assert payload in stream.got
