# SPDX-License-Identifier: Apache-2.0
"""Sending that waits for room in the event loop, not in a system call.

An outlet makes one attempt to send through lanes of its kind, which never waits, and tells what found no
room; :func:`persist` goes on with that when there is some.  What there is to wait for:

==============  =============================================================================
kernel sockets  a full socket buffer (EAGAIN): the loop tells when the socket is writable; a
                full device queue (ENOBUFS) has no event, it is asked again
AF_XDP          frames come back by the completion ring, which wakes nobody: asked again
==============  =============================================================================

Asked again means after :data:`RETRY` seconds, and twice as many each time that nothing was accepted, up to
:data:`RETRY_MAXIMUM`.

The backends' own calls either wait by themselves or use a batch up after one attempt, so this module reaches
into them in places.
"""

from __future__ import annotations

import asyncio
import errno
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias

from typing_extensions import Buffer

from userspace.datagram.batch import Batch
from userspace.datagram.destination import Destination, Endpoint
from userspace.datagram.fanout import Fanout
from userspace.datagram.mmsg import MmsgLanes
from userspace.datagram.plain_send import Datagram
from userspace.datagram.portable import PortableLanes
from userspace.datagram.socket_statistics import SendFailure
from userspace.datagram.sockets import SocketAddress, socket_of
from userspace.datagram.xsk_lanes import XskLanes
from userspace.datagram.xsk_queues import failure
from userspace.native._native import ffi, lib
from xdp.errors import UsageError

if TYPE_CHECKING:
    from userspace.native._native import CData

#: What a datagram fails with that may be sent later.
FULL = frozenset((errno.EAGAIN, errno.ENOBUFS))

#: Seconds.  The shortest that asyncio's epoll can wait; a transmit ring of 2,048 needs about as long.
RETRY = 0.001
#: Seconds.  While nothing moves (the interface is down, say), a hundred looks a second are enough.
RETRY_MAXIMUM = 0.01
#: Seconds to wait for a writable socket before trying again all the same: lanes that were closed are found
#: so, and so is a descriptor that was.
WRITABLE_MAXIMUM = 0.1

#: Seconds.  Headers that are about to be asked for anew are, so that no attempt has to do it.
RESOLVED_MARGIN = 0.5

#: How many were accepted, and which were not, by index in the whole call.
Attempt: TypeAlias = tuple[int, Sequence[SendFailure]]


@dataclass(slots=True)
class Outcome:
    """What has become of a call's datagrams so far; also true when it was cancelled or raised."""

    sent: int = 0
    failures: tuple[SendFailure, ...] = ()


class Outlet(Protocol):
    """Sends through lanes of one kind, never waiting; UsageError and the like are those of ``Lanes.send``."""

    def send(
        self, destination: Destination | Endpoint, payloads: Sequence[Buffer] | Batch, port: int | None
    ) -> Attempt:
        """One attempt."""

    def send_many(self, fanout: Fanout, payloads: Buffer | Sequence[Buffer], port: int | None) -> Attempt:
        """One attempt."""

    async def send_back(self, batch: Batch, outcome: Outcome) -> None:
        """All of it."""

    def unknown(self, destinations: Iterable[Endpoint], port: int | None) -> list[Endpoint]:
        """Those that an attempt would have to wait for, because their headers are not known."""

    async def prepare(self, destinations: Iterable[Endpoint], port: int | None) -> None:
        """Learn the headers of those; raises what resolve_destination raises."""

    async def room(self, port: int | None, error: int, pause: float) -> None:
        """Until an attempt that found no room (``error``) is worth repeating."""

    def count_failed(self, number: int) -> None:
        """So many more (or fewer) datagrams of past attempts have failed for good."""


def outlet_of(lanes: object) -> Outlet:
    """The one for lanes of any kind."""
    if isinstance(lanes, XskLanes):
        return XskOutlet(lanes)
    if isinstance(lanes, (MmsgLanes, PortableLanes)):
        return KernelOutlet(lanes)
    raise UsageError(f"{lanes!r} are no lanes", hint="open_lanes() and attach_lanes() make some")


