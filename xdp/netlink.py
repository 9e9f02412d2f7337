# SPDX-License-Identifier: Apache-2.0
"""Single requests to rtnetlink, answered at once: in any thread, and beside a running event loop.

pyroute2 knows the messages (and reads them here), but its sockets bring an asyncio loop of their own for each
thread that uses them: in a thread that runs one already they fail.  The kernel answers a question about one
object before sendto returns (rtnetlink(7)), so there is nothing to wait for, either.
"""

from __future__ import annotations

import errno
import socket
import struct
from typing import Any, Final, TypeVar

_HEADER: Final = struct.Struct("=IHHII")  # struct nlmsghdr
_ERROR: Final = struct.Struct("=i")  # struct nlmsgerr begins so
_NLMSG_ERROR: Final = 2
_NLM_F_REQUEST, _NLM_F_ACK, _NLM_F_REPLACE = 1, 4, 0x100
_RTM_GETLINK, _RTM_GETROUTE, _RTM_NEWNEIGH, _RTM_GETNEIGH = 18, 26, 28, 30
_NUD_NONE: Final = 0  # linux/neighbour.h
_LARGEST: Final = 1 << 16  # bytes of an answer; a link with all its statistics has two thousand

_Message = TypeVar("_Message")


class Netlink:
    """A socket to ask by, in the network namespace of the thread that makes it.  Not thread-safe.

    Messages are pyroute2's.  Raises pyroute2's NetlinkError with the kernel's errno as ``code``.
    """

    def __init__(self) -> None:
        self._socket = socket.socket(
            socket.AF_NETLINK,
            socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK,
            socket.NETLINK_ROUTE,
        )
        self._sequence = 0

    def close(self) -> None:
        """May be called again."""
        self._socket.close()

    def route(self, address: str, family: int, through: int | None = None) -> Any:
        """How the kernel would send to an address, through the interface of that index if one is given."""
        from pyroute2.netlink.rtnl.rtmsg import rtmsg

        message = rtmsg()
        message["family"] = family
        message["dst_len"] = 32 if family == socket.AF_INET else 128
        message["attrs"] = [("RTA_DST", address)]
        if through is not None:
            message["attrs"].append(("RTA_OIF", through))
        return self._ask(_RTM_GETROUTE, message)

    def link(self, ifindex: int) -> Any:
        """An interface."""
        from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg

        message = ifinfmsg()
        message["index"] = ifindex
        return self._ask(_RTM_GETLINK, message)

    def neighbour(self, address: str, family: int, ifindex: int) -> Any:
        """What is known of the one with that address on an interface."""
        return self._ask(_RTM_GETNEIGH, _neighbour(address, family, ifindex))

    def forget_neighbour(self, address: str, family: int, ifindex: int) -> None:
        """As if nobody had looked for it: the next datagram makes the kernel look.  Needs CAP_NET_ADMIN.

        Not deleted: those whose datagrams wait for it would hear that it can't be reached.
        """
        message = _neighbour(address, family, ifindex)
        message["state"] = _NUD_NONE
        self._ask(_RTM_NEWNEIGH, message, _NLM_F_ACK | _NLM_F_REPLACE)

    def _ask(self, kind: int, message: Any, flags: int = 0) -> Any:
        """The answer; None if it is that all is well."""
        from pyroute2.netlink.exceptions import NetlinkError

        self._sequence = self._sequence + 1 & 0xFFFFFFFF
        message["header"]["type"] = kind
        message["header"]["flags"] = _NLM_F_REQUEST | flags
        message["header"]["sequence_number"] = self._sequence
        message.encode()
        try:
            self._socket.sendto(message.data, (0, 0))
            answer = self._answer()
        except OSError as error:
            raise NetlinkError(error.errno or errno.EIO) from error
        _, kind, _, _, _ = _HEADER.unpack_from(answer)
        if kind == _NLMSG_ERROR:
            (code,) = _ERROR.unpack_from(answer, _HEADER.size)
            if not code:
                return None
            raise NetlinkError(-code)
        decoded = type(message)(answer)
        decoded.decode()
        return decoded

    def _answer(self) -> bytes:
        """That to the last question; one that came too late for an earlier one is skipped."""
        while True:
            answer, (sender, _) = self._socket.recvfrom(_LARGEST)
            if sender == 0 and _HEADER.unpack_from(answer)[3] == self._sequence:
                return answer


def _neighbour(address: str, family: int, ifindex: int) -> Any:
    from pyroute2.netlink.rtnl.ndmsg import ndmsg

    message = ndmsg()
    message["family"], message["ifindex"] = family, ifindex
    message["attrs"] = [("NDA_DST", address)]
    return message
