# SPDX-License-Identifier: Apache-2.0
"""Attaching a program to an interface, by bpf_link.

A link belongs to its descriptor: when the last one is closed, by ``close`` or
because the process died, the kernel takes the program off the interface.
"""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path
from typing import Literal, Protocol

from xdp._libbpf import ffi, lib
from xdp.errors import BusyError, InterfaceGoneError, PermissionsError, SluiceError, UnsupportedError

AttachMode = Literal["native", "generic"]

_FLAGS = {"native": lib.XDP_FLAGS_DRV_MODE, "generic": lib.XDP_FLAGS_SKB_MODE}

# IFLA_XDP_ATTACHED (linux/if_link.h), in pyroute2's words: how a program sits on an interface.
_ATTACHED = {"xdp": "native", "xdpgeneric": "generic", "xdpoffload": "offloaded", "xdpmulti": "several"}


class _Loaded(Protocol):
    @property
    def fd(self) -> int: ...


def attached_program(ifindex: int) -> tuple[int, str] | None:
    """(program id, "native" | "generic" | ...) of the interface as netlink tells it, or None."""
    from pyroute2 import IPRoute

    with IPRoute() as netlink:
        try:
            links = netlink.get_links(ifindex)
        except Exception as error:  # pyroute2 raises its own NetlinkError
            if getattr(error, "code", None) == errno.ENODEV:
                raise InterfaceGoneError(f"there is no interface with index {ifindex}") from error
            raise
    xdp = links[0].get_attr("IFLA_XDP") if links else None
    if xdp is None:
        return None
    # Where a native and a generic program sit side by side, either of them is somebody's.
    ids = (xdp.get_attr(f"IFLA_XDP_{which}PROG_ID") for which in ("", "DRV_", "SKB_", "HW_"))
    program_id = next((number for number in ids if number), None)
    if program_id is None:
        return None
    return int(program_id), _ATTACHED.get(xdp.get_attr("IFLA_XDP_ATTACHED"), "unknown")


def program_name(program_id: int) -> str:
    """Name of a loaded program, "?" if it is gone or may not be asked for."""
    fd = lib.sluice_prog_by_id(program_id)
    if fd < 0:
        return "?"
    try:
        info = ffi.new("struct sluice_prog_info *")
        if lib.sluice_prog_info(fd, info) < 0:
            return "?"
        return ffi.string(info.name).decode(errors="replace")
    finally:
        os.close(fd)


