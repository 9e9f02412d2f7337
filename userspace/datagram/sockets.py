# SPDX-License-Identifier: Apache-2.0
"""Kernel UDP sockets on the ports of a policy, and who else holds such a port.

Used where datagrams come through the kernel: by the mmsg and portable backends
and by the companion sockets of AF_XDP.  Opening may need privileges (ports below
``net.ipv4.ip_unprivileged_port_start``); what is opened are plain descriptors
that can be handed to a process without any.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import socket
import struct
import sys
from collections.abc import Callable, Iterable, Sequence
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import NamedTuple

from xdp.abi import pack_address
from xdp.errors import BusyError, PermissionsError, SluiceError, UnsupportedError, UsageError
from xdp.policy import Policy

#: Bytes of socket buffer asked for: a burst of some 2,000 datagrams (the kernel counts about
#: 2 KiB for each, however small) while the application is busy for a few milliseconds.
RECEIVE_BUFFER = 4 << 20

_SMALLEST_BUFFER = 64 << 10  # bytes: one datagram of any length

# Not in Python 3.11's socket module; values are kernel ABI (asm-generic/socket.h).
_SO_ATTACH_FILTER = 26
_SO_MEMINFO = 55
_SO_COOKIE = 57
_MEMINFO_DROPS = 8  # index into its array of u32

# Classic BPF (linux/filter.h).  Accept what was sent to this host alone; of what came by
# multicast or broadcast, drop heartbeats: answered by every host on the network, one forged
# probe would be a reflector.  Offset 8 is the payload, behind the UDP header.  It is there also where
# nobody answers: with a filter the kernel verifies checksums when a datagram comes, while it is in the
# cache, and not when it is read (udp_queue_rcv_one_skb): of 1,232 bytes the reader is spared a fifth.
_PACKET_TYPE = 0xFFFFF004  # SKF_AD_OFF + SKF_AD_PKTTYPE; 0 is PACKET_HOST
_NO_SHARED_HEARTBEATS = (
    (0x28, 0, 0, _PACKET_TYPE),  # ldh
    (0x15, 3, 0, 0),  # jeq PACKET_HOST: accept
    (0x80, 0, 0, 0),  # ld length
    (0x35, 0, 1, 12),  # jge: long enough to hold the magic
    (0x05, 0, 0, 1),  # ja: look at it
    (0x06, 0, 0, 0xFFFFFFFF),  # accept
    (0x20, 0, 0, 8),  # ld payload[0:4]
    (0x15, 0, 1, 0x534C4842),  # jeq SLUICE_HEARTBEAT_MAGIC
    (0x06, 0, 0, 0),  # drop
    (0x06, 0, 0, 0xFFFFFFFF),  # accept
)

_MAPPED = bytes(10) + b"\xff\xff"
# struct sl_source: address, scope, port, family, reserved
_SOURCE = struct.Struct("=16sIHBx")

Address = IPv4Address | IPv6Address


class ServiceSocket(NamedTuple):
    """A bound UDP socket whose datagrams are classified as sent to ``port``."""

    port: int
    socket: socket.socket


class SocketLane(NamedTuple):
    """A lane of a kernel-socket backend: the policy's number and name, frames, part of each batch."""

    number: int
    name: str
    quota: int
    share: float


class Holder(NamedTuple):
    """Who has a port; ``pid`` is 0 where this user may not see it."""

    pid: int
    command: str

    def __str__(self) -> str:
        return f"process {self.pid} ({self.command})" if self.pid else self.command


def socket_ports(policy: Policy) -> tuple[int, ...]:
    """Ports of which something is for the application, ascending.

    A service whose lanes all end in the kernel belongs to a program that knows
    nothing of Sluice and has its own sockets; its ports are not among them.
    """
    ends_here = {lane.name for lane in policy.lanes if lane.end == "socket"}
    ports = {
        port
        for service in policy.services
        if any(rule.lane in ends_here for rule in service.rules)
        for port in service.ports
    }
    return tuple(sorted(ports))


