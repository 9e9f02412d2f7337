# SPDX-License-Identifier: Apache-2.0
"""The steer program, loaded: its maps, its policy, its counters.

There is one way to load: bcc compiles, libbpf makes the maps and loads the
bytecode with the attach type that links ask for.  A newer version of the program
is loaded onto the maps of the running one (:meth:`SteerProgram.successor`), so
that a link can switch over while traffic flows, with peers, counters and sockets
in place.
"""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from xdp._libbpf import ffi, lib
from xdp.bytecode import with_constants
from xdp.compile import compile_program
from xdp.counters import Counters, parse_counters
from xdp.errors import PermissionsError, SluiceError, UnsupportedError, VerifierError
from xdp.maps import BpfMap
from xdp.policy_maps import PolicyMaps
from xdp.tables import Tables

#: The name that a loaded program shows; how ours are told from others.
PROGRAM_NAME = "sluice_steer"

LICENSE = b"Dual BSD/GPL"

#: The verifier's log at level 1 for this program is below 8 MiB; it grows with failures.
LOG_BYTES = 32 << 20

_INSTRUCTION_SIZE = 8  # struct bpf_insn
_ATTACH_TYPES = {
    lib.BPF_PROG_TYPE_XDP: lib.BPF_XDP,
    lib.BPF_PROG_TYPE_SK_REUSEPORT: lib.BPF_SK_REUSEPORT_SELECT,
}


@dataclass(frozen=True)
class TestRun:
    """Result of BPF_PROG_TEST_RUN: the action, the frame as it left, nanoseconds per run."""

    retval: int
    data: bytes
    duration_ns: int


def load_bytecode(
    name: str, instructions: bytes, *, program_type: int = lib.BPF_PROG_TYPE_XDP, flags: int = 0
) -> int:
    """Load through libbpf; returns the descriptor.  Raises VerifierError with the verifier's log."""
    data = ffi.from_buffer("char[]", instructions)
    count = len(instructions) // _INSTRUCTION_SIZE
    attach_type = _ATTACH_TYPES.get(program_type, 0)

    def load(log: Any, size: int, level: int) -> int:
        return lib.sluice_prog_load(
            program_type, name.encode(), LICENSE, data, count, attach_type, flags, log, size, level
        )

    fd = load(ffi.NULL, 0, 0)
    if fd >= 0:
        return fd
    if fd in (-errno.EPERM, -errno.ENOMEM):
        raise PermissionsError.from_errno(
            f"loading {name}",
            -fd,
            hint="run as root (CAP_BPF, CAP_NET_ADMIN); `sluice doctor` says what is missing",
        )
    log = ffi.new("char[]", LOG_BYTES)
    again = load(log, LOG_BYTES, 1)
    if again >= 0:
        return again
    text = ffi.string(log).decode(errors="replace")
    lines = [line for line in text.splitlines() if line and not line.startswith("processed")]
    raise VerifierError(
        f"the kernel refused {name}: {lines[-1] if lines else os.strerror(-again)}",
        hint="--verbose shows the verifier's log; `sluice doctor` says what this kernel lacks",
        detail=text,
    )


