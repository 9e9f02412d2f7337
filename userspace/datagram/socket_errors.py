# SPDX-License-Identifier: Apache-2.0
"""What became of datagrams after they had left: the errors that networks and this host report.

A kernel socket with IP_RECVERR (ip(7), ipv6(7)) queues them with the address to which the datagram went.  The
mmsg backend reads these queues in C (``native/mmsg_errors.c``), the portable one here; both keep the latest
:data:`KEPT` until somebody asks.  While an error waits in the kernel, poll and epoll return at once, so
whoever waits for a socket has to read it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
import sys
import time
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Final, Literal, NamedTuple

from userspace.native._native import lib

#: Errors that are kept; older ones give way.
KEPT: Final[int] = lib.SL_MMSG_ERRORS

Origin = Literal["local", "icmp", "icmp6"]

_ORIGINS: Final[dict[int, Origin]] = {1: "local", 2: "icmp", 3: "icmp6"}  # SO_EE_ORIGIN_*, linux/errqueue.h
# struct sl_socket_error (native/mmsg.h): two struct sl_source, then its own.
_RECORD = struct.Struct("=16sIHBx16sIHBxQIIHBBB3x")
# struct sock_extended_err (linux/errqueue.h): errno, origin, type, code, padding, info, data
_EXTENDED = struct.Struct("=IBBBxII")

_IP_RECVERR = 11
_IPV6_RECVERR = 25
_MSG_ERRQUEUE = 0x2000
_CONTROL = 512  # bytes; an error and the address of who sent it need 64

# As in native/mmsg_errors.c: seconds that each socket has for an error, saved up, and is deaf after a flood.
_ERROR_SECONDS = 0.0001
_FREE_SECONDS = 8192 * _ERROR_SECONDS
_DEAF_SECONDS = 1.0


class SocketError(NamedTuple):
    """An error of one datagram; where it went is ``address`` and ``port`` (0: not told).

    ``origin`` is "icmp" or "icmp6" (the network, or the other host) with ``type`` and ``code`` of the message
    (RFC 792, RFC 4443) and its sender as ``offender``, or "local": this host could not send it.  ``mtu`` goes
    with EMSGSIZE, the longest packet that fits the way; else it is 0.  ``time_ns`` is CLOCK_MONOTONIC when it
    was read from the socket.
    """

    address: IPv4Address | IPv6Address
    port: int
    errno: int
    origin: Origin
    type: int
    code: int
    offender: IPv4Address | IPv6Address | None
    mtu: int
    service_port: int
    time_ns: int

    def __str__(self) -> str:
        by = f" (from {self.offender})" if self.offender else ""
        return f"{self.address} port {self.port}: {os.strerror(self.errno)}{by}"

    @property
    def name(self) -> tuple[str, int] | tuple[str, int, int, int]:
        """Where it went, as asyncio has addresses: (host, port), over IPv6 (host, port, 0, scope)."""
        if isinstance(self.address, IPv4Address):
            return (str(self.address), self.port)
        host, _, scope = str(self.address).partition("%")
        return (host, self.port, 0, int(scope or 0))

    @property
    def error(self) -> OSError:
        """As an exception, of the class that belongs to the errno: ConnectionRefusedError, say."""
        return OSError(self.errno, str(self))


def _address(packed: bytes, scope: int, family: int) -> IPv4Address | IPv6Address | None:
    if family == 4:
        return IPv4Address(packed[12:])
    if family == 6:
        address = IPv6Address(packed)
        return IPv6Address(f"{address}%{scope}") if scope else address
    return None


def unpack_errors(records: bytes) -> tuple[SocketError, ...]:
    """From ``struct sl_socket_error[]``."""
    made = []
    for fields in _RECORD.iter_unpack(records):
        packed, scope, port, family = fields[:4]
        offender, offender_scope, _, offender_family = fields[4:8]
        time_ns, error, mtu, service_port, origin, kind, code = fields[8:]
        made.append(
            SocketError(
                _address(packed, scope, family) or IPv6Address(packed),
                port,
                error,
                _ORIGINS[origin],
                kind,
                code,
                _address(offender, offender_scope, offender_family),
                mtu,
                service_port,
                time_ns,
            )
        )
    return tuple(made)


class ErrorQueue:
    """Of the sockets of a backend that reads them in Python; counts ``reported``, ``unread``, ``floods``."""

    def __init__(self, sockets: Iterable[tuple[int, socket.socket]]) -> None:
        self._ports = {sock: port for port, sock in sockets}
        self._kept: deque[SocketError] = deque(maxlen=KEPT)
        self._paid: dict[socket.socket, float] = {}  # when its errors are paid for, by the clock
        self._deaf: set[socket.socket] = set()
        self.counts: Counter[str] = Counter()
        for sock in self._ports:
            _hear(sock, True)

    def take(self) -> tuple[SocketError, ...]:
        """All that is kept, the oldest first; it is forgotten here."""
        taken = tuple(self._kept)
        self._kept.clear()
        return taken

    def look(self) -> None:
        """Read the queues of all sockets; end the deafness of those whose time has come."""
        now = time.monotonic()
        for sock in self._ports:
            if sock not in self._deaf:
                self.drain(sock)
            elif now > self._paid[sock]:
                self._deaf.remove(sock)
                _hear(sock, True)

    def drain(self, sock: socket.socket, failed: int = 0) -> Literal["", "earlier", "own"]:
        """Read what waits at a socket, which has failed with errno ``failed``; what was said of it.

        "own": this host could not send the datagram; "earlier": there were errors of others, which had left.
        """
        told: Literal["", "earlier", "own"] = ""
        while True:
            try:
                _, control, _, name = sock.recvmsg(0, _CONTROL, _MSG_ERRQUEUE | socket.MSG_DONTWAIT)
            except OSError:  # empty, or the socket is no more: reading and sending say so
                return told
            record = _parse(control, name, self._ports[sock])
            if record is not None:
                self._keep(record)
                if record.origin != "local":
                    told = told or "earlier"
                elif record.errno == failed:
                    told = "own"
            if self._is_flood(sock):
                return told

    def _keep(self, record: SocketError) -> None:
        last = self._kept[-1] if self._kept else None
        if record.origin == "local" and last is not None and last[:4] == record[:4]:
            return  # said again each time that it, or another like it, is tried
        self.counts["reported"] += 1
        self.counts["unread"] += len(self._kept) == KEPT
        self._kept.append(record)

    def _is_flood(self, sock: socket.socket) -> bool:
        now = time.monotonic()
        paid = max(self._paid.get(sock, 0.0), now - _FREE_SECONDS) + _ERROR_SECONDS
        if paid > now:
            paid = now + _DEAF_SECONDS
            self._deaf.add(sock)
            _hear(sock, False)  # empties the queue, too
            self.counts["floods"] += 1
        self._paid[sock] = paid
        return sock in self._deaf


def _hear(sock: socket.socket, on: bool) -> None:
    """An IPv6 socket that speaks IPv4 too has an option for each."""
    with contextlib.suppress(OSError):
        if sock.family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_RECVERR, on)
        sock.setsockopt(socket.IPPROTO_IP, _IP_RECVERR, on)


def _parse(
    control: Sequence[tuple[int, int, bytes]], name: tuple[str, int], service_port: int
) -> SocketError | None:
    for level, kind, data in control:
        if (level, kind) not in {(socket.IPPROTO_IP, _IP_RECVERR), (socket.IPPROTO_IPV6, _IPV6_RECVERR)}:
            continue
        error, origin, icmp_type, code, info, _ = _EXTENDED.unpack_from(data)
        if origin not in _ORIGINS:
            continue
        return SocketError(
            _plain(ip_address(name[0])),
            name[1],
            error,
            _ORIGINS[origin],
            icmp_type,
            code,
            _offender(data[_EXTENDED.size :]),
            info if error == errno.EMSGSIZE else 0,
            service_port,
            time.monotonic_ns(),
        )
    return None


def _plain(address: IPv4Address | IPv6Address) -> IPv4Address | IPv6Address:
    """IPv4 as such, also from an IPv6 socket."""
    return getattr(address, "ipv4_mapped", None) or address


def _offender(name: bytes) -> IPv4Address | IPv6Address | None:
    """From a struct sockaddr_in or sockaddr_in6."""
    family = int.from_bytes(name[:2], sys.byteorder)
    if family == socket.AF_INET:
        return IPv4Address(name[4:8])
    if family == socket.AF_INET6:
        return _plain(IPv6Address(name[8:24]))
    return None
