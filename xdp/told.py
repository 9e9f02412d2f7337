# SPDX-License-Identifier: Apache-2.0
"""What running programs tell of themselves, for the tools: a folder for each kind, a file for each program.

    FLOWS = Folder("flows", FlowState, size_maximum=1 << 20, sound=lambda state: ...)
    FLOWS.read()                                       # of all programs that are alive
    class FlowPublisher(Publisher[FlowState]): ...     # writes one

Any user's program may write there: folders are root's, with mode 1777 as /tmp, and made by whoever of root
comes first (an owner, or a program that tells).  So who reads, as root, believes nothing:

- a file counts when it belongs to the user whose process it tells of, and that process still runs (by pid
  and start time: one that was killed leaves its file);
- it is opened without following links or waiting, and is at most ``size_maximum`` bytes long;
- of a user's files only :data:`FILES_PER_USER` are looked at: nobody can hide others' behind his own;
- its content has exactly the types, ranges and characters of its struct, and is ``sound``, or is none.

Names of files begin with the pid and end in what nobody can guess, so none can be taken by others before.
Files of processes that are gone are removed by who reads, as far as it may.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import stat
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Annotated, ClassVar, Final, Generic, Self, TypeVar

import msgspec
from msgspec import Meta

from xdp.errors import UsageError
from xdp.owner_state import RUN, start_time

FILES_PER_USER: Final = 16
#: Names in a folder that are looked at; more is somebody's attack, and shows in what is missing.
NAMES_MAXIMUM: Final = 1 << 16
#: Seconds between two files of a program.
INTERVAL: Final = 1.0
_LEAST_INTERVAL: Final = 0.1
_MODE: Final = 0o1777
_WORD: Final = re.compile(r"[A-Za-z0-9_.+-]{1,32}")

#: What numbers and words of such files may be.  (A pattern's $ would let a line break pass at the end.)
Count = Annotated[int, Meta(ge=0, le=1 << 62)]
Seconds = Annotated[float, Meta(ge=0, le=1e9)]
Part = Annotated[float, Meta(ge=0, le=1)]
Word = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_.+-]{1,32}\Z")]


class Told(msgspec.Struct, frozen=True, kw_only=True):
    """What every file says: whose it is, and what people call that program."""

    pid: Annotated[int, Meta(ge=1, le=1 << 22)]
    #: As in :class:`xdp.owner_state.OwnerState`.
    started: Count
    program: Word


T = TypeVar("T", bound=Told)


class Folder(Generic[T]):
    """The files of one kind, in ``run``/``name``."""

    __slots__ = ("_kind", "_name", "_size_maximum", "_sound")

    def __init__(self, name: str, kind: type[T], *, size_maximum: int, sound: Callable[[T], bool]) -> None:
        self._name, self._kind, self._size_maximum, self._sound = name, kind, size_maximum, sound

    def path(self, run: Path = RUN) -> Path:
        """Where the files are."""
        return run / self._name

    def make(self, run: Path = RUN) -> None:
        """Make it as it has to be. Raises `OSError` where that needs root's rights."""
        folder = self.path(run)
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o755)
            folder.chmod(_MODE)  # mkdir's mode goes through the umask

    def write(self, state: T, file: str, run: Path = RUN) -> None:
        """Replace the file of that name (:func:`file_name`) in one step. Raises `OSError`."""
        path = self.path(run) / file
        scratch = path.with_suffix(".new")
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(scratch, flags, 0o644)
        try:
            with open(descriptor, "wb") as out:  # noqa: PTH123 -- a descriptor
                out.write(msgspec.json.encode(state))
            scratch.replace(path)
        except BaseException:
            scratch.unlink(missing_ok=True)
            raise

    def read(self, run: Path = RUN) -> list[T]:
        """What all living programs tell, in the order of their pids; removes what the dead have left."""
        found: list[T] = []
        try:
            folder = os.open(self.path(run), os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            return []
        try:
            status = os.fstat(folder)
            if status.st_uid not in {0, os.geteuid()}:
                return []
            for name in _names(folder):
                state = self._read(folder, name)
                if state is not None:
                    found.append(state)
        finally:
            os.close(folder)
        return sorted(found, key=lambda state: state.pid)

    def _read(self, folder: int, name: str) -> T | None:
        try:
            # A pipe that was put in its place since is not waited for.
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            descriptor = os.open(name, flags, dir_fd=folder)
        except OSError:
            return None
        with open(descriptor, "rb") as file:  # noqa: PTH123 -- a descriptor
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode) or status.st_size > self._size_maximum:
                return None
            try:
                state = msgspec.json.decode(file.read(self._size_maximum + 1), type=self._kind)
            except (OSError, msgspec.MsgspecError, RecursionError, ValueError):
                return None
        if state.pid != _pid(name):
            return None
        if start_time(state.pid) != state.started:
            _remove(folder, name)
            return None
        if status.st_uid != _user(state.pid) or not self._sound(state):
            return None
        return state


