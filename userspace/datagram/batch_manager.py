# SPDX-License-Identifier: Apache-2.0
"""Sending in batches for those who have one packet at a time.

    with UDPBatchManager(lanes, port=8001) as manager:
        manager.queue_packet(("192.0.2.7", 9000), payload, priority=0)
        ...
        with manager.receive_batch(timeout=1.0) as batch:  # sends what is due meanwhile
            ...

Packets are copied into buffers that were made before, and leave when enough are together or the oldest
has waited long enough: highest priority first, several in one system call.  When that is is
:mod:`userspace.datagram.batch_queue`'s to say; here are the lanes and the clock.
"""

from __future__ import annotations

import errno
import time
from collections import deque
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Final, Literal, Self

from typing_extensions import Buffer

from userspace.datagram.batch import Batch
from userspace.datagram.batch_queue import (
    BATCH_SIZE,
    BATCH_TIMEOUT,
    BUFFERS,
    MAXIMUM_AGE,
    PAYLOAD_MAXIMUM,
    PRIORITIES,
    BatchQueue,
)
from userspace.datagram.batch_send import BatchSender, Outcome, error_number
from userspace.datagram.batch_statistics import BatchStatistics, PacketFailure, Reason
from userspace.datagram.batch_targets import Targets
from userspace.datagram.destination import Endpoint
from userspace.datagram.flow_gate import FlowGate, Flows
from userspace.datagram.lanes import Lanes
from userspace.datagram.socket_errors import SocketError
from userspace.datagram.xsk_lanes import XskLanes
from xdp.errors import BusyError, SluiceError, UsageError

if TYPE_CHECKING:
    from userspace.flow.recovery import Outcome as FlowOutcome

__all__ = ["BatchStatistics", "PacketFailure", "UDPBatchManager"]

#: Seconds: kernel sockets wait in whole milliseconds, rounded up (poll(2)).
_GRAIN: Final = 0.001
_NEVER: Final = float("inf")