async def persist(
    outlet: Outlet,
    attempt: Callable[[Sequence[int] | None], Attempt],
    outcome: Outcome,
    count: int,
    *,
    port_of: Callable[[int], int | None],
    to: Sequence[Endpoint] = (),
) -> None:
    """Repeat an attempt with what found no room, until all is sent or has failed for another reason.

    ``attempt`` gets the indices to send, None for all ``count``; ``port_of`` says from which port one
    leaves; ``to`` are the destinations whose headers it needs.  When this is cancelled while it waits, or
    waiting fails, what is left has failed with ECANCELED.
    """
    given_up: list[SendFailure] = []
    failures: Sequence[SendFailure] = ()
    pause = RETRY
    try:
        try:
            await outlet.prepare(to, port_of(0))
        except BaseException:
            failures = [SendFailure(index, errno.ECANCELED) for index in range(count)]
            raise
        outcome.sent, failures = attempt(None)
        while failures:
            given_up += [one for one in failures if one.errno not in FULL]
            left = [one for one in failures if one.errno in FULL]
            failures = [SendFailure(one.index, errno.ECANCELED) for one in left]
            if not left:
                break
            port = port_of(left[0].index)
            try:
                await outlet.room(port, left[0].errno, pause)
                await outlet.prepare(to, port)
            except BaseException:
                outlet.count_failed(len(left))
                raise
            sent, failures = attempt([one.index for one in left])
            outcome.sent += sent
            pause = RETRY if sent else min(2 * pause, RETRY_MAXIMUM)
    finally:
        outcome.failures = _by_index([*given_up, *failures])


def _by_index(failures: Iterable[SendFailure]) -> tuple[SendFailure, ...]:
    return tuple(sorted(failures, key=lambda one: one.index))


async def writable(descriptor: int) -> None:
    """Until there is room in a socket's buffer, or :data:`WRITABLE_MAXIMUM` seconds."""
    loop = asyncio.get_running_loop()
    # A number of our own: whoever closes the socket meanwhile does not make another file of it.
    own = os.dup(descriptor)
    done = loop.create_future()

    def wake() -> None:
        if not done.done():
            done.set_result(None)

    timer = loop.call_later(WRITABLE_MAXIMUM, wake)
    try:
        loop.add_writer(own, wake)
        await done
    finally:
        timer.cancel()
        loop.remove_writer(own)
        os.close(own)


