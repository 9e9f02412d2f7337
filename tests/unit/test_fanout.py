# SPDX-License-Identifier: Apache-2.0
"""One call to many destinations, over kernel sockets of both kinds."""

from __future__ import annotations

import errno
import gc
import socket
import weakref
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.unit.socket_backends import DEADLINE, Open, backend, open_lanes, port
from userspace.datagram.fanout import Fanout, outgoing
from userspace.native._native import ffi
from xdp.errors import UsageError

__all__ = ["backend", "open_lanes", "port"]  # fixtures: in use, though only as arguments


@pytest.fixture
def receivers() -> Iterator[list[socket.socket]]:
    """Five of IPv4 and one of IPv6."""
    with ExitStack() as stack:
        made = []
        for host in ["127.0.0.1"] * 5 + ["::1"]:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            sock = stack.enter_context(socket.socket(family, socket.SOCK_DGRAM))
            sock.bind((host, 0))
            sock.settimeout(DEADLINE)
            made.append(sock)
        yield made


def to(*sockets: socket.socket) -> Fanout:
    return Fanout(sock.getsockname()[:2] for sock in sockets)


@pytest.mark.parametrize("payload", [b"", b"one for all", bytes(1400)])
def test_one_payload_to_all(
    open_lanes: Open, port: int, receivers: list[socket.socket], payload: bytes
) -> None:
    lanes = open_lanes()
    fanout = to(*receivers)
    for _ in range(3):
        assert lanes.send_many(fanout, payload, port=port) == len(fanout) == 6
        assert lanes.failures == ()
        for sock in receivers:
            found, source = sock.recvfrom(2000)
            assert found == payload
            assert source[1] == port


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_one_payload_to_each(open_lanes: Open, receivers: list[socket.socket], kind: type[bytes]) -> None:
    lanes = open_lanes()
    payloads = [b"", b"1", b"", b"three", bytes(1000), b"five"]
    assert lanes.send_many(to(*receivers), [kind(one) for one in payloads]) == 6
    assert [sock.recv(2000) for sock in receivers] == payloads


def test_what_fails_is_named_and_the_rest_goes_out(open_lanes: Open, receivers: list[socket.socket]) -> None:
    lanes = open_lanes()
    first, second, *_ = receivers
    fanout = Fanout([first.getsockname(), ("255.255.255.255", 9), second.getsockname()])
    assert lanes.send_many(fanout, b"payload") == 2
    (failure,) = lanes.failures
    assert (failure.index, failure.errno) == (1, errno.EACCES)
    assert [first.recv(100), second.recv(100)] == [b"payload"] * 2


def test_numbers_that_do_not_fit(open_lanes: Open, receivers: list[socket.socket]) -> None:
    lanes = open_lanes()
    with pytest.raises(UsageError, match="2 payloads for 6 destinations"):
        lanes.send_many(to(*receivers), [b"a", b"b"])
    with pytest.raises(UsageError, match="sequence of one for each"):
        lanes.send_many(to(*receivers), [1, 2, 3, 4, 5, 6])  # type: ignore[list-item]
    with pytest.raises(UsageError, match="without destinations"):
        Fanout([])
    with pytest.raises(UsageError, match="not an IP address"):
        Fanout([("nobody", 1)])
    assert repr(to(*receivers)) == "<Fanout to 6>"


def test_payloads_as_c_wants_them() -> None:
    one = outgoing(b"abc", 3)
    assert [one.offsets[i] for i in range(3)] == [0, 0, 0]
    assert [one.lengths[i] for i in range(3)] == [3, 3, 3]
    assert (one.longest, one.size) == (3, 3)
    assert one.of([2]) == b"abc"
    many = outgoing([b"a", b"", b"ccc"], 3)
    assert many.offsets == ffi.NULL
    assert [many.lengths[i] for i in range(3)] == [1, 0, 3]
    assert (many.longest, many.size) == (3, 4)
    for indices, payloads in (([0, 1, 2], [b"a", b"", b"ccc"]), ([2], [b"ccc"])):
        chosen = many.of(indices)
        assert isinstance(chosen, list)
        assert [bytes(one) for one in chosen] == payloads


def test_a_fanout_is_not_kept(receivers: list[socket.socket], open_lanes: Open) -> None:
    lanes = open_lanes()
    fanout = to(*receivers)
    lanes.send_many(fanout, b"x")
    seen = weakref.ref(fanout)
    del fanout
    gc.collect()
    assert seen() is None
