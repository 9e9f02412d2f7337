# SPDX-License-Identifier: Apache-2.0
"""ZeroCopyUDP over kernel sockets, recvmmsg in C and plain sockets in Python."""

from __future__ import annotations

import errno
import gc
import socket
from collections.abc import Callable, Iterator

import pytest

from tests.unit.socket_backends import Lanes, Open, backend, free_port, open_lanes, port
from tests.unit.zero_copy_rules import RULES, SECONDS, Ends
from userspace.datagram.destination import Destination
from userspace.datagram.fanout import Fanout
from userspace.datagram.zero_copy import ZeroCopyUDP
from xdp.errors import InterfaceGoneError, UsageError

__all__ = ["backend", "open_lanes", "port"]


@pytest.fixture(params=["127.0.0.2", "::1"], ids=["v4", "v6"])
def ends(open_lanes: Open, port: int, request: pytest.FixtureRequest) -> Iterator[Ends]:
    host: str = request.param
    lanes = open_lanes()
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM) as peer:
        peer.bind((host, 0))
        peer.settimeout(SECONDS)
        here = ("::1" if ":" in host else "127.0.0.1", port)
        yield Ends(lanes, ZeroCopyUDP(lanes, port=port), peer, peer.getsockname()[:2], here)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule(ends: Ends, rule: Callable[[Ends], None]) -> None:
    rule(ends)
    statistics = ends.zero.statistics()
    assert statistics.balanced
    assert statistics.held == 0


def test_as_many_as_there_are(open_lanes: Open) -> None:
    zero = ZeroCopyUDP(open_lanes(), buffers=10, buffer_size=100)
    first = zero.allocate(7)
    assert first.size == 100
    second = zero.allocate(7, 20)
    assert (len(first), len(second), len(zero.allocate(1))) == (7, 3, 0)
    places = {*first.offsets, *second.offsets}
    assert len(places) == 10
    zero.recycle(first)
    third = zero.allocate(300)  # more than the columns that are kept
    assert len(third) == 7
    assert {*second.offsets, *third.offsets} == places
    zero.recycle(second)
    zero.recycle(third)
    assert zero.statistics().held == 0


def test_what_failed_stays(ends: Ends) -> None:
    """A payload that the kernel refuses is skipped and still the caller's; the others have left."""
    zero = ZeroCopyUDP(ends.lanes, port=ends.here[1], buffers=8, buffer_size=65_535)
    buffers = zero.allocate(4)
    for number, buffer in enumerate(buffers):
        buffer[:4] = b"%04d" % number
    assert zero.send(ends.to, buffers, lengths=[4, 65_535, 4, 65_530]) == 2
    assert [(one.index, one.errno) for one in zero.failures] == [(1, errno.EMSGSIZE), (3, errno.EMSGSIZE)]
    assert list(buffers.lengths) == [65_535, 65_530]
    assert [bytes(buffer[:4]) for buffer in buffers] == [b"0001", b"0003"]
    assert zero.send(ends.to, buffers, lengths=4) == 2
    assert sorted(ends.arrived(4)) == [b"0000", b"0001", b"0002", b"0003"]


def test_dropped_buffers_come_back(ends: Ends) -> None:
    """Those that nobody sent or recycled say so; their memory waits for the last slice of a view."""
    zero = ZeroCopyUDP(ends.lanes, port=ends.here[1], buffers=2, buffer_size=64)
    with pytest.warns(ResourceWarning, match="neither sent nor recycled"):
        piece = zero.allocate(2)[1][3:]
    assert len(zero.allocate(2)) == 0
    piece[0] = 7
    del piece
    with zero.allocate(2) as buffers:
        assert len(buffers) == 2
    statistics = zero.statistics()
    assert (statistics.allocated, statistics.recycled, statistics.held) == (4, 4, 0)


def test_views_outlive_everything(open_lanes: Open) -> None:
    """A slice of a view of buffers that are gone with all they came from: still memory, nobody's."""
    zero = ZeroCopyUDP(open_lanes(), buffers=2, buffer_size=64)
    buffers = zero.allocate(1)
    piece = buffers[0][3:]
    with pytest.warns(ResourceWarning):
        del buffers, zero
    gc.collect()
    piece[:] = b"x" * 61
    assert bytes(piece) == b"x" * 61


def test_closed_lanes(open_lanes: Open, port: int) -> None:
    lanes = open_lanes()
    zero = ZeroCopyUDP(lanes, port=port)
    buffers = zero.allocate(2, 8)
    lanes.close()
    with pytest.raises(ValueError, match="closed"):
        zero.allocate(1)
    with pytest.raises(ValueError, match="closed"):
        zero.send(("127.0.0.1", port), buffers)
    buffers[1][:] = b"unsent.."
    zero.recycle(buffers)
    assert zero.statistics().held == 0


def test_a_socket_that_was_closed_elsewhere(open_lanes: Open, port: int) -> None:
    """What was not sent stays held, also when the call raises."""
    lanes: Lanes = open_lanes()
    zero = ZeroCopyUDP(lanes, port=port)
    with zero.allocate(3, 8) as buffers:
        lanes._sockets[0].socket.close()
        with pytest.raises(InterfaceGoneError):
            zero.send(("127.0.0.1", port), buffers)
        assert len(buffers) == len(zero.failures) == 3
    assert zero.statistics().balanced


def test_wrong_destinations(open_lanes: Open, port: int) -> None:
    lanes = open_lanes()
    headers = Destination("02:00:00:00:00:01", "02:00:00:00:00:02", ("192.0.2.1", 1), ("192.0.2.2", 2))
    zero = ZeroCopyUDP(lanes, port=port)
    with zero.allocate(1, 8) as buffers:
        with pytest.raises(UsageError, match="own headers"):
            zero.send(headers, buffers)
        with pytest.raises(UsageError, match="no socket"):
            ZeroCopyUDP(lanes, port=free_port()).send_vectored(("127.0.0.1", port), [[b"x"]])
        assert len(buffers) == 1
    for buffers_wanted, size in ((0, 8), (8, 0), (1 << 20, 65_535), (8, 65_536)):
        with pytest.raises(UsageError, match="buffers of"):
            ZeroCopyUDP(lanes, buffers=buffers_wanted, buffer_size=size)
    with pytest.raises(UsageError, match="no lanes"):
        ZeroCopyUDP("lanes")  # type: ignore[arg-type]


def test_forwarding_tells_what_failed(ends: Ends) -> None:
    """By packet and destination; the others get theirs."""
    unreachable = ("255.255.255.255", 9)  # broadcast was not asked for: EACCES (ip(7))
    batch = ends.batch(b"V1", b"V-2")
    fanout = Fanout([ends.to, unreachable, ends.to])
    assert ends.zero.forward(batch, fanout) == 4
    assert [(one.index, one.errno) for one in ends.zero.failures] == [(1, errno.EACCES), (4, errno.EACCES)]
    assert sorted(ends.arrived(4)) == [b"V-2", b"V-2", b"V1", b"V1"]
