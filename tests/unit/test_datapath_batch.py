# SPDX-License-Identifier: Apache-2.0
"""Batches: columns, views on demand, and nothing of them that outlives the batch."""

from __future__ import annotations

import os
import struct
from ipaddress import IPv4Address, IPv6Address
from typing import Any

import pytest

from userspace.datagram.batch import SOURCE_SIZE, Abandoned, Batch
from userspace.datagram.descriptors import (
    LaneDescriptors,
    LaneSpec,
    QueueDescriptors,
    Refusal,
    plan_geometry,
)
from userspace.native._native import ffi, lib
from xdp.errors import UsageError

PAYLOADS = [b"first", b"", b"third packet", bytes(range(64))]


class Area:
    """A backend over plain memory; knows what it got back."""

    def __init__(self) -> None:
        self.area = ffi.new("uint8_t[]", 4096)
        self.returned: list[Any] = []
        self.abandoned: list[Abandoned] = []
        self.filled = self.sourced = 0

    def batch(self, payloads: list[bytes] | None = None, *, scattered: bool = False) -> Batch:
        payloads = PAYLOADS if payloads is None else payloads
        memory = ffi.gc(lib.sl_batch_new(8), lib.sl_batch_free)
        if scattered:  # as a backend does that has its columns elsewhere
            memory.columns = ffi.NULL
        memory.count = len(payloads)
        memory.data, memory.data_size = self.area, 4096
        for index, payload in enumerate(payloads):
            memory.offsets[index], memory.lengths[index] = index * 256 + 10, len(payload)
            ffi.memmove(self.area + index * 256 + 10, payload, len(payload))
        return Batch(self, memory, len(payloads))

    def fill_columns(self, memory: Any) -> None:
        self.filled += 1
        for index in range(memory.count):
            memory.times[index], memory.peers[index] = 1 << 40 | index, 100 + index
            memory.lanes[index], memory.kinds[index] = index, 2
            memory.classes[index], memory.services[index] = 3, 4
        memory.columns_ready = 1

    def fill_sources(self, memory: Any) -> None:
        self.sourced += 1
        for index, (family, address) in enumerate(
            [(4, bytes(10) + b"\xff\xff\xc0\x00\x02\x07"), (6, b"\xfd" + bytes(14) + b"\x01")]
        ):
            ffi.memmove(memory.sources[index].address, address, 16)
            memory.sources[index].family, memory.sources[index].port = family, 9000 + index
        memory.sources[2].family, memory.sources[2].scope = 6, 5
        memory.sources_ready = 1

    def take_back(self, memory: Any) -> None:
        self.returned.append(memory)

    def abandon(self, abandoned: Abandoned) -> None:
        self.abandoned.append(abandoned)


@pytest.fixture
def area() -> Area:
    return Area()


@pytest.mark.parametrize("scattered", [False, True])
def test_columns(area: Area, scattered: bool) -> None:
    with area.batch(scattered=scattered) as batch:
        assert len(batch) == 4
        assert area.filled == 0  # nobody asked yet
        assert list(batch.lengths) == [len(payload) for payload in PAYLOADS]
        assert list(batch.offsets) == [10, 266, 522, 778]
        assert list(batch.times) == [1 << 40 | index for index in range(4)]
        assert list(batch.peers) == [100, 101, 102, 103]
        assert (list(batch.lanes), list(batch.kinds)) == ([0, 1, 2, 3], [2] * 4)
        assert (list(batch.classes), list(batch.services)) == ([3] * 4, [4] * 4)
        assert [column.format for column in (batch.offsets, batch.times, batch.lanes)] == ["I", "Q", "B"]
        assert area.filled == 1
        assert batch.offsets is batch.offsets
        with pytest.raises(TypeError, match="read-only"):
            batch.lengths[0] = 1
        assert bytes(batch.data[522:534]) == b"third packet"
        assert len(batch.sources) == 4 * SOURCE_SIZE
        assert struct.unpack_from("=16sIHB", batch.sources, SOURCE_SIZE)[2:] == (9001, 6)
    assert len(area.returned) == 1


