# SPDX-License-Identifier: Apache-2.0
"""UDP ports of this host in an event loop: what connections leave from and arrive at.

A port may be a socket of ours (:class:`SocketPort`) or a service port of lanes (:class:`LanePort`); both
belong to the thread of the loop.  What is heard is told to an :class:`Owner`: datagrams, and what ICMP says
of datagrams that were sent.  What finds no room waits, in order, and not without limit.
"""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from typing import Final, Protocol

from userspace.datagram.aio_dispatch import Dispatcher, Name, name_of
from userspace.datagram.aio_protocol import LaneTransport
from userspace.datagram.lanes import Lanes
from userspace.datagram.socket_errors import ErrorQueue
from userspace.datagram.sockets import SocketAddress
from xdp.errors import SluiceError, UsageError

#: Datagrams that are read in one turn of the event loop: timers are late by some milliseconds at most.
TURN_BATCH: Final = 64
#: Datagrams that wait for room in a socket: some times what a socket's buffer takes; more are dropped.
WAITING: Final = 1024
#: Bytes that a socket may have waiting to be read: a tenth of a second at 300 Mb/s.  The kernel gives what
#: it allows (net.core.rmem_max).
RECEIVE_BUFFER: Final = 4 << 20
_LARGEST: Final = 1 << 16


class Owner(Protocol):
    """Who is told what a port hears."""

    def heard(self, port: Port, name: Name, data: bytes) -> None:
        """A datagram came from there."""

    def refused(self, port: Port, name: Name, errno: int) -> None:
        """The network says that a datagram has not arrived there."""

    def lost(self, port: Port, error: Exception) -> None:
        """The port is of no use any more."""


class Port(Protocol):
    """One UDP port."""

    #: 4, 6, or 0 for both.
    family: int

    def send(self, data: bytes, name: Name) -> None:
        """Send a datagram, soon."""

    def close(self) -> None:
        """Give it up; what waits may be lost."""

    @property
    def dropped(self) -> int:
        """Datagrams that this host did not send."""


class SocketPort:
    """A socket of its own, with a port that the kernel chooses, or ``local`` (host, port).

    Raises SluiceError when there can be none.
    """

    def __init__(self, owner: Owner, family: int, local: tuple[str, int] | None = None) -> None:
        self.family = family
        self._owner = owner
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[tuple[bytes, Name]] = deque()
        self.dropped = 0
        kind = socket.AF_INET if family == 4 else socket.AF_INET6
        try:
            self._socket = socket.socket(kind, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        except OSError as error:
            raise SluiceError.from_errno("opening a UDP socket", error.errno or 0) from error
        try:
            if family == 6:
                self._socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
            self._socket.bind(local if local is not None else ("0.0.0.0" if family == 4 else "::", 0))  # noqa: S104
            self._errors = ErrorQueue([(self._socket.getsockname()[1], self._socket)])
            self._loop.add_reader(self._socket, self._readable)
        except OSError as error:
            self._socket.close()
            raise SluiceError.from_errno("binding a UDP socket", error.errno or 0) from error

    @property
    def name(self) -> Name:
        """Where it is bound to."""
        bound: Name = self._socket.getsockname()
        return bound

    def _readable(self) -> None:
        for count in range(TURN_BATCH):
            try:
                data, name = self._socket.recvfrom(_LARGEST)
            except BlockingIOError:
                if not count:  # it was said to be readable: errors wait
                    self._tell_errors()
                return
            except OSError:
                self._tell_errors()
                continue
            self._owner.heard(self, name, data)
            if self._socket.fileno() < 0:
                return

    def _tell_errors(self) -> None:
        if self._socket.fileno() < 0:
            return
        self._errors.look()
        for reported in self._errors.take():
            if reported.origin != "local":
                self._owner.refused(self, reported.name, reported.errno)

    def send(self, data: bytes, name: Name) -> None:
        """Send a datagram; what this host cannot send, and what waits too long, is lost and counted."""
        if self._waiting or not self._send(data, name):
            if len(self._waiting) >= WAITING:
                self.dropped += 1
                return
            self._waiting.append((data, name))
            if len(self._waiting) == 1:
                self._loop.add_writer(self._socket, self._writable)

    def _send(self, data: bytes, name: Name) -> bool:
        """False: there is no room."""
        for _ in range(2):
            try:
                self._socket.sendto(data, name)
            except BlockingIOError:
                return False
            except OSError as error:
                # What is said here may be an earlier datagram's; then this one was not tried.
                earlier = self._errors.drain(self._socket, error.errno or 0) == "earlier"
                self._loop.call_soon(self._tell_errors)
                if earlier:
                    continue
                break
            return True
        self.dropped += 1
        return True

    def _writable(self) -> None:
        while self._waiting:
            if not self._send(*self._waiting[0]):
                return
            self._waiting.popleft()
        self._loop.remove_writer(self._socket)

    def close(self) -> None:
        """Close the socket; idempotent.  What waits for room is lost."""
        if self._socket.fileno() >= 0:
            self._loop.remove_reader(self._socket)
            self._loop.remove_writer(self._socket)
            self._socket.close()
            self.dropped += len(self._waiting)
            self._waiting.clear()

    def __del__(self) -> None:
        if hasattr(self, "_socket"):
            self._socket.close()


class _Silent(asyncio.DatagramProtocol):
    """A protocol that nothing is told to: :class:`LanePort` takes it all."""


class LanePort(LaneTransport):
    """A service port of lanes, which stay their owner's.

    Raises UsageError (no service port, or somebody receives through these lanes), BusyError (the port has an
    endpoint), ValueError (the lanes are closed).
    """

    family = 0

    def __init__(self, owner: Owner, lanes: Lanes, port: int) -> None:
        dispatcher = Dispatcher.of(lanes)
        self._over = True  # until it is one
        try:
            dispatcher.check_free(port)
            super().__init__(dispatcher, _Silent(), port, None)
            self._owner = owner
            dispatcher.add(port, self)
        finally:
            dispatcher.close_unused()

    def received(self, data: bytes, name: Name) -> bool:
        """See Receiver."""
        self._received += 1
        self._owner.heard(self, name, data)
        return True

    def refused(self, error: OSError, name: Name) -> None:
        """See Receiver."""
        self._owner.refused(self, name, error.errno or 0)

    def lost(self, error: Exception) -> None:
        """See Receiver."""
        super().lost(error)
        self._owner.lost(self, error)

    def send(self, data: bytes, name: Name) -> None:
        """Send a datagram; when much waits for room already it is dropped and counted."""
        if self.get_write_buffer_size() > WAITING * 1500:
            self._given += 1
            self._dropped += 1
        else:
            self.sendto(data, name)

    @property
    def dropped(self) -> int:
        """Datagrams that this host did not send."""
        return self._dropped + self._failed


def checked_name(address: object) -> Name:
    """An address as ports have it.  UsageError unless it is (host, port) of IPv4 or IPv6, without a name."""
    if not isinstance(address, tuple) or len(address) < 2:
        raise UsageError(f"{address!r} is no address", hint="give (host, port)")
    return name_of(SocketAddress.parse((address[0], address[1])))
