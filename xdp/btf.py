# SPDX-License-Identifier: Apache-2.0
"""Read BTF, the kernel's description of types (Documentation/bpf/btf.rst).

Every map of a loaded program names the BTF types of its key and its value, so a tool that meets the map
later can decode it without a second copy of the layout.  :meth:`Btf.parse` checks the whole blob: BTF comes
from the kernel, but another program may have put it there, so nothing in it is trusted.  Sizes, offsets and
type numbers are checked here; chains of types without end are found when a codec is made (:mod:`xdp.codec`).

Only what describes data is kept: functions, variables and tags parse, and stay opaque.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Callable
from dataclasses import dataclass

from xdp.errors import SluiceError

MAGIC = 0xEB9F
VERSION = 1
#: The kernel's own limit on type numbers and names (BTF_MAX_TYPE, BTF_MAX_NAME_OFFSET in btf.h).
MAX_TYPES = 0x000FFFFF
#: No map of ours comes near; vmlinux's BTF has 6 MB and is not what this is for.
MAX_SIZE = 16 << 20
#: Typedefs of typedefs; the kernel stops at the same depth (MAX_RESOLVE_DEPTH).
MAX_MODIFIERS = 32

_HEADER = struct.Struct("=HBBIIIII")
_TYPE = struct.Struct("=III")
_ARRAY = struct.Struct("=III")
_MEMBER = struct.Struct("=III")
_ENUM = struct.Struct("=Ii")
_ENUM64 = struct.Struct("=III")


class BtfError(SluiceError):
    """BTF that contradicts itself, or a type that can't be decoded."""


class Kind(enum.IntEnum):
    """BTF_KIND_*."""

    VOID = 0
    INT = 1
    POINTER = 2
    ARRAY = 3
    STRUCT = 4
    UNION = 5
    ENUM = 6
    FORWARD = 7
    TYPEDEF = 8
    VOLATILE = 9
    CONST = 10
    RESTRICT = 11
    FUNCTION = 12
    FUNCTION_PROTOTYPE = 13
    VARIABLE = 14
    DATA_SECTION = 15
    FLOAT = 16
    DECLARATION_TAG = 17
    TYPE_TAG = 18
    ENUM64 = 19


#: Kinds that only point to another type.
MODIFIERS = frozenset({Kind.TYPEDEF, Kind.VOLATILE, Kind.CONST, Kind.RESTRICT, Kind.TYPE_TAG})


@dataclass(frozen=True, slots=True)
class Member:
    """One member of a struct or union. ``bit_size`` is 0 unless it is a bit field declared as such."""

    name: str
    type_id: int
    bit_offset: int
    bit_size: int


@dataclass(frozen=True, slots=True)
class Type:
    """One type.  What a field means depends on the kind, as in the kernel's ``struct btf_type``."""

    id: int
    kind: Kind
    name: str
    size: int = 0  # bytes; 0 for kinds without a size of their own
    target: int = 0  # type pointed to, element type of an array
    count: int = 0  # elements of an array
    signed: bool = False
    boolean: bool = False
    bits: int = 0  # of an int: how many of its bytes' bits are used
    bit_offset: int = 0
    members: tuple[Member, ...] = ()
    values: tuple[tuple[str, int], ...] = ()  # of an enum


@dataclass(frozen=True, slots=True)
class Btf:
    """All types of one BTF object; number 0 is void."""

    types: tuple[Type, ...]

    @classmethod
    def parse(cls, blob: bytes) -> Btf:
        """Check and read a blob as BPF_OBJ_GET_INFO_BY_FD gives it. Raises `BtfError`."""
        return _parse(blob)

    def type(self, type_id: int) -> Type:
        """The type of that number. Raises `BtfError` when there is none."""
        if not 0 <= type_id < len(self.types):
            raise BtfError(f"BTF names type {type_id}, but has {len(self.types)} types")
        return self.types[type_id]

    def resolve(self, type_id: int) -> Type:
        """The type behind typedefs, const, volatile, restrict and tags."""
        start = type_id
        for _ in range(MAX_MODIFIERS):
            found = self.type(type_id)
            if found.kind not in MODIFIERS:
                return found
            type_id = found.target
        raise BtfError(f"BTF type {start} is a typedef of itself, or a chain of more than {MAX_MODIFIERS}")

    def find(self, name: str, kind: Kind) -> Type | None:
        """The first type of that name and kind."""
        return next((one for one in self.types if one.name == name and one.kind is kind), None)


