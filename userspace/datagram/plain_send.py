# SPDX-License-Identifier: Apache-2.0
"""Sending datagrams one by one through a plain socket, whatever becomes of single ones."""

from __future__ import annotations

import errno
import os
import select
import socket
import time
from collections.abc import Sequence

from userspace.datagram.socket_statistics import SendFailure
from userspace.datagram.sockets import SocketAddress
from xdp.errors import InterfaceGoneError

#: Errors of the socket itself, as against those of one datagram.
FATAL = frozenset((errno.EBADF, errno.ENOTSOCK))

# Errors that ICMP may have left on the socket about an earlier datagram; the next call gets them.
_MAYBE_EARLIER = frozenset(
    (
        errno.ECONNREFUSED,
        errno.EHOSTUNREACH,
        errno.ENETUNREACH,
        errno.ENOPROTOOPT,
        errno.EMSGSIZE,
        errno.EACCES,
    )
)
# Seconds; a full device queue (ENOBUFS) has no event to wait for, so it is asked again this often.
_RETRY = 0.001


def send_plain(
    sock: socket.socket, datagrams: Sequence[tuple[memoryview, SocketAddress]], timeout: float
) -> tuple[list[SendFailure], int]:
    """What was not sent and why, and how many errors of earlier datagrams were met.

    A datagram that the kernel refuses is skipped.  Waits at most ``timeout``
    seconds in all for room.  Raises InterfaceGoneError when the socket is closed.
    """
    deadline = time.monotonic() + timeout
    failures: list[SendFailure] = []
    asynchronous = 0
    for index, (payload, to) in enumerate(datagrams):
        error, earlier = _send_one(sock, payload, to, deadline)
        asynchronous += earlier
        if error in FATAL:
            raise InterfaceGoneError(
                f"a kernel socket can't be written any more: {os.strerror(error)}",
                hint="it was closed elsewhere; open the lanes again",
            )
        if error:
            failures.append(SendFailure(index, error))
    return failures, asynchronous


def _send_one(
    sock: socket.socket, payload: memoryview, to: SocketAddress, deadline: float
) -> tuple[int, int]:
    """(0 or the errno that it failed with, 1 if an error of an earlier datagram was met)."""
    retried = 0
    while True:
        try:
            sock.sendto(payload, to.name(sock.family))
        except BlockingIOError as error:
            left = deadline - time.monotonic()
            if left <= 0:
                return error.errno or errno.EAGAIN, retried
            select.select([], [sock], [], left)
        except OSError as error:
            if error.errno == errno.ENOBUFS and time.monotonic() < deadline:
                select.select([], [], [], _RETRY)
            elif error.errno in _MAYBE_EARLIER and not retried:
                retried = 1
            else:
                # The same error twice: it was this datagram's own, both times.
                return error.errno or errno.EIO, 0
        else:
            return 0, retried
