# SPDX-License-Identifier: Apache-2.0
"""The C of bpf/: its form, and that its numbers fit together."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from xdp._libbpf import ffi, lib

BPF = Path(__file__).resolve().parents[2] / "bpf"
FILES = sorted([*BPF.glob("*.c"), *BPF.glob("include/*.h")])
CACHE_LINE = 64  # bytes, of x86-64 and most of arm64
LICENSE = "SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)"
#: What .ci/run uses, too: other versions of clang-format disagree with it.
FORMATTER = shutil.which("clang-format-14")


def test_there_are_sources() -> None:
    assert {"steer.bpf.c", "abi.h", "parse.h", "peer.h", "policy.h", "limit.h", "count.h"} <= {
        path.name for path in FILES
    }


@pytest.mark.skipif(FORMATTER is None, reason="clang-format-14 is not installed; .ci/run checks the form")
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_form(path: Path) -> None:
    assert FORMATTER is not None
    done = subprocess.run(
        [FORMATTER, "--dry-run", "-Werror", str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_house_rules(path: Path) -> None:
    """License on top, one guard per header, and a length that can be read at once."""
    lines = path.read_text(encoding="utf-8").splitlines()
    assert LICENSE in lines[0]
    assert len(lines) <= 500
    assert not [line for line in lines if line != line.rstrip()]
    if path.suffix == ".h":
        guard = f"SLUICE_{path.stem.upper()}_H"
        assert lines.count(f"#ifndef {guard}") == lines.count(f"#define {guard}") == 1
        assert lines[-1] == f"#endif /* {guard} */"


def test_our_headers_are_included_by_name_alone() -> None:
    """compile.py puts them in place itself: a path, or a header that is not there, would be lost."""
    for path in FILES:
        for name in re.findall(
            r'^\s*#\s*include\s+"([^"]+)"', path.read_text(encoding="utf-8"), re.MULTILINE
        ):
            assert (BPF / "include" / name).is_file(), f"{path.name}: {name}"


def test_sizes_fit_together() -> None:
    """abi.h allows plain numbers only, so products are written out; here they are checked."""
    assert lib.SLUICE_PORTS_SIZE == lib.SLUICE_BANKS * lib.SLUICE_PORTS
    assert lib.SLUICE_PATTERNS_SIZE == lib.SLUICE_BANKS * lib.SLUICE_MAX_SERVICES
    assert lib.SLUICE_RULES_SIZE == (
        lib.SLUICE_BANKS * lib.SLUICE_MAX_SERVICES * lib.SLUICE_MAX_CLASSES * lib.SLUICE_MAX_KINDS
    )
    assert lib.SLUICE_XSKS_SIZE == lib.SLUICE_MAX_QUEUES * lib.SLUICE_MAX_LANES
    assert lib.SLUICE_COUNTER_ROWS == lib.SLUICE_MAX_LANES + 1
    assert lib.SLUICE_NO_LANE == lib.SLUICE_MAX_LANES
    assert lib.SLUICE_VERDICTS_SIZE == lib.SLUICE_COUNTER_ROWS * lib.SLUICE_REASONS
    # Masks take the place of comparisons.
    for size in (lib.SLUICE_BANKS, lib.SLUICE_MAX_LANES, lib.SLUICE_PREFIX_BUCKETS, lib.SLUICE_STRANGER_SETS):
        assert size & (size - 1) == 0
    assert lib.SLUICE_STRANGER_ENTRIES == lib.SLUICE_STRANGER_SETS * lib.SLUICE_STRANGER_WAYS
    assert lib.SLUICE_STRANGER_ENTRIES == 1 << lib.SLUICE_STRANGER_INDEX_BITS
    assert lib.SLUICE_STRANGER_ENTRIES == 2 * lib.SLUICE_MAX_STRANGERS
    assert lib.SLUICE_MAX_KNOWN == lib.SLUICE_HOLD_LINES * lib.SLUICE_HOLD_MARKS
    assert ffi.sizeof("struct sluice_hold_marks") == lib.SLUICE_HOLD_MARKS == CACHE_LINE
    # The program takes interval and burst of a hold as one word.
    assert ffi.offsetof("struct sluice_hold", "interval_ns") == 0
    assert ffi.offsetof("struct sluice_hold", "until_ns") == 8
    assert ffi.sizeof("struct sluice_counters") % CACHE_LINE == 0
    # The program takes generation, home, class and flag of a peer as one word.
    word = ffi.offsetof("struct sluice_peer", "generation")
    assert word % 8 == 0
    assert ffi.offsetof("struct sluice_peer", "packets") == word + 8
    assert ffi.sizeof("struct sluice_stranger") == ffi.sizeof("struct sluice_stranger_set") == CACHE_LINE
    assert ffi.sizeof("struct sluice_known") % CACHE_LINE == 0


def test_abi_has_nothing_but_data() -> None:
    """cffi reads it: no function, no macro with arguments, no type of the compiler's choosing."""
    text = re.sub(r"/\*.*?\*/", "", (BPF / "include" / "abi.h").read_text(encoding="utf-8"), flags=re.DOTALL)
    assert not re.search(r"#define\s+\w+\(", text)
    fields = re.findall(r"^\t(\w+(?: \w+)?) \w+(?:\[\w+\])?;", text, re.MULTILINE)
    assert fields
    assert {kind for kind in fields if not kind.startswith("struct ")} <= {"__u8", "__u16", "__u32", "__u64"}
