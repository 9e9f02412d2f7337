# SPDX-License-Identifier: Apache-2.0
"""What an owner leaves in /run/sluice about itself, for `sluice status` and its like.

The kernel says what is loaded (:mod:`xdp.inventory`); this file adds what only the owner knows: why no
higher mode was to be had, what the numbers are called, where it serves descriptors.  Nothing depends on
it.  A file that is left over, broken or about another program is as good as none.

One file per network namespace and interface: ``/run/sluice/<inode of the namespace>-<interface>.json``.
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from xdp.names import Names

RUN = Path("/run/sluice")
#: 131,072 peers with names of 64 characters, and all else.
MAX_SIZE = 16 << 20


class Refusal(msgspec.Struct, frozen=True):
    """A mode that did not hold, and why."""

    mode: str
    reason: str


class Tuned(msgspec.Struct, frozen=True):
    """A setting of the interface that was changed: its text before and after."""

    key: str
    before: str
    after: str


class OwnerState(msgspec.Struct, frozen=True, kw_only=True):
    """The content of the file."""

    version: int = 1
    pid: int
    #: Field 22 of /proc/PID/stat (clock ticks since boot): tells the owner from a later process of its pid.
    started: int
    program_id: int
    interface: str
    #: The rung of the ladder that holds: "native zero-copy", "native copy", "generic copy", ...
    mode: str
    refused: tuple[Refusal, ...] = ()
    #: Path of the policy file, if there is one.
    policy: str = ""
    #: Path of the Unix socket that descriptors are served on, if they are.
    socket: str = ""
    persisted: bool = False
    names: Names = Names()
    #: Put back by whoever ends the owner's work (:mod:`xdp.journal`).
    tuned: tuple[Tuned, ...] = ()

    @property
    def alive(self) -> bool:
        """Whether the process that wrote this still runs."""
        return start_time(self.pid) == self.started


def state_path(interface: str, namespace: int, run: Path = RUN) -> Path:
    """Where the owner of an interface leaves its state; ``namespace`` is an inode number."""
    return run / f"{namespace}-{interface}.json"


def read_state(path: Path) -> OwnerState | None:
    """The state in a file; None when there is none, or none that can be trusted or understood.

    Only root's own files count: whoever else could write one could make tools signal a process.
    """
    try:
        with path.open("rb") as file:
            found = os.fstat(file.fileno())
            if found.st_uid not in (0, os.geteuid()) or found.st_mode & 0o022 or found.st_size > MAX_SIZE:
                return None
            state = msgspec.json.decode(file.read(MAX_SIZE), type=OwnerState)
    except (OSError, msgspec.MsgspecError, RecursionError):
        return None
    return state if state.version == 1 else None


def write_state(path: Path, state: OwnerState) -> None:
    """Replace the file in one step, so that no reader sees half of it. Raises `OSError`."""
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_bytes(msgspec.json.encode(state))
    scratch.chmod(0o644)
    scratch.replace(path)


def start_time(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None when there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # The command may hold blanks and parentheses, so count from its end (proc(5)); state is field 3.
    return int(text.rpartition(")")[2].split()[22 - 3])
