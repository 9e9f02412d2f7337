# SPDX-License-Identifier: Apache-2.0
"""What is written down about labs, so that none outlives its owner unnoticed.

Every lab has a marker, ``/run/sluice/labs/NAME.json``, written before its namespaces exist
and removed after they are gone.  It says who owns the lab: a process (pid and start time,
because pids are used again), or nobody for a lab made with ``sluice lab up``, which stays
until ``sluice lab down``.  A marker whose owner is dead is a lab to be reclaimed.

/run is emptied at boot, as are network namespaces, so a marker never outlives its boot.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from xdp.errors import BusyError, PermissionsError, UsageError

MARKERS: Final = Path("/run/sluice/labs")
MARKER_VERSION: Final = 1
NAMESPACE_PREFIX: Final = "sluice-"

# Long enough for people, short enough that "sluice-NAME-a" stays a comfortable file name.
_NAME: Final = re.compile(r"[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?")
# Building or removing a lab takes about 0.1 s; whoever holds the lock longer than this hangs.
_LOCK_SECONDS: Final = 30.0
_MARKER_BYTES: Final = 4096


@dataclass(frozen=True)
class Marker:
    """One lab as it is written down.

    ``owner_pid`` 0 means a persistent lab.  ``owner_started`` is in clock ticks since boot
    (proc_pid_stat(5), field 22).  ``ready`` is false while the lab is being built.
    """

    name: str
    queues: int
    owner_pid: int
    owner_started: int
    ready: bool
    version: int = MARKER_VERSION

    @property
    def persistent(self) -> bool:
        """True for a lab that no process owns."""
        return self.owner_pid == 0

    @property
    def abandoned(self) -> bool:
        """True when the owner is dead, or when a persistent lab was left half built."""
        if self.persistent:
            return not self.ready
        return process_started(self.owner_pid) != self.owner_started

    @property
    def namespaces(self) -> tuple[str, str]:
        """The server's and the client's namespace."""
        return namespace_names(self.name)


def namespace_names(name: str) -> tuple[str, str]:
    """The server's and the client's namespace of a lab."""
    return f"{NAMESPACE_PREFIX}{name}-a", f"{NAMESPACE_PREFIX}{name}-b"


def check_name(name: str) -> str:
    """Return ``name`` if it can name a lab.

    Raises:
        UsageError: it cannot.
    """
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} is no name for a lab",
            hint="use 1 to 32 of a-z, 0-9 and -, not starting or ending with -",
        )
    return name


def process_started(pid: int) -> int | None:
    """Start time of a process in ticks since boot, None when there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The second field is the command in parentheses and may itself hold spaces and ")".
    fields = stat[stat.rindex(b")") + 2 :].split()
    # A zombie holds no resources any more, but its pid stays until it is waited for.
    return None if fields[0] in (b"Z", b"X") else int(fields[19])


@contextmanager
def locked() -> Iterator[None]:
    """Hold the machine-wide lock on labs; it goes with the process, however that ends.

    Raises:
        PermissionsError: not root.
        BusyError: another process has held it for 30 s.
    """
    if os.geteuid() != 0:
        raise PermissionsError("a lab needs root, for its namespaces", hint="run the command with sudo")
    MARKERS.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(MARKERS / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        deadline = time.monotonic() + _LOCK_SECONDS
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise BusyError(
                        f"another process has held {MARKERS}/.lock for {_LOCK_SECONDS:.0f} s",
                        hint=f"see who it is with: fuser {MARKERS}/.lock",
                    ) from None
                time.sleep(0.01)
        yield
    finally:
        os.close(descriptor)


def write_marker(marker: Marker) -> None:
    """Write the marker whole or not at all.  The lock must be held."""
    path = MARKERS / f"{marker.name}.json"
    temporary = path.with_suffix(".new")
    temporary.write_text(json.dumps(asdict(marker)) + "\n", encoding="utf-8")
    temporary.replace(path)


def remove_marker(name: str) -> None:
    """Forget a lab.  The lock must be held."""
    (MARKERS / f"{name}.json").unlink(missing_ok=True)


def read_marker(name: str) -> Marker | None:
    """The marker of one lab, None when there is no such lab.

    Raises:
        UsageError: the file is there, but is no marker of this version.
    """
    path = MARKERS / f"{name}.json"
    try:
        with path.open("rb") as file:
            text = file.read(_MARKER_BYTES)
    except FileNotFoundError:
        return None
    try:
        marker = _parse(json.loads(text))
    except (ValueError, RecursionError) as error:
        raise _damaged(path, str(error)) from None
    if marker.name != name:
        raise _damaged(path, f"it names the lab {marker.name!r}")
    return marker


def read_markers() -> tuple[list[Marker], list[UsageError]]:
    """All labs by name, and an error for each marker that cannot be read."""
    markers: list[Marker] = []
    errors: list[UsageError] = []
    try:
        names = sorted(path.stem for path in MARKERS.glob("*.json"))
    except PermissionError:
        raise PermissionsError(f"may not read {MARKERS}", hint="run the command with sudo") from None
    for name in names:
        if not _NAME.fullmatch(name):
            continue
        try:
            marker = read_marker(name)
        except UsageError as error:
            errors.append(error)
            continue
        if marker is not None:
            markers.append(marker)
    return markers, errors


def _parse(value: Any) -> Marker:
    if not isinstance(value, dict) or value.get("version") != MARKER_VERSION:
        raise ValueError(f"no object of version {MARKER_VERSION}")
    types = {
        "name": str,
        "queues": int,
        "owner_pid": int,
        "owner_started": int,
        "ready": bool,
        "version": int,
    }
    for key, kind in types.items():
        # type(), not isinstance(): a bool is an int to Python.
        if type(value.get(key)) is not kind or (kind is int and value[key] < 0):
            raise ValueError(f"{key} is {value.get(key)!r}")
    if value.keys() != types.keys():
        raise ValueError("unknown keys")
    return Marker(**value)


def _damaged(path: Path, why: str) -> UsageError:
    return UsageError(
        f"{path} is damaged: {why}",
        hint=f"run `sluice lab down --name {path.stem}` to remove that lab and the file",
    )
