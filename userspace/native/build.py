# SPDX-License-Identifier: Apache-2.0
"""Build script of the cffi module ``userspace.native._native``.

One module, made of parts.  A part is ``NAME.h`` with ``NAME.c`` and, where that grew
long, ``NAME_*.c`` in this folder; what Python may see of it stands in the header between
``/* cffi: begin */`` and ``/* cffi: end */`` and is fed to cffi as it stands, so nothing is
declared twice.  bpf/include/abi.h has no such marks: all of it is for Python.

``python userspace/native/build.py`` builds in place when a source is newer than
the module; setuptools calls :func:`ffi`.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from pathlib import Path

import cffi

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
ABI_HEADER = ROOT / "bpf" / "include" / "abi.h"

# In order: a part may use the types of those above it.
PARTS = (
    "batch",
    "checksum",
    "busy_poll",
    "tables",
    "classify",
    "mmsg",
    "umem",
    "xsk",
    "headers",
    "queue",
    "wait",
    "channel",
)

# Parts that Python sees nothing of.
INTERNAL_PARTS = ("rings",)

# cffi's parser knows the types of stdint.h but not the kernel's.
KERNEL_TYPES = """
typedef unsigned char __u8;
typedef unsigned short __u16;
typedef unsigned int __u32;
typedef unsigned long long __u64;
"""

MARKED = re.compile(r"/\* cffi: begin \*/(.*?)/\* cffi: end \*/", re.DOTALL)
NOT_FOR_CFFI = re.compile(r"\s*#\s*(ifndef|endif|include)\b|\s*#define\s+\w+\s*$")

# cffi's own generated wrappers are not ours to mend.
PREAMBLE = """
#pragma GCC diagnostic ignored "-Wunused-parameter"
#pragma GCC diagnostic ignored "-Wmissing-field-initializers"
#include <linux/types.h>
#include "abi.h"
"""

COMPILE_ARGUMENTS = ["-O2", "-g", "-std=gnu11", "-Wall", "-Wextra", "-Werror"]


def declarations(header: Path) -> str:
    """What of a header is for Python: the marked parts, or all of it when none is marked."""
    text = header.read_text(encoding="utf-8")
    marked = MARKED.findall(text)
    if marked:
        text = "\n".join(marked)
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)
    return "\n".join(line for line in text.splitlines() if not NOT_FOR_CFFI.match(line))


def sources(part: str) -> list[Path]:
    """``NAME.c`` and ``NAME_*.c``."""
    return sorted([*HERE.glob(f"{part}.c"), *HERE.glob(f"{part}_*.c")])


def make(base: Path | None = None) -> cffi.FFI:
    """The module, with its sources relative to ``base`` or absolute."""
    module = cffi.FFI()
    module.cdef(KERNEL_TYPES)
    module.cdef(declarations(ABI_HEADER))
    for part in PARTS:
        module.cdef(declarations(HERE / f"{part}.h"))
    module.set_source(
        "userspace.native._native",
        PREAMBLE + "\n".join(f'#include "{part}.h"' for part in PARTS),
        sources=[
            str(source.relative_to(base) if base else source)
            for part in PARTS + INTERNAL_PARTS
            for source in sources(part)
        ],
        include_dirs=[str(HERE), str(ABI_HEADER.parent)],
        extra_compile_args=COMPILE_ARGUMENTS,
    )
    return module


def target() -> Path:
    """The module file for this interpreter, in place."""
    import sysconfig

    return HERE / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}"


def stale(module: Path) -> bool:
    """Whether a source is newer than the module."""
    if not module.exists():
        return True
    built = module.stat().st_mtime_ns
    inputs = [*HERE.glob("*.c"), *HERE.glob("*.h"), ABI_HEADER, HERE / "build.py"]
    return any(path.stat().st_mtime_ns > built for path in inputs)


def build() -> Path:
    """Compile to the side, then put in place at once: a running process keeps the old module."""
    module = target()
    with tempfile.TemporaryDirectory(prefix="sluice-build-") as directory:
        built = Path(make().compile(tmpdir=directory, verbose=False))
        staged = module.with_name(f".{module.name}.{os.getpid()}")
        staged.write_bytes(built.read_bytes())
        staged.chmod(0o755)
        staged.replace(module)
    return module


def ffi() -> cffi.FFI:
    """For setuptools, which wants sources relative to the repository's root and calls this."""
    return make(ROOT)


if __name__ == "__main__":
    if stale(target()) or "--force" in sys.argv[1:]:
        print(build())
