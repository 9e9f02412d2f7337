# SPDX-License-Identifier: Apache-2.0
"""Sending datagrams one by one through a plain socket, whatever becomes of single ones."""

from __future__ import annotations

import errno
import math
import os
import select
import socket
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from typing_extensions import Buffer

from userspace.datagram.destination import Endpoint
from userspace.datagram.fanout import Fanout, outgoing
from userspace.datagram.socket_statistics import SendFailure
from userspace.datagram.sockets import SocketAddress
from userspace.native._native import ffi
from xdp.errors import InterfaceGoneError, UsageError

#: Errors of the socket itself, as against those of one datagram.
FATAL = frozenset((errno.EBADF, errno.ENOTSOCK))

#: Index in the call, payload, where to.
Datagram: TypeAlias = tuple[int, memoryview, SocketAddress]

# Errors that ICMP may have left on the socket about an earlier datagram; the next call gets them.
# As may_be_asynchronous in native/mmsg_send.c.
_MAYBE_EARLIER = frozenset(
    (
        errno.ECONNREFUSED,
        errno.EHOSTUNREACH,
        errno.ENETUNREACH,
        errno.ENOPROTOOPT,
        errno.EHOSTDOWN,
        errno.EPROTO,
        errno.EMSGSIZE,
        errno.EACCES,
        errno.EOPNOTSUPP,
    )
)
# Seconds; a full device queue (ENOBUFS) has no event to wait for, so it is asked again this often.
_RETRY = 0.001


def gone(done: str, error: int) -> InterfaceGoneError:
    """A socket can't be ``done`` ("read", "written") any more."""
    return InterfaceGoneError(
        f"a kernel socket can't be {done} any more: {os.strerror(error)}",
        hint="it was closed elsewhere; open the lanes again",
    )


@dataclass(slots=True)
class Outcome:
    """What has become of the datagrams so far; also true when a signal handler raised in between."""

    sent: int = 0
    asynchronous: int = 0  # errors of earlier datagrams, met on the way
    unsent: dict[int, int] = field(default_factory=dict)  # index in the call: errno

    @property
    def failures(self) -> tuple[SendFailure, ...]:
        """By index."""
        return tuple(SendFailure(index, error) for index, error in sorted(self.unsent.items()))


def to_one(destination: Endpoint, payloads: Iterable[Buffer]) -> list[Datagram]:
    """All to one.  Raises UsageError."""
    to = SocketAddress.parse(destination)
    try:
        return [(index, memoryview(payload), to) for index, payload in enumerate(payloads)]
    except TypeError:
        raise UsageError("payloads are a sequence of bytes-like objects") from None


def to_many(fanout: Fanout, payloads: Buffer | Sequence[Buffer]) -> list[Datagram]:
    """One payload to all, or one to each.  Raises UsageError."""
    data = outgoing(payloads, len(fanout))
    whole, place = memoryview(ffi.buffer(data.base, data.size)), 0
    made: list[Datagram] = []
    for index, (to, length) in enumerate(zip(fanout.addresses, data.lengths, strict=True)):
        start = data.offsets[index] if data.offsets else place
        made.append((index, whole[start : start + length], to))
        place += length
    return made


def send_plain(
    groups: Sequence[tuple[socket.socket | None, list[Datagram]]], timeout: float, outcome: Outcome
) -> None:
    """Send through each socket what is to leave from there, and note what became of it.

    A datagram that the kernel refuses is skipped.  Waits for room ``timeout`` seconds
    in all; what comes after is still tried, once.  None is a socket that is no more.
    """
    deadline = time.monotonic() + timeout
    outcome.unsent = {index: errno.EINTR for _, datagrams in groups for index, _, _ in datagrams}
    for sock, datagrams in groups:
        for index, payload, to in datagrams:
            error, earlier = _send_one(sock, payload, to, deadline) if sock else (errno.EBADF, 0)
            outcome.asynchronous += earlier
            if error:
                outcome.unsent[index] = error
            else:
                del outcome.unsent[index]
                outcome.sent += 1


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
            writable = select.poll()
            writable.register(sock, select.POLLOUT)
            writable.poll(math.ceil(left * 1000))
        except OSError as error:
            if error.errno == errno.ENOBUFS and time.monotonic() < deadline:
                time.sleep(_RETRY)
            elif error.errno in _MAYBE_EARLIER and not retried:
                retried = 1
            else:
                # The same error twice: it was this datagram's own, both times.
                return error.errno or errno.EIO, 0
        else:
            return 0, retried
