# SPDX-License-Identifier: Apache-2.0
"""Writing a policy into a loaded program's maps, bank by bank.

The order is what makes a change safe while traffic flows: fill the bank that no
packet uses, write the generation (one aligned 64-bit store: now every new packet
uses that bank), wait until no packet of the old generation is on its way, and
only then tidy up.
"""

from __future__ import annotations

import dataclasses
import os
import struct
import threading
from array import array
from typing import Any

from xdp._libbpf import ffi, lib
from xdp.errors import PolicyError, SluiceError
from xdp.holds import HoldTable
from xdp.maps import BpfMap
from xdp.tables import KnownTable, Tables

_GENERATION = struct.Struct("=Q")
_INDEX_0 = struct.pack("=I", 0)
_ADDRESS_SIZE = ffi.sizeof("struct sluice_address")
_PREFIX_SIZE = ffi.sizeof("struct sluice_prefix")


class PolicyMaps:
    """The maps that say what the operator wants.  One writer at a time; ``swap`` is thread-safe."""

    def __init__(self, maps: dict[str, BpfMap]) -> None:
        self._maps = maps
        self._lock = threading.Lock()
        #: What is in force, with the peers' numbers as the kernel has them; None before the first swap.
        self.tables: Tables | None = None

    @property
    def generation(self) -> int:
        """Number of the policy in force; 0: none yet, everything passes."""
        raw = self._maps["generation"].lookup(_INDEX_0)
        return int(_GENERATION.unpack(raw or bytes(8))[0])

    def swap(self, tables: Tables) -> int:
        """Put ``tables`` in force and return the new generation.

        Peers that both policies know keep their numbers, limits, holds and counters.
        Raises PolicyError where the tables do not fit the maps.
        """
        self._check_sizes(tables)
        with self._lock, HoldTable(self._maps) as holds:
            generation = self.generation + 1
            bank = generation % lib.SLUICE_BANKS
            present = self._present()
            # What came too late for a peer that had left is no hold of who gets its number now.
            holds.clear(set(holds.numbers()) - set(present.values()))
            tables, gone = _number_peers(tables, present)
            self._write_bank(bank, tables)
            self._add_peers(tables.known)
            self._maps["generation"].update(_INDEX_0, _GENERATION.pack(generation))
            wait_for_running_programs()
            # Strangers from here on; until now the old policy may have counted on them.
            if gone:
                keys = ffi.from_buffer("char[]", b"".join(gone))
                self._maps["known"].delete_many(keys, len(gone))
                holds.clear(gone.values())
            self.tables = tables
            return generation

    def _check_sizes(self, tables: Tables) -> None:
        for name, count, limit in (
            ("configured peers", tables.known.count, self._maps["known"].info.max_entries),
            ("prefixes and peers", tables.prefixes.count, self._maps["prefixes_0"].info.max_entries),
        ):
            if count > limit:
                raise PolicyError(f"the policy has {count:,} {name}; at most {limit:,} fit")

    def _present(self) -> dict[bytes, int]:
        """The configured peers that the program knows, with their numbers."""
        offset = ffi.offsetof("struct sluice_known", "id")
        return {key: struct.unpack_from("=I", value, offset)[0] for key, value in self._maps["known"].items()}

    def _write_bank(self, bank: int, tables: Tables) -> None:
        maps = self._maps
        maps["policies"].update(struct.pack("=I", bank), bytes(ffi.buffer(tables.policy)))
        ports = bytearray(lib.SLUICE_PORTS * ffi.sizeof("struct sluice_port"))
        for port, entry in tables.ports.items():
            ports[port * len(entry) : (port + 1) * len(entry)] = entry
        _write_rows(
            maps["ports"], bank * lib.SLUICE_PORTS, ffi.from_buffer("char[]", ports), lib.SLUICE_PORTS
        )
        _write_rows(maps["patterns"], bank * len(tables.patterns), tables.patterns, len(tables.patterns))
        _write_rows(maps["rules"], bank * len(tables.rules), tables.rules, len(tables.rules))
        self._write_prefixes(maps[f"prefixes_{bank}"], tables)
        # Before the peers themselves: whoever is in "known" for this bank's policy has its bit set.
        words = ffi.new("struct sluice_filter[]", lib.SLUICE_FILTER_WORDS)
        lib.sluice_filter_add(words, tables.known.keys, tables.known.count)
        _write_rows(maps["known_filter"], bank * len(words), words, len(words))

    def _write_prefixes(self, trie: BpfMap, tables: Tables) -> None:
        table = tables.prefixes
        raw = bytes(ffi.buffer(table.keys, table.count * _PREFIX_SIZE))
        wanted = {raw[start : start + _PREFIX_SIZE] for start in range(0, len(raw), _PREFIX_SIZE)}
        stale = [key for key, _ in trie.items() if key not in wanted]
        trie.delete_many(ffi.from_buffer("char[]", b"".join(stale)), len(stale))
        trie.update_many(table.keys, table.values, table.count)

    def _add_peers(self, known: KnownTable) -> None:
        present = {key for key, _ in self._maps["known"].items()}
        raw = bytes(ffi.buffer(known.keys, known.count * _ADDRESS_SIZE))
        fresh = [
            (raw[index * _ADDRESS_SIZE : (index + 1) * _ADDRESS_SIZE], known.ids[index])
            for index in range(known.count)
            if raw[index * _ADDRESS_SIZE : (index + 1) * _ADDRESS_SIZE] not in present
        ]
        values = ffi.new("struct sluice_known[]", len(fresh))
        for value, (_, number) in zip(values, fresh, strict=True):
            value.id = number
        keys = ffi.from_buffer("char[]", b"".join(key for key, _ in fresh))
        self._maps["known"].update_many(keys, values, len(fresh))


