# SPDX-License-Identifier: Apache-2.0
"""Find what is loaded: the one way that every tool uses.

Nothing is remembered between two runs.  An interface of this network namespace says which XDP program it
carries (netlink, IFLA_XDP), the program says its maps, the maps say their BTF, a bpf_link names the program
and the interface, ``/proc/PID/fdinfo`` says which process holds it, and the pins are files in a bpffs.
What is found can be gone a moment later: all that is used afterwards is opened by id and checked again.

Reading ids needs CAP_BPF or root; `PermissionsError` says so.
"""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from xdp._libbpf import ffi, lib
from xdp.errors import (
    BusyError,
    InterfaceGoneError,
    NotLoadedError,
    PermissionsError,
    SluiceError,
    UsageError,
)
from xdp.maps import BpfMap, MapInfo

#: The name by which our program is told from others; bpf/steer.bpf.c calls it so.
PROGRAM_NAME = "sluice_steer"
PIN_ROOT = Path("/sys/fs/bpf/sluice")

ROOT_HINT = "run it as root, or with CAP_BPF and CAP_NET_ADMIN (and CAP_SYS_ADMIN to look up ids)"

AttachMode = Literal["native", "generic", "offload"]

# An interface may carry a program in each mode; IFLA_XDP_PROG_ID names one only if it is alone.
_PROGRAM_BY_MODE: tuple[tuple[AttachMode, str], ...] = (
    ("native", "IFLA_XDP_DRV_PROG_ID"),
    ("generic", "IFLA_XDP_SKB_PROG_ID"),
    ("offload", "IFLA_XDP_HW_PROG_ID"),
)


@dataclass(frozen=True, slots=True)
class Attachment:
    """One program on one interface, as netlink says."""

    interface: str
    ifindex: int
    mode: AttachMode
    program_id: int


@dataclass(frozen=True, slots=True)
class Holder:
    """A process with descriptors of a program, its link or its maps."""

    pid: int
    command: str
    program: bool
    link: bool
    maps: int

    @property
    def is_owner(self) -> bool:
        """Whether the program goes away with this process (and others that hold the link)."""
        return self.link


@dataclass(frozen=True, slots=True)
class Loaded:
    """A program on an interface with all that belongs to it."""

    interface: str
    ifindex: int
    mode: AttachMode
    id: int
    name: str
    tag: str
    loaded_at: float  # seconds since the epoch
    link_id: int | None  # None: attached without a link, so nothing takes it off by itself
    maps: dict[str, MapInfo]

    @property
    def ours(self) -> bool:
        """Whether it is Sluice's steering program."""
        return self.name == PROGRAM_NAME

    def map(self, name: str) -> BpfMap:
        """Open a map by its name; the caller closes it.

        Raises `UsageError` for a name that the program has no map of, `NotLoadedError` when it is gone.
        """
        if name not in self.maps:
            raise UsageError(
                f"no map {name!r} in program {self.id}; there are: {', '.join(sorted(self.maps))}"
            )
        return BpfMap(_open(lib.sluice_map_by_id, self.maps[name].id, f"map {name}"))


def attachments() -> list[Attachment]:
    """All XDP programs on interfaces of this network namespace."""
    from pyroute2 import IPRoute

    found: list[Attachment] = []
    with IPRoute() as route:
        for message in route.get_links():
            found += _attached(message)
    return found


def _attached(message: Any) -> Iterator[Attachment]:
    nest = message.get_attr("IFLA_XDP")
    for mode, attribute in _PROGRAM_BY_MODE:
        if nest is not None and (program := nest.get_attr(attribute)):
            name = str(message.get_attr("IFLA_IFNAME"))
            yield Attachment(name, int(message["index"]), mode, int(program))


def interfaces() -> list[str]:
    """The names of this network namespace's interfaces."""
    return sorted(name for _, name in _indices())


def _indices() -> list[tuple[int, str]]:
    import socket

    return socket.if_nameindex()


def loaded(interface: str | None = None) -> list[Loaded]:
    """Every XDP program of this network namespace, foreign ones too; of one interface if it is given."""
    if interface is not None and interface not in interfaces():
        raise UsageError(f"no interface {interface!r} here", hint=f"there are: {', '.join(interfaces())}")
    found = []
    for attachment in attachments():
        if interface in (None, attachment.interface):
            # A program that went away between the two questions is no longer loaded.
            one = inspect(attachment)
            if one is not None:
                found.append(one)
    return found


