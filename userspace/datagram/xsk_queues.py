# SPDX-License-Identifier: Apache-2.0
"""From descriptors to queues in memory, and from queues to something to wait for."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from userspace.datagram.descriptors import LaneDescriptors, QueueDescriptors
from userspace.native._native import ffi, lib
from xdp.errors import OPEN_FILES, BusyError, InterfaceGoneError, SluiceError, UnsupportedError, UsageError

if TYPE_CHECKING:
    from userspace.native._native import CData

_GONE_HINT = "open the lanes again when it is back"

_ONE_SHARE = 65536  # struct sl_lane_config counts shares in 1/65536


def map_queue(descriptors: LaneDescriptors, queue: QueueDescriptors) -> CData:
    """Map one queue as a ``struct sl_queue *``; its descriptors are taken over when that works.

    Raises BusyError when somebody has used its rings before, UnsupportedError.
    """
    geometry = descriptors.geometry
    config = ffi.new("struct sl_queue_config *")
    config.umem_fd = queue.umem
    config.transmit_fd = queue.transmit
    config.frame_size = geometry.frame_size
    config.fill_frames = geometry.fill_frames
    config.transmit_frames = geometry.transmit_frames
    config.fill_ring = geometry.fill_ring
    config.completion_ring = geometry.completion_ring
    config.transmit_ring = geometry.transmit_ring
    config.cookie = descriptors.cookie
    config.longest = geometry.longest
    config.lanes = len(descriptors.lanes)
    for index, lane in enumerate(descriptors.lanes):
        config.lane[index].fd = queue.sockets[index]
        config.lane[index].ring = lane.ring
        config.lane[index].quota = lane.quota
        config.lane[index].number = lane.number
        config.lane[index].share = int(lane.share * _ONE_SHARE)
    error = ffi.new("struct sl_error *")
    opened = lib.sl_queue_open(config, error)
    if opened == ffi.NULL:
        raise _open_error(f"{descriptors.interface} queue {queue.queue}", error)
    return ffi.gc(opened, _shut)


def _open_error(what: str, error: CData) -> SluiceError:
    step = ffi.string(error.step).decode()
    if error.code == errno.EBUSY:
        return BusyError(
            f"{what}: {step}: another application has used these lanes",
            hint="ask their owner for new descriptors",
        )
    return UnsupportedError(
        f"{what}: {step}: {os.strerror(error.code)}",
        hint="owner and application must be the same version of Sluice",
    )


def _shut(queue: CData) -> None:
    lib.sl_queue_close(queue)
    lib.sl_queue_free(queue)


def watch_queues(queues: Sequence[CData], slot: int) -> CData:
    """An epoll set over the queues, which it keeps: a ``struct sl_group *``.

    ``slot`` 0 is the set of all queues, 1 one of a part of them.  Raises UnsupportedError.
    """
    kept = tuple(queues)
    error = ffi.new("struct sl_error *")
    group = lib.sl_group_new(ffi.new("struct sl_queue *[]", kept), len(kept), slot, error)
    if group == ffi.NULL:
        raise UnsupportedError(
            f"{ffi.string(error.step).decode()}: {os.strerror(error.code)}",
            hint=OPEN_FILES,
        )

    def free(pointer: CData, _kept: tuple[CData, ...] = kept) -> None:
        lib.sl_group_free(pointer)

    return ffi.gc(group, free)


def failure(interface: str, code: int, doing: str) -> Exception:
    """What to raise for an errno of the functions in native/queue.h and wait.h."""
    where = f"{doing} on {interface}"
    if code == errno.EBADF:
        return ValueError("these lanes are closed")
    if code == errno.ENXIO:
        return InterfaceGoneError(f"{where}: the interface is gone", hint=_GONE_HINT)
    if code == errno.EDQUOT:
        return UsageError(
            f"{where}: every lane holds all the frames it may, so nothing could ever arrive",
            hint="release batches before receiving more, or raise the quota in the policy",
        )
    return SluiceError.from_errno(where, code, hint="this is a defect; close the lanes and open them again")