class SteerProgram:
    """A loaded steer program.  Close it when it is no longer needed; a link keeps its own hold."""

    def __init__(
        self, fd: int, maps: dict[str, BpfMap], cookie: int, salt: int, *, frags: bool = False
    ) -> None:
        self.fd = fd
        self.maps = maps
        self.cookie = cookie
        #: Takes packets in several buffers (BPF_F_XDP_HAS_FRAGS): jumbo frames.
        self.frags = frags
        self._salt = salt
        info = ffi.new("struct sluice_prog_info *")
        result = lib.sluice_prog_info(fd, info)
        if result < 0:
            raise SluiceError.from_errno("reading a program's description", -result)
        self.id: int = info.id
        self.policy_maps = PolicyMaps(maps)

    @classmethod
    def load(cls, *, defines: Sequence[str] = (), frags: bool = False) -> SteerProgram:
        """Compile and load with maps of its own.  Until a policy is swapped in it passes everything.

        With ``frags`` it takes packets in several buffers, as drivers with an MTU above a page make
        them; where it is attached, and what follows it there, stays of that sort.
        """
        # 31 bits: zero marks frames that never carried metadata
        return cls._load(secrets.randbits(31) | 1, secrets.randbits(64), None, defines, frags=frags)

    def successor(self, *, defines: Sequence[str] = ()) -> SteerProgram:
        """The program compiled anew, on this one's maps; ``link.update`` then switches over."""
        return self._load(self.cookie, self._salt, self.maps, defines, frags=self.frags)

    @classmethod
    def _load(
        cls,
        cookie: int,
        salt: int,
        existing: dict[str, BpfMap] | None,
        defines: Sequence[str],
        *,
        frags: bool,
    ) -> SteerProgram:
        compiled = compile_program(
            "steer.bpf.c",
            "sluice_steer",
            defines=(
                f"SLUICE_CPUS={lib.sluice_possible_cpus()}",
                *(["SLUICE_FRAGS=1"] if frags else []),
                *defines,
            ),
        )
        if existing is not None and not compiled.fits(existing):
            raise SluiceError(
                "the running program's maps have another layout than this version's",
                hint="stop and start it (`sluice down`, `sluice up`): its counters begin anew",
            )
        maps = compiled.make_maps() if existing is None else _held(existing)
        try:
            instructions = with_constants(
                compiled.on(maps), {lib.SLUICE_MARK_COOKIE: cookie, lib.SLUICE_MARK_SALT: salt}
            )
            fd = load_bytecode(PROGRAM_NAME, instructions, flags=lib.BPF_F_XDP_HAS_FRAGS if frags else 0)
        except BaseException:
            for opened in maps.values():
                opened.close()
            raise
        return cls(fd, maps, cookie, salt, frags=frags)

    def swap(self, tables: Tables) -> int:
        """Put a policy in force while traffic flows; returns its generation.

        One write makes the change: every packet is treated wholly by the old
        policy or wholly by the new one.
        """
        return self.policy_maps.swap(tables)

    def test_run(self, frame: bytes, *, repeat: int = 1, ifindex: int = 0, queue: int = 0) -> TestRun:
        """Run on one frame without any interface (BPF_PROG_TEST_RUN).

        With ``ifindex`` the packet claims to have arrived there, on ``queue``
        (the interface must have an XDP-capable receive queue of that number).
        """
        run = ffi.new("struct sluice_test_run *")
        data_in = ffi.from_buffer("char[]", frame)
        # Larger than the frame: an XDP program may grow it.
        out = ffi.new("char[]", len(frame) + 512)
        run.data_in, run.data_size_in = data_in, len(frame)
        run.data_out, run.data_size_out = out, len(frame) + 512
        run.repeat = repeat
        if ifindex:
            # struct xdp_md: data, data_end, data_meta, ingress_ifindex, rx_queue_index, egress_ifindex
            context = ffi.new("uint32_t[6]", [0, len(frame), 0, ifindex, queue, 0])
            run.ctx_in, run.ctx_size_in = context, ffi.sizeof(context)
        result = lib.sluice_prog_test_run(self.fd, run)
        if result < 0:
            raise SluiceError.from_errno(f"test run on {len(frame)} bytes", -result)
        return TestRun(run.retval, bytes(ffi.buffer(out, run.data_size_out)), run.duration_ns)

    def counters(self) -> Counters:
        """All CPUs' counters; see :class:`xdp.counters.Counters`."""
        return parse_counters(b"".join(value for _, value in sorted(self.maps["counters"].items())))

    def close_counters_to_writes(self) -> None:
        """Applications get the counters' descriptor: they may map it, but nobody may write to it."""
        result = lib.sluice_map_freeze(self.maps["counters"].fd)
        if result < 0:
            raise UnsupportedError.from_errno("freezing the counters", -result, hint="it needs Linux 5.2")

    def close(self) -> None:
        """Give up this process's descriptors; idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        for opened in self.maps.values():
            opened.close()

    def __enter__(self) -> SteerProgram:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _held(maps: dict[str, BpfMap]) -> dict[str, BpfMap]:
    return {name: BpfMap(os.dup(one.fd)) for name, one in maps.items()}
