# SPDX-License-Identifier: Apache-2.0
"""What AF_XDP sockets and their rings counted, and where the frames are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from userspace.datagram.descriptors import LaneDescriptors, LaneSpec
from userspace.native._native import ffi, lib

if TYPE_CHECKING:
    from userspace.native._native import CData


@dataclass(frozen=True, slots=True)
class LaneStatistics:
    """One lane of one queue, in packets since opening unless said otherwise.

    ``waiting`` are descriptors in the receive ring now, ``held`` frames with the application now: a
    packet in several frames (``jumbo`` of those received) has one of each for every frame. ``too_long``
    were discarded: in several frames, and longer than the MTU allowed when the lanes were opened.
    The rest is XDP_STATISTICS of the lane's socket: ``ring_full`` came while the
    ring was full, ``dropped`` found no frame or did not fit one, ``fill_empty``
    counts times that the queue had no frame left.
    """

    name: str
    received: int
    received_bytes: int
    waiting: int
    held: int
    ring_full: int
    dropped: int
    fill_empty: int
    jumbo: int
    too_long: int


@dataclass(frozen=True, slots=True)
class Frames:
    """Where the frames of a queue are; ``balanced`` is always true.

    ``reserved`` are those that the application writes payloads into (ZeroCopyUDP), ``application``
    those of received packets that it holds, by lane.
    """

    total: int
    free: int
    reserved: int
    kernel: int
    transmit: int
    application: tuple[int, ...]

    @property
    def balanced(self) -> bool:
        """Whether every frame is somewhere."""
        return self.total == self.free + self.reserved + self.kernel + self.transmit + sum(self.application)

    @classmethod
    def of(cls, raw: CData, lanes: int) -> Frames:
        """From a ``struct sl_frames``."""
        held = tuple(raw.application[index] for index in range(lanes))
        return cls(raw.total, raw.free, raw.reserved, raw.kernel, raw.transmit, held)


@dataclass(frozen=True, slots=True)
class QueueStatistics:
    """One queue; ``sent`` counts packets given to the kernel, ``completed`` those it is done with.

    Of those sent, ``echoed`` went back and ``forwarded`` on; the refused ones of either were given back.

    ``kicks``, ``wakeups`` and ``polls`` are system calls to start sending, to make a
    driver look at the fill ring again, and for busy polling.
    """

    queue: int
    lanes: tuple[LaneStatistics, ...]
    frames: Frames
    sent: int
    completed: int
    echoed: int
    echo_refused: int
    forwarded: int
    forward_refused: int
    transmit_invalid: int
    kicks: int
    wakeups: int
    polls: int = 0


@dataclass(frozen=True, slots=True)
class XskStatistics:
    """All queues."""

    queues: tuple[QueueStatistics, ...]

    @property
    def received(self) -> int:
        """Packets received in all lanes."""
        return sum(lane.received for queue in self.queues for lane in queue.lanes)

    @property
    def sent(self) -> int:
        """Packets given to the kernel to send."""
        return sum(queue.sent for queue in self.queues)

    def lane(self, name: str) -> LaneStatistics:
        """One lane, over all queues."""
        found = [lane for queue in self.queues for lane in queue.lanes if lane.name == name]
        if not found:
            raise KeyError(name)
        return LaneStatistics(
            name,
            *(
                sum(getattr(lane, field) for lane in found)
                for field in (
                    "received",
                    "received_bytes",
                    "waiting",
                    "held",
                    "ring_full",
                    "dropped",
                    "fill_empty",
                    "jumbo",
                    "too_long",
                )
            ),
        )


def read_frames(queue: CData, lanes: int, *, recount: bool = False) -> Frames:
    """Counts as they are kept or, slow, counted anew frame by frame."""
    raw = ffi.new("struct sl_frames *")
    if recount:
        lib.sl_queue_recount(queue, raw)
    else:
        lib.sl_queue_frames(queue, raw)
    return Frames.of(raw, lanes)


def read_queue(queue: CData, number: int, lanes: Sequence[LaneSpec]) -> QueueStatistics:
    """One queue, also when it is closed (the sockets' own counters are then zero)."""
    counters = ffi.new("struct sl_queue_counters *")
    lib.sl_queue_counters(queue, counters)
    frames = read_frames(queue, len(lanes))
    found = []
    for index, lane in enumerate(lanes):
        raw = ffi.new("struct sl_xsk_statistics *")
        fd = lib.sl_queue_socket(queue, index)
        if fd >= 0:
            lib.sl_xsk_statistics(fd, raw)
        found.append(
            LaneStatistics(
                lane.name,
                counters.received[index],
                counters.received_bytes[index],
                counters.waiting[index],
                frames.application[index],
                raw.rx_ring_full,
                raw.rx_dropped,
                raw.rx_fill_ring_empty_descs,
                counters.jumbo[index],
                counters.too_long[index],
            )
        )
    sending = ffi.new("struct sl_xsk_statistics *")
    fd = lib.sl_queue_transmit_socket(queue)
    if fd >= 0:
        lib.sl_xsk_statistics(fd, sending)
    return QueueStatistics(
        number,
        tuple(found),
        frames,
        counters.sent,
        counters.completed,
        counters.echoed,
        counters.echo_refused,
        counters.forwarded,
        counters.forward_refused,
        sending.tx_invalid_descs,
        counters.kicks,
        counters.wakeups,
        counters.polls,
    )


def read_queues(queues: Sequence[CData], numbers: Sequence[int], lanes: Sequence[LaneSpec]) -> XskStatistics:
    """What all queues counted."""
    found = [read_queue(queue, number, lanes) for queue, number in zip(queues, numbers, strict=True)]
    return XskStatistics(tuple(found))


def describe(descriptors: LaneDescriptors, queues: Sequence[int]) -> dict[str, object]:
    """What these lanes are made of, JSON-able."""
    geometry = descriptors.geometry
    return {
        "mode": descriptors.mode,
        "interface": descriptors.interface,
        "queues": list(queues),
        "lanes": [lane.name for lane in descriptors.lanes],
        "refused": [{"mode": refusal.mode, "reason": refusal.reason} for refusal in descriptors.refused],
        "zero_copy": descriptors.mode == "native-zero-copy",
        "frame_size": geometry.frame_size,
        "longest_packet": geometry.longest,
        "memory_bytes": geometry.area * len(queues),
    }
