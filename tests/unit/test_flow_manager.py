# SPDX-License-Identifier: Apache-2.0
"""The batch manager with flow control, over kernel sockets of both kinds, on loopback."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from tests.unit.socket_backends import DEADLINE, Open, backend, open_lanes, port
from userspace.datagram.batch_manager import UDPBatchManager
from userspace.datagram.destination import Endpoint
from userspace.datagram.flow_gate import FlowGate
from userspace.flow.controller import FlowController
from userspace.flow.recovery import Outcome
from xdp.errors import UsageError

__all__ = ["backend", "open_lanes", "port"]  # fixtures: in use, though only as arguments


class Clock:
    """Stands still unless told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def receivers() -> Iterator[list[socket.socket]]:
    with ExitStack() as stack:
        made = []
        for _ in range(2):
            sock = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            sock.bind(("127.0.0.1", 0))
            sock.settimeout(DEADLINE)
            made.append(sock)
        yield made


def name(sock: socket.socket) -> Endpoint:
    host, number = sock.getsockname()[:2]
    return host, number


def arrived(sock: socket.socket) -> list[bytes]:
    """On loopback a datagram has arrived when the call that sent it returns."""
    found = []
    sock.setblocking(False)
    try:
        while True:
            found.append(sock.recv(2000).rstrip(b"\0"))
    except BlockingIOError:
        return found


def numbered(number: int) -> bytes:
    return (b"%d" % number).ljust(1200, b"\0")


def texts(*numbers: int) -> list[bytes]:
    return [b"%d" % number for number in numbers]


def test_a_full_window_holds_one_peer_and_not_the_other(
    open_lanes: Open, receivers: list[socket.socket], clock: Clock
) -> None:
    slow, free = map(name, receivers)
    told: list[tuple[Endpoint, int, bytes]] = []
    outcomes: list[tuple[Endpoint, Outcome]] = []

    def on_timeout(endpoint: Endpoint, outcome: Outcome) -> None:
        outcomes.append((endpoint, outcome))
        manager.queue_packet(free, b"may use the manager")

    gate = FlowGate(
        lambda endpoint, now: FlowController(now) if endpoint == slow else None,
        on_sent=lambda endpoint, number, payload: told.append((endpoint, number, bytes(payload[:2]))),
        on_timeout=on_timeout,
    )
    with UDPBatchManager(open_lanes(), clock=clock, batch_size=16, maximum_age=60.0, flows=gate) as manager:
        assert manager.flows is gate
        for number in range(20):
            assert manager.queue_packet(slow, numbered(number))
            assert manager.queue_packet(free, numbered(number))
        manager.flush_batches()
        assert arrived(receivers[0]) == texts(*range(10))
        assert arrived(receivers[1]) == texts(*range(20))
        assert len(manager) == 10
        assert [(endpoint, number) for endpoint, number, _ in told] == [
            (slow, number) for number in range(10)
        ]
        assert told[3][2] == b"3\0"
        flow = gate.find(slow)
        assert flow is not None
        # Nothing is due before the timeout, whatever is asked.
        assert manager.next_flush() == flow.next_timeout() > clock.now
        assert manager.poll() == 0
        assert manager.flush_batches() == 0
        clock.now += 0.1
        outcome = manager.acknowledged(slow, [(0, 1)], 0.01)
        assert outcome is not None
        assert sorted(outcome.acknowledged) == [0, 1]
        assert manager.next_flush() == 100.005, "past: at once"
        assert manager.poll() == 4
        assert arrived(receivers[0]) == texts(10, 11, 12, 13)
        assert manager.acknowledged(free, [(0, 1)]) is None
        timeout = manager.next_flush()
        assert timeout is not None
        clock.now = timeout
        manager.poll()
        assert arrived(receivers[0]) == texts(14), "a probe"
        ((endpoint, outcome),) = outcomes
        assert (endpoint, outcome.probe) == (slow, True)
        assert manager.statistics().balanced
        assert len(manager) == 5
    assert arrived(receivers[1]) == [b"may use the manager"]
    assert manager.statistics().failures == {11: 5}


