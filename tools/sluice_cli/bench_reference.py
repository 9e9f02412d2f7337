# SPDX-License-Identifier: Apache-2.0
"""The C references of ``sluice bench``: compiled when they are needed, from tools/bench."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Final

import bpf
from xdp.errors import UnsupportedError

#: Not part of an installed package: benchmarks run from a checkout.
SOURCES: Final = Path(__file__).resolve().parent.parent / "bench"

_FLAGS: Final = ("-O2", "-g", "-std=gnu11", "-Wall", "-Wextra", "-Werror")
_LIBRARIES: Final = {"xsk": ("-lxdp", "-lbpf")}


def compile_reference(name: str, directory: Path) -> Path:
    """Compile tools/bench/NAME.c into ``directory`` unless it is there; returns the program.

    Raises:
        UnsupportedError: no sources, no compiler, or libxdp's headers are missing.
    """
    program = directory / name
    if program.exists():
        return program
    source = SOURCES / f"{name}.c"
    if not source.exists():
        raise UnsupportedError(
            f"the C reference {name}.c is not here",
            hint="run the benchmark from a checkout: tools/sluice bench",
        )
    include = Path(bpf.__file__).parent / "include"
    libraries = _LIBRARIES.get(name.split("_", maxsplit=1)[0], ())
    command = ["cc", *_FLAGS, f"-I{include}", "-o", str(program), str(source), *libraries]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise UnsupportedError("there is no C compiler", hint="install gcc") from error
    except subprocess.CalledProcessError as error:
        raise UnsupportedError(
            f"{name}.c does not compile", hint="install libxdp-dev and libbpf-dev", detail=error.stderr
        ) from error
    return program
