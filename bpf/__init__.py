# SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
"""C sources of the kernel programs, as package data."""

from __future__ import annotations

from importlib.resources import files


def source(name: str) -> str:
    """The text of a file in this folder: ``source("steer.bpf.c")``, ``source("include/abi.h")``."""
    return files(__name__).joinpath(name).read_text(encoding="utf-8")