class KernelOutlet:
    """Through kernel sockets: mmsg, portable, companions."""

    def __init__(self, lanes: MmsgLanes | PortableLanes) -> None:
        self._lanes = lanes

    def send(
        self, destination: Destination | Endpoint, payloads: Sequence[Buffer] | Batch, port: int | None
    ) -> Attempt:
        """See Outlet."""
        if isinstance(destination, Destination):
            raise UsageError("a Destination is for AF_XDP", hint="give an (address, port)")
        return self._told(self._lanes.send(destination, payloads, port=port, timeout=0))

    def send_many(self, fanout: Fanout, payloads: Buffer | Sequence[Buffer], port: int | None) -> Attempt:
        """See Outlet."""
        return self._told(self._lanes.send_many(fanout, payloads, port=port, timeout=0))

    def _told(self, sent: int) -> Attempt:
        failures = self._lanes.failures
        if failures:
            # What is tried again has not failed.
            self.count_failed(-sum(one.errno in FULL for one in failures))
        return sent, failures

    def count_failed(self, number: int) -> None:
        """See Outlet."""
        if isinstance(self._lanes, MmsgLanes):
            self._lanes._send_failed += number
        else:
            self._lanes._counts["send_failed"] += number

    def unknown(self, destinations: Iterable[Endpoint], port: int | None) -> list[Endpoint]:
        """See Outlet.  The kernel finds out by itself."""
        del destinations, port
        return []

    async def prepare(self, destinations: Iterable[Endpoint], port: int | None) -> None:
        """See Outlet."""

    async def room(self, port: int | None, error: int, pause: float) -> None:
        """See Outlet."""
        if error == errno.ENOBUFS:
            await asyncio.sleep(pause)
            return
        sockets = self._lanes._sockets
        descriptor = sockets[socket_of(sockets, port)].socket.fileno()
        if descriptor >= 0:  # or the next attempt tells that it was closed
            await writable(descriptor)

    async def send_back(self, batch: Batch, outcome: Outcome) -> None:
        """See Outlet; the batch is used up, also when cancelled."""
        lanes = self._lanes
        if batch.backend is not lanes:
            raise UsageError("a batch is sent back through the lanes that it came from")
        memory = batch.surrender()
        if memory is None:
            return
        ports = lanes.port_of_socket
        back = self._back_mmsg if isinstance(lanes, MmsgLanes) else self._back_portable
        try:
            await persist(
                self,
                lambda left: back(memory, left),
                outcome,
                memory.count,
                port_of=lambda index: ports[memory.sizes[index]],  # sizes: the socket by which it came
            )
        finally:
            lanes.take_back(memory)

    def _back_mmsg(self, memory: CData, left: Sequence[int] | None) -> Attempt:
        lanes = self._lanes
        assert isinstance(lanes, MmsgLanes)
        lanes._make_room(memory.count)
        if left is None:
            order = lanes._failed[2]
            arguments = (lanes._native, memory, order)
            return self._told(lanes._run(lib.sl_mmsg_send_back, arguments, memory.count, order, 0))
        sent = 0
        failures: list[SendFailure] = []
        for number, indices in _by_socket(memory, left).items():
            order = ffi.new("uint32_t[]", indices)
            out = ffi.new("struct sl_outgoing *")
            out.base, out.offset, out.length = memory.data, memory.offsets, memory.lengths
            out.destination, out.destinations = memory.sources, 2  # not 1: each has its own
            out.order, out.count = order, len(indices)
            arguments = (lanes._native, number, out)
            more, untold = self._told(lanes._run(lib.sl_mmsg_send_from, arguments, len(indices), order, 0))
            sent += more
            failures += untold
        return sent, failures

    def _back_portable(self, memory: CData, left: Sequence[int] | None) -> Attempt:
        lanes = self._lanes
        assert isinstance(lanes, PortableLanes)
        lanes._opened()
        groups: dict[int, list[Datagram]] = {}
        for number, indices in _by_socket(memory, range(memory.count) if left is None else left).items():
            groups[number] = [
                (
                    index,
                    lanes._view[memory.offsets[index] : memory.offsets[index] + memory.lengths[index]],
                    SocketAddress.unpack(bytes(ffi.buffer(memory.sources + index))),
                )
                for index in indices
            ]
        return self._told(lanes._send(groups, 0))


