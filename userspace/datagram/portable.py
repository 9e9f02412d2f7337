# SPDX-License-Identifier: Apache-2.0
"""Lanes over plain sockets: the last rung of the mode ladder, no system call from C.

One system call and one run of the reference classifier (:mod:`xdp.classify`) per
datagram: some tens of thousands a second.  The behaviour is that of
:class:`~userspace.datagram.mmsg.MmsgLanes`: lanes with a quota of frames each,
highest first with a share for all, the same counters, which add up.
"""

from __future__ import annotations

import errno
import mmap
import time
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from ipaddress import IPv4Address, IPv6Address
from typing import TYPE_CHECKING

from typing_extensions import Buffer

from userspace.datagram.batch import Abandoned, Batch
from userspace.datagram.fanout import Fanout
from userspace.datagram.linger import Linger
from userspace.datagram.plain_send import (
    FATAL,
    Datagram,
    Outcome,
    gone,
    in_pieces,
    send_plain,
    to_many,
    to_one,
)
from userspace.datagram.poller import Flag, Poller, make_poller
from userspace.datagram.portable_queue import LaneQueue, Received, share_out
from userspace.datagram.socket_errors import ErrorQueue, SocketError
from userspace.datagram.socket_lanes import KernelSocketLanes
from userspace.datagram.socket_statistics import LaneStatistics, SendFailure, SocketStatistics
from userspace.datagram.sockets import (
    ServiceSocket,
    SocketAddress,
    SocketLane,
    close_sockets,
    pack_name,
    socket_cookie,
    socket_drops,
    socket_lanes,
    socket_of,
)
from userspace.native._native import ffi, lib
from xdp.abi import REASONS
from xdp.classify import Classifier
from xdp.errors import UsageError
from xdp.policy import Policy

if TYPE_CHECKING:
    from userspace.native._native import CData

Address = IPv4Address | IPv6Address

_LARGE = 65536  # bytes of a large frame: any UDP payload
_BURST = 64  # datagrams read from one socket before the next one's turn
_MAXIMUM = 65536  # of one batch
_MIXED_NS = 1_000_000_000  # traffic counts as mixed for so long after lanes last alternated
_CHECK = 0.5  # seconds between two looks at whether all sockets are still there
_DELIVERED = frozenset(("steer", "steer_demoted", "pass_lane", "pass_demoted"))


