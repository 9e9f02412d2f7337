# SPDX-License-Identifier: Apache-2.0
"""Opening AF_XDP sockets: the part that needs privileges.

For every queue: a UMEM in a memfd, one socket per lane, the first one with the
UMEM, the others sharing it, and one more to send by, all bound.  The outcome is a
:class:`~userspace.datagram.descriptors.LaneDescriptors`, nothing else is kept.

The program must be attached before binding with zero-copy (drivers set the queue
up for it), and steers nothing until :func:`register` has put the sockets into
its XSKMAP.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from userspace.datagram.descriptors import (
    Geometry,
    LaneDescriptors,
    LaneSpec,
    Mode,
    QueueDescriptors,
    plan_geometry,
)
from userspace.native._native import ffi, lib
from xdp.errors import (
    BusyError,
    InterfaceGoneError,
    PermissionsError,
    SluiceError,
    UnsupportedError,
    UsageError,
)

#: Seconds to retry a queue that the kernel is still cleaning up after its last socket was
#: closed; that takes milliseconds, on a busy machine tens of them.
BUSY_TIMEOUT = 2.0
_BUSY_PAUSE = 0.005

#: Bytes of packets on their way out that a socket may have in copy mode.  The default (208 KiB)
#: holds some 150 packets of 1,232 bytes; the transmit ring bounds it anyway.
_SEND_BUFFER = 16 << 20

_HUGE_PAGE = 2 << 20

#: Drivers whose zero-copy would cut packets in frames of 2,048 bytes.  igb counts its buffers in KiB, and
#: what the headroom leaves of such a frame is one: the rest of a packet above 1,024 bytes would arrive as
#: another packet (igb_main.c, igb_setup_srrctl; seen by `sluice lab vm`).
_FRAMES_OF_4096 = frozenset({"igb"})


class XskMap(Protocol):
    """What :func:`register` needs of the program's map ``xsks``."""

    def update(self, key: bytes, value: bytes, flags: int = 0) -> None:
        """Set one entry."""


def interface_queues(interface: str) -> int:
    """Number of receive queues of an interface of this network namespace."""
    count = lib.sl_xsk_queues(os.fsencode(interface))
    if count == -errno.ENODEV:
        raise UsageError(f"there is no interface {interface!r} here", hint="`ip link` lists them")
    if count < 0:
        raise UnsupportedError(f"queues of {interface}: {os.strerror(-count)}")
    return count


def open_queues(
    interface: str,
    lanes: Sequence[LaneSpec],
    *,
    mode: Mode,
    queues: Sequence[int] | None = None,
    cookie: int = 0,
    frame_size: int = 2048,
    reserve: int = 1024,
    transmit_ring: int = 2048,
    longest: int = 0,
) -> LaneDescriptors:
    """Open every queue (or those named) of an interface in exactly this mode.

    ``mode`` is "native-zero-copy", "native-copy" or "generic-copy"; the first two
    want the program attached natively, which is up to the caller.  ``cookie`` is
    the program's, for its metadata.  With ``longest`` packets up to that many bytes may lie in
    several frames; the program then takes fragments, too (:mod:`xdp.jumbo`).  Nothing is left open
    when it fails.  Frames are of 4,096 bytes, whatever is asked for, where the driver's zero-copy
    needs that (igb); the descriptors' geometry says so.

    Raises UnsupportedError (the driver lacks the mode, no memory), BusyError (a queue has
    other sockets), PermissionsError, UsageError, InterfaceGoneError.
    """
    if mode not in {"native-zero-copy", "native-copy", "generic-copy"}:
        raise UsageError(f"AF_XDP sockets have no mode {mode!r}")
    try:
        ifindex = socket.if_nametoindex(interface)
    except OSError as error:
        raise UsageError(f"there is no interface {interface!r} here", hint="`ip link` lists them") from error
    chosen = _choose(interface, queues)
    if mode == "native-zero-copy" and _driver(interface) in _FRAMES_OF_4096:
        frame_size = 4096
    geometry = plan_geometry(
        lanes, frame_size=frame_size, reserve=reserve, transmit_ring=transmit_ring, longest=longest
    )
    with contextlib.ExitStack() as cleanup:
        opened = [
            _open_queue(cleanup, interface, ifindex, queue, lanes, geometry, mode == "native-zero-copy")
            for queue in chosen
        ]
        cleanup.pop_all()
    return LaneDescriptors(
        interface=interface,
        ifindex=ifindex,
        mode=mode,
        cookie=cookie,
        geometry=geometry,
        lanes=lanes,
        queues=opened,
    )


