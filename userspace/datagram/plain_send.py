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
from userspace.datagram.pieces import Pieces
from userspace.datagram.socket_errors import ErrorQueue
from userspace.datagram.socket_statistics import SendFailure
from userspace.datagram.sockets import SocketAddress
from userspace.native._native import ffi
from xdp.errors import InterfaceGoneError, UsageError

#: Errors of the socket itself, as against those of one datagram.
FATAL = frozenset((errno.EBADF, errno.ENOTSOCK))

#: Index in the call, payload (or the pieces of one), where to.
Datagram: TypeAlias = tuple[int, memoryview | tuple[Buffer, ...], SocketAddress]

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
_TRIES = 16  # of one datagram while errors of earlier ones come
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


def in_pieces(destination: Endpoint, packets: Sequence[Sequence[Buffer]]) -> list[Datagram]:
    """All to one, each put together from pieces.  Raises UsageError."""
    to = SocketAddress.parse(destination)
    return [(index, packet, to) for index, packet in enumerate(Pieces(packets).packets)]


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
    groups: Sequence[tuple[socket.socket | None, list[Datagram]]],
    timeout: float,
    outcome: Outcome,
    errors: ErrorQueue,
) -> None:
    """Send through each socket what is to leave from there, and note what became of it.

    A datagram that the kernel refuses is skipped.  Waits for room ``timeout`` seconds in all; what is
    behind one that found none in its socket stays behind it, unsent, or it would overtake.  None is a
    socket that is no more.
    """
    deadline = time.monotonic() + timeout
    outcome.unsent = {index: errno.EINTR for _, datagrams in groups for index, _, _ in datagrams}
    for sock, datagrams in groups:
        for place, (index, payload, to) in enumerate(datagrams):
            error, earlier = _send_one(sock, payload, to, deadline, errors) if sock else (errno.EBADF, 0)
            outcome.asynchronous += earlier
            if error == errno.EAGAIN:
                outcome.unsent.update((behind, error) for behind, _, _ in datagrams[place:])
                break
            if error:
                outcome.unsent[index] = error
            else:
                del outcome.unsent[index]
                outcome.sent += 1


def _send_one(
    sock: socket.socket,
    payload: memoryview | tuple[Buffer, ...],
    to: SocketAddress,
    deadline: float,
    errors: ErrorQueue,
) -> tuple[int, int]:
    """(0 or the errno that it failed with, how many errors of earlier datagrams were met)."""
    earlier = 0
    doubtful = False  # the last try was given up for an error that nothing explains
    while True:
        try:
            if isinstance(payload, tuple):
                sock.sendmsg(payload, (), 0, to.name(sock.family))
            else:
                sock.sendto(payload, to.name(sock.family))
        except BlockingIOError as error:
            left = deadline - time.monotonic()
            errors.drain(sock)  # or else poll would return at once
            if left <= 0:
                return error.errno or errno.EAGAIN, earlier
            writable = select.poll()
            writable.register(sock, select.POLLOUT)
            writable.poll(math.ceil(left * 1000))
        except OSError as error:
            told = errors.drain(sock, error.errno or 0)
            if error.errno == errno.ENOBUFS and time.monotonic() < deadline:
                time.sleep(_RETRY)
            elif (
                error.errno in _MAYBE_EARLIER
                and told != "own"
                and earlier < _TRIES
                and (told or not doubtful)
            ):
                earlier += 1
                doubtful = not told
            else:
                # The same error twice, unexplained: it was this datagram's own, both times.
                return error.errno or errno.EIO, earlier - doubtful
        else:
            return 0, earlier
