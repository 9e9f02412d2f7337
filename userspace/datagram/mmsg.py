# SPDX-License-Identifier: Apache-2.0
"""Lanes over kernel sockets, many datagrams per system call (recvmmsg, sendmmsg).

The rung of the mode ladder below AF_XDP: the same policy, lanes and batches, at
the speed of the kernel's UDP.  With the select program (selected.py) each lane has
sockets of its own, which the kernel fills by the policy, and a flood in a low lane
costs a high one nothing from there on.  Without it (``selected_by``), on one port all
lanes share a socket buffer, and what the kernel drops there was never classified.
Behind the buffer the promise holds: each lane has a queue and frames of its own, and
while several lanes have traffic a receive call reads several times what it hands out,
so that high lanes get through at the expense of low ones.
"""

from __future__ import annotations

import errno
import math
import time
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address
from typing import TYPE_CHECKING

from typing_extensions import Buffer

from userspace.datagram.batch import Abandoned, Batch
from userspace.datagram.busy_poll import set_on
from userspace.datagram.classifier import DatagramClassifier
from userspace.datagram.fanout import Fanout, outgoing
from userspace.datagram.linger import Linger
from userspace.datagram.mmsg_statistics import read_census, read_statistics, take_errors
from userspace.datagram.pieces import Pieces
from userspace.datagram.plain_send import FATAL, gone
from userspace.datagram.selected import LaneSocket
from userspace.datagram.socket_errors import SocketError
from userspace.datagram.socket_lanes import KernelSocketLanes
from userspace.datagram.socket_statistics import SendFailure, SocketStatistics
from userspace.datagram.sockets import (
    ServiceSocket,
    SocketAddress,
    SocketLane,
    close_sockets,
    socket_lanes,
    socket_of,
)
from userspace.native._native import ffi, lib
from xdp.errors import SluiceError, UsageError
from xdp.policy import Policy
from xdp.select import SelectProgram

if TYPE_CHECKING:
    from userspace.native._native import CData

Address = IPv4Address | IPv6Address

#: Large frames (64 KiB, touched only when used) that each lane may queue and hold.
LARGE_FRAMES = 32
#: Times what a call hands out that it reads while datagrams of several lanes arrive.
DRAIN = 4
#: Seconds that send waits for room in the socket buffer or the device queue.
SEND_TIMEOUT = 1.0

_BATCH_CAPACITY = 256
_DESTINATIONS = 1024  # parsed destinations that are kept
# Looked up once: an attribute of lib costs 35 ns at every use.
_receive = lib.sl_mmsg_receive
_release = lib.sl_mmsg_release


