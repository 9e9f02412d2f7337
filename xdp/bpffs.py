# SPDX-License-Identifier: Apache-2.0
"""The file system that pins are in."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from xdp.errors import PermissionsError, SluiceError, UnsupportedError

BPFFS = Path("/sys/fs/bpf")
_BPF_FS_MAGIC = 0xCAFE4A11  # linux/magic.h
# nosuid, nodev, noexec, as systemd mounts it (sys/mount.h)
_FLAGS = 2 | 4 | 8


def is_bpffs(path: Path) -> bool:
    """Whether a bpffs is mounted there."""
    # struct statfs begins with a long, the type.
    buffer = ctypes.create_string_buffer(256)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.statfs(os.fsencode(path), buffer) != 0:
        return False
    return ctypes.c_long.from_buffer(buffer).value & 0xFFFFFFFF == _BPF_FS_MAGIC


def mount_bpffs(path: Path = BPFFS) -> bool:
    """Mount a bpffs unless there is one; whether it was mounted now.

    Raises PermissionsError, UnsupportedError (no such file system, or no directory to mount it on).
    """
    if is_bpffs(path):
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"bpf", os.fsencode(path), b"bpf", _FLAGS, b"mode=0700") == 0:
        return True
    code = ctypes.get_errno()
    kinds: dict[int, type[SluiceError]] = {1: PermissionsError, 13: PermissionsError}
    raise kinds.get(code, UnsupportedError)(
        f"mounting a bpffs at {path}: {os.strerror(code)}", hint=f"mount -t bpf bpf {path}"
    )
