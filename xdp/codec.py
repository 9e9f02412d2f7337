# SPDX-License-Identifier: Apache-2.0
"""Turn the bytes of a map's key or value into plain Python values and back, as BTF says.

=================  ==========================================================================
in C               in Python, and so in JSON
=================  ==========================================================================
integer, bit field ``int``; ``bool`` for ``_Bool``
enum               the enumerator's name, ``int`` for a number without one
struct             ``dict`` in the order of the members; anonymous members are merged into it
union              ``dict`` of all its readings
array              ``list``
float, double      ``float``
pointer            ``int`` (the kernel's address, if it shows one)
=================  ==========================================================================

Encoding is the inverse, checks every range, and names the field that is wrong (``lane[3].limit.burst_ns``).
Struct members left out keep what they have in the ``base`` that the caller gives, or are zero.

A :class:`View` replaces how a struct of a given name reads: an address as "192.0.2.1" instead of four words.
Only the names are known here; where the bytes are is always BTF's word.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

from xdp.btf import Btf, BtfError, Kind, Member, Type
from xdp.errors import UsageError

Value = Any  # int, bool, float, str, list or dict, as json reads and writes them

#: Codecs nested deeper, or with more leaves, are refused: no map of ours comes near, and hostile BTF could
#: otherwise describe 64 bytes in so many overlapping ways that decoding them never ends.
MAX_DEPTH = 32
MAX_LEAVES = 1 << 20
MAX_BYTES = 16 << 20

_ORDER = sys.byteorder


class RangeError(UsageError):
    """A value that doesn't fit its type; the message names the field and what is allowed."""


class Codec(Protocol):
    """Reads and writes one type. ``size`` is in bytes."""

    size: int
    leaves: int

    def decode(self, raw: memoryview) -> Value:
        """The value in the first ``size`` bytes of ``raw``."""

    def encode(self, value: Value, raw: memoryview, path: str) -> None:
        """Write ``value`` into the first ``size`` bytes of ``raw``."""


class View(NamedTuple):
    """How structs of one name are shown; both functions work on what the struct decodes to without it.

    ``write`` raises `ValueError` with what is allowed.
    """

    read: Callable[[dict[str, Value]], Value]
    write: Callable[[Value], dict[str, Value]]


def decode(codec: Codec, raw: bytes | memoryview) -> Value:
    """Decode exactly ``codec.size`` bytes. Raises `BtfError` for any other number."""
    if len(raw) != codec.size:
        raise BtfError(f"{len(raw)} bytes where the type has {codec.size}")
    return codec.decode(memoryview(raw))


def encode(codec: Codec, value: Value, *, base: bytes | None = None, name: str = "value") -> bytes:
    """The bytes of ``value``; what it leaves out comes from ``base`` (default: zeros)."""
    raw = bytearray(base if base is not None else codec.size)
    if len(raw) != codec.size:
        raise BtfError(f"{len(raw)} bytes where the type has {codec.size}")
    codec.encode(value, memoryview(raw), name)
    return bytes(raw)


def make_codec(btf: Btf, type_id: int, views: Mapping[str, View] | None = None) -> Codec:
    """The codec of a type. Raises `BtfError` for types that are no data or contradict themselves."""
    return _Maker(btf, views or {}).make(type_id, 0)


class RawCodec:
    """Bytes of unknown meaning, in hexadecimal; what is left when a map has no BTF."""

    __slots__ = ("leaves", "size")

    def __init__(self, size: int) -> None:
        self.size = size
        self.leaves = 1

    def decode(self, raw: memoryview) -> Value:
        """As in `Codec`."""
        return raw[: self.size].hex()

    def encode(self, value: Value, raw: memoryview, path: str) -> None:
        """As in `Codec`."""
        try:
            made = bytes.fromhex(value) if isinstance(value, str) else b""
        except ValueError:
            made = b""
        if len(made) != self.size:
            raise RangeError(f"{path}: {_shown(value)} is not {self.size} bytes in hexadecimal")
        raw[: self.size] = made


