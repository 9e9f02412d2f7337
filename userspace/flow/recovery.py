# SPDX-License-Identifier: Apache-2.0
"""What became of the packets that were sent: acknowledged, lost, or lost and then not (RFC 9002, 6 and 7).

    recovery = Recovery(now, congestion)
    number = recovery.sent.add(now, size, app_limited=False)
    outcome = recovery.on_ack(now, [(3, 9), (0, 1)], ack_delay=0.002, ce_count=None)
    outcome.acknowledged, outcome.lost, outcome.spurious
    recovery.on_timeout(now)            # at recovery.next_timeout() or later

A packet counts as lost when one sent after it was acknowledged and it is either ``packet_threshold`` numbers
older than that one or was sent longer ago than the loss delay.  Numbers and times grow together, so what is
lost is always the beginning of what is on its way, and nobody looks further than the first that is not.

Lost numbers are remembered for a while.  When one is acknowledged after all, the network has reordered: the
thresholds follow, within bounds (RFC 9002, 6.1.1), and fall back after sixteen reductions without such.
When everything that one reduction was for has arrived, the congestion controller is told to undo it.

Acknowledgements come from the network and may say anything.  One that names a number never sent is ignored
as a whole and counted.  Ranges are taken newest first; what overlaps or goes up again is cut off, so one
acknowledgement never costs more than a walk over what is on its way and :data:`RANGES_MAXIMUM` ranges.
"""

# ruff: noqa: FURB136, PLR1730 -- min and max are calls, which cost more than all else here

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

from userspace.flow.congestion import Ack, Congestion, Loss
from userspace.flow.rtt import TIME_THRESHOLD, RttEstimator
from userspace.flow.sent import LIMIT, Packet, SentPackets

#: Numbers by which a packet may be overtaken (RFC 9002, 6.1.1: kPacketThreshold).
PACKET_THRESHOLD: Final = 3
#: As far as reordering raises it: above that the time threshold decides, and scans stay short.
PACKET_THRESHOLD_MAXIMUM: Final = 256
#: Reordering raises the time threshold by as much as RFC 9002 begins with, to two round-trip times at most:
#: as long as RFC 8985 (6.2) lets its window grow.
TIME_THRESHOLD_STEP: Final = 1 / 8
TIME_THRESHOLD_MAXIMUM: Final = 2.0
#: Reductions without reordering after which the thresholds halve (RFC 8985, 6.2 forgets after as many).
REORDERING_MEMORY: Final = 16
#: Probe timeouts in a row without any packet through (RFC 9002, 7.6.1: kPersistentCongestionThreshold).
PERSISTENT_THRESHOLD: Final = 3
#: Seconds: backoff ends here, or at the probe timeout itself where that is longer (RFC 8961, 4: at least 60).
TIMEOUT_MAXIMUM: Final = 60.0
#: 2 ** 16 ms is over that already.
BACKOFF_MAXIMUM: Final = 16
#: Ranges of one acknowledgement that are looked at; a sender of acknowledgements keeps fewer.
RANGES_MAXIMUM: Final = 256
#: Lost packets that are remembered, until so many probe timeouts after they left: one for the round trip,
#: two for reordering, as long as the time threshold at most.  Later than that nothing is undone.
LOST_MAXIMUM: Final = 1024
LOST_MEMORY: Final = 3.0

_NEVER: Final = math.inf
_NOTHING: Final[list[int]] = []
#: Half of the time that Outcome() takes.
_new: Final = tuple.__new__


class Outcome(NamedTuple):
    """What one event has shown; numbers of packets, in no particular order."""

    #: Newly acknowledged.
    acknowledged: Sequence[int]
    #: Newly counted as lost.
    lost: Sequence[int]
    #: Counted as lost before, acknowledged now.
    spurious: Sequence[int]
    #: Nothing was heard for too long: send one packet, whatever the window says (RFC 9002, 6.2.4).
    probe: bool = False