def socket_lanes(policy: Policy, quota: int | None = None) -> tuple[SocketLane, ...]:
    """All lanes of a policy, highest first; ``quota`` for each instead of its own."""
    return tuple(
        SocketLane(number, lane.name, lane.quota if quota is None else quota, lane.share)
        for number, lane in enumerate(policy.lanes)
    )


def socket_of(sockets: Sequence[ServiceSocket], port: int | None) -> int:
    """Index of the one of a service port, or of the first.  Raises UsageError."""
    if port is None:
        return 0
    for index, service in enumerate(sockets):
        if service.port == port:
            return index
    raise UsageError(f"no socket on port {port}", hint=f"ports are {[p for p, _ in sockets]}")


def open_service_sockets(
    ports: Iterable[int],
    *,
    host: str | None = None,
    receive_buffer: int = RECEIVE_BUFFER,
    skip_busy: bool = False,
    prepare: Callable[[socket.socket], None] | None = None,
) -> list[ServiceSocket]:
    """One non-blocking socket per port, all of them or none.

    Without ``host`` a socket hears IPv6 and IPv4 on all addresses (IPv4 alone
    where there is no IPv6).  ``skip_busy`` leaves out ports that others hold.
    ``prepare`` is called with each socket before it is bound.

    Raises BusyError (another socket has the port; names its process),
    PermissionsError (a privileged port), UsageError (not an address of this
    machine), UnsupportedError (no memory or descriptors left).
    """
    opened: list[ServiceSocket] = []
    with contextlib.ExitStack() as stack:
        for port in ports:
            try:
                sock = _open(port, host, receive_buffer, prepare)
            except BusyError:
                if skip_busy:
                    continue
                raise
            stack.callback(sock.close)
            opened.append(ServiceSocket(port, sock))
        stack.pop_all()
    return opened


def adopt(descriptors: Iterable[tuple[int, int]]) -> list[ServiceSocket]:
    """Sockets from (port, descriptor) pairs that were handed over; the descriptors are now theirs."""
    return [ServiceSocket(port, socket.socket(fileno=descriptor)) for port, descriptor in descriptors]


def _open(
    port: int,
    host: str | None,
    receive_buffer: int,
    prepare: Callable[[socket.socket], None] | None,
) -> socket.socket:
    families = (socket.AF_INET6, socket.AF_INET) if host is None else (_family(host),)
    failure: OSError | None = None
    for family in families:
        try:
            return _bind(family, host, port, receive_buffer, prepare)
        except OSError as error:
            # No IPv6 here (module absent, or disabled by sysctl): IPv4 is all there is to hear.
            if error.errno not in {errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL}:
                raise _explained(error, port, host) from error
            failure = error
    assert failure is not None
    raise _explained(failure, port, host) from failure


def _family(host: str) -> socket.AddressFamily:
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_DGRAM, flags=socket.AI_NUMERICHOST)
    except (socket.gaierror, UnicodeError):
        raise UsageError(f"{host!r} is not an IP address", hint="give an IPv4 or IPv6 address") from None
    return found[0][0]


def _bind(
    family: int,
    host: str | None,
    port: int,
    receive_buffer: int,
    prepare: Callable[[socket.socket], None] | None,
) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_DGRAM)
    try:
        sock.setblocking(False)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1 if host else 0)
        _set_receive_buffer(sock, receive_buffer)
        if sys.platform == "linux":
            attach_filter(sock, _NO_SHARED_HEARTBEATS)
        if prepare is not None:
            prepare(sock)
        sock.bind((host or ("::" if family == socket.AF_INET6 else "0.0.0.0"), port))  # noqa: S104 - all addresses, as steered
    except BaseException:
        sock.close()
        raise
    return sock


