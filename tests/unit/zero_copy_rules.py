# SPDX-License-Identifier: Apache-2.0
"""What holds for ZeroCopyUDP whatever carries it: the same checks over kernel sockets and AF_XDP."""

from __future__ import annotations

import socket
from array import array
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from typing_extensions import Buffer

from userspace.datagram.batch import Batch
from userspace.datagram.fanout import Fanout
from userspace.datagram.lanes import Lanes
from userspace.datagram.zero_copy import ZeroCopyUDP
from xdp.errors import UsageError

Endpoint = tuple[str, int]
SECONDS = 10.0  # deadline for what takes microseconds


@dataclass
class Ends:
    """Lanes with a ZeroCopyUDP on them, and a kernel socket that they can send to and receive from."""

    lanes: Lanes
    zero: ZeroCopyUDP
    peer: socket.socket
    to: Endpoint  # the peer's
    here: Endpoint  # the lanes', for the peer

    def arrived(self, count: int) -> list[bytes]:
        """In order of arrival; and no more than these."""
        found = [self.peer.recv(65536) for _ in range(count)]
        self.peer.setblocking(False)
        with pytest.raises(BlockingIOError):
            self.peer.recv(65536)
        self.peer.settimeout(SECONDS)
        return found

    def batch(self, *payloads: bytes) -> Batch:
        """Sent by the peer, received in one batch."""
        for payload in payloads:
            self.peer.sendto(payload, self.here)
        kept = self.lanes.receive(timeout=SECONDS)
        while len(kept) < len(payloads):  # they came one by one: let them come again
            with self.lanes.receive(timeout=SECONDS):
                pass
            kept.release()
            return self.batch(*payloads)
        return kept


def views_end(ends: Ends) -> None:
    """No view survives sending or recycling, and a slice of one prevents either."""
    zero = ends.zero
    buffers = zero.allocate(3, 100)
    views = list(buffers)
    column, data = buffers.lengths, buffers.data
    assert [len(view) for view in views] == [100, 100, 100]
    for number, view in enumerate(views):
        view[:] = b"%d" % number * 100
    piece = views[1][5:]
    with pytest.raises(BufferError, match="buffer 1 is still in use"):
        zero.send(ends.to, buffers)
    with pytest.raises(BufferError, match="buffer 1"):
        zero.recycle(buffers)
    del piece
    assert len(buffers) == 3
    assert bytes(buffers[2]) == b"2" * 100  # what was refused changed nothing
    assert zero.send(ends.to, buffers, lengths=[1, 2, 3]) == 3
    assert sorted(ends.arrived(3)) == [b"0", b"11", b"222"]
    for gone in (*views, column, data):
        with pytest.raises(ValueError, match="released"):
            gone[0]


def used_once(ends: Ends) -> None:
    """Sent or recycled twice, or used afterwards: a clear error each time, and nothing happens."""
    zero = ends.zero
    sent, recycled = zero.allocate(2, 8), zero.allocate(2, 8)
    assert zero.send(ends.to, sent, lengths=0) == 2
    zero.recycle(recycled)
    before = zero.statistics()
    for buffers, what in ((sent, "sent"), (recycled, "recycled")):
        assert len(buffers) == 0
        for use in (
            lambda b: zero.send(ends.to, b),
            lambda b: zero.send_many(Fanout([ends.to]), b),
            zero.recycle,
            lambda b: b[0],
            list,
            lambda b: b.lengths,
            lambda b: b.data,
            lambda b: b.scatter(0, []),
            lambda b: b.set_lengths(1),
        ):
            with pytest.raises(ValueError, match=f"were {what}"):
                use(buffers)
    assert ends.arrived(2) == [b"", b""]
    assert zero.statistics() == before
    assert before.balanced


