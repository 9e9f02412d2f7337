# SPDX-License-Identifier: Apache-2.0
"""BTF made by hand and by hypothesis: parsing, codecs, round trips, and blobs that lie."""

from __future__ import annotations

import json
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xdp.btf import MAGIC, Btf, BtfError, Kind
from xdp.codec import (
    Codec,
    RangeError,
    RawCodec,
    View,
    decode,
    encode,
    make_codec,
)


class Builder:
    """Writes BTF; each method returns the new type's number."""

    def __init__(self) -> None:
        self.names = bytearray(1)
        self.types = bytearray()
        self.count = 0

    def name(self, text: str) -> int:
        if not text:
            return 0
        offset = len(self.names)
        self.names += text.encode() + b"\0"
        return offset

    def add(
        self, kind: int, name: str, word: int, tail: bytes = b"", *, vlen: int = 0, flag: bool = False
    ) -> int:
        self.types += struct.pack("=III", self.name(name), flag << 31 | kind << 24 | vlen, word) + tail
        self.count += 1
        return self.count

    def integer(
        self, name: str, size: int, *, signed: bool = False, boolean: bool = False, bits: int = 0
    ) -> int:
        encoding = int(signed) | int(boolean) << 2
        return self.add(Kind.INT, name, size, struct.pack("=I", encoding << 24 | (bits or size * 8)))

    def array(self, element: int, count: int) -> int:
        return self.add(Kind.ARRAY, "", 0, struct.pack("=III", element, 1, count))

    def struct(self, name: str, size: int, members: list[tuple[str, int, int]], *, kind: Kind = Kind.STRUCT,
               bits: list[int] | None = None) -> int:  # fmt: skip
        tail = b""
        for i, (member, type_id, offset) in enumerate(members):
            width = bits[i] << 24 if bits else 0
            tail += struct.pack("=III", self.name(member), type_id, offset | width)
        return self.add(kind, name, size, tail, vlen=len(members), flag=bits is not None)

    def enum(self, name: str, size: int, values: dict[str, int], *, flag: bool = False) -> int:
        tail = b"".join(struct.pack("=Ii", self.name(label), number) for label, number in values.items())
        return self.add(Kind.ENUM, name, size, tail, vlen=len(values), flag=flag)

    def blob(self) -> bytes:
        types, names = bytes(self.types), bytes(self.names)
        return (
            struct.pack("=HBBIIIII", MAGIC, 1, 0, 24, 0, len(types), len(types), len(names)) + types + names
        )

    def codec(self, type_id: int, **views: View) -> Codec:
        return make_codec(Btf.parse(self.blob()), type_id, views)


def test_integers_of_every_width() -> None:
    b = Builder()
    for size in (1, 2, 4, 8):
        unsigned = b.codec(b.integer("unsigned", size))
        signed = b.codec(b.integer("signed", size, signed=True))
        assert decode(unsigned, b"\xff" * size) == (1 << size * 8) - 1
        assert decode(signed, b"\xff" * size) == -1
        assert encode(signed, -(1 << size * 8 - 1)) == (1 << size * 8 - 1).to_bytes(size, "little")
        with pytest.raises(RangeError, match=r"value: -1 does not fit; allowed: unsigned: 0 to"):
            encode(unsigned, -1)


@pytest.mark.parametrize("bad", [256, -1, 1.0, True, None, "x", "0x100", "0x", [1], {}])
def test_an_integer_takes_no_other_thing(bad: Any) -> None:
    b = Builder()
    with pytest.raises(RangeError, match="allowed: u8: 0 to 255"):
        encode(b.codec(b.integer("u8", 1)), bad)


def test_hexadecimal_text_is_a_number_too() -> None:
    b = Builder()
    assert encode(b.codec(b.integer("u16", 2)), "0xBEEF") == struct.pack("=H", 0xBEEF)


