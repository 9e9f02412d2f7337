# SPDX-License-Identifier: Apache-2.0
"""Busy polling of the lanes' sockets: set as ``[tuning]`` says, and what has become of it.

The settings belong to the sockets: applications that are handed them follow without being told
(``userspace/native/busy_poll.h``).
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterable, Sequence

from userspace.datagram.descriptors import LaneDescriptors
from userspace.native._native import lib
from xdp.policy_model import Tuning


def set_on(descriptors: Iterable[int], tuning: Tuning) -> str:
    """Set it on these sockets; "" or, in one line, why it is not set."""
    if tuning.busy_poll == 0:
        return ""
    if sys.platform != "linux":
        return "[tuning] busy_poll is not in force: it needs Linux"
    for descriptor in descriptors:
        failed = lib.sl_busy_poll_set(
            descriptor, tuning.busy_poll, tuning.busy_poll_budget or 0, int(tuning.prefer_busy_poll)
        )
        if failed:
            return _why(-failed)
    return ""


def set_on_queues(opened: LaneDescriptors, tuning: Tuning) -> str:
    """The same on all AF_XDP sockets, those that send too: what was sent is reaped by the same polling."""
    return set_on((fd for queue in opened.queues for fd in (*queue.sockets, queue.transmit)), tuning)


def _why(code: int) -> str:
    if code in {errno.EPERM, errno.EACCES}:
        return (
            "[tuning] busy_poll is not in force: more than net.core.busy_read allows needs CAP_NET_ADMIN; "
            "run as root, or get the lanes from `sluice up`"
        )
    if code == errno.ENOPROTOOPT:
        return (
            "[tuning] busy_poll is not in force: this kernel lacks it "
            "(CONFIG_NET_RX_BUSY_POLL; prefer_busy_poll and busy_poll_budget need Linux 5.11)"
        )
    return f"[tuning] busy_poll is not in force: {os.strerror(code)}"


def describe(descriptors: Sequence[int]) -> dict[str, int]:
    """What these sockets do now, JSON-able.

    ``microseconds`` a receive call looks before it sleeps; ``polled`` of the ``sockets`` belong to
    a queue (NAPI instance) that the kernel then polls. The others only look again: their queue is
    known by the first packet, over AF_XDP in copy mode not at all since Linux 6.13.
    """
    if sys.platform != "linux":
        return {"microseconds": 0, "sockets": len(descriptors), "polled": 0}
    return {
        "microseconds": max((lib.sl_busy_poll_get(fd) for fd in descriptors), default=0),
        "sockets": len(descriptors),
        "polled": sum(lib.sl_busy_poll_napi(fd) > 0 for fd in descriptors),
    }