class MmsgLanes(KernelSocketLanes):
    """Receives in lanes and sends through the kernel sockets of a policy's ports.

    ``sockets``: already opened ones (privileged ports, handed over); they are
    closed with this object.  Without, one per port is opened here.  ``budget``
    bounds what one call reads, 0: only ``maximum`` does.  ``gro``: datagrams of one flow
    that arrive together are read in one message.  ``timestamps``: ``times`` says when the
    kernel took a datagram from the interface, not when it was read; so does a policy with a
    lane that wants timestamps.  ``selected``: sockets
    that the kernel chooses by lane (not with ``gro``), by ``program`` if that ends with this
    object; both are closed with it, also when it can't be made.  Belongs to one thread.

    Raises what open_service_sockets raises, and UsageError for options out of range.
    """

    mode = "mmsg"
    _classifier: DatagramClassifier

    def __init__(
        self,
        policy: Policy,
        sockets: Iterable[ServiceSocket] | None = None,
        *,
        quota: int | None = None,
        frame_size: int | None = None,
        large_frames: int = LARGE_FRAMES,
        drain: int | None = None,
        budget: int = 0,
        gro: bool = False,
        timestamps: bool = False,
        selected: Sequence[LaneSocket] | None = None,
        program: SelectProgram | None = None,
    ) -> None:
        self._closed = False
        self._selected, self.program = selected, program
        self._sockets: list[ServiceSocket] = []  # close() may come before any is open
        self._native: CData = ffi.NULL
        self._outstanding = 0
        self._abandoned: list[Abandoned] = []
        self._linger = Linger()
        self._spare: list[CData] = []
        self._destinations: dict[object, tuple[SocketAddress, CData]] = {}
        self._sent = self._send_failed = self._asynchronous = 0
        # Used again by every send, so that it allocates nothing of its own.
        self._out: CData = ffi.new("struct sl_outgoing *")
        self._result: CData = ffi.new("struct sl_send_result *")
        self._room = 0
        self._failed: tuple[CData, CData, CData] = (ffi.NULL, ffi.NULL, ffi.NULL)
        #: of the last send call
        self.failures: tuple[SendFailure, ...] = ()
        if selected is not None:
            sockets = [ServiceSocket(port, sock) for port, _, sock in selected]
            self.busy_poll_refused = set_on((sock.fileno() for _, sock in sockets), policy.tuning)
        self._sockets = self._open_sockets(policy) if sockets is None else list(sockets)
        if not self._sockets:
            raise UsageError(
                "the policy has no port for an application",
                hint="add a service with a rule whose lane ends in a socket",
            )
        try:
            self._classifier = DatagramClassifier(policy)
            #: highest priority first; ``number`` is what a batch's ``lanes`` column says
            self.lanes: tuple[SocketLane, ...] = socket_lanes(policy, quota)
            options = ffi.new("struct sl_mmsg_options *")
            options.frame_size = policy.rings.frame_size if frame_size is None else frame_size
            options.large_frames = large_frames
            # What comes together can't be counted before it is read, so not where that is bounded.
            options.gro = gro and not budget
            options.timestamps = timestamps or any(lane.timestamps for lane in policy.lanes)
            options.drain = DRAIN if drain is None else drain
            for lane in self.lanes:
                options.quota[lane.number] = lane.quota
                options.share[lane.number] = int(lane.share * lib.SL_MMSG_SHARE_ONE)
            self._budget = budget
            self._open(options)
        except BaseException:
            self.close()
            raise

    def _open(self, options: CData) -> None:
        error = ffi.new("int *")
        native = lib.sl_mmsg_new(options, self._classifier.native, error)
        if native == ffi.NULL and error[0] == errno.EINVAL:
            raise UsageError(
                "frame size (64 to 65536), quotas or large frames are out of range or need more than 4 GiB",
                hint="lower quota or frame_size under [rings] in the policy",
            )
        if native == ffi.NULL:
            raise SluiceError.from_errno(
                "frames for the kernel sockets", error[0], hint="lower the lanes' quota"
            )
        self._native = native
        for port, sock in self._sockets:
            failed = lib.sl_mmsg_add(native, sock.fileno(), port)
            if failed:
                raise SluiceError.from_errno(f"socket of UDP port {port} can't be used", -failed)
        for port, number, sock in self._selected or ():
            if options.gro:
                raise UsageError("no gro with a socket for each lane: several may share a message")
            failed = 0 if number is None else lib.sl_mmsg_set_lane(native, sock.fileno(), number)
            if failed:
                raise SluiceError.from_errno(f"lane {number} of UDP port {port}", -failed)

    # --- receiving

    def receive(self, maximum: int = 256, timeout: float | None = None, *, linger: float = 0.0) -> Batch:
        """At most ``maximum`` datagrams, highest lane first, with each lane's share.

        Waits ``timeout`` seconds for the first one (None: for ever) and returns an
        empty batch when there was none.  Signal handlers run while it waits.
        ``linger`` is as XskLanes.receive's.
        Raises UsageError, ValueError when closed, InterfaceGoneError when a socket
        is no longer usable (noticed within half a second, also while it waits).
        """
        if not 0 < maximum <= lib.SL_BATCH_MAX:
            raise UsageError(f"receive({maximum}): maximum is 1 to {lib.SL_BATCH_MAX}")
        if self._closed:
            raise ValueError("these lanes are closed")
        if self._abandoned:
            self._reclaim()
        if linger > 0:
            self._linger.wait(linger, maximum)
        memory = self._spare.pop() if self._spare else self._new_memory(maximum)
        if memory.capacity < maximum:
            memory = self._new_memory(maximum)
        milliseconds = -1 if timeout is None else _milliseconds(timeout)
        deadline = time.monotonic() + timeout if timeout else 0.0
        while True:
            count = _receive(self._native, memory, maximum, self._budget, milliseconds)
            if linger > 0:
                self._linger.received(count)
            if count > 0:
                self._outstanding += 1
                return Batch(self, memory, count)
            if count == 0:
                break
            if count not in {-errno.EINTR, -errno.EAGAIN}:
                self._spare.append(memory)
                raise gone("read", -count)
            # A handler has run by now, or may run here; whoever wants out has raised.
            if timeout is not None:
                milliseconds = _milliseconds(deadline - time.monotonic())
        self._spare.append(memory)
        return Batch(self, None, 0)

    def try_receive(self, maximum: int = 256) -> Batch:
        """What is there now, without waiting."""
        return self.receive(maximum, 0)

    def fileno(self) -> int:
        """Readable while receive would return at once; for select, poll, epoll and event loops."""
        if self._closed:
            raise ValueError("these lanes are closed")
        descriptor = lib.sl_mmsg_fileno(self._native)
        if descriptor < 0:
            raise SluiceError.from_errno("watching the kernel sockets", -descriptor)
        return descriptor

    @staticmethod
    def _new_memory(maximum: int) -> CData:
        memory = lib.sl_batch_new(max(maximum, _BATCH_CAPACITY))
        if memory == ffi.NULL:
            raise SluiceError("no memory for a batch", hint="release batches, or receive fewer at once")
        return ffi.gc(memory, lib.sl_batch_free)

    # --- what a Batch needs of its backend

    def fill_columns(self, memory: CData) -> None:
        """Nothing to do: they are filled when received."""

    def fill_sources(self, memory: CData) -> None:
        """Nothing to do: they are filled when received."""

    def take_back(self, memory: CData) -> None:
        """A batch was released."""
        count = memory.count
        released = _release(self._native, memory)
        self._spare.append(memory)
        self._outstanding -= 1
        if self._closed:
            self._free()
        if released != count:
            raise RuntimeError(f"{count - released} of {count} frames of a batch were not held by it")

    def abandon(self, abandoned: Abandoned) -> None:
        """A batch was dropped without release; its frames come back at the next receive."""
        self._abandoned.append(abandoned)

    def _reclaim(self) -> None:
        waiting, self._abandoned = self._abandoned, []
        self._abandoned.extend(abandoned for abandoned in waiting if not abandoned.reclaim())

    # --- sending

    def send(
        self,
        destination: tuple[Address | str, int],
        payloads: Sequence[Buffer] | Batch,
        *,
        port: int | None = None,
        timeout: float = SEND_TIMEOUT,
    ) -> int:
        """Send datagrams to one destination; returns how many the kernel took.

        From the socket of service port ``port``, the first one by default.  One that
        the kernel refuses (too long, no route) is skipped and the rest goes out;
        ``failures`` then tells which ones and why.  Waits at most ``timeout`` seconds
        in all for room in buffers; signal handlers run meanwhile, and when one raises
        the rest has failed with EINTR.  Payloads of a Batch are sent from where they lie.

        Raises UsageError, ValueError when closed, InterfaceGoneError when the socket
        was closed elsewhere.
        """
        if isinstance(payloads, Batch):
            return (
                self.send_memory(destination, payloads.memory, port=port, timeout=timeout) if payloads else 0
            )
        to = self._destination(destination)
        out = self._out
        out.destination = to
        out.destinations = 1
        try:
            joined = payloads[0] if len(payloads) == 1 else b"".join(payloads)
            lengths = array("I", map(len, payloads))  # type: ignore[arg-type]
            if sum(lengths) != memoryview(joined).nbytes:  # some view counts in larger items than bytes
                lengths = array("I", [memoryview(payload).nbytes for payload in payloads])
        except TypeError:
            raise UsageError("payloads are a sequence of bytes-like objects") from None
        out.count, out.offset = len(lengths), ffi.NULL
        base, length = ffi.from_buffer("uint8_t[]", joined), ffi.from_buffer("uint32_t[]", lengths)
        out.base, out.length = base, length
        return self._send(out, port, timeout)

    def send_many(
        self,
        fanout: Fanout,
        payloads: Buffer | Sequence[Buffer],
        *,
        port: int | None = None,
        timeout: float = SEND_TIMEOUT,
    ) -> int:
        """One payload to all destinations, or one to each; otherwise as :meth:`send`."""
        out, data = self._out, outgoing(payloads, len(fanout))
        out.destination, out.destinations, out.count = fanout.sources, len(fanout), len(fanout)
        out.base, out.offset, out.length = data.base, data.offsets, data.lengths
        return self._send(out, port, timeout)

    def send_memory(
        self,
        destination: tuple[Address | str, int] | Fanout,
        memory: CData,
        *,
        port: int | None = None,
        timeout: float = SEND_TIMEOUT,
    ) -> int:
        """Send what ``offsets`` and ``lengths`` of a ``struct sl_batch`` name; otherwise as :meth:`send`."""
        out = self._out
        if isinstance(destination, Fanout):
            out.destination, out.destinations = destination.sources, len(destination)
        else:
            out.destination, out.destinations = self._destination(destination), 1
        out.count = memory.count
        out.base, out.offset, out.length = memory.data, memory.offsets, memory.lengths
        return self._send(out, port, timeout)

    def send_vectored(
        self,
        destination: tuple[Address | str, int],
        packets: Sequence[Sequence[Buffer]],
        *,
        port: int | None = None,
        timeout: float = SEND_TIMEOUT,
    ) -> int:
        """Payloads that the kernel puts together from pieces; otherwise as :meth:`send`."""
        pieces = Pieces(packets)
        out = ffi.new("struct sl_outgoing *")
        out.destination, out.destinations = self._destination(destination), 1
        out.count, out.length = len(pieces), pieces.lengths
        out.piece, out.end, out.most = pieces.table, pieces.ends, pieces.most
        return self._send(out, port, timeout)

    def send_back(self, batch: Batch, *, timeout: float = SEND_TIMEOUT) -> int:
        """Send every payload of a batch to where it came from; the batch is used up.

        Without a copy, and each from the socket (service port) by which it came, one
        socket after the other.  A socket that can't be written to keeps nothing from
        the others; otherwise as :meth:`send`.

        Raises what Lanes.send_back raises.
        """
        if batch.backend is not self:
            raise UsageError("a batch is sent back through the lanes that it came from")
        memory = batch.surrender()
        self.failures = ()
        if memory is None:
            return 0
        try:
            count: int = memory.count
            self._make_room(count)
            return self._run(
                lib.sl_mmsg_send_back,
                (self._native, memory, self._failed[2]),
                count,
                self._failed[2],
                timeout,
            )
        finally:
            self.take_back(memory)

    def _send(self, out: CData, port: int | None, timeout: float) -> int:
        count: int = out.count
        self._make_room(count)
        number = socket_of(self._sockets, port)
        return self._run(lib.sl_mmsg_send_from, (self._native, number, out), count, None, timeout)

    def _make_room(self, count: int) -> None:
        if self._closed:
            raise ValueError("these lanes are closed")
        if count > self._room:
            self._room = count
            self._failed = tuple(ffi.new(f"{kind}[]", count) for kind in ("uint32_t", "int32_t", "uint32_t"))

    def _run(
        self,
        call: Callable[..., None],
        arguments: tuple[object, ...],
        count: int,
        order: CData | None,
        timeout: float,
    ) -> int:
        """Until all are sent or have failed; ``order`` says which payload is the i-th that is sent."""
        index, errors, _ = self._failed
        result = self._result
        result.sent = result.failed = result.next = result.asynchronous = 0
        result.stopped = errno.EINTR
        deadline = time.monotonic() + timeout
        milliseconds = _milliseconds(timeout)
        try:
            while True:
                call(*arguments, milliseconds, index, errors, result)
                if result.stopped != errno.EINTR:
                    break
                # A handler has run by now, or may run here.
                milliseconds = _milliseconds(deadline - time.monotonic())
        finally:
            sent: int = result.sent
            self._sent += sent
            self._asynchronous += result.asynchronous
            self.failures = ()
            if sent < count:
                failures = [SendFailure(index[i], errors[i]) for i in range(result.failed)]
                rest = range(result.next, count)
                failures += [SendFailure(i if order is None else order[i], result.stopped) for i in rest]
                self.failures = tuple(sorted(failures, key=lambda failure: failure.index))
                self._send_failed += len(failures)
        if sent < count:
            for failure in self.failures:
                if failure.errno in FATAL:
                    raise gone("written", failure.errno)
        return sent

    def _destination(self, destination: tuple[Address | str, int]) -> CData:
        known = self._destinations.get(destination)
        if known is None:
            parsed = SocketAddress.parse(destination)
            source = ffi.new("struct sl_source *")
            ffi.memmove(source.address, parsed.address, len(parsed.address))
            source.port, source.scope, source.family = parsed.port, parsed.scope, parsed.family
            if len(self._destinations) >= _DESTINATIONS:
                self._destinations.clear()
            known = self._destinations[destination] = (parsed, source)
        return known[1]

    # --- the rest

    @property
    def classifier(self) -> DatagramClassifier:
        """Counters per lane, reason and peer: of what the kernel did not decide about."""
        return self._classifier

    def statistics(self) -> SocketStatistics:
        """Counters since opening; exact when no other thread receives."""
        if self._native == ffi.NULL:
            raise ValueError("these lanes are closed")
        sent = (self._sent, self._send_failed, self._asynchronous)
        found = read_statistics(self._native, self.policy.lane_names, self._classifier, sent)
        return replace(found, refused=self.program.refused()) if self.program is not None else found

    def _take_errors(self, *, look: bool) -> tuple[SocketError, ...]:
        if self._closed:
            raise ValueError("these lanes are closed")
        return take_errors(self._native, look=look)

    def census(self) -> dict[str, int]:
        """How many frames are in each place: free, slot (offered to the kernel), queued, held."""
        return read_census(self._native)

    def close(self) -> None:
        """Close the sockets.  Batches still held stay readable; memory goes with the last of them."""
        if self._closed:
            return
        self._closed = True
        for _, sock in self._sockets:
            if self._native != ffi.NULL:
                lib.sl_mmsg_remove(self._native, sock.fileno())
        close_sockets(self._sockets)
        if self.program is not None:
            self.program.close()
        self._unpin()
        if self._abandoned:
            self._reclaim()
        self._free()

    def _free(self) -> None:
        if not self._outstanding and self._native != ffi.NULL:
            lib.sl_mmsg_free(self._native)
            self._native = ffi.NULL


def _milliseconds(seconds: float) -> int:
    """Rounded up, so that a wait never ends early and then spins; a day at most."""
    if seconds <= 0:
        return 0
    return math.ceil(seconds * 1000) if seconds < 86_400 else 86_400_000
