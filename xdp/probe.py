# SPDX-License-Identifier: Apache-2.0
"""What this machine can do for Sluice, found out by trying or by asking the kernel.

Each question is a :class:`Finding`: "ok", "warn" (works, but less well or not everything) or "missing", with
what to do about it.  Nothing is changed: the one thing that is attached is attached to the loopback of a
network namespace that is made for it and gone a moment later.  What an interface can do is
:mod:`xdp.probe_interface`'s.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
import re
import resource
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from xdp import jumbo
from xdp._libbpf import ffi, lib
from xdp.errors import PermissionsError, SluiceError

State = Literal["ok", "warn", "missing"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One row of the report. ``essential``: without it Sluice can't be loaded at all."""

    topic: str
    state: State
    detail: str
    advice: str = ""
    essential: bool = False


INSTALL = "apt-get install python3-bpfcc libbpf-dev libxdp-dev (tools/sluice does it)"

# linux/capability.h
_CAPABILITIES = {"CAP_NET_ADMIN": 12, "CAP_NET_RAW": 13, "CAP_PERFMON": 38, "CAP_BPF": 39}
_CAP_IPC_LOCK = 14
_CAP_SYS_ADMIN = 21

_CLONE_NEWNET = 0x40000000  # linux/sched.h
_LOOPBACK = 1  # the loopback's index in a new network namespace
# r0 = XDP_PASS; exit
_PASS_EVERYTHING = bytes.fromhex("b7000000020000009500000000000000")
_AF_XDP = 44  # linux/socket.h; this Python has no name for it

# linux/bpf.h, enum bpf_func_id
_HELPERS = {"bpf_redirect_map": 51, "bpf_xdp_adjust_meta": 54, "bpf_ktime_get_ns": 5}


def probe_host() -> list[Finding]:
    """Everything about the machine, in the order in which it should be mended."""
    found: list[Finding] = []
    for question in _QUESTIONS:
        found += question()
    return found


def _kernel() -> Iterator[Finding]:
    release = platform.release()
    numbers = tuple(int(one) for one in re.findall(r"\d+", release)[:2])
    if numbers < (5, 15):
        yield Finding("kernel", "missing", release, "Linux 5.15 or later is needed", essential=True)
    elif numbers < (5, 18):
        advice = (
            "5.18 or later: `sluice demo` and `bench` need its live frames, large MTUs its multi-buffer XDP"
        )
        yield Finding("kernel", "warn", release, advice)
    else:
        yield Finding("kernel", "ok", release)
    if Path("/sys/kernel/btf/vmlinux").exists():
        yield Finding("kernel BTF", "ok", "/sys/kernel/btf/vmlinux")
    else:
        yield Finding(
            "kernel BTF", "warn", "the kernel has none", "a kernel with CONFIG_DEBUG_INFO_BTF; not essential"
        )
    jit = _read("/proc/sys/net/core/bpf_jit_enable")
    if jit == "0":
        yield Finding(
            "BPF compiler", "warn", "programs are interpreted", "sysctl -w net.core.bpf_jit_enable=1"
        )
    elif jit:
        yield Finding("BPF compiler", "ok", "programs are compiled (JIT)")


def _privileges() -> Iterator[Finding]:
    effective = _effective_capabilities()
    has_admin = bool(effective >> _CAP_SYS_ADMIN & 1)
    lacking = [
        name
        for name, bit in _CAPABILITIES.items()
        if not effective >> bit & 1 and not (has_admin and name in ("CAP_BPF", "CAP_PERFMON"))
    ]
    if lacking:
        advice = "run as root, or give these capabilities; an application served by `sluice up` needs none"
        yield Finding("privileges", "missing", f"without {', '.join(lacking)}", advice, essential=True)
    elif not has_admin:
        advice = (
            "with CAP_SYS_ADMIN `status`, `map` and `down` work too: the kernel asks for it to look up ids"
        )
        yield Finding("privileges", "warn", "without CAP_SYS_ADMIN", advice)
    else:
        yield Finding("privileges", "ok", "root" if os.geteuid() == 0 else "all capabilities needed")
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY or effective >> _CAP_IPC_LOCK & 1:
        yield Finding("locked memory", "ok", "unlimited")
    else:
        advice = (
            "packet memory is locked: ulimit -l unlimited, or LimitMEMLOCK=infinity in the service's unit"
        )
        yield Finding("locked memory", "warn", f"{soft >> 10} KiB", advice)


