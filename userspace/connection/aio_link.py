# SPDX-License-Identifier: Apache-2.0
"""Tells when the carrier, the address or the way out of an interface changes: :class:`LinkWatch`.

    watch = LinkWatch("eth1")
    loop.add_reader(watch.fileno(), ...)         # and then
    for change in watch.poll(): ...              # Change.DOWN, UP, PATH

rtnetlink says that something happened; what the interface is now is asked of the kernel then, so messages
that were lost cost nothing but a path change that nobody notices.  A pulled cable is DOWN as well, which is
more than :class:`xdp.watch.InterfaceWatch` looks at: that one is about what is attached to an interface.
PATH are new addresses of this interface, and new default routes by it; the routes of a router are not
followed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import socket
import struct
import sys
from collections.abc import Iterator
from enum import StrEnum
from typing import Final

from xdp.errors import SluiceError
from xdp.watch import interface_index

#: linux/rtnetlink.h: RTMGRP_LINK, _IPV4_IFADDR, _IPV4_ROUTE, _IPV6_IFADDR, _IPV6_ROUTE.
_GROUPS: Final = 0x1 | 0x10 | 0x40 | 0x100 | 0x400
_NEWADDR: Final = 20
_NEWROUTE: Final = 24
_HEADER: Final = struct.Struct("=IHHII")  # struct nlmsghdr
_ADDRESS: Final = struct.Struct("=BBBBI")  # struct ifaddrmsg
_ROUTE: Final = struct.Struct("=BBBBBBBBI")  # struct rtmsg
_ATTRIBUTE: Final = struct.Struct("=HH")
_RTA_OIF: Final = 4

_SIOCGIFFLAGS: Final = 0x8913
#: linux/if.h: IFF_UP, and IFF_RUNNING, which is the carrier.
_THERE: Final = 0x1 | 0x40
#: Bytes that are read at once.
_MESSAGES: Final = 1 << 16


class Change(StrEnum):
    """What happened to an interface."""

    DOWN = "down"
    UP = "up"
    #: It is up as before, and has another address or default route.
    PATH = "path"


class LinkWatch:
    """Follows one interface of this thread's network namespace.

    Raises UsageError when there is none of that name, SluiceError when the kernel does not let us listen.
    """

    def __init__(self, interface: str) -> None:
        self.interface = interface
        self._netlink = socket.socket(
            socket.AF_NETLINK,
            socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK,
            socket.NETLINK_ROUTE,
        )
        # Flags are asked of this one: the thread may go to another namespace, sockets stay.
        self._query = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        try:
            self._netlink.bind((0, _GROUPS))
            interface_index(interface)
            self.up = self._is_up()
        except OSError as error:
            self.close()
            raise SluiceError.from_errno(f"watching {interface}", error.errno or 0) from error
        except BaseException:
            self.close()
            raise

    def fileno(self) -> int:
        """Readable when :meth:`poll` may have something to say."""
        return self._netlink.fileno()

    def _is_up(self) -> bool:
        with contextlib.suppress(OSError):  # it is gone
            answer = fcntl.ioctl(
                self._query, _SIOCGIFFLAGS, struct.pack("16sH14x", self.interface.encode(), 0)
            )
            return bool(struct.unpack_from("H", answer, 16)[0] & _THERE == _THERE)
        return False

    def poll(self) -> list[Change]:
        """What has changed since the last call, at most one of each; never blocks."""
        moved = self._drain()
        was, self.up = self.up, self._is_up()
        if self.up != was:
            return [Change.UP if self.up else Change.DOWN]
        return [Change.PATH] if moved and self.up else []

    def _drain(self) -> bool:
        """Whether there was a new address or default route."""
        moved = False
        while True:
            try:
                data = self._netlink.recv(_MESSAGES)
            except BlockingIOError:
                return moved
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise SluiceError.from_errno(f"watching {self.interface}", error.errno or 0) from error
                moved = True  # it may have been among what was lost
                continue
            index = 0
            with contextlib.suppress(OSError):
                index = socket.if_nametoindex(self.interface)
            moved = moved or any(_is_ours(kind, body, index) for kind, body in _messages(data))

    def close(self) -> None:
        """Stop watching; idempotent."""
        self._netlink.close()
        self._query.close()


def _messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    while len(data) >= _HEADER.size:
        length, kind, *_ = _HEADER.unpack_from(data)
        if not _HEADER.size <= length <= len(data):
            return
        yield kind, data[_HEADER.size : length]
        data = data[length + 3 & ~3 :]


def _is_ours(kind: int, body: bytes, index: int) -> bool:
    """Whether that is a new address of an interface, or a new default route by it."""
    if kind == _NEWADDR and len(body) >= _ADDRESS.size:
        return bool(_ADDRESS.unpack_from(body)[4] == index)
    if kind != _NEWROUTE or len(body) < _ROUTE.size or _ROUTE.unpack_from(body)[1]:
        return False
    rest = body[_ROUTE.size :]
    while len(rest) >= _ATTRIBUTE.size:
        length, what = _ATTRIBUTE.unpack_from(rest)
        if length < _ATTRIBUTE.size:
            return False
        if what == _RTA_OIF and length >= _ATTRIBUTE.size + 4:
            return int.from_bytes(rest[4:8], sys.byteorder) == index
        rest = rest[length + 3 & ~3 :]
    return False
