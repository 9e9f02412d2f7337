# SPDX-License-Identifier: Apache-2.0
"""One map of the loaded program with decoded keys and values: what `sluice map` reads and writes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import TracebackType
from typing import Any, NamedTuple

from sluice_cli.map_terms import BANK, CPU, VIEWS, IndexKey, add_values, is_summed, key_parts
from xdp import inventory, strangers
from xdp._libbpf import lib
from xdp.btf import Btf
from xdp.codec import Codec, IntegerCodec, RawCodec, Value, decode, encode, make_codec
from xdp.errors import NotLoadedError, UnsupportedError, UsageError
from xdp.maps import PER_CPU_TYPES, BpfMap
from xdp.names import Names
from xdp.owner_state import OwnerState, read_state, state_path
from xdp.strangers import Strangers

ARRAY_TYPES = frozenset((lib.BPF_MAP_TYPE_ARRAY, lib.BPF_MAP_TYPE_PERCPU_ARRAY))

# enum bpf_map_type of linux/bpf.h, those that programs of this kind have
TYPE_NAMES = {
    lib.BPF_MAP_TYPE_HASH: "hash",
    lib.BPF_MAP_TYPE_ARRAY: "array",
    lib.BPF_MAP_TYPE_PERCPU_HASH: "percpu_hash",
    lib.BPF_MAP_TYPE_PERCPU_ARRAY: "percpu_array",
    lib.BPF_MAP_TYPE_LRU_HASH: "lru_hash",
    lib.BPF_MAP_TYPE_LRU_PERCPU_HASH: "lru_percpu_hash",
    lib.BPF_MAP_TYPE_LPM_TRIE: "lpm_trie",
    lib.BPF_MAP_TYPE_ARRAY_OF_MAPS: "array_of_maps",
    lib.BPF_MAP_TYPE_HASH_OF_MAPS: "hash_of_maps",
    lib.BPF_MAP_TYPE_XSKMAP: "xskmap",
}


class Row(NamedTuple):
    """An entry. ``cpus`` holds each CPU's value instead, where they were asked for."""

    key: Value
    value: Value
    cpus: list[Value] | None = None

    def document(self) -> dict[str, Value]:
        """The row of a JSON report."""
        if self.cpus is None:
            return {"key": self.key, "value": self.value}
        return {"key": self.key, "values": [{"cpu": i, "value": one} for i, one in enumerate(self.cpus)]}


class Rows(NamedTuple):
    """Entries, and how many were left out because they are empty or of the other bank."""

    rows: list[Row]
    hidden: int


def owner_state(one: inventory.Loaded) -> OwnerState | None:
    """What the program's owner says about itself; None when it left nothing, or another program's."""
    state = read_state(state_path(one.interface, inventory.namespace_inode()))
    return state if state is not None and state.program_id == one.id else None


def names_of(one: inventory.Loaded) -> Names:
    """The policy's names, as far as the owner left them."""
    state = owner_state(one)
    return state.names if state is not None else Names()


