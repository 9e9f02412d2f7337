# SPDX-License-Identifier: Apache-2.0
"""Lanes over AF_XDP: receiving from and sending to rings that are open already.

Needs no privileges.  Made by :func:`userspace.datagram.lanes.attach_lanes` from
:class:`~userspace.datagram.descriptors.LaneDescriptors`.
"""

from __future__ import annotations

import errno
import os
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self

from typing_extensions import Buffer

from userspace.datagram import busy_poll
from userspace.datagram.batch import Abandoned, Batch
from userspace.datagram.companion import Companion
from userspace.datagram.descriptors import LaneDescriptors, LaneSpec, Mode, QueueDescriptors
from userspace.datagram.destination import Destination, Endpoint
from userspace.datagram.fanout import Fanout
from userspace.datagram.linger import Linger
from userspace.datagram.mmsg import MmsgLanes
from userspace.datagram.pin import Pins, Where
from userspace.datagram.socket_errors import SocketError
from userspace.datagram.socket_statistics import SendFailure
from userspace.datagram.xsk_queues import failure, map_queue, watch_queues
from userspace.datagram.xsk_send import FrameTooSmallError, Sender
from userspace.datagram.xsk_statistics import Frames, XskStatistics, describe, read_frames, read_queues
from userspace.native._native import ffi, lib
from xdp.errors import UsageError

if TYPE_CHECKING:
    from userspace.native._native import CData

#: Packets of a batch unless more are asked for: enough to make the cost of a Python call small
#: beside them (2 µs over 256 packets), few enough that their headers stay in the first-level cache.
DEFAULT_BATCH = 256

# Looked up once: an attribute of lib costs 35 ns at every use.
_receive = lib.sl_group_receive
_release = lib.sl_queue_release

_FOREVER = -1.0  # sl_group_receive without a timeout

#: Receive calls between two looks at the companion sockets while the queues never run dry; a look
#: costs about a microsecond, so this keeps it below a hundredth of the time of 256-packet batches.
COMPANION_TURN = 32


