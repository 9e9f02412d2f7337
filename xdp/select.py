# SPDX-License-Identifier: Apache-2.0
"""The select program, loaded: lanes and workers for kernel sockets that share a port.

    with SelectProgram.load(groups=1, workers=2) as program:
        program.swap(compile_policy(policy))
        program.attach(first)        # before it is bound; whoever binds to its port then is in the group
        program.bind_port(8001, 0)
        program.register(sock, group=0, lane=0, worker=1)

A group is what the kernel makes of the sockets that are bound to one port with
SO_REUSEPORT.  bpf/select.bpf.c says what happens to a datagram.  Nothing is pinned: the
groups hold the program and its maps, so both go with the last socket and descriptor.
"""

from __future__ import annotations

import errno
import os
import secrets
import socket
import struct
from collections.abc import Iterable

from xdp._libbpf import lib
from xdp.bytecode import with_constants
from xdp.compile import compile_program
from xdp.counters import Counters, parse_counters
from xdp.errors import PermissionsError, SluiceError, UnsupportedError, UsageError
from xdp.maps import BpfMap
from xdp.policy_maps import PolicyMaps
from xdp.program import load_bytecode
from xdp.tables import Tables

PROGRAM_NAME = "sluice_select"

#: Of one program; the kernel's array of sockets then has 4.2 million places of 8 bytes.
MAX_GROUPS = 8192

# Not in Python 3.11's socket module; kernel ABI (asm-generic/socket.h).
_SO_ATTACH_REUSEPORT_EBPF = 52

#: Verdicts of what is in a socket of its lane; all others were dropped.
_ENTERED = frozenset(("steer", "steer_demoted", "pass_lane", "pass_demoted", "reply"))

# Stands for the map of sockets in the bytecode; no process has so many descriptors.
_PLACEHOLDER = 0x7FFFFFFE

_INDEX = struct.Struct("=I")
_SOCKET = struct.Struct("=Q")
_SELECTION = struct.Struct("=II")  # struct sluice_selection
_GROUP = struct.Struct("=HH")  # struct sluice_group


