# SPDX-License-Identifier: Apache-2.0
"""Loading: what comes out, what is refused and how it is told, and that nothing is left open."""

from __future__ import annotations

import errno
import gc
import os
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import bpf
from tests.kernel import frames
from tests.kernel.steer_runs import XDP_PASS
from tests.ordinary_user import nobodys_python
from xdp._libbpf import ffi, lib
from xdp.compile import compile_program, flatten
from xdp.errors import SluiceError, UnsupportedError, VerifierError
from xdp.maps import BpfMap
from xdp.policy import Policy
from xdp.program import PROGRAM_NAME, SteerProgram, load_bytecode
from xdp.tables import compile_policy

pytestmark = pytest.mark.bpf

ROOT = Path(__file__).resolve().parents[2]

# linux/bpf.h: r0 = 2 (XDP_PASS); exit; and r0 = *(u64 *)(r1 + 4096), which no context has.
PASS = struct.pack("=BBhi", 0xB7, 0, 0, 2)
EXIT = struct.pack("=BBhi", 0x95, 0, 0, 0)
BEYOND = struct.pack("=BBhi", 0x79, 0x10, 4096, 0)


def descriptors() -> set[str]:
    """What this process holds open, by what it is: descriptor numbers are reused."""
    found = []
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208
        try:
            found.append(f"{name} {os.readlink(f'/proc/self/fd/{name}')}")  # noqa: PTH115
        except FileNotFoundError:  # the listing's own
            continue
    return set(found)


def gone(open_by_id: Callable[[int], int], number: int) -> bool:
    fd = open_by_id(number)
    if fd >= 0:
        os.close(fd)
    return fd == -errno.ENOENT


def test_maps_of_the_program(steer_program: SteerProgram) -> None:
    """Names, sizes and types are those of abi.h."""
    size = ffi.sizeof
    address, known = size("struct sluice_address"), size("struct sluice_known")
    entries, sets = lib.SLUICE_STRANGER_ENTRIES, lib.SLUICE_STRANGER_SETS
    expected = {
        "generation": (lib.BPF_MAP_TYPE_ARRAY, 4, size("struct sluice_generation"), 1),
        "policies": (lib.BPF_MAP_TYPE_ARRAY, 4, size("struct sluice_policy"), lib.SLUICE_BANKS),
        "ports": (lib.BPF_MAP_TYPE_ARRAY, 4, size("struct sluice_port"), lib.SLUICE_PORTS_SIZE),
        "patterns": (lib.BPF_MAP_TYPE_ARRAY, 4, size("struct sluice_patterns"), lib.SLUICE_PATTERNS_SIZE),
        "rules": (lib.BPF_MAP_TYPE_ARRAY, 4, size("struct sluice_rule"), lib.SLUICE_RULES_SIZE),
        "known": (lib.BPF_MAP_TYPE_HASH, address, known, lib.SLUICE_MAX_KNOWN),
        "strangers": (lib.BPF_MAP_TYPE_ARRAY, 4, size("struct sluice_stranger"), entries),
        "strangers_away": (lib.BPF_MAP_TYPE_ARRAY, 4, size("struct sluice_away"), entries),
        "stranger_sets": (lib.BPF_MAP_TYPE_ARRAY, 4, size("struct sluice_stranger_set"), sets),
        "stranger_turns": (lib.BPF_MAP_TYPE_ARRAY, 4, size("struct sluice_stranger_turn"), sets),
        "stranger_room": (lib.BPF_MAP_TYPE_ARRAY, 4, size("struct sluice_stranger_room"), 1),
        "known_filter": (lib.BPF_MAP_TYPE_ARRAY, 4, size("struct sluice_filter"), lib.SLUICE_FILTER_SIZE),
        "lane_limits": (lib.BPF_MAP_TYPE_ARRAY, 4, size("struct sluice_bucket"), lib.SLUICE_MAX_LANES),
        "prefix_limits": (lib.BPF_MAP_TYPE_ARRAY, 4, size("struct sluice_bucket"), lib.SLUICE_PREFIX_BUCKETS),
        "counters": (lib.BPF_MAP_TYPE_ARRAY, 4, size("struct sluice_counters"), lib.sluice_possible_cpus()),
        "peer_holds": (lib.BPF_MAP_TYPE_ARRAY, 4, size("struct sluice_hold"), lib.SLUICE_MAX_KNOWN),
        "hold_marks": (lib.BPF_MAP_TYPE_ARRAY, 4, size("struct sluice_hold_marks"), lib.SLUICE_HOLD_LINES),
        "xsks": (lib.BPF_MAP_TYPE_XSKMAP, 4, 4, lib.SLUICE_XSKS_SIZE),
        **{
            f"prefixes_{bank}": (
                lib.BPF_MAP_TYPE_LPM_TRIE, size("struct sluice_prefix"),
                size("struct sluice_prefix_class"), lib.SLUICE_MAX_PREFIXES,
            )
            for bank in range(lib.SLUICE_BANKS)
        },
    }  # fmt: skip
    found = {
        name: (m.info.type, m.info.key_size, m.info.value_size, m.info.max_entries)
        for name, m in steer_program.maps.items()
    }
    for name, layout in expected.items():
        assert found[name] == layout, name
    assert set(found) - set(expected) == {"scratch"}
    assert ffi.sizeof("struct sluice_counters") % 64 == 0


