# SPDX-License-Identifier: Apache-2.0
"""The strangers that a loaded program remembers, by address.

In the kernel they are two arrays whose order only the program knows (bpf/include/strangers.h): its
hash has a salt.  So finding one here means looking through all, a few milliseconds; the program
itself never does.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Callable, Iterator

from xdp._libbpf import ffi
from xdp.errors import NotLoadedError
from xdp.maps import BpfMap, MapInfo

ENTRIES, AWAY, KNOWN = "strangers", "strangers_away", "known"

_ENTRY = ffi.sizeof("struct sluice_stranger")
_PEER = ffi.sizeof("struct sluice_peer")
_ADDRESS = slice(ffi.offsetof("struct sluice_stranger", "address"), _ENTRY)
_SHARED = ffi.offsetof("struct sluice_peer", "shared")
_COUNTS = ffi.sizeof("struct sluice_away")
#: Between the peer and what other CPUs count a configured peer has its number; strangers have none.
_NUMBER = bytes(ffi.offsetof("struct sluice_known", "away") - _PEER)
_END = bytes(ffi.sizeof("struct sluice_known") - _PEER - len(_NUMBER) - _COUNTS)


class Strangers:
    """What :class:`xdp.maps.BpfMap` is to a hash: address -> ``struct sluice_known``, with the number 0.

    Takes over both maps. ``known`` describes the map of configured peers, whose types these are too.
    """

    def __init__(self, entries: BpfMap, away: BpfMap, known: MapInfo) -> None:
        self._entries, self._away = entries, away
        self.fd = entries.fd
        self.entry_size = known.value_size
        self.info = dataclasses.replace(
            entries.info,
            key_size=known.key_size,
            value_size=known.value_size,
            btf_key_type_id=known.btf_key_type_id,
            btf_value_type_id=known.btf_value_type_id,
        )

    @classmethod
    def open(cls, open_map: Callable[[str], BpfMap], known: MapInfo) -> Strangers:
        """With ``open_map`` giving a map of its own for each name."""
        entries = open_map(ENTRIES)
        try:
            return cls(entries, open_map(AWAY), known)
        except BaseException:
            entries.close()
            raise

    def items(self) -> Iterator[tuple[bytes, bytes]]:
        """All that are remembered.  While packets come, one may be missed, or seen as it is made."""
        with self._entries.map_memory() as memory:
            taken = memory[:]
        words = memoryview(taken).cast("Q")
        each = _ENTRY // words.itemsize
        halves = zip(words[each - 2 :: each].tolist(), words[each - 1 :: each].tolist(), strict=True)
        with self._away.map_memory() as counted:
            for index, (upper, lower) in enumerate(halves):
                if not upper and not lower:
                    continue
                entry = taken[index * _ENTRY : (index + 1) * _ENTRY]
                start = index * _COUNTS
                counts = counted[start : start + _COUNTS] if entry[_SHARED] else bytes(_COUNTS)
                yield entry[_ADDRESS], entry[:_PEER] + _NUMBER + counts + _END

    def lookup(self, address: bytes) -> bytes | None:
        """``struct sluice_known`` of an address, or None."""
        index = self._find(address)
        if index is None:
            return None
        entry = self._entries.lookup(_key(index)) or bytes(_ENTRY)
        counts = self._away.lookup(_key(index)) if entry[_SHARED] else None
        return entry[:_PEER] + _NUMBER + (counts or bytes(_COUNTS)) + _END

    def update(self, address: bytes, value: bytes) -> None:
        """Write what is known of a stranger that is remembered.  Raises `NotLoadedError` for others."""
        index = self._find(address)
        if index is None:
            raise NotLoadedError(
                f"no such entry in {ENTRIES}, and only the program adds one",
                hint="it does so with the first packet of an address",
            )
        # In this order: the entry's flag says that the other one is its own.
        self._away.update(_key(index), value[_PEER + len(_NUMBER) :][:_COUNTS])
        peer = bytearray(value[:_PEER])
        peer[_SHARED] = 1
        self._entries.update(_key(index), bytes(peer) + address)

    def delete(self, address: bytes) -> bool:
        """Forget one; False if it is not remembered."""
        index = self._find(address)
        if index is not None:
            self._entries.update(_key(index), bytes(_ENTRY))
        return index is not None

    def close(self) -> None:
        """Give up both descriptors; idempotent."""
        self._entries.close()
        self._away.close()

    def _find(self, address: bytes) -> int | None:
        """Where the address is."""
        if not any(address):
            return None  # what an entry without anybody has
        with self._entries.map_memory() as memory:
            at = memory.find(address)
            while at >= 0 and at % _ENTRY != _ADDRESS.start:
                at = memory.find(address, at + 1)
        return at // _ENTRY if at >= 0 else None


def _key(index: int) -> bytes:
    return struct.pack("=I", index)