def find(interface: str | None = None) -> Loaded:
    """Sluice's program on ``interface``, or the only one there is.

    Raises `NotLoadedError` when there is none, `BusyError` when the interface carries somebody else's, and
    `UsageError` when there are several to choose from.
    """
    candidates = loaded(interface)
    ours = [one for one in candidates if one.ours]
    if len(ours) == 1:
        return ours[0]
    if len(ours) > 1:
        names = sorted({one.interface for one in ours})
        raise UsageError(f"Sluice runs on {', '.join(names)}", hint=f"choose one: --interface {names[0]}")
    if interface is None:
        raise NotLoadedError(
            "Sluice is not loaded on any interface of this network namespace",
            hint="load it: sluice up INTERFACE POLICY (in another namespace: ip netns exec NAME sluice ...)",
        )
    if candidates:
        other = candidates[0]
        raise BusyError(
            f"{interface} carries program {other.id} ({other.name or 'no name'}), which is not Sluice's",
            hint=f"look at it: bpftool prog show id {other.id}",
        )
    raise NotLoadedError(f"nothing is loaded on {interface}", hint=f"load it: sluice up {interface} POLICY")


def inspect(attachment: Attachment) -> Loaded | None:
    """All about an attached program; None when it is gone. Raises `PermissionsError`."""
    try:
        descriptor = _open(lib.sluice_prog_by_id, attachment.program_id, f"program {attachment.program_id}")
    except NotLoadedError:
        return None
    try:
        info = ffi.new("struct sluice_prog_info *")
        _check(lib.sluice_prog_info(descriptor, info), f"program {attachment.program_id}")
    finally:
        os.close(descriptor)
    if info.nr_map_ids > len(info.map_ids):
        raise SluiceError(f"program {info.id} has {info.nr_map_ids} maps, more than this tool reads")
    known = [_map_info(map_id) for map_id in info.map_ids[0 : info.nr_map_ids]]
    maps = {one.name or f"map_{one.id}": one for one in known if one is not None}
    return Loaded(
        interface=attachment.interface,
        ifindex=attachment.ifindex,
        mode=attachment.mode,
        id=info.id,
        name=_text(info.name),
        tag=bytes(info.tag).hex(),
        loaded_at=_since_epoch(info.load_time_ns),
        link_id=link_of(info.id, attachment.ifindex),
        maps=maps,
    )


def _map_info(map_id: int) -> MapInfo | None:
    """What the kernel says about a map; None when it is gone."""
    try:
        opened = BpfMap(_open(lib.sluice_map_by_id, map_id, f"map {map_id}"))
    except NotLoadedError:
        return None
    opened.close()
    return opened.info


def program_descriptor(one: Loaded) -> int:
    """A descriptor of the program, which the caller closes. Raises `NotLoadedError` when it is gone."""
    return _open(lib.sluice_prog_by_id, one.id, f"program {one.id}")


def btf_blob(btf_id: int) -> bytes:
    """The raw BTF of that id. Raises `NotLoadedError` when there is none."""
    descriptor = _open(lib.sluice_btf_by_id, btf_id, f"BTF {btf_id}")
    try:
        size = _check(lib.sluice_btf_raw(descriptor, ffi.NULL, 0, ffi.NULL), f"BTF {btf_id}")
        blob = bytearray(size)
        _check(
            lib.sluice_btf_raw(descriptor, ffi.from_buffer("char[]", blob), size, ffi.NULL), f"BTF {btf_id}"
        )
    finally:
        os.close(descriptor)
    return bytes(blob)


def link_of(program_id: int, ifindex: int) -> int | None:
    """The id of the link that keeps a program on an interface, if a link does."""
    following = ffi.new("uint32_t *")
    info = ffi.new("struct sluice_link_info *")
    link_id = 0
    while True:
        error = lib.sluice_link_next_id(link_id, following)
        if error == -errno.ENOENT:
            return None
        _check(error, "links")
        link_id = int(following[0])
        try:
            descriptor = _open(lib.sluice_link_by_id, link_id, f"link {link_id}")
        except NotLoadedError:
            continue
        try:
            _check(lib.sluice_link_info(descriptor, info), f"link {link_id}")
        finally:
            os.close(descriptor)
        # ifindex counts per namespace, but a program of ours is attached once; both must match.
        if (info.type, info.prog_id, info.ifindex) == (lib.BPF_LINK_TYPE_XDP, program_id, ifindex):
            return link_id


