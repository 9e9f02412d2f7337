# SPDX-License-Identifier: Apache-2.0
"""FlowController behind aioquic's recovery: what it is told of packets, acknowledgements, losses and time."""

from __future__ import annotations

import math

import pytest
from aioquic.quic.packet import QuicPacketType
from aioquic.quic.packet_builder import QuicSentPacket
from aioquic.quic.rangeset import RangeSet
from aioquic.quic.recovery import QuicPacketSpace
from aioquic.tls import Epoch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from userspace.connection.quic_congestion import NAME, FlowCongestion, take_over
from userspace.connection.quic_library import Library, QuicConfiguration
from userspace.flow.congestion import initial_window
from userspace.flow.controller import FlowController
from userspace.flow.recovery import Outcome

SIZE = 1200


class Recovery:
    """aioquic's recovery of a client's connection, with packets of the handshake and of the application."""

    def __init__(self, **options: object) -> None:
        self.library = Library(configuration=QuicConfiguration(congestion_control_algorithm=NAME))
        self.flow = FlowController(0.0, **options)  # type: ignore[arg-type]
        self.congestion: FlowCongestion = take_over(self.library, self.flow)
        self.recovery = self.library._loss
        self.handshake, self.space = QuicPacketSpace(), QuicPacketSpace(is_application_data=True)
        self.recovery.spaces = [self.handshake, self.space]
        self.recovery.peer_completed_address_validation = True
        self.number = 0
        self.probes = 0
        self.library._send_probe = self._probe  # type: ignore[method-assign]
        self.recovery._send_probe = self._probe
        self.congestion.settle(0.0)

    def _probe(self) -> None:
        self.probes += 1

    def send(self, now: float, *, size: int = SIZE, epoch: Epoch = Epoch.ONE_RTT) -> int:
        application = epoch is Epoch.ONE_RTT
        packet = QuicSentPacket(
            epoch=epoch,
            in_flight=True,
            is_ack_eliciting=True,
            is_crypto_packet=not application,
            packet_number=self.number,
            packet_type=QuicPacketType.ONE_RTT if application else QuicPacketType.HANDSHAKE,
            sent_time=now,
            sent_bytes=size,
        )
        self.number += 1
        self.recovery.on_packet_sent(packet=packet, space=self.space if application else self.handshake)
        return packet.packet_number

    def ack(self, now: float, *numbers: int, delay: float = 0.0, handshake: bool = False) -> None:
        self.recovery.on_ack_received(
            ack_rangeset=RangeSet([range(number, number + 1) for number in sorted(numbers)]),
            ack_delay=delay,
            now=now,
            space=self.handshake if handshake else self.space,
        )
        self.congestion.settle(now)

    def confirm(self) -> None:
        self.recovery.handshake_confirmed = True
        self.recovery.discard_space(self.handshake)
        self.congestion.settle(0.0)


def test_the_window_is_that_of_flow_controller() -> None:
    path = Recovery()
    assert path.recovery.congestion_window == path.flow.window == initial_window(SIZE)
    path.congestion.app_limited = False
    numbers = [path.send(0.0) for _ in range(10)]
    path.ack(0.1, *numbers)
    assert path.recovery.congestion_window == path.flow.window > initial_window(SIZE)
    assert path.recovery.bytes_in_flight == path.flow.in_flight == 0
    assert path.flow.snapshot().acknowledged_packets == 10


def test_acknowledgements_are_told_at_once_and_with_their_delay() -> None:
    path = Recovery()
    path.ack(0.1, path.send(0.0))
    assert path.flow.smoothed_rtt == pytest.approx(0.1)
    path.ack(1.12, path.send(1.0), delay=0.02)
    assert path.flow.smoothed_rtt == pytest.approx(0.1)
    assert path.flow.min_rtt == pytest.approx(0.1)


def test_an_old_packet_gives_no_round_trip_time() -> None:
    """RFC 9002, 5.1: only the largest that an acknowledgement names."""
    path = Recovery()
    old, new = path.send(0.0), path.send(0.0)
    path.ack(0.1, new)
    path.ack(0.9, old, new)
    assert path.flow.snapshot().latest_rtt == pytest.approx(0.1)
    assert path.flow.snapshot().acknowledged_packets == 2


