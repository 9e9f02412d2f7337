# SPDX-License-Identifier: Apache-2.0
"""The programs of a lab's client: veth hands frames to an XDP program only if its peer has one."""

from __future__ import annotations

from typing import Final

from xdp._libbpf import ffi, lib
from xdp.errors import UnsupportedError

_XDP_DROP: Final = 1  # linux/bpf.h
_XDP_PASS: Final = 2


def load_pass(*, frags: bool) -> int:
    """Load the two instructions of ``return XDP_PASS``; the caller closes the descriptor."""
    return _load(b"lab_pass", _XDP_PASS, frags=frags)


def load_drop(*, frags: bool) -> int:
    """Load ``return XDP_DROP``: what arrives vanishes, and nobody is told."""
    return _load(b"lab_drop", _XDP_DROP, frags=frags)


def _load(name: bytes, verdict: int, *, frags: bool) -> int:
    # struct bpf_insn: r0 = verdict (BPF_ALU64 | BPF_MOV | BPF_K), then BPF_EXIT
    code = bytes.fromhex("b7000000") + verdict.to_bytes(4, "little") + bytes.fromhex("9500000000000000")
    instructions = ffi.from_buffer("char[]", code)
    descriptor = lib.sluice_prog_load(
        lib.BPF_PROG_TYPE_XDP,
        name,
        b"Dual BSD/GPL",
        instructions,
        2,
        lib.BPF_XDP,
        lib.BPF_F_XDP_HAS_FRAGS if frags else 0,
        ffi.NULL,
        0,
        0,
    )
    if descriptor < 0:
        raise UnsupportedError.from_errno("cannot load a program", -descriptor, hint="see: sluice doctor")
    return descriptor
