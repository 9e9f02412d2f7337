# SPDX-License-Identifier: Apache-2.0
"""From a file in bpf/ to bytecode, through bcc.

bcc compiles; making maps and loading is :mod:`xdp.bytecode`'s and :mod:`xdp.program`'s.
What was compiled before comes from a file (:mod:`xdp.bytecode_cache`).  bcc rewrites
map accesses only in the text that it is given, not in included files, so our own
headers are put in place of their ``#include`` lines (with ``#line`` marks, so
that compiler messages name the right file).
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import bpf
from xdp import bytecode_cache
from xdp.bytecode import Bytecode
from xdp.errors import OPEN_FILES, SluiceError, UnsupportedError, VerifierError
from xdp.headers import kernel_source, stamp

if TYPE_CHECKING:
    from bcc import BPF

INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"\s*$')

# abi.h includes this for the C compilers of user space; bcc has the types already.
KERNEL_TYPES = "#include <linux/types.h>"


def flatten(name: str) -> str:
    """The text of ``bpf/name`` with our own headers in place, each once."""
    done: set[str] = set()

    def expand(file: str) -> Iterator[str]:
        yield f'#line 1 "{file}"'
        for number, line in enumerate(bpf.source(file).splitlines(), 1):
            match = INCLUDE.match(line)
            if not match:
                yield "" if line == KERNEL_TYPES else line
                continue
            header = f"include/{match[1]}"
            if header not in done:
                done.add(header)
                yield from expand(header)
            yield f'#line {number + 1} "{file}"'

    return "\n".join(expand(name)) + "\n"


@contextmanager
def _stderr_to(target: Any) -> Iterator[None]:
    """Bcc and LLVM write to descriptor 2 itself; keep what they say for the error's detail."""
    sys.stderr.flush()
    saved = os.dup(2)
    try:
        os.dup2(target.fileno(), 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def _import_bcc() -> type[BPF]:
    try:
        from bcc import BPF
    except ImportError as error:
        raise UnsupportedError(
            "bcc's Python module is missing",
            hint="install it (Debian, Ubuntu: apt-get install python3-bpfcc) and use the system's python3 "
            "or a virtual environment with --system-site-packages",
            detail=str(error),
        ) from error
    if not hasattr(BPF, "XDP"):
        raise UnsupportedError(
            "the module named bcc is not the BPF Compiler Collection",
            hint="remove the package 'bcc' that pip installed and install python3-bpfcc from the system",
        )
    return cast("type[BPF]", BPF)


def compile_program(
    name: str,
    function: str,
    *,
    defines: Sequence[str] = (),
    placeholders: Sequence[int] = (),
    cache: Path | None = None,
) -> Bytecode:
    """Compile ``function`` of ``bpf/name``; ``defines`` are "NAME=VALUE"; ``placeholders`` are as
    Bytecode.of_loaded's.

    Takes 1 to 2 seconds the first time; after that it is read from ``cache``, by default a folder
    that only this user can write.  Raises UnsupportedError where bcc or headers are missing,
    VerifierError where the text does not compile.
    """
    source = kernel_source()
    text = flatten(name)
    flags = [f"-D{define}" for define in defines]
    # From LLVM 14 on the kernel's headers warn in plenty; ours are checked by the tests.
    flags += ["-Werror=implicit-function-declaration", "-Wno-macro-redefined", "-Wno-unknown-warning-option"]
    key = bytecode_cache.key_of(text, function, *flags, platform.machine(), platform.release(), stamp(source))
    found = bytecode_cache.fetch(key, cache)
    if found is None:
        found = _compile(name, function, text, flags, source, placeholders)
        bytecode_cache.store(key, found, cache)
    return found


def _compile(
    name: str, function: str, text: str, flags: Sequence[str], source: Path, placeholders: Sequence[int]
) -> Bytecode:
    bcc = _import_bcc()
    before = os.environ.get("BCC_KERNEL_SOURCE")
    os.environ["BCC_KERNEL_SOURCE"] = str(source)
    module: BPF | None = None
    with tempfile.TemporaryFile() as log:
        try:
            with _stderr_to(log):
                # bytes: bcc warns about str, except in cflags
                module = bcc(text=text.encode(), cflags=flags)
                instructions, maps = module.dump_func(function.encode()), _map_descriptors(module)
                return Bytecode.of_loaded(instructions, maps, placeholders=placeholders)
        except Exception as error:  # bcc raises bare Exception
            log.seek(0)
            said = log.read().decode(errors="replace")
            raise _compile_error(name, said, error) from error
        finally:
            if module is not None:
                module.cleanup()
            if before is None:
                del os.environ["BCC_KERNEL_SOURCE"]
            else:
                os.environ["BCC_KERNEL_SOURCE"] = before


def _compile_error(name: str, said: str, error: Exception) -> SluiceError:
    if "Operation not permitted" in said:
        return UnsupportedError(
            f"bpf/{name}: the kernel refused to make a map: not permitted",
            hint="run as root (or with CAP_BPF and CAP_NET_ADMIN); `sluice doctor` says what is missing",
            detail=said,
        )
    if "Too many open files" in said:
        return UnsupportedError(
            f"bpf/{name}: too many open files",
            hint=OPEN_FILES,
            detail=said,
        )
    first = next((line for line in said.splitlines() if "error:" in line), str(error))
    return VerifierError(
        f"bpf/{name} does not compile: {first}",
        hint="kernel headers may be incomplete: `sluice doctor`; --verbose shows the compiler's words",
        detail=said,
    )


def _map_descriptors(module: BPF) -> dict[str, int]:
    """All maps by name; bcc's Python looks them up one at a time and makes an object of each."""
    from bcc import lib

    name_of = lib.bpf_table_name  # const char *bpf_table_name(void *program, size_t id)
    name_of.restype = ctypes.c_char_p
    name_of.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    descriptor_of = lib.bpf_table_fd_id  # int bpf_table_fd_id(void *program, size_t id)
    descriptor_of.restype = ctypes.c_int
    descriptor_of.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    count = lib.bpf_num_tables  # size_t bpf_num_tables(void *program)
    count.restype = ctypes.c_size_t
    count.argtypes = [ctypes.c_void_p]
    handle = module.module
    return {name_of(handle, index).decode(): descriptor_of(handle, index) for index in range(count(handle))}


def default_source_directory() -> Path:
    """Where the C sources of the kernel programs are."""
    return Path(bpf.__file__).parent
