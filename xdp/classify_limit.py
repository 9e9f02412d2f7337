# SPDX-License-Identifier: Apache-2.0
"""Rate limits of the reference classifier: GCRA and the tables of its timestamps.

The generic cell rate algorithm (ITU-T I.371, virtual scheduling form) keeps one
number for each flow: the theoretical arrival time (TAT) of its next packet.  All
times are whole nanoseconds.  Strangers are many and hostile, so what is kept for
them is bounded.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

from xdp._libbpf import lib


class Limit(NamedTuple):
    """As ``struct sluice_limit``; a missing limit is None, not zero."""

    interval_ns: int
    burst_ns: int


def next_tat(tat_ns: int, now_ns: int, limit: Limit) -> int | None:
    """The TAT after a packet at ``now_ns``, or None when the packet is over the limit.

    A packet over the limit leaves the TAT as it was.
    """
    base = max(tat_ns, now_ns)
    if base - now_ns > limit.burst_ns:
        return None
    return base + limit.interval_ns


class Timestamps:
    """TATs by key, without bound: for keys that the policy or the program numbers."""

    def __init__(self) -> None:
        self._tat: dict[bytes | int, int] = {}

    def over(self, key: bytes | int, limit: Limit, now_ns: int) -> bool:
        """Counts a packet; True when it is over ``limit``."""
        tat = next_tat(self._tat.get(key, 0), now_ns, limit)
        if tat is None:
            return True
        self._tat[key] = tat
        return False


class HoldTimestamps:
    """Holds by address, as bpf/include/hold.h has them: a limit until a time, and its TAT."""

    def __init__(self) -> None:
        self._held: dict[bytes, tuple[Limit, int, int]] = {}  # limit, until, TAT

    def set(self, key: bytes, limit: Limit, until_ns: int, now_ns: int) -> None:
        """Begin a hold, or go on with one that is in force: then it keeps what it has let through."""
        _, until, tat = self._held.get(key, (limit, 0, 0))
        tat = 0 if until <= now_ns else min(tat, now_ns + limit.burst_ns + limit.interval_ns)
        self._held[key] = limit, until_ns, tat

    def clear(self, key: bytes) -> None:
        """End it."""
        self._held.pop(key, None)

    def keep(self, wanted: Callable[[bytes], bool]) -> None:
        """End those of others."""
        self._held = {key: held for key, held in self._held.items() if wanted(key)}

    def over(self, key: bytes, now_ns: int) -> bool:
        """Counts a packet; True when it is over the rate that its sender is held at."""
        held = self._held.get(key)
        if held is None or held[1] <= now_ns:
            return False
        limit, until, tat = held
        following = next_tat(tat, now_ns, limit)
        if following is None:
            return True
        self._held[key] = limit, until, following
        return False


class StrangerTimestamps:
    """TATs of unconfigured peers, least recently seen first out, as in the program's LRU.

    An address that was washed out starts anew; the limits of its prefix and lane
    are there for senders who invent addresses.
    """

    def __init__(self, size: int = lib.SLUICE_MAX_STRANGERS) -> None:
        self._tat: OrderedDict[bytes, int] = OrderedDict()
        self._size = size

    def __len__(self) -> int:
        return len(self._tat)

    def over(self, address: bytes, limit: Limit, now_ns: int) -> bool:
        """Counts a packet; True when it is over ``limit``."""
        tat = next_tat(self._tat.get(address, 0), now_ns, limit)
        if tat is not None:
            if len(self._tat) >= self._size and address not in self._tat:
                self._tat.popitem(last=False)
            self._tat[address] = tat
        self._tat.move_to_end(address)
        return tat is None


class PrefixTimestamps:
    """TATs of strangers' prefixes: exact while they are few, shared buckets beyond.

    The program always hashes prefixes into SLUICE_PREFIX_BUCKETS buckets.  Here
    each of the first ``size`` prefixes has a timestamp of its own, which makes this
    a reference; when that many are busy at once, new ones share hashed buckets, so
    inventing prefixes neither fills memory nor evicts a limit.
    """

    #: A sweep over a full table takes some milliseconds; at most one per this many nanoseconds.
    SWEEP_INTERVAL_NS = 100_000_000

    def __init__(self, size: int = 4 * lib.SLUICE_PREFIX_BUCKETS) -> None:
        self._tat: dict[tuple[int, int], int] = {}
        self._shared: dict[int, int] = {}
        self._size = size
        self._next_sweep_ns = 0

    def __len__(self) -> int:
        return len(self._tat) + len(self._shared)

    def over(self, prefix: tuple[int, int], limit: Limit, now_ns: int) -> bool:
        """Counts a packet of ``prefix`` (IP version, bits); True when it is over ``limit``."""
        tat = self._tat.get(prefix)
        if tat is None and len(self._tat) >= self._size:
            self._sweep(now_ns)
        if tat is None and len(self._tat) >= self._size:
            bucket = hash(prefix) % lib.SLUICE_PREFIX_BUCKETS
            tat = next_tat(self._shared.get(bucket, 0), now_ns, limit)
            if tat is not None:
                self._shared[bucket] = tat
            return tat is None
        tat = next_tat(tat or 0, now_ns, limit)
        if tat is not None:
            self._tat[prefix] = tat
        return tat is None

    def _sweep(self, now_ns: int) -> None:
        """Forgets what has expired: a TAT in the past says as much as none."""
        if now_ns < self._next_sweep_ns:
            return
        self._next_sweep_ns = now_ns + self.SWEEP_INTERVAL_NS
        self._tat = {prefix: tat for prefix, tat in self._tat.items() if tat > now_ns}
        self._shared = {bucket: tat for bucket, tat in self._shared.items() if tat > now_ns}