def with_recycles_the_rest(ends: Ends) -> None:
    zero = ends.zero
    held = zero.statistics().held
    with zero.allocate(5, 16) as buffers:
        assert zero.statistics().held == held + 5
        for number, buffer in enumerate(buffers):
            buffer[:2] = b"#%d" % number
        assert zero.send(ends.to, buffers, lengths=array("I", [2, 2])) == 2
        assert len(buffers) == 3
        assert [bytes(buffer[:2]) for buffer in buffers] == [b"#2", b"#3", b"#4"]
        assert zero.send(ends.to, buffers, lengths=[2]) == 1
    assert ends.arrived(3) == [b"#0", b"#1", b"#2"]
    assert zero.statistics().held == held
    assert zero.statistics().balanced


def not_others(ends: Ends) -> None:
    other = ZeroCopyUDP(ends.lanes, port=ends.here[1])
    with other.allocate(1, 8) as buffers:
        with pytest.raises(UsageError, match="another"):
            ends.zero.send(ends.to, buffers)
        with pytest.raises(UsageError, match="another"):
            ends.zero.recycle(buffers)
        assert len(buffers) == 1


def wrong_arguments(ends: Ends) -> None:
    zero = ends.zero
    for count, size in ((0, 8), (65537, 8), (1, zero.maximum_size + 1), (1, -1)):
        with pytest.raises(UsageError):
            zero.allocate(count, size)
    with zero.allocate(2, 8) as buffers:
        for lengths in (9, -1, [1, 9], [1, 2, 3], [-1, 1], ["a"]):
            with pytest.raises(UsageError):
                zero.send(ends.to, buffers, lengths=lengths)  # type: ignore[arg-type]
        for offset, values, width in (
            (0, [1, 2], 9),
            (1, [1, 2], 8),
            (0, [1], 8),
            (-1, [1, 2], 4),
            (0, [-1, 2], 8),
        ):
            with pytest.raises(UsageError):
                buffers.scatter(offset, values, width)
        with pytest.raises(UsageError, match="2 payloads for 1"):
            zero.send_many(Fanout([ends.to]), buffers)
        with pytest.raises(IndexError):
            buffers[2]
        assert len(buffers) == 2
    for packets in ([b"whole"], [["text"]], 5, [[b"x"] * 65]):
        with pytest.raises(UsageError):
            zero.send_vectored(ends.to, packets)  # type: ignore[arg-type]
    for target in (b"read-only", [b"read-only"], [], "text"):
        with pytest.raises(UsageError):
            zero.receive_into(target, timeout=0)  # type: ignore[arg-type]
    with pytest.raises(UsageError):
        zero.receive_into(bytearray(10), 11, timeout=0)
    ends.arrived(0)


def numbers_in_place(ends: Ends) -> None:
    zero = ends.zero
    with zero.allocate(4, 12) as buffers:
        for buffer in buffers:
            buffer[:] = b"............"
        buffers.scatter(0, array("Q", [1, 2, 3, 1 << 63]))
        buffers.scatter(9, [0x10203, 0x4FFFFFF, 5, 6], width=3)
        assert zero.send_many(Fanout([ends.to] * 4), buffers) == 4
    assert ends.arrived(4) == [
        number.to_bytes(8, "big") + b"." + tail
        for number, tail in (
            (1, b"\1\2\3"), (2, b"\xff\xff\xff"), (3, b"\0\0\5"), (1 << 63, b"\0\0\6")
        )
    ]  # fmt: skip


def from_pieces(ends: Ends) -> None:
    packets: list[list[Buffer]] = [
        [b"header", memoryview(b"..body.")[2:6]],
        [],
        [bytearray(b"odd"), b"", b"and", b"even", array("H", [0x4141])],
        [b"x" * 999, b"y"] * 1,
        [b"%d" % (number % 10) for number in range(64)],
    ]
    expected = [b"".join(bytes(piece) for piece in packet) for packet in packets]
    assert ends.zero.send_vectored(ends.to, packets) == 5
    assert ends.zero.failures == ()
    assert ends.arrived(5) == expected
    # More of one length than share a message, with more pieces than fit one.
    many: list[list[Buffer]] = [[b"%04d" % number, *[b"z"] * 40] for number in range(100)]
    assert ends.zero.send_vectored(ends.to, many) == 100
    assert sorted(ends.arrived(100)) == [b"%04d" % number + b"z" * 40 for number in range(100)]
    assert ends.zero.send_vectored(ends.to, []) == 0


