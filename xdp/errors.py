# SPDX-License-Identifier: Apache-2.0
"""Errors that people see.

``str(error)`` is one line that names the thing that failed.  ``hint`` says what
to do next.  ``detail`` is for ``--verbose``: the verifier's log or the kernel's
words.  Each class has an exit code of its own, so that scripts can tell causes
apart; docs/troubleshooting.md lists them.
"""

from __future__ import annotations

import os
from errno import EMFILE
from typing import ClassVar, Final

OPEN_FILES: Final = "raise the limit of open files (`ulimit -n`)"


class SluiceError(Exception):
    """Base of all errors that Sluice raises on purpose."""

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str = "", detail: str = "") -> None:
        super().__init__(" ".join(message.split()))
        self.hint = hint
        self.detail = detail

    @classmethod
    def from_errno(cls, what: str, errno: int, *, hint: str = "", detail: str = "") -> SluiceError:
        """``what`` failed with ``errno`` (positive); the class is kept, the errno is in the message.

        Where descriptors have run out, what to do is the same whatever wanted one.
        """
        if not hint and errno == EMFILE:
            hint = OPEN_FILES
        error = cls(f"{what}: {os.strerror(errno)}", hint=hint, detail=detail)
        error.errno = errno
        return error

    errno: int = 0


class UsageError(SluiceError):
    """A wrong argument."""

    exit_code = 2


class PolicyError(SluiceError):
    """A policy file that cannot be used; the message names file, key and what is allowed."""

    exit_code = 3


class PermissionsError(SluiceError):
    """Root or a capability is missing."""

    exit_code = 4


class UnsupportedError(SluiceError):
    """This kernel, driver or machine lacks what is asked for."""

    exit_code = 5


class BusyError(SluiceError):
    """Somebody else holds it: another program, another owner, another application."""

    exit_code = 6


class NotLoadedError(SluiceError):
    """Nothing of ours is loaded where something should be."""

    exit_code = 7


class VerifierError(SluiceError):
    """The kernel refused a program; ``detail`` holds the verifier's log."""

    exit_code = 8


class InterfaceGoneError(SluiceError):
    """The interface was deleted or taken away while in use."""

    exit_code = 9


class OwnerGoneError(SluiceError):
    """The owner that handed out the descriptors is no longer there."""

    exit_code = 10