class IntegerCodec:
    """A whole integer of 1, 2, 4, 8 or 16 bytes, or a bit field inside one."""

    __slots__ = ("boolean", "leaves", "mask", "maximum", "minimum", "name", "shift", "signed", "size")

    def __init__(
        self,
        size: int,
        *,
        signed: bool = False,
        boolean: bool = False,
        bits: int = 0,
        shift: int = 0,
        name: str = "",
    ) -> None:
        self.size = size
        self.leaves = 1
        bits = bits or size * 8
        self.signed = signed
        self.boolean = boolean
        self.shift = shift
        self.mask = (1 << bits) - 1
        self.minimum = -(1 << bits - 1) if signed else 0
        self.maximum = 1 if boolean else (1 << bits - int(signed)) - 1
        self.name = name or f"{'s' if signed else 'u'}{bits}"

    def number(self, raw: memoryview) -> int:
        """The integer as it is stored."""
        value = int.from_bytes(raw[: self.size], _ORDER) >> self.shift & self.mask
        return value - self.mask - 1 if self.signed and value > self.maximum else value

    def decode(self, raw: memoryview) -> Value:
        """As in `Codec`."""
        value = self.number(raw)
        return bool(value) if self.boolean and value <= 1 else value

    def encode(self, value: Value, raw: memoryview, path: str) -> None:
        """As in `Codec`."""
        if isinstance(value, str):
            value = _hexadecimal(value)
        if isinstance(value, bool) and not self.boolean:
            value = None
        if not isinstance(value, int) or not self.minimum <= value <= self.maximum:
            allowed = f"{self.name}: {self.minimum} to {self.maximum}"
            allowed = "true or false" if self.boolean else allowed
            raise RangeError(f"{path}: {_shown(value)} does not fit; allowed: {allowed}")
        word = int.from_bytes(raw[: self.size], _ORDER) & ~(self.mask << self.shift)
        raw[: self.size] = (word | (value & self.mask) << self.shift).to_bytes(self.size, _ORDER)


class EnumCodec(IntegerCodec):
    """An enum: names out, names or numbers in."""

    __slots__ = ("names", "numbers")

    def __init__(self, size: int, values: tuple[tuple[str, int], ...], *, signed: bool = False, bits: int = 0,
                 shift: int = 0, name: str = "") -> None:  # fmt: skip
        super().__init__(size, signed=signed, bits=bits, shift=shift, name=name or "enum")
        self.numbers = dict(values)
        # The first name of a number wins, as in C's own listings.
        self.names = {number: label for label, number in reversed(values)}

    def decode(self, raw: memoryview) -> Value:
        """As in `Codec`."""
        value = self.number(raw)
        return self.names.get(value, value)

    def encode(self, value: Value, raw: memoryview, path: str) -> None:
        """As in `Codec`."""
        if isinstance(value, str) and value in self.numbers:
            value = self.numbers[value]
        elif isinstance(value, str) and _hexadecimal(value) is None:
            names = ", ".join(list(self.numbers)[:8]) + (", ..." if len(self.numbers) > 8 else "")
            raise RangeError(f"{path}: no enumerator {value!r}; allowed: {names}")
        super().encode(value, raw, path)


class FloatCodec:
    """float and double."""

    __slots__ = ("layout", "leaves", "size")

    def __init__(self, size: int) -> None:
        self.size = size
        self.leaves = 1
        self.layout = struct.Struct({2: "=e", 4: "=f", 8: "=d"}[size])

    def decode(self, raw: memoryview) -> Value:
        """As in `Codec`."""
        return self.layout.unpack_from(raw)[0]

    def encode(self, value: Value, raw: memoryview, path: str) -> None:
        """As in `Codec`."""
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise RangeError(f"{path}: {_shown(value)} is not a number")
        try:
            self.layout.pack_into(raw, 0, value)
        except OverflowError:
            raise RangeError(f"{path}: {_shown(value)} does not fit into {self.size} bytes") from None


class ArrayCodec:
    """A fixed number of elements."""

    __slots__ = ("count", "element", "leaves", "size")

    def __init__(self, element: Codec, count: int) -> None:
        self.element = element
        self.count = count
        self.size = element.size * count
        self.leaves = max(1, element.leaves * count)

    def decode(self, raw: memoryview) -> Value:
        """As in `Codec`."""
        step = self.element.size
        return [self.element.decode(raw[i * step :]) for i in range(self.count)]

    def encode(self, value: Value, raw: memoryview, path: str) -> None:
        """As in `Codec`."""
        if not isinstance(value, list) or len(value) != self.count:
            raise RangeError(f"{path}: {_shown(value)} is not a list of {self.count}")
        step = self.element.size
        for i, one in enumerate(value):
            self.element.encode(one, raw[i * step : (i + 1) * step], f"{path}[{i}]")


