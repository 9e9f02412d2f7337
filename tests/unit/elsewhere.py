# SPDX-License-Identifier: Apache-2.0
"""A pytest plugin that hides what only Linux has, before anything of Sluice is imported.

    python -m pytest -p tests.unit.elsewhere tests/unit/test_mmsg_portable.py

Modules, functions and constants that macOS's Python lacks are gone, and tests of other backends than the
portable one are left out.  What cannot be had this way is the other kernel itself.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import os
import select
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
#: The C modules, and what stands in for them.
REPLACED = {
    "xdp._libbpf": ROOT / "xdp/_libbpf.py",
    "userspace.native._native": ROOT / "userspace/native/_native.py",
}
HIDDEN = ("bcc", "pyroute2")

#: Of socket, select and os, beginning so: not on macOS (Python's documentation, "Availability: Linux").
LINUX_ONLY: dict[ModuleType, tuple[str, ...]] = {
    socket: (
        "AF_NETLINK", "AF_PACKET", "AF_ALG", "AF_CAN", "AF_TIPC", "AF_VSOCK", "SOCK_CLOEXEC", "SOCK_NONBLOCK",
        "SO_BINDTODEVICE", "SO_MARK", "SO_DOMAIN", "SO_PROTOCOL", "SO_PASSCRED", "SO_PEERCRED", "SO_PRIORITY",
        "SO_INCOMING_CPU", "MSG_ERRQUEUE", "MSG_CMSG_CLOEXEC", "MSG_CONFIRM", "MSG_FASTOPEN", "MSG_MORE",
        "IP_TRANSPARENT", "IP_RECVTOS", "IPX_TYPE", "NETLINK_", "PACKET_", "ALG_", "CAN_", "TIPC_", "VMADDR_",
        "SOL_ALG", "SOL_CAN", "SOL_TIPC", "TCP_", "sethostname",
    ),
    # The constants stay for selectors, which was imported before: its selector over epoll has a descriptor,
    # as macOS's over kqueue has.
    select: ("epoll",),
    os: (
        "eventfd", "EFD_", "memfd_create", "MFD_", "sched_get", "sched_set", "sched_rr", "SCHED_",
        "pidfd_open", "splice", "SPLICE_", "copy_file_range", "getrandom", "GRND_", "getxattr", "setxattr",
        "listxattr", "posix_fallocate", "posix_fadvise", "fdatasync", "setresuid", "setresgid", "getresuid",
        "pipe2",
    ),
}  # fmt: skip


class Elsewhere(importlib.abc.MetaPathFinder):
    """Finds the replacements, and nothing where there would be nothing."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        del path, target
        if name in REPLACED:
            return importlib.util.spec_from_file_location(name, REPLACED[name])
        if name.partition(".")[0] in HIDDEN:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return None


def hide() -> None:
    """From here on this looks like another system."""
    early = [name for name in sys.modules if name.partition(".")[0] in {"xdp", "userspace", *HIDDEN}]
    if early:
        raise RuntimeError(f"imported before anything was hidden: {early}")
    for module, prefixes in LINUX_ONLY.items():
        for name in [name for name in vars(module) if name.startswith(prefixes)]:
            delattr(module, name)
    sys.platform = "darwin"
    sys.meta_path.insert(0, Elsewhere())


hide()


#: Tests of what Linux alone counts: datagrams lost in a socket's buffer.
LINUX_ALONE = ("test_a_full_socket_buffer_is_reported",)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Only the portable backend's."""
    items[:] = [
        item
        for item in items
        if "[mmsg" not in item.name and "-mmsg" not in item.name and not item.name.startswith(LINUX_ALONE)
    ]


@pytest.fixture(autouse=True)
def skip_without_feature() -> None:
    """In place of tests/conftest.py's, which asks the kernel."""