def checked_word(name: str, value: object) -> str:
    """What may stand for something in files and labels.  UsageError, which begins with ``name``."""
    if type(value) is not str or not _WORD.fullmatch(value):
        raise UsageError(f"{name} is 1 to 32 letters, digits and any of _.+-, not {value!r}")
    return value


def file_name() -> str:
    """A name for this process's file that nobody else has or can guess."""
    return f"{os.getpid()}-{secrets.token_hex(8)}.json"


def _names(folder: int) -> list[str]:
    """What is worth being opened: some regular files of each user."""
    names: list[str] = []
    seen: Counter[int] = Counter()
    with os.scandir(folder) as entries:
        for number, entry in enumerate(entries):
            if number >= NAMES_MAXIMUM:
                break
            try:
                status = entry.stat(follow_symlinks=False)
            except OSError:
                continue
            pid = _pid(entry.name)
            if not stat.S_ISREG(status.st_mode) or pid is None:
                continue
            if not Path(f"/proc/{pid}").exists():
                _remove(folder, entry.name)
                continue
            seen[status.st_uid] += 1
            if entry.name.endswith(".json") and seen[status.st_uid] <= FILES_PER_USER:
                names.append(entry.name)
    return names


def _pid(name: str) -> int | None:
    """Of whom a file is by its name, or None when it cannot be one of ours."""
    number = name.partition("-")[0]
    return int(number) if number.isascii() and number.isdecimal() and len(number) <= 7 else None


def _remove(folder: int, name: str) -> None:
    """Where the folder is as /tmp only its owner and root may; a name in it follows no link."""
    with contextlib.suppress(OSError):
        os.unlink(name, dir_fd=folder)


def _user(pid: int) -> int | None:
    """As whom a process makes files; /proc/PID itself may be root's for other reasons (proc(5))."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("Uid:"):
                return int(line.split()[4])
    return None


class Publisher(ABC, Generic[T]):
    """Writes the file of this process, at most every ``interval`` seconds.

    ``program`` is what people call it: 1 to 32 letters, digits and any of ``_.+-``.  Raises UsageError for
    values out of range.  Also a context manager; after a fork the child makes one of its own.

    Nothing depends on it: where it cannot be written (no folder, because neither `sluice up` nor a program of
    root's has been here; no space) ``publish`` says so by False, and the next interval tries again.
    """

    __slots__ = ("_file", "_interval", "_next", "_program", "_run", "_started")

    folder: ClassVar[Folder]  # type: ignore[type-arg]  # of T, which a class variable cannot say

    def __init__(self, program: str, *, interval: float = INTERVAL, run: Path = RUN) -> None:
        checked_word("program", program)
        if type(interval) not in {int, float} or not _LEAST_INTERVAL <= interval < float("inf"):
            raise UsageError(f"interval is seconds, {_LEAST_INTERVAL} or more, not {interval!r}")
        self._program, self._interval, self._run = program, interval, run
        self._next = float("-inf")
        self._file = file_name()
        self._started = start_time(os.getpid()) or 0  # without /proc nobody reads it either

    @abstractmethod
    def _state(self, now: float) -> T:
        """What is to be told."""

    def publish(self, now: float) -> bool:
        """Write it if it is time for that; False when it could not be written."""
        if now < self._next:
            return True
        self._next = now + self._interval
        try:
            state = self._state(now)
            if os.geteuid() == 0:
                self._run.mkdir(mode=0o755, parents=True, exist_ok=True)
                self.folder.make(self._run)
            self.folder.write(state, self._file, self._run)
        except OSError:
            self._file = file_name()  # the old one may be root's, whose rights this process has given up
            return False
        return True

    def close(self) -> None:
        """Remove the file; may be called again."""
        with contextlib.suppress(OSError):
            (self.folder.path(self._run) / self._file).unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
