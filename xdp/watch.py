# SPDX-License-Identifier: Apache-2.0
"""Notice when an interface is deleted, made again, renamed, set down or up.

rtnetlink says that something changed; what an interface is now is asked of the kernel then, so
messages lost in an overrun (ENOBUFS, rtnetlink(7)) cost nothing: what counts is the difference
between what was known and what is.
"""

from __future__ import annotations

import errno
import fcntl
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from xdp.errors import SluiceError, UsageError

State = Literal["gone", "back", "renamed", "down", "up"]

_RTMGRP_LINK = 1  # linux/rtnetlink.h
_SIOCGIFFLAGS = 0x8913
_IFF_UP = 1
_SO_RCVBUFFORCE = 33
#: Bytes; a message is about 1.5 KB, and a machine may make a thousand interfaces at once.
_RECEIVE_BUFFER = 4 << 20


@dataclass(frozen=True)
class Change:
    """What happened; ``interface`` and ``ifindex`` are those that hold now (or held last)."""

    state: State
    interface: str
    ifindex: int


def interface_index(interface: str) -> int:
    """The index of an interface of this network namespace. Raises `UsageError` when there is none."""
    try:
        return socket.if_nametoindex(interface)
    except (OSError, ValueError) as error:
        names = ", ".join(sorted(name for _, name in socket.if_nameindex()))
        raise UsageError(f"there is no interface {interface!r} here", hint=f"there are: {names}") from error


def is_up(interface: str) -> bool:
    """Whether it is set up (IFF_UP); False when it does not exist."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as query:
        try:
            answer = fcntl.ioctl(query, _SIOCGIFFLAGS, struct.pack("16sH14x", interface.encode(), 0))
        except OSError as error:
            if error.errno == errno.ENODEV:
                return False
            raise SluiceError.from_errno(f"flags of {interface}", error.errno or 0) from error
    return bool(struct.unpack_from("H", answer, 16)[0] & _IFF_UP)


class InterfaceWatch:
    """Follows one interface of this thread's network namespace.

    ``alive`` is asked too before an interface counts as still there (an owner asks its link: an
    interface can be deleted and made again with the same index between two looks).
    """

    def __init__(self, interface: str, alive: Callable[[], bool] = lambda: True) -> None:
        self._alive = alive
        # First the subscription, then the look, so that nothing falls between the two.
        self._netlink = socket.socket(
            socket.AF_NETLINK,
            socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK,
            socket.NETLINK_ROUTE,
        )
        try:
            try:
                self._netlink.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _RECEIVE_BUFFER)
            except PermissionError:
                self._netlink.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER)
            self._netlink.bind((0, _RTMGRP_LINK))
            # Asked once: the socket stays in this namespace, but the calling thread may not.
            self.interface = interface
            self.ifindex = interface_index(interface)
            self.up = is_up(interface)
            self.present = True
        except BaseException:
            self._netlink.close()
            raise

    def fileno(self) -> int:
        """Readable when :meth:`poll` may have something to say."""
        return self._netlink.fileno()

    def poll(self) -> list[Change]:
        """What has changed since the last call; never blocks."""
        self._drain()
        changes: list[Change] = []

        def report(state: State) -> None:
            changes.append(Change(state, self.interface, self.ifindex))

        if self.present:
            name = _name_of(self.ifindex)
            if name is None or not self._alive():
                self.present = False
                report("gone")
            elif name != self.interface:
                self.interface = name
                report("renamed")
        if not self.present:
            try:
                self.ifindex = socket.if_nametoindex(self.interface)
            except OSError:
                return changes
            self.present = True
            self.up = is_up(self.interface)
            report("back")
        elif (up := is_up(self.interface)) != self.up:
            self.up = up
            report("up" if up else "down")
        return changes

    def close(self) -> None:
        """Stop watching; idempotent."""
        self._netlink.close()

    def _drain(self) -> None:
        while True:
            try:
                self._netlink.recv(1)  # the rest of each message is discarded
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise SluiceError.from_errno("watching interfaces", error.errno or 0) from error


def _name_of(ifindex: int) -> str | None:
    try:
        return socket.if_indextoname(ifindex)
    except OSError:
        return None
