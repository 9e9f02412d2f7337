# SPDX-License-Identifier: Apache-2.0
"""Holding a peer at the door: a rate of its own for a configured peer, on top of what the policy says.

    with PeerHolds(program.maps) as holds:                 # SteerProgram's or SelectProgram's
        holds.hold("192.0.2.7", 500, 50)                   # 500 packets/s, 50 at once, for 60 seconds
        holds.counts(["192.0.2.7"])                        # what came, and what was dropped of it
        holds.release("192.0.2.7")

A hold ends by itself, so a controller that dies holds nobody for ever: whoever goes on wanting it calls
``hold`` again before the time is over.  It outlives its PeerHolds and a change of the policy, unless the
peer leaves the policy.  What is over it is dropped with the reason ``drop_held``; what is within it still
has to conform to the limits of the policy.

The program reads what is written here while packets come (bpf/include/hold.h).  Maps are mapped
memory, and each store is one aligned word or byte that the processor writes at once; the struct's
comment in bpf/include/abi.h says why no order among them can do harm.  Two holders of one peer
overwrite each other: the last one wins.
"""

from __future__ import annotations

import re
import struct
import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import ExitStack
from ipaddress import ip_address
from typing import Final, NamedTuple, Self

from xdp._libbpf import ffi
from xdp.abi import Address, pack_address, unpack_address
from xdp.errors import UnsupportedError, UsageError
from xdp.maps import BpfMap
from xdp.tables import hold_limit

KNOWN, HOLDS, MARKS = "known", "peer_holds", "hold_marks"
#: What a :class:`PeerHolds` needs of a program's maps.
MAPS: Final = (KNOWN, HOLDS, MARKS)

#: Seconds that a hold lasts unless it is told otherwise, and at most: nobody looks after it meanwhile.
DEFAULT_SECONDS: Final = 60.0
MAX_SECONDS: Final = 3600.0

#: From so many addresses on the whole table is read in batches: about 10 µs each, or 50 ms for all.
_BATCH_FROM: Final = 1024

_SECOND: Final = 1_000_000_000  # ns
_WORDS: Final = ffi.sizeof("struct sluice_hold") // 8
_LIMIT, _UNTIL, _TAT, _DROPS = (
    ffi.offsetof("struct sluice_hold", name) // 8 for name in ("interval_ns", "until_ns", "tat_ns", "drops")
)
_PAIR: Final = struct.Struct("=II")  # interval_ns, burst
_MARKED: Final = re.compile(rb"[^\0]")
_ID: Final = ffi.offsetof("struct sluice_known", "id")
_COUNTS: Final = struct.Struct("=QQQ")  # packets, bytes, drops: so in struct sluice_peer and sluice_away
_HOME: Final = ffi.offsetof("struct sluice_known", "peer", "packets")
_AWAY: Final = ffi.offsetof("struct sluice_known", "away", "packets")


class Held(NamedTuple):
    """A hold that is in force.

    packets_per_second, burst   what the program lets through; rounded as its interval is
    seconds                     how long still
    drops                       packets over it since it began
    """

    packets_per_second: int
    burst: int
    seconds: float
    drops: int


class PeerCounts(NamedTuple):
    """What the program has counted for a peer since it is configured; dropped packets came, too."""

    packets: int
    bytes: int
    drops: int


def check_seconds(seconds: object) -> int:
    """How long a hold lasts, in nanoseconds.  Raises UsageError."""
    # NaN is refused as well.
    if not isinstance(seconds, int | float) or not 0 < seconds <= MAX_SECONDS:
        raise UsageError(f"seconds of a hold: {seconds!r}; allowed: above 0, at most {MAX_SECONDS:,.0f}")
    return int(seconds * _SECOND)


