# SPDX-License-Identifier: Apache-2.0
"""What the C side of the mmsg backend counted and kept, as Python has it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from userspace.datagram.classifier import DatagramClassifier
from userspace.datagram.socket_errors import SocketError, unpack_errors
from userspace.datagram.socket_statistics import LaneStatistics, SocketStatistics
from userspace.native._native import ffi, lib

if TYPE_CHECKING:
    from userspace.native._native import CData

_PLACES = ("free", "slot", "queued", "held")


def read_statistics(
    native: CData, lanes: Sequence[str], classifier: DatagramClassifier, sent: tuple[int, int, int]
) -> SocketStatistics:
    """Counters since opening; ``sent``: sent, failed, errors of earlier datagrams that were met."""
    raw = ffi.new("struct sl_mmsg_statistics *")
    lib.sl_mmsg_read_statistics(native, raw)
    discarded: dict[str, int] = {}
    for (row, reason), (packets, _) in classifier.verdicts().items():
        if row == lib.SLUICE_NO_LANE or reason.startswith("drop_"):
            discarded[reason] = discarded.get(reason, 0) + packets
    dropped = {
        "truncated": raw.truncated,
        "no_large_frame": raw.no_large_frame,
        "lane_full": sum(raw.lane_full),
        "reply_failed": raw.reply_failed,
    }
    return SocketStatistics(
        received=raw.received,
        delivered=raw.delivered,
        queued=sum(raw.queued),
        replied=raw.replied,
        dropped={reason: count for reason, count in dropped.items() if count},
        discarded=discarded,
        overflowed=raw.overflowed,
        errors=raw.errors,
        sent=sent[0],
        send_failed=sent[1],
        asynchronous_errors=sent[2],
        lanes=tuple(
            LaneStatistics(name, raw.lane_delivered[i], raw.queued[i], raw.held[i], raw.lane_full[i])
            for i, name in enumerate(lanes)
        ),
        shared=raw.shared,
        reported=raw.reported,
        unread=raw.unread,
        floods=raw.floods,
    )


def take_errors(native: CData, *, look: bool) -> tuple[SocketError, ...]:
    """Those that were kept, which are not any more; with ``look`` all sockets are asked first."""
    count = lib.sl_mmsg_errors(native, look)
    if not count:
        return ()
    records = ffi.new("struct sl_socket_error[]", count)
    lib.sl_mmsg_take_errors(native, records, count)
    return unpack_errors(bytes(ffi.buffer(records)))


def read_census(native: CData) -> dict[str, int]:
    """How many frames are in each place: free, slot (offered to the kernel), queued, held."""
    counts = ffi.new("uint32_t[]", len(_PLACES))
    lib.sl_mmsg_census(native, counts)
    return dict(zip(_PLACES, counts, strict=True))
