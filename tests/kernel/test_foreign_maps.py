# SPDX-License-Identifier: Apache-2.0
"""`sluice map` over maps that say nothing about themselves, and what no map lets anybody do."""

from __future__ import annotations

import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from sluice_cli.idle_socket import IdleSocket
from sluice_cli.map_view import MapView, active_bank, parse_json, parse_key
from xdp import inventory
from xdp._libbpf import lib
from xdp.errors import NotLoadedError, SluiceError, UnsupportedError, UsageError
from xdp.maps import BpfMap
from xdp.names import Names

pytestmark = [pytest.mark.root, pytest.mark.bpf]


def make(kind: int, key: int, value: int, entries: int = 8) -> int:
    descriptor: int = lib.sluice_map_create(kind, b"foreign", key, value, entries, 0, 0)
    assert descriptor >= 0, os.strerror(-descriptor)
    return descriptor


@pytest.fixture
def view(request: pytest.FixtureRequest) -> Iterator[MapView]:
    """A view of a map of this kind and these sizes, which has no BTF."""
    descriptor = make(*request.param)
    loaded = SimpleNamespace(maps={"foreign": 1}, map=lambda _name: BpfMap(os.dup(descriptor)))
    try:
        with MapView(cast("inventory.Loaded", loaded), "foreign", Names()) as made:
            yield made
    finally:
        os.close(descriptor)


HASH, ARRAY = lib.BPF_MAP_TYPE_HASH, lib.BPF_MAP_TYPE_ARRAY


@pytest.mark.parametrize("view", [(HASH, 4, 3)], indirect=True)
def test_numbers_as_keys_and_bytes_as_values(view: MapView) -> None:
    assert view.set(7, "01 02 ff").key == 7
    rows = view.rows().rows
    assert [row.key for row in rows] == [7]
    assert view.get(7).value == rows[0].value
    assert view.count() == 1
    assert view.delete(7)
    assert not view.delete(7)
    with pytest.raises(NotLoadedError, match="no entry 7 in foreign"):
        view.get(7)


@pytest.mark.parametrize("view", [(HASH, 6, 8)], indirect=True)
def test_keys_of_odd_sizes_are_bytes(view: MapView) -> None:
    view.set("aabbccddeeff", "0102030405060708")
    (row,) = view.rows().rows
    assert "aa" in str(row.key)
    with pytest.raises(UsageError):
        view.set("aabb", "0102030405060708")


@pytest.mark.parametrize("view", [(ARRAY, 4, 8)], indirect=True)
def test_arrays_are_full_and_stay_so(view: MapView) -> None:
    assert view.count() is None
    assert view.rows().rows == []
    assert view.rows().hidden == 8
    assert len(view.rows(everything=True).rows) == 8
    with pytest.raises(UnsupportedError, match="can't be deleted"):
        view.delete(0)


@pytest.mark.parametrize("view", [(lib.BPF_MAP_TYPE_XSKMAP, 4, 4)], indirect=True)
def test_sockets_are_not_shown(view: MapView) -> None:
    assert view.count() is None
    for attempt in (view.rows, lambda: view.get(0), lambda: view.set(0, 0)):
        with pytest.raises(UnsupportedError, match="doesn't show which sockets"):
            attempt()


def test_a_program_without_banks() -> None:
    assert active_bank(cast("inventory.Loaded", SimpleNamespace(maps={}))) == 0


@pytest.mark.parametrize(
    ("text", "key"),
    [("8001", 8001), ("1/2/0", "1/2/0"), ("10.0.0.0/8", "10.0.0.0/8"), ('{"a": 1}', {"a": 1}), ("", "")],
)
def test_keys_from_the_command_line(text: str, key: Any) -> None:
    assert parse_key(text) == key


@pytest.mark.parametrize("text", ["{", "[" * 100_000, '{"a": }'])
def test_what_is_not_json(text: str) -> None:
    with pytest.raises(UsageError, match="the key is not JSON"):
        parse_json(text, "key")


def test_an_idle_socket_needs_privileges() -> None:
    """And leaves nothing open where it has none."""
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    os.seteuid(65534)
    try:
        with pytest.raises(SluiceError, match="opening an AF_XDP socket") as caught:
            IdleSocket()
    finally:
        os.seteuid(0)
    assert "doctor" in caught.value.hint
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