def register(descriptors: LaneDescriptors, xsks: XskMap) -> None:
    """Let the program steer into these sockets."""
    for queue in descriptors.queues:
        for lane, fd in zip(descriptors.lanes, queue.sockets, strict=True):
            key = queue.queue * lib.SLUICE_MAX_LANES + lane.number
            xsks.update(struct.pack("=I", key), struct.pack("=I", fd))


def _driver(interface: str) -> str:
    """Its name, "" where there is none."""
    from xdp.probe_interface import driver_name  # asks ethtool; not needed by any other mode

    return driver_name(interface)


def _choose(interface: str, queues: Sequence[int] | None) -> tuple[int, ...]:
    count = min(interface_queues(interface), lib.SLUICE_MAX_QUEUES)
    if queues is None:
        return tuple(range(count))
    chosen = tuple(sorted(set(queues)))
    if not chosen or chosen[0] < 0 or chosen[-1] >= count:
        raise UsageError(f"queues {list(queues)} of {interface}; allowed: 0 to {count - 1}")
    return chosen


def _open_queue(
    cleanup: contextlib.ExitStack,
    interface: str,
    ifindex: int,
    queue: int,
    lanes: Sequence[LaneSpec],
    geometry: Geometry,
    zero_copy: bool,
) -> QueueDescriptors:
    name = f"{interface} queue {queue}"

    def step(what: str, result: int) -> int:
        if result < 0:
            raise _error(f"{name}: {what}", -result, zero_copy)
        return result

    def opened(fd: int) -> int:
        cleanup.callback(os.close, fd)
        return fd

    umem = opened(step("making the UMEM", _make_umem(geometry.area)))
    *sockets, transmit = (
        opened(step("making an AF_XDP socket", lib.sl_xsk_socket())) for _ in range(len(lanes) + 1)
    )
    first = sockets[0]
    with _mapped(umem, geometry.area, step) as area:
        step(
            "registering the UMEM (XDP_UMEM_REG)",
            lib.sl_xsk_register(first, area, geometry.area, geometry.frame_size),
        )
    step(
        "making fill and completion rings",
        lib.sl_xsk_umem_rings(first, geometry.fill_ring, geometry.completion_ring),
    )
    step("making the transmit ring", lib.sl_xsk_transmit_ring(transmit, geometry.transmit_ring))
    for lane, fd in zip(lanes, sockets, strict=True):
        step(f"making the receive ring of lane {lane.name}", lib.sl_xsk_receive_ring(fd, lane.ring))
    _widen_transmit(transmit, geometry.transmit_ring)
    # Before binding: drivers take frames from the fill ring when the queue starts.
    step(
        "filling the fill ring",
        lib.sl_xsk_fill(first, geometry.fill_ring, geometry.fill_frames, geometry.frame_size),
    )
    flags = lib.SL_XSK_ZEROCOPY if zero_copy else lib.SL_XSK_COPY
    if geometry.longest:
        flags |= lib.SL_XSK_SG
    step("binding (zero-copy)" if zero_copy else "binding (copy)", _bind(first, ifindex, queue, flags, -1))
    for lane, fd in zip(lanes[1:], sockets[1:], strict=True):
        step(f"binding lane {lane.name}", _bind(fd, ifindex, queue, lib.SL_XSK_SHARED, first))
    step("binding the socket to send by", _bind(transmit, ifindex, queue, lib.SL_XSK_SHARED, first))
    if step("reading the mode (XDP_OPTIONS)", lib.sl_xsk_zerocopy(first)) != int(zero_copy):
        raise UnsupportedError(f"{name}: the kernel chose another mode than asked for")
    return QueueDescriptors(queue, umem, sockets, transmit)