def test_the_handshake_measures_and_is_not_counted() -> None:
    path = Recovery()
    number = path.send(0.0, epoch=Epoch.HANDSHAKE)
    assert path.recovery.bytes_in_flight == 0  # until the next call
    path.congestion.settle(0.0)
    assert path.recovery.bytes_in_flight == SIZE
    assert path.flow.in_flight == 0
    path.ack(0.05, number, handshake=True)
    assert path.recovery.bytes_in_flight == 0
    assert path.flow.smoothed_rtt == pytest.approx(0.05)
    assert path.flow.snapshot().sent_packets == 0


def test_the_handshake_is_forgotten_with_its_keys_and_when_it_is_lost() -> None:
    path = Recovery()
    numbers = [path.send(0.0, epoch=Epoch.HANDSHAKE) for _ in range(5)]
    path.ack(0.05, numbers[-1], handshake=True)
    assert path.recovery.bytes_in_flight == 2 * SIZE  # two are not overtaken by three
    window = path.flow.window
    path.confirm()
    assert path.recovery.bytes_in_flight == 0
    assert path.flow.window == window  # none of that was congestion


def test_what_is_lost_is_lost_for_both() -> None:
    path = Recovery()
    numbers = [path.send(0.0) for _ in range(10)]
    path.ack(0.1, *numbers[3:])
    assert path.flow.snapshot().lost_packets == 3
    assert path.recovery.bytes_in_flight == path.flow.in_flight == 0
    assert path.flow.window < initial_window(SIZE)


class Counting(FlowController):
    """Counts the packets whose loss it had to be told of."""

    told = 0

    def on_packet_lost(self, now: float, sequence: int) -> Outcome:
        outcome = super().on_packet_lost(now, sequence)
        self.told += len(outcome.lost)
        return outcome


def test_losses_of_one_acknowledgement_are_one_event() -> None:
    """It has seen the acknowledgement before it is told what aioquic makes of it."""
    path = Recovery()
    flow = Counting(0.0)
    path.congestion.restart(flow)
    path.congestion.settle(0.0)
    numbers = [path.send(0.0) for _ in range(10)]
    path.ack(0.1, *numbers[3:])
    assert flow.snapshot().lost_packets == 3
    assert flow.told == 0


def test_what_aioquic_finds_lost_by_time_is_lost() -> None:
    path = Recovery()
    path.confirm()
    first, second = path.send(0.0), path.send(0.0)
    path.ack(0.1, second)
    assert path.flow.in_flight == SIZE
    at = path.recovery.get_loss_detection_time(amplification_limited=False)
    assert at is not None
    path.recovery.on_loss_detection_timeout(now=at + 1e-6)
    path.congestion.settle(at + 1e-6)
    assert path.flow.snapshot().lost_packets == 1
    assert path.flow.in_flight == 0
    path.ack(1.0, first)  # aioquic does not know it any more
    assert path.flow.snapshot().spurious_packets == 0


def test_a_probe_timeout_is_no_loss() -> None:
    path = Recovery()
    path.confirm()
    numbers = [path.send(0.0) for _ in range(5)]
    at = path.recovery.get_loss_detection_time(amplification_limited=False)
    assert at is not None
    path.recovery.on_loss_detection_timeout(now=at)
    path.congestion.on_timer(at)
    path.congestion.settle(at)
    assert path.probes == 1
    assert path.flow.in_flight == 5 * SIZE
    assert path.flow.snapshot().lost_packets == 0
    path.ack(at + 0.01, *numbers[1:])  # overtaken by four
    assert path.flow.snapshot().lost_packets == 1
    assert path.flow.in_flight == 0


def test_a_probe_may_leave_beyond_the_window() -> None:
    path = Recovery()
    for _ in range(10):
        path.send(0.0)
    path.congestion.settle(0.0)
    assert path.recovery.congestion_window == path.recovery.bytes_in_flight
    path.congestion.allowance = SIZE
    path.congestion.settle(0.0)
    assert path.recovery.congestion_window == path.recovery.bytes_in_flight + SIZE
    assert path.congestion.hold(0.0) is None
    path.congestion.allowance = 0
    path.congestion.settle(0.0)
    assert path.recovery.congestion_window == path.recovery.bytes_in_flight


def test_the_pacer_lets_a_burst_pass_and_then_one_after_the_other() -> None:
    path = Recovery()
    path.ack(0.1, path.send(0.0))
    pacer = path.recovery._pacer
    now, passed = 0.1, 0
    path.congestion.settle(now)
    while (at := path.congestion.hold(now)) is None and passed < 100:
        pacer.update_after_send(now)
        passed += 1
    assert 8 <= passed <= 11
    assert at is not None
    assert at > now
    for _ in range(passed):
        path.send(now)
    path.congestion.settle(now)
    # The window is full: aioquic is to decide, who has acknowledgements and probes to send.
    assert path.congestion.hold(now) is None
    pacer.update_rate(congestion_window=1, smoothed_rtt=1.0)  # nobody's business


