# SPDX-License-Identifier: Apache-2.0
"""Map access: one entry, all, and by the ten thousand; every type that the program has."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from xdp._libbpf import ffi, lib
from xdp.btf import Btf, Kind
from xdp.errors import SluiceError
from xdp.inventory import btf_blob
from xdp.maps import BATCH_ENTRIES, BpfMap
from xdp.program import SteerProgram

pytestmark = pytest.mark.bpf

NO_PREALLOC = 1  # BPF_F_NO_PREALLOC, linux/bpf.h


@pytest.fixture
def make_map() -> Iterator[Callable[..., BpfMap]]:
    made: list[BpfMap] = []

    def create(kind: int, key: int = 4, value: int = 8, entries: int = 16, flags: int = 0) -> BpfMap:
        fd = lib.sluice_map_create(kind, b"sluice_test", key, value, entries, flags, -1)
        assert fd >= 0, os.strerror(-fd)
        made.append(BpfMap(fd))
        return made[-1]

    yield create
    for one in made:
        one.close()
        one.close()


def number(value: int) -> bytes:
    return struct.pack("=I", value)


def wide(value: int) -> bytes:
    return struct.pack("=Q", value)


def test_one_entry(make_map: Callable[..., BpfMap]) -> None:
    table = make_map(lib.BPF_MAP_TYPE_HASH)
    assert table.info.name == "sluice_test"
    assert (table.info.key_size, table.info.value_size, table.info.max_entries) == (4, 8, 16)
    assert table.lookup(number(1)) is None
    assert not table.delete(number(1))
    table.update(number(1), wide(5))
    assert table.lookup(number(1)) == wide(5)
    with pytest.raises(SluiceError) as caught:
        table.update(number(1), wide(6), lib.BPF_NOEXIST)
    assert caught.value.errno == errno.EEXIST
    assert "sluice_test" in str(caught.value)
    with pytest.raises(SluiceError) as caught:
        table.update(number(2), wide(6), lib.BPF_EXIST)
    assert caught.value.errno == errno.ENOENT
    assert table.delete(number(1))
    assert table.lookup(number(1)) is None


def test_sizes_are_checked_before_the_kernel_reads(make_map: Callable[..., BpfMap]) -> None:
    table = make_map(lib.BPF_MAP_TYPE_HASH)
    for key in (b"", b"abc", b"abcde"):
        for use in (table.lookup, table.delete):
            with pytest.raises(SluiceError, match="a key has 4 bytes"):
                use(key)
        with pytest.raises(SluiceError, match="a key has 4 bytes"):
            table.update(key, wide(1))
    for value in (b"", bytes(7), bytes(9)):
        with pytest.raises(SluiceError, match="a value has 8 bytes"):
            table.update(number(1), value)


@pytest.mark.parametrize("kind", [lib.BPF_MAP_TYPE_HASH, lib.BPF_MAP_TYPE_LRU_HASH])
@pytest.mark.parametrize("count", [0, 1, BATCH_ENTRIES - 1, BATCH_ENTRIES, BATCH_ENTRIES + 1, 30_000])
def test_many_entries(make_map: Callable[..., BpfMap], kind: int, count: int) -> None:
    table = make_map(kind, entries=2 * 30_000 + 4096)
    keys = ffi.new("uint32_t[]", list(range(count)))
    values = ffi.new("uint64_t[]", [3 * key for key in range(count)])
    table.update_many(keys, values, count)
    assert dict(table.items()) == {number(key): wide(3 * key) for key in range(count)}
    assert sorted(table.keys()) == sorted(number(key) for key in range(count))
    # Every other one, and some that are not there.
    some = ffi.new("uint32_t[]", [key for key in range(count + 10) if key % 2])
    table.delete_many(some, len(some))
    assert {key for key, _ in table.items()} == {number(key) for key in range(count) if key % 2 == 0}


def test_a_bucket_that_does_not_fit_into_a_batch(
    make_map: Callable[..., BpfMap], monkeypatch: pytest.MonkeyPatch
) -> None:
    """ENOSPC: ask again with more room, and miss nothing."""
    monkeypatch.setattr("xdp.maps.BATCH_ENTRIES", 1)
    table = make_map(lib.BPF_MAP_TYPE_HASH, entries=1024)
    keys = ffi.new("uint32_t[]", list(range(1024)))
    table.update_many(keys, ffi.new("uint64_t[]", 1024), 1024)
    found = [key for key, _ in table.items()]
    assert len(found) == len(set(found)) == 1024


def test_a_trie(make_map: Callable[..., BpfMap]) -> None:
    table = make_map(lib.BPF_MAP_TYPE_LPM_TRIE, key=8, entries=10_000, flags=NO_PREALLOC)
    entries = {struct.pack("=I4s", 32, struct.pack("!I", 0x0A000000 + n)): wide(n) for n in range(5000)}
    entries[struct.pack("=I4s", 0, bytes(4))] = wide(99)
    table.update_many(
        ffi.from_buffer("char[]", b"".join(entries)),
        ffi.from_buffer("char[]", b"".join(entries.values())),
        len(entries),
    )
    assert dict(table.items()) == entries
    assert table.lookup(struct.pack("=I4s", 32, bytes([192, 0, 2, 1]))) == wide(99)


def test_per_cpu_values(make_map: Callable[..., BpfMap]) -> None:
    cpus = lib.sluice_possible_cpus()
    table = make_map(lib.BPF_MAP_TYPE_PERCPU_ARRAY, value=4, entries=3)
    assert table.entry_size == 8 * cpus
    value = b"".join(struct.pack("=II", cpu + 1, 0) for cpu in range(cpus))
    table.update(number(2), value)
    assert table.lookup(number(2)) == value
    assert dict(table.items()) == {number(0): bytes(8 * cpus), number(1): bytes(8 * cpus), number(2): value}


def test_a_full_map_says_which(make_map: Callable[..., BpfMap]) -> None:
    table = make_map(lib.BPF_MAP_TYPE_HASH, entries=100)
    keys = ffi.new("uint32_t[]", list(range(1000)))
    with pytest.raises(SluiceError, match="writing map sluice_test") as caught:
        table.update_many(keys, ffi.new("uint64_t[]", 1000), 1000)
    assert caught.value.errno == errno.E2BIG
    assert sum(1 for _ in table.items()) == 100


def test_mapped_memory(make_map: Callable[..., BpfMap]) -> None:
    """Written by one way, read by the other; entries lie 8 bytes apart."""
    table = make_map(lib.BPF_MAP_TYPE_ARRAY, value=5, entries=700, flags=lib.BPF_F_MMAPABLE)
    table.update(number(699), b"abcde")
    with table.map_memory(writable=True) as memory:
        assert memory[699 * 8 : 699 * 8 + 5] == b"abcde"
        memory[8:13] = b"12345"
        assert table.lookup(number(1)) == b"12345"
    with table.map_memory() as memory, pytest.raises(TypeError):
        memory[0:1] = b"x"


def test_maps_by_id(steer_program: SteerProgram) -> None:
    known = steer_program.maps["known"]
    other = BpfMap.by_id(known.info.id)
    try:
        assert other.fd != known.fd
        assert other.info == known.info
    finally:
        other.close()
    with pytest.raises(SluiceError, match="opening map 4294967295"):
        BpfMap.by_id(0xFFFFFFFF)


#: The struct of abi.h that each map's value is.
VALUES = {
    "generation": "sluice_generation", "policies": "sluice_policy", "ports": "sluice_port",
    "patterns": "sluice_patterns", "rules": "sluice_rule", "known": "sluice_known",
    "strangers": "sluice_stranger",
    "prefixes_0": "sluice_prefix_class", "prefixes_1": "sluice_prefix_class", "lane_limits": "sluice_bucket",
    "prefix_limits": "sluice_bucket", "counters": "sluice_counters", "known_filter": "sluice_filter",
    "strangers_away": "sluice_away", "stranger_sets": "sluice_stranger_set",
    "stranger_room": "sluice_stranger_room",
    "stranger_turns": "sluice_stranger_turn", "peer_holds": "sluice_hold", "hold_marks": "sluice_hold_marks",
}  # fmt: skip
KEYS = {"known": "sluice_address", "prefixes_0": "sluice_prefix",
        "prefixes_1": "sluice_prefix"}  # fmt: skip


@pytest.mark.parametrize("name", VALUES)
def test_btf_says_what_abi_says(steer_program: SteerProgram, name: str) -> None:
    """Tools learn the layout from BTF, we from the header: field by field the same."""
    info = steer_program.maps[name].info
    btf = Btf.parse(btf_blob(info.btf_id))
    check_type(btf, info.btf_value_type_id, f"struct {VALUES[name]}")
    if name in KEYS:
        check_type(btf, info.btf_key_type_id, f"struct {KEYS[name]}")


def check_type(btf: Btf, type_id: int, declaration: Any) -> None:
    """``declaration`` is what cffi calls the type; it was made from abi.h."""
    want: Any = ffi.typeof(declaration) if isinstance(declaration, str) else declaration
    found = btf.resolve(type_id)
    if want.kind == "primitive":
        assert (found.kind, found.size) == (Kind.INT, ffi.sizeof(want))
    elif want.kind == "array":
        assert (found.kind, found.count) == (Kind.ARRAY, want.length)
        check_type(btf, found.target, want.item)
    else:
        assert want.kind == "struct"
        assert (found.kind, f"struct {found.name}", found.size) == (Kind.STRUCT, want.cname, ffi.sizeof(want))
        assert len(found.members) == len(want.fields)
        for member, (name, field) in zip(found.members, want.fields, strict=True):
            assert (member.name, member.bit_offset) == (name, 8 * field.offset)
            check_type(btf, member.type_id, field.type)