class HoldTable:
    """The holds of a program by the peers' numbers, in mapped memory.  Close it."""

    def __init__(self, maps: Mapping[str, BpfMap]) -> None:
        """The maps may be closed afterwards.  Raises UnsupportedError for a program without holds."""
        if HOLDS not in maps or MARKS not in maps:
            raise UnsupportedError(
                "the program knows of no peers that are held: another version of Sluice loaded it",
                hint="use that version's `sluice`, or load it again: sluice down, sluice up",
            )
        self._memory = maps[HOLDS].map_memory(writable=True)
        self._words = memoryview(self._memory).cast("Q")
        self._marks = maps[MARKS].map_memory(writable=True)

    def set(self, number: int, interval_ns: int, burst: int, until_ns: int, now_ns: int) -> None:
        """Begin a hold, or go on with one that is in force: it keeps drops and what it has let through."""
        words, first = self._words, (number - 1) * _WORDS
        if not self._marks[number - 1] or words[first + _UNTIL] <= now_ns:
            words[first + _TAT] = words[first + _DROPS] = 0
        # The old rate may have put it further ahead than the new one can.
        furthest = now_ns + (burst + 1) * interval_ns
        tat = words[first + _TAT]
        if tat > furthest:
            words[first + _TAT] = furthest
        words[first + _LIMIT] = int.from_bytes(_PAIR.pack(interval_ns, burst), sys.byteorder)
        words[first + _UNTIL] = until_ns
        self._marks[number - 1] = 1

    def get(self, number: int, now_ns: int) -> Held | None:
        """What that peer is held at, or None."""
        if not self._marks[number - 1]:
            return None
        first = (number - 1) * _WORDS
        words = self._words[first : first + _WORDS].tolist()
        interval, burst = _PAIR.unpack(words[_LIMIT].to_bytes(8, sys.byteorder))
        left = words[_UNTIL] - now_ns
        if left <= 0 or not interval:
            return None
        return Held(max(1, round(_SECOND / interval)), burst + 1, left / _SECOND, words[_DROPS])

    def clear(self, numbers: Iterable[int]) -> None:
        """End the holds of these peers."""
        for number in numbers:
            if self._marks[number - 1]:
                self._words[(number - 1) * _WORDS + _UNTIL] = 0
                self._marks[number - 1] = 0

    def numbers(self) -> list[int]:
        """Who is held, or was and has not been released."""
        return [found.start() + 1 for found in _MARKED.finditer(self._marks)]

    def close(self) -> None:
        """Unmap; holds go on.  Idempotent."""
        self._words.release()
        self._memory.close()
        self._marks.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class PeerHolds:
    """Holds of a loaded program by address; see the module.

    ``maps`` are a program's, or those that :data:`MAPS` names; they stay the caller's, and have to stay open.
    ``clock`` is CLOCK_MONOTONIC in nanoseconds, which the program compares with.
    """

    def __init__(self, maps: Mapping[str, BpfMap], *, clock: Callable[[], int] = time.monotonic_ns) -> None:
        self._known = maps[KNOWN]
        self._table = HoldTable(maps)
        self._clock = clock
        self._opened = ExitStack()

    @classmethod
    def open(cls, open_map: Callable[[str], BpfMap]) -> PeerHolds:
        """Of ``inventory.find("eth1").map``, say: called for each of :data:`MAPS`, it gives one to keep."""
        with ExitStack() as cleanup:
            maps = {}
            for name in MAPS:
                maps[name] = open_map(name)
                cleanup.callback(maps[name].close)
            made = cls(maps)
            made._opened = cleanup.pop_all()
        return made

    def hold(
        self, address: Address | str, packets_per_second: int, burst: int, *, seconds: float = DEFAULT_SECONDS
    ) -> None:
        """Hold a peer at a rate for so long from now, or change and renew the hold that it has.

        Renewed, a hold goes on with what it has let through: that is no new burst.  Raises UsageError for a
        stranger and for what is out of range.
        """
        (interval, more), lasts = hold_limit(packets_per_second, burst), check_seconds(seconds)
        packed = _pack(address)
        number = self._number(packed)
        if number:
            now = self._clock()
            self._table.set(number, interval, more, now + lasts, now)
            if self._number(packed) == number:
                return
            # It left the policy meanwhile, and its number may be somebody else's.
            self._table.clear([number])
        raise UsageError(
            f"{unpack_address(packed)} is no configured peer, and only those can be held",
            hint="put it in the policy, in `peers` of a class; strangers are limited by `prefix_rate`",
        )

    def release(self, address: Address | str) -> bool:
        """End a hold; False if the peer had none (any more)."""
        number = self._number(_pack(address))
        if not number:
            return False
        was = self._table.get(number, self._clock()) is not None
        self._table.clear([number])
        return was

    def held(self) -> dict[Address, Held]:
        """All peers that are held now, whoever holds them."""
        now = self._clock()
        found = {number: self._table.get(number, now) for number in self._table.numbers()}
        if not any(found.values()):
            return {}
        addresses = {_number_in(raw): key for key, raw in self._known.items()}
        return {
            unpack_address(addresses[number]): held
            for number, held in found.items()
            if held is not None and number in addresses
        }

    def counts(self, addresses: Collection[Address | str]) -> dict[Address, PeerCounts]:
        """What came from these peers and what was dropped of it; strangers are left out.

        Both only grow while a peer stays configured, and begin anew when it comes back.
        """
        wanted = [_pack(address) for address in addresses]
        if len(wanted) < _BATCH_FROM:
            rows = [(packed, self._known.lookup(packed)) for packed in wanted]
        else:
            table = dict(self._known.items())
            rows = [(packed, table.get(packed)) for packed in wanted]
        return {unpack_address(packed): _counts_in(raw) for packed, raw in rows if raw is not None}

    def drops(self, addresses: Collection[Address | str]) -> dict[Address, int]:
        """Packets of these peers that the program has dropped, for whatever reason."""
        return {address: counts.drops for address, counts in self.counts(addresses).items()}

    def close(self) -> None:
        """Unmap; holds go on until their time is over.  Idempotent."""
        self._table.close()
        self._opened.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _number(self, packed: bytes) -> int:
        """Of a configured peer; 0 for a stranger."""
        raw = self._known.lookup(packed)
        return 0 if raw is None else _number_in(raw)


def _number_in(raw: bytes) -> int:
    return int.from_bytes(raw[_ID : _ID + 4], sys.byteorder)


def _counts_in(raw: bytes) -> PeerCounts:
    home, away = _COUNTS.unpack_from(raw, _HOME), _COUNTS.unpack_from(raw, _AWAY)
    return PeerCounts(*map(sum, zip(home, away, strict=True)))


def _pack(address: Address | str) -> bytes:
    try:
        return pack_address(ip_address(address) if isinstance(address, str) else address)
    except (ValueError, AttributeError):
        raise UsageError(f"{address!r} is no address; allowed: one IPv4 or IPv6 address") from None