class UDPBatchManager:
    """Queues packets and sends them in batches through ``lanes``, from service port ``port``.

    A batch is sent when ``batch_size`` packets wait, when the oldest has waited ``batch_timeout`` seconds
    (looked at by every call here, so call :meth:`poll` by :meth:`next_flush` where nothing else does), or by
    :meth:`flush_batches`.  0 is the highest of ``priorities``; batches are filled from the top.

    What finds no room is tried again, and dropped after ``maximum_age`` seconds.  Meanwhile packets fill
    the ``buffers`` (of ``buffer_size`` bytes, by default the longest payload there is; memory is taken when
    they are first used).  When all are in use, :meth:`queue_packet` returns False or, with
    ``when_full="raise"``, raises BusyError.

    With ``flows`` (see :mod:`userspace.datagram.flow_gate`) a packet leaves when its destination's
    FlowController lets it, too: it keeps its place until then, and ages.

    The lanes stay open at the end.  Belongs to one thread, signal handlers not included.  ``clock`` gives
    monotonic seconds.

    Raises UsageError for values out of range.
    """

    def __init__(
        self,
        lanes: Lanes,
        *,
        port: int | None = None,
        batch_size: int = BATCH_SIZE,
        batch_timeout: float = BATCH_TIMEOUT,
        buffers: int = BUFFERS,
        buffer_size: int = PAYLOAD_MAXIMUM,
        priorities: int = PRIORITIES,
        maximum_age: float = MAXIMUM_AGE,
        when_full: Literal["refuse", "raise"] = "refuse",
        flows: FlowGate | Flows | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if when_full not in {"refuse", "raise"}:
            raise UsageError(f'when_full is "refuse" or "raise", not {when_full!r}')
        #: Who may send when, with ``flows``.
        self.flows = flows if isinstance(flows, FlowGate) or flows is None else FlowGate(flows)
        self._queue = BatchQueue(
            batch_size=batch_size,
            batch_timeout=batch_timeout,
            buffers=buffers,
            buffer_size=buffer_size,
            priorities=priorities,
            maximum_age=maximum_age,
            gate=self.flows,
        )
        self._sender = BatchSender(lanes, port)
        self._lanes = lanes
        self._targets = Targets()
        self._lowest = priorities - 1
        self._buffers = buffers
        self._raises = when_full == "raise"
        self._clock = clock
        self._grain = 0.0 if isinstance(lanes, XskLanes) else _GRAIN
        self._closed = False
        self._unusable = False  # closed, or on_sent is being called

    # --- sending

    def queue_packet(self, destination: Endpoint, payload: Buffer, priority: int | None = None) -> bool:
        """Queue one datagram to an (address, port), copying the payload; whether there was a buffer for it.

        ``priority`` is the lowest by default.  When no buffer is free, one of a lower priority is taken: the
        latest of the lowest; that packet has failed with ENOBUFS.  Sends what is due; never waits for room.

        Raises UsageError (not an address and port; payload longer than a buffer; no such priority), BusyError
        (see ``when_full``), ValueError when closed: then nothing was queued.  Raises what :meth:`poll` does
        after it was queued.
        """
        if self._unusable:
            raise self._gone()
        queue = self._queue
        try:
            target = self._targets[destination]
        except TypeError:
            raise UsageError(f"destination {destination!r} is not an (address, port) tuple") from None
        now = self._clock()
        if not queue.free and now >= queue.due_at:
            self._send_due(now)
        accepted = queue.add(target, payload, self._lowest if priority is None else priority, now)
        if now >= queue.due_at:
            self._send_due(now)
        if not accepted and self._raises:
            raise BusyError(
                f"all {self._buffers} buffers are in use: the packets in them found no room",
                hint="send less, or give the manager more buffers",
            )
        return accepted

    def flush_batches(self) -> int:
        """Send all that waits, now; how many packets were sent.

        What finds no room keeps waiting, and what flow control lets wait: it is asked anew, so call this when
        rates were changed by hand.
        """
        if self._unusable:
            raise self._gone()
        return self._flush(self._clock())

    def poll(self, now: float | None = None) -> int:
        """Send what is due (at ``now`` of the clock); how many packets were sent.

        With flow control also calls its timeouts that have come, and raises what ``on_timeout`` does.
        Raises InterfaceGoneError, and ValueError when closed or when the lanes are.  Packets that were being
        sent then have failed (``failures`` names them), all others wait.
        """
        if self._unusable:
            raise self._gone()
        return self._send_due(self._clock() if now is None else now, timeouts=True)

    def next_flush(self) -> float | None:
        """When :meth:`poll` is to be called next, by the clock; None while there is nothing to wait for.

        With flow control also when an acknowledgement that does not come is taken for lost.
        """
        due = self._queue.next_flush()
        if self.flows is not None:
            timeout = self.flows.next_timeout()
            if timeout < _NEVER and (due is None or timeout < due):
                return timeout
        return due

    def acknowledged(
        self,
        destination: Endpoint,
        ranges: Iterable[tuple[int, int]],
        ack_delay: float = 0.0,
        ce_count: int | None = None,
        now: float | None = None,
    ) -> FlowOutcome | None:
        """A peer says what it has: as ``on_ack_received`` of its controller, None when it has none.

        What may leave by that is due, and leaves with the next call that looks at the time (:meth:`poll`).
        """
        if self._unusable:
            raise self._gone()
        if self.flows is None:
            raise UsageError(
                "acknowledgements are for flow control", hint="UDPBatchManager(lanes, flows=...)"
            )
        try:
            target = self._targets.get(destination)
        except TypeError:
            raise UsageError(f"destination {destination!r} is not an (address, port) tuple") from None
        endpoint = destination if target is None else target.endpoint
        now = self._clock() if now is None else now
        outcome = self.flows.acknowledged(endpoint, ranges, ack_delay, ce_count, now)
        self._queue.reconsider(endpoint, now)
        return outcome

    def _send_due(self, now: float, until: float = 0.0, *, timeouts: bool = False) -> int:
        """Send what is due now or by ``until``, if that is later."""
        sent, until = 0, max(now, until)
        if timeouts and self.flows is not None:
            self._time_out(self.flows, until)
        while reason := self._queue.due(until):
            sent += self._send_batch(reason, now, until)
        return sent

    def _time_out(self, flows: FlowGate, now: float) -> None:
        found = flows.time_out(now)
        for endpoint, _ in found:
            self._queue.reconsider(endpoint, now)
        for endpoint, outcome in found:
            if outcome is not None and flows.on_timeout is not None:
                flows.on_timeout(endpoint, outcome)

    def _flush(self, now: float) -> int:
        sent = 0
        self._queue.unblock()
        while self._queue.ready:
            sent += self._send_batch("demand", now, now)
        return sent

    def _send_batch(self, reason: Reason, now: float, until: float) -> int:
        queue = self._queue
        batch = queue.take(reason, until)
        outcome = Outcome(len(batch.slots))
        try:
            if batch.slots:
                self._sender.send(batch.targets, batch.payloads, outcome)
        finally:
            queue.settle(batch, now, calls=outcome.calls, unsent=outcome.unsent)
            if self.flows is not None:
                self._tell(self.flows)
        return len(batch.slots) - len(outcome.unsent)

    def _tell(self, flows: FlowGate) -> None:
        self._unusable = True  # or the payloads are overwritten
        try:
            flows.tell()
        finally:
            self._unusable = self._closed

    # --- receiving

    def receive_batch(self, maximum: int = 256, timeout: float | None = None) -> Batch:
        """As ``receive`` of the lanes, and sends what is due before and while it waits.

        It never sleeps past a time at which a batch is due: over kernel sockets, which wait in whole
        milliseconds, what would become due within the last of them is sent before.
        """
        clock = self._clock
        end = None if timeout is None else clock() + timeout
        while True:
            now = clock()
            self.poll(now)
            wait = None if end is None else max(end - now, 0.0)
            due = self.next_flush()
            if due is not None and (wait is None or now + wait > due):
                wait = due - now
                if self._grain:
                    milliseconds = int(wait * 1000)
                    if not milliseconds:
                        self._send_due(now, due, timeouts=True)
                        continue
                    wait = (milliseconds - 0.5) / 1000
            batch = self._lanes.receive(maximum, wait)
            if batch or (end is not None and clock() >= end):
                return batch

    # --- looking

    def __len__(self) -> int:
        """How many packets wait."""
        return self._queue.waiting

    @property
    def failures(self) -> deque[PacketFailure]:
        """Packets that failed, the latest last, as many as there are buffers; clear it as you like."""
        return self._queue.failures

    def socket_errors(self) -> tuple[SocketError, ...]:
        """As ``socket_errors`` of the lanes: what became of packets that had left, from other ports too."""
        return self._lanes.socket_errors()

    def statistics(self) -> BatchStatistics:
        """Counters since it was made, also after close."""
        return self._queue.statistics()

    # --- the end

    def _gone(self) -> Exception:
        if self._closed:
            return ValueError("this batch manager is closed")
        return UsageError(
            "on_sent may not use the batch manager", hint="remember what to do, and do it later"
        )

    def close(self) -> tuple[PacketFailure, ...]:
        """Send all that waits; what could not be sent (it has failed then).  May be called again.

        Raises nothing that the lanes or the network can cause: also what is left when the lanes are
        closed already, or their interface is gone, is in the result.
        """
        if self._closed:
            return ()
        if self._unusable:
            raise self._gone()
        self._closed = self._unusable = True
        error = errno.EAGAIN
        before = self._queue.failed
        try:
            self._flush(self._clock())
        except (SluiceError, ValueError) as raised:
            error = error_number(raised)
        finally:
            self._queue.give_up(error)
        count = self._queue.failed - before
        return tuple(self.failures)[-count:] if count else ()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