def test_bool() -> None:
    b = Builder()
    codec = b.codec(b.integer("_Bool", 1, boolean=True))
    assert decode(codec, b"\1") is True
    assert decode(codec, b"\2") == 2  # what is stored, even if C would not
    assert encode(codec, True) == b"\1"
    with pytest.raises(RangeError, match="true or false"):
        encode(codec, 2)


def test_struct_with_padding_keeps_what_is_left_out() -> None:
    b = Builder()
    u8, u64 = b.integer("u8", 1), b.integer("u64", 8)
    codec = b.codec(b.struct("pair", 16, [("small", u8, 0), ("large", u64, 64)]))
    base = bytes(range(16))
    assert encode(codec, {"small": 9}, base=base) == b"\x09" + base[1:]
    assert encode(codec, {"large": 1}) == bytes(8) + struct.pack("=Q", 1)
    with pytest.raises(RangeError, match=r"value: no member 'medium'; allowed: small, large"):
        encode(codec, {"medium": 1})
    with pytest.raises(RangeError, match=r"value\.small: 300 does not fit"):
        encode(codec, {"small": 300})
    with pytest.raises(RangeError, match="is not an object"):
        encode(codec, 5)


def test_arrays_name_the_element_that_is_wrong() -> None:
    b = Builder()
    u8 = b.integer("u8", 1)
    lanes = b.struct("lane", 2, [("end", u8, 0), ("over", u8, 8)])
    codec = b.codec(b.struct("policy", 4, [("lane", b.array(lanes, 2), 0)]))
    good = {"lane": [{"end": 1, "over": 2}, {"end": 3, "over": 4}]}
    assert encode(codec, good) == bytes([1, 2, 3, 4])
    assert decode(codec, bytes([1, 2, 3, 4])) == good
    with pytest.raises(RangeError, match=r"policy\.lane\[1\]\.over: 256"):
        encode(codec, {"lane": [{}, {"over": 256}]}, name="policy")
    with pytest.raises(RangeError, match="is not a list of 2"):
        encode(codec, {"lane": [{}]})


def test_bit_fields_touch_only_their_bits() -> None:
    b = Builder()
    u32, s32 = b.integer("u32", 4), b.integer("int", 4, signed=True)
    codec = b.codec(
        b.struct("flags", 4, [("low", u32, 0), ("middle", s32, 3), ("high", u32, 12)], bits=[3, 9, 20])
    )
    raw = (5 | (-7 & 0x1FF) << 3 | 0xABCDE << 12).to_bytes(4, "little")
    assert decode(codec, raw) == {"low": 5, "middle": -7, "high": 0xABCDE}
    assert encode(codec, {"middle": 0}, base=raw) == (5 | 0xABCDE << 12).to_bytes(4, "little")
    with pytest.raises(RangeError, match=r"low: 8 does not fit; allowed: u3: 0 to 7"):
        encode(codec, {"low": 8})


def test_bit_fields_of_old_compilers() -> None:
    """Without the flag a bit field is an int type that uses few of its bits."""
    b = Builder()
    three = b.integer("unsigned int", 4, bits=3)
    codec = b.codec(b.struct("old", 4, [("a", three, 0), ("b", three, 3)]))
    assert decode(codec, bytes([0b110101, 0, 0, 0])) == {"a": 5, "b": 6}


def test_enum_names_and_numbers() -> None:
    b = Builder()
    codec = b.codec(b.enum("action", 4, {"PASS": 0, "DROP": 1, "ALIAS": 1, "ODD": -2}))
    assert decode(codec, struct.pack("=I", 1)) == "DROP"
    assert decode(codec, struct.pack("=i", -2)) == "ODD"
    assert decode(codec, struct.pack("=I", 77)) == 77
    assert encode(codec, "ALIAS") == encode(codec, 1) == struct.pack("=I", 1)
    with pytest.raises(RangeError, match="no enumerator 'STEER'; allowed: PASS, DROP, ALIAS, ODD"):
        encode(codec, "STEER")
    signed = b.codec(b.enum("signed", 4, {"MINUS": -1}, flag=True))
    assert decode(signed, struct.pack("=i", -5)) == -5


