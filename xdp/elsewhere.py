# SPDX-License-Identifier: Apache-2.0
"""What stands in for the C modules where there is no Linux: their constants and structs, not their functions.

An application can then be written on macOS, say, over plain sockets (``open_lanes(mode="portable")``), with
the same calls and batches.  cffi reads the same declarations as for the C modules.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

import cffi

from xdp.errors import UnsupportedError


def refuse_on_linux(module: str, build: str) -> None:
    """There the real modules are wanted: raises ImportError that says how to make this one."""
    if sys.platform == "linux":
        raise ImportError(f"{module} is not built: run python {build} in the repository's root")


def declare(*declarations: str) -> cffi.FFI:
    """Structs, enums and numbers as cffi reads them, without any C."""
    made = cffi.FFI()
    for declaration in declarations:
        made.cdef(declaration)
    return made


class Library:
    """``lib`` of a cffi module: constants, functions that are written in Python, and others that refuse."""

    def __init__(self, declared: cffi.FFI, functions: Mapping[str, Callable[..., Any]]) -> None:
        self._constants = declared.dlopen(None)
        self.__dict__.update(functions)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        try:
            found = getattr(self._constants, name)
        except AttributeError:

            def found(*_arguments: object) -> Any:
                raise UnsupportedError(
                    f"{name} needs Linux, this is {os.uname().sysname}",
                    hint='open_lanes(mode="portable") works everywhere',
                )

        setattr(self, name, found)
        return found
