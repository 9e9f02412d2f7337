# SPDX-License-Identifier: Apache-2.0
"""asyncio's datagram protocols over lanes: a program written for sockets runs unchanged.

    transport, protocol = await open_endpoint(EchoProtocol, lanes, port=8005)

as ``loop.create_datagram_endpoint(EchoProtocol, local_addr=("::", 8005))`` would.  Several endpoints, one
for each service port, share the lanes.  Every datagram becomes an object here and a call of its own, so this
is for programs that exist; :class:`~userspace.datagram.aio.AsyncLanes` is for those that are to be fast.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import warnings
from asyncio.trsock import TransportSocket
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from typing_extensions import Buffer

from userspace.datagram.aio import AsyncLanes
from userspace.datagram.aio_dispatch import (
    Dispatcher,
    DispatchStatistics,
    Gathered,
    Name,
    Peer,
    kernel_lanes,
    make_peer,
    name_of,
)
from userspace.datagram.aio_send import FULL, RETRY, RETRY_MAXIMUM
from userspace.datagram.lanes import Lanes
from userspace.datagram.socket_statistics import SendFailure
from userspace.datagram.sockets import socket_ports
from xdp.errors import UnsupportedError, UsageError

__all__ = ["EndpointStatistics", "LaneTransport", "open_endpoint"]

#: Datagrams of one system call at most; when so many are gathered they go without waiting for more.
GATHERED = 256

#: Bytes; as asyncio's own transports have it, a quarter of it is where writing goes on.
HIGH_WATER = 64 << 10

_Protocol = TypeVar("_Protocol", bound=asyncio.DatagramProtocol)


@dataclass(frozen=True, slots=True)
class EndpointStatistics:
    """Datagrams of one endpoint: ``given = sent + failed + dropped + waiting``.

    ``given`` are calls of ``sendto``; ``failed`` were told to ``error_received``; ``dropped`` came after
    ``close`` or went with ``abort`` or the lanes.
    """

    received: int
    given: int
    sent: int
    failed: int
    dropped: int
    waiting: int


class LaneTransport(asyncio.DatagramTransport):
    """One service port of some lanes, as asyncio has transports; made by :func:`open_endpoint`.

    What is sent within one turn of the event loop goes out together.  What finds no room waits here, in
    order; the protocol's ``pause_writing`` is called when that is more than the high-water mark.

    ``get_extra_info``: ``sockname``, ``peername`` (the ``remote_addr``), ``socket`` (the kernel socket of the
    port, to look at; over AF_XDP the companion's, or None) and ``lanes``.
    """

    def __init__(
        self, dispatcher: Dispatcher, protocol: asyncio.DatagramProtocol, port: int, remote: Peer | None
    ) -> None:
        sock = _socket_of(dispatcher.lanes, port)
        super().__init__(
            {
                "lanes": dispatcher.lanes,
                "peername": None if remote is None else name_of(remote.address),
                "sockname": ("::", port, 0, 0) if sock is None else sock.getsockname(),
                "socket": sock,
            }
        )
        self._dispatcher, self._outlet, self._loop = dispatcher, dispatcher.outlet, dispatcher.loop
        self._protocol: asyncio.BaseProtocol = protocol
        self._deliver = protocol.datagram_received
        self._port, self._remote = port, remote
        self._remote_name = None if remote is None else name_of(remote.address)
        self._waiting: deque[tuple[bytes, Peer]] = deque()
        self._size = 0  # bytes of what waits
        self._flushing = self._scheduled = False
        self._full = 0  # errno for which the first one waits
        self._draining: asyncio.Task[None] | None = None
        self._closing = self._over = self._paused = False
        self._received = self._given = self._sent = self._failed = self._dropped = 0
        self.set_write_buffer_limits()

    # receiving

    def received(self, data: bytes, name: Name) -> bool:
        """See Receiver."""
        if self._remote_name is not None and name != self._remote_name:
            return False
        self._received += 1
        try:
            self._deliver(data, name)
        except Exception as error:  # noqa: BLE001 - one datagram of many, and the program's own
            self._complain("datagram_received raised", error)
        return True

    def refused(self, error: OSError, name: Name) -> None:
        """See Receiver."""
        if not self._over and self._remote_name in {None, name}:
            self._call("error_received", error)

    def _complain(self, what: str, error: Exception) -> None:
        context = {"message": what, "exception": error, "transport": self, "protocol": self._protocol}
        self._loop.call_exception_handler(context)

    # sending

    def sendto(self, data: Buffer, addr: Name | None = None) -> None:  # type: ignore[override]
        """Send one datagram, soon; to ``addr``, or to the ``remote_addr`` when that is None.

        Raises TypeError (not bytes-like), ValueError (another address than the ``remote_addr``, or none at
        all), UsageError (not an IP address and port).
        """
        if not isinstance(data, bytes):
            data = bytes(memoryview(data))  # it may change before it is sent
        peer = self._remote
        if addr is None:
            if peer is None:
                raise ValueError("sendto without an address needs an endpoint with remote_addr")
        else:
            found = self._dispatcher.peer(addr)
            if peer is not None and found.address != peer.address:
                raise ValueError(f"{addr!r} is not the remote_addr {self._remote_name!r} of this endpoint")
            peer = found
        self._given += 1
        if self._closing:
            self._dropped += 1
            return
        self._waiting.append((data, peer))
        self._size += len(data)
        if self._draining is not None:
            self._maybe_pause()
        elif len(self._waiting) >= GATHERED:
            self._flush()
        elif not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._flush_gathered)

    def _flush_gathered(self) -> None:
        self._scheduled = False
        self._flush()

    def _flush(self) -> None:
        """Send what was gathered, unless that is being done; what finds no room waits for it in a task."""
        if self._draining is not None or self._flushing or self._over:
            return
        try:
            done = self._send_waiting()
        except Exception as error:  # noqa: BLE001 - whatever it is, the protocol is told of it
            self.lost(error)
            return
        if not done and not self._over:
            self._draining = self._loop.create_task(self._drain())
            self._maybe_pause()

    async def _drain(self) -> None:
        pause = RETRY
        try:
            while self._waiting:
                if self._full:
                    await self._outlet.room(self._port, self._full, pause)
                await self._prepare()
                before = self._sent
                if self._send_waiting():
                    break
                pause = RETRY if self._sent != before else min(2 * pause, RETRY_MAXIMUM)
                self._maybe_resume()
        except Exception as error:  # noqa: BLE001 - whatever it is, the protocol is told of it
            self._draining = None
            self.lost(error)
            return
        self._draining = None
        self._maybe_resume()

    async def _prepare(self) -> None:
        """Learn the headers that the first ones need; those to which there is no way have failed."""
        chunk = self._chunk()
        for endpoint in self._outlet.unknown((peer.endpoint for _, peer in chunk), self._port):
            try:
                await self._outlet.prepare([endpoint], self._port)
            except (UnsupportedError, UsageError) as error:
                told = OSError(errno.EHOSTUNREACH, str(error))
                hopeless = [one for one in self._waiting if one[1].endpoint == endpoint]
                self._waiting = deque(one for one in self._waiting if one[1].endpoint != endpoint)
                self._size -= sum(len(data) for data, _ in hopeless)
                self._tell([told] * len(hopeless))

    def _chunk(self) -> list[tuple[bytes, Peer]]:
        return list(itertools.islice(self._waiting, GATHERED))

    def _send_waiting(self) -> bool:
        """Whether all of it is out (or has failed); what is not finds no room, or its headers are unknown."""
        self._flushing = True
        try:
            while self._waiting:
                chunk = self._chunk()
                if self._outlet.unknown((peer.endpoint for _, peer in chunk), self._port):
                    self._full = 0
                    return False
                failures = self._attempt(chunk)
                left = [chunk[one.index] for one in failures if one.errno in FULL]
                errors = [one.errno for one in failures if one.errno not in FULL]
                for _ in chunk:
                    self._waiting.popleft()
                self._waiting.extendleft(reversed(left))
                self._size -= sum(len(data) for data, _ in chunk) - sum(len(data) for data, _ in left)
                self._sent += len(chunk) - len(failures)
                self._tell([OSError(error, os.strerror(error)) for error in errors])
                if left:
                    self._full = next(one.errno for one in failures if one.errno in FULL)
                    return False
            if self._closing:
                self._end(None)
            return True
        finally:
            self._flushing = False

    def _attempt(self, chunk: Sequence[tuple[bytes, Peer]]) -> Sequence[SendFailure]:
        payloads = [data for data, _ in chunk]
        peers = [peer for _, peer in chunk]
        first = peers[0]
        try:
            if all(peer is first for peer in peers):
                return self._outlet.send(first.endpoint, payloads, self._port)[1]
        except UsageError:  # one is too long for a frame, and nothing was sent
            pass
        try:
            # The companion socket sends in fragments what fits no frame.
            return self._outlet.send_many(Gathered(peers), payloads, self._port)[1]
        except (UsageError, UnsupportedError):
            return self._attempt_each(chunk)

    def _attempt_each(self, chunk: Sequence[tuple[bytes, Peer]]) -> list[SendFailure]:
        """Without companion socket: one that can't be sent keeps the others from nothing."""
        failures: list[SendFailure] = []
        for index, (data, peer) in enumerate(chunk):
            try:
                _, untold = self._outlet.send(peer.endpoint, [data], self._port)
            except UsageError:
                failures.append(SendFailure(index, errno.EMSGSIZE))
            except UnsupportedError:
                failures.append(SendFailure(index, errno.EHOSTUNREACH))
            else:
                failures += [SendFailure(index, one.errno) for one in untold]
        return failures

    def _tell(self, errors: Sequence[OSError]) -> None:
        self._failed += len(errors)
        for error in errors:
            if self._over:
                break
            self._call("error_received", error)

    def _call(self, name: str, *arguments: Any) -> None:
        try:
            getattr(self._protocol, name)(*arguments)
        except Exception as error:  # noqa: BLE001 - the program's own
            self._complain(f"{name} raised", error)

    # flow control, as asyncio's own transports do it

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """In bytes; ``high`` is 64 KiB by default, ``low`` a quarter of it."""
        if high is None:
            high = HIGH_WATER if low is None else 4 * low
        if low is None:
            low = high // 4
        if not high >= low >= 0:
            raise ValueError(f"high ({high!r}) must be >= low ({low!r}) must be >= 0")
        self._high, self._low = high, low

    def get_write_buffer_limits(self) -> tuple[int, int]:
        """(low, high) in bytes."""
        return self._low, self._high

    def get_write_buffer_size(self) -> int:
        """Bytes of what was given and is not out yet."""
        return self._size

    def _maybe_pause(self) -> None:
        if self._size > self._high and not self._paused:
            self._paused = True
            self._call("pause_writing")

    def _maybe_resume(self) -> None:
        if self._paused and self._size <= self._low:
            self._paused = False
            self._call("resume_writing")

    # ending

    def is_closing(self) -> bool:
        """Whether `close` or `abort` was called, or the lanes are lost."""
        return self._closing

    def close(self) -> None:
        """Receive nothing any more, send what waits, then call ``connection_lost(None)``.

        The lanes stay open.  What is given to ``sendto`` from now on is dropped.
        """
        if self._closing:
            return
        self._closing = True
        self._dispatcher.remove(self._port, self)
        if not self._waiting:
            self._end(None)
        else:
            self._loop.call_soon(self._flush)

    def abort(self) -> None:
        """Drop what waits, then call ``connection_lost(None)``."""
        self._closing = True
        self._dispatcher.remove(self._port, self)
        self._end(None)

    def lost(self, error: Exception) -> None:
        """See Receiver: as `abort`, with an error."""
        self._closing = True
        self._dispatcher.remove(self._port, self)
        self._end(error)

    def _end(self, error: Exception | None) -> None:
        if self._over:
            return
        self._over = True
        self._dropped += len(self._waiting)
        self._waiting.clear()
        self._size = 0
        # From within it (an error_received that aborts, say), it sees for itself that there is nothing left.
        if self._draining is not None and self._draining is not asyncio.current_task():
            self._draining.cancel()
        self._loop.call_soon(self._call, "connection_lost", error)

    def __del__(self) -> None:
        if not getattr(self, "_over", True):
            warnings.warn(f"{self!r} was never closed", ResourceWarning, source=self, stacklevel=2)

    # looking

    def get_protocol(self) -> asyncio.BaseProtocol:
        """The current one."""
        return self._protocol

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """Another one from now on; it is a DatagramProtocol."""
        self._deliver = protocol.datagram_received  # type: ignore[attr-defined]
        self._protocol = protocol

    def statistics(self) -> EndpointStatistics:
        """Of this endpoint."""
        return EndpointStatistics(
            self._received, self._given, self._sent, self._failed, self._dropped, len(self._waiting)
        )

    def dispatch_statistics(self) -> DispatchStatistics:
        """Of all endpoints of these lanes, and of what was for none of them."""
        return self._dispatcher.statistics()

    def __repr__(self) -> str:
        state = "closed" if self._over else "closing" if self._closing else "open"
        return f"<LaneTransport port={self._port} {state}>"


async def open_endpoint(
    protocol_factory: Callable[[], _Protocol],
    lanes: Lanes | AsyncLanes,
    *,
    port: int,
    remote_addr: Name | None = None,
) -> tuple[LaneTransport, _Protocol]:
    """A datagram endpoint on one service port of some lanes, as ``loop.create_datagram_endpoint`` makes them.

    Datagrams are told apart by their destination port; those of ports without an endpoint are dropped and
    counted (:meth:`LaneTransport.dispatch_statistics`).  With ``remote_addr`` datagrams of others are too,
    and ``sendto`` needs no address.  Addresses are (host, port), over IPv6 (host, port, 0, scope);
    names are not resolved.

    The lanes stay yours to close; while an endpoint is open nobody else may receive through them.  When they
    fail or are closed, ``connection_lost`` gets the error.  What a protocol raises goes to the event
    loop's exception handler, from ``connection_made`` to the caller.

    Raises UsageError (not a service port, or somebody receives through these lanes), BusyError (the port has
    an endpoint), ValueError (the lanes are closed).
    """
    if isinstance(lanes, AsyncLanes):
        lanes = lanes.lanes
    _check_port(lanes, port)
    remote = None if remote_addr is None else make_peer(remote_addr)
    dispatcher = Dispatcher.of(lanes)
    try:
        dispatcher.check_free(port)
        protocol = protocol_factory()
        transport = LaneTransport(dispatcher, protocol, port, remote)
        dispatcher.add(port, transport)
    finally:
        dispatcher.close_unused()
    try:
        protocol.connection_made(transport)
    except BaseException:
        transport.abort()
        raise
    return transport, protocol


def _socket_of(lanes: Lanes, port: int) -> TransportSocket | None:
    kernel = kernel_lanes(lanes)
    if kernel is not None:
        for service in kernel._sockets:
            if service.port == port:
                return TransportSocket(service.socket)
    return None


def _check_port(lanes: Lanes, port: int) -> None:
    """As far as it can be told: AF_XDP lanes without companion sockets do not know the policy."""
    kernel = kernel_lanes(lanes)
    if kernel is None:
        allowed: Sequence[int] = range(1, 1 << 16)
    else:
        # Over AF_XDP also ports whose companion somebody else has.
        allowed = kernel.ports if kernel is lanes else socket_ports(kernel.policy)
    if port not in allowed:
        raise UsageError(f"port {port} is none of these lanes'", hint=f"ports are {list(allowed)[:16]}")
