# SPDX-License-Identifier: Apache-2.0
"""Buffers of ordinary memory; what ZeroCopyUDP does over kernel sockets.

The kernel copies each payload once when it is sent, from where it lies: nothing is joined or copied
before.  What the buffers add is the interface of frames, with the same rules.
"""

from __future__ import annotations

import mmap
from array import array
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from typing_extensions import Buffer

from userspace.datagram.batch import Batch
from userspace.datagram.destination import Destination, Endpoint
from userspace.datagram.fanout import Fanout
from userspace.datagram.mmsg import MmsgLanes
from userspace.datagram.portable import PortableLanes
from userspace.datagram.socket_statistics import SendFailure
from userspace.native._native import ffi
from xdp.errors import UsageError

if TYPE_CHECKING:
    from userspace.native._native import CData

_UNTOUCHED = (SendFailure(-1, 0),)

#: Buffers begin on cache lines of their own, so that threads which write different ones don't meet.
_LINE = 64


def through_kernel(
    kernel: MmsgLanes | PortableLanes,
    send: Callable[[], int],
    tell: Callable[[tuple[SendFailure, ...]], None],
) -> None:
    """Send, and tell what failed; also when it raises in the middle, unless nothing was done then."""
    before, kernel.failures = kernel.failures, _UNTOUCHED
    try:
        send()
    finally:
        if kernel.failures is _UNTOUCHED:
            kernel.failures = before
        else:
            tell(kernel.failures)


class PlainOutlet:
    """A pool of ``buffers`` buffers of ``size`` bytes; as XskOutlet otherwise."""

    def __init__(self, lanes: MmsgLanes | PortableLanes, buffers: int, size: int) -> None:
        slot = -(-size // _LINE) * _LINE
        if not 0 < buffers <= 1 << 20 or not 0 < size <= 65_535 or buffers * slot >= 1 << 32:
            raise UsageError(
                f"{buffers} buffers of {size} bytes",
                hint="1 to 1,048,576 buffers of 1 to 65,535 bytes, less than 4 GiB together",
            )
        self.lanes = lanes
        self.failures: tuple[SendFailure, ...] | None = None
        self.maximum_size = size
        self._total = buffers
        # Mapped, not a bytearray: pages that are never used cost nothing.
        self._memory = mmap.mmap(-1, buffers * slot)
        self.area: tuple[CData, int] = (ffi.from_buffer("uint8_t[]", self._memory), len(self._memory))
        #: a stack: what was used last is used next
        self._free = array("I", range((buffers - 1) * slot, -1, -slot))

    @property
    def held(self) -> int:
        """Buffers that are not free."""
        return self._total - len(self._free)

    def reserve(self, memory: CData, count: int, size: int) -> int:
        """As XskOutlet.reserve."""
        if self.lanes._closed:
            raise ValueError("these lanes are closed")
        count = min(count, len(self._free))
        taken = self._free[len(self._free) - count :]
        del self._free[len(self._free) - count :]
        taken.reverse()
        ffi.memmove(memory.offsets, taken, 4 * count)
        ffi.memmove(memory.lengths, array("I", (size,)) * count, 4 * count)
        return count

    def give_back(self, offsets: CData, count: int) -> None:
        """As XskOutlet.give_back."""
        back = array("I", ffi.unpack(offsets, count))
        back.reverse()
        self._free += back

    def send(self, to: Destination | Endpoint, memory: CData, port: int | None) -> None:
        """As XskOutlet.send."""
        endpoint = _endpoint(to)
        if isinstance(self.lanes, MmsgLanes):
            mmsg = self.lanes
            self._through(memory, lambda: mmsg.send_memory(endpoint, memory, port=port))
        else:
            portable = self.lanes
            self._through(memory, lambda: portable.send(endpoint, self._views(memory), port=port))

    def send_many(self, fanout: Fanout, memory: CData, port: int | None) -> None:
        """As XskOutlet.send_many."""
        if isinstance(self.lanes, MmsgLanes):
            mmsg = self.lanes
            self._through(memory, lambda: mmsg.send_memory(fanout, memory, port=port))
        else:
            portable = self.lanes
            self._through(memory, lambda: portable.send_many(fanout, self._views(memory), port=port))

    def _views(self, memory: CData) -> list[memoryview]:
        whole, count = memoryview(self._memory), memory.count
        columns = zip(ffi.unpack(memory.offsets, count), ffi.unpack(memory.lengths, count), strict=True)
        return [whole[start : start + length] for start, length in columns]

    def _through(self, memory: CData, send: Callable[[], int]) -> None:
        def tell(failures: tuple[SendFailure, ...]) -> None:
            self.failures = failures
            failed = {one.index for one in failures}
            sent = [memory.offsets[index] for index in range(memory.count) if index not in failed]
            self.give_back(ffi.new("uint32_t[]", sent), len(sent))

        through_kernel(self.lanes, send, tell)

    def send_vectored(
        self, to: Destination | Endpoint, packets: Sequence[Sequence[Buffer]], port: int | None
    ) -> int:
        """As XskOutlet.send_vectored."""
        sent = self.lanes.send_vectored(_endpoint(to), packets, port=port)
        self.failures = self.lanes.failures
        return sent

    def forward(
        self, batch: Batch, to: Destination | Endpoint | Fanout, port: int | None, *, checksum: bool
    ) -> int:
        """See ZeroCopyUDP.forward."""
        del checksum  # the kernel's own
        if batch.backend is not self.lanes:
            raise UsageError("a batch is forwarded through the lanes that it came from")
        endpoints = to.endpoints if isinstance(to, Fanout) else (_endpoint(to),)
        batch.detach()
        sent = 0
        failures: list[SendFailure] = []
        try:
            for place, endpoint in enumerate(endpoints if batch else ()):
                sent += self.lanes.send(endpoint, batch, port=port)
                failures += [
                    SendFailure(one.index * len(endpoints) + place, one.errno) for one in self.lanes.failures
                ]
        finally:
            batch.release()
            self.failures = tuple(sorted(failures, key=lambda one: one.index))
        return sent


def _endpoint(to: Destination | Endpoint) -> Endpoint:
    if isinstance(to, Destination):
        raise UsageError("kernel sockets make their own headers", hint="give an (address, port)")
    return to