def test_what_is_sent_again_is_paced_as_well() -> None:
    """The window is open, and a burst has left."""
    path = Recovery()
    path.congestion.app_limited = False
    for now in (0.0, 0.1, 0.2):
        path.congestion.settle(now)
        path.ack(now + 0.1, *[path.send(now) for _ in range(10)])
    for _ in range(12):
        path.send(0.3)
    path.congestion.settle(0.3)
    assert path.recovery.congestion_window > path.recovery.bytes_in_flight + 2 * SIZE
    at = path.recovery._pacer.next_send_time(0.3)
    assert at is not None
    assert 0.3 < at < 0.4


def test_more_packets_than_can_be_kept_account_of_wait() -> None:
    path = Recovery(max_in_flight=16)
    for _ in range(16):
        path.send(0.0, size=20)
    path.congestion.settle(0.0)
    assert path.congestion.hold(0.0) == math.inf
    path.congestion.allowance = SIZE  # but for a probe
    assert path.congestion.hold(0.0) is None
    number = path.send(0.0, size=20)
    assert path.flow.snapshot().sent_packets == 16
    path.ack(0.1, *range(number + 1))
    assert path.flow.in_flight == 0


def test_another_path_begins_anew() -> None:
    path = Recovery()
    numbers = [path.send(0.0) for _ in range(5)]
    fresh = FlowController(1.0)
    path.congestion.restart(fresh)
    path.congestion.settle(1.0)
    assert path.recovery.bytes_in_flight == 0
    more = [path.send(1.2) for _ in range(6)]
    path.ack(1.21, *numbers)
    assert fresh.snapshot().acknowledged_packets == 0
    assert fresh.min_rtt == 0.0
    assert path.recovery.bytes_in_flight == 6 * SIZE
    path.ack(1.25, *more)
    assert fresh.min_rtt == pytest.approx(0.05)
    assert path.recovery.bytes_in_flight == 0


class Anything(RuleBasedStateMachine):
    """Packets, acknowledgements of any of them, timers and time: both count the same."""

    def __init__(self) -> None:
        super().__init__()
        self.path = Recovery()
        self.path.confirm()
        self.now = 0.0
        self.sent: list[int] = []

    @rule(seconds=st.sampled_from([0.0, 0.0005, 0.02, 0.5, 3.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(count=st.integers(1, 8), size=st.sampled_from([30, SIZE]))
    def send(self, count: int, size: int) -> None:
        self.path.congestion.settle(self.now)
        self.sent.extend(self.path.send(self.now, size=size) for _ in range(count))

    @precondition(lambda self: self.sent)
    @rule(data=st.data(), delay=st.sampled_from([0.0, 0.01, 1.0]))
    def ack(self, data: st.DataObject, delay: float) -> None:
        first = data.draw(st.integers(0, self.sent[-1]))
        last = data.draw(st.integers(first, self.sent[-1]))
        self.path.ack(self.now, *range(first, last + 1), delay=delay)

    @rule()
    def timer(self) -> None:
        at = self.path.recovery.get_loss_detection_time(amplification_limited=False)
        if at is not None and at <= self.now:
            self.path.recovery.on_loss_detection_timeout(now=self.now)
            self.path.congestion.on_timer(self.now)

    @invariant()
    def both_count_the_same(self) -> None:
        path = self.path
        path.congestion.settle(self.now)
        flow, here = path.flow, path.space.sent_packets
        told = flow.snapshot()
        assert told.sent_packets == len(self.sent)
        assert set(path.congestion._numbers) == set(here)
        assert told.packets_in_flight + told.acknowledged_packets + told.lost_packets == told.sent_packets
        assert told.spurious_packets <= told.lost_packets
        assert (
            path.recovery.bytes_in_flight
            == told.in_flight
            == told.sent_bytes - told.delivered_bytes - (flow._recovery.lost_bytes)
        )
        # It may know that one is lost before aioquic does, and keeps what a timeout has given up.
        assert len(here) <= told.packets_in_flight + told.lost_packets
        assert path.recovery.congestion_window >= 2 * SIZE


TestAnything = Anything.TestCase
TestAnything.settings = settings(max_examples=30, stateful_step_count=40, deadline=None)