def _programs() -> Iterator[Finding]:
    if not _may_load():
        # Without privileges libbpf's probes answer "not supported", which would be untrue.
        detail = "can't be asked without root"
        topics = (
            "XDP programs",
            "map types",
            "XDP helpers",
            "sk_reuseport",
            "bpf_link for XDP",
            "AF_XDP sockets",
            "AF_XDP jumbo frames",
        )
        for topic in topics:
            yield Finding(topic, "warn", detail, "run `sluice doctor` as root")
        return
    yield _supported(
        "XDP programs",
        lib.sluice_probe_prog_type(lib.BPF_PROG_TYPE_XDP),
        "CONFIG_BPF_SYSCALL",
        essential=True,
    )
    types = {
        "array": lib.BPF_MAP_TYPE_ARRAY,
        "hash": lib.BPF_MAP_TYPE_HASH,
        "LRU hash": lib.BPF_MAP_TYPE_LRU_HASH,
        "LPM trie": lib.BPF_MAP_TYPE_LPM_TRIE,
        "XSKMAP": lib.BPF_MAP_TYPE_XSKMAP,
    }
    results = {name: lib.sluice_probe_map_type(number) for name, number in types.items()}
    yield _all_supported("map types", results, "CONFIG_BPF_SYSCALL and CONFIG_XDP_SOCKETS", essential=True)
    helpers = {
        name: lib.sluice_probe_helper(lib.BPF_PROG_TYPE_XDP, number) for name, number in _HELPERS.items()
    }
    yield _all_supported("XDP helpers", helpers, "a newer kernel", essential=True)
    select = {
        "program": lib.sluice_probe_prog_type(lib.BPF_PROG_TYPE_SK_REUSEPORT),
        "map": lib.sluice_probe_map_type(lib.BPF_MAP_TYPE_REUSEPORT_SOCKARRAY),
    }
    yield _all_supported("sk_reuseport", select, "only the mmsg mode needs it", essential=False)
    yield _link()
    yield _sockets()
    yield _jumbo_frames()


def _supported(topic: str, result: int, config: str, *, essential: bool) -> Finding:
    return _all_supported(topic, {topic: result}, config, essential=essential)


def _all_supported(topic: str, results: dict[str, int], config: str, *, essential: bool) -> Finding:
    """From the answers of libbpf's probes: 1, 0 or a negative errno."""
    if lacking := [name for name, result in results.items() if result == 0]:
        state: State = "missing" if essential else "warn"
        return Finding(topic, state, f"this kernel lacks {', '.join(lacking)}", config, essential)
    if refused := [result for result in results.values() if result < 0]:
        return Finding(
            topic, "warn", f"can't be asked: {os.strerror(-refused[0])}", "run `sluice doctor` as root"
        )
    return Finding(topic, "ok", "all there" if len(results) > 1 else "supported")


def _link() -> Finding:
    """Attach a program by a link, on the loopback of a namespace of our own."""
    result = _in_new_namespace(_attach_to_loopback)
    if result >= 0:
        return Finding("bpf_link for XDP", "ok", "attached and detached in a scratch namespace")
    if -result in (errno.EPERM, errno.EACCES):
        return Finding(
            "bpf_link for XDP", "warn", "can't be tried without root", "run `sluice doctor` as root"
        )
    return Finding(
        "bpf_link for XDP", "missing", os.strerror(-result), "Linux 5.9 or later is needed", essential=True
    )


def _attach_to_loopback() -> int:
    count = len(_PASS_EVERYTHING) // 8
    code = ffi.from_buffer("char[]", _PASS_EVERYTHING)
    program = lib.sluice_prog_load(
        lib.BPF_PROG_TYPE_XDP, b"sluice_probe", b"GPL", code, count, lib.BPF_XDP, 0, ffi.NULL, 0, 0
    )
    if program < 0:
        return program
    try:
        link = lib.sluice_link_create(program, _LOOPBACK, lib.BPF_XDP, lib.XDP_FLAGS_SKB_MODE)
        if link >= 0:
            os.close(link)
        return link
    finally:
        os.close(program)


def _in_new_namespace(work: Callable[[], int]) -> int:
    """Run ``work`` in a thread with a network namespace of its own; -errno on failure."""
    results: list[int] = []

    def run() -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        results.append(work() if libc.unshare(_CLONE_NEWNET) == 0 else -ctypes.get_errno())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return results[0] if results else -errno.EIO