@contextlib.contextmanager
def _mapped(umem: int, size: int, step: Callable[[str, int], int]) -> Iterator[object]:
    """The UMEM in memory while it is registered; the kernel then holds its pages by itself."""
    area = ffi.new("uint8_t **")
    step("mapping the UMEM", lib.sl_umem_map(umem, size, area))
    try:
        yield area[0]
    finally:
        lib.sl_umem_unmap(area[0], size)


def _make_umem(size: int) -> int:
    """Of huge pages where enough are free: fewer TLB misses for every packet."""
    rounded = -(-size // _HUGE_PAGE) * _HUGE_PAGE
    if _free_huge_pages() * _HUGE_PAGE >= rounded:
        fd = lib.sl_umem_create(rounded, 1)
        if fd >= 0:
            return fd
    return lib.sl_umem_create(size, 0)


def _free_huge_pages() -> int:
    values = {}
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        key, _, value = line.partition(":")
        values[key] = value.split()
    if values.get("Hugepagesize") != [str(_HUGE_PAGE >> 10), "kB"]:
        return 0
    return int(values.get("HugePages_Free", ["0"])[0])


def _widen_transmit(fd: int, ring: int) -> None:
    """More packets for each system call and in flight, where the kernel lets us.

    Both are only speed: without them it takes more calls.
    """
    lib.sl_xsk_transmit_budget(fd, ring)
    lib.sl_xsk_send_buffer(fd, _SEND_BUFFER)


def _bind(fd: int, ifindex: int, queue: int, flags: int, first: int) -> int:
    deadline = time.monotonic() + BUSY_TIMEOUT
    while True:
        result = lib.sl_xsk_bind(fd, ifindex, queue, flags, first)
        if result != -errno.EBUSY or time.monotonic() > deadline:
            return result
        time.sleep(_BUSY_PAUSE)


def _error(what: str, code: int, zero_copy: bool) -> SluiceError:
    if code == errno.EBUSY:
        return BusyError(
            f"{what}: the queue is in use by another AF_XDP application",
            hint="stop that application, or choose other queues",
        )
    if code in {errno.EPERM, errno.EACCES}:
        return PermissionsError(
            f"{what}: not permitted", hint="run as root, or with CAP_NET_RAW, CAP_NET_ADMIN and CAP_BPF"
        )
    if code in {errno.ENODEV, errno.ENXIO}:
        return InterfaceGoneError(f"{what}: the interface is gone", hint="`ip link` lists what there is")
    if code == errno.ENETDOWN:
        return UsageError(f"{what}: the interface is down", hint="`ip link set INTERFACE up`")
    if code in {errno.ENOBUFS, errno.ENOMEM}:
        return UnsupportedError(
            f"{what}: not enough memory that may be locked (ulimit -l)",
            hint="raise the limit (`ulimit -l unlimited`, LimitMEMLOCK=), or make rings and quotas smaller",
        )
    if code in {errno.EOPNOTSUPP, errno.EINVAL} and zero_copy:
        return UnsupportedError(
            f"{what}: the driver has no zero-copy ({os.strerror(code)})", hint="use mode auto or native"
        )
    if code in {errno.EAFNOSUPPORT, errno.EPROTONOSUPPORT}:
        return UnsupportedError(
            f"{what}: this kernel has no AF_XDP", hint="it needs CONFIG_XDP_SOCKETS; `sluice doctor` tells"
        )
    return UnsupportedError(f"{what}: {os.strerror(code)}", hint="`sluice doctor` says what is missing")
