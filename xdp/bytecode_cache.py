# SPDX-License-Identifier: Apache-2.0
"""Compiled programs kept in files, so that the second start takes no compiler.

bcc needs a second of CPU for the steer program; the kernel's verifier, which always runs, a third of that.
A file is named after all that its contents depend on, so it is right or it is not found; what is old is
deleted, not checked.  Whoever can write here chooses what root loads into the kernel.  So only a directory
is used that belongs to us and that nobody else can write, and any doubt means: compile.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from pathlib import Path

from xdp.bytecode import Bytecode
from xdp.headers import default_cache

#: Raise it when the meaning of a file changes.
FORMAT = 1
#: Files that are kept, of 50 KiB each: several versions of Sluice, all variants that its tests build.
MAX_KEPT = 64

_FOLDER = "programs"
_DIGEST = hashlib.sha256().digest_size * 2


def key_of(*parts: str) -> str:
    """The name of what is compiled from these."""
    key = hashlib.sha256(f"{FORMAT}".encode())
    for part in parts:
        key.update(f"\0{len(part)}\0{part}".encode())
    return key.hexdigest()[:32]


def fetch(key: str, folder: Path | None = None) -> Bytecode | None:
    """What was stored under that key, or None: never, damaged, or not to be trusted."""
    folder = folder or default_cache() / _FOLDER
    try:
        if not _trusted(folder):
            return None
        descriptor = os.open(folder / key, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        with os.fdopen(descriptor, "rb") as file:
            found = os.fstat(descriptor)
            if found.st_uid != os.geteuid() or found.st_mode & 0o022:
                return None
            content = file.read()
        os.utime(folder / key)  # the least used go first
        # A torn file (the disk was full, the power gone) has another digest.
        digest, text = content[:_DIGEST], content[_DIGEST:]
        if hashlib.sha256(text).hexdigest().encode() != digest:
            return None
        return Bytecode.from_json(text.decode())
    except (OSError, ValueError, KeyError, TypeError):
        return None


def store(key: str, bytecode: Bytecode, folder: Path | None = None) -> bool:
    """Keep it if that can be done safely; whether it was."""
    folder = folder or default_cache() / _FOLDER
    text = bytecode.to_json().encode()
    try:
        folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        if not _trusted(folder):
            return False
        # Written beside and renamed: a reader sees all of it or nothing, also of two writers.
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".", delete=False) as file:
            try:
                file.write(hashlib.sha256(text).hexdigest().encode() + text)
                file.flush()
                Path(file.name).rename(folder / key)
            except BaseException:
                Path(file.name).unlink(missing_ok=True)
                raise
        _tidy(folder)
    except OSError:
        return False
    return True


def _trusted(folder: Path) -> bool:
    """Whether only we could have put something into it: the folder and all above it, as they really are."""
    path = Path(os.path.realpath(folder))
    found = path.stat()
    if found.st_uid != os.geteuid() or found.st_mode & 0o022:
        return False
    # A sticky directory (/tmp) lets nobody rename what is another's.
    above = [parent.stat() for parent in path.parents]
    return all(
        one.st_uid in {0, os.geteuid()} and (not one.st_mode & 0o022 or one.st_mode & 0o1000) for one in above
    )


def _tidy(folder: Path) -> None:
    """Keep the latest; whatever else is here, half-written files of a killed process among it, ages too."""
    aged = []
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            aged.append((path.stat().st_mtime, path))
    for _, path in sorted(aged, reverse=True)[MAX_KEPT:]:
        path.unlink(missing_ok=True)