class MapView:
    """An open map. Use it as a context manager."""

    def __init__(self, one: inventory.Loaded, name: str, names: Names | None = None) -> None:
        self.name = name
        self.loaded = one
        self.map = _open(one, name)
        try:
            self.names = names_of(one) if names is None else names
            self.info = self.map.info
            self.bank = 0 if name == "generation" else active_bank(one)
            self.key, self.value = self._codecs()
        except BaseException:
            self.map.close()
            raise

    def __enter__(self) -> MapView:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.map.close()

    @property
    def type_name(self) -> str:
        """The map's type as bpftool calls it."""
        if isinstance(self.map, Strangers):
            return "set-associative"
        return TYPE_NAMES.get(self.info.type, f"type {self.info.type}")

    @property
    def is_array(self) -> bool:
        """Whether there is an entry under every key."""
        return self.info.type in ARRAY_TYPES and not isinstance(self.map, Strangers)

    @property
    def per_cpu(self) -> bool:
        """Whether the kernel keeps one value per CPU for each key."""
        return self.info.type in PER_CPU_TYPES

    def rows(self, *, everything: bool = False, split_cpus: bool = False) -> Rows:
        """All entries, decoded.

        Without ``everything`` the empty entries of an array and those of the bank that is not in force are
        left out; without ``split_cpus`` the CPUs are added up.
        """
        self.check_readable()
        array = self.is_array
        rows: list[Row] = []
        hidden = 0
        for raw_key, raw in self.map.items():
            if array and not everything and not any(raw):
                hidden += 1
                continue
            key = decode(self.key, raw_key)
            if not everything and isinstance(key, dict) and key.get(BANK, self.bank) != self.bank:
                hidden += 1
                continue
            rows.append(self._row(key, raw, split_cpus))
        if is_summed(self.name) and not split_cpus and rows:
            rows = [Row(0, add_values([row.value for row in rows]))]
            hidden = 0
        return Rows(rows, hidden)

    def get(self, key: Value, *, split_cpus: bool = False) -> Row:
        """One entry. Raises `NotLoadedError` when there is none under that key."""
        self.check_readable()
        if is_summed(self.name) and not isinstance(key, dict):
            found = self.rows(split_cpus=False).rows
            return found[0] if found else Row(0, {})
        raw_key = self.raw_key(key)
        raw = self.map.lookup(raw_key)
        if raw is None:
            raise NotLoadedError(
                f"no entry {key!r} in {self.name}", hint=f"list them: sluice map dump {self.name}"
            )
        return self._row(decode(self.key, raw_key), raw, split_cpus)

    def set(self, key: Value, value: Value) -> Row:
        """Write one entry; members left out keep their value, or are zero in a new entry."""
        if self.per_cpu:
            raise UnsupportedError(f"{self.name} keeps a value per CPU, which can't be set from here")
        self.check_readable()
        raw_key = self.raw_key(key)
        raw = encode(self.value, value, base=self.map.lookup(raw_key), name="value")
        self.map.update(raw_key, raw)
        return self._row(decode(self.key, raw_key), raw, False)

    def delete(self, key: Value) -> bool:
        """Remove one entry; False when there was none."""
        if self.is_array:
            raise UnsupportedError(
                f"{self.name} is an array: its entries can't be deleted",
                hint="set it to zero with `sluice map set`",
            )
        return self.map.delete(self.raw_key(key))

    def raw_key(self, key: Value) -> bytes:
        """The bytes of a key. Raises `UsageError` with what a key looks like."""
        return encode(self.key, key, name="key")

    def check_readable(self) -> None:
        """Raise `UnsupportedError` for maps whose values the kernel keeps to itself."""
        if self.info.type == lib.BPF_MAP_TYPE_XSKMAP:
            raise UnsupportedError(
                f"the kernel doesn't show which sockets are in {self.name}",
                hint="`sluice lanes` shows which lanes nobody reads: their packets count as pass_no_socket",
            )

    def memory(self) -> int | None:
        """Bytes of kernel memory, where this kernel says so."""
        with open(f"/proc/self/fdinfo/{self.map.fd}", encoding="ascii") as file:  # noqa: PTH123
            for line in file:
                if line.startswith("memlock:"):
                    return int(line.split()[1])
        return None

    def count(self) -> int | None:
        """How many entries there are; None for arrays, which are always full."""
        if self.is_array or self.info.type == lib.BPF_MAP_TYPE_XSKMAP:
            return None
        return sum(1 for _ in self.map.items())

    def _row(self, key: Value, raw: bytes, split_cpus: bool) -> Row:
        if not self.per_cpu:
            return Row(key, decode(self.value, raw))
        cpus = [decode(self.value, one) for one in self._each_cpu(raw)]
        return Row(key, None, cpus) if split_cpus else Row(key, add_values(cpus))

    def _each_cpu(self, raw: bytes) -> Iterator[bytes]:
        """Each CPU's value; they lie at multiples of 8 bytes."""
        step = -(-self.info.value_size // 8) * 8
        for start in range(0, len(raw), step):
            yield raw[start : start + self.info.value_size]

    def _codecs(self) -> tuple[Codec, Codec]:
        info = self.info
        key: Codec
        value: Codec
        if info.btf_id and info.btf_value_type_id:
            btf = Btf.parse(inventory.btf_blob(info.btf_id))
            key = make_codec(btf, info.btf_key_type_id, VIEWS)
            value = make_codec(btf, info.btf_value_type_id, VIEWS)
        else:
            key = IntegerCodec(info.key_size) if info.key_size in (1, 2, 4, 8) else RawCodec(info.key_size)
            value = RawCodec(info.value_size)
        parts = key_parts(self.name, info.key_size, info.max_entries)
        if parts is not None:
            key = IndexKey(parts, self.names, self.bank)
        # BTF that disagrees with the map would make every row wrong, so it is worth nothing.
        if key.size != info.key_size:
            key = RawCodec(info.key_size)
        if value.size != info.value_size:
            value = RawCodec(info.value_size)
        return key, value


def _open(one: inventory.Loaded, name: str) -> BpfMap | Strangers:
    """A map of the program; strangers by their addresses, which in the kernel they are not."""
    if name != strangers.ENTRIES or not {strangers.AWAY, strangers.KNOWN} <= one.maps.keys():
        return one.map(name)
    return Strangers.open(one.map, one.maps[strangers.KNOWN])


def active_bank(one: inventory.Loaded) -> int:
    """The bank that packets are treated by: the low bit of the generation (bpf/include/abi.h)."""
    if "generation" not in one.maps:
        return 0
    opened = one.map("generation")
    try:
        raw = opened.lookup(bytes(opened.info.key_size))
    finally:
        opened.close()
    return int.from_bytes(raw or b"", sys.byteorder) % lib.SLUICE_BANKS


def parse_key(text: str) -> Any:
    """A key from the command line: JSON, or plain text such as 192.0.2.7, 10.0.0.0/8, 8001 or 1/2/0."""
    import json

    if text[:1] in '{["' and text:
        return parse_json(text, "key")
    try:
        return json.loads(text) if text.isdecimal() else text
    except ValueError:
        return text


def parse_json(text: str, what: str) -> Any:
    """A JSON value from the command line. Raises `UsageError`."""
    import json

    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"the {what} is not JSON: {error}", hint="for example '{\"tat_ns\": 0}'") from None


def split_by_cpu(view: MapView) -> bool:
    """Whether the map's rows are one per CPU."""
    return isinstance(view.key, IndexKey) and [part.name for part in view.key.parts] == [CPU]
