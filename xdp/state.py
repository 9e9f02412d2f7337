# SPDX-License-Identifier: Apache-2.0
"""What an owner keeps in /run/sluice, and how two owners stay apart.

Per network namespace (by inode) and interface:

    INODE-IFINDEX.lock       flock: who holds it owns the interface; holds the owner's pid
    INODE-IFINDEX.journal    changed settings, see :mod:`xdp.journal`
    INODE-INTERFACE.json     for `sluice status`, see :mod:`xdp.owner_state`
    INODE-INTERFACE.sock     where descriptors are served

The lock goes with the process, however it ends; the files that a killed owner leaves
are tidied up by the next start of any owner (:func:`sweep`).
"""

from __future__ import annotations

import errno
import fcntl
import os
from contextlib import suppress
from pathlib import Path

from xdp._libbpf import lib
from xdp.errors import BusyError, PermissionsError, SluiceError
from xdp.inventory import PIN_ROOT, namespace_inode
from xdp.owner_state import RUN, read_state, start_time

# A lock file that its holder removes while we open it is opened again; more often than
# this only if owners come and go at each of our system calls.
_ATTEMPTS = 100


def prepare(run: Path = RUN) -> Path:
    """Make the directory. Raises `PermissionsError` when it can't be made or others may write to it."""
    try:
        run.mkdir(mode=0o755, parents=True, exist_ok=True)
        found = run.stat(follow_symlinks=False)
    except PermissionError as error:
        raise PermissionsError(f"{run} may not be made", hint="owning an interface needs root") from error
    except OSError as error:
        raise SluiceError.from_errno(f"{run}", error.errno or errno.EIO) from error
    if found.st_uid not in {0, os.geteuid()} or found.st_mode & 0o022 or not run.is_dir():
        raise PermissionsError(
            f"{run} can be written to by others than root",
            hint=f"it must be a directory of root's with mode 755: remove {run} and start again",
        )
    return run


def socket_path(interface: str, namespace: int | None = None, run: Path = RUN) -> Path:
    """Where the owner of an interface serves descriptors unless told otherwise."""
    return run / f"{namespace_inode() if namespace is None else namespace}-{interface}.sock"


def pin_folder(interface: str) -> Path:
    """Where ``sluice up --persist`` pins the link of an interface.

    Interfaces of other network namespaces than the machine's first one may have the same name:
    their folders carry the namespace's inode.
    """
    namespace = namespace_inode()
    with suppress(OSError):
        if Path("/proc/1/ns/net").stat().st_ino == namespace:
            return PIN_ROOT / interface
    return PIN_ROOT / f"{namespace}-{interface}"


class InterfaceLock:
    """The right to own an interface; given up by ``release`` or by the end of the process."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor = descriptor

    @classmethod
    def take(cls, interface: str, ifindex: int, run: Path = RUN) -> InterfaceLock:
        """Take the lock. Raises `BusyError` with the pid of who has it."""
        path = prepare(run) / f"{namespace_inode()}-{ifindex}.lock"
        try:
            descriptor = _lock(path)
        except PermissionError as error:
            raise PermissionsError(f"{path} may not be written", hint="owning needs root") from error
        if descriptor is None:
            raise BusyError(
                f"{interface} is owned by {holder(path)}",
                hint=f"ask it for lanes (open_lanes(owner=...)), or end it: sluice down {interface}",
            )
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()} {start_time(os.getpid())}\n".encode(), 0)
        return cls(path, descriptor)

    def release(self) -> None:
        """Give it up; idempotent."""
        if self._descriptor >= 0:
            # Still held: whoever opens the file now finds it removed, and tries again.
            self.path.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = -1


def holder(path: Path) -> str:
    """Who holds a lock file, as words: the process by its pid."""
    try:
        pid = path.read_text(encoding="ascii", errors="replace").split()[0]
    except (OSError, IndexError):
        # It has not come to write it yet.
        return "another process that is starting"
    return f"process {pid}"


def _lock(path: Path) -> int | None:
    """A locked descriptor of the file that is at ``path``, or None when somebody holds it."""
    for _ in range(_ATTEMPTS):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(descriptor).st_ino == path.stat().st_ino:
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            return None
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
    return None


def sweep(run: Path = RUN) -> list[str]:
    """Remove what killed owners left: locks, state files and sockets. Returns the names.

    Journals stay: only a start on the same interface can put its settings back.  Who may not remove
    anything, removes nothing: that is told by whatever needs it.
    """
    removed = []
    for path in sorted(run.glob("*.lock")):
        try:
            descriptor = _lock(path)
        except PermissionError:
            continue
        if descriptor is not None:
            path.unlink(missing_ok=True)
            os.close(descriptor)
            removed.append(path.name)
    for path in sorted(run.glob("*.json")):
        state = read_state(path)
        if state is None or state.alive or (state.persisted and _program_exists(state.program_id)):
            continue
        try:
            path.unlink(missing_ok=True)
        except PermissionError:
            continue
        removed.append(path.name)
        served = Path(state.socket) if state.socket else None
        if served is not None and served.parent == run and served.suffix == ".sock":
            served.unlink(missing_ok=True)
            removed.append(served.name)
    return removed


def _program_exists(number: int) -> bool:
    descriptor = lib.sluice_prog_by_id(number)
    if descriptor >= 0:
        os.close(descriptor)
    return descriptor >= 0
