# SPDX-License-Identifier: Apache-2.0
"""A host of the lab whose interface spoils packets, in both directions (bpf/spoil.bpf.c).

    with Spoiler(lab.client, drop=0.05, change=0.05) as spoiler:
        ...
    spoiler.counts()                   # what it did

The checksum of what was changed is right: the kernel would drop it otherwise.
"""

from __future__ import annotations

import errno
import os
import struct
from types import TracebackType
from typing import Final, NamedTuple, Self

from pyroute2 import IPRoute, NetlinkError

from sluice_cli.lab import Host
from xdp._libbpf import ffi, lib
from xdp.compile import compile_program
from xdp.errors import UnsupportedError, UsageError, VerifierError

#: Of each: what part of the packets (of 2**32), and counts.
_SPOIL: Final = struct.Struct("=IIQQQ")
_KEY: Final = bytes(4)
#: linux/pkt_sched.h: TC_H_MAKE(TC_H_CLSACT, TC_H_MIN_INGRESS), TC_H_MIN_EGRESS
_DIRECTIONS: Final = (0xFFFFFFF2, 0xFFFFFFF3)
_LOG_BYTES: Final = 1 << 20


class Spoilt(NamedTuple):
    """Datagrams that were seen, dropped, and changed."""

    seen: int
    dropped: int
    changed: int


class Spoiler:
    """See the module; ``drop`` and ``change`` are parts of the datagrams, 0 to 1.

    Raises UsageError for other parts, UnsupportedError where the kernel lacks clsact or BPF classifiers.
    """

    def __init__(self, host: Host, *, drop: float, change: float) -> None:
        for name, part in (("drop", drop), ("change", change)):
            if not 0 <= part <= 1:
                raise UsageError(f"{name} is a part of the packets from 0 to 1, not {part!r}")
        self._host = host
        self._counts = Spoilt(0, 0, 0)
        compiled = compile_program("spoil.bpf.c", "sluice_spoil")
        self._maps = compiled.make_maps()
        self._attached = False
        try:
            values = [min(int(part * 2**32), 2**32 - 1) for part in (drop, change)]
            self._maps["spoil"].update(_KEY, _SPOIL.pack(*values, 0, 0, 0))
            program = _load(compiled.on(self._maps))
            try:
                self._attach(program)
            finally:
                os.close(program)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _attach(self, program: int) -> None:
        with IPRoute(netns=self._host.namespace, flags=0) as route:
            try:
                route.tc("add", "clsact", index=self._host.ifindex)
                self._attached = True
                for direction in _DIRECTIONS:
                    route.tc(
                        "add-filter", "bpf", index=self._host.ifindex, fd=program, name="sluice_spoil",
                        parent=direction, classid=1, direct_action=True,
                    )  # fmt: skip
            except NetlinkError as error:
                raise UnsupportedError.from_errno(
                    f"a classifier on {self._host.interface}",
                    int(error.code),
                    hint="it needs clsact and cls_bpf",
                ) from None

    def counts(self) -> Spoilt:
        """What it did so far, or until it was closed."""
        if self._maps:
            self._counts = Spoilt(*_SPOIL.unpack(self._maps["spoil"].lookup(_KEY) or bytes(_SPOIL.size))[2:])
        return self._counts

    def close(self) -> None:
        """Take it off again; may be called twice."""
        if self._attached:
            self._attached = False
            with IPRoute(netns=self._host.namespace, flags=0) as route:
                route.tc("del", "clsact", index=self._host.ifindex)
        if self._maps:
            self.counts()
            for opened in self._maps.values():
                opened.close()
            self._maps = {}


def _load(instructions: bytes) -> int:
    log = ffi.new("char[]", _LOG_BYTES)
    code = ffi.from_buffer("char[]", instructions)
    descriptor = lib.sluice_prog_load(
        lib.BPF_PROG_TYPE_SCHED_CLS, b"sluice_spoil", b"Dual BSD/GPL", code, len(instructions) // 8,
        0, 0, log, _LOG_BYTES, 1,
    )  # fmt: skip
    if descriptor == -errno.EPERM:
        raise UnsupportedError("not permitted to load a classifier", hint="run as root")
    if descriptor < 0:
        raise VerifierError(
            f"the kernel refuses the classifier: {os.strerror(-descriptor)}",
            hint="--verbose shows the verifier's words",
            detail=ffi.string(log).decode(errors="replace"),
        )
    return descriptor
