# SPDX-License-Identifier: Apache-2.0
"""One behaviour, two backends: sending, several ports, what is closed and what is wrong."""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable

import pytest
from typing_extensions import Buffer

from tests.unit.socket_backends import (
    DEADLINE,
    VOTES,
    Lanes,
    Open,
    Sender,
    backend,
    collect,
    free_port,
    make_policy,
    open_lanes,
    port,
)
from userspace.datagram.sockets import ServiceSocket, open_service_sockets
from xdp.errors import InterfaceGoneError, UsageError

__all__ = ["backend", "open_lanes", "port"]  # fixtures: in use, though only as arguments


def test_what_the_kernel_refuses_is_skipped(open_lanes: Open, port: int) -> None:
    lanes = open_lanes()
    with Sender(port) as receiver:
        payloads: list[Buffer] = [b"a", b"b" * 70_000, b"c", bytearray(b"d"), memoryview(b"e"), b"f" * 66_000]
        assert lanes.send(receiver.name, payloads) == 4
        assert [(failure.index, failure.errno) for failure in lanes.failures] == [
            (1, errno.EMSGSIZE),
            (5, errno.EMSGSIZE),
        ]
        receiver.sock.settimeout(DEADLINE)
        assert [receiver.sock.recv(100) for _ in range(4)] == [b"a", b"c", b"d", b"e"]
        assert lanes.send(receiver.name, [b"x"] * 300) == 300
        assert lanes.failures == ()
        name = receiver.sock.recvfrom(10)[1]
        assert name[1] == port
    statistics = lanes.statistics()
    assert (statistics.sent, statistics.send_failed) == (304, 2)


def test_six_from_a_four_socket_fails_by_index(open_lanes: Open, port: int) -> None:
    sockets = open_service_sockets([port], host="127.0.0.1")
    lanes = open_lanes(sockets=sockets)
    assert lanes.send(("::1", 9), [b"a", b"b"]) == 0
    assert [failure.errno for failure in lanes.failures] == [errno.EAFNOSUPPORT] * 2


def test_errors_of_earlier_datagrams_stop_nothing(open_lanes: Open, port: int) -> None:
    lanes = open_lanes(sockets=open_service_sockets([port], host="127.0.0.1"))
    closed = free_port()
    with Sender(port) as receiver:
        for _ in range(20):
            assert lanes.send(("127.0.0.1", closed), [b"nobody there"]) == 1
            assert lanes.send(receiver.name, [b"1", b"2"]) == 2
        receiver.sock.settimeout(DEADLINE)
        assert [receiver.sock.recv(10) for _ in range(40)] == [b"1", b"2"] * 20
        assert lanes.statistics().asynchronous_errors > 0
        assert lanes.send(("127.0.0.1", closed), [b"nobody there"]) == 1
        receiver.send(b"V")
        assert collect(lanes, 1) == [(VOTES, b"V")]
    statistics = lanes.statistics()
    assert statistics.reported == 21
    assert {(one.port, one.errno) for one in lanes.socket_errors()} == {(closed, errno.ECONNREFUSED)}
    assert statistics.balanced


def test_echo_goes_back_to_each_sender(open_lanes: Open, port: int) -> None:
    lanes = open_lanes()
    with Sender(port) as one, Sender(port, "127.0.0.5") as two, Sender(port, "::1") as three:
        for number, sender in enumerate((one, two, three)):
            sender.send(b"V%d" % number)
        echoed = 0
        while echoed < 3:
            with lanes.receive(timeout=DEADLINE) as batch:
                echoed += lanes.send_back(batch)
        for number, sender in enumerate((one, two, three)):
            sender.sock.settimeout(DEADLINE)
            assert sender.sock.recv(10) == b"V%d" % number


def test_a_batch_can_be_sent_from_where_it_lies(open_lanes: Open, port: int) -> None:
    lanes = open_lanes()
    with Sender(port) as sender, Sender(port) as receiver:
        sender.send(b"V1", b"V2" * 2000)
        receiver.sock.settimeout(DEADLINE)
        got: list[bytes] = []
        while len(got) < 2:
            with lanes.receive(timeout=DEADLINE) as batch:
                assert lanes.send(receiver.name, batch) == len(batch)
                got += [receiver.sock.recv(65536) for _ in range(len(batch))]
    assert got == [b"V1", b"V2" * 2000]


def test_several_ports_take_turns(backend: type[Lanes]) -> None:
    ports = sorted({free_port() for _ in range(4)})
    policy = make_policy(ports[0])
    service = policy.services[0]
    policy = type(policy)(
        lanes=policy.lanes,
        classes=policy.classes,
        services=(type(service)(name="s", ports=tuple(ports), kinds=service.kinds, rules=service.rules),),
    )
    with backend(policy) as lanes:
        assert lanes.ports == tuple(ports)
        assert lanes.status()["mode"] == backend.mode
        for port in ports:
            with Sender(port) as sender:
                sender.send(*[b"V%d" % port] * 100)
        found = [payload for _, payload in collect(lanes, 100 * len(ports))]
        assert {payload: found.count(payload) for payload in found} == {b"V%d" % port: 100 for port in ports}
        assert {int(payload[1:]) for payload in found[: 64 * len(ports)]} == set(ports)
        with pytest.raises(UsageError, match="no socket on port"):
            lanes.send(("127.0.0.1", 9), [b""], port=1)
        assert lanes.send(("127.0.0.1", ports[1]), [b"x"], port=ports[2]) == 1
        with lanes.receive(timeout=DEADLINE) as batch:
            assert batch.source(0)[1] == ports[2]


def test_closed_means_closed(open_lanes: Open, port: int) -> None:
    lanes = open_lanes()
    with Sender(port) as sender:
        sender.send(b"Vote")
        batch = lanes.receive(timeout=DEADLINE)
        lanes.close()
        lanes.close()
        assert bytes(batch[0]) == b"Vote"  # what is held stays readable
        batch.release()
    for call in (lanes.receive, lanes.fileno, lanes.statistics, lambda: lanes.send(("127.0.0.1", 9), [b""])):
        with pytest.raises(ValueError, match="closed"):
            call()
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as again:
        again.bind(("::", port))  # nothing holds the port any more


def test_a_socket_closed_elsewhere_is_said(open_lanes: Open, port: int) -> None:
    sockets = open_service_sockets([port])
    lanes = open_lanes(sockets=[ServiceSocket(port, sockets[0].socket)])
    sockets[0].socket.close()
    with pytest.raises(InterfaceGoneError, match="can't be written"):
        lanes.send(("127.0.0.1", 9), [b"x"])


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda lanes: lanes.receive(0), "maximum"),
        (lambda lanes: lanes.receive(1 << 17), "maximum"),
        (lambda lanes: lanes.send(("localhost", 9), [b""]), "not an IP address"),
        (lambda lanes: lanes.send(("127.0.0.1", 0), [b""]), "port"),
        (lambda lanes: lanes.send(("127.0.0.1", 70000), [b""]), "port"),
        (lambda lanes: lanes.send(("fe80::1%nonesuch", 9), [b""]), "no interface"),
        (lambda lanes: lanes.send(("127.0.0.1", 9), ["text"]), "bytes-like"),
    ],
)
def test_wrong_arguments(open_lanes: Open, call: Callable[[Lanes], object], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        call(open_lanes())


@pytest.mark.parametrize("options", [{"frame_size": 63}, {"frame_size": 65537}])
def test_wrong_sizes(open_lanes: Open, options: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="out of range"):
        open_lanes(**options)