def test_sources(area: Area) -> None:
    with area.batch() as batch:
        assert batch.source(0) == (IPv4Address("192.0.2.7"), 9000)
        assert batch.source(1) == (IPv6Address("fd00::1"), 9001)
        assert batch.source(2)[0] == IPv6Address("::%5")
        with pytest.raises(ValueError, match="packet 3"):
            batch.source(-1)
        with pytest.raises(IndexError):
            batch.source(4)
        assert area.sourced == 1


def test_views(area: Area) -> None:
    with area.batch() as batch:
        assert [bytes(view) for view in batch] == PAYLOADS
        assert bytes(batch[-1]) == PAYLOADS[-1]
        batch[0][:] = b"FIRST"
        assert bytes(batch[0]) == b"FIRST"
        for wrong in (4, -5):
            with pytest.raises(IndexError, match="batch of 4"):
                batch[wrong]


def test_gather(area: Area) -> None:
    with area.batch([b"\x01\x02\x03\x04\x05\x06\x07\x08\x09", b"\xff\xfe", b""]) as batch:
        assert list(batch.gather(0, 2)) == [0x0102, 0xFFFE, 0]
        assert list(batch.gather(1)) == [0x0203040506070809, 0, 0]
        for offset, width in ((0, 0), (0, 9), (-1, 1)):
            with pytest.raises(UsageError, match="gather"):
                batch.gather(offset, width)


def test_nothing_works_after_release(area: Area) -> None:
    batch = area.batch()
    view, column, whole, iterator = batch[0], batch.lengths, batch.data, iter(batch)
    next(iterator)
    batch.release()
    for old in (view, column, whole):
        with pytest.raises(ValueError, match="released"):
            old[0]
    for use in (
        batch.release,
        lambda: len(batch),
        lambda: batch[0],
        lambda: batch.offsets,
        lambda: batch.sources,
        lambda: batch.data,
        lambda: batch.source(0),
        lambda: batch.gather(0),
        lambda: batch.memory,
        lambda: next(iterator),
    ):
        with pytest.raises(ValueError, match="given back"):
            use()
    assert batch.released
    assert len(area.returned) == 1


@pytest.mark.parametrize(
    ("hold", "what"),
    [
        (lambda batch: batch[2][1:3], "packet 2"),
        (lambda batch: batch[2].cast("c"), "packet 2"),
        (lambda batch: ffi.from_buffer(batch[3]), "packet"),
        (lambda batch: batch.times[1:], "column 'times'"),
        (lambda batch: batch.lanes[:2], "column 'lanes'"),
        (lambda batch: batch.data[2000:], "data"),
        (lambda batch: [view[:1] for view in batch][3:], "packet 3"),
    ],
)
@pytest.mark.parametrize("scattered", [False, True])
def test_what_lives_on_keeps_the_batch(area: Area, hold: Any, what: str, scattered: bool) -> None:
    batch = area.batch(scattered=scattered)
    kept = hold(batch)
    with pytest.raises(BufferError, match=what):
        batch.release()
    assert not area.returned
    assert not batch.released
    assert [bytes(view) for view in batch] == PAYLOADS  # it is still whole
    del kept
    batch.release()
    assert len(area.returned) == 1


def test_empty(area: Area) -> None:
    with Batch(area, None, 0) as batch:
        assert not batch
        assert list(batch) == []
        assert len(batch.offsets) == len(batch.sources) == len(batch.data) == len(batch.gather(0)) == 0
        with pytest.raises(ValueError, match="empty"):
            _ = batch.memory
    assert not area.returned
    with pytest.raises(ValueError, match="given back"):
        batch.release()