def _sockets() -> Finding:
    try:
        with contextlib.closing(socket.socket(_AF_XDP, socket.SOCK_RAW)):
            return Finding("AF_XDP sockets", "ok", "supported")
    except PermissionError:
        return Finding(
            "AF_XDP sockets", "warn", "can't be tried without CAP_NET_RAW", "run `sluice doctor` as root"
        )
    except OSError as error:
        advice = (
            "a kernel with CONFIG_XDP_SOCKETS; without it lanes end in the kernel, or run in the mmsg mode"
        )
        return Finding("AF_XDP sockets", "missing", str(error.strerror), advice)


def _jumbo_frames() -> Finding:
    refusal = jumbo.kernel_refusal()
    if not refusal:
        return Finding("AF_XDP jumbo frames", "ok", "packets may come in several frames")
    advice = "only for an MTU above the frame size: what does not fit a frame can't be steered"
    return Finding("AF_XDP jumbo frames", "warn", refusal, advice)


def _libraries() -> Iterator[Finding]:
    yield Finding("libbpf", "ok", ffi.string(lib.sluice_libbpf_version()).decode())
    yield _libxdp()
    try:
        import bcc

        version = getattr(bcc, "__version__", "unknown version")
        # The package named bcc on PyPI is something else.
        if hasattr(bcc, "BPF"):
            yield Finding("bcc", "ok", str(version))
        else:
            yield Finding(
                "bcc", "missing", "a package of that name that is not bcc", f"remove it; {INSTALL}", True
            )
    except ImportError as error:
        yield Finding("bcc", "missing", str(error), INSTALL, essential=True)
    yield _headers()


def _libxdp() -> Finding:
    try:
        ctypes.CDLL("libxdp.so.1")
    except OSError:
        return Finding(
            "libxdp", "missing", "libxdp.so.1 is not installed", f"{INSTALL}; AF_XDP lanes need it"
        )
    # The library can't be asked for its version; the name of its file says it.
    maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    named = re.search(r"libxdp\.so\.[\d.]+", maps)
    return Finding("libxdp", "ok", named.group() if named else "installed")


def _headers() -> Finding:
    from xdp.headers import kernel_source

    try:
        return Finding("kernel headers", "ok", str(kernel_source()))
    except SluiceError as error:
        if isinstance(error, PermissionsError):
            return Finding("kernel headers", "warn", str(error), error.hint)
        return Finding("kernel headers", "missing", str(error), error.hint, essential=True)


def _memory() -> Iterator[Finding]:
    text = _read("/proc/meminfo")
    numbers = {name: int(number) for name, number in re.findall(r"^(\w+):\s+(\d+)", text, re.MULTILINE)}
    free, size = numbers.get("HugePages_Free", 0), numbers.get("Hugepagesize", 0)
    if free:
        yield Finding("huge pages", "ok", f"{free} free of {size} KiB")
    else:
        advice = "sysctl -w vm.nr_hugepages=64 before `sluice up`; packet memory then costs fewer TLB misses"
        yield Finding("huge pages", "warn", "none free: packet memory uses small pages", advice)
    mounts = _read("/proc/self/mountinfo")
    if re.search(r" /sys/fs/bpf .* - bpf ", mounts):
        yield Finding("bpffs", "ok", "/sys/fs/bpf")
    else:
        yield Finding(
            "bpffs",
            "warn",
            "not mounted at /sys/fs/bpf",
            "mount -t bpf bpf /sys/fs/bpf; only --persist needs it",
        )


def _filters() -> Iterator[Finding]:
    if Path("/proc/sys/net/netfilter/nf_conntrack_count").exists():
        advice = (
            "what is steered meets neither nftables nor conntrack nor tcpdump: put such rules into the policy"
        )
        yield Finding("packet filter", "warn", "netfilter's connection tracking is there", advice)
    else:
        yield Finding("packet filter", "ok", "no connection tracking that steered packets would go past")


_QUESTIONS: tuple[Callable[[], Iterator[Finding]], ...] = (
    _kernel,
    _privileges,
    _programs,
    _libraries,
    _memory,
    _filters,
)


def _may_load() -> bool:
    """Whether this process may load XDP programs and open AF_XDP sockets."""
    effective = _effective_capabilities()
    names = ["CAP_NET_ADMIN", "CAP_NET_RAW"]
    names += [] if effective >> _CAP_SYS_ADMIN & 1 else ["CAP_BPF", "CAP_PERFMON"]
    return all(effective >> _CAPABILITIES[name] & 1 for name in names)


def _effective_capabilities() -> int:
    found = re.search(r"^CapEff:\s*([0-9a-f]+)$", _read("/proc/self/status"), re.MULTILINE)
    return int(found.group(1), 16) if found else 0


def _read(path: str) -> str:
    """A file's text; "" when this kernel has no such file, or not for us."""
    try:
        return Path(path).read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""
