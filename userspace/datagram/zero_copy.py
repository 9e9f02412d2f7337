# SPDX-License-Identifier: Apache-2.0
"""Sending from buffers that are frames, in which the payloads were written; forwarding received ones.

    sender = ZeroCopyUDP(lanes, port=8001)
    with sender.allocate(64, 1232) as buffers:
        for buffer in buffers:
            buffer[:] = shred()
        sender.send(("192.0.2.7", 8001), buffers)

Over AF_XDP the payload is where it is sent from: headers are written in front of it, and it is read
once, for its checksum.  Kernel sockets have the same interface with buffers of ordinary memory, which
the kernel copies, so a program does not care.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from typing_extensions import Buffer

from userspace.datagram.batch import Abandoned, Batch
from userspace.datagram.buffers import Buffers
from userspace.datagram.destination import Destination, Endpoint
from userspace.datagram.fanout import Fanout
from userspace.datagram.lanes import Lanes
from userspace.datagram.mmsg import MmsgLanes
from userspace.datagram.portable import PortableLanes
from userspace.datagram.receive_into import Received, receive_into
from userspace.datagram.socket_statistics import SendFailure
from userspace.datagram.xsk_lanes import XskLanes
from userspace.datagram.zero_copy_plain import PlainOutlet
from userspace.datagram.zero_copy_xsk import XskOutlet
from userspace.native._native import ffi, lib
from xdp.errors import UsageError

if TYPE_CHECKING:
    from userspace.native._native import CData

__all__ = ["Buffers", "Received", "ZeroCopyStatistics", "ZeroCopyUDP"]

# Columns that are used again and again; larger ones are made when asked for.
_CAPACITY = 256

#: Packets times destinations of one forward call, so that what it has to tell takes 64 MiB at most.
_MAX_FORWARDED = 1 << 24


@dataclass(frozen=True, slots=True)
class ZeroCopyStatistics:
    """Buffers since opening; ``held`` are the application's now.

    ``vectored`` and ``forwarded`` count packets, which used no buffers of the application.
    """

    allocated: int
    sent: int
    recycled: int
    held: int
    vectored: int
    forwarded: int

    @property
    def balanced(self) -> bool:
        """Whether allocated = sent + recycled + held, as it always must be."""
        return self.allocated == self.sent + self.recycled + self.held


class ZeroCopyUDP:
    """Allocates, sends and recycles buffers of some lanes; the lanes stay the caller's.

    ``port`` is the service port to send from, as in ``lanes.send``.  Over AF_XDP buffers are the
    transmit frames of the lanes' (first) queue, which all that is sent there shares.  Over kernel
    sockets there are ``buffers`` of at most ``buffer_size`` bytes.  Belongs to one thread.
    """

    def __init__(
        self, lanes: Lanes, *, port: int | None = None, buffers: int = 4096, buffer_size: int = 2048
    ) -> None:
        self._outlet: XskOutlet | PlainOutlet
        if isinstance(lanes, XskLanes):
            self._outlet = XskOutlet(lanes)
        elif isinstance(lanes, (MmsgLanes, PortableLanes)):
            self._outlet = PlainOutlet(lanes, buffers, buffer_size)
        else:
            raise UsageError(f"{lanes!r} are no lanes", hint="ZeroCopyUDP(open_lanes(...))")
        self._lanes = lanes
        self._port = port
        self._spare: list[CData] = []
        self._abandoned: deque[Abandoned] = deque()
        self._allocated = self._sent = self._recycled = self._vectored = self._forwarded = 0
        #: of the last call that sent: index in the call, and why (errno)
        self.failures: tuple[SendFailure, ...] = ()

    @property
    def maximum_size(self) -> int:
        """Bytes of the largest buffer that can be allocated; a path's MTU may allow less to be sent."""
        return self._outlet.maximum_size

    @property
    def area(self) -> tuple[CData, int]:
        """See BufferPool."""
        return self._outlet.area

    # buffers

    def allocate(self, count: int, size: int | None = None) -> Buffers:
        """Up to ``count`` (1 to 65,536) buffers of ``size`` bytes (the largest by default) to write into.

        As many as are free, maybe none: ``len()`` says how many.  What was sent is free again when
        the kernel has sent it.  Raises UsageError for a count or size out of range, ValueError when
        the lanes are closed.
        """
        if self._abandoned:
            self._reclaim()
        if size is None:
            size = self._outlet.maximum_size
        if not 0 <= size <= self._outlet.maximum_size:
            raise UsageError(f"buffers of {size} bytes; 0 to {self._outlet.maximum_size} are possible")
        if not 1 <= count <= lib.SL_BATCH_MAX:
            raise UsageError(f"{count} buffers; 1 to {lib.SL_BATCH_MAX} can be allocated at a time")
        memory = self._spare.pop() if self._spare and count <= _CAPACITY else _new_memory(count)
        reserved = self._outlet.reserve(memory, count, size)
        memory.count = reserved
        memory.data, memory.data_size = self._outlet.area
        self._allocated += reserved
        return Buffers(self, memory, reserved, size)

    def recycle(self, buffers: Buffers) -> None:
        """Give back what is left of ``buffers`` unsent.

        Raises ValueError when all were sent or recycled before, BufferError when a view's slice is
        still in use, UsageError when they are another ZeroCopyUDP's; they stay held then.
        """
        self._give_back(buffers.surrender(self))
        buffers.keep((), "recycled")

    def _give_back(self, memory: CData) -> None:
        count: int = memory.count
        self._outlet.give_back(memory.offsets, count)
        self._recycled += count

    def take_back(self, memory: CData) -> None:
        """For buffers that were neither sent nor recycled, at the next allocate."""
        self._give_back(memory)
        self.spare(memory)

    def spare(self, memory: CData) -> None:
        """See BufferPool."""
        if memory.capacity == _CAPACITY:
            self._spare.append(memory)

    def abandon(self, abandoned: Abandoned) -> None:
        """See BufferPool."""
        self._abandoned.append(abandoned)

    def _reclaim(self) -> None:
        for _ in range(len(self._abandoned)):
            abandoned = self._abandoned.popleft()
            if not abandoned.reclaim():
                self._abandoned.append(abandoned)

    def __del__(self) -> None:
        if getattr(self, "_abandoned", None):
            self._reclaim()

    # sending

    def send(
        self,
        destination: Destination | Endpoint,
        buffers: Buffers,
        *,
        lengths: int | Sequence[int] | None = None,
    ) -> int:
        """Send the payloads in ``buffers``, one packet each; how many were accepted.

        Where they go, and by which way, is as with ``lanes.send``; what goes through a kernel socket
        is copied by the kernel.  ``lengths`` are the bytes of payload in each, one number for all or
        one for each of the first ones (the others are not sent and stay yours); by default what was
        said last, at first the buffers' size.

        What was accepted is no longer in ``buffers``; what was not is, in order, with its payload:
        send it later, or recycle it.  ``failures`` says why, by index in the call: EAGAIN where the
        ring had no room.  All views of ``buffers`` end.

        Raises ValueError when they were all sent or recycled before, BufferError when a slice of a view is
        in use, UsageError for buffers of another ZeroCopyUDP, lengths out of range and, over AF_XDP, a
        payload that does not fit the MTU: nothing is sent then.  InterfaceGoneError as ``lanes.send``.
        """
        return self._deliver(
            buffers, lengths, lambda memory: self._outlet.send(destination, memory, self._port)
        )

    def send_many(
        self, fanout: Fanout, buffers: Buffers, *, lengths: int | Sequence[int] | None = None
    ) -> int:
        """Send one payload to each destination; otherwise as :meth:`send`.

        One payload to all is copied for each: that is ``lanes.send_many``.
        """

        def send(memory: CData) -> None:
            if memory.count != len(fanout):
                raise UsageError(f"{memory.count} payloads for {len(fanout)} destinations")
            self._outlet.send_many(fanout, memory, self._port)

        return self._deliver(buffers, lengths, send)

    def _deliver(
        self, buffers: Buffers, lengths: int | Sequence[int] | None, send: Callable[[CData], None]
    ) -> int:
        memory = buffers.surrender(self)
        if lengths is not None:
            buffers.set_lengths(lengths)
        total = len(buffers)
        count = total if lengths is None or isinstance(lengths, int) else len(lengths)
        self.failures = ()
        if not count:
            return 0
        outlet = self._outlet
        outlet.failures = None
        memory.count = count
        try:
            send(memory)
        finally:
            memory.count = total
            failures = _told(outlet)
            if failures is not None:
                self.failures = failures
                self._sent += count - len(failures)
                buffers.keep([*(one.index for one in failures), *range(count, total)], "sent")
        return count - len(self.failures)

    def send_vectored(self, destination: Destination | Endpoint, packets: Sequence[Sequence[Buffer]]) -> int:
        """Send each of ``packets`` as one, put together from pieces (64 at most): ``[[header, body], ...]``.

        Over AF_XDP each piece is copied once, into the frame; over kernel sockets by the kernel alone.
        Otherwise as ``lanes.send``, with ``failures`` of those that were not accepted.
        """
        self.failures = ()
        if not packets:
            return 0
        sent = self._outlet.send_vectored(destination, packets, self._port)
        self.failures = self._outlet.failures or ()
        self._vectored += sent
        return sent

    def forward(
        self, batch: Batch, destination: Destination | Endpoint | Fanout, *, checksum: bool = True
    ) -> int:
        """Send every payload of a received batch on, as it is now; how many packets were accepted.

        To a Fanout each of them goes to all destinations.  Over AF_XDP a packet goes in its own frame
        under new headers (to a fan-out: the last one; the others get copies), and the frame returns
        to its lane when it is sent; of a packet that came in several frames (jumbo) all are copies, where
        its payload fits one frame.  The batch is used up, as after ``lanes.send_back``, and what was not
        accepted is given back: ``failures`` has its ``index`` (packet * destinations + destination)
        and errno: EAGAIN (no room), EMSGSIZE (longer than the MTU, or than a frame).

        ``checksum=False``: the payloads are unchanged and came over a wire, so the sender's UDP checksum
        is carried over without reading them, and a damaged one stays damaged.

        Refused, and the batch stays held: UsageError (not received through these lanes, no port),
        BufferError and ValueError as ``lanes.send_back``.
        """
        if isinstance(destination, Fanout) and len(batch) * len(destination) > _MAX_FORWARDED:
            raise UsageError(f"{len(batch)} packets to {len(destination)} destinations in one call")
        self.failures, self._outlet.failures = (), ()
        try:
            sent = self._outlet.forward(batch, destination, self._port, checksum=checksum)
        finally:
            self.failures = _told(self._outlet) or ()
        self._forwarded += sent
        return sent

    # receiving

    def receive_into(
        self,
        buffers: Buffers | Buffer | Sequence[Buffer],
        size: int | None = None,
        *,
        timeout: float | None = None,
        sources: bool = False,
    ) -> Received:
        """Receive into memory of the caller: one packet into each buffer, as ``lanes.receive`` otherwise.

        ``buffers`` are Buffers, a sequence of writable bytes-like objects, or a single one; with
        ``size`` that is cut into as many of ``size`` bytes as fit.  What is longer is cut off.  Each
        payload is copied once, from the frame that the lanes received it into (policy and lanes come
        first, so also kernel sockets read into frames of their own): :meth:`forward` and
        ``lanes.receive`` copy nothing.
        """
        return receive_into(self._lanes, buffers, size, timeout, sources=sources)

    # looking

    def statistics(self) -> ZeroCopyStatistics:
        """Counters since it was made."""
        return ZeroCopyStatistics(
            self._allocated, self._sent, self._recycled, self._outlet.held, self._vectored, self._forwarded
        )


def _told(outlet: XskOutlet | PlainOutlet) -> tuple[SendFailure, ...] | None:
    """None: nothing was sent, and nothing of it is the outlet's now."""
    return outlet.failures


def _new_memory(count: int) -> CData:
    memory = lib.sl_batch_new(max(count, _CAPACITY))
    if memory == ffi.NULL:
        raise MemoryError(f"columns of {count} buffers")
    return ffi.gc(memory, lib.sl_batch_free)