class Field(NamedTuple):
    """A member of a struct: its codec reads at a byte offset. ``merged``: it has no name of its own."""

    name: str
    offset: int
    codec: Codec
    merged: bool


class StructCodec:
    """A struct: members in order."""

    __slots__ = ("fields", "leaves", "name", "size")

    def __init__(self, name: str, size: int, fields: tuple[Field, ...]) -> None:
        self.name = name
        self.size = size
        self.fields = fields
        self.leaves = 1 + sum(field.codec.leaves for field in fields)

    def decode(self, raw: memoryview) -> Value:
        """As in `Codec`."""
        out: dict[str, Value] = {}
        for field in self.fields:
            value = field.codec.decode(raw[field.offset :])
            if field.merged:
                out.update(value)
            else:
                out[field.name] = value
        return out

    def encode(self, value: Value, raw: memoryview, path: str) -> None:
        """As in `Codec`."""
        self.check(value, path)
        for field, part in self.parts(value):
            end = field.offset + field.codec.size
            field.codec.encode(
                part, raw[field.offset : end], path if field.merged else f"{path}.{field.name}"
            )

    def check(self, value: Value, path: str) -> None:
        """Raise for what is no object, or has a member that the struct has not."""
        if not isinstance(value, dict):
            raise RangeError(
                f"{path}: {_shown(value)} is not an object; members: {', '.join(self.members())}"
            )
        if unknown := [name for name in value if name not in self.members()]:
            raise RangeError(f"{path}: no member {unknown[0]!r}; allowed: {', '.join(self.members())}")

    def parts(self, value: dict[str, Value]) -> list[tuple[Field, Value]]:
        """What of ``value`` belongs to which field; fields that are left out are not in the list."""
        found = []
        for field in self.fields:
            if field.merged and isinstance(field.codec, StructCodec):
                inner = {name: value[name] for name in field.codec.members() if name in value}
                if inner:
                    found.append((field, inner))
            elif field.name in value:
                found.append((field, value[field.name]))
        return found

    def members(self) -> list[str]:
        """All names that the struct has, those of anonymous members included."""
        names: list[str] = []
        for field in self.fields:
            if field.merged and isinstance(field.codec, StructCodec):
                names += field.codec.members()
            else:
                names.append(field.name)
        return names


class UnionCodec(StructCodec):
    """A union: all readings out; in, any of them, which must agree where they overlap."""

    __slots__ = ()

    def encode(self, value: Value, raw: memoryview, path: str) -> None:
        """As in `Codec`."""
        self.check(value, path)
        parts = self.parts(value)
        images = []
        together = 0
        for field, part in parts:
            image = bytearray(self.size)
            field.codec.encode(part, memoryview(image), f"{path}.{field.name}")
            images.append((field, bytes(image)))
            together |= int.from_bytes(image, "little")
        if not images:
            return
        merged = together.to_bytes(self.size, "little")
        for field, expected in images:
            again = bytearray(self.size)
            field.codec.encode(field.codec.decode(memoryview(merged)), memoryview(again), path)
            if bytes(again) != expected:
                raise RangeError(
                    f"{path}: {field.name} contradicts another reading of the same bytes; give only one"
                )
        raw[: self.size] = merged


class ViewCodec:
    """A struct shown in another way."""

    __slots__ = ("inner", "leaves", "size", "view")

    def __init__(self, inner: StructCodec, view: View) -> None:
        self.inner = inner
        self.view = view
        self.size = inner.size
        self.leaves = inner.leaves

    def decode(self, raw: memoryview) -> Value:
        """As in `Codec`."""
        return self.view.read(self.inner.decode(raw))

    def encode(self, value: Value, raw: memoryview, path: str) -> None:
        """As in `Codec`."""
        try:
            plain = self.view.write(value)
        except ValueError as error:
            raise RangeError(f"{path}: {_shown(value)} does not fit; allowed: {error}") from None
        self.inner.encode(plain, raw, path)