class Link:
    """A program on an interface; gone when the last descriptor of it is closed."""

    def __init__(self, fd: int) -> None:
        """Takes over ``fd``."""
        self.fd = fd
        info = ffi.new("struct sluice_link_info *")
        result = lib.sluice_link_info(fd, info)
        if result < 0:
            raise SluiceError.from_errno("reading a link's description", -result)
        self.id: int = info.id
        self.program_id: int = info.prog_id

    @property
    def ifindex(self) -> int:
        """0 once the interface has been deleted."""
        info = ffi.new("struct sluice_link_info *")
        result = lib.sluice_link_info(self.fd, info)
        if result < 0:
            raise SluiceError.from_errno("reading a link's description", -result)
        return int(info.ifindex)

    @property
    def mode(self) -> str:
        """Native or generic, as the kernel says, not as was asked for."""
        ifindex = self.ifindex
        found = attached_program(ifindex) if ifindex else None
        if found is None:
            raise InterfaceGoneError("the interface of this link is gone")
        return found[1]

    def update(self, program: _Loaded) -> None:
        """Put another program in this one's place; no packet goes by either of them."""
        result = lib.sluice_link_update(self.fd, program.fd)
        if result < 0:
            raise SluiceError.from_errno("replacing the program of a link", -result)

    def pin(self, path: Path) -> None:
        """Keep the program attached after this process; ``path`` is on a bpffs."""
        result = lib.sluice_obj_pin(self.fd, os.fsencode(path))
        if result < 0:
            raise SluiceError.from_errno(
                f"pinning the link at {path}",
                -result,
                hint="is a bpffs mounted there? `mount -t bpf bpf /sys/fs/bpf`",
            )

    @classmethod
    def from_pin(cls, path: Path) -> Link:
        """A link that ``pin`` left at ``path``."""
        fd = lib.sluice_obj_get(os.fsencode(path))
        if fd < 0:
            raise SluiceError.from_errno(f"opening the pinned link {path}", -fd)
        return cls(fd)

    def close(self) -> None:
        """Give up this process's hold; the program goes off the interface if nobody else has one."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def attach(program: _Loaded, ifindex: int, mode: AttachMode = "native") -> Link:
    """Attach to an interface of this network namespace.

    Raises BusyError naming the program that is there already, UnsupportedError
    where the driver has no native XDP, InterfaceGoneError, PermissionsError.
    """
    fd = lib.sluice_link_create(program.fd, ifindex, lib.BPF_XDP, _FLAGS[mode])
    if fd >= 0:
        return Link(fd)
    raise _attach_error(-fd, ifindex, mode)


def detach_foreign(ifindex: int) -> None:
    """Take off whatever sits there without a link (attached by netlink): what ``--replace`` does.

    A program held by somebody's link cannot be taken off; BusyError says so.
    """
    from pyroute2 import IPRoute

    with IPRoute() as netlink:
        for flags in (lib.XDP_FLAGS_DRV_MODE, lib.XDP_FLAGS_SKB_MODE):
            try:
                # Spelled out: xdp={"fd": -1} detaches nothing (pyroute2 0.9).
                attributes = {"attrs": [("IFLA_XDP_FD", -1), ("IFLA_XDP_FLAGS", flags)]}
                netlink.link("set", index=ifindex, IFLA_XDP=attributes)
            except Exception as error:  # pyroute2 raises its own NetlinkError
                if getattr(error, "code", None) not in (errno.EBUSY, errno.EINVAL, errno.EOPNOTSUPP):
                    raise
    if (found := attached_program(ifindex)) is not None:
        raise BusyError(
            f"program {found[0]} ({program_name(found[0])}) holds {_interface_name(ifindex)} by a link",
            hint="stop the process that owns it: `bpftool link` shows which",
        )


def _interface_name(ifindex: int) -> str:
    try:
        return socket.if_indextoname(ifindex)
    except OSError:
        return f"interface {ifindex}"


def _exists(ifindex: int) -> bool:
    return any(number == ifindex for number, _ in socket.if_nameindex())


def _attach_error(code: int, ifindex: int, mode: AttachMode) -> SluiceError:
    name = _interface_name(ifindex)
    # A link to no interface is answered by EINVAL.
    if code == errno.ENODEV or not _exists(ifindex):
        return InterfaceGoneError(f"{name} does not exist", hint="`ip link` lists the interfaces")
    if code in (errno.EBUSY, errno.EEXIST):
        found = attached_program(ifindex)
        who = f"program {found[0]} ({program_name(found[0])}, {found[1]})" if found else "another program"
        return BusyError(
            f"{name} already carries {who}",
            hint="take it off first (`ip link set dev NAME xdp off`, or stop its owner), or say --replace",
        )
    # ERANGE: the MTU does not fit into a page; ENOSPC: too few queues (both veth's words).
    if code in (errno.EOPNOTSUPP, errno.EINVAL, errno.ERANGE, errno.ENOSPC) and mode == "native":
        return UnsupportedError.from_errno(
            f"the driver of {name} does not take a native XDP program",
            code,
            hint="generic mode works on every interface; a large MTU or LRO can also be the reason",
        )
    if code in (errno.EPERM, errno.EACCES):
        return PermissionsError(
            f"attaching to {name} is not permitted", hint="run as root (CAP_NET_ADMIN, CAP_BPF)"
        )
    return SluiceError.from_errno(f"attaching to {name} ({mode})", code)