def test_before_any_policy_everything_passes() -> None:
    with SteerProgram.load() as program:
        assert program.policy_maps.generation == 0
        assert program.policy_maps.tables is None
        for port in (0, 1, 53, 8001, 65535):
            run = program.test_run(frames.udp_frame("198.18.0.1", port, b"x"), repeat=3)
            assert run.retval == XDP_PASS
            assert run.data == frames.udp_frame("198.18.0.1", port, b"x")
        counters = program.counters()
        assert counters.balanced
        assert counters.seen.packets == counters.verdicts["pass_not_ours"].packets == 15


def test_two_programs_share_nothing() -> None:
    policy = Policy.parse('version = 1\n[[lane]]\nname = "a"\n[[service]]\nname = "s"\nports = [7]\n')
    with SteerProgram.load() as one, SteerProgram.load() as two:
        one.swap(compile_policy(policy))
        frame = frames.udp_frame("198.18.0.1", 7)
        one.test_run(frame)
        two.test_run(frame)
        assert "pass_policy" in one.counters().verdicts
        assert "pass_not_ours" in two.counters().verdicts
        assert one.cookie != two.cookie
        assert one.id != two.id


def test_successor_goes_on_where_the_program_was() -> None:
    policy = Policy.parse('version = 1\n[[lane]]\nname = "a"\n[[service]]\nname = "s"\nports = [7]\n')
    frame = frames.udp_frame("198.18.0.1", 7)
    with SteerProgram.load() as program:
        program.swap(compile_policy(policy))
        program.test_run(frame)
        with program.successor() as following:
            assert {m.info.id for m in following.maps.values()} == {m.info.id for m in program.maps.values()}
            following.test_run(frame)
            assert following.counters().verdicts["pass_policy"].packets == 2
        # The successor's end is not the program's.
        assert program.test_run(frame).retval == XDP_PASS


def test_no_descriptor_is_left_open() -> None:
    """Nor a program in the kernel, once it is closed."""
    SteerProgram.load().close()  # whatever bcc opens once and keeps
    gc.collect()
    before = descriptors()
    programs: list[int] = []
    maps: list[int] = []
    for _ in range(3):
        program = SteerProgram.load()
        with program.successor() as following:
            programs += [program.id, following.id]
            maps += [opened.info.id for opened in program.maps.values()]
        program.close()
        program.close()
    gc.collect()
    assert descriptors() == before
    # The kernel frees them after a grace period.
    deadline = time.monotonic() + 10
    for open_by_id, numbers in ((lib.sluice_prog_by_id, programs), (lib.sluice_map_by_id, maps)):
        for number in numbers:
            while not gone(open_by_id, number):
                assert time.monotonic() < deadline, number
                time.sleep(0.01)