_FDINFO = re.compile(r"^(prog_id|link_id|map_id):\s*(\d+)$", re.MULTILINE)
#: Anonymous inodes of BPF objects; all other descriptors need not be looked at.
_INODES = {"anon_inode:bpf-prog", "anon_inode:bpf-map", "anon_inode:bpf_link", "anon_inode:bpf-link"}


def holders(one: Loaded) -> list[Holder]:
    """The processes (this one excepted) that hold the program, its link or its maps, link holders first.

    Processes that may not be looked at are left out: without root that is most of them.
    """
    map_ids = {info.id for info in one.maps.values()}
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdecimal() or int(folder.name) == os.getpid():
            continue
        program = link = False
        held: set[int] = set()
        for numbers in _bpf_descriptors(folder):
            if "link_id" in numbers:
                link |= numbers["link_id"] == one.link_id
            elif "map_id" in numbers:
                held |= {numbers["map_id"]} & map_ids
            else:
                program |= numbers.get("prog_id") == one.id
        if program or link or held:
            found.append(Holder(int(folder.name), _command(folder), program, link, len(held)))
    return sorted(found, key=lambda holder: (not holder.link, not holder.program, holder.pid))


def _bpf_descriptors(folder: Path) -> Iterator[dict[str, int]]:
    """Of each BPF descriptor of a process, the ids in its fdinfo."""
    try:
        descriptors = list((folder / "fd").iterdir())
    except OSError:  # not ours to see, or gone
        return
    for descriptor in descriptors:
        try:
            if str(descriptor.readlink()) in _INODES:
                text = (folder / "fdinfo" / descriptor.name).read_text(encoding="ascii", errors="replace")
                yield {key: int(value) for key, value in _FDINFO.findall(text)}
        except OSError:  # closed meanwhile
            continue


def _command(folder: Path) -> str:
    try:
        return (folder / "comm").read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return "?"


def pins(one: Loaded, root: Path = PIN_ROOT) -> list[Path]:
    """Files below ``root`` that pin the program or its link, so that it outlives its process."""
    found = []
    for folder, _, names in os.walk(root, followlinks=False):
        for name in sorted(names):
            path = Path(folder) / name
            if _pinned(path) in (("link", one.link_id), ("prog", one.id)):
                found.append(path)
    return found


def _pinned(path: Path) -> tuple[str, int]:
    """What a file in a bpffs pins: ("link" or "prog" or "map", id); ("", 0) for none of these."""
    descriptor = lib.sluice_obj_get(os.fsencode(path))
    if descriptor < 0:
        return "", 0
    try:
        text = Path(f"/proc/self/fdinfo/{descriptor}").read_text(encoding="ascii", errors="replace")
    finally:
        os.close(descriptor)
    numbers = {key: int(value) for key, value in _FDINFO.findall(text)}
    for key in ("link_id", "map_id", "prog_id"):  # a link names its program too
        if key in numbers:
            return key.removesuffix("_id"), numbers[key]
    return "", 0


def namespace_inode() -> int:
    """The inode of this thread's network namespace, by which state files are named."""
    return Path("/proc/thread-self/ns/net").stat().st_ino


def _open(call: Any, number: int, what: str) -> int:
    """A descriptor by id. Raises `NotLoadedError` when it is gone."""
    return _check(call(number), what)


def _check(result: int, what: str) -> int:
    if result >= 0:
        return result
    if -result in (errno.EPERM, errno.EACCES):
        raise PermissionsError(f"may not look at {what}: {os.strerror(-result)}", hint=ROOT_HINT)
    if -result == errno.ENOENT:
        raise NotLoadedError(f"{what} is gone", hint="it was unloaded meanwhile; look again: sluice status")
    if -result == errno.ENODEV:
        raise InterfaceGoneError(f"{what}: the interface is gone")
    raise SluiceError.from_errno(what, -result)


def _text(raw: Any) -> str:
    return ffi.string(raw).decode("utf-8", "backslashreplace")


def _since_epoch(boot_ns: int) -> float:
    """A time of the kernel's boot clock as seconds since the epoch."""
    return time.time() - (time.clock_gettime_ns(time.CLOCK_BOOTTIME) - boot_ns) / 1e9