def test_enum64() -> None:
    b = Builder()
    tail = struct.pack("=III", b.name("BIG"), 1, 0x80000000)
    codec = b.codec(b.add(Kind.ENUM64, "wide", 8, tail, vlen=1))
    assert decode(codec, struct.pack("=Q", 0x80000000_00000001)) == "BIG"


def test_union_reads_all_ways_and_refuses_contradictions() -> None:
    b = Builder()
    u8, u32 = b.integer("u8", 1), b.integer("u32", 4)
    codec = b.codec(b.struct("both", 4, [("word", u32, 0), ("octets", b.array(u8, 4), 0)], kind=Kind.UNION))
    assert decode(codec, bytes([1, 2, 0, 0])) == {"word": 0x201, "octets": [1, 2, 0, 0]}
    assert encode(codec, {"octets": [1, 2, 0, 0]}) == bytes([1, 2, 0, 0])
    assert encode(codec, {"word": 0x201, "octets": [1, 2, 0, 0]}) == bytes([1, 2, 0, 0])
    with pytest.raises(RangeError, match="contradicts"):
        encode(codec, {"word": 0x201, "octets": [1, 3, 0, 0]})


def test_anonymous_members_are_merged() -> None:
    b = Builder()
    u32 = b.integer("u32", 4)
    inner = b.struct("", 4, [("a", u32, 0)])
    codec = b.codec(b.struct("outer", 8, [("", inner, 0), ("b", u32, 32)]))
    assert decode(codec, struct.pack("=II", 1, 2)) == {"a": 1, "b": 2}
    assert encode(codec, {"a": 1, "b": 2}) == struct.pack("=II", 1, 2)


def test_typedefs_modifiers_pointers_and_floats() -> None:
    b = Builder()
    u32 = b.integer("u32", 4)
    const = b.add(Kind.CONST, "", b.add(Kind.TYPEDEF, "__u32", b.add(Kind.TYPE_TAG, "tag", u32)))
    pointer = b.add(Kind.POINTER, "", const)
    double = b.add(Kind.FLOAT, "double", 8)
    b.add(Kind.FUNCTION_PROTOTYPE, "", 0, bytes(8), vlen=1)
    b.add(Kind.VARIABLE, "v", u32, bytes(4))
    b.add(Kind.DATA_SECTION, ".data", 4, bytes(12), vlen=1)
    b.add(Kind.DECLARATION_TAG, "tag", u32, bytes(4))
    codec = b.codec(b.struct("mixed", 24, [("n", const, 0), ("p", pointer, 64), ("d", double, 128)]))
    raw = struct.pack("=I4xQd", 7, 0xFFFF8880_00000000, 0.5)
    assert decode(codec, raw) == {"n": 7, "p": 0xFFFF8880_00000000, "d": 0.5}
    assert encode(codec, decode(codec, raw)) == raw
    with pytest.raises(RangeError, match="is not a number"):
        encode(codec, {"d": "0.5"})
    single = b.codec(b.add(Kind.FLOAT, "float", 4))
    with pytest.raises(RangeError, match="does not fit into 4 bytes"):
        encode(single, 1e300)


def test_a_view_replaces_a_struct_by_name() -> None:
    def read(value: dict[str, Any]) -> str:
        return f"{value['high']}.{value['low']}"

    def write(value: Any) -> dict[str, Any]:
        high, dot, low = str(value).partition(".")
        if not (dot and high.isdecimal() and low.isdecimal()):
            raise ValueError('"HIGH.LOW"')
        return {"high": int(high), "low": int(low)}

    b = Builder()
    u8 = b.integer("u8", 1)
    version = b.struct("version", 2, [("low", u8, 0), ("high", u8, 8)])
    codec = b.codec(b.array(version, 2), version=View(read, write))
    assert decode(codec, bytes([1, 2, 3, 4])) == ["2.1", "4.3"]
    assert encode(codec, ["2.1", "4.3"]) == bytes([1, 2, 3, 4])
    with pytest.raises(RangeError, match=r"value\[1\]: 'x' does not fit; allowed: \"HIGH.LOW\""):
        encode(codec, ["2.1", "x"])


