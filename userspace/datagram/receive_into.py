# SPDX-License-Identifier: Apache-2.0
"""Receiving into memory of the caller: what ``ZeroCopyUDP.receive_into`` does."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from typing_extensions import Buffer

from userspace.datagram.batch import Address, Batch, unpack_source
from userspace.datagram.buffers import Buffers
from userspace.datagram.lanes import Lanes
from userspace.datagram.views import SOURCE_SIZE
from userspace.native._native import ffi, lib
from xdp.errors import UsageError


@dataclass(frozen=True, slots=True)
class Received:
    """What was put into the caller's buffers, highest lane first.

    ``lengths`` (array("I")) are the bytes in each buffer, ``sizes`` those of the datagram: more
    where it did not fit and was cut off.  ``lanes`` has a byte for each, ``sources`` the packed
    senders (``struct sl_source``), if asked for.
    """

    lengths: array[int]
    sizes: array[int]
    lanes: bytes
    sources: bytes

    def __len__(self) -> int:
        return len(self.lengths)

    def source(self, index: int) -> tuple[Address, int]:
        """Sender's address and port of one packet.

        Raises UsageError unless ``sources`` were asked for, ValueError where its headers do not tell.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"packet {index} of {len(self)}")
        if not self.sources:
            raise UsageError("who sent it was not asked for", hint="receive_into(..., sources=True)")
        packed = ffi.new("struct sl_source *")
        ffi.memmove(packed, self.sources[index * SOURCE_SIZE : (index + 1) * SOURCE_SIZE], SOURCE_SIZE)
        return unpack_source(packed, index)


def receive_into(
    lanes: Lanes,
    buffers: Buffers | Buffer | Sequence[Buffer],
    size: int | None,
    timeout: float | None,
    *,
    sources: bool,
) -> Received:
    """See ZeroCopyUDP.receive_into."""
    if isinstance(buffers, Buffers):
        return _into_buffers(lanes, buffers, timeout, sources)
    views = _writable(buffers)
    if isinstance(views, memoryview):
        whole = ffi.from_buffer("uint8_t[]", views, require_writable=True)
        room = len(whole) if size is None else size
        if not 0 < room <= len(whole):
            raise UsageError(f"buffers of {room} bytes in memory of {len(whole)}")
        with _receive(lanes, len(whole) // room, timeout) as batch:
            if batch:
                lib.sl_batch_copy(batch.memory, len(batch), whole, ffi.NULL, room)
            return _received(batch, [room] * len(batch), sources)
    if size is not None or not views:
        raise UsageError("size= cuts one buffer into several; give one, or a sequence without size=")
    with _receive(lanes, len(views), timeout) as batch:
        for view, payload in zip(views, batch, strict=False):
            length = min(view.nbytes, payload.nbytes)
            view[:length] = payload[:length]
        return _received(batch, [view.nbytes for view in views[: len(batch)]], sources)


def _into_buffers(lanes: Lanes, buffers: Buffers, timeout: float | None, sources: bool) -> Received:
    if not len(buffers):
        raise UsageError("there are no buffers to receive into", hint="allocate some")
    with _receive(lanes, len(buffers), timeout) as batch:
        if batch:
            buffers.fill(batch)
        received = _received(batch, [buffers.size] * len(batch), sources)
    buffers.set_lengths(received.lengths)
    return received


def _receive(lanes: Lanes, count: int, timeout: float | None) -> Batch:
    return lanes.receive(min(count, lib.SL_BATCH_MAX), timeout)


def _received(batch: Batch, rooms: Sequence[int], sources: bool) -> Received:
    sizes = array("I", batch.lengths)
    lengths = array("I", map(min, sizes, rooms))
    return Received(lengths, sizes, bytes(batch.lanes), bytes(batch.sources) if sources else b"")


def _writable(buffers: Buffer | Sequence[Buffer]) -> memoryview | list[memoryview]:
    """One view of bytes, or a list of them.  Raises UsageError before anything was received."""
    try:
        if isinstance(buffers, (list, tuple)):
            views = [memoryview(one).cast("B") for one in buffers]
            if not any(view.readonly for view in views):
                return views
        else:
            view = memoryview(buffers).cast("B")  # type: ignore[arg-type]
            if not view.readonly:
                return view
    except TypeError:
        pass
    raise UsageError(
        "received is into Buffers, a writable bytes-like object, or a list of them",
        hint="bytearray(2048), say",
    )