def test_dropped_batch_comes_back_when_nobody_looks(area: Area) -> None:
    batch = area.batch()
    part = batch[0][1:]
    with pytest.warns(ResourceWarning, match="never released"):
        del batch
    (abandoned,) = area.abandoned
    assert not abandoned.reclaim()
    assert bytes(part) == b"irst"
    del part
    assert abandoned.reclaim()
    assert len(area.returned) == 1


LANES = (LaneSpec(number=0, name="votes"), LaneSpec(number=3, name="bulk", ring=1024, quota=10, share=0.5))


def descriptors(**changes: Any) -> LaneDescriptors:
    given: dict[str, Any] = {
        "interface": "eth1",
        "ifindex": 7,
        "mode": "native-copy",
        "cookie": 99,
        "geometry": plan_geometry(LANES),
        "lanes": LANES,
        "queues": [QueueDescriptors(0, 10, [11, 12], 13), QueueDescriptors(1, 14, [15, 16], 17)],
        "counters": 18,
        "companions": [(8001, 19)],
        "refused": [Refusal(mode="native-zero-copy", reason="none")],
        **changes,
    }
    return LaneDescriptors(**given)


def test_geometry() -> None:
    geometry = plan_geometry(LANES, reserve=100, transmit_ring=64)
    assert geometry.fill_frames == 4096 + 1024 + 1024 + 10 + 100
    assert geometry.fill_ring == 16384 >= 2 * geometry.fill_frames  # see native/queue.h
    assert geometry.area == (geometry.fill_frames + 128) * 2048


@pytest.mark.parametrize(
    ("lanes", "options", "words"),
    [
        ((), {}, "0 lanes"),
        ([LaneSpec(number=1, name="a"), LaneSpec(number=0, name="b")], {}, "ascending"),
        ([LaneSpec(number=8, name="a")], {}, "below 8"),
        ([LaneSpec(number=0, name="a", ring=100)], {}, "power of 2"),
        ([LaneSpec(number=0, name="a", quota=0)], {}, "quota"),
        ([LaneSpec(number=0, name="a", share=1.5)], {}, "share"),
        (LANES, {"frame_size": 1000}, "1000 bytes"),
        (LANES, {"transmit_ring": 100}, "transmit ring"),
        (LANES, {"reserve": -1}, "reserve"),
        ([LaneSpec(number=0, name="a", ring=1 << 20, quota=1 << 20)], {}, "4096 MiB"),
    ],
)
def test_geometry_refuses(lanes: Any, options: dict[str, int], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        plan_geometry(lanes, **options)


def test_message_there_and_back() -> None:
    message, passed = descriptors().to_message()
    assert passed == list(range(10, 20))
    # Other numbers in the other process, the same order.
    there = LaneDescriptors.from_message(message, [number + 1000 for number in passed])
    assert there.descriptors() == [number + 1000 for number in passed]
    assert (there.lanes, there.geometry, there.mode) == (LANES, plan_geometry(LANES), "native-copy")
    assert there.take_companions() == ((8001, 1019),)
    assert not there.companions
    assert "2 queues, votes, bulk" in repr(there)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda message: "not a dict",
        lambda message: {},
        lambda message: {**message, "version": 1},
        lambda message: {**message, "more": 1},
        lambda message: {**message, "mode": "fast"},
        lambda message: {**message, "lanes": []},
        lambda message: {**message, "queues": []},
        lambda message: {**message, "queues": [{"queue": 0, "umem": 0, "sockets": [1], "transmit": 2}]},
        lambda message: {**message, "counters": 5},
        lambda message: {**message, "counters": -1},
        lambda message: {**message, "companions": [[8001, 99]]},
    ],
)
def test_message_refused(spoil: Any) -> None:
    message, _ = descriptors().to_message()
    opened = [os.eventfd(0) for _ in range(10)]
    with pytest.raises(UsageError, match="not understood"):
        LaneDescriptors.from_message(spoil(message), opened)
    for fd in opened:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)