class SelectProgram:
    """A loaded select program with its maps.  Close it when no socket is added or asked about any more."""

    def __init__(self, fd: int, maps: dict[str, BpfMap], sockets: BpfMap, groups: int, workers: int) -> None:
        self.fd = fd
        self.maps = maps
        self.groups = groups
        self.workers = workers
        self.policy_maps = PolicyMaps(maps)
        self._sockets = sockets
        maps["selection"].update(_INDEX.pack(0), _SELECTION.pack(groups, workers))

    @classmethod
    def load(cls, *, groups: int, workers: int = 1) -> SelectProgram:
        """Compile and load for so many groups.  Until a policy is swapped in it drops everything.

        Raises PermissionsError (needs root, or CAP_BPF and CAP_PERFMON), UnsupportedError (bcc, headers
        or the kernel's support are missing), VerifierError, UsageError.
        """
        if not 0 < workers <= lib.SLUICE_MAX_WORKERS:
            raise UsageError(f"{workers} workers: 1 to {lib.SLUICE_MAX_WORKERS} are possible")
        if not 0 < groups <= MAX_GROUPS:
            raise UsageError(f"{groups} groups of sockets: 1 to {MAX_GROUPS} are possible")
        # Before anything is compiled: without privileges it ends here.
        sockets = _socket_map(groups * (lib.SLUICE_MAX_LANES * workers + 1))
        maps: dict[str, BpfMap] = {}
        try:
            compiled = compile_program(
                "select.bpf.c",
                "sluice_select",
                defines=(f"SLUICE_CPUS={lib.sluice_possible_cpus()}", f"SLUICE_SOCKETS={_PLACEHOLDER}"),
                placeholders=(_PLACEHOLDER,),
            )
            maps = compiled.make_maps()
            instructions = compiled.on(maps, placeholders={_PLACEHOLDER: sockets})
            instructions = with_constants(instructions, {lib.SLUICE_MARK_SALT: secrets.randbits(64)})
            fd = load_bytecode(PROGRAM_NAME, instructions, program_type=lib.BPF_PROG_TYPE_SK_REUSEPORT)
            return cls(fd, maps, sockets, groups, workers)
        except BaseException:
            for opened in (*maps.values(), sockets):
                opened.close()
            raise

    def attach(self, sock: socket.socket) -> None:
        """Make the program choose in the group that ``sock``, not bound yet, founds.

        It must be the first of its group: its bind fails with EADDRINUSE when any other
        socket has the port, also one with SO_REUSEPORT.  Those that bind later join.
        """
        share_port(sock)
        try:
            sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_REUSEPORT_EBPF, self.fd)
        except OSError as error:
            raise SluiceError.from_errno("attaching the select program", error.errno or 0) from error

    def bind_port(self, port: int, group: int, *, versions: Iterable[int] = (4, 6)) -> None:
        """Say that datagrams to ``port`` find that group: those over IPv4, IPv6 or both."""
        key = _INDEX.pack(port)
        ipv4, ipv6 = _GROUP.unpack(self.maps["groups"].lookup(key) or bytes(_GROUP.size))
        ipv4, ipv6 = (group + 1 if 4 in versions else ipv4), (group + 1 if 6 in versions else ipv6)
        self.maps["groups"].update(key, _GROUP.pack(ipv4, ipv6))

    def register(self, sock: socket.socket, *, group: int, lane: int, worker: int = 0) -> None:
        """A bound socket of the group for that lane; the kernel forgets it when it is closed."""
        place = (group * lib.SLUICE_MAX_LANES + lane) * self.workers + worker
        self._sockets.update(_INDEX.pack(place), _SOCKET.pack(sock.fileno()))

    def register_drain(self, sock: socket.socket, *, group: int) -> None:
        """The bound socket that gets what is dropped; it must refuse everything by a filter."""
        place = self.groups * lib.SLUICE_MAX_LANES * self.workers + group
        self._sockets.update(_INDEX.pack(place), _SOCKET.pack(sock.fileno()))

    def swap(self, tables: Tables) -> int:
        """Put a policy in force while traffic flows; as SteerProgram.swap."""
        return self.policy_maps.swap(tables)

    def counters(self) -> Counters:
        """All CPUs' counters, in datagrams and bytes of payload; see bpf/select.bpf.c for the verdicts."""
        return parse_counters(b"".join(value for _, value in sorted(self.maps["counters"].items())))

    def refused(self) -> dict[str, int]:
        """Datagrams that were dropped, by reason: all that entered no socket."""
        counters = self.counters()
        return {
            reason: count.packets for reason, count in counters.verdicts.items() if reason not in _ENTERED
        }

    def close(self) -> None:
        """Give up this process's descriptors; sockets go on choosing.  Idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        for opened in (*self.maps.values(), self._sockets):
            opened.close()

    def __enter__(self) -> SelectProgram:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def share_port(sock: socket.socket) -> None:
    """Let the socket join others on its port, before it is bound."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)


def _socket_map(places: int) -> BpfMap:
    fd = lib.sluice_map_create(
        lib.BPF_MAP_TYPE_REUSEPORT_SOCKARRAY, b"sockets", _INDEX.size, _SOCKET.size, places, 0, -1
    )
    if fd < 0:
        words = os.strerror(-fd)
        if fd in (-errno.EPERM, -errno.EACCES):
            raise PermissionsError(
                "choosing sockets by lane needs a BPF program, which this process may not load",
                hint="run as root, or with CAP_BPF and CAP_PERFMON",
                detail=words,
            )
        raise UnsupportedError(
            f"this kernel can't choose sockets by a program: {words}", hint="see `sluice doctor`"
        )
    return BpfMap(fd)
