# SPDX-License-Identifier: Apache-2.0
"""Buffers that are transmit frames of an AF_XDP queue; what ZeroCopyUDP does over AF_XDP."""

from __future__ import annotations

import errno
from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING

from typing_extensions import Buffer

from userspace.datagram.batch import Batch
from userspace.datagram.destination import Destination, Endpoint
from userspace.datagram.fanout import Fanout, Outgoing
from userspace.datagram.mmsg import MmsgLanes
from userspace.datagram.pieces import Pieces
from userspace.datagram.socket_statistics import SendFailure
from userspace.datagram.xsk_lanes import XskLanes
from userspace.datagram.xsk_queues import failure
from userspace.datagram.xsk_send import FrameTooSmallError, longest
from userspace.datagram.zero_copy_plain import through_kernel
from userspace.native._native import ffi, lib
from xdp.errors import UsageError

if TYPE_CHECKING:
    from userspace.native._native import CData

# Looked up once: an attribute of lib costs 35 ns at every use.
_reserve = lib.sl_queue_reserve
_send_own = lib.sl_queue_send_own


class XskOutlet:
    """Frames of one queue: that of the lanes, or the first one if they have several.

    ``failures`` of the last call: what was not accepted; None: the call was refused and nothing changed.
    """

    def __init__(self, lanes: XskLanes) -> None:
        self.lanes = lanes
        self.failures: tuple[SendFailure, ...] | None = None
        self.held = 0
        self._queue = lanes._queues[0]
        size = ffi.new("uint64_t *")
        area = lib.sl_queue_area(self._queue, size)
        if area == ffi.NULL:
            raise ValueError("these lanes are closed")
        #: stays mapped, also when the lanes are closed, as long as a frame is reserved
        self.area: tuple[CData, int] = (area, size[0])
        self.maximum_size: int = lanes._descriptors.geometry.frame_size - lib.SL_HEADROOM
        self._bad = ffi.new("uint32_t *")
        self._room = 0
        self._errors: CData = ffi.NULL
        self._keep: object = None  # whose templates are in use

    # buffers

    def reserve(self, memory: CData, count: int, size: int) -> int:
        """Up to ``count`` of ``size`` bytes; how many there were."""
        reserved: int = _reserve(self._queue, count, size, memory.offsets, memory.lengths)
        if reserved < 0:
            raise failure(self.lanes.interface, -reserved, "allocating buffers")
        self.held += reserved
        return reserved

    def give_back(self, offsets: CData, count: int) -> None:
        """They are free again."""
        error = lib.sl_queue_unreserve(self._queue, offsets, count)
        if error:
            raise failure(self.lanes.interface, -error, "recycling buffers")
        self.held -= count

    # sending

    def send(self, to: Destination | Endpoint, memory: CData, port: int | None) -> None:
        """All of ``memory`` to one."""
        way = self._way(to, port)
        if isinstance(way, Destination):
            self._own(way.templates, 1, memory.offsets, memory.lengths, range(memory.count))
            return
        assert not isinstance(to, Destination)

        def tell(failures: tuple[SendFailure, ...]) -> None:
            self.failures = failures
            self._give_back_sent(memory, range(memory.count))

        through_kernel(way, lambda: way.send_memory(to, memory, port=port, timeout=0), tell)

    def send_many(self, fanout: Fanout, memory: CData, port: int | None) -> None:
        """One to each."""
        if port is None:
            raise UsageError("which port to send from is not known", hint="ZeroCopyUDP(lanes, port=...)")
        count: int = memory.count
        kernel = self.lanes._kernel(port)
        spread = self.lanes._sender.spread(fanout, port, routed=kernel is not None)
        most = max(ffi.unpack(memory.lengths, count))
        if most > spread.maximum and kernel is not None:
            data = Outgoing(memory.data, memory.data_size, memory.offsets, memory.lengths, most)
            spread = spread.without_longer(data)
        if spread.others is None or kernel is None:
            self._own(spread.templates, count, memory.offsets, memory.lengths, range(count))
            return
        offsets, lengths = (
            ffi.new("uint32_t[]", [column[index] for index in spread.frames])
            for column in (memory.offsets, memory.lengths)
        )
        self._own(spread.templates, len(spread.frames), offsets, lengths, spread.frames)
        done = [*(self.failures or ()), *(SendFailure(index, errno.ECANCELED) for index in spread.kernel)]
        self.failures = tuple(done)  # so far
        views = [
            ffi.buffer(self.area[0] + memory.offsets[index], memory.lengths[index]) for index in spread.kernel
        ]

        def tell(failures: tuple[SendFailure, ...]) -> None:
            told = [SendFailure(spread.kernel[one.index], one.errno) for one in failures]
            self.failures = tuple(done[: -len(spread.kernel)] + told)
            self._give_back_sent(memory, spread.kernel)

        others = spread.others
        through_kernel(kernel, lambda: kernel.send_many(others, views, port=port, timeout=0), tell)

    def send_vectored(
        self, to: Destination | Endpoint, packets: Sequence[Sequence[Buffer]], port: int | None
    ) -> int:
        """Payloads from pieces; how many were accepted."""
        way = self._way(to, port)
        if isinstance(way, Destination):
            try:
                return self._pieces(way, packets)
            except FrameTooSmallError as error:
                if isinstance(to, Destination):
                    raise
                way = self.lanes._kernel_instead(port, error)
        assert not isinstance(to, Destination)
        sent = way.send_vectored(to, packets, port=port, timeout=0)
        self.failures = way.failures
        return sent

    def _pieces(self, way: Destination, packets: Sequence[Sequence[Buffer]]) -> int:
        pieces = Pieces(packets)
        sent = lib.sl_queue_send_pieces(
            self._queue, way.templates, 1, pieces.table, pieces.counts, pieces.lengths, len(pieces), self._bad
        )
        if sent < 0:
            raise self._refusal(sent, way.templates, 1, pieces.lengths, range(len(pieces)))
        self.failures = _no_room(range(len(pieces)), sent)
        return sent

    def _way(self, to: Destination | Endpoint, port: int | None) -> Destination | MmsgLanes:
        return to if isinstance(to, Destination) else self.lanes._headers(to, port)

    def _own(
        self, templates: CData, count: int, offsets: CData, lengths: CData, indices: Sequence[int]
    ) -> None:
        """Reserved frames, through the ring; ``indices`` are theirs in the call."""
        sent = 0
        if indices:
            sent = _send_own(self._queue, templates, count, offsets, lengths, len(indices), self._bad)
            if sent < 0:
                raise self._refusal(sent, templates, count, lengths, indices)
        self.held -= sent
        self.failures = () if sent == len(indices) else _no_room(indices, sent)

    def _refusal(
        self, result: int, templates: CData, count: int, lengths: CData, indices: Sequence[int]
    ) -> Exception:
        """What to raise for a negative ``result``; of ``indices`` the one at ``*bad`` was too long, maybe."""
        if result != -errno.EMSGSIZE:
            return failure(self.lanes.interface, -result, "sending")
        bad = self._bad[0]
        mtu: int = templates[bad if count > 1 else 0].payload_maximum
        maximum = min(mtu, self.maximum_size)
        kind = UsageError if lengths[bad] > mtu else FrameTooSmallError
        return kind(
            f"payload {indices[bad]} has {lengths[bad]} bytes; {maximum} fit MTU and frame",
            hint="send less at a time; nothing of this call was sent",
        )

    def _give_back_sent(self, memory: CData, indices: Sequence[int]) -> None:
        """The kernel made copies of all but those that failed."""
        failed = {one.index for one in self.failures or ()}
        sent = [memory.offsets[index] for index in indices if index not in failed]
        self.give_back(ffi.new("uint32_t[]", sent), len(sent))

    # forwarding

    def forward(
        self, batch: Batch, to: Destination | Endpoint | Fanout, port: int | None, *, checksum: bool
    ) -> int:
        """See ZeroCopyUDP.forward."""
        backend = batch.backend
        companion = self.lanes._companion
        if companion is not None and backend is companion.lanes:
            return self._forward_copies(batch, to, port)
        if not isinstance(backend, XskLanes) or backend._descriptors is not self.lanes._descriptors:
            raise UsageError("a batch is forwarded through the lanes that it came from")
        templates, frames, others, kernel = self._ways(to, port)
        batch.detach()
        count, ways = len(batch), len(frames) + len(others)
        failures: list[SendFailure] = []
        sent = 0
        try:
            for place, endpoint in others:
                assert kernel is not None
                sent += kernel.send(endpoint, batch, port=port, timeout=0)
                failures += [SendFailure(one.index * ways + place, one.errno) for one in kernel.failures]
            if frames and count:
                sent += self._in_place(batch, backend, templates, frames, ways, checksum, failures)
        finally:
            if not batch.released:
                batch.release()
            self.failures = tuple(sorted(failures, key=lambda one: one.index))
        return sent

    def _ways(
        self, to: Destination | Endpoint | Fanout, port: int | None
    ) -> tuple[CData, Sequence[int], list[tuple[int, Endpoint]], MmsgLanes | None]:
        """Templates and places of those who get a frame; places and addresses of the others; who sends."""
        if not isinstance(to, Fanout):
            self._keep = way = self._way(to, port)
            if isinstance(way, Destination):
                return way.templates, (0,), [], None
            assert not isinstance(to, Destination)
            return ffi.NULL, (), [(0, to)], way
        if port is None:
            raise UsageError("which port to send from is not known", hint="ZeroCopyUDP(lanes, port=...)")
        kernel = self.lanes._kernel(port)
        spread = self.lanes._sender.spread(to, port, routed=kernel is not None)
        others = [(place, to.endpoints[place]) for place in spread.kernel]
        self._keep = spread
        return spread.templates, spread.frames, others, kernel

    def _in_place(
        self,
        batch: Batch,
        backend: XskLanes,
        templates: CData,
        frames: Sequence[int],
        ways: int,
        checksum: bool,
        failures: list[SendFailure],
    ) -> int:
        wanted = len(batch) * len(frames)
        if wanted > self._room:
            self._room, self._errors = wanted, ffi.new("int32_t[]", wanted)
        errors = self._errors
        batch.memory  # noqa: B018 - columns are filled
        memory = batch.surrender()
        assert memory is not None
        sent: int = lib.sl_queue_forward(memory, templates, len(frames), checksum, errors)
        if sent < 0:
            lib.sl_queue_release(memory)
            raise failure(self.lanes.interface, -sent, "forwarding")
        backend._keep(memory)
        if sent < wanted:
            failures += [
                SendFailure(number // len(frames) * ways + frames[number % len(frames)], error)
                for number, error in enumerate(ffi.unpack(errors, wanted))
                if error
            ]
        return sent

    def _forward_copies(self, batch: Batch, to: Destination | Endpoint | Fanout, port: int | None) -> int:
        """What came through a companion socket lies in no frame that could be sent; it leaves likewise."""
        kernel = self.lanes._kernel(port) if port is not None else None
        endpoints = to.endpoints if isinstance(to, Fanout) else (to,)
        ways = [
            self._way(endpoint, port) if isinstance(endpoint, Destination) or kernel is None else kernel
            for endpoint in endpoints
        ]
        batch.detach()
        sent = 0
        failures: list[SendFailure] = []
        try:
            for place, (endpoint, way) in enumerate(zip(endpoints, ways, strict=True)):
                if isinstance(way, Destination):
                    accepted, missing = self._copies(batch, way)
                else:
                    assert not isinstance(endpoint, Destination)
                    accepted, missing = way.send(endpoint, batch, port=port, timeout=0), way.failures
                sent += accepted
                failures += [SendFailure(one.index * len(endpoints) + place, one.errno) for one in missing]
        finally:
            batch.release()
            self.failures = tuple(sorted(failures, key=lambda one: one.index))
        return sent

    def _copies(self, batch: Batch, to: Destination) -> tuple[int, Sequence[SendFailure]]:
        """Datagrams that the kernel put together from fragments may be longer than the MTU: not those."""
        maximum = longest(to, self.lanes._descriptors.geometry.frame_size)
        lengths = batch.lengths.tolist()
        fits = [index for index, length in enumerate(lengths) if length <= maximum]
        offsets = array("I", [batch.offsets[index] for index in fits])
        sizes = array("I", [lengths[index] for index in fits])
        accepted = self.lanes.send_columns(to, batch.data, offsets, sizes) if fits else 0
        too_long = [SendFailure(i, errno.EMSGSIZE) for i, length in enumerate(lengths) if length > maximum]
        return accepted, [*too_long, *_no_room(fits, accepted)]


def _no_room(indices: Sequence[int], sent: int) -> tuple[SendFailure, ...]:
    return tuple(SendFailure(index, errno.EAGAIN) for index in indices[sent:])