def into_given_memory(ends: Ends) -> None:
    zero, payloads = ends.zero, [b"V one", b"V three"]

    def receive(how: Callable[[], list[bytes]]) -> None:
        for payload in payloads:
            ends.peer.sendto(payload, ends.here)
        found: list[bytes] = []
        while len(found) < 2:
            found += how()
        assert found == payloads

    memory = bytearray(4 * 100)

    def rows() -> list[bytes]:
        received = zero.receive_into(memory, 100, timeout=SECONDS, sources=True)
        assert {received.source(index) for index in range(len(received))} <= {(received.source(0))}
        assert received.source(0)[1] == ends.to[1]
        assert len(received.lanes) == len(received)
        return [bytes(memory[100 * i : 100 * i + length]) for i, length in enumerate(received.lengths)]

    def several() -> list[bytes]:
        given: list[Buffer] = [bytearray(50), bytearray(60), memoryview(bytearray(70))]
        received = zero.receive_into(given, timeout=SECONDS)
        return [bytes(memoryview(one)[:length]) for one, length in zip(given, received.lengths, strict=False)]

    def one() -> list[bytes]:
        received = zero.receive_into(memory, timeout=SECONDS)
        assert len(received) == 1
        with pytest.raises(UsageError, match="not asked"):
            received.source(0)
        return [bytes(memory[: received.lengths[0]])]

    def buffers() -> list[bytes]:
        with zero.allocate(4, 64) as given:
            received = zero.receive_into(given, timeout=SECONDS)
            assert list(given.lengths)[: len(received)] == list(received.lengths)
            return [bytes(given[index][:length]) for index, length in enumerate(received.lengths)]

    for how in (rows, several, one, buffers):
        receive(how)
    ends.peer.sendto(b"V" * 30, ends.here)
    small = bytearray(b"." * 12)
    received = zero.receive_into(small, 10, timeout=SECONDS)
    assert (list(received.lengths), list(received.sizes)) == ([10], [30])
    assert bytes(small) == b"V" * 10 + b".."
    assert len(zero.receive_into(small, timeout=0)) == 0


def forwarded(ends: Ends) -> None:
    """In place to one, then to several; the batch is used up, and its views end."""
    zero = ends.zero
    batch = ends.batch(b"V1", b"V-2", b"V--3")
    view = batch[1]
    view[:1] = b"W"
    piece = view[1:]
    with pytest.raises(BufferError, match="packet 1"):
        zero.forward(batch, ends.to)
    assert bytes(batch[0]) == b"V1"
    del piece
    assert zero.forward(batch, ends.to) == 3
    assert zero.failures == ()
    assert batch.released
    with pytest.raises(ValueError, match="released"):
        view[0]
    with pytest.raises(ValueError, match="given back"):
        zero.forward(batch, ends.to)
    assert sorted(ends.arrived(3)) == [b"V--3", b"V1", b"W-2"]
    assert zero.forward(ends.batch(b"V1", b"V-2"), Fanout([ends.to] * 3)) == 6
    assert sorted(ends.arrived(6)) == [b"V-2"] * 3 + [b"V1"] * 3
    with ends.lanes.receive(timeout=0) as empty:
        assert zero.forward(empty, ends.to) == 0
    ends.arrived(0)


RULES: tuple[Callable[[Ends], None], ...] = (
    views_end, used_once, with_recycles_the_rest, not_others, wrong_arguments, numbers_in_place, from_pieces,
    into_given_memory, forwarded,
)  # fmt: skip