def test_raw_bytes_without_btf() -> None:
    codec = RawCodec(3)
    assert decode(codec, b"\0\x01\xff") == "0001ff"
    assert encode(codec, "0001ff") == b"\0\x01\xff"
    for bad in ("0001", "zz", 5, None):
        with pytest.raises(RangeError, match="is not 3 bytes in hexadecimal"):
            encode(codec, bad)


def test_the_wrong_number_of_bytes_is_refused() -> None:
    b = Builder()
    codec = b.codec(b.integer("u32", 4))
    with pytest.raises(BtfError, match="3 bytes where the type has 4"):
        decode(codec, bytes(3))
    with pytest.raises(BtfError, match="5 bytes where the type has 4"):
        encode(codec, 1, base=bytes(5))


# --- types that lie -----------------------------------------------------------------------------------


def refused(b: Builder, type_id: int, match: str) -> None:
    with pytest.raises(BtfError, match=match):
        b.codec(type_id)


def test_endless_types_are_refused() -> None:
    b = Builder()
    refused(b, b.add(Kind.TYPEDEF, "loop", 1), "typedef of itself")
    b = Builder()
    refused(b, b.struct("self", 4, [("again", 1, 0)]), "nested deeper than 32")
    b = Builder()
    refused(b, b.array(1, 1), "nested deeper than 32")


def test_explosive_types_are_refused() -> None:
    b = Builder()
    u8 = b.integer("u8", 1)
    refused(b, b.array(u8, 0xFFFFFFFF), "more than 1048576 values")
    empty = b.struct("empty", 0, [])
    refused(b, b.array(empty, 0xFFFFFFFF), "more than 1048576 values")
    last = u8
    for depth in range(20):  # 4^20 readings of one byte
        last = b.struct(f"union{depth}", 1, [(f"m{i}", last, 0) for i in range(4)], kind=Kind.UNION)
    refused(b, last, "more than 1048576 values")
    refused(b, b.struct("huge", 0xFFFFFFFF, []), "4294967295 bytes")


def test_members_outside_of_their_struct_are_refused() -> None:
    b = Builder()
    u32, u64 = b.integer("u32", 4), b.integer("u64", 8)
    refused(b, b.struct("short", 4, [("long", u64, 0)]), "ends past the 4 bytes")
    array = b.array(u32, 1)
    refused(b, b.struct("bits", 4, [("f", array, 0)], bits=[3]), "bit field but no integer")
    refused(b, b.struct("wide", 8, [("f", u32, 0)], bits=[33]), "has 33 of 32 bits")
    refused(b, b.struct("last", 4, [("f", u32, 1)]), "ends past the 4 bytes")
    refused(b, b.struct("outside", 4, [("f", u32, 4096)]), "has a member at bit 4096 of 4 bytes")


@pytest.mark.parametrize("kind", [Kind.FORWARD, Kind.FUNCTION, Kind.FUNCTION_PROTOTYPE, Kind.VOID])
def test_what_is_no_data_is_refused(kind: Kind) -> None:
    b = Builder()
    type_id = b.add(kind, "thing", 0) if kind else 0
    refused(b, type_id, "is no data")


def test_numbers_of_types_that_are_not_there() -> None:
    b = Builder()
    refused(b, 5, "names type 5, but has 1 types")
    refused(b, b.array(99, 1), "names type 99")


GOOD = Builder()
GOOD.struct("s", 4, [("a", GOOD.integer("u32", 4), 0)])
GOOD_BLOB = GOOD.blob()