def test_a_failed_load_leaves_nothing_open(monkeypatch: pytest.MonkeyPatch) -> None:
    SteerProgram.load().close()
    gc.collect()
    before = descriptors()
    source = bpf.source
    unbounded = (
        "int sluice_steer(struct xdp_md *ctx)\n{\n\tif (*(volatile u64 *)(long)ctx->data)\n\t\treturn 1;\n"
    )

    def broken(name: str) -> str:
        return source(name).replace("int sluice_steer(struct xdp_md *ctx)\n{\n", unbounded)

    monkeypatch.setattr(bpf, "source", broken)
    with pytest.raises(VerifierError) as caught:
        SteerProgram.load()
    message = str(caught.value)
    assert f"the kernel refused {PROGRAM_NAME}: " in message
    assert "invalid access to packet" in caught.value.detail
    assert caught.value.hint
    del caught
    gc.collect()
    assert descriptors() == before


def test_text_that_does_not_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    source = bpf.source
    monkeypatch.setattr(
        bpf,
        "source",
        lambda name: source(name).replace("int action = XDP_PASS, reason;", "int action;"),
    )
    with pytest.raises(
        VerifierError, match=r"bpf/steer\.bpf\.c does not compile: .*error: use of undeclared"
    ):
        compile_program("steer.bpf.c", "sluice_steer", defines=("SLUICE_CPUS=1",))


def test_flattened_text_has_each_header_once() -> None:
    text = flatten("steer.bpf.c")
    assert text.count("#define SLUICE_ABI_H") == 1
    assert '#include "' not in text
    assert '#line 1 "include/parse.h"' in text


def test_bytecode_that_the_verifier_refuses() -> None:
    with pytest.raises(VerifierError, match="the kernel refused bad: ") as caught:
        load_bytecode("bad", BEYOND + EXIT)
    assert "invalid bpf_context access" in caught.value.detail
    fd = load_bytecode("good", PASS + EXIT)
    os.close(fd)


def test_test_run_refuses_what_the_kernel_does(steer_program: SteerProgram) -> None:
    with pytest.raises(SluiceError, match="test run on 13 bytes: Invalid argument"):
        steer_program.test_run(bytes(13))
    with pytest.raises(SluiceError, match="test run"):
        steer_program.test_run(bytes(64), ifindex=0xFFFFFF)


def test_another_layout_is_no_successor(monkeypatch: pytest.MonkeyPatch) -> None:
    source = bpf.source
    with SteerProgram.load() as program:
        before = descriptors()
        monkeypatch.setattr(
            bpf,
            "source",
            lambda name: source(name).replace("lane_limits, SLUICE_MAX_LANES", "lane_limits, 16"),
        )
        with pytest.raises(SluiceError, match="another layout") as caught:
            program.successor()
        assert "sluice down" in caught.value.hint
        del caught
        gc.collect()
        assert descriptors() == before


def test_without_privileges_the_error_says_so() -> None:
    code = (
        "from xdp.errors import SluiceError\n"
        "from xdp.program import load_bytecode\n"
        "try:\n"
        f"    load_bytecode('x', {PASS + EXIT!r})\n"
        "except SluiceError as error:\n"
        "    print(type(error).__name__, error.exit_code, error, '|', error.hint)\n"
    )
    done = subprocess.run(
        nobodys_python("-c", code), capture_output=True, text=True, check=False, timeout=120, cwd="/"
    )
    assert done.stdout.startswith("PermissionsError 4 loading x: Operation not permitted | run as root"), (
        done.stderr
    )


def test_bcc_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bcc", None)
    with pytest.raises(UnsupportedError, match="bcc's Python module is missing") as caught:
        compile_program("steer.bpf.c", "sluice_steer")
    assert "python3-bpfcc" in caught.value.hint


def test_a_map_descriptor_that_is_none() -> None:
    reading, writing = os.pipe()
    os.close(writing)
    with pytest.raises(SluiceError, match="reading a map's description"):
        BpfMap(reading)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(reading)
