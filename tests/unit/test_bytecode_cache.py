# SPDX-License-Identifier: Apache-2.0
"""Compiled programs in files: what was stored is read, and nothing that others could have written."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest

from xdp.bytecode import Bytecode, MapDefinition, with_constants, with_maps
from xdp.bytecode_cache import MAX_KEPT, fetch, key_of, store

_LOAD = struct.Struct("<BBhi")
EXIT = _LOAD.pack(0x95, 0, 0, 0)
MARK = 0x5C1DE7C0_F00DF00D
SOME = Bytecode(
    EXIT,
    (MapDefinition("counts", 2, 4, 8, 16, 0, 0, 1, 2), MapDefinition("sockets", 17, 4, 4, 8, 0)),
    (b"\x9f\xeb types",),
)


def load64(registers: int, value: int) -> bytes:
    lower, upper = struct.unpack("<ii", struct.pack("<Q", value))
    return _LOAD.pack(0x18, registers, 0, lower) + _LOAD.pack(0, 0, 0, upper)


def test_what_is_stored_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "programs"
    key = key_of("text", "function")
    assert fetch(key, folder) is None
    assert store(key, SOME, folder)
    assert fetch(key, folder) == SOME
    assert fetch(key_of("text", "other"), folder) is None
    assert [path.name for path in folder.iterdir()] == [key]


def test_parts_of_a_key_do_not_run_together() -> None:
    assert len({key_of("ab", "c"), key_of("a", "bc"), key_of("abc"), key_of("ab\0c"), key_of("", "abc")}) == 5


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-1],
        lambda content: content[:10],
        lambda content: b"",
        lambda content: content.replace(b"counts", b"counto"),
        lambda content: content + b" ",
    ],
)
def test_a_damaged_file_is_not_used(tmp_path: Path, damage: object) -> None:
    assert store("key", SOME, tmp_path)
    path = tmp_path / "key"
    path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
    assert fetch("key", tmp_path) is None
    assert store("key", SOME, tmp_path)
    assert fetch("key", tmp_path) == SOME


def test_what_others_can_write_is_neither_read_nor_written(tmp_path: Path) -> None:
    folder = tmp_path / "programs"
    assert store("key", SOME, folder)
    (folder / "key").chmod(0o666)
    assert fetch("key", folder) is None
    (folder / "key").chmod(0o600)
    assert fetch("key", folder) == SOME
    for place in (folder, tmp_path):
        place.chmod(0o777)
        assert fetch("key", folder) is None
        assert not store("another", SOME, folder)
        place.chmod(0o755)
    assert fetch("key", folder) == SOME


def test_links_are_not_followed(tmp_path: Path) -> None:
    folder = tmp_path / "programs"
    assert store("key", SOME, folder)
    (folder / "link").symlink_to(folder / "key")
    assert fetch("link", folder) is None


def test_a_place_that_can_not_be_used_is_no_error(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    assert fetch("key", blocked) is None
    assert not store("key", SOME, blocked / "below")


def test_the_least_used_go_first(tmp_path: Path) -> None:
    for number in range(MAX_KEPT):
        assert store(f"key{number}", SOME, tmp_path)
        os.utime(tmp_path / f"key{number}", (number, number))
    assert fetch("key0", tmp_path) == SOME  # just used
    assert store("one more", SOME, tmp_path)
    left = {path.name for path in tmp_path.iterdir()}
    assert len(left) == MAX_KEPT
    assert {"key0", "one more", "key2"} <= left
    assert "key1" not in left


def test_map_descriptors_are_replaced_only_where_they_stand() -> None:
    """The second half of a 64-bit load, and loads of other constants, stay."""
    text = load64(0x11, 7 << 32 | 7) + load64(0x01, 7) + EXIT
    changed = with_maps(text, {7: 99})
    assert changed[:16] == load64(0x11, 7 << 32 | 99)
    assert changed[16:] == text[16:]


def test_constants_are_replaced_only_where_they_stand() -> None:
    text = load64(0x01, MARK) + load64(0x11, MARK) + _LOAD.pack(0xB7, 1, 0, MARK & 0x7FFF_FFFF) + EXIT
    for value in (0, 1, 0xFFFF_FFFF, 1 << 63, (1 << 64) - 1):
        changed = with_constants(text, {MARK: value})
        assert changed[:16] == load64(0x01, value)
        assert changed[16:] == text[16:]


def test_a_constant_that_nothing_loads_is_an_error() -> None:
    with pytest.raises(KeyError, match="no instruction loads 0x2"):
        with_constants(load64(1, MARK) + EXIT, {MARK: 1, 2: 3})
