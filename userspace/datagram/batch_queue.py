# SPDX-License-Identifier: Apache-2.0
"""Packets that wait to be sent together: when a batch is due, what is in it, what has become of it.

No clock and no I/O: the time comes in as an argument (seconds of a monotonic clock), batches go out, and
what became of them comes back.

    queue.add(target, payload, priority, now)
    while reason := queue.due(now):
        batch = queue.take(reason, now)
        ...                               # send batch.payloads to batch.targets
        queue.settle(batch, now, calls=1, unsent={3: errno.EAGAIN})

Priorities are strict: 0 is the highest, and a batch is filled from the top.  So packets of several
priorities may share one, and none waits while a lower one goes out.

What finds no room stays in its place and is tried again after a moment.  When nothing behind it was sent
either, the lanes are full: all waits until then.  Else only its way is (a transmit ring, a socket): its
destinations are held until then, and the others go on.

With a ``gate`` (:mod:`userspace.datagram.flow_gate`) destinations are held for another reason, too: their
flow control does not let the next packet leave yet.  It is asked when a packet is to be taken, and not again
until the time that it gave, or :meth:`BatchQueue.reconsider`.  So a batch may turn out empty.
"""

from __future__ import annotations

import errno
import itertools
import mmap
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final, NamedTuple, cast

from typing_extensions import Buffer

from userspace.datagram.batch_holds import NO_FLOW, Hold, Holds
from userspace.datagram.batch_statistics import BatchCounters, BatchStatistics, PacketFailure, Reason
from userspace.datagram.batch_targets import Target
from userspace.datagram.destination import Endpoint
from userspace.native._native import lib
from xdp.errors import UsageError

if TYPE_CHECKING:
    from userspace.datagram.flow_gate import FlowGate

BATCH_SIZE: Final = 64  # packets: as many as one sendmmsg call takes here
BATCH_TIMEOUT: Final = 0.005  # seconds that a packet waits for company
BUFFERS: Final = 1024
#: Seconds after which a packet that finds no room is dropped.
MAXIMUM_AGE: Final = 1.0
#: As many as there are lanes, so that a lane's number can be the priority of what answers it.
PRIORITIES: Final[int] = lib.SLUICE_MAX_LANES
#: Bytes: the longest payload of UDP (RFC 768: a length of 16 bits, with 8 of header).
PAYLOAD_MAXIMUM: Final = 65_527
#: Seconds until what found no room is tried again: twice the shortest wait of kernel sockets (1 ms), so that
#: whoever waits for this by receiving from them neither spins nor comes late.
RETRY: Final = 0.002

#: Errors of packets that mean: not now.
NO_ROOM: Final = frozenset((errno.EAGAIN, errno.ENOBUFS))

_CACHE_LINE: Final = 64  # bytes
_AREA_MAXIMUM: Final = 1 << 32  # bytes
_NEVER: Final = float("inf")


def _within(value: object, least: int, most: int) -> bool:
    return isinstance(value, int) and least <= value <= most


class OutgoingBatch(NamedTuple):
    """What to send, one payload to each target, in that order; payloads are valid until it is settled."""

    reason: Reason
    targets: tuple[Target, ...]
    payloads: list[memoryview]
    slots: list[int]
    #: (priority, how many of the slots), highest first
    parts: list[tuple[int, int]]