class _Reader:
    """A cursor over the section of types that never reads past its end."""

    __slots__ = ("blob", "end", "names", "offset")

    def __init__(self, blob: bytes, offset: int, end: int, names: bytes) -> None:
        self.blob = blob
        self.offset = offset
        self.end = end
        self.names = names

    def take(self, layout: struct.Struct) -> tuple[int, ...]:
        start = self.offset
        self.offset += layout.size
        if self.offset > self.end:
            raise BtfError("BTF ends in the middle of a type")
        return layout.unpack_from(self.blob, start)

    def word(self) -> int:
        return self.take(_WORD)[0]

    def name(self, offset: int) -> str:
        if offset >= len(self.names):
            raise BtfError(f"BTF names a string at {offset}, past the end of {len(self.names)} bytes")
        # The section was checked to end with a zero byte.
        return self.names[offset : self.names.index(0, offset)].decode("utf-8", "backslashreplace")


_WORD = struct.Struct("=I")


def _parse(blob: bytes) -> Btf:
    if len(blob) < _HEADER.size:
        raise BtfError(f"BTF of {len(blob)} bytes is shorter than its header")
    if len(blob) > MAX_SIZE:
        raise BtfError(f"BTF of {len(blob)} bytes is larger than {MAX_SIZE}")
    magic, version, _flags, header, type_offset, type_size, name_offset, name_size = _HEADER.unpack_from(blob)
    if magic != MAGIC:
        raise BtfError(f"not BTF of this machine's byte order: magic {magic:#06x}, not {MAGIC:#06x}")
    if version != VERSION:
        raise BtfError(f"BTF version {version} is not known, only {VERSION}")
    if header < _HEADER.size:
        raise BtfError(f"BTF header of {header} bytes is too short")
    for what, offset, size in (("types", type_offset, type_size), ("strings", name_offset, name_size)):
        if header + offset + size > len(blob):
            raise BtfError(f"BTF's {what} end past its {len(blob)} bytes")
    names = blob[header + name_offset : header + name_offset + name_size]
    if not names or names[0] or names[-1]:
        raise BtfError("BTF's strings neither begin nor end as they must, with a zero byte")
    reader = _Reader(blob, header + type_offset, header + type_offset + type_size, names)
    types = [Type(0, Kind.VOID, "void")]
    while reader.offset < reader.end:
        if len(types) > MAX_TYPES:
            raise BtfError(f"BTF has more than {MAX_TYPES} types")
        types.append(_read_type(reader, len(types)))
    return Btf(tuple(types))


def _read_type(reader: _Reader, type_id: int) -> Type:
    name_offset, info, size_or_type = reader.take(_TYPE)
    number = info >> 24 & 0x1F
    try:
        kind = Kind(number)
    except ValueError:
        # Its length is unknown, so nothing after it can be read.
        raise BtfError(f"BTF type {type_id} has kind {number}, which is newer than this program") from None
    name = reader.name(name_offset)
    return _READERS[kind](reader, type_id, kind, name, size_or_type, info & 0xFFFF, bool(info >> 31))


_ReadKind = Callable[[_Reader, int, Kind, str, int, int, bool], Type]


