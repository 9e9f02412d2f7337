# SPDX-License-Identifier: Apache-2.0
"""One BPF map, by descriptor: single entries, all entries, entries by the ten thousand.

Keys and values are bytes in the kernel's layout (bpf/include/abi.h); naming
their fields is :mod:`xdp.btf`'s.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from xdp._libbpf import ffi, lib
from xdp.errors import SluiceError

#: Entries asked for in one batch call.  A hash map answers ENOSPC where one of
#: its buckets holds more than there is room for; then the number is doubled.
BATCH_ENTRIES = 4096

PER_CPU_TYPES = frozenset(
    (lib.BPF_MAP_TYPE_PERCPU_HASH, lib.BPF_MAP_TYPE_PERCPU_ARRAY, lib.BPF_MAP_TYPE_LRU_PERCPU_HASH)
)


@dataclass(frozen=True)
class MapInfo:
    """What the kernel says of a map; sizes in bytes."""

    type: int
    id: int
    name: str
    key_size: int
    value_size: int
    max_entries: int
    flags: int
    btf_id: int
    btf_key_type_id: int
    btf_value_type_id: int


class BpfMap:
    """A map that this process holds a descriptor of; ``close`` gives it up."""

    def __init__(self, fd: int) -> None:
        """Takes over ``fd``; closed again if the kernel does not know it as a map."""
        raw = ffi.new("struct sluice_map_info *")
        result = lib.sluice_map_info(fd, raw)
        if result < 0:
            os.close(fd)
            raise SluiceError.from_errno("reading a map's description", -result)
        self.fd = fd
        self.info = MapInfo(
            type=raw.type,
            id=raw.id,
            name=ffi.string(raw.name).decode(errors="replace"),
            key_size=raw.key_size,
            value_size=raw.value_size,
            max_entries=raw.max_entries,
            flags=raw.map_flags,
            btf_id=raw.btf_id,
            btf_key_type_id=raw.btf_key_type_id,
            btf_value_type_id=raw.btf_value_type_id,
        )
        per_cpu = self.info.type in PER_CPU_TYPES
        #: Bytes of one entry as system calls copy it: per-CPU maps give all CPUs' values,
        #: each rounded up to 8 bytes (Documentation/bpf/map_hash.rst).
        self.entry_size = (
            (self.info.value_size + 7) // 8 * 8 * lib.sluice_possible_cpus()
            if per_cpu
            else self.info.value_size
        )

    @classmethod
    def by_id(cls, map_id: int) -> BpfMap:
        """Needs CAP_SYS_ADMIN, as the kernel asks for access by id."""
        fd = lib.sluice_map_by_id(map_id)
        if fd < 0:
            raise SluiceError.from_errno(f"opening map {map_id}", -fd)
        return cls(fd)

    def lookup(self, key: bytes) -> bytes | None:
        """The value (of all CPUs, one after the other, in a per-CPU map), or None."""
        value = ffi.new("char[]", self.entry_size)
        result = lib.sluice_map_lookup(self.fd, ffi.from_buffer("char[]", self._checked_key(key)), value)
        if result == -errno.ENOENT:
            return None
        self._check("reading", result)
        return bytes(ffi.buffer(value, self.entry_size))

    def update(self, key: bytes, value: bytes, flags: int = 0) -> None:
        """Write one entry; ``flags`` as of bpf(2): BPF_ANY, BPF_NOEXIST, BPF_EXIST."""
        if len(value) != self.entry_size:
            raise SluiceError(f"map {self.info.name}: a value has {self.entry_size} bytes, not {len(value)}")
        key_data = ffi.from_buffer("char[]", self._checked_key(key))
        result = lib.sluice_map_update(self.fd, key_data, ffi.from_buffer("char[]", value), flags)
        self._check("writing", result)

    def delete(self, key: bytes) -> bool:
        """False if there was no such entry."""
        result = lib.sluice_map_delete(self.fd, ffi.from_buffer("char[]", self._checked_key(key)))
        if result == -errno.ENOENT:
            return False
        self._check("deleting from", result)
        return True

    def items(self) -> Iterator[tuple[bytes, bytes]]:
        """All entries, in batches where the kernel can (5.6 and later for hashes).

        While others write, an entry may be missed or seen twice; no entry is torn
        beyond what the kernel itself tears.
        """
        key_size, value_size = self.info.key_size, self.entry_size
        for keys, values, count in self._batches():
            key_bytes, value_bytes = bytes(ffi.buffer(keys)), bytes(ffi.buffer(values))
            for index in range(count):
                yield (
                    key_bytes[index * key_size : (index + 1) * key_size],
                    value_bytes[index * value_size : (index + 1) * value_size],
                )

    def keys(self) -> Iterator[bytes]:
        """All keys, one call each: for the map types whose values cannot be read (XSKMAP)."""
        key = ffi.NULL
        while True:
            following = ffi.new("char[]", self.info.key_size)
            result = lib.sluice_map_next_key(self.fd, key, following)
            if result == -errno.ENOENT:
                return
            self._check("listing", result)
            yield bytes(ffi.buffer(following))
            key = following

    def update_many(self, keys: Any, values: Any, count: int) -> None:
        """Write ``count`` entries from C arrays of keys and values, in as few calls as can be."""
        key_bytes, value_bytes = ffi.cast("char *", keys), ffi.cast("char *", values)
        written = 0
        while written < count:
            amount = ffi.new("uint32_t *", count - written)
            result = lib.sluice_map_update_batch(
                self.fd,
                key_bytes + written * self.info.key_size,
                value_bytes + written * self.entry_size,
                amount,
                lib.BPF_ANY,
            )
            written += amount[0] if result < 0 else count - written
            if result < 0:
                self._check("writing", result)

    def delete_many(self, keys: Any, count: int) -> None:
        """Delete ``count`` entries given by a C array of keys; absent ones are skipped."""
        key_bytes = ffi.cast("char *", keys)
        for index in range(count):
            result = lib.sluice_map_delete(self.fd, key_bytes + index * self.info.key_size)
            if result != -errno.ENOENT:
                self._check("deleting from", result)

    def map_memory(self, *, writable: bool = False) -> mmap.mmap:
        """The array's own memory (BPF_F_MMAPABLE); values lie ``(value_size + 7) // 8 * 8`` apart."""
        stride = (self.info.value_size + 7) // 8 * 8
        length = -(-stride * self.info.max_entries // mmap.PAGESIZE) * mmap.PAGESIZE
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        return mmap.mmap(self.fd, length, flags=mmap.MAP_SHARED, prot=protection)

    def close(self) -> None:
        """Give up the descriptor; idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def _batches(self) -> Iterator[tuple[Any, Any, int]]:
        entries = BATCH_ENTRIES
        keys, values = self._room(entries)
        # Opaque to us; for hashes a bucket number, for tries and arrays a key.
        position = ffi.new("char[]", max(self.info.key_size, 8))
        started = False
        while True:
            count = ffi.new("uint32_t *", entries)
            origin = position if started else ffi.NULL
            result = lib.sluice_map_lookup_batch(self.fd, origin, position, keys, values, count)
            if result == -errno.ENOSPC:
                entries *= 2
                keys, values = self._room(entries)
                continue
            if result in (-errno.EOPNOTSUPP, -errno.EINVAL, -524) and not started:  # 524: ENOTSUPP
                yield from self._one_by_one()
                return
            if result not in (0, -errno.ENOENT):
                self._check("reading", result)
            yield keys, values, count[0]
            if result == -errno.ENOENT:
                return
            started = True

    def _one_by_one(self) -> Iterator[tuple[Any, Any, int]]:
        for key in self.keys():
            value = self.lookup(key)
            if value is not None:
                yield ffi.from_buffer("char[]", key), ffi.from_buffer("char[]", value), 1

    def _room(self, entries: int) -> tuple[Any, Any]:
        return ffi.new("char[]", entries * self.info.key_size), ffi.new("char[]", entries * self.entry_size)

    def _checked_key(self, key: bytes) -> bytes:
        if len(key) != self.info.key_size:
            raise SluiceError(f"map {self.info.name}: a key has {self.info.key_size} bytes, not {len(key)}")
        return key

    def _check(self, what: str, result: int) -> None:
        if result < 0:
            raise SluiceError.from_errno(f"{what} map {self.info.name}", -result)
