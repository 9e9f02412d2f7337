# SPDX-License-Identifier: Apache-2.0
"""A sliding window: messages that arrive in order, all of them or as long as they are worth it.

    window = SlidingWindow(largest=1100)                    buffer = ReorderBuffer(largest=1100)
    window.put(now, b"...", deadline=now + 0.5)
    number, payload = window.next(now)       --packet-->    if buffer.receive(number, payload):
    window.on_sent(number, sequence)                            received.add(now, sequence)
    window.on_outcome(outcome)               <---ack---     buffer.credit
    window.on_credit(credit)                                buffer.read()

Two kinds of numbers: a message keeps its number, a packet has a sequence of its own (that of FlowController,
whose Outcome says what became of it).  A message whose packet was lost is sent again in another one.

With a ``deadline`` (seconds) or ``attempts`` a message is given up when it was lost and its time is over or
its attempts are used up.  In its place an empty message is sent, until it arrives, so that the receiver does
not wait for ever.  One whose deadline passes before it was ever sent gets no number, and nobody misses it.

Nothing grows without bound.  ``put`` refuses when the queue is full.  On their way are at most ``packets``
messages and ``size`` bytes; both may be changed at any time.  The receiver says up to which number it has
room (``credit``), and what comes in spite of that it refuses: such a packet must not be acknowledged.  The
credit is computed so that whatever it allows fits, however long the messages are.

When the credit is used up and nothing is on its way, the message that lies beyond is sent as a probe at
``next_probe``, less and less often: the news of more credit may have been lost (RFC 9293, 3.8.6.1).
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from typing import Final

from userspace.flow.congestion import MAX_DATAGRAM_SIZE
from userspace.flow.recovery import LOST_MAXIMUM, Outcome
from userspace.flow.sent import check_whole
from xdp.errors import UsageError

#: Messages and bytes on their way, and in the receiver's buffer.
PACKETS: Final = 1024
SIZE: Final = 1 << 20
PACKETS_MAXIMUM: Final = 1 << 20
SIZE_MAXIMUM: Final = 1 << 40
LARGEST_MAXIMUM: Final = 65_527
#: Seconds to the first probe and between the later ones (RFC 6298, 2.4 and 2.5: from 1 to 60).
PROBE: Final = 1.0
PROBE_MAXIMUM: Final = 60.0

_NEVER: Final = math.inf


class _Message:
    __slots__ = ("attempts", "copies", "deadline", "payload")

    def __init__(self, payload: bytes, deadline: float, attempts: float) -> None:
        self.payload = payload
        self.deadline = deadline
        self.attempts = attempts  # those that are left
        self.copies = 0  # packets with it that are on their way


class SlidingWindow:
    """The sender's side.

    ``largest`` bytes of one message; ``packets`` and ``size`` (bytes) on their way at most;
    ``queue_packets`` and ``queue_size`` that wait to be sent the first time; ``credit`` messages that may be
    sent before the receiver has said anything.  UsageError for values out of range, in every method.
    """

    __slots__ = (
        "_again", "_by_sequence", "_credit", "_late", "_live", "_probe_at", "_probe_wait", "_queue",
        "abandoned", "bytes_in_flight", "delivered", "expired", "largest", "next_number", "packets",
        "queue_packets", "queue_size", "queued_bytes", "refused", "retransmitted", "size",
    )  # fmt: skip

    def __init__(
        self,
        *,
        largest: int = MAX_DATAGRAM_SIZE,
        packets: int = PACKETS,
        size: int = SIZE,
        queue_packets: int = PACKETS,
        queue_size: int = SIZE,
        credit: int = PACKETS,
    ) -> None:
        check_whole("largest", largest, 1, LARGEST_MAXIMUM)
        check_whole("queue_packets", queue_packets, 1, PACKETS_MAXIMUM)
        check_whole("queue_size", queue_size, largest, SIZE_MAXIMUM)
        check_whole("credit", credit, 0, PACKETS_MAXIMUM)
        self.largest = largest
        self.set_limits(packets=packets, size=size)
        self.queue_packets, self.queue_size = queue_packets, queue_size
        self._credit = credit  # numbers below may be sent
        self._queue: deque[_Message] = deque()
        self.queued_bytes = 0
        self.next_number = 0
        self._live: dict[int, _Message] = {}  # sent and neither delivered nor given up, by number
        self.bytes_in_flight = 0  # of those
        self._again: list[int] = []  # a heap of numbers; some may be live no more
        self._by_sequence: dict[int, int] = {}  # packets on their way
        self._late: dict[int, int] = {}  # lost ones, which may turn up
        self._probe_at = _NEVER
        self._probe_wait = PROBE
        # Messages since the beginning; put = delivered + abandoned + expired + waiting + on their way.
        self.delivered = self.abandoned = self.expired = self.refused = self.retransmitted = 0

    def set_limits(self, *, packets: int | None = None, size: int | None = None) -> None:
        """Other limits from now on; what is on its way already stays on its way."""
        if packets is not None:
            check_whole("packets", packets, 1, PACKETS_MAXIMUM)
            self.packets = packets
        if size is not None:
            check_whole("size", size, self.largest, SIZE_MAXIMUM)
            self.size = size

    # --- in

    def put(
        self, now: float, payload: bytes, *, deadline: float | None = None, attempts: int | None = None
    ) -> bool:
        """Queue a message; False when there is no room: come back after the next acknowledgement.

        It is given up when it was lost and ``deadline`` (a time) has come, or after so many ``attempts``.
        """
        length = len(payload)
        if not 1 <= length <= self.largest:
            raise UsageError(f"a message has 1 to {self.largest} bytes, not {length}")
        if attempts is not None:
            check_whole("attempts", attempts, 1, PACKETS_MAXIMUM)
        if deadline is not None and not deadline > -_NEVER:
            raise UsageError(f"a deadline is a time in seconds or None, not {deadline!r}")
        if deadline is not None and deadline <= now:
            self.expired += 1
            return True
        if len(self._queue) >= self.queue_packets or self.queued_bytes + length > self.queue_size:
            self.refused += 1
            return False
        message = _Message(
            bytes(payload),
            _NEVER if deadline is None else deadline,
            _NEVER if attempts is None else attempts,
        )
        self._queue.append(message)
        self.queued_bytes += length
        return True

    @property
    def queued(self) -> int:
        """Messages that wait to be sent the first time."""
        return len(self._queue)

    @property
    def in_flight(self) -> int:
        """Messages that were sent and not acknowledged yet, with the empty ones that stand for others."""
        return len(self._live)

    # --- out

    def next(self, now: float, *, probe: bool = False) -> tuple[int, bytes] | None:
        """The message to be sent now, lost ones first; None when there is none or the window is closed.

        It stays the next one until :meth:`on_sent`.  ``probe``: Outcome.probe was true, so that without
        anything else the oldest that is on its way is given once more.
        """
        found = self._next_again(now) or self._next_new(now)
        if found is None and probe and self._live:
            number = min(self._live)
            found = number, self._live[number].payload
        return found

    def _next_again(self, now: float) -> tuple[int, bytes] | None:
        again = self._again
        while again:
            number = again[0]
            message = self._live.get(number)
            if message is None or message.copies:
                heapq.heappop(again)
                continue
            if number >= self._credit and not self._may_probe(now):
                return None
            if message.payload and (message.attempts <= 0 or message.deadline <= now):
                self._abandon(message)
            return number, message.payload
        return None

    def _abandon(self, message: _Message) -> None:
        """An empty one takes its place."""
        self.abandoned += 1
        self.bytes_in_flight -= len(message.payload)
        message.payload = b""

    def _next_new(self, now: float) -> tuple[int, bytes] | None:
        queue = self._queue
        while queue and queue[0].deadline <= now:
            self.queued_bytes -= len(queue.popleft().payload)
            self.expired += 1
        if not queue:
            self._probe_at = _NEVER
            return None
        payload = queue[0].payload
        if self.next_number >= self._credit:
            if self._live or not self._may_probe(now):
                return None
        elif len(self._live) >= self.packets or self.bytes_in_flight + len(payload) > self.size:
            return None
        return self.next_number, payload

    def _may_probe(self, now: float) -> bool:
        """Whether it is time to try a message that the receiver had no room for."""
        if self._probe_at == _NEVER:
            self._probe_at = now + self._probe_wait
        return now >= self._probe_at

    @property
    def next_probe(self) -> float:
        """When :meth:`next`, which found that it is needed, will give a probe of the receiver's credit.

        Infinite while it is not.
        """
        return self._probe_at

    def on_sent(self, number: int, sequence: int) -> None:
        """The message that next() gave has left, in the packet of that sequence."""
        message = self._live.get(number)
        if message is not None:
            self.retransmitted += 1
        elif number == self.next_number and self._queue:
            message = self._live[number] = self._queue.popleft()
            length = len(message.payload)
            self.queued_bytes -= length
            self.bytes_in_flight += length
            self.next_number += 1
        else:
            raise UsageError(f"message {number!r} is not the one that next() gave")
        if number >= self._credit:
            self._probe_wait = min(2 * self._probe_wait, PROBE_MAXIMUM)
            self._probe_at = _NEVER
        message.copies += 1
        message.attempts -= 1
        self._by_sequence[sequence] = number

    # --- what became of it

    def on_outcome(self, outcome: Outcome) -> list[int]:
        """What FlowController says of packets; the numbers of the messages that have arrived by that.

        An empty message that stands for one that was given up is not among them.
        """
        done: list[int] = []
        by_sequence = self._by_sequence
        for sequence in outcome.acknowledged:
            number = by_sequence.pop(sequence, None)
            if number is not None:
                self._arrived(number, done)
        for sequence in outcome.spurious:
            number = self._late.pop(sequence, None)
            if number is not None:
                self._arrived(number, done)
        for sequence in outcome.lost:
            number = by_sequence.pop(sequence, None)
            if number is not None:
                self._lost(sequence, number)
        return done

    def _arrived(self, number: int, done: list[int]) -> None:
        message = self._live.pop(number, None)
        if message is not None and message.payload:
            self.bytes_in_flight -= len(message.payload)
            self.delivered += 1
            done.append(number)

    def _lost(self, sequence: int, number: int) -> None:
        self._late[sequence] = number
        if len(self._late) > LOST_MAXIMUM:
            del self._late[next(iter(self._late))]
        message = self._live.get(number)
        if message is not None:
            message.copies -= 1
            if not message.copies:
                heapq.heappush(self._again, number)

    def on_credit(self, credit: int) -> None:
        """The receiver has room for all numbers below; less than before is old news."""
        if credit > self._credit:
            # No more than a receiver can mean, whatever the network says.
            self._credit = min(credit, self.next_number + PACKETS_MAXIMUM)
            self._probe_at = _NEVER
            self._probe_wait = PROBE

    def __repr__(self) -> str:
        return (
            f"<SlidingWindow: {self.in_flight} messages on their way, {self.queued} queued, "
            f"{self.delivered} delivered, {self.abandoned} given up, credit up to {self._credit}>"
        )


class ReorderBuffer:
    """The receiver's side: messages in order, in a buffer of ``packets`` messages and ``size`` bytes.

    ``largest`` is the sender's.  UsageError for values out of range.
    """

    __slots__ = (
        "_ahead", "_asked", "_credit", "_ready", "_told", "buffered_bytes", "duplicates", "largest",
        "packets", "received", "refused", "size", "skipped", "wanted",
    )  # fmt: skip

    def __init__(self, *, largest: int = MAX_DATAGRAM_SIZE, packets: int = PACKETS, size: int = SIZE) -> None:
        check_whole("largest", largest, 1, LARGEST_MAXIMUM)
        self.largest = largest
        self.buffered_bytes = 0
        self.wanted = 0  # the number that is delivered next
        self._ready: deque[bytes] = deque()  # in order, not read yet
        self._ahead: dict[int, bytes] = {}  # those that wait for earlier ones
        self._credit = 0
        self._told = 0  # the credit that the sender was told of
        self._asked = False  # it went further than that, so it may not know
        # Messages since the beginning.
        self.received = self.skipped = self.duplicates = self.refused = 0
        self.set_limits(packets=packets, size=size)

    def set_limits(self, *, packets: int | None = None, size: int | None = None) -> None:
        """Other limits from now on; what was promised to the sender already still holds."""
        if packets is not None:
            check_whole("packets", packets, 1, PACKETS_MAXIMUM)
            self.packets = packets
        if size is not None:
            check_whole("size", size, self.largest, SIZE_MAXIMUM)
            self.size = size
        self._promise()

    def receive(self, number: int, payload: bytes) -> bool:
        """A message came; False when there is no room: the packet must not be acknowledged.

        A duplicate has been received, so its packet may be.  An empty one stands for one given up.
        """
        if number >= self._credit or number < 0 or len(payload) > self.largest:
            self.refused += 1
            self._asked = True
            return False
        if number < self.wanted or number in self._ahead:
            self.duplicates += 1
            return True
        self.received += 1
        self._ahead[number] = payload
        self.buffered_bytes += len(payload)
        while (one := self._ahead.pop(self.wanted, None)) is not None:
            self.wanted += 1
            if one:
                self._ready.append(one)
            else:
                self.skipped += 1
        self._promise()
        return True

    def _promise(self) -> None:
        """Further numbers, so many that they fit even if all are of the largest size."""
        held = len(self._ready)
        unread = self.wanted - held  # as if numbers that are skipped were read at once
        buffered = held + len(self._ahead)
        room = max(0, self.size - self.buffered_bytes) // self.largest
        self._credit = max(self._credit, unread + min(self.packets, buffered + room))

    def read(self, limit: int = PACKETS_MAXIMUM) -> list[bytes]:
        """Take messages in order, so many at most."""
        found: list[bytes] = []
        while self._ready and len(found) < limit:
            one = self._ready.popleft()
            self.buffered_bytes -= len(one)
            found.append(one)
        self._promise()
        return found

    @property
    def readable(self) -> int:
        """Messages that can be read."""
        return len(self._ready)

    @property
    def buffered(self) -> int:
        """Messages in the buffer."""
        return len(self._ready) + len(self._ahead)

    @property
    def credit_due(self) -> bool:
        """Whether to tell the sender at once: half of the buffer is new (RFC 9293, 3.8.6.2.2), or it went
        too far.
        """
        return self._asked or self._credit - self._told > self.packets // 2

    @property
    def credit(self) -> int:
        """The sender may send all numbers below."""
        return self._credit

    def take_credit(self) -> int:
        """The same, and it is told now."""
        self._told, self._asked = self._credit, False
        return self._credit

    def __repr__(self) -> str:
        return (
            f"<ReorderBuffer: {self.buffered} messages of {self.buffered_bytes} bytes, "
            f"{self.readable} readable, next is {self.wanted}, credit up to {self._credit}>"
        )