def test_paced_by_polling_at_next_flush(
    open_lanes: Open, receivers: list[socket.socket], clock: Clock
) -> None:
    to = name(receivers[0])
    flows = {to: FlowController(clock.now, adaptive=False, max_rate=1_200_000)}
    with UDPBatchManager(open_lanes(), clock=clock, flows=flows) as manager:
        for number in range(40):
            manager.queue_packet(to, numbered(number))
        clock.now += 0.005
        sent = manager.poll()
        assert 9 <= sent <= 11
        while len(manager):
            due = manager.next_flush()
            assert due is not None
            assert clock.now < due < clock.now + 0.003
            clock.now = due
            assert 1 <= manager.poll() <= 2
        assert arrived(receivers[0]) == texts(*range(40))
        assert 0.027 < clock.now - 100.005 < 0.032
        assert manager.statistics().delay_maximum_us > 25_000


def test_the_receiver_loop_sends_what_is_paced(open_lanes: Open, receivers: list[socket.socket]) -> None:
    """By the clock of the machine: it wakes for each release and sends all."""
    to = name(receivers[0])
    with UDPBatchManager(
        open_lanes(), flows=lambda _, now: FlowController(now, adaptive=False, max_rate=1_000_000)
    ) as manager:
        for number in range(40):
            manager.queue_packet(to, numbered(number))
        while len(manager):
            manager.receive_batch(timeout=0.05).release()
        assert arrived(receivers[0]) == texts(*range(40))
        assert manager.statistics().attempts["retry"] >= 5


def test_on_sent_may_not_use_the_manager(
    open_lanes: Open, receivers: list[socket.socket], clock: Clock
) -> None:
    to = name(receivers[0])
    calls: list[Any] = []

    def on_sent(_endpoint: Endpoint, _number: int, _payload: memoryview) -> None:
        calls.pop()()

    gate = FlowGate({to: FlowController(clock.now)}, on_sent=on_sent)
    manager = UDPBatchManager(open_lanes(), clock=clock, flows=gate)
    for call in (
        lambda: manager.queue_packet(to, b""),
        manager.flush_batches,
        manager.poll,
        lambda: manager.acknowledged(to, []),
        manager.close,
    ):
        calls.append(call)
        manager.queue_packet(to, b"x")
        with pytest.raises(UsageError, match="on_sent may not use"):
            manager.flush_batches()
        assert manager.statistics().balanced
        assert len(manager) == 0
    calls.append(lambda: None)
    manager.queue_packet(to, b"x")
    assert manager.close() == ()
    with pytest.raises(ValueError, match="closed"):
        manager.acknowledged(to, [])
    assert len(arrived(receivers[0])) == 6


def test_an_address_in_another_form(open_lanes: Open, receivers: list[socket.socket], clock: Clock) -> None:
    from ipaddress import ip_address

    to = name(receivers[0])
    flow = FlowController(clock.now)
    with UDPBatchManager(open_lanes(), clock=clock, flows={to: flow}) as manager:
        other: Any = (ip_address(to[0]), to[1])
        manager.queue_packet(other, b"x")
        manager.flush_batches()
        assert flow.in_flight == 1
        clock.now += 0.01
        assert manager.acknowledged(other, [(0, 0)]) is not None
        assert flow.in_flight == 0


@pytest.mark.parametrize(
    "wrong", [["127.0.0.1", 9], [("127.0.0.1", 9)]], ids=["a list", "a list of one"]
)  # fmt: skip
def test_wrong_uses(open_lanes: Open, wrong: Any) -> None:
    lanes = open_lanes()
    with UDPBatchManager(lanes) as manager:
        assert manager.flows is None
        with pytest.raises(UsageError, match="for flow control"):
            manager.acknowledged(("127.0.0.1", 9), [])
    with UDPBatchManager(lanes, flows={}) as manager:
        with pytest.raises(UsageError, match="tuple"):
            manager.acknowledged(wrong, [])
        assert manager.acknowledged(("127.0.0.1", 9), [(0, 0)]) is None
    with pytest.raises(UsageError, match="flows is a mapping"):
        UDPBatchManager(lanes, flows=wrong)