class BatchQueue:
    """Packets in preallocated buffers, by priority and in the order of their coming.

    ``buffers`` of ``buffer_size`` bytes are mapped at once, but take memory only when they are first used.
    Raises UsageError for values out of range.
    """

    def __init__(
        self,
        *,
        batch_size: int = BATCH_SIZE,
        batch_timeout: float = BATCH_TIMEOUT,
        buffers: int = BUFFERS,
        buffer_size: int = PAYLOAD_MAXIMUM,
        priorities: int = PRIORITIES,
        maximum_age: float = MAXIMUM_AGE,
        retry: float = RETRY,
        gate: FlowGate | None = None,
    ) -> None:
        for name, value, least, most in (
            ("batch_size", batch_size, 1, lib.SL_BATCH_MAX),
            ("buffers", buffers, 1, lib.SL_BATCH_MAX),
            ("buffer_size", buffer_size, 1, PAYLOAD_MAXIMUM),
            ("priorities", priorities, 1, 256),
        ):
            if not _within(value, least, most):
                raise UsageError(f"{name} is a whole number from {least} to {most}, not {value!r}")
        for name, seconds in (
            ("batch_timeout", batch_timeout),
            ("maximum_age", maximum_age),
            ("retry", retry),
        ):
            if type(seconds) not in {int, float} or not 0 <= seconds < _NEVER:
                raise UsageError(f"{name} is seconds, 0 or more, not {seconds!r}")
        if retry == 0:
            raise UsageError("retry is more than 0 seconds, or what finds no room is tried for ever")
        if buffers < batch_size:
            raise UsageError(
                f"{buffers} buffers never hold a batch of {batch_size}", hint="buffers >= batch_size"
            )
        # An odd number of cache lines: with a power of two all would begin in the same set of the cache.
        stride = ((buffer_size + _CACHE_LINE - 1) // _CACHE_LINE | 1) * _CACHE_LINE
        if buffers * stride > _AREA_MAXIMUM:
            raise UsageError(
                f"{buffers} buffers of {buffer_size} bytes are more than 4 GiB", hint="fewer or smaller"
            )
        self.batch_size, self.buffer_size, self.priorities = batch_size, buffer_size, priorities
        self._timeout, self._maximum_age, self._retry = float(batch_timeout), float(maximum_age), float(retry)
        self._memory = mmap.mmap(-1, buffers * stride)
        self._view = memoryview(self._memory)
        # Columns, one entry a buffer; what is in those of free ones means nothing.
        self._starts = [number * stride for number in range(buffers)]
        self._lengths = [0] * buffers
        self._times = [0.0] * buffers
        self._targets: list[Target] = [cast("Target", None)] * buffers
        self._buffers = buffers
        #: buffers not in use; what was used last is in the cache, so it is used first
        self.free = list(range(buffers))
        self._queues: list[list[int]] = [[] for _ in range(priorities)]
        #: when a batch is due if nothing is added; infinite while nothing waits
        self.due_at = _NEVER
        self._size_at = buffers - batch_size  # so few free buffers make a batch due; negative: no number
        self._blocked_until: float | None = None  # the lanes are full
        self._held = Holds()  # their ways are, or their windows
        self._refused: list[Endpoint] = []  # those that the gate has held since the batch was taken
        self._retry_at = _NEVER  # when the next of all that is tried again
        self._gate = gate
        self._counters = BatchCounters(batch_size)
        #: the latest, as many as there are buffers
        self.failures: deque[PacketFailure] = deque(maxlen=buffers)

    # --- in

    def add(self, target: Target, payload: Buffer, priority: int, now: float) -> bool:
        """Copy a payload and queue it; False (and nothing else) when there is no buffer for it.

        Where all buffers are in use, the latest packet of the lowest priority gives way to one of a
        higher priority; it has failed with ENOBUFS.  Raises UsageError for a payload that is too long
        or no bytes, and for a priority that does not exist.
        """
        free = self.free
        try:
            queue = self._queues[priority]
            slot = free[-1]
            size = len(payload)  # type: ignore[arg-type]
            if priority < 0 or size > self.buffer_size:
                self._checked(payload, priority)  # raises
            start = self._starts[slot]
            self._memory[start : start + size] = payload
        except (IndexError, TypeError, BufferError):  # wrong, or no buffer, or items longer than a byte
            size = self._checked(payload, priority)
            if not free and self._held and self._gate is not None:
                self._expire(now)  # nobody may have looked since flow control let them wait
                self._plan()
            if not free and not self._give_way(priority):
                self._counters.refused += 1
                return False
            queue, slot = self._queues[priority], free[-1]
            start = self._starts[slot]
            self._memory[start : start + size] = memoryview(payload).cast("B")
        del free[-1]
        self._lengths[slot] = size
        self._times[slot] = now
        self._targets[slot] = target
        queue.append(slot)
        self._counters.queued += 1
        if self._held:
            self._add_beside_held(slot, priority, now)
        elif len(free) <= self._size_at:
            self.due_at = now
        elif self.due_at is _NEVER:
            self.due_at = now + self._timeout
        return True

    def _add_beside_held(self, slot: int, priority: int, now: float) -> None:
        """The rest of add(): when a batch is due, while destinations are held."""
        if self._blocked_until is not None:
            return
        endpoint = self._targets[slot].endpoint
        hold = self._held.get(endpoint)
        if hold is not None:
            self._size_at -= 1
            hold.count += 1
            hold.oldest = min(hold.oldest, now)
            if priority < hold.priority:  # it leaves before the one that could not: ask for this one
                hold.priority, hold.size = priority, self._lengths[slot]
                self.reconsider(endpoint, now)
        elif len(self.free) <= self._size_at:
            self.due_at = now
        else:
            self.due_at = min(self.due_at, now + self._timeout)

    def _checked(self, payload: Buffer, priority: int) -> int:
        """Bytes of a payload; UsageError when it cannot be queued."""
        if not _within(priority, 0, self.priorities - 1):
            raise UsageError(f"priority is 0 (the highest) to {self.priorities - 1}, not {priority!r}")
        try:
            view = memoryview(payload)
        except TypeError:
            raise UsageError("a payload is a bytes-like object") from None
        if not view.c_contiguous:
            raise UsageError("a payload is in one piece", hint="copy it with bytes()")
        if view.nbytes > self.buffer_size:
            raise UsageError(
                f"a payload of {view.nbytes} bytes; a buffer has {self.buffer_size}", hint="raise buffer_size"
            )
        return view.nbytes

    def _give_way(self, priority: int) -> bool:
        """Free a buffer of a lower priority than that."""
        for lower in range(self.priorities - 1, priority, -1):
            if self._queues[lower]:
                self._fail(self._queues[lower].pop(), lower, errno.ENOBUFS)
                self._plan()
                return True
        return False

    # --- when

    @property
    def failed(self) -> int:
        """How many packets were given up so far."""
        return self._counters.failures.total()

    @property
    def waiting(self) -> int:
        """Packets that were not settled yet."""
        return self._buffers - len(self.free)

    @property
    def ready(self) -> int:
        """How many of them :meth:`take` would give, in batches."""
        return 0 if self._blocked_until is not None else self.batch_size + self._size_at - len(self.free)

    def next_flush(self) -> float | None:
        """When a batch will be due if nothing is added; None: never.  In the past: it is due."""
        return None if self.due_at == _NEVER else self.due_at

    def due(self, now: float) -> Reason | None:
        """Why a batch is due now, if one is."""
        if now >= self._retry_at:
            return "retry"
        if len(self.free) <= self._size_at:
            return "size"
        return "time" if now >= self.due_at else None

    # --- out

    def take(self, reason: Reason, now: float) -> OutgoingBatch:
        """The next batch, due or not; the packets wait until it is settled.

        Without what is held, but for what is to be tried again by ``now`` ("retry").  Empty when the gate
        lets nothing pass.
        """
        if reason == "retry":
            self._blocked_until = None
            self._held.release(now)
        left, held, gate = self.batch_size, self._held, self._gate
        while self._refused:  # of a batch that nobody settled: the gate raised
            self._held.pop(self._refused.pop(), None)
        if gate is not None:
            gate.begin(now)
        slots: list[int] = []
        parts: list[tuple[int, int]] = []
        for priority, queue in enumerate(self._queues):
            some = self._passing(queue, priority, left) if held or gate is not None else queue[:left]
            if some:
                parts.append((priority, len(some)))
                slots += some
                left -= len(some)
                if not left:
                    break
        view, starts, lengths = self._view, self._starts, self._lengths
        return OutgoingBatch(
            reason,
            tuple([self._targets[slot] for slot in slots]),
            [view[(start := starts[slot]) : start + lengths[slot]] for slot in slots],
            slots,
            parts,
        )

    def _passing(self, queue: list[int], priority: int, left: int) -> list[int]:
        """As many of a queue, in order, as are not held; holds what the gate does not let pass."""
        held, gate, targets = self._held, self._gate, self._targets
        some: list[int] = []
        passed_over: set[Target] = set()  # in which to look costs less than in what is held
        for slot in queue:
            target = targets[slot]
            if target in passed_over:
                continue
            endpoint = target.endpoint
            if endpoint in held:
                passed_over.add(target)
                continue
            if gate is not None and not gate.passes(endpoint, self._lengths[slot]):
                # Until when is seen when this batch has gone: it may have packets for there.
                held[endpoint] = Hold(_NEVER, priority, self._lengths[slot])
                self._refused.append(endpoint)
                passed_over.add(target)
                continue
            some.append(slot)
            if len(some) == left:
                break
        return some

    def settle(self, batch: OutgoingBatch, now: float, *, calls: int, unsent: Mapping[int, int]) -> None:
        """What has become of the batch that was taken last: ``unsent`` has index and errno of the others.

        What found no room (EAGAIN, ENOBUFS) stays where it was, and is tried again after ``retry`` seconds.
        Whatever is older than ``maximum_age`` when something finds no room, or the gate lets something wait,
        is dropped.
        """
        sent = batch.slots
        if unsent or self._held:
            sent = self._sort_out(batch, unsent)
        else:
            for priority, count in batch.parts:
                del self._queues[priority][:count]
        self.free += sent
        if batch.slots:
            self._counters.batch(
                batch.reason,
                calls,
                now,
                [self._times[slot] for slot in sent],
                [self._lengths[slot] for slot in sent],
            )
        kept = [index for index, error in unsent.items() if error in NO_ROOM]
        if self._gate is not None:
            self._tell(self._gate, batch, now, unsent)
        if kept:
            first = min(kept)
            until = now + self._retry
            endpoints = {batch.targets[index].endpoint for index in kept}
            if len(batch.slots) - first > sum(index >= first for index in unsent):
                self._held.update({endpoint: Hold(until) for endpoint in endpoints})
            else:
                self._blocked_until = until
                for endpoint in endpoints:  # flow control held what comes after these
                    self._held.pop(endpoint, None)
        if kept or self._refused:
            self._expire(now)
            self._refused.clear()
        self._plan()

    def _tell(self, gate: FlowGate, batch: OutgoingBatch, now: float, unsent: Mapping[int, int]) -> None:
        """The gate what became of a batch; and ask it how long those wait that it did not let pass."""
        # To whom nothing is left: they are sent less than they could take.
        done = {target.endpoint for target in batch.targets}
        for slot in itertools.chain(*self._queues):
            if not done:
                break
            done.discard(self._targets[slot].endpoint)
        gate.settle(batch, now, unsent, times=self._times, done=done)
        for endpoint in self._refused:
            self._ask(endpoint, now)

    def _ask(self, endpoint: Endpoint, now: float) -> None:
        """Until when flow control holds a destination that is held."""
        assert self._gate is not None
        hold = self._held[endpoint]
        hold.until = self._gate.next_send_time(endpoint, hold.size, now)
        if hold.until <= now:
            del self._held[endpoint]

    def reconsider(self, endpoint: Endpoint, now: float) -> None:
        """Flow control may let packets to a destination pass now: an acknowledgement came, say."""
        hold = self._held.get(endpoint)
        if hold is None or hold.priority == NO_FLOW:
            return
        before = hold.until
        self._ask(endpoint, now)
        if self._blocked_until is not None:
            return  # when that ends, all is looked at
        if endpoint not in self._held:
            self._size_at += hold.count
            if hold.count:
                due = now if len(self.free) <= self._size_at else hold.oldest + self._timeout
                self.due_at = min(self.due_at, due)
        if before < _NEVER:
            self._plan()
        elif hold.until < self._retry_at and endpoint in self._held:
            self._retry_at = hold.until
            self.due_at = min(self.due_at, hold.until)

    def _sort_out(self, batch: OutgoingBatch, unsent: Mapping[int, int]) -> list[int]:
        """The slots that were sent.  Those, and what failed, are in no queue any more."""
        sent: list[int] = []
        index = 0
        for priority, count in batch.parts:
            kept: list[int] = []
            failed: list[tuple[int, int]] = []
            slots = batch.slots[index : index + count]
            for slot in slots:
                error = unsent.get(index)
                if error is None:
                    sent.append(slot)
                elif error in NO_ROOM:
                    kept.append(slot)
                else:
                    failed.append((slot, error))
                index += 1
            gone = set(slots).difference(kept)
            self._queues[priority] = [slot for slot in self._queues[priority] if slot not in gone]
            for slot, error in failed:
                self._fail(slot, priority, error)
        return sent

    def _fail(self, slot: int, priority: int, error: int) -> None:
        """One that is in no queue any more."""
        endpoint = self._targets[slot].endpoint
        self.failures.append(PacketFailure(endpoint, error, priority, self._lengths[slot]))
        self._counters.failures[error] += 1
        self.free.append(slot)

    def _expire(self, now: float) -> None:
        born = now - self._maximum_age
        for queue in self._queues:
            count = 0
            while count < len(queue) and self._times[queue[count]] <= born:
                count += 1
            self.free += queue[:count]
            del queue[:count]
            self._counters.expired += count

    def _plan(self) -> None:
        """When the next batch is due."""
        if len(self.free) == self._buffers:
            self._blocked_until = None
            self._held.clear()
        if self._blocked_until is not None:
            self._size_at, self.due_at = -1, self._blocked_until
            self._retry_at = self._blocked_until
            return
        held, ready = self._held, self._queues
        if held:
            ready = held.sort(ready, self._targets, self._times)
        self._retry_at = held.until if held else _NEVER
        self._size_at = self._buffers - self.batch_size - (held.count if held else 0)
        oldest = min([self._times[queue[0]] for queue in ready if queue], default=_NEVER)
        due = oldest if len(self.free) <= self._size_at else oldest + self._timeout
        # add() knows _NEVER by its identity: of equals min gives the first.
        self.due_at = min(_NEVER, due, self._retry_at)

    def unblock(self) -> None:
        """Try all again: what found no room is ready as before, and the gate is asked anew."""
        self._blocked_until = None
        self._held.clear()
        self._plan()

    def give_up(self, error: int) -> int:
        """All that waits has failed with that errno; how many."""
        count = self.waiting
        for priority, queue in enumerate(self._queues):
            while queue:
                self._fail(queue.pop(0), priority, error)
        self.unblock()
        return count

    def statistics(self) -> BatchStatistics:
        """Counters since it was made."""
        return self._counters.snapshot(self.waiting)
