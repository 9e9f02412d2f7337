# SPDX-License-Identifier: Apache-2.0
"""AF_XDP sockets that nobody reads: what the steer program's XSKMAP needs under test runs.

A test run ends before the kernel would hand the packet over, so all that counts is that the map's
slot holds a socket.  The socket is bound to the loopback interface of a network namespace of its own,
which ends with the socket; nothing ever arrives there.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import socket
import struct
import threading
from types import TracebackType
from typing import Self

from xdp.errors import SluiceError
from xdp.maps import BpfMap

# linux/if_xdp.h
_AF_XDP = 44
_SOL_XDP = 283
_XDP_RX_RING, _XDP_UMEM_REG, _XDP_UMEM_FILL_RING, _XDP_UMEM_COMPLETION_RING = 2, 4, 5, 6
_XDP_COPY = 1 << 1
_UMEM_REGISTER = struct.Struct("=QQIIII")  # address, length, chunk size, headroom, flags, metadata length
_ADDRESS = struct.Struct("=HHIII")  # family, flags, ifindex, queue, shared umem's descriptor

# linux/if.h, linux/sockios.h, linux/sched.h
_SIOCSIFFLAGS = 0x8914
_IFF_UP = 1
_CLONE_NEWNET = 0x40000000

_CHUNK = 4096  # bytes, a page: the smallest UMEM there is
_ENTRIES = struct.pack("=I", 2)  # of each ring


class IdleSocket:
    """One AF_XDP socket with a UMEM of a single frame.  Needs CAP_NET_ADMIN and CAP_SYS_ADMIN.

    Raises SluiceError where the kernel has no AF_XDP or refuses.
    """

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, _CHUNK)
        self._opened: list[socket.socket] = []
        failures: list[OSError] = []
        # A network namespace belongs to a thread: entered there, it is left by ending the thread.
        thread = threading.Thread(target=self._open, args=(failures,))
        thread.start()
        thread.join()
        if failures:
            self.close()
            raise SluiceError.from_errno(
                "opening an AF_XDP socket",
                failures[0].errno or 0,
                hint="`sluice doctor` says whether this kernel has AF_XDP",
            ) from failures[0]

    def _open(self, failures: list[OSError]) -> None:
        try:
            _enter_new_namespace()
            made = socket.socket(_AF_XDP, socket.SOCK_RAW)
            self._opened.append(made)
            # Pinned by the kernel, not by us: the view ends before anybody could resize the memory.
            view = ctypes.c_char.from_buffer(self._memory)
            address = ctypes.addressof(view)
            del view
            made.setsockopt(_SOL_XDP, _XDP_UMEM_REG, _UMEM_REGISTER.pack(address, _CHUNK, _CHUNK, 0, 0, 0))
            for ring in (_XDP_UMEM_FILL_RING, _XDP_UMEM_COMPLETION_RING, _XDP_RX_RING):
                made.setsockopt(_SOL_XDP, ring, _ENTRIES)
            _bind(made, socket.if_nametoindex("lo"))
        except OSError as error:
            failures.append(error)

    def fill(self, xsks: BpfMap, slots: int) -> None:
        """Put the socket into the first ``slots`` entries of an XSKMAP; they are empty once it is closed."""
        value = struct.pack("=I", self._opened[0].fileno())
        for slot in range(slots):
            xsks.update(struct.pack("=I", slot), value)

    def close(self) -> None:
        """Idempotent."""
        while self._opened:
            self._opened.pop().close()
        self._memory.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _enter_new_namespace() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "unshare")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack("=16sh14x", b"lo", _IFF_UP))


def _bind(made: socket.socket, ifindex: int) -> None:
    """Python's own bind() does not know the family."""
    address = _ADDRESS.pack(_AF_XDP, _XDP_COPY, ifindex, 0, 0)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.bind(made.fileno(), address, len(address)):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
