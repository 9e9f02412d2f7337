# SPDX-License-Identifier: Apache-2.0
"""A compiled program apart from any kernel object: instructions, maps to be made, their types.

A compiler's output refers to maps that exist already.  Here a map is a definition with a number, and the
instructions name the number; so the same bytecode can be kept in a file (:mod:`xdp.bytecode_cache`) and
loaded as often as one likes, each time with maps of its own or on those of a running program.
"""

from __future__ import annotations

import base64
import errno
import json
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from xdp._libbpf import ffi, lib
from xdp.errors import SluiceError, UnsupportedError
from xdp.maps import BpfMap

# struct bpf_insn: BPF_LD | BPF_IMM | BPF_DW, whose source register says what its 64 bits are.
_INSTRUCTION = struct.Struct("<BBhi")
_LOAD_IMMEDIATE_64 = 0x18
_CONSTANT = 0
_PSEUDO_MAP_FD = 1


@dataclass(frozen=True)
class MapDefinition:
    """What the kernel needs to know to make one; sizes in bytes, ``btf`` counts in Bytecode.btf, -1: none."""

    name: str
    type: int
    key_size: int
    value_size: int
    max_entries: int
    flags: int
    btf: int = -1
    btf_key_type_id: int = 0
    btf_value_type_id: int = 0


@dataclass(frozen=True)
class Bytecode:
    """Instructions whose map loads carry a number of ``maps``; ``btf``: blobs, the types of the maps."""

    instructions: bytes
    maps: tuple[MapDefinition, ...]
    btf: tuple[bytes, ...] = ()

    @classmethod
    def of_loaded(
        cls, instructions: bytes, descriptors: Mapping[str, int], *, placeholders: Iterable[int] = ()
    ) -> Bytecode:
        """From a compiler's output: instructions that refer to existing maps by descriptor.

        ``placeholders`` are no descriptors, but stand for maps that the compiler can't make.
        """
        blobs: dict[int, bytes] = {}
        maps = []
        for name, descriptor in descriptors.items():
            found = BpfMap(os.dup(descriptor))
            found.close()
            info = found.info
            if info.btf_id and info.btf_id not in blobs:
                blobs[info.btf_id] = _types(info.btf_id)
            maps.append(
                MapDefinition(
                    name,
                    info.type,
                    info.key_size,
                    info.value_size,
                    info.max_entries,
                    info.flags,
                    list(blobs).index(info.btf_id) if info.btf_id else -1,
                    info.btf_key_type_id,
                    info.btf_value_type_id,
                )
            )
        numbers = {descriptor: number for number, descriptor in enumerate(descriptors.values())}
        numbers |= {placeholder: placeholder for placeholder in placeholders}
        return cls(with_maps(instructions, numbers), tuple(maps), tuple(blobs.values()))

    def make_maps(self) -> dict[str, BpfMap]:
        """New maps, empty, the caller's to close.  Raises UnsupportedError where the kernel makes none."""
        made: dict[str, BpfMap] = {}
        types: list[int] = []
        try:
            for blob in self.btf:
                fd = lib.sluice_btf_load(ffi.from_buffer("char[]", blob), len(blob))
                types.append(_must(fd, "types"))
            for one in self.maps:
                info = ffi.new("struct sluice_map_info *")
                info.type, info.key_size, info.value_size = one.type, one.key_size, one.value_size
                info.max_entries, info.map_flags = one.max_entries, one.flags
                info.name = one.name.encode()[: lib.BPF_OBJ_NAME_LEN - 1]
                info.btf_key_type_id, info.btf_value_type_id = one.btf_key_type_id, one.btf_value_type_id
                fd = lib.sluice_map_make(info, types[one.btf] if one.btf >= 0 else -1)
                made[one.name] = BpfMap(_must(fd, f"the map {one.name}"))
        except BaseException:
            for opened in made.values():
                opened.close()
            raise
        finally:
            for descriptor in types:
                os.close(descriptor)
        return made

    def on(self, maps: Mapping[str, BpfMap], *, placeholders: Mapping[int, BpfMap] | None = None) -> bytes:
        """Instructions for these maps, to be loaded while they are open."""
        descriptors = {number: maps[one.name].fd for number, one in enumerate(self.maps)}
        descriptors |= {number: one.fd for number, one in (placeholders or {}).items()}
        return with_maps(self.instructions, descriptors)

    def fits(self, maps: Mapping[str, BpfMap]) -> bool:
        """Whether these maps are of the kinds and sizes that this program expects."""
        expected = {one.name: (one.type, one.key_size, one.value_size, one.max_entries) for one in self.maps}
        return expected == {
            name: (m.info.type, m.info.key_size, m.info.value_size, m.info.max_entries)
            for name, m in maps.items()
        }

    def to_json(self) -> str:
        """For a file; :meth:`from_json` reads it."""
        return json.dumps(
            {
                "instructions": base64.b64encode(self.instructions).decode(),
                "maps": [asdict(one) for one in self.maps],
                "btf": [base64.b64encode(blob).decode() for blob in self.btf],
            }
        )

    @classmethod
    def from_json(cls, text: str) -> Bytecode:
        """Raises ValueError, KeyError or TypeError for what to_json did not write."""
        raw: dict[str, Any] = json.loads(text)
        return cls(
            base64.b64decode(raw["instructions"], validate=True),
            tuple(MapDefinition(**one) for one in raw["maps"]),
            tuple(base64.b64decode(blob, validate=True) for blob in raw["btf"]),
        )