class XskLanes:
    """All lanes of some queues of one interface.

    ``receive`` gives the packets of one queue, highest lane first, and begins
    with the next queue the next time.  A lane whose application holds its quota
    is not read until batches are given back; its ring fills and the kernel drops
    for that lane alone.

    Calls from several threads are safe and wait for each other.  For several
    threads that receive, :meth:`split` gives each queue its own object.
    """

    def __init__(
        self,
        descriptors: LaneDescriptors,
        *,
        companion: Companion | None = None,
        on_close: Callable[[], None] | None = None,
    ) -> None:
        """Take over ``descriptors``, which are closed when that fails, and ``companion``.

        What arrives at the companion's sockets is received here too, in batches of
        its own.  ``on_close`` runs once at the end.
        """
        if not descriptors.open:
            raise UsageError("these descriptors were attached or closed before")
        self._queues: list[CData] = []
        self._children: tuple[XskLanes, ...] = ()
        try:
            with descriptors:
                self._adopt(descriptors)
        except BaseException:
            self._queues.clear()
            raise
        self._setup(
            descriptors, self._queues, descriptors.queues, slot=0, companion=companion, on_close=on_close
        )

    def _adopt(self, descriptors: LaneDescriptors) -> None:
        # A queue closes the numbers it was given, so each side needs its own until all are open.
        for queue in descriptors.queues:
            umem, *sockets, transmit = copies = [os.dup(fd) for fd in queue.descriptors()]
            try:
                opened = map_queue(descriptors, QueueDescriptors(queue.queue, umem, sockets, transmit))
            except BaseException:
                for fd in copies:
                    os.close(fd)
                raise
            self._queues.append(opened)

    def _setup(
        self,
        descriptors: LaneDescriptors,
        queues: Sequence[CData],
        numbers: Sequence[QueueDescriptors],
        *,
        slot: int,
        companion: Companion | None,
        on_close: Callable[[], None] | None,
    ) -> None:
        self._descriptors = descriptors
        self._queues = list(queues)
        self._numbers = tuple(queue.queue for queue in numbers)
        self._group = watch_queues(self._queues, slot)
        self._is_part = slot == 1
        # One without sockets never has anything.
        self._companion = companion if companion is not None and companion.fileno() >= 0 else None
        self._turn = 0
        self._linger = Linger()
        if self._companion is not None:
            error = lib.sl_group_watch(self._group, self._companion.fileno())
            if error:
                raise failure(self.interface, -error, "watching companion sockets")
        self._on_close = on_close
        self._closing = threading.Lock()
        self._closed = False
        self._abandoned: deque[Abandoned] = deque()
        self._capacity = DEFAULT_BATCH
        self._spare: list[CData] = []
        #: of the last send_many
        self.failures: tuple[SendFailure, ...] = ()
        self._sender = Sender(self._queues[0], descriptors.interface, descriptors.geometry.frame_size)
        self._pins = Pins(descriptors.interface, descriptors.ifindex, descriptors.pin)

    @property
    def mode(self) -> Mode:
        """One of "native-zero-copy", "native-copy" and "generic-copy"."""
        return self._descriptors.mode

    @property
    def interface(self) -> str:
        """Name of the interface when the lanes were opened."""
        return self._descriptors.interface

    @property
    def lanes(self) -> tuple[LaneSpec, ...]:
        """Highest priority first."""
        return self._descriptors.lanes

    @property
    def queue_numbers(self) -> tuple[int, ...]:
        """The interface's queues that are served here."""
        return self._numbers

    def split(self) -> tuple[XskLanes, ...]:
        """One object per queue, for one thread each.

        They end with this object; the first one serves the companion sockets.  Packets
        come to whoever asks first, so use either these or the whole.
        """
        if self._closed:
            raise ValueError("these lanes are closed")
        if not self._children:
            made: list[XskLanes] = []
            for queue, number in zip(self._queues, self._descriptors.queues, strict=True):
                child = XskLanes.__new__(XskLanes)
                child._children = ()
                companion = None if made else self._companion
                child._setup(self._descriptors, [queue], [number], slot=1, companion=companion, on_close=None)
                made.append(child)
            self._children = tuple(made)
        return self._children

    def pin(self, where: Where = "policy") -> tuple[int, ...]:
        """Keep the calling thread on the CPUs for these queues until they are closed (see pin.py)."""
        return self._pins.pin(self._numbers, where, polls=busy_poll.describe(self._sockets())["polled"] > 0)

    def _sockets(self) -> list[int]:
        lanes = range(len(self.lanes))
        return [lib.sl_queue_socket(queue, lane) for queue in self._queues for lane in lanes]

    # receiving

    def _memory(self, maximum: int) -> CData:
        if not 1 <= maximum <= lib.SL_BATCH_MAX:
            raise UsageError(f"a batch is 1 to {lib.SL_BATCH_MAX} packets, not {maximum}")
        if maximum > self._capacity:
            self._capacity = 1 << (maximum - 1).bit_length()
            self._spare.clear()
        memory = lib.sl_batch_new(self._capacity)
        if memory == ffi.NULL:
            raise MemoryError(f"columns of {self._capacity} packets")
        return ffi.gc(memory, lib.sl_batch_free)

    def receive(
        self, maximum: int = DEFAULT_BATCH, timeout: float | None = None, *, linger: float = 0.0
    ) -> Batch:
        """At most ``maximum`` packets of one queue, waiting up to ``timeout`` seconds for the first.

        An empty batch when the time is over; without a timeout it waits for ever.
        With ``linger``, as long as two packets are expected in that many seconds, each call first sleeps
        (and the kernel's timer slack, 50 µs by default) so that batches get larger: less CPU time a packet.
        Raises InterfaceGoneError when the interface was deleted (one that is only
        down may come up again and go on), ValueError when the lanes are closed (also
        by another thread, meanwhile), UsageError when it would wait for ever because
        all that may be held is held.
        """
        if self._abandoned:
            self._reclaim()
        if self._companion is not None:
            self._turn += 1
            if self._turn >= COMPANION_TURN:
                self._turn = 0
                received = self._companion.try_receive(maximum)
                if received is not None:
                    return received
        spare = self._spare
        memory = spare.pop() if spare and 0 < maximum <= self._capacity else self._memory(maximum)
        if linger > 0:
            self._linger.wait(linger, maximum)
        wait = _FOREVER if timeout is None else timeout if timeout > 0 else 0.0
        count = _receive(self._group, memory, maximum, wait)
        if linger > 0:
            self._linger.received(count)
        if count > 0:
            return Batch(self, memory, count)
        return self._received_none(memory, maximum, count, timeout)

    def try_receive(self, maximum: int = DEFAULT_BATCH) -> Batch:
        """What is there now, maybe nothing."""
        return self.receive(maximum, 0)

    def _received_none(self, memory: CData, maximum: int, result: int, timeout: float | None) -> Batch:
        deadline = None if timeout is None else time.monotonic() + timeout
        # Python runs signal handlers between two calls.
        while result in {-errno.EINTR, -errno.EAGAIN}:
            if result == -errno.EAGAIN and self._companion is not None:
                received = self._companion.try_receive(maximum)
                if received is not None:
                    self._spare.append(memory)
                    return received
            left = _FOREVER if deadline is None else deadline - time.monotonic()
            if deadline is not None and left <= 0:
                result = 0
                break
            result = _receive(self._group, memory, maximum, left)
        if result > 0:
            return Batch(self, memory, result)
        self._spare.append(memory)
        if result < 0:
            raise failure(self.interface, -result, "receiving")
        return Batch(self, None, 0)

    def fileno(self) -> int:
        """An epoll descriptor: readable when ``try_receive`` may have something, or to say.

        For event loops.  Level-triggered; lanes that hold their quota do not count.
        """
        fd = lib.sl_group_fd(self._group)
        if fd < 0:
            raise ValueError("these lanes are closed")
        return fd

    # what a Batch needs

    def fill_columns(self, memory: CData) -> None:
        """See BatchBackend."""
        lib.sl_queue_columns(memory)

    def fill_sources(self, memory: CData) -> None:
        """See BatchBackend."""
        lib.sl_queue_sources(memory)

    def take_back(self, memory: CData) -> None:
        """See BatchBackend."""
        error = _release(memory)
        if error:
            raise failure(self.interface, -error, "giving back a batch")
        self._keep(memory)

    def _keep(self, memory: CData) -> None:
        # Columns from before larger batches were asked for are too small now.
        if self._capacity in (DEFAULT_BATCH, memory.capacity):
            self._spare.append(memory)

    def abandon(self, abandoned: Abandoned) -> None:
        """See BatchBackend."""
        self._abandoned.append(abandoned)

    def _reclaim(self) -> None:
        for _ in range(len(self._abandoned)):
            abandoned = self._abandoned.popleft()
            if not abandoned.reclaim():
                self._abandoned.append(abandoned)

    # sending

    def send(
        self,
        destination: Destination | Endpoint,
        payloads: Sequence[Buffer] | Batch,
        *,
        port: int | None = None,
    ) -> int:
        """Send each payload as one UDP packet; how many were accepted.

        Fewer than all when frames or the ring run out: send the rest later.
        ``destination`` is a Destination, or an (address, port) with ``port``, a service port, as the
        source port.  Such packets go where the kernel would send them, as it reports changes:
        as frames through the interface, or through the companion socket of ``port`` (own
        addresses, other interfaces, a neighbour that the kernel has to look up first; the whole
        call where a payload fits the MTU but no frame), which may overtake the frames before
        them; its ``failures`` are in ``companion.lanes``.  Without companion socket they go as
        resolve_destination says, which waits for neighbours and raises UnsupportedError.

        Raises UsageError for a payload that does not fit the MTU (nothing is sent
        then), InterfaceGoneError, ValueError when closed.
        """
        if isinstance(destination, Destination):
            return self._sender.send(destination, payloads)
        way = self._headers(destination, port)
        if isinstance(way, Destination):
            try:
                return self._sender.send(way, payloads)
            except FrameTooSmallError as error:
                way = self._kernel_instead(port, error)
        return way.send(destination, payloads, port=port, timeout=0)

    def _headers(self, destination: Endpoint, port: int | None) -> Destination | MmsgLanes:
        """What makes frames to an (address, port), or the kernel sockets that send there now."""
        if port is None:
            raise UsageError("which port to send from is not known", hint="give port=, one of your services'")
        kernel = self._kernel(port)
        if kernel is None:
            return self._sender.resolve(destination, port)
        return self._sender.find(destination, port) or kernel

    def _kernel(self, port: int) -> MmsgLanes | None:
        """Kernel sockets, if one of them sends from that port."""
        kernel = self._companion.lanes if self._companion is not None else None
        return kernel if kernel is not None and port in kernel.ports else None

    def _kernel_instead(self, port: int | None, error: FrameTooSmallError) -> MmsgLanes:
        kernel = None if port is None else self._kernel(port)
        if kernel is None:
            raise error
        return kernel

    def send_columns(
        self,
        destination: Destination | Endpoint,
        data: Buffer,
        offsets: Buffer,
        lengths: Buffer,
        *,
        port: int | None = None,
    ) -> int:
        """Send ``data[offsets[i]:offsets[i] + lengths[i]]``; as :meth:`send` otherwise.

        ``offsets`` and ``lengths`` are arrays of 32-bit numbers (array("I"), a
        column of a batch) of the same size.
        """
        if isinstance(destination, Destination):
            return self._sender.send_columns(destination, data, offsets, lengths)
        way = self._headers(destination, port)
        if isinstance(way, Destination):
            try:
                return self._sender.send_columns(way, data, offsets, lengths)
            except FrameTooSmallError as error:
                way = self._kernel_instead(port, error)
        whole = memoryview(data).cast("B")
        starts, sizes = (memoryview(numbers).cast("B").cast("I") for numbers in (offsets, lengths))
        pieces = [whole[at : at + size] for at, size in zip(starts, sizes, strict=True)]
        return way.send(destination, pieces, port=port, timeout=0)

    def send_many(
        self, fanout: Fanout, payloads: Buffer | Sequence[Buffer], *, port: int | None = None
    ) -> int:
        """Send one payload to all destinations, or one to each; how many were accepted.

        Each goes where :meth:`send` would send it.  A payload is copied once for each frame and summed
        once for all.  Which were not accepted says ``failures``: EAGAIN where frames or the ring ran out.
        What is longer than a path's MTU or a frame goes through the companion socket; without one that is
        UsageError.
        """
        if port is None:
            raise UsageError("which port to send from is not known", hint="give port=, one of your services'")
        sent, self.failures = self._sender.send_many(fanout, payloads, port, self._kernel(port))
        return sent

    def send_back(self, batch: Batch, *, checksum: bool = True) -> int:
        """Send every packet of a batch back to where it came from, in its own frame; the batch is used up.

        The payloads go as they are now, so write the answer into the views first (the
        length stays).  Packets that may not be answered (group addresses, IPv4
        options, IPv6 extension headers), those in several frames and what the ring has
        no room for are given back instead.  Returns how many are sent.

        ``checksum=False`` keeps the UDP checksum: right only for unchanged payloads
        that came over a wire.
        """
        backend = batch.backend
        if self._companion is not None and backend is self._companion.lanes:
            return self._companion.lanes.send_back(batch)
        if not isinstance(backend, XskLanes) or backend._descriptors is not self._descriptors:
            raise UsageError("a batch is sent back through the lanes that it came from")
        memory = batch.surrender()
        if memory is None:
            return 0
        sent = lib.sl_queue_echo(memory, checksum)
        if sent < 0:
            lib.sl_queue_release(memory)
            raise failure(self.interface, -sent, "sending back")
        backend._keep(memory)
        return sent

    def flush(self, timeout: float = 1.0) -> bool:
        """Wait until everything sent has left; whether it has after ``timeout`` seconds."""
        deadline = time.monotonic() + timeout
        while True:
            left = sum(max(0, lib.sl_queue_reap(queue)) for queue in self._queues)
            if left == 0:
                return True
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.0002)  # a completion wakes nobody; this is about the time of one batch

    @property
    def companion(self) -> Companion | None:
        """The kernel sockets served along with the queues."""
        return self._companion

    def statistics(self) -> XskStatistics:
        """What the sockets and rings counted; frames and where they are."""
        return read_queues(self._queues, self._numbers, self.lanes)

    def socket_errors(self) -> tuple[SocketError, ...]:
        """Errors of what was sent from a port with a companion socket, frames too; see Lanes."""
        kernel = self._companion.lanes if self._companion is not None else None
        return kernel.socket_errors() if kernel is not None else ()

    def frames(self) -> tuple[Frames, ...]:
        """Where the frames of each queue are, counted frame by frame: slow, for tests and checks."""
        return tuple(read_frames(queue, len(self.lanes), recount=True) for queue in self._queues)

    def status(self) -> dict[str, object]:
        """What is in use, JSON-able."""
        return {
            **describe(self._descriptors, self._numbers),
            "companion_ports": list(self._companion.ports) if self._companion is not None else [],
            "busy_poll": busy_poll.describe(self._sockets()),
        }

    def close(self) -> None:
        """Close everything; a receive that waits ends with ValueError.  May be called again.

        Batches that are held stay valid until they are released.
        """
        with self._closing:
            if self._closed:
                return
            self._closed = True
        for child in self._children:
            child.close()
        lib.sl_group_close(self._group)
        self._pins.restore()
        self._sender.close()
        if self._companion is not None and not self._is_part:
            self._companion.close()
        if not self._is_part:  # a part from split() leaves its queue to the whole
            for queue in self._queues:
                lib.sl_queue_close(queue)
        if self._on_close is not None:
            self._on_close()

    def __del__(self) -> None:
        if not getattr(self, "_closed", True) and not self._is_part:
            warnings.warn(f"{self!r} was never closed", ResourceWarning, source=self, stacklevel=2)
            self.close()

    @property
    def closed(self) -> bool:
        """Whether close() was called."""
        return self._closed

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