class _Maker:
    """Makes codecs for the types of one BTF object, each once."""

    def __init__(self, btf: Btf, views: Mapping[str, View]) -> None:
        self.btf = btf
        self.views = views
        self.made: dict[int, Codec] = {}

    def make(self, type_id: int, depth: int) -> Codec:
        kind = self.btf.resolve(type_id)
        if kind.id in self.made:
            return self.made[kind.id]
        # A struct that holds itself gets here again and again, so the depth is what ends it.
        if depth > MAX_DEPTH:
            raise BtfError(f"BTF type {kind.name or kind.id} is nested deeper than {MAX_DEPTH}")
        codec = self.build(kind, depth)
        if codec.leaves > MAX_LEAVES:
            raise BtfError(f"BTF type {kind.name or kind.id} has more than {MAX_LEAVES} values")
        if codec.size > MAX_BYTES:
            raise BtfError(f"BTF type {kind.name or kind.id} has {codec.size} bytes, more than {MAX_BYTES}")
        self.made[kind.id] = codec
        return codec

    def build(self, kind: Type, depth: int) -> Codec:
        match kind.kind:
            case Kind.INT | Kind.ENUM | Kind.ENUM64:
                return self.number(kind, kind.bits, kind.bit_offset, kind.size)
            case Kind.POINTER:
                return IntegerCodec(kind.size, name="pointer")
            case Kind.FLOAT if kind.size in (2, 4, 8):
                return FloatCodec(kind.size)
            case Kind.ARRAY:
                return ArrayCodec(self.make(kind.target, depth + 1), kind.count)
            case Kind.STRUCT | Kind.UNION:
                fields = tuple(self.field(kind, i, member, depth) for i, member in enumerate(kind.members))
                if kind.kind is Kind.UNION:
                    return UnionCodec(kind.name, kind.size, fields)
                plain = StructCodec(kind.name, kind.size, fields)
                return ViewCodec(plain, self.views[kind.name]) if kind.name in self.views else plain
        raise BtfError(
            f"BTF type {kind.name or kind.id} ({kind.kind.name.lower()}) is no data that can be decoded"
        )

    def field(self, parent: Type, number: int, member: Member, depth: int) -> Field:
        kind = self.btf.resolve(member.type_id)
        offset, bit = divmod(member.bit_offset, 8)
        partial = kind.kind is Kind.INT and (kind.bit_offset or kind.bits != kind.size * 8)
        codec: Codec
        if member.bit_size or bit or partial:
            if kind.kind not in (Kind.INT, Kind.ENUM, Kind.ENUM64):
                raise BtfError(f"BTF {parent.name or parent.id}.{member.name} is a bit field but no integer")
            offset, bit = divmod(member.bit_offset + kind.bit_offset, 8)
            bits = member.bit_size or kind.bits
            if bits > kind.bits:
                raise BtfError(f"BTF {parent.name or parent.id}.{member.name} has {bits} of {kind.bits} bits")
            codec = self.number(kind, bits, bit, (bit + bits + 7) // 8)
        else:
            codec = self.make(member.type_id, depth + 1)
        if offset + codec.size > parent.size:
            raise BtfError(f"BTF {parent.name or parent.id}.{member.name} ends past the {parent.size} bytes")
        merged = not member.name and isinstance(codec, StructCodec)
        return Field(member.name or f"anonymous_{number}", offset, codec, merged)

    @staticmethod
    def number(kind: Type, bits: int, bit: int, size: int) -> IntegerCodec:
        """An int or enum of ``bits`` bits; BTF counts ``bit`` from the end that comes first in memory."""
        shift = bit if _ORDER == "little" else size * 8 - bits - bit
        if kind.kind is Kind.INT:
            whole = bits == kind.size * 8
            return IntegerCodec(size, signed=kind.signed, boolean=kind.boolean, bits=bits, shift=shift,
                                name=kind.name if whole else "")  # fmt: skip
        return EnumCodec(size, kind.values, signed=kind.signed, bits=bits, shift=shift, name=kind.name)


def _hexadecimal(text: str) -> int | None:
    """The number that "0x1f" spells, None for any other text."""
    try:
        return int(text, 16) if text[:2] in ("0x", "0X") else None
    except ValueError:
        return None


def _shown(value: Value) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