class Recovery:
    """Loss detection of one path, and the only one who talks to its congestion controller about it.

    Whoever calls keeps ``now`` from going backwards.
    """

    __slots__ = (
        "_epoch", "_epoch_began", "_epoch_left", "_forget_at", "_loss", "_lost", "_quiet_reductions",
        "_run_from", "_run_last", "_timed_out_at", "ack", "acknowledged_packets", "ce_packets", "congestion",
        "delivery_rate", "impossible", "largest_acked", "loss_time", "lost_bytes", "lost_packets",
        "packet_threshold", "persistent", "pto_count", "rtt", "sent", "spurious_packets", "time_threshold",
        "undone",
    )  # fmt: skip

    def __init__(
        self, now: float, congestion: Congestion, *, rtt: RttEstimator | None = None, limit: int = LIMIT
    ) -> None:
        self.congestion = congestion
        self.rtt = rtt if rtt is not None else RttEstimator()
        self.sent = SentPackets(now, limit)
        self.largest_acked = -1
        self.loss_time = _NEVER
        self.pto_count = 0
        self.packet_threshold = PACKET_THRESHOLD
        self.time_threshold = TIME_THRESHOLD
        self.delivery_rate = 0.0  # bytes/s, latest sample
        # Counters since the beginning.
        self.acknowledged_packets = self.lost_packets = self.lost_bytes = self.spurious_packets = 0
        self.ce_packets = self.impossible = self.persistent = self.undone = 0
        #: What the latest acknowledgement was reported as.
        self.ack = Ack()
        self._loss = Loss()
        self._lost: list[
            tuple[int, int, float, int]
        ] = []  # (number, bytes, when it left, reduction), by number
        self._forget_at = _NEVER  # when the first of them is too old
        # Losses of packets that left before a reduction belong to it (RFC 9002, 7.3.2).
        self._epoch = 0
        self._epoch_began = -_NEVER
        self._epoch_left = -1  # lost packets of it that have not turned up; negative: it can't be undone
        self._quiet_reductions = 0
        # The packets that were lost in an unbroken row: their last number, when the first of them left.
        self._run_last = -2
        self._run_from = 0.0
        # A caller who has no probe to send is asked again a timeout later, not at once.
        self._timed_out_at = -_NEVER

    # --- acknowledgements

    def on_ack(
        self,
        now: float,
        ranges: Iterable[tuple[int, int]],
        ack_delay: float = 0.0,
        ce_count: int | None = None,
    ) -> Outcome:
        """Inclusive (first, last) pairs, newest first; ``ce_count`` is the peer's count of all CE marks."""
        sent = self.sent
        slots, mask, base, upper = sent.slots, sent.mask, sent.base, sent.next
        # What is below the floor cannot be new; ``missing`` goes down the remembered lost numbers.
        floor = base
        lost, index, missing = self._lost, -1, -1
        if lost:
            if now > self._forget_at:
                self._forget(now, lost)
            index = len(lost) - 1
            if lost:
                missing = lost[index][0]
                floor = min(base, lost[0][0])
        acknowledged: list[int] = []
        late: list[int] = _NOTHING
        newest: Packet | None = None
        largest, size, left = -1, 0, RANGES_MAXIMUM
        for first, last in ranges:
            if last >= upper:
                if largest < 0:
                    self.impossible += 1
                    return Outcome(_NOTHING, _NOTHING, _NOTHING)
                last = upper - 1  # noqa: PLW2901 -- the part below the range before
            left -= 1
            if last < floor or left < 0:
                break
            if first > last:
                continue
            if largest < 0:
                largest = last
            upper = first
            if last >= base:
                number = last
                least = first if first > base else base
                while number >= least:
                    packet = slots[number & mask]
                    if packet is not None:
                        slots[number & mask] = None
                        size += packet[0]
                        acknowledged.append(number)
                        if newest is None:
                            newest = packet
                    number -= 1
                if first <= base:
                    base = last + 1
            while missing > last:
                index -= 1
                missing = lost[index][0] if index >= 0 else -1
            if first <= missing >= 0:
                late, index = self._turned_up(now, first, index, late)
                missing = lost[index][0] if index >= 0 else -1
        if newest is None:
            if late:
                self.pto_count = 0  # the way is open
                sent.delivery = sent.delivered, now, *sent.delivery[2:]
                self._grade(now)
            return Outcome(_NOTHING, _NOTHING, late)

        ack, rtt = self.ack, self.rtt
        ack.prior_in_flight = sent.in_flight
        sent.in_flight -= size
        ack.delivered = sent.delivered = delivered = sent.delivered + size
        packets = len(acknowledged)
        self.acknowledged_packets += packets
        self.pto_count = 0
        if largest > self.largest_acked:
            self.largest_acked = largest
        _, sent_at, (prior_delivered, prior_at, first_sent_at, app_limited) = newest
        # A sample only when the newest that it acknowledges is new (RFC 9002, 5.1).
        ack.rtt = rtt.update(now, now - sent_at, ack_delay) if acknowledged[0] == largest else None
        # The longer of sending and acknowledging took so long (draft, 3.3); shorter than a round trip
        # is no measurement.
        elapsed, interval = now - prior_at, sent_at - first_sent_at
        if elapsed > interval:
            interval = elapsed
        if interval >= rtt.minimum > 0.0:
            ack.delivery_rate = self.delivery_rate = (delivered - prior_delivered) / interval
        else:
            ack.delivery_rate = 0.0
        limited = sent.app_limited_until
        if limited and limited < delivered:
            limited = sent.app_limited_until = 0
        sent.delivery = delivered, now, sent_at, limited > 0

        gone: Sequence[int] = _NOTHING
        end = sent.next
        while base < end and slots[base & mask] is None:
            base += 1
        sent.base = base
        if base <= self.largest_acked:
            gone = self._detect(now)
        else:
            self.loss_time = _NEVER
        if late:
            self._grade(now)

        ack.bytes, ack.packets = size, packets
        ack.largest_sent_at = sent_at
        ack.smoothed_rtt, ack.min_rtt = rtt.smoothed, rtt.minimum
        ack.in_flight = sent.in_flight
        ack.prior_delivered = prior_delivered
        ack.app_limited = app_limited
        if ce_count is not None and ce_count > self.ce_packets:
            self._marked(now, ce_count, sent_at)
        self.congestion.on_ack(now, ack)
        return _new(Outcome, (acknowledged, gone, late, False))

    def _marked(self, now: float, ce_count: int, largest_sent_at: float) -> None:
        """More marks than packets that arrived are a peer's mistake (RFC 9000, 13.4.2.1): not believed."""
        if ce_count <= self.acknowledged_packets + self.spurious_packets:
            marked = ce_count - self.ce_packets
            self.ce_packets = ce_count
            if largest_sent_at > self._epoch_began:
                self._new_epoch(now)
                self._epoch_left = -1  # the network said so itself
            self.congestion.on_ecn(now, marked, largest_sent_at)

    # --- lost, and not

    def _detect(self, now: float) -> list[int]:
        """All that is lost by now (RFC 9002, 6.1); sets when the next will be."""
        sent = self.sent
        slots, mask = sent.slots, sent.mask
        delay = self.rtt.loss_delay(self.time_threshold)
        newest_lost = self.largest_acked - self.packet_threshold
        numbers: list[int] = []
        packets: list[Packet] = []
        self.loss_time = _NEVER
        for number in range(sent.base, self.largest_acked + 1):
            packet = slots[number & mask]
            if packet is None:
                continue
            due = packet[1] + delay
            if number > newest_lost and due > now:
                self.loss_time = due
                break
            slots[number & mask] = None
            numbers.append(number)
            packets.append(packet)
        if numbers:
            self._lose(now, numbers, packets)
        return numbers

    def _lose(self, now: float, numbers: Sequence[int], packets: Sequence[Packet]) -> None:
        """These were taken out of their slots."""
        sent, loss = self.sent, self._loss
        size = sum([packet[0] for packet in packets])
        loss.prior_in_flight = sent.in_flight
        sent.in_flight -= size
        sent.advance()
        loss.in_flight = sent.in_flight
        loss.bytes, loss.packets = size, len(numbers)
        loss.largest_sent_at = packets[-1][1]
        self.lost_packets += loss.packets
        self.lost_bytes += size
        if loss.largest_sent_at > self._epoch_began:
            self._new_epoch(now)
        if self._epoch_left >= 0:
            self._epoch_left += len(numbers)
        self._remember(now, numbers, packets)
        self.congestion.on_loss(now, loss)
        if self._persists(numbers, packets):
            self.persistent += 1
            self._epoch_left = -1
            self.rtt.restart_minimum(now)
            self.congestion.on_persistent(now)

    def _new_epoch(self, now: float) -> None:
        self._epoch += 1
        self._epoch_began = now
        self._epoch_left = 0
        self._quiet_reductions += 1
        if self._quiet_reductions >= REORDERING_MEMORY:
            self._quiet_reductions = 0
            self.packet_threshold = max(PACKET_THRESHOLD, self.packet_threshold // 2)
            self.time_threshold = TIME_THRESHOLD + (self.time_threshold - TIME_THRESHOLD) / 2

    def _persists(self, numbers: Sequence[int], packets: Sequence[Packet]) -> bool:
        """Whether all that was sent for three probe timeouts is lost (RFC 9002, 7.6.2)."""
        rtt, found = self.rtt, False
        duration = PERSISTENT_THRESHOLD * rtt.pto()
        for number, packet in zip(numbers, packets, strict=True):
            if number != self._run_last + 1 or self._run_from < rtt.first_sample_at:
                self._run_from = packet[1]
            elif packet[1] - self._run_from > duration:
                found = True
            self._run_last = number
        if found:
            self._run_last = -2  # once for each such time
        return found

    def _remember(self, now: float, numbers: Sequence[int], packets: Sequence[Packet]) -> None:
        lost = self._lost
        for number, packet in zip(numbers, packets, strict=True):
            one = (number, packet[0], packet[1], self._epoch)
            if lost and number < lost[-1][0]:
                insort(lost, one)
            else:
                lost.append(one)
        del lost[:-LOST_MAXIMUM]
        self._forget(now, lost)

    def _forget(self, now: float, lost: list[tuple[int, int, float, int]]) -> None:
        """Those that were sent too long ago to turn up."""
        memory = LOST_MEMORY * self.rtt.pto()
        expired = 0
        while expired < len(lost) and lost[expired][2] + memory < now:
            expired += 1
        del lost[:expired]
        self._forget_at = lost[0][2] + memory if lost else _NEVER

    def _turned_up(self, now: float, first: int, index: int, late: list[int]) -> tuple[list[int], int]:
        """Take lost packets back, from that index down to a number, and raise the thresholds that lost them.

        The numbers that turned up so far, and the index of the next one that did not.
        """
        lost, sent, late = self._lost, self.sent, [*late]
        while index >= 0 and lost[index][0] >= first:
            number, size, sent_at, epoch = lost.pop(index)
            index -= 1
            late.append(number)
            sent.delivered += size
            self.lost_bytes -= size
            self.spurious_packets += 1
            if epoch == self._epoch and self._epoch_left > 0:
                self._epoch_left -= 1
            # So many have overtaken it.
            overtaken = self.largest_acked - number + 1
            if overtaken > self.packet_threshold:
                self.packet_threshold = min(overtaken, PACKET_THRESHOLD_MAXIMUM)
            if now - sent_at > self.rtt.loss_delay(self.time_threshold):
                self.time_threshold = min(self.time_threshold + TIME_THRESHOLD_STEP, TIME_THRESHOLD_MAXIMUM)
        self._quiet_reductions = 0
        return late, index

    def _grade(self, now: float) -> None:
        """Some have turned up; were they all of the latest reduction?"""
        if self._epoch_left == 0:
            self._epoch_left = -1
            self._epoch_began = -_NEVER  # the reduction that never was covers no further loss
            self.undone += 1
            self.congestion.on_spurious(now)

    def on_lost(self, now: float, number: int) -> Outcome:
        """The caller knows that one is lost; nothing happens when it is not on its way."""
        packet = self.sent.take(number)
        if packet is None:
            return Outcome(_NOTHING, _NOTHING, _NOTHING)
        self.sent.in_flight += packet[0]  # _lose takes it off
        self._lose(now, (number,), (packet,))
        return Outcome(_NOTHING, (number,), _NOTHING)

    # --- time

    def next_timeout(self) -> float:
        """When to call :meth:`on_timeout`; infinite while nothing is on its way."""
        sent = self.sent
        if not sent.in_flight:
            return _NEVER
        if self.loss_time != _NEVER:
            return self.loss_time
        pto = self.rtt.pto()
        wait = pto * (1 << self.pto_count)
        most = pto if pto > TIMEOUT_MAXIMUM else TIMEOUT_MAXIMUM
        began = sent.last_sent_at
        if began < self._timed_out_at:  # and the probe has not left
            began = self._timed_out_at
        return began + (wait if wait < most else most)

    def on_timeout(self, now: float) -> Outcome:
        """Find what is lost by time, or ask for a probe; nothing when it is too early."""
        if now < self.next_timeout():
            return Outcome(_NOTHING, _NOTHING, _NOTHING)
        if self.loss_time != _NEVER:
            return Outcome(_NOTHING, self._detect(now), _NOTHING)
        self.pto_count = min(self.pto_count + 1, BACKOFF_MAXIMUM)
        self._timed_out_at = now
        sent = self.sent
        lost: list[int] = []
        if sent.next - sent.base > sent.mask and len(sent.slots) >= sent.limit:
            # No place for the probe: the oldest is given up.  That is no sign of congestion.
            lost.append(sent.base)
            packet = sent.take(sent.base)
            assert packet is not None
            self.lost_packets += 1
            self.lost_bytes += packet[0]
        return Outcome(_NOTHING, lost, _NOTHING, probe=True)

    def on_overflow(self, now: float, packets: int) -> None:
        """So many did not fit into what is below: as if the first router had marked them."""
        if self.sent.last_sent_at > self._epoch_began:
            self._new_epoch(now)
            self._epoch_left = -1
        self.congestion.on_ecn(now, packets, self.sent.last_sent_at)