class PortableLanes(KernelSocketLanes):
    """See MmsgLanes: the same arguments, methods and errors.  Belongs to one thread."""

    mode = "portable"
    _classifier: Classifier

    def __init__(
        self,
        policy: Policy,
        sockets: Iterable[ServiceSocket] | None = None,
        *,
        quota: int | None = None,
        frame_size: int | None = None,
        large_frames: int = 32,
        drain: int | None = None,
        budget: int = 0,
    ) -> None:
        self._closed = False
        self._poller: Poller | None = None
        self._flag: Flag | None = None
        self._frame_size = policy.rings.frame_size if frame_size is None else frame_size
        #: highest priority first; ``number`` is what a batch's ``lanes`` column says
        self.lanes: tuple[SocketLane, ...] = socket_lanes(policy, quota)
        self._quota = [lane.quota for lane in self.lanes]
        self._shares = [lane.share for lane in self.lanes]
        self._large_quota = large_frames
        self._small_frames = sum(self._quota)
        large = large_frames * len(policy.lanes)
        if not 64 <= self._frame_size <= _LARGE or min(self._quota) < 0 or large_frames < 0:
            raise UsageError(
                "frame size (64 to 65536), quotas or large frames are out of range",
                hint="lower quota or frame_size under [rings] in the policy",
            )
        self._drain = 4 if drain is None else drain
        self._budget = budget
        self._classifier = Classifier(policy)
        # Mapped, not a bytearray: pages that are never used cost nothing.
        self._area = mmap.mmap(-1, max(self._small_frames * self._frame_size + large * _LARGE, 1))
        self._area_pointer = ffi.from_buffer("uint8_t[]", self._area)
        self._view = memoryview(self._area)
        self._scratch = bytearray(_LARGE)
        self._scratch_view = memoryview(self._scratch)
        self._free_small = list(range(self._small_frames))
        self._free_large = list(range(self._small_frames, self._small_frames + large))
        self._lanes = [LaneQueue() for _ in policy.lanes]
        self._held: dict[int, int] = {}  # frame -> lane
        self._abandoned: list[Abandoned] = []
        self._linger = Linger()
        self._spare: list[CData] = []
        self._counts: Counter[str] = Counter()
        self._verdicts: Counter[str] = Counter()
        self._last_read = -1  # descriptor
        self._recent_lane = 0  # of the last datagram
        self._mixed_ns = -_MIXED_NS  # when it last was another than the one before
        self._signalled = False
        #: of the last send call
        self.failures: tuple[SendFailure, ...] = ()
        self._sockets = self._open_sockets(policy) if sockets is None else list(sockets)
        if not self._sockets:
            raise UsageError(
                "the policy has no port for an application",
                hint="add a service with a rule whose lane ends in a socket",
            )
        self._by_descriptor = {sock.fileno(): i for i, (_, sock) in enumerate(self._sockets)}
        self._errors = ErrorQueue(self._sockets)
        self._cookies = [socket_cookie(sock) for _, sock in self._sockets]
        self._checked = -_CHECK
        self._poller = make_poller()
        self._flag = Flag()
        self._poller.add(self._flag)
        for _, sock in self._sockets:
            sock.setblocking(False)
            self._poller.add(sock)

    # --- receiving

    def receive(self, maximum: int = 256, timeout: float | None = None, *, linger: float = 0.0) -> Batch:
        """As MmsgLanes.receive."""
        if not 0 < maximum <= _MAXIMUM:
            raise UsageError(f"receive({maximum}): maximum is 1 to {_MAXIMUM}")
        poller = self._opened()
        if self._abandoned:
            waiting, self._abandoned = self._abandoned, []
            self._abandoned.extend(abandoned for abandoned in waiting if not abandoned.reclaim())
        if linger > 0:
            self._linger.wait(linger, maximum)
        deadline = None if timeout is None else time.monotonic() + timeout
        self._linger.received(0)
        while True:
            self._check_sockets()
            self._pump(maximum)
            if any(lane.queue for lane in self._lanes):
                batch = self._hand_out(maximum)
                self._linger.received(len(batch))
                return batch
            left = _CHECK if deadline is None else min(deadline - time.monotonic(), _CHECK)
            if left <= 0:
                return Batch(self, None, 0)
            poller.poll(left)

    def _check_sockets(self) -> None:
        """Notice descriptors that were closed elsewhere, or are other sockets now: no poller says."""
        now = time.monotonic()
        if now - self._checked < _CHECK:
            return
        if not all(map(self._is_there, range(len(self._sockets)))):
            raise gone("read", errno.EBADF)
        self._errors.look()
        self._checked = now

    def _is_there(self, number: int) -> bool:
        """Whether a descriptor still is the socket that it was."""
        return socket_cookie(self._sockets[number].socket) == self._cookies[number]

    def try_receive(self, maximum: int = 256) -> Batch:
        """What is there now, without waiting."""
        return self.receive(maximum, 0)

    def fileno(self) -> int:
        """Readable while receive would return at once."""
        return self._opened().fileno()

    def _opened(self) -> Poller:
        if self._poller is None:
            raise ValueError("these lanes are closed")
        return self._poller

    def _pump(self, maximum: int) -> None:
        limit = maximum * self._drain
        if self._budget:
            maximum, limit = min(maximum, self._budget), min(limit, self._budget)
        read = self._read_sockets(maximum)
        if read == maximum < limit and 0 < time.monotonic_ns() - self._mixed_ns < _MIXED_NS:
            self._read_sockets(limit - maximum)

    def _read_sockets(self, want: int) -> int:
        total = 0
        poller = self._opened()
        ready = [descriptor for descriptor in poller.poll(0) if descriptor in self._by_descriptor]
        for descriptor in poller.erred:
            if descriptor in self._by_descriptor:
                self._errors.drain(self._sockets[self._by_descriptor[descriptor]].socket)
        # In a circle, from the one after the last that was read.
        ready.sort(key=lambda descriptor: (descriptor <= self._last_read, descriptor))
        while ready and total < want:
            still: list[int] = []
            for descriptor in ready:
                if total == want:
                    break
                share = min(_BURST, want - total)
                read = self._read_burst(self._by_descriptor[descriptor], share)
                total += read
                self._last_read = descriptor
                if read == share:
                    still.append(descriptor)
            ready = still
        return total

    def _read_burst(self, number: int, want: int) -> int:
        service = self._sockets[number]
        for count in range(want):
            try:
                length, name = service.socket.recvfrom_into(self._scratch)
            except BlockingIOError:
                return count
            except OSError as error:
                if error.errno in FATAL:
                    raise gone("read", errno.EBADF) from error
                self._counts["errors"] += 1
                self._errors.drain(service.socket)
                continue
            self._counts["received"] += 1
            self._take(number, length, name, time.monotonic_ns())
        return want

    def _take(self, number: int, length: int, name: tuple[str, int], now_ns: int) -> None:
        service = self._sockets[number]
        small = length <= self._frame_size
        if not small and not self._large_quota:
            self._counts["truncated"] += 1
            return
        payload = self._scratch_view[:length]
        verdict = self._classifier.classify_datagram(name[0], service.port, payload, now_ns)
        reason = REASONS[verdict.reason]
        if reason == "reply":
            try:
                service.socket.sendto(verdict.reply_frame or b"", name)
                self._counts["replied"] += 1
            except OSError:
                self._counts["reply_failed"] += 1
            return
        if reason not in _DELIVERED or verdict.lane is None:
            self._verdicts[reason] += 1
            return
        if verdict.lane != self._recent_lane:
            self._recent_lane, self._mixed_ns = verdict.lane, now_ns
        lane = self._lanes[verdict.lane]
        if small and lane.small < self._quota[verdict.lane]:
            frame = self._free_small.pop()
            lane.small += 1
        elif not small and lane.large < self._large_quota and self._quota[verdict.lane]:
            frame = self._free_large.pop()
            lane.large += 1
        else:
            lane.dropped += small
            self._counts["no_large_frame"] += not small
            return
        offset = self._offset(frame)
        self._view[offset : offset + length] = payload
        lane.queue.append(Received(frame, length, verdict, pack_name(name), number, now_ns))

    def _offset(self, frame: int) -> int:
        if frame < self._small_frames:
            return frame * self._frame_size
        return self._small_frames * self._frame_size + (frame - self._small_frames) * _LARGE

    def _hand_out(self, maximum: int) -> Batch:
        taken: list[Received] = []
        for number, count in enumerate(share_out(self._lanes, self._shares, maximum)):
            lane = self._lanes[number]
            taken.extend(lane.queue.popleft() for _ in range(count))
            lane.delivered += count
            if not lane.queue:
                lane.credit = 0.0  # a share that was not needed is not saved up
            self._held.update((received.frame, number) for received in taken[len(taken) - count :])
        self._signal()
        memory = self._spare.pop() if self._spare else _new_memory(256)
        if memory.capacity < len(taken):
            memory = _new_memory(len(taken))
        memory.count = len(taken)
        memory.data, memory.data_size = self._area_pointer, len(self._area)
        memory.received_ns = time.monotonic_ns()
        verdicts = [received.verdict for received in taken]
        for column, code, values in (
            (memory.offsets, "I", [self._offset(received.frame) for received in taken]),
            (memory.lengths, "I", [received.length for received in taken]),
            (memory.times, "Q", [received.time_ns for received in taken]),
            (memory.addresses, "Q", [received.frame for received in taken]),
            (memory.sizes, "I", [received.service for received in taken]),
            (memory.peers, "I", [verdict.peer for verdict in verdicts]),
            (memory.lanes, "B", [verdict.lane or 0 for verdict in verdicts]),
            (memory.kinds, "B", [verdict.kind for verdict in verdicts]),
            (memory.classes, "B", [verdict.class_id for verdict in verdicts]),
            (memory.services, "B", [verdict.service for verdict in verdicts]),
        ):
            packed = array(code, values)
            ffi.memmove(column, packed, len(packed) * packed.itemsize)
        sources = b"".join([received.source for received in taken])
        ffi.memmove(memory.sources, sources, len(sources))
        memory.columns_ready = memory.sources_ready = 1
        return Batch(self, memory, len(taken))

    def _signal(self) -> None:
        """The event descriptor is readable exactly while datagrams are queued."""
        queued = any(lane.queue for lane in self._lanes)
        assert self._flag is not None
        if queued and not self._signalled:
            self._flag.raise_up()
        elif self._signalled and not queued:
            self._flag.take_down()
        self._signalled = queued

    # --- what a Batch needs of its backend

    def fill_columns(self, memory: CData) -> None:
        """Nothing to do: they are filled when received."""

    def fill_sources(self, memory: CData) -> None:
        """Nothing to do: they are filled when received."""

    def take_back(self, memory: CData) -> None:
        """A batch was released."""
        for frame in ffi.unpack(memory.addresses, memory.count):
            lane = self._lanes[self._held.pop(frame)]
            if frame < self._small_frames:
                lane.small -= 1
                self._free_small.append(frame)
            else:
                lane.large -= 1
                self._free_large.append(frame)
        self._spare.append(memory)

    def abandon(self, abandoned: Abandoned) -> None:
        """A batch was dropped without release; its frames come back at the next receive."""
        self._abandoned.append(abandoned)

    # --- sending

    def send(
        self,
        destination: tuple[Address | str, int],
        payloads: Sequence[Buffer] | Batch,
        *,
        port: int | None = None,
        timeout: float = 1.0,
    ) -> int:
        """As MmsgLanes.send."""
        self._opened()
        number = socket_of(self._sockets, port)
        return self._send({number: to_one(destination, payloads)}, timeout)

    def send_many(
        self,
        fanout: Fanout,
        payloads: Buffer | Sequence[Buffer],
        *,
        port: int | None = None,
        timeout: float = 1.0,
    ) -> int:
        """As MmsgLanes.send_many."""
        self._opened()
        return self._send({socket_of(self._sockets, port): to_many(fanout, payloads)}, timeout)

    def send_vectored(
        self,
        destination: tuple[Address | str, int],
        packets: Sequence[Sequence[Buffer]],
        *,
        port: int | None = None,
        timeout: float = 1.0,
    ) -> int:
        """As MmsgLanes.send_vectored."""
        self._opened()
        return self._send({socket_of(self._sockets, port): in_pieces(destination, packets)}, timeout)

    def send_back(self, batch: Batch, *, timeout: float = 1.0) -> int:
        """As MmsgLanes.send_back."""
        if batch.backend is not self:
            raise UsageError("a batch is sent back through the lanes that it came from")
        memory = batch.surrender()
        self.failures = ()
        if memory is None:
            return 0
        try:
            self._opened()
            groups: dict[int, list[Datagram]] = {}  # by socket, in the order in which they first appear
            for index in range(memory.count):
                start = memory.offsets[index]
                payload = self._view[start : start + memory.lengths[index]]
                to = SocketAddress.unpack(bytes(ffi.buffer(memory.sources + index)))
                groups.setdefault(memory.sizes[index], []).append((index, payload, to))
            return self._send(groups, timeout)
        finally:
            self.take_back(memory)

    def _send(self, groups: dict[int, list[Datagram]], timeout: float) -> int:
        """``groups``: what leaves from which socket."""
        outcome = Outcome()
        try:
            send_plain(
                [
                    (self._sockets[number].socket if self._is_there(number) else None, datagrams)
                    for number, datagrams in groups.items()
                ],
                timeout,
                outcome,
                self._errors,
            )
        finally:
            self.failures = outcome.failures
            self._counts["sent"] += outcome.sent
            self._counts["send_failed"] += len(outcome.unsent)
            self._counts["asynchronous"] += outcome.asynchronous
        for error in FATAL.intersection(outcome.unsent.values()):
            raise gone("written", error)
        return outcome.sent

    # --- the rest

    def statistics(self) -> SocketStatistics:
        """As MmsgLanes.statistics."""
        self._opened()
        counts = self._counts
        dropped = {name: counts[name] for name in ("truncated", "no_large_frame", "reply_failed")}
        dropped["lane_full"] = sum(lane.dropped for lane in self._lanes)
        return SocketStatistics(
            received=counts["received"],
            delivered=sum(lane.delivered for lane in self._lanes),
            queued=sum(len(lane.queue) for lane in self._lanes),
            replied=counts["replied"],
            dropped={reason: count for reason, count in dropped.items() if count},
            discarded=dict(self._verdicts),
            overflowed=socket_drops(self._sockets),
            errors=counts["errors"],
            reported=self._errors.counts["reported"],
            unread=self._errors.counts["unread"],
            floods=self._errors.counts["floods"],
            sent=counts["sent"],
            send_failed=counts["send_failed"],
            asynchronous_errors=counts["asynchronous"],
            lanes=tuple(
                LaneStatistics(
                    name,
                    lane.delivered,
                    len(lane.queue),
                    lane.small + lane.large - len(lane.queue),
                    lane.dropped,
                )
                for name, lane in zip(self.policy.lane_names, self._lanes, strict=True)
            ),
        )

    def _take_errors(self, *, look: bool) -> tuple[SocketError, ...]:
        self._opened()
        if look:
            self._errors.look()
        return self._errors.take()

    def census(self) -> dict[str, int]:
        """How many frames are in each place; none is ever offered to the kernel here."""
        queued = sum(len(lane.queue) for lane in self._lanes)
        free = len(self._free_small) + len(self._free_large)
        return {"free": free, "slot": 0, "queued": queued, "held": len(self._held)}

    def close(self) -> None:
        """Close the sockets.  Batches still held stay readable."""
        if self._closed:
            return
        self._closed = True
        if self._poller is not None:
            self._poller.close()
            self._poller = None
        if self._flag is not None:
            self._flag.close()
        close_sockets(getattr(self, "_sockets", ()))
        self._unpin()


def _new_memory(capacity: int) -> CData:
    return ffi.gc(lib.sl_batch_new(capacity), lib.sl_batch_free)