@pytest.mark.parametrize(
    ("blob", "match"),
    [
        (b"", "shorter than its header"),
        (GOOD_BLOB[:23], "shorter than its header"),
        (b"\0" + GOOD_BLOB[1:], "byte order"),
        (GOOD_BLOB[:2] + b"\2" + GOOD_BLOB[3:], "version 2"),
        (GOOD_BLOB[:4] + struct.pack("=I", 8) + GOOD_BLOB[8:], "header of 8 bytes"),
        (GOOD_BLOB[:-1], "end past"),
        (GOOD_BLOB[:-1] + b"x", "zero byte"),
        (GOOD_BLOB[:12] + struct.pack("=I", 20) + GOOD_BLOB[16:], "middle of a type"),
        (GOOD_BLOB[:24] + struct.pack("=I", 999) + GOOD_BLOB[28:], "past the end"),
        (GOOD_BLOB[:28] + struct.pack("=I", 31 << 24) + GOOD_BLOB[32:], "kind 31"),
        (GOOD_BLOB[:32] + struct.pack("=I", 3) + GOOD_BLOB[36:], "32 bits at 0 in 3 bytes"),
    ],
)
def test_blobs_that_contradict_themselves(blob: bytes, match: str) -> None:
    with pytest.raises(BtfError, match=match):
        Btf.parse(blob)


@given(st.binary(max_size=400))
def test_random_types_never_do_worse_than_btf_error(types: bytes) -> None:
    header = struct.pack("=HBBIIIII", MAGIC, 1, 0, 24, 0, len(types), len(types), 8)
    exercise(header + types + b"\0abcdef\0")


@given(st.lists(st.tuples(st.integers(24, len(GOOD_BLOB) - 1), st.integers(0, 255)), max_size=6))
def test_mutated_types_never_do_worse_than_btf_error(changes: list[tuple[int, int]]) -> None:
    blob = bytearray(GOOD_BLOB)
    for offset, value in changes:
        blob[offset] = value
    exercise(bytes(blob))


def exercise(blob: bytes) -> None:
    """Parse and use every type; only `BtfError` may come out, and sizes must hold."""
    try:
        btf = Btf.parse(blob)
    except BtfError:
        return
    for one in btf.types:
        try:
            codec = make_codec(btf, one.id)
        except BtfError:
            continue
        if codec.size <= 4096:
            assert json.dumps(decode(codec, bytes(codec.size)))


# --- round trips --------------------------------------------------------------------------------------


@st.composite
def layouts(draw: st.DrawFn) -> tuple[Builder, int, int]:
    """A packed type of random shape: (builder, type, size). Packed, so that every byte is a value's."""
    b = Builder()
    pool = [(b.integer(f"{'s' if signed else 'u'}{size}", size, signed=signed), size)
            for size in (1, 2, 4, 8) for signed in (False, True)]  # fmt: skip
    pool.append((b.enum("e", 4, {"ZERO": 0, "ONE": 1, "MANY": 1000}), 4))
    for number in range(draw(st.integers(1, 6))):
        if draw(st.booleans()):
            element, size = draw(st.sampled_from(pool))
            count = draw(st.integers(1, 4))
            pool.append((b.array(element, count), size * count))
        else:
            members, offset = [], 0
            for i in range(draw(st.integers(1, 4))):
                type_id, size = draw(st.sampled_from(pool))
                members.append((f"m{i}", type_id, offset * 8))
                offset += size
            pool.append((b.struct(f"s{number}", offset, members), offset))
    type_id, size = pool[-1]
    return b, type_id, size


@given(layouts(), st.data())
def test_every_value_survives_json(layout: tuple[Builder, int, int], data: st.DataObject) -> None:
    b, type_id, size = layout
    codec = b.codec(type_id)
    assert codec.size == size
    raw = data.draw(st.binary(min_size=size, max_size=size))
    value = json.loads(json.dumps(decode(codec, raw)))
    assert encode(codec, value) == raw