def _must(result: int, what: str) -> int:
    if result >= 0:
        return result
    root = "run as root (or with CAP_BPF and CAP_NET_ADMIN); `sluice doctor` says what is missing"
    hint = root if -result == errno.EPERM else ""
    raise UnsupportedError.from_errno(f"the kernel refused to make {what}", -result, hint=hint)


def _types(btf_id: int) -> bytes:
    descriptor = lib.sluice_btf_by_id(btf_id)
    if descriptor < 0:
        raise SluiceError.from_errno("reading the types of a map", -descriptor)
    try:
        size = lib.sluice_btf_raw(descriptor, ffi.NULL, 0, ffi.NULL)
        blob = ffi.new("char[]", max(size, 1))
        size = lib.sluice_btf_raw(descriptor, blob, size, ffi.NULL) if size >= 0 else size
    finally:
        os.close(descriptor)
    if size < 0:
        raise SluiceError.from_errno("reading the types of a map", -size)
    return bytes(ffi.buffer(blob, size))


def _loads(instructions: bytes) -> Iterator[tuple[int, int, int, int, int]]:
    """Offset, registers and jump of each 64-bit load, and the lower and upper half of what it loads."""
    offset = 0
    while offset < len(instructions):
        opcode, registers, jump, lower = _INSTRUCTION.unpack_from(instructions, offset)
        if opcode != _LOAD_IMMEDIATE_64:
            offset += _INSTRUCTION.size
            continue
        upper = _INSTRUCTION.unpack_from(instructions, offset + _INSTRUCTION.size)[3]
        yield offset, registers, jump, lower, upper
        offset += 2 * _INSTRUCTION.size


def with_maps(instructions: bytes, descriptors: Mapping[int, int]) -> bytes:
    """The same instructions with other map descriptors (or numbers) in their loads."""
    changed = bytearray(instructions)
    for offset, registers, jump, lower, _ in _loads(instructions):
        if registers >> 4 == _PSEUDO_MAP_FD:
            _INSTRUCTION.pack_into(changed, offset, _LOAD_IMMEDIATE_64, registers, jump, descriptors[lower])
    return bytes(changed)


def with_constants(instructions: bytes, values: Mapping[int, int]) -> bytes:
    """The same instructions with other 64-bit constants: ``values`` in place of the marks that are its keys.

    Raises KeyError for a mark that no instruction loads: the program would run without its value.
    """
    changed = bytearray(instructions)
    found = set()
    for offset, registers, jump, lower, upper in _loads(instructions):
        mark = (upper & 0xFFFF_FFFF) << 32 | lower & 0xFFFF_FFFF
        if registers >> 4 != _CONSTANT or mark not in values:
            continue
        found.add(mark)
        halves = struct.unpack("<ii", struct.pack("<Q", values[mark]))
        _INSTRUCTION.pack_into(changed, offset, _LOAD_IMMEDIATE_64, registers, jump, halves[0])
        _INSTRUCTION.pack_into(changed, offset + _INSTRUCTION.size, 0, 0, 0, halves[1])
    if missing := set(values) - found:
        raise KeyError(f"no instruction loads {', '.join(map(hex, sorted(missing)))}")
    return bytes(changed)