def _set_receive_buffer(sock: socket.socket, size: int) -> None:
    force = 33  # SO_RCVBUFFORCE: beyond net.core.rmem_max, needs CAP_NET_ADMIN
    if sys.platform == "linux":
        with contextlib.suppress(PermissionError):
            sock.setsockopt(socket.SOL_SOCKET, force, size)
            return
    while True:
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)
        except OSError as error:
            # BSDs refuse what is above their limit (kern.ipc.maxsockbuf), Linux gives what it allows.
            if error.errno != errno.ENOBUFS or size <= _SMALLEST_BUFFER:
                raise
            size //= 2
        else:
            return


def attach_filter(sock: socket.socket, instructions: Sequence[tuple[int, int, int, int]]) -> None:
    """Put a classic BPF filter (code, jt, jf, k) in front of the socket, in place of one that is there."""
    code = b"".join(struct.pack("=HBBI", *instruction) for instruction in instructions)
    buffer = ctypes.create_string_buffer(code)
    # struct sock_fprog: u16 length, padding, pointer
    program = struct.pack("@HP", len(instructions), ctypes.addressof(buffer))
    sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)


def _explained(error: OSError, port: int, host: str | None) -> SluiceError:
    where = f"UDP port {port}" + (f" on {host}" if host else "")
    words = error.strerror or str(error)
    if error.errno == errno.EADDRINUSE:
        holders = port_holders(port)
        who = " and ".join(map(str, holders)) or "another socket"
        return BusyError(
            f"{where} is in use by {who}",
            hint="stop it, or go on without companion sockets: [companion] enabled = false in the policy",
            detail=words,
        )
    if error.errno in {errno.EACCES, errno.EPERM}:
        return PermissionsError(
            f"{where} may not be opened by user {os.geteuid()}",
            hint="run as root, let `sluice up` open it, or lower net.ipv4.ip_unprivileged_port_start",
            detail=words,
        )
    if error.errno == errno.EADDRNOTAVAIL:
        return UsageError(
            f"{where} can't be opened: no such address here", hint="see `ip address`", detail=words
        )
    return UnsupportedError(f"{where} can't be opened: {words}", hint="see `ulimit -n` and free memory")


def port_holders(port: int, *, proc: Path = Path("/proc")) -> list[Holder]:
    """Processes with a UDP socket bound to ``port`` in this network namespace.

    From /proc/net/udp, /proc/net/udp6 (proc(5)) and the descriptors of all
    processes that this user may look into.
    """
    owners: dict[str, str] = {}  # "socket:[inode]" -> user id
    for table in ("udp", "udp6"):
        try:
            lines = (proc / "thread-self/net" / table).read_text(encoding="ascii").splitlines()[1:]
        except OSError:
            continue  # no such family
        for fields in (line.split() for line in lines):
            if int(fields[1].rpartition(":")[2], 16) == port:
                owners[f"socket:[{fields[9]}]"] = fields[7]
    found = [Holder(0, f"user {owners[link]}") for link in owners] if owners else []
    seen = _processes_with(owners, proc)
    return seen or list(dict.fromkeys(found))


def _processes_with(links: Iterable[str], proc: Path) -> list[Holder]:
    wanted = set(links)
    holders: list[Holder] = []
    if not wanted:
        return holders
    for process in sorted(
        (path for path in proc.iterdir() if path.name.isdigit()), key=lambda p: int(p.name)
    ):
        # Processes end while we look, and others' descriptors are hidden from plain users.
        with contextlib.suppress(OSError):
            if any(_link(entry) in wanted for entry in (process / "fd").iterdir()):
                holders.append(Holder(int(process.name), _command(process)))
    return holders


def _link(entry: Path) -> str:
    try:
        return str(entry.readlink())
    except OSError:
        return ""


def _command(process: Path) -> str:
    """What it calls itself, on one line whatever that is; at most 80 characters."""
    try:
        raw = (process / "cmdline").read_bytes() or (process / "comm").read_bytes()
    except OSError:
        return "?"
    text = raw.replace(b"\0", b" ").decode("utf-8", "replace").strip()
    return "".join(character if character.isprintable() else "?" for character in text)[:80]