def _by_socket(memory: CData, indices: Iterable[int]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for index in indices:
        found.setdefault(memory.sizes[index], []).append(index)
    return found


class XskOutlet:
    """Through the transmit ring, and through the companion socket of a port as ``XskLanes`` does."""

    def __init__(self, lanes: XskLanes) -> None:
        self._lanes = lanes
        self._pushing: asyncio.AbstractEventLoop | None = None

    def send(
        self, destination: Destination | Endpoint, payloads: Sequence[Buffer] | Batch, port: int | None
    ) -> Attempt:
        """See Outlet."""
        lanes = self._lanes
        headers = destination if isinstance(destination, Destination) else lanes._headers(destination, port)
        if not isinstance(headers, Destination):
            assert not isinstance(destination, Destination)
            return KernelOutlet(headers).send(destination, payloads, port)
        sent = lanes.send(headers, payloads)
        self._push()
        return sent, [SendFailure(index, errno.EAGAIN) for index in range(sent, len(payloads))]

    def send_many(self, fanout: Fanout, payloads: Buffer | Sequence[Buffer], port: int | None) -> Attempt:
        """See Outlet."""
        lanes = self._lanes
        kernel = lanes._kernel(port) if port is not None else None
        before = kernel._send_failed if kernel is not None else 0
        sent = lanes.send_many(fanout, payloads, port=port)
        self._push()
        if kernel is not None and kernel._send_failed != before:
            KernelOutlet(kernel)._told(0)
        return sent, lanes.failures

    def count_failed(self, number: int) -> None:
        """See Outlet.  Nobody counts what the ring had no room for."""

    def unknown(self, destinations: Iterable[Endpoint], port: int | None) -> list[Endpoint]:
        """See Outlet.  With a companion socket on the port there are none: the kernel sends meanwhile."""
        if port is None or self._lanes._kernel(port) is not None:
            return []
        resolved, soon = self._lanes._sender._resolved, time.monotonic() + RESOLVED_MARGIN
        found = []
        for destination in dict.fromkeys(destinations):
            known = resolved.get((*destination, port))
            if known is None or known[0] < soon:
                found.append(destination)
        return found

    async def prepare(self, destinations: Iterable[Endpoint], port: int | None) -> None:
        """See Outlet.  In a thread: a silent neighbour takes seconds, and who asks runs a loop of its own."""
        sender = self._lanes._sender
        for destination in self.unknown(destinations, port):
            assert port is not None  # all are known then
            sender._resolved.pop((*destination, port), None)
            await asyncio.get_running_loop().run_in_executor(None, sender.resolve, destination, port)

    async def room(self, port: int | None, error: int, pause: float) -> None:
        """See Outlet."""
        del port, error
        await asyncio.sleep(pause)

    async def send_back(self, batch: Batch, outcome: Outcome) -> None:
        """See Outlet.  Room is waited for first: what finds none is given back, unsent.

        Cancelled before, the batch stays held.  One that is larger than the transmit ring
        goes in pieces; it is used up, also when cancelled.
        """
        lanes = self._lanes
        companion = lanes.companion.lanes if lanes.companion is not None else None
        if companion is not None and batch.backend is companion:
            await KernelOutlet(companion).send_back(batch, outcome)
            return
        ring = lanes._descriptors.geometry.transmit_ring
        if len(batch) <= ring:
            await self._ring_room(len(batch), ring)
            outcome.sent = lanes.send_back(batch)
            self._push()
            return
        if not isinstance(batch.backend, XskLanes) or batch.backend._descriptors is not lanes._descriptors:
            raise UsageError("a batch is sent back through the lanes that it came from")
        await self._back_in_pieces(batch, ring, outcome)

    async def _back_in_pieces(self, batch: Batch, ring: int, outcome: Outcome) -> None:
        backend, memory = batch.backend, batch.surrender()
        assert isinstance(backend, XskLanes)
        assert memory is not None
        part, done, count = ffi.new("struct sl_batch *"), 0, memory.count
        part.data, part.data_size, part.owner = memory.data, memory.data_size, memory.owner

        def take(size: int) -> None:
            part.addresses, part.sizes = memory.addresses + done, memory.sizes + done
            part.lanes, part.count = memory.lanes + done, size

        try:
            while done < count:
                size = min(count - done, ring)
                await self._ring_room(size, ring)
                take(size)
                # Packets may leave with a checksum of their own, as with XskLanes.send_back.
                sent = lib.sl_queue_echo(part, 1)
                if sent < 0:
                    raise failure(self._lanes.interface, -sent, "sending back")
                done += size
                outcome.sent += sent
                self._push()
        finally:
            take(count - done)
            if part.count:
                lib.sl_queue_release(part)
            memory.count = 0
            backend._keep(memory)

    async def _ring_room(self, wanted: int, ring: int) -> None:
        """Until the transmit ring has room; raises InterfaceGoneError and, when closed, ValueError."""
        lanes, pause, before = self._lanes, RETRY, 0
        while True:
            there = [lib.sl_queue_reap(queue) for queue in lanes._queues]
            if min(there) < 0:
                raise failure(lanes.interface, -min(there), "sending back")
            if max(there) + wanted <= ring:
                return
            for queue in lanes._queues:
                if lib.sl_xsk_check(lib.sl_queue_transmit_socket(queue)) == -errno.ENXIO:
                    raise failure(lanes.interface, errno.ENXIO, "sending back")
            pause = min(2 * pause, RETRY_MAXIMUM) if sum(there) == before else RETRY
            before = sum(there)
            await asyncio.sleep(pause)

    def _push(self) -> None:
        """See to it that what is in the ring leaves it: the kernel may have taken only a part so far."""
        loop = asyncio.get_running_loop()
        if self._pushing is not loop:
            self._pushing = loop
            loop.call_later(RETRY, self._push_on, loop, RETRY)

    def _push_on(self, loop: asyncio.AbstractEventLoop, pause: float) -> None:
        if self._lanes.flush(0):  # also when they are closed
            self._pushing = None
        else:
            pause = min(2 * pause, RETRY_MAXIMUM)
            loop.call_later(pause, self._push_on, loop, pause)