def _read_int(r: _Reader, type_id: int, kind: Kind, name: str, size: int, _count: int, _flag: bool) -> Type:
    word = r.word()
    encoding, bit_offset, bits = word >> 24 & 0x0F, word >> 16 & 0xFF, word & 0xFF
    if size not in (1, 2, 4, 8, 16) or not 0 < bits <= 128 or bit_offset + bits > size * 8:
        raise BtfError(f"BTF int {name or type_id} has {bits} bits at {bit_offset} in {size} bytes")
    # BTF_INT_SIGNED is 1, BTF_INT_CHAR 2, BTF_INT_BOOL 4
    return Type(type_id, kind, name, size, signed=bool(encoding & 1), boolean=bool(encoding & 4),
                bits=bits, bit_offset=bit_offset)  # fmt: skip


def _read_array(
    r: _Reader, type_id: int, kind: Kind, name: str, _size: int, _count: int, _flag: bool
) -> Type:
    element, _index, elements = r.take(_ARRAY)
    return Type(type_id, kind, name, target=element, count=elements)


def _read_members(r: _Reader, type_id: int, kind: Kind, name: str, size: int, count: int, flag: bool) -> Type:
    members = []
    for _ in range(count):
        member_name, member_type, offset = r.take(_MEMBER)
        # With the flag set the offset's upper byte is the width of a bit field.
        bit_offset, bit_size = (offset & 0xFFFFFF, offset >> 24) if flag else (offset, 0)
        if bit_offset + bit_size > size * 8 or (kind is Kind.UNION and bit_offset):
            raise BtfError(
                f"BTF {kind.name.lower()} {name or type_id} has a member at bit {bit_offset} of {size} bytes"
            )
        members.append(Member(r.name(member_name), member_type, bit_offset, bit_size))
    return Type(type_id, kind, name, size, members=tuple(members))


def _read_enum(r: _Reader, type_id: int, kind: Kind, name: str, size: int, count: int, flag: bool) -> Type:
    if size not in (1, 2, 4, 8):
        raise BtfError(f"BTF enum {name or type_id} has {size} bytes")
    mask = (1 << size * 8) - 1
    values = []
    for _ in range(count):
        if kind is Kind.ENUM64:
            value_name, low, high = r.take(_ENUM64)
            value = high << 32 | low
            value -= (value >> 63) << 64
        else:
            value_name, value = r.take(_ENUM)
        values.append((r.name(value_name), value))
    # Compilers older than the flag (clang 14 is one) never set it, but wrote negative values as such.
    signed = flag or (any(value < 0 for _, value in values) and kind is Kind.ENUM)
    labels = tuple((label, value if signed else value & mask) for label, value in values)
    return Type(type_id, kind, name, size, signed=signed, bits=size * 8, values=labels)


def _read_plain(r: _Reader, type_id: int, kind: Kind, name: str, word: int, count: int, _flag: bool) -> Type:
    """Kinds without anything to decode behind the common part but what has to be skipped."""
    skip = {
        Kind.FUNCTION_PROTOTYPE: 2 * count,
        Kind.DATA_SECTION: 3 * count,
        Kind.VARIABLE: 1,
        Kind.DECLARATION_TAG: 1,
    }
    for _ in range(skip.get(kind, 0)):
        r.word()
    if kind is Kind.FLOAT:
        if word not in (2, 4, 8, 12, 16):
            raise BtfError(f"BTF float {name or type_id} has {word} bytes")
        return Type(type_id, kind, name, word)
    if kind in MODIFIERS or kind is Kind.POINTER:
        return Type(type_id, kind, name, size=8 if kind is Kind.POINTER else 0, target=word)
    return Type(type_id, kind, name)


_READERS: dict[Kind, _ReadKind] = dict.fromkeys(Kind, _read_plain) | {
    Kind.INT: _read_int,
    Kind.ARRAY: _read_array,
    Kind.STRUCT: _read_members,
    Kind.UNION: _read_members,
    Kind.ENUM: _read_enum,
    Kind.ENUM64: _read_enum,
}