def socket_drops(sockets: Iterable[ServiceSocket]) -> int:
    """Datagrams that the kernel dropped at these: buffer full, bad checksum, filtered; each modulo 2^32.

    One whose descriptor was closed elsewhere has taken its count along.  0 where it is not Linux, which
    alone counts by socket.
    """
    drops = 0
    if sys.platform != "linux":
        return drops
    for _, sock in sockets:
        with contextlib.suppress(OSError):
            raw = sock.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, 64)
            words: Sequence[int] = struct.unpack(f"={len(raw) // 4}I", raw)
            drops += words[_MEMINFO_DROPS]
    return drops


def close_sockets(sockets: Iterable[ServiceSocket]) -> None:
    """Close all, also when the descriptor of one was closed elsewhere."""
    for _, sock in sockets:
        with contextlib.suppress(OSError):
            sock.close()


def socket_cookie(sock: socket.socket) -> bytes:
    """The kernel's own number of a socket; empty when its descriptor is closed, or no socket's any more.

    Elsewhere than on Linux the address that it is bound to, which another socket can't have at once.
    """
    try:
        if sys.platform != "linux":
            return repr(sock.getsockname()).encode()
        return sock.getsockopt(socket.SOL_SOCKET, _SO_COOKIE, 8)
    except OSError:
        return b""


class SocketAddress(NamedTuple):
    """Where to send: 16 bytes of address (IPv4 mapped), port, interface index of a link-local address."""

    address: bytes
    port: int
    scope: int
    family: int  # 4 or 6

    @classmethod
    def parse(cls, destination: tuple[Address | str, int]) -> SocketAddress:
        """From (address, port).  Raises UsageError, saying which of the two is wrong."""
        host, port = destination
        if isinstance(host, str):
            try:
                host = IPv6Address(host) if ":" in host else IPv4Address(host)
            except ValueError:
                raise UsageError(
                    f"{host!r} is not an IP address", hint="resolve names first; give an IPv4 or IPv6 address"
                ) from None
        if port not in range(1, 1 << 16):
            raise UsageError(f"destination port {port!r} is not within 1 to 65535")
        scope = 0
        if isinstance(host, IPv6Address) and host.scope_id:
            try:
                scope = (
                    int(host.scope_id) if host.scope_id.isdigit() else socket.if_nametoindex(host.scope_id)
                )
            except OSError:
                raise UsageError(f"{host}: there is no interface {host.scope_id}") from None
        return cls(pack_address(host), port, scope, host.version)

    @classmethod
    def unpack(cls, source: bytes) -> SocketAddress:
        """From ``struct sl_source``."""
        address, scope, port, family = _SOURCE.unpack(source)
        return cls(address, port, scope, family)

    def name(self, family: int) -> tuple[str, int] | tuple[str, int, int, int]:
        """For socket.sendto on a socket of that family; raises OSError(EAFNOSUPPORT) where it can't go."""
        if family == socket.AF_INET6:
            return (str(IPv6Address(self.address)), self.port, 0, self.scope)
        if self.family == 6:
            raise OSError(errno.EAFNOSUPPORT, os.strerror(errno.EAFNOSUPPORT))
        return (str(IPv4Address(self.address[12:])), self.port)


def pack_name(name: tuple[str, int] | tuple[str, int, int, int]) -> bytes:
    """``struct sl_source`` (native/batch.h) of what recvfrom gives as the sender."""
    host, port = name[0], name[1]
    scope = name[3] if len(name) == 4 else 0
    if ":" in host:
        raw = socket.inet_pton(socket.AF_INET6, host.partition("%")[0])
        family = 4 if raw.startswith(_MAPPED) else 6
    else:
        raw, family = _MAPPED + socket.inet_pton(socket.AF_INET, host), 4
    return _SOURCE.pack(raw, scope, port, family)