def _number_peers(tables: Tables, present: dict[bytes, int]) -> tuple[Tables, dict[bytes, int]]:
    """The same tables with peers numbered as they already are, and those that are gone."""
    raw = bytes(ffi.buffer(tables.known.keys, tables.known.count * _ADDRESS_SIZE))
    wanted = [raw[start : start + _ADDRESS_SIZE] for start in range(0, len(raw), _ADDRESS_SIZE)]
    gone = {address: present[address] for address in present.keys() - set(wanted)}
    if not present:
        return tables, gone
    # A number is not given to somebody else while packets marked with it may still be read.
    taken = set(present.values())
    unused = iter(number for number in range(1, len(taken) + len(wanted) + 1) if number not in taken)
    ids = array("I", (present.get(address) or next(unused) for address in wanted))
    known = KnownTable(tables.known.keys, ffi.from_buffer("uint32_t[]", ids), tables.known.count)
    return dataclasses.replace(tables, known=known), gone


def _write_rows(target: BpfMap, first: int, rows: Any, count: int) -> None:
    keys = ffi.from_buffer("uint32_t[]", array("I", range(first, first + count)))
    target.update_many(keys, rows, count)


def wait_for_running_programs() -> None:
    """Return when no packet that began before the call is still in a program.

    The kernel promises that to whoever updates a map of maps: the update returns
    after an RCU grace period (``maybe_wait_bpf_programs`` in kernel/bpf/syscall.c,
    Linux 5.0 and later), and XDP programs run inside RCU read sections.
    """
    inner = lib.sluice_map_create(lib.BPF_MAP_TYPE_ARRAY, b"sluice_inner", 4, 4, 1, 0, -1)
    if inner < 0:
        raise SluiceError.from_errno("making a map to wait for a grace period", -inner)
    try:
        outer = lib.sluice_map_create(lib.BPF_MAP_TYPE_ARRAY_OF_MAPS, b"sluice_outer", 4, 4, 1, 0, inner)
        if outer < 0:
            raise SluiceError.from_errno("making a map of maps to wait for a grace period", -outer)
        try:
            key, value = ffi.new("uint32_t *", 0), ffi.new("uint32_t *", inner)
            result = lib.sluice_map_update(outer, key, value, lib.BPF_ANY)
            if result < 0:
                raise SluiceError.from_errno("waiting for a grace period", -result)
        finally:
            os.close(outer)
    finally:
        os.close(inner)
