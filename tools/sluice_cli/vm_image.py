# SPDX-License-Identifier: Apache-2.0
"""What the emulated machine starts with: an initramfs of a shell, some modules and one script.

The rest of its file system is this machine's own, over 9p and read-only, with a file system in memory on
top of it for what is written.  So the very files of the checkout run in it, with the Python, bcc and
libraries that are here, and nothing that they do is left behind.
"""

from __future__ import annotations

import lzma
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sluice_cli.vm_packages import System
from xdp.errors import UnsupportedError

#: By whom the root is mounted, and the drivers of the cards; whatever these need is loaded before them.
MODULES: Final = ("9p", "9pnet_virtio", "overlay", "virtio_net", "igb")
MOUNT_TAG: Final = "host"  # of the 9p share
TIME_IS_OVER: Final = "the machine's time is over"  # the last that it says then
REPORT_DEVICE: Final = "/dev/ttyS1"
_DIRECTORIES: Final = ("bin", "modules", "proc", "sys", "dev", "host", "rw", "root")
_REGULAR, _DIRECTORY = 0o100000, 0o040000

# busybox as every command: its shell would prefer its own ip to another one, but runs none.  The second shell
# is the limit inside: a machine that hangs is off in time also when nobody outside looks after it.
_INIT: Final = """#!/bin/busybox sh
b=/bin/busybox
$b mount -t proc proc /proc
$b mount -t sysfs sys /sys
$b mount -t devtmpfs dev /dev
($b sleep {limit}; $b echo "{over}"; $b poweroff -f) &
for module in /modules/*; do $b insmod $module || $b echo "cannot load $module"; done
$b mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000,ro,cache=loose {tag} /host
$b mount -t tmpfs -o mode=755 tmpfs /rw
$b mkdir /rw/upper /rw/work
$b mount -t overlay -o lowerdir=/host,upperdir=/rw/upper,workdir=/rw/work overlay /root
for folder in proc sys dev; do $b mount --bind /$folder /root/$folder; done
$b mount -t tmpfs -o mode=755 tmpfs /root/run
$b mount -t bpf bpf /root/sys/fs/bpf
$b mkdir -p /root/dev/shm /root/dev/pts /root/run/netns
$b mount -t tmpfs -o mode=1777 tmpfs /root/dev/shm
$b mount -t devpts devpts /root/dev/pts
$b chroot /root {command}
$b poweroff -f
"""


@dataclass(frozen=True)
class Job:
    """What runs in the machine: a command line, its environment, and the seconds that the machine gets."""

    command: Sequence[str]
    environment: Mapping[str, str]
    limit: int

    @property
    def init(self) -> str:
        """The script that is the first process."""
        words = ["/usr/bin/env", "-i", *(f"{k}={v}" for k, v in self.environment.items()), *self.command]
        return _INIT.format(limit=self.limit, over=TIME_IS_OVER, tag=MOUNT_TAG, command=shlex.join(words))


def initramfs(system: System, job: Job) -> bytes:
    """The archive, not compressed (it is read once, from memory).

    Raises:
        UnsupportedError: the kernel lacks one of the modules.
    """
    entries: list[tuple[str, int, bytes]] = [(name, _DIRECTORY | 0o755, b"") for name in _DIRECTORIES]
    entries.append(("bin/busybox", _REGULAR | 0o755, system.busybox.read_bytes()))
    for number, (name, content) in enumerate(load_order(system.modules, MODULES)):
        entries.append((f"modules/{number:02}-{name}.ko", _REGULAR | 0o644, content))
    entries.append(("init", _REGULAR | 0o755, job.init.encode()))
    return archive(entries)


def archive(entries: Iterable[tuple[str, int, bytes]]) -> bytes:
    """A cpio archive of (name, mode, content) in the format "newc".

    Source: Documentation/driver-api/early-userspace/buffer-format.rst.
    """
    made = bytearray()
    for inode, (name, mode, content) in enumerate([*entries, ("TRAILER!!!", 0, b"")], 1):
        path = name.encode() + b"\0"
        # inode, mode, uid, gid, links, mtime, size, device, device it is, length of the name, no checksum
        fields = (inode, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(path), 0)
        made += b"070701" + b"".join(b"%08X" % value for value in fields)
        for part in (path, content):
            made += part
            made += bytes(-len(made) % 4)
    return bytes(made)


def load_order(folder: Path, names: Iterable[str]) -> list[tuple[str, bytes]]:
    """(name, content) of the modules and of all that they depend on, each behind what it needs.

    A name that is no module is taken to be built into the kernel when ``modules.builtin`` says so.

    Raises:
        UnsupportedError: the kernel has no such module.
    """
    paths = {_plain(path.name): path for path in folder.rglob("*.ko*")}
    builtin = {_plain(Path(line).name) for line in _lines(folder / "modules.builtin")}
    contents: dict[str, bytes] = {}
    order: list[str] = []

    def add(name: str) -> None:
        name = _plain(name)
        if name in contents or name in builtin:
            return
        if name not in paths:
            raise UnsupportedError(f"the kernel of {folder} has no module {name}")
        contents[name] = read_module(paths[name])
        for needed in depends(contents[name]):
            add(needed)
        order.append(name)

    for name in names:
        add(name)
    return [(name, contents[name]) for name in order]


def read_module(path: Path) -> bytes:
    """A module, unpacked.

    Raises:
        UnsupportedError: it is packed in another way than Debian's.
    """
    content = path.read_bytes()
    if path.suffix == ".xz":
        return lzma.decompress(content)
    if path.suffix != ".ko":
        raise UnsupportedError(f"can't unpack {path}")
    return content


def depends(module: bytes) -> list[str]:
    """What a module says that it needs: the field "depends" of its section .modinfo."""
    found = re.search(rb"\0depends=([^\0]*)\0", module)
    return [name for name in (found[1].decode().split(",") if found else []) if name]


def _plain(name: str) -> str:
    """A module's name, from that of its file; the kernel reads - as _."""
    return name.partition(".ko")[0].replace("-", "_")


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []
