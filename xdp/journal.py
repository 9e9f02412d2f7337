# SPDX-License-Identifier: Apache-2.0
"""Changed settings are written down before they are changed, and put back later.

At exit the owner puts them back. After ``kill -9`` the file is still there, and the next start
on the interface does it. A value that is no longer the one we set was changed by somebody else
since, and is left alone.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import msgspec

from xdp.errors import InterfaceGoneError, SluiceError
from xdp.interface import SETTINGS, Setting
from xdp.inventory import namespace_inode
from xdp.owner_state import RUN

MAX_SIZE = 1 << 16
VERSION = 1


class Change(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A setting's text before and after."""

    key: str
    before: str
    after: str


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    version: int
    ifindex: int
    changes: tuple[Change, ...]


@dataclass(frozen=True)
class Outcome:
    """What became of one change; ``left`` says why it was not put back."""

    change: Change
    left: str = ""


def journal_path(ifindex: int, run: Path = RUN) -> Path:
    """Where the journal of an interface of this network namespace is."""
    return run / f"{namespace_inode()}-{ifindex}.journal"


def journals(run: Path = RUN) -> list[int]:
    """The interfaces (by index) of this network namespace that have a journal, ascending."""
    prefix = f"{namespace_inode()}-"
    names = [path.name.removeprefix(prefix) for path in run.glob(f"{prefix}*.journal")]
    return sorted(int(name.removesuffix(".journal")) for name in names if name[:-8].isdigit())


class Journal:
    """The changes made to one interface; its lock (:mod:`xdp.state`) must be held."""

    def __init__(self, path: Path, ifindex: int, changes: tuple[Change, ...] = ()) -> None:
        self.path = path
        self.ifindex = ifindex
        self.changes = changes

    @classmethod
    def open(cls, ifindex: int, run: Path = RUN) -> Journal:
        """The journal of an interface, with what is in its file.

        A file that can't be read as one (cut off, of another version) is put aside, so that it
        keeps nobody from starting and can still be looked at.
        """
        path = journal_path(ifindex, run)
        return cls(path, ifindex, _read(path, ifindex))

    def set(self, interface: str, setting: Setting, value: str) -> bool:
        """Change a setting, having written it down; False when it had that value already.

        Raises what the setting raises; the journal then no longer speaks of it.
        """
        before = setting.read(interface)
        if before == value:
            return False
        known = self.changes
        self._write((*known, Change(setting.key, before, value)))
        try:
            setting.write(interface, value)
            # Drivers may round; what counts later is what it became.
            after = setting.read(interface)
        except SluiceError:
            self._write(known)
            raise
        if after != value:
            self._write((*known, Change(setting.key, before, after)))
        return True

    def put_back(self, interface: str) -> list[Outcome]:
        """Put all settings back, the last change first, and remove the file."""
        outcomes = []
        while self.changes:
            change = self.changes[-1]
            outcomes.append(Outcome(change, _put_back(interface, change)))
            self._write(self.changes[:-1])
        return outcomes

    def forget(self) -> None:
        """Remove the file: the interface is gone, and its settings with it."""
        self._write(())

    def _write(self, changes: tuple[Change, ...]) -> None:
        self.changes = changes
        if not changes:
            self.path.unlink(missing_ok=True)
            return
        content = msgspec.json.encode(_File(VERSION, self.ifindex, changes))
        scratch = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        try:
            with scratch.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            scratch.replace(self.path)
            folder = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError as error:
            scratch.unlink(missing_ok=True)
            raise SluiceError.from_errno(
                f"writing {self.path}", error.errno or 0, hint="no setting was changed; is /run full?"
            ) from error


def _read(path: Path, ifindex: int) -> tuple[Change, ...]:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_SIZE + 1)
            found = os.fstat(file.fileno())
    except FileNotFoundError:
        return ()
    except OSError as error:
        raise SluiceError.from_errno(f"reading {path}", error.errno or 0) from error
    try:
        if len(raw) > MAX_SIZE or found.st_uid not in {0, os.geteuid()} or found.st_mode & 0o022:
            raise msgspec.ValidationError("not written by us")
        content = msgspec.json.decode(raw, type=_File)
        if content.version != VERSION or any(change.key not in SETTINGS for change in content.changes):
            raise msgspec.ValidationError("of another version")
    except (msgspec.MsgspecError, RecursionError):
        path.replace(path.with_name(f"{path.name}.unreadable"))
        return ()
    return content.changes if content.ifindex == ifindex else ()


def _put_back(interface: str, change: Change) -> str:
    """Why it was left as it is, or "" when it was put back."""
    setting = SETTINGS[change.key]
    try:
        current = setting.read(interface)
        if current == change.before:
            return ""
        if current != change.after:
            return f"it is {current} now, which we did not set"
        setting.write(interface, change.before)
    except InterfaceGoneError:
        return "the interface is gone"
    except SluiceError as error:
        return str(error)
    return ""
